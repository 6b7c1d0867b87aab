"""What a run starts from, and in which folder: GPT-2 by name, a shape, a tokenizer that agrees.

    from training import start
    cfg.init_from = start.find_pretrained(cfg.init_from, cfg.hub_dir)   # gpt2-xl -> its folder
    start.take_shape(cfg, shape)            # the settings say what the checkpoint's model is
    start.find_difference(data, model)         # the first id that means something else, or None
    start.prepare_out_dir(cfg, machine)     # an earlier run's files are moved aside

nanoGPT's init_from=gpt2* are OpenAI's weights. Nothing is downloaded: they are looked for in
--hub_dir, or in the cache that Hugging Face's programs share.
"""
from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from config import UserError
from families import PRESETS, PRETRAINED, SCRATCH
from families.base import set_biases
from formats import run_folder
from training.machine import Machine
from model import ModelConfig
from training import faults
from formats.huggingface import family_of

# Some tokens of their vocabulary: what tells it from others where a folder brings no tokenizer
GPT2_TOKENS = {0: b"!", 220: b" ", 262: b" the", 995: b" world", 15496: b"Hello",
               50256: b"<|endoftext|>"}
# A directory with one of these brings a tokenizer
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "encoder.json")
# The flags of a family that no setting of a run changes
FIXED = ("position", "norm", "norm_placement", "norm_offset", "rope_interleaved",
         "partial_rotary_factor", "scoring_func", "router_bias", "qk_norm_whole")
# The settings that leave the choice to the model where they have their defaults
AUTOMATIC = ("n_kv_head", "head_dim", "intermediate_size", "qk_norm", "tie_word_embeddings",
             "rope_theta", "activation", "gated", "sliding_window", "num_experts",
             "num_experts_per_tok", "moe_intermediate_size", "n_shared_experts")


def find_hub(hub_dir: str) -> Path:
    """Return --hub_dir, or Hugging Face's cache, where HF_HUB_CACHE or HF_HOME has it."""
    home = os.environ.get("HF_HOME") or Path("~/.cache/huggingface")
    return Path(hub_dir or os.environ.get("HF_HUB_CACHE") or Path(home, "hub")).expanduser()


def find_pretrained(name: str, hub_dir: str = "") -> str:
    """Return the folder meant by --init_from, where it is the name of a published model.

    gpt2 and its sizes are OpenAI's weights, in a folder of that name, or in hub_dir as a folder or
    in the layout of Hugging Face's cache. Other presets have no weights: --preset is meant.
    """
    local = Path(name)
    if hub_dir and name not in PRETRAINED and name != "resume":
        *others, last = PRETRAINED
        raise UserError(f"--hub_dir={hub_dir} has no effect without --init_from="
                        f"{', '.join(others)} or {last}: leave it out")
    if name not in PRESETS or any((local / f).is_file() for f in
                                  ("config.json", "params.json", "checkpoints.json")):
        return name
    if name not in PRETRAINED:
        raise UserError(f"--init_from={name} is no folder here; for random weights of that "
                        f"published shape say --preset={name}")
    hub = find_hub(hub_dir)
    owner = PRETRAINED[name]
    places = [hub / name, hub / owner / name, *([hub] if hub.name == name else [])]
    for cache in (hub / f"models--{owner}--{name}", hub / f"models--{name}"):
        main = cache / "refs" / "main"          # which of the snapshots is the current one
        if main.is_file():
            places.append(cache / "snapshots" / main.read_text(encoding="utf-8").strip())
        # a copy of the cache may lack refs/
        places += sorted(cache.glob("snapshots/*"))
    found = next((p for p in places if (p / "config.json").is_file()), None)
    if found is None:
        raise UserError(f"--init_from={name} means OpenAI's weights, and there are none in {hub}: "
                        f"download them with `hf download {owner}/{name}`, name the "
                        f"folder that has {name}/ with --hub_dir=DIR, or say --preset={name} for "
                        "random weights of that shape")
    return str(found)


def from_settings(cfg: Any, vocab_size: int) -> ModelConfig:
    """Return the ModelConfig that a run's settings describe: of a family or a preset."""
    shape = {k: getattr(cfg, k) for k in
             ("n_layer", "n_head", "n_kv_head", "n_embd", "head_dim", "intermediate_size")}
    flags = {k: getattr(cfg, k) for k in
             ("qk_norm", "tie_word_embeddings", "rope_theta", "activation", "gated",
              "sliding_window", "num_experts", "num_experts_per_tok", "moe_intermediate_size",
              "n_shared_experts") if getattr(cfg, k) is not None}
    common = {"block_size": cfg.block_size, "dropout": cfg.dropout, "init_std": cfg.init_std}
    if cfg.preset:
        given = {k: v for k, v in shape.items() if k in getattr(cfg, "given", ())}
        config = ModelConfig.from_preset(cfg.preset, **given, **flags, **common)
        if vocab_size > config.vocab_size:
            raise UserError(f"the data's vocabulary of {vocab_size} is larger than "
                            f"{cfg.preset}'s {config.vocab_size}: leave out --preset, or prepare "
                            "the data with another tokenizer")
        return config
    biases = SCRATCH[cfg.family].from_bias(cfg.bias) if cfg.family in SCRATCH else {}
    return ModelConfig.from_family(cfg.family, **{**biases, **shape, **flags, **common,
                                             "vocab_size": vocab_size})


def fits_family(cfg: Any, shape: ModelConfig) -> bool:
    """Return whether a shape may come from --family and the flags that were given beside it."""
    name = cfg.family
    settled = set(getattr(cfg, "given", ()))
    if name == family_of(shape).model_type or name == getattr(cfg, "saved", {}).get("family"):
        return True
    if name not in SCRATCH:
        return False
    row = SCRATCH[name]
    if row.from_bias is not set_biases or "bias" in settled:    # nanoGPT's switch, and its GELU
        settled |= {"qkv_bias", "o_bias", "mlp_bias", "norm_bias", "activation"}
    default = ModelConfig()
    wanted = {**{key: getattr(default, key) for key in FIXED}, **row.flags}
    return all(value == getattr(shape, key) for key, value in wanted.items() if key not in settled)


def get_in_force(cfg: Any, shape: ModelConfig, decided: bool) -> dict[str, Any]:
    """Return name -> the value that counts, of every setting that the model decides.

    decided: the model is a checkpoint's, or made of another one; otherwise the settings describe
    it. One that leaves the choice to the model (0 or None by default) is in force as it is.
    """
    values = dict(getattr(cfg, "saved", {}))
    if not hasattr(cfg, "family"):              # a stage that makes no model has no such settings
        return values
    biases = {shape.qkv_bias, shape.o_bias, shape.mlp_bias}
    if decided:
        values |= {name: value for name, value in asdict(shape).items() if not (
            name in AUTOMATIC and getattr(cfg, name) == getattr(type(cfg), name))}
    return values | {
        "family": cfg.family if fits_family(cfg, shape) else family_of(shape).model_type,
        "bias": shape.qkv_bias if len(biases) == 1 else None}       # some of them: neither


def take_shape(cfg: Any, shape: ModelConfig) -> None:
    """Have the settings say, in place, what is true of a model that is there already."""
    for name in asdict(cfg).keys() & asdict(shape).keys() - {"block_size", "dropout", "init_std"}:
        setattr(cfg, name, getattr(shape, name))
    if hasattr(cfg, "family"):
        cfg.family = family_of(shape).model_type


def find_difference(tokenizer: Any, other: Any) -> int | None:
    """Return the first id of `tokenizer` that is another token, or none, for `other`; or None.

    The tokens are compared, not the files: GPT-2's vocabulary of tiktoken and of Hugging Face are
    one. `other` may have more, as a model that was tuned for chats has.
    """
    return next((i for i, token in sorted(tokenizer.tokens.items())
                 if other.tokens.get(i) != token), None)


def check_tokens(dataset: str, tokenizer: Any, source: Any, other: Any) -> None:
    """Raise UserError unless every id of the data's tokenizer is the same token for the model's."""
    i = find_difference(tokenizer, other)
    if i is not None:
        mine = tokenizer.tokens[i]
        theirs = other.tokens.get(i)
        raise UserError(f"dataset {dataset} has another tokenizer than the model of {source}: id "
                        f"{i} is {mine[:40]!r} in the data and "
                        f"{'nothing' if theirs is None else repr(theirs[:40])} there; prepare the "
                        f"data with --tokenizer={source}")


def check_gpt2_tokens(dataset: str, tokenizer: Any, name: str) -> None:
    """Raise UserError unless the data's tokenizer is GPT-2's, which a folder of weights may not
    bring."""
    if any(tokenizer.tokens.get(i) != token for i, token in GPT2_TOKENS.items()):
        raise UserError(f"dataset {dataset} has another tokenizer than {name}: prepare the data "
                        "with --tokenizer=gpt2")


def check_data(cfg: Any, path: Path) -> None:
    """Keep what the data is in cfg.data; UserError where a resumed run began with other data."""
    cfg.data = run_folder.fingerprint_data(path)
    before = getattr(cfg, "saved_data", "")
    if before and before != cfg.data and "dataset" not in getattr(cfg, "given", ()):
        raise UserError(f"dataset {cfg.dataset} has changed since the run in {cfg.out_dir} was "
                        "saved, which resumed would train on something else: put it back, or say "
                        f"--dataset={cfg.dataset} to go on with it as it is now")


def prepare_out_dir(cfg: Any, machine: Machine) -> None:
    """Make out_dir; the files of an earlier run in it are moved aside, never overwritten.

    Settings that name a checkpoint of that run, as a second round from its result does, are
    changed to where it is then. Every rank calls this, when it has read what it starts from.
    """
    out = Path(cfg.out_dir)
    if cfg.eval_only:
        return
    if machine.main:
        faults.take_folder(cfg.out_dir)
    machine.wait()
    if cfg.init_from != "resume" and (out / "checkpoints.json").exists():
        to = run_folder.choose_aside(out)
        for name in ("init_from", "reference", "teacher"):
            if folder := getattr(cfg, name, ""):
                setattr(cfg, name, run_folder.follow_move(folder, out, to))
        machine.wait()                  # all ranks have looked, and none reads from it any more
        if machine.main:
            run_folder.move_aside(out, to)
            faults.take_folder(cfg.out_dir)     # a new folder, if the old one got another name
            print(f"{out} held an earlier run: its files were moved to {to}", file=sys.stderr)
    if machine.main:
        try:
            out.mkdir(parents=True, exist_ok=True)
            probe = out / ".writable"
            probe.write_text("")
            probe.unlink()
        except OSError as e:
            raise UserError(f"cannot write to out_dir {out}: {e.strerror}; choose another with "
                            "--out_dir") from e
    machine.wait()
