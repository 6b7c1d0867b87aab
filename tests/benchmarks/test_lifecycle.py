"""lifecycle.py: who is told to stop tells the stages, which save; what was stopped goes on."""
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from benchmarks import lifecycle
from test_prepare import ROOT

# a stage that notes each signal and, once it is told, ends as train.fit does
STAGE = """
import json, pathlib, signal, sys, time
name, notes = sys.argv[1], pathlib.Path(sys.argv[2])
def ask(number, frame):
    with notes.open("a") as f:
        f.write(f"{name} signal {int(number)}\\n")
    time.sleep(0.3)                                 # to save takes a while
    sys.exit(128 + number)
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, ask)
with notes.open("a") as f:
    f.write(f"{name} begins\\n")
time.sleep(60)
"""
LIFE = """
import pathlib, signal, sys
sys.path.insert(0, {root!r})
signal.signal(signal.SIGINT, signal.default_int_handler)
import types
for name in ("checkpoint", "training.machine", "formats.run_folder"):       # PyTorch is not needed
    sys.modules[name] = types.SimpleNamespace(load_model=None, resolve=None, pick_device=None)
import config
from benchmarks import lifecycle
lifecycle.ROOT = pathlib.Path({tmp!r})
lifecycle.STAGES = {{"data": ("", "stage.py data notes"), "skills": ("", "stage.py skills notes")}}
sys.argv = ["lifecycle.py"]
config.run(lifecycle.main, lifecycle.Config)
"""


@pytest.fixture
def life(tmp_path):
    """A lifecycle of two stages in a session of its own, and the notes that its stages take."""
    (tmp_path / "stage.py").write_text(STAGE)
    code = LIFE.format(root=str(ROOT), tmp=str(tmp_path))
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    notes = tmp_path / "notes"
    deadline = time.monotonic() + 60
    while not notes.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    yield process, notes
    process.kill()
    process.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("to", ["the process", "its group"])
def test_a_signal_reaches_the_stage_once_and_nothing_else_begins(life, number, to):
    """A terminal sends Ctrl-C to the whole group, a scheduler SIGTERM to one process."""
    process, notes = life
    (os.kill if to == "the process" else os.killpg)(process.pid, number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number and out == "" and "Traceback" not in err
    assert notes.read_text() == f"data begins\ndata signal {int(number)}\n"
    assert err.endswith("stopped; go on with: python benchmarks/lifecycle.py --first=data\n")


def test_a_stage_that_was_told_to_stop_is_not_taken_for_complete(life):
    process, notes = life
    children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], text=True,
                              capture_output=True).stdout.split()
    os.kill(int(children[0]), signal.SIGTERM)
    err = process.communicate(timeout=30)[1]
    assert process.returncode == 128 + signal.SIGTERM
    assert notes.read_text() == "data begins\ndata signal 15\n"
    assert err.endswith("stopped; go on with: python benchmarks/lifecycle.py --first=data\n")


@pytest.mark.parametrize("note, resumes", [
    ({"last": "step_1", "complete": False}, True), ({"last": "step_1", "complete": True}, False),
    ({"last": "step_1"}, False),                    # by an older version: nobody knows
    (None, False), ([], False), ("no JSON", False)])
def test_what_was_stopped_is_resumed_and_the_rest_begins_anew(tmp_path, monkeypatch, note, resumes):
    (tmp_path / "out" / "sft").mkdir(parents=True)
    if note is not None:
        text = note if isinstance(note, str) else json.dumps(note)
        (tmp_path / "out" / "sft" / "checkpoints.json").write_text(text)
    (tmp_path / "out" / "sft" / "log.jsonl").write_text('{"step": 1, "val_loss": 2.0}\n')
    asked = []

    def command(line, threads=0):
        asked.append(line)
        return 1.0, "accuracy 0.5"
    monkeypatch.setattr(lifecycle, "ROOT", tmp_path)
    monkeypatch.setattr(lifecycle, "command", command)
    monkeypatch.setattr(lifecycle, "parameters", lambda folder: 9)
    line = "sft.py config/x.py --out_dir=out/sft"
    lifecycle.model_of(lifecycle.Config(device="cpu"), "SFT", line)
    resumed = "sft.py --init_from=resume --out_dir=out/sft --device=cpu"
    assert (asked[0] == resumed) == resumes and "eval.py" in asked[1]
