"""python bench.py stages: full fine-tuning, LoRA and DPO beside trl and peft, on this machine.

    python bench.py stages --model=DIR --repeat=2               # CPU; some minutes on two cores
    python bench.py stages --model=DIR --only=sft+lora          # some of sft, lora, dpo
    python bench.py stages --model=DIR --only=sft+lora+tuned    # theirs with better settings too

Every measurement is a process of its own: it loads the model, trains for a few steps and is thrown
away; no one writes a checkpoint. Tokens/s counts the tokens of the conversations, without padding,
from the end of the first step to the end of the last. CPU tokens/s divides by the seconds of all
cores instead, which a busy machine disturbs less. Peak GB is the most that the process ever had in
memory, with its libraries and while it loaded. Ours and theirs take turns.

Both train on the same conversations, about as many a step, with the loss on the answers alone and
AdamW, multiply in bfloat16 where the CPU can, and hold in float32 what trains. All else is what
a user gets who sets nothing. Ours packs conversations into rows and keeps activations; "lean" is
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

from bench import summary
from config import UserError, configure, run

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("sft", "lora", "dpo")
STEPS = 3                       # of a process; the first warms up
CONVERSATIONS = 16              # a step of theirs; in DPO they are 8 pairs
BLOCK = 1024                    # tokens of our row, one a step: what so many conversations have
RANK = 8                        # of LoRA, on all linears, alpha twice that


@dataclass
class Child:
    words: list[str] = field(default_factory=list)      # WHO STAGE
    model: str = ""             # folder of the checkpoint
    dataset: str = ""           # file of conversations or of pairs
    threads: int = 0            # 0: as many as PyTorch takes


class Clock:
    """Tokens and time of each step, from which rates are made."""

    def __init__(self):
        self.tokens: list[int] = []
        self.ends: list[tuple[float, float]] = []       # (seconds, CPU seconds)

    def end(self) -> None:
        self.ends.append((time.perf_counter(), time.process_time()))

    def rates(self, extra: tuple[float, float] = (0.0, 0.0)) -> dict[str, float]:
        """extra: (seconds, CPU seconds) of a token that were spent before the steps."""
        tokens = sum(self.tokens[1:len(self.ends)])
        wall, cpu = (tokens / (last - first + tokens * more) for first, last, more in
                     zip(self.ends[0], self.ends[-1], extra))
        return {"tokens/s": wall, "CPU tokens/s": cpu}

# ------------------------------------------------------------------------------------- ours


def ours(cfg: Child, stage: str, folder: str, lean: bool) -> dict[str, float]:
    """sft.py or dpo.py as the command line runs it, watched from outside."""
    import dpo
    import sft
    import train
    from data import chats
    clock, reference, module = Clock(), Clock(), dpo if stage == "dpo" else sft
    gather, step, of_conversations = chats.Packed.__call__, train.take_step, dpo.of_conversations

    def batch_of(packed: Any, number: int) -> Any:
        rows = range(number * packed.batch_size, (number + 1) * packed.batch_size)
        clock.tokens += [sum(len(packed.conversations[i][0]) for row in rows for i in packed.rows[
            packed.epoch(row // len(packed))[row % len(packed)]])]
        return gather(packed, number)

    def timed_step(*args, **kwargs) -> Any:
        done = step(*args, **kwargs)
        clock.end()
        return done

    def timed_reference(model: Any, packed: Any, *args, **kwargs) -> Any:
        reference.end()
        found = of_conversations(model, packed, *args, **kwargs)
        reference.end()
        reference.tokens.append(packed.tokens)
        return found
    chats.Packed.__call__, train.take_step = batch_of, timed_step
    dpo.of_conversations, train.save = timed_reference, lambda *args: None
    module.main(configure(module.Config, [
        f"--init_from={cfg.model}", f"--dataset={cfg.dataset}", f"--out_dir={folder}/out",
        f"--block_size={BLOCK}", "--batch_size=1", f"--max_iters={STEPS}", "--eval_iters=0",
        f"--checkpointing={int(lean)}", "--device=cpu", *(
            [f"--lora_rank={RANK}"] if stage == "lora" else [])]))
    before = tuple((last - first) / sum(reference.tokens) for first, last in
                   zip(reference.ends[0], reference.ends[-1])) if reference.ends else (0.0, 0.0)
    return clock.rates(before)

# ----------------------------------------------------------------------------------- theirs


def theirs(cfg: Child, stage: str, folder: str, tuned: bool) -> dict[str, float]:
    """trl's trainer with its defaults, but for the batch and the number of steps."""
    import transformers
    import trl
    from datasets import Dataset
    clock = Clock()

    class Watch(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs) -> None:
            clock.end()

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
    make, settings = (trl.DPOTrainer, trl.DPOConfig) if stage == "dpo" else (
        trl.SFTTrainer, trl.SFTConfig)
    start = time.perf_counter(), time.process_time()
    trainer = make(cfg.model, args=settings(**how), train_dataset=Dataset.from_list(records),
                   **more)
    made, step = (time.perf_counter(), time.process_time()), trainer.training_step

    def counted(model: Any, inputs: Any, *args, **kwargs) -> Any:
        # a packed batch has no padding, and no mask either
        clock.tokens.append(int(inputs.get("attention_mask", inputs["input_ids"] >= 0).sum()))
        return step(model, inputs, *args, **kwargs)
    trainer.training_step = counted
    trainer.train()
    if tuned and stage == "dpo":
        # as in ours: the share of the pairs that were used
        each = sum(clock.tokens) / STEPS / (CONVERSATIONS // 2) * len(records)
        return clock.rates(tuple((b - a) / each for a, b in zip(start, made)))
    return clock.rates()

# ---------------------------------------------------------------------------- one measurement


def child(cfg: Child) -> None:
    """python -m benchmarks.stages WHO STAGE: the numbers as JSON on the last line of stdout."""
    import torch
    from training.machine import memory_used
    who, stage = cfg.words
    torch.set_num_threads(cfg.threads or torch.get_num_threads())
    with tempfile.TemporaryDirectory() as folder:
        result = ours(cfg, stage, folder, who == "lean") if who in ("ours", "lean") else (
            theirs(cfg, stage, folder, who == "tuned"))
    result["peak GB"] = memory_used(torch.device("cpu")) or math.nan
    print(json.dumps(result))


def measure(who: str, stage: str, model: str, dataset: Path) -> dict[str, float]:
    """The numbers of a process of its own; UserError with its last words if it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.stages", who, stage, f"--model={model}", f"--dataset={dataset}"],
        text=True, capture_output=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})
    if done.returncode:
        said = (done.stderr.strip() or "nothing").splitlines()[-1]
        raise UserError(f"{who} {stage} ended with status {done.returncode} and said: {said}")
    return json.loads(done.stdout.strip().splitlines()[-1])

# -------------------------------------------------------------------------------- the section


def write_data(dataset: str, folder: Path) -> dict[str, Path]:
    """Stage -> a file for it: conversations of one question; pairs of their answer and another's.
    """
    from data import chats
    rng, count = random.Random(1), CONVERSATIONS * (STEPS + 2)
    records = [r["messages"] for r in chats.splits(dataset)[0] if len(r["messages"]) == 2]
    if len(records) < count:
        raise UserError(f"{dataset} has {len(records)} conversations of one question and its "
                        f"answer, and {count} are needed: try --dataset=stdlib_chat")
    some = rng.sample(records, count)
    rows = {"sft": [{"messages": m} for m in some],
            "dpo": [{"prompt": m[:1], "chosen": m[1:], "rejected": other[1:]}
                    for m, other in zip(some, some[1:]) if m[1:] != other[1:]]}
    files = {name: folder / f"{name}.jsonl" for name in rows}
    for name, file in files.items():
        file.write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
    return {**files, "lora": files["sft"]}


def section(cfg: Any) -> dict[str, Any]:
    """What bench.py calls: rounds of one process for each contender and stage, and their ratios."""
    asked = [word for word in cfg.only.split("+") if word] or list(STAGES)
    if odd := [word for word in asked if word not in (*STAGES, "tuned")]:
        raise UserError(f"--only={odd[0]} is none of {', '.join(STAGES)}, tuned")
    if not cfg.model:
        raise UserError("say which model to train: --model=DIR, SmolLM2-135M-Instruct, say")
    whom = ["ours", "lean", "trl", *(["tuned"] if "tuned" in asked else [])]
    missing = [name for name in ("trl", "peft") if not importlib.util.find_spec(name)]
    if missing:
        print(f"{' and '.join(missing)} not installed: ours alone is measured")
        whom = whom[:2]
    out: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        files = write_data(cfg.dataset, Path(folder))
        for k in range(cfg.repeat):
            for stage in [s for s in STAGES if s in asked] or STAGES:
                for who in whom:
                    print(f"\rround {k + 1}/{cfg.repeat}: {stage}, {who:<20}", end="",
                          file=sys.stderr, flush=True)
                    for name, value in measure(who, stage, cfg.model, files[stage]).items():
                        out.setdefault(f"{stage}: {who}, {name}", []).append(value)
    print(f"\r{'':60}\r", end="", file=sys.stderr, flush=True)
    # paired: each round's ours over the same round's theirs
    for name in list(out):
        for mine in (m for m in whom[:2] if f": {m}, " in name):
            for other in whom[2:]:
                out[name.replace(mine, f"{mine} / {other}")] = [
                    a / b for a, b in zip(out[name], out[name.replace(mine, other)])]
    summary(dict(sorted(out.items(), key=lambda item: STAGES.index(item[0].split(":")[0]))))
    return {"results": out}


if __name__ == "__main__":
    run(child, Child, positional=("words",))
