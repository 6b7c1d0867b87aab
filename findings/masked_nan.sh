#!/usr/bin/env bash
# torch 2.13, CPU: scaled_dot_product_attention with is_causal. Row 0 may see key 0 alone, so a NaN
# in the value of the last key should reach the last row alone. It reaches all rows: the masked
# probability is an exact 0, and 0 * NaN is NaN. A cache with unwritten memory behind its end has to
# be zeroed, not only masked.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy
"$work/venv/bin/python" - <<'PY' 2>/dev/null
import sys

import torch
from torch.nn.functional import scaled_dot_product_attention

torch.manual_seed(0)
q, k, v = torch.randn(3, 1, 1, 4, 8)
v[..., 3, :] = float("nan")
mask = torch.ones(4, 4, dtype=torch.bool).tril()
seen = [scaled_dot_product_attention(q, k, v, is_causal=True),
        scaled_dot_product_attention(q, k, v, attn_mask=mask)]
nan_rows = [y[0, 0].isnan().any(-1).tolist() for y in seen]
print("torch", torch.__version__)
print("expected rows with NaN: [False, False, False, True]")
print("seen with is_causal:   ", nan_rows[0])
print("seen with attn_mask:   ", nan_rows[1])
sys.exit(nan_rows != [[True] * 4] * 2)
PY
