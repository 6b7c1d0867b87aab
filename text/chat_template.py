"""A conversation -> (ids, mask), by a model's own chat template or any other text with spans.

    source = tokenizer.jinja                            # the directory's template, unchanged
    ids, mask, lost = render(tokenizer, source, [{"role": "user", "content": "Hi"},
                                                 {"role": "assistant", "content": "Hello!"}])

The text is transformers' (text/sandbox.py), and so are the ids, with two differences.
(1) Content is text: a control token that somebody typed is encoded as letters. While the template
runs, a private-use character stands inside it, so that it is not found; it is taken out before the
text is encoded. What an assistant says may hold the model's marks of thoughts and tool calls, which
are its own words. (2) Text is cut where an answer begins, as the prompt is in generation; that
differs from transformers where a split pattern would join the two (GPT-2's, at "\\n\\n").

The mask comes from the template's {% generation %} blocks if it has them. If not, an answer is what
the conversation up to it adds to its prompt (add_generation_prompt), up to the token that ends the
turn: rendering prefixes tells, and a template whose prefixes do not nest is refused. An answer is
only trained on whole: where the template drops its thoughts, words or tool calls, it is masked
and its number is in `lost` (Qwen3 keeps only the newest thoughts). chat.render_examples() makes
examples of those.
"""
from __future__ import annotations

import json
import re
from os.path import commonprefix
from typing import Any, Callable, Iterable, Iterator, Mapping, NamedTuple

from config import UserError
from text.bpe import any_of
from text.added_tokens import BLANK
from text.sandbox import Template, compile_template

ROLES = ("system", "user", "assistant", "tool")
# Control tokens that belong to what an assistant says, whatever its file calls special.
MARKS = re.compile(r"think|thought|reason|tool_?▁?call|python_tag", re.IGNORECASE)
# Marks of thoughts at the end of a prompt, and all that may stand in the rest of one.
_MARK = r"(?:<[^<>\s]*(?:think|thought|channel)[^<>\s]*>(?:thought)?)"
OPENED = re.compile(rf"{_MARK}(?:\s|{_MARK})*\Z")
THOUGHTS = re.compile(rf"(?:\s|{_MARK})*")
EMPTY = re.compile(rf"\s*{_MARK}")
UNASKED = "the template asks for no answer before a question"
REASONING = ("reasoning_content", "thinking", "reasoning")      # transformers' names, in its order


class Controls(NamedTuple):
    """The tokens that have a meaning in a rendered conversation, for one tokenizer and template."""
    pattern: re.Pattern | None          # any of them
    ids: dict[str, int]
    loose: frozenset[str]               # special: false, so that any text could hold them
    end: str = ""                       # the one that ends an answer, be it the last turn or not


class Rendered(NamedTuple):
    ids: list[int]
    mask: list[int]                     # 1: trained on
    lost: dict[int, str]                # answers that should be trained on, and are not: why

# ---------------------------------------------------------------------- messages -> safe messages


def find_controls(tokenizer: Any, key: str, probe: Callable[[], tuple[str, str]]) -> Controls:
    """Find the control tokens of a tokenizer, and its other added tokens that make turns.

    ChatGLM3 lists <|user|> as special: false. probe() renders conversations without words: what
    the template writes around them is structure, but for marks of thoughts and tool calls; and
    what it writes behind an answer. key: of the template. The result is kept in the tokenizer.
    """
    key = (key, len(tokenizer.special), len(tokenizer.added))
    cache = tokenizer.__dict__.setdefault("_chat_controls", {})
    if key not in cache:
        around, behind = probe()
        others = {n for n in tokenizer.added if n not in tokenizer.special and not n.isspace()}
        finder = any_of(frozenset(others))
        loose = frozenset(n for n in finder.findall(around) if not MARKS.search(n)) \
            if finder else frozenset()
        ids = {**tokenizer.special, **{n: tokenizer.added[n]["id"] for n in loose}}
        pattern = any_of(frozenset(ids))
        ends = [n for n in (pattern.findall(behind) if pattern else ()) if not MARKS.search(n)]
        cache[key] = Controls(pattern, ids, loose, (ends or [""])[-1])
    return cache[key]


def escape(text: str, controls: Controls, typed: str, said: frozenset[str] | None = None) -> str:
    """Return the text with a mark inside each control token, so that none is found in it.

    said: where an assistant speaks, the names that are left as they are, besides MARKS.
    """
    found = controls.pattern and controls.pattern.search(text)
    while found:
        name = found.group()
        at = found.start() + 1
        if said is None or not (name in said or MARKS.search(name)):
            text = text[:at] + typed + text[at:]
            at += 1
        else:
            at = found.end()
        found = controls.pattern.search(text, at)
    return text


def walk(value: Any, change: Callable[[str], str]) -> Any:
    """Return a copy of JSON data with every text changed; keys stay."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {k: walk(v, change) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [walk(v, change) for v in value]
    if value is None or isinstance(value, (bool, int, float)):
        return value
    raise UserError(f"expected texts, numbers, lists and objects in a conversation, got a "
                    f"{type(value).__name__}")


def choose_mark(value: Any) -> str:
    """Return a private-use character that no text in `value` has."""
    there: set[str] = set()

    def look(text: str) -> str:
        if not text.isascii():
            there.update(text)
        return text

    walk(value, look)
    return next(c for c in map(chr, range(0xF0000, 0xFFFFE)) if c not in there)


def check_messages(messages: Any) -> None:
    """Raise UserError for a conversation that is none."""
    if not messages:
        raise UserError("a conversation needs at least one message")
    for k, message in enumerate(messages, 1):
        role = message.get("role") if isinstance(message, dict) else None
        content = message.get("content") if role else None
        if role not in ROLES or not (isinstance(content, (str, list))
                                     or content is None and message.get("tool_calls")):
            raise UserError(f"message {k} needs a role ({', '.join(ROLES)}) and a text as content; "
                            f"it has the role {role!r} and {type(content).__name__} as content")


def clean(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message as transformers hands it to a template: thoughts by all their names."""
    out = {k: v for k, v in message.items() if v is not None and k != "train"}
    thought = next((out[k] for k in REASONING if k in out), None)
    return out if thought is None else {"thinking": thought, **out, "reasoning_content": thought}


def split_thoughts(content: str) -> tuple[str, str]:
    """Return (thoughts, answer) of a content; thoughts are between <think> and </think>."""
    before, end, answer = content.rpartition("</think>")
    return before.rpartition("<think>")[2].strip("\n"), answer.lstrip("\n") if end else answer


def is_whole(message: Mapping[str, Any], text: str) -> bool:
    """Return whether all that an assistant thinks, says and calls is in the text."""
    content = message.get("content")
    parts = [*split_thoughts(content)] if isinstance(content, str) else []
    parts += [message[k] for k in REASONING if isinstance(message.get(k), str)]
    for call in message.get("tool_calls") or ():
        call = call.get("function", call) if isinstance(call, dict) else {}
        parts.append(str(call.get("name", "")))
    return all(part.strip() in text for part in parts)

# ------------------------------------------------------------------------- what is trained on


class Drawing:
    """One conversation and what a template makes of its beginnings."""

    def __init__(self, template: Template, messages: list[dict], variables: dict[str, Any]):
        self.template = template
        self.messages = messages
        self.variables = variables
        self.cache: dict[tuple[int, bool], tuple[str, list]] = {}

    def draw(self, count: int, prompt: bool = False) -> tuple[str, list[tuple[int, int]]]:
        """Return (text, generation blocks) of the first `count` messages, and of a prompt."""
        if (count, prompt) not in self.cache:
            self.cache[count, prompt] = self.run(self.messages[:count], prompt)
        return self.cache[count, prompt]

    def run(self, messages: list[dict], prompt: bool) -> tuple[str, list[tuple[int, int]]]:
        return self.template.run({**self.variables, "messages": messages,
                                  "add_generation_prompt": prompt})


def find_marked_answers(drawing: Drawing) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """Yield (number of a message, its spans) by the template's own generation blocks."""
    answers = [k for k, m in enumerate(drawing.messages) if m["role"] == "assistant"]
    text, spans = drawing.draw(len(drawing.messages))
    if len(spans) == len(answers):
        yield from ((k, [span]) for k, span in zip(answers, spans))
        return
    if len(answers) == 1:
        yield answers[0], spans
        return
    # Several blocks an answer, or none (Phi-3's last has one more, for the end of text): a block
    # belongs to the newest answer that begins before it, where the turns before that end.
    begins = [len(commonprefix([drawing.draw(k)[0], text])) if k else 0 for k in answers]
    if spans and spans[0][0] < begins[0]:
        raise UserError("the model's chat template has generation blocks that belong to no "
                        "answer: what is trained on cannot be told")
    for k, begin, end in zip(answers, begins, [*begins[1:], len(text) + 1]):
        yield k, [span for span in spans if begin <= span[0] < end]


class Answer(NamedTuple):
    """Where an answer stands in the text of a conversation, or why it cannot be told."""
    spans: list[tuple[int, int]]
    append: str = ""                    # what has to follow the whole text for it to end
    reason: str = ""


def find_answer(drawing: Drawing, k: int, text: str, controls: Controls) -> Answer:
    """Find answer k in the text of the whole conversation, by what it adds to its prompt."""
    try:
        prompt = drawing.draw(k, True)[0]
        own = drawing.draw(k + 1)[0]
    except UserError:
        if any(m["role"] == "user" for m in drawing.messages[:k]):
            raise
        # ShareGPT's that begin with an answer: there is no prompt that it could be cut from
        return Answer([], reason=UNASKED)
    start = find_answer_start(prompt, own, controls.pattern)
    if start is None:
        return Answer([], reason="the template asks for an answer in other words than it writes it")
    end = find_answer_end(own, start, controls)
    said = own[start:end]
    at = follow(said, text[start:]) if text.startswith(own[:start]) else None
    if at is None:
        return Answer([], reason="the template writes it in another way once the conversation has "
                                 "gone on")
    stop = start + len(said) - at
    if end is not None:
        return Answer([(start, stop)])
    # GLM-4 has no end token: the header that follows tells that the turn is over
    after = text[stop:] or find_next_header(drawing, k)
    header = controls.pattern.match(after, len(after) - len(after.lstrip())) \
        if controls.pattern else None
    if not header:
        raise UserError("the model's chat template has no token that ends an answer, so a model "
                        "would never learn to stop: give another with --template=")
    return Answer([(start, stop + header.end())], "" if text[stop:] else after[:header.end()])


def find_answer_end(own: str, start: int, controls: Controls) -> int | None:
    """Return the end of the token that ends the answer in `own`, None if no token does.

    What follows it is not the answer's, such as chatml's newline or the end of text that Phi-3
    writes behind the last turn. Of several tokens at the end, it is the one that ends a turn
    elsewhere, or else the last.
    """
    found = [m for m in (controls.pattern.finditer(own, start) if controls.pattern else ())
             if not MARKS.search(m.group())]
    after = len(own)
    ends = []
    for m in reversed(found):
        if own[m.end():after].strip():
            break
        ends.append(m)
        after = m.start()
    usual = [m for m in ends if m.group() == controls.end]
    return (usual or ends)[0].end() if ends else None


def find_next_header(drawing: Drawing, k: int) -> str:
    """Return what the template would write behind answer k if another turn followed."""
    message = drawing.messages[k]
    answer = {key: value for key, value in message.items() if key not in REASONING}
    if isinstance(answer.get("content"), str):      # thoughts are dropped once a turn follows
        answer["content"] = split_thoughts(answer["content"])[1]
    turns = [*drawing.messages[:k], answer]
    turn = {"role": "tool" if message.get("tool_calls") else "user", "content": "x"}
    own = drawing.run(turns, False)[0]
    longer = drawing.run([*turns, turn], False)[0]
    return longer[len(own):] if longer.startswith(own) else ""


def find_answer_start(prompt: str, own: str, pattern: re.Pattern | None) -> int | None:
    """Return where the answer begins in `own`, which ends with it: behind its prompt.

    A prompt may end with thoughts that this answer does not have as such ("<think>\\n" before
    "<think></think>", before "\\n</think>", or before nothing): then all of them are the answer's.
    None if the prompt has anything else that the conversation has not.
    """
    if own.startswith(prompt):
        opened = EMPTY.match(own, len(prompt)) and OPENED.search(prompt)
        return opened.start() if opened else len(prompt)
    same = next((i for i, (a, b) in enumerate(zip(prompt, own)) if a != b),
                min(len(prompt), len(own)))
    # not in the middle of a token, nor behind marks of thoughts
    same = min([m.start() for m in (pattern.finditer(prompt) if pattern else ())
                if m.start() < same < m.end()], default=same)
    opened = OPENED.search(prompt, 0, same)
    same = opened.start() if opened else same
    return same if THOUGHTS.fullmatch(prompt, same) else None


def follow(said: str, rest: str) -> int | None:
    """Return how much of the beginning of `said` is missing in `rest`; None if more is.

    An answer that is not the newest may lack its beginning (Qwen3's empty thoughts).
    """
    at = 0
    while at < len(said):
        if rest.startswith(said[at:]):
            return at
        at = said.find(rest[0], at + 1) if rest else -1
        if at < 0:
            return None
    return None if said else 0


def find_answers(drawing: Drawing, text: str, controls: Controls) -> Iterator[tuple[int, Answer]]:
    """Yield (number of a message, where it stands) of all answers, in order."""
    if drawing.template.marked:
        yield from ((k, Answer(spans)) for k, spans in find_marked_answers(drawing))
        return
    for k, message in enumerate(drawing.messages):
        if message["role"] == "assistant":
            yield k, find_answer(drawing, k, text, controls)

# -------------------------------------------------------------------------------- text -> ids


def encode(tokenizer: Any, text: str, spans: Iterable[tuple[int, int, bool]],
           controls: Controls, typed: str) -> tuple[list[int], list[int]]:
    """Encode a rendered conversation -> (ids, mask). spans: (start, end, trained on), in order.

    Text between two control tokens is encoded as a whole, as Hugging Face does it, but for a cut
    where a span begins or ends.
    """
    runs: list[tuple[str, bool, bool]] = []         # (text, trained on, control token)
    begin = 0
    for start, stop, trained in (*spans, (len(text), len(text), False)):
        for first, last, train in ((begin, start, False), (start, stop, trained)):
            at = first
            for m in controls.pattern.finditer(text, first, last) if controls.pattern else ():
                if at < m.start():
                    runs.append((text[at:m.start()], train, False))
                runs.append((m.group(), train, True))
                at = m.end()
            if at < last:
                runs.append((text[at:last], train, False))
        begin = stop
    ids: list[int] = []
    mask: list[int] = []
    after = ""              # what stands before a run of text, for SentencePiece's spaces
    skip = False            # the token before takes white space with it
    for k, (piece, trained, control) in enumerate(runs):
        if control:
            new = [controls.ids[piece]]
            skip = tokenizer.added.get(piece, {}).get("rstrip", False)
        else:
            following = runs[k + 1] if k + 1 < len(runs) else ("", False, False)
            if following[2] and tokenizer.added.get(following[0], {}).get("lstrip"):
                piece = piece.rstrip(BLANK)
            piece = remove_marks(piece.lstrip(BLANK) if skip else piece, typed)
            skip = skip and not piece
            new = tokenizer.encode_ordinary(piece, after, controls.loose) if piece else []
        after = "token" if control else "text" if piece else after
        ids += new
        mask += [int(trained)] * len(new)
    return ids, mask


def remove_marks(piece: str, typed: str) -> str:
    """Return the text without the marks of typed control tokens."""
    if piece.isascii():
        if "\\ud" not in piece:
            return piece
        piece = piece.replace(json.dumps(typed)[1:-1], "")      # a template may write JSON so
    return piece.replace(typed, "")

# ---------------------------------------------------------------------------------- all of it

def probe(template: Template, named: dict[str, str]) -> tuple[str, str]:
    """Return (conversations without words, rendered; what is behind an answer, last or not)."""
    user = {"role": "user", "content": ""}
    mark = "\U000f0000"
    turns = [user, {"role": "assistant", "content": ""}]
    marked = [user, {"role": "assistant", "content": mark}]
    out = []
    for messages in (turns[:1], [*turns, *turns], [{"role": "system", "content": ""}, *turns],
                     marked, [*marked, user]):
        try:
            out.append(template.run({**named, "tools": None, "documents": None,
                                     "messages": messages,
                                     "add_generation_prompt": len(messages) == 1})[0])
        except UserError:               # a template without a system turn, say
            out.append("")
    last, followed = (text.partition(mark)[2] for text in out[-2:])
    return "\n".join(out), commonprefix([last, followed])


def find_read_marks(drawing: Drawing, raw: list[dict], controls: Controls, typed: str
               ) -> frozenset[str]:
    """Return the control tokens in assistants' words that the template itself looks for.

    It renders another text where they are there (Gemma 4 cuts thoughts at them, gpt-oss refuses),
    so they are marks of the model's, not letters that somebody quotes.
    """
    names: set[str] = set()
    for m in raw:
        if m["role"] == "assistant":
            walk(m, lambda text: names.update(controls.pattern.findall(text)) or text)
    names = {n for n in names if not MARKS.search(n)}
    if not names:
        return frozenset()

    def read(said: frozenset[str]) -> str:
        messages = [escape_message(m, controls, typed, said) if m["role"] == "assistant" else safe
                    for m, safe in zip(raw, drawing.messages)]
        return remove_marks(drawing.run(messages, False)[0], typed)

    said = frozenset(names)
    text = read(said)
    if text == read(frozenset()):
        return frozenset()
    for name in sorted(names):
        if read(said - {name}) == text:
            said -= {name}
    return said


def escape_message(message: dict, controls: Controls, typed: str, said: frozenset[str]) -> dict:
    """Return the message with typed control tokens marked, but `said` of an assistant."""
    speaks = said if message["role"] == "assistant" else None
    return {k: v if k == "role" else walk(v, lambda t: escape(t, controls, typed, speaks))
            for k, v in message.items()}


def render(tokenizer: Any, source: str, messages: list[dict], prompt: bool = False,
           tools: list | None = None, documents: list | None = None,
           switches: Mapping[str, Any] | None = None) -> Rendered:
    """Render a conversation by the Jinja template `source`; switches: its further variables."""
    check_messages(messages)
    template = compile_template(source)
    named = tokenizer.facts.named
    controls = find_controls(tokenizer, source, lambda: probe(template, named))
    raw = [clean(m) for m in messages]
    given = {"tools": tools, "documents": documents, **(switches or {})}
    typed = choose_mark([raw, given])
    variables = {**named, **walk(given, lambda text: escape(text, controls, typed))}
    drawing = Drawing(template, [escape_message(m, controls, typed, frozenset()) for m in raw],
                      variables)
    if controls.pattern and (said := find_read_marks(drawing, raw, controls, typed)):
        drawing = Drawing(template, [escape_message(m, controls, typed, said) for m in raw],
                          variables)
    text = drawing.draw(len(raw), prompt)[0]
    spans: list[tuple[int, int, bool]] = []
    lost: dict[int, str] = {}
    append = ""
    try:
        for k, answer in find_answers(drawing, text, controls):
            append += answer.append
            said = "".join(text[a:b] for a, b in answer.spans)
            whole = not answer.reason and is_whole(drawing.messages[k], said)
            trained = messages[k].get("train") is not False
            # an answer that is not trained on is cut from its prompt all the same
            spans += [(a, b, trained and whole) for a, b in answer.spans]
            if trained and not whole:
                lost[k] = answer.reason or "the template drops its thoughts, words or tool calls"
    except UserError:
        if not prompt:
            raise
    return Rendered(*encode(tokenizer, text + append, spans, controls, typed), lost)


def find_turn_ends(tokenizer: Any, source: str) -> list[str]:
    """Return the control tokens that end an answer by this template, in a chat without tools.

    [] for a template that does not render a question and an answer: render() says why.
    """
    cache = tokenizer.__dict__.setdefault("_turn_ends", {})
    key = (source, len(tokenizer.added))
    if key not in cache:
        turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
        try:
            out = render(tokenizer, source, turns)
        except UserError:
            out = Rendered([], [], {})
        names = {token["id"]: n for n, token in tokenizer.added.items() if not MARKS.search(n)}
        said = [names[i] for i, m in zip(out.ids, out.mask) if m and i in names]
        # Phi-3's training template writes the end of text behind the end of the last turn; render()
        # has found the controls
        usual = find_controls(tokenizer, source, lambda: ("", "")).end if said else ""
        cache[key] = [n for n in dict.fromkeys([usual, *said[-1:]]) if n in said]
    return cache[key]
