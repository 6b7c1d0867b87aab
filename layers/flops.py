"""FLOPs of a token through a decoder, forward and backward: what MFU is made of.

    count_flops(model, T=1024)                  # of training, with what is frozen left out
    count_flops(model, T=1024, training=False)  # of a forward

2 for each weight of a matrix that the token meets, plus q k^T and p v over T keys, or a window's
(counted whole, as PaLM's appendix B does, though a causal kernel skips half). A backward has up to
two matmuls of the same size: one for the gradient of the input, if anything before it trains, and
one for that of the weight, if it trains itself. So LoRA costs about two thirds of full training,
and below the first weight that trains there is no backward. What a step does once, whatever its
tokens, is left out: the norms of DoRA, the merged matrix of adapters on lm_head.
tests/training/test_statistics.py holds this against torch.utils.flop_counter.
"""
from __future__ import annotations

from typing import Any, Iterable

from config import refuse_to_run

from torch.nn import Module


def trains(*modules: Module | None) -> bool:
    """Return whether any parameter of these modules has a gradient."""
    return any(p.requires_grad for module in modules if module for p in module.parameters())


class Flops:
    """The matmuls of a token, added up; `has_grad` says of an input whether it has a gradient."""

    def __init__(self) -> None:
        self.forward = 0
        self.backward = 0

    def add(self, flops: float, gradients: int) -> None:
        """Add a matmul and the number of gradients that its backward computes."""
        self.forward += flops
        self.backward += flops * gradients

    def multiply(self, has_grad: bool, *layers: Module) -> bool:
        """Add x W^T of layers side by side, adapters included; return whether the output has a
        gradient."""
        for layer in layers:
            for name, p in layer.named_parameters():
                adapter = ".adapters." in f".{name}"
                if p.ndim < 2 or adapter and not p.requires_grad:   # one that is switched off
                    continue
                # B of an adapter reads A x, which has a gradient as A trains
                input_has_grad = has_grad or adapter and name.endswith(".B")
                self.add(2 * p.numel(), input_has_grad + p.requires_grad)
        return has_grad or trains(*layers)

    def feed(self, has_grad: bool, mlp: Module) -> bool:
        """Add a gated or plain MLP."""
        first: Iterable[Module] = [m for n, m in mlp.named_children() if n != "down_proj"]
        return self.multiply(self.multiply(has_grad, *first), mlp.down_proj)

    def route(self, has_grad: bool, moe: Module, c: Any) -> bool:
        """Add an MoE layer: its router, the k chosen experts, the shared ones."""
        routed = self.multiply(has_grad, moe.gate)
        e = moe.experts                                 # stacks (E, …), of which a token meets k
        flops = 2 * e.gate_proj[0].numel() * c.num_experts_per_tok
        self.add(flops, has_grad + e.gate_proj.requires_grad)
        self.add(flops, has_grad + e.up_proj.requires_grad)
        inner = has_grad or e.gate_proj.requires_grad or e.up_proj.requires_grad
        self.add(flops, inner + e.down_proj.requires_grad)
        shared = c.n_shared_experts > 0 and self.feed(has_grad, moe.shared_experts)
        return routed or shared or trains(e)


def count_flops(model: Module, T: int, training: bool = True, targets: float = 1.0) -> float:
    """Return the FLOPs that a token of a context of T costs; targets: the share of tokens that meet
    the output matrix."""
    c = model.config
    flops = Flops()
    inner = model.model
    has_grad = trains(inner.embed_tokens, getattr(inner, "embed_positions", None))
    for i, block in enumerate(inner.layers.children()):
        norms = {name: trains(m) for name, m in block.named_children() if name.endswith("norm")}
        before = has_grad or norms.get("input_layernorm", False)
        y = block.mixer.add_flops(flops, before, T)
        has_grad = has_grad or y or norms.get("post_self_attn_layernorm", False)
        if c.norm_placement != "parallel":
            before = has_grad or norms.get("post_attention_layernorm", False)
        y = flops.route(before, block.mlp, c) if c.is_moe(i) else flops.feed(before, block.mlp)
        has_grad = has_grad or y or norms.get("post_mlp_layernorm", False)
    head = inner.embed_tokens if c.tie_word_embeddings else model.lm_head
    has_grad = has_grad or trains(inner.norm)
    flops.add(2 * targets * c.vocab_size * c.n_embd, has_grad + trains(head))
    return flops.forward + flops.backward * training


if __name__ == "__main__":
    refuse_to_run()
