"""Seed-OSS (ByteDance 2025): Llama with biases on q, k, v and a switch for that of o.
"""
from __future__ import annotations

from config import refuse_to_run
from families.base import LLAMA, like


ROWS = (
    like(LLAMA, "seed_oss", "SeedOssForCausalLM", {}, {"o_bias": "attention_out_bias"},
         dict(max_position_embeddings=524288, num_key_value_heads=8, head_dim=128,
              attention_bias=True, attention_out_bias=False),
         scratch=dict(qkv_bias=True), rank=2, ignores=("residual_dropout",)),
)


if __name__ == "__main__":
    refuse_to_run()
