"""Every number of every script has a range, and what no run can have is one sentence."""
import dataclasses
import importlib
import math

import pytest

import config
from config import RANGES, UserError, configure

MODULES = ("train", "sft", "lora", "classify", "dpo", "distill", "sample", "eval", "tokenizer",
           "checkpoint", "model", "bench", "benchmarks.lifecycle", "data.prepare", "data.skills")


def numbers():
    """(module, field, kinds) of every setting that may be a number."""
    found = []
    for module in MODULES:
        cls = class_of(module)
        for name, kind in config.field_types(cls).items():
            kinds = config.choices_of(kind)
            if int in kinds or float in kinds:
                found.append((module, name, kinds))
    return found


def class_of(module):
    script = importlib.import_module(module)
    return getattr(script, "Config", None) or script.Settings


def test_the_walk_finds_the_settings():
    found = numbers()
    assert {m for m, _, _ in found} >= set(MODULES) - {"model"} and len(found) > 250


def test_every_number_declares_its_range_and_its_default_lies_in_it():
    """A new setting without a row of RANGES, or a class's own `ranges`, fails here."""
    missing = sorted({f"{m}.{n}" for m, n, _ in numbers()
                      if not config.range_of(class_of(m), n)})
    assert not missing, f"give these a row of config.RANGES: {missing}"
    for module in MODULES:
        for f in dataclasses.fields(class_of(module)):
            if isinstance(f.default, (int, float)):
                config.check_range(class_of(module), f.name, f.default, module)


def test_no_field_stands_in_two_rows():
    names = [name for row in RANGES.values() for name in row.split()]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "-1e30", "1e30", "9" * 40, "x", "[1]"])
def test_a_number_that_no_run_can_have_is_refused_for_every_field(value):
    """From the command line and from a config file alike; the sentence names field and value."""
    for module, name, _ in numbers():
        with pytest.raises(UserError) as e:
            configure(class_of(module), [f"--{name}={value}"])
        assert f"{name} is " in str(e.value) and len(str(e.value)) < 300


@pytest.mark.parametrize("name, bad, good", [
    ("learning_rate", "-1e-9", "0"), ("beta1", "1", "0.999"), ("beta2", "-0.1", "0"),
    ("dropout", "1", "0.5"), ("label_smoothing", "1", "0"), ("wsd_decay", "1.01", "1"),
    ("min_lr", "-0.5", "-1"), ("warmup_iters", "-1", "0"), ("keep", "0", "1"),
    ("eval_interval", "0", "1"), ("log_interval", "0", "7"), ("seed", "-1", "4294967295"),
    ("seed", "4294967296", "0"), ("sliding_window", "9223372036854775808", "none"),
    ("init_std", "-0.02", "0.02"), ("grad_clip", "-1", "0"), ("batch_size", "0", "1")])
def test_the_ends_of_the_ranges(name, bad, good, tmp_path):
    train = class_of("train")
    configure(train, [f"--{name}={good}"])
    with pytest.raises(UserError, match=f"command line: {name} is .*it must be"):
        configure(train, [f"--{name}={bad}"])
    file = tmp_path / "mine.py"
    file.write_text(f"{name} = {bad}\n")
    with pytest.raises(UserError, match=f"config file: {name} is"):
        configure(train, [str(file)])


def test_minus_one_is_a_word_for_as_usual_where_a_class_says_so():
    assert configure(class_of("sft"), ["--warmup_iters=-1"]).warmup_iters == -1
    with pytest.raises(UserError, match="-1 or at least 0"):
        configure(class_of("sft"), ["--warmup_iters=-2"])


def test_saved_settings_of_the_wrong_type_are_refused():
    cls = class_of("train")
    assert config.check_values(cls, {"batch_size": 3, "unknown": 1}, "x") == {"batch_size": 3}
    for value in ("x", [], {}, math.nan, None, True):
        with pytest.raises(UserError, match="trainer.pt: batch_size"):
            config.check_values(cls, {"batch_size": value}, "trainer.pt")


def test_a_sentence_stays_a_sentence():
    """What a file holds may be a megabyte, or move the cursor of the terminal."""
    text = str(UserError("a" * 10 ** 6 + "the end"))
    assert len(text) < 1000 and text.endswith("the end")
    assert str(UserError("a\x1b[2Jb\rc")) == r"a\x1b[2Jb\rc"
    assert str(UserError("one — two\nthree")) == "one — two\nthree"
