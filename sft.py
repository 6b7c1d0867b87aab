"""From a text model to a chat model: fine-tuning on conversations; and what later stages share.

    python data/prepare.py skills                               # once: conversations, no download
    python sft.py                                               # of out/demo, on any machine
    python sft.py --init_from=DIR --dataset=chats.jsonl         # any checkpoint, any layout
    python sft.py --show=5                                      # what is trained on, in colour
    torchrun --nproc_per_node=8 sft.py --init_from=DIR --learning_rate=2e-5
    python sft.py --init_from=resume --out_dir=out/sft          # go on where a run stopped
    python sample.py --out_dir=out/sft --chat                   # talk to the result

The docstring of config/sft_skills.py gives its cost. Block size, tokenizer and chat template are
the checkpoint's; a model that has no template gets one, and rows for its control tokens.

The loss is that of pretraining, on fewer tokens: what the assistant says and the token that ends
its turn. data/chats.py renders and packs the conversations, train.fit() is the loop.

main() reads top to bottom, and so do those of classify.py, dpo.py and distill.py, which call the
same functions: setup() settles the settings with the checkpoint, plan_steps() counts the steps,
preview() is --show, load_model() adds rows for new tokens and adapters.
"""
from __future__ import annotations

import config  # noqa: F401  first, so that what fails while importing is a sentence
import contextlib
import json
import math
import os
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple

import torch
from torch.nn import Parameter

import checkpoint
import kernels
import train
from config import UserError, refuse_idle, run, show
from data import chats, loader
from formats.peft import FOLDER, check_ranks, find_base, load_adapter, read_base, save_adapter
from formats.run_folder import GROWN, fingerprint
from inference.labels import get_label_ids
from inference.generate import Sampling, sample_text
from layers.lora import add_lora, describe, halve, select_linears
from model import ModelConfig, Transformer
from text.chat import find
from tokenizer import Tokenizer
from training.machine import Machine, open_machine
from training.settings import Finetuning, is_pretrained, is_resumed
from training.start import (check_data, find_pretrained, get_in_force, prepare_out_dir, take_shape)

# what makes the models that the stages' configs start from
BEFORE = {"out/demo": "train.py config/demo.py", "out/sft": "sft.py config/sft_skills.py"}
CONTEXT = 1024          # the default row is no longer, though many a model could read more


@dataclass
class Config(Finetuning):
    SCRIPT = "sft.py"                   # what a run of these settings is resumed with; no field


class Data(NamedTuple):
    """What a stage trains on."""
    batches: Any                        # (step) -> Batch; len() rows; gather(rows), epoch(n)
    held_out: Any = None                # the same for validation, or None
    records: list[dict] = []            # some that samples may be made from

    def eval_batches(self, cfg: Finetuning) -> Any:
        """Return the fixed rows of the validation set, in batches; () where there is none."""
        rows = train.eval_rows(cfg)
        return self.held_out.fixed(cfg.batch_size, rows) if self.held_out else ()


@dataclass
class Run:
    """A run of a stage once its settings are settled: what its functions share."""
    machine: Machine
    shape: ModelConfig                  # of the checkpoint that training starts from
    tokenizer: Tokenizer                # with the template's control tokens
    saved_vocab: int                    # ids of the checkpoint's tokenizer; later ones are new
    rows: int                           # of a global batch
    notes: list[str] = field(default_factory=list)      # to be printed before training
    # functions that add files of their own to a checkpoint's folder: see save_checkpoint()
    writers: list[Callable[[Path], None]] = field(default_factory=list)


# ------------------------------------------------------------- what a checkpoint settles


def start_from(cfg: Config) -> tuple[ModelConfig, Any]:
    """Return (shape, tokenizer) of the checkpoint that training starts from, which cfg.init_from
    names from here on: the run that it belongs to may be moved aside."""
    resume = is_resumed(cfg)
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


def settle(cfg: Finetuning, shape: ModelConfig, tokenizer: Tokenizer, chat: bool = True
           ) -> list[str]:
    """Settle what was not given, in place, by the checkpoint; return lines that say what it was.

    The tokenizer has the template from here on. chat: whether the data are conversations, which
    need one.
    """
    notes = []
    if cfg.block_size <= 0:
        cfg.block_size = min(shape.block_size, CONTEXT)
        part = "" if cfg.block_size == shape.block_size else f" of its {shape.block_size:,}"
        notes.append(f"block size {cfg.block_size}{part}")
    elif cfg.block_size > shape.block_size:
        raise UserError(f"block_size {cfg.block_size} is more than the {shape.block_size} tokens "
                        "that the checkpoint was made for: use at most that")
    notes.append(f"a tokenizer of {tokenizer.vocab_size:,} ids")
    jinja = ""
    if tokenizer.jinjas and not tokenizer.template:
        jinja = "the checkpoint's own chat template"
    has_template = bool(tokenizer.template or jinja) and cfg.template in ("", tokenizer.template)
    if has_template:
        notes.append(jinja or f"template {tokenizer.template}")
    # the saved settings are to be true of the model
    take_shape(cfg, shape)
    notes = ["inherited from the checkpoint: " + ", ".join(notes)]
    if has_template or not chat:
        return notes
    row = find(cfg.template or "chatml")
    control = row.control(tokenizer.eot_token or "<|endoftext|>")
    names = [name for name in control if name not in tokenizer.added]
    tokenizer.add_special_tokens(names)
    before = tokenizer.template or jinja
    instead = f" instead of {before}" if before else ""
    tokenizer.template = row.name
    notes.append(f"template {row.name}{instead}" + (
        f", whose tokens {' '.join(names)} are new: a vocabulary of {tokenizer.vocab_size:,} ids"
        if names else ", whose tokens the tokenizer has"))
    return notes


@contextlib.contextmanager
def setup(cfg: Finetuning, shape: ModelConfig, tokenizer: Tokenizer, chat: bool = True
          ) -> Iterator[Run]:
    """Settle the settings by the checkpoint, and yield what the stage's functions share.

    shape, tokenizer: of the model that training starts from. chat: whether the data are
    conversations. UserError for a setting that no run can have, or that has no effect.
    """
    kernels.use(cfg.backend)
    if chat and get_label_ids(tokenizer):
        raise UserError(f"{cfg.init_from} is a classifier, and what is made of it would be taken "
                        "for one: start from the model that it was trained from, or use "
                        "classify.py")
    refuse_idle(cfg, shape, get_in_force(cfg, shape, is_pretrained(cfg)
                                         or getattr(cfg, "layers_from_teacher", False)))
    saved_vocab = tokenizer.vocab_size
    notes = settle(cfg, shape, tokenizer, chat)
    train.check(cfg)
    with open_machine(cfg) as machine:
        rows = train.rows_of_step(cfg, machine)
        yield Run(machine, shape, tokenizer, saved_vocab, rows, notes)


def count_steps(epochs: float, rows: int, batch: int) -> int:
    """Return the steps in which every row is seen `epochs` times: rounded up, as transformers'
    Trainer does.

    Rounded to the nearest, 11 rows in steps of 8 would be one step, and 3 of them never seen.
    """
    return max(1, math.ceil(round(epochs * rows / batch, 9)))    # 0.1 x 30 is 3.0000000000000004


def plan_steps(cfg: Finetuning, run: Run, data: Data) -> None:
    """Settle how many steps the data make, in place, and print the notes so far."""
    file = Path(cfg.dataset).expanduser()
    check_data(cfg, file if file.is_file() else loader.find(cfg.dataset))
    rows = len(data.batches)
    if is_resumed(cfg) and "epochs" in cfg.given and "max_iters" not in cfg.given:
        cfg.max_iters = 0                       # which was the saved run's
    cfg.max_iters = cfg.max_iters or count_steps(cfg.epochs, rows, run.rows)
    run.notes.append(f"{cfg.max_iters:,} steps of {run.rows:,} rows are "
                     f"{cfg.max_iters * run.rows / rows:.4g} epochs")
    if cfg.warmup_iters < 0:
        cfg.warmup_iters = cfg.max_iters // 20
    if run.machine.main:
        print("\n".join(run.notes), file=sys.stderr)


def preview(cfg: Finetuning, run: Run, data: Data) -> None:
    """Print the first rows as they are trained on: --show."""
    if run.machine.main:
        numbers = data.batches.epoch(0)[:max(1, cfg.show)].tolist()
        print(chats.show(run.tokenizer, data.batches.gather(numbers)))


# ------------------------------------------------------------------------------- the model


@torch.no_grad()
def grow(model: Transformer, vocab_size: int, known: int) -> None:
    """Give ids known .. vocab_size - 1 rows in the embedding and the output matrix.

    Each is drawn around the mean of the old ones, with their spread: a token about which nothing
    is known (Hewitt 2021). With all at the mean itself, the end of a turn and its beginning would
    be one token to a model whose matrices are frozen (LoRA). Padding rows are used first.
    """
    if vocab_size == known:
        return
    matrices = [model.model.embed_tokens]
    if not model.config.tie_word_embeddings:
        matrices.append(model.lm_head)
    for m in matrices:
        old = m.weight[:known]
        rows = max(vocab_size, len(m.weight))
        # drawn on the CPU, so that every device and every rank has the same
        noise = torch.randn(vocab_size - known, old.shape[1],
                            generator=torch.Generator().manual_seed(known)).to(old)
        weight = m.weight.new_empty(rows, old.shape[1])
        weight[:len(m.weight)] = m.weight
        weight[known:vocab_size] = old.mean(0) + old.std(0) * noise
        m.weight = Parameter(weight)
    model.config.vocab_size = max(vocab_size, model.config.vocab_size)


def find_frozen(cfg: Any) -> Any:
    """Return the settings to build the model by: on resume with adapters it is the base again."""
    if is_resumed(cfg) and cfg.lora_rank:
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
                 dtype: torch.dtype | None = None, base: str = ""
                 ) -> tuple[str, Callable[[Path], None]]:
    """Put adapters on a stage's model: new ones, or on resume those of the last checkpoint, which
    holds the merged weights and has them as a folder. Return describe(), and a function that saves
    them in the folder of a checkpoint.

    grown: the model is no longer that of cfg.init_from, as it has rows for new tokens: then it is
    saved as out_dir/base. dtype: of the activations; see halve(). base: of a resumed run, as
    find_frozen() returns it."""
    digest = ""
    if is_resumed(cfg):
        last = checkpoint.resolve(cfg.out_dir, "last") / FOLDER
        base = base or find_frozen(cfg).init_from
        digest = read_base(last).get("fingerprint", "")
        load_adapter(last, model, int8=cfg.lora_int8)
    else:
        base = os.path.abspath(place_base(cfg) if grown else checkpoint.resolve(cfg.init_from))
        if os.environ.get("RANK", "0") == "0":
            if grown:
                checkpoint.save_model(base, model, tokenizer, extra={GROWN: json.dumps(
                    {"init_from": cfg.init_from}) + "\n"})
            digest = fingerprint(Path(base))
        add_lora(model, cfg.lora_rank, cfg.lora_alpha or 2.0 * cfg.lora_rank, cfg.lora_dropout,
                 cfg.targets, cfg.rslora, cfg.dora, int8=cfg.lora_int8)
        check_ranks(model)
    base = os.path.abspath(base)
    if dtype == torch.bfloat16:
        halve(model)

    def save(folder: Path) -> None:
        """Save the adapters; save_checkpoint() itself saves the merged weights."""
        save_adapter(folder / FOLDER, model, base=base, fingerprint=digest)
    return describe(model), save


def load_model(cfg: Finetuning, run: Run) -> Transformer:
    """Return the model to train, with rows for new tokens and adapters; make cfg.out_dir, and print
    the settings."""
    adapters = cfg.lora_rank > 0 and not cfg.eval_only      # to evaluate, they are merged
    source = find_frozen(cfg) if adapters else cfg
    vocab_size = run.tokenizer.vocab_size
    model = train.build_model(source, 0 if is_pretrained(cfg) else vocab_size, run.machine)
    grow(model, vocab_size, run.saved_vocab)
    grown = vocab_size > run.saved_vocab
    if adapters:                        # a target that is not there is told before a folder is made
        select_linears(model, cfg.targets)
        if grown:
            place_base(cfg)
    prepare_out_dir(cfg, run.machine)
    lines = []
    if adapters:
        note, writer = add_adapters(cfg, model, run.tokenizer, grown, run.machine.dtype,
                                    source.init_from)
        lines.append(note)
        run.writers.append(writer)
    if run.machine.main:
        print(show(cfg), *lines, f"{model.parameter_count():,} parameters | "
              f"{run.rows * cfg.block_size:,} tokens per step | {run.machine}", sep="\n",
              file=sys.stderr)
    return model


def answer(model: Transformer, tokenizer: Tokenizer, record: dict[str, Any], seed: int) -> str:
    """Return the first question of a conversation and the model's answer, with control tokens."""
    messages = record["messages"]
    roles = [m["role"] for m in messages]
    question = roles.index("user")          # some begin with a greeting of the assistant
    first = roles.index("assistant", question) if "assistant" in roles[question:] else None
    ids = tokenizer.render(messages[:first], None, True, **chats.render_options(record))[0]
    return sample_text(model, tokenizer, ids, Sampling(temperature=0), seed)


def make_sampler(cfg: Finetuning, run: Run, model: Transformer, data: Data
                 ) -> Callable[[], str] | None:
    """Return the function that train.fit() prints samples of, where the data has a question."""
    for record in data.records:
        if any(m["role"] == "user" for m in record["messages"]):
            return lambda: answer(model, run.tokenizer, record, cfg.seed)
    return None


# ------------------------------------------------------------------------------ the script


def load_conversations(cfg: Finetuning, run: Run) -> Data:
    """Return the conversations of cfg.dataset, rendered and packed."""
    left_out = chats.Notes(cfg.ignore_keys)
    records, held, bad = chats.splits(cfg.dataset, "sft", cfg.skip_bad, left_out)
    run.notes += left_out.lines()
    rendered = [chats.render_all(run.tokenizer, part, None, cfg.block_size + 1)
                for part in (records, held)]
    return pack(cfg, run, rendered, held or records, bad)


def pack(cfg: Finetuning, run: Run, rendered: list[chats.Rendered], records: list[dict], bad: int
         ) -> Data:
    """Return the rows that rendered records make, for training and for validation."""
    how = dict(block_size=cfg.block_size, seed=cfg.seed, pad=run.tokenizer.eot or 0,
               name=cfg.dataset)
    train_part, held_part = rendered
    batches = chats.Packed(train_part, run.rows, **how)
    held_out = chats.Packed(held_part, cfg.batch_size, **how) if held_part else None
    run.notes.append(f"{cfg.dataset}: {batches.summary()}; {len(held_part):,} to validate"
                     + (f"; {bad:,} bad records skipped" if bad else ""))
    return Data(batches, held_out, records)


def main(cfg: Config) -> train.State | None:
    cfg = train.inherit(cfg)
    with setup(cfg, *start_from(cfg)) as run:
        data = load_conversations(cfg, run)
        plan_steps(cfg, run, data)
        if cfg.show:
            return preview(cfg, run, data)
        model = load_model(cfg, run)
        loss = train.next_token_loss(cfg, masked=True)
        return train.fit(cfg, model, data.batches, loss, run.machine, tokenizer=run.tokenizer,
                         eval_batches=data.eval_batches(cfg), writers=run.writers,
                         on_sample=make_sampler(cfg, run, model, data))


if __name__ == "__main__":
    run(main, Config)
