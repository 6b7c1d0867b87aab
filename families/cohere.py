"""Command R (Cohere): attention and MLP in parallel on one LayerNorm, logits scaled, tied.

The parallel block is GPT-J's and PaLM's; rotary positions turn neighbouring features.
"""
from __future__ import annotations

from config import refuse_to_run
from families.base import LLAMA, like, no_windows


def cohere_read(hf: dict, values: dict) -> None:
    """Read Command R's scale of the logits; 0 makes no model and ends in 1 / 0."""
    no_windows(hf, values)
    # logits are multiplied by it there, divided here
    scale = hf.get("logit_scale", 0.0625)
    values["logits_scaling"] = 1 / (0.0625 if scale is None else scale)


ROWS = (
    like(LLAMA, "cohere", "CohereForCausalLM",
         dict(norm="layernorm", norm_placement="parallel", mlp_bias=False, rope_interleaved=True),
         {"norm_eps": "layer_norm_eps"},
         dict(max_position_embeddings=8192, layer_norm_eps=1e-5, tie_word_embeddings=True,
              rope_theta=5e5),
         only={"use_qk_norm": (False,)}, read=cohere_read, reads=("logit_scale", "layer_types"),
         write=lambda config, hf: hf.update(logit_scale=1 / config.logits_scaling),
        scratch=dict(logits_scaling=16.0, tie_word_embeddings=True)),
)


if __name__ == "__main__":
    refuse_to_run()
