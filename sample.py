"""Generate text: python sample.py, from the checkpoint of the last training run.

    python sample.py --prompt="Once upon a time"             # any device: found out by itself
    python sample.py --model=DIR --num_samples=5             # any checkpoint directory, as a batch
    python sample.py --model=DIR --chat                      # talk to it; --quantize=int8: faster
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
"""
from __future__ import annotations

import contextlib
import importlib
import math
import os
import stat
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Iterator

import torch
from torch import Tensor

import chat as templates
import kernels
from checkpoint import load_model, load_tokenizer, resolve
from config import UserError, run
from quantize import pack

SMALL = 4_000_000       # parameters; below, a second CPU thread costs more than it helps decode
SEPARATOR = "---------------"       # between several samples, nanoGPT's


@dataclass
class Config:
    # --- what to read
    out_dir: str = "out"            # of a training run
    model: str = ""                 # a checkpoint directory, ours or Hugging Face's; wins
    which: str = "best"             # of a training run: best or last
    prompt: str = ""                # the text to go on from; - reads it from stdin
    start: str = ""                 # the same, nanoGPT's name; FILE:prompt.txt reads a file
    file: str = ""                  # a file that holds the prompt
    lines: bool = False             # each line is a prompt of its own; they run as one batch
    # --- to talk
    chat: bool = False              # turns: --prompt is the only one, else from terminal or pipe
    system: str = ""                # what the model is told first; empty: the template's own
    template: str = ""              # of the conversation; empty: the model's
    think: bool = True              # False tells a model that thinks first to answer at once
    # --- how to choose
    num_samples: int = 1            # of each prompt
    max_new_tokens: int = 500       # a sample ends here or at the end-of-text token
    temperature: float = 0.8        # 0: always the likeliest token; 1: the model's distribution
    top_k: int = 200                # keep the k likeliest tokens (0: all)
    top_p: float = 1.0              # keep the likeliest tokens that add up to p (1: all)
    min_p: float = 0.0              # keep tokens at least this share as likely as the likeliest
    repetition_penalty: float = 1.0     # above 1: tokens that occurred are less likely
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


@dataclass
class Sampling:
    """How the next token is chosen; the defaults are the model's own distribution."""
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self):
        ranges = {"temperature": (0, math.inf), "top_k": (0, math.inf), "top_p": (0, 1),
                  "min_p": (0, 1), "repetition_penalty": (0, math.inf)}
        for name, (low, high) in ranges.items():
            value, open_end = getattr(self, name), name in ("top_p", "repetition_penalty")
            # `not (…)` and not the reverse: nan compares false with everything
            if not (low < value <= high if open_end else low <= value <= high):
                raise UserError(f"--{name}={value} is outside {'(' if open_end else '['}"
                                f"{low}, {high}]")

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


def show_progress(done: int, total: int, rows: int, since: float) -> None:
    rate = done / max(time.perf_counter() - since, 1e-9)
    print(f"\r{done}/{total} tokens of {rows} samples, {rows * rate:,.0f} tokens/s, "
          f"{(total - done) / rate:.0f} s left ", end="", file=sys.stderr, flush=True)

class Meter:
    """Tokens a second of the prompt and after it, and the bytes that the latter read a second."""

    def __init__(self, prompts: list[list[int]], weights: int, token: int):
        self.prompt, self.length = sum(map(len, prompts)), max(map(len, prompts))
        self.weights, self.token = weights, token       # bytes a step reads; a token's keys
        self.start = self.first = time.perf_counter()
        self.count = self.steps = 0

    def step(self, step: list[int | None]) -> None:
        self.count += sum(token is not None for token in step)
        self.steps += 1
        if self.steps == 1:
            self.first = time.perf_counter()            # the first token comes from the prompt

    def __str__(self) -> str:
        now = time.perf_counter()
        text = (f"{self.count} tokens in {now - self.start:.1f} s; prompt "
                f"{self.prompt / max(self.first - self.start, 1e-9):,.0f} tokens/s")
        if self.steps > 1:
            rate = (self.steps - 1) / max(now - self.first, 1e-9)
            rows = self.count / self.steps
            held = self.token * rows * (self.length + self.steps / 2)
            text += (f", then {rate * rows:,.0f} tokens/s, "
                     f"{rate * (self.weights + held) / 1e9:.1f} GB/s")
        return text

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
    print("your turn; /new forgets all, an empty line or Ctrl-D ends, Ctrl-C stops an answer",
          file=sys.stderr)
    while True:
        print("\n> ", end="", file=sys.stderr, flush=True)
        try:
            line = input()
        except EOFError:
            return
        if not line.strip():
            return
        yield line


def fit(render: Callable, messages: list[dict], room: int) -> list[int]:
    """The conversation as ids, without its oldest exchanges if they do not fit in `room` tokens.

    The system message stays, and so does the last turn. Changes `messages`.
    """
    while True:
        ids = render(messages)
        first = int(messages[0]["role"] == "system")
        if len(ids) <= room or len(messages) <= first + 1:
            return ids
        del messages[first:first + 2]


def chat(cfg: Config, model: Any, tokenizer: Any, sampling: Sampling, weights: int) -> None:
    """Turns of a user, and the model's answers on stdout; what was said is not computed again."""
    name = cfg.template or tokenizer.template
    row = templates.find(name, foreign=bool(tokenizer.jinja))
    opening = [{"role": "system", "content": cfg.system}] if cfg.system else []
    messages, memory, out = list(opening), Memory(), sys.stdout
    eot = tokenizer.eot_token or "<|endoftext|>"
    stops = {*tokenizer.stop_ids, *(tokenizer.special[t] for t in row.stops(eot)
                                    if t in tokenizer.special)}

    def render(said: list[dict]) -> list[int]:
        return tokenizer.render(said, name, add_generation_prompt=True,
                                enable_thinking=cfg.think)[0]

    # an answer has room for its --max_new_tokens, or for half of a small context
    room = max(1, model.config.block_size - cfg.max_new_tokens, model.config.block_size // 2)
    for line in turns(cfg):
        if line.strip() == "/new":
            messages, memory = list(opening), Memory()
            continue
        messages.append({"role": "user", "content": line})
        ids = fit(render, messages, room)
        text, said = Text(tokenizer, cfg.stop, set() if cfg.ignore_eot else stops, ids), []

        def ends_at(_: int, token: int) -> bool:
            said.append(text.put(token))
            out.write(said[-1])
            out.flush()
            return text.over

        meter = Meter([ids], weights, token_bytes(model))
        try:
            for step in generate(model, [ids], cfg.max_new_tokens, sampling, cfg.seed,
                                 tokenizer.vocab_size, ends_at, cfg.speculate, memory):
                meter.step(step)
        except KeyboardInterrupt:                       # ends the answer, not the conversation
            if not sys.stdin.isatty():
                raise
            memory = Memory()                           # it may have been cut within a step
        said.append(text.flush())
        out.write(said[-1] + "\n")
        out.flush()
        messages.append({"role": "assistant", "content": "".join(said)})
        print(f"({meter})", file=sys.stderr)


def token_bytes(model: Any) -> int:
    """Bytes of keys and values that a token leaves in the cache."""
    c, dtype = model.config, model.compute_dtype or model.output_weight.dtype
    return 2 * c.n_layer * c.n_kv_head * c.head_dim * dtype.itemsize

# ----------------------------------------------------------------------------- the script


def main(cfg: Config) -> None:
    kernels.use(cfg.backend)
    sampling = Sampling(cfg.temperature, cfg.top_k, cfg.top_p, cfg.min_p, cfg.repetition_penalty)
    if cfg.num_samples < 1 or cfg.max_new_tokens < 1 or not 0 <= cfg.speculate < 64:
        raise UserError("--num_samples and --max_new_tokens have to be at least 1, --speculate 0 "
                        "to 63")
    if cfg.chat and (cfg.num_samples > 1 or cfg.lines):
        raise UserError("--chat is one conversation: leave out --num_samples and --lines")
    directory = resolve(cfg.model or cfg.out_dir, cfg.which)
    text = "" if cfg.chat else read_prompt(cfg)
    tokenizer = load_tokenizer(directory)
    if cfg.chat:
        templates.find(cfg.template or tokenizer.template, foreign=bool(tokenizer.jinja))
    texts = [line for line in text.splitlines() if line] if cfg.lines else [text]
    if not texts:
        raise UserError("--lines: the prompt has no line with text")
    texts = [t for t in texts for _ in range(cfg.num_samples)]
    prompts = [encode(tokenizer, t) for t in texts]
    model = load_model(directory, cfg.device, cfg.dtype)
    weight, count = model.output_weight, model.parameter_count()
    if weight.device.type == "cpu" and count < SMALL:
        # a step is microseconds of work: threads would wait for each other, on busy cores for long
        torch.set_num_threads(1)
    print(f"{directory}: {count:,} parameters, {cfg.quantize or weight.dtype} on {weight.device}",
          file=sys.stderr)
    # the reference is there to be read: it multiplies the weights as they are
    weights = count * weight.itemsize if cfg.backend == "reference" and not cfg.quantize else (
        pack(model, cfg.quantize))
    if cfg.chat:
        chat(cfg, model, tokenizer, sampling, weights)
        return

    ends = set() if cfg.ignore_eot else set(tokenizer.stop_ids)
    rows = [Text(tokenizer, cfg.stop, ends, ids) for ids in prompts]
    samples = [t if cfg.echo else "" for t in texts]
    streaming = cfg.stream and len(rows) == 1
    out = sys.stdout
    if streaming:
        out.write(samples[0])
        out.flush()

    def ends_at(r: int, token: int) -> bool:
        piece = rows[r].put(token)
        samples[r] += piece
        if streaming:
            out.write(piece)
            out.flush()
        return rows[r].over

    meter = Meter(prompts, weights, token_bytes(model))
    last = meter.start
    for step in generate(model, prompts, cfg.max_new_tokens, sampling, cfg.seed,
                         tokenizer.vocab_size, ends_at, cfg.speculate):
        meter.step(step)
        if not streaming and sys.stderr.isatty() and time.perf_counter() - last > 0.5:
            last = time.perf_counter()
            show_progress(meter.steps, cfg.max_new_tokens, len(rows), meter.start)
    report = str(meter)
    for r, row in enumerate(rows):
        rest = row.flush()
        samples[r] += rest
        if streaming:
            out.write(rest + "\n")
    if not streaming:
        out.write(f"\n{SEPARATOR}\n".join(samples) + "\n")
    out.flush()
    start = "\n" if sys.stderr.isatty() else ""         # leave the progress line
    print(start + report, file=sys.stderr)


if __name__ == "__main__":
    run(main, Config)
