"""What the suite has no time for, with figures: `make stress`, at most twenty minutes on two cores.

    python tests/stress.py                          # all of it
    python tests/stress.py --minutes=1              # the same, with a share of the repetitions
    python tests/stress.py --only=kills,pairs --seed=7

Every section runs until its share of the time is over, and prints what it did; a run that did not
end bit for bit as the one that was never disturbed, a traceback, or a hang is a failure, and the
status is then 1. Runs are small, and forked from processes that have imported PyTorch.
"""
import contextlib
import importlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1")
import config  # noqa: E402

SMALL = ["--batch_size=2", "--gradient_accumulation_steps=2", "--warmup_iters=2",
         "--eval_interval=4", "--eval_iters=1", "--log_interval=1", "--device=cpu",
         "--dtype=float32", "--max_iters=40", "--dropout=0.1"]
SHAPE = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=64"]
SHARES = {"kills": 0.45, "ranks": 0.1, "mutations": 0.2, "configs": 0.05, "pairs": 0.2}


@dataclass
class Config:
    minutes: float = 20.0           # of all sections together
    only: list[str] = field(default_factory=lambda: list(SHARES))   # sections, by commas
    seed: int = 0
    ranges = {"minutes": "(0, 1e4]"}


class Bench:
    """The folder of a stress run, its data, and processes from which runs are forked."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.rng, self.servers, self.number = folder, random.Random(seed), {}, 0
        self.failures: list[str] = []
        text = folder / "text.txt"
        words = ["".join(self.rng.choices("abcdefgh", k=self.rng.randrange(2, 8)))
                 for _ in range(300)]
        text.write_text("\n".join(" ".join(self.rng.choices(words, k=40)) for _ in range(800)))
        self.call("data/prepare.py", text, "--vocab_size=290", f"--out={folder / 'text'}",
                  "--workers=1")
        self.call("data/skills.py", "skills", "--train=400", "--val=20", "--test=10",
                  "--pref=60", "--rl=1", f"--out={folder / 'skills'}")
        self.run("train", [f"--dataset={folder / 'text'}", *SHAPE, *SMALL, "--max_iters=2",
                           "--block_size=128", f"--out_dir={folder / 'base'}"])
        self.run("sft", [f"--init_from={folder / 'base'}", f"--dataset={folder / 'skills'}",
                         *SMALL, "--max_iters=2", f"--out_dir={folder / 'chat'}"])
        talk = [f"--init_from={folder / 'chat'}", f"--dataset={folder / 'skills'}", *SMALL]
        student = [f"--teacher={folder / 'chat'}", f"--dataset={folder / 'skills'}", *SMALL]
        # name -> script, flags; resumed by --init_from=resume
        self.stages = {
            "train": ("train", [f"--dataset={folder / 'text'}", *SHAPE, *SMALL]),
            "train muon": ("train", [f"--dataset={folder / 'text'}", *SHAPE, *SMALL,
                                     "--optimizer=muon", "--family=qwen3"]),
            "train moe": ("train", [f"--dataset={folder / 'text'}", *SHAPE, *SMALL,
                                    "--family=qwen3_moe", "--num_experts=4",
                                    "--num_experts_per_tok=2"]),
            "sft": ("sft", talk), "sft lora": ("sft", [*talk, "--lora_rank=2"]),
            "dpo": ("dpo", talk),
            "distill": ("distill", [*student, "--n_layer=1", "--n_head=2", "--n_embd=16"]),
            "distill cache": ("distill", [*student, "--n_layer=1", "--n_head=2", "--n_embd=16",
                                          "--cache_top_k=8", "--alpha=0"]),
        }

    def fail(self, what: str) -> None:
        self.failures.append(what[:600])
        print(f"FAILED: {what[:600]}", flush=True)

    def call(self, *argv, check=True):
        done = subprocess.run([sys.executable, *map(str, argv)], cwd=ROOT, capture_output=True,
                              text=True, timeout=300)
        if check and done.returncode:
            raise SystemExit(f"{argv}: {done.stderr[-600:]}")
        return done

    def start(self, script: str, flags: list[str], env=None, limit=120):
        """A run in a process of its own."""
        import runs
        if script not in self.servers:
            self.servers[script] = subprocess.Popen(
                [sys.executable, "-c", runs.SERVER, script], cwd=ROOT, text=True,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.number += 1
        where = self.folder / f"said{self.number}"
        where.mkdir()
        server = self.servers[script]
        job = {"argv": flags, "env": env or {}, "limit": limit, "file_size": 0, "kill_at": (),
               "stdout": str(where / "stdout"), "stderr": str(where / "stderr")}
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        return runs.Forked(server, int(server.stdout.readline()), where)

    def run(self, script: str, flags: list[str], **how) -> float:
        """Seconds of a run that must end well."""
        began = time.monotonic()
        status, _, said = self.start(script, flags, **how).wait()
        if status:
            self.fail(f"{script} {flags[-2:]}: status {status}: {said[-400:]}")
        return time.monotonic() - began

    def close(self) -> None:
        for server in self.servers.values():
            server.stdin.close()
            server.wait(timeout=60)


def same_run(bench: Bench, name: str, straight: Path, out: Path) -> None:
    """Weights, optimizer, counters, log, and the best checkpoint, bit for bit."""
    import runs
    try:
        runs.assert_same_run(straight, out)
        best = [runs.last(folder, "best") for folder in (straight, out)]
        assert best[0].name == best[1].name, "another checkpoint is the best"
        assert runs.same(*map(runs.weights, best)), "the best weights differ"
        left = [p.name for p in out.iterdir() if p.name.endswith((".new", ".old", ".tmp"))]
        assert not left, f"left behind: {left}"
    except Exception as e:
        bench.fail(f"{name}: not the run that was never disturbed: {type(e).__name__} {e}")


# --------------------------------------------------------------------------------- sections


def kills(bench: Bench, until: float) -> str:
    """SIGKILL and SIGTERM at random moments of every stage and of prepare.py, until the end."""
    counts = {signal.SIGKILL: 0, signal.SIGTERM: 0}
    straight, length, rounds = {}, {}, 0
    while time.monotonic() < until or not rounds:
        for name, (script, flags) in bench.stages.items():
            if time.monotonic() > until and rounds:
                break
            if name not in straight:
                straight[name] = bench.folder / f"straight-{name.replace(' ', '-')}"
                length[name] = bench.run(script, [*flags, f"--out_dir={straight[name]}"])
            out = bench.folder / "killed" / "out"
            for attempt in range(200):
                # the last attempts are left alone, so that every run comes to its end
                resume = (out / "checkpoints.json").exists()
                more = ["--init_from=resume"] if resume else []
                run = bench.start(script, [*flags, *more, f"--out_dir={out}"])
                number = bench.rng.choice(list(counts))
                if attempt < 4:
                    time.sleep(bench.rng.random() * length[name])
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(run.pid, number)
                status, _, said = run.wait()
                if status in (-signal.SIGKILL, 128 + signal.SIGTERM):
                    counts[number] += 1
                elif status == 0:
                    break
                elif status != -signal.SIGTERM:         # before the loop: nothing to save yet
                    bench.fail(f"{name}: status {status}: {said[-400:]}")
                    break
            same_run(bench, name, straight[name], out)
            shutil.rmtree(bench.folder / "killed", ignore_errors=True)
        rounds += 1
        prepared = kill_prepare(bench)
        counts[signal.SIGKILL] += prepared
    return (f"{counts[signal.SIGKILL]} SIGKILLs and {counts[signal.SIGTERM]} SIGTERMs over "
            f"{len(bench.stages)} kinds of run and prepare.py")


def kill_prepare(bench: Bench, attempts: int = 2) -> int:
    """Kill prepare.py at random moments; then it ends with the same shards, and nothing else."""
    out, killed = bench.folder / "prepared", 0
    argv = ["data/prepare.py", str(bench.folder / "text.txt"), "--vocab_size=290",
            f"--out={out}", "--workers=1", "--shard_tokens=5000"]
    whole = bench.folder / "prepared-whole"
    if not whole.exists():
        bench.call(*argv[:3], f"--out={whole}", *argv[4:])
    for _ in range(attempts):
        child = subprocess.Popen([sys.executable, *argv], cwd=ROOT, stdout=subprocess.DEVNULL,
                                 stderr=subprocess.DEVNULL)
        time.sleep(1 + bench.rng.random() * 3)
        child.kill()
        killed += child.wait() == -signal.SIGKILL
    bench.call(*argv)
    shards = {p.name: p.read_bytes() for p in whole.glob("*.npy")}
    if shards != {p.name: p.read_bytes() for p in out.glob("*.npy")} or list(out.glob(".*")):
        bench.fail(f"prepare.py: {sorted(p.name for p in out.iterdir())} after kills")
    shutil.rmtree(out)
    return killed


def ranks(bench: Bench, until: float) -> str:
    """One rank of several is killed; the others say so, and another number of ranks goes on."""
    import socket
    killed = 0
    script, flags = bench.stages["train"]
    while time.monotonic() < until or not killed:
        out, count = bench.folder / "ranks" / "out", bench.rng.choice((2, 3))
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            env = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(s.getsockname()[1])}
        group = [bench.start(script, [*flags, "--max_iters=4000", f"--out_dir={out}"],
                             env={**env, "RANK": str(r), "LOCAL_RANK": str(r)})
                 for r in range(count)]
        while not (out / "checkpoints.json").exists() and time.monotonic() < until + 60:
            time.sleep(0.05)
        time.sleep(bench.rng.random())
        victim = bench.rng.randrange(count)
        os.kill(group[victim].pid, signal.SIGKILL)
        killed += 1
        for rank, run in enumerate(group):
            status, _, said = run.wait()
            if rank != victim and (status != 2 or "Traceback" in said
                                   or "another rank" not in said):
                bench.fail(f"rank {rank} of {count}, {victim} killed: {status} {said[-400:]}")
        step = int(json.loads((out / "checkpoints.json").read_text())["last"][5:])
        bench.run(script, ["--init_from=resume", f"--out_dir={out}", f"--max_iters={step + 3}",
                           "--device=cpu"])
        shutil.rmtree(bench.folder / "ranks")
    return f"{killed} ranks killed, resumed on one"


def mutate(rng: random.Random, data: bytes) -> bytes:
    """Bytes changed, cut, doubled, inserted or removed at random places; mostly near the front."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(max(1, min(len(data), rng.choice((64, 2000, len(data) or 1)))))
        how, n = rng.randrange(5), rng.choice((1, 1, 2, 9, 100))
        if how == 0:
            data[at:at + n] = rng.randbytes(n)
        elif how == 1:
            del data[at:at + n]
        elif how == 2:
            data[at:at] = rng.choice((b"0", b"-", b'"', b"[", b"}", b"9" * 30, b"\x00", b"\xff",
                                      b"1e999", b"null", rng.randbytes(n)))
        elif how == 3:
            data[at:at] = data[at:at + n]
        else:
            data = data[:at]
    return bytes(data)


WRONG = (None, True, -1, 1e308, float("inf"), 2 ** 70, "x", "", [], {}, [[]], "9" * 40)


def places(value, path=()):
    """The path of every place of a JSON value, the first few of a long list or table."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(
        value, list) else ()
    for key, below in list(inner)[:12]:
        yield from places(below, (*path, key))


def changed(rng: random.Random, text: str) -> bytes:
    """A JSON text with a value of another type at one place, or without it."""
    value = json.loads(text)
    path = rng.choice([p for p in places(value) if p])
    at = value
    for key in path[:-1]:
        at = at[key]
    if rng.random() < 0.2:
        del at[path[-1]]
    else:
        at[path[-1]] = rng.choice(WRONG)
    return json.dumps(value).encode()


def mutations(bench: Bench, until: float) -> str:
    """Files of every kind, damaged: read as before, or one sentence, within seconds."""
    import checkpoint
    import runs
    import train
    from formats import safetensors
    from data import loader
    from training import faults
    model = runs.last(bench.folder / "chat")
    data, chats_file = bench.folder / "text", next((bench.folder / "skills").glob("val*.jsonl"))

    def tokens(folder):
        found = loader.Dataset(folder)
        for split in found.shards:
            ids = found.tokens(split)
            ids.read(0, min(9, len(ids)))

    readers = [     # (file, the folder it is in, reader of such a folder)
        (model / "model.safetensors", lambda d: safetensors.read_header(d / "model.safetensors")),
        (model / "config.json", checkpoint.read_config),
        (model / "tokenizer.json", checkpoint.load_tokenizer),
        (model / "tokenizer_config.json", checkpoint.load_tokenizer),
        (model / "trainer.pt", checkpoint.load_trainer),
        (bench.folder / "chat" / "log.jsonl", lambda d: faults.read_log(
            d / "log.jsonl", train.State(step=2))),
        (bench.folder / "chat" / "checkpoints.json", checkpoint.resolve),
        (data / "meta.json", tokens), (data / "train_00000.npy", tokens),
        (chats_file, lambda d: list(loader.Reader().records(d / chats_file.name)))]
    counts = {file.name: [0, 0] for file, _ in readers}
    slowest = (0.0, "")

    def hang(number, frame):
        raise TimeoutError("more than 20 seconds")
    signal.signal(signal.SIGALRM, hang)
    while time.monotonic() < until or not counts[readers[-1][0].name][0]:
        for file, read in readers:
            copy = bench.folder / "mutated"
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(file.parent, copy, ignore=lambda folder, names: [
                n for n in names if n.startswith("step_")])
            if file.name == "checkpoints.json":         # what it names, so that it resolves
                (copy / model.name).mkdir()
                (copy / model.name / "config.json").touch()
            for _ in range(20):
                whole = file.read_bytes()
                structured = file.suffix == ".json" and bench.rng.random() < 0.5
                bad = changed(bench.rng, whole.decode()) if structured else mutate(bench.rng,
                                                                                   whole)
                (copy / file.name).write_bytes(bad)
                began = time.monotonic()
                signal.alarm(20)
                try:
                    with contextlib.redirect_stderr(io.StringIO()):
                        read(copy)
                except config.UserError as e:
                    counts[file.name][1] += 1
                    if len(str(e)) > 1000:
                        bench.fail(f"{file.name}: a sentence of {len(str(e))} characters")
                except Exception as e:
                    kept = bench.folder / f"bad-{len(bench.failures)}-{file.name}"
                    kept.write_bytes(bad)
                    bench.fail(f"{file.name}: {type(e).__name__}: {str(e)[:200]} ({kept})")
                finally:
                    signal.alarm(0)
                counts[file.name][0] += 1
                slowest = max(slowest, (time.monotonic() - began, file.name))
    told = ", ".join(f"{name} {n} ({refused} refused)" for name, (n, refused) in counts.items())
    return f"{told}; slowest {slowest[0]:.1f} s ({slowest[1]})"


def configs(bench: Bench, until: float) -> str:
    """Every setting of every script with wrong values: a sentence, or a value of its type."""
    from test_ranges import MODULES, class_of
    tried = 0
    for module in MODULES:
        cls = class_of(module)
        for name in config.field_types(cls):
            for value in ("nan", "-inf", "-1e30", "9" * 60, "x" * 10 ** 5, "", "[]", "\x00\udcff"):
                tried += 1
                try:
                    config.configure(cls, [f"--{name}={value}"])
                except config.UserError as e:
                    if len(str(e)) > 1000:
                        bench.fail(f"{module} --{name}: {len(str(e))} characters")
                except Exception as e:
                    bench.fail(f"{module} --{name}={value[:20]}: {type(e).__name__}: {e}")
    return f"{tried} wrong values"


def pairs(bench: Bench, until: float) -> str:
    """Two at once: prepare.py, one out_dir, one cache of a teacher, one converted folder."""
    done, script = 0, {}
    text = str(bench.folder / "text.txt")
    for name in ("train", "distill cache"):
        script[name] = bench.stages[name]
    while time.monotonic() < until or not done:
        kind = ("prepare", "train", "distill cache", "convert")[done % 4]
        where = bench.folder / "pair"
        shutil.rmtree(where, ignore_errors=True)
        where.mkdir()
        wait = bench.rng.random() * 1.5
        if kind in script:
            name, flags = script[kind]
            outs = [where / "out"] * 2 if kind == "train" else [where / "a", where / "b"]
            both = []
            for out in outs:
                both.append(bench.start(name, [*flags, f"--out_dir={out}", *(
                    [f"--cache_dir={where / 'cache'}"] if "cache" in kind else [])]))
                time.sleep(wait)
            ends = [(status, said) for status, _, said in (run.wait() for run in both)]
        else:
            argv = ["data/prepare.py", text, "--vocab_size=290", f"--out={where / 'out'}",
                    "--workers=1"] if kind == "prepare" else [
                    "checkpoint.py", "convert", str(bench.folder / "chat"), str(where / "out")]
            both = []
            for _ in range(2):
                both.append(subprocess.Popen([sys.executable, *argv], cwd=ROOT, text=True,
                                             stdout=subprocess.DEVNULL, stderr=subprocess.PIPE))
                time.sleep(wait / 4)
            ends = [(child.returncode, said) for child, said in
                    [(child, child.communicate(timeout=120)[1]) for child in both]]
        told = [(status, said[-300:]) for status, said in ends]
        if any(status not in (0, 2) or "Traceback" in said for status, said in ends):
            bench.fail(f"{kind} twice: {told}")
        if not any(status == 0 for status, _ in ends):
            bench.fail(f"{kind} twice: neither came to its end: {told}")
        left = [p.name for p in where.rglob(".*") if p.name != ".writable"]
        if left:
            bench.fail(f"{kind} twice: left behind {left}")
        done += 1
    shutil.rmtree(where)
    return f"{done} pairs"


def main(cfg: Config) -> None:
    sections = {"kills": kills, "ranks": ranks, "mutations": mutations, "configs": configs,
                "pairs": pairs}
    for name in cfg.only:
        importlib.import_module("runs")
        if name not in sections:
            raise config.UserError(f"unknown section {name!r}; choose from {', '.join(sections)}")
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), cfg.seed)
        share = cfg.minutes * 60 / sum(SHARES[name] for name in cfg.only)
        try:
            for name in cfg.only:
                start = time.monotonic()
                told = sections[name](bench, start + SHARES[name] * share)
                print(f"{name}: {told}, in {time.monotonic() - start:.0f} s", flush=True)
        finally:
            bench.close()
        print(f"{len(bench.failures)} failures, {time.monotonic() - began:.0f} s in all")
        if bench.failures:
            sys.exit(1)


if __name__ == "__main__":
    config.run(main, Config)
