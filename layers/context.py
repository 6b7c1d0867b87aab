"""What a mixer is, and what the mixers of a forward share beside the hidden states.

A mixer is the part of a block in which tokens meet: a Module, named by `layer_types`, with

    name                        of the module in its block, which its parameters' names begin with
    __init__(config, layer)     the ModelConfig, and which layer it is
    forward(x, context)         (B, T, C) -> (B, T, C); nothing crosses a document of context.doc
    new_state(batch, length, device, dtype, layers)
                                an empty decode state: KeyValues or RecurrentState of kv_cache.py,
                                or a class with their methods; forward finds it as
                                context.cache.states[layer]
    state_key                   optional: layers that agree in it share one state
    state_size(length)          numbers in the state of one row of `length` tokens
    add_flops(flops, has_grad, T)   its matmuls, for layers/flops.py
    joined_layers               optional: name -> linears of one input, which serving joins in one
                                matrix; see inference/quantize.py
"""
from __future__ import annotations

from typing import Any, Callable, NamedTuple

from config import refuse_to_run

from torch import Tensor


class Context(NamedTuple):
    """What a mixer may read beside x (B, T, C)."""
    # x (B, T, H, D) -> x turned, for the positions at hand: of all layers, and of those with a base
    # of their own; None in a model without rotary positions
    rope: list[Callable[[Tensor], Tensor]] | None = None
    doc: Tensor | None = None           # (B, T) document numbers: nothing crosses into another one
    cache: Any = None                   # kv_cache.Cache, in generation


if __name__ == "__main__":
    refuse_to_run()
