"""Damaged files of every kind: the right value or one sentence, never another value or exception.

A short form of `make stress`, with fixed seeds. formats_read.py has a sound file of each kind, our
reader and the library's; mutations.py damages them.
"""
import gzip
import json
import random
import shutil

import pytest
import torch

import checkpoint
import formats_read
import mutations
import tokenizer
from config import UserError
from data import loader, public
from text import tokenizer_model

MUTATIONS = 60                          # of each kind of file; 2,000 in `make stress`


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Kinds of files by the name of what makes them, each made once."""
    found = {}

    def make(name):
        if name not in found:
            found[name] = getattr(formats_read, f"make_{name}")(tmp_path_factory.mktemp(name))
        return found[name]
    return make


@pytest.mark.parametrize("name", ["weights", "tokenizers", "data", "configs"])
def test_damaged_bytes_are_never_read_as_another_value(made, name):
    for kind in made(name):
        rng = random.Random(kind.name)
        told = [mutations.judge(kind, mutations.damage(rng, kind)) for _ in range(MUTATIONS)]
        assert "refused" in told or kind.name == "log.jsonl", kind.name


@pytest.mark.parametrize("name", ["weights", "tokenizers", "data", "configs"])
def test_json_values_of_another_type_are_refused_or_read_as_the_library_does(made, name):
    """Every place of every JSON file, replaced by null, true, -1, 1e400, "x", [] and {} in turn."""
    kinds = [kind for kind in made(name) if kind.file.suffix == ".json"]
    for kind in kinds:
        if name == "configs" and not any(family in kind.name for family in ("qwen3", "gemma3")):
            continue                                    # the others are for `make stress`
        for path, value, text in mutations.wrong_values(json.loads(kind.sound)):
            try:
                mutations.judge(kind, text.encode())
            except AssertionError as e:
                raise AssertionError(f"{path} = {value!r}: {e}") from None


@pytest.mark.parametrize("layout", formats_read.RECORDS)
def test_values_of_another_type_in_a_chat_line(layout, tmp_path):
    """The record is refused in a sentence, or all that is read from it has its proper type."""
    file = tmp_path / "r.jsonl"
    for record in formats_read.RECORDS[layout]:
        for path, value, text in mutations.wrong_values(record):
            file.write_text(text.replace("\n", " ") + "\n")
            try:
                formats_read.read_layout(layout, file)
            except UserError as e:
                assert len(str(e)) <= mutations.LONGEST and "line 1" in str(e), (path, value)


def test_values_of_another_type_in_a_log_line(made):
    kind = next(kind for kind in made("data") if kind.name == "log.jsonl")
    *lines, _ = kind.sound.decode().split("\n")
    for path, value, text in mutations.wrong_values(json.loads(lines[1])):
        changed = [lines[0], text.replace("\n", " "), *lines[2:], ""]
        mutations.judge(kind, "\n".join(changed).encode())


# --- what was found that way, each by itself -----------------------------------------------------

def test_a_changed_byte_of_a_trainer_state_is_damage(tmp_path):
    """The tensors of a torch.save file have checksums, which torch.load does not compare."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").touch()
    torch.save({"optimizer": {"a": torch.arange(999.0)}}, folder / "trainer.pt")
    data = bytearray((folder / "trainer.pt").read_bytes())
    at = data.index(torch.arange(999.0).numpy().tobytes())
    data[at + 400] ^= 1
    (folder / "trainer.pt").write_bytes(data)
    assert torch.load(folder / "trainer.pt")["optimizer"]["a"].ne(torch.arange(999.0)).sum() == 1
    with pytest.raises(UserError, match="trainer.pt is damaged"):
        checkpoint.load_trainer(folder)


def test_a_gzip_archive_is_read_to_its_checksum(made):
    """An archive ends before the gzip data does, whose checksum is in the last eight bytes."""
    kind = next(kind for kind in made("data") if kind.name == "tar.gz archive")
    data = bytearray(kind.sound)
    data[-8] ^= 1
    assert mutations.judge(kind, bytes(data)) == "refused"
    with pytest.raises(gzip.BadGzipFile, match="CRC"):
        gzip.decompress(data)


def test_a_key_of_tokenizer_json_that_is_misspelt(tmp_path):
    formats_read.train_tokenizer().save(tmp_path)
    document = json.loads((tmp_path / "tokenizer.json").read_text())
    document["added_token"] = document.pop("added_tokens")
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match="unknown key 'added_token', expected added_tokens"):
        tokenizer.load(tmp_path)
    with pytest.raises(Exception):
        formats_read.encode_library(tmp_path / "tokenizer.json")


def write_field(number, data):
    """A field of bytes of a protobuf message."""
    size = len(data)
    head = bytearray([number << 3 | 2])
    while size > 127:
        head.append(size & 127 | 128)
        size >>= 7
    return bytes(head) + bytes([size]) + data


def test_a_byte_piece_that_spells_no_byte(made):
    """The library says that the piece is invalid; it would be taken for letters."""
    kind = next(kind for kind in made("tokenizers") if kind.name == "tokenizer.model")
    data = kind.sound.replace(b"<0x5F>", b"<0xZF>", 1)
    assert data != kind.sound and mutations.judge(kind, data) == "refused"


def test_a_long_unused_piece_takes_no_time():
    piece = write_field(1, b"a" * 400_000) + b"\x18\x05"       # type 5: unused
    unknown = write_field(1, b"<unk>") + b"\x18\x02"
    data = write_field(1, unknown) + write_field(1, piece) + write_field(2, b"\x18\x02")
    with mutations.time_limit(5):
        found = tokenizer_model.from_sentencepiece(data, [], {})
    assert len(found["spm"].vocab) == 2


def test_the_shards_of_a_dataset_are_all_of_its_tokens(made, tmp_path):
    kind = next(kind for kind in made("data") if kind.name == "meta.json")
    shutil.copytree(kind.file.parent, tmp_path / "d")
    meta = json.loads(kind.sound)
    for changes in ({"eot": True}, {"eot": meta["vocab_size"]}, {"vocab_size": 270.0},
                    {"splits": {**meta["splits"], "val": {**meta["splits"]["val"], "shards": []}}}):
        (tmp_path / "d" / "meta.json").write_text(json.dumps({**meta, **changes}))
        with pytest.raises(UserError, match="meta.json lacks or garbles"):
            loader.Dataset(tmp_path / "d")
    for changes in ({"vocab_size": meta["vocab_size"] + 1}, {"eot": 0}):
        (tmp_path / "d" / "meta.json").write_text(json.dumps({**meta, **changes}))
        with pytest.raises(UserError, match="meta.json says .*, its tokenizer"):
            loader.Dataset(tmp_path / "d").check_tokenizer(tokenizer.load(tmp_path / "d"))


@pytest.mark.parametrize("text, problem", [
    ('[{"a": 1}, [], {"a": 2}]', "an empty array"), ('{"a": 1}\n]\n{"a": 2}', "line 2: ]"),
    ('[[[]], {"a": 1}]', "an empty array")])
def test_brackets_that_hold_no_record_are_told(text, problem, tmp_path):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(UserError, match=problem):
        list(loader.Reader().records(tmp_path / "r.json"))
    reader = loader.Reader(skip_bad=True)
    assert {r["a"] for _, r in reader.records(tmp_path / "r.json")} <= {1, 2} and reader.bad == 1


def test_a_best_checkpoint_that_is_gone_is_said(tmp_path, capsys):
    (tmp_path / "step_000004").mkdir()
    (tmp_path / "step_000004" / "config.json").touch()
    (tmp_path / "checkpoints.json").write_text('{"last": "step_000004", "best": "step_000002"}')
    assert checkpoint.resolve(tmp_path, "best").name == "step_000004"
    assert "step_000002, which checkpoints.json names, is gone" in capsys.readouterr().err


def test_a_zip_whose_directory_lies_before_the_file_is_a_sentence(made):
    kind = next(kind for kind in made("data") if kind.name == "zip archive")
    end = kind.sound.rindex(b"PK\x05\x06")
    place = int.from_bytes(kind.sound[end + 16:end + 20], "little")
    # the directory is said to begin later than it does: then the files begin before the first byte
    data = kind.sound[:end + 16] + (place + 60).to_bytes(4, "little") + kind.sound[end + 20:]
    (kind.file.parent / "shifted.zip").write_bytes(data)
    with pytest.raises(public.BROKEN):
        list(public.sms(kind.file.parent / "shifted.zip", loader.Reader()))
