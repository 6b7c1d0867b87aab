#!/usr/bin/env bash
# tokenizers 0.23 and tiktoken 0.14: both call it byte-pair encoding. tokenizers merges a pair only
# if merges.txt lists that pair; tiktoken merges any neighbours whose concatenation has a rank. A
# vocabulary that reaches "abc" only through a + bc is cut differently once a + b comes first, so
# tokenizer.json cannot be turned into tiktoken's ranks without a look at its merges.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q tokenizers==0.23.3 tiktoken==0.14.0
"$work/venv/bin/python" - <<'PY'
import importlib.metadata
import sys

import tiktoken
import tokenizers
from tokenizers import Tokenizer, models

vocab = {"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4, "abc": 5}
merges = [("a", "b"), ("b", "c"), ("a", "bc")]
by_pair = Tokenizer(models.BPE(vocab=vocab, merges=merges)).encode("abc").ids
ranks = {token.encode(): rank for token, rank in vocab.items()}
by_rank = tiktoken.Encoding("finding", pat_str=r"\S+", mergeable_ranks=ranks,
                            special_tokens={}).encode_ordinary("abc")
print("tokenizers", tokenizers.__version__, "tiktoken", importlib.metadata.version("tiktoken"))
print("expected: the same ids from the same vocabulary")
print("tokenizers:", by_pair, "(ab, c)   tiktoken:", by_rank, "(abc)")
sys.exit(not (by_pair == [3, 2] and by_rank == [5]))
PY
