"""Triton kernels around the matmuls of a model: the output layer's losses, and the experts.

    import kernels, triton_loss        # registers a `triton` form with each operation
    kernels.use("triton")               # on a GPU; one GPU or many, the calls are the same
    TRITON_INTERPRET=1 python -m pytest tests/backends/test_triton_tiles.py  # interpreted

    linear                  in triton_matmul.py, to be read: cuBLAS is as fast, and `auto` keeps it
    linear_cross_entropy    logits by cuBLAS, a chunk of rows in one buffer that is used again; a
                            kernel turns each row of logits into its gradient where it lies
    linear_kl               the same walk with a teacher's logits beside the student's
    moe                     tokens sorted by expert, every expert's matmul in one launch

Logits (N, V) never exist whole, no token of an expert is dropped, and nothing waits for the host:
how many tokens an expert has stays on the device, and so does the gradient from upstream. Sums are
float32. There are no atomics, so the same input gives the same gradient, bit for bit. To expect:
relative L2 against float64 autograd at most 1e-5 in float32, 1e-3 in float16, 1e-2 in bfloat16
(tests/backends/test_triton_tiles.py). How to read a kernel: see triton_pointwise.py.
"""
from __future__ import annotations

from typing import Callable, Iterator

from config import refuse_to_run

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function

import kernels
from backends.triton_common import (FLAT, capped, check, expect, learns, one_type, online, rows_of,
                                    ship, window)

ROW = dict(R=1, BLOCK=4096, num_warps=8)        # a program of a loss walks one row of logits


# ------------------------------------------------------------------- logits, a chunk at a time


FEW_ROWS = 1024
MOST_ROWS = 2048
MOST_LOGITS = 2 ** 28


def chunk_rows(N: int, C: int, V: int) -> int:
    """Return rows of logits that exist at a time, of N.

    N C / V rows make the logits as large as x: a chunk is then small beside what the model holds
    anyway (Liger, Hsu 2024). But a chunk also costs 8 V C bytes, to read and write the sum dW in
    float32, against 6 V C FLOPs a row: at a GPU's 200 or more FLOPs a byte, 2048 rows keep that at
    about a tenth of the time. Under a vocabulary so large that those would be more than 2^28
    logits, half a GB in bfloat16, 1024 rows are enough: cuBLAS is as fast with them.
    """
    rows = max(N * C // V, FEW_ROWS, min(MOST_ROWS, MOST_LOGITS // V))
    # chunks of one size: a last one of a few rows would cost a whole pass over W and dW
    return min(N, triton.cdiv(triton.cdiv(N, triton.cdiv(N, rows)), 128) * 128)


def logits_buffer(rows: int, V: int, like: Tensor) -> Tensor:
    """Return (rows, V); every row begins at a multiple of 64 elements, for V = 50257 as well:
    tensor
    cores are fed 16 aligned bytes at a time, and cuBLAS is several times slower where it cannot."""
    return like.new_empty(rows, triton.cdiv(V, 64) * 64)[:, :V]


def write_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a b, in place: no second tensor of its size. torch.compile, which does not trace that
    for rows with a gap between them, gets a copy that it can make part of the matmul."""
    if torch.compiler.is_compiling():
        out.copy_(a @ b)
    else:
        torch.mm(a, b, out=out)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, added up in the type of total, which may be float32 under half types."""
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, out=total)
    elif total.is_cuda:                 # cuBLAS reads and writes the float32 sum itself
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:                               # a CPU's addmm does not: the interpreter comes here
        total += a @ b


def walk(x: Tensor, weight: Tensor, rule: Callable, learn_x: bool, learn_w: bool) -> tuple:
    """Return (dx, dW) of a loss on x W^T, or None for what is not asked for; dW is float32.

    rule(z, part) sees the logits z of the rows `part`, and leaves their gradient in z.
    """
    (N, C) = x.shape
    V = len(weight)
    w = weight.to(x.dtype)
    rows = chunk_rows(N, C, V) if N else 1
    buffer = logits_buffer(rows, V, x)
    dx = torch.empty(N, C, dtype=x.dtype, device=x.device) if learn_x else None
    dw = torch.zeros(V, C, dtype=torch.float32, device=x.device) if learn_w else None
    for start in range(0, N, rows):
        part = slice(start, min(N, start + rows))
        z = buffer[:part.stop - start]
        write_product(z, x[part], w.T)
        rule(z, part)
        if learn_x:
            write_product(dx[part], z, w)
        if learn_w:
            add_product(dw, z.T, x[part])
    return dx, dw


@triton.jit
def scale_all(d, factor, y, n, BLOCK: tl.constexpr):
    # the factor is read on the device, in float32: a product with a bfloat16 tensor would round it
    part = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(d + part, part < n, 0.0).to(tl.float32) * tl.load(factor).to(tl.float32)
    tl.store(y + part, value.to(y.dtype.element_ty), part < n)


def scaled(d: Tensor | None, factor: Tensor, dtype: torch.dtype) -> Tensor | None:
    """d times a number, in that type, in one pass. d itself stays: backward may run again."""
    if d is None:
        return None
    y = torch.empty(d.shape, dtype=dtype, device=d.device)
    if d.numel():
        scale_all[triton.cdiv(d.numel(), FLAT),](d, factor, y, d.numel(), BLOCK=FLAT, num_warps=4)
    return y


# ----------------------------------------------------------------------- linear cross entropy


@triton.jit
def row_loss(logits, targets, loss, lse, dloss, dlogits, N, V, stride, dloss_stride, d_stride,
             ignore, softcap, z_loss, smooth, CAP: tl.constexpr, SMOOTH: tl.constexpr,
             KNOWN: tl.constexpr, LEARN: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr):
    # two walks along a row: loss and lse (unless KNOWN), then the gradient, which may take the
    # place of the logits
    row, lane, _ = window(N, BLOCK, 1, R, BLOCK)
    target = tl.load(targets + row, row < N, ignore)
    live = (row < N) & (target != ignore)                 # an ignored row is written, not read
    at = logits + row * stride
    if KNOWN:
        norm = tl.load(lse + row, live, 0.0)
    else:
        # a target that is neither ignored nor in the vocabulary makes the loss NaN
        inside = live & (target >= 0) & (target < V)
        right = capped(tl.load(at + target, inside, float("nan")), softcap, CAP)
        top = tl.full((R, 1), float("-inf"), tl.float32)
        total = tl.zeros((R, 1), tl.float32)
        plain = tl.zeros((R, 1), tl.float32)              # sum of z, for the smoothing
        for start in range(0, V, BLOCK):
            mask = live & (start + lane < V)
            z = tl.load(at + start + lane, mask, float("-inf"))
            z = tl.where(mask, capped(z, softcap, CAP), float("-inf"))
            top, total = online(top, total, z)
            if SMOOTH:
                plain += tl.sum(tl.where(mask, z, 0.0), 1)[:, None]
        norm = tl.where(live, top + tl.log(total), 0.0)
        value = norm - (1 - smooth) * right + z_loss * norm * norm
        if SMOOTH:
            value -= smooth * plain / V
        tl.store(loss + row, tl.where(live, value, 0.0), row < N)
        tl.store(lse + row, norm, row < N)
    if LEARN:
        # no thread may write before all have read: the target's logit belongs to another one
        tl.debug_barrier()
        up = tl.load(dloss + row * dloss_stride, live, 0.0).to(tl.float32)
        for start in range(0, V, BLOCK):
            col = start + lane
            z = capped(tl.load(at + col, live & (col < V), 0.0), softcap, CAP)
            dz = tl.exp(z - norm) * (1 + 2 * z_loss * norm) - smooth / V
            dz -= tl.where(col == target, 1 - smooth, 0.0)
            if CAP:
                dz *= 1 - (z / softcap) * (z / softcap)
            dz = tl.where(live, dz * up, 0.0)
            tl.store(dlogits + row * d_stride + col, dz.to(dlogits.dtype.element_ty),
                     (row < N) & (col < V))


class CrossEntropy(Function):
    """Loss of each row of logits (N, V) against targets (N,), float32; the formula and its options
    are kernels.row_losses'. Saves the logits and lse (N,); the gradient is a tensor of its own, so
    that the caller's logits are never overwritten."""
    @staticmethod
    def forward(ctx, logits, targets, options):
        loss = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
        lse = torch.empty_like(loss)
        ctx.options = options
        CrossEntropy.launch(logits, targets, loss, lse, loss, logits, options, False)
        ctx.save_for_backward(logits, targets, loss, lse)
        return loss

    @staticmethod
    def backward(ctx, dloss):
        logits, targets, loss, lse = ctx.saved_tensors
        dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        CrossEntropy.launch(logits, targets, loss, lse, dloss, dlogits, ctx.options, True)
        return dlogits, None, None

    @staticmethod
    def launch(logits, targets, loss, lse, dloss, dlogits, options, known):
        N, V = logits.shape
        if N:
            row_loss[N,](logits, targets, loss, lse, dloss, dlogits, N, V, logits.stride(0),
                         dloss.stride(0), dlogits.stride(0), *options, CAP=options[1] != 0,
                         SMOOTH=options[3] != 0, KNOWN=known, LEARN=known, **ROW)


@kernels.cross_entropy.triton
def cross_entropy_triton(logits, targets, *, ignore_index=-100, softcap=0.0, z_loss=0.0,
                         label_smoothing=0.0, reduction="sum"):
    check(logits, targets)
    expect(targets.shape == logits.shape[:-1], "cross_entropy", "logits (..., V), targets (...)")
    loss = CrossEntropy.apply(rows_of(logits), targets.reshape(-1).contiguous(),
                              (ignore_index, softcap, z_loss, label_smoothing))
    return loss.sum() if reduction == "sum" else loss.view(targets.shape)


class LinearCrossEntropy(Function):
    """Loss of each row of x W^T, or their sum; x (N, C), W (V, C); options of kernels.row_losses:
        d loss / d z = p (1 + 2 z_loss lse) - (1 - e) onehot(target) - e / V

    A sum has one upstream gradient for all rows, so dx and dW are made in the forward, while the
    logits are there, and scaled in the backward. A loss per row saves lse (N,) and makes the
    logits once more in the backward.
    """
    @staticmethod
    def rows(options, targets, loss, lse, dloss, known):
        """Return the rule of `walk`; dloss None asks for no gradient."""
        def rule(z, part):
            N, V = z.shape
            up = loss if dloss is None else dloss[part] if dloss.stride(0) else dloss
            row_loss[N,](
                z, targets[part], loss[part], lse[part], up, z, N, V, z.stride(0), up.stride(0),
                z.stride(0), *options, CAP=options[1] != 0, SMOOTH=options[3] != 0, KNOWN=known,
                LEARN=dloss is not None, **ROW)
        return rule

    @staticmethod
    def forward(ctx, x, weight, targets, options, summed, learn):
        learn_x, learn_w = (learn and need for need in ctx.needs_input_grad[:2])
        loss = torch.empty(len(x), dtype=torch.float32, device=x.device)
        lse = torch.empty_like(loss)
        one = torch.ones(1, device=x.device).expand(len(x) or 1)
        now = summed and learn
        rule = LinearCrossEntropy.rows(options, targets, loss, lse, one if now else None, False)
        dx, dw = walk(x, weight, rule, now and learn_x, now and learn_w)
        ctx.rest = (options, summed, learn_x, learn_w, x.dtype, weight.dtype)
        ctx.save_for_backward(*(dx, dw) if summed else (x, weight, targets, lse))
        return loss.sum() if summed else loss

    @staticmethod
    def backward(ctx, grad):
        options, summed, learn_x, learn_w, x_dtype, w_dtype = ctx.rest
        if summed:
            dx, dw = ctx.saved_tensors
            dx = scaled(dx, grad, x_dtype)
            dw = scaled(dw, grad, w_dtype)
        else:
            x, weight, targets, lse = ctx.saved_tensors
            rule = LinearCrossEntropy.rows(options, targets, lse, lse, grad, True)
            dx, dw = walk(x, weight, rule, learn_x, learn_w)
        return dx, dw, None, None, None, None


@kernels.linear_cross_entropy.triton
def linear_cross_entropy_triton(x, weight, targets, *, ignore_index=-100, softcap=0.0, z_loss=0.0,
                                label_smoothing=0.0, reduction="sum"):
    check(x, weight, targets)
    expect(targets.shape == x.shape[:-1] and weight.shape[1:] == x.shape[-1:],
           "linear_cross_entropy", "x (..., C), weight (V, C) and targets (...)")
    x = one_type(x)[0]
    options = (ignore_index, softcap, z_loss, label_smoothing)
    loss = LinearCrossEntropy.apply(rows_of(x), weight, targets.reshape(-1).contiguous(), options,
                                    reduction == "sum", learns(x, weight))
    return loss if reduction == "sum" else loss.view(targets.shape)


# ------------------------------------------------------------------------- linear KL divergence


@triton.jit
def row_divergence(student, teacher, live, loss, N, V, stride, teacher_stride, live_stride,
                   temperature, LEARN: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr):
    # T^2 KL(p || q), p = softmax(teacher / T), q = softmax(student / T); dz = T (q - p)
    row, lane, _ = window(N, BLOCK, 1, R, BLOCK)
    counts = (row < N) & (tl.load(live + row * live_stride, row < N, 0.0) != 0)
    student += row * stride
    teacher += row * teacher_stride
    lowest = tl.full((R, 1), float("-inf"), tl.float32)
    nothing = tl.zeros((R, 1), tl.float32)
    top_q = lowest
    sum_q = nothing
    top_p = lowest
    sum_p = nothing
    for start in range(0, V, BLOCK):
        mask = counts & (start + lane < V)
        z = tl.load(student + start + lane, mask, float("-inf")).to(tl.float32) / temperature
        top_q, sum_q = online(top_q, sum_q, z)
        z = tl.load(teacher + start + lane, mask, float("-inf")).to(tl.float32) / temperature
        top_p, sum_p = online(top_p, sum_p, z)
    norm_q = tl.where(counts, top_q + tl.log(sum_q), 0.0)
    norm_p = tl.where(counts, top_p + tl.log(sum_p), 0.0)
    value = nothing
    for start in range(0, V, BLOCK):
        col = start + lane
        mask = counts & (start + lane < V)
        log_q = tl.load(student + col, mask, 0.0).to(tl.float32) / temperature - norm_q
        log_p = tl.load(teacher + col, mask, 0.0).to(tl.float32) / temperature - norm_p
        p = tl.exp(log_p)
        value += tl.sum(tl.where(mask, p * (log_p - log_q), 0.0), 1)[:, None]
        if LEARN:                       # over the student's logits, each by the thread that read it
            dz = tl.where(counts, (tl.exp(log_q) - p) * temperature, 0.0)
            tl.store(student + col, dz.to(student.dtype.element_ty), (row < N) & (col < V))
    tl.store(loss + row, value * temperature * temperature, row < N)


class LinearKL(Function):
    """Sum over rows of T^2 KL(teacher || student), of x W^T; gradients are made in the forward,
    as those of LinearCrossEntropy are. The teacher's logits have a buffer of their own."""
    @staticmethod
    def forward(ctx, x, weight, known, output, live, temperature, learn):
        learn_x, learn_w = (learn and need for need in ctx.needs_input_grad[:2])
        (N, C) = x.shape
        V = len(weight)
        w = output.to(known.dtype)
        loss = torch.empty(N, dtype=torch.float32, device=x.device)
        buffer = logits_buffer(chunk_rows(N, C, V) if N else 1, V, known)
        def rule(z, part):
            t = buffer[:len(z)]
            write_product(t, known[part], w.T)
            some = live[part] if live.stride(0) else live
            row_divergence[len(z),](
                z, t, some, loss[part], len(z), V, z.stride(0), t.stride(0), some.stride(0),
                temperature, LEARN=learn, **ROW)

        ctx.save_for_backward(*walk(x, weight, rule, learn_x, learn_w))
        ctx.dtypes = x.dtype, weight.dtype
        return loss.sum()

    @staticmethod
    def backward(ctx, grad):
        return (*(scaled(d, grad, t) for d, t in zip(ctx.saved_tensors, ctx.dtypes)), *[None] * 5)


@kernels.linear_kl.triton
def linear_kl_triton(x, weight, teacher_x, teacher_weight, *, temperature=1.0, live=None,
                     divergence="forward", beta=0.5, softcap=0.0, teacher_softcap=0.0, cut=0,
                     targets=None, alpha=0.0):
    check(x, weight, teacher_x, teacher_weight, live)
    V = len(weight)
    if (divergence, softcap, teacher_softcap) != ("forward", 0, 0) or cut not in (0, V):
        raise kernels.Unsupported("the Triton form of linear_kl knows forward KL of whole, uncapped"
                                  " logits: use --backend=auto or torch")
    expect(weight.shape[1:] == x.shape[-1:] and teacher_weight.shape[1:] == teacher_x.shape[-1:]
           and teacher_x.shape[:-1] == x.shape[:-1] and len(teacher_weight) >= V
           and (live is None or live.shape == x.shape[:-1]), "linear_kl", "x (..., C), weight "
           "(V, C), teacher_x (..., Ct), teacher_weight (V or more, Ct) and live (...)")
    if targets is not None:             # two walks, each with its kernel
        right = targets if live is None else targets.masked_fill(~live, -100)
        ce = linear_cross_entropy_triton(x, weight, right)
        kl = linear_kl_triton(x, weight, teacher_x, teacher_weight, live=live,
                              temperature=temperature)
        return alpha * ce + (1 - alpha) * kl, ce.detach(), kl.detach()
    (x,) = one_type(x)
    (known,) = one_type(teacher_x.detach())
    x = rows_of(x)
    known = rows_of(known)
    # all rows count: one number with a stride of 0
    live = x.new_ones(1).float().expand(len(x)) if live is None else live.reshape(-1).float()
    return LinearKL.apply(x, weight, known, teacher_weight[:V].detach(), live, temperature,
                          learns(x, weight))


def list_shipped() -> Iterator[tuple]:
    """Yield every configuration of the losses that can be launched."""
    for dtype in ("bf16", "fp32"):
        for cap in (False, True):
            # evaluation; the backward of a loss per row, in one type; the forward of a sum
            for smooth, known, learn in ((False, False, False), (True, False, False),
                                         (False, True, True), (False, False, True),
                                         (True, False, True)):
                yield ship(row_loss, "hlfffhiiiiiixxx", ROW, dtype, CAP=cap, SMOOTH=smooth,
                           KNOWN=known, LEARN=learn)
        for learn in (False, True):
            yield ship(row_divergence, "hhffiiiiix", ROW, dtype, LEARN=learn)
        yield ship(scale_all, "hfhi", dict(num_warps=4), dtype, BLOCK=FLAT)


SHIPPED = list(list_shipped())


if __name__ == "__main__":
    refuse_to_run()
