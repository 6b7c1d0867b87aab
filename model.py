"""The decoder: ids -> hidden states, one Transformer whose flags make it GPT-2, Llama or Qwen3.

    from model import ModelConfig, Transformer, preset
    model = Transformer(preset("gpt2"))              # random weights, GPT-2's shape
    logits = model.logits(ids)                       # (B, T) -> (B, T, V) float32
    loss = model(ids, head=lambda h, w: kernels.linear_cross_entropy(h, w, targets))

    python model.py --show=gpt2                      # parameters, FLOPs, memory of a preset

A family is a row of flags (PRESETS below), never a subclass. Parameter names are those of Hugging
Face's Llama; checkpoint.py translates the families that spell them otherwise. The maths itself is
in kernels.py; this file says what is connected to what.
"""
from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Callable

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.utils.checkpoint import checkpoint

import kernels
from config import UserError, run


@dataclass
class ModelConfig:
    """The shape and the flags of a decoder; the defaults are GPT-2's, 124M parameters."""
    vocab_size: int = 50257
    block_size: int = 1024              # longest context; rows of the position table if learned
    n_layer: int = 12
    n_head: int = 12
    n_kv_head: int = 0                  # 0: n_head; fewer is grouped-query attention
    n_embd: int = 768
    head_dim: int = 0                   # 0: n_embd / n_head
    intermediate_size: int = 0          # width of the MLP; 0: 4 n_embd, gated 8/3 n_embd
    position: str = "learned"           # learned, rope or none
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None    # Hugging Face's: rope_type llama3 or linear, and factors
    norm: str = "layernorm"             # layernorm or rmsnorm, before each sublayer and at the end
    norm_eps: float = 1e-5
    activation: str = "gelu"            # a name in kernels.ACTIVATIONS
    gated: bool = False                 # act(gate x) * (up x) instead of act(up x)
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    norm_bias: bool = False
    qk_norm: bool = False               # RMSNorm on each head of q and k, before RoPE
    tie_word_embeddings: bool = True    # the output matrix is the embedding matrix
    dropout: float = 0.0
    init_std: float = 0.02

    def __post_init__(self):
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)} must be at least 1")
        for name in ("n_kv_head", "head_dim", "intermediate_size"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} {getattr(self, name)} is negative: 0 chooses it for you")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout {self.dropout} is not a share from 0 up to 1")
        self.n_kv_head = self.n_kv_head or self.n_head
        if not self.head_dim:
            if self.n_embd % self.n_head:
                raise UserError(f"n_embd {self.n_embd} is not a multiple of n_head {self.n_head}: "
                                f"try n_embd {max(1, self.n_embd // self.n_head) * self.n_head}")
            self.head_dim = self.n_embd // self.n_head
        if self.n_head % self.n_kv_head:
            raise UserError(f"n_head {self.n_head} is not a multiple of n_kv_head "
                            f"{self.n_kv_head}: each key head serves a whole group of queries")
        if not self.intermediate_size:
            # a gated MLP has three matrices: two thirds of the width, rounded up, cost the same
            wide = 4 * self.n_embd * 2 / 3 if self.gated else 4 * self.n_embd
            self.intermediate_size = math.ceil(wide / 64) * 64 if self.gated else int(wide)
        choices = {"position": ("learned", "rope", "none"), "norm": ("layernorm", "rmsnorm"),
                   "activation": tuple(kernels.ACTIVATIONS)}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise UserError(f"{name}={getattr(self, name)!r} does not exist: "
                                f"choose {', '.join(allowed)}")
        if self.position == "rope" and self.head_dim % 2:
            raise UserError(f"head_dim {self.head_dim} is odd: RoPE rotates pairs of features")


# What makes a family, apart from its size
GPT2 = dict(qkv_bias=True, o_bias=True, mlp_bias=True, norm_bias=True, activation="gelu_new")
LLAMA = dict(position="rope", norm="rmsnorm", activation="silu", gated=True,
             tie_word_embeddings=False)
QWEN3 = dict(LLAMA, qk_norm=True, norm_eps=1e-6, rope_theta=1e6)
ARCEE = dict(LLAMA, activation="relu2", gated=False)
FAMILIES = {"gpt2": GPT2, "llama": LLAMA, "qwen3": QWEN3, "arcee": ARCEE}
LLAMA3 = dict(LLAMA, vocab_size=128256, rope_theta=500000.0)


def scaled(factor: float) -> dict:
    """Llama 3.1's stretch of the rotary frequencies from a context of 8192."""
    return dict(rope_type="llama3", factor=factor, low_freq_factor=1.0, high_freq_factor=4.0,
                original_max_position_embeddings=8192)


def size(layers: int, heads: int, kv_heads: int, width: int, mlp: int = 0) -> dict:
    return dict(n_layer=layers, n_head=heads, n_kv_head=kv_heads, n_embd=width,
                intermediate_size=mlp)


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
    "llama3-8b": dict(LLAMA3, block_size=8192, **size(32, 32, 8, 4096, 14336)),
    "llama3.1-8b": dict(LLAMA3, block_size=131072, rope_scaling=scaled(8.0),
                        **size(32, 32, 8, 4096, 14336)),
    "llama3.2-1b": dict(LLAMA3, block_size=131072, rope_scaling=scaled(32.0), **dict(
        size(16, 32, 8, 2048, 8192), tie_word_embeddings=True)),
    "llama3.2-3b": dict(LLAMA3, block_size=131072, rope_scaling=scaled(32.0), **dict(
        size(28, 24, 8, 3072, 8192), tie_word_embeddings=True)),
    "qwen3-0.6b": dict(QWEN3, vocab_size=151936, block_size=40960, head_dim=128, **dict(
        size(28, 16, 8, 1024, 3072), tie_word_embeddings=True)),
}


def preset(name: str, **changes) -> ModelConfig:
    """The ModelConfig of a published shape, with `changes` laid over it."""
    if name not in PRESETS:
        raise UserError(f"there is no preset {name!r}: choose one of {', '.join(PRESETS)}, "
                        "or give a checkpoint directory")
    return ModelConfig(**{**PRESETS[name], **changes})


# ------------------------------------------------------------------------------- position

def rope_frequencies(config: ModelConfig) -> Tensor:
    """Radians a position for each rotated pair, (head_dim / 2,) float32: theta^(-2i/D).

    llama3 scaling keeps the fast frequencies, divides the slow ones by `factor`, and blends
    between the wavelengths original/high and original/low (Llama 3 report, 2024).
    """
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float32)
    f = 1.0 / config.rope_theta ** (pairs / config.head_dim)
    s = config.rope_scaling or {}
    kind = s.get("rope_type", s.get("type", "default"))
    needed = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor",
                                                "original_max_position_embeddings")}
    missing = [k for k in needed.get(kind, ()) if k not in s]
    if missing:
        raise UserError(f"rope_scaling of rope_type {kind!r} lacks {', '.join(missing)}")
    if kind == "linear":
        return f / s["factor"]
    if kind == "llama3":
        original = s["original_max_position_embeddings"]
        low, high = s["low_freq_factor"], s["high_freq_factor"]
        blend = (original * f / (2 * math.pi) - low) / (high - low)
        blend = blend.clamp(0, 1)                    # 0: slow, stretched whole; 1: fast, kept
        return (1 - blend) * f / s["factor"] + blend * f
    if kind != "default":
        raise UserError(f"rope_type {kind!r} is not supported: use default, linear or llama3")
    return f


def rope_table(config: ModelConfig, length: int, device) -> tuple[Tensor, Tensor]:
    """cos and sin of every position times every frequency, (length, head_dim / 2) float32."""
    angles = torch.outer(torch.arange(length, dtype=torch.float32), rope_frequencies(config))
    return angles.cos().to(device), angles.sin().to(device)


# ------------------------------------------------------------------------------ the cache

class Cache:
    """Keys and values of the tokens seen, for each layer (batch, n_kv_head, length, head_dim).

    Rows may hold different numbers of tokens (`lengths`): a ragged batch of prompts is run padded
    on the right, then `trim` forgets the padding, and each row goes on at its own position.
    """

    def __init__(self, config: ModelConfig, batch: int, length: int, device, dtype):
        shape = (batch, config.n_kv_head, length, config.head_dim)
        self.k = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.v = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.length = length
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.end = 0                # max(lengths) and `ragged`, kept on the host: no device sync
        self.ragged = False

    def trim(self, lengths: Tensor) -> None:
        """Say how many tokens of each row are real; what lies behind them is overwritten."""
        self.lengths.copy_(lengths)
        self.end = int(lengths.max())
        self.ragged = bool((lengths != self.end).any())

    def positions(self, T: int) -> Tensor | None:
        """Where the next T tokens of each row stand, (batch, T); None where all rows agree."""
        if not self.ragged:
            return None
        return self.lengths.unsqueeze(1) + torch.arange(T, device=self.lengths.device)

    def put(self, layer: int, k: Tensor, v: Tensor, positions: Tensor | None):
        """Store k, v (B, Hkv, T, D); return all keys and values up to the longest row's end."""
        end = self.end + k.shape[2]
        if positions is None:
            self.k[layer][:, :, self.end:end], self.v[layer][:, :, self.end:end] = k, v
        else:
            rows = torch.arange(k.shape[0], device=k.device).unsqueeze(1)           # (B, 1)
            self.k[layer][rows, :, positions] = k.transpose(1, 2)
            self.v[layer][rows, :, positions] = v.transpose(1, 2)
        return self.k[layer][:, :, :end], self.v[layer][:, :, :end]

    def advance(self, T: int) -> None:
        self.lengths += T
        self.end += T


# ----------------------------------------------------------------------------- the layers

class Linear(Module):
    """A weight (out, in) and perhaps a bias (out,)."""

    def __init__(self, inputs: int, outputs: int, bias: bool = False):
        super().__init__()
        self.weight = Parameter(torch.empty(outputs, inputs))
        self.bias = Parameter(torch.zeros(outputs)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return kernels.linear(x, self.weight, self.bias)


class Embedding(Module):
    def __init__(self, rows: int, width: int):
        super().__init__()
        self.weight = Parameter(torch.empty(rows, width))


class Norm(Module):
    """LayerNorm or RMSNorm over the last dimension."""

    def __init__(self, kind: str, width: int, eps: float, bias: bool = False):
        super().__init__()
        self.kind, self.eps = kind, eps
        self.weight = Parameter(torch.ones(width))
        self.bias = Parameter(torch.zeros(width)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "rmsnorm":
            return kernels.rms_norm(x, self.weight, self.eps)
        return kernels.layer_norm(x, self.weight, self.bias, self.eps)


def linear_together(x: Tensor, layers: list[Linear]) -> list[Tensor]:
    """Several layers of one input. In training as one matmul over the joined weights: joining
    costs a pass over weights, which are small beside the activations. Serving one token it is the
    other way round."""
    if not torch.is_grad_enabled():
        return [layer(x) for layer in layers]
    weight = torch.cat([layer.weight.to(x.dtype) for layer in layers])
    bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
    return list(kernels.linear(x, weight, bias).split([len(la.weight) for la in layers], -1))


class Attention(Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        c, self.config, self.layer = config, config, layer
        inner, narrow = c.n_head * c.head_dim, c.n_kv_head * c.head_dim
        self.q_proj = Linear(c.n_embd, inner, c.qkv_bias)
        self.k_proj = Linear(c.n_embd, narrow, c.qkv_bias)
        self.v_proj = Linear(c.n_embd, narrow, c.qkv_bias)
        self.o_proj = Linear(inner, c.n_embd, c.o_bias)
        if c.qk_norm:
            self.q_norm = Norm("rmsnorm", c.head_dim, c.norm_eps)
            self.k_norm = Norm("rmsnorm", c.head_dim, c.norm_eps)

    def forward(self, x: Tensor, rope, doc, cache: Cache | None, positions) -> Tensor:
        c, (B, T, _) = self.config, x.shape
        q, k, v = linear_together(x, [self.q_proj, self.k_proj, self.v_proj])
        q, k, v = (y.reshape(B, T, -1, c.head_dim) for y in (q, k, v))         # (B, T, H, D)
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = kernels.rope(q, *rope), kernels.rope(k, *rope)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))                       # (B, H, T, D)
        if cache is not None:
            k, v = cache.put(self.layer, k, v, positions)
        drop = c.dropout if self.training else 0.0
        y = kernels.attention(q, k, v, doc=doc, positions=positions, dropout_p=drop)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        c, self.config = config, config
        if c.gated:
            self.gate_proj = Linear(c.n_embd, c.intermediate_size, c.mlp_bias)
        self.up_proj = Linear(c.n_embd, c.intermediate_size, c.mlp_bias)
        self.down_proj = Linear(c.intermediate_size, c.n_embd, c.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.config.gated:
            gate, up = linear_together(x, [self.gate_proj, self.up_proj])
            return self.down_proj(kernels.glu(gate, up, self.config.activation))
        return self.down_proj(kernels.ACTIVATIONS[self.config.activation](self.up_proj(x)))


class Block(Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        c, self.config = config, config
        self.input_layernorm = Norm(c.norm, c.n_embd, c.norm_eps, c.norm_bias)
        self.self_attn = Attention(c, layer)
        self.post_attention_layernorm = Norm(c.norm, c.n_embd, c.norm_eps, c.norm_bias)
        self.mlp = MLP(c)

    def drop(self, x: Tensor) -> Tensor:
        p = self.config.dropout
        return kernels.dropout(x, p) if p and self.training else x

    def forward(self, x: Tensor, *context) -> Tensor:
        x = x + self.drop(self.self_attn(self.input_layernorm(x), *context))
        return x + self.drop(self.mlp(self.post_attention_layernorm(x)))


class Transformer(Module):
    """Embedding, blocks, final norm, output matrix; see the module's docstring for its use."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        c, self.config = config, config
        self.model = Module()
        self.model.embed_tokens = Embedding(c.vocab_size, c.n_embd)
        if c.position == "learned":
            self.model.embed_positions = Embedding(c.block_size, c.n_embd)
        self.model.layers = Module()
        for i in range(c.n_layer):
            self.model.layers.add_module(str(i), Block(c, i))
        self.model.norm = Norm(c.norm, c.n_embd, c.norm_eps, c.norm_bias)
        if not c.tie_word_embeddings:
            self.lm_head = Linear(c.n_embd, c.vocab_size)
        self.compute_dtype: torch.dtype | None = None   # of the activations; None: the weights'
        self.checkpointing = False                      # recompute blocks in the backward
        self.tables: dict = {}                          # rope_table by (length, device)
        if self.model.norm.weight.device.type != "meta":
            self.init_weights()

    def init_weights(self) -> None:
        """GPT-2's: N(0, 0.02), and residual projections divided by sqrt(2 n_layer), so that the
        sum of all branches keeps its variance whatever the depth (Radford 2019, section 2.3)."""
        c = self.config
        for name, p in self.named_parameters():
            if p.ndim == 2:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                shrink = math.sqrt(2 * c.n_layer) if residual else 1.0
                torch.nn.init.normal_(p, std=c.init_std / shrink)

    @property
    def output_weight(self) -> Tensor:
        """The (V, C) matrix that turns hidden states into logits."""
        tied = self.config.tie_word_embeddings
        return self.model.embed_tokens.weight if tied else self.lm_head.weight

    def new_cache(self, batch: int, length: int) -> Cache:
        w = self.output_weight
        return Cache(self.config, batch, length, w.device, self.compute_dtype or w.dtype)

    def rope(self, positions: Tensor | None, start: int, T: int, device):
        """(cos, sin) of the positions at hand; (T, D/2), or (B, T, D/2) in a ragged batch."""
        length = max(self.config.block_size, start + T)
        if (length, device) not in self.tables:
            self.tables = {(length, device): rope_table(self.config, length, device)}
        table = self.tables[length, device]
        rows = slice(start, start + T) if positions is None else positions
        return table[0][rows], table[1][rows]

    def forward(self, ids: Tensor, *, doc: Tensor | None = None, cache: Cache | None = None,
                head: Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:
        """ids (B, T) int64 -> head(hidden (B, T, C), weight (V, C)), or logits (B, T, V).

        doc (B, T) keeps attention inside a document. With a cache, ids go on where it ends.
        """
        c, (B, T) = self.config, ids.shape
        start, positions = 0, None
        if cache is not None:
            start, positions = cache.end, cache.positions(T)
            if start + T > cache.length:
                raise UserError(f"{start + T} tokens do not fit the cache of {cache.length}: "
                                "generate less or ask for a longer cache")
        x = kernels.embedding(ids, self.model.embed_tokens.weight)
        rope = None
        if c.position == "learned":
            if start + T > c.block_size:
                raise UserError(f"{start + T} tokens are more than the {c.block_size} learned "
                                "positions of this model: lower block_size or crop the text")
            where = torch.arange(start, start + T, device=ids.device)
            where = where if positions is None else positions
            x = x + kernels.embedding(where, self.model.embed_positions.weight)
        elif c.position == "rope":
            rope = self.rope(positions, start, T, ids.device)
        x = x.to(self.compute_dtype or x.dtype)
        if c.dropout and self.training:
            x = kernels.dropout(x, c.dropout)
        for block in self.model.layers.children():
            context = (rope, doc, cache, positions)
            if self.checkpointing and self.training:
                x = checkpoint(block, x, *context, use_reentrant=False)
            else:
                x = block(x, *context)
        if cache is not None:
            cache.advance(T)
        x = self.model.norm(x)
        if head is not None:
            return head(x, self.output_weight)
        return kernels.linear(x, self.output_weight)

    def logits(self, ids: Tensor, doc: Tensor | None = None) -> Tensor:
        """(B, T) -> (B, T, V) float32, without gradients: for tests and notebooks."""
        with torch.no_grad():
            return self(ids, doc=doc).float()

    # ------------------------------------------------------------------ what it costs

    def parameter_count(self, embeddings: bool = True) -> int:
        """All parameters; without embeddings, those that are not a look-up table (nanoGPT's N)."""
        skip = 0 if embeddings else sum(
            p.numel() for n, p in self.named_parameters() if "embed_positions" in n)
        return sum(p.numel() for p in self.parameters()) - skip

    def flops_per_token(self, T: int, training: bool = True) -> int:
        """Multiplications and additions of the matmuls a token of a context of T costs.

        2 for each weight of a matrix, plus q k^T and p v over T keys (counted whole, as PaLM's
        appendix B does, though a causal kernel skips half); a backward costs twice a forward.
        """
        c = self.config
        matrices = sum(p.numel() for n, p in self.named_parameters()
                       if p.ndim == 2 and "embed" not in n)
        if c.tie_word_embeddings:
            matrices += c.vocab_size * c.n_embd
        forward = 2 * matrices + 4 * c.n_layer * c.n_head * c.head_dim * T
        return 3 * forward if training else forward


@dataclass
class Config:
    show: str = "gpt2"          # a preset's name: print what it costs
    block_size: int = 0         # context to count FLOPs at; 0: the preset's own


def main(cfg: Config) -> None:
    config = preset(cfg.show)
    with torch.device("meta"):                         # shapes without memory
        model = Transformer(replace(config))
    T, N = cfg.block_size or config.block_size, model.parameter_count()
    cache = 2 * config.n_layer * config.n_kv_head * config.head_dim * T * 2
    rows = {"parameters": f"{N:,}", "context": f"{T:,}",
            "forward GFLOPs a token": f"{model.flops_per_token(T, training=False) / 1e9:.3f}",
            "training GFLOPs a token": f"{model.flops_per_token(T) / 1e9:.3f}",
            "GB to train (fp32 weights, grads, AdamW)": f"{16 * N / 1e9:.2f}",
            "GB to serve (bf16)": f"{2 * N / 1e9:.2f}",
            "GB of KV cache a sequence (bf16)": f"{cache / 1e9:.3f}"}
    print(f"{cfg.show}")
    for name, value in rows.items():
        print(f"  {name:42s}{value:>16s}")


if __name__ == "__main__":
    run(main, Config)
