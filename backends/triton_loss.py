"""Triton kernels around the matmuls of a model: the output layer's losses, and the experts.

    import kernels, triton_loss        # registers a `triton` form with each operation
    kernels.use("triton")               # on a GPU; one GPU or many, the calls are the same
    TRITON_INTERPRET=1 python -m pytest tests/backends/test_triton_tiles.py  # interpreted

    linear                  in triton_matmul.py: the lesson. cuBLAS is as fast, and `auto` keeps it
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

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function

from config import refuse_to_run
import kernels
from backends import triton_matmul
from backends.triton_attention import one_type, rounding
from backends.triton_matmul import (blocks, choices, even, even_rows, product, ship, sixteens,
                                    swizzle)
from backends.triton_optim import capped
from backends.triton_pointwise import (FLAT, KINDS, check, expect, online, rows_of, value_and_slope,
                                       window)

ROW = dict(R=1, BLOCK=4096, num_warps=8)        # a program of a loss walks one row of logits

# ------------------------------------------------------------------- logits, a chunk at a time
FEW_ROWS, MOST_ROWS, MOST_LOGITS = 1024, 2048, 2 ** 28

def chunk_rows(N: int, C: int, V: int) -> int:
    """Rows of logits that exist at a time, of N.

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
    """(rows, V); every row begins at a multiple of 64 elements, for V = 50257 as well: tensor
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
    """(dx, dW) of a loss on x W^T, or None for what is not asked for; dW is float32.

    rule(z, part) sees the logits z of the rows `part`, and leaves their gradient in z.
    """
    (N, C), V, w = x.shape, len(weight), weight.to(x.dtype)
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

def learns(*tensors: Tensor) -> bool:
    """subtle: needs_input_grad stays true under no_grad, and evaluation would pay three times."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)

# ----------------------------------------------------------------------- linear cross entropy
@triton.jit
def row_loss(logits, targets, loss, lse, dloss, N, V, stride, dloss_stride, ignore, softcap,
             z_loss, smooth, CAP: tl.constexpr, SMOOTH: tl.constexpr, KNOWN: tl.constexpr,
             LEARN: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr):
    # two walks along a row: loss and lse (unless KNOWN), then the gradient over the logits
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
            tl.store(at + col, dz.to(logits.dtype.element_ty), (row < N) & (col < V))

class LinearCrossEntropy(Function):
    """Loss of each row of x W^T, or their sum; x (N, C), W (V, C); options of kernels.row_losses:
        d loss / d z = p (1 + 2 z_loss lse) - (1 - e) onehot(target) - e / V

    A sum has one upstream gradient for all rows, so dx and dW are made in the forward, while the
    logits are there, and scaled in the backward. A loss per row saves lse (N,) and makes the
    logits once more in the backward.
    """
    @staticmethod
    def rows(options, targets, loss, lse, dloss, known):
        """The rule of `walk`; dloss None asks for no gradient."""
        def rule(z, part):
            N, V = z.shape
            up = loss if dloss is None else dloss[part] if dloss.stride(0) else dloss
            row_loss[N,](
                z, targets[part], loss[part], lse[part], up, N, V, z.stride(0), up.stride(0),
                *options, CAP=options[1] != 0, SMOOTH=options[3] != 0, KNOWN=known,
                LEARN=dloss is not None, **ROW)
        return rule

    @staticmethod
    def forward(ctx, x, weight, targets, options, summed, learn):
        learn_x, learn_w = (learn and need for need in ctx.needs_input_grad[:2])
        loss = torch.empty(len(x), dtype=torch.float32, device=x.device)
        lse, one = torch.empty_like(loss), torch.ones(1, device=x.device).expand(len(x) or 1)
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
            dx, dw = scaled(dx, grad, x_dtype), scaled(dw, grad, w_dtype)
        else:
            x, weight, targets, lse = ctx.saved_tensors
            rule = LinearCrossEntropy.rows(options, targets, lse, lse, grad, True)
            dx, dw = walk(x, weight, rule, learn_x, learn_w)
        return dx, dw, None, None, None, None

@kernels.linear_cross_entropy.triton
def _(x, weight, targets, *, ignore_index=-100, softcap=0.0, z_loss=0.0, label_smoothing=0.0,
      reduction="sum"):
    check(x, weight, targets)
    expect(targets.shape == x.shape[:-1] and weight.shape[1:] == x.shape[-1:],
           "linear_cross_entropy", "x (..., C), weight (V, C) and targets (...)")
    x, options = one_type(x)[0], (ignore_index, softcap, z_loss, label_smoothing)
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
    top_q, sum_q, top_p, sum_p = lowest, nothing, lowest, nothing
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
        col, mask = start + lane, counts & (start + lane < V)
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
        (N, C), V, w = x.shape, len(weight), output.to(known.dtype)
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
def _(x, weight, teacher_x, teacher_weight, *, temperature=1.0, live=None, divergence="forward",
      beta=0.5, softcap=0.0, teacher_softcap=0.0, cut=0, targets=None, alpha=0.0):
    check(x, weight, teacher_x, teacher_weight, live)
    V = len(weight)
    if (divergence, softcap, teacher_softcap) != ("forward", 0, 0) or cut not in (0, V) or (
            not teacher_weight.is_floating_point()):
        raise kernels.Unsupported("the Triton form of linear_kl knows forward KL of whole, uncapped"
                                  " logits: use --backend=auto or torch")
    expect(weight.shape[1:] == x.shape[-1:] and teacher_weight.shape[1:] == teacher_x.shape[-1:]
           and teacher_x.shape[:-1] == x.shape[:-1] and len(teacher_weight) >= V
           and (live is None or live.shape == x.shape[:-1]), "linear_kl", "x (..., C), weight "
           "(V, C), teacher_x (..., Ct), teacher_weight (V or more, Ct) and live (...)")
    if targets is not None:             # two walks, each with its kernel
        right = targets if live is None else targets.masked_fill(~live, -100)
        ce = kernels.linear_cross_entropy.forms["triton"](x, weight, right)
        kl = kernels.linear_kl.forms["triton"](x, weight, teacher_x, teacher_weight, live=live,
                                               temperature=temperature)
        return alpha * ce + (1 - alpha) * kl, ce.detach(), kl.detach()
    (x,), (known,) = one_type(x), one_type(teacher_x.detach())
    x, known = rows_of(x), rows_of(known)
    # all rows count: one number with a stride of 0
    live = x.new_ones(1).float().expand(len(x)) if live is None else live.reshape(-1).float()
    return LinearKL.apply(x, weight, known, teacher_weight[:V].detach(), live, temperature,
                          learns(x, weight))

# -------------------------------------------------------------------------- mixture of experts
EXPERTS = (64, 1024)                    # expert numbers that a program reads at once

@triton.jit
def expert_tiles(edges, table, E, tiles, BM: tl.constexpr, EXPERTS: tl.constexpr):
    """Tile number program_id(0): its expert -> table[0], its first row -> table[1].

    edges (E + 1,) int64: the rows of expert e are edges[e] .. edges[e + 1]. An expert has as many
    tiles of BM rows as it needs. The grid is an upper bound: tiles too many get expert -1.
    """
    pid, e = tl.program_id(0), tl.arange(0, EXPERTS)
    first = tl.load(edges + e, e < E, 0)
    count = (tl.load(edges + e + 1, e < E, 0) - first + BM - 1) // BM
    ends = tl.cumsum(count, 0)
    own = (ends > pid) & (ends - count <= pid)            # true for one expert, or for none
    tl.store(table + pid, tl.sum(tl.where(own, e + 1, 0), 0) - 1)
    tl.store(table + tiles + pid, tl.sum(tl.where(own, first + (pid - ends + count) * BM, 0), 0))

@triton.jit
def my_rows(table, edges, expert, m, tiles, BM: tl.constexpr):
    """Rows r (BM,) of tile m among the sorted, and which of them are the expert's."""
    r = tl.load(table + tiles + m) + tl.arange(0, BM)
    return r, r < tl.load(edges + expert + 1)

@triton.jit
def moe_hidden(x, token, gate, up, g, u, h, table, edges, tiles, I, C, stride, KEEP: tl.constexpr,
               KIND: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
               GROUP: tl.constexpr, PRECISION: tl.constexpr):
    # h (R, I) = act(g) u, g = x gate_e^T, u = x up_e^T: rows of x come straight from where they lie
    I, C, stride = sixteens(I), sixteens(C), sixteens(stride)
    m, n = swizzle(tl.program_id(0), tiles, tl.cdiv(I, BN), GROUP)
    expert = tl.load(table + m)
    if expert < 0:
        return
    r, live = my_rows(table, edges, expert, m, tiles, BM)
    here = tl.load(token + r, live, 0)[:, None]
    live, col, k = live[:, None], (n * BN + tl.arange(0, BN))[None, :], tl.arange(0, BK)
    x += here * stride + k[None, :]
    corner = (expert * I + col) * C + k[:, None]          # int64, as the table is
    gate += corner
    up += corner
    one, two = tl.zeros((BM, BN), tl.float32), tl.zeros((BM, BN), tl.float32)
    for start in range(0, C, BK):                         # one read of x serves both
        inside = start + k < C
        mask = (col < I) & inside[:, None]
        rows = tl.load(x + start, live & inside[None, :], 0.0)
        one = tl.dot(rows, tl.load(gate + start, mask, 0.0), one, input_precision=PRECISION)
        two = tl.dot(rows, tl.load(up + start, mask, 0.0), two, input_precision=PRECISION)
    at, mask = r[:, None] * I + col, live & (col < I)
    if KEEP:                                              # for the backward
        tl.store(g + at, one.to(g.dtype.element_ty), mask)
        tl.store(u + at, two.to(u.dtype.element_ty), mask)
    value, _ = value_and_slope(one, KIND)
    tl.store(h + at, (value * two).to(h.dtype.element_ty), mask)

@triton.jit
def moe_rows(a, a2, w, w2, y, order, share, table, edges, tiles, N, K,
             PAIR: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
             GROUP: tl.constexpr, PRECISION: tl.constexpr):
    # y[order[r]] (N,) = share a[r] W_e^T, the forward's last product, W (E, N, K); PAIR, for dx:
    # a[r] W_e + a2[r] W2_e, both (E, K, N). The sum over a token's choices is the caller's
    N, K = sixteens(N), sixteens(K)
    if PAIR:
        w_k, w_n = N, 1
    else:
        w_k, w_n = 1, K
    m, n = swizzle(tl.program_id(0), tiles, tl.cdiv(N, BN), GROUP)
    expert = tl.load(table + m)
    if expert < 0:
        return
    r, live = my_rows(table, edges, expert, m, tiles, BM)
    home = tl.load(order + r, live, 0)[:, None]
    r, live, col = r[:, None], live[:, None], (n * BN + tl.arange(0, BN))[None, :]
    corner = expert * N * K + col.to(tl.int64) * w_n
    total = tl.zeros((BM, BN), tl.float32)
    total = product(total, a + r * K, live, 1, w + corner, col < N, w_k, K, BK, PRECISION)
    if PAIR:
        total = product(total, a2 + r * K, live, 1, w2 + corner, col < N, w_k, K, BK, PRECISION)
    else:
        total *= tl.load(share + home, live, 0.0).to(tl.float32)
    tl.store(y + home * N + col, total.to(y.dtype.element_ty), live & (col < N))

@triton.jit
def moe_hidden_backward(dy, token, down, g, u, dg, du, h, order, share, dshare, table, edges, tiles,
                        I, C, stride, KIND: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                        BK: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr):
    # with t = dy down_e: dshare = sum h t (this tile's part), du = share t act(g),
    # dg = share t u act'(g); h is made again and left times its share, for the gradient of down
    I, C, stride = sixteens(I), sixteens(C), sixteens(stride)
    m, n = swizzle(tl.program_id(0), tiles, tl.cdiv(I, BN), GROUP)
    expert = tl.load(table + m)
    if expert < 0:
        return
    r, live = my_rows(table, edges, expert, m, tiles, BM)
    here = tl.load(token + r, live, 0)[:, None]
    home = tl.load(order + r, live, 0)[:, None]
    r, live, col = r[:, None], live[:, None], (n * BN + tl.arange(0, BN))[None, :]
    t = tl.zeros((BM, BN), tl.float32)
    t = product(t, dy + here * stride, live, 1, down + expert * C * I + col, col < I, I, C, BK,
                PRECISION)
    at, mask = r * I + col, live & (col < I)
    weight = tl.load(share + home, live, 0.0).to(tl.float32)
    value, slope = value_and_slope(tl.load(g + at, mask, 0.0).to(tl.float32), KIND)
    linear = tl.load(u + at, mask, 0.0).to(tl.float32)
    part = tl.sum(tl.where(mask, value * linear * t, 0.0), 1)[:, None]
    tl.store(dshare + home * tl.cdiv(I, BN) + n, part, live)
    t *= weight
    tl.store(h + at, (weight * value * linear).to(h.dtype.element_ty), mask)
    tl.store(du + at, (t * value).to(du.dtype.element_ty), mask)
    tl.store(dg + at, (t * linear * slope).to(dg.dtype.element_ty), mask)

@triton.jit
def moe_weights(a, b, token, dw, edges, M, N, a_stride, b_stride, LEFT: tl.constexpr,
                BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
                PRECISION: tl.constexpr):
    # dW_e (M, N) = sum over the rows r of expert e of a[r]^T b[token[r]]; LEFT: a[token[r]]^T b[r].
    # An expert without rows gets the zeros that the sum begins with
    M, N, a_stride, b_stride = sixteens(M), sixteens(N), sixteens(a_stride), sixteens(b_stride)
    tiles = tl.cdiv(M, BM) * tl.cdiv(N, BN)
    expert = (tl.program_id(0) // tiles).to(tl.int64)
    m, n = swizzle(tl.program_id(0) % tiles, tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP)
    row, col = (m * BM + tl.arange(0, BM))[:, None], (n * BN + tl.arange(0, BN))[None, :]
    first, last = tl.load(edges + expert), tl.load(edges + expert + 1)
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, (last - first).to(tl.int32), BK):
        r = first + start + tl.arange(0, BK)
        here = tl.load(token + r, r < last, 0)
        at_a, at_b = (here, r) if LEFT else (r, here)
        left = tl.load(a + at_a[None, :] * a_stride + row, (r < last)[None, :] & (row < M), 0.0)
        right = tl.load(b + at_b[:, None] * b_stride + col, (r < last)[:, None] & (col < N), 0.0)
        total = tl.dot(left, right, total, input_precision=PRECISION)
    at = (expert * M + row) * N + col
    tl.store(dw + at, total.to(dw.dtype.element_ty), (row < M) & (col < N))

class MoE(Function):
    """y = sum_j share_j down_e(act(gate_e x) * up_e x), e = chosen_j; shapes as in kernels.moe.

    Rows (token, choice) are sorted by expert, R = N k of them, and a tile of a product never has
    rows of two experts. Saves x, g = gate x and u = up x (R, I); h = act(g) u is made again.
    """
    @staticmethod
    def plan(chosen, E, BM):
        """(order, token, edges, table, tiles): what a sorted row is, and which expert's a tile."""
        ordered, order = chosen.reshape(-1).sort(stable=True)
        edges = torch.searchsorted(ordered, torch.arange(E + 1, device=chosen.device))
        R = len(order)
        tiles = R // BM + min(E, R)     # each expert's last tile may be ragged
        table = torch.empty(2, tiles, dtype=torch.int64, device=chosen.device)
        size = next(n for n in EXPERTS if n >= E)
        expert_tiles[tiles,](edges, table, E, tiles, BM=BM, EXPERTS=size, num_warps=4)
        return order, order // chosen.shape[1], edges, table, tiles

    @staticmethod
    def forward(ctx, x, chosen, share, gate, up, down, kind, learn):
        (N, C), k, (E, I, _) = x.shape, chosen.shape[1], gate.shape
        R, wide, share = N * k, x.dtype == torch.float32, share.contiguous()
        launch = blocks(R // E, wide)
        pair = dict(blocks(R // E, wide, 2), BM=launch["BM"])
        plan = order, token, edges, table, tiles = MoE.plan(chosen, E, launch["BM"])
        gates, ups, downs = (w.to(x.dtype).contiguous() for w in (gate, up, down))
        h = x.new_empty(R, I)
        g, u = (torch.empty_like(h) if learn else h for _ in "gu")
        moe_hidden[tiles * triton.cdiv(I, pair["BN"]),](
            x, token, gates, ups, g, u, h, table, edges, tiles, I, C, x.stride(0), KEEP=learn,
            KIND=kind, PRECISION=rounding(x), **pair)
        y = x.new_empty(R, C)
        moe_rows[tiles * triton.cdiv(C, launch["BN"]),](
            h, h, downs, downs, y, order, share, table, edges, tiles, C, I, PAIR=False,
            PRECISION=rounding(x), **launch)
        ctx.save_for_backward(x, share, gate, up, down, g, u, *plan[:4])
        ctx.rest = (tiles, k, kind)
        return y.view(N, k, C).sum(1)

    @staticmethod
    def backward(ctx, dy):
        x, share, gate, up, down, g, u, order, token, edges, table = ctx.saved_tensors
        (tiles, k, kind), (N, C), (E, I, _), dy = ctx.rest, x.shape, gate.shape, even_rows(dy)
        R, wide, precision = N * k, x.dtype == torch.float32, rounding(x)
        launch = blocks(R // E, wide)
        pair = dict(blocks(R // E, wide, 2), BM=launch["BM"])
        gates, ups, downs = (w.to(x.dtype).contiguous() for w in (gate, up, down))
        dg, du, h = (torch.empty_like(g) for _ in "guh")
        parts = triton.cdiv(I, pair["BN"])
        dshare = torch.empty(R, parts, dtype=torch.float32, device=x.device)
        moe_hidden_backward[tiles * parts,](
            dy, token, downs, g, u, dg, du, h, order, share, dshare, table, edges, tiles, I, C,
            dy.stride(0), KIND=kind, PRECISION=precision, **pair)
        dx = x.new_empty(R, C)
        moe_rows[tiles * triton.cdiv(C, launch["BN"]),](
            dg, du, gates, ups, dx, order, share, table, edges, tiles, C, I, PAIR=True,
            PRECISION=precision, **launch)
        launch = dict(blocks(I, wide), PRECISION=precision)
        BM, BN = launch["BM"], launch["BN"]
        dweights = []
        for a, b, w in ((dg, x, gate), (du, x, up), (dy, h, down)):
            M, columns = w.shape[1:]
            dweights.append(torch.empty(w.shape, dtype=w.dtype, device=w.device))
            moe_weights[E * triton.cdiv(M, BM) * triton.cdiv(columns, BN),](
                a, b, token, dweights[-1], edges, M, columns, a.stride(0), b.stride(0),
                LEFT=w is down, **launch)
        return (dx.view(N, k, C).sum(1), None, dshare.sum(1).view(share.shape), *dweights, None,
                None)

@kernels.moe.triton
def _(x, chosen, share, gate, up, down, activation="silu"):
    check(x, chosen, share, gate, up, down)
    E, I, C = gate.shape
    expect(x.shape[1:] == (C,) and chosen.shape == share.shape and len(chosen) == len(x)
           and up.shape == gate.shape and down.shape == (E, C, I), "moe",
           "x (N, C), chosen and share (N, k), gate and up (E, I, C), down (E, C, I)")
    if activation not in KINDS or E > EXPERTS[-1] or not chosen.numel():
        return kernels.moe.forms["torch"](x, chosen, share, gate, up, down, activation)
    # the number of an expert that does not exist makes its token NaN: loud, and no wild read
    share = share.masked_fill((chosen < 0) | (chosen >= E), float("nan"))
    # features of zeros change nothing: act(0) 0 is 0 for every activation
    x, gate, up, down = even(one_type(x)[0]), even(gate, 2), even(up, 2), even(down, 2)
    y = MoE.apply(even_rows(x), chosen.clamp(0, E - 1), share, gate, up, down, KINDS[activation],
                  learns(x, share, gate, up, down))
    return y[:, :C]

# ------------------------------------------------------------------------- what can be launched
def shipped() -> Iterator[tuple]:
    """Every tile of every type; every activation with the largest tile, and silu with the others.
    Gradients of weights are float32, as master weights are."""
    for dtype, rows, launch, pair in choices():
        for kind in sorted(set(KINDS.values())) if rows == 4096 else ("silu",):
            for keep in (False, True):
                yield ship(moe_hidden, dtype, "hlhhhhhlliiii", pair, KEEP=keep, KIND=kind)
            yield ship(moe_hidden_backward, dtype, "hlhhhhhhlfflliiii", pair, KIND=kind)
        for flag in (False, True):
            yield ship(moe_rows, dtype, "hhhhhlflliii", launch, PAIR=flag)
            yield ship(moe_weights, dtype, "hhlfliiii", launch, LEFT=flag)
    for dtype in ("bf16", "fp32"):
        for cap in (False, True):
            # evaluation; the backward of a loss per row; the forward of a sum
            for smooth, known, learn in ((False, False, False), (False, True, True),
                                         (False, False, True), (True, False, True)):
                yield ship(row_loss, dtype, "hlfffiiiiixxx", ROW, CAP=cap, SMOOTH=smooth,
                           KNOWN=known, LEARN=learn)
        for learn in (False, True):
            yield ship(row_divergence, dtype, "hhffiiiiix", ROW, LEARN=learn)
        yield ship(scale_all, dtype, "hfhi", dict(num_warps=4), BLOCK=FLAT)
    for size in EXPERTS:
        yield ship(expert_tiles, "int64", "llii", dict(num_warps=4), BM=64, EXPERTS=size)

SHIPPED = triton_matmul.SHIPPED + list(shipped())

if __name__ == "__main__":
    refuse_to_run()
