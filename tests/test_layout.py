"""The layout of the tree: who imports whom, and what holds for the text of every source file.

The order is that of the house: an import points at the same level or at a lower one, never up, and
never in a circle.
"""
import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# from the bottom to the top; a name is a file in the root, or a folder
LEVELS = ("config", "kernels text", "backends tokenizer", "layers families", "model",
          "formats inference training", "checkpoint data tasks", "train sample eval serve", "sft",
          "lora classify dpo distill reward rl", "benchmarks", "bench")
LEVEL = {name: number for number, names in enumerate(LEVELS) for name in names.split()}


def list_sources():
    """Paths of the tracked Python files, without tests and without the experiments of config/."""
    paths = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True,
                           check=True).stdout.split()
    return [path for path in paths if not path.startswith("tests/")
            and (not path.startswith("config/") or path == "config/__init__.py")]


SOURCES = list_sources()
TREES = {path: ast.parse((ROOT / path).read_text(encoding="utf-8")) for path in SOURCES}


def to_file(module):
    """Return the tracked file of a module's dotted name, or None."""
    path = module.replace(".", "/")
    return next((f for f in (f"{path}.py", f"{path}/__init__.py") if f in TREES), None)


def list_imports(nodes):
    """Yield (file, line, local name or None) for each import of one of our own modules."""
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                if to_file(alias.name):
                    yield to_file(alias.name), node.lineno, alias.asname
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                file = to_file(f"{node.module}.{alias.name}") or to_file(node.module)
                if file:
                    yield file, node.lineno, alias.asname


def get_top(path):
    """Return the name that LEVELS has for a file: its folder, or its own in the root."""
    return path.split("/")[0].removesuffix(".py")


@pytest.mark.parametrize("path", SOURCES)
def test_imports_point_down(path):
    here = LEVEL[get_top(path)]
    wrong = [f"{path}:{line} imports {file}" for file, line, _ in list_imports(
        ast.walk(TREES[path])) if LEVEL[get_top(file)] > here]
    assert not wrong


def test_no_circle_of_imports():
    edges = {path: {file for file, _, _ in list_imports(ast.walk(tree))} - {path}
             for path, tree in TREES.items()}
    while free := [path for path, files in edges.items() if not files & edges.keys()]:
        for path in free:
            del edges[path]
    assert not edges, f"a circle among {sorted(edges)}"


@pytest.mark.parametrize("path", SOURCES)
def test_imports_of_our_own_modules_stand_at_the_top_under_their_names(path):
    tree = TREES[path]
    inner = [node for function in ast.walk(tree)
             if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
             for node in ast.walk(function)]
    assert not [f"{path}:{line}" for _, line, _ in list_imports(inner)], "inside a function"
    assert not [f"{path}:{line}" for _, line, name in list_imports(ast.walk(tree)) if name], "as"


@pytest.mark.parametrize("path", SOURCES)
def test_functions_have_names_and_files_one_idea(path):
    text = (ROOT / path).read_text(encoding="utf-8")
    nameless = [node.lineno for node in ast.walk(TREES[path])
                if isinstance(node, ast.FunctionDef) and node.name == "_"]
    assert not nameless, f"{path}: lines {nameless} define _"
    lines = text.splitlines()
    assert len(lines) <= 600, f"{path} has {len(lines)} lines"
    assert max(map(len, lines)) <= 100, f"{path} has lines of more than 100 columns"


def test_tuple_assignments_are_rare():
    """One statement a line: at most 2 tuple assignments on 100 lines of code. A tuple that a call
    returns, or that swaps two names, is no packing of statements and does not count."""
    packed = sum(isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple)
                 and isinstance(node.value, ast.Tuple)
                 for tree in TREES.values() for node in ast.walk(tree))
    code = sum(len({node.lineno for node in ast.walk(tree) if hasattr(node, "lineno")})
               for tree in TREES.values())
    assert packed <= 0.02 * code, f"{packed} on {code} lines"


def list_tracked():
    """Paths of all tracked Python files."""
    return subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True,
                          check=True).stdout.split()


@pytest.mark.parametrize("version", [(3, 10), (3, 12), (3, 13)], ids=lambda v: f"{v[0]}.{v[1]}")
def test_every_file_is_of_the_python_versions_that_are_supported(version):
    """Parsed as that version's grammar has it, and linted for it; run on one of them alone."""
    for path in list_tracked():
        ast.parse((ROOT / path).read_text(encoding="utf-8"), path, feature_version=version)
    target = f"--target-version=py{version[0]}{version[1]}"
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", target, "."],
                          cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-500:]


def test_tests_are_short_enough_to_be_read():
    long = {path: n for path in list_tracked() if path.startswith("tests/")
            and (n := len((ROOT / path).read_text(encoding="utf-8").splitlines())) > 600}
    assert not long
