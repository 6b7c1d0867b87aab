"""The settings that runs share, in groups: the Config of a script is composed of those it uses.

    @dataclass
    class Config(Hardware, Logging, Schedule, Optimization, Regularization, Shape, Source, Data):
        ...                             # defaults of its own, and settings that only it has

Dataclasses order fields from the last base class to the first, so --help begins with Data. A group
lists in IDLE which of its settings have no effect, and when: config.refuse_idle() reads these
tables, once the shape of the model is known, and one that has none is refused, never ignored.
"""
from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from config import Idle, refuse_to_run
from families import DEFAULT


def is_resumed(cfg: Any, shape: Any = None) -> bool:
    """Return whether an earlier run goes on, with its optimizer and its shape."""
    return cfg.init_from == "resume"


def is_pretrained(cfg: Any, shape: Any = None) -> bool:
    """Return whether the model comes from a checkpoint."""
    return cfg.init_from != "scratch"


def is_constant(cfg: Any, shape: Any = None) -> bool:
    """Return whether the learning rate is constant after the warmup."""
    return not cfg.decay_lr or cfg.schedule == "constant"


@dataclass
class Data:
    """What a run reads, and how much of it makes a step."""
    # --- data
    dataset: str = "stdlib"             # a name under data/, or the path of a prepared folder
    batch_size: int = 12                # rows of a micro-batch: lower it when memory runs out
    gradient_accumulation_steps: int = 40   # micro-batches of a step, over all ranks together
    block_size: int = 1024              # tokens of a row


@dataclass
class Source:
    """Where the weights come from."""
    # --- model
    init_from: str = "scratch"          # scratch, resume, a folder, or OpenAI's gpt2, gpt2-xl, …
    hub_dir: str = ""                   # where these are; empty: Hugging Face's cache


@dataclass
class Shape:
    """The model, where it is made from scratch."""
    preset: str = ""                    # a published shape from scratch: a key of families.PRESETS
    family: str = DEFAULT               # the flags of a model from scratch: see families/
    n_layer: int = 12
    n_head: int = 12
    n_kv_head: int = 0                  # key and value heads; 0: n_head
    n_embd: int = 768
    head_dim: int = 0                   # 0: n_embd / n_head
    intermediate_size: int = 0          # width of the MLP; 0: the family's rule
    bias: bool = False                  # biases in linears and LayerNorms
    qk_norm: bool | None = None         # None, here and below: the family's choice
    tie_word_embeddings: bool | None = None
    rope_theta: float | None = None
    activation: str | None = None       # gelu, gelu_new, silu, relu, relu2
    gated: bool | None = None
    sliding_window: int | None = None
    num_experts: int | None = None      # routed experts, in MoE families
    num_experts_per_tok: int | None = None
    moe_intermediate_size: int | None = None    # width of an expert
    n_shared_experts: int | None = None
    init_std: float = 0.02


SHAPE = " ".join(f.name for f in fields(Shape))
Shape.IDLE = (
    Idle(SHAPE, "", is_pretrained, "on a checkpoint, which has a shape of its own"),
    Idle("family bias", "preset", lambda c, m: c.preset, "with --preset"),
    Idle("bias", "family", lambda c, m: c.family != "gpt2" and not c.bias,
         "on a family that has biases of its own"),
    Idle("rope_theta", "family preset", lambda c, m: m.position != "rope",
         "on a model without rotary positions"),
    Idle("num_experts_per_tok moe_intermediate_size n_shared_experts", "family num_experts",
         lambda c, m: not m.num_experts, "without --num_experts"),
    Idle("intermediate_size", "family num_experts", lambda c, m: m.num_experts
         and all(map(m.is_moe, range(m.n_layer))) and c.moe_intermediate_size,
         "where every MLP is experts, whose width is --moe_intermediate_size"))


@dataclass
class Regularization:
    """How the blocks run while they are trained."""
    dropout: float = 0.0
    checkpointing: bool = False         # recompute blocks in the backward: less memory, 4/3 time


@dataclass
class Optimization:
    """The optimizer, and what is added to the loss."""
    # --- optimizer
    optimizer: str = "adamw"            # adamw, or muon on the hidden matrices
    learning_rate: float = 6e-4         # of AdamW
    muon_learning_rate: float = 0.02
    weight_decay: float = 0.1           # of matrices, under AdamW and Muon alike
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0              # 0: never clip
    z_loss: float = 0.0
    label_smoothing: float = 0.0
    router_aux_loss_coef: float = 0.01  # MoE: of the balance loss, whose minimum is k
    router_z_loss_coef: float = 0.0
    router_sequence_wise: bool = False  # balance within each sequence, not over the batch
    router_bias_rate: float = 0.001     # of the correction bias, in families that have one
    IDLE = (
        Idle("router_aux_loss_coef router_z_loss_coef router_sequence_wise", "family num_experts",
             lambda c, m: not m.num_experts, "on a model without experts"),
        Idle("router_bias_rate", "family", lambda c, m: not m.router_bias,
             "on a model whose router has no correction bias"),
        Idle("muon_learning_rate", "optimizer", lambda c, m: c.optimizer != "muon",
             "without --optimizer=muon"))


@dataclass
class Schedule:
    """How many steps, and the learning rate over them."""
    # --- learning rate
    max_iters: int = 600000             # steps
    decay_lr: bool = True
    schedule: str = "cosine"            # cosine, linear, constant or wsd (stable, then decay)
    warmup_iters: int = 2000
    lr_decay_iters: int = 0             # step at which min_lr is reached; 0: max_iters
    min_lr: float = -1.0                # -1: a tenth of learning_rate
    wsd_decay: float = 0.2              # share of the steps that wsd decays over
    IDLE = (
        Idle("schedule warmup_iters", "decay_lr", lambda c, m: not c.decay_lr, "with --decay_lr=0"),
        Idle("min_lr lr_decay_iters", "schedule decay_lr", is_constant,
             "on a learning rate that is constant"),
        Idle("wsd_decay", "schedule decay_lr", lambda c, m: is_constant(c) or c.schedule != "wsd",
             "without --schedule=wsd"))


@dataclass
class Logging:
    """What a run evaluates, prints and saves."""
    # --- evaluation, logs, checkpoints
    out_dir: str = "out"
    eval_interval: int = 2000
    eval_iters: int = 200               # times 8 rows: the validation set, at any batch_size
    eval_only: bool = False
    log_interval: int = 1
    always_save_checkpoint: bool = True     # at every evaluation, not only at a better one
    keep: int = 2                       # checkpoints kept besides the best
    sample_interval: int = 0            # print a sample every that many steps; 0: never
    wandb_log: bool = False
    wandb_project: str = "handmade"
    wandb_run_name: str = "run"
    tensorboard: bool = False
    plot: bool = False                  # draw out_dir/loss.svg at every evaluation
    # in a config file they may stand beside wandb_log = False, as in nanoGPT's
    IDLE = (Idle("wandb_project wandb_run_name", "wandb_log", lambda c, m: not c.wandb_log
                 and getattr(c, "typed", frozenset()) & {"wandb_project", "wandb_run_name"},
                 "without --wandb_log"),)


@dataclass
class Hardware:
    """Where a run computes, and in which precision."""
    # --- machine
    device: str = "auto"                # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"                 # auto, float32, bfloat16, float16
    compile: bool | None = None         # None: on a GPU yes, unless an MoE model; on a CPU no
    backend: str = "auto"               # of the operations: auto, reference, torch, triton, cuda
    seed: int = 1337


@dataclass
class Lora:
    """Adapters, which any stage after pretraining may train instead of the model."""
    # --- adapters
    lora_rank: int = 0          # of LoRA adapters, which train instead of the model; 0: none
    lora_alpha: float = 0.0     # their changes are scaled by alpha / rank; 0: twice the rank
    lora_dropout: float = 0.0   # before A
    targets: str = ""           # as q_proj,lm_head:8 (rank 8); empty: attention's and MLP's
    rslora: bool = False        # scale by alpha / sqrt(rank)
    dora: bool = False          # train the length of each row of W as well
    lora_int8: bool = False     # hold the frozen weights beside the adapters in int8
    base: str = ""              # of a resumed run: the frozen model, where it was moved elsewhere
    IDLE = (
        Idle("lora_rank lora_alpha lora_dropout targets rslora dora", "", is_resumed,
             "on a run that is resumed"),
        Idle("lora_alpha lora_dropout targets rslora dora lora_int8", "lora_rank",
             lambda c, m: not c.lora_rank, "without --lora_rank"),
        Idle("lora_rank lora_int8", "eval_only", lambda c, m: c.eval_only and not is_resumed(c),
             "with --eval_only, which evaluates a model as it is"),
        Idle("router_bias_rate", "lora_rank", lambda c, m: c.lora_rank,
             "on a router that is frozen"),
        Idle("base", "init_from lora_rank", lambda c, m: not is_resumed(c) or not c.lora_rank,
             "but on a run with adapters that is resumed"))


@dataclass
class Conversations:
    """How records become rows, in the stages after pretraining."""
    skip_bad: bool = False              # drop bad records, and count them
    ignore_keys: list[str] = field(default_factory=list)    # keys of records to leave out unread
    template: str = ""                  # a chat template; empty: the checkpoint's, or chatml
    show: int = 0                       # print the first rows as they are trained on, and stop
    epochs: float = 2.0                 # times that every row is seen
    IDLE = (Idle("epochs", "max_iters", lambda c, m: "max_iters" in getattr(c, "given", ())
                 and c.max_iters, "beside --max_iters"),)


@dataclass
class Finetuning(Hardware, Logging, Schedule, Optimization, Lora, Regularization, Source,
                 Conversations, Data):
    """The groups of every stage after pretraining, with the defaults of a small model."""
    ranges = {"warmup_iters": "-1 or [0, 1e12]"}
    dataset: str = "skills"             # a name under data/, a folder, or a file of conversations
    batch_size: int = 8                 # rows of a micro-batch
    gradient_accumulation_steps: int = 1    # micro-batches of a step, over all ranks together
    block_size: int = 0                 # tokens of a row; 0: the checkpoint's, at most 1024
    init_from: str = "out/demo"         # a folder: a run of train.py, any checkpoint; or resume
    # rates for a model of some million parameters; 2e-5 suits one of billions
    learning_rate: float = 5e-4         # of AdamW; 2e-5 suits a model of billions of parameters
    max_iters: int = 0                  # steps; 0: as many as the epochs have
    weight_decay: float = 0.0           # of matrices, under AdamW and Muon alike
    warmup_iters: int = -1              # -1: a twentieth of the steps
    schedule: str = "linear"            # cosine, linear, constant or wsd (stable, then decay)
    min_lr: float = 0.0                 # -1: a tenth of learning_rate
    out_dir: str = "out/sft"
    eval_interval: int = 200
    eval_iters: int = 50                # times 8 rows: the validation set, at any batch_size
    log_interval: int = 10
    # names of other scripts' settings -> what to do instead, for whoever gives them here
    ELSEWHERE = dict.fromkeys(SHAPE.split(), "the model has the shape of the checkpoint it starts "
                              "from: leave it out") | {
        "task": "classification is a script of its own: python classify.py",
        "document_mask": "conversations of a row never see each other: leave it out",
        "sample_prompt": "samples answer questions of the data: leave it out",
        **dict.fromkeys(("unfreeze", "text_key", "label_key"), "it is a setting of classify.py")}


if __name__ == "__main__":
    refuse_to_run()
