"""Weights for serving: joined, packed for the CPU, and in 8 or 4 bits.

    model = load_model(DIR)
    pack(model)                         # the same numbers, laid out for one token at a time
    pack(model, "int8")                 # half the bytes of bfloat16
    pack(model, "int4")                 # a third, on a CPU

One new token multiplies every weight by one vector, so its time is that of reading the weights:
fewer bytes, a layout that is read from start to end, and fewer calls are all there is to gain.
pack() replaces the linear layers of a model in place, one after the other, so that memory never
holds two copies: q, k, v become one matrix, gate and up another. A packed model is for serving
alone: whoever trains, saves, moves or counts it is told so in one sentence.

    int8    each row of a matrix is rounded to 255 steps of its own size. Only the weights:
            activations stay bfloat16, so that rows of a batch do not depend on each other.
    int4    each 32 weights of a row to 16 steps between their least and their largest, as in
            llama.cpp's Q4_1. The output matrix, which decides between near-equal words, in int8.

The embedding table and the routed experts of a mixture stay as they are: a token reads few rows.
On a CPU prompts gain nothing: int8 is unpacked for them, int4 multiplied slower than bfloat16. On
a GPU both are int8 that is unpacked at every use: half the memory, but more time for a token.
(`python bench.py sample` shows the speed; tests/inference/test_quantize.py what it may cost.)
"""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from backends.cpu import rms_norm_at
import kernels
from config import UserError, refuse_to_run
from model import MLP, Attention, Linear, MoE, Norm, Transformer

KINDS = ("", "int8", "int4")
GROUP = 32                  # weights of a row that share a scale and an offset in int4
FEW = 16                    # rows of x up to which multiplying packed int8 beats unpacking it
BLOCK = 2 ** 21             # weights unpacked at a time: 4 MB of bfloat16, which stay in the cache


class Plain:
    """y = x W^T + b with a joined W: what every device and type can do. x (..., K) -> (..., N).

    No Module, whose call costs a microsecond, a hundred times a token. `bytes` is what a token
    reads.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None):
        self.weight, self.bias, self.bytes = weight, bias, weight.nbytes

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
    """What the two integer forms share: shapes around a product of rows (M, K) -> (M, N)."""

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
        cpu, (low, high) = weight.device.type == "cpu", weight.aminmax(dim=1)
        # the trap: round the scale first, or the steps are not those it is multiplied with later
        scale = torch.maximum(-low, high).float().div_(127).clamp_(min=1e-12)
        self.scale = scale.to(torch.bfloat16)                                       # (N,)
        self.weight = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        self.rows = max(1, BLOCK // self.inputs) if cpu else self.outputs
        for q, w, s in zip(*(t.split(self.rows) for t in (self.weight, weight, self.scale))):
            q.copy_((w.float() / s.float().unsqueeze(1)).round_().clamp_(-127, 127))
        # and another: the kernel reads rows in steps of 32, also beyond their end
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
        # the trap: round the offset first, then make steps of which 8 reach down, 7 up from there
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
        rows, columns = weight.shape
        return weight.device.type == "cpu" and rows % 16 == 0 and columns % GROUP == 0

    def product(self, x: Tensor) -> Tensor:
        return self.multiply(x, self.weight, GROUP, self.grid)


def pack_matrix(weight: Tensor, bias: Tensor | None, quantize: str) -> Plain | Integer:
    """The form that serves a matrix (N, K) and its bias (N,) best."""
    if quantize == "int4" and Int4.fits(weight):
        return Int4(weight, bias)
    if quantize:
        return Int8(weight, bias)
    blocked = weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and (
        torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return (Blocked if blocked else Plain)(weight, bias)


def refuse(*args, **kwargs):
    raise UserError("a packed model is for serving alone: load the checkpoint again to train, "
                    "save, move or count it")


class Packed(Transformer):
    """What pack() makes of a Transformer: most of its weights are no parameters any more."""
    state_dict = load_state_dict = named_parameters = _apply = refuse

    def train(self, mode: bool = True) -> Packed:
        return refuse() if mode else super().train(False)


def replace(owner: Any, name: str, parts: tuple[str, ...], quantize: str, dtype) -> int:
    """Put one packed matrix `name` in the place of the layers `parts` of owner; returns its bytes.

    The originals go before the next ones are packed: that keeps the peak of memory low.
    """
    layers = [getattr(owner, part) for part in parts]
    weights, biases = [la.weight.detach() for la in layers], [la.bias for la in layers]
    weight = torch.cat(weights) if len(weights) > 1 else weights[0]
    bias = None if biases[0] is None else torch.cat([b.detach() for b in biases]).to(dtype)
    for part in parts:
        delattr(owner, part)
    del layers, weights
    # integers are made from the weights as they are, not as they would be rounded for use
    packed = pack_matrix(weight if quantize else weight.to(dtype), bias, quantize)
    setattr(owner, name, packed)
    return packed.bytes


@torch.no_grad()
def pack(model: Transformer, quantize: str = "") -> int:
    """Replace the linear layers of `model` in place by joined, packed ones; returns the bytes of
    weights that a token reads. quantize: "" (the same numbers), int8 or int4.

    Hidden states of a model that is quantised on a CPU are bfloat16 from then on, whatever they
    were. Where the output matrix is not the embedding's, only model.to_logits() has it.
    UserError for another `quantize`, a model that is no Transformer, or one that is packed.
    """
    if quantize not in KINDS:
        raise UserError(f"--quantize={quantize} does not exist: choose int8 or int4")
    if not isinstance(model, Transformer):
        raise UserError("--quantize is for Transformers: leave it out for this model")
    if isinstance(model, Packed):
        raise UserError("the model is packed already: load it again to pack it in another way")
    model.requires_grad_(False).eval()
    output, total = model.output_weight.detach(), 0
    cpu = output.device.type == "cpu"
    dtype = model.compute_dtype or output.dtype
    # what a CPU's integer kernels multiply is bfloat16
    model.compute_dtype = dtype = torch.bfloat16 if quantize and cpu else dtype
    # the trap: a list of all modules would keep the originals alive until it is done
    for module in [m for m in model.modules() if not isinstance(m, Linear)]:
        parts: dict[str, tuple[str, ...]] = {}
        if isinstance(module, Attention):
            parts = {"joined": ("q_proj", "k_proj", "v_proj"), "o_proj": ("o_proj",)}
        elif isinstance(module, MLP):
            gated = module.config.gated
            parts = {"joined" if gated else "up_proj": ("gate_proj", "up_proj")[not gated:],
                     "down_proj": ("down_proj",)}
        elif isinstance(module, MoE):
            for p in module.experts.parameters():       # cast here once, or at every use
                p.data = p.data.to(dtype)
            share = module.config.num_experts_per_tok / module.config.num_experts
            total += module.gate.weight.nbytes + int(share * sum(
                p.nbytes for p in module.experts.parameters()))
        for name, layers in parts.items():
            total += replace(module, name, layers, quantize, dtype)
        for name, child in list(module.named_children()):
            if isinstance(child, Norm) and child.kind == "rmsnorm" and cpu and (
                    dtype in (torch.float32, torch.bfloat16)):      # in float16 |x| overflows
                delattr(module, name)
                setattr(module, name, rms_norm_at(child.weight, child.eps,
                                                              child.offset, dtype))
            elif isinstance(child, (Attention, MLP, MoE)):
                # called past Module.__call__, whose hooks serving has no use for
                vars(module)[name] = child.forward
    model.output = pack_matrix(output if quantize else output.to(dtype), None,
                               quantize and "int8")
    if not model.config.tie_word_embeddings:
        # gone, but its device can still be asked; clone: a view would keep all of it
        model.lm_head.weight.data = output[:0].clone()
    model.__class__ = Packed
    return total + model.output.bytes


if __name__ == "__main__":
    refuse_to_run()
