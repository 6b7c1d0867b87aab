"""Messages of any project -> one form, and an object's keys, each of which is accounted for.

    from data import messages
    messages.read_turns([{"from": "human", "value": "Hi"}], "conversations")    # role, content

A key of a record, or of a message in it, is one of three things. It is read: a layout takes it. It
is known to describe the record and not to be learnt: METADATA. Or it is refused by name, since a
key that nobody reads may say what is to be trained on; `--ignore_keys=NAME` goes on without it.
What is left out is counted in Notes and printed when all is read.

A message that leaves here is {"role", "content"} and, where there are any, "reasoning_content",
"tool_calls" (as OpenAI writes them, their arguments an object), "name", "tool_call_id", and
"train": False on an answer that is context only. Read are OpenAI's messages with tools, weights
and the older function_call, ShareGPT's, LLaMA-Factory's functions, and minimind's tools.
"""
from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any, Callable, Iterable

from config import UserError, refuse_to_run
from text import chat

# Roles as other projects call them (ShareGPT, Gemma, OpenAI, Llama 3), and as chat.py does
ROLE_NAMES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant",
              "function": "tool", "observation": "tool", "ipython": "tool",
              "developer": "system", "function_call": "assistant"}
THOUGHTS = ("reasoning_content", "thinking", "reasoning")       # of Qwen3, of gpt-oss, of vLLM
# 1 or true, 0 or false: OpenAI's and Mistral's, axolotl's (twice), ms-swift's
TRAINED = ("weight", "train", "training", "loss")
# Keys with which published sets (UltraChat, OpenOrca, SlimOrca, OpenHermes, Tulu, WildChat,
# UltraFeedback, HelpSteer, argilla's, Magpie) say where a record comes from, who wrote it and how
# it was judged. None of them holds words of the conversation, or says which of them to train on. A
# name that somewhere does (title, context, knowledge, user, original_answer, mask) is not in here.
METADATA = frozenset("""
    idx index hash source sources origin dataset dataset_name data_source subset split version
    license author annotator annotators date created created_at updated_at timestamp time
    language lang locale country domain topic topics subject category categories subcategory
    task_category task_type type kind tag tags difficulty level quality complexity model_name
    generator engine num_turns turn turn_identifier num_tokens token_count word_count views
    avatarUrl hashed_ip redacted toxic moderation openai_moderation detoxify_moderation metadata
    meta custom_instruction skip_prompt_formatting gen_input_configs parallel_tool_calls
    label_text helpfulness correctness coherence verbosity
    """.split())
# and columns of their kind, as prompt_id, chosen_score, rating_rejected, source_url,
# rejected_model: numbers, words or lists of them, no objects
DESCRIBES = re.compile(r"(\w+_)?(id|uuid|guid|hash|sha|url|scores?|ratings?|models?)"
                       r"|(scores?|ratings?)_\w+")
Message = dict[str, Any]
Messages = list[Message]


class Notes:
    """What reading left out, to be told at the end: keys, and places in records."""

    def __init__(self, ignore: Iterable[str] = ()):
        self.ignore = frozenset(ignore)         # --ignore_keys
        self.ignored: Counter[str] = Counter()  # key -> objects that had it
        self.metadata: Counter[str] = Counter()
        self.events: Counter[str] = Counter()   # what was cut or dropped -> how often

    def lines(self) -> list[str]:
        """Return a line for each kind of thing that was left out."""
        out = [f"{count:,} {what}" for what, count in self.events.items()]
        counted = {name: self.ignored[name] for name in sorted(self.ignore)}
        for what, keys in (("ignored, as --ignore_keys says", counted),
                           ("not trained on, as they describe records", self.metadata)):
            if keys:
                out.append(f"keys {what}: " + ", ".join(
                    f"{key} ({count:,})" for key, count in sorted(keys.items())))
        return out


def is_empty(value: Any) -> bool:
    """Tell whether a value is what datasets fill a missing column with."""
    return value is None or isinstance(value, (str, list, dict)) and not value


class Keys:
    """The keys of an object, each to be taken once; done() refuses what nobody took.

    null counts as absent.
    """

    def __init__(self, values: dict[str, Any], what: str, notes: Notes):
        self.what = what
        self.notes = notes
        self.values = {k: v for k, v in values.items() if v is not None}
        for name in notes.ignore & self.values.keys():
            del self.values[name]
            notes.ignored[name] += 1

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def names(self) -> str:
        """Return the keys that nobody took yet, for a complaint."""
        return ", ".join(map(repr, list(self.values)[:12])) or "none"

    def first(self, names: Iterable[str]) -> str | None:
        """Return the first of the names that holds something, or else that is there."""
        there = [name for name in names if name in self.values]
        full = [name for name in there if not is_empty(self.values[name])]
        return (full or there or [None])[0]

    def take(self, name: str, default: Any = None) -> Any:
        return self.values.pop(name, default)

    def take_one(self, names: Iterable[str], read: Callable[[Any, str], Any]) -> Any:
        """Take the value under any of several names for one thing, as read(value, name), or None.

        Under two of them it has to be the same.
        """
        found = {name: read(self.take(name), name) for name in names if name in self.values}
        found = {name: value for name, value in found.items() if not is_empty(value)}
        (kept, value), *others = found.items() or [("", None)]
        for name, other in others:
            if other != value:
                raise UserError(f"{self.what}{kept} and {name} say different things: leave one out")
        return value

    def done(self) -> None:
        """Refuse keys that nobody took, unless they are known to describe only."""
        unknown = []
        for key, value in self.values.items():
            if is_empty(value):
                continue
            if key in METADATA or DESCRIBES.fullmatch(str(key)) and not isinstance(value, dict):
                self.notes.metadata[key] += 1
            else:
                unknown.append(str(key))
        if unknown:
            raise UserError(
                f"{self.what}unknown key{'s' * (len(unknown) > 1)} "
                f"{', '.join(map(repr, unknown[:9]))}, which may change what is learnt; "
                f"--ignore_keys={','.join(unknown[:9])} goes on without")


# --- a message ---------------------------------------------------------------------------------
def from_json(value: Any, what: str) -> Any:
    """Return what a text holds as JSON, as published sets keep nested values; others unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError):
        raise UserError(f"{what} is a text that is not JSON") from None


def text_of(value: Any, what: str) -> str:
    """Read a content: a text, OpenAI's list of text parts, or nothing."""
    if isinstance(value, list):
        out = []
        for part in value:
            if not isinstance(part, dict) or not isinstance(part.get("text"), str) or part.get(
                    "type", "text") not in ("text", "input_text", "output_text"):
                kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                raise UserError(f"{what} has a part that is no text ({kind!r})")
            out.append(part["text"])
            rest = [k for k, v in part.items() if k not in ("type", "text", "cache_control")
                    and not is_empty(v)]
            if rest:
                raise UserError(f"a part of {what} has the unknown key {rest[0]!r}")
        return "".join(out)
    if value is not None and not isinstance(value, str):
        raise UserError(f"{what} is a {type(value).__name__} where a text should be")
    return value or ""


def read_tool_call(value: Any, what: str) -> dict[str, Any]:
    """Return a call, wrapped or not, as {"type": "function", "function": {"name", "arguments"}}."""
    if not isinstance(value, dict):
        raise UserError(f"{what} is a {type(value).__name__}, not an object with a function")
    outer = Keys(value, f"{what}: ", Notes())
    inner = outer
    out = {"type": "function"}
    if "function" in outer:
        inner = outer.take("function")
        if not isinstance(inner, dict):
            raise UserError(f"{what} has a {type(inner).__name__} as its function")
        inner = Keys(inner, f"{what}: ", Notes())
        if outer.take("type", "function") != "function":
            raise UserError(f"{what} calls something else than a function")
    elif inner.values.get("type") == "function":
        inner.take("type")
    identity = outer.take("id")
    _ = outer.take("index")
    if identity:
        out["id"] = text_of(identity, f"the id of {what}")
    name = inner.take("name")
    arguments = inner.take("arguments", {})
    arguments = from_json(arguments, f"arguments of {what}")
    arguments = {} if arguments is None else arguments
    if not isinstance(name, str) or not name or not isinstance(arguments, dict):
        raise UserError(f"{what} needs a name and an object of arguments")
    inner.done()
    outer.done()
    return {**out, "function": {"name": name, "arguments": arguments}}


def read_tool_calls(value: Any, what: str) -> list[dict[str, Any]]:
    """Read the calls in a list, a single object, or the JSON text of either."""
    value = from_json(value, what)
    if value is None:
        return []
    return [read_tool_call(call, f"call {k} of {what}")
            for k, call in enumerate(value if isinstance(value, list) else [value], 1)]


def read_tools(value: Any, what: str, wrap: bool = False) -> list[dict[str, Any]]:
    """Read a list of tools, or its JSON text; wrap: older functions become tools."""
    value = from_json(value, what)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise UserError(f"{what} is not a list of objects")
    return [{"type": "function", "function": tool} for tool in value] if wrap else value


def is_trained(keys: Keys, role: str, what: str) -> bool:
    """Tell what weight, train and their relatives say of a turn: False for context only."""
    def read(value: Any, name: str) -> bool:
        if value not in (0, 1):
            raise UserError(f"{what}: {name} is {value!r}, and a turn is trained on (1) or not (0)")
        return bool(value)

    wanted = keys.take_one(TRAINED, read)
    if wanted and role != "assistant":
        raise UserError(f"{what} is to be trained on, which only an assistant's turn can be")
    return wanted is not False


def read_turn(value: Any, what: str, notes: Notes) -> Message:
    """Read a message; "tools" is left in a system turn that holds some (minimind)."""
    if not isinstance(value, dict):
        raise UserError(f"{what} is a {type(value).__name__}, not an object")
    if len(value) == 2 and isinstance(value.get("content"), str) and (
            value.get("role") in chat.ROLES) and not notes.ignore:
        return dict(value)              # as most are: a million of them take seconds
    keys = Keys(value, f"{what}: ", notes)
    given = keys.take("role") if "role" in keys else keys.take("from")
    other = keys.take("from", given)
    role, other = (ROLE_NAMES.get(r, r) if isinstance(r, str) else r for r in (given, other))
    if role not in chat.ROLES or other != role:
        raise UserError(f"{what} has the role {given if other == role else (given, other)!r}, "
                        f"which is none of {', '.join(chat.ROLES)}")
    content = keys.take("content") if "content" in keys else keys.take("value")
    if keys.take("value", content) != content:
        raise UserError(f"{what} has a content and another value: leave one out")
    calls: list = []
    if given == "function_call":        # LLaMA-Factory's: the call is the content
        calls = read_tool_calls(content, f"the function_call of {what}")
        content = ""
        if not calls:
            raise UserError(f"{what} is a function_call without a call")
    elif role == "tool" and isinstance(content, dict):
        content = json.dumps(content, ensure_ascii=False)
    out: Message = {"role": role, "content": text_of(content, f"the content of {what}")}
    called = keys.take_one(("tool_calls", "function_call"),
                           lambda v, name: read_tool_calls(v, f"{name} of {what}"))
    if calls and called:
        raise UserError(f"{what} calls a function in its content and in its keys: leave one out")
    if calls := calls or called:
        out["tool_calls"] = calls
    thoughts = keys.take_one(THOUGHTS, lambda v, name: text_of(v, f"{name} of {what}"))
    if thoughts and thoughts.strip():
        out["reasoning_content"] = thoughts
        # thoughts in the content as well: the same ones, or nobody knows which
        if inline := re.match(r"\s*<think>(.*?)</think>\s*", out["content"], re.DOTALL):
            if inline[1].strip() != thoughts.strip():
                raise UserError(f"{what} has thoughts in its content and others beside it: leave "
                                "one out")
            out["content"] = out["content"][inline.end():]
    if role != "assistant" and (wrong := [k for k in ("tool_calls", "reasoning_content")
                                          if k in out]):
        raise UserError(f"{what} is of the {role} and has {wrong[0]}, which only the assistant has")
    for name in ("name", "tool_call_id"):
        if value := keys.take(name):
            out[name] = text_of(value, f"{name} of {what}")
    if role == "system" and "tools" in keys:
        out["tools"] = read_tools(keys.take("tools"), f"tools of {what}")
    if not is_trained(keys, role, what) and role == "assistant":
        out["train"] = False
    keys.done()
    return out


def read_turns(value: Any, what: str, notes: Notes | None = None) -> Messages:
    """Read a list of turns, {"role", "content"} or ShareGPT's {"from", "value"}."""
    if not isinstance(value, list) or not value:
        raise UserError(f"{what} is {'empty' if value == [] else type(value).__name__}: it should "
                        "be a list of messages")
    return [read_turn(message, f"message {k} of {what}", notes or Notes())
            for k, message in enumerate(value, 1)]


if __name__ == "__main__":
    refuse_to_run()
