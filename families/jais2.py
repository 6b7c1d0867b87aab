"""Jais 2 (MBZUAI 2025): LayerNorm, squared ReLU without a gate, biases everywhere.
"""
from __future__ import annotations

from config import refuse_to_run
from families.base import LLAMA, like


ROWS = (
    like(LLAMA, "jais2", "Jais2ForCausalLM", dict(norm="layernorm", norm_bias=True, gated=False),
         {"norm_eps": "layer_norm_eps"},
         dict(max_position_embeddings=8192, num_key_value_heads=26,
              hidden_act="relu2", layer_norm_eps=1e-5, attention_bias=True, mlp_bias=True),
         scratch=dict(qkv_bias=True, o_bias=True, mlp_bias=True, activation="relu2"), rank=2),
)


if __name__ == "__main__":
    refuse_to_run()
