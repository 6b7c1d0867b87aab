"""Optimizer steps by hand: AdamW, Muon and gradient clipping, on lists of tensors.

    optimizer = Optimizer(model.named_parameters(), kind="muon", learning_rate=1e-3)
    norm = clip_grad_norm(grads, max_norm=1.0)       # device scalar: reading it is the only sync
    optimizer.step(lr_scale=0.5)                     # half of every learning rate

The operations belong to the dispatch of kernels.py (`reference`, `torch`, later `triton`); the
class says which parameters get which rule. tests/training/test_optim.py holds AdamW against
torch.optim.AdamW and Muon against the singular value decomposition that it approximates.
"""
from __future__ import annotations

import math
from typing import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from config import UserError, refuse_to_run
from kernels import operation

@operation
def adamw(params: Sequence[Tensor], grads: Sequence[Tensor], m: Sequence[Tensor],
          v: Sequence[Tensor], *, step: int, lr: float, beta1: float, beta2: float, eps: float,
          weight_decay: float) -> None:
    """One AdamW step in place (Loshchilov 2019). `step` counts from 1.

    p <- p (1 - lr wd);  m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2
    p <- p - lr m_hat / (sqrt(v_hat) + eps), hats dividing by 1 - b^step
    """
    for p, g, first, second in zip(params, grads, m, v):
        p.mul_(1 - lr * weight_decay)
        first.mul_(beta1).add_(g, alpha=1 - beta1)
        second.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        denominator = (second / (1 - beta2 ** step)).sqrt() + eps
        p.sub_(lr / (1 - beta1 ** step) * first / denominator)

@adamw.torch
def _(params, grads, m, v, *, step, lr, beta1, beta2, eps, weight_decay):
    # one fused pass over p, g, m, v; a single counter serves all: the kernel only reads it
    count = torch.tensor(float(step), device=params[0].device)
    torch._fused_adamw_(list(params), list(grads), list(m), list(v), [], [count] * len(params),
                        lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay, eps=eps,
                        amsgrad=False, maximize=False)

# Coefficients of the quintic whose repetition pushes singular values towards 1 (Jordan 2024)
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)

def newton_schulz(g: Tensor, steps: int = 5) -> Tensor:
    """Roughly the nearest orthogonal matrices: U V^T of g = U S V^T; g (..., rows, cols).

    x <- a x + (b A + c A^2) x with A = x x^T, from x = g / |g|. Singular values end within
    about 0.7 to 1.2, which is as good as 1 for a descent direction and far cheaper than an SVD.
    """
    a, b, c = NEWTON_SCHULZ
    x = g.reshape(-1, *g.shape[-2:])
    x = x / (torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.shape[-2] > x.shape[-1]             # the smaller side makes the smaller A
    x = x.mT.contiguous() if tall else x
    for _ in range(steps):
        A = torch.bmm(x, x.mT)
        A = torch.baddbmm(A, A, A, beta=b, alpha=c)     # b A + c A A in one pass
        x = torch.baddbmm(x, A, x, beta=a)
    return (x.mT if tall else x).reshape(g.shape)

@operation
def muon(params: Sequence[Tensor], grads: Sequence[Tensor], momentum: Sequence[Tensor], *,
         lr: float, beta: float, weight_decay: float, steps: int = 5) -> None:
    """One Muon step in place on matrices (Jordan 2024): descend along orthogonalised momentum.

    M <- b M + (1 - b) g;  u = newton_schulz(b M + (1 - b) g)          (Nesterov)
    p <- p (1 - lr wd) - lr sqrt(max(1, rows / cols)) u
    """
    for p, g, M in zip(params, grads, momentum):
        M.lerp_(g, 1 - beta)
        u = newton_schulz(g.lerp(M, beta), steps)
        p.mul_(1 - lr * weight_decay)
        p.sub_(lr * math.sqrt(max(1.0, p.shape[0] / p.shape[1])) * u)

@muon.torch
def _(params, grads, momentum, *, lr, beta, weight_decay, steps=5):
    # matrices of one shape go through Newton-Schulz together, in bfloat16
    torch._foreach_lerp_(list(momentum), list(grads), 1 - beta)
    shapes: dict[tuple, list[int]] = {}
    for i, p in enumerate(params):
        shapes.setdefault(tuple(p.shape), []).append(i)
    for (rows, cols), members in shapes.items():
        stack = torch.stack([grads[i].lerp(momentum[i], beta).bfloat16() for i in members])
        updates = newton_schulz(stack, steps).float().unbind()
        group = [params[i] for i in members]
        torch._foreach_mul_(group, 1 - lr * weight_decay)
        torch._foreach_add_(group, updates, alpha=-lr * math.sqrt(max(1.0, rows / cols)))

@operation
def clip_grad_norm(grads: Sequence[Tensor], max_norm: float, scale: Tensor | float = 1.0) -> Tensor:
    """Multiply all gradients by scale, then by max_norm / norm where their norm exceeds it.

    Returns the norm before clipping, a scalar tensor on the gradients' device; max_norm 0 never
    clips. `scale` turns a sum over tokens into a mean without a pass of its own.
    """
    norm = torch.sqrt(sum((g.double() ** 2).sum() for g in grads)).float() * scale
    limit = (max_norm / (norm + 1e-6)).clamp(max=1.0) if max_norm else 1.0
    for g in grads:
        g.mul_(limit * scale)
    return norm

@clip_grad_norm.torch
def _(grads, max_norm, scale=1.0):
    grads = list(grads)
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads))) * scale
    limit = (max_norm / (norm + 1e-6)).clamp(max=1.0) * scale if max_norm else scale
    torch._foreach_mul_(grads, limit)
    return norm

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
            raise UserError(f"optimizer={kind!r} does not exist: choose adamw or muon")
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
        return [p.grad for _, params, _ in self.groups for p in params if p.grad is not None]

    @torch.no_grad()
    def step(self, lr_scale: float = 1.0) -> None:
        """Update every parameter that has a gradient, at lr_scale times its learning rate."""
        self.count += 1
        for rule, params, decay in self.groups:
            live = [p for p in params if p.grad is not None]
            if not live:
                continue
            states = [self.state[self.names[id(p)]] for p in live]
            grads, m, lr = [p.grad for p in live], [s["m"] for s in states], self.rates[rule]
            if rule == "muon":
                live, grads, m = ([x for t in ts for x in (t.unbind() if t.ndim == 3 else (t,))]
                                  for ts in (live, grads, m))
                muon(live, grads, m, lr=lr * lr_scale, beta=self.momentum, weight_decay=decay)
            else:
                adamw(live, grads, m, [s["v"] for s in states], step=self.count,
                      lr=lr * lr_scale, weight_decay=decay, **self.adam)

    def zero_grad(self) -> None:
        for _, params, _ in self.groups:
            for p in params:
                p.grad = None

    def state_dict(self) -> dict:
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
