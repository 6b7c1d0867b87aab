"""Token shards on disk: the .npy files of a prepared dataset, written as the ids arrive.

    writer = Shards(folder, "train", vocab_size=16384, shard_tokens=100_000_000)
    writer.write(ids, documents=1, size=1234)       # ids (n,): they continue where the last ended

data/prepare.py writes them, data/loader.py reads them, each window by itself.
"""
from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from config import UserError, refuse_to_run

import numpy as np


BLOCK = 1 << 20                         # bytes that are hashed at once


def draw_uniform(seed: int | str, text: str) -> float:
    """Return a number in [0, 1) drawn by a seed and a text; the same on every machine."""
    digest = hashlib.blake2b(f"{seed}\n{text}".encode("utf-8", "replace"), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2 ** 48


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal, as `sha256sum` prints it."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


class Shards:
    """Writes the ids of one split to .npy files of at most shard_tokens each."""

    def __init__(self, folder: Path, split: str, vocab_size: int, shard_tokens: int):
        self.folder = folder
        self.split = split
        self.shard_tokens = shard_tokens
        self.vocab_size = vocab_size
        self.dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
        self.about = {"tokens": 0, "documents": 0, "bytes": 0, "shards": []}    # for meta.json
        self.file = None
        self.count = 0

    def header(self, count: int) -> bytes:
        """Return the 128 bytes that open an .npy file of one row (NumPy's format, version 1.0)."""
        text = f"{{'descr': '{self.dtype.str}', 'fortran_order': False, 'shape': ({count},), }}"
        return b"\x93NUMPY\x01\x00\x76\x00" + text.ljust(117).encode() + b"\n"

    def write(self, ids: np.ndarray, documents: int, size: int) -> None:
        """Append ids (n,), which open `documents` documents and stand for `size` UTF-8 bytes."""
        if len(ids) and ids.max() >= self.vocab_size:       # in 16 bits it would wrap around
            raise UserError(f"the id {ids.max()} is not of this tokenizer, which has "
                            f"{self.vocab_size} ids: is it the right one?")
        for key, value in (("tokens", len(ids)), ("documents", documents), ("bytes", size)):
            self.about[key] += int(value)
        while len(ids):
            if self.file is None:
                name = f"{self.split}_{len(self.about['shards']):05d}.npy"
                self.file = open(self.folder / name, "wb")
                self.count = 0
                self.file.write(self.header(0))         # the true count is known at the end
            part = ids[:self.shard_tokens - self.count]
            self.file.write(part.astype(self.dtype).tobytes())
            self.count, ids = self.count + len(part), ids[len(part):]
            if self.count == self.shard_tokens:
                self.finish()

    def finish(self) -> None:
        """Complete the shard at hand: its length, its hash."""
        self.file.seek(0)
        self.file.write(self.header(self.count))
        self.file.close()
        path = Path(self.file.name)
        self.file = None
        self.about["shards"].append({"file": path.name, "tokens": self.count,
                                     "sha256": hash_file(path)})

    def close(self) -> dict[str, Any]:
        """Finish, and tell what was written: the entry of this split in meta.json."""
        if self.file:
            self.finish()
        return self.about


class Shard:
    """The ids of one .npy file, read and not mapped: where another process cuts a mapped file, the
    system ends this one by SIGBUS, and no sentence could be said. The file stays open, so that a
    dataset that is prepared anew meanwhile is not read in the middle of a run."""

    def __init__(self, path: Path, dtype: np.dtype, offset: int, count: int):
        self.file = open(path, "rb")
        self.dtype = dtype
        self.offset = offset
        self.count = count

    def __len__(self) -> int:
        return self.count

    def read(self, begin: int, n: int) -> np.ndarray:
        """Return up to n ids from `begin` on; fewer where the shard ends, or was cut."""
        size = max(0, min(n, self.count - begin)) * self.dtype.itemsize
        at = self.offset + begin * self.dtype.itemsize
        if hasattr(os, "pread"):
            data = os.pread(self.file.fileno(), size, at)
            while 0 < len(data) < size:             # a call may return a part, of 2 GB at most
                more = os.pread(self.file.fileno(), size - len(data), at + len(data))
                if not more:
                    break
                data += more
        else:                                       # Windows
            self.file.seek(at)
            data = self.file.read(size)
        return np.frombuffer(data[:len(data) // self.dtype.itemsize * self.dtype.itemsize],
                             self.dtype)



if __name__ == "__main__":
    refuse_to_run()
