"""Generate text: python sample.py, from the checkpoint of the last training run.

    python sample.py --prompt="Once upon a time"             # on any device
    python sample.py --model=DIR --num_samples=5             # any checkpoint directory, as a batch
    python sample.py --model=DIR --chat                      # talk to it; --quantize=int8: faster
    python sample.py --adapter=sums=out/lora,brief=DIR2 --chat      # LoRA, ours or PEFT's, by name
    python sample.py --start=FILE:prompt.txt --top_p=0.9     # nanoGPT's spelling works too
    echo "def main(" | python sample.py --temperature=0      # prompt from a pipe; 0 is greedy

Only the text goes to stdout; what model it is and its tokens/s go to stderr, and GB/s, the weights
and keys read per second: a decode step does little else, so memory bandwidth is its limit.

The same command gives the same text. In float32, sample r of --seed=S is the only sample of
--seed=S+r, and a prompt in a batch, of any lengths, gives the text that it gives alone. In other
types (a checkpoint's own is bfloat16 as a rule) it gives that text up to where two tokens are
nearly tied: sums over another batch are rounded in another order.

When the context is full, its last half is encoded again and generation goes on; a chat forgets its
oldest exchange instead. Each answer of a chat draws anew: answer k of --seed=S from S + k *
1000003, so the same turns give the same conversation. `/help` in a chat lists its commands.

    python sample.py --model=out/spam --prompt="You won" --device=cpu   # a classifier: its label

A checkpoint of `classify.py` labels its prompt, with --lines each line of it: one line
per text with the label and then every label's probability, separated by tabs.

Adapters bring their base model, and are added up until a chat says `/adapter brief` for that one,
or `/adapter` for none. They are merged into the weights: tokens cost no more, a switch loads again.
"""
from __future__ import annotations

import config  # noqa: F401  first, so that what fails while importing is a sentence
import contextlib
import difflib
import importlib
import os
import re
import stat
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Iterator

import torch

from text.chat import find_stop_ids, fit, refuse_unread
import kernels
from checkpoint import load_model, load_tokenizer, resolve
from config import Idle, UserError, refuse_idle, run
from formats.peft import CONFIG, FOLDER, find_base, load_adapter
from inference.labels import get_label_ids, get_text_length, predict_labels
from inference.generate import TURN, Memory, Sampling, Text, encode, generate
from layers.lora import activate, merge
from training.machine import Meter
from inference.quantize import pack
from text import files

SMALL = 4_000_000       # parameters; below, a second CPU thread costs more than it helps decode
SEPARATOR = "---------------"       # between several samples, nanoGPT's
COMMANDS = {
    "/help": "this list",
    "/new": "forget the conversation",
    "/adapter": "take the adapters that follow by name, none: the model alone",
    "/quit": "end; so do /exit, Ctrl-D and an empty line",
    "/exit": "",
}
# settings that a classifier heeds; it refuses the others
CLASSIFIES = ("out_dir", "model", "which", "adapter", "prompt", "start", "file", "lines", "device",
              "dtype", "backend", "quantize")


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
    think: bool | None = None       # of a model that can think first: True, False (to answer at
                                    # once), None (as its template does by default)
    # --- how much
    num_samples: int = 1            # of each prompt
    max_new_tokens: int = 500       # a sample ends here or at the end-of-text token
    temperature: float = 0.8        # 0: always the likeliest token; 1: the model's distribution
    top_k: int = 200                # keep the k likeliest tokens (0: all)
    seed: int = 1337                # of sample 0; sample r draws from seed + r, and the k-th
                                    # answer of a chat from seed + 1000003 k
    stop: list[str] = field(default_factory=list)   # strings, by commas, that end a sample unseen
    ignore_eot: bool = False        # go on after the end-of-text token
    # --- how to run and print
    stream: bool = True             # print a single sample while it grows
    echo: bool = True               # print the prompt before its continuation
    device: str = "auto"            # auto, cpu, cuda, cuda:1, mps
    dtype: str = "auto"             # auto (the file's), float32, bfloat16, float16
    backend: str = "auto"           # of the kernels: auto, reference, torch, triton, cuda
    quantize: str = ""              # int8 or int4: smaller weights, the same activations
    IDLE = (                        # which of these have no effect, and when
        Idle("system template think", "chat", lambda c, m: not c.chat, "without --chat"),
        Idle("echo stream", "chat", lambda c, m: c.chat, "in a chat"),
        Idle("top_k top_p min_p", "temperature", lambda c, m: c.temperature == 0,
             "with --temperature=0, which takes the likeliest token"))

# ------------------------------------------------------------------------------ what is asked


def read_prompt(cfg: Config) -> str:
    """Return the prompt, from wherever the settings say that it is; "" without one."""
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
        path = "stdin"
        data = sys.stdin.buffer.read()
    else:
        return text
    return files.decode(data, path)


def piped() -> bool:
    """Return whether stdin is a pipe or a file: not a terminal, /dev/null or closed."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError, AttributeError):       # closed, or replaced by a test
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)

# ------------------------------------------------------------------------ a model that speaks


def find_adapters(cfg: Config) -> dict[str, Path]:
    """Return name -> folder of what --adapter lists. A folder of PEFT's layout, a checkpoint that
    has one as adapter/, or a training run; without a name it goes by that of the folder."""
    found: dict[str, Path] = {}
    for word in cfg.adapter:
        name, equals, path = word.partition("=")
        if not equals or Path(word).is_dir():           # a folder may have a = in its name
            path = word
            name = re.sub(r"[^A-Za-z0-9_-]+", "-", Path(path).resolve().name)
        if name in found:
            raise UserError(f"--adapter: two are called {name}: say --adapter=ONE=DIR,OTHER=DIR")
        found[name] = folder = Path(path)
        if not (folder / CONFIG).is_file():
            with contextlib.suppress(UserError):
                found[name] = resolve(folder, cfg.which) / FOLDER
        if not (found[name] / CONFIG).is_file():
            raise UserError(f"--adapter: there is none at {path}: give a folder that has "
                            f"{CONFIG}, or the out_dir of a run with --lora_rank")
    return found


def find_model(cfg: Config, adapters: dict[str, Path]) -> Path:
    """Return the checkpoint that the flags name; without one, that which the adapters belong to."""
    named = bool(cfg.model) or "out_dir" in getattr(cfg, "given", ())
    directory = resolve(cfg.model or cfg.out_dir, cfg.which) if named or not adapters else None
    if directory and directory.resolve() in [path.resolve().parent for path in adapters.values()]:
        raise UserError(f"{directory} has its adapter merged into its weights: leave out --adapter,"
                        " or name the base with --model=DIR")
    if not adapters:
        return directory
    return find_base(list(adapters.values()), str(directory or ""), "--model", cfg.which)


class Served:
    """A checkpoint's model with the sum of some adapters merged into it, packed to be served."""

    def __init__(self, cfg: Config, directory: Path, adapters: dict[str, Path]):
        self.model = model = load_model(directory, cfg.device, cfg.dtype)
        for name, path in adapters.items():
            load_adapter(path, model, name)
        if adapters:
            activate(model, *adapters)
            merge(model)
        weight = model.output_weight
        count = model.parameter_count()
        if weight.device.type == "cpu" and count < SMALL:
            # a step is microseconds of work: threads would wait for each other
            torch.set_num_threads(1)
        print(f"{' + '.join([str(directory), *adapters])}: {count:,} parameters, "
              f"{cfg.quantize or weight.dtype} on {weight.device}", file=sys.stderr)
        # bytes that a token reads; the reference is there to be read: it takes weights as they are
        self.bytes = count * weight.itemsize if cfg.backend == "reference" and not cfg.quantize \
            else pack(model, cfg.quantize)
        self.itemsize = (model.compute_dtype or weight.dtype).itemsize

    def count_state_bytes(self, length: float) -> float:
        """Return the bytes of keys and values, or other states, of a row of `length` tokens."""
        return self.model.state_size(length) * self.itemsize


def generate_texts(cfg: Config, served: Served, tokenizer: Any, prompts: list[list[int]],
                   stops: set[int], stream: bool, seed: int, memory: Memory | None = None
                   ) -> tuple[list[str], Meter]:
    """Return the text after each prompt; with `stream` on stdout too, as it is made."""
    rows = [Text(tokenizer, cfg.stop, set() if cfg.ignore_eot else stops, ids) for ids in prompts]
    texts = [""] * len(rows)

    def put(r: int, piece: str) -> None:
        texts[r] += piece
        if stream:
            print(piece, end="", flush=True)

    steps = generate(served.model, prompts, cfg.max_new_tokens, cfg, seed, tokenizer.vocab_size,
                     lambda r, token: rows[r].over, memory)
    meter = Meter(prompts, served.bytes, served.count_state_bytes)
    try:
        for step in steps:
            meter.step(step)
            for r, token in enumerate(step):
                if token is not None:
                    put(r, rows[r].put(token))
            if not stream and sys.stderr.isatty():
                meter.show(cfg.max_new_tokens)
    except KeyboardInterrupt:                           # ends an answer, not the conversation
        if memory is None or not sys.stdin.isatty():
            raise
        steps.close()
        memory.ids = []                                 # it may have been cut within a step
        memory.cache = None
    for r, row in enumerate(rows):
        put(r, row.flush())
    return texts, meter

# ---------------------------------------------------------------------------------- to talk


def read_turn(line: str) -> str | list[str]:
    """Return a message, or the words of a command: a line that begins with one slash."""
    if line.startswith("//"):
        return line[1:]
    return line.split() if line.startswith("/") else line


def read_turns(cfg: Config) -> Iterator[str | list[str]]:
    """Yield what the user says: --prompt alone, the lines of a pipe, or of a terminal with editing.
    The content of a file is always a message: code may begin with //."""
    if typed := cfg.prompt or cfg.start or cfg.file:
        text = read_prompt(cfg)
        file = cfg.file or typed == "-" or typed.startswith("FILE:")
        yield text if file else read_turn(text)
        return
    if not sys.stdin.isatty():
        yield from map(read_turn, filter(str.strip, map(str.rstrip, files.lines())))
        return
    with contextlib.suppress(ImportError):              # Windows has none
        importlib.import_module("readline")             # arrow keys and history
    print("your turn; /help lists commands, an empty line or Ctrl-D ends, Ctrl-C stops an answer",
          file=sys.stderr)
    while True:
        print("\n> ", end="", file=sys.stderr, flush=True)
        try:
            line = input()
        except EOFError:
            return
        if not line.strip():
            return
        yield read_turn(line)


def check_command(words: list[str], adapters: dict[str, Path]) -> str:
    """Return what is wrong with a command of a chat, "" if nothing is."""
    name, *rest = words
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        return (f"there is no command {name!r}: {hint}/help lists them; begin with // for a message"
                " that begins with /")
    if name != "/adapter":
        return f"{name} stands alone on its line, got {' '.join(words)!r}" if rest else ""
    odd = [n for n in rest if n not in adapters]
    return (f"there is no adapter {odd[0]!r}, only {', '.join(adapters) or 'the model'}: see "
            "--adapter") if odd else ""


def chat(cfg: Config, directory: Path, adapters: dict[str, Path], tokenizer: Any) -> None:
    """Turns of a user, and the model's answers on stdout; earlier turns are not computed again."""
    name = cfg.template or tokenizer.template
    stops = find_stop_ids(tokenizer, name)
    opening = [{"role": "system", "content": cfg.system}] if cfg.system else []
    messages = list(opening)
    memory = Memory()
    served = Served(cfg, directory, adapters)
    refuse_unread(tokenizer, name, enable_thinking=cfg.think)
    thinking = {} if cfg.think is None else {"enable_thinking": cfg.think}

    def render(turns: list[dict]) -> list[int]:
        return tokenizer.render(turns, name, add_generation_prompt=True, **thinking)[0]

    # an answer has room for its --max_new_tokens, or for half of a small context
    limit = served.model.config.block_size
    room = max(1, limit - cfg.max_new_tokens, limit // 2)
    answers = 0                         # of this process, so that /new repeats nothing either
    for turn in read_turns(cfg):
        if isinstance(turn, list):
            word, *names = turn
            if wrong := check_command(turn, adapters):
                if not sys.stdin.isatty():
                    raise UserError(wrong)
                print(wrong, file=sys.stderr)
            elif word == "/help":
                print("\n".join(f"{c:10}{text}" for c, text in COMMANDS.items() if text),
                      "//...     a message that begins with one slash", sep="\n", file=sys.stderr)
            elif word == "/new":
                messages = list(opening)
                memory = Memory()
            elif word == "/adapter":
                # what is remembered are keys of other weights; there is no room for two models
                served = None
                memory = Memory()
                served = Served(cfg, directory, {n: adapters[n] for n in names})
            else:
                return
            continue
        messages.append({"role": "user", "content": turn})
        ids = fit(render, messages, room)
        seed = cfg.seed + answers * TURN
        answers += 1
        (answer,), meter = generate_texts(cfg, served, tokenizer, [ids], stops, True, seed, memory)
        print(flush=True)
        messages.append({"role": "assistant", "content": answer})
        print(f"({meter})", file=sys.stderr)

def read_lines(text: str) -> list[str]:
    """Return the lines of a prompt with --lines; empty ones have no answer, which is noted."""
    texts = files.split_lines(text)
    empty = len(text.replace("\r\n", "\n").removesuffix("\n").split("\n")) - len(texts)
    if empty and texts:
        print(f"note: --lines: {empty} empty line{'s' * (empty > 1)} left out, so that there are "
              f"{len(texts)} answers", file=sys.stderr)
    return texts

# ------------------------------------------------------------------------------- a classifier


def label(cfg: Config, directory: Path, adapters: dict[str, Path], tokenizer: Any, text: str
          ) -> None:
    """Print the label of the prompt, or of each of its lines, and the labels' probabilities."""
    if cfg.chat:
        raise UserError(f"{directory} is a classifier, which labels a text and cannot chat: leave "
                        "out --chat")
    if idle := [name for name in getattr(cfg, "given", ()) if name not in CLASSIFIES]:
        raise UserError(f"--{min(idle)} has no effect on a classifier, as {directory} is: leave it "
                        "out")
    # the newline at the end of a file or a pipe is none of the text
    texts = read_lines(text) if cfg.lines else [text.rstrip("\r\n")]
    if not "".join(texts).strip():
        raise UserError("there is no text to label: give it with --prompt, --file or a pipe")
    served = Served(cfg, directory, adapters)
    names = list(get_label_ids(tokenizer))
    length = get_text_length(tokenizer, served.model.config)
    for row in predict_labels(served.model, tokenizer, texts, length):
        order = row.argsort(descending=True, stable=True).tolist()
        print(names[order[0]], *(f"{names[k]} {row[k]:.4f}" for k in order), sep="\t", flush=True)

# ----------------------------------------------------------------------------- the script


def main(cfg: Config) -> None:
    kernels.use(cfg.backend)
    if cfg.num_samples < 1 or cfg.max_new_tokens < 1:
        raise UserError("--num_samples and --max_new_tokens must be at least 1")
    if cfg.chat and (cfg.num_samples > 1 or cfg.lines):
        raise UserError("--chat is one conversation: leave out --num_samples and --lines")
    refuse_idle(cfg)
    adapters = find_adapters(cfg)
    directory = find_model(cfg, adapters)
    text = "" if cfg.chat else read_prompt(cfg)
    tokenizer = load_tokenizer(directory)
    if get_label_ids(tokenizer):
        return label(cfg, directory, adapters, tokenizer, text)
    if cfg.chat:
        return chat(cfg, directory, adapters, tokenizer)
    texts = read_lines(text) if cfg.lines else [text]
    if not texts:
        raise UserError("--lines: the prompt has no line with text")
    texts = [t for t in texts for _ in range(cfg.num_samples)]
    prompts = [encode(tokenizer, t) for t in texts]
    served = Served(cfg, directory, adapters)
    stream = cfg.stream and len(texts) == 1
    before = texts if cfg.echo else [""] * len(texts)
    print(before[0] if stream else "", end="", flush=True)
    samples, meter = generate_texts(cfg, served, tokenizer, prompts, set(tokenizer.stop_ids),
                                    stream, cfg.seed)
    print("" if stream else f"\n{SEPARATOR}\n".join(map("".join, zip(before, samples))), flush=True)
    print("\n" * sys.stderr.isatty() + str(meter), file=sys.stderr)     # leave the live line


if __name__ == "__main__":
    run(main, Config)
