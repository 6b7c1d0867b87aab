"""The divergences of distillation in every implementation: kernels.linear_kl.
"""
import ast
import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import kernels
from backends.chunked_loss import ChunkedLoss
from runs import (quiet_machine)
from distill_base import divergence
assert quiet_machine                # a fixture that every test here uses by itself
f64 = torch.float64


def problem(V=14, Vt=14, N=9):
    """x, W of a student and of a teacher, targets and which rows count; float64."""
    made = [torch.randn(s, dtype=f64) for s in ((N, 6), (V, 6), (N, 5), (Vt, 5))]
    made[0].requires_grad_(), made[1].requires_grad_()
    return *made, torch.randint(0, min(V, Vt), (N,)), torch.arange(N) % 3 > 0


@pytest.mark.parametrize("form", ["reference", "torch"])
@pytest.mark.parametrize("kind", kernels.DIVERGENCES)
@pytest.mark.parametrize("V, Vt", [(14, 14), (14, 20), (14, 11)])
def test_loss_and_gradients_are_those_of_whole_logits(form, kind, V, Vt, monkeypatch):
    """Float64 autograd on logits that exist whole, cut to the smaller vocabulary; in chunks."""
    monkeypatch.setattr(ChunkedLoss, "LOGITS", 4 * V)
    x, w, tx, tw, y, live = problem(V, Vt)
    kernels.use(form)
    for some, caps, targets in ((None, (0, 0), None), (live, (2.0, 3.0), y), (live, (0, 0), y)):
        got = kernels.linear_kl(x, w, tx, tw, temperature=1.7, divergence=kind, beta=0.3, live=some,
                                softcap=caps[0], teacher_softcap=caps[1], targets=targets,
                                alpha=0.4)
        z, taught = (c * torch.tanh(z / c) if c else z
                     for z, c in zip((x @ w.T, tx @ tw.T), caps))
        cut = min(V, Vt)
        rows = divergence(z[:, :cut], taught[:, :cut], kind, 0.3, 1.7)
        ce = F.cross_entropy(z, y, reduction="none")    # of the student's whole vocabulary
        kept = slice(None) if some is None else some
        want = rows[kept].sum()
        if targets is not None:
            assert torch.allclose(torch.stack(got[1:]), torch.stack((ce[kept].sum(), want)))
            assert not got[1].requires_grad and not got[2].requires_grad
            got, want = got[0], 0.4 * ce[kept].sum() + 0.6 * want
        assert abs(got - want) < 1e-10
        for a, b in zip(torch.autograd.grad(got * 1.3, (x, w)),
                        torch.autograd.grad(want * 1.3, (x, w))):
            assert (a - b).norm() < 1e-10 * b.norm()


def test_neither_model_s_logits_exist_whole(monkeypatch):
    """The largest tensor is a chunk of logits, though CE and every divergence are made of them."""
    from gates import Largest
    N, V, C, rows = 256, 300, 16, 16
    monkeypatch.setattr(ChunkedLoss, "LOGITS", rows * V)
    x, w = torch.randn(N, C, requires_grad=True), torch.randn(V, C, requires_grad=True)
    tx, tw, y = torch.randn(N, 8), torch.randn(V + 2, 8), torch.randint(V, (N,))
    kernels.use("torch")
    for kind in kernels.DIVERGENCES:
        with Largest() as seen:
            kernels.linear_kl(x, w, tx, tw, divergence=kind, targets=y, alpha=0.5)[0].backward()
        assert seen.elements <= max(rows * V, N * C, V * C)


@pytest.fixture(scope="module")
def trl():
    """trl's GKD loss, cut out of its file: importing its trainer takes ten seconds."""
    spec = importlib.util.find_spec("trl")
    file = spec and Path(spec.origin).parent / "experimental" / "gkd" / "gkd_trainer.py"
    if not file or not file.is_file():
        pytest.skip("trl is not installed, or is another version")
    function = next(node for node in ast.walk(ast.parse(file.read_text()))
                    if isinstance(node, ast.FunctionDef) and node.name == "generalized_jsd_loss")
    function.decorator_list = []
    space = {"torch": torch, "F": F}
    exec(compile(ast.Module([function], []), str(file), "exec"), space)
    return space["generalized_jsd_loss"]


@pytest.mark.parametrize("kind, beta", [("forward", 0.0), ("reverse", 1.0), ("js", 0.5),
                                        ("js", 0.1)])
def test_divergences_are_trl_s(trl, kind, beta):
    """Value and gradient; trl leaves out Hinton's factor T^2."""
    x, w, tx, tw, y, live = problem()
    theirs = 1.7 ** 2 * trl((x @ w.T)[None], (tx @ tw.T)[None], y.masked_fill(~live, -100)[None],
                            beta=beta, temperature=1.7, reduction="sum")
    mine = kernels.linear_kl(x, w, tx, tw, temperature=1.7, divergence=kind, beta=beta or 0.5,
                             live=live)
    assert abs(mine - theirs) < 1e-6
    for a, b in zip(torch.autograd.grad(mine, (x, w)), torch.autograd.grad(theirs, (x, w))):
        assert (a - b).norm() < 1e-6 * b.norm()


def test_limits_of_temperature_and_alpha():
    """T -> oo: half the squared distance of centred logits / V (Hinton 2015); alpha 0 and 1."""
    x, w, tx, tw, y, _ = problem()
    far = kernels.linear_kl(x, w, tx, tw, temperature=1e4)
    centred = [z - z.mean(-1, keepdim=True) for z in (x @ w.T, tx @ tw.T)]
    assert abs(far - ((centred[0] - centred[1]) ** 2).mean(-1).sum() / 2) < 1e-3 * far
    how = dict(temperature=1.5, targets=y)
    one = kernels.linear_kl(x, w, tx, tw, alpha=1.0, **how)[0]
    assert abs(one - F.cross_entropy(x @ w.T, y, reduction="sum")) < 1e-10
    none = kernels.linear_kl(x, w, tx, tw, alpha=0.0, **how)[0]
    assert abs(none - kernels.linear_kl(x, w, tx, tw, temperature=1.5)) < 1e-10
    for kind in kernels.DIVERGENCES:                    # a perfect student has nothing to learn
        same_one = kernels.linear_kl(x, w, x.detach(), w.detach(), divergence=kind)
        assert abs(same_one) < 1e-12
        assert all(g.abs().max() < 1e-12 for g in torch.autograd.grad(same_one, (x, w)))


def test_far_apart_distributions_stay_finite():
    """exp(-200) is 0 in float32: no divergence may become 0 log 0."""
    for form in ("reference", "torch"):
        kernels.use(form)
        for kind in kernels.DIVERGENCES:
            x, w = torch.tensor([[400.0]], requires_grad=True), torch.tensor([[1.0], [-1], [0]])
            loss = kernels.linear_kl(x, w, -x.detach(), w, divergence=kind)
            loss.backward()
            assert loss.isfinite() and x.grad.isfinite().all(), (form, kind)


def test_on_a_gpu_what_triton_lacks_is_pytorch_s(monkeypatch):
    """The Triton form (interpreted here) does forward KL with CE, and says so of the rest."""
    x, w, tx, tw, y, live = (t.detach() for t in problem())
    x, w, tx, tw = (t.float() for t in (x, w, tx, tw))
    how = dict(temperature=1.7, targets=y, alpha=0.4, live=live)
    want = kernels.linear_kl(x, w, tx, tw, **how)
    kernels.use("triton")
    for a, b in zip(kernels.linear_kl(x, w, tx, tw, **how), want):
        assert abs(a - b) < 1e-4
    for more in (dict(divergence="js"), dict(softcap=2.0), dict(cut=9)):
        with pytest.raises(kernels.Unsupported, match="forward KL"):
            kernels.linear_kl(x, w, tx, tw, **how, **more)
