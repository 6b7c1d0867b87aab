"""checkpoint.py convert as a user types it."""

import json
import shutil
import subprocess
import sys
import weakref

import pytest
import torch
import transformers as T

import checkpoint
import tokenizer
from checkpoint import load_model
from config import UserError, configure
from conftest import ROOT
from oracles import (BASE, BLOCK, V, build, error, opened, oracle, rope, scramble, shape, some_ids)     # noqa: F401

T.logging.set_verbosity_error()
T.logging.disable_progress_bar()

# ------------------------------------------------------------------ as their authors wrote them

ROPE_32 = dict(factor=32.0, high_freq_factor=4.0, low_freq_factor=1.0,
               original_max_position_embeddings=8192, rope_type="llama3")
from test_published import PUBLISHED, weights_of


def run(*argv, script="checkpoint.py"):
    return subprocess.run([sys.executable, str(ROOT / script), *map(str, argv)],
                          capture_output=True, text=True)


def test_a_bad_directory_is_one_sentence_and_status_2_to_a_user(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(dict(PUBLISHED["llama2-7b"],
                                                          model_type="deepseek_v3")))
    tokenizer.train_chars(["x"]).save(tmp_path)
    done = run(f"--model={tmp_path}", "--prompt=x", script="sample.py")
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
    assert "deepseek_v3" in done.stderr and "families/" in done.stderr


def test_convert_between_types_keeps_what_must_be_float32(oracle, tmp_path):
    """As a user types it: a new type, shards, the tokenizer and the control tokens go along."""
    shutil.copytree(oracle("glm4_moe").path, tmp_path / "in")
    tokenizer.train_chars(["hello\n"]).save(tmp_path / "in")
    (tmp_path / "in" / "generation_config.json").unlink()
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    (tmp_path / "in" / "config.json").write_text(json.dumps({**config, "eos_token_id": [5, 6]}))
    done = run("convert", tmp_path / "in", tmp_path / "out", "--dtype=bfloat16",
               "--shard_gb=0.00005")
    assert done.returncode == 0 and done.stdout == "" and "wrote" in done.stderr, done.stderr
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert checkpoint.load_tokenizer(tmp_path / "out").encode("hello")
    back = opened(tmp_path / "out", dtype=torch.float32)
    assert back.config.eos_token_id == back.generation_config.eos_token_id == [5, 6]
    ours, first = (load_model(tmp_path / d, "cpu") for d in ("out", "in"))
    for (name, p), q in zip(ours.named_parameters(), first.parameters()):
        exact = name.endswith("correction_bias")
        assert p.dtype == (torch.float32 if exact else torch.bfloat16)
        assert torch.equal(p, q if exact else q.bfloat16()), name
    shown = run(tmp_path / "out")
    assert shown.returncode == 0 and "glm4_moe" in shown.stdout and "BF16, F32" in shown.stdout


def test_convert_copies_a_tokenizer_that_it_cannot_read(oracle, tmp_path, capsys):
    shutil.copytree(oracle("llama").path, tmp_path / "in")
    (tmp_path / "in" / "tokenizer.json").write_text('{"model": {"type": "Unigram", "vocab": []}}')
    (tmp_path / "in" / "notes.txt").write_text("private")
    checkpoint.note.cache_clear()
    checkpoint.convert(tmp_path / "in", tmp_path / "out")
    assert "copied as it is" in capsys.readouterr().err
    same = [(tmp_path / d / "tokenizer.json").read_text() for d in ("in", "out")]
    assert same[0] == same[1] and not (tmp_path / "out" / "notes.txt").exists()
    assert weights_of(tmp_path / "in").keys() == weights_of(tmp_path / "out").keys()


def test_convert_reads_what_it_needs_when_it_needs_it(oracle, tmp_path, monkeypatch):
    """One tensor in memory at a time: none is asked for before the one before it is written."""
    alive = []

    def watched(s, out=None):
        assert out is None and sum(r() is not None for r in alive) <= 2
        tensor = read(s)
        alive.append(weakref.ref(tensor))
        return tensor
    read = checkpoint.read
    monkeypatch.setattr(checkpoint, "read", watched)
    checkpoint.convert(oracle("llama").path, tmp_path / "out", "float64")
    assert len(alive) == len(weights_of(tmp_path / "out"))


def test_convert_mistakes_are_one_sentence(oracle, tmp_path):
    (tmp_path / "file").write_text("x")
    good = oracle("qwen2").path
    for argv, words in [
            (["convert"], "two directories"), (["convert", good], "two directories"),
            (["convert", good, tmp_path / "o", "x"], "two directories"),
            (["convert", tmp_path / "none", tmp_path / "o"], "does not exist"),
            (["convert", good, tmp_path / "file"], "choose another folder"),
            (["convert", good, tmp_path / "o", "--dtype=int3"], "--dtype=int3"),
            (["convert", good, tmp_path / "o", "--layout=gguf"], "--layout=gguf"),
            (["convert", good, tmp_path / "o", "--layout=meta"], "qkv_bias"),
            (["convert", good, tmp_path / "o", "--shard_gb=-1"], "shard_gb is -1"),
            ([good, good], "unexpected argument")]:
        if argv[0] == "convert" and len(argv) == 3 or "--layout=meta" in argv:
            done = run(*argv)                           # as a user would; the others in here
            assert done.returncode == 2 and done.stdout == ""
            assert words in done.stderr and done.stderr.count("\n") == 1, done.stderr
            continue
        with pytest.raises(UserError, match=words):
            checkpoint.main(configure(checkpoint.Config, [str(a) for a in argv], ("words",)))
    assert not (tmp_path / "o").exists()
