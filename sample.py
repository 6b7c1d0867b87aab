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
from text import files

SMALL = 4_000_000       # parameters; below, a second CPU thread costs more than it helps decode
SEPARATOR = "---------------"       # between several samples, nanoGPT's


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

# ------------------------------------------------------------------------------ what is asked


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
    return files.decode(data, path)


def piped() -> bool:
    """Whether stdin is a pipe or a file: not a terminal, nor the nothing of a background job."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError, AttributeError):       # closed, or replaced by a test
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)

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
        yield from filter(str.strip, map(str.rstrip, files.lines()))
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
    stops = templates.stop_ids(tokenizer, name)
    opening = [{"role": "system", "content": cfg.system}] if cfg.system else []
    messages, memory, served = list(opening), Memory(), Served(cfg, directory, adapters)
    if not cfg.think:
        templates.refuse_unread(tokenizer, name, enable_thinking=False)

    def render(said: list[dict]) -> list[int]:
        return tokenizer.render(said, name, add_generation_prompt=True,
                                enable_thinking=None if cfg.think else False)[0]

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
