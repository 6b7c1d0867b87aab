"""python bench.py tokenizer: training and encoding beside `tokenizers` and tiktoken.

    python bench.py tokenizer                   # CPU: about a minute
    python bench.py tokenizer --repeat=9        # more rounds, a steadier median

Training is the same job for both: GPT-2's split pattern, the 256 bytes as alphabet, one control
token. Encoding takes the same vocabulary in all, document by document; ids are compared first.
"""
from __future__ import annotations

import json
import sysconfig
from pathlib import Path
from typing import Any, Callable

from config import UserError, refuse_to_run
import tokenizer
from benchmarks.common import print_rates, time_rounds
from text.bpe import chunks, file_texts


def read_stdlib() -> list[str]:
    """Return the sources of Python's standard library, without tests: 12 MB on every machine."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    texts = []
    for path in sorted(root.rglob("*.py")):
        if skip.isdisjoint(path.relative_to(root).parts):
            try:
                texts.append(path.read_text(encoding="utf-8"))
            except UnicodeDecodeError:
                pass                        # a few files are Latin-1, to test the parser
    return texts


def run_section(cfg: Any) -> dict[str, Any]:
    """Time training against `tokenizers`; encoding against tiktoken and `tokenizers`."""
    texts = list(file_texts([cfg.text])) if cfg.text else read_stdlib()
    megabytes = sum(len(t.encode()) for t in texts) / 1e6
    print(f"{len(texts)} texts, {megabytes:.1f} MB, {cfg.vocab_size} entries")

    # the same job for both: GPT-2's pattern, the whole byte alphabet, one control token
    training: dict[str, Callable[[], Any]] = {
        "ours": lambda: tokenizer.train(texts, cfg.vocab_size),
        "ours, one process": lambda: tokenizer.train(texts, cfg.vocab_size, workers=1)}
    try:
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    except ImportError:
        Tokenizer = None
        print("tokenizers is not installed: left out")

    def train_theirs() -> Any:
        theirs = Tokenizer(models.BPE())
        theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        theirs.train_from_iterator(texts, trainers.BpeTrainer(
            vocab_size=cfg.vocab_size, special_tokens=[tokenizer.EOT], show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
        return theirs

    if Tokenizer:
        training["tokenizers"] = train_theirs
    trained = print_rates("train", time_rounds(training, cfg.repeat), megabytes, "MB",
                          "tokenizers")

    # all encode with the same vocabulary, document by document; by hand from a cold cache
    tok = tokenizer.train(texts, cfg.vocab_size)
    fast = tok.tiktoken

    def by_hand() -> list[list[int]]:
        tok.__dict__.pop("_cache", None)
        return [tok.encode(t, disallowed_special=()) for t in texts]

    encoding: dict[str, Callable[[], Any]] = {
        "by hand": by_hand,
        "fast": lambda: [tok.encode_fast(t, disallowed_special=()) for t in texts],
        "tiktoken": lambda: [fast.encode(t, disallowed_special=()) for t in texts],
        "fast, batch on all cores": lambda: tok.encode_batch(texts),
        "split alone": lambda: [sum(map(len, chunks(tok.pattern, t))) for t in texts]}
    if Tokenizer:
        theirs = Tokenizer.from_str(json.dumps(tok._json()))
        encoding["tokenizers, batch on all cores"] = lambda: theirs.encode_batch(texts)
        if [e.ids for e in theirs.encode_batch(texts)] != by_hand():
            raise UserError("tokenizers and our encode() give different ids: times mean nothing")
    if encoding["fast"]() != encoding["tiktoken"]() or encoding["fast"]() != by_hand():
        raise UserError("tiktoken and our encode() give different ids: times mean nothing")
    encoded = print_rates("encode", time_rounds(encoding, cfg.repeat), megabytes, "MB",
                          "tiktoken")
    return {"megabytes": megabytes, "vocab_size": cfg.vocab_size, "train": trained,
            "encode": encoded}


if __name__ == "__main__":
    refuse_to_run()
