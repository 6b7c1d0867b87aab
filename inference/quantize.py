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

The embedding table and the routed experts of an MoE model stay unchanged: a token reads few rows.
On a CPU prompts gain nothing: int8 is unpacked for them, int4 multiplied slower than bfloat16. On
a GPU both are int8 that is unpacked at every use: half the memory, but more time for a token.
(`python bench.py sample` shows the speed; tests/inference/test_quantize.py what it may cost.)
"""
from __future__ import annotations

from typing import Any

from config import UserError, refuse_to_run

import torch

import kernels
from layers.packed import pack_matrix
from model import Block, Linear, MoE, Norm, Transformer

KINDS = ("", "int8", "int4")


def refuse(*args, **kwargs):
    """Raise UserError: what REFUSED names does this on a packed model."""
    raise UserError("a packed model is for serving alone: load the checkpoint again to train, "
                    "save, move or count it")


# what a packed model has no answer to, as most of its weights are no parameters any more
REFUSED = ("state_dict", "load_state_dict", "named_parameters", "_apply")


def replace(owner: Any, name: str, parts: tuple[str, ...], quantize: str, dtype) -> int:
    """Put one packed matrix `name` in the place of the layers `parts` of owner; return its bytes.

    The originals go before the next ones are packed: that keeps the peak of memory low.
    """
    layers = [getattr(owner, part) for part in parts]
    weights = [la.merged_weight().detach() for la in layers]
    biases = [la.bias for la in layers]
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
    """Replace the linear layers of `model` in place by joined, packed ones; return the bytes of
    weights that a token reads. quantize: "" (the same numbers), int8 or int4.

    Hidden states of a model that is quantised on a CPU are bfloat16 from then on, whatever they
    were. Where the output matrix is not the embedding's, only model.to_logits() has it.
    UserError for another `quantize`, a model that is no Transformer, or one that is packed.
    """
    if quantize not in KINDS:
        raise UserError(f"unknown --quantize={quantize}; choose from int8, int4")
    if not isinstance(model, Transformer):
        raise UserError("--quantize is for Transformers: leave it out for this model")
    if model.output is not None:
        raise UserError("the model is packed already: load it again to pack it in another way")
    model.requires_grad_(False).eval()
    output = model.output_weight.detach()
    total = 0
    cpu = output.device.type == "cpu"
    dtype = model.compute_dtype or output.dtype
    # what a CPU's integer kernels multiply is bfloat16
    model.compute_dtype = dtype = torch.bfloat16 if quantize and cpu else dtype
    # a list of all modules would keep the originals alive until it is done
    for module in [m for m in model.modules() if not isinstance(m, Linear)]:
        parts: dict[str, tuple[str, ...]] = {}
        if module is not model:                         # whose linear is the output matrix, below
            parts.update(getattr(module, "joined_layers", {}))
            together = {part for names in parts.values() for part in names}
            parts.update({name: (name,) for name, child in module.named_children()
                          if isinstance(child, Linear) and name not in together})
        if isinstance(module, MoE):
            for p in module.experts.parameters():       # cast here once, or at every use
                p.data = p.data.to(dtype)
            share = module.config.num_experts_per_tok / module.config.num_experts
            total += module.gate.weight.nbytes + int(share * sum(
                p.nbytes for p in module.experts.parameters()))
        elif isinstance(module, Block):
            module.packed = True
        for name, layers in parts.items():
            total += replace(module, name, layers, quantize, dtype)
        for name, child in list(module.named_children()):
            if isinstance(child, Norm) and child.kind == "rmsnorm" and cpu:
                delattr(module, name)
                setattr(module, name, kernels.prepare_rms_norm(child.weight, child.eps,
                                                               child.offset, dtype))
    model.output = pack_matrix(output if quantize else output.to(dtype), None,
                               quantize and "int8")
    if not model.config.tie_word_embeddings:
        # gone, but its device can still be asked; clone: a view would keep all of it
        model.lm_head.weight.data = output[:0].clone()
    for name in REFUSED:
        setattr(model, name, refuse)
    model.train = lambda mode=True: refuse() if mode else model
    return total + model.output.bytes


if __name__ == "__main__":
    refuse_to_run()
