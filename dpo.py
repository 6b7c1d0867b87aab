"""Preferences: DPO and its relatives on pairs of a better and a worse answer (Rafailov 2023).

    python data/prepare.py skills                               # once: pairs, no download
    python dpo.py                                               # of out/sft, on any machine
    python dpo.py --init_from=DIR --dataset=pairs.jsonl         # any checkpoint, any layout
    python dpo.py --show=3                                      # what is trained on, in colour
    torchrun --nproc_per_node=8 dpo.py --init_from=DIR --learning_rate=1e-6
    python dpo.py --init_from=DIR --lora_rank=16                # its base is the reference
    python dpo.py --init_from=resume --out_dir=out/dpo          # go on where a run stopped
    python dpo.py --init_from=resume --out_dir=out/dpo --eval_only=1    # accuracy on unseen pairs

The docstring of config/dpo_skills.py gives the cost. The rates here suit a model of some million
parameters; one of billions wants --learning_rate=5e-7 to 5e-6 and one epoch. The accuracy, the
share of unseen pairs whose better answer has the higher reward, rises from chance.

With r = log pi(answer) - log ref(answer), summed over the answer's tokens, and e label_smoothing:

    sigmoid  -(1-e) log s(b (r+ - r-)) - e log s(-b (r+ - r-))      DPO; e > 0: cDPO
    robust   ((1-e) -log s(..) + e log s(-..)) / (1-2e)             unbiased noise, Chowdhury 2024
    hinge    max(0, 1 - b (r+ - r-))                                SLiC, Zhao 2023
    ipo      (r+ - r- - 1/(2b))^2, r a mean over tokens             Azar 2023; trl
    kto      1 - s(b (r+ - z)) and 1 - s(b (z - r-)), weighted      Ethayarajh 2024
    simpo    -log s(b (m+ - m-) - gamma), m the mean of log pi      Meng 2024; wants b = 2, gamma 1
    orpo     -m+ - b log s(log odds(m+) - log odds(m-))             Hong 2024

KTO's z is max(0, mean r) of a step's prompts (of all validation prompts), each with the answer to
another one. It needs no pairs: records of one answer and a label (trl's prompt, completion, label)
are one example each.

The reference is the model as training starts. Its log-probabilities are computed once, before it
moves, and lie in out_dir from then on: no second model is held while training. (--reference=DIR
and a resumed run whose file is lost load one, before there are gradients, and free it.)
"""
from __future__ import annotations

import config  # noqa: F401  first, so that what fails while importing is a sentence
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

import checkpoint
import kernels
import sft
import train
from config import Idle, UserError, run
from data import chats
from formats import run_folder
from layers.lora import disable_adapters
from layers.unwrap import unwrap
from model import Transformer
from training import router, start
from training.batch import Batch, Loss, find_targets, mask_trained_documents
from training.log import clock
from training.machine import Machine
from training.settings import Finetuning, is_resumed

LOSSES = ("sigmoid", "hinge", "ipo", "robust", "simpo", "orpo", "kto")
ALONE = ("simpo", "orpo")               # have no reference
NOISY = ("sigmoid", "robust", "simpo")  # know of labels that are wrong


@dataclass
class Config(Finetuning):
    loss: str = "sigmoid"               # sigmoid, hinge, ipo, robust, simpo, orpo, kto
    beta: float = 0.1                   # KL penalty; simpo wants 2
    label_smoothing: float = 0.0        # share of wrong labels: sigmoid, robust and simpo
    average: bool | None = None         # means over tokens, not sums; None: ipo, simpo and orpo
    gamma: float = 0.5                  # simpo: target reward margin
    sft_weight: float = 0.0             # of the better answer's mean -log p, added (RPO's alpha)
    desirable_weight: float = 1.0       # kto: of the better answers
    undesirable_weight: float = 1.0     # kto: of the worse ones
    reference: str = ""                 # a folder; empty: the model that training starts from
    reference_free: bool = False        # as if the reference found all answers equally likely
    origin: str = ""                    # kept by a run: digest and folder of its reference
    init_from: str = "out/sft"          # a folder: a run of sft.py, any checkpoint; or resume
    out_dir: str = "out/dpo"
    learning_rate: float = 1e-4         # of a small model; 5e-7 to 5e-6 suits one of billions
    epochs: float = 1.0
    SCRIPT = "dpo.py"
    IDLE = (                            # which of these have no effect, and when
        Idle("gamma", "loss", lambda c, m: c.loss != "simpo", "without --loss=simpo"),
        Idle("desirable_weight undesirable_weight", "loss", lambda c, m: c.loss != "kto",
             "without --loss=kto"),
        Idle("reference_free", "loss", lambda c, m: c.loss in ALONE,
             "with --loss=simpo and --loss=orpo, which have no reference"),
        Idle("origin", "", lambda c, m: True, "as a run keeps it itself; see --reference"))


# ------------------------------------------------------------------------- log-probabilities


def log_probs(model: Any, batch: Batch, D: int, routed: bool = False
              ) -> tuple[Tensor, Tensor, list]:
    """Return (sum of log p over the targets of each document, their number), each (B, D) float32;
    and the routes of its tokens, where `routed` asks for them.

    A row has up to D documents; one that is not there has 0 and 0. Only places with a target meet
    the vocabulary.
    """
    targets = batch["targets"].flatten()
    places = find_targets(targets)
    labels = targets[places]
    softcap = unwrap(model).config.final_logit_softcapping

    def head(h: Tensor, w: Tensor) -> Tensor:
        return kernels.linear_cross_entropy(h.flatten(0, 1).index_select(0, places), w, labels,
                                            softcap=softcap, reduction="none")
    nll = model(batch["ids"], doc=batch["doc"], router=routed, head=head)   # (targets,)
    nll, routes = nll if routed else (nll, [])
    B, T = batch["ids"].shape
    document = places // T * D + batch["doc"].flatten()[places]
    zeros = nll.new_zeros(B * D)
    size = zeros.index_add(0, document, (labels >= 0).to(nll.dtype))
    return zeros.index_add(0, document, -nll).view(B, D), size.view(B, D), routes


def log_sigmoid(x: Tensor) -> Tensor:
    """log 1 / (1 + exp(-x)), which neither over- nor underflows."""
    return -torch.logaddexp(torch.zeros_like(x), -x)


def log_odds(x: Tensor) -> Tensor:
    """log p / (1 - p) of x = log p; p a hair below 1 at most."""
    return x - torch.log(-torch.expm1(x.clamp(max=-1e-7)))


def preference_loss(cfg: Config, policy: Tensor, reference: Tensor, sizes: Tensor,
                    z: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    """Return (loss of each pair (N,), rewards (N, 2) without gradient).

    policy, reference: summed log-probabilities (N, 2) of the better and the worse answer; sizes
    (N, 2) their tokens. z: KTO's estimate of the KL divergence. Rewards are beta times the log
    ratio, as trl reports them; without a reference, beta times the mean log-probability.
    """
    b = cfg.beta
    e = cfg.label_smoothing
    alone = cfg.loss in ALONE
    average = cfg.loss in ("ipo", *ALONE) if cfg.average is None else cfg.average
    ratio = policy - (0.0 if alone or cfg.reference_free else reference)
    score = ratio / sizes if average else ratio
    better, worse = score.unbind(-1)
    gap = b * (better - worse)

    def noisy(x: Tensor) -> Tensor:
        return -(1 - e) * log_sigmoid(x) - e * log_sigmoid(-x)
    if cfg.loss == "sigmoid":
        loss = noisy(gap)
    elif cfg.loss == "robust":
        loss = (e * log_sigmoid(-gap) - (1 - e) * log_sigmoid(gap)) / (1 - 2 * e)
    elif cfg.loss == "hinge":
        loss = (1 - gap).clamp(min=0)
    elif cfg.loss == "ipo":
        loss = (gap / b - 1 / (2 * b)) ** 2
    elif cfg.loss == "simpo":
        loss = noisy(gap - cfg.gamma)
    elif cfg.loss == "orpo":
        loss = -better - b * log_sigmoid(log_odds(better) - log_odds(worse))
    else:                                       # kto: two examples, whose mean is a pair's loss
        loss = (cfg.desirable_weight * torch.sigmoid(b * (z - better))
                + cfg.undesirable_weight * torch.sigmoid(b * (worse - z))) / 2
    if cfg.sft_weight:
        loss = loss - cfg.sft_weight * policy[:, 0] / sizes[:, 0]
    return loss, b * (score if alone else ratio).detach()


def count_pairs(batch: Batch) -> Tensor:
    """Return the number of pairs, of whose answers both have targets."""
    trained = mask_trained_documents(batch)
    pairs = trained.shape[1] // 2           # the document that is left over is padding
    return (trained[:, :2 * pairs:2] & trained[:, 1:2 * pairs:2]).sum()


def count_answers(batch: Batch) -> Tensor:
    """Return the number of answers with a target."""
    return mask_trained_documents(batch).sum()


def count_flops_of(cfg: Config) -> Callable:
    """Return the count_flops of a preference loss: KTO's z costs a second forward."""
    def count_flops(model: Transformer, T: int, tokens: int, targets: int) -> float:
        share = targets / max(1, tokens)
        again = model.flops_per_token(T, training=False, targets=share)
        return train.count_flops(model, T, tokens, targets) + tokens * again * (cfg.loss == "kto")
    return count_flops


def answer_loss(cfg: Config, policy: Tensor, reference: Tensor, sizes: Tensor, good: Tensor,
                z: Tensor) -> tuple[Tensor, Tensor]:
    """KTO of answers without a partner: (loss of each (N,), rewards (N,) without gradient).

    policy, reference, sizes: as preference_loss() has them, (N,); good (N,): which are desirable.
    """
    ratio = policy - (0.0 if cfg.reference_free else reference)
    score = cfg.beta * (ratio / sizes if cfg.average else ratio)
    sign = torch.where(good, 1.0, -1.0)
    weight = torch.where(good, cfg.desirable_weight, cfg.undesirable_weight)
    loss = weight * torch.sigmoid(sign * (cfg.beta * z - score))
    if cfg.sft_weight:
        loss = loss - cfg.sft_weight * torch.where(good, policy / sizes, 0.0)
    return loss, (cfg.beta * ratio).detach()


def unpaired_loss(cfg: Config) -> Loss:
    """KTO's loss of a batch of packed answers with labels: a sum over answers, and their number.

    accuracy: the share whose reward is on its label's side of z; margin: how far, on average.
    """
    def loss(model: Any, batch: Batch) -> tuple[Tensor, Tensor, dict]:
        routed = router.needs_routes(unwrap(model).config)
        D = batch["reference"].shape[1]
        policy, sizes, routes = log_probs(model, batch, D, routed)          # (B, D), (B, D)
        there = sizes > 0
        z = batch["z"][0]
        good = batch["label"][there] > 0
        value, rewards = answer_loss(cfg, policy[there], batch["reference"][there], sizes[there],
                                     good, z)
        margin = torch.where(good, 1.0, -1.0) * (rewards - cfg.beta * z)
        count = there.sum()
        metrics = {"margin": margin.sum(), "accuracy": (margin > 0).float().sum(), "kl": z * count}
        total = value.sum() + 0.0 * policy.sum()
        if routed:
            more, extra = router.compute_losses(cfg, routes, batch, count_answers)
            total = total + more
            metrics = {**metrics, **extra}
        return total, count, metrics
    loss.count_flops = count_flops_of(cfg)
    return loss


def pair_loss(cfg: Config) -> Loss:
    """Return the loss of a batch of packed pairs: a sum over pairs, and their number; of an MoE
    with the routers' losses of pretraining."""
    def loss(model: Any, batch: Batch) -> tuple[Tensor, Tensor, dict]:
        reference = batch["reference"]                      # (B, D), two of D to a pair
        routed = router.needs_routes(unwrap(model).config)
        *sums, routes = log_probs(model, batch, reference.shape[1], routed)
        policy, sizes = (x.view(len(x), -1, 2) for x in sums)
        there = (sizes > 0).all(-1)                         # (B, pairs of a row)
        z = batch["z"][0] if cfg.loss == "kto" else 0.0
        value, rewards = preference_loss(
            cfg, policy[there], reference.view_as(policy)[there], sizes[there], z)
        better, worse = rewards.unbind(-1)
        metrics = {"rewards/chosen": better.sum(), "rewards/rejected": worse.sum(),
                   "margin": (better - worse).sum(), "accuracy": (better > worse).float().sum()}
        if cfg.loss == "kto":
            metrics["kl"] = z * there.sum()
        # all of policy, so that a batch without a pair has a gradient as well, of zeros
        total = value.sum() + 0.0 * policy.sum()
        count = there.sum()
        if routed:
            more, extra = router.compute_losses(cfg, routes, batch, count_pairs)
            total = total + more
            metrics = {**metrics, **extra}
        return total, count, metrics

    loss.count_flops = count_flops_of(cfg)
    return loss


# ------------------------------------------------------------------------------- the data


class Pairs(chats.Packed):
    """Packed pairs: conversations 2i and 2i + 1 are the better and the worse answer of pair i.

    labels: of answers without a partner, which are packed one by one.
    """
    strangers: chats.Packed         # kto: each prompt with the answer to another one
    baseline: Any = None            # kto: (numbers of conversations) -> z, once there is a model

    def __init__(self, rendered: chats.Rendered, *args, labels: list[bool] | None = None,
                 **kwargs):
        super().__init__(rendered, *args, unit=2 if labels is None else 1, **kwargs)
        self.columns["reference"] = np.zeros(len(rendered), np.float32)
        if labels is not None:
            self.columns["label"] = np.array(labels, np.float32)

    def gather(self, rows: Sequence[int], z: float | None = None) -> Batch:
        """Packed.gather, with KTO's z, which is that of these rows unless it is given."""
        batch = super().gather(rows)
        if self.baseline:
            z = self.estimate(rows) if z is None else z
            batch["z"] = torch.full((len(rows),), z)
        return batch

    def estimate(self, rows: Sequence[int]) -> float:
        """Return KTO's z over the pairs of some rows."""
        return self.baseline([i for row in rows for i in self.rows[row]])

    def fixed(self, batch_size: int, rows: int) -> FixedPairs:
        return FixedPairs(self, super().fixed(batch_size, rows).rows)


class FixedPairs(chats.Fixed):
    """Rows to validate on, whose z is that of all of them, whatever batch they are in."""

    def __iter__(self) -> Iterator[Batch]:
        all_rows = [row for rows in self.rows for row in rows]
        z = self.packed.estimate(all_rows) if self.packed.baseline else None
        for rows in self.rows:
            yield self.packed.gather(rows, z)


def strangers_of(pairs: Pairs) -> chats.Packed:
    """Return each prompt with the answer of the same side to the pair before, one by one; of
    answers
    without a partner with the one before (trl's get_kl_completion_ids turns them likewise)."""
    out = chats.Rendered()
    known = pairs.conversations
    for i, (ids, mask) in enumerate(known):
        other, its = known[i - pairs.unit]
        start = int(mask.argmax())
        begin = int(its.argmax())
        out.append(tuple(np.concatenate((a[:start], b[begin:]))[:pairs.block_size + 1]
                         for a, b in ((ids, other), (mask, its))))
    packed = chats.Packed(out, pairs.batch_size, pairs.block_size, pad=pairs.pad)
    packed.columns["reference"] = np.zeros(len(out), np.float32)
    return packed


def divergence(cfg: Config, model: Transformer, pairs: Pairs, machine: Machine) -> Callable:
    """KTO's z of a global batch: the mean of log pi - log ref over its prompts with answers to
    others, at least 0. It counts as a constant, and is the same however the batch is split."""
    strangers = pairs.strangers

    def z(numbers: list[int]) -> float:
        some = chats.Packed([strangers.conversations[i] for i in numbers], cfg.batch_size,
                            pairs.block_size, pad=pairs.pad)
        gap = of_conversations(model, some, cfg.batch_size, machine) - (
            strangers.columns["reference"][numbers])
        return max(0.0, float(gap.mean(dtype=np.float64)))
    return z


def load_pairs(cfg: Config, run: sft.Run) -> sft.Data:
    """Return the pairs of cfg.dataset, packed."""
    left_out = chats.Notes(cfg.ignore_keys)
    records, held, bad = chats.splits(cfg.dataset, "preference", cfg.skip_bad, left_out)
    run.notes += left_out.lines()
    single = ["label" in r for r in records + held]
    if any(single) and not (all(single) and cfg.loss == "kto"):
        raise UserError(f"{cfg.dataset} has answers without a partner (label), " + (
            "and pairs as well: give them one by one" if not all(single) else
            f"which --loss={cfg.loss} does not train on: it needs pairs, --loss=kto does not"))
    render = chats.render_all if any(single) else chats.render_pairs
    made = [render(run.tokenizer, part, None, cfg.block_size + 1) for part in (records, held)]
    how = [dict(block_size=cfg.block_size, seed=cfg.seed, pad=run.tokenizer.eot or 0,
                name=cfg.dataset,
                labels=[part[i]["label"] for i in rendered.numbers] if any(single) else None)
           for part, rendered in zip((records, held), made)]
    batches = Pairs(made[0], run.rows, **how[0])
    held_out = Pairs(made[1], cfg.batch_size, **how[1]) if made[1] else None
    run.notes.append(f"{cfg.dataset}: {batches.summary()}; "
                     f"{len(made[1]) // batches.unit:,} to validate"
                     + (f"; {bad:,} bad records skipped" if bad else ""))
    if any(single):
        good = int(batches.columns["label"].sum())
        others = len(batches.conversations) - good
        run.notes.append(f"{good:,} desirable and {others:,} undesirable answers, each an example "
                         "of its own")
    return sft.Data(batches, held_out, [
        {**r, "messages": r["messages" if any(single) else "chosen"]} for r in held or records])


# -------------------------------------------------------------------- the reference, once


@torch.no_grad()
def of_conversations(model: Transformer, packed: chats.Packed, batch_size: int, machine: Machine,
                     what: str = "") -> np.ndarray:
    """Log-probability of every conversation of `packed`, (conversations,) float32, on every rank.

    Each rank computes some of the batches; nothing depends on how many there are. what: a name
    for the progress on stderr.
    """
    found = torch.zeros(len(packed.conversations), dtype=torch.float64)
    batches = packed.fixed(batch_size, len(packed))
    began = time.perf_counter()
    told = 0.0
    was = model.training
    model.eval()
    for i in range(machine.rank, len(batches), machine.world):
        batch = {k: v.to(machine.device) for k, v in batches[i].items()}
        sums = log_probs(model, batch, packed.documents)[0].double().cpu()
        for row, values in zip(batches.rows[i], sums):
            numbers = packed.rows[row]
            found[numbers] = values[:len(numbers)]
        spent = time.perf_counter() - began
        if what and machine.main and spent - told > 5:
            told = spent
            print(f"{what}: {i + 1} of {len(batches)} batches, "
                  f"{clock(spent / (i + 1) * (len(batches) - i - 1))} left", file=sys.stderr)
    model.train(was)
    return machine.add(found.to(machine.device, torch.float32)).cpu().numpy()


def cache_name(cfg: Config, parts: list[chats.Rendered], machine: Machine) -> str:
    """Return the file of the reference's log-probabilities, by all that they depend on."""
    int8 = bool(cfg.lora_int8 and cfg.lora_rank and not cfg.reference)
    arrays = (array for part in parts for pair in part for array in pair)
    return "reference_%s.npy" % checkpoint.digest(
        cfg.origin.split()[0], machine.dtype, int8, [len(part) for part in parts], *arrays)


def read_cache(file: Path, count: int) -> np.ndarray | None:
    """Return the log-probabilities (count,) in a file of out_dir, or None."""
    out = file.parent
    # an earlier run may have been moved aside when this one began
    for folder in (out, *run_folder.find_earlier(out)):
        try:
            values = np.load(folder / file.name, allow_pickle=False)
        except FileNotFoundError:
            continue
        except (OSError, ValueError, EOFError):
            values = None
        if isinstance(values, np.ndarray) and values.dtype == np.float32 and (
                values.shape == (count,) and np.isfinite(values).all()):
            return values
        print(f"{folder / file.name} is damaged: it is computed again", file=sys.stderr)
    return None


def origin(cfg: Config) -> str:
    """Digest and folder of the reference; a resumed run's own weights have long moved on."""
    if is_resumed(cfg) and cfg.origin and "reference" not in getattr(cfg, "given", ()):
        return cfg.origin
    folder = checkpoint.resolve(cfg.reference or cfg.init_from)
    return f"{run_folder.fingerprint(folder)} {os.path.abspath(folder)}"


def load_reference(cfg: Config, tokenizer: Any, machine: Machine) -> Transformer:
    """Return the reference with its own weights, for as long as they are needed."""
    digest, _, recorded = cfg.origin.partition(" ")
    folder = run_folder.find_model(recorded, digest)
    if folder is None:
        raise UserError(f"the reference at {recorded} is gone or has changed, and so has the file "
                        f"of its log-probabilities in {cfg.out_dir}: put one of them back, or name "
                        "another with --reference=DIR")
    its_tokenizer = checkpoint.load_tokenizer(folder)
    if start.find_difference(its_tokenizer, tokenizer) is not None:
        raise UserError(f"the reference at {folder} has another tokenizer than {cfg.init_from}: "
                        "take one that was trained from the same base")
    model = checkpoint.load_model(folder, machine.device, "float32")
    sft.grow(model, tokenizer.vocab_size, its_tokenizer.vocab_size)
    model.compute_dtype = machine.dtype
    return model


def add_reference(cfg: Config, run: sft.Run, model: Transformer, data: sft.Data) -> None:
    """Give all conversations the log-probabilities of the reference, from out_dir or computed once
    and kept there; for KTO also those of prompts with answers to others."""
    machine = run.machine
    model.compute_dtype = machine.dtype
    packs = [p for p in (data.batches, data.held_out) if p]
    if cfg.loss == "kto":
        for pairs in packs:
            pairs.strangers = strangers_of(pairs)
        packs += [pairs.strangers for pairs in packs]
    if cfg.loss in ALONE or cfg.reference_free:
        return
    sizes = [len(p.conversations) for p in packs]
    cfg.origin = origin(cfg)
    file = Path(cfg.out_dir) / cache_name(cfg, [p.conversations for p in packs], machine)
    # one rank reads, so that all agree whether there is something to compute
    values = read_cache(file, sum(sizes)) if machine.main else None
    cached = machine.sum(float(values is not None))[0] > 0
    if cached:
        values = np.zeros(sum(sizes), np.float32) if values is None else values
        values = machine.add(torch.from_numpy(values).to(machine.device)).cpu().numpy()
    else:
        here = not cfg.reference and (not is_resumed(cfg)
                                      or bool(cfg.lora_rank) and not cfg.eval_only)
        judge = model if here else load_reference(cfg, run.tokenizer, machine)
        with disable_adapters(judge):
            values = np.concatenate([of_conversations(judge, p, cfg.batch_size, machine,
                                                      "reference") for p in packs])
    if machine.main and not cfg.eval_only and not (cached and file.exists()):
        aside = file.with_suffix(".tmp")
        with aside.open("wb") as f:
            np.save(f, values)
        os.replace(aside, file)
    for pairs, part in zip(packs, np.split(values, np.cumsum(sizes)[:-1])):
        pairs.columns["reference"] = part


def add_baselines(cfg: Config, model: Transformer, data: sft.Data, machine: Machine) -> None:
    """Give the data what KTO's z of a batch is computed with."""
    for pairs in (data.batches, data.held_out):
        if pairs:
            pairs.baseline = divergence(cfg, model, pairs, machine)


# ----------------------------------------------------------------------------- the script


def check(cfg: Config) -> None:
    """Raise UserError for a setting that no run can have."""
    if cfg.loss not in LOSSES:
        raise UserError(f"unknown loss {cfg.loss!r}; choose from {', '.join(LOSSES)}")
    if cfg.beta <= 0:
        raise UserError(f"--beta must be positive, got {cfg.beta}; 0.1 is usual")
    if not 0 <= cfg.label_smoothing < 0.5 or cfg.label_smoothing and cfg.loss not in NOISY:
        raise UserError(f"label_smoothing={cfg.label_smoothing} is the share of wrong labels, "
                        f"below 0.5, and only {', '.join(NOISY)} know it: leave it out")
    if cfg.z_loss:
        raise UserError(f"--z_loss={cfg.z_loss} is of a cross entropy over the vocabulary, and the "
                        f"loss {cfg.loss} has none: leave it out")
    if cfg.eval_only and not is_resumed(cfg) and not (
            cfg.reference or cfg.reference_free or cfg.loss in ALONE):
        raise UserError("to evaluate a model against itself says nothing: evaluate a run with "
                        "--init_from=resume --out_dir=RUN, or name its reference, --reference=DIR")
    if cfg.reference and (cfg.reference_free or cfg.loss in ALONE):
        raise UserError(f"--reference={cfg.reference} is of no use to "
                        f"{cfg.loss if cfg.loss in ALONE else '--reference_free'}: leave one out")


def main(cfg: Config) -> train.State | None:
    cfg = train.inherit(cfg)
    check(cfg)
    with sft.setup(cfg, *sft.start_from(cfg)) as run:
        data = load_pairs(cfg, run)
        sft.plan_steps(cfg, run, data)
        if cfg.show:
            return sft.preview(cfg, run, data)
        model = sft.load_model(cfg, run)
        add_reference(cfg, run, model, data)
        if cfg.loss == "kto":
            add_baselines(cfg, model, data, run.machine)
        loss = unpaired_loss(cfg) if "label" in data.batches.columns else pair_loss(cfg)
        return train.fit(cfg, model, data.batches, loss, run.machine, tokenizer=run.tokenizer,
                         eval_batches=data.eval_batches(cfg), writers=run.writers,
                         on_sample=sft.make_sampler(cfg, run, model, data))


if __name__ == "__main__":
    run(main, Config)
