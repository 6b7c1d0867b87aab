"""The decoder: its size, its cost, what each position may see, and the cache that serves it.

Shapes are tiny and the weights random everywhere, norms and biases too: the defaults (ones and
zeros) would hide a norm applied twice or a bias left out.
"""

import pytest
import torch

import kernels
from config import UserError
from layers.rope import rope_frequencies
from model import ModelConfig
from model_base import FLAGS, LLAMA, backend, close, make, some_ids


@pytest.fixture(autouse=True)
def fresh():
    torch.manual_seed(0)
    before = kernels.use("auto")
    yield
    kernels.use(before)


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
