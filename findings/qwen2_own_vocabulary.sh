#!/usr/bin/env bash
# transformers 5.24 and tokenizers 0.23: a folder whose tokenizer.json splits text by GPT-2's
# pattern, with tokenizer_class PreTrainedTokenizerFast, gives its own ids for every model type
# tried but qwen2: there AutoTokenizer builds a Qwen2Tokenizer from the vocabulary and merges, with
# Qwen's pattern (one digit a token) and NFC. Text with numbers gets other ids, without a word.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q transformers==5.24.0 tokenizers==0.23.3
"$work/venv/bin/python" - <<'PY' 2>/dev/null
import json
import pathlib
import sys
import tempfile

import tokenizers
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
made = Tokenizer(models.BPE())
made.pre_tokenizer = byte_level
made.decoder = decoders.ByteLevel()
made.train_from_iterator(
    ["in 1234 and 5678 it was 1234, 5678"] * 50,
    trainers.BpeTrainer(vocab_size=300, initial_alphabet=byte_level.alphabet(),
                        show_progress=False))
want = made.encode("in 1234 and 5678").ids
print("transformers", transformers.__version__, "tokenizers", tokenizers.__version__)
print("expected for every type:", want)
other = []
for kind in ("llama", "qwen3", "gpt2", "olmo2", "qwen2"):
    folder = pathlib.Path(tempfile.mkdtemp())
    made.save(str(folder / "tokenizer.json"))
    settings = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
    (folder / "tokenizer_config.json").write_text(settings)
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    opened = AutoTokenizer.from_pretrained(folder)
    ids = opened("in 1234 and 5678", add_special_tokens=False).input_ids
    print(f"{kind:6}", type(opened).__name__, ids)
    other += [kind] * (ids != want)
sys.exit(other != ["qwen2"])
PY
