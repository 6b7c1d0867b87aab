"""What the tests of train.py and of the stages share: to look into a run, and to start one in a
process of its own.

Most runs happen inside pytest. Those that are killed, signalled, starved of disk or made of
several ranks are forks of one process that has imported the script and computed nothing: a fork
costs a tenth of a second, a fresh interpreter with PyTorch two to three.
"""
import json
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import kernels
from training.optim import Optimizer

ROOT = Path(kernels.__file__).parent
TIMINGS = {"seconds", "tokens_per_second", "memory", "mfu"}


@pytest.fixture(autouse=True)
def quiet_machine():
    """The form of the operations as it was before."""
    backend = kernels.use("auto")
    yield
    kernels.use(backend)


# ------------------------------------------------------------------------- to look into a run


def last(out, which="last"):
    return out / json.loads((out / "checkpoints.json").read_text())[which]


def weights(folder):
    return load_file(folder / "model.safetensors")


def trainer(folder):
    return torch.load(folder / "trainer.pt", weights_only=True)


def log(out):
    """The rows of log.jsonl without what a clock measured; strict JSON: NaN is refused."""
    def refuse(word):
        raise AssertionError(f"{word} is not JSON")
    lines = (out / "log.jsonl").read_text().split("\n")
    assert lines.pop() == ""                                # the last line is whole
    return [{k: v for k, v in json.loads(line, parse_constant=refuse).items()
             if k not in TIMINGS} for line in lines]


def curve(out, key="loss"):
    return [row[key] for row in log(out) if key in row]


def same(a, b):
    """Equal bit for bit, through dictionaries of tensors and numbers."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def assert_same_run(a, b):
    """Weights, optimizer, counters and log of two runs are equal bit for bit."""
    one, two = last(a), last(b)
    assert one.name == two.name
    assert same(weights(one), weights(two))
    one, two = trainer(one), trainer(two)
    assert same(one["optimizer"], two["optimizer"])
    assert {**one["state"], "seconds": 0} == {**two["state"], "seconds": 0}
    assert log(a) == log(b)


def close(a, b, tolerance=1e-5):
    for key in ("loss", "val_loss", "grad_norm"):
        one, two = np.array(curve(a, key)), np.array(curve(b, key))
        assert one.shape == two.shape and len(one) and np.abs(one - two).max() < tolerance, key


class Grads(Optimizer):
    """An optimizer that keeps the gradient of the last step and moves nothing."""

    def __init__(self, model):
        Optimizer.__init__(self, model.named_parameters())
        self.model, self.last = model, None

    def step(self, lr_scale=1.0):
        self.last = {n: p.grad.clone() for n, p in self.model.named_parameters()}


def said(*turns):
    """Messages of roles and contents in turn."""
    return [{"role": r, "content": c} for r, c in zip(turns[::2], turns[1::2])]


# ------------------------------------------------------------- runs in processes of their own

# Reads a job a line: {"wait": pid} -> its exit status; anything else forks a run -> its pid
SERVER = """
import glob, json, os, re, resource, signal, sys, traceback
import config, torch
script = __import__(sys.argv[1])
torch.set_num_threads(1)
for line in sys.stdin:
    job = json.loads(line)
    if "wait" in job:
        print(os.waitstatus_to_exitcode(os.waitpid(job["wait"], 0)[1]), flush=True)
        continue
    pid = os.fork()
    if pid:
        print(pid, flush=True)
        continue
    signal.alarm(job["limit"])                              # a hung run dies, and the test fails
    os.environ.update(job["env"])
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    if job["file_size"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_size"], resource.RLIM_INFINITY))
    if job["kill_at"]:
        pattern, left = job["kill_at"]
        def watch(event, args):
            # Python announces every opening, renaming and removing of a file before it happens
            global left
            if event == "open" and isinstance(args[1], str) and args[1][0] in "wax":
                event = "write"
            if event.startswith(("write", "os.")) and re.fullmatch(pattern, f"{event} {args[0]}"):
                left -= 1
                if not left:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(watch)
    sys.argv = [f"{script.__name__}.py", *job["argv"]]
    status = 0
    try:
        config.run(script.main, script.Config)
    except SystemExit as e:
        status = e.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    # a thread of gloo's that outlives the run may abort the process while Python shuts down
    names = [open(path).read().strip() for path in glob.glob("/proc/self/task/*/comm")]
    if any("gloo" in name for name in names):
        print("left running:", names, file=sys.stderr)
        status = status or 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
"""


@dataclass
class Forked:
    """A run in a process of its own."""
    server: subprocess.Popen
    pid: int
    folder: Path

    def wait(self):
        """(exit status, stdout, stderr); the status of a killed run is minus the signal."""
        self.server.stdin.write(json.dumps({"wait": self.pid}) + "\n")
        self.server.stdin.flush()
        status = int(self.server.stdout.readline())
        return status, *((self.folder / n).read_text() for n in ("stdout", "stderr"))


def forks_of(script):
    """A fixture: the process from which runs of a script are forked, "train" or "dpo" say."""
    @pytest.fixture(scope="session")
    def forks():
        server = subprocess.Popen([sys.executable, "-c", SERVER, script], cwd=ROOT, text=True,
                                  stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        yield server
        server.stdin.close()
        server.wait(timeout=30)
    return forks


def starter(forks, tmp_path, first):
    """start(*flags): a run of the forks' script with the flags `first()` and these, in a process;
    name its folder with --out_dir. bare: without the first ones."""
    made = []

    def start(*flags, bare=False, env=None, file_size=0, kill_at=(), limit=90):
        folder = tmp_path / f"process{len(made)}"
        folder.mkdir()
        job = {"argv": [*([] if bare else first()), *flags], "env": env or {}, "limit": limit,
               "file_size": file_size, "kill_at": kill_at,
               **{name: str(folder / name) for name in ("stdout", "stderr")}}
        forks.stdin.write(json.dumps(job) + "\n")
        forks.stdin.flush()
        made.append(Forked(forks, int(forks.stdout.readline()), folder))
        return made[-1]
    return start


def ranks(fork, count, *flags, **how):
    """Start `count` ranks of one run, as torchrun would."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [fork(*flags, env={**env, "RANK": str(r), "LOCAL_RANK": str(r)}, **how)
            for r in range(count)]


def complaint(outcome):
    """The one sentence of a run that ended by the user's mistake; stdout stays empty."""
    status, stdout, stderr = outcome
    assert status == 2, stderr
    assert stdout == "" and "Traceback" not in stderr
    found = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(found) == 1 and stderr.endswith(found[0] + "\n"), stderr
    return found[0]
