"""Settings of the scripts around a model that have no effect are refused, each in a sentence.

What counts as an effect: the script's own output. Every row passes as soon as its cause is gone.
"""
import json

import pytest
import torch

import checkpoint
import sample
import tokenizer as tokenizers
from config import UserError, configure
from data import prepare
from model import ModelConfig, Transformer

PLAIN = "the cat sat on the mat\n" * 40
WORDS = {"sample": (sample, ()), "checkpoint": (checkpoint, ("words",)),
         "prepare": (prepare, ("source",))}
IDLE = [
    ("sample", "", "--system=brief", "--chat"), ("sample", "", "--template=chatml", "--chat"),
    ("sample", "--prompt=the", "--think=1", "--chat"), ("sample", "--chat", "--echo=0", None),
    ("sample", "--chat --prompt=the", "--stream=0", None),
    ("sample", "--prompt=the --temperature=0", "--top_p=0.5", "--temperature=1"),
    ("sample", "--prompt=the --temperature=0", "--top_k=5", "--temperature=1"),
    ("sample", "--prompt=the --temperature=0", "--min_p=0.5", "--temperature=1"),
    ("checkpoint", "{base}", "--dtype=float16", None),
    ("checkpoint", "{base}", "--layout=meta", None),
    ("checkpoint", "{base}", "--shard_gb=1", None), ("checkpoint", "{base}", "--model=x", None),
    ("checkpoint", "convert {base} {new}", "--model=x", None),
    ("checkpoint", "convert {base} {new} --layout=meta", "--shard_gb=1", "--layout=hf"),
    ("prepare", "{text}", "--shards=2", None), ("prepare", "{text}", "--key=body", None),
    ("prepare", "{records}", "--separator=@", None), ("prepare", "{text}", "--cache=x", None),
    ("prepare", "{text}", "--mirror=http://x/", None),
    ("prepare", "http://localhost:1/a.txt", "--mirror=http://x/", None),
    ("prepare", "tinystories", "--val_fraction=0.3", None), ("prepare", "tinystories", "--seed=4",
                                                           None),
    *(("prepare", "{text} --tokenizer=char", flag, "--tokenizer=bpe") for flag in (
        "--vocab_size=262", "--pattern=cl100k", "--tokenizer_chars=500")),
    ("prepare", "shakespeare --file={text}", "--vocab_size=262", "--tokenizer=bpe"),
    ("prepare", "fineweb", "--skip_bad=1", None), ("prepare", "fineweb", "--pattern=cl100k", None),
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Paths by name: a checkpoint, a text, records."""
    folder = tmp_path_factory.mktemp("idle")
    words = tokenizers.train([PLAIN], 260, workers=1)
    words.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    words.template = "chatml"
    torch.manual_seed(0)
    shape = ModelConfig.from_family("llama", n_layer=1, n_head=2, n_embd=16, block_size=64,
                   vocab_size=words.vocab_size)
    checkpoint.save_model(folder / "base", Transformer(shape), words)
    (folder / "a.txt").write_text(PLAIN)
    (folder / "a.jsonl").write_text(json.dumps({"text": PLAIN, "body": PLAIN}) + "\n")
    return {"base": folder / "base", "text": folder / "a.txt", "records": folder / "a.jsonl"}


def settle(script, place, tmp_path, flags):
    """Run a script with these flags, in this process."""
    module, positional = WORDS[script]
    names = {**place, "new": tmp_path / "new"}
    flags = [flag.format(**names) for flag in flags]
    flags += {"sample": [f"--model={place['base']}", "--max_new_tokens=1", "--device=cpu"],
              "prepare": [f"--out={tmp_path / 'out'}", "--workers=1"]}.get(script, [])
    module.main(configure(module.Config, flags, positional=positional))


@pytest.mark.parametrize("script, others, idle, cure", IDLE)
def test_a_setting_without_effect_is_refused_by(script, others, idle, cure, place, tmp_path):
    name = idle.split("=")[0]
    with pytest.raises(UserError, match=f"^{name}=.* has no effect"):
        settle(script, place, tmp_path, [*others.split(), idle])
    assert not (tmp_path / "out").exists() and not (tmp_path / "new").exists()
    if cure and cure != "--chat":           # a chat would read a terminal
        settle(script, place, tmp_path, [*others.split(), cure, idle])


def test_convert_takes_the_checkpoint_that_which_names(place, tmp_path):
    """A run whose last checkpoint is not its best one."""
    run = tmp_path / "run"
    for name, scale in (("step_000001", 1.0), ("step_000002", 2.0)):
        model = checkpoint.load_model(place["base"], "cpu")
        torch.nn.init.constant_(model.model.norm.weight, scale)
        checkpoint.save_model(run / name, model)
    (run / "checkpoints.json").write_text(json.dumps({"best": "step_000001",
                                                      "last": "step_000002"}))
    for which, scale in (("best", 1.0), ("last", 2.0)):
        settle("checkpoint", place, tmp_path, ["convert", str(run), str(tmp_path / which),
                                               f"--which={which}"])
        found = checkpoint.load_model(tmp_path / which, "cpu").model.norm.weight
        assert torch.equal(found, torch.full_like(found, scale))
