"""triton_norm, triton_pointwise and triton_optim in the interpreter, against float64 autograd.

The gate is that of gates.py: relative L2 of the output and of every gradient against the
reference form in float64, at most 1e-5 in float32, 1e-3 in float16, 1e-2 in bfloat16. What the
interpreter cannot show (registers, spills, another GPU's code) is for test_triton_compile.py.
"""
import os
import sys

import pytest

if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("FAILED TO INTERPRET: triton was imported before TRITON_INTERPRET=1 was set; run "
                "this file alone, or set it on line 1 of conftest.py", allow_module_level=True)
os.environ["TRITON_INTERPRET"] = "1"

import math
import subprocess

import torch
import torch.nn.functional as F

import bf16_interpreter
import kernels
from backends import triton_common, triton_optim
from config import UserError
from conftest import ROOT
from model import ModelConfig, Transformer
from training.optim import Optimizer
from families import SCRATCH
from gates import (GATES, LOSS_OPTIONS, ORACLES, backend, close, distance, f64,
                          forward_backward, rotation, strided, targets_for)

bf16_interpreter.install()
kernels.ready("triton")
# lanes outside a row compute -inf - -inf and the like before they are masked away
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
SHAPES = [(5, 123), (1, 7), (1, 1, 80), (2, 3, 130), (0, 16)]


def agree(call, *shapes_or_tensors, dtypes=tuple(GATES)):
    """The gate of the Triton tests: that form in every type, here and in test_triton_tiles.py."""
    wide = [t if isinstance(t, torch.Tensor) else torch.randn(t, dtype=f64)
            for t in shapes_or_tensors]
    for dtype in dtypes:
        narrow = [t.to(dtype) for t in wide]        # rounding an input is not the kernel's error
        expected = forward_backward("reference", call, [t.to(f64) for t in narrow])
        got = forward_backward("triton", call, narrow)
        for i, (a, b) in enumerate(zip(got, expected)):
            what = "output" if i == 0 else f"gradient {i - 1}"
            assert a.isfinite().all(), f"{dtype} {what} is not finite"
            gap = distance(a, b)
            assert gap <= GATES[dtype], f"{dtype} {what}: {gap:.2e}"


def test_every_row_operation_has_a_triton_form():
    names = """embedding rms_norm layer_norm rope gelu silu relu relu2 glu dropout
    softmax cross_entropy adamw muon clip_grad_norm""".split()
    for name in names:
        assert "triton" in kernels.OPERATIONS[name].implementations, name


# ------------------------------------------------------------------------------ embedding

@pytest.mark.parametrize("ids", [[[3, 0, 3], [6, 6, 6]], [[1]], [[], []], [[5] * 70 + [2] * 3]])
@pytest.mark.parametrize("width", [5, 1100])
def test_embedding_repeated_ids_add_their_gradients(ids, width):
    """70 times one id is more than a program's run of 32: the sum crosses programs."""
    ids = torch.tensor(ids, dtype=torch.int64)
    agree(lambda w: kernels.embedding(ids, w), (7, width),
          dtypes=[torch.float32] if width > 5 else tuple(GATES))


def test_embedding_of_an_id_outside_the_table_is_nan_and_touches_nothing():
    weight = torch.randn(4, 8, requires_grad=True)
    with backend("triton"):
        y = kernels.embedding(torch.tensor([1, 4, -1, 2 ** 40]), weight)
    assert y[0].isfinite().all() and y[1:].isnan().all()
    y[0].sum().backward()
    close(weight.grad, F.one_hot(torch.tensor(1), 4).float()[:, None].expand(4, 8))


# -------------------------------------------------------------------------- normalisation

@pytest.mark.parametrize("shape", SHAPES + [(80,), (3, 1500), (5, 41, 123)])
def test_norms(shape):
    """(5, 41, 123): many more rows than the programs that share the sum of a weight's gradient."""
    C, big = shape[-1:], len(shape) == 3 and shape[0] == 5
    types = [torch.float32] if big else tuple(GATES)
    agree(lambda x, w: kernels.rms_norm(x, w, 1e-6, 1.0), shape, C, dtypes=types)
    agree(kernels.layer_norm, shape, C, C, dtypes=types)
    agree(kernels.layer_norm, shape, C, dtypes=[torch.float32])


@pytest.mark.parametrize("op", [kernels.rms_norm, kernels.layer_norm])
def test_norms_of_strided_shifted_and_tiny_inputs(op):
    agree(op, strided(3, 5, 24), strided(24))
    agree(op, torch.randn(4, 64, dtype=f64) * 1e-4, (64,), dtypes=[torch.float32])
    heads = torch.randn(2, 3, 4, 40, dtype=f64)             # q's part of a joined q, k, v
    agree(lambda x, w: op(x[..., :24], w), heads, (24,), dtypes=[torch.float32])
    # the reference rounds a mean of 30 to float32's grid as well: five times the gate
    x, w = (torch.randn(4, 64) + 30, torch.randn(64))
    want = forward_backward("reference", op, [x.to(f64), w.to(f64)])
    for a, b in zip(forward_backward("triton", op, [x, w]), want):
        assert distance(a, b) < 5e-5


def test_norms_in_mixed_precision():
    """bfloat16 rows under float32 weights: the result is narrow, the weight's gradient is not."""
    for op in (kernels.rms_norm, kernels.layer_norm):
        x = torch.randn(300, 16).bfloat16().requires_grad_()
        w = torch.ones(16, requires_grad=True)
        with backend("triton"):
            y = op(x, w)
        up = torch.randn(300, 16).bfloat16()
        y.backward(up)
        assert y.dtype == x.grad.dtype == torch.bfloat16 and w.grad.dtype == torch.float32
        wide = x.detach().to(f64), w.detach().to(f64).requires_grad_()
        op.reference(*wide).backward(up.to(f64))
        assert distance(w.grad, wide[1].grad) < 1e-6        # 300 rows added in float32


def test_norms_of_zeros_and_of_large_half_values():
    with backend("triton"):
        for op in (kernels.rms_norm, kernels.layer_norm):
            x = torch.zeros(3, 16, requires_grad=True)
            op(x, torch.ones(16)).sum().backward()
            assert x.grad.isfinite().all()
        x = torch.full((2, 64), 300.0, dtype=torch.float16)     # 300^2 is beyond float16
        close(kernels.rms_norm(x, torch.ones(64)), torch.ones_like(x), 1e-3)


# ------------------------------------------------------------------------------- position

@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("shape, R", [((2, 5, 3, 8), 8), ((2, 5, 3, 8), 4), ((1, 1, 1, 2), 2),
                                      ((2, 41, 2, 80), 80), ((1, 2, 2, 200), 40),
                                      ((0, 4, 2, 8), 8)])
def test_rope(interleaved, shape, R):
    """(200, 40): the 160 features that do not turn are more than a block of those that do."""
    for per_row in (None, shape[0]):
        cos, sin = rotation(shape[1], R, per_row)
        agree(lambda x: kernels.rope(x, cos, sin, interleaved), shape,
              dtypes=[torch.float32] if per_row else tuple(GATES))


def test_rope_of_strided_heads_and_of_one_table_for_a_batch():
    cos, sin = rotation(5, 8)
    agree(lambda x: kernels.rope(x, cos, sin), strided(2, 5, 3, 8))
    # heads are a slice of the joined q, k, v; the table of batch 1 serves all rows
    agree(lambda x: kernels.rope(x[:, :, 1:3], cos[None], sin[None]), (2, 5, 6, 8))


# ---------------------------------------------------------------------------- activations

@pytest.mark.parametrize("name", kernels.ACTIVATIONS)
def test_activation_and_its_glu(name):
    act = kernels.ACTIVATIONS[name]
    for shape in [(5, 123), (1, 1), (0, 8)]:
        agree(act, shape)
        agree(lambda g, u: kernels.glu(g, u, name), shape, shape)
    agree(act, strided(5, 7), dtypes=[torch.float32])
    # the halves of one wide matmul: rows of 24 that lie 48 apart
    agree(lambda x: kernels.glu(*x.split(24, -1), name), (5, 48), dtypes=[torch.float32])


@pytest.mark.parametrize("name", kernels.ACTIVATIONS)
def test_activation_is_finite_far_from_zero_and_keeps_nan(name):
    x = torch.tensor([-200.0, -90.0, 0.0, 90.0, 200.0], requires_grad=True)
    with backend("triton"):
        y = kernels.ACTIVATIONS[name](x)
        y.sum().backward()
        assert kernels.ACTIVATIONS[name](torch.tensor([math.nan])).isnan().all()
    close(y, ORACLES[name](x), 1e-5)
    assert x.grad.isfinite().all(), x.grad


def test_rows_beyond_32_bits_of_offset():
    """Two rows 2^31 elements apart: an offset of 32 bits would read before the tensor."""
    try:
        memory = torch.empty(2 ** 31 + 64, dtype=torch.float16)     # touched at both ends only
    except RuntimeError:
        pytest.skip("no address space for 4 GB")
    x = memory.as_strided((2, 64), (2 ** 31, 1))
    x.copy_(torch.randn(2, 64))
    for call in (lambda x: kernels.rms_norm(x, torch.ones(64)), kernels.silu, kernels.softmax,
                 lambda x: kernels.cross_entropy(x, torch.tensor([3, 5]), reduction="none")):
        with backend("triton"):
            got = call(x)
        with backend("reference"):
            assert distance(got, call(x.to(f64))) < 1e-3


# -------------------------------------------------------------------------------- dropout

@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_rate_mean_and_gradient(p):
    x = torch.rand(100, 501) + 0.5
    x.requires_grad_()
    with backend("triton"):
        y = kernels.dropout(x, p)
    y.sum().backward()
    dropped = y == 0
    assert abs(dropped.float().mean() - p) < 4 * math.sqrt(p * (1 - p) / x.numel())
    close(y, torch.where(dropped, 0.0, x / (1 - p)), 1e-5)
    close(x.grad, torch.where(dropped, 0.0, torch.tensor(1 / (1 - p))), 1e-5)   # the same mask


def test_dropout_decisions_are_independent_of_each_other():
    """Four blocks share one Philox call: neighbours, blocks and calls must not agree."""
    with backend("triton"):
        a, b = ((kernels.dropout(torch.ones(2 ** 16), 0.5) > 0).double() - 0.5 for _ in range(2))
    noise = 5 / 2 ** 8
    assert abs((a * b).mean() * 4) < noise
    for shift in [1, 2, 3, 4, 32, 1024, 2048, 3072, 4096]:
        assert abs((a[:-shift] * a[shift:]).mean() * 4) < noise, shift


def test_dropout_of_nothing_and_of_everything_and_by_seed():
    def draw(seed):
        torch.manual_seed(seed)
        return kernels.dropout(torch.ones(99), 0.5)
    x = torch.randn(3, 5).bfloat16()
    with backend("triton"):
        assert torch.equal(kernels.dropout(x, 0.0), x)
        assert (kernels.dropout(x, 1.0) == 0).all()
        assert kernels.dropout(x[:0], 0.5).shape == (0, 5)
        assert torch.equal(draw(3), draw(3)) and not torch.equal(draw(3), draw(4))


# ------------------------------------------------------------------------------- softmax

@pytest.mark.parametrize("shape", SHAPES + [(2, 5000)])
def test_softmax(shape):
    """5000 columns are two blocks: the running sum is rescaled, or not."""
    agree(kernels.softmax, torch.randn(shape, dtype=f64) * 4)


def test_softmax_of_strided_large_and_masked_values():
    agree(kernels.softmax, strided(3, 5, 24), dtypes=[torch.float32])
    x = torch.full((3, 5000), -math.inf)                    # a whole block of -inf comes first
    x[0, :3], x[1, 4999], x[2, 4500:4502] = torch.tensor([1e4, 1e4, -1e4]), 0.0, 2.0
    with backend("triton"):
        close(kernels.softmax(x), torch.softmax(x, -1))


# --------------------------------------------------------------------------------- losses

@pytest.mark.parametrize("kw", LOSS_OPTIONS, ids=str)
@pytest.mark.parametrize("shape", [(9, 7), (1, 2), (2, 3, 130), (0, 5)])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_cross_entropy(kw, shape, reduction):
    y = targets_for(shape[:-1], shape[-1], kw.get("ignore_index", -100))
    agree(lambda z: kernels.cross_entropy(z, y, reduction=reduction, **kw),
          torch.randn(shape, dtype=f64) * 3,
          dtypes=tuple(GATES) if shape == (9, 7) else [torch.float32])


def test_cross_entropy_of_more_than_one_block_and_of_strided_logits():
    y = torch.tensor([4999, 0, -100])
    for kw in ({}, dict(softcap=2.0, z_loss=0.1, label_smoothing=0.1)):
        agree(lambda z: kernels.cross_entropy(z, y, **kw), (3, 5000))
        agree(lambda z: kernels.cross_entropy(z[:, :77], y % 77, **kw), (3, 100),
              dtypes=[torch.float32])


def test_cross_entropy_of_ignored_rows_only_and_of_masked_words():
    y = torch.full((4,), -100)
    z = torch.randn(4, 9)
    z[2] = math.nan                                 # what is ignored may be anything
    z.requires_grad_()
    with backend("triton"):
        loss = kernels.cross_entropy(z, y, z_loss=0.1)
        loss.backward()
        assert loss == 0 and (z.grad == 0).all()
        z = torch.tensor([[0.0, -math.inf, 1.0]], requires_grad=True)
        kernels.cross_entropy(z, torch.tensor([2])).backward()
    close(z.grad, torch.tensor([[1, 0, 0]]) * math.exp(-math.log1p(math.e))
          - torch.tensor([[0, 0, 1]]) * math.exp(-math.log1p(math.e)), 1e-6)


def test_cross_entropy_of_a_target_outside_the_vocabulary_is_nan_not_a_wild_read():
    with backend("triton"):
        loss = kernels.cross_entropy(torch.zeros(3, 5), torch.tensor([4, 5, -7]),
                                     reduction="none")
    assert loss[0].isfinite() and loss[1:].isnan().all()


def test_cross_entropy_leaves_the_callers_logits_alone():
    z = torch.randn(3, 8, requires_grad=True)
    before = z.detach().clone()
    with backend("triton"):
        loss = kernels.cross_entropy(z, torch.tensor([1, 2, 3]))
        loss.backward(retain_graph=True)
        first = z.grad.clone()
        loss.backward()                             # and a second backward gives the same again
    assert torch.equal(z.detach(), before)
    close(z.grad, 2 * first)


# ------------------------------------------------------------------------------ optimizer

OPTIM = [(7, 5), (5, 7), (64, 128), (11,), (1, 4), (2, 3, 4), (0, 3), (70, 70)]


def numbers(seed, shapes=OPTIM, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator).to(dtype) for s in shapes]


def same(form_a, form_b, gate=1e-6):
    assert len(form_a) == len(form_b)
    for a, b in zip(form_a, form_b):
        assert distance(a, b) < gate


def adam(form, params, dtype=torch.float32, steps=3):
    """(parameters, m, v) after some steps of a schedule that starts and ends at other rates."""
    m, v = ([torch.zeros_like(p, dtype=torch.float32) for p in params] for _ in range(2))
    with backend(form):
        for step in range(1, steps + 1):
            grads = numbers(step, [p.shape for p in params], dtype)
            kernels.adamw(params, grads, m, v, step=step, lr=0.1 / step, beta1=0.9, beta2=0.999,
                        eps=1e-8, weight_decay=0.1 * (step > 1))
    return [*params, *m, *v]


def test_adamw_is_the_reference():
    same(adam("triton", numbers(0)), adam("reference", numbers(0)))


def test_adamw_of_more_tensors_than_one_launch_takes():
    shapes = [(n % 7 + 1, 3) for n in range(triton_optim.TENSORS + 5)]
    same(adam("triton", numbers(0, shapes), steps=1),
         adam("reference", numbers(0, shapes), steps=1))


def test_adamw_of_aligned_unaligned_and_larger_tensors():
    """Sizes of a multiple of 16 at such addresses take wide loads; a view at an odd one cannot."""
    def make():
        whole = numbers(0, [(3 * triton_optim.CHUNK + 16,)])[0]
        return [[whole.clone(), *numbers(1, [(32, 16)])],       # more than a program's share
                [whole[1:65].view(4, 16), *numbers(2, [(16, 16)])]]
    for ours, theirs in zip(make(), make()):
        same(adam("triton", ours, steps=1), adam("reference", theirs, steps=1))


def test_adamw_of_transposed_and_of_bfloat16_parameters():
    ours, theirs = ([numbers(0)[0].T, *numbers(1)] for _ in range(2))
    same(adam("triton", ours), adam("reference", theirs))
    # each type's tensors are a launch of their own; m and v stay float32
    ours = numbers(0, dtype=torch.bfloat16)
    theirs = [p.clone() for p in ours]
    same(adam("triton", ours, torch.bfloat16), adam("reference", theirs, torch.bfloat16), 1e-2)


def test_muon_is_the_torch_form():
    """Both run Newton-Schulz in bfloat16, whose rounding is all that sets them apart."""
    shapes = [(32, 8), (8, 32), (8, 32), (16, 16)]
    results = {}
    for form in ("reference", "torch", "triton"):
        params, momentum = numbers(0, shapes), numbers(9, shapes)
        params[1] = params[1].T.contiguous().T                  # a transposed one among them
        with backend(form):
            kernels.muon(params, numbers(1, shapes), momentum, lr=1.0, beta=0.95, weight_decay=0.1)
        results[form] = [p - 0.9 * q for p, q in zip(params, numbers(0, shapes))], momentum
    same(results["triton"][0], results["torch"][0], 0.02)
    same(results["triton"][0], results["reference"][0], 0.05)
    same(results["triton"][1], results["reference"][1])


@pytest.mark.parametrize("max_norm", [0.0, 0.1, 1e6])
@pytest.mark.parametrize("scale", [1.0, 0.01, torch.tensor(3.0)])
def test_clip_grad_norm(max_norm, scale):
    ours, theirs = (numbers(1) + numbers(2)[:1] for _ in range(2))
    ours[-1], theirs[-1] = ours[-1].T, theirs[-1].T
    with backend("triton"):
        norm = kernels.clip_grad_norm(ours, max_norm, scale)
    with backend("reference"):
        want = kernels.clip_grad_norm(theirs, max_norm, scale)
    assert norm.ndim == 0
    same([norm, *ours], [want, *theirs])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_gradient_shows_in_the_norm(bad):
    grads = numbers(1)
    grads[2][1, 1] = bad
    with backend("triton"):
        assert not torch.isfinite(kernels.clip_grad_norm(grads, 1.0))
        assert kernels.clip_grad_norm([torch.zeros(0)], 1.0) == 0


# --------------------------------------------------------------------------- what is refused

def test_errors_are_one_sentence(monkeypatch):
    x, w = torch.zeros(2, 8), torch.ones(8)
    wrong = [
        (lambda: kernels.rms_norm(x.double(), w), "not torch.float64"),
        (lambda: kernels.rms_norm(x, w[:7]), "rms_norm: the shapes do not fit"),
        (lambda: kernels.layer_norm(x, w, w[:7]), "layer_norm: the shapes do not fit"),
        (lambda: kernels.rms_norm(torch.zeros(1, 9000), torch.ones(9000)), "up to 8192"),
        (lambda: kernels.glu(x, x[:1]), "glu: the shapes"),
        (lambda: kernels.glu(x, x, "swish2"), "'swish2': choose gelu, gelu_new"),
        (lambda: kernels.rope(x.view(1, 2, 1, 8), *rotation(3, 8)), "rope: the shapes"),
        (lambda: kernels.cross_entropy(x, torch.zeros(3, dtype=torch.int64)), "cross_entropy"),
        (lambda: adam("triton", [x.double()]), "not torch.float64"),
        (lambda: kernels.adamw([x], [x[:1]], [x], [x], step=1, lr=1., beta1=.9, beta2=.9, eps=1e-8,
                             weight_decay=0.), "of the same shapes"),
    ]
    with backend("triton"):
        for call, message in wrong:
            with pytest.raises(UserError, match=message) as error:
                call()
            assert "\n" not in str(error.value)
        monkeypatch.setattr(triton_common, "INTERPRETED", False)
        with pytest.raises(UserError, match="need a GPU, and a tensor is on cpu"):
            kernels.silu(x)


# ------------------------------------------------------------------------- inside a program

@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_trains_the_same_on_these_kernels(family, checkpointing):
    """Five steps of loss, clipping and AdamW under activation checkpointing, form against form."""
    ids = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(1))

    def losses(form):
        torch.manual_seed(0)
        model = Transformer(ModelConfig(**{**SCRATCH[family].flags, **dict(
            vocab_size=50, block_size=8, n_layer=2, n_head=2, n_embd=16)}))
        model.checkpointing = checkpointing
        optimizer = Optimizer(model.named_parameters(), learning_rate=1e-2)
        with backend(form):
            for _ in range(5):
                logits = model(ids[:, :-1])
                loss = kernels.cross_entropy(logits, ids[:, 1:])
                loss.backward()
                kernels.clip_grad_norm(optimizer.gradients(), 1.0, 1 / 16)
                optimizer.step()
                optimizer.zero_grad()
                yield loss.item()

    got, want = list(losses("triton")), list(losses("reference"))
    assert want[-1] < want[0]
    assert got == pytest.approx(want, rel=1e-4)


def test_autocast():
    """Under autocast a matmul is bfloat16 and the weights of a norm are not."""
    w, x = torch.randn(16, 16), torch.randn(4, 16)
    scale = torch.ones(16, requires_grad=True)
    with backend("triton"), torch.autocast("cpu", dtype=torch.bfloat16):
        y = kernels.rms_norm(x @ w, scale)
        kernels.cross_entropy(y, torch.tensor([1, 2, 3, 4])).backward()
    assert y.dtype == torch.bfloat16 and scale.grad.dtype == torch.float32
    assert scale.grad.isfinite().all()


TRACE = '''
import torch, torch.utils._triton, triton, types
from torch._dynamo.backends.common import aot_autograd
from triton.backends.compiler import GPUTarget
# no GPU here: say that there is one, so that dynamo takes the kernels for kernels
torch.utils._triton.has_triton = lambda: True
triton.runtime.driver.set_active(types.SimpleNamespace(
    get_current_target=lambda: GPUTarget("cuda", 90, 32)))
import kernels
from backends import triton_loss, triton_norm, triton_optim, triton_pointwise
for module in (triton_loss, triton_norm, triton_optim, triton_pointwise):
    module.check = lambda *tensors: None
kernels.ready("torch")
kernels._backend = "triton"          # use() would ask for a GPU

class Done(Exception):
    pass

def forward(graph, inputs):
    print("launches", sum("triton_kernel" in str(n.target) for n in graph.graph.nodes))
    def stop(*args):
        raise Done
    return stop

def step(ids, table, branch, w, b, cos, sin):
    x = kernels.dropout(kernels.embedding(ids, table), 0.1)
    y = kernels.rms_norm(x + branch, w)
    y = kernels.rope(y.view(1, 4, 2, 8), cos, sin).view(4, 16)
    y = kernels.glu(*kernels.layer_norm(y, w, b).split(8, -1))
    return kernels.cross_entropy(kernels.gelu(kernels.softmax(y)), ids)

leaf = lambda *shape: torch.randn(shape, requires_grad=True)
whole = torch.compile(step, backend=aot_autograd(fw_compiler=forward), fullgraph=True)
try:
    whole(torch.arange(4), leaf(9, 16), leaf(4, 16), leaf(16), leaf(16), torch.randn(4, 4),
          torch.randn(4, 4))
except Done:
    print("one graph")
'''


def test_torch_compile_traces_every_operation_into_one_graph(tmp_path):
    """Forward and backward, launches and all, without a graph break. Tracing needs no GPU."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env.update(PYTHONPATH=str(ROOT), TRITON_CACHE_DIR=str(tmp_path), TRITON_DEFAULT_FP_FUSION="1")
    result = subprocess.run([sys.executable, "-c", TRACE], env=env, capture_output=True, text=True)
    assert result.stdout.split("\n")[:2] == ["launches 9", "one graph"], result.stderr[-2000:]
