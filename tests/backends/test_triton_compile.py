"""The Triton kernels that ship, compiled for GPUs that are not here: sm_80, sm_90 and gfx942.

    pytest tests/backends/test_triton_compile.py            # every kernel, not every size
    HANDMADE_COMPILE=all pytest tests/backends/test_triton_compile.py   # all of SHIPPED: minutes
    python tests/backends/test_triton_compile.py            # the same, as a table in markdown

The interpreter proves the arithmetic; it knows nothing of registers. A kernel that needs more than
255 of them keeps the rest in memory (it spills) and is many times slower, though right. ptxas, the
assembler that Triton brings, says how many there are without a GPU, so what is held here is:

    every entry compiles to machine code for all three; nothing spills on NVIDIA; shared memory
    fits in the 99 KB that any GPU since sm_86 lends a block; attention in bfloat16 multiplies by
    wgmma, Hopper's own instruction, on sm_90

Compiling and interpreting cannot share a process: worker processes compile, and print JSON.
"""
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
MODULES = sorted(p.stem for p in (ROOT / "backends").glob("triton_*.py")
                 if p.stem != "triton_common")
TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
NVIDIA = ("sm_80", "sm_90")
SHARED = 99 * 1024              # bytes a block may have on sm_86 and sm_89, the least since sm_80
# ptxas itself puts a value or two aside where one register less lets another block run beside
# this one, far from the 255 registers at which it has no choice; and lengths that are no multiple
# of 16, which training does not have, may cost a few bytes more
ASIDE, ASIDE_ODD, CHOICE = 16, 32, 200
WORKERS = 2
EVERYTHING = os.environ.get("HANDMADE_COMPILE") == "all"


# ---------------------------------------------------------------------- in a worker process

def kind(entry):
    """The type an entry computes in: that of its first pointer to floats."""
    return next((t[1:] for t in entry[2].values() if t in ("*bf16", "*fp16", "*fp32")), "")


def chosen(entries):
    """The part that every test run compiles, as (entry, target): the first and the last entry of
    each function, the least and the most, for all targets; and attention in bfloat16 for NVIDIA,
    with all options at the usual head_dims and one that needs masks, with none at the first two."""
    groups = {}
    for entry in entries:
        _, function, _, constants, _ = entry
        groups.setdefault(function.fn.__name__, []).append(entry)
        if kind(entry) == "bf16" and constants.get("D") and not constants.get("SPLIT"):
            groups.setdefault((function.fn.__name__, constants["D"]), []).append(entry)
    jobs = {}
    for key, group in groups.items():
        ends, size = (group[0], group[-1]), key[1] if type(key) is tuple else None
        for entry in ends if size in (None, 64, 128) else ends[1:] if size in (80, 256) else ():
            for target in TARGETS if size is None else NVIDIA:
                jobs[entry[0], target] = (entry, target)
    return list(jobs.values())


def resources(cubin):
    """Registers a thread and bytes of stack a thread, as NVIDIA's cuobjdump reads them."""
    import triton
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        return {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        out = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True,
                             text=True, check=True).stdout
    found = dict(re.findall(r"\b(REG|STACK):(\d+)", out))
    return dict(registers=int(found["REG"]), stack=int(found["STACK"]))


def compiled(entry, target, aligned):
    """What one entry becomes for one target, as a dict that JSON can hold.

    A launch tells the compiler which pointers and integers are multiples of 16. PyTorch's pointers
    are, and strides of tensors; lengths only where `aligned`; batch and heads most often are not.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    title, function, signature, constants, options = entry
    hints = {(i,): [["tt.divisibility", 16]] for i, (name, t) in enumerate(signature.items())
             if t[0] == "*" or (t == "i32" and (
                 re.search("stride|_[a-z]$", name) or (aligned and name not in ("B", "H"))))}
    began = time.time()
    row = dict(title=title, function=function.fn.__name__, kind=kind(entry), target=target,
               aligned=aligned, split=bool(constants.get("SPLIT")), warps=options["num_warps"],
               sizes={k: v for k, v in constants.items() if type(v) is int},
               on=[k for k, v in constants.items() if v is True])
    try:
        kernel = triton.compile(ASTSource(function, signature, constants, hints),
                                target=GPUTarget(*TARGETS[target]), options=options)
        row |= dict(shared=kernel.metadata.shared, wgmma="wgmma" in kernel.asm.get("ptx", ""))
        if target in NVIDIA:
            row |= dict(code=len(kernel.asm["cubin"]), **resources(kernel.asm["cubin"]))
        else:
            row |= dict(code=len(kernel.asm["hsaco"]))
    except Exception as error:                              # the test names every one that fails
        row |= dict(error=f"{type(error).__name__}: {error}"[:400])
    return row | dict(seconds=time.time() - began)


def work(index, everything):
    """Compile this worker's share, and print a line of JSON for each result."""
    import triton
    sys.path.insert(0, str(ROOT))
    jobs = []
    for name in MODULES:
        module = importlib.import_module(f"backends.{name}")
        source = Path(module.__file__).read_text()
        # name[grid](...) is a launch: such a kernel must be among what ships
        launched = [n for n, f in vars(module).items() if isinstance(f, triton.JITFunction)
                    and f.fn.__module__ == module.__name__ and re.search(rf"\b{n}\[", source)]
        entries = list(module.SHIPPED)
        if index == 0:
            print(json.dumps(dict(module=name, launched=launched, entries=len(entries),
                                  shipped=sorted({e[1].fn.__name__ for e in entries}))))
        if everything:
            pairs = [(entry, target) for entry in entries for target in TARGETS]
            jobs += [(*pair, False) for pair in pairs if pair[1] in NVIDIA]
        else:
            pairs = chosen(entries)
        jobs += [(*pair, True) for pair in pairs]
    for job in jobs[index::WORKERS]:
        print(json.dumps(compiled(*job)), flush=True)


# --------------------------------------------------------------------- in the process of pytest

def compile_all(everything):
    """(modules, results) of all workers; nothing is taken from a cache or left in one."""
    with tempfile.TemporaryDirectory() as folder:
        env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        # Triton fuses x * y + z unless told otherwise, and 3.9 warns that it will not for ever
        env |= dict(TRITON_CACHE_DIR=folder, TRITON_DEFAULT_FP_FUSION="1", OMP_NUM_THREADS="1")
        workers = []
        for i in range(WORKERS):
            # to files: a pipe that nobody reads fills, and its writer waits
            out, err = (open(Path(folder) / f"{i}.{end}", "w+") for end in ("out", "err"))
            command = [sys.executable, __file__, f"--worker={i}", *["--all"] * everything]
            workers.append((subprocess.Popen(command, env=env, stdout=out, stderr=err), out, err))
        rows = []
        try:
            for process, out, err in workers:
                process.wait(1800)
                out.seek(0), err.seek(0)
                assert process.returncode == 0, err.read()[-2000:]
                rows += [json.loads(line) for line in out if line.startswith("{")]
        finally:
            for process, out, err in workers:
                process.kill(), process.wait(), out.close(), err.close()
    return [r for r in rows if "module" in r], [r for r in rows if "module" not in r]


@pytest.fixture(scope="module")
def everything_compiled():
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    return compile_all(EVERYTHING)


@pytest.fixture
def results(everything_compiled):
    return [r for r in everything_compiled[1] if "error" not in r]


def spills(row):
    """True where values of a kernel lie in memory for want of registers."""
    if "stack" not in row:
        return False
    free = ASIDE if row["registers"] < CHOICE else 0
    return row["stack"] > (free if row["aligned"] else ASIDE_ODD)


def where(rows, *columns):
    """Lines for a failed assertion."""
    return "\n" + "\n".join(f"{r['title']} on {r['target']}{'' if r['aligned'] else ' unaligned'}: "
                            + ", ".join(f"{c} {r[c]}" for c in columns) for r in rows)


def test_every_kernel_that_is_launched_is_shipped(everything_compiled):
    """A kernel missing from SHIPPED would never be compiled here."""
    modules, rows = everything_compiled
    assert [m["module"] for m in modules] == MODULES
    for module in modules:
        assert set(module["launched"]) <= set(module["shipped"])
        assert set(module["shipped"]) <= {r["function"] for r in rows}, "a kernel was left out"


def test_every_kernel_compiles_for_every_target(everything_compiled):
    failed = [r for r in everything_compiled[1] if "error" in r]
    assert not failed, where(failed, "error")
    for target in TARGETS:
        assert any(r["target"] == target for r in everything_compiled[1])
    assert all(r["code"] > 0 for r in everything_compiled[1])


def test_nothing_spills(results):
    rows = [r for r in results if "stack" in r]
    if not rows:
        pytest.skip("this build of triton brings no cuobjdump")
    spilled = [r for r in rows if spills(r)]
    assert not spilled, where(spilled, "stack", "registers", "warps")


def test_shared_memory_fits_any_gpu(results):
    large = [r for r in results if r["shared"] > SHARED]
    assert not large, where(large, "shared")


def test_attention_multiplies_with_hoppers_own_instruction(results):
    """Without wgmma a Hopper GPU reaches about half of what it can. Dropout, whose random numbers
    leave no registers for tiles that large, is excused."""
    walks = {"attention_forward", "attention_keys", "attention_queries"}
    for size in (64, 128):
        rows = [r for r in results if r["target"] == "sm_90" and r["kind"] == "bf16"
                and r["function"] in walks and r["sizes"]["D"] == size
                and not r["split"] and "DROP" not in r["on"]]
        assert {r["function"] for r in rows} == walks
        without = [r for r in rows if not r["wgmma"]]
        assert not without, where(without, "shared")


# ------------------------------------------------------------------------ the table, by itself

def span(values, unit=1):
    """The least and the greatest of some numbers, as "3" or "3-7"."""
    low, high = (round(x / unit) for x in (min(values), max(values)))
    return f"{low}" if low == high else f"{low}-{high}"


def table(rows):
    """Markdown, a row for each function and type: the range over its configurations."""
    groups = {}
    for r in rows:
        name = r["function"] + (", split" if r["split"] else "")
        groups.setdefault((name, r["kind"]), []).append(r)
    lines = ["| kernel | type | configurations | registers sm_80 | sm_90 | shared KB | spills |",
             "|---|---|---|---|---|---|---|"]
    for (name, kind), group in groups.items():
        titles = {r["title"]: r for r in group}
        sizes = []
        for size in ("D", "BM", "BN", "BK", "BLOCK"):
            values = [r["sizes"][size] for r in titles.values() if size in r["sizes"]]
            sizes += [f"{size} {span(values)}"] if values else []
        sizes.append(f"warps {span([r['warps'] for r in titles.values()])}")
        registers = [span([r["registers"] for r in group if r["target"] == target])
                     for target in NVIDIA]
        stack = max(r.get("stack", 0) for r in group)
        lines.append(f"| {name} | {kind} | {len(titles)}: {', '.join(sizes)} | "
                     f"{' | '.join(registers)} | {span([r['shared'] for r in group], 1024)} | "
                     f"{f'{stack} B' if stack else 'none'} |")
    return "\n".join(lines)


def main():
    began = time.time()
    _, rows = compile_all(True)
    failed = [r for r in rows if "error" in r]
    rows = [r for r in rows if "error" not in r]
    print(table(rows))
    bad = [r for r in rows if spills(r) or r["shared"] > SHARED]
    print(f"{len(rows)} compilations in {time.time() - began:.0f} s, {len(failed)} failed, "
          f"{len(bad)} spill or need more than {SHARED >> 10} KB"
          + (where(failed, "error") if failed else "")
          + where([dict(dict(stack="?", registers="?"), **r) for r in bad],
                  "stack", "registers", "shared", "warps") * bool(bad), file=sys.stderr)
    return 1 if failed or bad else 0


if __name__ == "__main__":
    if sys.argv[1:] and sys.argv[1].startswith("--worker="):
        work(int(sys.argv[1].split("=")[1]), "--all" in sys.argv)
    else:
        sys.exit(main())
