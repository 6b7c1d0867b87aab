"""Every tracked Python file that is only imported, run by a user: one sentence and status 2."""
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUNNABLE = ("data/prepare.py", "data/skills.py", "benchmarks/lifecycle.py")


def run_file(path, *flags):
    return path, subprocess.run([sys.executable, path, *flags], cwd=ROOT, capture_output=True,
                                text=True, timeout=300)


def list_imported():
    """Paths of the tracked files that no user runs: kernels.py, and all but three in folders."""
    paths = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True,
                           check=True).stdout.split()
    paths = [path for path in paths if not path.startswith(("tests/", "config/"))]
    return [path for path in paths
            if ("/" in path or path == "kernels.py") and path not in RUNNABLE]


def test_every_file_that_is_only_imported_says_so():
    """A folder's files stop at their first import of ours, config, before those of packages."""
    paths = list_imported()
    assert len(paths) > 80
    with ThreadPoolExecutor(2) as pool:
        for path, done in pool.map(run_file, paths):
            assert (done.returncode, done.stdout) == (2, ""), (path, done.stderr)
            assert done.stderr == (f"error: {Path(path).name} is imported by the scripts and "
                                   "cannot be run: README.md lists what to run\n"), path


def test_a_script_of_a_folder_finds_the_modules_of_the_root():
    """benchmarks/ has a training.py, which hides the folder training/ where it is on the path."""
    _, done = run_file("benchmarks/lifecycle.py", "--first=none")
    assert done.returncode == 2 and "--first='none'" in done.stderr, done.stderr
