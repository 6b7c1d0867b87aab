"""Pretraining, and fit(): the one training loop, which every later stage calls with its own loss.

    python data/prepare.py                                      # once: text -> token shards
    python train.py config/demo.py                              # a laptop, no flag needed
    python train.py config/gpt2_small.py                        # one GPU
    torchrun --nproc_per_node=8 train.py config/gpt2_small.py   # one node with eight
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_endpoint=HOST:29500 --rdzv_backend=c10d \\
        train.py config/gpt2_small.py                           # two nodes
    python train.py --init_from=resume --out_dir=out            # go on where a run stopped
    python train.py --init_from=gpt2 --dataset=DIR              # go on from OpenAI's weights

Device, precision and torch.compile are auto-detected. The docstring of each file in config/ gives
the expected loss; RESULTS.md says what it was measured on. A step is a function of (seed, step): a
resumed run is the run that never stopped, bit for bit on a CPU.
"""
from __future__ import annotations

import config  # noqa: F401  first, so that what fails while importing is a sentence
import contextlib
import functools
import json
import math
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Callable, Iterable, NamedTuple, Sequence

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import checkpoint
import kernels
from config import Idle, Stopped, UserError, check_values, refuse_idle, run, show
from data import loader
from families import PRETRAINED
from formats import atomic
from inference.generate import Sampling, encode, sample_text
from inference.labels import get_label_ids
from layers.unwrap import unwrap
from model import ModelConfig, Transformer
from tokenizer import load
from training import router, start
from training.batch import Batch, Loss, count_targets, find_targets, mask_valid_tokens
from training.faults import Stop, check_finite, together
from training.log import Journal
from training.loggers import find_loggers
from training.machine import Machine, open_machine
from training.optim import Optimizer
from training.settings import (Data, Hardware, Logging, Optimization, Regularization, Schedule,
                               Shape, Source, is_pretrained, is_resumed)

EVAL_ROWS = 8                           # of the validation set, for each of eval_iters
SCHEDULES = ("cosine", "linear", "constant", "wsd")


@dataclass
class Config(Hardware, Logging, Schedule, Optimization, Regularization, Shape, Source, Data):
    document_mask: bool = False         # keep attention inside a document
    sample_prompt: str = ""             # what samples continue
    IDLE = (Idle("sample_prompt", "sample_interval", lambda c, m: not c.sample_interval,
                 "without --sample_interval"),)
    SCRIPT = "train.py"                 # what a run of these settings is resumed with; no field
    ranges = {"block_size": "[1, 1e12]", "max_iters": "[1, 1e12]"}

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
    """Return the mean loss in nats per token over fixed batches, reduced over the ranks: val_loss,
    val_ppl and, where token_bytes (V,) has the length of each token, val_bpb (bits per byte of
    text). A loss with metrics of its own is not that of text: val_loss, and these metrics."""
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
        ids = part["targets"][part["targets"] >= 0]
        size = 0 if token_bytes is None else token_bytes[ids].sum().item()
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

    def count_step(self, finite: bool, dtype: torch.dtype) -> None:
        """Count a step; float16 scales the loss dynamically (Micikevicius 2018): half as much after
        a step that was not finite, twice as much after 2,000 that were."""
        self.step += 1
        self.skipped += not finite
        self.in_a_row = 0 if finite else self.in_a_row + 1
        if dtype == torch.float16:
            self.steady = self.steady + 1 if finite else 0
            if not finite or self.steady == 2000:
                self.scale *= 2.0 if finite else 0.5
                self.steady = 0


def start_state(cfg: Config, machine: Machine) -> State:
    """Return the state of a new run. In float16 a mean loss would be scaled by 2^16, but the loss
    is a sum over the tokens of a micro-batch."""
    tokens = cfg.batch_size * cfg.block_size
    return State(scale=65536.0 / tokens if machine.dtype == torch.float16 else 1.0)


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
         better: bool, writers: Sequence[Callable[[Path], None]] = ()) -> None:
    """Write a complete checkpoint beside the others, then the index that names it, then prune.

    A kill at any moment leaves the previous index and a checkpoint that it names, complete. Its
    "complete" is true once max_iters is reached and evaluated. writers: see save_checkpoint().
    """
    out = Path(cfg.out_dir)
    name = f"step_{state.step:06d}"
    checkpoint.save_checkpoint(out / name, model, tokenizer, {
        "optimizer": optimizer.state_dict(), "state": asdict(state), "settings": asdict(cfg),
        "data": getattr(cfg, "data", ""), "script": cfg.SCRIPT}, writers=writers)
    index = out / "checkpoints.json"
    names = checkpoint.read_json(index) if index.exists() else {}
    names.update({"last": name} | ({"best": name} if better else {}))
    names["complete"] = state.step >= cfg.max_iters and not state.due
    atomic.write_text(index, json.dumps(names), index.with_suffix(".tmp"))
    old = sorted(p for p in out.glob("step_*") if p.is_dir() and p.name not in names.values())
    for path in old[:max(0, len(old) - (cfg.keep - 1))]:
        shutil.rmtree(path, ignore_errors=True)


class Step(NamedTuple):
    """What a step did: metrics for the log, and sums over the global batch."""
    metrics: dict[str, Any]         # loss, grad_norm, and what the loss reports
    finite: bool                    # whether the weights moved
    leaving: bool                   # whether any rank was asked to stop
    tokens: int                     # that are no padding
    targets: int                    # of these


def take_step(cfg: Config, model, batch: Batch, loss: Loss, machine: Machine,
              optimizer: Optimizer, state: State, asked: bool) -> Step:
    """Forward, backward and update on a global batch: this rank's rows, in micro-batches."""
    # a step's randomness is its own: a resumed run needs no generator state
    seed = (cfg.seed * 1_000_003 + state.step) * machine.world + machine.rank
    rows = machine.rows(batch)
    config = unwrap(model).config
    parts = [{k: v[i:i + cfg.batch_size] for k, v in rows.items()}
             for i in range(0, len(rows["ids"]), cfg.batch_size)]
    whole = router.GlobalBatch(batch, machine) if config.num_experts else None
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
        total = total + value.detach()
        weight = weight + count
        sums = {k: v.detach() + sums.get(k, 0) for k, v in metrics.items()}
    load = sums.pop("load", None)
    probability = sums.pop("probability", None)
    total, weight, asked, *values = machine.sum(total, weight, float(asked), *sums.values())
    # DDP averages over ranks; the gradient wanted is the sum over ranks / the tokens of all
    weight = max(1.0, weight)
    norm = kernels.clip_grad_norm(optimizer.gradients(), cfg.grad_clip,
                          machine.world / (weight * state.scale)).item()
    finite = math.isfinite(norm) and math.isfinite(total)
    if finite:
        optimizer.step(lr_scale(cfg, state.step))
    optimizer.zero_grad()
    reports = {k: v / weight for k, v in zip(sums, values)}
    if load is not None:
        load = machine.add(load)
        probability = machine.add(probability)
        if finite and config.router_bias:
            unwrap(model).balance(load, cfg.router_bias_rate)
        reports.update(router.report(cfg, whole, load, probability))
    state.count_step(finite, machine.dtype)
    if state.in_a_row == 10:
        raise UserError(f"step {state.step}: 10 steps in a row gave a loss or gradient that is "
                        "not finite; lower --learning_rate or try --dtype=float32 (the last "
                        f"checkpoint in {cfg.out_dir} is untouched)")
    return Step({"loss": total / weight, **reports, "grad_norm": norm}, finite, asked > 0,
                int(mask_valid_tokens(batch).sum()), int(count_targets(batch)))


def prepare_model(cfg: Config, model: Transformer, machine: Machine) -> tuple[Any, Any]:
    """Return the model as evaluation calls it, compiled on a GPU, and as training does, under DDP
    where there are several ranks."""
    model.compute_dtype = machine.dtype
    model.checkpointing = cfg.checkpointing
    # how many tokens an expert gets is data: a compiled MoE model would be compiled again and again
    compiled = cfg.compile or (cfg.compile is None and machine.device.type == "cuda"
                               and not model.config.num_experts)
    fast = torch.compile(model) if compiled else model
    if machine.world == 1:
        return fast, fast
    with together(cfg, machine):
        return fast, DistributedDataParallel(fast, gradient_as_bucket_view=True)


def fit(cfg: Config, model: Transformer, batches: Callable[[int], Batch], loss: Loss,
        machine: Machine, *, eval_batches: Iterable[Batch] = (), tokenizer=None,
        on_sample: Callable[[], str] | None = None,
        writers: Sequence[Callable[[Path], None]] = ()) -> State:
    """Train `model` until cfg.max_iters; the whole loop of every stage.

    batches(step) is the global batch of a step, a dict of tensors with rows first; each rank takes
    its slice and walks it in micro-batches of cfg.batch_size rows. loss(model, batch) returns
    (sum, weight, metrics): the gradient of a step is that of sum / weight over the whole global
    batch, so that accumulation and ranks never change the maths. metrics are sums too, and logged
    as means. Saves to cfg.out_dir; writers: see checkpoint.save_checkpoint().
    """
    optimizer = Optimizer(model.named_parameters(), cfg.optimizer, cfg.learning_rate, cfg.beta1,
                          cfg.beta2, weight_decay=cfg.weight_decay,
                          muon_learning_rate=cfg.muon_learning_rate)
    state = restore(cfg, optimizer) if is_resumed(cfg) else start_state(cfg, machine)
    fast, ranks = prepare_model(cfg, model, machine)
    token_bytes = None if tokenizer is None else torch.as_tensor(tokenizer.byte_lengths(),
                                                                 device=machine.device)
    journal = Journal(cfg, machine, state)
    if cfg.eval_only:
        return evaluate_only(cfg, fast, eval_batches, loss, machine, token_bytes, state)

    def score() -> bool:
        """Evaluate, and return whether this is the best so far."""
        if not eval_batches:
            return False
        result = evaluate(fast, eval_batches, loss, machine, token_bytes)
        better = result["val_loss"] < state.best
        state.best = result["val_loss"] if better else state.best
        journal.report_evaluation(state, result)
        return better

    def keep(better: bool) -> None:
        """Save, on the first rank; what is not finite is refused on all of them."""
        check_finite(cfg, model, optimizer, state)
        if machine.main:
            save(cfg, model, tokenizer, optimizer, state, better, writers)

    if state.step >= cfg.max_iters and not state.due:
        journal.say(f"{cfg.out_dir} is already at step {state.step}: raise --max_iters to go on")
    model.train()
    with Stop() as stop, together(cfg, machine):
        if state.due:                                   # the run was stopped in that very step
            state.due = False
            better = score()
            if better or cfg.always_save_checkpoint or state.step >= cfg.max_iters:
                keep(better)
        while state.step < cfg.max_iters:
            lr = lr_scale(cfg, state.step) * cfg.learning_rate
            began = time.perf_counter()
            batch = batches(state.step)
            done = take_step(cfg, ranks, batch, loss, machine, optimizer, state, bool(stop.asked))
            seconds = time.perf_counter() - began
            state.seconds += seconds
            final = state.step >= cfg.max_iters
            journal.count_step(seconds, done.tokens, done.targets)
            if state.step % cfg.log_interval == 0 or final or not done.finite:
                cost = getattr(loss, "count_flops", count_flops)
                journal.report_steps(state, done.metrics, lr, functools.partial(cost, model))
            due = state.step % cfg.eval_interval == 0 or final
            # who asks for a stop may not wait for it: the resumed run makes it up
            state.due = due and done.leaving and bool(eval_batches)
            better = due and not done.leaving and score()
            if done.leaving or final or due and (better or cfg.always_save_checkpoint):
                keep(better)
            sampled = cfg.sample_interval and state.step % cfg.sample_interval == 0
            if on_sample and sampled and machine.main:
                journal.say(f"--- sample at step {state.step}\n{on_sample()}\n---")
            if done.leaving:
                break
        machine.wait()
    if state.step < cfg.max_iters or state.due:
        journal.report_stop(state)
        raise Stopped(stop.asked or signal.SIGTERM)     # another rank was asked
    return state


def evaluate_only(cfg: Config, model: Any, batches: Iterable[Batch], loss: Loss, machine: Machine,
                  token_bytes: Tensor | None, state: State) -> State:
    """Print what evaluate() returns on stdout, and return the state of the run unchanged."""
    if not batches:
        raise UserError(f"dataset {cfg.dataset} holds nothing out to validate on, so there is "
                        "nothing to evaluate: give a folder that has a val file as well")
    result = evaluate(model, batches, loss, machine, token_bytes)
    if machine.main:
        print(" ".join(f"{k} {v:.4f}" for k, v in result.items()))
    return state

# ------------------------------------------------------------------------------ pretraining

def count_flops(model: Transformer, T: int, tokens: int, targets: int) -> float:
    """Return the FLOPs of steps with so many valid tokens and targets: padding is no work, and only
    targets meet the vocabulary. A loss with other costs, a teacher's forward say, has a count_flops
    of its own."""
    return tokens * model.flops_per_token(T, targets=targets / max(1, tokens))


def next_token_loss(cfg: Config, masked: bool = False) -> Loss:
    """Return the loss of pretraining: cross entropy of each next token, summed, and their number.

    masked: many targets are -100. Only the hidden states of the others then meet the vocabulary,
    whose matrix is most of a small model's work; the sum is the same.
    """
    def loss(model, batch: Batch) -> tuple[Tensor, Tensor, dict]:
        options = {"softcap": unwrap(model).config.final_logit_softcapping}
        if torch.is_grad_enabled():             # a score is that of the labels alone
            options.update(z_loss=cfg.z_loss, label_smoothing=cfg.label_smoothing)
        targets = batch["targets"]
        places = find_targets(targets) if masked else None

        def head(h: Tensor, w: Tensor) -> Tensor:
            """Return (B, T, C), (V, C) -> the summed cross entropy ()."""
            if places is None:
                return kernels.linear_cross_entropy(h, w, targets, **options)
            rows = h.flatten(0, 1).index_select(0, places)
            return kernels.linear_cross_entropy(rows, w, targets.flatten()[places], **options)

        total, extra, metrics = router.run_model(cfg, model, batch, head, count_targets)
        return total + extra, count_targets(batch), metrics
    return loss


def build_model(cfg: Config, vocab_size: int, machine: Machine) -> Transformer:
    """Return the model of cfg.init_from, in float32 on the machine's device."""
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
    """Return (shape, tokenizer) of the model that training starts from; cfg.init_from becomes its
    directory.

    tokenizer: of the data. A checkpoint's own is kept, which may know more tokens and a chat
    template; UserError unless all ids of the data are the same tokens there.
    """
    name = cfg.init_from
    cfg.init_from = start.find_pretrained(cfg.init_from, cfg.hub_dir)
    if cfg.init_from == "scratch":
        return start.from_settings(cfg, vocab_size), tokenizer
    resume = cfg.init_from == "resume"
    directory = checkpoint.resolve(cfg.out_dir if resume else cfg.init_from,
                                   "last" if resume else "best")
    if any((directory / name).is_file() for name in start.VOCABULARIES):
        own = checkpoint.load_tokenizer(directory)
        if get_label_ids(own):
            raise UserError(f"{directory} is a classifier, and what is made of it would be taken "
                            "for one: start from the model that it was trained from")
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
    """Return the settings to run by: on resume, those that were not given are the saved run's."""
    if not is_resumed(cfg):
        return cfg
    path = checkpoint.resolve(cfg.out_dir, "last")
    trainer = checkpoint.load_trainer(path)
    saved = trainer.get("settings")
    if not isinstance(saved, dict):
        raise UserError(f"{path}/trainer.pt is not of a run of train.py: start a new one from its "
                        f"weights with --init_from={path} and another --out_dir")
    script = trainer.get("script", cfg.SCRIPT)
    if saved.get("task") == "classify":             # a run of when sft.py was the script of both
        script = "classify.py"
    if script != cfg.SCRIPT:
        raise UserError(f"the run in {cfg.out_dir} is one of {script}, which trains on another "
                        f"loss than {cfg.SCRIPT}: resume it with that")
    saved = check_values(type(cfg), saved, f"{path}/trainer.pt")
    given = getattr(cfg, "given", frozenset())
    own = {"init_from", "out_dir", "device", "eval_only", "base"} | given
    merged = replace(cfg, **{k: v for k, v in saved.items() if k in asdict(cfg) and k not in own})
    merged.given, merged.typed = given, getattr(cfg, "typed", frozenset())
    merged.saved = saved                # what a setting has to equal that cannot change any more
    merged.saved_data = trainer.get("data") or ""
    return merged


def check(cfg: Config) -> None:
    """Raise UserError for a setting that no run can have."""
    if cfg.schedule not in SCHEDULES:
        raise UserError(f"unknown schedule {cfg.schedule!r}; choose from {', '.join(SCHEDULES)}")
    if not cfg.eval_only:
        find_loggers(cfg)


def rows_of_step(cfg: Config, machine: Machine) -> int:
    """Return rows of a global batch; UserError if there are more ranks."""
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
    cfg = inherit(cfg)
    kernels.use(cfg.backend)
    check(cfg)
    with open_machine(cfg) as machine:
        # ------ the data, and the shape of the model
        dataset = loader.Dataset(loader.find(cfg.dataset))
        tokenizer = load(loader.find(cfg.dataset))
        dataset.check_tokenizer(tokenizer)
        shape, tokenizer = start_from(cfg, tokenizer, dataset.vocab_size)
        start.check_data(cfg, dataset.directory)
        refuse_idle(cfg, shape, start.get_in_force(cfg, shape, is_pretrained(cfg)))
        if is_pretrained(cfg):
            start.take_shape(cfg, shape)
        # before any training: it may have a character that the vocabulary lacks
        prompt = encode(tokenizer, cfg.sample_prompt) if cfg.sample_interval else []
        rows = rows_of_step(cfg, machine)
        batches = loader.Batches(dataset.tokens("train"), rows, cfg.block_size, seed=cfg.seed,
                                 eot=dataset.eot, documents=cfg.document_mask)
        held_out = loader.eval_batches(dataset.tokens("val"), cfg.batch_size, cfg.block_size,
                                       eval_rows(cfg), eot=dataset.eot, documents=cfg.document_mask)
        # ------ the model
        model = build_model(cfg, dataset.vocab_size, machine)
        start.prepare_out_dir(cfg, machine)
        if machine.main:
            print(show(cfg), file=sys.stderr)
            tokens = rows * cfg.block_size
            cost = count_flops(model, cfg.block_size, tokens, tokens)
            print(f"{model.parameter_count():,} parameters | {tokens:,} tokens and "
                  f"{cost / 1e9:,.0f} GFLOPs per step | {machine}", file=sys.stderr)

        def on_sample() -> str:
            how = Sampling(temperature=0.8, top_k=200)
            return sample_text(model, tokenizer, prompt, how, cfg.seed)

        return fit(cfg, model, batches, next_token_loss(cfg), machine, eval_batches=held_out,
                   tokenizer=tokenizer, on_sample=on_sample)


if __name__ == "__main__":
    run(main, Config)
