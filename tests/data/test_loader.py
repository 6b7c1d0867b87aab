"""data/loader.py: what a batch is, where it comes from, and what it refuses to read."""
import csv
import gzip
import hashlib
import io
import json
import os
import random
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import torch

from config import UserError
from conftest import ROOT
from data import loader, shards


def dataset(folder, train, val=(1, 2, 3), vocab_size=None, eot=None, shard_tokens=10**9):
    """Write a dataset by way of the code that writes real ones; returns it opened."""
    folder.mkdir(exist_ok=True)
    splits = {"train": np.asarray(train), "val": np.asarray(val)}
    vocab_size = vocab_size or int(max(s.max() for s in splits.values())) + 1
    about = {}
    for name, ids in splits.items():
        writer = shards.Shards(folder, name, vocab_size, shard_tokens)
        writer.write(ids, 1, len(ids))
        about[name] = writer.close()
    meta = {"version": loader.VERSION, "vocab_size": vocab_size, "eot": eot, "splits": about}
    (folder / "meta.json").write_text(json.dumps(meta))
    return loader.Dataset(folder)


def positions(folder, n, **more):
    """A train split whose token at position i is i: a batch then tells where it was cut."""
    return dataset(folder, np.arange(n), **more).tokens("train")


# --- shards on disk ----------------------------------------------------------------------------
@pytest.mark.parametrize("vocab_size, dtype", [(65536, np.uint16), (65537, np.uint32)])
def test_a_shard_is_byte_for_byte_what_numpy_saves(tmp_path, vocab_size, dtype):
    ids = np.random.default_rng(0).integers(0, vocab_size, 1000)
    ids[0] = vocab_size - 1
    data = dataset(tmp_path / "d", ids, vocab_size=vocab_size)
    oracle = io.BytesIO()
    np.save(oracle, ids.astype(dtype))
    written = (tmp_path / "d" / "train_00000.npy").read_bytes()
    assert written == oracle.getvalue()
    about = data.meta["splits"]["train"]["shards"][0]
    assert about == {"file": "train_00000.npy", "tokens": 1000,
                     "sha256": hashlib.sha256(written).hexdigest()}


def test_many_shards_read_as_one_sequence(tmp_path):
    ids = np.random.default_rng(1).integers(0, 500, 1000)
    tokens = dataset(tmp_path / "d", ids, shard_tokens=37).tokens("train")
    assert len(tokens) == 1000 and len(tokens.shards) == 28
    rng = random.Random(0)
    for _ in range(200):
        start = rng.randrange(1000)
        n = rng.randrange(1000 - start + 1)
        assert np.array_equal(tokens.read(start, n), ids[start:start + n])
    assert tokens.read(5, 3).dtype == np.int64
    for start, n in ((0, 1001), (-1, 3), (1000, 1)):
        with pytest.raises(IndexError):
            tokens.read(start, n)


def test_of_a_shard_no_more_is_read_than_asked_for(tmp_path, monkeypatch):
    tokens = positions(tmp_path / "d", 5000)
    sizes = []
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, n, at: sizes.append(n) or real(fd, n, at))
    assert tokens.read(17, 30).tolist() == list(range(17, 47))
    assert sum(sizes) == 30 * 2


def test_a_shard_that_is_cut_meanwhile_is_a_sentence_and_no_signal(tmp_path):
    """By a process of its own: a mapped file would end it by SIGBUS."""
    positions(tmp_path / "d", 5000)
    code = """if True:
        import os, sys
        from data import loader
        from config import UserError
        tokens = loader.Dataset(sys.argv[1]).tokens("train")
        for path in tokens.dataset.directory.glob("train*.npy"):
            os.truncate(path, 200)
        try:
            tokens.read(0, 5000)
        except UserError as e:
            print(e)"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "d"], cwd=ROOT, text=True,
                          capture_output=True)
    assert done.returncode == 0, (done.returncode, done.stderr)
    assert "was cut while it was read" in done.stdout


def test_a_dataset_that_is_prepared_anew_is_not_read_in_the_middle_of_a_run(tmp_path):
    tokens = positions(tmp_path / "d", 5000)
    before = tokens.read(0, 5000)
    for path in (tmp_path / "d").glob("train*.npy"):
        new = path.with_name("new.npy")
        np.save(new, np.zeros(len(np.load(path)), np.load(path).dtype))
        new.replace(path)
    assert np.array_equal(tokens.read(0, 5000), before)


def test_a_writer_refuses_ids_that_would_wrap_around(tmp_path):
    with pytest.raises(UserError, match="70000"):
        shards.Shards(tmp_path, "train", 300, 100).write(np.array([1, 70000]), 1, 2)


# --- batches -----------------------------------------------------------------------------------
@pytest.mark.parametrize("n, block, batch", [(1001, 10, 7), (1000, 10, 99), (64, 8, 3), (333, 1, 5),
                                             (11, 10, 4), (20, 10, 2), (21, 10, 2), (1000, 7, 300)])
def test_an_epoch_sees_every_window_once(tmp_path, n, block, batch):
    """Sampling with replacement (nanoGPT) would miss a third of the windows in an epoch."""
    batches = loader.Batches(positions(tmp_path / "d", n), batch, block, seed=3)
    epochs, starts = 4, []
    for step in range(-(-epochs * batches.windows // batch)):
        b = batches(step)
        assert b["ids"].shape == b["targets"].shape == (batch, block)
        assert b["ids"].dtype == b["targets"].dtype == torch.int64
        # ids are positions here: a window is contiguous and its targets are one further
        assert torch.equal(b["ids"], b["ids"][:, :1] + torch.arange(block))
        assert torch.equal(b["targets"], b["ids"] + 1)
        starts += b["ids"][:, 0].tolist()
    offsets, orders = set(), set()
    for epoch in range(epochs):
        seen = starts[epoch * batches.windows:(epoch + 1) * batches.windows]
        first = min(seen)
        assert 0 <= first < block
        assert sorted(seen) == [first + i * block for i in range(batches.windows)]
        offsets.add(first)
        orders.add(tuple(s - first for s in seen))
    # nearly everything is used, the grid moves, the order changes
    assert batches.windows >= (n - 1) // block - 1 and batches.windows >= 1
    if batches.windows >= 20:
        assert len(orders) == epochs
        assert block == 1 or len(offsets) > 1


def test_every_offset_of_the_grid_occurs(tmp_path):
    batches = loader.Batches(positions(tmp_path / "d", 50), 1, 4)
    assert {int(batches.epoch(e).min()) for e in range(100)} == {0, 1, 2, 3}


def test_a_batch_is_a_function_of_seed_and_step(tmp_path):
    """Resume asks for step 700 first; nothing that was asked before may matter."""
    tokens = positions(tmp_path / "d", 2000)
    one, other = (loader.Batches(tokens, 6, 16, seed=5) for _ in range(2))
    for step in (700, 3, 699, 700, 0, 10**9):
        for earlier in (step - 1, 2):
            other(max(earlier, 0))
        assert all(torch.equal(one(step)[k], other(step)[k]) for k in ("ids", "targets"))
    changed = loader.Batches(tokens, 6, 16, seed=6)
    assert not torch.equal(one(0)["ids"], changed(0)["ids"])
    assert loader.Batches(tokens, 6, 16, seed=-1)(0)["ids"].shape == (6, 16)


def test_the_order_of_the_data_never_changes(tmp_path):
    """Literal values: the same on every platform and with every NumPy, so runs can be compared."""
    batches = loader.Batches(positions(tmp_path / "d", 1000), 8, 100, seed=1337)
    assert batches(0)["ids"][:, 0].tolist() == GOLDEN[0]
    assert batches(1)["ids"][:, 0].tolist() == GOLDEN[1]


GOLDEN = ([453, 53, 553, 653, 753, 353, 153, 253], [159, 559, 259, 659, 459, 359, 759, 59])


@pytest.mark.parametrize("batch", [8, 40])
def test_any_number_of_ranks_sees_the_same_tokens(tmp_path, batch):
    """Ranks and micro-batches are slices of one global batch, even where it spans epochs."""
    tokens = positions(tmp_path / "d", 500)
    whole = loader.Batches(tokens, batch, 20)
    for step in range(10):
        expected = whole(step)["ids"]
        for ranks in (1, 2, 4):
            seen = []
            for rank in range(ranks):
                own = loader.Batches(tokens, batch, 20)(step)["ids"]    # each its own process
                seen += own[rank * batch // ranks:(rank + 1) * batch // ranks].tolist()
            assert sorted(seen) == sorted(expected.tolist())


def test_document_numbers_count_end_of_text_ids(tmp_path):
    rng = np.random.default_rng(2)
    ids = rng.integers(0, 5, 600)           # 0 opens a document, about every fifth token
    tokens = dataset(tmp_path / "d", ids, eot=0).tokens("train")
    b = loader.Batches(tokens, 9, 30, eot=0, documents=True)(4)
    assert b["doc"].dtype == torch.int32 and b["doc"].shape == (9, 30)
    for row, doc in zip(b["ids"].tolist(), b["doc"].tolist()):
        count, expected = 0, []
        for i in row:
            count += i == 0
            expected.append(count)
        assert doc == expected
    assert "doc" not in loader.Batches(tokens, 9, 30, eot=0)(4)
    with pytest.raises(UserError, match="end-of-text"):
        loader.Batches(tokens, 9, 30, eot=None, documents=True)


# --- evaluation --------------------------------------------------------------------------------
@pytest.mark.parametrize("n, block, batch, rows", [
    (1000, 10, 4, 20), (1000, 10, 4, 1000), (105, 10, 4, 9), (11, 10, 8, 8), (999, 3, 7, 63)])
def test_the_evaluation_set_is_fixed_and_has_no_duplicates(tmp_path, n, block, batch, rows):
    tokens = positions(tmp_path / "d", n)
    batches = loader.eval_batches(tokens, batch, block, rows)
    again = loader.eval_batches(tokens, batch, block, rows)
    starts = []
    for b, c in zip(batches, again, strict=True):
        assert torch.equal(b["ids"], c["ids"]) and torch.equal(b["targets"], b["ids"] + 1)
        starts += b["ids"][:, 0].tolist()
    windows = (n - 1) // block
    assert len(starts) == min(windows, rows) == len(set(starts))
    assert len(batches) == -(-len(starts) // batch)
    gaps = np.diff(starts)
    assert (gaps >= block).all()                                # they do not overlap
    if len(gaps):                                               # and cover the split evenly
        assert gaps.max() - gaps.min() <= block
        assert n - 1 - starts[-1] <= gaps.max() + 2 * block
    assert all(len(batches[i]["ids"]) == batch for i in range(len(batches) - 1))


# --- what is refused ---------------------------------------------------------------------------
def test_a_dataset_that_is_not_prepared_says_how_to(tmp_path):
    for path in (tmp_path / "stdlib", tmp_path):
        with pytest.raises(UserError, match=f"not prepared.*prepare.py {path.name}"):
            loader.Dataset(path)


@pytest.mark.parametrize("more, script", [({}, "sft.py"), ({"script": "dpo.py"}, "dpo.py")])
def test_a_dataset_of_chats_says_which_stage_it_is_for(tmp_path, more, script):
    """`python train.py --dataset=skills`: no version, no shards; but nothing is damaged."""
    about = {"version": 1, "kind": "chat", "files": {}, **more}
    (tmp_path / "meta.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=f"not tokens.*python {script} --dataset={tmp_path.name}`"):
        loader.Dataset(tmp_path)


def test_a_name_means_the_repositorys_data_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert loader.find("mine") == loader.ROOT / "data" / "mine"
    assert loader.find(str(tmp_path / "mine")) == tmp_path / "mine"
    dataset(tmp_path / "mine", np.arange(9))
    assert loader.find("mine").resolve() == tmp_path / "mine"   # prepared, so it is meant


def test_a_split_too_short_says_what_to_do(tmp_path):
    tokens = positions(tmp_path / "d", 64)
    with pytest.raises(UserError, match="64 tokens.*block_size"):
        loader.Batches(tokens, 4, 64)
    with pytest.raises(UserError, match="64 tokens.*block_size"):
        loader.eval_batches(tokens, 4, 64, 2)
    assert loader.Batches(tokens, 4, 63)(0)["targets"][0, -1] == 63


@pytest.mark.parametrize("batch, block", [(0, 8), (4, 0), (-1, 8), (4, -8)])
def test_senseless_sizes_are_refused(tmp_path, batch, block):
    tokens = positions(tmp_path / "d", 64)
    with pytest.raises(UserError):
        loader.Batches(tokens, batch, block)
    with pytest.raises(UserError):
        loader.eval_batches(tokens, batch, block, 3)


def damage(folder, what):
    shard, meta = folder / "train_00000.npy", folder / "meta.json"
    about = json.loads(meta.read_text())
    first = about["splits"]["train"]["shards"][0]
    if what == "truncated":
        shard.write_bytes(shard.read_bytes()[:-10])
    elif what == "header only":
        shard.write_bytes(shard.read_bytes()[:60])
    elif what == "empty":
        shard.write_bytes(b"")
    elif what == "text":
        shard.write_text("this is no array")
    elif what == "pickle":          # np.load would run it, were it allowed to
        np.save(shard, np.array([print], dtype=object), allow_pickle=True)
    elif what == "archive":
        with open(shard, "wb") as f:
            np.savez(f, a=np.arange(3))
    elif what == "floats":
        np.save(shard, np.arange(100.0))
    elif what == "two rows":
        np.save(shard, np.zeros((2, 50), dtype=np.uint16))
    elif what == "missing":
        shard.unlink()
    elif what == "shorter":
        np.save(shard, np.zeros(99, dtype=np.uint16))
    elif what == "escapes":
        shard.rename(folder.parent / shard.name)        # all would be well, but for the place
        first["file"] = "../train_00000.npy"
    elif what == "version":
        about["version"] = 99
    elif what == "no splits":
        del about["splits"]
    elif what == "not a number":
        first["tokens"] = "many"
    elif what == "a list":
        about = [about]
    meta.write_text("{" if what == "half" else json.dumps(about))


@pytest.mark.parametrize("what", [
    "truncated", "header only", "empty", "text", "pickle", "archive", "floats", "two rows",
    "missing", "shorter", "escapes", "version", "no splits", "not a number", "a list", "half"])
def test_a_damaged_dataset_is_a_sentence_with_the_cure(tmp_path, what):
    dataset(tmp_path / "d", np.arange(100))
    damage(tmp_path / "d", what)
    with pytest.raises(UserError, match="prepare.py") as e:
        loader.Dataset(tmp_path / "d").tokens("train")
    assert "\n" not in str(e.value) and str(tmp_path / "d") in str(e.value)


def test_an_id_beyond_the_vocabulary_is_found_when_read(tmp_path):
    dataset(tmp_path / "d", np.arange(100), vocab_size=100)
    meta = tmp_path / "d" / "meta.json"
    meta.write_text(json.dumps({**json.loads(meta.read_text()), "vocab_size": 60}))
    tokens = loader.Dataset(tmp_path / "d").tokens("train")
    assert tokens.read(0, 60)[-1] == 59
    with pytest.raises(UserError, match="id 60"):
        tokens.read(30, 31)


def test_an_unknown_split_names_those_there_are(tmp_path):
    with pytest.raises(UserError, match="'test'.*train, val"):
        dataset(tmp_path / "d", np.arange(9)).tokens("test")


# --- reading text files ------------------------------------------------------------------------
TEXTS = ["plain", "déjà vu, 漢字 🙂", 'quotes " and \\ and\nnewlines\n\n', "", "  ", "[{,]}",
         "x" * 99]


@pytest.fixture(params=[3, 64, 1 << 20])
def block(request, monkeypatch):
    """Blocks from tiny to usual: whatever may be cut in two is cut in two."""
    monkeypatch.setattr(loader, "BLOCK", request.param)


@pytest.mark.parametrize("form", ["lines", "array", "indented", "values", "bom", "crlf"])
def test_every_json_layout_gives_the_same_records(tmp_path, block, form):
    rows = [{"text": t, "n": [i, {"deep": None}]} for i, t in enumerate(TEXTS)]
    lines = [json.dumps(r, ensure_ascii=i % 2 == 0) for i, r in enumerate(rows)]
    content = {"lines": "\n".join(lines), "array": json.dumps(rows), "values": " ".join(lines),
               "indented": json.dumps(rows, indent=2), "bom": "\ufeff" + "\n".join(lines) + "\n",
               "crlf": "\r\n\r\n".join(lines)}[form]
    path = tmp_path / "a.jsonl"
    path.write_bytes(content.encode())
    found = list(loader.Reader().records(path))
    assert [r for _, r in found] == rows
    # the line named is the line where the record begins
    for where, r in found:
        line = int(where.rsplit(" ", 1)[1])
        begins = content.split("\n")[line - 1].strip("\ufeff \r,")
        assert begins[:1] == "{" or form in ("array", "values")
    if form == "lines":
        assert [w for w, _ in found] == [f"{path}, line {i + 1}" for i in range(len(rows))]


def test_csv_reads_as_the_csv_module_does(tmp_path, block):
    path = tmp_path / "a.csv"
    with open(path, "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, ["label", "text"])
        writer.writeheader()
        writer.writerows({"label": str(i), "text": t * 3} for i, t in enumerate(TEXTS))
        writer.writerow({"label": "long", "text": "y" * 200_000})    # csv's own limit is 131,072
    with open(path, newline="", encoding="utf-8") as f:
        csv.field_size_limit(1 << 20)
        oracle = list(csv.DictReader(f))
    assert [r for _, r in loader.Reader().records(path)] == oracle


def test_gzip_is_read_as_what_it_holds(tmp_path, block):
    text = "\n".join(TEXTS) * 50
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    reader = loader.Reader()
    assert "".join(reader.blocks(tmp_path / "a.txt.gz")) == text
    assert reader.consumed == (tmp_path / "a.txt.gz").stat().st_size      # what progress shows
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n'))
    assert [r for _, r in loader.Reader().records(tmp_path / "b.jsonl.gz")] == [{"text": "a"}]


def test_lines_are_cut_at_newlines_only(tmp_path, block):
    text = "a\u2028b\x0bc\n\nd\r\ne"
    (tmp_path / "a").write_bytes(text.encode())
    assert list(loader.Reader().lines(tmp_path / "a")) == ["a\u2028b\x0bc\n", "\n", "d\r\n", "e"]


@pytest.mark.parametrize("name, content, says", [
    ("a.txt", "ok é".encode() + b"\xff rest", "byte 5 "),
    ("a.txt", b"x" * 5000 + b"\xe2\x82", "byte 5,000 "),                # cut inside a character
    ("a.jsonl", b'{"text": "a"}\n{"text": "b\n{"text": "c"}\n', "line 2: not JSON"),
    ("a.jsonl", b'{"text": "a"}\n\n17\n', "line 3: a int"),
    ("a.json", b'[{"text": "a"},\n {"text": "b"},\n', "line 3: the array has no end"),
    ("a.json", b'[{"text": "a"},\n {"text": "b', "line 2: not JSON"),
    ("a.json", b'{"a":' * 100_000, "line 1: not JSON"),                 # deeper than the stack
    ("a.txt.gz", gzip.compress(b"hello" * 100)[:-9], "gzip"),
    ("a.txt.gz", b"this was never packed", "gzip"),
    ("a.csv", b'text\n"never closed\n', "line 2"),
])
def test_broken_files_are_named_with_the_place(tmp_path, block, name, content, says):
    path = tmp_path / name
    path.write_bytes(content)
    reader = loader.Reader()
    with pytest.raises(UserError) as e:
        list(reader.blocks(path) if ".txt" in name else reader.records(path))
    assert str(path) in str(e.value) and says in str(e.value) and "\n" not in str(e.value)


def test_skip_bad_drops_and_counts(tmp_path, block):
    reader = loader.Reader(skip_bad=True)
    (tmp_path / "a.txt").write_bytes(b"one\xff two\xfe\xfd three\xc3")
    assert "".join(reader.blocks(tmp_path / "a.txt")) == "one two three" and reader.bad == 4
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n{"a": \n17\n{"a": 4}\nnull\n{"a": 5}\n')
    reader = loader.Reader(skip_bad=True)
    found = [r for _, r in reader.records(tmp_path / "a.jsonl")]
    assert found == [{"a": 1}, {"a": 4}, {"a": 5}] and reader.bad == 3


def test_a_line_without_an_end_is_not_held_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(loader, "LONGEST", 10_000)
    monkeypatch.setattr(loader, "BLOCK", 1000)
    (tmp_path / "a.csv").write_bytes(b"x" * 50_000)
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "' + b"x" * 50_000)
    for name in ("a.csv", "a.jsonl"):
        reader = loader.Reader()
        with pytest.raises(UserError):
            list(reader.records(tmp_path / name))
        assert reader.consumed < 30_000


@pytest.mark.parametrize("text, cut", [
    ("def a():\n    b\n\nd\ne f", "def a():\n    b\n\nd\n"),
    ("a\n\nb\n  c", "a\n"),                       # no clean place: any newline
    ("a\nb" + "\n\nc" * 30_000 + "d\ne", "a\nb" + "\n\nc" * 30_000 + "d\n"),   # near the end
    ("a b", "a "),
    ("abc", "abc"),
])
def test_where_a_long_text_is_cut(text, cut):
    assert text[:loader.cut_at(text)] == cut


@pytest.mark.parametrize("record", ['{"x": [%s[]]}', "[[1], %s[]]", '{"a": 1, "x": [{}, %s1]}'])
def test_a_record_of_millions_of_lists_is_refused_before_it_costs_memory(record, tmp_path):
    """A list is 2 bytes of text and 64 of memory: bounded by what is parsed before the refusal."""
    (tmp_path / "r.jsonl").write_text(record % ("[]," * 1_500_000) + "\n")
    tracemalloc.start()
    with pytest.raises(UserError, match="line 1: (a record of more than|an? .* where)"):
        list(loader.Reader().records(tmp_path / "r.jsonl"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 80e6, f"{peak / 1e6:.0f} MB for a file of 4.5 MB"


def test_brackets_within_a_long_text_are_text(tmp_path):
    text = 'a[{"\\[{\\\\' * 300_000
    (tmp_path / "r.jsonl").write_text(json.dumps({"text": text}) + "\n" + '{"text": "b"}\n')
    assert [r["text"] for _, r in loader.Reader().records(tmp_path / "r.jsonl")] == [text, "b"]
