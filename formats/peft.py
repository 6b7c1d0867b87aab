"""Adapters on disk, in PEFT's layout: adapter_config.json and adapter_model.safetensors.

    save_adapter("mine", model)                 # peft opens it
    load_adapter("mine", model, "mine")         # ours or PEFT's, checked before the model changes

base.json beside them, which PEFT ignores, keeps the fingerprint of the frozen model: a path says
little, since another run may have taken it. Merged weights give the adapter's logits to 1e-5 in
float32, and gradients are peft's (tests/test_lora.py).
"""
from __future__ import annotations

import math
import os
import re
import reprlib
import sys
import tempfile
from pathlib import Path
from typing import Any, Callable, Iterable, Sequence

from config import UserError, refuse_to_run

import torch
from torch import Tensor

import kernels
from families import FAMILIES
from families.base import Family
from formats import run_folder
from formats.atomic import sync, write_json
from formats.huggingface import Slot, disk_form, family_of, layout, padding
from formats.run_folder import find_model, is_checkpoint, resolve
from formats.safetensors import DTYPES, Stored, read, read_header, read_json, write_safetensors
from layers.lora import (Adapter, LoraLinear, attach, check_model, convert,
                         disable_adapters, find_linears, get_adapter, matches)
from layers.unwrap import unwrap
from model import Linear, Transformer

PREFIX = "base_model.model."        # PEFT's wrappers, which stand in front of every name
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
BASE = "base.json"      # the fingerprint of the base, beside PEFT's files, which PEFT leaves alone
FOLDER = "adapter"      # in a checkpoint: beside the merged weights transformers would add it twice
KINDS = {"lora_A.weight": "A", "lora_B.weight": "B", "lora_magnitude_vector": "magnitude"}


def map_layers(model: Transformer, family: Family) -> dict[str, Slot]:
    """Return the name of each linear in the family's naming scheme -> our layers that it consists
    of."""
    known = find_linears(model).keys()
    slots = {}
    for name, slot in layout(disk_form(model.config, family), family).items():
        parts = tuple(p.removesuffix(".weight") for p in slot.parts)
        if name.endswith(".weight") and slot.expert is None and known >= set(parts):
            # A and B are never transposed, as a weight of GPT-2's is
            slots[name.removesuffix(".weight")] = slot._replace(parts=parts, transpose=False)
    return slots


def check_ranks(model: Transformer, name: str = "default") -> None:
    """Raise UserError where an adapter cannot be saved: what is one matrix in the family's files
    (GPT-2's c_attn) needs one rank."""
    ranks = {part: len(adapter.A) for part, adapter in get_adapter(model, name).items()}
    for key, slot in map_layers(model, family_of(model.config)).items():
        if len({ranks[part] for part in slot.parts if part in ranks}) > 1:
            raise UserError(f"{key} is one matrix on disk: give the targets that it is made of one "
                            "rank")


def shortest(name: str, others: set[str]) -> str:
    """Return the shortest end of a module's name that means none of the others."""
    words = name.split(".")
    ends = (".".join(words[i:]) for i in range(len(words) - 1, -1, -1))
    return next(end for end in ends if not any(matches(other, end) for other in others))


def join(slot: Slot, parts: list[Adapter | None], model: Transformer) -> tuple:
    """Return (A, B, magnitude, alpha) of one linear on disk from the adapters of its parts here.

    Where q, k and v are one matrix there (GPT-2's c_attn; GLM's gate_up_proj), PEFT has one A for
    all. If ours are alike they are that A; otherwise they stand one above the other, with B in
    blocks on the diagonal: the same change, with n times the rank. A part without is zeros.
    """
    first = next(a for a in parts if a is not None)
    same = all(a is not None and torch.equal(a.A, first.A) for a in parts)
    rank = len(first.A)
    n = 1 if same else len(parts)
    A = first.A if same else torch.cat([
        torch.zeros_like(first.A) if a is None else a.A for a in parts])
    Bs = [first.B.new_zeros(shape[0], len(A)) for shape in slot.shapes]
    for i, (a, B) in enumerate(zip(parts, Bs)):
        if a is not None:
            B[:, rank * (i % n):rank * (i % n + 1)] = a.B
    lengths = None
    if first.magnitude is not None:             # without an adapter a row is as long as it is
        with disable_adapters(model):
            lengths = slot.to_disk([
                kernels.widen(find_linears(model)[part].merged_weight()).norm(dim=1)
                if a is None else a.magnitude
                for part, a in zip(slot.parts, parts)])
    # s = alpha / rank is to stay what it was
    alpha = first.alpha * (math.sqrt(n) if first.rslora else n)
    return A, slot.to_disk(Bs), lengths, alpha


@torch.no_grad()
def save_adapter(path: str | Path, model: Any, name: str = "default", base: str = "",
                 fingerprint: str = "") -> Path:
    """Write an adapter as the folder `path`, in PEFT's layout and the words of the family that
    save_model() would choose. base: where the frozen model lies, for who opens it; fingerprint:
    of that folder, where it is known already.

    Both files are complete elsewhere before either takes its name. Of an MoE, PEFT (0.21) opens
    adapters of attention alone: it takes a name such as mlp.up_proj for all of its experts."""
    model = unwrap(model)
    path = Path(path)
    parts = get_adapter(model, name)
    if not parts:
        raise UserError(f"there is no adapter {reprlib.repr(name)} to save: add_lora() makes one")
    family = family_of(model.config)
    tensors = {}
    ranks = {}
    alphas = {}
    known = map_layers(model, family)
    one = next(iter(parts.values()))
    for key, slot in known.items():
        own = [parts.get(part) for part in slot.parts]
        if any(own):
            *three, alphas[key] = join(slot, own, model)
            tensors.update({f"{PREFIX}{key}.{word}": t for word, t in zip(KINDS, three)
                            if t is not None})
            ranks[key] = len(three[0])
    # those that are one with others on disk are exceptions by name
    rank = len(one.A)
    alpha = one.alpha
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base or None,
        "r": rank, "lora_alpha": alpha, "lora_dropout": one.dropout, "use_rslora": one.rslora,
        "use_dora": one.magnitude is not None, "bias": "none", "inference_mode": True,
        "init_lora_weights": True, "fan_in_fan_out": family.model_type == "gpt2",
        "target_modules": sorted({shortest(k, known.keys() - ranks.keys()) for k in ranks}),
        "rank_pattern": {k: r for k, r in ranks.items() if r != rank},
        "alpha_pattern": {k: a for k, a in alphas.items() if a != alpha}}
    specs = [(key, t.dtype, tuple(t.shape)) for key, t in tensors.items()]
    if not fingerprint and base and is_checkpoint(Path(base)):
        fingerprint = run_folder.fingerprint(Path(base))
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path) as aside:
            new = Path(aside)
            files = [new / WEIGHTS, new / CONFIG]
            write_safetensors(new / WEIGHTS, specs, tensors.__getitem__)
            write_json(new / CONFIG, settings)
            (path / BASE).unlink(missing_ok=True)       # of an adapter that was here before
            if fingerprint:
                files.append(new / BASE)
                same_drive = Path(base).anchor in ("", path.absolute().anchor)      # of Windows
                write_json(new / BASE, {
                    "fingerprint": fingerprint, "folder": os.path.abspath(base),
                    "relative": os.path.relpath(base, path) if same_drive else base})
            for step in (sync, lambda file: os.replace(file, path / file.name)):
                for file in files:
                    step(file)
    except OSError as e:
        raise UserError(f"cannot save the adapter {path}: {e.strerror}; free some space or choose "
                        "another folder") from e
    return path


# Settings of PEFT's that change the maths in a way that is not here: what they may be
PLAIN = {"peft_type": ("LORA",), "bias": ("none",), **dict.fromkeys((
    "modules_to_save", "lora_bias", "layer_replication", "use_qalora", "alora_invocation_tokens",
    "target_parameters", "trainable_token_indices", "megatron_config", "use_bdlora",
    "arrow_config", "kasa_config", "monteclora_config", "velora_config"), ()),
    # PiSSA, OLoRA and others move the base as well when they start
    "init_lora_weights": (True, "gaussian", "orthogonal", "eva")}


def read_adapter_config(file: Path) -> dict[str, Any]:
    """PEFT's settings, each one that is used checked; UserError for what is not supported."""
    said = read_json(file)
    settings = {}
    for key, allowed in PLAIN.items():          # False, null, [] and {} all mean no
        value = said.get(key)
        if value not in allowed and (value or key == "peft_type"):
            raise UserError(f"{file}: {key} = {reprlib.repr(value)} is not supported here, only "
                            f"{' or '.join(map(repr, allowed or (None,)))}")

    def number(low: float, high: float, *kinds: type) -> Callable[[Any], bool]:
        return lambda v: type(v) in kinds and low <= v < high

    def by_name(good: Callable[[Any], bool]) -> Callable[[Any], bool]:
        # PEFT reads the keys as regular expressions: only plain names are taken here
        return lambda v: isinstance(v, dict) and all(
            re.fullmatch(r"\^?[\w.-]+", key) and good(value) for key, value in v.items())

    rank = number(1, 2 ** 20, int)
    alpha = number(1e-9, 1e9, int, float)
    flag = number(0, 2, bool)
    # what PEFT takes where nothing is said, and what it may be
    table = {"r": (8, rank), "lora_alpha": (8, alpha), "use_rslora": (False, flag),
             "use_dora": (False, flag), "lora_dropout": (0.0, number(0, 1, int, float)),
             "rank_pattern": ({}, by_name(rank)), "alpha_pattern": ({}, by_name(alpha))}
    for key, (silent, good) in table.items():
        # null is no, but it is no number: PEFT fails there
        no = said.get(key) is None and (key not in said or not silent)
        settings[key] = silent if no else said[key]
        if not good(settings[key]):
            raise UserError(f"{file}: {reprlib.repr(settings[key])} cannot be an adapter's {key}")
    # to see whether a whole layer is missing, where that is said by name and without exceptions
    targets = said.get("target_modules")
    plain = isinstance(targets, list) and not any(
        said.get(key) not in (None, []) for key in ("layers_to_transform", "exclude_modules"))
    settings["targets"] = [t for t in targets if isinstance(t, str)] if plain else []
    settings["base"] = said.get("base_model_name_or_path")
    return settings


def pattern(found: dict[str, Any], name: str, otherwise: Any) -> Any:
    """Return the value of the first key that means the module `name`."""
    return next((v for k, v in found.items() if k == "^" + name or matches(name, k)), otherwise)


def sort_tensors(stored: dict[str, Stored], file: Path
                 ) -> tuple[dict[str, dict[str, Stored]], dict[str, Stored]]:
    """Return (name of a linear on disk -> {"A", "B", "magnitude"} -> where it lies; the same of
    frozen matrices, which PEFT saves with adapters on lm_head)."""
    modules: dict[str, dict[str, Stored]] = {}
    frozen: dict[str, Stored] = {}
    for key, s in stored.items():
        kind = next((k for k in KINDS if key.endswith("." + k)), None)
        plain = re.fullmatch(re.escape(PREFIX) + r"([\w.]*(?:lm_head|embed\w*|wte|output_layer))"
                             r"(\.base_layer)?\.weight", key)
        if plain:
            frozen[plain[1]] = s
        elif kind is None or not key.startswith(PREFIX):
            raise UserError(f"{file}: tensor {reprlib.repr(key)} is not one of a LoRA adapter's "
                            f"{', '.join(KINDS)}: it was made by another method")
        else:
            stem = key.removeprefix(PREFIX).removesuffix("." + kind)
            modules.setdefault(stem, {})[KINDS[kind]] = s
    if not modules:
        raise UserError(f"{file} has no adapter in it: copy or save it again")
    return modules, frozen


def check_frozen(frozen: dict[str, Stored], model: Transformer) -> None:
    """Raise UserError unless the frozen matrices that PEFT saved are those of the model."""
    for name, s in frozen.items():
        # an embedding, or the output matrix, which may be the embedding
        output = name.endswith(("lm_head", "output_layer"))
        layer = model.lm_head if output and not model.config.tie_word_embeddings else (
            model.model.embed_tokens)
        if getattr(layer, "int8_scale", None) is not None:
            continue                    # rounded for an adapter before this one: nothing to compare
        ours = layer.base if isinstance(layer, LoraLinear) else layer.weight
        same = s.shape == tuple(ours.shape) and s.dtype in DTYPES
        if same:
            # compared in the coarser of the two types: the file's, or the one it was loaded in
            kind = min(DTYPES[s.dtype], ours.dtype, key=lambda dtype: dtype.itemsize)
            same = torch.equal(read(s).to(kind), ours.detach().to("cpu", kind))
        if not same:
            raise UserError(f"{s.file} was made on a model whose {name} has other weights than "
                            "this one's, or another vocabulary: load it on its own base")


def untie(model: Transformer) -> None:
    """Give a model whose output matrix is its embedding one of its own, with the same weights:
    PEFT's adapter on lm_head changes what is read out and not what is read in."""
    weight = model.model.embed_tokens.weight
    with torch.device("meta"):
        model.lm_head = Linear(*reversed(weight.shape))
    model.lm_head.weight = torch.nn.Parameter(weight.detach().clone())
    model.lm_head.train(model.training)
    model.config.tie_word_embeddings = False


def find_layers(model: Transformer, modules: Iterable[str], file: Path) -> dict[str, Slot]:
    """Return map_layers() of the family that has all of `modules`: the one that save_model() would
    choose, or another that the model fits, as ChatGLM's."""
    output = model.config.tie_word_embeddings and "lm_head" in modules
    modules = [m for m in modules if m != "lm_head" or not output]
    own = family_of(model.config)
    for family in [own, *(f for f in FAMILIES.values() if padding(model.config, f) is not None)]:
        known = map_layers(model, family)
        if set(modules) <= known.keys():
            shape = tuple(model.output_weight.shape)
            return {**known, **({"lm_head": Slot(("lm_head",), (shape,))} if output else {})}
    known = map_layers(model, own)
    odd = next(m for m in modules if m not in known)
    raise UserError(f"{file}: {reprlib.repr(odd)} is none of the linears of this model's blocks, "
                    f"as {next(iter(known))}: the adapter belongs to another model")


def check_tensors(modules: dict, known: dict[str, Slot], settings: dict, file: Path) -> None:
    """Raise UserError where tensors, settings and model do not agree."""
    named = {n for n in known if matches(n, *settings["targets"])}
    for name in sorted(named | modules.keys()):
        found = modules.get(name, {})
        (outputs, inputs) = known[name].shape
        rank = pattern(settings["rank_pattern"], name, settings["r"])
        shapes = {"A": (rank, inputs), "B": (outputs, rank)}
        shapes.update({"magnitude": (outputs,)} if settings["use_dora"] else {})
        for word, kind in KINDS.items():
            s = found.get(kind)
            shape = shapes.get(kind)
            if s is None and shape:
                raise UserError(f"{file} lacks tensor '{PREFIX}{name}.{word}', which {CONFIG} asks "
                                "for: copy or save it again")
            if s and (s.shape != shape or s.dtype not in DTYPES):
                raise UserError(f"{file}: {word} of {name} is {s.dtype} {s.shape}; by {CONFIG} "
                                f"(rank {rank}) and the model it is {shape}: they belong to "
                                "different adapters or models")


@torch.no_grad()
def load_adapter(path: str | Path, model: Any, name: str = "default",
                 int8: bool = False) -> dict[str, LoraLinear]:
    """Put the adapter in the folder `path`, ours or PEFT's, on a model as `name` and make it the
    active one; returns its layers. Everything is checked before the model is touched."""
    model = check_model(model, name)
    path = Path(path)
    for file in (path / CONFIG, path / WEIGHTS):
        if not file.is_file():
            raise UserError(f"no adapter at {path}, which has no {file.name}: give the folder that "
                            "save_adapter() or PEFT wrote (in safetensors)")
    settings = read_adapter_config(path / CONFIG)
    modules, frozen = sort_tensors(read_header(file), file)
    tied = "lm_head" in modules and model.config.tie_word_embeddings
    known = find_layers(model, modules, file)
    check_tensors(modules, known, settings, file)
    check_frozen(frozen, model)
    if tied:
        untie(model)
    made = {}
    for key, stored in modules.items():
        tensors = {kind: read(s) for kind, s in stored.items()}
        slot = known[key]
        A = tensors["A"]
        Bs = slot.from_disk(tensors["B"])
        n = len(slot.parts)
        lengths = slot.from_disk(tensors["magnitude"]) if "magnitude" in tensors else [None] * n
        alpha = pattern(settings["alpha_pattern"], key, settings["lora_alpha"])
        As = [A] * n
        own = blocks(Bs) if n > 1 and len(A) == n * settings["r"] else None
        if own:         # what join() put one above the other: the same scale at the part's rank
            As = A.chunk(n)
            Bs = own
            alpha = round(alpha / (math.sqrt(n) if settings["use_rslora"] else n), 9)
        for part, A, B, length in zip(slot.parts, As, Bs, lengths):
            if own is None or A.any() or B.any():       # zeros: a part that has no adapter
                made[part] = Adapter(convert(model, part, int8).base, A, B, length, alpha,
                                     settings["lora_dropout"], settings["use_rslora"])
    return attach(model, made, name)


def blocks(Bs: Sequence[Tensor]) -> list[Tensor] | None:
    """Return the n blocks on the diagonal of B (N, n r), which is cut by rows; None if it has
    more."""
    cut = [B.chunk(len(Bs), 1) for B in Bs]
    more = any(c.any() for i, row in enumerate(cut) for k, c in enumerate(row) if i != k)
    return None if more else [row[i] for i, row in enumerate(cut)]


def read_base(folder: Path) -> dict[str, str]:
    """Read what an adapter's folder says of its base besides PEFT's path; {} if that is nothing."""
    file = folder / BASE
    if not file.is_file():
        return {}
    note = read_json(file)
    if not all(isinstance(note.get(key), str) for key in ("fingerprint", "folder", "relative")):
        raise UserError(f"{file} is damaged: delete it to use the adapter without comparing its "
                        "base")
    return note


def find_base(folders: Sequence[Path], given: str = "", flag: str = "--base",
            which: str = "best") -> Path:
    """Return the directory of the frozen model that the adapters in `folders` belong to.

    Its path says little: another run may have taken it. Our adapters keep the base's fingerprint,
    by which it is looked for where it was, beside the adapter as it was then, and among the runs
    that were moved aside. given: the user's answer, by `flag`, which has to be that model as well.
    PEFT's adapters have a path alone, which is believed.
    """
    notes = {folder: note for folder in folders if (note := read_base(folder))}
    if len({note["fingerprint"] for note in notes.values()}) > 1:
        raise UserError(f"{' and '.join(map(str, notes))} were trained on different models, so "
                        "that they cannot be added up: use one of them")
    first = next(iter(notes), folders[0])
    recorded = read_adapter_config(first / CONFIG)["base"]
    if given:
        directory = resolve(given, which)
        if notes and run_folder.fingerprint(directory) != notes[first]["fingerprint"]:
            raise UserError(f"{directory} is not the model that {first} was trained on, to which "
                            f"it belongs: that was {notes[first]['folder']} with other weights or "
                            f"another config.json; name it with {flag}=DIR")
        return directory
    if not notes:
        if not isinstance(recorded, str) or not Path(recorded).is_dir():
            raise UserError(f"the base of {first} is {reprlib.repr(recorded)}, which is no folder "
                            f"here: say where it lies with {flag}=DIR")
        return resolve(recorded, which)
    note = notes[first]
    nearby = [first / note["relative"], *([recorded] if isinstance(recorded, str) else [])]
    found = find_model(note["folder"], note["fingerprint"], *nearby)
    if found is None:
        raise UserError(f"the base of {first} was {note['folder']}, and neither there nor in a run "
                        "that was moved aside from there (.oldN) is a model with the weights that "
                        f"it was trained on: say where it lies with {flag}=DIR")
    if str(found) != note["folder"]:
        print(f"the base of {first} is now {found}", file=sys.stderr)
    return found


if __name__ == "__main__":
    refuse_to_run()
