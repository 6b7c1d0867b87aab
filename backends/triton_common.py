"""What the Triton kernels share: launches, checks of arguments, and small device functions.

How to read a kernel: a program takes a tile of R rows by BLOCK columns (`tile`); lanes beyond the
end are masked. Offsets are int64, so tensors may pass 2^31 elements. Statistics and sums are
float32. Nothing reads a value back to the host. Each file's SHIPPED lists what it can launch
(`ship`), for the test that compiles it for sm_80 and sm_90.
"""
from __future__ import annotations

from typing import Sequence

from config import UserError, refuse_to_run

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import Unsupported

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
NORM_SIZES = tuple(2 ** n for n in range(7, 14))    # a norm holds whole rows: 128 to 8192
LOOP_SIZES = (128, 1024, 4096)                      # what walks a row in blocks needs no more
FLAT = 1024                                         # elementwise: one 16-byte load a thread


def tile(cols: int, sizes: Sequence[int]) -> tuple[int, int, int]:
    """Return (R, BLOCK, num_warps) for rows of `cols`: 2048 elements a program or one row, 16 a
    thread.

    A row of 128 alone would leave a program with nothing to hide memory's latency behind.
    """
    block = next((s for s in sizes if s >= cols), sizes[-1])
    rows = max(1, 2048 // block)
    return rows, block, rows * block // 512


def check(*tensors: Tensor | None) -> None:
    """Raise UserError where a kernel would read wrong numbers or another device's memory."""
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
    """Raise UserError unless the shapes fit: a kernel would read past the end of what is too
    small."""
    if not fits:
        raise UserError(f"{operation}: the shapes do not fit; it takes {shapes}")


def rows_of(x: Tensor) -> Tensor:
    """x as (rows, cols) with neighbouring columns: a view where the memory allows, else a copy."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def programs(x: Tensor, warps: int, most: int) -> int:
    """Return how many programs share a sum over rows: 16 warps a multiprocessor keep memory
    busy."""
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
def online(top, total, z):
    """One more block z (R, BLOCK) of each row: (max so far, sum of exp(z - max) so far), (R, 1).

    The running sum is rescaled when the maximum rises (Milakov 2018). Where all is -inf so far,
    0 takes the maximum's place: -inf - -inf is NaN.
    """
    new = tl.maximum(top, tl.max(z, 1)[:, None])
    shift = tl.where(new == float("-inf"), 0.0, new)
    return new, total * tl.exp(top - shift) + tl.sum(tl.exp(z - shift), 1)[:, None]


TYPES = {"b": "*bf16", "f": "*fp32", "l": "*i64", "i": "i32", "x": "fp32"}


@triton.jit
def capped(z, softcap, CAP: tl.constexpr):
    """softcap tanh(z / softcap), by tanh u = 2 sigmoid(2u) - 1."""
    z = z.to(tl.float32)
    return softcap * (2 * tl.sigmoid(2 * z / softcap) - 1) if CAP else z


def rounding(x: Tensor) -> str:
    """Return how tl.dot multiplies float32: exactly, unless the user lets tensor cores round."""
    loose = x.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return "tf32" if loose else "ieee"


def one_type(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors in the type of the first; under autocast, in autocast's, as a matmul
    would be."""
    dtype = tensors[0].dtype
    device = tensors[0].device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) for x in tensors)


def learns(*tensors: Tensor) -> bool:
    """subtle: needs_input_grad stays true under no_grad, and evaluation would pay three times."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


INTERPRETED = not isinstance(window, triton.JITFunction)      # TRITON_INTERPRET=1: no GPU needed


def ship(function, types: str, launch: dict, dtype: str = "bf16", **constants) -> tuple:
    """Return an entry of SHIPPED: (name, jit function, signature, constants, options).

    types: a letter for each argument before the constants: one of TYPES, h for a tensor of dtype, 0
    for a tensor that is not there. launch: constants and options (num_warps, num_stages).
    """
    options = {k: v for k, v in launch.items() if k.startswith("num")}
    constants |= {k: v for k, v in launch.items() if k not in options}
    title = " ".join([function.fn.__name__, dtype, *(f"{k}={v}" for k, v in constants.items())])
    names = dict(zip(function.arg_names, types))
    letters = dict(TYPES, h="*" + dtype)
    signature = {name: letters.get(names.get(name), "constexpr") for name in function.arg_names}
    constants |= {name: None for name, letter in names.items() if letter == "0"}
    return title, function, signature, constants, options


if __name__ == "__main__":
    refuse_to_run()
