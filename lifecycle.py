"""The life of a small model in one command: text, chat, preferences, and a student of a third.

    python lifecycle.py                     # or `make lifecycle`: a laptop, no network, two cores
    python lifecycle.py --seeds=1           # one student of each kind instead of three
    python lifecycle.py --first=dpo         # go on from a stage; those before it are there

Every stage is a command that you could type yourself, and is shown before it runs; each leaves its
folder under out/, to talk to: python sample.py --out_dir=out/dpo_skills --chat. One GPU or many
run the same commands. After each stage the model answers the test set of skills, whose questions
no stage trains on. What to expect: the table that goes to stdout, as it stands in RESULTS.md under
"The life of a model", in about twenty minutes.
"""
from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from config import UserError, run

ROOT = Path(__file__).resolve().parent


@dataclass
class Config:
    first: str = "data"             # the stage to begin with; see STAGES
    seeds: int = 3                  # students with a teacher, and as many without one
    limit: int = 0                  # questions of the test set, the first ones; 0: all
    device: str = "auto"


# name -> what it is, and its command; the folder that eval.py looks at is in the config file
STAGES = {
    "data": ("", "data/prepare.py"),
    "skills": ("", "data/prepare.py skills"),
    "pretrain": ("pretrained on text", "train.py config/demo.py"),
    "sft": ("SFT", "sft.py config/sft_skills.py"),
    "lora": ("LoRA instead of SFT", "lora.py config/lora_skills.py"),
    "dpo": ("DPO after SFT", "dpo.py config/dpo_skills.py"),
    "distill": ("student with a teacher", "distill.py config/distill_skills.py"),
    "student": ("student without one",
                "distill.py config/distill_skills.py --alpha=1 --hidden=0 --hidden_layers=0 "
                "--out_dir=out/student"),
}


def command(line: str) -> tuple[float, str]:
    """Run `python LINE`, its progress on our stderr: (seconds, what it wrote to stdout)."""
    print(f"\n$ python {line}", file=sys.stderr, flush=True)
    began = time.perf_counter()
    done = subprocess.run([sys.executable, *line.split()], cwd=ROOT, text=True,
                          stdout=subprocess.PIPE)
    if done.returncode:
        # it said itself, on stderr, what is wrong
        raise UserError(f"`python {line}` ended with status {done.returncode}: see above, then go "
                        "on with --first=STAGE")
    return time.perf_counter() - began, done.stdout


def out_dir(line: str) -> str:
    """The folder that a command writes: its flag, or the line of its config file."""
    if given := re.search(r"--out_dir=(\S+)", line):
        return given[1]
    file = next(word for word in line.split() if word.startswith("config/"))
    return re.search(r'^out_dir = "(.+)"', (ROOT / file).read_text(), re.M)[1]


def last(folder: str, key: str) -> float | None:
    """The last value of `key` in a run's log."""
    rows = [json.loads(x) for x in (ROOT / folder / "log.jsonl").read_text().splitlines()]
    return next((row[key] for row in reversed(rows) if row.get(key) is not None), None)


def parameters(folder: str) -> int:
    """Trained or not, of the last checkpoint; a tied matrix counts once."""
    from checkpoint import load_model, resolve      # with torch: only where a stage has run
    return load_model(resolve(ROOT / folder, "last"), "cpu").parameter_count()


def main(cfg: Config) -> None:
    if cfg.first not in STAGES:
        raise UserError(f"first={cfg.first!r} does not exist: {', '.join(STAGES)}")
    if cfg.seeds < 1 or cfg.limit < 0:
        raise UserError("--seeds must be at least 1, --limit at least 0")
    began, rows = time.perf_counter(), []
    for name in list(STAGES)[list(STAGES).index(cfg.first):]:
        title, line = STAGES[name]
        if not title:
            command(line)
            continue
        many = name in ("distill", "student")
        for seed in range(cfg.seeds if many else 1):
            this = f"{line} --device={cfg.device}"
            folder = out_dir(this)
            if many:
                this = this.replace(f"--out_dir={folder}", "") + (
                    f" --seed={seed} --out_dir={folder}_{seed}")
                folder = f"{folder}_{seed}"
            seconds, _ = command(this)
            _, said = command(f"eval.py --out_dir={folder} --limit={cfg.limit} "
                              f"--device={cfg.device}")
            accuracy = float(re.search(r"^accuracy ([\d.]+)", said, re.M)[1])
            print(said, file=sys.stderr)
            rows.append((title + (f", seed {seed}" if many else ""), parameters(folder), seconds,
                         accuracy, last(folder, "val_loss"), last(folder, "val_accuracy")))
    print("| stage | parameters | seconds | exact match | val_loss | preferences |")
    print("|---|---|---|---|---|---|")
    for title, count, seconds, accuracy, loss, preferred in rows:
        share = "" if preferred is None else f"{preferred:.1%}"
        print(f"| {title} | {count:,} | {seconds:.0f} | {accuracy:.1%} | {loss:.3f} | {share} |")
    print(f"\n{time.perf_counter() - began:.0f} seconds in all, tests included")


if __name__ == "__main__":
    run(main, Config)
