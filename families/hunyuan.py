"""Hunyuan v3 (Tencent 2025): an MoE model with QK-norm, sigmoid scores and a shared expert.
"""
from __future__ import annotations

from config import refuse_to_run
from families.base import (LLAMA, L, MOE, like, needs_experts, no_windows, read_dense_layers,
                           run_all, write_dense_layers)


ROWS = (
    like(LLAMA, "hy_v3", "HYV3ForCausalLM",
         dict(qk_norm=True, scoring_func="sigmoid", router_bias=True, norm_topk_prob=True),
         {"num_experts": "num_experts", **MOE, "n_shared_experts": "num_shared_experts",
          "routed_scaling_factor": "router_scaling_factor"},
         dict(max_position_embeddings=131072, num_key_value_heads=8, head_dim=128,
              rms_norm_eps=1e-5, rope_theta=11158840.0, num_experts=192, num_experts_per_tok=8,
              num_shared_experts=1, moe_intermediate_size=1536, router_scaling_factor=2.826,
              initializer_range=0.006),
         keys={L + "mlp.expert_bias": (L + "mlp.gate.e_score_correction_bias",),
               L + "mlp.router.gate": (L + "mlp.gate",),
               **{L + f"mlp.shared_mlp.{x}_proj": (L + f"mlp.shared_experts.{x}_proj",)
                  for x in ("gate", "up", "down")}},
         read=run_all(no_windows, needs_experts, read_dense_layers), write=write_dense_layers,
         reads=("layer_types", "mlp_layer_types"), synonyms={"num_local_experts": "num_experts"},
         ignores=("enable_moe_fp32_combine",), rank=2,
         scratch=dict(rope_theta=11158840.0, num_experts=8, num_experts_per_tok=2,
                      n_shared_experts=1, mlp_only_layers=[0])),
)


if __name__ == "__main__":
    refuse_to_run()
