"""`dpo explain`: what it shows of a row is what would be trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from dpo_cli.cli.app import app
from dpo_cli.data.pairs import model_input_ids
from dpo_cli.data.rows import Row, read_rows
from dpo_cli.data.sources import find_sources
from dpo_cli.data.tokenize import Encoder
from tests.helpers import write_rows
from tests.helpers.records import encode_row

ROWS: list[Any] = [
    {"prompt": "Why?", "chosen": " Because.", "rejected": " No idea.", "weight": 2, "margin": 0.5, "id": "a-1"},
    {"prompt": "Why?", "chosen": "", "rejected": " No."},
    {
        "prompt": [{"role": "user", "content": "Why?"}],
        "chosen": [
            {"role": "assistant", "content": "look"},
            {"role": "tool", "content": "\x1b[31m42"},
            {"role": "assistant", "content": "It is 42."},
        ],
        "rejected": [{"role": "assistant", "content": "No."}],
    },
]


@pytest.fixture(autouse=True)
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "rows.jsonl", ROWS)


def explain(tiny: Path, row: str, *flags: str) -> Result:
    return CliRunner().invoke(app, ["explain", "--model", str(tiny), "--data", "rows.jsonl", "--row", row, *flags])


def explained(tiny: Path, row: str) -> dict[str, Any]:
    out = explain(tiny, row, "--json")
    assert out.exit_code == 0, out.stderr
    found: dict[str, Any] = json.loads(out.stdout)
    return found


def test_tokens_and_loss_are_those_of_the_pair(tiny: Path, tokenizer: Any) -> None:
    found = explained(tiny, "3")
    [_, _, row] = read_rows(find_sources(["rows.jsonl"]))
    assert isinstance(row, Row)
    pair, notes = encode_row(Encoder(tokenizer), row)
    assert found["notes"] == sorted(notes) and found["format"] == row.format
    for part in ("prompt", "chosen", "rejected"):
        ids = getattr(pair, part)
        assert [token["id"] for token in found[part]["tokens"]] == model_input_ids(ids).tolist()
        carries = [part != "prompt" and each >= 0 for each in ids.tolist()]
        assert [token["loss"] for token in found[part]["tokens"]] == carries
    assert "".join(token["text"] for token in found["chosen"]["tokens"] if token["loss"]) == "It is 42.<|im_end|>"
    assert found["chosen"]["tokens"][-1]["special"] == "EOS" and found["prompt"]["tokens"][0]["special"] == "BOS"


def test_terms_and_the_id_are_told(tiny: Path) -> None:
    found = explained(tiny, "rows.jsonl:1")
    assert (found["row"], found["weight"], found["margin"]) == ("rows.jsonl:1 (id a-1)", 2, 0.5)


def test_a_refused_row_has_its_reason(tiny: Path) -> None:
    assert explained(tiny, "2") == {"row": "rows.jsonl:2", "refused": "chosen is empty"}


def test_a_person_reads_texts_and_a_line_a_token(tiny: Path) -> None:
    """No control character of the data reaches the terminal."""
    out = explain(tiny, "3")
    assert out.exit_code == 0 and "\x1b" not in out.stdout
    lines = out.stdout.splitlines()
    assert lines[0] == "row         rows.jsonl:3" and "[rejected] No.<|im_end|>" in lines
    assert sum(line.startswith(("prompt ", "chosen ", "rejected ")) and "'" in line for line in lines) > 20


def test_a_row_that_is_not_there(tiny: Path) -> None:
    out = explain(tiny, "4")
    assert out.exit_code == 2 and "--row 4: rows.jsonl has no such row of its 3" in out.stderr and not out.stdout
