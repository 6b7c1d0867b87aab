"""Files of the tokenizers library, of GPT-2 and tiktoken, and chats of every template.
"""
import copy
import json
import os
import random
import unicodedata
from pathlib import Path

import pytest
import tiktoken

from text import bpe
from text import chat
import tokenizer as T
from config import UserError
from tokenizer_base import (CHINESE, CODE, ENGLISH, MIXED, PUBLISHED, RUNS, TEXTS, folder,     # noqa: F401
                            random_texts, tok)
QWEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+")


# --- files: ours and Hugging Face's ---------------------------------------------------------

def assert_same_as_library(tok: T.Tokenizer, theirs, texts: list[str]) -> None:
    for text in texts:
        expected = theirs.encode(text, add_special_tokens=False).ids
        assert tok.encode(text, "all") == expected, repr(text)
        assert tok.encode_fast(text, "all") == expected, repr(text)


# Assigned for a decade, so that every engine's Unicode knows the characters.
OLD = "".join(c for c in ENGLISH + CHINESE + MIXED if c != "\u0130")
LIBRARY_TEXTS = TEXTS + random_texts(150, seed=7, pool=OLD) + [ENGLISH + "<|endoftext|>" + CHINESE]


@pytest.mark.parametrize("pattern", ["gpt2", "cl100k", "o200k", "smollm"])
def test_saved_files_open_in_tokenizers_and_transformers(pattern, tmp_path):
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer
    tok = T.train([ENGLISH, CODE, CHINESE, MIXED, RUNS], 1300, pattern=pattern, workers=1)
    tok.save(tmp_path / "new" / "folder")
    theirs = Tokenizer.from_file(str(tmp_path / "new" / "folder" / "tokenizer.json"))
    assert theirs.get_vocab_size() == tok.vocab_size
    assert_same_as_library(tok, theirs, LIBRARY_TEXTS)
    auto = AutoTokenizer.from_pretrained(tmp_path / "new" / "folder")
    assert auto.eos_token_id == tok.eot and len(auto) == tok.vocab_size
    for text in LIBRARY_TEXTS:
        ids = tok.encode(text, "all")
        assert auto(text)["input_ids"] == ids
        assert auto.decode(ids) == text
    again = T.load(tmp_path / "new" / "folder")
    assert (again.ranks, again.special, again.pattern) == (tok.ranks, tok.special, tok.pattern)
    assert list(os.listdir(tmp_path / "new" / "folder")) and not list(tmp_path.rglob(".*"))


def library_tokenizer(form: str):
    """A tokenizer of the library's own making, in the form of a published model."""
    from tokenizers import (AddedToken, Regex, Tokenizer, decoders, models, normalizers,
                            pre_tokenizers, processors, trainers)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    theirs = Tokenizer(models.BPE(ignore_merges=form == "llama3"))
    theirs.decoder = decoders.ByteLevel()
    cl100k = bpe.PATTERNS["cl100k"]
    theirs.pre_tokenizer = {
        "gpt2": gpt2,
        "llama3": pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(cl100k), "isolated"), byte_level]),
        "removed": pre_tokenizers.Sequence(     # how converters from tiktoken write it
            [pre_tokenizers.Split(Regex(cl100k), "removed", invert=True), byte_level]),
        "qwen": pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(QWEN), "isolated"), byte_level]),
        "smollm2": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2]),
    }[form]
    if form == "qwen":
        theirs.normalizer = normalizers.NFC()
    # SmolLM2 puts its control tokens first, so that no id is a rank; the others add theirs last
    first = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"] if form == "smollm2" else []
    theirs.train_from_iterator([ENGLISH, CODE, CHINESE, MIXED, RUNS], trainers.BpeTrainer(
        vocab_size=1200, special_tokens=first, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    theirs.add_special_tokens(["<|endoftext|>", "<|end|>"])
    theirs.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    if form == "llama3":
        theirs.post_processor = processors.TemplateProcessing(
            single="<|end|> $A", special_tokens=[("<|end|>", theirs.token_to_id("<|end|>"))])
    return theirs


@pytest.mark.parametrize("form", ["gpt2", "llama3", "removed", "qwen", "smollm2"])
@pytest.mark.parametrize("merges", ["pairs", "strings", "every split", "shuffled ids"])
def test_hugging_face_forms_give_the_librarys_ids(form, merges, tmp_path):
    from tokenizers import Tokenizer
    theirs = library_tokenizer(form)
    document = json.loads(theirs.to_str())
    model = document["model"]
    if merges == "strings":                 # as written before 2024
        model["merges"] = [" ".join(m) for m in model["merges"]]
    elif merges == "every split":           # as Llama 3 was converted from ranks
        every = []
        for left, right in model["merges"]:
            token = left + right
            every += [[token[:i], token[i:]] for i in range(1, len(token))
                      if token[:i] in model["vocab"] and token[i:] in model["vocab"]]
        model["merges"] = every
        document["model"]["ignore_merges"] = True
    elif merges == "shuffled ids":
        ids = list(model["vocab"].values())
        random.Random(0).shuffle(ids)
        new = dict(zip(model["vocab"].values(), ids))
        model["vocab"] = {t: new[i] for t, i in model["vocab"].items()}
        for added in document["added_tokens"]:
            added["id"] = new.get(added["id"], added["id"])
        document["post_processor"] = None
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(document), encoding="utf-8")
    theirs = Tokenizer.from_file(str(path))
    tok = T.load(path)
    texts = LIBRARY_TEXTS[::2] + ["<think>a e\u0301</think><|end|>e\u0301<|im_start|>"]
    assert_same_as_library(tok, theirs, texts)
    assert tok.eot == theirs.token_to_id("<|endoftext|>")
    assert tok.vocab_size == max(theirs.get_vocab().values()) + 1
    for text in texts:
        normal = unicodedata.normalize("NFC", text) if form == "qwen" else text
        assert tok.decode(tok.encode(text, "all")) == normal
    if merges == "pairs":       # saved again: the same ids, and the first token that it adds
        tok.save(tmp_path / "again")
        again = Tokenizer.from_file(str(tmp_path / "again" / "tokenizer.json"))
        assert_same_as_library(tok, again, texts)
        assert again.encode("a").ids == theirs.encode("a").ids
        assert T.load(tmp_path / "again").encode(ENGLISH) == tok.encode(ENGLISH)


def test_bytes_that_a_vocabulary_lacks_are_dropped_as_the_library_drops_them(tmp_path):
    """SmolLM2's file lacks 21 of the 256 bytes: tiktoken panics on them."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    theirs = Tokenizer(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = [c for c in pre_tokenizers.ByteLevel.alphabet()
                if bpe.CHAR_BYTE[c] not in b"\x04\x06\x1d\xc0\xf1\xff\xe4"]
    theirs.train_from_iterator([ENGLISH * 2 + "!!!! ??!!"], trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, show_progress=False))
    theirs.save(str(tmp_path / "tokenizer.json"))
    tok = T.load(tmp_path)
    assert len(tok.lost) == 7
    texts = ["!\x04!", "!!\x04", "\x04", "the\x06 fox\x1d", "中文 \x04", ENGLISH, "\U00050000 x"]
    assert_same_as_library(tok, theirs, texts)
    assert tok.encode_batch(texts) == [theirs.encode(t).ids for t in texts]


@pytest.mark.parametrize("names", [("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")])
def test_gpt2s_two_files(names, tmp_path):
    theirs = library_tokenizer("gpt2")
    model = json.loads(theirs.to_str())["model"]
    vocab = {**model["vocab"], "<|endoftext|>": len(model["vocab"])}
    (tmp_path / names[0]).write_text(json.dumps(vocab))
    (tmp_path / names[1]).write_text("#version: 0.2\n" + "\n".join(map(" ".join, model["merges"]))
                                     + "\n", encoding="utf-8")
    tok = T.load(tmp_path)
    assert tok.eot == len(model["vocab"]) and tok.pattern == bpe.PATTERNS["gpt2"]
    for text in (ENGLISH, CODE, MIXED):
        assert tok.encode(text) == theirs.encode(text).ids


@pytest.mark.parametrize("name, pattern", T.TIKTOKEN.items())
def test_tiktokens_names(name, pattern, tok, monkeypatch, tmp_path):
    """With tiktoken's download stood in for: ranks, control tokens and pattern are taken over."""
    downloaded = tiktoken.Encoding(name, pat_str=PUBLISHED[pattern], mergeable_ranks=tok.ranks,
                                   special_tokens={"<|endoftext|>": 1600, "<|fim|>": 1601})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda n: downloaded)
    monkeypatch.chdir(tmp_path)
    ours = T.load(name)
    for text in TEXTS:
        assert ours.encode(text) == ours.encode_fast(text) == downloaded.encode(text)
    assert ours.eot == 1600 and ours.vocab_size == 1602


def test_no_network_is_one_sentence_that_says_what_works(monkeypatch, tmp_path):
    def offline(name):
        raise ConnectionError("Max retries exceeded with url: …\nlong story")
    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no network.*tokenizer.json.*train") as e:
        T.load("gpt2")
    assert "\n" not in str(e.value)


def test_character_mode(tmp_path):
    """nanoGPT's shakespeare_char: the sorted characters, nothing else."""
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer
    text = "First Citizen:\nBefore we proceed, hear me speak é😀.\n"
    tok = T.train_chars([text[:20], text[20:]])
    itos = sorted(set(text))
    assert tok.vocab_size == len(itos) and tok.eot is None
    ids = tok.encode(text)
    assert ids == [itos.index(c) for c in text] == tok.encode_fast(text)
    assert tok.encode_batch([text, ""]) == [ids, []]
    assert tok.decode(ids) == text and tok.byte_lengths()[ids].sum() == len(text.encode())
    assert "".join(map(tok.stream().put, ids)) == text
    with pytest.raises(UserError, match="'Z'"):
        tok.encode("First Z")
    tok.save(tmp_path)
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(text).ids == ids
    auto = AutoTokenizer.from_pretrained(tmp_path)
    assert auto(text)["input_ids"] == ids and auto.decode(ids) == text
    again = T.load(tmp_path)
    assert again.encode(text) == ids and again.ids == tok.ids
    again.add_special_tokens(["<|endoftext|>"])
    again.save(tmp_path)
    assert T.load(tmp_path).encode("e<|endoftext|>", "all") == [itos.index("e"), len(itos)]


def test_a_save_that_dies_leaves_the_old_file(tok, tmp_path, monkeypatch):
    tok.save(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    other = T.train([ENGLISH], 300)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", lambda *a, **k: os.write(-1, b"a full disk"))
        with pytest.raises(OSError):
            other.save(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            other.save(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def hostile_documents():
    """(what is wrong, how to spoil a good tokenizer.json)."""
    def put(*path_and_value):
        *path, value = path_and_value

        def spoil(d):
            for key in path[:-1]:
                d = d[key]
            d[path[-1]] = value
        return spoil
    return {
        "no model": lambda d: d.pop("model"),
        "unigram": put("model", "type", "Unigram"),
        "byte fallback": put("model", "byte_fallback", True),
        "vocab is a list": put("model", "vocab", [["a", 1]]),
        "id is text": put("model", "vocab", "a", "many"),
        "negative id": put("model", "vocab", "a", -1),
        "huge id": put("model", "vocab", "a", 1 << 40),
        "merge of three": put("model", "merges", ["a b c"]),
        "merge of the unknown": put("model", "merges", [["zq", "qz"]]),
        "lacks a byte": lambda d: d["model"]["vocab"].pop("a") and put("model", "merges", [])(d),
        "another pre_tokenizer": put("pre_tokenizer", {"type": "Whitespace"}),
        "prefix space": put("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": True}),
        "lowercases": put("normalizer", {"type": "Lowercase"}),
        "flag is text": put("added_tokens", 0, "lstrip", "yes"),
        "an end of words": put("model", "end_of_word_suffix", "</w>"),
        "a word in character mode": put("model", {"type": "WordLevel", "vocab": {"word": 0}}),
    }


@pytest.mark.parametrize("fault", hostile_documents())
def test_a_foreign_or_hostile_tokenizer_json_is_refused(fault, tok, tmp_path):
    document = tok._json()
    hostile_documents()[fault](document)
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(UserError) as e:
        T.load(tmp_path)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"3", b"{", b'{"model": {"vocab"', b"\xff\xfe",
                                     b"[" * 100_000, b'{"model": null}'])
def test_a_broken_tokenizer_json_is_refused(content, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError):
        T.load(tmp_path / "tokenizer.json")


def test_the_end_token_of_a_chat_models_file_is_kept(tok, tmp_path):
    """SmolLM2's files name <|im_end|> as eos_token: it ends answers, not documents."""
    tok = copy.deepcopy(tok)
    tok.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tok.save(tmp_path)
    for end in ("<|im_end|>", {"content": "<|im_end|>"}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": end}))
        again = T.load(tmp_path)
        assert again.eot == tok.special[T.EOT]
        assert again.stop_ids == sorted([tok.eot, tok.special["<|im_end|>"]])
        again.save(tmp_path)
        assert json.loads((tmp_path / "tokenizer_config.json").read_text())["eos_token"] == end
    odd = T.Tokenizer(tok.ranks, {"<done>": 5000}, tok.pattern)
    odd.facts.named["eos_token"] = "<done>"
    assert odd.eot == 5000 and tok.stop_ids == [tok.eot]


def test_loading_nothing_says_what_can_be_loaded(tmp_path):
    for path in (tmp_path, tmp_path / "missing", "no_such_name"):
        with pytest.raises(UserError, match="tokenizer.json.*gpt2"):
            T.load(path)


# --- chats ----------------------------------------------------------------------------------

CHAT = [{"role": "user", "content": "Hi <|im_end|>\n\n there"},
        {"role": "assistant", "content": "Hello! 你好 def f():\n  pass"},
        {"role": "user", "content": "Bye.\n"},
        {"role": "assistant", "content": "See <|eot_id|> you"}]
SYSTEM = [{"role": "system", "content": "Be brief."}]
H, E = "<|start_header_id|>", "<|end_header_id|>\n\n"
# What the models' own cards show for [system,] user U, assistant A, user V, assistant B;
# «» around what is trained on.
RENDERED = {
    "chatml": ("<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n«A<|im_end|>»\n"
               "<|im_start|>user\nV<|im_end|>\n<|im_start|>assistant\n«B<|im_end|>»\n"),
    "smollm2": ("<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by "
                "Hugging Face<|im_end|>\n<|im_start|>user\nU<|im_end|>\n"
                "<|im_start|>assistant\n«A<|im_end|>»\n<|im_start|>user\nV<|im_end|>\n"
                "<|im_start|>assistant\n«B<|im_end|>»\n"),
    "llama3": (f"<|begin_of_text|>{H}user{E}U<|eot_id|>{H}assistant{E}«A<|eot_id|>»"
               f"{H}user{E}V<|eot_id|>{H}assistant{E}«B<|eot_id|>»"),
    "qwen2": ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
              "U<|im_end|>\n<|im_start|>assistant\n«A<|im_end|>»\n"
              "<|im_start|>user\nV<|im_end|>\n<|im_start|>assistant\n«B<|im_end|>»\n"),
    "qwen2.5": ("<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful "
                "assistant.<|im_end|>\n<|im_start|>user\nU<|im_end|>\n"
                "<|im_start|>assistant\n«A<|im_end|>»\n<|im_start|>user\nV<|im_end|>\n"
                "<|im_start|>assistant\n«B<|im_end|>»\n"),
    "qwen3": ("<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n«A<|im_end|>»\n"
              "<|im_start|>user\nV<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
              "«B<|im_end|>»\n"),
    "llama3.1": (f"<|begin_of_text|>{H}system{E}{chat._DATES}<|eot_id|>{H}user{E}U<|eot_id|>"
                 f"{H}assistant{E}«A<|eot_id|>»{H}user{E}V<|eot_id|>{H}assistant{E}«B<|eot_id|>»"),
    "llama2": ("<s>[INST] U [/INST]« A <|endoftext|>»<s>[INST] V [/INST]« B <|endoftext|>»"),
    "mistral": "<s>[INST] U [/INST]« A<|endoftext|>»[INST] V [/INST]« B<|endoftext|>»",
    "chatglm3": "[gMASK]sop<|user|>\n U<|assistant|>«\n A<|user|>»\n V<|assistant|>«\n B<|user|>»",
    "zephyr": ("<|user|>\nU<|endoftext|>\n<|assistant|>\n«A<|endoftext|>»\n"
               "<|user|>\nV<|endoftext|>\n<|assistant|>\n«B<|endoftext|>»\n"),
    "gemma": ("<bos><start_of_turn>user\nU<end_of_turn>\n<start_of_turn>model\n«A<end_of_turn>»\n"
              "<start_of_turn>user\nV<end_of_turn>\n<start_of_turn>model\n«B<end_of_turn>»\n"),
    "glm4": "[gMASK]<sop><|user|>\nU<|assistant|>\n«A<|user|>»\nV<|assistant|>\n«B<|user|>»",
    "minicpm": "<用户>U<AI>«A<|endoftext|>»<用户>V<AI>«B<|endoftext|>»",
    "alpaca": ("Below is an instruction that describes a task. Write a response that appropriately "
               "completes the request.\n\n### Instruction:\nU\n\n### Response:\n«A<|endoftext|>»"
               "### Instruction:\nV\n\n### Response:\n«B<|endoftext|>»"),
}
WITH_SYSTEM = {     # the beginning, with the system message S
    "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU",
    "smollm2": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU",
    "llama3": f"<|begin_of_text|>{H}system{E}S<|eot_id|>{H}user{E}U",
    "qwen2": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU",
    "qwen2.5": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU",
    "qwen3": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU",
    "llama3.1": f"<|begin_of_text|>{H}system{E}{chat._DATES}S<|eot_id|>{H}user{E}U",
    "llama2": "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nU [/INST] A",
    "mistral": "<s>[INST] S\n\nU [/INST] A", "chatglm3": "[gMASK]sop<|system|>\n S<|user|>\n U",
    "zephyr": "<|system|>\nS<|endoftext|>\n<|user|>\nU",
    "gemma": "<bos><start_of_turn>user\nS\n\nU", "glm4": "[gMASK]<sop><|system|>\nS<|user|>\nU",
    "minicpm": "S<用户>U<AI>", "alpaca": "S\n\n### Instruction:\nU\n\n### Response:\n",
}


@pytest.fixture(scope="session", params=["gpt2", "cl100k"])
def chat_tok(request) -> T.Tokenizer:
    tok = T.train([ENGLISH, CODE, CHINESE], 900, pattern=request.param, workers=1)
    tok.add_special_tokens(t for row in chat.TEMPLATES.values() for t in row.control(T.EOT))
    return tok


def test_every_template_has_its_expected_text():
    assert set(RENDERED) == set(WITH_SYSTEM) == set(chat.TEMPLATES)


@pytest.mark.parametrize("name", chat.TEMPLATES)
def test_render_is_what_the_model_cards_show(name, chat_tok):
    turns = [{"role": r, "content": c} for r, c in zip(["user", "assistant"] * 2, "UAVB")]
    ids, mask = chat_tok.render(turns, name)
    text, last = b"", 0
    for i, m in zip(ids, mask):
        text += ("«" if m > last else "»" if m < last else "").encode() + chat_tok.tokens[i]
        last = m
    assert text.decode() + "»" * last == RENDERED[name]
    assert len(ids) == len(mask) and set(mask) <= {0, 1}
    system = chat_tok.render([{"role": "system", "content": "S"}, *turns], name)
    assert chat_tok.decode(system[0]).startswith(WITH_SYSTEM[name])
    assert sum(system[1]) == sum(mask)
    # the prompt of an answer is the beginning of the conversation with that answer
    prompt, none = chat_tok.render(turns[:3], name, add_generation_prompt=True)
    assert prompt == ids[:len(prompt)] and len(none) == len(prompt)
    assert mask[len(prompt):].count(1) >= 2     # the content and its end
    assert chat_tok.render(turns, name, max_length=7) == (ids[:7], mask[:7])


@pytest.mark.parametrize("name", chat.TEMPLATES)
def test_the_mask_is_the_answers_and_their_ends(name, chat_tok):
    """Supervised ids == assistant text + end token, on every turn; control tokens in content are
    letters."""
    ids, mask = chat_tok.render(SYSTEM + CHAT, name)
    row = chat.find(name)
    control = {chat_tok.special[t] for t in row.control(T.EOT)}
    end = chat_tok.special[row.stops(T.EOT)[0]]
    trained = [i for i, m in zip(ids, mask) if m]
    expected = []
    for m in CHAT[1::2]:
        closing = row.after("assistant", T.EOT).partition("<")[0] if not row.closing else ""
        text = row.lead + m["content"] + closing        # what leads to the end token is learnt too
        expected += chat_tok.encode(text, disallowed_special=()) + [end]
    assert trained == expected
    # no control token but the template's: its number does not depend on the content
    plain = chat_tok.render([{**m, "content": "x"} for m in SYSTEM + CHAT], name)[0]
    assert sum(i in control for i in ids) == sum(i in control for i in plain)
    chat_tok.template = name
    assert end in chat_tok.stop_ids and chat_tok.eot in chat_tok.stop_ids


@pytest.mark.parametrize("name", chat.TEMPLATES)
def test_transformers_renders_the_saved_template_to_the_same_ids(name, chat_tok, tmp_path):
    from transformers import AutoTokenizer
    chat_tok.template = name
    chat_tok.save(tmp_path)
    auto = AutoTokenizer.from_pretrained(tmp_path)
    assert T.load(tmp_path).template == name
    harmless = [{**m, "content": m["content"].replace("<|", "< ")} for m in CHAT]
    tools = [*harmless[:2], {"role": "tool", "content": "42"}, harmless[3]]
    for messages in (harmless, SYSTEM + harmless, harmless[:1], harmless[:3], SYSTEM + tools):
        for prompt in (False, True):
            if prompt and messages[-1]["role"] == "assistant":
                continue
            theirs = auto.apply_chat_template(messages, tokenize=True, return_dict=False,
                                              add_generation_prompt=prompt)
            ids, _ = chat_tok.render(messages, add_generation_prompt=prompt)
            assert chat_tok.decode(theirs) == chat_tok.decode(ids)
            # GPT-2's pattern cuts a template's "\n\n" otherwise before text than at the end of a
            # prompt. We cut it as in the prompt; the pattern of Llama 3 knows no difference.
            if name not in ("llama3", "llama3.1", "qwen3") or len(messages) == 1 \
                    or chat_tok.pattern != bpe.PATTERNS["gpt2"]:
                assert theirs == ids


CHATML_LOOP = ("{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + "
               "message['content'] + '<|im_end|>\n'}}{% endfor %}"
               "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


@pytest.mark.parametrize("where", ["tokenizer_config.json", "chat_template.jinja"])
def test_a_models_own_template_is_rendered_and_kept(where, tok, tmp_path):
    tok = copy.deepcopy(tok)
    tok.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tok.save(tmp_path)
    text = json.dumps({"chat_template": CHATML_LOOP}) if where.endswith("json") else CHATML_LOOP
    (tmp_path / where).write_text(text, encoding="utf-8")
    again = T.load(tmp_path)
    assert again.template is None and again.jinja == CHATML_LOOP
    assert again.render(CHAT) == again.render(CHAT, "chatml")
    again.save(tmp_path / "again")
    assert T.load(tmp_path / "again").jinja == CHATML_LOOP
    # one with the name of a row in it, or most of its words, is no row for that
    for edited in ("{# chatml #}" + CHATML_LOOP, chat.jinja(chat.find("chatml"), T.EOT) + " "):
        (tmp_path / where).write_text(json.dumps({"chat_template": edited}) if "json" in where
                                      else edited, encoding="utf-8")
        assert T.load(tmp_path).template is None


def test_a_list_of_templates_means_the_one_named_default(tok, tmp_path):
    tok.save(tmp_path)
    both = [{"name": "tools", "template": "x"}, {"name": "default", "template": CHATML_LOOP}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": both}))
    assert T.load(tmp_path).jinja == CHATML_LOOP
    assert T.load(tmp_path).jinjas == {"tools": "x", "default": CHATML_LOOP}


def test_qwen3_thinks_first_unless_told_not_to(chat_tok, tmp_path):
    """Thoughts of old answers are left out; without thinking, an empty thought is in the prompt."""
    from transformers import AutoTokenizer
    chat_tok.template = "qwen3"
    chat_tok.save(tmp_path)
    auto = AutoTokenizer.from_pretrained(tmp_path)
    think = "<think>\nwell\n</think>\n\nIt is so."
    chats = [[{"role": "user", "content": "Q"}, {"role": "assistant", "content": think},
              {"role": "user", "content": "R"}, {"role": "assistant", "content": think}]]
    chats += [chats[0][:k] for k in (1, 2, 3)]
    for messages in chats:
        for thinking in (True, False):
            prompt = messages[-1]["role"] == "user"
            theirs = auto.apply_chat_template(messages, tokenize=False, enable_thinking=thinking,
                                              add_generation_prompt=prompt)
            ids, _ = chat_tok.render(messages, None, prompt, enable_thinking=thinking)
            assert chat_tok.decode(ids) == theirs
            assert theirs.count("well") == (not prompt)
            assert theirs.endswith(chat.NO_THOUGHTS) == (prompt and not thinking)


@pytest.mark.parametrize("messages, words", [
    ([], "at least one message"), ([{"role": "wizard", "content": "x"}], "message 1.*wizard"),
    ([{"role": "user", "content": "x"}, {"role": "assistant"}], "message 2.*NoneType"),
    ([{"content": "x"}], "message 1"), ([{"role": "user", "content": ["x"]}], "list")])
def test_a_malformed_message_is_named(messages, words, chat_tok):
    with pytest.raises(UserError, match=words):
        chat_tok.render(messages, "chatml")


def test_missing_control_tokens_and_templates_are_named(tok):
    with pytest.raises(UserError, match=r"<\|im_start\|>, <\|im_end\|>.*chatml"):
        tok.render(CHAT, "chatml")
    with pytest.raises(UserError, match="no chat template.*--template=chatml"):
        tok.render(CHAT)
