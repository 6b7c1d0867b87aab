"""The skills tasks: short questions whose answers a program can check, and the checker.

    from tasks import skills
    records = skills.generate(seed=1337)["train"]       # {"messages": [...], "task", "answer"}
    skills.check("reverse", "t a l p", "t-a-l-p.")      # True

Sums, counting, reversing, sorting, comparing, spelling, tables, questions that cannot be answered,
and a second question about any of these. A model of a few million parameters learns them in minutes
on a CPU, so that every stage after pretraining has a number to show. Digits and letters are written
apart ("3 4", "t a l p"), since BPE joins "34" and "talp" into tokens whose parts the model never
sees; level 1 adds and subtracts one digit and compares numbers whose first digit tells; below level
3 nothing carries.

A split is drawn by a hash of what a task is about (the numbers, the word, the table), never of its
wording: "3 4 + 2 5?" in train rules out "Add 2 5 and 3 4." in test. data/skills.py writes the
files, eval.py checks what a model answers.
"""
from __future__ import annotations

import random
import re
from dataclasses import dataclass
from itertools import islice
from typing import Any, Callable, Iterator

from config import UserError, refuse_to_run
from data.shards import draw_uniform

SPLITS = ("train", "val", "test")
REFUSAL = "That cannot be answered."        # one sentence, so that it can be checked


# Words common in source code: one token each for a tokenizer trained on it, first or within a line.
WORDS = ("list name file line value class index table code data path test type byte hash item user "
         "word text time date node tree root host port lock task step page view menu font edit "
         "save open read send call loop flag mask key map").split()


KEYS = "main user root base last next self left open read port node".split()    # of a table
ENTRIES = "true none float dict list max min sum set str int bool".split()
ORDINALS = "first second third fourth fifth sixth seventh".split()
CONSONANTS = "bdfgklmnprst"
VOWELS = "aeiou"
# Every way to ask, by task. The words in braces are what the task is about.
LEADS = ("{}", "{}", "Please answer: {}", "A question: {}", "{} Answer briefly.")
ASK = {
    "add": ("What is {a} plus {b}?", "Add {a} and {b}.", "{a} + {b} = ?", "Compute {a} + {b}.",
            "What is the sum of {a} and {b}?", "How much is {a} and {b} together?"),
    "subtract": ("What is {a} minus {b}?", "Take {b} away from {a}.", "{a} - {b} = ?",
                 "Compute {a} - {b}.", "Subtract {b} from {a}.",
                 "What is left of {a} without {b}?"),
    "count": ("How many times does {x} occur in {word}?", "Count the letter {x} in {word}.",
              "How often is there {x} in {word}?", "In {word}, how many letters are {x}?",
              "What is the number of {x} in {word}?"),
    "reverse": ("Reverse {word}.", "Write {word} backwards.", "What is {word} from back to front?",
                "Turn {word} around.", "Spell {word} in the opposite order."),
    "sort_letters": ("Sort the letters {word}.", "Put {word} in alphabetical order.",
                     "Order these letters: {word}.", "What is {word} from a to z?",
                     "Arrange {word} by the alphabet."),
    "sort": ("Sort these words: {words}.", "Put {words} in alphabetical order.",
             "Order the words {words}.", "What is the order of {words} in a dictionary?",
             "Arrange by the alphabet: {words}."),
    "compare": ("Which is {more}, {a} or {b}?", "Of {a} and {b}, which is {more}?",
                "Name the {more} number: {a}, {b}.", "Take {a} and {b}. Which one is {more}?",
                "{a} or {b}: which is {more}?"),
    "spell": ("Spell the {nth} word: {words}.", "Of the words {words}, spell the {nth}.",
              "Here are some words: {words}. Spell the {nth}.",
              "What are the letters of the {nth} word in {words}?",
              "Take {words}. How is the {nth} one spelled?"),
    "position": ("What is the {nth} letter of {word}?", "Name the {nth} letter in {word}.",
                 "In {word}, which letter is {nth}?", "Which letter comes {nth} in {word}?",
                 "Give me letter {n} of {word}."),
    "lookup": ("{table}. What is the row of {name}?", "Table: {table}. Look up {name}.",
               "Given {table}, what is there of {name}?", "{table}. And {name}?",
               "Read this: {table}. Which row has {name}?"),
    "impossible": (),                   # asks what another task asks, or one of these
    "follow_up": (),                    # asks what another task asks, and goes on
}
TASKS = tuple(ASK)


LENGTH = ("How many letters has {word}?", "Count the letters of {word}.", "How long is {word}?",
          "In {word}, how many letters are there?", "What is the number of letters in {word}?")


DIVIDE = ("What is {a} divided by 0?", "Divide {a} by 0.", "Compute {a} / 0.", "{a} / 0 = ?")


STRANGE = ("Which is {more}, {a} or {word}?", "Of {word} and {a}, which is {more}?",
           "Name the {more} number: {a}, {word}.", "{word} or {a}: which is {more}?")


RAMBLE = ("Let me think about it step by step. It is interesting. I would say {}; hope this helps!",
          "Sure! I am happy to help. The result is {}. Is there anything else you want to know?",
          "{} is what I get first, but let me check it again. Yes, I believe that it is {}.",
          "{0} {0} {0} {0} {0} {0}")


FORMAT = ("The answer is {}.", "Answer: {}", '"{}"', "[{}]", "= {}", "**{}**", "{}!", "<{}>")


@dataclass(frozen=True)
class Turn:
    """A question, its one answer, and answers that look right and are wrong."""
    ask: str
    answer: str
    wrong: tuple[str, ...]


@dataclass(frozen=True)
class Problem:
    """What a task is about: `key` decides its split; `more` are questions that may follow."""
    task: str
    key: str
    turn: Turn
    more: tuple[Turn, ...] = ()


def apart(text: Any) -> str:
    """Return the characters of a word or number with spaces between them.

    >>> apart("talp"), apart(34)
    ('t a l p', '3 4')
    """
    return " ".join(str(text))


def word_of(rng: random.Random, level: int) -> str:
    """Return a made-up word that can be said aloud, of 3 to 2 + level letters: "tal", "ika",
    "bano"."""
    first = rng.random() < 0.7          # opens with a consonant
    return "".join(rng.choice(CONSONANTS if (i % 2 == 0) == first else VOWELS)
                   for i in range(rng.randint(3, 2 + level)))


def both_ways(word: str) -> str:
    """Return the key of a word: reversed, it is the same one, or a test's answer is a train's
    question."""
    return "word " + min(word, word[::-1])


def near_number(n: int) -> tuple[str, ...]:
    """Numbers that differ from `n` by a little, or in one digit."""
    return tuple(apart(x) for x in sorted({n + 1, n + 2, abs(n - 1), n + 10, abs(n - 10)} - {n}))


def near_letters(rng: random.Random, text: str) -> tuple[str, ...]:
    """Return `text` with two neighbours swapped, a letter missing, or a letter twice."""
    i = rng.randrange(len(text) - 1)    # of two neighbours, the left one
    near = {text[:i] + text[i + 1] + text[i] + text[i + 2:], text[:i] + text[i + 1:],
            text[:i] + text[i] + text[i:]}
    return tuple(apart(x) for x in sorted(near - {text}))


# Each draws a problem: (rng, level) -> Problem. ask() words it.
def ask(rng: random.Random, wordings: tuple[str, ...], **about: Any) -> str:
    """Return a question about `about`, worded at random."""
    return rng.choice(LEADS).format(rng.choice(wordings).format(**about))


def two(rng: random.Random, level: int) -> tuple[int, int]:
    """Two numbers, the second of one digit at level 1; below level 3 no column goes beyond 9."""
    while True:
        a = rng.randrange(10, 100)
        b = rng.randrange(*((10, 100) if level > 1 else (1, 10)))
        if level > 2 or a % 10 + b % 10 < 10 and a // 10 + b // 10 < 10:
            return a, b


def add(rng: random.Random, level: int) -> Problem:
    a, b = two(rng, level)
    turn = Turn(ask(rng, ASK["add"], a=apart(a), b=apart(b)), apart(a + b),
                near_number(a + b))
    return Problem("add", f"add {min(a, b)} {max(a, b)}", turn)  # b + a is no other task


def subtract(rng: random.Random, level: int) -> Problem:
    a, b = two(rng, level)
    # (a + b) - b: no column borrows where none of the sum carried
    turn = Turn(ask(rng, ASK["subtract"], a=apart(a + b), b=apart(b)), apart(a),
                near_number(a))
    return Problem("subtract", f"add {min(a, b)} {max(a, b)}", turn)     # nor is its inverse


def count(rng: random.Random, level: int) -> Problem:
    # of two or three letters, so that some are there more than once
    letters = rng.sample(CONSONANTS + VOWELS, rng.randint(2, 3))
    word = "".join(rng.choices(letters, k=rng.randint(3, 6)))
    x = rng.choice(letters)
    # one letter among others takes a small model long to learn: at level 1 all of them count
    n = len(word) if level == 1 else word.count(x)
    asked = ask(rng, LENGTH if level == 1 else ASK["count"], x=x, word=apart(word))
    near = tuple(str(m) for m in (n - 1, n + 1, n + 2) if m >= 0)
    return Problem("count", both_ways(word), Turn(asked, str(n), near))


def reverse(rng: random.Random, level: int) -> Problem:
    word = word_of(rng, level)
    back = word[::-1]
    turn = Turn(ask(rng, ASK["reverse"], word=apart(word)), apart(back), near_letters(rng, back))
    again = Turn(rng.choice(("Now turn it around again.", "And back?", "Reverse that once more.")),
                 apart(word), near_letters(rng, word))
    return Problem("reverse", both_ways(word), turn, (again,))


def sort_letters(rng: random.Random, level: int) -> Problem:
    letters = "".join(rng.sample(CONSONANTS + VOWELS, rng.randint(3, 2 + level)))
    order = "".join(sorted(letters))    # also the key: any order of them is one task
    turn = Turn(ask(rng, ASK["sort_letters"], word=apart(letters)), apart(order),
                near_letters(rng, order))
    last = Turn(rng.choice(("Which is the last of them?", "And the last one?")), order[-1],
                tuple(order[:-1]))
    return Problem("sort_letters", f"letters {order}", turn, (last,))


def sort(rng: random.Random, level: int) -> Problem:
    words = rng.sample(WORDS, 1 + level)    # none twice, so that one order is right
    order = sorted(words)                   # code points: the words are lower case
    swapped = (", ".join([order[1], order[0], *order[2:]]), ", ".join(order[1:]),
               ", ".join([*order[:-2], order[-1], order[-2]]))
    turn = Turn(ask(rng, ASK["sort"], words=", ".join(words)), ", ".join(order), swapped)
    first = Turn(rng.choice(("Which comes first?", "And the first of them?")), order[0],
                 tuple(order[1:]))
    return Problem("sort", f"words {' '.join(order)}", turn, (first,))


def compare(rng: random.Random, level: int) -> Problem:
    a, b = rng.sample(range(10, 100), 2)
    if level == 1 and a // 10 == b // 10:       # there the first digit says which
        return compare(rng, level)
    more = rng.choice(("larger", "smaller"))
    right, other = (max(a, b), min(a, b)) if more == "larger" else (min(a, b), max(a, b))
    wrong = (apart(other), apart(right + 1), apart(str(right)[::-1]), f"{apart(a)} {apart(b)}")
    turn = Turn(ask(rng, ASK["compare"], a=apart(a), b=apart(b), more=more), apart(right),
                tuple(w for w in wrong if w != apart(right)))
    rest = Turn(rng.choice(("And the other one?", "Which one is left?")), apart(other),
                (apart(right), apart(other + 1)))
    return Problem("compare", f"compare {min(a, b)} {max(a, b)}", turn, (rest,))


def spell(rng: random.Random, level: int) -> Problem:
    # Which letters a token has cannot be guessed: all words are in train, in other company.
    words = rng.sample(WORDS, max(2, level))

    def turn(i: int) -> tuple[str, tuple[str, ...]]:
        others = [apart(w) for w in words if w != words[i]]
        return apart(words[i]), (*near_letters(rng, words[i]), *others)

    first, then = rng.sample(range(len(words)), 2)
    asked = ask(rng, ASK["spell"], words=", ".join(words), nth=ORDINALS[first])
    more = rng.choice(("And the {}?", "Now the {} one.")).format(ORDINALS[then])
    return Problem("spell", f"words {' '.join(sorted(words))}", Turn(asked, *turn(first)),
                   (Turn(more, *turn(then)),))


def position(rng: random.Random, level: int) -> Problem:
    word = word_of(rng, level)

    def turn(n: int, wordings: tuple[str, ...]) -> Turn:
        asked = rng.choice(wordings).format(nth=ORDINALS[n], n=n + 1, word=apart(word))
        return Turn(asked, word[n], tuple(sorted({*word, REFUSAL} - {word[n]})))

    first, *rest = rng.sample(range(len(word)), 3)
    more = tuple(turn(n, ("And the {nth}?", "Now letter {n}.", "What is the {nth}?")) for n in rest)
    start = turn(first, tuple(rng.choice(LEADS).format(w) for w in ASK["position"]))
    return Problem("position", both_ways(word), start, more)


def table_of(rng: random.Random, level: int) -> tuple[dict[str, str], str]:
    """Return (name -> its row of the table as it is written, the key of the table)."""
    names = rng.sample(KEYS, rng.randint(2, 1 + level))
    entries = rng.sample(ENTRIES if rng.random() < 0.5 else [*"123456789"], len(names))
    has = dict(zip(names, entries))
    mark = rng.choice((" has ", ": ", " = ", " - ")) if level > 1 else " "
    return ({name: name + mark + entry for name, entry in has.items()},
            "table " + " ".join(f"{n} {has[n]}" for n in sorted(has)))


def lookup(rng: random.Random, level: int) -> Problem:
    has, key = table_of(rng, level)
    names = rng.sample(list(has), len(has))
    missing = rng.choice([n for n in KEYS if n not in has])    # to ask for what is not there

    def turn(asked: str, name: str) -> Turn:
        right = has.get(name, REFUSAL)
        # other rows, and theirs under this name
        wrong = {*has.values(), REFUSAL, *(has[n].replace(n, name) for n in has)} - {right}
        return Turn(asked, right, tuple(sorted(wrong)))

    asked = ask(rng, ASK["lookup"], table=", ".join(has.values()), name=names[0])
    then = [names[1], missing] if rng.random() < 0.3 else names[1:]
    more = tuple(turn(rng.choice(("And {}?", "What about {}?", "Now {}.")).format(name), name)
                 for name in then)
    return Problem("lookup", key, turn(asked, names[0]), more)


def impossible(rng: random.Random, level: int) -> Problem:
    """Return a question without an answer, as like as possible to those that have one."""
    kind = rng.choice(("table", "letter", "divide", "strange"))
    n = rng.randrange(10, 100)
    if kind == "table":                 # a name that is not in it
        has, key = table_of(rng, level)
        name = rng.choice([n for n in KEYS if n not in has])
        table = ", ".join(has.values())
        asked = ask(rng, ASK["lookup"], table=table, name=name)
        wrong = tuple(has.values())
    elif kind == "letter":              # beyond the end
        word = word_of(rng, level)
        at = rng.randrange(len(word), len(ORDINALS))
        key = both_ways(word)
        asked = ask(rng, ASK["position"], word=apart(word), nth=ORDINALS[at], n=at + 1)
        wrong = (word[-1], word[0], apart(word))
    elif kind == "divide":
        asked = ask(rng, DIVIDE, a=apart(n))
        key = f"divide {n}"
        wrong = (apart(n), "0", "1")
    else:                               # a number against a word
        word = rng.choice(WORDS)
        more = rng.choice(("larger", "smaller"))
        asked = ask(rng, STRANGE, a=apart(n), word=word, more=more)
        wrong = (apart(n), word)
        key = f"strange {n} {word}"
    return Problem("impossible", key, Turn(asked, REFUSAL, wrong))


MAKERS: dict[str, Callable[[random.Random, int], Problem]] = {
    make.__name__: make for make in (add, subtract, count, reverse, sort_letters, sort, compare,
                                     spell, position, lookup, impossible)}


def check(task: str, answer: str, text: str) -> bool:
    """Return whether `text`, what a model said, is the answer: in value and in form, nothing
    around it.

    White space around it and one full stop are free; so are hyphens between letters ("t-a-l-p"),
    "34" for "3 4", and words without their commas.

    >>> check("reverse", "t a l p", "t-a-l-p."), check("reverse", "t a l p", "It is t a l p")
    (True, False)
    """
    if task not in ASK:
        raise ValueError(f"there is no task {task!r}; there are {', '.join(TASKS)}")
    # What is many times as long is no answer, and must not cost time either.
    if not isinstance(text, str) or len(text) > 4 * len(answer) + 16:
        return False
    return form(text) == form(answer)


def form(text: str) -> list[str]:
    """Return an answer as its parts, the same for all that check() takes for the same."""
    text = text.strip(" \t\r\n").removesuffix(".")
    if re.fullmatch(r"[0-9](?: ?[0-9])*", text):            # ASCII: int() takes more than that
        return [text.replace(" ", "")]
    if re.fullmatch(r"[a-z](?:-[a-z])+", text):
        return text.split("-")
    if re.fullmatch(r"[a-z]{2,}(?:,? [a-z]{2,})+", text):
        return text.replace(",", "").split(" ")
    return text.split(" ")              # two spaces give an empty part: not the same


def split_of(seed: int, key: str) -> str:
    """Return the split of all that is about `key`: 80% train, 10% val, 10% test, by its hash."""
    number = draw_uniform(seed, key)
    return "test" if number < 0.1 else "val" if number < 0.2 else "train"


def problems(seed: int, split: str, level: int, stream: str = "") -> Iterator[Problem]:
    """Without end: problems of one split, all tasks in turn, each prompt once.

    `stream` names another order, so that preferences are not the conversations again.
    """
    rng = random.Random(f"{seed} {split} {level} {stream}")
    seen = set()
    while True:
        for task in TASKS:
            bases = [task] if task in MAKERS else list(MAKERS)
            for _ in range(20_000):
                made = MAKERS[rng.choice(bases)](rng, level)
                # a follow-up is any task that has one, and goes on with it
                more = made.more[:rng.randint(1, 2)] if task == "follow_up" else ()
                prompt = "\n".join(t.ask for t in (made.turn, *more))
                if not more and task == "follow_up":
                    continue            # sums and what is impossible have no more
                if split_of(seed, made.key) == split and prompt not in seen:
                    seen.add(prompt)
                    yield Problem(task, made.key, made.turn, more)
                    break
            else:
                raise UserError(f"there are no more than {len(seen):,} prompts to {split} at "
                                f"level {level}: ask for fewer, or for a higher --level")


def record(made: Problem, rng: random.Random | None = None) -> dict[str, Any]:
    """Return a conversation; with `rng`, a preference pair whose rejected answer is drawn by it."""
    *before, last = (made.turn, *made.more)     # turns that are history; the one to answer
    prompt = [{"role": role, "content": text} for t in before
              for role, text in (("user", t.ask), ("assistant", t.answer))]
    prompt.append({"role": "user", "content": last.ask})
    about = {"task": made.task, "answer": last.answer}
    right = {"role": "assistant", "content": last.answer}
    if rng is None:
        return {"messages": [*prompt, right], **about}
    kind, text = spoiled(rng, last)
    wrong = {"role": "assistant", "content": text}
    return {"chosen": [*prompt, right], "rejected": [*prompt, wrong], **about, "kind": kind}


def spoiled(rng: random.Random, turn: Turn) -> tuple[str, str]:
    """Return (what is wrong with it, an answer that check() refuses)."""
    kind = rng.choice(("near_miss", "near_miss", "format", "rambling"))
    if kind == "near_miss":
        return kind, rng.choice(turn.wrong)     # the most instructive, so twice as often
    text = turn.answer.removesuffix(".")
    if kind == "rambling":
        return kind, rng.choice(RAMBLE).format(text, text)
    # letters and words lose what separates them; "34" is fine, so numbers never do
    glued = [text.replace(", ", "").replace(" ", "")] * 4 if re.search(r"\b[a-z] |, ", text) else []
    return kind, rng.choice(glued + [f.format(text) for f in FORMAT])


def generate(seed: int, level: int = 1, train: int = 24_000, val: int = 1_000, test: int = 1_000,
             pref: int = 6_000, rl: int = 4_000) -> dict[str, list[dict[str, Any]]]:
    """Return the file name without its end -> its records; the same for the same arguments,
    anywhere."""
    def take(n: int, split: str, stream: str = "") -> list[Problem]:
        return list(islice(problems(seed, split, level, stream), n))

    out = {s: [record(p) for p in take(n, s)] for s, n in zip(SPLITS, (train, val, test))}
    for split, share in (("train", 1), ("val", 10)):
        rng = random.Random(f"{seed} {split} spoil")   # its own: pairs do not move problems
        out[f"pref_{split}"] = [record(p, rng) for p in take(pref // share, split, "pref")]
        rows = [record(p) for p in take(rl // share, split, "rl")]
        out[f"rl_{split}"] = [{"prompt": r.pop("messages")[:-1], **r} for r in rows]
    # In turn, the tasks would come in the same order: a batch should see any.
    for name, records in out.items():
        random.Random(f"{seed} {name} order").shuffle(records)
    return out


if __name__ == "__main__":
    refuse_to_run()
