"""configure(): a dataclass <- config files <- command line, with types and helpful errors.

Every script declares its settings once, as a dataclass whose comments are its `--help`:

    @dataclass
    class Config:
        batch_size: int = 12        # rows of a micro-batch
        compile: bool = False       # torch.compile the model

and is then called in nanoGPT's way, later settings winning over earlier ones:

    python train.py config/gpt2_small.py config/mine.py --batch_size=4 --compile 0

A config file is Python of the user's own (plain assignments; `gradient_accumulation_steps = 5 * 8`
and `import time` work, as in nanoGPT), so it is run, and deserves the trust that any script does.
`run()` is the other half of the house rule: a user's mistake ends with one sentence, status 2.
"""
from __future__ import annotations

import dataclasses
import difflib
import errno
import inspect
import math
import os
import re
import runpy
import sys
import tokenize
import types
import typing
from io import StringIO
from pathlib import Path
from typing import Any, Callable, NamedTuple, Sequence

TRUE = ("1", "true", "yes", "on")
FALSE = ("0", "false", "no", "off")


LONGEST = 700                           # characters of a sentence; a hostile name may have millions


def brief(text: str, most: int = LONGEST) -> str:
    """Return the text, its middle left out where it is longer than `most`, without control
    characters."""
    if len(text) > most:
        text = f"{text[:most * 2 // 3]} … {text[-most // 4:]}"
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


class UserError(Exception):
    """A mistake the user can mend: one sentence that says what, where and what to do."""

    def __init__(self, message: Any = ""):
        super().__init__(brief(str(message)))


class LostRank(UserError):
    """Another rank is gone. Threads of gloo's may wait for it indefinitely when this process ends
    in the usual way, so run() ends it at once."""


class Stopped(Exception):
    """A run that was told to stop by signal `number` and has saved; its status is 128 + number."""

    def __init__(self, number: int):
        super().__init__(f"stopped by signal {number}")
        self.status = 128 + number


class Idle(NamedTuple):
    """Settings without effect in some situation. A Config class lists its own as IDLE; those of
    the classes that it inherits from hold as well.

    Where the command line sets one of `causes`, what a config file alone says of `names` is
    overruled, not refused: `sft.py mine.py --lora_rank=0` may leave mine.py's lora_alpha alone.
    """
    names: str                          # of the settings, separated by spaces
    causes: str                         # the settings that make the situation, likewise
    when: Callable[[Any, Any], Any]     # (settings, ModelConfig) -> whether it is there
    why: str                            # ends the sentence "--name=value has no effect ..."


def refuse_idle(cfg: Any, shape: Any = None, in_force: dict[str, Any] | None = None) -> None:
    """Raise UserError for a setting that was given without effect, unless its value is in force.

    in_force: name -> the value that counts instead, a checkpoint's say; otherwise the default.
    """
    given, typed = (getattr(cfg, name, frozenset()) for name in ("given", "typed"))
    defaults = {f.name: f.default for f in dataclasses.fields(cfg)}
    for cls in type(cfg).__mro__:
        for rule in vars(cls).get("IDLE", ()):
            overruled = given - typed if typed & {*rule.causes.split()} else ()
            names = [n for n in rule.names.split() if n in given and n not in overruled]
            if not names or not rule.when(cfg, shape):
                continue
            for name in names:
                value = getattr(cfg, name)
                counts = {**defaults, **(in_force or {})}[name]
                if value != counts:
                    here = f" ({name} is {counts!r} there)" if name in (in_force or {}) else ""
                    raise UserError(f"--{name}={value} has no effect {rule.why}{here}: leave it "
                                    "out")


def field_types(cls: type) -> dict[str, Any]:
    """Return name -> type of every field, with string annotations resolved."""
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls)}


def choices_of(kind: Any) -> tuple[type, ...]:
    """Return the plain types a field accepts: `int | None` -> (int, NoneType)."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return typing.get_args(kind)
    return (typing.get_origin(kind) or kind,)


def name_of(kind: Any) -> str:
    return " or ".join("None" if k is type(None) else k.__name__ for k in choices_of(kind))


def coerce(name: str, value: Any, kind: Any, where: str) -> Any:
    """Bring `value` (text from the command line, or an object from a config file) to `kind`.

    >>> coerce("learning_rate", "1", float, "--learning_rate")
    1.0
    """
    kinds = choices_of(kind)
    wrong = UserError(f"{where}: {name} is {name_of(kind)}, and {value!r} is not")
    if type(None) in kinds and (value is None or value in ("None", "none")):
        return None
    for k in kinds:
        if k is bool:
            if isinstance(value, bool):
                return value
            if str(value).lower() in TRUE + FALSE:
                return str(value).lower() in TRUE
        elif k is int and not isinstance(value, bool):
            # 5e3 is a fine way to write 5000; 0.5 for an int is a mistake, never rounded silently
            try:
                return int(value) if isinstance(value, (int, str)) else exact_int(value)
            except (ValueError, TypeError, OverflowError):
                try:
                    return exact_int(float(value))
                except (ValueError, TypeError, OverflowError):
                    pass
        elif k is float and not isinstance(value, bool):
            try:
                return float(value)
            except (ValueError, TypeError):
                pass
        elif k is str and isinstance(value, (str, os.PathLike)):
            return str(value)
        elif k is list and isinstance(value, (list, tuple)):
            return list(value)
        elif k is list and isinstance(value, str):
            return [part for part in value.split(",") if part]
    raise wrong


# Interval -> the fields whose numbers must lie in it, in the notation of mathematics: [ and ] take
# the bound in, ( and ) leave it out; "-1 or" is a word for "as usual". None is never a number. A
# class overrides a row by an attribute: ranges = {"beta": "[0, 1]"}. The upper ends are beyond what
# any run has had: they tell a slip of the finger, or a damaged file, from a number.
RANGES = {
    "[1, 1e7]": "batch_size gradient_accumulation_steps n_layer n_head n_embd keep num_samples "
                "repeat seeds",
    "[0, 1e7]": "n_kv_head head_dim intermediate_size num_experts n_shared_experts lora_rank show "
                "hidden_layers wrong top_k num_experts_per_tok "
                "moe_intermediate_size",
    "[1, 1e12]": "eval_interval log_interval generate_tokens vocab_size shard_tokens",
    "[0, 1e12]": "block_size max_iters lr_decay_iters sample_interval eval_iters generate limit "
                 "max_new_tokens train val test pref rl warmup_iters",
    "[0, 2147483647]": "sliding_window",
    "[0, 4294967295]": "seed",                      # what every generator of numbers takes
    "[1, 1e18]": "tokenizer_chars",
    "[1, 3]": "level",
    "[1, 103]": "shards",                           # fineweb's
    "[0, 4096]": "workers jobs",
    "[0, 1e3]": "learning_rate muon_learning_rate weight_decay init_std z_loss sft_weight hidden "
                "router_aux_loss_coef router_z_loss_coef router_bias_rate desirable_weight "
                "undesirable_weight",
    "-1 or [0, 1e3]": "min_lr",
    "[0, 1e6]": "grad_clip beta gamma temperature generate_temperature lora_alpha",
    "(0, 1e6]": "epochs repetition_penalty shard_gb",
    "[0, 1e18]": "rope_theta",
    "[0, 1)": "beta1 beta2 dropout lora_dropout label_smoothing",
    "[0, 1]": "wsd_decay alpha min_p",
    "(0, 1]": "top_p",
    "(0, 1)": "val_fraction",
}


def range_of(cls: type, name: str) -> str:
    """Return the interval that a field's numbers must lie in, "" where none is declared."""
    for base in cls.__mro__:
        if name in vars(base).get("ranges", {}):
            return vars(base)["ranges"][name]
    return next((spec for spec, names in RANGES.items() if name in names.split()), "")


def check_range(cls: type, name: str, value: Any, where: str) -> None:
    """Raise UserError for a number that no run can have: nan, infinite, or outside the field's
    interval.

    >>> check_range(Config, "dropout", 1.5, "--dropout")
    config.UserError: --dropout: dropout is 1.5: it must be below 1
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    wrong = f"{where}: {name} is {value}: it must be "
    if not math.isfinite(value):
        raise UserError(wrong + "a finite number")
    usual, _, spec = range_of(cls, name).rpartition(" or ")
    if not spec or usual and value == float(usual):
        return
    low, high = (float(x) for x in spec[1:-1].split(","))
    if value < low or value == low and spec[0] == "(":
        start = "above" if spec[0] == "(" else "at least"
        raise UserError(f"{wrong}{usual + ' or ' if usual else ''}{start} {low:g}")
    if value > high or value == high and spec[-1] == ")":
        raise UserError(f"{wrong}{'below' if spec[-1] == ')' else 'at most'} {high:.10g}")


def check_values(cls: type, values: dict[str, Any], where: str) -> dict[str, Any]:
    """Settings from a file of unknown origin -> those that `cls` has, typed and within range."""
    kinds = field_types(cls)
    typed = {k: coerce(k, v, kinds[k], where) for k, v in values.items() if k in kinds}
    for name, value in typed.items():
        check_range(cls, name, value, where)
    return typed


def exact_int(value: float) -> int:
    if value != int(value):
        raise ValueError(value)
    return int(value)


def describe_unknown(name: str, cls: type, where: str) -> UserError:
    """Return the error for a setting that `cls` does not have: with the nearest name, or, where
    cls.ELSEWHERE knows it as one of another script, with what to do instead."""
    if name in (elsewhere := getattr(cls, "ELSEWHERE", {})):
        return UserError(f"{where}: --{name} has no effect here, as {elsewhere[name]}")
    near = difflib.get_close_matches(name, list(field_types(cls)), n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else "; --help lists every setting"
    return UserError(f"{where}: there is no setting {name!r}{hint}")


def read_config_file(path: str, cls: type) -> dict[str, Any]:
    """Run a config file and return its settings, typed. Modules, functions, _names are skipped."""
    kinds = field_types(cls)
    if not Path(path).is_file():
        raise UserError(f"config file {path!r} does not exist (settings are given as --name=value)")
    try:
        namespace = runpy.run_path(path)
    except UserError:
        raise
    except Exception as e:      # a typo in the user's file: its own message, without our frames
        raise UserError(f"config file {path} does not run: {type(e).__name__}: {e}") from e
    settings = {}
    for name, value in namespace.items():
        if name.startswith("_") or isinstance(value, types.ModuleType) or callable(value):
            continue
        if name not in kinds:
            raise describe_unknown(name, cls, path)
        settings[name] = coerce(name, value, kinds[name], path)
    return settings


def field_comments(cls: type) -> tuple[dict[str, str], dict[str, str]]:
    """Return (field -> its trailing comment, field -> the `# --- heading` above it), read from
    source; those of the classes that it inherits from as well."""
    comments = {}
    headings = {}
    last = None
    heading = None
    for base in cls.__bases__:
        if dataclasses.is_dataclass(base):
            comments, headings = (a | b for a, b in zip((comments, headings), field_comments(base)))
    try:
        source = inspect.getsource(cls)
    except (OSError, TypeError):
        return comments, headings
    names = {f.name for f in dataclasses.fields(cls)}
    for tok in tokenize.generate_tokens(StringIO(inspect.cleandoc("\n" + source)).readline):
        first = tok.line.split(":")[0].strip()
        if tok.type == tokenize.COMMENT:
            text = tok.string.lstrip("# ").rstrip()
            if first in names:
                comments[first] = text
                last = first
            elif text.startswith("---"):
                heading = text.strip("- ")
                last = None
            elif last:                      # a comment line below a field carries its text on
                comments[last] += " " + text
        elif tok.type == tokenize.NAME and first in names:
            last = first if first in comments else None
            if heading:
                headings[first] = heading
                heading = None
    return comments, headings


def help_text(cls: type, positional: Sequence[str] = ()) -> str:
    """Return the `--help` of a script: its docstring, then every field, its type, default,
    comment."""
    module = sys.modules.get(cls.__module__)
    lines = [(module.__doc__ or "").strip(), ""] if module else []
    plain = " ".join(f"[{p}]" for p in positional) or "[config/FILE.py …]"
    lines.append(f"usage: python {Path(sys.argv[0]).name} {plain} [--name=value …]\n")
    comments, headings = field_comments(cls)
    for f in dataclasses.fields(cls):
        if f.name in headings:
            lines.append(f"\n{headings[f.name]}:")
        fallback = f.default if f.default is not dataclasses.MISSING else f.default_factory()
        kind = name_of(field_types(cls)[f.name])
        lines.append(f"  --{f.name}={fallback!r}  ({kind})  {comments.get(f.name, '')}".rstrip())
    return "\n".join(lines)


def configure(cls: type, argv: Sequence[str] | None = None, positional: Sequence[str] = ()) -> Any:
    """Build `cls` from its defaults, then config files, then `--name=value` / `--name value`.

    A plain word is a config file, or, where `positional` names fields, fills those in order (a
    last field that is a list takes the rest; words ending in .py stay words there). The result
    carries `given`, the names that a file or the command line set, so that a stage can tell a
    choice from a default, and `typed`, those that the command line set. Errors: UserError for an
    unknown name, a wrong type, a missing file.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if odd := [word for word in argv if re.search("[\ud800-\udfff]", word)]:
        # Python hands on bytes that its encoding lacks as surrogates, which no vocabulary has
        raise UserError(f"command line: {ascii(brief(odd[0], 60))} is not text in this terminal's "
                        f"encoding, {sys.getfilesystemencoding()}: set PYTHONUTF8=1, or give the "
                        "text in a file")
    kinds = field_types(cls)
    if "-h" in argv or "--help" in argv:
        print(help_text(cls, positional))
        raise SystemExit(0)
    files: list[str] = []
    settings: dict[str, Any] = {}
    waiting = list(positional)
    while argv:
        word = argv.pop(0)
        if not word.startswith("--") or word == "--":
            if not positional:
                files.append(word)
            elif not waiting:
                raise UserError(f"unexpected argument {word!r}; --help shows the usage")
            elif kinds[waiting[0]] in (list[str], list):
                settings.setdefault(waiting[0], []).append(word)
            else:
                field = waiting.pop(0)
                settings[field] = coerce(field, word, kinds[field], "command line")
            continue
        # only the first "=" separates: --start=a=b asks for the text "a=b"
        name, eq, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if name not in kinds:
            raise describe_unknown(name, cls, "command line")
        if not eq:
            flag = bool in choices_of(kinds[name])
            if flag and (not argv or argv[0].lower() not in TRUE + FALSE):
                value = "1"                  # a bare --flag switches it on
            elif argv and not argv[0].startswith("--"):
                value = argv.pop(0)
            else:
                raise UserError(f"command line: --{name} needs a value, as in --{name}=…")
        settings[name] = coerce(name, value, kinds[name], "command line")
    from_files: dict[str, Any] = {}
    for path in files:
        from_files.update(read_config_file(path, cls))
    merged = {**from_files, **settings}
    for name, value in merged.items():
        where = "command line" if name in settings else "config file"
        check_range(cls, name, value, where)
    cfg = cls(**merged)
    cfg.given = frozenset(merged)           # not fields: never saved, never printed
    cfg.typed = frozenset(settings)
    return cfg


def show(cfg: Any) -> str:
    """Return the resolved settings on one block of lines; those set by the user are marked with
    *."""
    given = getattr(cfg, "given", frozenset())
    rows = [f"{'*' if k in given else ' '} {k} = {v!r}" for k, v in dataclasses.asdict(cfg).items()]
    return "\n".join(rows)


def complain(message: str) -> None:
    """One sentence on stderr; under torchrun the other ranks say who they are."""
    rank = os.environ.get("RANK", "0")
    print(f"error: {message}" if rank == "0" else f"error [rank {rank}]: {message}",
          file=sys.stderr, flush=True)


def tolerate_output() -> None:
    """Have stdout print `?` for a character that its encoding lacks, instead of raising.

    The encoding stays the terminal's own or PYTHONIOENCODING's (cp1252 is common on Windows, ascii
    in bare containers); error handling that PYTHONIOENCODING names, as in cp1252:strict, stays too.
    """
    # a program without a console (pythonw), or a shell's `>&-`: then there is nowhere to print to
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
    named = os.environ.get("PYTHONIOENCODING", "").partition(":")[2]
    if not named and hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")


def refuse_to_run() -> None:
    """End, with a sentence and status 2, a file that was run though other files only import it."""
    complain(f"{Path(sys.argv[0]).name} is imported by the scripts and cannot be run: "
             "README.md lists what to run")
    sys.exit(2)


PACKAGES = ("torch", "triton", "tiktoken", "numpy", "requests", "jinja2")


def explain(kind: type, error: BaseException, trace: Any) -> None:
    """Say in a sentence what went wrong before run(), while a script was importing: a hook."""
    missing = getattr(error, "name", None) or ""
    if kind is KeyboardInterrupt:
        complain("interrupted")
    elif kind is ModuleNotFoundError and missing.split(".")[0] in PACKAGES:
        complain(f"the package {missing.split('.')[0]} is missing: run `{sys.executable} -m pip "
                 "install -r requirements.txt`, or activate the environment that has it")
        raise SystemExit(2)
    else:
        sys.__excepthook__(kind, error, trace)


# the only thing that happens on import: scripts import this module before PyTorch, which takes
# seconds, and before the packages that may not be there
sys.excepthook = explain


def run(main: Callable[[Any], Any], cls: type, positional: Sequence[str] = ()) -> None:
    """configure(), then main(cfg); what the user can mend becomes one sentence and status 2."""
    tolerate_output()
    try:
        main(configure(cls, positional=positional))
        sys.stdout.flush()
    except LostRank as e:
        complain(str(e))
        sys.stdout.flush()
        os._exit(2)
    except UserError as e:
        complain(str(e))
        sys.exit(2)
    except Stopped as e:                    # said by the run; `a && b` must not go on to b
        sys.exit(e.status)
    except KeyboardInterrupt:
        complain("interrupted")
        sys.exit(130)
    except UnicodeEncodeError as e:         # PYTHONIOENCODING=ascii:strict asked for it
        if e.encoding.startswith("utf"):
            raise
        complain(f"the output's encoding {sys.stdout.encoding} has no {ascii(e.object[e.start])}: "
                 "leave out :strict, or set PYTHONIOENCODING=utf-8")
        sys.exit(2)
    except BrokenPipeError:                 # `sample.py | head`: the reader has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as e:
        # A full disk or a folder that is not ours to write: the system's words are the sentence.
        if e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            complain(f"the disk is full ({e.filename or e}): free some space; nothing that was "
                     "already written is lost")
        elif e.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            complain(f"no permission to write or read {e.filename}: choose another folder")
        else:
            raise
        sys.exit(2)
    except (MemoryError, RuntimeError) as e:
        text = str(e)
        full = isinstance(e, MemoryError) or type(e).__name__ == "OutOfMemoryError"
        if not full and "can't allocate memory" not in text:
            raise
        known = field_types(cls)
        advice = [f"--{k}" for k in ("batch_size", "block_size", "n_embd") if k in known]
        fewer = f": try a smaller {' or '.join(advice)}" if advice else ""
        complain(f"out of memory{fewer} ({text.splitlines()[0] if text else 'no details'})")
        sys.exit(2)
