"""python bench.py stages: full fine-tuning, LoRA and DPO beside trl and peft.

    python bench.py stages --model=DIR --repeat=2               # CPU; some minutes on two cores
    python bench.py stages --model=DIR --only=sft+lora          # two of sft, lora, dpo
    python bench.py stages --model=DIR --only=sft+lora+tuned    # theirs with better settings too

Every measurement is a process of its own: it loads the model, trains for a few steps and ends; no
checkpoint is written. tokens/s counts the tokens of the conversations, without padding, from the
end of the first step to the end of the last. CPU tokens/s divides by the CPU seconds of all cores
instead, which a busy machine disturbs less. Peak GB is the largest resident set of the process,
with its libraries and while loading. Ours and theirs alternate.

Both train on the same conversations, about as many per step, with the loss on the answers alone
and AdamW, multiply in bfloat16 where the CPU can, and hold trained weights in float32. Everything
else is the default. Ours packs conversations into rows and keeps activations; "lean" is
ours with --checkpointing=1. Theirs pads a batch to its longest conversation and recomputes
activations (gradient_checkpointing=True); DPO's reference is a second model. "tuned" is theirs
packed where it can be, with activations kept and the reference's log-probs computed before. In
ours what those cost counts in proportion to the pairs used.
"""
from __future__ import annotations

import importlib.util
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from config import UserError, configure, run

import torch

import dpo
import sft
import train
from benchmarks.common import ROOT, Results
from data import chats
from training.machine import memory_used

STAGES = ("sft", "lora", "dpo")
STEPS = 3                       # per process; the first warms up
CONVERSATIONS = 16              # per step of theirs; in DPO they are 8 pairs
BLOCK = 1024                    # tokens of our row, one per step: about CONVERSATIONS of them
RANK = 8                        # of LoRA, on all linears, alpha twice that


@dataclass
class Child:
    words: list[str] = field(default_factory=list)      # WHO STAGE
    model: str = ""             # folder of the checkpoint
    dataset: str = ""           # file of conversations or of pairs
    threads: int = 0            # 0: as many as PyTorch takes


class Clock:
    """Tokens and time of each step."""

    def __init__(self):
        self.tokens: list[int] = []
        self.ends: list[tuple[float, float]] = []       # (seconds, CPU seconds)

    def end_step(self) -> None:
        self.ends.append((time.perf_counter(), time.process_time()))

    def compute_rates(self, extra: tuple[float, float] = (0.0, 0.0)) -> dict[str, float]:
        """Return tokens/s; extra: (seconds, CPU seconds) per token spent before the steps."""
        tokens = sum(self.tokens[1:len(self.ends)])
        wall, cpu = (tokens / (last - first + tokens * more) for first, last, more in
                     zip(self.ends[0], self.ends[-1], extra))
        return {"tokens/s": wall, "CPU tokens/s": cpu}

# ------------------------------------------------------------------------------------- ours


def run_ours(cfg: Child, stage: str, folder: str, lean: bool) -> dict[str, float]:
    """Run sft.py or dpo.py as the command line does, timed from outside; return the rates."""
    clock = Clock()
    reference = Clock()
    module = dpo if stage == "dpo" else sft
    gather = chats.Packed.__call__
    step = train.take_step
    of_conversations = dpo.of_conversations

    def gather_counted(packed: Any, number: int) -> Any:
        rows = range(number * packed.batch_size, (number + 1) * packed.batch_size)
        clock.tokens += [sum(len(packed.conversations[i][0]) for row in rows for i in packed.rows[
            packed.epoch(row // len(packed))[row % len(packed)]])]
        return gather(packed, number)

    def take_timed_step(*args, **kwargs) -> Any:
        done = step(*args, **kwargs)
        clock.end_step()
        return done

    def time_reference(model: Any, packed: Any, *args, **kwargs) -> Any:
        reference.end_step()
        log_probs = of_conversations(model, packed, *args, **kwargs)
        reference.end_step()
        reference.tokens.append(packed.tokens)
        return log_probs
    chats.Packed.__call__ = gather_counted
    train.take_step = take_timed_step
    dpo.of_conversations = time_reference
    train.save = lambda *args: None
    module.main(configure(module.Config, [
        f"--init_from={cfg.model}", f"--dataset={cfg.dataset}", f"--out_dir={folder}/out",
        f"--block_size={BLOCK}", "--batch_size=1", f"--max_iters={STEPS}", "--eval_iters=0",
        f"--checkpointing={int(lean)}", "--device=cpu", *(
            [f"--lora_rank={RANK}"] if stage == "lora" else [])]))
    before = tuple((last - first) / sum(reference.tokens) for first, last in
                   zip(reference.ends[0], reference.ends[-1])) if reference.ends else (0.0, 0.0)
    return clock.compute_rates(before)

# ----------------------------------------------------------------------------------- theirs


def run_theirs(cfg: Child, stage: str, folder: str, tuned: bool) -> dict[str, float]:
    """Run trl's trainer with its defaults, but for the batch and the number of steps."""
    import transformers
    import trl
    from datasets import Dataset
    clock = Clock()

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs) -> None:
            clock.end_step()

    text = Path(cfg.dataset).read_text(encoding="utf-8")
    records = [json.loads(line) for line in text.splitlines()]
    how: dict[str, Any] = dict(
        output_dir=f"{folder}/out", use_cpu=True, report_to="none", save_strategy="no",
        disable_tqdm=True, max_steps=STEPS,
        per_device_train_batch_size=CONVERSATIONS // (2 if stage == "dpo" else 1))
    more: dict[str, Any] = dict(callbacks=[Watch()])
    if tuned:
        how.update(gradient_checkpointing=False)
        how.update(dict(precompute_ref_log_probs=True) if stage == "dpo" else
                   dict(packing=True, max_length=BLOCK, per_device_train_batch_size=1))
    if stage == "lora":
        from peft import LoraConfig
        more["peft_config"] = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    if stage != "dpo":
        # prompt and completion: the layout in which trl trains on the answers alone
        records = [{"prompt": r["messages"][:-1], "completion": r["messages"][-1:]}
                   for r in records]
    trainer_class = trl.DPOTrainer if stage == "dpo" else trl.SFTTrainer
    settings = trl.DPOConfig if stage == "dpo" else trl.SFTConfig
    start = (time.perf_counter(), time.process_time())
    trainer = trainer_class(cfg.model, args=settings(**how),
                            train_dataset=Dataset.from_list(records), **more)
    loaded = (time.perf_counter(), time.process_time())
    step = trainer.training_step

    def count_and_step(model: Any, inputs: Any, *args, **kwargs) -> Any:
        # a packed batch has no padding, and no mask either
        clock.tokens.append(int(inputs.get("attention_mask", inputs["input_ids"] >= 0).sum()))
        return step(model, inputs, *args, **kwargs)
    trainer.training_step = count_and_step
    trainer.train()
    if tuned and stage == "dpo":
        # as in ours: the share of the pairs that were used
        each = sum(clock.tokens) / STEPS / (CONVERSATIONS // 2) * len(records)
        return clock.compute_rates(tuple((b - a) / each for a, b in zip(start, loaded)))
    return clock.compute_rates()

# ---------------------------------------------------------------------------- one measurement


def main(cfg: Child) -> None:
    """Run python -m benchmarks.stages WHO STAGE: the numbers are JSON on the last line."""
    who, stage = cfg.words
    torch.set_num_threads(cfg.threads or torch.get_num_threads())
    with tempfile.TemporaryDirectory() as folder:
        if who in ("ours", "lean"):
            result = run_ours(cfg, stage, folder, who == "lean")
        else:
            result = run_theirs(cfg, stage, folder, who == "tuned")
    result["peak GB"] = memory_used(torch.device("cpu")) or math.nan
    print(json.dumps(result))


def measure(who: str, stage: str, model: str, dataset: Path) -> dict[str, float]:
    """Return the numbers of one process; UserError with its last line if it fails."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1",
                   "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.stages", who, stage, f"--model={model}",
         f"--dataset={dataset}"], text=True, capture_output=True, env=environment)
    if done.returncode:
        last = (done.stderr.strip() or "nothing").splitlines()[-1]
        raise UserError(f"{who} {stage} ended with status {done.returncode}: {last}")
    return json.loads(done.stdout.strip().splitlines()[-1])

# -------------------------------------------------------------------------------- the section


def write_data(dataset: str, folder: Path) -> dict[str, Path]:
    """Write a file for each stage: single-turn conversations; pairs of their answer and another's.
    """
    rng = random.Random(1)
    count = CONVERSATIONS * (STEPS + 2)
    records = [r["messages"] for r in chats.splits(dataset)[0] if len(r["messages"]) == 2]
    if len(records) < count:
        raise UserError(f"{dataset} has {len(records)} conversations of one question and its "
                        f"answer, and {count} are needed: try --dataset=stdlib_chat")
    sample = rng.sample(records, count)
    rows = {"sft": [{"messages": m} for m in sample],
            "dpo": [{"prompt": m[:1], "chosen": m[1:], "rejected": other[1:]}
                    for m, other in zip(sample, sample[1:]) if m[1:] != other[1:]]}
    files = {name: folder / f"{name}.jsonl" for name in rows}
    for name, file in files.items():
        file.write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
    return {**files, "lora": files["sft"]}


def run_section(cfg: Any) -> dict[str, Any]:
    """Time one process per contender and stage in each round, and print the paired ratios."""
    wanted = [word for word in cfg.only.split("+") if word] or list(STAGES)
    if unknown := [word for word in wanted if word not in (*STAGES, "tuned")]:
        raise UserError(f"unknown --only={unknown[0]}; choose from {', '.join(STAGES)}, tuned")
    if not cfg.model:
        raise UserError("expected a model to train; give --model=DIR, e.g. SmolLM2-135M-Instruct")
    ours = ["ours", "lean"]
    theirs = ["trl", *(["tuned"] if "tuned" in wanted else [])]
    missing = [name for name in ("trl", "peft") if not importlib.util.find_spec(name)]
    if missing:
        print(f"{' and '.join(missing)} not installed: left out")
        theirs = []
    stages = [s for s in STAGES if s in wanted] or list(STAGES)
    results = Results()
    with tempfile.TemporaryDirectory() as folder:
        files = write_data(cfg.dataset, Path(folder))
        for k in range(cfg.repeat):
            with results.round():
                for stage in stages:
                    for who in ours + theirs:
                        print(f"\rround {k + 1}/{cfg.repeat}: {stage}, {who:<20}", end="",
                              file=sys.stderr, flush=True)
                        for name, value in measure(who, stage, cfg.model, files[stage]).items():
                            results.add(f"{stage}: {who}, {name}", value)
    print(f"\r{'':60}\r", end="", file=sys.stderr, flush=True)
    for stage in stages:
        for name in ("tokens/s", "CPU tokens/s", "peak GB"):
            for who in ours:
                for other in theirs:
                    results.compare(f"{stage}: {who} / {other}, {name}", f"{stage}: {who}, {name}",
                                    f"{stage}: {other}, {name}")
    return results.report()


if __name__ == "__main__":
    run(main, Child, positional=("words",))
