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
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import checkpoint
import train
from config import configure, run
from data import loader, prepare, shards
from model import ModelConfig
from training.machine import utilisation
from training.optim import Optimizer
from runs import (Grads, assert_same_run, close, complaint, curve, forks_of, last, log,
                  quiet_machine, ranks, same, starter, trainer, weights)

ROOT = Path(train.__file__).parent
assert quiet_machine                # a fixture that every test here uses by itself
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


# ---------------------------------------------------------------------- logs and progress

def test_log_and_progress_say_what_the_design_names(go, capfd):
    out = go("out")
    stdout, stderr = capfd.readouterr()
    assert stdout == ""                                     # training answers nothing
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 21))
    for row in steps:
        assert row.keys() >= {"step", "loss", "lr", "grad_norm", "tokens_per_second", "mfu",
                              "memory", "seconds"}
        assert row["mfu"] is None and row["tokens_per_second"] > 0 < row["memory"]
    scores = [row for row in rows if "val_loss" in row]
    assert [row["step"] for row in scores] == [10, 20]
    assert all(row.keys() >= {"val_ppl", "val_bpb", "seconds"} for row in scores)
    seconds = [row["seconds"] for row in rows]
    assert seconds == sorted(seconds) and seconds[0] > 0
    line = (r"^step {}/20 \| loss \d\.\d{{4}} \| lr \d\.\d\de-\d\d \| norm \d+\.\d\d \| [\d,]+ "
            r"tok/s \| mfu n/a \| \d+:\d\d left$")
    assert all(re.search(line.format(n), stderr, re.M) for n in range(1, 21))
    assert "* learning_rate = 0.01" in stderr               # the settings, marked where chosen


def test_log_interval_thins_the_log_and_keeps_the_last_step(go):
    assert [row["step"] for row in log(go("out", "--log_interval=8")) if "loss" in row] == [8, 16,
                                                                                            20]


def test_tensorboard_and_wandb_are_not_imported_unless_asked_for():
    code = "import sys, train; print(*{'wandb', 'tensorboard', 'sample'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "\n"), done


# ----------------------------------------------------------------------------- checkpoints

def scores(monkeypatch, values):
    """Let the evaluations of a run come out as `values`, one after the other."""
    feed = iter(values)
    monkeypatch.setattr(train, "evaluate", lambda *a, **k: {"val_loss": next(feed)})


def test_best_and_last_are_named_and_the_rest_pruned(go, monkeypatch):
    scores(monkeypatch, [5.0, 3.0, 4.0, 4.0, 4.0, 4.0])
    out = go("out", "--max_iters=12", "--eval_interval=2", "--keep=2")
    assert last(out).name == "step_000012" and last(out, "best").name == "step_000004"
    assert sorted(p.name for p in out.iterdir() if p.is_dir()) == [
        "step_000004", "step_000010", "step_000012"]        # best, and the 2 to keep


def test_best_is_remembered_over_a_resumption(go, monkeypatch):
    scores(monkeypatch, [3.0, 4.0, 3.5, 2.0])
    out = go("out", "--max_iters=4", "--eval_interval=2", "--lr_decay_iters=20")
    assert last(out, "best").name == "step_000002"
    go_on(out, "--max_iters=6")
    assert last(out, "best").name == "step_000002"
    go_on(out, "--max_iters=8")
    assert last(out, "best").name == "step_000008"


def test_always_save_checkpoint_0_saves_better_ones_and_the_end(go, monkeypatch):
    scores(monkeypatch, [5.0, 6.0, 4.0, 7.0, 7.0, 7.0])
    out = go("out", "--max_iters=12", "--eval_interval=2", "--keep=9",
             "--always_save_checkpoint=0")
    assert sorted(p.name for p in out.glob("step_*")) == ["step_000002", "step_000006",
                                                          "step_000012"]


def test_keep_1_keeps_the_best_and_the_last(go, monkeypatch):
    scores(monkeypatch, [3.0, 4.0, 5.0])
    out = go("out", "--max_iters=6", "--eval_interval=2", "--keep=1")
    assert sorted(p.name for p in out.glob("step_*")) == ["step_000002", "step_000006"]


def test_an_earlier_run_is_moved_aside_and_not_lost(go, capfd):
    first = go("out", "--max_iters=3")
    kept = {p.name: p.read_bytes() for p in last(first).iterdir()}
    second = go("out", "--max_iters=4")
    aside = Path(f"{second}.old1")
    assert f"moved to {aside}" in capfd.readouterr().err
    assert {p.name: p.read_bytes() for p in last(aside).iterdir()} == kept
    assert len(log(aside)) == 4 and last(second).name == "step_000004"
    third = go("out", "--max_iters=3", f"--init_from={second}")     # even where it starts from it
    assert Path(f"{third}.old2").is_dir() and last(third).name == "step_000003"


def test_a_full_disk_while_saving_is_one_sentence_and_the_run_goes_on(go, fork):
    """No file may pass 60 kB: the weights do. The checkpoint before is whole and resumes."""
    straight, out = go("straight"), go("out", "--max_iters=10", "--lr_decay_iters=20")
    more = ["--init_from=resume", f"--out_dir={out}", "--max_iters=20", "--device=cpu"]
    sentence = complaint(fork(*more, bare=True, file_size=60_000).wait())
    assert "cannot save" in sentence and "step_000020" in sentence
    assert last(out).name == "step_000010" and not list(out.glob(".step_*"))
    go_on(out, "--max_iters=20")
    assert_same_run(straight, out)


def test_a_full_disk_at_the_start_does_not_lose_the_log(go, fork):
    """Resuming rewrites the log: to the side, so that a failed write leaves the old one."""
    out = go("out")
    before = (out / "log.jsonl").read_bytes()
    more = ["--init_from=resume", f"--out_dir={out}", "--max_iters=30", "--device=cpu"]
    assert fork(*more, bare=True, file_size=1000).wait()[0] != 0
    assert (out / "log.jsonl").read_bytes() == before


# -------------------------------------------------------------------- devices and precision

@pytest.mark.parametrize("name, peak", [
    ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H200", 989),
    ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA L4", 121), ("NVIDIA L40S", 362), ("Tesla T4", 65),
    ("NVIDIA GeForce RTX 4090", 165), ("Tesla V100-SXM2-16GB", 125),
    # unknown ones have no MFU: never the number of a namesake
    ("NVIDIA L40", None), ("NVIDIA T400 4GB", None), ("NVIDIA A10", None), ("Radeon", None)])
def test_mfu_is_the_share_of_a_known_peak_or_nothing(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    got = utilisation(100e12, torch.device("cuda"))
    assert got is None if peak is None else got == pytest.approx(100 / peak)
    assert utilisation(100e12, torch.device("cpu")) is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "auto"])
def test_every_precision_trains_on_a_cpu(go, dtype):
    out = go("out", f"--dtype={dtype}", "--max_iters=12")
    assert all(math.isfinite(v) for v in curve(out) + curve(out, "val_loss"))
    assert curve(out, "val_loss")[-1] < curve(out)[0] - 0.2
    # master weights stay float32 whatever the activations are
    assert {t.dtype for t in weights(last(out)).values()} == {torch.float32}


def test_float16_halves_its_loss_scale_at_an_inf_and_skips_the_step(go, monkeypatch):
    poison(monkeypatch, {7}, gradient_only=True)
    out = go("out", "--dtype=float16", "--max_iters=9", "--eval_interval=1", "--keep=100")
    states = [trainer(out / f"step_{n:06d}")["state"] for n in range(1, 10)]
    for before, after in zip(states, states[1:]):
        skipped = after["skipped"] - before["skipped"]
        assert after["scale"] == before["scale"] * 0.5 ** skipped
    assert states[7]["skipped"] == states[6]["skipped"] + 1
    assert same(weights(out / "step_000007"), weights(out / "step_000008"))


def test_float16_finds_its_loss_scale_with_many_tokens_a_micro_batch(go):
    """A sum over 16,384 tokens overflows float16 far sooner than a mean: it must not use up the
    10 bad steps after which a run is given up."""
    out = go("out", "--dtype=float16", "--max_iters=5", "--n_layer=1", "--n_embd=8",
             "--block_size=64", "--batch_size=256", "--gradient_accumulation_steps=1",
             "--eval_iters=1")
    assert curve(out, "skipped")[-1] <= 3


def test_float16_raises_its_scale_after_2000_steady_steps():
    cfg = train.Config(batch_size=2, block_size=4)
    model = train.Transformer(ModelConfig(vocab_size=5, block_size=4, n_layer=1, n_head=1,
                                                n_embd=8))
    model.compute_dtype = torch.float16
    state = train.State(scale=8.0, steady=1998)
    batch = {"ids": torch.zeros(2, 4, dtype=torch.int64),
             "targets": torch.ones(2, 4, dtype=torch.int64)}
    for want in (8.0, 16.0, 16.0):
        train.take_step(cfg, model, batch, train.next_token_loss(cfg),
                        train.Machine(torch.device("cpu"), torch.float16),
                        Optimizer(model.named_parameters()), state, False)
        assert state.scale == want and state.skipped == 0


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++", "clang++"))),
                    reason="torch.compile needs a C++ compiler on a CPU, and there is none")
def test_compiled_training_is_eager_training(go, fork, tmp_path):
    shape = ["--n_layer=1", "--n_embd=16", "--max_iters=6", "--eval_interval=6"]
    eager, out = go("eager", *shape), tmp_path / "compiled"
    env = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
           "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    status, _, stderr = fork(*shape, "--compile=1", f"--out_dir={out}", env=env, limit=240).wait()
    assert status == 0, stderr
    close(eager, out, 1e-4)
    assert weights(last(eager)).keys() == weights(last(out)).keys()     # no _orig_mod. in names


# ------------------------------------------------------------------- models, end to end

@pytest.mark.parametrize("family, optimizer, flags", [
    ("gpt2", "adamw", ["--bias=1"]),
    ("llama", "muon", ["--n_kv_head=1", "--tie_word_embeddings=1"]),
    ("qwen3", "adamw", ["--head_dim=8", "--rope_theta=10000"]),
    ("arcee", "muon", ["--z_loss=1e-4", "--label_smoothing=0.05"])])
def test_families_learn_and_open_in_transformers(go, data, family, optimizer, flags):
    """A falling loss on the text, and the same logits from the checkpoint in both programs."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    out = go("out", f"--family={family}", f"--optimizer={optimizer}", "--max_iters=30", *flags)
    losses = curve(out)
    assert losses[0] == pytest.approx(math.log(290), abs=0.3)       # uniform at the start
    assert curve(out, "val_loss")[-1] < losses[0] - 1.5
    ids = torch.from_numpy(np.load(data / "val_00000.npy")[:48].astype(np.int64)).view(3, 16)
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(last(out), dtype=torch.float32)(ids).logits
    ours = checkpoint.load_model(last(out), "cpu").logits(ids)
    assert (ours - theirs).norm() / theirs.norm() < 1e-5
    text = "the cat sat on naïve 🐈."
    mine, hf = checkpoint.load_tokenizer(out), AutoTokenizer.from_pretrained(last(out))
    assert mine.encode(text) == hf(text, add_special_tokens=False).input_ids


def test_documents_are_kept_apart_on_request(go, monkeypatch):
    """document_mask=1 reaches the model, and changes what is learnt."""
    seen = []
    forward = train.Transformer.forward
    monkeypatch.setattr(train.Transformer, "forward", lambda self, ids, doc=None, **k: (
        seen.append(doc is not None), forward(self, ids, doc=doc, **k))[1])
    masked = go("masked", "--document_mask=1", "--block_size=64")
    assert all(seen) and curve(masked, "val_loss")[-1] < 5
    assert curve(masked) != curve(go("plain", "--block_size=64"))


def test_training_starts_from_a_checkpoint_and_from_a_preset(go, data):
    """init_from=DIR takes the weights and starts at step 0; --preset its published flags."""
    first = go("first")
    second = go("second", f"--init_from={first}", "--max_iters=3")
    assert len(curve(second)) == 3
    assert curve(second)[0] < curve(first)[5]               # it knows what the first run learnt
    small = go("small", "--preset=gpt2", "--max_iters=2", "--n_kv_head=2",
               "--intermediate_size=64")
    shape = checkpoint.read_config(small)
    assert (shape.n_layer, shape.n_embd, shape.qkv_bias, shape.vocab_size) == (2, 32, True, 50257)


def test_as_a_user_from_text_to_sample(tmp_path):
    """prepare.py, train.py, sample.py on the command line, and a nanoGPT-like config file."""
    (tmp_path / "poem.txt").write_text("the rose is red, the violet blue.\n" * 400)
    (tmp_path / "my.py").write_text("n_layer = n_head = 2\nn_embd = 16 * 2\nblock_size = 16\n"
                                    "gradient_accumulation_steps = 1\nbatch_size = 8\n"
                                    "max_iters = 40\nwarmup_iters = 2\nlearning_rate = 1e-2\n"
                                    "eval_interval = 20\neval_iters = 2\n")

    env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}   # on every core

    def python(*argv):
        done = subprocess.run([sys.executable, *map(str, argv)], cwd=ROOT, capture_output=True,
                              text=True, timeout=120, env=env)
        assert done.returncode == 0, done.stderr
        return done.stdout
    ready, out = tmp_path / "ready", tmp_path / "out"
    python("data/prepare.py", tmp_path / "poem.txt", f"--out={ready}", "--tokenizer=char",
           "--val_fraction=0.1")
    flags = [tmp_path / "my.py", f"--dataset={ready}", f"--out_dir={out}", "--device", "cpu"]
    assert python("train.py", *flags) == ""
    assert curve(out, "val_loss")[-1] < curve(out)[0] - 0.8
    text = python("sample.py", f"--out_dir={out}", "--prompt=the ", "--max_new_tokens=20",
                  "--device=cpu")
    assert text.startswith("the ") and len(text) > 10


# -------------------------------------------------------------------------------- mistakes

def dataset(folder, train_ids, val_ids, vocab_size, like):
    """A small dataset with the tokenizer of another."""
    shutil.copytree(like, folder)
    about = {}
    for split, ids in (("train", train_ids), ("val", val_ids)):
        (folder / f"{split}_00000.npy").unlink()
        writer = shards.Shards(folder, split, vocab_size, 10 ** 9)
        writer.write(np.array(ids), 1, len(ids))
        about[split] = writer.close()
    meta = json.loads((folder / "meta.json").read_text())
    (folder / "meta.json").write_text(json.dumps({**meta, "vocab_size": vocab_size,
                                                  "splits": about}))
    return f"--dataset={folder}"


@pytest.fixture(scope="module")
def base(data, tmp_path_factory):
    """A run of 4 steps to make mistakes with."""
    out = tmp_path_factory.mktemp("base") / "run"
    train.main(configure(train.Config, [f"--dataset={data}", f"--out_dir={out}", *TINY,
                                        "--max_iters=4"]))
    return out


@pytest.mark.parametrize("flags, says", [
    ("--dataset=nosuch", "nosuch is not prepared: run `python data/prepare.py nosuch`"),
    ("--learning_rat=1", "did you mean learning_rate"),
    ("--batch_size=four", "batch_size is int, and 'four' is not"),
    ("--max_iters=2.5", "max_iters is int"),
    ("--bias=maybe", "bias is bool"),
    ("nosuch.py", "'nosuch.py' does not exist"),
    ("--init_from=gpt9", "no checkpoint at gpt9"),
    ("--init_from=resume --out_dir={tmp}/none", "no checkpoint at .*none"),
    ("--backend=cudnn", "choose auto, reference, torch, triton"),
    ("--schedule=step", "cosine, linear, constant, wsd"),
    ("--optimizer=sgd", "choose adamw or muon"),
    ("--family=bert", "choose from gpt2, llama, "),
    ("--activation=tanh", "activation='tanh' does not exist"),
    ("--dtype=int8", "auto, float32, bfloat16, float16"),
    ("--device=gpu", "--device=gpu is not usable here"),
    ("--device=cuda", "--device=cuda: PyTorch sees no GPU"),
    ("--device=mps", "--device=mps is not usable here"),
    ("--n_head=3", "n_embd 32 is not a multiple of n_head 3"),
    ("--n_head=4 --n_kv_head=3", "n_head 4 is not a multiple of n_kv_head 3"),
    ("--batch_size=0", "batch_size is 0: it must be at least 1"),
    ("--max_iters=-1", "max_iters is -1"),
    ("--log_interval=0", "log_interval is 0"),
    ("--eval_iters=0", "eval_iters"),
    ("--dropout=1.5", "dropout"),
    ("--block_size=100000", "too few for one window of block_size 100000"),
    ("--out_dir={tmp}/file/out", "cannot write to out_dir .*--out_dir"),
    ("--out_dir={tmp}/file", "cannot write to out_dir"),
    ("--out_dir=/proc/nosuch/out", "cannot write to out_dir"),
    ("--init_from={base} --block_size=32", "beyond the 16 learned positions"),
    ("--init_from={base} {wide}", "vocab_size = 310, its tokenizer 290"),
    ("{short}", "has 5 tokens, too few"),
    ("{alien}", "lacks or garbles eot: 289"),
    ("--init_from=resume --out_dir={base} --optimizer=muon", "optimizer state does not fit"),
], ids=lambda value: value.replace("/", "_")[:40] if value.startswith(("-", "{", "n")) else "")
def test_a_mistake_is_one_sentence_and_status_2(fork, base, data, tmp_path, flags, says):
    """What, where, what to do; and the run that was there before stays as it was."""
    if "--device=cuda" == flags and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    if "--device=mps" == flags and torch.backends.mps.is_available():
        pytest.skip("there is an Apple GPU here")
    (tmp_path / "file").write_text("a file")
    before = {p: p.read_bytes() for p in base.rglob("*") if p.is_file()}
    made = {"short": lambda: dataset(tmp_path / "d", range(5), range(100), 290, data),
            "wide": lambda: dataset(tmp_path / "d", range(310), range(310), 310, data),
            "alien": lambda: alien(dataset(tmp_path / "d", range(290), range(290), 290, data))}
    name = re.search(r"\{(short|wide|alien)\}", flags)
    fields = {name[1]: made[name[1]]()} if name else {}
    words = flags.format(tmp=tmp_path, base=base, **fields).split()
    if not any(w.startswith("--out_dir") for w in words):
        words.append(f"--out_dir={tmp_path / 'out'}")
    assert re.search(says, complaint(fork(*words).wait()))
    assert {p: p.read_bytes() for p in base.rglob("*") if p.is_file()} == before
    assert (tmp_path / "file").read_text() == "a file"


def alien(flag):
    """Lower the vocabulary that meta.json names below the ids in the shards."""
    meta = Path(flag.partition("=")[2]) / "meta.json"
    meta.write_text(json.dumps({**json.loads(meta.read_text()), "vocab_size": 20}))
    return flag


def truncate(name):
    def cut(folder):
        (folder / name).write_bytes((folder / name).read_bytes()[:-100])
    return cut


def other_shape(folder):
    settings = json.loads((folder / "config.json").read_text())
    settings.pop("handmade")
    (folder / "config.json").write_text(json.dumps({**settings, "n_embd": 64, "n_inner": 128}))


class Payload:
    """What a hostile trainer.pt would run."""
    def __reduce__(self):
        return os.mkdir, ("owned",)


@pytest.mark.parametrize("damage, says", [
    (truncate("model.safetensors"), "not a whole safetensors file"),
    (truncate("trainer.pt"), "trainer.pt is damaged"),
    (lambda f: (f / "trainer.pt").unlink(), "has no trainer.pt, so it cannot be resumed"),
    (lambda f: torch.save({"optimizer": Payload()}, f / "trainer.pt"), "trainer.pt is damaged"),
    (lambda f: torch.save({"model": 1}, f / "trainer.pt"), "is not of a run of train.py"),
    (other_shape, "belong to different models"),
    (lambda f: (f / "config.json").write_text("{"), "is not JSON"),
    (lambda f: shutil.rmtree(f), "names no checkpoint that is there"),
    (lambda f: (f.parent / "checkpoints.json").write_text('{"last": "../else"}'), "refused"),
    (lambda f: (f.parent / "checkpoints.json").write_text("half a no"), "is not JSON"),
], ids=["weights", "trainer", "no-trainer", "pickle", "foreign", "shape", "config", "gone",
        "escape", "note"])
def test_a_damaged_checkpoint_is_one_sentence(fork, base, tmp_path, damage, says):
    """Resuming from it says what is wrong, runs no code from it and deletes nothing."""
    out = tmp_path / "run"
    shutil.copytree(base, out)
    damage(last(out))
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    flags = ["--init_from=resume", f"--out_dir={out}", "--max_iters=6", "--device=cpu"]
    assert says in complaint(fork(*flags, bare=True).wait())
    assert not (ROOT / "owned").exists()
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_a_mistake_on_the_real_command_line(tmp_path):
    done = subprocess.run([sys.executable, "train.py", "--dataset=nosuch", "--block_siz=3"],
                          cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert complaint((done.returncode, done.stdout, done.stderr)) == (
        "error: command line: there is no setting 'block_siz'; did you mean block_size?")
