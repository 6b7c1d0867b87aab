"""Chat templates: a conversation -> ids, with a mask of what the model is trained to say.

    ids, mask = tokenizer.render([{"role": "user", "content": "Hi"},
                                  {"role": "assistant", "content": "Hello!"}])

A template is a row of TEMPLATES: what stands before and after the content of each role. The same
row writes the Jinja template that a checkpoint carries, so that transformers' apply_chat_template
gives the same ids (tested). Sources: the chat templates that Qwen, SmolLM2, Llama 3, Gemma 3,
GLM-4 and MiniCPM publish with their weights; Alpaca's prompt from Stanford's repository.

The mask is 1 on the content of every assistant turn and on the token that ends the turn, and
nowhere else. Masks that get this wrong train a model that never stops, or that talks to itself.
"""
from __future__ import annotations

import json
import re
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Iterator

from config import UserError

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
    mark: str                       # this in somebody's Jinja template tells the family
    others_end: str | None = None   # what follows the other roles' content; None: `end` as well
    begin: str = ""                 # opens a conversation
    system: str = ""                # the system message if the conversation has none
    trim: bool = False              # white space around content is stripped
    fold: bool = False              # no system role: its text opens the next user turn
    closing: str = ""               # the next header ends a turn; this ends the conversation

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


_CHATML = dict(header=same("<|im_start|>{}\n"), end="<|im_end|>\n",
               tokens="<|im_start|> <|im_end|>")
TEMPLATES = {row.name: row for row in (
    # SmolLM2 is chatml with a system turn of its own; its mark has to be looked for first
    Template("smollm2", **_CHATML, mark="named SmolLM", system="You are a helpful AI assistant "
             "named SmolLM, trained by Hugging Face"),
    Template("chatml", **_CHATML, mark="<|im_start|>"),
    Template("llama3", same("<|start_header_id|>{}<|end_header_id|>\n\n", tool="ipython"),
             "<|eot_id|>", "<|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|>",
             "<|start_header_id|>", begin="<|begin_of_text|>", trim=True),
    Template("gemma", same("<start_of_turn>{}\n", assistant="model"), "<end_of_turn>\n",
             "<bos> <start_of_turn> <end_of_turn>", "<start_of_turn>", begin="<bos>",
             trim=True, fold=True),
    Template("glm4", same("<|{}|>\n", tool="observation"), "",
             "[gMASK] <sop> <|system|> <|user|> <|assistant|> <|observation|>", "[gMASK]",
             begin="[gMASK]<sop>", closing="<|user|>"),
    # These two separate turns by plain words, which a user can type as well.
    Template("minicpm", {"system": "", "user": "<用户>", "assistant": "<AI>", "tool": ""},
             "{eot}", "{eot}", "<用户>", others_end="", trim=True),
    Template("alpaca", {"system": "", "user": "### Instruction:\n", "tool": "### Input:\n",
                        "assistant": "### Response:\n"}, "{eot}", "{eot}", "### Instruction:",
             others_end="\n\n", system="Below is an instruction that describes a task. Write a "
             "response that appropriately completes the request."),
)}


def find(name: str | None) -> Template:
    if name not in TEMPLATES:
        raise UserError(f"{name!r} is not a chat template; there are {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


def recognise(jinja: str) -> str | None:
    """The row that a Jinja template belongs to: ours are signed in a comment, others marked."""
    signed = (n for n in TEMPLATES if f"{{# {n} #}}" in jinja)
    return next(signed, None) or next((n for n, r in TEMPLATES.items() if r.mark in jinja), None)


def parts(row: Template, messages: list[dict], eot: str, prompt: bool
          ) -> Iterator[tuple[str, int, bool]]:
    """A conversation in order, as (text, trained on, written by the template)."""
    if not messages:
        raise UserError("a conversation needs at least one message")
    yield row.begin, 0, True
    if row.system and messages[0].get("role") != "system":
        yield row.default_system(eot), 0, True
    folded, last = "", ""
    for k, message in enumerate(messages, 1):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES or not isinstance(content, str):
            raise UserError(f"message {k} needs a role ({', '.join(ROLES)}) and a text as content; "
                            f"it has the role {role!r} and {type(content).__name__} as content")
        content = content.strip() if row.trim else content
        if role == "system" and row.fold:
            folded = content + "\n\n"
            continue
        # GLM-4 has no end token: the header that follows tells the model's turn is over
        yield row.header[role], int(bool(row.closing) and last == "assistant"), True
        if role == "user":
            content, folded = folded + content, ""
        yield content, int(role == "assistant"), False
        yield row.after(role, eot), int(role == "assistant"), True
        last = role
    if prompt:
        yield row.header["assistant"], 0, True
    elif last == "assistant":
        yield row.closing, 1, True


def render(tokenizer: Tokenizer, messages: list[dict[str, str]], template: str | None = None,
           add_generation_prompt: bool = False, max_length: int | None = None
           ) -> tuple[list[int], list[int]]:
    """A conversation -> (ids, mask), of the same length, cut to max_length.

    messages: [{"role": one of ROLES, "content": text}, …]. add_generation_prompt: end with the
    header of an answer, for a model to go on. Errors: UserError for a malformed message and for
    control tokens that the tokenizer lacks.

    Content is always text: a user who types "<|im_end|>" sends those letters. Text between two
    control tokens is cut as a whole, as Hugging Face does it, except where an answer begins:
    there the prompt ends in generation, so the tokens have to end there in training too.
    """
    row = find(template or tokenizer.template)
    eot = tokenizer.eot_token or "<|endoftext|>"
    if missing := [t for t in row.control(eot) if t not in tokenizer.special]:
        raise UserError(f"the tokenizer lacks {', '.join(missing)} of the chat template "
                        f"{row.name}: add_special_tokens() gives it new ids for them")
    controls = row.control(eot)
    cut = re.compile("(" + "|".join(map(re.escape, controls)) + ")")
    runs: list[tuple[str, int, bool]] = []          # (text, trained on, control token)
    for text, train, ours in parts(row, messages, eot, add_generation_prompt):
        if not ours:
            runs.append((text, train, False))
            continue
        # control tokens are looked for in the template's own text alone; of what follows an
        # answer, only the control token is trained on, not chatml's newline after it
        for part in cut.split(text):
            control = part in controls
            runs.append((part, train if control else 0, control))
    ids: list[int] = []
    mask: list[int] = []
    for (train, control), run in groupby(filter(lambda r: r[0], runs), key=lambda r: r[1:]):
        texts = [text for text, _, _ in run]
        new = ([tokenizer.special[t] for t in texts] if control
               else tokenizer.encode_ordinary("".join(texts)))
        ids += new
        mask += [train] * len(new)
    return ids[:max_length], mask[:max_length]


def jinja(row: Template, eot: str) -> str:
    """The row as a Jinja template, signed with its name in a comment."""
    def say(text: str) -> str:
        return "{{ " + json.dumps(text) + " }}" if text else ""

    content = "(m['content'] | trim)" if row.trim else "m['content']"
    out = [f"{{# {row.name} #}}", say(row.begin)]
    if row.system:
        out += ["{% if messages[0]['role'] != 'system' %}", say(row.default_system(eot)),
                "{% endif %}"]
    # Jinja forgets what a loop assigns, except to a namespace.
    out.append("{% set ns = namespace(folded='') %}{% for m in messages %}")
    for role in ROLES:
        out.append("{% if m['role'] == '" + role + "' %}")
        if role == "system" and row.fold:
            out.append("{% set ns.folded = " + content + " ~ '\\n\\n' %}")
        elif role == "user" and row.fold:
            out += [say(row.header[role]), "{{ ns.folded ~ " + content + " }}",
                    say(row.after(role, eot)), "{% set ns.folded = '' %}"]
        else:
            out += [say(row.header[role]), "{{ " + content + " }}", say(row.after(role, eot))]
        out.append("{% endif %}")
    out.append("{% endfor %}{% if add_generation_prompt %}" + say(row.header["assistant"]))
    out.append("{% elif messages[-1]['role'] == 'assistant' %}" + say(row.closing))
    return "".join(out) + "{% endif %}"
