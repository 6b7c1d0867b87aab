"""Wrong command lines of lora.py and of runs with adapters: one sentence, status 2, no harm."""
import json
import re
import runpy
import shutil
import sys

import pytest

from formats import peft
from conftest import ROOT
# the fixtures of the stages' tests: a model, conversations, and a server that forks runs
from runs import complaint
from test_sft import base, fork, forks, go, talk, words       # noqa: F401


@pytest.mark.parametrize("flags, says", [
    ("--lora_rank=-1", "lora_rank is -1.*must be at least 0"),
    ("--lora_rank=2 --lora_alpha=-1", "lora_alpha is -1.*must be at least 0"),
    ("--lora_rank=2 --lora_dropout=1", "lora_dropout is 1.*must be below 1"),
    ("--lora_rank=2 --targets=q_porj", "q_porj.*names no linear layer.*q_proj"),
    ("--lora_rank=2 --init_from={tmp}/none", "no checkpoint at .*none"),
    ("--lora_rank=2 --dataset={tmp}/none.jsonl", "none.jsonl is not prepared")])
def test_a_mistake_with_adapters_is_one_sentence(fork, tmp_path, flags, says):      # noqa: F811
    run = fork(*flags.format(tmp=tmp_path).split(), f"--out_dir={tmp_path / 'out'}")
    assert re.search(says, complaint(run.wait()))
    assert not (tmp_path / "out").exists(), "told before anything is written"


def test_a_run_that_lost_its_base_or_its_adapter_says_so(go, fork):                # noqa: F811
    """Moved or half-copied: what is left of the run stays as it is."""
    run = go("run", "--lora_rank=2", "--max_iters=1")
    folder = next(run.glob("step_*/adapter"))
    flags = ["--init_from=resume", f"--out_dir={run}", "--max_iters=2", "--device=cpu"]
    config = json.loads((folder / peft.CONFIG).read_text())
    (folder / peft.CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": "gone"}))
    (folder / peft.BASE).unlink()
    weights = {p: p.read_bytes() for p in run.glob("step_*/*") if p.is_file()}
    assert "gone" in complaint(fork(*flags, bare=True).wait())
    shutil.rmtree(folder)
    assert "adapter" in complaint(fork(*flags, bare=True).wait())
    assert {p: p.read_bytes() for p in run.glob("step_*/*") if p.is_file()} == weights


@pytest.mark.parametrize("argv, says", [
    ("--lora_rank=two", "lora_rank is int, and 'two' is not"),
    ("--lora_rank=0.5", "lora_rank is int, and '0.5' is not"),
    ("--dora=maybe", "dora is bool, and 'maybe' is not"),
    ("--lora_rnak=2", "no setting 'lora_rnak'; did you mean lora_rank"),
    ("--lora_rank --dora", "--lora_rank needs a value"), ("none.py", "config file 'none.py'"),
    ("merge", "merge needs two folders"), ("merge a b c", "merge needs two folders"),
    ("merge {tmp}/none {tmp}/out", "none.*adapter_config.json"),
    ("merge {tmp}/none {tmp}/out --bse=x", "did you mean base")])
def test_a_mistake_of_the_script_is_one_sentence(monkeypatch, capsys, tmp_path, argv, says):
    """lora.py as its own script, whose settings and whose word `merge` exist only there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lora.py", *argv.format(tmp=tmp_path).split()])
    with pytest.raises(SystemExit) as e:
        runpy.run_path(str(ROOT / "lora.py"), run_name="__main__")
    out, err = capsys.readouterr()
    assert re.search(says, complaint((e.value.code, out, err)))
    assert not list(tmp_path.iterdir())
