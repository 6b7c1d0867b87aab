"""data/skills.py: every answer is right, no test task is trained on, the same files anywhere."""
import hashlib
import json
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from text import chat
from config import UserError, configure
from data import prepare
from data import skills as skills_script
from data.stdlib_chat import build_stdlib_chat
from tasks import skills

ROOT = Path(__file__).resolve().parent.parent.parent
COUNTS = dict(train=2400, val=360, test=360, pref=1200, rl=600)
NUMBER, LETTERS = r"\b\d(?: \d)*\b", r"\b[a-z](?: [a-z])+\b"


@pytest.fixture(scope="module")
def made():
    """File name -> records, a tenth of the usual size."""
    return skills.generate(1337, **COUNTS)


def prep(*argv):
    """`python data/prepare.py argv…` in this process; UserError is what run() turns into 2."""
    prepare.main(configure(prepare.Config, [str(a) for a in argv], positional=("source",)))


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def asked(record):
    """All that the user says in a record of any kind."""
    messages = record.get("messages") or record.get("chosen") or record["prompt"]
    return "\n".join(m["content"] for m in messages if m["role"] == "user")


# --- an oracle: it reads the question, as a model has to, and computes the answer in its own way --
FIELDS = {"a": r"\d(?: \d)+", "b": r"\d(?: \d)*", "x": "[a-z]", "n": r"\d",
          "words": r"[a-z]{3,}(?:, [a-z]{3,})+", "nth": "[a-z]+", "more": "larger|smaller",
          "name": "[a-z]{3,}", "table": r"[^?]+(?:, [^?,]+)+"}


def shape(kind, form):
    """A wording as a regular expression with a group for each thing that it is about."""
    word = "[a-z]{3,}" if kind == "strange" else "[a-z](?: [a-z])+"
    return re.compile(re.sub(r"\\{(\w+)\\}", lambda m: f"(?P<{m[1]}>{FIELDS.get(m[1], word)})",
                             re.escape(form)))


SHAPES = [(kind, shape(kind, form)) for kind, forms in [
    *skills.ASK.items(), ("divide", skills.DIVIDE), ("strange", skills.STRANGE),
    ("length", skills.LENGTH)] for form in forms]
NTH = {"first": 1, "second": 2, "third": 3, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7}


def numbers(text):
    return [int(n.replace(" ", "")) for n in re.findall(NUMBER, text)]


def read(question):
    """(kind of question, what it is about) by the one form of words that fits."""
    text = re.sub("^(Please answer|A question): | Answer briefly\\.$", "", question)
    found = [(kind, m.groupdict()) for kind, s in SHAPES if (m := s.fullmatch(text))]
    assert len({kind for kind, _ in found}) == 1, f"{question} can be read in {len(found)} ways"
    return found[0]


def solve(question):
    kind, f = read(question)
    a, b = (int("".join(f.get(k, "0").split())) for k in "ab")
    word, words = f.get("word", "").split(), f.get("words", "").split(", ")
    nth = int(f["n"]) if f.get("n") else NTH.get(f.get("nth"), 0)
    if kind in ("divide", "strange") or kind == "position" and nth > len(word):
        return skills.REFUSAL
    if kind == "lookup":
        return next((row for row in f["table"].split(", ") if row.startswith(f["name"])),
                    skills.REFUSAL)
    return {"add": lambda: " ".join(str(a + b)), "subtract": lambda: " ".join(str(a - b)),
            "compare": lambda: f["a"] if (a > b) == (f["more"] == "larger") else f["b"],
            "count": lambda: str(sum(letter == f["x"] for letter in word)),
            "length": lambda: str(len(word)),
            "reverse": lambda: " ".join(reversed(word)), "sort": lambda: ", ".join(sorted(words)),
            "sort_letters": lambda: " ".join(sorted(word)), "position": lambda: word[nth - 1],
            "spell": lambda: " ".join(words[nth - 1])}[kind]()


def test_answers_are_those_of_an_oracle(made):
    """A second program, which only reads the questions, comes to the same answers."""
    for record in made["test"] + made["train"]:
        text, answer = (m["content"] for m in record["messages"][:2])
        assert solve(text) == answer, text
        if record["task"] == "impossible":
            assert answer == skills.REFUSAL
        elif record["task"] != "follow_up":
            assert read(text)[0].replace("length", "count") == record["task"]
    assert {r["task"] for r in made["test"]} == set(skills.TASKS)


def test_follow_ups_are_right(made):
    """A second turn refers to the first; where that can be worked out from the texts, it is."""
    kinds = Counter()
    for record in made["train"]:
        if record["task"] != "follow_up":
            continue
        said = [m["content"] for m in record["messages"]]
        first, told, then, answer = said[:4]
        if re.search(r"turn it around again|And back\?|once more", then):
            assert answer == told[::-1]
            kinds["reverse"] += 1
        elif re.search(r"other one|is left\?", then):
            assert answer in first and sorted(numbers(f"{told}, {answer}")) == \
                sorted(numbers(first))
            kinds["compare"] += 1
        elif re.search(r"comes first\?|first of them", then):
            assert answer == told.split(", ")[0] == min(told.split(", "))
            kinds["sort"] += 1
        elif re.search(r"last of them|last one\?", then):
            assert answer == max(told.split())
            kinds["sort_letters"] += 1
        elif m := re.search(r"([a-z]+)[?.]$", then):
            entry = re.search(rf"({m[1]}(?: has |: | = | - | )\w+)", first)
            if m[1] in skills.KEYS:
                assert answer == (entry[1] if entry else skills.REFUSAL)
                kinds["lookup"] += 1
    assert len(kinds) == 5 and min(kinds.values()) >= 5, kinds


def test_answers_pass_their_checker_and_rejected_ones_fail(made):
    for split in skills.SPLITS:
        for r in made[split]:
            assert r["messages"][-1]["content"] == r["answer"]
            assert skills.check(r["task"], r["answer"], r["messages"][-1]["content"])
    kinds = Counter()
    for r in made["pref_train"] + made["pref_val"]:
        assert skills.check(r["task"], r["answer"], r["chosen"][-1]["content"])
        assert not skills.check(r["task"], r["answer"], r["rejected"][-1]["content"]), r
        assert r["chosen"][:-1] == r["rejected"][:-1], "one prompt, two answers"
        kinds[r["kind"]] += 1
    assert set(kinds) == {"near_miss", "format", "rambling"}
    assert min(kinds.values()) > len(made["pref_train"]) / 6
    # and not only those that were drawn: every near miss there is
    for task, make in skills.MAKERS.items():
        rng = random.Random(task)
        for level in (1, 2, 3) * 100:
            problem = make(rng, level)
            for turn in (problem.turn, *problem.more):
                assert turn.wrong and skills.check(task, turn.answer, turn.answer)
                for text in turn.wrong:
                    assert not skills.check(task, turn.answer, text), (turn, text)


def test_levels_are_harder():
    """Sums have carries at level 3 alone; words, lists and tables grow with the level."""
    def drawn(task, level):
        rng = random.Random(0)
        return [read(skills.MAKERS[task](rng, level).turn.ask)[1] for _ in range(200)]

    for level in (1, 2, 3):
        sums = [(int(f["a"][0]), int(f["a"][2]), int(("0 " + f["b"])[-3]), int(f["b"][-1]))
                for f in drawn("add", level)]
        assert {len(f["b"]) for f in drawn("add", level)} == {1 if level == 1 else 3}
        assert any(a + c > 9 or b + d > 9 for a, b, c, d in sums) is (level == 3)
        pairs = [(f["a"][0], f["b"][0]) for f in drawn("compare", level)]
        assert any(a == b for a, b in pairs) is (level > 1)
        assert max(len(f["word"].split()) for f in drawn("reverse", level)) == 2 + level
        assert {len(f["words"].split(", ")) for f in drawn("sort", level)} == {1 + level}
        assert max(f["table"].count(",") for f in drawn("lookup", level)) == level


@pytest.mark.parametrize("answer, text, right", [
    ("t a l p", "t a l p", True), ("t a l p", " t-a-l-p.\n", True), ("t a l p", "talp", False),
    ("t a l p", "t a p l", False), ("t a l p", "T A L P", False), ("t a l p", "t,a,l,p", False),
    ("3 4", "34", True), ("3 4", "3 4.", True), ("3 4", "3-4", False), ("3 4", "-34", False),
    ("3 4", "3.4", False), ("3 4", "3 4 3 4", False), ("4", "04", False), ("4", "4..", False),
    ("pear, plum", "pear plum", True), ("pear, plum", "plum, pear", False),
    (skills.REFUSAL, "That cannot be answered", True), (skills.REFUSAL, "It cannot.", False),
    # hostile: nothing, other scripts' digits, marks around it, control codes, sizes, no text
    ("4", "", False), ("4", ".", False), ("4", "\u0664", False), ("4", "\uff14", False),
    ("4", "4\x00", False), ("4", "4\u200b", False), ("4", "4\n\n4", False),
    ("4", "<|im_end|>4", False),
    ("4", "4 " * 10**6, False), ("a b", "a-" * 10**6, False), ("a b", "a\u00a0b", False),
    ("4", "\ud800", False), ("4", None, False), ("4", 4, False), ("4", b"4", False),
])
def test_checker(answer, text, right):
    start = time.process_time()                 # of this process: another may have the core
    assert skills.check("reverse", answer, text) is right
    assert time.process_time() - start < 0.1, "a long answer must not take long to refuse"


def test_checker_knows_its_tasks():
    with pytest.raises(ValueError, match="there is no task 'poem'"):
        skills.check("poem", "a", "a")


def test_no_task_of_one_split_is_in_another(made):
    """By content, not by words: no wording of a tested sum, word or table is ever trained on."""
    def content(record):
        kind, f = read(asked(record).split("\n")[0])
        a, b = (int("".join(f.get(k, "0").split())) for k in "ab")
        if kind in ("add", "subtract"):         # a - b is the sum of b and what is left
            return ("sum", *sorted((a, b) if kind == "add" else (a - b, b)))
        if kind == "lookup":
            return frozenset(re.findall(r"([a-z]+)(?: has |: | = | - | )(\w+)", f["table"]))
        if kind in ("sort", "spell"):
            return frozenset(f["words"].split(", "))
        if kind == "sort_letters":
            return frozenset(f["word"].split())
        if kind in ("count", "length", "reverse", "position"):
            return min(f["word"], f["word"][::-1])
        return kind, *sorted((f["a"], f.get("b") or f.get("word") or ""))

    def all_of(*names):
        return {content(r) for name in names for r in made[name]}

    train = all_of("train", "pref_train", "rl_train")
    val, test = all_of("val", "pref_val", "rl_val"), all_of("test")
    assert len(train) > 1000 and len(val) > 200 and len(test) > 150
    assert not train & val and not train & test and not val & test


def test_keys_decide_the_split():
    """Another wording, the other order, the word backwards, the table rearranged: one key."""
    for task, make in skills.MAKERS.items():
        keys = [make(random.Random(i), 1).key for i in range(300)]
        assert len(set(keys)) > 60, f"{task} has too few problems"
    marks = Counter(skills.split_of(1, str(i)) for i in range(10_000))
    assert 7_700 < marks["train"] < 8_300 and 800 < marks["val"] < 1_200
    moved = sum(skills.split_of(1, str(i)) != skills.split_of(2, str(i)) for i in range(1000))
    assert moved > 200, "another seed draws other splits"


def test_prompts_are_worded_in_many_ways_and_never_twice(made):
    for name in ("train", "pref_train", "rl_train", "test"):
        prompts = [asked(r) for r in made[name]]
        assert len(set(prompts)) == len(prompts), name
    for task, wordings in skills.ASK.items():
        # digits, letters and words out: what is left is the wording
        shapes = {re.sub(r"\b(?:\d|[a-z]\b|[a-z]+(?=,))", "", asked(r).split("\n")[0])
                  for r in made["train"] if r["task"] == task}
        assert len(shapes) >= 15 and (not wordings or len(wordings) >= 5), task


def test_conversations_have_the_layout_of_a_chat(made):
    """Roles take turns and end on an answer; RL prompts end on a question; no two are one list."""
    assert {name: len(found) for name, found in made.items()} == {
        "train": 2400, "val": 360, "test": 360, "pref_train": 1200, "pref_val": 120,
        "rl_train": 600, "rl_val": 60}
    for name, found in made.items():
        tasks = Counter(r["task"] for r in found)
        assert max(tasks.values()) - min(tasks.values()) <= 1, "all tasks alike"
        assert [r["task"] for r in found[:12]] != list(skills.TASKS), "in no order"
        for r in found:
            for key in ("messages", "chosen", "rejected", "prompt"):
                roles = [m["role"] for m in r.get(key, [])]
                assert roles == ["user", "assistant"] * (len(roles) // 2) + \
                    ["user"] * (key == "prompt" and bool(roles))
                assert all(set(m) == {"role", "content"} and m["content"] == m["content"].strip()
                           and m["content"] for m in r.get(key, []))
    turns = Counter(len(r["messages"]) for r in made["train"] if r["task"] == "follow_up")
    assert set(turns) == {4, 6}, "a second question, and sometimes a third"


def test_no_text_has_a_control_token(made):
    """A mark of some template inside a question would be read as the end of a turn."""
    text = " ".join(asked(r) for r in made["train"] + made["pref_train"])
    for name, template in chat.TEMPLATES.items():
        marks = template.control("<|endoftext|>") + [h for h in template.header.values() if h]
        assert not any(mark in text for mark in marks), name


def test_same_seed_same_corpus(made):
    """In this process, and in another one with other hashes."""
    assert skills.generate(1337, **COUNTS) == made
    assert skills.generate(1338, **COUNTS) != made
    small = dict(train=60, val=12, test=12, pref=24, rl=24)
    code = "import sys, json; sys.path.insert(0, sys.argv[1]); from tasks import skills; " \
           f"print(json.dumps(skills.generate(1337, **{small})))"
    out = subprocess.run([sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True,
                         env={**os.environ, "PYTHONHASHSEED": "7"}, check=True).stdout
    assert json.loads(out) == skills.generate(1337, **small)
    # more of one file changes no other
    assert skills.generate(1337, **{**small, "train": 90})["test"] == \
        skills.generate(1337, **small)["test"]


# --- the standard library ----------------------------------------------------------------------
@pytest.fixture
def library(tmp_path):
    """A standard library of our own, with one of each kind of file that could hurt."""
    root = tmp_path / "lib"
    (root / "pack").mkdir(parents=True)
    for i in range(40):
        (root / f"mod{i}.py").write_text(f'"""Module {i} does the work of number {i}."""\n'
                                         f'def go{i}(a, b=1, *, c: int = {i}):\n'
                                         f'    """Go to place {i} by road.\n\n    More."""\n')
    (root / "pack" / "__init__.py").write_text('"""A package that holds others in it."""\n')
    (root / "pack" / "part.py").write_text(
        'class Open:\n    """A class for all to see and use."""\n    def do(self, x):\n'
        '        """Do what has to be done."""\n    def _no(self):\n        """A private thing '
        'of its own."""\nclass _Closed:\n    def do(self):\n        """Nobody sees this one."""\n')
    (root / "_private.py").write_text('"""A private module with a text."""\n')
    (root / "runs.py").write_text('"""A module that must never be imported."""\n'
                                  'raise SystemExit(3)\n')
    (root / "half.py").write_text('"""A text with half of a pair, \\ud800, in it."""\n')
    (root / "broken.py").write_text("def (:\n")
    (root / "bytes.py").write_bytes(b'"""\xff\xfe not text at all."""\n')
    (root / "null.py").write_bytes(b"x = 1\0\n")
    (root / "deep.py").write_text("x = " + "(" * 5000 + ")" * 5000)
    return root


def test_docstrings_and_signatures(library):
    """What is public, as it is written; a broken or hostile file is left out, none is run."""
    found = build_stdlib_chat(1, list(library.rglob("*.py")), library)
    pairs = [tuple(m["content"] for m in r["messages"]) for rs in found.values() for r in rs]
    answers = [a for _, a in pairs]
    assert "go3(a, b=1, *, c: int=3)" in answers and "Go to place 3 by road." in answers
    assert "do(self, x)" in answers and "Do what has to be done." in answers
    assert "A module that must never be imported." in answers
    assert any("pack.part.Open" in q and a == "A class for all to see and use." for q, a in pairs)
    assert not any(re.search("private|Nobody|not text|_no|half", q + a) for q, a in pairs)
    assert all(found.values()), "every split has some"


def test_a_module_is_in_one_split(library):
    found = build_stdlib_chat(1, list(library.rglob("*.py")), library)
    home = {}
    for split, records in found.items():
        for r in records:
            module = re.search(r"\b(mod\d+|pack|runs)\b", asked(r))[1]
            assert home.setdefault(module, split) == split, module
    # files in another order, as another disk lists them, change nothing
    assert build_stdlib_chat(1, sorted(library.rglob("*.py"), reverse=True), library) == found


def test_copied_docstrings_do_not_leak(library):
    for i in range(40):
        (library / f"mod{i}.py").write_text('"""All modules say the very same here."""\n')
    found = build_stdlib_chat(1, list(library.rglob("*.py")), library)
    trained = {r["messages"][1]["content"] for r in found["train"]}
    for split in ("val", "test"):
        assert not trained & {r["messages"][1]["content"] for r in found[split]}


# --- files, as a user makes them -----------------------------------------------------------------
def test_prepare_skills_end_to_end(tmp_path, capsys):
    """The command of the docstring, twice: files, counts, hashes; then nothing left to do."""
    out = tmp_path / "skills"
    prep("skills", f"--out={out}")
    table = capsys.readouterr().out
    meta = json.loads((out / "meta.json").read_text())
    assert "24,000" in table and "python sft.py" in table
    assert sorted(p.name for p in out.iterdir()) == sorted(
        ["meta.json", *(f"{name}.jsonl" for name in meta["files"])]), "no temporary file is left"
    for name, about in meta["files"].items():
        data = (out / about["file"]).read_bytes()
        assert about["sha256"] == hashlib.sha256(data).hexdigest() and about["bytes"] == len(data)
        assert about["records"] == data.count(b"\n")
    usual = skills_script.Config()
    assert {n: a["records"] for n, a in meta["files"].items()} == {
        "train": usual.train, "val": usual.val, "test": usual.test, "pref_train": usual.pref,
        "pref_val": usual.pref // 10, "rl_train": usual.rl, "rl_val": usual.rl // 10}
    trained = {asked(r) for name in ("train", "pref_train", "rl_train")
               for r in rows(out / f"{name}.jsonl")}
    assert not trained & {asked(r) for r in rows(out / "test.jsonl")}

    before = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    prep("skills", f"--out={out}")
    assert "up to date" in capsys.readouterr().err
    assert {p.name: p.stat().st_mtime_ns for p in out.iterdir()} == before
    # a file that was cut is noticed, and built again to the same bytes
    whole = (out / "test.jsonl").read_bytes()
    (out / "test.jsonl").write_bytes(whole[:1000])
    prep("skills", f"--out={out}")
    assert (out / "test.jsonl").read_bytes() == whole


def test_prepare_stdlib_chat_end_to_end(tmp_path):
    """This machine's own standard library, by the command line."""
    out = tmp_path / "chat"
    done = subprocess.run([sys.executable, str(ROOT / "data" / "prepare.py"), "stdlib_chat",
                           f"--out={out}"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr
    found = {split: rows(out / f"{split}.jsonl") for split in skills.SPLITS}
    assert len(found["train"]) > 2000 and len(found["val"]) > 50 and len(found["test"]) > 50
    prompts = {split: {asked(r) for r in records} for split, records in found.items()}
    assert not prompts["train"] & prompts["test"] and not prompts["train"] & prompts["val"]
    pairs = {asked(r): r["messages"][1]["content"] for rs in found.values() for r in rs}
    assert any("heapq.heappush" in q and a == "heappush(heap, item)" for q, a in pairs.items()) or \
        not any("heapq.heappop" in q for q in pairs), "in Python, where heapq is in Python"
    assert any("textwrap.dedent" in q and a == "dedent(text)" for q, a in pairs.items())


def test_a_failure_leaves_what_was_there(tmp_path, monkeypatch):
    """Killed while it writes: the finished dataset stays whole, nothing half-made is left."""
    out = tmp_path / "skills"
    small = dict(out=str(out), train=60, val=12, test=12, pref=20, rl=20)
    skills_script.main(skills_script.Config(**small))
    before = {p.name: p.read_bytes() for p in out.iterdir()}

    def full(folder, name, records):
        (folder / f"{name}.jsonl").write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(skills_script, "write_records", full)
    with pytest.raises(OSError):
        skills_script.main(skills_script.Config(**small, seed=2))
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


@pytest.mark.parametrize("argv, message", [
    (["skills", "--vocab_size=300"], "--vocab_size is for text"),
    (["skills", "more.txt"], "skills is a dataset of its own"),
])
def test_prepare_refuses_what_means_nothing(tmp_path, argv, message):
    with pytest.raises(UserError, match=message):
        prep(*argv, f"--out={tmp_path / 'x'}")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("settings, message", [
    (dict(source="poems"), "unknown chat dataset 'poems'"),
    (dict(level=4), "level is 1, 2 or 3"),
    (dict(train=-1), "must not be negative"),
])
def test_mistakes_are_one_sentence(tmp_path, settings, message):
    with pytest.raises(UserError, match=message):
        skills_script.main(skills_script.Config(out=str(tmp_path / "x"), **settings))
    assert not (tmp_path / "x").exists()


def test_more_than_there_is(monkeypatch):
    """Where a split has no further prompts, that is said; no loop without end."""
    monkeypatch.setattr(skills, "split_of", lambda seed, key: "train")
    with pytest.raises(UserError, match="no more than 0 prompts to val at level 1: ask for fewer"):
        skills.generate(1, train=12, val=1, test=0, pref=0, rl=0)
