"""Mixers: what `layer_types` may name, a decode state of its own, and the cache's copy, trim, join.

Gate is a recurrent mixer that this file alone adds to model.MIXERS: an exponential moving average
per channel, with a rate that depends on the input. It goes through the ordinary scripts.
"""
import json

import pytest
import torch
from torch.nn import Module

import checkpoint
import model as model_file
import sft
import train
from config import UserError, configure
from inference.generate import Memory, Sampling, generate
from inference.quantize import pack
from layers.basic import Linear
from layers.kv_cache import Cache, RecurrentState
from layers.lora import add_lora, merge
from model import ModelConfig, Transformer
from runs import assert_same_run, last
from train_base import data    # noqa: F401
from tokenizer import load


class Gate(Module):
    """h_t = a_t h_(t-1) + (1 - a_t) v_t with a = sigmoid(W x), v = V x; y = O h."""
    name = "gate"

    def __init__(self, config, layer):
        super().__init__()
        C = config.n_embd
        self.width = C
        self.layer = layer
        self.rate = Linear(C, C)
        self.value = Linear(C, C)
        self.o_proj = Linear(C, C)

    def new_state(self, batch, length, device, dtype, layers):
        return RecurrentState(h=torch.zeros(batch, self.width, device=device, dtype=dtype))

    def state_size(self, length):
        return self.width

    def forward(self, x, context):
        a = torch.sigmoid(self.rate(x))
        v = self.value(x)
        B, T, C = x.shape
        state = context.cache.states[self.layer] if context.cache is not None else None
        h = x.new_zeros(B, C) if state is None else state.tensors["h"].to(x.dtype)
        out = []
        for t in range(T):
            if context.doc is not None and t:
                same = (context.doc[:, t] == context.doc[:, t - 1]).unsqueeze(-1)
                h = torch.where(same, h, torch.zeros_like(h))
            new = a[:, t] * h + (1 - a[:, t]) * v[:, t]
            if state is not None:       # padding of a ragged batch changes nothing
                real = torch.tensor([t < n for n in state.counts], device=x.device).unsqueeze(-1)
                new = torch.where(real, new, h)
            h = new
            out.append(h)
        if state is not None:
            state.tensors["h"] = h.detach()
        return self.o_proj(torch.stack(out, 1))

    def add_flops(self, flops, has_grad, T):
        has_grad = flops.multiply(has_grad, self.rate, self.value)
        return flops.multiply(has_grad, self.o_proj)


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    monkeypatch.setitem(model_file.MIXERS, "gate", Gate)


TYPES = {"full": ["full_attention"] * 3, "windows": ["sliding_attention"] * 3,
         "gate": ["gate"] * 3, "all three": ["gate", "sliding_attention", "full_attention"]}


def build(types, seed=0, **changes):
    torch.manual_seed(seed)
    shape = dict(n_layer=3, n_head=2, n_embd=16, vocab_size=40, block_size=300, position="rope",
                 norm="rmsnorm", gated=True, activation="silu", layer_types=TYPES[types],
                 sliding_window=4 if "sliding_attention" in TYPES[types] else 0)
    model = Transformer(ModelConfig(**{**shape, **changes}))
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return model.eval()


def ids_of(*lengths, seed=1):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(40, (n,), generator=draw).tolist() for n in lengths]


def feed(model, cache, rows):
    """Run more tokens of each row, ragged, and return the logits after each row's last one."""
    counts = [len(r) for r in rows]
    ids = torch.tensor([r + [0] * (max(counts) - len(r)) for r in rows])
    cache.expect(counts)
    with torch.no_grad():
        logits = model(ids, cache=cache)
    return torch.stack([z[n - 1] for z, n in zip(logits, counts)])


def fresh_logits(model, row):
    return model.logits(torch.tensor([row]))[0, -1]


@pytest.mark.parametrize("types", TYPES)
def test_ragged_rows_go_on_as_each_would_alone(types):
    """Prompts of three lengths, then chunks and single tokens: cached equals full."""
    model = build(types)
    texts = ids_of(3, 17, 9)
    cache = model.new_cache(3, 120)
    got = feed(model, cache, texts)
    for lengths in ((1, 1, 1), (4, 2, 7), (1, 1, 1), (30, 1, 12)):
        more = ids_of(*lengths, seed=sum(lengths))
        got = feed(model, cache, more)
        texts = [a + b for a, b in zip(texts, more)]
        for z, text in zip(got, texts):
            assert (z - fresh_logits(model, text)).abs().max() < 1e-4
    assert cache.lengths == [len(t) for t in texts]


@pytest.mark.parametrize("types", TYPES)
def test_a_copy_goes_its_own_way(types):
    model = build(types)
    texts = ids_of(5, 90)                               # beyond the windows' room
    cache = model.new_cache(2, 200)
    feed(model, cache, texts)
    other = cache.copy()
    one, two = ids_of(6, 3, seed=5), ids_of(2, 40, seed=6)
    a, b = feed(model, cache, one), feed(model, other, two)
    for got, more in ((a, one), (b, two)):
        for z, text, new in zip(got, texts, more):
            assert (z - fresh_logits(model, text + new)).abs().max() < 1e-4
    assert [len(set(map(id, c.states)) & set(map(id, other.states))) for c in (cache,)] == [0]


@pytest.mark.parametrize("types", TYPES)
def test_rows_are_selected_and_joined(types):
    """Rows of two caches of different lengths in one, in another order; then they go on."""
    model = build(types)
    first, second = ids_of(5, 80, 12), ids_of(33, 2, seed=3)
    one, two = model.new_cache(3, 100), model.new_cache(2, 160)
    feed(model, one, first)
    feed(model, two, second)
    joined = Cache.join([one.select([2, 0]), two, one.select([1])])
    texts = [first[2], first[0], *second, first[1]]
    assert joined.lengths == [len(t) for t in texts] and joined.length == 160
    for step in range(3):
        more = ids_of(*[1 + (i + step) % 3 for i in range(5)], seed=20 + step)
        got = feed(model, joined, more)
        texts = [a + b for a, b in zip(texts, more)]
        for z, text in zip(got, texts):
            assert (z - fresh_logits(model, text)).abs().max() < 1e-4


@pytest.mark.parametrize("types", ["full", "windows"])
def test_tokens_that_are_trimmed_were_never_there(types):
    model = build(types)
    texts = ids_of(20, 75)
    cache = model.new_cache(2, 200)
    feed(model, cache, texts)
    cache.trim([18, 75 - 40])
    texts = [texts[0][:18], texts[1][:35]]
    more = ids_of(3, 5, seed=9)
    got = feed(model, cache, more)
    for z, text, new in zip(got, texts, more):
        assert (z - fresh_logits(model, text + new)).abs().max() < 1e-4


@pytest.mark.parametrize("types", ["gate", "all three"])
def test_a_recurrent_state_refuses_to_go_back_and_stays_as_it_was(types):
    model = build(types)
    texts = ids_of(20, 9)
    cache = model.new_cache(2, 60)
    feed(model, cache, texts)
    with pytest.raises(UserError, match="a recurrent state cannot go back: copy the cache"):
        cache.trim([18, 9])
    cache.trim([20, 9])                                 # nothing to forget
    assert cache.lengths == [20, 9]
    more = ids_of(2, 2, seed=4)
    for z, text, new in zip(feed(model, cache, more), texts, more):
        assert (z - fresh_logits(model, text + new)).abs().max() < 1e-4


@pytest.mark.parametrize("types", TYPES)
def test_generation_of_a_ragged_batch_is_that_of_each_prompt(types):
    """Also past the end of the context, and with a chat's memory."""
    model = build(types, block_size=60)
    prompts = ids_of(4, 19, 11)
    rows = list(zip(*generate(model, prompts, 50, Sampling(temperature=0.8), seed=3)))
    for r, prompt in enumerate(prompts):
        alone = [step[0] for step in generate(model, [prompt], 50, Sampling(temperature=0.8),
                                              seed=3 + r)]
        assert list(rows[r]) == alone
    memory, text = Memory(), ids_of(6)[0]
    for turn in ids_of(3, 2, seed=8):
        text = text + turn
        got = [s[0] for s in generate(model, [text], 5, Sampling(temperature=0), memory=memory)]
        assert got == [s[0] for s in generate(model, [text], 5, Sampling(temperature=0))]
        text = text + got


@pytest.mark.parametrize("types", TYPES)
def test_nothing_crosses_from_one_document_to_another(types):
    model = build(types)
    texts = ids_of(7, 12)
    doc = torch.tensor([[0] * 7 + [1] * 12])
    packed = model.logits(torch.tensor([texts[0] + texts[1]]), doc=doc)[0]
    for start, text in ((0, texts[0]), (7, texts[1])):
        alone = model.logits(torch.tensor([text]))[0]
        assert (packed[start:start + len(text)] - alone).abs().max() < 1e-4


FLAGS = ["--n_layer=3", "--n_head=2", "--n_embd=16", "--block_size=32", "--batch_size=2",
         "--gradient_accumulation_steps=2", "--eval_interval=2", "--eval_iters=2",
         "--warmup_iters=1", "--device=cpu", "--dtype=float32", "--log_interval=1",
         "--learning_rate=1e-2", "--document_mask=1"]


def test_it_trains_and_resumes_by_the_ordinary_scripts(data, tmp_path, monkeypatch):
    """train.py from scratch, six steps as four and two bit for bit; its checkpoint opens again
    with the same logits, adapted, merged and packed for serving."""
    real = train.start.from_settings

    def with_gates(cfg, vocab_size):
        config = real(cfg, vocab_size)
        return train.replace(config, layer_types=TYPES["all three"], sliding_window=4)
    monkeypatch.setattr(train.start, "from_settings", with_gates)

    def run(name, *flags):
        out = tmp_path / name
        train.main(configure(train.Config, [f"--dataset={data}", f"--out_dir={out}", *FLAGS,
                                            "--family=llama", *flags]))
        return out
    straight = run("straight", "--max_iters=6")
    halves = run("halves", "--max_iters=4", "--lr_decay_iters=6")
    train.main(configure(train.Config, ["--init_from=resume", f"--out_dir={halves}",
                                        "--max_iters=6", "--device=cpu"]))
    assert_same_run(straight, halves)
    folder = last(straight)
    settings = json.loads((folder / "config.json").read_text())
    assert settings["handmade"]["layer_types"] == TYPES["all three"]
    model = checkpoint.load_model(folder, "cpu", "float32")
    assert [block.mixer_name for block in model.model.layers.children()] == [
        "gate", "self_attn", "self_attn"]
    ids = torch.tensor(ids_of(20))
    again = checkpoint.save_model(tmp_path / "again", model, checkpoint.load_tokenizer(folder))
    assert torch.equal(checkpoint.load_model(again, "cpu").logits(ids), model.logits(ids))
    # adapters on the mixer's own linears, merged to the same logits
    adapted = add_lora(model, rank=2, targets="rate,q_proj")
    assert {name.rpartition(".")[2] for name in adapted} == {"rate", "q_proj"}
    for adapter in adapted.values():
        torch.nn.init.normal_(adapter.adapters.default.B)
    before = model.logits(ids)
    assert (merge(model).logits(ids) - before).abs().max() < 1e-4
    pack(model)
    assert (model.logits(ids) - before).abs().max() < 1e-3


def test_a_chat_stage_starts_from_it(data, tmp_path, monkeypatch):                # noqa: F811
    folder = tmp_path / "base"
    tokenizer = load(data)
    checkpoint.save_model(folder, build("all three", vocab_size=tokenizer.vocab_size), tokenizer)
    chats = tmp_path / "chats.jsonl"
    chats.write_text("".join(json.dumps({"messages": [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}) + "\n"
        for _ in range(6)))
    out = tmp_path / "chat"
    sft.main(configure(sft.Config, [
        f"--init_from={folder}", f"--dataset={chats}", f"--out_dir={out}", "--max_iters=2",
        "--batch_size=2", "--eval_interval=1", "--eval_iters=1", "--block_size=64",
        "--device=cpu", "--dtype=float32", "--lora_rank=2"]))
    assert checkpoint.load_model(last(out), "cpu").config.layer_types == TYPES["all three"]


@pytest.mark.parametrize("quantize, step", [("int8", 1 / 127), ("int4", 1 / 15)])
def test_the_linears_of_a_mixer_are_quantized(quantize, step):
    """As far from the weights as the steps of the format allow, and cached equals full. The output
    is that of a float model with the rounded weights."""
    wide = dict(n_embd=64, intermediate_size=64)
    model = build("all three", **wide)
    plain = build("all three", **wide)
    size = sum(p.numel() for n, p in model.named_parameters() if p.ndim == 2)
    read = pack(model, quantize)
    gate = model.model.layers.get_submodule("0").gate
    assert not [m for m in model.modules() if isinstance(m, Linear) and m is not getattr(
        model, "lm_head", None)]
    assert read < size * 1.2                            # bytes: 2 per weight if one was left out
    original = plain.model.layers.get_submodule("0").gate
    x = torch.randn(20, 64)
    for name in ("rate", "value", "o_proj"):
        W = getattr(original, name).weight.detach()
        away = (getattr(gate, name)(x.bfloat16()).float() - x @ W.T).abs().max()
        # rounding errors of 64 terms, and bfloat16's
        assert 0 < away < W.abs().max() * step * 64 ** 0.5 * 3 + 0.1
    text = ids_of(30)[0]
    cache = model.new_cache(1, 40)
    chunks = [feed(model, cache, [text[:17]]), *(feed(model, cache, [[t]]) for t in text[17:])]
    assert (chunks[-1][0] - fresh_logits(model, text)).abs().max() < 0.1


def test_costs_count_the_state_of_each_mixer():
    """Keys and values of 300 tokens or of a window, and the recurrent state: against the tensors
    of a cache, less the room that a window has to spare."""
    for types, size in (("full", 3 * 300 * 32), ("windows", 3 * 4 * 32), ("gate", 3 * 16),
                        ("all three", 16 + 4 * 32 + 300 * 32)):
        model = build(types)
        assert model.state_size(300) == size
        cache = model.new_cache(1, 300)
        tensors = [t for s in cache.distinct for t in (
            s.tensors.values() if isinstance(s, RecurrentState) else [s.all])]
        spare = sum(t.shape[-2] - 4 for t in tensors if t.ndim == 6 and t.shape[-2] < 300)
        layers = types.count("windows") * 3 or 1
        assert sum(t.numel() for t in tensors) == size + spare * 32 * layers
        table = model_file.estimate_costs(model.config)
        assert table["GB of KV cache per sequence (bf16)"] == f"{2 * size / 1e9:.3f}"


@pytest.mark.parametrize("types, sentence", [
    (["mamba", "gate"], "unknown mixer 'mamba'; each layer needs one of full_attention, "
                        "sliding_attention, gate"),
    (["gate"], "layer_types names 1 mixers for 2 layers"),
    (["gate", ["gate"]], "unknown mixer"),
    (["gate", "sliding_attention"], "give sliding_window")])
def test_layer_types_that_cannot_be_are_refused(types, sentence):
    with pytest.raises(UserError, match=sentence):
        ModelConfig(n_layer=2, layer_types=types)
