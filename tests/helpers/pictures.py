"""Pictures of reports are left empty in tests that do not look at them: drawing takes most of a tiny training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dpo_cli.reporting import plots

_save = plots._save


def _leave_empty(target: Any, *_args: Any, **_how: Any) -> None:
    if isinstance(target, Path):
        target.touch()
    else:
        target.write(b"")


@contextmanager
def pictures(drawn: bool) -> Iterator[None]:
    """Draw pictures within, or leave them empty."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "_save", _save if drawn else _leave_empty)
        yield
