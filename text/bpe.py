"""Byte-pair encoding by hand: cut text into chunks, learn merges, apply them.

    ranks = learn(count_chunks(texts, PATTERNS["gpt2"]), size=16384)    # {token bytes: rank}
    bpe(ranks, b" tokenizer")                                           # [b" token", b"izer"]

The method of Sennrich et al. 2016 (arXiv:1508.07909), over bytes as in GPT-2 (Radford et al. 2019).
A regular expression cuts text into chunks, about words; inside a chunk each byte starts as a token.
Training merges the most frequent pair of adjacent tokens into a new token, again and again.
Encoding replays that: of all adjacent pairs, it merges the one that was learnt first.

A vocabulary is `ranks`: token bytes -> the order of learning. Nothing else is needed: two adjacent
tokens merge if the bytes of both together have a rank. Ids, control tokens and files are
tokenizer.py's; the command line is there too, and `python bench.py tokenizer` measures this file.
"""
from __future__ import annotations

import heapq
import json
import multiprocessing
import os
import re
import sys
import time
from collections import Counter, defaultdict
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from itertools import chain
from os.path import commonprefix
from pathlib import Path
from typing import Any, Iterable, Iterator

from config import UserError, refuse_to_run

import numpy as np
import tiktoken

from text import files

NEVER = 1 << 62         # the rank of a pair that is no token
SHORT = 200             # bytes; longer chunks are rare, and merged by another loop

# GPT-2 lists bytes as printable characters: 188 bytes stand for themselves, the other 68 (space,
# controls, …) for the characters from U+0100 on. Ranks 0..255 follow that order here too.
BYTE_ORDER = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_ORDER += [b for b in range(256) if b not in BYTE_ORDER]

# Files hold tokens as text, a byte being one of 256 printable characters: "Ġthe" is b" the".
BYTE_CHAR = {b: chr(b if i < 188 else 256 + i - 188) for i, b in enumerate(BYTE_ORDER)}
CHAR_BYTE = {c: b for b, c in BYTE_CHAR.items()}

# How text is cut; merges never cross a cut. These are the published patterns without possessive
# quantifiers and `$`, which other regex engines read differently. The chunks are the same.
_WORD = r"[^\r\n\p{L}\p{N}]?"
_SPACE = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    # GPT-4, Llama 3
    "cl100k": rf"{_SUFFIX}|{_WORD}\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACE}",
    "qwen": rf"{_SUFFIX}|{_WORD}\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACE}",
    "o200k": rf"{_WORD}{_UPPER}*{_LOWER}+{_SUFFIX}?|{_WORD}{_UPPER}+{_LOWER}*{_SUFFIX}?"
             rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACE}",
    # SmolLM2 cuts at every digit before GPT-2's pattern runs, so a digit ends a run of spaces
    "smollm": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+",
}


# --- files -------------------------------------------------------------------------------------

def printable(token: bytes) -> str:
    """b" the" -> "Ġthe", as files spell it."""
    return "".join(map(BYTE_CHAR.__getitem__, token))


def unprintable(token: str) -> bytes:
    """printable() undone; a token with other letters is no byte token and taken as it is."""
    try:
        return bytes([CHAR_BYTE[c] for c in token])
    except KeyError:
        return token.encode()


# --- text -> chunks -------------------------------------------------------------------------

@lru_cache(maxsize=64)
def members(escape: str) -> list[list[int]]:
    r"""[first, last] code points of an escape such as r"\p{L}" or r"\s", as tiktoken reads it.

    Python's `re` has no \p{L}, four more characters in \s, and another version of Unicode. But
    encoding drops what the pattern does not match: of a text of all characters, tiktoken returns
    exactly the members.
    """
    single = {bytes([b]): b for b in range(256)}
    try:
        sieve = tiktoken.Encoding("sieve", pat_str=f"(?:{escape})+", mergeable_ranks=single,
                                  special_tokens={})
    except ValueError:
        raise UserError(f"split pattern: {escape} is not a character class") from None
    ranges: list[list[int]] = []
    for start in chain(range(0, 0xD800, 2048), range(0xE000, 0x110000, 2048)):  # no surrogates
        some = sieve.encode_ordinary("".join(map(chr, range(start, start + 2048))))
        for code in map(ord, sieve.decode_bytes(some).decode()):
            if ranges and code == ranges[-1][1] + 1:
                ranges[-1][1] = code
            else:
                ranges.append([code, code])
    return ranges


@lru_cache(maxsize=64)
def compiled(pattern: str, top: int) -> re.Pattern[str]:
    """Return `pattern` for Python's `re`, right for texts whose characters are all <= `top`.

    Only three tops occur: `re` looks characters up to U+FFFF up in a table, and anything beyond
    range by range, ten times slower, so the full pattern is kept for text that needs it.
    """
    out = []
    in_class = False
    quantified = False
    for token in re.findall(r"\\[pP]\{[^}]*\}|\\.|\[\^?|\(\?|\{[\d,]+\}|.", pattern, re.DOTALL):
        was_quantified = quantified
        quantified = False
        if re.match(r"\\[pPsSdDwW]", token):
            spans = [(a, min(b, top)) for a, b in members(token) if a <= top]
            # a class without members has to stay a class: U+FFFF is never a character
            token = "".join(rf"\U{a:08x}-\U{b:08x}" for a, b in spans) or r"\uffff"
            token = token if in_class else f"[{token}]"
        elif in_class and (token[0] == "[" or token in "&-~" and out[-1] == token):
            raise UserError(f"split pattern {pattern!r}: nested classes are not supported")
        elif token[0] == "[" or token == "]":
            in_class = token != "]"
        elif not in_class:
            quantified = token[0] in "*+?{"
            if token == "+" and was_quantified:     # `++`, possessive: Python has it from 3.11 on
                token = "+" if sys.version_info >= (3, 11) else ""
            # `$` must not match before a last newline, nor groups capture: findall returns those
            token = {"$": r"\Z", r"\z": r"\Z", "(": "(?:"}.get(token, token)
        out.append(token)
    try:
        return re.compile("".join(out))
    except (re.error, OverflowError) as e:
        raise UserError(f"split pattern {pattern!r} is not understood: {e}") from None


def blocks(text: str, size: int = 1 << 16) -> Iterator[str]:
    """Cut a long text where the patterns above cut it anyway: lists stay short, memory bounded.

    Subtle: a newline between two visible characters always ends a chunk, and no chunk looks past
    it, except before "/", which o200k appends to punctuation. (One emoji slows one block, too.)
    """
    start = 0
    safe = re.compile(r"\S\n(?=[^\s/])")
    while len(text) - start > size and (m := safe.search(text, start + size)):
        yield text[start:m.end()]
        start = m.end()
    yield text[start:]


def split(pattern: str, text: str) -> list[str]:
    """Return the chunks of a text: "I'm 12" -> ["I", "'m", " 12"] with GPT-2's pattern."""
    if text.isascii():
        return compiled(pattern, 0x7F).findall(text)
    # two bytes a character in UTF-16 means no character beyond U+FFFF
    basic = len(text.encode("utf-16-le", "surrogatepass")) == 2 * len(text)
    return compiled(pattern, 0xFFFF if basic else 0x10FFFF).findall(text)


@lru_cache(maxsize=64)
def total(pattern: str) -> str:
    """Return a foreign pattern with one more alternative: what lies between its matches is a chunk
    too.

    Ours match any text whole. tiktoken and findall() would drop the rest, `tokenizers` keeps it.
    """
    return pattern if pattern in PATTERNS.values() else rf"{pattern}|(?:(?!{pattern})[\s\S])+"


def chunks(pattern: str, text: str) -> Iterator[list[str]]:
    """split(), a block at a time. A foreign pattern may look further: its text is not cut."""
    for block in blocks(text) if pattern in PATTERNS.values() else (text,):
        yield split(total(pattern), block)


@lru_cache(maxsize=64)
def any_of(names: frozenset[str]) -> re.Pattern[str] | None:
    """Return a pattern for any of the names, the longest first; None for no names.

    Names share beginnings ("<|reserved…"), so it is written as a tree: Gemma has 6,000 of them,
    and an alternation would try each at every "<".
    """
    def tree(words: list[str]) -> str:
        # sorted, so that words with the same first letter stand together
        groups: dict[str, list[str]] = {}
        for word in words:
            groups.setdefault(word[:1], []).append(word)
        optional = "" in groups
        groups.pop("", None)
        out = []
        for group in groups.values():
            start = commonprefix(group)
            rest = tree([w[len(start):] for w in group]) if len(group) > 1 else ""
            out.append(re.escape(start) + rest)
        return f"(?:{'|'.join(out)})" + "?" * optional
    return re.compile(tree(sorted(names))) if names else None


def mend(text: str) -> str:
    """Lone surrogates (JSON can carry them, UTF-8 cannot) -> U+FFFD, as tiktoken does it."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def read_bytes(path: str | os.PathLike) -> bytes:
    """Read a whole file of a tokenizer's."""
    if os.path.exists(path) and not os.path.isfile(path):       # a pipe: waited for indefinitely
        raise UserError(f"{path} is not a plain file: copy it again")
    try:
        return Path(path).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"there is no file {path}") from None


def read_text(path: str | os.PathLike) -> str:
    """Return a whole file of a tokenizer's, which is UTF-8 without a byte order mark."""
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text ({e.reason}): convert it first") from None


def read_json(path: str | os.PathLike) -> Any:
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as e:
        raise UserError(f"{path} is not JSON (line {e.lineno}): is the file complete?") from None


def file_texts(paths: Iterable[str | os.PathLike], size: int = 1 << 22) -> Iterator[str]:
    """Yield the files as text, a few MB at a time, cut where blocks() would cut anyway."""
    for path in paths:
        rest = ""
        for more in files.stream(path, size):
            *whole, rest = blocks(rest + more, size // 2)
            yield from whole
        yield rest


# --- chunks -> tokens -----------------------------------------------------------------------

def bpe(ranks: dict, piece: Any, sep: Any = None) -> list:
    """Merge the adjacent pair of lowest rank, leftmost first, until no pair has a rank.

    piece: bytes, or text where tokens are text (spm.py). sep: what stands between the two halves
    in the keys of `ranks`; None for nothing: then only the token that a merge makes has a rank.

    >>> bpe({b"a": 0, b"b": 1, b"c": 2, b"ab": 3, b"abc": 4}, b"abcab")
    [b'abc', b'ab']
    """
    rank = ranks.get
    n = len(piece)
    sep = piece[:0] if sep is None else sep
    if n < SHORT:
        # A word: plain lists and min() are fastest, though each merge looks at every pair.
        parts = [piece[i:i + 1] for i in range(n)]
        pairs = ([rank(a + sep + b, NEVER) for a, b in zip(parts, parts[1:])] if sep else
                 [rank(piece[i:i + 2], NEVER) for i in range(n - 1)])   # of parts i and i + 1
        while pairs and (lowest := min(pairs)) < NEVER:
            i = pairs.index(lowest)
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
            del pairs[i]
            if i:
                pairs[i - 1] = rank(parts[i - 1] + sep + parts[i], NEVER)
            if i < len(pairs):
                pairs[i] = rank(parts[i] + sep + parts[i + 1], NEVER)
        return parts

    # A megabyte without a space must not take n² steps: parts in a linked list, pairs in a heap.
    def pair(i: int, j: int, end: int) -> int | None:
        return rank(piece[i:j] + sep + piece[j:end] if sep else piece[i:end])

    after = list(range(1, n + 1))                               # starts of a part's neighbours
    before = list(range(-1, n))
    heap = [(r, i, i + 2) for i in range(n - 1) if (r := pair(i, i + 1, i + 2)) is not None]
    heapq.heapify(heap)                                         # (rank, start, end) of a pair
    while heap:
        _, i, end = heapq.heappop(heap)
        j = after[i]
        # stale if an earlier merge took one of the two parts; a part that is gone has after 0
        if not 0 < j < n or after[j] != end:
            continue
        after[i] = end
        after[j] = 0
        before[end] = i
        if end < n and (r := pair(i, end, after[end])) is not None:
            heapq.heappush(heap, (r, i, after[end]))
        if i and (r := pair(before[i], i, end)) is not None:
            heapq.heappush(heap, (r, before[i], end))
    return [piece[i:after[i]] for i in range(n) if after[i]]


class PieceCache(dict):
    """Chunk (str) -> its ids. Text repeats its words: most chunks are looked up, not merged.

    lost: bytes that the vocabulary lacks, dropped from the text. limit: entries kept. whole: tokens
    that only a chunk of its own becomes, no merge. spelled: chunks are in printable characters.
    """

    def __init__(self, ranks: dict[bytes, int], ids: dict[bytes, int], lost: bytes = b"",
                 limit: int = 1 << 18, whole: Iterable[bytes] = (), spelled: bool = False):
        super().__init__()
        self.ranks = ranks
        self.ids = ids
        self.lost = lost
        self.limit = limit
        self.whole = frozenset(whole)
        self.spelled = spelled

    def merged(self, chunk: str) -> list[int]:
        """Return the ids of a chunk that is not here yet."""
        piece = unprintable(chunk) if self.spelled else chunk.encode()
        if piece in self.whole:
            return [self.ids[piece]]
        piece = piece.translate(None, self.lost)
        # a chunk that is a token needs no merging: tiktoken's rule
        parts = [piece] if piece in self.ranks else bpe(self.ranks, piece)
        return [self.ids[p] for p in parts]

    def __missing__(self, chunk: str) -> list[int]:
        out = self.merged(chunk)
        if len(self) >= self.limit:         # bounded: at worst the common words are merged again
            self.clear()
        if len(chunk) < SHORT:
            self[chunk] = out
        return out


# --- learning the ranks ---------------------------------------------------------------------

def count_batch(pattern: str, texts: list[str]) -> Counter[str]:
    """Return the chunks of some texts with their counts; the work of one process."""
    counts: Counter[str] = Counter()
    for text in texts:
        for words in chunks(pattern, text):
            counts.update(words)
    return counts


def count_chunks(texts: Iterable[str], pattern: str, workers: int | None = None) -> Counter[str]:
    """Yield how often each chunk occurs. Memory: the different chunks, and a few batches of text.

    workers: processes to split with, None for one a core. A little text is split right here.
    """
    def batches(size: int = 1 << 20) -> Iterator[list[str]]:
        batch = []
        length = 0
        for text in texts:
            batch.append(text)
            length += len(text)
            if length >= size:
                yield batch
                batch = []
                length = 0
        yield batch

    source = batches()
    head = [b for _, b in zip(range(2), source)]
    little = len(head) < 2
    source = chain(head, source)
    del head                                    # the chain lets go of it, batch by batch
    counts: Counter[str] = Counter()
    # Workers are forked, never spawned: a spawned one imports the user's script again, and a
    # script without a __main__ guard would start workers of its own, without end.
    can_fork = sys.platform == "linux" and not multiprocessing.current_process().daemon
    workers = (os.cpu_count() or 1) if workers is None else workers
    if little or workers < 2 or not can_fork:
        for batch in source:
            counts.update(count_batch(pattern, batch))
        return counts
    try:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
            running = set()
            for batch in source:
                running.add(pool.submit(count_batch, pattern, batch))
                if len(running) > 2 * workers:          # read no faster than the workers count
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                    for job in done:
                        counts.update(job.result())
            for job in running:
                counts.update(job.result())
    except BrokenProcessPool:
        raise UserError("a process that splits text was killed, for want of memory as a rule: use "
                        "fewer with --workers=1") from None
    return counts


def learn(counts: Counter[str], size: int, floor: int = 1, progress: bool = False
          ) -> dict[bytes, int]:
    """Merge the most frequent pair until there are `size` tokens -> {token bytes: rank}.

    Ties go to the pair with the lower ranks, left then right: the result depends on the counts
    alone. Pairs that occur less than `floor` times are not followed (most pairs are that rare,
    and never merged); if that leaves nothing to merge, fewer than `size` tokens come back.

    The obvious way recounts every pair for every merge. Here, pairs sit in a heap with an old
    count. A count can only fall, since a merge creates no pair but those with its new token; so
    the pair on top is recounted, and goes back if it fell: what stays on top is the most frequent.
    """
    # The different chunks one after another, -1 between them. A token of n bytes that starts at p
    # is written to tok[p] and tok[p + n - 1]: neighbours start at p + n and end at p - 1.
    order = bytes(BYTE_ORDER.index(b) for b in range(256))
    tok = [-1]                                  # weight: how often the chunk around p occurs
    weight = [0]
    for word, count in counts.items():
        piece = mend(word).encode().translate(order)
        tok.extend(piece)
        tok.append(-1)
        weight.extend([count] * (len(piece) + 1))
    made = {bytes([b]): i for i, b in enumerate(BYTE_ORDER)}
    spelled = list(made)                        # rank -> bytes, rank -> number of bytes
    length = [1] * 256

    # where: pair (left << 24 | right) -> positions it had when it was last counted
    where: dict[int, list[int]] = {}
    heap: list[tuple[int, int]] = []            # (-count then, pair); the smallest is on top
    flat = np.array(tok)
    times = np.array(weight)
    at = np.flatnonzero((flat[:-1] >= 0) & (flat[1:] >= 0))
    pairs = flat[at] << 24 | flat[at + 1]
    by_pair = np.argsort(pairs, kind="stable")  # stable: positions stay in order
    at = at[by_pair]
    pairs = pairs[by_pair]
    for group in np.split(np.arange(len(at)), np.flatnonzero(np.diff(pairs)) + 1):
        total = int(times[at[group]].sum())
        if total >= floor:
            where[int(pairs[group[0]])] = at[group].tolist()
            heap.append((-total, int(pairs[group[0]])))
    del flat, times, at, pairs, by_pair
    heapq.heapify(heap)

    weigh = weight.__getitem__
    began = time.time()
    while len(made) < size and heap:
        old, pair = heapq.heappop(heap)
        left = pair >> 24
        right = pair & 0xFFFFFF
        a = length[left]
        n = length[left] + length[right]
        if (last_seen := where.pop(pair, None)) is None:
            continue            # counted again since, and dealt with under that count
        live = [p for p in last_seen if tok[p] == left and tok[p + a] == right]
        if len(live) < len(last_seen) and (count := sum(map(weigh, live))) < -old:
            if count >= floor:
                heapq.heappush(heap, (-count, pair))
                where[pair] = live
            continue
        token = spelled[left] + spelled[right]
        if token in made and floor > 1:
            break               # two ways to spell a token: its pairs grow, which floor forbids
        new = made.setdefault(token, len(spelled))
        if new == len(spelled):
            spelled.append(token)
            length.append(n)
        fresh: defaultdict[int, list[int]] = defaultdict(list)  # pairs with the new token
        for p in live:
            if left == right and (tok[p] != left or tok[p + a] != right):
                continue        # "aaa" is two pairs, and the first has taken the middle
            # inner ends first: in a token of one byte both ends are the same place
            tok[p + a - 1] = tok[p + a] = -2
            tok[p] = tok[p + n - 1] = new
            if (x := tok[p - 1]) >= 0:
                fresh[x << 24 | new].append(p - length[x])
            if (y := tok[p + n]) >= 0:
                fresh[new << 24 | y].append(p)
        for pair, places in fresh.items():
            if pair in where:
                places = sorted({*places, *where[pair]})
            # too high where both neighbours merged at once: it falls when it is popped
            count = sum(map(weigh, places))
            if count >= floor:
                where[pair] = places
                heapq.heappush(heap, (-count, pair))
        if progress and len(made) % 1024 == 0:
            seconds = (time.time() - began) * (size / len(made) - 1)
            print(f"\r{len(made)}/{size} tokens, {seconds:.0f} s left ", end="", file=sys.stderr)
    if progress:
        print(file=sys.stderr)
    return made


if __name__ == "__main__":
    refuse_to_run()
