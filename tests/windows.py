"""Run scripts as on Windows, as far as Linux can play it, one after the other:

    python tests/windows.py SCRIPT ARGS… [--then SCRIPT ARGS…]

What is put in place, by the documentation of CPython: modules that are missing; names of os and
signal that are missing; a folder that cannot be opened (EACCES); fsync of a descriptor that may not
write (EBADF); a file that is open cannot be replaced, renamed or deleted (EACCES), nor a folder
with an open file be renamed; rename never replaces. The caller sets an encoding of files and of
stdout that is not UTF-8 (LC_ALL=C and PYTHONIOENCODING=cp1252).
"""
import errno
import fcntl
import os
import runpy
import shutil
import signal
import sys
from pathlib import Path

MODULES = ("resource", "fcntl", "pwd", "grp", "termios", "tty", "readline", "syslog")
NAMES = ("fork", "sched_getaffinity", "getuid", "geteuid", "uname", "statvfs", "mkfifo", "setsid",
         "killpg", "getpgid", "wait4", "fchmod", "chown", "posix_spawn", "nice")
SIGNALS = {"SIGINT", "SIGTERM", "SIGABRT", "SIGFPE", "SIGILL", "SIGSEGV"}


def is_open(path: str | os.PathLike) -> bool:
    """Return whether this process has the file, or one in the folder, open or mapped."""
    own = os.path.realpath(path)
    held = [os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()]
    held += [line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text(
        encoding="utf-8").splitlines() if "/" in line]
    return any(file == own or file.startswith(own + os.sep) for file in held)


def refuse(path: str | os.PathLike) -> None:
    raise PermissionError(errno.EACCES, "The process cannot access the file", str(path))


def play(open_=os.open, fsync_=os.fsync, rename_=os.rename, replace_=os.replace, unlink_=os.unlink,
         signal_=signal.signal) -> None:
    """Put all of it in place for this process."""
    def open_file(path, *args, **kwargs):
        if isinstance(path, (str, bytes, os.PathLike)) and os.path.isdir(path):
            refuse(path)
        return open_(path, *args, **kwargs)

    def fsync(handle):
        number = handle if isinstance(handle, int) else handle.fileno()
        if fcntl.fcntl(number, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        fsync_(handle)

    def move(real, replaces):
        def moved(source, target, **kwargs):
            if not replaces and os.path.exists(target):
                raise FileExistsError(errno.EEXIST, "Cannot create a file when it exists", target)
            for path in (source, target):
                if os.path.exists(path) and is_open(path):
                    refuse(path)
            if os.path.isdir(target):
                refuse(target)
            real(source, target, **kwargs)
        return moved

    def unlink(path, **kwargs):
        if "dir_fd" not in kwargs and os.path.exists(path) and is_open(path):
            refuse(path)
        unlink_(path, **kwargs)

    def handle_signal(number, handler):
        if signal.Signals(number).name not in SIGNALS:
            raise ValueError("signal number is not supported")
        return signal_(number, handler)

    os.open, os.fsync, os.unlink, os.remove = open_file, fsync, unlink, unlink
    os.rename, os.replace = move(rename_, False), move(replace_, True)
    shutil._use_fd_functions = False            # rmtree by names, as where folders do not open
    signal.signal = handle_signal
    for name in MODULES:
        sys.modules[name] = None
    for name in NAMES:
        if hasattr(os, name):
            delattr(os, name)
    for name in [n for n in dir(signal) if n.startswith("SIG") and n[3:].isalnum()]:
        if name not in SIGNALS | {"SIG_DFL", "SIG_IGN"}:
            delattr(signal, name)


if __name__ == "__main__":
    root = Path(__file__).resolve().parent.parent
    import torch        # noqa: F401  it finds out by itself on what system it is
    import requests     # noqa: F401
    import triton       # noqa: F401
    play()
    sys.path[0] = str(root)
    words = sys.argv[1:]
    while words:
        end = words.index("--then") if "--then" in words else len(words)
        sys.argv, words = words[:end], words[end + 1:]
        try:
            runpy.run_path(str(root / sys.argv[0]), run_name="__main__")
        except SystemExit as e:
            if e.code:
                raise
