"""text/sentencepiece.py against sentencepiece, tokenizers and transformers."""
import base64
import io
import json
import pickle
import random
import time
import unicodedata

import pytest
import sentencepiece
from tokenizer_base import CHINESE, CODE, ENGLISH, MIXED, RUNS, SPACE, TEXTS, random_texts
from test_tokenizer import RANDOM
from test_tokenizer_library import CHAT, SYSTEM
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from text import bpe
from text import chat
from text.sentencepiece import SEP, any_of
from text.tokenizer_model import CHATGLM, GLM4, LLAMA3
import tokenizer as T
from config import UserError
from text import chat_template

BYTES = [f"<0x{b:02X}>" for b in range(256)]
PLACES = [" leading", "trailing ", "   a  b   ", "\t\ta\n\n\nb\r\n", "\u00a0a\u00a0\u00a0b",
          "\u3000", " ", "    ", "\n", "", "▁", " ▁ ▁▁a▁", "a▁b", "😀 👩‍👩‍👧‍👦🇩🇪", "<0x0A>", "<unk>",
          "<s> </s>",
          "e\u0301 ﬁ ½ Ⅷ ｆｕｌｌ １２", "12345 3.14", "x" * 300 + " " * 50]
ALL = TEXTS + PLACES + RANDOM[:150]
# The options that published models were trained with, and SentencePiece's own defaults.
OPTIONS = {
    "llama2": dict(byte_fallback=True, normalization_rule_name="identity", split_digits=True,
                   remove_extra_whitespaces=False, allow_whitespace_only_pieces=True),
    "gemma": dict(byte_fallback=True, normalization_rule_name="identity", split_digits=True,
                  remove_extra_whitespaces=False, add_dummy_prefix=False, pad_id=0, eos_id=1,
                  bos_id=2, unk_id=3, allow_whitespace_only_pieces=True, user_defined_symbols=[
                      "<start_of_turn>", "<end_of_turn>", "\n", "\n\n", "\t", "▁▁", "▁▁▁", "▁▁▁▁"]),
    "trims": dict(byte_fallback=True, normalization_rule_name="identity"),
    "nfkc": dict(byte_fallback=True, normalization_rule_name="nmt_nfkc"),
    "no bytes": dict(byte_fallback=False, normalization_rule_name="identity",
                     remove_extra_whitespaces=False),
    "across words": dict(byte_fallback=True, normalization_rule_name="identity",
                         split_by_whitespace=False, remove_extra_whitespaces=False),
    "symbols": dict(byte_fallback=True, normalization_rule_name="nmt_nfkc", split_digits=True,
                    user_defined_symbols=["<think>", "ﬁ", "== "], control_symbols=["[INST]"]),
}


@pytest.fixture(scope="session", params=OPTIONS)
def trained(request, tmp_path_factory):
    """(name of the options, folder with tokenizer.model, sentencepiece's own processor)."""
    lines = (ENGLISH * 2 + CODE + CHINESE * 2 + MIXED * 2 + RUNS).split("\n")
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=out, vocab_size=1100, model_type="bpe",
        character_coverage=0.995, minloglevel=2, num_threads=1, **OPTIONS[request.param])
    folder = tmp_path_factory.mktemp("model")
    (folder / "tokenizer.model").write_bytes(out.getvalue())
    return request.param, folder, sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())


def pieces(theirs) -> list[str]:
    return [theirs.id_to_piece(i) for i in range(theirs.get_piece_size())]


# --- tokenizer.model ------------------------------------------------------------------------

def test_ids_of_tokenizer_model_are_sentencepieces(trained):
    name, folder, theirs = trained
    tok = T.load(folder)
    assert T.load(folder / "tokenizer.model").ids == tok.ids
    assert tok.vocab_size == theirs.get_piece_size()
    lengths = tok.byte_lengths()
    turns = ("<start_of_turn>", "<end_of_turn>")        # symbols there, control tokens here
    for text in ALL + random_texts(150, seed=11):
        ids = theirs.encode(text)
        assert tok.encode(text, disallowed_special=()) == ids, repr(text)
        assert tok.encode_fast(text, disallowed_special=()) == ids == tok.encode_ordinary(text)
        if name in ("llama2", "gemma", "across words") and "▁" not in text:     # nothing is lost
            assert tok.decode(ids) == text == theirs.decode(ids)
            prefix = int(name != "gemma" and text != "")
            assert lengths[ids].sum() == len(text.encode()) + prefix
        stream = tok.stream()
        assert "".join(map(stream.put, ids)) + stream.flush() == tok.decode(ids)
    assert not set(turns) & set(tok.spm.document["model"]["merges"])
    assert tok.encode_batch(PLACES) == [theirs.encode(t) for t in PLACES]


def test_special_pieces_and_prefix_of_tokenizer_model(trained):
    name, folder, theirs = trained
    tok = T.load(folder)
    assert tok.prefix == [theirs.bos_id()] and tok.suffix == []
    assert tok.special["<unk>"] == theirs.unk_id() and tok.eot == theirs.eos_id()
    a, b = theirs.encode("a"), theirs.encode("b")
    assert tok.encode("a</s>b", "all") == [*a, theirs.eos_id(), *b]
    if name == "gemma":     # its turns are control tokens, whatever the file calls them
        turn = theirs.piece_to_id("<start_of_turn>")
        assert tok.special["<start_of_turn>"] == turn
        assert turn not in tok.encode_ordinary("<start_of_turn>")
        with pytest.raises(UserError, match="<start_of_turn>"):
            tok.encode("<start_of_turn>")


def test_saved_as_tokenizer_json_it_opens_in_the_libraries_with_the_same_ids(trained, tmp_path):
    name, folder, theirs = trained
    tok = T.load(folder)
    tok.save(tmp_path)
    library = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    auto = AutoTokenizer.from_pretrained(tmp_path)
    again = T.load(tmp_path)
    assert (again.special, again.ids, again.prefix) == (tok.special, tok.ids, tok.prefix)
    # Text that the forms of the file can express: symbols split it before a space is put first,
    # and Rust's Precompiled goes by graphemes.
    texts = ALL if name not in ("nfkc", "symbols") else [ENGLISH, CHINESE, "ｆｕｌｌ １２ ﬀ  a \t b ", ""]
    for text in texts:
        ids = tok.encode(text, disallowed_special=())
        library.encode_special_tokens = True
        assert library.encode(text, add_special_tokens=False).ids == ids, repr(text)
        assert again.encode(text, disallowed_special=()) == ids, repr(text)
        library.encode_special_tokens = False
        assert again.encode(text, "all") == library.encode(text, add_special_tokens=False).ids
        if "<" not in text:
            assert auto(text)["input_ids"] == tok.prefix + ids
            assert auto.decode(ids) == tok.decode(ids) == again.decode(ids)
    again.save(tmp_path / "twice")
    twice = json.loads((tmp_path / "twice" / "tokenizer.json").read_text(encoding="utf-8"))
    assert twice == json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    assert pickle.loads(pickle.dumps(again)).encode(ENGLISH) == again.encode(ENGLISH)


# --- tokenizer.json -------------------------------------------------------------------------

FORMS = {       # normalizer, pre_tokenizer, whether decoding drops a leading space
    "llama 2": (normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
                None, True),
    "llama, not legacy": (None, pre_tokenizers.Metaspace("▁", "first", split=False), True),
    "always": (None, pre_tokenizers.Metaspace("▁", "always", split=True), True),
    "first, split": (None, pre_tokenizers.Metaspace("▁", "first", split=True), True),
    "never": (None, pre_tokenizers.Metaspace("▁", "never", split=False), False),
    "gemma": (normalizers.Replace(" ", "▁"),
              pre_tokenizers.Split(" ", "merged_with_previous"), False),
    "split spaces": (None, pre_tokenizers.Split(" ", "merged_with_previous"), False),
}


def library(vocab: dict, form: str, added=(), **model) -> Tokenizer:
    """A tokenizer of the library's own making, as its converters would build it."""
    from transformers.tokenization_utils_base import generate_merges
    fallback = model.pop("byte_fallback", True)
    theirs = Tokenizer(models.BPE(vocab, generate_merges(vocab, None), byte_fallback=fallback,
                                  **{"unk_token": "<unk>", "fuse_unk": True, **model}))
    before, pre, strip = FORMS[form]
    if before:
        theirs.normalizer = before
    if pre:
        theirs.pre_tokenizer = pre
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    theirs.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * strip)
    theirs.add_tokens([AddedToken(n, **{"normalized": False, "special": True, **flags})
                       for n, flags in added])
    return theirs


@pytest.fixture(scope="session")
def vocab() -> dict[str, int]:
    """A little vocabulary with spaces inside and around words, runs, and all the bytes."""
    from tokenizers import trainers
    theirs = Tokenizer(models.BPE())
    theirs.pre_tokenizer = pre_tokenizers.Metaspace(split=True)
    lines = (ENGLISH * 2 + CODE + CHINESE + MIXED + RUNS).split("\n")
    theirs.train_from_iterator(lines, trainers.BpeTrainer(
        vocab_size=1000, special_tokens=["<unk>", "<s>", "</s>", *BYTES], show_progress=False,
        limit_alphabet=150))
    words = sorted(theirs.get_vocab(), key=theirs.get_vocab().get)
    return {w: i for i, w in enumerate(dict.fromkeys([*words, "▁▁", "▁▁▁▁", "e▁", "▁of▁the"]))}


ADDED = {
    "plain": [("<s>", {}), ("</s>", {}), ("<unk>", {})],
    "normalized": [("<s>", {"normalized": True}), ("</s>", {"normalized": True}),
                   ("a b", {"special": False, "normalized": True}),
                   ("▁▁", {"special": False, "normalized": True})],
    "text": [("<s>", {}), ("\n\n", {"special": False}), ("  ", {"special": False}),
             ("\n", {"special": False}), ("▁▁▁▁", {"special": False})],
    "strips": [("<s>", {}), ("</s>", {"rstrip": True}), ("<|user|>", {"rstrip": True}),
               ("<mask>", {"lstrip": True}), ("<sep>", {"lstrip": True, "rstrip": True})],
}
WITH_TOKENS = [f"{a}<s>{b}</s> <|user|>{c}\n <mask> {a}\u00a0<sep>\x85\t{b} a b<s>{c}<s> <mask>"
               for a, b, c in [("", "", ""), (" ", "  ", "\n\n"), ("Hi", "you ", "\n\n\n the"),
                               ("a b", "▁▁", "中文 \n"), ("▁", " a", "e\u0301")]]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("added", ADDED)
def test_ids_of_tokenizer_json_are_the_librarys(form, added, vocab, tmp_path):
    theirs = library(vocab, form, ADDED[added])
    theirs.save(str(tmp_path / "tokenizer.json"))
    tok = T.load(tmp_path)
    tok.save(tmp_path / "again")
    again = T.load(tmp_path / "again")
    resaved = Tokenizer.from_file(str(tmp_path / "again" / "tokenizer.json"))
    for text in ALL[::2] + PLACES + WITH_TOKENS + random_texts(20, seed=5):
        expected = theirs.encode(text, add_special_tokens=False).ids
        assert tok.encode(text, "all") == expected, repr(text)
        assert again.encode(text, "all") == expected
        assert resaved.encode(text, add_special_tokens=False).ids == expected
        # the library decodes half a character otherwise, and here there is none
        assert tok.decode(expected) == theirs.decode(expected, skip_special_tokens=False)
        stream = tok.stream()
        assert "".join(map(stream.put, expected)) + stream.flush() == tok.decode(expected)


@pytest.mark.parametrize("flags", [
    {"fuse_unk": False}, {"unk_token": None}, {"ignore_merges": True}, {"byte_fallback": False},
    {"byte_fallback": False, "fuse_unk": False}, {"byte_fallback": False, "unk_token": None}])
@pytest.mark.parametrize("lacks", [0, 100], ids=["all bytes", "some bytes"])
def test_flags_of_the_model_are_the_librarys(flags, lacks, vocab, tmp_path):
    """Characters with neither a token nor bytes become unknown ones, in the library's order."""
    less = {t: i for t, i in vocab.items() if t not in BYTES[128:128 + lacks]}
    theirs = library(less, "llama 2", ADDED["plain"][:2], **flags)
    theirs.save(str(tmp_path / "tokenizer.json"))
    theirs.encode_special_tokens = True
    tok = T.load(tmp_path)
    for text in ALL[::2] + ["中é中中\u05d0 é中a", "龘龘 a龘", "▁of▁the"]:
        assert tok.encode(text, disallowed_special=()) == theirs.encode(text).ids, repr(text)


def test_merges_in_any_order_and_ties_are_the_librarys(tmp_path):
    """Pairs have a rank each: the same token can be made early from one pair, late from another."""
    letters = ["<unk>", "▁", "a", "b"]
    for seed in range(60):
        rng = random.Random(seed)
        words = dict.fromkeys(letters)
        for _ in range(12):
            words["".join(rng.choices(list(words)[1:], k=2))] = None
        vocab = {w: i for i, w in enumerate(words)}
        pairs = [(w[:k], w[k:]) for w in words for k in range(1, len(w))
                 if w != "<unk>" and w[:k] in vocab and w[k:] in vocab]
        pairs = [p for p in rng.sample(pairs, len(pairs)) if rng.random() < 0.8]
        theirs = Tokenizer(models.BPE(vocab, pairs, unk_token="<unk>"))
        theirs.normalizer = normalizers.Replace(" ", "▁")
        theirs.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
        tok = T.from_json(json.loads(theirs.to_str()))
        for length in (3, 8, 30, 250):
            text = "".join(rng.choices("ab ", k=length))
            assert tok.encode(text) == theirs.encode(text).ids, (seed, text)


def test_chunks_never_cut_a_merge(vocab):
    """The cuts that make caching possible do not show, in a vocabulary with "e▁" and "▁of▁the"."""
    tok = T.from_json(json.loads(library(vocab, "gemma").to_str()))
    assert "e▁" in tok.spm.joined and "z▁" not in tok.spm.joined
    for text in ALL:
        text = tok.spm.normalize(text.replace("\ud800", ""))
        whole = tok.spm.spell(bpe.bpe(tok.spm.ranks, text, SEP))
        assert tok.spm._word(text) == whole, repr(text)


@pytest.mark.parametrize("config", [{}, {"add_bos_token": True, "add_eos_token": True},
                                    {"add_bos_token": False}])
@pytest.mark.parametrize("post", [None, "<s> $A", "$A </s>", "<s> <s> $A </s>"])
@pytest.mark.parametrize("kind", ["LlamaTokenizer", "PreTrainedTokenizerFast"])
def test_prefix_is_what_transformers_adds(config, post, kind, vocab, tmp_path):
    """It goes by the post_processor: beside a tokenizer.json, add_bos_token means nothing to it."""
    from tokenizers import processors
    theirs = library(vocab, "llama, not legacy", ADDED["plain"])
    if post:
        theirs.post_processor = processors.TemplateProcessing(
            single=post, special_tokens=[("<s>", 1), ("</s>", 2)])
    theirs.save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": kind, "bos_token": "<s>", "unk_token": "<unk>", **config,
                "eos_token": {"__type": "AddedToken", "content": "</s>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tok = T.load(tmp_path)
    ids = AutoTokenizer.from_pretrained(tmp_path)("the")["input_ids"]
    assert ids == tok.prefix + tok.encode("the") + tok.suffix
    assert len(tok.prefix + tok.suffix) == (post or "").count("s>")
    tok.save(tmp_path / "again")
    assert AutoTokenizer.from_pretrained(tmp_path / "again")("the")["input_ids"] == ids
    assert T.load(tmp_path / "again").prefix == tok.prefix


def test_prefix_of_byte_level_files(tmp_path):
    """Llama 3's: a sequence of processors. encode() never adds it, nor does a chat add another."""
    from tokenizers import processors
    names = chat.find("llama3").control("") + ["<|end_of_text|>"]
    tok = T.train([ENGLISH], 300, special_tokens=names)
    assert tok.prefix == tok.suffix == []
    tok.save(tmp_path)
    theirs = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    first = tok.special["<|begin_of_text|>"]
    theirs.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=False), processors.TemplateProcessing(
            single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", first)])])
    theirs.save(str(tmp_path / "tokenizer.json"))
    tok = T.load(tmp_path)
    assert tok.prefix == [first] and tok.prefix + tok.encode("the") == theirs.encode("the").ids
    assert tok.render(CHAT, "llama3")[0].count(first) == 1


# --- other files of that name ---------------------------------------------------------------

def ranks_file(tok: T.Tokenizer) -> bytes:
    return b"".join(base64.b64encode(t) + b" %d\n" % r for t, r in tok.ranks.items())


@pytest.mark.parametrize("family, names, first", [
    ({}, LLAMA3, ["<|begin_of_text|>"]),
    ({"model_type": "chatglm"}, GLM4, ["[gMASK]", "<sop>"])], ids=["llama3", "glm4"])
def test_tiktokens_form_of_tokenizer_model(family, names, first, tmp_path):
    import tiktoken
    base = T.train([ENGLISH, CODE, CHINESE], 900, pattern="cl100k", special_tokens=(), workers=1)
    (tmp_path / "tokenizer.model").write_bytes(ranks_file(base))
    (tmp_path / "config.json").write_text(json.dumps(family))
    tok = T.load(tmp_path)
    assert tok.special == {n: 900 + k for k, n in enumerate(names)}
    assert tok.prefix == [tok.special[n] for n in first]
    theirs = tiktoken.Encoding("o", pat_str=base.pattern, mergeable_ranks=base.ranks,
                               special_tokens=tok.special)
    for text in TEXTS + [names[0] + "x" + names[-1]]:
        assert tok.encode(text, "all") == theirs.encode(text, allowed_special="all")
    tok.save(tmp_path / "again")
    auto = AutoTokenizer.from_pretrained(tmp_path / "again")
    assert auto(CODE)["input_ids"] == tok.prefix + tok.encode(CODE)


def test_published_ids_of_llama3s_control_tokens():
    """Its vocabulary has 128,000 ordinary tokens."""
    published = {"<|begin_of_text|>": 0, "<|end_of_text|>": 1, "<|start_header_id|>": 6,
                 "<|end_header_id|>": 7, "<|eom_id|>": 8, "<|eot_id|>": 9, "<|python_tag|>": 10,
                 "<|reserved_special_token_247|>": 255}
    assert {n: LLAMA3.index(n) for n in published} == published and len(LLAMA3) == 256


@pytest.mark.parametrize("trained", ["llama2"], indirect=True)
def test_chatglm3s_control_tokens_follow_its_vocabulary(trained, tmp_path):
    name, folder, theirs = trained
    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ChatGLMTokenizer"}')
    tok = T.load(tmp_path)
    assert [tok.special[n] for n in CHATGLM] == list(range(1100, 1109))
    assert tok.prefix == [1101, 1103]
    # each message as ChatGLM3's own code builds it: role, name of a tool and newline, text
    ids, _ = tok.render(SYSTEM + CHAT[:1], "chatglm3", add_generation_prompt=True)
    expected = [*tok.prefix, tok.special["<|system|>"], *theirs.encode("\n"),
                *theirs.encode("Be brief."), tok.special["<|user|>"], *theirs.encode("\n"),
                *theirs.encode(CHAT[0]["content"]), tok.special["<|assistant|>"]]
    assert ids == expected


@pytest.mark.parametrize("trained", ["llama2"], indirect=True)
def test_chatglm3s_marks_are_what_its_files_say(trained, tmp_path):
    """As published: "special": false, so that any text has them; letters where a caller says so."""
    name, folder, theirs = trained
    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    marks = {"[gMASK]": 1101, "sop": 1103, "<|user|>": 1106, "<|assistant|>": 1107}
    flags = dict(lstrip=False, normalized=True, rstrip=False, single_word=False, special=False)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "ChatGLMTokenizer", "auto_map": {"AutoTokenizer": ["x.Y", None]},
        "added_tokens_decoder": {i: {"content": n, **flags} for n, i in marks.items()}}))
    tok = T.load(tmp_path)
    assert {n: tok.added[n]["id"] for n in marks} == marks and tok.prefix == [1101, 1103]
    assert not marks.keys() & tok.special.keys() and tok.special["<|system|>"] == 1105
    assert tok.add_special_tokens(marks) == 0           # a template needs no new ids for them
    text = "hi<|user|>\n there"
    assert tok.encode(text) == [*theirs.encode("hi"), 1106, *theirs.encode("\n there")]
    letters = tok.encode_ordinary(text, letters=frozenset(marks))
    assert 1106 not in letters and letters == theirs.encode(text)
    tok.save(tmp_path / "out")          # transformers reads the same, and hides no mark
    auto = AutoTokenizer.from_pretrained(tmp_path / "out")
    for text in [text, "[gMASK]sop<|user|>\n a <|assistant|> b", *PLACES]:
        assert auto(text, add_special_tokens=False)["input_ids"] == tok.encode(text, "all")
    assert auto.decode([1106, *theirs.encode("a")], skip_special_tokens=True).startswith("<|user|>")


@pytest.mark.parametrize("trained", ["llama2"], indirect=True)
def test_tokens_that_the_configuration_adds_behind_tokenizer_model(trained, tmp_path):
    name, folder, theirs = trained
    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({
        "add_bos_token": False, "bos_token": "<s>", "added_tokens_decoder": {
            "1": {"content": "<s>", "special": True}, "1100": {"content": "<|im_end|>",
                                                               "special": True}}}))
    tok = T.load(tmp_path)
    assert tok.special["<|im_end|>"] == 1100 and tok.vocab_size == 1101 and tok.prefix == []
    # tokenizer.json wins where both lie
    tok.add_special_tokens(["<new>"])
    tok.save(tmp_path)
    assert T.load(tmp_path).special["<new>"] == 1101
    (tmp_path / "tokenizer_config.json").unlink()
    assert T.load(tmp_path / "tokenizer.model").special.get("<new>") is None


# --- faults ---------------------------------------------------------------------------------

@pytest.mark.parametrize("trained", ["nfkc"], indirect=True)
def test_a_truncated_or_mangled_tokenizer_model_is_one_sentence(trained, tmp_path):
    _, folder, _ = trained
    good = (folder / "tokenizer.model").read_bytes()
    path, rng = tmp_path / "tokenizer.model", random.Random(0)
    spoilt = [good[:n] for n in (1, 2, 5, 100, len(good) // 2, len(good) - 1)]
    spoilt += [b"", b"\n", b"\n\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", b"\n" + b"\xff" * 40,
               b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", b"{}", b"YQ== 1\n",
               b"YQ== 0\nYg== x\n", b"!!! 0\n", b"\x80" * 100, b"\n\x03\n\x01a" * 3]
    for data in spoilt:
        path.write_bytes(data)
        with pytest.raises(UserError) as e:
            T.load(tmp_path)
        assert "\n" not in str(e.value) and "tokenizer" in str(e.value)
    for _ in range(150):        # any byte changed: an error in words, or another vocabulary
        data = bytearray(good)
        for _ in range(3):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data)
        try:
            T.load(tmp_path).encode("ｆｕｌｌ a", disallowed_special=())
        except UserError as e:
            assert "\n" not in str(e)


def test_unigram_models_are_refused(tmp_path):
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CODE.split("\n")), model_writer=out, vocab_size=200,
        model_type="unigram", minloglevel=2, num_threads=1)
    (tmp_path / "tokenizer.model").write_bytes(out.getvalue())
    with pytest.raises(UserError, match="not BPE"):
        T.load(tmp_path)


def test_a_foreign_tokenizer_json_is_refused_in_one_sentence(vocab, tmp_path):
    def put(*path_and_value):
        *path, last, value = path_and_value

        def spoil(d):
            for key in path:
                d = d[key]
            d[last] = value
        return spoil

    faults = {
        "BPE": put("model", "type", "Unigram"), "unknown": put("model", "unk_token", "<none>"),
        "dropout": put("model", "dropout", 0.1), "merge": put("model", "merges", [["zq", "qz"]]),
        "NFKC": put("normalizer", {"type": "NFKC"}), "Replace": put("normalizer", {
            "type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "b"}),
        "Digits": put("pre_tokenizer", {"type": "Digits"}),
        "prepend_scheme": put("pre_tokenizer", {"type": "Metaspace", "prepend_scheme": "last"}),
        "decoder": put("decoder", "decoders", [{"type": "Replace"}, {"type": "CTC"}]),
        "single_word": put("added_tokens", 0, "single_word", "yes"),
        "ids": put("model", "vocab", "the", -5), "post_processor": put("post_processor", {
            "type": "Magic"})}
    for words, spoil in faults.items():
        document = json.loads(library(vocab, "llama 2", ADDED["plain"]).to_str())
        spoil(document)
        (tmp_path / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
        with pytest.raises(UserError, match=words) as e:
            T.load(tmp_path)
        assert "\n" not in str(e.value)


# --- speed, conversations, continuing a text ------------------------------------------------

@pytest.mark.parametrize("trained", ["llama2", "across words"], indirect=True)
@pytest.mark.parametrize("text", ["a" * 300_000, " " * 300_000, "=" * 300_000, "中" * 300_000,
                                  ENGLISH * 2000, CHINESE * 3000],
                         ids=["letters", "spaces", "signs", "chinese", "english", "sentences"])
def test_long_texts_are_not_quadratic(trained, text):
    name, folder, theirs = trained
    tok = T.load(folder)
    tok.encode("warm")
    start = time.perf_counter()
    ids = tok.encode(text)
    assert time.perf_counter() - start < 15
    assert ids == theirs.encode(text)


def test_many_added_tokens_are_found_fast():
    names = frozenset(f"<unused{k}>" for k in range(6000)) | {"<unused", "a<", "a"}
    text = "x < <unused12> <unused7 a<b" * 3000
    start = time.process_time()
    found = any_of(names).findall(text)
    assert time.process_time() - start < 10         # one alternative after the other takes minutes
    assert found[:3] == ["<unused12>", "<unused", "a<"] and any_of(frozenset()) is None
    rng = random.Random(1)      # the longest of several wins, as in a plain alternation
    for _ in range(200):
        few = frozenset("".join(rng.choices("ab.", k=rng.randrange(1, 5))) for _ in range(6))
        plain = T.re.compile("|".join(map(T.re.escape, sorted(few, key=len, reverse=True))))
        text = "".join(rng.choices("ab.", k=40))
        assert any_of(few).findall(text) == plain.findall(text)


@pytest.mark.parametrize("trained", ["llama2", "gemma"], indirect=True)
def test_a_stream_goes_on_after_a_prompt(trained):
    """The first space of a continuation is one between words; of a text of its own, it is not."""
    name, folder, theirs = trained
    tok = T.load(folder)
    ids = tok.encode("You are the fox")
    for k in range(1, len(ids)):
        stream = tok.stream(after=ids[:k])
        new = "".join(map(stream.put, ids[k:])) + stream.flush()
        assert tok.decode(ids[:k]) + new == "You are the fox"
    assert tok.stream().put(tok.encode("the")[0]).lstrip() == tok.stream().put(tok.encode("the")[0])
    assert T.show(tok, tok.encode("The fox"), color=False).replace("|", "").strip() == "The fox"
    emoji = tok.encode("😀")
    stream = tok.stream()
    shown = [stream.put(i) for i in emoji]
    assert shown[-1] == "😀" and set(shown[:-1]) == {""}        # at its last byte
    assert tok.decode(emoji[:-1]) == "\ufffd"


@pytest.mark.parametrize("trained", ["llama2", "gemma"], indirect=True)
@pytest.mark.parametrize("form", ["model", "first"])
@pytest.mark.parametrize("template", chat.TEMPLATES)
def test_conversations_are_transformers_ids(template, form, trained, tmp_path):
    name, folder, _ = trained
    tok = T.load(folder)
    tok.add_special_tokens(chat.find(template).control(tok.eot_token))
    tok.template = template
    if form == "first":         # newer Llama files put a space before the very first text alone
        document = tok._json()
        document["normalizer"] = None
        document["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "split": False,
                                     "prepend_scheme": "first" if name == "llama2" else "never"}
        tok = T.from_json(document)
        tok.template = template
    tok.save(tmp_path)
    auto = AutoTokenizer.from_pretrained(tmp_path)
    harmless = [{**m, "content": m["content"].replace("<|", "< ").strip()} for m in CHAT]
    for messages in (harmless, SYSTEM + harmless, harmless[:1], harmless[:3]):
        prompt = messages[-1]["role"] == "user"
        theirs = auto.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
        ids, mask = tok.render(messages, None, prompt)
        assert ids == theirs, (auto.decode(theirs), tok.decode(ids))
        assert len(mask) == len(ids) and ids.count(tok.prefix[0]) <= 1 + 2 * (template == "llama2")
        # by Jinja, whose mask comes from rendering prefixes: the same but for Qwen3's empty thoughts
        by_jinja = chat_template.render(tok, chat.jinja(chat.find(template), tok.eot_token),
                                        messages, prompt)
        assert by_jinja.ids == ids and (by_jinja.mask == mask or template == "qwen3")
        if not prompt:          # the prompt of an answer is how the conversation with it begins
            start = tok.render(messages[:-1], None, True)[0]
            assert ids[:len(start)] == start and mask[len(start):].count(1) >= 2


def test_unicode_is_left_alone_unless_the_file_says_otherwise(vocab):
    tok = T.from_json(json.loads(library(vocab, "gemma").to_str()))
    for text in ("e\u0301", "ﬁ½", SPACE):
        assert tok.decode(tok.encode(text)) == text
    assert unicodedata.normalize("NFC", "e\u0301") != "e\u0301"
    assert tok.decode(tok.encode("a\ud800b")) == "a\ufffdb"
