"""Added tokens: texts with an id of their own, which are found in a text before anything is merged.

A tokenizer.json lists them, with flags: `special` (a control token: generation hides it, and a user
who types it gets its letters here), `lstrip` and `rstrip` (it takes the white space beside it),
`single_word` (it counts only where no word goes on), `normalized` (it is looked for in normalized
text, as it looks there itself). What is not special counts in any text: <think>, <tool_call>,
runs of spaces. The rules are those of the `tokenizers` library (AddedVocabulary), which is the
oracle of the tests: of several tokens that begin at one place the longest is taken.
"""
from __future__ import annotations

import re
from functools import lru_cache
from typing import Any, Callable, Iterable, Iterator, Mapping

from config import refuse_to_run
from text.bpe import any_of, compiled

FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
FEW = 64                # so many names are looked for one by one, which is faster
# White space as Rust's regex crate knows it; Python's own \s has four control characters more.
BLANK = "\t\n\x0b\x0c\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008" \
        "\u2009\u200a\u2028\u2029\u202f\u205f\u3000"


def flags_of(token: Mapping[str, Any], i: int) -> dict[str, Any]:
    """Return {"id": i} and all flags of an added token, as a file lists it."""
    flags = {key: token.get(key, False) for key in FLAGS}
    if strange := [key for key, value in flags.items() if not isinstance(value, bool)]:
        raise ValueError(f"an added token has {strange[0]} = {flags[strange[0]]!r:.40}, expected "
                         "true or false")
    return {"id": i, **flags}


def number(tokens: Iterable[Mapping[str, Any]], vocab: Mapping[str, int]) -> dict[str, dict]:
    """Return name -> flags of the added tokens of a file, numbered as the library numbers them.

    A token of the vocabulary has its id there; another gets the next one behind all of them,
    whatever the file says (the two agree in every file that the library wrote).
    """
    added: dict[str, dict] = {}
    following = len(vocab)
    for token in tokens:
        name = token["content"]
        if not isinstance(name, str) or not name:
            raise ValueError(f"an added token has the content {name!r:.40}, expected a text")
        if name in added:
            i = added[name]["id"]
        elif name in vocab:
            i = vocab[name]
        else:
            i = following
        following = max(following, i + 1)
        added[name] = flags_of(token, i)
    return added


@lru_cache(maxsize=1)
def word_character() -> re.Pattern[str]:
    r"""Return the pattern of one character of a word, \w of Rust's regex crate."""
    return compiled(r"\w", 0x10FFFF)


class Names:
    """Some added tokens, ready to be looked for: in raw text, and in normalized text."""

    def __init__(self, tokens: Mapping[str, Mapping], normalize: Callable[[str], str]):
        self.raw = {n: t for n, t in tokens.items() if not t["normalized"]}
        self.normal: dict[str, Mapping] = {}
        # of two that look alike then, a control token counts, or the first
        for name, token in sorted(tokens.items(), key=lambda item: not item[1]["special"]):
            if token["normalized"]:
                self.normal.setdefault(normalize(name), token)
        self.normal.pop("", None)
        self.patterns = any_of(frozenset(self.raw)), any_of(frozenset(self.normal))

    def __bool__(self) -> bool:
        return bool(self.raw or self.normal)

    def cut_raw(self, text: str) -> Iterator[tuple[int, str, int | None]]:
        """Cut a text as cut() does, at the tokens of raw text."""
        return cut(text, self.patterns[0], self.raw)

    def cut_normal(self, text: str) -> Iterator[tuple[int, str, int | None]]:
        """Cut a normalized text as cut() does, at the tokens of normalized text."""
        return cut(text, self.patterns[1], self.normal)


def cut(text: str, pattern: re.Pattern | None, tokens: Mapping[str, Mapping]
        ) -> Iterator[tuple[int, str, int | None]]:
    """Yield (start, text between tokens, None) and (start, "", id of a token), in order."""
    if pattern is None or len(tokens) <= FEW and not any(map(text.__contains__, tokens)):
        if text:
            yield 0, text, None
        return
    begin = 0
    for match in pattern.finditer(text):
        token = tokens[match.group()]
        start, stop = match.span()
        if token.get("single_word"):
            word = word_character()
            if start and word.match(text[start - 1]) or stop < len(text) and word.match(text[stop]):
                continue
        # some tokens take the white space beside them (<mask>, Phi-3's <|user|>), even where it is
        # a token itself
        if token.get("lstrip"):
            while start > begin and text[start - 1] in BLANK:
                start -= 1
            start = max(start, begin)
            if start >= stop:
                continue
        while token.get("rstrip") and stop < len(text) and text[stop] in BLANK:
            stop += 1
        if begin < start:
            yield begin, text[begin:start], None
        yield start, "", int(token["id"])
        begin = stop
    if begin < len(text):
        yield begin, text[begin:], None


if __name__ == "__main__":
    refuse_to_run()
