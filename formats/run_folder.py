"""A training run's folder: which files in it are the run's own, and how a model is found again.

    from formats import run_folder
    run_folder.move_aside("out", run_folder.choose_aside("out"))        # a new run begins there
    run_folder.find_model(Path("out/sft/step_000020"), fingerprint)     # or where it is by now

An out_dir may hold other runs and the user's files: `out` holds out/demo and out/sft. A new run
moves only what an earlier run wrote into the folder itself, to out.old1, out.old2, ...

Paths are therefore no names: out/sft is another model after the next run. Whatever depends on a
model (an adapter, cached log-probs, a run that resumes) keeps its fingerprint, and find_model()
looks for it where it was and where it may have been moved.
"""
from __future__ import annotations

import hashlib
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from config import UserError
from formats.atomic import name_aside
from formats.safetensors import note, read_json

# What train.fit() and the stages write into out_dir, and the temporary files of that
OWN = re.compile(r"\.?(step_\d{6,}|checkpoints|log(?=\.(jsonl|tmp))|loss(?=\.(svg|tmp))"
                 r"|reference_[0-9a-f]{16})(\..*)?"
                 r"|events\.out\.tfevents\..*")
GROWN = "grown_from.json"   # in out_dir/base: marks a model that this run made from another one
BLOCK = 1 << 24             # bytes that one thread hashes
SAMPLES = 64                # pages that are hashed of a file of data that is longer than that
PAGE = 4096
DATA = re.compile(r"(\w+_)?(train|val)(_\d+)?\.(npy|jsonl?|csv|tsv|parquet)(\.gz)?")


def find_own_files(out: str | os.PathLike) -> list[Path]:
    """Return the files and folders in `out` that a run there has written."""
    return [path for path in Path(out).iterdir() if OWN.fullmatch(path.name)
            or path.name == "base" and (path / GROWN).is_file()]


def find_earlier(out: str | os.PathLike) -> list[Path]:
    """Return the folders that earlier runs in `out` were moved to, the newest first."""
    real = Path(os.path.realpath(out))
    found = []
    for parent, stem in ((real.parent, f"{real.name}.old"), (real, ".old")):
        if parent.is_dir():
            found += [(int(path.name[len(stem):]), path) for path in parent.iterdir()
                      if re.fullmatch(re.escape(stem) + r"[1-9]\d{0,8}", path.name)]
    return [path for _, path in sorted(found, reverse=True)]


def choose_aside(out: str | os.PathLike) -> Path:
    """Return the folder to take the files of the run in `out`: out.oldN, beside it.

    Inside it, as .oldN, where the folder is the working directory, is a mount point or has a
    parent that cannot be written to: a rename stays within one file system.
    """
    real = Path(os.path.realpath(out))
    inside = real == Path.cwd() or os.path.ismount(real) or not os.access(real.parent, os.W_OK)
    stem = real / ".old" if inside else Path(f"{real}.old")
    numbers = [int(path.name.rpartition(".old")[2]) for path in find_earlier(real)]
    return Path(f"{stem}{max(numbers, default=0) + 1}")


def move_aside(out: str | os.PathLike, to: Path) -> None:
    """Move the files of the run in `out` to the folder `to`; all others stay where they are."""
    files = find_own_files(out)
    to.mkdir()
    # checkpoints.json last: a kill in between leaves a run that is moved aside as a whole later
    for path in sorted(files, key=lambda path: path.name.startswith("checkpoints")):
        shutil.move(path, to / path.name)


def follow_move(path: str, out: str | os.PathLike, to: Path) -> str:
    """Return where `path` is once move_aside(out, to) is done."""
    real = Path(os.path.realpath(path))
    parent = Path(os.path.realpath(out))
    if not path or not real.is_relative_to(parent):
        return path
    inside = real.relative_to(parent)
    if not inside.parts:                # the run itself, unless the folder is a model as well
        moves = not (real / "config.json").is_file()
    else:
        moves = parent / inside.parts[0] in find_own_files(parent)
    return str(to / inside) if moves else path


def fingerprint(directory: Path) -> str:
    """Return 16 hexadecimal digits that say what model a folder holds: its weights and config.

    Every byte counts, as training may change a few rows alone. Blocks are hashed on all cores,
    1 GB/s each (hashlib releases the GIL), about what it takes to read them.
    """
    files = sorted(f for f in directory.iterdir() if f.is_file() and (
        f.name in ("config.json", "params.json") or f.suffix in (".safetensors", ".bin", ".pth")))
    total = hashlib.blake2b(digest_size=8)

    def digest(file: Path, start: int) -> bytes:
        with file.open("rb") as f:
            f.seek(start)
            return hashlib.blake2b(f.read(BLOCK), digest_size=16).digest()

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for file in files:
            size = file.stat().st_size
            total.update(f"{file.name} {size} ".encode())
            for block in pool.map(partial(digest, file), range(0, size, BLOCK)):
                total.update(block)
    return total.hexdigest()


def fingerprint_data(dataset: Path) -> str:
    """Return 16 hexadecimal digits that say what a file, or a folder's splits, hold to train on.

    Names do not count: data that was copied elsewhere is the same. Of a file of more than 16 MB
    its size and 64 pages, evenly spread, are hashed: text that moves by a token changes them all.
    """
    found = [dataset] if dataset.is_file() else sorted(
        f for f in dataset.iterdir() if f.is_file() and DATA.fullmatch(f.name))
    total = hashlib.blake2b(digest_size=8)
    for file in found:
        size = file.stat().st_size
        total.update(f"{size} ".encode())
        whole = size <= BLOCK
        with file.open("rb") as f:
            for start in [0] if whole else range(0, size, size // SAMPLES):
                f.seek(start)
                total.update(f.read(BLOCK if whole else PAGE))
    return total.hexdigest()


def find_model(folder: str | os.PathLike, wanted: str, *nearby: Path) -> Path | None:
    """Return the folder whose fingerprint is `wanted`: `folder`, or where it is by now, or None.

    nearby: further folders to look at, and folders of that name in the runs that were moved aside
    from beside them.
    """
    folder = Path(os.path.abspath(folder))
    tried = set()
    for path in (folder, *map(Path, nearby)):
        # .NAME.old: a save was killed between its two renames
        places = [path, path.with_name(f".{path.name}.old")]
        places += [old / path.name for old in find_earlier(path.parent)]
        # the run that the folder belongs to may have been moved with all that is in it
        places += [old / path.parent.name / path.name for old in find_earlier(path.parent.parent)]
        for place in places:
            real = os.path.realpath(place)
            if real in tried or not any((place / name).is_file()
                                        for name in ("config.json", "params.json")):
                continue
            tried.add(real)
            if fingerprint(place) == wanted:
                return place
    return None


def is_checkpoint(path: Path) -> bool:
    """Return whether a folder holds a model's settings."""
    return any((path / name).is_file() for name in ("config.json", "params.json"))


def resolve(path: str | Path, which: str = "best") -> Path:
    """Return the checkpoint directory meant by `path`: itself, or best / last of a training run.

    A run's out_dir names its checkpoints in checkpoints.json: {"last": "step_500", "best": …}.
    """
    path = Path(path)
    if is_checkpoint(path):
        return path
    index = path / "checkpoints.json"
    if index.is_file():
        names = read_json(index)
        for name in (names.get(which), names.get("last")):      # the best may have been pruned
            if name is None:
                continue
            if not isinstance(name, str) or Path(name).name != name:
                raise UserError(f"{index} names {name!r}, outside its folder: refused")
            for folder in (path / name, name_aside(path / name)):
                if is_checkpoint(folder):
                    return folder
            note(f"{path / name}, which {index.name} names, is gone")
        raise UserError(f"{index} names no checkpoint that is there: train again, or give one of "
                        f"the folders in {path}")
    if path.name and is_checkpoint(name_aside(path)) and not path.exists():
        return name_aside(path)                              # a save was killed between its renames
    if (path / "adapter_config.json").is_file():
        raise UserError(f"{path} is an adapter, not a model: name its base, or merge both with "
                        f"`python lora.py merge {path} OUT` and name that")
    state = "has no config.json" if path.is_dir() else "does not exist"
    raise UserError(f"no checkpoint at {path}, which {state}: give the directory of a model or "
                    "the out_dir of a training run")
