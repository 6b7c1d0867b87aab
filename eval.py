"""What a chat model gets right: exact match on tasks whose answers a program can check.

    python eval.py --out_dir=out/sft                        # the test set of skills, any device
    python eval.py --model=DIR --wrong=10                   # any checkpoint; show ten mistakes
    python eval.py --model=DIR --dataset=chats.jsonl        # last answers, compared as text

Each conversation but its last answer is rendered with the model's template, the model goes on
greedily, and what it says up to its end token is checked: by data/skills.py where a record has a
task, or else for being the same text. A model without a template never saw a turn: it is asked in
plain text, and its first line is the answer.

A row for each task and the total go to stdout. What to expect: RESULTS.md, "the life of a model".
"""
from __future__ import annotations

import config  # noqa: F401  first, so that what fails while importing is a sentence
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import checkpoint
import kernels
import sample
from config import UserError, run
from data import chats, skills
from train import clock


@dataclass
class Config:
    out_dir: str = "out/sft"            # of a training run
    model: str = ""                     # a checkpoint directory, ours or Hugging Face's; wins
    which: str = "last"                 # of a training run: best or last
    dataset: str = "skills"             # a name under data/, a folder, or a file of conversations
    split: str = "test"                 # file of the folder: test, val or train
    limit: int = 0                      # conversations, the first ones; 0: all
    max_new_tokens: int = 48            # an answer that goes on beyond is wrong
    wrong: int = 0                      # show so many mistakes on stderr
    # --- how to run
    batch_size: int = 125               # conversations that are answered side by side
    template: str = ""                  # of the conversation; empty: the model's
    device: str = "auto"
    dtype: str = "auto"
    backend: str = "auto"


def read(cfg: Config) -> list[dict[str, Any]]:
    """Conversations that end with an answer of the assistant, and have a question before it."""
    path = Path(cfg.dataset)
    if not path.is_file():
        # find() says in one sentence what is not there; the split lies beside its files
        path = chats.find(cfg.dataset)[0].parent / f"{cfg.split}.jsonl"
    if not path.is_file():
        raise UserError(f"{path} is missing: --split={cfg.split} is no file of {cfg.dataset}")
    records = [r for r in chats.read_chats(path) if len(r["messages"]) > 1
               and r["messages"][-1]["role"] == "assistant"]
    if not records:
        raise UserError(f"{path} has no conversation that ends with an answer")
    return records[:cfg.limit or None]


def right(record: dict[str, Any], text: str) -> bool:
    """Whether what a model said is the answer of a record."""
    if record.get("task") in skills.TASKS and "answer" in record:
        return skills.check(record["task"], record["answer"], text)
    return text.strip() == record["messages"][-1]["content"].strip()


def answers(model: Any, tokenizer: Any, records: list[dict[str, Any]], template: str = "",
            batch_size: int = 125, max_new_tokens: int = 48) -> list[str]:
    """What the model says, greedily, after each conversation without its last answer."""
    template = template or tokenizer.template
    chat, stops = bool(template or tokenizer.jinja), set(tokenizer.stop_ids)
    prompts = [tokenizer.render(r["messages"][:-1], template or None, True)[0] if chat else
               sample.encode(tokenizer, "".join(m["content"] + "\n" for m in r["messages"][:-1]))
               for r in records]
    said: list[list[int]] = [[] for _ in records]
    # prompts of one length beside each other: a batch waits for its longest answer anyway
    order, began = sorted(range(len(records)), key=lambda i: len(prompts[i])), time.perf_counter()

    for first in range(0, len(order), batch_size):
        part = order[first:first + batch_size]

        def over(row: int, token: int) -> bool:
            # without a template a line is an answer, and only text can tell that it ended
            return token in stops or not chat and "\n" in tokenizer.decode([token])

        for step in sample.generate(model, [prompts[i] for i in part], max_new_tokens,
                                    sample.Sampling(temperature=0), 0, tokenizer.vocab_size, over):
            for i, token in zip(part, step):
                if token is not None:
                    said[i].append(token)
        done = first + len(part)
        if sys.stderr.isatty():
            left = (time.perf_counter() - began) / done * (len(order) - done)
            print(f"\r\033[K{done} of {len(order)} answers, {clock(left)} left", end="",
                  file=sys.stderr, flush=True)
    print("\r\033[K" if sys.stderr.isatty() else "", end="", file=sys.stderr)
    # an answer that never ended is not the answer, even where it begins with it
    return [tokenizer.decode([t for t in ids if t not in stops]) if not chat or
            ids and ids[-1] in stops else tokenizer.decode(ids) + "…" for ids in said]


def table(records: list[dict[str, Any]], good: list[bool]) -> str:
    """A row of "task right of total" for each task, and the accuracy of all."""
    tasks = [r.get("task", "") for r in records]
    total, hits = Counter(tasks), Counter(t for t, ok in zip(tasks, good) if ok)
    rows = [f"{task or 'all':<14}{hits[task]:6d} of {n:5d}   {hits[task] / n:6.1%}"
            for task, n in total.items()] if len(total) > 1 else []
    return "\n".join([*rows, f"accuracy {sum(good) / len(good):.4f} ({sum(good)} of {len(good)})"])


def main(cfg: Config) -> float:
    kernels.use(cfg.backend)
    if cfg.limit < 0 or cfg.batch_size < 1 or cfg.max_new_tokens < 1:
        raise UserError("--limit cannot be below 0, --batch_size and --max_new_tokens not below 1")
    records = read(cfg)
    directory = checkpoint.resolve(cfg.model or cfg.out_dir, cfg.which)
    tokenizer = checkpoint.load_tokenizer(directory)
    model = checkpoint.load_model(directory, cfg.device, cfg.dtype)
    print(f"{directory}: {model.parameter_count():,} parameters, {len(records):,} conversations",
          file=sys.stderr)
    with torch.no_grad():
        said = answers(model, tokenizer, records, cfg.template, cfg.batch_size,
                       cfg.max_new_tokens)
    good = [right(r, text) for r, text in zip(records, said)]
    for r, text in [(r, t) for r, t, ok in zip(records, said, good) if not ok][:cfg.wrong]:
        print(f"{r['messages'][-2]['content']!r} -> {text!r}, not "
              f"{r['messages'][-1]['content']!r}", file=sys.stderr)
    print(table(records, good))
    return sum(good) / len(good)


if __name__ == "__main__":
    run(main, Config)
