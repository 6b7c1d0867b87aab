"""quantize.py: a packed model says what the model said, in less memory, and refuses what it
cannot do any more."""
import gc
import math
import weakref

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from inference import quantize
from checkpoint import load_model, save_model
from config import UserError
from conftest import ROOT
from model import ModelConfig, Linear, Transformer
from families import SCRATCH
from inference.quantize import pack
from layers.packed import GROUP, Blocked, Int4, Int8, Integer, Plain
from inference.generate import Sampling, generate

V = 48
SHAPE = dict(vocab_size=V, block_size=64, n_layer=2, n_head=4, n_kv_head=2, n_embd=64,
             intermediate_size=96, moe_intermediate_size=32)
# What the shape of a test has to change so that a family's flags matter in it
MORE = {"gpt2": dict(n_kv_head=4), "mistral": dict(sliding_window=6),
        "gemma2": dict(sliding_window=6, head_dim=32),
        "gemma3": dict(sliding_window=6, sliding_window_pattern=2),
        "smollm3": dict(n_layer=4), "glm4_moe": dict(num_experts=4),
        "qwen3_moe": dict(num_experts=4)}
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def build(name="llama", dtype=torch.float32, **changes) -> Transformer:
    """A tiny model of a family, the same at every call, every weight random, norms included."""
    model = Transformer(ModelConfig.from_family(name, **{**SHAPE, **MORE.get(name, {}), **changes}))
    generator, c = torch.Generator().manual_seed(1), model.config
    with torch.no_grad():
        for key, p in model.named_parameters():
            scale = "norm" in key and key.endswith("weight")
            p.normal_(1.0 - c.norm_offset if scale else 0.0, 0.2, generator=generator)
    return model.to(dtype).eval()


def ids_of(*shape, seed=3) -> torch.Tensor:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def stepwise(model: Transformer, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    """Logits (B, T, V) through a cache: a prompt, then one token at a time."""
    cache = model.new_cache(ids.shape[0], ids.shape[1])
    out = [model(ids[:, :prompt], cache=cache)]
    out += [model(ids[:, i:i + 1], cache=cache) for i in range(prompt, ids.shape[1])]
    return torch.cat(out, 1).float()


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative L2 distance."""
    return float((a.double() - b.double()).norm() / b.double().norm())


def typical(a: torch.Tensor, b: torch.Tensor) -> float:
    """The same of the median token: rounding may send a few to other experts of a mixture."""
    return float(((a - b).norm(dim=-1) / b.norm(dim=-1)).median())


def grid(packed: Integer) -> torch.Tensor:
    """The weights (N, K) that a packed matrix stands for, float64, unpacked by their definition."""
    if isinstance(packed, Int8):
        return packed.weight.double() * packed.scale.double().unsqueeze(1)
    # int4's bytes are laid out for the processor: the identity brings them out, 8 bits exactly
    # where scales are 1 and offsets 0
    ones = torch.stack((torch.ones_like(packed.grid[..., 0]),
                        torch.zeros_like(packed.grid[..., 0])), -1)
    q = packed.multiply(torch.eye(packed.inputs, dtype=torch.bfloat16), packed.weight,
                        GROUP, ones).T.double()
    scale, zero = (packed.grid[..., i].double().T.repeat_interleave(GROUP, 1)
                   for i in (0, 1))
    assert q.min() >= -8 and q.max() <= 7 and torch.equal(q, q.round())
    return q * scale + zero

# ------------------------------------------------------------------ the same numbers, packed


@pytest.mark.parametrize("name", SCRATCH)
def test_packing_changes_no_logit_of_any_family(name):
    """float32: the same to rounding; whole texts, a prompt and single tokens, two rows."""
    ids, model, packed = ids_of(2, 20), build(name), build(name)
    whole = model.logits(ids)
    assert pack(packed) > 0
    assert gap(packed.logits(ids), whole) < 2e-6
    assert gap(stepwise(packed, ids, 9), whole) < 2e-6
    assert gap(stepwise(packed, ids[:1], 1), whole[:1]) < 2e-6
    # nothing was left out: every linear layer but the output's is gone
    left = [m for n, m in packed.named_modules() if isinstance(m, Linear) and n != "lm_head"]
    assert not left


@pytest.mark.parametrize("name", SCRATCH)
def test_packing_in_bfloat16_is_within_its_rounding(name):
    """Held against float32: the packed model is no further from the truth than the model is."""
    ids = ids_of(2, 20)
    model, packed = build(name, torch.bfloat16), build(name, torch.bfloat16)
    truth = build(name, torch.bfloat16).float().logits(ids)
    pack(packed)
    distance = typical if model.config.num_experts else gap
    error = distance(model.logits(ids), truth)
    assert distance(packed.logits(ids), truth) < 1.5 * error + 2e-3
    assert distance(stepwise(packed, ids, 9), truth) < 1.5 * error + 2e-3


@pytest.mark.parametrize("weights, compute", [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_weights_of_one_type_and_activations_of_another(weights, compute):
    """As training leaves a model: the weights are cast when packed, not at every token."""
    ids, model, packed = ids_of(2, 12), *(build("mixtral", TYPES[weights]) for _ in "ab")
    model.compute_dtype = packed.compute_dtype = TYPES[compute]
    pack(packed)
    distance = typical(packed.logits(ids), model.logits(ids))
    assert distance < (2e-2 if compute == "bfloat16" else 1e-6)
    attention = packed.model.layers.get_submodule("0").self_attn
    assert isinstance(attention.joined, Plain) and attention.joined.weight.dtype == TYPES[compute]
    experts = packed.model.layers.get_submodule("1").mlp.experts
    assert {p.dtype for p in experts.parameters()} == {TYPES[compute]}


def test_float16_keeps_norms_that_do_not_overflow():
    """The length of a vector of thousands is more than float16 holds."""
    ids = ids_of(1, 8)
    model, packed = (build("minicpm", torch.float16, embedding_multiplier=50000.0) for _ in "ab")
    pack(packed)
    expected = model.logits(ids)
    assert expected.isfinite().all() and expected.std() > 0.1
    assert gap(packed.logits(ids), expected) < 1e-2


def test_without_onednn_the_plain_layout_serves(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    ids, model, packed = ids_of(1, 9), *(build("qwen3", torch.bfloat16) for _ in "ab")
    pack(packed)
    assert type(packed.output) is Plain
    assert gap(packed.logits(ids), model.logits(ids)) < 3e-2


@pytest.mark.parametrize("kind", quantize.KINDS)
@pytest.mark.parametrize("name", ["gpt2", "gemma3", "cohere", "qwen3_moe"])
def test_rows_of_a_ragged_batch_are_each_row_alone(name, kind):
    model = build(name)
    pack(model, kind)
    prompts = [ids_of(n, seed=n).tolist() for n in (1, 7, 18, 23)]      # one side of FEW and beyond

    def run(rows):
        out = [[] for _ in rows]
        with torch.inference_mode():
            ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64)
            for row, p in zip(ids, rows):
                row[:len(p)] = torch.tensor(p)
            cache = model.new_cache(len(rows), 40)
            cache.expect([len(p) for p in rows])
            x = model(ids, cache=cache)
            last = torch.stack([row[len(p) - 1] for row, p in zip(x, rows)])
            for step in range(6):
                for made, row in zip(out, last.float()):
                    made.append(row)
                last = model(torch.full((len(rows), 1), step), cache=cache)[:, -1]
        return [torch.stack(made) for made in out]
    for together, p in zip(run(prompts), prompts):
        alone = run([p])[0]
        distance = typical if kind and model.config.num_experts else gap
        assert distance(together, alone) < (3e-2 if kind else 3e-6)

# -------------------------------------------------------------------------- 8 and 4 bits


@pytest.mark.parametrize("rows, columns", [(48, 64), (33, 50), (1, 31), (5, 1)])
def test_int8_is_at_most_half_a_step_from_each_weight(rows, columns):
    """… with a step of a 127th of the row's largest; rows of all sizes, one of zeros."""
    weight = torch.randn(rows, columns) * torch.logspace(-6, 3, rows).unsqueeze(1)
    weight[-1] = 0
    packed = Int8(weight, None)
    step = packed.scale.double().unsqueeze(1)
    assert ((grid(packed) - weight.double()).abs() <= step / 2 * (1 + 1e-6)).all()
    largest = weight.double().abs().amax(1)
    assert (step.squeeze(1) <= largest / 127 * (1 + 2 ** -8) + 1.1e-12).all()
    assert packed.bytes == rows * columns + 2 * rows


@pytest.mark.parametrize("shift", [0.0, 0.05, 3.0])
def test_int4_is_at_most_half_a_step_from_each_weight(shift):
    """… with 16 steps over each 32 weights, wherever they lie: offsets are rounded first."""
    weight = torch.randn(32, 96) * torch.logspace(-3, 1, 32).unsqueeze(1) + shift
    weight[3] = weight[3, 0]                                        # all alike
    weight[4] = 0
    packed = Int4(weight, None)
    scale = packed.grid[..., 0].double().T.repeat_interleave(GROUP, 1)
    error = (grid(packed) - weight.double()).abs()
    assert (error <= scale / 2 * 1.04).all()                # bfloat16 scales reach 3% of one less
    spread = weight.view(32, 3, 32).double().aminmax(dim=-1)
    fifteenth = (spread.max - spread.min).repeat_interleave(32, 1) / 15
    # the steps are wider only by what the rounded offset is off
    slack = weight.double().abs().view(32, 3, 32).amax(-1).repeat_interleave(32, 1) * 2 ** -8 / 7
    assert (scale <= fifteenth * 1.04 + slack * 1.04 + 1e-11).all()


@pytest.mark.parametrize("count", [1, 2, 16, 17, 32, 33, 100])
@pytest.mark.parametrize("form, rows, columns", [
    (Int8, 48, 64), (Int8, 61, 96), (Int8, 1, 32), (Int8, 33, 50), (Int8, 3, 31),
    (Int4, 48, 64), (Int4, 16, 32), (Int4, 80, 96)])
def test_the_packed_product_is_that_of_the_weights_it_stands_for(form, rows, columns, count):
    """Few rows and many take different ways; with a bias and without, flat and in sequences."""
    weight, bias = torch.randn(rows, columns), torch.randn(rows).bfloat16()
    for b in (None, bias):
        packed, x = form(weight, b), torch.randn(count, columns).bfloat16()
        expected = x.double() @ grid(packed).T + (0 if b is None else b.double())
        assert gap(packed(x), expected) < 6e-3
        for shape in ((count, 1), (1, count)):
            assert torch.equal(packed(x.view(*shape, columns)).view(count, rows), packed(x))


@pytest.mark.parametrize("form", [Plain, Blocked, Int8, Int4])
def test_any_strides_and_shapes_go_through(form):
    """A slice of a longer text, a transposed batch, a single vector, nothing at all."""
    if form is Blocked and not (torch.backends.mkldnn.is_available()
                                and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        pytest.skip("this processor has no bfloat16 product in oneDNN")
    packed, h = form(torch.randn(48, 64).bfloat16(), None), torch.randn(3, 5, 64).bfloat16()
    for x in (h[:, -1], h.transpose(0, 1), h[1, 2], h[:, :0], h[:0], h[:, 1:3, None]):
        y = packed(x)
        assert y.shape == (*x.shape[:-1], 48)
        assert torch.equal(y, packed(x.clone(memory_format=torch.contiguous_format)))


def test_a_large_matrix_is_unpacked_in_blocks_of_rows(monkeypatch):
    monkeypatch.setattr("layers.packed.BLOCK", 64 * 7)
    weight, x = torch.randn(61, 64), torch.randn(50, 64).bfloat16()
    packed = Int8(weight, None)
    assert packed.rows == 7 and gap(packed(x), x.double() @ grid(packed).T) < 6e-3
    monkeypatch.undo()
    assert torch.equal(Int8(weight, None).weight, packed.weight)


def test_float16_sums_of_steps_do_not_overflow():
    """What a GPU without bfloat16 runs: sum |q x| is beyond 65504 while y is not."""
    packed, x = Int8(torch.rand(8, 256) * 0.01, None), torch.full((40, 256), 10.0).half()
    y = packed(x)
    assert y.isfinite().all() and gap(y, x.double() @ grid(packed).T) < 2e-3


def test_int4_takes_the_matrices_that_fit_and_int8_the_others():
    fitting, others = build("llama"), build("llama", n_embd=40, intermediate_size=50)
    for model, form in ((fitting, Int4), (others, Int8)):
        expected = model.logits(ids_of(1, 40))
        read = pack(model, "int4")
        block = model.model.layers.get_submodule("1")
        attention, mlp = block.self_attn, block.mlp
        assert {type(p) for p in (attention.joined, attention.o_proj, mlp.joined,
                                  mlp.down_proj)} == {form}
        assert type(model.output) is Int8               # it decides between near-equal words
        assert form is Int4 or gap(model.logits(ids_of(1, 40)), expected) < 0.05
        assert read < 0.9 * 2 * sum(p.inputs * p.outputs for p in matrices(model))


def matrices(model: Transformer) -> list:
    """Every packed matrix of a model, each once."""
    found = [model.output]
    for module in model.modules():
        found += [p for p in vars(module).values() if isinstance(p, (Plain, Integer))]
    return list({id(p): p for p in found}.values())


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("name", SCRATCH)
def test_a_quantised_model_is_its_dequantised_twin(name, kind):
    """Every matrix unpacked and put back into an ordinary model gives the same logits, with a
    cache and without: no layer is confused with another, whatever the family."""
    ids, packed, twin = ids_of(2, 20), build(name), build(name)
    pack(packed, kind)
    for path, ours in packed.named_modules():
        target = twin.get_submodule(path)
        for key, parts in (("joined", ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")),
                           ("o_proj", ("o_proj",)), ("down_proj", ("down_proj",)),
                           ("up_proj", ("up_proj",))):
            held = vars(ours).get(key)
            if isinstance(held, Integer):
                layers = [getattr(target, p) for p in parts if hasattr(target, p)]
                values = grid(held).float().split([la.weight.shape[0] for la in layers])
                for layer, value in zip(layers, values):
                    layer.weight.data = value
    output = grid(packed.output).float()
    if twin.config.tie_word_embeddings:
        twin.to_logits = lambda h, w: Transformer.to_logits(twin, h, output)
    else:
        twin.lm_head.weight.data = output
    expected = twin.logits(ids)
    # what is left is the rounding of bfloat16 activations, which the twin does not have
    rough = build(name)
    rough.compute_dtype = torch.bfloat16
    rounding = typical(rough.logits(ids), build(name).logits(ids))
    for got in (packed.logits(ids), stepwise(packed, ids, 17)):
        assert typical(got, expected) < 2 * rounding + 5e-3

# ------------------------------------------------------------------------- quality


@pytest.fixture(scope="module")
def trained() -> tuple[Transformer, torch.Tensor]:
    """A model of bytes that has learned some Python, and text it has not seen (N, T + 1)."""
    torch.manual_seed(0)
    T, steps, rate = 64, 150, 1e-2
    text = b"".join((ROOT / name).read_bytes() for name in (
        "model.py", "layers/kv_cache.py", "families/base.py"))
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
    rows = data[:len(data) // (T + 1) * (T + 1)].view(-1, T + 1)
    rows = rows[torch.randperm(len(rows))]
    held, rows = rows[:100], rows[100:]
    model = Transformer(
        ModelConfig.from_family(
            "llama",
            vocab_size=256,
            block_size=T,
            n_layer=2,
            n_head=4,
            n_embd=64,
            intermediate_size=192,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 10, 2 * (steps - step) / steps)
        x = rows[torch.randint(len(rows), (8,))]
        loss = model(x[:, :-1], head=lambda h, w: kernels.linear_cross_entropy(h, w, x[:, 1:]))
        optimizer.zero_grad()
        (loss / x[:, 1:].numel()).backward()
        optimizer.step()
    return model.eval(), held


@torch.no_grad()
def perplexity(model: Transformer, rows: torch.Tensor) -> float:
    loss = model(rows[:, :-1], head=lambda h, w: kernels.cross_entropy(
        model.to_logits(h, w).float(), rows[:, 1:]))
    return math.exp(float(loss) / rows[:, 1:].numel())


def copy_of(model: Transformer, dtype=torch.bfloat16) -> Transformer:
    twin = Transformer(model.config)
    twin.load_state_dict(model.state_dict())
    return twin.to(dtype).eval()


def test_what_8_and_4_bits_cost_on_text_never_seen(trained):
    """Perplexity within 1% of bfloat16's in int8, and within 5% in int4."""
    model, held = trained
    base = perplexity(copy_of(model), held)
    counts = held[:, 1:].reshape(-1).bincount() / held[:, 1:].numel()
    frequencies = math.exp(float(torch.special.entr(counts).sum()))
    assert base < 0.8 * frequencies, "the model has learned too little for this to mean anything"
    for kind, share in (("", 0.005), ("int8", 0.01), ("int4", 0.05)):
        packed = copy_of(model)
        pack(packed, kind)
        assert abs(perplexity(packed, held) / base - 1) < share, kind
    # and the measure would show it: what 2 bits cost
    rough = copy_of(model)
    for p in (m.weight.data for m in rough.modules() if isinstance(m, Linear)):
        step = p.abs().amax(1, keepdim=True)
        p.copy_((p / step).round() * step)
    assert perplexity(rough, held) / base > 1.05


# --------------------------------------------------------------------------- memory


class Peak(TorchDispatchMode):
    """The most bytes of tensors that were alive at once, of those it has been shown or saw made."""

    def __init__(self, model: Transformer):
        super().__init__()
        self.live: dict = {}
        for p in model.parameters():
            self.watch(p)
        self.most = self.before = self.bytes()

    def watch(self, t: torch.Tensor) -> None:
        if t.is_mkldnn:                         # oneDNN's layout has no storage to ask
            self.live[id(t)] = (weakref.ref(t), t.numel() * t.element_size())
        else:
            ref = StorageWeakRef(t.untyped_storage())
            self.live[ref.cdata] = (ref, t.untyped_storage().nbytes())

    def bytes(self) -> int:
        def gone(ref) -> bool:
            return ref.expired() if isinstance(ref, StorageWeakRef) else ref() is None
        self.live = {k: v for k, v in self.live.items() if not gone(v[0])}
        return sum(size for _, size in self.live.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor):
                self.watch(t)
        self.most = max(self.most, self.bytes())
        return out


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("kind", quantize.KINDS)
def test_memory_never_holds_two_copies(kind, dtype, tied):
    """While packing, at most one layer is there twice; afterwards what was promised is there."""
    size = TYPES[dtype].itemsize
    model = Transformer(
        ModelConfig.from_family(
            "llama", **{**SHAPE, "n_layer": 24, "vocab_size": 512}, tie_word_embeddings=tied
        )
    ).to(TYPES[dtype])
    largest = max(2 * SHAPE["intermediate_size"], 512) * SHAPE["n_embd"]
    with Peak(model) as peak:
        read = pack(model, kind)
        gc.collect()
        after = peak.bytes()
    # of the largest matrix: its parts joined, in float32, rounded, packed
    assert peak.most <= peak.before + 5 * largest < 1.2 * peak.before
    embedding = 512 * SHAPE["n_embd"] * size
    shared = embedding if tied and not kind and size == 4 else 0
    # besides norms; an output matrix of its own is not there in two layouts
    assert after <= read + embedding - shared + 20_000
    assert read <= {"": 1.0, "int8": 0.55 * 2 / size, "int4": 0.4 * 2 / size}[kind] * peak.before


def test_bytes_are_those_that_a_token_reads():
    model = build("mixtral")
    c = model.config
    expected = sum(4 * m.weight.numel() for m in model.modules() if isinstance(m, Linear))
    experts = c.n_layer * 3 * c.num_experts_per_tok * c.moe_intermediate_size * c.n_embd
    assert pack(model) == expected + 4 * (experts + c.n_layer * c.num_experts * c.n_embd)

# --------------------------------------------------------------------------- mistakes


def test_a_wrong_name_or_model_is_one_sentence():
    model = build()
    before = model.logits(ids_of(1, 5))
    for arguments, words in (
        ((model, "int3"), "int3.*choose from int8, int4"),
        ((model, "INT8"), "INT8"),
        ((torch.nn.Linear(2, 2), "int8"), "Transformers"),
        ((None, ""), "Transformers"),
    ):
        with pytest.raises(UserError, match=words):
            pack(*arguments)
    assert torch.equal(model.logits(ids_of(1, 5)), before)          # and nothing was begun


@pytest.mark.parametrize("kind", quantize.KINDS)
def test_a_packed_model_refuses_what_it_cannot_do(tmp_path, kind):
    """Training, saving, moving, counting, packing again: one sentence, and it serves on."""
    model = build().train()
    pack(model, kind)
    assert not model.training and model.eval() is model
    before = model.logits(ids_of(1, 5))
    for what in (model.train, model.state_dict, lambda: list(model.parameters()),
                 model.parameter_count, lambda: model.to("cpu"), model.half,
                 lambda: save_model(tmp_path / "m", model),
                 lambda: model.load_state_dict(build().state_dict())):
        with pytest.raises(UserError, match="serving alone: load"):
            what()
    with pytest.raises(UserError, match="packed already"):
        pack(model)
    assert not list(tmp_path.iterdir()) and torch.equal(model.logits(ids_of(1, 5)), before)
    assert not model(ids_of(1, 5)).requires_grad                    # nothing can be learned by it
    assert model.output is not None and build().output is None


def test_a_loaded_checkpoint_is_packed(tmp_path):
    save_model(tmp_path / "m", build("qwen2"))
    model = load_model(tmp_path / "m", device="cpu")
    expected = model.logits(ids_of(2, 9))
    pack(model)
    assert gap(model.logits(ids_of(2, 9)), expected) < 1e-6

# --------------------------------------------------------------------------- generation


@pytest.mark.parametrize("name", SCRATCH)
def test_generation_is_the_same_token_by_token(name):
    """Greedy, float32, ragged prompts, beyond the context and its re-encoding."""
    prompts = [ids_of(n, seed=n).tolist() for n in (3, 11)]

    def tokens(model):
        return list(generate(model, prompts, 30, Sampling(temperature=0)))
    model, packed = build(name, block_size=24), build(name, block_size=24)
    pack(packed)
    assert tokens(packed) == tokens(model)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_quantised_model_generates_what_its_logits_say(kind, trained):
    """The likeliest token of the whole text, computed again, at nearly every step."""
    model, prompt = copy_of(trained[0]), trained[1][0, :8].tolist()
    pack(model, kind)
    made = [step[0] for step in generate(model, [prompt], 50, Sampling(temperature=0))]
    best = model.logits(torch.tensor([prompt + made]))[0].argmax(-1)[len(prompt) - 1:-1]
    # two ways round differently: a tie may fall the other way
    assert sum(a == b for a, b in zip(made, best.tolist())) >= 47
