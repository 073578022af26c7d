"""Rows with several ranked answers: the pairs that --pairs makes of them, their margins, and what is refused."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase
from typer.testing import CliRunner

from dpo_cli.cli.app import app
from dpo_cli.config.options import CheckOptions, DataOptions
from dpo_cli.data.formats import FORMATS, PAIRINGS, TIES_LEFT_OUT, detect_format
from dpo_cli.data.pairs import rankings
from dpo_cli.data.rows import BadRow, Row, read_rows
from dpo_cli.data.sources import find_sources
from dpo_cli.data.tokenize import PROMPT_CUT, RESPONSE_CUT, PairSet, tokenize_rows
from dpo_cli.quality.check import run_check
from dpo_cli.training.prepare import hold_out
from dpo_cli.utils.console import Reporter
from tests.helpers import write_rows

FOUR = ["good", "bad", "fine", "fair"]
USER = [{"role": "user", "content": "Why?"}]
# What a ranking of FOUR looks like in each kind of data set: good, fine, fair, bad.
RANKED: dict[str, dict[str, Any]] = {
    "scores": {"prompt": "Why?", "responses": FOUR, "scores": [4, 1, 3, 2]},
    "ranks": {"question": "Why?", "responses": FOUR, "ranks": [1, 4, 2, 3]},
    "ratings as text": {"instruction": "Why?", "generations": FOUR, "ratings": "[4, 1, 3, 2]"},
    "own scores": {
        "prompt": "Why?",
        "completions": [{"text": text, "score": score} for text, score in zip(FOUR, "4132", strict=True)],
    },
    "own ranks": {
        "prompt": USER,
        "completions": [{"answer": text, "rank": rank} for text, rank in zip(FOUR, (1, 4, 2, 3), strict=True)],
    },
    "conversations": {
        "prompt": USER,
        "responses": [[*USER, {"role": "assistant", "content": text}] for text in FOUR],
        "scores": [4, 1, 3, 2],
    },
    "one without a score": {"prompt": "Why?", "responses": [*FOUR, "?"], "scores": [4, 1, 3, 2, None]},
}
PAIRS = {
    "best-worst": ["good>bad"],
    "adjacent": ["good>fine", "fine>fair", "fair>bad"],
    "ranking": ["good>fine", "fine>fair", "fair>bad"],
    "all": ["good>fine", "good>fair", "good>bad", "fine>fair", "fine>bad", "fair>bad"],
}


def read(tmp_path: Path, records: list[Any], **reading: Any) -> list[Row | BadRow]:
    return list(read_rows(find_sources([str(write_rows(tmp_path / "rows.jsonl", records))]), **reading))


def texts(row: Row | BadRow) -> list[str]:
    """The pairs of a row in words."""
    assert isinstance(row, Row), row
    words = [each.strip() if isinstance(each, str) else each[-1]["content"] for each in row.answers]
    return [f"{words[better]}>{words[worse]}" for better, worse in row.preferences()]


def scored(levels: list[float], **more: Any) -> dict[str, Any]:
    return {"prompt": "Why?", "responses": [f"answer {n}" for n in range(len(levels))], "scores": levels} | more


@pytest.mark.parametrize("pairs", PAIRINGS)
@pytest.mark.parametrize("kind", RANKED)
def test_the_pairs_of_every_ranked_format(kind: str, pairs: str, tmp_path: Path) -> None:
    [row] = read(tmp_path, [RANKED[kind]], pairs=pairs)
    assert texts(row) == PAIRS[pairs]
    assert isinstance(row, Row) and row.format.startswith(f"ranked responses: {PAIRINGS[pairs]}")


@pytest.mark.parametrize("pairs", PAIRINGS)
def test_a_row_of_two_answers_is_one_pair_in_any_format(pairs: str, tmp_path: Path) -> None:
    records = [
        {"prompt": "Why?", "chosen": "good", "rejected": "bad"},
        {"prompt": "Why?", "responses": ["bad", "good"], "scores": [0, 1]},
        {"question": "Why?", "response_j": "good", "response_k": "bad"},
    ]
    assert [texts(row) for row in read(tmp_path, records, pairs=pairs)] == [["good>bad"]] * 3


def test_every_way_to_pair_is_an_option() -> None:
    (check,) = [f.metadata["check"] for f in DataOptions.__dataclass_fields__.values() if f.name == "pairs"]
    assert check.choices == tuple(PAIRINGS) and detect_format(RANKED["scores"]) == "ranked" in FORMATS


@given(st.lists(st.integers(0, 4), min_size=2, max_size=7), st.sampled_from(list(PAIRINGS)), st.booleans())
@example([1, 1, 0, 0], "adjacent", False)
@example([3, 3, 2, 1, 1], "ranking", True)
def test_pairs_and_ties(tmp_path_factory: Any, levels: list[int], pairs: str, as_ranks: bool) -> None:
    """Against a definition by all ordered pairs; equal scores or ranks never make one."""
    record: dict[str, Any] = scored([float(level) for level in levels])
    if as_ranks:
        record["ranks"] = [9 - level for level in record.pop("scores")]
    [row] = read(tmp_path_factory.mktemp("rows"), [record], pairs=pairs)
    places = range(len(levels))
    above = {(i, j) for i in places for j in places if levels[i] > levels[j]}
    if not above:
        assert isinstance(row, BadRow) and "same score or rank" in row.reason
        return
    assert isinstance(row, Row)
    names = [str(each if isinstance(each, str) else each[-1]["content"]) for each in row.answers]
    order = [int(name.removeprefix("answer ")) for name in names]
    found = [(order[better], order[worse]) for better, worse in row.preferences()]
    firsts = [levels.index(level) for level in sorted(set(levels), reverse=True)]
    wanted = {
        "all": above,
        "adjacent": {(i, j) for i, j in above if not any(levels[i] > level > levels[j] for level in levels)},
        "ranking": set(pairwise(firsts)),
        "best-worst": {(firsts[0], firsts[-1])},
    }[pairs]
    assert set(found) == wanted and len(found) == len(wanted)
    assert (TIES_LEFT_OUT in row.notes) == (pairs == "ranking" and len(firsts) < len(levels))


# ---- tokens -----------------------------------------------------------------------------------------------------


def tokenized(tokenizer: Any, tmp_path: Path, records: list[Any], max_length: int = 1024, **reading: Any) -> PairSet:
    return tokenize_rows(read(tmp_path, records, **reading), tokenizer, max_length=max_length)


def test_the_pairs_of_a_row_have_its_prompt_and_its_answers_once(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Also where the longest answer shortens the prompt: it is that of the row, not of a pair."""
    answers = ["a " * 30, "b " * 5, "c " * 10, "d"]
    turns = [{"role": role, "content": "some words"} for role in (*["user", "assistant"] * 9, "user")]
    record = {"prompt": turns, "responses": answers, "scores": [1, 4, 3, 2]}
    for pairs in ("all", "ranking"):
        found = tokenized(tokenizer, tmp_path, [record, scored([2, 1])], 90, pairs=pairs)
        *ranked, two = found.pairs
        assert found.rows == 2 and len(ranked) == len(PAIRS[pairs]) and two.where.endswith("rows.jsonl:2")
        assert len({pair.prompt.tobytes() for pair in ranked}) == 1
        assert found.notes[PROMPT_CUT] and not found.notes[RESPONSE_CUT]
        assert max(len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) for pair in ranked) <= 90
        responses = {response.tobytes() for pair in ranked for response in (pair.chosen, pair.rejected)}
        assert len(responses) == 4
        count = len(ranked)
        assert [p.where for p in ranked] == [f"{tmp_path}/rows.jsonl:1 ({n} of {count})" for n in range(1, count + 1)]
        together = [[0, 1, 2], [3]] if pairs == "ranking" else [[n] for n in range(count + 1)]
        assert rankings(range(count + 1), found.pairs) == together
    assert all(np.array_equal(one.rejected, other.chosen) for one, other in pairwise(ranked))


def test_margins_are_of_the_difference_of_scores(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    record = scored([5.0, 1.5, 3.0], margin=0.25)
    for pairs, wanted in (("best-worst", [3.5]), ("adjacent", [2.0, 1.5]), ("all", [2.0, 3.5, 1.5])):
        found = tokenized(tokenizer, tmp_path, [record], pairs=pairs, margin_per_score=0.5)
        assert [pair.margin for pair in found.pairs] == [0.25 + 0.5 * difference for difference in wanted]
        assert {pair.margin for pair in tokenized(tokenizer, tmp_path, [record], pairs=pairs).pairs} == {0.25}


@pytest.mark.parametrize(
    "record", [RANKED["ranks"], RANKED["own ranks"], {"prompt": "a", "chosen": "b", "rejected": "c"}]
)
def test_margins_per_score_need_scores(record: dict[str, Any], tmp_path: Path) -> None:
    [row] = read(tmp_path, [record], margin_per_score=0.5)
    assert isinstance(row, BadRow) and row.reason == "--margin-per-score: the row has no scores"


# ---- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        (["good", "", "bad"], "answer 2 is empty"),
        (["good", 7, "bad"], "answer 2 is a number; it must be a string or a list of messages"),
        (["good", "bad", "good"], "chosen equals rejected"),
        (["good", "good", "bad"], "chosen equals answer 2"),
    ],
)
def test_a_row_with_a_bad_answer_is_refused_whole(answers: list[Any], reason: str, tmp_path: Path) -> None:
    """Where all answers are read; the best and the worst alone are not concerned with others."""
    record = {"prompt": "Why?", "responses": answers, "scores": [3, 2, 1]}
    for pairs in ("adjacent", "all", "ranking"):
        [row] = read(tmp_path, [record], pairs=pairs)
        assert isinstance(row, BadRow) and row.reason == reason
    [row] = read(tmp_path, [record])
    assert isinstance(row, Row) == (answers[0] != answers[2])


def test_a_row_whose_answers_truncation_makes_equal_is_refused_whole(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    answers = ["x " * 60 + "a", "y", "x " * 60 + "b"]
    record = {"prompt": "Why?", "responses": answers, "scores": [3, 2, 1]}
    found = tokenized(tokenizer, tmp_path, [record, scored([3, 2, 1])], 40, pairs="adjacent")
    assert (found.rows, len(found.pairs), len(found.refused)) == (2, 2, 1)
    assert found.refused[0].reason == "truncation to max_length 40 removes the difference between chosen and rejected"


# ---- the commands -----------------------------------------------------------------------------------------------


def test_held_out_rankings_are_whole(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    records = [scored([3, 2, 1]) | {"prompt": f"Question {n}?"} for n in range(12)]
    found = tokenized(tokenizer, tmp_path, records, pairs="ranking")
    for some in hold_out(found.pairs, 0.3, 0):
        assert {len(each) for each in rankings(range(len(some)), some)} == {2}


@pytest.mark.parametrize("pairs", PAIRINGS)
def test_the_pairs_of_a_ranking_are_no_fault(pairs: str, tiny: Path, tmp_path: Path) -> None:
    """Neither copies nor contradictions; those of different rows are found."""
    turned = scored([2, 3, 1]) if pairs != "best-worst" else scored([1, 2, 3])
    file = write_rows(tmp_path / "rows.jsonl", [scored([3, 2, 1]), scored([3, 2, 1]), turned])
    for rows, wanted in ((1, {}), (2, {"duplicate": 1}), (3, {"duplicate": 1, "contradiction": 2})):
        some = write_rows(tmp_path / "some.jsonl", file.read_text().splitlines()[:0])
        some.write_text("".join(file.read_text().splitlines(keepends=True)[:rows]))
        result = run_check(CheckOptions(model=str(tiny), data=[str(some)], pairs=pairs), Reporter(quiet=True))
        faults = {each["kind"]: each["count"] for each in result["findings"] if each["severity"] == "problem"}
        assert faults == wanted
        assert (result["rows"], result["pairs"]) == (rows, rows * {"best-worst": 1, "all": 3}.get(pairs, 2))


def test_explain_shows_all_answers_and_pairs(tiny: Path, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [RANKED["scores"]])
    words = ["explain", "--model", str(tiny), "--data", str(file), "--pairs", "adjacent", "--margin-per-score", "0.5"]
    found = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert [found[name]["text"] for name in ("chosen", "answer 2", "answer 3", "rejected")] == [
        f"{text}<|im_end|>" for text in ("good", "fine", "fair", "bad")
    ]
    assert found["pairs"][1] == {"chosen": "answer 2", "rejected": "answer 3", "margin": 0.5}
    shown = CliRunner().invoke(app, words).stdout
    assert "pair        answer 3 over rejected, margin 0.5" in shown and "\n[answer 2] fine" in shown
