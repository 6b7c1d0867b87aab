"""Mixture of experts in Triton: each expert multiplies the rows that chose it, in tiles.

Tokens are sorted by expert; a table says which tile of rows belongs to which expert, so that one
launch covers all of them, however uneven the load. No token is dropped (MegaBlocks, Gale 2022).
tests/backends/test_triton_tiles.py holds it against float64 autograd.
"""
from __future__ import annotations

from typing import Iterator

from config import refuse_to_run

import torch
import triton
import triton.language as tl
from torch.autograd import Function

import kernels
from backends.triton_common import (KINDS, check, expect, learns, one_type, rounding, ship,
                                    value_and_slope)
from backends.triton_matmul import blocks, choices, even, even_rows, product, sixteens, swizzle


EXPERTS = (64, 1024)                    # expert numbers that a program reads at once


@triton.jit
def expert_tiles(edges, table, E, tiles, BM: tl.constexpr, EXPERTS: tl.constexpr):
    """Tile number program_id(0): its expert -> table[0], its first row -> table[1].

    edges (E + 1,) int64: the rows of expert e are edges[e] .. edges[e + 1]. An expert has as many
    tiles of BM rows as it needs. The grid is an upper bound: tiles too many get expert -1.
    """
    pid = tl.program_id(0)
    e = tl.arange(0, EXPERTS)
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
    I = sixteens(I)
    C = sixteens(C)
    stride = sixteens(stride)
    m, n = swizzle(tl.program_id(0), tiles, tl.cdiv(I, BN), GROUP)
    expert = tl.load(table + m)
    if expert < 0:
        return
    r, live = my_rows(table, edges, expert, m, tiles, BM)
    here = tl.load(token + r, live, 0)[:, None]
    live = live[:, None]
    col = (n * BN + tl.arange(0, BN))[None, :]
    k = tl.arange(0, BK)
    x += here * stride + k[None, :]
    corner = (expert * I + col) * C + k[:, None]          # int64, as the table is
    gate += corner
    up += corner
    one = tl.zeros((BM, BN), tl.float32)
    two = tl.zeros((BM, BN), tl.float32)
    for start in range(0, C, BK):                         # one read of x serves both
        inside = start + k < C
        mask = (col < I) & inside[:, None]
        rows = tl.load(x + start, live & inside[None, :], 0.0)
        one = tl.dot(rows, tl.load(gate + start, mask, 0.0), one, input_precision=PRECISION)
        two = tl.dot(rows, tl.load(up + start, mask, 0.0), two, input_precision=PRECISION)
    at = r[:, None] * I + col
    mask = live & (col < I)
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
    N = sixteens(N)
    K = sixteens(K)
    if PAIR:
        w_k = N
        w_n = 1
    else:
        w_k = 1
        w_n = K
    m, n = swizzle(tl.program_id(0), tiles, tl.cdiv(N, BN), GROUP)
    expert = tl.load(table + m)
    if expert < 0:
        return
    r, live = my_rows(table, edges, expert, m, tiles, BM)
    home = tl.load(order + r, live, 0)[:, None]
    r = r[:, None]
    live = live[:, None]
    col = (n * BN + tl.arange(0, BN))[None, :]
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
    I = sixteens(I)
    C = sixteens(C)
    stride = sixteens(stride)
    m, n = swizzle(tl.program_id(0), tiles, tl.cdiv(I, BN), GROUP)
    expert = tl.load(table + m)
    if expert < 0:
        return
    r, live = my_rows(table, edges, expert, m, tiles, BM)
    here = tl.load(token + r, live, 0)[:, None]
    home = tl.load(order + r, live, 0)[:, None]
    r = r[:, None]
    live = live[:, None]
    col = (n * BN + tl.arange(0, BN))[None, :]
    t = tl.zeros((BM, BN), tl.float32)
    t = product(t, dy + here * stride, live, 1, down + expert * C * I + col, col < I, I, C, BK,
                PRECISION)
    at = r * I + col
    mask = live & (col < I)
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
    M = sixteens(M)
    N = sixteens(N)
    a_stride = sixteens(a_stride)
    b_stride = sixteens(b_stride)
    tiles = tl.cdiv(M, BM) * tl.cdiv(N, BN)
    expert = (tl.program_id(0) // tiles).to(tl.int64)
    m, n = swizzle(tl.program_id(0) % tiles, tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP)
    row = (m * BM + tl.arange(0, BM))[:, None]
    col = (n * BN + tl.arange(0, BN))[None, :]
    first = tl.load(edges + expert)
    last = tl.load(edges + expert + 1)
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
        """Return (order, token, edges, table, tiles): what a sorted row is, and which expert's a
        tile."""
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
        (N, C) = x.shape
        k = chosen.shape[1]
        (E, I, _) = gate.shape
        R = N * k
        wide = x.dtype == torch.float32
        share = share.contiguous()
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
        (tiles, k, kind) = ctx.rest
        (N, C) = x.shape
        (E, I, _) = gate.shape
        dy = even_rows(dy)
        R = N * k
        wide = x.dtype == torch.float32
        precision = rounding(x)
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
        BM = launch["BM"]
        BN = launch["BN"]
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
def moe_triton(x, chosen, share, gate, up, down, activation="silu"):
    check(x, chosen, share, gate, up, down)
    E, I, C = gate.shape
    expect(x.shape[1:] == (C,) and chosen.shape == share.shape and len(chosen) == len(x)
           and up.shape == gate.shape and down.shape == (E, C, I), "moe",
           "x (N, C), chosen and share (N, k), gate and up (E, I, C), down (E, C, I)")
    if activation not in KINDS or E > EXPERTS[-1] or not chosen.numel():
        return kernels.moe.implementations["torch"](x, chosen, share, gate, up, down, activation)
    # the number of an expert that does not exist makes its token NaN: loud, and no wild read
    share = share.masked_fill((chosen < 0) | (chosen >= E), float("nan"))
    # features of zeros change nothing: act(0) 0 is 0 for every activation
    x = even(one_type(x)[0])
    gate = even(gate, 2)
    up = even(up, 2)
    down = even(down, 2)
    y = MoE.apply(even_rows(x), chosen.clamp(0, E - 1), share, gate, up, down, KINDS[activation],
                  learns(x, share, gate, up, down))
    return y[:, :C]


def list_shipped() -> Iterator[tuple]:
    """Yield every tile of every type; every activation with the largest tile, silu with the others.
    Gradients of weights are float32, as master weights are."""
    for dtype, rows, launch, pair in choices():
        for kind in sorted(set(KINDS.values())) if rows == 4096 else ("silu",):
            for keep in (False, True):
                yield ship(moe_hidden, "hlhhhhhlliiii", pair, dtype, KEEP=keep, KIND=kind)
            yield ship(moe_hidden_backward, "hlhhhhhhlfflliiii", pair, dtype, KIND=kind)
        for flag in (False, True):
            yield ship(moe_rows, "hhhhhlflliii", launch, dtype, PAIR=flag)
            yield ship(moe_weights, "hhlfliiii", launch, dtype, LEFT=flag)
    for size in EXPERTS:
        yield ship(expert_tiles, "llii", dict(num_warps=4), "int64", BM=64, EXPERTS=size)


SHIPPED = list(list_shipped())


if __name__ == "__main__":
    refuse_to_run()
