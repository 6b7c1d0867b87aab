"""One file from the network, whole and of one version: download(url, folder) -> its path.

The bytes gather in NAME.part, which is locked: of two processes that want a file, one fetches it
and the other waits. A kill leaves the part, and the next run asks for the rest of it, provided
that the server still has the version of which it is the beginning. Only a complete file, of the
size that was announced and the hash that is wanted, gets its name.
"""
from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from config import UserError, refuse_to_run

import requests

from data import shards
from formats import atomic

HUB = "https://huggingface.co/datasets"
PATIENCE = (1, 2, 4)                    # seconds to wait after each failure but the last
LARGEST = 1 << 40                       # bytes of a file, where the server does not say how many
NAME_LENGTH = 80                        # of a file in the cache, without its hash and .part


def note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr, flush=True)


class Progress:
    """`encoding 42% of 12.1 MB, 8.9 MB/s, 1 s left` on stderr: a live line, or few in a log."""

    def __init__(self, what: str, total: int, unit: str = "MB"):
        self.what, self.total, self.unit = what, max(total, 1) / 1e6, unit
        self.live, self.start = sys.stderr.isatty(), time.monotonic()
        self.next = self.start + (0 if self.live else 5)        # when to print (again)

    def __call__(self, done: int, last: bool = False) -> None:
        now = time.monotonic()
        done = max(done, 1) / 1e6
        if now < self.next and not last:
            return
        self.next, seconds = now + (0.2 if self.live else 10), max(now - self.start, 1e-3)
        end = f"in {seconds:.1f} s" if last else \
            f"{max(0.0, self.total / done - 1) * seconds:,.0f} s left"
        line = f"{self.what} {min(100.0, 100 * done / self.total):.0f}% of {self.total:,.1f} " \
               f"{self.unit}, {done / seconds:,.1f} {self.unit}/s, {end}"
        # \r and \x1b[K write the live line over itself
        print(f"\r{line}\x1b[K" if self.live else line, file=sys.stderr, flush=True,
              end="\n" if last or not self.live else "")


def download(url: str, folder: Path) -> Path:
    """Fetch `url` into `folder`, once, going on where an earlier run stopped; return its path.

    UserError: no network, an answer such as 404, another hash than the URL's #sha256=.
    """
    url, _, want = url.partition("#sha256=")
    try:
        address = urlsplit(url)
        host = address.hostname
    except ValueError as e:
        raise UserError(f"{url} is not an address that can be fetched ({e})") from None
    # The server's name for a file must not choose where it lands: letters, digits, dots, dashes.
    base = re.sub(r"[^\w.-]+", "_", address.path.rsplit("/", 1)[-1]).lstrip(".") or "text"
    target = folder / (f"{hashlib.sha256(url.encode('utf-8', 'replace')).hexdigest()[:8]}-"
                       f"{base.encode()[-NAME_LENGTH:].decode('utf-8', 'ignore')}")
    if target.is_file():
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"cannot write to {folder}: {e.strerror}; choose another --cache") from None
    part = target.with_name(target.name + ".part")
    waiting = f"another process fetches {base[-NAME_LENGTH:]}: waiting for it"
    with atomic.lock(part, waiting, done=target) as held:
        if held is None:                    # the other one has fetched it meanwhile
            return target
        try:
            if not target.is_file():
                complete(url, part, host, trusted=bool(want))
                if want and shards.hash_file(part) != want:
                    remove_part(part)
                    raise UserError(f"{url} is not the file it should be: its sha256 is not {want}")
                with open(part, "r+b") as f:
                    os.fsync(f.fileno())
                os.replace(part, target)
                part.with_suffix(".json").unlink(missing_ok=True)
        finally:
            with contextlib.suppress(OSError):          # only a beginning is kept
                if not part.stat().st_size:
                    part.unlink()
    return target


def complete(url: str, part: Path, host: str | None, trusted: bool) -> None:
    """Fetch the rest of `part`, with patience; UserError where all attempts fail."""
    for wait in (*PATIENCE, None):
        try:
            problem = fetch(url, part, trusted)
        # ValueError: an address, or one that the server sends us on to, that is none
        except (requests.RequestException, ValueError) as e:
            problem = f"the connection to {host} failed ({type(e).__name__})"
        if not problem:
            return
        if wait is None:
            raise UserError(f"{url} cannot be fetched: {problem}. Is there a network? The same "
                            "command goes on from what has arrived; --file or --mirror take a copy")
        note(f"{part.stem}: {problem}; trying again in {wait} s")
        time.sleep(wait)


def remove_part(part: Path) -> None:
    """Begin anew: empty the part (its name stays, it is locked) and forget its version."""
    part.write_bytes(b"")
    part.with_suffix(".json").unlink(missing_ok=True)


def read_version(side: Path) -> dict[str, Any]:
    """The validator and the size of the file of which there is a part; none if that is unknown."""
    known = {"validator": "", "total": 0}
    with contextlib.suppress(OSError, ValueError, RecursionError):
        value = json.loads(side.read_text(encoding="utf-8"))
        if isinstance(value, dict) and type(value.get("total")) is int \
                and isinstance(value.get("validator"), str):
            known.update(validator=value["validator"], total=value["total"])
    return known


def validator_of(headers: Any) -> str:
    """What names one version of a file (RFC 9110 13.1.5): a strong ETag, or its date."""
    etag = headers.get("ETag", "W/")
    # a weak ETag (W/) does not promise the same bytes
    return headers.get("Last-Modified", "") if etag.startswith("W/") else etag


def fetch(url: str, part: Path, trusted: bool = False) -> str:
    """One attempt to complete `part`; returns what went wrong, or "" when all of it is there.

    A .json beside it holds the file's ETag or date, and size: two versions are never joined. Where
    the server names no version it begins anew, unless a hash will tell at the end (`trusted`).
    """
    side = part.with_suffix(".json")
    known = read_version(side)
    have = part.stat().st_size if part.is_file() else 0
    if have and not (known["total"] and (known["validator"] or trusted)) \
            or have > known["total"] > 0:
        remove_part(part)
        have = 0
    if have and have == known["total"]:     # killed between the last byte and the rename
        return ""
    # identity: what is counted and resumed must be the file's own bytes, not gzip's
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if known["validator"]:              # a file that changed is then sent whole, with a 200
            headers["If-Range"] = known["validator"]
    with requests.get(url, headers=headers, stream=True, timeout=(10, 60)) as r:
        if r.status_code == 429 or r.status_code >= 500:
            return f"the server answers {r.status_code} {r.reason}"
        size = r.headers.get("Content-Length", "")
        validator = validator_of(r.headers)
        total = int(size) if re.fullmatch("[0-9]{1,18}", size) else 0
        if r.status_code in (206, 416):     # a part, or "you have more than there is"
            span = re.fullmatch("bytes ([0-9]{1,18})-[0-9]{1,18}/([0-9]{1,18})",
                                r.headers.get("Content-Range", ""))
            start, total = (int(span[1]), int(span[2])) if span else (-1, 0)
            other = validator not in ("", known["validator"])
            if other or (start, total) != (have, known["total"]):
                remove_part(part)
                return "the server holds another version of the file now"
        elif r.status_code == 200:          # all of it: the first attempt, or Range is ignored
            have = 0
        else:
            raise UserError(f"{url} cannot be fetched: the server answers {r.status_code} "
                            f"{r.reason}; is the address right?")
        if not have:                        # before the side file: a kill here must not join two
            part.write_bytes(b"")
        side.write_text(json.dumps({"validator": validator or known["validator"] * bool(have),
                                    "total": total}), encoding="utf-8")
        show = Progress(f"fetching {part.stem}", total)
        with open(part, "ab") as f:
            for block in r.iter_content(1 << 16):       # a block that breaks off is lost: small
                have += f.write(block)
                show(have)
                if have > (total or LARGEST):           # more than was announced, or without end
                    break
        show(have, last=True)
    if not total and have > LARGEST:
        remove_part(part)
        raise UserError(f"{url} cannot be fetched: the server sent more than {LARGEST:,} bytes and "
                        "no end; give a copy with --file")
    return f"{have:,} of {total:,} bytes arrived" if total and have != total else ""


if __name__ == "__main__":
    refuse_to_run()
