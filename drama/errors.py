"""Errors for people, and words for those of Python and its libraries."""

from __future__ import annotations

import errno
import json
import os
import unicodedata

import pyarrow as pa
from pydantic import ValidationError

WORDS = {
    errno.EISDIR: "a folder, not a file",
    errno.ENOTDIR: "a file lies where a folder should",
    errno.EEXIST: "a file lies where a folder should",
    errno.ENOSPC: "no space left on the disk",
}
"""What the system's errors are called to people; the others by the system's own words."""


WRONG_USE, FAILED_FOR_GOOD = 2, 3
"""Exit codes of what the same command would run into again, wherever it is given."""

LONGEST = 3000
"""Characters of a text for people; of a value in it, `BRIEF`."""
BRIEF = 80


def shown(text: object, most: int = LONGEST) -> str:
    """Return a text for a terminal: cut, and with control and formatting characters escaped.

    What a file of a stranger says could otherwise move the cursor, turn the text around, or be a
    megabyte. Lines and spaces of any kind stay.
    """
    escaped = "".join(
        c if c == "\n" or c.isprintable() or unicodedata.category(c) == "Zs"
        else c.encode("unicode_escape").decode()
        for c in str(text)[: most + 1]
    )  # fmt: skip
    return cut(escaped, most)


def brief(value: object) -> str:
    """Return a value as Python writes it, cut, for a message that names it."""
    try:
        text = repr(value)
    except RecursionError:
        text = "what is nested too deeply"
    return cut(text)


def cut(text: str, most: int = BRIEF) -> str:
    """Return a text, or its beginning where it is longer."""
    return text if len(text) <= most else f"{text[: most - 3]}..."


class DramaError(Exception):
    """An error for people: its text is the whole message, and can be shown as it is.

    Attributes:
        exit_code: what the command exits with.
    """

    exit_code = 1

    def __str__(self) -> str:
        return shown(super().__str__())

    @property
    def is_permanent(self) -> bool:
        """Whether the same command would fail again, so that there is no use in trying."""
        return self.exit_code in (WRONG_USE, FAILED_FOR_GOOD)


class ConfigurationError(DramaError):
    """A mistake in the configuration or on the command line."""

    exit_code = WRONG_USE


class FileError(DramaError):
    """A run's file that cannot be used.

    Args:
        text: the message.
        cause: what reading the file raised, if that is why. The system's own errors may pass, as
            where a disk does not answer; what is wrong with a file stays.
    """

    def __init__(self, text: str, cause: BaseException | None = None) -> None:
        super().__init__(text)
        missing = isinstance(cause, FileNotFoundError)  # PyArrow's has no number
        may_pass = missing or (isinstance(cause, OSError) and cause.errno is not None)
        self.exit_code = 1 if may_pass else FAILED_FOR_GOOD


def reason(error: BaseException) -> str:
    """Say in words what Python or a library found wrong with a file, which the caller names."""
    match error:
        case FileNotFoundError():
            return "not found"
        case OSError(errno=int(number)):
            return WORDS.get(number, os.strerror(number).lower())
        case OSError() | pa.ArrowException():  # PyArrow's, of what a file holds
            return "damaged, or not the Parquet file that it should be"
        case UnicodeError():
            return "not UTF-8 text"
        case json.JSONDecodeError():
            return f"not JSON from line {error.lineno} on"
        case ValidationError():
            first = error.errors()[0]
            known = {"json_invalid": "not JSON, or cut off", "missing": "missing"}
            place = ".".join(map(str, first["loc"]))
            return f"{place}: {known.get(first['type'], first['msg'])}".removeprefix(": ")
        case KeyError(args=[key, *_]):
            return f"something is missing in it: {key.decode() if isinstance(key, bytes) else key}"
        case TypeError() | AttributeError():
            return "it does not have the form that it should"
        case RecursionError():
            return "nested too deeply"
        case SystemError():  # of an exception in C++ that Python does not know
            return "a library could not take what it holds"
        case MemoryError():
            return f"out of memory. {error}".removesuffix(". ")
    return " ".join(str(error).split()) or type(error).__name__
