"""MoE models that route as DeepSeek-V3 does, on grouped-query attention: dots.1 and Solar-Open.

Sigmoid scores, a correction bias for the choice alone, shared experts; without groups of experts.
"""
from __future__ import annotations

from config import refuse_to_run
from families.base import (LLAMA, MOE, by_layer, like, needs_experts, no_windows,
                           run_all)


WINDOWS = by_layer(lambda i, hf: i >= hf.get("max_window_layers", 62), asks=False)
ROUTED = {"num_experts": "n_routed_experts", **MOE, "n_shared_experts": "n_shared_experts",
          "norm_topk_prob": "norm_topk_prob", "routed_scaling_factor": "routed_scaling_factor"}
ONE_GROUP = {"n_group": (1,), "topk_group": (1,)}
SCRATCH = dict(num_experts=8, num_experts_per_tok=2, n_shared_experts=1, norm_topk_prob=True)
ROWS = (
    like(LLAMA, "dots1", "Dots1ForCausalLM",
         dict(mlp_bias=False, qk_norm=True, scoring_func="sigmoid", router_bias=True),
         {**ROUTED, "first_k_dense_replace": "first_k_dense_replace"},
         dict(max_position_embeddings=2048, num_key_value_heads=32, n_routed_experts=0,
              num_experts_per_tok=2, moe_intermediate_size=1408, n_shared_experts=0,
              first_k_dense_replace=0, norm_topk_prob=False, routed_scaling_factor=1.0),
         only=ONE_GROUP, synonyms={"num_local_experts": "n_routed_experts"},
         read=run_all(WINDOWS["read"], needs_experts), write=WINDOWS["write"],
         reads=("max_window_layers", *WINDOWS["reads"]), rank=2,
         scratch=dict(SCRATCH, first_k_dense_replace=1)),
    like(LLAMA, "solar_open", "SolarOpenForCausalLM",
         dict(mlp_bias=False, scoring_func="sigmoid", router_bias=True),
         {**ROUTED, "intermediate_size": "intermediate_size"},
         dict(max_position_embeddings=131072, num_key_value_heads=8, head_dim=128,
              rms_norm_eps=1e-5, rope_theta=1e6, n_routed_experts=128, num_experts_per_tok=8,
              moe_intermediate_size=1280, n_shared_experts=1, norm_topk_prob=True,
              routed_scaling_factor=1.0, intermediate_size=0),
         only=ONE_GROUP, synonyms={"num_local_experts": "n_routed_experts"}, rope="partial",
         read=run_all(no_windows, needs_experts), scratch=dict(SCRATCH, rope_theta=1e6), rank=2,
         ignores=("first_k_dense_replace",)),
)


if __name__ == "__main__":
    refuse_to_run()
