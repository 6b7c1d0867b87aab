"""data/layouts.py: whatever layout a record has, its keys are learnt, or refused by name.

Oracles: trl's own functions where it has them; else messages written out by hand from the pages of
the projects that named the layouts (OpenAI, axolotl, LLaMA-Factory, ms-swift, Alpaca, Dolly).
"""
import copy
import itertools
import json
import random
import re

import pytest

import eval as evaluate
from config import UserError, configure
from data import chats, layouts
from data.messages import Notes

S, U, A, T = "system", "user", "assistant", "tool"


def said(*turns):
    """said("user", "Hi", "assistant", "Hello") -> messages."""
    return [{"role": r, "content": c} for r, c in zip(turns[::2], turns[1::2])]


PAIR = said(U, "Hi", A, "Hello")
GPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": "sky"}}}
TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
CONTEXT = {"role": A, "content": "Hey", "train": False}


def thinking(**thoughts):
    return [PAIR[0], {**PAIR[1], **thoughts}]


# name: (record, what is right): every layout that is read, with the keys that it may have
SFT = {
    "messages": ({"messages": PAIR}, {"messages": PAIR}),
    "sharegpt": ({"conversations": GPT}, {"messages": PAIR}),
    "system column": ({"conversations": GPT, "system": "Be brief"},
                      {"messages": said(S, "Be brief") + PAIR}),
    "system_prompt": ({"messages": PAIR, "system_prompt": "Be brief", "system": None},
                      {"messages": said(S, "Be brief") + PAIR}),
    "system twice, the same": ({"messages": said(S, "Be brief ") + PAIR, "system": "Be brief"},
                               {"messages": said(S, "Be brief ") + PAIR}),
    "system beside a prompt of turns": ({"prompt": PAIR[:1], "completion": PAIR[1:], "system": "x"},
                                        {"messages": said(S, "x") + PAIR}),
    "openorca": ({"id": "1", "system_prompt": "x", "question": "Hi", "response": "Hello"},
                 {"messages": said(S, "x") + PAIR}),
    "alpaca": ({"instruction": "Add", "input": "1 2", "output": "3"},
               {"messages": said(U, "Add\n\n### Input:\n1 2", A, "3")}),
    "alpaca, asked in input": ({"instruction": "", "input": "1 2", "output": "3"},
                               {"messages": said(U, "1 2", A, "3")}),
    "input and output alone": ({"input": "1 2", "output": "3"},
                               {"messages": said(U, "1 2", A, "3")}),
    "alpaca as published": ({"instruction": "Add", "input": "1 2", "output": "3", "text":
                             "Below is …\n\n### Instruction:\nAdd\n\n### Input:\n1 2\n\n"
                             "### Response:\n3"},
                            {"messages": said(U, "Add\n\n### Input:\n1 2", A, "3")}),
    "dolly": ({"instruction": "Which?", "context": "It is red", "response": "red",
               "category": "closed_qa"},
              {"messages": said(U, "Which?\n\n### Input:\nIt is red", A, "red")}),
    "trl, texts": ({"prompt": "Hi", "completion": "Hello"}, {"messages": PAIR}),
    "trl, turns": ({"prompt": said(U, "a", A, "Hey", U, "Hi"), "completion": PAIR[1:]},
                   {"messages": said(U, "a") + [CONTEXT] + PAIR}),
    "trl, the prompt once more": ({"prompt": "Hi", "completion": said(U, "a", A, "Hey") + PAIR},
                                  {"messages": said(U, "a") + [CONTEXT] + PAIR}),
    "ultrachat": ({"prompt": "Hi", "prompt_id": "f0", "messages": PAIR}, {"messages": PAIR}),
    "metamath": ({"query": "Hi", "response": "Hello", "type": "GSM_SV"}, {"messages": PAIR}),
    "ms-swift": ({"system": "x", "history": [["a", "b"]], "query": "Hi", "response": "Hello"},
                 {"messages": said(S, "x", U, "a", A, "b") + PAIR}),
    "numina": ({"source": "amc", "problem": "Hi", "solution": "Hello", "messages": PAIR},
               {"messages": PAIR}),
    "openr1": ({"problem": "Hi", "solution": "Hello", "answer": "H", "uuid": "7"},
               {"messages": PAIR}),
    "reasoning_content": ({"messages": thinking(reasoning_content="so")},
                          {"messages": thinking(reasoning_content="so")}),
    "thinking": ({"messages": thinking(thinking="so", reasoning=None)},
                 {"messages": thinking(reasoning_content="so")}),
    "thoughts twice, the same": (
        {"messages": [PAIR[0], {"role": A, "content": "<think>\nso\n</think>\n\nHello",
                                "reasoning_content": "so"}]},
        {"messages": thinking(reasoning_content="so")}),
    "weight": ({"messages": said(U, "a") + [{"role": A, "content": "Hey", "weight": 0}]
                + [PAIR[0], {**PAIR[1], "weight": 1}]},
               {"messages": said(U, "a") + [CONTEXT] + PAIR}),
    "train, of the user as well": (
        {"messages": [{"role": U, "content": "a", "train": False},
                      {"role": A, "content": "Hey", "train": False}, *PAIR]},
        {"messages": said(U, "a") + [CONTEXT] + PAIR}),
    "ms-swift's loss": ({"messages": said(U, "a") + [{"role": A, "content": "Hey", "loss": False}]
                         + PAIR}, {"messages": said(U, "a") + [CONTEXT] + PAIR}),
    "tools": ({"messages": [PAIR[0], {"role": A, "content": None, "tool_calls": [
        {"id": "c1", "type": "function",
         "function": {"name": "look", "arguments": '{"at": "sky"}'}}]},
        {"role": T, "tool_call_id": "c1", "name": "look", "content": "blue"}, PAIR[1]],
        "tools": [TOOL]},
        {"messages": [PAIR[0], {"role": A, "content": "", "tool_calls": [{**CALL, "id": "c1"}]},
                      {"role": T, "content": "blue", "tool_call_id": "c1", "name": "look"},
                      PAIR[1]], "tools": [TOOL]}),
    "a call beside words": ({"messages": [PAIR[0], {"role": A, "content": "I look", "tool_calls":
                                                    [CALL]}], "tools": json.dumps([TOOL])},
                            {"messages": [PAIR[0], {"role": A, "content": "I look",
                                                    "tool_calls": [CALL]}], "tools": [TOOL]}),
    "function_call": ({"messages": [PAIR[0], {"role": A, "content": None, "function_call": {
        "name": "look", "arguments": '{"at": "sky"}'}},
        {"role": "function", "name": "look", "content": "blue"}],
        "functions": [TOOL["function"]]},
        {"messages": [PAIR[0], {"role": A, "content": "", "tool_calls": [CALL]},
                      {"role": T, "content": "blue", "name": "look"}], "tools": [TOOL]}),
    "llama-factory": ({"conversations": [
        GPT[0], {"from": "function_call", "value": '{"name": "look", "arguments": {"at": "sky"}}'},
        {"from": "observation", "value": '{"colour": "blue"}'}, GPT[1]], "tools": "[]"},
        {"messages": [PAIR[0], {"role": A, "content": "", "tool_calls": [CALL]},
                      *said(T, '{"colour": "blue"}'), PAIR[1]]}),
    "minimind": ({"conversations": [
        {"role": S, "content": "Help", "tools": json.dumps([TOOL])}, PAIR[0],
        {"role": A, "content": "", "tool_calls": json.dumps([CALL["function"]])}]},
        {"messages": [*said(S, "Help"), PAIR[0], {"role": A, "content": "", "tool_calls": [CALL]}],
         "tools": [TOOL]}),
    "documents and switches": (
        {"messages": PAIR, "documents": [{"title": "a", "text": "b"}],
         "chat_template_kwargs": {"enable_thinking": False, "custom_instructions": None}},
        {"messages": PAIR, "documents": [{"title": "a", "text": "b"}],
         "chat_template_kwargs": {"enable_thinking": False}}),
    "described": ({"messages": PAIR, "source": "web", "score": 3, "id": 7, "metadata": {"a": 1},
                   "images": [], "title": None, "rejected": ""}, {"messages": PAIR}),
    "an empty answer": ({"messages": PAIR + said(U, "And?", A, "  ")},
                        {"messages": PAIR + said(U, "And?")}),
}
GO = said(U, "Hi", A, "Go")
BOTH = {"chosen": PAIR, "rejected": GO}
LONG = said(S, "Be kind", U, "a", A, "b", U, "Hi")
PREFERENCE = {
    "whole": (BOTH, BOTH),
    "texts": ({"prompt": "Hi", "chosen": "Hello", "rejected": "Go"}, BOTH),
    "orca": ({"system": "x", "question": "Hi", "chosen": "Hello", "rejected": "Go"},
             {k: said(S, "x") + v for k, v in BOTH.items()}),
    "system beside messages": ({"system": "x", "messages": PAIR[:1], "chosen": "Hello",
                                "rejected": "Go"}, {k: said(S, "x") + v for k, v in BOTH.items()}),
    "llama-factory, one turn each": ({"conversations": GPT[:1], "chosen": GPT[1],
                                      "rejected": {"from": "gpt", "value": "Go"}}, BOTH),
    "ultrafeedback": ({**BOTH, "messages": PAIR, "prompt": "Hi", "prompt_id": "f",
                       "score_chosen": 9, "score_rejected": 1.5}, BOTH),
    "orpo-dpo-mix": ({**BOTH, "prompt": "Hi", "question": "Hi", "source": "x"}, BOTH),
    "alpaca": ({"instruction": "Hi", "input": "", "output": "", "chosen": "Hello",
                "rejected": "Go"}, BOTH),
    "with tools": ({**BOTH, "tools": [TOOL]}, {**BOTH, "tools": [TOOL]}),
    "unpaired": ({"prompt": "Hi", "completion": "Hello", "label": True},
                 {"messages": PAIR, "label": True}),
    "unpaired, turns": ({"prompt": said(U, "a", A, "Hey", U, "Hi"), "completion": PAIR[1:],
                         "label": False},
                        {"messages": said(U, "a") + [CONTEXT] + PAIR, "label": False}),
    "kto_tag": ({"messages": said(U, "a", A, "Hey") + PAIR, "kto_tag": "false"},
                {"messages": said(U, "a") + [CONTEXT] + PAIR, "label": False}),
}
PROMPTS = {"prompt": ({"prompt": PAIR[:1], "answer": 2}, {"prompt": PAIR[:1], "answer": "2"}),
           "conversation": ({"messages": PAIR, "system": "x"},
                            {"prompt": said(S, "x") + PAIR[:1], "answer": "Hello"})}
LABELS = {"plain": ({"text": "a", "label": 1, "idx": 4}, {"text": "a", "label": "1"}),
          "any case": ({"Text": "a", " LABEL": " spam "}, {"text": "a", "label": "spam"})}
TABLE = {"sft": SFT, "preference": PREFERENCE, "prompts": PROMPTS, "labels": LABELS}
ROWS = [pytest.param(kind, name, id=f"{kind}: {name}") for kind in TABLE for name in TABLE[kind]]


@pytest.mark.parametrize("kind, name", ROWS)
def test_every_key_of_a_layout_is_learnt(kind, name):
    record, want = TABLE[kind][name]
    before = copy.deepcopy(record)
    assert layouts.ADAPTERS[kind](record) == want
    assert record == before                         # the caller's record is not touched


def places(value):
    """The objects of a record in which a stranger's key could stand: itself, turns and calls."""
    yield value
    for v in value.values():
        for item in v if isinstance(v, list) else [v]:
            if isinstance(item, dict) and ({"role", "from"} & item.keys()):
                yield item
                yield from item.get("tool_calls") or [] if isinstance(
                    item.get("tool_calls"), list) else []


@pytest.mark.parametrize("key", ["mask", "Weight", "images", "label_mask", "contents"])
@pytest.mark.parametrize("kind, name", ROWS)
def test_an_unknown_key_is_refused_by_name_wherever_it_stands(kind, name, key):
    """And with --ignore_keys the record is what it was, which is counted."""
    record, want = TABLE[kind][name]
    for k in range(len(list(places(copy.deepcopy(record))))):
        strange = copy.deepcopy(record)
        place = list(places(strange))[k]
        place[key] = "something"
        with pytest.raises(UserError, match=rf"unknown key '{key}'"):
            layouts.ADAPTERS[kind](strange)
        if "arguments" in str(place.get("function", "")) or "arguments" in place:
            continue                                # a call is nothing to leave parts out of
        notes = Notes([key, "other"])
        assert layouts.ADAPTERS[kind](strange, notes) == want
        assert notes.ignored[key] >= 1 and notes.ignored["other"] == 0


@pytest.mark.parametrize("key, value", [
    ("weight", 0), ("train", False), ("loss", 0.0), ("label", False), ("rejected", "x"),
    ("tools_used", ["x"]), ("thinking", "x"), ("videos", ["x"]), ("history", [["a", "b"]]),
    ("input", "x"), ("context", "x"), ("question", "x"), ("response", "x"), ("prompt", PAIR[1:]
     + PAIR[:1]), ("text", "Hello"), ("reward_model", {"ground_truth": 1})])
def test_keys_of_other_layouts_beside_a_conversation_are_refused(key, value):
    """What means something elsewhere, and nothing here, is not dropped either."""
    with pytest.raises(UserError, match=rf"'{key}'"):
        layouts.conversation({"messages": PAIR, key: value})


def turn(role, **more):
    return {"messages": [PAIR[0], {"role": role, "content": "x", **more}, PAIR[1]]}


@pytest.mark.parametrize("record, says", [
    ({"messages": said(S, "a") + PAIR, "system": "b"}, "the system turn say different things"),
    ({"messages": PAIR, "system": "a", "system_prompt": "b"}, "system and system_prompt say diff"),
    (turn(A, reasoning_content="a", thinking="b"), "reasoning_content and thinking say different"),
    ({"messages": [PAIR[0], {"role": A, "content": "<think>a</think>b", "thinking": "c"}]},
     "thoughts in its content and others"),
    (turn(U, thinking="a"), "of the user and has reasoning_content"),
    (turn(A, weight=0.5), r"message 2 of messages: weight is 0.5"),
    (turn(A, weight="0"), r"weight is '0'"),
    (turn(A, weight=0, train=True), "weight and train say different things"),
    (turn(U, train=True), "which only an assistant's turn can be"),
    (turn(A, tool_calls=[CALL], function_call={"name": "other", "arguments": "{}"}),
     "tool_calls and function_call say different things"),
    (turn(U, tool_calls=[CALL]), "of the user and has tool_calls"),
    (turn(A, tool_calls=[{"function": {"name": "x", "arguments": "not JSON"}}]), "not JSON"),
    (turn(A, tool_calls=[{"function": {"name": "x", "arguments": "[1]"}}]), "object of arguments"),
    (turn(A, tool_calls=[{"type": "code", "function": CALL["function"]}]), "something else"),
    ({"conversations": [{"from": "function_call", "value": "look at it"}]}, "not JSON"),
    (turn(U, tools=[TOOL]), "unknown key 'tools'"),
    (turn(A, value="y"), "a content and another value"),
    ({"messages": [{"role": U, "content": [{"type": "image", "text": "x"}]}]}, "'image'"),
    ({"messages": PAIR, "conversations": GO}, "messages and conversations say different things"),
    ({"instruction": "a", "input": "b", "context": "c", "output": "d"}, "input and context say"),
    ({"messages": PAIR, "tools": [TOOL], "functions": [{"name": "b"}]}, "tools and functions say"),
    ({"messages": PAIR, "tools": "look"}, "tools is a text that is not JSON"),
    ({"messages": PAIR, "documents": "a"}, "documents is a str"),
    ({"messages": PAIR, "chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ({"prompt": "Hi", "output": "a", "response": "b"}, "unknown key 'response'"),
    ({"prompt": "Bye", "completion": PAIR}, "no part of the conversation in completion"),
    ({"prompt": PAIR, "completion": PAIR[1:]}, "ends with an answer already"),
    ({"prompt": PAIR, "response": "Hello"}, "ends with an answer already"),
    ({"prompt": said(S, "x"), "completion": said(S, "y") + PAIR}, "no part of the conversation"),
])
def test_what_a_record_says_twice_has_to_agree(record, says):
    with pytest.raises(UserError, match=says):
        layouts.conversation(record)


@pytest.mark.parametrize("record, says", [
    ({**BOTH, "prompt": "Something else"}, "no part of the conversation"),
    # layouts of other projects: OpenAI's, ms-swift's, Anthropic's HH-RLHF
    ({"input": {"messages": PAIR[:1]}, "preferred_output": PAIR[1:], "non_preferred_output":
      GO[1:]}, "'preferred_output', 'non_preferred_output'; .* chosen is not there: rename"),
    ({"messages": PAIR, "rejected_response": "Go"}, "'rejected_response'; .*: rename them"),
    ({"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: "
      "Go"}, "prompt is not there: give that under prompt, or make chosen a list of messages"),
    ({**BOTH, "prompt": said(U, "Something else")}, "no part of the conversation"),
    ({"prompt": "Hi", "chosen": "a", "rejected": "b", "output": "c"}, "unknown key 'output'"),
    ({"messages": PAIR, "chosen": "a", "rejected": "b"}, "ends with an answer already"),
    ({"prompt": "Hi", "completion": "a", "label": 0.5}, "label is 0.5"),
    ({"prompt": "Hi", "completion": " ", "label": True}, "does not end with an answer"),
    ({"system": "b", **{k: said(S, "a") + v for k, v in BOTH.items()}}, "different things"),
])
def test_preferences_that_contradict_themselves(record, says):
    with pytest.raises(UserError, match=says):
        layouts.preference(record)


def test_of_keys_drawn_at_random_no_word_is_lost():
    """Two layouts at once, half of one: whatever is accepted holds every word of the record."""
    rng, count = random.Random(3), itertools.count()

    def word():
        return f"<{next(count)}>"

    def talk(exchanges):
        out = said(S, word()) if rng.random() < .2 else []
        for _ in range(exchanges):
            answer = {"role": A, "content": word()}
            for key in ("reasoning_content", "thinking"):
                answer |= {key: word()} if rng.random() < .1 else {}
            if rng.random() < .2:
                answer["tool_calls"] = [{"name": word(), "arguments": {"a": word()}}]
            if rng.random() < .2:
                answer["function_call"] = {"name": word(), "arguments": f'{{"a": "{word()}"}}'}
            out += [*said(U, word()), answer]
        return out

    def side():
        return rng.choice([word(), talk(1), talk(1)[-1:], talk(1)[-1]])

    make = dict.fromkeys(["instruction", "input", "output", "response", "question", "system",
                          "system_prompt", "context", "text"], word)
    make |= {"messages": lambda: talk(2), "conversations": lambda: talk(1), "chosen": side,
             "prompt": lambda: rng.choice([word(), talk(1), talk(1)[:1]]), "rejected": side,
             "completion": side, "history": lambda: [[word(), word()]],
             "tools": lambda: [{"name": word()}], "documents": lambda: [word()],
             "label": lambda: rng.random() < .5}
    accepted = dict.fromkeys(("sft", "preference"), 0)
    for _ in range(20_000):
        record = {key: make[key]() for key in rng.sample(list(make), rng.randrange(2, 6))}
        for kind in accepted:
            try:
                found = layouts.ADAPTERS[kind](record)
            except UserError:
                continue
            accepted[kind] += 1
            words = [set(re.findall(r"<\d+>", repr(value))) for value in (record, found)]
            assert words[0] == words[1], record
    assert accepted["sft"] > 500 and accepted["preference"] > 100


# ------------------------------------------------------------------------------------ trl's own

def pair(before, prompt, **more):
    return {**more, "prompt": prompt, "chosen": before + said(A, "Hello"),
            "rejected": before + said(A, "Go")}


@pytest.mark.parametrize("record", [
    pair(LONG, "Hi"), pair(LONG, "a"), pair(said(U, "Hi"), " Hi\n"), pair(said(U, "Hi"), "Hi"),
    pair(said(S, "x", U, "Hi"), "Hi"), pair([], said(U, "Hi")), pair([], LONG),
    BOTH, pair(said(U, "Hi"), said(S, "x")), pair(said(U, "Hi"), said(U, "a", A, "b"))])
def test_a_preference_s_prompt_stands_there_once_as_in_trl(record):
    """trl's maybe_extract_prompt gives prompt and answers apart; together they are ours."""
    data_utils = pytest.importorskip("trl.data_utils")
    theirs = data_utils.maybe_extract_prompt(copy.deepcopy(record))
    ours = layouts.preference(record)
    for side in ("chosen", "rejected"):
        assert ours[side] == theirs["prompt"] + theirs[side]


@pytest.mark.parametrize("name", [n for n, (record, _) in SFT.items() if any(
    isinstance(record.get(k), list) for k in ("messages", "conversations", "prompt"))])
def test_other_spellings_are_what_trl_makes_of_them(name):
    """maybe_convert_to_chatml first, or not: the same messages. is_conversational agrees."""
    data_utils = pytest.importorskip("trl.data_utils")
    record, want = SFT[name]
    theirs = data_utils.maybe_convert_to_chatml(copy.deepcopy(record))
    turned = {k: v for k, v in theirs.items() if isinstance(v, list) and k != "tools"}
    assert data_utils.is_conversational(turned)
    assert layouts.conversation(theirs) == want


def test_unpaired_records_are_trl_s(tmp_path):
    """unpair_preference_dataset's rows, read as a file: a chosen and a rejected answer each."""
    datasets = pytest.importorskip("datasets")
    data_utils = pytest.importorskip("trl.data_utils")
    rows = data_utils.unpair_preference_dataset(datasets.Dataset.from_list(
        [{"prompt": "Hi", "chosen": "Hello", "rejected": "Go"}]))
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert list(chats.read_chats(path, "preference")) == [
        {"messages": PAIR, "label": True}, {"messages": GO, "label": False}]


# ------------------------------------------------------------------------------------- files

@pytest.mark.parametrize("text", [
    "{0}\n{1}\n", "[{0},\n{1}]", "[{0}, {1}]\n", "  {0}\n\n{1}", "{0},\n{1},\n"])
def test_a_list_of_messages_is_a_record(tmp_path, text):
    """nanochat's CustomJSON: one list a line; also in an array, and beside objects."""
    path = tmp_path / "a.jsonl"
    first, second = json.dumps(PAIR), json.dumps(GO, indent=1)
    path.write_text(text.replace("{0}", first).replace("{1}", second))
    assert [r["messages"] for r in chats.read_chats(path)] == [PAIR, GO]
    path.write_text(text.replace("{0}", first).replace("{1}", json.dumps({"messages": GO})))
    assert [r["messages"] for r in chats.read_chats(path)] == [PAIR, GO]


def test_one_conversation_in_a_file_is_one_record(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(PAIR, indent=1))
    assert [r["messages"] for r in chats.read_chats(path)] == [PAIR]
    path.write_text(json.dumps(PAIR)[:-9] + "\n" + json.dumps(GO) + "\n")
    reader = chats.loader.Reader(skip_bad=True)
    assert [r["messages"] for r in chats.read_chats(path, reader=reader)] == [GO]
    assert reader.bad == 1


def test_what_was_left_out_is_told(tmp_path):
    path = tmp_path / "a.jsonl"
    records = [{"messages": PAIR, "source": "a", "mask": 1}, {"messages": GO, "id": 1},
               {"messages": [PAIR[0], {"role": A, "content": "", "mask": 2}], "source": "b"}]
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    with pytest.raises(UserError, match=r"jsonl, line 1: unknown key 'mask'.*--ignore_keys=mask"):
        list(chats.read_chats(path))
    notes = Notes(["mask", "nothing"])
    assert len(list(chats.read_chats(path, notes=notes))) == 3
    assert notes.lines() == [
        "1 empty answers, at which conversations were cut",
        "keys ignored, as --ignore_keys says: mask (2), nothing (0)",
        "keys not trained on, as they describe records: id (1), source (2)"]


def test_a_key_that_comes_twice_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "a", "content": "b"}]}\n')
    with pytest.raises(UserError, match="line 1: the key 'content' comes twice"):
        list(chats.read_chats(path))


TABLES = {
    "UCI's file": ("SMSSpamCollection", 'ham\tsay "hi\nspam\tWIN\tnow\nham\tok\nspam\tit\'s\n',
                   [("say \"hi", "ham"), ("WIN\tnow", "spam"), ("ok", "ham"), ("it's", "spam")]),
    "named columns": ("a.tsv", 'Label\tTEXT\tid\nham\ta "b\t1\nspam\t"a ""b"""\t2\n',
                      [('a "b', "ham"), ('a "b"', "spam")]),
    "csv": ("a.csv", 'LABEL,Text,,\nham,"a, b",,\n', [("a, b", "ham")]),
    "windows": ("a.csv", "\ufefflabel,text\r\nham,a\r\n", [("a", "ham")]),
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
@pytest.mark.parametrize("name", TABLES)
def test_tables_of_texts_and_labels(tmp_path, name, encoding):
    file, text, want = TABLES[name]
    (tmp_path / file).write_bytes(text.removeprefix("\ufeff" * (encoding != "utf-8")).encode(
        encoding))
    found = list(chats.read_chats(tmp_path / file, "labels"))
    assert [(r["text"], r["label"]) for r in found] == want


@pytest.mark.parametrize("file, text, says", [
    ("a.csv", "text;label\na;b\n", "expected commas between columns, and the first line has ';'"),
    ("a.csv", "text\tlabel\na\tb\n", r"save it with commas, or as \.tsv"),
    ("a.csv", "text,text,label\na,b,c\n", "two columns are named 'text'"),
    ("a.csv", "text,label\na,b,c\n", "line 2: 3 columns, and the first line has 2"),
    ("a.csv", "text,label,\na,b,c\n", "unknown key 'column 3'"),
    ("a.csv", "v1,v2\nham,a\n", "its keys are 'v1', 'v2' .--text_key and --label_key"),
    ("a.tsv", "text\tlabel\tid\na\tb\n", "line 2: 2 columns, and the first line has 3"),
    ("a.tsv", "Category\tMessage\nham\ta\nham\tb\n", "line 1: 'Category' is no other line's label"),
    ("a.txt", "only words\n", "holds no records that can be read"),
    ("a.csv", "PAR1\x15\x04", "is a Parquet file, not text: convert it"),
    ("a.parquet", "", "is a Parquet file"),
    ("a.xlsx", "PK\x03\x04", "save the sheet as CSV"),
    ("spam.zip", "PK\x03\x04", "unpack it"),
])
def test_tables_that_cannot_be_read_say_why(tmp_path, file, text, says):
    (tmp_path / file).write_text(text)
    with pytest.raises(UserError, match=says) as e:
        list(chats.read_chats(tmp_path / file, "labels"))
    assert "\n" not in str(e.value) and len(str(e.value)) < 400


def test_other_columns_by_name_and_columns_swapped(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("v1,v2\n" + "".join(f"{'ham' if k % 2 else 'spam'},text {k}\n"
                                        for k in range(40)))
    train, held, bad = chats.splits(str(path), "labels", columns=("V2", "v1"))
    assert {r["label"] for r in train} == {"ham", "spam"} and train[0]["text"] == "text 0"
    with pytest.raises(UserError, match="40 labels for 40 texts, 'text 0' for one"):
        chats.splits(str(path), "labels", columns=("v1", "v2"))


def test_eval_reads_columns_by_name_and_ignores_keys(tmp_path, capsys):
    (tmp_path / "a.csv").write_text("v1,v2,extra\nham,hi,x\nspam,yo,y\n")
    flags = [f"--dataset={tmp_path / 'a.csv'}", "--text_key=v2", "--label_key=v1"]
    with pytest.raises(UserError, match="unknown key 'extra'"):
        evaluate.read_split(configure(evaluate.Config, flags), "labels")
    _, records = evaluate.read_split(configure(evaluate.Config, [*flags, "--ignore_keys=extra"]),
                                     "labels")
    assert [tuple(r.values()) for r in records] == [("hi", "ham"), ("yo", "spam")]
    assert "extra (2)" in capsys.readouterr().err
    with pytest.raises(UserError, match="names a column for a classifier"):
        evaluate.read(configure(evaluate.Config, flags))


def test_a_folder_of_parquet_files_is_named(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train-00000.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"train-00000\.parquet is a Parquet file"):
        chats.find(str(tmp_path))


def test_an_answer_that_is_not_learnt_is_told():
    """It is passed on for a checker to use; of records with a task that is what it is for."""
    for record, told in (({"prompt": "Hi", "response": "Hello", "answer": "H"}, 1),
                         ({"prompt": "Hi", "response": "Hello", "answer": 4}, 1),
                         ({"messages": PAIR, "answer": "H", "task": "copy"}, 0),
                         ({"prompt": "Hi", "answer": "Hello"}, 0), ({"messages": PAIR}, 0)):
        notes = Notes()
        assert layouts.conversation(record, notes) == {"messages": PAIR}
        assert notes.metadata["answer"] == told
