"""TRL 1.16 and this package make the same token ids of 200 rows; each difference there is has its test and reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from accelerate.state import AcceleratorState

from benchmarks.trl.theirs import make_trainer, pairs_of, trl_config
from dpo_cli.data.pairs import Pair
from dpo_cli.data.rows import BadRow, read_rows
from dpo_cli.data.sources import find_sources
from dpo_cli.data.tokenize import Encoder
from dpo_cli.utils.errors import RowError
from tests.helpers import SAMPLE, write_rows
from tests.helpers.records import encode_row

pytestmark = [
    # transformers renames the method that TRL 1.16 still calls by its old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
ROWS, LONG = 200, 4096
PARTS = ("prompt", "chosen", "rejected")
Records = list[dict[str, Any]]
Make = Callable[[Records, int], list[Any]]


def sample(name: str) -> Records:
    return [json.loads(line) for line in (SAMPLE / name).read_text().splitlines()[:ROWS]]


@pytest.fixture(scope="module")
def theirs(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """The ids that TRL's own preparation of a data set makes."""
    folder = tmp_path_factory.mktemp("trl")
    AcceleratorState._reset_state(reset_partial_state=True)  # it would keep the device of another test

    def make(records: Records, max_length: int) -> list[Any]:
        trainer = make_trainer(str(tiny), trl_config(folder, 1, 1, max_length=max_length), sample("train.jsonl")[:1])
        given = datasets.Dataset.from_list(records)
        return pairs_of(trainer._prepare_dataset(given, trainer.processing_class, trainer.args, "train"))

    return make


@pytest.fixture
def ours(tokenizer: Any, tmp_path: Path) -> Make:
    """Ours; the reason where a row is refused. Strings are kept raw, as TRL's standard format has them."""

    def make(records: Records, max_length: int) -> list[Any]:
        encoder, found = Encoder(tokenizer, max_length=max_length), []
        kind = "strings" if isinstance(records[0].get("prompt"), str) else None
        for row in read_rows(find_sources([str(write_rows(tmp_path / "rows.jsonl", records))]), None, kind):
            try:
                found.append(row.reason if isinstance(row, BadRow) else encode_row(encoder, row)[0])
            except RowError as error:
                found.append(str(error))
        return found

    return make


def ids(pair: Pair, end: list[int] | None = None) -> list[list[int]]:
    """A pair's ids as lists, the responses without ``end``, with which they must end."""
    parts: list[list[int]] = [getattr(pair, part).tolist() for part in PARTS]
    if end is None:
        return parts
    assert all(part[-len(end) :] == end for part in parts[1:])
    return [parts[0], *(part[: -len(end)] for part in parts[1:])]


def test_strings(ours: Make, theirs: Make) -> None:
    records = sample("train-strings.jsonl")
    assert [ids(pair) for pair in ours(records, LONG)] == [ids(pair) for pair in theirs(records, LONG)]


@pytest.mark.parametrize("whole", [False, True], ids=["prompt and responses", "whole conversations"])
def test_messages(whole: bool, ours: Make, theirs: Make, tokenizer: Any) -> None:
    """TRL also trains the line's end that the template writes after a turn, which no model is asked for."""
    records = sample("train.jsonl")
    if whole:
        records = [{name: row["prompt"] + row[name] for name in PARTS[1:]} for row in records]
    line_end = tokenizer("\n")["input_ids"]
    found = [ids(pair, end=[tokenizer.eos_token_id]) for pair in ours(records, LONG)]
    assert found == [ids(pair, end=[tokenizer.eos_token_id, *line_end]) for pair in theirs(records, LONG)]


def test_a_prompt_that_is_not_named_is_not_cut_inside_a_word(ours: Make, theirs: Make, tokenizer: Any) -> None:
    """TRL cuts where the characters first differ. Without a dialogue ours refuses to guess; with one it cuts there."""
    records = [{"chosen": "The sky is blue", "rejected": "The sky is black"}]
    [pair] = theirs(records, LONG)
    assert tokenizer.decode(pair.prompt) == "The sky is bl"
    assert ours(records, LONG)[0].startswith("prompt is missing")
    dialogue = "\n\nHuman: What colour?\n\nAssistant:"
    records = [{"chosen": dialogue + " The sky is blue", "rejected": dialogue + " The sky is black"}]
    [pair] = ours(records, LONG)
    assert tokenizer.decode(pair.prompt) == dialogue
    assert tokenizer.decode(pair.chosen) == " The sky is blue<|im_end|>"


def test_a_row_with_a_long_prompt_is_shortened_and_not_dropped(ours: Make, theirs: Make, tokenizer: Any) -> None:
    """TRL drops it without a word; ours keeps the prompt's end, and counts it."""
    long = {"prompt": "Why? " * 100 + "Is it so?", "chosen": " yes", "rejected": " no"}
    short = {"prompt": "Why?", "chosen": " yes", "rejected": " no"}
    assert [ids(pair) for pair in theirs([long, short], 64)] == [ids(pair) for pair in ours([short], 64)]
    shortened, _ = ours([long, short], 64)
    assert tokenizer.decode(shortened.prompt).endswith("Why? Is it so?")
    assert len(shortened.prompt) + max(len(shortened.chosen), len(shortened.rejected)) == 64
