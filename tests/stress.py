"""What the suite has no time for, with figures: `make stress`, at most twenty minutes on two cores.

    python tests/stress.py                          # all of it
    python tests/stress.py --minutes=1              # the same, with a share of the repetitions
    python tests/stress.py --only=kills,pairs --seed=7

Every section repeats what is in COUNTS as often as stands there (a share of it with fewer minutes)
and prints what it did. A run that did not end bit for bit as the one that was never disturbed, a
wrong value, a traceback, or a hang is a failure, and the status is then 1. Runs are small, and
forked from processes that have imported PyTorch; two of them run at a time.
"""
import contextlib
import http.server
import importlib
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.update(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1")
import config  # noqa: E402

WORKERS = 2
SMALL = ["--batch_size=2", "--gradient_accumulation_steps=2", "--warmup_iters=2",
         "--eval_interval=4", "--eval_iters=1", "--log_interval=1", "--device=cpu",
         "--dtype=float32", "--max_iters=24", "--dropout=0.1"]
SHAPE = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=64"]
EXPERTS = ["--family=qwen3_moe", "--num_experts=4", "--num_experts_per_tok=2"]
# how often each section repeats what it does, with --minutes=20
COUNTS = {"kills": 100, "terms": 40, "ranks": 8, "mutations": 2000, "pairs": 24}
CHUNK = 250                             # mutations of one kind that a worker makes at once
VALUES = ("nan", "-inf", "-1e30", "9" * 60, "x" * 10 ** 5, "", "[]", "\x00\udcff")


@dataclass
class Config:
    minutes: float = 20.0           # of all sections together: a share of the repetitions
    only: list[str] = field(default_factory=lambda: ["kills", "ranks", "mutations", "configs",
                                                     "pairs"])      # sections, by commas
    seed: int = 0
    ranges = {"minutes": "(0, 1e4]"}


class Bench:
    """The folder of a stress run, its data, and processes from which runs are forked."""

    def __init__(self, folder: Path, cfg: Config):
        self.folder = folder
        self.rng = random.Random(cfg.seed)
        self.seed = cfg.seed
        self.scale = cfg.minutes / 20
        self.servers = {}
        self.number = 0
        self.lock = threading.Lock()
        self.failures: list[str] = []
        self.text = folder / "text.txt"
        words = ["".join(self.rng.choices("abcdefgh", k=self.rng.randrange(2, 8)))
                 for _ in range(300)]
        self.text.write_text("\n".join(" ".join(self.rng.choices(words, k=40))
                                       for _ in range(800)))
        self.call("data/prepare.py", self.text, "--vocab_size=290", f"--out={folder / 'text'}",
                  "--workers=1")
        self.call("data/skills.py", "skills", "--train=400", "--val=20", "--test=10",
                  "--pref=60", "--rl=1", f"--out={folder / 'skills'}")
        labels = folder / "labels.csv"
        labels.write_text("text,label\n" + "".join(
            f"{' '.join(self.rng.choices(words, k=6))},{self.rng.choice(('ham', 'spam'))}\n"
            for _ in range(200)))
        data = f"--dataset={folder / 'text'}"
        chats = f"--dataset={folder / 'skills'}"
        for name, flags in (("base", []), ("experts", EXPERTS)):
            self.run("train", [data, *SHAPE, *SMALL, *flags, "--max_iters=2", "--block_size=128",
                               f"--out_dir={folder / name}"])
        self.run("sft", [f"--init_from={folder / 'base'}", chats, *SMALL, "--max_iters=2",
                         f"--out_dir={folder / 'chat'}"])
        self.run("sft", [f"--init_from={folder / 'base'}", chats, *SMALL, "--max_iters=2",
                         "--lora_rank=2", f"--out_dir={folder / 'adapted'}"])
        talk = [f"--init_from={folder / 'chat'}", chats, *SMALL]
        student = [f"--teacher={folder / 'chat'}", chats, *SMALL, "--n_layer=1", "--n_head=2",
                   "--n_embd=16"]
        # name -> script, flags; resumed by --init_from=resume
        self.stages = {
            "train": ("train", [data, *SHAPE, *SMALL]),
            "train muon": ("train", [data, *SHAPE, *SMALL, "--optimizer=muon", "--family=qwen3"]),
            "train moe": ("train", [data, *SHAPE, *SMALL, *EXPERTS]),
            "sft": ("sft", talk),
            "sft lora": ("sft", [*talk, "--lora_rank=2"]),
            "sft moe": ("sft", [f"--init_from={folder / 'experts'}", chats, *SMALL]),
            "classify": ("classify", [f"--init_from={folder / 'base'}", f"--dataset={labels}",
                                      *SMALL]),
            "dpo": ("dpo", talk),
            "distill": ("distill", student),
        }

    def count(self, name: str) -> int:
        """Return how often something is repeated: its count, or the share of it."""
        return math.ceil(COUNTS[name] * self.scale)

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
        """Start a run in a process of its own, forked from a server of this thread."""
        import runs
        key = (threading.get_ident(), script)
        with self.lock:
            if key not in self.servers:
                self.servers[key] = subprocess.Popen(
                    [sys.executable, "-c", runs.SERVER, script], cwd=ROOT, text=True,
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            self.number += 1
            where = self.folder / f"said{self.number}"
        where.mkdir()
        server = self.servers[key]
        job = {"argv": list(map(str, flags)), "env": env or {}, "limit": limit, "file_size": 0,
               "kill_at": (), "stdout": str(where / "stdout"), "stderr": str(where / "stderr")}
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        return runs.Forked(server, int(server.stdout.readline()), where)

    def run(self, script: str, flags: list[str], **how) -> float:
        """Return the seconds of a run that must end well."""
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
    """Compare weights, optimizer, counters, log, and the best checkpoint, bit for bit."""
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


# --- sections ------------------------------------------------------------------------------------


def kills(bench: Bench) -> str:
    """SIGKILL and SIGTERM at random moments of every stage and of prepare.py."""
    counts = Counter()
    straight = {}
    wanted = {signal.SIGKILL: bench.count("kills"), signal.SIGTERM: bench.count("terms")}

    def missing() -> list[int]:
        return [number for number, count in wanted.items() if counts[number] < count]

    def disturb(name: str, round_: int) -> None:
        rng = random.Random(f"{bench.seed} {name} {round_}")
        if name == "prepare":
            counts[signal.SIGKILL] += kill_prepare(bench, rng)
            return
        script, flags = bench.stages[name]
        if name not in straight:
            folder = bench.folder / f"straight-{name.replace(' ', '-')}"
            straight[name] = (folder, bench.run(script, [*flags, f"--out_dir={folder}"]))
        folder, length = straight[name]
        out = bench.folder / f"killed-{name.replace(' ', '-')}" / "out"
        for attempt in range(200):
            # the last attempts are left alone, so that every run comes to its end
            resume = ["--init_from=resume"] if (out / "checkpoints.json").exists() else []
            run = bench.start(script, [*flags, *resume, f"--out_dir={out}"])
            number = rng.choices((signal.SIGKILL, signal.SIGTERM), (3, 2))[0]
            if attempt < 4:
                time.sleep(rng.random() * length)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(run.pid, number)
            status, _, said = run.wait()
            if status in (-signal.SIGKILL, 128 + signal.SIGTERM, -signal.SIGTERM):
                counts[number] += 1                     # the last: before the loop of training
            elif status == 0:
                break
            else:
                bench.fail(f"{name}: status {status}: {said[-400:]}")
                break
        same_run(bench, name, folder, out)
        shutil.rmtree(out.parent, ignore_errors=True)

    def work(names: list[str]) -> None:
        for round_ in range(50):
            for name in names:
                if round_ and not missing():
                    return
                disturb(name, round_)

    names = [*bench.stages, "prepare"]
    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(work, [names[n::WORKERS] for n in range(WORKERS)]))
    if missing():
        bench.fail(f"kills: {dict(counts)} of {wanted}")
    return (f"{counts[signal.SIGKILL]} SIGKILLs and {counts[signal.SIGTERM]} SIGTERMs over "
            f"{len(bench.stages)} kinds of run and prepare.py")


def kill_prepare(bench: Bench, rng: random.Random, attempts: int = 2) -> int:
    """Kill prepare.py at random moments; then it ends with the same shards, and nothing else."""
    out = bench.folder / "prepared"
    straight = bench.folder / "prepared-straight"
    argv = ["data/prepare.py", str(bench.text), "--vocab_size=290", "--workers=1",
            "--shard_tokens=5000"]
    if not straight.exists():
        bench.call(*argv, f"--out={straight}")
    killed = 0
    for _ in range(attempts):
        child = subprocess.Popen([sys.executable, *argv, f"--out={out}"], cwd=ROOT,
                                 stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(1 + rng.random() * 3)
        child.kill()
        killed += child.wait() == -signal.SIGKILL
    bench.call(*argv, f"--out={out}")
    shards = {p.name: p.read_bytes() for p in straight.glob("*.npy")}
    if shards != {p.name: p.read_bytes() for p in out.glob("*.npy")} or list(out.glob(".*")):
        bench.fail(f"prepare.py: {sorted(p.name for p in out.iterdir())} after kills")
    shutil.rmtree(out)
    return killed


def start_ranks(bench: Bench, count: int, flags: list[str]) -> list:
    """Start the ranks of one run, as torchrun would."""
    import socket
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [bench.start("train", flags, env={**env, "RANK": str(r), "LOCAL_RANK": str(r)})
            for r in range(count)]


def ranks(bench: Bench) -> str:
    """One rank of several is killed; the others say so, and another number of ranks goes on to
    the losses of the run that was never disturbed, to float32's rounding."""
    import runs
    flags = [*bench.stages["train"][1], "--dropout=0", "--batch_size=1",
             "--gradient_accumulation_steps=12", "--lr_decay_iters=4000"]
    straight = bench.folder / "straight-ranks"
    bench.run("train", [*flags, "--max_iters=150", f"--out_dir={straight}"])
    expected = runs.curve(straight)
    changes = Counter()
    for number in range(bench.count("ranks")):
        out = bench.folder / "ranks" / "out"
        count = (2, 3, 4)[number % 3]
        after = bench.rng.choice([n for n in (1, 2, 3, 4) if n != count])
        group = start_ranks(bench, count, [*flags, "--max_iters=4000", f"--out_dir={out}"])
        limit = time.monotonic() + 90
        while not (out / "checkpoints.json").exists() and time.monotonic() < limit:
            time.sleep(0.05)
        time.sleep(bench.rng.random())
        victim = bench.rng.randrange(count)
        os.kill(group[victim].pid, signal.SIGKILL)
        for rank, run in enumerate(group):
            status, _, said = run.wait()
            if rank != victim and (status != 2 or "Traceback" in said
                                   or "another rank" not in said):
                bench.fail(f"rank {rank} of {count}, {victim} killed: {status} {said[-400:]}")
        step = int(json.loads((out / "checkpoints.json").read_text())["last"][5:])
        resume = ["--init_from=resume", f"--out_dir={out}", f"--max_iters={step + 3}",
                  "--device=cpu"]
        for rank, run in enumerate(start_ranks(bench, after, resume) if after > 1 else
                                   [bench.start("train", resume)]):
            status, _, said = run.wait()
            if status:
                bench.fail(f"resumed on {after} ranks of {count}: {status} {said[-400:]}")
        steps = [row["step"] for row in runs.log(out) if "loss" in row]
        if steps != list(range(1, step + 4)):
            bench.fail(f"resumed on {after} ranks of {count}: steps {steps[-6:]} after {step}")
        worst = max(abs(a - b) for a, b in zip(runs.curve(out), expected))
        if worst > 1e-4:
            bench.fail(f"resumed on {after} ranks of {count}: a loss differs by {worst}")
        changes[f"{count} -> {after}"] += 1
        shutil.rmtree(bench.folder / "ranks")
    told = ", ".join(f"{change}: {n}" for change, n in sorted(changes.items()))
    return f"{sum(changes.values())} ranks killed, resumed on another number of ranks ({told})"


KINDS = []                              # of this worker: every kind of file, in its own folder


def make_kinds(folder: str) -> None:
    """Make every kind of file for this worker process; a damaged one is no other worker's."""
    import formats_read
    KINDS.extend(formats_read.make_all(Path(tempfile.mkdtemp(dir=folder))))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)        # progress bars and warnings of libraries


def mutate_kind(job: tuple[int, str, int]) -> tuple[int, Counter, float, list[str]]:
    """Judge `count` damaged files of one kind: what came of them, the slowest, the failures."""
    import mutations as damage
    number, seed, count = job
    kind = KINDS[number]
    rng = random.Random(f"{kind.name} {seed}")
    told = Counter()
    failures = []
    slowest = 0.0
    for _ in range(count):
        data = damage.damage(rng, kind)
        began = time.monotonic()
        try:
            told[damage.judge(kind, data)] += 1
        except AssertionError as e:
            kind.file.write_bytes(kind.sound)
            failures.append(f"{e}: {data[:300]!r}")
        slowest = max(slowest, time.monotonic() - began)
    return number, told, slowest, failures


def mutations(bench: Bench) -> str:
    """Files of every kind, damaged: the same value, the library's, or one sentence."""
    context = multiprocessing.get_context("spawn")
    count = bench.count("mutations")
    names = {}
    with context.Pool(WORKERS, make_kinds, (str(bench.folder),)) as pool:
        names = pool.apply(list_names)
        told = {number: Counter() for number in range(len(names))}
        slowest = (0.0, "")
        sizes = [min(CHUNK, count - at) for at in range(0, count, CHUNK)]
        jobs = [(number, f"{bench.seed} {n}", size) for n, size in enumerate(sizes)
                for number in range(len(names))]
        for number, results, seconds, failures in pool.imap_unordered(mutate_kind, jobs):
            told[number] += results
            slowest = max(slowest, (seconds, names[number]))
            for failure in failures:
                bench.fail(failure)
    for number, results in told.items():
        print(f"  {names[number]}: {sum(results.values())} "
              f"({', '.join(f'{n} {what}' for what, n in sorted(results.items()))})", flush=True)
    total = sum(told.values(), Counter())
    return (f"{total.total():,} of {len(names)} kinds, {count:,} each ({total['same']:,} the same, "
            f"{total['library']:,} as the library, {total['refused']:,} refused); slowest "
            f"{slowest[0]:.1f} s ({slowest[1]})")


def list_names() -> list[str]:
    return [kind.name for kind in KINDS]


def configs(bench: Bench) -> str:
    """Every setting of every script with wrong values: a sentence, or a value of its type."""
    from test_ranges import MODULES, class_of
    tried = 0
    refused = 0
    for module in MODULES:
        cls = class_of(module)
        for name in config.field_types(cls):
            for value in VALUES:
                tried += 1
                try:
                    config.configure(cls, [f"--{name}={value}"])
                except config.UserError as e:
                    refused += 1
                    if len(str(e)) > 1000:
                        bench.fail(f"{module} --{name}: {len(str(e))} characters")
                except Exception as e:
                    bench.fail(f"{module} --{name}={value[:20]}: {type(e).__name__}: {e}")
    return (f"{tried:,} wrong values: {len(VALUES)} kinds at every field of {len(MODULES)} "
            f"scripts, {refused:,} refused and the others of the field's type (text, a path)")


class Server(http.server.ThreadingHTTPServer):
    """One text at every address, sent slowly enough that two downloads overlap."""

    def __init__(self, body: bytes):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                for at in range(0, len(body), 20_000):
                    self.wfile.write(body[at:at + 20_000])
                    time.sleep(0.05)

            def log_message(self, *args):
                pass
        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()


def pairs(bench: Bench) -> str:
    """Two at once: neither ends with a wrong result and status 0, and one comes to its end."""
    server = Server(bench.text.read_bytes())
    url = f"http://127.0.0.1:{server.server_port}/text.txt"
    folder = bench.folder
    prepare = ["data/prepare.py", "--vocab_size=290", "--workers=1"]
    adapter = next((folder / "adapted").glob("step_*/adapter"))
    # kind -> how each of the two is called, by the folder of the pair
    kinds = {
        "prepare": lambda w, n: [*prepare, bench.text, f"--out={w / 'out'}"],
        "train": lambda w, n: ["train.py", *bench.stages["train"][1], f"--out_dir={w / 'out'}"],
        "teacher cache": lambda w, n: ["distill.py", *bench.stages["distill"][1],
                                       "--generate=24", "--generate_temperature=1",
                                       "--generate_tokens=100", f"--cache_dir={w / 'cache'}",
                                       f"--out_dir={w / 'out'}-{n}"],
        "download": lambda w, n: [*prepare, url, f"--cache={w / 'cache'}",
                                  f"--out={w / 'out'}-{n}"],
        "convert": lambda w, n: ["checkpoint.py", "convert", folder / "chat", w / "out"],
        "merge": lambda w, n: ["lora.py", "merge", adapter, w / "out"],
    }
    alone = {}
    for kind, call in kinds.items():
        where = folder / f"alone-{kind.replace(' ', '-')}"
        where.mkdir()
        bench.call(*call(where, 0))
        alone[kind] = list_results(where)
    done = Counter()
    ends = Counter()
    for number in range(bench.count("pairs")):
        kind = list(kinds)[number % len(kinds)]
        where = folder / "pair"
        where.mkdir()
        both = []
        for n in range(2):
            both.append(subprocess.Popen(
                [sys.executable, *map(str, kinds[kind](where, n))], cwd=ROOT, text=True,
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE))
            time.sleep(bench.rng.random())
        told = []
        for child in both:
            said = child.communicate(timeout=120)[1]
            told.append((child.returncode, said[-300:]))
            ends[child.returncode] += 1
            if child.returncode not in (0, 2) or "Traceback" in said:
                bench.fail(f"{kind} twice: {told}")
        if not any(status == 0 for status, _ in told):
            bench.fail(f"{kind} twice: neither came to its end: {told}")
        results = list_results(where)
        if any(results[name] != alone[kind].get(name) for name in results) \
                or not alone[kind].keys() <= results.keys():
            bench.fail(f"{kind} twice: other files than one alone makes: {told}")
        left = [p.name for p in where.rglob("*") if p.name.endswith((".part", ".new", ".old"))
                or p.name.startswith(".") and p.name != ".writable"]
        if left:
            bench.fail(f"{kind} twice: left behind {left}")
        done[kind] += 1
        shutil.rmtree(where)
    server.shutdown()
    told = ", ".join(f"{n} of {kind}" for kind, n in done.items())
    return (f"{done.total()} pairs ({told}): {ends[0]} runs came to the result of one alone, "
            f"{ends[2]} were refused in a sentence")


def list_results(folder: Path) -> dict[str, bytes]:
    """Return the weights and shards in a folder: "out-1/x" is "out-0/x", as one alone has it."""
    return {str(path.relative_to(folder)).replace("out-1", "out-0"): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.suffix in (".npy", ".safetensors") and path.is_file()}


def main(cfg: Config) -> None:
    sections = {"kills": kills, "ranks": ranks, "mutations": mutations, "configs": configs,
                "pairs": pairs}
    for name in cfg.only:
        if name not in sections:
            raise config.UserError(f"unknown section {name!r}; choose from {', '.join(sections)}")
    began = time.monotonic()
    importlib.import_module("runs")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), cfg)
        try:
            for name in cfg.only:
                start = time.monotonic()
                told = sections[name](bench)
                print(f"{name}: {told}, in {time.monotonic() - start:.0f} s", flush=True)
        finally:
            bench.close()
        print(f"{len(bench.failures)} failures, {time.monotonic() - began:.0f} s in all")
        if bench.failures:
            sys.exit(1)


if __name__ == "__main__":
    config.run(main, Config)
