"""What differs where the scripts run: Windows, as tests/windows.py plays it, and stdout."""
import dataclasses
import errno
import io
import json
import os
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import sft
import checkpoint
import config
import train
from conftest import ROOT
from training.machine import Machine

TEXT = "".join(f"line {k} of a tëxt to train on, 你好; user, assistant, <|im|>\n"
               for k in range(200))


def test_prepare_train_resume_convert_and_sample_run_on_windows(tmp_path):
    """Every file is opened in UTF-8, or the ascii of this locale would refuse the text."""
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    chats = [{"messages": [{"role": "user", "content": "tëxt"}, {"role": "assistant",
                                                                "content": "你好"}]}] * 30
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps(c, ensure_ascii=False)
                                                    for c in chats), encoding="utf-8")
    (tmp_path / "prompt.txt").write_text("你好", encoding="utf-8")
    data, out, tuned = tmp_path / "data", tmp_path / "out", tmp_path / "lora"
    tiny = ("--batch_size=2 --eval_interval=1 --eval_iters=1 --keep=1 --device=cpu "
            "--sample_interval=1")
    commands = [
        f"data/prepare.py {tmp_path / 'text.txt'} --out={data} --tokenizer=char --workers=1",
        f"train.py --dataset={data} --out_dir={out} --n_layer=1 --n_head=1 --n_embd=16 "
        f"--block_size=64 --max_iters=2 --gradient_accumulation_steps=1 {tiny}",
        f"train.py --init_from=resume --out_dir={out} --max_iters=3",
        f"checkpoint.py convert {out} {tmp_path / 'm'}",
        f"checkpoint.py convert {out} {tmp_path / 'm'} --dtype=bfloat16",      # in its place
        f"lora.py --init_from={out} --dataset={tmp_path / 'chats.jsonl'} --out_dir={tuned} "
        f"--lora_rank=2 --max_iters=2 {tiny}",
        f"sample.py --model={tmp_path / 'm'} --file={tmp_path / 'prompt.txt'} --device=cpu "
        "--max_new_tokens=60",
        f"sample.py --adapter={tuned} --chat --prompt=line --max_new_tokens=3 --device=cpu"]
    words = " --then ".join(commands).split(" ")
    env = {**os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0",
           "PYTHONIOENCODING": "cp1252"}
    done = subprocess.run([sys.executable, "tests/windows.py", *words], cwd=ROOT, env=env,
                          capture_output=True)
    err = done.stderr.decode("cp1252")
    assert done.returncode == 0 and "Traceback" not in err, err[-2000:]
    assert (out / "step_000003").is_dir() and (tuned / "step_000002" / "adapter").is_dir()
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert {r["memory"] for r in rows if "loss" in r} == {None}
    # what cp1252 lacks is a question mark; what it has is there
    said = done.stdout.decode("cp1252")
    assert "\n??" in said and "ë" in said


@pytest.mark.parametrize("mode", [0o644, 0o444], ids=oct)
def test_sync_opens_files_as_windows_wants_them(tmp_path, monkeypatch, mode):
    """Writable where the file is; what a read-only copy cannot do is no error, a disk's is."""
    file, synced, real = tmp_path / "a", [], os.open
    file.write_text("a")
    file.chmod(mode)

    def opened(path, flags, *args):
        if Path(path).is_dir():
            raise PermissionError(errno.EACCES, "Permission denied")
        synced.append(flags & os.O_ACCMODE)
        return real(path, flags, *args)
    monkeypatch.setattr(os, "open", opened)
    # root may write anything: what the mode says is asked of os.access alone
    monkeypatch.setattr(os, "access", lambda path, how: bool(mode & 0o200))
    checkpoint.sync(file)
    checkpoint.sync(tmp_path)
    assert synced == [os.O_RDWR if mode & 0o200 else os.O_RDONLY]

    def broken(handle):
        raise OSError(errno.EIO if mode & 0o200 else errno.EBADF, "broken")
    monkeypatch.setattr(os, "fsync", broken)
    if mode & 0o200:
        with pytest.raises(OSError, match="broken"):
            checkpoint.sync(file)
    else:
        checkpoint.sync(file)
    with pytest.raises(FileNotFoundError):
        checkpoint.sync(tmp_path / "none")

# ------------------------------------------------------------------------------ --help of a file

HELP = """
import contextlib, io, json, runpy, sys
answers = {}
for file in sys.argv[1:]:
    sys.argv = [file, "--help"]
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_path(file, run_name="__main__")
        except SystemExit as e:
            status = e.code or 0
    answers[file] = status, out.getvalue(), err.getvalue()
print(json.dumps(answers))
"""


def test_help_of_every_file():
    """Usage and status 0 of what a user may run; one sentence and status 2 of what is imported."""
    files = [
        str(f)
        for folder in (".", "data", "benchmarks")
        for f in sorted((ROOT / folder).glob("*.py"))
    ]
    done = subprocess.run([sys.executable, "-c", HELP, *files], cwd=ROOT, capture_output=True,
                          text=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr[-900:]
    scripts = set()
    for file, (status, out, err) in json.loads(done.stdout.splitlines()[-1]).items():
        if status == 0:
            assert "usage: python" in out and err == "", file
            scripts.add(Path(file).stem)
        else:
            assert (status, out, err.count("\n")) == (2, "", 1) and Path(file).name in err, file
    assert {"train", "sample", "eval", "sft", "lora", "dpo", "distill", "tokenizer", "checkpoint",
            "model", "bench", "prepare", "lifecycle"} <= scripts

# ------------------------------------------------------------------------ packages of loggers


@pytest.mark.parametrize("flag, package", [("wandb_log", "wandb"), ("tensorboard", "tensorboard")])
@pytest.mark.parametrize("leftover", [False, True], ids=["missing", "a folder of that name"])
def test_a_logger_that_is_not_installed_is_told_before_training(
        tmp_path, monkeypatch, flag, package, leftover):
    """Also beside a folder ./wandb that a run left: Python imports it as an empty package."""
    if leftover:
        (tmp_path / package / "run-1").mkdir(parents=True)
        monkeypatch.syspath_prepend(tmp_path)
        # the real one, where a tester has it, would win over the folder
        monkeypatch.setattr(sys, "path", [str(tmp_path)])
    else:
        monkeypatch.setitem(sys.modules, package, None)
    for name in [n for n in sys.modules if n.split(".")[0] == package and leftover]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    for settings in (train.Config(**{flag: True}), sft.Config(**{flag: True})):
        with pytest.raises(config.UserError, match=f"--{flag} needs the package {package}"):
            train.check(dataclasses.replace(settings, max_iters=1, block_size=8))


def test_a_logger_that_is_there_is_used(tmp_path, monkeypatch):
    rows, started = [], []
    wandb = types.SimpleNamespace(init=lambda **how: started.append(how),
                                  log=lambda row, step: rows.append((step, row["loss"])))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    cfg = train.Config(wandb_log=True, wandb_run_name="x", out_dir=str(tmp_path))
    journal = train.Journal(cfg, Machine(torch.device("cpu"), torch.float32), train.State())
    journal.record(step=3, loss=0.5)
    assert (
        rows == [(3, 0.5)] and started[0]["name"] == "x" and started[0]["config"]["n_layer"] == 12
    )


# ------------------------------------------------------------------------------------- stdout


@dataclass
class Nothing:
    """No settings."""


ODD = "é 你 \ufffd ⏎ \ud800 é\n"


@pytest.mark.parametrize("errors", ["strict", "surrogateescape", "replace"])
@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "latin-1", "utf-8", "cp437", "shift_jis"])
def test_what_stdout_cannot_encode_is_a_question_mark(monkeypatch, encoding, errors):
    """Python's own "replace" is the oracle, whatever the stream was opened with."""
    raw = io.BytesIO()
    monkeypatch.delenv("PYTHONIOENCODING", raising=False)
    monkeypatch.setattr(sys, "argv", ["x.py"])
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding, errors, newline=""))
    config.run(lambda cfg: print(ODD, end=""), Nothing)
    assert raw.getvalue() == ODD.encode(encoding, "replace")


def test_what_pythonioencoding_asks_for_is_kept(monkeypatch, capsys):
    """Its error handling too: strict is then one sentence, status 2."""
    for named, printed in (("ascii:backslashreplace", rb"\u4f60"), ("ascii:strict", b"a"),
                           ("cp1252", b"?")):
        raw = io.BytesIO()
        encoding, _, errors = named.partition(":")
        monkeypatch.setenv("PYTHONIOENCODING", named)
        monkeypatch.setattr(sys, "argv", ["x.py"])
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding, errors or "strict"))
        text = "a你" if errors == "strict" else "你"
        if errors == "strict":
            with pytest.raises(SystemExit) as e:
                config.run(lambda cfg: [print(c, end="") for c in text], Nothing)
            assert e.value.code == 2
            assert r"ascii has no '\u4f60'" in capsys.readouterr().err
            sys.stdout.flush()
        else:
            config.run(lambda cfg: print(text, end=""), Nothing)
        assert raw.getvalue() == printed


def test_a_stream_that_is_no_file_is_left_alone(monkeypatch):
    """A notebook's, or a test's."""
    monkeypatch.setattr(sys, "argv", ["x.py"])
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    config.run(lambda cfg: print(ODD, end=""), Nothing)
    assert sys.stdout.getvalue() == ODD


@pytest.mark.parametrize("closed", [["stdout"], ["stderr"], ["stdout", "stderr"]], ids="+".join)
def test_a_program_without_a_console_runs(monkeypatch, closed):
    """pythonw has no stdout, nor has a shell's `>&-`: Python's stream is then None."""
    monkeypatch.setattr(sys, "argv", ["x.py"])
    for name in closed:
        monkeypatch.setattr(sys, name, None)
    done = []
    config.run(lambda cfg: (print("x"), print("x", file=sys.stderr), done.append(1)), Nothing)
    assert done == [1]


@pytest.mark.parametrize("word", [b"--prompt=caf\xe9", b"\xff.txt", b"--model=\xf0\x9f\x90"])
def test_bytes_that_are_no_text_are_refused(word, capfd):
    """A Latin-1 shell's é, half of a 🐈: os.fsdecode is what Python makes of an argument."""
    import os
    with pytest.raises(config.UserError, match="is not text in this terminal's encoding"):
        config.configure(train.Config, [os.fsdecode(word)])
