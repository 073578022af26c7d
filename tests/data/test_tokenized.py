"""Pairs read back from an earlier start: the same as tokenized again, or not read back at all."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from dpo_cli.cli.app import app
from dpo_cli.config.options import PrecomputeOptions
from dpo_cli.data import token_cache
from dpo_cli.data.rows import Reading, read_rows
from dpo_cli.data.sources import find_sources
from dpo_cli.data.token_cache import TokenCache, cached_files, merge
from dpo_cli.data.tokenize import PairSet, tokenize_rows
from dpo_cli.training.prepare import read_pairs
from dpo_cli.utils.console import Reporter
from dpo_cli.utils.files import to_json
from tests.helpers import make_tokenizer, size, write_rows

SETTINGS: dict[str, Any] = {"columns": None, "max_length": 64, "control_tokens": "keep"}
BAD = [{"prompt": "Why?", "chosen": "a", "rejected": "a"}, {"prompt": "", "chosen": 1, "é": [None, {"x": 1.5}]}]


@pytest.fixture(autouse=True)
def every_file_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """However small it is."""
    monkeypatch.setattr(token_cache, "SMALL_BYTES", 0)


def rows(first: int = 0, count: int = 8) -> list[Any]:
    """Strings and messages, some too long, some with control tokens inside."""
    found: list[Any] = []
    for n in range(first, first + count):
        asked = "\n\nHuman: " + f"Why {n}? " * (1 + 9 * (n % 3)) + "\n\nAssistant:"
        strings = {"prompt": asked, "chosen": " Because.", "rejected": f" No {n}."}
        said = [{"role": "user", "content": f"Is it {n}? <|im_end|>" if n % 2 else f"Is it {n}?"}]
        answers = ([{"role": "assistant", "content": text}] for text in ("Yes. " * (1 + n % 40), "No."))
        found += [strings, dict(zip(("prompt", "chosen", "rejected"), (said, *answers), strict=True))]
    return found


def plain(found: PairSet) -> Any:
    """All that is in it, to compare."""
    pairs = [(pair.where, *(ids.tolist() for ids in (pair.prompt, pair.chosen, pair.rejected))) for pair in found.pairs]
    refused = [to_json([bad.where, bad.reason, bad.record]) for bad in found.refused]
    return pairs, refused, list(found.formats.items()), list(found.notes.items())


def tokenize(file: Path, tokenizer: Any, keep_refused: bool = True, **changed: Any) -> PairSet:
    reading = Reading(**SETTINGS | changed)
    found = read_rows(find_sources([str(file)]), reading.columns)
    return tokenize_rows(found, tokenizer, reading, keep_refused)


def read(
    folder: Path, file: Path, tokenizer: Any, keep_refused: bool = True, told: list[str] | None = None, **changed: Any
) -> tuple[PairSet, bool]:
    warn: Callable[[str], Any] = pytest.fail if told is None else told.append
    return TokenCache(folder, tokenizer, Reading(**SETTINGS | changed), warn).tokenize(
        find_sources([str(file)])[0], keep_refused
    )


def fresh() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.v2.json", "rows 7.jsonl"])
def test_what_is_read_back_is_what_was_tokenized(name: str, tmp_path: Path) -> None:
    """Pairs to the id, refused rows with their records, places, counts and their order."""
    tokenizer, file = fresh(), tmp_path / name
    lines = [*rows(), *BAD, *rows(8, 2)]
    content = json.dumps(lines) if ".json" in name and "jsonl" not in name else "\n".join(map(json.dumps, lines))
    file.write_bytes(gzip.compress(content.encode()) if name.endswith(".gz") else content.encode())
    expected = plain(tokenize(file, tokenizer))
    assert len(expected[0]) == 20 and len(expected[1]) == 2 and len(expected[2]) == 2 and len(expected[3]) > 1
    for known in (False, True, True):
        found, again = read(tmp_path / "cache", file, tokenizer)
        assert (again, plain(found)) == (known, expected)


def test_a_renamed_file_is_known_by_its_new_name(tmp_path: Path) -> None:
    tokenizer, file = fresh(), write_rows(tmp_path / "old.jsonl", [*rows(), *BAD])
    read(tmp_path, file, tokenizer)
    (tmp_path / "deep").mkdir()
    moved = file.rename(tmp_path / "deep" / "new.name.jsonl")
    found, again = read(tmp_path, moved, tokenizer)
    assert again and plain(found) == plain(tokenize(moved, tokenizer))
    assert found.pairs[0].where == f"{moved}:1" and found.refused[1].where == f"{moved}:18"


def added(tokenizer: Any) -> None:
    tokenizer.add_tokens([AddedToken("Because", special=False)])


def special(tokenizer: Any) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>", "Because"]})


def template(tokenizer: Any) -> None:
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant", "model")


def eos(tokenizer: Any) -> None:
    tokenizer.eos_token = "<|endoftext|>"


def splits(tokenizer: Any) -> None:
    tokenizer.split_special_tokens = True


@pytest.mark.parametrize("change", [added, special, template, eos, splits])
def test_another_tokenizer_has_its_own_pairs(change: Callable[[Any], None], tmp_path: Path) -> None:
    file, changed = write_rows(tmp_path / "rows.jsonl", rows()), fresh()
    read(tmp_path, file, fresh())
    change(changed)
    for known in (False, True):
        found, again = read(tmp_path, file, changed)
        assert again == known and plain(found) == plain(tokenize(file, changed))
    assert read(tmp_path, file, fresh())[1]


@pytest.mark.parametrize(
    "changed",
    [
        {"max_length": 63},
        {"control_tokens": "sanitize"},
        {"control_tokens": "refuse"},
        {"columns": "chosen=rejected,rejected=chosen"},
    ],
)
def test_other_options_have_their_own_pairs(changed: dict[str, Any], tmp_path: Path) -> None:
    file, tokenizer = write_rows(tmp_path / "rows.jsonl", rows()), fresh()
    read(tmp_path, file, tokenizer)
    found, again = read(tmp_path, file, tokenizer, **changed)
    assert not again and plain(found) == plain(tokenize(file, tokenizer, **changed))


def test_a_changed_byte_is_another_file(tmp_path: Path) -> None:
    """Also where size and time are as before."""
    file, tokenizer = write_rows(tmp_path / "rows.jsonl", rows()), fresh()
    read(tmp_path, file, tokenizer)
    stat = file.stat()
    file.write_bytes(file.read_bytes().replace(b"Because", b"BecausE", 1))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    found, again = read(tmp_path, file, tokenizer)
    assert not again and plain(found) == plain(tokenize(file, tokenizer))


def test_the_kind_of_a_file_counts(tmp_path: Path) -> None:
    """One line of JSON that is an array reads otherwise as .jsonl."""
    file, tokenizer = tmp_path / "rows.json", fresh()
    file.write_text(json.dumps(rows()))
    read(tmp_path, file, tokenizer)
    found, again = read(tmp_path, file.rename(tmp_path / "rows.jsonl"), tokenizer)
    assert not again and len(found.pairs) == 0


@pytest.mark.parametrize("name", ["tokenizers", "transformers", "jinja2", "ours"])
def test_other_versions_have_their_own_pairs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, tokenizer = write_rows(tmp_path / "rows.jsonl", rows()), fresh()
    read(tmp_path, file, tokenizer)
    right = token_cache.version
    monkeypatch.setattr(token_cache, "version", lambda package: "0" if package == name else right(package))
    if name == "ours":
        monkeypatch.setattr(token_cache, "TOKENIZING_VERSION", 0)
    assert not read(tmp_path, file, tokenizer)[1]


def test_swapped_files_give_their_pairs_in_the_new_order(tmp_path: Path) -> None:
    tokenizer = fresh()
    one, two = write_rows(tmp_path / "one.jsonl", rows()), write_rows(tmp_path / "two.jsonl", [*rows(90, 3), *BAD])
    for files, known in (((one, two), False), ((two, one), True), ((one, one), True)):
        parts = [read(tmp_path, file, tokenizer) for file in files]
        together = tokenize_rows(read_rows(find_sources([*map(str, files)])), tokenizer, Reading(max_length=64))
        assert {again for _, again in parts} == {known}
        assert plain(merge([part for part, _ in parts])) == plain(together)


def test_what_ends_in_a_refusal_is_not_kept(tmp_path: Path) -> None:
    """And what was kept with its refused rows serves those who want to know the reasons only."""
    file, tokenizer = write_rows(tmp_path / "rows.jsonl", [*rows(), *BAD]), fresh()
    read(tmp_path, file, tokenizer, keep_refused=False)
    assert not cached_files(tmp_path)
    read(tmp_path, file, tokenizer)
    found, again = read(tmp_path, file, tokenizer, keep_refused=False)
    assert again and [bad.where for bad in found.refused] == [f"{file}:17", f"{file}:18"]


def test_what_depends_on_more_than_can_be_seen_is_not_kept(tmp_path: Path) -> None:
    file, dated, slow = write_rows(tmp_path / "rows.jsonl", rows()), fresh(), fresh()
    dated.chat_template += "{% if false %}{{ strftime_now('%d') }}{% endif %}"

    class Own(PreTrainedTokenizerFast):  # type: ignore[misc]
        def __call__(self, *arguments: Any, **named: Any) -> Any:
            return super().__call__(*arguments, **named)

    slow.__class__ = Own
    for tokenizer in (dated, slow):
        found, again = read(tmp_path, file, tokenizer)
        assert not again and plain(found) == plain(tokenize(file, fresh()))
    assert not cached_files(tmp_path)


def test_a_file_that_changes_while_it_is_read_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, tokenizer = write_rows(tmp_path / "rows.jsonl", rows()), fresh()

    def slowly(*arguments: Any) -> PairSet:
        write_rows(file, rows(50))
        return tokenize_rows(*arguments)

    monkeypatch.setattr(token_cache, "tokenize_rows", slowly)
    read(tmp_path, file, tokenizer)
    assert not cached_files(tmp_path)


def test_small_files_are_tokenized_each_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, tokenizer = write_rows(tmp_path / "rows.jsonl", rows()), fresh()
    monkeypatch.setattr(token_cache, "SMALL_BYTES", file.stat().st_size + 1)
    assert [read(tmp_path, file, tokenizer)[1] for _ in range(2)] == [False, False] and not cached_files(tmp_path)


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    file, tokenizer = write_rows(tmp_path / "rows.jsonl", rows()), fresh()
    (tmp_path / "file").write_text("no folder")
    found, again = read(tmp_path / "file", file, tokenizer)
    assert not again and plain(found) == plain(tokenize(file, tokenizer))


def damage_bytes(content: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(content))
    kind = rng.choice(["flip", "flip", "cut", "zeros", "more", "nothing"])
    if kind == "flip":
        return content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]
    if kind == "zeros":
        return content[:place] + bytes(min(512, len(content) - place)) + content[place + 512 :]
    return {"cut": content[:place], "more": content + b"\0", "nothing": b""}[kind]


def test_no_damaged_file_is_ever_served(tmp_path: Path) -> None:
    """It is reported and made again."""
    file, tokenizer, rng = write_rows(tmp_path / "rows.jsonl", [*rows(), *BAD]), fresh(), random.Random(0)
    expected = plain(read(tmp_path, file, tokenizer)[0])
    (ours,) = cached_files(tmp_path)
    whole = ours.read_bytes()
    for _ in range(size(60, 1000)):
        changed = damage_bytes(whole, rng)
        ours.write_bytes(changed)
        told: list[str] = []
        found, again = read(tmp_path, file, tokenizer, told=told)
        assert plain(found) == expected and again == (changed == whole)
        assert again or (len(told) == 1 and str(ours) in told[0] and "is tokenized again" in told[0])
        assert ours.read_bytes() == whole and list(cached_files(tmp_path)) == [ours]


def test_a_file_under_another_s_name_is_not_served(tmp_path: Path) -> None:
    one, two = write_rows(tmp_path / "one.jsonl", rows()), write_rows(tmp_path / "two.jsonl", rows(20))
    tokenizer, told = fresh(), list[str]()
    read(tmp_path, one, tokenizer)
    (ours,) = cached_files(tmp_path)
    expected = plain(read(tmp_path, two, tokenizer)[0])
    (other,) = cached_files(tmp_path).keys() - {ours}
    shutil.copy(ours, other)
    assert plain(read(tmp_path, two, tokenizer, told=told)[0]) == expected
    assert "it is damaged" in told[0]


def command(*arguments: Any, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert result.exit_code == code, (result.output, result.exception)
    return json.loads(result.stdout)


def test_cache_list_verify_and_prune_know_it(tmp_path: Path) -> None:
    file, tokenizer, here = write_rows(tmp_path / "rows.jsonl", rows()), fresh(), ("--cache-dir", tmp_path)
    read(tmp_path, file, tokenizer)
    (ours,) = cached_files(tmp_path)
    (entry,) = command("cache", "list", *here)["entries"]
    assert (entry["kind"], entry["name"], entry["bytes"]) == ("pairs", ours.name, ours.stat().st_size)
    assert command("cache", "verify", *here) == {"checked": 1, "damaged": []}
    days_ago = time.time() - 40 * 24 * 60 * 60
    os.utime(ours, (days_ago, days_ago))
    assert read(tmp_path, file, tokenizer)[1]  # which is a use
    prune = ("cache", "prune", "--older-than", 30, "--yes", *here)
    assert command(*prune) == {"removed": [], "bytes": 0}
    os.utime(ours, (days_ago, days_ago))
    refused = CliRunner().invoke(app, ["cache", "prune", "--older-than", "30", *map(str, here)])
    assert refused.exit_code == 2 and "1 entries would be removed" in refused.stderr
    assert command("cache", "prune", "--model", "any", "--yes", *here)["removed"] == []
    assert command(*prune)["removed"] == [ours.name] and not cached_files(tmp_path)


def test_cache_verify_removes_what_is_damaged(tmp_path: Path) -> None:
    file, tokenizer = write_rows(tmp_path / "rows.jsonl", rows()), fresh()
    read(tmp_path, file, tokenizer)
    (ours,) = cached_files(tmp_path)
    ours.write_bytes(ours.read_bytes()[:-1])
    assert command("cache", "verify", "--cache-dir", tmp_path, code=3)["damaged"] == [str(ours)]
    assert not cached_files(tmp_path) and not read(tmp_path, file, tokenizer)[1]


def test_a_dry_run_keeps_nothing(tmp_path: Path) -> None:
    options = PrecomputeOptions(data=[str(write_rows(tmp_path / "rows.jsonl", rows()))], cache_dir=tmp_path)
    for remember, files in ((False, 0), (True, 1)):
        read_pairs(options.data, options, fresh(), Reporter(quiet=True), remember=remember)
        assert len(cached_files(tmp_path)) == files
