"""Which file counts, and which names a tensor may have: transformers and safetensors as oracles."""
import json
import os
import shutil
import struct
import time

import pytest
import safetensors.torch
import torch
import transformers as T

import checkpoint
from checkpoint import load_model, save_model
from config import UserError
from model import ModelConfig, Transformer
from formats.safetensors import note, read_header, weight_index

T.logging.set_verbosity_error()
T.logging.disable_progress_bar()

V = 48
BASE = dict(vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64, head_dim=8,
            bos_token_id=0, eos_token_id=1, pad_token_id=None)
VISION = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
              image_size=4, patch_size=2)


@pytest.fixture(autouse=True)
def fresh_notes():
    note.cache_clear()


def scramble(model, seed=0):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.4 + ("norm" in name))
    return model.eval()


def llama(seed=0, **settings):
    return scramble(T.LlamaForCausalLM(T.LlamaConfig(**{**BASE, **settings})), seed)


def ids():
    return torch.randint(2, V, (1, 20), generator=torch.Generator().manual_seed(1))


def logits(model):
    with torch.no_grad():
        return model(ids()).logits


def close(a, b) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=1e-4)

# ------------------------------------------------------------------------- which file counts


FILES = ("single", "shards", "shards gone", "fp16", "consolidated", "bin", "bin index")


@pytest.mark.parametrize("present", [
    ("single",), ("shards",), ("single", "shards"), ("single", "shards gone"), ("shards gone",),
    ("fp16",), ("single", "fp16"), ("shards", "fp16"), ("consolidated",), ("bin",),
    ("single", "consolidated", "bin"), ("single", "shards", "bin index"), ("bin", "shards"),
    ("fp16", "consolidated")], ids=" ".join)
def test_the_file_that_counts_is_transformers(present, tmp_path, capsys):
    """Each kind of file holds another model: the one that is read is the one transformers reads."""
    where = tmp_path / "m"
    models = {name: llama(seed) for seed, name in enumerate(FILES)}
    models["single"].save_pretrained(where)
    (where / "model.safetensors").unlink()
    for name in present:
        part = tmp_path / name
        models[name].save_pretrained(part, max_shard_size="8KB" if "shards" in name else "1GB")
        weights = models[name].state_dict()
        if name == "single":
            shutil.copy(part / "model.safetensors", where)
        elif "shards" in name:
            for file in part.glob("model-*" if name == "shards" else "none"):
                shutil.copy(file, where)
            shutil.copy(part / "model.safetensors.index.json", where)
        elif name == "fp16":
            shutil.copy(part / "model.safetensors", where / "model.fp16.safetensors")
        elif name == "consolidated":
            safetensors.torch.save_file(weights, where / "consolidated.safetensors")
        elif name == "bin":
            torch.save(weights, where / "pytorch_model.bin")
        else:
            (where / "pytorch_model.bin.index.json").write_text('{"weight_map": {}}')
    try:
        expected = T.LlamaForCausalLM.from_pretrained(where, use_safetensors=True)
    except OSError:
        with pytest.raises(UserError, match="no model.safetensors|pickled|missing") as e:
            load_model(where, "cpu")
        assert "\n" not in str(e.value)
        return
    ours = load_model(where, "cpu")
    assert torch.equal(ours.model.norm.weight, expected.model.norm.weight)
    doubtful = "single" in present and any("shards" in name for name in present)
    assert ("is read, as in transformers" in capsys.readouterr().err) == doubtful


def test_metas_files_beside_others_are_not_chosen_between(tmp_path):
    """Both kinds of consolidated file, or a config.json without its weights: one sentence each."""
    save_model(
        tmp_path / "hf",
        Transformer(ModelConfig.from_family("llama", n_layer=1, n_head=2, n_embd=16, vocab_size=V)),
    )
    checkpoint.convert(tmp_path / "hf", tmp_path / "m", form="meta")
    load_model(tmp_path / "m", "cpu")
    tensors = torch.load(tmp_path / "m" / "consolidated.00.pth", weights_only=True)
    safetensors.torch.save_file(tensors, tmp_path / "m" / "consolidated.safetensors")
    with pytest.raises(UserError, match="holds both consolidated.00.pth and consolidated.saf"):
        load_model(tmp_path / "m", "cpu")
    (tmp_path / "m" / "consolidated.00.pth").unlink()
    load_model(tmp_path / "m", "cpu")
    shutil.copy(tmp_path / "hf" / "config.json", tmp_path / "m")
    with pytest.raises(UserError, match="move config.json away"):
        load_model(tmp_path / "m", "cpu")


def header_of(path, text: bytes):
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    return path


@pytest.mark.parametrize("shape, dtype, offsets", [
    ([2 ** 63 - 1] * 60_000, "F32", [0, 0]), ([1] * 100_000, "F32", [0, 4]),
    ([10 ** 4000], "F32", [0, 0]), ([1], "x" * 10 ** 6, [0, 4]), ([1], "F32", [10 ** 4000, 4]),
    ([1], "F32", [0] * 10 ** 5)], ids=range(6))
@pytest.mark.parametrize("name", ["a", "n" * 10 ** 6])
def test_a_hostile_header_is_one_short_sentence_in_no_time(shape, dtype, offsets, name, tmp_path):
    text = json.dumps({name: {"dtype": dtype, "shape": shape, "data_offsets": offsets}})
    file, start = header_of(tmp_path / "model.safetensors", text.encode()), time.process_time()
    with pytest.raises(UserError) as e:
        read_header(file)
    assert len(str(e.value)) < 700 and "\n" not in str(e.value)
    assert time.process_time() - start < 1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "model-00001-of-*",
                                  "model.safetensors.index.json"])
def test_a_pipe_or_a_device_in_the_place_of_a_file_is_refused(file, tmp_path):
    """Opening a pipe waits for a writer for ever, reading /dev/zero never ends."""
    save_model(
        tmp_path / "m",
        Transformer(ModelConfig.from_family("llama", n_layer=1, n_head=2, n_embd=16, vocab_size=V)),
        shard_bytes=4000,
    )
    if file == "model.safetensors":
        (tmp_path / "m" / "model.safetensors.index.json").unlink()
    if "*" in file:
        file = next((tmp_path / "m").glob(file)).name
    for make in (os.mkfifo, lambda path: os.symlink("/dev/zero", path)):
        (tmp_path / "m" / file).unlink(missing_ok=True)
        make(tmp_path / "m" / file)
        with pytest.raises(UserError):
            load_model(tmp_path / "m", "cpu")

# ------------------------------------------------------------------------ which names it has


MOE = dict(BASE, num_experts_per_tok=2, moe_intermediate_size=12)
MIXTURES = {
    "mixtral": lambda: T.MixtralForCausalLM(T.MixtralConfig(**BASE, num_local_experts=3)),
    "qwen3_moe": lambda: T.Qwen3MoeForCausalLM(T.Qwen3MoeConfig(**MOE, num_experts=3)),
    "glm4_moe": lambda: T.Glm4MoeForCausalLM(T.Glm4MoeConfig(**MOE, n_routed_experts=3))}


@pytest.mark.parametrize("kind", MIXTURES)
def test_experts_in_two_tensors_a_layer_are_transformers_experts(kind, tmp_path):
    """As transformers 5 holds them: gate_up_proj (E, 2 I, H), down_proj (E, H, I)."""
    theirs = scramble(MIXTURES[kind]())
    theirs.save_pretrained(tmp_path / "fused", save_original_format=False)
    theirs.save_pretrained(tmp_path / "apart")
    names = weight_index(tmp_path / "fused").keys()
    assert any(n.endswith("mlp.experts.gate_up_proj") for n in names)
    ours = load_model(tmp_path / "fused", "cpu")
    assert close(ours.logits(ids()), logits(theirs))
    assert torch.equal(load_model(tmp_path / "apart", "cpu").logits(ids()), ours.logits(ids()))
    checkpoint.convert(tmp_path / "fused", tmp_path / "again")          # as it is published
    published = weight_index(tmp_path / "apart")
    assert weight_index(tmp_path / "again").keys() == published.keys()
    assert torch.equal(load_model(tmp_path / "again", "cpu").logits(ids()), ours.logits(ids()))

    file = tmp_path / "fused" / "model.safetensors"
    good = safetensors.torch.load_file(file)
    stack = next(n for n in good if n.endswith("gate_up_proj"))
    for tensor, words in [(good[stack][:2], "3"), (good[stack].transpose(1, 2), "settings"),
                          (good[stack][:, :-2], "settings"), (None, "lack")]:
        changed = {n: t.contiguous() for n, t in {**good, stack: tensor}.items() if t is not None}
        safetensors.torch.save_file(changed, file)
        with pytest.raises(UserError, match=words):
            load_model(tmp_path / "fused", "cpu")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_a_tied_matrix_under_its_other_name_alone(kind, tmp_path):
    """safetensors' own save_model writes one name of two, and that is lm_head.weight."""
    if kind == "gpt2":
        theirs = scramble(T.GPT2LMHeadModel(T.GPT2Config(
            vocab_size=V, n_embd=16, n_layer=2, n_head=2, n_positions=32)))
    elif kind == "llama":
        theirs = llama(tie_word_embeddings=True)
    else:
        theirs = scramble(T.Gemma2ForCausalLM(T.Gemma2Config(**BASE)))
    theirs.config.save_pretrained(tmp_path)
    safetensors.torch.save_model(theirs, str(tmp_path / "model.safetensors"),
                                 metadata={"format": "pt"})
    stored = weight_index(tmp_path)
    assert "lm_head.weight" in stored and not any("embed_tokens" in n or "wte" in n for n in stored)
    assert close(load_model(tmp_path, "cpu").logits(ids()), logits(theirs))
    # a model that is not tied has lost its embedding
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "tie_word_embeddings": False}))
    with pytest.raises(UserError, match="lack tensor"):
        load_model(tmp_path, "cpu")


def test_an_output_matrix_that_is_missing_is_not_guessed(tmp_path):
    """Silence means transformers' default, untied in Llama: the body alone is no model."""
    theirs = llama()
    theirs.model.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(
        {k: v for k, v in settings.items() if k != "tie_word_embeddings"}))
    with pytest.raises(UserError, match="lack tensor 'lm_head.weight'"):
        load_model(tmp_path, "cpu")

# ------------------------------------------------------------------ text models with a wrapper


def gemma3(**outer):
    text = dict(BASE, sliding_window=5, num_hidden_layers=7, rope_scaling={
        "rope_type": "linear", "factor": 8.0}, query_pre_attn_scalar=24)
    return scramble(T.Gemma3ForConditionalGeneration(T.Gemma3Config(
        text_config=text, mm_tokens_per_image=4, vision_config=dict(
            VISION, model_type="siglip_vision_model"), eos_token_id=[1, 7], **outer)))


def mistral3(text_type="mistral", **outer):
    text = dict(BASE, model_type=text_type, rope_theta=1e9, rms_norm_eps=1e-5)
    if text_type == "mistral":
        text["sliding_window"] = None
    return scramble(T.Mistral3ForConditionalGeneration(T.Mistral3Config(
        text_config=text, vision_config=dict(VISION, model_type="pixtral", head_dim=4), **outer)))


WRAPPED = {"gemma3": (gemma3, {}, "gemma3_text"),
           "mistral3": (mistral3, dict(tie_word_embeddings=False), "llama"),
           "mistral3 tied": (mistral3, dict(tie_word_embeddings=True), "llama"),
           "mistral3 of a qwen3": (mistral3, dict(text_type="qwen3", tie_word_embeddings=False),
                                   "qwen3")}


@pytest.mark.parametrize("published", [True, False], ids=["published names", "names in memory"])
@pytest.mark.parametrize("name", WRAPPED)
def test_the_text_model_of_a_wrapper_is_read_and_the_rest_is_named(name, published, tmp_path,
                                                                   capsys):
    make, settings, saved_as = WRAPPED[name]
    theirs = make(**settings)
    theirs.save_pretrained(tmp_path / "m", save_original_format=published)
    names = weight_index(tmp_path / "m").keys()
    assert any(n.startswith("language_model.") for n in names) == published
    ours = load_model(tmp_path / "m", "cpu")
    assert close(ours.logits(ids()), logits(theirs))
    said = capsys.readouterr().err
    assert "vision_tower" in said and "multi_modal_projector" in said and said.count("\n") == 1
    checkpoint.convert(tmp_path / "m", tmp_path / "text")
    back = T.AutoModelForCausalLM.from_pretrained(tmp_path / "text", attn_implementation="eager")
    assert back.config.model_type == saved_as and close(logits(back.eval()), logits(theirs))
    if name == "gemma3":
        assert back.config.eos_token_id == [1, 7]               # the outer word counts


def test_a_wrapper_that_says_nothing_of_ties_has_the_matrix_of_its_file(tmp_path):
    """As Mistral Small 3.1 was published: transformers' default is tied, and the file is not."""
    theirs = mistral3(tie_word_embeddings=False)
    theirs.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    del settings["tie_word_embeddings"]
    settings["text_config"].pop("tie_word_embeddings", None)
    (tmp_path / "config.json").write_text(json.dumps(settings))
    expected = T.AutoModelForImageTextToText.from_pretrained(tmp_path, attn_implementation="eager")
    assert close(logits(expected.eval()), logits(theirs))
    ours = load_model(tmp_path, "cpu")
    assert not ours.config.tie_word_embeddings and close(ours.logits(ids()), logits(theirs))


def test_the_published_gemma_3_4b_leaves_its_defaults_out():
    """Its text_config, word for word; the sizes that it does not say are the class's."""
    text = dict(hidden_size=2560, intermediate_size=10240, model_type="gemma3_text",
                num_hidden_layers=34, rope_scaling={"factor": 8.0, "rope_type": "linear"},
                sliding_window=1024)
    outer = dict(model_type="gemma3", text_config=text, vision_config={}, mm_tokens_per_image=256,
                 boi_token_index=255999, eoi_token_index=256000, image_token_index=262144,
                 eos_token_id=[1, 106], initializer_range=0.02, torch_dtype="bfloat16",
                 transformers_version="4.50.0.dev0",
                 architectures=["Gemma3ForConditionalGeneration"])
    hf, wrapped = checkpoint.unwrap_settings(outer, "config.json")
    config = checkpoint.model_config_from_hf({**hf, "tie_word_embeddings": True})
    theirs = T.Gemma3Config(**{k: v for k, v in outer.items() if k != "model_type"}).text_config
    assert wrapped and config.vocab_size == theirs.vocab_size == 262208
    assert (config.n_head, config.n_kv_head, config.head_dim) == (8, 4, 256) == (
        theirs.num_attention_heads, theirs.num_key_value_heads, theirs.head_dim)
    assert config.layer_types == theirs.layer_types and config.rope_scaling["factor"] == 8.0


@pytest.mark.parametrize("changes, words", [
    (dict(text_config=None), "text_config"), (dict(text_config=[1]), "text_config"),
    (dict(text_config={"model_type": "ministral3"}), "ministral3"),
    (dict(text_config={"model_type": "mistral"}), "hidden_size|vocab_size"),
    (dict(text_config={"model_type": "meta"}), "meta"), (dict(model_type="llava"), "mistral3"),
    (dict(rope_scaling={"rope_type": "yarn", "factor": 2.0}), "rope_scaling"),
    (dict(quantization_config={"bits": 4}), "quantised"), (dict(is_causal=False), "is_causal"),
    (dict(model_type="gemma3"), "gemma3_text")], ids=str)
def test_a_wrapper_that_is_not_understood_is_refused(changes, words, tmp_path):
    mistral3(tie_word_embeddings=False).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, **changes}))
    with pytest.raises(UserError, match=words) as e:
        load_model(tmp_path, "cpu")
    assert "\n" not in str(e.value)


def test_a_cap_that_transformers_does_not_apply_to_a_wrapped_gemma3_is_refused(tmp_path):
    """Gemma3ForCausalLM caps its logits, Gemma3ForConditionalGeneration does not: its logits with
    the setting are those without."""
    theirs = gemma3()
    theirs.save_pretrained(tmp_path)
    ids = torch.arange(20)[None] % V
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["text_config"]["final_logit_softcapping"] = 0.5
    (tmp_path / "config.json").write_text(json.dumps(settings))
    again = T.Gemma3ForConditionalGeneration.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.allclose(again(input_ids=ids).logits, theirs.eval()(input_ids=ids).logits)
    with pytest.raises(UserError, match="final_logit_softcapping = 0.5 is not supported in a gemm"):
        load_model(tmp_path, "cpu")

# ---------------------------------------------------------------- what others ask of our files


@pytest.mark.parametrize("kind", ["gemma2", "gemma3"])
def test_gemma_without_windows_opens_in_transformers(kind, tmp_path):
    shape = dict(n_layer=2, n_head=2, n_embd=16, head_dim=8, vocab_size=V, block_size=64)
    ours = scramble(
        Transformer(
            ModelConfig.from_family(kind, **shape, sliding_window=0, sliding_window_pattern=0)
        )
    )
    save_model(tmp_path, ours)
    theirs = T.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert close(logits(theirs), ours.logits(ids()))
    assert load_model(tmp_path, "cpu").config == ours.config


def test_keys_are_written_where_transformers_has_them(tmp_path):
    """n_ctx of GPT-2, for llama.cpp's converter; use_sliding_window of Qwen's families alone."""
    shape = dict(n_layer=1, n_head=2, n_embd=16, vocab_size=V, block_size=64)
    for kind, changes in [("gpt2", {}), ("mistral", dict(sliding_window=8)), ("qwen2", {}),
                          ("mixtral", dict(sliding_window=8))]:
        save_model(tmp_path / kind, Transformer(ModelConfig.from_family(kind, **shape, **changes)))
        said = json.loads((tmp_path / kind / "config.json").read_text())
        assert said["model_type"] == kind
        assert said.get("n_ctx") == (64 if kind == "gpt2" else None)
        assert ("use_sliding_window" in said) == (kind == "qwen2")
        assert load_model(tmp_path / kind, "cpu").config.block_size == 64
