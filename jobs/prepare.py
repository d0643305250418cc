"""Raw logs -> dataset folder.

    python jobs/prepare.py format=table source=beauty.tsv.gz target=sports.tsv.gz out=data/beauty-sports

Prints a table of counts. A dataset that is there already with the same options is kept. With --check only the options,
the inputs and the output folder are checked.
"""

from __future__ import annotations

import logging
import signal
import sys

from cdr_dist.data.counts import counts_table
from cdr_dist.data.prepare import check, options_from_words, prepare
from cdr_dist.data.prepare_options import describe_options
from cdr_dist.errors import UserError


def main(words: list[str]) -> int:
    """Exit code: 0 done, 2 the user's mistake (one line on stderr)."""
    if "--help" in words or "-h" in words:
        print(f"{__doc__}\nOptions, as name=value:\n{describe_options()}")
        return 0
    logging.basicConfig(format="%(message)s")
    logging.getLogger("cdr_dist").setLevel(logging.INFO)  # the clients of object stores have much to say, too
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        options = options_from_words([word for word in words if word != "--check"])
        manifest = check(options) if "--check" in words else prepare(options)
    except UserError as error:
        print(f"prepare: {error}", file=sys.stderr)
        return 2
    if "--check" in words:
        print("the options and the inputs are in order" + ("" if manifest is None else "; the dataset is there"))
    elif manifest is not None:
        print(counts_table(manifest))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
