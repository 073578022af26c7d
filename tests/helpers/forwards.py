"""Forwards of a run's own, told from those that try, count or read back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import dpo_cli.training.loop
import dpo_cli.training.memory
import dpo_cli.training.prepare


def others(patch: pytest.MonkeyPatch) -> list[str]:
    """Names of what runs now and makes forwards that are not a run's own; empty most of the time."""
    within: list[str] = []

    def named(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **more: Any) -> Any:
            within.append(name)
            try:
                return function(*arguments, **more)
            finally:
                within.pop()

        return run

    for owner, name in (
        (dpo_cli.training.prepare, "choose_layout"),
        (dpo_cli.training.memory, "count_bytes"),
        (dpo_cli.training.loop, "export"),
    ):
        patch.setattr(owner, name, named(name, getattr(owner, name)))
    return within
