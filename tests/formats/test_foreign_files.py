"""Foreign and damaged checkpoints are refused in a sentence.
"""
import json
import os
import random
import struct

import pytest
import safetensors.torch
import torch
import transformers

from checkpoint import (load_model, load_trainer, save_model)
from config import UserError
from formats.huggingface import hf_config, model_config_from_hf
from model import ModelConfig
from checkpoint_base import MODELS, V, WTE, build, saved     # noqa: F401

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

# ------------------------------------------------------------------------ foreign and broken


def rewrite(file, change) -> None:
    """Change the header of a safetensors file and leave its data."""
    data = file.read_bytes()
    n = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:8 + n])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + n:])
HEADERS = {
    "past the end": lambda h: h[WTE]["data_offsets"].__setitem__(1, 10 ** 12),
    "negative": lambda h: h[WTE]["data_offsets"].__setitem__(0, -8),
    "backwards": lambda h: h[WTE]["data_offsets"].reverse(),
    "no list": lambda h: h[WTE].update(data_offsets=7),
    "text offsets": lambda h: h[WTE].update(data_offsets=["0", "1"]),
    "bool shape": lambda h: h[WTE].update(shape=[True, 1]),
    "negative shape": lambda h: h[WTE].update(shape=[-1, -V * 16]),
    "other size": lambda h: h[WTE].update(shape=[V, 17]),
    "other dtype": lambda h: h[WTE].update(dtype="F16"),
    "unknown dtype": lambda h: h[WTE].update(dtype="F99"),
    "dtype a list": lambda h: h[WTE].update(dtype=["F32"]),
    "no dict": lambda h: h.update({WTE: 3}),
    "a hole": lambda h: h.pop(WTE),
    "overlap": lambda h: h.update({WTE: dict(h["transformer.wpe.weight"])}),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_lies_is_refused_with_the_files_name(name, saved):
    rewrite(saved / "model.safetensors", HEADERS[name])
    with pytest.raises(UserError, match="model.safetensors"):
        load_model(saved, "cpu")


@pytest.mark.parametrize("content", [
    b"", b"abc", struct.pack("<Q", 2 ** 63), struct.pack("<Q", 50) + b"{}",
    struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 9) + b"not JSON!",
    struct.pack("<Q", 4) + b"\xff\xfe{}", struct.pack("<Q", 20000) + b"[" * 20000,
    struct.pack("<Q", 15) + b'{"a":1, "a":2} ', b"PK\x03\x04 a zip file of pickles",
], ids=["empty", "short", "huge", "past the end", "list", "no json", "no utf-8", "deep", "twice",
        "zip"])
def test_a_foreign_file_is_refused(content, saved):
    (saved / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="not a whole safetensors file"):
        load_model(saved, "cpu")


def test_a_file_cut_anywhere_or_with_a_tail_is_refused(saved):
    file = saved / "model.safetensors"
    data = file.read_bytes()
    for n in [*range(0, len(data), 997), len(data) - 1]:
        file.write_bytes(data[:n])
        with pytest.raises(UserError):
            load_model(saved, "cpu")
    file.write_bytes(data + b"x")
    with pytest.raises(UserError, match="after the last tensor"):
        load_model(saved, "cpu")


def test_random_damage_to_the_header_never_ends_in_another_error(saved):
    """A flipped byte is either harmless or one sentence: no crash, no read out of bounds."""
    file, rng = saved / "model.safetensors", random.Random(0)
    data = file.read_bytes()
    n = struct.unpack("<Q", data[:8])[0]
    refused = 0
    for _ in range(150):
        broken = bytearray(data)
        broken[rng.randrange(8 + n)] = rng.randrange(256)
        file.write_bytes(bytes(broken))
        try:
            load_model(saved, "cpu")
        except UserError:
            refused += 1
    assert refused > 100


def test_names_and_shapes_are_compared_with_config_json(saved):
    def config(**changes):
        hf = json.loads((saved / "config.json").read_text())
        hf.pop("handmade", None)
        (saved / "config.json").write_text(json.dumps({**hf, **changes}))
    for changes, message in [(dict(n_embd=32), "ask for"), (dict(vocab_size=V + 1), "ask for"),
                             (dict(n_layer=2), "lack"), (dict(n_layer=9999), "layers")]:
        config(**changes)
        with pytest.raises(UserError, match=message):
            load_model(saved, "cpu")
        config(n_embd=16, vocab_size=V, n_layer=1)
    load_model(saved, "cpu")
    tensors = safetensors.torch.load_file(saved / "model.safetensors")
    tensors["lora.weight"] = torch.zeros(3)
    safetensors.torch.save_file(tensors, saved / "model.safetensors")
    with pytest.raises(UserError, match="'lora.weight'.*no place"):
        load_model(saved, "cpu")
    del tensors["lora.weight"]
    tensors["transformer.wte.weight"] = tensors["transformer.wte.weight"].to(torch.int32)
    safetensors.torch.save_file(tensors, saved / "model.safetensors")
    with pytest.raises(UserError, match="I32"):
        load_model(saved, "cpu")


def test_an_output_matrix_is_never_dropped_in_silence(saved):
    """A tied model's file may repeat the embedding; another matrix means it is not tied."""
    tensors = safetensors.torch.load_file(saved / "model.safetensors")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    safetensors.torch.save_file(tensors, saved / "model.safetensors")
    load_model(saved, "cpu")
    tensors["lm_head.weight"][3, 3] += 1
    safetensors.torch.save_file(tensors, saved / "model.safetensors")
    with pytest.raises(UserError, match="tie_word_embeddings"):
        load_model(saved, "cpu")


@pytest.mark.parametrize("text, message", [
    ("", "not JSON"), ("[]", "not a JSON object"), ('{"model_type": "mamba"}', "'mamba'"),
    ("{}", "None"), ('{"model_type": ["gpt2"]}', "not supported"),
    ('{"model_type": "gpt2"}', "does not say"), ("[" * 10 ** 5, "not JSON"),
    ('{"model_type": "handmade", "handmade": {"n_layer": "2"}}', "n_layer"),
    ('{"model_type": "handmade", "handmade": {"colour": 1}}', "newer version"),
    ('{"model_type": "handmade", "handmade": [1]}', "not an object"),
    ('{"model_type": "handmade"}', "'handmade'")])
def test_a_config_json_that_is_none(text, message, saved):
    (saved / "config.json").write_text(text)
    with pytest.raises(UserError, match=message):
        load_model(saved, "cpu")


@pytest.mark.parametrize("changes", [
    dict(num_hidden_layers=0), dict(hidden_size=-32), dict(vocab_size=2.5), dict(vocab_size=True),
    dict(num_attention_heads=10 ** 12), dict(num_attention_heads=2 ** 20, head_dim=2 ** 20),
    dict(rms_norm_eps="small"), dict(rms_norm_eps=float("inf")),
    dict(hidden_act="mish"), dict(attention_bias="yes"), dict(rope_parameters=[1]),
    dict(rope_parameters={"rope_type": "yarn", "factor": -4.0}),
    dict(rope_parameters={"rope_type": "llama3", "factor": 8.0}),
    dict(rope_parameters={"full_attention": {"rope_type": "default"}}),
    dict(rope_parameters={"rope_type": "default", "partial_rotary_factor": 0.5}),
    dict(rope_parameters={"type": "linear", "factor": -1}), dict(partial_rotary_factor=0.5),
    dict(layer_types=["sliding_attention"] * 2), dict(quantization_config={"bits": 4}),
    dict(num_key_value_heads=3), dict(head_dim=7)], ids=str)
def test_a_setting_the_model_has_no_flag_for_is_refused_not_ignored(changes):
    hf = hf_config(ModelConfig(**MODELS["llama"][0]))
    del hf["handmade"]
    model_config_from_hf(hf)
    with pytest.raises(UserError):
        model_config_from_hf({**hf, **changes})


def test_settings_of_other_families_that_change_the_maths_are_refused():
    for kind, changes in [("gpt2", dict(scale_attn_by_inverse_layer_idx=True)),
                          ("gpt2", dict(scale_attn_weights=False))]:
        hf = {**hf_config(ModelConfig(**MODELS[kind][0])), **changes}
        with pytest.raises(UserError, match=next(iter(changes))):
            model_config_from_hf(hf)
    hf = {**hf_config(ModelConfig(**MODELS["llama"][0])), "model_type": "mistral"}
    with pytest.raises(UserError, match="layer_types"):
        model_config_from_hf({**hf, "sliding_window": 9, "layer_types": ["full_attention"] * 2})


def test_shards_that_are_missing_outside_or_of_another_model(tmp_path):
    save_model(tmp_path / "m", build(), shard_bytes=20_000)
    index = tmp_path / "m" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    shard = tmp_path / "m" / content["weight_map"][WTE]
    for name, message in [("../other.safetensors", "outside"), ("/etc/passwd", "outside"),
                          ("model.bin", "outside"), ("gone.safetensors", "missing"),
                          (7, "outside")]:
        places = {**content["weight_map"], WTE: name}
        index.write_text(json.dumps({"weight_map": places}))
        with pytest.raises(UserError, match=message):
            load_model(tmp_path / "m", "cpu")
    places = {**content["weight_map"], "transformer.wpe.weight": shard.name, "ghost": shard.name}
    index.write_text(json.dumps({"weight_map": places}))
    with pytest.raises(UserError, match="different checkpoints"):
        load_model(tmp_path / "m", "cpu")
    index.write_text(json.dumps({"weight_map": []}))
    with pytest.raises(UserError, match="weight_map"):
        load_model(tmp_path / "m", "cpu")
    index.write_text(json.dumps(content))
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(UserError, match=shard.name):
        load_model(tmp_path / "m", "cpu")
    shard.unlink()
    with pytest.raises(UserError, match="missing"):
        load_model(tmp_path / "m", "cpu")


def test_pickled_weights_are_never_opened(saved):
    (saved / "model.safetensors").rename(saved / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickled weights"):
        load_model(saved, "cpu")


class Trap:
    def __reduce__(self):
        return (os.system, ("touch trapped",))


def test_a_trainer_state_that_would_run_code_or_is_broken_is_refused(saved, monkeypatch):
    monkeypatch.chdir(saved)
    with pytest.raises(UserError, match="no trainer.pt"):
        load_trainer(saved)
    torch.save({"step": Trap()}, saved / "trainer.pt")
    with pytest.raises(UserError, match="trainer.pt"):
        load_trainer(saved)
    assert not (saved / "trapped").exists()
    torch.save({"step": torch.ones(9)}, saved / "trainer.pt")
    data = (saved / "trainer.pt").read_bytes()
    for broken in (b"", data[:100], data[:-30], b"no state"):
        (saved / "trainer.pt").write_bytes(broken)
        with pytest.raises(UserError, match="trainer.pt"):
            load_trainer(saved)


def test_unknown_device_and_dtype(saved):
    with pytest.raises(UserError, match="--dtype=int8"):
        load_model(saved, "cpu", "int8")
    for device in ("gpu", "cuda:77"):
        with pytest.raises(UserError, match=f"--device={device}"):
            load_model(saved, device)
