"""The files around a vocabulary: which there are, what they say, and how they are written.

tokenizer_config.json names the tokens with a role and has settings for transformers, most of which
mean nothing here: all are kept, so that a folder that is saved again says what it said before.
special_tokens_map.json and added_tokens.json are older ways to say parts of it. config.json and
generation_config.json name the ids that begin and end a text. Chat templates are in
tokenizer_config.json, or in files of their own. Older vocabularies are two tables instead of a
tokenizer.json; then tokenizer_class says how their text is cut. transformers' AutoTokenizer is the
oracle of the tests.
"""
from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Iterator

from config import UserError
from text.bpe import PATTERNS, mend, read_json, read_text
from text.added_tokens import flags_of
from text.tokenizer_json import list_added

ROLES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
END = "<|endoftext|>"
_GPT2 = {"bos_token": END, "eos_token": END, "unk_token": END}
_ROBERTA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>",
            "sep_token": "</s>", "cls_token": "<s>", "mask_token": "<mask>"}
# transformers' class -> the roles that it fills where the files are silent
CLASSES = {
    "GPT2Tokenizer": _GPT2, "CodeGenTokenizer": _GPT2,
    "GPTNeoXTokenizer": {**_GPT2, "pad_token": "<|padding|>"},
    "Qwen2Tokenizer": {"eos_token": END, "unk_token": END, "pad_token": END},
    "RobertaTokenizer": _ROBERTA, "BartTokenizer": _ROBERTA,
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "GemmaTokenizer": {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>",
                       "pad_token": "<pad>", "mask_token": "<mask>"},
    "CohereTokenizer": {"bos_token": "<BOS_TOKEN>", "eos_token": "<|END_OF_TURN_TOKEN|>",
                        "unk_token": "<UNK>", "pad_token": "<PAD>", "cls_token": "<CLS>",
                        "sep_token": "<SEP>", "mask_token": "<MASK_TOKEN>"},
}
# model_type -> the class that opens it where tokenizer_config.json names none
MODEL_CLASSES = {"gpt2": "GPT2Tokenizer", "gpt_neo": "GPT2Tokenizer", "gptj": "GPT2Tokenizer",
                 "opt": "GPT2Tokenizer", "phi": "GPT2Tokenizer", "codegen": "GPT2Tokenizer",
                 "gpt_neox": "GPTNeoXTokenizer", "olmo": "GPTNeoXTokenizer",
                 "qwen2": "Qwen2Tokenizer", "qwen2_moe": "Qwen2Tokenizer",
                 "qwen3": "Qwen2Tokenizer", "qwen3_moe": "Qwen2Tokenizer",
                 "roberta": "RobertaTokenizer", "cohere": "CohereTokenizer",
                 "gemma": "GemmaTokenizer", "gemma2": "GemmaTokenizer",
                 "gemma3_text": "GemmaTokenizer"}
# class -> (split pattern, Unicode form) of a vocabulary in two tables
TABLES = {"GPT2Tokenizer": ("gpt2", ""), "CodeGenTokenizer": ("gpt2", ""),
          "GPTNeoXTokenizer": ("gpt2", "NFC"), "Qwen2Tokenizer": ("qwen", "NFC"),
          "RobertaTokenizer": ("gpt2", ""), "BartTokenizer": ("gpt2", "")}
# Settings that are not written as they were read: they name files that we do not write, or are
# written anew
GONE = ("auto_map", "vocab_file", "merges_file", "tokenizer_file", "added_tokens_file",
        "special_tokens_map_file", "name_or_path", "tokenizer_class", "chat_template")
# Types for which transformers 5 reads a tokenizer by the rules of its own class, whatever the files
# say (MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS there, of those that we write): type -> its rules
FORCED = {"qwen2": (PATTERNS["qwen"], ("NFC",))}
FILES = re.compile(r"tokenizer.*|tokenization_\w+\.py|special_tokens_map\.json|vocab\.(json|bpe)"
                   r"|added_tokens\.json|merges\.txt|chat_template\.\w+|encoder\.json"
                   r"|additional_chat_templates")


@dataclass
class Facts:
    """What the files beside a vocabulary say of it."""
    settings: dict[str, Any] = field(default_factory=dict)      # tokenizer_config.json
    named: dict[str, str] = field(default_factory=dict)         # role -> token
    end_names: tuple[str, ...] = ()             # what any file calls eos_token
    ends: tuple[int, ...] = ()                  # ids that the model's files end at
    model_ids: dict[str, Any] = field(default_factory=dict)     # bos_token_id, … of config.json
    model_type: str = ""                        # of config.json
    model_class: str = ""                       # tokenizer_class of config.json
    generation: dict[str, Any] = field(default_factory=dict)    # generation_config.json
    jinjas: dict[str, str] = field(default_factory=dict)        # name -> chat template
    jinja_files: bool = False                   # whether they are files of their own
    listed: dict[str, int] = field(default_factory=dict)        # added_tokens.json
    more_special: tuple[str, ...] = ()          # control tokens without a role
    flags: dict[str, dict] = field(default_factory=dict)        # of tokens with a role

    @property
    def kind(self) -> str:
        """The class that opens the tokenizer in transformers, "" if nothing says so."""
        name = self.settings.get("tokenizer_class") or self.model_class or \
            MODEL_CLASSES.get(self.model_type, "")
        return str(name).removesuffix("Fast")

    def added_tokens(self) -> Iterator[tuple[str, dict]]:
        """Yield (name, flags) of the tokens that are listed outside the vocabulary, by id."""
        tokens = [(int(i), dict(t)) for i, t in
                  (self.settings.get("added_tokens_decoder") or {}).items()]
        if "added_tokens_decoder" not in self.settings:
            special = {*self.named.values(), *self.more_special}
            tokens = [(i, {"content": n, "special": n in special, "normalized": n not in special})
                      for n, i in self.listed.items()]
        for i, token in sorted(tokens, key=lambda item: item[0]):
            normalized = {"normalized": not token.get("special", False)}    # where it is not said
            yield text_of(token), flags_of({**normalized, **token}, i)


def text_of(token: Any) -> str:
    """Return the text of a token as a settings file writes it, a text or an object."""
    name = token.get("content") if isinstance(token, dict) else token
    if not isinstance(name, str) or not name:
        raise ValueError(f"{name!r:.40} is not the text of a token")
    return name


# --- reading --------------------------------------------------------------------------------

def find(path: Path) -> tuple[Path | None, Path | None, tuple[Path, Path] | None]:
    """Return (tokenizer.json, tokenizer.model, the two tables) of those that are there.

    path: a folder, or one of the first two by any name. Meta's folders of Llama 2 have
    tokenizer.model one folder up, beside those of the other sizes.
    """
    if not path.is_dir():
        there = path if path.exists() else None
        return (None, there, None) if path.suffix == ".model" else (there, None, None)
    whole = path / "tokenizer.json"
    model = path / "tokenizer.model"
    if (path / "params.json").is_file() and not model.exists():
        model = path.resolve().parent / "tokenizer.model"
    for names in (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")):
        tables = path / names[0], path / names[1]
        if all(table.exists() for table in tables):
            break
    else:
        tables = None
    return whole if whole.exists() else None, model if model.exists() else None, tables


def read_object(file: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object; {} if there is no such file."""
    if not file.exists():
        return {}
    value = read_json(file)
    if not isinstance(value, dict):
        raise UserError(f"{file} holds {type(value).__name__}, expected a JSON object")
    return value


def read_facts(path: Path) -> Facts:
    """Read what is next to a vocabulary: of a folder, or around a tokenizer.json or .model."""
    if not path.is_dir() and path.name != "tokenizer.json" and path.suffix != ".model":
        return Facts()
    folder = path if path.is_dir() else path.parent
    names = ("tokenizer_config", "special_tokens_map", "config", "generation_config",
             "added_tokens")
    settings, roles, network, generation, extra = (
        read_object(folder / f"{name}.json") for name in names)
    facts = Facts(settings, generation=generation, model_type=str(network.get("model_type", "")),
                  model_class=str(network.get("tokenizer_class") or ""))
    facts.listed = {text_of(name): i for name, i in extra.items() if type(i) is int}
    # as in transformers: a file that lists its tokens is of the newer kind, and complete
    order = (settings, roles) if "added_tokens_decoder" in settings else (roles, settings)
    for role in ROLES:
        said = next((part[role] for part in order if role in part), None)    # null counts too
        if said not in (None, ""):
            facts.named[role] = text_of(said)
            facts.flags[text_of(said)] = said if isinstance(said, dict) else {}
        elif role not in settings and role in CLASSES.get(facts.kind, {}):
            facts.named[role] = CLASSES[facts.kind][role]
    for part in order:
        for key in ("additional_special_tokens", "extra_special_tokens"):
            tokens = part.get(key) or []
            tokens = list(tokens.values()) if isinstance(tokens, dict) else tokens
            if not isinstance(tokens, list):
                raise ValueError(f"{key} is {tokens!r:.40}, expected a list of tokens")
            facts.more_special += tuple(map(text_of, tokens))
    facts.end_names = tuple(text_of(part["eos_token"]) for part in order
                            if part.get("eos_token") not in (None, ""))
    inner = network.get("text_config")
    network = {**(inner if isinstance(inner, dict) else {}),
               **{key: value for key, value in network.items() if value is not None}}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if ids := ids_of(network, key):
            several = isinstance(network[key], list) and key == "eos_token_id"
            facts.model_ids[key] = ids if several else ids[0]
    facts.ends = (*ids_of(generation, "eos_token_id"), *ids_of(network, "eos_token_id"))
    facts.jinjas, facts.jinja_files = read_templates(folder, settings)
    return facts


def ids_of(values: dict, key: str) -> list[int]:
    """Return the ids under a key: one, several or none; old files say -1 for none."""
    value = values.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(i) is int for i in ids):
        raise ValueError(f"{key} is {value!r:.40}, expected an id")
    return [i for i in ids if i >= 0]


def read_templates(folder: Path, settings: dict) -> tuple[dict[str, str], bool]:
    """Return the chat templates by name, and whether they are files; files win, as there."""
    main = folder / "chat_template.jinja"
    more = folder / "additional_chat_templates"
    found = {"default": read_text(main)} if main.exists() else {}
    if more.is_dir():
        found.update((file.stem, read_text(file)) for file in sorted(more.glob("*.jinja")))
    if found:
        return found, True
    value = settings.get("chat_template") or {}
    if isinstance(value, list):         # several, by name
        value = {t["name"]: t["template"] for t in value}
    found = value if isinstance(value, dict) else {"default": value}
    if not all(isinstance(t, str) for part in found.items() for t in part):
        raise ValueError("chat_template is not a text, nor texts with names")
    return found, False


def from_tables(vocab_file: Path, merges_file: Path, facts: Facts) -> dict[str, Any]:
    """Return a vocabulary in two tables -> the same as tokenizer.json, by the rules of its
    class."""
    kind = "" if merges_file.name == "vocab.bpe" else facts.kind
    if kind not in ("", *TABLES):
        raise ValueError(f"{kind!r:.60} says how its text is cut, and only {', '.join(TABLES)} are "
                         "known without a tokenizer.json: save it once with transformers")
    if facts.settings.get("add_prefix_space"):
        raise ValueError("byte-level BPE with a prefix space is not supported")
    vocab = read_json(vocab_file)
    lines = re.split("\r?\n", read_text(merges_file).removeprefix("\ufeff"))
    merges = [line for line in lines if line and not line.startswith("#version")]
    named = set(facts.named.values()) | ({END} if not kind else set())
    named |= set(facts.more_special)
    tokens = {name: {**token, "content": name} for name, token in facts.added_tokens()}
    for name in sorted(named & vocab.keys() - tokens.keys(), key=vocab.__getitem__):
        tokens[name] = {**facts.flags.get(name, {}), "content": name, "special": True}
    pattern, form = TABLES[kind or "GPT2Tokenizer"]
    post = None
    if CLASSES.get(kind) is _ROBERTA:
        post = {"type": "RobertaProcessing", "add_prefix_space": False, "trim_offsets": True,
                "sep": ["</s>", vocab["</s>"]], "cls": ["<s>", vocab["<s>"]]}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
                  "use_regex": pattern == "gpt2"}
    cut = {"type": "Split", "pattern": {"Regex": PATTERNS[pattern]}, "behavior": "Isolated",
           "invert": False}
    return {"model": {"type": "BPE", "vocab": vocab, "merges": merges},
            "added_tokens": list(tokens.values()), "post_processor": post,
            "normalizer": {"type": form} if form else None, "decoder": byte_level,
            "pre_tokenizer": byte_level if pattern == "gpt2" else
            {"type": "Sequence", "pretokenizers": [cut, byte_level]}}


def list_files(folder: Path) -> list[Path]:
    """Return the files and folders of a checkpoint that are its tokenizer's."""
    return [entry for entry in sorted(folder.iterdir()) if FILES.fullmatch(entry.name)
            and (entry.is_file() or entry.name == "additional_chat_templates")]


# --- writing --------------------------------------------------------------------------------

def build_settings(tokenizer: Any, template: str | None) -> dict[str, Any]:
    """Return tokenizer_config.json: what was read, and what is true now where the two differ.

    template: a chat template that takes the place of the directory's own.
    """
    facts = tokenizer.facts
    settings = {"clean_up_tokenization_spaces": False,
                **{k: v for k, v in facts.settings.items() if k not in GONE}}
    # The class that opens tokenizer.json unchanged. Others make it anew by rules of their own.
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    roles = {"bos_token": tokenizer.decode(tokenizer.prefix)} if len(tokenizer.prefix) == 1 else {}
    roles["eos_token"] = tokenizer.eot_token
    if tokenizer.spm and tokenizer.spm.unknown in tokenizer.added:
        roles["unk_token"] = tokenizer.spm.unknown
    roles.update((k, n) for k, n in facts.named.items() if n in tokenizer.added
                 or k in settings)
    for role, name in roles.items():
        said = settings.get(role)
        if name and (not said or text_of(said) != name):
            settings[role] = name
    if "added_tokens_decoder" in settings:
        settings["added_tokens_decoder"] = {
            str(token.pop("id")): token for token in list_added(tokenizer.added)}
    if template is not None:
        settings["chat_template"] = template
    elif [*facts.jinjas] == ["default"] and not facts.jinja_files:
        settings["chat_template"] = facts.jinjas["default"]
    elif facts.jinjas and not facts.jinja_files:
        settings["chat_template"] = [{"name": name, "template": jinja}
                                     for name, jinja in facts.jinjas.items()]
    return settings


def build_generation_config(tokenizer: Any, ids: dict[str, Any]) -> dict[str, Any]:
    """Return generation_config.json: what was read, with the ids that begin and end a text.

    ids: those of config.json. The ends are all that any file names: a chat's turn ends before the
    document does.
    """
    out = dict(tokenizer.facts.generation) if tokenizer is not None else {}
    out["bos_token_id"] = ids.get("bos_token_id")
    stops = tokenizer.stop_ids if tokenizer is not None else []
    out["eos_token_id"] = ids.get("eos_token_id")
    if len(stops) > 1 or stops and out["eos_token_id"] is None:
        out["eos_token_id"] = stops if len(stops) > 1 else stops[0]
    if ids.get("pad_token_id") is not None:
        out["pad_token_id"] = ids["pad_token_id"]
    return out


def is_misread(tokenizer: Any, model_type: str) -> bool:
    """Return whether transformers reads a tokenizer beside a model of this type by other rules."""
    if model_type not in FORCED:
        return False
    whole = tokenizer.document.get("model", {}).get("ignore_merges")    # those rules have none
    return whole or (tokenizer.pattern, tokenizer.forms) != FORCED[model_type]


def copy_files(entries: list[Path], folder: Path) -> None:
    """Copy files and folders as they are."""
    for entry in entries:
        if entry.is_dir():
            shutil.copytree(entry, folder / entry.name, dirs_exist_ok=True)
        else:
            shutil.copy2(entry, folder)


def as_json(value: Any) -> str:
    """Return JSON text, which UTF-8 can carry: half a surrogate pair is escaped."""
    text = json.dumps(value, ensure_ascii=False, indent=1)
    return text if mend(text) is text else json.dumps(value, indent=1)


def save(folder: Path, tokenizer: Any, template: str | None = None) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat templates that are files."""
    texts = {"tokenizer_config.json": as_json(build_settings(tokenizer, template)),
             "tokenizer.json": as_json(tokenizer._json())}
    more = folder / "additional_chat_templates"
    if template is None and tokenizer.facts.jinja_files:
        for name, jinja in tokenizer.jinjas.items():
            file = "chat_template.jinja" if name == "default" else f"{more.name}/{name}.jinja"
            texts[file] = jinja
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise UserError(f"{folder} is a file: name a folder for the tokenizer") from None
    if any("/" in name for name in texts):
        more.mkdir(exist_ok=True)
    for name, text in texts.items():
        file = folder / name
        beside = file.with_name(f".{file.name}.{os.getpid()}")  # renamed when whole: never half
        try:
            beside.write_text(text, encoding="utf-8", newline="")
            os.replace(beside, file)
        finally:
            beside.unlink(missing_ok=True)
    for file in (folder / "chat_template.jinja", *more.glob("*.jinja")):
        if file.relative_to(folder).as_posix() not in texts:
            file.unlink(missing_ok=True)        # it would count before what was written
