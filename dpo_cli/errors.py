"""The exceptions whose message is written for the user, and text that is safe to show."""


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
