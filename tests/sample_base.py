"""What the tests of this subject share: fixtures and oracles.
"""
import contextlib
import subprocess
import sys

import pytest
import torch

import sample
import tokenizer as tokenizers
from checkpoint import save_model
from conftest import ROOT
from inference.generate import Sampling, generate
from model import ModelConfig, Transformer
from families import SCRATCH

V = 61
SHAPE = dict(vocab_size=V, block_size=24, n_layer=2, n_head=4, n_embd=32)
KINDS = {"gpt2": dict(SCRATCH["gpt2"].flags, **SHAPE),
         "llama": dict(SCRATCH["llama"].flags, **SHAPE, n_kv_head=2),
         "qwen3": dict(SCRATCH["llama"].flags, **SHAPE, n_kv_head=2, qk_norm=True, head_dim=16),
         "no position": dict(SHAPE, position="none")}


def build(kind="gpt2", **changes) -> Transformer:
    model = Transformer(ModelConfig(**{**KINDS[kind], **changes}))
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data.normal_(0, 0.2, generator=generator)
    return model.eval()


def prompt(length: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, V, (length,), generator=generator).tolist()


def run_all(*args, **kwargs) -> list[list[int]]:
    """Rows of tokens instead of steps."""
    rows: list[list[int]] = []
    for step in generate(*args, **kwargs):
        rows = rows or [[] for _ in step]
        for row, token in zip(rows, step):
            if token is not None:
                row.append(token)
    return rows


GREEDY = Sampling(temperature=0)

# --------------------------------------------------------------------------------- the script


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny model with a byte-level tokenizer."""
    tok = tokenizers.train(["hello world, the quick brown fox " * 20], 280)
    model = Transformer(ModelConfig(**dict(KINDS["gpt2"], vocab_size=tok.vocab_size)))
    path = tmp_path_factory.mktemp("sample") / "m"
    save_model(path, model, tok)
    return path


def script(*args, stdin="", **kwargs):
    return subprocess.run([sys.executable, str(ROOT / "sample.py"), *map(str, args)],
                          input=stdin, capture_output=True, text=True, encoding="utf-8", **kwargs)


@pytest.fixture
def stdin(tmp_path, monkeypatch):
    """stdin(text): what a pipe or a file says to a script that runs in this process."""
    with contextlib.ExitStack() as stack:
        def say(text):
            (tmp_path / "stdin").write_text(text, encoding="utf-8")
            file = stack.enter_context(open(tmp_path / "stdin", encoding="utf-8"))
            monkeypatch.setattr(sys, "stdin", file)
        yield say


def run_main(capsys, saved, **settings) -> str:
    settings = {"max_new_tokens": 20, "device": "cpu", **settings}
    sample.main(sample.Config(model=str(saved), **settings))
    return capsys.readouterr().out


def greedy(capsys, model, **settings):
    return run_main(capsys, model, prompt="hello fox", temperature=0, ignore_eot=True, **settings)
