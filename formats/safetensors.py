"""The bytes of a checkpoint: named tensors in files, read and written, and checked before use.

    stored = weight_index(Path("out"))              # name -> where it is, what it is
    tensor = read(stored["model.norm.weight"])      # one tensor
    write_safetensors(path, [("w", torch.float32, (2, 3))], get)

Safetensors: 8 bytes of length, a JSON header, the bytes of the tensors; everything the header says
is checked before it is used, and no pickle is involved. Files of that kind are the rule; Llama as
Meta publishes it is read too (consolidated.*.pth), with a pickle that can make nothing but
tensors. What the names mean is families.py, what else lies in the directory is checkpoint.py. To
expect: reading costs the size of one tensor in memory, and none where the tensor goes to its place
as it is (tests/test_checkpoint.py measures it).
"""
from __future__ import annotations

import errno
import functools
import json
import math
import re
import stat
import struct
import sys
from pathlib import Path
from typing import Any, Callable, Iterable, NamedTuple

from config import UserError, refuse_to_run

import torch
from torch import Tensor


HEADER_BYTES = 100 * 10 ** 6        # the safetensors library refuses longer headers, so do we
JSON_BYTES = 64 * 10 ** 6           # of a config.json or an index: the largest published has 10 MB
DIMENSIONS = 16                     # of a shape: the sizes of a longer one are never multiplied

# The dtypes a weight may have, by their name in the file
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Bytes of an element, with those dtypes that only buffers we skip may have
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1,
              "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}


@functools.lru_cache(maxsize=None)
def note(message: str) -> None:
    """Print one line on stderr, once per run."""
    print(f"note: {message}", file=sys.stderr)


def shorten(value: Any) -> str:
    """Return repr(value), cut to fit into a sentence: a name in a file may be of any length."""
    text = repr(value[:200] if isinstance(value, str) else value)
    return text if len(text) <= 120 else text[:117] + "..."


class Stored(NamedTuple):
    """Where a tensor lies: bytes start to end of a file, counted from the file's beginning."""
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int = 0
    end: int = 0
    tensor: Tensor | None = None        # of a pickled file, which is mapped into memory
    pieces: tuple[Stored, ...] = ()     # or: it lies in pieces, which `dim` puts together
    dim: int = 0

    def take_rows(self, start: int, stop: int) -> Stored:
        """Return the place of rows start to stop of the first dimension, which lie together."""
        shape = (stop - start, *self.shape[1:])
        if self.tensor is not None:
            return self._replace(shape=shape, tensor=self.tensor[start:stop])
        row = math.prod(self.shape[1:]) * ITEM_BYTES[self.dtype]
        return self._replace(shape=shape, start=self.start + start * row,
                             end=self.start + stop * row)

    def drop_first(self) -> Stored:
        """Return the same bytes without a first dimension of 1: one expert of a stack."""
        tensor = self.tensor if self.tensor is None else self.tensor[0]
        return self._replace(shape=self.shape[1:], tensor=tensor)


def is_equal(a: Stored, b: Stored, rows: int = 4096) -> bool:
    """Tell whether two tensors hold the same numbers in one type, read a few rows at a time."""
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    if a.pieces or b.pieces or not a.shape:
        return torch.equal(read(a), read(b))
    spans = [(i, min(i + rows, a.shape[0])) for i in range(0, a.shape[0], rows)]
    return all(torch.equal(read(a.take_rows(*span)), read(b.take_rows(*span))) for span in spans)


def read(s: Stored, out: Tensor | None = None) -> Tensor:
    """Return the tensor at `s`; in `out` if its bytes fit there as they are, else in memory of its
    own.

    Read and not mapped: the pages of a map count as memory until the kernel wants them back, and
    a file that shrinks under a map kills the process.
    """
    if s.pieces:
        return torch.cat([read(piece) for piece in s.pieces], s.dim)
    if s.tensor is not None:
        return s.tensor
    if out is None or out.device.type != "cpu" or not out.is_contiguous() or (
            (out.dtype, out.shape) != (DTYPES[s.dtype], s.shape)):
        out = torch.empty(s.shape, dtype=DTYPES[s.dtype])
    if s.end > s.start:
        # as bytes: numpy knows no bfloat16
        into = memoryview(out.detach().view(-1).view(torch.uint8).numpy())
        try:
            with open(s.file, "rb", buffering=0) as f:
                f.seek(s.start)
                while into and (n := f.readinto(into)):     # 2 GB at a time is Linux's most
                    into = into[n:]
        except OSError as e:
            raise UserError(f"cannot read weights {s.file}: {e.strerror}") from e
        if into:
            raise UserError(f"{s.file} became shorter while it was read: copy or save it again")
    return out


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
        start = end
        end = end + math.prod(shape) * dtype.itemsize
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
    """Return a JSON object whose keys may not repeat: two readers could take different ones."""
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key occurs twice")
    return dict(pairs)


def read_header(path: Path) -> dict[str, Stored]:
    """Return name -> place of every tensor of a safetensors file; UserError if anything is not
    right.

    Each size is checked against the size of the file before it is used, and the tensors must
    cover the data exactly: without holes (where bytes could hide) and without overlaps.
    """
    def need(true: bool, what: str) -> None:
        if not true:
            raise UserError(f"{path} is not a whole safetensors file ({what}): "
                            "copy or save it again")

    # 1. the length of the header, and the header itself
    try:
        size = measure_file(path)
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
        need(False, f"its header is not JSON: {str(e)[:200]}")
    need(isinstance(header, dict), "its header is no JSON object")
    # 2. each tensor by itself: types, then places, then the size that shape and dtype ask for
    found: dict[str, Stored] = {}
    for key, entry in header.items():
        if key == "__metadata__":
            continue
        name = shorten(key)
        need(isinstance(entry, dict) and entry.keys() >= {"dtype", "shape", "data_offsets"},
             f"tensor {name} lacks dtype, shape or data_offsets")
        dtype = entry["dtype"]
        shape = entry["shape"]
        offsets = entry["data_offsets"]
        # type() and not isinstance(): True is an int to Python, and no size. The product of many
        # large numbers would take minutes, so their number and their size are looked at first
        need(isinstance(shape, list) and len(shape) <= DIMENSIONS
             and all(type(n) is int and 0 <= n < 2 ** 63 for n in shape),
             f"tensor {name} has no proper shape")
        need(isinstance(offsets, list) and len(offsets) == 2
             and all(type(n) is int and 0 <= n < 2 ** 63 for n in offsets),
             f"tensor {name} has no proper offsets")
        need(isinstance(dtype, str) and dtype in ITEM_BYTES,
             f"tensor {name} has the unknown dtype {shorten(dtype)}")
        start, end = (8 + length + n for n in offsets)
        need(8 + length <= start <= end <= size,
             f"tensor {name} ends at byte {end} of {size}: truncated?")
        need(end - start == math.prod(shape) * ITEM_BYTES[dtype],
             f"tensor {name} of shape {shape} and dtype {dtype} has {end - start} bytes")
        found[key] = Stored(path, dtype, tuple(shape), start, end)
    # 3. all together: each begins where the one before it ends, the last at the end of the file
    place = 8 + length
    for name, s in sorted(found.items(), key=lambda item: item[1][3:]):
        need(s.start == place, f"tensor {shorten(name)} starts at byte {s.start}, not {place}")
        place = s.end
    need(place == size, f"{size - place} bytes after the last tensor")
    return found


def measure_file(path: Path) -> int:
    """Return the bytes of a file; OSError if it is a pipe or a device, which may never end."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return found.st_size


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file; UserError naming the file and the line otherwise."""
    try:
        if (size := measure_file(path)) > JSON_BYTES:
            raise UserError(f"{path} has {size:,} bytes, more than any JSON file of a model: "
                            "copy or save it again")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is not JSON ({str(e)[:200]}): copy or save it again") from e
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object: copy or save it again")
    return value


def weight_index(directory: Path) -> dict[str, Stored]:
    """Find every tensor of a checkpoint, in one file or in shards: name -> its place.

    Of several kinds of file the same one counts as in transformers, whose save leaves the others
    where they are: model.safetensors, then the index and its shards.
    """
    if (directory / "params.json").is_file() and not (directory / "config.json").is_file():
        return meta_index(directory)
    single = directory / "model.safetensors"
    index = directory / "model.safetensors.index.json"
    if single.is_file():
        if index.exists():
            note(f"{directory} holds both {single.name} and {index.name}: the first is read, as in "
                 "transformers; delete the one that is out of date")
        return read_header(single)
    if not index.is_file():
        others = sorted(f.name for f in directory.glob("*.safetensors")
                        if not f.name.startswith("adapter"))
        if not others and list(directory.glob("*.bin")):
            raise UserError(f"{directory} holds pickled weights, which can run any code: convert "
                            "them to safetensors with transformers' save_pretrained first")
        if list(directory.glob("consolidated*")) and (directory / "params.json").is_file():
            raise UserError(f"{directory} has a config.json without its model.safetensors: move "
                            "config.json away to read params.json and the consolidated files")
        instead = f", only {shorten(others[0])}: rename it if it is the whole model" * (
            len(others) == 1)
        raise UserError(f"{directory} has no model.safetensors"
                        f"{instead or ': is the copy complete?'}")
    # {"weight_map": {"name": "model-00001-of-00002.safetensors", …}}
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict):
        raise UserError(f"{index} has no weight_map: copy it again")
    found: dict[str, Stored] = {}
    for shard in sorted({str(name) for name in places.values()}):
        # the index comes from elsewhere: it names files of this folder, and no other
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise UserError(f"{index} names the file {shorten(shard)}, outside its folder: "
                            "refused")
        if not (directory / shard).is_file():
            raise UserError(f"{directory / shard} is missing, which {index.name} names: "
                            "copy the rest of the checkpoint")
        found.update(read_header(directory / shard))
    # a shard of another checkpoint has the right name and the wrong tensors
    for name, shard in places.items():
        if name not in found or found[name].file.name != shard:
            raise UserError(f"tensor {shorten(name)} is not in {shard}, where {index} has it: "
                            "the files belong to different checkpoints")
    return found

# ------------------------------------------------------------- Llama's files as Meta has them


def read_pickled(path: Path) -> dict[str, Stored]:
    """Return name -> tensor of a .pth file, mapped; UserError if it holds anything but tensors."""
    try:
        # weights_only: a pickle that would run code is refused
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as e:                  # whatever a damaged pickle may raise; torch's text
        # would advise to switch the protection off, so only the kind of error is told
        raise UserError(f"{path} is damaged or no file of weights ({type(e).__name__}): "
                        "copy it again") from e
    if not isinstance(content, dict) or not all(
            isinstance(name, str) and isinstance(t, Tensor) and t.layout is torch.strided
            and t.device.type == "cpu" and t.dtype in DTYPE_NAMES for name, t in content.items()):
        raise UserError(f"{path} holds something else than weights in {', '.join(DTYPES)}: "
                        "it is not Meta's file of a model")
    return {name: Stored(path, DTYPE_NAMES[t.dtype], tuple(t.shape), tensor=t)
            for name, t in content.items()}


def meta_index(directory: Path) -> dict[str, Stored]:
    """Return name -> place of every tensor of consolidated.00.pth, .01.pth, … or .safetensors.

    Each file has a slice of every matrix, that of one GPU. Layers cut by their outputs (q, k, v,
    w1, w3, output) are joined along rows, those cut by their inputs (wo, w2) along columns.
    """
    files = sorted(f for f in directory.glob("consolidated.*pth") if f.is_file()) or sorted(
        f for f in directory.glob("consolidated*.safetensors") if f.is_file())
    others = [f.name for f in directory.glob("consolidated*.safetensors") if f.is_file()]
    if files and others and files[0].suffix == ".pth":
        raise UserError(f"{directory} holds both {files[0].name} and {others[0]}, which may be "
                        "different models: move one kind away")
    if not files:
        raise UserError(f"{directory} has a params.json and no consolidated.00.pth: "
                        "copy the rest of the checkpoint")
    shards = [read_pickled(f) if f.suffix == ".pth" else read_header(f) for f in files]
    found: dict[str, Stored] = {}
    for name, first in shards[0].items():
        pieces = tuple(shard.get(name) for shard in shards)
        if None in pieces or {(p.dtype, p.shape) for p in pieces} != {(first.dtype, first.shape)}:
            raise UserError(f"tensor {name!r} is not alike in the {len(files)} files "
                            f"{files[0].name} … in {directory}: they are of different models")
        if len(pieces) == 1 or len(first.shape) != 2:       # norms are whole in every file
            found[name] = first
            continue
        dim = int(re.search(r"\.(wo|w2)\.weight$", name) is not None)
        if name == "tok_embeddings.weight":
            # Llama 1 and 2 cut the embedding by features, Llama 3 by tokens: a norm, which is
            # never cut, knows the full width
            dim = int(first.shape[1:] != shards[0].get("norm.weight", first).shape[-1:])
        shape = list(first.shape)
        shape[dim] *= len(pieces)
        found[name] = Stored(first.file, first.dtype, tuple(shape), pieces=pieces, dim=dim)
    if any(shard.keys() != found.keys() for shard in shards):
        raise UserError(f"the files {files[0].name} … in {directory} have different tensors: "
                        "they belong to different models")
    return found


if __name__ == "__main__":
    refuse_to_run()
