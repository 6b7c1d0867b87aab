"""GPT-2 (Radford 2019): learned positions, LayerNorm, GELU, biases everywhere, tied embeddings.

OpenAI's weights are found by --init_from=gpt2, gpt2-medium, gpt2-large or gpt2-xl.
"""
from __future__ import annotations

from config import refuse_to_run
from families.base import Family, L, make_size


def set_gpt2_biases(bias: bool) -> dict:
    """Return nanoGPT's --bias, of linears and norms alike, and the GELU of its models."""
    biases = dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias", "norm_bias"), bias)
    return {**biases, "activation": "gelu"}


GPT2 = Family(
    "gpt2", "GPT2LMHeadModel",
    fixed=dict(position="learned", norm="layernorm", gated=False, qkv_bias=True, o_bias=True,
               mlp_bias=True, norm_bias=True),
    fields=(("vocab_size", "vocab_size"), ("block_size", "n_positions"),
            ("n_layer", "n_layer"), ("n_head", "n_head"), ("n_embd", "n_embd"),
            ("intermediate_size", "n_inner"), ("norm_eps", "layer_norm_epsilon"),
            ("activation", "activation_function"), ("init_std", "initializer_range"),
            ("tie_word_embeddings", "tie_word_embeddings"), ("dropout", "resid_pdrop"),
            ("dropout", "embd_pdrop"), ("dropout", "attn_pdrop")),
    defaults=dict(vocab_size=None, n_positions=1024, n_layer=None, n_head=None, n_embd=None,
                  n_inner=0, layer_norm_epsilon=1e-5, activation_function="gelu_new",
                  initializer_range=0.02, tie_word_embeddings=True),
    only={"scale_attn_weights": (True,), "scale_attn_by_inverse_layer_idx": (False,),
          "add_cross_attention": (False,)},
    prefix="transformer.",
    keys={"transformer.wte": ("model.embed_tokens",),
          "transformer.wpe": ("model.embed_positions",),
          "transformer.ln_f": ("model.norm",),
          "transformer.h.{i}.ln_1": (L + "input_layernorm",),
          "transformer.h.{i}.ln_2": (L + "post_attention_layernorm",),
          "transformer.h.{i}.attn.c_attn": tuple(L + f"self_attn.{x}_proj" for x in "qkv"),
          "transformer.h.{i}.attn.c_proj": (L + "self_attn.o_proj",),
          "transformer.h.{i}.mlp.c_fc": (L + "mlp.up_proj",),
          "transformer.h.{i}.mlp.c_proj": (L + "mlp.down_proj",)},
    # the trap of GPT-2's files: OpenAI's Conv1D keeps its weight (in, out)
    transposed=("c_attn", "c_proj", "c_fc"),
    ignores=("n_ctx", "reorder_and_upcast_attn"),
    synonyms={"hidden_size": "n_embd", "max_position_embeddings": "n_positions",
              "num_attention_heads": "n_head", "num_hidden_layers": "n_layer"},
    # OpenAI's files have it, and llama.cpp's converter asks for it
    write=lambda config, hf: hf.update(n_ctx=config.block_size),
    rank=0, scratch=dict(activation="gelu_new"), from_bias=set_gpt2_biases,
    hub="openai-community",
    presets={"gpt2": make_size(12, 12, 12, 768), "gpt2-medium": make_size(24, 16, 16, 1024),
             "gpt2-large": make_size(36, 20, 20, 1280), "gpt2-xl": make_size(48, 25, 25, 1600)})
ROWS = (GPT2,)


if __name__ == "__main__":
    refuse_to_run()
