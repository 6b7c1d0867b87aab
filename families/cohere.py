"""Command R (Cohere): attention and MLP in parallel on one LayerNorm, logits scaled, tied.

The parallel block is GPT-J's and PaLM's; rotary positions turn neighbouring features.
"""
from __future__ import annotations

from typing import Any

from config import refuse_to_run
from families.base import LARGEST_DEPTH, LLAMA, by_layer, like, no_windows


def cohere_read(hf: dict, values: dict) -> None:
    """Read Command R's scale of the logits; 0 makes no model and ends in 1 / 0."""
    no_windows(hf, values)
    # logits are multiplied by it there, divided here
    scale = hf.get("logit_scale", 0.0625)
    values["logits_scaling"] = 1 / (0.0625 if scale is None else scale)


COHERE2_WINDOWS = by_layer(lambda i, hf: (i + 1) % hf.get("sliding_window_pattern", 4), asks=False)


def cohere2_read(hf: dict, values: dict) -> None:
    """Read windows and scale; layers without a window have no positions."""
    COHERE2_WINDOWS["read"](hf, values)
    scale = hf.get("logit_scale", 0.0625)
    values["logits_scaling"] = 1 / (0.0625 if scale is None else scale)
    types = values.get("layer_types") or ["full_attention"] * min(values["n_layer"], LARGEST_DEPTH)
    values["nope_layers"] = [i for i, kind in enumerate(types) if kind == "full_attention"]


def cohere2_write(config: Any, hf: dict) -> None:
    """Write windows and scale."""
    COHERE2_WINDOWS["write"](config, hf)
    hf["logit_scale"] = 1 / config.logits_scaling


ROWS = (
    like(LLAMA, "cohere", "CohereForCausalLM",
         dict(norm="layernorm", norm_placement="parallel", mlp_bias=False, rope_interleaved=True),
         {"norm_eps": "layer_norm_eps"},
         dict(max_position_embeddings=8192, layer_norm_eps=1e-5, tie_word_embeddings=True,
              rope_theta=5e5),
         only={"use_qk_norm": (False,)}, read=cohere_read, reads=("logit_scale", "layer_types"),
         write=lambda config, hf: hf.update(logit_scale=1 / config.logits_scaling),
        scratch=dict(logits_scaling=16.0, tie_word_embeddings=True)),
    like(LLAMA, "cohere2", "Cohere2ForCausalLM",
         dict(norm="layernorm", norm_placement="parallel", mlp_bias=False, rope_interleaved=True),
         {"norm_eps": "layer_norm_eps"},
         dict(max_position_embeddings=8192, layer_norm_eps=1e-5, tie_word_embeddings=True),
         read=cohere2_read, write=cohere2_write, only={"use_qk_norm": (False,)},
         reads=("logit_scale", "sliding_window_pattern", *COHERE2_WINDOWS["reads"]),
         scratch=dict(logits_scaling=16.0, tie_word_embeddings=True, sliding_window=4096,
                      sliding_window_pattern=4), rank=2,
         from_shape=lambda shape: {"nope_layers": list(range(3, shape.get("n_layer", 12), 4))}),
)


if __name__ == "__main__":
    refuse_to_run()
