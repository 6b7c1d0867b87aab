"""What may befall a run: stops at every step, a second run in its folder, ranks that are lost, a
damaged log or trainer's state, weights that are not finite."""
import json
import math
import os
import re
import signal
import subprocess
import sys

import pytest
import torch

import sft
import checkpoint
import train
from config import Stopped, UserError, configure
from data import loader
from formats import atomic
from runs import assert_same_run, complaint, last, log, quiet_machine, ranks, same, trainer, weights
from train_base import ROOT, TINY, data, fork, forks, go, go_on    # noqa: F401
from training import faults

assert quiet_machine


@pytest.fixture
def stop_at(monkeypatch):
    """stop_at(step): a SIGTERM comes while that step is under way; 0: never again."""
    real, when = loader.Batches.__call__, [0]

    def batch_of(self, step):
        if step + 1 == when[0]:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, step)
    monkeypatch.setattr(loader.Batches, "__call__", batch_of)
    return lambda step: when.__setitem__(0, step)


@pytest.mark.parametrize("always", [1, 0])
def test_a_stop_at_any_step_is_made_up_for(go, stop_at, data, tmp_path, always):        # noqa: F811
    """Where an evaluation is due (2, 4, 6) and where not: weights, log, and best checkpoint."""
    flags = ["--max_iters=6", "--eval_interval=2", "--eval_iters=1", "--keep=9",
             f"--always_save_checkpoint={always}", "--learning_rate=0.3"]   # best is not the last
    straight = go("straight", *flags)
    note = json.loads((straight / "checkpoints.json").read_text())
    assert note["complete"] is True
    for step in range(1, 7):
        stop_at(step)
        with pytest.raises(Stopped) as e:
            go(f"stopped{step}", *flags)
        out = tmp_path / f"stopped{step}"
        assert e.value.status == 128 + signal.SIGTERM and last(out).name == f"step_{step:06d}"
        assert json.loads((out / "checkpoints.json").read_text())["complete"] is False
        stop_at(0)
        go_on(out)
        assert_same_run(straight, out)
        assert json.loads((out / "checkpoints.json").read_text()) == note
        assert same(weights(last(straight, "best")), weights(last(out, "best")))
        assert same(trainer(last(straight, "best"))["state"]["best"],
                    trainer(last(out, "best"))["state"]["best"])


def test_what_was_logged_and_not_saved_is_logged_once(go, stop_at, tmp_path):        # noqa: F811
    """Killed between the evaluation that was made up and the checkpoint that says so."""
    flags = ["--max_iters=4", "--eval_interval=2", "--eval_iters=1"]
    straight, out = go("straight", *flags), tmp_path / "killed"
    stop_at(2)
    with pytest.raises(Stopped):
        go("killed", *flags)
    stop_at(0)
    with (out / "log.jsonl").open("a") as f:
        f.write(json.dumps({"step": 2, "val_loss": 9.0}) + "\n")
    go_on(out)
    assert log(straight) == log(out)


def test_what_is_ignored_stays_ignored():
    """nohup: the terminal may go, the run may not."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with faults.Stop() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.asked and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_first_ctrl_c_asks_and_the_second_insists():
    with pytest.raises(KeyboardInterrupt), faults.Stop() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)


def test_a_second_run_in_the_folder_is_refused(go, fork, tmp_path):                 # noqa: F811
    """Scratch or resume; the folder stays as the first one has it, and is free after its end."""
    out = go("out", "--max_iters=2")
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    atomic.hold(out, "")
    try:
        for more in ([], ["--init_from=resume"]):
            sentence = complaint(fork(f"--out_dir={out}", *more).wait())
            assert "another run trains in" in sentence and "--out_dir" in sentence
        assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
        assert not list(tmp_path.glob("out.old*"))
        go_on(out, "--eval_only=1")                     # looking is allowed
    finally:
        atomic.release(out)
    assert fork(f"--out_dir={out}", "--init_from=resume", "--max_iters=3").wait()[0] == 0


def test_a_killed_run_leaves_no_lock(fork, tmp_path):                                # noqa: F811
    out = tmp_path / "out"
    killed = fork(f"--out_dir={out}", "--max_iters=9999", kill_at=("write .*trainer.pt", 1))
    assert killed.wait()[0] == -signal.SIGKILL
    assert fork(f"--out_dir={out}", "--max_iters=1").wait()[0] == 0
    assert not [p for p in out.parent.iterdir() if p.name.endswith(".lock")]


def test_a_rank_that_is_lost_is_one_sentence_of_the_others(fork, tmp_path):          # noqa: F811
    out = tmp_path / "out"
    started = ranks(fork, 2, f"--out_dir={out}", "--max_iters=99999", "--eval_interval=2",
                    "--eval_iters=1")
    while not (out / "checkpoints.json").exists():
        train.time.sleep(0.01)
    os.kill(started[1].pid, signal.SIGKILL)
    sentence = complaint(started[0].wait())
    assert "another rank" in sentence and f"--init_from=resume --out_dir={out}" in sentence
    assert started[1].wait()[0] == -signal.SIGKILL


def test_a_mistake_of_ours_is_no_lost_rank():
    machine = type("Machine", (), {"world": 2})
    with pytest.raises(RuntimeError, match="shapes"), faults.together(None, machine):
        raise RuntimeError("shapes cannot be multiplied")


@pytest.mark.parametrize("damage", [
    lambda b: b[:30] + b"\xff" + b[31:], lambda b: b.replace(b'"step": 2', b'"step" 2'),
    lambda b: b + b'{"step": 4, "loss', lambda b: b"[1]\n" + b, lambda b: b"[" * 9999 + b"\n" + b,
    lambda b: b'{"step": null}\n' + b, lambda b: b'{"step": Infinity}\n' + b, lambda b: b"",
    lambda b: os.urandom(999) + b"\n" + b], ids=range(9))
def test_a_damaged_log_loses_the_damaged_lines_alone(tmp_path, damage):
    rows = b"".join(json.dumps({"step": n, "loss": n / 7}).encode() + b"\n" for n in range(1, 6))
    path = tmp_path / "log.jsonl"
    path.write_bytes(damage(rows))
    kept = faults.read_log(path, train.State(step=4))
    whole = [line for line in rows.decode().splitlines(True)[:4]]
    assert set(kept) <= set(whole) and len(kept) >= min(3, damage(rows).count(b'"loss": 0.'))


@pytest.mark.parametrize("change", [
    lambda s: s.pop("optimizer"), lambda s: s.pop("state"), lambda s: s["state"].update(more=1),
    lambda s: s.update(optimizer={}), lambda s: s.update(optimizer=[]), lambda s: s.update(state=3),
    lambda s: s["state"].update(best="low"), lambda s: s["settings"].update(batch_size="x"),
    lambda s: s["settings"].update(learning_rate=math.nan)], ids=range(9))
def test_a_state_of_another_kind_is_one_sentence(go, change, tmp_path, request):     # noqa: F811
    if not hasattr(request.config, "short_run"):
        request.config.short_run = go("short", "--max_iters=2")
    out = tmp_path / "copy"
    train.shutil.copytree(request.config.short_run, out)
    saved = trainer(last(out))
    change(saved)
    torch.save(saved, last(out) / "trainer.pt")
    with pytest.raises(UserError, match=r"trainer\.pt") as e:
        go_on(out, "--max_iters=4")
    assert len(str(e.value)) < 800


def test_weights_that_are_not_finite_are_not_saved(go, monkeypatch, tmp_path):       # noqa: F811
    """The last good checkpoint stays the last, whatever the loss of that step was."""
    real = train.take_step

    def broken(cfg, model, batch, loss, machine, optimizer, state, asked):
        done = real(cfg, model, batch, loss, machine, optimizer, state, asked)
        if state.step == 4:
            next(model.parameters()).data[0, 0] = math.nan
        return done
    monkeypatch.setattr(train, "take_step", broken)
    with pytest.raises(UserError, match="step 4 made weights that are not finite"):
        go("out", "--eval_interval=2", "--eval_iters=1")
    out = tmp_path / "out"
    assert last(out).name == last(out, "best").name == "step_000002"
    assert all(t.isfinite().all() for t in weights(last(out)).values())


def test_a_validation_loss_of_nan_is_never_the_best(go, monkeypatch):                # noqa: F811
    values = iter([5.0, math.nan, 4.0, 4.5])
    monkeypatch.setattr(train, "evaluate", lambda *_: {"val_loss": next(values)})
    out = go("out", "--max_iters=8", "--eval_interval=2", "--keep=9")
    assert last(out, "best").name == "step_000006"
    assert trainer(last(out))["state"]["best"] == 4.0


def test_a_mixture_without_a_layer_of_experts_trains(go):                            # noqa: F811
    """GLM-4.5's first layer is dense; with one layer there is no router to balance."""
    out = go("out", "--family=glm4_moe", "--n_layer=1", "--num_experts=4", "--max_iters=2",
             "--num_experts_per_tok=2")
    assert "balance" not in log(out)[0] and math.isfinite(log(out)[0]["loss"])


def test_two_writers_of_one_checkpoint_are_told_apart(go, tmp_path):                 # noqa: F811
    """Two `checkpoint.py convert` to one folder: the second is refused, the first comes through;
    what a killed one left is removed."""
    source, target = go("out", "--max_iters=1"), tmp_path / "copy"
    (tmp_path / ".copy.new").mkdir()
    (tmp_path / ".copy.new" / "half.safetensors").touch()       # of one that was killed
    held = atomic.try_lock(tmp_path / ".copy.new")
    with pytest.raises(UserError, match="another process writes"):
        checkpoint.convert(str(source), str(target))
    assert (tmp_path / ".copy.new" / "half.safetensors").exists()
    held.release()
    checkpoint.convert(str(source), str(target))
    assert same(weights(target), weights(last(source)))
    assert not (target / "half.safetensors").exists() and not (tmp_path / ".copy.new").exists()


def test_a_stage_before_the_demo_names_the_command_that_makes_its_base(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file, command in (("sft_skills", "train.py config/demo.py"),
                          ("dpo_skills", "sft.py config/sft_skills.py")):
        text = (ROOT / "config" / f"{file}.py").read_text(encoding="utf-8")
        source = re.search('^init_from = "(.*)"', text, re.M)[1]
        cfg = configure(sft.Config, [f"--init_from={source}"])
        with pytest.raises(UserError, match=f"make one with `python {command}`"):
            sft.start_from(cfg)


# ---------------------------------------------------------------------------- before run()


HIDE = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            raise ModuleNotFoundError("No module named " + name, name=name)
sys.meta_path.insert(0, Hide())
"""


@pytest.mark.parametrize("name, script", [
    ("numpy", "tokenizer.py"), ("tiktoken", "tokenizer.py"), ("requests", "data/prepare.py"),
    ("torch", "train.py")])
def test_a_missing_package_is_one_sentence(tmp_path, name, script):
    (tmp_path / "sitecustomize.py").write_text(HIDE.format(name=name))
    done = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True,
                          text=True, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert f"the package {name} is missing" in complaint(
        (done.returncode, done.stdout, done.stderr))


def test_ctrl_c_while_importing_is_one_sentence(tmp_path):
    (tmp_path / "numpy.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n"
                                       "import time\ntime.sleep(9)\n")
    done = subprocess.run([sys.executable, "tokenizer.py", "--help"], cwd=ROOT, text=True,
                          capture_output=True, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "error: interrupted\n")


def test_make_works_under_a_path_with_a_space(tmp_path):
    """No target has the path in its name, and every command that uses it has quotes."""
    venv = tmp_path / "my venv"
    # what the make that runs these tests was told is not for this one
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    done = subprocess.run(["make", "-n", "demo", f"VIRTUAL_ENV={venv}"], cwd=ROOT, text=True,
                          capture_output=True, env=env)
    assert done.returncode == 0 and done.stderr == ""
    assert len(re.findall(f'"{venv}', done.stdout)) == done.stdout.count(str(venv)) >= 6
