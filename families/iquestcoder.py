"""IQuest-Coder (IQuest 2025): Llama with heads of 128.
"""
from __future__ import annotations

from config import refuse_to_run
from families.base import LLAMA, like


ROWS = (
    like(LLAMA, "iquestcoder", "LlamaForCausalLM",
         defaults=dict(max_position_embeddings=131072, num_key_value_heads=8, head_dim=128,
                       rms_norm_eps=1e-5), only={"clip_qkv": ()}, rank=2),
)


if __name__ == "__main__":
    refuse_to_run()
