"""Helium (Kyutai 2025): Llama whose rotary positions turn neighbouring features.
"""
from __future__ import annotations

from config import UserError, refuse_to_run
from families.base import LLAMA, like, no_windows


def helium_read(hf: dict, values: dict) -> None:
    """Refuse heads that are not the width of the model together: its o_proj is square."""
    no_windows(hf, values)
    width = values["n_head"] * (values["head_dim"] or 0)
    if width and width != values["n_embd"]:
        raise UserError(f"expected num_attention_heads x head_dim = hidden_size, got {width} and "
                        f"{values['n_embd']}")


ROWS = (
    like(LLAMA, "helium", "HeliumForCausalLM", dict(o_bias=False, rope_interleaved=True),
         defaults=dict(max_position_embeddings=4096, num_key_value_heads=20, head_dim=128,
                       rms_norm_eps=1e-8, rope_theta=1e5),
         scratch=dict(norm_eps=1e-8, rope_theta=1e5), read=helium_read, rank=2),
)


if __name__ == "__main__":
    refuse_to_run()
