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

import sys
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

import chat as templates
import checkpoint
import kernels
import lora
import train
from config import UserError, run, show
from data import chats
from machine import find_machine
from model import ModelConfig, Transformer
from translate import family_of

CONTEXT = 1024          # a row is no longer by default, though many a model could read more


@dataclass
class Config(train.Config, lora.Settings):
    task: str = "chat"                  # chat, or classify
    # --- data
    dataset: str = "skills"             # a name under data/, a folder, or a file of conversations
    skip_bad: bool = False              # drop bad records, and count them
    template: str = ""                  # of chat.py; empty: the checkpoint's, or chatml
    show: int = 0                       # print so many rows as they are trained on, and stop
    batch_size: int = 8                 # rows of a micro-batch
    gradient_accumulation_steps: int = 1    # micro-batches of a step, over all ranks together
    block_size: int = 0                 # tokens of a row; 0: the checkpoint's, at most 1024
    document_mask: bool = True          # conversations of a row never see each other
    # --- model
    init_from: str = "out/demo"         # a folder: a run of train.py, any checkpoint; or resume
    unfreeze: str = "all"               # weights that train: all, or last: block, norm and head
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
    eval_iters: int = 50                # batches of the validation set
    log_interval: int = 10

# ------------------------------------------------------------------- what a checkpoint knows


def inherit(cfg: Config, shape: ModelConfig, tokenizer: Any) -> list[str]:
    """Settle what the command line leaves open with what the checkpoint knows, in place.

    Returns what was inherited or is new, to be told; the tokenizer has the template from here on.
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
    done = bool(tokenizer.template) and cfg.template in ("", tokenizer.template)
    if done:
        said.append(f"template {tokenizer.template}")
    # what the saved settings say of the model shall be true of it
    for name in asdict(cfg).keys() & asdict(shape).keys() - {"block_size", "dropout", "init_std"}:
        setattr(cfg, name, getattr(shape, name))
    cfg.family = family_of(shape).model_type
    said = ["inherited from the checkpoint: " + ", ".join(said)]
    if done or cfg.task == "classify":
        return said
    # a template of somebody else's that nobody here knows: the user has to say which to use
    row = templates.find(cfg.template or (None if tokenizer.jinja else "chatml"),
                         foreign=bool(tokenizer.jinja))
    control = row.control(tokenizer.eot_token or "<|endoftext|>")
    names = [name for name in control if name not in tokenizer.special]
    tokenizer.add_special_tokens(names)
    instead = f" instead of {tokenizer.template}" if tokenizer.template else ""
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


def freeze(model: Transformer) -> None:
    """Leave only the last block, the last norm and the output matrix to be trained."""
    last = f"model.layers.{model.config.n_layer - 1}."
    output = model.output_weight
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith((last, "model.norm.")) or p is output)

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


def start_from(cfg: Config) -> tuple[ModelConfig, Any]:
    """(shape, tokenizer) of the checkpoint that training starts from."""
    resume = cfg.init_from == "resume"
    source, which = (cfg.out_dir, "last") if resume else (cfg.init_from, "best")
    try:
        directory = checkpoint.resolve(source, which)
    except UserError as e:
        if resume or "init_from" in getattr(cfg, "given", ()):
            raise
        raise UserError(f"there is no trained model at {source}, where fine-tuning starts: make "
                        "one with `python train.py config/demo.py`, or name another with "
                        "--init_from=DIR") from e
    return checkpoint.read_config(directory), checkpoint.load_tokenizer(directory)


def check(cfg: Config) -> None:
    """UserError for a setting that no run can have; what is still to be found counts as good."""
    train.check(replace(cfg, max_iters=cfg.max_iters or 1))
    for name, choices in (("task", ("chat", "classify")), ("unfreeze", ("all", "last"))):
        if getattr(cfg, name) not in choices:
            raise UserError(f"{name}={getattr(cfg, name)!r} does not exist: {', '.join(choices)}")
    if cfg.unfreeze == "last" and cfg.lora_rank:
        raise UserError("--unfreeze=last and --lora_rank both say what trains: leave one out")
    if not cfg.document_mask:
        raise UserError("--document_mask=0 would let a conversation read the one before it: leave "
                        "it out")


def read_data(cfg: Config, shape: ModelConfig, tokenizer: Any, rows: int, notes: list[str]
              ) -> tuple[chats.Packed, chats.Packed | None, list[dict]]:
    """(training rows, validation rows or None, some records to sample from) of cfg.dataset.

    Adds to `notes`, to the tokenizer (labels) and, where they follow from the size of the data,
    settles the number of steps in cfg.
    """
    classify, length = cfg.task == "classify", cfg.block_size + 1
    records, held, bad = chats.splits(cfg.dataset, "labels" if classify else "sft", cfg.skip_bad)
    if classify:
        notes.append(add_labels(tokenizer, records, held))
    made = [texts(tokenizer, part, length) if classify else
            chats.render_all(tokenizer, part, None, length) for part in (records, held)]
    # a learned position is a place in the row: those models get a row for each conversation
    how = dict(block_size=cfg.block_size, seed=cfg.seed, pad=tokenizer.eot or 0,
               together=shape.position != "learned", name=cfg.dataset)
    batches = chats.Packed(made[0], rows, **how)
    held_out = chats.Packed(made[1], cfg.batch_size, **how) if made[1] else None
    notes.append(f"{cfg.dataset}: {batches.summary()}; {len(made[1]):,} to validate"
                 + (f"; {bad:,} bad records skipped" if bad else ""))
    cfg.max_iters = cfg.max_iters or max(1, round(cfg.epochs * len(batches) / rows))
    if cfg.warmup_iters < 0:
        cfg.warmup_iters = cfg.max_iters // 20
    return batches, held_out, held or records


def answer(model: Transformer, tokenizer: Any, messages: list[dict], seed: int) -> str:
    """The first question of a conversation and what the model says to it, with control tokens."""
    import sample                       # a stage: known here only where one is asked for
    first = next((k for k, m in enumerate(messages) if m["role"] == "assistant"), None)
    ids, stops = tokenizer.render(messages[:first], None, True)[0], set(tokenizer.stop_ids)
    new = sample.generate(model, [ids], 100, sample.Sampling(temperature=0), seed,
                          tokenizer.vocab_size, lambda _, token: token in stops)
    return tokenizer.decode(ids + [row[0] for row in new])


def main(cfg: Config) -> train.State | None:
    if cfg.init_from == "resume":
        cfg = train.inherit(cfg)
        if "epochs" in cfg.given and "max_iters" not in cfg.given:
            cfg.max_iters = 0
    kernels.use(cfg.backend)
    shape, tokenizer = start_from(cfg)
    known, classify = tokenizer.vocab_size, cfg.task == "classify"
    notes = inherit(cfg, shape, tokenizer)
    check(cfg)
    machine = find_machine(cfg)
    try:
        rows = train.rows_of_step(cfg, machine)
        batches, held_out, records = read_data(cfg, shape, tokenizer, rows, notes)
        if machine.main:
            print("\n".join(notes), file=sys.stderr)
        if cfg.show:
            if machine.main:
                numbers = batches.epoch(0)[:max(1, cfg.show)].tolist()
                print(chats.show(tokenizer, batches.gather(numbers)))
            return None
        # ------ the model, with rows for new tokens, and what of it trains
        adapters = cfg.lora_rank > 0 and not cfg.eval_only      # to evaluate, they are merged
        model = train.build_model(lora.start_from(cfg) if adapters else cfg, 0, machine)
        grow(model, tokenizer.vocab_size, known)
        if cfg.unfreeze == "last":
            freeze(model)
        if machine.main and not cfg.eval_only:
            train.prepare_out_dir(cfg)
        if adapters:
            notes = [lora.begin(cfg, model, tokenizer, grown=tokenizer.vocab_size > known)]
        if machine.main:
            print(show(cfg), *notes[:adapters], f"{model.parameter_count():,} parameters | "
                  f"{rows * cfg.block_size:,} tokens a step | {machine.device} x {machine.world}, "
                  f"{str(machine.dtype).split('.')[-1]}", sep="\n", file=sys.stderr)
        # ------ train it
        ids = label_ids(tokenizer)
        loss = class_loss(list(ids.values())) if classify else (
            train.next_token_loss(cfg, masked=True))
        state = train.fit(cfg, model, batches, loss, machine, tokenizer=tokenizer,
                          eval_batches=held_out.fixed(cfg.batch_size, cfg.eval_iters)
                          if held_out else (), on_sample=None if classify else
                          lambda: answer(model, tokenizer, records[0]["messages"], cfg.seed))
        if classify and held_out and machine.main:
            # every text of the validation set, on one rank
            confusion = torch.zeros(len(ids), len(ids))
            train.evaluate(model, held_out.fixed(cfg.batch_size, len(held_out)),
                           class_loss(list(ids.values()), confusion),
                           replace(machine, rank=0, world=1))
            print(report(list(ids), confusion))
        return state
    finally:
        if machine.world > 1:
            dist.destroy_process_group()


if __name__ == "__main__":
    run(main, Config)
