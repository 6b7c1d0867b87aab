"""Two processes at one thing: one works, the other waits or is refused; a kill leaves no lock."""
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from config import UserError
from data import download, loader, prepare
from formats import atomic
from test_download import BODY    # noqa: F401
from test_prepare import SCRIPT, shards_of, state    # noqa: F401
from prepare_base import Handler, Server, bpe, prep, server, words    # noqa: F401

fork = multiprocessing.get_context("fork")
assert Handler and Server


def in_a_process(call, *args):
    """Start call(*args) in a fork; the process."""
    child = fork.Process(target=call, args=args)
    child.start()
    return child


def take(path, ready):
    """Hold the lock of `path` until killed."""
    held = atomic.try_lock(Path(path))
    assert held
    Path(ready).write_text("")
    time.sleep(60)


def wait_for(path):
    while not path.exists():
        time.sleep(0.01)


# ------------------------------------------------------------------------------------ locks


@pytest.mark.parametrize("kind", ["folder", "file"])
@pytest.mark.parametrize("system", ["locks", "none on this file system"])
def test_a_lock_ends_with_its_process_however_that_ends(tmp_path, monkeypatch, kind, system):
    if system != "locks":                       # a folder on NFS: a file next to it is locked
        real = atomic.lock_handle

        def lock_handle(handle):
            if os.readlink(f"/proc/self/fd/{handle}") == str(path):
                raise OSError(atomic.errno.EBADF, "no locks here")
            return real(handle)
        monkeypatch.setattr(atomic, "lock_handle", lock_handle)
    path = tmp_path / "thing"
    path.mkdir() if kind == "folder" else path.touch()
    child = in_a_process(take, path, tmp_path / "ready")
    wait_for(tmp_path / "ready")
    assert atomic.try_lock(path) is None
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    held = atomic.try_lock(path)
    assert held
    assert atomic.try_lock(path) is None        # two of one process as well
    held.release()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ready", "thing"]


def test_a_lock_of_what_was_renamed_meanwhile_is_none(tmp_path):
    path = tmp_path / "folder"
    path.mkdir()
    held = atomic.try_lock(path)
    path.rename(tmp_path / "aside")
    assert not held.guards(path)
    path.mkdir()
    other = atomic.try_lock(path)
    assert other and not held.guards(path)


def test_hold_is_for_this_process_and_refuses_others(tmp_path):
    out = tmp_path / "new" / "out"
    atomic.hold(out, "taken")
    atomic.hold(out, "taken")                   # again, and under another name
    (tmp_path / "link").symlink_to(out)
    atomic.hold(tmp_path / "link", "taken")
    found = fork.Queue()

    def try_it():
        atomic.HELD.clear()
        try:
            atomic.hold(out, "taken by another run")
            found.put("held")
        except UserError as e:
            found.put(str(e))
    in_a_process(try_it).join()
    assert found.get() == "taken by another run"
    atomic.release(out)
    in_a_process(try_it).join()
    assert found.get() == "held"


def test_leftovers_go_unless_they_are_alive(tmp_path):
    path = tmp_path / "model"
    dead, live = atomic.beside(path), atomic.beside(path)
    dead.mkdir()
    (dead / "half").touch()
    live.mkdir()
    (tmp_path / ".other.1-2.new").touch()
    child = in_a_process(take, live, tmp_path / "ready")
    wait_for(tmp_path / "ready")
    atomic.remove_leftovers(path)
    assert live.exists() and not dead.exists() and (tmp_path / ".other.1-2.new").exists()
    child.kill()
    child.join()
    atomic.write_text(path, "whole")
    assert not live.exists() and path.read_text() == "whole"


def test_a_map_gets_its_room_beforehand(tmp_path, monkeypatch):
    path = tmp_path / "map"
    path.write_bytes(b"head")
    atomic.reserve(path, 9999)
    assert path.stat().st_size == 9999 and path.read_bytes()[:4] == b"head"

    def full(*args):
        raise OSError(atomic.errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space"):      # a sentence of config.run, and no SIGBUS
        atomic.reserve(path, 10 ** 6)
    monkeypatch.delattr(os, "posix_fallocate")
    atomic.reserve(path, 20_000)
    assert path.stat().st_size == 20_000


# ---------------------------------------------------------------------------------- prepare


def test_two_prepares_make_one_dataset(tmp_path, bpe):                              # noqa: F811
    """The second waits, and finds it done; with --force it makes the same once more."""
    source, out = tmp_path / "a.txt", tmp_path / "out"
    source.write_text(words(60_000))
    args = [sys.executable, SCRIPT, str(source), f"--tokenizer={bpe}", "--workers=1"]
    subprocess.run([*args, f"--out={tmp_path / 'alone'}"], check=True, capture_output=True)
    both = [subprocess.Popen([*args, f"--out={out}", *more], stdout=subprocess.DEVNULL,
                             stderr=subprocess.PIPE, text=True) for more in ([], ["--force"])]
    said = [child.communicate(timeout=100)[1] for child in both]
    assert [child.returncode for child in both] == [0, 0], said
    assert "Traceback" not in said[0] + said[1]
    assert shards_of(out) == shards_of(tmp_path / "alone")
    assert not [p for p in out.iterdir() if p.name.startswith(".")]


def test_the_second_finds_it_done(tmp_path, bpe, capsys):                            # noqa: F811
    """And what a kill has left is removed, also where there is nothing to do."""
    (tmp_path / "a.txt").write_text(words(400))
    args = [tmp_path / "a.txt", f"--tokenizer={bpe}", f"--out={tmp_path / 'out'}"]
    prep(*args)
    before = state(tmp_path / "out")
    left = tmp_path / "out" / ".building"
    left.mkdir()
    (left / "train_00000.npy").write_bytes(bytes(1000))
    capsys.readouterr()
    held = atomic.try_lock(tmp_path / "out")
    thread = threading.Timer(0.3, held.release)
    thread.start()
    prep(*args)
    thread.join()
    err = capsys.readouterr().err
    assert "another process prepares" in err and "up to date" in err
    assert state(tmp_path / "out") == before and not left.exists()


@pytest.mark.parametrize("size, most", [(3_000, 512), (100_000, 1_600), (400_000, 6_400)])
def test_the_default_vocabulary_suits_a_small_text(tmp_path, capsys, size, most):
    text, out = tmp_path / "notes.txt", tmp_path / "out"
    text.write_text(words(size // 5)[:size])
    prep(text, f"--out={out}")
    vocab_size = json.loads((out / "meta.json").read_text())["vocab_size"]
    assert 257 <= vocab_size <= most
    assert f"a vocabulary of {vocab_size:,} entries, not 16,384" in capsys.readouterr().err
    prep(text, f"--out={out}")                  # and is the same the next time
    assert "up to date" in capsys.readouterr().err
    with pytest.raises(UserError, match="vocab_size=16384 is more than this text can give"):
        prep(text, f"--out={out}", "--vocab_size=16384")        # what is asked for is not changed
    assert loader.Dataset(out).vocab_size == vocab_size


def test_a_folder_names_what_it_skips(tmp_path, capsys, bpe):                        # noqa: F811
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text(words(300))
    for name in ("b.pdf", "c.pdf", "d.png", ".hidden.rst"):
        (tmp_path / "in" / name).touch()
    prep(tmp_path / "in", f"--out={tmp_path / 'out'}", f"--tokenizer={bpe}")
    assert "1 files are read, 4 are not (.pdf, " in capsys.readouterr().err


# -------------------------------------------------------------------------------- downloads


def fetch_many(url, folder, found):
    try:
        found.put(download.download(url, folder).read_bytes() == BODY)
    except UserError as e:
        found.put(str(e))


def test_of_two_downloads_one_fetches(tmp_path, server):                             # noqa: F811
    """Also where the first attempt breaks off: one part, one writer."""
    server.files["/a.bin"], server.faults = BODY, ["cut"]
    found = fork.Queue()
    children = [in_a_process(fetch_many, f"{server.url}/a.bin", tmp_path, found) for _ in range(4)]
    assert [found.get(timeout=60) for _ in children] == [True] * 4
    for child in children:
        child.join()
    assert len(server.log) == 2 and len(list(tmp_path.iterdir())) == 1


def test_a_part_whose_version_is_unknown_is_fetched_anew(tmp_path, server):          # noqa: F811
    """The same size, other bytes, and a server that names no version: never joined."""
    server.etag, server.files["/a.bin"] = "", BODY
    server.faults = ["cut", 503, 503, 503]
    with pytest.raises(UserError):
        download.download(f"{server.url}/a.bin", tmp_path)
    server.files["/a.bin"] = BODY[::-1]
    assert download.download(f"{server.url}/a.bin", tmp_path).read_bytes() == BODY[::-1]


@pytest.mark.parametrize("side", [b"", b"\xff", b"[]", b'{"total": "x"}', b'{"total": 1e999}',
                                  b"[" * 9999, b'{"validator": 3, "total": 5}'])
def test_a_damaged_note_of_the_version_begins_anew(tmp_path, server, side):          # noqa: F811
    server.files["/a.bin"], server.faults = BODY, ["cut", 503, 503, 503]
    with pytest.raises(UserError):
        download.download(f"{server.url}/a.bin", tmp_path)
    next(tmp_path.glob("*.json")).write_bytes(side)
    assert download.download(f"{server.url}/a.bin", tmp_path).read_bytes() == BODY


@pytest.mark.parametrize("word", ["http://[bad", "http://", "https:///x.txt", "http://a:b/x.txt",
                                  "http://a:99999999/x.txt"])
def test_an_odd_address_is_one_sentence(tmp_path, word):
    with pytest.raises(UserError, match="is not an address"):
        prep(word, f"--out={tmp_path / 'out'}", f"--cache={tmp_path / 'cache'}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("answer", [
    b"HTTP/1.1 302 Found\r\nLocation: http://[bad\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 302 Found\r\nLocation: ://\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: \xb2\xb3\r\n\r\nabc",
    b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\nabc",
    b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 900 + b"\r\n\r\nabc",
    b"HTTP/1.1 206 Partial\r\nContent-Range: bytes \xb2-\xb2/\xb2\r\nContent-Length: 3\r\n\r\nabc",
    b"HTTP/1.1 999 \x1b[2J\r\nContent-Length: 0\r\n\r\n", b"no HTTP at all\r\n\r\n", b"",
    b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000 + b"\r\n\r\nabc",
    b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 200 + b"\r\nabc"], ids=range(11))
def test_an_odd_answer_is_one_sentence(tmp_path, server, monkeypatch, answer):       # noqa: F811
    def do_get(self):
        self.wfile.write(answer)
        self.close_connection = True
    monkeypatch.setattr(Handler, "do_GET", do_get)
    try:
        path = download.download(f"{server.url}/{'n' * 300}.txt", tmp_path)
    except UserError as e:
        assert len(str(e)) < 1000 and str(e).isprintable()
    else:
        assert path.read_bytes() in (b"abc", b"") and len(path.name) < 200


def test_a_dataset_of_odd_files_is_one_sentence(tmp_path, bpe):                      # noqa: F811
    """Folders, pipes, links to themselves and headers that lie, where shards should be."""
    (tmp_path / "a.txt").write_text(words(400))
    out = tmp_path / "out"
    prep(tmp_path / "a.txt", f"--tokenizer={bpe}", f"--out={out}")
    shard, meta = out / "train_00000.npy", out / "meta.json"
    whole = {path: path.read_bytes() for path in (shard, meta)}

    def header(text):
        return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text

    heads = [b"{'descr': '<u2', 'fortran_order': False, 'shape': (%d,), }\n" % n
             for n in (2 ** 62, 2 ** 70, -1)]
    heads += [b"{'descr': '<u2\n",
              b"{'descr': '<u2', 'fortran_order': False, 'shape': (True,), }\n",
              b"{'descr': '|O', 'fortran_order': False, 'shape': (9,), }\n", b"(" * 9000]
    changes = [*(lambda h=h: shard.write_bytes(header(h)) for h in heads), lambda: shard.mkdir(),
               lambda: shard.symlink_to(shard.name), lambda: os.mkfifo(shard),
               lambda: shard.symlink_to("/dev/zero"), lambda: shard.write_bytes(whole[shard][:-9])]
    fields = [b"Infinity", b'"x"', b"null", b"[]", b"{}", b"-1", b"1e400"]
    changes += [lambda v=v: meta.write_bytes(whole[meta].replace(b'"vocab_size": 400',
                                                                 b'"vocab_size": ' + v, 2))
                for v in fields[:5]]
    changes += [lambda: os.mkfifo(meta), lambda: meta.symlink_to("/dev/zero"), lambda: meta.mkdir(),
                lambda: meta.write_bytes(b"[" * 10 ** 5), lambda: meta.write_bytes(b"\xff"),
                lambda: meta.write_bytes(b"3")]
    for number, change in enumerate(changes):
        for path, content in whole.items():
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            path.unlink(missing_ok=True)
            path.write_bytes(content)
        target = shard if number < 12 else meta
        target.unlink()
        change()
        with pytest.raises(UserError) as e:
            dataset = loader.Dataset(out)
            dataset.tokens("train").read(0, 9)
        assert len(str(e.value)) < 800, number
    with pytest.raises(UserError, match="cannot be a folder|not prepared"):
        loader.Dataset(loader.find("a" * 300))
    assert prepare.is_complete(out, {}) is False
