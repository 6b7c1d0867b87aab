"""Read what a user wrote as text: one decoder for prompts, corpora, records and standard input.

    from text import files
    prompt = files.read("prompt.txt")                   # "-" is standard input
    for block in files.stream("corpus.txt"): ...        # at constant memory

Editors on Windows save UTF-8 with a byte order mark, or UTF-16: the mark says which encoding it
is and is no part of the text. Without a mark a file is UTF-8. Anything else ends in one sentence
that names what the file is: a Parquet file that is decoded as text trains on noise.
"""
from __future__ import annotations

import codecs
import os
import re
import sys
from typing import Any, BinaryIO, Callable, Iterator

from config import UserError

BLOCK = 1 << 20                         # bytes read at once
PIECE = 1 << 10                         # bytes decoded at once where some are invalid
CONTAINERS = 1 << 18                    # lists and objects of a record: "[]" costs 64 bytes
# Byte order marks (Unicode 16, section 23.8). UTF-32's begins with UTF-16's: longest first.
MARKS: tuple[tuple[bytes, str, Callable], ...] = (
    (codecs.BOM_UTF32_LE, "UTF-32", codecs.utf_32_le_decode),
    (codecs.BOM_UTF32_BE, "UTF-32", codecs.utf_32_be_decode),
    (codecs.BOM_UTF8, "UTF-8", codecs.utf_8_decode),
    (codecs.BOM_UTF16_LE, "UTF-16", codecs.utf_16_le_decode),
    (codecs.BOM_UTF16_BE, "UTF-16", codecs.utf_16_be_decode),
)
_PANDAS = ("convert it to JSON lines first, python -c \"import pandas; "
           "pandas.{read}({path!r}).to_json('data.jsonl', orient='records', lines=True)\"")
_UNPACK = "unpack it first"
# The first bytes of formats that data are published in -> what it is, and what to do
BINARY: tuple[tuple[bytes, str, str], ...] = (
    (b"PAR1", "a Parquet file", _PANDAS.replace("{read}", "read_parquet")),
    (b"ARROW1", "an Arrow file", _PANDAS.replace("{read}", "read_feather")),
    (b"\xff\xff\xff\xff", "an Arrow stream", "convert it to JSON lines first, "
     "datasets.Dataset.from_file({path!r}).to_json('data.jsonl')"),
    (b"ORC\x0a", "an ORC file", _PANDAS.replace("{read}", "read_orc")),
    (b"PK\x03\x04", "a zip archive or an .xlsx workbook",
     "unpack it, or save the sheet as CSV (UTF-8)"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office document", "save it as text or CSV"),
    (b"%PDF-", "a PDF", "extract its text first"),
    (b"{\\rtf", "rich text", "save it as plain text"),
    (b"\x1f\x8b\x08", "gzip data", "unpack it first, or name it NAME.gz where .gz is read"),
    (b"\x28\xb5\x2f\xfd", "zstd data", _UNPACK),
    (b"\xfd7zXZ\x00", "xz data", _UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (b"SQLite format 3\x00", "an SQLite database", "export the table as CSV"),
    (b"\x93NUMPY", "a NumPy array", "give the text it was made from"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file", "export its text first"),
    (b"\x89PNG\r\n\x1a\n", "a PNG image", "give a file of text"),
    (b"\xff\xd8\xff", "a JPEG image", "give a file of text"),
)
_BZIP = re.compile(rb"BZh[1-9]1AY&SY")  # "BZh" alone could begin a text
ENDS = {".parquet": BINARY[0], ".arrow": BINARY[2], ".feather": BINARY[1], ".xlsx": BINARY[4],
        ".xls": BINARY[5], ".pdf": BINARY[6], ".docx": (b"", "a Word document", "save it as text")}


def refuse_binary(start: bytes, path: Any) -> None:
    """Refuse the first bytes of a file in a format that is not text."""
    kind = next((row for row in BINARY if start.startswith(row[0])), None)
    if _BZIP.match(start):
        kind = (b"", "bzip2 data", _UNPACK)
    kind = kind or ENDS.get(os.path.splitext(str(path).lower())[1])
    if kind:
        raise UserError(f"{path} is {kind[1]}, not text: {kind[2].format(path=str(path))}")


class Decoder:
    """Bytes -> text, block by block; b"" ends it. The first bytes say which encoding it is.

    fault(sentence) is told of invalid bytes, which are left out where it returns.
    """

    def __init__(self, path: Any, fault: Callable[[str], None] | None = None):
        self.path = path
        self.fault = fault or self.refuse
        self.name = ""
        self.decode = codecs.utf_8_decode
        self.rest = b""                     # bytes not yet decoded, and how many came before them
        self.offset = 0

    @staticmethod
    def refuse(sentence: str) -> None:
        raise UserError(sentence)

    def begin(self, start: bytes) -> None:
        """Take the byte order mark off the first bytes, and refuse what is no text."""
        mark, self.name, self.decode = next(
            (row for row in MARKS if start.startswith(row[0])), (b"", "UTF-8", self.decode))
        self.rest, self.offset = start[len(mark):], len(mark)
        if mark:
            return
        refuse_binary(start, self.path)
        if (at := start.find(b"\0", 0, PIECE)) >= 0:
            self.fault(f"{self.path} has a zero byte at {at:,}, as UTF-16 without a byte order "
                       "mark or a binary file has: save it as UTF-8")

    def __call__(self, block: bytes) -> str:
        data = self.rest + block
        if not self.name:
            if block and len(data) < 4 and any(row[0].startswith(data) for row in MARKS):
                self.rest = data            # a mark of which only the beginning is here
                return ""
            self.begin(data)
            data = self.rest
        out = []
        at = 0
        size = len(data)
        complete = False
        while not complete:
            part = data[at:at + size]
            last = at + size >= len(data)
            try:
                # a character may straddle two blocks: its first bytes wait in `rest`
                text, used = self.decode(part, "strict", last and not block)
                complete = last
            except UnicodeDecodeError as e:
                if size > PIECE:            # so that a thousand faults are not a thousand copies
                    size = PIECE
                    continue
                self.fault(f"{self.path} is not {self.name} text: byte "
                           f"{self.offset + at + e.start:,} is invalid; save it as UTF-8")
                text = self.decode(part[:e.start], "strict", True)[0]
                used = e.end
            out.append(text)
            at += used
        self.rest = data[at:]
        self.offset = self.offset + at
        return "".join(out)


def decode(data: bytes, path: Any) -> str:
    """Return a whole text from its bytes; path names it in a complaint."""
    decoder = Decoder(path)
    return decoder(data) + decoder(b"")


def decoded(read: Callable[[], bytes], path: Any) -> Iterator[str]:
    """Yield the text of what read() gives, block by block, as soon as it is there; b"" ends it."""
    decoder = Decoder(path)
    while block := read():
        if text := decoder(block):
            yield text
    if text := decoder(b""):
        yield text


def stream(path: str | os.PathLike, size: int = BLOCK) -> Iterator[str]:
    """Yield a file's text in blocks of about `size` characters; "-" is standard input."""
    try:
        # closefd: standard input is not ours to close
        with open(0 if path == "-" else path, "rb", closefd=path != "-") as file:
            yield from decoded(lambda: file.read(size), "stdin" if path == "-" else path)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise UserError(f"there is no file {path}") from None


def read(path: str | os.PathLike) -> str:
    """Return a whole file; "-" is standard input."""
    return "".join(stream(path))


def lines(file: BinaryIO | None = None) -> Iterator[str]:
    """Yield the lines of a pipe, each as soon as it is complete; None: standard input."""
    file = sys.stdin.buffer if file is None else file
    rest = ""
    for text in decoded(lambda: file.read1(BLOCK), "stdin"):
        *whole, rest = (rest + text).split("\n")
        yield from whole
    if rest:
        yield rest


def count_containers(text: str) -> int:
    """Count the lists and objects that a JSON text opens, a cut one too; brackets in strings are
    text. Every other part between quotes is outside, once escaped quotes are gone."""
    count = text.count("[") + text.count("{")
    if count > CONTAINERS:                  # rare: then it pays to look where they stand
        parts = text.replace("\\\\", "").replace('\\"', "").split('"')[::2]
        count = sum(part.count("[") + part.count("{") for part in parts)
    return count


def split_lines(text: str) -> list[str]:
    """Return the lines of a text without their ends, those with nothing in them left out.

    Only \\n and \\r\\n end a line: str.splitlines() also cuts at U+2028, form feeds and others,
    which stand within a line wherever text is kept one record per line.
    """
    return [line for line in text.replace("\r\n", "\n").split("\n") if line]
