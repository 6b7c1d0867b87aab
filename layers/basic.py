"""What blocks are made of: a linear layer, an embedding, a norm; weights and one operation each.

The maths is in kernels.py; torch.nn supplies Module and Parameter alone.
"""
from __future__ import annotations

from typing import Any

from config import refuse_to_run

import torch
from torch import Tensor
from torch.nn import Module, Parameter

import kernels
from backends import chunked_loss, foreach      # noqa: F401  before a compiler traces


class Linear(Module):
    """A weight (out, in) and perhaps a bias (out,)."""

    def __init__(self, inputs: int, outputs: int, bias: bool = False):
        super().__init__()
        self.weight = Parameter(torch.empty(outputs, inputs))
        self.bias = Parameter(torch.zeros(outputs)) if bias else None

    def merged_weight(self) -> Tensor:
        """Return the matrix (out, in) that the layer multiplies by, adapters included."""
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        return kernels.linear(x, self.weight, self.bias)


class Embedding(Module):
    def __init__(self, rows: int, width: int):
        super().__init__()
        self.weight = Parameter(torch.empty(rows, width))


class Norm(Module):
    """LayerNorm or RMSNorm over the last dimension; the weight starts where it does nothing."""

    def __init__(self, c: Any, width: int, kind: str = "", bias: bool = False):
        super().__init__()
        self.kind = kind or c.norm
        self.eps = c.norm_eps
        self.offset = c.norm_offset
        self.weight = Parameter(torch.full((width,), 1.0 - self.offset))
        self.bias = Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "rmsnorm":
            return kernels.rms_norm(x, self.weight, self.eps, self.offset)
        return kernels.layer_norm(x, self.weight, self.bias, self.eps)


def glu_through(layer: Linear, gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """Return layer(act(gate) * up): in one operation where the layer is a plain Linear."""
    if type(layer) is Linear:
        return kernels.glu_linear(gate, up, layer.weight, layer.bias, activation)
    return layer(kernels.glu(gate, up, activation))         # one with adapters, or packed


def linear_together(x: Tensor, *layers: Linear) -> Tensor:
    """Return the outputs of several layers of one input, side by side (..., their sum). In training
    one matmul over the joined weights, small beside activations; for one token pack() joins them
    once and for all."""
    if not torch.is_grad_enabled() or any(type(layer) is not Linear for layer in layers):
        return torch.cat([layer(x) for layer in layers], -1)    # a layer with adapters, say
    return kernels.linear_joined(x, [la.weight for la in layers], [la.bias for la in layers])


if __name__ == "__main__":
    refuse_to_run()
