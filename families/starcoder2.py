"""StarCoder 2 (Lozhkov 2024): LayerNorm with biases, an MLP that is not gated, biases everywhere.
"""
from __future__ import annotations

from config import refuse_to_run
from families.base import LLAMA, L, like, windowed


ROWS = (
    like(LLAMA, "starcoder2", "Starcoder2ForCausalLM",
         dict(norm="layernorm", norm_bias=True, gated=False),
         {"norm_eps": "norm_epsilon", "qkv_bias": "use_bias", "o_bias": "use_bias",
          "mlp_bias": "use_bias"},
         dict(max_position_embeddings=4096, num_key_value_heads=2, norm_epsilon=1e-5,
              hidden_act="gelu_pytorch_tanh", use_bias=True, tie_word_embeddings=True,
              initializer_range=0.018042),
         keys={L + "mlp.c_fc": (L + "mlp.up_proj",), L + "mlp.c_proj": (L + "mlp.down_proj",)},
         scratch=dict(qkv_bias=True, o_bias=True, mlp_bias=True, activation="gelu_pytorch_tanh",
                      tie_word_embeddings=True), rank=2, **windowed(None)),
)


if __name__ == "__main__":
    refuse_to_run()
