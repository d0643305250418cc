"""Rows of tables, overwritten by zeros in every checkpoint of a run: weights and the fused optimiser's statistics.

Zeros and not the mean of the table: they say nothing about whoever had the row, cost no pass over the table, and show
by themselves that a row is cleared. Nothing looks the row up any more, as its id is nobody's.

A checkpoint is written anew, as another attempt at its step (checkpoint.py), and the old one removed when that is
complete: a crash leaves one of the two whole.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from cdr_dist.crash_points import durable
from cdr_dist.data import storage
from cdr_dist.errors import UserError
from cdr_dist.training.checkpoint import COMPLETE, Saved, all_of, complete, drop, is_index
from cdr_dist.training.rows_file import RowsFile, Section


def clear_rows(folder: str, tables: set[str], rows: Sequence[int], still_ours: Callable[[], None]) -> int:
    """folder: a run's `checkpoints`; rows: of each of the tables -> how many checkpoints had values in them.

    Incomplete checkpoints, and earlier attempts at a step, are removed. still_ours: raises where another job has taken
    the run over. UserError: a damaged checkpoint.
    """
    latest = {saved.step: saved for saved in complete(folder)}
    for saved in all_of(folder):
        if latest.get(saved.step) != saved:
            still_ours()
            drop(saved.uri)
    cleared = 0
    for saved in latest.values():
        files = {name: RowsFile.from_json(saved.read(name)) for name in _listed(saved) if is_index(name)}
        if any(_has_values(saved, file, tables, rows) for file in files.values()):
            _write_anew(folder, saved, files, tables, rows, still_ours)
            still_ours()
            drop(saved.uri)
            cleared += 1
    return cleared


def _listed(saved: Saved) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(storage.read_bytes(storage.join(saved.uri, COMPLETE)))
    except ValueError as error:
        raise saved.damaged(f"{COMPLETE} is no JSON") from error
    return found


def _held(section: Section, tables: set[str], rows: Sequence[int]) -> list[int]:
    """Which of the rows it holds."""
    return [r for r in rows if section.first <= r < section.first + section.rows] if section.table in tables else []


def _has_values(saved: Saved, file: RowsFile, tables: set[str], rows: Sequence[int]) -> bool:
    uri = storage.join(saved.uri, file.file)
    for section in file.sections:
        for row in _held(section, tables, rows):
            at = section.offset + 4 * section.width * (row - section.first)
            if any(storage.read_range(uri, at, at + 4 * section.width)):
                return True
    return False


def _write_anew(
    folder: str,
    saved: Saved,
    files: dict[str, RowsFile],
    tables: set[str],
    rows: Sequence[int],
    still_ours: Callable[[], None],
) -> None:
    uri = storage.join(folder, f"step-{saved.step:08d}-{saved.attempt + 1}")
    listed = {}
    with durable("forget.checkpoint"):
        for name in _listed(saved):
            file = files.get(name)
            content = saved.read(name) if file is None else _copied(saved, file, uri, tables, rows).to_json()
            storage.write_bytes(storage.join(uri, name), content)
            listed[name] = [len(content), storage.sha256(content)]
    still_ours()
    with durable("forget.complete"):
        storage.write_bytes(storage.join(uri, COMPLETE), json.dumps(listed, indent=1).encode())


def _copied(saved: Saved, file: RowsFile, into: str, tables: set[str], rows: Sequence[int]) -> RowsFile:
    """Writes the .bin with zeros in the rows, a block at a time."""
    start, sections = storage.join(saved.uri, file.file), []
    with storage.open_output(storage.join(into, file.file)) as out:
        for section in file.sections:
            digests, held = [], _held(section, tables, rows)
            for first, stop, digest in section.blocks():
                at = section.offset + 4 * section.width * (first - section.first)
                block = storage.read_range(start, at, at + 4 * section.width * (stop - first))
                if hashlib.sha256(block).hexdigest() != digest:
                    raise UserError(f"{start}: bytes {at} to {at + len(block)} are not those that were written")
                if mine := [row - first for row in held if first <= row < stop]:
                    values = np.frombuffer(bytearray(block), dtype="<f4").reshape(-1, section.width)
                    values[mine] = 0.0
                    block = values.tobytes()
                digests.append(hashlib.sha256(block).hexdigest())
                out.write(block)
            sections.append(dataclasses.replace(section, sha256=digests))
    return dataclasses.replace(file, sections=sections)
