"""What the tests of this subject share: fixtures and oracles.
"""
import json

import pytest
import torch

import checkpoint
import distill
import classify
import dpo
import sft
import tokenizer as tokenizers
import train
from config import configure
from data import prepare
from model import ModelConfig, Transformer
from runs import quiet_machine, said

assert quiet_machine                # a fixture that every test here uses by itself
RUN = ["--batch_size=2", "--max_iters=2", "--eval_interval=9", "--device=cpu", "--dtype=float32",
       "--log_interval=1", "--eval_iters=1"]
TEXT = "the cat sat on the mat; user and assistant say hello 12 + 30 = 42\n"
PAIRS = (("say hello", "hello cat", "mat"), ("12 + 30", "42", "the mat"),
         ("the cat", "sat on the mat", "12"))
DATA = {"sft": "chats", "classify": "mail", "lora": "chats", "dpo": "pairs", "distill": "chats"}


@pytest.fixture(scope="module")
def words():
    found = tokenizers.train([TEXT * 30], 280, workers=1)
    found.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    found.template = "chatml"
    return found


def made(words, name="llama", seed=0, **shape):
    torch.manual_seed(seed)
    flags = dict(n_layer=1, n_head=2, n_embd=16, block_size=64, init_std=0.2,
                 vocab_size=words.vocab_size)
    return Transformer(ModelConfig.from_family(name, **{**flags, **shape}))


@pytest.fixture(scope="module")
def place(words, tmp_path_factory):
    """A folder with a base, another one of its shape, conversations, pairs and prepared text."""
    folder = tmp_path_factory.mktemp("place")
    checkpoint.save_model(folder / "base", made(words), words)
    checkpoint.save_model(folder / "other", made(words, seed=1), words)
    checkpoint.save_model(folder / "deep", made(words, "qwen3", n_layer=2), words)
    chats = [{"messages": said("user", q, "assistant", a)} for q, a, _ in PAIRS]
    pairs = [dict(zip(("prompt", "chosen", "rejected"), row)) for row in PAIRS]
    mail = [{"text": q, "label": "ham" if i else "spam"} for i, (q, *_) in enumerate(PAIRS)]
    for name, rows in (("chats", chats), ("pairs", pairs), ("mail", mail)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "text.jsonl").write_text(json.dumps({"text": TEXT * 40}) + "\n")
    words.save(folder / "words")
    prepare.main(configure(prepare.Config, [str(folder / "text.jsonl"), f"--out={folder / 'ready'}",
                                            f"--tokenizer={folder / 'words'}", "--workers=1",
                                            "--val_fraction=0.2"], positional=("source",)))
    return folder


@pytest.fixture
def go(place, tmp_path):
    """go(stage, out, *flags): a run of two steps in this process into tmp_path/out."""
    def run(stage, out, *flags):
        script = {**SCRIPTS, "lora": sft}[stage]
        first = [f"--out_dir={tmp_path / out}", *RUN, "--block_size=64"]
        if stage == "train":
            first += [f"--dataset={place / 'ready'}", "--gradient_accumulation_steps=1",
                      "--block_size=16"]
        else:
            first.append(f"--dataset={place / DATA[stage]}.jsonl")
        named = any(f.startswith("--init_from") for f in flags)
        if not named and stage not in ("train", "distill"):
            first.append(f"--init_from={place / 'base'}")
        if stage == "lora":
            first.append("--lora_rank=2")
        if stage == "distill" and not any(f.startswith("--teacher") for f in flags):
            first.append(f"--teacher={place / 'base'}")
        script.main(configure(script.Config, [*first, *flags]))
        return tmp_path / out
    return run


def resume(script, out, *flags):
    return script.main(configure(script.Config, ["--init_from=resume", f"--out_dir={out}",
                                                 "--device=cpu", *flags]))


def files(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
SCRIPTS = {"train": train, "sft": sft, "classify": classify, "dpo": dpo, "distill": distill}
