"""Conversations in any layout -> rendered, masked, packed batches: the data of every later stage.

    from data import chats
    train, held_out = chats.find("skills")                  # files of a dataset, or one file
    records = chats.read_chats(train)                       # {"messages": [{"role", "content"}…]}
    rendered = chats.render_all(tokenizer, records, "chatml", max_length=257)   # or render_pairs
    batches = chats.Packed(rendered, batch_size=8, block_size=256)
    batches(0)["targets"]                                   # (8, 256), -100 where not trained on

Nothing to run, and the same on every device: sft.py and the stages after it call this. What to
expect of the packing: rows over 90% full where conversations are shorter than half a row (tested,
and printed by the stages), where one conversation a row would mostly be padding.

Three traps that other repositories' users fell into, and what keeps them shut here. A conversation
longer than a row stops some packers forever: it is cut when it is rendered. One without any token
to train on makes a loss 0 / 0: it is skipped, and counted. And ids whose mask takes another way
through the program lose it: here they are one object until they are targets.
"""
from __future__ import annotations

import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Iterable, Iterator

from config import UserError, refuse_to_run

import numpy as np
import torch

from text import chat
from data import loader
from data.layouts import (ADAPTERS, KEPT, KINDS, as_context, conversation,  # noqa: F401
                          preference, render_options)
from data.messages import Messages, Notes
from text import files

ROOT = Path(__file__).resolve().parent.parent
HELD_OUT = 20           # of a file without a validation file every 20th record validates
COLUMNS = ("text", "label")             # of records to classify

# --- files -> records --------------------------------------------------------------------------
def read_chats(path: str | Path, kind: str = "sft", skip_bad: bool | None = False,
               reader: loader.Reader | None = None, notes: Notes | None = None,
               columns: tuple[str, str] = COLUMNS) -> Iterator[dict[str, Any]]:
    """Yield the records of a .jsonl, .json, .csv or .tsv file (.gz or not) in one layout a kind.

    sft {"messages"}, preference {"chosen", "rejected"} or {"messages", "label"}, prompts {"prompt",
    "answer"}, labels {"text", "label"}, from the two columns of that name; "task" and "answer" of a
    record are kept. A bad record is a UserError with file, line and reason; with skip_bad it is
    left out and counted, in the `bad` of the reader that was given. notes: which keys to ignore,
    and what was left out.
    """
    if kind not in ADAPTERS:
        raise UserError(f"unknown kind {kind!r}; choose from {', '.join(KINDS)}")
    reader = reader or loader.Reader(skip_bad)
    notes = notes or Notes()
    adapt = ADAPTERS[kind]
    more: dict[str, Any] = {}
    headerless: tuple[str, ...] = ()
    if kind == "labels":
        more = {"text_key": columns[0], "label_key": columns[1]}
        # UCI's file of SMS has no line that names the columns
        headerless = COLUMNS[::-1] if columns == COLUMNS else ()
    for where, record in reader.records(Path(path), conversations=True, columns=headerless):
        try:
            found = adapt(record, notes, **more)
        except UserError as e:
            reader.fault(f"{where}: {e}")
            continue
        if found is None:                           # counted in notes
            continue
        kept = {k: str(record[k]) for k in KEPT if isinstance(record.get(k), (str, int, float))
                and k not in notes.ignore}
        yield {**kept, **found}


PREFIX = {"preference": "pref_", "prompts": "rl_"}     # of a kind's files, where a folder has more


def find(dataset: str, kind: str = "sft") -> tuple[Path, Path | None]:
    """Return (training file, validation file or None) of a name under data/, a folder, or a
    file."""
    path = Path(dataset).expanduser()
    if path.is_file():
        return path, None
    folder = loader.find(dataset)
    named = folder.parent == loader.ROOT / "data"
    # meta.json is written last: a folder of ours without it is half of a dataset
    ends = (".jsonl", ".json", ".csv", ".tsv", ".jsonl.gz")
    first = PREFIX.get(kind, "")
    # a folder with preferences may hold nothing else, and then calls them train and val
    first = first if any((folder / f"{first}train{end}").is_file() for end in ends) else ""
    found = [next((f for end in ends if (f := folder / f"{first}{split}{end}").is_file()), None)
             for split in ("train", "val")]
    if found[0] is None and (folder / "meta.json").is_file():
        other = next((k for k, start in PREFIX.items()
                      if any((folder / f"{start}train{end}").is_file() for end in ends)), "text")
        raise UserError(f"{folder} holds {other}, not conversations: give a chat dataset, such as "
                        "skills, or a file of conversations")
    if found[0] is None and folder.is_dir():
        # a published set as it was downloaded: which of its files cannot be read, and why
        for path in sorted(folder.rglob("*"))[:9]:
            files.refuse_binary(b"", path)
    if found[0] is None or named and not (folder / "meta.json").is_file():
        raise UserError(f"{folder} is not prepared: run `python data/prepare.py {folder.name}`, or "
                        "give a file of conversations or a folder with train.jsonl")
    return found[0], found[1]


def check_labels(path: Path, records: list[dict]) -> None:
    """Raise UserError where nearly every text has a label of its own: then the columns are
    swapped."""
    labels = {r["label"] for r in records}
    if len(labels) > max(9, len(records) // 2):
        raise UserError(f"{path} has {len(labels):,} labels for {len(records):,} texts, "
                        f"{records[0]['label'][:40]!r} for one: name the columns with --text_key "
                        "and --label_key")


def splits(dataset: str, kind: str = "sft", skip_bad: bool | None = False,
           notes: Notes | None = None, columns: tuple[str, str] = COLUMNS
           ) -> tuple[list[dict], list[dict], int]:
    """Return (training records, validation records, bad ones that were skipped) of a dataset."""
    train, val = find(dataset, kind)
    reader = loader.Reader(skip_bad)
    records = list(read_chats(train, kind, skip_bad, reader, notes, columns))
    if kind == "labels":
        check_labels(train, records)
    if val is None:
        held = records[HELD_OUT - 1::HELD_OUT]
        del records[HELD_OUT - 1::HELD_OUT]
    else:
        held = list(read_chats(val, kind, skip_bad, reader, notes, columns))
    return records, held, reader.bad

# --- records -> ids and masks ------------------------------------------------------------------


class Rendered(list):
    """(ids int32, mask bool) of each conversation, arrays of one length; and what was left out."""
    skipped = 0             # conversations without a token to train on
    cut = 0                 # longer than a row

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.numbers: list[int] = []        # of render_all: the record of each conversation
        self.untold: Counter[str] = Counter()   # why answers are not trained on: how many of them


def render_all(tokenizer: Any, records: Iterable[dict[str, Any]], template: str | None,
               max_length: int) -> Rendered:
    """Render the messages of every record, cut to max_length tokens.

    The mask is true on what the assistants say and on the token that ends it. A conversation
    whose cut leaves none of that (no answer, or a prompt that fills the row) is skipped. One whose
    template drops thoughts of earlier answers is several: each of these ends one of its own.
    """
    out = Rendered()
    for number, record in enumerate(records):
        if not record["messages"]:                  # an empty answer was all there was
            out.skipped += 1
            continue
        options = render_options(record)
        try:
            chat.refuse_unread(tokenizer, template, **options)
            examples, reasons = chat.render_examples(tokenizer, record["messages"], template,
                                                   **options)
        except UserError as e:
            raise UserError(f"conversation {number + 1}: {e}") from None
        out.untold.update(reasons)
        kept = 0
        for ids, mask in examples:
            # the first token has nothing before it that could predict it
            live = np.array(mask[:max_length], dtype=bool)
            live[:1] = False
            if not live.any():
                continue
            kept += 1
            out.cut += len(ids) > max_length
            out.append((np.array(ids[:max_length], dtype=np.int32), live))
            out.numbers.append(number)
        out.skipped += not kept
    return out


def completion(tokenizer: Any, messages: Messages, before: Messages, template: str | None,
               **options: Any) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Return (ids, mask) of a conversation, the mask true on what assistants say after `before`
    alone; and why answers after it are masked all the same."""
    messages = as_context(messages[:len(before)]) + messages[len(before):]
    ids, mask, lost = chat.render(tokenizer, messages, template, **options)
    live = np.array(mask, dtype=bool)
    live[:1] = False
    return np.array(ids, dtype=np.int32), live, list(lost.values())


def render_pairs(tokenizer: Any, records: Iterable[dict[str, Any]], template: str | None,
                 max_length: int) -> Rendered:
    """Render chosen and rejected of every record, one after the other, cut so that both fit into
    max_length tokens: each has half of them, and what the other leaves.

    The mask is true on what the assistants say after the turns that both have in common. A pair is
    skipped whose cut leaves a side without any of that, or both sides the same; and one of whose
    answers the template drops a part: half an answer is not the one that was preferred.
    """
    out = Rendered()
    for number, record in enumerate(records):
        a = record["chosen"]
        b = record["rejected"]
        common = next((k for k, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
        options = render_options(record)
        try:
            chat.refuse_unread(tokenizer, template, **options)
            *sides, reasons = zip(*(completion(tokenizer, messages, a[:common], template, **options)
                                    for messages in (a, b)))
        except UserError as e:
            raise UserError(f"pair {number + 1}: {e}") from None
        out.untold.update(reasons[0] + reasons[1])
        sizes = [len(ids) for ids in sides[0]]
        half = max_length // 2
        room = [min(size, max(half, max_length - other))
                for size, other in zip(sizes, reversed(sizes))]
        cut = [(ids[:n], mask[:n]) for ids, mask, n in zip(*sides, room)]
        if any(reasons) or not all(mask.any() for _, mask in cut) or np.array_equal(
                cut[0][0], cut[1][0]):
            out.skipped += 1
            continue
        out.cut += room != sizes
        out += cut
    return out

# --- ids and masks -> rows -> batches ----------------------------------------------------------


def shuffled(n: int, seed: int, number: int) -> np.ndarray:
    """Permutation `number` of a seed, (n,) int64: raw words of PCG64 never change."""
    words = np.random.PCG64([seed % 2**64, number]).random_raw(n)
    return np.argsort(words, kind="stable")


def first_fit(lengths: Sequence[int], width: int) -> list[int]:
    """Put each length, in order, into the first row of `width` that has room: a row for each.

    >>> first_fit([3, 3, 2, 1, 2], 5)
    [0, 1, 0, 1, 2]

    A tree holds, for every stretch of rows, the most room in it: finding takes log n, not n.
    """
    size = 1 << max(0, len(lengths) - 1).bit_length()
    room = [width] * (2 * size)                     # node i has the children 2i and 2i + 1
    places = []
    for length in lengths:
        if not 0 < length <= width:
            raise ValueError(f"a length of {length} does not fit a row of {width}")
        i = 1
        while i < size:
            i = 2 * i if room[2 * i] >= length else 2 * i + 1
        places.append(i - size)
        room[i] -= length
        while i > 1:
            i //= 2
            room[i] = max(room[2 * i], room[2 * i + 1])
    return places


class Packed:
    """Conversations side by side in rows, and batches of rows as a function of (seed, step).

    A row of T inputs and T targets is T + 1 tokens. Conversations share it without seeing each
    other: `doc` numbers them, and attention stays within a number, where positions start anew.
    Which conversations share a row is drawn once, from the seed; an epoch is a permutation of the
    rows, without replacement.

    unit: so many conversations on end stay together, chosen and rejected, say: any slice of the
    rows, of a rank or a micro-batch, then has whole pairs. columns: numbers that a conversation
    has, as a reference's log-probability, (conversations,); gather() gives them as (B, D).
    """

    def __init__(self, rendered: Sequence[tuple[np.ndarray, np.ndarray]], batch_size: int,
                 block_size: int, seed: int = 1337, pad: int = 0, name: str = "the dataset",
                 unit: int = 1):
        self.kind = "conversation" if unit == 1 else "pair"
        if not rendered:
            raise UserError(f"{name} has no {self.kind} with an answer within {block_size + 1} "
                            "tokens: raise --block_size, or look at it with --show=5")
        if batch_size < 1 or block_size < 1:
            raise UserError(f"batch_size is {batch_size} and block_size {block_size}; both must be "
                            "at least 1")
        self.conversations = rendered
        self.batch_size = batch_size
        self.block_size = block_size
        self.seed = seed
        self.pad = pad
        self.unit = unit
        # the order of a file is often by subject or length: rows take from all of it
        order = shuffled(len(rendered) // unit, seed, 0).tolist()
        members = [range(i * unit, (i + 1) * unit) for i in order]
        places = first_fit([sum(len(rendered[i][0]) for i in m) for m in members],
                           block_size + 1)
        self.rows: list[list[int]] = [[] for _ in range(max(places) + 1)]
        for m, place in zip(members, places):
            self.rows[place] += m
        self.columns: dict[str, np.ndarray] = {}
        self.documents = max(map(len, self.rows))
        self.tokens = sum(len(ids) for ids, _ in rendered)
        self.trained = sum(int(mask.sum()) for _, mask in rendered)
        self.epochs: dict[int, np.ndarray] = {}     # epoch -> rows in the order they are seen

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def fill(self) -> float:
        """Share of the rows' tokens that are not padding."""
        return self.tokens / (len(self.rows) * (self.block_size + 1))

    def summary(self) -> str:
        c = self.conversations
        left = f" ({getattr(c, 'skipped', 0):,} without an answer skipped, " \
               f"{getattr(c, 'cut', 0):,} cut to {self.block_size + 1} tokens)"
        untold = "".join(f"; {n:,} answer{'s' * (n > 1)} not trained on, because {why}"
                         for why, n in getattr(c, "untold", {}).items())
        return (f"{len(c) // self.unit:,} {self.kind}s{left} in {len(self):,} rows, "
                f"{self.fill:.1%} full; "
                f"{self.trained:,} of {self.tokens:,} tokens are trained on{untold}")

    def gather(self, rows: Sequence[int]) -> dict[str, torch.Tensor]:
        """Return rows by number -> {"ids", "targets" (B, T) int64, "doc" (B, T) int32}, and the
        columns (B, D) by document, D the most that a row has; 0 where there is none."""
        B = len(rows)
        T = self.block_size
        ids = np.full((B, T + 1), self.pad, dtype=np.int64)
        live = np.zeros((B, T + 1), dtype=bool)
        doc = np.zeros((B, T + 1), dtype=np.int32)
        for b, row in enumerate(rows):
            at = 0
            for k, i in enumerate(self.rows[row]):
                tokens, mask = self.conversations[i]
                end = at + len(tokens)
                ids[b, at:end] = tokens
                doc[b, at:end] = k
                # what precedes a first token is another conversation's last one
                live[b, at + 1:end] = mask[1:]
                at = end
            doc[b, at:] = len(self.rows[row])       # the padding keeps to itself
        targets = np.where(live, ids, -100)[:, 1:]
        more = {name: np.zeros((B, self.documents), column.dtype)
                for name, column in self.columns.items()}
        for name, column in self.columns.items():
            for b, row in enumerate(rows):
                more[name][b, :len(self.rows[row])] = column[self.rows[row]]
        return {"ids": torch.from_numpy(ids[:, :-1].copy()),
                "targets": torch.from_numpy(targets.copy()),
                "doc": torch.from_numpy(doc[:, :-1].copy()),
                **{name: torch.from_numpy(column) for name, column in more.items()}}

    def epoch(self, number: int) -> np.ndarray:
        """Return the rows of an epoch in the order they are seen."""
        if number not in self.epochs:
            self.epochs[number] = shuffled(len(self.rows), self.seed, number + 1)
            while len(self.epochs) > 2:             # a batch may straddle two
                self.epochs.pop(next(iter(self.epochs)))
        return self.epochs[number]

    def __call__(self, step: int) -> dict[str, torch.Tensor]:
        """The global batch of a step, of batch_size rows."""
        samples = range(step * self.batch_size, (step + 1) * self.batch_size)
        places = [divmod(sample, len(self.rows)) for sample in samples]
        return self.gather([int(self.epoch(number)[place]) for number, place in places])

    def fixed(self, batch_size: int, rows: int) -> "Fixed":
        """Return up to `rows` rows, the same in every run and for every batch_size: evenly spaced,
        none twice."""
        rows = min(len(self), rows)
        numbers = [k * len(self) // rows for k in range(rows)]
        return Fixed(self, [numbers[i:i + batch_size] for i in range(0, rows, batch_size)])


class Fixed(Sequence):
    """Given rows as a sequence of batches, gathered when they are asked for."""

    def __init__(self, packed: Packed, rows: list[list[int]]):
        self.packed = packed
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        return self.packed.gather(self.rows[i])

# --- to look at --------------------------------------------------------------------------------
TRAINED = "\x1b[30;102m"
CONTEXT = "\x1b[2m"
PLAIN = "\x1b[0m"


def show(tokenizer: Any, batch: dict[str, torch.Tensor], color: bool | None = None) -> str:
    """Return the rows of a batch as text: what is trained on is green, or between ⟦ and ⟧.

    Made from ids and targets, which are all that the model gets: what is seen here is trained on.
    color None: on a terminal, unless NO_COLOR is set.
    """
    if color is None:
        color = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    lines = []
    for b, (ids, targets, doc) in enumerate(zip(*(batch[k].tolist() for k in
                                                  ("ids", "targets", "doc")))):
        # token t is predicted at t - 1; the last one is no input, and there only as a target
        live = [False] + [t >= 0 for t in targets]
        ids = ids + [max(targets[-1], 0)]
        doc = doc + [doc[-1]]
        size = len(ids) if live[-1] else len(ids) - 1
        for number in dict.fromkeys(doc):
            span = [t for t in range(size) if doc[t] == number]
            trained = sum(live[t] for t in span)
            if not trained:                         # every conversation has an answer
                lines.append(f"--- row {b}: {len(span)} tokens of padding")
                continue
            name = f"conversation {number}"
            if "label" in batch:
                name += f", {'desirable' if batch['label'][b][number] else 'undesirable'}"
            elif "reference" in batch:
                name = f"pair {number // 2}, {('chosen', 'rejected')[number % 2]}"
            lines.append(f"--- row {b}, {name}: {len(span)} tokens, {trained} of them trained on")
            lines.append("".join(
                paint(readable(tokenizer.decode([ids[t] for t in run])), live[run[0]], color)
                for run in runs(span, live)))
    return "\n".join(lines)


def runs(span: list[int], live: list[bool]) -> Iterator[list[int]]:
    """Yield the places of a span in stretches of equal `live`."""
    run: list[int] = []
    for t in span:
        if run and live[t] != live[run[0]]:
            yield run
            run = []
        run.append(t)
    if run:
        yield run


def readable(text: str) -> str:
    """Without the characters that a terminal would obey."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda m: repr(m.group())[1:-1], text)


def paint(text: str, trained: bool, color: bool) -> str:
    if not color:
        return f"⟦{text}⟧" if trained else text
    mark = TRAINED if trained else CONTEXT
    # a background that is on at a newline would run to the edge of the terminal
    return mark + text.replace("\n", f"⏎{PLAIN}\n{mark}" if trained else "\n") + PLAIN


if __name__ == "__main__":
    refuse_to_run()
