"""Replicas: whole copies of a dataset in other regions, named in its folder's `replicas.json`.

    {"eu-west-1": "s3://bucket-eu/dataset", "us-east-1": "s3://bucket-us/dataset"}

A worker reads shards from its own region's replica, then from the others, then from the folder itself; in a region
without a replica from the folder first. The manifest and the vocabularies come from the folder.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from cdr_dist.data import storage
from cdr_dist.data.dataset import Manifest, read_manifest
from cdr_dist.errors import UserError

T = TypeVar("T")

FILE = "replicas.json"
REST_S = 300.0
"""How long a place that failed is asked last."""


class Replicas:
    """The places of a dataset's shards. `fallbacks`: reads that another place than the first had to serve."""

    def __init__(self, folder: str, manifest: Manifest) -> None:
        self._folder, self._manifest = folder, manifest
        self._places = places_of(folder)
        self._usual = {folder}  # those known to hold the dataset of the manifest
        self._failed: dict[str, float] = {}
        self._lock = threading.Lock()
        self.fallbacks = 0

    @property
    def remote(self) -> bool:
        """Whether shards come over the network."""
        return not all(storage.is_local(place) for place in self._places)

    def read(self, path: str, read: Callable[[str], T]) -> T:
        """What `read` gives for the first URI of a file that can be read.

        UserError: no place can be read, or a replica holds another dataset.
        """
        errors = []
        for place in self._in_order():
            try:
                self._check(place)
                found = read(storage.join(place, path))
            except storage.StorageError as error:
                errors.append(error)
                with self._lock:
                    self._failed[place] = time.monotonic()
                continue
            if place != self._places[0]:
                with self._lock:
                    self.fallbacks += 1
            return found
        if len(errors) == 1:
            raise errors[0]
        raise UserError(f"{errors[0]}; nor from {len(errors) - 1} other places, the last: {errors[-1]}")

    def _in_order(self) -> list[str]:
        now = time.monotonic()
        with self._lock:  # threads that read ahead come here, too
            resting = {place for place, since in self._failed.items() if now - since < REST_S}
        return sorted(self._places, key=lambda place: place in resting)

    def _check(self, place: str) -> None:
        """A replica's manifest must be that of the folder: what was copied before is another dataset."""
        if place in self._usual:
            return
        uri = storage.join(place, "manifest.json")
        if not storage.exists(uri):
            raise storage.StorageError(f"{uri}: not found")
        if (found := read_manifest(place).checksum) != self._manifest.checksum:
            raise UserError(
                f"{place}: a stale replica: its manifest's checksum is {found[:12]}, that of {self._folder} "
                f"{self._manifest.checksum[:12]}; copy the dataset there again, or take it out of {FILE}"
            )
        self._usual.add(place)


def region() -> str:
    """This process's: storage.region, or what the environment says; empty where nothing does."""
    return storage.options().region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or ""


def places_of(folder: str) -> list[str]:
    """Where a dataset is, in the order in which this process asks: its folder and the copies. UserError: damaged."""
    uri = storage.join(folder, FILE)
    if not storage.exists(uri):
        return [folder]
    try:
        given = json.loads(storage.read_bytes(uri))
        listed = {str(name): str(place).rstrip("/") for name, place in given.items() if isinstance(place, str)}
    except (ValueError, AttributeError) as error:
        raise UserError(f"{uri}: not a JSON object of regions and folders ({error})") from None
    if len(listed) != len(given) or not all(listed.values()):
        raise UserError(f'{uri}: every region needs a folder, as in {{"eu-west-1": "s3://bucket/dataset"}}')
    own = listed.pop(region(), None)
    places = [own, *listed.values(), folder] if own else [folder, *listed.values()]
    return list(dict.fromkeys(places))
