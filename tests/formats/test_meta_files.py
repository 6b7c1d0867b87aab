"""params.json, Meta's and Mistral's: every key is honoured or refused, and the way back is whole.

The oracle is transformers' Llama with the settings that vLLM derives from the same keys (its
transformers_utils/configs/mistral.py), numbers worked out by hand where there are few.
"""
import json
import math

import pytest
import torch
import transformers as T

import checkpoint
from checkpoint import load_model, save_model
from config import UserError
from layers.rope import rope_frequencies
from model import ModelConfig, Transformer

V = 48
SHAPE = dict(n_layer=1, n_head=2, n_embd=16, vocab_size=V, block_size=64, init_std=0.4)
YARN = dict(factor=16.0, original_max_position_embeddings=16, beta=8.0, alpha=2.0,
            apply_scale=False)


@pytest.fixture
def meta(tmp_path):
    """A Llama in Meta's layout: change(**keys) edits its params.json and gives the folder."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig.from_family("llama", **SHAPE))
    save_model(tmp_path / "hf", model)
    checkpoint.convert(tmp_path / "hf", tmp_path / "meta", form="meta")
    file = tmp_path / "meta" / "params.json"
    params = json.loads(file.read_text())

    def change(**keys):
        file.write_text(json.dumps({**params, **keys}))
        return tmp_path / "meta"
    change.hf = tmp_path / "hf"
    return change


def ids():
    return torch.arange(2, 42)[None]


@pytest.mark.parametrize("changes, attention_factor", [
    ({}, 1.0), (dict(apply_scale=True), 0.1 * math.log(16) + 1),
    (dict(beta=None, alpha=None), 1.0)])
def test_mistrals_yarn_is_the_yarn_that_vllm_makes_of_it(changes, attention_factor, meta):
    yarn = {**YARN, **changes}
    ours = load_model(meta(yarn=yarn, max_position_embeddings=256), "cpu")
    assert ours.config.block_size == 256
    # beta and alpha are beta_fast and beta_slow; without apply_scale attention stays as it is
    rope = dict(rope_type="yarn", factor=16.0, original_max_position_embeddings=16,
                beta_fast=yarn["beta"] or 32, beta_slow=yarn["alpha"] or 1, rope_theta=10000.0)
    if not yarn["apply_scale"]:
        rope["attention_factor"] = 1.0
    config = T.MistralConfig(hidden_size=16, num_attention_heads=2, head_dim=8,
                             max_position_embeddings=256, rope_parameters=rope)
    frequencies, factor = T.modeling_rope_utils.ROPE_INIT_FUNCTIONS["yarn"](config)
    mine, my_factor = rope_frequencies(ours.config)
    assert torch.allclose(mine, frequencies, rtol=1e-6)
    assert my_factor == pytest.approx(factor) == pytest.approx(attention_factor)
    # and the whole model, saved in transformers' words
    checkpoint.convert(meta(yarn=yarn, max_position_embeddings=256), meta.hf.parent / "out")
    theirs = T.AutoModelForCausalLM.from_pretrained(meta.hf.parent / "out")
    with torch.no_grad():
        assert torch.allclose(theirs.eval()(ids()).logits, ours.logits(ids()), atol=1e-5)


@pytest.mark.parametrize("changes", [
    dict(model_type="transformer"), dict(activation="silu"), dict(causal=True), dict(yarn=None),
    dict(moe=None), dict(llama_4_scaling=None), dict(quantization=None), dict(sliding_window=None),
    dict(tied_embeddings=None), dict(max_batch_size=4), dict(multiple_of=None),
    dict(ffn_dim_multiplier=None, multiple_of=None), dict(rope_scaling_factor=None),
    dict(tied_embeddings=False), dict(use_scaled_rope=False), dict(dtype="bfloat16")], ids=str)
def test_keys_that_say_what_is_so_and_nulls_change_nothing(changes, meta):
    expected = load_model(meta(), "cpu").logits(ids())
    assert torch.equal(load_model(meta(**changes), "cpu").logits(ids()), expected)


@pytest.mark.parametrize("changes", [
    dict(activation="gelu"), dict(use_qk_norm=True), dict(model_type="mamba"), dict(causal=False),
    dict(llama_4_scaling={"original_max_position_embeddings": 16, "beta": 0.1}),
    dict(moe={"num_experts": 8, "num_experts_per_tok": 2}), dict(quantization={"qformat": "fp8"}),
    dict(multimodal={"vision_encoder_args": {}}), dict(vision_encoder={"hidden_size": 8}),
    dict(kv_lora_rank=512), dict(q_lora_rank=8), dict(ragged_attention=2), dict(use_biases=True),
    dict(_sliding_window=[4, None]), dict(sliding_window=[4, None]), dict(sliding_window="4"),
    dict(rope_scaling={"factor": 2.0}), dict(yarn={**YARN, "mscale": 1.0}), dict(yarn=[1]),
    dict(yarn={**YARN, "apply_scale": "no"}), dict(yarn={**YARN, "factor": None}),
    dict(yarn=YARN, use_scaled_rope=True), dict(tied_embeddings=True), dict(moe_every_n_layers=1),
    dict(lora_args={"lora_rank": 16}), dict(logits_scaling=2.0)], ids=str)
def test_keys_that_would_change_the_maths_are_refused_by_name(changes, meta):
    with pytest.raises(UserError, match="|".join([*changes, "yarn needs factor", "ties the"])) as e:
        load_model(meta(**changes), "cpu")
    assert "\n" not in str(e.value) and len(str(e.value)) < 500


@pytest.mark.parametrize("params, tied, factor", [
    (dict(use_scaled_rope=True), True, 32.0), (dict(use_scaled_rope=True), False, 8.0),
    (dict(use_scaled_rope=True, rope_scaling_factor=16), True, 16),
    (dict(use_scaled_rope=True, rope_scaling_factor=32), False, 32)])
def test_equal_matrices_are_tied_and_tell_the_factor(params, tied, factor, meta):
    """Llama 3.2's files hold both matrices; 3.1's are of two kinds, and their factor is 8."""
    path = meta(**params)
    file = path / "consolidated.00.pth"
    tensors = torch.load(file, weights_only=True)
    if tied:
        tensors["output.weight"] = tensors["tok_embeddings.weight"].clone()
    torch.save(tensors, file)
    config = checkpoint.read_config(path)
    assert config.tie_word_embeddings == tied and config.rope_scaling["factor"] == factor
    # the way back names both matrices, and the factor
    checkpoint.convert(path, path.parent / "again", form="meta")
    again = torch.load(path.parent / "again" / "consolidated.00.pth", weights_only=True)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensors[name]) for name in again)
    assert checkpoint.read_config(path.parent / "again") == config
