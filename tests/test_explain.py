"""`dpo explain`: what it shows of a row is what would be trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dpo_cli.data.formats import Reading, Row, read_rows
from dpo_cli.data.pairs import model_input_ids
from dpo_cli.data.records import find_sources
from dpo_cli.data.tokenize import Encoder
from tests.conftest import Cli, write_rows

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


def explained(dpo: Cli, tiny: Path, folder: Path, row: str) -> dict[str, Any]:
    write_rows(folder / "rows.jsonl", ROWS)
    out = dpo("explain", "--model", tiny, "--data", "rows.jsonl", "--row", row, "--json")
    assert out.returncode == 0, out.stderr
    found: dict[str, Any] = json.loads(out.stdout)
    return found


def test_tokens_and_loss_are_those_of_the_pair(dpo: Cli, tiny: Path, tmp_path: Path, tokenizer: Any) -> None:
    found = explained(dpo, tiny, tmp_path, "3")
    [_, _, row] = read_rows(find_sources([str(tmp_path / "rows.jsonl")]))
    assert isinstance(row, Row)
    pair, notes = Encoder(tokenizer, Reading()).pair(row)
    assert found["notes"] == sorted(notes) and found["format"] == row.format
    for part in ("prompt", "chosen", "rejected"):
        ids = getattr(pair, part)
        assert [token["id"] for token in found[part]["tokens"]] == model_input_ids(ids).tolist()
        carries = [part != "prompt" and each >= 0 for each in ids.tolist()]
        assert [token["loss"] for token in found[part]["tokens"]] == carries
    assert "".join(token["text"] for token in found["chosen"]["tokens"] if token["loss"]) == "It is 42.<|im_end|>"
    assert found["chosen"]["tokens"][-1]["special"] == "EOS" and found["prompt"]["tokens"][0]["special"] == "BOS"


def test_terms_and_the_id_are_told(dpo: Cli, tiny: Path, tmp_path: Path) -> None:
    found = explained(dpo, tiny, tmp_path, "rows.jsonl:1")
    assert (found["row"], found["weight"], found["margin"]) == ("rows.jsonl:1 (id a-1)", 2, 0.5)


def test_a_refused_row_has_its_reason(dpo: Cli, tiny: Path, tmp_path: Path) -> None:
    assert explained(dpo, tiny, tmp_path, "2") == {"row": "rows.jsonl:2", "refused": "chosen is empty"}


def test_a_person_reads_texts_and_a_line_a_token(dpo: Cli, tiny: Path, tmp_path: Path) -> None:
    """No control character of the data reaches the terminal."""
    write_rows(tmp_path / "rows.jsonl", ROWS)
    out = dpo("explain", "--model", tiny, "--data", "rows.jsonl", "--row", "3")
    assert out.returncode == 0 and "\x1b" not in out.stdout
    lines = out.stdout.splitlines()
    assert lines[0] == "row         rows.jsonl:3" and "[rejected] No.<|im_end|>" in lines
    assert sum(line.startswith(("prompt ", "chosen ", "rejected ")) and "'" in line for line in lines) > 20


def test_a_row_that_is_not_there(dpo: Cli, tiny: Path, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", ROWS)
    out = dpo("explain", "--model", tiny, "--data", "rows.jsonl", "--row", "4")
    assert out.returncode == 2 and "--row 4: rows.jsonl has no such row" in out.stderr and not out.stdout
