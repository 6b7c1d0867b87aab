"""Pre-tokenizers of byte-level BPE: how text is cut into the chunks that merges never cross.

Most models have one regular expression (GPT-2, Llama 3, Qwen); bpe.py and tiktoken both run it.
Others have a sequence: DeepSeek cuts at numbers, then at Chinese, then at the rest; Falcon goes on
cutting after the bytes were spelt as letters. Here a pre_tokenizer of tokenizer.json is read, and
either kind applied as the `tokenizers` library applies it (the oracle of the tests). What no
published byte-level model uses is refused by name.
"""
from __future__ import annotations

import json
import re
from typing import Any, Iterator, NamedTuple

from config import refuse_to_run
from text.bpe import PATTERNS, compiled, printable

BEHAVIORS = ("Isolated", "Removed", "Contiguous", "MergedWithPrevious", "MergedWithNext")
PUNCTUATION = r"[!-/:-@\[-`{-~\p{P}]"


class Split(NamedTuple):
    """One cut. behavior: what becomes of a match; invert: what lies between counts as matches."""
    pattern: str
    behavior: str = "Isolated"
    invert: bool = False


class Splits:
    """A sequence of cuts; None among them is where bytes become printable characters."""

    def __init__(self, steps: list[Split | None]):
        self.steps = steps
        self.spelled = steps[-1] is not None        # whether chunks are printable characters
        for step in filter(None, steps):
            check_time(step.pattern)                # now, not in the middle of a run

    def chunks(self, text: str) -> Iterator[list[str]]:
        """Yield the chunks of a text, all in one list."""
        pieces = [text] if text else []
        for step in self.steps if self.spelled else self.steps[:-1]:
            if step is None:
                pieces = [printable(piece.encode()) for piece in pieces]
            else:
                pieces = [part for piece in pieces for part in apply(step, piece)]
        yield pieces


def apply(step: Split, text: str) -> list[str]:
    """Return the pieces of a text after one cut; none of them is empty."""
    regex = compiled(step.pattern, 0x7F if text.isascii() else 0x10FFFF)
    spans: list[tuple[int, int, bool]] = []         # (start, stop, matched), covering the text
    end = 0
    for match in regex.finditer(text):
        start, stop = match.span()
        if end < start:
            spans.append((end, start, step.invert))
        if start < stop:
            spans.append((start, stop, not step.invert))
        end = stop
    if end < len(text):
        spans.append((end, len(text), step.invert))
    if step.behavior == "Isolated":
        return [text[a:b] for a, b, _ in spans]
    if step.behavior == "Removed":
        return [text[a:b] for a, b, matched in spans if not matched]
    # the other three join neighbours
    backwards = step.behavior == "MergedWithNext"
    pieces: list[tuple[int, int]] = []
    before = False
    for a, b, matched in reversed(spans) if backwards else spans:
        joins = matched == before if step.behavior == "Contiguous" else matched and not before
        before = matched
        if joins and pieces:
            c, d = pieces[-1]
            pieces[-1] = (min(a, c), max(b, d))
        else:
            pieces.append((a, b))
    return [text[a:b] for a, b in (reversed(pieces) if backwards else pieces)]


def read(pre: dict) -> tuple[str, Splits | None]:
    """Read a pre_tokenizer -> (split pattern, None), or for others (its text, all cuts).

    ValueError names what is not supported.
    """
    steps = [part for step in flatten(pre) for part in read_step(step)]
    if steps.count(None) != 1:
        raise ValueError("only byte-level BPE is supported, whose pre_tokenizer has one ByteLevel")
    if steps == [Split(r"\p{N}"), Split(PATTERNS["gpt2"]), None]:
        return PATTERNS["smollm"], None
    if steps == [None]:
        steps = [Split(r"[\s\S]+"), None]           # no cut at all
    if len(steps) == 2 and steps[1] is None:
        pattern, behavior, invert = steps[0]
        check_time(pattern)
        # what matches is a chunk, and what lies between two matches another: bpe.total()
        if (behavior, invert) == ("Isolated", False) and shortest(pattern):
            return pattern, None
        if (behavior, invert) == ("Removed", True) and pattern in PATTERNS.values():
            return pattern, None
    return json.dumps(pre, sort_keys=True), Splits(steps)


def parse(pattern: str) -> Any:
    """Return the tree of a split pattern as Python's `re` parses it."""
    parser = getattr(re, "_parser", None) or re.sre_parse       # the latter in Python 3.10
    return parser.parse(compiled(pattern, 0x7F).pattern)


def shortest(pattern: str) -> int:
    """Return how many characters a match has at least."""
    return parse(pattern).getwidth()[0]


def check_time(pattern: str) -> None:
    """Raise ValueError for a pattern that may take exponential time: a file names it, and a text
    that does not match is tried in every way that the pattern can divide it.

    (x+)+y is such a pattern, and (x|xx)+y: what repeats without a bound can match one text in
    several ways, and what follows may fail. At the end of a pattern nothing can.
    """
    if pattern not in PATTERNS.values() and backtracks(parse(pattern), False):
        raise ValueError(f"the split pattern {pattern!r:.80} repeats what has several lengths "
                         "before something that may fail, which may take exponential time")


def backtracks(tree: Any, fails_after: bool) -> bool:
    """Return whether a tree of `re` has such a repeat; fails_after: whether what follows may fail.
    """
    for at in reversed(range(len(tree))):
        op, value = tree[at]
        name = str(op)
        if name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            _, most, body = value
            low, high = body.getwidth()
            often = most > 8                    # (x?){30}y takes 2^30 ways as well
            if name != "POSSESSIVE_REPEAT" and often and fails_after and (
                    low != high or any(str(o) == "BRANCH" for o, _ in walk(body))):
                return True
            # inside, the next round follows, which may fail, but then the repeat ends there
            if backtracks(body, fails_after):
                return True
        elif name == "BRANCH":
            if any(backtracks(branch, fails_after) for branch in value[1]):
                return True
        elif name == "SUBPATTERN":
            if backtracks(value[-1], fails_after):
                return True
        elif name == "ATOMIC_GROUP":
            if backtracks(value, False):        # its inside is never tried again
                return True
        elif name in ("ASSERT", "ASSERT_NOT") and backtracks(value[1], True):
            return True
        fails_after = fails_after or name != "MAX_REPEAT" or value[0] > 0
    return False


def walk(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the nodes of a tree of `re`, those inside others included."""
    for op, value in tree:
        yield op, value
        parts = value if isinstance(value, (tuple, list)) else (value,)
        for part in parts:
            inner = part if isinstance(part, list) else [part]
            for sub in inner:
                if hasattr(sub, "getwidth"):
                    yield from walk(sub)


def flatten(part: Any, kind: str = "pre_tokenizer") -> list[dict]:
    """Return the steps of a pre_tokenizer or normalizer, sequences within sequences in order."""
    out: list[dict] = []
    waiting = [part]
    while waiting:
        step = waiting.pop()
        if not isinstance(step, dict):
            raise ValueError(f"the {kind} has {step!r:.40}, expected an object")
        if step.get("type") == "Sequence":
            waiting += reversed(step[kind.replace("_", "") + "s"])
        elif step:
            out.append(step)
    return out


def read_step(step: dict) -> list[Split | None]:
    """Read one pre_tokenizer of a sequence as cuts."""
    def flag(key: str) -> bool:
        if type(step.get(key)) is not bool:
            raise ValueError(f"a pre_tokenizer's {key} is {step.get(key)!r:.40}, expected true or "
                             "false")
        return step[key]

    kind = step.get("type")
    if kind == "ByteLevel":
        if flag("add_prefix_space"):
            raise ValueError("byte-level BPE with a prefix space is not supported")
        flag("trim_offsets")                        # no id depends on it; the library asks for it
        return [Split(PATTERNS["gpt2"]), None] if "use_regex" not in step or flag(
            "use_regex") else [None]
    if kind == "Digits":
        return [Split(r"\p{N}", "Isolated" if flag("individual_digits") else "Contiguous")]
    if kind not in ("Split", "Punctuation"):
        raise ValueError(f"the pre_tokenizer {kind!r:.40} is not supported in byte-level BPE")
    behavior = step["behavior"]
    if behavior not in BEHAVIORS:
        raise ValueError(f"the behavior {behavior!r:.40} of a pre_tokenizer is not supported")
    if kind == "Punctuation":
        return [Split(PUNCTUATION, behavior)]
    pattern = step["pattern"]
    literal = pattern.get("String")
    regex = translate(pattern["Regex"]) if literal is None else re.escape(literal)
    if literal == "" or regex == "":
        raise ValueError("a pre_tokenizer splits at an empty pattern")
    return [Split(regex, behavior, flag("invert"))]


def translate(pattern: str) -> str:
    """Translate a pattern of tokenizer.json, in Oniguruma's language, to that of bpe.compiled().

    There `$` stands before every newline too, and {1,3}+ repeats. The known patterns need no
    translation, and `^` is in none of them.
    """
    if not isinstance(pattern, str):
        raise ValueError(f"a split pattern is {pattern!r:.40}, expected a text")
    # X{m,n}+ is no possessive quantifier there: it means (X{m,n})+
    pattern = re.sub(r"(\\[pP]\{\w+\}|\\[dswDSW])(\{\d+(?:,\d*)?\})\+", r"(?:\1\2)+", pattern)
    out = []
    in_class = False
    for token in re.findall(r"\\[pP]\{[^}]*\}|\\.|\[\^?|\{[\d,]+\}\+?|.", pattern, re.DOTALL):
        if in_class:
            in_class = token != "]"
        elif token[0] == "[":
            in_class = True
        elif token == "^" or token in (r"\G", r"\Z", r"\b", r"\B", r"\R", r"\X", r"\h", r"\H") \
                or re.fullmatch(r"\{.*\}\+", token):
            raise ValueError(f"{token} in a split pattern is not supported")
        else:
            token = {"$": r"(?=\n|\z)", ".": r"[^\n]"}.get(token, token)
        out.append(token)
    return "".join(out)


if __name__ == "__main__":
    refuse_to_run()
