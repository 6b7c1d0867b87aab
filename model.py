"""The decoder: ids -> hidden states, one Transformer whose flags make it any family of today.

    from model import ModelConfig, Transformer
    model = Transformer(ModelConfig.from_preset("gpt2"))  # random weights, GPT-2's shape
    config = ModelConfig.from_family("gemma3", n_layer=6, n_embd=384, n_head=6, vocab_size=16384)
    loss = model(ids, head=lambda h, w: kernels.linear_cross_entropy(h, w, targets))

    python model.py --show=qwen3-0.6b                # parameters, FLOPs, memory of a preset

A family (GPT-2, Llama, Qwen, Gemma, GLM, …) is a row of flags in families/, never a subclass.
Parameter names in memory are those of Hugging Face's Llama.
The maths itself is in kernels.py; this file says what is connected to what.
"""
from __future__ import annotations

import math
import reprlib
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

import torch
from torch import Tensor
from torch.nn import Module
from torch.utils.checkpoint import checkpoint

import kernels
from config import UserError, run
from families import DEFAULT, PRESETS, SCRATCH
from layers.attention import Attention
from layers.basic import Embedding, Linear, Norm
from layers.context import Context
from layers.flops import count_flops
from layers.kv_cache import Cache
from layers.moe import MLP, MoE
from layers.rope import rope_table

# what `layer_types` may name; layers/context.py says what a mixer is, and a file of yours may add
# one: MIXERS["mine"] = Mine (tests/layers/test_mixers.py does)
MIXERS: dict[str, type[Module]] = {"full_attention": Attention, "sliding_attention": Attention}


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
    # --- positions
    position: str = "learned"           # learned, rope or none
    rope_theta: float = 10000.0
    rope_local_theta: float = 0.0       # of layers with a window, unscaled; 0: rope_theta
    rope_scaling: dict | None = None    # Hugging Face's: rope_type linear, llama3, yarn; factors
    rope_interleaved: bool = False      # pairs (2i, 2i + 1), not (i, i + D/2)
    partial_rotary_factor: float = 1.0  # share of a head's features that rotate, the first ones
    nope_layers: list | None = None     # numbers of the layers without positions
    # --- norms and wiring
    norm: str = "layernorm"             # layernorm or rmsnorm
    norm_eps: float = 1e-5
    norm_offset: float = 0.0            # 1: x (1 + w), Gemma's
    norm_placement: str = "pre"         # pre, post, sandwich (both), parallel (attention + MLP)
    activation: str = "gelu"            # a name in kernels.ACTIVATIONS
    gated: bool = False                 # act(gate x) * (up x) instead of act(up x)
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    norm_bias: bool = False
    embedding_multiplier: float = 1.0   # x after the embedding; 0: sqrt(n_embd), Gemma's
    residual_multiplier: float = 1.0    # each branch before it is added (MiniCPM)
    logits_scaling: float = 1.0         # logits are divided by it
    final_logit_softcapping: float = 0.0    # c tanh(logits / c); 0: none
    tie_word_embeddings: bool = True    # the output matrix is the embedding matrix
    # --- attention
    qk_norm: bool = False               # RMSNorm on each head of q and k, before RoPE
    qk_norm_whole: bool = False         # over all heads of a token together (Olmo 2)
    attention_multiplier: float = 0.0   # of q k^T; 0: 1 / sqrt(head_dim)
    attn_logit_softcapping: float = 0.0
    sliding_window: int = 0             # a query sees that many keys, itself included; 0: all
    sliding_window_pattern: int = 0     # every n-th layer is without the window; 0: none is
    layer_types: list | None = None     # the mixer of each layer, a key of MIXERS
    # --- mixture of experts
    num_experts: int = 0                # routed experts; 0: one MLP for every token
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 0      # width of an expert; 0: intermediate_size
    n_shared_experts: int = 0           # experts that see every token, as one MLP
    first_k_dense_replace: int = 0      # the first k layers have an ordinary MLP
    mlp_only_layers: list | None = None     # numbers of further layers with an ordinary MLP
    scoring_func: str = "softmax"       # of the router's logits, or sigmoid (DeepSeek-V3)
    router_bias: bool = False           # a correction that counts for the choice alone
    norm_topk_prob: bool = False        # the chosen scores are divided by their sum
    routed_scaling_factor: float = 1.0
    # --- training
    dropout: float = 0.0
    init_std: float = 0.02
    saved_as: str = ""                  # model_type to write, where several families fit

    @classmethod
    def from_preset(cls, name: str, **changes) -> ModelConfig:
        """Return the ModelConfig of a published shape, with `changes` laid over it."""
        if name not in PRESETS:
            raise UserError(f"unknown preset {name!r}; choose from {', '.join(PRESETS)}, or give "
                            "a checkpoint directory")
        return cls(**{**PRESETS[name], **changes})

    @classmethod
    def from_family(cls, name: str, **shape) -> ModelConfig:
        """Return a ModelConfig with a family's flags and a shape of your own."""
        if name not in SCRATCH:
            raise UserError(f"unknown family {name!r}; choose from {', '.join(SCRATCH)}")
        row = SCRATCH[name]
        values = {**row.flags, **row.from_shape(shape), **shape}
        values["saved_as"] = row.saved_as
        if values.get("num_experts") and values.get("num_experts_per_tok", 2) == 1:
            # one expert's share of itself is 1 whatever its score: the router would not learn
            values["norm_topk_prob"] = False
        return cls(**values)

    def __post_init__(self):
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} {getattr(self, name)} must be at least 1")
        for name in ("n_kv_head", "head_dim", "intermediate_size", "sliding_window",
                     "sliding_window_pattern", "num_experts", "moe_intermediate_size",
                     "n_shared_experts", "first_k_dense_replace"):
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
                   "norm_placement": ("pre", "post", "sandwich", "parallel"),
                   "activation": tuple(kernels.ACTIVATIONS), "scoring_func": ("softmax", "sigmoid")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise UserError(f"unknown {name} {getattr(self, name)!r}; choose from "
                                f"{', '.join(allowed)}")
        if self.position == "rope" and (self.rotary_dim % 2 or not self.rotary_dim):
            raise UserError(f"head_dim {self.head_dim} x partial_rotary_factor "
                            f"{self.partial_rotary_factor} is odd or 0: RoPE rotates pairs")
        self.embedding_multiplier = self.embedding_multiplier or math.sqrt(self.n_embd)
        self.attention_multiplier = self.attention_multiplier or self.head_dim ** -0.5
        if self.layer_types is None and self.sliding_window:
            n = self.sliding_window_pattern
            self.layer_types = ["full_attention" if n and i % n == n - 1 else "sliding_attention"
                                for i in range(self.n_layer)]
        self.sliding_window_pattern = 0
        types = self.layer_types
        if types is not None:
            if len(types) != self.n_layer:
                raise UserError(f"layer_types names {len(types)} mixers for {self.n_layer} layers: "
                                "give one per layer")
            if unknown := [t for t in types if t not in list(MIXERS)]:
                raise UserError(f"layer_types: unknown mixer {reprlib.repr(unknown[0])}; each "
                                f"layer needs one of {', '.join(MIXERS)}")
            if "sliding_attention" in types and not self.sliding_window:
                raise UserError("layer_types has sliding_attention, whose window is missing: give "
                                "sliding_window")
        if not set(self.nope_layers or ()) <= set(range(self.n_layer)):
            raise UserError(f"nope_layers {self.nope_layers} are not among {self.n_layer} layers")
        if self.num_experts:
            self.moe_intermediate_size = self.moe_intermediate_size or self.intermediate_size
            if not 1 <= self.num_experts_per_tok <= self.num_experts or not self.gated:
                raise UserError(f"num_experts_per_tok {self.num_experts_per_tok} of num_experts "
                                f"{self.num_experts} cannot be: choose 1 to {self.num_experts}"
                                " (and gated experts)")

    @property
    def rotary_dim(self) -> int:
        return int(self.head_dim * self.partial_rotary_factor)

    def layer_type(self, layer: int) -> str:
        """Return the name of the layer's mixer in MIXERS."""
        return self.layer_types[layer] if self.layer_types else "full_attention"

    def window(self, layer: int) -> int:
        """Return the number of keys that a query of the layer sees, 0: all before it."""
        return self.sliding_window if self.layer_types and (
            self.layer_types[layer] == "sliding_attention") else 0

    def is_moe(self, layer: int) -> bool:
        """Return whether the layer has routed experts instead of one MLP."""
        dense = layer < self.first_k_dense_replace or layer in (self.mlp_only_layers or ())
        return self.num_experts > 0 and not dense

# ----------------------------------------------------------------------------- the layers


class Block(Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)); norms before, after, both, or in parallel."""
    packed = False          # set by pack(): serving has no use for the hooks of Module.__call__

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        c = config
        self.config = config
        if c.norm_placement != "post":
            self.input_layernorm = Norm(c, c.n_embd, bias=c.norm_bias)
        mixer = MIXERS[c.layer_type(layer)]
        self.mixer_name = mixer.name
        self.add_module(mixer.name, mixer(c, layer))
        if c.norm_placement in ("post", "sandwich"):
            self.post_self_attn_layernorm = Norm(c, c.n_embd, bias=c.norm_bias)
        if c.norm_placement in ("pre", "sandwich"):
            # Hugging Face's Llama calls the norm before the MLP by what it comes after
            self.post_attention_layernorm = Norm(c, c.n_embd, bias=c.norm_bias)
        self.mlp = MoE(c) if c.is_moe(layer) else MLP(c, c.intermediate_size)
        if c.norm_placement in ("post", "sandwich"):
            self.post_mlp_layernorm = Norm(c, c.n_embd, bias=c.norm_bias)

    @property
    def mixer(self) -> Any:
        """Return the layer's mixer, whatever name its parameters have."""
        return getattr(self, self.mixer_name)

    def add(self, x: Tensor, branch: Tensor) -> Tensor:
        """Return x + branch, which dropout and a multiplier may change."""
        c = self.config
        if c.dropout and self.training:
            branch = kernels.dropout(branch, c.dropout)
        return x + (branch if c.residual_multiplier == 1 else branch * c.residual_multiplier)

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, dict | None]:
        """x (B, T, C) -> (x, the routes of an MoE layer or None)."""
        placement = self.config.norm_placement
        h = x if placement == "post" else self.input_layernorm(x)
        mixer = self.mixer.forward if self.packed else self.mixer
        y = mixer(h, context)
        if placement in ("post", "sandwich"):
            y = self.post_self_attn_layernorm(y)
        x = self.add(x, y)
        if placement != "parallel":                 # in parallel the MLP reads what attention read
            h = x if placement == "post" else self.post_attention_layernorm(x)
        y = self.mlp.forward(h) if self.packed else self.mlp(h)
        y, seen = y if isinstance(y, tuple) else (y, None)
        if placement in ("post", "sandwich"):
            y = self.post_mlp_layernorm(y)
        return self.add(x, y), seen


class Transformer(Module):
    """Embedding, blocks, final norm, output matrix; see the module's docstring for its use."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        c = config
        self.config = config
        self.model = Module()
        self.model.embed_tokens = Embedding(c.vocab_size, c.n_embd)
        if c.position == "learned":
            self.model.embed_positions = Embedding(c.block_size, c.n_embd)
        self.model.layers = Module()
        for i in range(c.n_layer):
            self.model.layers.add_module(str(i), Block(c, i))
        self.model.norm = Norm(c, c.n_embd, bias=c.norm_bias)
        if not c.tie_word_embeddings:
            self.lm_head = Linear(c.n_embd, c.vocab_size)
        self.compute_dtype: torch.dtype | None = None   # of the activations; None: the weights'
        self.output: Callable | None = None             # hidden -> logits, by quantize.pack()
        self.checkpointing = False                      # recompute blocks in the backward
        self.tables: dict = {}                          # rope_table by (length, device)
        if not self.model.norm.weight.is_meta:
            self.init_weights()

    def init_weights(self) -> None:
        """Initialise as GPT-2: N(0, 0.02), and residual projections divided by sqrt(2 n_layer), so
        that the sum of all branches keeps its variance at any depth (Radford 2019, section 2.3)."""
        c = self.config
        for name, p in self.named_parameters():
            if p.ndim >= 2:
                residual = "o_proj" in name or "down_proj" in name
                shrink = math.sqrt(2 * c.n_layer) if residual else 1.0
                torch.nn.init.normal_(p, std=c.init_std / shrink)

    @property
    def output_weight(self) -> Tensor:
        """Return the (V, C) matrix that turns hidden states into logits."""
        tied = self.config.tie_word_embeddings
        return self.model.embed_tokens.weight if tied else self.lm_head.merged_weight()

    def new_cache(self, batch: int, length: int) -> Cache:
        """Return an empty cache for `length` tokens in each of `batch` rows."""
        device = self.output_weight.device
        dtype = self.compute_dtype or self.output_weight.dtype
        groups: dict[Any, list[int]] = {}               # layers that share a state
        mixers = [block.mixer for block in self.model.layers.children()]
        for i, mixer in enumerate(mixers):
            groups.setdefault(getattr(mixer, "state_key", i), []).append(i)
        states: dict[int, Any] = {}
        for layers in groups.values():
            state = mixers[layers[0]].new_state(batch, length, device, dtype, layers)
            states.update(dict.fromkeys(layers, state))
        return Cache([states[i] for i in range(len(mixers))], batch, length, device)

    def rope(self, positions: Tensor | None, start: int, T: int, device, dtype) -> list[Callable]:
        """Return the function that turns x (B, T, H, D) at the positions at hand, and that of the
        layers with a base of their own."""
        length = min(self.config.block_size, 1 << 17)   # a context of millions is seldom used
        length = length if start + T <= length else 1 << (start + T - 1).bit_length()
        if (length, device) not in self.tables:
            kinds = (False, True) if self.config.rope_local_theta else (False,)
            with torch.inference_mode(False):           # training may come after sampling
                self.tables = {(length, device): [rope_table(self.config, length, device, local)
                                                  for local in kinds]}
        rows = slice(start, start + T) if positions is None else positions      # (T) or (B, T)
        return [kernels.prepare_rope(cos[rows], sin[rows], dtype, self.config.rope_interleaved)
                for cos, sin in self.tables[length, device]]

    def forward(self, ids: Tensor, *, doc: Tensor | None = None, cache: Cache | None = None,
                head: Callable[[Tensor, Tensor], Tensor] | None = None, router: bool = False):
        """ids (B, T) int64 -> head(hidden (B, T, C), weight (V, C)), or logits (B, T, V).

        doc (B, T): each document is as it were alone. With a cache, ids go on where it ends.
        router: returns (that, what each MoE layer's router saw, as MoE.forward gives it).
        """
        c = self.config
        T = ids.shape[1]
        start = 0
        positions = None
        if cache is not None:
            start = cache.end
            positions = cache.positions(T)
            if start + T > cache.length:
                raise UserError(f"{start + T} tokens do not fit the cache of {cache.length}: "
                                "generate less or ask for a longer cache")
            cache.begin(T)
        x = kernels.embedding(ids, self.model.embed_tokens.weight)
        rope = None
        if c.position == "learned":
            if start + T > c.block_size:
                raise UserError(f"{start + T} tokens are more than the {c.block_size} learned "
                                "positions of this model: lower block_size or crop the text")
            where = positions
            if where is None:
                where = torch.arange(start, start + T, device=ids.device)
                if doc is not None and cache is None:       # each document begins at position 0
                    where = where - torch.where(doc != doc.roll(1, 1), where, 0).cummax(1)[0]
            x = x + kernels.embedding(where, self.model.embed_positions.weight)
        elif c.position == "rope":
            rope = self.rope(positions, start, T, ids.device, self.compute_dtype or x.dtype)
        x = x.to(self.compute_dtype or x.dtype)
        if c.embedding_multiplier != 1:
            # in bfloat16 Gemma rounds the factor as well, sqrt(640) to 25.25
            x = x * torch.tensor(c.embedding_multiplier, dtype=x.dtype)
        if c.dropout and self.training:
            x = kernels.dropout(x, c.dropout)
        routes = []
        context = Context(rope, doc, cache)
        for block in self.model.layers.children():
            if self.checkpointing and self.training:
                x, seen = checkpoint(block, x, context, use_reentrant=False)
            else:
                x, seen = (block.forward if block.packed else block)(x, context)
            if router and seen is not None:
                routes.append(seen)
        if cache is not None:
            cache.advance(T)
        x = self.model.norm(x)
        if c.logits_scaling != 1:
            x = x / c.logits_scaling
        out = (head or self.to_logits)(x, self.output_weight)
        return (out, routes) if router else out

    def to_logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Return logits (..., V) of hidden (..., C) and weight (V, C): the plain head."""
        z = self.output(hidden) if self.output else kernels.linear(hidden, weight)
        cap = self.config.final_logit_softcapping
        return torch.tanh(z / cap) * cap if cap else z

    def logits(self, ids: Tensor, doc: Tensor | None = None) -> Tensor:
        """Return logits (B, T, V) float32 of ids (B, T), without gradients, for tests."""
        with torch.no_grad():
            return self(ids, doc=doc).float()

    @torch.no_grad()
    def balance(self, load: Tensor, rate: float) -> None:
        """Move each router's bias by `rate` towards the experts that got less than their share;
        load (layers with experts, E). Bias instead of a balance loss, which costs quality. No
        gradient moves it, so its router's weight says whether it is frozen (LoRA, --unfreeze)."""
        routers = [m.gate for m in self.modules() if isinstance(m, MoE)]
        for gate, counts in zip(routers, load):
            if gate.weight.requires_grad:
                gate.e_score_correction_bias += rate * torch.sign(counts.mean() - counts)

    # ------------------------------------------------------------------ what it costs

    def parameter_count(self, embeddings: bool = True, active: bool = False) -> int:
        """Return the number of parameters; without embeddings, of those in no look-up table
        (nanoGPT's N); active: of those that one token meets, its chosen experts included."""
        c = self.config
        total = 0
        for name, p in self.named_parameters():
            if not embeddings and "embed_positions" in name:
                continue
            share = p.numel()
            if active and p.ndim == 3:
                share = share // c.num_experts * c.num_experts_per_tok
            total += share
        return total

    def state_size(self, length: float) -> float:
        """Return the numbers in the cache of one row of `length` tokens, in all layers."""
        return sum(block.mixer.state_size(length) for block in self.model.layers.children())

    def flops_per_token(self, T: int, training: bool = True, targets: float = 1.0) -> float:
        """Return the FLOPs of the matmuls that a token of a context of T costs, with the backward
        of what trains; see layers/flops.py. targets: share of tokens with one."""
        return count_flops(self, T, training, targets)


def estimate_costs(config: ModelConfig, block_size: int = 0) -> dict[str, str]:
    """Return what a model costs, as a table: parameters, FLOPs, and memory in GB (1e9 bytes)."""
    with torch.device("meta"):                         # shapes without memory
        model = Transformer(config)
    T = block_size or config.block_size
    N = model.parameter_count()
    cache = 2 * model.state_size(T)
    rows = {"parameters": f"{N:,}"}
    if config.num_experts:
        rows["active parameters per token"] = f"{model.parameter_count(active=True):,}"
    rows |= {"context": f"{T:,}",
             "forward GFLOPs per token": f"{model.flops_per_token(T, training=False) / 1e9:.3f}",
             "training GFLOPs per token": f"{model.flops_per_token(T) / 1e9:.3f}",
             "GB to train (fp32 weights, grads, AdamW)": f"{16 * N / 1e9:.2f}",
             "GB to serve (bf16)": f"{2 * N / 1e9:.2f}",
             "GB to serve (int8)": f"{N / 1e9:.2f}",
             "GB of KV cache per sequence (bf16)": f"{cache / 1e9:.3f}"}
    return rows


def print_costs(title: str, config: ModelConfig, block_size: int = 0) -> None:
    """Print the table of estimate_costs()."""
    print(title)
    for name, value in estimate_costs(config, block_size).items():
        print(f"  {name:42s}{value:>20s}")


@dataclass
class Config:
    show: str = DEFAULT                 # a preset, a checkpoint or a run: print what it costs
    block_size: int = 0                 # context to count FLOPs at; 0: the preset's own


def main(cfg: Config) -> None:
    if cfg.show not in PRESETS and Path(cfg.show).is_dir():
        # checkpoints are read above this file: that is its script's work
        script = Path(__file__).with_name("checkpoint.py")
        command = [sys.executable, str(script), cfg.show, "--costs=1"]
        sys.exit(subprocess.run([*command, f"--block_size={cfg.block_size}"]).returncode)
    print_costs(cfg.show, ModelConfig.from_preset(cfg.show), cfg.block_size)


if __name__ == "__main__":
    run(main, Config)
