"""Where texts come from: files, folders, globs and URLs of the command line, and the stdlib.

data/prepare.py reads what these functions list; nothing is opened or fetched here.
"""
from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import sysconfig
from collections import Counter
from typing import Iterable
from urllib.parse import urlsplit

from config import UserError, refuse_to_run
from data import loader
from data.corpus import RECORDS
from data.download import note

TEXT = (".txt", ".md", ".py") + RECORDS     # what is picked up from a folder


def list_texts(folder: str, skip: tuple[str, ...] = (),
               suffixes: tuple[str, ...] = TEXT) -> list[str]:
    """Return the text files below a folder, sorted; no hidden folders, no links to folders."""
    paths = []
    for here, folders, files in os.walk(folder):
        folders[:] = sorted(f for f in folders if f not in skip and not f.startswith("."))
        paths += [os.path.join(here, f) for f in sorted(files) if loader.kind_of(f) in suffixes]
    return [path for path in paths if os.path.isfile(path)]     # no pipe, no dangling link


def check_address(url: str) -> None:
    """Raise UserError for a URL that names no host, or a port that is not a number."""
    try:
        if urlsplit(url).hostname and (urlsplit(url).port or 0) >= 0:
            return
        problem = "it names no host"
    except ValueError as e:
        problem = str(e)
    raise UserError(f"{url} is not an address that can be fetched ({problem})")


def report_skipped(folder: str, taken: list[str]) -> None:
    """Print how many files of a folder are not read, and their suffixes."""
    skipped = Counter(os.path.splitext(f)[1].lower() or f for here, _, files in os.walk(folder)
                      for f in files)
    skipped -= Counter(os.path.splitext(f)[1].lower() for f in taken)
    if total := sum(skipped.values()):
        kinds = ", ".join(kind[:20] for kind, _ in skipped.most_common(5))
        note(f"{folder}: {len(taken):,} files are read, {total:,} are not ({kinds}; hidden ones "
             "and links to folders neither); name others by a glob, as in '**/*.rst'")


def expand(word: str, names: Iterable[str] = ()) -> list[str]:
    """Return the files, sorted, that a word of the command line names, or the URL itself.

    names: the datasets with a name, for the error.
    """
    if word.startswith(("http://", "https://")):
        check_address(word)
        return [word]
    path = os.path.expanduser(word)
    if os.path.isfile(path):
        return [path]
    if os.path.isdir(path):
        if files := list_texts(path):
            report_skipped(path, files)
            return files
        raise UserError(f"{word} holds no text: of a folder, {' '.join(TEXT)} and .gz of these are "
                        "read; name other files by a glob, as in '**/*.rst'")
    if files := sorted(p for p in glob.glob(path, recursive=True) if os.path.isfile(p)):
        return files
    raise UserError(f"expected a file, folder, URL or dataset name, got {word!r}; the names are "
                    f"{', '.join(names)}")


def name_dataset(word: str) -> str:
    """Return the name of the output: corpus for a/corpus.jsonl.gz, corpus/ and corpus/*.txt."""
    path = re.sub(r"[^/\\]*[*?\[].*", "", urlsplit(word).path if "://" in word else word)
    return os.path.basename(os.path.abspath(path)).split(".")[0] or "text"


def fingerprint(paths: list[str]) -> str:
    """Return a hash of names, sizes and times of files; of a URL, of its name alone."""
    stats = [(path, None if "://" in path else os.stat(path)) for path in paths]
    seen = [(path, stat and (stat.st_size, stat.st_mtime_ns)) for path, stat in stats]
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()


def list_stdlib() -> list[str]:
    """Return the .py files of this Python's standard library, without its tests.

    The tests are as large as the rest, and hold files that are broken on purpose.
    """
    folder = sysconfig.get_paths()["stdlib"]
    skip = ("test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__")
    files = list_texts(folder, skip, suffixes=(".py",))
    if not files:
        raise UserError(f"{folder} holds no .py files: this Python came without its source; pass "
                        "a folder of your own")
    return files


if __name__ == "__main__":
    refuse_to_run()
