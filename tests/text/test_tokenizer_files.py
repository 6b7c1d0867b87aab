"""The files around a vocabulary, against transformers' AutoTokenizer: read, kept, written."""
import io
import json
import random
from pathlib import Path

import pytest
import sentencepiece
import torch
from test_added_tokens import TEXT, trained
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

import checkpoint
import tokenizer as T
from config import UserError
from model import ModelConfig, Transformer

FLAGS = dict(lstrip=False, rstrip=False, single_word=False, normalized=False)
TEXTS = [TEXT, "The fox 123 <|endoftext|>it's <|im_start|>x<|im_end|><think>y <tool_call>",
         "a <mask> b</s><s>", "e\u0301 12345\n\n x", "<x> y", "DON'T", ""]


def put(folder: Path, **files) -> Path:
    """Write NAME=object as NAME.json, NAME=text as NAME.jinja."""
    folder.mkdir(exist_ok=True, parents=True)
    for name, value in files.items():
        if isinstance(value, str):
            (folder / f"{name}.jinja").write_text(value)
        else:
            (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


# --- two tables -------------------------------------------------------------------------------

NEW = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "<think>"]
QWEN = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "added_tokens_decoder": {
    str(1000 + k): {**FLAGS, "content": n, "special": n[1] == "|"} for k, n in enumerate(NEW)}}
OLD_QWEN = dict(
    added_tokens={"<|endoftext|>": 358, "<|im_start|>": 359, "<|im_end|>": 360, "<x>": 361},
    special_tokens_map={"eos_token": "<|im_end|>", "pad_token": {**FLAGS, "content": NEW[0]},
                        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
ROBERTA = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
TABLES = {      # class, control tokens in vocab.json, model_type, further settings, other files
    "gpt2": ("GPT2Tokenizer", NEW[:1], "gpt2", {}, {}),
    "gpt2, fast": ("GPT2TokenizerFast", NEW[:1], "gpt2", {}, {}),
    "gpt2, by config.json": (None, NEW[:1], "gpt2", {}, {}),
    "qwen2": ("Qwen2Tokenizer", [], "qwen2", QWEN, {}),
    "qwen3": ("Qwen2Tokenizer", [], "qwen3", QWEN, {}),
    "qwen3, by config.json": (None, [], "qwen3", QWEN, {}),
    "qwen2, older files": ("Qwen2Tokenizer", [], "qwen2", {}, OLD_QWEN),
    "roberta": ("RobertaTokenizer", ROBERTA, "roberta", {}, {}),
    "roberta, mask": ("RobertaTokenizer", ROBERTA, "roberta", {"mask_token": {
        "__type": "AddedToken", **FLAGS, "lstrip": True, "content": "<mask>"}}, {}),
    "gpt-neox": ("GPTNeoXTokenizer", ["<|endoftext|>", "<|padding|>"], "gpt_neox", {}, {}),
    "codegen": ("CodeGenTokenizer", NEW[:1], "codegen", {}, {}),
}


def tables(folder: Path, kind: str | None, controls: list[str], model_type: str, settings: dict,
           files: dict, ends: bytes = b"\n") -> Path:
    put(folder, config={"model_type": model_type}, **files, tokenizer_config={
        **({"tokenizer_class": kind} if kind else {}), **settings})
    trained(600).model.save(str(folder))
    vocab = json.loads((folder / "vocab.json").read_text())
    for name in controls:
        vocab[name] = len(vocab)
    put(folder, vocab=vocab)
    merges = folder / "merges.txt"
    merges.write_bytes(merges.read_bytes().replace(b"\n", ends))
    return folder


@pytest.mark.parametrize("ends", [b"\n", b"\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize("form", TABLES)
def test_two_tables_are_cut_as_their_class_says(form, ends, tmp_path):
    folder = tables(tmp_path / "in", *TABLES[form], ends)
    theirs = AutoTokenizer.from_pretrained(folder)
    ours = T.load(folder)
    special = {str(t) for t in theirs.added_tokens_decoder.values() if t.special}
    assert set(ours.special) == special
    assert ours.facts.named == theirs.special_tokens_map
    ours.save(tmp_path / "out")
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.special_tokens_map == theirs.special_tokens_map
    for text in TEXTS:
        want = theirs(text).input_ids
        assert ours.prefix + ours.encode(text, "all") + ours.suffix == want, text
        assert again(text).input_ids == want
        assert again.decode(want, skip_special_tokens=True) == theirs.decode(
            want, skip_special_tokens=True)


@pytest.mark.parametrize("kind, settings, words", [
    ("BertTokenizer", {}, "BertTokenizer.*GPT2Tokenizer"), ("LlamaTokenizer", {}, "LlamaTokenizer"),
    ("PreTrainedTokenizerFast", {}, "tokenizer.json"),
    ("GPT2Tokenizer", {"add_prefix_space": True}, "prefix space")])
def test_two_tables_of_another_class_are_refused_by_name(kind, settings, words, tmp_path):
    tables(tmp_path, kind, [], "llama", settings, {})
    with pytest.raises(UserError, match=words):
        T.load(tmp_path)


# --- what other files say ---------------------------------------------------------------------

def fast(**roles) -> PreTrainedTokenizerFast:
    theirs = trained()
    theirs.add_special_tokens(["<bos>", "<end>", "<turn>", "<pad>"])
    theirs.add_tokens(["<think>"])
    return PreTrainedTokenizerFast(tokenizer_object=theirs, **roles)


SOURCES = {     # what says that a text ends: every file counts
    "tokenizer_config": dict(tokenizer_config={"eos_token": "<end>"}),
    "tokenizer_config, object": dict(tokenizer_config={"eos_token": {"content": "<end>"}}),
    "special_tokens_map": dict(special_tokens_map={"eos_token": "<end>"}),
    "special_tokens_map, object": dict(special_tokens_map={"eos_token": {
        **FLAGS, "content": "<end>"}}),
    "generation_config": dict(generation_config={"eos_token_id": "<end>"}),
    "generation_config, several": dict(generation_config={"eos_token_id": ["<turn>", "<end>"]}),
    "config": dict(config={"eos_token_id": "<end>", "model_type": "llama"}),
    "config, several": dict(config={"eos_token_id": ["<end>", "<turn>"], "model_type": "llama"}),
    "wrapped config": dict(config={"text_config": {"eos_token_id": "<end>"}}),
}


@pytest.mark.parametrize("first", SOURCES)
@pytest.mark.parametrize("second", ["", "tokenizer_config", "generation_config, several"])
def test_the_ends_of_all_files_end_an_answer(first, second, tmp_path):
    fast().save_pretrained(tmp_path)
    names = trained().get_vocab_size()
    ids = {"<bos>": names, "<end>": names + 1, "<turn>": names + 2}

    def numbered(value):
        if isinstance(value, list):
            return [ids[v] for v in value]
        return {k: numbered(v) if k.endswith("_id") or isinstance(v, dict) and k != "eos_token"
                else v for k, v in value.items()} if isinstance(value, dict) else ids.get(value)
    want = set()
    for source in filter(None, (first, second)):
        for name, values in SOURCES[source].items():
            path = tmp_path / f"{name}.json"
            old = json.loads(path.read_text()) if path.exists() else {}
            put(tmp_path, **{name: {**old, **(numbered(values) if "config" in name
                                              and "tokenizer" not in name else values)}})
            want |= {i for n, i in ids.items() if n in json.dumps(values)}
    tok = T.load(tmp_path)
    assert set(tok.stop_ids) == want, (tok.stop_ids, ids)
    tok.save(tmp_path / "again")  # and after saving they are in the files that are written
    put(
        tmp_path / "again",
        generation_config=T.tokenizer_files.build_generation_config(tok, tok.token_ids()),
        config=tok.token_ids(),
    )
    assert set(T.load(tmp_path / "again").stop_ids) == want


@pytest.mark.parametrize("decoder", [False, True])
@pytest.mark.parametrize("one, other", [
    ({"eos_token": "<end>", "pad_token": "<pad>"}, {"eos_token": "<turn>", "bos_token": "<bos>"}),
    ({"eos_token": "<end>"}, {"eos_token": {**FLAGS, "content": "<turn>"}}),
    ({"pad_token": None}, {"pad_token": "<pad>"})])
def test_of_two_files_that_name_a_role_the_one_counts_that_counts_there(one, other, decoder,
                                                                      tmp_path):
    fast().save_pretrained(tmp_path)
    listed = {"added_tokens_decoder": {}} if decoder else {}
    put(tmp_path, tokenizer_config={**one, **listed}, special_tokens_map=other)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    ours = T.load(tmp_path)
    for role in ("bos_token", "eos_token", "pad_token"):
        if getattr(theirs, role) is not None:       # what nobody else says, either file may say
            assert getattr(ours, role) == getattr(theirs, role), role


def test_a_token_with_a_role_is_a_control_token(tmp_path):
    fast().save_pretrained(tmp_path)
    for role, name in [("eos_token", "<think>"), ("pad_token", "A")]:
        put(tmp_path, tokenizer_config={role: name})
        theirs = AutoTokenizer.from_pretrained(tmp_path)
        assert name in T.load(tmp_path).special
        assert set(T.load(tmp_path).special) == {
            str(t) for t in theirs.added_tokens_decoder.values() if t.special}


@pytest.mark.parametrize("flags", [{"special": True, "lstrip": True}, {"special": False},
                                   {"special": False, "single_word": True}])
def test_flags_of_tokenizer_config_count_as_they_count_there(flags, tmp_path):
    fast().save_pretrained(tmp_path)
    i = trained().get_vocab_size() + 4
    put(tmp_path, tokenizer_config={"added_tokens_decoder": {
        str(i): {**FLAGS, **flags, "content": "<think>"},
        str(i + 1): {**FLAGS, **flags, "content": "<new>"}}})
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    ours = T.load(tmp_path)
    for text in ("a <think> b<think>", "x<new> <new>"):
        assert ours.encode(text, "all") == theirs(text).input_ids
    assert set(ours.special) == {str(t) for t in theirs.added_tokens_decoder.values() if t.special}


# --- kept -------------------------------------------------------------------------------------

KEPT = {"model_max_length": 77, "padding_side": "left", "add_bos_token": False,
        "clean_up_tokenization_spaces": True, "my_own_key": {"a": [1, None, "é"]},
        "extra_special_tokens": ["<turn>"], "split_special_tokens": False}


@pytest.mark.parametrize("templates", ["none", "text", "list", "file", "files"])
def test_what_a_folder_says_it_says_after_saving(templates, tmp_path):
    """Unknown settings, roles, lengths; chat templates, letter by letter and where they were."""
    source = tmp_path / "in"
    fast(eos_token="<end>", pad_token="<pad>", bos_token="<bos>", unk_token="<end>",
         **{k: v for k, v in KEPT.items() if k != "my_own_key"}).save_pretrained(source)
    settings = json.loads((source / "tokenizer_config.json").read_text()) | KEPT
    odd = "{# é #}{%- for m in messages %}\r\n  {{ m.content }}{{ tools }}\n{% endfor %}\n"
    if templates == "text":
        settings["chat_template"] = odd
    elif templates == "list":
        settings["chat_template"] = [{"name": "tool_use", "template": odd + "t"},
                                     {"name": "default", "template": odd}]
    elif templates in ("file", "files"):
        (source / "chat_template.jinja").write_text(odd, newline="")
        if templates == "files":
            put(source / "additional_chat_templates", tool_use=odd + "t")
    put(source, tokenizer_config=settings)
    tok = T.load(source)
    want = {"none": {}, "text": {"default": odd}, "file": {"default": odd}}.get(
        templates, {"default": odd, "tool_use": odd + "t"})
    assert {**tok.jinjas} == want and tok.jinja == want.get("default", "")
    assert tok.settings == settings
    tok.save(tmp_path / "out")
    written = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert {k: written[k] for k in settings if k != "tokenizer_class"} == {
        k: v for k, v in settings.items() if k != "tokenizer_class"}
    before, after = map(AutoTokenizer.from_pretrained, (source, tmp_path / "out"))
    for key in ("special_tokens_map", "model_max_length", "padding_side", "chat_template",
                "extra_special_tokens", "added_tokens_decoder"):
        assert getattr(before, key) == getattr(after, key), key
    assert T.load(tmp_path / "out").jinjas == want
    # in the place of its own template another one is told: then no file says the old one
    tok.template = "chatml"
    tok.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tok.save(tmp_path / "out")
    assert "<|im_start|>" in AutoTokenizer.from_pretrained(tmp_path / "out").chat_template


def test_a_listing_of_added_tokens_grows_with_them(tmp_path):
    fast().save_pretrained(tmp_path)
    i = trained().get_vocab_size() + 4
    put(tmp_path, tokenizer_config={"added_tokens_decoder": {
        str(i): {**FLAGS, "special": False, "content": "<think>"}}})
    tok = T.load(tmp_path)
    tok.add_special_tokens(["<label>"])
    tok.save(tmp_path)
    listed = json.loads((tmp_path / "tokenizer_config.json").read_text())["added_tokens_decoder"]
    assert listed[str(i + 1)] == {**FLAGS, "content": "<label>", "special": True}
    assert listed[str(i)] == {**FLAGS, "content": "<think>", "special": False}


def small(tok: T.Tokenizer, family: str = "llama", **settings) -> Transformer:
    return Transformer(
        ModelConfig.from_family(
            family,
            n_layer=1,
            n_head=2,
            n_embd=16,
            block_size=64,
            vocab_size=tok.vocab_size,
            **settings,
        )
    )


GENERATION = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "my_own_key": 3}


@pytest.mark.parametrize("how", ["convert", "save_model"])
def test_ids_and_sampling_defaults_are_kept_and_true(how, tmp_path):
    """bos, eos and pad in config.json and generation_config.json; a stage and convert alike."""
    source = tmp_path / "in"
    fast(eos_token="<turn>", pad_token="<pad>", bos_token="<bos>").save_pretrained(tmp_path / "t")
    tok = T.load(tmp_path / "t")
    checkpoint.save_model(source, small(tok), tok)
    bos, end, turn, pad = (tok.special[n] for n in ("<bos>", "<end>", "<turn>", "<pad>"))
    config = json.loads((source / "config.json").read_text())
    assert (config["bos_token_id"], config["pad_token_id"]) == (bos, pad)
    put(source, config={**config, "eos_token_id": end}, generation_config={
        **GENERATION, "eos_token_id": [end, turn], "bos_token_id": bos, "pad_token_id": pad})
    if how == "convert":
        checkpoint.convert(str(source), str(tmp_path / "out"), "bfloat16")
    else:
        checkpoint.save_model(tmp_path / "out", small(tok), T.load(source))
    for folder in (source, tmp_path / "out"):
        kept = AutoConfig.from_pretrained(folder)
        assert (kept.bos_token_id, kept.eos_token_id, kept.pad_token_id) == (bos, end, pad)
        generation = GenerationConfig.from_pretrained(folder).to_dict()
        assert generation["eos_token_id"] == [end, turn] and generation["bos_token_id"] == bos
        assert GENERATION.items() <= generation.items() and generation["pad_token_id"] == pad
        assert T.load(folder).stop_ids == [end, turn]


def test_convert_copies_the_tokenizers_files_letter_by_letter(tmp_path):
    source = tmp_path / "in"
    tok = T.train([TEXT], 300)
    checkpoint.save_model(source, small(tok), tok)
    put(source / "additional_chat_templates", tool_use="{{ tools }}")
    put(source, chat_template="{{ x }}", special_tokens_map={"pad_token": "<|endoftext|>"})
    before = {f.name: f.read_bytes() for f in source.iterdir() if f.is_file() and f.name not in (
        "config.json", "model.safetensors", "generation_config.json")}
    checkpoint.convert(str(source), str(tmp_path / "out"), "bfloat16")
    assert before == {name: (tmp_path / "out" / name).read_bytes() for name in before}
    assert (tmp_path / "out" / "additional_chat_templates" / "tool_use.jinja").exists()
    # saving there again replaces the folder of templates as well
    checkpoint.save_model(tmp_path / "out", small(tok), tok)
    assert not (tmp_path / "out" / "additional_chat_templates").exists()


# --- read right by transformers -----------------------------------------------------------------

@pytest.mark.parametrize("family", ["qwen2", "llama", "qwen3", "gpt2", "mistral", "gemma2"])
@pytest.mark.parametrize("pattern", ["gpt2", "qwen", "qwen, NFC"])
def test_a_saved_model_has_its_tokenizer_in_transformers(family, pattern, tmp_path, capsys):
    """transformers 5 forces Qwen's pattern upon model_type qwen2: it is saved as llama then."""
    tok = T.train([TEXT], 330, pattern=pattern.split(",")[0], special_tokens=["<|endoftext|>"])
    tok.forms = ("NFC",) if "NFC" in pattern else ()
    model = small(tok, family)
    checkpoint.note.cache_clear()
    checkpoint.save_model(tmp_path, model, tok)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in [TEXT, "year 1234 and 11234, DON'T\n\n\n    x", "e\u0301", "<|endoftext|>a"]:
        assert theirs(text).input_ids == tok.encode(text, "all"), text
    told = "Qwen's own rules" in capsys.readouterr().err
    moved = family == "qwen2" and "NFC" not in pattern
    assert told == moved
    kind = json.loads((tmp_path / "config.json").read_text())["model_type"]
    assert (kind == "llama") == (moved or family == "llama")
    ids = torch.tensor([tok.encode("The fox")])
    with torch.no_grad():       # and it is the same model
        assert torch.equal(checkpoint.load_model(tmp_path).logits(ids), model.eval().logits(ids))


def test_windows_that_llama_has_not_keep_qwen2_with_a_note(tmp_path, capsys):
    tok = T.train([TEXT], 300)
    model = small(tok, "qwen2", sliding_window=8, layer_types=["sliding_attention"])
    checkpoint.note.cache_clear()
    checkpoint.save_model(tmp_path, model, tok)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "qwen2"
    assert "PreTrainedTokenizerFast" in capsys.readouterr().err


# --- elsewhere ----------------------------------------------------------------------------------

def test_tokenizer_model_one_folder_up_in_metas_layout(tmp_path):
    """Llama 2's downloads: one tokenizer.model beside the folders of the sizes."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.split("\n")), model_writer=out, vocab_size=350,
        model_type="bpe", minloglevel=2, num_threads=1, byte_fallback=True)
    (tmp_path / "tokenizer.model").write_bytes(out.getvalue())
    tok = T.load(tmp_path)
    model = small(tok)
    checkpoint.save_model(tmp_path / "hf", model, tok)
    checkpoint.convert(str(tmp_path / "hf"), str(tmp_path / "meta"), form="meta")
    for file in (tmp_path / "meta").glob("token*"):
        file.unlink()
    assert checkpoint.load_tokenizer(tmp_path / "meta").encode("The fox") == tok.encode("The fox")
    checkpoint.convert(str(tmp_path / "meta"), str(tmp_path / "back"))
    assert T.load(tmp_path / "back").encode("The fox") == tok.encode("The fox")
    with pytest.raises(UserError, match="no tokenizer"):
        T.load(put(tmp_path / "other"))         # only there


JUNK = [None, True, -1, 0, 3.5, "", "x", "\ud800", [], {}, [[]], {"a": 1}, [1], ["x"], 10 ** 30]


def spoiled(value, rng: random.Random):
    """A copy of a JSON value with something else at a random place."""
    places = [((), value)]
    for path, part in places:
        inner = part.items() if isinstance(part, dict) else enumerate(part) if isinstance(
            part, list) else ()
        places += [((*path, k), v) for k, v in list(inner)[:9] if len(path) < 5]
    path = rng.choice(places)[0]
    copy = json.loads(json.dumps(value))
    if not path:
        return rng.choice(JUNK)
    part = copy
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = rng.choice(JUNK)
    return copy


def test_wrong_types_anywhere_are_one_sentence(tmp_path):
    """Every file around a vocabulary, a wrong value at any place: refused, or read and usable."""
    source = tmp_path / "in"
    fast(eos_token="<turn>", pad_token="<pad>").save_pretrained(source)
    i = trained().get_vocab_size()
    put(source, generation_config={"eos_token_id": [i, i + 1], "pad_token_id": i},
        config={"model_type": "llama", "eos_token_id": i, "text_config": {"bos_token_id": 1}},
        special_tokens_map={"eos_token": {"content": "<end>"}, "additional_special_tokens": ["A"]},
        added_tokens={"<x>": 3})
    settings = json.loads((source / "tokenizer_config.json").read_text())
    put(source, tokenizer_config={**settings, "add_bos_token": True, "chat_template": [
        {"name": "default", "template": "x"}], "added_tokens_decoder": {
            str(i): {**FLAGS, "content": "<bos>", "special": True}}})
    files = {f.name: json.loads(f.read_text()) for f in source.glob("*.json")}
    document = files["tokenizer.json"]
    document["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFC"}]}
    document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": r"\d"}, "behavior": "Isolated", "invert": False},
        {"type": "Digits", "individual_digits": True}, document["pre_tokenizer"]]}
    rng = random.Random(0)
    refused = 0
    for _ in range(150):
        name = rng.choice([*files, "tokenizer.json"])
        target = put(tmp_path / "bad", **{n.removesuffix(".json"): v for n, v in files.items()})
        (target / name).write_text(json.dumps(spoiled(files[name], rng)))
        try:
            tok = T.load(target)
            tok.encode("a <bos> b é <think>12", disallowed_special=())
            tok.stop_ids, tok.token_ids()
            tok.save(tmp_path / "saved")
        except UserError as e:
            refused += 1
            assert "\n" not in str(e) and len(str(e)) < 400, e
    assert 20 < refused < 140


@pytest.mark.skipif(not Path("/dev/null").exists(), reason="needs device files")
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt",
                                  "tokenizer_config.json", "chat_template.jinja"])
def test_a_device_among_the_files_is_one_sentence(name, tmp_path):
    """So is a named pipe, of which the same is asked: reading it would wait indefinitely."""
    put(tmp_path, vocab={"a": 0})
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).symlink_to("/dev/null")
    with pytest.raises(UserError, match=f"{name} is not a plain file"):
        T.load(tmp_path)
