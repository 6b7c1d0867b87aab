"""The maths of a language model: every operation by hand, and fast, behind one dispatch.

Each operation is one function with up to five implementations of the same formula:

    reference   plain tensor arithmetic that reads like the formula (no torch.nn.functional)
    torch       PyTorch's own fused operator
    cpu         the fewest passes over memory, where that beats PyTorch's (backends/cpu.py)
    triton      hand-written GPU kernels, forward and backward (backends/triton_*.py)
    cuda        four of those in CUDA C++, to hold side by side (backends/cuda.cu)

    import kernels
    y = kernels.rms_norm(x, weight, eps=1e-6)      # the form that is fastest on x's device
    kernels.use("reference")                       # or --backend=reference on any script

Shapes: B batch, T tokens, C width, H heads, D head_dim, V vocabulary. Sums are taken in float32.
tests/backends: relative L2 against float64 at most 1e-5 in float32 and 1e-2 in bfloat16.
"""
from __future__ import annotations

import functools
import importlib
import math
import os
from typing import Any, Callable, Sequence

import torch
import torch.nn.functional as F      # only inside the `torch` forms
from torch import Tensor

from config import UserError, refuse_to_run

BACKENDS = ("auto", "reference", "torch", "triton", "cuda")
# the files that register a form, read when a tensor first asks for it: not every machine has Triton
FILES = {"torch": ("chunked_loss", "foreach"), "cpu": ("cpu",), "cuda": ("cuda",),
         "triton": ("triton_norm", "triton_pointwise", "triton_attention", "triton_matmul",
                    "triton_loss", "triton_moe", "triton_optim")}
TO_READ = ("linear",)       # whose Triton kernel is there to be read: cuBLAS is as fast
OPERATIONS: dict[str, Callable] = {}
_backend = "auto"
_ready: dict[str, bool] = {}            # forms whose files were read: whether they can be used


class Unsupported(UserError):
    """A form cannot compute this; asked for by name it says so, auto takes PyTorch's instead."""


def ready(form: str) -> bool:
    """Read the files of a form, once; False where what they are built on is not installed."""
    if form not in _ready:
        _ready[form] = True             # first: those files import this one
        # multiply and add in one instruction: what Triton does by default up to 3.9, and warns of
        os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
        try:
            for name in FILES[form]:
                importlib.import_module(f"backends.{name}")
        except ModuleNotFoundError as e:
            if (e.name or "").split(".")[0] != "triton":
                raise
            _ready[form] = False
    return _ready[form]


def use(backend: str) -> str:
    """Choose the form of every operation from here on; returns the previous choice.

    auto takes Triton on a GPU and the forms for a CPU there; torch does the same without Triton.
    A form that an operation lacks falls back to `torch`, and that to `reference`.
    """
    global _backend
    if backend not in BACKENDS:
        raise UserError(f"unknown --backend={backend}; choose from {', '.join(BACKENDS)}")
    if backend in ("triton", "cuda"):
        # Triton's interpreter runs kernels on a CPU, a thousand times slower: for tests
        interpreted = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
        if not torch.cuda.is_available() and not interpreted:
            raise UserError(f"--backend={backend} needs a GPU, and PyTorch sees none: use auto")
        if not ready(backend):
            raise UserError(f"--backend={backend}: triton is not installed; pip install triton")
    # here and not in the middle of what torch.compile traces
    ready("torch")
    if backend == "auto" and torch.cuda.is_available():
        ready("triton")
    backend, _backend = _backend, backend
    return backend


def best(lead: Any) -> str:
    """The form that serves this tensor now (a list of tensors: its first), if it is there."""
    if _backend != "auto" and _backend != "torch":
        return _backend
    lead = lead[0] if type(lead) in (list, tuple) and lead else lead
    if getattr(lead, "is_cpu", False):
        # a compiler fuses better than passes counted by hand
        return "torch" if torch.compiler.is_compiling() or not ready("cpu") else "cpu"
    if getattr(lead, "is_cuda", False) and _backend == "auto" and ready("triton"):
        return "triton"
    return "torch"


def operation(reference: Callable) -> Callable:
    """Make the reference implementation an operation; `.torch`, `.triton` … add faster forms."""
    implementations: dict[str, Callable] = {"reference": reference}
    slower = reference.__name__ in TO_READ

    @functools.wraps(reference)
    def call(first: Any, *args, **kwargs):
        ready("torch")
        name = best(first)
        if name == "triton" and _backend == "auto":
            if name in implementations and not slower:
                try:
                    return implementations[name](first, *args, **kwargs)
                except Unsupported:
                    pass
            name = "torch"
        chosen = implementations.get(name) or implementations.get("torch", reference)
        return chosen(first, *args, **kwargs)

    call.implementations = implementations
    call.reference = reference
    for name in FILES:
        setattr(call, name, functools.partial(implementations.setdefault, name))
    OPERATIONS[reference.__name__] = call
    return call


def widen(x: Tensor) -> Tensor:
    """Half types as float32, for sums and statistics; float32 and float64 as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


# ------------------------------------------------------------------ linear and embedding
@operation
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + b; x (..., K), weight (N, K) -> (..., N), in the type of x.

    Master weights may be float32 under bfloat16 activations: they are cast where they are used.
    """
    y = x @ weight.to(x.dtype).T
    return y if bias is None else y + bias.to(x.dtype)

linear.torch(lambda x, weight, bias=None: F.linear(
    x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype)))


@operation
def linear_joined(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> Tensor:
    """Several linears of one input side by side: x (..., K), weights (N_i, K) -> (..., sum N_i)."""
    bias = None if biases[0] is None else torch.cat(list(biases))
    return linear(x, torch.cat([w.to(x.dtype) for w in weights]), bias)


@operation
def embedding(ids: Tensor, weight: Tensor) -> Tensor:
    """Row `ids` of weight (V, C); ids (...) int64 -> (..., C)."""
    return weight[ids]

embedding.torch(F.embedding)


# ------------------------------------------------------------------------- normalisation
@operation
def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, offset: float = 0.0) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * (offset + w), over the last dimension (Zhang 2019).

    x (..., C), weight (C,). offset 1 is Gemma's (1 + w).
    """
    wide = widen(x)
    normed = wide * torch.rsqrt((wide * wide).mean(-1, keepdim=True) + eps)
    return (normed * (offset + weight.to(wide.dtype))).to(x.dtype)


@rms_norm.torch
def rms_norm_torch(x, weight, eps=1e-6, offset=0.0):
    weight, C = (weight + offset if offset else weight), x.shape[-1]
    return F.rms_norm(x, (C,), weight.to(x.dtype), eps)


@operation
def prepare_rms_norm(weight: Tensor, eps: float, offset: float, dtype: torch.dtype
                     ) -> Callable[[Tensor], Tensor]:
    """Return rms_norm(x, weight, eps, offset) as a function of x of that type, for serving."""
    return lambda x: rms_norm(x, weight, eps, offset)


@operation
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """y = (x - mean) / sqrt(var + eps) * w + b, over the last dimension (Ba 2016). x (..., C)."""
    wide = widen(x)
    centred = wide - wide.mean(-1, keepdim=True)
    normed = centred * torch.rsqrt((centred * centred).mean(-1, keepdim=True) + eps)
    y = normed * weight.to(wide.dtype)
    return (y if bias is None else y + bias.to(wide.dtype)).to(x.dtype)


@layer_norm.torch
def layer_norm_torch(x, weight, bias=None, eps=1e-5):
    bias = None if bias is None else bias.to(x.dtype)
    return F.layer_norm(x, (x.shape[-1],), weight.to(x.dtype), bias, eps)


# ------------------------------------------------------------------------------- position
@operation
def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotary position embedding (Su 2021): rotate pairs of features by position times frequency.

    x (B, T, H, D); cos, sin (T, R/2) or (B, T, R/2). The first R <= D features rotate, the rest
    pass. Pairs are (i, i + R/2), Hugging Face's half-split; interleaved: (2i, 2i + 1), Meta's.
    """
    rotary = 2 * cos.shape[-1]
    cos, sin = cos.unsqueeze(-2).to(x.dtype), sin.unsqueeze(-2).to(x.dtype)     # (.., T, 1, R/2)
    turn, rest = x[..., :rotary], x[..., rotary:]
    if interleaved:
        a, b = turn[..., 0::2], turn[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    else:
        a, b = turn[..., :rotary // 2], turn[..., rotary // 2:]
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    return torch.cat((turned, rest), -1) if rest.shape[-1] else turned


@operation
def prepare_rope(cos: Tensor, sin: Tensor, dtype: torch.dtype, interleaved: bool = False
                 ) -> Callable[[Tensor], Tensor]:
    """Return rope(x, cos, sin, interleaved) as a function of x, for all the layers of a step."""
    return lambda x: rope(x, cos, sin, interleaved)


# ---------------------------------------------------------------------------- activations
@operation
def gelu(x: Tensor, approximate: str = "none") -> Tensor:
    """x Phi(x) (Hendrycks 2016); approximate="tanh" is GPT-2's own formula."""
    if approximate == "tanh":
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3)))
    return 0.5 * x * (1 + torch.erf(x * math.sqrt(0.5)))


@operation
def silu(x: Tensor) -> Tensor:
    """x sigmoid(x), also called swish."""
    return x * torch.sigmoid(x)


@operation
def relu(x: Tensor) -> Tensor:
    """max(x, 0)."""
    return x * (x > 0)


@operation
def relu2(x: Tensor) -> Tensor:
    """max(x, 0)^2 (Primer, So 2021)."""
    return relu.reference(x) ** 2

gelu.torch(lambda x, approximate="none": F.gelu(x, approximate=approximate))
silu.torch(F.silu)
relu.torch(F.relu)
relu2.torch(lambda x: F.relu(x).square())

# Hugging Face's names for the activations a config.json may ask for
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": gelu, "gelu_new": functools.partial(gelu, approximate="tanh"),
    "gelu_pytorch_tanh": functools.partial(gelu, approximate="tanh"),
    "silu": silu, "relu": relu, "relu2": relu2,
}


@operation
def glu(gate: Tensor, up: Tensor, activation: str = "silu") -> Tensor:
    """act(gate) * up: SwiGLU with silu, GeGLU with gelu (Shazeer 2020). Shapes (..., N)."""
    return ACTIVATIONS[activation](gate) * up


@operation
def glu_linear(gate: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None = None,
               activation: str = "silu") -> Tensor:
    """(act(gate) * up) W^T + b: the second half of a gated MLP; gate, up (..., N), weight (C, N).

    One operation, so that its backward may keep gate and up alone and make their product again.
    """
    return linear.reference(glu.reference(gate, up, activation), weight, bias)


@glu_linear.torch
def glu_linear_torch(gate, up, weight, bias=None, activation="silu"):
    return linear(glu(gate, up, activation), weight, bias)


@operation
def dropout(x: Tensor, p: float) -> Tensor:
    """Zero a share p of the elements at random and scale the others to keep the mean."""
    return x * keep_mask(x.shape, p, x.device).to(x.dtype) / (1 - quantised(p))


def quantised(p: float) -> float:
    """The drop rate on a CPU is p rounded to a 256th: eight decisions from one 64-bit draw."""
    return round(p * 256) / 256


def keep_mask(shape: Sequence[int], p: float, device: torch.device) -> Tensor:
    """Boolean mask of the given shape, True with probability 1 - quantised(p).

    bernoulli_ on a CPU costs seven nanoseconds an element and would be the slowest operation of
    a training step; a random byte compared with p * 256 costs a tenth.
    """
    count = math.prod(shape)
    draws = torch.empty((count + 7) // 8, dtype=torch.int64, device=device)
    draws.random_(-2 ** 63, None)                     # all 64 bits, the sign included
    return (draws.view(torch.uint8)[:count] >= round(p * 256)).view(shape)

dropout.torch(lambda x, p: F.dropout(x, p))


@operation
def softmax(x: Tensor) -> Tensor:
    """exp(x - max) / sum(exp(x - max)) over the last dimension, in float32."""
    wide = widen(x)
    e = torch.exp(wide - wide.amax(-1, keepdim=True))
    return (e / e.sum(-1, keepdim=True)).to(x.dtype)

softmax.torch(lambda x: torch.softmax(x, -1))    # half types are summed in float32 inside


# ------------------------------------------------------------------------------ attention
def near(rows: Tensor, keys: Tensor, window: int = 0) -> Tensor:
    """True where a query at position rows (..., T) may look at keys (S,): not ahead, and not
    `window` or more back. (..., T, S)."""
    distance = rows.unsqueeze(-1) - keys
    return (distance >= 0) & (distance < window) if window else distance >= 0


def attention_mask(q: Tensor, k: Tensor, window: int, doc: Tensor | None,
                   positions: Tensor | None) -> Tensor:
    """What each query may see, (T, S) or (B, 1, T, S); the arguments are those of attention."""
    T, S = q.shape[2], k.shape[2]
    rows = torch.arange(S - T, S, device=q.device) if positions is None else positions
    seen = near(rows, torch.arange(S, device=q.device), window)
    if doc is not None:
        seen = seen & (doc[:, -T:].unsqueeze(-1) == doc.unsqueeze(-2))
    return seen if seen.ndim == 2 else seen.unsqueeze(1)


@operation
def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, window: int = 0,
              softcap: float = 0.0, doc: Tensor | None = None, positions: Tensor | None = None,
              dropout_p: float = 0.0) -> Tensor:
    """softmax(q k^T scale, masked) v: causal, grouped-query, windowed, within documents.

    q (B, H, T, D); k, v (B, Hkv, S, D) with H a multiple of Hkv; returns (B, H, T, D).
    positions (B, T): where the queries stand among the S keys; default: they are the last T.
    window W: key j is seen by query i if i - j < W (0: all). softcap c: c tanh(score / c).
    doc (B, S) document numbers: attention stays inside one. scale defaults to 1/sqrt(D).
    """
    groups, D = q.shape[1] // k.shape[1], q.shape[3]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = (q @ k.transpose(-2, -1)) * (D ** -0.5 if scale is None else scale)   # (B, H, T, S)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~attention_mask(q, k, window, doc, positions), -math.inf)
    weights = softmax.reference(scores)
    if dropout_p:
        weights = dropout.reference(weights, dropout_p)
    return weights @ v


@attention.torch
def attention_torch(q, k, v, *, scale=None, window=0, softcap=0.0, doc=None, positions=None,
                    dropout_p=0.0):
    (B, H, T, D), (_, K, S, _) = q.shape, k.shape
    groups, scale = H // K, D ** -0.5 if scale is None else scale
    if T == 1 < S and positions is None and doc is None and not softcap:
        # a token looks at all that is there, or at the newest; the heads that share keys are rows
        # of one matrix
        k, v = (k[:, :, -window:], v[:, :, -window:]) if window else (k, v)
        y = F.scaled_dot_product_attention(q.view(B, K, groups, D), k, v, None, dropout_p,
                                           scale=scale)
        return y.view(B, H, 1, D)
    if softcap:                                             # SDPA has none
        return attention.reference(q, k, v, scale=scale, window=window, softcap=softcap, doc=doc,
                                   positions=positions, dropout_p=dropout_p)
    mask = None
    if positions is not None or window or doc is not None or T not in (1, S):
        mask = attention_mask(q, k, window, doc, positions)
    if mask is None and T == S and T > 1:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, scale=scale,
                                              is_causal=True, enable_gqa=groups > 1)
    # the heads that share keys are rows of one matrix: repeated keys would be read repeatedly
    mask = mask if mask is None or groups == 1 else torch.cat([mask] * groups, -2)
    y = F.scaled_dot_product_attention(q.reshape(B, -1, groups * T, D), k, v, attn_mask=mask,
                                       dropout_p=dropout_p, scale=scale)
    return y.reshape(B, H, T, D)


# --------------------------------------------------------------------------------- losses
def row_losses(logits: Tensor, targets: Tensor, ignore_index: int = -100, softcap: float = 0.0,
               z_loss: float = 0.0, label_smoothing: float = 0.0) -> tuple[Tensor, ...]:
    """Loss of each row of logits (N, V) float32, and what its gradient needs: (loss, z, lse, live).

    z = softcap tanh(logits / softcap);  lse = log sum exp z;  e = label_smoothing
    loss = lse - (1 - e) z[target] - e mean(z) + z_loss lse^2,  and 0 where target is ignored
    """
    z = softcap * torch.tanh(logits / softcap) if softcap else logits
    top = z.amax(-1, keepdim=True)
    lse = top.squeeze(-1) + torch.log(torch.exp(z - top).sum(-1))
    live = targets != ignore_index
    right = z.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    loss = lse - (1 - label_smoothing) * right - label_smoothing * z.mean(-1)
    loss = loss + z_loss * lse * lse
    return torch.where(live, loss, 0.0), z, lse, live


@operation
def cross_entropy(logits: Tensor, targets: Tensor, *, ignore_index: int = -100,
                  softcap: float = 0.0, z_loss: float = 0.0, label_smoothing: float = 0.0,
                  reduction: str = "sum") -> Tensor:
    """-log softmax(logits)[target] in nats: a sum (never a mean) or, with "none", a value a row.

    logits (..., V), targets (...) int64; rows whose target is ignore_index count 0. z_loss is
    PaLM's penalty on the normaliser, label_smoothing is Szegedy's (2016). Returns float32.
    """
    loss = row_losses(widen(logits), targets, ignore_index, softcap, z_loss, label_smoothing)[0]
    return loss.sum() if reduction == "sum" else loss


@cross_entropy.torch
def cross_entropy_torch(logits, targets, *, ignore_index=-100, softcap=0.0, z_loss=0.0,
                        label_smoothing=0.0, reduction="sum"):
    wide = widen(logits)
    wide = softcap * torch.tanh(wide / softcap) if softcap else wide
    flat, where = wide.reshape(-1, wide.shape[-1]), targets.reshape(-1)
    loss = F.cross_entropy(flat, where, ignore_index=ignore_index, reduction="none",
                           label_smoothing=label_smoothing)
    if z_loss:
        loss = loss + z_loss * torch.logsumexp(flat, -1) ** 2 * (where != ignore_index)
    return loss.sum() if reduction == "sum" else loss.view(targets.shape)


@operation
def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, **options) -> Tensor:
    """cross_entropy(x W^T, targets) without ever holding the (N, V) logits: the output layer.

    x (..., C), weight (V, C), targets (...); options are those of cross_entropy. The reference
    holds all logits, the other forms a chunk of rows.
    """
    return cross_entropy.reference(linear.reference(x, weight), targets, **options)

DIVERGENCES = ("forward", "reverse", "js")


def capped(z: Tensor, softcap: float) -> Tensor:
    return softcap * torch.tanh(z / softcap) if softcap else z


@operation
def linear_kl(x: Tensor, weight: Tensor, teacher_x: Tensor, teacher_weight: Tensor, *,
              temperature: float = 1.0, live: Tensor | None = None, divergence: str = "forward",
              beta: float = 0.5, softcap: float = 0.0, teacher_softcap: float = 0.0, cut: int = 0,
              targets: Tensor | None = None, alpha: float = 0.0):
    """Sum over rows of T^2 D(p, q), teacher p and student q both softened by T (Hinton 2015). Nats.

    forward KL(p || q); reverse KL(q || p); js: b KL(p || m) + (1 - b) KL(q || m) with
    m = b p + (1 - b) q, the generalised Jensen-Shannon of GKD (Agarwal 2023, arXiv:2306.13649).
    x (..., C), weight (V, C); teacher_x (..., Ct), teacher_weight (Vt, Ct): both vocabularies are
    cut to their first `cut` tokens, by default to the smaller. live (...) marks the rows that
    count. Gradients reach the student alone.
    With targets (...) int64: (sum of alpha CE + (1 - alpha) T^2 D, sum of CE, sum of T^2 D), the
    last two without gradients; the cross entropy is that of all of the student's logits.
    """
    z = capped(widen(linear.reference(x, weight)), softcap)
    T = temperature
    cut = cut or min(len(weight), len(teacher_weight))
    taught = widen(linear.reference(teacher_x.detach(), teacher_weight[:cut].detach()))
    log_p = log_normal(capped(taught, teacher_softcap) / T)
    log_q = log_normal(z[..., :cut] / T)
    p = torch.exp(log_p)
    q = torch.exp(log_q)
    if divergence == "js":
        # log m of the logs, as b p + (1 - b) q may be 0 where neither log is
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))
        rows = beta * p * (log_p - log_m) + (1 - beta) * q * (log_q - log_m)
    else:
        rows = p * (log_p - log_q) if divergence == "forward" else q * (log_q - log_p)
    live = torch.ones_like(rows[..., 0], dtype=torch.bool) if live is None else live
    total = T ** 2 * torch.where(live, rows.sum(-1), 0.0).sum()
    if targets is None:
        return total
    right = log_normal(z).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    ce = -torch.where(live, right, 0.0).sum()
    return alpha * ce + (1 - alpha) * total, ce.detach(), total.detach()


def log_normal(z: Tensor) -> Tensor:
    """log softmax(z), plainly."""
    z = z - z.amax(-1, keepdim=True).detach()
    return z - torch.log(torch.exp(z).sum(-1, keepdim=True))


# --------------------------------------------------------------------- mixture of experts
@operation
def moe(x: Tensor, chosen: Tensor, share: Tensor, gate: Tensor, up: Tensor, down: Tensor,
        activation: str = "silu") -> Tensor:
    """Each token through its k experts: y = sum_j share_j down_e(act(gate_e x) * up_e x).

    e = chosen_j. x (N, C); chosen (N, k) int64 expert numbers, share (N, k) their weights;
    gate, up (E, I, C), down (E, C, I). No token is dropped (MegaBlocks, Gale 2022).
    """
    y = torch.zeros_like(x)
    for e in range(gate.shape[0]):
        weight = (share * (chosen == e)).sum(-1, keepdim=True).to(x.dtype)          # (N, 1)
        hidden = glu.reference(x @ gate[e].T, x @ up[e].T, activation)
        y = y + weight * (hidden @ down[e].T)
    return y


@moe.torch
def moe_torch(x, chosen, share, gate, up, down, activation="silu"):
    # tokens sorted by expert: each expert multiplies one contiguous run of rows
    k, flat = chosen.shape[1], chosen.reshape(-1)
    order, runs = flat.argsort(stable=True), torch.bincount(flat, minlength=len(gate)).tolist()
    # unbind once: its backward gives every expert a gradient, zeros where it saw no token
    experts = zip(x[order // k].split(runs), gate.unbind(), up.unbind(), down.unbind())
    out = [linear(glu(linear(r, g), linear(r, u), activation), d)
           for r, g, u, d in experts if len(r) or not len(x)]
    out = torch.cat(out) * share.reshape(-1)[order].unsqueeze(-1).to(x.dtype)
    return torch.zeros_like(x).index_add(0, order // k, out)


# ----------------------------------------------------------------------------- optimizers
@operation
def adamw(params: Sequence[Tensor], grads: Sequence[Tensor], m: Sequence[Tensor],
          v: Sequence[Tensor], *, step: int, lr: float, beta1: float, beta2: float, eps: float,
          weight_decay: float) -> None:
    """One AdamW step in place (Loshchilov 2019). `step` counts from 1.

    p <- p (1 - lr wd);  m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2
    p <- p - lr m_hat / (sqrt(v_hat) + eps), hats dividing by 1 - b^step
    """
    for p, g, first, second in zip(params, grads, m, v):
        p.mul_(1 - lr * weight_decay)
        first.mul_(beta1).add_(g, alpha=1 - beta1)
        second.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        denominator = (second / (1 - beta2 ** step)).sqrt() + eps
        p.sub_(lr / (1 - beta1 ** step) * first / denominator)


# Coefficients of the quintic whose repetition pushes singular values towards 1 (Jordan 2024)
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def newton_schulz(g: Tensor, steps: int = 5) -> Tensor:
    """Roughly the nearest orthogonal matrices: U V^T of g = U S V^T; g (..., rows, cols).

    x <- a x + (b A + c A^2) x with A = x x^T, from x = g / |g|. Singular values end within
    about 0.7 to 1.2, which is as good as 1 for a descent direction and far cheaper than an SVD.
    """
    a, b, c = NEWTON_SCHULZ
    x = g.reshape(-1, *g.shape[-2:])
    x = x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.shape[-2] > x.shape[-1]             # the smaller side makes the smaller A
    x = x.mT.contiguous() if tall else x
    for _ in range(steps):
        A = torch.bmm(x, x.mT)
        A = torch.baddbmm(A, A, A, beta=b, alpha=c)     # b A + c A A in one pass
        x = torch.baddbmm(x, A, x, beta=a)
    return (x.mT if tall else x).reshape(g.shape)


@operation
def muon(params: Sequence[Tensor], grads: Sequence[Tensor], momentum: Sequence[Tensor], *,
         lr: float, beta: float, weight_decay: float, steps: int = 5) -> None:
    """One Muon step in place on matrices (Jordan 2024): descend along orthogonalised momentum.

    M <- b M + (1 - b) g;  u = newton_schulz(b M + (1 - b) g)          (Nesterov)
    p <- p (1 - lr wd) - lr sqrt(max(1, rows / cols)) u
    """
    for p, g, M in zip(params, grads, momentum):
        M.lerp_(g, 1 - beta)
        u = newton_schulz(g.lerp(M, beta), steps)
        p.mul_(1 - lr * weight_decay)
        p.sub_(lr * math.sqrt(max(1.0, p.shape[0] / p.shape[1])) * u)


@operation
def clip_grad_norm(grads: Sequence[Tensor], max_norm: float, scale: Tensor | float = 1.0) -> Tensor:
    """Multiply all gradients by scale, then by max_norm / norm where their norm exceeds it.

    Returns the norm before clipping, a scalar tensor on the gradients' device; max_norm 0 never
    clips. `scale` turns a sum over tokens into a mean without a pass of its own.
    """
    norm = torch.sqrt(sum((g.double() ** 2).sum() for g in grads)).float() * scale
    limit = (max_norm / (norm + 1e-6)).clamp(max=1.0) if max_norm else 1.0
    for g in grads:
        g.mul_(limit * scale)
    return norm


if __name__ == "__main__":
    refuse_to_run()
