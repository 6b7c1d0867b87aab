"""Time our code beside the libraries that do the same, in one run on one machine.

    python bench.py tokenizer                   # CPU: training and encoding, about a minute
    python bench.py tokenizer --repeat=9        # more rounds, a steadier median
    python bench.py train --repeat=3 --nanogpt=../nanoGPT    # CPU: beside a clone of nanoGPT
    python bench.py sample --model=DIR          # CPU or GPU: beside transformers
    python bench.py kernels                     # CPU or GPU: every operation, each implementation
    python bench.py stages --model=DIR          # CPU: fine-tuning beside trl and peft
    python bench.py families                    # small models of each family, trained

Contenders alternate within a round; the table shows the median over rounds, the spread, and the
ratio to a baseline, which is what to compare between machines. The load of other processes is
measured before and during each round, and disturbed rounds are left out of the median. A library
that is not installed is left out. The last line of stdout is one JSON object with every number.
"""
from __future__ import annotations

import config  # noqa: F401  first, so that what fails while importing is a sentence
import json
from dataclasses import dataclass
from typing import Any, Callable

from benchmarks import generation, kernels, stages, tokenizer, training
from benchmarks.common import describe_machine
from config import UserError, run


@dataclass
class Config:
    section: str = ""           # what to time: a name in SECTIONS
    repeat: int = 5             # rounds; each runs every contender once
    vocab_size: int = 16384     # tokenizer: entries to learn
    text: str = ""              # tokenizer: a UTF-8 file instead of Python's standard library
    nanogpt: str = ""           # train: a clone of nanoGPT, its shakespeare_char prepared
    model: str = ""             # sample: a checkpoint; empty: SmolLM2-135M's shape, random weights
    dataset: str = "stdlib_chat"    # stages: conversations that sft.py could train on
    only: str = ""              # kernels: operations, stages: sft, lora, dpo; joined by +
    dtype: str = "bfloat16"     # kernels: of the activations


# A section takes the Config and returns what goes into the JSON line; it prints its own table.
SECTIONS: dict[str, Callable[[Config], dict[str, Any]]] = {
    "tokenizer": tokenizer.run_section,
    "train": training.run_section,
    "sample": generation.run_section,
    "families": training.run_families,
    "kernels": kernels.run_section,
    "stages": stages.run_section,
}


def main(cfg: Config) -> None:
    if cfg.section not in SECTIONS:
        raise UserError(f"expected a section, got {cfg.section!r}; "
                        f"choose: python bench.py {'|'.join(SECTIONS)}")
    if cfg.repeat < 1:
        raise UserError(f"--repeat must be at least 1, got {cfg.repeat}")
    result = SECTIONS[cfg.section](cfg)
    print(json.dumps({"section": cfg.section, "repeat": cfg.repeat, **describe_machine(),
                      **result}))


if __name__ == "__main__":
    run(main, Config, positional=("section",))
