"""The log of a run: progress on stderr, and one JSON object per line in out_dir/log.jsonl.

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
from typing import Any, Callable

from config import refuse_to_run
from formats import atomic
from training.machine import Machine, memory_used, utilisation
from training.plot import draw_losses
from training.faults import read_log
from training.loggers import find_loggers


class Journal:
    """Progress on stderr, one JSON object a line in out_dir/log.jsonl, wandb and tensorboard."""

    def __init__(self, cfg: Any, machine: Machine, state: Any):
        self.cfg = cfg
        self.machine = machine
        self.terminal = sys.stderr.isatty()
        self.file = self.wandb = self.board = None
        self.reset()
        if not machine.main or cfg.eval_only:
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

    def count_step(self, seconds: float, tokens: int, targets: int) -> None:
        """Count a step towards the next report_steps(): its time, valid tokens and targets."""
        self.steps += 1
        self.seconds += seconds
        self.tokens += tokens
        self.targets += targets

    def report_steps(self, state: Any, metrics: dict[str, Any], lr: float,
                     count_flops: Callable[[int, int, int], float]) -> None:
        """Write the metrics of the last step, and the throughput since the report before it.

        count_flops(block_size, tokens, targets): FLOPs of the steps counted, without padding and
        without what is frozen.
        """
        machine = self.machine
        iters = self.cfg.max_iters
        throughput = self.tokens / self.seconds
        flops = count_flops(self.cfg.block_size, self.tokens, self.targets)
        mfu = utilisation(flops / self.seconds / machine.world, machine.device)
        self.record(step=state.step, **metrics, lr=lr, tokens_per_second=throughput, mfu=mfu,
                    seconds=state.seconds, memory=memory_used(machine.device),
                    skipped=state.skipped)
        left = (iters - state.step) * self.seconds / self.steps
        share = "n/a" if mfu is None else f"{mfu:.1%}"
        extra = f" | load {metrics['load_max']:.2f}" if "load_max" in metrics else ""
        extra += f" | {state.skipped} skipped" if state.skipped else ""
        self.say(f"step {state.step}/{iters} | loss {metrics['loss']:.4f} | lr {lr:.2e} | norm "
                 f"{metrics['grad_norm']:.2f} | {throughput:,.0f} tok/s | mfu {share}{extra} | "
                 f"{clock(left)} left", passing=state.step < iters)
        self.reset()

    def reset(self) -> None:
        """Begin to count steps anew."""
        self.steps = self.tokens = self.targets = 0
        self.seconds = 0.0

    def report_evaluation(self, state: Any, result: dict[str, float]) -> None:
        """Write what an evaluation found."""
        self.record(step=state.step, seconds=state.seconds, **result)
        self.say(f"step {state.step}: " + " | ".join(f"{k} {v:.4f}" for k, v in result.items()))
        if self.cfg.plot and self.file:
            folder = Path(self.cfg.out_dir)
            draw_losses(folder / "log.jsonl", folder / "loss.svg")

    def report_stop(self, state: Any) -> None:
        """Say how to go on with a run that was told to stop."""
        self.say(f"stopped after step {state.step} and saved to {self.cfg.out_dir}; go on with: "
                 f"python {Path(sys.argv[0]).name} --init_from=resume --out_dir={self.cfg.out_dir}")

    def say(self, text: str, passing: bool = False) -> None:
        """Print a line on stderr; on a terminal the next one overwrites a passing one."""
        if self.machine.main:
            start = "\r\033[K" if self.terminal else ""
            print(start + text, end="" if passing and self.terminal else "\n", file=sys.stderr,
                  flush=True)


def clock(seconds: float) -> str:
    """Return minutes:seconds, or hours:minutes:seconds from an hour on."""
    minutes, s = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{s:02d}" if minutes >= 60 else f"{minutes}:{s:02d}"


if __name__ == "__main__":
    refuse_to_run()
