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
import tokenizer as T
from config import UserError
from tokenizer_base import (CHINESE, CODE, ENGLISH, MIXED, PUBLISHED, ROOT, RUNS, SPACE, TEXTS,     # noqa: F401
                            folder, random_texts, script, tok)


RANDOM = random_texts(300, seed=1)


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
