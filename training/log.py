"""What a run says: progress on stderr, and one JSON object per line in out_dir/log.jsonl.

    journal = Journal(cfg, machine, state)
    journal.record(step=1, loss=2.5)        # a line of log.jsonl; wandb and tensorboard on request
    journal.say("step 1/10 | loss 2.5")     # a line on stderr, on the first rank alone

log.jsonl is made anew up to the step at which a run goes on, so that it is that of one run.
"""
from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from config import refuse_to_run
from formats import atomic
from training.machine import Machine
from training.faults import read_log
from training.loggers import find_loggers


class Journal:
    """Progress on stderr, one JSON object a line in out_dir/log.jsonl, wandb and tensorboard."""

    def __init__(self, cfg: Any, machine: Machine, state: Any):
        self.on, self.live = machine.main, sys.stderr.isatty()
        self.file = self.wandb = self.board = None
        if not self.on or cfg.eval_only:
            return
        path = Path(cfg.out_dir) / "log.jsonl"
        # a resumed run writes the steps after its checkpoint anew: forget what came of them
        lines = read_log(path, state) if state.step else []
        atomic.write_text(path, "".join(lines), path.with_suffix(".tmp"))
        self.file = path.open("a", encoding="utf-8")
        self.wandb, tensorboard = find_loggers(cfg)
        if self.wandb:
            self.wandb.init(project=cfg.wandb_project, name=cfg.wandb_run_name, config=asdict(cfg))
        if tensorboard:
            self.board = tensorboard.SummaryWriter(cfg.out_dir)

    def record(self, **row: Any) -> None:
        """Write a row to log.jsonl and the loggers; row["step"] has to be there."""
        if not self.file:
            return
        # NaN is not JSON: a value that is not finite is null
        row = {k: None if isinstance(v, float) and not math.isfinite(v) else v
               for k, v in row.items()}
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        if self.wandb:
            self.wandb.log(row, step=row["step"])
        for key, value in row.items() if self.board else ():
            if isinstance(value, (int, float)):
                self.board.add_scalar(key, value, row["step"])

    def say(self, text: str, passing: bool = False) -> None:
        """A line on stderr; a passing one is overwritten by the next on a terminal."""
        if self.on:
            start = "\r\033[K" if self.live else ""
            print(start + text, end="" if passing and self.live else "\n", file=sys.stderr,
                  flush=True)


def clock(seconds: float) -> str:
    """Return minutes:seconds, or hours:minutes:seconds from an hour on."""
    minutes, s = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{s:02d}" if minutes >= 60 else f"{minutes}:{s:02d}"


if __name__ == "__main__":
    refuse_to_run()
