"""RMSNorm and LayerNorm in Triton: a row is read once, kept in registers, and written once.

A norm of M tokens by C features in bfloat16 cannot be done in less than 4MC bytes forward and 6MC
backward; the kernels here are arranged around what they need not read or write.
tests/backends/test_triton_rows.py holds them against float64 autograd.
"""
from __future__ import annotations

from typing import Iterator

from config import refuse_to_run

import torch
import triton
import triton.language as tl
from torch.autograd import Function

import kernels
from backends.triton_common import (NORM_SIZES, check, expect, programs, rows_of, ship, tile,
                                    window)
from kernels import Unsupported


@triton.jit
def norm_forward(x, weight, bias, y, mean, rstd, N, C, x_stride, eps, offset,
                 CENTRE: tl.constexpr, BIAS: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr):
    # a whole row sits in registers, so the statistics need no second read
    row, col, mask = window(N, C, 1, R, BLOCK)
    value = tl.load(x + row * x_stride + col, mask, 0.0).to(tl.float32)
    if CENTRE:
        centre = tl.sum(value, 1)[:, None] / C
        tl.store(mean + row, centre, row < N)
        value = tl.where(mask, value - centre, 0.0)       # masked lanes are not -mean
    # the mean of squares after centring: one pass over registers costs nothing and cancels nothing
    scale = tl.rsqrt(tl.sum(value * value, 1)[:, None] / C + eps)
    tl.store(rstd + row, scale, row < N)
    out = value * scale * (tl.load(weight + col, col < C, 0.0).to(tl.float32) + offset)
    if BIAS:
        out += tl.load(bias + col, col < C, 0.0).to(tl.float32)
    tl.store(y + row * C + col, out.to(y.dtype.element_ty), mask)


@triton.jit
def norm_backward(dy, x, weight, mean, rstd, dx, dweight, dbias, N, C, dy_stride, x_stride, offset,
                  CENTRE: tl.constexpr, BIAS: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr):
    col = tl.arange(0, BLOCK)[None, :]
    w = tl.load(weight + col, col < C, 0.0).to(tl.float32) + offset
    # few programs stride over all rows and keep their share of dw and db in registers: what is
    # left to add up is one row a program, not one a token
    dw = tl.zeros((R, BLOCK), tl.float32)
    db = tl.zeros((R, BLOCK), tl.float32)
    for i in range(tl.program_id(0), tl.cdiv(N, R), tl.num_programs(0)):
        row = (i * R + tl.arange(0, R)).to(tl.int64)[:, None]
        mask = (row < N) & (col < C)
        grad = tl.load(dy + row * dy_stride + col, mask, 0.0).to(tl.float32)
        n = tl.load(x + row * x_stride + col, mask, 0.0).to(tl.float32)
        scale = tl.load(rstd + row, row < N, 0.0)
        if CENTRE:
            n -= tl.load(mean + row, row < N, 0.0)
        n *= scale                                        # recomputed: reading it would cost 2MC
        dw += grad * n
        if BIAS:
            db += grad
        dn = grad * w
        inner = dn - n * (tl.sum(dn * n, 1)[:, None] / C)
        if CENTRE:
            inner -= tl.sum(dn, 1)[:, None] / C
        out = inner * scale
        tl.store(dx + row * C + col, out.to(dx.dtype.element_ty), mask)
    place = tl.program_id(0) * C + col
    tl.store(dweight + place, tl.sum(dw, 0)[None, :], col < C)
    if BIAS:
        tl.store(dbias + place, tl.sum(db, 0)[None, :], col < C)


class Norm(Function):
    """y = n (offset + w) + b with n = (x - mean) rstd (Ba 2016); no mean, no b: Zhang 2019.

    x (..., C). Saves x, and rstd and mean, one float32 per row; n is recomputed. With
    dn = dy (offset + w):
        dx = rstd (dn - n mean(dn n) - mean(dn)),  dw = sum dy n,  db = sum dy
    """
    @staticmethod
    def forward(ctx, x, weight, bias, eps, offset, centre):
        flat = rows_of(x)
        N, C = flat.shape
        if C > NORM_SIZES[-1]:
            raise Unsupported(f"the Triton norms hold a row of up to {NORM_SIZES[-1]} features, "
                              f"not {C}: use --backend=torch")
        R, block, warps = tile(C, NORM_SIZES)
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        rstd = torch.empty(N, dtype=torch.float32, device=x.device)
        mean = torch.empty_like(rstd) if centre else rstd
        weight = weight.contiguous()
        norm_forward[(triton.cdiv(N, R),)](
            flat, weight, weight if bias is None else bias.contiguous(), y, mean, rstd, N, C,
            flat.stride(0), eps, offset, CENTRE=centre, BIAS=bias is not None, R=R, BLOCK=block,
            num_warps=warps)
        ctx.save_for_backward(flat, weight, mean, rstd)
        ctx.rest = (x.shape, offset, centre, bias is not None)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, weight, mean, rstd = ctx.saved_tensors
        shape, offset, centre, biased = ctx.rest
        x = rows_of(x)
        dy = rows_of(grad)
        N, C = x.shape
        R, block, warps = tile(C, NORM_SIZES)
        dx = torch.empty(shape, dtype=x.dtype, device=x.device)
        P = programs(x, warps, triton.cdiv(N, R))
        dweight = torch.empty(P, C, dtype=torch.float32, device=x.device)
        dbias = torch.empty_like(dweight) if biased else dweight
        norm_backward[(P,)](
            dy, x, weight, mean, rstd, dx, dweight, dbias, N, C, dy.stride(0), x.stride(0), offset,
            CENTRE=centre, BIAS=biased, R=R, BLOCK=block, num_warps=warps)
        return dx, dweight.sum(0), dbias.sum(0) if biased else None, None, None, None


@kernels.rms_norm.triton
def rms_norm_triton(x, weight, eps=1e-6, offset=0.0):
    check(x, weight)
    expect(weight.shape == x.shape[-1:], "rms_norm", "x (..., C) and weight (C,)")
    return Norm.apply(x, weight, None, eps, offset, False)


@kernels.layer_norm.triton
def layer_norm_triton(x, weight, bias=None, eps=1e-5):
    check(x, weight, bias)
    expect(weight.shape == x.shape[-1:] and (bias is None or bias.shape == weight.shape),
           "layer_norm", "x (..., C), weight (C,) and bias (C,)")
    return Norm.apply(x, weight, bias, eps, 0.0, True)


def list_shipped() -> Iterator[tuple]:
    """Yield every configuration that can be launched, in bfloat16 with float32 weights."""
    for width in NORM_SIZES:
        R, block, warps = tile(width, NORM_SIZES)
        launch = dict(R=R, BLOCK=block, num_warps=warps)
        for centre, bias in ((False, False), (True, False), (True, True)):
            flags = dict(CENTRE=centre, BIAS=bias)
            yield ship(norm_forward, "bffbffiiixx", launch, **flags)
            yield ship(norm_backward, "bbfffbffiiiix", launch, **flags)


SHIPPED = list(list_shipped())


if __name__ == "__main__":
    refuse_to_run()
