"""Translation between our settings and parameters and those of Hugging Face's files.

    config = model_config_from_hf(json.load(open("config.json")))   # theirs -> ModelConfig
    hf = hf_config(config, tokenizer)                               # ModelConfig -> config.json
    slots = layout(config, family_of(config))                       # names and shapes on disk

The rows of families/ are the table; this file reads and writes by them. A model is saved as the
first family whose config.json, read back, describes the same model; if none does, as our own.
"""
from __future__ import annotations

import difflib
import math
import reprlib
from dataclasses import asdict
from typing import Any, NamedTuple

from config import UserError, field_types, refuse_to_run

import torch
from torch import Tensor

from formats.config_keys import check_keys
from families import FAMILIES, HANDMADE, ROWS, WRAPPERS
from families.base import LARGEST_DEPTH, Family
from layers.rope import rope_frequencies
from model import ModelConfig, Transformer
from text.tokenizer_files import is_misread
from formats.safetensors import note, shorten

LATER_SETTINGS = ("mlp_only_layers", "saved_as")
LAYER_NUMBERS = ("nope_layers", "mlp_only_layers")      # lists of numbers of layers
ABOVE_ZERO = ("vocab_size", "block_size", "n_layer", "n_head", "n_embd", "logits_scaling")
KINDS = field_types(ModelConfig)
LARGEST = 2 ** 24           # of any size in a file: tensors beyond it are an attack, or damage
LARGEST_NUMBER = 1e18       # of any other number
BIASES = ("qkv_bias", "o_bias", "mlp_bias", "norm_bias")
EXPERTS = ("num_experts_per_tok", "moe_intermediate_size", "n_shared_experts", "scoring_func",
           "router_bias", "norm_topk_prob", "routed_scaling_factor")
# Settings that a rope_type needs beside its name, and those that it may have
ROPE_KEYS = {"default": (), "linear": ("factor",),
             "llama3": ("factor", "low_freq_factor", "high_freq_factor",
                        "original_max_position_embeddings"),
             "yarn": ("factor", "original_max_position_embeddings")}
LOCAL_KEY = "rope_local_base_freq"         # the base of layers with a window, outside the object
ROPE_OPTIONS = {"yarn": ("beta_fast", "beta_slow", "attention_factor", "mscale",
                         "mscale_all_dim", "truncate")}


def effective(config: ModelConfig) -> dict[str, Any]:
    """Return the settings that the maths depends on, in one spelling: equal models compare
    equal."""
    values = asdict(config)
    # older files say "type" for "rope_type"; a default type is no scaling at all
    scaling = dict(values["rope_scaling"] or {})
    kind = scaling.pop("type", "default")
    scaling = {"rope_type": kind, **scaling}
    values["rope_scaling"] = None if scaling["rope_type"] == "default" else scaling
    kinds = {config.window(i) > 0 for i in range(config.n_layer)}
    if config.position != "rope":
        values["rope_theta"] = values["rope_scaling"] = None
        values["partial_rotary_factor"] = values["rope_interleaved"] = None
    if config.position != "rope" or True not in kinds:
        values["rope_local_theta"] = None               # settings that nothing reads
    if kinds == {False} and set(config.layer_types or ()) <= {"full_attention"}:
        values["layer_types"] = values["sliding_window"] = None
    dense = [i for i in range(config.n_layer) if not config.is_moe(i)]
    del values["first_k_dense_replace"]
    values["mlp_only_layers"] = dense if config.num_experts else None
    if not config.num_experts:
        values.update(dict.fromkeys(EXPERTS))
    elif not dense:
        values["intermediate_size"] = None              # every layer has experts instead
    if config.norm == "layernorm" and not config.qk_norm:
        values["norm_offset"] = None
    values["nope_layers"] = sorted(set(config.nope_layers or ()))
    del values["dropout"]
    del values["saved_as"]
    # a reciprocal there and back is off in the sixteenth digit
    return {k: float(f"{v:.12g}") if isinstance(v, float) else v for k, v in values.items()}


def to_family(config: ModelConfig, family: Family) -> dict[str, Any]:
    """Return `config` in the words of the family's config.json, whether or not they can say it."""
    hf: dict[str, Any] = {"model_type": family.model_type, "architectures": [family.architecture]}
    for ours, theirs in family.fields:
        value = getattr(config, ours)
        # one key may stand for two flags: attention_bias is that of q, k, v and that of o
        hf[theirs] = (hf.get(theirs, False) or value) if isinstance(value, bool) else value
    if family.fixed.get("position") == "rope" and family.rope != "own":
        scaling = effective(config)["rope_scaling"]
        # transformers 5 reads rope_parameters; 4 and most other programs read the other two
        hf["rope_theta"] = config.rope_theta
        hf["rope_scaling"] = scaling
        rope = {"rope_theta": config.rope_theta, "rope_type": "default", **(scaling or {})}
        share = config.partial_rotary_factor
        if family.rope == "partial" and (share != 1 or "partial_rotary_factor" in family.defaults):
            hf["partial_rotary_factor"] = share
            rope["partial_rotary_factor"] = share
        if family.rope == "nested":
            local = config.rope_local_theta or config.rope_theta
            if LOCAL_KEY in family.reads:
                hf[LOCAL_KEY] = local
            rope = {"full_attention": rope, "sliding_attention": {
                "rope_type": "default", "rope_theta": local}}
        hf["rope_parameters"] = rope
    family.write(config, hf)
    return hf


def from_family(hf: dict[str, Any], family: Family, where: str = "config.json") -> ModelConfig:
    """Return the ModelConfig that a family's config.json describes; UserError if it is not
    supported."""
    for key, allowed in family.only.items():
        if hf.get(key) not in (None, *allowed):
            raise UserError(f"{where}: {key} = {reprlib.repr(hf[key])} is not supported, "
                            f"only {' or '.join(map(repr, allowed or (None,)))}")
    if hf.get("quantization_config"):
        raise UserError(f"{where}: quantised weights are not supported; use the original ones")
    hf = resolve_synonyms(hf, family, where)
    check_keys(hf, list_known_keys(family), family.model_type, where)
    values = dict(family.fixed)             # what the architecture is, then what the file says
    values["saved_as"] = family.saved_as
    for ours, theirs in family.fields:
        if ours == "dropout":                   # a choice of the run, not of the model
            continue
        value = hf.get(theirs)
        if value is None:
            null = theirs in hf and theirs in family.nulls
            value = (family.nulls if null else family.defaults)[theirs]
            # 0 leaves the size to the others, as null does in transformers; null is no 1e-6
            if theirs in hf and not null and (value or value is False):
                raise UserError(f"{where}: {theirs} is null: expected a value; delete the key for "
                                f"the family's own, {shorten(value)}")
        values[ours] = value
        if values[ours] is None:
            raise UserError(f"{where} does not say {theirs}: is it the file of a model?")
    if family.fixed["position"] == "rope" and family.rope != "own":
        read_rope(hf, family, values, where)
    try:
        family.read(hf, values)
    except UserError as e:
        raise UserError(f"{where}: {str(e)[:400]}") from None
    except (TypeError, ValueError, ArithmeticError) as e:   # arithmetic on what is no number
        raise UserError(f"{where} is not the file of a {family.model_type} model: "
                        f"{str(e)[:200]}") from None
    return checked(values, where, dict(family.fields))


def resolve_synonyms(hf: dict[str, Any], family: Family, where: str) -> dict[str, Any]:
    """Return the file's settings under one name each; UserError where two names disagree."""
    renamed = dict(hf)
    for second, first in family.synonyms.items():
        value = renamed.pop(second, None)
        if value is not None and renamed.setdefault(first, value) != value:
            raise UserError(f"{where}: {second} = {shorten(value)} and {first} = "
                            f"{shorten(renamed[first])} are two names of one setting, which is not "
                            "supported with different values: delete the wrong one")
    return renamed


# Where rotary settings may stand: rope_theta and rope_scaling of transformers 4, rope_parameters of
# 5, which has partial_rotary_factor inside
ROPE = ("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor")


def list_known_keys(family: Family) -> frozenset[str]:
    """Return the keys of config.json that the family reads, or knows to be harmless."""
    keys = {theirs for _, theirs in family.fields}
    # the context of the first training may stand outside of a flat rotary object
    if family.fixed["position"] == "rope" and family.rope != "own":
        keys |= set(ROPE)
        if family.rope != "nested":
            keys.add("original_max_position_embeddings")
    return frozenset(keys | {*family.reads, *family.ignores, *family.only, "quantization_config"})


def read_object(hf: dict, key: str, where: str) -> dict[str, Any]:
    """Return the object under a key of config.json, {} for null; UserError if it is none."""
    value = hf.get(key)
    if not isinstance(value, (dict, type(None))):
        raise UserError(f"{where}: expected an object as {key}, got {shorten(value)}")
    return dict(value or {})


def read_rope(hf: dict, family: Family, values: dict, where: str) -> None:
    """Read the rotary settings, in the old spelling (rope_theta, rope_scaling) or the new one
    (rope_parameters). Where both are there, what counts is what counts in transformers."""
    # what silence means: the family's own base, else that of the paper (Su 2021)
    silent = family.defaults.get("rope_theta", 1e6 if family.rope == "nested" else 10000.0)
    rope = (merge_rope if family.rope == "nested" else choose_rope)(hf, family, values, where)
    inner = rope.pop("rope_theta", None)
    outer = hf.get("rope_theta")
    if inner is not None and outer is not None and inner != outer:
        note(f"{where}: rope_theta = {shorten(outer)} does not count beside the {shorten(inner)} "
             "of its rotary settings, as in transformers")
    theta = outer if inner is None else inner
    values["rope_theta"] = silent if theta is None else theta
    if rope.get("rope_type", rope.get("type")) in ("llama3", "yarn"):
        # both stretch from the context of the first training, which not every file repeats; a
        # number outside of the object counts before the one in it
        outer = hf.get("original_max_position_embeddings")
        rope.setdefault("original_max_position_embeddings", values["block_size"])
        if outer is not None:
            rope["original_max_position_embeddings"] = outer
    share = rope.pop("partial_rotary_factor", None)
    if share is None:                       # an explicit null is transformers' 1
        share = hf.get("partial_rotary_factor", family.defaults.get("partial_rotary_factor", 1.0))
    share = 1.0 if share is None else share
    if family.rope == "partial":
        values["partial_rotary_factor"] = share
    elif share not in (1, 1.0):
        raise UserError(f"{where}: a partial_rotary_factor is not supported in a "
                        f"{family.model_type} model")
    values["rope_scaling"] = rope or None


def choose_rope(hf: dict, family: Family, values: dict, where: str) -> dict[str, Any]:
    """Return the rotary object that counts: rope_scaling if there is one, else rope_parameters."""
    old = read_object(hf, "rope_scaling", where)
    new = read_object(hf, "rope_parameters", where)
    if any(isinstance(value, dict) for value in [*old.values(), *new.values()]):
        raise UserError(f"{where}: rotary settings by kind of layer are not supported in a "
                        f"{family.model_type} model")
    # Who adds rope_scaling to a file of transformers 5, as model cards advise, leaves the base in
    # rope_parameters: rope_scaling counts alone, and the base would be lost without a word
    for key in ("rope_theta", "partial_rotary_factor") if old else ():
        if old.get(key) is None and hf.get(key) is None and new.get(key) is not None:
            raise UserError(f"{where}: rope_scaling counts instead of rope_parameters, and it does "
                            f"not say {key}: write {key} = {shorten(new[key])} into it as well")
    return old or new


def merge_rope(hf: dict, family: Family, values: dict, where: str) -> dict[str, Any]:
    """Return the rotary object of the full_attention layers; put the base of the others into
    `values`. rope_scaling is of the full_attention layers, and is laid over rope_parameters."""
    old = read_object(hf, "rope_scaling", where)
    new = read_object(hf, "rope_parameters", where)
    if set(new) - {"full_attention", "sliding_attention"}:
        raise UserError(f"{where}: expected full_attention and sliding_attention in the "
                        f"rope_parameters of a {family.model_type} model, got {shorten([*new])}")
    full = read_object(new, "full_attention", where)
    slide = read_object(new, "sliding_attention", where)
    if any(isinstance(value, dict) for value in [*old.values(), *full.values()]):
        raise UserError(f"{where}: expected numbers in rope_scaling and in rope_parameters' "
                        "full_attention")
    shadow = full.get("rope_type", None if new else "default")
    if "type" in old and "rope_type" not in old and shadow not in (None, old["type"]):
        # there transformers reads rope_type alone
        raise UserError(f"{where}: rope_scaling says type = {shorten(old['type'])}, which does not "
                        f"count in a {family.model_type} model: call it rope_type")
    if slide.get("rope_type", slide.get("type", "default")) != "default":
        raise UserError(f"{where}: of its rotary settings only full_attention's can scale")
    # the layers with a window keep a base of their own, unscaled (Gemma 3 report, 2025)
    local = slide.get("rope_theta")
    if local is None and LOCAL_KEY in family.reads:
        local = hf.get(LOCAL_KEY)
    if local is not None and (not is_number(local) or local == 0):      # ours: 0 is rope_theta
        raise UserError(f"{where}: expected a positive rope_theta of the layers with a window, got "
                        f"{shorten(local)}")
    silent = family.defaults.get("rope_local_theta", 10000.0)
    values["rope_local_theta"] = silent if local is None else local
    return {**full, **old}


def is_number(value: Any) -> bool:
    """Return whether it is 0 or more, and no more than any model's: arithmetic on it stays
    finite."""
    return type(value) in (int, float) and 0 <= value <= LARGEST_NUMBER


def checked(values: dict[str, Any], where: str,
            keys: dict[str, str] | None = None) -> ModelConfig:
    """Return ModelConfig(**values) after a look at every type and range: they come from a file.

    keys: what the file calls them, for the sentence.
    """
    # 1. each by itself; type() and not isinstance(), since True is an int to Python
    for name, value in values.items():
        if name not in KINDS:
            raise UserError(f"{where}: there is no setting {shorten(name)}: a newer version wrote "
                            "it?")
        kind = KINDS[name]
        if kind is int:
            good = type(value) is int and (name in ABOVE_ZERO) <= value < (
                LARGEST_DEPTH if name == "n_layer" else LARGEST)
        elif kind is float:
            good = is_number(value) and (value > 0 or name not in ABOVE_ZERO) and (
                value <= 1 or name != "partial_rotary_factor")
        else:
            good = isinstance(value, kind)
        if isinstance(value, list):             # of layers: their numbers, or their kinds
            good = good and len(value) <= LARGEST_DEPTH and all(
                type(v) is (int if name in LAYER_NUMBERS else str) for v in value)
        if not good:
            key = (keys or {}).get(name, name)
            raise UserError(f"{where}: {key} = {reprlib.repr(value)} is not possible, it cannot be "
                            f"the model's {name}")
    # 2. the rotary scaling, an object of its own
    scaling = values.get("rope_scaling")
    if scaling is not None:
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if not isinstance(kind, str) or kind not in ROPE_KEYS:
            raise UserError(f"{where}: rope_type {shorten(kind)} is not supported, "
                            f"only {', '.join(ROPE_KEYS)}")
        for key in ROPE_KEYS[kind]:
            if not is_number(scaling.get(key)) or not scaling[key]:
                raise UserError(f"{where}: rope_type {kind} needs {key}, a number above 0")
        for key in ROPE_OPTIONS.get(kind, ()):
            value = scaling.get(key)
            good = type(value) is bool if key == "truncate" else is_number(value)
            if value is not None and (not good or key == "attention_factor" and not value):
                raise UserError(f"{where}: {reprlib.repr(value)} cannot be rope_type {kind}'s "
                                f"{key}")
        # only what the formula reads: transformers adds keys of its own
        values["rope_scaling"] = None if kind == "default" else {
            "rope_type": kind, **{key: scaling[key] for key in ROPE_KEYS[kind]},
            **{key: scaling[key] for key in ROPE_OPTIONS.get(kind, ())
               if scaling.get(key) is not None}}
    # 3. together: sizes whose products are tensors, and frequencies that exist
    try:
        config = ModelConfig(**values)
    except UserError as e:                  # which may print a list of ten thousand layers
        raise UserError(f"{where}: {str(e)[:300]}") from None
    if config.n_head * config.head_dim >= LARGEST:
        raise UserError(f"{where}: {config.n_head} heads of {config.head_dim} are no model's")
    if max(config.num_experts, config.n_shared_experts) * config.moe_intermediate_size >= LARGEST:
        raise UserError(f"{where}: {config.num_experts} experts of {config.moe_intermediate_size} "
                        "are no model's")
    if config.position == "rope":
        try:                                # numbers of which each is possible, and not all
            found = [rope_frequencies(config, local) for local in (False, True)]
            # radians a token: of a million float32 leaves no digit of the angle
            good = all(f.isfinite().all() and f.max() <= 1e3 and 0 < factor < math.inf
                       for f, factor in found)
        except (ArithmeticError, ValueError):
            good = False
        if not good:
            raise UserError(f"{where}: rope_theta {config.rope_theta} with rope_scaling "
                            f"{config.rope_scaling} gives no frequencies")
    return config


def differences(config: ModelConfig, family: Family) -> set[str]:
    """Return the settings of `config` that change when it is written as the family and read
    back."""
    back = effective(from_family(to_family(config, family), family))
    wanted = effective(config)
    return {name for name in wanted if back[name] != wanted[name]}


def padding(config: ModelConfig, family: Family) -> int | None:
    """Return how many bias flags the family has beyond `config`'s; None if it is another model.

    A family fits if its config.json, read back, describes the same model. A bias of zero changes
    nothing, so a family with more biases fits too: that is how bias=False is saved as GPT-2.
    """
    try:
        other = differences(config, family)
    except UserError:
        return None
    extra = {name for name in BIASES if not getattr(config, name)} & other
    return len(extra) if other == extra else None


def family_of(config: ModelConfig, but: str = "") -> Family:
    """Return the row that `config` is saved as, not the type `but`: HANDMADE if there is none."""
    own = FAMILIES.get(config.saved_as)
    if own is not None and own.model_type != but and padding(config, own) is not None:
        return own
    fits = [(n, row) for row in ROWS if row.writable and row.model_type != but
            and (n := padding(config, row)) is not None]
    return min(fits, key=lambda fit: (fit[1].rank > 1, fit[0]))[1] if fits else HANDMADE


def readable_family(config: ModelConfig, tokenizer: Any) -> tuple[Family, str]:
    """Return the row to save a model as, so that transformers reads its tokenizer as it is; and a
    note."""
    family = family_of(config)
    if tokenizer is None or not is_misread(tokenizer, family.model_type):
        return family, ""
    other = family_of(config, but=family.model_type)
    how = f"saved as {other.model_type}, with biases of zero" if other is not HANDMADE else \
        "to be opened there with PreTrainedTokenizerFast"
    said = (f"transformers reads every tokenizer of a {family.model_type} model by Qwen's own "
            f"rules, and this one has others: it is {how}")
    return (family if other is HANDMADE else other), said


def hf_config(config: ModelConfig, tokenizer: Any = None,
              family: Family | None = None) -> dict[str, Any]:
    """Return the content of config.json: the family's words, and our own for an exact return."""
    family = family or family_of(config)
    hf = to_family(config, family)
    # explicit nulls: where the key is missing transformers takes the family's published ids
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    ids.update(tokenizer.token_ids() if tokenizer is not None else {})
    if not family.null_ids:
        ids = {key: value for key, value in ids.items() if value is not None}
    # settings that came later are written where they say something
    own = {key: value for key, value in asdict(config).items()
           if key not in LATER_SETTINGS or value}
    return {**hf, **ids, "handmade": own}


# Keys that are not true of a copy: where the code lies that opens it, what it was computed in
LEFT_OUT = ("auto_map", "custom_pipelines", "torch_dtype", "quantization_config")


def find_other_keys(source: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Return what a config.json says beside the `settings` that are written of the same model.

    Of another family its words would mean something else; and if they change what the settings
    say, here or by a second name, none of them is kept.
    """
    if source.get("model_type") != settings["model_type"]:
        return {}
    family = FAMILIES.get(settings["model_type"], HANDMADE)
    noise = {theirs for ours, theirs in family.fields if ours == "dropout"}  # which is not read
    other = {key: value for key, value in source.items()
             if key in noise or key not in settings and key not in LEFT_OUT}
    try:
        same = model_config_from_hf({**settings, **other}) == model_config_from_hf(settings)
    except UserError:
        return {}
    return other if same else {}


def family_named(hf: dict[str, Any], where: str = "config.json") -> Family:
    """Return the row that a config.json names; UserError with the nearest if there is none."""
    kind = hf.get("model_type")
    if kind == HANDMADE.model_type and "handmade" in hf:
        return HANDMADE
    if not isinstance(kind, str) or kind not in FAMILIES:
        among = WRAPPERS if "text_config" in hf else [*FAMILIES, *WRAPPERS]
        near = difflib.get_close_matches(str(kind)[:40], among, n=3)
        hint = f"families/ has those that are, {' and '.join(WRAPPERS)} with a text_config"
        if near:
            hint += f"; the nearest: {', '.join(near)}"
        raise UserError(f"{where}: models of model_type {str(kind)[:40]!r} are not supported; "
                        f"{hint}")
    return FAMILIES[kind]


def model_config_from_hf(hf: dict[str, Any], where: str = "config.json") -> ModelConfig:
    """ModelConfig of a config.json, ours or transformers', given as a dictionary."""
    kind = hf.get("model_type")
    own = hf.get("handmade")
    if own is not None:
        if not isinstance(own, dict):
            raise UserError(f"{where}: its section \"handmade\" is not an object: delete it")
        own = checked(dict(own), where)
        if kind == HANDMADE.model_type:
            check_keys(hf, (), kind, where)
            return own
    family = family_named(hf, where)
    theirs = from_family(hf, family, where)
    if own is not None and padding(own, family) is not None:
        # transformers carries our section along when it saves a model that it has changed, say
        # with more tokens: then the section is stale, and the other fields count
        # compared in the family's words, where biases of zero count as biases
        same = from_family(to_family(own, family), family)
        if effective(same) == effective(theirs):
            return own
    return theirs

# ----------------------------------------------------------------------- names and shapes


class Slot(NamedTuple):
    """A tensor on disk: our parameters joined along dimension 0, and perhaps turned."""
    parts: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    transpose: bool = False
    expert: int | None = None       # of a stacked parameter (experts, …), that one alone
    heads: int = 0                  # rows of each head are rotary pairs (2i, 2i + 1) on disk

    @property
    def shape(self) -> tuple[int, ...]:
        joined = (sum(s[0] for s in self.shapes), *self.shapes[0][1:])
        return joined[::-1] if self.transpose else joined

    @property
    def plain(self) -> bool:
        """Whether the bytes on disk are those of one parameter in memory."""
        return len(self.parts) == 1 and not self.transpose and not self.heads

    def to_disk(self, parts: list[Tensor]) -> Tensor:
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        if self.heads:              # (H, 2, D/2, …) -> (H, D/2, 2, …): halves to neighbours
            rows = tensor.view(self.heads, 2, -1, *tensor.shape[1:])
            tensor = rows.transpose(1, 2).reshape(tensor.shape)
        return tensor.T if self.transpose else tensor

    def from_disk(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Return the tensor of each of `parts`."""
        if self.heads:              # and back
            rows = tensor.view(self.heads, -1, 2, *tensor.shape[1:])
            tensor = rows.transpose(1, 2).reshape(tensor.shape)
        return (tensor.T if self.transpose else tensor).split([s[0] for s in self.shapes])


def layout(config: ModelConfig, family: Family) -> dict[str, Slot]:
    """Name on disk -> Slot, for every tensor of the family's checkpoint of this shape."""
    with torch.device("meta"):                          # shapes without memory
        shapes = {n: tuple(p.shape) for n, p in Transformer(config).named_parameters()}
    slots: dict[str, Slot] = {}

    def stacked(stem: str, name: str) -> None:          # in memory; on disk a tensor an expert
        experts, *shape = shapes.pop(name)
        slots.update({f"{stem.format(e=e)}.weight": Slot((name,), (tuple(shape),), expert=e)
                      for e in range(experts)})

    for stem, modules in family.keys.items():
        for i in range(config.n_layer if "{i}" in stem else 1):
            ours = [m.format(i=i) for m in modules]
            theirs = stem.replace("{i}", str(i))
            if ours[0] in shapes and "{e}" in stem:
                stacked(theirs, ours[0])
            elif ours[0] in shapes:                     # a tensor with a name of its own
                slots[theirs] = Slot((ours[0],), (shapes.pop(ours[0]),))
            for kind in ("weight", "bias", "e_score_correction_bias"):
                parts = tuple(f"{m}.{kind}" for m in ours)
                if parts[0] in shapes:
                    turned = kind == "weight" and stem.endswith(family.transposed)
                    pairs = stem.endswith(family.neighbours) and shapes[parts[0]][0]
                    slots[f"{theirs}.{kind}"] = Slot(
                        parts, tuple(shapes.pop(p) for p in parts), turned,
                        heads=pairs // config.head_dim)
    # the rest is spelt on disk as here
    for name in list(shapes):
        if ".mlp.experts." in name:
            stacked(name.replace(".experts.", ".experts.{e}."), name)
    slots.update({name: Slot((name,), (shape,)) for name, shape in shapes.items()})
    return slots


def disk_form(config: ModelConfig, family: Family) -> ModelConfig:
    """Return the model that lies on disk: `config`, with the family's biases of zero."""
    if family is HANDMADE:
        return config
    return from_family(to_family(config, family), family)


if __name__ == "__main__":
    refuse_to_run()
