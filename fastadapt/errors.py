"""Errors that a user can act on."""


class InputError(ValueError):
    """Something that was given does not fit; the message names it and says what to do.

    The command line prints the message alone, without a traceback.
    """


def nearest(word: str, choices, count: int = 5) -> str:
    """The choices most like ``word``, for the end of an error message."""
    import difflib

    found = difflib.get_close_matches(word, list(choices), n=count, cutoff=0.4)
    return ", ".join(found) if found else "none is similar"
