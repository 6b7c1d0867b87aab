"""The machine: which device, which precision, which rank, and how much of its peak is used.

    with open_machine(cfg) as machine:  # from --device, --dtype and torchrun's environment
        total, = machine.sum(value)     # over all ranks

Auto-detected: CUDA with bfloat16 (float16 where the GPU is old), Apple's
MPS, or a CPU, in bfloat16 where it has the instructions. Under torchrun each process is a rank.
"""
from __future__ import annotations

import contextlib
import ctypes
import os
import re
import sys
import time
from dataclasses import dataclass
from typing import Any, Callable, Iterator

try:
    import resource
except ImportError:         # Windows
    resource = None

from config import UserError, refuse_to_run

import torch
import torch.distributed as dist
from torch import Tensor

from formats import atomic

# Dense bf16 (fp16 where that is all) peak of a device in TFLOP/s, from the makers' data sheets.
# The first one in the device's name as whole words counts: an L40 is no L4, and has no MFU.
PEAK_TFLOPS = {"H200": 989.0, "H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.0, "A100": 312.0,
               "L40S": 362.0, "L4": 121.0, "A10G": 70.0, "A6000": 155.0, "RTX 4090": 165.0,
               "RTX 3090": 71.0, "V100": 125.0, "T4": 65.0, "MI300X": 1307.0, "MI250X": 383.0}

@dataclass
class Machine:
    """Where this rank runs, and in which precision."""
    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world: int = 1

    @property
    def main(self) -> bool:
        return self.rank == 0

    def __str__(self) -> str:
        """What a run prints of it: cuda:0 x 8, bfloat16."""
        return f"{self.device} x {self.world}, {str(self.dtype).removeprefix('torch.')}"

    def sum(self, *values: float | Tensor) -> list[float]:
        """Return each value summed over the ranks, in float64: exact for any count of tokens."""
        wide = torch.float32 if self.device.type == "mps" else torch.float64
        return self.add(torch.stack([torch.as_tensor(v, dtype=wide, device=self.device)
                                     for v in values])).tolist()

    def add(self, t: Tensor) -> Tensor:
        """Return a tensor summed over the ranks, in place."""
        if self.world > 1:
            dist.all_reduce(t)
        return t

    def wait(self) -> None:
        """Return when every rank is here."""
        if self.world > 1:
            dist.barrier()

    def rows(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """This rank's slice of a global batch, on its device."""
        B = len(batch["ids"])
        part = slice(B * self.rank // self.world, B * (self.rank + 1) // self.world)
        return {k: v[part].to(self.device, non_blocking=True) for k, v in batch.items()}

def pick_device(device: str = "auto") -> torch.device:
    """Return `device`, or for auto the best one there is: CUDA, Apple's MPS, CPU."""
    if device == "auto":
        mps = torch.backends.mps.is_available()
        device = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device={device} is not usable here "
                        f"({str(e).splitlines()[0]}): try --device=auto") from e


def find_machine(cfg: Any) -> Machine:
    """Return device, precision and rank by the settings and torchrun's environment."""
    if cfg.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device={cfg.device}: PyTorch sees no GPU here; use --device=cpu")
    if cfg.device in ("auto", "cuda") and torch.cuda.is_available():    # this rank's own GPU
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    device = pick_device(cfg.device)
    kinds = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if cfg.dtype not in ("auto", *kinds):
        raise UserError(f"unknown --dtype={cfg.dtype}; choose from auto, {', '.join(kinds)}")
    if cfg.dtype != "auto":
        dtype = kinds[cfg.dtype]
    elif device.type == "cuda":
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    else:
        # a CPU without bf16 instructions emulates them, slower than float32
        fast = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
        dtype = torch.bfloat16 if fast else torch.float32
    machine = Machine(device, dtype)
    if "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        join_ranks("nccl" if device.type == "cuda" else "gloo")
        machine.rank, machine.world = dist.get_rank(), dist.get_world_size()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")      # tf32 for what stays in float32
    if device.type == "cpu":
        keep_freed_memory()
    return machine


@contextlib.contextmanager
def open_machine(cfg: Any) -> Iterator[Machine]:
    """Yield find_machine(cfg); at the end give cfg.out_dir free and leave the group of ranks."""
    machine = find_machine(cfg)
    try:
        yield machine
    finally:
        atomic.release(cfg.out_dir)
        if machine.world > 1:
            dist.destroy_process_group()


def join_ranks(backend: str, **how: Any) -> None:
    """`dist.init_process_group`, in such a way that `dist.destroy_process_group` ends its threads.

    The first DistributedDataParallel imports the module below, whose functions keep the group of
    that moment as a default argument (findings/ddp_keeps_the_group.sh): gloo's threads outlive it,
    and one that lets go of its last tensor while Python shuts down aborts a run that is complete.
    Imported before there is a group, it has none to keep.
    """
    from torch.distributed.nn import functional         # noqa: F401
    dist.init_process_group(backend, **how)

def keep_freed_memory() -> None:
    """Ask glibc to keep freed blocks instead of returning each large tensor to the kernel.

    Without it every activation above 32 MB is fresh pages, zeroed at first touch: GELU on
    (16384, 1536) takes ten times as long. Elsewhere than on glibc nothing happens.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        trim_threshold = -1
        mmap_threshold = -3
        mallopt(mmap_threshold, 1 << 30)
        mallopt(trim_threshold, (1 << 31) - 1)

def utilisation(flops_per_second: float, device: torch.device) -> float | None:
    """Return share of the device's peak (MFU, PaLM appendix B), or None where the peak is
    unknown."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = next((v for k, v in PEAK_TFLOPS.items() if re.search(rf"\b{k}\b", name)), None)
    return flops_per_second / (peak * 1e12) if peak else None

def memory_used(device: torch.device) -> float | None:
    """Peak memory of this process in GB: the device's on a GPU, resident elsewhere; None where the
    system does not say (Windows)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9

class Meter:
    """What decoding achieves: tokens a second of the prompts and after them, and the bytes that
    the latter read a second. weights: the bytes a step reads; state: those of the cache of a row
    of so many tokens."""

    def __init__(self, prompts: list[list[int]], weights: int,
                 state: Callable[[float], float]):
        self.prompt, self.length = sum(map(len, prompts)), max(map(len, prompts))
        self.weights = weights
        self.state = state
        self.start = self.first = self.now = self.shown = time.perf_counter()
        self.count = self.steps = 0

    def step(self, step: list[int | None]) -> None:
        """A token a row, None where it is over."""
        self.count += sum(token is not None for token in step)
        self.steps, self.now = self.steps + 1, time.perf_counter()
        if self.steps == 1:
            self.first = self.now                       # the first token comes from the prompt

    def show(self, total: int, every: float = 0.5) -> None:
        """Now and then a live line, on the way to `total` steps."""
        if self.now - self.shown > every:
            self.shown = self.now
            seconds = self.now - self.start
            print(f"\r{self.steps}/{total} steps, {self.count / seconds:,.0f} tokens/s, "
                  f"{seconds * (total / self.steps - 1):.0f} s left ", end="", file=sys.stderr,
                  flush=True)

    def __str__(self) -> str:
        text = (f"{self.count} tokens in {self.now - self.start:.1f} s; prompt "
                f"{self.prompt / max(self.first - self.start, 1e-9):,.0f} tokens/s")
        if self.steps > 1:
            rate = (self.steps - 1) / max(self.now - self.first, 1e-9)
            rows = self.count / self.steps
            held = rows * self.state(self.length + self.steps / 2)
            text += (f", then {rate * rows:,.0f} tokens/s, "
                     f"{rate * (self.weights + held) / 1e9:.1f} GB/s")
        return text

if __name__ == "__main__":
    refuse_to_run()
