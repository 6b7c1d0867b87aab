"""What the tests of this subject share: fixtures and oracles.
"""
import json
import math
import random
from pathlib import Path

import pytest
import torch

import train
from config import configure
from data import prepare
from runs import (forks_of, quiet_machine, starter)
assert quiet_machine                # a fixture that every test here uses by itself

ROOT = Path(train.__file__).parent
SHAPE = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=16"]
TINY = [*SHAPE, "--batch_size=4", "--gradient_accumulation_steps=2", "--max_iters=20",
        "--warmup_iters=2", "--learning_rate=1e-2", "--eval_interval=10", "--eval_iters=4",
        "--device=cpu", "--dtype=float32"]


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A prepared dataset of 120 small documents with letters of one, two and four bytes."""
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(0)
    words = "the a cat dog sat ran on in house tree grün naïve 🐈 quickly slowly and then".split()
    with open(folder / "text.jsonl", "w") as f:
        for _ in range(120):
            text = " ".join(rng.choice(words) for _ in range(rng.randrange(20, 200))) + ".\n"
            f.write(json.dumps({"text": text}) + "\n")
    argv = [str(folder / "text.jsonl"), f"--out={folder / 'ready'}", "--vocab_size=290",
            "--workers=1"]
    prepare.main(configure(prepare.Config, argv, positional=("source",)))
    return folder / "ready"


@pytest.fixture
def go(data, tmp_path):
    """go(name, *flags): train in this process into tmp_path/name; returns that folder."""
    def start(name, *flags):
        out = tmp_path / name
        train.main(configure(train.Config, [f"--dataset={data}", f"--out_dir={out}", *TINY,
                                            *flags]))
        return out
    return start


def go_on(out, *flags):
    """Resume the run in `out`; whatever is not in `flags` is the saved run's."""
    return train.main(configure(train.Config, ["--init_from=resume", f"--out_dir={out}",
                                               "--device=cpu", *flags]))


forks = forks_of("train")


@pytest.fixture
def fork(forks, data, tmp_path):
    """fork(*flags): start train.py in a process; name its folder with --out_dir."""
    return starter(forks, tmp_path, lambda: [f"--dataset={data}", *TINY])


# ---------------------------------------------------------------------- steps that go wrong

def poison(monkeypatch, bad, gradient_only=False):
    """Make the second of the two micro-batches of the steps in `bad` not finite."""
    real, calls = train.next_token_loss, [0]

    def factory(cfg):
        loss = real(cfg)

        def poisoned(model, batch):
            value, count, metrics = loss(model, batch)
            if torch.is_grad_enabled():
                step, part = divmod(calls[0], 2)
                calls[0] += 1
                if step in bad and part == 1:
                    if gradient_only:
                        value.register_hook(lambda g: g * math.inf)
                    else:
                        value = value * math.nan
            return value, count, metrics
        return poisoned
    monkeypatch.setattr(train, "next_token_loss", factory)
