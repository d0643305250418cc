"""Which behaviour trains, which validates, which tests; and up to when the source may be seen.

`leave_last`: of each user's target behaviours the last is test, the last but one validation, the rest training; a
user with fewer than three has training behaviours only. `time`: by two timestamps, the same for all users.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cdr_dist.data.behaviours import Behaviours, Ints
from cdr_dist.data.prepare_options import PrepareOptions

TRAIN, VALID, TEST = 0, 1, 2
LEAST_BEHAVIOURS = 3


def split_of_behaviours(target: Behaviours, options: PrepareOptions) -> NDArray[np.int8]:
    """TRAIN, VALID or TEST for each row."""
    if options.split == "time":
        bounds = np.array([options.valid_from, options.test_from], dtype=np.int64)
        return np.searchsorted(bounds, target.timestamp, side="right").astype(np.int8)
    of_user = target.of_user[target.user]
    from_end = of_user - target.place  # 1 is the last
    split = np.select([from_end == 1, from_end == 2], [TEST, VALID], TRAIN)
    return np.where(of_user >= LEAST_BEHAVIOURS, split, TRAIN).astype(np.int8)


def validation_times(target: Behaviours, options: PrepareOptions) -> Ints:
    """The time of each user before which (strictly) source behaviours may be seen in training: length users.

    leave_last: that of the user's validation behaviour; of a user without one, of the last training behaviour.
    time: `valid_from` for everyone. Every user needs a target behaviour.
    """
    if options.split == "time":
        return np.full(target.users, options.valid_from, dtype=np.int64)
    last = target.starts[1:] - 1
    return target.timestamp[np.where(target.of_user >= LEAST_BEHAVIOURS, last - 1, last)]
