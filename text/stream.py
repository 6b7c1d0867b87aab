"""Text that grows: whole characters only, of tokens that may be parts of one."""
from __future__ import annotations

import codecs
from typing import Any, Iterable

from config import refuse_to_run


class Stream:
    """Ids in, whole characters out: an "é" that is two tokens comes out at the second."""

    def __init__(self, tokenizer: Any, after: Iterable[int] = ()):
        self.tokenizer = tokenizer
        goes_on = bool(tokenizer._bytes(after))
        self.spaces = tokenizer.spm.strip if tokenizer.spm and not goes_on else 0   # to be dropped
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def put(self, i: int) -> str:
        """Return the text that id `i` completes; "" within a character."""
        raw, self.spaces = unpad(self.tokenizer._bytes([i]), self.spaces)
        return self.decoder.decode(raw)

    def flush(self) -> str:
        """Return what is left at the end: "", or U+FFFD for a character cut short."""
        return self.decoder.decode(b"", final=True)


def unpad(raw: bytes, spaces: int) -> tuple[bytes, int]:
    """Return the bytes without up to `spaces` leading spaces, and how many the next may still lose.
    """
    rest = raw[:spaces].lstrip(b" ") + raw[spaces:]
    return rest, 0 if rest else spaces - len(raw)


if __name__ == "__main__":
    refuse_to_run()
