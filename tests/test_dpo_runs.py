"""A run of dpo.py as its user meets it: the reference, stops, and what is learnt.
"""
import json
import os
import re
import shutil
import signal

import numpy as np
import pytest
import torch

import checkpoint
import dpo
import tokenizer as tokenizers
import train
from config import UserError, configure
from data import chats
from model import ModelConfig, Transformer
from runs import (assert_same_run, complaint, curve, last, log,
                  quiet_machine, said)
from dpo_base import forks    # noqa: F401
from dpo_base import A, U, alone, base, fork, go, go_on, pairs, taste, words     # noqa: F401
assert quiet_machine                # a fixture that every test here uses by itself

ROOT = train.Path(dpo.__file__).parent

# ------------------------------------------------------------------------- the reference, once


def cache(out):
    found, = out.glob("reference_*.npy")
    return found


def count_calls(monkeypatch):
    calls, compute = [], dpo.of_conversations

    def counted(*args, **kwargs):
        calls.append(args[1])
        return compute(*args, **kwargs)
    monkeypatch.setattr(dpo, "of_conversations", counted)
    return calls


def test_the_reference_is_asked_once_and_no_second_model_loaded(go, monkeypatch, base):
    """A run, its resumption, its evaluation and a later run with the same data and reference."""
    loads, load = [], checkpoint.load_model
    monkeypatch.setattr(checkpoint, "load_model",
                        lambda *a, **k: (loads.append(a), load(*a, **k))[1])
    calls = count_calls(monkeypatch)
    out = go("out", "--max_iters=3")
    assert len(calls) == 2 and len(loads) == 1              # train and val
    values = np.load(cache(out))
    model = load(base(), "cpu")
    where = np.cumsum([0] + [len(p.conversations) for p in calls])
    for start, p in zip(where, calls):
        for k in (0, 1, len(p.conversations) - 1):
            want = alone(model, *p.conversations[k]).item()
            assert values[start + k] == pytest.approx(want, abs=1e-4)
    go_on(out, "--max_iters=6")
    go_on(out, "--eval_only=1")
    go("out", "--beta=0.5")                                 # the earlier run is moved aside
    assert len(calls) == 2 and len(loads) == 4 and cache(out)
    go("out", "--dtype=bfloat16")
    assert len(calls) == 4
    go("out", start_from=base(seed=2))
    assert len(calls) == 6


@pytest.mark.parametrize("loss", ["simpo", "orpo", "sigmoid"])
def test_losses_without_a_reference_ask_none(go, monkeypatch, loss):
    monkeypatch.setattr(dpo, "of_conversations", None)
    # simpo and orpo have none to be free of, and refuse the flag
    out = go("out", f"--loss={loss}", *["--reference_free=1"] * (loss == "sigmoid"))
    assert not list(out.glob("reference_*")) and np.isfinite(curve(out)).all()


def damaged(file, name):
    values = np.load(file)
    if name == "truncated":
        file.write_bytes(file.read_bytes()[:-9])
    elif name == "gone":
        file.unlink()
    else:
        wrong = values.copy()
        wrong[5] = np.nan
        np.save(file, {"pickled": np.array([print], dtype=object), "nan": wrong,
                       "other type": values.astype(np.float64)}[name], allow_pickle=True)


def test_a_lost_cache_is_computed_from_where_the_run_began(go, tmp_path, capfd):
    """Not from the weights of the resumed run, which are no reference any more. Whatever the file
    holds instead is not believed, and no pickle is opened."""
    straight = go("straight")
    half = go("half", "--max_iters=3", "--lr_decay_iters=6")
    before = np.load(cache(half))
    for name in ("truncated", "pickled", "other type", "nan", "gone"):
        out = tmp_path / name
        shutil.copytree(half, out)
        damaged(cache(out), name)
        capfd.readouterr()
        go_on(out, "--max_iters=6")
        assert ("is damaged" in capfd.readouterr().err) == (name != "gone"), name
        assert np.array_equal(np.load(cache(out)), before), name
        assert_same_run(straight, out)


def test_a_resumed_run_that_has_lost_its_reference_says_so(go, base, tmp_path):
    """Without the file and without the folder, or with other weights in it, there is no going
    on; with the file there is; adapters have their base."""
    start = tmp_path / "start"
    shutil.copytree(base(), start)
    out = go("out", "--max_iters=3", start_from=start)
    thin = go("thin", "--max_iters=3", "--lora_rank=2", start_from=start)
    shutil.rmtree(start)
    shutil.copytree(base(seed=2), start)
    go_on(out, "--max_iters=4")
    cache(out).unlink()
    for _ in range(2):
        with pytest.raises(UserError, match="start is gone or has changed.*--reference=DIR"):
            go_on(out, "--max_iters=6")
        shutil.rmtree(start, ignore_errors=True)
    assert last(out).name == "step_000004"
    go_on(out, "--max_iters=6", f"--reference={base()}")
    shutil.copytree(base(), start)
    before = np.load(cache(thin))
    cache(thin).unlink()
    go_on(thin, "--max_iters=4")
    assert np.array_equal(np.load(cache(thin)), before)


def test_another_model_as_the_reference(go, base, words, taste):
    """--reference=DIR is asked instead, and a resumed run remembers what it said."""
    out = go("out", f"--reference={base('llama', 2)}", "--max_iters=3")
    model = checkpoint.load_model(base("llama", 2), "cpu")
    rendered = chats.render_pairs(words, chats.read_chats(taste / "train.jsonl", "preference"),
                                  None, 129)
    values = np.load(cache(out))
    for k in (0, 1, 77):
        assert values[k] == pytest.approx(alone(model, *rendered[k]).item(), abs=1e-4)
    assert abs(curve(out)[0] - np.log(2)) > 1e-3            # the policy is not the reference
    go_on(out, "--max_iters=6")
    assert np.array_equal(np.load(cache(out)), values)


def test_a_reference_with_another_tokenizer_is_refused(go, base, tmp_path):
    other = tokenizers.train(["it is what it is, and that is what is said: 1 + 1 = 2." * 30], 270,
                             workers=1)
    theirs = checkpoint.save_model(tmp_path / "theirs", Transformer(ModelConfig.from_family(
        "llama", n_layer=1, n_head=2, n_embd=32, block_size=128, vocab_size=270)), other)
    with pytest.raises(UserError, match="has another tokenizer"):
        go("out", f"--reference={theirs}")


def test_adapters_have_their_base_as_the_reference(go, base, monkeypatch):
    """The margin is 0 at the start, base and embeddings stay, and the merged model has the
    margins of the run."""
    out = go("out", "--lora_rank=2", "--max_iters=4")
    assert curve(out)[0] == pytest.approx(np.log(2), abs=1e-5)
    assert curve(out)[-1] < curve(out)[0]
    assert (last(out) / "adapter").is_dir()
    before, after = (checkpoint.load_model(p, "cpu") for p in (base(), last(out)))
    assert torch.equal(before.output_weight, after.output_weight)

# ------------------------------------------------------------------------- stopped and killed


def wait_for(condition):
    deadline = train.time.monotonic() + 60
    while not condition():
        assert train.time.monotonic() < deadline
        train.time.sleep(0.005)


def test_asked_to_stop_it_says_how_to_go_on(go, fork, tmp_path):
    """The command in the sentence is dpo.py's, and ends the run as if it had never stopped."""
    flags = ["--max_iters=20", "--eval_interval=20", "--dropout=0.1"]
    out = tmp_path / "out"
    asked = fork(*flags, f"--out_dir={out}")
    wait_for(lambda: (out / "log.jsonl").exists() and (
        out / "log.jsonl").read_text().count("\n") > 2)
    os.kill(asked.pid, signal.SIGTERM)
    status, stdout, stderr = asked.wait()
    assert status == 128 + signal.SIGTERM and stdout == "", stderr
    argv = re.search(r"go on with: python dpo.py (.*)\n\Z", stderr)[1].split()
    dpo.main(configure(dpo.Config, [*argv, "--device=cpu"]))
    assert_same_run(go("straight", *flags), out)


@pytest.mark.parametrize("moment", [
    r"os.rename .*reference_.*\.tmp", r"os.rename .*step_000002.*"], ids=["reference", "step"])
def test_killed_at_a_bad_moment_it_goes_on_to_the_same_weights(go, fork, tmp_path, moment):
    """While the reference is kept, and when there is a checkpoint to go on from."""
    flags, out = ["--max_iters=5", "--eval_interval=1"], tmp_path / "out"
    status, _, stderr = fork(*flags, f"--out_dir={out}", kill_at=(moment, 1)).wait()
    assert status == -signal.SIGKILL, stderr
    if (out / "checkpoints.json").exists():
        go_on(out)
    else:
        go("out", *flags)
    assert_same_run(go("straight", *flags), out)
    assert cache(out) and not list(out.glob("*.tmp"))

# ---------------------------------------------------------------------------- what it says


def test_it_learns_what_is_preferred_and_reports_it(go, capfd):
    """Accuracy on unseen pairs rises to 1; log and evaluation have rewards, margin and accuracy,
    which a second look at the checkpoint prints on stdout."""
    out = go("out", "--max_iters=20", "--eval_interval=10", "--learning_rate=1e-2")
    rows = log(out)
    for row in rows:
        prefix = "val_" if "val_loss" in row else ""
        assert row[f"{prefix}margin"] == pytest.approx(
            row[f"{prefix}rewards/chosen"] - row[f"{prefix}rewards/rejected"], abs=1e-5)
        assert 0 <= row[f"{prefix}accuracy"] <= 1
    assert rows[0]["margin"] == rows[0]["accuracy"] == 0    # the policy is the reference
    assert curve(out, "val_accuracy")[-1] > 0.95
    assert curve(out, "val_loss")[-1] < 0.2
    assert not curve(out, "val_ppl")        # which a preference has not
    said_so = capfd.readouterr()
    assert said_so.out == ""
    assert re.search(r"90 pairs \(0 without .* cut to 129 tokens\) in \d+ rows, [89]\d\.\d% full",
                     said_so.err)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*")}
    go_on(out, "--eval_only=1")
    told = dict(zip(*[iter(capfd.readouterr().out.split())] * 2))
    assert float(told["val_accuracy"]) == pytest.approx(curve(out, "val_accuracy")[-1], abs=1e-4)
    assert float(told["val_margin"]) == pytest.approx(curve(out, "val_margin")[-1], abs=1e-4)
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*")} == before


def test_validation_is_each_pair_by_itself(go, base, taste, words):
    """The numbers of the evaluation against a loop over conversations, float64."""
    out = go("out", "--max_iters=3", "--eval_iters=100")
    policy, reference = (checkpoint.load_model(p, "cpu") for p in (last(out), base()))
    rendered = chats.render_pairs(words, chats.read_chats(taste / "val.jsonl", "preference"), None,
                                  129)
    with torch.no_grad():
        r = 0.1 * torch.stack([alone(policy, *c) - alone(reference, *c) for c in rendered])
    margin = r[::2] - r[1::2]
    row = log(out)[-1]
    assert row["val_accuracy"] == pytest.approx((margin > 0).double().mean().item(), abs=1e-6)
    assert row["val_margin"] == pytest.approx(margin.mean().item(), abs=1e-5)
    assert row["val_rewards/chosen"] == pytest.approx(r[::2].mean().item(), abs=1e-5)
    assert row["val_loss"] == pytest.approx(
        -torch.sigmoid(margin).log().mean().item(), abs=1e-5)


def test_show_prints_what_is_trained_on_and_writes_nothing(go, tmp_path, capfd):
    out = go("out", "--show=2")
    stdout, stderr = capfd.readouterr()
    assert not out.exists() and "pairs" in stderr
    assert stdout.count("pair 0, chosen: ") == stdout.count("pair 0, rejected: ") == 2
    shown = re.findall("⟦(.*?)<\\|im_end\\|>⟧", stdout)
    assert len(shown) >= 4 and "hello, what is it?" not in shown    # an answer of the prompt
    assert any(s.startswith("it is") for s in shown) and "hello, what is it?" in stdout


def test_pairs_too_long_for_a_row_do_not_stop_it(go, tmp_path):
    """Cut, or skipped where nothing of an answer is left; the packer goes on."""
    path = tmp_path / "long.jsonl"
    q = "what " * 200
    records = [{"prompt": "hello", "chosen": "it is " * 200, "rejected": "1"},
               {"prompt": q, "chosen": "it is 1", "rejected": "1"},
               {"prompt": "hello", "chosen": "is " * 100, "rejected": "is " * 101}] * 10
    path.write_text("".join(json.dumps(r) + "\n" for r in records + pairs(30, 2)))
    out = go("out", f"--dataset={path}")
    assert np.isfinite(curve(out) + curve(out, "val_loss")).all() and min(curve(out)) > 0


def test_a_batch_without_a_pair_changes_nothing(go, monkeypatch):
    gather = dpo.Pairs.__call__

    def masked(self, step):
        batch = gather(self, step)
        batch["targets"].fill_(-100) if step == 3 else None
        return batch
    monkeypatch.setattr(dpo.Pairs, "__call__", masked)
    for loss in ("sigmoid", "orpo", "kto"):
        out = go(loss, f"--loss={loss}")
        assert curve(out)[3] == 0.0 and np.isfinite(curve(out) + curve(out, "val_loss")).all()
        assert curve(out, "skipped")[-1] == 0


@pytest.mark.parametrize("flags, says", [
    ("--init_from={tmp}/none", "no checkpoint at .*none"),
    ("--reference={tmp}/none", "no checkpoint at .*none"),
    ("--loss=ppo", "unknown loss 'ppo'; choose from sigmoid, hinge"),
    ("--beta=0", "beta must be positive, got 0.0"),
    ("--label_smoothing=0.5", "below 0.5"),
    ("--loss=ipo --label_smoothing=0.1", "only sigmoid, robust, simpo know it"),
    ("--loss=orpo --reference=x", "of no use to orpo"),
    ("--reference_free=1 --reference=x", "of no use to --reference_free"),
    ("--eval_only=1", "against itself says nothing: .*--init_from=resume"),
    ("--dataset={tmp}/chats.jsonl", "chats.jsonl, line 1: .*chosen is not there"),
    ("--block_size=8", "no pair with an answer within 9 tokens"),
])
def test_a_mistake_is_one_sentence(go, tmp_path, flags, says):
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": said(U, "1", A, "2")}) + "\n")
    with pytest.raises(UserError, match=says) as found:
        go("out", *flags.format(tmp=tmp_path).split())
    assert "\n" not in str(found.value)
    assert not (tmp_path / "out" / "checkpoints.json").exists()


def test_a_mistake_ends_the_program_with_status_2(fork, tmp_path):
    found = complaint(fork("--loss=ppo", f"--out_dir={tmp_path / 'out'}").wait())
    assert found.endswith("kto") and not (tmp_path / "out").exists()


def test_the_shipped_config_resolves():
    path = ROOT / "config" / "dpo_skills.py"
    cfg = configure(dpo.Config, [str(path)])
    dpo.check(train.replace(cfg, block_size=256))
    assert (cfg.dataset, cfg.init_from, cfg.out_dir) == ("skills", "out/sft",
                                                         "out/dpo")
    assert "python dpo.py config/dpo_skills.py" in path.read_text()
