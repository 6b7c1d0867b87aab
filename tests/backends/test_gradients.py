"""Gradients by finite differences, and those of the implementations that keep less.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

import kernels
from backends.chunked_loss import ChunkedLoss
from gates import FORMS, backend, distance, f64, gradcheck_cases


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


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_glu_linear_is_a_gate_and_a_linear(biased, activation):
    """bfloat16 activations on float32 masters, against float64; only gate and up are kept."""
    gate, up = (torch.randn(2, 5, 24).bfloat16() for _ in range(2))
    leaves = [gate, up, torch.randn(16, 24), *([torch.randn(16)] if biased else [])]

    def call(gate, up, weight, bias=None):
        return kernels.glu_linear(gate, up, weight, bias, activation)

    def formula(gate, up, weight, bias=None):
        act = {"silu": F.silu, "gelu": F.gelu}[activation]
        return F.linear(act(gate) * up, weight, bias)
    y, grads = gradients(call, *leaves)
    want, true = gradients(formula, *(leaf.double() for leaf in leaves))
    assert distance(y, want) < 1e-2
    for one, other, leaf in zip(grads, true, leaves):
        assert one.dtype == leaf.dtype and distance(one, other) < 1e-2
    a, b = (t.clone().requires_grad_() for t in (gate, up))
    weight = leaves[2].clone().requires_grad_()
    if activation == "silu":
        assert saved_bytes(lambda: call(a * 1, b * 1, weight)) == a.nbytes + b.nbytes
    frozen = gate.clone().requires_grad_()
    call(frozen, up, leaves[2]).sum().backward()        # a weight without a gradient
    assert frozen.grad is not None


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
