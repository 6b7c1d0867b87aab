"""OLMo 2 (OLMo team 2024): norms after each branch only, and QK-norm over all heads together."""
from __future__ import annotations

from config import refuse_to_run
from families.base import LLAMA, L, like, make_size

ROWS = (
    like(LLAMA, "olmo2", "Olmo2ForCausalLM",
         dict(norm_placement="post", qk_norm=True, qk_norm_whole=True, mlp_bias=False),
         defaults=dict(rms_norm_eps=1e-5),
         keys={L + "post_attention_layernorm": (L + "post_self_attn_layernorm",),
               L + "post_feedforward_layernorm": (L + "post_mlp_layernorm",)},
        scratch=dict(rope_theta=5e5),
        presets={"olmo2-1b": dict(vocab_size=100352, block_size=4096, norm_eps=1e-6,
                                  **make_size(16, 16, 16, 2048, 8192))}),
)


if __name__ == "__main__":
    refuse_to_run()
