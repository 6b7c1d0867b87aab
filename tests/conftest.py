"""Tests import the scripts from the repository root and run them as a user would.

`make test` runs them in a process a core, a file in one process: so files share nothing but the
repository, which no test writes to, and the names of tests hold no addresses and no sets' order.
"""
import os
import sys
from pathlib import Path

import pytest

# Tensors as small as these gain nothing from a second core, which another test is using. Read when
# torch is first imported, here and in the processes that tests start: so before anything else.
os.environ.setdefault("OMP_NUM_THREADS", "1")
if not Path("/dev/nvidiactl").exists():
    # Triton's kernels run in its interpreter; it reads this when it is first imported
    os.environ.setdefault("TRITON_INTERPRET", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), *map(str, (ROOT / "tests").glob("*/"))]
os.environ.setdefault("HF_HUB_OFFLINE", "1")        # an oracle must never wait for a network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_make_parametrize_id(val, argname):
    """Bytes may hold a time, as gzip's do, and a test has one name in every process."""
    return argname if isinstance(val, bytes) else None


@pytest.fixture(autouse=True)
def fresh():
    """The same random numbers whatever the order of the tests; the backend as it was before."""
    kernels = sys.modules.get("kernels")
    if kernels is None:                 # a test file that needs neither
        yield
        return
    kernels.torch.manual_seed(0)
    before = kernels.use("auto")
    yield
    kernels.use(before)
