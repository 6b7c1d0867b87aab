"""Time our code beside the libraries that do the same, in one run on one machine.

    python bench.py tokenizer                   # CPU: training and encoding, about a minute
    python bench.py tokenizer --repeat=9        # more rounds, a better median
    python bench.py train --repeat=3 --nanogpt=../nanoGPT    # CPU: beside a clone of nanoGPT

Each section is a function in SECTIONS. Contenders take turns within a round, so that a busy moment
of the machine hits all of them; the table shows the median over rounds, the spread, and the ratio
to the section's yardstick, which is what to compare between machines. A library that is not
installed is left out. The last line of stdout is one JSON object with every number.
"""
from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

from config import UserError, run


@dataclass
class Config:
    section: str = ""           # what to time: a name in SECTIONS
    repeat: int = 5             # rounds; each runs every contender once
    vocab_size: int = 16384     # tokenizer: entries to learn
    text: str = ""              # tokenizer: a UTF-8 file instead of Python's standard library
    nanogpt: str = ""           # train: a clone of nanoGPT, its shakespeare_char prepared


# --- measuring ------------------------------------------------------------------------------

def rounds(contenders: dict[str, Callable[[], Any]], repeat: int) -> dict[str, list[float]]:
    """Seconds of every call: {name: [one number a round]}. Contenders alternate."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for k in range(repeat):
        for name, work in contenders.items():
            print(f"\rround {k + 1}/{repeat}: {name:<40}", end="", file=sys.stderr, flush=True)
            start = time.perf_counter()
            work()
            seconds[name].append(time.perf_counter() - start)
    print(f"\r{'':60}\r", end="", file=sys.stderr, flush=True)
    return seconds


def table(title: str, seconds: dict[str, list[float]], amount: float, unit: str,
          yardstick: str) -> dict[str, dict[str, float]]:
    """Print a row a contender, and return the same numbers for the JSON line.

    amount: the work of one call in `unit` (megabytes, tokens), for the rate. yardstick: the
    contender that the others' time is divided by; without it (not installed), no ratios.
    """
    base = statistics.median(seconds[yardstick]) if yardstick in seconds else None
    print(f"{title:<36}{'median s':>10}{'min':>9}{'max':>9}{unit + '/s':>10}{'ratio':>8}")
    out = {}
    for name, times in seconds.items():
        median = statistics.median(times)
        ratio = "" if base is None else f"{median / base:8.2f}"
        print(f"  {name:<34}{median:10.3f}{min(times):9.3f}{max(times):9.3f}"
              f"{amount / median:10.1f}{ratio}")
        out[name] = {"median": median, "min": min(times), "max": max(times),
                     "rate": amount / median, **({} if base is None else {"ratio": median / base})}
    return out


def machine() -> dict[str, Any]:
    """What ran this, for the reader of a number."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        model = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")),
                     model)
    return {"cpu": model, "cores": os.cpu_count(), "python": platform.python_version(),
            "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None}


# --- tokenizer ------------------------------------------------------------------------------

def stdlib_texts() -> list[str]:
    """The sources of Python's standard library, without tests: 12 MB on every machine."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    texts = []
    for path in sorted(root.rglob("*.py")):
        if skip.isdisjoint(path.relative_to(root).parts):
            try:
                texts.append(path.read_text(encoding="utf-8"))
            except UnicodeDecodeError:
                pass                        # a few files are Latin-1, to test the parser
    return texts


def tokenizer(cfg: Config) -> dict[str, Any]:
    """Training against `tokenizers`; encoding against tiktoken and `tokenizers`."""
    import tokenizer as ours
    from bpe import chunks

    texts = list(ours.file_texts([cfg.text])) if cfg.text else stdlib_texts()
    megabytes = sum(len(t.encode()) for t in texts) / 1e6
    print(f"{len(texts)} texts, {megabytes:.1f} MB, {cfg.vocab_size} entries")

    # the same job for both: GPT-2's pattern, the whole byte alphabet, one control token
    training: dict[str, Callable[[], Any]] = {
        "ours": lambda: ours.train(texts, cfg.vocab_size),
        "ours, one process": lambda: ours.train(texts, cfg.vocab_size, workers=1)}
    try:
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    except ImportError:
        Tokenizer = None
        print("tokenizers is not installed: left out")

    def train_theirs() -> Any:
        theirs = Tokenizer(models.BPE())
        theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        theirs.train_from_iterator(texts, trainers.BpeTrainer(
            vocab_size=cfg.vocab_size, special_tokens=[ours.EOT], show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
        return theirs

    if Tokenizer:
        training["tokenizers"] = train_theirs
    out = {"train": table("train", rounds(training, cfg.repeat), megabytes, "MB", "tokenizers")}

    # all encode with the same vocabulary, document by document; by hand from a cold cache
    tok = ours.train(texts, cfg.vocab_size)
    fast = tok.tiktoken

    def by_hand() -> list[list[int]]:
        tok.__dict__.pop("_cache", None)
        return [tok.encode(t, disallowed_special=()) for t in texts]

    encoding: dict[str, Callable[[], Any]] = {
        "by hand": by_hand,
        "fast": lambda: [tok.encode_fast(t, disallowed_special=()) for t in texts],
        "tiktoken": lambda: [fast.encode(t, disallowed_special=()) for t in texts],
        "fast, batch on all cores": lambda: tok.encode_batch(texts),
        "split alone": lambda: [sum(map(len, chunks(tok.pattern, t))) for t in texts]}
    if Tokenizer:
        theirs = Tokenizer.from_str(json.dumps(tok._json()))
        encoding["tokenizers, batch on all cores"] = lambda: theirs.encode_batch(texts)
        if [e.ids for e in theirs.encode_batch(texts)] != by_hand():
            raise UserError("tokenizers and our encode() give different ids: times mean nothing")
    if encoding["fast"]() != encoding["tiktoken"]() or encoding["fast"]() != by_hand():
        raise UserError("tiktoken and our encode() give different ids: times mean nothing")
    out["encode"] = table("encode", rounds(encoding, cfg.repeat), megabytes, "MB", "tiktoken")
    return {"megabytes": megabytes, "vocab_size": cfg.vocab_size, **out}


# --- training -------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parent
# nanoGPT's README command for a CPU, and its 6/6/384 configuration cut to a few steps
SMALL = ("--device=cpu --eval_iters=20 --log_interval=1 --block_size=64 --batch_size=12 "
         "--n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 "
         "--dropout=0.0").split()
LARGE = "--device=cpu --max_iters={} --eval_iters=1 --eval_interval=1000 --log_interval=1".split()


def script(folder: Path, *args: str) -> tuple[float, str]:
    """Run `python train.py ARGS` in a folder: (wall seconds with start-up, what it printed)."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "train.py", *args], cwd=folder, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        raise UserError(f"python train.py {' '.join(args)} in {folder} ended with status "
                        f"{done.returncode}: {done.stdout[-300:]}")
    return time.perf_counter() - start, done.stdout


def gemm_roof(dtype: Any) -> float:
    """GFLOP/s of a 2048-cubed matmul, the best of ten: what no training step can exceed."""
    import torch
    a, b = (torch.randn(2048, 2048).to(dtype) for _ in range(2))
    times = []
    for _ in range(10):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * 2048 ** 3 / min(times) / 1e9


def train(cfg: Config) -> dict[str, Any]:
    """Our train.py and, with --nanogpt=DIR, nanoGPT's, on Tiny Shakespeare on this CPU."""
    import torch
    from data import loader
    from model import ModelConfig, Transformer

    loader.Dataset(loader.find("shakespeare_char"))           # or one sentence, before any run
    theirs = Path(cfg.nanogpt) if cfg.nanogpt else None
    if theirs and not (theirs / "data/shakespeare_char/train.bin").exists():
        raise UserError(f"{theirs} is no nanoGPT with its data: clone it there and run "
                        "python data/shakespeare_char/prepare.py in it")
    config = ROOT / "config/nanogpt_shakespeare_char.py"
    out: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        out.setdefault(name, []).append(value)
        print(f"\r{name}: {value:,.4g}{'':20}", file=sys.stderr)

    with tempfile.TemporaryDirectory() as folder:
        where = f"--out_dir={folder}/out"
        for _ in range(cfg.repeat):
            for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
                note(f"{name} GEMM roof, GFLOP/s", gemm_roof(dtype))
            if theirs:
                text = script(theirs, "config/train_shakespeare_char.py", "--compile=False",
                              where, *(a.format(4) for a in LARGE))[1]
                steps = [float(x) for x in re.findall(r"iter [1-9]\d*:.*time ([\d.]+)ms", text)]
                note("6/6/384: nanoGPT, tokens/s", 64 * 256e3 / statistics.median(steps))
            script(ROOT, str(config), where, *(a.format(8) for a in LARGE))
            rows = [json.loads(x) for x in open(f"{folder}/out/log.jsonl")]
            rates = [r["tokens_per_second"] for r in rows if "loss" in r and r["step"] > 2]
            note("6/6/384: ours, tokens/s", statistics.median(rates))
            if theirs:
                seconds, text = script(theirs, "config/train_shakespeare_char.py",
                                       "--compile=False", where, *SMALL)
                note("README command: nanoGPT, seconds", seconds)
                note("README command: nanoGPT, val loss",
                     float(re.findall(r"step 2000: .*val loss ([\d.]+)", text)[-1]))
            for title, args in (("README command: ours", [str(config), *SMALL]),
                                ("config/shakespeare_char.py", ["config/shakespeare_char.py"])):
                seconds, text = script(ROOT, *args, where)
                note(f"{title}, seconds", seconds)
                note(f"{title}, val loss", float(re.findall(r"val_loss ([\d.]+)", text)[-1]))
    shape = ModelConfig(vocab_size=65, block_size=256, n_layer=6, n_head=6, n_embd=384)
    flops = Transformer(shape).flops_per_token(256)
    share = [r * flops / 1e9 / g for r, g in zip(out["6/6/384: ours, tokens/s"],
                                                 out["bf16 GEMM roof, GFLOP/s"])]
    out["6/6/384: ours, share of the bf16 roof"] = share
    for a, b, name in (("6/6/384: ours, tokens/s", "6/6/384: nanoGPT, tokens/s", "6/6/384: speed"),
                       ("README command: ours, seconds", "README command: nanoGPT, seconds",
                        "README command: time"),
                       ("config/shakespeare_char.py, seconds", "README command: nanoGPT, seconds",
                        "config/shakespeare_char.py: time")):
        if b in out:
            out[f"{name}, ours / nanoGPT"] = [x / y for x, y in zip(out[a], out[b])]
    print(f"{'':46}{'median':>12}{'min':>12}{'max':>12}")
    for name, values in out.items():
        print(f"{name:46}{statistics.median(values):12,.4g}{min(values):12,.4g}"
              f"{max(values):12,.4g}")
    return {"results": out}


# --- the table of sections ------------------------------------------------------------------

# A section takes the Config and returns what goes into the JSON line; it prints its own table.
SECTIONS: dict[str, Callable[[Config], dict[str, Any]]] = {
    "tokenizer": tokenizer,
    "train": train,
}


def main(cfg: Config) -> None:
    if cfg.section not in SECTIONS:
        raise UserError(f"say what to time: python bench.py {'|'.join(SECTIONS)}")
    if cfg.repeat < 1:
        raise UserError(f"repeat={cfg.repeat} has to be at least 1")
    result = SECTIONS[cfg.section](cfg)
    print(json.dumps({"section": cfg.section, "repeat": cfg.repeat, **machine(), **result}))


if __name__ == "__main__":
    run(main, Config, positional=("section",))
