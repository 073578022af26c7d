"""`dpo init`: a file for ``--config`` that has every option, with what it is for and what it can be."""

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
    "All options of dpo train with their defaults, for dpo train --config. null: left open until the run begins, or "
    "turned off. A flag on the command line wins over what stands here."
)
WIDTH = 100


def write_config(file: Path, data: Sequence[str] = (), force: bool = False) -> None:
    """Write the file, with ``data`` as its pairs.

    Raises:
        UsageError: it is there, and is not to be replaced.
        NotWrittenError: it cannot be written.
    """
    if file.exists() and not force:
        raise UsageError(f"{file}: is there already; name another file, or replace it with --force")
    with atomic_write(file) as temporary:
        temporary.write_text(commented(data), encoding="utf-8")


def commented(data: Sequence[str] = ()) -> str:
    """The file's text, made from the options' definitions."""
    fields = sorted(dataclasses.fields(TrainOptions), key=lambda f: f.name != "data")  # what is to be filled in first
    return "\n".join([_comment(HEAD), *(_entry(f, list(data)) for f in fields)])


def _entry(field: dataclasses.Field[Any], data: list[str]) -> str:
    value = data or None if field.default is dataclasses.MISSING else field.default
    line = yaml.safe_dump({field.name: str(value) if isinstance(value, Path) else value}, allow_unicode=True)
    return f"{_comment(_about(field))}{line}"


def _about(field: dataclasses.Field[Any]) -> str:
    """An option's help, and what of its range and its default at run time that does not say."""
    text, check, shown = (field.metadata[name] for name in ("help", "check", "shown"))
    if check and not (check.choices and all(choice in text for choice in check.choices)):
        text += f" {check.must[0].upper()}{check.must[1:]}."
    if field.default is dataclasses.MISSING:
        text += " To be filled in."
    return f"{text} null: {shown}." if shown else text


def _comment(text: str) -> str:
    return fill(text, WIDTH, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False) + "\n"
