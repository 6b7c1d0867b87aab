"""FlashAttention-2 in Triton: causal, grouped-query, windowed, capped, within documents.

    import kernels, triton_attention            # registers the `triton` form of kernels.attention
    y = kernels.attention(q, k, v, window=128)  # on a GPU; one GPU or many, the call is the same
    TRITON_INTERPRET=1 pytest tests/backends/test_triton_attention.py     # on a CPU, interpreted

The (T, S) scores are never in memory (Dao 2023). A program owns a tile of queries and walks the
keys a tile at a time, with a running maximum m and sum l of each row; for the masked scores s,
in units that make the softmax a power of two (a GPU has exp2 in hardware):

    m' = max(m, max s)      l' = l 2^(m - m') + sum 2^(s - m')      acc' = acc 2^(m - m') + p v

Saved for the backward: q, k, v, o and L = m + log2 l, one number a row. Recomputed there are the
weights p = 2^(s - L). With delta = rowsum(do * o):

    dp = do v^T     ds = p (dp - delta)     dq = scale ds k     dk = scale ds^T q     dv = p^T do

One pass owns keys and gathers dk and dv, another owns queries and gathers dq, without atomics: a
gradient repeats bit for bit. Relative L2 to float64: 1e-5 in float32, 1e-2 in bfloat16 at most.
"""
from __future__ import annotations

import math
from typing import Iterator

from config import refuse_to_run

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function

import kernels
from kernels import Unsupported
from backends.triton_common import check, expect, one_type, rounding

MOST_D = 256                                # head_dim: a tile of more does not fit in registers
MOST_FEW, FEW_WIDE = 64, 16                 # rows of queries over a cache; the same in float32
MOST_SPLITS = 64                            # parts that the keys of a cache are cut into
LOG2E = math.log2(math.e)                   # exp(x) = exp2(x LOG2E)


# -------------------------------------------------------------------------- pieces of a kernel


@triton.jit
def load_rows(ptr, start, stride, limit, ROWS: tl.constexpr, D: tl.constexpr,
              BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """Rows start .. start + ROWS of a matrix (limit, D), as (ROWS, BLOCK_D); zeros outside."""
    r, d = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_D)[None, :]
    # the corner of the tile in 64 bits; inside it 32 are enough, in half the registers
    at = ptr + tl.cast(start, tl.int64) * stride + (r * stride + d)
    if MASKED or D != BLOCK_D:
        return tl.load(at, mask=(start + r < limit) & (d < D), other=0.0)
    return tl.load(at)


@triton.jit
def scale_scores(s, scale, softcap, CAPPED: tl.constexpr):
    """(score, tanh) with score = softcap tanh(s scale / softcap); without a cap s, unscaled."""
    if CAPPED:
        # 2 sigmoid(2x) - 1 is tanh, runs in the interpreter too, and cannot overflow
        tanh = 2 * tl.sigmoid(s * (2 * scale / softcap)) - 1
        return tanh * softcap, tanh
    return s, s


@triton.jit
def visible(s, i, j, doc_i, doc_j, window, WINDOW: tl.constexpr, DOC: tl.constexpr):
    """The scores s of queries at places i against keys j; -inf where a query may not look.

    A key past the end (j >= S) is ahead of every query, so the causal mask hides it as well.
    """
    seen = j <= i
    if WINDOW:
        seen = seen & (i - j < window)
    if DOC:
        seen = seen & (doc_i == doc_j)
    return tl.where(seen, s, float("-inf"))


@triton.jit
def kept(seed, t, j, S, p):
    """Dropout's decision for query t and key j: the same in the forward and in the backward."""
    return tl.rand(seed, t * S + j) >= p


@triton.jit
def standing(t, doc, first, positions, b, T, S, DOC: tl.constexpr, PLACED: tl.constexpr):
    """Of queries t: their places among the S keys, documents, and first keys that may matter."""
    i = S - T + t
    doc_i, start = i, i
    if DOC:     # a query's own document is that of its place at the row's end, wherever it stands
        doc_i, start = tl.load(doc + b * S + i), tl.load(first + b * S + i)
    if PLACED:
        i = tl.minimum(tl.load(positions + b * T + t).to(tl.int32), S - 1)
    return i, doc_i, start


@triton.jit
def key_range(i, first, window, begin, end, BN: tl.constexpr, WINDOW: tl.constexpr,
              DOC: tl.constexpr):
    """Keys that queries at places i meet: [lo, hi), of which [left, right) need no mask.

    Kept to [begin, end). All but hi are multiples of BN; begin must be one.
    """
    low, high = tl.min(i, 0), tl.max(i, 0)
    lo, hi = begin, tl.minimum(high + 1, end)
    left, right = lo, (low + 1) // BN * BN
    if WINDOW:
        lo = tl.maximum(lo, (low - window + 1) // BN * BN)
        left = (high - window + BN) // BN * BN              # rounded up: all rows see all of it
    if DOC:
        lo = tl.maximum(lo, tl.min(first, 0) // BN * BN)
        left, right = lo, lo                                # a border may lie in any block
    left = tl.minimum(tl.maximum(left, lo), hi)
    right = tl.minimum(tl.maximum(right, left), hi)
    return lo, left, right, hi


@triton.jit
def document_span(doc, first, last, S, BLOCK: tl.constexpr):
    """first, last (B, S) int32: keys outside of first .. last are in other documents than key n.

    Found for a block of keys at a time, from the least and the greatest number in it. So numbers
    may stand in any order, and where they grow, as packing makes them, attention costs what the
    documents cost, not what the row does.
    """
    b, n = tl.program_id(1).to(tl.int64), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    own = tl.load(doc + b * S + tl.minimum(n, S - 1))
    low, high = tl.min(own, 0), tl.max(own, 0)
    begin, end = tl.full((BLOCK,), 2 ** 30, tl.int32), tl.zeros((BLOCK,), tl.int32)
    for start in range(0, S, BLOCK):
        j = start + tl.arange(0, BLOCK)
        other = tl.load(doc + b * S + j, mask=j < S, other=0)
        same = (other >= low) & (other <= high) & (j < S)
        begin = tl.minimum(begin, tl.where(same, j, 2 ** 30))
        end = tl.maximum(end, tl.where(same, j, 0))
    here = tl.zeros((BLOCK,), tl.int32)
    tl.store(first + b * S + n, here + tl.min(begin, 0), mask=n < S)
    tl.store(last + b * S + n, here + tl.max(end, 0), mask=n < S)


# ----------------------------------------------------------------------------------- forward


@triton.jit
def attention_forward(q, k, v, o, L, doc, first, positions, seed,
                      q_b, q_h, q_t, k_b, k_h, k_s, v_b, v_h, v_s, B, H, T, S, span,
                      scale, unit, softcap, window, p_drop,
                      GROUPS: tl.constexpr, PACK: tl.constexpr, SPLIT: tl.constexpr,
                      BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
                      CAPPED: tl.constexpr, WINDOW: tl.constexpr, DOC: tl.constexpr,
                      PLACED: tl.constexpr, DROP: tl.constexpr, PRECISION: tl.constexpr):
    """o (B, T, H, D) and L (B, H, T) for a tile of BM queries of one head (PACK = 1).

    unit makes powers of two of the scores. For a few tokens over a cache PACK = GROUPS: the tile
    holds all heads that share keys, so that the cache is read once. SPLIT: a program walks `span`
    keys only, and writes part number program_id(1) of o (splits, B, T, H, D), L (splits, B, H, T).
    """
    # the last tile of a head has the most keys: begin with it, and short ones fill the gaps
    tiles, pid = tl.cdiv(T * PACK, BM), tl.program_id(0)
    tile, b = tiles - 1 - pid % tiles, (pid // tiles // (H // PACK)).to(tl.int64)
    h = (pid // tiles % (H // PACK) * PACK).to(tl.int64)
    r, d = tile * BM + tl.arange(0, BM), tl.arange(0, BLOCK_D)
    # rows past the end repeat the last query and are not stored: their loads need no mask
    t, heads = tl.minimum(r // PACK, T - 1), h + r % PACK
    at = b * q_b + heads * q_h + t.to(tl.int64) * q_t
    queries = tl.load(q + at[:, None] + d[None, :], mask=(d < D)[None, :], other=0.0)

    begin, end = 0, S
    if SPLIT:
        begin = tl.program_id(1) * span
        end = tl.minimum(begin + span, S)
    i, doc_i, start_i = standing(t, doc, first, positions, b, T, S, DOC, PLACED)
    lo, left, right, hi = key_range(i, start_i, window, begin, end, BN, WINDOW, DOC)
    k += b * k_b + h // GROUPS * k_h
    v += b * v_b + h // GROUPS * v_h
    if DROP:
        seed = tl.load(seed) + b * H + h
    m, l = tl.full((BM,), float("-inf"), tl.float32), tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, BLOCK_D), tl.float32)
    # two walks: the far edge and the diagonal, masked (0), and what every row sees whole (1)
    for part in tl.static_range(0, 1 if DOC else 2):
        for step in range(left if part else lo, right if part else hi - (right - left), BN):
            start = step if part else tl.where(step < left, step, step + (right - left))
            j = start + tl.arange(0, BN)
            keys = load_rows(k, start, k_s, S, BN, D, BLOCK_D, part == 0)
            s = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)      # (BM, BN)
            s, _ = scale_scores(s, scale, softcap, CAPPED)
            if part == 0:
                doc_j = j
                if DOC:
                    doc_j = tl.load(doc + b * S + j, mask=j < S, other=0)
                s = visible(s, i[:, None], j[None, :], doc_i[:, None], doc_j[None, :], window,
                            WINDOW, DOC)
            top = tl.maximum(m, tl.max(s, 1) * unit)
            # a row that has seen nothing yet: -inf - -inf is NaN, -inf - 0 a weight of 0
            safe = tl.where(top == float("-inf"), 0.0, top) if part == 0 else top
            p = tl.exp2(s * unit - safe[:, None])
            shrink = tl.exp2(m - safe)
            l = l * shrink + tl.sum(p, 1)
            if DROP:
                p = tl.where(kept(seed, t[:, None], j[None, :], S, p_drop), p, 0.0)
            values = load_rows(v, start, v_s, S, BN, D, BLOCK_D, part == 0)
            acc = tl.dot(p.to(values.dtype), values, acc * shrink[:, None],
                         input_precision=PRECISION)
            m = top
    empty = l == 0                                          # no key at all: the result is 0
    acc = acc / tl.where(empty, 1.0, l * (1 - p_drop))[:, None]
    # +inf makes all weights of such a row 0 in the backward, -inf its weight among splits
    m = tl.where(empty, float("-inf") if SPLIT else float("inf"),
                 m + tl.log2(tl.where(empty, 1.0, l)))
    b += tl.program_id(1).to(tl.int64) * B
    live = r < T * PACK
    tl.store(L + (b * H + heads) * T + t, m, mask=live)
    tl.store(o + (((b * T + t) * H + heads) * D)[:, None] + d[None, :],
             acc.to(o.dtype.element_ty), mask=live[:, None] & (d < D)[None, :])


@triton.jit
def attention_join(parts, L, o, H, T, rows, splits, SPLITS: tl.constexpr, D: tl.constexpr,
                   BLOCK_D: tl.constexpr):
    """One row of o (B, T, H, D) from its splits: sum 2^L o / sum 2^L, the softmax over all keys."""
    row = tl.program_id(0).to(tl.int64)                     # (b * T + t) * H + h
    h, t, b = row % H, row // H % T, row // H // T
    n, d = tl.arange(0, SPLITS), tl.arange(0, BLOCK_D)
    weight = tl.load(L + n * rows + (b * H + h) * T + t, mask=n < splits, other=float("-inf"))
    top = tl.max(weight, 0)
    weight = tl.exp2(weight - tl.where(top == float("-inf"), 0.0, top))
    part = tl.load(parts + (n * rows + row)[:, None] * D + d[None, :],
                   mask=(n < splits)[:, None] & (d < D)[None, :], other=0.0)
    total = tl.sum(weight, 0)
    y = tl.sum(part * weight[:, None], 0) / tl.where(total == 0, 1.0, total)
    tl.store(o + row * D + d, y.to(o.dtype.element_ty), mask=d < D)


# ---------------------------------------------------------------------------------- backward


@triton.jit
def attention_delta(o, do, delta, H, T, rows, BM: tl.constexpr, D: tl.constexpr,
                    BLOCK_D: tl.constexpr):
    """delta (B, H, T) = rowsum(do * o), both (B, T, H, D)."""
    r, d = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM), tl.arange(0, BLOCK_D)
    at, mask = r[:, None] * D + d[None, :], (r < rows)[:, None] & (d < D)[None, :]
    both = tl.load(o + at, mask=mask, other=0.0).to(tl.float32)
    both *= tl.load(do + at, mask=mask, other=0.0).to(tl.float32)
    h, t, b = r % H, r // H % T, r // H // T
    tl.store(delta + (b * H + h) * T + t, tl.sum(both, 1), mask=r < rows)


@triton.jit
def attention_keys(q, k, v, do, L, delta, dk, dv, doc, first, last, positions, seed,
                   q_b, q_h, q_t, k_b, k_h, k_s, v_b, v_h, v_s, H, T, S,
                   scale, unit, softcap, window, p_drop,
                   GROUPS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
                   BLOCK_D: tl.constexpr, CAPPED: tl.constexpr, WINDOW: tl.constexpr,
                   DOC: tl.constexpr, PLACED: tl.constexpr, DROP: tl.constexpr,
                   PRECISION: tl.constexpr):
    """dk, dv (B, S, Hkv, D) for BN keys of one head, from all queries of all heads that share it.

    Scores stand on their side, (BN, BM): then p^T and ds^T come out of tl.dot as they go in.
    """
    blocks, kv_heads, pid = tl.cdiv(S, BN), H // GROUPS, tl.program_id(0)
    start_j = pid % blocks * BN                             # the first keys have the most queries
    b, kv = (pid // blocks // kv_heads).to(tl.int64), (pid // blocks % kv_heads).to(tl.int64)
    j, d = start_j + tl.arange(0, BN), tl.arange(0, BLOCK_D)
    keys = load_rows(k + b * k_b + kv * k_h, start_j, k_s, S, BN, D, BLOCK_D, True)
    values = load_rows(v + b * v_b + kv * v_h, start_j, v_s, S, BN, D, BLOCK_D, True)

    # queries lo .. hi see some of these keys; left .. right are whole tiles that see all of them
    ahead = start_j - (S - T)                               # the query that stands at the first key
    lo, hi = tl.maximum(ahead, 0) // BM * BM, T
    left, right = (tl.maximum(ahead + BN - 1, 0) + BM - 1) // BM * BM, T // BM * BM
    if WINDOW:
        hi = tl.minimum(hi, tl.maximum(ahead + BN - 1 + window, 0))
        right = tl.minimum(right, tl.maximum(ahead + window, 0) // BM * BM)
    doc_j = j
    if DOC:
        doc_j = tl.load(doc + b * S + j, mask=j < S, other=0)
        end = tl.max(tl.load(last + b * S + j, mask=j < S, other=0), 0)
        hi = tl.minimum(hi, tl.maximum(end + 1 - (S - T), 0))
    if PLACED:
        lo, hi = 0, T
    if PLACED or DOC:                                       # any tile may need the mask
        right = lo
    left = tl.minimum(tl.maximum(left, lo), hi)
    right = tl.minimum(tl.maximum(right, left), hi)

    dkeys, dvalues = tl.zeros((BN, BLOCK_D), tl.float32), tl.zeros((BN, BLOCK_D), tl.float32)
    for part in tl.static_range(0, 1 if PLACED or DOC else 2):      # masked (0), whole (1)
        # the heads of the group and their tiles make one walk: two loops would hold more registers
        count = (right - left) // BM if part else tl.cdiv(hi - (right - left) - lo, BM)
        for step in range(0, GROUPS * count):
            h, start = kv * GROUPS + step // count, (step % count) * BM
            start += left if part else tl.where(lo + start < left, lo, lo + (right - left))
            t = start + tl.arange(0, BM)
            queries = load_rows(q + b * q_b + h * q_h, start, q_t, T, BM, D, BLOCK_D, part == 0)
            upstream = load_rows(do + (b * T * H + h) * D, start, H * D, T, BM, D, BLOCK_D,
                                 part == 0)
            s = tl.dot(keys, tl.trans(queries), input_precision=PRECISION)      # (BN, BM)
            s, tanh = scale_scores(s, scale, softcap, CAPPED)
            if part == 0:
                i, doc_i, _ = standing(tl.minimum(t, T - 1), doc, first, positions, b, T, S,
                                       DOC, PLACED)
                s = visible(s, i[None, :], j[:, None], doc_i[None, :], doc_j[:, None], window,
                            WINDOW, DOC)
            row = (b * H + h) * T
            # a query past the end weighs 2^-inf
            p = tl.exp2(s * unit - tl.load(L + row + t, t < T, float("inf"))[None, :])
            dp = tl.dot(values, tl.trans(upstream), input_precision=PRECISION)
            used = p
            if DROP:
                keep = kept(tl.load(seed) + b * H + h, t[None, :], j[:, None], S, p_drop)
                share = tl.where(keep, 1 / (1 - p_drop), 0.0)
                used, dp = p * share, dp * share
            dvalues = tl.dot(used.to(upstream.dtype), upstream, dvalues, input_precision=PRECISION)
            ds = p * (dp - tl.load(delta + row + t, t < T, 0.0)[None, :])
            if CAPPED:
                ds = ds * (1 - tanh * tanh)
            dkeys = tl.dot(ds.to(queries.dtype), queries, dkeys, input_precision=PRECISION)
    at = ((b * S + j) * kv_heads + kv)[:, None] * D + d[None, :]
    mask = (j < S)[:, None] & (d < D)[None, :]
    tl.store(dk + at, (dkeys * scale).to(dk.dtype.element_ty), mask=mask)
    tl.store(dv + at, dvalues.to(dv.dtype.element_ty), mask=mask)


@triton.jit
def attention_queries(q, k, v, do, L, delta, dq, doc, first, positions, seed,
                      q_b, q_h, q_t, k_b, k_h, k_s, v_b, v_h, v_s, H, T, S,
                      scale, unit, softcap, window, p_drop,
                      GROUPS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr,
                      BLOCK_D: tl.constexpr, CAPPED: tl.constexpr, WINDOW: tl.constexpr,
                      DOC: tl.constexpr, PLACED: tl.constexpr, DROP: tl.constexpr,
                      PRECISION: tl.constexpr):
    """dq (B, T, H, D) for BM queries of one head: the walk of the forward, once more."""
    tiles, pid = tl.cdiv(T, BM), tl.program_id(0)
    tile, b = tiles - 1 - pid % tiles, (pid // tiles // H).to(tl.int64)
    h = (pid // tiles % H).to(tl.int64)
    queries = load_rows(q + b * q_b + h * q_h, tile * BM, q_t, T, BM, D, BLOCK_D, True)
    upstream = load_rows(do + (b * T * H + h) * D, tile * BM, H * D, T, BM, D, BLOCK_D, True)
    r, d = tile * BM + tl.arange(0, BM), tl.arange(0, BLOCK_D)
    t = tl.minimum(r, T - 1)
    norm, rest = tl.load(L + (b * H + h) * T + t), tl.load(delta + (b * H + h) * T + t)
    i, doc_i, start_i = standing(t, doc, first, positions, b, T, S, DOC, PLACED)
    lo, left, right, hi = key_range(i, start_i, window, 0, S, BN, WINDOW, DOC)
    k += b * k_b + h // GROUPS * k_h
    v += b * v_b + h // GROUPS * v_h
    if DROP:
        seed = tl.load(seed) + b * H + h
    dqueries = tl.zeros((BM, BLOCK_D), tl.float32)
    for part in tl.static_range(0, 1 if DOC else 2):
        for step in range(left if part else lo, right if part else hi - (right - left), BN):
            start = step if part else tl.where(step < left, step, step + (right - left))
            j = start + tl.arange(0, BN)
            keys = load_rows(k, start, k_s, S, BN, D, BLOCK_D, part == 0)
            values = load_rows(v, start, v_s, S, BN, D, BLOCK_D, part == 0)
            s = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)      # (BM, BN)
            s, tanh = scale_scores(s, scale, softcap, CAPPED)
            if part == 0:
                doc_j = j
                if DOC:
                    doc_j = tl.load(doc + b * S + j, mask=j < S, other=0)
                s = visible(s, i[:, None], j[None, :], doc_i[:, None], doc_j[None, :], window,
                            WINDOW, DOC)
            p = tl.exp2(s * unit - norm[:, None])
            dp = tl.dot(upstream, tl.trans(values), input_precision=PRECISION)
            if DROP:
                keep = kept(seed, t[:, None], j[None, :], S, p_drop)
                dp = tl.where(keep, dp / (1 - p_drop), 0.0)
            ds = p * (dp - rest[:, None])
            if CAPPED:
                ds = ds * (1 - tanh * tanh)
            dqueries = tl.dot(ds.to(keys.dtype), keys, dqueries, input_precision=PRECISION)
    at = ((b * T + r) * H + h)[:, None] * D + d[None, :]
    tl.store(dq + at, (dqueries * scale).to(dq.dtype.element_ty),
             mask=(r < T)[:, None] & (d < D)[None, :])


# ---------------------------------------------------------------------------------- launching


# (BM, BN, num_warps, num_stages) for head_dims up to 64, 128 and 256: the largest tiles of which
# nothing spills on sm_80 and sm_90 and that fit in 99 KB of shared memory, which any GPU has.
# Dropout's random numbers take registers from the tiles. float32 is multiplied without tensor
# cores, in registers, and its tiles are small
HALF = {64: dict(forward=(128, 64, 8, 3), keys=(32, 64, 4, 2), queries=(128, 64, 8, 2)),
        128: dict(forward=(128, 64, 8, 2), keys=(32, 64, 8, 2), queries=(64, 32, 4, 2)),
        256: dict(forward=(64, 32, 8, 2), keys=(32, 32, 8, 1), queries=(32, 32, 4, 1))}
DROPPED = {64: dict(forward=(128, 32, 8, 3), keys=(32, 64, 4, 2), queries=(128, 32, 8, 2)),
           128: dict(forward=(64, 32, 4, 2), keys=(32, 32, 4, 2), queries=(64, 32, 8, 2)),
           256: dict(forward=(64, 16, 8, 2), keys=(32, 32, 8, 1), queries=(32, 32, 4, 1))}
FULL = {64: dict(forward=(32, 32, 8, 1), keys=(16, 32, 4, 1), queries=(16, 32, 4, 1)),
        128: dict(forward=(32, 32, 8, 1), keys=(16, 16, 4, 1), queries=(16, 16, 4, 1)),
        256: dict(forward=(16, 16, 8, 1), keys=(16, 16, 8, 1), queries=(16, 16, 8, 1))}


def tiles(step: str, D: int, wide: bool, flags: dict, few: int = 0) -> tuple[int, int, int, int]:
    """Return (BM, BN, num_warps, num_stages) of forward, keys, queries, or of `few` rows; wide:
    float32, flags: which of SWITCHES are on."""
    size = max(64, triton.next_power_of_2(D))
    if step == "few":                       # memory is what counts: tiles of keys, and many
        if wide:
            return few, 32 if size < 256 else 16, 4 if size < 256 else 8, 1
        return few, 64 if size < 256 else 32, 4 if few * size < 64 * 256 else 8, 2
    table = FULL if wide else DROPPED if flags["DROP"] else HALF
    BM, BN, warps, stages = table[size][step]
    if table is HALF and step == "queries" and 64 < D < 128:
        warps = 8           # masks take registers too: the tile stays, a thread holds half of it
    return BM, BN, warps, stages


def last_dense(x: Tensor) -> Tensor:
    """x with neighbouring features side by side; its other strides the kernels follow."""
    return x if x.stride(-1) == 1 else x.contiguous()


def strides(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, ...]:
    return *q.stride()[:3], *k.stride()[:3], *v.stride()[:3]


def prepare(q, k, doc, positions, scale, window, softcap, dropout_p) -> tuple:
    """Return what every launch needs: (constants, numbers, first, last)."""
    first = last = None
    if doc is not None:
        first, last = (torch.empty(doc.shape, dtype=torch.int32, device=q.device) for _ in "fl")
        if doc.numel():
            document_span[triton.cdiv(doc.shape[1], 256), len(doc)](
                doc, first, last, doc.shape[1], BLOCK=256)
    D = q.shape[3]
    flags = dict(GROUPS=q.shape[1] // k.shape[1], D=D, BLOCK_D=max(16, triton.next_power_of_2(D)),
                 CAPPED=softcap != 0, WINDOW=window != 0, DOC=doc is not None,
                 PLACED=positions is not None, DROP=dropout_p != 0, PRECISION=rounding(q))
    # a capped score is already scaled when it becomes a power of two
    numbers = scale, LOG2E if softcap else scale * LOG2E, softcap, window, dropout_p
    return flags, numbers, first, last


class Attention(Function):
    """The formulas of this file's head; q (B, H, T, D), k, v (B, Hkv, S, D) of any strides.

    o, dq, dk and dv lie in memory as (B, T, H, D): the model's next reshape is free.
    """
    @staticmethod
    def forward(ctx, q, k, v, doc, positions, seed, scale, window, softcap, dropout_p):
        (B, H, T, D), S = q.shape, k.shape[2]
        made = prepare(q, k, doc, positions, scale, window, softcap, dropout_p)
        flags, numbers, first, last = made
        o, L = q.new_empty(B, T, H, D), q.new_empty(B, H, T, dtype=torch.float32)
        if o.numel():
            BM, BN, warps, stages = tiles("forward", D, q.dtype == torch.float32, flags)
            attention_forward[triton.cdiv(T, BM) * B * H,](
                q, k, v, o, L, doc, first, positions, seed, *strides(q, k, v), B, H, T, S, S,
                *numbers, **flags, PACK=1, SPLIT=False, BM=BM, BN=BN, num_warps=warps,
                num_stages=stages)
        ctx.save_for_backward(q, k, v, o, L, doc, first, last, positions, seed)
        ctx.numbers, ctx.flags = numbers, flags
        return o.transpose(1, 2)

    @staticmethod
    def backward(ctx, grad):
        q, k, v, o, L, doc, first, last, positions, seed = ctx.saved_tensors
        (B, H, T, D), (Hkv, S) = q.shape, k.shape[1:3]
        do = grad.transpose(1, 2).contiguous()              # most often it lies so already
        dq, delta = torch.empty_like(o), torch.empty_like(L)
        dk, dv = (q.new_empty(B, S, Hkv, D) for _ in range(2))
        block_d, wide, shape = ctx.flags["BLOCK_D"], q.dtype == torch.float32, (H, T, S)
        if o.numel():
            attention_delta[triton.cdiv(B * T * H, 32),](
                o, do, delta, H, T, B * T * H, BM=32, D=D, BLOCK_D=block_d)
            BM, BN, warps, stages = tiles("queries", D, wide, ctx.flags)
            attention_queries[triton.cdiv(T, BM) * B * H,](
                q, k, v, do, L, delta, dq, doc, first, positions, seed, *strides(q, k, v), *shape,
                *ctx.numbers, **ctx.flags, BM=BM, BN=BN, num_warps=warps, num_stages=stages)
        if dk.numel():
            BM, BN, warps, stages = tiles("keys", D, wide, ctx.flags)
            attention_keys[triton.cdiv(S, BN) * B * Hkv,](
                q, k, v, do, L, delta, dk, dv, doc, first, last, positions, seed,
                *strides(q, k, v), *shape, *ctx.numbers, **ctx.flags, BM=BM, BN=BN,
                num_warps=warps, num_stages=stages)
        return (*(d.transpose(1, 2) for d in (dq, dk, dv)), *[None] * 7)


def attend_few(q: Tensor, k: Tensor, v: Tensor, doc, positions, scale, window, softcap) -> Tensor:
    """Attention of the newest few tokens over a long cache (Flash-Decoding, Dao 2023).

    There are too few queries to give every multiprocessor a tile, so the keys are split between
    programs; attention_join weighs the parts. Without gradients.
    """
    (B, H, T, D), (Hkv, S) = q.shape, k.shape[1:3]
    flags, numbers, first, _ = prepare(q, k, doc, positions, scale, window, softcap, 0.0)
    BM = max(16, triton.next_power_of_2(T * (H // Hkv)))
    _, BN, warps, stages = tiles("few", D, q.dtype == torch.float32, flags, BM)
    # about 512 programs, each with two tiles of keys or more
    splits = max(1, min(MOST_SPLITS, 512 // (B * Hkv), S // (2 * BN)))
    span = triton.cdiv(triton.cdiv(S, splits), BN) * BN
    splits = triton.cdiv(S, span)
    parts = q.new_empty(splits, B, T, H, D, dtype=torch.float32)
    L, o = q.new_empty(splits, B, H, T, dtype=torch.float32), q.new_empty(B, T, H, D)
    attention_forward[B * Hkv, splits](
        q, k, v, parts, L, doc, first, positions, None, *strides(q, k, v), B, H, T, S, span,
        *numbers, **flags, PACK=H // Hkv, SPLIT=True, BM=BM, BN=BN, num_warps=warps,
        num_stages=stages)
    attention_join[B * T * H,](parts, L, o, H, T, B * T * H, splits, SPLITS=MOST_SPLITS, D=D,
                               BLOCK_D=flags["BLOCK_D"])
    return o.transpose(1, 2)


@kernels.attention.triton
def attention_triton(q, k, v, *, scale=None, window=0, softcap=0.0, doc=None, positions=None,
                     dropout_p=0.0):
    check(q, k, v, doc, positions)
    (B, H, T, D), (Hkv, S) = q.shape, k.shape[1:3]
    expect(k.shape == v.shape == (B, Hkv, S, D) and H % max(1, Hkv) == 0 and T <= S
           and (doc is None or doc.shape == (B, S))
           and (positions is None or positions.shape == (B, T)), "attention",
           "q (B, H, T, D); k, v (B, Hkv, S, D), T <= S, H a multiple of Hkv; doc (B, S); "
           "positions (B, T)")
    scale = D ** -0.5 if scale is None else scale
    if D > MOST_D:
        raise Unsupported(f"attention: the Triton kernel takes a head_dim up to {MOST_D}, and this "
                        f"one is {D}; use --backend=torch")
    if scale <= 0:
        raise Unsupported(f"attention: the scale must be positive, and {scale} is not")
    q, k, v = (last_dense(x) for x in one_type(q, k, v))
    doc = None if doc is None else doc.long().contiguous()
    positions = None if positions is None else positions.long().contiguous()
    learns = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    few = T * (H // Hkv) <= (FEW_WIDE if q.dtype == torch.float32 else MOST_FEW)
    if few and q.numel() and not learns and not dropout_p:
        return attend_few(q, k, v, doc, positions, scale, window, softcap)
    # drawn on the device and read there: the backward repeats it, and nothing waits for it
    seed = torch.randint(2 ** 31, (1,), device=q.device) if dropout_p else None
    return Attention.apply(q, k, v, doc, positions, seed, scale, window, softcap, dropout_p)


# ------------------------------------------------------------------------- what can be launched


POINTERS = dict.fromkeys(("L", "delta", "parts"), "*fp32") | dict.fromkeys(
    ("doc", "positions", "seed"), "*i64") | dict.fromkeys(("first", "last"), "*i32")
NUMBERS = ("scale", "unit", "softcap", "p_drop")
ABSENT = {"doc": "DOC", "first": "DOC", "last": "DOC", "positions": "PLACED", "seed": "DROP"}
SWITCHES = ("CAPPED", "WINDOW", "DOC", "PLACED", "DROP")


def ship(function, dtype: str, warps: int, stages: int, constants: dict) -> tuple:
    """Return an entry of SHIPPED: (name, jit function, signature, constants, options)."""
    signature, constants = {}, dict(constants)
    for name in function.arg_names:
        if name in constants or not constants.get(ABSENT.get(name), True):
            signature[name] = "constexpr"
            constants.setdefault(name, None)                # a tensor that is not there
        elif name in ("q", "k", "v", "o", "do", "dq", "dk", "dv"):
            signature[name] = "*fp32" if constants.get("SPLIT") and name == "o" else "*" + dtype
        else:
            signature[name] = POINTERS.get(name, "fp32" if name in NUMBERS else "i32")
    constants = {k: v for k, v in constants.items() if k in signature}
    shown = [f"{k}={constants[k]}" for k in ("D", "BM", "BN", "SPLITS") if k in constants]
    title = " ".join([function.fn.__name__, dtype, *shown,
                      *(k for k in (*SWITCHES, "SPLIT") if constants.get(k))])
    return title, function, signature, constants, dict(num_warps=warps, num_stages=stages)


def shipped() -> Iterator[tuple]:
    """Yield the tiles of every type and size of head: plain, with a window, with what walks the
    keys twice, and with all options. Head_dims that fill no power of two add masks."""
    options = [(), ("WINDOW",), ("CAPPED", "WINDOW", "DROP"), SWITCHES]
    for dtype, precision in (("bf16", "ieee"), ("fp32", "ieee"), ("fp32", "tf32")):
        half = dtype == "bf16"
        for D in (64, 80, 128, 192, 256) if half else (64, 128, 256):
            for on in options if half else (options[0], SWITCHES):
                flags = {x: x in on for x in SWITCHES}
                base = dict(flags, GROUPS=4, D=D, BLOCK_D=triton.next_power_of_2(D),
                            PRECISION=precision)
                for step, function in (("forward", attention_forward), ("keys", attention_keys),
                                       ("queries", attention_queries)):
                    BM, BN, *launch = tiles(step, D, not half, flags)
                    yield ship(function, dtype, *launch,
                               dict(base, BM=BM, BN=BN, PACK=1, SPLIT=False))
                if on in ((), SWITCHES):
                    for few in (16, MOST_FEW) if half else (FEW_WIDE,):
                        BM, BN, *launch = tiles("few", D, not half, flags, few)
                        yield ship(attention_forward, dtype, *launch,
                                   dict(base, DROP=False, BM=BM, BN=BN, PACK=4, SPLIT=True))
    for D in (64, 256):
        sizes = dict(D=D, BLOCK_D=D)
        yield ship(attention_join, "bf16", 4, 3, dict(sizes, SPLITS=MOST_SPLITS))
        yield ship(attention_delta, "bf16", 4, 3, dict(sizes, BM=32))
    yield ship(document_span, "bf16", 4, 3, dict(BLOCK=256))


SHIPPED = list(shipped())


if __name__ == "__main__":
    refuse_to_run()
