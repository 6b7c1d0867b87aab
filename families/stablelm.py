"""StableLM (Bellagente 2024): LayerNorm, SwiGLU, rotary positions on a quarter of each head.
"""
from __future__ import annotations

from typing import Any

from config import refuse_to_run
from families.base import LLAMA, like, no_windows


def stablelm_read(hf: dict, values: dict) -> None:
    """Read whether attention and MLP are in parallel."""
    no_windows(hf, values)
    values["norm_placement"] = "parallel" if hf.get("use_parallel_residual") else "pre"


def stablelm_write(config: Any, hf: dict) -> None:
    """Write it."""
    hf["use_parallel_residual"] = config.norm_placement == "parallel"


ROWS = (
    like(LLAMA, "stablelm", "StableLmForCausalLM",
         dict(norm="layernorm", norm_bias=True, o_bias=False, mlp_bias=False, head_dim=0),
         {"norm_eps": "layer_norm_eps", "qkv_bias": "use_qkv_bias"},
         dict(max_position_embeddings=4096, num_key_value_heads=32, layer_norm_eps=1e-5,
              use_qkv_bias=False, partial_rotary_factor=0.25),
         only={"qk_layernorm": (False,)}, rope="partial", rank=2,
         scratch=dict(partial_rotary_factor=0.25), read=stablelm_read, write=stablelm_write,
         reads=("layer_types", "use_parallel_residual")),
)


if __name__ == "__main__":
    refuse_to_run()
