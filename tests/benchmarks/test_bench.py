"""Every section of bench.py runs from end to end, on models and texts as small as there are."""
import contextlib
import io
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import bench
from benchmarks import common, generation, stages, training
from benchmarks import kernels as kernel_benchmark
import checkpoint
import dpo
import kernels
import train
from config import UserError
from data import chats, loader
from model import ModelConfig, Transformer
from runs import quiet_machine
from test_sft import sums, talk, words      # noqa: F401

assert quiet_machine


def run(capsys, section, **settings):
    """The JSON line that a section ends with, in which no number is missing."""
    bench.main(bench.Config(section=section, repeat=1, **settings))
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["section"] == section
    return result


@pytest.fixture(scope="module")
def small(words, tmp_path_factory):                                                 # noqa: F811
    """A checkpoint that chats, with room for the prompts that are timed."""
    words.template = "chatml"
    words.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    torch.manual_seed(0)
    model = Transformer(
        ModelConfig.from_family(
            "llama", n_layer=1, n_head=2, n_embd=32, block_size=640, vocab_size=words.vocab_size
        )
    )
    return checkpoint.save_model(tmp_path_factory.mktemp("small") / "m", model, words)


def test_tokenizer(capsys, tmp_path):
    (tmp_path / "a.txt").write_text("the quick brown fox, 1 2 3\n" * 99)
    result = run(capsys, "tokenizer", text=str(tmp_path / "a.txt"), vocab_size=270)
    assert {"ours", "tokenizers"} <= set(result["train"])
    assert {"by hand", "fast", "tiktoken"} <= set(result["encode"])


@pytest.fixture
def script(monkeypatch):
    """train.py of this house and of nanoGPT, as the sections call them: what they write and say."""
    asked = []

    def answer(folder, *args):
        asked.append(args)
        out = next((a.partition("=")[2] for a in args if a.startswith("--out_dir=")), None)
        rows = [{"step": k, "loss": 2.0, "tokens_per_second": 10.0 * k, "memory": None}
                for k in range(1, 6)] + [{"step": 5, "val_loss": 1.5}]
        path = Path(out)
        path.mkdir(parents=True, exist_ok=True)
        (path / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        return (
            2.0,
            "iter 1: loss 2, time 5.0ms\nstep 2000: train loss 1, val loss 1.4\nval_loss 1.5",
        )

    monkeypatch.setattr(training, "run_train", answer)
    return asked


@pytest.mark.parametrize("nanogpt", [False, True])
def test_train_on_a_cpu(capsys, script, monkeypatch, tmp_path, nanogpt):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(loader, "find", lambda name: tmp_path)
    monkeypatch.setattr(loader, "Dataset", lambda folder: None)
    monkeypatch.setattr(training, "measure_gemm_roof", lambda dtype: 100.0)
    if nanogpt:
        (tmp_path / "data/shakespeare_char").mkdir(parents=True)
        (tmp_path / "data/shakespeare_char/train.bin").write_bytes(b"")
    results = run(capsys, "train", nanogpt=str(tmp_path) if nanogpt else "")["results"]
    assert results["6/6/384: ours, tokens/s"] == [40.0]         # the median of steps 3 to 5
    assert results["README command: ours, val loss"] == [1.5]
    assert ("6/6/384: speed, ours / nanoGPT" in results) == nanogpt
    for args in script:             # what is asked for are settings that train.py has
        known = {a[2:].partition("=")[0] for a in args if a.startswith("--")}
        assert known <= set(train.Config.__dataclass_fields__) | {"compile"}


def test_families(capsys, script):
    results = run(capsys, "families")["results"]
    assert {name.split(":")[0] for name in results} == set(training.EXAMPLES)
    assert (common.ROOT / "config/tiny.py").is_file()


def test_sample(capsys, small, monkeypatch):
    """Every type beside transformers; of random weights too the answers in float32 are equal."""
    monkeypatch.setattr(generation, "NEW", 4)
    monkeypatch.setattr(generation, "QUESTIONS", ("what is 1 + 2?",))
    result = run(capsys, "sample", model=str(small))
    assert result["equal answers"] == 1
    assert {"ours float32", "ours int4", "transformers bfloat16"} <= {
        name.split(":")[0] for name in result["results"]}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kernels(capsys, monkeypatch, dtype):
    monkeypatch.setattr(kernel_benchmark, "measure_roofs", lambda device, dtype: (1e9, 1e12))
    monkeypatch.setattr(torch, "compile", lambda form: form)
    monkeypatch.setattr(kernel_benchmark, "make_cases", lambda device, dtype: {
        name: ([torch.randn(8, 16, dtype=dtype).requires_grad_() for _ in range(count)],
               lambda form, *x: form(*x), "bytes", 1.0, 1.0)
        for name, count in (("gelu", 1), ("glu", 2), ("softmax", 1))})
    result = run(capsys, "kernels", only="gelu+softmax", dtype=dtype)
    assert {name.split(",")[0] for name in result if "," in name} == {"gelu", "softmax"}


def test_every_operation_that_is_timed_exists():
    assert all(hasattr(kernels, name) for name in kernel_benchmark.CASES)


def test_stages(capsys, small, tmp_path, monkeypatch):
    """Ours alone, in this process: what is watched from outside is still there to be watched."""
    file = tmp_path / "chats.jsonl"
    rows = [r for r in sums(400, 0) if len(r["messages"]) == 2]
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    monkeypatch.setattr(stages, "BLOCK", 64)
    monkeypatch.setattr(stages.importlib.util, "find_spec", lambda name: None)

    def measure(who, stage, model, dataset):
        said, threads = io.StringIO(), torch.get_num_threads()
        with contextlib.redirect_stdout(said), monkeypatch.context() as patch:
            # main() replaces these in a process of its own: here they come back
            for owner, name in ((chats.Packed, "__call__"), (train, "take_step"), (train, "save"),
                                (dpo, "of_conversations")):
                patch.setattr(owner, name, getattr(owner, name))
            stages.main(stages.Child([who, stage], model, str(dataset), threads))
        return json.loads(said.getvalue().splitlines()[-1])
    monkeypatch.setattr(stages, "measure", measure)
    results = run(capsys, "stages", model=str(small), dataset=str(file))["results"]
    for stage in stages.STAGES:
        for who in ("ours", "lean"):
            for what in ("tokens/s", "CPU tokens/s", "peak GB"):
                value, = results[f"{stage}: {who}, {what}"]
                assert math.isfinite(value) and value > 0


@pytest.mark.parametrize("settings, says", [
    (dict(section=""), "expected a section"), (dict(section="x"), "expected a section"),
    (dict(section="kernels", only="x"), "unknown --only=x"),
    (dict(section="kernels", dtype="x"), "--dtype=x"),
    (dict(section="stages", only="x"), "--only=x"), (dict(section="stages"), "--model=DIR"),
    (dict(section="tokenizer", repeat=0), "at least 1")])
def test_mistakes_are_one_sentence(settings, says):
    with pytest.raises(UserError, match=says):
        bench.main(bench.Config(**settings))


def test_disturbed_rounds_are_left_out_of_the_median(monkeypatch, capsys):
    """The load of others is all CPU time less our own, over wall time x cores."""
    clock = {"wall": 0.0, "busy": 100.0, "own": 10.0}
    monkeypatch.setattr(common.time, "perf_counter", lambda: clock["wall"])
    monkeypatch.setattr(common.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(common.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(common, "read_busy_seconds", lambda: clock["busy"])
    monkeypatch.setattr(common, "read_own_seconds", lambda: clock["own"])
    results = common.Results()
    for others, rate in ((0.0, 10.0), (8.0, 4.0), (0.0, 12.0)):
        with results.round():
            clock["wall"] += 10                 # both cores for 10 s: 20 CPU seconds at most
            clock["own"] += 12
            clock["busy"] += 12 + others
            results.note("tokens/s", rate)
    assert results.loads == [0.0, 0.4, 0.0]
    assert results.select("tokens/s") == [10.0, 12.0]
    assert results.report()["results"] == {"tokens/s": [10.0, 4.0, 12.0]}   # all of them in JSON
    out = capsys.readouterr().out
    assert "1 of 3 rounds disturbed and left out" in out and "         11" in out


def test_a_machine_that_is_always_busy_says_so(monkeypatch):
    results = common.Results()
    results.loads = [0.5, 0.3]
    results.values["x"] = [1.0, 2.0]
    results.rounds["x"] = [0, 1]
    assert results.select("x") == [1.0, 2.0]
    assert "2 of 2 rounds disturbed: every figure is of a busy machine" in results.describe_load()
    monkeypatch.setattr(common.Path, "read_text", lambda path: "")      # no Linux
    assert common.read_busy_seconds() is None
    assert common.LoadMeter().others() is None
    results.loads = [None]
    assert "unknown on this system" in results.describe_load()


def test_the_load_of_a_busy_neighbour_is_seen():
    """A process that is no child of ours, which burns one core while we sleep."""
    if common.read_busy_seconds() is None:
        pytest.skip("needs /proc/stat")
    meter = common.LoadMeter()
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as burner:
        time.sleep(0.6)                         # not waited for: its time is not among ours yet
        load = meter.others()
        burner.kill()
    assert load > 0.3 / os.cpu_count()
