"""The optimizer: which parameter gets which rule, AdamW or Muon, and what they remember.

    optimizer = Optimizer(model.named_parameters(), kind="muon", learning_rate=1e-3)
    optimizer.step(lr_scale=0.5)                     # half of every learning rate

The steps themselves are operations of kernels.py. tests/training/test_optim.py holds AdamW against
torch.optim.AdamW and Muon against the singular value decomposition that it approximates.
"""
from __future__ import annotations

from typing import Iterable

from config import UserError, refuse_to_run

import torch
from torch import Tensor
from torch.nn import Parameter

from kernels import adamw, muon

class Optimizer:
    """AdamW on everything, or Muon on the hidden matrices and AdamW on the rest.

    Weight decay falls on tensors of two dimensions or more under both rules, as in nanoGPT; it is
    decoupled, so a step shrinks a matrix by its own rule's learning rate x weight_decay. Embeddings
    and the output matrix stay with AdamW: their rows are independent vectors, not one linear map.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, Parameter]], kind: str = "adamw",
                 learning_rate: float = 6e-4, beta1: float = 0.9, beta2: float = 0.95,
                 eps: float = 1e-8, weight_decay: float = 0.1, muon_learning_rate: float = 0.02,
                 muon_momentum: float = 0.95):
        if kind not in ("adamw", "muon"):
            raise UserError(f"unknown optimizer {kind!r}; choose from adamw, muon")
        self.count = 0                                   # steps taken
        self.adam = dict(beta1=beta1, beta2=beta2, eps=eps)
        self.rates = dict(adamw=learning_rate, muon=muon_learning_rate)
        self.momentum = muon_momentum
        named = [(n, p) for n, p in named_parameters if p.requires_grad]
        self.names = {id(p): n for n, p in named}
        # experts are stacks of matrices; a router's rows are vectors, one for each expert
        hidden = [p for n, p in named if kind == "muon" and p.ndim >= 2 and ".layers." in n
                  and not n.endswith("mlp.gate.weight")]
        chosen = {id(p) for p in hidden}
        rest = [p for _, p in named if id(p) not in chosen]
        # (rule, parameters, weight decay)
        self.groups = [("muon", hidden, weight_decay),
                       ("adamw", [p for p in rest if p.ndim >= 2], weight_decay),
                       ("adamw", [p for p in rest if p.ndim < 2], 0.0)]
        self.groups = [g for g in self.groups if g[1]]
        self.state = {n: {k: torch.zeros_like(p, dtype=torch.float32) for k in
                          (("m",) if id(p) in chosen else ("m", "v"))} for n, p in named}

    def gradients(self) -> list[Tensor]:
        """Return the gradients that there are."""
        return [p.grad for _, params, _ in self.groups for p in params if p.grad is not None]

    @torch.no_grad()
    def step(self, lr_scale: float = 1.0) -> None:
        """Update every parameter that has a gradient, at lr_scale times its learning rate."""
        self.count += 1
        for rule, params, decay in self.groups:
            params = [p for p in params if p.grad is not None]
            if not params:
                continue
            states = [self.state[self.names[id(p)]] for p in params]
            grads = [p.grad for p in params]
            m = [s["m"] for s in states]
            lr = self.rates[rule] * lr_scale
            if rule == "muon":          # each matrix of a stack by itself
                params, grads, m = ([x for t in ts for x in (t.unbind() if t.ndim == 3 else (t,))]
                                    for ts in (params, grads, m))
                muon(params, grads, m, lr=lr, beta=self.momentum, weight_decay=decay)
            else:
                adamw(params, grads, m, [s["v"] for s in states], step=self.count, lr=lr,
                      weight_decay=decay, **self.adam)

    def zero_grad(self) -> None:
        """Forget the gradients, and free their memory."""
        for _, params, _ in self.groups:
            for p in params:
                p.grad = None

    def state_dict(self) -> dict:
        """Return what a resumed run needs: the number of steps, and each parameter's moments."""
        return {"count": self.count, "state": self.state}

    def load_state_dict(self, saved: dict) -> None:
        """Take over a saved state; UserError if it belongs to another model or optimizer."""
        for name, state in self.state.items():
            other = saved["state"].get(name, {})
            if {k: t.shape for k, t in state.items()} != {k: t.shape for k, t in other.items()}:
                raise UserError(f"the saved optimizer state does not fit parameter {name}: resume "
                                "with the optimizer and the model that the checkpoint was made by")
            for key, tensor in state.items():
                tensor.copy_(other[key])
        self.count = saved["count"]

if __name__ == "__main__":
    refuse_to_run()
