"""Weights in, weights out: a checkpoint is a directory that Hugging Face transformers opens.

    from checkpoint import load_model, load_tokenizer, save_model
    model, tokenizer = load_model("out"), load_tokenizer("out")     # ours or Hugging Face's
    save_model("mine", model, tokenizer)                            # config.json, weights, …

    python checkpoint.py out                                        # what is in it, on any device

A directory holds config.json (the shape), model.safetensors (the weights, in shards where they
are large), tokenizer.json, generation_config.json and, to resume, trainer.pt. What to expect: the
logits that transformers computes from it differ from ours by a relative 1e-5 at most in float32.

Two ideas, in this order. Safetensors: 8 bytes of length, a JSON header, the bytes of the
tensors; everything the header says is checked before it is used, and no pickle is involved.
Replacement: a directory is written beside its name and then renamed, so that a crash, a full
disk or a kill leaves the old checkpoint or the new one, never half of one. How the published
architectures spell settings and parameters is families.py.
"""
from __future__ import annotations

import functools
import json
import math
import mmap
import os
import re
import shutil
import struct
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable, Iterable, NamedTuple

import torch
from torch import Tensor

from config import UserError, run
from families import FAMILIES, HANDMADE, Family
from model import ModelConfig, Transformer
from translate import Slot, disk_form, family_of, hf_config, layout, model_config_from_hf

SHARD_BYTES = 5 * 10 ** 9           # a file of weights is no larger, unless one tensor is
HEADER_BYTES = 100 * 10 ** 6        # the safetensors library refuses longer headers, so do we

# ---------------------------------------------------------------------------- safetensors

# The dtypes a weight may have, by their name in the file
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Bytes of an element, with those dtypes that only buffers we skip may have
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1,
              "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}
# Buffers that older versions of transformers saved with the weights and nobody reads
IGNORED = re.compile(r"\.rotary_emb\.inv_freq$|\.attn\.(masked_)?bias$")
# The files that saving replaces or, where the new model has none, removes
OURS = re.compile(r"(config|generation_config|tokenizer\w*|special_tokens_map|added_tokens|vocab)"
                  r"\.json|(pytorch_)?model.*\.(safetensors|bin|json)|trainer\.pt|merges\.txt"
                  r"|chat_template\.\w+|vocab\.bpe")


class Stored(NamedTuple):
    """Where a tensor lies: bytes start to end of a file, counted from the file's beginning."""
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def write_safetensors(path: Path, specs: Iterable[tuple[str, torch.dtype, tuple[int, ...]]],
                      get: Callable[[str], Tensor]) -> None:
    """Write the tensors that `specs` lists as (name, dtype, shape); get(name) makes one of them.

    The header comes first in the file, so shapes must be known before the first tensor is; the
    tensors themselves are made one at a time. OSError when the disk refuses.
    """
    # wide elements first: every tensor then starts at a multiple of its own element size
    specs = sorted(specs, key=lambda spec: -spec[1].itemsize)
    # {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, …}, offsets counted
    # from the end of the header
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in specs:
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape),
                        "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)                 # JSON allows spaces; the data is then aligned
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for name, dtype, shape in specs:
            tensor = get(name).detach().to("cpu", dtype).contiguous()
            assert tuple(tensor.shape) == shape, (name, tensor.shape, shape)
            # as bytes: numpy knows no bfloat16
            f.write(memoryview(tensor.view(-1).view(torch.uint8).numpy()))


def once(pairs: list[tuple[str, Any]]) -> dict:
    """A JSON object whose keys may not repeat: two readers could take different ones."""
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key occurs twice")
    return dict(pairs)


def read_header(path: Path) -> dict[str, Stored]:
    """Name -> place of every tensor of a safetensors file; UserError if anything is not right.

    Each size is checked against the size of the file before it is used, and the tensors must
    cover the data exactly: without holes (where bytes could hide) and without overlaps.
    """
    def need(true: bool, what: str) -> None:
        if not true:
            raise UserError(f"{path} is not a whole safetensors file ({what}): "
                            "copy or save it again")

    # 1. the length of the header, and the header itself
    try:
        size = path.stat().st_size
        with open(path, "rb") as f:
            need(size >= 8, f"{size} bytes")
            length = struct.unpack("<Q", f.read(8))[0]
            need(length <= min(size - 8, HEADER_BYTES), f"its header of {length} bytes does not "
                 f"fit the file's {size}")
            text = f.read(length)
    except OSError as e:
        raise UserError(f"cannot read weights {path}: {e.strerror}") from e
    try:
        header = json.loads(text.decode(), object_pairs_hook=once)
    except (ValueError, RecursionError) as e:
        need(False, f"its header is not JSON: {e}")
    need(isinstance(header, dict), "its header is no JSON object")
    # 2. each tensor by itself: types, then places, then the size that shape and dtype ask for
    found: dict[str, Stored] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        need(isinstance(entry, dict) and entry.keys() >= {"dtype", "shape", "data_offsets"},
             f"tensor {name!r} lacks dtype, shape or data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        # type() and not isinstance(): True is an int to Python, and no size
        need(isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape),
             f"tensor {name!r} has no proper shape")
        need(isinstance(offsets, list) and len(offsets) == 2
             and all(type(n) is int for n in offsets), f"tensor {name!r} has no proper offsets")
        need(isinstance(dtype, str) and dtype in ITEM_BYTES,
             f"tensor {name!r} has the unknown dtype {dtype!r}")
        start, end = (8 + length + n for n in offsets)
        need(8 + length <= start <= end <= size,
             f"tensor {name!r} ends at byte {end} of {size}: truncated?")
        need(end - start == math.prod(shape) * ITEM_BYTES[dtype],
             f"tensor {name!r} of shape {shape} and dtype {dtype} has {end - start} bytes")
        found[name] = Stored(path, dtype, tuple(shape), start, end)
    # 3. all together: each begins where the one before it ends, the last at the end of the file
    place = 8 + length
    for name, s in sorted(found.items(), key=lambda item: item[1][3:]):
        need(s.start == place, f"tensor {name!r} starts at byte {s.start}, not {place}")
        place = s.end
    need(place == size, f"{size - place} bytes after the last tensor")
    return found


def weight_index(directory: Path) -> dict[str, Stored]:
    """Name -> place of every tensor of a checkpoint, in one file or in shards."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if not index.is_file():
        if not single.is_file() and list(directory.glob("*.bin")):
            raise UserError(f"{directory} holds pickled weights, which can run any code: convert "
                            "them to safetensors with transformers' save_pretrained first")
        if not single.is_file():
            raise UserError(f"{directory} has no model.safetensors: is the copy complete?")
        return read_header(single)
    # {"weight_map": {"name": "model-00001-of-00002.safetensors", …}}
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict):
        raise UserError(f"{index} has no weight_map: copy it again")
    found: dict[str, Stored] = {}
    for shard in sorted({str(name) for name in places.values()}):
        # the index comes from elsewhere: it names files of this folder, and no other
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise UserError(f"{index} names the file {shard!r}, outside its folder: refused")
        if not (directory / shard).is_file():
            raise UserError(f"{directory / shard} is missing, which {index.name} names: "
                            "copy the rest of the checkpoint")
        found.update(read_header(directory / shard))
    # a shard of another checkpoint has the right name and the wrong tensors
    for name, shard in places.items():
        if name not in found or found[name].file.name != shard:
            raise UserError(f"tensor {name!r} is not in {shard}, where {index} has it: "
                            "the files belong to different checkpoints")
    return found


class Files:
    """Tensors of memory-mapped files: a page is read when it is used, and not before."""

    def __init__(self):
        self.maps: dict[Path, mmap.mmap] = {}

    def tensor(self, s: Stored) -> Tensor:
        """The tensor at `s` as a view of the file."""
        if s.file not in self.maps:
            with open(s.file, "rb") as f:
                # copy-on-write: torch wants memory it may write to; the file never changes
                self.maps[s.file] = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
        if s.start == s.end:
            return torch.empty(s.shape, dtype=DTYPES[s.dtype])
        return torch.frombuffer(self.maps[s.file], dtype=DTYPES[s.dtype], offset=s.start,
                                count=math.prod(s.shape)).view(s.shape)

def raw(model: Any) -> Transformer:
    """The model inside DDP and torch.compile, whose wrappers would get into the names."""
    while hasattr(model, "_orig_mod") or not hasattr(model, "config"):
        model = getattr(model, "_orig_mod", None) or model.module
    return model

# -------------------------------------------------------------------------------- saving


@functools.lru_cache(maxsize=None)
def note(message: str) -> None:
    """One line on stderr, and once a run."""
    print(f"note: {message}", file=sys.stderr)


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
                    shard_bytes: int = SHARD_BYTES) -> Path:
    """save_model, with `trainer` (tensors and plain values: what resuming needs) as trainer.pt."""
    def fill(directory: Path) -> None:
        write_model(directory, raw(model), tokenizer, shard_bytes)
        for name, content in (extra or {}).items():
            # a name, not a path: nothing is written outside the new directory
            data = content.encode() if isinstance(content, str) else content
            (directory / Path(name).name).write_bytes(data)
        if trainer is not None:
            with open(directory / "trainer.pt", "wb") as f:
                torch.save(trainer, f)
    return replace_directory(Path(os.path.realpath(path)), fill)


def write_model(directory: Path, model: Transformer, tokenizer: Any, shard_bytes: int) -> None:
    """Write everything but the trainer's state into an empty directory."""
    config, params = model.config, dict(model.named_parameters())
    family = family_of(config)
    if family is HANDMADE:
        note("no published architecture has this combination of settings, so the checkpoint "
             "opens in this project only")
    # names and shapes on disk, and where each tensor comes from
    slots = layout(disk_form(config, family), family)
    main = model.model.embed_tokens.weight.dtype

    def get(name: str) -> Tensor:
        # a bias that the family has and the model has not is zero
        slot = slots[name]
        parts = [params[p].detach() if p in params else torch.zeros(shape, dtype=main)
                 for p, shape in zip(slot.parts, slot.shapes)]
        parts = [p.to("cpu") if slot.expert is None else p[slot.expert].to("cpu") for p in parts]
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        return tensor.T if slot.transpose else tensor

    specs = [(name, params[slot.parts[0]].dtype if slot.parts[0] in params else main, slot.shape)
             for name, slot in slots.items()]
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
        write_safetensors(directory / "model.safetensors", specs, get)
    else:
        places = {}
        for i, shard in enumerate(shards, 1):
            file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            write_safetensors(directory / file, shard, get)
            places.update({name: file for name, _, _ in shard})
        write_json(directory / "model.safetensors.index.json",
                   {"metadata": {"total_size": sum(sizes)}, "weight_map": places})
    # transformers 5 loads in the type that is named here, not in float32
    settings = hf_config(config, tokenizer)
    settings["dtype"] = str(main).removeprefix("torch.")
    write_json(directory / "config.json", settings)
    # generate() of transformers looks for the end token in this file first
    ends = {key: settings[key] for key in ("bos_token_id", "eos_token_id")}
    stops = tokenizer.stop_ids if tokenizer is not None else []
    if len(stops) > 1:                                  # a chat's turn ends before the document
        ends["eos_token_id"] = stops
    write_json(directory / "generation_config.json", ends)
    if tokenizer is not None:
        tokenizer.save(directory)


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def sync(path: Path) -> None:
    """Have the disk, and not only the kernel, know the content of a file or a directory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:                                     # some file systems sync no directories
        if not path.is_dir():
            raise
    finally:
        os.close(handle)


def aside(path: Path) -> Path:
    """Where the previous directory stands while the new one takes its name."""
    return path.with_name(f".{path.name}.old")


def replace_directory(path: Path, fill: Callable[[Path], None]) -> Path:
    """Make `path` the directory that fill() writes, or leave it as it was.

    The new one is built under another name on the same disk, synced, and renamed. Two renames are
    not one: killed between them, the old directory is found under its name aside (see resolve).
    """
    new, old = path.with_name(f".{path.name}.new"), aside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if old.is_dir() and not path.exists():
            os.rename(old, path)                        # an earlier save was killed in between
        for leftover in (new, old):
            if leftover.exists():
                shutil.rmtree(leftover)
        kept = other_files(path)                        # refuses before anything is written
        new.mkdir()
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
        shutil.rmtree(new, ignore_errors=True)          # gives a full disk its space back
        if old.is_dir() and not path.exists():
            os.rename(old, path)
        # torch.save answers a failed write with a RuntimeError of its own, raised over the cause
        cause = e.__context__ if isinstance(e, RuntimeError) else e
        if isinstance(cause, OSError):
            raise UserError(f"cannot save {path}: {cause.strerror}; free some space or choose "
                            "another folder (what was saved before is untouched)") from e
        raise
    return path


def other_files(path: Path) -> list[Path]:
    """Files of an existing checkpoint that saving does not write: they are kept.

    UserError if it is no checkpoint, or has folders: replacing it would delete other work.
    """
    if not path.exists():
        return []
    entries = list(path.iterdir()) if path.is_dir() else [path]
    folders = [entry.name for entry in entries if entry.is_dir()]
    if folders or entries and not (path / "config.json").is_file():
        what = f"holds the folder {folders[0]}" if folders else "is not a checkpoint"
        raise UserError(f"{path} {what}, and saving would replace all of it: choose another folder")
    return [entry for entry in entries if not OURS.fullmatch(entry.name)]

# ------------------------------------------------------------------------------- loading


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; UserError naming the file and the line otherwise."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is not JSON ({e}): copy or save it again") from e
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object: copy or save it again")
    return value


def resolve(path: str | Path, which: str = "best") -> Path:
    """The checkpoint directory meant by `path`: itself, or the best / last of a training run.

    A run's out_dir names its checkpoints in checkpoints.json: {"last": "step_500", "best": …}.
    """
    path = Path(path)
    if (path / "config.json").is_file():
        return path
    index = path / "checkpoints.json"
    if index.is_file():
        names = read_json(index)
        for name in (names.get(which), names.get("last")):      # the best may have been pruned
            if name is None:
                continue
            if not isinstance(name, str) or Path(name).name != name:
                raise UserError(f"{index} names {name!r}, outside its folder: refused")
            for found in (path / name, aside(path / name)):
                if (found / "config.json").is_file():
                    return found
        raise UserError(f"{index} names no checkpoint that is there: train again, or give one of "
                        f"the folders in {path}")
    if path.name and (aside(path) / "config.json").is_file() and not path.exists():
        return aside(path)                              # a save was killed between its renames
    state = "has no config.json" if path.is_dir() else "does not exist"
    raise UserError(f"no checkpoint at {path}, which {state}: give the directory of a model or "
                    "the out_dir of a training run")


def read_config(path: str | Path, which: str = "best") -> ModelConfig:
    """The shape of a checkpoint's model."""
    file = resolve(path, which) / "config.json"
    return model_config_from_hf(read_json(file), str(file))


def load_tokenizer(path: str | Path, which: str = "best") -> Any:
    """The tokenizer that lies with a checkpoint."""
    from tokenizer import load
    return load(str(resolve(path, which)))


def load_trainer(path: str | Path, which: str = "last") -> dict[str, Any]:
    """The trainer's state that save_checkpoint was given, on the CPU."""
    file = resolve(path, which) / "trainer.pt"
    if not file.is_file():
        raise UserError(f"{file.parent} has no trainer.pt, so it cannot be resumed: start a new "
                        f"run from its weights with --init_from={file.parent}")
    try:
        # weights_only: tensors and plain values; a pickle that would run code is refused
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as e:                  # whatever a damaged pickle may raise; torch's text
        # would advise to switch the protection off, so only the kind of error is told
        raise UserError(f"{file} is damaged or not a trainer's state ({type(e).__name__}): "
                        "resume from another checkpoint") from e
    if not isinstance(state, dict):
        raise UserError(f"{file} is not a trainer's state: resume from another checkpoint")
    return state


def pick_device(device: str = "auto") -> torch.device:
    """`device`, or for auto the best one there is: CUDA, Apple's MPS, CPU."""
    if device == "auto":
        mps = torch.backends.mps.is_available()
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device={device} is not usable here "
                        f"({str(e).splitlines()[0]}): try --device=auto") from e


def load_model(path: str | Path, device: str = "auto", dtype: str = "auto",
               which: str = "best") -> Transformer:
    """The model of a checkpoint, in eval mode; dtype auto keeps that of the file.

    Everything is checked before anything is copied; then one tensor at a time moves from the
    mapped file to its place. UserError names the file and the tensor that is wrong.
    """
    directory = resolve(path, which)
    file = directory / "config.json"
    hf, stored, files = read_json(file), weight_index(directory), Files()
    if "tie_word_embeddings" not in hf and "lm_head.weight" not in stored:
        hf["tie_word_embeddings"] = True                # what silence means depends on the file
    config = model_config_from_hf(hf, str(file))
    family = FAMILIES.get(hf["model_type"], HANDMADE)
    if config.n_layer > len(stored):                    # and do not build a billion layers first
        raise UserError(f"{file} has {config.n_layer} layers, the weights only {len(stored)} "
                        "tensors: they belong to different models")
    # what should be there against what is there, before any memory is taken
    on_disk = disk_form(config, family)
    found = match(layout(on_disk, family), stored, family, directory, files)
    # A bias that we saved as zero may have been trained since, elsewhere: then it is the model's
    with torch.device("meta"):
        model = Transformer(config)
    wanted = {name for name, _ in model.named_parameters()}
    if any(not set(slot.parts) <= wanted and files.tensor(s).any() for slot, s in found):
        with torch.device("meta"):
            model = Transformer(replace(on_disk, dropout=config.dropout))
    dtypes = {str(t).removeprefix("torch."): t for t in DTYPE_NAMES}
    if dtype not in ("auto", *dtypes):
        raise UserError(f"--dtype={dtype} does not exist: choose auto, {', '.join(dtypes)}")
    # where a file mixes types (norms in float32, say) the embedding's is the model's
    main = next(s.dtype for slot, s in found if slot.parts == ("model.embed_tokens.weight",))
    model = model.to(DTYPES[main] if dtype == "auto" else dtypes[dtype])
    model = model.to_empty(device=pick_device(device)).eval()
    params = dict(model.named_parameters())
    with torch.no_grad():                               # copy_ casts and moves in one go
        for slot, s in found:
            tensor = files.tensor(s)
            rows = (tensor.T if slot.transpose else tensor).split([n[0] for n in slot.shapes])
            for part, values in zip(slot.parts, rows):
                if part in params:
                    place = params[part] if slot.expert is None else params[part][slot.expert]
                    place.copy_(values)
    return model


def match(slots: dict[str, Slot], stored: dict[str, Stored], family: Family, directory: Path,
          files: Files) -> list[tuple[Slot, Stored]]:
    """Pair every tensor the model needs with its place on disk; UserError at any difference."""
    left, pairs = dict(stored), []
    for name, slot in slots.items():
        # a file of the bare body (AutoModel) has the names without their prefix
        found = left.pop(name, None) or left.pop(name.removeprefix(family.prefix), None)
        if found is None:
            raise UserError(f"the weights in {directory} lack tensor {name!r}, which config.json "
                            "asks for: they belong to different models, or a file is missing")
        if found.shape != slot.shape:
            raise UserError(f"tensor {name!r} in {found.file} is {found.shape}, config.json "
                            f"asks for {slot.shape}: they belong to different models")
        if found.dtype not in DTYPES:
            raise UserError(f"tensor {name!r} in {found.file} is {found.dtype}: only "
                            f"{', '.join(DTYPES)} are supported")
        pairs.append((slot, found))
    # a tied model's file may repeat the embedding as its output matrix
    output = left.pop("lm_head.weight", None)
    if output is not None:
        tied = next(s for slot, s in pairs if slot.parts == ("model.embed_tokens.weight",))
        if (output.dtype, output.shape) != (tied.dtype, tied.shape) or not torch.equal(
                files.tensor(output), files.tensor(tied)):
            raise UserError(f"{directory}: config.json ties the output matrix to the embedding, "
                            "the weights differ: set tie_word_embeddings to false in it")
    # what is left over would be lost in silence: an adapter, a layer, a bias
    for name, s in left.items():
        if not IGNORED.search(name):
            raise UserError(f"tensor {name!r} in {s.file} has no place in the model that "
                            "config.json describes: they belong to different models")
    return pairs

# ---------------------------------------------------------------------------- the script


@dataclass
class Config:
    model: str = "out"          # a checkpoint's directory, or the out_dir of a training run
    which: str = "best"         # of a training run: best or last


def main(cfg: Config) -> None:
    directory = resolve(cfg.model, cfg.which)
    config, stored = read_config(directory), weight_index(directory)
    kinds = sorted({s.dtype for s in stored.values()})
    with torch.device("meta"):
        parameters = Transformer(config).parameter_count()
    rows = {"directory": str(directory),
            "family": str(read_json(directory / "config.json")["model_type"]),
            "parameters": f"{parameters:,}", "tensors": f"{len(stored):,}",
            "files": f"{len({s.file for s in stored.values()}):,}", "dtype": ", ".join(kinds),
            "layers / heads / key heads / width": f"{config.n_layer} / {config.n_head} / "
            f"{config.n_kv_head} / {config.n_embd}",
            "vocabulary": f"{config.vocab_size:,}", "context": f"{config.block_size:,}",
            "can be resumed": "yes" if (directory / "trainer.pt").is_file() else "no"}
    for name, value in rows.items():
        print(f"{name:36s}{value}")


if __name__ == "__main__":
    run(main, Config, positional=("model",))
