"""Synthetic source sequences with planted truth: whom a pre-trained encoder serves as it is, and whom it misleads.

Source sequences wander through topics: mostly from one to its successor, the same for everybody, which is what a model
that predicts the next item learns. Every sequence begins with *badge* topics of its user's kind: these tell the kinds
apart, and nothing else does.

    aligned    the target items are of the successor of the last topic: what pre-training has learned to expect next
    contrary   they are of another topic, by a permutation that agrees with the succession nowhere

With `classes` the targets are classes in place of items, each of neighbouring topics.

Both kinds come to the same topics, and the badges tell nothing of what comes next in the source, so a pre-trained
encoder has no reason to keep them to the end of a sequence. As it is, it cannot serve both kinds: aligned users are the
larger part, and the contrary ones suffer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from cdr_dist.data.hashing import key
from cdr_dist.data.popularity import zipf_ranks
from cdr_dist.data.synthetic import PlantedLogs
from cdr_dist.errors import UserError

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class PlantedSequences:
    """Size and shape of the logs. UserError on a value that is out of range."""

    users: int = 4000
    """With target behaviours."""
    source_users: int = 20_000
    """Without: to pre-train on."""
    topics: int = 16
    """That both kinds wander in; target items are of these."""
    badges: int = 4
    """Topics of each kind's own."""
    introduction: int = 3
    """Behaviours of those that every sequence begins with."""
    source_items: int = 2000
    target_items: int = 500
    shortest: int = 10
    longest: int = 30
    """Source behaviours of a user."""
    target_behaviours: int = 3
    """Of a user at most, one at least: few, so that pre-training is worth something."""
    aligned: float = 0.6
    """Share of aligned users."""
    certainty: float = 0.8
    """Probability that a topic is followed by its successor; else by any."""
    target_certainty: float = 0.9
    """Probability that a target item is of the topic that the user's kind says; else of any."""
    exponent: float = 1.0
    """Of Zipf's law, by which source items are chosen within a topic."""
    target_exponent: float = 0.5
    """The same of target items: flatter, since a popular item of the wrong topic tells nothing."""
    classes: int = 0
    """How many classes target behaviours are of; 0: they are of items."""
    train_share: float = 1.0
    """As in prepare: the training examples that are kept."""
    seed: int = 8

    def __post_init__(self) -> None:
        one = ("users", "badges", "introduction", "target_behaviours")
        for name, least in (*((name, 1) for name in one), ("source_users", 0), ("topics", 3)):
            _check(getattr(self, name) >= least, name, getattr(self, name), f"at least {least}")
        least = self.introduction + 1
        _check(least <= self.shortest <= self.longest, "shortest", self.shortest, f"{least} to longest={self.longest}")
        _check(0 <= self.classes <= self.topics, "classes", self.classes, f"0 to topics={self.topics}")
        for name in ("aligned", "certainty", "target_certainty"):
            _check(0 <= getattr(self, name) <= 1, name, getattr(self, name), "between 0 and 1")
        for name, topics in (("source_items", self.topics + 2 * self.badges), ("target_items", self.topics)):
            _check(getattr(self, name) >= topics, name, getattr(self, name), f"at least {topics}, one a topic")


def _check(holds: bool, name: str, value: object, wanted: str) -> None:
    if not holds:
        raise UserError(f"planted sequences: {name}={value}: must be {wanted}")


def planted_sequences(shape: PlantedSequences) -> PlantedLogs:
    """Logs (user_id, item_id, timestamp) and the truth (user_id, kind): a pure function of the shape and its seed."""
    random = np.random.default_rng(int(key("planted sequences", shape.seed)))
    successor, other = _mappings(random, shape.topics)
    people = shape.users + shape.source_users
    contrary = random.random(people) >= shape.aligned
    length = random.integers(shape.shortest, shape.longest + 1, people)
    visited = _wander(random, shape, successor, contrary)
    user, place = np.nonzero(np.arange(shape.longest) < length[:, None])
    topics = shape.topics + 2 * shape.badges
    source = _log(random, "s", user, place, visited[user, place], shape.source_items, shape.exponent, topics)

    behaviours = random.integers(1, shape.target_behaviours + 1, shape.users)
    user, place = np.nonzero(np.arange(shape.target_behaviours) < behaviours[:, None])
    reached = visited[user, length[user] - 1]
    wanted = np.where(contrary[user], other[reached], successor[reached])
    chance = random.random(len(user)) >= shape.target_certainty
    topic = np.where(chance, random.integers(0, shape.topics, len(user)), wanted)
    time = shape.longest + place
    if shape.classes:
        names = [str(of) for of in topic * shape.classes // shape.topics]
        target = pl.DataFrame({"user_id": _names("u", user), "item_id": names, "timestamp": time})
    else:
        target = _log(random, "t", user, time, topic, shape.target_items, shape.target_exponent, shape.topics)

    kinds = np.where(contrary, "contrary", "aligned")
    truth = pl.DataFrame({"user_id": _names("u", np.arange(people)), "kind": kinds})
    return PlantedLogs(source, target, truth)


def _mappings(random: np.random.Generator, topics: int) -> tuple[Ints, Ints]:
    """The succession, one cycle through all topics, and a permutation that agrees with it nowhere: [topics] each."""
    cycle = random.permutation(topics)
    successor = np.empty(topics, dtype=np.int64)
    successor[cycle] = np.roll(cycle, -1)
    other = random.permutation(topics)
    while (other == successor).any():
        other = random.permutation(topics)
    return successor, other


def _wander(random: np.random.Generator, shape: PlantedSequences, successor: Ints, contrary: NDArray[np.bool_]) -> Ints:
    """[people, longest]: the topic of every behaviour."""
    people = len(contrary)
    visited = np.empty((people, shape.longest), dtype=np.int64)
    badges = random.integers(0, shape.badges, (people, shape.introduction))
    visited[:, : shape.introduction] = shape.topics + shape.badges * contrary[:, None] + badges
    topic = random.integers(0, shape.topics, people)
    for step in range(shape.introduction, shape.longest):
        goes_on = random.random(people) < shape.certainty
        topic = np.where(goes_on, successor[topic], random.integers(0, shape.topics, people))
        visited[:, step] = topic
    return visited


def _log(
    random: np.random.Generator,
    prefix: str,
    user: Ints,
    time: Ints,
    topic: Ints,
    items: int,
    exponent: float,
    topics: int,
) -> pl.DataFrame:
    """A behaviour for each user, time and topic: [n] each."""
    of_topic = np.bincount(np.arange(items) % topics, minlength=topics)  # item i is of topic i % topics
    rank = np.empty(len(user), dtype=np.int64)
    for size in np.unique(of_topic):
        mine = of_topic[topic] == size
        rank[mine] = zipf_ranks(random.random(int(mine.sum())), int(size), exponent)
    return pl.DataFrame(
        {"user_id": _names("u", user), "item_id": _names(prefix, rank * topics + topic), "timestamp": time}
    )


def _names(letter: str, numbers: Ints) -> list[str]:
    return [f"{letter}{number:06d}" for number in numbers]
