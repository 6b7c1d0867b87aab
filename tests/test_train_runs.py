"""What a run of train.py writes and learns, on which device, and what it says of mistakes.
"""
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint
import train
from config import configure
from data import shards
from model import ModelConfig
from training.machine import utilisation
from training.optim import Optimizer
from runs import (assert_same_run, close, complaint, curve, last, log,
                  quiet_machine, same, trainer, weights)
from train_base import forks    # noqa: F401
from train_base import ROOT, TINY, data, fork, go, go_on, poison     # noqa: F401
assert quiet_machine                # a fixture that every test here uses by itself


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
    ("--backend=cudnn", "unknown --backend=cudnn; choose from auto"),
    ("--schedule=step", "cosine, linear, constant, wsd"),
    ("--optimizer=sgd", "choose from adamw, muon"),
    ("--family=bert", "choose from gpt2, llama, "),
    ("--activation=tanh", "unknown activation 'tanh'; choose from"),
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
