"""Errors that a user can act on."""

from collections.abc import Iterable


class InputError(ValueError):
    """Something that was given does not fit; the message names it and says what to do.

    The command line prints the message alone, without a traceback. It is one line, whatever the
    names and values of files that it quotes: what cannot be printed is escaped.
    """

    def __init__(self, message: object = ""):
        super().__init__(printable(str(message)))


def printable(text: str) -> str:
    r"""Escape line breaks, colour codes and all else that cannot be printed, as ``repr`` does."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type's name if it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def said_by_system(error: OSError) -> str:
    """Return in one line what the system said of which file."""
    if error.strerror is None:
        return str(error)
    where = [str(name) for name in (error.filename, error.filename2) if name is not None]
    shown = " and ".join(name if len(name) <= 200 else f"{name[:200]}…" for name in where)
    return f"{shown}: {error.strerror}" if shown else error.strerror


def how_it_ended(code: int) -> str:
    """Say how a process ended, of its exit code as subprocess and multiprocessing give it."""
    return f"by signal {-code}" if code < 0 else f"with exit code {code}"


def nearest(word: str, choices: Iterable[str], count: int = 5) -> str:
    """Name the choices most like ``word``, for the end of an error message."""
    import difflib

    found = difflib.get_close_matches(word, list(choices), n=count, cutoff=0.4)
    return ", ".join(found) if found else "none is similar"


def first_few(items: Iterable[object], count: int = 3) -> str:
    """Join up to ``count`` items for the end of an error message."""
    items = list(items)
    return ", ".join(map(str, items[:count])) + (", …" if len(items) > count else "")


def form(count: int, one: str, many: str) -> str:
    """Return the form of a word that goes with a number: "lose" with 2, "loses" with 1."""
    return one if count == 1 else many


def counted(count: int, noun: str, nouns: str | None = None) -> str:
    """Return a number and its noun: "1 image", "2 images", "2 classes" of ``nouns``."""
    return f"{count} {form(count, noun, nouns or f'{noun}s')}"
