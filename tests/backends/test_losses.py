"""Cross entropy, the output layer's losses, KL divergence and MoE in every implementation.
"""
import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import kernels
from backends.chunked_loss import ChunkedLoss
from gates import (FORMS, LOSS_OPTIONS, Largest, ORACLES, backend, check_forms, close, distance,
                   f64, forward_backward, strided, targets_for)


# --------------------------------------------------------------------------------- losses


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
