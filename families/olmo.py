"""OLMo 2 and 3, OLMoE (OLMo team 2024, 2025): QK-norm over all heads of a token together.

OLMo 2 and 3 have norms after each branch only; OLMo 3 adds windows in three of four layers, OLMoE
(Muennighoff 2024) is a pre-norm MoE model.
"""
from __future__ import annotations

from config import refuse_to_run
from families.base import (LLAMA, L, by_layer, like, make_size, needs_experts, no_windows,
                           run_all)

POST_NORMS = {L + "post_attention_layernorm": (L + "post_self_attn_layernorm",),
              L + "post_feedforward_layernorm": (L + "post_mlp_layernorm",)}

ROWS = (
    like(LLAMA, "olmo2", "Olmo2ForCausalLM",
         dict(norm_placement="post", qk_norm=True, qk_norm_whole=True, mlp_bias=False),
         defaults=dict(rms_norm_eps=1e-5),
         keys={L + "post_attention_layernorm": (L + "post_self_attn_layernorm",),
               L + "post_feedforward_layernorm": (L + "post_mlp_layernorm",)},
        scratch=dict(rope_theta=5e5),
        presets={"olmo2-1b": dict(vocab_size=100352, block_size=4096, norm_eps=1e-6,
                                  **make_size(16, 16, 16, 2048, 8192))}),
    like(LLAMA, "olmo3", "Olmo3ForCausalLM",
         dict(norm_placement="post", qk_norm=True, qk_norm_whole=True, mlp_bias=False),
         defaults=dict(rms_norm_eps=1e-5, rope_theta=5e5, rope_local_theta=5e5), keys=POST_NORMS,
         rope="nested", **by_layer(lambda i, hf: (i + 1) % 4, asks=False),
         scratch=dict(rope_theta=5e5, rope_local_theta=5e5, sliding_window=4096,
                      sliding_window_pattern=4), rank=2),
    like(LLAMA, "olmoe", "OlmoeForCausalLM",
         dict(qk_norm=True, qk_norm_whole=True, mlp_bias=False),
         {"num_experts": "num_experts", "num_experts_per_tok": "num_experts_per_tok",
          "moe_intermediate_size": "intermediate_size", "norm_topk_prob": "norm_topk_prob"},
         dict(max_position_embeddings=4096, rms_norm_eps=1e-5, num_experts=64,
              num_experts_per_tok=8, norm_topk_prob=False),
         only={"clip_qkv": ()}, read=run_all(no_windows, needs_experts),
         synonyms={"num_local_experts": "num_experts"},
         scratch=dict(num_experts=8, num_experts_per_tok=2), rank=2,
         presets={"olmoe-1b-7b": dict(vocab_size=50304, block_size=4096, num_experts=64,
                                      num_experts_per_tok=8, moe_intermediate_size=1024,
                                      **make_size(16, 16, 16, 2048, 1024))}),
)


if __name__ == "__main__":
    refuse_to_run()
