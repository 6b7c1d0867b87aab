"""What the stages after pretraining do alike: sft, lora, dpo and distill are built on this file.

    import stage
    done = stage.go(cfg, read, losses)      # a checkpoint, a stage's data and its loss -> fit()

Nothing to run, and the same on every device: a stage is its data and its loss, and hands both to
go(). What to expect of go(): the checkpoint's block size, tokenizer and template are inherited,
which is said; control tokens that the template lacks get rows in the matrices; on resume every
setting that is not given is the saved run's; adapters, ranks, --show and --eval_only work alike.
"""
from __future__ import annotations

import json
import math
import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Callable, NamedTuple

import torch
import torch.distributed as dist
from torch.nn import Parameter

from text.chat import find
import checkpoint
import kernels
import train
from config import UserError, refuse_idle, refuse_to_run, show
from data import chats, loader
from formats import atomic
from formats.peft import FOLDER, find_base, load_adapter, read_base, save_adapter
from formats.run_folder import GROWN, fingerprint as fingerprint_model
from inference.classify import label_ids
from inference.generate import Sampling, sample_text
from training.machine import Machine, find_machine
from layers.lora import add_lora, describe, halve, select
from model import ModelConfig, Transformer
from training import effects
from training.start import (check_data, find_pretrained, get_in_force, prepare_out_dir, take_shape)

# what makes the models that the stages' configs start from
BEFORE = {"out/demo": "train.py config/demo.py", "out/sft": "sft.py config/sft_skills.py"}
CONTEXT = 1024          # a row is no longer by default, though many a model could read more


@dataclass
class Lora:
    """What any stage may be asked to do with adapters; its Config inherits them."""
    lora_rank: int = 0          # of LoRA adapters, which train instead of the model; 0: none
    lora_alpha: float = 0.0     # their changes are scaled by alpha / rank; 0: twice the rank
    lora_dropout: float = 0.0   # before A
    targets: str = ""           # as q_proj,lm_head:8 (rank 8); empty: attention's and MLP's
    rslora: bool = False        # scale by alpha / sqrt(rank)
    dora: bool = False          # train the length of each row of W as well
    lora_int8: bool = False     # hold the frozen weights beside the adapters in int8
    base: str = ""              # of a resumed run: the frozen model, where it was moved elsewhere
    IDLE = effects.LORA         # which of these have no effect, and when


@dataclass
class Config(train.Config, Lora):
    ranges = {"warmup_iters": "-1 or [0, 1e12]"}
    # --- data
    dataset: str = "skills"             # a name under data/, a folder, or a file of conversations
    skip_bad: bool = False              # drop bad records, and count them
    ignore_keys: list[str] = field(default_factory=list)    # keys of records to leave out unread
    template: str = ""                  # of chat.py; empty: the checkpoint's, or chatml
    show: int = 0                       # print so many rows as they are trained on, and stop
    batch_size: int = 8                 # rows of a micro-batch
    gradient_accumulation_steps: int = 1    # micro-batches of a step, over all ranks together
    block_size: int = 0                 # tokens of a row; 0: the checkpoint's, at most 1024
    document_mask: bool = True          # conversations of a row never see each other
    # --- model
    init_from: str = "out/demo"         # a folder: a run of train.py, any checkpoint; or resume
    # --- optimizer: rates for a model of some million parameters; 2e-5 suits one of billions
    learning_rate: float = 5e-4
    max_iters: int = 0                  # steps; 0: as many as the epochs have
    epochs: float = 2.0                 # times that every row is seen
    weight_decay: float = 0.0
    warmup_iters: int = -1              # -1: a twentieth of the steps
    schedule: str = "linear"
    min_lr: float = 0.0
    # --- evaluation, logs, checkpoints
    out_dir: str = "out/sft"
    eval_interval: int = 200
    eval_iters: int = 50                # times 8 rows: the validation set, at any batch_size
    log_interval: int = 10
    IDLE = effects.STAGE                # which of these have no effect, and when


class Data(NamedTuple):
    """What a stage trains on."""
    batches: Any                        # (step) -> Batch; len() rows; gather(rows), epoch(n)
    held_out: Any = None                # the same for validation, or None
    records: list[dict] = []            # some that samples may be made from


class Done(NamedTuple):
    """What go() leaves, for a stage that has more to say."""
    state: train.State
    model: Transformer
    tokenizer: Any
    machine: Machine
    data: Data

# ------------------------------------------------------------------- what a checkpoint knows


def inherit(cfg: Config, shape: ModelConfig, tokenizer: Any, chat: bool = True) -> list[str]:
    """Settle what the command line leaves open with what the checkpoint knows, in place.

    Returns what was inherited or is new, to be told; the tokenizer has the template from here on.
    chat: whether the stage's data are conversations, which need one.
    """
    said = []
    if cfg.block_size <= 0:
        cfg.block_size = min(shape.block_size, CONTEXT)
        whole = "" if cfg.block_size == shape.block_size else f" of its {shape.block_size:,}"
        said.append(f"block size {cfg.block_size}{whole}")
    elif cfg.block_size > shape.block_size:
        raise UserError(f"block_size {cfg.block_size} is more than the {shape.block_size} tokens "
                        "that the checkpoint was made for: use at most that")
    said.append(f"a tokenizer of {tokenizer.vocab_size:,} ids")
    own = "" if tokenizer.template or not tokenizer.jinjas else "the checkpoint's own chat template"
    done = bool(tokenizer.template or own) and cfg.template in ("", tokenizer.template)
    if done:
        said.append(own or f"template {tokenizer.template}")
    # what the saved settings say of the model shall be true of it
    take_shape(cfg, shape)
    said = ["inherited from the checkpoint: " + ", ".join(said)]
    if done or not chat:
        return said
    row = find(cfg.template or "chatml")
    control = row.control(tokenizer.eot_token or "<|endoftext|>")
    names = [name for name in control if name not in tokenizer.added]
    tokenizer.add_special_tokens(names)
    instead = f" instead of {tokenizer.template or own}" if tokenizer.template or own else ""
    tokenizer.template = row.name
    said.append(f"template {row.name}{instead}" + (
        f", whose tokens {' '.join(names)} are new: a vocabulary of {tokenizer.vocab_size:,} ids"
        if names else ", whose tokens the tokenizer has"))
    return said


@torch.no_grad()
def grow(model: Transformer, vocab_size: int, known: int) -> None:
    """Give ids known .. vocab_size - 1 rows in the embedding and the output matrix.

    Each is drawn around the mean of the old ones, with their spread: a token about which nothing
    is known (Hewitt 2021). The trap: all at the mean itself, the end of a turn and its beginning
    would be one token to a model whose matrices are frozen (LoRA). Padding rows are used first.
    """
    if vocab_size == known:
        return
    matrices = [model.model.embed_tokens]
    if not model.config.tie_word_embeddings:
        matrices.append(model.lm_head)
    for m in matrices:
        old, rows = m.weight[:known], max(vocab_size, len(m.weight))
        # drawn on the CPU, so that every device and every rank has the same
        noise = torch.randn(vocab_size - known, old.shape[1],
                            generator=torch.Generator().manual_seed(known)).to(old)
        weight = m.weight.new_empty(rows, old.shape[1])
        weight[:len(m.weight)] = m.weight
        weight[known:vocab_size] = old.mean(0) + old.std(0) * noise
        m.weight = Parameter(weight)
    model.config.vocab_size = max(vocab_size, model.config.vocab_size)


def start_from(cfg: Config) -> tuple[ModelConfig, Any]:
    """(shape, tokenizer) of the checkpoint that training starts from, which cfg.init_from names
    from here on: the run that it belongs to may be moved aside."""
    resume = cfg.init_from == "resume"
    cfg.init_from = find_pretrained(cfg.init_from, cfg.hub_dir)
    source, which = (cfg.out_dir, "last") if resume else (cfg.init_from, "best")
    try:
        directory = checkpoint.resolve(source, which)
    except UserError as e:
        before = BEFORE.get(source.rstrip("/"))
        if resume or not before:
            raise
        raise UserError(f"there is no trained model at {source}, where this stage starts: make one "
                        f"with `python {before}`, or name another with --init_from=DIR") from e
    if not resume:
        cfg.init_from = str(directory)
    return checkpoint.read_config(directory), checkpoint.load_tokenizer(directory)


def check(cfg: Config) -> None:
    """UserError for a setting that no run can have; what is still to be found counts as good."""
    train.check(replace(cfg, max_iters=cfg.max_iters or 1))
    if cfg.lora_rank < 0 or cfg.lora_alpha < 0 or not 0 <= cfg.lora_dropout < 1:
        raise UserError(f"lora_rank {cfg.lora_rank}, lora_alpha {cfg.lora_alpha}, lora_dropout "
                        f"{cfg.lora_dropout}: rank and alpha must be at least 0 and dropout from "
                        "0 up to 1")
    if not cfg.document_mask:
        raise UserError("--document_mask=0 would let a conversation read the one before it: leave "
                        "it out")


def answer(model: Transformer, tokenizer: Any, record: dict[str, Any], seed: int) -> str:
    """The first question of a conversation and what the model says to it, with control tokens."""
    messages = record["messages"]
    roles = [m["role"] for m in messages]
    asked = roles.index("user")             # some begin with a greeting of the assistant
    first = roles.index("assistant", asked) if "assistant" in roles[asked:] else None
    ids = tokenizer.render(messages[:first], None, True, **chats.render_options(record))[0]
    return sample_text(model, tokenizer, ids, Sampling(temperature=0), seed)


def steps_of(epochs: float, rows: int, batch: int) -> int:
    """Steps in which every row is seen `epochs` times: rounded up, as transformers' Trainer does.

    Rounded to the nearest, 11 rows in steps of 8 would be one step, and 3 of them never seen.
    """
    return max(1, math.ceil(round(epochs * rows / batch, 9)))    # 0.1 x 30 is 3.0000000000000004

# ------------------------------------------------------------------------------- adapters


def find_frozen(cfg: Any) -> Any:
    """The settings to build a stage's model by: on resume with adapters it is the base again."""
    if cfg.init_from == "resume" and cfg.lora_rank:
        last = checkpoint.resolve(cfg.out_dir, "last") / FOLDER
        cfg = replace(cfg, init_from=str(find_base([last], cfg.base)))
    return cfg


def place_base(cfg: Any) -> Path:
    """Return where a base with rows for new tokens is saved; UserError if that is not a run's."""
    base = Path(cfg.out_dir) / "base"
    if base.exists() and not (base / GROWN).is_file():
        raise UserError(f"the model with rows for new tokens is to be saved as {base}, which no "
                        "run has made: choose another --out_dir")
    return base


def add_adapters(cfg: Any, model: Transformer, tokenizer: Any, grown: bool = False,
          dtype: torch.dtype | None = None, base: str = "") -> str:
    """What a stage does with its model before fit(), if cfg.lora_rank: new adapters, or on resume
    those of the last checkpoint, which holds the merged weights and has them as a folder.

    grown: the model is no longer what lies at cfg.init_from, it has rows for new tokens, say: then
    it is saved as out_dir/base. dtype: of the activations; see halve(). base: of a resumed run,
    as start_from() found it. Returns describe()."""
    fingerprint = ""
    if cfg.init_from == "resume":
        last = checkpoint.resolve(cfg.out_dir, "last") / FOLDER
        base = base or find_frozen(cfg).init_from
        fingerprint = read_base(last).get("fingerprint", "")
        load_adapter(last, model, int8=cfg.lora_int8)
    else:
        base = os.path.abspath(place_base(cfg) if grown else checkpoint.resolve(cfg.init_from))
        if os.environ.get("RANK", "0") == "0":
            if grown:
                checkpoint.save_model(base, model, tokenizer, extra={GROWN: json.dumps(
                    {"init_from": cfg.init_from}) + "\n"})
            fingerprint = fingerprint_model(Path(base))
        add_lora(model, cfg.lora_rank, cfg.lora_alpha or 2.0 * cfg.lora_rank, cfg.lora_dropout,
                 cfg.targets, cfg.rslora, cfg.dora, int8=cfg.lora_int8)
    base = os.path.abspath(base)
    if dtype == torch.bfloat16:
        halve(model)
    # called by save_checkpoint(), which itself saves what the layers amount to
    model.save_beside = lambda checkpoint: save_adapter(checkpoint / FOLDER, model, base=base,
                                                        fingerprint=fingerprint)
    return describe(model)

# ----------------------------------------------------------------------------- the way it goes


def go(cfg: Config, read: Callable, losses: Callable, *, start: Callable = start_from,
       verify: Callable = check, chat: bool = True) -> Done | None:
    """A stage from its settings to its last checkpoint; None where rows were only shown.

    start(cfg) -> (shape, tokenizer) of the model that training starts from.
    verify(cfg) raises UserError for what cannot be, once the checkpoint's part is known.
    read(cfg, shape, tokenizer, rows, notes) -> Data: reads and packs for a global batch of `rows`
    rows, adds what is to be said to notes, and to the tokenizer what it has to know.
    losses(cfg, model, data, tokenizer, machine) -> train.Loss: called when the model is complete,
    so that it may freeze weights or look at the data with the model before it moves.
    """
    if cfg.init_from == "resume":
        cfg = train.inherit(cfg)
        if "epochs" in cfg.given and "max_iters" not in cfg.given:
            cfg.max_iters = 0
    kernels.use(cfg.backend)
    shape, tokenizer = start(cfg)
    if chat and label_ids(tokenizer):
        raise UserError(f"{cfg.init_from} is a classifier, and what is made of it would be taken "
                        "for one: start from the model that it was trained from, or say "
                        "--task=classify to sft.py")
    refuse_idle(cfg, shape, get_in_force(cfg, shape, effects.is_pretrained(cfg)
                                           or getattr(cfg, "layers_from_teacher", False)))
    known = tokenizer.vocab_size
    notes = inherit(cfg, shape, tokenizer, chat)
    verify(cfg)
    machine = find_machine(cfg)
    try:
        rows = train.rows_of_step(cfg, machine)
        data = read(cfg, shape, tokenizer, rows, notes)
        file = Path(cfg.dataset).expanduser()
        check_data(cfg, file if file.is_file() else loader.find(cfg.dataset))
        # how many steps follows from the size of the data
        cfg.max_iters = cfg.max_iters or steps_of(cfg.epochs, len(data.batches), rows)
        notes.append(f"{cfg.max_iters:,} steps of {rows:,} rows are "
                     f"{cfg.max_iters * rows / len(data.batches):.4g} epochs")
        if cfg.warmup_iters < 0:
            cfg.warmup_iters = cfg.max_iters // 20
        if machine.main:
            print("\n".join(notes), file=sys.stderr)
        if cfg.show:
            if machine.main:
                numbers = data.batches.epoch(0)[:max(1, cfg.show)].tolist()
                print(chats.show(tokenizer, data.batches.gather(numbers)))
            return None
        # ------ the model, with rows for new tokens, and what of it trains
        adapters = cfg.lora_rank > 0 and not cfg.eval_only      # to evaluate, they are merged
        base = find_frozen(cfg) if adapters else cfg
        fresh = cfg.init_from == "scratch"
        model = train.build_model(base, tokenizer.vocab_size if fresh else 0, machine)
        grow(model, tokenizer.vocab_size, known)
        if adapters:                    # a target that is not there is told before a folder is made
            select(model, cfg.targets)
            if tokenizer.vocab_size > known:
                place_base(cfg)
        prepare_out_dir(cfg, machine)
        if adapters:
            notes = [add_adapters(cfg, model, tokenizer, grown=tokenizer.vocab_size > known,
                                dtype=machine.dtype, base=base.init_from)]
        if machine.main:
            print(show(cfg), *notes[:adapters], f"{model.parameter_count():,} parameters | "
                  f"{rows * cfg.block_size:,} tokens a step | {machine.device} x {machine.world}, "
                  f"{str(machine.dtype).split('.')[-1]}", sep="\n", file=sys.stderr)
        # ------ train it
        loss = losses(cfg, model, data, tokenizer, machine)
        held = data.held_out.fixed(cfg.batch_size, train.eval_rows(cfg)) if data.held_out else ()
        asked = next((r for r in data.records if chat and any(
            m["role"] == "user" for m in r["messages"])), None)
        sample = asked and (lambda: answer(model, tokenizer, asked, cfg.seed))
        state = train.fit(cfg, model, data.batches, loss, machine, tokenizer=tokenizer,
                          eval_batches=held, on_sample=sample)
        return Done(state, model, tokenizer, machine, data)
    finally:
        atomic.release(cfg.out_dir)
        if machine.world > 1:
            dist.destroy_process_group()


if __name__ == "__main__":
    refuse_to_run()
