"""The operations on a CPU, counted by hand: as few passes over memory as the formula allows.

    import kernels                      # loads this file automatically
    y = kernels.attention(q, k, v)      # on a CPU, in training: AttentionCPU below

A core multiplies far faster than it reads memory, and PyTorch's eager operators read and write
every tensor between them. So each form here writes its result once, updates in place what is its
own, and keeps blocks small enough for a core's cache. The gradients are derived on paper;
tests/backends holds them against float64 autograd and finite differences, and
`python bench.py kernels` shows what each gains over PyTorch's operator.

The last two functions are for serving: what a token repeats in every layer, prepared once.
"""
from __future__ import annotations

import math
from typing import Callable

from config import refuse_to_run

import torch
from torch import Tensor
from torch.autograd import Function

import kernels
from backends.chunked_loss import ChunkedLoss


# ------------------------------------------------------------------------- normalisation


class RMSNormCPU(Function):
    """Few passes over x: autograd through the formula walks memory about twice as often."""
    @staticmethod
    def forward(ctx, x, weight, eps):
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        rstd = torch.rsqrt(norm.square_().div_(x.shape[-1]).add_(eps)).to(x.dtype)   # (..., 1)
        scale = weight.to(x.dtype)
        normed = x * rstd
        ctx.save_for_backward(normed, rstd, scale)
        return normed * scale

    @staticmethod
    def backward(ctx, grad):
        # dx = rstd * (dn - n * mean(dn * n)) with n = x * rstd and dn = dy * w
        normed, rstd, scale = ctx.saved_tensors
        dweight = (grad * normed).reshape(-1, grad.shape[-1]).sum(0, dtype=torch.float32)
        dn = grad * scale
        mean = torch.linalg.vecdot(dn, normed).unsqueeze(-1).div_(-normed.shape[-1])
        dx = torch.addcmul(dn, normed, mean).mul_(rstd)
        return dx, dweight, None               # autograd casts each to its input's type


@kernels.rms_norm.cpu
def rms_norm_cpu(x, weight, eps=1e-6, offset=0.0):
    weight = weight + offset if offset else weight
    if x.dtype == torch.float64:                    # the statistics above are float32
        return kernels.rms_norm.implementations["torch"](x, weight, eps)
    return RMSNormCPU.apply(x, weight, eps)


class LayerNormCPU(Function):
    """PyTorch's own but for the gradients of w and b, which its CPU kernel adds up in the type
    of x: over thousands of rows of bfloat16 they lose several percent. sum() does not."""
    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        # float32 weights keep mean and rstd in float32; zeros: without a bias torch is slow
        w = kernels.widen(weight)
        b = torch.zeros_like(w) if bias is None else kernels.widen(bias)
        y, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], w, b, eps)
        ctx.save_for_backward(x, w, b, mean, rstd)
        ctx.biased = bias is not None
        return y

    @staticmethod
    def backward(ctx, grad):
        x, w, b, mean, rstd = ctx.saved_tensors
        dx = torch.ops.aten.native_layer_norm_backward(
            grad, x, x.shape[-1:], mean, rstd, w, b, [True, False, False])[0]
        rows = grad.reshape(-1, x.shape[-1])
        normed = ((x - mean.to(x.dtype)) * rstd.to(x.dtype)).reshape(rows.shape)
        return dx, (rows * normed).sum(0), rows.sum(0) if ctx.biased else None, None


@kernels.layer_norm.cpu
def layer_norm_cpu(x, weight, bias=None, eps=1e-5):
    if x.dtype == torch.float64:
        return kernels.layer_norm.implementations["torch"](x, weight, bias, eps)
    return LayerNormCPU.apply(x, weight, bias, eps)


# ----------------------------------------------------------------------- linear and its gate


class LinearCPU(Function):
    """y = x [W1; W2; …]^T + b with float32 masters: autograd would keep their bfloat16 casts of all
    layers until the backward, half of the weights' memory; casting again costs a pass over W."""
    @staticmethod
    def forward(ctx, x, bias, *weights):
        ctx.save_for_backward(x, *weights)
        ctx.biased = bias is not None
        return torch.nn.functional.linear(x, LinearCPU.join(x, weights),
                                          None if bias is None else bias.to(x.dtype))

    @staticmethod
    def join(x, weights):
        cast = [w.to(x.dtype) for w in weights]
        return torch.cat(cast) if len(cast) > 1 else cast[0]

    @staticmethod
    def backward(ctx, grad):
        x, *weights = ctx.saved_tensors             # asked once: checkpointing remakes it each time
        dx = grad @ LinearCPU.join(grad, weights) if ctx.needs_input_grad[0] else None
        rows = grad.reshape(-1, grad.shape[-1])
        dw = [None] * len(weights)
        if any(ctx.needs_input_grad[2:]):
            whole = rows.T @ x.reshape(-1, x.shape[-1])
            dw = whole.split([len(w) for w in weights])
        return dx, rows.sum(0) if ctx.biased else None, *dw


plain_linear = kernels.linear.implementations["torch"]


@kernels.linear.cpu
def linear_cpu(x, weight, bias=None):
    if weight.dtype == torch.float32 and x.dtype == torch.bfloat16 and torch.is_grad_enabled():
        return LinearCPU.apply(x, bias, weight)
    return plain_linear(x, weight, bias)


@kernels.linear_joined.cpu
def linear_joined_cpu(x, weights, biases):
    if x.dtype == torch.bfloat16 and biases[0] is None:
        return LinearCPU.apply(x, None, *weights)
    return kernels.linear_joined.reference(x, weights, biases)


class GluCPU(Function):
    """silu(gate) * up, keeping what it was given and not silu(gate)."""
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return GluCPU.product(gate, up)

    @staticmethod
    def product(gate, up):
        return torch.nn.functional.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad):
        return GluCPU.differentiate(grad, *ctx.saved_tensors)

    @staticmethod
    def differentiate(grad, gate, up):
        """Return the gradients of gate and up."""
        both = torch.empty(*gate.shape[:-1], 2 * gate.shape[-1], dtype=gate.dtype)
        dgate, dup = both.chunk(2, -1)
        torch.mul(grad, torch.nn.functional.silu(gate), out=dup)
        dgate.copy_(torch.ops.aten.silu_backward(grad * up, gate))
        return dgate, dup


@kernels.glu.cpu
def glu_cpu(gate, up, activation="silu"):
    if activation == "silu" and torch.is_grad_enabled() and gate.requires_grad:
        return GluCPU.apply(gate, up)
    return kernels.glu.reference(gate, up, activation)


class GluLinearCPU(Function):
    """(silu(gate) * up) W^T + b, keeping gate and up alone: their product is made again, and the
    master weight is cast again, as in LinearCPU."""
    @staticmethod
    def forward(ctx, gate, up, weight, bias):
        ctx.save_for_backward(gate, up, weight)
        ctx.biased = bias is not None
        return torch.nn.functional.linear(GluCPU.product(gate, up), weight.to(gate.dtype),
                                          None if bias is None else bias.to(gate.dtype))

    @staticmethod
    def backward(ctx, grad):
        gate, up, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        dw = None
        if ctx.needs_input_grad[2]:
            x = GluCPU.product(gate, up)
            dw = rows.T @ x.reshape(-1, x.shape[-1])
        dgate, dup = GluCPU.differentiate(grad @ weight.to(grad.dtype), gate, up)
        return dgate, dup, dw, rows.sum(0) if ctx.biased else None


@kernels.glu_linear.cpu
def glu_linear_cpu(gate, up, weight, bias=None, activation="silu"):
    masters = weight.dtype == torch.float32 and gate.dtype == torch.bfloat16
    if masters and activation == "silu" and torch.is_grad_enabled() and gate.requires_grad:
        return GluLinearCPU.apply(gate, up, weight, bias)
    return linear_cpu(glu_cpu(gate, up, activation), weight, bias)


# ------------------------------------------------------------------------------- position


class RopeCPU(Function):
    """Written half by half into the result; a rotation's backward is the opposite rotation."""
    @staticmethod
    def forward(ctx, x, cos, sin, interleaved):
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        half = cos.shape[-1]
        cos = cos.unsqueeze(-2).to(x.dtype)
        sin = sin.unsqueeze(-2).to(x.dtype)
        first, second = ((slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved
                         else (slice(0, half), slice(half, 2 * half)))
        y = torch.empty_like(x, memory_format=torch.contiguous_format)
        a = x[..., first]
        b = x[..., second]
        ya = y[..., first]
        yb = y[..., second]
        torch.mul(a, cos, out=ya).addcmul_(b, sin, value=-1)
        torch.mul(b, cos, out=yb).addcmul_(a, sin)
        y[..., 2 * half:] = x[..., 2 * half:]
        return y

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return RopeCPU.apply(grad, cos, -sin, ctx.interleaved), None, None, None


@kernels.rope.cpu
def rope_cpu(x, cos, sin, interleaved=False):
    return RopeCPU.apply(x, cos, sin, interleaved)


# the reference draws eight decisions at a time: F.dropout's bernoulli costs ten times as much
kernels.dropout.cpu(kernels.dropout.reference)


# ------------------------------------------------------------------------------ attention


class AttentionCPU(Function):
    """Causal attention in blocks that stay in a core's cache; two to three times SDPA on a CPU.

    Blocks of `ROWS` queries see only keys up to their own end, so half of the square is never
    computed; `GROUP` heads share a call to keep the scores near 2 MB. Like FlashAttention
    (Dao 2022) nothing of size (T, T) is kept: the backward recomputes each block's softmax.
    """
    ROWS = 128
    GROUP = 48

    @staticmethod
    def blocks(q, window, doc):
        """Yield slices (heads, rows, keys) and the mask of what is hidden at the keys' end."""
        BH, T = q.shape[:2]
        # a document mask differs by batch row: a group is one row's heads then
        step = AttentionCPU.GROUP if doc is None else BH // doc.shape[0]
        positions = torch.arange(T)
        if doc is not None:
            # where the document of each token begins, (B, T): no key before that is seen
            numbers = torch.unique(doc, return_inverse=True)[1]
            numbers += torch.arange(len(doc)).unsqueeze(1) * (numbers.max() + 1)
            begin = torch.full((int(numbers.max()) + 1,), T).scatter_reduce_(
                0, numbers.flatten(), positions.repeat(len(doc)), "amin")[numbers]
        for i in range(0, T, AttentionCPU.ROWS):
            end = min(i + AttentionCPU.ROWS, T)
            for h in range(0, BH, step):
                start = max(0, i - window + 1) if window else 0
                if doc is not None:
                    own = doc[h // step]
                    start = max(start, int(begin[h // step, i:end].min()))
                # without window or documents only the square on the diagonal has anything to hide
                first = start if window or doc is not None else i
                hidden = ~kernels.near(positions[i:end], positions[first:end], window)
                if doc is not None:
                    hidden |= own[i:end, None] != own[start:end]
                yield slice(h, h + step), slice(i, end), slice(start, end), hidden

    @staticmethod
    def weights(q, k, scale, softcap, hidden):
        """Return one block's softmax (G, rows, keys) and, for the backward, tanh of the capped
        scores."""
        scores = torch.bmm(q, k.transpose(1, 2)).mul_(scale)
        tanh = None
        if softcap:
            tanh = scores.div_(softcap).tanh_()
            scores = tanh * softcap
        scores[..., -hidden.shape[-1]:].masked_fill_(hidden, -math.inf)
        return torch.softmax(scores, -1), tanh

    @staticmethod
    def forward(ctx, q, k, v, scale, window, softcap, doc, dropout_p):
        ctx.save_for_backward(q, k, v)              # GQA: only the heads that there are are kept
        k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
        out = torch.empty_like(q)
        masks = []
        for h, rows, keys, hidden in AttentionCPU.blocks(q, window, doc):
            p, _ = AttentionCPU.weights(q[h, rows], k[h, keys], scale, softcap, hidden)
            if dropout_p:
                masks.append(kernels.keep_mask(p.shape, dropout_p, p.device))
                p = p.mul_(masks[-1]).div_(1 - kernels.quantised(dropout_p))
            out[h, rows] = torch.bmm(p, v[h, keys])
        ctx.rest = (scale, window, softcap, doc, dropout_p, masks)
        return out

    @staticmethod
    def backward(ctx, grad):
        q, *kept = ctx.saved_tensors
        scale, window, softcap, doc, dropout_p, masks = ctx.rest
        k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in kept)
        dq = torch.empty_like(q)
        dk = torch.zeros_like(k)
        dv = torch.zeros_like(v)
        for n, (h, rows, keys, hidden) in enumerate(AttentionCPU.blocks(q, window, doc)):
            p, tanh = AttentionCPU.weights(q[h, rows], k[h, keys], scale, softcap, hidden)
            dp = torch.bmm(grad[h, rows], v[h, keys].transpose(1, 2))
            dropped = p
            if dropout_p:
                keep = masks[n].to(p.dtype).div_(1 - kernels.quantised(dropout_p))
                dropped = p * keep
                dp = dp.mul_(keep)
            dv[h, keys] += torch.bmm(dropped.transpose(1, 2), grad[h, rows])
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype).mul_(scale)  # p (dp - sum p dp)
            if softcap:
                ds = ds * (1 - tanh * tanh)
            dq[h, rows] = torch.bmm(ds, k[h, keys])
            dk[h, keys] += torch.bmm(ds.transpose(1, 2), q[h, rows])
        dk, dv = (d.unflatten(0, (len(x), -1)).sum(1) for d, x in zip((dk, dv), kept))
        return dq, dk, dv, None, None, None, None, None


@kernels.attention.cpu
def attention_cpu(q, k, v, *, scale=None, window=0, softcap=0.0, doc=None, positions=None,
                  dropout_p=0.0):
    (B, H, T, D) = q.shape
    S = k.shape[2]
    plain = not window and not softcap and doc is None and not dropout_p
    # SDPA is as good for a few tokens over a cache, for short prompts, and in float32, whose
    # products cost so much that the rest matters less
    if positions is not None or T != S or T == 1 or plain and (
            q.dtype == torch.float32 or T <= 128 and not torch.is_grad_enabled()):
        return kernels.attention.implementations["torch"](
            q, k, v, scale=scale, window=window, softcap=softcap, doc=doc, positions=positions,
            dropout_p=dropout_p)
    # v is a view of what q, k and v were computed in: kept as it is, it would keep all of that
    flat = [x.reshape(-1, T, D).contiguous() for x in (q, k, v)]
    scale = D ** -0.5 if scale is None else scale
    return AttentionCPU.apply(*flat, scale, window, softcap, doc, dropout_p).view(B, H, T, D)


# -------------------------------------------------------------------------------- serving


@kernels.prepare_rms_norm.cpu
def prepare_rms_norm_cpu(weight: Tensor, eps: float, offset: float, dtype: torch.dtype) -> Callable:
    """sqrt(C) w x / hypot(|x|, sqrt(C eps)): for one token the number of calls is what counts."""
    if dtype not in (torch.float32, torch.bfloat16):            # in float16 |x| overflows
        return kernels.prepare_rms_norm.reference(weight, eps, offset, dtype)
    C = weight.shape[0]
    least = torch.tensor(math.sqrt(C * eps), dtype=dtype)
    scale = (weight.float() + offset).mul_(math.sqrt(C)).to(dtype)
    length = torch.linalg.vector_norm
    return lambda x: (x / length(x, 2, -1, True).hypot_(least)).mul_(scale)


@kernels.prepare_rope.cpu
def prepare_rope_cpu(cos: Tensor, sin: Tensor, dtype: torch.dtype, interleaved: bool = False
                     ) -> Callable:
    """Where nothing is learned, cos and sin are spread over whole heads once, as [cos cos] and
    [-sin sin]: then a layer's x cos + swap(x) sin is three operations."""
    if torch.is_grad_enabled():
        return kernels.prepare_rope.reference(cos, sin, dtype, interleaved)
    half = cos.shape[-1]
    pair = -1 if interleaved else -2
    cos, sin = (torch.stack(y, pair).flatten(-2).unsqueeze(-2).to(dtype)      # (.., T, 1, R)
                for y in ((cos, cos), (-sin, sin)))

    def turn(x: Tensor) -> Tensor:
        whole = x.shape[-1] == 2 * half
        part = x if whole else x[..., :2 * half]
        swapped = part.unflatten(-1, (half, 2)).flip(-1).flatten(-2) if interleaved else (
            part.roll(half, -1))
        y = (part * cos).addcmul_(swapped, sin)
        return y if whole else torch.cat((y, x[..., 2 * half:]), -1)
    return turn


# --------------------------------------------------------------------------------- the loss


@kernels.linear_cross_entropy.cpu
def linear_cross_entropy_cpu(x, weight, targets, *, reduction="sum", **options):
    """Without softcap and the like the logits of a chunk are passed over once forth, to log p, and
    once back in place, to their gradient p - onehot(target)."""
    if torch.compiler.is_compiling() or any(
            options.get(name) for name in ("softcap", "z_loss", "label_smoothing")):
        return kernels.linear_cross_entropy.implementations["torch"](x, weight, targets,
                                                           reduction=reduction, **options)
    right = targets.reshape(-1)
    live = right != options.get("ignore_index", -100)
    whole = bool(live.all())

    def rule(logits, part, learn):
        where = right[part].clamp(min=0).unsqueeze(-1)
        log_p = torch.log_softmax(logits, -1)
        loss = torch.where(live[part], -log_p.gather(-1, where).squeeze(-1), 0.0)
        if not learn:
            return loss, None
        dz = log_p.exp_().scatter_add_(-1, where, torch.full_like(log_p[:, :1], -1.0))
        return loss, dz if whole else dz.mul_(live[part].unsqueeze(-1))

    loss = ChunkedLoss.of(x.reshape(-1, x.shape[-1]), weight, rule, reduction)
    return loss if reduction == "sum" else loss.view(targets.shape)


if __name__ == "__main__":
    refuse_to_run()
