"""Generate ids: prefill, decode, the choice of the next token, and text as it grows.

    for step in generate(model, [ids, more_ids], 100, Sampling(temperature=0.8, top_k=200), seed=1):
        ...                             # one token per row and step, None where a row has ended

Used by sample.py, eval.py, the samples of a training run and a teacher's answers. Two phases.
Prefill: all tokens of the prompt at once, whose keys and values fill the cache; only the logits of
the last position are made. Decode: one token per row at a time, each attending to the cache. When
the context is full, its last half is encoded again and generation goes on.

Row r of a batch draws from seed + r and its computation does not mix with that of other rows. In
float32 its tokens are those that its prompt gives alone. In bfloat16, float16, int8 and int4 they
may differ where two tokens are nearly tied: a matmul of another size adds up in another order, and
what is rounded to 8 or 11 bits is rounded differently. The same call gives the same tokens.
"""
from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Callable, Iterator

import torch
from torch import Tensor

from config import UserError

TURN = 1_000_003        # from the seed of one turn of a chat to the next; rows are 1 apart
NOT_FINITE = ("the model's logits are nan or infinite, so there is no next token: its weights are "
              "damaged or their training diverged; use an earlier checkpoint")


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
    have chosen: several a step, in float32 the same ones. memory: of a single row, for the next
    call. Logits that are nan or infinite are a UserError, with the tokens before them yielded.
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
                rows = (logits[n:n + 1] if guesses else logits)[:, :vocab_size]
                total = rows.sum()              # finite only if all that it adds up is
                tokens = next_token(rows, sampling, [generators[r] for r in batch],
                                    None if seen is None else seen[batch])
                if seen is not None:
                    seen[batch, tokens] = True
                if not math.isfinite(total):
                    raise UserError(NOT_FINITE)
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


def sample_text(model: Any, tokenizer: Any, ids: list[int], sampling: Sampling, seed: int,
                max_new_tokens: int = 100) -> str:
    """Return ids and what follows as text, up to a stop token: the sample of a training run.

    A model that has become nan gives a sentence instead: a sample is no reason to end a run.
    """
    stops, ids = set(tokenizer.stop_ids), list(ids)
    try:
        for step in generate(model, [ids], max_new_tokens, sampling, seed, tokenizer.vocab_size,
                             lambda _, token: token in stops):
            ids += step
    except UserError as e:
        return f"no sample: {e}"
    return tokenizer.decode(ids)

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
