"""LoRA: fine-tuning with a few thin matrices beside frozen weights (Hu 2021, arXiv:2106.09685).

    python lora.py --init_from=DIR --dataset=skills         # sft.py's data and loss, any machine
    torchrun --nproc_per_node=8 lora.py --init_from=DIR     # one node with eight GPUs
    python lora.py merge ADAPTER OUT                        # an adapter -> a plain checkpoint

    from layers import lora
    lora.add_lora(model, rank=8, alpha=16)                  # only the adapters train from here
    with lora.disable_adapters(model): ...                  # the base, as DPO's reference
    lora.activate(model, "mine")                            # several adapters, chosen by name
    lora.merge(model)                                       # a plain Transformer again
    formats.peft.save_adapter("mine", model)                # load_adapter("mine", model, "mine")

A linear layer y = W x + b becomes y = W x + b + s B A x, with A (r, K), B (N, r) and s = alpha / r.
W stays as it is; B starts at zero, so that the first step starts from the model that was there.

    rslora  s = alpha / sqrt(r): steps keep their size at high ranks (Kalajdzievski 2023)
    dora    W + s B A is scaled row by row to a length that is trained (Liu 2024)
    int8    the frozen W in a quarter of float32's memory, as in QLoRA (Dettmers 2023)

Adapters lie on disk as PEFT writes them (adapter_config.json, adapter_model.safetensors), so that
peft opens ours and theirs open here. What to expect: merged weights answer as the adapter does, to
1e-5 in float32, and gradients are peft's (tests/test_lora.py).
"""
from __future__ import annotations

import config  # noqa: F401  first, so that what fails while importing is a sentence
import contextlib
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import sft
from checkpoint import load_model, load_tokenizer, resolve, save_model
from config import UserError, run
from formats.peft import CONFIG, FOLDER, find_base, load_adapter
from layers.lora import describe, merge


@dataclass
class Config(sft.Config):
    lora_rank: int = 8              # of the adapters
    learning_rate: float = 2e-3     # of a small model; 2e-4 suits one of billions
    out_dir: str = "out/lora"


@dataclass
class Merge:
    words: list[str] = field(default_factory=list)      # merge ADAPTER OUT; ADAPTER: or a run
    base: str = ""              # the frozen model; empty: the adapter says where it was
    which: str = "best"         # of a run's checkpoints: best or last
    dtype: str = "auto"         # float32, bfloat16, float16; auto: the base's

def merge_files(cfg: Merge) -> None:
    """python lora.py merge ADAPTER OUT, where ADAPTER may be a run: its best checkpoint's."""
    if len(cfg.words) != 3:
        raise UserError("merge needs two folders: python lora.py merge ADAPTER OUT")
    _, source, target = cfg.words
    if not (Path(source) / CONFIG).is_file():           # the out_dir of a run, or a checkpoint
        with contextlib.suppress(UserError):
            source = resolve(source, cfg.which) / FOLDER
    base = find_base([Path(source)], cfg.base)
    if os.path.realpath(base) == os.path.realpath(target):     # a second merge would add it twice
        raise UserError(f"{target} is the base of {source}, which it belongs to from then on as "
                        "well: choose another folder for the merged model")
    model = load_model(base, "cpu", cfg.dtype)
    load_adapter(source, model)
    print(describe(model), file=sys.stderr)
    print(f"wrote {save_model(target, merge(model), load_tokenizer(base))}", file=sys.stderr)

if __name__ == "__main__":
    if sys.argv[1:2] == ["merge"]:
        run(merge_files, Merge, positional=("words",))
    else:
        run(sft.main, Config)
