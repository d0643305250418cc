"""Stored rows -> a batch: negatives drawn, source behaviours paired, histories cut, ids as KeyedJaggedTensors.

Everything random here is a function of (seed, epoch, example_id, j), so a batch does not depend on the worker that
builds it, nor on what was built before.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from cdr_dist.data import keyed
from cdr_dist.data.candidates import Candidates, CandidateSampler
from cdr_dist.data.dataset import PADDING, SEQUENCES, UNKNOWN, USERS, Manifest
from cdr_dist.data.feature_names import (
    DOMAINS,
    HISTORY_FEATURES,
    SHARED_FEATURES,
    USER,
    column_of,
    is_bag,
    of_history,
    of_target_item,
)
from cdr_dist.data.hashing import integers, key, mix, uniform
from cdr_dist.data.histories import History
from cdr_dist.data.hold_out import HoldOut, Split
from cdr_dist.data.item_columns import item_categories, item_counts, values_of
from cdr_dist.data.negatives import draw_negatives
from cdr_dist.data.options import BatchOptions, SoftmaxOptions
from cdr_dist.data.stored_rows import StoredRows
from cdr_dist.data.stream import Block, Place, Rows

# Categories are those of the items (as in the vocabulary), which costs less than reading them row by row.
_EXAMPLE = ["example_id", "user", "item", "label"]
_CANDIDATES = ["source_candidates_item", "source_candidates_label"]
# Of the user's other training behaviours: negatives avoid the items, dev batches and the hold-out need all.
_PEERS = ["target_candidates_item", "target_candidates_label", "position"]
_COLUMNS = ("label", "source_label", "source_valid", "source_before", "source_item", "weight", "user", "example")


EVALUATION = Place(-1, 0)
"""What evaluation draws, it draws as if at this place."""


@dataclass(frozen=True)
class Draws:
    """How many numbers a backbone asks for by example; fixed: the same for a user, whatever the epoch and example.
    of_user: of planted data, the number of each user's kind [users], in place of chance."""

    count: int = 0
    fixed: bool = False
    of_user: NDArray[np.float32] | None = None


@dataclass
class Batch:
    """One worker's part of a global batch; B rows, of which fillers (weight 0) do not count.

    train: the features whose rows train: of the rows one id each, then of the distinct items of histories, bags of
    values and candidates of a softmax, where the model reads them. histories: domain -> histories, one a stored row:
    the B / histories rows that a stored row became stand after one another and share it.
    label, source_label, weight: float32 [B]; source_valid: bool [B]; user, example: int64 [B].
    source_before: int64 [B]: how many of the row's source history came before its source behaviour (or that of which
    it is the negative), 0 unless the model reads both; source_item: int64 [B], which item it is. example names the
    stored row: a positive and its negatives share it. candidates: domain -> those of its softmax; draws: float32
    [histories, as many as the model asks for].
    """

    train: KeyedJaggedTensor
    histories: Mapping[str, History]
    label: Tensor
    source_label: Tensor
    source_valid: Tensor
    source_before: Tensor
    source_item: Tensor
    weight: Tensor
    user: Tensor
    example: Tensor
    global_rows: int
    group: int = 1  # rows after one another that belong together: a positive and its negatives
    candidates: Mapping[str, Candidates] = field(default_factory=dict)
    draws: Tensor = field(default_factory=lambda: torch.zeros(0, 0))

    def __len__(self) -> int:
        return len(self.label)

    def to(self, device: torch.device) -> Batch:
        if device.type == "cpu":
            return self
        moved = {name: value.to(device) for name, value in vars(self).items() if hasattr(value, "to")}
        for name in ("histories", "candidates"):
            moved[name] = {domain: of.to(device) for domain, of in getattr(self, name).items()}
        return Batch(**moved, global_rows=self.global_rows, group=self.group)


class BatchBuilder:
    """Turns stored rows into batches for one dataset. features: that the model reads; histories: domains whose
    histories somebody else reads; sequences: features of batches of source sequences; draws: numbers that the model
    asks for by example, or by user where they are fixed. category_of: of each domain that is read, the category of
    every item [rows].
    """

    def __init__(
        self,
        folder: str,
        manifest: Manifest,
        options: BatchOptions,
        seed: int,
        features: Collection[str],
        histories: Collection[str] = (),
        softmax: SoftmaxOptions | None = None,
        sequences: Collection[str] = (),
        draws: Draws | None = None,
    ) -> None:
        self._options, self._seed = options, seed
        self._sequences, self._draws = sequences, draws or Draws()
        self._next = "source_next" in features
        self._source = any(f.startswith("source_") and not of_history(f) for f in features)
        self._source_user = "source_user" in features
        self._trained = [f for f in HISTORY_FEATURES if f in features]
        self._bags = [f for f in features if is_bag(f)]
        read = [f for f in features if of_history(f)]
        self._histories = [d for d in DOMAINS if d in histories or any(f.startswith(d) for f in read)]
        self._answers = any(f.startswith("target_history") for f in read)
        self._before = self._source and any(f.startswith("source_") for f in read)
        self._peers = bool(histories)  # who weighs behaviours holds some of the user's other ones out
        self._sampled = manifest.label == "sampled"
        self._eval_negatives = manifest.eval_negatives
        self._items = {d: manifest.rows[f"{d}_item"] for d in DOMAINS}
        domains = DOMAINS if self._source or sequences or "source" in self._histories else ("target",)
        self.category_of = {d: item_categories(folder, manifest, d) for d in domains}
        self._values = {
            of: values_of(folder, manifest, vocabulary, sorted({column_of(f) for f in self._bags if f.startswith(of)}))
            for of, vocabulary in ((USER, USER), *((d, f"{d}_item") for d in DOMAINS))
        }
        self._shared = [f for f in SHARED_FEATURES if f in features]
        self._samplers = {
            d: CandidateSampler(
                (softmax if d == "source" else None) or SoftmaxOptions(), seed, d, item_counts(folder, manifest, d)
            )
            for d in DOMAINS
            if f"{d}_softmax" in {*features, *sequences}
        }

    @property
    def expansion(self) -> int:
        """Batch rows that one stored training row becomes: itself and its negatives."""
        return 1 + self._options.negatives if self._sampled else 1

    def columns(self, split: str) -> list[str]:
        """Of a split, or of the users' rows."""
        if split in SEQUENCES:
            return ["example_id", "source_history_item"]
        if split == USERS:
            wanted = ["example_id", "user"]
        elif split == "train":
            wanted = [*_EXAMPLE, *(_PEERS if self._peers else _PEERS[: int(self._sampled)])]
        else:
            wanted = [*_EXAMPLE, *(["negatives_item"] if self._sampled else [])]
        if self._source:
            wanted += _CANDIDATES
        if self._before:
            wanted += ["source_candidates_before", "source_history_first"]
        wanted += [f"{domain}_history_item" for domain in self._histories]
        return wanted

    def train(
        self,
        stored: StoredRows,
        place: Place,
        global_rows: int,
        hold_out: HoldOut | Split | None = None,
        draws: int = 1,
    ) -> Batch:
        """global_rows: stored rows of the global step; the batch counts its negatives too.

        Rows that `hold_out` keeps for the dev loss get weight 0 (global_rows still counts them). draws: how often every
        row comes, each time with another draw of its source behaviour.
        """
        return self._completed(self._train(stored, place.epoch, global_rows, hold_out, draws), stored, place)

    def _train(
        self, stored: StoredRows, epoch: int, global_rows: int, hold_out: HoldOut | Split | None, draws: int = 1
    ) -> Batch:
        copies = _Copies(len(stored), draws)
        item, label = stored["item"][copies.row], stored["label"][copies.row]
        batch = self._with_negatives(stored, copies, item, label, "", epoch, global_rows)
        if hold_out is not None and len(stored):
            kept = ~hold_out.held(stored, epoch)
            batch.weight = torch.from_numpy(np.repeat(kept, draws * self.expansion)).float()
        return batch

    def dev_steps(self, block: Block, split: Split) -> list[Batch]:
        """`train` for every step of a block, of the rows of the dev set alone."""
        found = []
        for rows in block.steps:
            own = rows.stored.arranged(np.flatnonzero(split.held(rows.stored, rows.place.epoch)))
            found.append(self.train(own, rows.place, rows.global_rows))
        return found

    def train_steps(self, block: Block, hold_out: HoldOut | Split | None = None) -> list[Batch]:
        """`train` for every step of a block, made together."""
        every = [rows.global_rows for rows in block.steps]
        stored = [len(rows.stored) for rows in block.steps]
        if 0 in stored:
            return [self.train(r.stored, r.place, r.global_rows, hold_out) for r in block.steps]
        whole = self._train(block.stored, block.steps[0].place.epoch, sum(every), hold_out)
        batches = _split(whole, stored, [rows * self.expansion for rows in every])
        histories = self._histories_of(block.stored, stored)
        draws = self._drawn(block.stored, block.steps[0].place.epoch).split(stored)
        parts = zip(batches, histories, draws, block.steps, strict=True)
        return [self._joined(batch, own, drawn, step.place) for batch, own, drawn, step in parts]

    def sequence_steps(self, block: Block) -> list[Batch]:
        """Batches of source sequences, of which a row is nothing but its history: one for every step of a block."""
        histories = self._histories_of(block.stored, [len(rows.stored) for rows in block.steps], ["source"])
        return [self._of_sequences(of, rows, rows.place) for of, rows in zip(histories, block.steps, strict=True)]

    def sequences(self, rows: Rows) -> Batch:
        """The same for evaluation, with the candidates of every evaluation."""
        (histories,) = self._histories_of(rows.stored, [len(rows.stored)], ["source"])
        return self._of_sequences(histories, rows, EVALUATION)

    def _of_sequences(self, histories: dict[str, History], rows: Rows, place: Place) -> Batch:
        candidates = self._candidates(self._sequences, place)
        ids = {feature: of for feature, (of, _) in self._more(self._sequences, histories, candidates).items()}
        example = _filled(rows.stored["example_id"], max(1, len(rows.stored)), torch.int64)
        label = torch.zeros(len(example))
        return Batch(
            train=keyed.of_any_length(ids),
            histories=histories,
            label=label,
            source_label=label,
            source_valid=label > 0,
            source_before=torch.zeros_like(example),
            source_item=torch.zeros_like(example),
            weight=torch.ones_like(label),
            user=torch.zeros_like(example),
            example=example,
            global_rows=rows.global_rows,
            candidates=candidates,
        )

    def dev_of_same_users(
        self, stored: StoredRows, epoch: int, global_rows: int, hold_out: HoldOut | None = None, each: int = 1
    ) -> Batch:
        """For every stored row `each` other training behaviours of its user: any others, or some of those held out.

        A model that reads target histories gets later ones alone: an earlier one stands in the history of the row, and
        would be known. What a user has too few of has weight 0 (global_rows still counts it).
        """
        copies = _Copies(len(stored), each)
        row, turn = copies.row, copies.copy
        peers, position = stored.lists("target_candidates_item"), stored["position"][row]
        bits = mix(key("dev", self._seed), epoch, stored["example_id"][row])
        after = position if self._answers else np.full(len(row), -1)
        if hold_out is not None:
            held = hold_out.of(stored["user"][row], peers.lengths[row], epoch)
            chosen, valid = held.one(bits, turn, after)
        else:  # the others, in a circle that the row itself is left out of
            skipped = (position >= 0) & ~(after >= 0)
            count = peers.lengths[row] - (after + 1) - skipped
            chosen = after + 1 + (integers(bits, np.maximum(count, 1)) + turn) % np.maximum(count, 1)
            chosen += skipped & (chosen >= position)
            valid = turn < count
        chosen = np.where(valid, chosen, 0)
        item, label = (stored.lists(f"target_candidates_{part}").pick(row, chosen) for part in ("item", "label"))
        batch = self._with_negatives(stored, copies, item, label, "dev_", epoch, global_rows)
        batch = self._completed(batch, stored, Place(epoch))
        if len(stored):
            batch.weight = torch.from_numpy(np.repeat(valid, self.expansion)).float()
        return batch

    def _with_negatives(
        self,
        stored: StoredRows,
        copies: _Copies,
        item: NDArray,
        label: NDArray,
        name: str,
        epoch: int,
        global_rows: int,
    ) -> Batch:
        """Every given behaviour, one a copy, and its negatives; `name` keeps the draws of different uses apart."""
        k = self.expansion - 1
        place, j = _expanded(len(item), k)
        row = copies.row[place]
        item = item[place].astype(np.int64)
        label = np.where(j > 0, 0.0, label[place])
        negative = np.flatnonzero(j > 0)
        if len(negative):
            item[negative] = draw_negatives(
                key(f"{name}negative", self._seed),
                (epoch, stored["example_id"][row[negative]], j[negative]),
                stored.lists("target_candidates_item"),
                row[negative],
                self._items["target"],
            )
        draw = j + (k + 1) * copies.copy[place]
        rows = global_rows * copies.each * self.expansion
        return self._assemble(stored, row, draw, item, label, epoch, k, rows)

    def evaluate(self, stored: StoredRows, global_rows: int, negatives: bool = True) -> Batch:
        """Stored negatives (or none), and a fixed draw of the source behaviour (the one of epoch -1).

        One of the user's own, the same for a row and its negatives: as where there is nothing but a user to ask about.
        """
        k = self._eval_negatives if self._sampled and negatives else 0
        row, j = _expanded(len(stored), k)
        item, label = stored["item"][row], stored["label"][row].astype(np.float64)
        negative = np.flatnonzero(j > 0)
        if len(negative):
            item[negative] = stored.lists("negatives_item").pick(row[negative], j[negative] - 1)
            label[negative] = 0.0
        batch = self._assemble(stored, row, 0 * j, item, label, -1, 0, global_rows * (1 + k))
        return self._completed(batch, stored, EVALUATION)

    def users(self, stored: StoredRows, global_rows: int) -> Batch:
        """Rows of users, each with the latest source behaviour and the latest histories, and without an item."""
        nothing = np.zeros(len(stored), dtype=np.int64)
        batch = self._assemble(
            stored, np.arange(len(stored)), nothing, nothing + PADDING, np.zeros(len(stored)), -1, 0, global_rows
        )
        return self._completed(batch, stored, EVALUATION)

    def _assemble(
        self,
        stored: StoredRows,
        row: NDArray,
        draw: NDArray,
        item: NDArray,
        label: NDArray,
        epoch: int,
        k: int,
        global_rows: int,
    ) -> Batch:
        features = {"user": stored["user"][row], "target_item": item, "target_category": self._of("target", item)}
        source_label = np.zeros(len(row))
        source_item = before = np.zeros(len(row), dtype=np.int64)
        valid = np.zeros(len(row), dtype=bool)
        if self._source:
            pair = self._pair(stored, row, draw, epoch, k)
            features |= {"source_item": pair.item, "source_category": self._of("source", pair.item)}
            source_label, valid, before, source_item = pair.label, pair.valid, pair.before, pair.item
        if self._source_user:
            features["source_user"] = features["user"]
        if self._next:
            features["source_next"] = features["source_item"]
        if not len(row):  # a worker without rows would crash the lookup and take its peers along
            features = {n: np.zeros(1, dtype=np.int64) for n in features}
        rows = max(len(row), 1)
        return Batch(
            train=keyed.one_id_a_row(features),
            histories={},
            source_valid=_filled(valid, rows, torch.bool),
            source_before=_filled(before, rows, torch.int64),
            source_item=_filled(source_item, rows, torch.int64),
            user=_filled(stored["user"][row], rows, torch.int64),
            example=_filled(stored["example_id"][row], rows, torch.int64),
            global_rows=global_rows,
            group=1 + k if len(row) else 1,
            label=_filled(label, rows, torch.float32),
            source_label=_filled(source_label, rows, torch.float32),
            weight=_filled(np.ones(len(row)), rows, torch.float32),
        )

    def target_items(self, item: NDArray[np.int64]) -> KeyedJaggedTensor:
        """The features of target items [n], without rows to which they belong."""
        features = keyed.one_id_a_row({"target_item": item, "target_category": self._of("target", item)})
        bags = {f: self._bag(f, item) for f in self._bags if of_target_item(f)}
        return keyed.with_more(features, bags) if bags else features

    def _completed(self, batch: Batch, stored: StoredRows, place: Place) -> Batch:
        (histories,) = self._histories_of(stored, [len(stored)])
        return self._joined(batch, histories, self._drawn(stored, place.epoch), place)

    def _joined(self, batch: Batch, histories: dict[str, History], draws: Tensor, place: Place) -> Batch:
        """With what is not of its rows one by one."""
        candidates = {} if place == EVALUATION else self._candidates(self._shared, place)
        more = self._more([*self._trained, *self._shared], histories, candidates)
        for feature in self._bags:
            of = feature.partition("_")[0]
            row = batch.train[USER if of == USER else f"{of}_item"].values() if not of_history(feature) else None
            more[feature] = self._bag(feature, (histories[of].item if row is None else row).numpy())
        train = keyed.with_more(batch.train, more) if more else batch.train
        return replace(batch, train=train, histories=histories, candidates=candidates, draws=draws)

    def _more(
        self, features: Collection[str], histories: Mapping[str, History], candidates: Mapping[str, Candidates]
    ) -> dict[str, tuple[Tensor, Tensor | None]]:
        """Of histories and candidates: feature -> ids, one each."""
        found: dict[str, tuple[Tensor, Tensor | None]] = {}
        for feature in features:
            domain = feature.partition("_")[0]
            if of_history(feature):
                found[feature] = getattr(histories[domain], column_of(feature)), None
            elif domain in candidates:
                found[feature] = candidates[domain].item, None
        return found

    def _candidates(self, features: Collection[str], place: Place) -> dict[str, Candidates]:
        return {d: of.of(place.epoch, place.step) for d, of in self._samplers.items() if f"{d}_softmax" in features}

    def _drawn(self, stored: StoredRows, epoch: int) -> Tensor:
        """[stored rows, count]; a worker without rows has one."""
        if self._draws.of_user is not None:
            kind = self._draws.of_user[stored["user"] if len(stored) else [UNKNOWN]]
            return torch.from_numpy(kind[:, None].repeat(self._draws.count, 1))
        bits = mix(key("draw", self._seed), stored["example_id"] if len(stored) else np.zeros(1, dtype=np.int64))
        if self._draws.fixed:
            user = stored["user"] if len(stored) else np.zeros(1, dtype=np.int64)
            bits = np.where(user > UNKNOWN, mix(key("draw of user", self._seed), user), bits)
        else:
            bits = mix(np.uint64(epoch % 2**64), bits)
        drawn = uniform(mix(key("draws"), bits[:, None], np.arange(self._draws.count)))
        return torch.from_numpy(drawn.astype(np.float32))

    def _bag(self, feature: str, ids: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """The values of items or users [n] in a declared column: ids [total], int32 lengths [n]."""
        values, lengths = self._values[feature.partition("_")[0]][column_of(feature)].of(ids)
        return torch.from_numpy(values.astype(np.int64)), torch.from_numpy(lengths.astype(np.int32))

    def _histories_of(
        self, stored: StoredRows, sizes: Sequence[int], domains: Sequence[str] | None = None
    ) -> list[dict[str, History]]:
        """Of so many stored rows each; a worker without rows has one empty history."""
        found = {
            domain: History.of_steps(
                stored.lists(f"{domain}_history_item"), sizes, self._options.history_length, self.category_of[domain]
            )
            for domain in (self._histories if domains is None else domains)
        }
        return [{domain: of[step] for domain, of in found.items()} for step in range(len(sizes))]

    def _of(self, domain: str, item: NDArray) -> NDArray[np.int32]:
        """The items' categories."""
        return self.category_of[domain][item]

    def _pair(self, stored: StoredRows, row: NDArray, draw: NDArray, epoch: int, k: int) -> _Pair:
        """A source behaviour of the same user, another for every `draw` of a row.

        With sampled labels it is one with probability 1/(1+k), else a negative item, as often as a target row is.
        """
        example = stored["example_id"][row]
        candidates = stored.lists("source_candidates_item")
        count = candidates.lengths[row]
        index = integers(mix(key("pair", self._seed), epoch, example, draw), np.maximum(count, 1))
        item = candidates.pick(row, index).astype(np.int64)
        label = stored.lists("source_candidates_label").pick(row, index).astype(np.float64)
        valid = count > 0
        if self._next:
            valid &= item > UNKNOWN  # nobody can predict what is not known
        elif self._sampled and k:
            coin = uniform(mix(key("source_label", self._seed), epoch, example, draw))
            negative = np.flatnonzero(valid & (coin >= 1.0 / (1 + k)))
            item[negative] = draw_negatives(
                key("source_negative", self._seed),
                (epoch, example[negative], draw[negative]),
                candidates,
                row[negative],
                self._items["source"],
            )
            label[negative] = 0.0
        return _Pair(item, label, valid, self._earlier(stored, row, index))

    def _earlier(self, stored: StoredRows, row: NDArray, index: NDArray) -> NDArray[np.int64]:
        """How many of a batch's history came before the source candidate at an index, [n]."""
        if not self._before:
            return np.zeros(len(row), dtype=np.int64)
        history = stored.lists("source_history_item").lengths[row]
        kept = np.minimum(history, self._options.history_length)
        first = stored["source_history_first"][row] + history - kept
        return np.clip(stored.lists("source_candidates_before").pick(row, index) - first, 0, kept).astype(np.int64)


@dataclass(frozen=True)
class _Pair:
    item: NDArray
    label: NDArray
    valid: NDArray
    before: NDArray


class _Copies:
    """Every stored row `each` times, copies after one another. row, copy: [rows x each], row and number of the copy."""

    def __init__(self, rows: int, each: int) -> None:
        self.each = each
        self.row, self.copy = np.repeat(np.arange(rows), each), np.tile(np.arange(each), rows)


def _split(whole: Batch, stored: Sequence[int], global_rows: Sequence[int]) -> list[Batch]:
    """Batches of so many stored rows each, one after the other."""
    each = len(whole) // sum(stored)
    sizes = [n * each for n in stored]
    of = {name: getattr(whole, name).split(sizes) for name in _COLUMNS}
    parts = zip(keyed.split(whole.train, sizes), global_rows, strict=True)
    return [
        Batch(train=train, histories={}, global_rows=rows, group=whole.group, **{n: of[n][i] for n in _COLUMNS})
        for i, (train, rows) in enumerate(parts)
    ]


def _expanded(rows: int, k: int) -> tuple[NDArray, NDArray]:
    return np.repeat(np.arange(rows), 1 + k), np.tile(np.arange(1 + k), rows)


def _filled(values: NDArray, rows: int, dtype: torch.dtype) -> Tensor:
    if len(values) == rows:
        return torch.from_numpy(np.ascontiguousarray(values)).to(dtype)
    return torch.zeros(rows, dtype=dtype)
