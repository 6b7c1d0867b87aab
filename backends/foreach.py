"""The optimizer steps by PyTorch's fused and multi-tensor operators: one call for all tensors.

    kernels.adamw(params, grads, m, v, step=1, lr=1e-3, ...)        # on any device, by default
"""
from __future__ import annotations

import math

from config import refuse_to_run

import torch

import kernels


@kernels.adamw.torch
def adamw_torch(params, grads, m, v, *, step, lr, beta1, beta2, eps, weight_decay):
    # one fused pass over p, g, m, v; a single counter serves all: the kernel only reads it
    count = torch.tensor(float(step), device=params[0].device)
    torch._fused_adamw_(list(params), list(grads), list(m), list(v), [], [count] * len(params),
                        lr=lr, beta1=beta1, beta2=beta2, weight_decay=weight_decay, eps=eps,
                        amsgrad=False, maximize=False)


@kernels.muon.torch
def muon_torch(params, grads, momentum, *, lr, beta, weight_decay, steps=5):
    # matrices of one shape go through Newton-Schulz together, in bfloat16
    torch._foreach_lerp_(list(momentum), list(grads), 1 - beta)
    shapes: dict[tuple, list[int]] = {}
    for i, p in enumerate(params):
        shapes.setdefault(tuple(p.shape), []).append(i)
    for (rows, cols), members in shapes.items():
        stack = torch.stack([grads[i].lerp(momentum[i], beta).bfloat16() for i in members])
        updates = kernels.newton_schulz(stack, steps).float().unbind()
        group = [params[i] for i in members]
        torch._foreach_mul_(group, 1 - lr * weight_decay)
        torch._foreach_add_(group, updates, alpha=-lr * math.sqrt(max(1.0, rows / cols)))


@kernels.clip_grad_norm.torch
def clip_grad_norm_torch(grads, max_norm, scale=1.0):
    grads = list(grads)
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads))) * scale
    limit = (max_norm / (norm + 1e-6)).clamp(max=1.0) * scale if max_norm else scale
    torch._foreach_mul_(grads, limit)
    return norm


if __name__ == "__main__":
    refuse_to_run()
