"""Families: how the published architectures spell our settings and our parameters, as a table.

A family is a row, and a new one is a new row: what its architecture fixes, what its config.json
calls our settings, and what its files call our parameters, joined, stacked or transposed where
they are. translate.py reads the table; checkpoint.py moves the bytes. To expect: a model saved in
the words of a family gives in transformers the logits that it gives here (tests/families/test_families.py,
for every row).

Sources: the config.json and the weights that each family was published with, and the classes of
transformers that open them.
"""
from __future__ import annotations

import math
import reprlib
from dataclasses import dataclass, field, replace
from typing import Any, Callable

from config import UserError, refuse_to_run
from model import ModelConfig

# ------------------------------------------------------------------------------ the table


@dataclass(frozen=True)
class Family:
    """How a published architecture spells our settings and our parameters."""
    model_type: str                 # in config.json
    architecture: str               # transformers' class
    fixed: dict[str, Any]           # ModelConfig fields that make the family what it is
    fields: tuple[tuple[str, str], ...]         # (ModelConfig field, its key in config.json)
    defaults: dict[str, Any]        # what transformers takes where config.json is silent
    only: dict[str, tuple] = field(default_factory=dict)    # keys that change the maths in a
    #                                 way that the model has no flag for: their allowed values
    prefix: str = "model."          # files of a bare body lack it: both are read
    # module on disk -> our modules, joined along their outputs; others have the name on disk
    keys: dict[str, tuple[str, ...]] = field(default_factory=dict)
    transposed: tuple[str, ...] = ()            # modules stored (in, out)
    neighbours: tuple[str, ...] = ()            # rows of each head as rotary pairs (2i, 2i + 1)
    # what is no pair of one key and one field: (config.json, values) completes the values,
    # (config, config.json) the file
    read: Callable[[dict, dict], None] = lambda hf, values: None
    write: Callable[[ModelConfig, dict], None] = lambda config, hf: None
    rope: str = "plain"             # plain, partial, nested by kind of layer, own: by read
    writable: bool = True           # False: read only, saved as another family that fits
    reads: tuple[str, ...] = ()     # keys that `read` looks at
    ignores: tuple[str, ...] = ()   # keys of the family that change no logit (config_keys.py has
    #                                 those of all families)
    nulls: dict[str, Any] = field(default_factory=dict)     # what an explicit null means, where
    #                                 it is not what silence means
    synonyms: dict[str, str] = field(default_factory=dict)  # a second name of a key -> the key


def no_windows(hf: dict, values: dict) -> None:
    """Of a family whose layers all see everything: transformers ignores layer_types in it."""
    if set(hf.get("layer_types") or ()) - {"full_attention"}:
        raise UserError(f"layer_types with windows are not supported in a {hf['model_type']} model")


LARGEST_DEPTH = 10 ** 4     # of layers that a list is made for before the weights are looked at
# None as a default: the key has to be there
NEEDED = {"vocab_size": None, "hidden_size": None, "num_hidden_layers": None,
          "num_attention_heads": None, "intermediate_size": None}
LLAMA = Family(
    "llama", "LlamaForCausalLM",
    fixed=dict(position="rope", norm="rmsnorm", gated=True),
    fields=(("vocab_size", "vocab_size"), ("block_size", "max_position_embeddings"),
            ("n_layer", "num_hidden_layers"), ("n_head", "num_attention_heads"),
            ("n_kv_head", "num_key_value_heads"), ("n_embd", "hidden_size"),
            ("head_dim", "head_dim"), ("intermediate_size", "intermediate_size"),
            ("norm_eps", "rms_norm_eps"), ("activation", "hidden_act"),
            ("qkv_bias", "attention_bias"), ("o_bias", "attention_bias"),
            ("mlp_bias", "mlp_bias"), ("tie_word_embeddings", "tie_word_embeddings"),
            ("init_std", "initializer_range"), ("dropout", "attention_dropout")),
    defaults=dict(NEEDED, max_position_embeddings=2048, num_key_value_heads=0, head_dim=0,
                  rms_norm_eps=1e-6, hidden_act="silu", attention_bias=False, mlp_bias=False,
                  tie_word_embeddings=False, initializer_range=0.02),
    read=no_windows, reads=("layer_types",), nulls={"num_key_value_heads": 0})


def like(row: Family, model_type: str, architecture: str, fixed: dict | None = None,
         fields: dict[str, str] | None = None, defaults: dict | None = None, **rest) -> Family:
    """Another family's row with changes; what is fixed is no field, and a field has one key."""
    fixed, fields = {**row.fixed, **(fixed or {})}, fields or {}
    kept = tuple(pair for pair in row.fields if pair[0] not in fixed and pair[0] not in fields)
    known = {"model_type": model_type, "architecture": architecture, "fixed": fixed,
             "fields": kept + tuple(fields.items()),
             "defaults": {**row.defaults, **(defaults or {})}}
    return replace(row, **{**known, **rest})


L = "model.layers.{i}."
NO_BIAS = dict(qkv_bias=False, o_bias=False, mlp_bias=False)


def windowed(everywhere: int | None) -> dict[str, Any]:
    """read and write of `sliding_window`, of all layers alike; `everywhere`: where it is not said.

    Subtle: null in the file means no window, silence means transformers' default. There is no
    switch: transformers knows use_sliding_window in Qwen's families and in SmolLM3 alone.
    """
    def read(hf: dict, values: dict) -> None:
        values["sliding_window"] = read_window(hf, everywhere)
        kind = "sliding_attention" if values["sliding_window"] else "full_attention"
        if set(hf.get("layer_types") or ()) - {kind}:
            raise UserError("layer_types that differ are not supported in a "
                            f"{hf['model_type']} model")

    def write(config: ModelConfig, hf: dict) -> None:
        hf["sliding_window"] = config.sliding_window or None

    return {"read": read, "write": write, "reads": ("sliding_window", "layer_types"),
            "ignores": ("use_sliding_window", "max_window_layers")}


def read_window(hf: dict, silent: int | None) -> int:
    """Return sliding_window, 0 for null; `silent` where it is not said."""
    window = hf.get("sliding_window", silent)
    if window == 0:
        raise UserError("sliding_window = 0 hides every key: expected a number above 0, or null")
    return window or 0


def by_layer(default: Callable[[int, dict], bool], asks: bool) -> dict[str, Any]:
    """read and write of `layer_types`; default(layer, config.json) says which layers slide where
    the file does not. asks: none does unless use_sliding_window says so."""
    def read(hf: dict, values: dict) -> None:
        if asks and not hf.get("use_sliding_window"):
            no_windows(hf, values)      # there they end without a word of why
            return
        values["sliding_window"] = read_window(hf, 4096)
        if hf.get("layer_types") is not None:
            values["layer_types"] = hf["layer_types"]
        elif values["sliding_window"] and type(values["n_layer"]) is int:
            values["layer_types"] = [
                "sliding_attention" if default(i, hf) else "full_attention"
                for i in range(min(values["n_layer"], LARGEST_DEPTH))]

    def write(config: ModelConfig, hf: dict) -> None:
        hf["layer_types"] = config.layer_types or ["full_attention"] * config.n_layer
        slide = "sliding_attention" in hf["layer_types"]
        if asks:
            hf["use_sliding_window"] = slide
        # Gemma's classes do not open with null, even where no layer has a window
        hf["sliding_window"] = config.sliding_window or (None if asks else 4096)

    return {"read": read, "write": write, "reads": (
        "sliding_window", "layer_types", *("use_sliding_window", "max_window_layers") * asks)}


# the first max_window_layers layers see everything
QWEN_WINDOWS = by_layer(lambda i, hf: i >= hf.get("max_window_layers", 28), asks=True)


def gemma(model_type: str, architecture: str, pattern: int, **changes) -> Family:
    """Gemma 2 and 3: what their files share. `pattern`: every such layer has no window."""
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

    def write(config: ModelConfig, hf: dict) -> None:
        hf["query_pre_attn_scalar"] = round(config.attention_multiplier ** -2)
        for key in changes["caps"]:
            hf[key] = getattr(config, key) or None
        layers["write"](config, hf)

    return like(
        LLAMA, model_type, architecture,
        fixed=dict(NO_BIAS, norm_offset=1.0, norm_placement="sandwich", embedding_multiplier=0.0,
                   **changes["fixed"]),
        fields={"activation": "hidden_activation"},
        defaults=dict(head_dim=256, hidden_activation="gelu_pytorch_tanh",
                      tie_word_embeddings=True, num_key_value_heads=4,
                      max_position_embeddings=changes["context"],
                      **changes.get("defaults", {})),
        only={"attention_bias": (False,), "use_bidirectional_attention": (False,),
              **changes.get("only", {})},
        keys={L + "post_attention_layernorm": (L + "post_self_attn_layernorm",),
              L + "pre_feedforward_layernorm": (L + "post_attention_layernorm",),
              L + "post_feedforward_layernorm": (L + "post_mlp_layernorm",)},
        read=read, write=write, rope=changes["rope"],
        reads=("query_pre_attn_scalar", *changes["caps"], *layers["reads"], *asked),
        ignores=("hidden_act",))


def needs_experts(hf: dict, values: dict) -> None:
    # 0 experts would be an ordinary MLP, whose tensors have other names
    if not values["num_experts"]:
        raise UserError("a mixture of experts without experts")


def both(*steps: Callable) -> Callable:
    """One hook after the other."""
    return lambda *arguments: [step(*arguments) for step in steps] and None


MIXTRAL_WINDOW, QWEN_MOE_WINDOW = windowed(None), windowed(4096)


def qwen_moe_read(hf: dict, values: dict) -> None:
    """Read the window, which is that of all layers: the family has no layer_types."""
    needs_experts(hf, values)
    if hf.get("use_sliding_window"):                    # False where it is not said
        QWEN_MOE_WINDOW["read"](hf, values)
    else:
        no_windows(hf, values)


def qwen_moe_write(config: ModelConfig, hf: dict) -> None:
    """Write the window with the switch that transformers asks for first."""
    QWEN_MOE_WINDOW["write"](config, hf)
    hf["use_sliding_window"] = config.sliding_window > 0


def cohere_read(hf: dict, values: dict) -> None:
    """Read Command R's scale of the logits; 0 makes no model and ends in 1 / 0."""
    no_windows(hf, values)
    # logits are multiplied by it there, divided here
    scale = hf.get("logit_scale", 0.0625)
    values["logits_scaling"] = 1 / (0.0625 if scale is None else scale)


def smollm3_read(hf: dict, values: dict) -> None:
    # the trap: in no_rope_layers a 1 means that the layer has RoPE
    marks, n = hf.get("no_rope_layers"), hf.get("no_rope_layer_interval", 4)
    if marks is None and type(values["n_layer"]) is int:
        marks = [(i + 1) % n != 0 for i in range(min(values["n_layer"], LARGEST_DEPTH))]
    values["nope_layers"] = [i for i, rotates in enumerate(marks or ()) if not rotates] or None
    if hf.get("use_sliding_window"):
        raise UserError("use_sliding_window is not supported in SmolLM3")


def smollm3_write(config: ModelConfig, hf: dict) -> None:
    none = set(config.nope_layers or ())
    hf["no_rope_layers"] = [int(i not in none) for i in range(config.n_layer)]


def scales_read(hf: dict, values: dict) -> None:
    """Of MiniCPM and Granite, whose scales are numbers in the file."""
    no_windows(hf, values)
    for name in ("embedding_multiplier", "attention_multiplier"):
        if name in values and not values[name]:         # which means another number in ModelConfig
            raise UserError(f"{name} is 0, which makes no model")


def minicpm_read(hf: dict, values: dict) -> None:
    scales_read(hf, values)
    # Hu 2024: each branch by scale_depth / sqrt(layers), logits by dim_model_base / width
    depth, layers = hf.get("scale_depth") or 1.0, hf.get("num_hidden_layers") or 1
    values["residual_multiplier"] = depth / math.sqrt(layers)
    values["logits_scaling"] = values["n_embd"] / (hf.get("dim_model_base") or 1)


def chatglm_read(hf: dict, values: dict) -> None:
    # the number of key heads is there even where it does not count
    if not hf.get("multi_query_attention"):
        values["n_kv_head"] = 0
    # GLM-4 stretches its context by the base alone
    values["rope_theta"] = 10000.0 * (hf.get("rope_ratio") or 1.0)


def chatglm_write(config: ModelConfig, hf: dict) -> None:
    # the second line: what the row does not read, and the published program does
    hf.update(multi_query_attention=True, rope_ratio=config.rope_theta / 10000,
              add_bias_linear=False, rmsnorm=True, post_layer_norm=True, original_rope=True,
              apply_residual_connection_post_layernorm=False, tie_word_embeddings=False)


def meta_width(hf: dict) -> int:
    """Width of the MLP by the rule of Meta's program: 8/3 dim, a factor, a round number."""
    wide = int(2 * (4 * hf["dim"]) / 3)
    wide, step = int((hf.get("ffn_dim_multiplier") or 1.0) * wide), hf.get("multiple_of") or 256
    return math.ceil(wide / step) * step


def meta_read(hf: dict, values: dict) -> None:
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


def meta_write(config: ModelConfig, hf: dict) -> None:
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


def meta_file(config: ModelConfig, hf: dict) -> dict[str, Any]:
    """What of our words goes into params.json: Meta's program stops at a key that it does not
    know. Mistral's knows two more, which are written where nothing else would do."""
    more = {"head_dim": config.head_dim * config.n_head != config.n_embd,
            "sliding_window": config.sliding_window > 0}
    return {key: value for key, value in hf.items() if key in META_KEYS or more.get(key)}


GLM = like(LLAMA, "glm", "GlmForCausalLM",
           fixed=dict(o_bias=False, mlp_bias=False, rope_interleaved=True),
           defaults=dict(max_position_embeddings=131072, head_dim=128, attention_bias=True,
                         num_key_value_heads=2, rms_norm_eps=1.5625e-7),
           keys={L + "mlp.gate_up_proj": (L + "mlp.gate_proj", L + "mlp.up_proj")},
           rope="partial")
MOE = {"num_experts_per_tok": "num_experts_per_tok",
       "moe_intermediate_size": "moe_intermediate_size"}
E = "transformer.encoder.layers.{i}."
# A new family is a new row. Where two fit, the one that needs fewer biases of zero is written,
# then the earlier.
ROWS = (
    Family(
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
        write=lambda config, hf: hf.update(n_ctx=config.block_size)),
    LLAMA,
    like(LLAMA, "qwen2", "Qwen2ForCausalLM", dict(qkv_bias=True, o_bias=False, mlp_bias=False),
         defaults=dict(max_position_embeddings=32768, num_key_value_heads=32), **QWEN_WINDOWS),
    # the trap of Qwen3: heads are 128 wide whatever the width of the model
    like(LLAMA, "qwen3", "Qwen3ForCausalLM", dict(qk_norm=True, mlp_bias=False),
         defaults=dict(max_position_embeddings=32768, num_key_value_heads=32, head_dim=128),
         **QWEN_WINDOWS),
    # Llama with an MLP that is not gated
    like(LLAMA, "arcee", "ArceeForCausalLM", dict(gated=False),
         defaults=dict(max_position_embeddings=4096, hidden_act="relu2", rms_norm_eps=1e-5)),
    like(LLAMA, "mistral", "MistralForCausalLM", NO_BIAS,
         defaults=dict(max_position_embeddings=131072, num_key_value_heads=8), **windowed(4096)),
    like(LLAMA, "mixtral", "MixtralForCausalLM",
         dict(NO_BIAS, norm_topk_prob=True),
         {"num_experts": "num_local_experts", **MOE, "moe_intermediate_size": "intermediate_size"},
         dict(max_position_embeddings=131072, num_key_value_heads=8, rms_norm_eps=1e-5,
              rope_theta=1e6, num_local_experts=8, num_experts_per_tok=2),
         keys={L + "block_sparse_moe.gate": (L + "mlp.gate",),
               L + "block_sparse_moe.experts.{e}.w1": (L + "mlp.experts.gate_proj",),
               L + "block_sparse_moe.experts.{e}.w2": (L + "mlp.experts.down_proj",),
               L + "block_sparse_moe.experts.{e}.w3": (L + "mlp.experts.up_proj",)},
         **{**MIXTRAL_WINDOW, "read": both(MIXTRAL_WINDOW["read"], needs_experts)},
         synonyms={"num_experts": "num_local_experts"}),
    like(LLAMA, "qwen3_moe", "Qwen3MoeForCausalLM", dict(qk_norm=True, mlp_bias=False),
         {"num_experts": "num_experts", **MOE, "norm_topk_prob": "norm_topk_prob"},
         dict(max_position_embeddings=32768, num_key_value_heads=4, num_experts=128,
              num_experts_per_tok=8, moe_intermediate_size=768, norm_topk_prob=False),
         only={"decoder_sparse_step": (1,), "mlp_only_layers": ([],)},
         # the published files say num_experts, those that transformers 5 writes the other
         synonyms={"num_local_experts": "num_experts"}, read=qwen_moe_read, write=qwen_moe_write,
         reads=("sliding_window", "use_sliding_window", "layer_types"),
         ignores=("max_window_layers",)),
    gemma("gemma3_text", "Gemma3ForCausalLM", 6, fixed=dict(qk_norm=True), rope="nested",
          # subtle: transformers has a setting for a cap on attention and ignores it
          only={"attn_logit_softcapping": (0,)}, caps=dict(final_logit_softcapping=None),
          context=131072,
          # which the text_config of the published 4B leaves out
          defaults=dict(vocab_size=262208, num_attention_heads=8)),
    gemma("gemma2", "Gemma2ForCausalLM", 2, fixed={}, rope="plain", context=8192,
          caps=dict(attn_logit_softcapping=50.0, final_logit_softcapping=30.0)),
    GLM,
    like(GLM, "glm4", "Glm4ForCausalLM", dict(norm_placement="sandwich")),
    like(LLAMA, "glm4_moe", "Glm4MoeForCausalLM",
         dict(o_bias=False, mlp_bias=False, scoring_func="sigmoid", router_bias=True),
         {"num_experts": "n_routed_experts", **MOE, "n_shared_experts": "n_shared_experts",
          "first_k_dense_replace": "first_k_dense_replace", "norm_topk_prob": "norm_topk_prob",
          "routed_scaling_factor": "routed_scaling_factor", "qk_norm": "use_qk_norm"},
         dict(max_position_embeddings=131072, num_key_value_heads=8, rms_norm_eps=1e-5,
              n_routed_experts=128, num_experts_per_tok=8, moe_intermediate_size=1408,
              n_shared_experts=1, first_k_dense_replace=1, norm_topk_prob=True,
              routed_scaling_factor=1.0, use_qk_norm=False),
         only={"n_group": (1,), "topk_group": (1,), "scoring_func": ("sigmoid",),
               "topk_method": ("noaux_tc",)}, rope="partial",
         synonyms={"num_local_experts": "n_routed_experts"},
         ignores=("num_nextn_predict_layers", "num_mtp_layers"),
         # said, because the family's default is one more layer, that predicts a second token
         read=needs_experts, write=lambda config, hf: hf.update(num_nextn_predict_layers=0)),
    like(LLAMA, "olmo2", "Olmo2ForCausalLM",
         dict(norm_placement="post", qk_norm=True, qk_norm_whole=True, mlp_bias=False),
         defaults=dict(rms_norm_eps=1e-5),
         keys={L + "post_attention_layernorm": (L + "post_self_attn_layernorm",),
               L + "post_feedforward_layernorm": (L + "post_mlp_layernorm",)}),
    like(LLAMA, "cohere", "CohereForCausalLM",
         dict(norm="layernorm", norm_placement="parallel", mlp_bias=False, rope_interleaved=True),
         {"norm_eps": "layer_norm_eps"},
         dict(max_position_embeddings=8192, layer_norm_eps=1e-5, tie_word_embeddings=True,
              rope_theta=5e5),
         only={"use_qk_norm": (False,)}, read=cohere_read, reads=("logit_scale", "layer_types"),
         write=lambda config, hf: hf.update(logit_scale=1 / config.logits_scaling)),
    like(LLAMA, "smollm3", "SmolLM3ForCausalLM", {},
         defaults=dict(max_position_embeddings=32768, num_key_value_heads=4,
                       tie_word_embeddings=True, rope_theta=2e6),
         read=both(no_windows, smollm3_read), write=smollm3_write,
         reads=("layer_types", "use_sliding_window", "no_rope_layers", "no_rope_layer_interval"),
         ignores=("sliding_window", "max_window_layers")),
    # MiniCPM's scales under other names, which transformers opens without foreign code
    like(LLAMA, "granite", "GraniteForCausalLM", {},
         {k: k for k in ("embedding_multiplier", "residual_multiplier", "attention_multiplier",
                         "logits_scaling")},
         dict(embedding_multiplier=1.0, residual_multiplier=1.0, attention_multiplier=1.0,
              logits_scaling=1.0), read=scales_read),
    # --- read only
    like(LLAMA, "minicpm", "MiniCPMForCausalLM", NO_BIAS, {"embedding_multiplier": "scale_emb"},
         dict(scale_emb=1.0, tie_word_embeddings=True), read=minicpm_read, writable=False,
         reads=("layer_types", "scale_depth", "dim_model_base")),
    Family(
        "chatglm", "ChatGLMModel",              # ChatGLM3-6B and GLM-4-9B as they were published
        fixed=dict(GLM.fixed, activation="silu", partial_rotary_factor=0.5,
                   tie_word_embeddings=False),
        fields=(("vocab_size", "padded_vocab_size"), ("block_size", "seq_length"),
                ("n_layer", "num_layers"), ("n_head", "num_attention_heads"),
                ("n_kv_head", "multi_query_group_num"), ("n_embd", "hidden_size"),
                ("head_dim", "kv_channels"), ("intermediate_size", "ffn_hidden_size"),
                ("norm_eps", "layernorm_epsilon"), ("qkv_bias", "add_qkv_bias")),
        defaults=dict(padded_vocab_size=None, seq_length=2048, num_layers=None, hidden_size=None,
                      num_attention_heads=None, multi_query_group_num=1, kv_channels=0,
                      ffn_hidden_size=None, layernorm_epsilon=1e-5, add_qkv_bias=False),
        only={"add_bias_linear": (False,), "rmsnorm": (True,), "post_layer_norm": (True,),
              "apply_residual_connection_post_layernorm": (False,), "original_rope": (True,),
              "tie_word_embeddings": (False,), "interleaved_qkv": (False,)},
        prefix="transformer.",
        keys={"transformer.embedding.word_embeddings": ("model.embed_tokens",),
              E + "input_layernorm": (L + "input_layernorm",),
              E + "post_attention_layernorm": (L + "post_attention_layernorm",),
              E + "self_attention.query_key_value": tuple(L + f"self_attn.{x}_proj"
                                                          for x in "qkv"),
              E + "self_attention.dense": (L + "self_attn.o_proj",),
              E + "mlp.dense_h_to_4h": (L + "mlp.gate_proj", L + "mlp.up_proj"),
              E + "mlp.dense_4h_to_h": (L + "mlp.down_proj",),
              "transformer.encoder.final_layernorm": ("model.norm",),
              "transformer.output_layer": ("lm_head",)},
        read=chatglm_read, write=chatglm_write, rope="own", writable=False,
        reads=("multi_query_attention", "rope_ratio"),
        # of its own program: the types and kernels it computes with
        ignores=("apply_query_key_layer_scaling", "attention_softmax_in_fp32", "vocab_size",
                 "bias_dropout_fusion", "fp32_residual_connection", "prefix_projection")),
    Family(
        "meta", "",                     # Llama as Meta publishes it, and Mistral's twin of it
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
        neighbours=("wq", "wk"), read=meta_read, write=meta_write, rope="own", writable=False),
)
FAMILIES = {row.model_type: row for row in ROWS}
# Models that see as well, whose text model is read (formats/wrapped.py): their model_type -> that
# of the text model, where text_config does not say it
WRAPPERS = {"gemma3": "gemma3_text", "mistral3": "mistral"}
# Any combination of flags that no family has; the names are ours and only this project reads it
HANDMADE = Family("handmade", "", {}, (), {})


if __name__ == "__main__":
    refuse_to_run()
