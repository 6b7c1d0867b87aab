"""Attention as a mixer: projections, norms of q and k, rotary positions, keys and values.

A mixer is what a layer's `layer_types` names: forward(x, context), and a decode state of its own.
"""
from __future__ import annotations

from typing import Any, Callable, Sequence

from config import refuse_to_run

import torch
from torch import Tensor
from torch.nn import Module

import kernels
from layers.basic import Linear, Norm, linear_together
from layers.context import Context
from layers.flops import Flops, trains
from layers.kv_cache import KeyValues


class Attention(Module):
    """Causal attention over all tokens before, or over the newest ones (a window), with heads that
    may share keys (GQA, Ainslie 2023)."""
    name = "self_attn"                      # of the module in a block, as in Hugging Face's files
    joined_layers = {"joined": ("q_proj", "k_proj", "v_proj")}
    joined: Callable | None = None          # q, k and v in one, where quantize.pack() made it

    def __init__(self, config: Any, layer: int):
        super().__init__()
        c = config
        self.config = config
        self.layer = layer
        inner = c.n_head * c.head_dim
        narrow = c.n_kv_head * c.head_dim
        self.q_proj = Linear(c.n_embd, inner, c.qkv_bias)
        self.k_proj = Linear(c.n_embd, narrow, c.qkv_bias)
        self.v_proj = Linear(c.n_embd, narrow, c.qkv_bias)
        self.o_proj = Linear(inner, c.n_embd, c.o_bias)
        if c.qk_norm:
            self.q_norm = Norm(c, inner if c.qk_norm_whole else c.head_dim, "rmsnorm")
            self.k_norm = Norm(c, narrow if c.qk_norm_whole else c.head_dim, "rmsnorm")
        self.window = c.window(layer)
        # which of the two tables of rope() this layer reads; None: it has no positions
        self.table = None if layer in (c.nope_layers or ()) else bool(
            self.window and c.rope_local_theta)

    @property
    def state_key(self) -> Any:
        """What layers have in common that share a state: the window."""
        return Attention, self.window

    def new_state(self, batch: int, length: int, device: torch.device, dtype: torch.dtype,
                  layers: Sequence[int]) -> KeyValues:
        """Return an empty decode state of `layers`, which share it, for `length` tokens a row."""
        return KeyValues(self.config, layers, self.window, batch, length, device, dtype)

    def state_size(self, length: float) -> float:
        """Return the numbers of a row of `length` tokens: keys and values, of a window at most."""
        c = self.config
        return 2 * c.n_kv_head * c.head_dim * min(length, self.window or length)

    def add_flops(self, flops: Flops, has_grad: bool, T: int) -> bool:
        """Add the FLOPs of a token of a context of T; has_grad: whether x has a gradient; return
        whether the result has one."""
        c = self.config
        has_grad = flops.multiply(has_grad, self.q_proj, self.k_proj, self.v_proj)
        has_grad = has_grad or c.qk_norm and trains(self.q_norm, self.k_norm)
        flops.add(4 * min(T, self.window or T) * c.n_head * c.head_dim, 2 * has_grad)
        return flops.multiply(has_grad, self.o_proj)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """x (B, T, C) -> (B, T, C)."""
        c = self.config
        B, T, _ = x.shape
        H = c.n_head
        K = c.n_kv_head
        qkv = self.joined(x) if self.joined else linear_together(
            x, self.q_proj, self.k_proj, self.v_proj)
        # q and k stay side by side until they have turned: one operation for both
        qk, v = qkv.view(B, T, H + 2 * K, c.head_dim).split_with_sizes([H + K, K], 2)
        if c.qk_norm:
            shape = (B, T, -1) if c.qk_norm_whole else (B, T, -1, c.head_dim)
            q, k = (y.reshape(shape) for y in qk.split_with_sizes([H, K], 2))
            heads = (y.view(B, T, -1, c.head_dim) for y in (self.q_norm(q), self.k_norm(k)))
            qk = torch.cat(tuple(heads), 2)
        if context.rope is not None and self.table is not None:
            qk = context.rope[self.table](qk)
        q, k = qk.split_with_sizes([H, K], 2)                                  # (B, T, H, D)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))                       # (B, H, T, D)
        positions = None
        if context.cache is not None:
            k, v, positions = context.cache.states[self.layer].put(self.layer, k, v)
        y = kernels.attention(q, k, v, scale=c.attention_multiplier, window=self.window,
                              softcap=c.attn_logit_softcapping, doc=context.doc,
                              positions=positions, dropout_p=c.dropout * self.training)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


if __name__ == "__main__":
    refuse_to_run()
