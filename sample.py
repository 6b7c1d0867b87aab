"""Generate text: python sample.py, from the checkpoint of the last training run.

    python sample.py --prompt="Once upon a time"             # any device: found out by itself
    python sample.py --model=DIR --num_samples=5             # any checkpoint directory, as a batch
    python sample.py --model=DIR --chat                      # talk to it; --quantize=int8: faster
    python sample.py --adapter=sums=out/lora,brief=DIR2 --chat      # LoRA, ours or PEFT's, by name
    python sample.py --start=FILE:prompt.txt --top_p=0.9     # nanoGPT's spelling works too
    echo "def main(" | python sample.py --temperature=0      # prompt from a pipe; 0 is greedy

Only the text goes to stdout; what model it is and its tokens/s go to stderr, and GB/s, the weights
and keys read a second: a decode step does little else, so the machine's memory is its roof. What to
expect: the same command gives the same text, sample r of --seed=S is the only sample of --seed=S+r,
and rows of a batch, prompts of any length, are what each would be alone.

Two phases. Prefill: all tokens of the prompt at once, whose keys and values fill the cache; only
the last position's logits are ever made. Decode: one token a row at a time, each attending to the
cache. When the context is full, its last half is encoded again and generation goes on; a chat
forgets its oldest exchange instead.

Adapters bring their base model, and are added up until a chat says `/adapter brief` for that one,
or `/adapter` for none. They are merged into the weights: tokens cost no more, a switch loads again.
"""
from __future__ import annotations

import config  # noqa: F401  first, so that what fails while importing is a sentence
import contextlib
import importlib
import math
import os
import re
import stat
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Iterator

import torch
from torch import Tensor

import chat as templates
import kernels
import lora
from checkpoint import load_model, load_tokenizer, resolve
from config import UserError, run
from machine import Meter
from quantize import pack

SMALL = 4_000_000       # parameters; below, a second CPU thread costs more than it helps decode
SEPARATOR = "---------------"       # between several samples, nanoGPT's


@dataclass
class Sampling:
    """How the next token is chosen; the defaults are the model's own distribution."""
    # --- how to choose a token
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0              # keep the likeliest tokens that add up to p (1: all)
    min_p: float = 0.0              # keep tokens at least this share as likely as the likeliest
    repetition_penalty: float = 1.0     # above 1: tokens that occurred are less likely
    # --- and what these may be
    def __post_init__(self):
        ranges = {"temperature": (0, math.inf), "top_k": (0, math.inf), "top_p": (0, 1),
                  "min_p": (0, 1), "repetition_penalty": (0, math.inf)}
        for name, (low, high) in ranges.items():
            value, open_end = getattr(self, name), name in ("top_p", "repetition_penalty")
            # `not (…)` and not the reverse: nan compares false with everything
            if not (low < value <= high if open_end else low <= value <= high):
                raise UserError(f"--{name}={value} is outside {'(' if open_end else '['}"
                                f"{low}, {high}]")


@dataclass
class Config(Sampling):
    # --- what to read
    out_dir: str = "out"            # of a training run
    model: str = ""                 # a checkpoint directory, ours or Hugging Face's; wins
    which: str = "best"             # of a training run: best or last
    adapter: list[str] = field(default_factory=list)    # folders by commas, each DIR or NAME=DIR
    prompt: str = ""                # the text to go on from; - reads it from stdin
    start: str = ""                 # the same, nanoGPT's name; FILE:prompt.txt reads a file
    file: str = ""                  # a file that holds the prompt
    lines: bool = False             # each line is a prompt of its own; they run as one batch
    # --- to talk
    chat: bool = False              # turns: --prompt is the only one, else from terminal or pipe
    system: str = ""                # what the model is told first; empty: the template's own
    template: str = ""              # of the conversation; empty: the model's
    think: bool = True              # False tells a model that thinks first to answer at once
    # --- how much
    num_samples: int = 1            # of each prompt
    max_new_tokens: int = 500       # a sample ends here or at the end-of-text token
    temperature: float = 0.8        # 0: always the likeliest token; 1: the model's distribution
    top_k: int = 200                # keep the k likeliest tokens (0: all)
    seed: int = 1337                # of sample 0; sample r draws from seed + r
    stop: list[str] = field(default_factory=list)   # strings, by commas, that end a sample unseen
    ignore_eot: bool = False        # go on after the end-of-text token
    # --- how to run and print
    stream: bool = True             # print a single sample while it grows
    echo: bool = True               # print the prompt before its continuation
    device: str = "auto"            # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"             # auto (the file's), float32, bfloat16, float16
    backend: str = "auto"           # of the kernels: auto, reference, torch, triton, cuda
    quantize: str = ""              # int8 or int4: smaller weights, the same activations
    speculate: int = 0              # guess up to so many tokens from repetitions in the text

# ------------------------------------------------------------------------- the next token


def warp(logits: Tensor, s: Sampling, seen: Tensor | None = None) -> Tensor:
    """Logits (B, V) -> logits of the distribution to draw from, -inf where a token is dropped.

    Order as in transformers: repetition penalty, temperature, top-k, top-p, min-p. `seen` (B, V)
    is true for the tokens of a row's prompt and text.
    """
    if s.repetition_penalty != 1 and seen is not None:
        # CTRL (Keskar 2019): towards less likely on either side of zero
        p = s.repetition_penalty
        logits = torch.where(seen, torch.where(logits > 0, logits / p, logits * p), logits)
    if s.temperature not in (0, 1):
        logits = logits / s.temperature
    if 0 < s.top_k < logits.shape[-1]:
        least = logits.topk(s.top_k).values[:, -1:]                 # (B, 1)
        logits = logits.masked_fill(logits < least, -math.inf)
    if s.top_p < 1:
        # nucleus (Holtzman 2019): drop a token if those before it already add up to p
        ordered, order = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        drop = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= s.top_p)
        logits = logits.masked_fill(drop, -math.inf)
    if s.min_p > 0:
        floor = logits.amax(-1, keepdim=True) + math.log(s.min_p)   # p >= min_p * max p
        logits = logits.masked_fill(logits < floor, -math.inf)
    return logits


def next_token(logits: Tensor, s: Sampling, generators: list[torch.Generator],
               seen: Tensor | None = None) -> Tensor:
    """Choose a token for each row: logits (B, V) float32 -> (B,) int64.

    A draw is a race: argmax of p / e with e exponential is token i with probability p_i. Unlike
    torch.multinomial that makes no GPU wait, and each row has noise of its own, so that a row
    does not depend on its neighbours.
    """
    logits = warp(logits, s, seen)
    if s.temperature == 0:
        return logits.argmax(-1)
    noise = torch.stack([torch.empty_like(logits[0]).exponential_(generator=g)
                         for g in generators])
    # subtle: a draw of 0 would let a dropped token win, as 0 / 0
    return (logits.softmax(-1) / noise.clamp_min_(1e-20)).argmax(-1)

# -------------------------------------------------------------------------- the two phases


def prefill(model: Any, contexts: list[list[int]], room: int) -> tuple[Tensor, Any]:
    """Run whole contexts of any lengths: (logits after each, (B, V)), and their cache.

    The batch is padded on the right, where no real token looks, and the cache keeps no padding.
    """
    device = model.output_weight.device
    lengths = [len(c) for c in contexts]
    ids = torch.zeros(len(contexts), max(lengths), dtype=torch.int64)
    for row, context in zip(ids, contexts):
        row[:len(context)] = torch.tensor(context)
    cache = model.new_cache(len(contexts), room)
    # only each row's last real position: the other (B, T, V) logits would be memory for nothing
    where = (torch.arange(len(contexts)).to(device), torch.tensor(lengths).to(device) - 1)
    cache.expect(lengths)
    logits = model(ids.to(device), cache=cache, head=lambda h, w: model.to_logits(h[where], w))
    return logits.float(), cache


def decode(model: Any, tokens: Tensor, cache: Any) -> Tensor:
    """One more token in each row, (B,) -> logits after it, (B, V) float32."""
    return model(tokens.unsqueeze(1), cache=cache)[:, -1].float()


@dataclass
class Memory:
    """A row's cache from one call of generate() to the next: a chat encodes only what is new."""
    ids: list[int] = field(default_factory=list)    # whose keys the cache holds
    cache: Any = None

    def recall(self, model: Any, context: list[int], room: int) -> tuple[Tensor, Any]:
        """prefill() of one context that may begin as the last one did."""
        same = 0
        for a, b in zip(self.ids, context[:-1]):            # the last token's logits are wanted
            if a != b:
                break
            same += 1
        if self.cache is not None and same and room <= self.cache.length:
            try:
                self.cache.trim([same])
            except UserError:                               # a window has moved on since
                return prefill(model, [context], room)
            rest = torch.tensor([context[same:]], device=model.output_weight.device)
            logits = model(rest, cache=self.cache, head=lambda h, w: model.to_logits(h[:, -1], w))
            return logits.float(), self.cache
        # more room than is needed: the next turns then fit as well
        return prefill(model, [context], min(model.config.block_size, max(1024, 2 * room)))


class Lookup:
    """Guesses the next tokens of a text from its own repetitions (prompt look-up, Saxena 2023).

    Names, quotations and code come back word by word; a draft costs no second model.
    """
    LENGTHS = (3, 2)                # the tokens before a guess that have to be the same

    def __init__(self):
        self.after: dict[tuple[int, ...], int] = {}     # n tokens -> where they last ended
        self.seen = 0

    def guess(self, ids: list[int], count: int) -> list[int]:
        """Up to `count` tokens that followed the last tokens of ids when they stood there before.
        ids grows from call to call."""
        for end in range(self.seen + 1, len(ids)):      # what ends here goes on, so it can help
            for n in self.LENGTHS:
                if end >= n:
                    self.after[tuple(ids[end - n:end])] = end
        self.seen = len(ids) - 1
        for n in self.LENGTHS:
            start = self.after.get(tuple(ids[-n:]))
            if start is not None:
                return ids[start:start + count]
        return []


@torch.inference_mode()         # faster than no_grad, a token is a thousand small operations
def generate(model: Any, prompts: list[list[int]], max_new_tokens: int,
             sampling: Sampling = Sampling(), seed: int = 1337, vocab_size: int = 0,
             ends: Callable[[int, int], bool] = lambda row, token: False,
             speculate: int = 0, memory: Memory | None = None) -> Iterator[list[int | None]]:
    """Continue every prompt; yields, a step at a time, one token a row, None where a row is over.

    A row is over after the token for which ends(row, token) is true (yielded still) or after
    max_new_tokens. Row r draws from seed + r. vocab_size (0: the model's) is that of the
    tokenizer: a model's matrix may be padded with rows that mean nothing. speculate: a single row
    runs up to so many guessed tokens along with its newest one, and keeps those that it would
    have chosen: the same tokens, several a step. memory: of a single row, for the next call.
    """
    config = model.config
    if not prompts or not all(prompts):
        raise UserError("a prompt has no token to start from: give it some text")
    top = max(map(max, prompts))
    if top >= config.vocab_size or min(map(min, prompts)) < 0:
        raise UserError(f"the prompt has token id {top}, the model's vocabulary only "
                        f"{config.vocab_size} entries: its tokenizer belongs to another model")
    if len(prompts) > 1 and (speculate or memory):
        raise UserError("--speculate is for one sample: rows would go on at different speeds")
    vocab_size = min(vocab_size or config.vocab_size, config.vocab_size)
    device, limit = model.output_weight.device, config.block_size
    # the newest tokens that fit, as nanoGPT crops
    contexts = {r: list(prompt[-limit:]) for r, prompt in enumerate(prompts)}
    generators = {r: torch.Generator(device).manual_seed(seed + r) for r in contexts}
    seen = None
    if sampling.repetition_penalty != 1:
        seen = torch.zeros(len(prompts), vocab_size, dtype=torch.bool, device=device)
        for r, prompt in enumerate(prompts):
            seen[r, [i for i in prompt if i < vocab_size]] = True
    live, cache, made = list(contexts), None, 0     # rows that go on; `batch`: rows of the cache
    lookup, tokens = Lookup(), torch.zeros(0)
    was_training = model.training
    model.eval()
    try:
        while made < max_new_tokens and live:
            guesses: list[int] = []
            if cache is None or cache.end == cache.length:
                for r in live:                  # a row that is full goes on from its last half
                    if len(contexts[r]) > limit:
                        contexts[r] = contexts[r][-max(1, limit // 2):]
                        lookup = Lookup()
                batch = list(live)              # and rows that are over are left behind
                longest = max(len(contexts[r]) for r in batch)
                room = min(limit, longest + max_new_tokens - made)
                start = prefill if memory is None else memory.recall
                logits, cache = start(model, [contexts[r] for r in batch] if memory is None
                                      else contexts[batch[0]], room)
            elif speculate:
                # subtle: what a full window has dropped cannot come back, hence Store.SPARE
                most = min(speculate, max_new_tokens - made - 1, cache.length - cache.end - 1)
                guesses = lookup.guess(contexts[batch[0]], most) if most > 0 else []
                ids = torch.tensor([contexts[batch[0]][-1:] + guesses], device=device)
                logits = model(ids, cache=cache)[0].float()             # (1 + guesses, V)
            else:
                logits = decode(model, tokens, cache)
            for n in range(1 + len(guesses)):
                rows = logits[n:n + 1] if guesses else logits
                tokens = next_token(rows[:, :vocab_size], sampling,
                                    [generators[r] for r in batch],
                                    None if seen is None else seen[batch])
                if seen is not None:
                    seen[batch, tokens] = True
                step: list[int | None] = [None] * len(prompts)
                for r, token in zip(batch, tokens.tolist()):
                    if r in live:
                        step[r] = token
                        contexts[r].append(token)
                        if ends(r, token):
                            live.remove(r)
                made += 1
                wrong = guesses and (n == len(guesses) or guesses[n] != step[batch[0]] or not live)
                if wrong:                       # what was guessed beyond this is forgotten
                    cache.trim([cache.end - (len(guesses) - n)])
                yield step
                if wrong:
                    break
    finally:
        if memory is not None and cache is not None:
            memory.ids, memory.cache = contexts[0][:cache.lengths[0]], cache
        model.train(was_training)

# ---------------------------------------------------------------------------- ids -> text


class Text:
    """A growing sample as text: whole characters only, and cut before the first stop string.

    after: the prompt's ids; a first space is one between words if there is text in them.
    """

    def __init__(self, tokenizer: Any, stops: list[str], ends: set[int], after: list[int] = []):
        self.decoder, self.ends = tokenizer.stream(after), ends
        self.stops = [s for s in stops if s]
        self.held = ""              # the end of the text, where a stop string may have begun
        self.over = False

    def put(self, token: int) -> str:
        """What may be printed now that `token` is there; sets `over` at a stop."""
        if token in self.ends:
            rest, self.over = self.flush(), True
            return rest
        return self._release(self.decoder.put(token))

    def flush(self) -> str:
        """What was held back, when the sample is as long as it may be."""
        if self.over:
            return ""
        rest = self._release(self.decoder.flush())      # it may complete a stop string, and clear
        rest, self.held = rest + self.held, ""          # what is held
        return rest

    def _release(self, piece: str) -> str:
        self.held += piece
        found = [i for s in self.stops if (i := self.held.find(s)) >= 0]
        if found:
            out, self.held, self.over = self.held[:min(found)], "", True
            return out
        # keep back the longest end of the text that is the beginning of a stop string
        keep = max((k for s in self.stops for k in range(1, len(s)) if self.held.endswith(s[:k])),
                   default=0)
        cut = len(self.held) - keep
        out, self.held = self.held[:cut], self.held[cut:]
        return out


def read_prompt(cfg: Config) -> str:
    """The prompt, from wherever the settings say that it is; "" where they say nothing."""
    given = {"prompt": cfg.prompt, "start": cfg.start, "file": cfg.file}
    named = [f"--{name}" for name, value in given.items() if value]
    if len(named) > 1:
        raise UserError(f"{' and '.join(named)} both name the prompt: give one of them")
    text = cfg.prompt or cfg.start
    path = cfg.file or (cfg.start[5:] if cfg.start.startswith("FILE:") else "")
    if path:
        try:
            data = Path(path).read_bytes()
        except OSError as e:
            raise UserError(f"cannot read the prompt from {path}: {e.strerror}") from e
    elif text == "-" or not named and piped() and "prompt" not in getattr(cfg, "given", ()):
        print("reading the prompt from stdin (--prompt=… gives one)", file=sys.stderr)
        path, data = "stdin", sys.stdin.buffer.read()
    else:
        return text
    try:
        return data.decode()
    except UnicodeDecodeError as e:
        raise UserError(f"the prompt in {path} is not UTF-8 text (byte {e.start})") from e


def piped() -> bool:
    """Whether stdin is a pipe or a file: not a terminal, nor the nothing of a background job."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError, AttributeError):       # closed, or replaced by a test
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Prompt -> ids, after the token that begins a text (Llama's <s>) if there is one; the
    end-of-text token may be written out in it, as in nanoGPT.

    Without a prompt a sample starts where documents do: after that first token, after
    end-of-text, or, in a vocabulary of characters, after a newline.
    """
    eot, first = tokenizer.eot, list(tokenizer.prefix)
    if text == "" and (first or eot is not None):
        return first or [eot]
    allowed = {name for name, i in tokenizer.special.items() if i == eot}
    try:
        return first + tokenizer.encode(text or "\n", allowed_special=allowed,
                                        disallowed_special=())
    except UserError:
        if text:
            raise
        return [0]                                      # characters without a newline

# ------------------------------------------------------------------------ a model that speaks


def find_adapters(cfg: Config) -> dict[str, Path]:
    """Name -> folder of what --adapter lists. A folder of PEFT's layout, a checkpoint that has one
    as adapter/, or a training run; without a name it goes by that of the folder."""
    found: dict[str, Path] = {}
    for word in cfg.adapter:
        name, equals, path = word.partition("=")
        if not equals or Path(word).is_dir():           # a folder may have a = in its name
            path = word
            name = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(path).resolve().name)
        if name in found:
            raise UserError(f"--adapter: two are called {name}: say --adapter=ONE=DIR,OTHER=DIR")
        found[name] = folder = Path(path)
        if not (folder / lora.CONFIG).is_file():
            with contextlib.suppress(UserError):
                found[name] = resolve(folder, cfg.which) / lora.FOLDER
        if not (found[name] / lora.CONFIG).is_file():
            raise UserError(f"--adapter: there is none at {path}: give a folder that has "
                            f"{lora.CONFIG}, or the out_dir of a run with --lora_rank")
    return found


def find_model(cfg: Config, adapters: dict[str, Path]) -> Path:
    """The checkpoint that is asked for; if none is, the one that the first adapter was made on."""
    source = cfg.model or cfg.out_dir
    if adapters and not cfg.model and "out_dir" not in getattr(cfg, "given", ()):
        first = next(iter(adapters.values()))
        source = lora.read_adapter_config(first / lora.CONFIG)["base"]
        if not isinstance(source, str) or not Path(source).is_dir():
            raise UserError(f"{first} was made on {source}, which is no folder here: say where it "
                            "lies with --model=DIR")
    directory = resolve(source, cfg.which)
    if directory.resolve() in [path.resolve().parent for path in adapters.values()]:
        raise UserError(f"{directory} has its adapter merged into its weights: leave out --adapter,"
                        " or name the base with --model=DIR")
    return directory


class Served:
    """A checkpoint's model with the sum of some adapters merged into it, packed to be served."""

    def __init__(self, cfg: Config, directory: Path, adapters: dict[str, Path]):
        self.model = model = load_model(directory, cfg.device, cfg.dtype)
        for name, path in adapters.items():
            lora.load_adapter(path, model, name)
        if adapters:
            lora.activate(model, *adapters)
            lora.merge(model)
        weight, count = model.output_weight, model.parameter_count()
        if weight.device.type == "cpu" and count < SMALL:
            # a step is microseconds of work: threads would wait for each other
            torch.set_num_threads(1)
        print(f"{' + '.join([str(directory), *adapters])}: {count:,} parameters, "
              f"{cfg.quantize or weight.dtype} on {weight.device}", file=sys.stderr)
        # bytes that a token reads; the reference is there to be read: it takes weights as they are
        self.bytes = count * weight.itemsize if cfg.backend == "reference" and not cfg.quantize \
            else pack(model, cfg.quantize)
        c, dtype = model.config, model.compute_dtype or weight.dtype
        self.token = 2 * c.n_layer * c.n_kv_head * c.head_dim * dtype.itemsize  # of its keys


def say(cfg: Config, served: Served, tokenizer: Any, prompts: list[list[int]], stops: set[int],
        stream: bool, memory: Memory | None = None) -> tuple[list[str], Meter]:
    """What the model says after each prompt; with `stream` on stdout too, as it comes."""
    rows = [Text(tokenizer, cfg.stop, set() if cfg.ignore_eot else stops, ids) for ids in prompts]
    said = [""] * len(rows)

    def put(r: int, piece: str) -> None:
        said[r] += piece
        if stream:
            print(piece, end="", flush=True)

    def ends_at(r: int, token: int) -> bool:
        put(r, rows[r].put(token))
        return rows[r].over

    steps = generate(served.model, prompts, cfg.max_new_tokens, cfg, cfg.seed,
                     tokenizer.vocab_size, ends_at, cfg.speculate, memory)
    meter = Meter(prompts, served.bytes, served.token)
    try:
        for step in steps:
            meter.step(step)
            if not stream and sys.stderr.isatty():
                meter.show(cfg.max_new_tokens)
    except KeyboardInterrupt:                           # ends an answer, not the conversation
        if memory is None or not sys.stdin.isatty():
            raise
        steps.close()
        memory.ids, memory.cache = [], None             # it may have been cut within a step
    for r, row in enumerate(rows):
        put(r, row.flush())
    return said, meter

# ---------------------------------------------------------------------------------- to talk


def turns(cfg: Config) -> Iterator[str]:
    """What the user says: --prompt alone, the lines of a pipe, or of a terminal with editing."""
    if cfg.prompt or cfg.start or cfg.file:
        yield read_prompt(cfg)
        return
    if not sys.stdin.isatty():
        yield from filter(str.strip, map(str.rstrip, sys.stdin))
        return
    with contextlib.suppress(ImportError):              # Windows has none
        importlib.import_module("readline")             # arrow keys and history
    print("your turn; /new forgets all, /adapter NAME takes another adapter, an empty line or "
          "Ctrl-D ends, Ctrl-C stops an answer", file=sys.stderr)
    while True:
        print("\n> ", end="", file=sys.stderr, flush=True)
        try:
            line = input()
        except EOFError:
            return
        if not line.strip():
            return
        yield line


def chat(cfg: Config, directory: Path, adapters: dict[str, Path], tokenizer: Any) -> None:
    """Turns of a user, and the model's answers on stdout; what was said is not computed again."""
    name = cfg.template or tokenizer.template
    row = templates.find(name, foreign=bool(tokenizer.jinja))
    opening = [{"role": "system", "content": cfg.system}] if cfg.system else []
    messages, memory, served = list(opening), Memory(), Served(cfg, directory, adapters)
    eot = tokenizer.eot_token or "<|endoftext|>"
    stops = {*tokenizer.stop_ids, *(tokenizer.special[t] for t in row.stops(eot)
                                    if t in tokenizer.special)}

    def render(said: list[dict]) -> list[int]:
        return tokenizer.render(said, name, add_generation_prompt=True,
                                enable_thinking=cfg.think)[0]

    # an answer has room for its --max_new_tokens, or for half of a small context
    limit = served.model.config.block_size
    room = max(1, limit - cfg.max_new_tokens, limit // 2)
    for line in turns(cfg):
        word, *names = line.split()
        if line.strip() == "/new":
            messages, memory = list(opening), Memory()
            continue
        if word == "/adapter":
            if odd := [n for n in names if n not in adapters]:
                wrong = UserError(f"there is no adapter {odd[0]!r}, only "
                                  f"{', '.join(adapters) or 'the model'}: see --adapter")
                if not sys.stdin.isatty():
                    raise wrong
                print(wrong, file=sys.stderr)
                continue
            # what is remembered are keys of other weights; and there is never room for two models
            served, memory = None, Memory()
            served = Served(cfg, directory, {n: adapters[n] for n in names})
            continue
        messages.append({"role": "user", "content": line})
        ids = templates.fit(render, messages, room)
        said, meter = say(cfg, served, tokenizer, [ids], stops, True, memory)
        print(flush=True)
        messages.append({"role": "assistant", "content": said[0]})
        print(f"({meter})", file=sys.stderr)

# ----------------------------------------------------------------------------- the script


def main(cfg: Config) -> None:
    kernels.use(cfg.backend)
    if cfg.num_samples < 1 or cfg.max_new_tokens < 1 or not 0 <= cfg.speculate < 64:
        raise UserError("--num_samples and --max_new_tokens have to be at least 1, --speculate 0 "
                        "to 63")
    if cfg.chat and (cfg.num_samples > 1 or cfg.lines):
        raise UserError("--chat is one conversation: leave out --num_samples and --lines")
    adapters = find_adapters(cfg)
    directory = find_model(cfg, adapters)
    text = "" if cfg.chat else read_prompt(cfg)
    tokenizer = load_tokenizer(directory)
    if cfg.chat:
        return chat(cfg, directory, adapters, tokenizer)
    texts = [line for line in text.splitlines() if line] if cfg.lines else [text]
    if not texts:
        raise UserError("--lines: the prompt has no line with text")
    texts = [t for t in texts for _ in range(cfg.num_samples)]
    prompts = [encode(tokenizer, t) for t in texts]
    served = Served(cfg, directory, adapters)
    stream, before = cfg.stream and len(texts) == 1, texts if cfg.echo else [""] * len(texts)
    print(before[0] if stream else "", end="", flush=True)
    said, meter = say(cfg, served, tokenizer, prompts, set(tokenizer.stop_ids), stream)
    print("" if stream else f"\n{SEPARATOR}\n".join(map("".join, zip(before, said))), flush=True)
    print("\n" * sys.stderr.isatty() + str(meter), file=sys.stderr)     # leave the live line


if __name__ == "__main__":
    run(main, Config)
