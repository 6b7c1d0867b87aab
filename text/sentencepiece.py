"""SentencePiece-style BPE by hand, and tokenizer.model files: Llama 1/2, Mistral, Gemma, ChatGLM.

    tokenizer = tokenizer.load("llama-2")       # a folder with tokenizer.json or tokenizer.model
    tokenizer.encode("Hello world")             # [15043, 3186]: "▁Hello", "▁world"

Any machine, CPU only; to expect: a few MB of English a second, since text repeats its words.

Kudo and Richardson 2018 (arXiv:1808.06226). Three things differ from GPT-2's byte-level BPE:
a space is written "▁" (U+2581) and belongs to the word after it; often one is put before the text,
so that a word at its beginning is the word it is elsewhere; and tokens are text, not bytes. A
character without a token of its own falls back to its UTF-8 bytes, tokens named <0x00> to <0xFF>,
or to one unknown token. The merges are those of bpe.py, where the algorithm is.

Two libraries read such vocabularies, and they differ in details that show in the ids:
`sentencepiece` (tokenizer.model) lets two tokens merge if a piece spells both, the higher score
first; `tokenizers` (tokenizer.json) has a list of pairs. Each file is read by the rules of its own
library. save() writes tokenizer.json, as Hugging Face's converters do: the same merges as pairs.
"""
from __future__ import annotations

import base64
import re
import sys
from array import array
from functools import cached_property
from itertools import chain
from operator import add
from typing import Any, Iterable, Iterator, Mapping

from config import UserError, refuse_to_run
from text.bpe import PieceCache, any_of, bpe, mend
from text.added_tokens import cut, flags_of, number
from text.tokenizer_json import list_added

SPACE = "\u2581"
SEP = "\ud800"          # between the halves of a merge: half a surrogate pair is never in a text
BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# SentencePiece's remove_extra_whitespaces in the words of tokenizer.json: pattern -> replacement,
# the last one once spaces are escaped. \A and \z, not ^ and $, which there stand at every line.
TRIM = {r"\A +": "", " {2,}": " ", SPACE + r"+\z": ""}


class SentencePiece:
    """The rules of one vocabulary; Tokenizer holds it as `spm`.

    document: tokenizer.json as parsed. ranks: token -> order of merging, for the rules of
    `sentencepiece`; None for those of `tokenizers`, whose pairs are in the document.
    Errors: ValueError, KeyError or TypeError for what this program does not support.
    """

    def __init__(self, document: dict, ranks: dict[str, int] | None = None):
        model = document["model"]
        self.document = document
        # what no published file of these families has is refused, never half supported
        if any(model.get(k) for k in ("dropout", "continuing_subword_prefix",
                                      "end_of_word_suffix")):
            raise ValueError("dropout, subword prefixes and word suffixes are not supported")
        self.vocab = {str(t): int(i) for t, i in model["vocab"].items()}
        self.strict = ranks is not None         # the rules of `sentencepiece`
        # a rank belongs to the token that a merge makes, or to the pair that it merges
        self.sep = "" if self.strict else SEP
        self.ranks = ranks if self.strict else self._pairs(model["merges"])
        self.unknown = name = model.get("unk_token")
        if name is not None and name not in self.vocab:
            raise ValueError(f"the unknown token {name!r} is not in the vocabulary")
        self.unk = None if name is None else self.vocab[name]
        # fuse: unknown characters in a row are one token; whole: a word that is a token stays one
        self.fuse, self.whole = bool(model.get("fuse_unk")), bool(model.get("ignore_merges"))
        # byte -> id, of the bytes that the vocabulary has: all of them in every published file
        names = {b: f"<0x{b:02X}>" for b in range(256)} if model.get("byte_fallback") else {}
        self.bytes = {b: self.vocab[n] for b, n in names.items() if n in self.vocab}
        # tokens that are looked for in the text before anything is merged, control tokens too
        tokens = document.get("added_tokens") or []
        self.added = ({t["content"]: flags_of(t, t["id"]) for t in tokens} if self.strict
                      else number(tokens, self.vocab))
        self.steps = list(self._steps(document.get("normalizer")))
        self._read_pre_tokenizer(document.get("pre_tokenizer"))
        self._read_decoder(document["decoder"])
        self.names: dict[tuple, tuple] = {}     # see _names()

    def __getstate__(self) -> dict[str, Any]:
        # caches are cheap to fill again, and heavy to send to another process
        return {k: v for k, v in self.__dict__.items() if k not in ("cache", "joined")}

    def _pairs(self, merges: Iterable) -> dict[str, int]:
        """left SEP right -> rank. The library keeps the last of two equal merges, and so do we."""
        ranks = {}
        for k, merge in enumerate(merges):
            left, right = merge.split(" ") if isinstance(merge, str) else merge
            if not {left, right, left + right} <= self.vocab.keys():
                raise ValueError(f"the merge {left!r} {right!r} is not of this vocabulary")
            # a byte token stands for a character that has no token: spell() puts it in at the end
            if BYTE.fullmatch(left) or BYTE.fullmatch(right):
                raise ValueError("merges of byte tokens are not supported")
            ranks[left + SEP + right] = k
        return ranks

    # -- the parts of tokenizer.json around the merges

    def _steps(self, normalizer: dict | None) -> Iterator[tuple]:
        """Yield what is done to text first: (what, old, new) in order."""
        if normalizer is None:
            return
        kind = normalizer["type"]
        pattern = normalizer.get("pattern") or {}
        if kind == "Sequence":          # steps may be nested
            for step in normalizer["normalizers"]:
                yield from self._steps(step)
        elif kind == "Prepend":
            yield "prepend", None, str(normalizer["prepend"])
        elif kind == "Replace" and "String" in pattern:
            yield "replace", str(pattern["String"]), str(normalizer["content"])
        # a foreign regular expression is not run: another engine's, and it may take forever
        elif kind == "Replace" and TRIM.get(pattern["Regex"]) == normalizer["content"]:
            python = pattern["Regex"].replace(r"\z", r"\Z")
            yield "trim", re.compile(python), normalizer["content"]
        elif kind == "Precompiled":
            blob = base64.b64decode(normalizer["precompiled_charsmap"], validate=True)
            yield "map", Charsmap(blob), None
        else:
            raise ValueError(f"the normalizer {kind} is not supported")

    def _read_pre_tokenizer(self, pre: dict | None) -> None:
        """-> scheme: whether Metaspace puts a space first. words: pattern of the parts, or None."""
        self.scheme: str | None = None          # of Metaspace; None if there is none
        self.words: re.Pattern[str] | None = None
        pre = pre or {}
        if pre.get("type") == "Sequence" and len(pre["pretokenizers"]) == 1:
            pre = pre["pretokenizers"][0]
        if pre.get("type") == "Metaspace" and pre.get("replacement", SPACE) == SPACE:
            # files from before 2024 say whether, not when
            old = "always" if pre.get("add_prefix_space", True) else "never"
            self.scheme = pre.get("prepend_scheme", old)
            if self.scheme not in ("always", "first", "never"):
                raise ValueError(f"the prepend_scheme {self.scheme!r} is not supported")
            if pre.get("split", True):
                # no merge crosses into the next word: each "▁" begins a part of its own
                self.words = re.compile(f"{SPACE}[^{SPACE}]*|[^{SPACE}]+")
        elif pre.get("type") == "Split" and pre.get("behavior") == "MergedWithPrevious" \
                and pre["pattern"].get("String") == " " and not pre.get("invert"):
            self.words = re.compile("[^ ]* |[^ ]+")     # Gemma: spaces are "▁" by now
        elif pre:
            raise ValueError(f"the pre_tokenizer {pre.get('type')} is not supported")

    def _read_decoder(self, decoder: dict) -> None:
        """-> strip: how many leading spaces of a text its decoding drops."""
        # "▁" -> " ", byte tokens -> bytes, all tokens joined, and only then spaces stripped
        steps = decoder["decoders"]
        kinds = [s["type"] for s in steps]
        forms = (["Replace"], ["Replace", "Fuse"], ["Replace", "ByteFallback"],
                 ["Replace", "ByteFallback", "Fuse"], ["Replace", "Fuse", "Strip"],
                 ["Replace", "ByteFallback", "Fuse", "Strip"])
        ok = kinds in forms and steps[0]["pattern"].get("String") == SPACE \
            and steps[0]["content"] == " "
        self.strip = 0
        if ok and kinds[-1] == "Strip":
            self.strip = int(steps[-1]["start"])
            ok = steps[-1]["content"] == " "
            ok &= not steps[-1]["stop"] and self.strip >= 0
        if not ok:
            raise ValueError(f"the decoder {' + '.join(kinds)} is not supported")
        self.falls_back = "ByteFallback" in kinds

    # -- text -> ids

    def normalize(self, text: str, prefix: bool = True) -> str:
        """Return `text` as the merges see it; prefix: it may get a space put before it."""
        for what, old, new in self.steps:
            if what == "replace":
                text = text.replace(old, new)
            elif what == "trim":
                text = old.sub(new, text)
            elif what == "map":
                text = old.apply(text, self._symbols())
            elif prefix and text:
                text = new + text
        return text

    def _symbols(self) -> list[str]:
        """Return the symbols of tokenizer.model that users defined; they are found after
        normalizing."""
        return [n for n, t in self.added.items()
                if self.strict and n in self.vocab and not t["special"]]

    def _names(self, controls: Mapping[str, int], letters: frozenset[str]) -> tuple:
        """Return (pattern, spelling -> added token) for raw text, and the same for normalized
        text."""
        key = frozenset(controls), letters
        if key not in self.names:
            raw = {}
            normal = {}
            for name, token in self.added.items():
                if token["special"] and name not in controls or name in letters:
                    continue                    # control tokens in a text are letters
                if self.strict and name in self.vocab and not token["special"]:
                    normal[name] = token
                elif token.get("normalized") and not self.strict:
                    # it is looked for as it looks once normalized: "▁<s>" in old Llama files
                    if looks := self.normalize(name):       # spaces that are trimmed never occur
                        normal[looks] = token
                else:
                    raw[name] = token
            self.names[key] = (any_of(frozenset(raw)), raw), (any_of(frozenset(normal)), normal)
        return self.names[key]

    def encode(self, text: str, controls: Mapping[str, int] = {}, after: str = "",
               letters: frozenset[str] = frozenset()) -> list[int]:
        """Return text -> ids. controls: the control tokens that count as such in it, with their
        ids.

        letters: added tokens that do not count in it. after: what stands before the text, "" for
        nothing, "token" for a control token, or "text", when it goes on in the middle of one and
        gets no space in front.
        """
        # Four steps, as in the library: control and other added tokens of the raw text; what is
        # between them is normalized; added tokens of the normalized text; the rest is merged.
        text = text if text.isascii() else mend(text)
        raw, normal = self._names(controls, letters)
        out: list[int] = []
        for start, part, token in cut(text, *raw):
            if token is not None:
                out.append(token)
                continue
            within = after == "text" and start == 0
            for at, piece, token in cut(self.normalize(part, not within), *normal):
                if token is not None:
                    out.append(token)
                    continue
                if self.scheme is not None:     # a space first, unless there is one
                    piece = piece.replace(" ", SPACE)
                    first = start == at == 0 and after == ""
                    wanted = {"always": at or not within, "first": first, "never": False}
                    if wanted[self.scheme] and not piece.startswith(SPACE):
                        piece = SPACE + piece
                for word in self.words.findall(piece) if self.words else (piece,):
                    out += self._word(word)
        return out

    def _word(self, word: str) -> list[int]:
        """Return the ids of text between cuts of the pre-tokenizer."""
        if self.whole and word in self.vocab:
            return [self.vocab[word]]
        if self.unk is None:    # what has neither token nor bytes is dropped; its neighbours meet
            word = "".join(c for c in word if c in self.vocab or self.bytes.keys() >= {*c.encode()})
        ids = list(chain.from_iterable(map(self.cache.__getitem__, self._chunks(word))))
        if self.fuse and self.unk in ids:       # unknown characters in a row are one token
            ids = [i for k, i in enumerate(ids) if i != self.unk or not k or ids[k - 1] != i]
        return ids

    def _chunks(self, word: str) -> Iterable[str]:
        """Cut where no merge can cross: between two characters that no token has side by side.

        So the pieces of a text can be cached, and a text without spaces is cut as well. With some
        of the 256 bytes missing, the library's order of unknown tokens depends on the whole text.
        """
        if self.bytes and len(self.bytes) < 256:
            return (word,)
        cuts = [k for k, pair in enumerate(map(add, word, word[1:]), 1) if pair not in self.joined]
        return [word[a:b] for a, b in zip([0, *cuts], [*cuts, len(word)])]

    @cached_property
    def joined(self) -> set[str]:
        """Every two characters that stand side by side in a token that a merge makes."""
        pairs: set[str] = set()
        for key in self.ranks:
            token = key.replace(SEP, "")
            pairs.update(map(add, token, token[1:]))
        return pairs

    @cached_property
    def cache(self) -> Chunks:
        return Chunks(self)

    def spell(self, parts: list[str]) -> list[int]:
        """Return the merged parts of a chunk -> ids."""
        out = []
        unknown = False
        for part in parts:
            i = self.vocab.get(part)
            raw = part.encode() if i is None else b""
            if raw and all(b in self.bytes for b in raw):
                out += [self.bytes[b] for b in raw]     # before an unknown one that waits
                continue
            if unknown and (i is not None or not self.fuse):
                out.append(self.unk)
            unknown = i is None
            if i is not None:
                out.append(i)
        return out + [self.unk] * unknown

    # -- ids -> text, and to a file

    def spelled(self, token: str) -> bytes:
        """Return the bytes that a token stands for: b" the" for "▁the", b"\\n" for "<0x0A>"."""
        if self.falls_back and BYTE.fullmatch(token):
            return bytes([int(token[3:5], 16)])
        if self.added.get(token, {}).get("normalized") and not self.strict:
            token = self.normalize(token)       # " <s>": what it took from the text
        return token.replace(SPACE, " ").encode()

    def json(self, post: dict | None) -> dict[str, Any]:
        """Return the document of the `tokenizers` library."""
        added = list_added(self.added)
        # tokens that the library would number otherwise stand in the vocabulary as well
        vocab = dict(self.vocab)
        vocab.update((n, self.added[n]["id"]) for n, t in number(added, vocab).items()
                     if t["id"] != self.added[n]["id"])
        # a tie between two pairs of one piece: here, the longer left half goes first
        if self.strict:         # a piece with a rank -> all pairs that spell it
            merges = [[t[:k], t[k:]] for t in sorted(self.ranks, key=self.ranks.__getitem__)
                      for k in range(len(t) - 1, 0, -1)
                      if self._merges(t[:k]) and self._merges(t[k:])]
        else:
            merges = [k.split(SEP) for k in sorted(self.ranks, key=self.ranks.__getitem__)]
        model = {**self.document["model"], "vocab": vocab, "merges": merges}
        return {"version": "1.0", "truncation": None, "padding": None, **self.document,
                "added_tokens": added, "post_processor": post, "model": model}

    def _merges(self, half: str) -> bool:
        return half in self.ranks or len(half) == 1 and half in self.vocab


class Chunks(PieceCache):
    """Chunk -> ids, by the rules of a SentencePiece."""

    def __init__(self, spm: SentencePiece):
        super().__init__(spm.ranks, spm.vocab)
        self.spm = spm

    def merged(self, chunk: str) -> list[int]:
        return self.spm.spell(bpe(self.ranks, chunk, self.spm.sep))


class Charsmap:
    """SentencePiece's rules for characters (NFKC and more): a trie of UTF-8 -> replacement.

    blob: a byte count (4 bytes), a double-array trie of darts-clone (4 bytes a unit), and
    replacements, each ended by a zero byte. A unit holds a label, the distance to its children,
    and whether a rule ends there; the rule's value is the place of its replacement.
    """

    def __init__(self, blob: bytes):
        # nothing in the file is trusted: sizes here, places in the trie and strings in longest()
        size = int.from_bytes(blob[:4], "little")
        if len(blob) < 8 or size % 4 or not 4 <= size <= len(blob) - 4:
            raise ValueError("the table of characters is cut short")
        self.units = array("I", blob[4:4 + size])
        self.strings = blob[4 + size:]
        if sys.byteorder == "big":
            self.units.byteswap()

    def longest(self, raw: bytes, at: int) -> tuple[int, bytes] | None:
        """Return (bytes read, replacement) of the longest rule that matches at `at`, or None."""
        units = self.units
        found = None
        place = 0
        for k in range(at, len(raw) + 1):
            unit = units[place]
            place ^= (unit >> 10) << ((unit & 512) >> 6)        # the children of this unit
            if k > at and unit >> 8 & 1 and place < len(units):
                found = k - at, units[place] & 0x7FFFFFFF       # a rule ends here
            place ^= raw[k] if k < len(raw) else 0
            if k == len(raw) or place >= len(units) or units[place] & 0x800000FF != raw[k]:
                break
        if found is None:
            return None
        end = self.strings.find(b"\0", found[1])
        if end < 0:
            # found while a text is encoded: a look at every rule would cost more than the loading
            raise UserError("the tokenizer's table of characters points outside itself: copy its "
                            "file again")
        return found[0], self.strings[found[1]:end]

    def apply(self, text: str, symbols: Iterable[str] = ()) -> str:
        """Return `text` with each longest rule replaced; the symbols in it stay as they are."""
        pattern = any_of(frozenset(symbols))
        parts = re.split(f"({pattern.pattern})", text) if pattern else [text]
        return "".join(p if k % 2 else self._apply(p) for k, p in enumerate(parts))

    def _apply(self, text: str) -> str:
        raw = text.encode()
        out = []
        at = 0
        while at < len(raw):
            if rule := self.longest(raw, at):
                out.append(rule[1])
                at += rule[0]
                continue
            end = at + 1
            while end < len(raw) and raw[end] & 0xC0 == 0x80:   # the rest of this character
                end += 1
            out.append(raw[at:end])
            at = end
        return b"".join(out).decode(errors="replace")


# --- reading files --------------------------------------------------------------------------
# Each reader returns the arguments of Tokenizer().

def fits(document: dict) -> bool:
    """Return whether a tokenizer.json is of this kind: its decoder turns "▁" into spaces."""
    decoder = document.get("decoder") or {}
    return decoder.get("type") == "Sequence" and any(
        d.get("type") == "Replace" for d in decoder["decoders"])


def from_json(document: dict, ranks: dict[str, int] | None = None) -> dict[str, Any]:
    """Return a parsed tokenizer.json."""
    if document["model"].get("type", "BPE") != "BPE":
        raise ValueError("only BPE is supported")
    spm = SentencePiece(document, ranks)
    special = {n: t["id"] for n, t in spm.added.items() if t["special"]}
    ids = {t.encode(): i for t, i in spm.vocab.items() if t not in special}
    ids.update((n.encode(), t["id"]) for n, t in spm.added.items() if n not in special)
    return dict(ranks={}, special=special, pattern="", ids=ids, spm=spm,
                post=document.get("post_processor"))


if __name__ == "__main__":
    refuse_to_run()
