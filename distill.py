"""A teacher into a smaller student: knowledge distillation (Hinton 2015, arXiv:1503.02531).

    python distill.py                                       # out/dpo, on any machine
    python distill.py --teacher=DIR --init_from=scratch --family=qwen3 --n_layer=4 --n_embd=128
    python distill.py --teacher=DIR --init_from=STUDENT --dataset=chats.jsonl
    python distill.py --teacher=DIR --dataset=stdlib        # text: every token is learnt from
    torchrun --nproc_per_node=8 distill.py --teacher=DIR --init_from=STUDENT    # eight GPUs
    python distill.py --init_from=resume --out_dir=out/distill

The student learns what comes next and what else the teacher would have said, at each token that
sft.py trains on (p the teacher, q the student, both softened by the temperature T):

    loss = alpha CE + (1 - alpha) T^2 D(p, q) + hidden (1 - cos(P h, h'))

D is forward KL(p || q), reverse KL(q || p) or the generalised Jensen-Shannon of GKD (Agarwal 2023,
arXiv:2306.13649): kernels.linear_kl. h and h' are hidden states of student and teacher and P a
trained projection, on every token. Further, by flag:

    --generate=N        the student trains on what the teacher answers (Kim 2016, arXiv:1606.07947)
    --cache_top_k=K     the teacher's K likeliest tokens once, on disk; none in memory then
    --layers_from_teacher=1     begin as every so many-th layer of the teacher (Sanh 2019)

val_loss is the student's plain CE on the tokens that count, so that runs with and without a
teacher (--alpha=1, which is sft.py's loss) compare. What to expect: config/distill_skills.py.
"""
from __future__ import annotations

import config  # noqa: F401  first, so that what fails while importing is a sentence
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable, NamedTuple

import numpy as np
import torch
from torch import Tensor

import checkpoint
import kernels
import sft
import stage
from tokenizer import load
import train
from formats import safetensors
from config import Idle, UserError, run
from data import chats, loader
from formats import atomic, run_folder
from inference.generate import Sampling, generate
from training.machine import Machine
from model import ModelConfig, Transformer
from inference.quantize import pack
from training import effects
from training.start import from_settings
from training.hidden_states import Matching, spread, watch
from training.cooperate import alone, get_ranks, progress, together, write_lines

TEACHERS = ("out/dpo", "out/sft")     # the last of the demo's chain that is there
PROJECTIONS = "projections.safetensors"             # beside a checkpoint's weights, for resuming
ANSWERS = 32                                        # conversations that a teacher answers at once

@dataclass
class Config(stage.Config):
    # --- the teacher
    teacher: str = ""                   # a folder: any checkpoint; empty: out/dpo, or sft's
    alpha: float = 0.5                  # share of the cross entropy; 1: no teacher
    temperature: float = 1.5            # softens both distributions
    divergence: str = "forward"         # forward, reverse or js
    beta: float = 0.5                   # of js: near 0 it is forward KL's shape, near 1 reverse's
    hidden: float = 0.0                 # weight of matching hidden states
    hidden_layers: int = 0              # blocks, evenly spread, matched besides the final states
    layers_from_teacher: bool = False   # a student of the teacher's width, made of its layers
    # --- what it is asked only once
    cache_top_k: int = 0                # keep so many of its log-probs a token; 0: ask each time
    cache_dir: str = ""                 # where this and answers lie; empty: teacher_cache beside
                                        # out_dir, as a new run moves an old out_dir away
    generate: int = 0                   # train on its own answers to so many prompts
    generate_temperature: float = 0.0   # 0: its likeliest answers
    generate_tokens: int = 256          # an answer that has not ended by then is left out
    # --- the student, where it is made from scratch
    init_from: str = "scratch"          # scratch, a folder, OpenAI's gpt2, …, or resume
    family: str = "qwen3"
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    tie_word_embeddings: bool | None = None     # None: tied, as a small model's vocabulary is large
    # --- optimizer: a student from scratch has more to learn than a stage that goes on
    optimizer: str = "muon"
    learning_rate: float = 3e-3
    epochs: float = 4.0
    out_dir: str = "out/distill"
    origin: str = ""                    # kept by a run: digest and folder of its teacher
    SCRIPT = "distill.py"
    IDLE = (                            # which of these have no effect, and when
        Idle(effects.SHAPE.replace("n_layer ", "") + " preset", "", lambda c, m:
             c.layers_from_teacher and c.init_from == "scratch",
             "with --layers_from_teacher, whose student has its shape"),
        Idle("temperature divergence beta cache_top_k", "alpha", lambda c, m: c.alpha == 1,
             "with --alpha=1"),
        Idle("beta", "divergence", lambda c, m: c.divergence != "js", "without --divergence=js"),
        Idle("generate_temperature generate_tokens", "generate", lambda c, m: not c.generate,
             "without --generate"),
        Idle("cache_dir", "generate cache_top_k", lambda c, m: not (c.generate or c.cache_top_k),
             "without --generate or --cache_top_k"),
        Idle("template skip_bad sample_interval", "dataset", lambda c, m: is_text(c.dataset),
             "on a dataset of text"),
        Idle("origin", "", lambda c, m: True, "as a run keeps it itself; see --teacher"))

Config.task = "chat"                    # for sft.read(); no field: there is nothing to choose

def is_text(dataset: str) -> bool:
    """Whether a dataset is tokens, not conversations."""
    folder = loader.find(dataset)
    return any(folder.glob("train_*.npy")) and not any(folder.glob("train.json*"))

def check(cfg: Config) -> None:
    """UserError for a setting that no run can have."""
    text = is_text(cfg.dataset)
    stage.check(replace(cfg, document_mask=cfg.document_mask or text))
    if cfg.divergence not in kernels.DIVERGENCES:
        raise UserError(f"divergence={cfg.divergence!r} does not exist: "
                        f"{', '.join(kernels.DIVERGENCES)}")
    for name, low, high in (("alpha", 0, 1), ("temperature", 1e-3, 1e3), ("beta", 1e-3, 0.999),
                            ("hidden", 0, 1e9), ("hidden_layers", 0, 1e9), ("generate", 0, 1e12),
                            ("generate_temperature", 0, 1e3), ("generate_tokens", 1, 1e9),
                            ("cache_top_k", 0, 1e9)):
        # `not (…)` and not the reverse: nan compares false with everything
        if not low <= getattr(cfg, name) <= high:
            raise UserError(f"{name} is {getattr(cfg, name)}: it must be {low} to {high}")
    for wrong, why in (
            (cfg.z_loss or cfg.label_smoothing, "--z_loss and --label_smoothing have no part here, "
             "the teacher does the smoothing: leave them out"),
            (cfg.hidden_layers and not cfg.hidden, "--hidden_layers needs a weight: give --hidden"),
            (cfg.cache_top_k and cfg.hidden, "--cache_top_k keeps no hidden states: leave out "
             "--hidden or the cache"),
            (text and (cfg.cache_top_k or cfg.generate), f"{cfg.dataset} is text: --cache_top_k "
             "and --generate are for conversations"),
            (cfg.lora_rank and cfg.init_from == "scratch", "adapters need a student that is there: "
             "name one with --init_from=DIR, or leave out --lora_rank"),
            (cfg.layers_from_teacher and cfg.init_from not in ("scratch", "resume"),
             "--layers_from_teacher makes a student: leave out --init_from")):
        if wrong:
            raise UserError(why)

# ------------------------------------------------------------------------ teacher and student

def start(cfg: Config) -> tuple[ModelConfig, Any]:
    """(shape, tokenizer) of the student; what it does not have itself is the teacher's."""
    # its name is one of the settings from here on
    found = (t for t in TEACHERS if Path(t, "checkpoints.json").is_file())
    cfg.teacher = cfg.teacher or next(found, "")
    if not cfg.teacher:
        raise UserError(f"there is no teacher at {' or '.join(TEACHERS)}: make one with `python "
                        "sft.py config/sft_skills.py`, or name another with --teacher=DIR")
    find_teacher(cfg)
    shape, known = checkpoint.read_config(cfg.teacher), checkpoint.load_tokenizer(cfg.teacher)
    if cfg.block_size > shape.block_size:
        raise UserError(f"block_size {cfg.block_size} is more than the {shape.block_size} tokens "
                        f"that the teacher {cfg.teacher} was made for: use at most that")
    if cfg.init_from != "scratch":                  # a checkpoint, or resume
        cfg.template = cfg.template or known.template or ""
        mine, tokenizer = stage.start_from(cfg)
        if known.jinja and not cfg.template:    # the teacher's own words
            stage.templates.inherit_template(tokenizer, known)
        cfg.block_size = cfg.block_size or min(shape.block_size, mine.block_size, stage.CONTEXT)
        return mine, tokenizer
    cfg.block_size = cfg.block_size if cfg.block_size > 0 else min(shape.block_size, stage.CONTEXT)
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
    if cfg.init_from == "resume" and cfg.origin and "teacher" not in getattr(cfg, "given", ()):
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

def same_words(cfg: Config, tokenizer: Any, known: Any, largest: int) -> None:
    """UserError unless an id means the same to student and teacher, up to the smaller vocabulary,
    and the teacher knows all ids of the data, of which `largest` is one."""
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
    """The teacher, frozen, in the type that the machine computes in."""
    model = checkpoint.load_model(checkpoint.resolve(cfg.teacher), machine.device,
                                  str(machine.dtype).removeprefix("torch."))
    return model.requires_grad_(False).eval()

@torch.no_grad()
def take_layers(cfg: Config, model: Transformer, machine: Machine) -> str:
    """Every so many-th layer of the teacher, and what stands around them, into a new student."""
    # as it is on disk: the teacher at hand may be rounded to bfloat16
    other = checkpoint.load_model(checkpoint.resolve(cfg.teacher), machine.device, "float32")
    n = other.config.n_layer
    if model.config.n_layer > n:
        raise UserError(f"a student of {model.config.n_layer} layers cannot be made of the "
                        f"teacher's {n}: lower --n_layer")
    chosen, source = spread(model.config.n_layer, n), dict(other.named_parameters())
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

    def gather(self, starts: Any) -> train.Batch:
        batch = loader.gather(self.tokens, np.asarray(starts), self.block_size, self.eot)
        return {"doc": torch.zeros_like(batch["ids"]), **batch}

    def fixed(self, batch_size: int, rows: int) -> loader.FixedBatches:
        return loader.eval_batches(self.tokens, batch_size, self.block_size, rows, self.eot,
                                   self.eot is not None)

def read(cfg: Config, shape: ModelConfig, tokenizer: Any, rows: int, notes: list[str]
         ) -> stage.Data:
    """The conversations or the text of cfg.dataset; with --generate, the teacher's answers."""
    known, taught = checkpoint.load_tokenizer(cfg.teacher), checkpoint.read_config(cfg.teacher)
    cfg.cache_dir = cfg.cache_dir or str(Path(cfg.out_dir).parent / "teacher_cache")
    # here, before any folder is touched
    if cfg.hidden_layers > (most := min(shape.n_layer, taught.n_layer) - 1):
        raise UserError(f"hidden_layers is {cfg.hidden_layers}: student or teacher has only {most} "
                        "blocks before its last one")
    if is_text(cfg.dataset):
        folder = loader.find(cfg.dataset)
        dataset = loader.Dataset(folder)
        own = load(folder)
        dataset.check_tokenizer(own)
        same_words(cfg, tokenizer, own, 0)              # all three are the same
        same_words(cfg, tokenizer, known, dataset.vocab_size - 1)
        batches, held = (Text(dataset.tokens(split), rows, cfg.block_size, cfg.seed, dataset.eot,
                              cfg.document_mask) for split in ("train", "val"))
        notes.append(f"{cfg.dataset}: {len(batches):,} windows of {cfg.block_size} tokens, all of "
                     "them trained on")
        return stage.Data(batches, held)
    if cfg.generate and not cfg.eval_only:
        same_words(cfg, tokenizer, known, 0)
        cfg = replace(cfg, dataset=str(answers(cfg, tokenizer, notes)))
    data = sft.read(cfg, shape, tokenizer, rows, notes)
    largest = max(int(ids.max()) for ids, _ in data.batches.conversations)
    same_words(cfg, tokenizer, known, largest)
    return data._replace(batches=Numbered(data.batches)) if cfg.cache_top_k else data

class Numbered(chats.Packed):
    """Packed conversations with a number for each trained token, the same in any row and epoch:
    batches have "place" (B, T) int64, -1 where nothing is trained on."""

    def __init__(self, packed: chats.Packed):
        vars(self).update(vars(packed))
        counts = [int(mask[1:].sum()) for _, mask in self.conversations]
        self.first = np.concatenate(([0], np.cumsum(counts)))       # of each conversation

    def gather(self, rows: Any) -> train.Batch:
        place = np.full((len(rows), self.block_size + 1), -1, dtype=np.int64)
        for b, row in enumerate(rows):
            at = 0
            for i in self.rows[row]:
                tokens, mask = self.conversations[i]
                live = at + 1 + np.flatnonzero(mask[1:])        # where targets are in the row
                place[b, live] = self.first[i] + np.arange(len(live))
                at += len(tokens)
        # as a target, a token stands one place before it does as an input
        return {**super().gather(rows), "place": torch.from_numpy(place[:, 1:].copy())}

# --------------------------------------------------------------- what the teacher says, once

def answers(cfg: Config, tokenizer: Any, notes: list[str]) -> Path:
    """A folder of conversations in which the teacher says what the assistant said: sequence-level
    distillation. The validation file stays what it was.

    Made in parts of ANSWERS conversations, each a file: what was killed goes on where it was.
    """
    left_out = chats.Notes(cfg.ignore_keys)
    records, held, _ = chats.splits(cfg.dataset, "sft", cfg.skip_bad, left_out)
    notes += left_out.lines()
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
            if mine := missing[rank::world]:
                where = checkpoint.resolve(cfg.teacher)
                teacher = checkpoint.load_model(where, cfg.device, cfg.dtype)
                pack(teacher)                    # one matmul for what reads the same
                for s in progress(mine, "the teacher answers, parts"):
                    some = [records[i % len(records)] for i in range(s, min(count, s + ANSWERS))]
                    write_lines(files[s], converse(cfg, teacher, tokenizer, some, s))
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
    notes.append(f"{ended:,} of {count:,} conversations answered to the end, in {folder}")
    if not ended:
        raise UserError(f"the teacher {cfg.teacher} ended none of its {count} answers: raise "
                        f"--generate_tokens={cfg.generate_tokens}, or train it further")
    return folder

def converse(cfg: Config, teacher: Any, tokenizer: Any, records: list[dict], number: int
             ) -> list[dict]:
    """The records with every assistant's turn said by the teacher, who sees its own earlier ones;
    one that does not end, says nothing or has no room is left out. number: of the first."""
    stops, how = set(tokenizer.stop_ids), Sampling(temperature=cfg.generate_temperature)
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

class TopK:
    """A memory-mapped file of what is kept of the teacher: for each trained token the ids of its k
    likeliest tokens, their log-probs at T, and that of all others together."""

    def __init__(self, cfg: Config, data: Numbered, cut: int, machine: Machine):
        k, N = min(cfg.cache_top_k, cut), int(data.first[-1])
        # of one token; 16 bits hold most vocabularies' ids
        kind = np.dtype([("ids", np.uint16 if cut <= 2 ** 16 else np.uint32, (k,)),
                         ("log_probs", np.float32, (k + 1,))])
        name = checkpoint.digest(
            cfg.origin.split()[0], kind, cut, cfg.temperature,
            machine.dtype, *(array for pair in data.conversations for array in pair))
        self.file, self.cut = Path(cfg.cache_dir, f"{name}.npy"), cut
        self.new = self.file.with_name(f".{self.file.name}.new")    # until it is complete
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with alone(self.new, self.file):
            made = self.file.is_file()
            together()                              # all have looked before any of them writes
            if not made:
                self.make(cfg, data, k, kind, machine)
        try:
            self.array = np.load(self.file, mmap_mode="r", allow_pickle=False)
            if (self.array.shape, self.array.dtype) != ((N,), kind):
                raise ValueError("another shape")
        except (OSError, ValueError, EOFError) as e:
            raise UserError(f"the teacher's cache {self.file} is damaged ({e}): delete it, and it "
                            "is made again") from e

    @torch.no_grad()
    def make(self, cfg: Config, data: Numbered, k: int, kind: np.dtype, machine: Machine) -> None:
        """Ask the teacher, every rank its share, and write: whole under its name or not there."""
        new, N = self.new, int(data.first[-1])
        if machine.main:
            print(f"the {k:,} likeliest of {self.cut:,} tokens by the teacher, for {N:,} trained "
                  f"tokens: {kind.itemsize * N / 1e6:,.1f} MB in {self.file}", file=sys.stderr)
            with open(new, "r+b") as f:             # the file that is locked, not another one
                f.truncate()
                header = {"descr": np.lib.format.dtype_to_descr(kind), "fortran_order": False,
                          "shape": (N,)}
                np.lib.format.write_array_header_1_0(f, header)
                size = f.tell() + N * kind.itemsize
            atomic.reserve(new, size)               # a full disk is said here, and not by SIGBUS
        together()
        array, teacher = np.load(new, mmap_mode="r+"), load_teacher(cfg, machine)
        starts = range(0, len(data), cfg.batch_size)[machine.rank::machine.world]
        for s in progress(starts, "the teacher reads, batches"):
            batch = data.gather(range(s, min(len(data), s + cfg.batch_size)))
            batch = {name: t.to(machine.device) for name, t in batch.items()}
            place = batch["place"].flatten()
            live = (place >= 0).nonzero()[:, 0]     # each trained token of the data comes once
            h = teacher(batch["ids"], doc=batch["doc"], head=lambda h, w: h.flatten(0, 1)[live])
            # logits of a few rows at a time
            for rows, where in zip(h.split(256), place[live].cpu().split(256)):
                z = teacher.to_logits(rows, teacher.output_weight[:self.cut]).float()
                log_p = torch.log_softmax(z / cfg.temperature, -1)
                top, ids = log_p.topk(k)
                # not log(1 - sum of the top): of a sure teacher that is 1 - 1
                rest = torch.logsumexp(log_p.scatter(-1, ids, -torch.inf), -1, keepdim=True)
                array["ids"][where] = ids.cpu().numpy()
                array["log_probs"][where] = torch.cat((top, rest), -1).cpu().numpy()
        array.flush()
        together()
        if machine.main:
            os.replace(new, self.file)
        together()

    def rows(self, place: Tensor) -> tuple[Tensor, Tensor]:
        """(log-probs (n, k + 1), ids (n, k) int64) of the trained tokens `place` (n,)."""
        rows = self.array[place.cpu().numpy()]
        if len(rows) and rows["ids"].max() >= self.cut:
            raise UserError(f"the teacher's cache {self.file} has ids outside the vocabulary: "
                            "delete it, and it is made again")
        return tuple(torch.from_numpy(rows[name].astype(kind)).to(place.device)
                     for name, kind in (("log_probs", np.float32), ("ids", np.int64)))

# ------------------------------------------------------------------------------- the loss

class Loss:
    """train.Loss of a student: distillation where it learns, its plain CE where it is scored."""

    def __init__(self, cfg: Config, model: Transformer, teacher: Transformer | None,
                 kept: TopK | None, cut: int, share: float, plain: train.Loss):
        self.cfg, self.teacher, self.kept, self.plain, self.share = cfg, teacher, kept, plain, share
        caps = [m.config.final_logit_softcapping if m else 0.0 for m in (model, teacher)]
        self.options = dict(temperature=cfg.temperature, divergence=cfg.divergence, beta=cfg.beta,
                            alpha=cfg.alpha, cut=cut, softcap=caps[0], teacher_softcap=caps[1])
        self.matching = model.matching if cfg.hidden else None
        if cfg.compile or cfg.compile is None and model.output_weight.is_cuda:
            # a graph would unroll the walk over chunks of logits. Not a decorator: naming the
            # compiler imports it, at every start
            self.head = torch.compiler.disable(self.head)
        if cfg.hidden:      # between the embedding and the final states, which are matched anyway
            self.mine, self.theirs = (
                watch(m, spread(cfg.hidden_layers + 1, m.config.n_layer)[:-1])
                for m in (model, teacher))

    def __call__(self, student: Any, batch: train.Batch) -> tuple[Tensor, Tensor, dict]:
        if self.matching is not None:
            self.mine.clear(), self.theirs.clear()          # of a forward that had another end
        if not torch.is_grad_enabled():
            return self.plain(student, batch)
        targets, doc = batch["targets"], batch.get("doc")
        self.live, self.some = (targets.flatten() >= 0).nonzero()[:, 0], None
        if not len(self.live):          # no kernel likes an empty tensor: one row, not counted
            self.live, self.some = self.live.new_zeros(1), self.live.new_zeros(1, dtype=torch.bool)
        self.right = targets.flatten()[self.live].clamp(min=0)
        # what the student is to match at those rows: see kernels.linear_kl
        if self.kept:
            self.known, self.taught = self.kept.rows(batch["place"].flatten()[self.live])
        else:
            with torch.no_grad():
                self.states = self.teacher(batch["ids"], doc=doc, head=lambda h, w: h)
            self.known = self.states.flatten(0, 1)[self.live]
            self.taught = self.teacher.output_weight
        if self.matching is not None:
            self.counts = loader.valid_tokens(batch).float()    # (B, T)
        total, count, metrics = self.plain(Taught(student, self.head), batch)
        return total, count, {**metrics, **self.reports}

    def count_flops(self, student: Transformer, T: int, tokens: int, targets: int) -> float:
        """Return the FLOPs of the student, the teacher's forward, and the projections."""
        total = train.count_flops(student, T, tokens, targets)
        if self.teacher:
            total += tokens * self.teacher.flops_per_token(T, False, targets / max(1, tokens))
        projections = self.matching.parameters() if self.matching else ()
        return total + 6 * tokens * sum(P.numel() for P in projections)

    def head(self, h: Tensor, w: Tensor) -> Tensor:
        """(B, T, C), (V, C) -> the sum of all losses."""
        cfg, rows = self.cfg, h.flatten(0, 1).index_select(0, self.live)
        total, ce, kl = kernels.linear_kl(rows, w, self.known, self.taught, live=self.some,
                                          targets=self.right, **self.options)
        self.reports = {"ce": ce, "kl": kl}
        if self.matching is not None:
            states = [*zip(self.mine, self.theirs), (h, self.states)]
            # subtle: a sum over all tokens, scaled by a constant to the number of trained ones; a
            # mean over the batch would make the loss depend on how batches are cut
            far = self.matching(states, self.counts) * self.share
            total, self.reports["hidden"] = total + cfg.hidden * far, far.detach()
        return total

class Taught(NamedTuple):
    """A student whose forward ends in another head; train.next_token_loss() does the rest."""
    module: Any
    head: Callable

    def __call__(self, ids: Tensor, *, head: Callable, **rest: Any) -> Any:
        return self.module(ids, head=self.head, **rest)

def match_hidden(cfg: Config, model: Transformer, teacher: Transformer, machine: Machine) -> None:
    """Projections as a part of the model that the optimizer and DDP see, and a file of their own
    beside its weights, from which a run is resumed."""
    model.matching = Matching(cfg.hidden_layers + 1, model.config.n_embd, teacher.config.n_embd,
                              cfg.seed).to(machine.device)
    named = dict(model.matching.named_parameters())
    if cfg.init_from == "resume" and named:
        file = checkpoint.resolve(cfg.out_dir, "last") / PROJECTIONS
        found = safetensors.read_header(file)
        if {n: s.shape for n, s in found.items()} != {n: tuple(p.shape) for n, p in named.items()}:
            raise UserError(f"{file} belongs to a run with another --hidden_layers or teacher: "
                            "resume with the settings that it was made by")
        for name, p in named.items():       # their moments come back with the optimizer
            p.data.copy_(safetensors.read(found[name]))
    before = getattr(model, "save_beside", lambda folder: None)     # of adapters
    specs = [(n, torch.float32, tuple(p.shape)) for n, p in named.items()]
    def save_beside(folder: Path) -> None:
        before(folder)
        if named:
            safetensors.write_safetensors(folder / PROJECTIONS, specs, named.__getitem__)
    model.save_beside = save_beside

def losses(cfg: Config, model: Transformer, data: stage.Data, tokenizer: Any, machine: Machine
           ) -> train.Loss:
    text, said = isinstance(data.batches, Text), []
    plain = train.next_token_loss(cfg, masked=not text)
    if cfg.layers_from_teacher and cfg.init_from == "scratch":
        said.append(take_layers(cfg, model, machine))
    kept = teacher = None               # to evaluate, or with alpha 1, nobody is asked
    if not cfg.eval_only and (cfg.alpha < 1 or cfg.hidden):
        directory, shape = checkpoint.resolve(cfg.teacher), checkpoint.read_config(cfg.teacher)
        cut = min(shape.vocab_size, model.config.vocab_size)
        if cfg.cache_top_k:
            kept = TopK(cfg, data.batches, cut, machine)
            said.append(f"teacher {directory}: on disk, none in memory")
        else:
            teacher = load_teacher(cfg, machine)
            said.append(f"teacher {directory}: {teacher.parameter_count():,} parameters, frozen, "
                        f"{sum(p.nbytes for p in teacher.parameters()) / 1e6:,.1f} MB of memory")
        with torch.device("meta"):      # shapes without memory
            part = model.parameter_count() / Transformer(shape).parameter_count()
        said.append(f"the student has {part:.1%} of its parameters" + (
            ": more than it, which distillation is not for" if part > 1 else ""))
        if cfg.hidden:
            match_hidden(cfg, model, teacher, machine)
        # of tokens that are trained on, among all that hidden states are matched at
        share = 1.0 if text else data.batches.trained / data.batches.tokens
        plain = Loss(cfg, model, teacher, kept, cut, share, plain)
    if machine.main and said:
        print(*said, sep="\n", file=sys.stderr)
    return plain

def main(cfg: Config) -> train.State | None:
    if cfg.init_from == "resume":       # which data it was is needed before anything is read
        cfg = train.inherit(cfg)
    done = stage.go(cfg, read, losses, start=start, verify=check, chat=not is_text(cfg.dataset))
    return done and done.state

if __name__ == "__main__":
    run(main, Config)
