"""A classifier: a language model that reads a text and answers with one of its label tokens.

    get_label_ids(tokenizer)                            # {"ham": 900, "spam": 901}, {} for others
    predict_labels(model, tokenizer, texts, length)     # (texts, labels)

classify.py trains it, sample.py and eval.py apply it. Its head is the rows of the output
matrix that belong to the tokens `<|label:NAME|>`, read at the last token of the text, so that its
checkpoint is a language model like any other.
"""
from __future__ import annotations

from typing import Any, Iterator

from config import UserError

import torch
from torch import Tensor

from inference.generate import NOT_FINITE, prefill

LABEL = "<|label:{}|>"          # the control token of a label
CONTEXT = 1024                  # tokens of a text, for a checkpoint that does not say


def get_label_ids(tokenizer: Any) -> dict[str, int]:
    """Return label -> id of its token, in the order of the ids."""
    start, end = LABEL.split("{}")
    pairs = [(i, name) for name, i in tokenizer.special.items()
             if name.startswith(start) and name.endswith(end)]
    return {name[len(start):-len(end)]: i for i, name in sorted(pairs)}


def encode_text(tokenizer: Any, text: str) -> list[int]:
    """Return a text as ids, after the token that begins one; control tokens in it are text."""
    start = tokenizer.prefix or [tokenizer.eot or 0]        # what a document began with before
    return start + tokenizer.encode_ordinary(text)


def get_text_length(tokenizer: Any, config: Any) -> int:
    """Return how many tokens of a text were read in training: classify.py writes it to the
    tokenizer's model_max_length, where Hugging Face's text-classification pipeline reads it too."""
    length = tokenizer.settings.get("model_max_length")
    if not isinstance(length, int) or not 0 < length <= config.block_size:
        length = min(CONTEXT, config.block_size)
    return length


@torch.inference_mode()
def predict_labels(model: Any, tokenizer: Any, texts: list[str], length: int, batch_size: int = 32
                  ) -> Iterator[Tensor]:
    """Yield the labels' probabilities (labels,) of each text, cut to its first `length` tokens."""
    rows = list(get_label_ids(tokenizer).values())
    was_training = model.training
    model.eval()
    try:
        for first in range(0, len(texts), batch_size):
            batch = [encode_text(tokenizer, t)[:length] for t in texts[first:first + batch_size]]
            z = prefill(model, batch, max(map(len, batch)))[0][:, rows]
            if not torch.isfinite(z).all():
                raise UserError(NOT_FINITE)
            yield from z.softmax(-1).cpu()
    finally:
        model.train(was_training)


def format_report(labels: list[str], confusion: Tensor) -> str:
    """Return accuracy, and a row of counts for each true label, with a column for each answer."""
    right = confusion.trace().item()
    total = int(confusion.sum())
    wide = max(8, *(len(label) + 2 for label in labels))
    lines = [f"accuracy {right / max(1, total):.4f} ({int(right)} of {total})",
             "truth \\ answer".ljust(wide + 7) + "".join(label.rjust(wide) for label in labels)]
    for label, row in zip(labels, confusion.long().tolist()):
        lines.append(label.ljust(wide + 7) + "".join(f"{n:{wide}d}" for n in row))
    return "\n".join(lines)
