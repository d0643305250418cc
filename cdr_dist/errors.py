"""What went wrong, in the user's words."""


class UserError(ValueError):
    """A mistake the user can mend: one line that names the file, field or option. Jobs exit with 2 on it."""


def nearest(word: str, known: list[str]) -> str:
    """A hint for an unknown word: the nearest known one, or the whole list."""
    import difflib

    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(sorted(known))}"


class Stopped(Exception):  # noqa: N818 - not an error
    """The run was told to stop and has a checkpoint to continue from. Jobs exit with 143."""


STOPPED = "stopped"
"""What a worker returns in place of a summary when it was told to stop."""
