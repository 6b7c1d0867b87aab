"""Weights in, weights out: a checkpoint is a directory that Hugging Face transformers opens.

    from checkpoint import load_model, load_tokenizer, save_model
    model, tokenizer = load_model("out"), load_tokenizer("out")     # ours or Hugging Face's
    save_model("mine", model, tokenizer)                            # config.json, weights, …

    python checkpoint.py out                                        # what is in it, on any device
    python checkpoint.py convert IN OUT --dtype=bfloat16            # to another type or layout

A directory holds config.json (the shape), model.safetensors (the weights, in shards where they
are large), tokenizer.json, generation_config.json and, to resume, trainer.pt. Read as well: Llama
as Meta publishes it, ChatGLM and MiniCPM as they were published. What to expect: the logits that
transformers computes from it differ from ours by a relative 1e-5 at most in float32.

Two ideas. Everything in a directory is compared with everything else before memory is taken for
it: config.json says which tensors there have to be, and nothing is missing, left over or random.
Replacement: a directory is written beside its name and then renamed, so that a crash, a full disk
or a kill leaves the old checkpoint or the new one, never half of one. The bytes of the tensors are
weights.py, how the published architectures spell settings and parameters is families.py.
"""
from __future__ import annotations

import config  # noqa: F401  first, so that what fails while importing is a sentence
import hashlib
import math
import os
import re
import shutil
import sys
import zipfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Callable, NamedTuple, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from config import Idle, UserError, refuse_idle, run
from families import HANDMADE, LAYOUTS
from families.base import Family
from formats import atomic
from formats.atomic import name_aside, sync, write_json
from formats.match import match, count_tensors
from formats.run_folder import is_checkpoint, resolve
from formats.wrapped import take_text_tensors, unwrap_settings
from layers.basic import Linear
from layers.unwrap import unwrap
from model import ModelConfig, Transformer, print_costs
from training.machine import pick_device
from text import tokenizer_files
from tokenizer import load
from formats.huggingface import (Slot, differences, disk_form, family_named,
                                 find_other_keys, hf_config, layout, model_config_from_hf,
                                 readable_family, to_family)
from formats.safetensors import (DTYPE_NAMES, DTYPES, Stored, is_equal, note, read,
                                 read_json, shorten, weight_index, write_safetensors)

# the family of a params.json, which names none
PARAMS_FAMILY = next(row for row in LAYOUTS.values() if row.params_keys)
SHARD_BYTES = 5 * 10 ** 9           # a file of weights is no larger, unless one tensor is
TYPES = {str(t).removeprefix("torch."): t for t in DTYPE_NAMES}     # as --dtype says them

# The files that saving replaces or, where the new model has none, removes
OURS = re.compile(r"(config|generation_config|tokenizer\w*|special_tokens_map|added_tokens|vocab"
                  r"|params)\.json|(pytorch_)?model.*\.(safetensors|bin|json)|trainer\.pt"
                  r"|merges\.txt|chat_template\.\w+|additional_chat_templates|vocab\.bpe"
                  r"|consolidated.*\.(pth|safetensors)"
                  r"|adapter")                  # lora.py's folder


# -------------------------------------------------------------------------------- saving


def save_model(path: str | Path, model: Any, tokenizer: Any = None, *,
               extra: dict[str, bytes | str] | None = None,
               shard_bytes: int = SHARD_BYTES) -> Path:
    """Save weights, shape and tokenizer as the directory `path`, replacing one of that name.

    `extra` are further files, name -> content. The weights keep the dtype of the parameters.
    UserError if the folder cannot be written or the disk is full; what was there stays whole.
    """
    return save_checkpoint(path, model, tokenizer, None, extra=extra, shard_bytes=shard_bytes)


def save_checkpoint(path: str | Path, model: Any, tokenizer: Any, trainer: dict | None, *,
                    extra: dict[str, bytes | str] | None = None,
                    writers: Sequence[Callable[[Path], None]] = (),
                    shard_bytes: int = SHARD_BYTES) -> Path:
    """Save a model as save_model() does, with `trainer` (tensors and plain values: what resuming
    needs) as trainer.pt. writers: each is called with the new folder, to add files of its own."""
    def fill(directory: Path) -> None:
        model_ = unwrap(model)
        # what a LoRA layer holds as halves is saved as what it amounts to, float32
        amounts = {f"{n}.weight": torch.float32 for n, m in model_.named_modules()
                   if getattr(m, "merged_dtype", None)}
        dtypes = {n: amounts.get(n, p.dtype if p.is_floating_point() else torch.float32)
                  for n, p in model_.named_parameters()}

        def get(name: str, expert: int | None) -> Tensor:
            owner, _, last = name.rpartition(".")
            module = model_.get_submodule(owner)
            linear = isinstance(module, Linear) and last == "weight"
            p = (module.merged_weight() if linear else getattr(module, last)).detach()
            return (p if expert is None else p[expert]).to("cpu")
        write_model(directory, model_.config, dtypes, get, tokenizer, shard_bytes)
        for write in writers:
            write(directory)
        for name, content in (extra or {}).items():
            # a name, not a path: nothing is written outside the new directory
            data = content.encode() if isinstance(content, str) else content
            (directory / Path(name).name).write_bytes(data)
        if trainer is not None:
            with open(directory / "trainer.pt", "wb") as f:
                torch.save(trainer, f)
    return replace_directory(Path(os.path.realpath(path)), fill)


def list_params(config: ModelConfig, family: Family) -> dict[str, Any]:
    """Return the content of params.json: its authors' program stops at a key it does not know.

    head_dim and sliding_window, which a twin of that program reads, are written where needed.
    """
    extra = {"head_dim": config.head_dim * config.n_head != config.n_embd,
             "sliding_window": config.sliding_window > 0}
    return {key: value for key, value in to_family(config, family).items()
            if key in family.params_keys or extra.get(key)}


def write_model(directory: Path, config: ModelConfig, dtypes: dict[str, torch.dtype],
                get: Callable[[str, int | None], Tensor], tokenizer: Any, shard_bytes: int,
                family: Family | None = None, source: dict[str, Any] | None = None) -> None:
    """Write everything but the trainer's state into an empty directory.

    dtypes: of every parameter by its name here; get(name, expert) makes one of them, or the share
    of one expert. source: of what is converted the config.json, whose numbers of control tokens
    and further keys are kept; then generation_config.json is known as well.
    """
    family, said = (family, "") if family else readable_family(config, tokenizer)
    if said:
        note(said)
    if family is HANDMADE:
        note("no published architecture has this combination of settings, so the checkpoint "
             "opens in this project only")
    # names and shapes on disk, and where each tensor comes from
    slots = layout(disk_form(config, family), family)
    main = dtypes["model.embed_tokens.weight"]

    def make(name: str) -> Tensor:
        # a bias that the family has and the model has not is zero
        slot = slots[name]
        return slot.to_disk([get(p, slot.expert) if p in dtypes else torch.zeros(shape, dtype=main)
                             for p, shape in zip(slot.parts, slot.shapes)])

    specs = [(name, dtypes.get(slot.parts[0], main), slot.shape) for name, slot in slots.items()]
    if family.params_keys:
        # one file, for which torch wants all of its tensors at once
        tensors = {name: make(name).to(dtype).contiguous().clone() for name, dtype, _ in specs}
        # its program and torchtune ask for it of a tied model, too: one storage, two names
        output = f"{family.find_stem('lm_head')}.weight"
        embedding = f"{family.find_stem('model.embed_tokens')}.weight"
        tensors.setdefault(output, tensors[embedding])
        torch.save(tensors, directory / "consolidated.00.pth")
        write_json(directory / "params.json", list_params(config, family))
        if tokenizer is not None:
            tokenizer.save(directory)
        return
    shards: list[list] = [[]]
    sizes = [0]
    for spec in specs:                                  # greedily, in the order of the layers
        size = math.prod(spec[2]) * spec[1].itemsize
        if shards[-1] and sizes[-1] + size > shard_bytes:
            shards.append([])
            sizes.append(0)
        shards[-1].append(spec)
        sizes[-1] += size
    # one file where it fits; otherwise shards and an index that says what is where
    if len(shards) == 1:
        write_safetensors(directory / "model.safetensors", specs, make)
    else:
        places = {}
        for i, shard in enumerate(shards, 1):
            file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            write_safetensors(directory / file, shard, make)
            places.update({name: file for name, _, _ in shard})
        write_json(directory / "model.safetensors.index.json",
                   {"metadata": {"total_size": sum(sizes)}, "weight_map": places})
    # transformers 5 loads in the type that is named here, not in float32
    given = {key: source[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")
             if isinstance(source.get(key), (int, list))} if source else {}
    settings = {**hf_config(config, tokenizer, family), **given}
    settings["dtype"] = str(main).removeprefix("torch.")
    settings.update(find_other_keys(source or {}, settings))
    write_json(directory / "config.json", settings)
    # generate() of transformers looks for the end token in this file first
    write_json(directory / "generation_config.json", tokenizer_files.build_generation_config(
        None if given else tokenizer, settings))
    if tokenizer is not None:
        tokenizer.save(directory)


def replace_directory(path: Path, fill: Callable[[Path], None]) -> Path:
    """Make `path` the directory that fill() writes, or leave it as it was.

    The new one is built under another name on the same disk, synced, and renamed. Two renames are
    not one: killed between them, the old directory is found under its name aside (see resolve).
    """
    new = path.with_name(f".{path.name}.new")
    old = name_aside(path)
    lock = None
    try:
        new.mkdir(parents=True, exist_ok=True)
        lock = atomic.try_lock(new)                     # it ends with the process
        if lock is None:
            raise UserError(f"another process writes {path}: wait, or choose another folder")
        if old.is_dir() and not path.exists():
            os.rename(old, path)                        # an earlier save was killed in between
        for leftover in (*new.iterdir(), old):
            atomic.remove(leftover)
        kept = other_files(path)                        # refuses before anything is written
        fill(new)
        for file in kept:                               # a README beside the weights, say
            if not (new / file.name).exists():
                shutil.copy2(file, new)
        # content before names: after a power cut a renamed file could be empty otherwise
        for file in new.iterdir():
            sync(file)
        sync(new)
        if path.exists():
            os.rename(path, old)
        os.rename(new, path)
        sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException as e:
        if lock:
            shutil.rmtree(new, ignore_errors=True)      # gives a full disk its space back
        if lock and old.is_dir() and not path.exists():
            os.rename(old, path)
        # torch.save answers a failed write with a RuntimeError of its own, raised over the cause
        cause = e.__context__ if isinstance(e, RuntimeError) else e
        if isinstance(cause, OSError):
            raise UserError(f"cannot save {path}: {cause.strerror}; free some space or choose "
                            "another folder (what was saved before is untouched)") from e
        raise
    finally:
        if lock:
            lock.release()
    return path


def other_files(path: Path) -> list[Path]:
    """Return files of an existing checkpoint that saving does not write: they are kept.

    UserError if it is no checkpoint, or has folders: replacing it would delete other work.
    """
    if not path.exists():
        return []
    entries = list(path.iterdir()) if path.is_dir() else [path]
    folders = [e.name for e in entries if e.is_dir() and not OURS.fullmatch(e.name)]
    if folders or entries and not is_checkpoint(path):
        what = f"holds the folder {folders[0]}" if folders else "is not a checkpoint"
        raise UserError(f"{path} {what}, and saving would replace all of it: choose another folder")
    return [entry for entry in entries if not OURS.fullmatch(entry.name)]

# ------------------------------------------------------------------------------- loading


def digest(*parts: Any) -> str:
    """16 hexadecimal digits: equal for equal files (given as a Path), arrays, and values."""
    found = hashlib.blake2b(digest_size=8)
    for part in parts:
        if isinstance(part, Path):
            with part.open("rb") as f:
                while block := f.read(1 << 24):
                    found.update(block)
        elif hasattr(part, "tobytes"):
            # with its type and shape, or two arrays could be one that was cut elsewhere
            found.update(repr((part.dtype, part.shape)).encode() + part.tobytes())
        else:
            found.update(repr(part).encode())
    return found.hexdigest()


def read_settings(directory: Path) -> tuple[dict[str, Any], str]:
    """Return (content of config.json, or of Meta's params.json as a family of that name; its
    file)."""
    file = directory / "config.json"
    if file.is_file():
        return read_json(file), str(file)
    file = directory / "params.json"
    hf = read_json(file)
    if hf.get("model_type") not in (None, "transformer"):       # Mistral's files say it
        raise UserError(f"{file}: model_type = {shorten(hf['model_type'])} is not supported, only "
                        "'transformer'")
    return {**hf, "model_type": PARAMS_FAMILY.model_type}, str(file)


def complete(hf: dict[str, Any], stored: dict[str, Stored], family: Family) -> dict[str, Any]:
    """Return the settings with what they leave to the weights: whether the output matrix is the
    embedding, where that is null; of Meta's files a vocabulary of -1 and the width of the MLP."""
    settings = dict(hf)
    for key, name in family.sizes.items():
        if hf.get(key) in (-1, None) and name in stored:
            settings[key] = (stored[name].shape or (0,))[0]
    # params.json has no key for it: there silence leaves it to the weights as null does
    in_params = bool(family.params_keys)
    tie = "tied_embeddings" if in_params else "tie_word_embeddings"
    if hf.get(tie, None if in_params else True) is None:
        # Llama 3.2's small models are tied, and their files hold the matrix twice
        stems = ("lm_head", "model.embed_tokens")
        if in_params:
            stems = tuple(map(family.find_stem, stems))
        output = stored.get(f"{stems[0]}.weight")
        embedding = stored.get(f"{stems[1]}.weight")
        settings[tie] = output is None or embedding is None or is_equal(output, embedding)
    return settings


def read_config(path: str | Path, which: str = "best") -> ModelConfig:
    """Return the shape of a checkpoint's model."""
    return open_checkpoint(path, which).config


def load_tokenizer(path: str | Path, which: str = "best") -> Any:
    """Return the tokenizer that lies with a checkpoint."""
    return load(str(resolve(path, which)))


def load_trainer(path: str | Path, which: str = "last") -> dict[str, Any]:
    """Return the trainer's state that save_checkpoint was given, on the CPU."""
    file = resolve(path, which) / "trainer.pt"
    if not file.is_file():
        raise UserError(f"{file.parent} has no trainer.pt, so it cannot be resumed: start a new "
                        f"run from its weights with --init_from={file.parent}")
    try:
        with zipfile.ZipFile(file) as archive:      # torch does not look at the checksums
            if archive.testzip():
                raise ValueError("a wrong checksum")
        # weights_only: tensors and plain values; a pickle that would run code is refused
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as e:                  # whatever a damaged pickle may raise; torch's text
        # would advise to switch the protection off, so only the kind of error is told
        raise UserError(f"{file} is damaged or not a trainer's state ({type(e).__name__}): "
                        "resume from another checkpoint") from e
    if not isinstance(state, dict):
        raise UserError(f"{file} is not a trainer's state: resume from another checkpoint")
    return state


class Opened(NamedTuple):
    """A checkpoint whose parts agree with each other, and of which nothing has been read yet."""
    directory: Path
    hf: dict[str, Any]                          # config.json
    config: ModelConfig
    family: Family
    found: list[tuple[Slot, Stored]]            # every tensor of the family and its place


def open_checkpoint(path: str | Path, which: str = "best") -> Opened:
    """Compare config.json with the weights; UserError names the tensor that is wrong."""
    directory = resolve(path, which)
    hf, file = read_settings(directory)
    hf, wrapped = unwrap_settings(hf, file)
    family = family_named(hf, file)             # before the rest is looked for
    stored = weight_index(directory)
    if wrapped:
        stored = take_text_tensors(stored, directory)
    hf = complete(hf, stored, family)
    config = model_config_from_hf(hf, file)
    # and do not build a billion layers first
    moe_layers = sum(map(config.is_moe, range(config.n_layer)))
    if max(config.n_layer, moe_layers * config.num_experts) > count_tensors(stored):
        raise UserError(f"{file} has {config.n_layer} layers and {config.num_experts} experts, the "
                        f"weights only {len(stored)} tensors: they belong to different models")
    # GLM-4.5 and others come with one layer more, which predicts the token after next
    more = hf.get("num_nextn_predict_layers") or 0
    more = range(config.n_layer, config.n_layer + more) if type(more) is int else ()
    on_disk = disk_form(config, family)
    found = match(layout(on_disk, family), stored, family, directory, more)
    # A bias that we saved as zero may have been trained since, elsewhere: then it is the model's
    with torch.device("meta"):
        wanted = {name for name, _ in Transformer(config).named_parameters()}
    if any(not set(slot.parts) <= wanted and read(s).any() for slot, s in found):
        config = replace(on_disk, dropout=config.dropout)
    return Opened(directory, hf, config, family, found)


def type_of(dtype: str) -> torch.dtype | None:
    """Return the type that --dtype names, None for auto."""
    if dtype not in ("auto", *TYPES):
        raise UserError(f"unknown --dtype={dtype}; choose from auto, {', '.join(TYPES)}")
    return TYPES.get(dtype)


def kept(name: str, dtype: torch.dtype) -> torch.dtype:
    """Return `dtype`, or float32 of what bfloat16 would round away: steps of a router's
    correction."""
    return torch.float32 if name.endswith("e_score_correction_bias") else dtype


def load_model(path: str | Path, device: str = "auto", dtype: str = "auto",
               which: str = "best") -> Transformer:
    """Return the model of a checkpoint, in eval mode; dtype auto keeps that of the file.

    Everything is checked before anything is read; then one tensor at a time moves from the file
    to its place. UserError names the file and the tensor that is wrong.
    """
    opened = open_checkpoint(path, which)
    target = type_of(dtype)
    # where a file mixes types (norms in float32, say) the embedding's is the model's
    main = next(s.dtype for slot, s in opened.found if slot.parts == ("model.embed_tokens.weight",))
    with torch.device("meta"):
        model = Transformer(opened.config).eval()
    place = pick_device(device)
    # not to_empty(), which imports half a second of PyTorch that nothing else here needs
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            memory = torch.empty(p.shape, dtype=kept(name, target or DTYPES[main]), device=place)
            setattr(module, name, Parameter(memory, p.requires_grad))
    params = dict(model.named_parameters())
    with torch.no_grad():
        for slot, s in opened.found:
            places = [params[part] if slot.expert is None else params[part][slot.expert]
                      for part in slot.parts if part in params]
            # straight to its place, where that has the file's type; copy_ casts and moves
            values = read(s, places[0] if slot.plain and places else None)
            for place, value in zip(places, slot.from_disk(values)):
                if value.data_ptr() != place.data_ptr():
                    place.copy_(value)
    return model

# ---------------------------------------------------------------------------- converting


def convert(source: str, target: str, dtype: str = "auto", form: str = "hf",
            shard_gb: float = 5.0, which: str = "best") -> Path:
    """Write the checkpoint `source` as `target`, one tensor in memory at a time.

    dtype auto keeps the type of every tensor. form: hf, or the files as their authors published
    them: a name in LAYOUTS (params.json beside one .pth file, all tensors in memory at once; ...).
    """
    opened = open_checkpoint(source, which)
    wanted = type_of(dtype)
    config = opened.config
    family = None
    if form != "hf" and form not in LAYOUTS:
        raise UserError(f"unknown --layout={form}; choose from hf, {', '.join(LAYOUTS)}")
    if not 0 < shard_gb < math.inf:
        raise UserError(f"--shard_gb={shard_gb} is no size: give gigabytes, as in --shard_gb=5")
    if form != "hf":
        family = LAYOUTS[form]
        # the context and the initialisation are no part of the maths, nor of these files
        lost = sorted(differences(config, family) - {"block_size", "init_std"})
        if lost:
            raise UserError(f"{source} cannot be written in the layout {form}, which has no "
                            f"word for its {', '.join(lost)}: use --layout=hf")
    # our parameter, or an expert's share of it -> where it lies
    places = {(part, slot.expert): (slot, s, k) for slot, s in opened.found
              for k, part in enumerate(slot.parts)}
    dtypes = {part: kept(part, wanted or DTYPES[s.dtype])
              for (part, _), (_, s, _) in places.items()}

    def get(part: str, expert: int | None) -> Tensor:
        slot, s, k = places[part, expert]
        return slot.from_disk(read(s))[k]

    tokenizer = None
    copied = tokenizer_files.list_files(opened.directory)
    try:
        if copied or any(tokenizer_files.find(opened.directory)):
            tokenizer = load_tokenizer(opened.directory)
    except UserError as e:
        note(f"the tokenizer is copied as it is ({e})")
    # nothing of it changes; but one in another form than tokenizer.json is written in that form
    if tokenizer is not None and not any(f.name == "tokenizer.json" for f in copied):
        copied = []
    generation = opened.directory / "generation_config.json"
    copied += [generation] if generation.is_file() and not (family and family.params_keys) else []

    def fill(directory: Path) -> None:
        write_model(directory, config, dtypes, get, tokenizer, int(shard_gb * 1e9), family,
                    opened.hf)
        tokenizer_files.copy_files(copied, directory)
    return replace_directory(Path(os.path.realpath(target)), fill)

# ---------------------------------------------------------------------------- the script


@dataclass
class Config:
    words: list[str] = field(default_factory=list)      # DIR, or: convert IN OUT
    model: str = "out"          # a checkpoint's directory, or the out_dir of a training run
    which: str = "best"         # of a training run: best or last
    costs: bool = False         # print what the model costs instead: parameters, FLOPs, memory
    block_size: int = 0         # with --costs: context to count FLOPs at; 0: the model's
    # --- of convert
    dtype: str = "auto"         # float32, bfloat16, float16; auto: as it is
    layout: str = "hf"          # hf (Hugging Face), or the authors' own: see families/
    shard_gb: float = 5.0       # a file of weights is no larger
    IDLE = (                    # which of these have no effect, and when
        Idle("model", "", lambda c, m: c.words, "beside the folder that is named"),
        Idle("dtype layout shard_gb", "", lambda c, m: not converts(c), "without convert"),
        Idle("shard_gb", "layout", lambda c, m: is_single_file(c.layout),
             "with a --layout that is one file"),
        Idle("block_size", "costs", lambda c, m: not c.costs, "without --costs"))


def is_single_file(layout: str) -> bool:
    """Return whether a --layout is params.json beside one file of weights."""
    return layout in LAYOUTS and bool(LAYOUTS[layout].params_keys)


def converts(cfg: Config) -> bool:
    """Return whether the first word asks to convert: it is no checkpoint of that name."""
    return cfg.words[:1] == ["convert"] and not is_checkpoint(Path("convert"))


def main(cfg: Config) -> None:
    refuse_idle(cfg)
    if converts(cfg):
        if len(cfg.words) != 3:
            raise UserError("convert needs two directories: python checkpoint.py convert IN OUT")
        out = convert(*cfg.words[1:], cfg.dtype, cfg.layout, cfg.shard_gb, cfg.which)
        print(f"wrote {out}", file=sys.stderr)
    elif len(cfg.words) > 1:
        raise UserError(f"unexpected argument {cfg.words[1]!r}; --help shows the usage")
    elif cfg.costs:
        path = cfg.words[0] if cfg.words else cfg.model
        print_costs(path, read_config(path, cfg.which), cfg.block_size)
    else:
        show(*cfg.words[:1] or [cfg.model], cfg.which)


def show(path: str, which: str) -> None:
    """Print what is in a checkpoint, all of it checked."""
    opened = open_checkpoint(path, which)
    directory = opened.directory
    config = opened.config
    stored = [s for _, s in opened.found]
    kinds = sorted({s.dtype for s in stored})
    with torch.device("meta"):
        parameters = Transformer(config).parameter_count()
    rows = {"directory": str(directory), "family": opened.family.model_type,
            "parameters": f"{parameters:,}", "tensors": f"{len(stored):,}",
            "files": f"{len({s.file for s in stored}):,}", "dtype": ", ".join(kinds),
            "layers / heads / key heads / width": f"{config.n_layer} / {config.n_head} / "
            f"{config.n_kv_head} / {config.n_embd}",
            "vocabulary": f"{config.vocab_size:,}", "context": f"{config.block_size:,}",
            "can be resumed": "yes" if (directory / "trainer.pt").is_file() else "no"}
    for name, value in rows.items():
        print(f"{name:36s}{value}")


if __name__ == "__main__":
    run(main, Config, positional=("words",))
