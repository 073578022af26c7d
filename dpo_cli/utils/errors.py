"""The exceptions whose message is written for the user; the nearest right word; text that is safe to show."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType


def did_you_mean(word: str, known: Iterable[str], elsewhere: Mapping[str, str] = MappingProxyType({})) -> str:
    """The end of a message about a word that is not known: the nearest that is, or nothing where none is near.

    ``elsewhere``: words of others and the known ones that mean the same.
    """
    near = difflib.get_close_matches(word, [*known, *elsewhere], n=1)
    return f"; did you mean '{elsewhere.get(near[0], near[0])}'?" if near else ""


def name_beside(path: Path) -> str:
    """The same of a file or folder and what is beside it; nothing if it is there."""
    try:
        return "" if path.exists() else did_you_mean(path.name, (other.name for other in path.parent.iterdir()))
    except (OSError, ValueError):  # no such folder either, or a name that cannot be
        return ""


def printable(text: str) -> str:
    """The text with control characters replaced: names, data and answers must not steer a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "�" for c in text)


class DpoError(Exception):
    """The run failed; ``str(error)`` is the whole message, cause and remedy included."""

    exit_code = 1
    cut_off = False  # whether it came from outside the process, so that another process knows more of it


class UsageError(DpoError):
    """An option or the input is wrong; nothing was started and nothing was written."""

    exit_code = 2


class NotWrittenError(DpoError):
    """A file could not be written; what had its name before is as it was."""


class Interrupted(DpoError):  # noqa: N818  (no error: someone asked for it)
    """A signal ended the run; the message says what was saved and how to go on."""

    exit_code = 130


class RowError(ValueError):
    """A row is bad; the message is the reason, without its place."""
