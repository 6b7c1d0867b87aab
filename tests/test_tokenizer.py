"""tokenizer.py, bpe.py, chat.py: against a slow reference, tiktoken, tokenizers, transformers."""
import copy
import doctest
import json
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import textwrap
import time
import unicodedata
import weakref
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiktoken

from text import bpe
from text import chat
import tokenizer as T
from config import UserError

ROOT = Path(__file__).resolve().parent.parent

ENGLISH = ("The quick brown fox didn't jump over the lazy dog; "
           "it's 1,234 times they'd've said so!\n"
           "We'll see: I'M SURE, you're \"right\" -- aren't you?  \n\n\n"
           "   Yes... 3.14159 (or 22/7)\n")
CODE = textwrap.dedent(Path(bpe.__file__).read_text(encoding="utf-8"))
CHINESE = "你好,世界。这是一个测试!我喜欢编程 2024年12月\n北京欢迎你。机器学习是人工智能的一个分支。\n"
MIXED = (
    "Привет, мир! Ça va? Zoë's naïve café — “quoted” … ½ ⅓ Ⅷ ٣٤٥ हिन्दी ภาษาไทย 한국어 日本語テスト\n"
    "😀 emoji 👩‍👩‍👧‍👦 family 🇩🇪 flags 𝕳𝖊𝖑𝖑𝖔 𐍈𐌰 e\u0301 \u0130\u017f's 'ſ 'S\u212a\n"
)
SPACE = "a \t b\u00a0c\u2003d\u3000 e\r\n\r\n  f\x0b\x0c\x1c\x1d\x1f g\x85h\u2028i"
SPACE += "\u200b j   \n \n\t\t12 34   5"
RUNS = "=" * 70 + "\n" + "-" * 33 + "#" * 9 + " " * 41 + "a" * 50 + "\n" + "ab" * 30 + "\n\n\n\n"
TEXTS = [ENGLISH, CODE, CHINESE, MIXED, SPACE, RUNS, "", " ", "\n", "a", "  a", "'s", "é", "\0"]

# tiktoken's own forms of the patterns, possessive quantifiers and all: an oracle for ours.
PUBLISHED = {
    "gpt2": r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s""",
    "cl100k": r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+|"""
              r""" ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s""",
    "o200k": "|".join([
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"]),
}
QWEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+")


def random_texts(count: int, seed: int, pool: str | None = None) -> list[str]:
    """Seeded nonsense: any code point, ASCII, runs, white space, and pieces of the texts above."""
    rng = random.Random(seed)
    out = []
    for _ in range(count):
        parts = []
        for _ in range(rng.randrange(1, 12)):
            kind = rng.randrange(6)
            if kind == 0 and pool is None:      # all of Unicode but the surrogates
                parts += [chr(c) for c in (rng.randrange(0x110000) for _ in range(4))
                          if not 0xD800 <= c < 0xE000]
            elif kind == 1:
                parts.append(rng.choice("a=-# \n\t.é中") * rng.randrange(1, 40))
            elif kind == 2:
                parts.append(rng.choice([" ", "\n", "\r\n", "\t", "  ", "\u00a0", "\x85", "\x1c"]))
            elif kind == 3:
                parts.append("".join(chr(rng.randrange(32, 127)) for _ in range(6)))
            elif kind == 4:
                parts.append(rng.choice(["'s", "'S", "'LL", "'ſ", "12345", "don't", T.EOT]))
            else:
                source = pool or rng.choice([ENGLISH, CODE, CHINESE, MIXED])
                at = rng.randrange(max(1, len(source) - 20))
                parts.append(source[at:at + rng.randrange(20)])
        out.append("".join(parts))
    return out


RANDOM = random_texts(300, seed=1)


@pytest.fixture(scope="session")
def tok() -> T.Tokenizer:
    return T.train([ENGLISH * 3, CODE, CHINESE, MIXED, RUNS], 1500, workers=1)


# --- training -------------------------------------------------------------------------------

def slow_learn(counts: Counter, size: int) -> list[bytes]:
    """The definition: recount every pair of every chunk for each merge."""
    spelled = [bytes([b]) for b in bpe.BYTE_ORDER]
    rank = {t: i for i, t in enumerate(spelled)}
    words = [([rank[bytes([b])] for b in w.encode()], n) for w, n in counts.items()]
    while len(spelled) < size:
        pairs: Counter = Counter()
        for ids, n in words:
            for pair in zip(ids, ids[1:]):
                pairs[pair] += n
        if not pairs:
            break
        best = min(pairs, key=lambda p: (-pairs[p], p))     # ties: the lower ranks
        token = spelled[best[0]] + spelled[best[1]]
        if token not in rank:
            rank[token] = len(spelled)
            spelled.append(token)
        for ids, _ in words:
            i = 0
            while i < len(ids) - 1:
                if (ids[i], ids[i + 1]) == best:
                    ids[i:i + 2] = [rank[token]]
                i += 1
    return spelled


@pytest.mark.parametrize("text, size", [
    (ENGLISH, 400), (CODE[:6000], 700), (CHINESE * 2, 380), (MIXED, 420), (RUNS * 2, 290),
    ("ab ba abab baba aab bba " * 3, 270), ("aaaa aaa aaaaa aa aaaaaaaa aaaaaaa", 264),
    ("xyz zyx xzy yxz", 268)], ids=["english", "code", "chinese", "mixed", "runs", "ties",
                                    "overlaps", "all tie"])
def test_merges_are_those_of_the_slow_reference(text, size):
    counts = bpe.count_chunks([text], bpe.PATTERNS["gpt2"], workers=1)
    assert list(bpe.learn(counts, size)) == slow_learn(counts, size)


def test_merges_of_random_words_over_few_letters():
    """Overlaps, repeats and ties in every combination; to the point where nothing is left."""
    for seed in range(60):
        rng = random.Random(seed)
        counts = Counter({"".join(rng.choices("abc"[:rng.randrange(1, 4)], k=rng.randrange(1, 12))):
                          rng.randrange(1, 4) for _ in range(rng.randrange(1, 12))})
        size = 256 + rng.randrange(40)
        slow = slow_learn(counts, size)
        assert list(bpe.learn(counts, size)) == slow, (seed, counts)
        floored = list(bpe.learn(counts, size, floor=3))    # a prefix: it stops, it never errs
        assert floored == slow[:len(floored)], (seed, counts)


def test_merges_are_those_of_the_tokenizers_library():
    """Ties included: both break them by the lower ids, and number the bytes alike."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    texts = [ENGLISH * 2, CODE, CHINESE]
    theirs = Tokenizer(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=1200, special_tokens=[], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    ours = T.train(texts, 1200, special_tokens=())
    assert {bpe.printable(t): i for t, i in ours.ranks.items()} == theirs.get_vocab()


def test_training_does_not_depend_on_order_or_workers():
    texts = [CODE[i:i + 4000] for i in range(0, len(CODE), 4000)] * 110     # several batches
    one = T.train(texts, 800, workers=1)
    two = T.train(texts[::-1], 800, workers=2)
    assert list(one.ranks) == list(two.ranks)


@pytest.mark.skipif(sys.version_info < (3, 11, 5),
                    reason="Python's pool could hang there: gh-94777")
def test_a_killed_worker_is_one_sentence(monkeypatch):
    monkeypatch.setattr(bpe, "count_batch", die)
    with pytest.raises(UserError, match="--workers=1"):
        bpe.count_chunks([ENGLISH * 10_000] * 3, bpe.PATTERNS["gpt2"], workers=2)


def die(pattern: str, texts: list[str]) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Text(str):
    """A str that can be weakly referenced."""


@pytest.mark.parametrize("workers", [1, 2])
def test_training_holds_a_few_batches_never_the_whole_text(workers):
    made, most = [], 0

    def stream():
        nonlocal most
        for k in range(120):
            text = Text(f"{k} " + ENGLISH * 1000)          # 160 kB, batches are 1 MB
            made.append(weakref.ref(text))
            most = max(most, sum(ref() is not None for ref in made))
            yield text

    counts = bpe.count_chunks(stream(), bpe.PATTERNS["gpt2"], workers)
    assert counts[" fox"] == 120 * 1000
    assert most < 60, "texts alive at once, of 120"


def test_a_script_without_a_main_guard_cannot_start_itself_again(tmp_path):
    """Under spawn, worker processes import the script; ours are forked or there are none."""
    script = tmp_path / "unguarded.py"
    script.write_text(textwrap.dedent(f"""
        import multiprocessing, sys
        sys.path.insert(0, {str(ROOT)!r})
        multiprocessing.set_start_method("spawn")
        import tokenizer
        print(tokenizer.train(["some text " * 300_000] * 2, 260, workers=2).vocab_size)
    """))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("260\n", 0), done.stderr


def test_vocab_size_counts_the_control_tokens_which_come_last():
    tok = T.train([ENGLISH], 300, special_tokens=["<|endoftext|>", "<pad>"])
    assert tok.vocab_size == 300 and tok.special == {"<|endoftext|>": 298, "<pad>": 299}
    assert tok.eot == 298 and len(tok.ranks) == 298


@pytest.mark.parametrize("call, words", [
    (lambda: T.train(["hello hello"], 5000), "--vocab_size=26"),
    (lambda: T.train([""], 300), "no text"),
    (lambda: T.train([], 300), "no text"),
    (lambda: T.train_chars([""]), "no text"),
    (lambda: T.train([ENGLISH], 200), "at least 257"),
    (lambda: T.train([ENGLISH], 300, pattern="(unclosed"), "not understood"),
    (lambda: T.train([ENGLISH], 300, pattern=r"\p{Nonsense}+"), "not a character class"),
    (lambda: T.train([ENGLISH], 300, pattern=r"[\w&&[a-z]]+"), "nested"),
])
def test_training_mistakes_are_one_sentence(call, words):
    with pytest.raises(UserError, match=words.replace("(", r"\(")) as e:
        call()
    assert "\n" not in str(e.value)


def test_the_advised_vocab_size_works():
    with pytest.raises(UserError) as e:
        T.train(["hello hello"], 5000)
    advised = int(str(e.value).split("--vocab_size=")[1].split()[0])
    assert T.train(["hello hello"], advised).vocab_size == advised


# --- splitting ------------------------------------------------------------------------------

@pytest.mark.parametrize("name", PUBLISHED)
def test_chunks_are_those_of_the_published_pattern(name):
    """Through the ids: with every chunk's ranks from one training, equal ids need equal cuts."""
    tok = T.train([ENGLISH, CODE, CHINESE, MIXED, SPACE], 1200, pattern=name, workers=1)
    oracle = tiktoken.Encoding("o", pat_str=PUBLISHED[name], mergeable_ranks=tok.ranks,
                               special_tokens={})
    for text in TEXTS + RANDOM:
        assert tok.encode_ordinary(text) == oracle.encode_ordinary(text), repr(text)
    # and the published form itself, possessive quantifiers and `$`, through our translation
    foreign = T.Tokenizer(tok.ranks, {}, PUBLISHED[name])
    for text in TEXTS + RANDOM[:100]:
        assert foreign.encode_ordinary(text) == oracle.encode_ordinary(text), repr(text)


def test_chunks_literally():
    assert bpe.split(bpe.PATTERNS["gpt2"], "I'm 12  é\n") == ["I", "'m", " 12", " ", " é", "\n"]
    assert bpe.split(bpe.PATTERNS["cl100k"], "I'M 12345\n\n x") == [
        "I", "'M", " ", "123", "45", "\n\n", " x"]
    assert bpe.split(bpe.PATTERNS["smollm"], "a  12") == ["a", "  ", "1", "2"]
    assert bpe.split(bpe.PATTERNS["o200k"], "HelloWorld's/\n/") == ["Hello", "World's", "/\n/"]


@pytest.mark.parametrize("escape, category", [(r"\p{L}", "L"), (r"\p{N}", "N"), (r"\p{Lu}", "Lu")])
def test_character_classes_agree_with_unicodedata_on_what_both_know(escape, category):
    inside = {c for a, b in bpe.members(escape) for c in range(a, b + 1)}
    for code in range(0x110000):
        known = unicodedata.category(chr(code))
        if known != "Cn" and known != "Cs":     # Python's Unicode may be older, never different
            assert (code in inside) == known.startswith(category), hex(code)


def test_white_space_is_unicodes_not_pythons():
    inside = {chr(c) for a, b in bpe.members(r"\s") for c in range(a, b + 1)}
    assert "\x85" in inside and not inside & set("\x1c\x1d\x1e\x1f\u200b")


def test_blocks_change_no_cut(tok):
    """Long texts are cut into blocks first; ids have to be those of the uncut text."""
    rng = random.Random(5)
    for seed in range(40):
        text = "".join(random_texts(6, seed + 100)) + "".join(
            rng.choice(["\n", "\n\n", "a\nb", ".\n/x", "\r\n", " \n", "\n 1", "x\n"])
            for _ in range(40))
        assert "".join(bpe.blocks(text, 7)) == text
        for name, pattern in bpe.PATTERNS.items():
            cut = [c for block in bpe.blocks(text, 7) for c in bpe.split(pattern, block)]
            assert cut == bpe.split(pattern, text), (name, text)


# --- encoding and decoding ------------------------------------------------------------------

def test_encode_by_hand_is_tiktoken(tok):
    plain = tiktoken.Encoding("plain", pat_str=tok.pattern, mergeable_ranks=tok.ranks,
                              special_tokens=tok.special)
    for text in TEXTS + RANDOM + [CODE * 5 + MIXED * 50]:
        ids = plain.encode_ordinary(text)
        assert tok.encode_ordinary(text) == ids, repr(text)
        assert tok.encode(text, disallowed_special=()) == ids
        assert tok.encode_fast(text, disallowed_special=()) == ids
        both = plain.encode(text, allowed_special="all")
        assert tok.encode(text, "all") == tok.encode_fast(text, "all") == both
        assert tok.decode(ids) == text and tok.decode_bytes(both) == text.encode()
    assert tok.encode_batch(TEXTS, threads=2) == [plain.encode_ordinary(t) for t in TEXTS]


def test_bpe_of_any_piece_is_tiktokens(tok):
    """Short and long pieces take different loops; both are the rule, on bytes that are no text."""
    plain = tok.tiktoken
    rng = random.Random(2)
    tokens = list(tok.ranks)
    for length in [0, 1, 2, 3, 10, 198, 199, 200, 201, 400, 3000]:
        for _ in range(20):
            few = bytes(rng.choices(b"ab =", k=length))
            parts = b"".join(rng.choices(tokens, k=length))[:length]
            for piece in (few, parts, b"a" * length):
                expected = plain._encode_single_piece(piece) if piece else []
                assert [tok.ranks[t] for t in bpe.bpe(tok.ranks, piece)] == expected


def test_a_long_text_without_spaces_is_not_quadratic(tok):
    start = time.perf_counter()
    text = "a" * 200_000 + "".join(random.Random(0).choices("abcdefgh", k=100_000))
    assert tok.decode(tok.encode(text)) == text
    assert time.perf_counter() - start < 20


def test_a_million_spaces_are_encoded_where_tiktoken_panics(tok, monkeypatch):
    text = "a" + " " * 1_000_500 + "b"
    assert T.too_blank(text) and not T.too_blank("a b " * 300_000)
    bytewise = T.train(["ab ab"], 258)
    assert bytewise.decode(bytewise.encode_fast(text)) == text
    monkeypatch.setattr(T, "too_blank", lambda text: "  " in text)
    assert tok.encode_batch(["a", "b   "]) == [tok.encode("a"), tok.encode("b   ")]


def test_the_docstring_example_of_bpe():
    assert doctest.testmod(bpe).failed == 0


def test_the_piece_cache_is_bounded(tok):
    cache = bpe.PieceCache(tok.ranks, tok.ids, limit=10)
    for word in CODE.split():
        assert cache[word] == [tok.ids[t] for t in bpe.bpe(tok.ranks, word.encode())]
        assert len(cache) <= 10


def test_lone_surrogates_become_the_replacement_character(tok):
    """JSON can hold half a surrogate pair; tiktoken replaces it, and so do we."""
    for text in ["a\ud800b", "\ude00\ud83d", "\ud83d\ude00 é", "x\udfff"]:
        assert tok.encode_ordinary(text) == tok.tiktoken.encode_ordinary(text)
        assert tok.encode_fast(text) == tok.encode(text)
    assert T.train(["bad \ud800 text"] * 2, 258).vocab_size == 258


def test_special_tokens_follow_tiktokens_rules():
    tok = T.train([ENGLISH], 300, special_tokens=["<|endoftext|>", "<|end|>", "<|end|>|x"])
    plain = tok.tiktoken
    text = "a<|end|> b<|endoftext|><|endoftext|>"
    for call in (tok.encode, tok.encode_fast):
        with pytest.raises(UserError, match="<|end|>"):
            call(text)
        for allowed in ("all", {"<|end|>"}, {"<|endoftext|>"}, set(), {"<|unknown|>"}):
            expected = plain.encode(text, allowed_special=allowed if allowed == "all" else
                                    allowed & set(tok.special), disallowed_special=())
            assert call(text, allowed, disallowed_special=()) == expected
        with pytest.raises(UserError):
            call(text, {"<|end|>"})
        assert call(text, {"<|end|>"}, disallowed_special={"<|end|>|x"}) == plain.encode(
            text, allowed_special={"<|end|>"}, disallowed_special={"<|end|>|x"})
    assert tok.encode("<|end|>|x", "all") == [tok.special["<|end|>|x"]]     # the longest wins


def test_many_control_tokens_in_a_text_are_not_quadratic(tok):
    start = time.perf_counter()
    ids = tok.encode_fast("a<|endoftext|>" * 50_000, "all")
    assert len(ids) == 100_000 and time.perf_counter() - start < 10


def test_the_stream_never_splits_a_character(tok):
    rng = random.Random(3)
    for text in TEXTS + RANDOM:
        stream, out = tok.stream(), ""
        for i in tok.encode_ordinary(text):
            out += (piece := stream.put(i))
            assert "\ufffd" not in piece or "\ufffd" in text
        assert out + stream.flush() == text
    for _ in range(200):        # ids at random: halves of characters anywhere
        ids = rng.choices(range(tok.vocab_size), k=20)
        stream = tok.stream()
        assert "".join(map(stream.put, ids)) + stream.flush() == tok.decode(ids)


def test_the_stream_shows_an_emoji_at_its_last_byte():
    bytewise = T.train(["abc abc"], 257)
    stream = bytewise.stream()
    assert [stream.put(i) for i in bytewise.encode("😀!")] == ["", "", "", "😀", "!"]
    stream.put(bytewise.encode("é")[0])
    assert stream.flush() == "\ufffd"


def test_byte_lengths_add_up_to_the_text(tok):
    lengths = tok.byte_lengths()
    assert lengths.dtype == np.int32 and lengths.shape == (tok.vocab_size,)
    for text in TEXTS + RANDOM:
        assert lengths[tok.encode(text, "all")].sum() == len(text.replace(T.EOT, "").encode())
    assert lengths[tok.eot] == 0


def test_adding_special_tokens(tok):
    more = copy.deepcopy(tok)
    assert more.encode_fast("<|im_start|>", disallowed_special=())
    assert more.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|im_start|>", T.EOT]) == 2
    assert more.vocab_size == tok.vocab_size + 2
    assert more.encode("<|im_end|>x", "all") == [tok.vocab_size + 1, *tok.encode("x")]
    assert more.encode_fast("<|im_end|>x", "all") == more.encode("<|im_end|>x", "all")
    assert more.decode([tok.vocab_size]) == "<|im_start|>"
    assert more.add_special_tokens(["<|im_end|>"]) == 0
    for name in ("", " the"):       # an ordinary token cannot be a control token too
        with pytest.raises(UserError, match="cannot name"):
            copy.deepcopy(more).add_special_tokens([name])
    assert tok.vocab_size == 1500       # the copy is its own


def test_an_id_outside_the_vocabulary_is_named(tok):
    with pytest.raises(UserError, match="1500"):
        tok.decode([5, 1500])
    with pytest.raises(UserError, match="-1"):
        tok.stream().put(-1)


def test_a_tokenizer_travels_to_another_process(tok):
    tok.encode("warm"), tok.encode_fast("warm")
    assert pickle.loads(pickle.dumps(tok)).encode_fast(ENGLISH) == tok.encode(ENGLISH)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(tok.encode_fast, [ENGLISH]) == tok.encode(ENGLISH)


# --- files: ours and Hugging Face's ---------------------------------------------------------

def assert_same_as_library(tok: T.Tokenizer, theirs, texts: list[str]) -> None:
    for text in texts:
        expected = theirs.encode(text, add_special_tokens=False).ids
        assert tok.encode(text, "all") == expected, repr(text)
        assert tok.encode_fast(text, "all") == expected, repr(text)


# Assigned for a decade, so that every engine's Unicode knows the characters.
OLD = "".join(c for c in ENGLISH + CHINESE + MIXED if c != "\u0130")
LIBRARY_TEXTS = TEXTS + random_texts(150, seed=7, pool=OLD) + [ENGLISH + "<|endoftext|>" + CHINESE]


@pytest.mark.parametrize("pattern", ["gpt2", "cl100k", "o200k", "smollm"])
def test_saved_files_open_in_tokenizers_and_transformers(pattern, tmp_path):
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer
    tok = T.train([ENGLISH, CODE, CHINESE, MIXED, RUNS], 1300, pattern=pattern, workers=1)
    tok.save(tmp_path / "new" / "folder")
    theirs = Tokenizer.from_file(str(tmp_path / "new" / "folder" / "tokenizer.json"))
    assert theirs.get_vocab_size() == tok.vocab_size
    assert_same_as_library(tok, theirs, LIBRARY_TEXTS)
    auto = AutoTokenizer.from_pretrained(tmp_path / "new" / "folder")
    assert auto.eos_token_id == tok.eot and len(auto) == tok.vocab_size
    for text in LIBRARY_TEXTS:
        ids = tok.encode(text, "all")
        assert auto(text)["input_ids"] == ids
        assert auto.decode(ids) == text
    again = T.load(tmp_path / "new" / "folder")
    assert (again.ranks, again.special, again.pattern) == (tok.ranks, tok.special, tok.pattern)
    assert list(os.listdir(tmp_path / "new" / "folder")) and not list(tmp_path.rglob(".*"))


def library_tokenizer(form: str):
    """A tokenizer of the library's own making, in the form of a published model."""
    from tokenizers import (AddedToken, Regex, Tokenizer, decoders, models, normalizers,
                            pre_tokenizers, processors, trainers)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs = Tokenizer(models.BPE(ignore_merges=form == "llama3"))
    theirs.decoder = decoders.ByteLevel()
    cl100k = bpe.PATTERNS["cl100k"]
    theirs.pre_tokenizer = {
        "gpt2": gpt2,
        "llama3": pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(cl100k), "isolated"), byte_level]),
        "removed": pre_tokenizers.Sequence(     # how converters from tiktoken write it
            [pre_tokenizers.Split(Regex(cl100k), "removed", invert=True), byte_level]),
        "qwen": pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(QWEN), "isolated"), byte_level]),
        "smollm2": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2]),
    }[form]
    if form == "qwen":
        theirs.normalizer = normalizers.NFC()
    # SmolLM2 puts its control tokens first, so that no id is a rank; the others add theirs last
    first = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"] if form == "smollm2" else []
    theirs.train_from_iterator([ENGLISH, CODE, CHINESE, MIXED, RUNS], trainers.BpeTrainer(
        vocab_size=1200, special_tokens=first, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    theirs.add_special_tokens(["<|endoftext|>", "<|end|>"])
    theirs.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    if form == "llama3":
        theirs.post_processor = processors.TemplateProcessing(
            single="<|end|> $A", special_tokens=[("<|end|>", theirs.token_to_id("<|end|>"))])
    return theirs


@pytest.mark.parametrize("form", ["gpt2", "llama3", "removed", "qwen", "smollm2"])
@pytest.mark.parametrize("merges", ["pairs", "strings", "every split", "shuffled ids"])
def test_hugging_face_forms_give_the_librarys_ids(form, merges, tmp_path):
    from tokenizers import Tokenizer
    theirs = library_tokenizer(form)
    document = json.loads(theirs.to_str())
    model = document["model"]
    if merges == "strings":                 # as written before 2024
        model["merges"] = [" ".join(m) for m in model["merges"]]
    elif merges == "every split":           # as Llama 3 was converted from ranks
        every = []
        for left, right in model["merges"]:
            token = left + right
            every += [[token[:i], token[i:]] for i in range(1, len(token))
                      if token[:i] in model["vocab"] and token[i:] in model["vocab"]]
        model["merges"] = every
        document["model"]["ignore_merges"] = True
    elif merges == "shuffled ids":
        ids = list(model["vocab"].values())
        random.Random(0).shuffle(ids)
        new = dict(zip(model["vocab"].values(), ids))
        model["vocab"] = {t: new[i] for t, i in model["vocab"].items()}
        for added in document["added_tokens"]:
            added["id"] = new.get(added["id"], added["id"])
        document["post_processor"] = None
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    theirs = Tokenizer.from_file(str(path))
    tok = T.load(path)
    texts = LIBRARY_TEXTS[::2] + ["<think>a e\u0301</think><|end|>e\u0301<|im_start|>"]
    assert_same_as_library(tok, theirs, texts)
    assert tok.eot == theirs.token_to_id("<|endoftext|>")
    assert tok.vocab_size == max(theirs.get_vocab().values()) + 1
    for text in texts:
        normal = unicodedata.normalize("NFC", text) if form == "qwen" else text
        assert tok.decode(tok.encode(text, "all")) == normal
    if merges == "pairs":       # saved again: the same ids, and the first token that it adds
        tok.save(tmp_path / "again")
        again = Tokenizer.from_file(str(tmp_path / "again" / "tokenizer.json"))
        assert_same_as_library(tok, again, texts)
        assert again.encode("a").ids == theirs.encode("a").ids
        assert T.load(tmp_path / "again").encode(ENGLISH) == tok.encode(ENGLISH)


def test_bytes_that_a_vocabulary_lacks_are_dropped_as_the_library_drops_them(tmp_path):
    """SmolLM2's file lacks 21 of the 256 bytes: tiktoken panics on them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    theirs = Tokenizer(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = [c for c in pre_tokenizers.ByteLevel.alphabet()
                if bpe.CHAR_BYTE[c] not in b"\x04\x06\x1d\xc0\xf1\xff\xe4"]
    theirs.train_from_iterator([ENGLISH * 2 + "!!!! ??!!"], trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    theirs.save(str(tmp_path / "tokenizer.json"))
    tok = T.load(tmp_path)
    assert len(tok.lost) == 7
    texts = ["!\x04!", "!!\x04", "\x04", "the\x06 fox\x1d", "中文 \x04", ENGLISH, "\U00050000 x"]
    assert_same_as_library(tok, theirs, texts)
    assert tok.encode_batch(texts) == [theirs.encode(t).ids for t in texts]


@pytest.mark.parametrize("names", [("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")])
def test_gpt2s_two_files(names, tmp_path):
    theirs = library_tokenizer("gpt2")
    model = json.loads(theirs.to_str())["model"]
    vocab = {**model["vocab"], "<|endoftext|>": len(model["vocab"])}
    (tmp_path / names[0]).write_text(json.dumps(vocab))
    (tmp_path / names[1]).write_text("#version: 0.2\n" + "\n".join(map(" ".join, model["merges"]))
                                     + "\n", encoding="utf-8")
    tok = T.load(tmp_path)
    assert tok.eot == len(model["vocab"]) and tok.pattern == bpe.PATTERNS["gpt2"]
    for text in (ENGLISH, CODE, MIXED):
        assert tok.encode(text) == theirs.encode(text).ids


@pytest.mark.parametrize("name, pattern", T.TIKTOKEN.items())
def test_tiktokens_names(name, pattern, tok, monkeypatch, tmp_path):
    """With tiktoken's download stood in for: ranks, control tokens and pattern are taken over."""
    downloaded = tiktoken.Encoding(name, pat_str=PUBLISHED[pattern], mergeable_ranks=tok.ranks,
                                   special_tokens={"<|endoftext|>": 1600, "<|fim|>": 1601})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda n: downloaded)
    monkeypatch.chdir(tmp_path)
    ours = T.load(name)
    for text in TEXTS:
        assert ours.encode(text) == ours.encode_fast(text) == downloaded.encode(text)
    assert ours.eot == 1600 and ours.vocab_size == 1602


def test_no_network_is_one_sentence_that_says_what_works(monkeypatch, tmp_path):
    def offline(name):
        raise ConnectionError("Max retries exceeded with url: …\nlong story")
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no network.*tokenizer.json.*train") as e:
        T.load("gpt2")
    assert "\n" not in str(e.value)


def test_character_mode(tmp_path):
    """nanoGPT's shakespeare_char: the sorted characters, nothing else."""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer
    text = "First Citizen:\nBefore we proceed, hear me speak é😀.\n"
    tok = T.train_chars([text[:20], text[20:]])
    itos = sorted(set(text))
    assert tok.vocab_size == len(itos) and tok.eot is None
    ids = tok.encode(text)
    assert ids == [itos.index(c) for c in text] == tok.encode_fast(text)
    assert tok.encode_batch([text, ""]) == [ids, []]
    assert tok.decode(ids) == text and tok.byte_lengths()[ids].sum() == len(text.encode())
    assert "".join(map(tok.stream().put, ids)) == text
    with pytest.raises(UserError, match="'Z'"):
        tok.encode("First Z")
    tok.save(tmp_path)
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(text).ids == ids
    auto = AutoTokenizer.from_pretrained(tmp_path)
    assert auto(text)["input_ids"] == ids and auto.decode(ids) == text
    again = T.load(tmp_path)
    assert again.encode(text) == ids and again.ids == tok.ids
    again.add_special_tokens(["<|endoftext|>"])
    again.save(tmp_path)
    assert T.load(tmp_path).encode("e<|endoftext|>", "all") == [itos.index("e"), len(itos)]


def test_a_save_that_dies_leaves_the_old_file(tok, tmp_path, monkeypatch):
    tok.save(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    other = T.train([ENGLISH], 300)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", lambda *a, **k: os.write(-1, b"a full disk"))
        with pytest.raises(OSError):
            other.save(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            other.save(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def hostile_documents():
    """(what is wrong, how to spoil a good tokenizer.json)."""
    def put(*path_and_value):
        *path, value = path_and_value

        def spoil(d):
            for key in path[:-1]:
                d = d[key]
            d[path[-1]] = value
        return spoil
    return {
        "no model": lambda d: d.pop("model"),
        "unigram": put("model", "type", "Unigram"),
        "byte fallback": put("model", "byte_fallback", True),
        "vocab is a list": put("model", "vocab", [["a", 1]]),
        "id is text": put("model", "vocab", "a", "many"),
        "negative id": put("model", "vocab", "a", -1),
        "huge id": put("model", "vocab", "a", 1 << 40),
        "merge of three": put("model", "merges", ["a b c"]),
        "merge of the unknown": put("model", "merges", [["zq", "qz"]]),
        "lacks a byte": lambda d: d["model"]["vocab"].pop("a") and put("model", "merges", [])(d),
        "another pre_tokenizer": put("pre_tokenizer", {"type": "Whitespace"}),
        "prefix space": put("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": True}),
        "lowercases": put("normalizer", {"type": "Lowercase"}),
        "flag is text": put("added_tokens", 0, "lstrip", "yes"),
        "an end of words": put("model", "end_of_word_suffix", "</w>"),
        "a word in character mode": put("model", {"type": "WordLevel", "vocab": {"word": 0}}),
    }


@pytest.mark.parametrize("fault", hostile_documents())
def test_a_foreign_or_hostile_tokenizer_json_is_refused(fault, tok, tmp_path):
    document = tok._json()
    hostile_documents()[fault](document)
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(UserError) as e:
        T.load(tmp_path)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"3", b"{", b'{"model": {"vocab"', b"\xff\xfe",
                                     b"[" * 100_000, b'{"model": null}'])
def test_a_broken_tokenizer_json_is_refused(content, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError):
        T.load(tmp_path / "tokenizer.json")


def test_the_end_token_of_a_chat_models_file_is_kept(tok, tmp_path):
    """SmolLM2's files name <|im_end|> as eos_token: it ends answers, not documents."""
    tok = copy.deepcopy(tok)
    tok.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tok.save(tmp_path)
    for end in ("<|im_end|>", {"content": "<|im_end|>"}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": end}))
        again = T.load(tmp_path)
        assert again.eot == tok.special[T.EOT]
        assert again.stop_ids == sorted([tok.eot, tok.special["<|im_end|>"]])
        again.save(tmp_path)
        assert json.loads((tmp_path / "tokenizer_config.json").read_text())["eos_token"] == end
    odd = T.Tokenizer(tok.ranks, {"<done>": 5000}, tok.pattern)
    odd.facts.named["eos_token"] = "<done>"
    assert odd.eot == 5000 and tok.stop_ids == [tok.eot]


def test_loading_nothing_says_what_can_be_loaded(tmp_path):
    for path in (tmp_path, tmp_path / "missing", "no_such_name"):
        with pytest.raises(UserError, match="tokenizer.json.*gpt2"):
            T.load(path)


# --- chats ----------------------------------------------------------------------------------

CHAT = [{"role": "user", "content": "Hi <|im_end|>\n\n there"},
        {"role": "assistant", "content": "Hello! 你好 def f():\n  pass"},
        {"role": "user", "content": "Bye.\n"},
        {"role": "assistant", "content": "See <|eot_id|> you"}]
SYSTEM = [{"role": "system", "content": "Be brief."}]
H, E = "<|start_header_id|>", "<|end_header_id|>\n\n"
# What the models' own cards show for [system,] user U, assistant A, user V, assistant B;
# «» around what is trained on.
RENDERED = {
    "chatml": ("<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n«A<|im_end|>»\n"
               "<|im_start|>user\nV<|im_end|>\n<|im_start|>assistant\n«B<|im_end|>»\n"),
    "smollm2": ("<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by "
                "Hugging Face<|im_end|>\n<|im_start|>user\nU<|im_end|>\n"
                "<|im_start|>assistant\n«A<|im_end|>»\n<|im_start|>user\nV<|im_end|>\n"
                "<|im_start|>assistant\n«B<|im_end|>»\n"),
    "llama3": (f"<|begin_of_text|>{H}user{E}U<|eot_id|>{H}assistant{E}«A<|eot_id|>»"
               f"{H}user{E}V<|eot_id|>{H}assistant{E}«B<|eot_id|>»"),
    "qwen2": ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
              "U<|im_end|>\n<|im_start|>assistant\n«A<|im_end|>»\n"
              "<|im_start|>user\nV<|im_end|>\n<|im_start|>assistant\n«B<|im_end|>»\n"),
    "qwen2.5": ("<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful "
                "assistant.<|im_end|>\n<|im_start|>user\nU<|im_end|>\n"
                "<|im_start|>assistant\n«A<|im_end|>»\n<|im_start|>user\nV<|im_end|>\n"
                "<|im_start|>assistant\n«B<|im_end|>»\n"),
    "qwen3": ("<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n«A<|im_end|>»\n"
              "<|im_start|>user\nV<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
              "«B<|im_end|>»\n"),
    "llama3.1": (f"<|begin_of_text|>{H}system{E}{chat._DATES}<|eot_id|>{H}user{E}U<|eot_id|>"
                 f"{H}assistant{E}«A<|eot_id|>»{H}user{E}V<|eot_id|>{H}assistant{E}«B<|eot_id|>»"),
    "llama2": ("<s>[INST] U [/INST]« A <|endoftext|>»<s>[INST] V [/INST]« B <|endoftext|>»"),
    "mistral": "<s>[INST] U [/INST]« A<|endoftext|>»[INST] V [/INST]« B<|endoftext|>»",
    "chatglm3": "[gMASK]sop<|user|>\n U<|assistant|>«\n A<|user|>»\n V<|assistant|>«\n B<|user|>»",
    "zephyr": ("<|user|>\nU<|endoftext|>\n<|assistant|>\n«A<|endoftext|>»\n"
               "<|user|>\nV<|endoftext|>\n<|assistant|>\n«B<|endoftext|>»\n"),
    "gemma": ("<bos><start_of_turn>user\nU<end_of_turn>\n<start_of_turn>model\n«A<end_of_turn>»\n"
              "<start_of_turn>user\nV<end_of_turn>\n<start_of_turn>model\n«B<end_of_turn>»\n"),
    "glm4": "[gMASK]<sop><|user|>\nU<|assistant|>\n«A<|user|>»\nV<|assistant|>\n«B<|user|>»",
    "minicpm": "<用户>U<AI>«A<|endoftext|>»<用户>V<AI>«B<|endoftext|>»",
    "alpaca": ("Below is an instruction that describes a task. Write a response that appropriately "
               "completes the request.\n\n### Instruction:\nU\n\n### Response:\n«A<|endoftext|>»"
               "### Instruction:\nV\n\n### Response:\n«B<|endoftext|>»"),
}
WITH_SYSTEM = {     # the beginning, with the system message S
    "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU",
    "smollm2": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU",
    "llama3": f"<|begin_of_text|>{H}system{E}S<|eot_id|>{H}user{E}U",
    "qwen2": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU",
    "qwen2.5": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU",
    "qwen3": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU",
    "llama3.1": f"<|begin_of_text|>{H}system{E}{chat._DATES}S<|eot_id|>{H}user{E}U",
    "llama2": "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nU [/INST] A",
    "mistral": "<s>[INST] S\n\nU [/INST] A", "chatglm3": "[gMASK]sop<|system|>\n S<|user|>\n U",
    "zephyr": "<|system|>\nS<|endoftext|>\n<|user|>\nU",
    "gemma": "<bos><start_of_turn>user\nS\n\nU", "glm4": "[gMASK]<sop><|system|>\nS<|user|>\nU",
    "minicpm": "S<用户>U<AI>", "alpaca": "S\n\n### Instruction:\nU\n\n### Response:\n",
}


@pytest.fixture(scope="session", params=["gpt2", "cl100k"])
def chat_tok(request) -> T.Tokenizer:
    tok = T.train([ENGLISH, CODE, CHINESE], 900, pattern=request.param, workers=1)
    tok.add_special_tokens(t for row in chat.TEMPLATES.values() for t in row.control(T.EOT))
    return tok


def test_every_template_has_its_expected_text():
    assert set(RENDERED) == set(WITH_SYSTEM) == set(chat.TEMPLATES)


@pytest.mark.parametrize("name", chat.TEMPLATES)
def test_render_is_what_the_model_cards_show(name, chat_tok):
    turns = [{"role": r, "content": c} for r, c in zip(["user", "assistant"] * 2, "UAVB")]
    ids, mask = chat_tok.render(turns, name)
    text, last = b"", 0
    for i, m in zip(ids, mask):
        text += ("«" if m > last else "»" if m < last else "").encode() + chat_tok.tokens[i]
        last = m
    assert text.decode() + "»" * last == RENDERED[name]
    assert len(ids) == len(mask) and set(mask) <= {0, 1}
    system = chat_tok.render([{"role": "system", "content": "S"}, *turns], name)
    assert chat_tok.decode(system[0]).startswith(WITH_SYSTEM[name])
    assert sum(system[1]) == sum(mask)
    # the prompt of an answer is the beginning of the conversation with that answer
    prompt, none = chat_tok.render(turns[:3], name, add_generation_prompt=True)
    assert prompt == ids[:len(prompt)] and len(none) == len(prompt)
    assert mask[len(prompt):].count(1) >= 2     # the content and its end
    assert chat_tok.render(turns, name, max_length=7) == (ids[:7], mask[:7])


@pytest.mark.parametrize("name", chat.TEMPLATES)
def test_the_mask_is_the_answers_and_their_ends(name, chat_tok):
    """Supervised ids == assistant text + end token, on every turn; control tokens in content are
    letters."""
    ids, mask = chat_tok.render(SYSTEM + CHAT, name)
    row = chat.find(name)
    control = {chat_tok.special[t] for t in row.control(T.EOT)}
    end = chat_tok.special[row.stops(T.EOT)[0]]
    trained = [i for i, m in zip(ids, mask) if m]
    expected = []
    for m in CHAT[1::2]:
        closing = row.after("assistant", T.EOT).partition("<")[0] if not row.closing else ""
        text = row.lead + m["content"] + closing        # what leads to the end token is learnt too
        expected += chat_tok.encode(text, disallowed_special=()) + [end]
    assert trained == expected
    # no control token but the template's: its number does not depend on the content
    plain = chat_tok.render([{**m, "content": "x"} for m in SYSTEM + CHAT], name)[0]
    assert sum(i in control for i in ids) == sum(i in control for i in plain)
    chat_tok.template = name
    assert end in chat_tok.stop_ids and chat_tok.eot in chat_tok.stop_ids


@pytest.mark.parametrize("name", chat.TEMPLATES)
def test_transformers_renders_the_saved_template_to_the_same_ids(name, chat_tok, tmp_path):
    from transformers import AutoTokenizer
    chat_tok.template = name
    chat_tok.save(tmp_path)
    auto = AutoTokenizer.from_pretrained(tmp_path)
    assert T.load(tmp_path).template == name
    harmless = [{**m, "content": m["content"].replace("<|", "< ")} for m in CHAT]
    tools = [*harmless[:2], {"role": "tool", "content": "42"}, harmless[3]]
    for messages in (harmless, SYSTEM + harmless, harmless[:1], harmless[:3], SYSTEM + tools):
        for prompt in (False, True):
            if prompt and messages[-1]["role"] == "assistant":
                continue
            theirs = auto.apply_chat_template(messages, tokenize=True, return_dict=False,
                                              add_generation_prompt=prompt)
            ids, _ = chat_tok.render(messages, add_generation_prompt=prompt)
            assert chat_tok.decode(theirs) == chat_tok.decode(ids)
            # GPT-2's pattern cuts a template's "\n\n" otherwise before text than at the end of a
            # prompt. We cut it as in the prompt; the pattern of Llama 3 knows no difference.
            if name not in ("llama3", "llama3.1", "qwen3") or len(messages) == 1 \
                    or chat_tok.pattern != bpe.PATTERNS["gpt2"]:
                assert theirs == ids


CHATML_LOOP = ("{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + "
               "message['content'] + '<|im_end|>\n'}}{% endfor %}"
               "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


@pytest.mark.parametrize("where", ["tokenizer_config.json", "chat_template.jinja"])
def test_a_models_own_template_is_rendered_and_kept(where, tok, tmp_path):
    tok = copy.deepcopy(tok)
    tok.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tok.save(tmp_path)
    text = json.dumps({"chat_template": CHATML_LOOP}) if where.endswith("json") else CHATML_LOOP
    (tmp_path / where).write_text(text, encoding="utf-8")
    again = T.load(tmp_path)
    assert again.template is None and again.jinja == CHATML_LOOP
    assert again.render(CHAT) == again.render(CHAT, "chatml")
    again.save(tmp_path / "again")
    assert T.load(tmp_path / "again").jinja == CHATML_LOOP
    # one with the name of a row in it, or most of its words, is no row for that
    for edited in ("{# chatml #}" + CHATML_LOOP, chat.jinja(chat.find("chatml"), T.EOT) + " "):
        (tmp_path / where).write_text(json.dumps({"chat_template": edited}) if "json" in where
                                      else edited, encoding="utf-8")
        assert T.load(tmp_path).template is None


def test_a_list_of_templates_means_the_one_named_default(tok, tmp_path):
    tok.save(tmp_path)
    both = [{"name": "tools", "template": "x"}, {"name": "default", "template": CHATML_LOOP}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": both}))
    assert T.load(tmp_path).jinja == CHATML_LOOP
    assert T.load(tmp_path).jinjas == {"tools": "x", "default": CHATML_LOOP}


def test_qwen3_thinks_first_unless_told_not_to(chat_tok, tmp_path):
    """Thoughts of old answers are left out; without thinking, an empty thought is in the prompt."""
    from transformers import AutoTokenizer
    chat_tok.template = "qwen3"
    chat_tok.save(tmp_path)
    auto = AutoTokenizer.from_pretrained(tmp_path)
    think = "<think>\nwell\n</think>\n\nIt is so."
    chats = [[{"role": "user", "content": "Q"}, {"role": "assistant", "content": think},
              {"role": "user", "content": "R"}, {"role": "assistant", "content": think}]]
    chats += [chats[0][:k] for k in (1, 2, 3)]
    for messages in chats:
        for thinking in (True, False):
            prompt = messages[-1]["role"] == "user"
            theirs = auto.apply_chat_template(messages, tokenize=False, enable_thinking=thinking,
                                              add_generation_prompt=prompt)
            ids, _ = chat_tok.render(messages, None, prompt, enable_thinking=thinking)
            assert chat_tok.decode(ids) == theirs
            assert theirs.count("well") == (not prompt)
            assert theirs.endswith(chat.NO_THOUGHTS) == (prompt and not thinking)


@pytest.mark.parametrize("messages, words", [
    ([], "at least one message"), ([{"role": "wizard", "content": "x"}], "message 1.*wizard"),
    ([{"role": "user", "content": "x"}, {"role": "assistant"}], "message 2.*NoneType"),
    ([{"content": "x"}], "message 1"), ([{"role": "user", "content": ["x"]}], "list")])
def test_a_malformed_message_is_named(messages, words, chat_tok):
    with pytest.raises(UserError, match=words):
        chat_tok.render(messages, "chatml")


def test_missing_control_tokens_and_templates_are_named(tok):
    with pytest.raises(UserError, match=r"<\|im_start\|>, <\|im_end\|>.*chatml"):
        tok.render(CHAT, "chatml")
    with pytest.raises(UserError, match="no chat template.*--template=chatml"):
        tok.render(CHAT)


# --- the script -----------------------------------------------------------------------------

def script(*argv: str, stdin: bytes = b"", **env: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(ROOT / "tokenizer.py"), *argv], input=stdin,
                          capture_output=True, timeout=60, env={**os.environ, **env})


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    """A tokenizer trained by the command line, on two files."""
    path = tmp_path_factory.mktemp("script")
    (path / "a.txt").write_text(ENGLISH * 3, encoding="utf-8")
    (path / "b.txt").write_text(MIXED, encoding="utf-8")
    done = script("train", str(path / "a.txt"), str(path / "b.txt"), "--vocab_size=400",
                  f"--out={path / 'tok'}")
    assert done.returncode == 0 and done.stdout == b"", done.stderr
    return path


def test_train_encode_decode_on_the_command_line(folder):
    where = f"--tokenizer={folder / 'tok'}"
    tok = T.load(folder / "tok")
    assert tok.vocab_size == 400
    assert list(tok.ranks) == list(T.train([ENGLISH * 3, MIXED], 400).ranks)
    text = ENGLISH + MIXED
    (folder / "text").write_text(text, encoding="utf-8", newline="")
    ids = script("encode", "--file", str(folder / "text"), where).stdout
    assert list(map(int, ids.split())) == tok.encode(text)
    assert script("encode", where, stdin=text.encode()).stdout == ids
    assert script("decode", where, stdin=ids).stdout.decode() == text
    assert script("encode", "The", "fox", where).stdout.split() == [
        b"%d" % i for i in tok.encode("The fox")]
    both = script("encode", "a<|endoftext|>", where, "--allow_special").stdout.split()
    assert int(both[-1]) == tok.eot


def test_show_in_colour_and_without(folder):
    where = f"--tokenizer={folder / 'tok'}"
    tok = T.load(folder / "tok")
    text = "The fox\x1b[2J é\n中"
    plain = script("show", where, stdin=text.encode()).stdout
    assert plain == script("show", where, "--color=0", stdin=text.encode()).stdout
    assert plain.count(b"|") == len(tok.encode(text)) - 1 and b"\x1b" not in plain
    colour = script("show", where, "--color=1", stdin=text.encode()).stdout.decode()
    assert colour.count("\x1b[30;") == len(tok.encode(text)) + 1    # the newline paints anew
    assert "\x1b[2J" not in colour                                   # a terminal obeys no text
    if sys.platform == "linux":     # on a terminal: colours, unless NO_COLOR asks for none
        import pty
        for no_color, expected in (("", True), ("1", False)):
            main, side = pty.openpty()
            subprocess.run([sys.executable, str(ROOT / "tokenizer.py"), "show", "The fox", where],
                           stdout=side, stderr=subprocess.DEVNULL, timeout=60,
                           env={**os.environ, "NO_COLOR": no_color})
            assert (b"\x1b[30;" in os.read(main, 10_000)) == expected
            os.close(main), os.close(side)


def test_character_mode_on_the_command_line(folder):
    done = script("train", str(folder / "a.txt"), "--chars", f"--out={folder / 'chars'}")
    assert done.returncode == 0, done.stderr
    assert T.load(folder / "chars").vocab_size == len(set(ENGLISH))
    assert script("encode", "Ж", f"--tokenizer={folder / 'chars'}").returncode == 2


@pytest.mark.parametrize("argv, stdin, words", [
    (["train", "missing.txt", "--out=o"], b"", "no file missing.txt"),
    (["train", "empty.txt", "--out=o"], b"", "no text"),
    (["train", "latin1.txt", "--out=o"], b"", "latin1.txt is not UTF-8"),
    (["train", "small.txt", "--out=o"], b"", "--vocab_size="),
    (["train", "small.txt", "--vocab_size=258", "--out=small.txt"], b"", "is a file"),
    (["train", "small.txt"], b"", "--out=DIR"),
    (["train", ".", "--out=o"], b"", "no file"),
    (["encode", "x"], b"", "no tokenizer at"),
    (["encode", "--tokenizer=tok"], b"\xff", "not UTF-8"),
    (["decode", "99999", "--tokenizer=tok"], b"", "99999"),
    (["decode", "x1", "--tokenizer=tok"], b"", "x1"),
    (["decode", "9" * 5000, "--tokenizer=tok"], b"", "99"),
    (["enocde", "x"], b"", "enocde"),
    ([], b"", "train, encode, decode or show"),
    (["encode", "--vocab=3"], b"", "vocab_size"),
])
def test_mistakes_are_one_sentence_and_status_2(argv, stdin, words, tok, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tok.save("tok")
    Path("empty.txt").touch()
    Path("small.txt").write_text("too little, too little")
    Path("latin1.txt").write_bytes(ENGLISH.encode() * 99 + "é".encode("latin-1"))
    done = script(*argv, stdin=stdin)
    error = done.stderr.decode().strip().split("\r")[-1].split("\n")
    assert done.returncode == 2 and done.stdout == b"", done
    assert error[-1].startswith("error: ") and words in error[-1] and "Traceback" not in error[0]
    assert not Path("o").exists()


def test_a_long_file_is_read_in_parts_that_change_no_chunk(tmp_path):
    path = tmp_path / "long.txt"
    path.write_text((CODE + MIXED) * 5, encoding="utf-8", newline="")
    parts = list(T.file_texts([path], size=5000))
    assert len(parts) > 10 and "".join(parts) == (CODE + MIXED) * 5
    cut = bpe.count_chunks(parts, bpe.PATTERNS["gpt2"], workers=1)
    assert cut == bpe.count_chunks([(CODE + MIXED) * 5], bpe.PATTERNS["gpt2"], workers=1)


def test_bench_prints_both_sides_and_ends_with_json(tmp_path):
    (tmp_path / "text").write_text(CODE * 3 + MIXED, encoding="utf-8")
    done = subprocess.run([sys.executable, str(ROOT / "bench.py"), "tokenizer", "--repeat=2",
                           "--vocab_size=500", f"--text={tmp_path / 'text'}"],
                          capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert {"ours", "tokenizers"} <= set(result["train"])
    assert {"by hand", "fast", "tiktoken"} <= set(result["encode"])
    assert all(r["min"] <= r["median"] <= r["max"] for r in result["encode"].values())
    done = subprocess.run([sys.executable, str(ROOT / "bench.py"), "tokeniser"],
                          capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "tokenizer" in done.stderr
