"""Errors for people."""

from __future__ import annotations


class DramaError(Exception):
    """An error for people: its text is the whole message.

    Attributes:
        exit_code: what the command exits with.
    """

    exit_code = 1


class ConfigurationError(DramaError):
    """A mistake in the configuration or on the command line."""

    exit_code = 2
