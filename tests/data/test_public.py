"""data/public.py: public sets by name from a server on this machine, whole, split and checked."""
import dataclasses
import gzip
import io
import json
import tarfile
import zipfile
from collections import Counter

import pytest

from config import UserError, configure
from data import chats, loader, prepare, public
from prepare_base import server    # noqa: F401
from test_prepare import state    # noqa: F401


# --- files of the same form, only smaller ------------------------------------------------------
def alpaca(n=60):
    """As Stanford's: an array; every third has an input, some questions come twice, one is open."""
    rows = [{"instruction": f"Name {i // 2 * 2} things.", "input": "in é space" * (i % 3 == 0),
             "output": f"{i} \ud83d."} for i in range(n)]
    return json.dumps([*rows, {"instruction": "No answer", "input": "", "output": ""}], indent=4)


def talk(*turns):
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 9, turns)]


def minimind(n=60):
    rows = [{"conversations": talk(f"question {i}?", f"answer {i}", "更多?", "yes")}
            for i in range(n)]
    call = [{"role": "system", "content": "# Tools", "tools": "[{}]"}, *talk("256 * 37?"),
            {"role": "assistant", "content": "", "reasoning_content": "I shall multiply.",
             "tool_calls": json.dumps([{"name": "calculate", "arguments": {"sum": "256 * 37"}}])},
            {"role": "tool", "content": "9472"}, {"role": "assistant", "content": "9472."}]
    rows.insert(5, {"conversations": call})
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)


def dpo(n=60):
    return "".join(json.dumps({"chosen": talk(f"q {i}", "good"), "rejected": talk(f"q {i}", "bad")})
                   + "\n" for i in range(n))


def sms(ham=60, spam=20, more="", name="SMSSpamCollection"):
    lines = [f"ham\tsee you at {i}, \"ok" for i in range(ham)]
    lines += [f"spam\tWIN £{i // 2} now" for i in range(spam)]          # each of them twice
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("readme", "a corpus")
        archive.writestr(name, "\n".join(lines) + "\n" + more)
    return out.getvalue()


def imdb(n=10, extra=()):
    """extra: (name, text, type of member, what it links to)."""
    members = [(f"aclImdb/{part}/{side}/{i}_{stars}.txt", f"{part} {side} {i}<br /> é", b"0", "")
               for part in ("train", "test") for side, stars in (("pos", 9), ("neg", 2))
               for i in range(n)]
    members += [("aclImdb/README", "about", b"0", ""), ("aclImdb/train/pos", "", b"5", ""),
                ("aclImdb/train/unsup/0_0.txt", "no stars", b"0", ""), *extra]
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, text, kind, link in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, data = kind, link, text.encode("utf-8", "surrogateescape")
            info.size = len(data) if kind == b"0" else 0
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


FILES = {"alpaca": alpaca().encode(), "minimind_sft": minimind().encode(),
         "minimind_dpo": dpo().encode(), "sms_spam": sms(), "imdb": imdb()}


@pytest.fixture
def site(server, monkeypatch):                      # noqa: F811
    """The server with all five files, and the table of addresses that leads to it."""
    for name, data in FILES.items():
        file = public.SETS[name].url.split("#")[0].rsplit("/", 1)[1]
        server.files[f"/{file}"] = data
        monkeypatch.setitem(public.SETS, name, dataclasses.replace(
            public.SETS[name], url=f"{server.url}/{file}", val_fraction=0.2))
    return server


@pytest.fixture
def prep(tmp_path):
    """prep(name, *flags): prepare.py into the folder tmp_path/name, which it returns."""
    def start(name, *flags):
        prepare.main(configure(prepare.Config, [name, f"--out={tmp_path / name}",
                                                f"--cache={tmp_path / 'cache'}", *flags],
                               positional=("source",)))
        return tmp_path / name
    return start


def rows(out, name):
    return [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]


def meta(out):
    return json.loads((out / "meta.json").read_text())


# --- what is written ---------------------------------------------------------------------------
@pytest.mark.parametrize("name, kind", [("alpaca", "sft"), ("minimind_sft", "sft"),
                                        ("minimind_dpo", "preference")])
def test_chats_are_split_by_question_and_stay_as_they_are(site, prep, capsys, name, kind):
    out, prefix = prep(name), "pref_" if kind == "preference" else ""
    train, val = rows(out, prefix + "train"), rows(out, prefix + "val")
    given = json.loads(FILES[name]) if name == "alpaca" else [
        json.loads(line) for line in FILES[name].decode().splitlines()]
    usable = [r for r in given if "No answer" not in str(r)]
    key = json.dumps
    assert Counter(map(key, train + val)) == Counter(map(key, usable))
    assert [key(r) for r in usable if r in train] == [key(r) for r in train]    # in their order
    asked = [{key([r.get("instruction"), r.get("input"), *(r.get("conversations") or r.get(
        "chosen") or [])[:1]]) for r in split} for split in (train, val)]
    assert not asked[0] & asked[1] and 4 <= len(val) < 25
    about = meta(out)
    assert about["left_out"] == len(given) - len(usable) and about["kind"] == "chat"
    if name == "minimind_sft":                  # tools and calls as JSON texts, and thoughts
        (call,) = [r for r in chats.splits(str(out))[0] + chats.splits(str(out))[1] if "tools" in r]
        assert call["tools"] == [{}] and "tools" not in call["messages"][0]
        assert call["messages"][2] == {
            "role": "assistant", "content": "", "reasoning_content": "I shall multiply.",
            "tool_calls": [{"type": "function", "function": {
                "name": "calculate", "arguments": {"sum": "256 * 37"}}}]}
    # the stage that the last line names reads them by the same folder
    records, held, bad = chats.splits(str(out), kind)
    assert (len(records), len(held), bad) == (len(train), len(val), 0)
    script = "dpo.py" if kind == "preference" else "sft.py"
    assert f"next: python {script} --dataset={out}" in capsys.readouterr().out


@pytest.mark.parametrize("name, size", [("sms_spam", 40), ("imdb", 40)])
def test_classes_are_balanced_and_split_in_tenths(site, prep, capsys, name, size):
    """7 : 1 : 2, as many of each class, and copies of a text on one side."""
    out = prep(name)
    parts = [rows(out, split) for split in ("train", "val", "test")]
    every = [r for part in parts for r in part]
    assert len(every) == size and set(Counter(r["label"] for r in every).values()) == {size // 2}
    for part, share in zip(parts, (.7, .1, .2)):        # a copy may move a border by one
        assert abs(len(part) - share * size) <= 2 * (name == "sms_spam")
        assert len({r["label"] for r in part}) == 2 or len(part) < 5
    texts = [{r["text"] for r in part} for part in parts]
    assert not (texts[0] & texts[1] or texts[0] & texts[2] or texts[1] & texts[2])
    if name == "imdb":
        assert {r["label"] for r in every if " pos " in r["text"]} == {"positive"}
        assert {r["label"] for r in every if " neg " in r["text"]} == {"negative"}
    else:
        assert all(r["text"].startswith("WIN £") == (r["label"] == "spam") for r in every)
    assert len(chats.splits(str(out), "labels")[0]) == len(parts[0])
    assert "classify.py --dataset=" in capsys.readouterr().out


def test_the_sizes_of_the_real_sets():
    """747 of each class of SMS: 1,045 / 149 / 300; of 25,000 of each of IMDb, a tenth here."""
    for sizes, expected in (((4827, 747), (1045, 149, 300)), ((2500, 2500), (3500, 500, 1000))):
        made = [(f"{label} {i}", {"label": label}) for label, n in zip("ab", sizes)
                for i in range(n)]
        found = Counter((split, r["label"]) for split, r in public.by_label(made, 1337))
        for split, size in zip(("train", "val", "test"), expected):
            assert found[split, "a"] + found[split, "b"] == size
            # drawn from both alike: within five deviations of a half
            assert abs(found[split, "a"] - size / 2) < 2.5 * size ** 0.5


def test_copies_of_a_text_are_never_on_two_sides():
    """Texts seven times each, so that most borders would fall among copies."""
    made = [(f"{label} {i // 7}", {"label": label}) for label in "ab" for i in range(63)]
    for seed in range(10):
        sides = {}
        for split, record in public.by_label([(t, {**r, "text": t}) for t, r in made], seed):
            assert sides.setdefault(record["text"], split) == split
        assert set(sides.values()) == {"train", "val", "test"}


def test_every_address_names_one_version():
    for name, about in public.SETS.items():
        url, _, digest = about.url.partition("#sha256=")
        assert url.startswith("https://") and len(digest) == 64, name
        assert name in prepare.CHATS and name in prepare.NAMES


# --- once, and again ---------------------------------------------------------------------------
def test_a_seed_gives_the_same_files_and_the_second_run_does_nothing(site, prep, capsys):
    before = state(prep("sms_spam"))
    requests = len(site.log)
    assert state(prep("sms_spam")) == before and "up to date" in capsys.readouterr().err
    assert state(prep("sms_spam", "--force=1")) == before and len(site.log) == requests
    other = prep("sms_spam", "--seed=2")
    assert rows(other, "train") != [json.loads(x) for x in before["train.jsonl"].splitlines()]
    (other / "val.jsonl").write_text("")                # damaged: built again
    assert state(prep("sms_spam")) == before
    assert rows(prep("alpaca", "--val_fraction=0.5"), "val") != rows(prep("alpaca"), "val")


@pytest.mark.parametrize("faults", [["cut"], [503, "cut", "cut"]])
def test_a_broken_download_goes_on(site, prep, faults):
    site.faults = list(faults)
    assert len(rows(prep("imdb"), "train")) == 28


def test_another_file_than_the_one_that_was_published_is_refused(site, prep, monkeypatch):
    monkeypatch.setitem(public.SETS, "alpaca", dataclasses.replace(
        public.SETS["alpaca"], url=public.SETS["alpaca"].url + "#sha256=" + "0" * 64))
    with pytest.raises(UserError, match="sha256 is not 0000"):
        prep("alpaca")


def test_without_a_network_it_says_what_works_and_a_copy_does(site, prep, tmp_path, capsys):
    site.server_close()
    with pytest.raises(UserError) as e:
        prep("sms_spam")
    assert all(x in str(e.value) for x in ("Is there a network", "--file", "skills` makes chats"))
    assert "\n" not in str(e.value) and not (tmp_path / "sms_spam").exists()
    (tmp_path / "copy.zip").write_bytes(FILES["sms_spam"])
    out = prep("sms_spam", f"--file={tmp_path / 'copy.zip'}")
    assert len(rows(out, "train")) in (28, 29)
    with pytest.raises(UserError, match="is no file: fetch http"):
        prep("imdb", f"--file={tmp_path / 'none.gz'}")


def test_a_mirror_has_the_same_files(site, prep):
    site.files["/far/alpaca_data.json"] = site.files.pop("/alpaca_data.json")
    assert rows(prep("alpaca", f"--mirror={site.url}/far/"), "train")


# --- what is not what it should be -------------------------------------------------------------
PAGE = b"<html>please log in</html>"


@pytest.mark.parametrize("name, data, says", [
    ("alpaca", PAGE, "line 1: not JSON"), ("alpaca", alpaca().encode()[:999], "line .*not JSON"),
    ("alpaca", b"[]", "nothing for train"), ("minimind_dpo", alpaca().encode(), "line 2: .*chosen"),
    ("sms_spam", PAGE, "not the whole archive of sms_spam"),
    ("sms_spam", sms()[:-30], "not the whole archive"),
    ("sms_spam", sms(name="../SMSSpamCollection"), "not the whole archive.*no item named"),
    ("sms_spam", imdb(), "not the whole archive"), ("imdb", PAGE, "not the whole archive of imdb"),
    ("imdb", imdb()[:-200], "not the whole archive"), ("imdb", sms(), "not the whole archive"),
    ("imdb", imdb(0), "nothing for train"), ("sms_spam", sms(spam=0), "nothing but .ham.")],
    ids=lambda x: x if x in public.SETS else "")
def test_another_file_is_one_sentence_and_leaves_what_there_was(site, prep, tmp_path, name, data,
                                                                says):
    out = prep(name)
    before = state(out)
    suffix = {"alpaca": "json", "minimind_dpo": "jsonl"}.get(name, "bin")
    (tmp_path / f"odd.{suffix}").write_bytes(data)
    with pytest.raises(UserError, match=says) as e:
        prep(name, f"--file={tmp_path / f'odd.{suffix}'}")
    assert "\n" not in str(e.value) and state(out) == before


def test_a_hostile_archive_writes_nowhere_else(site, prep, tmp_path, monkeypatch):
    """Names that climb, links, devices: read by name, never unpacked; and a bomb is cut."""
    secret = tmp_path / "secret.txt"
    secret.write_text("the key")
    climbing = [("../../evil.txt", "x", b"0", ""), (str(tmp_path / "evil.txt"), "x", b"0", ""),
                ("aclImdb/train/pos/../../../evil_1.txt", "x", b"0", "")]
    site.files["/aclImdb_v1.tar.gz"] = imdb(extra=climbing)
    out = prep("imdb")
    assert sum(len(rows(out, s)) for s in ("train", "val", "test")) == 40
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "imdb", "secret.txt"]
    link = [("aclImdb/train/pos/99_9.txt", "", kind, str(secret)) for kind in (b"1", b"2", b"3")]
    (tmp_path / "links.tar.gz").write_bytes(imdb(extra=link))
    with pytest.raises(UserError, match="pos/99_9.txt: not a file"):
        prep("imdb", f"--file={tmp_path / 'links.tar.gz'}")
    out = prep("imdb", f"--file={tmp_path / 'links.tar.gz'}", "--skip_bad")
    assert meta(out)["bad"] == 3
    assert "the key" not in "".join((out / f"{s}.jsonl").read_text() for s in ("train", "test"))
    bomb = [("aclImdb/train/pos/77_9.txt", "0" * 5_000_000, b"0", "")]
    (tmp_path / "bomb.tar.gz").write_bytes(imdb(extra=bomb))
    monkeypatch.setattr(public, "LIMIT", 1_000_000)
    with pytest.raises(UserError, match="unpacks to more than 1,000,000"):
        prep("imdb", f"--file={tmp_path / 'bomb.tar.gz'}")
    monkeypatch.setattr(public, "TEXT_LIMIT", 1000)
    with pytest.raises(UserError, match="larger than 1,000 bytes"):
        prep("sms_spam", "--force=1")


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XGLTYPE])
def test_an_archive_whose_names_are_books_is_refused(tmp_path, kind):
    """The header says how long a name is; it is not read into memory to see."""
    member = tarfile.TarInfo("aclImdb/train/pos/0_9.txt")
    member.type, member.size = kind, 1 << 29
    path = tmp_path / "a.tar.gz"
    path.write_bytes(gzip.compress(member.tobuf() + bytes(1 << 16)))
    with pytest.raises(tarfile.ReadError, match="536,870,912 bytes"):
        list(public.reviews(path, loader.Reader()))


@pytest.mark.parametrize("name, data, line, bad", [
    ("minimind_sft", minimind() + '{"conversations": [{"role": "king"}]}\n[1]\n', 62, 2),
    ("minimind_dpo", dpo() + '{"chosen": []}\n', 61, 1),
    ("alpaca", json.dumps([{"text": "?"}, *json.loads(alpaca())]), 1, 1),
    ("sms_spam", sms(more="no tab here\nspom\tx\n\n"), 81, 2),
    ("imdb", imdb(extra=[("aclImdb/test/neg/5_1.txt", "\udcff", b"0", "")]), None, 1)],
    ids=lambda x: x if x in public.SETS else "")
def test_bad_records_are_named_by_line_and_skipped_only_on_request(site, prep, tmp_path, name, data,
                                                                   line, bad, capsys):
    site.files[f"/{public.SETS[name].url.rsplit('/', 1)[1]}"] = data if isinstance(
        data, bytes) else data.encode()
    with pytest.raises(UserError, match=f"line {line}\\b.*--skip_bad" if line else "5_1.txt"):
        prep(name)
    assert not (tmp_path / name).exists()
    out = prep(name, "--skip_bad=1")
    assert meta(out)["bad"] == bad and f"{bad} records were bad" in capsys.readouterr().err


@pytest.mark.parametrize("argv, says", [
    (["alpaca", "--vocab_size=9"], "--vocab_size has no meaning"), (["imdb", "--key=x"], "--key"),
    (["imdb", "--val_fraction=0.3"], "--val_fraction"),
    (["alpaca", "--val_fraction=2"], "val_fraction is 2.0: it must be below 1"),
    (["alpaca", "imdb", "--out=x"], "prepare it alone"), (["alpaka"], "minimind_sft")], ids=str)
def test_wrong_settings_are_one_sentence(argv, says):
    with pytest.raises(UserError, match=says):
        prepare.main(configure(prepare.Config, argv, positional=("source",)))
