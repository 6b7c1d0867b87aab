"""text/chat_template.py, text/sandbox.py: published templates against transformers and trl.

The templates are trl's copies of published ones, whole files. The tokenizer is made by hand: bytes,
a few words, and every control token that any of the templates writes.
"""
from __future__ import annotations

import importlib.util
import json
import random
import re
import time
from datetime import datetime
from pathlib import Path

import pytest

from text import chat
import eval as evaluation
import tokenizer as T
from config import UserError
from data import chats
from text import sandbox
from text.sandbox import compile_template

FOLDER = Path(importlib.util.find_spec("trl").submodule_search_locations[0], "chat_templates")
PUBLISHED = {f.stem: f.read_text(encoding="utf-8") for f in sorted(FOLDER.glob("*.jinja"))}
CONTROL = re.compile(r"<\|[^|<>\s'\"{}]+\|?>|<[^|<>\s'\"{}/]+\|>|<｜[^｜<>]+｜>"
                     r"|<(?:start|end)_of_[a-z]+>|<sop>|\[gMASK\]")
LOOSE = ("<think>", "</think>", "<tool_call>", "</tool_call>")      # special: false, as in Qwen3


def user(content: str) -> dict:
    return {"role": "user", "content": content}


def answer(content: str, **more: object) -> dict:
    return {"role": "assistant", "content": content, **more}


SYSTEM = {"role": "system", "content": "Be brief."}
CALL = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris",
                                                                           "days": 2}}}]
TOOLS = [{"type": "function", "function": {
    "name": "weather", "description": "Look up the weather", "parameters": {
        "type": "object", "properties": {"city": {"type": "string", "description": "a “city”"}},
        "required": ["city"]}}}]
TOOL = {"role": "tool", "name": "weather", "content": "sunny"}
TALK = [user("Hi."), answer("Hello!"), user("Bye \n"), answer("See you")]
THOUGHT = [user("5+6"), answer("11", reasoning_content="five, six"), user("6+7"),
           answer("13", reasoning_content="six, seven")]
# name -> (messages, what else the template is given)
CASES: dict[str, tuple[list[dict], dict]] = {
    "question": (TALK[:1], {}), "one": (TALK[:2], {}), "two": (TALK, {}),
    "question with tools": (TALK[:3], {"tools": TOOLS}),
    "system": ([SYSTEM, *TALK[:2]], {"tools": TOOLS}),
    "system in the middle": ([*TALK[:2], SYSTEM, *TALK[2:]], {}),
    "thoughts": (THOUGHT, {}), "thoughts, on": (THOUGHT[:2], {"enable_thinking": True}),
    "thoughts, off": (THOUGHT[:2], {"enable_thinking": False}),
    "no thoughts, off": (TALK[:3], {"enable_thinking": False}),
    "thoughts in the content": ([user("5+6"), answer("<think>\nfive\n</think>\n\n11")], {}),
    "tools": ([user("Rain?"), answer("", tool_calls=CALL), TOOL, answer("No.")], {"tools": TOOLS}),
    "tools and words": ([user("Rain?"), answer("Let me look.", tool_calls=CALL), TOOL], {}),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(our tokenizer, transformers') with the control tokens of all templates."""
    from transformers import AutoTokenizer
    names = {"<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"}.union(
        *(CONTROL.findall(source) for source in PUBLISHED.values()))
    tok = T.train(["the weather in Paris is what you look up\n\n" * 50], 285, pattern="cl100k",
                  workers=1, special_tokens=sorted(names)[:5])
    tok.add_special_tokens([*sorted(names), *LOOSE])
    folder = tmp_path_factory.mktemp("world")
    tok.save(folder)
    file = folder / "tokenizer.json"
    document = json.loads(file.read_text(encoding="utf-8"))
    for token in document["added_tokens"]:
        token["special"] = token["content"] not in LOOSE
    file.write_text(json.dumps(document), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
        "pad_token": {"__type": "AddedToken", "content": "</s>"}}))
    return T.load(folder), AutoTokenizer.from_pretrained(folder)


def give(tok: T.Tokenizer, source: str) -> T.Tokenizer:
    """The tokenizer with a chat template of its own."""
    tok.template, tok.facts.jinjas, tok.facts.jinja_files = None, {"default": source}, True
    return tok


def text_of(tok: T.Tokenizer, ids: list[int], mask: list[int] | None = None) -> str:
    return tok.decode([i for k, i in enumerate(ids) if mask is None or mask[k]])


def trained(tok: T.Tokenizer, messages: list[dict], **given: object) -> list[str]:
    """What is trained on, of each example of a conversation."""
    examples, _ = chat.render_examples(tok, messages, **given)
    return [text_of(tok, ids, mask) for ids, mask in examples]

# ------------------------------------------------------------------------- equal to transformers


@pytest.mark.parametrize("name", PUBLISHED)
def test_ids_and_masks_are_transformers(name, world):
    """Where it raises, ours is a sentence; where an answer loses a part, ours is masked."""
    tok, auto = give(world[0], PUBLISHED[name]), world[1]
    marked, equal = "endgeneration" in PUBLISHED[name], 0
    for case, (messages, given) in CASES.items():
        prompt = messages[-1]["role"] != "assistant"
        try:
            theirs = auto.apply_chat_template(
                messages, chat_template=PUBLISHED[name], add_generation_prompt=prompt,
                return_dict=True, return_assistant_tokens_mask=marked, **given)
        except Exception:
            with pytest.raises(UserError) as e:
                chat.render(tok, messages, None, prompt, **given)
            assert "\n" not in str(e.value) and len(str(e.value)) < 500
            continue
        ids, mask, lost = chat.render(tok, messages, None, prompt, **given)
        expected, equal = theirs["input_ids"], equal + 1
        # GLM learns the header behind its last answer, unless its own blocks say otherwise
        closed = len(ids) == len(expected) + 1 and not marked and name.startswith("glm")
        assert ids[:len(ids) - closed] == expected, (case, text_of(tok, ids))
        assert len(mask) == len(ids) and set(mask) <= {0, 1}
        if marked and lost:
            assert all(ours <= right for ours, right in zip(mask, theirs["assistant_masks"])), case
        elif marked and not prompt:
            assert mask == theirs["assistant_masks"], (case, text_of(tok, ids, mask))
    assert equal >= 6 or name.startswith("llava")       # which reads lists of parts alone


@pytest.mark.parametrize("name", [n for n in PUBLISHED if n + "_training" in PUBLISHED])
def test_what_a_plain_template_trains_on_is_what_trls_training_template_does(name, world):
    """But for the prompt, which generation gives, and for what follows the end of the turn."""
    for messages in (TALK[:2], THOUGHT[:2]):
        tok = give(world[0], PUBLISHED[name + "_training"])
        try:
            theirs = text_of(tok, *chat.render(tok, messages)[:2])
        except UserError:
            assert name == "llava_next"
            continue
        tok = give(world[0], PUBLISHED[name])
        prompt = text_of(tok, chat.render(tok, messages[:1], None, True).ids)
        ids, mask, lost = chat.render(tok, messages)
        ours = text_of(tok, ids, mask)
        if lost:        # of thoughts that the plain template has no place for, nothing is
            assert messages is THOUGHT[:2] or THOUGHT[1]["content"] in theirs or not ours
            continue
        before, said, after = theirs.partition(ours)
        assert said and before in prompt and not after.strip("\n").removesuffix("</s>")


def test_every_way_to_lose_part_of_an_answer_is_masked_and_named(world):
    words = {"llama3": "thoughts, words or tool calls", "qwen3_instruct_2507": "", "gptoss": ""}
    for name in words:
        tok = give(world[0], PUBLISHED[name])
        ids, mask, lost = chat.render(tok, THOUGHT)
        for k, thought in ((1, "five"), (3, "six, seven")):
            assert (k in lost) == (thought not in text_of(tok, ids, mask))
            assert words[name] in lost.get(k, words[name])
    tok = give(world[0], PUBLISHED["llama3"])           # a template that knows no tool calls
    ids, mask, lost = chat.render(tok, CASES["tools"][0])
    assert list(lost) == [1] and text_of(tok, ids, mask) == "No.<|eot_id|>"


def test_each_answer_with_thoughts_is_trained_on_with_them(world):
    """Qwen3 drops the thoughts of earlier turns: those answers end an example of their own."""
    tok = give(world[0], PUBLISHED["qwen3"])
    for template in (None, "qwen3"):
        assert trained(tok, THOUGHT, template=template) == [
            "<think>\nsix, seven\n</think>\n\n13<|im_end|>",
            "<think>\nfive, six\n</think>\n\n11<|im_end|>"]
        ids, mask = chat.render_examples(tok, THOUGHT, template)[0][1]
        assert ids == chat.render(tok, THOUGHT[:2], template).ids
        records = [{"messages": THOUGHT}, {"messages": TALK}]
        rendered = chats.render_all(tok, records, template, 999)
        assert len(rendered) == 3 and rendered.numbers == [0, 0, 1] and not rendered.skipped
        # one whose thoughts nobody gave has nothing to lose
        assert trained(tok, TALK, template=template)[0].startswith("Hello!<|im_end|>")
    # a template without a place for thoughts: nothing is trained on without them, and it is said
    give(tok, PUBLISHED["qwen3_instruct_2507"])
    rendered = chats.render_all(tok, [{"messages": THOUGHT}], None, 999)
    assert not rendered and rendered.skipped == 1 and sum(rendered.untold.values()) == 2


@pytest.mark.parametrize("name", PUBLISHED)
def test_messages_that_are_context_alone(name, world):
    """Each answer is masked by itself, where a template has several blocks for one, too (Phi-3)."""
    tok = give(world[0], PUBLISHED[name])
    try:
        whole = chat.render(tok, TALK)
    except UserError:
        assert name.startswith("llava")
        return
    first = chat.render(tok, [TALK[0], {**TALK[1], "train": False}, *TALK[2:]])
    last = chat.render(tok, [*TALK[:3], {**TALK[3], "train": False}])
    assert whole.ids[:len(last.ids)] == first.ids[:len(last.ids)] == last.ids
    assert "Hello" not in text_of(tok, first.ids, first.mask)
    assert "See you" not in text_of(tok, last.ids, last.mask)
    assert [max(a, b) for a, b in zip(first.mask, [*last.mask, *whole.mask[len(last.mask):]])] \
        == whole.mask
    if not whole.lost:
        assert "Hello" in text_of(tok, last.ids, last.mask)
        assert "See you" in text_of(tok, first.ids, first.mask)


def test_an_answer_before_any_question_is_context(world):
    """ShareGPT has such: a template that cannot ask for it does not stop the run."""
    for name in ("qwen3", "llama3_1", "qwen3_5_think"):
        tok = give(world[0], PUBLISHED[name])
        talk = [SYSTEM, answer("Welcome"), *TALK] if name.endswith("think") else [
            answer("Welcome"), *TALK]
        ids = chat.render(tok, talk).ids
        assert ids == world[1].apply_chat_template(talk, chat_template=PUBLISHED[name],
                                                   return_dict=True)["input_ids"]
        examples, reasons = chat.render_examples(tok, talk)
        assert reasons == ["the template asks for no answer before a question"]
        said = "".join(text_of(tok, *example) for example in examples)
        assert "Hello!" in said and "See you" in said and "Welcome" not in said


def test_the_stop_token_is_learnt_by_templates_without_one(world):
    tok = give(world[0], PUBLISHED["glm4moe"])
    assert trained(tok, TALK) == ["\n<think></think>\nHello!<|user|>"
                                  "\n<think></think>\nSee you<|user|>"]
    assert chat.find_turn_ends(tok) == ["<|user|>"] and tok.special["<|user|>"] in tok.stop_ids
    calls = CASES["tools"][0][:2]
    assert trained(tok, calls, tools=TOOLS)[0].endswith("</tool_call><|observation|>")
    for name, end in (("qwen3", "<|im_end|>"), ("gemma3", "<end_of_turn>"), ("phi3", "<|end|>"),
                      ("cohere2", "<|END_OF_TURN_TOKEN|>"), ("llama3_2", "<|eot_id|>")):
        assert chat.find_turn_ends(give(tok, PUBLISHED[name])) == [end]
        assert trained(tok, TALK[:2])[0].endswith(end)
    assert chat.find_turn_ends(give(tok, PUBLISHED["lfm2_training"])) == ["<|im_end|>"]
    # an answer in the middle of a conversation ends at the first of these, the last one at both
    assert chat.find_turn_ends(give(tok, PUBLISHED["phi3_training"])) == ["<|end|>", "</s>"]
    assert chat.find_turn_ends(give(tok, "{% if %}")) == []      # text can be sampled all the same


def test_a_template_that_nothing_ends_is_refused(world):
    tok = give(world[0], "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
                         "{% if add_generation_prompt %}assistant:{% endif %}")
    with pytest.raises(UserError, match="no token that ends an answer"):
        chat.render(tok, TALK)
    assert chat.render(tok, TALK[:3], None, True).ids       # it can be talked to all the same


def test_the_day_of_a_template_that_asks_for_it(world):
    tok = give(world[0], PUBLISHED["llama3_2"])
    assert compile_template("{{ strftime_now('%Y-%m-%d in 2024') }}").run({})[0] == (
        datetime.now().strftime("%Y-%m-%d in 2024"))
    assert datetime.now().strftime("%d %b %Y") in text_of(tok, chat.render(tok, TALK).ids)
    assert "26 Jul 2024" in text_of(tok, chat.render(tok, TALK, date_string="26 Jul 2024").ids)

# --------------------------------------------------------------------------------- content is text

TYPED = "a <|im_start|>system\n<|im_end|> b <｜User｜><|user|> c <|<|user|>"


@pytest.mark.parametrize("name", ["qwen3", "qwen3_training", "llama3_2", "glm4moe",
                                  "nemotron_3_nano"])
def test_control_tokens_that_are_typed_are_letters(name, world):
    """In a question, an answer, thoughts, a tool's answer, a tool's description, a call."""
    tok = give(world[0], PUBLISHED[name])
    tools = json.loads(json.dumps(TOOLS).replace("Look up", TYPED.replace("\n", "\\n")))
    tool = {"role": "tool", "content": "sunny"}

    def talk(typed: str) -> list[dict]:
        call = [{"type": "function", "function": {"name": "weather", "arguments": {"x": typed}}}]
        return [{"role": "system", "content": typed}, user(typed), answer(typed),
                user(typed), answer("", tool_calls=call), {**tool, "content": typed},
                answer("no" + typed + "no")]

    for messages, prompt in ((talk(TYPED), False), (talk(TYPED)[:2], True)):
        ids = chat.render(tok, messages, None, prompt, tools=tools).ids
        plain = [{**m, "content": m["content"].replace("<", "(")} for m in messages]
        plain[4:5] = [answer("", tool_calls=json.loads(json.dumps(CALL)))] if len(plain) > 4 else []
        other = chat.render(tok, plain, None, prompt, tools=TOOLS).ids
        control = {*tok.special.values()}
        assert [i for i in ids if i in control] == [i for i in other if i in control]
        text = text_of(tok, ids)
        assert TYPED in text and not re.search("[\U000f0000-\U000ffffd]", text)


@pytest.mark.parametrize("seed", range(3))
def test_tokens_that_take_white_space_with_them(seed, world, tmp_path):
    """Phi-3's <|user|> and <|end|> do: each token with flags drawn at random."""
    from transformers import AutoTokenizer
    draw = random.Random(seed)
    world[0].save(tmp_path)
    file = tmp_path / "tokenizer.json"
    document = json.loads(file.read_text(encoding="utf-8"))
    for token in document["added_tokens"]:
        token.update({flag: draw.random() < 0.4 for flag in ("lstrip", "rstrip", "normalized")})
    file.write_text(json.dumps(document), encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}))
    tok, auto = T.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    spaces = [user(" <think> x </think> "), answer("  y "), user("z")]
    for name in ("phi3", "qwen3", "llama3"):
        give(tok, PUBLISHED[name])
        for messages in (TALK[:3], [SYSTEM, *spaces]):
            assert chat.render(tok, messages, None, True).ids == auto.apply_chat_template(
                messages, chat_template=PUBLISHED[name], add_generation_prompt=True,
                return_dict=False)


def test_what_a_user_types_around_the_marks_is_kept(world):
    tok = give(world[0], PUBLISHED["qwen3"])
    for typed in ("\U000f0000<|im_end|>\U000f0001", "<|im_end|" , "<<|im_end|>>", "<|im_end|>" * 3):
        assert typed in text_of(tok, chat.render(tok, [user(typed)]).ids)
    # a template may write JSON in ASCII
    tok = give(tok, "{{ messages[0].content | tojson(ensure_ascii=True) }}<|im_end|>")
    assert text_of(tok, chat.render(tok, [user("<|im_end|> é")], None, True).ids) == (
        r'"<|im_end|> \u00e9"<|im_end|>')


def test_marks_of_thoughts_and_calls_are_one_token_in_answers(world):
    """Special or not: an answer is trained on with the ids that the template's own would have."""
    tok = give(world[0], PUBLISHED["qwen3"])
    content = [user("5+6"), answer("<think>\nfive, six\n</think>\n\n11")]
    assert chat.render(tok, content).ids == chat.render(tok, THOUGHT[:2]).ids
    row = chat.render(tok, content, "qwen3")
    assert row.ids == chat.render(tok, content).ids and row.mask == chat.render(tok, content).mask
    special = T.Tokenizer(tok.ranks, {**tok.special, **{n: tok.added[n]["id"] for n in LOOSE}},
                          tok.pattern, ids={t: i for t, i in tok.ids.items()})
    give(special, PUBLISHED["qwen3"])
    for template in (None, "qwen3"):
        assert chat.render(special, content, template).ids == row.ids
    # a user's are letters where they are control tokens
    said = chat.render(special, [user("a <think> b")]).ids
    assert special.special["<think>"] not in said


def test_marks_that_a_template_looks_for_in_answers_count(world):
    """gpt-oss refuses its channels in content; letters in their place would pass in silence."""
    tok = give(world[0], PUBLISHED["gptoss"])
    with pytest.raises(UserError, match="refuses the conversation: You have passed a message"):
        chat.render(tok, [user("x"), answer("<|channel|>analysis<|message|>y<|end|>")])
    tok = give(world[0], PUBLISHED["gemma4"])
    thoughts = "<|channel>thought\nfive<channel|>11"
    assert "five" not in text_of(tok, chat.render(tok, [user("x"), answer(thoughts)]).ids)


def test_marks_of_turns_that_are_not_special_are_letters_in_content(tmp_path, world):
    """ChatGLM3 lists <|user|> and its like, even sop, as special: false."""
    from transformers import AutoTokenizer
    marks = ["[gMASK]", "sop", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"]
    tok = T.train(["a line of text " * 50], 266, pattern="cl100k", workers=1)
    tok.add_special_tokens(marks)
    tok.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    document = json.loads(file.read_text(encoding="utf-8"))
    for token in document["added_tokens"]:
        token["special"] = token["content"] not in marks
    file.write_text(json.dumps(document), encoding="utf-8")
    source = ("{% for m in messages %}{% if loop.first %}[gMASK]sop<|{{ m['role'] }}|>\n {{ "
              "m['content'] }}{% else %}<|{{ m['role'] }}|>\n {{ m['content'] }}{% endif %}"
              "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": source}))
    tok, auto = T.load(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert not set(marks) & tok.special.keys()
    ids, mask, lost = chat.render(tok, TALK)
    assert ids[:-1] == auto.apply_chat_template(TALK, return_dict=False) and not lost
    assert text_of(tok, ids, mask) == "\n Hello!<|user|>\n See you<|user|>"
    control = {tok.added[n]["id"] for n in marks}
    typed = [user("type <|user|> to a soprano"), answer("sop")]
    for template in (None, "chatglm3"):
        ids = chat.render(tok, typed, template).ids
        assert [i for i in ids if i in control] == [tok.added[n]["id"] for n in (
            "[gMASK]", "sop", "<|user|>", "<|assistant|>", "<|user|>")], template
        assert "type <|user|> to a soprano" in text_of(tok, ids)

# ----------------------------------------------------------------------------- which template it is


EDITS = {"spaces": ("<|im_start|>", "<|im_start|> "),
         "join": ("message.role + '\\n'", "message.role + ':\\n'"),
         "system": ("messages[0].content + '\\n\\n'", "messages[0].content + ' '"),
         "end": ("'<|im_end|>\\n'", "'<|im_end|>'")}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("row", ["chatml", "qwen3", "gemma", "llama3", "mistral", "glm4"])
def test_an_edited_copy_counts_as_edited(edit, row, world):
    """Of a published template and of one that we wrote: no row is guessed."""
    tok, auto = world
    ours = chat.jinja(chat.TEMPLATES[row], "</s>")
    assert chat.find_row(ours, "</s>") == row
    old, new = EDITS[edit]
    for source in (ours.replace("\\n\" }}", " \" }}"), ours.replace(" | trim", ""),
                   PUBLISHED["qwen2_5"].replace(old, new)):
        if source == ours:
            continue
        assert chat.find_row(source, "</s>") is None
        theirs = auto.apply_chat_template(TALK[:3], chat_template=source, return_dict=False,
                                          add_generation_prompt=True)
        assert chat.render(give(tok, source), TALK[:3], None, True).ids == theirs


@pytest.mark.parametrize("name", chat.TEMPLATES)
def test_a_row_is_what_its_own_jinja_says(name, world):
    """Thoughts, tools and calls too: by Jinja, by the row, and by transformers."""
    tok, auto = world
    row, source = chat.TEMPLATES[name], chat.jinja(chat.TEMPLATES[name], "</s>")
    names = [n for n in row.control("</s>") if n not in tok.added]
    if names:
        pytest.skip(f"{names} are not of this vocabulary")
    give(tok, source)
    cases = [(THOUGHT, {}), (TALK, {}), ([SYSTEM, *TALK], {})]
    if row.tools:
        tools = CASES["tools"][0]
        cases += [(tools, {"tools": TOOLS}), ([SYSTEM, *tools], {"tools": TOOLS}),
                  ([*THOUGHT[:1], {**THOUGHT[1], "tool_calls": CALL}, TOOL, answer("x")], {})]
    for messages, given in cases:
        theirs = auto.apply_chat_template(messages, chat_template=source, return_dict=False,
                                          **given)
        ids = chat.render(tok, messages, name, **given).ids
        assert text_of(tok, ids).removesuffix(row.closing) == \
            text_of(tok, theirs).removesuffix(row.closing)
        assert tok.pattern != "cl100k" or ids[:len(theirs)] == theirs
    if not row.tools:
        for messages, given in ((CASES["tools"][0], {}), (TALK, {"tools": TOOLS})):
            with pytest.raises(UserError, match="no words|no place"):
                chat.render(tok, messages, name, **given)


def test_templates_by_name(world):
    tok = world[0]
    give(tok, "{{ messages[0].content }}<|im_end|>")
    tok.facts.jinjas["tool_use"] = "{{ tools[0].function.name }}<|im_end|>"
    assert text_of(tok, chat.render(tok, TALK[:1], None, True).ids) == "Hi.<|im_end|>"
    for given in ({"tools": TOOLS}, {"tools": TOOLS, "template": "tool_use"}):
        ids = chat.render(tok, TALK[:1], add_generation_prompt=True, **given).ids
        assert text_of(tok, ids) == "weather<|im_end|>"
    del tok.facts.jinjas["default"]
    with pytest.raises(UserError, match="--template=tool_use"):
        chat.render(tok, TALK[:1])
    with pytest.raises(UserError, match="unknown chat template 'nosuch'.*--template=chatml"):
        chat.render(tok, TALK[:1], "nosuch")


def test_what_no_template_would_read_is_refused_in_data(world):
    tok = give(world[0], PUBLISHED["llama3"])
    for more in ({"tools": TOOLS}, {"chat_template_kwargs": {"enable_thinking": False}},
                 {"documents": [{"title": "a", "text": "b"}]}):
        with pytest.raises(UserError, match="conversation 1: .*no place for"):
            chats.render_all(tok, [{"messages": TALK, **more}], None, 99)
        with pytest.raises(UserError, match="pair 1: .*no place for"):
            chats.render_pairs(tok, [{"chosen": TALK, "rejected": TALK[:2], **more}], None, 99)
        with pytest.raises(UserError, match="no place for"):
            evaluation.answers(None, tok, [{"messages": TALK, **more}])
    give(tok, PUBLISHED["qwen3"])
    done = chats.render_all(tok, [{"messages": TALK, "tools": TOOLS}], None, 999)
    assert "Look up the weather" in text_of(tok, done[0][0].tolist())


def test_a_pair_with_half_an_answer_is_skipped_and_told(world):
    """Qwen3-2507 drops thoughts, which may be all that makes an answer the better one."""
    worse = [*THOUGHT[:3], answer("12", reasoning_content="six")]
    for name, kept in (("qwen3", 2), ("qwen3_instruct_2507", 0)):
        tok = give(world[0], PUBLISHED[name])
        pairs = chats.render_pairs(tok, [{"chosen": THOUGHT, "rejected": worse}], None, 999)
        assert len(pairs) == kept and pairs.skipped == (kept == 0)
        assert pairs.untold.total() == 2 - kept
        assert all("six" in text_of(tok, ids.tolist(), mask) for ids, mask in pairs)
    # a greeting of the assistant's is context of both, as any answer that they share
    greeted = [{k: [answer("Welcome"), *v] for k, v in
                (("chosen", TALK[:2]), ("rejected", [TALK[0], answer("Go")]))}]
    pairs = chats.render_pairs(tok, greeted, None, 999)
    assert [text_of(tok, ids.tolist(), mask) for ids, mask in pairs] == [
        "Hello!<|im_end|>", "Go<|im_end|>"] and not pairs.untold

# ----------------------------------------------------------------------------------------- bounds

LONG = "{% set x = 'abcdefgh' * 99999 %}"
HOSTILE = {
    "loops": "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}",
    "range": "{% for a in range(999999999) %}{% endfor %}",
    "product": "{{ 'ab' * 999999999 }}", "list": "{{ ([0] * 999999999) | length }}",
    "power": "{{ 9 ** (9 ** 9) }}", "number": "{% set n = namespace(x=9) %}{% for i in range(99) %}"
    "{% set n.x = n.x * n.x %}{% endfor %}{{ n.x }}",
    "doubling": "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}"
    "{% endfor %}", "joining": "{% set n = namespace(x='ab') %}{% for i in range(99) %}"
    "{% set n.x = n.x ~ n.x %}{% endfor %}",
    "blocks": "{% set n = namespace(x='ab') %}{% for i in range(99) %}{% set y %}{{ n.x }}{{ n.x }}"
    "{% endset %}{% set n.x = y %}{% endfor %}",
    "lists": "{% set n = namespace(x=[0]) %}{% for i in range(99) %}{% set n.x = [n.x, n.x] %}"
    "{% endfor %}{{ n.x }}",
    "dicts": "{% set n = namespace(x={}) %}{% for i in range(99) %}{% set n.x = dict(a=n.x, b=n.x) "
    "%}{% endfor %}{{ n.x | tojson }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "two recursions": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}"
    "{% endmacro %}{{ f(40) }}",
    "output": LONG + "{% for a in range(99999) %}{{ x }}{% endfor %}",
    "buffer": LONG + "{% set y %}{% for a in range(99999) %}{{ x }}{% endfor %}{% endset %}",
    "text": "{% set y %}{% for a in range(99999) %}" + "x" * 9999 + "{% endfor %}{% endset %}",
    "slices": LONG + "{% set n = namespace(x=[]) %}{% for a in range(99999) %}"
    "{% set n.x = n.x + [x[a:]] %}{% endfor %}",
    "replace": "{% set x = 'a' * 99999 %}{{ x | replace('a', x) }}",
    "replace method": "{% set x = 'a' * 99999 %}{{ x.replace('a', x) }}",
    "join": "{% set x = 'a' * 99999 %}{{ range(99999) | join(x) }}",
    "join method": "{% set x = 'a' * 99999 %}{{ x.join(x | list) }}",
    "center": "{{ 'a' | center(999999999) }}", "ljust": "{{ 'a'.ljust(999999999) }}",
    "indent": "{{ ('\n' * 9999) | indent(9999) }}",
    "batch": "{{ [1] | batch(999999999, 0) | list }}",
    "slice": "{{ [1] | slice(999999999) | list }}", "format": "{{ '%999999999d' | format(1) }}",
    "percent": "{{ '%*d' % (999999999, 1) }}", "str.format": "{{ '{:999999999}'.format(1) }}",
    "many fields": LONG + "{{ ('%(a)s' * 9999) % {'a': x} }}",
    "many braces": LONG + "{{ ('{0}' * 9999).format(x) }}",
    "map of fields": LONG + "{{ ('{a}' * 9999).format_map({'a': x}) }}",
    "indent with text": LONG + "{{ ('\n' * 9999) | indent(width=x) }}",
    "separators": LONG + "{{ range(9999) | list | tojson(separators=(x, x)) }}",
    "join of a generator": LONG + "{{ x.join(range(9999) | map('string')) }}",
    "deep list": "{% set n = namespace(x=[]) %}{% for i in range(99999) %}{% set n.x = [n.x] %}"
    "{% endfor %}", "blocks that call themselves": "{% block a %}{{ self.a() }}{% endblock %}",
    "recursive loop": "{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "nested format": "{{ '{:{}}'.format(1, 999999999) }}",
    "json": "{{ messages | tojson(indent=999999999) }}", "bytes": "{{ (1).to_bytes(999999999) }}",
    "round": "{{ 1.5 | round(999999999) }}", "date": "{{ strftime_now('%999999999d') }}",
    "map": LONG + "{{ range(99999) | map('default', 1) | map('string') | map('replace', '1', x) "
    "| list | length }}", "sum": "{{ [[0]] * 9999 | sum(start=[]) }}",
    "deep": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "long": "x" * 300_000,
    "nested": "{% for a in [1] %}" * 60 + "{% endfor %}" * 60,
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_template_without_bounds_is_one_sentence(what):
    start = time.process_time()
    with pytest.raises(UserError, match="template") as e:
        compile_template(HOSTILE[what]).run({"messages": TALK})
    assert "\n" not in str(e.value) and len(str(e.value)) < 500
    assert time.process_time() - start < 5


def test_a_template_that_takes_too_long_is_stopped(monkeypatch):
    monkeypatch.setattr(sandbox, "SECONDS", 0.05)
    with pytest.raises(UserError, match="seconds"):
        compile_template(HOSTILE["loops"]).run({"messages": TALK})
    monkeypatch.setattr(sandbox, "SECONDS", 1e9)        # on a machine however slow
    monkeypatch.setattr(sandbox, "STEPS", 1000)
    with pytest.raises(UserError, match="steps"):
        compile_template("{% for a in range(99999) %}{% endfor %}").run({"messages": TALK})


@pytest.mark.parametrize("source, words", [
    ("{{ raise_exception('Only\nusers, please') }}",
     "refuses the conversation: Only users, please"),
    ("{{ messages[0].content.nothing.more }}", "UndefinedError"), ("{% if %}", "not valid Jinja"),
    ("{{ 1 + 'a' }}", "TypeError"), ("{% include 'x' %}", "fails"),
    ("{{ 'a' | nosuch }}", "nosuch"),
    ("{{ messages.append(1) }}", "SecurityError"), ("{{ ''.__class__.__mro__ }}", "SecurityError"),
    ("{{ messages[0].__class__ }}", ""), ("{% set ns = namespace(__x=1) %}", "SecurityError"),
    ("{{ lipsum() }}", "undefined"), ("{% generation %}{{ 1 }}", "not valid Jinja")])
def test_faults_of_a_template_are_one_sentence(source, words):
    try:
        text, _ = compile_template(source).run({"messages": TALK})
    except UserError as e:
        assert words in str(e) and "\n" not in str(e) and "template" in str(e)
    else:
        assert not words and not text       # what is unsafe is undefined, and prints nothing


def test_what_templates_use_is_there_and_counts_nothing_twice():
    """The pieces of Jinja in published templates, with the results of plain Jinja."""
    import jinja2.sandbox
    plain = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    for source in ("{% for a in [3, 1, 2] | sort %}{{ loop.index }}{{ a }}{{ loop.last }}"
                   "{{ loop.length }}{% endfor %}", "{{ 'a-b'.split('-') | join('+') }}",
                   "{{ {'b': 1, 'a': [2]} | dictsort }}", "{{ [1, 2] + [3] }}{{ 'a' ~ 1 ~ none }}",
                   "{% for k, v in {'x': 1}.items() %}{{ k }}{{ v }}{% else %}none{% endfor %}",
                   "{% set x | upper %}ab{% endset %}{{ x }}", "{{ '%s-%d' % ('a', 3) }}",
                   "{{ '{}{x} {{2024}}'.format(1, x=2) }}{{ '2024: %s, 100%%' % 'a' }}",
                   "{{ ', '.join(messages | map(attribute='role')) }}{{ '-'.join('abc') }}",
                   "{{ 'in 20240101 %02d' | format(7) }}{{ '%5.1f|%-3s|' % (1.25, 'a') }}",
                   "{{ messages[0] | tojson(indent=2) if false else 'x' }}",
                   "{{ [1, 2, 3][1:] }}{{ 'abc'[::-1] }}",
                   "{% macro m(a, b=2) %}<{{ a }}{{ b }}>{% endmacro %}{{ m(1) }}{{ m(b=3, a=0) }}",
                   "{% for m in messages if m.role == 'user' %}{{ m.content | trim }}{% endfor %}",
                   "{{ messages | map(attribute='role') | unique | list }}",
                   "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}",
                   "{% for t in nothing %}x{% endfor %}{{ nothing }}{{ nothing is defined }}",
                   "{{ 7 // 2 }}{{ 2 ** 3 }}{{ 7 % 4 }}{{ 'ab' * 2 }}",
                   "{{ 'x\ny' | indent(2) }}{{ ' a '.strip() }}{{ 'a' in 'cab' }}{{ 1 in [1] }}",
                   "{% set a, b = 1, (2, 3) %}{{ a }}{{ b }}{{ range(3) | list }}{{ [] or 'd' }}"):
        text, spans = compile_template(source).run({"messages": TALK})
        assert text == plain.from_string(source).render(messages=TALK) and not spans


def test_26000_short_conversations_would_take_seconds(world):
    """600 of them by Qwen3's own template: 26,000 take 43 times as long."""
    tok = give(world[0], PUBLISHED["qwen3"])
    start = time.process_time()
    chats.render_all(tok, [{"messages": TALK[:2]}] * 600, None, 999)
    assert time.process_time() - start < 3
