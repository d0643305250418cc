"""One worker's rows of all tables and their optimiser statistics in a file, checked block by block.

rows-00001-of-00002.bin    the sections' values, little-endian, one after the other
rows-00001-of-00002.json   the sections: table, part, first row, rows, values a row, offset, sha256 of every block

A block is a number of whole rows, so that any worker reads just the blocks that hold rows of its own, and knows
that they are what was written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from cdr_dist.data import storage
from cdr_dist.errors import UserError

BLOCK_BYTES = 16 << 20
READERS = 4


@dataclass(frozen=True)
class Section:
    """Consecutive rows of one table's weights, or of one of its optimiser's statistics (part: weights, state0, …)."""

    table: str
    part: str
    first: int
    rows: int
    width: int
    offset: int
    block_rows: int
    sha256: list[str]

    def blocks(self) -> Iterator[tuple[int, int, str]]:
        """(first row, row behind the last, sha256) of every block; rows are the table's."""
        for i, digest in enumerate(self.sha256):
            start = i * self.block_rows
            yield self.first + start, self.first + min(start + self.block_rows, self.rows), digest


@dataclass(frozen=True)
class RowsFile:
    """What the .json holds."""

    file: str
    size: int
    updates: int
    """Of the fused optimiser."""
    sections: list[Section]

    def to_json(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @staticmethod
    def from_json(text: bytes) -> RowsFile:
        raw = json.loads(text)
        return RowsFile(**{**raw, "sections": [Section(**s) for s in raw["sections"]]})


Parts = Mapping[tuple[str, str], tuple[int, Tensor]]
"""(table, part) -> (first row, values [rows] or [rows, width] of float32)."""


def write_rows(folder: str, file: str, parts: Parts, updates: int) -> RowsFile:
    """Writes the .bin; the caller writes the .json, which makes it count. Memory beyond `parts`: one block."""
    sections, offset = [], 0
    with storage.open_output(storage.join(folder, file)) as out:
        for (table, part), (first, values) in parts.items():
            two = values.view(len(values), -1)
            width = two.shape[1]
            block_rows = max(1, BLOCK_BYTES // (4 * max(width, 1)))
            digests = []
            for start in range(0, len(two), block_rows):
                block = _bytes(two[start : start + block_rows])
                digests.append(hashlib.sha256(block).hexdigest())
                out.write(block)
            sections.append(Section(table, part, first, len(two), width, offset, block_rows, digests))
            offset += 4 * two.numel()
    return RowsFile(file, offset, updates, sections)


def read_rows(folder: str, files: Sequence[RowsFile], parts: Parts, grown: bool = False) -> None:
    """Fills `parts` from files that any number of workers wrote. UserError: rows that no file has, a damaged block.

    grown: tables may have more rows than the files; those stay as they are.
    """
    wanted = dict(parts)
    with ThreadPoolExecutor(READERS) as pool:
        tasks, filled, whole = [], dict.fromkeys(wanted, 0), set[str]()
        for file in files:
            for section in file.sections:
                key = (section.table, section.part)
                if key not in wanted:
                    continue
                first, values = wanted[key]
                into = values.view(len(values), -1)
                if into.shape[1] != section.width:
                    raise UserError(f"{section.table}: rows of {section.width} values, not {into.shape[1]}")
                for start, stop, digest in section.blocks():
                    low, high = max(start, first), min(stop, first + len(into))
                    if low < high:
                        at = section.offset + 4 * section.width * (start - section.first)
                        place = (at, at + 4 * section.width * (stop - start))
                        target = into[low - first : high - first]
                        uri = storage.join(folder, file.file)
                        if uri not in whole and (size := storage.size(uri)) != file.size:
                            raise UserError(f"{uri}: {size} bytes, not {file.size}")
                        whole.add(uri)
                        tasks.append(pool.submit(_fill, uri, place, digest, low - start, target))
                        filled[key] += high - low
        for task in tasks:
            task.result()
    for (table, part), (_, values) in wanted.items():
        if filled[table, part] != len(values) and not grown:
            raise UserError(f"{table}: {part} of {filled[table, part]} rows are there, {len(values)} are needed")


def _fill(uri: str, place: tuple[int, int], digest: str, skipped: int, into: Tensor) -> None:
    block = storage.read_range(uri, *place)
    if hashlib.sha256(block).hexdigest() != digest:
        raise UserError(f"{uri}: bytes {place[0]} to {place[1]} are not those that were written")
    values = torch.from_numpy(np.frombuffer(bytearray(block), dtype="<f4")).view(-1, into.shape[1])
    into.copy_(values[skipped : skipped + len(into)])


def _bytes(values: Tensor) -> memoryview:
    return np.ascontiguousarray(values.cpu().numpy(), dtype="<f4").reshape(-1).view(np.uint8).data
