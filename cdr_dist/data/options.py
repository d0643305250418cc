"""Options of reading training data; apart from it, because a driver reads them without loading TorchRec."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cdr_dist.errors import UserError


@dataclass
class StreamOptions:
    """The order of training rows; part of what makes a run repeatable."""

    lanes: int = 8
    """The most workers a stream can serve; the order depends on it, not on the number of workers."""
    window: int = 4
    """Row groups that a lane shuffles together (20,000 rows each)."""

    def __post_init__(self) -> None:
        if self.lanes < 1 or self.window < 1:
            raise UserError(f"stream.lanes={self.lanes}, stream.window={self.window}: must be at least 1")


@dataclass
class BatchOptions:
    """What a batch is made of."""

    negatives: int = 1
    """Training negatives of each positive (labels by sampled negatives)."""
    history_length: int = 20
    """N: the most recent behaviours of a domain that the perceptron sees (the paper: 20 for MiNet, 50 for CoNet); at
    most what the dataset stores, prepare's history_length."""

    def __post_init__(self) -> None:
        if self.negatives < 1:
            raise UserError(f"batch.negatives={self.negatives}: at least one negative a positive is needed")
        if self.history_length < 1:
            raise UserError(f"batch.history_length={self.history_length}: must be at least 1")


@dataclass
class SoftmaxOptions:
    """The softmax over a domain's items that predicts the next one (model=nextitnet)."""

    negatives: int = 0
    """Sampled items that all rows of a global batch share; 0: all items, for vocabularies of some ten thousand."""
    sampler: str = "popularity"
    """Where negatives come from, with replacement and corrected by log Q; popularity: by how often an item occurs in
    training, to the power of `power`; log_uniform: by its rank in popularity; uniform."""
    power: float = 1.0
    """With sampler=popularity."""

    def __post_init__(self) -> None:
        if self.sampler not in ("popularity", "log_uniform", "uniform"):
            raise UserError(f"softmax.sampler={self.sampler}: choose popularity, log_uniform or uniform")
        if self.negatives < 0 or not 0 <= self.power < math.inf:
            raise UserError(f"softmax.negatives={self.negatives}, softmax.power={self.power}: must not be negative")


@dataclass
class StorageOptions:
    """Reading and writing files, local ones and those of an object store (docs/object-storage.md)."""

    deadline_s: float = 30.0
    """Longest wait for one request (of 32 MiB at most), in seconds."""
    tries: int = 5
    """How often a request is sent before it counts as failed."""
    backoff_s: float = 0.5
    """Longest wait before the second try, in seconds; it doubles with every further one."""
    ahead_mib: int = 256
    """Most MiB of decoded row groups that a stream fetches ahead from an object store on each worker; 0: none."""
    region: str | None = None
    """Region whose replica of the dataset a worker reads; null: AWS_REGION or AWS_DEFAULT_REGION."""

    def __post_init__(self) -> None:
        if not (0 < self.deadline_s < math.inf and 0 <= self.backoff_s < math.inf):
            raise UserError(
                f"storage.deadline_s={self.deadline_s}, storage.backoff_s={self.backoff_s}: must be seconds, above 0"
            )
        if self.tries < 1 or self.ahead_mib < 0:
            raise UserError(f"storage.tries={self.tries}, storage.ahead_mib={self.ahead_mib}: at least 1 and 0")
