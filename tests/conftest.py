"""Tests import the scripts from the repository root and run them as a user would."""
import os
import sys
from pathlib import Path

if not Path("/dev/nvidiactl").exists():
    # Triton's kernels run in its interpreter; it reads this when it is first imported
    os.environ.setdefault("TRITON_INTERPRET", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")        # an oracle must never wait for a network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
