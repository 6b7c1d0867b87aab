"""Conversations about Python's standard library: what a module, class or function does.

    files = build_stdlib_chat(seed=1337, paths, root)["train"]      # {"messages": [...]}

Questions ask for the first paragraph of a docstring, or for a signature. Files are parsed, none is
imported; another Python version gives other pairs. The split is by package.
"""
from __future__ import annotations

import ast
import random
import re
import tokenize
import warnings
from pathlib import Path
from typing import Any, Iterator

from config import refuse_to_run
from tasks.skills import SPLITS, split_of

LONGEST = 400                           # characters of an answer; the rest is not asked


ABOUT = ("What does {} do?", "Explain {} in a sentence or two.", "What is {} for?",
         "Describe {}.", "Tell me about {} of the standard library.")


SIGNATURE = ("Write the signature of {}.", "What is the signature of {}?", "How is {} called?",
             "Which arguments does {} take?")


def first_paragraph(docstring: str | None) -> str:
    """Return the opening paragraph on one line; "" where there is none of 15 to LONGEST
    characters."""
    text = " ".join((docstring or "").strip().split("\n\n")[0].split())
    # It may open with the signature, be an example, or hold "\ud800", which no file can.
    prose = re.match(r"[A-Z][\w' -]*[ ,.]", text) and ">>>" not in text and text.isprintable()
    return text if prose and 15 <= len(text) <= LONGEST else ""


def parse(path: Path) -> ast.Module | None:
    """Return the syntax tree of a file; None where it is no valid Python. Nothing is run."""
    try:
        with tokenize.open(path) as f, warnings.catch_warnings():
            warnings.simplefilter("ignore")         # old escapes in old files
            return ast.parse(f.read())
    except (SyntaxError, ValueError, OSError, RecursionError, MemoryError):
        return None


def definitions(tree: ast.Module, module: str) -> Iterator[tuple[str, str, str]]:
    """Yield (dotted name, docstring's first paragraph, signature or "") of what is public."""
    yield module, first_paragraph(ast.get_docstring(tree)), ""      # a module has no signature
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    # methods, too, but nothing inside a function
    for node, prefix in [(n, module) for n in tree.body] + [
            (n, f"{module}.{c.name}") for c in tree.body if isinstance(c, ast.ClassDef)
            and not c.name.startswith("_") for n in c.body]:
        if isinstance(node, (*functions, ast.ClassDef)) and not node.name.startswith("_"):
            text = first_paragraph(ast.get_docstring(node))
            call = ""
            if isinstance(node, functions):
                call = f"{node.name}({ast.unparse(node.args)})"      # no return type: short
            yield f"{prefix}.{node.name}", text, call if len(call) <= LONGEST else ""


def module_name(path: Path, root: Path) -> str:
    """json/__init__.py -> json, json/decoder.py -> json.decoder; "" for what is private."""
    parts = list(path.relative_to(root).with_suffix("").parts)      # ("json", "decoder")
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    fine = parts and all(p.isidentifier() and not p.startswith("_") for p in parts)
    return ".".join(parts) if fine else ""


def build_stdlib_chat(seed: int, paths: list[Path], root: Path) -> dict[str, list[dict[str, Any]]]:
    """Split -> conversations about the modules in `paths`; a package is in one split as a whole.

    An answer that train gives is not asked for again in val and test: docstrings are copied, and
    asyncio's futures say the same as those of concurrent.
    """
    out: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    for path in sorted(paths):
        module = module_name(path, root)
        tree = parse(path) if module else None
        if tree is None:
            continue
        rng = random.Random(f"{seed} {module}")     # another file changes nothing here
        found = out[split_of(seed, "module " + module.partition(".")[0])]
        for name, text, call in dict((d[0], d) for d in definitions(tree, module)).values():
            # a signature in the question half of the time: then the name is not all there is
            shown = f"`{call}` in {module}" if call and rng.random() < 0.5 else name
            for wordings, about, answer in ((ABOUT, shown, text), (SIGNATURE, name, call)):
                if answer:
                    found.append({"messages": [
                        {"role": "user", "content": rng.choice(wordings).format(about)},
                        {"role": "assistant", "content": answer}]})
    answers = {r["messages"][1]["content"] for r in out["train"]}
    for split, records in out.items():
        random.Random(f"{seed} {split} order").shuffle(records)
        if split != "train":
            out[split] = [r for r in records if r["messages"][1]["content"] not in answers]
    return out


if __name__ == "__main__":
    refuse_to_run()
