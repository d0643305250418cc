"""The vocabularies of an earlier dataset that a new one extends: an id never changes, new keys come behind.

Of another target domain, users and source items keep their ids, and the target's items are new.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cached_property

import polars as pl

from cdr_dist.data import storage
from cdr_dist.data.dataset import FIRST_ID, Manifest, read_manifest
from cdr_dist.data.feature_names import USER
from cdr_dist.errors import UserError


@dataclass(frozen=True)
class Numbered:
    """keys: key, id, by id. rows: of the table, so that the next id is `rows`; some ids may have lost their key."""

    keys: pl.DataFrame
    rows: int

    @classmethod
    def nothing(cls) -> Numbered:
        return cls(pl.DataFrame(schema={"key": pl.String, "id": pl.Int32}), FIRST_ID)


class Earlier:
    """A dataset folder's vocabularies, each read when it is asked for. target: the name of the new one's."""

    def __init__(self, folder: str, target: str) -> None:
        self._folder, self._target = folder, target

    @cached_property
    def manifest(self) -> Manifest:
        return read_manifest(self._folder)

    def knows(self, role: str) -> bool:
        """Whether the items of a role are of the same domain."""
        return role != "target" or self.manifest.target_domain == self._target

    def numbered(self, name: str) -> Numbered:
        if not self.knows(name.partition("_")[0]):
            return Numbered.nothing()
        return Numbered(self._read(name).select("key", "id"), self.manifest.rows[name])

    def items(self, role: str) -> pl.DataFrame:
        """item_id and category, as texts, and a list of texts for each declared column."""
        read = self._read(f"{role}_item")
        named = read.select("key", "category").rename({"key": "item_id", "category": "id"})
        named = named.join(self._read(f"{role}_category"), on="id", how="left", maintain_order="left")
        return pl.DataFrame([named["item_id"], named["key"].alias("category"), *self._texts(role, read)])

    def users(self) -> pl.DataFrame:
        """key, and a list of texts for each declared column of the user file."""
        read = self._read(USER)
        return pl.DataFrame([read["key"], *self._texts(USER, read)])

    def _texts(self, role: str, read: pl.DataFrame) -> list[pl.Series]:
        found = []
        for column in self.manifest.features.get(role, []):
            values = self.numbered(f"{role}_{column}").keys
            text = pl.element().replace_strict(values["id"], values["key"], default=None, return_dtype=pl.String)
            found.append(read[column].list.eval(text.drop_nulls()))
        return found

    def check(self, sources: list[str], features: dict[str, list[str]]) -> None:
        """UserError: a dataset of other sources or declared columns, whose ids say something else."""
        for what, earlier, now in (
            ("sources", self.manifest.sources, sources),
            *((f"{role} features", self.manifest.features.get(role, []), features[role]) for role in features),
        ):
            if earlier != now and self.knows(what.partition(" ")[0]):
                shown = [", ".join(names) or "none" for names in (earlier, now)]
                raise UserError(f"extends={self._folder}: {what}: {shown[0]} there, {shown[1]} here")

    def _read(self, name: str) -> pl.DataFrame:
        uri = storage.join(self._folder, self.manifest.vocab[name].path)
        content = storage.read_bytes(uri)
        if storage.sha256(content) != self.manifest.vocab[name].sha256:
            raise UserError(f"{uri}: is not what its manifest says; copy it again")
        return pl.read_parquet(io.BytesIO(content))
