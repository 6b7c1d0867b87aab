"""Edits of config.json x families: each is refused in a sentence, or gives transformers' logits.

For every family, every key of its own transformers class and of all the others' is changed, one at
a time. What we accept must compute what transformers computes from the same file and weights:
a key that is read here and ignored there, or the other way round, fails.
"""
import json
import time

import pytest
import torch
import transformers as T
from transformers.initialization import no_init_weights

from checkpoint import convert, load_model
from config import UserError
from families import FAMILIES, ROWS
from formats.huggingface import KINDS, effective, model_config_from_hf
from formats.safetensors import note

T.logging.set_verbosity_error()
T.logging.disable_progress_bar()

V = 48
BASE = dict(vocab_size=V, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
            bos_token_id=0, eos_token_id=1, pad_token_id=None)
MOE = dict(num_experts_per_tok=2, moe_intermediate_size=8)
WINDOW = dict(sliding_window=3)
YARN = {"rope_parameters": dict(rope_type="yarn", rope_theta=1e4, factor=4.0,
                                original_max_position_embeddings=8)}
LLAMA3 = {"rope_parameters": dict(rope_type="llama3", rope_theta=1e4, factor=4.0,
                                  original_max_position_embeddings=8, low_freq_factor=1.0,
                                  high_freq_factor=4.0)}
# model_type -> (transformers' configuration class, its settings beside BASE): windows, scaled
# positions and biases are on, or the edits around them would change nothing
CLASSES = {
    "gpt2": ("GPT2", None), "llama": ("Llama", YARN),
    "qwen2": ("Qwen2", dict(WINDOW, use_sliding_window=True, max_window_layers=1)),
    "qwen3": ("Qwen3", dict(WINDOW, use_sliding_window=True, max_window_layers=1, head_dim=8,
                            attention_bias=True)),
    "arcee": ("Arcee", LLAMA3), "mistral": ("Mistral", WINDOW),
    "mixtral": ("Mixtral", dict(WINDOW, num_local_experts=3)),
    "qwen3_moe": ("Qwen3Moe", dict(MOE, **WINDOW, use_sliding_window=True, num_experts=3)),
    "gemma2": ("Gemma2", dict(WINDOW, head_dim=8)),
    "gemma3_text": ("Gemma3Text", dict(WINDOW, head_dim=8)),
    "glm": ("Glm", dict(head_dim=8)), "glm4": ("Glm4", dict(head_dim=8)),
    "glm4_moe": ("Glm4Moe", dict(MOE, n_routed_experts=3, head_dim=8, use_qk_norm=True)),
    "olmo2": ("Olmo2", dict(attention_bias=True)), "cohere": ("Cohere", {}),
    "smollm3": ("SmolLM3", dict(WINDOW, no_rope_layer_interval=2)),
    "granite": ("Granite", dict(embedding_multiplier=3.0, logits_scaling=2.0)),
    "gemma": ("Gemma", dict(head_dim=8)), "phi3": ("Phi3", WINDOW),
    "seed_oss": ("SeedOss", dict(head_dim=8)), "helium": ("Helium", dict(head_dim=8)),
    "ernie4_5": ("Ernie4_5", dict(head_dim=8)), "cwm": ("Cwm", dict(WINDOW, head_dim=8)),
    "ministral": ("Ministral", dict(WINDOW, head_dim=8)),
    "starcoder2": ("Starcoder2", WINDOW), "stablelm": ("StableLm", {}),
    "jais2": ("Jais2", dict(head_dim=8)), "internlm3": ("InternLM3", dict(head_dim=8)),
    "iquestcoder": ("IQuestCoder", dict(head_dim=8)), "olmo3": ("Olmo3", WINDOW),
    "olmoe": ("Olmoe", dict(num_experts=3, num_experts_per_tok=2)),
    "cohere2": ("Cohere2", WINDOW), "exaone4": ("Exaone4", dict(WINDOW, sliding_window_pattern=2)),
    "vaultgemma": ("VaultGemma", dict(WINDOW, head_dim=8)),
    "hyperclovax": ("HyperCLOVAX", dict(head_dim=8, logits_scaling=2.0)),
    "dots1": ("Dots1", dict(MOE, **WINDOW, n_routed_experts=3, n_shared_experts=1,
                            max_window_layers=1)),
    "solar_open": ("SolarOpen", dict(MOE, n_routed_experts=3, head_dim=8)),
    "minimax_m2": ("MiniMaxM2", dict(num_local_experts=3, num_experts_per_tok=2, head_dim=8)),
    "hy_v3": ("HYV3", dict(MOE, num_experts=3, head_dim=8)),
}
# Keys of no such class that transformers reads all the same, or another program
FURTHER = ("partial_rotary_factor", "rope_theta", "rope_local_base_freq", "rope_scaling",
           "original_max_position_embeddings", "is_causal", "attention_chunk_size", "clip_qkv",
           "sliding_window_pattern", "_sliding_window_pattern", "num_experts", "num_local_experts",
           "n_ctx", "n_head", "qk_layernorm", "rotary_pct", "use_parallel_residual", "alibi",
           "logit_softcapping", "scale_emb", "num_nextn_predict_layers", "rope_interleaved")
ROTARY = [{"rope_type": "linear", "factor": 2.0}, {"type": "linear", "factor": 2.0},
          {"rope_type": "linear", "factor": 2.0, "rope_theta": 77.0}, {}, None,
          {"rope_type": "yarn", "factor": 4.0}, {"rope_type": "default", "rope_theta": 77.0},
          {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
          {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.0},
          {"rope_type": "dynamic", "factor": 4.0}, {"rope_theta": 77.0},
          {"rope_type": "default", "partial_rotary_factor": 0.25}]


def ids():
    return torch.randint(0, V, (1, 20), generator=torch.Generator().manual_seed(1))


def values_for(key, value) -> list:
    """What a key is changed to, by the type of what it says; None is a null in the file."""
    if key in ("rope_scaling", "rope_parameters"):
        # what is in one is read like what is in the other: not all of it twice
        flat = ROTARY if key == "rope_scaling" else ROTARY[::3]
        return [*flat, {"full_attention": dict(ROTARY[0]), "sliding_attention": dict(ROTARY[6])}]
    if key == "layer_types":
        return [None, ["full_attention"] * 2, ["sliding_attention"] * 2,
                ["full_attention", "sliding_attention"]]
    if key == "no_rope_layers":
        return [None, [1, 1], [0, 1], []]
    if key in ("sliding_window", "original_max_position_embeddings"):
        return [None, 5, 0]
    if isinstance(value, bool):
        return [None, not value]
    if isinstance(value, str):
        return [None, "relu", "gelu_new", "quick_gelu"]
    if isinstance(value, (int, float)):
        return [None, value + 1, type(value)(0)]
    return [True, False, 2, 0.5, "relu"]


class Family:
    """A random model of a family in transformers: its file, its weights, its logits."""

    def __init__(self, kind, directory):
        name, settings = CLASSES[kind]
        self.kind, self.cls = kind, getattr(T, f"{name}Config")
        self.path = directory
        self.known: dict = {}
        shape = {**BASE, **(settings or {})}
        if settings is None:
            shape = dict(vocab_size=V, n_embd=16, n_layer=2, n_head=2, n_positions=32)
        model = T.AutoModelForCausalLM.from_config(self.cls(**shape), attn_implementation="eager")
        g = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for key, p in [*model.named_parameters(), *(
                    (k, b) for k, b in model.named_buffers() if k.endswith("correction_bias"))]:
                p.copy_(torch.randn(p.shape, generator=g) * 0.5 + ("norm" in key))
        model.eval().save_pretrained(directory)
        self.architecture = type(model)
        self.weights = model.state_dict()
        self.hf = json.loads((directory / "config.json").read_text())
        self.logits = model(ids()).logits.detach()

    def config(self, hf):
        """transformers' configuration of a file; None where it refuses it."""
        try:
            return self.cls.from_dict(json.loads(json.dumps(hf)))
        except Exception:
            return None

    def theirs(self, hf):
        """transformers' logits of a file with these weights; None where they do not fit."""
        config = self.config(hf)
        try:
            config._attn_implementation = "eager"
            with no_init_weights():
                model = self.architecture(config).eval()
            missing, extra = model.load_state_dict(self.weights, strict=False)
            with torch.no_grad():
                return None if missing or extra else model(ids()).logits
        except Exception:                       # a shape, a type, a window that is not there
            return None

    def ours(self, hf):
        """Our logits of a file; of two files that are read alike, the same."""
        read = repr(model_config_from_hf(hf))
        if read not in self.known:
            (self.path / "config.json").write_text(json.dumps(hf))
            self.known[read] = load_model(self.path, "cpu").logits(ids())
        return self.known[read]


def differ(a, b) -> bool:
    return not torch.allclose(a, b, rtol=1e-3, atol=1e-3)


def test_every_family_is_here():
    assert CLASSES.keys() == {row.model_type for row in ROWS if row.writable}


@pytest.mark.parametrize("kind", CLASSES)
def test_every_edit_of_config_json_is_refused_or_transformers(kind, tmp_path):
    family = Family(kind, tmp_path / "m")
    defaults = {}                                   # every key of every class, its own last
    for name, _ in [*CLASSES.values(), CLASSES[kind]]:
        defaults |= json.loads(getattr(T, f"{name}Config")().to_json_string(use_diff=False))
    row = FAMILIES[kind]
    keys = {*defaults, *FURTHER, *row.reads, *row.only, *row.synonyms} - {"model_type", "dtype"}
    base = effective(model_config_from_hf(family.hf))
    wrong, quiet, read, refused = [], [], 0, 0
    for key in sorted(keys):
        said = family.hf.get(key, defaults.get(key))
        for value in values_for(key, said):
            hf = {**family.hf, key: value}
            if value == family.hf.get(key, "nothing") and type(value) is type(family.hf.get(key)):
                continue
            try:
                same = effective(model_config_from_hf(json.loads(json.dumps(hf)))) == base
                ours = None if same else family.ours(hf)
            except UserError as e:
                refused += 1
                assert "\n" not in str(e) and len(str(e)) < 600
                continue
            if same:
                quiet.append((key, value))
                continue
            read += 1
            theirs = family.theirs(hf)
            if theirs is not None and differ(ours, theirs):
                wrong.append((key, value))
    wrong += changed(family, quiet)
    assert not wrong
    assert read > 3 and refused > 100 and len(quiet) > 50


def changed(family, edits) -> list:
    """Those of the edits that change transformers' logits, all of which leave ours alone."""
    edits = [(k, v) for k, v in edits if family.config({**family.hf, k: v}) is not None]
    rounds: list[dict] = []                         # one value of a key in each
    for key, value in edits:
        for one in rounds:
            if key not in one:
                one[key] = value
                break
        else:
            rounds.append({key: value})

    def search(one: dict) -> list:                  # by halves, as bisecting does
        theirs = family.theirs({**family.hf, **one})
        if theirs is not None and not differ(theirs, family.logits):
            return []
        if len(one) == 1:
            return [] if theirs is None else [*one.items()]
        items = [*one.items()]
        return [hit for half in (items[::2], items[1::2]) for hit in search(dict(half))]
    return [hit for one in rounds for hit in search(one)]


LONG = ("x" * 10 ** 5, [0] * 10 ** 5, ["full_attention"] * 10 ** 4, [-1] * 5000, 10 ** 4000,
        {"a" * 10 ** 5: 1}, {"rope_type": "x" * 10 ** 5}, list(range(5000)))


@pytest.mark.parametrize("kind", ["gpt2", "qwen3", "gemma3_text", "glm4_moe", "smollm3", "chatglm",
                                  "minicpm", "handmade"])
def test_a_value_of_any_length_is_one_short_sentence(kind):
    """Of every key that the family reads, of one that nobody knows, and as the key's own name."""
    base = dict(BASE, n_embd=16, n_layer=2, n_head=2, n_positions=32, num_layers=2,
                padded_vocab_size=V, ffn_hidden_size=24)
    own = {"n_layer": 2, "n_embd": 16, "n_head": 2}
    row = FAMILIES.get(kind)
    keys = ({theirs for _, theirs in row.fields} | {*row.reads, *row.only, *row.synonyms,
            "rope_scaling", "rope_parameters"}) if row else {"handmade"}
    known = {k: v for k, v in base.items() if row and k in keys}
    start, count = time.process_time(), 0
    for key in [*keys, "unknown", "u" * 10 ** 5, "model_type"]:
        for value in LONG:
            hf = {**known, "model_type": kind, **({} if row else {"handmade": own}), key: value}
            try:
                model_config_from_hf(hf)
            except UserError as e:
                count += 1
                assert len(str(e)) < 700 and "\n" not in str(e), (key, str(e)[:200])
    for name in {} if row else [*KINDS, "u" * 10 ** 5]:
        for value in LONG:
            try:
                model_config_from_hf({"model_type": kind, "handmade": {**own, name: value}})
            except UserError as e:
                count += 1
                assert len(str(e)) < 700 and "\n" not in str(e), (name, str(e)[:200])
    assert count > 20 and time.process_time() - start < 5


def test_a_model_of_our_own_says_all_of_itself_in_its_own_section():
    own = {"model_type": "handmade", "handmade": {"n_layer": 2, "n_embd": 16, "n_head": 2}}
    model_config_from_hf({**own, "dtype": "float32", "eos_token_id": 3})
    with pytest.raises(UserError, match="rope_scaling"):
        model_config_from_hf({**own, "rope_scaling": {"rope_type": "linear", "factor": 2.0}})


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_windows_that_are_switched_off_and_listed_are_refused(kind, tmp_path):
    """transformers ends in a TypeError, which is no logits."""
    family = Family(kind, tmp_path / "m")
    hf = {**family.hf, "use_sliding_window": False, "layer_types": ["sliding_attention"] * 2}
    with pytest.raises(UserError, match="layer_types with windows"):
        family.ours(hf)
    assert family.theirs(hf) is None
    plain = {**hf, "layer_types": ["full_attention"] * 2}
    assert not differ(family.theirs(plain), family.ours(plain))


def test_two_names_of_one_setting_may_not_disagree():
    for kind, first, second in [("gpt2", "n_layer", "num_hidden_layers"),
                                ("qwen3_moe", "num_experts", "num_local_experts"),
                                ("mixtral", "num_local_experts", "num_experts")]:
        sizes = dict(BASE, n_embd=16, n_layer=2, n_head=2) if kind == "gpt2" else dict(
            BASE, num_experts_per_tok=2)
        sizes = {k: v for k, v in sizes.items() if kind != "gpt2" or not k.startswith(
            ("hidden", "num_", "inter", "max_"))}
        hf = {**sizes, "model_type": kind, first: 3}
        assert model_config_from_hf({**hf, second: 3}) == model_config_from_hf(hf)
        with pytest.raises(UserError, match=f"{second} = 4 and {first} = 3 are two names"):
            model_config_from_hf({**hf, second: 4})
        del hf[first]
        assert model_config_from_hf({**hf, second: 3}) == model_config_from_hf({**hf, first: 3})


def test_rope_scaling_that_would_lose_the_base_names_it(capsys):
    """transformers takes 10,000 there: the base of rope_parameters is lost, and nobody means it."""
    hf = {**BASE, "model_type": "qwen3", "rope_parameters": {"rope_theta": 1e6},
          "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    assert T.Qwen3Config(**{**hf, "rope_scaling": dict(hf["rope_scaling"])}).rope_parameters[
        "rope_theta"] == 10000
    with pytest.raises(UserError, match="rope_theta = 1000000.0 into it"):
        model_config_from_hf(hf)
    # the base inside counts before the one at the top, which is said
    note.cache_clear()
    config = model_config_from_hf({**hf, "rope_scaling": None, "rope_theta": 5e5})
    assert config.rope_theta == 1e6 and "500000.0 does not count" in capsys.readouterr().err
    for change in ({"rope_theta": 1e6}, {"rope_scaling": {**hf["rope_scaling"],
                                                         "rope_theta": 1e6}}):
        config = model_config_from_hf({**hf, **change})
        assert config.rope_theta == 1e6 and config.rope_scaling["factor"] == 2.0


# What published files of these families say beside the model: SmolLM2's, Qwen's distillations',
# Unsloth's, and dumps of transformers 4.0 to 4.2, which wrote every default
BESIDE = dict(
    is_llama_config=True, rope_interleaved=False, use_mrope=False, unsloth_fixed=True,
    unsloth_version="2025.1", _name_or_path="gpt2", _num_labels=1, _attn_implementation="eager",
    torch_dtype="bfloat16", transformers_version="4.2.0", auto_map={"AutoModel": "m.Model"},
    output_past=True, is_decoder=False, is_encoder_decoder=False, add_cross_attention=False,
    tie_encoder_decoder=False, pruned_heads={}, xla_device=None, do_sample=False, num_beams=1,
    early_stopping=False, temperature=0.7, top_k=50, top_p=0.9, repetition_penalty=1.0,
    length_penalty=1.0, no_repeat_ngram_size=0, bad_words_ids=None, num_return_sequences=1,
    diversity_penalty=0.0, max_length=20, min_length=0, output_scores=False, id2label={"0": "A"},
    label2id={"A": 0}, num_labels=2, summary_type="cls_index", summary_first_dropout=0.1,
    task_specific_params={"text-generation": {"do_sample": True}}, use_cache=False, prefix=None,
    decoder_start_token_id=None, sep_token_id=3, return_dict=True, torchscript=False,
    gradient_checkpointing=False, pretraining_tp=2, neftune_noise_alpha=5.0, eos_token_id=[1, 2],
    bos_token_id=7, pad_token_id=3, tokenizer_class="GPT2Tokenizer", max_sequence_length=2048,
    initializer_range=0.5, finetuning_task=None, use_bfloat16=False, classifier_dropout=None,
    chunk_size_feed_forward=0, cache_implementation="hybrid", router_aux_loss_coef=0.1)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "mixtral", "gemma2", "glm4"])
def test_what_published_files_say_beside_the_model_changes_nothing(kind, tmp_path):
    family = Family(kind, tmp_path / "m")
    hf = {**family.hf, **BESIDE}
    read, base = (effective(model_config_from_hf(x)) for x in (hf, family.hf))
    assert {name for name in base if read[name] != base[name]} <= {"init_std"}
    assert not differ(family.theirs(hf), family.logits)


@pytest.mark.parametrize("kind", CLASSES)
def test_convert_keeps_what_it_does_not_write(kind, tmp_path):
    """transformers' own reading of the file before and after: the same but for where it lies. Only
    what a copy cannot say is left out: code that is not copied, the type of other weights."""
    hf = {**Family(kind, tmp_path / "m").hf, **BESIDE, "_note": "mine", "language": "en",
          "attention_dropout": 0.25, "resid_pdrop": 0.25}
    (tmp_path / "m" / "config.json").write_text(json.dumps(hf))
    convert(tmp_path / "m", tmp_path / "new", "bfloat16")
    new = json.loads((tmp_path / "new" / "config.json").read_text())
    known = {"gpt2": {"n_inner"}, "mixtral": {"head_dim"}, "glm4_moe": {"num_nextn_predict_layers"}}
    silent = {"auto_map", "torch_dtype", *known.get(kind, ())}      # null there, the number here
    assert {k for k in hf if k not in new or new[k] != hf[k]} - {"dtype"} <= silent
    assert new["dtype"] == "bfloat16" and new["attention_dropout"] == 0.25
    before, after = (T.AutoConfig.from_pretrained(tmp_path / x).to_dict() for x in ("m", "new"))
    assert {k for k in before if before[k] != after.get(k)} - {"dtype", "_name_or_path"} <= silent


@pytest.mark.parametrize("local", [None, 50.0, 2e4])
def test_the_base_of_gemma3s_windows_in_the_words_of_transformers_4(local, tmp_path):
    """As the published files say it: rope_theta and rope_local_base_freq, no rope_parameters."""
    family = Family("gemma3_text", tmp_path / "m")
    hf = {k: v for k, v in family.hf.items() if k != "rope_parameters"}
    hf |= {"rope_theta": 300.0, **({"rope_local_base_freq": local} if local else {})}
    hf["layer_types"] = ["sliding_attention", "full_attention"]
    theirs = family.theirs(hf)
    assert theirs is not None and not differ(theirs, family.ours(hf))
    assert model_config_from_hf(hf).rope_local_theta == (local or 1e4)


def test_a_factor_that_leaves_no_digit_of_the_angle_is_refused(tmp_path):
    hf = {**Family("qwen3", tmp_path / "m").hf, "rope_parameters": None, "rope_theta": 1e4,
          "rope_scaling": {"rope_type": "yarn", "factor": 1e-6,
                           "original_max_position_embeddings": 32}}
    with pytest.raises(UserError, match="gives no frequencies"):
        model_config_from_hf(hf)


@pytest.mark.parametrize("local", [0, -1, "10000"])
def test_a_base_of_gemma3s_windows_that_is_no_base_is_refused(local, tmp_path):
    """0 is ours for "as in the other layers", which transformers does not take it for."""
    hf = {**Family("gemma3_text", tmp_path / "m").hf, "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": local}}}
    with pytest.raises(UserError, match="expected a positive rope_theta"):
        model_config_from_hf(hf)
