#!/usr/bin/env bash
# torch 2.13: the first DistributedDataParallel imports torch.distributed.nn.functional, whose
# functions have the process group of that moment as the default of an argument (`group=` is
# evaluated when they are defined). destroy_process_group() then does not destroy it: the gloo
# threads of the group live on. Where the module was imported before there was a group, the default
# is None, and the threads end. A program that starts and ends groups keeps all of their threads.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy
cat > "$work/group.py" <<'PY'
import gc
import inspect
import os
import sys
import tempfile

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

if sys.argv[1] == "imported before":
    import torch.distributed.nn.functional


def count_threads():
    return len(os.listdir("/proc/self/task"))


torch.set_num_threads(1)
before = count_threads()
store = f"{tempfile.mkdtemp()}/store"
dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
model = DistributedDataParallel(torch.nn.Linear(2, 2))
model(torch.ones(1, 2)).sum().backward()
del model
functional = sys.modules["torch.distributed.nn.functional"]
default = inspect.signature(functional.all_reduce).parameters["group"].default
dist.destroy_process_group()
gc.collect()
left = count_threads() - before
print(f"functional {sys.argv[1]}: all_reduce's default group is a {type(default).__name__}; "
      f"threads left after destroy_process_group(): {left}")
expected = (type(None), False) if sys.argv[1] == "imported before" else (dist.ProcessGroup, True)
sys.exit((type(default), left > 0) != expected)
PY
"$work/venv/bin/python" -c "import torch; print('torch', torch.__version__)"
"$work/venv/bin/python" "$work/group.py" "imported before" 2>&1 | grep -v -i warn
"$work/venv/bin/python" "$work/group.py" "imported by DDP" 2>&1 | grep -v -i warn
