"""ERNIE 4.5 (Baidu 2025), dense: Llama, tied, rotary positions on neighbouring features.
"""
from __future__ import annotations

from config import refuse_to_run
from families.base import LLAMA, like, make_size


ROWS = (
    like(LLAMA, "ernie4_5", "Ernie4_5ForCausalLM", dict(rope_interleaved=True),
         {"qkv_bias": "use_bias", "o_bias": "use_bias", "mlp_bias": "use_bias"},
         dict(max_position_embeddings=131072, num_key_value_heads=2, head_dim=128,
              rms_norm_eps=1e-5, rope_theta=5e5, tie_word_embeddings=True, use_bias=False),
         scratch=dict(rope_theta=5e5, tie_word_embeddings=True), rank=2,
         presets={"ernie-4.5-0.3b": dict(vocab_size=103424, block_size=131072, head_dim=128,
                                         **make_size(18, 16, 2, 1024, 3072))}),
)


if __name__ == "__main__":
    refuse_to_run()
