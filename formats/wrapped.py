"""Text models inside of one that also sees: Gemma 3 of 4B and more, Mistral Small 3.1 and later.

Their config.json holds a text model's settings under text_config, and their files hold its tensors
under names of their own beside a vision part. The text model is read as if it had been published
alone, and saved so. Sources: transformers' Gemma3Config and Mistral3Config, and the "llava" row of
its conversion_mapping.py.
"""
from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from config import UserError
from families import FAMILIES, WRAPPERS
from formats.config_keys import check_keys
from formats.huggingface import family_named
from formats.safetensors import Stored, note, shorten

# Keys of the whole that change nothing in the text model, or are read; others are refused
OUTER_KEYS = ("text_config", "vision_config", "tie_word_embeddings", "quantization_config",
              "mm_tokens_per_image", "projector_hidden_act", "vision_feature_layer",
              "multimodal_projector_bias", "spatial_merge_size")
# Of these the whole's word counts, where it has one
OUTER_COUNTS = ("bos_token_id", "eos_token_id", "pad_token_id", "quantization_config")
VISION = re.compile(r"(?:model\.)?(vision_tower|multi_modal_projector)\.")
# as published -> as the text model alone has it; then as transformers 5 has it in memory
TEXT = ((re.compile(r"language_model\.(model|lm_head)\."), r"\1."),
        (re.compile(r"model\.language_model\."), "model."))


def unwrap_settings(hf: dict[str, Any], where: str) -> tuple[dict[str, Any], bool]:
    """Return (the settings of the text model, whether they were wrapped) of a config.json."""
    kind = hf.get("model_type")
    if not isinstance(kind, str) or kind not in WRAPPERS:
        return hf, False
    text = hf.get("text_config")
    if not isinstance(text, dict):
        raise UserError(f"{where}: expected the text model's settings as the text_config of a "
                        f"{kind} model, got {shorten(text)}")
    check_keys(hf, OUTER_KEYS, kind, where)
    text = dict(text)
    if text.get("model_type") is None:
        text["model_type"] = WRAPPERS[kind]
    inner = text["model_type"]
    if FAMILIES[WRAPPERS[kind]].name and inner != WRAPPERS[kind]:   # its class takes no other
        raise UserError(f"{where}: expected {WRAPPERS[kind]} as the text model of a {kind} model, "
                        f"got {shorten(inner)}")
    # of the wrapped model transformers does not apply it: the text model alone has it
    if inner == WRAPPERS[kind] and text.get("final_logit_softcapping"):
        raise UserError(f"{where}, text_config: final_logit_softcapping = "
                        f"{shorten(text['final_logit_softcapping'])} is not supported in a {kind} "
                        "model, where transformers does not apply it")
    if not family_named(text, f"{where}, text_config").writable:    # files of another kind
        raise UserError(f"{where}: a text model of the type {shorten(inner)} is not supported in "
                        f"a {kind} model")
    text |= {key: hf[key] for key in OUTER_COUNTS if hf.get(key) is not None}
    # the outer word counts; without one, and with true, the weights say whether they are tied
    text["tie_word_embeddings"] = False if hf.get("tie_word_embeddings") is False else None
    return text, True


def take_text_tensors(stored: dict[str, Stored], directory: Path) -> dict[str, Stored]:
    """Return the text model's tensors under the names that they have where it stands alone."""
    found: dict[str, Stored] = {}
    left_out: Counter[str] = Counter()
    for name, s in stored.items():
        if vision := VISION.match(name):
            left_out[vision[1]] += 1
            continue
        short = name
        for pattern, replacement in TEXT:
            if pattern.match(name):
                short = pattern.sub(replacement, name, count=1)
                break
        if short in found:
            raise UserError(f"{directory} holds tensor {shorten(short)} under two names: the files "
                            "belong to different models")
        found[short] = s
    if left_out:
        parts = ", ".join(f"{part}: {count:,} tensors" for part, count in left_out.items())
        note(f"the vision part of {directory} is left out ({parts}); its text model is read")
    return found
