"""data/chats.py: every layout becomes one, and what is trained on is what assistants say, only."""
import gzip
import json
import random
import re

import numpy as np
import pytest
import torch

from text import chat
import tokenizer as tokenizers
from config import UserError
from data import chats, layouts, loader
from data.messages import Notes
from training.machine import Machine

U, A = "user", "assistant"


def said(*turns):
    """said("user", "Hi", "assistant", "Hello") -> messages."""
    return [{"role": r, "content": c} for r, c in zip(turns[::2], turns[1::2])]


PAIR = said(U, "Hi", A, "Hello")


@pytest.fixture(scope="module")
def tokenizer():
    """300 ids and the control tokens of chatml."""
    text = "the cat sat on the mat; user and assistant say hello, naïve 🐈 12 + 30 = 42.\n" * 30
    t = tokenizers.train([text], 300, workers=1)
    t.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    t.template = "chatml"
    return t


def write(path, records, form="jsonl"):
    text = json.dumps(records) if form == "json" else "".join(json.dumps(r) + "\n" for r in records)
    path.write_text(text)
    return path


def read(tmp_path, record, kind="sft"):
    return list(chats.read_chats(write(tmp_path / "a.jsonl", [record]), kind))


# ------------------------------------------------------------------------------- layouts

@pytest.mark.parametrize("record, want", [
    ({"messages": PAIR}, PAIR),
    ({"conversations": PAIR}, PAIR),
    ({"conversations": [{"from": "system", "value": "Be brief"}, {"from": "human", "value": "Hi"},
                        {"from": "gpt", "value": "Hello"}]},
     said("system", "Be brief", U, "Hi", A, "Hello")),
    ({"messages": [{"role": "developer", "content": "Be brief"}, *PAIR]},
     said("system", "Be brief", *(U, "Hi", A, "Hello"))),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "H"},
                                                {"type": "text", "text": "i"}]}, PAIR[1]]}, PAIR),
    ({"messages": said(U, "Rain?", A, "I look", "function", "yes", A, "It rains")},
     said(U, "Rain?", A, "I look", "tool", "yes", A, "It rains")),
    ({"instruction": "Hi", "input": "", "output": "Hello"}, PAIR),
    ({"instruction": "Add", "input": "1 2", "output": "3"},
     said(U, "Add\n\n### Input:\n1 2", A, "3")),
    ({"instruction": "c", "output": "d", "system": "s", "history": [["a", "b"]]},
     said("system", "s", U, "a", A, "b", U, "c", A, "d")),
    ({"prompt": "Hi", "completion": "Hello"}, PAIR),
    ({"prompt": PAIR[:1], "completion": PAIR[1:]}, PAIR),
    ({"prompt": "Hi", "response": "Hello"}, PAIR),
    ({"question": "Hi", "answer": "Hello"}, PAIR),
    # an answer that is empty ends the conversation: nobody should learn to say nothing
    ({"messages": said(U, "Hi", A, "Hello", U, "And?", A, "  ")},
     said(U, "Hi", A, "Hello", U, "And?")),
    ({"messages": said(U, "Hi", A, "", U, "Hi!", A, "Hello")}, PAIR[:1]),
    ({"messages": [PAIR[0], {"role": "assistant", "content": None}]}, PAIR[:1]),
    ({"messages": said(U, "", A, "Hello")}, said(U, "", A, "Hello")),
])
def test_layouts_of_conversations(tmp_path, record, want):
    assert read(tmp_path, record)[0]["messages"] == want


@pytest.mark.parametrize("record, chosen, rejected", [
    ({"chosen": PAIR, "rejected": said(U, "Hi", A, "Go")}, PAIR, said(U, "Hi", A, "Go")),
    ({"prompt": "Hi", "chosen": "Hello", "rejected": "Go"}, PAIR, said(U, "Hi", A, "Go")),
    ({"prompt": PAIR[:1], "chosen": PAIR[1:], "rejected": said(A, "Go")}, PAIR,
     said(U, "Hi", A, "Go")),
    ({"prompt": "Hi", "chosen": PAIR, "rejected": said(U, "Hi", A, "Go")}, PAIR,
     said(U, "Hi", A, "Go")),
    ({"instruction": "Add", "input": "1 2", "output": "", "chosen": "3", "rejected": "4"},
     said(U, "Add\n\n### Input:\n1 2", A, "3"), said(U, "Add\n\n### Input:\n1 2", A, "4")),
    # LLaMA-Factory's: the conversation, and two last turns
    ({"conversations": [{"from": "human", "value": "Hi"}], "chosen": [
        {"from": "gpt", "value": "Hello"}], "rejected": [{"from": "gpt", "value": "Go"}]}, PAIR,
     said(U, "Hi", A, "Go")),
])
def test_layouts_of_preferences(tmp_path, record, chosen, rejected):
    assert read(tmp_path, record, "preference") == [{"chosen": chosen, "rejected": rejected}]


@pytest.mark.parametrize("record, want", [
    ({"prompt": said(U, "1 + 1?"), "answer": "2", "task": "sum"},
     {"prompt": said(U, "1 + 1?"), "answer": "2", "task": "sum"}),
    ({"prompt": "1 + 1?", "answer": 2}, {"prompt": said(U, "1 + 1?"), "answer": "2"}),
    ({"conversations": said(U, "1 + 1?", A, "")}, {"prompt": said(U, "1 + 1?")}),
    ({"messages": said(U, "1 + 1?", A, "2")}, {"prompt": said(U, "1 + 1?"), "answer": "2"}),
    ({"question": "1 + 1?", "answer": "2"}, {"prompt": said(U, "1 + 1?"), "answer": "2"}),
])
def test_layouts_of_prompts(tmp_path, record, want):
    assert read(tmp_path, record, "prompts") == [want]


def test_a_pair_of_equal_answers_is_dropped_and_counted(tmp_path):
    path = write(tmp_path / "a.jsonl", [
        {"prompt": "Hi", "chosen": "a", "rejected": answer} for answer in "aba"])
    notes = Notes()
    assert len(list(chats.read_chats(path, "preference", notes=notes))) == 1
    assert notes.lines() == ["2 pairs dropped, whose chosen and rejected are the same"]


def test_labels_may_be_words_or_numbers(tmp_path):
    for label in ("spam", 1):
        assert read(tmp_path, {"text": "Hi", "label": label}, "labels") == [
            {"text": "Hi", "label": str(label)}]


def test_files_of_every_form(tmp_path):
    """JSON lines, one array, CSV, and gzip of them; task and answer go along."""
    records = [{"messages": PAIR, "task": "greet", "answer": "Hello"}] * 3
    lines, array = write(tmp_path / "a.jsonl", records), write(tmp_path / "a.json", records, "json")
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(lines.read_bytes()))
    for path in (lines, array, packed):
        assert list(chats.read_chats(path)) == [
            {"task": "greet", "answer": "Hello", "messages": PAIR}] * 3
    table = tmp_path / "a.csv"
    table.write_text('instruction,input,output\nHi,,Hello\n"a\nb",c,d\n')
    assert [r["messages"] for r in chats.read_chats(table)] == [
        PAIR, said(U, "a\nb\n\n### Input:\nc", A, "d")]


@pytest.mark.parametrize("kind, line, reason", [
    ("sft", '{"messages": [', "not JSON"),
    ("sft", '[1]', "a int where a JSON object should be"),
    ("sft", '{"messages": []}', "messages is empty"),
    ("sft", '{"messages": {"role": "user"}}', "messages is dict"),
    ("sft", '{"messages": ["Hi"]}', "message 1 of messages is a str"),
    ("sft", '{"messages": [{"role": "boss", "content": "Hi"}]}', "message 1 .* the role 'boss'"),
    ("sft", '{"messages": [{"role": ["user"], "content": "Hi"}]}', "the role ..user.."),
    ("sft", '{"messages": [{"role": "user", "content": 5}]}', "content of message 1 .* is a int"),
    ("sft", '{"messages": [{"role": "assistant", "content": null, "tool_calls": [1]}]}', "tool"),
    ("sft", '{"text": "Hi"}', "its keys are 'text'"),
    ("sft", '{}', "its keys are none"),
    ("sft", '{"instruction": "Hi"}', "a question and none of output"),
    ("sft", '{"instruction": "Hi", "output": "x", "history": [["a"]]}', "history"),
    ("sft", '{"chosen": [], "rejected": []}', "preference record"),
    ("preference", '{"messages": [{"role": "user", "content": "Hi"}]}', "chosen is not there"),
    ("preference", '{"chosen": "a", "rejected": "b"}', "its prompt is not there"),
    ("preference", '{"chosen": [{"role": "user", "content": "a"}], "rejected": "b"}', "end with"),
    ("prompts", '{"messages": [{"role": "assistant", "content": "a"}]}', "no turn before"),
    ("labels", '{"text": "a", "label": 0.5}', "label is 0.5, expected a word or a whole number"),
    ("labels", '{"text": "a", "label": ["b"]}', "label is .'b'., expected a word"),
    ("labels", '{"text": ["a"], "label": 1}', "text is a list where a text should be"),
    ("labels", '{"text": "a"}', "needs a text and a label; its keys are 'text'"),
    ("labels", '{"text": 5, "label": "a"}', "text is a int where a text should be"),
    ("labels", '{"text": "a", "label": null}', "needs a text and a label"),
    ("labels", '{"text": "a", "label": "one\\ttwo"}', "a label is one line, without tabs"),
    ("labels", '{"text": "a", "label": "one\\ntwo"}', "a label is one line, without tabs"),
])
def test_a_bad_line_is_named_or_counted(tmp_path, kind, line, reason):
    """File, line number and reason; with skip_bad the good lines around it stay."""
    good = {"sft": {"messages": PAIR}, "preference": {"prompt": "q", "chosen": "a",
                                                      "rejected": "b"},
            "prompts": {"prompt": "q"}, "labels": {"text": "a", "label": 0}}[kind]
    path = tmp_path / "a.jsonl"
    path.write_text(f"{json.dumps(good)}\n{line}\n{json.dumps(good)}\n")
    with pytest.raises(UserError, match=rf"a\.jsonl, line 2: .*({reason}).*--skip_bad=1"):
        list(chats.read_chats(path, kind))
    reader = loader.Reader(skip_bad=True)
    assert len(list(chats.read_chats(path, kind, reader=reader))) == 2 and reader.bad == 1


def test_whatever_a_file_holds_only_user_errors_come(tmp_path):
    """Keys that mean something, with values of any type: a sentence or a record, never a crash."""
    rng = random.Random(0)
    keys = [*layouts.CONVERSATION, *layouts.QUESTION, *layouts.ANSWER, "chosen", "rejected",
            "history", "system", "input", "role", "content", "from", "value", "tool_calls", "task",
            "function_call", "arguments", "name", "function", "tools", "documents", "weight",
            "reasoning_content", "thinking", "chat_template_kwargs", "label", "context"]

    def value(depth):
        leaf = [None, 0, 1.5, True, "", "x", "user", "assistant", "gpt", "tool", "y",
                said(U, "x", A, rng.choice("abc"))]
        kind = rng.random()
        if depth and kind < .35:
            return [value(depth - 1) for _ in range(rng.randrange(3))]
        if depth and kind < .7:
            return {rng.choice(keys): value(depth - 1) for _ in range(rng.randrange(4))}
        return rng.choice(leaf)
    likely = {"sft": "messages prompt answer", "preference": "prompt chosen rejected",
              "prompts": "question answer", "labels": "text label"}
    for kind in chats.KINDS:
        path = write(tmp_path / "a.jsonl", [
            {rng.choice([*keys, *likely[kind].split() * 40]): value(rng.randrange(4))
             for _ in range(4)}
            for _ in range(4000)])
        reader, notes = loader.Reader(skip_bad=True), Notes(["context"])
        found = list(chats.read_chats(path, kind, reader=reader, notes=notes))
        same = sum(n for event, n in notes.events.items() if "the same" in event)
        assert len(found) + reader.bad + same == 4000 and len(found) > 10
        for record in found:
            for turns in (record[k] for k in ("messages", "chosen", "rejected", "prompt")
                          if k in record):
                assert all(m["role"] in chat.ROLES and isinstance(m["content"], str)
                           for m in turns)


def test_datasets_by_name_folder_and_file(tmp_path, monkeypatch):
    """A file keeps every 20th record for validation; half a dataset of ours is refused."""
    monkeypatch.setattr(loader, "ROOT", tmp_path)
    path = write(tmp_path / "mine.jsonl", [{"prompt": str(i), "answer": "a"} for i in range(40)])
    train, held, bad = chats.splits(str(path))
    assert [r["messages"][0]["content"] for r in held] == ["19", "39"]
    assert (len(train), bad) == (38, 0)
    folder = tmp_path / "data" / "skills"
    folder.mkdir(parents=True)
    with pytest.raises(UserError, match="is not prepared: run `python data/prepare.py skills`"):
        chats.find("skills")
    write(folder / "train.jsonl", [{"messages": PAIR}])
    with pytest.raises(UserError, match="is not prepared"):
        chats.find("skills")
    (folder / "meta.json").write_text("{}")
    assert chats.find("skills") == (folder / "train.jsonl", None)
    write(folder / "val.jsonl", [{"messages": PAIR}])
    assert chats.find("skills") == (folder / "train.jsonl", folder / "val.jsonl")
    (folder / "train.jsonl").unlink()
    with pytest.raises(UserError, match="holds text, not conversations"):
        chats.find("skills")


# ------------------------------------------------------------------------------ rendering

WORDS = "the cat sat on a mat, hello naïve 🐈 user assistant <|im_end|> \n ⟦ 12 + 30".split(" ")


def corpus(n, seed=0, longest=12):
    """Conversations of one to three exchanges, some with a system turn or a tool's answer."""
    rng = random.Random(seed)

    def words():
        return " ".join(rng.choice(WORDS) for _ in range(rng.randrange(1, longest)))
    out = []
    for _ in range(n):
        turns = ["system", words()] if rng.random() < .3 else []
        for _ in range(rng.randrange(1, 4)):
            turns += [U, words()]
            turns += ["tool", words()] if rng.random() < .2 else []
            turns += [A, "x" + words()]
        out.append({"messages": said(*turns)})
    return out


GENERATION = """{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] ==
'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else
%}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"""


def test_ids_and_mask_are_those_of_transformers(tokenizer, tmp_path):
    """apply_chat_template with the assistant's mask, from a chatml template with generation tags
    that this test spells out. Without control tokens as text, which transformers would obey."""
    from transformers import AutoTokenizer
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for record in corpus(60):
        messages = [{**m, "content": m["content"].replace("<|im_end|>", "")}
                    for m in record["messages"]]
        want = theirs.apply_chat_template(
            messages, chat_template=GENERATION, tokenize=True, return_dict=True,
            return_assistant_tokens_mask=True)
        (ids, mask), = chats.render_all(tokenizer, [{"messages": messages}], None, 10 ** 6)
        assert ids.tolist() == list(want["input_ids"])
        assert mask.astype(int).tolist() == list(want["assistant_masks"])


@pytest.mark.parametrize("name", [n for n in chat.TEMPLATES])
def test_supervised_ids_are_the_answers_and_their_end_after_packing(tokenizer, name):
    """In every template, and read off ids, targets and doc of the batches, which is all that the
    model gets: each answer with the token that ends it, and nothing else."""
    import copy
    t = copy.deepcopy(tokenizer)
    row = chat.find(name)
    t.add_special_tokens(row.control(t.eot_token))
    records = [{"messages": [m for m in r["messages"] if m["role"] != "tool"]}
               for r in corpus(25, longest=6)]
    for r in records:                       # trimmed templates strip, thinking ones drop thoughts
        for m in r["messages"]:
            m["content"] = m["content"].strip()
    packed = chats.Packed(chats.render_all(t, records, name, 400), 3, 399)
    found = []
    for batch in packed.fixed(3, 10 ** 6):
        for targets, doc in zip(batch["targets"], batch["doc"]):
            # a target belongs to the conversation that its input is in
            for k in doc.unique():
                live = targets[(doc == k) & (targets >= 0)]
                found += [t.decode(live.tolist())] if len(live) else []
    end = re.match(r"\s*(\S*)", row.after(A, t.eot_token))[1] if not row.closing else "<|user|>"
    lead = row.lead
    want = ["".join(f"{lead}{m['content']}{' ' if row.after(A, '').startswith(' ') else ''}{end}"
                    for m in r["messages"] if m["role"] == A) for r in records]
    assert sorted(found) == sorted(want)


@pytest.mark.parametrize("record, trained", [
    ({"messages": said(U, "hi") + [{"role": A, "content": "cat", "weight": 0}] + PAIR}, "Hello"),
    ({"messages": said(U, "hi") + [{"role": A, "content": "cat", "train": False}] + PAIR}, "Hello"),
    ({"prompt": said(U, "hi", A, "cat", U, "Hi"), "completion": PAIR[1:]}, "Hello"),
    ({"prompt": said(U, "hi", A, "cat", U, "Hi"), "response": "Hello"}, "Hello"),
    ({"messages": said(U, "hi", A, "cat") + PAIR}, "cat<|im_end|>Hello"),
])
def test_answers_that_are_context_are_not_trained_on(tokenizer, tmp_path, record, trained):
    """Their ids are the same as of answers that are: only the mask differs."""
    records = read(tmp_path, record)
    (ids, mask), = chats.render_all(tokenizer, records, None, 200)
    assert tokenizer.decode(ids[mask].tolist()) == trained + "<|im_end|>"
    plain = [{k: v for k, v in m.items() if k != "train"} for m in records[0]["messages"]]
    (same, whole), = chats.render_all(tokenizer, [{"messages": plain}], None, 200)
    assert same.tolist() == ids.tolist() and whole.sum() >= mask.sum()


def test_what_has_no_answer_or_no_room_is_left_out_and_counted(tokenizer):
    """The packer of other projects stopped for ever at a conversation longer than a row."""
    long = " ".join(["cat"] * 100)
    records = [{"messages": m} for m in (
        said(U, "Hi"), said("system", "Be brief"), [], PAIR,
        said(U, long, A, "Hello"),                  # its prompt fills the row
        said(U, "Hi", A, long),                     # its answer is cut
        said(A, "Hello"), said(U, "", A, "Hello"))]
    rendered = chats.render_all(tokenizer, records, None, 33)
    assert (len(rendered), rendered.skipped, rendered.cut) == (4, 4, 1)
    assert max(len(ids) for ids, _ in rendered) == 33
    for ids, mask in rendered:
        assert len(ids) == len(mask) and mask.any()
    batches = chats.Packed(rendered, 2, 32)
    for step in range(20):
        assert (batches(step)["targets"] >= 0).any(1).all()
    with pytest.raises(UserError, match="no conversation with an answer within 9 tokens"):
        chats.Packed(chats.render_all(tokenizer, records[4:5], None, 9), 2, 8)


# -------------------------------------------------------------------------------- packing

def test_first_fit_is_first_fit():
    """Against the definition, one row after the other."""
    rng = random.Random(0)
    for _ in range(200):
        width = rng.randrange(1, 40)
        lengths = [rng.randrange(1, width + 1) for _ in range(rng.randrange(1, 60))]
        room, want = [], []
        for n in lengths:
            place = next((i for i, r in enumerate(room) if r >= n), len(room))
            room += [width] if place == len(room) else []
            room[place] -= n
            want.append(place)
        assert chats.first_fit(lengths, width) == want


@pytest.fixture(scope="module")
def packed(tokenizer):
    return chats.Packed(chats.render_all(tokenizer, corpus(200), None, 129), 8, 128, seed=5)


def test_every_conversation_is_in_one_row_once(packed):
    assert sorted(i for row in packed.rows for i in row) == list(range(200))
    assert packed.fill > 0.9
    assert f"{packed.fill:.1%} full" in packed.summary()


def test_rows_hold_whole_conversations_side_by_side(packed):
    """Ids, targets and document numbers from the conversations, one token at a time."""
    batch = packed.gather(range(len(packed)))
    for b, row in enumerate(packed.rows):
        ids, live, doc = [], [], []
        for k, i in enumerate(row):
            tokens, mask = packed.conversations[i]
            ids += tokens.tolist()
            live += [False] + mask[1:].tolist()
            doc += [k] * len(tokens)
        pad = 129 - len(ids)
        ids, live, doc = ids + [0] * pad, live + [False] * pad, doc + [len(row)] * pad
        assert batch["ids"][b].tolist() == ids[:128]
        assert batch["doc"][b].tolist() == doc[:128]
        assert batch["targets"][b].tolist() == [
            i if on else -100 for i, on in zip(ids[1:], live[1:])]
    assert {k: v.dtype for k, v in batch.items()} == {
        "ids": torch.int64, "targets": torch.int64, "doc": torch.int32}


def same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a)


def test_a_batch_is_a_function_of_seed_and_step(packed, tokenizer):
    """In any order of asking, and again in a program that starts at that step."""
    again = chats.Packed(chats.render_all(tokenizer, corpus(200), None, 129), 8, 128, seed=5)
    for step in (70, 3, 0, 71, 3):
        assert same(packed(step), again(step))
    other = chats.Packed(packed.conversations, 8, 128, seed=6)
    assert not same(packed(0), other(0))


def test_an_epoch_shows_every_row_once(packed):
    """Also where batches do not divide it; and the next epoch has another order."""
    n = len(packed)
    flat = torch.cat([packed(step)["ids"] for step in range(-(-2 * n // 8))])
    rows = {tuple(r): k for k, r in enumerate(packed.gather(range(n))["ids"].tolist())}
    seen = [rows[tuple(r)] for r in flat.tolist()]
    assert sorted(seen[:n]) == sorted(seen[n:2 * n]) == list(range(n))
    assert seen[:n] != seen[n:2 * n]


def test_ranks_share_the_batch_of_a_step(packed):
    for world in (1, 2, 3):
        parts = [Machine(torch.device("cpu"), torch.float32, r, world).rows(packed(4))
                 for r in range(world)]
        assert same(packed(4), {k: torch.cat([p[k] for p in parts]) for k in parts[0]})


def test_fixed_batches_are_rows_without_repetition(packed):
    fixed = packed.fixed(8, 16)
    assert len(fixed) == 2 and len(packed.fixed(8, 10 ** 6)) == -(-len(packed) // 8)
    rows = torch.cat([b["ids"] for b in fixed])
    assert len(set(map(tuple, rows.tolist()))) == 16
    assert same(fixed[0], packed.fixed(8, 16)[0])


# ---------------------------------------------------------------------------------- pairs

def preferences(n, seed=0):
    """Two answers to each conversation's last question, of different length."""
    rng, out = random.Random(seed), []
    for record in corpus(n, seed, longest=8):
        *before, last = record["messages"]
        worse = {**last, "content": "y" + " cat" * rng.randrange(1, 12)}
        out.append({"chosen": [*before, last], "rejected": [*before, worse]})
    return out


@pytest.mark.parametrize("name", [n for n in chat.TEMPLATES])
def test_supervised_ids_of_pairs_are_the_answers_that_differ(tokenizer, name):
    """In every template, read off the batches: of chosen and rejected the turns after what both
    have in common, with the token that ends them; earlier answers are part of the prompt."""
    import copy
    t = copy.deepcopy(tokenizer)
    row = chat.find(name)
    t.add_special_tokens(row.control(t.eot_token))
    records = preferences(25)
    records.append({"chosen": said(U, "a", A, "b", U, "c", A, "d", U, "e", A, "f"),
                    "rejected": said(U, "a", A, "b", U, "c", A, "g")})
    for r in records:
        for key in ("chosen", "rejected"):
            r[key] = [{**m, "content": m["content"].strip()} for m in r[key] if m["role"] != "tool"]
    packed = chats.Packed(chats.render_pairs(t, records, name, 900), 3, 899, unit=2)
    found = []
    for batch, rows in zip(packed.fixed(3, 10 ** 6), packed.fixed(3, 10 ** 6).rows):
        for targets, doc, number in zip(batch["targets"], batch["doc"], rows):
            for k, i in enumerate(packed.rows[number]):
                live = targets[(doc == k) & (targets >= 0)]
                found.append((i, t.decode(live.tolist())))
    end = re.match(r"\s*(\S*)", row.after(A, t.eot_token))[1] if not row.closing else "<|user|>"
    space = " " if row.after(A, "").startswith(" ") else ""
    want = []
    for r in records[:-1]:
        want += [f"{row.lead}{r[key][-1]['content']}{space}{end}" for key in ("chosen", "rejected")]
    want += ["".join(f"{row.lead}{c}{space}{end}" for c in words) for words in ("df", "g")]
    assert [text for _, text in sorted(found)] == want


def test_both_sides_of_a_pair_are_cut_to_what_leaves_room(tokenizer):
    """Half a row each, and what the other side leaves; skipped without an answer, or without a
    difference."""
    long, longer = " ".join(["cat"] * 60), " ".join(["cat"] * 61)
    records = [{"chosen": said(*a), "rejected": said(*b)} for a, b in (
        ((U, "Hi", A, "Hello"), (U, "Hi", A, "cat")),
        ((U, "Hi", A, long), (U, "Hi", A, "cat")),          # one is cut
        ((U, "Hi", A, "cat"), (U, "Hi", A, long)),
        ((U, "Hi", A, long), (U, "Hi", A, "a" + longer)),   # both are
        ((U, "Hi", A, long), (U, "Hi", A, longer)),         # and then they are the same
        ((U, long, A, "Hi"), (U, long, A, "cat")),          # the prompt fills half a row
        ((U, "Hi"), (U, "Hi", A, "cat")))]
    whole = chats.render_pairs(tokenizer, records, None, 10 ** 6)
    assert (len(whole), whole.skipped, whole.cut) == (12, 1, 0)
    rendered = chats.render_pairs(tokenizer, records, None, 60)
    assert (len(rendered), rendered.skipped, rendered.cut) == (8, 3, 3)
    sizes, short = [len(ids) for ids, _ in rendered], len(whole[1][0])
    assert sizes[1] == sizes[3] == sizes[4] == short
    assert sizes[2] == sizes[5] == 60 - short and sizes[6:] == [30, 30]
    for (ids, mask), (all_ids, all_mask) in zip(rendered, whole):
        assert np.array_equal(ids, all_ids[:len(ids)]) and mask.any()
        assert np.array_equal(mask, all_mask[:len(ids)])
    for step in range(9):
        assert (chats.Packed(rendered, 2, 59, unit=2)(step)["targets"] >= 0).any(1).all()
    with pytest.raises(UserError, match="no pair with an answer within 9 tokens"):
        chats.Packed(chats.render_pairs(tokenizer, records, None, 9), 2, 8, unit=2)


def test_a_row_holds_whole_pairs_and_columns_go_along(tokenizer):
    """Any slice of rows, of a rank or a micro-batch: 2i and 2i + 1 side by side, in that order;
    numbers that a conversation has stand at its document."""
    rendered = chats.render_pairs(tokenizer, preferences(120), None, 257)
    packed = chats.Packed(rendered, 8, 256, seed=5, unit=2)
    assert sorted(i for row in packed.rows for i in row) == list(range(len(rendered)))
    assert packed.fill > 0.9 and packed.summary().startswith(f"{len(rendered) // 2} pairs (")
    packed.columns["score"] = np.arange(len(rendered), dtype=np.float32) + 1
    batch = packed(3)
    numbers = packed.epoch(0)
    assert batch["score"].shape == (8, max(map(len, packed.rows)))
    for b in range(8):
        row = packed.rows[numbers[(24 + b) % len(numbers)]] if 24 + b < len(numbers) else None
        if row is None:
            continue
        assert row[1::2] == [i + 1 for i in row[::2]] and all(i % 2 == 0 for i in row[::2])
        assert batch["score"][b].tolist()[:len(row)] == [i + 1 for i in row]
        assert not batch["score"][b, len(row):].any()
        for k, i in enumerate(row):
            ids = batch["ids"][b][batch["doc"][b] == k].tolist()
            assert rendered[i][0].tolist()[:len(ids)] == ids

# -------------------------------------------------------------------------------- to look at

def test_show_marks_what_is_trained_on(tokenizer):
    """Between the marks stand the answers with their end, in colour and without."""
    records = [{"messages": said(U, "hi\x1b[2J", A, "hello", U, "and?", A, "more\nof it")},
               {"messages": said(U, "cat", A, "mat")}]
    packed = chats.Packed(chats.render_all(tokenizer, records, None, 200), 1, 199)
    plain = chats.show(tokenizer, packed(0), color=False)
    assert sorted(re.findall("⟦(.*?)⟧", plain, re.DOTALL)) == [
        "hello<|im_end|>", "mat<|im_end|>", "more\nof it<|im_end|>"]
    assert "\x1b" not in plain and r"hi\x1b[2J" in plain and "tokens of padding" in plain
    colored = chats.show(tokenizer, packed(0), color=True)
    green = "".join(re.findall(re.escape(chats.TRAINED) + r"(.*?)\x1b\[0m", colored))
    assert sorted(green.replace("⏎", " ").split("<|im_end|>")) == [
        "", "hello", "mat", "more of it"]


def test_show_of_a_row_that_ends_with_a_target(tokenizer):
    """The last target is no input of the row, and shown all the same."""
    (ids, mask), = rendered = chats.render_all(tokenizer, [{"messages": said(U, "a", A, "b")}],
                                               None, 10 ** 3)
    end = int(np.flatnonzero(mask)[-1])
    cut = chats.Rendered([(ids[:end + 1], mask[:end + 1])])
    text = chats.show(tokenizer, chats.Packed(cut, 1, end)(0), color=False)
    assert text.endswith("⟦b<|im_end|>⟧") and "padding" not in text
    assert len(rendered) == 1
