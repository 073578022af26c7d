"""`dpo init`: a file for ``--config`` with every option of `dpo train`, its help and its default."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

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
    fields = sorted(dataclasses.fields(TrainOptions), key=lambda f: f.name != "data")
    return "\n".join([_comment(HEAD), *(_entry(f, list(data)) for f in fields)])


def _entry(field: dataclasses.Field[Any], data: list[str]) -> str:
    required = field.default is dataclasses.MISSING
    value = data or None if required else str(field.default) if isinstance(field.default, Path) else field.default
    text, check, shown = (field.metadata[name] for name in ("help", "check", "shown"))
    if check and not (check.choices and all(choice in text for choice in check.choices)):
        text += f" {check.must[0].upper()}{check.must[1:]}."
    text += " Required." * required + (f" null: {shown}." if shown else "")
    return _comment(text) + yaml.safe_dump(
        {field.name: str(value) if isinstance(value, Path) else value}, allow_unicode=True
    )


def _comment(text: str) -> str:
    return fill(text, WIDTH, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False) + "\n"
