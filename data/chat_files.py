"""Chat datasets on disk: .jsonl files, and meta.json with their hashes, written last.

data/skills.py and data/public.py write them, data/chats.py reads them.
"""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from config import refuse_to_run
from data.shards import hash_file

ROOT = Path(__file__).resolve().parent.parent


def write_records(folder: Path, name: str, records: list[dict[str, Any]]) -> dict[str, Any]:
    """Write name.jsonl, one record per line; return its entry in meta.json."""
    path = folder / f"{name}.jsonl"
    with open(path, "w", encoding="utf-8", newline="\n") as f:
        f.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    return {"file": path.name, "records": len(records), "bytes": path.stat().st_size,
            "sha256": hash_file(path)}


def is_complete(out: Path, settings: dict[str, Any]) -> bool:
    """Return whether `out` holds exactly these settings' files, byte for byte."""
    try:
        meta = json.loads((out / "meta.json").read_text(encoding="utf-8"))
        return meta["settings"] == settings and all(
            hash_file(out / f"{name}.jsonl") == about["sha256"]
            for name, about in meta["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False


def print_report(out: Path, script: str = "sft.py") -> None:
    """Print the files of a chat dataset and the command that comes next."""
    files = json.loads((out / "meta.json").read_text(encoding="utf-8"))["files"]
    print(f"{out}: {sum(about['records'] for about in files.values()):,} records")
    print("file            records           bytes")
    for name, about in files.items():
        print(f"{name:<10}{about['records']:>13,} {about['bytes']:>15,}")
    home = out.resolve().parent == ROOT / "data"
    print(f"next: python {script} --dataset={out.name if home else out}")


if __name__ == "__main__":
    refuse_to_run()
