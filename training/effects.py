"""Which settings of a run have an effect, and when: one that has none is refused, never ignored.

    class Config(train.Config, Lora):
        IDLE = effects.STAGE + (Idle("gamma", "loss", lambda c, m: c.loss != "simpo", ...),)

config.refuse_idle() reads these tables, once the shape of the model is known. A script adds rows
for its own settings, beside them.
"""
from __future__ import annotations

from typing import Any

from config import Idle

# What describes a model of random weights
SHAPE = ("family n_layer n_head n_kv_head n_embd head_dim intermediate_size bias qk_norm "
         "tie_word_embeddings rope_theta activation gated sliding_window num_experts "
         "num_experts_per_tok moe_intermediate_size n_shared_experts init_std")
ADAPTER = "lora_rank lora_alpha lora_dropout targets rslora dora"


def is_resumed(cfg: Any, shape: Any = None) -> bool:
    """Return whether an earlier run goes on, with its optimizer and its shape."""
    return cfg.init_from == "resume"


def is_pretrained(cfg: Any, shape: Any = None) -> bool:
    """Return whether the model comes from a checkpoint."""
    return cfg.init_from != "scratch"


def is_constant(cfg: Any, shape: Any = None) -> bool:
    """Return whether the learning rate stays what it is, but for the warmup."""
    return not cfg.decay_lr or cfg.schedule == "constant"


TRAIN = (
    Idle(f"{SHAPE} preset", "", is_pretrained, "on a checkpoint, which has a shape of its own"),
    Idle("family bias", "preset", lambda c, m: c.preset, "with --preset"),
    Idle("bias", "family", lambda c, m: c.family != "gpt2" and not c.bias,
         "on a family that has biases of its own"),
    Idle("rope_theta", "family preset", lambda c, m: m.position != "rope",
         "on a model without rotary positions"),
    Idle("num_experts_per_tok moe_intermediate_size n_shared_experts", "family num_experts",
         lambda c, m: not m.num_experts, "without --num_experts"),
    Idle("intermediate_size", "family num_experts", lambda c, m: m.num_experts
         and all(map(m.is_moe, range(m.n_layer))) and c.moe_intermediate_size,
         "where every MLP is experts, whose width is --moe_intermediate_size"),
    Idle("router_aux_loss_coef router_z_loss_coef router_sequence_wise", "family num_experts",
         lambda c, m: not m.num_experts, "on a model without experts"),
    Idle("router_bias_rate", "family", lambda c, m: not m.router_bias,
         "on a model whose router has no correction bias"),
    Idle("muon_learning_rate", "optimizer", lambda c, m: c.optimizer != "muon",
         "without --optimizer=muon"),
    Idle("schedule warmup_iters", "decay_lr", lambda c, m: not c.decay_lr, "with --decay_lr=0"),
    Idle("min_lr lr_decay_iters", "schedule decay_lr", is_constant,
         "on a learning rate that is constant"),
    Idle("wsd_decay", "schedule decay_lr", lambda c, m: is_constant(c) or c.schedule != "wsd",
         "without --schedule=wsd"),
    Idle("sample_prompt", "sample_interval", lambda c, m: not c.sample_interval,
         "without --sample_interval"),
    # in a config file they may stand beside wandb_log = False, as in nanoGPT's
    Idle("wandb_project wandb_run_name", "wandb_log", lambda c, m: not c.wandb_log
         and getattr(c, "typed", frozenset()) & {"wandb_project", "wandb_run_name"},
         "without --wandb_log"),
)

LORA = (
    Idle(ADAPTER, "", is_resumed, "on a run that is resumed"),
    Idle("lora_alpha lora_dropout targets rslora dora lora_int8", "lora_rank",
         lambda c, m: not c.lora_rank, "without --lora_rank"),
    Idle("router_bias_rate", "lora_rank", lambda c, m: c.lora_rank, "on a router that is frozen"),
    Idle("base", "init_from lora_rank", lambda c, m: not is_resumed(c) or not c.lora_rank,
         "but on a run with adapters that is resumed"),
)

STAGE = (
    Idle("epochs", "max_iters", lambda c, m: "max_iters" in getattr(c, "given", ())
         and c.max_iters, "beside --max_iters"),
    Idle("sample_prompt", "", lambda c, m: True,
         "here, where samples answer questions of the data"),
)
