"""Downloads, and datasets with a name, from a mirror.
"""
import contextlib
import hashlib
import http.server
import random
import threading

import pytest

import tokenizer as tokenizers
from config import UserError
from data import download, prepare
from prepare_base import bpe, documents, prep, server, shard, words     # noqa: F401


BODY = random.Random(0).randbytes(300_000)
SHA = hashlib.sha256(BODY).hexdigest()


def test_a_download_is_whole_and_happens_once(tmp_path, server):
    server.files["/a.txt"] = BODY
    for _ in range(2):
        path = prepare.download(f"{server.url}/a.txt#sha256={SHA}", tmp_path / "cache")
        assert path.read_bytes() == BODY and path.name.endswith("-a.txt")
    assert len(server.log) == 1
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [path.name]


@pytest.mark.parametrize("faults", [["cut"], [503, "cut", 500, None], ["cut", "cut", "cut"], [429]])
def test_a_broken_download_goes_on_where_it_stopped(tmp_path, server, faults):
    server.files["/a.bin"] = BODY
    server.faults = list(faults)
    assert prepare.download(f"{server.url}/a.bin#sha256={SHA}", tmp_path).read_bytes() == BODY
    asked = [int(r[6:-1]) for _, r in server.log if r]
    assert asked == sorted(asked) and len(asked) >= faults.count("cut")
    assert all(a > 0 for a in asked)            # nothing was fetched twice


def test_a_later_run_goes_on_where_a_killed_one_stopped(tmp_path, server):
    server.files["/a.bin"] = BODY
    server.faults = ["cut"] + [503] * 3
    with pytest.raises(UserError, match="goes on from what has arrived"):
        prepare.download(f"{server.url}/a.bin", tmp_path)
    assert not [p for p in tmp_path.iterdir() if p.name.endswith("-a.bin")]
    assert prepare.download(f"{server.url}/a.bin", tmp_path).read_bytes() == BODY
    assert server.log[-1] == ("/a.bin", "bytes=131072-")        # whole blocks of 64 kB


def test_a_server_that_ignores_range_starts_again_cleanly(tmp_path, server):
    server.files["/a.bin"], server.ranges = BODY, False
    server.faults = ["cut"]
    assert prepare.download(f"{server.url}/a.bin", tmp_path).read_bytes() == BODY
    assert len(server.log) == 2


@pytest.mark.parametrize("etag", ['"two"', "", 'W/"weak"'])
def test_two_versions_of_a_file_are_never_joined(tmp_path, server, etag):
    """With an ETag the server notices, without one the size tells."""
    server.etag = '"one"' if etag == '"two"' else etag
    server.files["/a.bin"] = BODY
    server.faults = ["cut", 503, 503, 503]
    with pytest.raises(UserError):
        prepare.download(f"{server.url}/a.bin", tmp_path)
    server.files["/a.bin"], server.etag = BODY[::-1] + b"longer", etag
    assert prepare.download(f"{server.url}/a.bin", tmp_path).read_bytes() == BODY[::-1] + b"longer"


def test_a_part_longer_than_the_file_is_dropped(tmp_path, server):
    server.files["/a.bin"], server.etag = BODY, ""
    server.faults = ["cut", 503, 503, 503]
    with pytest.raises(UserError):
        prepare.download(f"{server.url}/a.bin", tmp_path)
    server.files["/a.bin"] = b"short"
    assert prepare.download(f"{server.url}/a.bin", tmp_path).read_bytes() == b"short"


def test_a_wrong_content_range_is_not_appended(tmp_path, server):
    server.files["/a.bin"] = BODY
    server.faults = ["cut", "wrong range"]
    assert prepare.download(f"{server.url}/a.bin", tmp_path).read_bytes() == BODY


def test_a_wrong_hash_keeps_nothing(tmp_path, server):
    server.files["/a.bin"] = BODY
    with pytest.raises(UserError, match="sha256"):
        prepare.download(f"{server.url}/a.bin#sha256={'0' * 64}", tmp_path)
    assert not [p for p in tmp_path.iterdir() if not p.name.endswith(".json")]


def test_a_missing_file_is_not_asked_for_again(tmp_path, server):
    with pytest.raises(UserError, match="404.*address"):
        prepare.download(f"{server.url}/none.bin", tmp_path)
    assert len(server.log) == 1


def test_a_server_that_stays_down_is_one_sentence(tmp_path, server):
    server.files["/a.bin"], server.faults = BODY, [503] * 9
    with pytest.raises(UserError, match="503"):
        prepare.download(f"{server.url}/a.bin", tmp_path)
    assert len(server.log) == 4


def test_a_name_from_the_network_cannot_leave_the_folder(tmp_path, server):
    for path in ("/..%2f..%2fevil", "/a/..", "/.hidden", "/"):
        server.files[path] = b"text"
        with contextlib.suppress(UserError):
            prepare.download(server.url + path, tmp_path / "cache")
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]


def test_without_a_network_one_sentence_says_what_works(tmp_path, server):
    server.server_close()                       # the port is closed now: nobody answers
    with pytest.raises(UserError) as e:
        prep("shakespeare_char", f"--mirror={server.url}", f"--out={tmp_path / 'out'}",
             f"--cache={tmp_path / 'cache'}")
    assert "the connection to 127.0.0.1 failed" in str(e.value) and "--file" in str(e.value)
    assert "network" in str(e.value) and "\n" not in str(e.value)
    assert not (tmp_path / "out").exists()


def serve_without_end(headers):
    """Answer every request with these headers and zeros until the client has had enough."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            with contextlib.suppress(OSError):
                while True:
                    self.wfile.write(bytes(1 << 16))

        def log_message(self, *args):
            pass
    found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=found.serve_forever, daemon=True).start()
    return found


@pytest.mark.parametrize("headers", [{}, {"Content-Length": "-5"}, {"Content-Length": "x" * 999},
                                     {"ETag": "e" * 9999}])
def test_a_server_that_sends_without_end_is_one_sentence(tmp_path, monkeypatch, headers):
    monkeypatch.setattr(download, "LARGEST", 1 << 20)
    monkeypatch.setattr(download, "PATIENCE", ())
    endless = serve_without_end(headers)
    with pytest.raises(UserError) as e:
        download.download(f"http://127.0.0.1:{endless.server_port}/a.txt", tmp_path)
    endless.shutdown()
    assert "cannot be fetched" in str(e.value) and len(str(e.value)) < 400
    assert sum(p.stat().st_size for p in tmp_path.iterdir()) < 1 << 17


# --- datasets with a name, from a mirror -------------------------------------------------------
def test_shakespeare_must_be_shakespeare(tmp_path, server):
    server.files["/copy/input.txt"] = b"To be, or not to be"
    with pytest.raises(UserError, match="sha256 is not 86c4e6aa"):
        prep("shakespeare_char", f"--mirror={server.url}/copy", f"--out={tmp_path / 'out'}",
             f"--cache={tmp_path / 'cache'}")


def test_tinystories_keeps_its_own_split(tmp_path, server, bpe):
    stories = {"train": [f"Story {i}. {words(20, i)}".strip() for i in range(30)],
               "valid": ["Once upon a time.", "The end."]}
    for split, texts in stories.items():
        server.files[f"/TinyStoriesV2-GPT4-{split}.txt"] = "\n<|endoftext|>\n".join(texts).encode()
    prep("tinystories", f"--mirror={server.url}", f"--out={tmp_path / 'out'}",
         f"--tokenizer={bpe}", f"--cache={tmp_path / 'cache'}")
    assert documents(tmp_path / "out", "train") == stories["train"]
    assert documents(tmp_path / "out", "val") == stories["valid"]


def test_gutenberg_books_lose_their_licence(tmp_path, server, bpe):
    for n in prepare.BOOKS:
        server.files[f"/pg{n}.txt"] = (
            f"\ufeffThe Project Gutenberg eBook\r\n*** START OF THE PROJECT GUTENBERG EBOOK {n} ***"
            f"\r\n\r\nBook {n} *** begins.\r\n\r\n*** END OF THE PROJECT GUTENBERG EBOOK {n} ***"
            "\r\nlicence").encode()
    prep("gutenberg", f"--mirror={server.url}", f"--out={tmp_path / 'out'}",
         f"--tokenizer={bpe}", f"--cache={tmp_path / 'cache'}")
    assert sorted(documents(tmp_path / "out")) == sorted(f"Book {n} *** begins."
                                                         for n in prepare.BOOKS)


def test_fineweb_shards_are_taken_as_they_are(tmp_path, server, bpe):
    tok = tokenizers.load(bpe)
    texts = [words(50, i) for i in range(9)]
    rows = [[tok.eot] + tok.encode(t) for t in texts]
    flat = {"train_000001": sum(rows[:5], []), "train_000002": sum(rows[5:7], []),
            "val_000000": sum(rows[7:], [])}
    for name, ids in flat.items():
        server.files[f"/fineweb_{name}.bin"] = shard(ids)
    args = ["fineweb", f"--mirror={server.url}", f"--out={tmp_path / 'out'}",
            f"--tokenizer={bpe}", f"--cache={tmp_path / 'cache'}"]
    prep(*args, "--shards=2")
    assert documents(tmp_path / "out", "train") == texts[:7]
    assert documents(tmp_path / "out", "val") == texts[7:]
    prep(*args, "--shards=1")
    assert documents(tmp_path / "out", "train") == texts[:5]


@pytest.mark.parametrize("content, says", [
    (shard([1, 2, 3], magic=7), "not a whole"), (shard([1, 2, 3], version=9), "not a whole"),
    (shard([1, 2, 3], count=4), "not a whole"), (shard([1, 2, 3], count=-1), "not a whole"),
    (b"<html>please log in</html>", "not a whole"), (shard([1, 60000]), "60000")])
def test_a_foreign_fineweb_shard_is_refused(tmp_path, server, bpe, content, says):
    server.files["/fineweb_train_000001.bin"] = content
    server.files["/fineweb_val_000000.bin"] = shard([1, 2])
    with pytest.raises(UserError, match=says):
        prep("fineweb", f"--mirror={server.url}", f"--out={tmp_path / 'out'}",
             f"--tokenizer={bpe}", f"--cache={tmp_path / 'cache'}")
    assert not (tmp_path / "out").exists()
