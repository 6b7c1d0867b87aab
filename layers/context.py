"""What the layers of a forward share beside the hidden states: positions, documents, the cache."""
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
