"""What went wrong, in the user's words."""

import signal


class UserError(ValueError):
    """A mistake the user can mend: one line that names the file, field or option. Jobs exit with 2 on it."""


def nearest(word: str, known: list[str]) -> str:
    """A hint for an unknown word: the nearest known one, or the whole list where it is short."""
    import difflib

    close = difflib.get_close_matches(word, known, n=1)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"known: {', '.join(sorted(known))}" if len(known) <= 20 else "--help lists what there is"


class Stopped(Exception):  # noqa: N818 - not an error
    """The run was told to stop and has a checkpoint to continue from. Jobs exit with 128 + the signal's number."""

    def __init__(self, message: str, told_by: int = signal.SIGTERM) -> None:
        super().__init__(message)
        self.told_by = told_by


STOPPED = "stopped"
"""What a worker returns in place of a summary when it was told to stop."""
