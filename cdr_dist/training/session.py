"""What one worker holds during a run: dataset, model, tables, perceptron, optimisers, feeds."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cdr_dist.bilevel.optimiser import AdaGradNorm
from cdr_dist.bilevel.perceptron import BehaviouralPerceptron
from cdr_dist.configuration import TrainConfig
from cdr_dist.data import storage
from cdr_dist.data.batch import Batch, BatchBuilder, Draws
from cdr_dist.data.dataset import SEQUENCES, read_manifest
from cdr_dist.data.feature_names import DOMAINS
from cdr_dist.data.feed import Feed
from cdr_dist.data.hold_out import HoldOut, Split
from cdr_dist.data.lanes import lanes_of
from cdr_dist.data.replicas import Replicas
from cdr_dist.data.shards import ShardReader
from cdr_dist.data.stream import Block, Stream
from cdr_dist.data.truth import kind_of_user
from cdr_dist.embeddings.initialisation import initialise_dense
from cdr_dist.embeddings.tables import ShardedTables
from cdr_dist.embeddings.workers import rank, sum_over_workers, world_size
from cdr_dist.errors import UserError
from cdr_dist.training.checks import (
    WEIGHED,
    build_model,
    check_dataset,
    check_source_loss,
    check_weighable,
    table_specs,
    trained_by,
)
from cdr_dist.training.dense import DenseStep

TRAINED_SEQUENCES = SEQUENCES[0]
_UPPER: dict[str, Any] = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adagrad_norm": AdaGradNorm}


class Session:
    """Built once on every worker; updates bind to it. memory: bytes for the tables; 0: as the planner assumes."""

    def __init__(self, config: TrainConfig, folder: str, updates: Sequence[Any] = (), memory: int = 0) -> None:
        self.config, self.folder = config, folder
        self.rank, self.workers = rank(), world_size()
        self.device = torch.device(config.trainer.device)
        storage.use(config.storage)
        self.manifest = read_manifest(folder)
        self.replicas = Replicas(folder, self.manifest)
        check_dataset(config, self.manifest)
        learned = any(getattr(update, "learned", False) for update in updates)
        needs_head = any(getattr(update, "needs_head", False) for update in updates)
        self.model = build_model(config).to(self.device)
        if learned:
            check_weighable(config, self.model)
        check_source_loss(config, updates)
        initialise_dense(self.model, config.seed)
        spec = self.model.spec()
        self.features = {**spec.features, **spec.sequences}
        specs = table_specs(config, self.manifest, self.model)
        self.tables = ShardedTables(specs, config.tables, config.seed, self.device, memory)
        read = {*spec.features, *(WEIGHED if config.recipe.source else ())}  # those that weigh may ask for a category
        kinds = kind_of_user(folder, self.manifest) if getattr(self.model, "needs_truth", False) else None
        draws = Draws(getattr(self.model, "draws", 0), getattr(self.model, "fixed_draws", False), kinds)
        self.builder = BatchBuilder(
            folder,
            self.manifest,
            config.batch,
            config.seed,
            read,
            DOMAINS if learned else (),
            config.softmax,
            spec.sequences,
            draws,
        )
        upper = config.upper
        self.split = Split(config.seed, upper.split) if learned and upper.dev == "split" else None
        self.hold_out: HoldOut | Split | None = self.split
        if learned and upper.dev == "rotating":
            self.hold_out = HoldOut(config.seed, upper.hold_out, upper.rotate_epochs)
        self.perceptron = self._perceptron() if learned else None
        extra = needs_head and config.upper.dev_head == "extra"
        self.dev_head = self._dense(nn.Linear(self.model.target_feature_width, 1), "dev_head") if extra else None
        self._upper = {} if self.perceptron is None else {"perceptron": self._upper_optimiser(self.perceptron)}
        self.frozen: set[str] = set()
        """Tables that the updates of the present phase only read."""
        self.train_with(updates)
        self.lower = self.training_feed("lower", config.batch.size)
        self.dev = self.dev_feed()
        self.sequences = self._sequence_feed() if spec.sequences else None
        self.passes = {"lower": 0, "head": 0, "upper": 0}

    def train_with(self, updates: Sequence[Any]) -> None:
        """Optimisers for what these updates train, without any past; all else is only read."""
        names, tables = trained_by(self.model, updates)
        for name, parameter in self.model.named_parameters():
            parameter.grad = None
            parameter.requires_grad_(name in names)
        self.frozen = set(self.tables.specs) - tables
        trained = {"model": self.model} | ({"dev_head": self.dev_head} if self.dev_head is not None else {})
        self.dense_step = DenseStep(trained, self._optimiser)
        self.optimisers = self.dense_step.optimisers | self._upper

    def enter(self, cycle: Sequence[Any]) -> None:
        """Begins a phase: optimisers for what its updates train, and the updates bound."""
        self.train_with(cycle)
        for update in dict.fromkeys(cycle):
            update.bind(self)

    def rows(self, ids: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As `ShardedTables.rows`, of the tables that the present phase trains; the others are only read."""
        if not self.frozen.intersection(ids):
            return self.tables.rows(ids)
        trained = {table: of for table, of in ids.items() if table not in self.frozen}
        read = {table: of for table, of in ids.items() if table in self.frozen}
        return {**(self.tables.rows(trained) if trained else {}), **self.tables.read(read)}

    def begin(self) -> None:
        """A phase's first parameters are in place: what is added to a pre-trained model may start from them."""
        if hasattr(self.model, "begin"):
            self.model.begin()

    def forget_statistics(self) -> None:
        """The fused optimisers' past."""
        for states in self.tables.optimiser_shards().values():
            for state in states:
                state.zero_()
        self.tables.updates = 0

    @property
    def waited_s(self) -> float:
        """Seconds that steps waited for their batches."""
        return self.lower.waited_s + (self.sequences.waited_s if self.sequences is not None else 0.0)

    def _sequence_feed(self) -> Feed:
        size = self.config.batch.sequences or self.config.batch.size
        columns = self.builder.columns(TRAINED_SEQUENCES)
        reader = ShardReader(self.folder, self.manifest, TRAINED_SEQUENCES, columns, replicas=self.replicas)
        stream = Stream(
            reader, size, self.config.stream, self.config.seed, "sequences", rank=self.rank, workers=self.workers
        )
        return Feed(stream, self._build_sequences)

    def dev_feed(self) -> Feed:
        """The train split in another order; with upper.dev=split, of the dev set alone."""
        size = self.config.upper.dev_batch_size or self.config.batch.size
        split = self.split
        if split is None:
            return self.training_feed("dev", size)
        rows = math.ceil(size / self.builder.expansion / split.share)
        build = functools.partial(self._build_dev, split)
        return self.training_feed("dev", rows * self.builder.expansion, build)

    def training_feed(self, name: str, size: int, build: Callable[[Block], list[Batch]] | None = None) -> Feed:
        """A feed of the train split in the order called `name`; size: rows of the global batch, negatives included."""
        rows_per_step, rest = divmod(size, self.builder.expansion)
        if rest or not rows_per_step:
            raise UserError(
                f"batch.size={size}: must be a multiple of {self.builder.expansion} (a row and its negatives)"
            )
        reader = ShardReader(self.folder, self.manifest, "train", self.builder.columns("train"), replicas=self.replicas)
        stream = Stream(
            reader, rows_per_step, self.config.stream, self.config.seed, name, rank=self.rank, workers=self.workers
        )
        return Feed(stream, build or self._build)

    def evaluation_streams(self, split: str, more: Sequence[str] = ()) -> list[Stream]:
        """One stream a lane that this worker serves, in stored order; a step is evaluation.batch_size rows of each.

        more: columns besides those that a batch needs.
        """
        lanes = self.config.stream.lanes
        rows = lanes * max(1, self.config.evaluation.batch_size // self.stored_rows)
        columns = [*self.builder.columns(split), *more]
        reader = ShardReader(self.folder, self.manifest, split, columns, replicas=self.replicas)
        return [
            Stream(reader, rows, self.config.stream, self.config.seed, split, lane, lanes, shuffle=False)
            for lane in lanes_of(self.rank, self.workers, lanes)
        ]

    @property
    def stored_rows(self) -> int:
        """Rows that a validation or test row becomes: itself and its stored negatives."""
        return 1 + (self.manifest.eval_negatives if self.manifest.label == "sampled" else 0)

    @property
    def lanes_at_most(self) -> int:
        """Lanes that the worker with the most of them serves."""
        return -(-self.config.stream.lanes // self.workers)

    def counted(self, batch: Batch, always: bool = False) -> Batch:
        """With global_rows = the rows of all workers that have a weight: where rows are held out, only they know."""
        if self.hold_out is None and not always:
            return batch
        return dataclasses.replace(batch, global_rows=max(1, round(float(sum_over_workers(batch.weight.sum())))))

    def replica_fallbacks(self) -> int:
        """Reads of shards, over all workers, that another place than the first had to serve. A collective call."""
        return round(float(sum_over_workers(torch.tensor(float(self.replicas.fallbacks), device=self.device))))

    def close(self) -> None:
        self.lower.close()
        self.dev.close()
        if self.sequences is not None:
            self.sequences.close()

    def _build(self, block: Block) -> list[Batch]:
        return [b.to(self.device) for b in self.builder.train_steps(block, self.hold_out)]

    def _build_dev(self, split: Split, block: Block) -> list[Batch]:
        return [b.to(self.device) for b in self.builder.dev_steps(block, split)]

    def _build_sequences(self, block: Block) -> list[Batch]:
        return [b.to(self.device) for b in self.builder.sequence_steps(block)]

    def _perceptron(self) -> BehaviouralPerceptron:
        options = self.config.perceptron
        if options.gamma_initial is None:
            options = dataclasses.replace(options, gamma_initial=self.config.upper.gamma0)
        return self._dense(BehaviouralPerceptron(self.config.tables.width, options), "perceptron")

    def _dense(self, module: Any, name: str) -> Any:
        initialise_dense(module, self.config.seed, f"{name}.")
        return module.to(self.device)

    def _optimiser(self, name: str, parameters: nn.Parameter) -> torch.optim.Optimizer:
        dense, upper = self.config.dense, self.config.upper
        rate, decay = (upper.head_lr, 0.0) if name == "dev_head" else (dense.lr, dense.weight_decay)
        return torch.optim.Adam([parameters], lr=rate, weight_decay=decay, fused=True)

    def _upper_optimiser(self, perceptron: BehaviouralPerceptron) -> torch.optim.Optimizer:
        upper = self.config.upper
        named = dict(perceptron.named_parameters())
        gamma = [named.pop("gamma_raw")]
        groups = [
            {"params": list(named.values()), "weight_decay": upper.weight_decay},
            {
                "params": gamma,
                "lr": upper.lr if upper.gamma_lr is None else upper.gamma_lr,
                "weight_decay": upper.weight_decay if upper.decay_gamma else 0.0,
            },
        ]
        return _UPPER[upper.optimiser](groups, lr=upper.lr)
