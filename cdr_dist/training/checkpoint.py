"""Checkpoints, written while training goes on: every worker its rows, worker 0 the rest, COMPLETE last.

checkpoints/step-00000400/rows-00000-of-00002.bin, .json   tables and fused optimiser state (rows_file.py)
checkpoints/step-00000400/dense.pt                         dense parameters and their optimisers
checkpoints/step-00000400/place.json                       phase, place in the cycle, step, places of the streams, …
checkpoints/step-00000400/COMPLETE                         bytes and sha256 of all of these

Any number of workers reads what any other wrote. A step that is saved again gets a folder of its own
(step-00000400-1), so that a crash never costs the checkpoint that was there.
"""

from __future__ import annotations

import io
import json
import logging
import pickle
import re
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from cdr_dist.crash_points import durable
from cdr_dist.data import storage
from cdr_dist.data.stream import Place
from cdr_dist.errors import UserError
from cdr_dist.training.lease import LeaseLostError
from cdr_dist.training.rows_file import Parts, RowsFile, read_rows, write_rows
from cdr_dist.training.talk import OverGroup, Talk, agreed

if TYPE_CHECKING:
    from cdr_dist.training.run_folder import RunFolder
    from cdr_dist.training.session import Session

log = logging.getLogger(__name__)

COMPLETE, DENSE, PLACE = "COMPLETE", "dense.pt", "place.json"
STREAMS = ("lower", "dev", "sequences")
"""Whose places are part of a run's progress."""
_NAME = re.compile(r"step-(\d{8,})(?:-(\d+))?")


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
    begun: int = 0
    """Step at which the phase began."""
    lower: Place = field(default_factory=Place)
    dev: Place = field(default_factory=Place)
    sequences: Place = field(default_factory=Place)
    validated_step: int = -1
    """A run that was told to stop saves before it validates: the validation is made up for on resume."""
    best_step: int = -1
    """Of the phase, as best_value and bad_validations."""
    best_value: float = float("nan")
    bad_validations: int = 0
    passes: dict[str, int] = field(default_factory=dict)
    data_checksum: str = ""
    started: dict[str, int] = field(default_factory=dict)
    """Table -> its rows that started from given vectors."""

    @staticmethod
    def from_json(text: bytes) -> Progress:
        raw = json.loads(text)
        places = {name: Place(**raw[name]) for name in STREAMS if name in raw}
        return Progress(**raw | places)


@dataclass(frozen=True, order=True)
class Saved:
    """A complete checkpoint. attempt: how often the step was saved before."""

    step: int
    attempt: int
    uri: str

    def read(self, name: str) -> bytes:
        """A small file, as it was written. UserError: damaged."""
        try:
            content = storage.read_bytes(storage.join(self.uri, name))
        except storage.NotFoundError as error:
            raise self.damaged(f"{name} is missing") from error
        try:
            known = json.loads(storage.read_bytes(storage.join(self.uri, COMPLETE)))[name]
        except (ValueError, KeyError, TypeError) as error:
            raise self.damaged(f"{COMPLETE} does not list {name}") from error
        if known != [len(content), storage.sha256(content)]:
            raise self.damaged(f"{name} is not what was written")
        return content

    def progress(self) -> Progress:
        try:
            return Progress.from_json(self.read(PLACE))
        except (ValueError, TypeError, KeyError) as error:
            raise self.damaged(_reason(error)) from error

    def damaged(self, why: str) -> UserError:
        return UserError(f"{self.uri}: damaged checkpoint ({why}); delete it to continue from the one before")


def complete(folder: str) -> list[Saved]:
    """The checkpoints in a run's `checkpoints` that were written to their end, oldest first."""
    found = [saved for saved in all_of(folder) if storage.exists(storage.join(saved.uri, COMPLETE))]
    return sorted(found)


def newest(folder: str) -> Saved | None:
    """As the last of `complete`, without looking at the earlier ones."""
    return next((s for s in reversed(all_of(folder)) if storage.exists(storage.join(s.uri, COMPLETE))), None)


def best_step(place: RunFolder) -> int:
    """Of a finished run, or so far."""
    saved = newest(place.checkpoints)
    if saved is None:
        raise UserError(f"{place.uri}: has no checkpoint yet; the command that trains it goes on")
    step = saved.progress().best_step
    if step < 0:
        raise UserError(
            f"{place.uri}: was not validated yet, so no checkpoint is the best; let the command that trains it go on"
        )
    return step


def all_of(folder: str) -> list[Saved]:
    """The incomplete ones, too."""
    named = [(name, _NAME.fullmatch(name)) for name in storage.names(folder)]
    return sorted(Saved(int(m[1]), int(m[2] or 0), storage.join(folder, name)) for name, m in named if m)


class Checkpoints:
    """The checkpoints of one run folder; every worker calls every method, in the same order.

    in_background: a copy of the worker's rows is taken (that is all that training waits for) and written while
    training goes on; else rows are written from where they are. still_ours: raises where another job has taken over.
    """

    def __init__(
        self,
        folder: str,
        session: Session,
        keep: int,
        in_background: bool = False,
        still_ours: Callable[[], None] = lambda: None,
        talk: Callable[..., Talk] = OverGroup,
    ) -> None:
        self._folder, self._session, self._keep = folder, session, keep
        self._in_background, self._still_ours = in_background, still_ours
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="cdr-checkpoint")
        # What the thread tells the other workers' threads must not meet what training says meanwhile.
        self._talk, self._threads_talk = talk(), talk(own=True)
        self._writing: Future[None] | None = None
        self._copy: dict[tuple[str, str], torch.Tensor] = {}
        self.stalled_s = 0.0
        """Seconds that training waited for saves."""
        if in_background:  # first use of memory is slow: not while training waits for the first copy
            self._writing = self._thread.submit(self._make_room)

    def newest(self) -> Saved | None:
        """The newest complete checkpoint; incomplete ones are passed over. Worker 0's view, so that all agree."""
        return self._agreed(lambda: newest(self._folder))

    def of_step(self, step: int) -> Saved:
        """UserError: there is none."""
        found = self._agreed(lambda: max((s for s in complete(self._folder) if s.step == step), default=None))
        if found is None:
            raise UserError(f"{self._folder}: the checkpoint of step {step} is gone")
        return found

    def save(self, progress: Progress) -> None:
        """UserError where this or, in the background, the one before cannot be written; complete ones are untouched."""
        start = time.perf_counter()
        self.wait()
        s = self._session
        uri = self._agreed(lambda: self._begin(progress.step))
        dense = _saved(dense_state(s)) if s.rank == 0 else b""
        place = json.dumps(asdict(progress)).encode()
        parts = parts_of(s)
        if self._in_background:
            for key, (_, values) in parts.items():
                self._copy[key].copy_(values)
            parts = {key: (first, self._copy[key]) for key, (first, _) in parts.items()}
        arguments = (uri, parts, s.tables.updates, dense, place, progress.best_step)
        self._writing = self._thread.submit(self._write, *arguments)
        if not self._in_background:
            self.wait()
        self.stalled_s += time.perf_counter() - start

    def wait(self) -> None:
        """Until what is being written is complete. UserError where it could not be."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        self._thread.shutdown(wait=True)

    def load(self, saved: Saved) -> Progress:
        """Tables, dense state and progress. Any number of workers may have written it."""
        s = self._session
        progress = self.check_dataset(saved)
        state = self.load_parameters(saved)
        for name, optimiser in s.optimisers.items():
            optimiser.load_state_dict(state["optimisers"][name])
        s.passes = dict(progress.passes)
        progress.data_checksum = s.manifest.checksum
        return progress

    def check_dataset(self, saved: Saved) -> Progress:
        """The progress of a checkpoint of this very dataset, or of it before users were removed from it."""
        progress = saved.progress()
        if not self._session.manifest.is_or_was(progress.data_checksum):
            raise UserError(
                f"{saved.uri}: belongs to another dataset than {self._session.folder} (their checksums differ)"
            )
        return progress

    def load_parameters(self, saved: Saved) -> dict[str, Any]:
        """What scoring needs: tables, model, perceptron. Returns all of the dense state."""
        state = self._read(saved, parts_of(self._session), grown=False)
        for name, values in state["modules"].items():
            getattr(self._session, name).load_state_dict(values)
        return state

    def load_grown(self, saved: Saved, statistics: bool, whole: bool = False) -> None:
        """The parameters of another run whose tables have at most as many rows; rows beyond those stay as they are.

        statistics: those of the fused optimiser, too. What only one of the runs has stays as it is: modules, tables,
        and the parameters of a model that are not its `pretrained` ones; whole: these are read, too.
        """
        parts = parts_of(self._session)
        wanted = {key: part for key, part in parts.items() if statistics or key[1] == "weights"}
        state = self._read(saved, wanted, grown=True)
        for name, values in state["modules"].items():
            module = getattr(self._session, name)
            try:
                if hasattr(module, "pretrained") and not whole:
                    if lacking := sorted(set(module.pretrained()) - values.keys()):
                        raise UserError(f"{saved.uri}: does not fit: has no parameter {lacking[0]}")
                    values = module.state_dict() | {key: values[key] for key in module.pretrained()}
                if module is not None:
                    module.load_state_dict(values)
            except RuntimeError as error:
                raise UserError(f"{saved.uri}: does not fit: {_reason(error)}") from error

    def _read(self, saved: Saved, parts: Parts, grown: bool) -> dict[str, Any]:
        s = self._session
        try:
            listed = [n for n in json.loads(storage.read_bytes(storage.join(saved.uri, COMPLETE))) if is_index(n)]
            files = [RowsFile.from_json(saved.read(name)) for name in listed]
            read_rows(saved.uri, files, parts, grown)
            s.tables.updates = max(file.updates for file in files)
            return torch.load(io.BytesIO(saved.read(DENSE)), weights_only=True, map_location=s.device)
        except storage.NotFoundError as error:
            raise saved.damaged(str(error)) from error
        except storage.StorageError:
            raise  # a store that does not answer says nothing about what it holds
        except UserError as error:
            raise error if str(error).startswith(saved.uri + ": damaged") else saved.damaged(str(error)) from error
        except pickle.UnpicklingError as error:
            raise saved.damaged(f"{DENSE} holds what is not a tensor, which is not loaded") from error
        except (RuntimeError, EOFError, ValueError, KeyError, TypeError) as error:
            raise saved.damaged(_reason(error)) from error

    # ---- in the thread ------------------------------------------------------------------------------------------

    def _make_room(self) -> None:
        for key, (_, values) in parts_of(self._session).items():
            self._copy[key] = torch.zeros(values.shape, dtype=values.dtype, pin_memory=values.is_cuda)

    def _write(self, uri: str, parts: Parts, updates: int, dense: bytes, place: bytes, best_step: int) -> None:
        """This worker's files; worker 0 then completes the checkpoint if all workers' are there."""
        written: dict[str, list[Any]] = {}
        error = ""
        try:
            written = self._write_files(uri, parts, updates, dense, place)
        except Exception as failure:  # whatever it is, the other workers wait for this one's word
            error = _reason(failure)
        with durable("checkpoint.barrier"):
            everyones = self._threads_talk.gather((error, written))
        error = next((e for e, _ in everyones if e), "")
        if self._session.rank == 0:
            listed = {name: known for _, files in everyones for name, known in files.items()}
            error = self._finish(uri, listed, best_step, error)
        with durable("checkpoint.outcome"):
            error = self._threads_talk.gather((error, {}))[0][0]
        if error:
            raise UserError(f"{self._folder}: the checkpoint could not be written ({error}); earlier ones are intact")

    def _finish(self, uri: str, listed: dict[str, Any], best_step: int, error: str) -> str:
        """Completes the checkpoint and removes older ones, or removes what there is of it -> why it failed."""
        try:
            self._still_ours()
            if not error:
                with durable("checkpoint.complete"):
                    storage.write_bytes(storage.join(uri, COMPLETE), json.dumps(listed, indent=1).encode())
        except LeaseLostError as lost:
            return _reason(lost)  # a folder of this name may be the other job's by now
        except Exception as failure:
            error = _reason(failure)
        try:
            if error:
                drop(uri)
            else:
                self._drop_old(best_step)
        except Exception as failure:  # the next save tries again
            log.warning("%s: old checkpoints could not be removed (%s)", self._folder, _reason(failure))
        return error

    def _write_files(self, uri: str, parts: Parts, updates: int, dense: bytes, place: bytes) -> dict[str, list[Any]]:
        """File -> [bytes, sha256] of what the rows' own checksums do not cover."""
        s = self._session
        name = f"rows-{s.rank:05d}-of-{s.workers:05d}"
        with durable("checkpoint.rows"):
            rows = write_rows(uri, f"{name}.bin", parts, updates)
        small = {f"{name}.json": ("checkpoint.index", rows.to_json())}
        if s.rank == 0:
            small |= {DENSE: ("checkpoint.dense", dense), PLACE: ("checkpoint.place", place)}
        for file, (effect, content) in small.items():
            with durable(effect):
                storage.write_bytes(storage.join(uri, file), content)
        return {file: [len(content), storage.sha256(content)] for file, (_, content) in small.items()}

    def _drop_old(self, best_step: int) -> None:
        """All but this one, the best, and the newest of the rest; incomplete ones go, too."""
        latest = list({s.step: s for s in complete(self._folder)}.values())  # of a step, the last attempt
        kept = {s.uri for i, s in enumerate(latest) if i >= len(latest) - self._keep or s.step == best_step}
        for saved in all_of(self._folder):
            if saved.uri not in kept:
                drop(saved.uri)

    # ---- all workers --------------------------------------------------------------------------------------------

    def _begin(self, step: int) -> str:
        """The folder of a checkpoint to be."""
        self._still_ours()
        attempts = [saved.attempt for saved in all_of(self._folder) if saved.step == step]
        again = f"-{max(attempts) + 1}" if attempts else ""
        return storage.join(self._folder, f"step-{step:08d}{again}")

    def _agreed(self, find: Callable[[], Any]) -> Any:
        return agreed(self._talk, find, self._session.rank)


def parts_of(session: Session) -> dict[tuple[str, str], tuple[int, torch.Tensor]]:
    """Views of this worker's rows: weights and the fused optimiser's statistics."""
    found = {}
    states = session.tables.optimiser_shards()
    for table, (first, weights) in session.tables.shards().items():
        found[table, "weights"] = (first, weights.detach())
        for i, state in enumerate(states[table]):
            found[table, f"state{i}"] = (first, state)
    return found


def dense_state(session: Session) -> dict[str, Any]:
    names = [n for n in ("model", "perceptron", "dev_head") if getattr(session, n) is not None]
    return {
        "modules": {n: getattr(session, n).state_dict() for n in names},
        "optimisers": {n: o.state_dict() for n, o in session.optimisers.items()},
    }


def is_index(name: str) -> bool:
    """Whether a file of a checkpoint says what a worker's rows are."""
    return name.startswith("rows-") and name.endswith(".json")


def drop(uri: str) -> None:
    """Removes a checkpoint. The mark goes first: what is killed half-way leaves nothing that looks complete."""
    with durable("checkpoint.drop_mark"):
        storage.remove_file(storage.join(uri, COMPLETE))
    with durable("checkpoint.drop"):
        storage.remove_folder(uri)


def _saved(state: dict[str, Any]) -> bytes:
    out = io.BytesIO()
    torch.save(state, out)
    return out.getvalue()


def _reason(failure: BaseException) -> str:
    """One line."""
    if isinstance(failure, OSError) and failure.strerror:
        return failure.strerror
    return str(failure).strip().splitlines()[0] if str(failure).strip() else type(failure).__name__
