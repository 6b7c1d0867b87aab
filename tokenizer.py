"""Text <-> ids: the vocabulary, its files, its control tokens; byte-level BPE or characters.

    python tokenizer.py train FILE… --vocab_size=16384 --out=data/mine    # learn a vocabulary
    python tokenizer.py encode "Hello world" --tokenizer=data/mine        # ids, on stdout
    python tokenizer.py decode 15496 995 --tokenizer=data/mine            # text, on stdout
    python tokenizer.py show --file=README.md --tokenizer=data/mine       # tokens, in colour

The same command on any machine: all of it runs on the CPU, and training counts chunks on every
core, in a few seconds for 16,384 entries from 12 MB (`python bench.py tokenizer`).

text/bpe.py holds the algorithm: `ranks` says which token bytes merge first. Here tokens get their
ids, which are the ranks in our own files and in GPT-2's, and something else in many published ones.
text/sentencepiece.py has the other kind of vocabulary (Llama 2, Gemma), and tokenizer.model.
Control tokens ("<|endoftext|>") are in `special`, and text never turns into one unless the caller
allows it: a user who types it gets its letters. text/chat.py writes conversations.

A tokenizer is saved as Hugging Face's tokenizer.json, which `tokenizers` and `transformers` open.
"""
from __future__ import annotations

import config  # noqa: F401  first, so that what fails while importing is a sentence
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

from text import chat
from text.stream import Stream, unpad
from text import sentencepiece
from text.tokenizer_model import from_model
from text.bpe import (PATTERNS, PieceCache, any_of, chunks, count_chunks, file_texts, learn, mend,
                 read_bytes, read_json, total, unprintable)
from config import UserError, run
from text import files, tokenizer_files, tokenizer_json
from text.added_tokens import Names, flags_of
from text.pre_tokenizer import Splits
from text.tokenizer_files import Facts

EOT = "<|endoftext|>"
# Other names of the token between documents. The first one that a vocabulary has is taken.
EOT_NAMES = (EOT, "<|end_of_text|>", "<eos>", "</s>")
TIKTOKEN = {"gpt2": "gpt2", "cl100k_base": "cl100k", "o200k_base": "o200k"}    # name -> pattern
MAX_ID = 1 << 24        # an id beyond this is a broken file, not a vocabulary


class Tokenizer:
    """A vocabulary with its split pattern, added tokens and chat template.

    ranks: token bytes -> merge order; empty in character mode, where `pattern` is "" too.
    ids: token bytes -> id, of every token but the control tokens; None if ids are ranks.
    special: control token -> id. added: name -> flags of all added tokens (text/added_tokens.py);
    those that are not special count in any text. template: a name in chat.TEMPLATES, or None.
    forms: Unicode forms that text is brought to first: ("NFC",) composes an é of two characters
    (Qwen). post: Hugging Face's post_processor, which adds a first token in transformers: `prefix`
    here. encode() never does. splits: a sequence of cuts; then pattern is its text as JSON.
    whole: tokens that only a whole chunk becomes. other: tokens that no text becomes. document:
    what else a tokenizer.json said, for saving. spm: the rules of a SentencePiece vocabulary; then
    ranks and pattern are empty, and the keys of ids are tokens as its file spells them.

    What the files beside a vocabulary say (text/tokenizer_files.py): settings, the whole of
    tokenizer_config.json; bos_token, eos_token, pad_token, the tokens with these roles, or None;
    jinja, the directory's own chat template, "" if it has none; jinjas, all of them by name.
    """

    def __init__(self, ranks: dict[bytes, int], special: dict[str, int], pattern: str,
                 ids: dict[bytes, int] | None = None, template: str | None = None,
                 forms: tuple[str, ...] = (), post: dict | None = None,
                 spm: sentencepiece.SentencePiece | None = None, added: dict | None = None,
                 splits: Splits | None = None, whole: Iterable[bytes] = (),
                 other: dict[str, int] | None = None, document: dict | None = None):
        self.ranks, self.special, self.pattern = ranks, dict(special), pattern
        self.ids = ranks if ids is None else ids
        self.template, self.forms, self.post, self.spm = template, forms, post, spm
        self.splits, self.whole, self.other = splits, frozenset(whole), dict(other or {})
        self.document = document or {}
        self.added = spm.added if spm else dict(added or {})
        for name, i in self.special.items():
            self.added.setdefault(name, flags_of({"special": True}, i))
        self.facts = Facts()
        # SmolLM2's vocabulary lacks 21 bytes, control characters and the like; where they occur,
        # its library drops them, and so do we. A vocabulary without letters is of another kind.
        self.bytewise = bool(pattern)
        self.lost = bytes(b for b in range(256) if self.bytewise and bytes([b]) not in ranks)
        if kinds := [chr(b) for b in self.lost if 32 <= b < 127]:
            raise UserError(f"the vocabulary has no token for {''.join(kinds)!r}: it is not a "
                            "byte-level one, or was trained without the whole byte alphabet")
        self._index()

    def _index(self) -> None:
        """Rebuild what follows from ids and added tokens: tokens by id, and the size."""
        spelled = self.spm.spelled if self.spm else str.encode
        self.tokens = {i: spelled(t.decode()) if self.spm else t for t, i in self.ids.items()}
        self.tokens.update((i, spelled(name)) for name, i in self.other.items())
        self.tokens.update((token["id"], spelled(name)) for name, token in self.added.items())
        if not all(0 <= i < MAX_ID for i in self.tokens):
            raise UserError(f"the vocabulary has ids outside 0..{MAX_ID}: its file is broken")
        self.vocab_size = max(self.tokens, default=-1) + 1      # gaps count: it sizes embeddings
        self.names: dict[tuple[frozenset, frozenset], Names] = {}       # see _names()
        self.__dict__.pop("tiktoken", None)
        if self.spm:
            self.spm.names.clear()

    def __getstate__(self) -> dict[str, Any]:
        # what cannot be sent to a worker process, or is cheaper to build there, stays here
        kept = {k: v for k, v in self.__dict__.items() if k not in ("tiktoken", "_cache")}
        return {**kept, "names": {}}

    # -- what the files beside the vocabulary say of it

    settings = property(lambda self: self.facts.settings)
    jinjas = property(lambda self: self.facts.jinjas)
    jinja = property(lambda self: self.facts.jinjas.get("default", ""))
    bos_token = property(lambda self: self.facts.named.get("bos_token"))
    eos_token = property(lambda self: self.facts.named.get("eos_token"))
    pad_token = property(lambda self: self.facts.named.get("pad_token"))

    @property
    def eot_token(self) -> str | None:
        """The control token between documents, None if there is none (character mode)."""
        return next((n for n in (*EOT_NAMES, self.eos_token) if n in self.special), None)

    @property
    def eot(self) -> int | None:
        """Its id."""
        return self.special.get(self.eot_token)

    @property
    def prefix(self) -> list[int]:
        """The ids that begin every text of this model, as in transformers: [<s>] for Llama 2."""
        return tokenizer_json.read_affixes(self.post)[0]

    @property
    def suffix(self) -> list[int]:
        """The ids that end every text of this model; few have any."""
        return tokenizer_json.read_affixes(self.post)[1]

    @property
    def stop_ids(self) -> list[int]:
        """The ids that end an answer: what any file calls an end, and the ends of turns."""
        names = [*chat.find_turn_ends(self), self.eot_token, self.eos_token, *self.facts.end_names]
        stops = {self.added[n]["id"] for n in names if n in self.added}
        return sorted(stops | {i for i in self.facts.ends if i in self.tokens})

    def token_ids(self) -> dict[str, int | list[int] | None]:
        """Return what config.json says of the first, the last and the padding token.

        The names of tokenizer_config.json count, then what the config.json said beside which the
        tokenizer was read. A model that names no first token begins at the end of text (GPT-2).
        """
        said = {key: value for key, value in self.facts.model_ids.items()
                if (value if isinstance(value, int) else value[0]) in self.tokens}
        first = [self.added[n]["id"] for n in (self.bos_token,) if n in self.added]
        first += [i for i in (said.get("bos_token_id"), *self.prefix, self.eot) if i is not None]
        pad = self.added.get(self.pad_token, {}).get("id", said.get("pad_token_id"))
        return {"bos_token_id": first[0] if first else None,
                "eos_token_id": said.get("eos_token_id", self.eot), "pad_token_id": pad}

    # -- text -> ids

    def _controls(self, text: str, allowed: Any, refused: Any) -> dict[str, int]:
        """Return the control tokens that the text may contain; UserError if it has a refused
        one."""
        allowed = set(self.special) if allowed == "all" else set(allowed) & set(self.special)
        refused = set(self.special) - allowed if refused == "all" else set(refused)
        if refused and (m := any_of(frozenset(refused)).search(text)):
            raise UserError(f"the text contains the control token {m.group()!r}: allow it with "
                            "allowed_special, or read it as text with disallowed_special=()")
        return {n: i for n, i in self.special.items() if n in allowed}

    def encode(self, text: str, allowed_special: Any = frozenset(),
               disallowed_special: Any = "all") -> list[int]:
        """Return text -> ids, by hand, with tiktoken's rules for control tokens in the text.

        Those in allowed_special ("all" or a set) become their id; those in disallowed_special
        ("all": every other one) raise UserError; what is in neither is read as text.
        """
        return self._encode(text, allowed_special, disallowed_special, self._merge)

    def encode_fast(self, text: str, allowed_special: Any = frozenset(),
                    disallowed_special: Any = "all") -> list[int]:
        """encode(), through tiktoken: the same ids, from Rust. For corpora."""
        return self._encode(text, allowed_special, disallowed_special, self._merge_rust)

    def _encode(self, text: str, allowed: Any, refused: Any, ordinary: Any) -> list[int]:
        controls = self._controls(text, allowed, refused)
        if self.spm:                # there, control tokens matter for the text around them
            return self.spm.encode(text, controls)
        return self._assemble(text, self._names(frozenset(controls)), ordinary)

    def _names(self, controls: frozenset[str], letters: frozenset[str] = frozenset()) -> Names:
        """Return the added tokens that count in a text: these control tokens, and what is not
        special."""
        key = controls, letters
        if key not in self.names:
            if len(self.names) > 99:
                self.names.clear()
            self.names[key] = Names({n: t for n, t in self.added.items() if n not in letters
                                     and (n in controls or not t["special"])}, self._normal)
        return self.names[key]

    def _assemble(self, text: str, names: Names, ordinary: Any) -> list[int]:
        """Return text -> ids: added tokens of the raw text, then of the normalized text, then
        merges."""
        if not names:
            return ordinary(self._normal(text))
        out: list[int] = []
        for _, part, token in names.cut_raw(text if text.isascii() else mend(text)):
            if token is not None:
                out.append(token)
                continue
            for _, piece, token in names.cut_normal(self._normal(part)):
                out += ordinary(piece) if token is None else [token]
        return out

    def encode_ordinary(self, text: str, after: str = "",
                        letters: frozenset[str] = frozenset()) -> list[int]:
        """Return text -> ids, by hand; control tokens are read as text.

        after: "token" if a control token stands before the text, "text" if the text goes on from
        one encoded before: SentencePiece's spaces depend on it, byte-level BPE does not.
        letters: added tokens that are not special, and are read as text all the same.
        """
        if self.spm:
            return self.spm.encode(text, {}, after, letters)
        return self._assemble(text, self._names(frozenset(), letters), self._merge)

    def _merge(self, text: str) -> list[int]:
        """Normalized text without added tokens -> ids."""
        if self.bytewise:
            look_up = self._cache.__getitem__
            cut = self.splits.chunks(text) if self.splits else chunks(self.pattern, text)
            return list(chain.from_iterable(
                chain.from_iterable(map(look_up, words)) for words in cut))
        try:
            return [self.ids[c] for c in map(str.encode, text)]
        except KeyError as e:
            raise UserError(f"the character {e.args[0].decode()!r} is not among the "
                            f"{len(self.ids)} characters of this tokenizer") from None

    def _merge_rust(self, text: str) -> list[int]:
        if self._only_by_hand(text):
            return self._merge(text)
        return self._named(self.tiktoken.encode_ordinary(text))

    def encode_batch(self, texts: list[str], threads: int = os.cpu_count() or 1) -> list[list[int]]:
        """encode_ordinary() of many texts, on tiktoken's threads."""
        names = self._names(frozenset()) if not self.spm else ()
        if names or any(map(self._only_by_hand, texts)):
            return [self.encode_fast(t, disallowed_special=()) for t in texts]
        normal = [self._normal(t) for t in texts]
        return [self._named(row) for row in
                self.tiktoken.encode_ordinary_batch(normal, num_threads=threads)]

    def _only_by_hand(self, text: str) -> bool:
        """True for characters, and where tiktoken would panic: blank texts, bytes it lacks."""
        if not self.pattern or self.splits or self.whole or too_blank(text):
            return True
        raw = mend(text).encode() if self.lost else b""
        return len(raw.translate(None, self.lost)) < len(raw)

    def _normal(self, text: str) -> str:
        if text.isascii():
            return text
        text = mend(text)
        for form in self.forms:
            text = unicodedata.normalize(form, text)
        return text

    @cached_property
    def _cache(self) -> PieceCache:
        return PieceCache(self.ranks, self.ids, self.lost, whole=self.whole,
                          spelled=bool(self.splits and self.splits.spelled))

    @cached_property
    def tiktoken(self) -> tiktoken.Encoding:
        """A tiktoken.Encoding of our ranks. It returns ranks, which _named() turns into ids."""
        special = self.special if self._rank_to_id is None else {}
        return tiktoken.Encoding("handmade", pat_str=total(self.pattern),
                                 mergeable_ranks=self.ranks, special_tokens=special)

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
        """Return ids -> the bytes they stand for. UserError for an id that the vocabulary lacks.

        Where SentencePiece puts a space before the text, it is dropped from the first token.
        """
        return unpad(self._bytes(ids), self.spm.strip if self.spm else 0)[0]

    def _bytes(self, ids: Iterable[int]) -> bytes:
        try:
            return b"".join([self.tokens[i] for i in ids])
        except KeyError as e:
            raise UserError(f"the id {e} is not in this vocabulary of {self.vocab_size}") from None

    def decode(self, ids: Iterable[int]) -> str:
        """Return ids -> text; bytes that are not UTF-8 (half a character) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def stream(self, after: Iterable[int] = ()) -> Stream:
        """Return a decoder for ids that come one by one; it holds back half a character.

        after: the ids whose text they continue: there, a first space is one between words.
        """
        return Stream(self, after)

    def byte_lengths(self) -> np.ndarray:
        """Return (vocab_size,) int32: the bytes of text of each id, 0 for control tokens and gaps.

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
        """Give each new name the next id at the end of the vocabulary; returns how many.

        An added token of that name, special or not, stays what it is.
        """
        new = [n for n in dict.fromkeys(names) if n not in self.added]
        if clash := [n for n in new if not n or n.encode() in self.ids or n in self.other
                     or self.bytewise and unprintable(n) in self.ids]:
            raise UserError(f"{clash[0]!r} cannot name a control token: it is empty or the text of "
                            "an ordinary token")
        for k, name in enumerate(new, self.vocab_size):
            self.special[name] = k
            self.added[name] = flags_of({"special": True}, k)
        self._index()
        return len(new)

    def render(self, messages: list[dict[str, Any]], template: str | None = None,
               add_generation_prompt: bool = False, max_length: int | None = None,
               enable_thinking: bool | None = None, tools: list | None = None,
               documents: list | None = None, **kwargs: Any) -> tuple[list[int], list[int]]:
        """Return a conversation -> (ids, mask); chat.render() says how."""
        return chat.render(self, messages, template, add_generation_prompt, max_length,
                           enable_thinking, tools, documents, **kwargs)[:2]

    # -- from and to a file

    def read_settings(self, facts: Facts, model: bool = False) -> None:
        """Take in what is next to a vocabulary. model: it is a tokenizer.model, for which the
        settings say whether tokens surround a text; tokenizer.json knows better."""
        self.facts = facts
        for name, token in facts.added_tokens():    # its flags count, and not its number
            if model and name in self.added:
                continue                            # from_model() has taken them
            known = self.added[name]["id"] if name in self.added else self._id_of(name)
            i = self.vocab_size if known is None else known
            self.added[name] = {**token, "id": i}
            self.vocab_size = max(self.vocab_size, i + 1)
        for name in (*facts.named.values(), *facts.more_special):
            if name not in self.added and (i := self._id_of(name)) is not None:
                self.added[name] = flags_of({"special": True}, i)
        for name in facts.named.values():           # what has a role is a control token
            if name in self.added:
                self.added[name]["special"] = True
        self.special = {n: t["id"] for n, t in self.added.items() if t["special"]}
        wanted = [facts.settings.get(k) for k in ("add_bos_token", "add_eos_token")]
        if model and wanted != [None, None]:
            first, last = ({n: self.special[n]} if on and n in self.special else {}
                           for on, n in zip(wanted, (self.bos_token, self.eos_token)))
            if tokenizer_json.read_affixes(self.post) != ([*first.values()], [*last.values()]):
                self.post = tokenizer_json.surround_text(first, last)
        tokenizer_json.read_affixes(self.post)        # ValueError now, not in the middle of a run
        self.template = chat.find_row(self.jinja, self.eot_token or EOT)
        self._index()
        if strange := [i for i in (*self.prefix, *self.suffix) if i not in self.tokens]:
            raise ValueError(f"the post_processor has the id {strange[0]}, which no token has")
        self._names(frozenset(self.special))        # and so for names that cannot be looked for

    def _id_of(self, name: str) -> int | None:
        """Return the id of a token of the vocabulary, as its file writes it."""
        spelled = unprintable(name) if self.bytewise else name.encode()
        return self.other.get(name, self.ids.get(spelled))

    def own_template(self) -> bool:
        """Return whether the directory's own chat template is still the one in use."""
        return self.template in (None, "", chat.find_row(self.jinja, self.eot_token or EOT))

    def save(self, directory: str | os.PathLike) -> None:
        """Write tokenizer.json, tokenizer_config.json and chat templates, as transformers does."""
        row = None if self.own_template() else chat.find(self.template)
        tokenizer_files.save(Path(directory), self, row and chat.jinja(row, self.eot_token or EOT))

    def _json(self) -> dict[str, Any]:
        """Return the document of the `tokenizers` library, from normalizer to decoder."""
        return self.spm.json(self.post) if self.spm else tokenizer_json.write(self)


def too_blank(text: str) -> bool:
    """Return a million white space characters in a row exhaust tiktoken's stack, and it panics."""
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
    """Return a folder or tokenizer.json (ours, Hugging Face's), vocab.json + merges.txt, or a name.

    The names are tiktoken's gpt2, cl100k_base and o200k_base, which it downloads once.
    """
    path = Path(path_or_name)
    if not path.exists() and str(path_or_name) in TIKTOKEN:
        return load_tiktoken(str(path_or_name))
    whole, model, tables = tokenizer_files.find(path)
    if not whole and not model and not tables:
        raise UserError(f"no tokenizer at {path}: give a folder with tokenizer.json, "
                        "tokenizer.model, vocab.json and merges.txt or encoder.json and vocab.bpe, "
                        f"or one of {', '.join(TIKTOKEN)}")
    try:
        facts = tokenizer_files.read_facts(path)
        if whole:
            tokenizer = from_json(read_json(whole))
        elif model:
            family = f"{facts.settings.get('tokenizer_class')} {facts.model_type}"
            tokenizer = Tokenizer(**from_model(read_bytes(model), family,
                                               dict(facts.added_tokens())))
        else:
            tokenizer = from_json(tokenizer_files.from_tables(*tables, facts))
        tokenizer.read_settings(facts, bool(model and not whole))
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as e:
        raise UserError(f"{path} is not a tokenizer that this program reads "
                        f"({type(e).__name__}: {e})") from None
    return tokenizer


def from_json(document: dict) -> Tokenizer:
    """Return a tokenizer.json -> Tokenizer. What it does not support raises ValueError with the
    name."""
    tokenizer_json.check_document(document)
    if sentencepiece.fits(document):
        return Tokenizer(**sentencepiece.from_json(document))
    return Tokenizer(**tokenizer_json.read(document))


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
    pattern: str = "gpt2"           # train: gpt2, cl100k, qwen, o200k, smollm, or a regex
    special: list[str] = field(default_factory=lambda: [EOT])   # train: control tokens
    chars: bool = False             # train: character level
    workers: int | None = None      # train: processes, None for one a core
    allow_special: bool = False     # encode, show: control tokens in the text become their id
    color: bool | None = None       # show: colours; None: on a terminal without NO_COLOR


def show(tokenizer: Tokenizer, ids: list[int], color: bool) -> str:
    """Return the text with its tokens on alternating backgrounds, or separated by | without
    colours."""
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
    if cfg.words and not cfg.file:
        text = " ".join(cfg.words)
    else:
        text = files.read(cfg.file or "-")
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
