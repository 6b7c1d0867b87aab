"""Phi-3 (Abdin 2024): Llama with q, k, v and gate, up stored as one matrix each.
"""
from __future__ import annotations

from config import refuse_to_run
from families.base import LLAMA, L, NO_BIAS, like, make_size, windowed


ROWS = (
    like(LLAMA, "phi3", "Phi3ForCausalLM", NO_BIAS,
         defaults=dict(max_position_embeddings=4096, rms_norm_eps=1e-5, partial_rotary_factor=1.0),
         keys={L + "self_attn.qkv_proj": tuple(L + f"self_attn.{x}_proj" for x in "qkv"),
               L + "mlp.gate_up_proj": (L + "mlp.gate_proj", L + "mlp.up_proj")},
         rope="partial", rank=2, **windowed(None),
         presets={"phi-3-mini-4k": dict(vocab_size=32064, block_size=4096, norm_eps=1e-5,
                                        sliding_window=2047,
                                        **make_size(32, 32, 32, 3072, 8192))}),
)


if __name__ == "__main__":
    refuse_to_run()
