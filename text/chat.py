"""Chat templates: a conversation -> ids, with a mask of what the model is trained to say.

    ids, mask = tokenizer.render([{"role": "user", "content": "Hi"},
                                  {"role": "assistant", "content": "Hello!"}])

A model that brings a chat template is rendered by it: text/chat_template.py runs the Jinja text of
its directory. The rows of TEMPLATES are for models that bring none, and for --template=: what
stands before and after the content of each role. The same row writes the Jinja template that a
checkpoint carries, so that transformers' apply_chat_template gives the same ids (tested); a saved
text that is exactly a row's is rendered by the row, which is faster, and any other by Jinja.
Sources of the rows: the chat templates that Llama 2 and 3, Mistral, Qwen, Gemma, ChatGLM3, GLM-4,
MiniCPM, SmolLM2 and Zephyr publish with their weights; Alpaca's prompt from Stanford's repository.
Tools and their calls are written as Qwen does, in the rows with <|im_start|>; the others refuse
them. A tool's answer is a turn like any other.

The mask is 1 on the content of every assistant turn and on the token that ends the turn, and
nowhere else. Masks that get this wrong train a model that never stops, or that talks to itself.
"""
from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Callable, Iterator, Protocol

from config import UserError, refuse_to_run
from text import chat_template
from text.chat_template import ROLES, Rendered, split_thoughts
from text.sandbox import compile_template

EOT = "<|endoftext|>"           # the end of text where a tokenizer names none


class Tokenizer(Protocol):
    """What rendering reads of a tokenizer; tokenizer.py has the class."""
    eot_token: str | None           # the end of text, if it has one
    added: dict[str, dict]          # added tokens -> their flags
    template: str | None            # a name in TEMPLATES
    jinja: str                      # the directory's own template; "": none
    jinjas: dict[str, str]          # all of its templates by name


@dataclass(frozen=True)
class Template:
    """How a family of models writes a conversation. {eot} is the tokenizer's own end of text."""
    name: str
    header: dict[str, str]          # role -> what precedes the content
    end: str                        # what follows the assistant's content
    tokens: str                     # the control tokens in all of these, separated by spaces
    others_end: str | None = None   # what follows the other roles' content; None: `end` as well
    begin: str = ""                 # opens a conversation
    system: str | None = None       # the system message if the conversation has none
    trim: bool = False              # white space around content is stripped
    fold: str = ""                  # no system role: its text opens the next user turn, so written
    lead: str = ""                  # opens the assistant's content; the model writes it itself
    closing: str = ""               # the next header ends a turn; this ends the conversation
    think: bool = False             # thoughts precede an answer: <think>\n…\n</think>\n\n
    tools: bool = False             # tools and their calls have words: TOOLS, <tool_call>

    def after(self, role: str, eot: str) -> str:
        """Return what follows the content of `role`."""
        end = self.end if role == "assistant" or self.others_end is None else self.others_end
        return end.replace("{eot}", eot)

    def control(self, eot: str) -> list[str]:
        """Return the control tokens that a tokenizer needs for this template."""
        return self.tokens.replace("{eot}", eot).split()

    def stops(self, eot: str) -> list[str]:
        """Return the control tokens that end a turn of the model, besides the end of text."""
        text = self.after("assistant", eot)
        text += self.header["user"] + self.header["tool"] if self.closing else ""
        return [t for t in self.control(eot) if t in text]

    def default_system(self, eot: str) -> str:
        """Return the system turn of a conversation that has none."""
        return self.header["system"] + self.system + self.after("system", eot)


def same(form: str, **names: str) -> dict[str, str]:
    """Return a header for each role: same("<|{}|>")["user"] is "<|user|>"; `names` renames."""
    return {role: form.format(names.get(role, role)) for role in ROLES}


NO_THOUGHTS = "<think>\n\n</think>\n\n"
TOOLS = ("# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are "
         "provided with function signatures within <tools></tools> XML tags:\n<tools>",
         "\n</tools>\n\nFor each function call, return a json object with function name and "
         "arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n{\"name\": "
         "<function-name>, \"arguments\": <args-json-object>}\n</tool_call>")
CALL = ('<tool_call>\n{"name": "', '", "arguments": ', "}\n</tool_call>")
_CHATML = dict(header=same("<|im_start|>{}\n"), end="<|im_end|>\n",
               tokens="<|im_start|> <|im_end|>", tools=True)
_LLAMA3 = dict(header=same("<|start_header_id|>{}<|end_header_id|>\n\n", tool="ipython"),
               end="<|eot_id|>", begin="<|begin_of_text|>", trim=True,
               tokens="<|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|>")
_DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
_ROLES = "<|system|> <|user|> <|assistant|> <|observation|>"
_INST = {"system": "", "user": "[INST] ", "assistant": "", "tool": "[INST] "}
_BOS_INST = {**_INST, "user": "<s>[INST] ", "tool": "<s>[INST] "}
TEMPLATES = {row.name: row for row in (
    # chatml and those with a system turn of their own
    Template("chatml", **_CHATML),
    Template("smollm2", **_CHATML,
             system="You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
    Template("qwen2", **_CHATML, system="You are a helpful assistant."),
    Template("qwen2.5", **_CHATML, system="You are Qwen, created by Alibaba Cloud. You are a "
             "helpful assistant."),
    Template("qwen3", **_CHATML, think=True),
    Template("llama3", **_LLAMA3),
    # 3.1 and 3.2 tell the model two dates; theirs may ask for today's, ours stays the default
    Template("llama3.1", **{**_LLAMA3, "header": {**_LLAMA3["header"], "system": _LLAMA3["header"][
             "system"] + _DATES}}, system=""),
    Template("llama2", _BOS_INST, " {eot}", "<s> {eot}", others_end=" [/INST]", trim=True,
             fold="<<SYS>>\n{}\n<</SYS>>\n\n", lead=" "),
    # the plain-text form of 7B v0.1 and v0.2; later ones have other spaces
    Template("mistral", _INST, "{eot}", "<s> {eot}", others_end=" [/INST]", begin="<s>",
             fold="{}\n\n", lead=" "),
    Template("gemma", same("<start_of_turn>{}\n", assistant="model"), "<end_of_turn>\n",
             "<bos> <start_of_turn> <end_of_turn>", begin="<bos>", trim=True, fold="{}\n\n"),
    Template("glm4", same("<|{}|>\n", tool="observation"), "", f"[gMASK] <sop> {_ROLES}",
             begin="[gMASK]<sop>", closing="<|user|>"),
    # the model writes the newline (an empty name of a tool), the space and its answer
    Template("chatglm3", {**same("<|{}|>\n ", tool="observation"), "assistant": "<|assistant|>"},
             "", f"[gMASK] sop {_ROLES}", begin="[gMASK]sop", lead="\n ", closing="<|user|>"),
    Template("zephyr", same("<|{}|>\n"), "{eot}\n", "{eot}"),
    # These two separate turns by plain words, which a user can type as well.
    Template("minicpm", {"system": "", "user": "<用户>", "assistant": "<AI>", "tool": ""},
             "{eot}", "{eot}", others_end="", trim=True),
    Template("alpaca", {"system": "", "user": "### Instruction:\n", "tool": "### Input:\n",
                        "assistant": "### Response:\n"}, "{eot}", "{eot}",
             others_end="\n\n", system="Below is an instruction that describes a task. Write a "
             "response that appropriately completes the request."),
)}


def find(name: str | None) -> Template:
    """Return the row of a name."""
    if name in TEMPLATES:
        return TEMPLATES[name]
    what = (f"unknown chat template {name!r}" if name else "the tokenizer has no chat template")
    raise UserError(f"{what}: choose one with --template={' | '.join(TEMPLATES)}")


def choose(tokenizer: Tokenizer, name: str | None = None, tools: Any = None) -> Template | str:
    """Return what renders a conversation: a row, or the Jinja text of the model's own template.

    name: of a row or of one of the model's templates, where it has several; None: the model's own,
    for tools the one that is named tool_use, as in transformers.
    """
    if name and name not in TEMPLATES and name in tokenizer.jinjas:
        return tokenizer.jinjas[name]
    if name or tokenizer.template:
        return find(name or tokenizer.template)
    if tools is not None and "tool_use" in tokenizer.jinjas:
        return tokenizer.jinjas["tool_use"]
    if not tokenizer.jinja and tokenizer.jinjas:
        raise UserError("the model has several chat templates and none by default: choose one with "
                        f"--template={' | '.join(tokenizer.jinjas)}")
    return tokenizer.jinja or find(None)


def read_variables(chosen: Template | str) -> frozenset[str]:
    """Return the variables that a template reads, besides messages: tools, enable_thinking, …"""
    if isinstance(chosen, str):
        return compile_template(chosen).names
    return frozenset(name for name, there in (("tools", chosen.tools),
                                              ("enable_thinking", chosen.think)) if there)


def refuse_unread(tokenizer: Tokenizer, template: str | None, **given: Any) -> None:
    """Raise UserError for what the template would drop in silence: tools, documents, switches."""
    given = {k: v for k, v in given.items() if v is not None}
    if not given:
        return
    chosen = choose(tokenizer, template, given.get("tools"))
    if unread := sorted(given.keys() - read_variables(chosen)):
        whose = f"the chat template {chosen.name}" if isinstance(chosen, Template) else (
            "the model's chat template")
        raise UserError(f"{whose} has no place for {', '.join(unread)}: leave it out, or give "
                        "another with --template=")


# ------------------------------------------------------------------------- rendering with a row


def read_words(row: Template, message: dict[str, Any], k: int) -> tuple[str, str]:
    """Return (thoughts, content with its tool calls) of message k of a conversation, checked."""
    content = message.get("content") or ""
    thought = ""
    if not isinstance(content, str):
        raise UserError(f"message {k} has a {type(content).__name__} as content, and the chat "
                        f"template {row.name} writes text alone")
    content = content.strip() if row.trim else content
    if message.get("role") != "assistant":
        return "", content
    thought = next((message[n] for n in chat_template.REASONING if message.get(n)), "")
    calls = message.get("tool_calls") or []
    if calls and not row.tools:
        raise UserError(f"message {k} calls a tool, for which the chat template {row.name} has no "
                        "words: choose --template=chatml or another with <|im_start|>")
    if row.think and not thought:
        thought, content = split_thoughts(content)
    thought = thought.strip("\n")
    if thought and not row.think:       # a model that never learnt to drop them: they are text
        thought, content = "", f"<think>\n{thought}\n</think>\n\n{content}"
    for call in calls:
        call = call.get("function", call)
        arguments = call.get("arguments")
        arguments = arguments if isinstance(arguments, str) else json.dumps(
            arguments, ensure_ascii=False)
        content += "\n" * bool(content) + call["name"].join(CALL[:2]) + arguments + CALL[2]
    return thought, content


def parts(row: Template, messages: list[dict], eot: str, prompt: bool, thinking: bool = True,
          tools: list | None = None) -> Iterator[tuple[str, int, bool, int]]:
    """Yield (text, said by an assistant, written by the template, message) in order."""
    chat_template.check_messages(messages)
    yield row.begin, 0, True, 0
    first = messages[0].get("role") == "system"
    if tools:
        yield row.header["system"], 0, True, 0
        before = read_words(row, messages[0], 1)[1] if first else row.system or ""
        yield before + "\n\n" * bool(before), 0, False, 0
        yield TOOLS[0], 0, True, 0
        yield "".join("\n" + json.dumps(t, ensure_ascii=False) for t in tools), 0, False, 0
        yield TOOLS[1] + row.after("system", eot), 0, True, 0
    elif row.system is not None and not first:
        yield row.default_system(eot), 0, True, 0
    folded = ""
    last = ""
    asked = max((k for k, m in enumerate(messages, 1) if m["role"] == "user"), default=0)
    for k, message in enumerate(messages, 1):
        role = message["role"]
        thought, content = read_words(row, message, k)
        if role == "system" and row.fold:
            folded = row.fold.format(content)
            continue
        if role == "system" and tools and k == 1:       # it stands before the tools, above
            continue
        # GLM-4 has no end token: the header that follows tells the model's turn is over
        yield row.header[role], int(bool(row.closing) and last == "assistant"), True, k - 1
        if role == "user":
            content = folded + content
            folded = ""
        # only the newest answer keeps its thoughts, old ones would fill the context
        if thought and k > asked:
            content = f"<think>\n{thought}\n</think>\n\n" + content.lstrip("\n")
        elif role == "assistant" and row.think and k > asked and k == len(messages):
            yield NO_THOUGHTS, 0, True, k
            content = content.lstrip("\n")
        speaks = int(role == "assistant")
        yield (row.lead if speaks else "") + content, speaks, False, k
        yield row.after(role, eot), speaks, True, k
        last = role
    if prompt:
        yield row.header["assistant"], 0, True, 0
        if row.think and not thinking:
            yield NO_THOUGHTS, 0, True, 0
    elif last == "assistant":
        yield row.closing, 1, True, len(messages)


def render_row(tokenizer: Tokenizer, row: Template, messages: list[dict], prompt: bool,
               thinking: bool, tools: list | None) -> Rendered:
    """Render a conversation by a row. UserError for control tokens that the tokenizer lacks."""
    eot = tokenizer.eot_token or EOT
    control = row.control(eot)
    if missing := [t for t in control if t not in tokenizer.added]:
        raise UserError(f"the tokenizer lacks {', '.join(missing)} of the chat template "
                        f"{row.name}: add_special_tokens() gives it new ids for them")
    controls = chat_template.find_controls(tokenizer, row.name, lambda: (" ".join(control), ""))
    typed = chat_template.choose_mark([messages, tools])
    asked = max((k for k, m in enumerate(messages, 1) if m.get("role") == "user"), default=0)
    lost = {k - 1: "the template drops its thoughts" for k, m in enumerate(messages[:asked], 1)
            if row.think and m.get("role") == "assistant" and m.get("train") is not False
            and read_words(row, m, k)[0]}
    texts: list[str] = []
    spans: list[tuple[int, int, bool]] = []
    at = 0
    for text, speaks, ours, k in parts(row, messages, eot, prompt, thinking, tools):
        end = len(text)
        if not ours:
            text = chat_template.escape(text, controls, typed, frozenset() if speaks else None)
            end = len(text)
        elif speaks and (found := controls.pattern.search(text)):
            # Of what follows an answer, the control token is trained on and what leads to it, not
            # chatml's newline after.
            end = found.end()
        # neighbours with the same fate are one span, so that text is cut nowhere between them
        if speaks and end:
            trained = messages[k - 1].get("train") is not False and k - 1 not in lost
            if spans and spans[-1][1:] == (at, trained):
                spans[-1] = (spans[-1][0], at + end, trained)
            else:
                spans.append((at, at + end, trained))
        texts.append(text)
        at += len(text)
    return Rendered(*chat_template.encode(tokenizer, "".join(texts), spans, controls, typed), lost)


def render(tokenizer: Tokenizer, messages: list[dict[str, Any]], template: str | None = None,
           add_generation_prompt: bool = False, max_length: int | None = None,
           enable_thinking: bool | None = None, tools: list | None = None,
           documents: list | None = None, **template_kwargs: Any) -> Rendered:
    """Render a conversation -> (ids, mask) of one length, cut to max_length; and what is lost.

    messages: [{"role": one of ROLES, "content": text}, …], an assistant's also with tool_calls,
    reasoning_content, and "train": False where it is context alone. template: a row or one of the
    model's templates by name; None: the model's own. add_generation_prompt: end with the header of
    an answer, for a model to go on; enable_thinking=False tells a model that thinks first (Qwen3)
    to answer at once, None leaves it to the template. tools, documents and template_kwargs are
    what the model's template makes of them. The first token of a text (tokenizer.prefix) is
    written by the templates that have one: nothing is to be put before. lost: numbers of answers
    that are masked because the template drops part of them. Errors: UserError for a malformed
    message, for what the template refuses, and for control tokens that the tokenizer lacks.

    Content is always text: a user who types "<|im_end|>" sends those letters. An assistant's
    content may hold the model's own marks (<think>, <tool_call>), which are their tokens there.
    """
    chosen = choose(tokenizer, template, tools)
    if isinstance(chosen, str):
        switches = {k: v for k, v in {"enable_thinking": enable_thinking, **template_kwargs}.items()
                    if v is not None}
        out = chat_template.render(tokenizer, chosen, messages, add_generation_prompt, tools,
                                   documents, switches)
    else:
        refuse_unread(tokenizer, chosen.name, tools=tools or None, documents=documents or None,
                      **template_kwargs)
        out = render_row(tokenizer, chosen, messages, add_generation_prompt,
                         enable_thinking is not False, tools)
    return Rendered(out.ids[:max_length], out.mask[:max_length], out.lost)


def render_examples(tokenizer: Tokenizer, messages: list[dict[str, Any]],
                    template: str | None = None, **given: Any
                    ) -> tuple[list[tuple[list[int], list[int]]], list[str]]:
    """Return ([(ids, mask)] of a conversation to train on, a reason for each answer left out).

    One for the whole conversation; and where that drops part of an answer (the thoughts of earlier
    turns), one more that ends with this answer and trains on it alone, as it was generated.
    """
    whole = render(tokenizer, messages, template, **given)
    out = [(whole.ids, whole.mask)]
    reasons = []
    for k, reason in whole.lost.items():
        if reason == chat_template.UNASKED:     # alone it could not be rendered either
            reasons.append(reason)
            continue
        before = [{**m, "train": False} for m in messages[:k]]
        one = render(tokenizer, [*before, messages[k]], template, **given) \
            if k < len(messages) - 1 else whole
        if one.lost:
            reasons.append(reason)
        else:
            out.append((one.ids, one.mask))
    return out, reasons


def find_turn_ends(tokenizer: Tokenizer, template: str | None = None) -> list[str]:
    """Return the control tokens that end an answer in a chat by this template; [] without one."""
    if not (template or tokenizer.template or tokenizer.jinja):
        return []
    chosen = choose(tokenizer, template)
    if isinstance(chosen, str):
        return chat_template.find_turn_ends(tokenizer, chosen)
    return chosen.stops(tokenizer.eot_token or EOT)


def inherit_template(tokenizer: Tokenizer, other: Tokenizer) -> None:
    """Give a tokenizer the templates that another one brought."""
    tokenizer.template = other.template
    tokenizer.facts.jinjas = dict(other.jinjas)
    tokenizer.facts.jinja_files = True


def find_stop_ids(tokenizer: Tokenizer, template: str | None = None) -> set[int]:
    """Return the ids that end an answer in a chat by this template. UserError if there is none."""
    choose(tokenizer, template)
    ends = find_turn_ends(tokenizer, template)
    return {*tokenizer.stop_ids, *(tokenizer.added[n]["id"] for n in ends if n in tokenizer.added)}


def fit(render: Callable, messages: list[dict], room: int) -> list[int]:
    """Return the conversation as ids, without its oldest exchanges if `room` is too small.

    The system message stays, and so does the last turn. Changes `messages`.
    """
    while True:
        ids = render(messages)
        first = int(messages[0]["role"] == "system")
        if len(ids) <= room or len(messages) <= first + 1:
            return ids
        del messages[first:first + 2]


def find_row(source: str, eot: str) -> str | None:
    """Return the row that a Jinja template is exactly the text of; None for any other text."""
    name = source.partition("{# ")[2].partition(" #}")[0]
    return name if name in TEMPLATES and jinja(TEMPLATES[name], eot) == source else None


def answer_jinja(row: Template, content: str) -> list[str]:
    """Return what read_words() and parts() do with an assistant's message, in Jinja."""
    block = "'<think>\\n' ~ ns.thought ~ '\\n</think>\\n\\n'"
    out = ["{% set ns.thought = m['reasoning_content'] or '' %}"
           "{% set ns.answer = " + content.replace("m['content']", "(m['content'] or '')") + " %}"]
    # thoughts in the content count where none stand beside it: split_thoughts()
    if row.think:
        out.append("{% if not ns.thought %}{% set p = ns.answer.rpartition('</think>') %}"
                   "{% set ns.thought = p[0].rpartition('<think>')[2] %}"
                   "{% set ns.answer = p[2].lstrip('\\n') if p[1] else p[2] %}{% endif %}")
    out.append("{% set ns.thought = ns.thought.strip('\\n') %}")
    if not row.think:
        out.append("{% if ns.thought %}{% set ns.answer = " + block + " ~ ns.answer %}{% endif %}")
    if row.tools:
        out.append("{% for call in m['tool_calls'] or [] %}{% set f = call['function'] or call %}"
                   "{% set arguments = f['arguments'] if f['arguments'] is string else "
                   "(f['arguments'] | tojson) %}"
                   "{% set ns.answer = ns.answer ~ ('\\n' if ns.answer else '') ~ "
                   + f"{json.dumps(CALL[0])} ~ f['name'] ~ {json.dumps(CALL[1])} ~ arguments ~ "
                   + json.dumps(CALL[2]) + " %}{% endfor %}")
    if not row.think:
        return [*out, "{{ ns.answer }}"]
    # thoughts behind the last question are kept, and an answer without any says that it has none
    return [*out, "{% if loop.index0 > ns.asked and ns.thought %}"
            "{{ " + block + " ~ ns.answer.lstrip('\\n') }}"
            "{% elif loop.index0 > ns.asked and loop.last %}{{ " + json.dumps(NO_THOUGHTS) +
            " ~ ns.answer.lstrip('\\n') }}{% else %}{{ ns.answer }}{% endif %}"]


def jinja(row: Template, eot: str) -> str:
    """Return the row as a Jinja template, signed with its name in a comment."""
    def say(text: str) -> str:
        # as an expression, since white space beside {% … %} is trimmed
        return "{{ " + json.dumps(text) + " }}" if text else ""

    content = "(m['content'] | trim)" if row.trim else "m['content']"
    out = [f"{{# {row.name} #}}", say(row.begin)]
    if row.tools:
        first = "messages[0]['content'] if messages[0]['role'] == 'system'"
        out += ["{% if tools %}", say(row.header["system"]), "{% set s = " + first + " else " +
                json.dumps(row.system or "") + " %}{{ s ~ '\\n\\n' if s else '' }}", say(TOOLS[0]),
                "{% for t in tools %}{{ '\\n' ~ (t | tojson) }}{% endfor %}",
                say(TOOLS[1] + row.after("system", eot)), "{% endif %}"]
    # with tools, the row's default is part of the turn above
    if row.system is not None:
        out += ["{% if messages[0]['role'] != 'system'" + " and not tools" * row.tools + " %}",
                say(row.default_system(eot)), "{% endif %}"]
    # Jinja forgets what a loop assigns, except to a namespace.
    out.append("{% set ns = namespace(folded='', asked=-1) %}")
    if row.think:
        out.append("{% for m in messages %}{% if m['role'] == 'user' %}"
                   "{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}")
    out.append("{% for m in messages %}")
    for role in ROLES:
        out.append("{% if m['role'] == '" + role + "' %}")
        # kept for the next user's turn
        if role == "system" and row.fold:
            before, after = map(json.dumps, row.fold.split("{}"))
            out.append("{% set ns.folded = " + f"{before} ~ {content} ~ {after}" + " %}")
        elif role == "user" and row.fold:
            out += [say(row.header[role]), "{{ ns.folded ~ " + content + " }}",
                    say(row.after(role, eot)), "{% set ns.folded = '' %}"]
        elif role == "assistant":
            out += [say(row.header[role]), say(row.lead), *answer_jinja(row, content),
                    say(row.after(role, eot))]
        elif role == "system" and row.tools:
            out += ["{% if not (tools and loop.first) %}", say(row.header[role]),
                    "{{ " + content + " }}", say(row.after(role, eot)), "{% endif %}"]
        else:
            out += [say(row.header[role]), "{{ " + content + " }}", say(row.after(role, eot))]
        out.append("{% endif %}")
    out.append("{% endfor %}{% if add_generation_prompt %}" + say(row.header["assistant"]))
    if row.think:
        out += ["{% if enable_thinking is defined and not enable_thinking %}", say(NO_THOUGHTS),
                "{% endif %}"]
    out.append("{% elif messages[-1]['role'] == 'assistant' %}" + say(row.closing))
    return "".join(out) + "{% endif %}"


if __name__ == "__main__":
    refuse_to_run()
