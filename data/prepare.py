"""Text -> token shards, once: `python data/prepare.py [name | file | folder | glob | URL …]`

    python data/prepare.py                              # stdlib: Python's own source, no download
    python data/prepare.py shakespeare_char --file=input.txt      # nanoGPT's first dataset
    python data/prepare.py notes/ 'logs/*.txt.gz' --out=data/mine --vocab_size=8192
    python data/prepare.py fineweb --shards=10          # 1 billion GPT-2 tokens, already encoded

No GPU is used, however many there are; encoding takes every core. The number to expect: stdlib is
12 MB in 700 documents, and takes about 10 seconds on two cores, most of them spent training its
byte-level BPE of 16,384 entries.

Written are data/<dataset>/{train,val}_00000.npy (uint16, or uint32 from 65,537 entries on),
tokenizer.json and, last of all, meta.json: where it lies, the dataset is complete. The end-of-text
id opens each document. The text is read as a stream, three times: to count it, to train the
tokenizer, to encode it; memory stays the same however large it is. Inputs: .jsonl and .json (the
key `text`), .csv (the column `text`), any other file as one document of UTF-8 text, .gz of those.
"""
from __future__ import annotations

import codecs
import contextlib
import csv
import glob
import gzip
import hashlib
import json
import os
import re
import shutil
import sys
import sysconfig
import time
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Iterable, Iterator
from urllib.parse import urlsplit

import numpy as np
import requests

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT)) if str(ROOT) not in sys.path else None
import tokenizer as tokenizers  # noqa: E402  (ours; found only once the root is on the path)
from config import UserError, run  # noqa: E402
from data import loader  # noqa: E402


@dataclass
class Config:
    # words that name the text: a dataset, files, folders, globs or URLs
    source: list[str] = field(default_factory=lambda: ["stdlib"])  # what to prepare
    out: str = ""                       # directory to write; default data/<name of the source>
    file: str = ""                      # a copy of shakespeare's text that you already have
    # --- tokens
    tokenizer: str = ""                 # bpe (trained here), char, a directory, or a name such as gpt2
    vocab_size: int = 16384             # entries of a bpe trained here, <|endoftext|> included
    pattern: str = "gpt2"               # how a bpe trained here splits text: gpt2 or cl100k
    tokenizer_chars: int = 1_000_000_000  # train the tokenizer on at most so many characters
    shard_tokens: int = 100_000_000     # tokens of a shard file
    # --- documents
    val_fraction: float = 0.1           # share of the documents kept for validation
    seed: int = 1337                    # which documents those are
    key: str = "text"                   # key (.json, .jsonl) or column (.csv) that holds the text
    separator: str = ""                 # a text that separates documents inside a text file
    skip_bad: bool = False              # drop invalid bytes and lines, and count them
    # --- how
    shards: int = 1                     # fineweb: how many of its 103 training shards
    workers: int = 0                    # threads that encode; 0: one for each core
    force: bool = False                 # build again what is already there
    cache: str = ""                     # where downloads are kept; default data/.cache
    mirror: str = ""                    # URL of a folder that holds copies of a named dataset's files


HUB = "https://huggingface.co/datasets"
EOT = "<|endoftext|>"


@dataclass(frozen=True)
class Named:
    """A corpus with a name: its files, and how those who made it cut and encode it."""
    train: tuple[str, ...] = ()         # URLs; #sha256=… is checked
    val: tuple[str, ...] = ()           # its own validation text; none: split by document
    tokenizer: str = "bpe"
    separator: str = ""


SHAKESPEARE = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/"
               "input.txt#sha256=86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed")
STORIES = HUB + "/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-{}.txt"
FINEWEB = HUB + "/kjj0/fineweb10B-gpt2/resolve/main/fineweb_{}_{:06d}.bin"
FINEWEB_SHARDS = 103
# Thirty novels that are downloaded most, from Pride and Prejudice to Grimms' Fairy Tales.
BOOKS = (1342, 84, 11, 1661, 2701, 98, 345, 174, 1400, 76, 74, 2600, 2554, 4300, 1260, 768, 161,
         158, 145, 28054, 996, 1184, 135, 36, 35, 120, 1232, 5200, 1497, 2591)
NAMES = {
    "stdlib": Named(),
    "shakespeare_char": Named((SHAKESPEARE,), tokenizer="char"),
    "shakespeare": Named((SHAKESPEARE,), tokenizer="gpt2"),
    "tinystories": Named((STORIES.format("train"),), (STORIES.format("valid"),), separator=EOT),
    "gutenberg": Named(tuple(f"https://www.gutenberg.org/cache/epub/{n}/pg{n}.txt"
                             for n in BOOKS)),
    "fineweb": Named(tuple(FINEWEB.format("train", i) for i in range(1, FINEWEB_SHARDS + 1)),
                     (FINEWEB.format("val", 0),), "gpt2"),
}
TEXT = (".txt", ".md", ".py", ".jsonl", ".json", ".csv")    # what is picked up from a folder
PIECE = 1 << 20             # characters (or bytes) handled at once: the unit of memory
LONGEST = 1 << 26           # a JSON value or CSV row beyond this is a broken file, not a document


# --- progress ----------------------------------------------------------------------------------
class Progress:
    """`what  42% of 12.1 MB  8.9 MB/s  1 s left` on stderr: one live line, or few in a log."""

    def __init__(self, what: str, total: float, unit: str = "MB", scale: float = 1e6):
        self.what, self.total, self.unit, self.scale = what, total, unit, scale
        self.start, self.live = time.monotonic(), sys.stderr.isatty()
        self.next = self.start + (0 if self.live else 10)   # a short job leaves one line in a log

    def __call__(self, done: float, last: bool = False) -> None:
        now = time.monotonic()
        if now < self.next and not last:
            return
        self.next = now + (0.2 if self.live else 10)
        seconds = max(now - self.start, 1e-9)
        rate = done / seconds
        line = f"{self.what:<20} {done / self.scale:,.1f} {self.unit}"
        if self.total:
            line += f"  {min(100.0, 100 * done / self.total):.0f}%"
        line += f"  {rate / self.scale:,.1f} {self.unit}/s"
        if last:
            line += f"  in {seconds:.1f} s"
        elif self.total and rate:
            line += f"  {max(0.0, self.total - done) / rate:,.0f} s left"
        # \x1b[K wipes what a longer line left behind
        print(f"\r{line}\x1b[K" if self.live else line, end="\n" if last or not self.live else "",
              file=sys.stderr, flush=True)


def note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


# --- downloads ---------------------------------------------------------------------------------
PATIENCE = (1, 2, 4, 8)     # seconds between attempts; a server's Retry-After wins


def hash_file(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal, as `sha256sum` prints it."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(PIECE):
            digest.update(block)
    return digest.hexdigest()


def download(url: str, folder: Path) -> Path:
    """Fetch `url` into `folder` once, resuming what an earlier run began; return its path.

    The bytes gather in NAME.part, with what identifies them (ETag, size) in NAME.part.json; only
    a complete file with the right hash gets its name. UserError: no network, 404, wrong hash.
    """
    url, _, fragment = url.partition("#")
    parts = urlsplit(url)
    # The server's name for a file must not choose where it lands: letters, digits, dot and dash.
    base = re.sub(r"[^\w.-]+", "_", parts.path.rsplit("/", 1)[-1]).lstrip(".") or "download"
    target = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{base}"
    if target.is_file():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    part, problem, answered, delay = target.with_name(target.name + ".part"), "", False, 0.0
    for attempt in range(len(PATIENCE) + 1):
        if attempt:
            wait = delay or PATIENCE[attempt - 1]
            note(f"{base}: {problem}; trying again in {wait:.0f} s")
            time.sleep(wait)
        try:
            problem, delay = fetch(url, part, base)
            answered = True
        except (requests.ConnectionError, requests.Timeout,
                requests.exceptions.ChunkedEncodingError) as e:
            problem, delay = f"the connection failed ({type(e).__name__})", 0.0
        except requests.RequestException as e:      # not a URL, too many redirects, …
            raise UserError(f"{url} cannot be fetched: {e}") from None
        if not problem:
            break
    else:
        if not answered and not part.is_file():
            raise UserError(f"cannot reach {parts.hostname}: is there a network? Download {url} "
                            "elsewhere and pass the file (shakespeare: --file=PATH), or run "
                            "`python data/prepare.py`, which needs none")
        raise UserError(f"{url} failed {len(PATIENCE) + 1} times, last because {problem}; what has "
                        "arrived is kept, and the same command goes on from there")
    want = fragment.removeprefix("sha256=")
    if want and hash_file(part) != want.lower():
        part.unlink()
        raise UserError(f"{url} is not the file it should be: its sha256 is not {want}; nothing "
                        "of it was kept")
    os.replace(part, target)
    part.with_name(part.name + ".json").unlink(missing_ok=True)
    return target


def fetch(url: str, part: Path, name: str) -> tuple[str, float]:
    """One attempt at `url`, appending to `part`: ("", 0) when complete, else (problem, wait)."""
    side = part.with_name(part.name + ".json")
    have, known = part.stat().st_size if part.is_file() else 0, {"validator": "", "total": 0}
    with contextlib.suppress(OSError, ValueError):
        known.update(json.loads(side.read_text()))
    # identity: a resumed or counted body must be the file's own bytes, not gzip's
    headers = {"Accept-Encoding": "identity"}
    if have and (known["validator"] or known["total"]):
        headers["Range"] = f"bytes={have}-"
        if known["validator"]:          # changed meanwhile? then the server sends all of it anew
            headers["If-Range"] = known["validator"]
    with requests.get(url, headers=headers, stream=True, timeout=(10, 60)) as r:
        if r.status_code in (429, 500, 502, 503, 504):
            after = r.headers.get("Retry-After", "")
            return f"the server answers {r.status_code}", min(60, int(after)) if after.isdigit() \
                else 0
        etag = r.headers.get("ETag", "")
        validator = etag if etag and not etag.startswith("W/") \
            else r.headers.get("Last-Modified", "")
        size = r.headers.get("Content-Length", "")
        total = int(size) if size.isdigit() else 0
        if r.status_code == 206:
            # The answer must continue our bytes, and be a part of the same file.
            span = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", r.headers.get("Content-Range", ""))
            total = int(span[2]) if span else 0
            if not span or int(span[1]) != have or (known["total"] and total != known["total"]) \
                    or (known["validator"] and validator and validator != known["validator"]):
                part.unlink()
                return "the file changed on the server", 0
        elif r.status_code == 416:      # our part is as long as the file, or longer
            if r.headers.get("Content-Range") == f"bytes */{have}" and known["total"] == have:
                return "", 0
            part.unlink()
            return "the file changed on the server", 0
        elif r.status_code == 200:      # from the start: a first attempt, or Range is ignored
            have = 0
        else:
            raise UserError(f"{url} is not there: the server answers {r.status_code} {r.reason}")
        side.write_text(json.dumps({"validator": validator, "total": total}))
        show = Progress(name[:20], total)
        with open(part, "ab" if have else "wb") as f:
            for block in r.iter_content(PIECE):
                f.write(block)
                have += len(block)
                show(have)
        show(have, last=True)
    if total and have < total:
        return f"the connection broke off at {have:,} of {total:,} bytes", 0
    if total and have > total:
        part.unlink()
        return f"the server sent {have:,} bytes and announced {total:,}", 0
    return "", 0


# --- which files -------------------------------------------------------------------------------
def kind_of(path: str | Path) -> str:
    """The suffix that says how to read a file: ".jsonl" for both a.jsonl and a.jsonl.gz."""
    name = str(path).lower().removesuffix(".gz")
    return os.path.splitext(name)[1]


def walk(folder: str, skip: Iterable[str] = (), suffixes: tuple[str, ...] = TEXT) -> list[str]:
    """The text files below a folder, in sorted order; hidden folders and links are left out."""
    found = []
    for here, folders, files in os.walk(folder):
        folders[:] = sorted(f for f in folders if f not in skip and not f.startswith("."))
        paths = [os.path.join(here, f) for f in sorted(files) if kind_of(f) in suffixes]
        found += [p for p in paths if os.path.isfile(p)]     # no pipe, no dangling link
    return found


def expand(word: str) -> list[str]:
    """A file, folder, glob or URL of the command line -> files (or the URL), sorted."""
    if re.match(r"https?://", word):
        return [word]
    path = os.path.expanduser(word)
    if os.path.isdir(path):
        if found := walk(path):
            return found
        raise UserError(f"{word} holds no text: of a folder, {' '.join(TEXT)} and .gz of these are "
                        "read; name other files by a glob, as in '**/*.rst'")
    if os.path.isfile(path):
        if not os.path.getsize(path):
            raise UserError(f"{word} is empty")
        return [path]
    if glob.has_magic(path):
        if found := sorted(p for p in glob.glob(path, recursive=True) if os.path.isfile(p)):
            return found
    raise UserError(f"{word!r} is no file, folder or dataset here; the datasets with a name are "
                    f"{', '.join(NAMES)}")


def resolve(cfg: Config, out: Path, named: Named | None) -> list[tuple[str, str]]:
    """(path or URL, its split) of everything to read; split "" is decided by document."""
    if named is None:
        found = [path for word in cfg.source for path in expand(word)]
        # a folder that contains the output must not read it back
        inside = f"{out.resolve()}{os.sep}"
        return [(p, "") for p in found if not str(Path(p).resolve()).startswith(inside)]
    name = cfg.source[0]
    if name == "stdlib":
        folder = sysconfig.get_paths()["stdlib"]
        # its tests are as large as the rest, and hold files that are broken on purpose
        skip = ("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__")
        if found := walk(folder, skip, suffixes=(".py",)):
            return [(p, "") for p in found]
        raise UserError(f"{folder} holds no .py files: this Python came without its source; pass "
                        "a folder of your own")
    if named.train == (SHAKESPEARE,):
        own = cfg.file or str(out / "input.txt")        # the second is where nanoGPT puts it
        if cfg.file or os.path.isfile(own):
            return [(p, "") for p in expand(own)]
    train, val = named.train, named.val
    if name == "fineweb":
        if not 1 <= cfg.shards <= FINEWEB_SHARDS:
            raise UserError(f"fineweb has 1 to {FINEWEB_SHARDS} training shards; --shards is "
                            f"{cfg.shards}")
        train = train[:cfg.shards]
    if cfg.mirror:
        train, val = (tuple(cfg.mirror.rstrip("/") + "/" + u.rsplit("/", 1)[-1] for u in urls)
                      for urls in (train, val))
    return [(u, "train" if val else "") for u in train] + [(u, "val") for u in val]


def dataset_name(word: str) -> str:
    """data/<this> for a word of the command line: corpus for a/corpus.jsonl.gz and for corpus/."""
    if glob.has_magic(word):        # the folder that a pattern starts from
        word = os.path.dirname(word[:re.search(r"[*?[]", word).start()]) or "."
    base = os.path.basename(os.path.abspath(urlsplit(word).path if "://" in word else word))
    return base.removesuffix(".gz").split(".")[0] or "text"


# --- files -> documents ------------------------------------------------------------------------
class Corpus:
    """The text of all inputs as a stream of pieces, as often as asked for, at constant memory.

    A piece is (split, opens, text): at most 2 * PIECE characters, `opens` at the first of a
    document. `read` counts the bytes consumed of `size`, `bad` what skip_bad dropped.
    """

    def __init__(self, files: list[tuple[Path, str]], cfg: Config, separator: str, books: bool):
        self.files, self.cfg, self.separator, self.books = files, cfg, separator, books
        self.size = sum(os.path.getsize(path) for path, _ in files)
        self.read = self.bad = self.documents = self.chars = 0
        self.cut = None                 # scan() decides how to split
        self.low, self.high = 1.0, 0.0

    def fault(self, what: str) -> None:
        """Count what skip_bad drops; without it, stop at the first."""
        if not self.cfg.skip_bad:
            raise UserError(f"{what} (--skip_bad=1 drops what is broken and counts it)")
        self.bad += 1

    def blocks(self, path: Path) -> Iterator[str]:
        """A file's text in blocks. UserError: invalid UTF-8, with its byte offset; broken gzip."""
        packed = path.suffix.lower() == ".gz"
        before, rest, offset = self.read, b"", 0        # offset of rest[0] in the (unpacked) file
        with open(path, "rb") as raw, (gzip.open(raw) if packed else raw) as f:
            while True:
                try:
                    block = f.read(PIECE)
                except (EOFError, zlib.error, gzip.BadGzipFile) as e:
                    raise UserError(f"{path} is no complete gzip file: {e}") from None
                self.read = before + raw.tell()
                rest += block
                if offset == 0 and rest.startswith(codecs.BOM_UTF8):    # Notepad's mark, not text
                    rest, offset = rest[3:], 3
                try:
                    # a character may straddle two blocks: what is not used yet waits in `rest`
                    text, used = codecs.utf_8_decode(rest, "strict", not block)
                except UnicodeDecodeError as e:
                    self.fault(f"{path} is not UTF-8 text at byte {offset + e.start:,}")
                    text, used = rest[:e.start].decode("utf-8"), e.end
                rest, offset = rest[used:], offset + used
                if text:
                    yield text
                if not block and not rest:
                    return

    def texts(self, path: Path) -> Iterator[Iterable[str]]:
        """The documents of a file, each as its blocks of text."""
        kind, blocks = kind_of(path), self.blocks(path)
        if kind in (".json", ".jsonl"):
            for line, value in self.json_values(blocks, path):
                where = f"{path}, line {line}"
                if not isinstance(value, dict) or not isinstance(value.get(self.cfg.key), str):
                    keys = f"an object with {', '.join(value)}" if isinstance(value, dict) \
                        else type(value).__name__
                    self.fault(f"{where}: no text under the key {self.cfg.key!r}, it is {keys}; "
                               "--key=NAME names another")
                    continue
                # "\ud800" alone is legal JSON and no Unicode text: it becomes U+FFFD
                yield [value[self.cfg.key].encode("utf-16", "surrogatepass")
                       .decode("utf-16", "replace")]
        elif kind == ".csv":
            csv.field_size_limit(LONGEST)
            rows = csv.DictReader(self.lines(blocks, path), strict=True)
            try:
                if self.cfg.key not in (rows.fieldnames or ()):
                    raise UserError(f"{path} has no column {self.cfg.key!r}; it has "
                                    f"{', '.join(rows.fieldnames or ['none'])}; --key=NAME")
                for row in rows:
                    if row[self.cfg.key] is None:
                        self.fault(f"{path}, line {rows.line_num}: the row is too short")
                    else:
                        yield [row[self.cfg.key]]
            except csv.Error as e:
                raise UserError(f"{path}, line {rows.line_num}: {e}") from None
        elif self.books:        # Project Gutenberg wraps each book in its licence
            yield [re.sub(r"(?s)\A.*?\*\*\* ?START OF[^\n]*\n|\*\*\* ?END OF.*\Z", "",
                          "".join(blocks)).strip()]
        elif self.separator:
            yield from self.separated(blocks)
        else:
            yield blocks

    def separated(self, blocks: Iterator[str]) -> Iterator[Iterable[str]]:
        """Documents between separators; one lies in memory at a time."""
        rest = ""
        for block in blocks:
            *whole, rest = (rest + block).split(self.separator)
            yield from ([text.strip()] for text in whole)
            if len(rest) > LONGEST:
                raise UserError(f"no {self.separator!r} in {LONGEST:,} characters: is "
                                "--separator right?")
        yield [rest.strip()]

    @staticmethod
    def lines(blocks: Iterator[str], path: Path) -> Iterator[str]:
        rest = ""
        for block in blocks:
            *whole, rest = (rest + block).split("\n")   # splitlines() would break at U+2028 too
            yield from (line + "\n" for line in whole)
            if len(rest) > LONGEST:
                raise UserError(f"{path} has a line of more than {LONGEST:,} characters")
        if rest:
            yield rest

    def json_values(self, blocks: Iterator[str], path: Path) -> Iterator[tuple[int, Any]]:
        """(line, value) of JSON lines, of one array, or of values spread over lines.

        All three are values with space, commas and the array's brackets between them. A value
        that does not parse may only be incomplete, so more is read before it counts as broken.
        """
        decoder, gap = json.JSONDecoder(), re.compile(r"[ \t\r\n,\[\]]*")
        buffer, at, line, array, ended = "", 0, 1, False, False
        while True:
            start = gap.match(buffer, at).end()
            skipped = buffer[at:start]
            line, array = line + skipped.count("\n"), (array or "[" in skipped) \
                and "]" not in skipped
            try:
                value, at = decoder.raw_decode(buffer, start)
                yield line, value
                line += buffer.count("\n", start, at)
                continue
            except (ValueError, RecursionError) as e:
                problem = getattr(e, "msg", "nested too deeply")
            at = start
            if not ended and len(buffer) - start < LONGEST:
                # twice as much as there was, so that parsing anew stays linear
                more, want = [buffer[start:]], 2 * (len(buffer) - start) + 1
                while want > 0 and not ended:
                    block = next(blocks, "")
                    more.append(block)
                    want, ended = want - len(block), not block
                buffer, at = "".join(more), 0
            elif start == len(buffer):
                if array:
                    self.fault(f"{path}, line {line}: the array is not closed, the file is cut off")
                return
            else:
                self.fault(f"{path}, line {line}: not JSON, {problem}")
                at = buffer.find("\n", start) + 1 or len(buffer)
                line += at > start and buffer[at - 1] == "\n"

    def pieces(self) -> Iterator[tuple[str, bool, str]]:
        """(split, opens, text) of everything, in order."""
        self.read = self.bad = seen = 0
        for path, fixed in self.files:
            for document in self.texts(path):
                opens, split = True, fixed
                for text in bounded(document):
                    split = split or self.split_of(text)
                    # One long text: everything up to the cut trains, the rest validates.
                    here = len(text)
                    if self.cut is not None and not fixed:
                        here = min(max(self.cut - seen, 0), len(text))
                        split = "train"
                    if here:
                        yield split, opens, text[:here]
                    if here < len(text):
                        yield "val", opens or seen < self.cut, text[here:]
                    opens, seen = False, seen + len(text)

    def mark(self, text: str) -> float:
        """A number in [0, 1) drawn by the seed and the text a document begins with."""
        digest = hashlib.blake2b(f"{self.cfg.seed}\n{text}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") / 2**64

    def split_of(self, text: str) -> str:
        """By content, so that a document and its copies never lie on both sides of the split.

        The lowest mark always validates and the highest always trains: neither side is empty.
        """
        mark = self.mark(text)
        return "val" if mark == self.low or mark < self.cfg.val_fraction and mark != self.high \
            else "train"

    def scan(self) -> None:
        """The first pass: finds what is broken before hours are spent, and counts documents."""
        show = Progress("reading", self.size)
        own_val = any(split == "val" for _, split in self.files)
        low, high = 1.0, 0.0
        for _, opens, text in self.pieces():
            self.chars += len(text)
            if opens:
                self.documents += 1
                mark = self.mark(text)
                low, high = min(low, mark), max(high, mark)
            show(self.read)
        show(self.read, last=True)
        if not self.chars:
            raise UserError(f"there is no text in {self.files[0][0]}"
                            + (f" and {len(self.files) - 1} more files" * (len(self.files) > 1)))
        self.low, self.high = low, high
        if low == high and not own_val:         # one document, or copies of one
            self.cut = int(self.chars * (1 - self.cfg.val_fraction))
            if not 0 < self.cut < self.chars:
                raise UserError(f"{self.chars} characters cannot be split by a val_fraction of "
                                f"{self.cfg.val_fraction}: give more text")
        if self.bad:
            note(f"{self.bad:,} broken places were dropped (--skip_bad)")


def bounded(document: Iterable[str]) -> Iterator[str]:
    """A document's blocks -> pieces of PIECE to 2 * PIECE characters, the last may be shorter."""
    buffer = ""
    for block in document:
        buffer += block
        while len(buffer) > 2 * PIECE:
            at = cut_at(buffer, PIECE)
            yield buffer[:at]
            buffer = buffer[at:]
    if buffer:
        yield buffer


def cut_at(text: str, size: int) -> int:
    """Where to cut behind `size` characters so that the halves encode as the whole would.

    Behind a newline that stands between a visible character and a letter or digit: no pattern's
    match crosses that point, none looks ahead over it, so no token can. Failing that any newline,
    then any space, then anywhere: a token or two differ, nothing is lost.
    """
    if found := re.compile(r"\S\n(?=[^\W_])").search(text, size):
        return found.end()
    ends = [text.find(mark, size) + 1 for mark in ("\n", " ")]
    return next((end for end in ends if end), size)


# --- documents -> shards -----------------------------------------------------------------------
class Shards:
    """Writes the tokens of one split to .npy files of at most shard_tokens each."""

    def __init__(self, folder: Path, split: str, dtype: str, shard_tokens: int):
        self.folder, self.split, self.shard_tokens = folder, split, shard_tokens
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.about = {"tokens": 0, "documents": 0, "bytes": 0, "shards": []}
        self.file, self.count = None, 0

    def header(self, count: int) -> bytes:
        """The 128 bytes that open an .npy file of one row (NumPy's format, version 1.0)."""
        text = f"{{'descr': '{self.dtype.str}', 'fortran_order': False, 'shape': ({count},), }}"
        return b"\x93NUMPY\x01\x00\x76\x00" + text.ljust(117).encode() + b"\n"

    def write(self, ids: np.ndarray, documents: int = 0, size: int = 0) -> None:
        """Append ids (n,), which open `documents` documents and stand for `size` UTF-8 bytes."""
        for key, value in (("tokens", len(ids)), ("documents", documents), ("bytes", size)):
            self.about[key] += int(value)
        while len(ids):
            if self.file is None:
                name = f"{self.split}_{len(self.about['shards']):05d}.npy"
                self.file, self.count = open(self.folder / name, "wb"), 0
                self.file.write(self.header(0))         # its length is known at the end
            part = ids[:self.shard_tokens - self.count]
            self.file.write(part.astype(self.dtype).tobytes())
            self.count, ids = self.count + len(part), ids[len(part):]
            if self.count == self.shard_tokens:
                self.close()

    def close(self) -> None:
        if self.file:
            self.file.seek(0)
            self.file.write(self.header(self.count))
            self.file.close()
            path, self.file = Path(self.file.name), None
            self.about["shards"].append({"file": path.name, "tokens": self.count,
                                         "sha256": hash_file(path)})


def encode(tok: Any, bundle: list[tuple[str, bool, str]]) -> list[tuple[str, np.ndarray, int, int]]:
    """(split, ids, documents, bytes) of each piece; the end-of-text id opens a document."""
    out = []
    for split, opens, text in bundle:
        # a corpus that spells <|endoftext|> gets the letters, never the special token
        ids = np.asarray(tok.encode_fast(text, disallowed_special=()), dtype=np.uint32)
        if opens and tok.eot is not None:
            ids = np.concatenate(([np.uint32(tok.eot)], ids))
        out.append((split, ids, int(opens), len(text.encode("utf-8"))))
    return out


def encode_corpus(corpus: Corpus, tok: Any, writers: dict[str, Shards], workers: int) -> None:
    """The last pass: this thread reads and writes, the others encode, in order, all bounded.

    tiktoken releases the interpreter's lock while it works, so threads use every core, and,
    unlike processes, need neither copies of the text nor a clean-up when this one is killed.
    """
    show, waiting = Progress("encoding", corpus.size), deque()

    def take() -> None:
        for split, ids, documents, size in waiting.popleft().result():
            writers[split].write(ids, documents, size)

    with ThreadPoolExecutor(workers) as pool:
        bundle, weight = [], 0
        for piece in corpus.pieces():
            bundle.append(piece)
            weight += len(piece[2])
            if weight >= PIECE // 2:        # small documents travel together
                waiting.append(pool.submit(encode, tok, bundle))
                bundle, weight = [], 0
            if len(waiting) > 2 * workers:  # a reader ahead of its encoders would fill memory
                take()
            show(corpus.read)
        waiting.append(pool.submit(encode, tok, bundle))
        while waiting:
            take()
    show(corpus.size, last=True)


def convert_bins(files: list[tuple[Path, str]], tok: Any, writers: dict[str, Shards]) -> None:
    """llm.c's shards, 256 int32 of header (magic, version, count) and uint16 ids, as they are."""
    lengths = np.asarray(tok.byte_lengths(), dtype=np.int64)
    lengths[tok.eot] = 0                    # it stands for no text
    for path, split in files:
        head = np.fromfile(path, dtype="<i4", count=256)
        if len(head) < 256 or head[0] != 20240520 or head[1] != 1:
            raise UserError(f"{path} is no GPT-2 shard of llm.c's format; delete it and try again")
        if path.stat().st_size != 1024 + 2 * int(head[2]):
            raise UserError(f"{path} is cut off: it announces {head[2]:,} tokens; delete it and "
                            "try again")
        ids = np.memmap(path, dtype="<u2", mode="r", offset=1024)
        show = Progress(path.name[-24:], len(ids), "M tokens")
        for start in range(0, len(ids), PIECE):
            part = np.asarray(ids[start:start + PIECE])
            if part.max() >= tok.vocab_size:
                raise UserError(f"{path} holds the id {part.max()}: it is not of this tokenizer")
            writers[split].write(part, (part == tok.eot).sum(), lengths[part].sum())
            show(start + len(part))
        show(len(ids), last=True)


# --- a dataset, whole or not at all ------------------------------------------------------------
@contextlib.contextmanager
def building(out: Path) -> Iterator[Path]:
    """A folder beside `out` to build in; removed at the end, or by the next run after a kill."""
    folder = out.parent / f".{out.name}.building"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(exist_ok=True)
        lock = open(folder / "lock", "w")
    except OSError as e:
        raise UserError(f"cannot write to {out}: {e.strerror}; choose another --out") from None
    with lock:
        try:
            import fcntl        # the system drops the lock with the process, however it ends
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:     # Windows: two builds of one dataset at once are not noticed
            pass
        except OSError:
            raise UserError(f"another prepare.py is building {out}: wait for it") from None
        try:
            for leftover in folder.iterdir():
                if leftover.name != "lock":
                    leftover.unlink()
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def install(built: Path, out: Path) -> None:
    """Move a finished build into place: meta.json goes first and comes last.

    Whatever else the user keeps in the folder, nanoGPT's input.txt for one, stays.
    """
    try:
        out.mkdir(exist_ok=True)
        (out / "meta.json").unlink(missing_ok=True)         # from here on: not prepared
        new = sorted(p.name for p in built.iterdir() if p.name not in ("lock", "meta.json"))
        for name in new:
            os.replace(built / name, out / name)
        for old in out.iterdir():                           # shards of a longer predecessor
            if re.fullmatch(r"(train|val)_\d{5}\.npy", old.name) and old.name not in new:
                old.unlink()
        os.replace(built / "meta.json", out / "meta.json")
    except OSError as e:
        raise UserError(f"cannot write to {out}: {e.strerror}; choose another --out") from None


def fingerprint(inputs: list[tuple[str, str]], cfg: Config) -> str:
    """Changes whenever an input does: names, sizes and times of files; URLs as they are."""
    own = [cfg.tokenizer] if os.path.exists(cfg.tokenizer) else []
    own = [str(p) for p in sorted(Path(own[0]).glob("*"))] if own and os.path.isdir(own[0]) else own
    seen = []
    for path in [p for p, _ in inputs] + own:
        stat = os.stat(path) if "://" not in path else None
        seen.append((path, stat and stat.st_size, stat and stat.st_mtime_ns))
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()


def finished(out: Path, settings: dict[str, Any]) -> bool:
    """Whether `out` already holds exactly what is asked for, with all its shards."""
    try:
        dataset = loader.Dataset(out)
        for split in dataset.shards:
            dataset.tokens(split)
        return dataset.meta["settings"] == settings and (out / "tokenizer.json").is_file()
    except (UserError, KeyError):
        return False


def report(out: Path) -> None:
    """What there is now and what to do next, on stdout."""
    meta = loader.Dataset(out).meta
    print(f"{out}: {meta['vocab_size']:,} entries ({meta['tokenizer']}), {meta['dtype']}")
    print("split    documents         tokens          bytes  bytes/token")
    for split, s in meta["splits"].items():
        print(f"{split:<5} {s['documents']:>12,} {s['tokens']:>14,} {s['bytes']:>14,} "
              f"{s['bytes'] / s['tokens']:>12.2f}")
    home = out.resolve().parent == ROOT / "data"
    print(f"next: python train.py --dataset={out.name if home else out}")


def load_tokenizer(name: str, corpus: Corpus | None, cfg: Config) -> Any:
    """Train (bpe, char) or load the tokenizer; training sees the training documents alone."""
    def texts(split: str = "") -> Iterator[str]:
        show, seen = Progress("training tokenizer", corpus.size), 0
        for where, _, text in corpus.pieces():
            show(corpus.read)
            if not split or where == split:
                yield text
                seen += len(text)
                if seen >= cfg.tokenizer_chars and split:
                    return

    if name == "char":          # as nanoGPT: every character of the text, or val could not be read
        return tokenizers.train_chars(texts())
    if name == "bpe":
        return tokenizers.train(texts("train"), cfg.vocab_size, pattern=cfg.pattern,
                                special_tokens=(EOT,))
    return tokenizers.load(name)


def main(cfg: Config) -> None:
    name = cfg.source[0] if len(cfg.source) == 1 else ""
    named = NAMES.get(name)
    if not named and (known := [w for w in cfg.source if w in NAMES]):
        raise UserError(f"{known[0]} is a dataset of its own: prepare it alone")
    if not 0 < cfg.val_fraction < 1:
        raise UserError(f"val_fraction is {cfg.val_fraction}; it must lie between 0 and 1")
    if cfg.shard_tokens < 1:
        raise UserError(f"shard_tokens is {cfg.shard_tokens}; a shard holds at least 1 token")
    if cfg.file and (not named or named.train != (SHAKESPEARE,)):
        raise UserError("--file is for shakespeare and shakespeare_char; other files are given as "
                        "words: python data/prepare.py FILE")
    if len(cfg.source) > 1 and not cfg.out:
        raise UserError("several inputs need a name: add --out=data/NAME")
    out = Path(cfg.out or ROOT / "data" / (name if named else dataset_name(name))).expanduser()
    inputs = resolve(cfg, out, named)
    if not inputs:
        raise UserError(f"{' '.join(cfg.source)} holds nothing but {out} itself")

    # Everything that shapes the result; a setting that does not (workers, cache) is left out.
    kind = cfg.tokenizer or (named.tokenizer if named else "bpe")
    settings = {k: getattr(cfg, k) for k in (
        "source", "vocab_size", "pattern", "tokenizer_chars", "shard_tokens", "val_fraction",
        "seed", "key", "separator", "skip_bad", "shards")}
    settings |= {"tokenizer": kind, "inputs": fingerprint(inputs, cfg)}
    if not cfg.force and finished(out, settings):
        note(f"{out} is up to date: nothing to do (--force=1 builds it again)")
        return report(out)

    with building(out) as folder:
        cache = Path(cfg.cache or ROOT / "data" / ".cache").expanduser()
        files = [(download(p, cache) if "://" in p else Path(p), split) for p, split in inputs]
        if named and named.train == (SHAKESPEARE,) and not SHAKESPEARE.endswith(
                hash_file(files[0][0])):
            note(f"{files[0][0]} is not the Tiny Shakespeare of 1,115,394 characters")
        corpus, bins = None, name == "fineweb"
        if not bins:
            separator = cfg.separator or (named.separator if named else "")
            corpus = Corpus(files, cfg, separator, books=name == "gutenberg")
            corpus.scan()
        tok = load_tokenizer(kind, corpus, cfg)
        if tok.eot is None and (bins or corpus.documents > 1):
            note("this tokenizer has no end-of-text token: documents follow each other unmarked")
        tok.save(folder)

        dtype = "uint16" if tok.vocab_size <= 2**16 else "uint32"
        writers = {s: Shards(folder, s, dtype, cfg.shard_tokens) for s in ("train", "val")}
        try:
            if bins:
                convert_bins(files, tok, writers)
            else:
                cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") \
                    else os.cpu_count() or 1
                encode_corpus(corpus, tok, writers, cfg.workers or cores)
        finally:
            for writer in writers.values():
                writer.close()
        meta = {"version": loader.VERSION, "dataset": out.name, "source": " ".join(cfg.source),
                "settings": settings, "tokenizer": kind, "vocab_size": tok.vocab_size,
                "eot": tok.eot, "dtype": dtype,
                "splits": {split: w.about for split, w in writers.items()}}
        (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
        install(folder, out)
    report(out)


if __name__ == "__main__":
    run(main, Config, positional=("source",))
