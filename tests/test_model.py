"""The decoder: its size, its cost, what each position may see, and the cache that serves it.

Shapes are tiny and the weights random everywhere, norms and biases too: the defaults (ones and
zeros) would hide a norm applied twice or a bias left out.
"""
import math
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import kernels
from config import UserError
from layers.rope import rope_frequencies
from model import ModelConfig, Transformer
from families import PRESETS
from families import SCRATCH

ROOT = Path(__file__).resolve().parent.parent
SMALL = dict(vocab_size=61, block_size=24, n_layer=2, n_head=4, n_embd=32)
BIASES = dict(qkv_bias=True, o_bias=True, mlp_bias=True, norm_bias=True)
LLAMA = dict(position="rope", norm="rmsnorm", activation="silu", gated=True,
             tie_word_embeddings=False)

# one row a family, and the corners between them
FLAGS = {
    "gpt2": dict(BIASES, activation="gelu_new"),
    "llama": LLAMA,
    "llama3": dict(
        LLAMA,
        n_kv_head=2,
        rope_theta=500000.0,
        rope_scaling=dict(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=16,
        ),
    ),
    "qwen2": dict(LLAMA, n_kv_head=2, qkv_bias=True),
    "qwen3": dict(LLAMA, n_kv_head=1, head_dim=16, qk_norm=True, tie_word_embeddings=True),
    "no positions": dict(position="none", norm="rmsnorm", activation="relu2"),
    "no positions, all biases": dict(BIASES, position="none", gated=True, qk_norm=True),
    "learned, grouped": dict(position="learned", n_kv_head=2, qk_norm=True),
    "linear scaling": dict(LLAMA, rope_scaling=dict(rope_type="linear", factor=2.0)),
    "mistral": dict(LLAMA, n_kv_head=2, sliding_window=6),
    "gemma2": dict(
        SCRATCH["gemma2"].flags,
        n_kv_head=2,
        head_dim=16,
        sliding_window=6,
        attention_multiplier=0.2,
    ),
    "gemma3": dict(
        SCRATCH["gemma3"].flags, n_kv_head=2, sliding_window=6, sliding_window_pattern=2
    ),
    "glm4": dict(SCRATCH["glm4"].flags, n_kv_head=2),
    "minicpm": dict(LLAMA, embedding_multiplier=12.0, residual_multiplier=0.3, logits_scaling=3.0),
    "parallel": dict(SCRATCH["cohere"].flags, n_kv_head=2),
    "post-norm": SCRATCH["olmo2"].flags,
    "a layer without positions": dict(LLAMA, nope_layers=[0]),
    "yarn": dict(
        LLAMA, rope_scaling=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
    ),
    "experts": dict(SCRATCH["qwen3_moe"].flags, num_experts=4, moe_intermediate_size=24),
    "shared expert": dict(SCRATCH["glm4_moe"].flags, num_experts=4, moe_intermediate_size=24),
}


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(0)
    before = kernels.use("auto")
    yield
    kernels.use(before)


@contextmanager
def backend(name):
    before = kernels.use(name)
    try:
        yield
    finally:
        kernels.use(before)


def make(flags, dtype=torch.float32, **changes):
    """A tiny model of these flags with every weight random, in evaluation mode."""
    model = Transformer(ModelConfig(**{**SMALL, **flags, **changes})).to(dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            # large enough that attention is far from uniform and positions matter
            scale = "norm.weight" in name or "layernorm.weight" in name
            p.normal_(1.0 - model.config.norm_offset if scale else 0.0, 0.3)
    return model.eval()


def some_ids(*shape):
    return torch.randint(SMALL["vocab_size"], shape)


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


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


# ------------------------------------------------------------------ what a position sees

@pytest.mark.parametrize("form", ["reference", "torch"])
@pytest.mark.parametrize("name", FLAGS)
def test_no_logits_depend_on_a_later_token(name, form):
    model, ids = make(FLAGS[name]), some_ids(1, 12)
    with backend(form):
        before = model.logits(ids)
        for t in (1, 6, 11):
            changed = ids.clone()
            changed[0, t] = (ids[0, t] + 1) % 61
            after = model.logits(changed)
            if model.config.num_experts:        # other rows in an expert's matmul, other last bits
                close(after[:, :t], before[:, :t])
            else:
                assert torch.equal(after[:, :t], before[:, :t])
            assert not torch.equal(after[:, t], before[:, t])
            if t < 11:                                  # and the later ones do look back
                assert not torch.equal(after[:, 11], before[:, 11])


@pytest.mark.parametrize("name", FLAGS)
def test_packed_documents_are_each_document_alone(name):
    """Learned positions start anew with each. RoPE is relative, but its angles are float32: the
    same document elsewhere is the same to 1e-5 and no closer. What lies in the other documents
    must not matter at all."""
    model, lengths = make(FLAGS[name], dtype=torch.float64), [1, 9, 5]
    ids = some_ids(2, sum(lengths))
    doc = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths)).expand(2, -1)
    with torch.no_grad():
        for form in ("reference", "torch"):
            with backend(form):
                packed = model(ids, doc=doc)
                start = 0
                for n in lengths:
                    own = slice(start, start + n)
                    close(packed[:, own], model(ids[:, own]), 1e-5)
                    others = torch.cat([some_ids(2, start), ids[:, own],
                                        some_ids(2, sum(lengths) - start - n)], 1)
                    close(model(others, doc=doc)[:, own], packed[:, own], 1e-10)
                    start += n


@pytest.mark.parametrize("name", [n for n in FLAGS if "positions" not in n])
def test_the_order_of_tokens_matters(name):
    """RoPE built and never applied is a classic: the last logits would not see a swap."""
    model, ids = make(FLAGS[name], n_layer=1), torch.randperm(61)[:6].unsqueeze(0)
    swapped = ids[:, [1, 0, 2, 3, 4, 5]]
    assert (model.logits(ids) - model.logits(swapped))[:, -1].abs().max() > 1e-3


@pytest.mark.parametrize("name", [n for n in FLAGS if "no positions" in n])
def test_without_positions_order_does_not_matter(name):
    model, ids = make(FLAGS[name], n_layer=1, dtype=torch.float64), some_ids(1, 6)
    swapped = ids[:, [1, 0, 3, 2, 4, 5]]
    close(model.logits(ids)[:, -1], model.logits(swapped)[:, -1])


@pytest.mark.parametrize("name", FLAGS)
def test_reference_and_torch_backends_agree(name):
    model, ids = make(FLAGS[name], dtype=torch.float64).train(), some_ids(2, 20)
    results = []
    for form in ("reference", "torch"):
        with backend(form):
            logits = model(ids)
            results.append([logits, *torch.autograd.grad(
                kernels.cross_entropy(logits, ids),
                [p for p in model.parameters() if p.requires_grad])])
    for a, b in zip(*results):
        close(a, b, 1e-6)


# --------------------------------------------------------------------- against transformers

def test_rope_frequencies_are_transformers():
    """Llama 3's stretch, the linear one, and none: the numbers of the library people load with."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    scalings = [
        dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
             original_max_position_embeddings=8192),
        dict(rope_type="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
             original_max_position_embeddings=8192),
        dict(rope_type="linear", factor=4.0)]
    yarn = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=4096)
    scalings += [yarn, dict(yarn, beta_fast=16.0, beta_slow=2.0),
                 dict(yarn, factor=40.0, mscale=0.7, mscale_all_dim=1.3),
                 dict(yarn, attention_factor=1.5, truncate=False)]
    for scaling in scalings:
        for theta, head_dim in ((500000.0, 128), (500000.0, 64), (10000.0, 80)):
            oracle = LlamaConfig(
                hidden_size=4 * head_dim, num_attention_heads=4, head_dim=head_dim,
                max_position_embeddings=131072, rope_parameters=dict(scaling, rope_theta=theta))
            expected, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](oracle, "cpu")
            got = rope_frequencies(ModelConfig(
                n_head=4, n_embd=4 * head_dim, position="rope", rope_theta=theta,
                rope_scaling=scaling))
            torch.testing.assert_close(got[0], expected, rtol=2e-6, atol=0)
            assert got[1] == pytest.approx(factor)


def test_llamas_hidden_states_are_transformers():
    """The wiring against an independent one; every family and the files are checkpoint.py's."""
    from transformers import LlamaConfig, LlamaForCausalLM
    model = make(FLAGS["llama3"])
    c = model.config
    oracle = LlamaForCausalLM(LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=c.intermediate_size,
        num_hidden_layers=c.n_layer, num_attention_heads=c.n_head,
        num_key_value_heads=c.n_kv_head, max_position_embeddings=c.block_size,
        rms_norm_eps=c.norm_eps, tie_word_embeddings=False,
        rope_parameters=dict(c.rope_scaling, rope_theta=c.rope_theta))).eval()
    oracle.load_state_dict(model.state_dict())          # the names are Hugging Face's as they are
    ids = some_ids(2, 20)
    with torch.no_grad():
        close(model.logits(ids), oracle(ids).logits)


# -------------------------------------------------------------------------------- the cache

@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize("first", [1, 7])
def test_cached_logits_are_the_full_ones_at_every_step(name, first):
    model, ids = make(FLAGS[name], dtype=torch.float64), some_ids(2, 14)
    full = model(ids).detach()
    for form in ("reference", "torch"):
        with backend(form), torch.no_grad():
            cache = model.new_cache(2, 14)              # exactly long enough
            close(model(ids[:, :first], cache=cache), full[:, :first], 1e-6)
            for t in range(first, 14):
                close(model(ids[:, t:t + 1], cache=cache), full[:, t:t + 1], 1e-6)
            assert cache.lengths == [14, 14] and cache.end == 14


@pytest.mark.parametrize("name", ["gpt2", "llama3", "qwen3"])
def test_a_prompt_in_pieces_is_the_prompt_at_once(name):
    model, ids = make(FLAGS[name], dtype=torch.float64), some_ids(3, 14)
    full = model(ids).detach()
    with torch.no_grad():
        cache, start = model.new_cache(3, 20), 0
        for n in (4, 1, 6, 3):
            close(model(ids[:, start:start + n], cache=cache), full[:, start:start + n], 1e-6)
            start += n


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize("form", ["reference", "torch"])
def test_ragged_prompts_in_one_batch_are_each_alone(name, form):
    """Rows of 1, 7 and 4 tokens, padded on the right; then five steps, two of them at once."""
    model, lengths, steps = make(FLAGS[name], dtype=torch.float64), [1, 7, 4], [1, 1, 2, 1]
    rows = [some_ids(1, n + sum(steps)) for n in lengths]
    with backend(form), torch.no_grad():
        alone = [model(row) for row in rows]
        padded = some_ids(3, 7)                         # what fills the row must not matter
        for b, n in enumerate(lengths):
            padded[b, :n] = rows[b][0, :n]
        cache = model.new_cache(3, 7 + sum(steps))
        cache.expect(lengths)
        prompt = model(padded, cache=cache)
        for b, n in enumerate(lengths):
            close(prompt[b, :n], alone[b][0, :n], 1e-6)
        done = 0
        for T in steps:
            parts = [row[0, n + done:n + done + T] for row, n in zip(rows, lengths)]
            logits = model(torch.stack(parts), cache=cache)
            for b, n in enumerate(lengths):
                close(logits[b], alone[b][0, n + done:n + done + T], 1e-6)
            done += T
        assert cache.lengths == [n + done for n in lengths]


def test_a_trim_to_equal_lengths_goes_back_in_time():
    """Trimming every row alike forgets the last tokens: what follows is written over them."""
    model, ids = make(FLAGS["llama"], dtype=torch.float64), some_ids(2, 9)
    with torch.no_grad():
        cache = model.new_cache(2, 9)
        model(some_ids(2, 9), cache=cache)
        cache.trim([0, 0])
        assert cache.end == 0 and cache.positions(3) is None
        close(model(ids, cache=cache), model(ids), 1e-6)


def test_a_cache_that_is_full_says_so_and_stays_as_it_was():
    model = make(FLAGS["llama"])
    with torch.no_grad():
        cache = model.new_cache(1, 5)
        model(some_ids(1, 4), cache=cache)
        with pytest.raises(UserError, match="6 tokens do not fit the cache of 5"):
            model(some_ids(1, 2), cache=cache)
        assert cache.end == 4
        model(some_ids(1, 1), cache=cache)


def test_the_cache_holds_the_compute_type():
    model = make(FLAGS["llama"])
    assert model.new_cache(1, 4).distinct[0].kv[0][0].dtype == torch.float32
    model.compute_dtype = torch.bfloat16
    cache = model.new_cache(1, 4)
    (k, v), = [cache.distinct[0].kv[1]]
    assert k.dtype == v.dtype == torch.bfloat16 and k.shape == (1, 4, 4, 8)
    with torch.no_grad():
        assert model(some_ids(1, 3), cache=cache).dtype == torch.bfloat16


# ------------------------------------------------------------------ the head, and training

@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_head_is_given_hidden_states_and_the_output_matrix(name):
    model, ids, seen = make(FLAGS[name]), some_ids(2, 9), []

    def head(hidden, weight):
        seen.append((hidden, weight))
        return "whatever a stage makes of them"
    assert model(ids, head=head) == "whatever a stage makes of them"
    (hidden, weight), = seen
    assert hidden.shape == (2, 9, 32) and weight.shape == (61, 32)
    assert weight is model.output_weight
    tied = weight is model.model.embed_tokens.weight
    assert tied == model.config.tie_word_embeddings == ("lm_head.weight" not in model.state_dict())
    close(model(ids), hidden @ weight.T)                # without a head, logits


def test_logits_are_float32_and_without_gradients():
    model, ids = make(FLAGS["gpt2"]), some_ids(2, 9)
    model.compute_dtype = torch.bfloat16
    y = model.logits(ids)
    assert y.shape == (2, 9, 61) and y.dtype == torch.float32 and not y.requires_grad


def gradients(model, ids, **kw):
    loss = model(ids, head=lambda h, w: kernels.linear_cross_entropy(h, w, ids), **kw)
    learn = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return dict(zip(learn, torch.autograd.grad(loss, list(learn.values()))))


def idle(model, key):
    """A bias on the keys adds the same to a query's every score, which softmax does not see: its
    gradient is zero in exact arithmetic, unless RoPE or a norm comes between."""
    c = model.config
    return key.endswith("k_proj.bias") and c.position != "rope" and not c.qk_norm


@pytest.mark.parametrize("name", FLAGS)
def test_every_weight_learns(name):
    model, ids = make(FLAGS[name]).train(), some_ids(2, 24)
    for key, g in gradients(model, ids).items():
        assert g.isfinite().all(), key
        assert idle(model, key) or g.abs().sum() > 1e-3, key


@pytest.mark.parametrize("name", ["gpt2", "llama3"])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_checkpointing_gives_the_same_gradients(name, dropout, dtype):
    """Recomputed blocks draw the same dropout masks again, and documents are handed on."""
    model, ids = make(FLAGS[name], dropout=dropout).train(), some_ids(2, 16)
    model.compute_dtype = dtype
    doc = (torch.arange(16) >= 5).long().expand(2, -1)
    torch.manual_seed(5)
    plain = gradients(model, ids, doc=doc)
    model.checkpointing = True
    torch.manual_seed(5)
    for key, g in gradients(model, ids, doc=doc).items():
        assert torch.equal(g, plain[key]), key


def test_checkpointing_saves_the_memory_it_is_for():
    """Held for the backward: one input a block, and not every activation inside."""
    def held(checkpointing):
        model = make(FLAGS["llama"], n_layer=4).train()
        model.checkpointing, sizes = checkpointing, {}

        def pack(t):
            sizes[t.data_ptr()] = t.numel()
            return t
        weights = {p.data_ptr() for p in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(some_ids(4, 24)).square().mean()
        return sum(n for where, n in sizes.items() if where not in weights)
    assert held(True) < 0.3 * held(False)


@pytest.mark.parametrize("heads", [4, 1])
def test_what_a_block_keeps_on_a_cpu_in_bfloat16(heads):
    """Five tensors of a row's width, q, k and v as they are, gate and up: not the cast weights, not
    gate times up, not keys repeated for every head that shares them."""
    def held(layers):
        model = make(FLAGS["llama"], n_layer=layers, n_kv_head=heads).train()
        model.compute_dtype, sizes = torch.bfloat16, {}

        def pack(t):
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes(), t
            return t
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(some_ids(1, 24)).square().mean()
        return sum(n for where, (n, _) in sizes.items() if where not in weights), model
    c = held(1)[1].config
    widths = 5 * c.n_embd + (c.n_head + 2 * heads) * c.head_dim + 2 * c.intermediate_size
    kept = (held(3)[0] - held(1)[0]) / 2 / 24 / 2          # numbers a token and block, 2 bytes each
    assert 0.9 * widths < kept < 1.02 * widths, (kept, widths)


# not the mixtures: a last bit may send a token to another expert
@pytest.mark.parametrize("name", [n for n in FLAGS if "expert" not in n])
def test_bfloat16_activations_on_float32_weights(name):
    model, ids = make(FLAGS[name]).train(), some_ids(2, 16)
    exact = gradients(model, ids)
    model.compute_dtype = torch.bfloat16
    kept = []
    model(ids, head=lambda h, w: kept.append(h.dtype))
    assert kept == [torch.bfloat16]
    for key, g in gradients(model, ids).items():
        assert g.dtype == torch.float32, key
        # two layers of rounding at 2^-9 a step, on weights far larger than training's
        gap = ((g - exact[key]).norm() / exact[key].norm()).item()
        assert idle(model, key) or gap < 0.2, f"{key}: {gap:.3f}"


def test_bfloat16_weights():
    """A checkpoint in bfloat16 is served as it is, with no float32 copy."""
    model = make(FLAGS["llama3"]).to(torch.bfloat16)
    assert model(some_ids(1, 5)).dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_dropout_acts_in_training_alone(name):
    model, ids = make(FLAGS[name], dropout=0.5), some_ids(2, 9)
    assert torch.equal(model(ids), model(ids))
    without = make(FLAGS[name])
    without.load_state_dict(model.state_dict())
    assert torch.equal(model(ids), without(ids))        # evaluation is the model without it
    model.train(), without.train()
    assert not torch.equal(model(ids), model(ids))
    assert torch.equal(without(ids), without(ids))      # and p = 0 drops nothing in training
    torch.manual_seed(1)
    a = model(ids)
    torch.manual_seed(1)
    assert torch.equal(a, model(ids))


@pytest.mark.parametrize("name", FLAGS)
def test_one_token(name):
    model = make(FLAGS[name]).train()
    assert model.logits(some_ids(2, 1)).shape == (2, 1, 61)
    assert all(g.isfinite().all() for g in gradients(model, some_ids(1, 1)).values())


def test_the_names_are_hugging_faces():
    names = set(make(dict(LLAMA, qk_norm=True), n_layer=1).state_dict())
    layer = "model.layers.0."
    assert names == {
        "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight",
        *(layer + n + ".weight" for n in (
            "input_layernorm", "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj",
            "mlp.down_proj", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
            "self_attn.o_proj", "self_attn.q_norm", "self_attn.k_norm"))}


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
