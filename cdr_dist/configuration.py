"""The structured configuration of a training run, composed by Hydra from configs/ and `key=value` words.

Every component owns its options (with their documentation and checks); this file joins them and turns a user's
mistakes into one line.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cdr_dist.bilevel.options import HypergradientOptions, PerceptronOptions
from cdr_dist.data.options import SoftmaxOptions, StorageOptions, StreamOptions
from cdr_dist.data.prepare_options import option_names
from cdr_dist.data.words import fields_of, pair_of
from cdr_dist.embeddings.options import TableOptions
from cdr_dist.errors import UserError, nearest
from cdr_dist.training.options import (
    BatchConfig,
    DenseOptions,
    EvaluationOptions,
    RecipeConfig,
    TrainerOptions,
    UpperOptions,
    WarmStartOptions,
)

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
CHOSEN = ("model", "recipe", "preset")
"""Options whose values name a file of configs/."""
LITERAL = ("data", "run", "warm_start.run", "trainer.mlflow")
"""Options whose values are taken as they are: paths with '=' or '(' break Hydra's grammar, 2024 becomes a number."""
STARTS = "tables.start."
"""The same goes for options that start like this; what follows is the name of a table."""


@dataclass
class TrainConfig:
    """All options of jobs/train.py."""

    data: str = "demo"
    """A dataset folder (local or s3://), or 'demo', 'demo_sequences', 'demo_sequences_tenth', 'demo_classes': data with
    planted truth, written on first use."""
    run: str = "runs/${recipe.name}-${seed}"
    """The run folder; the same folder continues where it stopped."""
    seed: int = 8
    """Of every draw and of every parameter's first value."""
    model: Any = None
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    softmax: SoftmaxOptions = field(default_factory=SoftmaxOptions)
    stream: StreamOptions = field(default_factory=StreamOptions)
    storage: StorageOptions = field(default_factory=StorageOptions)
    tables: TableOptions = field(default_factory=TableOptions)
    dense: DenseOptions = field(default_factory=DenseOptions)
    perceptron: PerceptronOptions = field(default_factory=PerceptronOptions)
    hypergradient: HypergradientOptions = field(default_factory=HypergradientOptions)
    upper: UpperOptions = field(default_factory=UpperOptions)
    warm_start: WarmStartOptions = field(default_factory=WarmStartOptions)
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    trainer: TrainerOptions = field(default_factory=TrainerOptions)


ConfigStore.instance().store(name="train_schema", node=TrainConfig)
# A configuration that reads the environment, such as a stranger's config.yaml, would bring secrets into run folders.
OmegaConf.clear_resolver("oc.env")


def of_prepare_and_train(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Options of a job that both prepares and trains, apart; one that the two share goes to both."""
    names = option_names()
    shared = {name for name in names if name in fields_of(TrainConfig)}
    keyed = [(word.partition("=")[0], word) for word in words]
    return [word for key, word in keyed if key in names], [
        word for key, word in keyed if key not in names or key in shared
    ]


def from_words(words: Sequence[str]) -> TrainConfig:
    """`key=value` words -> a checked configuration. UserError: unknown option (with the nearest), bad value."""
    return as_config(compose_words(words))


def compose_words(words: Sequence[str]) -> DictConfig:
    groups = {name: sorted(f.stem for f in (CONFIGS / name).glob("*.yaml")) for name in CHOSEN}
    choices: list[str] = []
    options: list[tuple[str, str]] = []
    for word in words:
        if word.startswith("--"):
            raise UserError(f"{word}: unknown; {nearest(word, ['--check', '--help'])}")
        name, value = pair_of(word)
        if _is_literal(name) and not value:
            raise UserError(f"{name}= is empty")
        if name in groups:
            if value not in groups[name]:
                raise UserError(f"{name}={value}: unknown {name}; {nearest(value, groups[name])}")
            choices.append(word)
        else:
            options.append((name, value))
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        known = _known(tuple(choices))
        for name, _ in options:
            if name not in known and not name.startswith(("+model.", STARTS)):
                raise UserError(f"{name}: unknown option; {nearest(name, sorted(known | set(groups)))}")
        _check_grammar(options)
        try:
            return compose("train", choices + [_quoted(name, value) for name, value in options])
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(_reason(error)) from error


def _check_grammar(options: Sequence[tuple[str, str]]) -> None:
    parser = OverridesParser.create()
    for name, value in options:
        try:
            parser.parse_override(_quoted(name, value))
        except HydraException as error:
            hint = "lists are written [64,32]; text with special characters needs quotes within the shell's"
            raise UserError(f"{name}={value}: cannot be read; {hint}") from error


def as_config(composed: DictConfig) -> TrainConfig:
    """Resolves a composed configuration into dataclasses, whose checks run."""
    try:
        return OmegaConf.to_object(composed)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise UserError(_reason(error)) from error


def to_yaml(config: TrainConfig) -> str:
    return OmegaConf.to_yaml(OmegaConf.structured(config), sort_keys=False)


def from_yaml(text: str) -> TrainConfig:
    return as_config(OmegaConf.merge(OmegaConf.structured(TrainConfig), OmegaConf.create(text)))  # type: ignore[arg-type]


def flat(config: TrainConfig) -> dict[str, Any]:
    """Every option, dotted -> its value."""
    return _flat(OmegaConf.to_container(OmegaConf.structured(config)))


def whole_model(model: Any) -> dict[str, Any]:
    """With its constructor's defaults for what is not said: an option that a later version adds changes no earlier
    run."""
    given = OmegaConf.to_container(model) if OmegaConf.is_config(model) else dict(model or {})
    assert isinstance(given, dict)
    try:
        parameters = inspect.signature(get_class(given["_target_"])).parameters
    except Exception:  # whatever is wrong with it, building it says
        return given  # type: ignore[return-value]
    defaults = {n: of.default for n, of in parameters.items() if of.default is not of.empty}
    return {n: list(of) if isinstance(of, tuple) else of for n, of in defaults.items()} | given  # type: ignore[return-value]


def differences(a: TrainConfig, b: TrainConfig, leave_out: Sequence[str] = ()) -> list[str]:
    """`key: a -> b` for every option that differs."""
    left, right = flat(a), flat(b)
    if left.get("model._target_") == right.get("model._target_"):
        left, right = (of | _flat({"model": whole_model(c.model)}) for of, c in ((left, a), (right, b)))
    return [
        f"{name}: {left.get(name)} -> {right.get(name)}"
        for name in sorted(left.keys() | right.keys())
        if left.get(name) != right.get(name) and not name.startswith(tuple(leave_out))
    ]


def _is_literal(name: str) -> bool:
    return name in LITERAL or name.startswith(STARTS)


def _quoted(name: str, value: str) -> str:
    if not _is_literal(name):
        return f"{name}={value}"
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("${", "\\${")
    added = "++" if name.startswith(STARTS) else ""
    return f'{added}{name}="{escaped}"'


@functools.cache
def _known(choices: tuple[str, ...]) -> frozenset[str]:
    """The options that there are once these files of configs/ are chosen; within a Hydra context."""
    return frozenset(_flat(OmegaConf.to_container(compose("train", list(choices)))))


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, dict):
        return {prefix: node}
    found: dict[str, Any] = {}
    for name, value in node.items():
        found |= _flat(value, f"{prefix}.{name}" if prefix else str(name))
    return found


def _reason(error: BaseException) -> str:
    """`option: what is wrong with its value`, from the innermost error: Hydra wraps OmegaConf's."""
    while isinstance(error.__cause__, HydraException | OmegaConfBaseException):
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    name = next((m.group(1) for line in lines if (m := re.match(r"full_key: (\S+)", line))), None)
    hint = "; lists are written [64,32]" if "ListConfig" in lines[0] else ""
    return f"{name}: {lines[0]}{hint}" if name else lines[0]
