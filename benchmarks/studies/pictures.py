"""The pictures of README.md, made from a real run: ``python -m benchmarks.studies.pictures``; five minutes on a CPU.

It trains the demo in a pseudo-terminal, draws what stood there as ``docs/images/terminal.svg``, and photographs the
run's report as ``docs/images/report.png``, which takes a Chromium, playwright and Pillow.
"""

from __future__ import annotations

import io
import os
import pty
import re
import shlex
import shutil
import sys
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

IMAGES = Path(__file__).parents[2] / "docs" / "images"
COLUMNS = 110
COMMAND = (
    "dpo train --data sample_data/train.jsonl --eval-data sample_data/heldout.jsonl --output runs/demo "
    "--max-steps 24 --batch-size 8 --lr 3e-5"
)
BAR = re.compile(r"^train .*━")  # a line that goes when the job is done
SVG = """<svg xmlns="http://www.w3.org/2000/svg" class="rich-terminal" viewBox="0 0 {width} {height}">
<style>.{unique_id}-matrix {{ font: {char_height}px monospace; font-variant-east-asian: full-width }}
.{unique_id}-title {{ font: 18px sans-serif }}
{styles}</style>
<defs>{lines}</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})">{backgrounds}<g class="{unique_id}-matrix">{matrix}</g></g>
</svg>
"""  # rich's own loads a font from the network


def record(command: str) -> str:
    """Run a command in a terminal of its own and return all that it wrote there.

    Raises:
        SystemExit: the command failed.
    """
    os.environ |= {"COLUMNS": str(COLUMNS), "LINES": "50", "TERM": "xterm-256color", "HF_HUB_OFFLINE": "1"}
    log = bytearray()

    def read(descriptor: int) -> bytes:
        log.extend(part := os.read(descriptor, 4096))
        return part

    if status := pty.spawn([sys.executable, "-m", "dpo_cli", *shlex.split(command)[1:]], read):
        raise SystemExit(f"{command}: ended with status {status}")
    return log.decode().replace(str(Path.home()), "~")


def lines_of(log: str) -> list[str]:
    """What stands in the terminal in the end, and each bar of training as it last stood, with their colours."""
    lines, row, bar = [""], 0, (0, "")
    for part in re.split(r"(\r\n|\n|\r|\x1b\[\d*A|\x1b\[2K|\x1b\[\?25[lh])", log):
        if part in ("\n", "\r\n"):
            row += 1
            lines += [""] * (row == len(lines))
        elif part.endswith("A") and part.startswith("\x1b["):
            row -= int(part[2:-1] or 1)
        elif part == "\x1b[2K":
            lines[row] = ""
        elif part and part != "\r" and not part.startswith("\x1b[?25"):
            lines[row] += part
            if BAR.match(Text.from_ansi(lines[row]).plain):
                bar = row, lines[row]
    return [*lines[: bar[0]], bar[1], *lines[bar[0] :]]


def draw(command: str, lines: list[str], file: Path) -> None:
    """Draw the lines as a terminal's window, broken where they reach its edge."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    for line in [f"$ {command}", *lines]:
        text = Text.from_ansi(line)
        for piece in text.divide(range(COLUMNS, len(text.plain), COLUMNS)):
            console.print(piece, no_wrap=True, overflow="ignore", crop=False)
    file.write_text(console.export_svg(title="dpo train", theme=MONOKAI, code_format=SVG), encoding="utf-8")


def photograph(report: Path, file: Path) -> None:
    """Take a picture of the report's first screens."""
    from PIL import Image
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": 1280, "height": 1600})
        page.goto(report.resolve().as_uri())
        shot = page.screenshot()
        chromium.close()
    Image.open(io.BytesIO(shot)).quantize(64).save(file, optimize=True)


if __name__ == "__main__":
    log = record(COMMAND)
    draw(COMMAND, lines_of(log), IMAGES / "terminal.svg")
    photograph(Path("runs/demo/report.html"), IMAGES / "report.png")
