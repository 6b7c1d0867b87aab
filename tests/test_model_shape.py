"""The size, cost and first weights of a model, mistakes in its shape, and the script.
"""
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from config import UserError
from layers.rope import rope_frequencies
from model import ModelConfig, Transformer
from families import PRESETS
from model_base import BIASES, FLAGS, LLAMA, SMALL, backend, close, make, some_ids

ROOT = Path(__file__).resolve().parent.parent


# -------------------------------------------------------------------- size and cost

# What the models' authors, or Hugging Face's model cards, count
PUBLISHED = {
    "gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080,
    "gemma-2b": 2_506_172_416, "gemma-7b": 8_537_680_896, "olmoe-1b-7b": 6_919_161_856,
    "phi-3-mini-4k": 3_821_079_552, "ernie-4.5-0.3b": 360_748_032,
    "gpt2-xl": 1_557_611_200, "llama-7b": 6_738_415_616, "llama2-7b": 6_738_415_616,
    "llama3-8b": 8_030_261_248, "llama3.1-8b": 8_030_261_248, "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824, "llama2-70b": 68_976_648_192, "mistral-7b": 7_241_732_096,
    "mixtral-8x7b": 46_702_792_704, "qwen2.5-0.5b": 494_032_768, "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920, "qwen3-1.7b": 1_720_574_976, "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360, "qwen3-14b": 14_768_307_200, "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624, "gemma2-2b": 2_614_341_888, "gemma3-270m": 268_098_176,
    "gemma3-1b": 999_885_952, "chatglm3-6b": 6_243_584_000, "glm-4-9b": 9_399_951_360,
    "glm-4-9b-0414": 9_400_279_040, "minicpm-2b": 2_724_880_896, "olmo2-1b": 1_484_916_736,
    "smollm2-135m": 134_515_008,
    # its report says 106B; the file has one more layer, which predicts the token after next
    "glm-4.5-air": 106_852_251_264,
}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_published_number_of_parameters(name):
    with torch.device("meta"):
        model = Transformer(ModelConfig.from_preset(name))
    assert model.parameter_count() == PUBLISHED[name]
    # nanoGPT's N: a learned position table is a look-up, and not counted
    table = model.config.block_size * model.config.n_embd
    learned = model.config.position == "learned"
    assert model.parameter_count(embeddings=False) == PUBLISHED[name] - learned * table


def test_preset_with_changes_and_of_a_wrong_name():
    assert ModelConfig.from_preset("gpt2", dropout=0.1, block_size=64).block_size == 64
    assert ModelConfig.from_preset("gpt2").block_size == 1024  # the table itself is untouched
    with pytest.raises(UserError, match="gpt-2.*choose.*gpt2-medium.*directory"):
        ModelConfig.from_preset("gpt-2")


COUNTED = {
    "gpt2": FLAGS["gpt2"], "untied": dict(BIASES, tie_word_embeddings=False),
    "grouped, gated": dict(LLAMA, n_kv_head=2), "wide heads": FLAGS["qwen3"],
    "odd width": dict(LLAMA, intermediate_size=83),
    "Gemma 3 without its windows": dict(FLAGS["gemma3"], sliding_window=24),
    "GLM-4": FLAGS["glm4"], "parallel": FLAGS["parallel"], "post-norm": FLAGS["post-norm"],
    "all experts chosen": dict(FLAGS["experts"], num_experts_per_tok=4),
    "a shared expert, all chosen": dict(FLAGS["shared expert"], num_experts_per_tok=4),
}


@pytest.mark.parametrize("name", COUNTED)
def test_flops_per_token_are_those_that_pytorch_counts(name):
    """MFU stands on this number. The reference computes the whole square of scores, as counted."""
    model, ids = make(COUNTED[name]).train(), some_ids(2, 24)
    tokens = ids.numel()
    for form in ("reference", "torch"):
        # PyTorch does not count its own SDPA on a CPU, which serves float32 and short prompts
        model.compute_dtype = torch.bfloat16 if form == "torch" else None
        with backend(form):
            with FlopCounterMode(display=False) as counter:
                model(ids)
            forward = counter.get_total_flops()
            with FlopCounterMode(display=False) as counter:
                model(ids).float().square().sum().backward()
            both = counter.get_total_flops()
        assert forward == tokens * model.flops_per_token(24, training=False)
        # a block by hand computes its scores a second time in the backward, 2 H D T a token a
        # layer, as FlashAttention does: work done over again is no progress, so MFU leaves it out
        c = model.config
        again = 2 * c.n_layer * c.n_head * c.head_dim * 24 if form == "torch" else 0
        assert both == tokens * (model.flops_per_token(24) + again)


def test_flops_count_the_chosen_experts_and_a_windows_keys():
    """Of 4 experts a token meets k, and past the window a longer context costs nothing."""
    one, two, four = (make(FLAGS["experts"], num_experts_per_tok=k) for k in (1, 2, 4))
    expert = 2 * 2 * 3 * 32 * 24                    # layers, multiply-add, matrices, C, I
    assert two.flops_per_token(8, False) - one.flops_per_token(8, False) == expert
    assert four.flops_per_token(8, False) - one.flops_per_token(8, False) == 3 * expert
    two.compute_dtype = torch.bfloat16
    with FlopCounterMode(display=False) as counter:
        two(some_ids(2, 24))                        # the sorted runs multiply nothing twice
    assert counter.get_total_flops() == 48 * two.flops_per_token(24, False)
    window = make(FLAGS["mistral"])                 # of 6 keys, in both layers
    assert window.flops_per_token(6) == window.flops_per_token(24)
    assert window.flops_per_token(6) - window.flops_per_token(5) == 3 * 2 * 4 * 32
    half = make(FLAGS["gemma3"])                    # in one of two layers
    assert half.flops_per_token(24) - half.flops_per_token(6) == 18 * 3 * 4 * 32


def test_flops_grow_with_the_context_by_attention_alone():
    model = make(FLAGS["gpt2"])
    c = model.config
    more = model.flops_per_token(20, training=False) - model.flops_per_token(10, training=False)
    assert more == 10 * c.n_layer * 4 * c.n_embd


# --------------------------------------------------------------------- initialisation

@pytest.mark.parametrize("flags", [FLAGS["gpt2"], dict(LLAMA, qkv_bias=True)])
def test_initial_weights_are_gpt2s(flags):
    """N(0, 0.02), residual projections smaller by sqrt(2 n_layer), biases 0, norms 1."""
    config = ModelConfig(**{**SMALL, **flags, "n_embd": 128, "n_layer": 3, "vocab_size": 500})
    for name, p in Transformer(config).named_parameters():
        if p.ndim == 1:
            assert (p == (0 if name.endswith("bias") else 1)).all(), name
            continue
        residual = "o_proj" in name or "down_proj" in name
        std = 0.02 / math.sqrt(2 * 3) if residual else 0.02
        # a sample deviation of n numbers strays by 1 / sqrt(2 n); four of those
        assert abs(p.std() / std - 1) < 4 / math.sqrt(2 * p.numel()), name
        assert abs(p.mean()) < 4 * std / math.sqrt(p.numel()), name


def test_initial_loss_is_that_of_guessing():
    """A fresh model knows nothing: log V nats a token, the first number of any training run."""
    model, ids = Transformer(ModelConfig(**{**SMALL, **LLAMA})), some_ids(4, 24)
    loss = F.cross_entropy(model.logits(ids).view(-1, 61), some_ids(4, 24).view(-1))
    assert abs(loss - math.log(61)) < 0.1


def test_initialisation_is_repeated_by_the_seed():
    def weights(seed):
        torch.manual_seed(seed)
        return torch.cat([p.flatten() for p in Transformer(ModelConfig(**SMALL)).parameters()])
    assert torch.equal(weights(1), weights(1)) and not torch.equal(weights(1), weights(2))


# -------------------------------------------------------------------------- a user's mistakes

@pytest.mark.parametrize("changes, words", [
    (dict(n_embd=33), ["n_embd 33", "n_head 4", "try n_embd 32"]),
    (dict(n_embd=3), ["n_embd 3", "n_head 4"]),
    (dict(n_kv_head=3), ["n_head 4", "n_kv_head 3"]),
    (dict(activation="swish"), ["activation", "'swish'", "silu"]),
    (dict(position="alibi"), ["position", "'alibi'", "learned, rope, none"]),
    (dict(norm="batchnorm"), ["norm", "'batchnorm'", "rmsnorm"]),
    (dict(position="rope", head_dim=7), ["head_dim 7", "odd"]),
    (dict(n_head=0), ["n_head"]), (dict(n_layer=-1), ["n_layer"]),
    (dict(vocab_size=0), ["vocab_size"]), (dict(n_kv_head=-2), ["n_kv_head"]),
    (dict(dropout=1.5), ["dropout"]),
])
def test_a_shape_that_cannot_be_is_a_sentence(changes, words):
    with pytest.raises(UserError) as e:
        ModelConfig(**{**SMALL, **changes})
    assert "\n" not in str(e.value)
    for word in words:
        assert word in str(e.value)


def test_the_advice_on_a_wrong_width_works():
    with pytest.raises(UserError, match="try n_embd") as e:
        ModelConfig(**{**SMALL, "n_embd": 3})
    advice = int(str(e.value).split("try n_embd ")[1])
    assert ModelConfig(**{**SMALL, "n_embd": advice}).head_dim >= 1


@pytest.mark.parametrize("scaling, words", [
    (dict(rope_type="longrope", factor=4.0), ["'longrope'", "llama3"]),
    (dict(rope_type="yarn", factor=4.0), ["original_max_position_embeddings"]),
    (dict(rope_type="linear"), ["factor"]),
    (dict(rope_type="llama3", factor=8.0), ["low_freq_factor"]),
])
def test_a_rope_scaling_that_is_unknown_or_incomplete(scaling, words):
    with pytest.raises(UserError) as e:
        rope_frequencies(ModelConfig(**{**SMALL, **LLAMA, "rope_scaling": scaling}))
    for word in words:
        assert word in str(e.value)


def test_more_tokens_than_learned_positions():
    model = make(FLAGS["gpt2"])
    assert model.logits(some_ids(1, 24)).shape == (1, 24, 61)
    with pytest.raises(UserError, match="25 tokens.*24 learned positions"):
        model(some_ids(1, 25))
    cache = model.new_cache(1, 30)
    model(some_ids(1, 24), cache=cache)
    with pytest.raises(UserError, match="25 tokens.*24 learned positions"):
        model(some_ids(1, 1), cache=cache)


@pytest.mark.parametrize("name", ["llama3", "no positions"])
def test_rope_goes_on_beyond_the_block_size(name):
    model, ids = make(FLAGS[name], dtype=torch.float64), some_ids(1, 30)
    close(model(ids)[:, :24], model(ids[:, :24]), 1e-6)


@pytest.mark.parametrize("bad", [61, 50256, -1])
def test_ids_outside_the_vocabulary(bad):
    """A tokenizer of another model: an error, never another row of the table in silence."""
    ids = some_ids(1, 5)
    ids[0, 2] = bad
    with pytest.raises((UserError, IndexError)):
        make(FLAGS["gpt2"])(ids)


# ------------------------------------------------------------------------------- the script

def script(*argv):
    return subprocess.run([sys.executable, str(ROOT / "model.py"), *argv], capture_output=True,
                          text=True)


def test_the_script_shows_what_a_preset_costs():
    done = script("--show=gpt2")
    assert (done.returncode, done.stderr) == (0, "")
    assert "124,439,808" in done.stdout and "1,024" in done.stdout
    with torch.device("meta"):
        model = Transformer(ModelConfig.from_preset("gpt2"))
    assert f"{model.flops_per_token(1024) / 1e9:.3f}" in done.stdout


def test_the_script_shows_what_a_checkpoint_costs(tmp_path):
    """A directory or a run: its own shape, equal to that of the model as it was built."""
    import checkpoint
    from model import ModelConfig

    built = Transformer(
        ModelConfig.from_family(
            "qwen3_moe", n_layer=2, n_head=2, n_embd=32, block_size=48, vocab_size=77
        )
    )
    folder = checkpoint.save_model(tmp_path / "run/m", built)
    (tmp_path / "run/checkpoints.json").write_text('{"last": "m", "best": "m"}')
    for where in (folder, tmp_path / "run"):
        out = script(f"--show={where}").stdout
        assert f"{built.parameter_count():,}" in out and f"{built.parameter_count(True):,}" in out
        assert f"{built.flops_per_token(48) / 1e9:.3f}" in out
    done = script(f"--show={tmp_path}")
    assert (
        done.returncode == 2 and "no checkpoint at" in done.stderr and "\n" not in done.stderr[:-1]
    )


def test_the_script_with_an_unknown_preset():
    done = script("--show=gpt5")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and "gpt5" in done.stderr and "gpt2-xl" in done.stderr
