"""Which behaviour trains, which validates, which tests; and up to when the source may be seen.

leave_last   of each user's examples the last is test, the last but one validation, the rest training; a user with
             fewer than three has training examples only
time         by two timestamps, the same for all users
instance     every example by itself, by shares: a user's source behaviours may be in training and in test
user         all examples of a user together, by shares

`train_share` then leaves training examples out; validation, test, histories and vocabularies stay as they are.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cdr_dist.data import hashing
from cdr_dist.data.behaviours import Behaviours, Ints
from cdr_dist.data.prepare_options import PrepareOptions

TRAIN, VALID, TEST, NO_EXAMPLE = 0, 1, 2, 3
LEAST_BEHAVIOURS = 3


def split_of_behaviours(
    target: Behaviours,
    options: PrepareOptions,
    users: NDArray[np.uint64] | None = None,
    made: NDArray[np.bool_] | None = None,
) -> NDArray[np.int8]:
    """TRAIN, VALID or TEST for each row; NO_EXAMPLE where `made` is false, which is so for a user's first rows only,
    and for training rows beyond `train_share`.

    users: `hashing.of_keys` of their keys, needed where shares are drawn.
    """
    made = np.ones(len(target.user), dtype=bool) if made is None else made
    split = _split(target, options, users, made)
    if options.train_share < 1:
        made = made & ((split != TRAIN) | (_drawn(target, options, "train share", users, True) < options.train_share))
    return np.where(made, split, NO_EXAMPLE).astype(np.int8)


def _split(
    target: Behaviours, options: PrepareOptions, users: NDArray[np.uint64] | None, made: NDArray[np.bool_]
) -> NDArray[np.int8]:
    if options.split == "time":
        bounds = np.array([options.valid_from, options.test_from], dtype=np.int64)
        return np.searchsorted(bounds, target.timestamp, side="right").astype(np.int8)
    if options.split in ("instance", "user"):
        drawn = _drawn(target, options, "split", users, options.split == "instance")
        return by_share(drawn, options.valid_share, options.test_share)
    examples = np.bincount(target.user[made], minlength=target.users)[target.user]
    from_end = target.of_user[target.user] - target.place  # 1 is the last
    split = np.select([from_end == 1, from_end == 2], [TEST, VALID], TRAIN)
    return np.where(examples >= LEAST_BEHAVIOURS, split, TRAIN).astype(np.int8)


def _drawn(
    target: Behaviours, options: PrepareOptions, what: str, users: NDArray[np.uint64] | None, each: bool
) -> NDArray[np.float64]:
    """Uniform in (0, 1): a number for each row or, without `each`, for each user."""
    assert users is not None
    place = [target.place] if each else []
    return hashing.uniform(hashing.mix(hashing.key(options.seed, what), users[target.user], *place))


def by_share(drawn: NDArray[np.float64], valid_share: float, test_share: float) -> NDArray[np.int8]:
    """TRAIN, VALID or TEST for numbers that are uniform in (0, 1)."""
    return np.select([drawn < test_share, drawn < test_share + valid_share], [TEST, VALID], TRAIN).astype(np.int8)


def validation_times(target: Behaviours, options: PrepareOptions, split: NDArray[np.int8]) -> Ints:
    """The time of each user before which (strictly) source behaviours may be seen in training: length users.

    time: `valid_from` for everyone; else that of the user's first behaviour of validation or test, of a user without
    one, of the last behaviour. Every user needs a target behaviour.
    """
    if options.split == "time":
        return np.full(target.users, options.valid_from, dtype=np.int64)
    limits = target.timestamp[target.starts[1:] - 1]
    held_out = (split == VALID) | (split == TEST)
    np.minimum.at(limits, target.user[held_out], target.timestamp[held_out])
    return limits
