"""Which stored tensor is which parameter: names and shapes compared before a byte is read.

One model has several spellings on disk: with the prefix of its body or without, one tensor an
expert or all experts of a layer in two (as transformers 5 holds them in memory), a tied matrix
under either of its names or under both. All are read; a tensor that is missing, left over or of
another shape is one sentence that names it.
"""
from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from config import UserError
from families.base import Family
from formats.huggingface import Slot
from formats.safetensors import DTYPES, Stored, is_equal, note, shorten

# Buffers that older versions of transformers saved with the weights and nobody reads
IGNORED = re.compile(r"\.rotary_(pos_)?emb\.inv_freq$|\.attn\.(masked_)?bias$|^rope\.freqs$")
EMBEDDING = ("model.embed_tokens.weight",)
OUTPUT = ("lm_head.weight",)
# our stack of experts -> (transformers' tensor of all experts, first row, of an expert's; in I)
FUSED = {"gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1),
         "down_proj": ("down_proj", 0)}


def match(slots: dict[str, Slot], stored: dict[str, Stored], family: Family, directory: Path,
          more: range | tuple = ()) -> list[tuple[Slot, Stored]]:
    """Pair every tensor the model needs with its place on disk; UserError at any difference.

    more: numbers of layers behind the last one that are left out, with a note.
    """
    left = dict(stored)
    pairs: list[tuple[Slot, Stored]] = []
    fused: set[str] = set()                 # names of the tensors that hold all experts
    experts = Counter(slot.parts for slot in slots.values() if slot.expert is not None)
    tied = all(slot.parts != OUTPUT for slot in slots.values())
    for name, slot in slots.items():
        # a file of the bare body (AutoModel) has the names without their prefix
        found = left.pop(name, None) or left.pop(name.removeprefix(family.prefix), None)
        if found is None and tied and slot.parts == EMBEDDING:
            # safetensors' save_model keeps one name of a tied matrix: the first in the alphabet
            found = left.pop(OUTPUT[0], None)
        if found is None and slot.parts[0].endswith(".mlp.gate.weight"):
            ours = slot.parts[0]                        # transformers 5's name of Mixtral's router
            found = left.pop(ours, None) or left.pop(ours.removeprefix(family.prefix), None)
        if found is None and slot.expert is not None:
            whole, found = find_expert(stored, slot, experts[slot.parts], family)
            fused.add(whole)
        if found is None:
            raise UserError(f"the weights in {directory} lack tensor {name!r}, which its settings "
                            "ask for: they belong to different models, or a file is missing")
        if found.shape != slot.shape:
            raise UserError(f"tensor {name!r} in {found.file} is {found.shape}, the settings "
                            f"ask for {slot.shape}: they belong to different models")
        if found.dtype not in DTYPES:
            raise UserError(f"tensor {name!r} in {found.file} is {found.dtype}: only "
                            f"{', '.join(DTYPES)} are supported")
        pairs.append((slot, found))
    # a tied model's file may repeat the embedding as its output matrix
    output = left.pop(OUTPUT[0], None) or left.pop("output.weight", None)
    if output is not None:
        embedding = next(s for slot, s in pairs if slot.parts == EMBEDDING)
        if not is_equal(output, embedding):
            raise UserError(f"{directory}: config.json ties the output matrix to the embedding, "
                            "the weights differ: set tie_word_embeddings to false in it")
    # what is left over would be lost in silence: an adapter, a layer, a bias
    for name, s in left.items():
        layer = re.match(r"model\.layers\.(\d{1,6})\.", name)
        if layer and int(layer[1]) in more:
            note(f"layer {layer[1]} of {directory} predicts the token after next: it is left out")
        elif name not in fused and not IGNORED.search(name):
            raise UserError(f"tensor {shorten(name)} in {s.file} has no place in the model that "
                            "the settings describe: they belong to different models")
    return pairs


def find_expert(stored: dict[str, Stored], slot: Slot, experts: int,
                     family: Family) -> tuple[str, Stored | None]:
    """Find one expert's matrix in the tensor of all: (name of that tensor, its place or None).

    gate_up_proj (E, 2 I, H), the rows of gate first; down_proj (E, H, I).
    """
    stem, kind = slot.parts[0].rsplit(".", 1)
    name, half = FUSED[kind]
    whole = f"{stem}.{name}"
    whole = whole if whole in stored else whole.removeprefix(family.prefix)
    if whole not in stored:
        return whole, None
    rows, columns = slot.shapes[0]
    shape = (experts, rows * (2 if name == "gate_up_proj" else 1), columns)
    found = stored[whole]
    if found.shape != shape:
        raise UserError(f"tensor {whole!r} in {found.file} is {found.shape}, the settings ask for "
                        f"{shape}: they belong to different models")
    # of a type that no weight has, bytes of an element are unknown: match() refuses it
    one = found.take_rows(slot.expert, slot.expert + 1).drop_first()
    return whole, one.take_rows(half * rows, (half + 1) * rows)


def count_tensors(stored: dict[str, Stored]) -> int:
    """Count the tensors of a checkpoint, those of fused experts one by one."""
    return sum(s.shape[0] if len(s.shape) == 3 and s.end > s.start else 1
               for s in stored.values())
