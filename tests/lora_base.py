"""What the tests of this subject share: fixtures and oracles.
"""

import torch
import transformers as T

import kernels
from layers import lora as lora_layers
from model import ModelConfig, Transformer
T.logging.set_verbosity_error()
T.logging.disable_progress_bar()

V = 48
SHAPE = dict(vocab_size=V, block_size=32, n_layer=2, n_head=4, n_kv_head=2, n_embd=32,
             intermediate_size=48, moe_intermediate_size=24)
MORE = {"gpt2": dict(n_kv_head=4), "gemma2": dict(sliding_window=6),
        "glm4_moe": dict(num_experts=4), "qwen3_moe": dict(num_experts=4)}
OPTIONS = {"plain": {}, "rslora": dict(rslora=True), "dora": dict(dora=True),
           "both": dict(rslora=True, dora=True)}


def build(name="llama", **changes) -> Transformer:
    """A tiny model, the same at every call, every weight random, norms and biases included."""
    model = Transformer(ModelConfig.from_family(name, **{**SHAPE, **MORE.get(name, {}), **changes}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, p in model.named_parameters():
            centre = 1.0 - model.config.norm_offset if "norm" in key and p.ndim == 1 else 0.0
            p.normal_(centre if key.endswith("weight") else 0.0, 0.15, generator=generator)
    return model.eval()


def stir(model, name="default", size=0.1, seed=2):
    """As if trained: B is no longer zero, nor a magnitude what it was."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in lora_layers.get_parameters(model, name).values():
            p += torch.empty_like(p).normal_(0.0, size, generator=generator)


def ids_of(rows=2, length=11):
    return torch.randint(V, (rows, length), generator=torch.Generator().manual_seed(3))


def away(a, b) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


def our_loss(model, ids):
    return model(ids[:, :-1], head=lambda h, w: kernels.linear_cross_entropy(
        h, w, ids[:, 1:].contiguous())) / ids[:, 1:].numel()
