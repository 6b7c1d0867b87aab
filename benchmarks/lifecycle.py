"""The whole pipeline in one command: text, chat, preferences, and a small student.

    python benchmarks/lifecycle.py              # or `make lifecycle`: a laptop, no network
    python benchmarks/lifecycle.py --seeds=1    # one student of each kind instead of three
    python benchmarks/lifecycle.py --first=dpo  # continue from a stage; those before it exist
    kill -TERM PID, or Ctrl-C                   # the stage saves, and the next start resumes it
    python benchmarks/lifecycle.py --jobs=1     # one stage after the other

Every stage is a command that you could type yourself, and is printed before it runs; each leaves
its folder under out/, to talk to: python sample.py --out_dir=out/dpo --chat. One GPU or several run
the same commands. After each stage the model answers the test set of skills, whose questions no
stage trains on. On a CPU the stages that no other waits for, LoRA and the students, run in
parallel, one core each. The table goes to stdout, as in RESULTS.md under "End-to-end pipeline";
about seventeen minutes on two cores.
"""
from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":          # in place of this folder, whose training.py hides training/
    sys.path[0] = str(ROOT)
from checkpoint import load_model               # noqa: E402
from config import Stopped, UserError, run      # noqa: E402
from formats.run_folder import resolve          # noqa: E402
from training.machine import pick_device        # noqa: E402


@dataclass
class Config:
    first: str = "data"             # the stage to begin with; see STAGES
    seeds: int = 3                  # students with a teacher, and as many without one
    jobs: int = 0                   # at a time of those at the end; 0: a CPU's cores, or one
    limit: int = 0                  # questions of the test set, the first ones; 0: all
    device: str = "auto"


# name -> what it is, and its command; the folder that eval.py looks at is in the config file
STAGES = {
    "data": ("", "data/prepare.py"),
    "skills": ("", "data/prepare.py skills"),
    "pretrain": ("pretrained on text", "train.py config/demo.py"),
    "sft": ("SFT", "sft.py config/sft_skills.py"),
    "dpo": ("DPO after SFT", "dpo.py config/dpo_skills.py"),
    # no stage waits for these
    "lora": ("LoRA instead of SFT", "lora.py config/lora_skills.py"),
    "distill": ("student with a teacher", "distill.py config/distill_skills.py"),
    "student": ("student without one",
                "distill.py config/distill_skills.py --alpha=1 --hidden=0 --hidden_layers=0 "
                "--out_dir=out/student"),
}


LAST = ("lora", "distill", "student")           # stages that no other starts from
SCREEN = threading.Lock()                       # held by the command whose progress is shown


class Children:
    """The commands that run now; a signal that asks us to stop is passed on to all of them.

    Each has a session of its own, so that Ctrl-C, which a terminal sends to everybody, comes once
    and from here: a training stage saves at the first one, and at a second one ends at once.
    """
    SIGNALS = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]

    def __init__(self):
        self.running: set[subprocess.Popen] = set()
        self.asked = 0                          # the signal's number
        self.stopped: list[str] = []            # stages that did not come to their end

    def __enter__(self) -> "Children":
        self.asked = 0
        self.stopped = []
        self.before = {n: signal.signal(n, self.ask) for n in self.SIGNALS
                       if signal.getsignal(n) != signal.SIG_IGN}
        return self

    def __exit__(self, *error: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def ask(self, number: int, frame: Any) -> None:
        self.asked = int(number)
        for child in list(self.running):
            child.send_signal(number)

    def run(self, argv: list[str], **how: Any) -> tuple[int, str, str | None]:
        """Return (status, stdout, stderr) of a command, once it has ended."""
        if self.asked:                          # between two of them
            raise Stopped(self.asked)
        child = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
                                 start_new_session=True, **how)
        self.running.add(child)
        if self.asked:                          # between the look above and now
            child.send_signal(self.asked)
        try:
            out, err = child.communicate()
        finally:
            self.running.discard(child)
        return child.returncode, out, err


CHILDREN = Children()


@contextlib.contextmanager
def noting(stage: str) -> Iterator[None]:
    """Note it if the stage is stopped, for whoever wants to go on with it."""
    try:
        yield
    except Stopped:
        CHILDREN.stopped.append(stage)
        raise


def command(line: str, threads: int = 0) -> tuple[float, str]:
    """Run `python LINE`: (seconds, what it wrote to stdout). Its progress goes to our stderr, and
    at its end if another one has the screen. threads: of the CPU; 0: as many as PyTorch takes."""
    print(f"\n$ python {line}", file=sys.stderr, flush=True)
    shown = SCREEN.acquire(blocking=False)
    began = time.perf_counter()
    try:
        status, out, err = CHILDREN.run(
            [sys.executable, *line.split()], cwd=ROOT, stderr=None if shown else subprocess.PIPE,
            env={**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})})
    finally:
        if shown:
            SCREEN.release()
    if not shown:
        print(f"\n$ python {line}\n{err}", file=sys.stderr, flush=True)
    if CHILDREN.asked or status in [128 + n for n in Children.SIGNALS]:
        raise Stopped(CHILDREN.asked or status - 128)
    if status:
        # it said itself, on stderr, what is wrong
        raise UserError(f"`python {line}` ended with status {status}: see above, then go "
                        "on with --first=STAGE")
    return time.perf_counter() - began, out


def read_complete(folder: str) -> bool | None:
    """Return whether the run in `folder` came to its last step; None where there is no run."""
    try:
        names = json.loads((ROOT / folder / "checkpoints.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return names.get("complete") if isinstance(names, dict) else None


def out_dir(line: str) -> str:
    """Return the folder that a command writes: its flag, or the line of its config file."""
    if given := re.search(r"--out_dir=(\S+)", line):
        return given[1]
    file = next(word for word in line.split() if word.startswith("config/"))
    return re.search(r'^out_dir = "(.+)"', (ROOT / file).read_text(), re.M)[1]


def last(folder: str, key: str) -> float | None:
    """Return the last value of `key` in a run's log."""
    rows = [json.loads(x) for x in (ROOT / folder / "log.jsonl").read_text().splitlines()]
    return next((row[key] for row in reversed(rows) if row.get(key) is not None), None)


def parameters(folder: str) -> int:
    """Trained or not, of the last checkpoint; a tied matrix counts once."""
    return load_model(resolve(ROOT / folder, "last"), "cpu").parameter_count()


def model_of(cfg: Config, title: str, line: str, threads: int = 0) -> str:
    """Make one model, ask it the test set, and tell of it: a row of the table."""
    folder = out_dir(line)
    if read_complete(folder) is False:                          # its own settings are saved with it
        print(f"\n{folder} holds a run that was stopped: it goes on (remove the folder to begin it "
              "anew)", file=sys.stderr, flush=True)
        line = f"{line.split()[0]} --init_from=resume --out_dir={folder}"
    if cfg.first in LAST and read_complete(folder):   # what it starts from was not made again
        print(f"\n{folder} is complete (remove the folder to make it again)", file=sys.stderr)
        seconds = last(folder, "seconds") or 0.0
    else:
        seconds, _ = command(f"{line} --device={cfg.device}", threads)
    _, said = command(f"eval.py --out_dir={folder} --limit={cfg.limit} --device={cfg.device}",
                      threads)
    print(said, file=sys.stderr)
    accuracy = float(re.search(r"^accuracy ([\d.]+)", said, re.M)[1])
    preferred = last(folder, "val_accuracy")
    share = "" if preferred is None else f"{preferred:.1%}"
    return (f"| {title} | {parameters(folder):,} | {seconds:.0f} | {accuracy:.1%} | "
            f"{last(folder, 'val_loss'):.3f} | {share} |")


def main(cfg: Config) -> None:
    with CHILDREN:
        try:
            run_stages(cfg)
        except Stopped:
            first = next((name for name in STAGES if name in CHILDREN.stopped), cfg.first)
            print(f"stopped; go on with: python benchmarks/lifecycle.py --first={first}",
                  file=sys.stderr)
            raise


def run_stages(cfg: Config) -> None:
    """Run the stages in turn, those at the end beside each other, and print the table."""
    if cfg.first not in STAGES:
        raise UserError(f"unknown stage --first={cfg.first!r}; choose from {', '.join(STAGES)}")
    if cfg.seeds < 1 or min(cfg.limit, cfg.jobs) < 0:
        raise UserError("--seeds must be at least 1, --limit and --jobs at least 0")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    began = time.perf_counter()
    rows = []
    waiting = []
    for name in list(STAGES)[list(STAGES).index(cfg.first):]:
        title, line = STAGES[name]
        if not title:
            with noting(name):
                command(line)
        elif name in ("distill", "student"):        # once a seed
            folder = out_dir(line)
            line = line.replace(f"--out_dir={folder}", "")
            waiting += [(name, f"{title}, seed {seed}", f"{line} --seed={seed} --out_dir="
                         f"{folder}_{seed}") for seed in range(cfg.seeds)]
        elif name == "lora":
            waiting.append((name, title, line))
        else:
            with noting(name):
                rows.append(model_of(cfg, title, line))
    jobs = min(len(waiting), cfg.jobs or (cores if pick_device(cfg.device).type == "cpu" else 1))
    share = max(cores // jobs, 1) if jobs > 1 else 0
    failed = threading.Event()

    def teach(model: tuple[str, str, str]) -> str:
        if failed.is_set():                         # what went wrong is to be the last word
            return ""
        try:
            with noting(model[0]):
                return model_of(cfg, *model[1:], threads=share)
        except BaseException:
            failed.set()
            raise
    with ThreadPoolExecutor(jobs) as pool:          # threads that wait for processes
        rows += pool.map(teach, waiting)
    print("| stage | parameters | seconds | exact match | val_loss | preferences |")
    print("|---|---|---|---|---|---|", *rows, sep="\n")
    print(f"\n{time.perf_counter() - began:.0f} seconds in all, tests included")


if __name__ == "__main__":
    run(main, Config)
