"""What the tests of this subject share: fixtures and oracles.
"""

import pytest
import torch
import transformers

from checkpoint import (save_model)
from model import ModelConfig, Transformer
from families import SCRATCH

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

V = 97
SHAPE = dict(vocab_size=V, block_size=64, n_layer=2, n_head=4, n_embd=32, intermediate_size=48)
TINY = dict(SHAPE, n_layer=1, n_head=2, n_embd=16, intermediate_size=32)
ROPE3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
             original_max_position_embeddings=32)

# name -> (ModelConfig, the model_type it is saved as)
MODELS = {
    "gpt2": (dict(SCRATCH["gpt2"].flags, **SHAPE), "gpt2"),
    "gpt2 exact gelu": (dict(SCRATCH["gpt2"].flags, **SHAPE) | {"activation": "gelu"}, "gpt2"),
    "gpt2 without biases": (dict(SHAPE), "gpt2"),
    "gpt2 untied": (dict(SCRATCH["gpt2"].flags, **SHAPE, tie_word_embeddings=False), "gpt2"),
    "llama": (dict(SCRATCH["llama"].flags, **SHAPE), "llama"),
    "llama gqa, wide heads": (
        dict(SCRATCH["llama"].flags, **SHAPE, n_kv_head=2, head_dim=16),
        "llama",
    ),
    "llama tied": (dict(SCRATCH["llama"].flags, **SHAPE) | {"tie_word_embeddings": True}, "llama"),
    "llama biases": (
        dict(SCRATCH["llama"].flags, **SHAPE, qkv_bias=True, o_bias=True, mlp_bias=True),
        "llama",
    ),
    "llama 3 rope": (
        dict(SCRATCH["llama"].flags, **SHAPE, rope_scaling=ROPE3, rope_theta=5e5),
        "llama",
    ),
    "llama linear rope": (
        dict(SCRATCH["llama"].flags, **SHAPE, rope_scaling=dict(rope_type="linear", factor=2.0)),
        "llama",
    ),
    "llama o_bias alone": (dict(SCRATCH["llama"].flags, **SHAPE, o_bias=True), "llama"),
    "qwen2": (dict(SCRATCH["llama"].flags, **SHAPE, qkv_bias=True, n_kv_head=2), "qwen2"),
    "qwen3": (
        dict(
            SCRATCH["llama"].flags,
            **SHAPE,
            qk_norm=True,
            head_dim=16,
            n_kv_head=1,
            norm_eps=1e-6,
            rope_theta=1e6,
        )
        | {"tie_word_embeddings": True},
        "qwen3",
    ),
    "arcee": (
        dict(SCRATCH["llama"].flags, **SHAPE) | {"gated": False, "activation": "relu2"},
        "arcee",
    ),
}


def build(kind="gpt2", dtype=torch.float32, **changes) -> Transformer:
    """A tiny model, every weight random: norms of 1 and biases of 0 would hide mistakes."""
    config = MODELS[kind][0] if isinstance(kind, str) else kind
    model = Transformer(ModelConfig(**{**config, **changes}))
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data.normal_(0, 0.3, generator=generator)
    return model.to(dtype).eval()


WTE = "transformer.wte.weight"


@pytest.fixture
def saved(tmp_path):
    save_model(tmp_path / "m", build(dict(SCRATCH["gpt2"].flags, **TINY)))
    return tmp_path / "m"
