"""The pairs that a benchmark runs on: rows of a file, or random words in the lengths of published preference data.

Lengths count tokens of the model at hand. Rows are strings, whole on both sides: the two truncate differently.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from dpo_cli.config.options import TrainOptions
from dpo_cli.data.pairs import Pair
from dpo_cli.data.rows import BadRow, Row, read_rows
from dpo_cli.data.schedule import step_pairs
from dpo_cli.data.sources import find_sources
from dpo_cli.data.tokenize import Encoder
from dpo_cli.models.loading import load_tokenizer
from dpo_cli.models.locate import find_model
from dpo_cli.training.run_dir import encoder_options

ROOT = Path(__file__).parents[2]
Record = dict[str, Any]


@dataclass(frozen=True)
class Lengths:
    """Prompt by response, and the median of prompt + one response in tokens; log-normal around both."""

    ratio: float
    median: int
    sigma: float = 0.5
    batch_size: int | None = None  # where a case asks for one
    system: int = 0  # tokens of the system prompt, one for all rows, before the lengths above


CASES = {
    "hh": Lengths(2.15, 186),
    "ultrafeedback": Lengths(0.42, 409),
    "tldr": Lengths(11.1, 416),
    "helpsteer": Lengths(6.3, 775),
    "capybara": Lengths(1.6, 1160),
    # Steps of an agent: its instructions and tools are the same in every row.
    "agent": Lengths(1.0, 600, system=1500),
    # Where sharing a prompt and packing bring least: one pair a step, nothing to pad, nearly nothing to share.
    "weak": Lengths(0.125, 144, sigma=0.0, batch_size=1),
}


def draw_lengths(case: Lengths, rows: int, longest: int, seed: int = 0) -> list[tuple[int, int, int]]:
    """Tokens of prompt, chosen and rejected of each row; the responses are drawn independently.

    Rows longer than ``longest`` (prompt + longer response) are scaled down to it.
    """
    medians = np.array([case.ratio, 1, 1]) * case.median / (1 + case.ratio)

    def draw(count: int, seed: int) -> Any:
        return medians * np.exp(case.sigma * np.random.default_rng(seed).normal(size=(count, 3)))

    many = draw(20_000, 0)  # the median of a sum is not the sum of the medians
    lengths = draw(rows, seed) * case.median / np.median(many[:, 0] + many[:, 1])
    lengths *= np.minimum(1, longest / (lengths[:, 0] + lengths[:, 1:].max(axis=1)))[:, None]
    return [tuple(max(2, int(n)) for n in row) for row in lengths.round()]


def synthetic_rows(case: Lengths, rows: int, tokenizer: Any, longest: int, seed: int = 0) -> list[Record]:
    """Rows of random words whose token counts are those of ``draw_lengths``."""
    sample = (ROOT / "sample_data" / "train-strings.jsonl").read_text(encoding="utf-8")
    words = [f" {word}" for word in sorted(set(re.findall(r"\b[a-z]{2,9}\b", sample)))]
    tokens = {word: len(tokenizer(word, add_special_tokens=False).input_ids) for word in [*words, " a"]}
    rng = random.Random(seed)

    def text(length: int) -> str:
        chosen: list[str] = []
        while length > 0:
            word = rng.choice(words)
            word = word if tokens[word] <= length else " a"
            chosen.append(word)
            length -= tokens[word]
        return "".join(chosen)

    shared = min(case.system, longest // 2)
    system, lengths = text(shared), draw_lengths(case, rows, longest - shared, seed)
    return [
        # a token ends the turn of each response
        {"prompt": (system + text(p)).strip(), "chosen": text(c - 1), "rejected": text(r - 1)}
        for p, c, r in lengths
    ]


def usable_rows(options: TrainOptions, count: int) -> list[tuple[Row, Pair]]:
    """The first rows of strings that make a pair untruncated."""
    encoder = Encoder(load_tokenizer(find_model(options.model)), **encoder_options(options))
    found: list[tuple[Row, Pair]] = []
    for row in read_rows(find_sources(options.data), options.columns):
        if isinstance(row, BadRow) or not isinstance(row.prompt, str):
            continue
        row = replace(row, raw=True)
        made = next(encoder.pairs([row]))
        if not isinstance(made, BadRow) and not any("truncated" in note for note in made.notes):
            found.append((row, made.pairs[0]))
        if len(found) == count:
            return found
    raise SystemExit(f"only {len(found)} rows of strings can be used; --rows {count} asks for more")


def as_record(row: Row) -> Record:
    """A row of strings as both sides read it."""
    return {"prompt": row.prompt, **row.sides}


def write_records(file: Path, records: Sequence[Record]) -> Path:
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return file


def step_order(rows: int, options: TrainOptions) -> list[list[int]]:
    """Places of the rows in the order of `dpo train`, a list a step; it does not depend on their lengths."""
    order = {name: getattr(options, name) for name in ("batch_size", "epochs", "max_steps", "seed")}
    nothing = np.empty(0, np.int32)
    return [sorted(step) for step in step_pairs([Pair("", nothing, nothing, nothing)] * rows, **order)]
