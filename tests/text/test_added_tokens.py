"""Added tokens, merges by pair and split sequences, against the tokenizers library."""
import json
import random
import re

import pytest
from tokenizers import (AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers,
                        trainers)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from text import bpe
import tokenizer as T
from config import UserError

BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
TEXT = ("The quick brown fox didn't jump over 12 dogs; it's 1,234 times!\n\n\n   def f(x):\n"
        "        return x  # ok\n\té naïve 中文 테스트 café\u0301 ﬁ ½ ① ABC xyz " * 3)


def trained(vocab_size: int = 420, **model) -> Tokenizer:
    """A byte-level tokenizer of the library's own making, without added tokens."""
    theirs = Tokenizer(models.BPE(**model))
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.decoder = decoders.ByteLevel()
    theirs.train_from_iterator([TEXT], trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=BYTES.alphabet(), show_progress=False))
    return theirs


@pytest.fixture(scope="module")
def base() -> str:
    """The document of trained()."""
    return trained().to_str()


def random_flags(rng: random.Random) -> dict[str, bool]:
    return {flag: rng.random() < share for flag, share in (
        ("special", .3), ("normalized", .4), ("lstrip", .2), ("rstrip", .2), ("single_word", .2))}


# Names that begin alike, hold each other, are words, spaces, decomposed, or tokens already. (No
# two become one by normalization: which of them the library takes then differs from run to run.)
NAMES = ["<think>", "</think>", "<th", "think", "the", "  ", "    ", "\n\n", "\t", "é", "o\u0308",
         "ﬁ", "<|a|>", "<|a|>b", "12", " fox", "fox", "中文", "½", "|||MAIL|||", "_", "x"]
PIECES = [*NAMES, "<think>", " ", "  ", "   ", "\n", "\u00a0", "\u3000", "a", "The fox", "12dogs",
          "e", "ö", "e\u0301", "\u0301", "b", "<", "fi", "x_y", "\u0e33", "\u2160", "1", "中", "."]


def texts_of(rng: random.Random, count: int) -> list[str]:
    return ["".join(rng.choices(PIECES, k=rng.randrange(1, 12))) for _ in range(count)]


@pytest.mark.parametrize("form", [None, "NFC", "NFKC", "NFD"])
def test_added_tokens_are_found_as_the_library_finds_them(form, base, tmp_path):
    """All flags, in random tables over names that overlap; saved again, nothing is lost."""
    for seed in range(100):
        rng = random.Random(f"{form}{seed}")
        theirs = Tokenizer.from_str(base)
        if form:
            theirs.normalizer = getattr(normalizers, form)()
        names = rng.sample(NAMES, rng.randrange(1, 9))
        theirs.add_tokens([AddedToken(n, **random_flags(rng)) for n in names])
        document = theirs.to_str()
        theirs = Tokenizer.from_str(document)
        ours = T.from_json(json.loads(document))
        again = Tokenizer.from_str(json.dumps(ours._json()))
        flags = theirs.get_added_tokens_decoder()
        assert again.get_added_tokens_decoder() == flags
        assert {n: t["id"] for n, t in ours.added.items()} == {
            t.content: i for i, t in flags.items()}
        assert ours.special == {t.content: i for i, t in flags.items() if t.special}
        assert ours.vocab_size == max(theirs.get_vocab().values()) + 1
        for text in texts_of(rng, 12):
            try:
                want = theirs.encode(text).ids
            except BaseException as e:      # it panics where two tokens take the same white space
                assert "bad split" in str(e)
                continue
            assert ours.encode(text, "all") == want, (seed, text, names)
            assert ours.encode_fast(text, "all") == want, (seed, text)
            assert again.encode(text).ids == want


@pytest.mark.parametrize("form", ["prepend", "first", "never"])
def test_added_tokens_of_sentencepiece_are_the_librarys(form):
    """The same flags where spaces are written as ▁, and one is put before the text."""
    words = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), *"▁abcdefox12", "▁a",
             "fo", "fox", "▁fox"]
    for seed in range(40):
        rng = random.Random(f"{form}{seed}")
        theirs = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [
            ("▁", "a"), ("f", "o"), ("fo", "x"), ("▁", "fox")], byte_fallback=True,
            unk_token="<unk>", fuse_unk=True))
        if form == "prepend":
            theirs.normalizer = normalizers.Sequence([normalizers.Prepend("▁"),
                                                      normalizers.Replace(" ", "▁")])
        else:
            theirs.pre_tokenizer = pre_tokenizers.Metaspace("▁", form, split=False)
        theirs.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                            decoders.Fuse()])
        theirs.add_tokens([AddedToken(n, **random_flags(rng)) for n in rng.sample(NAMES, 5)])
        theirs = Tokenizer.from_str(theirs.to_str())
        ours = T.from_json(json.loads(theirs.to_str()))
        again = Tokenizer.from_str(json.dumps(ours._json()))
        assert again.get_added_tokens_decoder() == theirs.get_added_tokens_decoder()
        for text in texts_of(rng, 10):
            try:
                want = theirs.encode(text).ids
            except BaseException as e:
                assert "bad split" in str(e)
                continue
            assert ours.encode(text, "all") == want == again.encode(text).ids, (seed, text)


def test_an_added_token_that_normalizing_removes_is_never_there():
    """SentencePiece's trimming leaves nothing of a run of spaces, which is then nowhere, too."""
    words = ["<unk>", *(f"<0x{b:02X}>" for b in range(256)), *"▁abcdefox12"]
    theirs = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], byte_fallback=True,
                                  unk_token="<unk>", fuse_unk=True))
    theirs.normalizer = normalizers.Sequence([normalizers.Replace(Regex(r"\A +"), ""),
                                              normalizers.Replace(" ", "▁")])
    theirs.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                        decoders.Fuse()])
    theirs.add_tokens([AddedToken("  ", normalized=True), AddedToken("fox", normalized=False)])
    ours = T.from_json(json.loads(theirs.to_str()))
    compared = 0
    for text in ("abc", "a fox 12", "a  b", "foxfox"):
        try:
            want = theirs.encode(text).ids
        except BaseException as e:
            assert "bad split" in str(e)
            continue
        compared += 1
        assert ours.encode(text) == want
    assert compared >= 2


def test_control_tokens_in_a_text_are_letters_and_the_others_are_not(base):
    theirs = Tokenizer.from_str(base)
    theirs.add_tokens([AddedToken("<think>"), AddedToken("<|im_end|>", special=True),
                       AddedToken("  ")])
    ours = T.from_json(json.loads(theirs.to_str()))
    theirs.encode_special_tokens = True
    text = "a<think>  b<|im_end|>c"
    want = theirs.encode(text).ids
    assert ours.encode_ordinary(text) == ours.encode_fast(text, disallowed_special=()) == want
    assert ours.encode_batch([text, "x"]) == [want, ours.encode("x")]
    assert ours.added["<think>"]["id"] in want
    with pytest.raises(UserError, match="im_end"):
        ours.encode(text)
    # what a caller wants to be letters is letters
    letters = ours.encode_ordinary(text, letters=frozenset(["<think>"]))
    assert ours.added["<think>"]["id"] not in letters and ours.decode(letters) == text
    # a token that is there is given no second id
    assert ours.add_special_tokens(["<think>", "<|im_end|>"]) == 0
    assert ours.byte_lengths()[ours.added["<think>"]["id"]] == len("<think>")


def test_hidden_in_transformers_is_what_was_hidden_before(base, tmp_path):
    """decode(skip_special_tokens=True) keeps <think>, after saving here as before."""
    fast = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(base))
    fast.add_tokens([AddedToken("<think>", normalized=False), AddedToken("<|end|>", special=True)])
    fast.save_pretrained(tmp_path / "a")
    ours = T.load(tmp_path / "a")
    ours.add_special_tokens(["<|label:x|>"])
    ours.save(tmp_path / "b")
    again = AutoTokenizer.from_pretrained(tmp_path / "b")
    ids = ours.encode("hm<think><|end|><|label:x|>", "all")
    assert again.decode(ids, skip_special_tokens=True) == "hm<think>"
    assert again("hm<think><|end|><|label:x|>").input_ids == ids


def test_numbers_of_added_tokens_are_the_librarys(base):
    """What a file says of an id counts as little there as here."""
    document = json.loads(base)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    document["added_tokens"] = [{"id": 9999, "content": "<x>", **flags},
                                {"id": 900, "content": "A", **flags},
                                {"id": 900, "content": "<y>", **flags}]
    theirs = Tokenizer.from_str(json.dumps(document))
    ours = T.from_json(document)
    for name in ("<x>", "A", "<y>"):
        assert ours.added[name]["id"] == theirs.token_to_id(name)


def test_a_vocabulary_shaped_like_gpt_neox_opens(base):
    """Runs of spaces as added tokens, normalized, beside tokens of the same bytes; NFC."""
    theirs = trained(600)
    theirs.normalizer = normalizers.NFC()
    theirs.add_special_tokens(["<|endoftext|>"])
    theirs.add_tokens([AddedToken(" " * k, normalized=True) for k in range(24, 1, -1)])
    assert "ĠĠ" in theirs.get_vocab()
    ours = T.from_json(json.loads(theirs.to_str()))
    for k in range(60):
        for text in (f"a{' ' * k}b", f"{' ' * k}\n{' ' * (60 - k)}é{' ' * k}"):
            assert ours.encode(text) == ours.encode_fast(text) == theirs.encode(text).ids
            assert ours.decode(ours.encode(text)) == text


# --- merges by pair ---------------------------------------------------------------------------

def adversarial(seed: int) -> Tokenizer:
    """Few letters, and pairs in any order, some missing, several for one token."""
    rng = random.Random(seed)
    words = list("abc"[:rng.randrange(1, 4)])
    for _ in range(rng.randrange(1, 16)):
        words.append("".join(rng.choices(words, k=2)))
    words = [w for w in dict.fromkeys(words) if len(w) < 14]
    vocab = {w: i for i, w in enumerate(dict.fromkeys([*sorted(BYTES.alphabet()), *words]))}
    pairs = [(w[:k], w[k:]) for w in words for k in range(1, len(w))
             if w[:k] in vocab and w[k:] in vocab]
    if seed % 2:
        rng.shuffle(pairs)
    pairs = [p for p in pairs if rng.random() < (1 if seed % 3 == 0 else .8)]
    theirs = Tokenizer(models.BPE(vocab, pairs, ignore_merges=seed % 5 == 0))
    theirs.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(" "), "isolated"),
                                                    BYTES])
    theirs.decoder = decoders.ByteLevel()
    return theirs


def test_merges_go_by_the_pairs_that_a_file_lists():
    """Equal to the library, by hand and through tiktoken, where going by tokens would not be."""
    by_tokens = by_hand = 0
    for seed in range(300):
        theirs = adversarial(seed)
        ours = T.from_json(json.loads(theirs.to_str()))
        again = T.from_json(json.loads(json.dumps(ours._json())))
        by_hand += bool(ours.whole)
        naive = {bytes([b]): k for k, b in enumerate(bpe.BYTE_ORDER)}
        for left, right in json.loads(theirs.to_str())["model"]["merges"]:
            naive.setdefault((left + right).encode(), len(naive))
        rng = random.Random(-seed)
        for length in (2, 3, 5, 8, 13, 30, 250):
            text = "".join(rng.choices("abc ", [9, 9, 9, 1], k=length))
            want = theirs.encode(text).ids
            assert ours.encode(text) == ours.encode_fast(text) == again.encode(text) == want, (
                seed, text)
            tokens = [theirs.id_to_token(i) for i in want]
            chunks = [w.encode() for w in re.split("( )", text) if w]
            parts = [p for w in chunks for p in ([w] if w in naive else bpe.bpe(naive, w))]
            by_tokens += [p.decode().replace(" ", "Ġ") for p in parts] != tokens
    assert by_tokens > 30 and by_hand > 5       # the cases do tell the two rules apart


# --- sequences of splits ----------------------------------------------------------------------

def split(pattern: str, behavior: str = "isolated", invert: bool = False):
    return pre_tokenizers.Split(Regex(pattern), behavior, invert)


DIGITS = pre_tokenizers.Digits
WITH_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
SEQUENCES = {
    "deepseek v3": [split(r"\p{N}{1,3}"), split("[一-龥぀-ゟ゠-ヿ]+"), split(
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
        r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"""), BYTES],
    "deepseek llm": [split(r"[\r\n]"), split(r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-Ί]+"),
                     split("\\s?[!-/:-~！-／：-～‘-‟　-。]+"), split(r"\s+$"),
                     split("[一-龥ࠀ-一가-퟿]+"), DIGITS(True), BYTES],
    "falcon 3": [pre_tokenizers.Punctuation("contiguous"), WITH_GPT2, DIGITS(False),
                 split("[0-9][0-9][0-9]")],
    "falcon": [pre_tokenizers.Punctuation("contiguous"), WITH_GPT2, split("[0-9][0-9][0-9]")],
    "starcoder": [DIGITS(True), WITH_GPT2],
    "bytes first": [WITH_GPT2, DIGITS(True)],
    "no cut": [BYTES],
    "gaps": [split(r"\p{L}+|\p{N}"), BYTES],
    "gaps removed": [split(r"\p{L}+|\p{N}", "removed", True), BYTES],
    "matches removed": [split(r"\s+", "removed"), BYTES],
    "may be empty": [split(r"\p{N}*"), BYTES],
    "every line": [split(r"\s+$"), BYTES],
    "any character": [split(r"a.b?|.{3}"), BYTES],
    "repeated": [split(r"\p{N}{1,3}+|\p{L}++"), BYTES],
    "text": [pre_tokenizers.Split(" (", "isolated"), BYTES],
    **{f"{behavior}{' inverted' * invert}": [split(r"[ox]|\n", behavior, invert), BYTES]
       for behavior in ("isolated", "contiguous", "merged_with_previous", "merged_with_next")
       for invert in (False, True)},
}
LINES = [
    "a  \nb \n c  ",
    "x12345678 9 ½²³ ٣٤٥ Ⅷ",
    "foo(bar) !!... 'tis 中文，测试。日本語テスト 한국어",
    "oxoxx\n\nxo  o",
    "é²¼¾ naïve\u00a0\u3000 x\r\n\r\n y",
    "a1b22c333d4444",
    " (( (x",
    "aab a\nb",
    "Don't STOP\t\tnow",
    "👩‍👩‍👧 e\u0301 ſ",
]


@pytest.mark.parametrize("name", SEQUENCES)
def test_sequences_of_splits_cut_as_the_library_cuts(name, base):
    theirs = Tokenizer.from_str(base)
    theirs.pre_tokenizer = pre_tokenizers.Sequence(SEQUENCES[name])
    ours = T.from_json(json.loads(theirs.to_str()))
    again = T.from_json(json.loads(json.dumps(ours._json())))
    assert ours._json()["pre_tokenizer"] == json.loads(theirs.to_str())["pre_tokenizer"]
    rng = random.Random(name)
    characters = "".join(LINES) + TEXT
    mixed = ["".join(rng.choice(LINES + [rng.choice(characters)]) for _ in range(8))
             for _ in range(40)]
    for text in [*LINES, *mixed, TEXT, "", " "]:
        want = theirs.encode(text).ids
        assert ours.encode(text) == ours.encode_fast(text) == again.encode(text) == want, text


@pytest.mark.parametrize("steps, words", [
    ([{"type": "Whitespace"}], "Whitespace"), ([{"type": "Metaspace"}], "Metaspace"),
    ([split("^a"), BYTES], "\\^"), ([split("(?:ab|c){2}+"), BYTES], "not supported"),
    ([split("a")], "one ByteLevel"), ([BYTES, BYTES], "one ByteLevel"),
    ([{"type": "Split", "pattern": {"Regex": "a"}, "behavior": "Shaken"}, BYTES], "Shaken"),
    ([{"type": "Split", "pattern": {"Regex": ""}, "behavior": "Isolated"}, BYTES], "empty"),
    ([{"type": "Split", "pattern": {"Regex": 7}, "behavior": "Isolated"}, BYTES], "text"),
    ([{"type": "ByteLevel", "add_prefix_space": True}], "prefix space"),
    (["ByteLevel"], "object")])
def test_other_cuts_are_refused_by_name(steps, words, base, tmp_path):
    document = json.loads(base)
    document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [
        json.loads(s.__getstate__()) if not isinstance(s, (dict, str)) else s for s in steps]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match=words) as e:
        T.load(tmp_path)
    assert "\n" not in str(e.value) and len(str(e.value)) < 400
