"""data/prepare.py: any text in, a complete dataset or nothing out; downloads that go on."""
import contextlib
import csv
import gzip
import hashlib
import json
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import tokenizer as tokenizers
from config import UserError, run
from data import corpus, loader, prepare, shards
from prepare_base import bpe, documents, prep, server, words     # noqa: F401

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = str(ROOT / "data" / "prepare.py")


def cli(*argv, **more):
    return subprocess.run([sys.executable, SCRIPT, *map(str, argv)], capture_output=True,
                          text=True, timeout=120, **more)


def state(folder):
    """Every file of a folder and its content, to see that nothing changed."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*"))
            if p.is_file()}


def shards_of(folder):
    return {name: data for name, data in state(folder).items() if name.endswith(".npy")}


def die(bundle):
    os._exit(9)


@pytest.fixture
def docs():
    return [f"document {i}: {words(30, i)}" for i in range(20)]


# --- inputs ------------------------------------------------------------------------------------
def write(folder, form, docs):
    """The same documents in another layout; returns what to put on the command line."""
    folder.mkdir()
    rows = [{"id": i, "text": d} for i, d in enumerate(docs)]
    if form == "jsonl":
        (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return [folder / "a.jsonl"]
    if form == "json":
        (folder / "a.json").write_text(json.dumps(rows, indent=1))
        return [folder / "a.json"]
    if form == "csv":
        with open(folder / "a.csv", "w", newline="") as f:
            writer = csv.DictWriter(f, ["id", "text"])
            writer.writeheader()
            writer.writerows(rows)
        return [folder / "a.csv"]
    if form == "jsonl.gz":
        lines = "\n".join(map(json.dumps, rows)).encode()
        (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines))
        return [folder / "a.jsonl.gz"]
    if form == "separator":
        (folder / "a.txt").write_text("\n<sep>\n".join(docs))
        return [folder / "a.txt", "--separator=<sep>"]
    # one file a document, in a tree: what a folder and a glob find
    for i, d in enumerate(docs):
        name = folder / f"{'abc'[i % 3]}" / f"{i}{('.txt', '.md', '.py', '.txt.gz')[i % 4]}"
        name.parent.mkdir(exist_ok=True)
        name.write_bytes(gzip.compress(d.encode()) if name.suffix == ".gz" else d.encode())
    (folder / "b" / "empty.py").touch()
    (folder / ".git").mkdir()
    (folder / ".git" / "hidden.txt").write_text("not this")
    (folder / "a" / "image.png").write_bytes(b"\x89PNG\xff")
    return {"folder": [folder], "glob": [folder / "**" / "*.*t*"],
            "files": sorted(p for p in folder.glob("[abc]/*.*") if p.suffix != ".png")}[form]


@pytest.mark.parametrize("form", ["jsonl", "json", "csv", "jsonl.gz", "separator", "folder",
                                  "files"])
def test_every_input_gives_the_same_documents(tmp_path, docs, bpe, form, capsys):
    args = write(tmp_path / "in", form, docs)
    prep(*args, f"--out={tmp_path / 'out'}", f"--tokenizer={bpe}", "--val_fraction=0.3")
    # strip(): a separator's documents lose the white space around it
    clean = [d.strip() if form == "separator" else d for d in docs]
    assert sorted(documents(tmp_path / "out")) == sorted(clean)
    out, err = capsys.readouterr()
    assert f"next: python train.py --dataset={tmp_path / 'out'}" in out
    assert "next" not in err and "encoding" in err      # progress is no answer
    train, val = documents(tmp_path / "out", "train"), documents(tmp_path / "out", "val")
    assert train and val and not set(train) & set(val)


def test_a_glob_takes_what_it_matches(tmp_path, docs, bpe):
    write(tmp_path / "in", "folder", docs)
    prep(tmp_path / "in" / "**" / "*.md", f"--out={tmp_path / 'out'}", f"--tokenizer={bpe}")
    assert sorted(documents(tmp_path / "out")) == sorted(docs[1::4])


def test_a_url_is_fetched_and_read(tmp_path, docs, bpe, server):
    body = "\n".join(json.dumps({"body": d}) for d in docs).encode()
    server.files["/data/corpus.jsonl.gz"] = gzip.compress(body)
    prep(f"{server.url}/data/corpus.jsonl.gz?download=1", f"--out={tmp_path / 'out'}",
         f"--tokenizer={bpe}", "--key=body", f"--cache={tmp_path / 'cache'}")
    assert sorted(documents(tmp_path / "out")) == sorted(docs)


def test_a_folder_around_the_output_does_not_read_it_back(tmp_path, docs, bpe, capsys):
    folder = write(tmp_path / "in", "folder", docs)[0]
    for _ in range(2):
        prep(folder, f"--out={folder / 'out'}", f"--tokenizer={bpe}")
    assert "nothing to do" in capsys.readouterr().err
    assert sorted(documents(folder / "out")) == sorted(docs)


@pytest.mark.parametrize("word, name", [
    ("corpus.jsonl.gz", "corpus"), ("a/b/corpus.txt", "corpus"), ("a/corpus/", "corpus"),
    ("corpus/*.txt", "corpus"), ("corpus/**/*.md", "corpus"), ("corpus/x[12].txt", "corpus"),
    ("https://host/a/corpus.txt?x=1/2", "corpus"), ("https://host/", "text")])
def test_what_a_dataset_is_called(word, name):
    assert prepare.name_dataset(word) == name


def test_text_that_spells_a_control_token_stays_text(tmp_path, bpe):
    """A hostile document must not be able to end itself."""
    (tmp_path / "a.jsonl").write_text("\n".join(
        json.dumps({"text": f"{i} before <|endoftext|> after"}) for i in range(4)))
    prep(tmp_path / "a.jsonl", f"--out={tmp_path / 'out'}", f"--tokenizer={bpe}")
    assert sorted(documents(tmp_path / "out"))[0] == "0 before <|endoftext|> after"


def test_lone_surrogates_in_json_become_replacement_characters(tmp_path, bpe):
    (tmp_path / "a.jsonl").write_text('{"text": "a \\ud800 b"}\n{"text": "c"}')
    prep(tmp_path / "a.jsonl", f"--out={tmp_path / 'out'}", f"--tokenizer={bpe}")
    assert sorted(documents(tmp_path / "out")) == ["a \ufffd b", "c"]


# --- tokens ------------------------------------------------------------------------------------
def test_character_mode_is_nanogpts(tmp_path):
    """The recipe of nanoGPT's shakespeare_char, written out here, gives the same ids."""
    text = words(3000)
    (tmp_path / "input.txt").write_text(text)
    prep("shakespeare_char", f"--file={tmp_path / 'input.txt'}", f"--out={tmp_path / 'out'}")
    stoi = {ch: i for i, ch in enumerate(sorted(set(text)))}
    data = loader.Dataset(tmp_path / "out")
    assert data.vocab_size == len(stoi) and data.eot is None
    n = int(len(text) * 0.9)
    for split, part in (("train", text[:n]), ("val", text[n:])):
        tokens = data.tokens(split)
        assert tokens.read(0, len(tokens)).tolist() == [stoi[c] for c in part]


def test_a_copy_where_nanogpt_keeps_it_is_used_and_kept(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "input.txt").write_text(words(3000))
    (tmp_path / "out" / "prepare.py").write_text("# nanoGPT's own")
    prep("shakespeare_char", f"--out={tmp_path / 'out'}")
    assert "not the Tiny Shakespeare" in capsys.readouterr().err
    assert (tmp_path / "out" / "input.txt").read_text() == words(3000)
    assert (tmp_path / "out" / "prepare.py").exists()


def test_one_document_is_split_at_its_end(tmp_path, bpe):
    text = words(3000)
    (tmp_path / "a.txt").write_text(text)
    prep(tmp_path / "a.txt", f"--out={tmp_path / 'out'}", f"--tokenizer={bpe}",
         "--val_fraction=0.25")
    n = int(len(text) * 0.75)
    assert documents(tmp_path / "out", "train") == [text[:n]]
    assert documents(tmp_path / "out", "val") == [text[n:]]


@pytest.mark.parametrize("pattern", ["gpt2", "cl100k"])
def test_a_long_text_read_in_blocks_encodes_as_the_whole(tmp_path, monkeypatch, pattern):
    """Where blocks meet, no token may differ; the number of blocks is an inner matter."""
    text = Path(loader.__file__).read_text() + "".join(
        f"{w}\n\n\n{w};\n{w}  \n" for w in words(2000).split())
    tok = tokenizers.train([text], 500, pattern=pattern)
    tok.save(tmp_path / "tok")
    (tmp_path / "a.txt").write_text(text)
    monkeypatch.setattr(loader, "BLOCK", 3000)
    prep(tmp_path / "a.txt", f"--out={tmp_path / 'out'}", f"--tokenizer={tmp_path / 'tok'}")
    data, n = loader.Dataset(tmp_path / "out"), int(len(text) * 0.95)
    for split, part in (("train", text[:n]), ("val", text[n:])):
        tokens = data.tokens(split)
        assert tokens.read(0, len(tokens)).tolist() == [tok.eot] + tok.encode(part)
        assert data.meta["splits"][split]["documents"] == 1


def test_shards_and_workers_do_not_change_the_tokens(tmp_path, docs, bpe, monkeypatch):
    args = write(tmp_path / "in", "jsonl", docs * 40)
    prep(*args, f"--out={tmp_path / 'one'}", f"--tokenizer={bpe}", "--val_fraction=0.2")
    monkeypatch.setattr(loader, "BLOCK", 5000)      # many bundles, and processes for them
    prep(*args, f"--out={tmp_path / 'many'}", f"--tokenizer={bpe}", "--val_fraction=0.2",
         "--shard_tokens=1000", "--workers=3")
    one, many = loader.Dataset(tmp_path / "one"), loader.Dataset(tmp_path / "many")
    assert len(many.shards["train"]) > 10
    for split in ("train", "val"):
        a, b = one.tokens(split), many.tokens(split)
        assert np.array_equal(a.read(0, len(a)), b.read(0, len(b)))
        assert all(n == 1000 for _, n in many.shards[split][:-1])
        for shard in many.meta["splits"][split]["shards"]:
            content = (tmp_path / "many" / shard["file"]).read_bytes()
            assert shard["sha256"] == hashlib.sha256(content).hexdigest()
    # a rebuild with fewer shards leaves none of the old ones behind
    prep(*args, f"--out={tmp_path / 'many'}", f"--tokenizer={bpe}", "--val_fraction=0.2")
    names = {p.name for p in (tmp_path / "many").iterdir()}
    assert names == {p.name for p in (tmp_path / "one").iterdir()}


def test_the_tokenizer_trains_on_training_documents_alone(tmp_path, docs):
    args = write(tmp_path / "in", "jsonl", docs)
    prep(*args, f"--out={tmp_path / 'out'}", "--vocab_size=320", "--val_fraction=0.5")
    expected = tokenizers.train(documents(tmp_path / "out", "train"), 320)
    assert tokenizers.load(tmp_path / "out").encode(docs[0]) == expected.encode(docs[0])
    other = tokenizers.train(docs, 320)
    assert other.encode(docs[0]) != expected.encode(docs[0])       # so the test can tell


def test_the_same_text_gives_the_same_files(tmp_path, docs):
    args = write(tmp_path / "in", "jsonl", docs)
    for name in "ab":
        prep(*args, f"--out={tmp_path / name / 'd'}", "--vocab_size=300")
    assert state(tmp_path / "a") == state(tmp_path / "b")


# --- the split ---------------------------------------------------------------------------------
def test_the_split_is_by_document_seed_and_fraction(tmp_path, bpe):
    docs = [f"{i} {i * i}" for i in range(2000)]
    args = write(tmp_path / "in", "jsonl", docs)
    val = {}
    for seed in (1, 2):
        prep(*args, f"--out={tmp_path / 'out'}", f"--tokenizer={bpe}", f"--seed={seed}",
             "--val_fraction=0.2")
        val[seed] = set(documents(tmp_path / "out", "val"))
        assert val[seed] | set(documents(tmp_path / "out", "train")) == set(docs)
        assert 320 < len(val[seed]) < 480               # 400, five standard deviations
    assert val[1] != val[2]


def test_copies_of_a_document_stay_on_one_side(tmp_path, bpe):
    """Otherwise the validation loss would measure memory."""
    docs = [f"{i} {i * i}" for i in range(300)] * 3
    prep(*write(tmp_path / "in", "jsonl", docs), f"--out={tmp_path / 'out'}",
         f"--tokenizer={bpe}", "--val_fraction=0.3")
    assert not set(documents(tmp_path / "out", "train")) & set(documents(tmp_path / "out", "val"))


@pytest.mark.parametrize("count, fraction", [(2, 0.001), (2, 0.999), (3, 0.5), (7, 0.0001)])
def test_neither_side_is_ever_empty(tmp_path, bpe, count, fraction):
    for seed in range(3):
        prep(*write(tmp_path / f"in{seed}", "jsonl", [f"text {i}" for i in range(count)]),
             f"--out={tmp_path / 'out'}", f"--tokenizer={bpe}", f"--val_fraction={fraction}",
             f"--seed={seed}")
        assert documents(tmp_path / "out", "train") and documents(tmp_path / "out", "val")


def test_copies_of_a_single_document_are_split_too(tmp_path, bpe):
    prep(*write(tmp_path / "in", "jsonl", ["the same text"] * 10), f"--out={tmp_path / 'out'}",
         f"--tokenizer={bpe}", "--val_fraction=0.3")
    assert "".join(documents(tmp_path / "out")) == "the same text" * 10
    assert documents(tmp_path / "out", "val")


# --- twice, again, killed ----------------------------------------------------------------------
def test_the_second_run_does_nothing_and_changes_are_noticed(tmp_path, docs, capsys):
    args = write(tmp_path / "in", "jsonl", docs)
    out = tmp_path / "out"
    base = [*args, f"--out={out}", "--vocab_size=300"]

    def built(*more):
        before = (out / "meta.json").stat().st_mtime_ns if (out / "meta.json").exists() else 0
        capsys.readouterr()
        prep(*base, *more)
        text = capsys.readouterr()
        assert "next: " in text.out
        again = (out / "meta.json").stat().st_mtime_ns != before
        assert again != ("nothing to do" in text.err)
        return again

    assert built()
    assert not built()
    assert not built("--workers=2")                     # does not shape the result
    assert built("--force")
    assert built("--val_fraction=0.3") and not built("--val_fraction=0.3") and built()
    os.utime(args[0], ns=(1, 1))
    assert built() and not built()                      # an input changed
    (out / "val_00000.npy").unlink()
    assert built() and not built()                      # a shard is gone
    shard = out / "train_00000.npy"
    shard.write_bytes(shard.read_bytes()[:-2])
    assert built() and not built()                      # a shard was cut off
    (out / "tokenizer.json").unlink()
    assert built() and not built()


def test_a_tokenizer_that_was_trained_again_is_noticed(tmp_path, docs, capsys):
    args = [*write(tmp_path / "in", "jsonl", docs), f"--out={tmp_path / 'out'}",
            f"--tokenizer={tmp_path / 'tok'}"]
    for seed in (1, 2):
        tokenizers.train([words(2000, seed)], 300).save(tmp_path / "tok")
        capsys.readouterr()
        prep(*args)
        assert "nothing to do" not in capsys.readouterr().err


def test_a_finished_dataset_survives_a_failed_rebuild(tmp_path, docs, bpe):
    args = write(tmp_path / "in", "jsonl", docs)
    out = tmp_path / "out"
    prep(*args, f"--out={out}", f"--tokenizer={bpe}")
    before = state(out)
    for more in ((), (f"--tokenizer={tmp_path / 'none'}",)):
        args[0].write_text(json.dumps({"text": "good"}) + "\n{broken\n")
        with pytest.raises(UserError):
            prep(*args, f"--out={out}", *(more or (f"--tokenizer={bpe}",)))
        assert state(out) == before
    with pytest.raises(UserError):                      # and a first build leaves nothing at all
        prep(*args, f"--out={tmp_path / 'new'}", f"--tokenizer={bpe}")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("moved", range(5))
def test_a_rebuild_broken_off_while_moving_is_not_prepared(tmp_path, docs, bpe, monkeypatch, moved):
    """New shards beside an old meta.json would be the worst: a mixture that looks finished."""
    args = [*write(tmp_path / "in", "jsonl", docs), f"--out={tmp_path / 'out'}",
            f"--tokenizer={bpe}"]
    prep(*args)
    left, replace = [moved], os.replace

    def some(source, target):
        if Path(target).parent == tmp_path / "out":
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", some)
    with contextlib.suppress(KeyboardInterrupt):
        prep(*args, "--val_fraction=0.4")
    monkeypatch.undo()
    if left[0] < 0:
        with pytest.raises(UserError, match="not prepared"):
            loader.Dataset(tmp_path / "out")
    prep(*args, "--val_fraction=0.4")
    assert len(documents(tmp_path / "out", "val")) > 4
    assert not (tmp_path / "out" / ".building").exists()


def test_a_full_disk_is_one_sentence_and_costs_nothing(tmp_path, docs, bpe, monkeypatch, capsys):
    args = write(tmp_path / "in", "jsonl", docs)
    out = tmp_path / "out"
    prep(*args, f"--out={out}", f"--tokenizer={bpe}")
    before = state(out)
    monkeypatch.setattr(shards, "open", lambda path, mode="r": open(
        "/dev/full" if str(path).endswith(".npy") else path, mode), raising=False)
    monkeypatch.setattr(sys, "argv", ["prepare.py", *map(str, args), f"--out={out}", "--force",
                                      f"--tokenizer={bpe}"])
    capsys.readouterr()
    with pytest.raises(SystemExit) as e:
        run(prepare.main, prepare.Config, positional=("source",))
    text = capsys.readouterr()
    assert e.value.code == 2 and text.out == ""
    assert "disk is full" in text.err.strip().splitlines()[-1]
    monkeypatch.undo()
    assert state(out) == before


def test_an_encoder_that_dies_is_one_sentence(tmp_path, docs, bpe, monkeypatch):
    """What the system's out-of-memory killer does to one of the processes."""
    monkeypatch.setattr(corpus, "encode", die)
    monkeypatch.setattr(loader, "BLOCK", 1000)
    with pytest.raises(UserError, match="process died.*--workers"):
        prep(*write(tmp_path / "in", "jsonl", docs), f"--out={tmp_path / 'out'}",
             f"--tokenizer={bpe}", "--workers=2")
    assert not (tmp_path / "out").exists()


def test_killed_at_any_moment_leaves_nothing_that_looks_finished(tmp_path, bpe):
    """SIGKILL: no meta.json, no process left behind; the next run cleans up and completes."""
    source, out = tmp_path / "a.jsonl", tmp_path / "out"
    rows = [json.dumps({"text": words(400, i)}) for i in range(300)]
    source.write_text("\n".join(rows * 12))             # 8 MB: long enough for processes
    args = [source, f"--out={out}", f"--tokenizer={bpe}", "--workers=2"]
    prep(source, f"--out={tmp_path / 'whole'}", f"--tokenizer={bpe}", "--workers=2")
    rng, killed = random.Random(0), 0
    for attempt in range(4):
        child = subprocess.Popen([sys.executable, SCRIPT, *map(str, args), "--force"],
                                 stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                 start_new_session=True)
        deadline = time.monotonic() + 60
        while not (out / ".building").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        # attempts 2 and 3 wait until shards are being written, by processes
        while attempt > 1 and child.poll() is None and not list(out.glob(".building/*.npy")):
            time.sleep(0.01)
        time.sleep(rng.random() * 0.3)
        child.send_signal(signal.SIGKILL)
        killed += child.wait() == -signal.SIGKILL
        gone = time.monotonic() + 20
        while time.monotonic() < gone:                  # the encoders leave with their parent
            try:
                os.killpg(child.pid, 0)
                time.sleep(0.05)
            except ProcessLookupError:
                break
        else:
            os.killpg(child.pid, signal.SIGKILL)
            pytest.fail("encoding processes outlived their parent")
        try:
            loader.Dataset(out)                         # it was faster than the signal
        except UserError as e:
            assert "not prepared" in str(e)
        else:
            assert shards_of(out) == shards_of(tmp_path / "whole")
            shutil.rmtree(out)
    assert killed >= 2
    prep(*args)
    assert not (out / ".building").exists()
    assert shards_of(out) == shards_of(tmp_path / "whole")


# --- mistakes ----------------------------------------------------------------------------------
def fill(folder):
    (folder / "empty.txt").touch()
    (folder / "blank.jsonl").write_text('{"text": ""}\n')
    (folder / "short.txt").write_text("a")
    (folder / "latin1.txt").write_bytes("Sch\u00f6n".encode("latin-1"))
    (folder / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (folder / "chat.jsonl").write_text('{"conversations": []}\n')
    (folder / "table.csv").write_text("label,body\n1,hello\n")
    (folder / "good.txt").write_text(words(300))
    (folder / "pictures").mkdir()
    (folder / "pictures" / "a.png").write_bytes(b"\x89PNG")


@pytest.mark.parametrize("argv, says", [
    (["none.txt"], "expected a file, folder, URL or dataset name.*stdlib"),
    (["stdlb"], "expected a file, folder, URL or dataset name.*stdlib"),
    (["*.xyz"], "expected a file"),
    (["empty.txt"], "there is no text in empty.txt"),
    (["blank.jsonl"], "no text in .*blank.jsonl"),
    (["short.txt"], "too few"),
    (["pictures"], r"pictures holds no text.*\.txt"),
    (["latin1.txt"], "latin1.txt is not UTF-8 text: byte 3 .*skip_bad"),
    (["bad.jsonl"], "bad.jsonl, line 2: not JSON"),
    (["chat.jsonl"], "chat.jsonl, line 1: no text under 'text' but conversations; --key"),
    (["table.csv"], "table.csv, line 2: no text under 'text' but label, body; --key"),
    (["good.txt", "--vocab_size=50000"], "vocab"),
    (["good.txt", "--vocab_size=10"], "vocab"),
    (["good.txt", "--pattern=(("], "pattern"),
    (["good.txt", "--tokenizer=no/such"], "no/such"),
    (["good.txt", "--out=good.txt"], "cannot write to good.txt"),
    (["good.txt", "--out=good.txt/deeper"], "cannot write to good.txt/deeper"),
    (["good.txt", "--val_fraction=1"], "val_fraction is 1"),
    (["good.txt", "--val_fraction=0"], "val_fraction is 0"),
    (["good.txt", "--shard_tokens=0"], "shard_tokens"),
    (["good.txt", "--file=short.txt"], "--file is for shakespeare"),
    (["good.txt", "short.txt", "--out="], "add --out"),
    (["stdlib", "good.txt", "--out=x"], "alone"),
    (["fineweb", "--shards=104"], "103"),
    (["fineweb", "--tokenizer=char"], "char"),
    (["good.txt", "--vocabsize=3"], "did you mean vocab_size"),
    (["good.txt", "--workers=many"], "workers"),
])
def test_mistakes_are_one_sentence_that_names_the_place(tmp_path, monkeypatch, argv, says):
    fill(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = state(tmp_path)
    with pytest.raises(UserError) as e:
        prep(*argv, *([] if any(a.startswith("--out") for a in argv) else ["--out=out"]))
    assert re.search(says, str(e.value)), str(e.value)
    assert "\n" not in str(e.value)
    assert state(tmp_path) == before


@pytest.mark.parametrize("argv", [["none.txt"], ["--out=good.txt/x", "good.txt"], ["--worker=2"]])
def test_the_program_ends_with_status_2_and_one_line(tmp_path, monkeypatch, capsys, argv):
    fill(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [SCRIPT, *argv])
    with pytest.raises(SystemExit) as e:                # the script itself, in this process
        runpy.run_path(SCRIPT, run_name="__main__")
    out, err = capsys.readouterr()
    assert e.value.code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1


def test_skip_bad_prepares_what_is_good(tmp_path, bpe, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": \n{"body": "x"}\n'
                                      '{"text": "two"}\n')
    prep(tmp_path / "a.jsonl", f"--out={tmp_path / 'out'}", f"--tokenizer={bpe}", "--skip_bad=1")
    assert sorted(documents(tmp_path / "out")) == ["one", "two"]
    assert "2 broken places" in capsys.readouterr().err


# --- scale -------------------------------------------------------------------------------------
def test_memory_does_not_grow_with_the_text(tmp_path, bpe):
    code = ("import sys, resource; sys.path.insert(0, sys.argv.pop(1))\n"
            "from config import configure; from data import prepare\n"
            "prepare.main(configure(prepare.Config, sys.argv[1:], positional=('source',)))\n"
            # not ru_maxrss where it can be helped: a child inherits its parent's peak there
            "status = '/proc/self/status'; from pathlib import Path\n"
            "print([x.split()[1] for x in open(status) if x.startswith('VmHWM')][0]\n"
            "      if Path(status).exists() else\n"
            "      resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)")
    peak = []
    text = words(100_000)
    for copies in (8, 40):                              # 5 and 24 MB
        path = tmp_path / f"{copies}.txt"
        path.write_text(text * copies)
        done = subprocess.run([sys.executable, "-c", code, str(ROOT), str(path), "--workers=1",
                               f"--out={tmp_path / str(copies)}", f"--tokenizer={bpe}"],
                              capture_output=True, text=True, check=True)
        peak.append(int(done.stdout.split()[-1]) / 1024)
        size = path.stat().st_size / 1e6
    assert size > 20 and peak[1] - peak[0] < 12, peak   # MB


def test_the_default_is_the_standard_library(tmp_path):
    """The literal first command: no word, no network, no download."""
    done = cli(f"--out={tmp_path / 'stdlib'}", "--vocab_size=1024", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "100% of" in done.stderr and "next: python train.py --dataset=" in done.stdout
    data = loader.Dataset(tmp_path / "stdlib")
    train, val = (data.meta["splits"][s] for s in ("train", "val"))
    assert 5e6 < train["bytes"] + val["bytes"] < 30e6
    assert 0.005 < val["bytes"] / train["bytes"] < 0.25
    text = "\n".join(documents(tmp_path / "stdlib"))
    assert "class OrderedDict" in text and "class TestCase" in text
    assert "class TestLoader(unittest.TestCase)" not in text    # the library, without its tests
