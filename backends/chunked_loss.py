"""The output layer and its loss, a chunk of rows at a time: PyTorch's operators, without ever
holding the (N, V) logits.

    loss = kernels.linear_cross_entropy(hidden, weight, targets)    # on any device, in training
    total, ce, kl = kernels.linear_kl(hidden, weight, teacher_hidden, teacher_weight, targets=ids)

The logits of a vocabulary of 50k take 200 kB a token in float32, more than all activations of a
small model; here they exist for some hundred rows, and their gradient is made while they are there.
"""
from __future__ import annotations

import math

from config import refuse_to_run

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

import kernels
from kernels import capped, row_losses, widen


class ChunkedLoss(Function):
    """A loss on x W^T, a chunk of rows of logits at a time: (N, V) never exists whole.

    rule(logits, part, learn) -> (loss of the rows, d loss / d logits or None). A sum has one
    known upstream gradient, so dX and dW are made in the forward, while the logits are there;
    a loss per row recomputes them in the backward.
    """
    # elements of a chunk, 64 MB in float32: with half of it, or less than some 300 rows of a
    # vocabulary of 50k, a chunk no longer pays for its pass over dW
    LOGITS = 2 ** 24
    ONE = object()          # the upstream gradient of a sum

    @staticmethod
    def of(x, weight, rule, reduction):
        # needs_input_grad stays true under no_grad, and evaluation would pay three times
        both = (x, weight) if torch.is_grad_enabled() else (x.detach(), weight.detach())
        return ChunkedLoss.apply(*both, rule, reduction)

    @staticmethod
    def walk(x, weight, rule, upstream, frozen=False):
        """Return (loss (N,), dx, dweight); gradients are scaled by upstream (N,); None asks for
        none. frozen: the weight gets none, which is a third of the work (LoRA)."""
        w = weight.to(x.dtype)
        wide = widen(x[:0]).dtype
        dw = None
        loss = torch.zeros(x.shape[0], dtype=wide, device=x.device)
        dx = None if upstream is None else torch.empty_like(x)
        rows = max(1, ChunkedLoss.LOGITS * (8 if x.is_cuda else 1) // weight.shape[0])
        for i in range(0, max(x.shape[0], 1), rows):
            part = slice(i, min(i + rows, x.shape[0]))
            loss[part], dz = rule(widen(x[part] @ w.T), part, upstream is not None)
            if upstream is not None:
                dz = dz if upstream is ChunkedLoss.ONE else dz.mul_(upstream[part].unsqueeze(-1))
                dz = dz.to(x.dtype)
                dx[part] = dz @ w
                if not frozen:      # slice by slice: in a CPU's cache, and no second dW beside it
                    dw = torch.zeros_like(weight, dtype=wide) if dw is None else dw
                    for some, d in zip(dw.split(rows * 16), dz.T.split(rows * 16)):
                        some += d @ x[part]
        return loss, dx, dw

    @staticmethod
    def forward(ctx, x, weight, rule, reduction):
        summed = reduction == "sum"
        learn = summed and any(ctx.needs_input_grad[:2])
        frozen = not ctx.needs_input_grad[1]
        loss, dx, dw = ChunkedLoss.walk(x, weight, rule, ChunkedLoss.ONE if learn else None, frozen)
        ctx.rule = rule
        ctx.summed = summed
        ctx.frozen = frozen
        if any(ctx.needs_input_grad[:2]):
            ctx.save_for_backward(*((dx, dw) if summed else (x, weight)))
        return loss.sum() if summed else loss

    @staticmethod
    def backward(ctx, grad):
        if ctx.summed:
            same = grad.is_cpu and grad.item() == 1     # where looking is free: no second dW
            dx, dw = (d if d is None or same else d * grad.to(d.dtype) for d in ctx.saved_tensors)
        else:
            _, dx, dw = ChunkedLoss.walk(*ctx.saved_tensors, ctx.rule, grad, ctx.frozen)
        return dx, dw, None, None


@kernels.linear_cross_entropy.torch
def linear_cross_entropy_torch(x, weight, targets, *, reduction="sum", **options):
    if torch.compiler.is_compiling():    # a chunk loop would break its graph, and it fuses this
        logits = kernels.linear(x, weight)
        return kernels.cross_entropy(logits, targets, reduction=reduction, **options)
    softcap, z_loss, smooth = map(options.get, ("softcap", "z_loss", "label_smoothing"), [0.0] * 3)
    flat = x.reshape(-1, x.shape[-1])
    labels = targets.reshape(-1)

    def rule(logits, part, learn):
        loss, z, lse, live = row_losses(logits, labels[part], **options)
        if not learn:
            return loss, None
        # d loss / d z = p (1 + 2 z_loss lse) - (1 - e) onehot(target) - e / V
        lse = lse.unsqueeze(-1)
        dz = torch.exp(z - lse).mul_(1 + 2 * z_loss * lse).sub_(smooth / z.shape[-1])
        dz.scatter_add_(-1, labels[part].clamp(min=0)[:, None], torch.full_like(lse, smooth - 1))
        if softcap:
            dz.mul_(1 - (z / softcap) ** 2)
        return loss, dz.mul_(live.unsqueeze(-1))

    loss = ChunkedLoss.of(flat, weight, rule, reduction)
    return loss if reduction == "sum" else loss.view(targets.shape)


def diverge(log_p: Tensor, log_q: Tensor, divergence: str, beta: float) -> tuple[Tensor, Tensor]:
    """Return (D (N,), d D / d z (N, V)) of q = softmax(z) from p; log_q is overwritten.

    With h = d D / d q the gradient is q (h - sum q h): for forward h = -p / q, so q - p.
    """
    if divergence == "forward":
        p = log_p.exp()
        # sum p (log p - log q), without a tensor for the difference
        loss = torch.linalg.vecdot(p, log_p).sub_(torch.linalg.vecdot(p, log_q))
        return loss, log_q.exp_().sub_(p)
    q = log_q.exp()
    if divergence == "reverse":                                 # h = log(q / p) + 1
        h = log_q.sub_(log_p)
        loss = None
    else:                                                       # h = (1 - b) log(q / m)
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log(1 - beta))
        loss = beta * torch.linalg.vecdot(log_p.exp(), log_p - log_m)
        h = log_q.sub_(log_m).mul_(1 - beta)
    mean = torch.linalg.vecdot(q, h)
    return mean if loss is None else loss + mean, h.sub_(mean.unsqueeze(-1)).mul_(q)


@kernels.linear_kl.torch
def linear_kl_torch(x, weight, teacher_x, teacher_weight, *, temperature=1.0, live=None,
                    divergence="forward", beta=0.5, softcap=0.0, teacher_softcap=0.0, cut=0,
                    targets=None, alpha=0.0):
    T = temperature
    V = len(weight)
    flat = x.reshape(-1, x.shape[-1])
    taught = teacher_x.reshape(-1, teacher_x.shape[-1]).detach()            # (N, Ct)
    cut = cut or min(V, len(teacher_weight))
    matrix = teacher_weight.detach()[:cut].to(taught.dtype)                 # (cut, Ct)
    wide = widen(x[:0]).dtype
    counts = flat.new_ones(len(flat), dtype=wide) if live is None else live.reshape(-1).to(wide)
    labels = None if targets is None else targets.reshape(-1, 1)
    a = 0.0 if targets is None else alpha
    sums = torch.zeros(2, dtype=wide, device=x.device)          # of CE and of T^2 D

    def rule(logits, part, learn):
        z = capped(logits, softcap)
        count = counts[part].unsqueeze(-1)
        log_p = torch.log_softmax(
            capped(widen(taught[part] @ matrix.T), teacher_softcap).div_(T), -1)
        log_q = torch.log_softmax(z[:, :cut] / T, -1)
        loss, dz = diverge(log_p, log_q, divergence, beta)
        loss = loss * T ** 2
        dz = dz.mul_((1 - a) * T * count)                       # d D / d logits, times T^2
        if labels is not None:
            log_q = torch.log_softmax(z, -1)
            ce = -log_q.gather(-1, labels[part])[:, 0]
            sums.add_(torch.stack((ce, loss)) @ count[:, 0])
            loss = a * ce + (1 - a) * loss
            # alpha (softmax(z) - onehot), in the one tensor that is as wide as the logits
            total = log_q.exp_().mul_(a * count).scatter_add_(-1, labels[part], -a * count)
            total[:, :cut] += dz
            dz = total
        elif cut < V:
            dz = F.pad(dz, (0, V - cut))
        return loss * count[:, 0], dz.mul_(1 - (z / softcap) ** 2) if softcap else dz

    total = ChunkedLoss.of(flat, weight, rule, "sum")
    return total if targets is None else (total, *sums)


if __name__ == "__main__":
    refuse_to_run()
