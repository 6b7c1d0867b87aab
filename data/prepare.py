"""Text -> token shards, once: `python data/prepare.py [name | file | folder | glob | URL …]`

    python data/prepare.py                              # stdlib: Python's own source, no download
    python data/prepare.py shakespeare_char --file=input.txt      # nanoGPT's first dataset
    python data/prepare.py notes/ 'logs/*.txt.gz' --out=data/mine --vocab_size=8192
    python data/prepare.py fineweb --shards=10          # 1 billion GPT-2 tokens, already encoded
    python data/prepare.py skills                       # chats, and alpaca, imdb, …: public.py

No GPU is used, however many there are; encoding takes every core. The number to expect: stdlib, 12
MB in 700 documents, takes about 5 seconds on two cores, with its BPE of 16,384 entries.

Written are data/<dataset>/{train,val}_00000.npy (uint16, or uint32 from 65,537 entries on),
tokenizer.json and, last of all, meta.json: where it lies, the dataset is complete. The end-of-text
id opens each document. The text is read as a stream, three times: to count it, to train the
tokenizer, to encode it; memory stays the same however large it is. Inputs: .jsonl and .json (the
key `text`), .csv (the column `text`), any other file as one document of UTF-8 text, .gz of those.
"""
from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import sysconfig
import threading
import time
from collections import deque
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
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
    source: list[str] = field(default_factory=lambda: ["stdlib"])  # a name, files, folders, URLs
    out: str = ""                       # directory to write; default data/<name of the source>
    file: str = ""                      # shakespeare, public chats: a copy that you already have
    # --- tokens
    tokenizer: str = ""                 # bpe (trained here), char, a directory, or a name: gpt2
    vocab_size: int = 16384             # entries of a bpe trained here, <|endoftext|> included
    pattern: str = "gpt2"               # how a bpe trained here splits text: gpt2 or cl100k
    tokenizer_chars: int = 1_000_000_000  # train the tokenizer on at most so many characters
    shard_tokens: int = 100_000_000     # tokens of a shard file
    # --- documents
    val_fraction: float | None = None   # share kept for validation; 0.05 (shakespeare: 0.1)
    seed: int = 1337                    # which documents those are
    key: str = "text"                   # key (.json, .jsonl) or column (.csv) that holds the text
    separator: str = ""                 # a text that separates documents inside a text file
    skip_bad: bool = False              # drop invalid bytes and lines, and count them
    # --- how
    shards: int = 1                     # fineweb: how many of its 103 training shards
    workers: int = 0                    # processes that encode; 0: one for each core
    force: bool = False                 # build again what is already there
    cache: str = ""                     # where downloads are kept; default data/.cache
    mirror: str = ""                    # URL of a folder with copies of a dataset's files


@dataclass(frozen=True)
class Named:
    """A corpus with a name: its files, and how those who made it cut and encode it."""
    train: tuple[str, ...] = ()         # URLs; a #sha256=… at the end is checked
    val: tuple[str, ...] = ()           # its own validation text; none: split by document
    tokenizer: str = "bpe"
    separator: str = ""
    val_fraction: float = 0.05


SHAKESPEARE = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/"
               "input.txt#sha256=86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed")
HUB = "https://huggingface.co/datasets"
STORIES = HUB + "/roneneldan/TinyStories/resolve/main/TinyStoriesV2-GPT4-{}.txt"
FINEWEB = HUB + "/kjj0/fineweb10B-gpt2/resolve/main/fineweb_{}_{:06d}.bin"
FINEWEB_SHARDS = 103                    # of 100 million tokens each, the last is shorter
GUTENBERG = "https://www.gutenberg.org/cache/epub/{0}/pg{0}.txt"
BOOKS = (11, 35, 36, 74, 76, 84, 98, 120, 135, 145, 158, 161, 174, 345, 768, 996, 1184, 1232,
         1260, 1342, 1400, 1497, 1661, 2554, 2591, 2600, 2701, 4300, 5200, 28054)
CHATS = ("skills", "stdlib_chat", "alpaca", "minimind_sft", "minimind_dpo", "sms_spam", "imdb")
NAMES = {
    "stdlib": Named(), **dict.fromkeys(CHATS, Named()),     # chats: by skills.py and public.py
    "shakespeare_char": Named((SHAKESPEARE,), tokenizer="char", val_fraction=0.1),
    "shakespeare": Named((SHAKESPEARE,), tokenizer="gpt2", val_fraction=0.1),
    "tinystories": Named((STORIES.format("train"),), (STORIES.format("valid"),), "bpe",
                         tokenizers.EOT),
    "gutenberg": Named(tuple(GUTENBERG.format(book) for book in BOOKS)),
    "fineweb": Named(tuple(FINEWEB.format("train", i + 1) for i in range(FINEWEB_SHARDS)),
                     (FINEWEB.format("val", 0),), tokenizer="gpt2"),
}
RECORDS = (".jsonl", ".json", ".csv")   # many documents a file; anything else is one
TEXT = (".txt", ".md", ".py") + RECORDS     # what is picked up from a folder


def note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr, flush=True)


class Progress:
    """`encoding 42% of 12.1 MB, 8.9 MB/s, 1 s left` on stderr: a live line, or few in a log."""

    def __init__(self, what: str, total: int, unit: str = "MB"):
        self.what, self.total, self.unit = what, max(total, 1) / 1e6, unit
        self.live, self.start = sys.stderr.isatty(), time.monotonic()
        self.next = self.start + (0 if self.live else 5)        # when to print (again)

    def __call__(self, done: int, last: bool = False) -> None:
        now, done = time.monotonic(), max(done, 1) / 1e6
        if now < self.next and not last:
            return
        self.next, seconds = now + (0.2 if self.live else 10), max(now - self.start, 1e-3)
        end = f"in {seconds:.1f} s" if last else \
            f"{max(0.0, self.total / done - 1) * seconds:,.0f} s left"
        line = f"{self.what} {min(100.0, 100 * done / self.total):.0f}% of {self.total:,.1f} " \
               f"{self.unit}, {done / seconds:,.1f} {self.unit}/s, {end}"
        # \r and \x1b[K write the live line over itself
        print(f"\r{line}\x1b[K" if self.live else line, file=sys.stderr, flush=True,
              end="\n" if last or not self.live else "")


# --- downloads ---------------------------------------------------------------------------------
PATIENCE = (1, 2, 4)                    # seconds to wait after each failure but the last


def download(url: str, folder: Path) -> Path:
    """Fetch `url` into `folder`, once, going on where an earlier run stopped; return its path.

    The bytes gather in NAME.part, and only a complete file whose hash is right gets its name.
    UserError: no network, an answer such as 404, another hash than the URL's #sha256=.
    """
    url, _, want = url.partition("#sha256=")
    # The server's name for a file must not choose where it lands: letters, digits, dots, dashes.
    base = re.sub(r"[^\w.-]+", "_", urlsplit(url).path.rsplit("/", 1)[-1]).lstrip(".") or "text"
    target = folder / f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{base}"
    if target.is_file():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    for wait in (*PATIENCE, None):
        try:
            problem = fetch(url, part)
        except requests.RequestException as e:
            problem = f"the connection to {urlsplit(url).hostname} failed ({type(e).__name__})"
        if not problem:
            break
        if wait is None:
            raise UserError(f"{url} cannot be fetched: {problem}. Is there a network? The same "
                            "command goes on from what has arrived; --file or --mirror take a copy")
        note(f"{base}: {problem}; trying again in {wait} s")
        time.sleep(wait)
    if want and loader.hash_file(part) != want:
        part.unlink()
        raise UserError(f"{url} is not the file it should be: its sha256 is not {want}")
    os.replace(part, target)
    part.with_suffix(".json").unlink(missing_ok=True)
    return target


def fetch(url: str, part: Path) -> str:
    """One attempt to complete `part`; returns what went wrong, or "" when all of it is there.

    A .json beside it holds the file's ETag or date and size: two versions are never joined.
    """
    side = part.with_suffix(".json")
    have = part.stat().st_size if part.is_file() else 0
    known = {"validator": "", "total": 0}
    with contextlib.suppress(OSError, ValueError):
        known.update(json.loads(side.read_text()))
    if have and have == known["total"]:     # killed between the last byte and the rename
        return ""
    # identity: what is counted and resumed must be the file's own bytes, not gzip's
    headers = {"Accept-Encoding": "identity"}
    if have and known["total"]:
        headers["Range"] = f"bytes={have}-"
        if known["validator"]:              # a file that changed is then sent whole, with a 200
            headers["If-Range"] = known["validator"]
    with requests.get(url, headers=headers, stream=True, timeout=(10, 60)) as r:
        if r.status_code == 429 or r.status_code >= 500:
            return f"the server answers {r.status_code} {r.reason}"
        size, etag = r.headers.get("Content-Length", ""), r.headers.get("ETag", "W/")
        # a weak ETag (W/) does not promise the same bytes
        validator = r.headers.get("Last-Modified", "") if etag.startswith("W/") else etag
        total = int(size) if size.isdigit() else 0
        if r.status_code in (206, 416):     # a part, or "you have more than there is"
            span = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", r.headers.get("Content-Range", ""))
            start, total = (int(span[1]), int(span[2])) if span else (-1, 0)
            other = validator not in ("", known["validator"])
            if other or (start, total) != (have, known["total"]):
                part.unlink(missing_ok=True)
                return "the server holds another version of the file now"
        elif r.status_code == 200:          # all of it: the first attempt, or Range is ignored
            have = 0
        else:
            raise UserError(f"{url} cannot be fetched: the server answers {r.status_code} "
                            f"{r.reason}; is the address right?")
        side.write_text(json.dumps({"validator": validator, "total": total}))
        show = Progress(f"fetching {part.stem}", total)
        with open(part, "ab" if have else "wb") as f:
            for block in r.iter_content(1 << 16):       # a block that breaks off is lost: small
                f.write(block)
                have += len(block)
                show(have)
        show(have, last=True)
    return f"{have:,} of {total:,} bytes arrived" if total and have != total else ""


# --- which files -------------------------------------------------------------------------------
def walk(folder: str, skip: tuple[str, ...] = (), suffixes: tuple[str, ...] = TEXT) -> list[str]:
    """The text files below a folder, sorted; no hidden folders, no links to folders."""
    found = []
    for here, folders, files in os.walk(folder):
        folders[:] = sorted(f for f in folders if f not in skip and not f.startswith("."))
        found += [os.path.join(here, f) for f in sorted(files) if loader.kind_of(f) in suffixes]
    return [path for path in found if os.path.isfile(path)]     # no pipe, no dangling link


def expand(word: str) -> list[str]:
    """A file, folder, glob or URL of the command line -> files (or the URL), sorted."""
    if word.startswith(("http://", "https://")):
        return [word]
    path = os.path.expanduser(word)
    if os.path.isfile(path):
        return [path]
    if os.path.isdir(path):
        if found := walk(path):
            return found
        raise UserError(f"{word} holds no text: of a folder, {' '.join(TEXT)} and .gz of these are "
                        "read; name other files by a glob, as in '**/*.rst'")
    if found := sorted(p for p in glob.glob(path, recursive=True) if os.path.isfile(p)):
        return found
    raise UserError(f"{word!r} is no file, folder or dataset here; the datasets with a name are "
                    f"{', '.join(NAMES)}")


def resolve(cfg: Config, named: Named | None, out: Path) -> list[tuple[str, str]]:
    """(path or URL, its split) of all there is to read; split "" means by document."""
    if named is None:
        found = [path for word in cfg.source for path in expand(word)]
        inside = f"{out.resolve()}{os.sep}"     # a folder around the output must not read it back
        return [(p, "") for p in found if not os.path.realpath(p).startswith(inside)]
    if cfg.source == ["stdlib"]:
        folder = sysconfig.get_paths()["stdlib"]
        # its tests are as large as the rest, and hold files that are broken on purpose
        skip = ("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__")
        if found := walk(folder, skip, suffixes=(".py",)):
            return [(p, "") for p in found]
        raise UserError(f"{folder} holds no .py files: this Python came without its source; pass "
                        "a folder of your own")
    if named.train == (SHAKESPEARE,) and (cfg.file or (out / "input.txt").is_file()):
        return [(expand(cfg.file or str(out / "input.txt"))[0], "")]    # nanoGPT's place for it
    train = named.train[:cfg.shards] if cfg.source == ["fineweb"] else named.train
    found = [(u, "train" if named.val else "") for u in train] + [(u, "val") for u in named.val]
    if cfg.mirror:
        found = [(f"{cfg.mirror.rstrip('/')}/{u.rsplit('/', 1)[1]}", split) for u, split in found]
    return found


def dataset_name(word: str) -> str:
    """What the output is called: corpus for a/corpus.jsonl.gz, corpus/ and corpus/*.txt."""
    path = re.sub(r"[^/\\]*[*?\[].*", "", urlsplit(word).path if "://" in word else word)
    return os.path.basename(os.path.abspath(path)).split(".")[0] or "text"


# --- files -> documents ------------------------------------------------------------------------
class Corpus:
    """All the text as a stream of pieces, as often as needed, at constant memory.

    A piece is (split, opens, text): a document, or a block of a long text file; `opens` is true
    for the first of a document. scan() comes before the other passes and decides on the split.
    """

    def __init__(self, files: list[tuple[Path, str]], cfg: Config):
        self.files, self.cfg = files, cfg
        self.books = cfg.source == ["gutenberg"]
        # A stray byte in somebody's standard library must not stop the very first command.
        self.reader = loader.Reader(cfg.skip_bad or cfg.source == ["stdlib"])
        self.size = sum(os.path.getsize(path) for path, _ in files)
        self.chars = self.documents = 0
        self.low, self.high, self.cut = 0.0, 1.0, None

    def texts(self, path: Path) -> Iterator[Iterable[str]]:
        """The documents of a file, each as its blocks of text."""
        if loader.kind_of(path) in RECORDS:
            for where, record in self.reader.records(path):
                text = record.get(self.cfg.key)
                if isinstance(text, str):
                    yield [tokenizers.mend(text)]       # "\ud800" is legal JSON, but no text
                else:
                    self.reader.fault(f"{where}: no text under {self.cfg.key!r} but "
                                      f"{', '.join(map(str, record))}; --key=NAME takes another")
        elif self.books:                # Project Gutenberg wraps a book into its licence
            yield [re.sub(r"(?s)\A.*?\*\*\* ?START OF[^\n]*\n|\*\*\* ?END OF.*", "",
                          "".join(self.reader.blocks(path))).strip()]
        elif self.cfg.separator:
            rest = ""
            for block in self.reader.blocks(path):
                *whole, rest = (rest + block).split(self.cfg.separator)
                yield from ([text.strip()] for text in whole)
                if len(rest) > loader.LONGEST:
                    raise UserError(f"{path}: no {self.cfg.separator!r} in {len(rest):,} "
                                    "characters, is --separator right?")
            yield [rest.strip()]
        else:
            yield self.reader.blocks(path)

    def pieces(self, what: str, limit: float = math.inf) -> Iterator[tuple[str, bool, str]]:
        """All pieces in order, or those of the first `limit` characters; `what` names the pass."""
        show, seen = Progress(what, self.size), 0
        self.reader.consumed = self.reader.bad = 0
        for path, fixed in self.files:
            for document in self.texts(path):
                split, opens = fixed, True
                for text in filter(None, document):
                    split = split or self.side(text)
                    # One long text: all before the cut trains, the rest validates.
                    here = len(text)
                    if self.cut is not None and not fixed:
                        here = min(max(self.cut - seen, 0), len(text))
                    if here:
                        yield split, opens, text[:here]
                    if here < len(text):
                        yield "val", opens or 0 <= self.cut - seen, text[here:]
                    opens, seen = False, seen + len(text)
                    show(self.reader.consumed)
                    if seen >= limit:
                        return
        show(self.reader.consumed, last=True)

    def mark(self, text: str) -> float:
        """A number in [0, 1) drawn by the seed and the text that opens a document."""
        digest = hashlib.blake2b(f"{self.cfg.seed}\n{text}".encode(), digest_size=6).digest()
        return int.from_bytes(digest, "big") / 2**48

    def side(self, text: str) -> str:
        """The split of a document: by content, so that its copies are never on both sides.

        The highest mark always trains and the lowest validates, so that neither side is empty.
        """
        mark = self.mark(text)
        low = mark == self.low or mark < self.cfg.val_fraction
        return "val" if low and mark != self.high and self.cut is None else "train"

    def scan(self) -> None:
        """The first pass counts, and finds what is broken before hours went into the rest."""
        low, high = 1.0, 0.0            # side() does not matter yet
        for _, opens, text in self.pieces("reading"):
            self.chars += len(text)
            self.documents += opens
            if opens:
                low, high = min(low, self.mark(text)), max(high, self.mark(text))
        if not self.chars:
            raise UserError(f"there is no text in {' '.join(self.cfg.source)}")
        if self.reader.bad:
            note(f"{self.reader.bad:,} broken places were dropped")
        self.low, self.high = low, high
        if low == high:                 # one document, or copies of one
            self.cut = int(self.chars * (1 - self.cfg.val_fraction))
            if not 0 < self.cut < self.chars:
                raise UserError(f"{self.chars} characters are too few to split: give more text")

    def train_tokenizer(self) -> Any:
        """A tokenizer for this text; a bpe sees the training documents alone."""
        what = "training the tokenizer"
        if self.cfg.tokenizer == "char":        # as nanoGPT: of all text, or val has unknown ones
            return tokenizers.train_chars(text for _, _, text in self.pieces(what))
        pieces = self.pieces(what, limit=self.cfg.tokenizer_chars)
        return tokenizers.train((text for split, _, text in pieces if split == "train"),
                                self.cfg.vocab_size, self.cfg.pattern)


# --- documents -> shards -----------------------------------------------------------------------
TOKENIZER: Any = None                   # of this process, once start_worker() has run


def start_worker(folder: Path) -> None:
    """Make this process ready to encode."""
    global TOKENIZER
    TOKENIZER = tokenizers.load(str(folder))
    if parent := multiprocessing.parent_process():
        signal.signal(signal.SIGINT, signal.SIG_IGN)        # Ctrl-C is for the parent to answer
        # without this, workers would outlive a parent that was killed
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def encode(bundle: list[tuple[str, bool, str]]) -> list[tuple[str, np.ndarray, int, int]]:
    """Pieces -> (split, ids, documents, bytes); the end-of-text id opens a document."""
    out, eot = [], TOKENIZER.eot
    for split, opens, text in bundle:
        # a text that spells <|endoftext|> gets the letters, never the special token
        ids = np.asarray(TOKENIZER.encode_fast(text, disallowed_special=()), dtype=np.uint32)
        if opens and eot is not None:
            ids = np.concatenate((np.array([eot], np.uint32), ids))
        out.append((split, ids, int(opens), len(text.encode("utf-8"))))
    return out


def encode_corpus(corpus: Corpus, folder: Path, writers: dict[str, Any], workers: int) -> None:
    """The last pass: this process reads and writes, others encode, in order and bounded.

    Processes, since tiktoken's threads wait for each other where they make Python objects.
    """
    small = corpus.size < 4 * loader.BLOCK      # done before processes have started
    kind, workers = (ThreadPoolExecutor, 1) if small else (ProcessPoolExecutor, workers)
    waiting, bundle, weight = deque(), [], 0

    def take() -> None:
        for split, ids, documents, size in waiting.popleft().result():
            writers[split].write(ids, documents, size)

    with kind(workers, initializer=start_worker, initargs=(folder,)) as pool:
        for piece in corpus.pieces("encoding"):
            bundle.append(piece)
            weight += len(piece[2])
            if weight >= loader.BLOCK // 2:     # small documents travel together
                waiting.append(pool.submit(encode, bundle))
                bundle, weight = [], 0
            if len(waiting) > 2 * workers:  # a reader far ahead of its encoders fills memory
                take()
        waiting.append(pool.submit(encode, bundle))
        while waiting:
            take()


def convert_bins(files: list[tuple[Path, str]], tok: Any, writers: dict[str, Any]) -> None:
    """llm.c's shards: 256 int32 of header (magic, version, count, …), then uint16 ids."""
    if tok.eot is None:
        raise UserError("fineweb's tokens are GPT-2's: --tokenizer has to be a copy of gpt2")
    lengths = np.zeros(2**16, dtype=np.int64)
    lengths[:tok.vocab_size] = tok.byte_lengths()[:2**16]
    lengths[tok.eot] = 0                    # it stands for no text
    for path, split in files:
        head = np.fromfile(path, dtype="<i4", count=256)
        if len(head) < 256 or tuple(head[:2]) != (20240520, 1) \
                or path.stat().st_size != 1024 + 2 * int(head[2]):
            raise UserError(f"{path} is not a whole GPT-2 shard of llm.c's format: delete it and "
                            "run this again")
        ids = np.memmap(path, dtype="<u2", mode="r", offset=1024)
        show = Progress(f"converting {path.name}", len(ids), "M tokens")
        for start in range(0, len(ids), loader.BLOCK):
            part = np.asarray(ids[start:start + loader.BLOCK])
            writers[split].write(part, (part == tok.eot).sum(), lengths[part].sum())
            show(start + len(part))
        show(len(ids), last=True)


# --- a dataset, whole or not at all ------------------------------------------------------------
@contextlib.contextmanager
def building(out: Path) -> Iterator[Path]:
    """A hidden folder inside `out` to build in; what it holds is moved up at the end.

    An error removes it, a kill leaves it to the next run, and a finished dataset stays as it is
    in both cases. What else lies in `out` (nanoGPT's input.txt, say) is not touched.
    """
    folder = out / ".building"          # inside: `out` may be a link or a disk of its own
    try:
        out.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    except OSError as e:
        raise UserError(f"cannot write to {out}: {e.strerror}; choose another --out") from None
    try:
        yield folder
        # meta.json says that a dataset is complete: it goes first and comes last
        (out / "meta.json").unlink(missing_ok=True)
        new = sorted(path.name for path in folder.iterdir())
        for old in out.iterdir():                   # shards of a longer predecessor
            if re.fullmatch(r"(train|val)_\d{5}\.npy", old.name) and old.name not in new:
                old.unlink()
        for name in sorted(new, key="meta.json".__eq__):
            os.replace(folder / name, out / name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):          # only an empty folder goes
            out.rmdir()


def fingerprint(paths: list[str]) -> str:
    """Changes when an input does: names, sizes and times of files; URLs are taken as they are."""
    stats = [(path, None if "://" in path else os.stat(path)) for path in paths]
    seen = [(path, stat and (stat.st_size, stat.st_mtime_ns)) for path, stat in stats]
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()


def finished(out: Path, settings: dict[str, Any]) -> bool:
    """Whether `out` already holds exactly what is asked for, with all its shards."""
    try:
        dataset = loader.Dataset(out)
        whole = all(len(dataset.tokens(split)) for split in dataset.shards)
        return whole and dataset.meta["settings"] == settings and (out / "tokenizer.json").exists()
    except (UserError, KeyError):
        return False


def report(out: Path) -> None:
    """What there is now and what to do next, on stdout."""
    meta = loader.Dataset(out).meta
    print(f"{out}: {meta['vocab_size']:,} tokens in the vocabulary ({meta['tokenizer']})")
    print("split     documents          tokens           bytes  bytes/token")
    for split, s in meta["splits"].items():
        print(f"{split:<6}{s['documents']:>13,} {s['tokens']:>15,} {s['bytes']:>15,} "
              f"{s['bytes'] / s['tokens']:>12.2f}")
    home = out.resolve().parent == ROOT / "data"
    print(f"next: python train.py --dataset={out.name if home else out}")


def check(cfg: Config, named: Named | None) -> None:
    """Everything that can be said against the settings before any work."""
    if not named and (alone := [word for word in cfg.source if word in NAMES]):
        raise UserError(f"{alone[0]} is a dataset of its own: prepare it alone")
    if len(cfg.source) > 1 and not cfg.out:
        raise UserError("several inputs need a name: add --out=data/NAME")
    if cfg.file and (not named or named.train != (SHAKESPEARE,)):
        raise UserError("--file is for shakespeare and public chats; give others as plain words")
    if not 0 < cfg.val_fraction < 1:
        raise UserError(f"val_fraction is {cfg.val_fraction}; it must lie between 0 and 1")
    if min(cfg.shard_tokens, cfg.tokenizer_chars, cfg.workers + 1) < 1:
        raise UserError("shard_tokens and tokenizer_chars must be at least 1, workers at least 0")
    if not 1 <= cfg.shards <= FINEWEB_SHARDS:
        raise UserError(f"shards is {cfg.shards}; fineweb has 1 to {FINEWEB_SHARDS} of them")


def main(cfg: Config) -> None:
    if " ".join(cfg.source) in CHATS:           # conversations, not tokens
        from data import public, skills         # not above: they build on this file
        made = public if cfg.source[0] in public.SETS else skills
        return made.main(made.inherit(cfg))
    cfg = replace(cfg, source=cfg.source or Config().source)
    named = NAMES.get(" ".join(cfg.source))
    usual = named or Named()            # what was not asked for is as usual for this dataset
    share = usual.val_fraction if cfg.val_fraction is None else cfg.val_fraction
    cfg = replace(cfg, tokenizer=cfg.tokenizer or usual.tokenizer, val_fraction=share,
                  separator=cfg.separator or usual.separator)
    check(cfg, named)
    name = cfg.source[0] if named else dataset_name(cfg.source[0])
    out = Path(cfg.out or ROOT / "data" / name).expanduser()
    inputs = resolve(cfg, named, out)
    if not inputs:
        raise UserError(f"{' '.join(cfg.source)} holds nothing to read but {out} itself")
    # All that shapes the result: settings, inputs, and a tokenizer that may have been retrained.
    free = ("out", "file", "workers", "force", "cache", "mirror")
    settings = {key: value for key, value in vars(cfg).items() if key not in free}
    own = [cfg.tokenizer] if os.path.exists(cfg.tokenizer) else []
    settings["inputs"] = fingerprint([path for path, _ in inputs] + own)
    if not cfg.force and finished(out, settings):
        note(f"{out} is up to date, nothing to do (--force=1 builds it again)")
        return report(out)

    with building(out) as folder:
        trained, bins = cfg.tokenizer in ("bpe", "char"), cfg.source == ["fineweb"]
        try:        # before an hour of downloads, since it may fail
            tok = None if trained and not bins else tokenizers.load(cfg.tokenizer)
        except UserError as e:
            raise UserError(f"{e}; here, --tokenizer=DIR uses one and --tokenizer=bpe trains one")
        cache = Path(cfg.cache or ROOT / "data" / ".cache").expanduser()
        files = [(download(p, cache) if "://" in p else Path(p), split) for p, split in inputs]
        if usual.train == (SHAKESPEARE,) and loader.hash_file(files[0][0]) != SHAKESPEARE[-64:]:
            note(f"{files[0][0]} is not the Tiny Shakespeare of 1,115,394 characters")
        corpus = Corpus(files, cfg)
        if not bins:
            corpus.scan()
        tok = tok or corpus.train_tokenizer()
        if tok.eot is None and corpus.documents > 1:
            note("this tokenizer has no end-of-text id: documents follow each other unmarked")
        tok.save(folder)
        writers = {split: loader.Shards(folder, split, tok.vocab_size, cfg.shard_tokens)
                   for split in ("train", "val")}
        if bins:                        # these are tokens already
            convert_bins(files, tok, writers)
        else:
            # Linux knows which cores are ours: in a container, fewer than the machine's
            cores = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))(0)
            try:
                encode_corpus(corpus, folder, writers, cfg.workers or len(cores))
            except BrokenExecutor:
                raise UserError("an encoding process died (no memory?): try --workers=1") from None
        meta = {"version": loader.VERSION, "dataset": out.name, "source": " ".join(cfg.source),
                "settings": settings, "tokenizer": cfg.tokenizer, "vocab_size": tok.vocab_size,
                "eot": tok.eot, "dtype": writers["train"].dtype.name,
                "splits": {split: writer.close() for split, writer in writers.items()}}
        (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
    report(out)


if __name__ == "__main__":
    run(main, Config, positional=("source",))
