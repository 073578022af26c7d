"""Messages in docs/troubleshooting.md and docs/silence.md are those of the program."""

from __future__ import annotations

import ast
import re

import pytest

from tests.helpers.pages import read
from tests.helpers.structure import MODULES, tree

EXPLAINED = re.findall(r"^(?:### |\| )`([^`]+)`(?: \||$)", read("docs/troubleshooting.md"), re.MULTILINE)
QUOTED = re.findall(r"\bsays `([^`…][^`]*)`", read("docs/silence.md"))
GAP = "…"  # a name or a number


def texts() -> set[str]:
    """Every text of the package, f-strings with a gap in the place of what they insert."""
    found = set()
    for module in MODULES:
        for node in ast.walk(tree(module)):
            if isinstance(node, ast.JoinedStr):
                found.add("".join(str(part.value) if isinstance(part, ast.Constant) else GAP for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return found


TEXTS = texts()


@pytest.mark.parametrize("message", [*EXPLAINED, *QUOTED])
def test_the_program_says_it(message: str) -> None:
    """In one text, whose inserted parts stand for any."""
    words = [re.escape(part) for part in message.split(GAP)]
    pattern = re.compile(".*".join(words), re.DOTALL)
    assert any(pattern.search(text) for text in TEXTS), message


def test_a_newcomers_messages_are_explained() -> None:
    assert len(EXPLAINED) >= 20 and len(QUOTED) >= 6
