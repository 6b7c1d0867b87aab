"""Work that the ranks of a run share, and that no two runs do at once: caches of a teacher.

    with alone(path, done):                 # one run makes `done`, another waits and finds it
        for part in progress(parts[rank::world], "the teacher reads, batches"):
            ...
        together()                          # all ranks have written their share
"""
from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Iterator

from config import refuse_to_run

import torch.distributed as dist

from formats import atomic
from training.log import clock


def get_ranks() -> tuple[int, int]:
    """Return (rank, world), which is (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def together() -> None:
    """Wait until every rank is here."""
    dist.barrier() if dist.is_initialized() else None


@contextlib.contextmanager
def alone(path: Path, done: Path, folder: bool = False) -> Iterator[None]:
    """Be the one run that makes `path`, which becomes `done`; another one waits, and finds that."""
    with contextlib.ExitStack() as stack:
        if get_ranks()[0] == 0:
            held = stack.enter_context(atomic.lock(
                path, f"another run makes {done}: waiting for it", folder=folder, done=done))
            if held and done.is_file():             # made between our look and our lock
                atomic.remove(path)
        together()                                  # the other ranks wait for the first
        yield


def progress(work: Any, what: str) -> Iterator[Any]:
    """Yield the items of `work`, with a line on stderr, and the time that is left."""
    began = time.perf_counter()
    live = sys.stderr.isatty()
    for k, item in enumerate(work, 1):
        yield item
        if get_ranks()[0] == 0 and (k == len(work) or live):
            left = clock((time.perf_counter() - began) / k * (len(work) - k))
            print(("\r\033[K" if live else "") + f"{what}: {k}/{len(work)} | {left} left",
                  end="\n" if k == len(work) else "", file=sys.stderr, flush=True)


def write_lines(path: Path, records: list[dict]) -> None:
    """Write a .jsonl file that is complete under its name or not there."""
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    os.replace(aside, path)


if __name__ == "__main__":
    refuse_to_run()
