"""Checkpoints: sharded tables through torch.distributed.checkpoint, the rest in one file, COMPLETE written last.

checkpoints/step-00000400/tables/…    weights and fused optimiser state, readable by any number of workers
checkpoints/step-00000400/state.pt    dense parameters, dense optimisers
checkpoints/step-00000400/place.json  phase, place in the cycle, step, places of the streams, counters
checkpoints/step-00000400/COMPLETE
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from cdr_dist.data.stream import Place
from cdr_dist.errors import UserError

if TYPE_CHECKING:
    from cdr_dist.training.session import Session

COMPLETE = "COMPLETE"


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
        if s.rank == 0:
            shutil.rmtree(part, ignore_errors=True)
        dist.barrier()
        error = ""
        try:
            dcp.save(s.tables.state_dict(), checkpoint_id=part / "tables", no_dist=s.workers == 1)
            if s.rank == 0:
                torch.save(dense_state(s), part / "state.pt")
                (part / "place.json").write_text(json.dumps(asdict(progress)))
        except (OSError, RuntimeError, dcp.api.CheckpointException) as failure:
            error = _reason(failure)
        self._agree(error, part)
        if s.rank == 0:
            shutil.rmtree(final, ignore_errors=True)
            os.replace(part, final)
            (final / COMPLETE).touch()
            self._drop_old(progress)
        dist.barrier()

    def load(self, path: Path) -> Progress:
        """Tables, dense state and progress. Any number of workers may have written it."""
        s = self._session
        progress = Progress.from_json((path / "place.json").read_text())
        if progress.data_checksum != s.manifest.checksum:
            raise UserError(f"{path}: belongs to another dataset than {s.folder} (their checksums differ)")
        self.load_parameters(path)
        state = torch.load(path / "state.pt", weights_only=True, map_location=s.device)
        for name, optimiser in s.optimisers.items():
            optimiser.load_state_dict(state["optimisers"][name])
        s.passes = dict(progress.passes)
        return progress

    def load_parameters(self, path: Path) -> None:
        """What scoring needs: tables, model, perceptron."""
        s = self._session
        dcp.load(s.tables.state_dict(), checkpoint_id=path / "tables", no_dist=s.workers == 1)
        state = torch.load(path / "state.pt", weights_only=True, map_location=s.device)
        for name, values in state["modules"].items():
            getattr(s, name).load_state_dict(values)

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
            (path / COMPLETE).unlink()
            shutil.rmtree(path, ignore_errors=True)


def complete(folder: Path) -> list[Path]:
    return [p for p in folder.glob("step-*") if (p / COMPLETE).exists()]


def dense_state(session: Session) -> dict[str, Any]:
    names = [n for n in ("model", "perceptron", "dev_head") if getattr(session, n) is not None]
    return {
        "modules": {n: getattr(session, n).state_dict() for n in names},
        "optimisers": {n: o.state_dict() for n, o in session.optimisers.items()},
    }


def _reason(failure: BaseException) -> str:
    nested = getattr(failure, "failures", None)
    if nested:
        failure = next(iter(nested.values()))[0]
    return str(failure).strip().splitlines()[0] if str(failure).strip() else type(failure).__name__
