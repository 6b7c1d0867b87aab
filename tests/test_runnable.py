"""Every tracked Python file that is only imported, run by a user: one sentence and status 2."""
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run_file(path):
    return path, subprocess.run([sys.executable, path], cwd=ROOT, capture_output=True, text=True,
                                timeout=300)


def list_imported():
    """Paths of the tracked files that no user runs: those that do not end in config.run()."""
    paths = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True,
                           check=True).stdout.split()
    paths = [path for path in paths if not path.startswith(("tests/", "config/"))]
    runnable = [path for path in paths if "run(main" in (ROOT / path).read_text(encoding="utf-8")]
    assert {"train.py", "data/prepare.py", "benchmarks/lifecycle.py"} <= set(runnable)
    assert len(runnable) < 25
    return [path for path in paths if path not in runnable]


def test_every_file_that_is_only_imported_says_so():
    """A folder's files stop at their first import of ours, config, before those of packages."""
    paths = list_imported()
    assert len(paths) > 80
    with ThreadPoolExecutor(2) as pool:
        for path, done in pool.map(run_file, paths):
            assert (done.returncode, done.stdout) == (2, ""), (path, done.stderr)
            assert done.stderr == (f"error: {Path(path).name} is imported by the scripts and does "
                                   "nothing by itself: README.md lists what to run\n"), path
