"""Checkpoints: sharded tables through torch.distributed.checkpoint, the rest in one file, COMPLETE written last.

checkpoints/step-00000400/tables/…    weights and fused optimiser state, readable by any number of workers
checkpoints/step-00000400/state.pt    dense parameters, dense optimisers
checkpoints/step-00000400/place.json  phase, place in the cycle, step, places of the streams, counters
checkpoints/step-00000400/COMPLETE
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from cdr_dist.data.stream import Place
from cdr_dist.errors import UserError
from cdr_dist.training.run_folder import COMPLETE, complete

if TYPE_CHECKING:
    from cdr_dist.training.session import Session


@dataclass
class Progress:
    """Where a run stands, between two updates."""

    phase: int = 0
    position: int = 0
    """Of the next update within the phase's cycle."""
    step: int = 0
    """Lower updates so far, over all phases."""
    upper_steps: int = 0
    phase_done: bool = False
    lower: Place = field(default_factory=Place)
    dev: Place = field(default_factory=Place)
    validated_step: int = -1
    """A run that was told to stop saves before it validates: the validation is made up for on resume."""
    best_step: int = -1
    best_value: float = float("nan")
    bad_validations: int = 0
    passes: dict[str, int] = field(default_factory=dict)
    data_checksum: str = ""

    @staticmethod
    def from_json(text: str) -> Progress:
        raw = json.loads(text)
        raw["lower"], raw["dev"] = Place(**raw["lower"]), Place(**raw["dev"])
        return Progress(**raw)


class Checkpoints:
    """The checkpoints of one run folder; every worker calls every method, in the same order."""

    def __init__(self, folder: Path, session: Session, keep: int) -> None:
        self._folder, self._session, self._keep = folder, session, keep

    def newest(self) -> Path | None:
        """The newest complete checkpoint; incomplete ones are passed over. Worker 0's view, so that all agree."""
        found = [max(complete(self._folder), default=None)] if self._session.rank == 0 else [None]
        dist.broadcast_object_list(found)
        return found[0]

    def at(self, step: int) -> Path:
        return self._folder / f"step-{step:08d}"

    def save(self, progress: Progress) -> None:
        """Writes beside the final name and renames; UserError where the disk is full, earlier ones untouched."""
        s = self._session
        final, part = self.at(progress.step), self._folder / f"part-{progress.step:08d}"
        error = ""
        if s.rank == 0:
            for left in self._folder.glob("part-*"):  # of a run that was killed while it wrote
                shutil.rmtree(left, ignore_errors=True)
        dist.barrier()
        try:
            dcp.save(s.tables.state_dict(), checkpoint_id=part / "tables", no_dist=s.workers == 1)
            if s.rank == 0:
                _write(part / "state.pt", _saved(dense_state(s)))
                _write(part / "place.json", json.dumps(asdict(progress)).encode())
        except (OSError, RuntimeError, dcp.api.CheckpointException) as failure:
            error = _reason(failure)
        self._agree(error, part)
        try:
            if s.rank == 0:
                _drop(final)
                os.replace(part, final)
                _write(final / COMPLETE, b"")
                self._drop_old(progress)
        except OSError as failure:
            error = _reason(failure)
        self._agree(error, part)

    def load(self, path: Path) -> Progress:
        """Tables, dense state and progress. Any number of workers may have written it."""
        s = self._session
        progress = self.check_dataset(path)
        state = self.load_parameters(path)
        for name, optimiser in s.optimisers.items():
            optimiser.load_state_dict(state["optimisers"][name])
        s.passes = dict(progress.passes)
        return progress

    def check_dataset(self, path: Path) -> Progress:
        """The progress of a checkpoint of this very dataset."""
        progress = read_progress(path)
        if progress.data_checksum != self._session.manifest.checksum:
            raise UserError(f"{path}: belongs to another dataset than {self._session.folder} (their checksums differ)")
        return progress

    def load_parameters(self, path: Path) -> dict[str, Any]:
        """What scoring needs: tables, model, perceptron. Returns all of the dense state."""
        s = self._session
        try:
            dcp.load(s.tables.state_dict(), checkpoint_id=path / "tables", no_dist=s.workers == 1)
            state = torch.load(path / "state.pt", weights_only=True, map_location=s.device)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, dcp.api.CheckpointException) as error:
            raise _damaged(path, error) from error
        for name, values in state["modules"].items():
            getattr(s, name).load_state_dict(values)
        return state

    def _agree(self, error: str, part: Path) -> None:
        """Any worker's failure is everybody's, with its reason."""
        reasons: list[Any] = [None] * self._session.workers
        dist.all_gather_object(reasons, error)
        failed = next((r for r in reasons if r), "")
        if failed:
            if self._session.rank == 0:
                shutil.rmtree(part, ignore_errors=True)
            raise UserError(f"{self._folder}: the checkpoint could not be written ({failed}); earlier ones are intact")

    def _drop_old(self, progress: Progress) -> None:
        paths = sorted(complete(self._folder))
        kept = {self.at(progress.best_step), *paths[-max(self._keep, 1) :]}
        for path in set(paths) - kept:
            _drop(path)


def read_progress(path: Path) -> Progress:
    try:
        return Progress.from_json((path / "place.json").read_text())
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise _damaged(path, error) from error


def dense_state(session: Session) -> dict[str, Any]:
    names = [n for n in ("model", "perceptron", "dev_head") if getattr(session, n) is not None]
    return {
        "modules": {n: getattr(session, n).state_dict() for n in names},
        "optimisers": {n: o.state_dict() for n, o in session.optimisers.items()},
    }


def _drop(path: Path) -> None:
    """The mark goes first: what is killed half-way leaves nothing that looks complete."""
    (path / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def _saved(state: dict[str, Any]) -> bytes:
    """Through memory: torch.save into a file hides why a write failed."""
    out = io.BytesIO()
    torch.save(state, out)
    return out.getvalue()


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as out:
        out.write(content)
        out.flush()
        os.fsync(out.fileno())


def _damaged(path: Path, error: BaseException) -> UserError:
    return UserError(f"{path}: damaged checkpoint ({_reason(error)}); delete it to continue from the one before")


def _reason(failure: BaseException) -> str:
    """One line; of a failure on several workers, the first worker's."""
    nested = getattr(failure, "failures", None)
    if nested:
        failure = next(iter(nested.values()))[0]
    while not isinstance(failure, OSError) and (deeper := failure.__cause__ or failure.__context__) is not None:
        failure = deeper
    if isinstance(failure, OSError) and failure.strerror:
        return failure.strerror
    return str(failure).strip().splitlines()[0] if str(failure).strip() else type(failure).__name__
