"""MiniMax-M2 (MiniMax 2025): an MoE model with QK-norm over all heads and partial rotary positions.
"""
from __future__ import annotations

from config import refuse_to_run
from families.base import LLAMA, L, NO_BIAS, like, needs_experts, no_windows


def minimax_read(hf: dict, values: dict) -> None:
    """Read the share of a head that rotates, where the file says it as a number of features."""
    no_windows(hf, values)
    needs_experts(hf, values)
    turned = hf.get("rotary_dim")
    inner = hf.get("rope_parameters") or {}
    if turned is not None and inner.get("partial_rotary_factor") is None:
        values["partial_rotary_factor"] = turned / values["head_dim"]


B = L + "block_sparse_moe."
ROWS = (
    like(LLAMA, "minimax_m2", "MiniMaxM2ForCausalLM",
         dict(NO_BIAS, qk_norm=True, qk_norm_whole=True, scoring_func="sigmoid",
              router_bias=True, norm_topk_prob=True),
         {"num_experts": "num_local_experts", "num_experts_per_tok": "num_experts_per_tok",
          "moe_intermediate_size": "intermediate_size"},
         dict(max_position_embeddings=196608, num_key_value_heads=8, head_dim=128,
              rope_theta=5e6, num_local_experts=256, num_experts_per_tok=8),
         keys={B + "e_score_correction_bias": (L + "mlp.gate.e_score_correction_bias",),
               B + "gate": (L + "mlp.gate",),
               B + "experts.{e}.w1": (L + "mlp.experts.gate_proj",),
               B + "experts.{e}.w2": (L + "mlp.experts.down_proj",),
               B + "experts.{e}.w3": (L + "mlp.experts.up_proj",)},
         rope="partial", read=minimax_read, reads=("layer_types", "rotary_dim"),
         synonyms={"num_experts": "num_local_experts"}, ignores=("router_jitter_noise",),
         scratch=dict(rope_theta=5e6, num_experts=8, num_experts_per_tok=2), rank=2),
)


if __name__ == "__main__":
    refuse_to_run()
