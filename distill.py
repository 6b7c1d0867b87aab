"""A teacher into a smaller student: knowledge distillation (Hinton 2015, arXiv:1503.02531).

    python distill.py                                       # out/dpo, on any machine
    python distill.py --teacher=DIR --init_from=scratch --family=qwen3 --n_layer=4 --n_embd=128
    python distill.py --teacher=DIR --init_from=STUDENT --dataset=chats.jsonl
    python distill.py --teacher=DIR --dataset=stdlib        # text: every token is a target
    torchrun --nproc_per_node=8 distill.py --teacher=DIR --init_from=STUDENT    # eight GPUs
    python distill.py --init_from=resume --out_dir=out/distill

The student learns what comes next and what else the teacher would have said, at each token that
sft.py trains on (p the teacher, q the student, both softened by the temperature T):

    loss = alpha CE + (1 - alpha) T^2 D(p, q) + hidden (1 - cos(P h, h'))

D is forward KL(p || q), reverse KL(q || p) or the generalised Jensen-Shannon of GKD (Agarwal 2023,
arXiv:2306.13649): kernels.linear_kl. h and h' are hidden states of student and teacher and P a
trained projection, on every token. Further, by flag:

    --generate=N        the student trains on what the teacher answers (Kim 2016, arXiv:1606.07947)
    --layers_from_teacher=1     begin as every k-th layer of the teacher (Sanh 2019)

val_loss is the student's plain CE on the targets, so that runs with and without a teacher
(--alpha=1, which is sft.py's loss) compare. config/distill_skills.py gives cost and results.
"""
from __future__ import annotations

import config  # noqa: F401  first, so that what fails while importing is a sentence
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import checkpoint
import kernels
import sft
import train
from config import Idle, UserError, run
from data import chats, loader
from formats import run_folder, safetensors
from inference.generate import Sampling, generate
from inference.quantize import pack
from model import ModelConfig, Transformer
from text.chat import inherit_template
from tokenizer import load
from training import router
from training.batch import Batch, Loss, count_targets, find_targets, mask_valid_tokens
from training.cooperate import alone, get_ranks, progress, together, write_lines
from training.hidden_states import Matching, spread, watch
from training.machine import Machine
from training.settings import SHAPE, Finetuning, Shape, is_resumed
from training.start import from_settings

TEACHERS = ("out/dpo", "out/sft")     # the last of the demo's stages that was run
PROJECTIONS = "projections.safetensors"             # beside a checkpoint's weights, for resuming
ANSWERS = 32                                        # conversations that a teacher answers at once


@dataclass
class Config(Shape, Finetuning):
    # --- the teacher
    teacher: str = ""                   # a folder: any checkpoint; empty: out/dpo, or sft's
    alpha: float = 0.5                  # share of the cross entropy; 1: no teacher
    temperature: float = 1.5            # softens both distributions
    divergence: str = "forward"         # forward, reverse or js
    beta: float = 0.5                   # of js: near 0 it is forward KL's shape, near 1 reverse's
    hidden: float = 0.0                 # weight of matching hidden states
    hidden_layers: int = 0              # blocks, evenly spread, matched besides the final states
    layers_from_teacher: bool = False   # a student of the teacher's width, made of its layers
    # --- its own answers
    generate: int = 0                   # train on its answers to this many prompts
    cache_dir: str = ""                 # where answers are kept; empty: teacher_cache beside
                                        # out_dir, as a new run moves an old out_dir away
    generate_temperature: float = 0.0   # 0: its likeliest answers
    generate_tokens: int = 256          # an answer that has not ended by then is left out
    # --- the student, where it is made from scratch
    init_from: str = "scratch"          # scratch, a folder, OpenAI's gpt2, …, or resume
    family: str = "qwen3"
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    tie_word_embeddings: bool | None = None     # None: tied, as a small model's vocabulary is large
    document_mask: bool = False         # text: keep attention inside a document
    # a student from scratch has more to learn than a model that is fine-tuned
    optimizer: str = "muon"             # adamw, or muon on the hidden matrices
    learning_rate: float = 3e-3
    epochs: float = 4.0
    out_dir: str = "out/distill"
    origin: str = ""                    # kept by a run: digest and folder of its teacher
    SCRIPT = "distill.py"
    ELSEWHERE = {name: Finetuning.ELSEWHERE[name] for name in ("task", "sample_prompt")}
    IDLE = (                            # which of these have no effect, and when
        Idle(SHAPE.replace("n_layer ", ""), "", lambda c, m:
             c.layers_from_teacher and c.init_from == "scratch",
             "with --layers_from_teacher, whose student has its shape"),
        Idle("document_mask", "dataset", lambda c, m: not is_text(c.dataset),
             "on conversations, which never see each other"),
        Idle("temperature divergence beta", "alpha", lambda c, m: c.alpha == 1,
             "with --alpha=1"),
        Idle("beta", "divergence", lambda c, m: c.divergence != "js", "without --divergence=js"),
        Idle("generate_temperature generate_tokens", "generate", lambda c, m: not c.generate,
             "without --generate"),
        Idle("cache_dir", "generate", lambda c, m: not c.generate, "without --generate"),
        Idle("template skip_bad sample_interval", "dataset", lambda c, m: is_text(c.dataset),
             "on a dataset of text"),
        Idle("origin", "", lambda c, m: True, "as a run keeps it itself; see --teacher"))


def is_text(dataset: str) -> bool:
    """Return whether a dataset is tokens, not conversations."""
    folder = loader.find(dataset)
    return any(folder.glob("train_*.npy")) and not any(folder.glob("train.json*"))


def check(cfg: Config) -> None:
    """Raise UserError for a setting that no run can have."""
    text = is_text(cfg.dataset)
    if cfg.divergence not in kernels.DIVERGENCES:
        raise UserError(f"unknown divergence {cfg.divergence!r}; choose from "
                        f"{', '.join(kernels.DIVERGENCES)}")
    for name, low, high in (("alpha", 0, 1), ("temperature", 1e-3, 1e3), ("beta", 1e-3, 0.999),
                            ("hidden", 0, 1e9), ("hidden_layers", 0, 1e9), ("generate", 0, 1e12),
                            ("generate_temperature", 0, 1e3), ("generate_tokens", 1, 1e9)):
        # `not (…)` and not the reverse: nan compares false with everything
        if not low <= getattr(cfg, name) <= high:
            raise UserError(f"{name} is {getattr(cfg, name)}: it must be {low} to {high}")
    for wrong, why in (
            (cfg.z_loss or cfg.label_smoothing, "--z_loss and --label_smoothing have no part here, "
             "the teacher does the smoothing: leave them out"),
            (cfg.hidden_layers and not cfg.hidden, "--hidden_layers needs a weight: give --hidden"),
            (text and cfg.generate, f"{cfg.dataset} is text: --generate is for conversations"),
            (cfg.lora_rank and cfg.init_from == "scratch", "adapters need a student that is there: "
             "name one with --init_from=DIR, or leave out --lora_rank"),
            (cfg.layers_from_teacher and cfg.init_from not in ("scratch", "resume"),
             "--layers_from_teacher makes a student: leave out --init_from")):
        if wrong:
            raise UserError(why)


# ------------------------------------------------------------------------ teacher and student


def start_student(cfg: Config) -> tuple[ModelConfig, Any]:
    """Return (shape, tokenizer) of the student; what it does not have itself is the teacher's."""
    # its name is one of the settings from here on
    cfg.teacher = cfg.teacher or next(
        (folder for folder in TEACHERS if Path(folder, "checkpoints.json").is_file()), "")
    if not cfg.teacher:
        raise UserError(f"there is no teacher at {' or '.join(TEACHERS)}: make one with `python "
                        "sft.py config/sft_skills.py`, or name another with --teacher=DIR")
    find_teacher(cfg)
    shape = checkpoint.read_config(cfg.teacher)
    known = checkpoint.load_tokenizer(cfg.teacher)
    if cfg.block_size > shape.block_size:
        raise UserError(f"block_size {cfg.block_size} is more than the {shape.block_size} tokens "
                        f"that the teacher {cfg.teacher} was made for: use at most that")
    if cfg.init_from != "scratch":                  # a checkpoint, or resume
        cfg.template = cfg.template or known.template or ""
        student, tokenizer = sft.start_from(cfg)
        if known.jinja and not cfg.template:    # the template that the teacher brought
            inherit_template(tokenizer, known)
        cfg.block_size = cfg.block_size or min(shape.block_size, student.block_size, sft.CONTEXT)
        return student, tokenizer
    cfg.block_size = cfg.block_size if cfg.block_size > 0 else min(shape.block_size, sft.CONTEXT)
    if cfg.layers_from_teacher:
        given = "n_layer" in getattr(cfg, "given", ())      # else half of them, as DistilBERT has
        return replace(shape, n_layer=cfg.n_layer if given else max(1, shape.n_layer // 2),
                       block_size=cfg.block_size, dropout=cfg.dropout), known
    if not cfg.preset and cfg.tie_word_embeddings is None:
        cfg.tie_word_embeddings = True
    return from_settings(cfg, known.vocab_size), known


def find_teacher(cfg: Config) -> None:
    """Have cfg.teacher be the teacher's directory and cfg.origin its fingerprint; a resumed run
    has its own teacher again, wherever that was moved, or stops."""
    if is_resumed(cfg) and cfg.origin and "teacher" not in getattr(cfg, "given", ()):
        known, _, recorded = cfg.origin.partition(" ")
        folder = run_folder.find_model(recorded, known)
        if folder is None:
            raise UserError(f"the teacher of {cfg.out_dir} at {recorded} is gone or has changed: "
                            "put it back, or name another with --teacher=DIR")
    else:
        folder = checkpoint.resolve(cfg.teacher)
        known = run_folder.fingerprint(folder)
    cfg.teacher = str(folder)
    cfg.origin = f"{known} {os.path.abspath(folder)}"


def check_vocabularies(cfg: Config, tokenizer: Any, known: Any, largest: int) -> None:
    """Raise UserError unless an id means the same to student and teacher, up to the smaller
    vocabulary, and the teacher knows all ids of the data, of which `largest` is one."""
    cut = min(tokenizer.vocab_size, known.vocab_size)
    mine, other = ({i: t for i, t in tok.tokens.items() if i < cut} for tok in (tokenizer, known))
    # control tokens count as their names; what one of both has behind the cut is its own affair
    if mine != other or tokenizer.pattern != known.pattern:
        raise UserError(f"student and data have not the tokenizer of the teacher {cfg.teacher}: "
                        "take ones that have, or a student made from scratch")
    if largest >= known.vocab_size:
        raise UserError(f"the data has the token {tokenizer.decode([largest])!r}, which the "
                        f"teacher {cfg.teacher} does not know: teach it the template first, with "
                        "sft.py, or give another --template")


def load_teacher(cfg: Config, machine: Machine) -> Transformer:
    """Return the teacher, frozen, in the type that the machine computes in."""
    model = checkpoint.load_model(checkpoint.resolve(cfg.teacher), machine.device,
                                  str(machine.dtype).removeprefix("torch."))
    return model.requires_grad_(False).eval()


@torch.no_grad()
def take_layers(cfg: Config, model: Transformer, machine: Machine) -> str:
    """Copy every k-th layer of the teacher, and all that is no layer, into a new student; return a
    line that says which."""
    # as it is on disk: the teacher at hand may be rounded to bfloat16
    other = checkpoint.load_model(checkpoint.resolve(cfg.teacher), machine.device, "float32")
    n = other.config.n_layer
    if model.config.n_layer > n:
        raise UserError(f"a student of {model.config.n_layer} layers cannot be made of the "
                        f"teacher's {n}: lower --n_layer")
    chosen = spread(model.config.n_layer, n)
    source = dict(other.named_parameters())
    for name, p in model.named_parameters():
        if name.startswith("model.layers."):
            words = name.split(".")                 # model, layers, 3, self_attn, …
            name = ".".join([*words[:2], str(chosen[int(words[2])]), *words[3:]])
        # of a tied teacher an untied student gets the embedding twice
        theirs = other.output_weight if name == "lm_head.weight" else source.get(name)
        if theirs is None or theirs.shape[1:] != p.shape[1:] or (
                ".layers." in name and theirs.shape != p.shape):
            raise UserError(f"the teacher {cfg.teacher} has no {name} of the shape "
                            f"{tuple(p.shape)}: --layers_from_teacher needs its family and width")
        rows = min(len(p), len(theirs))             # a vocabulary may be longer on either side
        p[:rows] = theirs[:rows]
    return f"the student begins as the teacher's layers {', '.join(map(str, chosen))} of {n}"


# ------------------------------------------------------------------------------- the data


class Text(loader.Batches):
    """Windows of text with what a stage asks of its data besides batches."""

    def __len__(self) -> int:
        return self.windows

    def gather(self, starts: Any) -> Batch:
        batch = loader.gather(self.tokens, np.asarray(starts), self.block_size, self.eot)
        return {"doc": torch.zeros_like(batch["ids"]), **batch}

    def fixed(self, batch_size: int, rows: int) -> loader.FixedBatches:
        return loader.eval_batches(self.tokens, batch_size, self.block_size, rows, self.eot,
                                   self.eot is not None)


def load_data(cfg: Config, run: sft.Run) -> sft.Data:
    """Return the conversations or the text of cfg.dataset; with --generate, the teacher's answers.
    """
    known = checkpoint.load_tokenizer(cfg.teacher)
    taught = checkpoint.read_config(cfg.teacher)
    cfg.cache_dir = cfg.cache_dir or str(Path(cfg.out_dir).parent / "teacher_cache")
    # here, before any folder is touched
    if cfg.hidden_layers > (most := min(run.shape.n_layer, taught.n_layer) - 1):
        raise UserError(f"hidden_layers is {cfg.hidden_layers}: student or teacher has only {most} "
                        "blocks before its last one")
    if is_text(cfg.dataset):
        return load_text(cfg, run, known)
    if cfg.generate and not cfg.eval_only:
        check_vocabularies(cfg, run.tokenizer, known, 0)
        cfg = replace(cfg, dataset=str(make_answers(cfg, run)))
    data = sft.load_conversations(cfg, run)
    largest = max(int(ids.max()) for ids, _ in data.batches.conversations)
    check_vocabularies(cfg, run.tokenizer, known, largest)
    return data


def load_text(cfg: Config, run: sft.Run, known: Any) -> sft.Data:
    """Return the text of cfg.dataset in windows; known: the teacher's tokenizer."""
    folder = loader.find(cfg.dataset)
    dataset = loader.Dataset(folder)
    tokenizer = load(folder)
    dataset.check_tokenizer(tokenizer)
    check_vocabularies(cfg, run.tokenizer, tokenizer, 0)            # all three are the same
    check_vocabularies(cfg, run.tokenizer, known, dataset.vocab_size - 1)
    batches, held_out = (Text(dataset.tokens(split), run.rows, cfg.block_size, cfg.seed,
                              dataset.eot, cfg.document_mask) for split in ("train", "val"))
    run.notes.append(f"{cfg.dataset}: {len(batches):,} windows of {cfg.block_size} tokens, all of "
                     "them trained on")
    return sft.Data(batches, held_out)


# ------------------------------------------------------------------ the teacher's answers


def make_answers(cfg: Config, run: sft.Run) -> Path:
    """Return a folder of conversations with the teacher's answers in place of the assistant's:
    sequence-level distillation. The validation file stays unchanged.

    Made in parts of ANSWERS conversations, each a file: a run that was killed goes on where it was.
    """
    tokenizer = run.tokenizer
    left_out = chats.Notes(cfg.ignore_keys)
    records, held, _ = chats.splits(cfg.dataset, "sft", cfg.skip_bad, left_out)
    run.notes += left_out.lines()
    # at temperature 0 a second answer to a prompt would be the first one
    count = cfg.generate if cfg.generate_temperature else min(cfg.generate, len(records))
    name = checkpoint.digest(
        cfg.origin.split()[0], records, held, count,
        cfg.generate_temperature, cfg.generate_tokens, cfg.block_size, cfg.seed,
        tokenizer.template or tokenizer.jinja)
    rank, world = get_ranks()
    folder = Path(cfg.cache_dir, name)
    parts = folder.with_name(f".{name}.parts")
    with alone(parts, folder / "train.jsonl", folder=True):
        if not folder.is_dir():
            files = {s: parts / f"{s}.jsonl" for s in range(0, count, ANSWERS)}
            missing = [s for s in files if not files[s].is_file()]
            together()                              # all have looked before any of them writes
            if share := missing[rank::world]:
                where = checkpoint.resolve(cfg.teacher)
                teacher = checkpoint.load_model(where, cfg.device, cfg.dtype)
                pack(teacher)                    # one matmul for what reads the same
                for s in progress(share, "the teacher answers, parts"):
                    part = [records[i % len(records)] for i in range(s, min(count, s + ANSWERS))]
                    write_lines(files[s], converse(cfg, teacher, tokenizer, part, s))
            together()
            if rank == 0:
                write_lines(parts / "train.jsonl",
                            [r for file in files.values() for r in chats.read_chats(file)])
                write_lines(parts / "val.jsonl", held)
                os.rename(parts, folder)                # complete, from this moment on
                for file in files.values():
                    (folder / file.name).unlink()
            together()
    ended = sum(1 for _ in open(folder / "train.jsonl", "rb"))
    run.notes.append(f"{ended:,} of {count:,} conversations answered to the end, in {folder}")
    if not ended:
        raise UserError(f"the teacher {cfg.teacher} ended none of its {count} answers: raise "
                        f"--generate_tokens={cfg.generate_tokens}, or train it further")
    return folder


def converse(cfg: Config, teacher: Any, tokenizer: Any, records: list[dict], number: int
             ) -> list[dict]:
    """Return the records with every assistant's turn said by the teacher, who sees its own earlier
    ones; one that does not end, says nothing or has no room is left out. number: of the first."""
    stops = set(tokenizer.stop_ids)
    how = Sampling(temperature=cfg.generate_temperature)
    said: dict[int, list[dict]] = {k: [] for k in range(len(records))}      # those that go on
    for turn in range(max(len(r["messages"]) for r in records)):
        asked = {}                                  # record -> ids after which it is to answer
        for k in list(said):
            message = records[k]["messages"][turn:turn + 1]
            if not message or message[0]["role"] != "assistant":
                said[k] += message                  # of the user or the system: as it was
                continue
            if message[0].get("train") is False or "tool_calls" in message[0]:
                said[k] += chats.as_context(message)    # a call, which the tool's turn answers
                continue
            asked[k] = tokenizer.render(said[k], None, True, **chats.render_options(records[k]))[0]
            if len(asked[k]) >= cfg.block_size:     # not a token of an answer would fit
                del asked[k], said[k]
        made: dict[int, list[int]] = {k: [] for k in asked}
        longest = max(map(len, asked.values()), default=0)
        room = min(cfg.generate_tokens, cfg.block_size + 1 - longest)
        # every answer draws for itself: a seed for each turn of each conversation
        steps = generate(teacher, list(asked.values()), room, how,
                                cfg.seed + number + turn * 1_000_003, tokenizer.vocab_size,
                                lambda _, token: token in stops) if asked else ()
        for step in steps:
            for ids, token in zip(made.values(), step):
                ids += [] if token is None else [token]     # None: this one has ended
        for k, ids in made.items():
            text = tokenizer.decode(ids[:-1]) if ids[-1] in stops else ""
            said[k] = said[k] + [{"role": "assistant", "content": text}]
            if not text.strip():
                del said[k]
    return [{**records[k], "messages": messages} for k, messages in said.items()]


# ------------------------------------------------------------------------------- the loss


def match_hidden(cfg: Config, run: sft.Run, model: Transformer, teacher: Transformer) -> Matching:
    """Return the projections, a part of the model that the optimizer and DDP see, which are saved
    beside its weights in a file of their own, from which a run is resumed."""
    model.matching = Matching(cfg.hidden_layers + 1, model.config.n_embd, teacher.config.n_embd,
                              cfg.seed).to(run.machine.device)
    named = dict(model.matching.named_parameters())
    if not named:                           # of one width: there is nothing to project
        return model.matching
    shapes = {name: tuple(p.shape) for name, p in named.items()}
    if is_resumed(cfg):
        file = checkpoint.resolve(cfg.out_dir, "last") / PROJECTIONS
        stored = safetensors.read_header(file)
        if {name: tensor.shape for name, tensor in stored.items()} != shapes:
            raise UserError(f"{file} belongs to a run with another --hidden_layers or teacher: "
                            "resume with the settings that it was made by")
        for name, p in named.items():       # their moments come back with the optimizer
            p.data.copy_(safetensors.read(stored[name]))
    specs = [(name, torch.float32, shape) for name, shape in shapes.items()]
    run.writers.append(lambda folder: safetensors.write_safetensors(
        folder / PROJECTIONS, specs, named.__getitem__))
    return model.matching


def distillation_loss(cfg: Config, model: Transformer, teacher: Transformer,
                      matching: Matching | None, share: float) -> Loss:
    """Return the loss of a student: distillation where it learns, its plain CE where it is scored.

    matching: projections of hidden states, where these are matched. share: of all tokens, those
    that are targets.
    """
    text = is_text(cfg.dataset)
    plain = train.next_token_loss(cfg, masked=not text)
    cut = min(teacher.config.vocab_size, model.config.vocab_size)
    options = dict(temperature=cfg.temperature, divergence=cfg.divergence, beta=cfg.beta,
                   alpha=cfg.alpha, cut=cut, softcap=model.config.final_logit_softcapping,
                   teacher_softcap=teacher.config.final_logit_softcapping)
    # between the embedding and the final states, which are matched anyway
    blocks = range(cfg.hidden_layers + 1) if matching is not None else ()
    student_states, teacher_states = (
        watch(m, spread(len(blocks), m.config.n_layer)[:-1] if blocks else [])
        for m in (model, teacher))

    def loss(student: Any, batch: Batch) -> tuple[Tensor, Tensor, dict]:
        student_states.clear()
        teacher_states.clear()              # of a forward that had another end
        if not torch.is_grad_enabled():
            return plain(student, batch)
        targets = batch["targets"].flatten()
        places = find_targets(targets)
        labels = targets[places]
        mask = None if labels[0] >= 0 else torch.zeros_like(labels, dtype=torch.bool)
        with torch.no_grad():               # (B, T, Ct)
            final = teacher(batch["ids"], doc=batch.get("doc"), head=lambda h, w: h)
        taught = final.flatten(0, 1)[places]
        reports: dict[str, Tensor] = {}

        def head(h: Tensor, w: Tensor) -> Tensor:
            """Return (B, T, C), (V, C) -> the sum of all losses ()."""
            rows = h.flatten(0, 1).index_select(0, places)
            total, ce, kl = kernels.linear_kl(rows, w, taught, teacher.output_weight, live=mask,
                                              targets=labels.clamp(min=0), **options)
            reports.update(ce=ce, kl=kl)
            if matching is not None:
                states = [*zip(student_states, teacher_states), (h, final)]
                # a sum over all tokens, scaled by a constant to the number of targets: a mean over
                # the batch would make the loss depend on how batches are cut
                distance = matching(states, mask_valid_tokens(batch).float()) * share
                reports["hidden"] = distance.detach()
                total = total + cfg.hidden * distance
            return total

        if cfg.compile or cfg.compile is None and model.output_weight.is_cuda:
            # a graph would unroll the walk over chunks of logits. Not a decorator: naming the
            # compiler imports it, at every start
            head = torch.compiler.disable(head)
        total, extra, metrics = router.run_model(cfg, student, batch, head, count_targets)
        return total + extra, count_targets(batch), {**metrics, **reports}

    def count_flops(student: Transformer, T: int, tokens: int, targets: int) -> float:
        """Return the FLOPs of the student, the teacher's forward, and the projections."""
        total = train.count_flops(student, T, tokens, targets)
        total += tokens * teacher.flops_per_token(T, False, targets / max(1, tokens))
        projections = () if matching is None else matching.parameters()
        return total + 6 * tokens * sum(P.numel() for P in projections)
    loss.count_flops = count_flops
    return loss


def compare_sizes(cfg: Config, model: Transformer, teacher: Transformer) -> str:
    """Return lines that say how large teacher and student are."""
    size = sum(p.nbytes for p in teacher.parameters()) / 1e6
    part = model.parameter_count() / teacher.parameter_count()
    return (f"teacher {cfg.teacher}: {teacher.parameter_count():,} parameters, frozen, {size:,.1f} "
            f"MB of memory\nthe student has {part:.1%} of its parameters" + (
                ": more than it, which distillation is not for" if part > 1 else ""))


def make_loss(cfg: Config, run: sft.Run, model: Transformer, data: sft.Data) -> Loss:
    """Return the loss of the student, with the teacher's part where that is asked for."""
    text = isinstance(data.batches, Text)
    lines = []
    if cfg.layers_from_teacher and cfg.init_from == "scratch":
        lines.append(take_layers(cfg, model, run.machine))
    if cfg.eval_only or cfg.alpha == 1 and not cfg.hidden:
        loss = train.next_token_loss(cfg, masked=not text)      # which needs no teacher
    else:
        teacher = load_teacher(cfg, run.machine)
        lines.append(compare_sizes(cfg, model, teacher))
        matching = match_hidden(cfg, run, model, teacher) if cfg.hidden else None
        share = 1.0 if text else data.batches.trained / data.batches.tokens
        loss = distillation_loss(cfg, model, teacher, matching, share)
    if run.machine.main and lines:
        print(*lines, sep="\n", file=sys.stderr)
    return loss


def main(cfg: Config) -> train.State | None:
    cfg = train.inherit(cfg)
    check(cfg)
    with sft.setup(cfg, *start_student(cfg), chat=not is_text(cfg.dataset)) as run:
        data = load_data(cfg, run)
        sft.plan_steps(cfg, run, data)
        if cfg.show:
            return sft.preview(cfg, run, data)
        model = sft.load_model(cfg, run)
        loss = make_loss(cfg, run, model, data)
        return train.fit(cfg, model, data.batches, loss, run.machine, tokenizer=run.tokenizer,
                         eval_batches=data.eval_batches(cfg), writers=run.writers,
                         on_sample=sft.make_sampler(cfg, run, model, data))


if __name__ == "__main__":
    run(main, Config)
