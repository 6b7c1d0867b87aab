"""Text <-> ids: the vocabulary, its files, its control tokens; byte-level BPE or characters.

    python tokenizer.py train FILE… --vocab_size=16384 --out=data/mine    # learn a vocabulary
    python tokenizer.py encode "Hello world" --tokenizer=data/mine        # ids, on stdout
    python tokenizer.py decode 15496 995 --tokenizer=data/mine            # text, on stdout
    python tokenizer.py show --file=README.md --tokenizer=data/mine       # tokens, in colour

The same command on any machine: all of it runs on the CPU, and training counts chunks on every
core. To expect: 16,384 entries from the 12 MB of Python's standard library take no more time than
the `tokenizers` library needs, a few seconds (`python bench.py tokenizer` prints both).

bpe.py holds the algorithm: `ranks` says which token bytes merge first. Here tokens get their ids,
which are the ranks in our own files and in GPT-2's, and something else in many a published one.
spm.py has the other kind of vocabulary, SentencePiece's (Llama 2, Gemma), and tokenizer.model.
Control tokens ("<|endoftext|>") lie beside them in `special`, and text never turns into one unless
the caller allows it: a user who types it gets its letters. chat.py writes conversations.

A tokenizer is saved as Hugging Face's tokenizer.json, which `tokenizers` and `transformers` open.
"""
from __future__ import annotations

import config  # noqa: F401  first, so that what fails while importing is a sentence
import codecs
import json
import os
import re
import sys
import unicodedata
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any, Iterable

import numpy as np
import tiktoken

import chat
import spm as sentencepiece
from bpe import (BYTE_ORDER, PATTERNS, PieceCache, any_of, bpe, chunks, count_chunks, file_texts,
                 learn, mend, pattern_of, printable, read_json, read_text, unprintable)
from config import UserError, run

EOT = "<|endoftext|>"
# Other names of the token between documents. The first one that a vocabulary has is taken.
EOT_NAMES = (EOT, "<|end_of_text|>", "<eos>", "</s>")
TIKTOKEN = {"gpt2": "gpt2", "cl100k_base": "cl100k", "o200k_base": "o200k"}    # name -> pattern
MAX_ID = 1 << 24        # an id beyond this is a broken file, not a vocabulary


class Tokenizer:
    """A vocabulary with its split pattern, control tokens and chat template.

    ranks: token bytes -> merge order; empty in character mode, where `pattern` is "" too.
    ids: token bytes -> id, of every token but the control tokens; None if ids are ranks.
    special: control token -> id. template: a name in chat.TEMPLATES, or None. eos: the eos_token of
    the file it came from, which ends documents if none of EOT_NAMES is there.
    nfc: é written as e and an accent is composed first (Qwen). post: Hugging Face's
    post_processor, which adds a first token in transformers: `prefix` here. encode() never does.
    spm: the rules of a SentencePiece vocabulary; then ranks and pattern are empty, and the keys of
    ids are tokens as its file spells them. jinja: a chat template that is none of chat.TEMPLATES.
    """

    def __init__(self, ranks: dict[bytes, int], special: dict[str, int], pattern: str,
                 ids: dict[bytes, int] | None = None, template: str | None = None,
                 nfc: bool = False, post: dict | None = None,
                 spm: sentencepiece.SentencePiece | None = None):
        self.ranks, self.special, self.pattern = ranks, dict(special), pattern
        self.ids = ranks if ids is None else ids
        self.template, self.nfc, self.post, self.eos = template, nfc, post, None
        self.spm, self.jinja = spm, ""
        # SmolLM2's vocabulary lacks 21 bytes, control characters and the like; where they occur,
        # its library drops them, and so do we. A vocabulary without letters is of another kind.
        self.lost = bytes(b for b in range(256) if bytes([b]) not in ranks) if pattern else b""
        if kinds := [chr(b) for b in self.lost if 32 <= b < 127]:
            raise UserError(f"the vocabulary has no token for {''.join(kinds)!r}: it is not a "
                            "byte-level one, or was trained without the whole byte alphabet")
        self._index()

    def _index(self) -> None:
        """Rebuild what follows from ids and special: tokens by id, and the size."""
        self.tokens = {i: self.spm.spelled(t.decode()) if self.spm else t
                       for t, i in self.ids.items()}
        self.tokens.update((i, self.spm.spelled(name) if self.spm else name.encode())
                           for name, i in self.special.items())
        if clash := [n for n in self.special if not n or n.encode() in self.ids]:
            raise UserError(f"{clash[0]!r} cannot name a control token: it is empty or the text of "
                            "an ordinary token")
        if not all(0 <= i < MAX_ID for i in self.tokens):
            raise UserError(f"the vocabulary has ids outside 0..{MAX_ID}: its file is broken")
        self.vocab_size = max(self.tokens, default=-1) + 1      # gaps count: it sizes embeddings
        self.__dict__.pop("tiktoken", None)

    def __getstate__(self) -> dict[str, Any]:
        # what cannot be sent to a worker process, or is cheaper to build there, stays here
        return {k: v for k, v in self.__dict__.items() if k not in ("tiktoken", "_cache")}

    @property
    def eot_token(self) -> str | None:
        """The control token between documents, None if there is none (character mode)."""
        return next((n for n in (*EOT_NAMES, self.eos) if n in self.special), None)

    @property
    def eot(self) -> int | None:
        """Its id."""
        return self.special.get(self.eot_token)

    @property
    def prefix(self) -> list[int]:
        """The ids that begin every text of this model, as in transformers: [<s>] for Llama 2."""
        return chat.affixes(self.post)[0]

    @property
    def suffix(self) -> list[int]:
        """The ids that end every text of this model; few have any."""
        return chat.affixes(self.post)[1]

    @property
    def stop_ids(self) -> list[int]:
        """The ids that end an answer: the end of text, and the ends of the template's turns."""
        names = chat.find(self.template).stops(self.eot_token or EOT) if self.template else []
        names += [self.eot_token, self.eos]
        return sorted({self.special[n] for n in names if n in self.special})

    # -- text -> ids

    def _controls(self, text: str, allowed: Any, refused: Any) -> dict[str, int]:
        """The control tokens that the text may contain; UserError if it has a refused one."""
        allowed = set(self.special) if allowed == "all" else set(allowed) & set(self.special)
        refused = set(self.special) - allowed if refused == "all" else set(refused)
        if refused and (m := any_of(frozenset(refused)).search(text)):
            raise UserError(f"the text contains the control token {m.group()!r}: allow it with "
                            "allowed_special, or read it as text with disallowed_special=()")
        return {n: i for n, i in self.special.items() if n in allowed}

    def encode(self, text: str, allowed_special: Any = frozenset(),
               disallowed_special: Any = "all") -> list[int]:
        """Text -> ids, by hand, with tiktoken's rules for control tokens in the text.

        Those in allowed_special ("all" or a set) become their id; those in disallowed_special
        ("all": every other one) raise UserError; what is in neither is read as text.
        """
        return self._encode(text, allowed_special, disallowed_special, self.encode_ordinary)

    def encode_fast(self, text: str, allowed_special: Any = frozenset(),
                    disallowed_special: Any = "all") -> list[int]:
        """encode(), through tiktoken: the same ids, from Rust. For corpora."""
        return self._encode(text, allowed_special, disallowed_special, self._encode_rust)

    def _encode(self, text: str, allowed: Any, refused: Any, ordinary: Any) -> list[int]:
        controls = self._controls(text, allowed, refused)
        if self.spm:                # there, control tokens matter for the text around them
            return self.spm.encode(text, controls)
        out, start = [], 0
        for m in any_of(frozenset(controls)).finditer(text) if controls else ():
            out += ordinary(text[start:m.start()])
            out.append(controls[m.group()])
            start = m.end()
        return out + ordinary(text[start:]) if out else ordinary(text)

    def encode_ordinary(self, text: str, after: str = "") -> list[int]:
        """Text -> ids, by hand; control tokens are read as text.

        after: "token" if a control token stands before the text, "text" if the text goes on from
        one encoded before: SentencePiece's spaces depend on it, byte-level BPE does not.
        """
        if self.spm:
            return self.spm.encode(text, {}, after)
        text = self._normal(text)
        if self.pattern:
            look_up = self._cache.__getitem__
            return list(chain.from_iterable(
                chain.from_iterable(map(look_up, words)) for words in chunks(self.pattern, text)))
        try:
            return [self.ids[c] for c in map(str.encode, text)]
        except KeyError as e:
            raise UserError(f"the character {e.args[0].decode()!r} is not among the "
                            f"{len(self.ids)} characters of this tokenizer") from None

    def _encode_rust(self, text: str) -> list[int]:
        if self._only_by_hand(text):
            return self.encode_ordinary(text)
        return self._named(self.tiktoken.encode_ordinary(self._normal(text)))

    def encode_batch(self, texts: list[str], threads: int = os.cpu_count() or 1) -> list[list[int]]:
        """encode_ordinary() of many texts, on tiktoken's threads."""
        if any(map(self._only_by_hand, texts)):
            return [self._encode_rust(t) for t in texts]
        normal = [self._normal(t) for t in texts]
        return [self._named(row) for row in
                self.tiktoken.encode_ordinary_batch(normal, num_threads=threads)]

    def _only_by_hand(self, text: str) -> bool:
        """True for characters, and where tiktoken would panic: blank texts, bytes it lacks."""
        if not self.pattern or too_blank(text):
            return True
        raw = mend(text).encode() if self.lost else b""
        return len(raw.translate(None, self.lost)) < len(raw)

    def _normal(self, text: str) -> str:
        if text.isascii():
            return text
        return unicodedata.normalize("NFC", mend(text)) if self.nfc else mend(text)

    @cached_property
    def _cache(self) -> PieceCache:
        return PieceCache(self.ranks, self.ids, self.lost)

    @cached_property
    def tiktoken(self) -> tiktoken.Encoding:
        """A tiktoken.Encoding of our ranks. It returns ranks, which _named() turns into ids."""
        special = self.special if self._rank_to_id is None else {}
        return tiktoken.Encoding("handmade", pat_str=self.pattern, mergeable_ranks=self.ranks,
                                 special_tokens=special)

    @cached_property
    def _rank_to_id(self) -> np.ndarray | None:
        """(ranks,) int64, or None where ids are ranks."""
        if all(self.ids[t] == r for t, r in self.ranks.items()):
            return None
        table = np.zeros(max(self.ranks.values()) + 1, dtype=np.int64)
        table[list(self.ranks.values())] = [self.ids[t] for t in self.ranks]
        return table

    def _named(self, ranks: list[int]) -> list[int]:
        table = self._rank_to_id
        return ranks if table is None or not ranks else table[ranks].tolist()

    # -- ids -> text

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Ids -> the bytes they stand for. UserError for an id that the vocabulary lacks.

        Where SentencePiece puts a space before the text, it is dropped from the first token.
        """
        return unpad(self._bytes(ids), self.spm.strip if self.spm else 0)[0]

    def _bytes(self, ids: Iterable[int]) -> bytes:
        try:
            return b"".join([self.tokens[i] for i in ids])
        except KeyError as e:
            raise UserError(f"the id {e} is not in this vocabulary of {self.vocab_size}") from None

    def decode(self, ids: Iterable[int]) -> str:
        """Ids -> text; bytes that are not UTF-8 (half a character) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def stream(self, after: Iterable[int] = ()) -> Stream:
        """A decoder for ids that come one by one; it holds back half a character.

        after: the ids whose text they continue: there, a first space is one between words.
        """
        return Stream(self, after)

    def byte_lengths(self) -> np.ndarray:
        """(vocab_size,) int32: the bytes of text of each id, 0 for control tokens and gaps.

        For bits per byte, the loss that does not depend on the tokenizer: nats / ln 2 / bytes.
        The space that SentencePiece puts before a text counts: that is one byte a document.
        """
        lengths = np.zeros(self.vocab_size, dtype=np.int32)
        lengths[list(self.tokens)] = [len(t) for t in self.tokens.values()]
        lengths[list(self.special.values())] = 0
        if self.spm and self.spm.unk is not None:
            lengths[self.spm.unk] = 0       # it stands for characters that nobody knows any more
        return lengths

    def add_special_tokens(self, names: Iterable[str]) -> int:
        """Give each new name the next id at the end of the vocabulary; returns how many."""
        new = [n for n in dict.fromkeys(names) if n not in self.special]
        self.special.update((n, self.vocab_size + k) for k, n in enumerate(new))
        self._index()
        return len(new)

    def render(self, messages: list[dict[str, str]], template: str | None = None,
               add_generation_prompt: bool = False, max_length: int | None = None,
               enable_thinking: bool = True) -> tuple[list[int], list[int]]:
        """A conversation -> (ids, mask); chat.render() says how."""
        return chat.render(self, messages, template, add_generation_prompt, max_length,
                           enable_thinking)

    # -- from and to a file

    def read_settings(self, settings: dict, jinja: Path, model: bool) -> None:
        """What lies beside a vocabulary: tokenizer_config.json, parsed, and a chat template.

        From there: which token ends a document; the template, which newer transformers writes to a
        file of its own; and, with a tokenizer.model, whether tokens surround a text.
        """
        bos, self.eos = (t.get("content") if isinstance(t, dict) else t
                         for t in map(settings.get, ("bos_token", "eos_token")))
        wanted = [settings.get(k) for k in ("add_bos_token", "add_eos_token")]
        if model and wanted != [None, None]:    # as in transformers: tokenizer.json knows better
            first, last = ({n: self.special[n]} if on and n in self.special else {}
                           for on, n in zip(wanted, (bos, self.eos)))
            if chat.affixes(self.post) != ([*first.values()], [*last.values()]):
                self.post = chat.surround(first, last)
        chat.affixes(self.post)        # ValueError now, not in the middle of a run
        found = settings.get("chat_template") or ""
        if isinstance(found, list):     # several, by name
            found = {t["name"]: t["template"] for t in found}.get("default", "")
        found = read_text(jinja) if jinja.is_file() else str(found)
        self.template = chat.recognise(found)
        self.jinja = "" if self.template else found

    def save(self, directory: str | os.PathLike) -> None:
        """Write tokenizer.json and tokenizer_config.json; opened by tokenizers, transformers."""
        out = Path(directory)
        config = {"tokenizer_class": "PreTrainedTokenizerFast",
                  "clean_up_tokenization_spaces": False}
        if end := self.eos if self.eos in self.special else self.eot_token:
            config["eos_token"] = end       # a chat model's own file names the end of a turn here
        if len(self.prefix) == 1:
            config["bos_token"] = self.decode(self.prefix)
        if self.spm and self.spm.unk is not None:
            config["unk_token"] = self.spm.unknown
        if self.template:
            config["chat_template"] = chat.jinja(chat.find(self.template), self.eot_token or EOT)
        elif self.jinja:
            config["chat_template"] = self.jinja
        try:
            out.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise UserError(f"{out} is a file: name a folder for the tokenizer") from None
        for name, value in (("tokenizer_config.json", config), ("tokenizer.json", self._json())):
            beside = out / f".{name}.{os.getpid()}"     # renamed when whole: never half a file
            try:
                beside.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")
                os.replace(beside, out / name)
            finally:
                beside.unlink(missing_ok=True)

    def _json(self) -> dict[str, Any]:
        """The document of the `tokenizers` library, from normalizer to decoder."""
        if self.spm:
            return self.spm.json(self.special, self.post)
        flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        added = [{"id": i, "content": n, **flags, "special": True}
                 for n, i in sorted(self.special.items(), key=lambda item: item[1])]
        cut = {"type": "Split", "pattern": {"Regex": self.pattern or r"[\s\S]"},
               "behavior": "Isolated", "invert": False}
        if self.pattern:
            byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                          "use_regex": False}
            pre, decoder = {"type": "Sequence", "pretokenizers": [cut, byte_level]}, byte_level
            # the two halves of a token are what the older tokens alone make of it
            halves, older = [], {}
            for token, rank in sorted(self.ranks.items(), key=lambda item: item[1]):
                halves.append(bpe(older, token))
                older[token] = rank
            model = {"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False,
                     "continuing_subword_prefix": None, "end_of_word_suffix": None,
                     "byte_fallback": False,
                     # a token without halves can only be a whole chunk, looked up before merging
                     "ignore_merges": any(len(h) > 2 for h in halves),
                     "vocab": {**{printable(t): i for t, i in self.ids.items()}, **self.special},
                     "merges": [" ".join(map(printable, h)) for h in halves if len(h) == 2]}
        else:       # a character is a "word"; one never seen is an error there too
            pre, decoder = cut, {"type": "Fuse"}
            model = {"type": "WordLevel", "unk_token": "<unk>",
                     "vocab": {**{t.decode(): i for t, i in self.ids.items()}, **self.special}}
        # control tokens stand in the vocabulary as well: the library would number them anew
        return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
                "normalizer": {"type": "NFC"} if self.nfc else None, "pre_tokenizer": pre,
                "post_processor": self.post, "decoder": decoder, "model": model}


class Stream:
    """Ids in, whole characters out: an "é" that is two tokens comes out at the second."""

    def __init__(self, tokenizer: Tokenizer, after: Iterable[int] = ()):
        self.tokenizer = tokenizer
        goes_on = bool(tokenizer._bytes(after))
        self.spaces = tokenizer.spm.strip if tokenizer.spm and not goes_on else 0   # to be dropped
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def put(self, i: int) -> str:
        """The text that id `i` completes; "" within a character."""
        raw, self.spaces = unpad(self.tokenizer._bytes([i]), self.spaces)
        return self.decoder.decode(raw)

    def flush(self) -> str:
        """What is left at the end: "", or U+FFFD for a character cut short."""
        return self.decoder.decode(b"", final=True)


def unpad(raw: bytes, spaces: int) -> tuple[bytes, int]:
    """Without up to `spaces` leading spaces; and how many the next bytes may still lose."""
    rest = raw[:spaces].lstrip(b" ") + raw[spaces:]
    return rest, 0 if rest else spaces - len(raw)


def too_blank(text: str) -> bool:
    """A million white space characters in a row exhaust tiktoken's stack, and it panics."""
    return len(text) >= 900_000 and re.search(r"\s{900000}", text) is not None


# --- training -------------------------------------------------------------------------------

def train(texts: Iterable[str], vocab_size: int, pattern: str = "gpt2",
          special_tokens: Iterable[str] = (EOT,), workers: int | None = None,
          progress: bool = False, fewer: bool = False) -> Tokenizer:
    """Learn a vocabulary of `vocab_size` ids, control tokens (the last ones) included.

    pattern: a key of bpe.PATTERNS or a regular expression. workers: processes that split, None
    for one a core. The result depends on the texts alone, not on their order or the workers.
    """
    special = list(dict.fromkeys(special_tokens))
    size = vocab_size - len(special)
    if not 256 <= size < MAX_ID:
        raise UserError(f"vocab_size={vocab_size} has to be at least {256 + len(special)} (256 "
                        f"bytes, {len(special)} control tokens) and below {MAX_ID}")
    pattern = PATTERNS.get(pattern, pattern)
    counts = count_chunks(texts, pattern, workers)
    if not counts:
        raise UserError("there is no text to train a tokenizer on")
    # Frequencies fall about as 1 / rank, so that a pair this rare is far from being merged. If
    # it turns out to be needed after all, learn again with every pair.
    floor = sum(counts.values()) // (64 * vocab_size)
    ranks = learn(counts, size, floor, progress) if floor > 1 else {}
    if len(ranks) < size:
        ranks = learn(counts, size, 1, progress)
    if len(ranks) < size and fewer:
        size = len(ranks)
    if len(ranks) < size:
        most = len(ranks) + len(special)
        raise UserError(f"vocab_size={vocab_size} is more than this text can give, all its words "
                        f"are tokens by then: use --vocab_size={most} or less, or more text")
    return Tokenizer(ranks, {n: size + k for k, n in enumerate(special)}, pattern)


def train_chars(texts: Iterable[str]) -> Tokenizer:
    """Character level as in nanoGPT's shakespeare_char: ids are the sorted characters, no more."""
    characters: set[str] = set()
    for text in texts:
        characters.update(mend(text))
    if not characters:
        raise UserError("there is no text to train a tokenizer on")
    return Tokenizer({}, {}, "", ids={c.encode(): i for i, c in enumerate(sorted(characters))})


# --- loading --------------------------------------------------------------------------------

def load(path_or_name: str | os.PathLike) -> Tokenizer:
    """A folder or tokenizer.json (ours, Hugging Face's), encoder.json + vocab.bpe, or a name.

    The names are tiktoken's gpt2, cl100k_base and o200k_base, which it downloads once.
    """
    path = Path(path_or_name)
    if not path.exists() and str(path_or_name) in TIKTOKEN:
        return load_tiktoken(str(path_or_name))
    folder = path if path.is_dir() else path.parent
    files = [path / "tokenizer.json"] if path.is_dir() else [path]
    files += [path / n for n in ("tokenizer.model", "encoder.json", "vocab.bpe", "vocab.json",
                                 "merges.txt")]
    whole, model, *old = [f if f.exists() else None for f in files]
    if path.suffix == ".model":
        whole, model = None, whole
    old = old[:2] if all(old[:2]) else old[2:]
    if not whole and not model and not all(old):
        raise UserError(f"no tokenizer at {path}: give a folder with tokenizer.json, "
                        "tokenizer.model or encoder.json and vocab.bpe, or one of "
                        f"{', '.join(TIKTOKEN)}")
    try:
        settings, network = ({} if not f.exists() or whole == path else read_json(f) for f in
                             (folder / "tokenizer_config.json", folder / "config.json"))
        if whole:
            tokenizer = from_json(read_json(whole))
        elif model:
            added = {t["content"]: {"id": int(i), "special": bool(t.get("special"))}
                     for i, t in (settings.get("added_tokens_decoder") or {}).items()}
            family = f"{settings.get('tokenizer_class')} {network.get('model_type')}"
            tokenizer = Tokenizer(**sentencepiece.from_model(model.read_bytes(), family, added))
        else:       # GPT-2's first form: the same two tables, each in a file
            vocab, lines = read_json(old[0]), read_text(old[1]).split("\n")
            merges = [m for m in lines if m and not m.startswith("#version")]
            added = [{"id": vocab[n], "content": n} for n in EOT_NAMES if n in vocab]
            tokenizer = from_json({"model": {"vocab": vocab, "merges": merges},
                                   "added_tokens": added, "pre_tokenizer": {"type": "ByteLevel"}})
        tokenizer.read_settings(settings, folder / "chat_template.jinja", bool(model and not whole))
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as e:
        raise UserError(f"{path} is not a tokenizer that this program reads "
                        f"({type(e).__name__}: {e})") from None
    return tokenizer


def from_json(document: dict) -> Tokenizer:
    """A tokenizer.json -> Tokenizer. What it does not support raises ValueError with the name."""
    if sentencepiece.fits(document):
        return Tokenizer(**sentencepiece.from_json(document))
    model, normalizer = document["model"], document.get("normalizer")
    special = {}
    for token in document.get("added_tokens") or []:
        if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
            raise ValueError(f"the token {token['content']!r} strips its neighbours")
        special[str(token["content"])] = int(token["id"])
    vocab = {str(t): int(i) for t, i in model["vocab"].items() if t not in special}
    if model.get("type") == "WordLevel":
        if any(len(t) != 1 for t in vocab):
            raise ValueError("words are not supported, only characters")
        return Tokenizer({}, special, "", ids={t.encode(): i for t, i in vocab.items()})
    if model.get("type", "BPE") != "BPE" or model.get("byte_fallback"):
        raise ValueError("only byte-level and SentencePiece-style BPE are supported")
    if normalizer and normalizer.get("normalizers", [normalizer]) not in ([], [{"type": "NFC"}]):
        raise ValueError("only the normalizer NFC is supported")
    # Ids say nothing about order (SmolLM2 begins with its control tokens): a rank is the place
    # among the merges, the first place where several make the same token (Llama 3).
    ids = {unprintable(t): i for t, i in vocab.items()}
    known = (bytes([b]) for b in BYTE_ORDER if bytes([b]) in ids)
    ranks = {byte: k for k, byte in enumerate(known)}
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        ranks.setdefault(unprintable(left) + unprintable(right), len(ranks))
    if any(t not in ids for t in ranks):
        raise ValueError("a merge makes a token that is not in the vocabulary")
    if model.get("ignore_merges"):          # tokens that no merge makes are found as whole chunks
        for token in ids:
            ranks.setdefault(token, len(ranks))
    return Tokenizer(ranks, special, pattern_of(document.get("pre_tokenizer") or {}), ids=ids,
                     nfc=bool(normalizer), post=document.get("post_processor"))


def load_tiktoken(name: str) -> Tokenizer:
    try:
        encoding = tiktoken.get_encoding(name)
    except Exception as e:              # no network has a dozen exceptions, from three packages
        raise UserError(f"tiktoken cannot download {name} ({type(e).__name__}): with no network, "
                        "give a folder that holds its tokenizer.json or encoder.json and vocab.bpe,"
                        " or train your own with python tokenizer.py train FILE…") from None
    return Tokenizer(encoding._mergeable_ranks, encoding._special_tokens, PATTERNS[TIKTOKEN[name]])


# --- the script -----------------------------------------------------------------------------

@dataclass
class Config:
    command: str = ""               # train, encode, decode or show
    words: list[str] = field(default_factory=list)  # train: files; else text, or ids to decode
    file: str = ""                  # read the text or the ids here (else: words, else stdin)
    tokenizer: str = "data/stdlib"  # folder, tokenizer.json, or gpt2, cl100k_base, o200k_base
    out: str = ""                   # train: the folder to write
    vocab_size: int = 16384         # train: number of ids, control tokens included
    pattern: str = "gpt2"           # train: gpt2, cl100k, o200k, smollm, or a regular expression
    special: list[str] = field(default_factory=lambda: [EOT])   # train: control tokens
    chars: bool = False             # train: character level
    workers: int | None = None      # train: processes, None for one a core
    allow_special: bool = False     # encode, show: control tokens in the text become their id
    color: bool | None = None       # show: colours; None: on a terminal without NO_COLOR


def show(tokenizer: Tokenizer, ids: list[int], color: bool) -> str:
    """The text with its tokens on alternating backgrounds, or separated by | without colours."""
    out = []
    for k, i in enumerate(ids):
        # half a character is shown as its bytes, \xe2\x82, and a terminal obeys no token
        text = tokenizer.tokens[i].decode("utf-8", errors="backslashreplace")
        text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda m: repr(m.group())[1:-1], text)
        if color:
            # a background that is on at a newline would run to the edge of the terminal
            paint = f"\x1b[30;{(106, 103, 102, 105)[k % 4]}m"
            text = paint + text.replace("\n", f"⏎\x1b[0m\n{paint}") + "\x1b[0m"
        out.append(text)
    return ("" if color else "|").join(out)


def main(cfg: Config) -> None:
    if cfg.command not in ("train", "encode", "decode", "show"):
        raise UserError(f"the command is train, encode, decode or show, not {cfg.command!r}")
    if cfg.command == "train":
        if not cfg.words or not cfg.out:
            raise UserError("train needs files and a folder: tokenizer.py train FILE… --out=DIR")
        texts = file_texts(cfg.words)
        tokenizer = train_chars(texts) if cfg.chars else train(
            texts, cfg.vocab_size, cfg.pattern, cfg.special, cfg.workers, progress=True)
        tokenizer.save(cfg.out)
        print(f"{cfg.out}: a vocabulary of {tokenizer.vocab_size:,}", file=sys.stderr)
        return
    tokenizer = load(cfg.tokenizer)
    if cfg.file or cfg.words:
        text = read_text(cfg.file) if cfg.file else " ".join(cfg.words)
    else:
        text = read_text("-")
    if cfg.command == "decode":
        ids = text.replace(",", " ").split()
        if bad := [i for i in ids if not re.fullmatch("[0-9]{1,9}", i)]:
            raise UserError(f"decode takes ids, and {bad[0][:20]!r} is none")
        sys.stdout.write(tokenizer.decode(map(int, ids)) + "\n" * sys.stdout.isatty())
        return
    ids = tokenizer.encode(text, "all" if cfg.allow_special else (), disallowed_special=())
    if cfg.command == "encode":
        print(*ids)
        return
    wanted = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    print(show(tokenizer, ids, wanted if cfg.color is None else cfg.color))
    print(f"{len(ids)} tokens, {len(text.encode())} bytes", file=sys.stderr)


if __name__ == "__main__":
    run(main, Config, positional=("command", "words"))
