"""Code World Model (Meta 2025): Llama 3's rotary scaling, a window in three of four layers.
"""
from __future__ import annotations

from config import UserError, refuse_to_run
from families.base import LLAMA, by_layer, like


WINDOWS = by_layer(lambda i, hf: i % 4, asks=False, window=8192)
# what transformers takes where the file has no rotary settings at all
ROPE_SCALING = {"rope_type": "llama3", "factor": 16.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def cwm_read(hf: dict, values: dict) -> None:
    """Read the windows, and the rotary settings that silence means."""
    WINDOWS["read"](hf, values)
    if all(hf.get(key) is None for key in ("rope_parameters", "rope_scaling")):
        if hf.get("rope_theta") is not None:
            raise UserError("rope_theta without rope_parameters is not supported in a cwm model: "
                            "write rope_parameters")
        values["rope_scaling"] = ROPE_SCALING


ROWS = (
    like(LLAMA, "cwm", "CwmForCausalLM", dict(qkv_bias=False, o_bias=False),
         defaults=dict(max_position_embeddings=131072, num_key_value_heads=8, head_dim=128,
                       rms_norm_eps=1e-5, rope_theta=1e6),
         read=cwm_read, write=WINDOWS["write"], reads=WINDOWS["reads"], rank=2, null_ids=False,
         scratch=dict(rope_theta=1e6, rope_scaling=ROPE_SCALING, sliding_window=8192),
         from_shape=lambda shape: {"layer_types": [
             "sliding_attention" if i % 4 else "full_attention"
             for i in range(shape.get("n_layer", 12))]}),
)


if __name__ == "__main__":
    refuse_to_run()
