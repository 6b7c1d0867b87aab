"""Files -> documents -> ids: the text of a dataset as a stream, which data/prepare.py writes down.

    corpus = Corpus(files, cfg)             # (path, split) each; cfg is prepare.Config
    corpus.scan()                           # counts, finds what is broken, decides on the split
    tokenizer = corpus.train_tokenizer()
    encode_corpus(corpus, folder, writers, workers)

Every pass reads the text anew, so that memory stays the same however large it is. The split is by
the hash of the text that opens a document: copies of one are never on both sides.
"""
from __future__ import annotations

import math
import multiprocessing
import os
import re
import signal
import threading
from collections import deque
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Iterable, Iterator

from config import UserError, refuse_to_run

import numpy as np

import tokenizer
from data import loader
from data.download import Progress, note
from data.shards import draw_uniform

# characters of text for each entry of a vocabulary: each is then seen some 16 times on average
EVIDENCE = 64
SMALLEST = 512                          # entries, however short the text is
RECORDS = (".jsonl", ".json", ".csv")   # many documents a file; anything else is one


# --- files -> documents ------------------------------------------------------------------------
class Corpus:
    """All the text as a stream of pieces, as often as needed, at constant memory.

    A piece is (split, opens, text): a document, or a block of a long text file; `opens` is true
    for the first of a document. scan() comes before the other passes and decides on the split.
    """

    def __init__(self, files: list[tuple[Path, str]], cfg: Any):
        self.files = files
        self.cfg = cfg
        self.books = cfg.source == ["gutenberg"]
        # A stray byte in somebody's standard library must not stop the very first command.
        self.reader = loader.Reader(cfg.skip_bad or cfg.source == ["stdlib"])
        self.size = sum(os.path.getsize(path) for path, _ in files)
        self.chars = self.documents = 0
        self.low = 0.0
        self.high = 1.0
        self.cut = None

    def texts(self, path: Path) -> Iterator[Iterable[str]]:
        """Yield the documents of a file, each as its blocks of text."""
        if loader.kind_of(path) in RECORDS:
            for where, record in self.reader.records(path):
                text = record.get(self.cfg.key)
                if isinstance(text, str):
                    yield [tokenizer.mend(text)]       # "\ud800" is legal JSON, but no text
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
        """Yield all pieces in order, or those of the first `limit` characters; `what` names the
        pass."""
        show = Progress(what, self.size)
        seen = 0
        self.reader.consumed = self.reader.bad = 0
        for path, fixed in self.files:
            for document in self.texts(path):
                split = fixed
                opens = True
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
                    opens = False
                    seen = seen + len(text)
                    show(self.reader.consumed)
                    if seen >= limit:
                        return
        show(self.reader.consumed, last=True)

    def side(self, text: str) -> str:
        """Return the split of a document: by content, so that its copies are never on both sides.

        The highest mark always trains and the lowest validates, so that neither side is empty.
        """
        mark = draw_uniform(self.cfg.seed, text)
        low = mark == self.low or mark < self.cfg.val_fraction
        return "val" if low and mark != self.high and self.cut is None else "train"

    def scan(self) -> None:
        """The first pass counts, and finds what is broken before hours went into the rest."""
        low = 1.0                       # side() does not matter yet
        high = 0.0
        for _, opens, text in self.pieces("reading"):
            self.chars += len(text)
            self.documents += opens
            if opens:
                number = draw_uniform(self.cfg.seed, text)
                low = min(low, number)
                high = max(high, number)
        if not self.chars:
            raise UserError(f"there is no text in {' '.join(self.cfg.source)}")
        if self.reader.bad:
            note(f"{self.reader.bad:,} broken places were dropped")
        self.low = low
        self.high = high
        if low == high:                 # one document, or copies of one
            self.cut = int(self.chars * (1 - self.cfg.val_fraction))
            if not 0 < self.cut < self.chars:
                raise UserError(f"{self.chars} characters are too few to split: give more text")

    def train_tokenizer(self, adapt: bool = False) -> Any:
        """Return a tokenizer for this text; a bpe sees the training documents alone.

        adapt: the vocabulary is at most vocab_size, and smaller for a text that would give many of
        so many entries too few examples to learn from, or has too few words to fill it.
        """
        what = "training the tokenizer"
        size = self.cfg.vocab_size
        if self.cfg.tokenizer == "char":        # as nanoGPT: of all text, or val has unknown ones
            return tokenizer.train_chars(text for _, _, text in self.pieces(what))
        if adapt:
            size = min(size, max(SMALLEST, self.chars // EVIDENCE // 64 * 64))
        pieces = self.pieces(what, limit=self.cfg.tokenizer_chars)
        tok = tokenizer.train((text for split, _, text in pieces if split == "train"),
                               size, self.cfg.pattern, fewer=adapt)
        if tok.vocab_size < self.cfg.vocab_size:
            note(f"a vocabulary of {tok.vocab_size:,} entries, not {self.cfg.vocab_size:,}, suits "
                 f"{self.chars:,} characters of text; --vocab_size=N asks for another")
        return tok


# --- documents -> shards -----------------------------------------------------------------------
TOKENIZER: Any = None                   # of this process, once start_worker() has run


def start_worker(folder: Path) -> None:
    """Make this process ready to encode."""
    global TOKENIZER
    TOKENIZER = tokenizer.load(str(folder))
    if parent := multiprocessing.parent_process():
        signal.signal(signal.SIGINT, signal.SIG_IGN)        # Ctrl-C is for the parent to answer
        # without this, workers would outlive a parent that was killed
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def encode(bundle: list[tuple[str, bool, str]]) -> list[tuple[str, np.ndarray, int, int]]:
    """Pieces -> (split, ids, documents, bytes); the end-of-text id opens a document."""
    out = []
    eot = TOKENIZER.eot
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
    waiting = deque()
    bundle = []
    weight = 0

    def take() -> None:
        for split, ids, documents, size in waiting.popleft().result():
            writers[split].write(ids, documents, size)

    with kind(workers, initializer=start_worker, initargs=(folder,)) as pool:
        for piece in corpus.pieces("encoding"):
            bundle.append(piece)
            weight += len(piece[2])
            if weight >= loader.BLOCK // 2:     # small documents travel together
                waiting.append(pool.submit(encode, bundle))
                bundle = []
                weight = 0
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
        count = int(head[2])
        show = Progress(f"converting {path.name}", count, "M tokens")
        for start in range(0, count, loader.BLOCK):
            size = min(loader.BLOCK, count - start)
            part = np.fromfile(path, dtype="<u2", count=size, offset=1024 + 2 * start)
            if len(part) < size:
                raise UserError(f"{path} was cut while it was read: run this again")
            writers[split].write(part, (part == tok.eot).sum(), lengths[part].sum())
            show(start + len(part))
        show(count, last=True)


if __name__ == "__main__":
    refuse_to_run()
