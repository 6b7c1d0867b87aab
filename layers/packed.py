"""Matrices for serving: plain, in oneDNN's layout, and in 8 or 4 bits; y = x W^T + b each.

    packed = pack_matrix(weight, bias, "int8")
    y = packed(x)                       # x (..., K) -> (..., N)
    packed.bytes                        # what a token reads

No Modules, whose call costs a microsecond, a hundred times a token. inference/quantize.py puts them
in the place of a model's linears, and says what the formats are.
"""
from __future__ import annotations

from config import refuse_to_run

import torch
from torch import Tensor

import kernels

GROUP = 32                  # weights of a row that share a scale and an offset in int4
FEW = 16                    # rows of x up to which multiplying packed int8 beats unpacking it
BLOCK = 2 ** 21             # weights unpacked at a time: 4 MB of bfloat16, which stay in the cache


class Plain:
    """y = x W^T + b with a joined W: what every device and type can do. x (..., K) -> (..., N).

    No Module, whose call costs a microsecond, a hundred times a token. `bytes` is what a token
    reads.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        self.weight = weight
        self.bias = bias
        self.bytes = weight.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        return kernels.linear(x, self.weight, self.bias)


class Blocked(Plain):
    """The same in the layout that oneDNN's kernels read from start to end: bfloat16 on a CPU."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__(weight, bias)
        # looked up here, since not every build of PyTorch has it; ._op is the operator without
        # the Python half of its dispatch
        self.product = torch.ops.mkldnn._linear_pointwise.default._op
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), 1)

    def __call__(self, x: Tensor) -> Tensor:
        return self.product(x, self.weight, self.bias, "none", [], "")


class Integer:
    """What the two integer matrices share: shapes around a product of rows (M, K) -> (M, N)."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        self.outputs, self.inputs = weight.shape
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        # the integer kernels want rows that follow each other
        y = self.product(x.reshape(-1, self.inputs).contiguous())
        if self.bias is not None:
            y.add_(self.bias)
        return y if x.ndim == 2 else y.view(*x.shape[:-1], self.outputs)


class Int8(Integer):
    """Rows of int8 and a scale for each: y_n = s_n sum_k q_nk x_k, with s_n = max |w_n| / 127."""

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__(weight, bias)
        cpu = weight.device.type == "cpu"
        low, high = weight.aminmax(dim=1)
        # round the scale first, or the steps are not those it is multiplied with later
        scale = torch.maximum(-low, high).float().div_(127).clamp_(min=1e-12)
        self.scale = scale.to(torch.bfloat16)                                       # (N,)
        self.weight = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        self.rows = max(1, BLOCK // self.inputs) if cpu else self.outputs
        for q, w, s in zip(*(t.split(self.rows) for t in (self.weight, weight, self.scale))):
            q.copy_((w.float() / s.float().unsqueeze(1)).round_().clamp_(-127, 127))
        # the kernel reads rows in steps of 32, also beyond their end
        self.few = FEW if cpu and self.inputs % 32 == 0 else 0
        self.bytes = self.weight.nbytes + self.scale.nbytes

    def product(self, x: Tensor) -> Tensor:
        if x.shape[0] <= self.few:
            return torch._weight_int8pack_mm(x, self.weight, self.scale)
        scale = self.scale.to(x.dtype)
        if x.dtype == torch.float16:                # sums of whole steps exceed its 65504
            return kernels.linear(x, self.weight.to(x.dtype).mul_(scale.unsqueeze(1)))
        # a prompt: integers up to 127 are exact in bfloat16, the scale comes after the sum
        parts = [kernels.linear(x, w.to(x.dtype)) for w in self.weight.split(self.rows)]
        return torch.cat(parts, -1).mul_(scale)


class Int4(Integer):
    """Groups of 32 weights, two to a byte: w = (q - 8) s + z with q of 0..15."""
    multiply = staticmethod(torch.ops.aten._weight_int4pack_mm_for_cpu.default._op)

    def __init__(self, weight: Tensor, bias: Tensor | None):
        super().__init__(weight, bias)
        groups = weight.float().view(self.outputs, -1, GROUP)
        low, high = groups.aminmax(dim=-1, keepdim=True)
        # round the offset first, then make steps of which 8 reach down, 7 up from there
        zero = (low + (high - low) * (8 / 15)).to(torch.bfloat16)
        z = zero.float()
        scale = torch.maximum((z - low) / 8, (high - z) / 7).clamp_(min=1e-12).to(torch.bfloat16)
        q = (groups - z).div_(scale.float()).add_(8).round_().clamp_(0, 15)
        self.weight = torch.ops.aten._convert_weight_to_int4pack_for_cpu(
            q.view(self.outputs, self.inputs).to(torch.int32), 1)
        self.grid = torch.cat((scale, zero), -1).transpose(0, 1).contiguous()   # (K / 32, N, 2)
        self.bytes = self.weight.nbytes + self.grid.nbytes

    @staticmethod
    def fits(weight: Tensor) -> bool:
        """Return whether the kernel takes a matrix of this shape and device."""
        rows, columns = weight.shape
        return weight.device.type == "cpu" and rows % 16 == 0 and columns % GROUP == 0

    def product(self, x: Tensor) -> Tensor:
        return self.multiply(x, self.weight, GROUP, self.grid)


def pack_matrix(weight: Tensor, bias: Tensor | None, quantize: str) -> Plain | Integer:
    """Return what serves a matrix (N, K) and its bias (N,) best."""
    if quantize == "int4" and Int4.fits(weight):
        return Int4(weight, bias)
    if quantize:
        return Int8(weight, bias)
    blocked = weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and (
        torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return (Blocked if blocked else Plain)(weight, bias)


if __name__ == "__main__":
    refuse_to_run()
