"""Whole or not at all, and one writer at a time: how every file and folder is put on the disk.

    with atomic.lock(part, "another process fetches it: waiting"): ...  # one at a time
    atomic.hold(out_dir, "another run trains there: ...")               # or refuse the second
    with atomic.build_directory(out, complete) as new: ...              # build aside, then rename
    atomic.write_text(path, text)                                       # the same for a file

A lock is the system's own on the folder or the file itself (flock): it ends with the process,
however that ends, so a kill leaves nothing that would have to be cleaned up. Where a system cannot
lock a folder (Windows, NFS) an empty .NAME.lock next to it is locked instead.
"""
from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import sys
import time
from pathlib import Path
from typing import Callable, Iterator

try:
    import fcntl
except ImportError:                         # Windows
    fcntl = None
try:
    import msvcrt
except ImportError:                         # everywhere else
    msvcrt = None

from config import UserError

POLL = 0.1                                  # seconds between two looks at a lock that is taken
TAKEN = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES, errno.EDEADLK)
# a file system that has no locks for what was asked for: a folder on NFS, anything on some FUSE
NO_LOCKS = (errno.EBADF, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EISDIR)


# --- locks -------------------------------------------------------------------------------------
class Lock:
    """A lock that is held; release() gives it back, and so does the end of the process."""

    def __init__(self, handle: int, path: Path, file: Path | None):
        self.handle = handle
        self.path = path
        self.file = file

    def guards(self, path: Path) -> bool:
        """Return whether `path` is still what was locked: it may have been renamed or removed
        since."""
        if self.file is not None:           # the lock of a name, not of what has the name
            return True
        with contextlib.suppress(OSError):
            return os.path.samestat(os.fstat(self.handle), os.stat(path))
        return False

    def release(self) -> None:
        if self.handle >= 0:
            if self.file is not None:       # before it is unlocked, or a newer one would go
                with contextlib.suppress(OSError):
                    self.file.unlink()
            os.close(self.handle)
            self.handle = -1


def lock_handle(handle: int) -> bool:
    """Lock an open file or folder; False where another process has it. OSError: no locks here."""
    try:
        if fcntl:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        elif msvcrt:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        return True
    except OSError as e:
        if e.errno in TAKEN:
            return False
        raise


def try_lock(path: Path) -> Lock | None:
    """Lock an existing folder, or a file that is made if need be; None where another has it."""
    file = None
    handle = -1
    if fcntl:
        flags = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT
        try:
            handle = os.open(path, flags, 0o666)
            taken = not lock_handle(handle)
        except FileNotFoundError:           # a folder that was removed meanwhile
            return None
        except OSError:                     # a folder that cannot be opened, or locked
            if handle >= 0:
                os.close(handle)
            handle = -1
    if handle < 0:
        file = path.with_name(f".{path.name}.lock")
        handle = -1
        try:
            handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
            taken = not lock_handle(handle)
        except OSError:                     # read-only, or without any locks: go on without one
            taken = False
    if taken:
        os.close(handle)
        return None
    lock = Lock(handle, path, file)
    if not lock.guards(path):               # renamed or removed between opening and locking
        lock.release()
        return None
    return lock


@contextlib.contextmanager
def lock(path: Path, waiting: str, *, folder: bool = False, done: Path | None = None
         ) -> Iterator[Lock | None]:
    """Hold the lock of `path` inside the block, after a wait if need be; `waiting` is then said.

    folder: make `path` a folder, as often as another process removes it. done: None is yielded,
    instead of a lock, as soon as this file is there: another process made it.
    """
    held = None
    while done is None or not done.is_file():
        if folder:
            path.mkdir(parents=True, exist_ok=True)
        held = try_lock(path)
        if held:
            break
        if waiting:
            print(f"note: {waiting}", file=sys.stderr, flush=True)
            waiting = ""
        time.sleep(POLL)
    try:
        yield held
    finally:
        if held:
            held.release()


HELD: dict[str, Lock] = {}                  # by the path as it was given, absolute


def hold(folder: str | Path, refusal: str) -> None:
    """Make `folder` and keep its lock until release(); UserError(refusal) if another has it."""
    path = Path(os.path.realpath(folder))
    path.mkdir(parents=True, exist_ok=True)
    held = HELD.get(str(path))
    if held and held.guards(path):
        return
    new = try_lock(path)
    if new is None:
        raise UserError(refusal)
    if held:
        held.release()
    HELD[str(path)] = new


def release(folder: str | Path) -> None:
    """Give back what hold() took; nothing happens if it took nothing."""
    held = HELD.pop(os.path.realpath(folder), None)
    if held:
        held.release()


# --- names of what is not finished -------------------------------------------------------------
def beside(path: Path, kind: str = "new") -> Path:
    """Return a name next to `path` that no other process uses: .NAME.PID-TIME.kind."""
    return path.with_name(f".{path.name}.{os.getpid()}-{time.monotonic_ns():x}.{kind}")


def remove(path: Path) -> None:
    """Remove a file or a folder, whatever is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def remove_leftovers(path: Path, kind: str = "new") -> None:
    """Remove what beside() named for processes that were killed; not what a live one writes."""
    ours = re.compile(rf"\.{re.escape(path.name)}\.\d+-[0-9a-f]+\.{kind}")
    with contextlib.suppress(OSError):
        for found in path.parent.iterdir():
            if not ours.fullmatch(found.name):
                continue
            with contextlib.suppress(OSError):
                lock = try_lock(found)      # the one that writes it holds its lock
                if lock:
                    remove(found)
                    lock.release()


def write_text(path: Path, text: str, aside: Path | None = None) -> None:
    """Replace the file `path` by `text` (UTF-8), or leave it as it was; synced before its name.

    aside: a name to write under, of a caller who is alone in the folder; else it is unique.
    """
    new = aside or beside(path)
    remove_leftovers(path)
    try:
        with open(new, "w", encoding="utf-8", newline="\n") as f:
            with contextlib.suppress(OSError):          # or the next process takes it for dead
                lock_handle(f.fileno())
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        os.replace(new, path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def reserve(path: Path, size: int) -> None:
    """Have the disk keep `size` bytes for `path`, for a memory map to write into.

    A map of a sparse file whose disk is full ends the process (SIGBUS); this is an OSError.
    """
    with open(path, "r+b") as f:
        if hasattr(os, "posix_fallocate"):
            try:
                return os.posix_fallocate(f.fileno(), 0, size)
            except OSError as e:
                if e.errno not in NO_LOCKS:     # a file system that cannot: zeros, then
                    raise
        f.seek(0, os.SEEK_END)
        left = size - f.tell()
        while left > 0:
            left -= f.write(bytes(min(left, 1 << 24)))


# --- a folder, whole or not at all -------------------------------------------------------------
SHARD = re.compile(r"(train|val)_\d{5}\.npy")


@contextlib.contextmanager
def build_directory(out: Path, complete: Callable[[], bool]) -> Iterator[Path | None]:
    """Yield a hidden folder inside `out` to build in; what it holds is moved up at the end.

    None where complete() says that `out` has all of it, perhaps made by a process that this one
    had to wait for. An error removes the hidden folder, a kill leaves it to the next run, and a
    finished dataset stays as it is in both cases. What else is in `out` (nanoGPT's input.txt, say)
    is not touched.
    """
    folder = out / ".building"          # inside: `out` may be a link or a disk of its own
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock(out, f"another process prepares {out}: waiting for it",
                                     folder=True))
            remove(folder)
            ready = complete()
            if not ready:
                folder.mkdir()
        except OSError as e:
            raise UserError(f"cannot write to {out}: {e.strerror}; choose another --out") from None
        if ready:
            yield None
            return
        try:
            yield folder
            move_up(folder, out)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            with contextlib.suppress(OSError):          # only an empty folder goes
                out.rmdir()


def move_up(folder: Path, out: Path) -> None:
    """Replace the dataset in `out` by the one in `folder`."""
    new = sorted(path.name for path in folder.iterdir())
    for name in new:                    # content before names, or a power cut leaves empty files
        with open(folder / name, "r+b") as f:
            os.fsync(f.fileno())
    # meta.json says that a dataset is complete: it goes first and comes last
    (out / "meta.json").unlink(missing_ok=True)
    for old in out.iterdir():           # shards of a longer predecessor
        if SHARD.fullmatch(old.name) and old.name not in new:
            old.unlink()
    for name in sorted(new, key="meta.json".__eq__):
        os.replace(folder / name, out / name)


def write_json(path: Path, value: dict) -> None:
    """Write an object as indented JSON in UTF-8."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def sync(path: Path) -> None:
    """Flush a file or a directory to the disk (fsync)."""
    # Windows opens no directory and syncs no read-only file; some file systems sync no directory
    lenient = path.is_dir() or path.exists() and not os.access(path, os.W_OK)
    handle = None
    try:
        handle = os.open(path, os.O_RDONLY if lenient else os.O_RDWR)
        os.fsync(handle)
    except OSError:
        if not lenient:
            raise
    finally:
        if handle is not None:
            os.close(handle)


def name_aside(path: Path) -> Path:
    """Return where the previous directory is while the new one takes its name."""
    return path.with_name(f".{path.name}.old")
