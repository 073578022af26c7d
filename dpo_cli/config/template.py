"""`dpo init`: a file for ``--config`` with every option of `dpo train`, its help and its default."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from textwrap import fill

import yaml

from dpo_cli.config.options import TrainOptions
from dpo_cli.utils.errors import UsageError
from dpo_cli.utils.files import atomic_write

HEAD = (
    "All options of dpo train with their defaults, for dpo train --config. null: chosen when the run begins, or off. A "
    "flag on the command line overrides this file."
)
WIDTH = 100


def write_config(file: Path, data: Sequence[str] = (), force: bool = False) -> None:
    """Write the file, with ``data`` as its pairs.

    Raises:
        UsageError: the file exists, and ``force`` is not set.
        NotWrittenError: it cannot be written.
    """
    if file.exists() and not force:
        raise UsageError(f"{file}: exists already; name another file, or replace it with --force")
    with atomic_write(file) as temporary:
        temporary.write_text(commented(data), encoding="utf-8")


def commented(data: Sequence[str] = ()) -> str:
    """Make the file's text from the options' definitions, those to fill in first."""
    entries = [_comment(HEAD)]
    for field in sorted(fields(TrainOptions), key=lambda f: f.name != "data"):
        about, shown = field.metadata["help"], field.metadata["shown"]
        about += " Required." * (field.default is MISSING) + (f" null: {shown}." if shown else "")
        value = list(data) or None if field.default is MISSING else field.default
        value = str(value) if isinstance(value, Path) else value
        entries.append(_comment(about) + yaml.safe_dump({field.name: value}, allow_unicode=True))
    return "\n".join(entries)


def _comment(text: str) -> str:
    return fill(text, WIDTH, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False) + "\n"
