"""Families: how the published architectures spell our settings and our parameters.

    config = model_config_from_hf(json.load(open("config.json")))   # theirs -> ModelConfig
    hf = hf_config(config, tokenizer)                               # ModelConfig -> config.json
    slots = layout(config, family_of(config))                       # names and shapes on disk

A family is a row of a table, and a new one is a new row: what its architecture fixes, what its
config.json calls our settings, and what its files call our parameters, joined or transposed where
they are. checkpoint.py moves the bytes. What to expect: a model saved in the words of a family
gives in transformers the logits that it gives here (tests/test_checkpoint.py, for every row).
"""
from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import torch

from config import UserError, field_types
from model import ModelConfig, Transformer

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


# None as a default: the key has to be there
NEEDED = {"vocab_size": None, "hidden_size": None, "num_hidden_layers": None,
          "num_attention_heads": None, "intermediate_size": None}
LLAMA_ROW = Family(
    "llama", "LlamaForCausalLM",
    fixed=dict(position="rope", norm="rmsnorm", gated=True, norm_bias=False, qk_norm=False),
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
    only={"partial_rotary_factor": (1.0,)})


def without(pairs: tuple, *ours: str) -> tuple:
    """Field pairs less those of some ModelConfig fields, which the family fixes."""
    return tuple(pair for pair in pairs if pair[0] not in ours)


# A new family is a new row. Where two fit, the one that needs fewer biases of zero is written,
# then the earlier.
ROWS = (
    Family(
        "gpt2", "GPT2LMHeadModel",
        fixed=dict(position="learned", norm="layernorm", gated=False, qkv_bias=True, o_bias=True,
                   mlp_bias=True, norm_bias=True, qk_norm=False),
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
              "transformer.h.{i}.ln_1": ("model.layers.{i}.input_layernorm",),
              "transformer.h.{i}.ln_2": ("model.layers.{i}.post_attention_layernorm",),
              "transformer.h.{i}.attn.c_attn": ("model.layers.{i}.self_attn.q_proj",
                                                "model.layers.{i}.self_attn.k_proj",
                                                "model.layers.{i}.self_attn.v_proj"),
              "transformer.h.{i}.attn.c_proj": ("model.layers.{i}.self_attn.o_proj",),
              "transformer.h.{i}.mlp.c_fc": ("model.layers.{i}.mlp.up_proj",),
              "transformer.h.{i}.mlp.c_proj": ("model.layers.{i}.mlp.down_proj",)},
        # the trap of GPT-2's files: OpenAI's Conv1D keeps its weight (in, out)
        transposed=("c_attn", "c_proj", "c_fc")),
    LLAMA_ROW,
    replace(LLAMA_ROW, model_type="qwen2", architecture="Qwen2ForCausalLM",
            fixed=dict(LLAMA_ROW.fixed, qkv_bias=True, o_bias=False, mlp_bias=False),
            fields=without(LLAMA_ROW.fields, "qkv_bias", "o_bias", "mlp_bias"),
            defaults=dict(LLAMA_ROW.defaults, max_position_embeddings=32768),
            only=dict(LLAMA_ROW.only, use_sliding_window=(False,))),
    replace(LLAMA_ROW, model_type="qwen3", architecture="Qwen3ForCausalLM",
            fixed=dict(LLAMA_ROW.fixed, qk_norm=True, mlp_bias=False),
            fields=without(LLAMA_ROW.fields, "mlp_bias"),
            # the trap of Qwen3: heads are 128 wide whatever the width of the model
            defaults=dict(LLAMA_ROW.defaults, max_position_embeddings=32768, head_dim=128),
            only=dict(LLAMA_ROW.only, use_sliding_window=(False,))),
    # Llama with an MLP that is not gated
    replace(LLAMA_ROW, model_type="arcee", architecture="ArceeForCausalLM",
            fixed=dict(LLAMA_ROW.fixed, gated=False),
            defaults=dict(LLAMA_ROW.defaults, max_position_embeddings=4096, hidden_act="relu2",
                          rms_norm_eps=1e-5)),
    # read only: what it could say is written as Llama
    replace(LLAMA_ROW, model_type="mistral", architecture="MistralForCausalLM",
            fixed=dict(LLAMA_ROW.fixed, qkv_bias=False, o_bias=False, mlp_bias=False),
            fields=without(LLAMA_ROW.fields, "qkv_bias", "o_bias", "mlp_bias"),
            defaults=dict(LLAMA_ROW.defaults, max_position_embeddings=131072,
                          num_key_value_heads=8),
            only=dict(LLAMA_ROW.only, sliding_window=())),
)
FAMILIES = {row.model_type: row for row in ROWS}
# Any combination of flags that no family has; the names are ours and only this project reads it
HANDMADE = Family("handmade", "", {}, (), {})
LARGEST = 2 ** 24           # of any size in a file: tensors beyond it are an attack, or damage
BIASES = ("qkv_bias", "o_bias", "mlp_bias", "norm_bias")
# Settings that a rope_type needs beside its name
ROPE_KEYS = {"default": (), "linear": ("factor",),
             "llama3": ("factor", "low_freq_factor", "high_freq_factor",
                        "original_max_position_embeddings")}


def effective(config: ModelConfig) -> dict[str, Any]:
    """The settings that the maths depends on, in one spelling: equal models compare equal."""
    values = asdict(config)
    # older files say "type" for "rope_type"; a default type is no scaling at all
    scaling = dict(values["rope_scaling"] or {})
    kind = scaling.pop("type", "default")
    scaling = {"rope_type": kind, **scaling}
    values["rope_scaling"] = None if scaling["rope_type"] == "default" else scaling
    if config.position != "rope":
        values["rope_theta"] = values["rope_scaling"] = None
    del values["dropout"]
    return values


def to_family(config: ModelConfig, family: Family) -> dict[str, Any]:
    """`config` in the words of the family's config.json, whether or not they can say it."""
    hf: dict[str, Any] = {"model_type": family.model_type, "architectures": [family.architecture]}
    for ours, theirs in family.fields:
        value = getattr(config, ours)
        # one key may stand for two flags: attention_bias is that of q, k, v and that of o
        hf[theirs] = (hf.get(theirs, False) or value) if isinstance(value, bool) else value
    if family.fixed.get("position") == "rope":
        scaling = effective(config)["rope_scaling"]
        # transformers 5 reads rope_parameters; 4 and most other programs read the other two
        hf["rope_theta"], hf["rope_scaling"] = config.rope_theta, scaling
        hf["rope_parameters"] = {"rope_theta": config.rope_theta, "rope_type": "default",
                                 **(scaling or {})}
    return hf


def from_family(hf: dict[str, Any], family: Family, where: str = "config.json") -> ModelConfig:
    """The ModelConfig that a family's config.json describes; UserError if it is not supported."""
    for key, allowed in family.only.items():
        if hf.get(key) not in (None, *allowed):
            raise UserError(f"{where}: {key} = {hf[key]!r} is not supported, "
                            f"only {' or '.join(map(repr, allowed or (None,)))}")
    layers = hf.get("layer_types")
    if isinstance(layers, list) and any(kind != "full_attention" for kind in layers):
        raise UserError(f"{where}: layer_types other than full_attention are not supported")
    if hf.get("quantization_config"):
        raise UserError(f"{where}: quantised weights are not supported; use the original ones")
    values = dict(family.fixed)             # what the architecture is, then what the file says
    for ours, theirs in family.fields:
        if ours == "dropout":                   # a choice of the run, not of the model
            continue
        value = hf.get(theirs)
        values[ours] = family.defaults[theirs] if value is None else value
        if values[ours] is None:
            raise UserError(f"{where} does not say {theirs}: is it the file of a model?")
    if family.fixed["position"] == "rope":
        # old spelling: rope_theta and rope_scaling; new: all in rope_parameters
        rope = {"rope_theta": hf.get("rope_theta") or 10000.0}
        for part in (hf.get("rope_scaling") or {}, hf.get("rope_parameters") or {}):
            if not isinstance(part, dict) or any(isinstance(v, dict) for v in part.values()):
                raise UserError(f"{where}: rotary settings by kind of layer are not supported")
            rope.update(part)
        values["rope_theta"] = rope.pop("rope_theta")
        if (rope.pop("partial_rotary_factor", None) or 1.0) != 1.0:
            raise UserError(f"{where}: a partial_rotary_factor is not supported")
        values["rope_scaling"] = rope or None
    return checked(values, where)


def checked(values: dict[str, Any], where: str) -> ModelConfig:
    """ModelConfig(**values) after a look at every type and range: the values come from a file."""
    kinds, derived = field_types(ModelConfig), ("n_kv_head", "head_dim", "intermediate_size")
    for name, value in values.items():
        if name not in kinds:
            raise UserError(f"{where}: there is no setting {name!r}: a newer version wrote it?")
        kind, number = kinds[name], type(value) in (int, float) and math.isfinite(value)
        if kind is int:
            good = type(value) is int and (name not in derived) <= value < LARGEST
        elif kind is float:
            good = number and value >= 0
        else:
            good = isinstance(value, kind)
        if not good:
            raise UserError(f"{where}: {value!r} cannot be the model's {name}")
    scaling = values.get("rope_scaling")
    if scaling is not None:
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if not isinstance(kind, str) or kind not in ROPE_KEYS:
            raise UserError(f"{where}: rope_type {kind!r} is not supported, "
                            f"only {', '.join(ROPE_KEYS)}")
        for key in ROPE_KEYS[kind]:
            n = scaling.get(key)
            if type(n) not in (int, float) or not 0 < n < math.inf:
                raise UserError(f"{where}: rope_type {kind} needs {key}, a number above 0")
        # only what the formula reads: transformers adds keys of its own
        values["rope_scaling"] = None if kind == "default" else {
            "rope_type": kind, **{key: scaling[key] for key in ROPE_KEYS[kind]}}
    config = ModelConfig(**values)
    if config.n_head * config.head_dim >= LARGEST:
        raise UserError(f"{where}: {config.n_head} heads of {config.head_dim} are no model's")
    return config


def padding(config: ModelConfig, family: Family) -> int | None:
    """How many bias flags the family has beyond `config`'s; None if it is another model.

    A family fits if its config.json, read back, describes the same model. A bias of zero changes
    nothing, so a family with more biases fits too: that is how bias=False is saved as GPT-2.
    """
    try:
        back = effective(from_family(to_family(config, family), family))
    except UserError:
        return None
    wanted = effective(config)
    extra = [name for name in BIASES if back[name] and not wanted[name]]
    wanted.update(dict.fromkeys(extra, True))
    return len(extra) if back == wanted else None


def family_of(config: ModelConfig) -> Family:
    """The row that `config` is saved as: HANDMADE if there is none."""
    fits = [(n, row) for row in ROWS if (n := padding(config, row)) is not None]
    return min(fits, key=lambda fit: fit[0])[1] if fits else HANDMADE


def hf_config(config: ModelConfig, tokenizer: Any = None) -> dict[str, Any]:
    """The content of config.json: the family's words, and our own for an exact return."""
    hf = to_family(config, family_of(config))
    eot = getattr(tokenizer, "eot", None)
    # explicit nulls: where the key is missing transformers takes the family's published ids
    return {**hf, "bos_token_id": eot, "eos_token_id": eot, "handmade": asdict(config)}


def model_config_from_hf(hf: dict[str, Any], where: str = "config.json") -> ModelConfig:
    """ModelConfig of a config.json, ours or transformers', given as a dictionary."""
    kind, own = hf.get("model_type"), hf.get("handmade")
    if own is not None:
        if not isinstance(own, dict):
            raise UserError(f"{where}: its section \"handmade\" is not an object: delete it")
        own = checked(dict(own), where)
        if kind == "handmade":
            return own
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(f"{where}: models of the type {kind!r} are not supported, "
                        f"only {', '.join(FAMILIES)}")
    theirs = from_family(hf, FAMILIES[kind], where)
    if own is not None and padding(own, FAMILIES[kind]) is not None:
        # transformers carries our section along when it saves a model that it has changed, say
        # with more tokens: then the section is stale, and the other fields count
        # compared in the family's words, where biases of zero count as biases
        same = from_family(to_family(own, FAMILIES[kind]), FAMILIES[kind])
        if effective(same) == effective(theirs):
            return own
    return theirs

# ----------------------------------------------------------------------- names and shapes


class Slot(NamedTuple):
    """A tensor on disk: our parameters joined along dimension 0, and perhaps transposed."""
    parts: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    transpose: bool

    @property
    def shape(self) -> tuple[int, ...]:
        joined = (sum(s[0] for s in self.shapes), *self.shapes[0][1:])
        return joined[::-1] if self.transpose else joined


def layout(config: ModelConfig, family: Family) -> dict[str, Slot]:
    """Name on disk -> Slot, for every tensor of the family's checkpoint of this shape."""
    with torch.device("meta"):                          # shapes without memory
        shapes = {n: tuple(p.shape) for n, p in Transformer(config).named_parameters()}
    slots: dict[str, Slot] = {}
    for stem, modules in family.keys.items():
        for i in range(config.n_layer if "{i}" in stem else 1):
            for kind in ("weight", "bias"):
                parts = tuple(f"{m.format(i=i)}.{kind}" for m in modules)
                if parts[0] in shapes:
                    turned = kind == "weight" and stem.endswith(family.transposed)
                    slots[f"{stem.format(i=i)}.{kind}"] = Slot(
                        parts, tuple(shapes.pop(p) for p in parts), turned)
    # the rest is spelt on disk as here
    slots.update({name: Slot((name,), (shape,), False) for name, shape in shapes.items()})
    return slots


def disk_form(config: ModelConfig, family: Family) -> ModelConfig:
    """The model that lies on disk: `config`, with the family's biases of zero."""
    if family is HANDMADE:
        return config
    return from_family(to_family(config, family), family)
