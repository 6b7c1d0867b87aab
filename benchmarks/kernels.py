"""python bench.py kernels: every operation of kernels.py in each of its implementations.

    python bench.py kernels                         # CPU: reference, PyTorch's, compiled, auto
    python bench.py kernels --only=rms_norm+glu     # some of them
    python bench.py kernels --dtype=float32         # GPU: Triton, the CUDA versions and Liger's too

One row per implementation: milliseconds of the forward and of forward with backward, peak memory
(on a GPU), the rate of the forward, and its share of the roof: the bandwidth of a copy or the rate
of a square matmul, measured in the same run. Work counts the bytes that have to be moved or the
FLOPs that have to be done, not those that an implementation happens to do. "auto / best" is the
median over rounds of the time that the dispatch takes over the best of the other implementations;
torch.compile's, a minute's wait, is for comparison.
"""
from __future__ import annotations

import contextlib
import functools
import statistics
import time
from typing import Any, Callable

from config import UserError, refuse_to_run

import torch

import kernels
from benchmarks.common import Results, describe_machine
from training.machine import keep_freed_memory

DTYPES = ("float32", "bfloat16", "float16")
CASES = ("rms_norm", "layer_norm", "rope", "gelu", "glu", "softmax", "dropout", "cross_entropy",
         "attention", "linear", "linear_cross_entropy", "moe")


def time_call(work: Callable[[], Any], device: str) -> float:
    """Return the seconds of one call; on a GPU by events, with a cold L2 cache."""
    if device == "cpu":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    torch.empty(2 ** 26, device=device).zero_()                         # 256 MB
    begin = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def measure_roofs(device: str, dtype: Any) -> tuple[float, float]:
    """Return the bytes/s of a copy and the FLOPs/s of a square matmul, measured now."""
    n, m = (2 ** 28, 8192) if device == "cuda" else (2 ** 25, 2048)
    x = torch.randn(n // 2, device=device).to(dtype)
    y = torch.empty_like(x)
    a = torch.randn(m, m, device=device).to(dtype)
    copies = [time_call(lambda: y.copy_(x), device) for _ in range(15)]
    products = [time_call(lambda: a @ a, device) for _ in range(9)]
    return 2 * x.nbytes / statistics.median(copies), 2 * m ** 3 / statistics.median(products)


def make_cases(device: str, dtype: Any) -> dict[str, tuple]:
    """Return operation -> (inputs with gradients, call(function, *inputs), unit, work of the
    forward, work of the backward).

    Work is the bytes that have to move where memory is the bound, or the FLOPs where arithmetic
    is. On a GPU the sizes are those of a model of 1 billion parameters, on a CPU a share of them.
    """
    gpu = device == "cuda"
    M, C, V, H, D = (16384, 2048, 50304, 16, 128) if gpu else (2048, 512, 8192, 8, 64)
    T = 2048 if gpu else 512
    B = M // T
    N = 4 * C
    size = dtype.itemsize

    def make(*shape: int, scale: float = 1.0) -> Any:
        return torch.randn(*shape, device=device).mul_(scale).to(dtype).requires_grad_()

    # weights that keep a variance of 1: softmax would meet denormal numbers, which are slow
    small = C ** -0.5
    targets = torch.randint(V, (M,), device=device)
    angles = torch.rand(T, D // 2, device=device)
    cos = angles.cos()
    sin = angles.sin()
    E = 8
    k = 2
    narrow = C // 2
    chosen = torch.rand(M, E, device=device).topk(k, -1).indices
    share = torch.rand(M, k, device=device)
    row = M * C * size                          # bytes of the activations
    wide = M * N * size                         # and of the MLP's
    table = M * V * size                        # and of the logits
    square = B * H * T * T * D                  # FLOPs of one causal product of attention

    def call_plain(function: Callable, *inputs: Any) -> Any:
        return function(*inputs)

    return {
        "rms_norm": ([make(M, C), make(C)], call_plain, "bytes", 2 * row, 3 * row),
        "layer_norm": ([make(M, C), make(C), make(C)], call_plain, "bytes", 2 * row, 3 * row),
        "rope": ([make(B, T, H, D)], lambda f, x: f(x, cos, sin), "bytes", 2 * row, 2 * row),
        "gelu": ([make(M, N)], call_plain, "bytes", 2 * wide, 3 * wide),
        "glu": ([make(M, N), make(M, N)], call_plain, "bytes", 3 * wide, 5 * wide),
        "softmax": ([make(M, N)], call_plain, "bytes", 2 * wide, 3 * wide),
        "dropout": ([make(M, N)], lambda f, x: f(x, 0.25), "bytes", 2 * wide, 2 * wide),
        "cross_entropy": ([make(M, V)], lambda f, x: f(x, targets), "bytes", table, 2 * table),
        "attention": ([make(B, H, T, D) for _ in "qkv"], call_plain, "flops", 2 * square,
                      5 * square),
        "linear": ([make(M, C), make(N, C, scale=small)], call_plain, "flops", 2 * M * C * N,
                   4 * M * C * N),
        "linear_cross_entropy": ([make(M, C), make(V, C, scale=small)],
                                 lambda f, x, w: f(x, w, targets), "flops", 2 * M * V * C,
                                 4 * M * V * C),
        "moe": ([make(M, C), *(make(E, narrow, C, scale=small) for _ in "gu"),
                 make(E, C, narrow, scale=small)],
                lambda f, x, *w: f(x, chosen, share, *w), "flops", 6 * M * k * C * narrow,
                12 * M * k * C * narrow),
    }


def list_liger() -> dict[str, Callable]:
    """Return Liger-Kernel's functions by our names, with our arguments; {} if it is missing."""
    try:
        from liger_kernel.transformers import functional as theirs
    except ImportError:
        return {}
    return {"rms_norm": lambda x, w: theirs.liger_rms_norm(x, w, 1e-6),
            "glu": lambda gate, up: theirs.liger_swiglu(gate, up),
            "cross_entropy": lambda z, y: theirs.liger_cross_entropy(z, y, reduction="sum"),
            "linear_cross_entropy": lambda x, w, y: theirs.liger_fused_linear_cross_entropy(
                x, w, y, reduction="sum")}


def list_contenders(name: str, device: str) -> dict[str, tuple[str, Callable]]:
    """Return the ways to compute an operation here: title -> (backend for its calls, function)."""
    operation = getattr(kernels, name)
    out = {"reference": ("reference", operation.reference)}
    if "torch" in operation.implementations:
        out["PyTorch's"] = ("torch", operation.implementations["torch"])
    out["compiled"] = ("reference", torch.compile(operation.reference))
    if device == "cuda":
        for form in ("triton", "cuda"):
            if kernels.ready(form) and form in operation.implementations:
                out[form] = (form, operation.implementations[form])
        if name in list_liger():
            out["Liger's"] = ("auto", list_liger()[name])
    return out | {"auto": ("auto", operation)}


def time_contenders(contenders: dict, call: Callable, inputs: list, device: str, repeat: int,
                    results: Results, name: str) -> dict[str, float]:
    """Time forward and forward with backward of each contender, in turns.

    results gets "NAME, TITLE, forward" and "..., both" in seconds; returns peak megabytes by title.
    """
    memory = {}
    for k in range(-1, repeat):                             # the first round warms up
        with results.round() if k >= 0 else contextlib.nullcontext():
            for title, (backend, function) in contenders.items():
                before = kernels.use(backend)

                def run_both(function: Callable = function) -> None:
                    y = call(function, *inputs)
                    torch.autograd.grad(y, inputs, torch.ones_like(y))

                with torch.no_grad():
                    forward = time_call(functools.partial(call, function, *inputs), device)
                held = torch.cuda.memory_allocated() if device == "cuda" else 0
                if device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                both = time_call(run_both, device)
                memory[title] = (torch.cuda.max_memory_allocated() - held) / 1e6 if held else 0.0
                kernels.use(before)
                if k >= 0:
                    results.add(f"{name}, {title}, forward", forward)
                    results.add(f"{name}, {title}, both", both)
    return memory


def print_case(name: str, titles: list[str], results: Results, memory: dict[str, float],
               case: tuple, roofs: tuple[float, float]) -> dict[str, Any]:
    """Print one row per contender and auto over the best of the others; return the numbers."""
    _, _, unit, forward_work, backward_work = case
    roof = roofs[0] if unit == "bytes" else roofs[1]
    scale = 1e9 if unit == "bytes" else 1e12
    word = "GB/s" if unit == "bytes" else "TFLOP/s"
    rows: dict[str, Any] = {}
    medians = {}
    for title in titles:
        forward = statistics.median(results.select(f"{name}, {title}, forward"))
        both = statistics.median(results.select(f"{name}, {title}, both"))
        medians[title] = {"forward": forward, "both": both}
        backward = max(both - forward, 1e-9)
        shown = f"{memory[title]:8,.0f}" if memory[title] else f"{'':8}"
        print(f"{name:<22}{title:<11}{forward * 1e3:11.3f}{both * 1e3:9.3f}{shown}"
              f"{forward_work / forward / scale:8,.2f} {word:<7}"
              f"{forward_work / forward / roof:8.0%}{backward_work / backward / roof:9.0%}",
              flush=True)
        rows[f"{name}, {title}"] = {
            "forward": forward, "both": both, "megabytes": memory[title],
            "of_roof": forward_work / forward / roof,
            "backward_of_roof": backward_work / backward / roof}
    for way in ("forward", "both"):
        others = [x for x in titles if x not in ("auto", "compiled")]
        best = min(others, key=lambda x: medians[x][way])
        # paired: round by round
        pairs = zip(results.select(f"{name}, auto, {way}"),
                    results.select(f"{name}, {best}, {way}"))
        ratio = statistics.median(a / b for a, b in pairs)
        print(f"{'':22}auto / best ({best}), {way}: {ratio:.3f}")
        rows[f"{name}, auto / best, {way}"] = ratio
    return rows


def run_section(cfg: Any) -> dict[str, Any]:
    """Time every operation in each implementation: forward, both, memory, share of the roof."""
    wanted = set(filter(None, cfg.only.split("+")))
    if cfg.dtype not in DTYPES:
        raise UserError(f"unknown --dtype={cfg.dtype}; choose from {', '.join(DTYPES)}")
    if unknown := sorted(wanted - set(CASES)):
        raise UserError(f"unknown --only={unknown[0]}; choose from {', '.join(CASES)}, joined by +")
    keep_freed_memory()                         # as train.py does: or page faults are timed
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, cfg.dtype)
    roofs = measure_roofs(device, dtype)
    title = torch.cuda.get_device_name() if device == "cuda" else describe_machine()["cpu"]
    print(f"{title}, {dtype}: copies at {roofs[0] / 1e9:,.0f} GB/s, matmuls at "
          f"{roofs[1] / 1e12:,.2f} TFLOP/s")
    print(f"{'operation':<22}{'by':<11}{'forward ms':>11}{'both ms':>9}{'MB':>8}{'achieved':>15}"
          f"{'of roof':>9}{'backward':>9}")
    out: dict[str, Any] = {"device": title, "copy_gbs": roofs[0] / 1e9, "tflops": roofs[1] / 1e12}
    results = Results()
    for name, case in make_cases(device, dtype).items():
        if wanted and name not in wanted:
            continue
        inputs, call, *_ = case
        contenders = list_contenders(name, device)
        memory = time_contenders(contenders, call, inputs, device, cfg.repeat, results, name)
        out.update(print_case(name, list(contenders), results, memory, case, roofs))
    print(results.describe_load())
    return {**out, "loads": results.loads}


if __name__ == "__main__":
    refuse_to_run()
