"""text/files.py: one reader of what users write, wherever it is read. Oracle: Python's codecs."""
import codecs
import io
import json
import sys

import pytest

from text import bpe
import sample
import tokenizer as tokenizers
from config import UserError, configure
from data import chats, loader
from text import files

TEXT = "née 🐈\r\n\tline 7 \ufeff inside\n\u2028x"
FORMS = {"utf-8": TEXT.encode(), "utf-8 with a mark": TEXT.encode("utf-8-sig"),
         "utf-16 little": codecs.BOM_UTF16_LE + TEXT.encode("utf-16-le"),
         "utf-16 big": codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"),
         "utf-32": TEXT.encode("utf-32")}


@pytest.mark.parametrize("name", FORMS)
def test_every_reader_takes_the_mark_off(tmp_path, monkeypatch, capsys, name):
    """A prompt from a file and a pipe, a text to train on, a corpus, tokenizer.py: one text."""
    path = tmp_path / "a.txt"
    path.write_bytes(FORMS[name])

    def stdin():
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(FORMS[name])))

    assert files.read(path) == files.decode(FORMS[name], path) == TEXT
    assert "".join(bpe.file_texts([path])) == TEXT
    assert "".join(loader.Reader().blocks(path)) == TEXT
    for flags in ([f"--file={path}"], [f"--start=FILE:{path}"], ["--prompt=-"]):
        stdin()
        assert sample.read_prompt(configure(sample.Config, flags)) == TEXT
    stdin()
    assert list(files.lines()) == TEXT.split("\n")
    tokenizers.train_chars([TEXT]).save(tmp_path / "t")
    tokenizers.main(configure(tokenizers.Config, ["encode", f"--file={path}",
                                                  f"--tokenizer={tmp_path / 't'}"],
                              positional=("command", "words")))
    assert len(capsys.readouterr().out.split()) == len(TEXT)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("size", [1, 2, 3, 5, 64])
def test_blocks_may_be_cut_anywhere(name, size):
    """In the mark, in a character, in a surrogate pair."""
    stream = io.BytesIO(FORMS[name])
    assert "".join(files.decoded(lambda: stream.read(size), "a")) == TEXT


def test_the_first_line_of_a_pipe_is_there_before_the_second_is_written():
    """A short line that could not begin a mark is not waited for."""
    waiting = [b"a\n", b"\xef\xbb", b"\n"]
    found = files.decoded(lambda: waiting.pop(0), "stdin")
    assert next(found) == "a\n" and len(waiting) == 2


@pytest.mark.parametrize("data, says", [
    (b"ok \xe9", r"not UTF-8 text: byte 3 is invalid; save it as UTF-8"),
    (b"\xef\xbb\xbfok \xe9", "byte 6 is invalid"),
    (codecs.BOM_UTF16_LE + b"a\x00\x00\xd8b\x00", "not UTF-16 text: byte 4 is invalid"),
    ("né".encode("utf-16-le"), "a zero byte at 1, as UTF-16 without a byte order mark"),
    (b"PAR1\x15\x00", "is a Parquet file.*read_parquet"),
    (b"ARROW1\x00\x00", "is an Arrow file"), (b"\xff\xff\xff\xff\x10", "is an Arrow stream"),
    (b"PK\x03\x04rest", "a zip archive or an .xlsx workbook"), (b"%PDF-1.7", "is a PDF"),
    (b"\x1f\x8b\x08\x00", "is gzip data"), (b"BZh91AY&SYx", "is bzip2 data"),
    (b"\x28\xb5\x2f\xfdx", "zstd"), (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "Office"),
])
def test_what_is_no_text_is_named_in_a_sentence(tmp_path, data, says):
    path = tmp_path / "a.txt"
    path.write_bytes(data)
    for read in (files.read, lambda p: list(bpe.file_texts([p])),
                 lambda p: list(loader.Reader().blocks(p))):
        with pytest.raises(UserError, match=says) as e:
            read(path)
        assert "\n" not in str(e.value) and len(str(e.value)) < 400
    with pytest.raises(UserError, match=says):
        sample.read_prompt(configure(sample.Config, [f"--file={path}"]))


def test_text_that_only_begins_like_a_format_is_text(tmp_path):
    for text in ("BZh9 is no archive", "PK", "%PD", "PAR", "GGUF", "", "\ufeff"):
        assert files.decode(text.encode(), "a") == text.removeprefix("\ufeff")


@pytest.mark.parametrize("name", [n for n in FORMS])
def test_records_of_any_encoding(tmp_path, name):
    """JSON lines and CSV as Windows saves them."""
    encoding = {"utf-8": "utf-8", "utf-8 with a mark": "utf-8-sig", "utf-16 little": "utf-16",
                "utf-16 big": "utf-16", "utf-32": "utf-32"}[name]
    record = {"prompt": "née 🐈", "completion": "ok"}
    (tmp_path / "a.jsonl").write_bytes((json.dumps(record, ensure_ascii=False) + "\r\n").encode(
        encoding))
    (tmp_path / "a.csv").write_bytes("prompt,completion\r\nnée 🐈,ok\r\n".encode(encoding))
    for file in ("a.jsonl", "a.csv"):
        (found,) = chats.read_chats(tmp_path / file)
        assert found["messages"] == [{"role": "user", "content": "née 🐈"},
                                     {"role": "assistant", "content": "ok"}]


def test_a_tokenizer_s_own_files_keep_what_they_hold(tmp_path):
    """A mark in merges.txt or a chat template is what transformers would read."""
    (tmp_path / "a").write_bytes("\ufeffa b".encode())
    assert bpe.read_text(tmp_path / "a") == "\ufeffa b"
