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

import checkpoint
import kernels
import stage
import train
from config import UserError, run
from data import chats
from machine import Machine
from model import ModelConfig, Transformer


@dataclass
class Config(stage.Config):
    task: str = "chat"                  # chat, or classify
    unfreeze: str = "all"               # weights that train: all, or last: block, norm and head

# ---------------------------------------------------------------------------- classification
LABEL = "<|label:{}|>"          # the control token of a label


def label_ids(tokenizer: Any) -> dict[str, int]:
    """Label -> id of its token, in the order of the ids."""
    start, end = LABEL.split("{}")
    found = [(i, name) for name, i in tokenizer.special.items()
             if name.startswith(start) and name.endswith(end)]
    return {name[len(start):-len(end)]: i for i, name in sorted(found)}


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
    start = tokenizer.prefix or [tokenizer.eot or 0]        # what a document began with before
    for record in records:
        text = start + tokenizer.encode_ordinary(record["text"])
        out.cut += len(text) >= max_length
        row = text[:max_length - 1] + [ids[record["label"]]]
        out.append((np.array(row, dtype=np.int32), np.arange(1, len(row) + 1) == len(row)))
    return out


def class_loss(ids: list[int], confusion: Tensor | None = None) -> train.Loss:
    """Cross entropy over the rows of the labels, at the last token of each text.

    confusion (labels, labels), where given, is counted up: [truth, answer].
    """
    def loss(model: Any, batch: train.Batch) -> tuple[Tensor, Tensor, dict]:
        targets, config = batch["targets"].flatten(), checkpoint.raw(model).config
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
            value = kernels.cross_entropy(z, truth, softcap=config.final_logit_softcapping)
            return torch.stack((value.float(), right.float()))

        total, right = model(batch["ids"], doc=batch["doc"], head=head)
        return total, (targets >= 0).sum(), {"accuracy": right}
    return loss


def report(labels: list[str], confusion: Tensor) -> str:
    """Accuracy, and a row of counts for each true label, with a column for each answer."""
    right, total = confusion.trace().item(), int(confusion.sum())
    wide = max(8, *(len(label) + 2 for label in labels))
    lines = [f"accuracy {right / max(1, total):.4f} ({int(right)} of {total})",
             "truth \\ answer".ljust(wide + 7) + "".join(label.rjust(wide) for label in labels)]
    for label, row in zip(labels, confusion.long().tolist()):
        lines.append(label.ljust(wide + 7) + "".join(f"{n:{wide}d}" for n in row))
    return "\n".join(lines)

# ----------------------------------------------------------------------------- the script


def freeze(model: Transformer) -> None:
    """Leave only the last block, the last norm and the output matrix to be trained."""
    last = f"model.layers.{model.config.n_layer - 1}."
    output = model.output_weight
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith((last, "model.norm.")) or p is output)



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
    records, held, bad = chats.splits(cfg.dataset, "labels" if classify else "sft", cfg.skip_bad)
    if classify:
        notes.append(add_labels(tokenizer, records, held))
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
    return class_loss(ids) if cfg.task == "classify" else train.next_token_loss(cfg, masked=True)


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
                       class_loss(list(ids.values()), confusion),
                       replace(done.machine, rank=0, world=1))
        print(report(list(ids), confusion))
    return done.state


if __name__ == "__main__":
    run(main, Config)
