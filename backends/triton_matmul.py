"""A tiled matmul in Triton, to be read, and the pieces that the experts of triton_moe.py share.

    import kernels, triton_loss        # registers the `triton` form of kernels.linear, and others
    kernels.use("triton")               # by name alone: `auto` keeps cuBLAS, which is as fast
    TRITON_INTERPRET=1 python -m pytest tests/backends/test_triton_tiles.py  # interpreted

y = x W^T + b and its gradients dx = dy W, dW = dy^T x are one kernel: a program owns a tile of the
result, walks the dimension that is summed, and keeps the sum in registers, in float32. What makes
it fast is what it does not read: a tile of BM by BN reads BM + BN rows for BM BN sums. To expect:
relative L2 against float64 autograd at most 1e-5 in float32, 1e-3 in float16, 1e-2 in bfloat16.
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
from backends.triton_common import check, expect, one_type, rounding, rows_of, ship

GROUP = 8                               # tiles that a band of the grid is high: see swizzle


# ------------------------------------------------------------------------- pieces of a matmul


def even(x: Tensor, dims: int = 1) -> Tensor:
    """x with its last dimensions padded by zeros to multiples of 16, which real models' are.

    The kernels count on it (`sixteens`): element by element, as rows of an odd length have to be
    read, a tile would take more registers than there are.
    """
    pads = [pad for n in x.shape[::-1][:dims] for pad in (0, -n % 16)]
    return torch.constant_pad_nd(x, pads) if any(pads) else x


def even_rows(x: Tensor) -> Tensor:
    """x (..., C) as (rows, C), whose rows begin at multiples of 16 elements."""
    x = rows_of(x)
    return x if x.stride(0) % 16 == 0 else x.contiguous()


def blocks(rows: int, wide: bool, accumulators: int = 1) -> dict[str, int]:
    """Return tile sizes and launch options of a product with this many rows; wide: float32.

    The largest of which nothing spills on sm_80 and sm_90, in 99 KB of shared memory. float32 is
    multiplied without tensor cores, in registers, and its tiles are small.
    """
    if wide:
        BM = 32 if rows > 16 else 16
        BN = 64 // accumulators
        BK = 16
        warps = 8
        stages = 2
    else:
        BM = 128 if rows > 128 else 64 if rows > 16 else 16
        BN = 128 // accumulators
        BK = 64
        warps = 8 if BM == 128 else 4
        stages = 3
    return dict(BM=BM, BN=BN, BK=BK, GROUP=GROUP, num_warps=warps, num_stages=stages)


@triton.jit
def sixteens(n):
    """n itself, a width or a stride; but now the compiler knows that it is a multiple of 16."""
    return n // 16 * 16


@triton.jit
def swizzle(pid, m_tiles, n_tiles, GROUP: tl.constexpr):
    """Tile (m, n) of program pid: down a band GROUP tiles high, then the next column of it.

    Programs that run at the same time then share rows of one factor and columns of the other, and
    find them in the L2 cache.
    """
    band = pid // (GROUP * n_tiles)
    inside = pid % (GROUP * n_tiles)
    height = tl.minimum(m_tiles - band * GROUP, GROUP)
    return band * GROUP + inside % height, inside // height


@triton.jit
def product(total, a, a_live, a_k, b, b_live, b_k, K, BK: tl.constexpr, PRECISION: tl.constexpr):
    """total + A B for one tile: a (BM, 1) points at the rows of A, b (1, BN) at the columns of B;
    neighbours along K are a_k and b_k elements apart."""
    k = tl.arange(0, BK)
    # the pointers walk, since an offset from the start may pass 2^31
    a = a + k[None, :] * a_k
    b = b + k[:, None] * b_k
    for start in range(0, K, BK):
        inside = start + k < K
        left = tl.load(a, a_live & inside[None, :], 0.0)
        right = tl.load(b, b_live & inside[:, None], 0.0)
        total = tl.dot(left, right, total, input_precision=PRECISION)
        a += BK * a_k
        b += BK * b_k
    return total


# ------------------------------------------------------------------------------------ linear


@triton.jit
def matmul_tile(a, b, bias, y, M, N, K, a_stride, b_stride, BIAS: tl.constexpr,
                A_T: tl.constexpr, B_T: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
                BK: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr):
    # a program owns one tile of y and walks K: each element of y is written once.
    # a (M, K) lies row by row or, A_T, column by column, and so does b (K, N)
    N = sixteens(N)
    a_stride = sixteens(a_stride)
    b_stride = sixteens(b_stride)
    if A_T:
        M = sixteens(M)
        a_m = 1
        a_k = a_stride
    else:
        K = sixteens(K)
        a_m = a_stride
        a_k = 1
    if B_T:
        b_k = 1
        b_n = b_stride
    else:
        b_k = b_stride
        b_n = 1
    m, n = swizzle(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN), GROUP)
    row = (m.to(tl.int64) * BM + tl.arange(0, BM))[:, None]
    col = (n.to(tl.int64) * BN + tl.arange(0, BN))[None, :]
    total = tl.zeros((BM, BN), tl.float32)
    total = product(total, a + row * a_m, row < M, a_k, b + col * b_n, col < N, b_k, K, BK,
                    PRECISION)
    if BIAS:
        total += tl.load(bias + col, col < N, 0.0).to(tl.float32)
    tl.store(y + row * N + col, total.to(y.dtype.element_ty), (row < M) & (col < N))


def matmul(a: Tensor, b: Tensor, dtype: torch.dtype, bias: Tensor | None = None,
           a_t: bool = False, b_t: bool = False) -> Tensor:
    """a (M, K) times b (K, N), plus bias (N,), in that type; a_t: a is given as (K, M)."""
    (M, K) = a.shape[::-1] if a_t else a.shape
    N = b.shape[0 if b_t else 1]
    y = torch.empty(M, N, dtype=dtype, device=a.device)
    launch = blocks(M, a.dtype == torch.float32)
    if y.numel():
        matmul_tile[triton.cdiv(M, launch["BM"]) * triton.cdiv(N, launch["BN"]),](
            a, b, bias, y, M, N, K, a.stride(0), b.stride(0), BIAS=bias is not None, A_T=a_t,
            B_T=b_t, PRECISION=rounding(a), **launch)
    return y


class Linear(Function):
    """y = x W^T + b; x (M, K), W (N, K). Saves x and W: dx = dy W, dW = dy^T x, db = sum dy."""
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        ctx.biased = bias is not None
        return matmul(x, even_rows(weight.to(x.dtype)), x.dtype, bias, b_t=True)

    @staticmethod
    def backward(ctx, dy):
        (x, weight) = ctx.saved_tensors
        dy = even_rows(dy)
        # one kernel for the three: nothing is transposed in memory
        return (matmul(dy, even_rows(weight.to(x.dtype)), x.dtype),
                matmul(dy, x, weight.dtype, a_t=True),
                dy.sum(0, dtype=torch.float32) if ctx.biased else None)


@kernels.linear.triton
def linear_triton(x, weight, bias=None):
    check(x, weight, bias)
    expect(weight.ndim == 2 and weight.shape[1] == x.shape[-1] and
           (bias is None or bias.shape == weight.shape[:1]), "linear",
           "x (..., K), weight (N, K) and bias (N,)")
    x = one_type(x)[0]
    bias = None if bias is None else even(bias).contiguous()
    y = Linear.apply(even_rows(even(x)), even(weight, 2), bias)
    return y[:, :len(weight)].view(*x.shape[:-1], len(weight))


# ------------------------------------------------------------------------- what can be launched


def choices() -> Iterator[tuple[str, int, dict, dict]]:
    """Yield (type, rows, launch, launch with two accumulators) of every tile that `blocks`
    chooses."""
    for dtype, precision in (("bf16", "ieee"), ("fp32", "ieee"), ("fp32", "tf32")):
        wide = dtype == "fp32"
        for rows in (4096, 16) if wide else (4096, 64, 16):
            one, two = ({"PRECISION": precision} | blocks(rows, wide, n) for n in (1, 2))
            yield dtype, rows, one, two


def list_shipped() -> Iterator[tuple]:
    """y = x W^T + b, dx = dy W, dW = dy^T x; gradients of weights are float32, as masters are."""
    for dtype, _, launch, _ in choices():
        yield ship(matmul_tile, "hhhhiiiii", launch, dtype, BIAS=True, A_T=False, B_T=True)
        yield ship(matmul_tile, "hh0hiiiii", launch, dtype, BIAS=False, A_T=False, B_T=False)
        yield ship(matmul_tile, "hh0fiiiii", launch, dtype, BIAS=False, A_T=True, B_T=False)

SHIPPED = list(list_shipped())


if __name__ == "__main__":
    refuse_to_run()
