"""The cache: what each layer remembers of the tokens it has seen, as lengths and one state a layer.

    cache = model.new_cache(batch=1, length=100)
    logits = model(prompt, cache=cache)             # (1, T): all of the prompt at once
    logits = model(next_token, cache=cache)         # (1, 1): the states stand for the prompt
    other = cache.copy()                            # the same text, to go on in two ways
    cache.trim([40])                                # forget what came after the first 40 tokens
    cache = Cache.join([cache.select([0]), other])  # rows of a batch, one by one

A mixer makes its own state (`new_state`). Attention's are keys and values (KeyValues), which never
change, since attention is causal: a new token costs one row of every matrix instead of the whole
text again, and 2 n_kv_head head_dim numbers in every layer (`python model.py --show=NAME` prints
the sum), except in layers with a window, which keep the newest tokens only. A recurrent mixer's
state (RecurrentState) has one size whatever the text's length, and cannot go back: copy it instead.
Cached and full forward are equal at every step: tests/test_model.py, tests/layers/test_mixers.py.
"""
from __future__ import annotations

import copy
from typing import Any, Sequence

from config import UserError, refuse_to_run

import torch
from torch import Tensor


class KeyValues:
    """Keys and values of the layers that share a window, each (batch, n_kv_head, room, head_dim).

    Layers with a window keep the newest keys only: their room is two windows, and what is older
    goes when it is full. Always in order, so that attention is the same as without a window.
    """
    SPARE = 64                      # tokens that trim() may take back although a window was full

    def __init__(self, config: Any, layers: Sequence[int], window: int, batch: int, length: int,
                 device: torch.device, dtype: torch.dtype):
        self.window = window
        # one tensor for keys and values of all layers: a view of it is made once a step, not once
        # a layer. Memory is taken page by page, as it is written to
        room = min(length, 2 * window + self.SPARE) if window else length
        self.layers = list(layers)
        self.hold(torch.zeros(len(layers), 2, batch, config.n_kv_head, room, config.head_dim,
                              device=device, dtype=dtype))
        self.fill = [0] * batch                     # tokens in each row

    def hold(self, tensor: Tensor) -> None:
        """Keep keys and values in `tensor` (layers, 2, batch, n_kv_head, room, head_dim)."""
        self.all = tensor
        self.room = tensor.shape[-2]
        self.keep = self.room - self.window         # tokens that stay when it overflows
        self.kv = {i: pair.unbind() for i, pair in zip(self.layers, tensor.unbind())}

    def begin(self, T: int, counts: list[int]) -> None:
        """Make the views for the next T tokens, in each layer; counts: how many of them are real,
        in each row."""
        end = max(self.fill)
        self.over = end + T > self.room
        self.end = end
        self.counts = counts
        self.places = place_tokens(self.fill, T, self.all.device)
        if not self.over:
            # for each layer its keys, then its values: (B, Hkv, T, D) and (B, Hkv, end + T, D)
            new = self.all[..., end:end + T, :].flatten(0, 1).unbind()
            seen = self.all[..., :end + T, :].flatten(0, 1).unbind()
            self.views = dict(zip(self.kv, zip(new[::2], new[1::2], seen[::2], seen[1::2])))

    def put(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Store k, v (B, Hkv, T, D); return (all keys, all values, up to the longest row's end, and
        the places of the queries among them, or None where all rows agree)."""
        if k.requires_grad:                     # what is remembered is data: nothing learns from it
            k = k.detach()
            v = v.detach()
        if self.over:
            return self.put_over(layer, 0, k), self.put_over(layer, 1, v), self.places
        new_k, new_v, keys, values = self.views[layer]
        if self.places is None:
            new_k.copy_(k)
            new_v.copy_(v)
        else:
            rows = torch.arange(k.shape[0], device=k.device).unsqueeze(1)           # (B, 1)
            for held, x in zip(self.kv[layer], (k, v)):
                held[rows, :, self.places] = x.transpose(1, 2)
        return keys, values, self.places

    def put_over(self, layer: int, n: int, x: Tensor) -> Tensor:
        """The same where a window is full: the newest `keep` of each row move to the front."""
        total = self.end + x.shape[2]
        held = torch.cat((self.kv[layer][n][:, :, :self.end], x), 2)
        if self.places is not None:
            rows = torch.arange(x.shape[0], device=x.device).unsqueeze(1)
            held[rows, :, self.places] = x.transpose(1, 2)
        filled = torch.tensor([f + c for f, c in zip(self.fill, self.counts)], device=x.device)
        where = (filled - self.keep).clamp(min=0).unsqueeze(1)
        where = (where + torch.arange(self.keep, device=x.device)).clamp(max=total - 1)
        where = where[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
        self.kv[layer][n][:, :, :self.keep] = held.gather(2, where)
        return held

    def advance(self) -> None:
        """Count the tokens of the step that ends."""
        self.fill = [min(f + c, self.keep) if self.over else f + c
                     for f, c in zip(self.fill, self.counts)]

    def trim(self, removed: list[int]) -> None:
        """Forget the newest tokens of each row; after a full window at most SPARE of them."""
        fill = [f - n for f, n in zip(self.fill, removed)]
        if min(fill) < 0:
            raise UserError("the cache cannot go back that far: the window's keys before those "
                            "tokens are gone; encode the text again")
        self.fill = fill

    def copy(self) -> KeyValues:
        """Return the same content in memory of its own."""
        return self.select(range(len(self.fill)))

    def select(self, rows: Sequence[int]) -> KeyValues:
        """Return a state of these rows of the batch, in this order."""
        other = copy.copy(self)
        other.hold(self.all[:, :, list(rows)])      # indexing by a list copies
        other.fill = [self.fill[r] for r in rows]
        return other

    @staticmethod
    def join(states: Sequence[KeyValues]) -> KeyValues:
        """Return one state with the rows of all; the room is that of the largest."""
        first = states[0]
        room = max(s.room for s in states)
        other = copy.copy(first)
        layers, two, _, heads, _, D = first.all.shape
        batch = sum(len(s.fill) for s in states)
        tensor = first.all.new_zeros(layers, two, batch, heads, room, D)
        start = 0
        for s in states:
            tensor[:, :, start:start + len(s.fill), :, :s.room] = s.all
            start += len(s.fill)
        other.hold(tensor)
        other.fill = [f for s in states for f in s.fill]
        return other


class RecurrentState:
    """A state of one size, however long the text: tensors by name, each (batch, ...).

    The mixer reads and replaces them; with counts (batch,) it leaves out the padding of a ragged
    batch: only the first counts[r] tokens of row r may change that row.
    """

    def __init__(self, **tensors: Tensor):
        self.tensors = tensors
        self.counts: list[int] = []

    def begin(self, T: int, counts: list[int]) -> None:
        """Note how many of the next T tokens are real, in each row."""
        self.counts = counts

    def advance(self) -> None:
        """Count the tokens of the step that ends: there is nothing to do."""

    def trim(self, removed: list[int]) -> None:
        """Refuse to forget: what the last tokens added cannot be taken out of a sum."""
        if any(removed):
            raise UserError("a recurrent state cannot go back: copy the cache before what is to be "
                            "forgotten, or encode the text again")

    def copy(self) -> RecurrentState:
        """Return the same content in memory of its own."""
        return RecurrentState(**{name: t.clone() for name, t in self.tensors.items()})

    def select(self, rows: Sequence[int]) -> RecurrentState:
        """Return a state of these rows of the batch, in this order."""
        return RecurrentState(**{name: t[list(rows)] for name, t in self.tensors.items()})

    @staticmethod
    def join(states: Sequence[RecurrentState]) -> RecurrentState:
        """Return one state with the rows of all."""
        return RecurrentState(**{name: torch.cat([s.tensors[name] for s in states])
                                 for name in states[0].tensors})


def place_tokens(fill: list[int], T: int, device: torch.device) -> Tensor | None:
    """Return the places of the next T tokens of each row, (batch, T); None where all rows agree."""
    if len(set(fill)) == 1:
        return None
    return torch.tensor(fill, device=device).unsqueeze(1) + torch.arange(T, device=device)


class Cache:
    """What the layers remember of the tokens seen: the lengths of the rows, and a state per layer.

    Rows may hold different numbers of tokens (`lengths`): a ragged batch of prompts is run padded
    on the right after expect() has said how many of each row are real, and each row goes on at
    its own position. Lengths live on the host: a uniform batch never makes a GPU wait. Layers may
    share a state object.
    """

    def __init__(self, states: Sequence[Any], batch: int, length: int, device: torch.device):
        self.states = list(states)
        self.distinct = list(dict.fromkeys(states))
        self.length = length
        self.device = device
        self.lengths = [0] * batch
        self.counts: list[int] | None = None

    @property
    def end(self) -> int:
        return max(self.lengths)

    def expect(self, counts: list[int]) -> None:
        """Say how many tokens of each row of the next call are real; the others are padding."""
        self.counts = counts

    def positions(self, T: int) -> Tensor | None:
        """Return the positions of the next T tokens, (batch, T); None where all rows agree."""
        return place_tokens(self.lengths, T, self.device)

    def begin(self, T: int) -> None:
        """Prepare the states for T tokens: what layers have in common is done once."""
        counts = self.counts or [T] * len(self.lengths)
        for state in self.distinct:
            state.begin(T, counts)

    def advance(self, T: int) -> None:
        """Count T tokens, or those that were expected, once all layers have seen them."""
        counts = self.counts or [T] * len(self.lengths)
        for state in self.distinct:
            state.advance()
        self.lengths = [n + c for n, c in zip(self.lengths, counts)]
        self.counts = None

    def trim(self, lengths: Sequence[int]) -> None:
        """Forget the tokens of each row beyond lengths; UserError, with nothing changed, where a
        state cannot."""
        removed = [old - new for old, new in zip(self.lengths, lengths)]
        if not any(removed):
            return
        before = [copy.copy(state.fill) if isinstance(state, KeyValues) else None
                  for state in self.distinct]
        try:
            for state in self.distinct:
                state.trim(removed)
        except UserError:
            for state, fill in zip(self.distinct, before):
                if fill is not None:
                    state.fill = fill
            raise
        self.lengths = list(lengths)

    def copy(self) -> Cache:
        """Return the same content in memory of its own."""
        return self.select(range(len(self.lengths)))

    def select(self, rows: Sequence[int]) -> Cache:
        """Return a cache of these rows of the batch, in this order."""
        made = {state: state.select(rows) for state in self.distinct}
        other = Cache([made[state] for state in self.states], len(rows), self.length, self.device)
        other.lengths = [self.lengths[r] for r in rows]
        return other

    @staticmethod
    def join(caches: Sequence[Cache]) -> Cache:
        """Return one cache with the rows of all, of one model; its length is the largest."""
        first = caches[0]
        places = [first.states.index(state) for state in first.distinct]
        made = {state: type(state).join([c.states[i] for c in caches])
                for state, i in zip(first.distinct, places)}
        other = Cache([made[state] for state in first.states],
                      sum(len(c.lengths) for c in caches), max(c.length for c in caches),
                      first.device)
        other.lengths = [n for c in caches for n in c.lengths]
        return other


if __name__ == "__main__":
    refuse_to_run()
