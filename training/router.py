"""What trains the routers of an MoE model: load, balance loss and z loss of the global batch.

    whole = router.GlobalBatch(batch, machine)          # of a step, before it is cut
    whole.count_ahead(model, micro_batches, seed)       # the load, if more than one follows
    extra, metrics = router.compute_losses(cfg, routes, micro_batch, count_targets)

With f_i the share of the valid tokens that chose expert i and P_i its mean probability over them,

    balance = E sum_i f_i P_i           (Fedus 2021, arXiv:2101.03961; at its least k)
    z = mean (log sum exp logits)^2     (Zoph 2022, arXiv:2202.08906), keeps the logits small

averaged over layers. Padding is no token. All of it is that of the global batch, however this is
cut into micro-batches and ranks. z and load are sums over tokens, so parts add up; balance is a
product of two means and does not. But f has no gradient, and balance is linear in P: a micro-batch
adds E sum_i f_i (its part of P_i), exactly, if it knows f of the global batch before its backward.

What that costs: one all-reduce of (layers, E) numbers a step. With several micro-batches a rank
also runs the blocks of all but the first a second time, forward only, to count them: less than a
third of a step, 4% with 2 and 11% with 8 micro-batches of a small Qwen3-MoE on a CPU. It is nothing
with a coefficient of 0 (routers that are balanced by their bias, as DeepSeek-V3's), nor with
--router_sequence_wise=1, where f and P are of one row, which no cut goes through.
"""
from __future__ import annotations

from typing import Any, Callable, Sequence

from config import refuse_to_run

import torch
from torch import Tensor

from layers.unwrap import unwrap
from training.batch import Batch, mask_valid_tokens

Routes = list[dict[str, Tensor]]        # what each router saw: see model.MoE.forward


class GlobalBatch:
    """The batch of a step as a whole: how many tokens it has, and the load of its experts.

    machine: what sums over the ranks; without it the batch is neither cut nor shared.
    """

    def __init__(self, batch: Batch, machine: Any = None):
        self.batch = batch
        self.machine = machine
        valid = mask_valid_tokens(batch)
        self.tokens = max(1, int(valid.sum()))
        self.rows = max(1, int(valid.any(1).sum()))
        self.counts: dict[Callable, int] = {}
        self.ahead: Tensor | float = 0.0        # load of this rank's later micro-batches
        self.load: Tensor | None = None         # (layers, E), of all of them on all ranks

    def count(self, count_of: Callable[[Batch], Tensor]) -> int:
        """Return what a loss divides its sum by: its targets, say, or its pairs."""
        if count_of not in self.counts:
            self.counts[count_of] = int(count_of(self.batch))
        return self.counts[count_of]

    def count_ahead(self, model: Any, micro_batches: Sequence[Batch], seed: int) -> None:
        """Count the load of all micro-batches but the first, which completes it on its own way.

        With gradients switched on, though they are not used: other kernels round otherwise, and a
        token between two experts could change its mind. Dropout draws by the micro-batch's seed.
        """
        for i, micro in enumerate(micro_batches[1:], 1):
            seed_micro_batch(seed, i)
            _, routes = model(micro["ids"], doc=micro.get("doc"), router=True,
                              head=lambda hidden, weight: hidden[:, :0])
            if not routes:                      # first_k_dense_replace may leave no layer
                return
            valid = mask_valid_tokens(micro)
            self.ahead = self.ahead + torch.stack([sum_tokens(seen, valid)[0].sum(0)
                                                   for seen in routes])

    def shares(self, load: Tensor) -> Tensor:
        """f (layers, E); load: that of the first micro-batch, later ones are known already."""
        if self.load is None:
            self.load = load + self.ahead
            if self.machine is not None:
                self.load = self.machine.add(self.load)
        return self.load / self.tokens


def seed_micro_batch(seed: int, number: int) -> None:
    """Seed the dropout of a micro-batch, so that it can be run twice; the first has the step's."""
    torch.manual_seed(seed + (number << 40))


def needs_routes(config: Any) -> bool:
    """Return whether a forward shall return what the routers saw: of an MoE model that learns."""
    return config.num_experts > 0 and torch.is_grad_enabled()


def is_product_of_means(cfg: Any) -> bool:
    """Return whether the loss of a micro-batch depends on the load of the others."""
    return cfg.router_aux_loss_coef != 0 and not cfg.router_sequence_wise


def sum_tokens(seen: dict[str, Tensor], valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (load (B, E), probability (B, E), z ()): sums over the valid tokens, of one layer."""
    scores = seen["scores"]                                                     # (B, T, E)
    mask = valid.unsqueeze(-1)
    hits = torch.zeros_like(scores).scatter_(-1, seen["chosen"], 1.0) * mask
    p = scores / scores.sum(-1, keepdim=True)           # sigmoid scores do not add up to 1
    z = torch.logsumexp(seen["logits"], -1).square()
    return hits.detach().sum(1), (p * mask).sum(1), (z * valid).sum()


def multiply_means(f: Tensor, P: Tensor) -> Tensor:
    """balance of (..., E) shares and mean probabilities, (...)."""
    return f.shape[-1] * (f * P).sum(-1)


def compute_losses(cfg: Any, routes: Routes, batch: Batch, count_of: Callable[[Batch], Tensor]
                   ) -> tuple[Tensor | float, dict[str, Tensor]]:
    """Return (the routers' losses, to be added to a loss that is a sum; their metrics).

    batch["whole"] is the GlobalBatch that this micro-batch is a part of; without it, it is whole.
    count_of(batch): what the sum is divided by in the end. Metrics: load and probability are sums
    over tokens (layers, E); balance is multiplied by the count, like every metric.
    """
    if not routes:                              # first_k_dense_replace may leave no layer
        return 0.0, {}
    whole = batch.get("whole")
    valid = mask_valid_tokens(batch)
    alone = whole is None
    whole = GlobalBatch(batch) if alone else whole
    sums = zip(*(sum_tokens(seen, valid) for seen in routes))
    load, probability, z = (torch.stack(values) for values in sums)     # (L, B, E) twice, (L,)
    metrics = {"load": load.sum(1), "probability": probability.detach().sum(1)}
    weight = whole.count(count_of)
    total = weight * cfg.router_z_loss_coef * z.mean() / whole.tokens
    if cfg.router_sequence_wise:
        tokens = valid.sum(1, keepdim=True).clamp(min=1)                # (B, 1)
        balance = multiply_means(load / tokens, probability / tokens).sum(1) / whole.rows
    elif alone or is_product_of_means(cfg):
        f = whole.shares(metrics["load"])
        balance = multiply_means(f, probability.sum(1) / whole.tokens)
    else:
        return total, metrics                   # of no weight: report() makes it of the sums
    balance = weight * balance.mean()
    return total + cfg.router_aux_loss_coef * balance, {**metrics, "balance": balance.detach()}


def run_model(cfg: Any, model: Any, batch: Batch, head: Callable,
              count_of: Callable[[Batch], Tensor]) -> tuple[Any, Tensor | float, dict[str, Tensor]]:
    """Return (what `head` makes of the hidden states, the routers' losses, their metrics); the last
    two are 0 and {} for a model without experts, and where nothing is learnt."""
    routed = needs_routes(unwrap(model).config)
    out = model(batch["ids"], doc=batch.get("doc"), router=routed, head=head)
    if not routed:
        return out, 0.0, {}
    out, routes = out
    return out, *compute_losses(cfg, routes, batch, count_of)


def report(cfg: Any, whole: GlobalBatch, load: Tensor, probability: Tensor) -> dict[str, float]:
    """Return what the log says of a step; load and probability (layers, E) are of the global batch.

    load_max: the busiest expert's load as a multiple of an even share; idle_experts: those that no
    token chose; balance, unless each row has its own.
    """
    said = {"load_max": (load.amax(-1) / load.mean(-1)).max().item(),
            "idle_experts": int((load == 0).sum())}
    if not cfg.router_sequence_wise:
        means = (load / whole.tokens, probability / whole.tokens)
        said["balance"] = multiply_means(*means).mean().item()
    return said


if __name__ == "__main__":
    refuse_to_run()
