"""LoRA's layers: what lora.py trains, saves and merges (Hu 2021, arXiv:2106.09685).

    from layers.lora import add_lora, merge
    add_lora(model, rank=8, alpha=16, targets="q_proj,v_proj,lm_head:4")

A linear layer y = W x + b becomes, in its place, y = W x + b + s B A x with W frozen; the docstring
of lora.py has the variants.
"""
from __future__ import annotations

import contextlib
import math
import re
import reprlib
from collections import Counter
from typing import Any, Iterator, Sequence

from config import UserError, refuse_to_run

import torch
from torch import Tensor
from torch.nn import Module, Parameter

import kernels
from layers.basic import Linear
from layers.packed import Int8
from layers.unwrap import unwrap

# ------------------------------------------------------------------------------ the layers


class Adapter(Module):
    """The trained part beside one W (N, K): A (r, K), B (N, r) and, of DoRA, magnitude (N,)."""

    def __init__(self, base: Tensor, A: Tensor, B: Tensor, magnitude: Tensor | None, alpha: float,
                 dropout: float = 0.0, rslora: bool = False):
        super().__init__()
        # where W is, and never in half precision, which would lose small steps
        kind = dict(device=base.device, dtype=torch.promote_types(base.dtype, torch.float32))
        self.A, self.B, self.magnitude = (None if t is None else Parameter(t.to(**kind, copy=True))
                                          for t in (A, B, magnitude))
        self.alpha = alpha
        self.dropout = dropout
        self.rslora = rslora

    @property
    def scale(self) -> float:
        return self.alpha / len(self.A) ** (0.5 if self.rslora else 1)

    def narrow(self, x: Tensor) -> Tensor:
        """Return s A x: (..., K) -> (..., r). Dropout falls on this branch and in
        training only."""
        if self.dropout and self.training:
            x = kernels.dropout(x, self.dropout)
        return kernels.linear(x, self.A) * self.scale       # here, where activations are thin

    def stretch(self, base: Tensor) -> Tensor:
        """Return DoRA's magnitude / |W + s B A| of each row, (N,). The norm is a constant in the
        backward, which saves memory and costs no accuracy (Liu 2024, section 4.3)."""
        with torch.no_grad():
            length = (base + self.scale * (self.B @ self.A)).norm(dim=1)
        return self.magnitude / length

    def change(self, base: Tensor) -> Tensor:
        """Return what the adapter adds to W, (N, K)."""
        delta = self.scale * (self.B @ self.A)
        if self.magnitude is None:
            return delta
        stretch = self.stretch(base).unsqueeze(1)
        return (stretch - 1) * base + stretch * delta


class FromInt8(torch.autograd.Function):
    """y = x W^T + b with W = q s unpacked at every use: a plain product would keep the unpacked W
    of every layer until the backward. x (..., K), q (N, K) int8, s and b (N,) -> (..., N)."""
    @staticmethod
    def forward(ctx, x: Tensor, q: Tensor, s: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(q, s)
        return kernels.linear(x, unpack(q, s, x.dtype), bias)

    @staticmethod
    def backward(ctx, g: Tensor):                       # all but x is frozen
        return g @ unpack(*ctx.saved_tensors, g.dtype), None, None, None


def unpack(q: Tensor, s: Tensor, dtype: torch.dtype) -> Tensor:
    """Return W (N, K) = q s, of int8 and one scale per row."""
    return q.to(dtype) * s.to(dtype).unsqueeze(1)


class LoraLinear(Linear):
    """A Linear with adapters by name, of which the `active` ones count; W itself is frozen.

    convert() puts one in the place of a Linear. `weight` is the base, under the name that it had
    before; merged_weight() is base plus active adapters, which is what is saved, packed and served.
    """

    def __init__(self, layer: Linear):
        Module.__init__(self)
        self.weight = layer.weight
        self.bias = layer.bias
        self.adapters = Module()
        self.active: tuple[str, ...] = ()
        self.register_buffer("int8_scale", None)      # (N,) of an int8 base; moves with the model
        self.merged_dtype: torch.dtype | None = None    # of merged_weight(); None: the base's
        self.train(layer.training)

    def round_base(self) -> None:
        """Round W to int8, one scale per row, in place."""
        if self.int8_scale is None:
            packed = Int8(self.base.detach(), None)
            self.weight = Parameter(packed.weight, requires_grad=False)
            self.int8_scale = packed.scale

    @property
    def base(self) -> Tensor:
        """Return W (N, K), unpacked if it is int8."""
        W = self.weight
        return W if self.int8_scale is None else unpack(W, self.int8_scale, torch.float32)

    def merged_weight(self) -> Tensor:
        """Return W plus the changes of the active adapters, (N, K)."""
        base = self.base
        wide = kernels.widen(base)      # bfloat16 would round each adapter's share away
        merged = sum((a.change(wide) for a in self.list_active()), wide)
        return merged.to(self.merged_dtype or base.dtype)

    def list_active(self) -> list[Adapter]:
        """Return the active adapters."""
        return [getattr(self.adapters, name) for name in self.active]

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., N)."""
        shape = x.shape[:-1]
        x = x.reshape(-1, x.shape[-1])
        W = self.weight
        s = self.int8_scale
        bias = self.bias
        used = self.list_active()
        y = kernels.linear(x, W, bias) if s is None else FromInt8.apply(x, W, s, bias)
        if any(a.magnitude is not None for a in used):     # DoRA stretches W x, and not the bias
            plain = y if bias is None else y - bias.to(x.dtype)
        for a in used:
            B = a.B.to(x.dtype)
            if a.magnitude is None:
                # added where the first product lies: no second pass over (..., N)
                y = (y.addmm_ if len(used) == 1 else y.addmm)(a.narrow(x), B.T)
            else:
                stretch = a.stretch(self.base).to(x.dtype)
                y = y + (stretch - 1) * plain + stretch * kernels.linear(a.narrow(x), B)
        return y.view(*shape, -1)

# ---------------------------------------------------------------------------- on a model


def replace_layer(model: Any, name: str, layer: Module) -> None:
    """Put `layer` in the place of the module `name` of a model."""
    owner, _, last = name.rpartition(".")
    setattr(model.get_submodule(owner), last, layer)


def convert(model: Any, name: str, int8: bool = False) -> LoraLinear:
    """Return the linear layer `name` of a model as one that takes adapters, in its place."""
    layer = model.get_submodule(name)
    if not isinstance(layer, LoraLinear):
        layer = LoraLinear(layer)
        replace_layer(model, name, layer)
    if int8:
        layer.round_base()
    return layer


def find_lora_layers(model: Any) -> dict[str, LoraLinear]:
    """Return name -> layer, of the layers of a model that have adapters."""
    return {n: m for n, m in unwrap(model).named_modules() if isinstance(m, LoraLinear)}


def find_linears(model: Any) -> dict[str, Linear]:
    """Return name -> layer, of those that can have adapters: the linears of mixers and MLPs, and an
    untied output matrix, lm_head. Routed experts are stacks of matrices, which get none."""
    return {n: m for n, m in unwrap(model).named_modules() if isinstance(m, Linear)
            and (n.startswith("model.layers.") or n == "lm_head")}


def list_adapters(model: Any) -> list[str]:
    """Return the names of a model's adapters, in the order in which they were added."""
    layers = find_lora_layers(model).values()
    return list(dict.fromkeys(name for la in layers for name, _ in la.adapters.named_children()))


def matches(name: str, *targets: str) -> bool:
    """Return whether a target means a layer: by its name or the end of it, as in PEFT.
    "q_proj" is that of every layer, "layers.0.self_attn.q_proj" that of the first."""
    return any(f".{name}".endswith(f".{target}") for target in targets)


def parse_targets(targets: str | Sequence[str]) -> dict[str, int]:
    """Return names and their ranks: "q_proj,lm_head:8" -> {"q_proj": 0, "lm_head": 8}."""
    text = targets if isinstance(targets, str) else ",".join(targets)
    pairs = [t.partition(":") for t in text.replace(" ", "").split(",") if t]
    for name, colon, rank in pairs:
        if colon and not re.fullmatch("[1-9][0-9]{,5}", rank):
            raise UserError(f"--targets={reprlib.repr(text)}: the rank of {name} must be a "
                            "positive integer")
    return {name: int(rank or 0) for name, _, rank in pairs}


def select_linears(model: Any, targets: str | Sequence[str]) -> dict[str, Linear]:
    """Return the layers that targets name, for "" all of the blocks; refuse unknown ones."""
    linears = find_linears(model)
    targets = parse_targets(targets)
    if wrong := [t for t in targets if not any(matches(n, t) for n in linears)]:
        raise UserError(f"--targets={reprlib.repr(','.join(wrong))} names no linear layer of this "
                        "model: choose from "
                        + ", ".join(dict.fromkeys(n.rpartition(".")[2] for n in linears)))
    return {n: m for n, m in linears.items()
            if (matches(n, *targets) if targets else n != "lm_head")}


def check_model(model: Any, name: str) -> Any:
    """Return the bare model, if it can take an adapter of that name."""
    model = unwrap(model)
    if getattr(model, "output", model) is not None:     # a Transformer's, set by pack()
        raise UserError("adapters are for a Transformer that is not packed: load it again without "
                        "--quantize")
    # the name becomes an attribute and a part of parameter names
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name) or hasattr(Module(), name):
        raise UserError(f"{reprlib.repr(name)} cannot be an adapter's name: use letters and digits")
    if name in list_adapters(model):
        raise UserError(f"the model has an adapter {name!r} already: choose another name")
    return model


def attach(model: Any, made: dict[str, Adapter], name: str) -> dict[str, LoraLinear]:
    """Put adapters on the layers that they are named after, freeze the rest, and activate them."""
    model.requires_grad_(False)
    adapted = {part: layer for part, layer in find_lora_layers(model).items() if part in made}
    for part, layer in adapted.items():
        layer.adapters.add_module(name, made[part].train(layer.training))
    activate(model, name)
    return adapted


def add_lora(model: Any, rank: int = 8, alpha: float = 16.0, dropout: float = 0.0,
             targets: str | Sequence[str] = "", rslora: bool = False, dora: bool = False,
             name: str = "default", int8: bool = False) -> dict[str, LoraLinear]:
    """Freeze the model and give its linears a new adapter, which is active and changes nothing
    yet; return the adapted layers by name (describe() is their summary).

    targets: names by commas, "" for all linears of attention and MLP; "lm_head:4" has rank 4 at the
    others' scale. int8: their frozen weights are rounded as layers/packed.Int8 does. Other adapters
    stay, frozen and off. UserError for a target that does not exist or a setting that cannot be.
    """
    model = check_model(model, name)
    if rank < 1 or not 0 < alpha < math.inf or not 0 <= dropout < 1:
        raise UserError(f"rank {rank}, alpha {alpha}, dropout {dropout} cannot be LoRA's: rank "
                        "is at least 1, alpha above 0, dropout from 0 up to 1")
    made = {}
    ranks = parse_targets(targets)
    for part in select_linears(model, targets):
        base = convert(model, part, int8).base.detach()
        N, K = base.shape
        r = next((r for t, r in ranks.items() if r and matches(part, t)), rank)
        # uniform in +-1 / sqrt(K), as nn.Linear starts, and PEFT's A; B = 0: no change at first
        A = torch.empty(r, K, device=base.device).uniform_(-K ** -0.5, K ** -0.5)
        length = kernels.widen(base).norm(dim=1) if dora else None
        own = alpha * (r / rank) ** (0.5 if rslora else 1)          # the scale is that of all
        made[part] = Adapter(base, A, A.new_zeros(N, r), length, own, dropout, rslora)
    return attach(model, made, name)


def get_adapter(model: Any, name: str = "default") -> dict[str, Adapter]:
    """Return name of a layer -> its part of one adapter."""
    return {n: getattr(la.adapters, name) for n, la in find_lora_layers(model).items()
            if hasattr(la.adapters, name)}


def get_parameters(model: Any, name: str = "default") -> dict[str, Parameter]:
    """Return the parameters of one adapter by their full names."""
    return {f"{n}.adapters.{name}.{k}": p for n, a in get_adapter(model, name).items()
            for k, p in a.named_parameters()}


def describe(model: Any, name: str = "default") -> str:
    """Return one line: which layers an adapter has, and its share of the parameters."""
    parts = get_adapter(model, name)
    counts = Counter(n.rpartition(".")[2] for n in parts)
    size = sum(p.numel() for p in get_parameters(model, name).values())
    base = sum(p.numel() for n, p in unwrap(model).named_parameters() if ".adapters." not in n)
    return (f"LoRA {name!r} on {len(parts)} linears "
            f"({', '.join(f'{n} x {k}' for k, n in counts.items())}): {size:,} of "
            f"{base + size:,} parameters, {size / (base + size):.2%}"
            + ("; its routed experts get none" if unwrap(model).config.num_experts else ""))


def activate(model: Any, *chosen: str) -> None:
    """Use these adapters from here on, the sum of their changes; none: the base alone. Those that
    are off are frozen: DDP would wait for gradients that do not come."""
    existing = list_adapters(model)
    for name in chosen:
        if name not in existing:
            raise UserError(f"there is no adapter {reprlib.repr(name)}: "
                            f"the model has {', '.join(existing) or 'none'}")
    for layer in find_lora_layers(model).values():
        layer.active = tuple(n for n in chosen if hasattr(layer.adapters, n))
        for name, adapter in layer.adapters.named_children():
            adapter.requires_grad_(name in chosen)


@contextlib.contextmanager
def disable_adapters(model: Any) -> Iterator[None]:
    """Turn the adapters off inside a `with`: the model is its base again."""
    before = {layer: layer.active for layer in find_lora_layers(model).values()}
    for layer in before:
        layer.active = ()
    try:
        yield
    finally:
        for layer, active in before.items():
            layer.active = active


def halve(model: Any) -> None:
    """Store W of the layers with adapters in bfloat16 where that changes no bit of it, as in most
    checkpoints: half the memory, and no cast at every use. Merged it is float32 again."""
    for layer in find_lora_layers(model).values():
        W = layer.weight
        if W.dtype == torch.float32 and torch.equal(half := W.detach().bfloat16(), W):
            layer.weight = Parameter(half, requires_grad=False)
            layer.merged_dtype = torch.float32


def merge(model: Any) -> Any:
    """Make the model, in place, a plain Transformer with the merged weights: no adapters, all
    weights to be trained or saved. An int8 base comes back in float32."""
    model = unwrap(model)
    for name, layer in find_lora_layers(model).items():
        with torch.device("meta"):
            plain = Linear(1, 1)
        plain.weight = Parameter(layer.merged_weight().detach())
        plain.bias = layer.bias
        replace_layer(model, name, plain.train(layer.training))
    for name, p in model.named_parameters():        # which moves without gradients, in balance()
        p.requires_grad_(not name.endswith("e_score_correction_bias"))
    return model


if __name__ == "__main__":
    refuse_to_run()
