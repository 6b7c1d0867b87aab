#!/usr/bin/env bash
# transformers 5.24: Exaone4Config(sliding_window=None), a model whose layers all see everything, as
# null means in every other configuration class with a window. Without layer_types it raises
# ZeroDivisionError (the pattern becomes 0 and is a divisor); and sliding_window=0 makes three of four
# layers "sliding_attention". What works is layer_types written out.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy transformers==5.24.0
"$work/venv/bin/python" - <<'PY'
import sys

import transformers
from transformers import Exaone4Config, Qwen3Config

print("transformers", transformers.__version__)
print("expected, as of Qwen3Config:", set(Qwen3Config(sliding_window=None).layer_types))
try:
    seen = set(Exaone4Config(sliding_window=None).layer_types)
except ZeroDivisionError as e:
    seen = f"ZeroDivisionError: {e}"
zero = Exaone4Config(sliding_window=0).layer_types[:4]
told = set(Exaone4Config(sliding_window=None, layer_types=["full_attention"] * 32).layer_types)
print("seen with null:", seen)
print("seen with 0, the first four layers:", zero)
print("seen with null and layer_types:", told)
sys.exit(not (str(seen).startswith("ZeroDivisionError")
              and zero == ["sliding_attention"] * 3 + ["full_attention"]
              and told == {"full_attention"}))
PY
