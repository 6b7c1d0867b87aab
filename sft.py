"""From a text model to a chat model: full fine-tuning on conversations.

    python data/prepare.py skills                               # once: conversations, no download
    python sft.py                                               # of out/demo, on any machine
    python sft.py --init_from=DIR --dataset=chats.jsonl         # any checkpoint, any layout
    python sft.py --show=5                                      # what is trained on, in colour
    torchrun --nproc_per_node=8 sft.py --init_from=DIR --learning_rate=2e-5
    python sft.py --init_from=resume --out_dir=out/sft          # go on where a run stopped
    python sample.py --out_dir=out/sft --chat                   # talk to the result

What it costs is at the head of config/sft_skills.py. Block size, tokenizer and chat template are
the checkpoint's; a model that has no template gets one, and rows for its control tokens.

The loss is that of pretraining, on fewer tokens: what the assistant says and the token that ends
its turn. data/chats.py renders and packs the conversations, train.fit() is the loop.

    python sft.py --task=classify --dataset=spam.csv --unfreeze=last    # columns text and label

A classifier's head is a row of the output matrix for each label: its token, read at the end of the
text. So the checkpoint stays one that transformers opens, with the labels in its vocabulary.
Accuracy and the confusion matrix of the validation set go to stdout.
"""
from __future__ import annotations

import config  # noqa: F401  first, so that what fails while importing is a sentence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from layers.unwrap import unwrap
import kernels
import stage
import train
from config import Idle, UserError, run
from data import chats
from inference.classify import LABEL, label_ids, report, text_ids
from training.machine import Machine
from model import ModelConfig, Transformer
from training import effects, router


@dataclass
class Config(stage.Config):
    task: str = "chat"                  # chat, or classify
    unfreeze: str = "all"               # weights that train: all, or last: block, norm and head
    text_key: str = "text"              # classify: key or column of the text
    label_key: str = "label"            # classify: key or column of the label
    SCRIPT = "sft.py"
    IDLE = (                            # which settings have no effect, and when
        Idle("task", "", effects.is_resumed, "on a run that is resumed"),
        Idle("template sample_interval", "task", lambda c, m: c.task == "classify",
             "with --task=classify"),
        Idle("text_key label_key", "task", lambda c, m: c.task != "classify",
             "without --task=classify"))

# ---------------------------------------------------------------------------- classification


def add_labels(tokenizer: Any, records: list[dict], held: list[dict]) -> str:
    """Tokens for the labels of the training records, unless the checkpoint brings its own."""
    if not (known := label_ids(tokenizer)):
        names = sorted({r["label"] for r in records})
        tokenizer.add_special_tokens(map(LABEL.format, names))
        known = label_ids(tokenizer)
    if other := [r["label"] for r in records + held if r["label"] not in known]:
        raise UserError(f"the label {other[0]!r} is none of {', '.join(list(known)[:9])}, which "
                        "the training records or the checkpoint have")
    if len(known) < 2:
        raise UserError(f"all records have the label {next(iter(known), None)!r}: there is nothing "
                        "to tell apart")
    return f"{len(known)} labels: {', '.join(list(known)[:9])}{', …' if len(known) > 9 else ''}"


def texts(tokenizer: Any, records: list[dict], max_length: int) -> chats.Rendered:
    """Each text, its first tokens if it is long, and its label's token, the only target."""
    out, ids = chats.Rendered(), label_ids(tokenizer)
    for record in records:
        text = text_ids(tokenizer, record["text"])
        out.cut += len(text) >= max_length
        row = text[:max_length - 1] + [ids[record["label"]]]
        out.append((np.array(row, dtype=np.int32), np.arange(1, len(row) + 1) == len(row)))
    return out


def class_loss(cfg: Config, ids: list[int], confusion: Tensor | None = None) -> train.Loss:
    """Cross entropy over the rows of the labels, at the last token of each text.

    confusion (labels, labels), where given, is counted up: [truth, answer].
    """
    def loss(model: Any, batch: train.Batch) -> tuple[Tensor, Tensor, dict]:
        targets, config = batch["targets"].flatten(), unwrap(model).config
        routed = router.needs_routes(config)
        options = dict(softcap=config.final_logit_softcapping)
        if torch.is_grad_enabled():             # a score is that of the labels as they are
            options.update(z_loss=cfg.z_loss, label_smoothing=cfg.label_smoothing)
        rows = torch.tensor(ids, device=targets.device)                         # (labels,)
        live = (targets >= 0).nonzero()[:, 0]
        truth = torch.searchsorted(rows, targets[live])                         # ids ascend

        def head(h: Tensor, w: Tensor) -> Tensor:
            z = kernels.linear(h.flatten(0, 1).index_select(0, live), w.index_select(0, rows))
            right = (z.argmax(-1) == truth).sum()
            if confusion is not None:
                pairs = torch.stack((truth, z.argmax(-1))).cpu()
                confusion.index_put_(tuple(pairs), torch.ones(len(truth), dtype=confusion.dtype),
                                     accumulate=True)
            value = kernels.cross_entropy(z, truth, **options)
            return torch.stack((value.float(), right.float()))

        out = model(batch["ids"], doc=batch["doc"], router=routed, head=head)
        (total, right), routes = out if routed else (out, [])
        more, metrics = router.compute_losses(cfg, routes, batch, train.count_targets)
        return total + more, train.count_targets(batch), {"accuracy": right, **metrics}

    def count_flops(model: Transformer, T: int, tokens: int, targets: int) -> float:
        head = 6 * len(ids) * model.config.n_embd       # the rows of the labels alone
        return tokens * model.flops_per_token(T, targets=0.0) + targets * head
    loss.count_flops = count_flops
    return loss

# ----------------------------------------------------------------------------- the script


def freeze(model: Transformer) -> None:
    """Leave only the last block, the last norm and the output matrix to be trained."""
    last = f"model.layers.{model.config.n_layer - 1}."
    output = model.output_weight
    for name, p in model.named_parameters():
        chosen = name.startswith((last, "model.norm.")) or p is output
        p.requires_grad_(p.requires_grad and chosen)        # a router's bias never has a gradient


def check(cfg: Config) -> None:
    """UserError for a setting that no run can have."""
    stage.check(cfg)
    for name, choices in (("task", ("chat", "classify")), ("unfreeze", ("all", "last"))):
        if getattr(cfg, name) not in choices:
            raise UserError(f"{name}={getattr(cfg, name)!r} does not exist: {', '.join(choices)}")
    if cfg.unfreeze == "last" and cfg.lora_rank:
        raise UserError("--unfreeze=last and --lora_rank both say what trains: leave one out")


def read(cfg: Config, shape: ModelConfig, tokenizer: Any, rows: int, notes: list[str]
         ) -> stage.Data:
    """The conversations or texts of cfg.dataset, packed; labels become tokens."""
    classify, length = cfg.task == "classify", cfg.block_size + 1
    left_out = chats.Notes(cfg.ignore_keys)
    columns = (cfg.text_key, cfg.label_key) if classify else chats.COLUMNS
    records, held, bad = chats.splits(cfg.dataset, "labels" if classify else "sft", cfg.skip_bad,
                                      left_out, columns)
    notes += left_out.lines()
    if classify:
        notes.append(add_labels(tokenizer, records, held))
        tokenizer.settings["model_max_length"] = cfg.block_size     # see classify.text_length
    made = [texts(tokenizer, part, length) if classify else
            chats.render_all(tokenizer, part, None, length) for part in (records, held)]
    how = dict(block_size=cfg.block_size, seed=cfg.seed, pad=tokenizer.eot or 0, name=cfg.dataset)
    batches = chats.Packed(made[0], rows, **how)
    held_out = chats.Packed(made[1], cfg.batch_size, **how) if made[1] else None
    notes.append(f"{cfg.dataset}: {batches.summary()}; {len(made[1]):,} to validate"
                 + (f"; {bad:,} bad records skipped" if bad else ""))
    return stage.Data(batches, held_out, held or records)


def losses(cfg: Config, model: Transformer, data: stage.Data, tokenizer: Any, machine: Machine
           ) -> train.Loss:
    if cfg.unfreeze == "last":
        freeze(model)
    ids = list(label_ids(tokenizer).values())
    return (class_loss(cfg, ids) if cfg.task == "classify" else
            train.next_token_loss(cfg, masked=True))


def main(cfg: Config) -> train.State | None:
    if cfg.init_from == "resume":       # which task it was is needed before anything is read
        cfg = train.inherit(cfg)
    done = stage.go(cfg, read, losses, verify=check, chat=cfg.task != "classify")
    if not done:
        return None
    if cfg.task == "classify" and done.data.held_out and done.machine.main:
        # every text of the validation set, on one rank
        ids, held_out = label_ids(done.tokenizer), done.data.held_out
        confusion = torch.zeros(len(ids), len(ids))
        train.evaluate(done.model, held_out.fixed(cfg.batch_size, len(held_out)),
                       class_loss(cfg, list(ids.values()), confusion),
                       replace(done.machine, rank=0, world=1))
        print(report(list(ids), confusion))
    return done.state


if __name__ == "__main__":
    run(main, Config)
