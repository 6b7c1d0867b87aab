"""Split patterns of a file: published ones are taken, those that may take exponential time are not.

The oracle of the refusals is arithmetic: in a text of n letters that does not match, each of these
patterns can divide the n letters in a number of ways that is exponential in n.
"""
import json
import time

import pytest
import tokenizers

import tokenizer as T
from config import UserError
from text.bpe import PATTERNS
from text.pre_tokenizer import check_time

SLOW = [r"(a+)+b", r"(a|aa)+b", r"(?:\d{1,3})+x", r"((ab)*)*c", r"(a*)*b|c", r"(?=(a+)+b)x",
        r"(\s|\s\s)+(?!\S)", r"(?:a?){30}b", r"x(?:(?:a+)*)*y"]
FAST = [*PATTERNS.values(), r"\s+(?!\S)|\s+", r"(?:\p{N}{1,3})+", r"(ab)+c", r"[^\n]+\n*|a",
        r"\p{N}{1,3}", r"[一-龥぀-ゟ゠-ヿ]+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}]*[\p{Ll}\p{Lm}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"]


@pytest.mark.parametrize("pattern", SLOW)
def test_a_pattern_that_may_take_exponential_time_is_refused_before_it_runs(pattern, tmp_path):
    T.train(["a b ab 12 " * 40], 262).save(tmp_path)
    document = json.loads((tmp_path / "tokenizer.json").read_text())
    document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False,
         "use_regex": False}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    began = time.monotonic()
    with pytest.raises(UserError, match="exponential time") as e:
        T.load(tmp_path)
    assert time.monotonic() - began < 5 and len(str(e.value)) < 400 and "\n" not in str(e.value)


@pytest.mark.parametrize("pattern", FAST)
def test_published_and_linear_patterns_are_taken(pattern):
    check_time(pattern)


@pytest.mark.parametrize("pattern", [r"(?:[0-9]{1,3})+", r"(ab)+c", r"[^\n]+\n*"])
def test_what_is_taken_splits_as_the_library_does(pattern, tmp_path):
    tok = T.train(["a b ab 12 abab " * 40], 262)
    tok.save(tmp_path)
    document = json.loads((tmp_path / "tokenizer.json").read_text())
    document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False,
         "use_regex": False}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    ours, theirs = T.load(tmp_path), tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    for text in ("ababc abab 12345 6\n\n7 b", "a b\n\n ab", "abcababcab"):
        assert ours.encode_ordinary(text) == theirs.encode(text, add_special_tokens=False).ids
