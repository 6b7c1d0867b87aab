"""CUDA versions of four operations: cuda.cu as autograd functions, to hold the languages side
by side; a GPU can run either.

    python bench.py kernels                         # beside Triton, on a GPU
    kernels.use("cuda")                             # GELU, SwiGLU, RMSNorm, softmax; the rest torch

NVRTC, the compiler inside every CUDA build of PyTorch, turns the source into machine code at the
first use, in a second or so: no nvcc, no ninja, no extension to build. A launch passes pointers,
32-bit ints and doubles, so that is what the kernels take. tests/test_cuda.py runs the source
on a CPU, block by block and thread by thread, against PyTorch, and compiles it for sm_80 and sm_90.
"""
from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from config import UserError, refuse_to_run

import torch
from torch import Tensor
from torch.autograd import Function

import kernels

SOURCE = Path(__file__).with_name("cuda.cu")
NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
THREADS = 256                   # of a block; every kernel here works with any multiple of 32
ROWS = 256                      # blocks of the RMSNorm backward, each with a row of partial sums
MOST = 2 ** 31 - 1              # ints are passed as 32 bits


@functools.lru_cache(maxsize=None)


def compiled(name: str) -> Any:
    """Return the kernel of that name for the current GPU, compiled at its first use."""
    return torch.cuda._compile_kernel(SOURCE.read_text(), name)


def usable(x: Tensor) -> bool:
    return x.is_cuda


def launch(name: str, like: Tensor, blocks: int, *arguments: Any) -> None:
    """Run kernel `name` for the type of `like`, on its device and PyTorch's current stream."""
    if like.dtype not in NAMES:
        raise UserError(f"--backend=cuda: {name} is written for float32 and bfloat16, "
                        f"not {like.dtype}; use --backend=auto")
    if not usable(like):
        raise UserError("--backend=cuda needs a GPU; use --backend=auto")
    if blocks:                                  # a grid of no blocks is an error
        with torch.cuda.device_of(like):
            compiled(f"{name}_{NAMES[like.dtype]}")(
                grid=(blocks, 1, 1), block=(THREADS, 1, 1), args=list(arguments))


def shape(x: Tensor) -> tuple[int, int]:
    """Return (rows, cols) of a tensor seen as rows of its last dimension; each fits 32 bits."""
    cols = x.shape[-1] if x.ndim else 1
    rows = x.numel() // cols if cols else 0
    if max(rows, cols) > MOST or -(-rows * cols // THREADS) > MOST:
        raise UserError(f"--backend=cuda: a tensor of {rows} x {cols} is beyond its grid")
    return rows, cols


def elementwise(name: str, inputs: list[Tensor], outputs: int) -> list[Tensor]:
    """Return one thread an element: `inputs` of one shape and type -> that many outputs like
    them."""
    inputs = [x.contiguous() for x in inputs]
    made = [torch.empty_like(inputs[0]) for _ in range(outputs)]
    rows, cols = shape(inputs[0])
    launch(name, inputs[0], -(-rows * cols // THREADS), *inputs, *made, rows, cols)
    return made


class GELU(Function):
    """x Phi(x); saves x and computes Phi again."""
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return elementwise("gelu_forward", [x], 1)[0]

    @staticmethod
    def backward(ctx, grad):
        return elementwise("gelu_backward", [grad, *ctx.saved_tensors], 1)[0]


class SwiGLU(Function):
    """silu(gate) up; saves both inputs and computes the sigmoid again."""
    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return elementwise("swiglu_forward", [gate, up], 1)[0]

    @staticmethod
    def backward(ctx, grad):
        return tuple(elementwise("swiglu_backward", [grad, *ctx.saved_tensors], 2))


class RMSNorm(Function):
    """x / sqrt(mean(x^2) + eps) (offset + w); saves x and one float32 a row."""
    @staticmethod
    def forward(ctx, x, weight, eps, offset):
        x = x.contiguous()
        w = weight.float().contiguous()
        rows, cols = shape(x)
        y = torch.empty_like(x)
        rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
        launch("rms_norm_forward", x, rows, x, w, y, rstd, cols, float(eps), float(offset))
        ctx.save_for_backward(x, w, rstd)
        ctx.offset = offset
        ctx.dtype = weight.dtype
        return y

    @staticmethod
    def backward(ctx, grad):
        x, w, rstd = ctx.saved_tensors
        rows, cols = shape(x)
        blocks = min(rows, ROWS)
        dx = torch.empty_like(x)
        partial = w.new_empty(blocks, cols)
        launch("rms_norm_backward", x, blocks, grad.contiguous(), x, w, rstd, dx, partial, rows,
               cols, float(ctx.offset))
        return dx, partial.sum(0).to(ctx.dtype), None, None


class Softmax(Function):
    """exp(x - max) / sum exp(x - max); saves the result, which is all that its gradient needs."""
    @staticmethod
    def forward(ctx, x):
        x = x.contiguous()
        rows, cols = shape(x)
        p = torch.empty_like(x)
        launch("softmax_forward", x, rows, x, p, cols)
        ctx.save_for_backward(p)
        return p

    @staticmethod
    def backward(ctx, grad):
        p, = ctx.saved_tensors
        rows, cols = shape(p)
        dx = torch.empty_like(p)
        launch("softmax_backward", p, rows, grad.contiguous(), p, dx, cols)
        return dx


@kernels.gelu.cuda
def gelu_cuda(x, approximate="none"):
    # GPT-2's tanh formula has no twin: the form that auto would take
    if approximate != "none":
        return kernels.gelu.implementations["torch"](x, approximate)
    return GELU.apply(x)


@kernels.glu.cuda
def glu_cuda(gate, up, activation="silu"):
    if activation != "silu":
        return kernels.glu.reference(gate, up, activation)
    return SwiGLU.apply(gate, up)


@kernels.rms_norm.cuda
def rms_norm_cuda(x, weight, eps=1e-6, offset=0.0):
    return RMSNorm.apply(x, weight, eps, offset)


kernels.softmax.cuda(Softmax.apply)


if __name__ == "__main__":
    refuse_to_run()
