#!/usr/bin/env bash
# safetensors 0.8 and transformers 5.24: save_model() writes a shared tensor once. One would expect
# the embedding, which every tied model has and save_pretrained() keeps; it keeps lm_head.weight
# and leaves model.embed_tokens.weight out. A reader that asks for the embedding finds no such name.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 transformers==5.24.0 safetensors==0.8.0
"$work/venv/bin/python" - "$work" <<'PY' 2>/dev/null
import sys

import safetensors
import transformers
from safetensors import safe_open
from safetensors.torch import save_model
from transformers import LlamaConfig, LlamaForCausalLM

work = sys.argv[1]
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
    num_attention_heads=2, tie_word_embeddings=True))
save_model(model, work + "/one.safetensors")
model.save_pretrained(work + "/two")


def shared_names(path: str) -> list[str]:
    with safe_open(path, "pt") as file:
        return [name for name in file.keys() if "embed" in name or "lm_head" in name]


one = shared_names(work + "/one.safetensors")
two = shared_names(work + "/two/model.safetensors")
print("safetensors", safetensors.__version__, "transformers", transformers.__version__)
print("expected of both: ['model.embed_tokens.weight']")
print("save_model:", one, "  save_pretrained:", two)
sys.exit(not (one == ["lm_head.weight"] and two == ["model.embed_tokens.weight"]))
PY
