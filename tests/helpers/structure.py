"""The package's modules as syntax trees."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tests.helpers import ROOT

PACKAGE = ROOT / "dpo_cli"
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))}


def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def imported(source: ast.Module) -> Iterator[str]:
    """Dotted names of all that is imported, inside functions too; ``from a import b`` gives ``a`` and ``a.b``."""
    for node in ast.walk(source):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield base
            yield from (f"{base}.{name.name}" for name in node.names)


def packages(source: ast.Module) -> set[str]:
    return {name.partition(".")[0] for name in imported(source)}
