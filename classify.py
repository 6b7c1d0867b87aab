"""A text model as a classifier: a label for each text, learnt from a file of both.

    python classify.py --init_from=DIR --dataset=spam.csv       # columns text and label
    python classify.py --dataset=spam.csv --unfreeze=last       # last block, norm and head alone
    python classify.py --dataset=FILE --text_key=body --label_key=kind --lora_rank=8
    python classify.py --init_from=resume --out_dir=out/classify
    python sample.py --model=out/classify --start=FILE:texts.txt --lines    # a label for each line

The head of a classifier is a row of the output matrix for each label: its token, read at the end of
the text. So the checkpoint stays one that transformers opens, with the labels in its vocabulary.
Accuracy and the confusion matrix of the validation set go to stdout.
"""
from __future__ import annotations

import config  # noqa: F401  first, so that what fails while importing is a sentence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import kernels
import sft
import train
from config import Idle, UserError, run
from data import chats
from inference.labels import LABEL, encode_text, format_report, get_label_ids
from layers.unwrap import unwrap
from model import Transformer
from tokenizer import Tokenizer
from training import router
from training.batch import Batch, Loss, count_targets
from training.settings import Finetuning


@dataclass
class Config(Finetuning):
    unfreeze: str = "all"               # weights that train: all, or last: block, norm and head
    text_key: str = "text"              # key or column of the text
    label_key: str = "label"            # key or column of the label
    out_dir: str = "out/classify"
    SCRIPT = "classify.py"
    IDLE = (Idle("template sample_interval", "", lambda c, m: True,
                 "on a classifier, whose texts are no conversations"),)


def add_labels(tokenizer: Tokenizer, records: list[dict], held: list[dict]) -> str:
    """Add tokens for the labels of the training records, unless the checkpoint brings its own;
    return a line that names them."""
    labels = get_label_ids(tokenizer)
    if not labels:
        names = sorted({r["label"] for r in records})
        tokenizer.add_special_tokens(map(LABEL.format, names))
        labels = get_label_ids(tokenizer)
    if other := [r["label"] for r in records + held if r["label"] not in labels]:
        raise UserError(f"unknown label {other[0]!r}; the training records or the checkpoint have "
                        f"{', '.join(list(labels)[:9])}")
    if len(labels) < 2:
        raise UserError(f"all records have the label {next(iter(labels), None)!r}: there is "
                        "nothing to tell apart")
    return f"{len(labels)} labels: {', '.join(list(labels)[:9])}{', …' if len(labels) > 9 else ''}"


def render_texts(tokenizer: Tokenizer, records: list[dict], max_length: int) -> chats.Rendered:
    """Return each text, its first tokens if it is long, and its label's token, the only target."""
    out = chats.Rendered()
    ids = get_label_ids(tokenizer)
    for record in records:
        text = encode_text(tokenizer, record["text"])
        out.cut += len(text) >= max_length
        row = text[:max_length - 1] + [ids[record["label"]]]
        out.append((np.array(row, dtype=np.int32), np.arange(1, len(row) + 1) == len(row)))
    return out


def load_texts(cfg: Config, run: sft.Run) -> sft.Data:
    """Return the texts of cfg.dataset, packed; labels become tokens."""
    notes = chats.Notes(cfg.ignore_keys)
    records, held, bad = chats.splits(cfg.dataset, "labels", cfg.skip_bad, notes,
                                      (cfg.text_key, cfg.label_key))
    run.notes += notes.lines()
    run.notes.append(add_labels(run.tokenizer, records, held))
    # how much of a text is read, also by sample.py
    run.tokenizer.settings["model_max_length"] = cfg.block_size
    rendered = [render_texts(run.tokenizer, part, cfg.block_size + 1) for part in (records, held)]
    return sft.pack(cfg, run, rendered, held or records, bad)


def class_loss(cfg: Config, ids: list[int], confusion: Tensor | None = None) -> Loss:
    """Return cross entropy over the rows of the labels, at the last token of each text.

    confusion (labels, labels), where given, is counted up: [truth, answer].
    """
    def loss(model: Any, batch: Batch) -> tuple[Tensor, Tensor, dict]:
        targets = batch["targets"].flatten()
        options = {"softcap": unwrap(model).config.final_logit_softcapping}
        if torch.is_grad_enabled():             # a score is that of the labels alone
            options.update(z_loss=cfg.z_loss, label_smoothing=cfg.label_smoothing)
        rows = torch.tensor(ids, device=targets.device)                         # (labels,)
        places = (targets >= 0).nonzero()[:, 0]
        truth = torch.searchsorted(rows, targets[places])                       # ids ascend

        def head(h: Tensor, w: Tensor) -> Tensor:
            """Return (B, T, C), (V, C) -> the summed cross entropy and the number of hits, (2,)."""
            hidden = h.flatten(0, 1).index_select(0, places)
            logits = kernels.linear(hidden, w.index_select(0, rows))
            answers = logits.argmax(-1)
            if confusion is not None:
                pairs = torch.stack((truth, answers)).cpu()
                confusion.index_put_(tuple(pairs), torch.ones(len(truth), dtype=confusion.dtype),
                                     accumulate=True)
            value = kernels.cross_entropy(logits, truth, **options)
            return torch.stack((value.float(), (answers == truth).sum().float()))

        (total, hits), extra, metrics = router.run_model(cfg, model, batch, head, count_targets)
        return total + extra, count_targets(batch), {"accuracy": hits, **metrics}

    def count_flops(model: Transformer, T: int, tokens: int, targets: int) -> float:
        """Return the FLOPs of steps: the rows of the labels are all of the output matrix used."""
        head = 6 * len(ids) * model.config.n_embd
        return tokens * model.flops_per_token(T, targets=0.0) + targets * head
    loss.count_flops = count_flops
    return loss


def freeze(model: Transformer) -> None:
    """Leave only the last block, the last norm and the output matrix to be trained."""
    last = f"model.layers.{model.config.n_layer - 1}."
    output = model.output_weight
    for name, p in model.named_parameters():
        chosen = name.startswith((last, "model.norm.")) or p is output
        p.requires_grad_(p.requires_grad and chosen)        # a router's bias never has a gradient


def check(cfg: Config) -> None:
    """Raise UserError for a setting that no run can have."""
    if cfg.unfreeze not in ("all", "last"):
        raise UserError(f"unknown unfreeze {cfg.unfreeze!r}; choose from all, last")
    if cfg.unfreeze == "last" and cfg.lora_rank:
        raise UserError("--unfreeze=last and --lora_rank both say what trains: leave one out")


def print_report(cfg: Config, run: sft.Run, model: Transformer, data: sft.Data) -> None:
    """Print accuracy and the confusion matrix of every text of the validation set, on one rank."""
    ids = get_label_ids(run.tokenizer)
    confusion = torch.zeros(len(ids), len(ids))
    train.evaluate(model, data.held_out.fixed(cfg.batch_size, len(data.held_out)),
                   class_loss(cfg, list(ids.values()), confusion),
                   replace(run.machine, rank=0, world=1))
    print(format_report(list(ids), confusion))


def main(cfg: Config) -> train.State | None:
    cfg = train.inherit(cfg)
    check(cfg)
    with sft.setup(cfg, *sft.start_from(cfg), chat=False) as run:
        data = load_texts(cfg, run)
        sft.plan_steps(cfg, run, data)
        if cfg.show:
            return sft.preview(cfg, run, data)
        model = sft.load_model(cfg, run)
        if cfg.unfreeze == "last":
            freeze(model)
        loss = class_loss(cfg, list(get_label_ids(run.tokenizer).values()))
        state = train.fit(cfg, model, data.batches, loss, run.machine, tokenizer=run.tokenizer,
                          eval_batches=data.eval_batches(cfg), writers=run.writers)
        if data.held_out and run.machine.main:
            print_report(cfg, run, model, data)
        return state


if __name__ == "__main__":
    run(main, Config)
