"""train.py as its user meets it: the same run whatever stops it, splits it or goes wrong in it."""
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import checkpoint
import train
from config import configure, run
from data import loader
from model import ModelConfig
from runs import (Grads, assert_same_run, close, complaint, curve, last, log,
                  quiet_machine, ranks, same, trainer, weights)
from train_base import forks    # noqa: F401
from train_base import ROOT, TINY, data, fork, go, go_on, poison     # noqa: F401
assert quiet_machine                # a fixture that every test here uses by itself


# ------------------------------------------------------------------------- exact: resuming

@pytest.mark.parametrize("flags", [
    ["--dropout=0.2"],
    ["--optimizer=muon", "--family=llama", "--dropout=0.1", "--n_kv_head=1"],
    ["--dtype=bfloat16", "--document_mask=1"],
    ["--dtype=float16"],
    ["--backend=reference", "--dropout=0.2"],
    ["--schedule=wsd", "--checkpointing=1", "--dropout=0.2", "--log_interval=5"],
], ids=lambda flags: flags[0][2:])
def test_20_steps_are_10_and_10_more_bit_for_bit(go, flags):
    """Weights, optimizer, log: a resumed run is the run that never stopped. The command that
    resumes names none of the settings: they are the saved run's."""
    straight = go("straight", *flags)
    halves = go("halves", *flags, "--max_iters=10", "--lr_decay_iters=20")
    assert last(halves).name == "step_000010"
    go_on(halves, "--max_iters=20")
    assert_same_run(straight, halves)
    # a resumed run says that there is nothing left, and changes nothing
    go_on(halves)
    assert_same_run(straight, halves)


def test_resume_forgets_the_log_of_steps_that_it_repeats(go):
    """Steps after the checkpoint, and a line that a crash cut short, are written anew, once."""
    straight, halves = go("straight"), go("halves", "--max_iters=10", "--lr_decay_iters=20")
    with open(halves / "log.jsonl", "a") as f:
        f.write('{"step": 11, "loss": 9.0}\n{"step": 12, "lo')
    go_on(halves, "--max_iters=20")
    assert log(straight) == log(halves)


def test_resume_without_its_log_starts_a_new_one(go):
    straight, halves = go("straight"), go("halves", "--max_iters=10", "--lr_decay_iters=20")
    (halves / "log.jsonl").unlink()
    go_on(halves, "--max_iters=20")
    assert log(halves) == [row for row in log(straight) if row["step"] > 10]


# -------------------------------------------------- exact: ranks, accumulation, token weights

# Sums in another order differ in the last bits; a rate that makes a run chaotic would blow them up
CALM = "--learning_rate=3e-3"


def test_one_rank_is_two_ranks_under_torchrun(go, data, tmp_path):
    """9 rows for 2 ranks, in micro-batches of 3: 3 + 1 on one, 3 + 2 on the other."""
    rows = ["--batch_size=3", "--gradient_accumulation_steps=3", CALM]
    one, two = go("one", *rows), tmp_path / "two"
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         "train.py", f"--dataset={data}", f"--out_dir={two}", *TINY, *rows],
        cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert done.stderr.count("step 20/20 |") == 1           # one rank speaks for all
    close(one, two)


@pytest.mark.parametrize("rows", [
    ["--batch_size=8", "--gradient_accumulation_steps=1"],
    ["--batch_size=2", "--gradient_accumulation_steps=4", "--document_mask=1"],
    # in float32: in bfloat16 Muon makes more of a last bit
    ["--batch_size=3", "--gradient_accumulation_steps=1", "--optimizer=muon",
     "--muon_learning_rate=3e-3", "--backend=reference"]], ids=["8x1", "2x4", "3x1"])
def test_one_rank_is_two_ranks(go, fork, tmp_path, rows):
    one, two = go("one", CALM, *rows), tmp_path / "two"
    outcomes = [r.wait() for r in ranks(fork, 2, CALM, *rows, f"--out_dir={two}")]
    assert [o[0] for o in outcomes] == [0, 0], outcomes
    close(one, two)


def test_a_run_of_one_rank_goes_on_with_two(go, fork, tmp_path):
    """A checkpoint does not know how many ranks wrote it."""
    one, two = go("one", CALM), go("two", CALM, "--max_iters=10", "--lr_decay_iters=20")
    more = ["--init_from=resume", f"--out_dir={two}", "--max_iters=20", "--device=cpu"]
    outcomes = [r.wait() for r in ranks(fork, 2, *more, bare=True)]
    assert [o[0] for o in outcomes] == [0, 0], outcomes
    close(one, two)


def test_more_ranks_than_rows_is_one_sentence(fork, tmp_path):
    few = ["--batch_size=1", "--gradient_accumulation_steps=1", f"--out_dir={tmp_path / 'o'}"]
    for status, _, stderr in [r.wait() for r in ranks(fork, 2, *few)]:
        assert status == 2 and "1 rows for 2 ranks" in stderr and "Traceback" not in stderr


def test_a_batch_of_8_is_4_times_2_is_8_times_1(go):
    """Same tokens a step, however they are cut: losses, gradient norms, weights."""
    whole = go("whole", CALM, "--batch_size=8", "--gradient_accumulation_steps=1")
    for batch, steps in ((4, 2), (1, 8)):
        parts = go(f"parts{batch}", CALM, f"--batch_size={batch}",
                   f"--gradient_accumulation_steps={steps}")
        close(whole, parts)
        a, b = weights(last(whole)), weights(last(parts))
        assert max((a[k] - b[k]).abs().max() for k in a) < 1e-5


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_every_token_weighs_the_same(batch_size):
    """300 targets in one row, 10 in another, none in a third: the gradient is that of the mean
    over all 320 tokens, in float64, not the mean of the rows' means."""
    cfg = train.Config(batch_size=batch_size, block_size=300, grad_clip=0.0)
    torch.manual_seed(0)
    model = train.Transformer(ModelConfig(vocab_size=40, block_size=300, n_layer=1,
                                                n_head=2, n_embd=16)).double()
    ids, targets = torch.randint(40, (4, 300)), torch.randint(40, (4, 300))
    for row, live in enumerate((300, 10, 0, 10)):
        targets[row, live:] = -100
    optimizer, state = Grads(model), train.State()
    machine = train.Machine(torch.device("cpu"), torch.float32)
    done = train.take_step(cfg, model, {"ids": ids, "targets": targets},
                           train.next_token_loss(cfg), machine, optimizer, state, False)

    def gradient(loss):
        return dict(zip(optimizer.last, torch.autograd.grad(loss, list(model.parameters()))))
    logits = model(ids)
    mean = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    want = gradient(mean)
    assert abs(done.metrics["loss"] - mean.item()) < 1e-6
    flat = torch.cat([optimizer.last[n].flatten() for n in want])
    exact = torch.cat([g.flatten() for g in want.values()])
    assert (flat - exact).norm() / exact.norm() < 1e-6
    # the mistake that this guards against is far away
    means = [F.cross_entropy(model(ids[i:i + 1])[0], targets[i]) for i in (0, 1, 3)]
    wrong = torch.cat([g.flatten() for g in gradient(sum(means) / 3).values()])
    assert (wrong - exact).norm() / exact.norm() > 0.1


def test_a_batch_without_any_target_changes_nothing(go, monkeypatch):
    """All targets masked: a loss of 0 and finite weights, not 0 / 0."""
    cut = loader.Batches.__call__

    def masked(self, step):
        batch = cut(self, step)
        batch["targets"].fill_(-100) if step == 3 else None
        return batch
    monkeypatch.setattr(loader.Batches, "__call__", masked)
    out = go("out", "--max_iters=6")
    assert curve(out)[3] == 0.0 and all(map(math.isfinite, curve(out)))
    assert curve(out, "skipped")[-1] == 0


# ------------------------------------------------------------------ killed, asked, interrupted

def check_last(out, reference):
    """What checkpoints.json names is whole, and is what the unbroken run had at that step."""
    if not (out / "checkpoints.json").exists():
        return 0
    folder = checkpoint.resolve(out, "last")
    step = checkpoint.load_trainer(folder)["state"]["step"]
    assert step > 0
    assert same(weights(folder), weights(reference / f"step_{step:06d}"))
    for which in ("best", "last"):
        checkpoint.load_model(checkpoint.resolve(out, which), "cpu")
    return step


def test_killed_at_20_random_moments_it_ends_as_if_never_killed(fork, tmp_path):
    """SIGKILL: each attempt goes on from a complete checkpoint and the end is bit for bit the
    unbroken run's. It saves every second step, so that kills fall into saving too."""
    flags = ["--eval_interval=2", "--max_iters=40", "--dropout=0.1", "--eval_iters=1"]
    straight, out = tmp_path / "straight", tmp_path / "killed"
    began = time.perf_counter()
    assert fork(*flags, f"--out_dir={straight}", "--keep=1000").wait()[0] == 0
    whole = time.perf_counter() - began
    rng, span, killed, progress, reached = random.Random(20), whole / 2, 0, [], 0
    while killed < 20:
        resume = (out / "checkpoints.json").exists()
        attempt = fork(*flags, f"--out_dir={out}", *(["--init_from=resume"] if resume else []))
        time.sleep(rng.uniform(0, span))
        os.kill(attempt.pid, signal.SIGKILL)
        status, _, stderr = attempt.wait()
        if status == 0:                                     # too late: over again, with less time
            assert_same_run(straight, out)
            shutil.rmtree(out)
            reached, span = 0, span * 0.7
            continue
        assert status == -signal.SIGKILL, stderr
        killed, now = killed + 1, check_last(out, straight)
        assert now >= reached                               # a kill never takes a checkpoint away
        progress.append(now - reached)
        # some steps an attempt, so that most kills find a run that goes on from a checkpoint
        span *= 1.3 if now == reached else 0.9
        reached = now
    assert sum(progress) >= 10, (progress, span, whole)
    more = ["--init_from=resume"] if (out / "checkpoints.json").exists() else []
    status, _, stderr = fork(*flags, f"--out_dir={out}", *more).wait()
    assert status == 0, stderr
    assert_same_run(straight, out)


@pytest.mark.parametrize("moment, nth, saved", [
    ("os.rename .*log.tmp", 1, 0),
    ("write .*model.safetensors", 1, 0),                 # the first checkpoint of all
    ("os.rename .*step_000002.new", 1, 0),
    ("write .*checkpoints.tmp", 1, 0),
    ("os.rename .*checkpoints.tmp", 1, 0),
    ("write .*model.safetensors", 2, 2),                 # the second, beside the first
    ("write .*trainer.pt", 2, 2),
    ("os.rename .*step_000004.new", 1, 2),
    ("write .*checkpoints.tmp", 2, 2),
    ("os.rename .*checkpoints.tmp", 2, 2),
    ("os.remove .*model.safetensors", 1, 4),            # pruning the first
    ("os.remove .*config.json", 2, 4),
    ("os.rmdir .*step_000002", 1, 4),
    ("os.rename .*checkpoints.tmp", 3, 4)])
def test_killed_at_a_bad_moment_of_saving_it_goes_on(go, fork, tmp_path, moment, nth, saved):
    """SIGKILL just before a file is opened, renamed or removed: writing the checkpoint,
    replacing the note that names it, pruning the one before. The step that is `saved` counts."""
    flags = ["--eval_interval=2", "--max_iters=6", "--keep=1", "--eval_iters=1"]
    straight, out = go("straight", *flags, "--keep=1000"), tmp_path / "killed"
    status, _, stderr = fork(*flags, f"--out_dir={out}", kill_at=(moment, nth)).wait()
    assert status == -signal.SIGKILL, stderr
    assert check_last(out, straight) == saved
    more = ["--init_from=resume"] if (out / "checkpoints.json").exists() else []
    status, _, stderr = fork(*flags, f"--out_dir={out}", *more).wait()
    assert status == 0, stderr
    assert_same_run(straight, out)
    # and nothing that the kill left lying about is still there
    names = {last(out).name, last(out, "best").name, "checkpoints.json", "log.jsonl"}
    assert {p.name for p in out.iterdir()} == names


def wait_for_steps(out, count):
    deadline = time.monotonic() + 60
    path = out / "log.jsonl"
    while not path.exists() or path.read_text().count("\n") < count:
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_asked_to_stop_it_saves_and_says_how_to_go_on(go, fork, tmp_path, number):
    """A status of its own, a checkpoint of the very step, a mark that the run is not complete, and
    a command that, typed in, ends it."""
    flags = ["--max_iters=150", "--dropout=0.1", "--eval_interval=150"]
    out = tmp_path / "out"
    asked = fork(*flags, f"--out_dir={out}")
    wait_for_steps(out, 5)
    os.kill(asked.pid, number)
    status, stdout, stderr = asked.wait()
    assert status == 128 + number and stdout == "" and "Traceback" not in stderr
    assert json.loads((out / "checkpoints.json").read_text())["complete"] is False
    said = re.search(r"stopped after step (\d+) and saved to .*; go on with: "
                     r"python train.py (.*)\n\Z", stderr)
    assert 5 <= int(said[1]) < 150
    assert last(out).name == f"step_{int(said[1]):06d}"
    train.main(configure(train.Config, [*said[2].split(), "--device=cpu"]))
    assert_same_run(go("straight", *flags), out)


def test_a_signal_to_one_rank_stops_them_all(fork, tmp_path):
    out = tmp_path / "out"
    started = ranks(fork, 2, "--max_iters=2000", f"--out_dir={out}", "--eval_interval=2000")
    wait_for_steps(out, 3)
    os.kill(started[1].pid, signal.SIGTERM)
    outcomes = [r.wait() for r in started]
    assert [o[0] for o in outcomes] == [128 + signal.SIGTERM] * 2, outcomes
    assert "go on with" in outcomes[0][2] and "go on with" not in outcomes[1][2]
    assert checkpoint.load_trainer(last(out))["state"]["step"] == len(curve(out))


@pytest.mark.parametrize("gradient_only", [False, True], ids=["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped_counted_and_logged(go, monkeypatch, capfd,
                                                                 gradient_only):
    """Weights, moments and their counter are untouched by it; the next step goes on."""
    poison(monkeypatch, {2, 5}, gradient_only)
    out = go("out", "--max_iters=8", "--eval_interval=1", "--keep=100", "--log_interval=4")
    two, three = out / "step_000002", out / "step_000003"
    assert same(weights(two), weights(three))
    assert same(trainer(two)["optimizer"], trainer(three)["optimizer"])
    assert trainer(out / "step_000008")["optimizer"]["count"] == 6
    assert not same(weights(three), weights(out / "step_000004"))
    # bad steps are logged whatever log_interval says, with null for what JSON cannot hold
    rows = [row for row in log(out) if "loss" in row]
    assert [(row["step"], row["skipped"]) for row in rows] == [(3, 1), (4, 1), (6, 2), (8, 2)]
    assert rows[0]["grad_norm"] is None
    assert (rows[0]["loss"] is None) == (not gradient_only)
    assert "| 2 skipped |" in capfd.readouterr().err


def test_10_bad_steps_in_a_row_are_fatal_and_the_checkpoint_stays(go, data, monkeypatch, capfd,
                                                                  tmp_path):
    good = go("good", "--max_iters=4", "--lr_decay_iters=20")
    poison(monkeypatch, set(range(4, 20)))
    argv = ["train.py", f"--dataset={data}", f"--out_dir={tmp_path / 'bad'}", *TINY,
            "--eval_interval=4", "--always_save_checkpoint=0"]
    monkeypatch.setattr(sys, "argv", argv)
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(train.main, train.Config)
    sentence = complaint((stop.value.code, *capfd.readouterr()))
    assert "step 14: 10 steps in a row" in sentence and "--learning_rate" in sentence
    assert same(weights(last(good)), weights(last(tmp_path / "bad", "best")))


def test_a_good_step_between_starts_the_count_again(go, monkeypatch):
    poison(monkeypatch, set(range(19)) - {9})
    assert curve(go("out"), "skipped")[-1] == 18


# ---------------------------------------------------------------------------- the schedule

def nanogpt(it, learning_rate, warmup_iters, lr_decay_iters, min_lr):
    """get_lr of nanoGPT's train.py, as its formula stands in words there."""
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    if it > lr_decay_iters:
        return min_lr
    ratio = (it - warmup_iters) / (lr_decay_iters - warmup_iters)
    return min_lr + 0.5 * (1.0 + math.cos(math.pi * ratio)) * (learning_rate - min_lr)


def rate(step, **settings):
    cfg = train.Config(**{"learning_rate": 6e-4, "warmup_iters": 10, "max_iters": 110, **settings})
    return cfg.learning_rate * train.lr_scale(cfg, step)


@pytest.mark.parametrize("warmup, end", [(10, 110), (0, 110), (10, 60), (1, 2)])
def test_cosine_is_nanogpts(warmup, end):
    for step in range(130):
        got = rate(step, warmup_iters=warmup, lr_decay_iters=end, min_lr=6e-5)
        assert got == pytest.approx(nanogpt(step, 6e-4, warmup, end, 6e-5), rel=1e-12)


@pytest.mark.parametrize("schedule, settings, points", [
    # share of the way from min_lr to learning_rate at these steps; warmup ends at 10
    ("linear", {}, {10: 1.0, 35: 0.75, 60: 0.5, 85: 0.25, 110: 0.0, 500: 0.0}),
    ("cosine", {}, {10: 1.0, 60: 0.5, 110: 0.0, 500: 0.0}),
    ("wsd", {"wsd_decay": 0.2}, {10: 1.0, 60: 1.0, 88: 1.0, 99: 0.5, 110: 0.0, 500: 0.0}),
    ("wsd", {"wsd_decay": 1.0}, {10: 1.0, 60: 0.5, 110: 0.0}),
    ("constant", {}, {10: 1.0, 60: 1.0, 110: 1.0, 500: 1.0}),
    ("cosine", {"decay_lr": False}, {10: 1.0, 60: 1.0, 500: 1.0})])
@pytest.mark.parametrize("min_lr", [-1.0, 0.0, 3e-4])
def test_schedules_at_their_corners(schedule, settings, points, min_lr):
    floor = 6e-5 if min_lr < 0 else min_lr                  # -1: a tenth of learning_rate
    for step, share in points.items():
        got = rate(step, schedule=schedule, min_lr=min_lr, **settings)
        assert got == pytest.approx(floor + share * (6e-4 - floor), rel=1e-9)
    if not settings.get("decay_lr", True):      # nanoGPT's switch: the rate itself, no warmup
        assert [rate(s, schedule=schedule, **settings) for s in (0, 4, 9)] == [6e-4] * 3
        return
    # warmup is linear and the same for all: never 0, never full
    assert [rate(s, schedule=schedule, **settings) for s in (0, 4, 9)] == pytest.approx(
        [6e-4 * (s + 1) / 11 for s in (0, 4, 9)])


def test_the_rate_in_the_log_is_the_rate_of_the_step(go):
    want = [nanogpt(s, 1e-2, 2, 20, 1e-3) for s in range(20)]
    assert curve(go("out"), "lr") == pytest.approx(want)


# ------------------------------------------------------------------------------ evaluation

def test_scores_are_those_of_transformers_and_of_the_text(go, data, capfd):
    """val_loss, val_ppl, val_bpb over the whole split: logits by transformers, cross entropy by
    PyTorch, bytes by the tokenizers library."""
    from tokenizers import Tokenizer
    from transformers import AutoModelForCausalLM
    out = go("out", "--eval_iters=1000")
    ids = np.load(data / "val_00000.npy").astype(np.int64)
    count = (len(ids) - 1) // 16 * 16
    x, y = (torch.from_numpy(ids[i:i + count]).view(-1, 16) for i in (0, 1))
    oracle = AutoModelForCausalLM.from_pretrained(last(out), dtype=torch.float32)
    with torch.no_grad():
        loss = F.cross_entropy(oracle(x).logits.flatten(0, 1), y.flatten()).item()
    tok = Tokenizer.from_file(str(data / "tokenizer.json"))
    special = tok.token_to_id("<|endoftext|>")
    # a byte-level vocabulary writes each byte as one character
    size = sum(len(tok.id_to_token(i)) for i in y.flatten().tolist() if i != special)
    text = tok.decode(ids.tolist(), skip_special_tokens=True)
    assert sum(len(tok.id_to_token(i)) for i in ids.tolist() if i != special) == len(text.encode())
    row = log(out)[-1]
    assert row["val_loss"] == pytest.approx(loss, abs=1e-5)
    assert row["val_ppl"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert row["val_bpb"] == pytest.approx(loss * count / math.log(2) / size, rel=1e-5)
    # --eval_only prints the same on stdout, nothing else there, and touches no file
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    capfd.readouterr()
    go_on(out, "--eval_only")
    assert capfd.readouterr().out == (f"val_loss {row['val_loss']:.4f} val_ppl "
                                      f"{row['val_ppl']:.4f} val_bpb {row['val_bpb']:.4f}\n")
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before


def test_two_ranks_score_as_one(go, fork):
    """31 rows in micro-batches of 5 for 2 ranks; only rank 0 prints."""
    out = go("out", "--max_iters=5")
    flags = ["--init_from=resume", f"--out_dir={out}", "--device=cpu", "--eval_only",
             "--batch_size=5", "--eval_iters=1000"]
    one = fork(*flags, bare=True).wait()
    two = [r.wait() for r in ranks(fork, 2, *flags, bare=True)]
    assert one[0] == two[0][0] == two[1][0] == 0
    # sums of float32 in another order: the same numbers, to the last but one digit printed
    alone, shared = (dict(zip(words[::2], map(float, words[1::2])))
                     for words in (one[1].split(), two[0][1].split()))
    assert alone == pytest.approx(shared, rel=3e-6) and "val_loss" in alone
    assert two[1][1] == ""


def test_evaluating_and_sampling_do_not_disturb_training(go, capfd):
    """Dropout's randomness is the step's own: the weights are the same however often one looks;
    samples go to stderr."""
    seldom = go("seldom", "--dropout=0.2")
    capfd.readouterr()
    often = go("often", "--dropout=0.2", "--eval_interval=3", "--sample_interval=7",
               "--sample_prompt=the cat")
    assert same(weights(last(seldom)), weights(last(often)))
    assert curve(seldom) == curve(often)
    # the evaluation set is fixed: the same weights have the same score
    assert curve(seldom, "val_loss")[-1] == curve(often, "val_loss")[-1]
    stdout, stderr = capfd.readouterr()
    assert stdout == ""
    assert re.findall(r"--- sample at step (\d+)\nthe cat", stderr) == ["7", "14"]
