"""The published model: OUT/latest.json names its run and dataset, and is switched last; what is old enough goes.

OUT/latest.json                 the published version, or not there
OUT/newest_dataset.json         the dataset whose ids the next one goes on from, published or not
OUT/newest_recommendations.json the folder of the newest recommendations, and whose they are
OUT/datasets/DATE, OUT/runs/DATE, OUT/nights/DATE/{night.json,report.html}, OUT/recommendations/DATE
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from cdr_dist.crash_points import durable
from cdr_dist.data import storage
from cdr_dist.data.dataset import read_manifest
from cdr_dist.errors import UserError

LATEST, NEWEST_DATASET, NIGHT = "latest.json", "newest_dataset.json", "night.json"
NEWEST_RECOMMENDATIONS, PAGE = "newest_recommendations.json", "report.html"


@dataclass(frozen=True)
class Version:
    """What latest.json says."""

    date: str
    run: str
    dataset: str
    checksum: str
    """Of the run's parameters."""


class Publisher:
    """The files of an `out` folder that outlast a night."""

    def __init__(self, out: str) -> None:
        """Absolute, as latest.json is read from anywhere."""
        self.out = storage.absolute(out)

    def dataset(self, date: str) -> str:
        return storage.join(self.out, "datasets", date)

    def run(self, date: str) -> str:
        return storage.join(self.out, "runs", date)

    def recommendations(self, date: str) -> str:
        return storage.join(self.out, "recommendations", date)

    def night(self, date: str, name: str = NIGHT) -> str:
        return storage.join(self.out, "nights", date, name)

    def latest(self) -> Version | None:
        """UserError: damaged."""
        uri = storage.join(self.out, LATEST)
        raw = _read(uri)
        try:
            return None if raw is None else Version(**raw)
        except TypeError as error:
            raise UserError(f"{uri}: damaged; write it again from the night.json of the version that serves") from error

    def publish(self, version: Version) -> None:
        with durable("nightly.publish"):
            _write(storage.join(self.out, LATEST), asdict(version))

    def serve(self, date: str, version: Version) -> None:
        """The recommendations of that night, by that version, are the newest."""
        said = {"date": date, "folder": self.recommendations(date), "run": version.run, "checksum": version.checksum}
        with durable("nightly.serve"):
            _write(storage.join(self.out, NEWEST_RECOMMENDATIONS), said)

    def newest_dataset(self, growing: str) -> str:
        """The dataset that the one of night `growing` goes on from, "" for the first; and remembers that night.

        A night that was killed between writing its dataset and saying so is found by its name: ids were given to keys
        there, and must not be given to others. Only one night at a time calls this.
        """
        uri = storage.join(self.out, NEWEST_DATASET)
        said = _read(uri) or {"dataset": "", "growing": ""}
        if said["growing"] and said["growing"] != growing and self._is_dataset(said["growing"]):
            said["dataset"] = self.dataset(said["growing"])
        if said["dataset"] == self.dataset(growing) and not self._is_dataset(growing):  # removed, to be made again
            said["dataset"] = said.get("before", "")
        if said["growing"] != growing:
            said["growing"] = growing
            with durable("nightly.grow"):
                _write(uri, said)
        return str(said["dataset"])

    def grown(self, date: str) -> None:
        """The dataset of that night is complete: the next one goes on from it, unless a later one is there already."""
        said = _read(storage.join(self.out, NEWEST_DATASET)) or {}
        if said.get("growing") != date:
            return
        said = {"dataset": self.dataset(date), "growing": "", "before": said["dataset"]}
        with durable("nightly.grown"):
            _write(storage.join(self.out, NEWEST_DATASET), said)

    def read_night(self, date: str) -> dict[str, Any]:
        """What is known of a night; empty before it begins."""
        return _read(self.night(date)) or {}

    def nights(self) -> list[str]:
        """The dates of which something is known, ascending."""
        return sorted(storage.names(storage.join(self.out, "nights")))

    def write_page(self, date: str, content: str) -> None:
        with durable("nightly.page"):
            storage.write_bytes(self.night(date, PAGE), content.encode())

    def write_night(self, date: str, known: dict[str, Any]) -> None:
        with durable("nightly.night"):
            _write(self.night(date), known)

    def retire(self, keep: int) -> list[str]:
        """Removes datasets and runs but those of the `keep` last published nights, the published version's and the
        dataset that ids go on from; and recommendations but those of the `keep` last nights that have some. The dates
        of which something went."""
        dates = sorted(
            {*storage.names(storage.join(self.out, "datasets")), *storage.names(storage.join(self.out, "runs"))}
        )
        latest, newest = self.latest(), (_read(storage.join(self.out, NEWEST_DATASET)) or {}).get("dataset", "")
        serves = latest.date if latest else ""
        published = [date for date in dates if date == serves or self.read_night(date).get("published")]
        kept = {*published[-keep:], serves}
        gone = []
        for date in dates:
            over = date not in kept and bool(self.read_night(date).get("outcome"))
            # The run first: without its dataset nobody could tell what its rows stand for.
            for folder in (self.run(date), self.dataset(date)) if over else ():
                if folder != newest and storage.names(folder):
                    with durable("nightly.retire"):
                        storage.remove_folder(folder)
                    gone.append(date)
        for date in storage.names(storage.join(self.out, "recommendations"))[:-keep]:
            with durable("nightly.retire"):
                storage.remove_folder(self.recommendations(date))
            gone.append(date)
        return sorted(set(gone))

    def _is_dataset(self, date: str) -> bool:
        try:
            read_manifest(self.dataset(date))
        except UserError:
            return False
        return True


def _read(uri: str) -> dict[str, Any] | None:
    """None: not there. UserError: damaged."""
    try:
        found = json.loads(storage.read_bytes(uri))
    except storage.NotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{uri}: damaged, not JSON") from error
    if not isinstance(found, dict):
        raise UserError(f"{uri}: damaged, not a JSON object")
    return found


def _write(uri: str, content: dict[str, Any]) -> None:
    storage.write_bytes(uri, (json.dumps(content, indent=1) + "\n").encode())
