"""optim.py: each rule against PyTorch's own or against the decomposition that it approximates."""
import pytest
import torch

import kernels
from config import UserError
from model import ModelConfig, Transformer
from families import SCRATCH
from kernels import adamw, clip_grad_norm, muon, newton_schulz
from training.optim import Optimizer

SHAPES = [(7, 5), (5, 7), (3, 3), (11,), (1, 4), (2, 3, 4)]


@pytest.fixture(params=["reference", "torch"], autouse=True)
def backend(request):
    """Every test of this file holds for both forms of each operation."""
    before = kernels.use(request.param)
    yield request.param
    kernels.use(before)


def tensors(seed, shapes=SHAPES, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def relative(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def small(family="gpt2", **changes):
    torch.manual_seed(0)
    return Transformer(ModelConfig(**{**SCRATCH[family].flags, **dict(
        vocab_size=50, block_size=8, n_layer=2, n_head=2, n_embd=16), **changes}))


def fill_grads(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)


# ------------------------------------------------------------------------------- AdamW

@pytest.mark.parametrize("decay, eps, betas", [(0.0, 1e-8, (0.9, 0.95)), (0.1, 1e-8, (0.9, 0.95)),
                                               (0.5, 1e-3, (0.0, 0.999))])
def test_adamw_is_pytorchs_adamw(decay, eps, betas):
    ours = tensors(0)
    theirs = [p.clone().requires_grad_() for p in ours]
    m, v = ([torch.zeros_like(p) for p in ours] for _ in range(2))
    oracle = torch.optim.AdamW(theirs, lr=1.0, betas=betas, eps=eps, weight_decay=decay,
                               foreach=False, fused=False)
    for step, lr in enumerate([1e-2, 3e-2, 0.0, 1e-3, 2e-2, 1e-2], 1):     # a schedule, too
        grads = tensors(step)
        adamw(ours, grads, m, v, step=step, lr=lr, beta1=betas[0], beta2=betas[1], eps=eps,
              weight_decay=decay)
        for p, g in zip(theirs, grads):
            p.grad = g.clone()
        oracle.param_groups[0]["lr"] = lr
        oracle.step()
        for p, q in zip(ours, theirs):
            assert relative(p, q.detach()) < 1e-6
    for q, first, second in zip(theirs, m, v):
        assert relative(first, oracle.state[q]["exp_avg"]) < 1e-6
        assert relative(second, oracle.state[q]["exp_avg_sq"]) < 1e-6


def test_adamw_does_not_touch_the_gradients():
    params, grads = tensors(0), tensors(1)
    before = [g.clone() for g in grads]
    zeros = [torch.zeros_like(p) for p in params], [torch.zeros_like(p) for p in params]
    adamw(params, grads, *zeros, step=1, lr=0.1, beta1=0.9, beta2=0.95, eps=1e-8,
          weight_decay=0.1)
    assert all(torch.equal(a, b) for a, b in zip(grads, before))


# -------------------------------------------------------------------------------- Muon

@pytest.mark.parametrize("shape", [(64, 64), (32, 128), (128, 32), (3, 24, 40), (3, 40, 24)])
def test_newton_schulz_approximates_the_orthogonal_factor_of_the_svd(shape):
    """Wide, tall and batched: singular values near 1, direction that of U V^T."""
    g = tensors(3, [shape])[0]
    out = newton_schulz(g)
    assert out.shape == g.shape
    U, S, Vh = torch.linalg.svd(g.double(), full_matrices=False)
    exact, got = U @ Vh, torch.linalg.svdvals(out.double())
    # far below the largest a singular value is still on its way up (both lists descend)
    grown = S > 0.02 * S.amax(-1, keepdim=True)
    assert got.max() < 1.25 and got[grown].min() > 0.65
    cosine = (out.double() * exact).flatten(-2).sum(-1) / (
        out.double().flatten(-2).norm(dim=-1) * exact.flatten(-2).norm(dim=-1))
    assert cosine.min() > 0.97


def test_newton_schulz_keeps_the_singular_vectors():
    """It changes singular values only: U^T out V is diagonal."""
    g = tensors(4, [(24, 40)], torch.float64)[0]
    U, _, Vh = torch.linalg.svd(g, full_matrices=False)
    inner = U.T @ newton_schulz(g) @ Vh.T
    assert (inner - torch.diag(inner.diagonal())).abs().max() < 1e-8


def test_newton_schulz_does_not_depend_on_the_size_of_the_gradient():
    """A gradient of 1e-4 moves the weights as far as one of 1e4; zero moves nothing."""
    g = tensors(5, [(16, 8)])[0]
    assert relative(newton_schulz(g * 1e-4), newton_schulz(g * 1e4)) < 0.01
    assert torch.equal(newton_schulz(torch.zeros(16, 8)), torch.zeros(16, 8))


def by_hand(params, grads, momentum, lr, beta, decay):
    """Muon's formula with the exact U V^T in the place of Newton-Schulz, float64."""
    for p, g, M in zip(params, grads, momentum):
        M.mul_(beta).add_(g, alpha=1 - beta)
        U, _, Vh = torch.linalg.svd(beta * M + (1 - beta) * g, full_matrices=False)
        p.mul_(1 - lr * decay).sub_(lr * max(1.0, p.shape[0] / p.shape[1]) ** 0.5 * (U @ Vh))


def test_muon_moves_along_the_orthogonal_factor(backend):
    """Three steps of matrices wide, tall and two of one shape, which `torch` runs as a stack."""
    shapes = [(32, 8), (8, 32), (16, 16), (8, 32)]
    ours, exact = tensors(0, shapes), tensors(0, shapes, torch.float64)
    start = [p.clone() for p in exact]
    M, N = [torch.zeros_like(p) for p in ours], [torch.zeros_like(p) for p in exact]
    for step in range(1, 4):
        muon(ours, tensors(step, shapes), M, lr=0.1, beta=0.9, weight_decay=0.2)
        by_hand(exact, tensors(step, shapes, torch.float64), N, 0.1, 0.9, 0.2)
    for p, q, s, a, b in zip(ours, exact, start, M, N):
        assert relative(a, b) < 1e-6                                # momentum is exact
        moved, wanted = (p.double() - s).flatten(), (q - s).flatten()
        assert torch.cosine_similarity(moved, wanted, dim=0) > 0.97
        assert 0.75 < moved.norm() / wanted.norm() < 1.2


def test_both_forms_of_muon_agree(backend):
    """bfloat16 Newton-Schulz of a stack is the float32 one of each matrix, to bfloat16's grain."""
    shapes = [(32, 8), (8, 32), (8, 32), (16, 16)]
    results = {}
    for name in ("reference", "torch"):
        kernels.use(name)
        params, momentum = tensors(0, shapes), tensors(9, shapes)
        muon(params, tensors(1, shapes), momentum, lr=1.0, beta=0.95, weight_decay=0.0)
        results[name] = [p - s for p, s in zip(params, tensors(0, shapes))], momentum
    kernels.use(backend)
    for a, b in zip(results["torch"][0], results["reference"][0]):
        assert relative(a, b) < 0.05
    for a, b in zip(results["torch"][1], results["reference"][1]):
        assert relative(a, b) < 1e-6


# ---------------------------------------------------------------------------- clipping

@pytest.mark.parametrize("max_norm", [0.1, 1.0, 1e6])
@pytest.mark.parametrize("scale", [1.0, 0.01, torch.tensor(3.0)])
def test_clip_grad_norm_is_pytorchs(max_norm, scale):
    """`scale` comes before the clipping, as if the loss had been divided."""
    ours = tensors(1)
    theirs = [torch.nn.Parameter(torch.zeros_like(g)) for g in ours]
    for p, g in zip(theirs, ours):
        p.grad = g.clone() * scale
    want = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    norm = clip_grad_norm(ours, max_norm, scale)
    assert norm.ndim == 0 and relative(norm, want) < 1e-6
    for g, p in zip(ours, theirs):
        assert relative(g, p.grad) < 1e-5


def test_max_norm_0_never_clips_and_still_scales_and_measures():
    grads = tensors(1)
    want = torch.cat([g.flatten() for g in grads]) * 0.5
    norm = clip_grad_norm(grads, 0.0, 0.5)
    assert relative(norm, want.norm()) < 1e-6
    assert torch.allclose(torch.cat([g.flatten() for g in grads]), want)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_gradient_shows_in_the_norm(bad):
    """The loop skips a step by the norm alone: one bad element among many must reach it."""
    grads = tensors(1)
    grads[2][1, 1] = bad
    assert not torch.isfinite(clip_grad_norm(grads, 1.0))


# ----------------------------------------------------------------------- the optimizer

def names(optimizer, rule=None, decay=None):
    return {optimizer.names[id(p)] for kind, params, wd in optimizer.groups for p in params
            if rule in (None, kind) and decay in (None, wd)}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("family, changes", [("gpt2", {}), ("qwen3", {"n_kv_head": 1})])
def test_every_parameter_is_in_one_group_and_decay_falls_on_matrices(kind, family, changes):
    model = small(family, **changes)
    optimizer = Optimizer(model.named_parameters(), kind, weight_decay=0.1)
    everyone = dict(model.named_parameters())
    assert sum(len(params) for _, params, _ in optimizer.groups) == len(everyone)
    assert names(optimizer) == set(everyone)
    # biases and norms are vectors: never decayed, never Muon's
    vectors = {n for n, p in everyone.items() if p.ndim < 2}
    assert vectors and names(optimizer, "adamw", 0.0) == vectors
    hidden = {n for n in everyone if n.endswith("_proj.weight")}
    assert names(optimizer, "muon") == (hidden if kind == "muon" else set())
    outer = {"model.embed_tokens.weight", "model.embed_positions.weight", "lm_head.weight"}
    assert names(optimizer, "adamw", 0.1) == (
        outer & set(everyone) | (hidden if kind == "adamw" else set()))


def test_tied_embeddings_are_updated_once():
    """One matrix under two roles has one state and moves by one AdamW step."""
    model = small(tie_word_embeddings=True)
    fill_grads(model, 1)
    weight = model.output_weight
    assert weight is model.model.embed_tokens.weight
    twin = weight.detach().clone().requires_grad_()
    twin.grad = weight.grad.clone()
    optimizer = Optimizer(model.named_parameters(), learning_rate=0.1, weight_decay=0.1)
    optimizer.step()
    torch.optim.AdamW([twin], lr=0.1, betas=(0.9, 0.95), weight_decay=0.1).step()
    assert relative(weight.detach(), twin.detach()) < 1e-6
    assert "lm_head.weight" not in optimizer.state


def test_optimizer_is_pytorchs_adamw_with_nanogpts_two_groups():
    """The whole class over several steps of a model, with a schedule's lr_scale."""
    ours, theirs = small(), small()
    optimizer = Optimizer(ours.named_parameters(), learning_rate=0.05, weight_decay=0.3)
    params = list(theirs.parameters())
    oracle = torch.optim.AdamW([{"params": [p for p in params if p.ndim >= 2]},
                                {"params": [p for p in params if p.ndim < 2], "weight_decay": 0}],
                               betas=(0.9, 0.95), weight_decay=0.3)
    for step, scale in enumerate([0.5, 1.0, 0.25]):
        fill_grads(ours, step)
        fill_grads(theirs, step)
        optimizer.step(scale)
        for group in oracle.param_groups:
            group["lr"] = 0.05 * scale
        oracle.step()
    for p, q in zip(ours.parameters(), params):
        assert relative(p.detach(), q.detach()) < 1e-6
    optimizer.zero_grad()
    assert all(p.grad is None for p in ours.parameters())


def test_parameters_without_gradient_stay_where_they_are():
    """Frozen parameters have no state; one that merely got no gradient keeps its value."""
    model = small()
    model.model.embed_positions.weight.requires_grad_(False)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = Optimizer(model.named_parameters(), "muon")
    assert "model.embed_positions.weight" not in optimizer.state
    fill_grads(model, 0)
    lazy = model.model.layers.get_submodule("0").mlp.up_proj.weight
    lazy.grad = None
    optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    still = {"model.embed_positions.weight", "model.layers.0.mlp.up_proj.weight"}
    assert moved == set(before) - still


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_state_dict_round_trip_goes_on_bit_for_bit(kind, tmp_path):
    """Two steps, through a file, two more == four steps."""
    straight, broken = small(), small()
    one = Optimizer(straight.named_parameters(), kind)
    two = Optimizer(broken.named_parameters(), kind)
    for step in range(4):
        for model, optimizer in ((straight, one), (broken, two)):
            fill_grads(model, step)
            optimizer.step()
        if step == 1:
            torch.save(two.state_dict(), tmp_path / "state.pt")
            two = Optimizer(broken.named_parameters(), kind)
            two.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert one.count == two.count == 4
    assert all(torch.equal(p, q) for p, q in zip(straight.parameters(), broken.parameters()))


def test_a_foreign_state_is_refused_by_name():
    """Another optimizer's, another shape's, another program's: a sentence, never a traceback."""
    optimizer = Optimizer(small().named_parameters(), "adamw")
    foreign = [Optimizer(small().named_parameters(), "muon").state_dict(),
               Optimizer(small(n_embd=32).named_parameters(), "adamw").state_dict(),
               torch.optim.AdamW(small().parameters()).state_dict()]
    for state in foreign:
        with pytest.raises(UserError, match="does not fit parameter model"):
            optimizer.load_state_dict(state)
    with pytest.raises(UserError, match="choose from adamw, muon"):
        Optimizer(small().named_parameters(), "sgd")


def test_the_coefficients_are_those_of_the_muon_paper():
    assert kernels.NEWTON_SCHULZ == (3.4445, -4.7750, 2.0315)
