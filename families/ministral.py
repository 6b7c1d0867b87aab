"""Ministral (Mistral 2024): Mistral whose windows are given layer by layer.
"""
from __future__ import annotations

from config import refuse_to_run
from families.base import LLAMA, NO_BIAS, by_layer, like


ROWS = (
    like(LLAMA, "ministral", "MinistralForCausalLM", NO_BIAS,
         defaults=dict(max_position_embeddings=131072, num_key_value_heads=8),
         scratch=dict(sliding_window=4096), rank=2, null_ids=False,
         **by_layer(lambda i, hf: True, asks=False)),
)


if __name__ == "__main__":
    refuse_to_run()
