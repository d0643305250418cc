"""Options of the training loop: recipe, batch, optimisers, upper level, evaluation, trainer."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from cdr_dist.data.options import BatchOptions
from cdr_dist.errors import UserError


def one_of(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(f"{option}={value}: choose {', '.join(known[:-1])} or {known[-1]}")


def at_least(group: str, options: object, least: float, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if not value >= least:
            raise UserError(f"{group}.{name}={value}: must be at least {least}")


def above_zero(group: str, options: object, *names: str) -> None:
    for name in names:
        value = getattr(options, name)
        if not 0 < value < math.inf:
            raise UserError(f"{group}.{name}={value}: must be above 0 and finite")


MOST_TIMES = 1_000_000
"""Of an update within a cycle, which is a list with an entry for each time."""


@dataclass
class UpdateConfig:
    """One kind of update and how often it comes in a row within the cycle. `update` holds a `_target_`."""

    update: Any = None
    times: int = 1


@dataclass
class PhaseConfig:
    """A cycle of updates that repeats until the phase ends."""

    name: str = "train"
    cycle: list[UpdateConfig] = field(default_factory=list)
    epochs: int = 0
    """Of the stream that its steps are counted by; 0: trainer.epochs."""
    metric: str = ""
    """Selects its best checkpoint; empty: evaluation.metric."""
    start: str = ""
    """pretrained: from the best checkpoint of the phase before it, a first phase from that of warm_start.run."""

    def __post_init__(self) -> None:
        if self.start not in ("", "pretrained"):
            raise UserError(f"phase {self.name}: start={self.start}: write pretrained, or leave it out")


@dataclass
class RecipeConfig:
    """What is trained, by which updates, in which order."""

    name: str = ""
    source: bool = True
    """False: the single-domain variant of the backbone (-S), without source features; nextitnet's: no source loss."""
    pretrain: bool = False
    """Whether a phase pre-trains on source sequences."""
    target: bool = True
    """False: no phase reads target rows, so the model needs no target table."""
    transfer: Any = None
    """What becomes of a pre-trained encoder (cdr_dist/transfer), as a `_target_`; null: all of it is trained."""
    phases: list[PhaseConfig] = field(default_factory=list)


@dataclass
class BatchConfig(BatchOptions):
    """Batches of the lower stream."""

    size: int = 256
    """Target rows of the global batch, negatives included."""
    accumulate: int = 1
    """Parts that a worker computes its rows of a lower step in, one after another: the same step in less memory."""
    sequences: int = 0
    """Sequences of the global batch in pre-training; 0: as many as `size`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("batch", self, 1, "size", "accumulate")
        at_least("batch", self, 0, "sequences")


@dataclass
class DenseOptions:
    """Adam on the dense parameters."""

    lr: float = 3e-3
    """Rate of the backbone's dense parameters; the tables have their own, tables.lr."""
    weight_decay: float = 0.0
    """Added to the gradient as so many times the parameter, as Adam does it (not decoupled)."""

    def __post_init__(self) -> None:
        above_zero("dense", self, "lr")
        at_least("dense", self, 0, "weight_decay")


@dataclass
class UpperOptions:
    """The upper level of BIAO (Algorithm 1)."""

    interval: int = 5
    """Lower updates between two upper updates."""
    warm_up_epochs: int = 0
    """Epochs of the lower stream before the first upper update: early on, rows are noise and so is their gradient."""
    dev: str = "rotating"
    """reordered: the train set in its own order (the paper); split: a share of it that lower updates never see (the
    paper's split r), in the same order; same_users: other training behaviours of the train batch's
    users; rotating: the same, but behaviours that lower updates leave out for the time being."""
    rotate_epochs: int = 1
    """With dev=rotating: epochs of the lower stream after which the held-out behaviours change."""
    hold_out: float = 0.1
    """With dev=rotating: share of every user's training behaviours that is held out at a time (one is always left)."""
    split: float = 0.05
    """With dev=split: share of the training behaviours that are the dev set. A dev batch is picked from 1 / split times
    as many stored rows."""
    dev_behaviours: int = 2
    """With dev=same_users or rotating: dev behaviours of the user for every row of the train batch."""
    source_draws: int = 8
    """How often an upper update takes its train batch, each time with other source behaviours of the same users."""
    dev_batch_size: int = 0
    """Rows of the dev batch; 0: as batch.size. Other orders than reordered follow the train batch."""
    dev_head: str = "extra"
    """extra: the dev loss is that of an extra target head (released code); own: of the model's own head."""
    head_refresh: str = "lower"
    """lower: the extra head learns at every lower update on the batch's features, for free; dev:N: on the first N
    batches of the dev stream before every upper update, as released (N = 100)."""
    head_lr: float = 1e-2
    """Rate of the extra head (dev_head=extra)."""
    gamma0: float = 1.0
    """Coefficient of the source loss in `joint`; a batch's weights sum to it, in `biao` at the start."""
    optimiser: str = "adagrad_norm"
    """adagrad_norm (one step size for the whole perceptron, falling), adam or sgd."""
    lr: float = 0.1
    """Rate of the perceptron."""
    gamma_lr: float | None = 0.0
    """Rate of gamma, the sum of a batch's weights; 0 keeps that of joint training, null means lr."""
    weight_decay: float = 0.0
    """Of the perceptron; gamma has it with decay_gamma alone."""
    decay_gamma: bool = False
    """Whether weight decay touches gamma (as released, where relu(gamma) then shrinks to 0 and stays)."""
    clip: float = 10.0
    """Largest norm of the hypergradient; 0: none."""

    def __post_init__(self) -> None:
        one_of("upper.dev", self.dev, ("reordered", "split", "same_users", "rotating"))
        one_of("upper.dev_head", self.dev_head, ("extra", "own"))
        one_of("upper.optimiser", self.optimiser, ("adagrad_norm", "adam", "sgd"))
        if not 0 < self.hold_out < 1:
            raise UserError(f"upper.hold_out={self.hold_out}: a share of behaviours, above 0 and below 1")
        if not 0 < self.split < 1:
            raise UserError(f"upper.split={self.split}: a share of behaviours, above 0 and below 1")
        at_least("upper", self, 1, "rotate_epochs", "interval", "dev_behaviours", "source_draws")
        if self.interval > MOST_TIMES:
            raise UserError(f"upper.interval={self.interval}: must be at most {MOST_TIMES:,}")
        at_least("upper", self, 0, "warm_up_epochs", "dev_batch_size", "lr", "weight_decay", "clip")
        above_zero("upper", self, "head_lr", "gamma0")
        if self.head_refresh != "lower" and not (
            self.head_refresh.startswith("dev:") and self.head_refresh[4:].isdigit()
        ):
            raise UserError(f"upper.head_refresh={self.head_refresh}: write lower or dev:N, such as dev:100")


@dataclass
class WarmStartOptions:
    """An earlier run to begin with, on a dataset that its own was extended to (prepare's extends=)."""

    run: str | None = None
    """Its folder: the parameters of its best checkpoint are where this run starts; null: none."""
    new_rows: str = "mean"
    """Of keys that it did not know; mean: an item starts at the mean of its category, others at that of their table;
    seed: as without an earlier run."""
    statistics: bool = False
    """Whether the fused optimiser's statistics are taken over, too: rows that were trained much then move little."""

    def __post_init__(self) -> None:
        one_of("warm_start.new_rows", self.new_rows, ("mean", "seed"))


EXCLUDED = ("train", "none")
"""Choices of evaluation.full_exclude."""


@dataclass
class EvaluationOptions:
    """What is measured, and when."""

    every: int = 0
    """Lower steps between validations; 0: once an epoch."""
    metric: str = "auc"
    """Validation metric that selects the best checkpoint and stops early: auc, gauc, logloss; hr@K, ndcg@K, mrr@K (of
    ks); full_hr@K and so on (of full_ks); accuracy, f1 (of a dataset of classes)."""
    patience: int = 3
    """Validations without a better metric after which a phase stops; 0: never."""
    ks: list[int] = field(default_factory=list)
    """K of HR@K, NDCG@K and MRR@K against the stored negatives."""
    full_ks: list[int] = field(default_factory=list)
    """K of the same, called full_hr@K and so on, among all target items: measured once, at the end, and at validations
    only where metric is one of them. Empty: not at all."""
    full_exclude: str = "train"
    """Which items a positive is not ranked among; train: those that the user trained on; none: it has to beat them as
    well, as in released code."""
    positive_class: int = 1
    """Of a dataset of two classes the one whose F1 is f1; of more, f1 is the mean over classes (macro)."""
    batch_size: int = 8192
    """Rows scored at a time, stored negatives included."""

    def __post_init__(self) -> None:
        one_of("evaluation.full_exclude", self.full_exclude, EXCLUDED)
        at_least("evaluation", self, 0, "every", "patience")
        at_least("evaluation", self, 1, "batch_size")


def smaller_is_better(metric: str) -> bool:
    return metric in ("logloss", "nll")


@dataclass
class TrainerOptions:
    """Where and how long."""

    workers: int = 2
    """Ray Train workers; 0: in this process."""
    epochs: int = 15
    """Of the lower stream, at most, for a phase that names no number of its own."""
    max_steps: int = 0
    """Lower updates of the whole run; 0: as many as the epochs hold."""
    threads: int = 1
    """Per worker; fixed, because a matrix product's bits depend on it."""
    device: str = "cpu"
    """cpu or cuda."""
    checkpoint_every: int = 1000
    """Lower steps between checkpoints, besides those at validations; 0: only at validations."""
    checkpoint: str = "background"
    """background: training waits only for a copy of the tables, which takes their size in memory once more; in_place:
    it waits until they are written."""
    keep: int = 2
    """Newest checkpoints that stay, besides the best."""
    log_every: int = 100
    """Lower steps between two lines of training losses."""
    max_failures: int = 2
    """Lost workers that a run survives by starting again from its newest complete checkpoint."""
    hang_s: int = 600
    """Seconds that a worker waits for another one, after which that one counts as lost."""
    shared_memory: bool = True
    """Workers of one machine exchange rows and gradients of the CPU through memory that they share, where the system
    lets them; false: through gloo's sockets."""
    compare_every: int = 500
    """Lower steps between comparisons of the workers' copies of the dense parameters; 0: never."""
    memory_gb: float = 0.0
    """GiB of main memory that a worker may take; 0: what is free, shared among the workers of a machine. A run that
    needs more is refused before it starts."""
    verify: str = "auto"
    """Shards are checked by checksum, size, or auto (checksum up to 1 GiB)."""
    report: bool = True
    """Whether a finished run gets its page, report.html, which takes two seconds; jobs/report.py writes it as well."""
    mlflow: str | None = None
    """Where MLflow keeps a copy of the metrics: local (mlflow.db beside the run) or a tracking URI; null: nowhere."""
    max_unknown: float = 0.05
    """Largest share of unknown ids among the training rows."""

    def __post_init__(self) -> None:
        one_of("trainer.device", self.device, ("cpu", "cuda"))
        one_of("trainer.checkpoint", self.checkpoint, ("background", "in_place"))
        one_of("trainer.verify", self.verify, ("auto", "checksum", "size"))
        at_least("trainer", self, 1, "epochs", "threads", "keep", "log_every", "hang_s")
        at_least(
            "trainer",
            self,
            0,
            "workers",
            "max_steps",
            "checkpoint_every",
            "max_failures",
            "max_unknown",
            "compare_every",
            "memory_gb",
        )
