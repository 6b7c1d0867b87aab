"""python bench.py sample: prompt and decode rates in each weight type, beside transformers.

    python bench.py sample --model=DIR          # CPU or GPU
    python bench.py sample                      # SmolLM2-135M's shape with random weights

Prompts are random ids; decoding is greedy. The time of a prompt is that of one new token, and the
decode rate is that of the tokens after it. GB/s of weights says how near decoding at batch 1 is to
the memory bandwidth, which bounds it. Perplexity and equal answers need a real model's tokenizer.
"""
from __future__ import annotations

import math
import pydoc_data.topics
import tempfile
import time
from pathlib import Path
from typing import Any

from config import refuse_to_run

import torch

import kernels
from benchmarks.common import Results
from checkpoint import load_model, load_tokenizer, save_model
from inference.generate import Sampling, generate
from inference.quantize import pack
from model import ModelConfig, Transformer

QUESTIONS = ("What is the capital of France?", "Write a short poem about the sea.",
             "Explain photosynthesis in simple words.", "What is 17 plus 25?",
             "Name three animals that live in Africa.", "How do I boil an egg?",
             "Translate 'good morning' into Spanish.", "Why is the sky blue?",
             "Write a Python function that adds two numbers.", "Tell me a story about a dragon.")
NEW = 100                       # new tokens of a timed sample
# name -> (dtype in which the weights are loaded, how they are packed)
TYPES = {"float32": ("float32", ""), "bfloat16": ("bfloat16", ""),
         "int8": ("bfloat16", "int8"), "int4": ("bfloat16", "int4")}


def compute_perplexity(model: Transformer, ids: list[int], width: int = 512) -> float:
    """Return exp of the mean loss of ids in rows of `width`, each token with its left context."""
    total = 0.0
    count = 0
    with torch.no_grad():
        for i in range(0, len(ids) - width, width):
            row = torch.tensor([ids[i:i + width + 1]], device=model.output_weight.device)
            logits = model(row[:, :-1]).float()                         # (1, T, V)
            total += float(kernels.cross_entropy(logits, row[:, 1:]))
            count += width
    return math.exp(total / count)


def load_theirs(folder: Path, device: torch.device) -> dict[str, Any]:
    """Return transformers' model of the same weights by dtype; {} where it is not installed."""
    try:
        from transformers import AutoModelForCausalLM
    except ImportError:
        print("transformers is not installed: left out")
        return {}
    return {name: AutoModelForCausalLM.from_pretrained(
                folder, dtype=getattr(torch, name)).to(device).eval()
            for name in ("float32", "bfloat16")}


def time_generation(model: Any, prompts: torch.Tensor, new: int) -> float:
    """Return the seconds that a model takes to continue prompts (B, T) by `new` tokens."""
    start = time.perf_counter()
    if isinstance(model, Transformer):
        steps = list(generate(model, prompts.tolist(), new, Sampling(temperature=0)))
        assert len(steps) == new
    else:
        ids = prompts.to(model.device)
        with torch.inference_mode():
            model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                           max_new_tokens=new, min_new_tokens=new, eos_token_id=None,
                           pad_token_id=0)
    return time.perf_counter() - start


def time_model(results: Results, name: str, model: Any, prompts: torch.Tensor,
               weight_bytes: float | None) -> None:
    """Note the rates of one contender: a prompt of 512, decoding at batch 1 and 8."""
    results.note(f"{name}: prompt of 512, tokens/s", 512 / time_generation(model, prompts[:1], 1))
    short = prompts[:, :16]
    for rows in (1, 8):
        prompt = time_generation(model, short[:rows], 1)
        seconds = time_generation(model, short[:rows], NEW) - prompt    # the decode steps alone
        results.note(f"{name}: batch {rows}, tokens/s", rows * (NEW - 1) / seconds)
        if rows == 1 and weight_bytes:
            results.note(f"{name}: batch 1, GB/s of weights",
                         weight_bytes * (NEW - 1) / seconds / 1e9)


def answer(model: Transformer, asked: list[int], tokenizer: Any) -> list[int]:
    """Return our greedy answer to a rendered question, 60 tokens at most."""
    steps = generate(model, [asked], 60, Sampling(temperature=0),
                     ends=lambda row, token: token in tokenizer.stop_ids)
    return [step[0] for step in steps]


def answer_theirs(model: Any, asked: list[int], tokenizer: Any) -> list[int]:
    """Return transformers' greedy answer to the same ids."""
    ids = torch.tensor([asked])
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                             max_new_tokens=60, eos_token_id=sorted(tokenizer.stop_ids),
                             pad_token_id=0)
    return out[0, len(asked):].tolist()


def count_equal_answers(ours: Transformer, theirs: Any, tokenizer: Any) -> int:
    """Return how many greedy answers in float32 are transformers', token for token."""
    equal = 0
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        asked = tokenizer.render(messages, add_generation_prompt=True)[0]
        equal += answer(ours, asked, tokenizer) == answer_theirs(theirs, asked, tokenizer)
    print(f"{equal} of {len(QUESTIONS)} greedy answers in float32 are transformers', "
          "token for token")
    return equal


def run_section(cfg: Any) -> dict[str, Any]:
    """Time prompt and decoding of a model in each type, beside transformers on its weights."""
    results = Results()
    ours = {}
    weight_bytes = {}
    with tempfile.TemporaryDirectory() as folder:
        where = Path(cfg.model or folder)
        if not cfg.model:
            save_model(where, Transformer(ModelConfig.from_preset("smollm2-135m")).bfloat16(), None)
        tokenizer = load_tokenizer(where) if cfg.model else None
        for name, (dtype, quantize) in TYPES.items():
            start = time.perf_counter()
            ours[name] = load_model(where, "auto", dtype)
            results.note(f"{name}: loaded, seconds", time.perf_counter() - start)
            weight_bytes[name] = pack(ours[name], quantize)
            results.note(f"{name}: loaded and packed, seconds", time.perf_counter() - start)
        theirs = load_theirs(where, ours["float32"].output_weight.device)
    vocab_size = ours["float32"].config.vocab_size
    prompts = torch.randint(0, vocab_size, (8, 512), generator=torch.Generator().manual_seed(0))
    contenders = [(f"ours {name}", model, weight_bytes[name]) for name, model in ours.items()]
    contenders += [(f"transformers {name}", model, None) for name, model in theirs.items()]
    for _, model, _ in contenders:
        time_generation(model, prompts[:1, :16], 8)         # warm caches, compile what there is
    for _ in range(cfg.repeat):
        with results.round():
            for name, model, size in contenders:
                time_model(results, name, model, prompts, size)
    facts: dict[str, Any] = {"bytes a step": weight_bytes}
    if tokenizer is not None:
        manual = "\n".join(pydoc_data.topics.topics.values())           # Python's own manual
        ids = tokenizer.encode_ordinary(manual)[:4097]
        for name, model in ours.items():
            results.note(f"ours {name}: perplexity of Python's manual",
                         compute_perplexity(model, ids))
        if theirs:
            facts["equal answers"] = count_equal_answers(ours["float32"], theirs["float32"],
                                                         tokenizer)
    for dtype in ("float32", "bfloat16"):
        for what in ("prompt of 512", "batch 1", "batch 8"):
            results.compare(f"{dtype}: {what}, ours / transformers",
                            f"ours {dtype}: {what}, tokens/s",
                            f"transformers {dtype}: {what}, tokens/s")
    for name in ours:
        results.compare(f"ours {name}: batch 8 / batch 1", f"ours {name}: batch 8, tokens/s",
                        f"ours {name}: batch 1, tokens/s")
    return {**results.report(), **facts}


if __name__ == "__main__":
    refuse_to_run()
