"""Public chat and classification sets by name: fetched, checked, split, in files for the stages.

    python data/prepare.py alpaca               # 52,002 instructions: sft.py --dataset=alpaca
    python data/prepare.py minimind_sft         # 905,718 chats of minimind, 1.7 GB
    python data/prepare.py minimind_dpo         # 17,166 preferences: dpo.py --dataset=minimind_dpo
    python data/prepare.py sms_spam             # classify.py --dataset=sms_spam
    python data/prepare.py imdb                 # the same, 50,000 film reviews

No GPU is used, and one core; expect the time of the download, and a minute for a gigabyte. Without
a network, --file=PATH takes a copy of the file, and --mirror=URL another place to fetch it from.

Records stay as they were published, {train,val}.jsonl, of preferences pref_{train,val}.jsonl; what
is written can be trained on (a bad record is named by its line, or with --skip_bad=1 counted), and
meta.json, written last, says that all of it is there. The split is by the hash of what is asked:
two answers to one question are never on both sides. Classes get as many texts each as the rarest
has, split .7/.1/.2 into train, val and test, where copies of a text stay together.

Archives are read as streams, and never unpacked: a name in one cannot choose where it lands.
"""
from __future__ import annotations

import gzip
import json
import re
import tarfile
import zipfile
import zlib
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Callable, Iterable, Iterator

from config import UserError, refuse_to_run
from data import chats, loader
from data.chat_files import is_complete, print_report
from data.download import HUB, Progress, download, note
from data.layouts import ADAPTERS
from data.shards import draw_uniform, hash_file
from formats.atomic import build_directory
from tasks.skills import SPLITS

ROOT = Path(__file__).resolve().parent.parent
VERSION = 2                             # of what is written: a change builds it again
LIMIT = 2 << 30                         # bytes that an archive may hold: IMDb's are 0.5 GB
TEXT_LIMIT = 1 << 24                    # bytes of one of its files
NAME_LIMIT = 1 << 16                    # bytes of a name in it, or of a header with more of it
# All that a file which is something else, or cut off, makes the readers of archives say
BROKEN = (zipfile.BadZipFile, tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, KeyError,
          ValueError, NotImplementedError, RuntimeError)
Found = Iterator[tuple[str, dict[str, Any]]]            # ("FILE, line N", record)


# --- what is in a download ---------------------------------------------------------------------
def lines(path: Path, reader: loader.Reader) -> Found:
    """JSON lines, or one array, in a layout that data/chats.py knows."""
    return reader.records(path)


def sms(path: Path, reader: loader.Reader) -> Found:
    """The zip of UCI: a file of lines `ham<TAB>text` and `spam<TAB>text`."""
    try:
        with zipfile.ZipFile(path) as archive:
            with archive.open(inside := "SMSSpamCollection") as f:
                data = f.read(TEXT_LIMIT + 1)   # the size in the header may be a lie
    except OSError as e:                        # a place in it that lies before its beginning
        raise zipfile.BadZipFile(e.strerror) from None
    if len(data) > TEXT_LIMIT:
        raise ValueError(f"{inside} is larger than {TEXT_LIMIT:,} bytes")
    for number, line in enumerate(data.decode("utf-8").split("\n"), 1):
        label, tab, text = line.rstrip("\r").partition("\t")
        where = f"{path}, {inside}, line {number}"
        if tab and label in ("ham", "spam"):
            yield where, {"text": text, "label": label}
        elif line.strip():
            reader.fault(f"{where}: it does not begin with ham or spam and a tab")
    reader.consumed = path.stat().st_size


class Bounded:
    """A stream that ends with an error behind `limit` bytes: a small archive may unpack to any."""

    def __init__(self, stream: BinaryIO, limit: int):
        self.stream = stream
        self.left = limit

    def read(self, n: int = -1) -> bytes:
        data = self.stream.read(min(n, self.left + 1) if n >= 0 else self.left + 1)
        self.left -= len(data)
        if self.left < 0:
            raise ValueError(f"it unpacks to more than {LIMIT:,} bytes")
        return data


class Member(tarfile.TarInfo):
    """A member of an archive whose name is not read into memory if it is a book long."""

    @classmethod
    def frombuf(cls, *args: Any) -> "Member":
        """A header of 512 bytes -> the member; those that only hold a long name have a size."""
        member = super().frombuf(*args)
        plain = (*tarfile.REGULAR_TYPES, tarfile.DIRTYPE)
        if member.type not in plain and member.size > NAME_LIMIT:
            raise tarfile.ReadError(f"a header in it has {member.size:,} bytes")
        return member


def reviews(path: Path, reader: loader.Reader) -> Found:
    """Stanford's tar.gz: aclImdb/{train,test}/{pos,neg}/NUMBER_STARS.txt, a review each."""
    name = re.compile(r"(?:\./)?aclImdb/(?:train|test)/(pos|neg)/\d+_\d+\.txt")
    with open(path, "rb") as raw, gzip.open(raw) as packed:
        stream = Bounded(packed, LIMIT)
        with tarfile.open(fileobj=stream, mode="r|", tarinfo=Member) as archive:
            for member in archive:
                reader.consumed = raw.tell()
                found = name.fullmatch(member.name)
                if not found or member.isdir():         # word counts, reviews without stars
                    continue
                where = f"{path}, {member.name}"
                if not member.isreg() or member.size > TEXT_LIMIT:      # a link, a device
                    reader.fault(f"{where}: not a file of a review's size")
                    continue
                try:
                    text = archive.extractfile(member).read().decode("utf-8")
                except UnicodeDecodeError as e:
                    reader.fault(f"{where} is not UTF-8 text: byte {e.start:,} is invalid")
                    continue
                yield where, {"text": text, "label": {"pos": "positive"}.get(found[1], "negative")}
        while stream.read(loader.BLOCK):        # gzip's checksum comes at its very end
            pass


# --- which sets there are ----------------------------------------------------------------------
@dataclass(frozen=True)
class Public:
    """A set with a name: its file, and which stage it is for."""
    url: str                            # a #sha256=… at the end is checked
    kind: str = "sft"                   # of data/chats.py: sft, preference or labels
    val_fraction: float = 0.05          # share of the questions kept for validation
    read: Callable[[Path, loader.Reader], Found] = lines
    script: str = "sft.py"              # the stage that trains on it


# A version each, whose hash is known: what is prepared is the same everywhere.
MINIMIND = (f"{HUB}/jingyaogong/minimind_dataset/resolve/"
            "312afb4f76391145c6902f765bb51691c09a12f5/{}.jsonl#sha256={}")
SETS = {
    "alpaca": Public("https://raw.githubusercontent.com/tatsu-lab/stanford_alpaca/main/"
                     "alpaca_data.json#sha256="
                     "2eddafc6b977608d778aaab8dfc7e50e547b3af9826dfb9e909d9fc362e4a419"),
    "minimind_sft": Public(MINIMIND.format(
        "sft_t2t_mini", "abb1e76b2056e14728beb78db96b7b3c491a0bef1ed3e34a9b381b28f29fa518"),
        val_fraction=0.002),
    "minimind_dpo": Public(MINIMIND.format(
        "dpo", "ee934a8a455ccc99d1334d63e1254dd1d64f497fd067cfcbb71e3043f5b46768"),
        "preference", script="dpo.py"),
    "sms_spam": Public("https://archive.ics.uci.edu/static/public/228/sms+spam+collection.zip"
                       "#sha256=1587ea43e58e82b14ff1f5425c88e17f8496bfcdb67a583dbff9eefaf9963ce3",
                       "labels", read=sms, script="classify.py"),
    "imdb": Public("https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"
                   "#sha256=c40f74a18d3b61f90feba1e17730e0d38e8b97c05fde7008942e91923d1658fe",
                   "labels", read=reviews, script="classify.py"),
}
SHARES = (7, 1, 2)                      # tenths of a labelled set: train, val, test


# --- records -> splits -------------------------------------------------------------------------


def trainable(found: Found, kind: str, reader: loader.Reader) -> Iterator[tuple[str, dict]]:
    """(what is asked, record) of all that can be trained on; the others are faults.

    Records without an answer, or with two equal ones, are no mistakes of the file: they are left
    out, and counted in reader.left_out.
    """
    reader.left_out = 0
    for where, record in found:
        try:
            made = ADAPTERS[kind](record)
        except UserError as e:
            # --ignore_keys is of the stages: what was published is not changed here
            reader.fault(f"{where}: {str(e).partition('; --ignore_keys')[0]}")
            continue
        if made is None:
            reader.left_out += 1
            continue
        turns = made.get("messages", made.get("chosen", ()))
        asked = next((k for k, m in enumerate(turns) if m["role"] == "assistant"), None)
        if kind != "labels" and asked is None:
            reader.left_out += 1
            continue
        yield (made["text"] if kind == "labels" else json.dumps(
            [m["content"] for m in turns[:asked]])), record


def by_question(rows: Iterable[tuple[str, dict]], share: float, seed: int
                ) -> Iterator[tuple[str, dict]]:
    """(split, record), as they come: of a set that need not fit in memory."""
    for asked, record in rows:
        yield "val" if draw_uniform(seed, asked) < share else "train", record


def by_label(rows: Iterable[tuple[str, dict]], seed: int) -> Iterator[tuple[str, dict]]:
    """(split, record): as many of each label, in tenths as SHARES says, in a random order."""
    groups: dict[str, list] = defaultdict(list)
    for text, record in rows:
        groups[record["label"]].append((text, record))
    if len(groups) == 1:
        raise UserError(f"there is nothing but {next(iter(groups))!r}: is this the whole file?")
    size = min(map(len, groups.values()), default=0)
    # in the order of the marks by which they are chosen, the larger class would come
    # first, all of it in train
    chosen = []
    for group in groups.values():
        group.sort(key=lambda row: draw_uniform(f"{seed} choice", row[0]))
        chosen += group[:size]
    # a random order in which copies of a text are neighbours
    ordered = sorted(chosen, key=lambda row: (draw_uniform(seed, row[0]), row[0]))
    splits = list(zip(SPLITS, SHARES))
    start = 0
    for i, (split, share) in enumerate(splits):
        end = start + len(ordered) * share // sum(SHARES) if i < len(splits) - 1 else len(ordered)
        while 0 < end < len(ordered) and ordered[end][0] == ordered[end - 1][0]:
            end += 1                    # a copy that would be on the other side
        yield from ((split, record) for _, record in ordered[start:end])
        start = end


def write(folder: Path, names: Iterable[str], rows: Iterable[tuple[str, dict]], prefix: str
          ) -> dict[str, dict[str, Any]]:
    """prefix + split + .jsonl for each split; returns what meta.json says of them."""
    with ExitStack() as stack:
        # half a surrogate pair, which UTF-8 cannot hold, is written as the escape that JSON has
        how = dict(encoding="utf-8", errors="backslashreplace", newline="\n")
        files = {name: stack.enter_context(open(folder / f"{prefix}{name}.jsonl", "w", **how))
                 for name in names}
        counts = dict.fromkeys(files, 0)
        for split, record in rows:
            files[split].write(json.dumps(record, ensure_ascii=False) + "\n")
            counts[split] += 1
    about = {}
    for name, count in counts.items():
        path = folder / f"{prefix}{name}.jsonl"
        if not count:
            raise UserError(f"there is nothing for {name}: {sum(counts.values())} records are too "
                            "few, is this the whole file?")
        about[prefix + name] = {"file": path.name, "records": count,
                                "bytes": path.stat().st_size, "sha256": hash_file(path)}
    return about


# --- the way it goes ---------------------------------------------------------------------------
def inherit(cfg: Any) -> Any:
    """prepare.py's settings as they are; one that means nothing here is a mistake, not ignored."""
    ours = {"source", "out", "seed", "force", "file", "cache", "mirror", "skip_bad"}
    ours |= {"val_fraction"} if SETS[cfg.source[0]].kind != "labels" else set()
    if wrong := sorted(getattr(cfg, "given", frozenset()) - ours):
        raise UserError(f"--{wrong[0]} has no meaning for {cfg.source[0]}: here are "
                        f"--{', --'.join(sorted(ours - {'source'}))}")
    if cfg.val_fraction is not None and not 0 < cfg.val_fraction < 1:
        raise UserError(f"val_fraction is {cfg.val_fraction}; it must lie between 0 and 1")
    return cfg


def get(cfg: Any, public: Public, found: str) -> Path:
    """The file to read: a copy that the user has, whose hash is `found`, or the download."""
    url, _, want = public.url.partition("#sha256=")
    if cfg.file:
        if not Path(cfg.file).is_file():
            raise UserError(f"--file={cfg.file} is no file: fetch {url} elsewhere, and copy it")
        if want and found != want:
            note(f"{cfg.file} is not, byte for byte, what lies at {url}")
        return Path(cfg.file)
    url = public.url
    if cfg.mirror:
        url = f"{cfg.mirror.rstrip('/')}/{url.rsplit('/', 1)[1]}"
    try:
        return download(url, Path(cfg.cache or ROOT / "data" / ".cache").expanduser())
    except UserError as e:
        raise UserError(f"{e}; `python data/prepare.py skills` makes chats that need none") from e


def main(cfg: Any) -> None:
    name = cfg.source[0]
    public = SETS[name]
    out = Path(cfg.out or ROOT / "data" / name).expanduser()
    share = public.val_fraction if cfg.val_fraction is None else cfg.val_fraction
    # what is read, by its hash: the same whether it was fetched or copied
    source = public.url.partition("#sha256=")[2] or public.url
    if cfg.file and Path(cfg.file).is_file():
        source = hash_file(Path(cfg.file))
    settings = {"version": VERSION, "seed": cfg.seed, "skip_bad": cfg.skip_bad,
                "val_fraction": share, "input": source}
    labels = public.kind == "labels"
    prefix = chats.PREFIX.get(public.kind, "")
    with build_directory(out, lambda: not cfg.force and is_complete(out, settings)) as folder:
        if folder is None:
            note(f"{out} is up to date, nothing to do (--force=1 builds it again)")
            return print_report(out, public.script)
        path = get(cfg, public, source)
        reader = loader.Reader(cfg.skip_bad)
        show = Progress(f"reading {path.name}", path.stat().st_size)

        def shown(found: Found) -> Found:
            for row in found:
                show(reader.consumed)
                yield row

        try:
            rows = trainable(shown(public.read(path, reader)), public.kind, reader)
            rows = by_label(rows, cfg.seed) if labels else by_question(rows, share, cfg.seed)
            files = write(folder, SPLITS if labels else SPLITS[:2], rows, prefix)
        except BROKEN as e:
            raise UserError(f"{path} is not the whole archive of {name}: {str(e)[:200]}; delete "
                            "it and run this again") from None
        show(path.stat().st_size, last=True)
        for count, what in ((reader.left_out, "without an answer, or with two equal ones, were "
                             "left out"), (reader.bad, "were bad, and dropped")):
            if count:
                note(f"{count:,} records {what}")
        meta = {"version": VERSION, "kind": "labels" if labels else "chat", "dataset": out.name,
                "source": name, "script": public.script, "settings": settings,
                "left_out": reader.left_out, "bad": reader.bad, "files": files}
        (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
    print_report(out, public.script)


if __name__ == "__main__":
    refuse_to_run()
