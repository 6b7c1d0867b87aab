"""Checkpoints as their authors publish them, Meta's files, damaged ones, and conversion.
"""
import json
import math
import resource
import shutil
import time

import pytest
import safetensors.torch
import torch
import transformers as T

import checkpoint
from checkpoint import complete, load_model, read_settings, save_model
from config import UserError
from model import ModelConfig
from families import FAMILIES, ROWS
from families.meta import META_KEYS
from formats.huggingface import effective, family_named, model_config_from_hf
from formats.safetensors import weight_index
from oracles import (BASE, BLOCK, V, build, error, opened, oracle, rope, scramble, shape, some_ids)     # noqa: F401

T.logging.set_verbosity_error()
T.logging.disable_progress_bar()

# ------------------------------------------------------------------ as their authors wrote them

ROPE_32 = dict(factor=32.0, high_freq_factor=4.0, low_freq_factor=1.0,
               original_max_position_embeddings=8192, rope_type="llama3")


GEMMA = dict(head_dim=256, hidden_activation="gelu_pytorch_tanh", query_pre_attn_scalar=256,
             rms_norm_eps=1e-6, pad_token_id=0, cache_implementation="hybrid")
CHATGLM = dict(model_type="chatglm", add_bias_linear=False, add_qkv_bias=True, kv_channels=128,
               apply_residual_connection_post_layernorm=False, ffn_hidden_size=13696,
               hidden_size=4096, layernorm_epsilon=1e-5, multi_query_attention=True,
               multi_query_group_num=2, num_attention_heads=32, num_layers=28, original_rope=True,
               padded_vocab_size=65024, post_layer_norm=True, rmsnorm=True, seq_length=8192,
               fp32_residual_connection=False, tie_word_embeddings=False, hidden_dropout=0.0)
# preset -> the config.json of that model as it was published, all spelt in transformers 4's way
PUBLISHED = {
    "llama3.2-1b": shape("llama", 16, 32, 8, 2048, 8192, 128256, 131072, head_dim=64,
                         rms_norm_eps=1e-5, rope_theta=5e5, rope_scaling=ROPE_32, mlp_bias=False,
                         attention_bias=False, pretraining_tp=1, tie_word_embeddings=True),
    "llama2-7b": shape("llama", 32, 32, 32, 4096, 11008, 32000, 4096, rms_norm_eps=1e-5,
                       rope_scaling=None, tie_word_embeddings=False),
    "mistral-7b": shape("mistral", 32, 32, 8, 4096, 14336, 32000, 32768, rms_norm_eps=1e-5,
                        rope_theta=10000.0, sliding_window=4096, tie_word_embeddings=False),
    "mixtral-8x7b": shape("mixtral", 32, 32, 8, 4096, 14336, 32000, 32768, rms_norm_eps=1e-5,
                          rope_theta=1e6, sliding_window=None, num_local_experts=8,
                          num_experts_per_tok=2, router_aux_loss_coef=0.02),
    # a window is named and switched off
    "qwen2.5-0.5b": shape("qwen2", 24, 14, 2, 896, 4864, 151936, 32768, rms_norm_eps=1e-6,
                          rope_theta=1000000.0, sliding_window=32768, use_sliding_window=False,
                          max_window_layers=21, tie_word_embeddings=True),
    "qwen3-0.6b": shape("qwen3", 28, 16, 8, 1024, 3072, 151936, 40960, rms_norm_eps=1e-6,
                        head_dim=128, attention_bias=False, rope_theta=1000000, rope_scaling=None,
                        sliding_window=None, use_sliding_window=False, max_window_layers=28,
                        tie_word_embeddings=True),
    "qwen3-30b-a3b": shape("qwen3_moe", 48, 32, 4, 2048, 6144, 151936, 40960, rms_norm_eps=1e-6,
                           head_dim=128, rope_theta=1000000.0, decoder_sparse_step=1,
                           mlp_only_layers=[], moe_intermediate_size=768, norm_topk_prob=True,
                           num_experts=128, num_experts_per_tok=8, sliding_window=None,
                           use_sliding_window=False, max_window_layers=48,
                           tie_word_embeddings=False),
    # both names of the activation; no word on which layers have the window
    "gemma2-2b": {**shape("gemma2", 26, 8, 4, 2304, 9216, 256000, 8192, **GEMMA,
                          attn_logit_softcapping=50.0, final_logit_softcapping=30.0,
                          rope_theta=10000.0, sliding_window=4096),
                  "hidden_act": "gelu_pytorch_tanh"},
    "gemma3-270m": shape("gemma3_text", 18, 4, 1, 640, 2048, 262144, 32768, **GEMMA,
                         _sliding_window_pattern=6, attention_bias=False, rope_theta=1e6,
                         attn_logit_softcapping=None, final_logit_softcapping=None,
                         layer_types=(["sliding_attention"] * 5 + ["full_attention"]) * 3,
                         rope_local_base_freq=10000.0, rope_scaling=None, sliding_window=512,
                         use_bidirectional_attention=False),
    "gemma3-1b": shape("gemma3_text", 26, 4, 1, 1152, 6912, 262144, 32768, **GEMMA,
                       sliding_window_pattern=6, attn_logit_softcapping=None, rope_theta=1000000,
                       final_logit_softcapping=None, rope_local_base_freq=10000,
                       rope_scaling=None, sliding_window=512),
    "chatglm3-6b": CHATGLM,
    "glm-4-9b": dict(CHATGLM, num_layers=40, padded_vocab_size=151552, seq_length=131072,
                     rope_ratio=500, layernorm_epsilon=1.5625e-7),
    "glm-4-9b-0414": shape("glm4", 40, 32, 2, 4096, 13696, 151552, 32768, rms_norm_eps=1e-5,
                           head_dim=128, attention_bias=True, partial_rotary_factor=0.5,
                           rope_theta=10000.0, tie_word_embeddings=False),
    "glm-4.5-air": shape("glm4_moe", 46, 96, 8, 4096, 10944, 151552, 131072, head_dim=128,
                         attention_bias=True, partial_rotary_factor=0.5, moe_intermediate_size=1408,
                         n_group=1, topk_group=1, n_routed_experts=128, n_shared_experts=1,
                         norm_topk_prob=True, num_experts_per_tok=8, first_k_dense_replace=1,
                         rms_norm_eps=1e-5, rope_scaling=None, rope_theta=1000000,
                         num_nextn_predict_layers=1, use_qk_norm=False, routed_scaling_factor=1.0,
                         tie_word_embeddings=False),
    "minicpm-2b": {**shape("minicpm", 40, 36, 36, 2304, 5760, 122753, 4096, rms_norm_eps=1e-5,
                           scale_emb=12, scale_depth=1.4, dim_model_base=256, rope_scaling=None),
                   "initializer_range": 0.1},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_config_json_is_read_as_the_preset(name):
    read, known = (
        effective(model_config_from_hf(PUBLISHED[name])),
        effective(ModelConfig.from_preset(name)),
    )
    assert {k for k in known if known[k] != read[k]} <= {"init_std"}


def test_a_window_of_null_is_none_and_silence_is_the_familys():
    base = PUBLISHED["mistral-7b"]
    assert not model_config_from_hf({**base, "sliding_window": None}).sliding_window
    del base["sliding_window"]
    assert model_config_from_hf(base).sliding_window == 4096


@pytest.mark.parametrize("name", ["llama linear", "llama 3.1", "llama yarn mscale", "qwen2",
                                  "gemma3", "gemma3 linear", "glm4", "mixtral", "smollm3"])
def test_rotary_settings_in_the_spelling_of_transformers_4_and_5(name, oracle):
    """rope_theta, rope_scaling, rope_local_base_freq, partial_rotary_factor at the top; or not."""
    new = json.loads((oracle(name).path / "config.json").read_text())
    old = {k: v for k, v in new.items() if k != "rope_parameters"}
    rotary = dict(new["rope_parameters"])
    if "full_attention" in rotary:
        old["rope_local_base_freq"] = rotary["sliding_attention"]["rope_theta"]
        rotary = dict(rotary["full_attention"])
    old["rope_theta"] = rotary.pop("rope_theta")
    if "partial_rotary_factor" in rotary:
        old["partial_rotary_factor"] = rotary.pop("partial_rotary_factor")
    scaled = rotary["rope_type"] != "default"
    if not name.startswith("gemma3"):                   # Llama 2's time, before Gemma 3's
        rotary["type"] = rotary.pop("rope_type")
    old["rope_scaling"] = rotary if scaled else None
    assert model_config_from_hf(old) == model_config_from_hf(new)


@pytest.mark.parametrize("kind", [row.model_type for row in ROWS if row.writable])
def test_what_config_json_does_not_say_is_transformers_default(kind):
    sizes = dict(vocab_size=V, hidden_size=128, intermediate_size=48, num_hidden_layers=3,
                 num_attention_heads=32)
    if kind == "gpt2":
        sizes = dict(vocab_size=V, n_embd=32, n_layer=3, n_head=4)
    if kind == "helium":                    # whose heads are 128 wide: its o_proj is square
        sizes["num_attention_heads"] = 1
        sizes["num_key_value_heads"] = 1
    if kind == "jais2":
        sizes.update(num_attention_heads=26, hidden_size=26 * 8)
    if kind == "stablelm":
        sizes["num_attention_heads"] = sizes["num_key_value_heads"] = 4
    if kind == "dots1":                     # whose default is no expert at all
        sizes.update(n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1)
    silent = {"model_type": kind, **sizes}
    said = json.loads(T.AutoConfig.for_model(kind, **sizes).to_json_string(use_diff=False))
    assert effective(model_config_from_hf(silent)) == effective(model_config_from_hf(said))


def test_a_scaling_of_the_layers_with_a_window_is_refused_not_ignored(oracle):
    hf = json.loads((oracle("gemma3").path / "config.json").read_text())
    model_config_from_hf(hf)
    hf["rope_parameters"]["sliding_attention"].update(rope_type="linear", factor=2.0)
    with pytest.raises(UserError, match="only full_attention"):
        model_config_from_hf(hf)


def weights_of(path) -> dict:
    return safetensors.torch.load_file(path / "model.safetensors")


def test_minicpm_is_the_llama_with_scaled_weights(tmp_path):
    """embedding x scale_emb, branches x scale_depth / sqrt(layers), logits / (width / base)."""
    llama = scramble(T.LlamaForCausalLM(T.LlamaConfig(**BASE, rms_norm_eps=1e-5)))
    llama.lm_head.weight.data = llama.model.embed_tokens.weight.data.clone()
    llama.save_pretrained(tmp_path / "m")
    config = {**shape("minicpm", 3, 4, 2, 32, 48, V, BLOCK), "scale_emb": 12, "scale_depth": 1.4,
              "dim_model_base": 16, "rms_norm_eps": 1e-5}
    tensors = weights_of(tmp_path / "m")
    del tensors["lm_head.weight"]                       # absent means tied
    safetensors.torch.save_file(tensors, tmp_path / "m" / "model.safetensors")
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    with torch.no_grad():
        llama.model.embed_tokens.weight *= 12
        llama.lm_head.weight /= 32 / 16
        for layer in llama.model.layers:
            layer.self_attn.o_proj.weight *= 1.4 / math.sqrt(3)
            layer.mlp.down_proj.weight *= 1.4 / math.sqrt(3)
        expected = llama(some_ids()).logits
    ours = load_model(tmp_path / "m", "cpu")
    assert ours.config.tie_word_embeddings and error(ours.logits(some_ids()), expected) <= 1e-5
    save_model(tmp_path / "saved", ours)
    back = opened(tmp_path / "saved")
    with torch.no_grad():
        assert back.config.model_type == "granite"      # the same scales, and no foreign code
        assert error(back(some_ids()).logits, expected) <= 1e-5


def original_chatglm(glm, path, ratio) -> None:
    """A GlmForCausalLM under the keys and the settings that ChatGLM was published with."""
    names = {"model.embed_tokens": "embedding.word_embeddings", "model.norm":
             "encoder.final_layernorm", "lm_head": "output_layer", "model.layers":
             "encoder.layers", "self_attn.o_proj": "self_attention.dense",
             "mlp.gate_up_proj": "mlp.dense_h_to_4h", "mlp.down_proj": "mlp.dense_4h_to_h"}
    tensors = {}
    for key, value in glm.state_dict().items():
        for theirs, original in names.items():
            key = key.replace(theirs, original)
        tensors["transformer." + key] = value.contiguous()
    for i in range(3):
        stem = f"transformer.encoder.layers.{i}."
        for kind in ("weight", "bias"):                 # fused: the rows of q, of k, of v
            tensors[f"{stem}self_attention.query_key_value.{kind}"] = torch.cat(
                [tensors.pop(f"{stem}self_attn.{x}_proj.{kind}") for x in "qkv"])
    tensors["transformer.rotary_pos_emb.inv_freq"] = torch.ones(4)
    path.mkdir()
    safetensors.torch.save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(dict(
        CHATGLM, kv_channels=16, ffn_hidden_size=48, hidden_size=32, num_attention_heads=4,
        num_layers=3, padded_vocab_size=V, seq_length=BLOCK, rope_ratio=ratio)))


@pytest.mark.parametrize("ratio", [1, 500])
def test_chatglm_as_published_is_glm_under_other_names(ratio, tmp_path):
    glm = scramble(T.GlmForCausalLM(T.GlmConfig(**BASE, head_dim=16, rms_norm_eps=1e-5,
                                                **rope(theta=1e4 * ratio,
                                                       partial_rotary_factor=0.5))))
    original_chatglm(glm, tmp_path / "m", ratio)
    ours = load_model(tmp_path / "m", "cpu")
    with torch.no_grad():
        expected = glm(some_ids()).logits
    assert error(ours.logits(some_ids()), expected) <= 1e-5
    save_model(tmp_path / "saved", ours)
    assert opened(tmp_path / "saved").config.model_type == "glm"
    # and the way back, all names and all bytes of them
    checkpoint.convert(tmp_path / "saved", tmp_path / "back", form="chatglm")
    before, after = weights_of(tmp_path / "m"), weights_of(tmp_path / "back")
    del before["transformer.rotary_pos_emb.inv_freq"]
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(load_model(tmp_path / "back", "cpu").logits(some_ids()),
                       ours.logits(some_ids()))


def test_the_predictor_of_the_token_after_next_is_left_out_with_a_note(oracle, tmp_path, capsys):
    """GLM-4.5's files have one more layer than its num_hidden_layers."""
    shutil.copytree(oracle("glm4_moe").path, tmp_path / "m")
    tensors = weights_of(tmp_path / "m")
    for key in [k for k in tensors if ".layers.2." in k]:
        tensors[key.replace(".layers.2.", ".layers.3.")] = tensors[key].clone()
    tensors["model.layers.3.eh_proj.weight"] = torch.zeros(32, 64)
    safetensors.torch.save_file(tensors, tmp_path / "m" / "model.safetensors")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    for n in (1, 0):
        (tmp_path / "m" / "config.json").write_text(json.dumps(
            {**config, "num_nextn_predict_layers": n}))
        if n:
            ours = load_model(tmp_path / "m", "cpu")
            assert "token after next" in capsys.readouterr().err
            assert error(ours.logits(some_ids()), oracle("glm4_moe").logits) <= 1e-5
        else:
            with pytest.raises(UserError, match="layers.3.* no place"):
                load_model(tmp_path / "m", "cpu")


@pytest.mark.parametrize("kind", ["deepseek_v3", "llama4", "phimoe", "qwen2_moe", "gemma3", "mamba",
                                  "olmo_hybrid", "cohere2_moe", "glm4v"])
def test_an_architecture_that_is_not_supported_is_refused_with_the_nearest(kind):
    with pytest.raises(UserError) as e:
        model_config_from_hf({**PUBLISHED["llama2-7b"], "model_type": kind})
    assert repr(kind) in str(e.value) and "\n" not in str(e.value)
    _, _, nearest = str(e.value).partition("the nearest: ")
    known = {row.model_type for row in ROWS} | {"gemma3", "mistral3", "gemma3_text"}
    assert "families/" in str(e.value) and set(filter(None, nearest.split(", "))) <= known
    assert len(str(e.value)) < 400

# ------------------------------------------------------------------------------ Meta's Llama


def meta_llama(path, parts=1, kind="pth", tied=False, **params):
    """A random Llama as a directory of Meta's: (its LlamaForCausalLM, path). One part a GPU."""
    theta = params.get("rope_theta", 10000.0)
    settings = rope(theta=theta)
    if params.get("use_scaled_rope"):
        settings = rope("llama3", theta, factor=32.0 if tied else 8.0, low_freq_factor=1.0,
                        high_freq_factor=4.0, original_max_position_embeddings=8192)
    llama = scramble(T.LlamaForCausalLM(T.LlamaConfig(
        **{**BASE, "intermediate_size": 96, "rms_norm_eps": 1e-5, "tie_word_embeddings": tied},
        **settings)))

    def neighbours(w, heads):           # row i and row i + D/2 of a head become 2i and 2i + 1
        D = len(w) // heads
        order = [h * D + i + half for h in range(heads) for i in range(D // 2)
                 for half in (0, D // 2)]
        return w[order]
    body, tensors = llama.model, {}
    tensors["tok_embeddings.weight"] = body.embed_tokens.weight
    tensors["norm.weight"] = body.norm.weight
    # Llama 3.2's files hold the matrix twice
    tensors["output.weight"] = llama.lm_head.weight
    for i, layer in enumerate(body.layers):
        a, m = layer.self_attn, layer.mlp
        for name, w in [("attention.wq", neighbours(a.q_proj.weight, 4)),
                        ("attention.wk", neighbours(a.k_proj.weight, 2)),
                        ("attention.wv", a.v_proj.weight), ("attention.wo", a.o_proj.weight),
                        ("feed_forward.w1", m.gate_proj.weight),
                        ("feed_forward.w2", m.down_proj.weight),
                        ("feed_forward.w3", m.up_proj.weight),
                        ("attention_norm", layer.input_layernorm.weight),
                        ("ffn_norm", layer.post_attention_layernorm.weight)]:
            tensors[f"layers.{i}.{name}.weight"] = w
    path.mkdir()
    for part in range(parts):
        shard = {"rope.freqs": torch.ones(4)}
        for name, w in tensors.items():
            # Llama 2 cuts the embedding by features, Llama 3 by tokens
            by_input = ".wo." in name or ".w2." in name or (
                name.startswith("tok_") and theta == 10000.0)
            if w.ndim > 1:
                w = w.chunk(parts, dim=int(by_input))[part]
            shard[name] = w.detach().clone()
        if kind == "pth":
            torch.save(shard, path / f"consolidated.{part:02d}.pth")
        else:
            safetensors.torch.save_file(shard, path / f"consolidated.{part:02d}.safetensors")
    (path / "params.json").write_text(json.dumps(dict(
        dim=32, n_layers=3, n_heads=4, n_kv_heads=2, norm_eps=1e-5, vocab_size=-1, multiple_of=32)
        | params))
    return llama, path


@pytest.mark.parametrize("parts, kind, tied, params", [
    (1, "pth", False, {}), (2, "pth", False, {}), (2, "safetensors", False, {}),
    (1, "pth", False, dict(rope_theta=5e5, use_scaled_rope=True, vocab_size=V)),
    (1, "pth", True, dict(rope_theta=5e5, use_scaled_rope=True, vocab_size=V)),
    (2, "pth", True, dict(rope_theta=5e5, use_scaled_rope=True, vocab_size=V,
                          ffn_dim_multiplier=1.1)),
    (1, "safetensors", False, dict(rope_theta=5e5, ffn_dim_multiplier=None, vocab_size=V)),
    # Mistral's own files are Llama's with the widths said
    (1, "safetensors", False, dict(hidden_dim=96, head_dim=8, vocab_size=V))])
def test_llama_as_meta_publishes_it_is_transformers_llama(parts, kind, tied, params, tmp_path):
    llama, path = meta_llama(tmp_path / "m", parts, kind, tied, **params)
    with torch.no_grad():
        expected = llama(some_ids()).logits
    ours = load_model(path, "cpu")
    assert error(ours.logits(some_ids()), expected) <= 1e-5
    scaled = params.get("use_scaled_rope")
    assert ours.config.tie_word_embeddings == tied
    context = 131072 if scaled else 8192 if "rope_theta" in params else 4096
    assert ours.config.block_size == context
    # out as Hugging Face's, and from there back as Meta's, the same tensors in the same type
    checkpoint.convert(path, tmp_path / "hf")
    back = opened(tmp_path / "hf")
    with torch.no_grad():
        assert error(back(some_ids()).logits, expected) <= 1e-5
    checkpoint.convert(tmp_path / "hf", tmp_path / "meta", form="meta")
    again = torch.load(tmp_path / "meta" / "consolidated.00.pth", weights_only=True)
    if parts == 1 and kind == "pth":
        first = torch.load(path / "consolidated.00.pth", weights_only=True)
        del first["rope.freqs"]
        assert first.keys() == again.keys()
        assert all(torch.equal(first[name], again[name]) for name in first)
    assert torch.equal(load_model(tmp_path / "meta", "cpu").logits(some_ids()),
                       ours.logits(some_ids()))
    written = json.loads((tmp_path / "meta" / "params.json").read_text())
    assert written.keys() <= set(META_KEYS) and written["dim"] == 32


def test_a_window_and_wide_heads_go_through_mistrals_form_of_metas_files(oracle, tmp_path):
    theirs = build(("Mistral", dict(sliding_window=5, head_dim=16), ""))
    theirs.save_pretrained(tmp_path / "m")
    checkpoint.convert(tmp_path / "m", tmp_path / "meta", form="meta")
    written = json.loads((tmp_path / "meta" / "params.json").read_text())
    assert written["head_dim"] == 16 and written["sliding_window"] == 5
    with torch.no_grad():
        expected = theirs(some_ids()).logits
    assert error(load_model(tmp_path / "meta", "cpu").logits(some_ids()), expected) <= 1e-5


class Trap:
    def __reduce__(self):
        return (print, ("trapped",))


def test_metas_files_that_are_damaged_hostile_or_of_two_models(tmp_path, capsys):
    _, path = meta_llama(tmp_path / "m", parts=2)
    first, second = path / "consolidated.00.pth", path / "consolidated.01.pth"
    params, good = json.loads((path / "params.json").read_text()), second.read_bytes()
    tensors = torch.load(second, weights_only=True)

    def refused(words):
        with pytest.raises(UserError, match=words) as e:
            load_model(path, "cpu")
        assert "\n" not in str(e.value)
    for content, words in [
            (Trap(), "damaged or no file"), ({"w": Trap()}, "damaged or no file"), ([1], "else"),
            ({"norm.weight": 3}, "else"), ({1: torch.ones(1)}, "else"),
            ({"norm.weight": torch.ones(32, dtype=torch.int32)}, "else"),
            ({"norm.weight": torch.eye(3).to_sparse()}, "else"), ({}, "not alike"),
            ({**tensors, "more": torch.ones(1)}, "different tensors"),
            ({k: v for k, v in tensors.items() if "w3" not in k}, "not alike"),
            ({**tensors, "norm.weight": torch.ones(31)}, "not alike")]:
        torch.save(content, second)
        refused(words)
    for cut in (0, 10, len(good) // 2, len(good) - 1):
        second.write_bytes(good[:cut])
        refused("damaged")
    assert "trapped" not in capsys.readouterr().out
    second.unlink()                                     # one part of two
    refused("settings|weights")
    second.write_bytes(good)
    load_model(path, "cpu")
    for changes, words in [(dict(multiple_of=64), "MLP of"), (dict(dim=64), "MLP of|settings"),
                           (dict(n_layers=2), "no place"), (dict(n_layers=4), "lack"),
                           (dict(n_kv_heads=4), "settings"), (dict(vocab_size=V + 1), "settings"),
                           (dict(moe={"num_experts": 8}), "moe"), (dict(dim=None), "dim"),
                           (dict(quantization_args={"bits": 4}), "quantization_args")]:
        (path / "params.json").write_text(json.dumps({**params, **changes}))
        refused(words)
    first.unlink()
    second.unlink()
    refused("consolidated.00.pth")

# ------------------------------------------------------------------------- nothing by accident

HOSTILE = (None, True, -1, 0, 1, 2.5, -0.5, 1e308, 1e-308, 2 ** 23, 10 ** 400, math.nan, math.inf,
           "x", [], [1], ["full_attention"] * 3, ["sliding_attention"] * 3, {"a": 1})


@pytest.mark.parametrize("name", ["gpt2", "llama yarn", "llama 3.1", "mistral window", "mixtral",
                                  "qwen2 windows", "qwen3_moe", "gemma2", "gemma3 linear", "glm4",
                                  "glm4_moe all flags", "olmo2", "cohere", "smollm3", "granite",
                                  "minicpm", "chatglm", "meta"])
def test_any_value_of_any_setting_loads_or_is_one_sentence(name, oracle, tmp_path):
    """No other exception, no gigabytes, no seconds; what loads is run, too."""
    path, file = tmp_path / "m", "config.json"
    if name == "meta":
        file = "params.json"
        meta_llama(path, rope_theta=5e5, use_scaled_rope=True, ffn_dim_multiplier=1.1)
    elif name == "chatglm":
        original_chatglm(scramble(T.GlmForCausalLM(T.GlmConfig(**BASE, head_dim=16))), path, 1)
    else:
        shutil.copytree(oracle("llama tied" if name == "minicpm" else name).path, path)
    good = json.loads((path / file).read_text())
    if name == "minicpm":
        good |= dict(model_type=name, scale_emb=12, scale_depth=1.4, dim_model_base=16)
    row = FAMILIES[good.get("model_type", "meta")]
    keys = {theirs for _, theirs in row.fields} | set(row.only) | {
        "quantization_config", "handmade", "layer_types", "sliding_window", "rope_scaling",
        "use_sliding_window", "num_nextn_predict_layers", "rope_parameters", "rope_theta",
        "partial_rotary_factor", "max_window_layers"}
    keys |= {k for k in good if not k.endswith("token_id")}
    cases = [{**good, key: value} for key in sorted(keys) for value in HOSTILE]
    rotary = good.get("rope_parameters") or {}
    for key in [*rotary, "attention_factor", "mscale", "beta_fast", "truncate"] if rotary else ():
        cases += [{**good, "rope_parameters": {**rotary, key: value}} for value in HOSTILE]
    seen, refused, started = {repr(load_model(path, "cpu").config)}, 0, time.time()
    stored, memory = weight_index(path), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for case in cases:
        try:
            if name == "meta":                      # what the weights say is filled in first
                (path / file).write_text(json.dumps(case))
                settings = read_settings(path)[0]
                settings = complete(settings, stored, family_named(settings))
                config = model_config_from_hf(settings)
            else:
                config = model_config_from_hf(json.loads(json.dumps(case)))
            if repr(config) not in seen:            # most settings change nothing
                seen.add(repr(config))
                (path / file).write_text(json.dumps(case))
                model = load_model(path, "cpu")
                with torch.no_grad():
                    model(torch.tensor([[1, 2, 3]]))
        except UserError as e:
            refused += 1
            assert "\n" not in str(e)
    assert refused > len(cases) / 10 and len(seen) > 3
    assert (time.time() - started) / len(cases) < 0.1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 500_000      # kB


@pytest.mark.parametrize("name, changes", [
    ("mixtral", dict(num_local_experts=3)), ("mixtral", dict(num_local_experts=5)),
    ("qwen3_moe", dict(num_local_experts=8)), ("qwen3_moe", dict(moe_intermediate_size=25)),
    ("glm4_moe", dict(n_shared_experts=2)), ("glm4_moe", dict(first_k_dense_replace=0)),
    ("glm4_moe", dict(first_k_dense_replace=2)), ("glm4_moe", dict(use_qk_norm=True)),
    ("glm4_moe", dict(n_routed_experts=10 ** 4)), ("glm4_moe", dict(n_group=2)),
    ("qwen2", dict(num_key_value_heads=4)), ("qwen3", dict(head_dim=8)),
    ("gemma2", dict(num_hidden_layers=2)), ("gemma3", dict(num_hidden_layers=8)),
    ("glm", dict(attention_bias=False)), ("glm without biases", dict(attention_bias=True)),
    ("olmo2", dict(model_type="llama")), ("llama", dict(model_type="olmo2")),
    ("glm", dict(model_type="glm4")), ("glm4", dict(model_type="glm")),
    ("cohere", dict(intermediate_size=47)), ("arcee", dict(model_type="llama")),
    ("llama", dict(tie_word_embeddings=True)), ("llama tied", dict(tie_word_embeddings=False)),
], ids=str)
def test_settings_and_weights_that_disagree(name, changes, oracle, tmp_path):
    """More or fewer experts, heads, layers; another family: one sentence that names the tensor."""
    shutil.copytree(oracle(name).path, tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    if "layer_types" in config:
        del config["layer_types"]
    (tmp_path / "m" / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(UserError, match="different models|not supported|ties") as e:
        load_model(tmp_path / "m", "cpu")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gemma3", "glm", "glm4_moe", "olmo2"])
def test_a_tensor_that_is_missing_added_or_of_another_shape(name, oracle, tmp_path):
    shutil.copytree(oracle(name).path, tmp_path / "m")
    good, file = weights_of(tmp_path / "m"), tmp_path / "m" / "model.safetensors"
    keys = sorted(good)
    for key in keys[::max(1, len(keys) // 12)]:
        for tensors in ({k: t for k, t in good.items() if k != key},
                        {**good, key + "_extra": torch.ones(1)},
                        {**good, key: good[key][..., :-1].contiguous()},
                        {**good, key: good[key].to(torch.int32)}):
            safetensors.torch.save_file(tensors, file)
            with pytest.raises(UserError, match="different models|supported|tie_word"):
                load_model(tmp_path / "m", "cpu")
