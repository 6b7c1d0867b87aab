"""Every operation of kernels.py: each form against float64 autograd, and against an oracle.

Three nets, so that no single mistake slips through all of them:

    oracle      the reference form against PyTorch's own operator, or a loop written out here
    gradcheck   the reference form's gradients against finite differences, in float64
    forms       every form, forward and every gradient, against the reference in float64:
                relative L2 at most 1e-5 in float32, 1e-3 in float16, 1e-2 in bfloat16 (float16
                twice that for the reference, which rounds at every step of its formula)

The shapes are the ones that find missing masks: one row, one token, odd widths, D = 80, rows
that do not fill a block, strided inputs, an empty batch.
"""
import math
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import kernels
from backends.chunked_loss import ChunkedLoss
from config import UserError

FORMS = ("reference", "torch")
GATES = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
f64 = torch.float64


@pytest.fixture(autouse=True)
def fresh():
    """The same numbers whatever the order of the tests; the backend as it was found."""
    torch.manual_seed(0)
    before = kernels.use("auto")
    yield
    kernels.use(before)


@contextmanager
def backend(name):
    """Every operation in one form, those that an operation calls inside it included."""
    before = kernels.use(name)
    try:
        yield
    finally:
        kernels.use(before)


def forward_backward(form, call, tensors):
    """(outputs and gradients) of call(*tensors) under `form`, for a fixed upstream gradient."""
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_()
              for t in tensors]
    with backend(form):
        y = call(*leaves)
        # a fixed, structureless upstream: a gradient of ones hides errors that sum to zero
        up = torch.randn(y.shape, generator=torch.Generator().manual_seed(7), dtype=f64)
        grads = torch.autograd.grad(y, leaves, up.to(y.dtype), allow_unused=True)
    return [y, *grads]


def distance(a, b):
    """||a - b|| / ||b||, both in float64; 0 where both are empty or both are zero."""
    a, b = a.detach().to(f64), b.detach().to(f64)
    assert a.shape == b.shape
    gap, size = (a - b).norm().item(), b.norm().item()
    return gap / size if size else gap


def check_forms(call, *shapes_or_tensors, dtypes=tuple(GATES), loosen=1.0):
    """The gate of this file, for every form and type: see the module's docstring."""
    wide = [t if isinstance(t, torch.Tensor) else torch.randn(t, dtype=f64)
            for t in shapes_or_tensors]
    for dtype in dtypes:
        # round the inputs first: their own rounding is not the operation's error
        narrow = [t.to(dtype) for t in wide]
        expected = forward_backward("reference", call, [t.to(f64) for t in narrow])
        for form in FORMS:
            got = forward_backward(form, call, narrow)
            for i, (a, b) in enumerate(zip(got, expected)):
                assert (a is None) == (b is None)
                if a is None:
                    continue
                what = "output" if i == 0 else f"gradient {i - 1}"
                assert a.isfinite().all(), f"{form} {dtype} {what} is not finite"
                gap, slack = distance(a, b), loosen
                if form == "reference" and dtype == torch.float16:
                    slack = 2 * loosen
                assert gap <= GATES[dtype] * slack, f"{form} {dtype} {what}: {gap:.2e}"


def strided(*shape):
    """Random numbers of this shape whose memory is neither dense nor in order."""
    padded = [2 * n for n in shape[::-1]]
    return torch.randn(padded, dtype=f64)[tuple(slice(0, None, 2) for _ in padded)].permute(
        *range(len(shape) - 1, -1, -1))


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# ------------------------------------------------------------------------------ dispatch

def test_use_returns_the_previous_choice():
    assert kernels.use("reference") == "auto"
    assert kernels.use("torch") == "reference"
    assert kernels.use("auto") == "torch"


def test_use_refuses_a_backend_that_does_not_exist():
    with pytest.raises(UserError, match="rocm.*auto, reference, torch, triton, cuda"):
        kernels.use("rocm")
    assert kernels.use("auto") == "auto"                # a refusal changes nothing


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_a_backend_for_gpus_says_that_there_is_none(name, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UserError, match=f"--backend={name} needs a GPU"):
        kernels.use(name)
    assert kernels.use("auto") == "auto"


def test_without_triton_a_gpu_still_works(monkeypatch):
    """PyTorch for Windows or a Mac comes without Triton: auto takes PyTorch's operators there."""
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name}", name="triton.language")
    monkeypatch.setattr(kernels, "_ready", {})
    monkeypatch.setattr(kernels.importlib, "import_module", missing)
    assert not kernels.ready("triton") and not kernels.ready("triton")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match="triton is not installed"):
        kernels.use("triton")
    assert kernels.best(OnGPU()) == "torch"


class OnGPU:
    """What the dispatch looks at of a tensor."""
    is_cpu, is_cuda = False, True


def test_dispatch_takes_the_form_asked_for_and_falls_back(monkeypatch):
    """The form for the tensor's device; where an operation lacks it, the next best."""
    monkeypatch.setattr(kernels, "OPERATIONS", dict(kernels.OPERATIONS))
    monkeypatch.setattr(kernels, "_ready", dict.fromkeys(kernels.FILES, True))
    monkeypatch.setenv("TRITON_INTERPRET", "1")

    @kernels.operation
    def probe(x):
        return "reference"

    @kernels.operation
    def plain(x):
        return "reference"
    x, gpu = torch.zeros(1), OnGPU()
    assert probe(x) == probe(gpu) == probe([gpu]) == "reference"    # nothing else: the formula
    probe.torch(lambda x: "torch")
    assert probe(x) == probe(gpu) == probe([]) == "torch"
    probe.cpu(lambda x: "cpu")
    probe.triton(lambda x: "triton")
    assert (probe(x), probe(gpu), probe([gpu, gpu])) == ("cpu", "triton", "triton")
    with backend("torch"):
        assert (probe(x), probe(gpu)) == ("cpu", "torch")
    with backend("triton"):
        assert (probe(x), plain(x)) == ("triton", "reference")
    with backend("reference"):
        assert probe(x) == probe(gpu) == "reference"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with backend("cuda"):
        assert probe(gpu) == "torch"                    # it has no CUDA twin
    assert kernels.OPERATIONS["probe"] is probe


def test_auto_takes_pytorchs_operator_for_what_a_kernel_cannot(monkeypatch):
    """float64 or a huge head_dim on a GPU: by name an error, by auto the next best form."""
    monkeypatch.setattr(kernels, "OPERATIONS", dict(kernels.OPERATIONS))
    monkeypatch.setattr(kernels, "_ready", dict.fromkeys(kernels.FILES, True))
    monkeypatch.setenv("TRITON_INTERPRET", "1")

    @kernels.operation
    def probe(x):
        return "reference"

    @probe.triton
    def _(x):
        raise kernels.Unsupported("not this one")
    probe.torch(lambda x: "torch")
    assert probe(OnGPU()) == "torch"
    with backend("triton"), pytest.raises(UserError, match="not this one"):
        probe(OnGPU())


def test_every_operation_of_the_design_is_there_in_both_forms():
    wanted = """linear embedding rms_norm layer_norm rope gelu silu relu relu2 glu softmax attention
    cross_entropy linear_cross_entropy linear_kl moe dropout""".split()
    for name in wanted:
        op = kernels.OPERATIONS[name]
        assert op is getattr(kernels, name) and op.__doc__
        # PyTorch has no operator for these two
        assert "torch" in op.implementations or name in ("glu", "rope"), name
    kernels.softmax(torch.zeros(1))                     # a first tensor on a CPU reads the forms
    by_hand = {name for name in wanted if "cpu" in kernels.OPERATIONS[name].implementations}
    assert by_hand == {"rms_norm", "layer_norm", "rope", "dropout", "attention", "linear", "glu",
                       "linear_cross_entropy"}


def test_mistakes_in_bench_kernels_are_one_sentence():
    import bench
    for settings, message in ((dict(dtype="float3"), "bfloat16"), (dict(only="glu+foo"), "only=foo")):
        with pytest.raises(UserError, match=message):
            bench.main(bench.Config("kernels", **settings))


# ------------------------------------------------------------------ linear and embedding

SHAPES = [(5, 123, 123), (1, 7), (1, 1, 80), (2, 130, 64), (0, 16)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_linear(shape, bias):
    K, N = shape[-1], 33
    x, w, b = torch.randn(shape), torch.randn(N, K), torch.randn(N)
    close(kernels.linear.reference(x, w, b if bias else None),
          F.linear(x, w, b if bias else None), 1e-4)
    check_forms(kernels.linear, shape, (N, K), *([(N,)] if bias else []))


class NoShortcuts(TorchFunctionMode):
    """Refuses every operator that computes a whole formula at once."""
    WHOLE = ("softmax", "log_softmax", "rms_norm", "layer_norm", "dropout", "logsumexp")

    def __torch_function__(self, func, types, args=(), kwargs=None):
        module, name = getattr(func, "__module__", "") or "", getattr(func, "__name__", "")
        assert not module.startswith(("torch.nn.functional", "torch._C._nn")), name
        assert name not in self.WHOLE, name
        return func(*args, **(kwargs or {}))


def test_the_reference_is_plain_arithmetic():
    """The reference is there to be read: a formula in tensor arithmetic, all the way down."""
    for name, (call, *shapes) in gradcheck_cases().items():
        with backend("reference"), NoShortcuts():
            call(*(torch.randn(s, dtype=f64) for s in shapes))
    with pytest.raises(AssertionError, match="silu"), NoShortcuts():    # and it can tell
        F.silu(torch.zeros(1))


def test_linear_strided_input():
    check_forms(kernels.linear, strided(3, 5, 24), strided(7, 24))


@pytest.mark.parametrize("form", FORMS)
def test_linear_float32_master_weights_get_float32_gradients(form):
    """Mixed precision: half activations on float32 weights, gradients as wide as the weights."""
    x = torch.randn(4, 8, dtype=torch.bfloat16, requires_grad=True)
    w, b = torch.randn(5, 8, requires_grad=True), torch.randn(5, requires_grad=True)
    with backend(form):
        y = kernels.linear(x, w, b)
    y.sum().backward()
    assert (y.dtype, x.grad.dtype) == (torch.bfloat16, torch.bfloat16)
    assert (w.grad.dtype, b.grad.dtype) == (torch.float32, torch.float32)


@pytest.mark.parametrize("ids", [[[3, 0, 3], [6, 6, 6]], [[1]], [[], []]])
def test_embedding_repeated_ids_add_their_gradients(ids):
    ids = torch.tensor(ids, dtype=torch.int64)
    for form in FORMS:
        weight = torch.randn(7, 5, dtype=f64, requires_grad=True)
        with backend(form):
            y = kernels.embedding(ids, weight)
        up = torch.randn_like(y)
        y.backward(up)
        # the oracle: a matrix of one-hot rows
        hot = F.one_hot(ids, 7).to(f64)
        close(y, hot @ weight)
        close(weight.grad, torch.einsum("btv,btc->vc", hot, up))


# ------------------------------------------------------------------------- normalisation

@pytest.mark.parametrize("shape", SHAPES + [(80,)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(shape, offset):
    x, w = torch.randn(shape, dtype=f64), torch.randn(shape[-1], dtype=f64)
    close(kernels.rms_norm.reference(x, w, 1e-6, offset),
          F.rms_norm(x, (shape[-1],), w + offset, 1e-6))
    check_forms(lambda x, w: kernels.rms_norm(x, w, 1e-6, offset), shape, (shape[-1],))


@pytest.mark.parametrize("shape", SHAPES + [(80,)])
@pytest.mark.parametrize("bias", [True, False])
def test_layer_norm(shape, bias):
    C = shape[-1]
    x, w, b = (torch.randn(s, dtype=f64) for s in (shape, C, C))
    close(kernels.layer_norm.reference(x, w, b if bias else None),
          F.layer_norm(x, (C,), w, b if bias else None))
    inputs = [shape, (C,), *([(C,)] if bias else [])]
    check_forms(kernels.layer_norm, *inputs, dtypes=[torch.float32, torch.bfloat16])
    # PyTorch adds up the weight's gradient in float16 on a CPU; a GPU's kernel does not
    check_forms(kernels.layer_norm, *inputs, dtypes=[torch.float16], loosen=5)


@pytest.mark.parametrize("op", [kernels.rms_norm, kernels.layer_norm])
def test_norms_of_strided_shifted_and_tiny_inputs(op):
    check_forms(op, strided(3, 5, 24), strided(24))
    # a mean far from 0 and values near eps: where a variance in one pass, or no eps, would fail
    check_forms(op, torch.randn(4, 64, dtype=f64) + 30, (64,), dtypes=[torch.float32], loosen=5)
    check_forms(op, torch.randn(4, 64, dtype=f64) * 1e-4, (64,), dtypes=[torch.float32])


@pytest.mark.parametrize("form", FORMS)
def test_gradients_summed_over_many_rows_keep_their_accuracy(form):
    """Adding 4096 rows up in bfloat16 loses 6% of a norm's weight gradient; float32 does not."""
    for op, shapes in ((kernels.rms_norm, [(4096, 16), (16,)]),
                       (kernels.layer_norm, [(4096, 16), (16,), (16,)]),
                       (kernels.linear, [(4096, 16), (4, 16), (4,)])):
        tensors = [torch.randn(s).bfloat16() for s in shapes]
        expected = forward_backward("reference", op, [t.to(f64) for t in tensors])
        for got, right in zip(forward_backward(form, op, tensors), expected):
            assert distance(got, right) < 1e-2, op.__name__


@pytest.mark.parametrize("form", FORMS)
def test_norm_of_zeros_is_finite_and_keeps_the_type_of_x(form):
    for op in (kernels.rms_norm, kernels.layer_norm):
        for dtype in GATES:
            x = torch.zeros(3, 16, dtype=dtype, requires_grad=True)
            w = torch.ones(16, requires_grad=True)          # float32, as master weights are
            with backend(form):
                y = op(x, w)
            y.float().sum().backward()
            assert y.dtype == x.grad.dtype == dtype and w.grad.dtype == torch.float32
            assert (y == 0).all() and x.grad.isfinite().all() and w.grad.isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_rms_norm_of_large_half_values_does_not_overflow(form):
    """300^2 is beyond float16: the mean of squares must be taken in float32."""
    x = torch.full((2, 64), 300.0, dtype=torch.float16)
    with backend(form):
        close(kernels.rms_norm(x, torch.ones(64)), torch.ones_like(x), 1e-3)


# ------------------------------------------------------------------------------- position

def rotation(T, R, batch=None):
    """cos and sin (T, R/2), or (batch, T, R/2) with other positions in every row."""
    angles = torch.arange(T, dtype=f64)[:, None] * 100.0 ** (-torch.arange(0, R, 2) / R)
    if batch:
        angles = torch.stack([angles + 3 * b for b in range(batch)])
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("shape, R", [((2, 5, 3, 8), 8), ((2, 5, 3, 8), 4), ((1, 1, 1, 2), 2),
                                      ((5, 123, 2, 80), 80), ((0, 4, 2, 8), 8)])
@pytest.mark.parametrize("per_row", [False, True])
def test_rope(interleaved, shape, R, per_row):
    """A pair of features is a complex number, and rope is its product with e^(i angle)."""
    B, T = shape[:2]
    x, (cos, sin) = torch.randn(shape, dtype=f64), rotation(T, R, B if per_row and B else None)
    first, second = ((x[..., 0:R:2], x[..., 1:R:2]) if interleaved
                     else (x[..., :R // 2], x[..., R // 2:R]))
    z = torch.complex(first, second) * torch.complex(cos, sin).unsqueeze(-2)
    turned = (torch.stack((z.real, z.imag), -1).flatten(-2) if interleaved
              else torch.cat((z.real, z.imag), -1))
    close(kernels.rope.reference(x, cos, sin, interleaved), torch.cat((turned, x[..., R:]), -1))
    check_forms(lambda x: kernels.rope(x, cos, sin, interleaved), x)


def test_rope_of_strided_heads():
    """q is a slice of the joined q, k, v in the model: its rows do not lie side by side."""
    check_forms(lambda x: kernels.rope(x, *rotation(5, 8)), strided(2, 5, 3, 8))


@pytest.mark.parametrize("form", FORMS)
def test_rope_scores_depend_on_the_distance_alone(form):
    """What the rotation is for (Su 2021): <q at i, k at j> is a function of i - j."""
    q, k = torch.randn(2, 8, dtype=f64)
    cos, sin = rotation(12, 8)
    with backend(form):
        qs, ks = (kernels.rope(x.expand(1, 12, 1, 8), cos, sin)[0, :, 0] for x in (q, k))
    scores = qs @ ks.T
    for gap in (0, 3, 7):
        diagonal = scores.diagonal(-gap)
        close(diagonal, diagonal[:1].expand_as(diagonal))
    assert not torch.allclose(scores[3, 0], scores[0, 0])


# ---------------------------------------------------------------------------- activations

ORACLES = {
    "gelu": F.gelu, "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu, "relu": F.relu, "relu2": lambda x: F.relu(x) ** 2,
}


@pytest.mark.parametrize("name", kernels.ACTIVATIONS)
def test_activation(name):
    act, x = kernels.ACTIVATIONS[name], torch.randn(5, 123, dtype=f64) * 3
    with backend("reference"):
        close(act(x), ORACLES[name](x))
    for shape in SHAPES:
        check_forms(act, shape)
    check_forms(act, strided(5, 7))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", kernels.ACTIVATIONS)
def test_activation_is_finite_far_from_zero(name, form):
    """An outlier of +-200 is an ordinary day in training; exp(200) is not a float32."""
    x = torch.tensor([-200.0, -90.0, 0.0, 90.0, 200.0], requires_grad=True)
    with backend(form):
        y = kernels.ACTIVATIONS[name](x)
    y.sum().backward()
    close(y, ORACLES[name](x), 1e-5)
    assert x.grad.isfinite().all(), x.grad


@pytest.mark.parametrize("name", kernels.ACTIVATIONS)
def test_glu(name):
    gate, up = torch.randn(2, 5, 24, dtype=f64)
    with backend("reference"):
        close(kernels.glu(gate, up, name), ORACLES[name](gate) * up)
    for shape in [(5, 123), (1, 1), (0, 8)]:
        check_forms(lambda g, u: kernels.glu(g, u, name), shape, shape)
    joined = torch.randn(5, 48, dtype=f64)              # as the model splits one wide matmul
    check_forms(lambda x: kernels.glu(*x.split(24, -1), name), joined)


@pytest.mark.parametrize("shape", SHAPES)
def test_softmax(shape):
    x = torch.randn(shape, dtype=f64) * 4
    close(kernels.softmax.reference(x), torch.softmax(x, -1))
    check_forms(kernels.softmax, x)


@pytest.mark.parametrize("form", FORMS)
def test_softmax_of_large_and_masked_values(form):
    x = torch.tensor([[1e4, 1e4, -1e4], [-math.inf, 0.0, -math.inf]])
    with backend(form):
        close(kernels.softmax(x), torch.tensor([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0]]))


# -------------------------------------------------------------------------------- dropout

@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_rate_mean_and_gradient(form, p):
    x = torch.rand(400, 501) + 0.5
    x.requires_grad_()
    with backend(form):
        y = kernels.dropout(x, p)
    y.sum().backward()
    dropped = y == 0
    # the rate is p to a 256th, plus four standard deviations of 200,400 coin flips
    assert abs(dropped.float().mean() - p) < 1 / 512 + 4 * math.sqrt(p * (1 - p) / x.numel())
    assert abs(y.mean() / x.mean() - 1) < 0.02 / (1 - p)
    kept = (y / x)[~dropped]
    close(kept, kept[:1].expand_as(kept), 1e-5)         # one scale for all that is kept
    assert abs(kept[0] * (1 - p) - 1) < 0.02
    close(x.grad, torch.where(dropped, 0.0, kept[0]), 1e-5)


def test_dropout_decisions_are_independent_of_each_other():
    """Eight decisions come from one draw: neighbours, columns and calls must not agree."""
    a = kernels.keep_mask((512, 512), 0.5, torch.device("cpu")).double() - 0.5
    b = kernels.keep_mask((512, 512), 0.5, torch.device("cpu")).double() - 0.5
    noise = 5 / 512                                     # five deviations of 512^2 products / 4
    assert abs((a * b).mean() * 4) < noise
    for shift in range(1, 17):
        flat = a.flatten()
        assert abs((flat[:-shift] * flat[shift:]).mean() * 4) < noise


@pytest.mark.parametrize("form", FORMS)
def test_dropout_of_nothing_changes_nothing(form):
    x = torch.randn(3, 5, dtype=torch.bfloat16)
    with backend(form):
        assert torch.equal(kernels.dropout(x, 0.0), x)
        assert kernels.dropout(x[:0], 0.5).shape == (0, 5)
        assert kernels.dropout(x, 0.5).dtype == x.dtype


def test_dropout_is_repeated_by_the_seed():
    def draw(seed):
        torch.manual_seed(seed)
        return kernels.dropout(torch.ones(99), 0.5)
    assert torch.equal(draw(3), draw(3)) and not torch.equal(draw(3), draw(4))


# ------------------------------------------------------------------------------ attention

def attention_loop(q, k, v, scale, window=0, softcap=0.0, doc=None, positions=None):
    """The formula one query at a time, in plain words: slow, and hard to get wrong."""
    (B, H, T, D), (Hkv, S) = q.shape, k.shape[1:3]
    y = torch.zeros_like(q)
    for b in range(B):
        for h in range(H):
            kv = h // (H // Hkv)                        # query heads of a group are neighbours
            for t in range(T):
                i = S - T + t if positions is None else int(positions[b, t])
                seen = [j for j in range(S) if j <= i and (not window or i - j < window)
                        and (doc is None or doc[b, j] == doc[b, S - T + t])]
                score = torch.stack([q[b, h, t] @ k[b, kv, j] * scale for j in seen])
                if softcap:
                    score = softcap * torch.tanh(score / softcap)
                y[b, h, t] = torch.softmax(score, 0) @ v[b, kv, seen]
    return y


def documents(B, T, lengths):
    """(B, T) document numbers: runs of the given lengths, starting elsewhere in each row."""
    runs = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths * (T + B))])
    return torch.stack([runs[b:b + T] for b in range(B)])


VARIANTS = {
    "plain": {}, "scale": dict(scale=0.15), "softcap": dict(softcap=1.5),
    "window of 1": dict(window=1), "window": dict(window=3), "window beyond T": dict(window=99),
    "documents": dict(doc=[3, 1, 2]), "documents of one token": dict(doc=[1]),
    "all": dict(doc=[5, 1], window=3, softcap=2.0, scale=0.2),
}


def options(name, B, T):
    """Keyword arguments of a variant, with its documents made for this shape."""
    kw = dict(VARIANTS[name])
    return dict(kw, doc=documents(B, T, kw["doc"])) if "doc" in kw else kw


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("H, Hkv, T, S", [(4, 4, 9, 9), (4, 2, 9, 9), (3, 1, 4, 9), (2, 2, 1, 9),
                                          (2, 1, 1, 1)])
def test_attention_reference_is_the_loop(name, H, Hkv, T, S):
    q, k, v = (torch.randn(2, h, n, 6, dtype=f64) for h, n in ((H, T), (Hkv, S), (Hkv, S)))
    kw = options(name, 2, S)
    expected = attention_loop(q, k, v, **{"scale": 6 ** -0.5, **kw})
    for form in FORMS:
        with backend(form):
            close(kernels.attention(q, k, v, **kw), expected)


def test_attention_reference_is_sdpa_with_an_explicit_mask():
    q, k, v = torch.randn(3, 2, 3, 17, 8, dtype=f64)
    i = torch.arange(17)
    mask = (i[None] <= i[:, None]) & (i[:, None] - i[None] < 5)
    close(kernels.attention.reference(q, k, v, window=5),
          F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("T", [1, 2])
@pytest.mark.parametrize("window", [0, 3])
def test_attention_of_ragged_rows_at_their_own_positions(form, T, window):
    """Serving unequal prompts: row b stands at its own place among the cached keys."""
    q, (k, v) = torch.randn(3, 4, T, 6, dtype=f64), torch.randn(2, 3, 2, 9, 6, dtype=f64)
    positions = torch.tensor([2, 7, 0]).unsqueeze(1) + torch.arange(T)
    with backend(form):
        close(kernels.attention(q, k, v, positions=positions, window=window),
              attention_loop(q, k, v, 6 ** -0.5, window, positions=positions))


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("B, H, Hkv, T, D", [
    (2, 4, 2, 9, 8), (1, 1, 1, 1, 5), (2, 3, 1, 130, 80), (1, 2, 2, 257, 16)])
def test_attention_forms_agree(name, B, H, Hkv, T, D):
    """T = 130 and 257 leave a ragged last block; H > Hkv sums gradients over a group."""
    kw = options(name, B, T)
    check_forms(lambda q, k, v: kernels.attention(q, k, v, **kw),
                (B, H, T, D), (B, Hkv, T, D), (B, Hkv, T, D))


def test_attention_of_more_heads_than_a_group():
    """B*H = 50 leaves two heads for the second group of 48; with documents a row is a group."""
    for doc in (None, documents(10, 5, [2, 1])):
        check_forms(lambda q, k, v: kernels.attention(q, k, v, doc=doc),
                    *[(10, 5, 5, 4)] * 3, dtypes=[torch.float32])


def test_attention_of_strided_inputs():
    check_forms(kernels.attention, *(strided(2, 3, 9, 8) for _ in range(3)))


def test_attention_of_an_empty_batch():
    check_forms(kernels.attention, *[(0, 3, 9, 8)] * 3, dtypes=[torch.float32])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("window", [0, 40])
def test_packed_documents_are_each_document_alone(form, window):
    lengths, H, D = [1, 100, 29, 70], 2, 8              # boundaries on both sides of row 128
    q, k, v = torch.randn(3, 1, H, sum(lengths), D, dtype=f64)
    doc = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)]).unsqueeze(0)
    with backend(form):
        together = kernels.attention(q, k, v, doc=doc, window=window)
        start = 0
        for n in lengths:
            own = slice(start, start + n)
            alone = kernels.attention(q[:, :, own], k[:, :, own], v[:, :, own], window=window)
            close(together[:, :, own], alone)
            start += n


@pytest.mark.parametrize("form", FORMS)
def test_attention_sees_no_future(form):
    for dtype in (torch.float32, torch.bfloat16):       # SDPA, and the form by hand
        q, k, v = torch.randn(3, 1, 2, 140, 8, dtype=dtype)
        with backend(form):
            before = kernels.attention(q, k, v)
            k[:, :, 131:], v[:, :, 131:] = 1e4, math.nan
            after = kernels.attention(q, k, v)
        # NaN times weight 0 is NaN: blocks ahead must not even be multiplied. Inside a block a
        # mask may do it, and SDPA's are larger, so only the first block by hand is held to that
        if form != "reference" and dtype == torch.bfloat16:
            assert torch.equal(before[:, :, :128], after[:, :, :128])
        v[:, :, 131:] = 1e4
        with backend(form):
            assert torch.equal(before[:, :, :131], kernels.attention(q, k, v)[:, :, :131])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, f64])
@pytest.mark.parametrize("form", FORMS)
def test_attention_dropout(form, dtype):
    """With v the identity the output is the dropped weights, so the mask can be read from it."""
    B, H, T, p = 3, 2, 140, 0.25
    q, k = torch.randn(2, B, H, T, T).to(dtype)
    v = torch.eye(T, dtype=dtype).expand(B, H, T, T).clone()
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    with backend(form):
        weights = kernels.attention(q, k, v).detach()
        y = kernels.attention(q, k, v, dropout_p=p)
        below = torch.ones(T, T).tril().bool().expand(B, H, T, T)
        live = below & (weights > 0)                    # small weights vanish in half types
        rate = (y == 0)[live].double().mean()
        assert abs(rate - p) < 4 * math.sqrt(p / live.sum())
        mask = (y != 0).to(f64) / (1 - p)
        # gradients through the mask that was drawn: the softmax written out in float64
        q2, k2, v2 = (x.detach().to(f64).requires_grad_() for x in (q, k, v))
        score = (q2 @ k2.transpose(-1, -2) * T ** -0.5).masked_fill(~below, -math.inf)
        expected = (torch.softmax(score, -1) * mask) @ v2
        gate = 1e-10 if dtype == f64 else GATES[dtype]
        assert distance(y, expected) < gate
        up = torch.randn(B, H, T, T, dtype=f64)
        got = torch.autograd.grad(y, (q, k, v), up.to(dtype))
        for a, b in zip(got, torch.autograd.grad(expected, (q2, k2, v2), up)):
            assert a.dtype == dtype and distance(a, b) < gate


# --------------------------------------------------------------------------------- losses

LOSS_OPTIONS = [{}, dict(softcap=3.0), dict(z_loss=0.1), dict(label_smoothing=0.2),
                dict(ignore_index=2), dict(softcap=2.0, z_loss=0.1, label_smoothing=0.1)]


def targets_for(shape, V, ignore=-100):
    y = torch.randint(V, shape)
    y[torch.rand(shape) < 0.3] = ignore                 # a mask of the kind SFT makes
    return y


@pytest.mark.parametrize("kw", LOSS_OPTIONS, ids=str)
def test_cross_entropy_reference_is_the_textbook_one(kw):
    logits, ignore = torch.randn(9, 7, dtype=f64) * 3, kw.get("ignore_index", -100)
    y = targets_for((9,), 7, ignore)
    z = logits
    if kw.get("softcap"):
        z = kw["softcap"] * torch.tanh(logits / kw["softcap"])
    expected = F.cross_entropy(z, y, ignore_index=ignore, reduction="none",
                               label_smoothing=kw.get("label_smoothing", 0.0))
    expected = expected + kw.get("z_loss", 0.0) * torch.logsumexp(z, -1) ** 2 * (y != ignore)
    close(kernels.cross_entropy.reference(logits, y, reduction="none", **kw), expected)
    close(kernels.cross_entropy.reference(logits, y, **kw), expected.sum())
    assert (expected[y == ignore] == 0).all()


@pytest.mark.parametrize("kw", LOSS_OPTIONS, ids=str)
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("shape", [(5, 12), (1,), (0,), (2, 33)])
def test_cross_entropy_forms_agree(kw, reduction, shape):
    V = 123
    y = targets_for(shape, V, kw.get("ignore_index", -100))
    check_forms(lambda z: kernels.cross_entropy(z, y, reduction=reduction, **kw), (*shape, V))


@pytest.mark.parametrize("kw", LOSS_OPTIONS, ids=str)
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("shape, chunk", [((5, 12), 4), ((2, 33), 100), ((1,), 4), ((0,), 4)])
def test_linear_cross_entropy_forms_agree(kw, reduction, shape, chunk, monkeypatch):
    V, C = 123, 24
    monkeypatch.setattr(ChunkedLoss, "LOGITS", chunk * V)      # rows of a chunk
    y = targets_for(shape, V, kw.get("ignore_index", -100))
    weight = torch.randn(V, C, dtype=f64) / math.sqrt(C)
    check_forms(lambda x, w: kernels.linear_cross_entropy(x, w, y, reduction=reduction, **kw),
                (*shape, C), weight)


def test_losses_of_strided_inputs(monkeypatch):
    """A stage scores a slice of the hidden states, h[:, :-1]: its rows are not one run."""
    monkeypatch.setattr(ChunkedLoss, "LOGITS", 4 * 33)
    y, x, w = targets_for((3, 5), 33), strided(3, 5, 8), strided(33, 8)
    check_forms(lambda x, w: kernels.linear_cross_entropy(x, w, y), x, w)
    check_forms(lambda z: kernels.cross_entropy(z, y.T.contiguous().T), strided(3, 5, 33))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("op", ["cross_entropy", "linear_cross_entropy"])
def test_a_batch_without_a_target_costs_nothing_and_teaches_nothing(op, form):
    """Pitfall 1 of the public code: 0 tokens, 0/0, NaN in every weight."""
    x, w = torch.randn(6, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    y = torch.full((6,), -100)
    with backend(form):
        if op == "cross_entropy":
            loss = kernels.cross_entropy(x @ w.T, y, z_loss=0.1, label_smoothing=0.1)
        else:
            loss = kernels.linear_cross_entropy(x, w, y, z_loss=0.1, label_smoothing=0.1)
    loss.backward()
    assert loss == 0 and (x.grad == 0).all() and (w.grad == 0).all()


@pytest.mark.parametrize("form", FORMS)
def test_loss_of_huge_logits_is_finite(form):
    x = torch.eye(4) * 100
    w, y = torch.eye(4) * 100, torch.tensor([0, 1, 3, -100])
    with backend(form):
        loss = kernels.linear_cross_entropy(x, w, y, reduction="none")
    close(loss, torch.tensor([0.0, 0.0, 1e4, 0.0]))


@pytest.mark.parametrize("form", FORMS)
def test_losses_are_float32_for_half_activations(form):
    x, w = torch.randn(6, 8).bfloat16(), torch.randn(11, 8, requires_grad=True)
    y = torch.randint(11, (6,))
    with backend(form):
        for reduction in ("sum", "none"):
            loss = kernels.linear_cross_entropy(x, w, y, reduction=reduction)
            assert loss.dtype == torch.float32
            loss.sum().backward()
        assert kernels.linear_kl(x, w, x, w).dtype == torch.float32
        assert kernels.cross_entropy(x, y % 8).dtype == torch.float32
    assert w.grad.dtype == torch.float32


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("factor", [0.25, 65536.0])
def test_summed_loss_gradient_is_scaled_by_what_comes_from_above(form, factor):
    """Gradients made in the forward must still meet the token weight and the loss scaler."""
    x, w = torch.randn(6, 8, requires_grad=True), torch.randn(11, 8, requires_grad=True)
    y = torch.randint(11, (6,))
    with backend(form):
        plain = torch.autograd.grad(kernels.linear_cross_entropy(x, w, y), (x, w))
        scaled = torch.autograd.grad(kernels.linear_cross_entropy(x, w, y) * factor, (x, w))
    for a, b in zip(scaled, plain):
        close(a, b * factor, 1e-4)


def loss_calls(N, V, C):
    """The three losses on x W^T, each as a function of (x, weight)."""
    y, teacher = targets_for((N,), V), (torch.randn(N, 12), torch.randn(V + 3, 12))
    return {
        "sum": lambda x, w: kernels.linear_cross_entropy(x, w, y),
        "none": lambda x, w: kernels.linear_cross_entropy(x, w, y, reduction="none"),
        "kl": lambda x, w: kernels.linear_kl(x, w, *teacher, temperature=2.0),
    }


@pytest.mark.parametrize("name", ["sum", "none", "kl"])
def test_the_chunk_size_does_not_change_the_result(name, monkeypatch):
    N, V, C = 37, 50, 8
    call, tensors = loss_calls(N, V, C)[name], [torch.randn(N, C), torch.randn(V, C)]
    whole = forward_backward("torch", call, tensors)
    for rows in (1, 5, 36, 37, 38):
        monkeypatch.setattr(ChunkedLoss, "LOGITS", rows * V)
        for a, b in zip(forward_backward("torch", call, tensors), whole):
            assert distance(a, b) < 1e-6
    monkeypatch.setattr(ChunkedLoss, "LOGITS", V - 1)   # not even a row: one at a time
    assert distance(forward_backward("torch", call, tensors)[0], whole[0]) < 1e-6


class Largest(TorchDispatchMode):
    """The most elements that any tensor made inside has."""
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.numel())
        return out


@pytest.mark.parametrize("name", ["sum", "none", "kl"])
def test_the_logits_never_exist_whole(name, monkeypatch):
    """Memory is what the fused loss is for: nothing of N x V elements, forward or backward."""
    N, V, C, rows = 256, 300, 16, 16
    monkeypatch.setattr(ChunkedLoss, "LOGITS", rows * V)
    call, tensors = loss_calls(N, V, C)[name], [torch.randn(N, C), torch.randn(V, C)]
    with Largest() as mode:
        forward_backward("torch", call, tensors)
    assert mode.elements == max(rows * V, N * C, V * C)
    with Largest() as mode:                             # and the instrument can tell
        forward_backward("reference", call, tensors)
    assert mode.elements >= N * V


@pytest.mark.parametrize("name", ["sum", "none"])
def test_evaluation_computes_no_gradients(name):
    """Under no_grad the loss is one matmul, 2NVC operations, not the three of training."""
    N, V, C = 32, 50, 16
    x, w = torch.randn(N, C), torch.randn(V, C, requires_grad=True)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        loss_calls(N, V, C)[name](x, w)
    assert counter.get_total_flops() == 2 * N * V * C


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_linear_kl_reference_is_pytorchs_kl_div(temperature):
    x, w, tx, tw = (torch.randn(s, dtype=f64) for s in ((9, 6), (7, 6), (9, 5), (10, 5)))
    student = torch.log_softmax(x @ w.T / temperature, -1)
    # the teacher's larger vocabulary is cut to the student's before its softmax
    teacher = torch.log_softmax((tx @ tw.T)[:, :7] / temperature, -1)
    rows = F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1)
    rows = rows * temperature ** 2
    live = torch.arange(9) % 3 > 0
    for form in FORMS:
        with backend(form):
            kl = kernels.linear_kl(x, w, tx, tw, temperature=temperature)
            some = kernels.linear_kl(x, w, tx, tw, temperature=temperature, live=live)
            same = kernels.linear_kl(tx, tw, tx, tw, temperature=temperature)
        close(kl, rows.sum())
        close(some, rows[live].sum())
        assert abs(same) < 1e-12                        # a perfect student


@pytest.mark.parametrize("shape", [(5, 12), (1,), (0,)])
@pytest.mark.parametrize("masked", [False, True])
def test_linear_kl_forms_agree(shape, masked, monkeypatch):
    monkeypatch.setattr(ChunkedLoss, "LOGITS", 7 * 123)
    live = torch.rand(shape) < 0.6 if masked else None
    known = torch.randn(*shape, 16), torch.randn(130, 16) / 4

    def call(x, w):
        teacher = [t.to(x.dtype).to(f64).to(x.dtype) for t in known]
        return kernels.linear_kl(x, w, *teacher, temperature=2.0, live=live)
    # the teacher is rounded with the student, so only float32 is exact to its own gate
    check_forms(call, (*shape, 24), torch.randn(123, 24, dtype=f64) / 5, dtypes=[torch.float32])


@pytest.mark.parametrize("form", FORMS)
def test_linear_kl_teaches_the_student_alone(form):
    x, w, tx, tw = (torch.randn(s, requires_grad=True) for s in ((4, 6), (7, 6), (4, 5), (7, 5)))
    with backend(form):
        kernels.linear_kl(x, w, tx, tw).backward()
    assert x.grad.abs().sum() > 0 and w.grad.abs().sum() > 0
    assert tx.grad is None and tw.grad is None


# --------------------------------------------------------------------- mixture of experts

def moe_inputs(N, C, I, E, k, dtype=f64):
    chosen = torch.stack([torch.randperm(E)[:k] for _ in range(N)]) if N else torch.empty(
        0, k, dtype=torch.int64)
    share = torch.rand(N, k, dtype=dtype)
    gate, up, down = (torch.randn(s, dtype=dtype) / math.sqrt(s[-1])
                      for s in ((E, I, C), (E, I, C), (E, C, I)))
    return chosen, [torch.randn(N, C, dtype=dtype), share, gate, up, down]


@pytest.mark.parametrize("activation", ["silu", "gelu_new"])
def test_moe_reference_is_a_loop_over_tokens(activation):
    chosen, (x, share, gate, up, down) = moe_inputs(9, 6, 5, 4, 2)
    rows = []
    for n in range(9):
        y = 0
        for j in range(2):
            e = chosen[n, j]
            hidden = ORACLES[activation](gate[e] @ x[n]) * (up[e] @ x[n])
            y = y + share[n, j] * (down[e] @ hidden)
        rows.append(y)
    for form in FORMS:
        with backend(form):
            close(kernels.moe(x, chosen, share, gate, up, down, activation), torch.stack(rows))


@pytest.mark.parametrize("N, C, I, E, k", [(40, 24, 18, 4, 2), (1, 8, 5, 3, 1), (3, 8, 5, 16, 4),
                                           (0, 8, 5, 3, 2)])
def test_moe_forms_agree(N, C, I, E, k):
    """Three tokens and sixteen experts leave most experts idle; their gradient is zero."""
    chosen, tensors = moe_inputs(N, C, I, E, k)
    check_forms(lambda x, share, *experts: kernels.moe(x, chosen, share, *experts), *tensors)


# ------------------------------------------------------------------------------ gradcheck

def gradcheck_cases():
    y, cos_sin = torch.tensor([1, -100, 3, 0]), rotation(3, 4)
    chosen = torch.tensor([[0, 2], [1, 2], [2, 0]])
    doc = torch.tensor([[0, 0, 1, 1, 1]])
    k = kernels
    return {
        "linear": (k.linear.reference, (3, 4), (5, 4), (5,)),
        "embedding": (lambda w: k.embedding.reference(y.clamp(min=0), w), (5, 3)),
        "rms_norm": (lambda x, w: k.rms_norm.reference(x, w, 1e-6, 1.0), (3, 5), (5,)),
        "layer_norm": (k.layer_norm.reference, (3, 5), (5,), (5,)),
        "rope": (lambda x: k.rope.reference(x, *cos_sin), (1, 3, 2, 6)),
        "rope pairs": (lambda x: k.rope.reference(x, *cos_sin, True), (1, 3, 2, 6)),
        "gelu": (k.gelu.reference, (7,)),
        "gelu tanh": (lambda x: k.gelu.reference(x, "tanh"), (7,)),
        "silu": (k.silu.reference, (7,)),
        "relu2": (k.relu2.reference, (7,)),
        "glu": (k.glu.reference, (7,), (7,)),
        "softmax": (k.softmax.reference, (3, 5)),
        "attention": (lambda q, kk, v: k.attention.reference(
            q, kk, v, window=3, softcap=2.0, doc=doc), (1, 2, 5, 3), (1, 1, 5, 3), (1, 1, 5, 3)),
        "cross_entropy": (lambda z: k.cross_entropy.reference(
            z, y, softcap=3.0, z_loss=0.1, label_smoothing=0.1, reduction="none"), (4, 6)),
        "linear_cross_entropy": (lambda x, w: k.linear_cross_entropy.reference(x, w, y),
                                 (4, 3), (6, 3)),
        "linear_kl": (lambda x, w: k.linear_kl.reference(
            x, w, x.detach() + 1, w.detach() - 1, temperature=2.0), (4, 3), (6, 3)),
        "moe": (lambda x, s, g, u, d: k.moe.reference(x, chosen, s, g, u, d),
                (3, 4), (3, 2), (3, 2, 4), (3, 2, 4), (3, 4, 2)),
    }


@pytest.mark.parametrize("name", [n for n in gradcheck_cases() if n != "linear_kl"])
def test_gradcheck_of_the_reference(name):
    """Autograd of the formula against finite differences: the formula has a right derivative."""
    call, *shapes = gradcheck_cases()[name]
    tensors = [torch.randn(s, dtype=f64, requires_grad=True) for s in shapes]
    with backend("reference"):
        assert gradcheck(call, tensors)


def test_gradcheck_of_linear_kl():
    """Against a fixed teacher: the student's own numbers must not be the teacher's."""
    teacher = torch.randn(4, 5, dtype=f64), torch.randn(8, 5, dtype=f64)
    tensors = [torch.randn(s, dtype=f64, requires_grad=True) for s in ((4, 3), (6, 3))]
    for form in FORMS:
        with backend(form):
            assert gradcheck(lambda x, w: kernels.linear_kl(x, w, *teacher, temperature=2.0),
                             tensors)


@pytest.mark.parametrize("op", [kernels.rms_norm, kernels.layer_norm, kernels.relu2,
                                kernels.softmax, kernels.attention])
def test_gradcheck_of_the_hand_counted_forms(op):
    """The derivatives written by hand in the torch forms, straight against finite differences."""
    shapes = {kernels.rms_norm: [(3, 5), (5,)], kernels.layer_norm: [(3, 5), (5,)],
              kernels.attention: [(1, 2, 4, 3)] * 3}.get(op, [(3, 5)])
    tensors = [torch.randn(s, dtype=f64, requires_grad=True) for s in shapes]
    with backend("torch"):
        assert gradcheck(op, tensors)


# --- forms by hand that keep less for the backward ----------------------------------------------


def gradients(run, *leaves):
    """(value, gradients) of sum(run(...) * a fixed random tensor)."""
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    y = run(*leaves)
    noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y)
    (y * noise).sum().backward()
    return y.detach(), [x.grad for x in leaves]


def saved_bytes(run):
    """What autograd keeps of a forward, each storage once, without that of parameters."""
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t):
        run()
    return sum(t.untyped_storage().nbytes() for t in kept.values() if not t.is_leaf)


@pytest.mark.parametrize("biased", [False, True])
def test_linear_by_hand_is_autograds(biased):
    """bfloat16 activations on float32 masters: the gradients of casting and multiplying, in the
    masters' type; no cast of the weights is kept; joined layers are the layers side by side."""
    from backends import cpu
    x, w, b = torch.randn(3, 5, 32).bfloat16(), torch.randn(24, 32), torch.randn(24)
    leaves = [x, w, b] if biased else [x, w]

    def plain(x, w, b=None):
        return torch.nn.functional.linear(x, w.bfloat16(), None if b is None else b.bfloat16())
    y, grads = gradients(kernels.linear, *leaves)
    z, right = gradients(plain, *leaves)
    assert y.dtype == torch.bfloat16 and torch.equal(y, z)
    for one, other, leaf in zip(grads, right, leaves):
        assert one.dtype == leaf.dtype
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-2)
    halves = w[:10], w[10:]
    both, _ = gradients(lambda x, *ws: cpu.LinearCPU.apply(x, None, *ws), x, *halves)
    assert torch.equal(both, plain(x, w))
    joined = gradients(lambda x, *ws: cpu.LinearCPU.apply(x, None, *ws), x, *halves)[1]
    split = gradients(plain, x, w)[1]
    torch.testing.assert_close(joined[0], split[0], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(torch.cat(joined[1:]), split[1], rtol=1e-2, atol=1e-2)
    leaf, above = w.clone().requires_grad_(), x.clone().requires_grad_()
    assert saved_bytes(lambda: kernels.linear(above * 1, leaf)) == x.nbytes
    frozen = x.clone().requires_grad_()
    kernels.linear(frozen, w).sum().backward()          # a weight without a gradient
    assert frozen.grad is not None


@pytest.mark.parametrize("changed", [False, True])
def test_a_linear_after_a_gate_learns_from_what_it_was_given(changed):
    """It keeps gate and up instead of their product: unless that was changed in place since."""
    gate, up = (torch.randn(5, 24).bfloat16().requires_grad_() for _ in range(2))
    weight = torch.randn(16, 24, requires_grad=True)
    y = kernels.glu(gate, up)
    y = y.mul_(3) if changed else y
    kernels.linear(y, weight).sum().backward()
    x = torch.nn.functional.silu(gate.detach()) * up.detach() * (3 if changed else 1)
    right = torch.ones(16, 5).bfloat16() @ x
    torch.testing.assert_close(weight.grad, right.float(), rtol=1e-2, atol=1e-2)


def test_a_gate_by_hand_is_the_formulas():
    """silu(gate) up against float64, and silu(gate) itself is not kept."""
    gate, up = torch.randn(4, 7, 16), torch.randn(4, 7, 16)
    y, grads = gradients(kernels.glu, gate, up)
    right, true = gradients(kernels.glu.reference, gate.double(), up.double())
    torch.testing.assert_close(y.double(), right, rtol=1e-5, atol=1e-6)
    for one, other in zip(grads, true):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)
    a, b = gate.bfloat16().requires_grad_(), up.bfloat16().requires_grad_()
    assert saved_bytes(lambda: kernels.glu(a * 1, b * 1)) == a.nbytes + b.nbytes
    other, exact = (gradients(lambda g, u: f(g, u, activation="gelu"), gate, up)[0]
                    for f in (kernels.glu, kernels.glu.reference))
    assert torch.equal(other, exact)


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("ignored", [0, 3, 11])
def test_the_loss_by_hand_is_the_formulas(monkeypatch, reduction, ignored):
    """One pass forth and one back in place, over several chunks: loss and gradients of the formula
    on whole logits, also where some or all targets do not count, and with a frozen matrix."""
    monkeypatch.setattr(ChunkedLoss, "LOGITS", 4 * 37)
    x, w, y = torch.randn(11, 8), torch.randn(37, 8), torch.randint(37, (11,))
    y[:ignored] = -100
    value, grads = gradients(lambda x, w: kernels.linear_cross_entropy(x, w, y,
                                                                       reduction=reduction), x, w)
    right, true = gradients(lambda x, w: kernels.linear_cross_entropy.reference(
        x, w, y, reduction=reduction), x.double(), w.double())
    torch.testing.assert_close(value.double(), right, rtol=1e-5, atol=1e-5)
    for one, other in zip(grads, true):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)
    alone = gradients(lambda x: kernels.linear_cross_entropy(x, w, y, reduction=reduction), x)[1]
    torch.testing.assert_close(alone[0], grads[0])


def test_documents_behind_a_block_are_not_read():
    """Attention of packed rows skips the keys of documents that ended before a block of queries
    begins: they may hold anything. What it computes is that of each document alone."""
    torch.manual_seed(0)
    T, D = 200, 16
    q, k, v = (torch.randn(2, 3, T, D, dtype=torch.bfloat16).requires_grad_() for _ in range(3))
    doc = torch.stack([torch.arange(T) // 60, torch.full((T,), 7)])
    out = kernels.attention(q, k, v, doc=doc)
    for start in range(0, T, 60):
        part = slice(start, start + 60)
        alone = kernels.attention.reference(*(t[:1, :, part].double() for t in (q, k, v)))
        torch.testing.assert_close(out[:1, :, part].double(), alone, rtol=2e-2, atol=2e-2)
    whole = kernels.attention.reference(*(t[1:].double() for t in (q, k, v)))
    torch.testing.assert_close(out[1:].double(), whole, rtol=2e-2, atol=2e-2)
    from backends import cpu
    keys = sum((ks.stop - ks.start) * (rs.stop - rs.start) * (hs.stop - hs.start)
               for hs, rs, ks, _ in cpu.AttentionCPU.blocks(q.flatten(0, 1), 0, doc))
    assert keys < 0.75 * 6 * T * T, "nothing was skipped"
