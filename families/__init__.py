"""Families: one file per published architecture; adding one is adding a file with its ROWS.

    FAMILIES["qwen3"]           # the row of a model_type, by which its files are read and written
    SCRATCH["gemma3"]           # the same by the name of --family, of those that can be built
    PRESETS["qwen3-0.6b"]       # the ModelConfig fields of a published shape
"""
from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from config import refuse_to_run
from families.base import Family


def read_rows() -> tuple[Family, ...]:
    """Return the ROWS of every file of this folder, in the order in which they are written.

    Of rows that fit a model, the one that needs fewer biases of zero is written, then the first.
    """
    stems = sorted(p.stem for p in Path(__file__).parent.glob("[a-z]*.py"))
    rows = [row for stem in stems if stem not in ("base", "config")
            for row in importlib.import_module(f"families.{stem}").ROWS]
    return tuple(sorted(rows, key=lambda row: row.rank))


ROWS = read_rows()
FAMILIES: dict[str, Family] = {row.model_type: row for row in ROWS}
SCRATCH: dict[str, Family] = {row.title: row for row in ROWS if row.scratch is not None}
PRESETS: dict[str, dict[str, Any]] = {
    name: {**row.flags, **row.from_shape(shape), **shape}
    for row in ROWS for name, shape in row.presets.items()}
# names of --init_from that mean published weights -> owner on the hub
PRETRAINED: dict[str, str] = {name: row.hub for row in ROWS if row.hub for name in row.presets}
# models that see as well, whose text model is read (formats/wrapped.py): model_type -> that of the
# text model, where text_config does not say it
WRAPPERS: dict[str, str] = {row.wraps: row.model_type for row in ROWS if row.wraps}
LAYOUTS: dict[str, Family] = {row.layout: row for row in ROWS if row.layout}
DEFAULT = ROWS[0].title             # of --family and of model.py --show: nanoGPT's model
# Any combination of flags that no family has; the names are ours and only this project reads it
HANDMADE = Family("handmade", "", {}, (), {})


if __name__ == "__main__":
    refuse_to_run()
