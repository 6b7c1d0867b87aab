"""Triton kernels that walk rows: the operations that memory, not arithmetic, holds up.

An operation here reads each row of a matrix once, keeps it in registers in float32, and writes the
result once. What bounds it is the bytes: a norm of M tokens by C features in bfloat16 cannot be
done in less than 4MC bytes forward and 6MC backward, so every kernel below is arranged around
what it need not read or write.

    import kernels                           # loads this file where there is a GPU
    kernels.use("triton")
    TRITON_INTERPRET=1 pytest tests/backends/test_triton_rows.py     # without a GPU

How to read one: a program takes a tile of R rows by BLOCK columns (`tile`); lanes beyond the end
are masked. Offsets are int64, so tensors may pass 2^31 elements. Statistics and sums are float32.
Nothing here reads a value back to the host. SHIPPED lists what can be launched, for the test that
compiles it. tests/backends/test_triton_rows.py holds all of it against float64 autograd.
"""
from __future__ import annotations

from typing import Iterator

from config import refuse_to_run

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function

import kernels
from backends.triton_common import (FLAT, KINDS, LOOP_SIZES, NORM_SIZES, check, expect, online,
                                    rows_of, ship, tile, value_and_slope, window)
from kernels import Unsupported

RUN = 32                                # sorted tokens per program of embedding_backward


# -------------------------------------------------------------------------------- embedding


@triton.jit
def embedding_forward(ids, weight, y, N, V, C, blocks, R: tl.constexpr, BLOCK: tl.constexpr):
    # rows of the result in order, rows of the table wherever the ids point
    row, col, mask = window(N, C, blocks, R, BLOCK)
    token = tl.load(ids + row, row < N, 0).to(tl.int64)
    # a row that the table lacks is NaN: loud in the loss, where a wild read would be silent
    known = (token >= 0) & (token < V)
    value = tl.load(weight + token * C + col, mask & known, float("nan"))
    tl.store(y + row * C + col, value, mask)


@triton.jit
def embedding_backward(dy, order, ids, dweight, N, V, C, stride, RUN: tl.constexpr,
                       BLOCK: tl.constexpr):
    # tokens come sorted by id. A program walks RUN of them and adds the sum of each run of one id
    # to dweight: a frequent token costs one atomic in RUN, not one an occurrence
    first = tl.program_id(0) * RUN
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in range(first, tl.minimum(first + RUN, N)):
        token = tl.load(ids + i).to(tl.int64)
        row = tl.load(order + i)                          # int64
        total += tl.load(dy + row * stride + col, col < C, 0.0).to(tl.float32)
        after = tl.load(ids + i + 1, i + 1 < tl.minimum(first + RUN, N), -1)
        if after != token:
            if (token >= 0) & (token < V):
                tl.atomic_add(dweight + token * C + col, total, col < C)
            total = tl.zeros((BLOCK,), tl.float32)


class Embedding(Function):
    """y = W[ids]: reads only the rows asked for. dW[v] = the sum of dy over the places of v."""
    @staticmethod
    def forward(ctx, ids, weight):
        (V, C) = weight.shape
        N = ids.numel()
        weight = weight.contiguous()
        R, block, warps = tile(C, LOOP_SIZES)
        blocks = triton.cdiv(C, block)
        y = weight.new_empty(*ids.shape, C)
        ids = ids.reshape(-1).contiguous()
        embedding_forward[(triton.cdiv(N, R) * blocks,)](
            ids, weight, y, N, V, C, blocks, R=R, BLOCK=block, num_warps=warps)
        ctx.save_for_backward(ids)
        ctx.shape = (V, C)
        return y

    @staticmethod
    def backward(ctx, dy):
        (ids,) = ctx.saved_tensors
        (V, C) = ctx.shape
        dy = rows_of(dy)
        (ids, order) = ids.sort(stable=True)
        dweight = torch.zeros(V, C, dtype=torch.float32, device=dy.device)
        grid = triton.cdiv(len(ids), RUN), triton.cdiv(C, FLAT)
        embedding_backward[grid](dy, order, ids, dweight, len(ids), V, C, dy.stride(0),
                                 RUN=RUN, BLOCK=FLAT, num_warps=4)
        return None, dweight                      # autograd casts it to the type of the weight


@kernels.embedding.triton
def embedding_triton(ids, weight):
    check(ids, weight)
    return Embedding.apply(ids, weight)


# --------------------------------------------------------------------------------- position


@triton.jit
def rope_turn(x, cos, sin, y, N, T, H, half, D, xb, xt, xh, cb, ct, sb, st, sign,
              PAIRS: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr):
    # a row is one head of one token; the heads of a token find its cos and sin in the cache
    row = tl.program_id(0) * R + tl.arange(0, R)
    token = row // H
    col = tl.arange(0, BLOCK)[None, :]
    b = (token // T).to(tl.int64)
    t = (token % T).to(tl.int64)
    h = (row % H).to(tl.int64)
    live = (row < N)[:, None]
    mask = live & (col < half)
    c = tl.load(cos + (b * cb + t * ct)[:, None] + col, mask, 0.0).to(tl.float32)
    s = tl.load(sin + (b * sb + t * st)[:, None] + col, mask, 0.0).to(tl.float32) * sign
    x += (b * xb + t * xt + h * xh)[:, None]
    y += (row.to(tl.int64) * D)[:, None]
    # pairs are (i, i + half), or neighbours (2i, 2i + 1)
    first = 2 * col if PAIRS else col
    second = first + 1 if PAIRS else first + half
    one = tl.load(x + first, mask, 0.0).to(tl.float32)
    two = tl.load(x + second, mask, 0.0).to(tl.float32)
    tl.store(y + first, (one * c - two * s).to(y.dtype.element_ty), mask)
    tl.store(y + second, (two * c + one * s).to(y.dtype.element_ty), mask)
    for start in range(2 * half, D, BLOCK):               # features that do not turn
        inside = live & (start + col < D)
        tl.store(y + start + col, tl.load(x + start + col, inside), inside)


class Rope(Function):
    """Pairs of features turned by position times frequency (Su 2021); shapes as in kernels.rope.

    x may be a slice of the joined q, k, v: its strides are followed, and y comes out dense.
    Saves cos and sin alone: backward is the rotation by the opposite angle.
    """
    @staticmethod
    def turn(x, cos, sin, interleaved, sign):
        (B, T, H, D) = x.shape
        half = cos.shape[-1]
        x = x if x.stride(3) == 1 else x.contiguous()
        y = torch.empty(B, T, H, D, dtype=x.dtype, device=x.device)
        # one table for all rows of the batch is a stride of 0
        cos, sin = (z.contiguous().expand(B, T, half) for z in (cos, sin))
        R, block, warps = tile(2 * half, NORM_SIZES)
        rope_turn[(triton.cdiv(B * T * H, R),)](
            x, cos, sin, y, B * T * H, T, H, half, D, *x.stride()[:3], *cos.stride()[:2],
            *sin.stride()[:2], sign, PAIRS=interleaved, R=R, BLOCK=block // 2, num_warps=warps)
        return y

    @staticmethod
    def forward(ctx, x, cos, sin, interleaved):
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        return Rope.turn(x, cos, sin, interleaved, 1.0)

    @staticmethod
    def backward(ctx, dy):
        return Rope.turn(dy, *ctx.saved_tensors, ctx.interleaved, -1.0), None, None, None


@kernels.rope.triton
def rope_triton(x, cos, sin, interleaved=False):
    cos = cos.float()
    sin = sin.float()
    check(x, cos, sin)
    expect(x.ndim == 4 and cos.shape == sin.shape and cos.shape[-2] == x.shape[1] and
           2 * cos.shape[-1] <= x.shape[3] and (cos.ndim == 2 or len(cos) in (1, len(x))),
           "rope", "x (B, T, H, D); cos, sin (T, R/2) or (B, T, R/2) with R <= D")
    return Rope.apply(x, cos, sin, interleaved)


# ------------------------------------------------------------------------------ activations


@triton.jit
def glu_forward(gate, up, y, N, C, blocks, gate_stride, up_stride, KIND: tl.constexpr,
                GATED: tl.constexpr, BLOCK: tl.constexpr):
    row, col, mask = window(N, C, blocks, 1, BLOCK)
    x = tl.load(gate + row * gate_stride + col, mask, 0.0).to(tl.float32)
    out, _ = value_and_slope(x, KIND)
    if GATED:
        out *= tl.load(up + row * up_stride + col, mask, 0.0).to(tl.float32)
    tl.store(y + row * C + col, out.to(y.dtype.element_ty), mask)


@triton.jit
def glu_backward(dy, gate, up, dgate, dup, N, C, blocks, dy_stride, gate_stride, up_stride,
                 KIND: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr):
    # reads dy, gate and up, writes two gradients: 10 bytes an element in bfloat16, the floor
    row, col, mask = window(N, C, blocks, 1, BLOCK)
    grad = tl.load(dy + row * dy_stride + col, mask, 0.0).to(tl.float32)
    x = tl.load(gate + row * gate_stride + col, mask, 0.0).to(tl.float32)
    out, slope = value_and_slope(x, KIND)
    if GATED:
        tl.store(dup + row * C + col, (grad * out).to(dup.dtype.element_ty), mask)
        grad *= tl.load(up + row * up_stride + col, mask, 0.0).to(tl.float32)
    tl.store(dgate + row * C + col, (grad * slope).to(dgate.dtype.element_ty), mask)


class Glu(Function):
    """y = act(gate) up, or act(gate) where up is None (Shazeer 2020). Shapes (..., N).

    Saves its inputs alone; the activation is recomputed: d up = dy act, d gate = dy up act'.
    gate and up may be the halves of one matmul's output: their strides are followed.
    """
    @staticmethod
    def matrices(*tensors):
        """As (rows, cols); all dense ones as one long row, whose last block alone is ragged."""
        if all(t.is_contiguous() for t in tensors):
            return [t.view(1, -1) for t in tensors]
        return [rows_of(t) for t in tensors]

    @staticmethod
    def forward(ctx, gate, up, kind):
        gated = up is not None
        up = gate if up is None else up
        ctx.save_for_backward(gate, up)
        ctx.kind = kind
        ctx.gated = gated
        y = torch.empty(gate.shape, device=gate.device,
                        dtype=torch.promote_types(gate.dtype, up.dtype))
        gate, up = Glu.matrices(gate, up)
        (N, C) = gate.shape
        blocks = triton.cdiv(gate.shape[1], FLAT)
        glu_forward[(N * blocks,)](gate, up, y, N, C, blocks, gate.stride(0), up.stride(0),
                                   KIND=kind, GATED=gated, BLOCK=FLAT, num_warps=4)
        return y

    @staticmethod
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        dup = torch.empty(up.shape, dtype=up.dtype, device=up.device) if ctx.gated else dgate
        dy, gate, up = Glu.matrices(dy, gate, up)
        (N, C) = gate.shape
        blocks = triton.cdiv(gate.shape[1], FLAT)
        glu_backward[(N * blocks,)](
            dy, gate, up, dgate, dup, N, C, blocks, dy.stride(0), gate.stride(0), up.stride(0),
            KIND=ctx.kind, GATED=ctx.gated, BLOCK=FLAT, num_warps=4)
        return dgate, dup if ctx.gated else None, None


def activation(x: Tensor, kind: str) -> Tensor:
    check(x)
    return Glu.apply(x, None, kind)

kernels.gelu.triton(lambda x, approximate="none": activation(
    x, "tanh" if approximate == "tanh" else "gelu"))
kernels.silu.triton(lambda x: activation(x, "silu"))
kernels.relu.triton(lambda x: activation(x, "relu"))
kernels.relu2.triton(lambda x: activation(x, "relu2"))


@kernels.glu.triton
def glu_triton(gate, up, activation="silu"):
    check(gate, up)
    expect(gate.shape == up.shape, "glu", "gate and up of one shape")
    if activation not in KINDS:
        raise Unsupported(f"glu has no Triton kernel for {activation!r}: choose {', '.join(KINDS)}")
    return Glu.apply(gate, up, KINDS[activation])


# ---------------------------------------------------------------------------------- dropout


@triton.jit
def dropout_all(x, y, seed, n, p, scale, BLOCK: tl.constexpr):
    # Philox gives four draws for the price of one: each serves a block of its own
    pid = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    draws = tl.randint4x(tl.load(seed), pid * BLOCK + lane)
    for i in tl.static_range(4):
        col = (4 * pid + i) * BLOCK + lane
        value = tl.load(x + col, col < n, 0.0).to(tl.float32)
        # 24 bits of the draw as a number in [0, 1), which is never below p = 0
        chance = (draws[i].to(tl.uint32, bitcast=True) >> 8).to(tl.float32) * (1 / 16777216)
        out = tl.where(chance >= p, value * scale, 0.0)
        tl.store(y + col, out.to(y.dtype.element_ty), col < n)


class Dropout(Function):
    """y = x keep / (1 - p). The mask is a function of a seed: saved is the seed, eight bytes.

    The seed comes from PyTorch's generator and stays on the device, so manual_seed repeats a run
    and activation checkpointing, which restores the generator, draws the same mask again.
    """
    @staticmethod
    def apply_mask(x, seed, p):
        x = x.contiguous()
        y = torch.empty_like(x)
        dropout_all[(triton.cdiv(x.numel(), 4 * FLAT),)](
            x, y, seed, x.numel(), p, 1 / (1 - p) if p < 1 else 0.0, BLOCK=FLAT, num_warps=4)
        return y

    @staticmethod
    def forward(ctx, x, p):
        seed = torch.randint(2 ** 62, (1,), dtype=torch.int64, device=x.device)
        ctx.save_for_backward(seed)
        ctx.p = p
        return Dropout.apply_mask(x, seed, p)

    @staticmethod
    def backward(ctx, dy):
        return Dropout.apply_mask(dy, ctx.saved_tensors[0], ctx.p), None


@kernels.dropout.triton
def dropout_triton(x, p):
    check(x)
    return Dropout.apply(x, float(p))


# ---------------------------------------------------------------------------------- softmax


@triton.jit
def softmax_forward(x, y, N, C, stride, R: tl.constexpr, BLOCK: tl.constexpr):
    row, lane, _ = window(N, BLOCK, 1, R, BLOCK)
    top = tl.full((R, 1), float("-inf"), tl.float32)
    total = tl.zeros((R, 1), tl.float32)
    for start in range(0, C, BLOCK):
        col = start + lane
        mask = (row < N) & (start + lane < C)
        z = tl.load(x + row * stride + col, mask, float("-inf")).to(tl.float32)
        top, total = online(top, total, z)
    for start in range(0, C, BLOCK):                      # a row of one block is still in the cache
        col = start + lane
        mask = (row < N) & (start + lane < C)
        z = tl.load(x + row * stride + col, mask, float("-inf")).to(tl.float32)
        tl.store(y + row * C + col, (tl.exp(z - top) / total).to(y.dtype.element_ty), mask)


@triton.jit
def softmax_backward(dy, y, dx, N, C, stride, R: tl.constexpr, BLOCK: tl.constexpr):
    row, lane, _ = window(N, BLOCK, 1, R, BLOCK)
    inner = tl.zeros((R, 1), tl.float32)                  # sum y dy
    for start in range(0, C, BLOCK):
        col = start + lane
        mask = (row < N) & (start + lane < C)
        p = tl.load(y + row * C + col, mask, 0.0).to(tl.float32)
        inner += tl.sum(p * tl.load(dy + row * stride + col, mask, 0.0).to(tl.float32), 1)[:, None]
    for start in range(0, C, BLOCK):
        col = start + lane
        mask = (row < N) & (start + lane < C)
        p = tl.load(y + row * C + col, mask, 0.0).to(tl.float32)
        grad = tl.load(dy + row * stride + col, mask, 0.0).to(tl.float32)
        tl.store(dx + row * C + col, (p * (grad - inner)).to(dx.dtype.element_ty), mask)


class Softmax(Function):
    """y = exp(x - max) / sum exp(x - max) along rows (..., C). Saves y: dx = y (dy - sum y dy)."""
    @staticmethod
    def forward(ctx, x):
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        x = rows_of(x)
        (N, C) = x.shape
        (R, block, warps) = tile(x.shape[1], LOOP_SIZES)
        softmax_forward[(triton.cdiv(N, R),)](x, y, N, C, x.stride(0), R=R, BLOCK=block,
                                              num_warps=warps)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, dy):
        y, = ctx.saved_tensors
        dx = torch.empty_like(y)
        dy = rows_of(dy)
        (N, C) = dy.shape
        (R, block, warps) = tile(dy.shape[1], LOOP_SIZES)
        softmax_backward[(triton.cdiv(N, R),)](dy, y, dx, N, C, dy.stride(0), R=R, BLOCK=block,
                                               num_warps=warps)
        return dx


@kernels.softmax.triton
def softmax_triton(x):
    check(x)
    return Softmax.apply(x)


# ------------------------------------------------------------------------- what can be launched


def list_shipped() -> Iterator[tuple]:
    """Yield every configuration that can be launched, in bfloat16 with float32 weights."""
    for width in (size for size in NORM_SIZES if size <= 512):       # a head_dim
        R, block, warps = tile(width, NORM_SIZES)
        for pairs in (False, True):
            yield ship(rope_turn, "bffb" + "i" * 12 + "x", dict(num_warps=warps), PAIRS=pairs, R=R,
                       BLOCK=block // 2)
    for kind in sorted(set(KINDS.values())):
        for gated in (False, True):
            flags = dict(KIND=kind, GATED=gated, BLOCK=FLAT)
            yield ship(glu_forward, "bbbiiiii", dict(num_warps=4), **flags)
            yield ship(glu_backward, "bbbbbiiiiii", dict(num_warps=4), **flags)
    for width in LOOP_SIZES:
        R, block, warps = tile(width, LOOP_SIZES)
        launch = dict(R=R, BLOCK=block, num_warps=warps)
        yield ship(embedding_forward, "lffiiii", launch)
        yield ship(softmax_forward, "bbiii", launch)
        yield ship(softmax_backward, "bbbiii", launch)
    yield ship(embedding_backward, "bllfiiii", dict(num_warps=4), RUN=RUN, BLOCK=FLAT)
    yield ship(dropout_all, "bblixx", dict(num_warps=4), BLOCK=FLAT)


SHIPPED = list(list_shipped())


if __name__ == "__main__":
    refuse_to_run()
