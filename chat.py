"""Chat templates: a conversation -> ids, with a mask of what the model is trained to say.

    ids, mask = tokenizer.render([{"role": "user", "content": "Hi"},
                                  {"role": "assistant", "content": "Hello!"}])

A template is a row of TEMPLATES: what stands before and after the content of each role. The same
row writes the Jinja template that a checkpoint carries, so that transformers' apply_chat_template
gives the same ids (tested). Sources: the chat templates that Llama 2 and 3, Mistral, Qwen, Gemma,
ChatGLM3, GLM-4, MiniCPM, SmolLM2 and Zephyr publish with their weights; Alpaca's prompt from
Stanford's repository. Tools are beyond them: a tool's answer is a turn like any other.

Somebody else's Jinja template is not run but recognised, by the literal text in it. A wrong guess
would talk to a model in a language it never saw, without an error: so all marks of a row have to
be there, no other row may fit, and a control token that the row does not know rules it out.

The mask is 1 on the content of every assistant turn and on the token that ends the turn, and
nowhere else. Masks that get this wrong train a model that never stops, or that talks to itself.
"""
from __future__ import annotations

import json
import re
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Callable, Iterator

from bpe import any_of
from config import UserError, refuse_to_run

if TYPE_CHECKING:
    from tokenizer import Tokenizer

ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Template:
    """How a family of models writes a conversation. {eot} is the tokenizer's own end of text."""
    name: str
    header: dict[str, str]          # role -> what precedes the content
    end: str                        # what follows the assistant's content
    tokens: str                     # the control tokens in all of these, separated by spaces
    marks: tuple[str, ...]          # regular expressions: all of them are in this family's Jinja
    others_end: str | None = None   # what follows the other roles' content; None: `end` as well
    begin: str = ""                 # opens a conversation
    system: str | None = None       # the system message if the conversation has none
    trim: bool = False              # white space around content is stripped
    fold: str = ""                  # no system role: its text opens the next user turn, so written
    lead: str = ""                  # opens the assistant's content; the model writes it itself
    closing: str = ""               # the next header ends a turn; this ends the conversation
    think: bool = False             # thoughts precede an answer: <think>\n…\n</think>\n\n
    extras: str = ""                # control tokens that only its Jinja has (tools, images)

    def after(self, role: str, eot: str) -> str:
        """What follows the content of `role`."""
        end = self.end if role == "assistant" or self.others_end is None else self.others_end
        return end.replace("{eot}", eot)

    def control(self, eot: str) -> list[str]:
        """The control tokens that a tokenizer needs for this template."""
        return self.tokens.replace("{eot}", eot).split()

    def stops(self, eot: str) -> list[str]:
        """The control tokens a model writes when its turn is over, besides the end of text."""
        text = self.after("assistant", eot)
        text += self.header["user"] + self.header["tool"] if self.closing else ""
        return [t for t in self.control(eot) if t in text]

    def default_system(self, eot: str) -> str:
        return self.header["system"] + self.system + self.after("system", eot)


def same(form: str, **names: str) -> dict[str, str]:
    """One header for all roles: same("<|{}|>")["user"] == "<|user|>"; `names` renames roles."""
    return {role: form.format(names.get(role, role)) for role in ROLES}


NO_THOUGHTS = "<think>\n\n</think>\n\n"
_CHATML = dict(header=same("<|im_start|>{}\n"), end="<|im_end|>\n",
               tokens="<|im_start|> <|im_end|>")
_LLAMA3 = dict(header=same("<|start_header_id|>{}<|end_header_id|>\n\n", tool="ipython"),
               end="<|eot_id|>", begin="<|begin_of_text|>", trim=True,
               tokens="<|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|>")
_DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
_ROLES = "<|system|> <|user|> <|assistant|> <|observation|>"
_INST = {"system": "", "user": "[INST] ", "assistant": "", "tool": "[INST] "}
_BOS_INST = {**_INST, "user": "<s>[INST] ", "tool": "<s>[INST] "}
# In marks, quotes are ' and escapes are resolved: see recognise(). (?!.*…): … is nowhere in it.
# Plain chatml says nothing of its own: no thoughts, no first token, no system text by default.
_PLAIN = (r"^(?!.*(?:<think>|bos_token|You are|<\|im_start\|>system\n[^'{\s]"
          r"|else *-?%\}\s*\{\{-? *'[A-Z][a-z]+ ))")
TEMPLATES = {row.name: row for row in (
    # chatml and those with a system turn of their own
    Template("chatml", **_CHATML, marks=(r"<\|im_start\|>", _PLAIN)),
    Template("smollm2", **_CHATML, marks=(r"<\|im_start\|>", "named SmolLM", "^(?!.*<think>)"),
             system="You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
    Template("qwen2", **_CHATML, marks=(r"<\|im_start\|>system\nYou are a helpful assistant\.<",),
             system="You are a helpful assistant."),
    Template("qwen2.5", **_CHATML, marks=(r"<\|im_start\|>", "You are Qwen, created by Alibaba "
             r"Cloud\. You are a helpful assistant\.", "^(?!.*<think>)"), system="You are Qwen, "
             "created by Alibaba Cloud. You are a helpful assistant."),
    Template("qwen3", **_CHATML, marks=(r"<\|im_start\|>", "<think>\n\n</think>\n\n",
                                        "enable_thinking", "^(?!.*You are)"), think=True),
    Template("llama3", **_LLAMA3, marks=(r"<\|start_header_id\|>", "^(?!.*Cutting Knowledge)")),
    # 3.1 and 3.2 tell the model two dates; theirs may ask for today's, ours stays the default
    Template("llama3.1", **{**_LLAMA3, "header": {**_LLAMA3["header"], "system": _LLAMA3["header"][
             "system"] + _DATES}}, marks=(r"<\|start_header_id\|>", "Cutting Knowledge Date: "
             "December 2023\n", "26 Jul 2024"), system="", extras="<|python_tag|> <|eom_id|>"),
    Template("llama2", _BOS_INST, " {eot}", "<s> {eot}", (r"\[INST\]", r"<<SYS>>\n", "bos_token"),
             others_end=" [/INST]", trim=True, fold="<<SYS>>\n{}\n<</SYS>>\n\n", lead=" "),
    # the plain-text form of 7B v0.1 and v0.2; later ones have other spaces
    Template("mistral", _INST, "{eot}", "<s> {eot}", (r"\[INST\] ", r" \[/INST\]", "^(?!.*<<SYS>>)",
             "bos_token"), others_end=" [/INST]", begin="<s>", fold="{}\n\n", lead=" "),
    Template("gemma", same("<start_of_turn>{}\n", assistant="model"), "<end_of_turn>\n",
             "<bos> <start_of_turn> <end_of_turn>", ("<start_of_turn>", "bos_token"), begin="<bos>",
             trim=True, fold="{}\n\n"),
    Template("glm4", same("<|{}|>\n", tool="observation"), "", f"[gMASK] <sop> {_ROLES}",
             (r"\[gMASK\]<sop>", "^(?!.*<think>)"), begin="[gMASK]<sop>", closing="<|user|>",
             extras="<|begin_of_image|> <|endoftext|> <|end_of_image|>"),
    # the model writes the newline (an empty name of a tool), the space and its answer
    Template("chatglm3", {**same("<|{}|>\n ", tool="observation"), "assistant": "<|assistant|>"},
             "", f"[gMASK] sop {_ROLES}", (r"\[gMASK\]sop",), begin="[gMASK]sop", lead="\n ",
             closing="<|user|>"),
    Template("zephyr", same("<|{}|>\n"), "{eot}\n", "{eot}", tuple(
             rf"<\|{role}\|>\n' ?\+ ?message\[?\.?'?content'?\]? ?\+ ?eos_token" for role in
             ("user", "system", "assistant")) + ("^(?!.*bos_token)",),
             extras="<|user|> <|system|> <|assistant|>"),
    # These two separate turns by plain words, which a user can type as well.
    Template("minicpm", {"system": "", "user": "<用户>", "assistant": "<AI>", "tool": ""},
             "{eot}", "{eot}", ("<用户>", "<AI>"), others_end="", trim=True),
    Template("alpaca", {"system": "", "user": "### Instruction:\n", "tool": "### Input:\n",
                        "assistant": "### Response:\n"}, "{eot}", "{eot}", ("### Instruction:",
             "### Response:", "Below is an instruction that describes a task"),
             others_end="\n\n", system="Below is an instruction that describes a task. Write a "
             "response that appropriately completes the request."),
)}


def find(name: str | None, foreign: bool = False) -> Template:
    """The row of a name. foreign: the model has a template, one that nobody here knows."""
    if name in TEMPLATES:
        return TEMPLATES[name]
    what = (f"{name!r} is not a chat template" if name else
            "the model's chat template is none that this program knows" if foreign else
            "the tokenizer has no chat template")
    raise UserError(f"{what}: choose one with --template={' | '.join(TEMPLATES)}")


def recognise(jinja: str) -> str | None:
    """The row that a Jinja template belongs to: ours are signed in a comment, others marked."""
    if signed := [n for n in TEMPLATES if f"{{# {n} #}}" in jinja]:
        return signed[0]
    text = jinja.replace("\\n", "\n").replace('\\"', "'").replace("\\'", "'").replace('"', "'")
    found = set(re.findall(r"<\|\w+\|>", text))
    fitting = [n for n, row in TEMPLATES.items()
               if all(re.search(mark, text, re.DOTALL) for mark in row.marks)
               and found <= {*row.control(""), *row.extras.split()}]
    return fitting[0] if len(fitting) == 1 else None


def thoughts(content: str) -> tuple[str, str]:
    """(thoughts, answer) of an assistant's content; thoughts are between <think> and </think>."""
    before, end, answer = content.rpartition("</think>")
    return before.rpartition("<think>")[2].strip("\n"), answer.lstrip("\n") if end else answer


def parts(row: Template, messages: list[dict], eot: str, prompt: bool, thinking: bool = True
          ) -> Iterator[tuple[str, int, bool]]:
    """A conversation in order, as (text, trained on, written by the template)."""
    if not messages:
        raise UserError("a conversation needs at least one message")
    yield row.begin, 0, True
    if row.system is not None and messages[0].get("role") != "system":
        yield row.default_system(eot), 0, True
    folded, last = "", ""
    asked = max((k for k, m in enumerate(messages, 1) if m.get("role") == "user"), default=0)
    for k, message in enumerate(messages, 1):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES or not isinstance(content, str):
            raise UserError(f"message {k} needs a role ({', '.join(ROLES)}) and a text as content; "
                            f"it has the role {role!r} and {type(content).__name__} as content")
        content = content.strip() if row.trim else content
        if role == "system" and row.fold:
            folded = row.fold.format(content)
            continue
        # GLM-4 has no end token: the header that follows tells the model's turn is over
        yield row.header[role], int(bool(row.closing) and last == "assistant"), True
        if role == "user":
            content, folded = folded + content, ""
        if role == "assistant" and row.think:
            # only the newest answer keeps its thoughts, old ones would fill the context
            thought, content = thoughts(content)
            if k > asked and thought:
                content = f"<think>\n{thought}\n</think>\n\n{content}"
            elif k > asked and k == len(messages):
                yield NO_THOUGHTS, 0, True
                content = content.lstrip("\n")
        yield (row.lead if role == "assistant" else "") + content, int(role == "assistant"), False
        yield row.after(role, eot), int(role == "assistant"), True
        last = role
    if prompt:
        yield row.header["assistant"], 0, True
        if row.think and not thinking:
            yield NO_THOUGHTS, 0, True
    elif last == "assistant":
        yield row.closing, 1, True


def render(tokenizer: Tokenizer, messages: list[dict[str, str]], template: str | None = None,
           add_generation_prompt: bool = False, max_length: int | None = None,
           enable_thinking: bool = True) -> tuple[list[int], list[int]]:
    """A conversation -> (ids, mask), of the same length, cut to max_length.

    messages: [{"role": one of ROLES, "content": text}, …]. add_generation_prompt: end with the
    header of an answer, for a model to go on; enable_thinking=False tells a model that thinks
    first (Qwen3) to answer at once. The first token of a text (tokenizer.prefix) is in the rows
    that have one: nothing is to be put before. Errors: UserError for a malformed message and for
    control tokens that the tokenizer lacks.

    Content is always text: a user who types "<|im_end|>" sends those letters. Text between two
    control tokens is cut as a whole, as Hugging Face does it, except where an answer begins:
    there the prompt ends in generation, so the tokens have to end there in training too.
    """
    row = find(template or tokenizer.template, foreign=bool(tokenizer.jinja))
    eot = tokenizer.eot_token or "<|endoftext|>"
    if missing := [t for t in row.control(eot) if t not in tokenizer.special]:
        raise UserError(f"the tokenizer lacks {', '.join(missing)} of the chat template "
                        f"{row.name}: add_special_tokens() gives it new ids for them")
    names = any_of(frozenset(tokenizer.special))
    runs: list[tuple[str, int, bool]] = []          # (text, trained on, control token)
    for text, train, ours in parts(row, messages, eot, add_generation_prompt, enable_thinking):
        # Control tokens are looked for in the template's own text alone. Of what follows an
        # answer, the control token is trained on and what leads to it, not chatml's newline after.
        start = 0
        for m in names.finditer(text) if ours and names else ():
            runs += [(text[start:m.start()], train, False), (m.group(), train, True)]
            start, train = m.end(), 0
        runs.append((text[start:], train, False))
    ids: list[int] = []
    mask: list[int] = []
    after = ""              # what stands before a run of text, for SentencePiece's spaces
    for (train, control), run in groupby(filter(lambda r: r[0], runs), key=lambda r: r[1:]):
        texts = [text for text, _, _ in run]
        new = ([tokenizer.special[t] for t in texts] if control
               else tokenizer.encode_ordinary("".join(texts), after))
        after = "token" if control else "text"
        ids += new
        mask += [train] * len(new)
    return ids[:max_length], mask[:max_length]


def fit(render: Callable, messages: list[dict], room: int) -> list[int]:
    """The conversation as ids, without its oldest exchanges if they do not fit in `room` tokens.

    The system message stays, and so does the last turn. Changes `messages`.
    """
    while True:
        ids = render(messages)
        first = int(messages[0]["role"] == "system")
        if len(ids) <= room or len(messages) <= first + 1:
            return ids
        del messages[first:first + 2]


def jinja(row: Template, eot: str) -> str:
    """The row as a Jinja template, signed with its name in a comment."""
    def say(text: str) -> str:
        return "{{ " + json.dumps(text) + " }}" if text else ""

    content = "(m['content'] | trim)" if row.trim else "m['content']"
    out = [f"{{# {row.name} #}}", say(row.begin)]
    if row.system is not None:
        out += ["{% if messages[0]['role'] != 'system' %}", say(row.default_system(eot)),
                "{% endif %}"]
    # Jinja forgets what a loop assigns, except to a namespace.
    out.append("{% set ns = namespace(folded='', asked=-1) %}")
    if row.think:
        out.append("{% for m in messages %}{% if m['role'] == 'user' %}"
                   "{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}")
    out.append("{% for m in messages %}")
    for role in ROLES:
        out.append("{% if m['role'] == '" + role + "' %}")
        if role == "system" and row.fold:
            before, after = map(json.dumps, row.fold.split("{}"))
            out.append("{% set ns.folded = " + f"{before} ~ {content} ~ {after}" + " %}")
        elif role == "user" and row.fold:
            out += [say(row.header[role]), "{{ ns.folded ~ " + content + " }}",
                    say(row.after(role, eot)), "{% set ns.folded = '' %}"]
        elif role == "assistant" and row.think:
            # thoughts() and what parts() does with them
            out += [say(row.header[role]), "{% set p = m['content'].rpartition('</think>') %}"
                    "{% set thought = p[0].rpartition('<think>')[2].strip('\\n') %}"
                    "{% set answer = p[2].lstrip('\\n') if p[1] else p[2] %}"
                    "{% if loop.index0 > ns.asked and thought %}"
                    "{{ '<think>\\n' ~ thought ~ '\\n</think>\\n\\n' ~ answer }}"
                    "{% elif loop.index0 > ns.asked and loop.last %}", say(NO_THOUGHTS),
                    "{{ answer.lstrip('\\n') }}{% else %}{{ answer }}{% endif %}",
                    say(row.after(role, eot))]
        else:
            out += [say(row.header[role]), say(row.lead if role == "assistant" else ""),
                    "{{ " + content + " }}", say(row.after(role, eot))]
        out.append("{% endif %}")
    out.append("{% endfor %}{% if add_generation_prompt %}" + say(row.header["assistant"]))
    if row.think:
        out += ["{% if enable_thinking is defined and not enable_thinking %}", say(NO_THOUGHTS),
                "{% endif %}"]
    out.append("{% elif messages[-1]['role'] == 'assistant' %}" + say(row.closing))
    return "".join(out) + "{% endif %}"


# --- what stands around a text that is no conversation ---------------------------------------

def surround(first: dict[str, int], last: dict[str, int] = {}) -> dict | None:
    """A post_processor that puts these tokens before and after a text; None for none."""
    def token(name: str, which: int) -> dict:
        return {"SpecialToken": {"id": name, "type_id": which}}

    def around(name: str, which: int) -> list[dict]:
        return [*(token(n, which) for n in first), {"Sequence": {"id": name, "type_id": which}},
                *(token(n, which) for n in last)]

    both = {n: {"id": n, "ids": [i], "tokens": [n]} for n, i in {**first, **last}.items()}
    return both and {"type": "TemplateProcessing", "single": around("A", 0),
                     "pair": around("A", 0) + around("B", 1), "special_tokens": both} or None


def affixes(post: dict | None) -> tuple[list[int], list[int]]:
    """The ids that a post_processor puts before and after a text."""
    kind = (post or {}).get("type")
    before: list[int] = []
    after: list[int] = []
    if kind == "Sequence":
        for step in post["processors"]:
            first, last = affixes(step)
            before, after = first + before, after + last
    elif kind == "TemplateProcessing":
        target = before
        for item in post["single"]:
            if "Sequence" in item:
                target = after
            else:
                target += post["special_tokens"][item["SpecialToken"]["id"]]["ids"]
    elif kind in ("BertProcessing", "RobertaProcessing"):
        before, after = [post["cls"][1]], [post["sep"][1]]
    elif kind not in (None, "ByteLevel"):
        raise ValueError(f"the post_processor {kind} is not supported")
    return [int(i) for i in before], [int(i) for i in after]


if __name__ == "__main__":
    refuse_to_run()
