"""What a batch is, and which of its tokens count.

    batch = {"ids": (B, T) int64, "targets": (B, T) int64, -100 where nothing is learnt}
    batch["doc"]                        # (B, T), where rows hold several documents: their numbers
    loss(model, batch) -> (sum, weight, metrics)        # sums, never means
"""
from __future__ import annotations

from typing import Any, Callable

from config import refuse_to_run

import torch
from torch import Tensor


Batch = dict[str, Any]                  # tensors; of a micro-batch, "whole" is what it is part of
Loss = Callable[[Any, Batch], tuple[Tensor, Tensor, dict]]


def count_targets(batch: Batch) -> Tensor:
    """Return the number of tokens that are trained on."""
    return (batch["targets"] >= 0).sum()


def find_targets(targets: Tensor) -> Tensor:
    """Return the places (n,) of flattened targets (B, T) that are trained on, at least one: no
    kernel takes an empty tensor, and the target -100 at place 0 counts for nothing."""
    places = (targets.flatten() >= 0).nonzero()[:, 0]
    return places if len(places) else places.new_zeros(1)


def mask_trained_documents(batch: Batch) -> Tensor:
    """Return the mask (B, D) of the documents, by number, that have a target; D is one more than
    the largest number in "doc". Without "doc" a row is one document."""
    targets = batch["targets"]
    doc = batch["doc"].long() if "doc" in batch else torch.zeros_like(targets)
    hits = torch.zeros(len(doc), int(doc.max()) + 1, device=doc.device)
    return hits.scatter_reduce_(1, doc, (targets >= 0).float(), "amax") > 0


def mask_valid_tokens(batch: Batch) -> Tensor:
    """Return the mask (B, T) of the tokens that are not padding: those of a document with a target.
    Every conversation has an answer, and of text every token is a target."""
    is_target = batch["targets"] >= 0
    if is_target.all():
        return is_target
    doc = batch["doc"].long() if "doc" in batch else torch.zeros_like(batch["targets"])
    return mask_trained_documents(batch).gather(1, doc)


if __name__ == "__main__":
    refuse_to_run()
