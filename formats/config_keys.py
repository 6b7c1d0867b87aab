"""Which keys of a config.json may be passed over, and why: all others are read or refused.

A key that nobody reads is the most silent way to compute another model: a window, a scale, a norm
that the authors' program has and this one has not. So the rule is an allow-list. A family names
the keys that it reads (families.py); this file has those that change no logit, in groups, and
those that are harmless with one value; what is left is a sentence that names the key. null and an
empty list or object say nothing. Checked against transformers by tests/formats/test_config_keys.py,
which
edits every key of every family.
"""
from __future__ import annotations

import re
from typing import Any, Iterable

from config import UserError
from formats.safetensors import shorten

# Groups of regular expressions; each says why it changes no logit
HARMLESS = re.compile("|".join((
    # who wrote the file, and with what
    r"model_type|architectures|auto_map|(_?name|model)_or_path|transformers(_version|\.js_config)",
    r"unsloth\w*|task_specific_params|custom_pipelines|finetuning_task|is_llama_config|handmade",
    r"_(?!rope|sliding_window$)\w*|tokenizer_class|language|license|model_max_length",
    r"max_seq_len(gth)?|max_sequence_length|seq_length|predict_special_tokens|output_past",
    # the type of the weights, which the files say themselves, and how they are computed with
    r"(torch_)?dtype|use_bfloat16|torchscript|tf_legacy_loss|(use_)?flash_attn\w*",
    r"use_cache|cache_implementation|gradient_checkpointing|pretraining_tp|tensor_parallel\w*",
    r"attn_implementation|experts_implementation|chunk_size_feed_forward",
    # training alone: noise and the start of the weights
    r"\w*dropout\w*|\w+_pdrop|initializer\w*|neftune_noise_alpha",
    r"output_router_logits|router_aux_loss_coef|router_z_loss_coef",
    # what else a forward returns, and heads of other tasks
    r"output_(attentions|hidden_states)|(use_)?return_dict|num_labels|id2label|label2id",
    r"problem_type|summary_\w+|is_decoder",
    # numbers of control tokens
    r"\w+_token_(ids?|index)|(bos|eos|pad|unk)_token",
    # how text is generated: the settings that transformers moves to generation_config.json
    r"(assistant|bad_words|begin_suppress|diversity|early_stopping|encoder_no_repeat)\w*",
    r"(encoder_repetition|epsilon|eta|exponential_decay|forced|length_penalty|suppress)\w*",
    r"(no_repeat|num_assistant|num_beam|num_return|remove_invalid|repetition|target_lookbehind)\w*",
    r"do_sample|(max|min)_(new_tokens|length)|output_scores|return_dict_in_generate|temperature",
    r"top_[kp]|typical_p|min_p|prefix",
)))
# Keys of other families, and the one value with which each says what is so anyway
INERT: dict[str, Any] = {
    "attention_bias": False, "mlp_bias": False, "qkv_bias": False, "use_bias": False,
    "is_encoder_decoder": False, "add_cross_attention": False, "tie_encoder_decoder": False,
    "is_causal": True, "rope_interleaved": False, "use_mrope": False, "alibi": False,
    "use_qk_norm": False, "qk_layernorm": False, "use_bidirectional_attention": False,
    "use_sliding_window": False, "embedding_multiplier": 1, "residual_multiplier": 1,
    "logits_scaling": 1, "router_jitter_noise": 0, "num_experts": 0, "n_shared_experts": 0,
    "quantization_bit": 0,
}


def check_keys(hf: dict[str, Any], known: Iterable[str], kind: str, where: str) -> None:
    """Refuse the first key of a config.json that is neither known nor harmless; UserError.

    known: the keys that are read. kind: the model_type, for the sentence.
    """
    known = set(known)
    for key, value in hf.items():
        if key in known or value is None or value == [] or value == {}:
            continue
        # type() as well: True is 1 to Python
        same = key in INERT and INERT[key] == value and (
            isinstance(value, bool) == isinstance(INERT[key], bool))
        if not same and not HARMLESS.fullmatch(key):
            raise UserError(f"{where}: the setting {shorten(key)} = {shorten(value)} is not "
                            f"supported in a {kind} model, and it may change what the model "
                            "computes: delete it if it does not")
