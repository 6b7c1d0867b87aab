"""Matching a student's hidden states to its teacher's: the projections, and what they compare.

    matching = Matching(pairs=3, C=128, Ct=512, seed=0)     # P of each pair of layers
    seen = watch(model, spread(2, 12))                      # hidden states behind blocks 5 and 11
    loss = matching([(h, known), ...], counts)              # sum of 1 - cos(P h, known)
"""
from __future__ import annotations

from config import refuse_to_run

import torch
from torch import Tensor
from torch.nn import Module, Parameter

import kernels
from model import Transformer


def spread(count: int, among: int) -> list[int]:
    """Return `count` layers of `among`, evenly, the last one among them: 3 of 12 are 3, 7 and
    11."""
    return [round((k + 1) * among / count) - 1 for k in range(count)]


class Matching(Module):
    """Projections P (Ct, C) from the student's hidden states to the teacher's, one for each pair
    of layers, where the widths differ (Jiao 2019, TinyBERT, arXiv:1909.10351)."""

    def __init__(self, pairs: int, C: int, Ct: int, seed: int):
        super().__init__()
        draw = torch.Generator().manual_seed(seed)          # the same on every rank
        for k in range(pairs if C != Ct else 0):
            P = torch.randn(Ct, C, generator=draw) / C ** 0.5
            self.register_parameter(f"P{k}", Parameter(P))

    def forward(self, states: list[tuple[Tensor, Tensor]], counts: Tensor) -> Tensor:
        """Return the sum of 1 - cos(P h, h') over the tokens that count and the mean over pairs of
        layers.

        states: pairs (B, T, C), (B, T, Ct); counts (B, T). The cosine is DistilBERT's (Sanh 2019,
        arXiv:1910.01108): half the squared distance of the states, each scaled to length 1.
        """
        total = counts.new_zeros(())
        for (h, known), P in zip(states, list(self.parameters()) or [None] * len(states)):
            h = (h if P is None else kernels.linear(h, P)).float()
            known = known.float()
            cos = (h * known).sum(-1) / (h.norm(dim=-1) * known.norm(dim=-1)).clamp(min=1e-6)
            total = total + ((1 - cos) * counts).sum()
        return total / len(states)


def watch(model: Transformer, layers: list[int]) -> list[Tensor]:
    """Return a list that each forward fills with the hidden states behind these blocks, in
    order."""
    seen: list[Tensor] = []
    for i in layers:
        model.model.layers.get_submodule(str(i)).register_forward_hook(
            lambda module, args, out: seen.append(out[0]))
    return seen


if __name__ == "__main__":
    refuse_to_run()
