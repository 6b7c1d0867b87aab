"""MiniCPM (Hu 2024), Granite (IBM), HyperCLOVA X: Llama with scales that transfer learning rates.

The embedding, each residual branch and the logits are scaled; transformers opens the same model
as Granite, which spells the scales as numbers.
"""
from __future__ import annotations

import math
from typing import Any

from config import UserError, refuse_to_run
from families.base import LLAMA, NO_BIAS, L, like, make_size, no_windows


def scales_read(hf: dict, values: dict) -> None:
    """Refuse scales of 0, which mean another number in ModelConfig."""
    no_windows(hf, values)
    for name in ("embedding_multiplier", "attention_multiplier"):
        if name in values and not values[name]:
            raise UserError(f"{name} must be above 0, got 0")


def minicpm_read(hf: dict, values: dict) -> None:
    """Read MiniCPM's scales."""
    scales_read(hf, values)
    # Hu 2024: each branch by scale_depth / sqrt(layers), logits by dim_model_base / width
    depth = hf.get("scale_depth") or 1.0
    layers = hf.get("num_hidden_layers") or 1
    values["residual_multiplier"] = depth / math.sqrt(layers)
    values["logits_scaling"] = values["n_embd"] / (hf.get("dim_model_base") or 1)


def hyperclovax_read(hf: dict, values: dict) -> None:
    """Read the scales, and whether there are norms after the branches as well."""
    scales_read(hf, values)
    post = hf.get("use_post_norm", True)
    values["norm_placement"] = "sandwich" if post else "pre"
    # silence means 1 / sqrt(head_dim); logits are multiplied there, divided here
    values["attention_multiplier"] = hf.get("attention_multiplier") or 0.0
    for key in ("attention_multiplier", "logits_scaling"):
        if hf.get(key) == 0:
            raise UserError(f"{key} must be above 0, got 0")
    values["logits_scaling"] = 1 / hf.get("logits_scaling", 1.0)


def hyperclovax_write(config: Any, hf: dict) -> None:
    """Write them."""
    hf["use_post_norm"] = config.norm_placement == "sandwich"
    hf["attention_multiplier"] = config.attention_multiplier or config.head_dim ** -0.5
    hf["logits_scaling"] = 1 / config.logits_scaling


def scale_minicpm(layers: int, width: int, base: int = 256) -> dict:
    """Return MiniCPM's scales (Hu 2024): branches by 1.4 / sqrt(layers), logits by width / base.

    With them the best learning rate of a small model is that of a large one.
    """
    return dict(residual_multiplier=1.4 / layers ** 0.5, logits_scaling=width / base)


ROWS = (
    # MiniCPM's scales under other names, which transformers opens without remote code
    like(LLAMA, "granite", "GraniteForCausalLM", {},
         {k: k for k in ("embedding_multiplier", "residual_multiplier", "attention_multiplier",
                         "logits_scaling")},
         dict(embedding_multiplier=1.0, residual_multiplier=1.0, attention_multiplier=1.0,
              logits_scaling=1.0), read=scales_read),
    like(LLAMA, "minicpm", "MiniCPMForCausalLM", NO_BIAS, {"embedding_multiplier": "scale_emb"},
         dict(scale_emb=1.0, tie_word_embeddings=True), read=minicpm_read, writable=False,
         reads=("layer_types", "scale_depth", "dim_model_base"),
        scratch=dict(embedding_multiplier=12.0, tie_word_embeddings=True),
        from_shape=lambda shape: scale_minicpm(shape.get("n_layer", 12), shape.get("n_embd", 768)),
        presets={"minicpm-2b": dict(vocab_size=122753, block_size=4096,
                                    **make_size(40, 36, 36, 2304, 5760))}),
    like(LLAMA, "hyperclovax", "HyperCLOVAXForCausalLM", {},
         {k: k for k in ("embedding_multiplier", "residual_multiplier")},
         dict(embedding_multiplier=1.0, residual_multiplier=1.0),
         keys={L + "post_norm1": (L + "post_self_attn_layernorm",),
               L + "post_norm2": (L + "post_mlp_layernorm",)},
         scratch=dict(norm_placement="sandwich"), rank=2,
         read=hyperclovax_read, write=hyperclovax_write,
         reads=("layer_types", "use_post_norm", "attention_multiplier", "logits_scaling")),
)


if __name__ == "__main__":
    refuse_to_run()
