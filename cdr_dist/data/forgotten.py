"""Whom a dataset has forgotten: DATA/forgotten.json, so that no dataset on top of it brings them back from the logs.

It holds salted hashes of keys and the ids that were theirs (jobs/forget.py finds the rest of them by it, where it was
killed half-way). A hash hides a key from who looks, not from who tries all keys that there may be.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import polars as pl

from cdr_dist.data import storage
from cdr_dist.errors import UserError

if TYPE_CHECKING:
    from cdr_dist.data.prepare_options import PrepareOptions

FILE = "forgotten.json"


@dataclass(frozen=True)
class Forgotten:
    """users: hash of a key -> the vocabulary id that it had; None: it had none of its own."""

    salt: str = field(default_factory=lambda: secrets.token_hex(16))
    users: dict[str, int | None] = field(default_factory=dict)

    def __contains__(self, key: str) -> bool:
        return self._hash(key) in self.users

    def id_of(self, key: str) -> int | None:
        return self.users.get(self._hash(key))

    def among(self, keys: Iterable[str]) -> list[str]:
        """Those of the keys that are listed."""
        return [key for key in keys if key in self] if self.users else []

    def left_out_of(self, rows: pl.DataFrame, column: str) -> pl.DataFrame:
        """The rows but those whose key, in `column`, is listed."""
        listed = self.among(rows[column].unique().to_list())
        return rows.filter(~pl.col(column).is_in(listed)) if listed else rows

    def and_also(self, ids: Mapping[str, int | None]) -> Forgotten:
        """With these keys, too, and their ids; an id that is known already stays."""
        more = {self._hash(key): number for key, number in ids.items()}
        known = {one: number for one, number in self.users.items() if number is not None or one not in more}
        return Forgotten(self.salt, self.users | more | known)

    def _hash(self, key: str) -> str:
        return hashlib.sha256(f"{self.salt}{key}".encode()).hexdigest()


def read(folder: str) -> Forgotten:
    """That of a dataset folder; nobody, where it has none."""
    uri = storage.join(folder, FILE)
    return read_file(uri) if storage.exists(uri) else Forgotten()


def read_file(uri: str) -> Forgotten:
    """UserError: not there, or damaged."""
    try:
        raw = json.loads(storage.read_bytes(uri))
        found = Forgotten(raw["salt"], raw["users"])
        whole = isinstance(found.salt, str) and all(n is None or isinstance(n, int) for n in found.users.values())
    except (ValueError, TypeError, KeyError, AttributeError):
        whole = False
    if not whole:
        raise UserError(f"{uri}: damaged: who was forgotten is not known; copy it again")
    return found


def write(folder: str, forgotten: Forgotten) -> None:
    storage.write_bytes(storage.join(folder, FILE), (json.dumps(asdict(forgotten), indent=1) + "\n").encode())


def of(options: PrepareOptions) -> Forgotten:
    """Whom prepare leaves out: whom the dataset that is extended has forgotten, or a file says."""
    if options.extends:
        return read(options.extends)
    if options.forgotten:  # of another dataset, whose ids say nothing here
        listed = read_file(options.forgotten)
        return Forgotten(listed.salt, dict.fromkeys(listed.users))
    return Forgotten()
