"""Llama as Meta publishes it (params.json beside consolidated.*.pth), and Mistral's twin of it.

Their rotary positions turn neighbouring features; Hugging Face's turn the halves of a head, with
the rows of q and k permuted.
"""
from __future__ import annotations

import math
import reprlib
from typing import Any

from config import UserError, refuse_to_run
from families.base import LLAMA, L, NO_BIAS, Family


def meta_width(hf: dict) -> int:
    """Return the width of the MLP by Meta's rule: 8/3 dim, times a factor, rounded up."""
    wide = int(2 * (4 * hf["dim"]) / 3)
    wide = int((hf.get("ffn_dim_multiplier") or 1.0) * wide)
    step = hf.get("multiple_of") or 256
    return math.ceil(wide / step) * step


def meta_read(hf: dict, values: dict) -> None:
    """Read the width of the MLP, the rotary scaling and the context."""
    # hidden_dim comes from the weights or, in Mistral's files, from params.json itself
    if hf.get("multiple_of") is not None and meta_width(hf) != values["intermediate_size"]:
        raise UserError(f"dim, multiple_of and ffn_dim_multiplier make an MLP of {meta_width(hf)},"
                        f" the weights one of {values['intermediate_size']}")
    scaled = bool(hf.get("use_scaled_rope"))
    yarn = hf.get("yarn")
    if scaled and yarn:
        raise UserError("use_scaled_rope and yarn scale the same frequencies: expected one")
    if scaled:
        # The published files only say that they scale. The factor is 8 (Llama 3.1, 3.3) except in
        # 3.2's two small models, 32, which are the only ones with a tied output matrix
        factor = hf.get("rope_scaling_factor") or (32.0 if values["tie_word_embeddings"] else 8.0)
        values["rope_scaling"] = dict(rope_type="llama3", factor=factor, low_freq_factor=1.0,
                                      high_freq_factor=hf.get("rope_high_freq_factor") or 4.0,
                                      original_max_position_embeddings=8192)
    if yarn:
        values["rope_scaling"] = translate_yarn(yarn)
    values["block_size"] = hf.get("max_position_embeddings") or values["block_size"]
    if not values["block_size"]:                # nor the context: Llama 3.1's, 3's, 2's
        long = type(values["rope_theta"]) in (int, float) and values["rope_theta"] >= 5e5
        values["block_size"] = 131072 if scaled else 8192 if long else 4096


# Mistral's word -> the one of transformers and vLLM, for the same number
YARN = {"factor": "factor", "original_max_position_embeddings": "original_max_position_embeddings",
        "beta": "beta_fast", "alpha": "beta_slow"}


def translate_yarn(yarn: Any) -> dict[str, Any]:
    """Translate the yarn object of Mistral's params.json, as vLLM does (its configs/mistral.py).

    apply_scale says whether attention grows warmer with the factor (Peng 2023, section 3.4).
    """
    if not isinstance(yarn, dict) or set(yarn) - {*YARN, "apply_scale"}:
        raise UserError(f"expected yarn to be an object with {', '.join(YARN)} and apply_scale, "
                        f"got {reprlib.repr(yarn)}")
    scaling = {"rope_type": "yarn", **{theirs: yarn[ours] for ours, theirs in YARN.items()
                                       if yarn.get(ours) is not None}}
    warm = yarn.get("apply_scale", True)
    if type(warm) is not bool:
        raise UserError(f"expected true or false as yarn's apply_scale, got {reprlib.repr(warm)}")
    return scaling if warm else {**scaling, "attention_factor": 1.0}


def meta_write(config: Any, hf: dict) -> None:
    """Write the width of the MLP and the rotary scaling as Meta's program reads them."""
    # a multiplier that makes this width; the half keeps int() on the right side of rounding
    hf["multiple_of"] = math.gcd(config.intermediate_size, 256)
    if meta_width(hf) != config.intermediate_size:
        hf["ffn_dim_multiplier"] = (config.intermediate_size + 0.5) / int(8 * config.n_embd / 3)
    scaling = config.rope_scaling or {}
    if scaling.get("rope_type") == "llama3":
        hf.update(use_scaled_rope=True, rope_scaling_factor=scaling["factor"])


# What Meta's program knows; the context is an argument of it, and no key
META_KEYS = ("dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "norm_eps",
             "ffn_dim_multiplier", "rope_theta", "use_scaled_rope", "rope_scaling_factor")


META = Family(
    "meta", "",
    fixed=dict(LLAMA.fixed, **NO_BIAS, activation="silu"),
    fields=(("vocab_size", "vocab_size"), ("block_size", "max_seq_len"),
            ("n_layer", "n_layers"), ("n_head", "n_heads"), ("n_kv_head", "n_kv_heads"),
            ("n_embd", "dim"), ("head_dim", "head_dim"), ("intermediate_size", "hidden_dim"),
            ("norm_eps", "norm_eps"), ("rope_theta", "rope_theta"),
            ("sliding_window", "sliding_window"),
            ("tie_word_embeddings", "tied_embeddings")),
    defaults=dict(vocab_size=None, max_seq_len=0, n_layers=None, n_heads=None, n_kv_heads=0,
                  dim=None, head_dim=0, hidden_dim=None, norm_eps=1e-5, rope_theta=10000.0,
                  sliding_window=0, tied_embeddings=False),
    only={"activation": ("silu",), "causal": (True,)},
    reads=("multiple_of", "ffn_dim_multiplier", "use_scaled_rope", "rope_scaling_factor",
           "rope_high_freq_factor", "max_position_embeddings", "yarn"),
    ignores=("max_batch_size",),
    prefix="",
    keys={"tok_embeddings": ("model.embed_tokens",), "norm": ("model.norm",),
          "output": ("lm_head",),
          "layers.{i}.attention_norm": (L + "input_layernorm",),
          "layers.{i}.ffn_norm": (L + "post_attention_layernorm",),
          **{f"layers.{{i}}.attention.w{x}": (L + f"self_attn.{x}_proj",) for x in "qkvo"},
          "layers.{i}.feed_forward.w1": (L + "mlp.gate_proj",),
          "layers.{i}.feed_forward.w2": (L + "mlp.down_proj",),
          "layers.{i}.feed_forward.w3": (L + "mlp.up_proj",)},
    # the trap of Meta's files: RoPE turns neighbours there, halves of the head here
    neighbours=("wq", "wk"), read=meta_read, write=meta_write, rope="own", writable=False,
    scratch=None, layout="meta", params_keys=META_KEYS,
    sizes={"vocab_size": "tok_embeddings.weight",
           "hidden_dim": "layers.0.feed_forward.w1.weight"})
ROWS = (META,)


if __name__ == "__main__":
    refuse_to_run()
