#!/usr/bin/env bash
# transformers 5.24: a config.json of version 5 keeps its RoPE base inside rope_parameters. Whoever
# adds the older rope_scaling to stretch the context would expect the base to stay. It does not:
# rope_scaling replaces the whole of rope_parameters, and the base becomes the default of 10,000.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q transformers==5.24.0
"$work/venv/bin/python" - <<'PY' 2>/dev/null
import sys

import transformers
from transformers import LlamaConfig

base = {"rope_type": "default", "rope_theta": 500000.0}
scaling = {"rope_type": "linear", "factor": 4.0}
# copies: the configuration writes into the dictionaries it is given
seen = LlamaConfig(rope_parameters=dict(base), rope_scaling=dict(scaling)).rope_parameters
top = LlamaConfig(rope_parameters=dict(base), rope_scaling=dict(scaling),
                  rope_theta=1e6).rope_parameters
print("transformers", transformers.__version__)
print("expected: linear, factor 4, rope_theta 500000")
print("seen:    ", seen)
print("with rope_theta 1000000 at the top level:", top)
sys.exit(not (seen["rope_theta"] == 10000.0 and seen["rope_type"] == "linear"
              and top["rope_theta"] == 1e6))
PY
