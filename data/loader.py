"""Token shards on disk -> batches: the same (seed, step) gives the same batch everywhere.

`data/prepare.py` writes a dataset once; training reads it through two small classes:

    from data import loader
    dataset = loader.Dataset(loader.find("stdlib"))
    batches = loader.Batches(dataset.tokens("train"), batch_size=12, block_size=64, seed=1337)
    batches(0)["ids"].shape                 # torch.Size([12, 64]), the batch of step 0

Here too is how text files are read (`Reader`), for prepare.py and every stage with its own data.
`Batches` has no cursor. A step is looked up, never reached: to resume at step 700 is to call
`batches(700)`, and 1, 2 or 8 ranks that each take their slice of the global batch see, together,
the same tokens. The shards are memory-mapped, so a corpus larger than memory costs no more than
the rows in use.
"""
from __future__ import annotations

import csv
import gzip
import json
import os
import re
import zlib
from collections import Counter
from pathlib import Path
from typing import Any, Iterator

from config import UserError, refuse_to_run
from data.shards import Shard

import numpy as np
import torch

from text import files

ROOT = Path(__file__).resolve().parent.parent
VERSION = 1                             # of the layout: meta.json and the shards beside it
DTYPES = ("uint16", "uint32")           # 16 bits hold ids below 65,536; nothing else is written

# --- text files --------------------------------------------------------------------------------
BLOCK = 1 << 20                         # bytes read at once: the unit of memory
LONGEST = 1 << 26                       # a line or JSON value beyond this is a broken file


def kind_of(path: str | Path) -> str:
    """The suffix that says how to read a file: ".jsonl" for a.jsonl and for a.jsonl.gz."""
    return os.path.splitext(str(path).lower().removesuffix(".gz"))[1]


def read_text(path: Path, limit: int = LONGEST) -> str:
    """The UTF-8 text of a settings file; UserError if it is no plain file, or larger than that."""
    if path.exists() and not path.is_file():            # a pipe would be waited for indefinitely
        raise UserError(f"{path} is not a plain file: copy it again")
    if path.stat().st_size > limit:
        raise UserError(f"{path} has {path.stat().st_size:,} bytes, too many for such a file: "
                        "copy it again")
    return path.read_text(encoding="utf-8")


def cut_at(text: str) -> int:
    """Where to cut, near the end of `text`, so that the halves encode as the whole would.

    Behind a newline that stands between a visible character and a letter or digit: no split
    pattern joins across that point or looks ahead over it, so no token crosses it. Failing that
    behind any newline, any space, or the end: then a token or two differ, and nothing is lost.
    """
    for mark in (r"\S\n(?=[^\W_])", r"\n", r" "):
        if found := re.compile(mark).search(text, max(0, len(text) - (1 << 16))):
            return found.end()
    return len(text)


class Reader:
    """Text, JSON, CSV and .gz of them as streams; what is broken is named by file and line.

    `consumed` counts the bytes taken from the disk so far, for a progress line. With skip_bad,
    broken bytes and records are dropped and counted in `bad`; without it they are a UserError,
    which names that setting where the caller has one (None: it has not).
    """

    def __init__(self, skip_bad: bool | None = False):
        self.skip_bad, self.bad, self.consumed = skip_bad, 0, 0

    def fault(self, what: str) -> None:
        if not self.skip_bad:
            raise UserError(what if self.skip_bad is None else
                            f"{what} (--skip_bad=1 drops and counts what is broken)")
        self.bad += 1

    def blocks(self, path: Path) -> Iterator[str]:
        """A file's text in blocks of about BLOCK characters; its encoding is text/files.py's."""
        packed = Path(path).suffix.lower() == ".gz"
        before = self.consumed
        decode = files.Decoder(path, self.fault)
        held = ""
        with open(path, "rb") as raw, (gzip.open(raw) if packed else raw) as f:
            while True:
                try:
                    block = f.read(BLOCK)
                except (EOFError, zlib.error, gzip.BadGzipFile) as e:
                    raise UserError(f"{path} is not a complete gzip file: {e}") from None
                self.consumed = before + raw.tell()
                held += decode(block)
                if len(held) >= BLOCK // 2:
                    at = cut_at(held)
                    yield held[:at]
                    held = held[at:]
                if not block:
                    if held:
                        yield held
                    return

    def lines(self, path: Path) -> Iterator[str]:
        """The lines of a file, each with its newline."""
        rest = ""
        for block in self.blocks(path):
            *whole, rest = (rest + block).split("\n")   # splitlines() would break at U+2028 too
            yield from (line + "\n" for line in whole)
            if len(rest) > LONGEST:
                raise UserError(f"{path} has a line of more than {LONGEST:,} characters")
        if rest:
            yield rest

    def json_values(self, path: Path, conversations: bool = False) -> Iterator[tuple[int, Any]]:
        """(line, value) of JSON lines, of one array, or of values spread over several lines.

        All of these are values with space, commas and the array's brackets between them. What
        does not parse may only be incomplete: more is read before it counts as broken.
        conversations: a list of messages is one value (nanochat writes one a line), and an object
        that has a key twice, of which JSON would keep the last, is a fault.
        """
        twice: list[str] = []

        def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
            value = dict(found)
            if len(value) < len(found):
                twice.append(next(k for k, _ in found if sum(k == other for other, _ in found) > 1))
            return value

        decoder = json.JSONDecoder(object_pairs_hook=pairs if conversations else None)
        gap = re.compile(r"[ \t\r\n,]*")
        begins = re.compile(r"\[[ \t\r\n]*(\{|\Z)")
        blocks = self.blocks(path)
        buffer = ""
        at = 0
        line = 1
        depth = 0
        ended = False
        empty = False               # whether the last bracket opened an array without a value yet
        while True:
            start = gap.match(buffer, at).end()
            line = line + buffer.count("\n", at, start)
            at = start
            talk = False
            bracket = buffer[start:start + 1]
            opens = begins.match(buffer, start) if conversations else None
            if bracket == "[" and not opens:                        # around records
                depth += 1
                at = start + 1
                empty = True
                continue
            if bracket == "]":
                if not depth or empty and depth > 1:
                    self.fault(f"{path}, line {line}: {'an empty array' if depth else ']'} where "
                               "a JSON object should be")
                depth = max(0, depth - 1)
                at = start + 1
                empty = False
                continue
            try:
                if opens:           # an array of records, or a conversation: its first object says
                    first, _ = decoder.raw_decode(buffer, opens.start(1))
                    if not (talk := is_message(first)):
                        depth = depth + 1
                        at = start + 1
                        continue
                twice.clear()
                value, at = decoder.raw_decode(buffer, start)
                if twice:
                    self.fault(f"{path}, line {line}: the key {twice[0]!r} comes twice")
                else:
                    yield line, value
                empty = False
                line += buffer.count("\n", start, at)
                continue
            except (ValueError, RecursionError) as e:       # RecursionError: "[[[[[[[[[[…"
                problem = getattr(e, "msg", "nested too deeply")
            # what is incomplete belongs to one value, which would be parsed again with more of it
            if not ended and len(buffer) - start >= BLOCK // 2 \
                    and files.count_containers(buffer[start:]) > files.CONTAINERS:
                raise UserError(f"{path}, line {line}: a record of more than "
                                f"{files.CONTAINERS:,} lists and objects; split it")
            if not ended and len(buffer) - start < LONGEST:
                # at least double what is there, so that parsing again stays linear
                more = [buffer[start:]]
                want = len(buffer) - start + 1
                while want > 0 and not ended:
                    more.append(next(blocks, ""))
                    want = want - len(more[-1])
                    ended = not more[-1]
                buffer = "".join(more)
                at = 0
            elif opens and not talk:
                depth = depth + 1
                at = start + 1
            elif start < len(buffer):
                self.fault(f"{path}, line {line}: not JSON, {problem}")
                at = buffer.find("\n", start)               # go on with the next line
                at = at if at >= 0 else len(buffer)
            else:
                if depth:
                    self.fault(f"{path}, line {line}: the array has no end, the file is cut off")
                return

    def csv_rows(self, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
        """(line, row) of a file with commas, whose first line names the columns."""
        csv.field_size_limit(LONGEST)       # the default stops at 128 kB, less than a long text
        rows = csv.DictReader(self.lines(path), strict=True)
        try:
            header = list(rows.fieldnames or ())
            if len(header) == 1 and (other := re.search(r"[;\t|]", header[0])):
                raise UserError(f"{path}: expected commas between columns, and the first line has "
                                f"{other[0]!r}: save it with commas, or as .tsv with tabs")
            rows.fieldnames = column_names(header, path)
            for row in rows:
                if None in row:             # more fields than the header has
                    self.fault(f"{path}, line {rows.line_num}: {len(header) + len(row[None])} "
                               f"columns, and the first line has {len(header)}")
                    continue
                yield rows.line_num, row
        except csv.Error as e:
            raise UserError(f"{path}, line {rows.reader.line_num}: {e}") from None

    def tsv_rows(self, path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, dict]]:
        """(line, row) of a file with tabs: the first line names the columns.

        columns: names of two columns that need no such line (UCI's SMSSpamCollection has none).
        Quotes are text, as IANA's text/tab-separated-values has it, but for a field that a CSV
        writer has clearly quoted.
        """
        names = []                          # bare: first columns of a file without a header
        bare = Counter()
        for number, line in enumerate(self.lines(path), 1):
            line = line.rstrip("\r\n")
            if not line:
                continue
            fields = line.split("\t")
            if not names:
                known = {name.strip().lower() for name in fields} & {*columns}
                if len(fields) != len(columns) or known:
                    names = column_names(fields, path)
                    continue
                names = list(columns)
                first = (number, *fields)
                bare[fields[0]] = 0
            if bare:                        # a tab in the last column is text
                fields = line.split("\t", len(names) - 1)
                bare[fields[0]] += 1
            if len(fields) != len(names):
                self.fault(f"{path}, line {number}: {len(fields)} columns, and the first line has "
                           f"{len(names)}")
                continue
            yield number, dict(zip(names, map(unquoted, fields)))
        if bare and bare[first[1]] == 1 < bare.total():
            raise UserError(f"{path}, line {first[0]}: {first[1]!r} is no other line's "
                            f"{columns[0]}; if this line names the columns, say which are meant "
                            f"with --{columns[0]}_key and --{columns[1]}_key")

    def form(self, path: Path) -> str:
        """How the records of a file are written, by its suffix or else by its first character."""
        suffix = kind_of(path)
        known = {".csv": "csv", ".tsv": "tsv", ".tab": "tsv", ".json": "json", ".jsonl": "json",
                 ".ndjson": "json"}
        if suffix in known:
            return known[suffix]
        before = self.consumed
        start = next(Reader(skip_bad=True).blocks(path), "")
        self.consumed = before
        if start.lstrip()[:1] in ("{", "[", ""):
            return "json"
        if "\t" in start.lstrip().partition("\n")[0]:
            return "tsv"
        raise UserError(f"{path} holds no records that can be read: expected JSON lines, JSON, "
                        "CSV (.csv) or tab-separated lines (.tsv)")

    def records(self, path: Path, conversations: bool = False, columns: tuple[str, ...] = ()
                ) -> Iterator[tuple[str, dict[str, Any]]]:
        """("FILE, line N", record) of a .json, .jsonl, .csv or .tsv file, .gz or not.

        conversations: a list of messages is a record, {"messages": list}.
        columns: names for the columns of a .tsv file that does not name them.
        """
        form = self.form(path)
        if form != "json":
            rows = self.csv_rows(path) if form == "csv" else self.tsv_rows(path, columns)
            for line, row in rows:
                yield f"{path}, line {line}", row
            return
        for line, value in self.json_values(path, conversations):
            if isinstance(value, list):
                value = {"messages": value}
            if isinstance(value, dict):
                yield f"{path}, line {line}", value
            else:
                self.fault(f"{path}, line {line}: a {type(value).__name__} where a JSON "
                           "object should be")


def is_message(value: Any) -> bool:
    """Tell whether a JSON value is one turn of a conversation, and not a record."""
    return isinstance(value, dict) and ("role" in value and (
        "content" in value or "tool_calls" in value) or "from" in value and "value" in value)


def column_names(header: list[str], path: Path) -> list[str]:
    """The names of columns, those without one by their number; UserError for one that is twice."""
    names = [name.strip() or f"column {k}" for k, name in enumerate(header, 1)]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"{path}: two columns are named {twice[0]!r}: rename one of them")
    return names


def unquoted(field: str) -> str:
    """A field without the quotes of a CSV writer, who doubles those inside; others unchanged."""
    inner = field[1:-1]
    quoted = len(field) > 1 and field[0] == field[-1] == '"' and '""' in inner
    return inner.replace('""', '"') if quoted and '"' not in inner.replace('""', "") else field


# --- a prepared directory ----------------------------------------------------------------------
def find(dataset: str) -> Path:
    """The directory of a dataset: a path as it is, or a name under the repository's data/."""
    path = Path(dataset).expanduser()
    # A bare name means data/<name>, even where the working directory has a folder so called,
    # unless that folder is a prepared dataset itself.
    try:
        bare = len(path.parts) == 1 and not (path / "meta.json").is_file()
    except OSError as e:                # a name that is too long
        raise UserError(f"--dataset={dataset} cannot be a folder: {e.strerror}") from None
    return ROOT / "data" / path if bare else path


def read_count(values: dict[str, Any], key: str, most: int = 1 << 62) -> int:
    """Return the number under a key of meta.json; ValueError unless it is one, from 0 to `most`."""
    if type(values[key]) is not int or not 0 <= values[key] <= most:
        raise ValueError(f"{key}: {values[key]!r:.40}")
    return values[key]


class Dataset:
    """A directory that data/prepare.py finished: `meta`, `vocab_size`, `eot`, tokens(split)."""

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        # meta.json is written last of all files, so where it lies the dataset is complete.
        try:
            self.meta = json.loads(read_text(self.directory / "meta.json"))
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(f"{self.directory} is not prepared: run `python data/prepare.py "
                            f"{self.directory.name}`") from None
        except OSError as e:                # a name that is too long, a link to itself
            raise UserError(f"cannot read {self.directory / 'meta.json'}: {e.strerror}") from None
        except (ValueError, RecursionError):
            raise self.damaged("meta.json is not JSON") from None
        try:
            if self.meta.get("kind"):           # skills.py's and public.py's: no tokens
                raise UserError(f"{self.directory} holds records for a later stage, not tokens to "
                                f"train on: use `python {self.meta.get('script', 'sft.py')!s:.40} "
                                f"--dataset={self.directory.name}`")
            if self.meta["version"] != VERSION:
                raise self.damaged(f"meta.json has version {self.meta['version']!r:.40}, this code "
                                   f"reads {VERSION}")
            self.vocab_size = read_count(self.meta, "vocab_size")
            # the end-of-text id opens every document; a character dataset has none
            self.eot = None
            if self.meta["eot"] is not None:
                self.eot = read_count(self.meta, "eot", self.vocab_size - 1)
            self.shards = {}
            for split, about in self.meta["splits"].items():
                shards = [(str(s["file"]), read_count(s, "tokens")) for s in about["shards"]]
                if sum(count for _, count in shards) != read_count(about, "tokens"):
                    raise ValueError(f"shards of {split}")
                self.shards[split] = shards
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise self.damaged(f"meta.json lacks or garbles {str(e)[:200]}") from None

    def damaged(self, what: str) -> UserError:
        return UserError(f"{self.directory}: {what}; run `python data/prepare.py` with --force=1 "
                         "to build it again")

    def check_tokenizer(self, tokenizer: Any) -> None:
        """Raise UserError unless meta.json and the tokenizer beside it are of one dataset."""
        for name in ("vocab_size", "eot"):
            ours = getattr(self, name)
            theirs = getattr(tokenizer, name)
            if ours != theirs:
                raise self.damaged(f"meta.json says {name} = {ours}, its tokenizer {theirs}")

    def tokens(self, split: str) -> "Tokens":
        """The "train" or "val" split as one memory-mapped sequence of ids."""
        if split not in self.shards:
            raise UserError(f"{self.directory} has no split {split!r}; it has "
                            f"{', '.join(self.shards)}")
        return Tokens(self, split)


class Tokens:
    """The shards of one split as one long sequence: len(tokens), tokens.read(start, n)."""

    def __init__(self, dataset: Dataset, split: str):
        self.dataset = dataset
        self.split = split
        self.shards = [self.open(name, count) for name, count in dataset.shards[split]]
        # ends[i] is the position just behind shard i: where a read has to change shards
        self.ends = np.cumsum([len(s) for s in self.shards], dtype=np.int64)

    def open(self, name: str, count: int) -> Shard:
        """Open one shard, refusing whatever is not exactly what meta.json says."""
        # meta.json may come from anywhere: a name must not lead out of the directory
        if not name or Path(name).name != name:
            raise self.dataset.damaged(f"{name!r:.80} is not the name of a shard")
        path = self.dataset.directory / name
        try:
            if not path.is_file():          # nor a folder, a pipe, or a link that leads nowhere
                raise self.dataset.damaged(f"{name} is missing")
            shard = np.load(path, mmap_mode="r", allow_pickle=False)
        except UserError:
            raise
        # foreign bytes, fewer than announced: NumPy's reader of headers raises anything at all
        except Exception:
            raise self.dataset.damaged(f"{name} is truncated or is no .npy file") from None
        if not isinstance(shard, np.ndarray) or shard.ndim != 1 or shard.dtype.name not in DTYPES:
            raise self.dataset.damaged(f"{name} does not hold one row of 16 or 32 bit ids")
        if len(shard) != count:
            raise self.dataset.damaged(f"{name} holds {len(shard)} tokens, meta.json says {count}")
        return Shard(path, shard.dtype, shard.offset, count)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def read(self, start: int, n: int) -> np.ndarray:
        """Ids start .. start + n as (n,) int64, across shard borders; all below vocab_size."""
        if start < 0 or n < 0 or start + n > len(self):
            raise IndexError(f"tokens {start}..{start + n} of {len(self)}")
        out = np.empty(n, dtype=np.int64)
        done = 0
        i = int(np.searchsorted(self.ends, start, side="right"))
        while done < n:
            begin = start + done - (int(self.ends[i]) - len(self.shards[i]))
            part = self.shards[i].read(begin, n - done)
            if len(part) < min(n - done, len(self.shards[i]) - begin):
                raise self.dataset.damaged(f"{self.dataset.shards[self.split][i][0]} was cut while "
                                           "it was read")
            out[done:done + len(part)] = part
            done = done + len(part)
            i = i + 1
        # An id past the embedding's last row is a crash deep inside a kernel; caught here, it is
        # a sentence. One max() a row costs nothing beside the model.
        if n and out.max() >= self.dataset.vocab_size:
            raise self.dataset.damaged(f"the {self.split} split holds the id {out.max()}, and its "
                                       f"vocabulary ends at {self.dataset.vocab_size - 1}")
        return out


# --- windows -> tensors ------------------------------------------------------------------------
def windows_in(tokens: Tokens, block_size: int) -> int:
    """How many windows of block_size inputs, each with a target, lie side by side in a split."""
    if block_size < 1:
        raise UserError(f"block_size is {block_size}; a window needs at least 1 token")
    count = (len(tokens) - 1) // block_size         # the last target needs one token more
    if count < 1:
        raise UserError(f"the {tokens.split} split of {tokens.dataset.directory} has "
                        f"{len(tokens)} tokens, too few for one window of block_size {block_size} "
                        f"and its target: lower --block_size or prepare more text")
    return count


def gather(tokens: Tokens, starts: np.ndarray, block_size: int,
           eot: int | None = None) -> dict[str, torch.Tensor]:
    """Cut the windows at `starts` (B,) into {"ids", "targets": (B, T) int64[, "doc"]}.

    With `eot`, "doc" (B, T) int32 numbers the documents inside each row from 0: the end-of-text
    id opens a document, so the number is the count of them so far, and attention that stays
    within equal numbers never looks across a border.
    """
    rows = np.empty((len(starts), block_size + 1), dtype=np.int64)
    for row, start in zip(rows, starts.tolist()):
        row[:] = tokens.read(start, block_size + 1)
    rows = torch.from_numpy(rows)                                       # (B, T+1)
    # contiguous: a rank's slice goes to the GPU in one copy, and kernels want stride 1
    batch = {"ids": rows[:, :-1].contiguous(), "targets": rows[:, 1:].contiguous()}
    if eot is not None:
        batch["doc"] = (batch["ids"] == eot).cumsum(1, dtype=torch.int32)
    return batch


def mask_eot(tokens: Tokens, eot: int | None, documents: bool) -> int | None:
    """The id that separates documents, or None when no document numbers are wanted."""
    if documents and eot is None:
        raise UserError(f"{tokens.dataset.directory} has no end-of-text id (its tokenizer is by "
                        "character), so documents cannot be told apart: use --document_mask=0")
    return eot if documents else None


class Batches:
    """Global training batches as a function of (seed, step), for ever.

    An epoch is a permutation of `windows` non-overlapping windows of block_size tokens: without
    replacement, so that every window is seen once before any is seen twice (nanoGPT draws with
    replacement, and after one epoch's worth of draws has missed 37% of its windows). Every epoch
    moves the grid by another offset, so that windows begin at other tokens each time around.
    Step s takes samples s*B .. s*B + B - 1 of the endless concatenation of epochs.
    """

    def __init__(self, tokens: Tokens, batch_size: int, block_size: int, seed: int = 1337,
                 eot: int | None = None, documents: bool = False):
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}; it must be at least 1")
        self.tokens = tokens
        self.batch_size = batch_size
        self.block_size = block_size
        self.seed, self.eot = seed % 2**64, mask_eot(tokens, eot, documents)
        # One window of the grid is given up to leave room for offsets 0 .. block_size - 1: the
        # count is then the same in every epoch. A split of a single window has nothing to give.
        self.windows = max(1, windows_in(tokens, block_size) - 1)
        self.offsets = min(block_size, len(tokens) - self.windows * block_size)
        self.epochs: dict[int, np.ndarray] = {}     # epoch -> starts of its windows, in order

    def epoch(self, number: int) -> np.ndarray:
        """Where the windows of an epoch start, in the order they are seen: (windows,) int64."""
        if number not in self.epochs:
            # The raw words of PCG64 are fixed by its definition; Generator.permutation and
            # .integers may change with NumPy (NEP 19), and with them every run's data order.
            words = np.random.PCG64([self.seed, number]).random_raw(self.windows + 1)
            order = np.argsort(words[1:], kind="stable")
            offset = int(words[0] % np.uint64(self.offsets))
            self.epochs[number] = offset + order * self.block_size
            # a batch may straddle two epochs; older ones are cheap to make again
            while len(self.epochs) > 2:
                self.epochs.pop(next(iter(self.epochs)))
        return self.epochs[number]

    def __call__(self, step: int) -> dict[str, torch.Tensor]:
        """The batch of a step: {"ids": (B, T) int64, "targets": (B, T) int64[, "doc": int32]}."""
        starts = np.empty(self.batch_size, dtype=np.int64)
        done = 0
        sample = step * self.batch_size
        while done < self.batch_size:       # once, or once more for every epoch that ends here
            number, place = divmod(sample + done, self.windows)
            part = self.epoch(number)[place:place + self.batch_size - done]
            starts[done:done + len(part)] = part
            done += len(part)
        return gather(self.tokens, starts, self.block_size, self.eot)


class FixedBatches:
    """Given windows as a sequence of batches: len, [i] and iteration; cut when asked for.

    A list would do, but 200 batches of a large model are hundreds of megabytes.
    """

    def __init__(self, tokens: Tokens, starts: np.ndarray, batch_size: int, block_size: int,
                 eot: int | None):
        self.tokens = tokens
        self.starts = starts
        self.eot = eot
        self.batch_size = batch_size
        self.block_size = block_size

    def __len__(self) -> int:
        return -(-len(self.starts) // self.batch_size)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        if not 0 <= i < len(self):
            raise IndexError(i)             # this is also what ends a for loop over the sequence
        starts = self.starts[i * self.batch_size:(i + 1) * self.batch_size]
        return gather(self.tokens, starts, self.block_size, self.eot)


def eval_batches(tokens: Tokens, batch_size: int, block_size: int, rows: int,
                 eot: int | None = None, documents: bool = False) -> FixedBatches:
    """Up to `rows` windows of a split, the same in every run: a fixed sample to score.

    The windows are evenly spaced over the whole split and none comes twice, so a short split
    gives fewer. Which ones they are does not depend on batch_size, the number that goes through the
    model at once: a validation loss is the same for all of them.
    """
    if batch_size < 1 or rows < 1:
        raise UserError(f"batch_size is {batch_size} and there are {rows} rows to validate on "
                        "(eval_iters); both must be at least 1")
    whole = windows_in(tokens, block_size)
    count = min(whole, rows)
    # whole >= count, so neighbours are at least one window apart: no duplicates
    starts = np.arange(count, dtype=np.int64) * whole // count * block_size
    return FixedBatches(tokens, starts, batch_size, block_size, mask_eot(tokens, eot, documents))


if __name__ == "__main__":
    refuse_to_run()
