"""What the sections of bench.py share: rounds, the load of others, tables, the machine.

    results = Results()
    for _ in range(repeat):
        with results.round():                       # measures what other processes take meanwhile
            results.note("ours, tokens/s", rate)    # one value per round
    return results.report()                         # prints the table; the numbers of the JSON line

Contenders alternate within a round, so that a busy moment hits all of them. That alone does not
make ratios fair: a busy neighbour slows a two-threaded peer more than a single-threaded one. So the
CPU time that other processes take is measured before and during each round (/proc/stat, less our
own), and a round in which they took more than LIMIT of the cores is marked as disturbed and left
out of the median. Where there is no /proc/stat, the table says that the load is unknown.
"""
from __future__ import annotations

import contextlib
import os
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Callable, Iterator

from config import refuse_to_run

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 0.05                    # share of all cores that others may take in an undisturbed round
WAIT = 0.5                      # seconds for which the load is measured before a round


def read_busy_seconds() -> float | None:
    """Return the CPU seconds that all processes have taken since boot; None where unknown.

    The first line of /proc/stat: user, nice, system, idle, iowait, irq, softirq, steal (proc(5)).
    Steal, the time that a hypervisor gave to other guests, counts as others' load.
    """
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        ticks = [int(x) for x in fields]
        idle = ticks[3] + ticks[4]
    except (OSError, ValueError, IndexError):
        return None
    return (sum(ticks) - idle) / os.sysconf("SC_CLK_TCK")


def read_own_seconds() -> float:
    """Return the CPU seconds of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


class LoadMeter:
    """The share of the machine's cores that other processes took since start()."""

    def __init__(self):
        self.start()

    def start(self) -> None:
        self.began = time.perf_counter()
        self.busy = read_busy_seconds()
        self.own = read_own_seconds()

    def others(self) -> float | None:
        """Return others' CPU time over wall time x cores; None where it is unknown."""
        busy = read_busy_seconds()
        if busy is None or self.busy is None:
            return None
        others = (busy - self.busy) - (read_own_seconds() - self.own)
        wall = (time.perf_counter() - self.began) * (os.cpu_count() or 1)
        return max(0.0, others / max(wall, 1e-9))


class Results:
    """Values by name, one per round, and which rounds others disturbed."""

    def __init__(self):
        self.values: dict[str, list[float]] = {}
        self.rounds: dict[str, list[int]] = {}      # name -> the round of each of its values
        self.loads: list[float | None] = []         # of each round: the larger of before and during

    @contextlib.contextmanager
    def round(self) -> Iterator[None]:
        """Measure the load of others before and during one round of all contenders."""
        meter = LoadMeter()
        time.sleep(WAIT)
        before = meter.others()
        self.loads.append(before)
        meter.start()
        yield
        during = meter.others()
        if before is not None and during is not None:
            self.loads[-1] = max(before, during)

    def add(self, name: str, value: float) -> None:
        """Add a value to the round at hand."""
        self.values.setdefault(name, []).append(value)
        self.rounds.setdefault(name, []).append(len(self.loads) - 1)

    def note(self, name: str, value: float) -> None:
        """Add a value to the round at hand, and show it."""
        self.add(name, value)
        print(f"\r{name}: {value:,.4g}{'':20}", file=sys.stderr)

    def compare(self, name: str, ours: str, theirs: str) -> None:
        """Add the ratio of two measures, round by round, where both were measured."""
        if ours in self.values and theirs in self.values:
            pairs = zip(self.values[ours], self.values[theirs])
            self.values[name] = [a / b for a, b in pairs]
            self.rounds[name] = self.rounds[ours]

    def is_disturbed(self, index: int) -> bool:
        load = self.loads[index] if 0 <= index < len(self.loads) else None
        return load is not None and load > LIMIT

    def select(self, name: str) -> list[float]:
        """Return the values of undisturbed rounds, or all of them if every round was disturbed."""
        pairs = list(zip(self.values[name], self.rounds[name]))
        clean = [value for value, index in pairs if not self.is_disturbed(index)]
        return clean or [value for value, _ in pairs]

    def describe_load(self) -> str:
        """Return one line on the load of others."""
        if not self.loads or None in self.loads:
            return "load of other processes: unknown on this system"
        disturbed = sum(map(self.is_disturbed, range(len(self.loads))))
        line = (f"load of other processes: at most {max(self.loads):.0%} of the cores; "
                f"{disturbed} of {len(self.loads)} rounds disturbed")
        if disturbed == len(self.loads):
            return line + ": every figure is of a busy machine"
        return line + (" and left out" if disturbed else "")

    def report(self) -> dict[str, Any]:
        """Print one row per measure (median, least and largest), and return what goes to JSON."""
        print(self.describe_load())
        print(f"{'':52}{'median':>12}{'min':>12}{'max':>12}")
        for name in self.values:
            values = self.select(name)
            print(f"{name:52}{statistics.median(values):12,.4g}{min(values):12,.4g}"
                  f"{max(values):12,.4g}")
        return {"results": self.values, "loads": self.loads}


def time_rounds(contenders: dict[str, Callable[[], Any]], repeat: int) -> Results:
    """Call every contender once per round; the values are seconds."""
    results = Results()
    for k in range(repeat):
        with results.round():
            for name, work in contenders.items():
                print(f"\rround {k + 1}/{repeat}: {name:<40}", end="", file=sys.stderr, flush=True)
                start = time.perf_counter()
                work()
                results.add(name, time.perf_counter() - start)
    print(f"\r{'':60}\r", end="", file=sys.stderr, flush=True)
    return results


def print_rates(title: str, results: Results, amount: float, unit: str,
                baseline: str) -> dict[str, dict[str, float]]:
    """Print one row per contender, and return the same numbers for the JSON line.

    amount: the work of one call in `unit` (megabytes, tokens), for the rate. baseline: the
    contender that the others' time is divided by; without it (not installed), no ratios.
    """
    base = None
    if baseline in results.values:
        base = statistics.median(results.select(baseline))
    print(results.describe_load())
    print(f"{title:<36}{'median s':>10}{'min':>9}{'max':>9}{unit + '/s':>10}{'ratio':>8}")
    rows = {}
    for name in results.values:
        times = results.select(name)
        median = statistics.median(times)
        ratio = "" if base is None else f"{median / base:8.2f}"
        print(f"  {name:<34}{median:10.3f}{min(times):9.3f}{max(times):9.3f}"
              f"{amount / median:10.1f}{ratio}")
        rows[name] = {"median": median, "min": min(times), "max": max(times),
                      "rate": amount / median}
        if base is not None:
            rows[name]["ratio"] = median / base
    return rows


def describe_machine() -> dict[str, Any]:
    """Return what ran this, for the reader of a number."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        names = (x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
        model = next(names, model)
    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    return {"cpu": model, "cores": os.cpu_count(), "python": platform.python_version(),
            "load": load}


if __name__ == "__main__":
    refuse_to_run()
