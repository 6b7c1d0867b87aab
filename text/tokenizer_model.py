"""tokenizer.model: SentencePiece's protobuf, or tiktoken's lines, as a vocabulary of ours.

    Tokenizer(**from_model(data, family="chatglm"))         # data: the bytes of the file

A SentencePiece file is translated to tokenizer.json, so that both take one way through
text/sentencepiece.py; what its rules cannot say is refused. The format: sentencepiece_model.proto
of https://github.com/google/sentencepiece.
"""
from __future__ import annotations

import base64
import struct
from typing import Any, Iterator, Mapping, NamedTuple

from config import refuse_to_run
from text.bpe import PATTERNS
from text.sentencepiece import SPACE, TRIM, from_json
from text.tokenizer_json import surround_text

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


def from_model(data: bytes, family: str = "", added: Mapping[str, dict] | None = None
               ) -> dict[str, Any]:
    """Return a tokenizer.model: SentencePiece's, or tiktoken's (Llama 3, GLM-4).

    family: "chatglm" or what else the folder's configuration says. added: further tokens that it
    lists, name -> {"id", "special", …}.
    """
    glm = "glm" in family.lower()
    if data[:1] == b"\n":           # field 1 of the protobuf message: a piece
        return from_sentencepiece(data, CHATGLM if glm else [], added or {})
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


class Proto(NamedTuple):
    """The parts of a SentencePiece file that count here."""
    pieces: list[dict[str, Any]]        # each with piece, score and type
    trainer: dict[str, Any]
    normalizer: dict[str, Any]


def read_proto(data: bytes) -> Proto:
    """Return a SentencePiece file's parts. A field that has its default is not written there."""
    pieces = []
    trainer: dict[str, Any] = {}
    normalizer: dict[str, Any] = {}
    for key, value in fields(data):
        if key == 1:
            pieces.append({"score": 0.0, "type": NORMAL, **message(value, PIECE)})
        elif key == 2:
            trainer.update(message(value, TRAINER))
        elif key == 3:
            normalizer.update(message(value, NORMALIZER))
    return Proto(pieces, trainer, normalizer)


def check_pieces(proto: Proto) -> tuple[dict[str, int], dict[str, int], str]:
    """Return (piece -> id, piece -> type, the unknown piece); ValueError for what is not supported.
    """
    if proto.trainer.get("model_type", 1) != 2:
        raise ValueError("its model is not BPE")
    if proto.trainer.get("treat_whitespace_as_suffix") or not (
            proto.normalizer.get("escape_whitespaces", 1)):
        raise ValueError("spaces after words or unescaped spaces are not supported")
    vocab = {p["piece"]: k for k, p in enumerate(proto.pieces)}
    types = {p["piece"]: p["type"] for p in proto.pieces}
    unknown = [p for p, t in types.items() if t == UNKNOWN]
    if len(vocab) != len(proto.pieces) or "" in vocab or len(unknown) != 1:
        raise ValueError("a piece is twice there or empty, or none or several are the unknown one")
    # an unused piece is made by merges and then taken apart again; one without parts never occurs
    lengths = sorted(set(map(len, types)))      # few, however long a piece is
    mergeable = (NORMAL, UNUSED)
    for piece in (p for p, t in types.items() if t == UNUSED):
        if any(types.get(piece[:k]) in mergeable and types.get(piece[k:]) in mergeable
               for k in lengths if k < len(piece)):
            raise ValueError(f"the unused piece {piece!r} that merges make is not supported")
    if proto.trainer.get("byte_fallback") and {
            p for p, t in types.items() if t == BYTE_PIECE} != {
            f"<0x{b:02X}>" for b in range(256)}:
        raise ValueError("it falls back to bytes and has not the 256 of them")
    return vocab, types, unknown[0]


def rank_pieces(proto: Proto) -> dict[str, int]:
    """Return piece -> order of merging: a higher score first; of one score, the first in a text."""
    order = {s: r for r, s in enumerate(sorted({p["score"] for p in proto.pieces}, reverse=True))}
    return {p["piece"]: order[p["score"]] for p in proto.pieces
            if p["type"] == NORMAL and len(p["piece"]) > 1}


def list_control_tokens(vocab: dict[str, int], types: dict[str, int], more: list[str],
                        added: Mapping[str, dict], prefix: bool) -> dict[str, dict]:
    """Return name -> entry of added_tokens: control tokens and those that the user defined, then
    `more` behind the vocabulary, then those that the folder lists. prefix: whether a space is put
    before a text.
    """
    flags = {"single_word": False, "lstrip": False, "rstrip": False}
    listed = {}
    for name in vocab:
        if types[name] not in (UNKNOWN, CONTROL, USER_DEFINED):
            continue
        special = types[name] != USER_DEFINED or name in TURNS or (
            added.get(name, {}).get("special", False))
        # Symbols that the user defined are found in normalized text; "normalized" says so in the
        # file, but would put a space before them where one is put before the text.
        listed[name] = {**flags, "id": vocab[name], "content": name, "special": special,
                        "normalized": not special and not prefix}
    behind = {n: {"id": len(vocab) + k, "special": True} for k, n in enumerate(more)}
    behind.update((n, t) for n, t in added.items() if n not in vocab)
    for name, token in behind.items():
        if int(token["id"]) >= len(vocab):      # a new name for an old id is not in the file
            # looked for in raw text, as transformers does it: normalized, it would need a space
            listed[name] = {**flags, "content": name, "special": True, **token, "normalized": False}
    return listed


def build_normalizer(normalizer: dict[str, Any], prefix: bool) -> dict[str, Any]:
    """Return the normalizer of tokenizer.json."""
    steps: list[dict] = []
    if normalizer.get("precompiled_charsmap"):
        steps.append({"type": "Precompiled", "precompiled_charsmap":
                      base64.b64encode(normalizer["precompiled_charsmap"]).decode()})
    trim = [{"type": "Replace", "pattern": {"Regex": p}, "content": c}
            for p, c in TRIM.items()] if normalizer.get("remove_extra_whitespaces", 1) else []
    steps += trim[:2] + [{"type": "Prepend", "prepend": SPACE}] * prefix
    steps += [{"type": "Replace", "pattern": {"String": " "}, "content": SPACE}] + trim[2:]
    return {"type": "Sequence", "normalizers": steps}


def build_decoder(falls_back: bool, prefix: bool) -> dict[str, Any]:
    """Return the decoder of tokenizer.json. falls_back: whether unknown letters become bytes."""
    return {"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        *[{"type": "ByteFallback"}] * falls_back, {"type": "Fuse"},
        *[{"type": "Strip", "content": " ", "start": 1, "stop": 0}] * prefix]}


def from_sentencepiece(data: bytes, more: list[str], added: Mapping[str, dict]) -> dict[str, Any]:
    """Return SentencePiece's own file as from_json() returns a tokenizer.json. more: control tokens
    behind its vocabulary."""
    proto = read_proto(data)
    vocab, types, unknown = check_pieces(proto)
    prefix = bool(proto.normalizer.get("add_dummy_prefix", 1))
    falls_back = bool(proto.trainer.get("byte_fallback"))
    listed = list_control_tokens(vocab, types, more, added, prefix)
    # what the published code puts before a text; tokenizer_config.json may say otherwise
    bos = proto.trainer.get("bos_id", 1)
    first = ["[gMASK]", "sop"] if more else (
        [proto.pieces[bos]["piece"]] * (0 <= bos < len(proto.pieces)))
    return from_json({
        "added_tokens": list(listed.values()), "pre_tokenizer": None,
        "normalizer": build_normalizer(proto.normalizer, prefix),
        "decoder": build_decoder(falls_back, prefix),
        "post_processor": surround_text({n: listed[n]["id"] for n in first if n in listed}),
        "model": {"type": "BPE", "dropout": None, "unk_token": unknown, "fuse_unk": True,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None,
                  "byte_fallback": falls_back, "ignore_merges": False, "vocab": vocab,
                  "merges": []}}, rank_pieces(proto))


# number of a field in sentencepiece_model.proto -> (name, type)
PIECE = {1: ("piece", str), 2: ("score", float), 3: ("type", int)}


TRAINER = {3: ("model_type", int), 24: ("treat_whitespace_as_suffix", int),
           35: ("byte_fallback", int), 41: ("bos_id", int)}


NORMALIZER = {2: ("precompiled_charsmap", bytes), 3: ("add_dummy_prefix", int),
              4: ("remove_extra_whitespaces", int), 5: ("escape_whitespaces", int)}


def varint(data: bytes, at: int) -> tuple[int, int]:
    """Return (number, place behind it): seven bits a byte, the lowest first."""
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
    """Yield (number, int or float or bytes) of each field of a protobuf message."""
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
    """Return the known fields of a message, by name; UTF-8 and types are checked."""
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
