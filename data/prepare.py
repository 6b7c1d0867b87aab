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

import json
import os
import sys
from concurrent.futures import BrokenExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT)) if str(ROOT) not in sys.path else None
from config import Idle, UserError, refuse_idle, run  # noqa: E402  (now the root is on it)
from data import loader, public, skills  # noqa: E402
from data.corpus import RECORDS, Corpus, convert_bins, encode_corpus  # noqa: E402
from data.download import HUB, download, note  # noqa: E402
from data.shards import Shards, hash_file  # noqa: E402
from data.sources import (check_address, expand, fingerprint, list_stdlib,  # noqa: E402
                          name_dataset)
from formats.atomic import build_directory  # noqa: E402
from tokenizer import EOT, Tokenizer, load  # noqa: E402


def is_fetched(cfg: Any, inputs: list[tuple[str, str]]) -> bool:
    """Return whether anything is downloaded."""
    return any("://" in path for path, _ in inputs)


def has_kind(inputs: list[tuple[str, str]], records: bool) -> bool:
    """Return whether any input holds records, or any is one text."""
    names = [urlsplit(path).path if "://" in path else path for path, _ in inputs]
    return any((loader.kind_of(name) in RECORDS) == records for name in names)


@dataclass
class Config:
    source: list[str] = field(default_factory=lambda: ["stdlib"])  # a name, files, folders, URLs
    out: str = ""                       # directory to write; default data/<name of the source>
    file: str = ""                      # shakespeare, public chats: a copy that you already have
    # --- tokens
    tokenizer: str = ""                 # bpe (trained here), char, a directory, or a name: gpt2
    vocab_size: int = 16384             # entries of a bpe trained here, <|endoftext|> included;
                                        # unless it is given, fewer for a text below 1 MB
    pattern: str = "gpt2"               # how a bpe trained here splits text: gpt2 or cl100k
    tokenizer_chars: int = 1_000_000_000  # train the tokenizer on at most this many characters
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
    # which of these have no effect, and when; called with the inputs, in a model's place
    IDLE = (
        Idle("shards", "source", lambda c, m: c.source != ["fineweb"], "on other data than "
             "fineweb"),
        Idle("vocab_size pattern tokenizer_chars", "tokenizer", lambda c, m: c.tokenizer != "bpe",
             "unless a vocabulary is trained here, with --tokenizer=bpe"),
        Idle("key", "source", lambda c, m: not has_kind(m, True), "on text without records"),
        Idle("separator", "source", lambda c, m: not has_kind(m, False), "on records"),
        Idle("skip_bad key separator", "source", lambda c, m: c.source == ["fineweb"],
             "on fineweb, which is tokens already"),
        Idle("val_fraction seed", "source", lambda c, m: all(split for _, split in m),
             "on data that brings its own validation text"),
        Idle("cache", "source file", lambda c, m: not is_fetched(c, m),
             "where nothing is downloaded"),
        Idle("mirror", "source file", lambda c, m: not is_fetched(c, m)
             or " ".join(c.source) not in NAMES, "where no dataset with a name is downloaded"))


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
                         EOT),
    "gutenberg": Named(tuple(GUTENBERG.format(book) for book in BOOKS)),
    "fineweb": Named(tuple(FINEWEB.format("train", i + 1) for i in range(FINEWEB_SHARDS)),
                     (FINEWEB.format("val", 0),), tokenizer="gpt2"),
}


def resolve(cfg: Config, named: Named | None, out: Path) -> list[tuple[str, str]]:
    """Return (path or URL, its split) of all inputs; split "" means by document."""
    if named is None:
        paths = [path for word in cfg.source for path in expand(word, NAMES)]
        inside = f"{out.resolve()}{os.sep}"     # a folder around the output must not read it back
        return [(p, "") for p in paths if not os.path.realpath(p).startswith(inside)]
    if cfg.source == ["stdlib"]:
        return [(path, "") for path in list_stdlib()]
    if named.train == (SHAKESPEARE,) and (cfg.file or (out / "input.txt").is_file()):
        return [(expand(cfg.file or str(out / "input.txt"))[0], "")]    # nanoGPT's place for it
    train = named.train[:cfg.shards] if cfg.source == ["fineweb"] else named.train
    urls = [(u, "train" if named.val else "") for u in train] + [(u, "val") for u in named.val]
    if cfg.mirror:
        urls = [(f"{cfg.mirror.rstrip('/')}/{u.rsplit('/', 1)[1]}", split) for u, split in urls]
    return urls


# --- a dataset, whole or not at all ------------------------------------------------------------


def is_complete(out: Path, settings: dict[str, Any]) -> bool:
    """Return whether `out` already holds this dataset, with all its shards."""
    try:
        dataset = loader.Dataset(out)
        shards_match = all(len(dataset.tokens(split)) for split in dataset.shards)
        same = dataset.meta["settings"] == settings
        return shards_match and same and (out / "tokenizer.json").exists()
    except (UserError, KeyError):
        return False


def print_report(out: Path) -> None:
    """Print what was written and the command that comes next."""
    meta = loader.Dataset(out).meta
    print(f"{out}: {meta['vocab_size']:,} tokens in the vocabulary ({meta['tokenizer']})")
    print("split     documents          tokens           bytes  bytes/token")
    for split, s in meta["splits"].items():
        print(f"{split:<6}{s['documents']:>13,} {s['tokens']:>15,} {s['bytes']:>15,} "
              f"{s['bytes'] / s['tokens']:>12.2f}")
    home = out.resolve().parent == ROOT / "data"
    print(f"next: python train.py --dataset={out.name if home else out}")


def check_settings(cfg: Config, named: Named | None) -> None:
    """Raise UserError for settings that no dataset can have, before any work."""
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


def fill_defaults(cfg: Config, named: Named | None) -> Config:
    """Return the settings with what was not given as this dataset has it."""
    usual = named or Named()
    share = usual.val_fraction if cfg.val_fraction is None else cfg.val_fraction
    return replace(cfg, tokenizer=cfg.tokenizer or usual.tokenizer, val_fraction=share,
                   separator=cfg.separator or usual.separator)


def list_settings(cfg: Config, inputs: list[tuple[str, str]], given: frozenset) -> dict[str, Any]:
    """Return all that shapes the result: settings, inputs, and a tokenizer that may change."""
    free = ("out", "file", "workers", "force", "cache", "mirror")
    settings = {key: value for key, value in vars(cfg).items() if key not in free}
    tokenizer_files = [cfg.tokenizer] if os.path.exists(cfg.tokenizer) else []
    settings["inputs"] = fingerprint([path for path, _ in inputs] + tokenizer_files)
    if "vocab_size" in given and cfg.vocab_size == Config.vocab_size:
        settings["adapt"] = False           # the default size, but given: not adapted to the text
    return settings


def load_tokenizer(cfg: Config) -> Tokenizer | None:
    """Return the tokenizer that the settings name; None where one is trained on the corpus."""
    if cfg.tokenizer in ("bpe", "char") and cfg.source != ["fineweb"]:
        return None
    try:
        return load(cfg.tokenizer)
    except UserError as e:
        raise UserError(f"{e}; here, --tokenizer=DIR uses one and --tokenizer=bpe trains one")


def count_cores() -> int:
    """Return the cores that this process may use: in a container, fewer than the machine's."""
    if hasattr(os, "sched_getaffinity"):                    # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def write_dataset(cfg: Config, folder: Path, inputs: list[tuple[str, str]], named: Named | None,
                  adapt: bool) -> dict[str, Any]:
    """Fetch, tokenize and write the shards into `folder`; return meta.json but its settings."""
    tok = load_tokenizer(cfg)               # before an hour of downloads, since it may fail
    cache = Path(cfg.cache or ROOT / "data" / ".cache").expanduser()
    files = [(download(p, cache) if "://" in p else Path(p), split) for p, split in inputs]
    if named and named.train == (SHAKESPEARE,) and hash_file(files[0][0]) != SHAKESPEARE[-64:]:
        note(f"{files[0][0]} is not the Tiny Shakespeare of 1,115,394 characters")
    corpus = Corpus(files, cfg)
    is_tokens = cfg.source == ["fineweb"]   # no text: shards of ids
    if not is_tokens:
        corpus.scan()
    tok = tok or corpus.train_tokenizer(adapt=adapt)
    if tok.eot is None and corpus.documents > 1:
        note("this tokenizer has no end-of-text id: documents follow each other unmarked")
    tok.save(folder)
    writers = {split: Shards(folder, split, tok.vocab_size, cfg.shard_tokens)
               for split in ("train", "val")}
    if is_tokens:
        convert_bins(files, tok, writers)
    else:
        try:
            encode_corpus(corpus, folder, writers, cfg.workers or count_cores())
        except BrokenExecutor:
            raise UserError("an encoding process died (no memory?): try --workers=1") from None
    return {"vocab_size": tok.vocab_size, "eot": tok.eot, "dtype": writers["train"].dtype.name,
            "splits": {split: writer.close() for split, writer in writers.items()}}


def main(cfg: Config) -> None:
    if " ".join(cfg.source) in CHATS:           # conversations, not tokens
        script = public if cfg.source[0] in public.SETS else skills
        return script.main(script.inherit(cfg))
    given = getattr(cfg, "given", frozenset())
    cfg = replace(cfg, source=cfg.source or Config().source)
    named = NAMES.get(" ".join(cfg.source))
    cfg = fill_defaults(cfg, named)
    check_settings(cfg, named)
    if "://" in cfg.source[0]:
        check_address(cfg.source[0])
    name = cfg.source[0] if named else name_dataset(cfg.source[0])
    out = Path(cfg.out or ROOT / "data" / name).expanduser()
    inputs = resolve(cfg, named, out)
    if not inputs:
        raise UserError(f"{' '.join(cfg.source)} holds nothing to read but {out} itself")
    asked = replace(cfg)
    asked.given = given             # no field: it is no setting of the dataset
    refuse_idle(asked, inputs)
    settings = list_settings(cfg, inputs, given)
    with build_directory(out, lambda: not cfg.force and is_complete(out, settings)) as folder:
        if folder is None:
            note(f"{out} is up to date, nothing to do (--force=1 builds it again)")
            return print_report(out)
        written = write_dataset(cfg, folder, inputs, named, adapt="vocab_size" not in given)
        meta = {"version": loader.VERSION, "dataset": out.name, "source": " ".join(cfg.source),
                "settings": settings, "tokenizer": cfg.tokenizer, **written}
        (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
    print_report(out)


if __name__ == "__main__":
    run(main, Config, positional=("source",))
