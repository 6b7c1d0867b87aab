"""Checkpoints against transformers and the safetensors library, and against every kind of harm."""
import errno
import json
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import safetensors.torch
import numpy as np
import torch
import transformers

import checkpoint
from checkpoint import (load_model, load_tokenizer, load_trainer, read_config, resolve,
                        save_checkpoint, save_model)
from config import UserError
from conftest import ROOT
from formats import run_folder
from formats.safetensors import read_header
from formats.huggingface import family_of, hf_config, model_config_from_hf
from model import ModelConfig, Transformer
from families import SCRATCH
from checkpoint_base import MODELS, SHAPE, TINY, V, WTE, build, saved     # noqa: F401

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


def some_ids(rows=2, length=40) -> torch.Tensor:
    return torch.randint(0, V, (rows, length), generator=torch.Generator().manual_seed(1))


def error(a, b) -> float:
    """Relative L2."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def hf_logits(path):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(info.values()), info                 # nothing missing, nothing left over
    with torch.no_grad():
        return model, model.eval()(some_ids()).logits

# ---------------------------------------------------------------------- oracle: transformers


# every other one in shards of 20 kB
@pytest.mark.parametrize("name, shard_bytes", [(name, 20_000 if i % 2 else 10 ** 9)
                                               for i, name in enumerate(MODELS)])
def test_ours_in_transformers_and_back_has_the_same_logits(name, shard_bytes, tmp_path):
    ours = build(name)
    save_model(tmp_path / "ours", ours, shard_bytes=shard_bytes)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1 or shard_bytes == 10 ** 9
    expected = ours.logits(some_ids())
    again = load_model(tmp_path / "ours", "cpu")
    assert again.config == ours.config and not again.training
    assert torch.equal(again.logits(some_ids()), expected)

    theirs, logits = hf_logits(tmp_path / "ours")
    assert theirs.config.model_type == MODELS[name][1]
    assert error(logits, expected) <= 1e-5

    # what transformers writes of it, with and without our section, reads as the same model
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=shard_bytes)
    back = load_model(tmp_path / "theirs", "cpu")
    assert back.config == ours.config and torch.equal(back.logits(some_ids()), expected)
    file = tmp_path / "theirs" / "config.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items()
                                if k != "handmade"}))
    assert error(load_model(tmp_path / "theirs", "cpu").logits(some_ids()), expected) <= 1e-5


CLASSES = {
    "gpt2": ("GPT2", dict(n_positions=64, n_embd=32, n_layer=2, n_head=4)),
    "llama": ("Llama", dict(attention_bias=True, mlp_bias=True, head_dim=16)),
    "qwen2": ("Qwen2", {}), "qwen3": ("Qwen3", dict(head_dim=16, attention_bias=True)),
    "arcee": ("Arcee", {}), "mistral": ("Mistral", dict(sliding_window=None)),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", CLASSES)
def test_a_checkpoint_born_in_transformers_loads_here(kind, dtype, tmp_path):
    """None of our own hints in the directory, and all weights random."""
    name, settings = CLASSES[kind]
    common = {} if kind == "gpt2" else dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64)
    config = getattr(transformers, f"{name}Config")(vocab_size=V, bos_token_id=0, eos_token_id=0,
                                                   **common, **settings)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    for p in theirs.parameters():
        p.data.normal_(0, 0.3)
    theirs = theirs.to(getattr(torch, dtype))
    theirs.save_pretrained(tmp_path / "m", max_shard_size=15_000)
    ours = load_model(tmp_path / "m", "cpu")
    assert ours.output_weight.dtype == getattr(torch, dtype)
    # in float32, so that only the weights are compared and not two ways of rounding (.to() above
    # has rounded transformers' rotary frequencies, too: it has to load the file again)
    ours = load_model(tmp_path / "m", "cpu", "float32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m",
                                                               dtype=torch.float32)
    with torch.no_grad():
        expected = theirs.eval()(some_ids()).logits
    assert error(ours.logits(some_ids()), expected) <= 1e-5


def test_gpt2_files_without_prefix_with_old_buffers_and_old_keys(tmp_path):
    """OpenAI's own upload: no `transformer.`, mask buffers, no tie_word_embeddings, n_ctx."""
    ours = build("gpt2")
    save_model(tmp_path / "m", ours)
    file = tmp_path / "m" / "model.safetensors"
    tensors = {name.removeprefix("transformer."): t
               for name, t in safetensors.torch.load_file(file).items()}
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool).tril()
    tensors["h.1.attn.masked_bias"] = torch.tensor(-1e4)
    safetensors.torch.save_file(tensors, file)
    old = dict(model_type="gpt2", vocab_size=V, n_ctx=64, n_positions=64, n_embd=32, n_layer=2,
               n_head=4, n_inner=48, layer_norm_epsilon=1e-5, resid_pdrop=0.1)
    (tmp_path / "m" / "config.json").write_text(json.dumps(old))
    assert torch.equal(load_model(tmp_path / "m", "cpu").logits(some_ids()),
                       ours.logits(some_ids()))


@pytest.mark.parametrize("name", ["llama 3 rope", "llama linear rope", "llama"])
def test_rotary_settings_in_the_spelling_of_transformers_4(name, tmp_path):
    config = ModelConfig(**MODELS[name][0])
    hf = hf_config(config)
    del hf["handmade"], hf["rope_parameters"]
    assert model_config_from_hf(hf) == config
    if hf["rope_scaling"]:                              # and of Llama 2's time
        hf["rope_scaling"]["type"] = hf["rope_scaling"].pop("rope_type")
        assert model_config_from_hf(hf) == config
    new = hf_config(config)
    del new["handmade"], new["rope_theta"], new["rope_scaling"]
    assert model_config_from_hf(new) == config


@pytest.mark.parametrize("name", ["gpt2", "llama gqa, wide heads"])
def test_gradients_agree_with_transformers(name, tmp_path):
    ours = build(name)
    save_model(tmp_path / "m", ours)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    ids = some_ids()
    loss = torch.nn.functional.cross_entropy(ours(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    loss.backward()
    other = theirs(ids, labels=ids).loss
    other.backward()
    assert abs(float((loss - other).detach())) < 1e-5
    # written as checkpoints, gradients are compared under the names of the family
    for p in ours.parameters():
        p.data = p.grad
    save_model(tmp_path / "grads", ours)
    grads = safetensors.torch.load_file(tmp_path / "grads" / "model.safetensors")
    for key, p in theirs.named_parameters():
        assert error(grads[key], p.grad) < 1e-4, key


def test_zero_biases_trained_elsewhere_come_back_as_biases(tmp_path):
    """A bias-free model goes out as GPT-2 and returns after fine-tuning: nothing may be lost."""
    save_model(tmp_path / "m", build("gpt2 without biases"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    theirs.transformer.h[1].mlp.c_fc.bias.data += 0.5
    theirs.save_pretrained(tmp_path / "t")
    back = load_model(tmp_path / "t", "cpu")
    assert back.config.mlp_bias
    with torch.no_grad():
        assert error(back.logits(some_ids()), theirs(some_ids()).logits) < 1e-5


def test_a_model_resized_elsewhere_is_read_by_its_new_shape(tmp_path):
    """transformers carries our section along; where it contradicts, the other fields count."""
    save_model(tmp_path / "m", build("llama"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    theirs.resize_token_embeddings(V + 7)
    theirs.save_pretrained(tmp_path / "t")
    assert load_model(tmp_path / "t", "cpu").config.vocab_size == V + 7

# ----------------------------------------------------------- oracle: the safetensors library


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_byte_agrees_with_the_safetensors_library(dtype, tmp_path):
    model = build("qwen3", dtype)
    save_model(tmp_path / "m", model)
    file = tmp_path / "m" / "model.safetensors"
    theirs = safetensors.torch.load_file(file)
    assert theirs.keys() == dict(model.named_parameters()).keys()
    for name, p in model.named_parameters():
        assert theirs[name].dtype == dtype and torch.equal(theirs[name], p)
    with safetensors.safe_open(file, "pt") as f:
        assert f.metadata() == {"format": "pt"}
    assert struct.unpack("<Q", file.read_bytes()[:8])[0] % 8 == 0       # the data is aligned
    safetensors.torch.save_file(theirs, file)                           # and the way back
    again = load_model(tmp_path / "m", "cpu")
    for (name, p), (_, q) in zip(model.named_parameters(), again.named_parameters()):
        assert q.dtype == dtype and torch.equal(p, q), name


def test_unaligned_data_and_mixed_types_are_read(tmp_path):
    """Nothing obliges a writer to align; norms are often float32 among bfloat16 matrices."""
    model = build("llama", torch.bfloat16)
    model.model.norm.float()
    save_model(tmp_path / "m", model)
    file = tmp_path / "m" / "model.safetensors"
    data = file.read_bytes()
    n = struct.unpack("<Q", data[:8])[0]
    file.write_bytes(struct.pack("<Q", n + 3) + data[8:8 + n] + b"   " + data[8 + n:])
    again = load_model(tmp_path / "m", "cpu")
    assert torch.equal(again.model.norm.weight, model.model.norm.weight.bfloat16())
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    assert load_model(tmp_path / "m", "cpu", "float32").lm_head.weight.dtype == torch.float32

# ------------------------------------------------------------------ ours alone: what is in it


def test_a_combination_no_family_has_is_ours_alone(tmp_path, capsys):
    model = build(MODELS["arcee"][0], qk_norm=True)
    checkpoint.note.cache_clear()
    save_model(tmp_path / "m", model)
    assert "this project only" in capsys.readouterr().err
    assert json.loads((tmp_path / "m" / "config.json").read_text())["model_type"] == "handmade"
    again = load_model(tmp_path / "m", "cpu")
    assert again.config == model.config
    assert torch.equal(again.logits(some_ids()), model.logits(some_ids()))


@pytest.mark.parametrize("changes", [
    dict(position="none"), dict(qk_norm=True), dict(norm="rmsnorm"), dict(n_kv_head=2),
    dict(head_dim=16), dict(gated=True), dict(position="rope")])
def test_what_gpt2_cannot_say_is_not_saved_as_gpt2(changes):
    assert family_of(ModelConfig(**{**SHAPE, **changes})).model_type != "gpt2"


def test_settings_that_transformers_ignores_survive(tmp_path):
    model = build("gpt2 without biases", dropout=0.2, init_std=0.01)
    save_model(tmp_path / "m", model)
    assert read_config(tmp_path / "m") == model.config


def test_tokenizer_trainer_state_and_extra_files(tmp_path):
    import tokenizer
    tok = tokenizer.train_chars(["hello\n"])
    state = {"step": 5, "optimizer": {"m": [torch.ones(3)]}, "settings": {"lr": 1e-3, "name": None}}
    save_checkpoint(tmp_path / "m", build(), tok, state, extra={"settings.json": "{}"})
    assert load_tokenizer(tmp_path / "m").encode("hello") == tok.encode("hello")
    assert torch.equal(load_trainer(tmp_path / "m")["optimizer"]["m"][0], torch.ones(3))
    assert (tmp_path / "m" / "settings.json").read_text() == "{}"
    generation = json.loads((tmp_path / "m" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": tok.eot, "eos_token_id": tok.eot}


def test_generation_in_transformers_ends_where_ours_does(tmp_path):
    """After a chat's turn too: generation_config.json holds every id that ends an answer."""
    import tokenizer
    tok = tokenizer.train(["hello world " * 9], 260)
    tok.template = "chatml"
    tok.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    save_model(tmp_path / "m", build(vocab_size=tok.vocab_size), tok)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert theirs.generation_config.eos_token_id == tok.stop_ids and len(tok.stop_ids) == 2
    expected = theirs.generate(torch.tensor([[1, 2, 3]]), do_sample=False, max_new_tokens=9)
    from inference.generate import Sampling, generate
    ends = set(tok.stop_ids)
    ours = [step[0] for step in generate(load_model(tmp_path / "m", "cpu"), [[1, 2, 3]], 9,
                                         Sampling(0), ends=lambda row, token: token in ends)]
    assert expected[0, 3:].tolist() == ours


def test_wrappers_stay_out_of_the_names(tmp_path):
    """DDP and torch.compile put `module.` and `_orig_mod.` into the names (nanoGPT #325)."""
    class Wrapper(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.module = model
    model = build()
    save_model(tmp_path / "m", torch.compile(Wrapper(model)))
    assert torch.equal(load_model(tmp_path / "m", "cpu").logits(some_ids()),
                       model.logits(some_ids()))


def test_resolve_takes_a_directory_or_the_best_or_last_of_a_run(tmp_path):
    for step in (1, 2):
        save_model(tmp_path / f"step_{step}", build())
    (tmp_path / "checkpoints.json").write_text('{"last": "step_2", "best": "step_1"}')
    assert resolve(tmp_path).name == "step_1" and resolve(tmp_path, "last").name == "step_2"
    assert resolve(tmp_path / "step_2").name == "step_2"
    (tmp_path / "checkpoints.json").write_text('{"last": "step_2", "best": "pruned"}')
    assert resolve(tmp_path).name == "step_2"
    (tmp_path / "checkpoints.json").write_text('{"last": "../elsewhere"}')
    with pytest.raises(UserError, match="outside"):
        resolve(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        resolve(tmp_path / "nothing")


def test_the_script_says_what_is_in_a_checkpoint(tmp_path):
    save_model(tmp_path / "m", build(), shard_bytes=20_000)
    command = [sys.executable, str(ROOT / "checkpoint.py")]
    run = subprocess.run([*command, str(tmp_path / "m")], capture_output=True, text=True)
    assert run.returncode == 0 and "gpt2" in run.stdout and "F32" in run.stdout
    assert f"{build().parameter_count():,}" in run.stdout
    run = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True)
    assert run.returncode == 2 and run.stdout == "" and run.stderr.count("\n") == 1

# ----------------------------------------------------------------------- saving goes wrong


def weights(path) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in load_model(path, "cpu").parameters()])


def leftovers(path) -> list[str]:
    return sorted(p.name for p in path.parent.iterdir() if p.name != path.name)


@pytest.mark.parametrize("limit, trainer", [(4000, None), (100_000, {"m": torch.zeros(90_000)})])
def test_a_full_disk_leaves_the_previous_checkpoint(limit, trainer, saved):
    """A file size limit stops a write just as a full disk does: in the weights, in trainer.pt."""
    before = weights(saved)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(UserError, match="cannot save .*untouched"):
            save_checkpoint(saved, build("llama"), None, trainer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert torch.equal(weights(saved), before) and leftovers(saved) == []


def test_no_space_left_is_said_in_one_sentence(saved, monkeypatch):
    before = weights(saved)

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left.*free some space"):
        save_model(saved, build("llama"))
    monkeypatch.undo()
    assert torch.equal(weights(saved), before) and leftovers(saved) == []


def test_a_failing_rename_or_ctrl_c_puts_the_previous_checkpoint_back(saved, monkeypatch):
    before, rename, calls = weights(saved), os.rename, []

    def second_fails(a, b):
        calls.append(a)
        if len(calls) == 2:
            raise KeyboardInterrupt
        rename(a, b)
    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(KeyboardInterrupt):
        save_model(saved, build("llama"))
    monkeypatch.undo()
    assert torch.equal(weights(saved), before) and leftovers(saved) == []


def test_killed_between_the_renames_the_old_one_is_found_and_then_healed(saved):
    before = weights(saved)
    saved.rename(checkpoint.name_aside(saved))
    (saved.parent / f".{saved.name}.new").mkdir()
    assert torch.equal(weights(saved), before)
    save_model(saved, build("llama"))
    assert load_model(saved, "cpu").config.position == "rope" and leftovers(saved) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_sigkill_at_random_moments_leaves_a_whole_checkpoint(tmp_path):
    """Each version's weights are all one number: a mixture of two versions would show."""
    path, model, rng = tmp_path / "m", build(dict(SCRATCH["gpt2"].flags, **TINY)), random.Random(3)
    config = replace(model.config)

    def save(k: int) -> None:
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(k)
        save_model(path, model, shard_bytes=4000)

    save(1)
    for _ in range(20):
        child = os.fork()
        if child == 0:
            for k in range(1, 10 ** 6):
                save(k)
        time.sleep(rng.uniform(0, 0.06))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        values = weights(path)
        assert float(values[0]) >= 1 and bool((values == values[0]).all())
    save(7)
    assert read_config(path) == config and leftovers(path) == []


def test_what_is_no_checkpoint_is_never_replaced(tmp_path, saved):
    """Replacing deletes: a folder of other work must survive a careless --out."""
    for name, files in [("project", ["thesis.tex"]),
                        ("run", ["config.json", "step_1/config.json"])]:
        for file in files:
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_text("mine")
        with pytest.raises(UserError, match="choose another folder"):
            save_model(tmp_path / name, build())
        assert all((tmp_path / name / file).read_text() == "mine" for file in files)
    (saved / "README.md").write_text("notes")                   # and a checkpoint's own notes stay
    (saved / "trainer.pt").write_text("stale")
    save_model(saved, build("llama"))
    assert (saved / "README.md").read_text() == "notes" and not (saved / "trainer.pt").exists()


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    for path in (tmp_path / "file", tmp_path / "file" / "m", "/proc/none/m"):
        with pytest.raises(UserError, match="choose another folder"):
            save_model(path, build())
    assert (tmp_path / "file").read_text() == "not a folder"


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")
@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_loading_takes_the_size_of_the_model_and_little_more(dtype, tmp_path):
    """Straight from the file into the model: pages of a mapped file would count twice."""
    shape = dict(vocab_size=64, block_size=8, n_layer=24, n_head=8, n_embd=512, norm="rmsnorm")
    save_model(tmp_path / "m", Transformer(ModelConfig(**shape)).to(torch.bfloat16))
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch, checkpoint
def peak():
    lines = open("/proc/self/status").read().split("VmHWM:")
    return int(lines[1].split()[0]) * 1024
before = peak()
model = checkpoint.load_model({str(tmp_path / "m")!r}, "cpu", {dtype!r})
size = sum(p.numel() * p.element_size() for p in model.parameters())
assert size > 100e6, size
print((peak() - before) / size)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert 0.9 < float(out.stdout) < 1.3


def test_the_header_reader_is_what_the_loader_trusts(saved):
    """read_header alone: names, dtypes, shapes and places of a good file."""
    header = read_header(saved / "model.safetensors")
    assert header[WTE].shape == (V, 16) and header[WTE].dtype == "F32"
    size = (saved / "model.safetensors").stat().st_size
    assert max(s.end for s in header.values()) == size


def test_a_fingerprint_is_of_weights_and_config_alone(tmp_path):
    """Caches of what a model said are found by it: another model is another, a moved one is not."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(b"x" * 99)
        (tmp_path / name / "trainer.pt").write_bytes(name.encode())
    one = run_folder.fingerprint(tmp_path / "one")
    assert one == run_folder.fingerprint(tmp_path / "two") and len(one) == 16
    (tmp_path / "two" / "model.safetensors").write_bytes(b"x" * 98 + b"y")
    assert one != run_folder.fingerprint(tmp_path / "two")
    a = np.arange(6, dtype=np.int32)
    assert checkpoint.digest(a[:3], a[3:]) != checkpoint.digest(a[:2], a[2:])
    assert checkpoint.digest(a) != checkpoint.digest(a.astype(np.int64))
    assert checkpoint.digest(1, "a") != checkpoint.digest("a", 1)
