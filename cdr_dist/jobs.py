"""What every job shares: --help, and exit codes a scheduler can trust."""

from __future__ import annotations

import logging
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable

DONE, FAILED, USERS_MISTAKE, INTERRUPTED = 0, 1, 2, 130
UNREAD = 128 + signal.SIGPIPE
"""What a shell reports of a program that the signal ended."""

Main = Callable[[list[str]], int | None]


def run_job(name: str, about: str | None, main: Main, more_help: Callable[[], str] | None = None) -> int:
    """Runs main(words): 0 done, 2 the user's mistake (one line), 143 or 130 stopped on request, 1 anything else.

    A main that returns a code decides by itself. A job whose output nobody reads any more (`… | head`) ends without a
    word.
    """
    try:
        code = _code(name, about, main, more_help)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes it once more
        return UNREAD
    return code


def _unread() -> bool:
    """Whether standard output is a pipe without a reader."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _code(name: str, about: str | None, main: Main, more_help: Callable[[], str] | None) -> int:
    words = sys.argv[1:]
    os.environ.setdefault("GLOG_minloglevel", "2")
    if any(w in ("-h", "--help", "help") for w in words):
        print((about or "").strip())
        if more_help:
            print("\n" + more_help())
        return DONE
    from cdr_dist import logs
    from cdr_dist.data.retries import redacted, refuse_secrets
    from cdr_dist.errors import Stopped, UserError

    folder = next((word.partition("=")[2] for word in words if word.startswith(("run=", "out="))), "")
    logs.configure(name, folder, level=logging.WARNING)
    try:
        for word in words:
            refuse_secrets(word)
        return main(words) or DONE
    except UserError as error:
        logs.error(name, redacted(str(error)))
        return USERS_MISTAKE
    except Stopped as error:
        logs.error(name, str(error))
        return 128 + error.told_by
    except KeyboardInterrupt:
        logs.error(name, "interrupted")
        return INTERRUPTED
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _unread():
            raise
        print(redacted(traceback.format_exc()), end="", file=sys.stderr)
        return FAILED
