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
import struct
import sys
from array import array
from functools import cached_property
from itertools import chain
from operator import add
from typing import Any, Iterable, Iterator, Mapping

from config import UserError, refuse_to_run
from text.bpe import PATTERNS, PieceCache, any_of, bpe, mend
from text.added_tokens import cut, flags_of, number
from text.tokenizer_json import list_added, surround_text

SPACE = "\u2581"
SEP = "\ud800"          # between the halves of a merge: half a surrogate pair is never in a text
BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# SentencePiece's remove_extra_whitespaces in the words of tokenizer.json: pattern -> replacement,
# the last one once spaces are escaped. \A and \z, not ^ and $, which there stand at every line.
TRIM = {r"\A +": "", " {2,}": " ", SPACE + r"+\z": ""}

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE_PIECE = range(1, 7)    # types of a piece

# Control tokens that published code adds behind the vocabulary of the file, in this order.
CHATGLM = "[MASK] [gMASK] [sMASK] sop eop <|system|> <|user|> <|assistant|> <|observation|>".split()
GLM4 = ("<|endoftext|> [MASK] [gMASK] [sMASK] <sop> <eop> <|system|> <|user|> <|assistant|> "
        "<|observation|> <|begin_of_image|> <|end_of_image|> <|begin_of_video|> "
        "<|end_of_video|>").split()
LLAMA3 = ("<|begin_of_text|> <|end_of_text|> <|reserved_special_token_0|> "
          "<|reserved_special_token_1|> <|finetune_right_pad_id|> <|reserved_special_token_2|> "
          "<|start_header_id|> <|end_header_id|> <|eom_id|> <|eot_id|> <|python_tag|>").split()
LLAMA3 += [f"<|reserved_special_token_{k}|>" for k in range(3, 248)]        # 256 in all
TURNS = ("<start_of_turn>", "<end_of_turn>")    # Gemma's file has them among the plain symbols


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
        """What is done to text first: (what, old, new) in order."""
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
        # a foreign regular expression is not run: another engine's, and it may take for ever
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
        """`text` as the merges see it; prefix: it may get a space put before it."""
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
        """The symbols of tokenizer.model that users defined; they are found after normalizing."""
        return [n for n, t in self.added.items()
                if self.strict and n in self.vocab and not t["special"]]

    def _names(self, controls: Mapping[str, int], letters: frozenset[str]) -> tuple:
        """(pattern, spelling -> added token) for raw text, and the same for normalized text."""
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
        """Text -> ids. controls: the control tokens that count as such in it, with their ids.

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
        """The ids of text between cuts of the pre-tokenizer."""
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
        """The merged parts of a chunk -> ids."""
        out = []
        unknown = False
        for part in parts:
            i = self.vocab.get(part)
            raw = part.encode() if i is None else b""
            if raw and all(b in self.bytes for b in raw):
                out += [self.bytes[b] for b in raw]     # subtle: before an unknown one that waits
                continue
            if unknown and (i is not None or not self.fuse):
                out.append(self.unk)
            unknown = i is None
            if i is not None:
                out.append(i)
        return out + [self.unk] * unknown

    # -- ids -> text, and to a file

    def spelled(self, token: str) -> bytes:
        """The bytes that a token stands for: b" the" for "▁the", b"\\n" for "<0x0A>"."""
        if self.falls_back and BYTE.fullmatch(token):
            return bytes([int(token[3:5], 16)])
        if self.added.get(token, {}).get("normalized") and not self.strict:
            token = self.normalize(token)       # " <s>": what it took from the text
        return token.replace(SPACE, " ").encode()

    def json(self, post: dict | None) -> dict[str, Any]:
        """The document of the `tokenizers` library."""
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
        """(bytes read, replacement) of the longest rule that matches at `at`, or None."""
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
        """`text` with each longest rule replaced; the symbols in it stay as they are."""
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
    """Whether a tokenizer.json is of this kind: its decoder turns "▁" into spaces."""
    decoder = document.get("decoder") or {}
    return decoder.get("type") == "Sequence" and any(
        d.get("type") == "Replace" for d in decoder["decoders"])


def from_json(document: dict, ranks: dict[str, int] | None = None) -> dict[str, Any]:
    """A parsed tokenizer.json."""
    if document["model"].get("type", "BPE") != "BPE":
        raise ValueError("only BPE is supported")
    spm = SentencePiece(document, ranks)
    special = {n: t["id"] for n, t in spm.added.items() if t["special"]}
    ids = {t.encode(): i for t, i in spm.vocab.items() if t not in special}
    ids.update((n.encode(), t["id"]) for n, t in spm.added.items() if n not in special)
    return dict(ranks={}, special=special, pattern="", ids=ids, spm=spm,
                post=document.get("post_processor"))


def from_model(data: bytes, family: str = "", added: Mapping[str, dict] = {}) -> dict[str, Any]:
    """A tokenizer.model: SentencePiece's, or tiktoken's (Llama 3, GLM-4).

    family: "chatglm" or what else the folder's configuration says. added: further tokens that it
    lists, name -> {"id", "special", …}.
    """
    glm = "glm" in family.lower()
    if data[:1] == b"\n":           # field 1 of the protobuf message: a piece
        return from_sentencepiece(data, CHATGLM if glm else [], added)
    ranks = {}
    for k, line in enumerate(data.splitlines(), 1):     # a token in base64, a space, its rank
        try:
            token, rank = line.split(b" ")
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise ValueError(f"line {k} is no token and rank, nor is the file SentencePiece's "
                             "(a Git LFS pointer? a download cut short?)") from None
    if not ranks or sorted(ranks.values()) != list(range(len(ranks))) or b"" in ranks:
        raise ValueError("its ranks are not 0, 1, 2, …: the file is not complete")
    special = {n: len(ranks) + k for k, n in enumerate(GLM4 if glm else LLAMA3)}
    first = ["[gMASK]", "<sop>"] if glm else ["<|begin_of_text|>"]
    return dict(ranks=ranks, special=special, pattern=PATTERNS["cl100k"],
                post=surround_text({n: special[n] for n in first}))


def from_sentencepiece(data: bytes, more: list[str], added: Mapping[str, dict]) -> dict[str, Any]:
    """SentencePiece's own file. more: control tokens behind its vocabulary."""
    # defaults are those of sentencepiece_model.proto: a field that has its default is not written
    pieces = []
    trainer = {}
    normal = {}
    for key, value in fields(data):
        if key == 1:
            pieces.append({"score": 0.0, "type": NORMAL, **message(value, PIECE)})
        elif key == 2:
            trainer.update(message(value, TRAINER))
        elif key == 3:
            normal.update(message(value, NORMALIZER))
    if trainer.get("model_type", 1) != 2:
        raise ValueError("its model is not BPE")
    if trainer.get("treat_whitespace_as_suffix") or not normal.get("escape_whitespaces", 1):
        raise ValueError("spaces after words or unescaped spaces are not supported")
    vocab = {p["piece"]: k for k, p in enumerate(pieces)}
    types = {p["piece"]: p["type"] for p in pieces}
    unknown = [p for p, t in types.items() if t == UNKNOWN]
    if len(vocab) != len(pieces) or "" in vocab or len(unknown) != 1:
        raise ValueError("a piece is twice there or empty, or none or several are the unknown one")
    # a higher score merges first; the same score means whichever stands first in the text
    order = {s: r for r, s in enumerate(sorted({p["score"] for p in pieces}, reverse=True))}
    ranks = {p["piece"]: order[p["score"]] for p in pieces
             if p["type"] == NORMAL and len(p["piece"]) > 1}
    # an unused piece is made by merges and then taken apart again; one without parts never occurs
    lengths = sorted(set(map(len, types)))      # few, however long a piece is
    for piece in (p for p, t in types.items() if t == UNUSED):
        if any(types.get(piece[:k]) in (NORMAL, UNUSED) and types.get(piece[k:]) in (NORMAL, UNUSED)
               for k in lengths if k < len(piece)):
            raise ValueError(f"the unused piece {piece!r} that merges make is not supported")
    # Symbols that the user defined are found in normalized text; "normalized" says so in the file,
    # but would put a space before them where one is put before the text.
    prefix = bool(normal.get("add_dummy_prefix", 1))
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    listed = {k: {**flags, "id": vocab[k], "content": k, "special": special,
                  "normalized": not special and not prefix} for k, special in
              ((k, types[k] != USER_DEFINED or k in TURNS or added.get(k, {}).get("special", False))
               for k in vocab if types[k] in (UNKNOWN, CONTROL, USER_DEFINED))}
    behind = {n: {"id": len(vocab) + k, "special": True} for k, n in enumerate(more)}
    behind.update((n, t) for n, t in added.items() if n not in vocab)
    for name, token in behind.items():
        if int(token["id"]) >= len(vocab):      # a new name for an old id is none of the file's
            # looked for in raw text, as transformers does it: normalized, it would need a space
            listed[name] = {**flags, "content": name, "special": True, **token, "normalized": False}
    steps: list[dict] = []
    if normal.get("precompiled_charsmap"):
        steps.append({"type": "Precompiled", "precompiled_charsmap":
                      base64.b64encode(normal["precompiled_charsmap"]).decode()})
    trim = [{"type": "Replace", "pattern": {"Regex": p}, "content": c}
            for p, c in TRIM.items()] if normal.get("remove_extra_whitespaces", 1) else []
    steps += trim[:2] + [{"type": "Prepend", "prepend": SPACE}] * prefix
    steps += [{"type": "Replace", "pattern": {"String": " "}, "content": SPACE}] + trim[2:]
    falls_back = bool(trainer.get("byte_fallback"))
    if falls_back and {p for p, t in types.items() if t == BYTE_PIECE} != {
            f"<0x{b:02X}>" for b in range(256)}:
        raise ValueError("it falls back to bytes and has not the 256 of them")
    decoders = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                *[{"type": "ByteFallback"}] * falls_back, {"type": "Fuse"},
                *[{"type": "Strip", "content": " ", "start": 1, "stop": 0}] * prefix]
    # what the published code puts before a text; tokenizer_config.json may say otherwise
    bos = trainer.get("bos_id", 1)
    first = ["[gMASK]", "sop"] if more else [pieces[bos]["piece"]] * (0 <= bos < len(pieces))
    return from_json({
        "added_tokens": list(listed.values()), "pre_tokenizer": None,
        "normalizer": {"type": "Sequence", "normalizers": steps},
        "decoder": {"type": "Sequence", "decoders": decoders},
        "post_processor": surround_text({n: listed[n]["id"] for n in first if n in listed}),
        "model": {"type": "BPE", "dropout": None, "unk_token": unknown[0], "fuse_unk": True,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "byte_fallback": falls_back, "ignore_merges": False, "vocab": vocab,
                  "merges": []}}, ranks)


# number of a field in sentencepiece_model.proto -> (name, type)
PIECE = {1: ("piece", str), 2: ("score", float), 3: ("type", int)}
TRAINER = {3: ("model_type", int), 24: ("treat_whitespace_as_suffix", int),
           35: ("byte_fallback", int), 41: ("bos_id", int)}
NORMALIZER = {2: ("precompiled_charsmap", bytes), 3: ("add_dummy_prefix", int),
              4: ("remove_extra_whitespaces", int), 5: ("escape_whitespaces", int)}


def varint(data: bytes, at: int) -> tuple[int, int]:
    """(number, place behind it): seven bits a byte, the lowest first."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        value |= (data[at] & 127) << shift
        at += 1
        if data[at - 1] < 128:
            value &= (1 << 64) - 1
            return value - (value >> 63 << 64), at      # -1 is written as 2^64 - 1
    raise ValueError("the file is cut short or no protobuf")


def fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """(number, int or float or bytes) of each field of a protobuf message."""
    at = 0
    while at < len(data):
        tag, at = varint(data, at)      # the number of the field, and how its value is written
        number = tag >> 3
        wire = tag & 7
        if wire == 0:
            value, at = varint(data, at)
            yield number, value
            continue
        # a length follows, or it is four bytes (float) or eight; groups are long obsolete
        size, at = varint(data, at) if wire == 2 else ({1: 8, 5: 4}.get(wire, -1), at)
        if not 0 <= size <= len(data) - at or number < 1:
            raise ValueError("the file is cut short or no protobuf")
        raw = data[at:at + size]
        at += size
        yield number, struct.unpack("<f", raw)[0] if wire == 5 else raw


def message(data: Any, known: Mapping[int, tuple[str, type]]) -> dict[str, Any]:
    """The known fields of a message, by name; UTF-8 and types are checked."""
    out = {}
    for key, value in fields(data) if isinstance(data, bytes) else [(0, None)]:
        name, kind = known.get(key, ("", object))
        if not isinstance(value, bytes if kind is str else kind) or not key:
            raise ValueError("a field of the file has the wrong type: it is no SentencePiece model")
        if name:
            out[name] = value.decode() if kind is str else value
    return out


if __name__ == "__main__":
    refuse_to_run()
