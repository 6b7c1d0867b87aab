"""What the tests of this subject share: fixtures and oracles.
"""
import json
import random

import numpy as np
import pytest
import torch

import checkpoint
import dpo
import tokenizer as tokenizers
from config import configure
from model import ModelConfig, Transformer
from runs import (forks_of, quiet_machine, said, starter)
assert quiet_machine                # a fixture that every test here uses by itself
U, A = "user", "assistant"
RUN = ["--batch_size=3", "--gradient_accumulation_steps=2", "--max_iters=6", "--eval_interval=3",
       "--eval_iters=3", "--learning_rate=3e-3", "--warmup_iters=2", "--device=cpu",
       "--dtype=float32", "--log_interval=1"]


def pairs(n, seed):
    """Sums whose better answer begins with "it is"; some have a first exchange or a system turn,
    and some end after two answers."""
    rng, out = random.Random(seed), []
    for _ in range(n):
        a, b = rng.randrange(5), rng.randrange(5)
        before = ["system", "be brief"] if rng.random() < .2 else []
        before += [U, "hello", A, "hello, what is it?"] if rng.random() < .3 else []
        before += [U, f"{a} + {b}?"]
        worse = rng.choice((f"hello, it is {a + b}", f"{a + b}", f"is it {a + b}? it is it is"))
        good, bad = [A, f"it is {a + b}"], [A, worse]
        if rng.random() < .2:
            good, bad = good + [U, "4?", A, "it is 4"], bad + [U, "5?", A, "5"]
        out.append({"chosen": said(*before, *good), "rejected": said(*before, *bad)})
    return out


@pytest.fixture(scope="session")
def words():
    text = "hello, what is 1 + 2? it is 3. be brief. user assistant naïve 🐈 4 5 6 7 8 9\n"
    found = tokenizers.train([text * 30], 288, workers=1)
    found.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    found.template = "chatml"
    return found


@pytest.fixture(scope="session")
def base(words, tmp_path_factory):
    """base(family, seed): a checkpoint of random weights that has a chat template."""
    made = {}

    def make(name="qwen3", seed=1):
        if (name, seed) not in made:
            torch.manual_seed(seed)
            model = Transformer(
                ModelConfig.from_family(
                    name,
                    n_layer=2,
                    n_head=2,
                    n_embd=32,
                    block_size=128,
                    vocab_size=words.vocab_size,
                )
            )
            for p in model.parameters():                    # norms and biases as well
                torch.nn.init.normal_(p, 1.0 if p.ndim < 2 else 0.0, 0.1)
            made[name, seed] = checkpoint.save_model(
                tmp_path_factory.mktemp("base") / name, model, words)
        return made[name, seed]
    return make


@pytest.fixture(scope="session")
def taste(tmp_path_factory):
    """A folder of preferences."""
    folder = tmp_path_factory.mktemp("taste")
    for split, n, seed in (("train", 90, 0), ("val", 30, 1)):
        (folder / f"{split}.jsonl").write_text(
            "".join(json.dumps(r) + "\n" for r in pairs(n, seed)))
    return folder


@pytest.fixture
def go(base, taste, tmp_path):
    """go(name, *flags): train in this process into tmp_path/name; returns that folder."""
    def start(name, *flags, start_from=None):
        out = tmp_path / name
        dpo.main(configure(dpo.Config, [f"--init_from={start_from or base()}",
                                        f"--dataset={taste}", f"--out_dir={out}", *RUN, *flags]))
        return out
    return start


def go_on(out, *flags):
    return dpo.main(configure(dpo.Config, ["--init_from=resume", f"--out_dir={out}",
                                           "--device=cpu", *flags]))


forks = forks_of("dpo")


@pytest.fixture
def fork(forks, base, taste, tmp_path):
    """fork(*flags): start dpo.py in a process; name its folder with --out_dir."""
    return starter(forks, tmp_path, lambda: [f"--init_from={base()}", f"--dataset={taste}", *RUN])


def alone(model, ids, mask):
    """Sum of log p of the masked tokens of one conversation, by the definition."""
    ids = torch.from_numpy(ids).long()
    logp = model(ids[None])[0].double().log_softmax(-1)
    return sum(logp[t - 1, ids[t]] for t in np.flatnonzero(mask))
