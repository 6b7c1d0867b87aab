"""Presets: the flags that make each family, the shapes that were published, and what they cost.

    config = preset("qwen3-0.6b")                   # ModelConfig of the published model
    config = family("gemma3", n_layer=6, n_embd=384, n_head=6, vocab_size=16384)    # one of yours

    python train.py --preset=llama3.2-1b            # random weights of a published shape
    python model.py --show=qwen3-0.6b               # its parameters, FLOPs and memory

A family is a row of flags of model.py, a preset is a family with sizes. How Hugging Face's files
spell both is families.py. The number to expect: the parameters of each preset are those of the
published model (tests/test_model.py holds the table).
"""
from __future__ import annotations

from typing import Any

import torch

from config import UserError, refuse_to_run
from model import ModelConfig, Transformer

# What makes a family, apart from its size
GPT2 = dict(qkv_bias=True, o_bias=True, mlp_bias=True, norm_bias=True, activation="gelu_new")
LLAMA = dict(position="rope", norm="rmsnorm", activation="silu", gated=True,
             tie_word_embeddings=False)
QWEN3 = dict(LLAMA, qk_norm=True, norm_eps=1e-6, rope_theta=1e6)
# Gemma: norms x (1 + w) before and after each branch, the embedding grown by sqrt(n_embd)
GEMMA2 = dict(LLAMA, norm_offset=1.0, norm_placement="sandwich", norm_eps=1e-6,
              activation="gelu_pytorch_tanh", embedding_multiplier=0.0, sliding_window=4096,
              sliding_window_pattern=2, attn_logit_softcapping=50.0, final_logit_softcapping=30.0,
              tie_word_embeddings=True)
GEMMA3 = dict(GEMMA2, qk_norm=True, sliding_window=512, sliding_window_pattern=6, rope_theta=1e6,
              rope_local_theta=1e4, attn_logit_softcapping=0.0, final_logit_softcapping=0.0)
# ChatGLM3 and GLM-4-9B: RoPE on pairs of neighbours, in the first half of each head
GLM = dict(LLAMA, qkv_bias=True, rope_interleaved=True, partial_rotary_factor=0.5)
GLM4 = dict(GLM, norm_placement="sandwich")                                 # GLM-4-0414
# DeepSeek's mixture as GLM-4.5 has it: sigmoid scores, a bias for the choice, a shared expert
GLM4_MOE = dict(LLAMA, partial_rotary_factor=0.5, num_experts=8, num_experts_per_tok=2,
                n_shared_experts=1, first_k_dense_replace=1, scoring_func="sigmoid",
                router_bias=True, norm_topk_prob=True)
FAMILIES: dict[str, dict] = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "mistral": dict(LLAMA, sliding_window=4096),
    "mixtral": dict(LLAMA, num_experts=8, num_experts_per_tok=2, norm_topk_prob=True),
    "qwen2": dict(LLAMA, qkv_bias=True, norm_eps=1e-6, rope_theta=1e6),
    "qwen3": QWEN3,
    "qwen3_moe": dict(QWEN3, num_experts=8, num_experts_per_tok=2, norm_topk_prob=True),
    "gemma2": GEMMA2,
    "gemma3": GEMMA3,
    "glm": GLM,
    "glm4": GLM4,
    "glm4_moe": GLM4_MOE,
    # MiniCPM's three scales; scratch() fills in what depends on depth and width
    "minicpm": dict(LLAMA, embedding_multiplier=12.0, tie_word_embeddings=True),
    # attention and MLP side by side on one norm (GPT-J, PaLM; here as Cohere's Command R)
    "cohere": dict(LLAMA, norm="layernorm", norm_placement="parallel", rope_interleaved=True,
                   logits_scaling=16.0, tie_word_embeddings=True),
    # norms behind the branches only, and one over all heads of q and of k
    "olmo2": dict(LLAMA, norm_placement="post", qk_norm=True, qk_norm_whole=True,
                  rope_theta=5e5),
    # every fourth layer has no positions
    "smollm3": dict(LLAMA, rope_theta=2e6, tie_word_embeddings=True),
    "arcee": dict(LLAMA, activation="relu2", gated=False),
}
LLAMA3 = dict(LLAMA, vocab_size=128256, rope_theta=500000.0)


def scaled(factor: float) -> dict:
    """Llama 3.1's stretch of the rotary frequencies from a context of 8192."""
    return dict(rope_type="llama3", factor=factor, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=8192)


def size(layers: int, heads: int, kv_heads: int, width: int, mlp: int = 0, **more) -> dict:
    return dict(n_layer=layers, n_head=heads, n_kv_head=kv_heads, n_embd=width,
                intermediate_size=mlp, **more)


def minicpm(layers: int, width: int, base: int = 256) -> dict:
    """MiniCPM's scales (Hu 2024): branches by 1.4 / sqrt(layers), logits by width / base, so that
    the best learning rate of a small model is that of a large one."""
    return dict(residual_multiplier=1.4 / layers ** 0.5, logits_scaling=width / base)


_QWEN3 = dict(QWEN3, vocab_size=151936, block_size=40960, head_dim=128)
_GEMMA = dict(vocab_size=262144, block_size=32768, head_dim=256, attention_multiplier=256 ** -0.5)
_GLM = dict(head_dim=128, **size(40, 32, 2, 4096, 13696))
# The published shapes: name -> keyword arguments of ModelConfig
PRESETS: dict[str, dict] = {
    "gpt2": dict(GPT2, **size(12, 12, 12, 768)),
    "gpt2-medium": dict(GPT2, **size(24, 16, 16, 1024)),
    "gpt2-large": dict(GPT2, **size(36, 20, 20, 1280)),
    "gpt2-xl": dict(GPT2, **size(48, 25, 25, 1600)),
    "llama-7b": dict(LLAMA, vocab_size=32000, block_size=2048, norm_eps=1e-6,
                     **size(32, 32, 32, 4096, 11008)),
    "llama2-7b": dict(LLAMA, vocab_size=32000, block_size=4096,
                      **size(32, 32, 32, 4096, 11008)),
    "llama2-70b": dict(LLAMA, vocab_size=32000, block_size=4096,
                       **size(80, 64, 8, 8192, 28672)),
    "llama3-8b": dict(LLAMA3, block_size=8192, **size(32, 32, 8, 4096, 14336)),
    "llama3.1-8b": dict(LLAMA3, block_size=131072, rope_scaling=scaled(8.0),
                        **size(32, 32, 8, 4096, 14336)),
    "llama3.2-1b": {**LLAMA3, **size(16, 32, 8, 2048, 8192), "block_size": 131072,
                    "rope_scaling": scaled(32.0), "tie_word_embeddings": True},
    "llama3.2-3b": {**LLAMA3, **size(28, 24, 8, 3072, 8192), "block_size": 131072,
                    "rope_scaling": scaled(32.0), "tie_word_embeddings": True},
    "mistral-7b": dict(FAMILIES["mistral"], vocab_size=32000, block_size=32768,
                       **size(32, 32, 8, 4096, 14336)),
    "mixtral-8x7b": dict(FAMILIES["mixtral"], vocab_size=32000, block_size=32768, rope_theta=1e6,
                         **size(32, 32, 8, 4096, 14336)),
    "qwen2.5-0.5b": {**FAMILIES["qwen2"], **size(24, 14, 2, 896, 4864), "vocab_size": 151936,
                     "block_size": 32768, "tie_word_embeddings": True},
    "qwen2.5-7b": dict(FAMILIES["qwen2"], vocab_size=152064, block_size=131072,
                       **size(28, 28, 4, 3584, 18944)),
    **{f"qwen3-{name}": {**_QWEN3, **size(*shape), "tie_word_embeddings": tied}
       for name, shape, tied in (("0.6b", (28, 16, 8, 1024, 3072), True),
                                 ("1.7b", (28, 16, 8, 2048, 6144), True),
                                 ("4b", (36, 32, 8, 2560, 9728), True),
                                 ("8b", (36, 32, 8, 4096, 12288), False),
                                 ("14b", (40, 40, 8, 5120, 17408), False),
                                 ("32b", (64, 64, 8, 5120, 25600), False))},
    "qwen3-30b-a3b": {**_QWEN3, **size(48, 32, 4, 2048, 6144), "num_experts": 128,
                      "num_experts_per_tok": 8, "moe_intermediate_size": 768,
                      "norm_topk_prob": True},
    "gemma2-2b": {**GEMMA2, **_GEMMA, **size(26, 8, 4, 2304, 9216), "vocab_size": 256000,
                  "block_size": 8192},
    "gemma3-270m": dict(GEMMA3, **_GEMMA, **size(18, 4, 1, 640, 2048)),
    "gemma3-1b": dict(GEMMA3, **_GEMMA, **size(26, 4, 1, 1152, 6912)),
    "chatglm3-6b": {**GLM, **_GLM, "n_layer": 28, "vocab_size": 65024, "block_size": 8192},
    "glm-4-9b": dict(GLM, **_GLM, vocab_size=151552, block_size=131072, norm_eps=1.5625e-7,
                     rope_theta=5e6),
    "glm-4-9b-0414": dict(GLM4, vocab_size=151552, block_size=32768, **_GLM),
    "glm-4.5-air": {**GLM4_MOE, **size(46, 96, 8, 4096, 10944), "vocab_size": 151552,
                    "block_size": 131072, "head_dim": 128, "rope_theta": 1e6, "qkv_bias": True,
                    "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 1408},
    "minicpm-2b": dict(FAMILIES["minicpm"], vocab_size=122753, block_size=4096,
                       **size(40, 36, 36, 2304, 5760), **minicpm(40, 2304)),
    "olmo2-1b": {**FAMILIES["olmo2"], **size(16, 16, 16, 2048, 8192), "vocab_size": 100352,
                 "block_size": 4096, "norm_eps": 1e-6},
    "smollm2-135m": {**LLAMA, **size(30, 9, 3, 576, 1536), "vocab_size": 49152,
                     "block_size": 8192, "rope_theta": 1e5, "tie_word_embeddings": True},
}


def preset(name: str, **changes) -> ModelConfig:
    """The ModelConfig of a published shape, with `changes` laid over it."""
    if name not in PRESETS:
        raise UserError(f"there is no preset {name!r}: choose one of {', '.join(PRESETS)}, "
                        "or give a checkpoint directory")
    return ModelConfig(**{**PRESETS[name], **changes})


def family(name: str, **shape) -> ModelConfig:
    """A ModelConfig with a family's flags and a shape of your own."""
    if name not in FAMILIES:
        raise UserError(f"family={name!r} does not exist: choose one of {', '.join(FAMILIES)}")
    flags, layers = dict(FAMILIES[name]), shape.get("n_layer", 12)
    if name == "minicpm":
        flags.update(minicpm(layers, shape.get("n_embd", 768)))
    if name == "smollm3":
        flags["nope_layers"] = list(range(3, layers, 4))
    values = {**flags, **shape}
    if values.get("num_experts") and values.get("num_experts_per_tok", 2) == 1:
        # one expert's share of itself is 1 whatever its score: the router would not learn
        values["norm_topk_prob"] = False
    return ModelConfig(**values)


def from_settings(cfg: Any, vocab_size: int) -> ModelConfig:
    """The ModelConfig that a run's settings (train.Config) describe: of a family or a preset."""
    shape = {k: getattr(cfg, k) for k in
             ("n_layer", "n_head", "n_kv_head", "n_embd", "head_dim", "intermediate_size")}
    flags = {k: getattr(cfg, k) for k in
             ("qk_norm", "tie_word_embeddings", "rope_theta", "activation", "gated",
              "sliding_window", "num_experts", "num_experts_per_tok", "moe_intermediate_size",
              "n_shared_experts") if getattr(cfg, k) is not None}
    common = {"block_size": cfg.block_size, "dropout": cfg.dropout, "init_std": cfg.init_std}
    if cfg.preset:
        given = {k: v for k, v in shape.items() if k in getattr(cfg, "given", ())}
        config = preset(cfg.preset, **given, **flags, **common)
        if vocab_size > config.vocab_size:
            raise UserError(f"the data's vocabulary of {vocab_size} is larger than "
                            f"{cfg.preset}'s {config.vocab_size}: leave out --preset, or prepare "
                            "the data with another tokenizer")
        return config
    # a family's own biases, or more of them; for GPT-2 nanoGPT's switch, and its GELU
    biases = dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias") if cfg.bias else (), True)
    if cfg.family == "gpt2":
        biases = dict.fromkeys(("qkv_bias", "o_bias", "mlp_bias", "norm_bias"), cfg.bias)
        biases["activation"] = "gelu"
    return family(cfg.family, **{**biases, **shape, **flags, **common, "vocab_size": vocab_size})


def costs(config: ModelConfig, block_size: int = 0) -> dict[str, str]:
    """What a model costs, as a table: parameters, FLOPs, and memory in GB (1e9 bytes)."""
    with torch.device("meta"):                         # shapes without memory
        model = Transformer(config)
    T, N = block_size or config.block_size, model.parameter_count()
    # a window's layers keep no more keys than it holds
    tokens = sum(min(T, config.window(i) or T) for i in range(config.n_layer))
    cache = 2 * config.n_kv_head * config.head_dim * tokens * 2
    rows = {"parameters": f"{N:,}"}
    if config.num_experts:
        rows["parameters a token meets"] = f"{model.parameter_count(active=True):,}"
    rows |= {"context": f"{T:,}",
             "forward GFLOPs a token": f"{model.flops_per_token(T, training=False) / 1e9:.3f}",
             "training GFLOPs a token": f"{model.flops_per_token(T) / 1e9:.3f}",
             "GB to train (fp32 weights, grads, AdamW)": f"{16 * N / 1e9:.2f}",
             "GB to serve (bf16)": f"{2 * N / 1e9:.2f}",
             "GB to serve (int8)": f"{N / 1e9:.2f}",
             "GB of KV cache a sequence (bf16)": f"{cache / 1e9:.3f}"}
    return rows


if __name__ == "__main__":
    refuse_to_run()
