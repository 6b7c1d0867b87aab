"""What a chat model gets right: exact match on tasks whose answers a program can check.

    python eval.py --out_dir=out/sft                        # the test set of skills, any device
    python eval.py --model=DIR --wrong=10                   # any checkpoint; show ten mistakes
    python eval.py --model=DIR --dataset=chats.jsonl        # last answers, compared as text
    python eval.py --model=out/spam --dataset=sms_spam      # a classifier: accuracy, confusion

Each conversation but its last answer is rendered with the model's template, the model goes on
greedily, and what it says up to its end token is checked: by tasks/skills.py where a record has a
task, or else for being the same text. A model without a template never saw a turn: it is asked in
plain text, and its first line is the answer.

A row for each task and the total go to stdout; of a checkpoint of `classify.py`, the
accuracy and a row for each true label. What to expect: RESULTS.md, "the life of a model".

In float32 the answers do not depend on --batch_size. In other types sums are rounded in another
order, and an answer may change where two tokens are nearly tied.
"""
from __future__ import annotations

import config  # noqa: F401  first, so that what fails while importing is a sentence
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import checkpoint
import kernels
from text.chat import refuse_unread
from config import UserError, run
from data import chats
from inference.labels import (format_report, get_label_ids, get_text_length,
                              predict_labels)
from inference.generate import Sampling, encode, generate
from tasks import skills
from training.log import clock


@dataclass
class Config:
    out_dir: str = "out/sft"            # of a training run
    model: str = ""                     # a checkpoint directory, ours or Hugging Face's; wins
    which: str = "last"                 # of a training run: best or last
    dataset: str = "skills"             # a name under data/, a folder, or a file of conversations
    split: str = "test"                 # file of the folder: test, val or train; of a single file
                                        # all is read, unless it is given: val is what a stage
                                        # holds out of it, train the rest
    limit: int = 0                      # conversations, the first ones; 0: all
    ignore_keys: list[str] = field(default_factory=list)    # keys of records to leave out unread
    text_key: str = "text"              # of a classifier: key or column of the text
    label_key: str = "label"            # of a classifier: key or column of the label
    max_new_tokens: int = 48            # an answer that goes on beyond is wrong
    wrong: int = 0                      # show that many mistakes on stderr
    # --- how to run
    batch_size: int = 125               # conversations that are answered side by side
    template: str = ""                  # of the conversation; empty: the model's
    think: bool | None = None           # of a model that can think first: True, False (to answer
                                        # at once), None (as its template does by default)
    device: str = "auto"
    dtype: str = "auto"
    backend: str = "auto"


def read_split(cfg: Config, kind: str) -> tuple[Path, list[dict[str, Any]]]:
    """Return the file of cfg.split, and its records: "sft" conversations or "labels"."""
    path = Path(cfg.dataset)
    notes = chats.Notes(cfg.ignore_keys)
    columns = (cfg.text_key, cfg.label_key)
    if path.is_file() and "split" in getattr(cfg, "given", ()):
        parts = dict(zip(("train", "val"), chats.splits(
            cfg.dataset, kind, None, notes, columns)))
        if cfg.split not in parts:
            raise UserError(f"{path} is one file, without a split {cfg.split!r}: choose val or "
                            "train, or leave out --split to read all of it")
        print(*notes.lines(), sep="\n", end="\n" * bool(notes.lines()), file=sys.stderr)
        return path, parts[cfg.split]
    if not path.is_file():
        # find() says in one sentence what is not there; the split is next to its files
        train = chats.find(cfg.dataset, kind)[0]
        ending = train.name.partition(".")[2]
        path = train.with_name(f"{cfg.split}.{ending}")
    if not path.is_file():
        raise UserError(f"{path} is missing: --split={cfg.split} is no file of {cfg.dataset}")
    records = list(chats.read_chats(path, kind, None, notes=notes, columns=columns))
    print(*notes.lines(), sep="\n", end="\n" * bool(notes.lines()), file=sys.stderr)
    return path, records


def read(cfg: Config) -> list[dict[str, Any]]:
    """Conversations that end with an answer of the assistant, and have a question before it."""
    if idle := {"text_key", "label_key"} & set(getattr(cfg, "given", ())):
        raise UserError(f"--{min(idle)} names a column for a classifier, and this is none: leave "
                        "it out")
    path, records = read_split(cfg, "sft")
    records = [r for r in records if len(r["messages"]) > 1
               and r["messages"][-1]["role"] == "assistant"]
    if not records:
        raise UserError(f"{path} has no conversation that ends with an answer")
    return records[:cfg.limit or None]


def right(record: dict[str, Any], text: str) -> bool:
    """Return whether what a model said is the answer of a record."""
    if record.get("task") in skills.TASKS and "answer" in record:
        return skills.check(record["task"], record["answer"], text)
    return text.strip() == record["messages"][-1]["content"].strip()


def answers(model: Any, tokenizer: Any, records: list[dict[str, Any]], template: str = "",
            batch_size: int = 125, max_new_tokens: int = 48,
            think: bool | None = None) -> list[str]:
    """Return what the model says, greedily, after each conversation without its last answer."""
    template = template or tokenizer.template
    chat = bool(template or tokenizer.jinja)
    stops = set(tokenizer.stop_ids)
    thinking = {} if think is None else {"enable_thinking": think}
    for options in ({}, *(chats.render_options(r) for r in records if chat)):
        refuse_unread(tokenizer, template, **{**options, **thinking})
    prompts = [tokenizer.render(r["messages"][:-1], template or None, True,
                                **{**chats.render_options(r), **thinking})[0] if chat else
               encode(tokenizer, "".join(m["content"] + "\n" for m in r["messages"][:-1]))
               for r in records]
    said: list[list[int]] = [[] for _ in records]
    # prompts of one length beside each other: a batch waits for its longest answer anyway
    order = sorted(range(len(records)), key=lambda i: len(prompts[i]))
    began = time.perf_counter()

    for first in range(0, len(order), batch_size):
        part = order[first:first + batch_size]

        def over(row: int, token: int) -> bool:
            # without a template a line is an answer, and only text can tell that it ended
            return token in stops or not chat and "\n" in tokenizer.decode([token])

        for step in generate(model, [prompts[i] for i in part], max_new_tokens,
                             Sampling(temperature=0), 0, tokenizer.vocab_size, over):
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
    """Return a row of "task right of total" for each task, and the accuracy of all."""
    tasks = [r.get("task", "") for r in records]
    total = Counter(tasks)
    hits = Counter(t for t, ok in zip(tasks, good) if ok)
    rows = [f"{task or 'all':<14}{hits[task]:6d} of {n:5d}   {hits[task] / n:6.1%}"
            for task, n in total.items()] if len(total) > 1 else []
    return "\n".join([*rows, f"accuracy {sum(good) / len(good):.4f} ({sum(good)} of {len(good)})"])


def label_texts(cfg: Config, model: Any, tokenizer: Any, labels: dict[str, int]) -> float:
    """Print the accuracy and the confusion matrix of a classifier; returns the accuracy."""
    if idle := {"template", "think", "max_new_tokens"} & set(getattr(cfg, "given", ())):
        raise UserError(f"--{min(idle)} has no effect on a classifier: leave it out")
    if "dataset" not in getattr(cfg, "given", ("dataset",)):
        raise UserError("this is a classifier: name its labelled texts, as in --dataset=sms_spam "
                        "or --dataset=FILE.csv")
    path, records = read_split(cfg, "labels")
    names = list(labels)
    records = records[:cfg.limit or None]
    if not records:
        raise UserError(f"{path} has no labelled text")
    for record in records:
        if record["label"] not in labels:
            raise UserError(f"{path} has the label {record['label']!r}, the classifier only "
                            f"{', '.join(names[:9])}: choose the data of its task")
    length = get_text_length(tokenizer, model.config)
    texts = [r["text"] for r in records]
    confusion = torch.zeros(len(names), len(names))
    found = predict_labels(model, tokenizer, texts, length, cfg.batch_size)
    shown = 0
    for record, p in zip(records, found):
        truth = names.index(record["label"])
        answer = int(p.argmax())
        confusion[truth, answer] += 1
        if truth != answer and shown < cfg.wrong:
            shown += 1
            print(f"{record['text']!r} -> {names[answer]!r}, not {names[truth]!r}",
                  file=sys.stderr)
    print(format_report(names, confusion))
    return confusion.trace().item() / len(records)


def main(cfg: Config) -> float:
    kernels.use(cfg.backend)
    if cfg.limit < 0 or cfg.batch_size < 1 or cfg.max_new_tokens < 1:
        raise UserError("--limit cannot be below 0, --batch_size and --max_new_tokens not below 1")
    directory = checkpoint.resolve(cfg.model or cfg.out_dir, cfg.which)
    tokenizer = checkpoint.load_tokenizer(directory)
    if labels := get_label_ids(tokenizer):
        model = checkpoint.load_model(directory, cfg.device, cfg.dtype)
        return label_texts(cfg, model, tokenizer, labels)
    records = read(cfg)
    model = checkpoint.load_model(directory, cfg.device, cfg.dtype)
    print(f"{directory}: {model.parameter_count():,} parameters, {len(records):,} conversations",
          file=sys.stderr)
    with torch.no_grad():
        said = answers(model, tokenizer, records, cfg.template, cfg.batch_size,
                       cfg.max_new_tokens, cfg.think)
    good = [right(r, text) for r, text in zip(records, said)]
    for r, text in [(r, t) for r, t, ok in zip(records, said, good) if not ok][:cfg.wrong]:
        print(f"{r['messages'][-2]['content']!r} -> {text!r}, not "
              f"{r['messages'][-1]['content']!r}", file=sys.stderr)
    print(table(records, good))
    return sum(good) / len(good)


if __name__ == "__main__":
    run(main, Config)
