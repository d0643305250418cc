"""What can be found before a run starts: options that contradict the dataset or one another."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from hydra.utils import get_class, instantiate

from cdr_dist.bilevel.options import ALL_TABLES, DENSE
from cdr_dist.configuration import TrainConfig
from cdr_dist.data import feature_names, storage
from cdr_dist.data.candidates import Candidates
from cdr_dist.data.dataset import FIRST_ID, SEQUENCES, Manifest, read_manifest
from cdr_dist.data.histories import History
from cdr_dist.data.truth import kinds_of_users, of_categories
from cdr_dist.data.words import check
from cdr_dist.embeddings.options import TableSpec
from cdr_dist.errors import UserError, nearest
from cdr_dist.evaluation.classification import METRICS as CLASS_METRICS
from cdr_dist.evaluation.metrics import FULL, RANKING
from cdr_dist.models.protocol import Output
from cdr_dist.training.mirrors import check_mlflow
from cdr_dist.training.options import MOST_TIMES, PhaseConfig

METRICS = ("auc", "gauc", "logloss")
RANKED = re.compile(rf"({FULL})?(?:{'|'.join(RANKING)})@(\d+)")
WEIGHED = ("target_item", "target_category", "source_item", "source_category")
"""What the perceptron reads through the model's tables."""


def check_before_start(config: TrainConfig, folder: str) -> Manifest:
    """Reads the manifest and builds what is cheap to build. UserError names the option or file; writes nothing."""
    storage.use(config.storage)
    manifest = read_manifest(folder)
    check_dataset(config, manifest)
    _check_batch(config, manifest)
    _check_metric(config, manifest)
    if config.trainer.device == "cuda" and config.trainer.workers == 0 and not torch.cuda.is_available():
        raise UserError("trainer.device=cuda: this machine has no CUDA device")
    if config.tables.optimiser == "adam" and config.trainer.device == "cpu":
        raise UserError("tables.optimiser=adam: FBGEMM has no Adam on CPU; use rowwise_adagrad, adagrad or sgd")
    if not config.recipe.phases:
        raise UserError(f"recipe={config.recipe.name}: has no phases")
    _check_model(config, manifest)
    _check_pairs(config, manifest)
    return manifest


def build_model(config: TrainConfig) -> Any:
    """The backbone named by model's `_target_`, with the tables' width and the recipe's variant and transfer."""
    recipe = config.recipe
    variant = {"source": recipe.source}
    if recipe.pretrain or recipe.transfer:
        _check_sequential(config)
        variant |= {"pretrain": recipe.pretrain, "target": recipe.target}
    model = _built("model", config.model, width=config.tables.width, **variant)
    if recipe.transfer:
        model.adapt(_built(f"recipe={recipe.name}, transfer", recipe.transfer))
    return model


def _check_sequential(config: TrainConfig) -> None:
    name = config.model.get("_target_", "") if config.model else ""
    try:
        known = get_class(name)
    except Exception:  # whatever is wrong with it, `_built` says
        return
    if not hasattr(known, "adapt"):
        what = name.rsplit(".", 1)[-1]
        raise UserError(f"recipe={config.recipe.name}: {what} has no encoder of sequences; take model=nextitnet")


def trained_by(model: Any, updates: Sequence[Any]) -> tuple[set[str], set[str]]:
    """Names of the parameters and of the tables of a model that updates train: all of it, unless it says otherwise."""
    if not hasattr(model, "trained"):
        return {name for name, _ in model.named_parameters()}, set(model.spec().tables)
    streams = {update.stream for update in updates if update.counts}
    found = [model.trained(stream == "sequences") for stream in streams]
    return {name for names, _ in found for name in names}, {table for _, tables in found for table in tables}


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def build_updates(config: TrainConfig) -> list[list[Any]]:
    """Of each phase of the recipe the cycle, written out: an update that comes n times stands n times."""
    for times in (spec.times for phase in config.recipe.phases for spec in phase.cycle):
        check(1 <= times <= MOST_TIMES, f"recipe.phases: an update {times} times in a row: must be 1 to {MOST_TIMES:,}")
    return [
        [
            update
            for spec in phase.cycle
            for update in [_built(f"recipe={config.recipe.name}, phase {phase.name}", spec.update)] * spec.times
        ]
        for phase in config.recipe.phases
    ]


def _built(what: str, spec: Any, **more: Any) -> Any:
    """What a `_target_` of the configuration names. UserError says what Hydra, the import or the constructor said."""
    if not spec or "_target_" not in spec:
        raise UserError(f"{what}: needs a _target_")
    try:
        return instantiate(spec, **more)
    except UserError:
        raise
    except Exception as error:  # Hydra wraps whatever the import or the constructor raised
        raise UserError(f"{what}: {_one_line(error.__cause__ or error)}") from error


def check_updates(config: TrainConfig, folder: str) -> None:
    """What the recipe's updates and its way of transfer need: builds them, which loads TorchRec."""
    if getattr(build_model(config), "needs_truth", False):
        kinds_of_users(folder)
    updates = [update for cycle in build_updates(config) for update in cycle]
    check_source_loss(config, updates)
    for update in updates:
        if getattr(update, "needs_truth", False):
            if not of_categories(folder):
                raise UserError(f"recipe={config.recipe.name}: needs data with planted truth, such as data=demo")
            _check_one_by_one(config, build_model(config))
        if getattr(update, "learned", False):
            check_weighable(config, build_model(config))


def check_weighable(config: TrainConfig, model: Any) -> None:
    """UserError: a feature that the perceptron reads and the model does not, no source loss, a theta of no table."""
    lacking = [f for f in WEIGHED if f not in model.spec().features]
    if lacking or not config.recipe.source:
        what = f"the model does not read {lacking[0]}" if lacking else "the recipe has source: false"
        if lacking and hasattr(model, "adapt"):
            what += "; take model=nextitnet_mtl"
        raise UserError(f"recipe={config.recipe.name}: weighs source behaviours, but {what}")
    _check_one_by_one(config, model)
    known = [DENSE, ALL_TABLES, *model.spec().tables]
    for name in config.hypergradient.theta:
        if name not in known:
            raise UserError(f"hypergradient.theta: '{name}' is unknown; {nearest(name, known)}")


def check_source_loss(config: TrainConfig, updates: Sequence[Any]) -> None:
    """UserError: an update that counts a source loss, and a model that has none."""
    counts = config.recipe.source and any(getattr(update, "counts_source", False) for update in updates)
    if counts and _two_rows(config, build_model(config)).source is None:
        raise UserError(
            f"recipe={config.recipe.name}: counts the loss of every source behaviour, but model "
            f"{config.model['_target_']} has none (no source_logit); take recipe=target_only or source_features"
        )


def _check_one_by_one(config: TrainConfig, model: Any) -> None:
    if not getattr(model, "judges_behaviours", True):
        raise UserError(
            f"recipe={config.recipe.name}: weighs source behaviours, but model.source_positions=all judges whole "
            "sequences; take model.source_positions=drawn"
        )


def table_specs(config: TrainConfig, manifest: Manifest, model: Any) -> list[TableSpec]:
    """A table that several features read has as many rows as the largest of their vocabularies."""
    o = config.tables
    rows: dict[str, int] = {}
    spec = model.spec()
    for feature, table in (*spec.features.items(), *spec.sequences.items()):
        rows[table] = max(rows.get(table, 0), manifest.rows[feature_names.vocabulary_of(feature)])
    return [TableSpec(name, rows[name], o.width, o.init_std) for name in spec.tables]


def _check_model(config: TrainConfig, manifest: Manifest) -> None:
    """The backbone, after two rows have gone through it. UserError: what docs/backbone.md asks for and it lacks."""
    model = build_model(config)
    name = f"model {config.model['_target_']}"
    known = feature_names.known(manifest.features)
    for feature in (*model.spec().features, *model.spec().sequences):
        if feature not in known:
            own = feature.startswith(feature_names.DOMAINS) and feature_names.is_bag(feature)
            column = feature_names.column_of(feature)
            how = f"prepare it with item_columns.features={column}" if own else "a mistake"
            if feature.startswith(f"{feature_names.USER}_"):
                how = f"prepare it with user_file= and user_columns.features={column}"
            raise UserError(
                f"{name} reads the feature {feature}, which {config.data} does not have: {how}; "
                f"there are {', '.join(known)}"
            )
    _check_unknown(config, manifest, name, model)
    _check_history(config, manifest, name, model)
    if not config.recipe.target:
        return
    output, target, source, heads, width = _two_rows(config, model)
    if not isinstance(output, Output):
        raise UserError(f"{name}: returns {type(output).__name__}, not cdr_dist.models.protocol.Output")
    found: dict[str, Any] = {"target_logit": output.target_logit, "the target loss": target}
    if config.recipe.source and output.source_logit is not None:
        found |= {"source_logit": output.source_logit, "the source loss": source}
    for what, value in found.items():
        if value is None or tuple(value.shape) != (2,):
            raise UserError(f"{name}: {what} of 2 rows has shape {list(getattr(value, 'shape', []))}, not [2]")
    if tuple(output.target_features.shape) != (2, width):
        shape = list(output.target_features.shape)
        raise UserError(f"{name}: target_features of 2 rows has shape {shape}, not [2, target_feature_width={width}]")
    named = [n for n, _ in model.named_parameters()]
    lost = [h for h in heads if config.recipe.source and not any(n.startswith(h) for n in named)]
    if lost:
        raise UserError(f"{name}: heads() names {lost[0]}, and no parameter's name starts with it")


class _Tried(NamedTuple):
    """What a model says of two rows."""

    output: Any
    target: Any
    source: Any
    heads: Any
    width: Any


def _two_rows(config: TrainConfig, model: Any) -> _Tried:
    """UserError: they do not go through it."""
    try:
        histories = len(_TwoLabels.histories["target"].item)
        embedded = {
            f: torch.zeros(histories if feature_names.of_history(f) else 2, config.tables.width)
            for f in model.spec().features
        }
        labels = _TwoLabels(getattr(model, "draws", 0))
        with torch.no_grad():
            output = model(embedded, labels)
            target, source = model.losses(output, labels)
        return _Tried(output, target, source, model.heads(), model.target_feature_width)
    except Exception as error:  # the author's code, on data of ours
        reason = f"{type(error).__name__}: {_one_line(error)}"
        raise UserError(f"model {config.model['_target_']}: two rows do not go through it ({reason})") from error


def _check_pairs(config: TrainConfig, manifest: Manifest) -> None:
    """UserError: a pairwise loss on rated rows, where no negatives follow a positive."""
    if config.recipe.target and manifest.label == "rating" and config.model.get("loss") == "bpr":
        raise UserError(
            f"model.loss=bpr: {config.data} has rated rows (labels=rating), and no negative for each positive; "
            "take model.loss=bce"
        )


def _check_unknown(config: TrainConfig, manifest: Manifest, name: str, model: Any) -> None:
    """UserError: too many items of the sequences that the model reads are unknown."""
    spec = model.spec()
    read = {"source_history": spec.features, "sequences": spec.sequences}
    if manifest.options.get("vocab") == "train":  # then it is later behaviours' items that are unknown
        return
    for what, features in read.items():
        unknown = manifest.unknown.get(what, 0.0)
        if any(f.startswith("source_history") for f in features) and unknown > config.trainer.max_unknown:
            raise UserError(
                f"{config.data}: {unknown:.1%} of the items in {what} are unknown, more than "
                f"trainer.max_unknown={config.trainer.max_unknown}, and {name} reads them"
            )


def _check_history(config: TrainConfig, manifest: Manifest, name: str, model: Any) -> None:
    """UserError: a model that predicts from histories which hold what it is asked for (DASL's released defect)."""
    read = [f for f in model.spec().features if f.startswith("target_history")]
    if config.recipe.target and read and manifest.options.get("history") == "train":
        raise UserError(
            f"{name} reads {read[0]}, and {config.data} was prepared with history=train, whose histories hold the very "
            "item of a training row: it would learn to look it up; prepare the data with history=past"
        )


class _TwoLabels:
    """Of two rows, one without a history."""

    def __init__(self, draws: int) -> None:
        self.draws = torch.full((2, draws), 0.5)

    label = source_label = torch.tensor([1.0, 0.0])
    source_before, source_item = torch.tensor([[1, 0], [2, 2]])
    candidates = dict.fromkeys(feature_names.DOMAINS, Candidates(torch.tensor([2, 3]), torch.zeros(2)))
    histories = dict.fromkeys(feature_names.DOMAINS, History(*torch.tensor([[2, 3], [2, 2], [1, 0], [2, 0]])))


def check_dataset(config: TrainConfig, manifest: Manifest) -> None:
    """What can be said about a dataset before anything is built."""
    check_mlflow(config)
    unknown = manifest.unknown.get("train", 0.0)
    if unknown > config.trainer.max_unknown:
        raise UserError(
            f"{config.data}: {unknown:.1%} of the training rows have an unknown user or item, more than "
            f"trainer.max_unknown={config.trainer.max_unknown}"
        )
    workers = max(config.trainer.workers, 1)
    if workers > config.stream.lanes:
        raise UserError(f"trainer.workers={workers} but stream.lanes={config.stream.lanes}: a worker needs a lane")
    if config.recipe.target and not manifest.examples("train"):
        raise UserError(f"{config.data}: no training rows")
    if config.recipe.pretrain:
        _check_sequences(config, manifest)
    items = manifest.rows["source_item"] - FIRST_ID
    if config.softmax.negatives > items:
        raise UserError(
            f"softmax.negatives={config.softmax.negatives}: {config.data} has {items} source items; "
            "softmax.negatives=0 takes each of them once"
        )


def _check_sequences(config: TrainConfig, manifest: Manifest) -> None:
    if not manifest.examples(SEQUENCES[0]):
        raise UserError(f"{config.data}: has no source sequences to pre-train on; prepare it with sequences=50")
    longest, kept = int(manifest.options.get("sequences", 0)), config.batch.history_length
    if longest > kept:
        raise UserError(
            f"batch.history_length={kept}: {config.data} has sequences of up to {longest} items, of which only the "
            f"last {kept} would be learned from; batch.history_length={longest} takes them whole"
        )


def most_steps(config: TrainConfig, manifest: Manifest) -> int:
    """Lower updates of a run that is not stopped early."""
    steps = 0
    for phase in config.recipe.phases:
        if _pretrains(phase):
            of_epoch = -(-manifest.examples(SEQUENCES[0]) // (config.batch.sequences or config.batch.size))
        else:
            of_epoch = -(-manifest.examples("train") // (config.batch.size // _group(config, manifest)))
        steps += (phase.epochs or config.trainer.epochs) * of_epoch
    return min(steps, config.trainer.max_steps or steps)


def _pretrains(phase: PhaseConfig) -> bool:
    return any(str(spec.update.get("_target_", "")).endswith(".NextItem") for spec in phase.cycle if spec.update)


def _group(config: TrainConfig, manifest: Manifest) -> int:
    """Batch rows that one stored row becomes."""
    return 1 + config.batch.negatives if manifest.label == "sampled" else 1


def _check_batch(config: TrainConfig, manifest: Manifest) -> None:
    group = _group(config, manifest)
    for option, size in (("batch.size", config.batch.size), ("upper.dev_batch_size", config.upper.dev_batch_size)):
        if size % group:
            raise UserError(f"{option}={size}: must be a multiple of {group} (a row and its negatives)")


def _check_metric(config: TrainConfig, manifest: Manifest) -> None:
    metric, ks = config.evaluation.metric, config.evaluation.ks
    for option in ("ks", "full_ks"):
        if min(getattr(config.evaluation, option), default=1) < 1:
            raise UserError(f"evaluation.{option}={getattr(config.evaluation, option)}: must be at least 1")
    if ks and manifest.label != "sampled":
        raise UserError(
            f"evaluation.ks={ks}: {config.data} stores no negatives to rank (labels=rating); leave it empty"
        )
    if manifest.classes == 2 and config.evaluation.positive_class not in (0, 1):
        raise UserError(f"evaluation.positive_class={config.evaluation.positive_class}: classes are 0 and 1")
    if metric in METRICS:
        return
    if metric in CLASS_METRICS:
        if not manifest.classes:
            raise UserError(f"evaluation.metric={metric}: {config.data} has no classes; prepare it with classes=N")
        return
    ranked = RANKED.fullmatch(metric)
    if ranked is None:
        known = ", ".join((*METRICS, *CLASS_METRICS))
        raise UserError(f"evaluation.metric={metric}: choose {known}, hr@K, ndcg@K, mrr@K, full_hr@K, ...")
    of, k = ("full_ks" if ranked[1] else "ks"), ranked[2]
    if int(k) not in getattr(config.evaluation, of):
        raise UserError(f"evaluation.metric={metric}: needs evaluation.{of}=[{k}]")
