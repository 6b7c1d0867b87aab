"""Gemma 1 to 3 and VaultGemma (Gemma team 2024, 2025): norms x (1 + w), embedding x sqrt(d).

Gemma 2 and 3 have norms before and after each branch, and layers with and without a window: 1:1
in Gemma 2, which caps logits with tanh, and VaultGemma, which lacks the norms after; 5:1 in Gemma
3, which has QK-norm and a rotary base of its own for the layers with a window.
"""
from __future__ import annotations

import reprlib
from typing import Any

from config import UserError, refuse_to_run
from families.base import LLAMA, L, NO_BIAS, Family, by_layer, like, make_size


def make_gemma(model_type: str, architecture: str, pattern: int, **changes) -> Family:
    """Return a row of Gemma 2 or 3; pattern: every pattern-th layer has no window."""
    # Gemma 3's pattern has a key, Gemma 2's is fixed: transformers ignores the key there
    asked = ("sliding_window_pattern",) * (changes["rope"] == "nested")
    layers = by_layer(
        lambda i, hf: (i + 1) % (hf.get("sliding_window_pattern", pattern) if asked else pattern),
        False)

    def read(hf: dict, values: dict) -> None:
        scalar = hf.get("query_pre_attn_scalar", 256)
        if type(scalar) not in (int, float) or not scalar > 0:
            raise UserError(f"query_pre_attn_scalar = {reprlib.repr(scalar)} is not a number "
                            "above 0")
        values["attention_multiplier"] = scalar ** -0.5
        for key, default in changes["caps"].items():
            if hf.get(key) == 0:
                raise UserError(f"{key} = 0 divides by it: expected a number above 0, or null")
            values[key] = hf.get(key, default) or 0.0
        layers["read"](hf, values)

    def write(config: Any, hf: dict) -> None:
        hf["query_pre_attn_scalar"] = round(config.attention_multiplier ** -2)
        for key in changes["caps"]:
            hf[key] = getattr(config, key) or None
        layers["write"](config, hf)

    return like(
        LLAMA, model_type, architecture,
        fixed=dict(NO_BIAS, norm_offset=1.0, embedding_multiplier=0.0,
                   **{"norm_placement": "sandwich", **changes["fixed"]}),
        fields={"activation": "hidden_activation"},
        defaults=dict(head_dim=256, hidden_activation="gelu_pytorch_tanh",
                      tie_word_embeddings=True, num_key_value_heads=4,
                      max_position_embeddings=changes["context"],
                      **changes.get("defaults", {})),
        only={"attention_bias": (False,), "use_bidirectional_attention": (False,),
              **changes.get("only", {})},
        keys=changes.get("keys") or {
              L + "post_attention_layernorm": (L + "post_self_attn_layernorm",),
              L + "pre_feedforward_layernorm": (L + "post_attention_layernorm",),
              L + "post_feedforward_layernorm": (L + "post_mlp_layernorm",)},
        read=read, write=write, rope=changes["rope"],
        reads=("query_pre_attn_scalar", *("rope_local_base_freq",) * bool(asked), *changes["caps"],
               *layers["reads"], *asked),
        ignores=("hidden_act",), **{key: value for key, value in changes.items() if key in (
            "name", "scratch", "presets", "wraps", "rank")})


GEMMA2 = dict(norm_eps=1e-6, activation="gelu_pytorch_tanh", sliding_window=4096,
              sliding_window_pattern=2, attn_logit_softcapping=50.0, final_logit_softcapping=30.0,
              tie_word_embeddings=True)
GEMMA3 = dict(GEMMA2, sliding_window=512, sliding_window_pattern=6, rope_theta=1e6,
              rope_local_theta=1e4, attn_logit_softcapping=0.0, final_logit_softcapping=0.0)
SHAPE = dict(vocab_size=262144, block_size=32768, head_dim=256, attention_multiplier=256 ** -0.5)
GEMMA = like(LLAMA, "gemma", "GemmaForCausalLM",
             dict(mlp_bias=False, norm_offset=1.0, embedding_multiplier=0.0),
             defaults=dict(head_dim=256, hidden_act="gelu_pytorch_tanh", tie_word_embeddings=True,
                           num_key_value_heads=16, max_position_embeddings=8192),
             scratch=dict(norm_eps=1e-6, activation="gelu_pytorch_tanh", tie_word_embeddings=True),
             only={"use_bidirectional_attention": (False,)}, ignores=("hidden_activation",), rank=2,
             presets={"gemma-2b": dict(vocab_size=256000, block_size=8192, head_dim=256,
                                       **make_size(18, 8, 1, 2048, 16384)),
                      "gemma-7b": dict(vocab_size=256000, block_size=8192, head_dim=256,
                                       **make_size(28, 16, 16, 3072, 24576))})
ROWS = (
    make_gemma("gemma3_text", "Gemma3ForCausalLM", 6, fixed=dict(qk_norm=True), rope="nested",
          # transformers has a setting for a cap on attention and ignores it
          only={"attn_logit_softcapping": (0,)}, caps=dict(final_logit_softcapping=None),
          context=131072,
          # which the text_config of the published 4B leaves out
          defaults=dict(vocab_size=262208, num_attention_heads=8),
        name="gemma3", scratch=GEMMA3, wraps="gemma3",
        presets={"gemma3-270m": dict(SHAPE, **make_size(18, 4, 1, 640, 2048)),
                 "gemma3-1b": dict(SHAPE, **make_size(26, 4, 1, 1152, 6912))}),
    make_gemma("gemma2", "Gemma2ForCausalLM", 2, fixed={}, rope="plain", context=8192,
          caps=dict(attn_logit_softcapping=50.0, final_logit_softcapping=30.0),
        scratch=GEMMA2,
        presets={"gemma2-2b": dict(SHAPE | {"vocab_size": 256000, "block_size": 8192},
                                   **make_size(26, 8, 4, 2304, 9216))}),
    GEMMA,
    make_gemma("vaultgemma", "VaultGemmaForCausalLM", 2, fixed=dict(norm_placement="pre"),
               rope="plain", context=8192, keys={
                   L + "pre_feedforward_layernorm": (L + "post_attention_layernorm",)},
               caps=dict(attn_logit_softcapping=50.0, final_logit_softcapping=30.0),
               scratch=GEMMA2, rank=2),
)


if __name__ == "__main__":
    refuse_to_run()
