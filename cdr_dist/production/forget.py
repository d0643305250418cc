"""A person's removal from what this project wrote: datasets, runs, nights, recommendations.

    list        every dataset notes whom it forgets, and the id (data/forgotten.py): a killed removal is finished by it
    left        what killed jobs left half-written goes
    rows        of Parquet tables in runs, nights and recommendations: those with the person's key or id
    pages       explanations of the person
    checkpoints the person's rows of the user tables become zeros (training/clear_rows.py)
    datasets    (forget_dataset.py) last

Every step leaves a whole file, the old one or the new one, and finds out by itself whether it is done: the same command
goes on after a crash. What it holds by a lease nobody else works in meanwhile, a night included.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cdr_dist.crash_points import durable
from cdr_dist.data import forgotten, prepare, storage
from cdr_dist.data.dataset import Manifest, read_manifest
from cdr_dist.data.demo import dataset_of
from cdr_dist.data.feature_names import vocabulary_of
from cdr_dist.data.forgotten import Forgotten
from cdr_dist.data.keys import Keys, keys_of_users
from cdr_dist.data.parquet_input import ParquetInput
from cdr_dist.data.replicas import places_of
from cdr_dist.errors import UserError
from cdr_dist.production.forget_dataset import forget_in_dataset
from cdr_dist.production.publishing import Publisher
from cdr_dist.production.recommendation_job import DONE, STARTED
from cdr_dist.training import lease
from cdr_dist.training.checks import build_model
from cdr_dist.training.clear_rows import clear_rows
from cdr_dist.training.explanation_job import file_name
from cdr_dist.training.lease import Lease
from cdr_dist.training.run_folder import RunFolder

Ids = dict[str, int | None]
"""Key -> vocabulary id; None: it has none of its own."""


@dataclass(frozen=True)
class Places:
    """Where to look. out: of jobs/nightly.py, whose datasets, runs, nights and recommendations come on top."""

    out: str = ""
    data: list[str] = field(default_factory=list)
    runs: list[str] = field(default_factory=list)
    recommendations: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Removed:
    """What went from one place."""

    where: str
    what: str
    number: int


def forget(keys: Sequence[str], places: Places) -> list[Removed]:
    """Removes these users -> what was removed; [] where all of them were gone before.

    UserError, before anything is removed: a key that is nowhere and was never removed, a place that is none, or that
    another job works in.
    """
    for folder in places.recommendations:
        _check_recommendations(folder)
    with contextlib.ExitStack() as ending:
        leases = _Leases(ending)
        work = _Work(keys, _with_all_of_out(places, leases), leases)
        work.check()
        return work.run()


class _Leases:
    """On all that is changed, until the job ends."""

    def __init__(self, ending: contextlib.ExitStack) -> None:
        self._ending = ending
        self._held: dict[str, str] = {}

    def take(self, folder: str) -> None:
        uri = storage.join(storage.absolute(folder), lease.FILE)
        if uri not in self._held:
            self._held[uri] = self._ending.enter_context(Lease(storage.absolute(folder))).token

    def still_ours(self) -> None:
        """LeaseLostError: another job has taken one of the places over."""
        for uri, token in self._held.items():
            lease.check(uri, token)


def _with_all_of_out(places: Places, leases: _Leases) -> Places:
    """With what is in `out` once no night works there. UserError: it is none of jobs/nightly.py."""
    if not places.out:
        return places
    out = Publisher(places.out).out
    if not any(_folders(out, name) for name in ("datasets", "runs", "recommendations")):
        raise UserError(f"out={places.out}: holds no datasets, runs or recommendations of jobs/nightly.py")
    leases.take(out)
    whole = [one for one in _folders(out, "datasets") if storage.exists(storage.join(one, "manifest.json"))]
    runs = [one for one in _folders(out, "runs") if not RunFolder(one).is_new()]
    served = [*places.recommendations, *_folders(out, "recommendations")]
    return Places(out, [*places.data, *whole], [*places.runs, *runs], served)


def _folders(out: str, name: str) -> list[str]:
    folder = storage.join(out, name)
    return [storage.join(folder, one) for one in storage.names(folder)]


@dataclass(frozen=True)
class _Dataset:
    """ids: of the wanted keys, as far as its vocabulary or its list knows. there: those that it still holds."""

    folder: str
    manifest: Manifest
    listed: Forgotten
    ids: Ids
    there: set[str]

    @classmethod
    def read(cls, folder: str, keys: Sequence[str]) -> _Dataset:
        manifest, listed, wanted = read_manifest(folder), forgotten.read(folder), pa.array(keys, pa.string())
        found = Keys(folder, manifest, "user").ids_of(wanted).tolist()
        ids = {key: n if n >= 0 else listed.id_of(key) for key, n in zip(keys, found, strict=True)}
        there = set[str]()
        for some in keys_of_users(folder, manifest):
            there |= set(some.filter(pc.is_in(some, wanted)).to_pylist())
        return cls(folder, manifest, listed, ids, there)


class _Work:
    """Everything is looked at, and leased, before anything is changed."""

    def __init__(self, keys: Sequence[str], places: Places, leases: _Leases) -> None:
        self._keys, self._places, self._leases = list(keys), places, leases
        self._done: list[Removed] = []
        self._configs = {run: RunFolder(run).config() for run in places.runs}
        for config in self._configs.values():
            storage.use(config.storage)
        for folder in places.data:
            read_manifest(folder)
            if not self._of_out(folder):
                prepare.left_beside(folder)
        for folder in [*places.data, *places.runs, *places.recommendations]:
            leases.take(folder)
        self._datasets: dict[str, _Dataset] = {}
        # A run's own dataset tells its ids, also where the dataset is not to be changed.
        for folder in [*places.data, *(dataset_of(config.data) for config in self._configs.values())]:
            self._dataset(folder)

    def _dataset(self, folder: str) -> _Dataset:
        place = storage.absolute(folder)
        if place not in self._datasets:
            self._datasets[place] = _Dataset.read(place, self._keys)
        return self._datasets[place]

    def check(self) -> None:
        """UserError: a key that nobody knows."""
        known = self._datasets.values()
        unknown = {key for key in self._keys if not any(key in one.there or key in one.listed for one in known)}
        for folder in self._places.recommendations if unknown else ():
            unknown -= _keys_in_tables(folder, unknown)
            unknown -= set(_listed_by_dataset_of(folder).among(unknown))
        if unknown:
            more = f", and {len(unknown) - 1} others" if len(unknown) > 1 else ""
            raise UserError(f"user={min(unknown)}{more}: unknown here; nothing was removed")

    def run(self) -> list[Removed]:
        out, changed = self._places.out, [self._dataset(folder) for folder in self._places.data]
        of_out: Ids = {}
        for one in changed:
            of_out |= {key: number for key, number in one.ids.items() if number is not None}
        for one in changed:
            self._note(one)
        if out:
            self._clear_left_in(out)
            self._tables(storage.join(out, "nights"), of_out)
        for one in changed:
            self._clear_left(one.folder)
        for folder in self._places.recommendations:
            self._tables(folder, {})
            self._counts(folder)
        for run in self._places.runs:
            self._run(run)
        for one in changed:
            for folder in dict.fromkeys([*places_of(one.folder), one.folder]):
                found = forget_in_dataset(folder, self._keys, one.ids, self._leases.still_ours)
                self._done += [Removed(folder, what, number) for what, number in found.items()]
        return self._done

    def _of_out(self, folder: str) -> bool:
        return bool(self._places.out) and storage.absolute(folder).startswith(
            storage.join(self._places.out, "datasets/")
        )

    def _note(self, one: _Dataset) -> None:
        ids = {key: one.ids[key] for key in self._keys}
        now = one.listed.and_also(ids)
        if now != one.listed:
            for folder in dict.fromkeys([one.folder, *places_of(one.folder)]):
                self._leases.still_ours()
                with durable("forget.list"):
                    forgotten.write(folder, now)

    def _clear_left(self, data: str) -> None:
        """Scratch folders of killed prepares: they hold logs by user."""
        for folder in prepare.left_beside(data):
            self._remove_left(folder)

    def _clear_left_in(self, out: str) -> None:
        """Under the night's lease nobody prepares: what is no dataset was never finished."""
        for folder in _folders(out, "datasets"):
            if not storage.exists(storage.join(folder, "manifest.json")):
                self._remove_left(folder)

    def _remove_left(self, folder: str) -> None:
        if storage.names(folder):
            self._leases.still_ours()
            with durable("forget.left"):
                storage.remove_folder(folder)
            self._done.append(Removed(folder, "unfinished dataset", 1))

    def _run(self, run: str) -> None:
        place, config = RunFolder(run), self._configs[run]
        ids = self._dataset(dataset_of(config.data)).ids
        for key in self._keys:
            page = place.file(f"explanations/{file_name(key)}")
            if storage.exists(page):
                self._leases.still_ours()
                with durable("forget.page"):
                    storage.remove_file(page)
                self._done.append(Removed(place.uri, "pages", 1))
        self._tables(place.uri, ids)
        rows = sorted(number for number in ids.values() if number is not None)
        features = build_model(config).spec().features
        tables = {table for feature, table in features.items() if vocabulary_of(feature) == "user"}
        cleared = clear_rows(place.checkpoints, tables, rows, self._leases.still_ours) if rows else 0
        if cleared:
            self._done.append(Removed(place.uri, "checkpoints with their rows of the tables", cleared))

    def _tables(self, folder: str, ids: Ids) -> None:
        """Drops the users' rows from all Parquet files below a folder, and removes halves of files."""
        numbers = [number for number in ids.values() if number is not None]
        for uri in storage.files(folder):
            name = uri.rpartition("/")[2]
            if name.startswith(".") and name.endswith(".part"):
                with durable("forget.left"):
                    storage.remove_file(uri)
            elif name.endswith(".parquet"):
                removed = self._without(uri, numbers)
                if removed:
                    self._done.append(Removed(uri, "rows", removed))

    def _without(self, uri: str, numbers: list[int]) -> int:
        """Writes a table anew where it has rows of the users -> how many."""
        with storage.naming(uri), storage.open_input(uri) as file:
            table = ParquetInput(file)
            column, wanted = _column_of_users(table.schema_arrow, self._keys, numbers)
            if not column or not len(wanted):
                return 0
            removed = 0
            for batch in table.iter_batches(columns=[column]):
                removed += pc.sum(pc.is_in(batch.column(0), wanted)).as_py() or 0
        if removed:
            self._leases.still_ours()
            with storage.naming(uri), storage.open_input(uri) as file, durable("forget.rows"):
                _write_without(uri, ParquetInput(file), column, wanted)
        return removed

    def _counts(self, folder: str) -> None:
        """Brings recommendations.json up to what the parts hold."""
        uri = storage.join(folder, DONE)
        if not storage.exists(uri):
            return
        said = json.loads(storage.read_bytes(uri))
        parts = [(storage.join(folder, part["path"]), part) for part in said["parts"]]
        rows = [_rows_of(path) for path, _ in parts]
        if rows == [part["rows"] for _, part in parts]:
            return
        by, fewer = dict.fromkeys(said["by"], 0), 0
        for path, _ in parts:
            with storage.naming(path):
                table = pq.read_table(io.BytesIO(storage.read_bytes(path)), columns=["by", "item_id"])
            for name in by:
                by[name] += pc.sum(pc.equal(table["by"], name)).as_py() or 0
            fewer += pc.sum(pc.less(pc.list_value_length(table["item_id"]), said["asked"]["top"])).as_py() or 0
        said |= {"users": sum(rows), "by": by, "users_with_fewer": fewer}
        said["parts"] = [part | {"rows": n} for (_, part), n in zip(parts, rows, strict=True)]
        with durable("forget.counts"):
            storage.write_bytes(uri, (json.dumps(said, indent=1) + "\n").encode())


def _check_recommendations(folder: str) -> None:
    if not {DONE, STARTED} & set(storage.names(folder)):
        raise UserError(f"{folder}: no recommendations (no {DONE})")


def _keys_in_tables(folder: str, keys: set[str]) -> set[str]:
    """Those of the keys that a folder's tables have a row of."""
    wanted, found = pa.array(sorted(keys), pa.string()), set[str]()
    for uri in storage.files(folder):
        if uri.endswith(".parquet"):
            with storage.naming(uri), storage.open_input(uri) as file:
                for batch in ParquetInput(file).iter_batches(columns=["user_id"]):
                    some = batch.column(0)
                    found |= set(some.filter(pc.is_in(some, wanted)).to_pylist())
    return found


def _listed_by_dataset_of(folder: str) -> Forgotten:
    """Whom the dataset of recommendations has forgotten, where that can still be read."""
    for name in (DONE, STARTED):
        uri = storage.join(folder, name)
        if storage.exists(uri):
            said = json.loads(storage.read_bytes(uri))
            asked = said.get("asked", said)
            with contextlib.suppress(UserError):
                return forgotten.read(dataset_of(asked["data"] or RunFolder(asked["run"]).config().data))
    return Forgotten()


def _column_of_users(schema: pa.Schema, keys: list[str], numbers: list[int]) -> tuple[str, pa.Array]:
    """The column that says whose a row is, "" where none does, and its values of the users."""
    for name in ("user_id", "user"):
        if name in schema.names:
            kind = schema.field(name).type
            if pa.types.is_integer(kind):
                return name, pa.array(numbers, kind)
            if pa.types.is_string(kind) or pa.types.is_large_string(kind):
                return name, pa.array(keys, kind)
    return "", pa.array([], pa.string())


def _write_without(uri: str, table: ParquetInput, column: str, wanted: pa.Array) -> None:
    schema = table.schema_arrow
    with (
        storage.open_output(uri) as out,
        pq.ParquetWriter(out, schema, compression="zstd", write_page_checksum=True) as writer,
    ):
        for group in range(table.num_row_groups):
            rows = table.read_row_group(group)
            kept = rows.filter(pc.invert(pc.is_in(rows[column], wanted)))
            if kept.num_rows:
                writer.write_table(kept)


def _rows_of(uri: str) -> int:
    with storage.naming(uri), storage.open_input(uri) as file:
        return int(ParquetInput(file).metadata.num_rows)
