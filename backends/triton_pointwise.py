"""Triton kernels that walk rows: the operations that memory, not arithmetic, holds up.

An operation here reads each row of a matrix once, keeps it in registers in float32, and writes the
result once. What bounds it is the bytes: a norm of M tokens by C features in bfloat16 cannot be
done in less than 4MC bytes forward and 6MC backward, so every kernel below is arranged around
what it need not read or write.

    import kernels, triton_pointwise         # registers a `triton` form with each operation
    kernels.use("triton")
    TRITON_INTERPRET=1 pytest tests/backends/test_triton_rows.py     # without a GPU

How to read one: a program takes a tile of R rows by BLOCK columns (`tile`); lanes beyond the end
are masked. Offsets are int64, so tensors may pass 2^31 elements. Statistics and sums are float32.
Nothing here reads a value back to the host. SHIPPED lists what can be launched, for the test that
compiles it. tests/backends/test_triton_rows.py holds all of it against float64 autograd.
"""
from typing import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd import Function

import kernels
from config import UserError, refuse_to_run
from kernels import Unsupported

# ---------------------------------------------------------------------------- how to launch
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
NORM_SIZES = tuple(2 ** n for n in range(7, 14))    # a norm holds whole rows: 128 to 8192
LOOP_SIZES = (128, 1024, 4096)                      # what walks a row in blocks needs no more
FLAT = 1024                                         # elementwise: one 16-byte load a thread
RUN = 32                                            # sorted tokens a program of embedding_backward

def tile(cols: int, sizes: Sequence[int]) -> tuple[int, int, int]:
    """(R, BLOCK, num_warps) for rows of `cols`: 2048 elements a program or one row, 16 a thread.

    A row of 128 alone would leave a program with nothing to hide memory's latency behind.
    """
    block = next((s for s in sizes if s >= cols), sizes[-1])
    rows = max(1, 2048 // block)
    return rows, block, rows * block // 512

def check(*tensors: Tensor | None) -> None:
    """UserError where a kernel would read wrong numbers or another device's memory."""
    for x in tensors:
        if x is None:
            continue
        if x.is_floating_point() and x.dtype not in FLOATS:
            raise Unsupported(f"the Triton kernels compute in float32, float16 and bfloat16, not "
                              f"{x.dtype}: convert the tensor, or use --backend=reference")
        if not x.is_cuda and not INTERPRETED:
            raise UserError(f"the Triton kernels need a GPU, and a tensor is on {x.device}: move "
                            "it there, or use --backend=torch")
        # Triton launches on the current device, and PyTorch follows the tensor: a trap
        if x.is_cuda and x.device.index != torch.cuda.current_device():
            raise UserError(f"a tensor is on {x.device} and the current device is "
                            f"{torch.cuda.current_device()}: call torch.cuda.set_device first")

def expect(fits: bool, operation: str, shapes: str) -> None:
    """UserError unless the shapes fit: a kernel would read past the end of what is too small."""
    if not fits:
        raise UserError(f"{operation}: the shapes do not fit; it takes {shapes}")

def rows_of(x: Tensor) -> Tensor:
    """x as (rows, cols) with neighbouring columns: a view where the memory allows, else a copy."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()

def programs(x: Tensor, warps: int, most: int) -> int:
    """How many programs share a sum over rows: 16 warps a multiprocessor keep memory busy."""
    cores = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    return min(most, cores * max(1, 16 // warps))

@triton.jit
def window(rows, cols, blocks, R: tl.constexpr, BLOCK: tl.constexpr):
    """This program's tile of a (rows, cols) matrix: row numbers (R, 1), column numbers (1, BLOCK)
    and which are inside. Tiles are numbered along the row, `blocks` to each."""
    pid = tl.program_id(0).to(tl.int64)                   # int64 from the first: see the head
    row = (pid // blocks * R + tl.arange(0, R))[:, None]
    col = (pid % blocks * BLOCK + tl.arange(0, BLOCK))[None, :]
    return row, col, (row < rows) & (col < cols)

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
    first, col = tl.program_id(0) * RUN, tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
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
        (V, C), N, weight = weight.shape, ids.numel(), weight.contiguous()
        R, block, warps = tile(C, LOOP_SIZES)
        blocks, y = triton.cdiv(C, block), weight.new_empty(*ids.shape, C)
        ids = ids.reshape(-1).contiguous()
        embedding_forward[(triton.cdiv(N, R) * blocks,)](
            ids, weight, y, N, V, C, blocks, R=R, BLOCK=block, num_warps=warps)
        ctx.save_for_backward(ids)
        ctx.shape = (V, C)
        return y

    @staticmethod
    def backward(ctx, dy):
        (ids,), (V, C) = ctx.saved_tensors, ctx.shape
        dy, (ids, order) = rows_of(dy), ids.sort(stable=True)
        dweight = torch.zeros(V, C, dtype=torch.float32, device=dy.device)
        grid = triton.cdiv(len(ids), RUN), triton.cdiv(C, FLAT)
        embedding_backward[grid](dy, order, ids, dweight, len(ids), V, C, dy.stride(0),
                                 RUN=RUN, BLOCK=FLAT, num_warps=4)
        return None, dweight                      # autograd casts it to the type of the weight

@kernels.embedding.triton
def _(ids, weight):
    check(ids, weight)
    return Embedding.apply(ids, weight)

# ---------------------------------------------------------------------------- normalisation
@triton.jit
def norm_forward(x, branch, weight, bias, s, y, mean, rstd, N, C, x_stride, branch_stride, eps,
                 offset, CENTRE: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr,
                 R: tl.constexpr, BLOCK: tl.constexpr):
    # a whole row sits in registers, so the statistics need no second read
    row, col, mask = window(N, C, 1, R, BLOCK)
    value = tl.load(x + row * x_stride + col, mask, 0.0).to(tl.float32)
    if ADD:
        value += tl.load(branch + row * branch_stride + col, mask, 0.0).to(tl.float32)
        rounded = value.to(s.dtype.element_ty)
        tl.store(s + row * C + col, rounded, mask)
        value = rounded.to(tl.float32)                    # what is normed is the sum as stored
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
def norm_backward(dy, ds, x, weight, mean, rstd, dx, dweight, dbias, N, C, dy_stride, ds_stride,
                  x_stride, offset, CENTRE: tl.constexpr, BIAS: tl.constexpr, ADD: tl.constexpr,
                  R: tl.constexpr, BLOCK: tl.constexpr):
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
        if ADD:
            out += tl.load(ds + row * ds_stride + col, mask, 0.0).to(tl.float32)
        tl.store(dx + row * C + col, out.to(dx.dtype.element_ty), mask)
    place = tl.program_id(0) * C + col
    tl.store(dweight + place, tl.sum(dw, 0)[None, :], col < C)
    if BIAS:
        tl.store(dbias + place, tl.sum(db, 0)[None, :], col < C)

class Norm(Function):
    """y = n (offset + w) + b with n = (x - mean) rstd (Ba 2016); no mean, no b: Zhang 2019.

    x (..., C); with a branch of that shape, x + branch is stored and normed: returns both.
    Saves x (or the sum) and rstd, mean float32 a row; n is recomputed. With dn = dy (offset + w):
        dx = rstd (dn - n mean(dn n) - mean(dn)),  dw = sum dy n,  db = sum dy
    """
    @staticmethod
    def forward(ctx, x, branch, weight, bias, eps, offset, centre):
        C, flat, add = x.shape[-1], rows_of(x), branch is not None
        if C > NORM_SIZES[-1]:
            raise Unsupported(f"the Triton norms hold a row of up to {NORM_SIZES[-1]} features, "
                              f"not {C}: use --backend=torch")
        R, block, warps = tile(C, NORM_SIZES)
        kind = torch.promote_types(x.dtype, branch.dtype) if add else x.dtype
        s = torch.empty(x.shape, dtype=kind, device=x.device) if add else flat
        y = torch.empty(x.shape, dtype=kind, device=x.device)
        other, N = rows_of(branch) if add else flat, flat.shape[0]
        rstd = torch.empty(N, dtype=torch.float32, device=x.device)
        mean = torch.empty_like(rstd) if centre else rstd
        weight = weight.contiguous()
        norm_forward[(triton.cdiv(N, R),)](
            flat, other, weight, weight if bias is None else bias.contiguous(), s, y, mean, rstd,
            N, C, flat.stride(0), other.stride(0), eps, offset, CENTRE=centre,
            BIAS=bias is not None, ADD=add, R=R, BLOCK=block, num_warps=warps)
        ctx.save_for_backward(s if add else flat, weight, mean, rstd)
        ctx.rest = (x.shape, offset, centre, bias is not None, add)
        return (s, y) if add else y

    @staticmethod
    def backward(ctx, *grads):
        (x, weight, mean, rstd), (shape, offset, centre, biased, add) = ctx.saved_tensors, ctx.rest
        x, dy, ds = rows_of(x), rows_of(grads[-1]), rows_of(grads[0])
        (N, C), (R, block, warps) = x.shape, tile(x.shape[1], NORM_SIZES)
        dx = torch.empty(shape, dtype=x.dtype, device=x.device)
        P = programs(x, warps, triton.cdiv(N, R))
        dweight = torch.empty(P, C, dtype=torch.float32, device=x.device)
        dbias = torch.empty_like(dweight) if biased else dweight
        norm_backward[(P,)](
            dy, ds, x, weight, mean, rstd, dx, dweight, dbias, N, C, dy.stride(0), ds.stride(0),
            x.stride(0), offset, CENTRE=centre, BIAS=biased, ADD=add, R=R, BLOCK=block,
            num_warps=warps)
        return (dx, dx if add else None, dweight.sum(0), dbias.sum(0) if biased else None,
                None, None, None)

@kernels.rms_norm.triton
def _(x, weight, eps=1e-6, offset=0.0):
    check(x, weight)
    expect(weight.shape == x.shape[-1:], "rms_norm", "x (..., C) and weight (C,)")
    return Norm.apply(x, None, weight, None, eps, offset, False)

@kernels.layer_norm.triton
def _(x, weight, bias=None, eps=1e-5):
    check(x, weight, bias)
    expect(weight.shape == x.shape[-1:] and (bias is None or bias.shape == weight.shape),
           "layer_norm", "x (..., C), weight (C,) and bias (C,)")
    return Norm.apply(x, None, weight, bias, eps, 0.0, True)

@kernels.operation
def add_rms_norm(x: Tensor, branch: Tensor, weight: Tensor, eps: float = 1e-6,
                 offset: float = 0.0) -> tuple[Tensor, Tensor]:
    """(x + branch, rms_norm of that): the end of one branch of a block and the start of the next.

    x, branch (..., C). As one kernel the sum is written once and not read again.
    """
    s = x + branch
    return s, kernels.rms_norm(s, weight, eps, offset)

@add_rms_norm.triton
def _(x, branch, weight, eps=1e-6, offset=0.0):
    check(x, branch, weight)
    expect(branch.shape == x.shape and weight.shape == x.shape[-1:], "add_rms_norm",
           "x (..., C), branch (..., C) and weight (C,)")
    return Norm.apply(x, branch, weight, None, eps, offset, False)

# --------------------------------------------------------------------------------- position
@triton.jit
def rope_turn(x, cos, sin, y, N, T, H, half, D, xb, xt, xh, cb, ct, sb, st, sign,
              PAIRS: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr):
    # a row is one head of one token; the heads of a token find its cos and sin in the cache
    row = tl.program_id(0) * R + tl.arange(0, R)
    token, col = row // H, tl.arange(0, BLOCK)[None, :]
    b, t, h = (token // T).to(tl.int64), (token % T).to(tl.int64), (row % H).to(tl.int64)
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
        (B, T, H, D), half = x.shape, cos.shape[-1]
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
def _(x, cos, sin, interleaved=False):
    cos, sin = cos.float(), sin.float()
    check(x, cos, sin)
    expect(x.ndim == 4 and cos.shape == sin.shape and cos.shape[-2] == x.shape[1] and
           2 * cos.shape[-1] <= x.shape[3] and (cos.ndim == 2 or len(cos) in (1, len(x))),
           "rope", "x (B, T, H, D); cos, sin (T, R/2) or (B, T, R/2) with R <= D")
    return Rope.apply(x, cos, sin, interleaved)

# ------------------------------------------------------------------------------ activations
# the names that a config.json may ask for, and the kernel's own
KINDS = {"gelu": "gelu", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "silu": "silu",
         "relu": "relu", "relu2": "relu2"}

@triton.jit
def value_and_slope(x, KIND: tl.constexpr):
    """act(x) and its derivative, float32. What a caller does not use, the compiler drops."""
    if KIND == "gelu":                                    # x Phi(x);  Phi + x phi
        phi = 0.5 + 0.5 * tl.math.erf(x * 0.7071067811865476)
        return x * phi, phi + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif KIND == "tanh":
        # (1 + tanh u) / 2 is sigmoid(2u), which neither overflows nor cancels
        half = tl.sigmoid(x * (1.5957691216057308 + 0.07135481627159908 * x * x))
        du = 1.5957691216057308 + 0.21406444881479723 * x * x
        return x * half, half + x * half * (1 - half) * du
    elif KIND == "silu":
        gate = tl.sigmoid(x)
        return x * gate, gate * (1 + x * (1 - gate))
    else:
        # asked this way round, NaN stays NaN: maximum(x, 0) would hide it
        positive = tl.where(x <= 0, 0.0, x)
        step = tl.where(x <= 0, 0.0, 1.0)
        if KIND == "relu":
            return positive, step
        else:
            return positive * positive, 2 * positive

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
        gated, up = up is not None, gate if up is None else up
        ctx.save_for_backward(gate, up)
        ctx.kind, ctx.gated = kind, gated
        y = torch.empty(gate.shape, device=gate.device,
                        dtype=torch.promote_types(gate.dtype, up.dtype))
        gate, up = Glu.matrices(gate, up)
        (N, C), blocks = gate.shape, triton.cdiv(gate.shape[1], FLAT)
        glu_forward[(N * blocks,)](gate, up, y, N, C, blocks, gate.stride(0), up.stride(0),
                                   KIND=kind, GATED=gated, BLOCK=FLAT, num_warps=4)
        return y

    @staticmethod
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        dup = torch.empty(up.shape, dtype=up.dtype, device=up.device) if ctx.gated else dgate
        dy, gate, up = Glu.matrices(dy, gate, up)
        (N, C), blocks = gate.shape, triton.cdiv(gate.shape[1], FLAT)
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
def _(gate, up, activation="silu"):
    check(gate, up)
    expect(gate.shape == up.shape, "glu", "gate and up of one shape")
    if activation not in KINDS:
        raise Unsupported(f"glu has no Triton kernel for {activation!r}: choose {', '.join(KINDS)}")
    return Glu.apply(gate, up, KINDS[activation])

# ---------------------------------------------------------------------------------- dropout
@triton.jit
def dropout_all(x, y, seed, n, p, scale, BLOCK: tl.constexpr):
    # Philox gives four draws for the price of one: each serves a block of its own
    pid, lane = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
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
def _(x, p):
    check(x)
    return Dropout.apply(x, float(p))

# ---------------------------------------------------------------------------------- softmax
@triton.jit
def online(top, total, z):
    """One more block z (R, BLOCK) of each row: (max so far, sum of exp(z - max) so far), (R, 1).

    The running sum is rescaled when the maximum rises (Milakov 2018). Where all is -inf so far,
    0 takes the maximum's place: -inf - -inf is NaN.
    """
    new = tl.maximum(top, tl.max(z, 1)[:, None])
    shift = tl.where(new == float("-inf"), 0.0, new)
    return new, total * tl.exp(top - shift) + tl.sum(tl.exp(z - shift), 1)[:, None]

@triton.jit
def softmax_forward(x, y, N, C, stride, R: tl.constexpr, BLOCK: tl.constexpr):
    row, lane, _ = window(N, BLOCK, 1, R, BLOCK)
    top = tl.full((R, 1), float("-inf"), tl.float32)
    total = tl.zeros((R, 1), tl.float32)
    for start in range(0, C, BLOCK):
        col, mask = start + lane, (row < N) & (start + lane < C)
        z = tl.load(x + row * stride + col, mask, float("-inf")).to(tl.float32)
        top, total = online(top, total, z)
    for start in range(0, C, BLOCK):                      # a row of one block is still in the cache
        col, mask = start + lane, (row < N) & (start + lane < C)
        z = tl.load(x + row * stride + col, mask, float("-inf")).to(tl.float32)
        tl.store(y + row * C + col, (tl.exp(z - top) / total).to(y.dtype.element_ty), mask)

@triton.jit
def softmax_backward(dy, y, dx, N, C, stride, R: tl.constexpr, BLOCK: tl.constexpr):
    row, lane, _ = window(N, BLOCK, 1, R, BLOCK)
    inner = tl.zeros((R, 1), tl.float32)                  # sum y dy
    for start in range(0, C, BLOCK):
        col, mask = start + lane, (row < N) & (start + lane < C)
        p = tl.load(y + row * C + col, mask, 0.0).to(tl.float32)
        inner += tl.sum(p * tl.load(dy + row * stride + col, mask, 0.0).to(tl.float32), 1)[:, None]
    for start in range(0, C, BLOCK):
        col, mask = start + lane, (row < N) & (start + lane < C)
        p = tl.load(y + row * C + col, mask, 0.0).to(tl.float32)
        grad = tl.load(dy + row * stride + col, mask, 0.0).to(tl.float32)
        tl.store(dx + row * C + col, (p * (grad - inner)).to(dx.dtype.element_ty), mask)

class Softmax(Function):
    """y = exp(x - max) / sum exp(x - max) along rows (..., C). Saves y: dx = y (dy - sum y dy)."""
    @staticmethod
    def forward(ctx, x):
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        x = rows_of(x)
        (N, C), (R, block, warps) = x.shape, tile(x.shape[1], LOOP_SIZES)
        softmax_forward[(triton.cdiv(N, R),)](x, y, N, C, x.stride(0), R=R, BLOCK=block,
                                              num_warps=warps)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx, dy):
        y, = ctx.saved_tensors
        dx, dy = torch.empty_like(y), rows_of(dy)
        (N, C), (R, block, warps) = dy.shape, tile(dy.shape[1], LOOP_SIZES)
        softmax_backward[(triton.cdiv(N, R),)](dy, y, dx, N, C, dy.stride(0), R=R, BLOCK=block,
                                               num_warps=warps)
        return dx

@kernels.softmax.triton
def _(x):
    check(x)
    return Softmax.apply(x)

# ------------------------------------------------------------------------- what can be launched
INTERPRETED = not isinstance(window, triton.JITFunction)      # TRITON_INTERPRET=1: no GPU needed
TYPES = {"b": "*bf16", "f": "*fp32", "l": "*i64", "i": "i32", "x": "fp32"}

def ship(function, types: str, warps: int, **constants) -> tuple:
    """An entry of SHIPPED: (name, jit function, signature, constants, options); a letter of TYPES
    for each argument before the constants."""
    kinds = [TYPES[t] for t in types] + ["constexpr"] * len(constants)
    name = " ".join([function.fn.__name__, *(f"{k}={v}" for k, v in constants.items())])
    return name, function, dict(zip(function.arg_names, kinds)), constants, {"num_warps": warps}

def shipped() -> Iterator[tuple]:
    """Every configuration that can be launched, in bfloat16 with float32 weights."""
    for width in NORM_SIZES:
        R, block, warps = tile(width, NORM_SIZES)
        for centre, bias, add in ((0, 0, 0), (0, 0, 1), (1, 0, 0), (1, 1, 0)):
            flags = dict(CENTRE=bool(centre), BIAS=bool(bias), ADD=bool(add), R=R, BLOCK=block)
            yield ship(norm_forward, "bbffbbffiiiixx", warps, **flags)
            yield ship(norm_backward, "bbbfffbffiiiiix", warps, **flags)
        for pairs in (False, True) if width <= 512 else ():      # a head_dim
            yield ship(rope_turn, "bffb" + "i" * 12 + "x", warps, PAIRS=pairs, R=R,
                       BLOCK=block // 2)
    for kind in sorted(set(KINDS.values())):
        for gated in (False, True):
            flags = dict(KIND=kind, GATED=gated, BLOCK=FLAT)
            yield ship(glu_forward, "bbbiiiii", 4, **flags)
            yield ship(glu_backward, "bbbbbiiiiii", 4, **flags)
    for width in LOOP_SIZES:
        R, block, warps = tile(width, LOOP_SIZES)
        yield ship(embedding_forward, "lffiiii", warps, R=R, BLOCK=block)
        yield ship(softmax_forward, "bbiii", warps, R=R, BLOCK=block)
        yield ship(softmax_backward, "bbbiii", warps, R=R, BLOCK=block)
    yield ship(embedding_backward, "bllfiiii", 4, RUN=RUN, BLOCK=FLAT)
    yield ship(dropout_all, "bblixx", 4, BLOCK=FLAT)

SHIPPED = list(shipped())

if __name__ == "__main__":
    refuse_to_run()
