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
from typing import Any, Callable, Iterator, Sequence

from config import UserError

import torch
from torch import Tensor


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
            value = getattr(self, name)
            open_end = name in ("top_p", "repetition_penalty")
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
    # a draw of 0 would let a dropped token win, as 0 / 0
    return (logits.softmax(-1) / noise.clamp_min_(1e-20)).argmax(-1)

# -------------------------------------------------------------------------- the two phases


def prefill(model: Any, contexts: list[list[int]], room: int) -> tuple[Tensor, Any]:
    """Run whole contexts of any lengths; return (logits after each, (B, V)), and their cache.

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
    """Run one more token in each row, (B,); return the logits after it, (B, V) float32."""
    return model(tokens.unsqueeze(1), cache=cache)[:, -1].float()


@dataclass
class Memory:
    """The cache of a text from one generate() to the next: a chat encodes new tokens only."""
    ids: list[int] = field(default_factory=list)    # whose keys the cache holds
    cache: Any = None

    def recall(self, model: Any, context: list[int], room: int) -> tuple[Tensor, Any]:
        """Return what prefill() does of one context, which may begin as the last one did."""
        same = 0
        for a, b in zip(self.ids, context[:-1]):            # the last token's logits are wanted
            if a != b:
                break
            same += 1
        if self.cache is not None and same and room <= self.cache.length:
            try:
                self.cache.trim([same])
            except UserError:               # a window has moved on since, or a state is recurrent
                return prefill(model, [context], room)
            rest = torch.tensor([context[same:]], device=model.output_weight.device)
            logits = model(rest, cache=self.cache, head=lambda h, w: model.to_logits(h[:, -1], w))
            return logits.float(), self.cache
        # more room than is needed: the next turns then fit as well
        return prefill(model, [context], min(model.config.block_size, max(1024, 2 * room)))


def check_prompts(prompts: list[list[int]], vocab_size: int) -> None:
    """UserError for prompts without a token, or with one that the model does not know."""
    if not prompts or not all(prompts):
        raise UserError("a prompt has no token to start from: give it some text")
    largest = max(map(max, prompts))
    if largest >= vocab_size or min(map(min, prompts)) < 0:
        raise UserError(f"the prompt has token id {largest}, the model's vocabulary only "
                        f"{vocab_size} entries: its tokenizer belongs to another model")


@dataclass
class Rows:
    """The rows of a batch while they are generated: their ids, and how each draws."""
    ids: dict[int, list[int]]               # row -> its context, which grows
    generators: dict[int, torch.Generator]
    occurred: Tensor | None                 # (rows, V), for the repetition penalty
    sampling: Sampling

    @classmethod
    def begin(cls, prompts: list[list[int]], sampling: Sampling, seed: int, vocab_size: int,
              limit: int, device: torch.device) -> Rows:
        """Return the rows of `prompts`, cropped to the newest `limit` tokens, as nanoGPT does."""
        ids = {r: list(prompt[-limit:]) for r, prompt in enumerate(prompts)}
        generators = {r: torch.Generator(device).manual_seed(seed + r) for r in ids}
        occurred = None
        if sampling.repetition_penalty != 1:
            occurred = torch.zeros(len(prompts), vocab_size, dtype=torch.bool, device=device)
            for r, prompt in enumerate(prompts):
                occurred[r, [i for i in prompt if i < vocab_size]] = True
        return cls(ids, generators, occurred, sampling)

    def choose(self, logits: Tensor, batch: list[int]) -> Tensor:
        """Return the next token of each row of `batch`, (rows,), from logits (rows, V); UserError
        where these are not finite."""
        total = logits.sum()                # finite only if all that it adds up is
        tokens = next_token(logits, self.sampling, [self.generators[r] for r in batch],
                            None if self.occurred is None else self.occurred[batch])
        if self.occurred is not None:
            self.occurred[batch, tokens] = True
        if not math.isfinite(total):
            raise UserError(NOT_FINITE)
        return tokens

    def crop(self, rows: list[int], limit: int) -> None:
        """Go on from the last half of each context that is full."""
        for r in rows:
            if len(self.ids[r]) > limit:
                self.ids[r] = self.ids[r][-max(1, limit // 2):]


@torch.inference_mode()         # faster than no_grad, a token is a thousand small operations
def generate(model: Any, prompts: list[list[int]], max_new_tokens: int,
             sampling: Sampling = Sampling(), seed: int = 1337, vocab_size: int = 0,
             ends: Callable[[int, int], bool] = lambda row, token: False,
             memory: Memory | None = None) -> Iterator[list[int | None]]:
    """Continue every prompt; yield one token per row and step, None where a row has ended.

    A row ends after max_new_tokens, or with the token for which ends(row, token) is true, which is
    asked once the step was yielded: whoever reads the steps may have decided so. Row r draws from
    seed + r. vocab_size (0: the model's) is that of the tokenizer: a model's matrix may be padded
    with rows that mean nothing. memory: of a single row, for the next call. Logits that are nan or
    infinite are a UserError, after the tokens before them.
    """
    config = model.config
    check_prompts(prompts, config.vocab_size)
    if memory is not None and len(prompts) > 1:
        raise UserError("a memory is of one text: give one prompt")
    vocab_size = min(vocab_size or config.vocab_size, config.vocab_size)
    limit = config.block_size
    rows = Rows.begin(prompts, sampling, seed, vocab_size, limit, model.output_weight.device)
    going = list(rows.ids)                      # rows that have not ended
    batch: list[int] = []                       # rows of the cache
    cache = None
    tokens = torch.zeros(0)
    was_training = model.training
    model.eval()
    try:
        for made in range(max_new_tokens):
            if cache is None or cache.end == cache.length:
                rows.crop(going, limit)
                batch = list(going)             # rows that have ended are left behind
                contexts = [rows.ids[r] for r in batch]
                room = min(limit, max(map(len, contexts)) + max_new_tokens - made)
                if memory is None:
                    logits, cache = prefill(model, contexts, room)
                else:
                    logits, cache = memory.recall(model, contexts[0], room)
            else:
                logits = decode(model, tokens, cache)
            tokens = rows.choose(logits[:, :vocab_size], batch)
            step: list[int | None] = [None] * len(prompts)
            for r, token in zip(batch, tokens.tolist()):
                if r in going:
                    step[r] = token
                    rows.ids[r].append(token)
            yield step
            going = [r for r in going if not ends(r, step[r])]
            if not going:
                break
    finally:
        if memory is not None and cache is not None:
            memory.ids = rows.ids[0][:cache.lengths[0]]
            memory.cache = cache
        model.train(was_training)


def sample_text(model: Any, tokenizer: Any, ids: list[int], sampling: Sampling, seed: int,
                max_new_tokens: int = 100) -> str:
    """Return ids and what follows as text, up to a stop token: the sample of a training run.

    A model that has become nan gives a sentence instead: a sample is no reason to end a run.
    """
    stops = set(tokenizer.stop_ids)
    ids = list(ids)
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

    def __init__(self, tokenizer: Any, stops: list[str], ends: set[int],
                 after: Sequence[int] = ()):
        self.decoder = tokenizer.stream(after)
        self.ends = ends
        self.stops = [s for s in stops if s]
        self.held = ""              # the end of the text, where a stop string may have begun
        self.over = False

    def put(self, token: int) -> str:
        """Return what may be printed now that `token` is there; set `over` at a stop."""
        if token in self.ends:
            rest = self.flush()
            self.over = True
            return rest
        return self._release(self.decoder.put(token))

    def flush(self) -> str:
        """Return what was held back, when the sample is as long as it may be."""
        if self.over:
            return ""
        rest = self._release(self.decoder.flush())      # it may complete a stop string, and clear
        rest += self.held                               # what is held
        self.held = ""
        return rest

    def _release(self, piece: str) -> str:
        self.held += piece
        starts = [i for s in self.stops if (i := self.held.find(s)) >= 0]
        if starts:
            out = self.held[:min(starts)]
            self.held = ""
            self.over = True
            return out
        # keep back the longest end of the text that is the beginning of a stop string
        keep = max((k for s in self.stops for k in range(1, len(s)) if self.held.endswith(s[:k])),
                   default=0)
        cut = len(self.held) - keep
        out = self.held[:cut]
        self.held = self.held[cut:]
        return out


def encode(tokenizer: Any, text: str) -> list[int]:
    """Return a prompt's ids, after the token that begins a text (Llama's <s>) if there is one; the
    end-of-text token may be written out in it, as in nanoGPT.

    Without a prompt a sample starts where documents do: after that first token, after
    end-of-text, or, in a vocabulary of characters, after a newline.
    """
    eot = tokenizer.eot
    first = list(tokenizer.prefix)
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
