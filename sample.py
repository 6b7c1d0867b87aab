"""Generate text: python sample.py, from the checkpoint of the last training run.

    python sample.py --prompt="Once upon a time"             # any device: found out by itself
    python sample.py --model=DIR --num_samples=5             # any checkpoint directory, as a batch
    python sample.py --start=FILE:prompt.txt --top_p=0.9     # nanoGPT's spelling works too
    echo "def main(" | python sample.py --temperature=0      # prompt from a pipe; 0 is greedy

Only the text goes to stdout; what model it is and its tokens/s go to stderr. What to expect: the
same command gives the same text, sample r of --seed=S is the only sample of --seed=S+r, and rows
of a batch, prompts of any length, are what each would be alone.

Two phases. Prefill: all tokens of the prompt at once, whose keys and values fill the cache; only
the last position's logits are ever made. Decode: one token a row at a time, each attending to the
cache. When the context is full, its last half is encoded again and generation goes on.
"""
from __future__ import annotations

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

import kernels
from checkpoint import load_model, load_tokenizer, resolve
from config import UserError, run

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
    backend: str = "auto"           # of the kernels: auto, reference, torch, triton


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


@torch.inference_mode()         # faster than no_grad, a token is a thousand small operations
def generate(model: Any, prompts: list[list[int]], max_new_tokens: int,
             sampling: Sampling = Sampling(), seed: int = 1337, vocab_size: int = 0,
             ends: Callable[[int, int], bool] = lambda row, token: False,
             ) -> Iterator[list[int | None]]:
    """Continue every prompt; yields, a step at a time, one token a row, None where a row is over.

    A row is over after the token for which ends(row, token) is true (yielded still) or after
    max_new_tokens. Row r draws from seed + r. vocab_size (0: the model's) is that of the
    tokenizer: a model's matrix may be padded with rows that mean nothing.
    """
    config = model.config
    if not prompts or not all(prompts):
        raise UserError("a prompt has no token to start from: give it some text")
    top = max(map(max, prompts))
    if top >= config.vocab_size or min(map(min, prompts)) < 0:
        raise UserError(f"the prompt has token id {top}, the model's vocabulary only "
                        f"{config.vocab_size} entries: its tokenizer belongs to another model")
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
    live, cache = list(contexts), None          # rows that go on; `batch`: rows of the cache
    was_training = model.training
    model.eval()
    try:
        for made in range(max_new_tokens):
            if cache is None or cache.end == cache.length:
                for r in live:                  # a row that is full goes on from its last half
                    if len(contexts[r]) > limit:
                        contexts[r] = contexts[r][-max(1, limit // 2):]
                batch = list(live)              # and rows that are over are left behind
                longest = max(len(contexts[r]) for r in batch)
                room = min(limit, longest + max_new_tokens - made)
                logits, cache = prefill(model, [contexts[r] for r in batch], room)
            else:
                logits = decode(model, tokens, cache)
            tokens = next_token(logits[:, :vocab_size], sampling,
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
            yield step
            if not live:
                return
    finally:
        model.train(was_training)

# ---------------------------------------------------------------------------- ids -> text


class Text:
    """A growing sample as text: whole characters only, and cut before the first stop string."""

    def __init__(self, tokenizer: Any, stops: list[str], ends: set[int]):
        self.decoder, self.stops, self.ends = tokenizer.stream(), [s for s in stops if s], ends
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
    """Prompt -> ids; the end-of-text token may be written out in it, as in nanoGPT.

    Without a prompt a sample starts where documents do: after end-of-text, or, in a vocabulary of
    characters, after a newline.
    """
    eot = tokenizer.eot
    if text == "" and eot is not None:
        return [eot]
    allowed = {name for name, i in tokenizer.special.items() if i == eot}
    try:
        return tokenizer.encode(text or "\n", allowed_special=allowed, disallowed_special=())
    except UserError:
        if text:
            raise
        return [0]                                      # characters without a newline


def show_progress(done: int, total: int, rows: int, since: float) -> None:
    rate = done / max(time.perf_counter() - since, 1e-9)
    print(f"\r{done}/{total} tokens of {rows} samples, {rows * rate:,.0f} tokens/s, "
          f"{(total - done) / rate:.0f} s left ", end="", file=sys.stderr, flush=True)

# ----------------------------------------------------------------------------- the script


def main(cfg: Config) -> None:
    kernels.use(cfg.backend)
    sampling = Sampling(cfg.temperature, cfg.top_k, cfg.top_p, cfg.min_p, cfg.repetition_penalty)
    if cfg.num_samples < 1 or cfg.max_new_tokens < 1:
        raise UserError("--num_samples and --max_new_tokens have to be at least 1")
    directory = resolve(cfg.model or cfg.out_dir, cfg.which)
    text = read_prompt(cfg)
    tokenizer = load_tokenizer(directory)
    texts = [line for line in text.splitlines() if line] if cfg.lines else [text]
    if not texts:
        raise UserError("--lines: the prompt has no line with text")
    texts = [t for t in texts for _ in range(cfg.num_samples)]
    prompts = [encode(tokenizer, t) for t in texts]
    model = load_model(directory, cfg.device, cfg.dtype)
    weight = model.output_weight
    if weight.device.type == "cpu" and model.parameter_count() < SMALL:
        # a step is microseconds of work: threads would wait for each other, on busy cores for long
        torch.set_num_threads(1)
    print(f"{directory}: {model.parameter_count():,} parameters, {weight.dtype} on {weight.device}",
          file=sys.stderr)

    ends = set() if cfg.ignore_eot else set(tokenizer.stop_ids)
    rows = [Text(tokenizer, cfg.stop, ends) for _ in texts]
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

    since = last = time.perf_counter()
    count = 0
    for done, step in enumerate(generate(model, prompts, cfg.max_new_tokens, sampling, cfg.seed,
                                         tokenizer.vocab_size, ends_at), 1):
        count += sum(token is not None for token in step)
        if not streaming and sys.stderr.isatty() and time.perf_counter() - last > 0.5:
            last = time.perf_counter()
            show_progress(done, cfg.max_new_tokens, len(rows), since)
    seconds = time.perf_counter() - since
    for r, row in enumerate(rows):
        rest = row.flush()
        samples[r] += rest
        if streaming:
            out.write(rest + "\n")
    if not streaming:
        out.write(f"\n{SEPARATOR}\n".join(samples) + "\n")
    out.flush()
    start = "\n" if sys.stderr.isatty() else ""         # leave the progress line
    print(f"{start}{count} tokens in {seconds:.1f} s, {count / seconds:,.0f} tokens/s",
          file=sys.stderr)


if __name__ == "__main__":
    run(main, Config)
