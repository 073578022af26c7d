"""README.md and docs/ as tests read them: blocks of code with their marks, commands, options, links.

A block of ``sh``, ``console`` or ``python`` is executed, unless one of these stands on the line before it::

    <!-- not run: why -->
    <!-- run by tests/test_x.py: test_name -->

``<!-- all blocks: not run: why -->`` in a page is of all its blocks that have no mark of their own.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.helpers import ROOT

SHELL = ("sh", "console")
EXECUTED = (*SHELL, "python")
SHOWN = ("text", "yaml", "diff", "json")  # and not executed: what a program prints or reads
FENCE = re.compile(
    r"^(?:<!-- (?P<mark>[^\n]*) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
ROW = re.compile(r"^\|.*`(dpo [^`]*)` \|$", re.MULTILINE)
OF_PAGE = re.compile(r"^<!-- all blocks: ([^\n]*) -->$", re.MULTILINE)
RUN_BY = re.compile(r"run by (tests/[\w/]+\.py): (test_\w+)")


@dataclass(frozen=True)
class Block:
    """Code of a page. ``offset``: where in the page it begins; ``mark``: what stands before it, or nothing."""

    page: str
    offset: int
    language: str
    mark: str
    text: str

    @property
    def where(self) -> str:
        """File and line."""
        return f"{self.page}:{read(self.page)[: self.offset].count(chr(10)) + 1}"

    @property
    def commands(self) -> list[str]:
        """Its lines, continued ones joined, without prompts and comments."""
        lines = self.text.replace("\\\n", " ").splitlines()
        plain = [re.split(r"(?:^|\s{2,})#", line.removeprefix("$ "))[0] for line in lines]
        return [" ".join(line.split()) if "<<<" not in line else line for line in plain if line.strip()]


def pages() -> list[str]:
    """README.md and all of docs/, by their path."""
    return ["README.md", *sorted(str(file.relative_to(ROOT)) for file in (ROOT / "docs").rglob("*.md"))]


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[Block]:
    """Blocks of code, and each command that ends a row of a table as a block of its own, in their order."""
    text = read(page)
    of_page = OF_PAGE.search(text)
    found = []
    for fence in FENCE.finditer(text):
        mark = fence["mark"] or (of_page[1] if of_page and fence["language"] in EXECUTED else "")
        found.append(Block(page, fence.start(), fence["language"], mark, fence["text"]))
    found += [Block(page, row.start(), "sh", "", row[1]) for row in ROW.finditer(text)]
    return sorted(found, key=lambda block: block.offset)


def commands(page: str) -> list[str]:
    """All ``dpo …`` lines that are executed."""
    found = [line for block in executed(page) if block.language in SHELL for line in block.commands]
    return [line for line in found if line.startswith("dpo ")]


def executed(page: str) -> list[Block]:
    """The blocks that have no mark."""
    return [block for block in blocks(page) if block.language in EXECUTED and not block.mark]


def spans(page: str) -> Iterator[str]:
    """What is set as code: spans in the text, and lines of blocks."""
    for block in blocks(page):
        yield from block.commands
    yield from re.findall(r"`([^`\n]+)`", FENCE.sub("", read(page)))


def links(page: str) -> Iterator[tuple[Path, str]]:
    """Files in the repository that a page points to, and the anchor in them, if any."""
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", read(page))):
        if not re.match(r"\w+:", target):
            file, _, anchor = target.partition("#")
            yield ((ROOT / page).parent / file if file else ROOT / page).resolve(), anchor


def anchors(file: Path) -> set[str]:
    """Of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", file.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
