"""What the tests of operations share: the gate, the backends, and inputs.
"""
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import kernels

FORMS = ("reference", "torch")
GATES = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}
f64 = torch.float64


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


# ------------------------------------------------------------------------------- position

def rotation(T, R, batch=None):
    """cos and sin (T, R/2), or (batch, T, R/2) with other positions in every row."""
    angles = torch.arange(T, dtype=f64)[:, None] * 100.0 ** (-torch.arange(0, R, 2) / R)
    if batch:
        angles = torch.stack([angles + 3 * b for b in range(batch)])
    return angles.cos(), angles.sin()


# ---------------------------------------------------------------------------- activations

ORACLES = {
    "gelu": F.gelu, "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu, "relu": F.relu, "relu2": lambda x: F.relu(x) ** 2,
}


# ------------------------------------------------------------------------------ gradcheck


def documents(B, T, lengths):
    """(B, T) document numbers: runs of the given lengths, starting elsewhere in each row."""
    runs = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths * (T + B))])
    return torch.stack([runs[b:b + T] for b in range(B)])


LOSS_OPTIONS = [{}, dict(softcap=3.0), dict(z_loss=0.1), dict(label_smoothing=0.2),
                dict(ignore_index=2), dict(softcap=2.0, z_loss=0.1, label_smoothing=0.1)]


def targets_for(shape, V, ignore=-100):
    y = torch.randint(V, shape)
    y[torch.rand(shape) < 0.3] = ignore                 # a mask of the kind SFT makes
    return y


class Largest(TorchDispatchMode):
    """The most elements that any tensor made inside has."""
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.numel())
        return out


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
        "glu_linear": (k.glu_linear.reference, (3, 4), (3, 4), (5, 4), (5,)),
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
