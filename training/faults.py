"""What may befall a run from outside: signals, ranks that are lost, a damaged log, broken numbers.

    with Stop() as stop, together(cfg, machine):    # around the loop of train.fit
        ... stop.asked ...

A stop is asked for and comes at the end of a step, so that it is saved and resumed bit for bit;
the rest ends in one sentence that says how to go on, and leaves the last checkpoint as it was.
"""
from __future__ import annotations

import contextlib
import json
import re
import signal
import sys
from pathlib import Path
from typing import Any, Iterator

from config import LostRank, UserError

import torch.distributed as dist
from torch import Tensor

from formats import atomic


def take_folder(out_dir: str) -> None:
    """Make `out_dir` this run's alone until atomic.release(), or until the process ends."""
    try:
        atomic.hold(out_dir, f"another run trains in {out_dir}: wait for its end, or choose "
                    "another folder with --out_dir")
    except OSError as e:
        raise UserError(f"cannot write to out_dir {out_dir}: {e.strerror}; choose another with "
                        "--out_dir") from e


class Stop:
    """SIGTERM, SIGHUP and Ctrl-C ask for a stop at the end of the step; a second Ctrl-C insists."""
    asked = 0                       # the signal's number

    def __enter__(self):
        names = [n for n in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, n)]
        numbers = [getattr(signal, n) for n in names]
        # what is ignored stays so: nohup asks for runs that survive their terminal
        self.before = {n: signal.signal(n, self.ask) for n in numbers
                       if signal.getsignal(n) != signal.SIG_IGN}
        return self

    def ask(self, number, frame):
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = int(number)

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def check_finite(cfg: Any, model: Any, optimizer: Any, state: Any) -> None:
    """UserError if the weights, or what the optimizer remembers, are not finite: no run gets out
    of that, and saved they would replace a checkpoint that is good."""
    tensors = [p.detach() for p in model.parameters()]
    tensors += [t for t in flatten(optimizer.state_dict()) if isinstance(t, Tensor)]
    if not all(t.isfinite().all() for t in tensors):
        raise UserError(f"step {state.step} made weights that are not finite; they are not saved: "
                        f"lower --learning_rate, and go on from the last checkpoint in "
                        f"{cfg.out_dir}, if there is one, or start again")


def flatten(value: Any) -> list:
    """The leaves of nested dictionaries and lists."""
    inner = value.values() if isinstance(value, dict) else value
    return [x for v in inner for x in flatten(v)] if isinstance(value, (dict, list)) else [value]


@contextlib.contextmanager
def together(cfg: Any, machine: Any) -> Iterator[None]:
    """Say how to go on where another rank was lost, instead of what gloo or NCCL say of it."""
    try:
        yield
    except RuntimeError as e:
        lost = isinstance(e, dist.DistError) or re.search("gloo|nccl|connection", str(e), re.I)
        if machine.world == 1 or not lost:
            raise
        there = (Path(cfg.out_dir) / "checkpoints.json").is_file() and not cfg.eval_only
        script = f"torchrun --nproc_per_node={machine.world} {Path(sys.argv[0]).name}"
        raise LostRank("another rank ended or cannot be reached, so this one cannot go on: see "
                       "what it said, then " + (
                           f"go on from the last checkpoint with: {script} --init_from=resume "
                           f"--out_dir={cfg.out_dir}" if there else
                           f"start again, as nothing was saved in {cfg.out_dir} yet")) from e


def read_log(path: Path, state: Any) -> list[str]:
    """The lines of a log up to the step of a checkpoint; damaged ones are left out, and counted."""
    if not path.is_file():
        return []
    # a byte that is no UTF-8 becomes a lone surrogate, which no JSON text of ours holds
    *lines, _ = path.read_text(encoding="utf-8", errors="surrogateescape").split("\n")
    kept = []
    damaged = 0
    for line in lines:                                  # what follows the last \n was killed
        try:
            row = json.loads(line.encode("utf-8"))
            step = int(row["step"])
            scored = "val_loss" in row
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
            damaged += 1
            continue
        # where the evaluation of the last step is still due, it was perhaps logged and not saved
        if step < state.step or step == state.step and not (state.due and scored):
            kept.append(line + "\n")
    if damaged:
        print(f"note: {damaged} damaged lines of {path} are left out", file=sys.stderr)
    return kept
