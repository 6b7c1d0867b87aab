"""Qwen 2, 2.5 and 3 (Qwen team 2024, 2025): biases on q, k, v; from 3 on QK-norm instead.

Heads of Qwen 3 are 128 wide whatever the width of the model. Qwen3-MoE's router normalises the
chosen scores only if norm_topk_prob says so.
"""
from __future__ import annotations

from typing import Any

from config import UserError, refuse_to_run
from families.base import (LARGEST_DEPTH, LLAMA, MOE, by_layer, like, make_size, needs_experts,
                           no_windows, windowed)

# the first max_window_layers layers see everything
QWEN_WINDOWS = by_layer(lambda i, hf: i >= hf.get("max_window_layers", 28), asks=True)
QWEN_MOE_WINDOW = windowed(4096)


def qwen_moe_read(hf: dict, values: dict) -> None:
    """Read the window, which is that of all layers: the family has no layer_types."""
    needs_experts(hf, values)
    step = hf.get("decoder_sparse_step", 1)
    if type(step) is not int or step < 1:
        raise UserError(f"expected a number above 0 as decoder_sparse_step, got {step!r:.40}")
    dense = hf.get("mlp_only_layers") or []
    if not isinstance(dense, list) or any(type(i) is not int for i in dense):
        raise UserError("expected numbers of layers in mlp_only_layers")
    layers = range(min(values["n_layer"], LARGEST_DEPTH)) if type(values["n_layer"]) is int else ()
    values["mlp_only_layers"] = [i for i in layers if i in dense or (i + 1) % step] or None
    if hf.get("use_sliding_window"):                    # False where it is not said
        QWEN_MOE_WINDOW["read"](hf, values)
    else:
        no_windows(hf, values)


def qwen_moe_write(config: Any, hf: dict) -> None:
    """Write the window with the switch that transformers asks for first."""
    QWEN_MOE_WINDOW["write"](config, hf)
    hf["use_sliding_window"] = config.sliding_window > 0
    hf["mlp_only_layers"] = [i for i in range(config.n_layer) if not config.is_moe(i)]
    hf["decoder_sparse_step"] = 1


QWEN3_SHAPE = dict(vocab_size=151936, block_size=40960, head_dim=128)
QWEN2_FLAGS = dict(norm_eps=1e-6, rope_theta=1e6)
ROWS = (
    like(LLAMA, "qwen2", "Qwen2ForCausalLM", dict(qkv_bias=True, o_bias=False, mlp_bias=False),
         defaults=dict(max_position_embeddings=32768, num_key_value_heads=32), **QWEN_WINDOWS,
        scratch=QWEN2_FLAGS,
        presets={"qwen2.5-0.5b": dict(vocab_size=151936, block_size=32768,
                                      tie_word_embeddings=True,
                                      **make_size(24, 14, 2, 896, 4864)),
                 "qwen2.5-7b": dict(vocab_size=152064, block_size=131072,
                                    **make_size(28, 28, 4, 3584, 18944))}),
    # the trap of Qwen3: heads are 128 wide whatever the width of the model
    like(LLAMA, "qwen3", "Qwen3ForCausalLM", dict(qk_norm=True, mlp_bias=False),
         defaults=dict(max_position_embeddings=32768, num_key_value_heads=32, head_dim=128),
         **QWEN_WINDOWS,
        scratch=QWEN2_FLAGS,
        presets={f"qwen3-{name}": {**QWEN3_SHAPE, **make_size(*shape), "tie_word_embeddings": tied}
                 for name, shape, tied in (("0.6b", (28, 16, 8, 1024, 3072), True),
                                           ("1.7b", (28, 16, 8, 2048, 6144), True),
                                           ("4b", (36, 32, 8, 2560, 9728), True),
                                           ("8b", (36, 32, 8, 4096, 12288), False),
                                           ("14b", (40, 40, 8, 5120, 17408), False),
                                           ("32b", (64, 64, 8, 5120, 25600), False))}),
    like(LLAMA, "qwen3_moe", "Qwen3MoeForCausalLM", dict(qk_norm=True, mlp_bias=False),
         {"num_experts": "num_experts", **MOE, "norm_topk_prob": "norm_topk_prob"},
         dict(max_position_embeddings=32768, num_key_value_heads=4, num_experts=128,
              num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=False),
          # the published files say num_experts, those that transformers 5 writes the other
         synonyms={"num_local_experts": "num_experts"}, read=qwen_moe_read, write=qwen_moe_write,
         reads=("sliding_window", "use_sliding_window", "layer_types", "mlp_only_layers",
               "decoder_sparse_step"),
         ignores=("max_window_layers",),
        scratch=dict(QWEN2_FLAGS, num_experts=8, num_experts_per_tok=2, norm_topk_prob=True),
        presets={"qwen3-30b-a3b": {**QWEN3_SHAPE, **make_size(48, 32, 4, 2048, 6144),
                                   "num_experts": 128, "num_experts_per_tok": 8,
                                   "moe_intermediate_size": 768}}),
)


if __name__ == "__main__":
    refuse_to_run()
