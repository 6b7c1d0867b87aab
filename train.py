"""Pretraining, and fit(): the one training loop, which every later stage calls with its own loss.

    python data/prepare.py                                      # once: text -> token shards
    python train.py config/demo.py                              # a laptop, no flag needed
    python train.py config/gpt2_small.py                        # one GPU
    torchrun --nproc_per_node=8 train.py config/gpt2_small.py   # one node with eight
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_endpoint=HOST:29500 --rdzv_backend=c10d \\
        train.py config/gpt2_small.py                           # two nodes
    python train.py --init_from=resume --out_dir=out            # go on where a run stopped
    python train.py --init_from=gpt2 --dataset=DIR              # go on from OpenAI's weights

Device, precision and torch.compile are found out. The number to expect stands at the head of each
file in config/; RESULTS.md says what it was measured on. A step is a function of (seed, step): a
resumed run is the run that never stopped, bit for bit on a CPU.
"""
from __future__ import annotations

import config  # noqa: F401  first, so that what fails while importing is a sentence
import contextlib
import json
import math
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from layers.unwrap import unwrap
import checkpoint
import kernels
from tokenizer import load
from families import DEFAULT, PRETRAINED
from config import Stopped, UserError, check_values, refuse_idle, run, show
from data import loader
from formats import atomic
from inference.generate import Sampling, encode, sample_text
from training.machine import Machine, find_machine, memory_used, utilisation
from model import ModelConfig, Transformer
from training.optim import Optimizer, clip_grad_norm
from training import effects, router, start
from training.faults import Stop, check_finite, together
from training.log import Journal, clock
from training.loggers import find_loggers

Batch = dict[str, Any]                  # tensors; of a micro-batch, "whole" is what it is part of
Loss = Callable[[Any, Batch], tuple[Tensor, Tensor, dict]]

EVAL_ROWS = 8                           # of the validation set, for each of eval_iters

@dataclass
class Config:
    # --- data
    dataset: str = "stdlib"             # a name under data/, or the path of a prepared folder
    document_mask: bool = False         # keep attention inside a document
    batch_size: int = 12                # rows of a micro-batch: lower it when memory runs out
    gradient_accumulation_steps: int = 40   # micro-batches of a step, over all ranks together
    block_size: int = 1024              # tokens of a row
    # --- model
    init_from: str = "scratch"          # scratch, resume, a folder, or OpenAI's gpt2, gpt2-xl, …
    hub_dir: str = ""                   # where these are; empty: Hugging Face's cache
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
    num_experts: int | None = None      # routed experts; the families of mixtures have some
    num_experts_per_tok: int | None = None
    moe_intermediate_size: int | None = None    # width of an expert
    n_shared_experts: int | None = None
    dropout: float = 0.0
    init_std: float = 0.02
    checkpointing: bool = False         # recompute blocks in the backward: less memory, 4/3 time
    # --- optimizer
    optimizer: str = "adamw"            # adamw, or muon on the hidden matrices
    learning_rate: float = 6e-4         # of AdamW
    muon_learning_rate: float = 0.02
    max_iters: int = 600000
    weight_decay: float = 0.1           # of matrices, under AdamW and Muon alike
    beta1: float = 0.9
    beta2: float = 0.95
    grad_clip: float = 1.0              # 0: never clip
    z_loss: float = 0.0
    label_smoothing: float = 0.0
    router_aux_loss_coef: float = 0.01  # mixtures: of the balance loss, whose least value is k
    router_z_loss_coef: float = 0.0
    router_sequence_wise: bool = False  # balance within each sequence, not over the batch
    router_bias_rate: float = 0.001     # of the correction bias, in families that have one
    # --- learning rate
    decay_lr: bool = True
    schedule: str = "cosine"            # cosine, linear, constant or wsd (stable, then decay)
    warmup_iters: int = 2000
    lr_decay_iters: int = 0             # step at which min_lr is reached; 0: max_iters
    min_lr: float = -1.0                # -1: a tenth of learning_rate
    wsd_decay: float = 0.2              # share of the steps that wsd decays over
    # --- evaluation, logs, checkpoints
    out_dir: str = "out"
    eval_interval: int = 2000
    eval_iters: int = 200               # times 8 rows: the validation set, at any batch_size
    eval_only: bool = False
    log_interval: int = 1
    always_save_checkpoint: bool = True     # at every evaluation, not only at a better one
    keep: int = 2                       # checkpoints kept besides the best
    sample_interval: int = 0            # print a sample every so many steps; 0: never
    sample_prompt: str = ""
    wandb_log: bool = False
    wandb_project: str = "handmade"
    wandb_run_name: str = "run"
    tensorboard: bool = False
    # --- machine
    device: str = "auto"                # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"                 # auto, float32, bfloat16, float16
    compile: bool | None = None         # None: on a GPU yes, unless a mixture; on a CPU no
    backend: str = "auto"               # form of the operations: auto, reference, torch, triton
    seed: int = 1337
    IDLE = effects.TRAIN                # which of these have no effect, and when
    SCRIPT = "train.py"                 # what a run of these settings is resumed with; no field

# --------------------------------------------------------------------------- the schedule

def lr_scale(cfg: Config, step: int) -> float:
    """Learning rate of a step as a share of learning_rate; `step` counts from 0.

    decay_lr=False: all of it at every step, without a warmup, as in nanoGPT. Otherwise linear
    warmup, then cosine or linear down to min_lr at lr_decay_iters, constant, or WSD: full rate
    until the last wsd_decay share of the steps, then linear (Hu 2024, MiniCPM).
    """
    if not cfg.decay_lr:
        return 1.0
    if step < cfg.warmup_iters:
        return (step + 1) / (cfg.warmup_iters + 1)
    if cfg.schedule == "constant":
        return 1.0
    floor = 0.1 if cfg.min_lr < 0 else cfg.min_lr / max(cfg.learning_rate, 1e-30)
    end = cfg.lr_decay_iters or cfg.max_iters
    start = cfg.warmup_iters
    if cfg.schedule == "wsd":
        start = max(start, round(end * (1 - cfg.wsd_decay)))
    done = min(1.0, max(0.0, (step - start) / max(1, end - start)))
    share = 0.5 * (1 + math.cos(math.pi * done)) if cfg.schedule == "cosine" else 1 - done
    return floor + (1 - floor) * share

# ----------------------------------------------------------------------------- evaluation

@torch.no_grad()
def evaluate(model: Transformer, batches: Iterable[Batch], loss: Loss, machine: Machine,
             token_bytes: Tensor | None = None) -> dict[str, float]:
    """Mean loss in nats a token over fixed batches, reduced over the ranks: val_loss, val_ppl and,
    where token_bytes (V,) says how long each token is, val_bpb (bits per byte of text). A loss
    that reports something is another one than that of text: val_loss, and what it reports."""
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64)                # nats, tokens, bytes
    reports: dict[str, float] = {}
    for batch in batches:
        part = machine.rows(batch)
        real = len(part["ids"]) > 0                           # or there are more ranks than rows,
        if not real:                                          # and only the reports' names count
            part = {k: v[:1].to(machine.device) for k, v in batch.items()}
        value, count, metrics = loss(model, part)
        reports = {k: v.item() * real + reports.get(k, 0.0) for k, v in metrics.items()}
        live = part["targets"][part["targets"] >= 0]
        size = 0 if token_bytes is None else token_bytes[live].sum().item()
        sums += torch.tensor([value.item(), count.item(), size]) * real
    model.train()
    total, weight, size, *values = machine.sum(*sums, *reports.values())
    mean = total / max(1.0, weight)
    if reports:
        return {"val_loss": mean, **{f"val_{k}": v / max(1.0, weight)
                                     for k, v in zip(reports, values)}}
    result = {"val_loss": mean, "val_ppl": math.exp(min(mean, 700.0))}
    if size:
        result["val_bpb"] = total / math.log(2) / size
    return result

# ------------------------------------------------------------------------------- the loop

@dataclass
class State:
    """What a checkpoint remembers besides weights and optimizer."""
    step: int = 0                   # steps done
    best: float = math.inf          # lowest val_loss
    skipped: int = 0                # non-finite steps, in all
    in_a_row: int = 0               # of them without a good one between: 10 end the run
    scale: float = 1.0              # loss scale, float16 only
    steady: int = 0                 # steps since the scale last changed
    seconds: float = 0.0            # of training so far, over all resumptions
    due: bool = False               # the evaluation of this step is still to be made

def restore(cfg: Config, optimizer: Optimizer) -> State:
    """Give the optimizer what the last checkpoint of out_dir has for it; return the state."""
    path = checkpoint.resolve(cfg.out_dir, "last")
    saved = checkpoint.load_trainer(path)
    try:
        optimizer.load_state_dict(saved["optimizer"])
        state = State(**saved["state"])
        if not all(type(v) in (int, float, bool) for v in asdict(state).values()):
            raise TypeError("a value that is no number")
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as e:
        raise UserError(f"{path}/trainer.pt is damaged, or of another version of this program "
                        f"({type(e).__name__}: {e}): resume from another checkpoint, or start a "
                        f"new run from its weights with --init_from={path} and another --out_dir"
                        ) from e
    return state

def save(cfg: Config, model: Transformer, tokenizer, optimizer: Optimizer, state: State,
         better: bool) -> None:
    """A complete checkpoint beside the others, then the note that names it, then the pruning.

    A kill at any moment leaves the previous note and a checkpoint that it names, complete. The note
    says as well whether the run is: "complete" is true once max_iters is reached and evaluated.
    """
    out = Path(cfg.out_dir)
    name = f"step_{state.step:06d}"
    checkpoint.save_checkpoint(out / name, model, tokenizer, {
        "optimizer": optimizer.state_dict(), "state": asdict(state), "settings": asdict(cfg),
        "data": getattr(cfg, "data", ""), "script": cfg.SCRIPT})
    note = out / "checkpoints.json"
    names = checkpoint.read_json(note) if note.exists() else {}
    names.update({"last": name} | ({"best": name} if better else {}))
    names["complete"] = state.step >= cfg.max_iters and not state.due
    atomic.write_text(note, json.dumps(names), note.with_suffix(".tmp"))
    old = sorted(p for p in out.glob("step_*") if p.is_dir() and p.name not in names.values())
    for path in old[:max(0, len(old) - (cfg.keep - 1))]:
        shutil.rmtree(path, ignore_errors=True)

def take_step(cfg: Config, model, batch: Batch, loss: Loss, machine: Machine,
              optimizer: Optimizer, state: State, asked: bool) -> dict[str, Any]:
    """Forward, backward and update on a global batch: this rank's rows, in micro-batches.

    Returns loss, grad_norm, finite, asked (whether any rank was asked to stop), and how many tokens
    of the batch are no padding, how many of these are targets.
    """
    # a step's randomness is its own: a resumed run needs no generator state
    seed = (cfg.seed * 1_000_003 + state.step) * machine.world + machine.rank
    mine, net = machine.rows(batch), unwrap(model)
    parts = [{k: v[i:i + cfg.batch_size] for k, v in mine.items()}
             for i in range(0, len(mine["ids"]), cfg.batch_size)]
    whole = router.GlobalBatch(batch, machine) if net.config.num_experts else None
    ahead = whole and router.is_product_of_means(cfg) and len(parts) > 1
    if ahead:
        whole.count_ahead(getattr(model, "module", model), parts, seed)
    torch.manual_seed(seed)
    total = weight = torch.zeros((), device=machine.device)
    sums: dict[str, Tensor] = {}                         # of what the loss reports
    for i, micro in enumerate(parts):
        if ahead:
            router.seed_micro_batch(seed, i)
        micro["whole"] = whole
        # gradients travel between ranks once, with the last micro-batch
        wait = machine.world > 1 and i < len(parts) - 1
        with model.no_sync() if wait else contextlib.nullcontext():
            value, count, metrics = loss(model, micro)
            (value * state.scale).backward()
        total, weight = total + value.detach(), weight + count
        sums = {k: v.detach() + sums.get(k, 0) for k, v in metrics.items()}
    load, probability = sums.pop("load", None), sums.pop("probability", None)
    total, weight, asked, *values = machine.sum(total, weight, float(asked), *sums.values())
    # DDP averages over ranks; the gradient wanted is the sum over ranks / the tokens of all
    weight = max(1.0, weight)
    norm = clip_grad_norm(optimizer.gradients(), cfg.grad_clip,
                          machine.world / (weight * state.scale)).item()
    finite = math.isfinite(norm) and math.isfinite(total)
    if finite:
        optimizer.step(lr_scale(cfg, state.step))
    optimizer.zero_grad()
    reports = {k: v / weight for k, v in zip(sums, values)}
    if load is not None:
        load, probability = machine.add(load), machine.add(probability)
        if finite and net.config.router_bias:
            net.balance(load, cfg.router_bias_rate)
        reports.update(router.report(cfg, whole, load, probability))
    state.step, state.skipped = state.step + 1, state.skipped + (not finite)
    state.in_a_row = 0 if finite else state.in_a_row + 1
    if machine.dtype == torch.float16:                   # dynamic loss scaling (Micikevicius 2018)
        state.steady = state.steady + 1 if finite else 0
        if not finite or state.steady == 2000:
            state.scale, state.steady = state.scale * (2.0 if finite else 0.5), 0
    if state.in_a_row == 10:
        raise UserError(f"step {state.step}: 10 steps in a row gave a loss or gradient that is "
                        "not finite; lower --learning_rate or try --dtype=float32 (the last "
                        f"checkpoint in {cfg.out_dir} is untouched)")
    tokens, targets = int(loader.valid_tokens(batch).sum()), int(count_targets(batch))
    return {"loss": total / weight, **reports, "grad_norm": norm, "finite": finite,
            "asked": asked > 0, "tokens": tokens, "targets": targets}

def fit(cfg: Config, model: Transformer, batches: Callable[[int], Batch], loss: Loss,
        machine: Machine, *, eval_batches: Iterable[Batch] = (), tokenizer=None,
        on_sample: Callable[[], str] | None = None) -> State:
    """Train `model` until cfg.max_iters; the whole loop of every stage.

    batches(step) is the global batch of a step, a dict of tensors with rows first; each rank takes
    its slice and walks it in micro-batches of cfg.batch_size rows. loss(model, batch) returns
    (sum, weight, metrics): the gradient of a step is that of sum / weight over the whole global
    batch, so that accumulation and ranks never change the maths. metrics are sums too, and logged
    as means. tokens/s and MFU count neither padding nor what is frozen. Saves to cfg.out_dir.
    """
    optimizer = Optimizer(model.named_parameters(), cfg.optimizer, cfg.learning_rate, cfg.beta1,
                          cfg.beta2, weight_decay=cfg.weight_decay,
                          muon_learning_rate=cfg.muon_learning_rate)
    # float16: 2^16 on a mean, but the loss is a sum over the tokens of a micro-batch
    scale = 65536.0 / (cfg.batch_size * cfg.block_size) if machine.dtype == torch.float16 else 1.0
    state = State(scale=scale)
    if cfg.init_from == "resume":
        state = restore(cfg, optimizer)
    model.compute_dtype, model.checkpointing = machine.dtype, cfg.checkpointing
    # how many tokens an expert gets is data: a compiled mixture would be compiled again and again
    compiled = cfg.compile or (cfg.compile is None and machine.device.type == "cuda"
                               and not model.config.num_experts)
    fast = torch.compile(model) if compiled else model
    with together(cfg, machine):
        ranks = DistributedDataParallel(fast, gradient_as_bucket_view=True) if (
            machine.world > 1) else fast
    token_bytes = None if tokenizer is None else torch.as_tensor(tokenizer.byte_lengths(),
                                                                 device=machine.device)
    journal = Journal(cfg, machine, state)
    if cfg.eval_only:
        if not eval_batches:
            raise UserError(f"dataset {cfg.dataset} holds nothing out to validate on, so there is "
                            "nothing to evaluate: give a folder that has a val file as well")
        result = evaluate(fast, eval_batches, loss, machine, token_bytes)
        if machine.main:
            print(" ".join(f"{k} {v:.4f}" for k, v in result.items()))
        return state

    def score() -> bool:
        """Evaluate, and tell whether this is the best so far."""
        if not eval_batches:
            return False
        result = evaluate(fast, eval_batches, loss, machine, token_bytes)
        journal.record(step=state.step, seconds=state.seconds, **result)
        journal.say(f"step {state.step}: " + " | ".join(f"{k} {v:.4f}" for k, v in result.items()))
        better = result["val_loss"] < state.best
        state.best = result["val_loss"] if better else state.best
        return better

    def keep(better: bool) -> None:
        """Save, on the first rank; what is not finite is refused on all of them."""
        check_finite(cfg, model, optimizer, state)
        if machine.main:
            save(cfg, model, tokenizer, optimizer, state, better)

    if state.step >= cfg.max_iters and not state.due:
        journal.say(f"{cfg.out_dir} is already at step {state.step}: raise --max_iters to go on")
    model.train()
    steps, timed, tokens, targets = 0, 0.0, 0, 0        # since the last line of the log
    cost = getattr(loss, "count_flops", count_flops)
    with Stop() as stop, together(cfg, machine):
        if state.due:                                   # the run was stopped in that very step
            state.due, better = False, score()
            if better or cfg.always_save_checkpoint or state.step >= cfg.max_iters:
                keep(better)
        while state.step < cfg.max_iters:
            began, scale = time.perf_counter(), lr_scale(cfg, state.step)
            batch = batches(state.step)
            done = take_step(cfg, ranks, batch, loss, machine, optimizer, state, bool(stop.asked))
            finite, leaving = done.pop("finite"), done.pop("asked")
            spent = time.perf_counter() - began
            state.seconds += spent
            steps, timed = steps + 1, timed + spent
            tokens, targets = tokens + done.pop("tokens"), targets + done.pop("targets")
            # ------ say how it goes
            final = state.step >= cfg.max_iters
            if state.step % cfg.log_interval == 0 or final or not finite:
                rate = tokens / timed
                flops = cost(model, cfg.block_size, tokens, targets)
                mfu = utilisation(flops / timed / machine.world, machine.device)
                journal.record(step=state.step, **done, lr=scale * cfg.learning_rate,
                               tokens_per_second=rate, mfu=mfu, seconds=state.seconds,
                               memory=memory_used(machine.device), skipped=state.skipped)
                left = (cfg.max_iters - state.step) * timed / steps
                share = "n/a" if mfu is None else f"{mfu:.1%}"
                odd = f" | load {done['load_max']:.2f}" if "load_max" in done else ""
                odd += f" | {state.skipped} skipped" if state.skipped else ""
                journal.say(
                    f"step {state.step}/{cfg.max_iters} | loss {done['loss']:.4f} | lr "
                    f"{scale * cfg.learning_rate:.2e} | norm {done['grad_norm']:.2f} | {rate:,.0f} "
                    f"tok/s | mfu {share}{odd} | {clock(left)} left", passing=not final)
                steps, timed, tokens, targets = 0, 0.0, 0, 0
            # ------ evaluate and save
            due = state.step % cfg.eval_interval == 0 or final
            # who asks for a stop may not wait for it: the resumed run makes it up
            state.due = due and leaving and bool(eval_batches)
            better = due and not leaving and score()
            if leaving or final or due and (better or cfg.always_save_checkpoint):
                keep(better)
            if on_sample and cfg.sample_interval and state.step % cfg.sample_interval == 0 and (
                    machine.main):
                journal.say(f"--- sample at step {state.step}\n{on_sample()}\n---")
            if leaving:
                journal.say(f"stopped after step {state.step} and saved to {cfg.out_dir}; go on "
                            f"with: python {Path(sys.argv[0]).name} --init_from=resume "
                            f"--out_dir={cfg.out_dir}")
                break
        if machine.world > 1:
            dist.barrier()
    if state.step < cfg.max_iters or state.due:
        raise Stopped(stop.asked or signal.SIGTERM)     # another rank was asked
    return state

# ------------------------------------------------------------------------------ pretraining

def count_targets(batch: Batch) -> Tensor:
    """Return the number of tokens that are trained on."""
    return (batch["targets"] >= 0).sum()

def count_flops(model: Transformer, T: int, tokens: int, targets: int) -> float:
    """Return the FLOPs of steps with so many valid tokens and targets: padding is no work, and only
    targets meet the vocabulary. A loss with other costs, a teacher's forward say, has a count_flops
    of its own."""
    return tokens * model.flops_per_token(T, targets=targets / max(1, tokens))

def next_token_loss(cfg: Config, masked: bool = False) -> Loss:
    """The loss of pretraining: cross entropy of each next token, summed, with its token count.

    masked: many targets are -100. Only the hidden states of the others then meet the vocabulary,
    whose matrix is most of a small model's work; the sum is the same.
    """
    def loss(model, batch: Batch) -> tuple[Tensor, Tensor, dict]:
        targets, learn = batch["targets"], torch.is_grad_enabled()
        config = unwrap(model).config
        options = dict(z_loss=cfg.z_loss, label_smoothing=cfg.label_smoothing) if learn else {}
        options["softcap"] = config.final_logit_softcapping
        routed = router.needs_routes(config)
        count, metrics, live = count_targets(batch), {}, None
        if masked:
            live = (targets.flatten() >= 0).nonzero()[:, 0]
            live = live if len(live) else live.new_zeros(1)     # no kernel likes an empty tensor

        def head(h: Tensor, w: Tensor) -> Tensor:
            y = targets
            if masked:
                h, y = h.flatten(0, 1).index_select(0, live), y.flatten()[live]
            return kernels.linear_cross_entropy(h, w, y, **options)

        total = model(batch["ids"], doc=batch.get("doc"), router=routed, head=head)
        if routed:
            total, routes = total
            more, metrics = router.compute_losses(cfg, routes, batch, count_targets)
            total = total + more
        return total, count, metrics
    return loss

def build_model(cfg: Config, vocab_size: int, machine: Machine) -> Transformer:
    """The model of cfg.init_from, in float32 on the machine's device."""
    torch.manual_seed(cfg.seed)
    if cfg.init_from == "scratch":
        config = start.from_settings(cfg, vocab_size)
        return Transformer(config).to(machine.device)
    source = cfg.out_dir if cfg.init_from == "resume" else cfg.init_from
    which = "last" if cfg.init_from == "resume" else "best"
    model = checkpoint.load_model(checkpoint.resolve(source, which), machine.device, "float32")
    if vocab_size > model.config.vocab_size:
        raise UserError(f"dataset {cfg.dataset} has ids up to {vocab_size - 1}, the model of "
                        f"{source} knows {model.config.vocab_size}: prepare the data with "
                        f"--tokenizer={source}")
    if cfg.block_size > model.config.block_size and model.config.position == "learned":
        raise UserError(f"block_size {cfg.block_size} is beyond the {model.config.block_size} "
                        f"learned positions of {source}: use at most that")
    model.config.dropout = cfg.dropout
    return model

def start_from(cfg: Config, tokenizer: Any, vocab_size: int) -> tuple[ModelConfig, Any]:
    """(shape, tokenizer) of the model that training starts from; cfg.init_from becomes its
    directory.

    tokenizer: of the data. A checkpoint's own is kept, which may know more tokens and a chat
    template; UserError unless all ids of the data are the same tokens there.
    """
    name, cfg.init_from = cfg.init_from, start.find_pretrained(cfg.init_from, cfg.hub_dir)
    if cfg.init_from == "scratch":
        return start.from_settings(cfg, vocab_size), tokenizer
    resume = cfg.init_from == "resume"
    directory = checkpoint.resolve(cfg.out_dir if resume else cfg.init_from,
                                   "last" if resume else "best")
    if any((directory / name).is_file() for name in start.VOCABULARIES):
        own = checkpoint.load_tokenizer(directory)
        start.check_tokens(cfg.dataset, tokenizer, directory, own)
        tokenizer = own
    elif name in PRETRAINED:
        start.check_gpt2_tokens(cfg.dataset, tokenizer, name)
    else:
        checkpoint.note(f"{directory} has no tokenizer to compare with that of {cfg.dataset}")
    if not resume:
        cfg.init_from = str(directory)
    return checkpoint.read_config(directory), tokenizer

def inherit(cfg: Config) -> Config:
    """On resume every setting that the command line leaves open is the saved run's."""
    path = checkpoint.resolve(cfg.out_dir, "last")
    trainer = checkpoint.load_trainer(path)
    saved = trainer.get("settings")
    if not isinstance(saved, dict):
        raise UserError(f"{path}/trainer.pt is not of a run of train.py: start a new one from its "
                        f"weights with --init_from={path} and another --out_dir")
    if trainer.get("script", cfg.SCRIPT) != cfg.SCRIPT:
        raise UserError(f"the run in {cfg.out_dir} is one of {trainer['script']}, which trains on "
                        f"another loss than {cfg.SCRIPT}: resume it with that")
    saved = check_values(type(cfg), saved, f"{path}/trainer.pt")
    given = getattr(cfg, "given", frozenset())
    own = {"init_from", "out_dir", "device", "eval_only", "base"} | given
    merged = replace(cfg, **{k: v for k, v in saved.items() if k in asdict(cfg) and k not in own})
    merged.given, merged.typed = given, getattr(cfg, "typed", frozenset())
    merged.saved = saved                # what a setting has to equal that cannot change any more
    merged.saved_data = trainer.get("data") or ""
    return merged

def check(cfg: Config) -> None:
    """UserError for a setting that no run can have."""
    if cfg.schedule not in ("cosine", "linear", "constant", "wsd"):
        raise UserError(f"schedule={cfg.schedule!r} does not exist: cosine, linear, constant, wsd")
    for name in ("batch_size", "gradient_accumulation_steps", "block_size", "max_iters",
                 "eval_interval", "log_interval", "n_layer", "n_head", "n_embd", "keep"):
        if getattr(cfg, name) < 1:
            raise UserError(f"{name} is {getattr(cfg, name)}: it must be at least 1")
    if not cfg.eval_only:
        find_loggers(cfg)

def rows_of_step(cfg: Config, machine: Machine) -> int:
    """Rows of a global batch; UserError if there are more ranks."""
    rows = cfg.batch_size * cfg.gradient_accumulation_steps
    if rows < machine.world:
        raise UserError(f"a step has {rows} rows for {machine.world} ranks: raise batch_size or "
                        f"gradient_accumulation_steps to give each at least one")
    return rows

def eval_rows(cfg: Config) -> int:
    """Return the rows of the validation set: eight for each of eval_iters, and not batch_size, so
    that a run is judged by the same rows whatever fits its memory."""
    return cfg.eval_iters * EVAL_ROWS

def main(cfg: Config) -> State:
    if cfg.init_from == "resume":
        cfg = inherit(cfg)
    kernels.use(cfg.backend)
    check(cfg)
    machine = find_machine(cfg)
    dataset = loader.Dataset(loader.find(cfg.dataset))
    tokenizer = load(loader.find(cfg.dataset))
    dataset.check_tokenizer(tokenizer)
    shape, tokenizer = start_from(cfg, tokenizer, dataset.vocab_size)
    start.check_data(cfg, dataset.directory)
    refuse_idle(cfg, shape, start.get_in_force(cfg, shape, effects.is_pretrained(cfg)))
    if effects.is_pretrained(cfg):
        start.take_shape(cfg, shape)
    # before any training: it may have a character that the vocabulary lacks
    prompt = encode(tokenizer, cfg.sample_prompt) if cfg.sample_interval else []
    rows = rows_of_step(cfg, machine)
    batches = loader.Batches(dataset.tokens("train"), rows, cfg.block_size, seed=cfg.seed,
                             eot=dataset.eot, documents=cfg.document_mask)
    held_out = loader.eval_batches(dataset.tokens("val"), cfg.batch_size, cfg.block_size,
                                   eval_rows(cfg), eot=dataset.eot, documents=cfg.document_mask)
    model = build_model(cfg, dataset.vocab_size, machine)
    start.prepare_out_dir(cfg, machine)
    if machine.main:
        print(show(cfg), file=sys.stderr)
        tokens = rows * cfg.block_size
        cost = count_flops(model, cfg.block_size, tokens, tokens)
        print(f"{model.parameter_count():,} parameters | {tokens:,} tokens and "
              f"{cost / 1e9:,.0f} GFLOPs a step | {machine.device} x {machine.world}, "
              f"{str(machine.dtype).split('.')[-1]}", file=sys.stderr)

    def on_sample() -> str:
        how = Sampling(temperature=0.8, top_k=200)
        return sample_text(model, tokenizer, prompt, how, cfg.seed)

    try:
        return fit(cfg, model, batches, next_token_loss(cfg), machine, eval_batches=held_out,
                   tokenizer=tokenizer, on_sample=on_sample)
    finally:
        atomic.release(cfg.out_dir)
        if machine.world > 1:
            dist.destroy_process_group()

if __name__ == "__main__":
    run(main, Config)
