"""README.md and the scripts' docstrings: every command parses, every file named is there."""
import ast
import re
import runpy
import shlex
import sys
from collections import defaultdict

import pytest

import config
from conftest import ROOT
from families import FAMILIES, WRAPPERS

README = (ROOT / "README.md").read_text(encoding="utf-8")
# what a reader runs, up to the end of its line or of its backticks
COMMAND = re.compile(r"(?:^|[`|&\s])((?:python|torchrun) [^`|&\n]*?\.py\b[^`|&\n]*)", re.M)
FILES = [
    f for folder in (ROOT, ROOT / "data", ROOT / "benchmarks") for f in sorted(folder.glob("*.py"))
]


def commands() -> dict[str, list[list[str]]]:
    """Script -> the arguments that a reader is told to give it."""
    found = defaultdict(list)
    texts = [README, *(ast.get_docstring(ast.parse(f.read_text(encoding="utf-8"))) or ""
                       for f in FILES)]
    for text in texts:
        # an indented line of a docstring is code, as the lines of a fenced block are
        code = re.findall(r"```sh\n(.*?)```", text, re.S) + re.findall(r"^    .*$", text, re.M)
        prose = re.sub(r"```.*?```", "", text, flags=re.S)
        code += [re.sub(r"\s+", " ", c) for c in re.findall(r"`([^`]+)`", prose)]
        for line in COMMAND.findall("\n".join(code)):
            words = shlex.split(re.sub(r"\s#.*|\\$", "", line))
            at = next((k for k, word in enumerate(words) if word.endswith(".py")), None)
            if at is not None and not any("[" in word for word in words):
                found[words[at]].append(words[at + 1:])
    return found


COMMANDS = commands()


def test_the_commands_are_found():
    assert {"train.py", "sample.py", "eval.py", "sft.py", "lora.py", "dpo.py", "distill.py",
            "model.py", "checkpoint.py", "tokenizer.py", "bench.py", "benchmarks/lifecycle.py",
            "data/prepare.py", "data/skills.py"} <= set(COMMANDS)
    assert sum(map(len, COMMANDS.values())) > 90
    assert ["--preset=qwen3-0.6b"] in COMMANDS["train.py"]
    assert ["merge", "ADAPTER", "OUT"] in COMMANDS["lora.py"]


@pytest.mark.parametrize("script", COMMANDS)
def test_every_command_parses(script, monkeypatch):
    """By the script's own settings: their names, types and ranges, and the config files named."""
    monkeypatch.chdir(ROOT)
    if script.startswith("tests/"):
        assert (ROOT / script).is_file()
        return
    settings = {}           # of a subcommand that has its own, or of the script -> how it parses

    def parse(main, cls, positional=()):
        settings[which] = cls, positional
        config.configure(cls, positional=positional)
    monkeypatch.setattr(config, "run", parse)
    for words in COMMANDS[script]:
        which = "merge" in words
        if which in settings:
            cls, positional = settings[which]
            config.configure(cls, words, positional)
        else:
            monkeypatch.setattr(sys, "argv", [script, *words])
            runpy.run_path(str(ROOT / script), run_name="__main__")


def test_the_readme_is_short_and_names_every_family():
    assert len(README.splitlines()) < 200
    names = set(re.findall(r"[\w.]+", README[README.index("## Every family"):]))
    assert not set(FAMILIES) - names and not set(WRAPPERS) - names


def test_every_file_of_the_readme_is_there_and_every_script_and_folder_is_in_it():
    links = {link for link in re.findall(r"\]\(([^)#]+)", README) if "://" not in link}
    assert not [link for link in links if not (ROOT / link).exists()]
    assert not [f.name for f in ROOT.glob("*.py") if f.name not in README]
    folders = {f.relative_to(ROOT).parts[0] for f in ROOT.glob("*/*.py")}
    assert not [name for name in folders if f"{name}/" not in README]
