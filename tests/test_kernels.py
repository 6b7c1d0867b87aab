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

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

import kernels
from config import UserError
from gates import (FORMS, GATES, ORACLES, backend, check_forms, close, distance, f64,
                   forward_backward, gradcheck_cases, rotation, strided)


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

    for settings, message in (
        (dict(dtype="float3"), "bfloat16"),
        (dict(only="glu+foo"), "only=foo"),
    ):
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
