"""python bench.py train: pretraining beside nanoGPT; python bench.py families: small examples.

    python bench.py train --repeat=3 --nanogpt=../nanoGPT    # beside a clone, its data prepared
    python bench.py families                                 # one small model of each family

Every measurement is a process that runs train.py, ours and nanoGPT's in turns, on Tiny Shakespeare.
tokens/s is the median over the steps after the second. The GEMM roof is the best of ten square
matmuls in the same run: the rate that no training step can exceed.
"""
from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from config import UserError, refuse_to_run

import torch

from benchmarks.common import ROOT, Results
from data import loader
from model import ModelConfig, Transformer

# nanoGPT's README command for a CPU, and its 6/6/384 configuration cut to a few steps
SMALL = ("--device=cpu --eval_iters=20 --log_interval=1 --block_size=64 --batch_size=12 "
         "--n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 "
         "--dropout=0.0").split()
LARGE = ("--device=cpu --max_iters=4 --eval_iters=1 --eval_interval=1000 "
         "--log_interval=1").split()
CONFIG = "config/nanogpt_shakespeare_char.py"
THEIR_CONFIG = "config/train_shakespeare_char.py"
# flags of config/tiny.py for one example of each kind of family
EXAMPLES = {
    "llama": "", "qwen3": "--head_dim=64", "glm4": "", "gemma3": "--sliding_window=64",
    "minicpm": "--n_kv_head=6 --schedule=wsd",
    "qwen3_moe": "--num_experts=8 --moe_intermediate_size=256",
    "glm4_moe": "--num_experts=8 --moe_intermediate_size=192 --router_aux_loss_coef=0 "
                "--router_bias_rate=0.01"}


def run_train(folder: Path, *args: str) -> tuple[float, str]:
    """Run `python train.py ARGS` in a folder; return wall seconds with start-up, and its output."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "train.py", *args], cwd=folder, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        raise UserError(f"python train.py {' '.join(args)} in {folder} ended with status "
                        f"{done.returncode}: {done.stdout[-300:]}")
    return time.perf_counter() - start, done.stdout


def read_log(folder: str) -> list[dict[str, Any]]:
    """Return the lines of a run's log.jsonl."""
    with open(f"{folder}/log.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def find_rate(rows: list[dict[str, Any]]) -> float:
    """Return the median tokens/s of a log, without the first two steps, which warm up."""
    return statistics.median(r["tokens_per_second"] for r in rows
                             if "loss" in r and r["step"] > 2)


def measure_gemm_roof(dtype: torch.dtype) -> float:
    """Return GFLOP/s of a 2048-cubed matmul, the best of ten."""
    a = torch.randn(2048, 2048).to(dtype)
    b = torch.randn(2048, 2048).to(dtype)
    times = []
    for _ in range(10):
        start = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - start)
    return 2 * 2048 ** 3 / min(times) / 1e9


def time_steps(results: Results, title: str, *args: str) -> None:
    """Note tokens/s and peak memory of our train.py's steps on Tiny Shakespeare."""
    with tempfile.TemporaryDirectory() as folder:
        run_train(ROOT, *args, "--dataset=shakespeare_char", f"--out_dir={folder}/out",
                  "--eval_iters=1", "--eval_interval=1000", "--log_interval=1")
        rows = read_log(f"{folder}/out")
    results.note(f"{title}, tokens/s", find_rate(rows))
    memory = [r["memory"] for r in rows if "loss" in r][-1]
    if memory is not None:
        results.note(f"{title}, peak GB", memory)


def run_on_gpu(cfg: Any) -> dict[str, Any]:
    """Time steps of GPT-2 124M at T 1024, batch 12, by backend; nanoGPT's own bench.py too."""
    results = Results()
    shape = ("config/gpt2_small.py", "--batch_size=12", "--gradient_accumulation_steps=1",
             "--max_iters=40")
    for _ in range(cfg.repeat):
        with results.round():
            for backend in ("reference", "torch", "auto", "cuda"):
                for compiled in (0, 1):
                    time_steps(results, f"124M: --backend={backend} --compile={compiled}", *shape,
                               f"--backend={backend}", f"--compile={compiled}")
            if cfg.nanogpt:
                done = subprocess.run([sys.executable, "bench.py", "--real_data=False"],
                                      cwd=cfg.nanogpt, text=True, stdout=subprocess.PIPE)
                ms = float(re.findall(r"time per iteration: ([\d.]+)ms", done.stdout)[-1])
                results.note("124M: nanoGPT compiled, tokens/s", 12 * 1024e3 / ms)
    results.compare("124M: ours / nanoGPT", "124M: --backend=auto --compile=1, tokens/s",
                    "124M: nanoGPT compiled, tokens/s")
    return results.report()


def run_their_steps(results: Results, theirs: Path, where: str) -> None:
    """Note nanoGPT's tokens/s on the 6/6/384 model: 64 rows of 256 tokens per step."""
    text = run_train(theirs, THEIR_CONFIG, "--compile=False", where, *LARGE)[1]
    times = [float(x) for x in re.findall(r"iter [1-9]\d*:.*time ([\d.]+)ms", text)]
    results.note("6/6/384: nanoGPT, tokens/s", 64 * 256e3 / statistics.median(times))


def run_readme_command(results: Results, theirs: Path, where: str) -> None:
    """Note seconds and validation loss of the command in nanoGPT's README for a CPU."""
    seconds, text = run_train(theirs, THEIR_CONFIG, "--compile=False", where, *SMALL)
    results.note("README command: nanoGPT, seconds", seconds)
    loss = re.findall(r"step 2000: .*val loss ([\d.]+)", text)[-1]
    results.note("README command: nanoGPT, val loss", float(loss))


def run_section(cfg: Any) -> dict[str, Any]:
    """Time our train.py and, with --nanogpt=DIR, nanoGPT's, on Tiny Shakespeare."""
    loader.Dataset(loader.find("shakespeare_char"))           # or one sentence, before any run
    theirs = Path(cfg.nanogpt) if cfg.nanogpt else None
    if theirs and not (theirs / "data/shakespeare_char/train.bin").exists():
        raise UserError(f"{theirs} is no nanoGPT with its data: clone it there and run "
                        "python data/shakespeare_char/prepare.py in it")
    if torch.cuda.is_available():
        return run_on_gpu(cfg)
    config = str(ROOT / CONFIG)
    results = Results()
    with tempfile.TemporaryDirectory() as folder:
        where = f"--out_dir={folder}/out"
        for _ in range(cfg.repeat):
            with results.round():
                results.note("fp32 GEMM roof, GFLOP/s", measure_gemm_roof(torch.float32))
                results.note("bf16 GEMM roof, GFLOP/s", measure_gemm_roof(torch.bfloat16))
                if theirs:
                    run_their_steps(results, theirs, where)
                for title, backend, n in (("ours", "auto", 8), ("torch", "torch", 8),
                                          ("reference", "reference", 4)):
                    time_steps(results, f"6/6/384: {title}", config, "--device=cpu",
                               f"--max_iters={n}", f"--backend={backend}")
                if theirs:
                    run_readme_command(results, theirs, where)
                # 30 x 8 windows to validate on are nanoGPT's 20 batches of 12
                for title, args in (
                        ("README command: ours", [config, *SMALL, "--eval_iters=30"]),
                        ("config/shakespeare_char.py", ["config/shakespeare_char.py"])):
                    seconds, text = run_train(ROOT, *args, where)
                    results.note(f"{title}, seconds", seconds)
                    loss = re.findall(r"val_loss ([\d.]+)", text)[-1]
                    results.note(f"{title}, val loss", float(loss))
    shape = ModelConfig(vocab_size=65, block_size=256, n_layer=6, n_head=6, n_embd=384)
    gflops = Transformer(shape).flops_per_token(256) / 1e9
    rates = results.values["6/6/384: ours, tokens/s"]
    share = "6/6/384: ours, share of the bf16 roof"
    roofs = results.values["bf16 GEMM roof, GFLOP/s"]
    results.values[share] = [rate * gflops / roof for rate, roof in zip(rates, roofs)]
    results.rounds[share] = results.rounds["6/6/384: ours, tokens/s"]
    results.compare("6/6/384: speed, ours / nanoGPT", "6/6/384: ours, tokens/s",
                    "6/6/384: nanoGPT, tokens/s")
    for title in ("README command", "config/shakespeare_char.py"):
        ours = "README command: ours" if title == "README command" else title
        results.compare(f"{title}: time, ours / nanoGPT", f"{ours}, seconds",
                        "README command: nanoGPT, seconds")
    return results.report()


def run_families(cfg: Any) -> dict[str, Any]:
    """Train config/'s small example of each family, unchanged, on the default corpus."""
    results = Results()
    with tempfile.TemporaryDirectory() as folder:
        for name, flags in EXAMPLES.items():
            with results.round():
                out = f"{folder}/{name}"
                seconds = run_train(ROOT, "config/tiny.py", f"--family={name}", *flags.split(),
                                    f"--out_dir={out}")[0]
                rows = read_log(out)
                loss = [r["val_loss"] for r in rows if "val_loss" in r][-1]
                results.note(f"{name}: val loss", loss)
                results.note(f"{name}: seconds", seconds)
                results.note(f"{name}: tokens/s", find_rate(rows))
    return results.report()


if __name__ == "__main__":
    refuse_to_run()
