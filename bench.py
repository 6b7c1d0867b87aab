"""Time our code beside the libraries that do the same, in one run on one machine.

    python bench.py tokenizer                   # CPU: training and encoding, about a minute
    python bench.py tokenizer --repeat=9        # more rounds, a better median
    python bench.py train --repeat=3 --nanogpt=../nanoGPT    # CPU: beside a clone of nanoGPT
    python bench.py sample --model=DIR          # CPU or GPU: beside transformers
    python bench.py kernels                     # CPU or GPU: every operation in each of its forms
    python bench.py stages --model=DIR          # CPU: fine-tuning beside trl and peft
    python bench.py families                    # the examples of config/, trained

Each section is a function in SECTIONS. Contenders take turns within a round, so that a busy moment
of the machine hits all of them; the table shows the median over rounds, the spread, and the ratio
to the section's yardstick, which is what to compare between machines. A library that is not
installed is left out. The last line of stdout is one JSON object with every number.
"""
from __future__ import annotations

import config  # noqa: F401  first, so that what fails while importing is a sentence
import importlib
import json
import math
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
    model: str = ""             # sample: a checkpoint; empty: SmolLM2-135M's shape, random weights
    dataset: str = "stdlib_chat"    # stages: conversations that sft.py could train on
    only: str = ""              # kernels: operations, stages: sft, lora, dpo; joined by +
    dtype: str = "bfloat16"     # kernels: of the activations


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
    from text.bpe import chunks

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


def steps(note: Callable[[str, float], None], title: str, *args: str) -> None:
    """Note tokens/s and peak memory of train.py's steps on Tiny Shakespeare."""
    with tempfile.TemporaryDirectory() as folder:
        script(ROOT, *args, "--dataset=shakespeare_char", f"--out_dir={folder}/out",
               "--eval_iters=1", "--eval_interval=1000", "--log_interval=1")
        rows = [json.loads(x) for x in open(f"{folder}/out/log.jsonl", encoding="utf-8")]
    rows = [r for r in rows if "loss" in r and r["step"] > 2]
    note(f"{title}, tokens/s", statistics.median(r["tokens_per_second"] for r in rows))
    if rows[-1]["memory"] is not None:
        note(f"{title}, peak GB", rows[-1]["memory"])


def train_on_gpu(cfg: Config) -> dict[str, Any]:
    """Steps of GPT-2 124M at T 1024, batch 12, by backend; nanoGPT's own bench.py beside it."""
    out: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        out.setdefault(name, []).append(value)
        print(f"\r{name}: {value:,.4g}{'':20}", file=sys.stderr)

    shape = ("config/gpt2_small.py", "--batch_size=12", "--gradient_accumulation_steps=1",
             "--max_iters=40")
    for _ in range(cfg.repeat):
        for backend in ("reference", "torch", "auto", "cuda"):
            for compiled in (0, 1):
                steps(note, f"124M: --backend={backend} --compile={compiled}", *shape,
                      f"--backend={backend}", f"--compile={compiled}")
        if cfg.nanogpt:
            done = subprocess.run([sys.executable, "bench.py", "--real_data=False"],
                                  cwd=cfg.nanogpt, text=True, stdout=subprocess.PIPE)
            ms = float(re.findall(r"time per iteration: ([\d.]+)ms", done.stdout)[-1])
            note("124M: nanoGPT compiled, tokens/s", 12 * 1024e3 / ms)
            note("124M: ours / nanoGPT", out["124M: --backend=auto --compile=1, tokens/s"][-1]
                 / out["124M: nanoGPT compiled, tokens/s"][-1])
    summary(out)
    return {"results": out}


def train(cfg: Config) -> dict[str, Any]:
    """Our train.py and, with --nanogpt=DIR, nanoGPT's, on Tiny Shakespeare on this machine."""
    import torch
    from data import loader
    from model import ModelConfig, Transformer

    loader.Dataset(loader.find("shakespeare_char"))           # or one sentence, before any run
    theirs = Path(cfg.nanogpt) if cfg.nanogpt else None
    if theirs and not (theirs / "data/shakespeare_char/train.bin").exists():
        raise UserError(f"{theirs} is no nanoGPT with its data: clone it there and run "
                        "python data/shakespeare_char/prepare.py in it")
    if torch.cuda.is_available():
        return train_on_gpu(cfg)
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
                times = [float(x) for x in re.findall(r"iter [1-9]\d*:.*time ([\d.]+)ms", text)]
                note("6/6/384: nanoGPT, tokens/s", 64 * 256e3 / statistics.median(times))
            for title, form, n in (("ours", "auto", 8), ("torch", "torch", 8),
                                   ("reference", "reference", 4)):
                steps(note, f"6/6/384: {title}", str(config), "--device=cpu",
                      f"--max_iters={n}", f"--backend={form}")
            if theirs:
                seconds, text = script(theirs, "config/train_shakespeare_char.py",
                                       "--compile=False", where, *SMALL)
                note("README command: nanoGPT, seconds", seconds)
                note("README command: nanoGPT, val loss",
                     float(re.findall(r"step 2000: .*val loss ([\d.]+)", text)[-1]))
            # 30 x 8 windows to validate on are nanoGPT's 20 batches of 12
            for title, args in (("README command: ours", [str(config), *SMALL, "--eval_iters=30"]),
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
    summary(out)
    return {"results": out}


EXAMPLES = ("llama", "qwen3", "qwen3_moe", "gemma3", "glm4", "minicpm", "glm4_moe")


def families(cfg: Config) -> dict[str, Any]:
    """config/'s one small example of each family, trained as it stands on the default corpus."""
    out: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in EXAMPLES:
            seconds, text = script(ROOT, f"config/{name}.py", f"--out_dir={folder}/{name}")
            rows = [json.loads(x) for x in open(f"{folder}/{name}/log.jsonl", encoding="utf-8")]
            out[f"{name}: val loss"] = [[r["val_loss"] for r in rows if "val_loss" in r][-1]]
            out[f"{name}: seconds"] = [seconds]
            rates = [r["tokens_per_second"] for r in rows if "loss" in r and r["step"] > 2]
            out[f"{name}: tokens/s"] = [statistics.median(rates)]
            print(f"\r{name}: {out[f'{name}: val loss'][0]:.4f}, {seconds:.0f} s", file=sys.stderr)
    summary(out)
    return {"results": out}


# --- generation -----------------------------------------------------------------------------

QUESTIONS = ("What is the capital of France?", "Write a short poem about the sea.",
             "Explain photosynthesis in simple words.", "What is 17 plus 25?",
             "Name three animals that live in Africa.", "How do I boil an egg?",
             "Translate 'good morning' into Spanish.", "Why is the sky blue?",
             "Write a Python function that adds two numbers.", "Tell me a story about a dragon.")
NEW = 100                       # tokens a timed sample has


def perplexity(model: Any, ids: list[int], width: int = 512) -> float:
    """exp of the mean loss of ids in rows of `width`, each token with what precedes it there."""
    import torch
    import kernels
    total, count = 0.0, 0
    with torch.no_grad():
        for i in range(0, len(ids) - width, width):
            row = torch.tensor([ids[i:i + width + 1]], device=model.output_weight.device)
            logits = model(row[:, :-1]).float()
            total += float(kernels.cross_entropy(logits, row[:, 1:]))
            count += width
    return math.exp(total / count)


def sample(cfg: Config) -> dict[str, Any]:
    """Prompt and decode rates of a model in each type, beside transformers on the same weights."""
    import torch
    from checkpoint import load_model, load_tokenizer, save_model
    from model import Transformer
    from inference.generate import Sampling, generate
    from families.presets import preset
    from inference.quantize import pack
    out: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        out.setdefault(name, []).append(value)
        print(f"\r{name}: {value:,.4g}{'':20}", file=sys.stderr)

    with tempfile.TemporaryDirectory() as folder:
        where = Path(cfg.model or folder)
        if not cfg.model:
            save_model(where, Transformer(preset("smollm2-135m")).bfloat16(), None)
        tok = load_tokenizer(where) if cfg.model else None
        ours, weights, theirs = {}, {}, {}
        for name, dtype, quantize in (("float32", "float32", ""), ("bfloat16", "bfloat16", ""),
                                      ("int8", "bfloat16", "int8"), ("int4", "bfloat16", "int4")):
            start = time.perf_counter()
            ours[name] = load_model(where, "auto", dtype)
            note(f"{name}: loaded, seconds", time.perf_counter() - start)
            weights[name] = pack(ours[name], quantize)
            note(f"{name}: loaded and packed, seconds", time.perf_counter() - start)
        try:
            from transformers import AutoModelForCausalLM
            device = ours["float32"].output_weight.device
            for name in ("float32", "bfloat16"):
                theirs[name] = AutoModelForCausalLM.from_pretrained(
                    where, dtype=getattr(torch, name)).to(device).eval()
        except ImportError:
            print("transformers is not installed: left out")

    vocab, device = ours["float32"].config.vocab_size, ours["float32"].output_weight.device
    prompts = torch.randint(0, vocab, (8, 512), generator=torch.Generator().manual_seed(0))
    contenders = [(f"ours {n}", m) for n, m in ours.items()]
    contenders += [(f"transformers {n}", m) for n, m in theirs.items()]

    def run(model: Any, rows: int, length: int, new: int, **options) -> float:
        """Seconds to continue `rows` prompts by `new` tokens."""
        ids = prompts[:rows, :length]
        start = time.perf_counter()
        if isinstance(model, Transformer):
            steps = list(generate(model, ids.tolist(), new, Sampling(temperature=0), **options))
            assert len(steps) == new or options
        else:
            ids = ids.to(device)
            with torch.inference_mode():
                model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                               max_new_tokens=new, min_new_tokens=new, eos_token_id=None,
                               pad_token_id=0)
        return time.perf_counter() - start

    for _, model in contenders:
        run(model, 1, 16, 8)                                # warm caches, compile what there is
    for _ in range(cfg.repeat):
        for name, model in contenders:
            note(f"{name}: prompt of 512, tokens/s", 512 / run(model, 1, 512, 1))
            short = run(model, 1, 16, 1)
            seconds = run(model, 1, 16, NEW) - short        # the decode steps alone
            note(f"{name}: batch 1, tokens/s", (NEW - 1) / seconds)
            if name.startswith("ours"):
                note(f"{name}: batch 1, GB/s of weights",
                     weights[name.split()[1]] * (NEW - 1) / seconds / 1e9)
            short = run(model, 8, 16, 1)
            note(f"{name}: batch 8, tokens/s", 8 * (NEW - 1) / (run(model, 8, 16, NEW) - short))
    facts: dict[str, Any] = {"bytes a step": weights}
    if tok is not None:
        import pydoc_data.topics
        text = "\n".join(pydoc_data.topics.topics.values())        # Python's own manual
        ids = tok.encode_ordinary(text)[:4097]
        for name, model in ours.items():
            note(f"ours {name}: perplexity of Python's manual", perplexity(model, ids))
        equal = 0
        for question in QUESTIONS if theirs else ():
            said = [{"role": "user", "content": question}]
            asked = tok.render(said, add_generation_prompt=True)[0]
            made = [s[0] for s in generate(ours["float32"], [asked], 60, Sampling(temperature=0),
                                           ends=lambda r, t: t in tok.stop_ids)]
            ids = torch.tensor([asked])
            with torch.inference_mode():
                answer = theirs["float32"].generate(
                    ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=60,
                    eos_token_id=sorted(tok.stop_ids), pad_token_id=0)[0, ids.shape[1]:].tolist()
            equal += made == answer
            for name in ("bfloat16", "int8"):               # a text that quotes its prompt
                start = time.perf_counter()
                count = len(list(generate(ours[name], [asked], 60, Sampling(temperature=0),
                                          ends=lambda r, t: t in tok.stop_ids, speculate=4)))
                note(f"ours {name}: guessing 4, tokens/s with the prompt",
                     count / (time.perf_counter() - start))
        if theirs:
            print(f"{equal} of {len(QUESTIONS)} greedy answers in float32 are transformers', "
                  "token for token")
            facts["equal answers"] = equal
    for kind in ("float32", "bfloat16"):
        for what in ("prompt of 512", "batch 1", "batch 8"):
            a, b = (out.get(f"{who} {kind}: {what}, tokens/s") for who in ("ours", "transformers"))
            if b:
                out[f"{kind}: {what}, ours / transformers"] = [x / y for x, y in zip(a, b)]
    for name in ours:
        rates = [out[f"ours {name}: batch {rows}, tokens/s"] for rows in (8, 1)]
        out[f"ours {name}: batch 8 / batch 1"] = [x / y for x, y in zip(*rates)]
    summary(out)
    return {"results": out, **facts}


def summary(out: dict[str, list[float]]) -> None:
    """A row a measure: median, least and largest."""
    print(f"{'':52}{'median':>12}{'min':>12}{'max':>12}")
    for name, values in out.items():
        print(f"{name:52}{statistics.median(values):12,.4g}{min(values):12,.4g}"
              f"{max(values):12,.4g}")


# --- the table of sections ------------------------------------------------------------------

# A section takes the Config and returns what goes into the JSON line; it prints its own table.
SECTIONS: dict[str, Callable[[Config], dict[str, Any]]] = {
    "tokenizer": tokenizer,
    "train": train,
    "sample": sample,
    "families": families,
    "kernels": lambda cfg: importlib.import_module("benchmarks.kernels").section(cfg),
    "stages": lambda cfg: importlib.import_module("benchmarks.stages").section(cfg),
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
