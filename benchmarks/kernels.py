"""python bench.py kernels: every operation of kernels.py in each of its forms, on this machine.

    python bench.py kernels                         # CPU: reference, PyTorch's, compiled, auto
    python bench.py kernels --only=rms_norm+glu     # some of them
    python bench.py kernels --dtype=float32         # GPU: Triton, the CUDA twins and Liger's too

A row says how long the forward and both ways take, the peak memory of both (on a GPU), what the
forward achieves, and which share that is of the roof: the bandwidth of a copy or the rate of a
square matmul, measured in the same run. Work counts what has to be moved or multiplied, not what a
form moves. Forms take turns, so that a busy moment hits all; "auto / best" is the median over
rounds of what the dispatch takes over the best of the other forms; compiled, a minute's wait, is
for comparison.
"""
from __future__ import annotations

import statistics
import time
from typing import Any, Callable

import torch

import kernels
from bench import machine
from config import UserError, refuse_to_run
from training.machine import keep_freed_memory

DTYPES = ("float32", "bfloat16", "float16")
CASES = ("rms_norm", "layer_norm", "rope", "gelu", "glu", "softmax", "dropout", "cross_entropy",
         "attention", "linear", "linear_cross_entropy", "moe")

def seconds_of(work: Callable[[], Any], device: str) -> float:
    """Seconds of one call; on a GPU by events, with nothing of it left in the L2 cache."""
    if device == "cpu":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    torch.empty(2 ** 26, device=device).zero_()                         # 256 MB
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def roofs(device: str, dtype: Any) -> tuple[float, float]:
    """(bytes a second of a copy, FLOPs a second of a square matmul), measured here and now."""
    n, m = (2 ** 28, 8192) if device == "cuda" else (2 ** 25, 2048)
    x = torch.randn(n // 2, device=device).to(dtype)
    y, a = torch.empty_like(x), torch.randn(m, m, device=device).to(dtype)
    copies = [seconds_of(lambda: y.copy_(x), device) for _ in range(15)]
    products = [seconds_of(lambda: a @ a, device) for _ in range(9)]
    return 2 * x.nbytes / statistics.median(copies), 2 * m ** 3 / statistics.median(products)


def kernel_cases(device: str, dtype: Any) -> dict[str, tuple]:
    """operation -> (inputs that learn, call(form, *inputs), unit, work forward, work backward).

    Work is the bytes that have to move where memory is the bound, or the FLOPs where arithmetic
    is. On a GPU the sizes are those of a model of 1 billion parameters, on a CPU a share of them.
    """
    gpu = device == "cuda"
    M, C, V, H, D = (16384, 2048, 50304, 16, 128) if gpu else (2048, 512, 8192, 8, 64)
    T = 2048 if gpu else 512
    B, N, size = M // T, 4 * C, dtype.itemsize

    def make(*shape: int, scale: float = 1.0) -> Any:
        return torch.randn(*shape, device=device).mul_(scale).to(dtype).requires_grad_()

    # weights that keep a variance of 1: softmax would meet denormal numbers, which are slow
    small = C ** -0.5

    targets = torch.randint(V, (M,), device=device)
    angles = torch.rand(T, D // 2, device=device)
    cos, sin = angles.cos(), angles.sin()
    E, k, narrow = 8, 2, C // 2
    chosen = torch.rand(M, E, device=device).topk(k, -1).indices
    share = torch.rand(M, k, device=device)
    row, wide, square, table = M * C * size, M * N * size, B * H * T * T * D, M * V * size

    def plain(form: Callable, *inputs: Any) -> Any:
        return form(*inputs)

    return {
        "rms_norm": ([make(M, C), make(C)], plain, "bytes", 2 * row, 3 * row),
        "layer_norm": ([make(M, C), make(C), make(C)], plain, "bytes", 2 * row, 3 * row),
        "rope": ([make(B, T, H, D)], lambda f, x: f(x, cos, sin), "bytes", 2 * row, 2 * row),
        "gelu": ([make(M, N)], plain, "bytes", 2 * wide, 3 * wide),
        "glu": ([make(M, N), make(M, N)], plain, "bytes", 3 * wide, 5 * wide),
        "softmax": ([make(M, N)], plain, "bytes", 2 * wide, 3 * wide),
        "dropout": ([make(M, N)], lambda f, x: f(x, 0.25), "bytes", 2 * wide, 2 * wide),
        "cross_entropy": ([make(M, V)], lambda f, x: f(x, targets), "bytes", table, 2 * table),
        "attention": ([make(B, H, T, D) for _ in "qkv"], plain, "flops", 2 * square, 5 * square),
        "linear": ([make(M, C), make(N, C, scale=small)], plain, "flops", 2 * M * C * N,
                   4 * M * C * N),
        "linear_cross_entropy": ([make(M, C), make(V, C, scale=small)],
                                 lambda f, x, w: f(x, w, targets), "flops", 2 * M * V * C,
                                 4 * M * V * C),
        "moe": ([make(M, C), *(make(E, narrow, C, scale=small) for _ in "gu"),
                 make(E, C, narrow, scale=small)],
                lambda f, x, *w: f(x, chosen, share, *w), "flops", 6 * M * k * C * narrow,
                12 * M * k * C * narrow),
    }


def liger() -> dict[str, Callable]:
    """Liger-Kernel's functions where it is installed, under our names and with our arguments."""
    try:
        from liger_kernel.transformers import functional as theirs
    except ImportError:
        return {}
    return {"rms_norm": lambda x, w: theirs.liger_rms_norm(x, w, 1e-6),
            "glu": lambda gate, up: theirs.liger_swiglu(gate, up),
            "cross_entropy": lambda z, y: theirs.liger_cross_entropy(z, y, reduction="sum"),
            "linear_cross_entropy": lambda x, w, y: theirs.liger_fused_linear_cross_entropy(
                x, w, y, reduction="sum")}


def contenders(name: str, device: str) -> dict[str, tuple[str, Callable]]:
    """How an operation can be computed here: {title: (backend for what it calls, function)}."""
    operation = getattr(kernels, name)
    out = {"reference": ("reference", operation.reference)}
    if "torch" in operation.forms:
        out["PyTorch's"] = ("torch", operation.forms["torch"])
    out["compiled"] = ("reference", torch.compile(operation.reference))
    if device == "cuda":
        for form in ("triton", "cuda"):
            if kernels.ready(form) and form in operation.forms:
                out[form] = (form, operation.forms[form])
        if name in liger():
            out["Liger's"] = ("auto", liger()[name])
    return out | {"auto": ("auto", operation)}


def section(cfg: Any) -> dict[str, Any]:
    """Every operation in each form: forward, both ways, peak memory, share of the roof."""
    wanted = set(filter(None, cfg.only.split("+")))
    if cfg.dtype not in DTYPES:
        raise UserError(f"--dtype={cfg.dtype} does not exist: choose {', '.join(DTYPES)}")
    if unknown := sorted(wanted - set(CASES)):
        raise UserError(f"--only: there is no {unknown[0]}; choose {', '.join(CASES)}, joined by +")
    keep_freed_memory()                         # as train.py does: or page faults are timed
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, cfg.dtype)
    copy, product = roofs(device, dtype)
    title = torch.cuda.get_device_name() if device == "cuda" else machine()["cpu"]
    print(f"{title}, {dtype}: copies at {copy / 1e9:,.0f} GB/s, matmuls at "
          f"{product / 1e12:,.2f} TFLOP/s")
    print(f"{'operation':<22}{'form':<11}{'forward ms':>11}{'both ms':>9}{'MB':>8}{'achieved':>15}"
          f"{'of roof':>9}{'backward':>9}")
    out: dict[str, Any] = {"device": title, "copy_gbs": copy / 1e9, "tflops": product / 1e12}
    for name, (inputs, call, unit, ahead, back) in kernel_cases(device, dtype).items():
        if wanted and name not in wanted:
            continue
        forms, times, memory = contenders(name, device), {}, {}
        for k in range(-1, cfg.repeat):                     # the first round warms up
            for form, (backend, function) in forms.items():
                before = kernels.use(backend)

                def both() -> None:
                    y = call(function, *inputs)
                    torch.autograd.grad(y, inputs, torch.ones_like(y))

                with torch.no_grad():
                    f = seconds_of(lambda: call(function, *inputs), device)
                held = torch.cuda.memory_allocated() if device == "cuda" else 0
                if device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                b = seconds_of(both, device)
                memory[form] = (torch.cuda.max_memory_allocated() - held) / 1e6 if held else 0.0
                kernels.use(before)
                if k >= 0:
                    times.setdefault(form, []).append((f, b))
        roof, scale, word = (copy, 1e9, "GB/s") if unit == "bytes" else (product, 1e12, "TFLOP/s")
        for form, pairs in times.items():
            f, b = (statistics.median(x) for x in zip(*pairs))
            behind = max(b - f, 1e-9)
            shown = f"{memory[form]:8,.0f}" if memory[form] else f"{'':8}"
            print(f"{name:<22}{form:<11}{f * 1e3:11.3f}{b * 1e3:9.3f}{shown}"
                  f"{ahead / f / scale:8,.2f} {word:<7}{ahead / f / roof:8.0%}"
                  f"{back / behind / roof:9.0%}", flush=True)
            out[f"{name}, {form}"] = {"forward": f, "both": b, "megabytes": memory[form],
                                      "of_roof": ahead / f / roof,
                                      "backward_of_roof": back / behind / roof}
        # paired: what auto takes over the best of the others, round by round
        for i, way in enumerate(("forward", "both")):
            best = min((x for x in times if x not in ("auto", "compiled")),
                       key=lambda x: statistics.median(t[i] for t in times[x]))
            ratio = statistics.median(a[i] / b[i] for a, b in zip(times["auto"], times[best]))
            print(f"{'':22}auto / best ({best}), {way}: {ratio:.3f}")
            out[f"{name}, auto / best, {way}"] = ratio
    return out


if __name__ == "__main__":
    refuse_to_run()
