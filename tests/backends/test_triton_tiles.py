"""triton_loss, triton_moe and triton_matmul in the interpreter, against float64 autograd.

The gate is that of gates.py: relative L2 of the output and of every gradient against the
reference form in float64, at most 1e-5 in float32, 1e-3 in float16, 1e-2 in bfloat16. The
interpreter cannot show races, spills or cuBLAS's own sum of bfloat16 products in float32.
"""
import os
import sys

import pytest

if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("FAILED TO INTERPRET: triton was imported before TRITON_INTERPRET=1 was set; run "
                "this file alone, or set it on line 1 of conftest.py", allow_module_level=True)
os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import bf16_interpreter
import kernels
from backends import triton_loss, triton_moe
from config import UserError
from gates import (GATES, backend, close, distance, f64, forward_backward,
                          strided)
from test_triton_rows import agree

bf16_interpreter.install()
# lanes outside a row compute -inf - -inf and the like before they are masked away
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
single = [torch.float32]


class Largest(TorchDispatchMode):
    """Remembers the largest result of any operator, in bytes, and counts the matmuls."""
    def __init__(self):
        super().__init__()
        self.bytes, self.matmuls = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.matmuls += "mm" in function.__name__
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor):
                self.bytes = max(self.bytes, t.nbytes)
        return out


@pytest.fixture
def chunks(monkeypatch):
    """chunks(n): a chunk of logits is n rows from here on."""
    return lambda n: monkeypatch.setattr(triton_loss, "chunk_rows", lambda N, C, V: min(N, n))


def test_every_tiled_operation_has_a_triton_form():
    for name in ("linear", "linear_cross_entropy", "linear_kl", "moe"):
        assert "triton" in kernels.OPERATIONS[name].implementations, name


# --------------------------------------------------------------------------------- linear

@pytest.mark.parametrize("shape, out", [((5, 13, 123), 150), ((1, 16), 7), ((7,), 1), ((0, 16), 8),
                                        ((2, 80), 64)])
def test_linear(shape, out):
    agree(kernels.linear, shape, (out, shape[-1]), (out,))
    agree(kernels.linear, shape, (out, shape[-1]), dtypes=single)


def test_linear_of_many_tiles_covers_all_of_them():
    """17 tiles high: two bands of the grid and a ragged third, in float32's tiles of 64."""
    agree(kernels.linear, (1041, 40), (130, 40), dtypes=single)


def test_linear_strided_input_and_master_weights():
    agree(kernels.linear, strided(5, 9, 24), strided(40, 24), strided(40), dtypes=single)
    x, w = torch.randn(40, 16).bfloat16().requires_grad_(), torch.randn(48, 16, requires_grad=True)
    with backend("triton"):
        y = kernels.linear(x, w)
    y.backward(torch.ones_like(y))
    assert y.dtype == x.grad.dtype == torch.bfloat16 and w.grad.dtype == torch.float32
    close(w.grad, x.detach().float().sum(0).expand(48, 16), 1e-4)


# --------------------------------------------------------------------- linear cross entropy

OPTIONS = [{}, {"softcap": 3.0, "z_loss": 0.1, "label_smoothing": 0.1}]


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "all"])
@pytest.mark.parametrize("shape, V, rows", [((3, 5, 33), 123, 4), ((1, 16), 7, 9), ((0, 16), 9, 4),
                                            ((3, 40), 4200, 2)])
def test_linear_cross_entropy(shape, V, rows, options, reduction, chunks):
    """Several chunks, the last one ragged, and 4200 logits: more than one block of a row."""
    chunks(rows)
    targets = torch.randint(0, V, shape[:-1])
    targets.view(-1)[1:2] = -100                        # an ignored row between others
    agree(lambda x, w: kernels.linear_cross_entropy(x, w, targets, reduction=reduction, **options),
          shape, (V, shape[-1]), dtypes=single if V > 4000 else tuple(GATES))


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_linear_cross_entropy_all_ignored_or_out_of_the_vocabulary(reduction):
    x, w = torch.randn(3, 16, requires_grad=True), torch.randn(9, 16, requires_grad=True)
    with backend("triton"):
        loss = kernels.linear_cross_entropy(x, w, torch.full((3,), 5), ignore_index=5,
                                            reduction=reduction)
        loss.sum().backward()
        wild = kernels.linear_cross_entropy(x, w, torch.tensor([0, 9, -1]), reduction="none")
    assert not loss.any() and not x.grad.any() and not w.grad.any()
    assert wild[0].isfinite() and wild[1:].isnan().all()


def test_linear_cross_entropy_strided_and_one_sided():
    """Only x or only W learns: the other's gradient is not made."""
    targets = torch.randint(0, 30, (4, 6))
    call = lambda x, w: kernels.linear_cross_entropy(x, w, targets, reduction="none")
    agree(call, strided(4, 6, 24), strided(30, 24), dtypes=single)
    x, w = torch.randn(4, 6, 24, dtype=f64), torch.randn(30, 24, dtype=f64)
    for reduction in ("sum", "none"):
        kl = lambda x, w: kernels.linear_cross_entropy(x, w, targets, reduction=reduction)
        agree(lambda x: kl(x, w.to(x.dtype)), x, dtypes=single)
        agree(lambda w: kl(x.to(w.dtype), w), w, dtypes=single)


def test_a_sums_gradients_may_be_asked_for_twice():
    """The backward scales what the forward made: it must not do so in place."""
    x, w = torch.randn(5, 16, requires_grad=True), torch.randn(9, 16, requires_grad=True)
    with backend("triton"):
        loss = kernels.linear_cross_entropy(x, w, torch.arange(5)) * 3
    once = torch.autograd.grad(loss, (x, w), retain_graph=True)
    for a, b in zip(once, torch.autograd.grad(loss, (x, w))):
        assert torch.equal(a, b)


def test_a_small_upstream_factor_is_not_rounded_to_bfloat16():
    """1 / tokens in bfloat16 is off by up to 0.4%, the same way for every gradient."""
    x = torch.randn(5, 16).bfloat16().requires_grad_()
    w = torch.randn(9, 16, requires_grad=True)
    with backend("triton"):
        loss = kernels.linear_cross_entropy(x, w, torch.arange(5))
    whole, = torch.autograd.grad(loss, w, retain_graph=True)
    part, = torch.autograd.grad(loss / 1001, w)
    assert part.dtype == torch.float32 and distance(part, whole / 1001) < 1e-6


def losses(x, w, targets, reduction="sum"):
    """The two losses of the output layer, the same to call."""
    teacher = torch.randn(len(w) + 3, 8), torch.randn(*x.shape[:-1], 8)
    return [lambda: kernels.linear_cross_entropy(x, w, targets, reduction=reduction),
            lambda: kernels.linear_kl(x, w, teacher[1], teacher[0])]


def test_no_tensor_is_as_large_as_all_logits(chunks):
    """The memory rule, forward and backward, sum and per row: a chunk of 4 of 24 rows at a time."""
    chunks(4)
    x, w = torch.randn(24, 16, requires_grad=True), torch.randn(192, 16, requires_grad=True)
    targets = torch.randint(0, 192, (24,))
    with backend("triton"):
        for loss in losses(x, w, targets) + losses(x, w, targets, "none")[:1]:
            with Largest() as seen:
                loss().sum().backward()
            assert seen.bytes <= w.nbytes < 24 * 192 * 4


def test_evaluation_makes_no_gradients():
    """Under no_grad, or where nothing learns, a chunk is one matmul (a teacher's is another)."""
    x, w = torch.randn(6, 16), torch.randn(9, 16)
    targets = torch.arange(6)
    with backend("triton"):
        for learns in (True, False):
            x.requires_grad_(learns), w.requires_grad_(learns)
            for loss, matmuls in zip(losses(x, w, targets), (1, 2)):
                with torch.set_grad_enabled(not learns), Largest() as seen:
                    value = loss()
                assert seen.matmuls == matmuls and not value.requires_grad


@pytest.mark.parametrize("N, C, V", [(16384, 4096, 131072), (65536, 768, 50257), (1000, 64, 256),
                                     (8192, 2560, 262144), (2 ** 20, 1024, 32000)])
def test_chunk_rule(N, C, V):
    """Chunks cover the rows, are of one size, and hold 1024 rows or more but little memory."""
    rows = triton_loss.chunk_rows(N, C, V)
    chunks = -(-N // rows)
    assert min(N, 1024) <= rows <= N and rows * V <= max(2 ** 28, N * C + 128 * V, N * V // chunks)
    assert N - (chunks - 1) * rows > rows // 2 or chunks > 8


def test_losses_under_autocast():
    """float32 activations are multiplied in bfloat16; gradients come back in float32."""
    x, w = torch.randn(6, 16, requires_grad=True), torch.randn(9, 16, requires_grad=True)
    with backend("triton"), torch.autocast("cpu", dtype=torch.bfloat16):
        for loss in losses(x, w, torch.arange(6)):
            loss().backward()
    assert x.grad.dtype == w.grad.dtype == torch.float32 and w.grad.isfinite().all()


# ----------------------------------------------------------------------------- linear KL

@pytest.mark.parametrize("shape, V, masked", [((3, 5, 33), 123, True), ((1, 16), 7, False),
                                              ((2, 24), 4200, False), ((0, 16), 9, True)])
def test_linear_kl(shape, V, masked, chunks):
    """The teacher is narrower and knows 20 words more; some rows do not count."""
    chunks(4)
    tx, tw = torch.randn(*shape[:-1], 20, dtype=f64), torch.randn(V + 20, 20, dtype=f64)
    live = torch.rand(shape[:-1]) < 0.6 if masked else None
    agree(lambda x, w: kernels.linear_kl(x, w, tx.to(x.dtype), tw.to(x.dtype), temperature=2.0,
                                         live=live),
          shape, (V, shape[-1]), dtypes=tuple(GATES) if shape[1] == 5 else single)


def test_linear_kl_of_a_model_with_itself_and_without_live_rows():
    x, w = torch.randn(4, 16, requires_grad=True), torch.randn(9, 16, requires_grad=True)
    with backend("triton"):
        same = kernels.linear_kl(x, w, x, w)
        none = kernels.linear_kl(x, w, x * 2, w, live=torch.zeros(4, dtype=torch.bool))
    (same + none).backward()
    assert abs(same.item()) < 1e-5 and none.item() == 0
    assert x.grad.abs().max() < 1e-5 and w.grad.abs().max() < 1e-5


# -------------------------------------------------------------------- mixture of experts

def experts(N, C, I, E, k, dtype=f64):
    return [torch.randn(s, dtype=dtype) for s in ((N, C), (N, k), (E, I, C), (E, I, C), (E, C, I))]


@pytest.mark.parametrize("N, C, I, E, k, activation", [
    (20, 33, 40, 4, 2, "silu"), (9, 16, 5, 6, 1, "gelu"), (1, 16, 16, 3, 2, "relu2"),
    (0, 16, 8, 2, 2, "silu"), (7, 24, 130, 1, 1, "gelu_pytorch_tanh"), (5, 8, 8, 70, 2, "relu")])
def test_moe(N, C, I, E, k, activation):
    """Odd widths, one expert, more experts than tokens, no token at all. The gates of half types
    are for averages: a few tokens meet them by luck alone."""
    chosen = torch.rand(N, E).topk(k, -1).indices
    agree(lambda x, share, *w: kernels.moe(x, chosen, share, *w, activation),
          *experts(N, C, I, E, k), dtypes=tuple(GATES) if N > 5 else single)


@pytest.mark.parametrize("rows", [64, 200])
def test_moe_experts_without_tokens_and_with_all(rows, monkeypatch):
    """No token is dropped where one expert gets them all; the others' gradients are zeros."""
    chosen = torch.tensor([[1, 3]]).expand(150, 2)
    call = lambda x, share, *w: kernels.moe(x, chosen, share, *w)
    tensors = experts(150, 16, 24, 5, 2)
    sizes = triton_moe.blocks
    monkeypatch.setattr(triton_moe, "blocks", lambda _, *rest: sizes(rows, *rest))
    agree(call, *tensors, dtypes=single)
    for gradient in forward_backward("triton", call, [t.float() for t in tensors])[3:]:
        assert not gradient[[0, 2, 4]].any() and gradient[[1, 3]].any(-1).all()


def test_moe_takes_an_expert_twice_for_one_token():
    chosen = torch.tensor([[1, 1], [0, 1], [0, 0]])
    agree(lambda x, share, *w: kernels.moe(x, chosen, share, *w), *experts(3, 16, 8, 2, 2),
          dtypes=single)


def test_moe_strided_inputs_and_master_weights():
    chosen = torch.randint(0, 3, (12, 2))
    shapes = (12, 24), (12, 2), (3, 40, 24), (3, 40, 24), (3, 24, 40)
    agree(lambda x, share, *w: kernels.moe(x, chosen, share, *w), *(strided(*s) for s in shapes),
          dtypes=single)
    x, share, *w = (t.float().requires_grad_() for t in experts(12, 16, 24, 3, 2))
    with backend("triton"):
        y = kernels.moe(x.bfloat16(), chosen, share, *w)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert {t.grad.dtype for t in (x, share, *w)} == {torch.float32}


def test_moe_of_an_expert_that_does_not_exist_is_nan_and_touches_nothing():
    x, share, *w = experts(3, 16, 8, 2, 1, torch.float32)
    with backend("triton"):
        y = kernels.moe(x, torch.tensor([[0], [2], [-1]]), share, *w)
    assert y[0].isfinite().all() and y[1:].isnan().all()


def test_moe_keeps_nothing_for_a_backward_that_will_not_come():
    """Evaluation writes h (R, I) alone, not the gate's and the up's products beside it."""
    chosen, (x, share, *w) = torch.zeros(3, 1, dtype=torch.int64), experts(3, 16, 32, 2, 1, f64)
    x, share, *w = (t.float().requires_grad_() for t in (x, share, *w))
    with backend("triton"):
        learned = kernels.moe(x, chosen, share, *w)
        with torch.no_grad():
            close(kernels.moe(x, chosen, share, *w), learned.detach())


# --------------------------------------------------------------------------------- errors

def test_what_the_kernels_do_not_take_is_one_sentence(monkeypatch):
    x, w = torch.randn(4, 16), torch.randn(9, 16)
    wrong = [lambda: kernels.linear(x, w[:, :8]), lambda: kernels.linear(x.double(), w),
             lambda: kernels.linear_cross_entropy(x, w, torch.arange(3)),
             lambda: kernels.linear_kl(x, w, x, w[:5]),
             lambda: kernels.moe(x, torch.zeros(3, 1).long(), torch.ones(3, 1),
                                 *experts(4, 16, 8, 2, 1, torch.float32)[2:])]
    with backend("triton"):
        for call in wrong:
            with pytest.raises(UserError, match="do not fit|not torch.float64"):
                call()
        monkeypatch.setattr("backends.triton_common.INTERPRETED", False)
        with pytest.raises(UserError, match="need a GPU"):
            kernels.linear_cross_entropy(x, w, torch.arange(4))
