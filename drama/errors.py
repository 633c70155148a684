"""Errors for people, and words for those of Python and its libraries."""

from __future__ import annotations

import errno
import json
import os

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


class DramaError(Exception):
    """An error for people: its text is the whole message.

    Attributes:
        exit_code: what the command exits with.
    """

    exit_code = 1

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
        case MemoryError():
            return f"out of memory. {error}".removesuffix(". ")
    return " ".join(str(error).split()) or type(error).__name__
