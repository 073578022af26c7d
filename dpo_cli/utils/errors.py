"""Exceptions whose messages are written for the user, and the wording of messages."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType


def did_you_mean(word: str, choices: Iterable[str], elsewhere: Mapping[str, str] = MappingProxyType({})) -> str:
    """Return the end of a message on an unknown word: the nearest choice, if any.

    ``elsewhere`` maps other tools' words to the choices that mean the same.
    """
    near = difflib.get_close_matches(word, [*choices, *elsewhere], n=1)
    return f"; did you mean '{elsewhere.get(near[0], near[0])}'?" if near else ""


def suggest_path(path: Path) -> str:
    """Suggest, for a path that is missing, one beside it with a similar name, apart from what follows its last dot."""
    try:
        beside = [] if os.path.lexists(path) else sorted(path.parent.iterdir())
        return did_you_mean(path.stem, (), {other.stem: str(other) for other in beside})
    except (OSError, ValueError):  # no such folder either, or an invalid name
        return ""


def plural(count: int, noun: str) -> str:
    """Write a count and what is counted, as ``1 pair`` or ``2,000 pairs``."""
    ending = "es" if noun.endswith("ch") else "s"
    return f"{count:,} {noun}{ending * (count != 1)}"


def reason_of(error: Exception) -> str:
    """Return the cause of an error, of the operating system's without its number and path."""
    return getattr(error, "strerror", None) or str(error)


def printable(text: str) -> str:
    """Replace control characters: names, data and answers must not steer a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "�" for c in text)


class DpoError(Exception):
    """The run failed; ``str(error)`` is the whole message, cause and remedy included."""

    exit_code = 1


class UsageError(DpoError):
    """An option or the input is wrong; no run was started."""

    exit_code = 2


class NotWrittenError(DpoError):
    """A file could not be written; an old one of its name is unchanged."""


class Interrupted(DpoError):  # noqa: N818  (no error: the user asked for it)
    """A signal ended the run; the message says what was saved and how to continue."""

    exit_code = 130


class RowError(ValueError):
    """A row is bad; the message is the reason, without its location."""
