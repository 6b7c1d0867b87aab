"""Records of any published layout -> the conversations that a stage trains on.

    from data import layouts
    layouts.conversation({"instruction": "Hi", "output": "Hello"})          # {"messages": […]}
    layouts.preference({"prompt": "Hi", "chosen": "Hello", "rejected": "Go"})
    layouts.conversation({"messages": [], "mask": "User"})                  # UserError: 'mask'

Layouts: a list of messages under one of several keys; Alpaca and Dolly; trl's prompt and
completion, preferences and unpaired preferences; LLaMA-Factory's. Every key of a record is read,
is known to describe it, or is refused (data/messages.py). One thing spelled twice, as a system
column beside a system turn or a prompt beside the conversation that holds it, has to agree.
"""
from __future__ import annotations

from typing import Any, Callable

from config import UserError, refuse_to_run
from data.messages import (Keys, Messages, Notes, is_empty, read_tools,
                           read_turns, text_of)

CONVERSATION = ("messages", "conversations", "conversation")    # keys of a list of turns
# keys of what is asked, a text, and of what is answered (query: MetaMath; problem: NuminaMath)
QUESTION = ("instruction", "prompt", "question", "query", "problem")
ANSWER = ("output", "completion", "response", "solution", "answer")
# passed on as texts, for eval.py to check an answer by; `answer` is trained on where nothing else
# in ANSWER is there
KEPT = ("task", "answer")
KINDS = ("sft", "preference", "prompts", "labels")


# --- what stands beside the turns --------------------------------------------------------------
def take_extras(keys: Keys, *conversations: Messages) -> dict[str, Any]:
    """Take {"tools", "documents", "chat_template_kwargs"}, those that are there, for the template.

    Tools that a system turn holds are moved out of it.
    """
    found = keys.take_one(("tools", "functions"),
                          lambda v, name: read_tools(v, name, wrap=name == "functions"))
    for messages in conversations:
        for message in messages:
            inside = message.pop("tools", None)
            if inside and found and inside != found:
                raise UserError("the system turn has other tools than the record: leave one out")
            found = found or inside
    out = {"tools": found} if found else {}
    documents = keys.take("documents")
    more = keys.take("chat_template_kwargs")
    if not is_empty(documents):
        if not isinstance(documents, list):
            raise UserError(f"documents is a {type(documents).__name__}, not a list")
        out["documents"] = documents
    if not is_empty(more):
        # what render() is given by name cannot come from a record a second time
        taken = {"messages", "template", "add_generation_prompt", "max_length", "tools",
                 "documents", "tokenizer", "self"}
        if not isinstance(more, dict) or taken & more.keys():
            raise UserError("chat_template_kwargs is not an object of variables for the template")
        more = {k: v for k, v in more.items() if v is not None}
    if not is_empty(more):
        out["chat_template_kwargs"] = more
    return out


def render_options(record: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of tokenizer.render() that a record brings beside its messages."""
    return {**{k: record[k] for k in ("tools", "documents") if k in record},
            **record.get("chat_template_kwargs", {})}


def take_system(keys: Keys) -> str:
    """Take the system prompt in a column of its own."""
    return keys.take_one(("system", "system_prompt"), text_of) or ""


def with_system(system: str, messages: Messages) -> Messages:
    """Return the conversation with the text of a system column as its first turn, once."""
    if not system.strip():
        return messages
    if messages and messages[0]["role"] == "system":
        if messages[0]["content"].strip() != system.strip():
            raise UserError("the system column and the system turn say different things: leave one "
                            "out")
        return messages
    return [{"role": "system", "content": system}, *messages]


def plain(text: str) -> str:
    """Return a text with its white space evened out, by which two spellings are compared."""
    return " ".join(text.split())


def restates(text: str, messages: Messages, role: str) -> bool:
    """Tell whether a text beside a conversation is one of its turns, white space aside."""
    return any(m["role"] == role and plain(m["content"]) == plain(text) for m in messages)


def is_within(some: Messages, messages: Messages) -> bool:
    """Tell whether turns come one after the other in a conversation, white space aside."""
    short, long = ([(m["role"], plain(m["content"]), m.get("tool_calls")) for m in part]
                   for part in (some, messages))
    return any(long[i:i + len(short)] == short for i in range(len(long) - len(short) + 1))


def take_restated(keys: Keys, messages: Messages) -> None:
    """Take texts that only say again what the conversation says, as many published sets have.

    UltraChat has the first question under `prompt`, orpo-dpo-mix the last; Stanford's Alpaca has
    the whole record once more under `text`. A text that says something else stays, to be refused.
    """
    for name in (*QUESTION, *ANSWER):
        value = keys.values.get(name)
        role = "user" if name in QUESTION else "assistant"
        if isinstance(value, str) and restates(value, messages, role) or (
                isinstance(value, list) and is_within(read_turns(value, name), messages)):
            keys.take(name)
    whole = keys.values.get("text")
    if isinstance(whole, str) and all(plain(part) in plain(whole) for m in messages
                                      for part in m["content"].split("\n\n### Input:\n")):
        keys.take("text")


def as_context(messages: Messages) -> Messages:
    """Return the messages, none of which is trained on."""
    return [{**m, "train": False} if m["role"] == "assistant" else m for m in messages]


def take_kept(keys: Keys) -> None:
    """Take what is passed on to eval.py; where no task says so, that it is not learnt is told."""
    kept = {name: keys.take(name) for name in KEPT}
    if not is_empty(kept["answer"]) and is_empty(kept["task"]):
        keys.notes.metadata["answer"] += 1


# --- a record ----------------------------------------------------------------------------------
def read_question(keys: Keys) -> Messages:
    """Take what is asked in a record that spells it in keys of its own: Alpaca's, or a prompt."""
    name = keys.first(QUESTION)
    alpaca = name == "instruction" or name is None and "input" in keys
    if name is None and not alpaca:
        raise UserError(f"its keys are {keys.names()}; a conversation has "
                        f"{' or '.join(CONVERSATION[:2])}, or one of {', '.join(QUESTION)} and one "
                        f"of {', '.join(ANSWER)}: rename them")
    value = keys.take(name) if name else ""
    if isinstance(value, list):
        return read_turns(value, name, keys.notes)
    before: Messages = []
    history = keys.take("history") or []            # Alpaca with turns: [[question, answer], …]
    if not isinstance(history, list) or any(
            not isinstance(pair, (list, tuple)) or len(pair) != 2 for pair in history):
        raise UserError("history is not a list of [question, answer]")
    for question, answer in history:
        before += [{"role": "user", "content": text_of(question, "a question in history")},
                   {"role": "assistant", "content": text_of(answer, "an answer in history")}]
    given = text_of(value, name or "instruction")
    # Dolly's context is Alpaca's input; the template makes the rest of Alpaca's own prompt
    more = keys.take_one(("input", "context"), text_of) if alpaca else None
    if more and given.strip():
        given += f"\n\n### Input:\n{more}"
    return before + [{"role": "user", "content": given if given.strip() else more or given}]


def cut_at_empty_answer(messages: Messages, notes: Notes) -> Messages:
    """Cut a conversation at its first empty answer: training on one would teach silence."""
    for k, message in enumerate(messages):
        if (message["role"] == "assistant" and not message["content"].strip()
                and not message.get("tool_calls") and message.get("train") is not False):
            notes.events["empty answers, at which conversations were cut"] += 1
            return messages[:k]
    return messages


def read_answer(keys: Keys, name: str) -> Messages:
    """Take what is answered: turns (trl's completion), one turn (LLaMA-Factory's), or a text."""
    value = keys.take(name)
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    return read_turns([value] if isinstance(value, dict) else value, name, keys.notes)


def join_prompt(before: Messages, text: bool, answers: Messages, what: str) -> Messages:
    """Join a prompt and what follows it, where the second may hold the first.

    As trl's maybe_extract_prompt: where what follows is a whole conversation, it wins over a
    prompt that is a text. Here the text has to be in it all the same, or something would be lost.
    """
    if answers[0]["role"] == "assistant":
        if not before:
            raise UserError(f"{what} is an answer, and its prompt is not there: give that under "
                            f"prompt, or make {what} a list of messages that begins with it")
        if before[-1]["role"] == "assistant":
            raise UserError(f"the prompt before {what} ends with an answer already")
        return before + answers
    asked_before = [m for m in before if m["role"] == "user"]
    if is_within(before, answers) or text and all(
            restates(m["content"], answers, "user") for m in asked_before):
        return answers
    border = (before[-1]["role"], answers[0]["role"])
    if text or border not in (("assistant", "user"), ("system", "user")):
        raise UserError(f"the prompt is no part of the conversation in {what}: take one of them "
                        "out, or give --ignore_keys with the prompt's key")
    return before + answers                         # trl's explicit prompt: turns, then turns


def read_conversation(keys: Keys) -> Messages:
    """Take the conversation of a record with one answer; the prompt's own answers are context."""
    if any(name in keys for name in CONVERSATION):
        messages = keys.take_one(CONVERSATION, lambda v, name: read_turns(v, name, keys.notes))
        if messages is None:
            raise UserError("its list of messages is empty")
    else:
        turned = isinstance(keys.values.get(keys.first(QUESTION)), list)
        messages = as_context(read_question(keys)) if turned else read_question(keys)
        name = keys.first(ANSWER)
        if name is None:
            raise UserError(f"it has a question and none of {', '.join(ANSWER)}")
        answers = read_answer(keys, name)
        messages = join_prompt(messages, not turned, answers, name)
        if messages is answers:                     # which hold the prompt themselves
            messages = as_context(answers[:-1]) + answers[-1:]
    messages = with_system(take_system(keys), messages)
    take_kept(keys)
    take_restated(keys, messages)
    return messages


def conversation(record: dict[str, Any], notes: Notes | None = None) -> dict[str, Any]:
    """Turn a record of any layout for fine-tuning into {"messages"} and its take_extras()."""
    notes = notes or Notes()
    keys = Keys(record, "", notes)
    if "chosen" in keys and "rejected" in keys:
        raise UserError("it is a preference record (chosen, rejected), not a conversation")
    messages = read_conversation(keys)
    more = take_extras(keys, messages)
    keys.done()
    return {"messages": cut_at_empty_answer(messages, notes), **more}


def preference(record: dict[str, Any], notes: Notes | None = None) -> dict[str, Any] | None:
    """Turn two answers to one prompt into {"chosen", "rejected"}, both whole conversations; None
    where they are the same, which teaches nothing. One answer and a label: {"messages", "label"}.
    """
    notes = notes or Notes()
    keys = Keys(record, "", notes)
    if not ("chosen" in keys or "rejected" in keys) and ("label" in keys or "kto_tag" in keys):
        return unpaired(keys)
    if missing := [k for k in ("chosen", "rejected") if is_empty(keys.values.get(k))]:
        raise UserError(f"its keys are {keys.names()}; a preference has chosen and rejected, each "
                        f"an answer or a whole conversation, and {missing[0]} is not there: rename "
                        "them")
    both = {name: read_answer(keys, name) for name in ("chosen", "rejected")}
    before: Messages = []
    text = False
    if name := keys.first(CONVERSATION):
        before = read_turns(keys.take(name), name, notes)
        if any(is_within(before, messages) for messages in both.values()):
            before = []         # UltraFeedback has the chosen conversation here once more
    elif keys.first((*QUESTION, "input")):
        text = not isinstance(keys.values.get(keys.first(QUESTION)), list)
        before = read_question(keys)
    system = take_system(keys)
    out = {}
    for name, answers in both.items():
        whole = join_prompt(before, text, answers, name) if before or answers[0]["role"] == (
            "assistant") else answers
        out[name] = with_system(system, whole)
        last = out[name][-1]
        if last["role"] != "assistant" or not last["content"].strip() and not last.get(
                "tool_calls"):
            raise UserError(f"{name} does not end with an answer of the assistant")
    take_kept(keys)
    take_restated(keys, out["chosen"])
    out |= take_extras(keys, out["chosen"], out["rejected"])
    keys.done()
    if out["chosen"] == out["rejected"]:
        notes.events["pairs dropped, whose chosen and rejected are the same"] += 1
        return None
    return out


def unpaired(keys: Keys) -> dict[str, Any]:
    """Turn trl's prompt, completion and label, or a conversation and LLaMA-Factory's kto_tag, into
    the conversation, of which the completion alone is trained on, and whether it is good."""
    def read(value: Any, name: str) -> bool:
        word = str(value).strip().lower()           # a CSV has words
        if word not in ("0", "1", "true", "false"):
            raise UserError(f"{name} is {value!r}: true for a good completion, false for a bad one")
        return word in ("1", "true")

    label = keys.take_one(("label", "kto_tag"), read)
    turned = any(isinstance(keys.values.get(name), list) for name in ANSWER)
    messages = read_conversation(keys)
    more = take_extras(keys, messages)
    keys.done()
    last = messages[-1]
    if last["role"] != "assistant" or not last["content"].strip() and not last.get("tool_calls"):
        raise UserError("it does not end with an answer of the assistant")
    if not turned:                                  # then the last turn is the completion
        messages = as_context(messages[:-1]) + [last]
    return {"messages": messages, "label": label, **more}


def prompt(record: dict[str, Any], notes: Notes | None = None) -> dict[str, Any]:
    """Turn a record into {"prompt"[, "answer"]} to be answered; a last answer in it is the key."""
    notes = notes or Notes()
    keys = Keys(record, "", notes)
    keys.take("task")
    name = keys.first(CONVERSATION)
    messages = read_turns(keys.take(name), name, notes) if name else read_question(keys)
    messages = with_system(take_system(keys), messages)
    more = take_extras(keys, messages)
    out: dict[str, Any] = {}
    if messages[-1]["role"] == "assistant":
        last = messages.pop()["content"]
        out = {"answer": last} if last.strip() else {}
    name = next((name for name in reversed(ANSWER)
                 if isinstance(keys.values.get(name), (str, int, float))), None)
    if name:
        out["answer"] = str(keys.take(name))
    take_restated(keys, messages)
    keys.done()
    if not messages:
        raise UserError("there is no turn before the assistant's")
    return {"prompt": messages, **out, **more}


def labelled(record: dict[str, Any], notes: Notes | None = None, text_key: str = "text",
             label_key: str = "label") -> dict[str, Any]:
    """Turn a text and its class, a word or a number, into {"text", "label"}. The keys are found in
    any case."""
    keys = Keys(record, "", notes or Notes())
    found = []
    for wanted in (text_key, label_key):
        names = [k for k in keys.values if str(k).strip().lower() == wanted.strip().lower()]
        names = [wanted] if wanted in names else names
        found.append(keys.take(names[0]) if len(names) == 1 else None)
    text, label = found
    label = label.strip() if isinstance(label, str) else label
    if text is not None and not isinstance(text, str):
        raise UserError(f"{text_key} is a {type(text).__name__} where a text should be")
    if label is not None and not isinstance(label, (str, int)):
        raise UserError(f"{label_key} is {label!r:.40}, expected a word or a whole number")
    if not isinstance(text, str) or not isinstance(label, (str, int)) or label == "":
        raise UserError(f"a record to classify needs a {text_key} and a {label_key}; its keys are "
                        f"{', '.join(map(repr, record)) or 'none'} (--text_key and --label_key "
                        "name others)")
    if not str(label).isprintable():        # answers are printed one per line, between tabs
        raise UserError(f"{label_key} is {str(label)[:40]!r}: a label is one line, without tabs")
    keys.done()
    return {"text": text, "label": str(label)}


ADAPTERS: dict[str, Callable] = dict(zip(KINDS, (conversation, preference, prompt, labelled)))


if __name__ == "__main__":
    refuse_to_run()
