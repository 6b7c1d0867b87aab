"""Chats that need no network: `skills`, generated here, and `stdlib_chat`, from docstrings.

    python data/prepare.py skills               # and: python data/prepare.py stdlib_chat
    python data/skills.py skills --level=2 --train=50000 --out=data/harder

No GPU is used, and one core; two seconds for skills, ten for stdlib_chat. Written are
conversations, {train,val,test}.jsonl, and of skills also preferences (a correct answer against a
near miss, another format or a rambling one), pref_{train,val}.jsonl, and prompts with the expected
answer, rl_{train,val}.jsonl. tasks/skills.py and data/stdlib_chat.py say what is in them.
"""
from __future__ import annotations

import json
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT)) if str(ROOT) not in sys.path else None
from config import UserError, run  # noqa: E402  (found only once the root is on the path)
from data.chat_files import is_complete, print_report, write_records  # noqa: E402
from data.download import note  # noqa: E402
from data.sources import fingerprint, list_stdlib  # noqa: E402
from data.stdlib_chat import build_stdlib_chat  # noqa: E402
from formats.atomic import build_directory  # noqa: E402
from tasks.skills import SPLITS, TASKS, generate  # noqa: E402

VERSION = 2                             # of what is generated: a change builds it again
CHATS = ("skills", "stdlib_chat")


@dataclass
class Config:
    source: str = "skills"              # skills or stdlib_chat
    out: str = ""                       # directory to write; default data/<source>
    seed: int = 1337                    # another seed: other tasks, in other splits
    force: bool = False                 # build again what is already there
    # --- skills alone
    level: int = 1                      # 2: longer words, lists, tables, sums; 3: sums that carry
    train: int = 24_000                 # conversations to train on
    val: int = 1_000                    # conversations to validate on
    test: int = 1_000                   # conversations to test on
    pref: int = 6_000                   # preference pairs to train on; a tenth more to validate
    rl: int = 4_000                     # RL prompts to train on; a tenth more to validate


def inherit(cfg: Any) -> Config:
    """Return our settings from data/prepare.py's; UserError for one that has no effect here."""
    if wrong := sorted(getattr(cfg, "given", frozenset()) - {"source", "out", "seed", "force"}):
        raise UserError(f"--{wrong[0]} is for text, {cfg.source[0]} is made of chats; "
                        "`python data/skills.py --help` shows its settings")
    return Config(cfg.source[0], cfg.out, cfg.seed, cfg.force)


def main(cfg: Config) -> None:
    if cfg.source not in CHATS:
        raise UserError(f"unknown chat dataset {cfg.source!r}; choose {' or '.join(CHATS)}")
    counts = {name: getattr(cfg, name) for name in (*SPLITS, "pref", "rl")}
    if min(counts.values()) < 0 or not 1 <= cfg.level <= 3:
        raise UserError(f"counts must not be negative and level is 1, 2 or 3, not {cfg.level}")
    out = Path(cfg.out or ROOT / "data" / cfg.source).expanduser()
    settings: dict[str, Any] = {"version": VERSION, "source": cfg.source, "seed": cfg.seed}
    paths: list[Path] = []              # of the library to parse; skills has none
    if cfg.source == "skills":
        settings.update(counts, level=cfg.level)        # all that shapes the result
    else:
        paths = [Path(p) for p in list_stdlib()]
        settings["python"] = sys.version.split()[0]
        settings["inputs"] = fingerprint([str(p) for p in paths])   # names, sizes, times
    with build_directory(out, lambda: not cfg.force and is_complete(out, settings)) as folder:
        if folder is None:
            note(f"{out} is up to date, nothing to do (--force=1 builds it again)")
            return print_report(out)
        if paths:
            files = build_stdlib_chat(cfg.seed, paths, Path(sysconfig.get_paths()["stdlib"]))
        else:
            files = generate(cfg.seed, cfg.level, **counts)
        meta = {"version": VERSION, "kind": "chat", "dataset": out.name, "source": cfg.source,
                "settings": settings, "tasks": list(TASKS) if cfg.source == "skills" else [],
                "files": {name: write_records(folder, name, records)
                          for name, records in files.items()}}
        (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
    print_report(out)


if __name__ == "__main__":
    run(main, Config, positional=("source",))
