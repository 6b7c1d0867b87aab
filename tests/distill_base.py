"""What the tests of this subject share: fixtures and oracles.
"""

import torch
import torch.nn.functional as F

from runs import (quiet_machine)
assert quiet_machine                # a fixture that every test here uses by itself

# ------------------------------------------------------------- the divergences: linear_kl


def divergence(student, teacher, kind, beta, T):
    """T^2 D by rows of logits (N, V), written with PyTorch's kl_div: the oracle."""
    q, p = (torch.log_softmax(z / T, -1) for z in (student, teacher))

    def kl(a, b):
        return F.kl_div(b, a, log_target=True, reduction="none").sum(-1)
    if kind == "js":
        m = torch.log(beta * p.exp() + (1 - beta) * q.exp())
        return T ** 2 * (beta * kl(p, m) + (1 - beta) * kl(q, m))
    return T ** 2 * (kl(p, q) if kind == "forward" else kl(q, p))
