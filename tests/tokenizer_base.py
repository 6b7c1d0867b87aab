"""What the tests of this subject share: fixtures and oracles.
"""
import os
import random
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from text import bpe
import tokenizer as T

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


@pytest.fixture(scope="session")
def tok() -> T.Tokenizer:
    return T.train([ENGLISH * 3, CODE, CHINESE, MIXED, RUNS], 1500, workers=1)


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
