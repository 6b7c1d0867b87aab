"""What the tests of this subject share: fixtures and oracles.
"""
import contextlib
import http.server
import random
import threading

import numpy as np
import pytest

import tokenizer as tokenizers
from config import configure
from data import download, loader, prepare


# --- helpers -----------------------------------------------------------------------------------
def words(n, seed=0):
    """n words of made-up text, with the variety that a BPE needs to have something to merge."""
    rng = random.Random(seed)
    stems = ["".join(rng.choices("etaoinshrdlu", k=rng.randrange(2, 8))) for _ in range(200)]
    out = [rng.choice(stems) + rng.choice(["", "", ",", ".\n", "ing", "ed", "\n\n"])
           for _ in range(n)]
    return " ".join(out)


def prep(*argv):
    """`python data/prepare.py argv…` in this process; UserError is what run() turns into 2."""
    prepare.main(configure(prepare.Config, [str(a) for a in argv], positional=("source",)))


def documents(out, split=None):
    """The texts of a dataset, decoded: everything between two end-of-text ids."""
    data, found = loader.Dataset(out), []
    tok = tokenizers.load(out)
    for name in [split] if split else ["train", "val"]:
        tokens = data.tokens(name)
        ids = tokens.read(0, len(tokens))
        about = data.meta["splits"][name]
        assert len(ids) == about["tokens"]
        assert ids[0] == data.eot, "an end-of-text id opens the first document"
        starts = np.flatnonzero(ids == data.eot)
        texts = [tok.decode(part[1:].tolist()) for part in np.split(ids, starts[1:])]
        assert len(texts) == about["documents"]
        assert sum(len(t.encode()) for t in texts) == about["bytes"]
        # what bits per byte divides by: the bytes of the tokens are the bytes of the text
        lengths = np.asarray(tok.byte_lengths())
        assert lengths[ids[ids != data.eot]].sum() == about["bytes"]
        found += texts
    return found


@pytest.fixture(scope="session")
def bpe(tmp_path_factory):
    """A small BPE of our own, so that most tests need not train one."""
    folder = tmp_path_factory.mktemp("bpe")
    tokenizers.train([words(5000)], 400).save(folder)
    return folder


# --- the network -------------------------------------------------------------------------------
class Server(http.server.ThreadingHTTPServer):
    """A web server whose faults are scripted: `faults` are used up, one a request."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.faults, self.log, self.ranges = {}, [], [], True
        self.etag = '"one"'
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        s = self.server
        fault = s.faults.pop(0) if s.faults else None
        asked = self.headers.get("Range")
        s.log.append((self.path, asked))
        body = s.files.get(self.path.split("?")[0])
        if body is None or isinstance(fault, int):
            self.send_response(404 if body is None else fault)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        start = 0
        same = self.headers.get("If-Range") in (None, s.etag)
        if asked and s.ranges and same:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(body):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(body)}")
                self.send_header("Content-Length", "0")
                return self.end_headers()
            self.send_response(206)
            shift = 7 if fault == "wrong range" else 0
            self.send_header("Content-Range",
                             f"bytes {start + shift}-{len(body) - 1}/{len(body)}")
        else:
            self.send_response(200)
        if s.etag:
            self.send_header("ETag", s.etag)
        rest = body[start:]
        self.send_header("Content-Length", str(len(rest)))
        self.end_headers()
        if fault == "cut":                      # the connection breaks half way
            self.wfile.write(rest[:len(rest) // 2])
            self.wfile.flush()
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(2)
            return
        self.wfile.write(rest)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, "PATIENCE", (0, 0, 0))
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with Server() as s:
        thread = threading.Thread(target=s.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield s
        s.shutdown()
        thread.join()


def shard(ids, magic=20240520, version=1, count=None):
    head = np.zeros(256, dtype="<i4")
    head[:3] = magic, version, len(ids) if count is None else count
    return head.tobytes() + np.asarray(ids, dtype="<u2").tobytes()
