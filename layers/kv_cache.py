"""The KV cache: what the attention of every layer remembers of the tokens it has seen.

    cache = model.new_cache(batch=1, length=100)
    logits = model(prompt, cache=cache)             # (1, T): all of the prompt at once
    logits = model(next_token, cache=cache)         # (1, 1): it looks back at keys and values

Keys and values of a token never change, since attention is causal: they are computed once, and a
new token costs one row of every matrix instead of the whole text again. Memory is what that takes:
2 n_layer n_kv_head head_dim numbers a token (`python model.py --show=NAME` prints it), except in
layers with a window, which keep the newest tokens only. To expect: cached == full forward at every
step, for every family (tests/test_model.py).
"""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from config import UserError, refuse_to_run


class Store:
    """Keys and values of the layers that share a window, each (batch, n_kv_head, room, head_dim).

    Layers with a window keep the newest keys only: their room is two windows, and what is older
    goes when it is full. Always in order, so that attention is the same as without a window.
    """
    SPARE = 64                      # tokens that trim() may take back although a window was full

    def __init__(self, config: Any, layers: list[int], window: int, batch: int,
                 length: int, device, dtype):
        self.room = min(length, 2 * window + self.SPARE) if window else length
        self.keep = self.room - window              # tokens that stay when it overflows
        # one tensor for keys and values of all layers: a view of it is made once a step, not once
        # a layer. Memory is taken page by page, as it is written to
        self.all = torch.zeros(len(layers), 2, batch, config.n_kv_head, self.room, config.head_dim,
                               device=device, dtype=dtype)
        self.kv = {i: pair.unbind() for i, pair in zip(layers, self.all.unbind())}
        self.fill = [0] * batch                     # tokens in each row

    def begin(self, T: int, positions: Tensor | None, counts: list[int]) -> None:
        """Make the views for the next T tokens, in each layer; positions as in Cache.at()."""
        end = max(self.fill)
        self.over, self.end, self.counts = end + T > self.room, end, counts
        self.places = positions
        if not self.over:
            # for each layer its keys, then its values: (B, Hkv, T, D) and (B, Hkv, end + T, D)
            new = self.all[..., end:end + T, :].flatten(0, 1).unbind()
            seen = self.all[..., :end + T, :].flatten(0, 1).unbind()
            self.views = dict(zip(self.kv, zip(new[::2], new[1::2], seen[::2], seen[1::2])))

    def put(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v (B, Hkv, T, D); return all keys and values up to the longest row's end."""
        if k.requires_grad:                     # what is remembered is data: nothing learns from it
            k, v = k.detach(), v.detach()
        if self.over:
            return self.put_over(layer, 0, k), self.put_over(layer, 1, v)
        new_k, new_v, keys, values = self.views[layer]
        if self.places is None:
            new_k.copy_(k)
            new_v.copy_(v)
        else:
            rows = torch.arange(k.shape[0], device=k.device).unsqueeze(1)           # (B, 1)
            for held, x in zip(self.kv[layer], (k, v)):
                held[rows, :, self.places] = x.transpose(1, 2)
        return keys, values

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

    def advance(self, T: int) -> None:
        self.fill = [min(f + c, self.keep) if self.over else f + c
                     for f, c in zip(self.fill, self.counts)]


class Cache:
    """What the attention of every layer remembers of the tokens seen.

    Rows may hold different numbers of tokens (`lengths`): a ragged batch of prompts is run padded
    on the right after expect() has said how many of each row are real, and each row goes on at
    its own position. Lengths live on the host: a uniform batch never makes a GPU wait.
    """

    def __init__(self, config: Any, batch: int, length: int, device, dtype):
        windows = [config.window(i) for i in range(config.n_layer)]
        stores = {w: Store(config, [i for i, x in enumerate(windows) if x == w], w, batch, length,
                           device, dtype) for w in set(windows)}
        self.stores, self.of_layer = list(stores.values()), [stores[w] for w in windows]
        self.length, self.device = length, device
        self.lengths, self.counts = [0] * batch, None

    @property
    def end(self) -> int:
        return max(self.lengths)

    def expect(self, counts: list[int]) -> None:
        """Say how many tokens of each row of the next call are real; the others are padding."""
        self.counts = counts

    def trim(self, lengths: list[int]) -> None:
        """Forget the tokens of each row beyond lengths; after a full window at most Store.SPARE."""
        for store in self.stores:
            store.fill = [f - (old - new) for f, old, new in
                          zip(store.fill, self.lengths, lengths)]
            if min(store.fill) < 0:
                raise UserError(f"the cache cannot go back to {lengths} tokens: the window's keys "
                                "before them are gone; encode the text again")
        self.lengths = list(lengths)

    def at(self, fill: list[int], T: int) -> Tensor | None:
        """Places of the next T tokens of each row, (batch, T); None where all rows agree."""
        if len(set(fill)) == 1:
            return None
        return torch.tensor(fill, device=self.device).unsqueeze(1) + torch.arange(
            T, device=self.device)

    def positions(self, T: int) -> Tensor | None:
        return self.at(self.lengths, T)

    def begin(self, T: int) -> None:
        """Before the layers of a step put T tokens: what they have in common is done once."""
        for store in self.stores:
            store.begin(T, self.at(store.fill, T), self.counts or [T] * len(self.lengths))

    def put(self, layer: int, k: Tensor, v: Tensor):
        """Store k, v; return (keys, values, places of the queries among them or None)."""
        store = self.of_layer[layer]
        return *store.put(layer, k, v), store.places

    def advance(self, T: int) -> None:
        counts = self.counts or [T] * len(self.lengths)
        for store in self.stores:
            store.advance(T)
        self.lengths = [n + c for n, c in zip(self.lengths, counts)]
        self.counts = None


if __name__ == "__main__":
    refuse_to_run()
