"""The second half of a block: an MLP, or an MoE layer: a router and its experts."""
from __future__ import annotations

from typing import Any, Callable

from config import refuse_to_run

import torch
from torch import Tensor
from torch.nn import Module, Parameter

import kernels
from layers.basic import Embedding, Linear, glu_through, linear_together


class MLP(Module):
    """down(act(up x)), or gated: down(act(gate x) * up x) (Shazeer 2020)."""
    joined: Callable | None = None          # gate and up in one, where quantize.pack() made it

    def __init__(self, config: Any, width: int):
        super().__init__()
        c = config
        self.config = config
        self.width = width
        self.joined_layers = {"joined": ("gate_proj", "up_proj")} if c.gated else {}
        if c.gated:
            self.gate_proj = Linear(c.n_embd, width, c.mlp_bias)
        self.up_proj = Linear(c.n_embd, width, c.mlp_bias)
        self.down_proj = Linear(width, c.n_embd, c.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.config.gated:
            both = self.joined(x) if self.joined else linear_together(
                x, self.gate_proj, self.up_proj)
            gate, up = both.split_with_sizes([self.width, self.width], -1)
            return glu_through(self.down_proj, gate, up, self.config.activation)
        return self.down_proj(kernels.ACTIVATIONS[self.config.activation](self.up_proj(x)))


class MoE(Module):
    """Each token through the k experts that a router chooses for it, and the shared ones.

    scores = softmax or sigmoid of the router's logits, float32; chosen: the k largest of scores
    + bias; shares: their scores, without the bias. The bias is no parameter that gradients move:
    it evens the load out (Wang 2024, arXiv:2408.15664; DeepSeek-V3), see balance().
    """

    def __init__(self, config: Any):
        super().__init__()
        c = config
        self.config = config
        E = c.num_experts
        narrow = c.moe_intermediate_size
        self.gate = Embedding(E, c.n_embd)
        if c.router_bias:
            self.gate.e_score_correction_bias = Parameter(torch.zeros(E), requires_grad=False)
        self.experts = Module()                     # stacked, so that a matmul can take them all
        self.experts.gate_proj = Parameter(torch.empty(E, narrow, c.n_embd))
        self.experts.up_proj = Parameter(torch.empty(E, narrow, c.n_embd))
        self.experts.down_proj = Parameter(torch.empty(E, c.n_embd, narrow))
        if c.n_shared_experts:
            self.shared_experts = MLP(c, narrow * c.n_shared_experts)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """x (B, T, C) -> (y (B, T, C), {"scores" (B, T, E), "logits" (B, T, E), "chosen"})."""
        c = self.config
        logits = kernels.linear(x.float(), self.gate.weight)                # (B, T, E)
        scores = kernels.softmax(logits) if c.scoring_func == "softmax" else logits.sigmoid()
        bias = self.gate.e_score_correction_bias if c.router_bias else 0.0
        chosen = (scores + bias).topk(c.num_experts_per_tok, -1).indices    # (B, T, k)
        share = scores.gather(-1, chosen)
        if c.norm_topk_prob:
            # with k = 1 a share is 1 whatever the router says, and it learns nothing
            share = share / (share.sum(-1, keepdim=True) + 1e-20)
        share = share * c.routed_scaling_factor
        e = self.experts
        k = c.num_experts_per_tok
        y = kernels.moe(x.reshape(-1, x.shape[-1]), chosen.reshape(-1, k), share.reshape(-1, k),
                        e.gate_proj, e.up_proj, e.down_proj, c.activation).view_as(x)
        if c.n_shared_experts:
            y = y + self.shared_experts(x)
        return y, {"scores": scores, "logits": logits, "chosen": chosen}


if __name__ == "__main__":
    refuse_to_run()
