"""EXAONE 4 (LG 2025): norms after each branch, QK-norm, full layers without positions.
"""
from __future__ import annotations

from typing import Any

from config import refuse_to_run
from families.base import LARGEST_DEPTH, LLAMA, L, NO_BIAS, by_layer, like


WINDOWS = by_layer(lambda i, hf: (i + 1) % (hf.get("sliding_window_pattern") or 4), asks=False)


def exaone4_read(hf: dict, values: dict) -> None:
    """Read the windows; among layers with windows, those without have no positions."""
    WINDOWS["read"](hf, values)
    types = values.get("layer_types")
    if values["sliding_window"] and types is None:
        types = ["full_attention"] * min(values["n_layer"], LARGEST_DEPTH)
    if values["sliding_window"]:
        values["nope_layers"] = [i for i, kind in enumerate(types) if kind == "full_attention"]


def exaone4_write(config: Any, hf: dict) -> None:
    """Write the windows: null where no layer has one."""
    WINDOWS["write"](config, hf)
    hf["sliding_window"] = config.sliding_window or None


ROWS = (
    like(LLAMA, "exaone4", "Exaone4ForCausalLM",
         dict(NO_BIAS, norm_placement="post", qk_norm=True),
         defaults=dict(num_key_value_heads=32, rms_norm_eps=1e-5),
         keys={L + "post_attention_layernorm": (L + "post_self_attn_layernorm",),
               L + "post_feedforward_layernorm": (L + "post_mlp_layernorm",)},
         read=exaone4_read, write=exaone4_write, rank=2,
         reads=("sliding_window_pattern", *WINDOWS["reads"])),
)


if __name__ == "__main__":
    refuse_to_run()
