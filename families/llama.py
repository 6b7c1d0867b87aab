"""Llama (Touvron 2023), and Mistral, Mixtral, Arcee and SmolLM, which differ from it in a flag.

RMSNorm before each branch, rotary positions, SwiGLU, no biases; grouped-query attention from
Llama 2 70B on. Llama 3.1 and 3.2 stretch the rotary frequencies from a context of 8192.
"""
from __future__ import annotations

from dataclasses import replace
from typing import Any

from config import UserError, refuse_to_run
from families.base import (L, LARGEST_DEPTH, LLAMA, MOE, NO_BIAS, like, make_size, needs_experts,
                           no_windows, run_all, windowed)

MIXTRAL_WINDOW = windowed(None)
LLAMA3 = dict(vocab_size=128256, rope_theta=500000.0)


def scale_llama3(factor: float) -> dict:
    """Return Llama 3.1's rope_scaling by a factor."""
    return dict(rope_type="llama3", factor=factor, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=8192)


def smollm3_read(hf: dict, values: dict) -> None:
    """Read which layers have no positions."""
    # in no_rope_layers a 1 means that the layer has RoPE
    marks = hf.get("no_rope_layers")
    n = hf.get("no_rope_layer_interval", 4)
    if marks is None and type(values["n_layer"]) is int:
        marks = [(i + 1) % n != 0 for i in range(min(values["n_layer"], LARGEST_DEPTH))]
    values["nope_layers"] = [i for i, rotates in enumerate(marks or ()) if not rotates] or None
    if hf.get("use_sliding_window"):
        raise UserError("use_sliding_window is not supported in SmolLM3")


def smollm3_write(config: Any, hf: dict) -> None:
    """Write which layers have positions."""
    none = set(config.nope_layers or ())
    hf["no_rope_layers"] = [int(i not in none) for i in range(config.n_layer)]


ROWS = (
    replace(LLAMA, presets={
        "llama-7b": dict(vocab_size=32000, block_size=2048, norm_eps=1e-6,
                         **make_size(32, 32, 32, 4096, 11008)),
        "llama2-7b": dict(vocab_size=32000, block_size=4096,
                          **make_size(32, 32, 32, 4096, 11008)),
        "llama2-70b": dict(vocab_size=32000, block_size=4096,
                           **make_size(80, 64, 8, 8192, 28672)),
        "llama3-8b": dict(LLAMA3, block_size=8192, **make_size(32, 32, 8, 4096, 14336)),
        "llama3.1-8b": dict(LLAMA3, block_size=131072, rope_scaling=scale_llama3(8.0),
                            **make_size(32, 32, 8, 4096, 14336)),
        "llama3.2-1b": dict(LLAMA3, block_size=131072, rope_scaling=scale_llama3(32.0),
                            tie_word_embeddings=True, **make_size(16, 32, 8, 2048, 8192)),
        "llama3.2-3b": dict(LLAMA3, block_size=131072, rope_scaling=scale_llama3(32.0),
                            tie_word_embeddings=True, **make_size(28, 24, 8, 3072, 8192)),
        "smollm2-135m": dict(vocab_size=49152, block_size=8192, rope_theta=1e5,
                             tie_word_embeddings=True, **make_size(30, 9, 3, 576, 1536))}),
    # Llama with an MLP that is not gated
    like(LLAMA, "arcee", "ArceeForCausalLM", dict(gated=False),
         defaults=dict(max_position_embeddings=4096, hidden_act="relu2", rms_norm_eps=1e-5),
        scratch=dict(activation="relu2")),
    like(LLAMA, "mistral", "MistralForCausalLM", NO_BIAS,
         defaults=dict(max_position_embeddings=131072, num_key_value_heads=8), **windowed(4096),
        scratch=dict(sliding_window=4096), wraps="mistral3",
        presets={"mistral-7b": dict(vocab_size=32000, block_size=32768,
                                    **make_size(32, 32, 8, 4096, 14336))}),
    like(LLAMA, "mixtral", "MixtralForCausalLM",
         dict(NO_BIAS, norm_topk_prob=True),
         {"num_experts": "num_local_experts", **MOE, "moe_intermediate_size": "intermediate_size"},
         dict(max_position_embeddings=131072, num_key_value_heads=8, rms_norm_eps=1e-5,
              rope_theta=1e6, num_local_experts=8, num_experts_per_tok=2),
         keys={L + "block_sparse_moe.gate": (L + "mlp.gate",),
               L + "block_sparse_moe.experts.{e}.w1": (L + "mlp.experts.gate_proj",),
               L + "block_sparse_moe.experts.{e}.w2": (L + "mlp.experts.down_proj",),
               L + "block_sparse_moe.experts.{e}.w3": (L + "mlp.experts.up_proj",)},
         **{**MIXTRAL_WINDOW, "read": run_all(MIXTRAL_WINDOW["read"], needs_experts)},
         synonyms={"num_experts": "num_local_experts"},
        scratch=dict(num_experts=8, num_experts_per_tok=2),
        presets={"mixtral-8x7b": dict(vocab_size=32000, block_size=32768, rope_theta=1e6,
                                      **make_size(32, 32, 8, 4096, 14336))}),
    # every fourth layer has no positions
    like(LLAMA, "smollm3", "SmolLM3ForCausalLM", {},
         defaults=dict(max_position_embeddings=32768, num_key_value_heads=4,
                       tie_word_embeddings=True, rope_theta=2e6),
         read=run_all(no_windows, smollm3_read), write=smollm3_write,
         reads=("layer_types", "use_sliding_window", "no_rope_layers", "no_rope_layer_interval"),
         ignores=("sliding_window", "max_window_layers"),
        scratch=dict(rope_theta=2e6, tie_word_embeddings=True),
        from_shape=lambda shape: {"nope_layers": list(range(3, shape.get("n_layer", 12), 4))}),
)


if __name__ == "__main__":
    refuse_to_run()
