"""What the tests of this subject share: fixtures and oracles.
"""
from contextlib import contextmanager

import torch

import kernels
from model import ModelConfig, Transformer
from families import SCRATCH
SMALL = dict(vocab_size=61, block_size=24, n_layer=2, n_head=4, n_embd=32)
BIASES = dict(qkv_bias=True, o_bias=True, mlp_bias=True, norm_bias=True)
LLAMA = dict(position="rope", norm="rmsnorm", activation="silu", gated=True,
             tie_word_embeddings=False)

# one row a family, and the corners between them
FLAGS = {
    "gpt2": dict(BIASES, activation="gelu_new"),
    "llama": LLAMA,
    "llama3": dict(
        LLAMA,
        n_kv_head=2,
        rope_theta=500000.0,
        rope_scaling=dict(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=16,
        ),
    ),
    "qwen2": dict(LLAMA, n_kv_head=2, qkv_bias=True),
    "qwen3": dict(LLAMA, n_kv_head=1, head_dim=16, qk_norm=True, tie_word_embeddings=True),
    "no positions": dict(position="none", norm="rmsnorm", activation="relu2"),
    "no positions, all biases": dict(BIASES, position="none", gated=True, qk_norm=True),
    "learned, grouped": dict(position="learned", n_kv_head=2, qk_norm=True),
    "linear scaling": dict(LLAMA, rope_scaling=dict(rope_type="linear", factor=2.0)),
    "mistral": dict(LLAMA, n_kv_head=2, sliding_window=6),
    "gemma2": dict(
        SCRATCH["gemma2"].flags,
        n_kv_head=2,
        head_dim=16,
        sliding_window=6,
        attention_multiplier=0.2,
    ),
    "gemma3": dict(
        SCRATCH["gemma3"].flags, n_kv_head=2, sliding_window=6, sliding_window_pattern=2
    ),
    "glm4": dict(SCRATCH["glm4"].flags, n_kv_head=2),
    "minicpm": dict(LLAMA, embedding_multiplier=12.0, residual_multiplier=0.3, logits_scaling=3.0),
    "parallel": dict(SCRATCH["cohere"].flags, n_kv_head=2),
    "post-norm": SCRATCH["olmo2"].flags,
    "a layer without positions": dict(LLAMA, nope_layers=[0]),
    "yarn": dict(
        LLAMA, rope_scaling=dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
    ),
    "experts": dict(SCRATCH["qwen3_moe"].flags, num_experts=4, moe_intermediate_size=24),
    "shared expert": dict(SCRATCH["glm4_moe"].flags, num_experts=4, moe_intermediate_size=24),
}


@contextmanager
def backend(name):
    before = kernels.use(name)
    try:
        yield
    finally:
        kernels.use(before)


def make(flags, dtype=torch.float32, **changes):
    """A tiny model of these flags with every weight random, in evaluation mode."""
    model = Transformer(ModelConfig(**{**SMALL, **flags, **changes})).to(dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            # large enough that attention is far from uniform and positions matter
            scale = "norm.weight" in name or "layernorm.weight" in name
            p.normal_(1.0 - model.config.norm_offset if scale else 0.0, 0.3)
    return model.eval()


def some_ids(*shape):
    return torch.randint(SMALL["vocab_size"], shape)


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
