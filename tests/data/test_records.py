"""What ``--data`` may name beside a file: packed files, folders, saved data sets, stdin, data sets of the hub."""

from __future__ import annotations

import gzip
import io
import json
import os
import random
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import date
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from dpo_cli.data.rows import BadRow, Row, read_rows
from dpo_cli.data.sources import find_sources
from dpo_cli.utils.errors import RowError, UsageError
from tests.helpers import Cli, bar_network, cli_environment, size, write_rows
from tests.helpers.records import STRINGS, write_records

ROWS = [STRINGS | {"prompt": f"Why {number}?"} for number in range(5)]


def read(*data: Any) -> list[tuple[str, Any]]:
    return [each for source in find_sources(list(map(str, data))) for each in source.records()]


def refused(*data: Any, option: str = "--data") -> str:
    """The message with which data is refused, without the option and the name."""
    with pytest.raises(UsageError) as told:
        for source in find_sources(list(map(str, data)), option):
            list(source.records())
    message = str(told.value)
    assert message.startswith(f"{option} {data[-1]}") and "\n" not in message
    return message.removeprefix(f"{option} {data[-1]}").removeprefix(": ")


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing here may as much as ask for a name."""
    attempts = bar_network(monkeypatch)
    yield
    assert attempts == []


# ---- folders ----------------------------------------------------------------------------------------------------


def test_a_folder_is_its_files_by_name(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    for name in ("b.jsonl.gz", "a.csv", "c.parquet.gz", ".hidden.jsonl", "README.md", "d.json.gz"):
        folder.mkdir(exist_ok=True)
        write_records(folder / name, [STRINGS | {"prompt": name}])
    (folder / "deeper.json").mkdir()
    write_rows(folder / "deeper.json" / "e.jsonl", ROWS)
    names = ["a.csv", "b.jsonl.gz", "c.parquet.gz", "d.json.gz"]
    found = read(folder)
    assert [record["prompt"] for _, record in found] == names
    assert [where.rpartition(":")[0] for where, _ in found] == [f"{folder / name}" for name in names]
    assert [source.name for source in find_sources([f"{folder}/"])] == [f"--data {folder / name}" for name in names]


def test_shards_of_links_are_files_too(tmp_path: Path) -> None:
    """So the cache of the hub lays them out."""
    (tmp_path / "blobs").mkdir()
    write_records(tmp_path / "blobs" / "a.parquet", ROWS)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train-00000-of-00001.parquet").symlink_to(tmp_path / "blobs" / "a.parquet")
    assert [record for _, record in read(tmp_path / "data")] == ROWS


def test_a_folder_without_data_says_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("nothing")
    told = "the folder has no file to read; looked for .jsonl, .json, .parquet, .csv, each optionally with .gz"
    assert refused(tmp_path) == told
    assert refused(tmp_path, option="--eval-data") == told


def test_a_bad_file_of_a_folder_is_named(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "b.csv").write_text("")
    assert refused(tmp_path) == "/b.csv: has no rows"


# ---- saved data sets --------------------------------------------------------------------------------------------


def test_a_saved_data_set_is_read(tmp_path: Path) -> None:
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved", num_shards=2)
    places = [f"{tmp_path / 'saved'}:row {number}" for number in range(1, 6)]
    assert read(tmp_path / "saved") == list(zip(places, ROWS, strict=True))
    assert refused(f"{tmp_path / 'saved'}:train") == "the saved data set has no splits; name it without ':train'"


def test_a_split_of_a_saved_data_set_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    DatasetDict(train=Dataset.from_list(ROWS[:3]), test=Dataset.from_list(ROWS[3:])).save_to_disk(folder)
    assert read(f"{folder}:test") == [(f"{folder}:test:row 1", ROWS[3]), (f"{folder}:test:row 2", ROWS[4])]
    assert [record for _, record in read(folder)] == ROWS[:3]
    assert refused(f"{folder}:validation") == f"name a split as {folder}:SPLIT; available: train, test"


def test_the_only_split_of_a_saved_data_set_needs_no_name(tmp_path: Path) -> None:
    DatasetDict(test=Dataset.from_list(ROWS[:1])).save_to_disk(tmp_path / "saved")
    assert read(tmp_path / "saved") == [(f"{tmp_path / 'saved'}:test:row 1", ROWS[0])]


@pytest.mark.parametrize("file", ["state.json", "dataset_info.json", "data-00000-of-00001.arrow"])
@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff" * 1000], ids=["nothing", "object", "array", "bytes"])
def test_a_damaged_data_set_is_refused(file: str, content: bytes, tmp_path: Path) -> None:
    """Or its rows are right: they need not the information beside them."""
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / file).write_bytes(content)
    if file == "dataset_info.json" and content == b"{}":
        assert [record for _, record in read(tmp_path / "saved")] == ROWS
    else:
        assert refused(tmp_path / "saved").startswith("the saved data set cannot be loaded (")


def test_no_flipped_bit_of_a_saved_data_set_ends_the_process(tmp_path: Path) -> None:
    """Its files are mapped into memory, so a place that points outside of them would."""
    said = [{"role": "user", "content": "Why?"}]
    rows = [row | {"said": said * number} for number, row in enumerate(ROWS * 40)]
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    (file,) = (tmp_path / "saved").glob("*.arrow")
    whole, rng, outcomes = file.read_bytes(), random.Random(0), Counter[str]()
    for _ in range(size(100, 10_000)):
        place = rng.randrange(len(whole))
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1 :])
        try:
            outcomes["read"] += len(read(tmp_path / "saved")) == len(rows)
        except UsageError:
            outcomes["refused"] += 1
    assert outcomes["read"] and outcomes["refused"]


def test_columns_of_any_kind_do_not_matter(tmp_path: Path) -> None:
    """Pictures are neither decoded nor kept; a date is what it is; JSON is its value."""
    raw = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    features = datasets.Features(
        {name: datasets.Value("string") for name in STRINGS}
        | {"picture": raw, "sounds": datasets.List(raw), "day": datasets.Value("date32")}
        | {"label": datasets.ClassLabel(names=["no", "yes"]), "functions": datasets.Json()}
    )
    row = STRINGS | {"day": date(2024, 2, 29), "label": 1}
    picture = {"bytes": b"no picture", "path": None}
    rows = [
        row | {"picture": each, "sounds": [each] if each else [], "functions": [1, "a"]} for each in (picture, None)
    ]
    Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "saved")
    info = json.loads((tmp_path / "saved" / "dataset_info.json").read_text())
    info["features"] |= {"picture": {"_type": "Image"}, "sounds": {"_type": "List", "feature": {"_type": "Audio"}}}
    (tmp_path / "saved" / "dataset_info.json").write_text(json.dumps(info))
    assert type(datasets.load_from_disk(str(tmp_path / "saved")).features["picture"]) is datasets.Image
    left = [row | {"picture": there, "sounds": there, "functions": [1, "a"]} for there in (True, False)]
    assert [record for _, record in read(tmp_path / "saved")] == left
    assert {type(row) for row in read_rows(find_sources([str(tmp_path / "saved")]))} == {Row}


def test_images_of_a_data_set_are_refused(tmp_path: Path) -> None:
    raw = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    features = datasets.Features({name: datasets.Value("string") for name in STRINGS} | {"image": raw})
    images: list[Any] = [{"bytes": b"picture", "path": None}, None]
    Dataset.from_list([STRINGS | {"image": each} for each in images], features=features).save_to_disk(
        tmp_path / "saved"
    )
    bad, row = read_rows(find_sources([str(tmp_path / "saved")]))
    assert isinstance(bad, BadRow) and bad.reason.startswith("has the column 'image'") and isinstance(row, Row)


def test_json_in_a_parquet_file_is_its_value(tmp_path: Path) -> None:
    """As which ``datasets`` writes messages whose contents are texts and lists of parts."""
    parts = [{"type": "text", "text": "Because."}]
    records = [
        {"prompt": [{"role": "user", "content": "Why?"}], "tools": [{"name": "f"}, None]}
        | {"chosen": [{"role": "assistant", "content": each}], "rejected": "No.", "said": {"so": each}}
        for each in ("Because.", parts)
    ]
    any_ = datasets.Json()
    messages = [{"role": datasets.Value("string"), "content": any_}]
    features = {"prompt": any_, "chosen": messages, "rejected": any_, "tools": [any_], "said": {"so": any_}}
    table = Dataset.from_list([*records, dict.fromkeys(features)], features=datasets.Features(features))
    table.to_parquet(tmp_path / "rows.parquet")
    assert [record for _, record in read(tmp_path / "rows.parquet")][:2] == records


def test_json_in_a_parquet_file_that_is_none_costs_its_row_only(tmp_path: Path) -> None:
    columns = {name: pa.array([value] * 3) for name, value in STRINGS.items()}
    tools = pa.array(["[]", "{", "[]"], pa.json_())
    pq.write_table(pa.table(columns | {"tools": tools}), tmp_path / "rows.parquet")
    (_, first), (where, bad), (_, last) = read(tmp_path / "rows.parquet")
    assert first == last == STRINGS | {"tools": []}
    assert where.endswith(":row 2") and str(bad).startswith("tools: not JSON: ")


# ---- stdin ------------------------------------------------------------------------------------------------------

LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def piped(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def test_stdin_is_read_as_often_as_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    piped(monkeypatch, LINES.encode() + b"\n{\n")
    found = read("-")
    assert found[:5] == [(f"stdin:{number}", row) for number, row in enumerate(ROWS, 1)]
    assert [where for where, _ in found[5:]] == ["stdin:7"] and isinstance(found[5][1], RowError)
    source, again = find_sources(["-", "-"])
    for each in (source, source, again):
        assert [where for where, _ in each.records()] == [where for where, _ in found]
    piped(monkeypatch, LINES[: LINES.index("\n")].encode())
    assert read("-") == [("stdin:1", ROWS[0])]


def test_stdin_that_gives_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    piped(monkeypatch, b"")
    assert refused("-") == "has no rows"
    monkeypatch.setattr(sys, "stdin", None)
    assert refused("-", option="--eval-data") == "stdin is closed"


def test_a_terminal_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, terminal = os.openpty()
    with os.fdopen(ours, "w"), os.fdopen(terminal) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert refused("-") == "stdin is a terminal; pipe JSON lines into the command"


def test_stdin_is_not_shared_by_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would get a part of it."""
    piped(monkeypatch, LINES.encode())
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert refused("-") == "several processes cannot share stdin; name a file"


def test_a_run_on_stdin_resumes_where_the_same_rows_are_piped_again(
    dpo: Cli, dpo_process: Cli, tiny: Path, tmp_path: Path
) -> None:
    train = ("train", "--model", tiny, "--data", "-", "--batch-size", 2, "--max-steps", 1, "--output", "run")
    told = dpo(*train, input=LINES)
    assert told.returncode == 0 and "5 rows, 5 pairs" in told.stderr, told.stderr
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["data"]["files"] == ["-"]
    told = dpo("train", "--resume", "run", input=LINES)
    assert told.returncode == 0, told.stderr
    told = dpo_process("train", "--resume", "run", preexec_fn=lambda: os.close(0))
    assert told.returncode == 2 and "error: --data -: stdin is closed" in told.stderr


# ---- data sets of the hub ---------------------------------------------------------------------------------------

Add = Callable[..., Path]


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Add:
    """No way to the hub, and a cache of what was loaded before, into which ``hub("org/name", train=rows)`` puts."""
    cache = tmp_path / "datasets"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(cache))  # of commands

    def add(name: str, config: str = "default", **splits: list[Any]) -> Path:
        class Builder(datasets.GeneratorBasedBuilder):  # type: ignore[misc]
            BUILDER_CONFIGS: ClassVar = [datasets.BuilderConfig(name=config)]

            def _info(self) -> Any:
                return datasets.DatasetInfo()

            def _split_generators(self, _: Any) -> Any:
                return [datasets.SplitGenerator(split, {"rows": rows}) for split, rows in splits.items()]

            def _generate_examples(self, rows: list[Any]) -> Any:
                yield from enumerate(rows)

        builder = Builder(
            cache_dir=str(cache), repo_id=name, dataset_name=name.partition("/")[2], config_name=config, hash="0" * 40
        )
        builder.download_and_prepare()
        return Path(builder.cache_dir)

    return add


def test_a_data_set_of_the_hub_is_its_training_rows_or_the_split_that_is_named(hub: Add) -> None:
    hub("org/some-name", test=ROWS[3:], train=ROWS[:3])
    train = [(f"org/some-name:train:row {number}", row) for number, row in enumerate(ROWS[:3], 1)]
    assert read("org/some-name") == read("org/some-name:train") == train
    assert read("org/some-name:test")[0] == ("org/some-name:test:row 1", ROWS[3])
    assert refused("org/some-name:dev") == "name a split as org/some-name:SPLIT; available: test, train"


def test_without_a_training_split_the_only_one_is_taken(hub: Add) -> None:
    hub("org/one", test=ROWS)
    assert len(read("org/one")) == 5
    hub("org/two", test=ROWS, dev=ROWS)
    assert refused("org/two") == "name a split as org/two:SPLIT; available: test, dev"


def test_a_configuration_is_named_before_the_split(hub: Add) -> None:
    hub("org/name", "easy", train=ROWS[:1])
    hub("org/name", "hard", train=ROWS[1:], test=ROWS)
    assert read("org/name:easy/train") == [("org/name:easy/train:row 1", ROWS[0])]
    assert len(read("org/name:hard/test")) == 5
    told = refused("org/name")
    assert "easy" in told and "hard" in told and told.endswith("; name a configuration as org/name:CONFIG/SPLIT")
    assert refused("org/name:hard/dev") == "name a split as org/name:hard/SPLIT; available: train, test"


def test_a_data_set_that_was_never_loaded_is_refused_offline(hub: Add) -> None:
    told = refused("org/none:train")
    assert told.startswith("no such file, and the data set cannot be loaded (ConnectionError: ") and "org/none" in told


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    "name",
    [
        "none",
        "a/b/c",
        "/org/name",
        "./org",
        "~/name",
        "org/a.jsonl",
        "org/a.csv.gz",
        "org/",
        "org/name:",
        "a b/c",
    ],
)
def test_what_is_no_name_of_a_data_set_is_a_file_that_is_not_there(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert refused(name).startswith("no such file")


@pytest.mark.usefixtures("hub")
def test_what_is_there_is_never_looked_for_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    write_rows(tmp_path / "org" / "name" / "rows.jsonl", ROWS)
    write_rows(tmp_path / "org" / "name:a.jsonl", ROWS)
    assert read("org/name") == [(f"org/name/rows.jsonl:{number}", row) for number, row in enumerate(ROWS, 1)]
    assert len(read("org/name:a.jsonl")) == 5
    assert refused("org/name:train").startswith("no such file")


def test_the_command_takes_a_data_set(hub: Add, dpo: Cli, tiny: Path) -> None:
    hub("org/name", train=[STRINGS | {"prompt": f"Why {number}? " * 100} for number in range(600)])
    options = ("--data", "org/name", "--format", "strings", "--max-length", 16, "--json")
    told = dpo("precompute-ref", "--model", tiny, *options)
    assert told.returncode == 0 and json.loads(told.stdout)["pairs"] == 600, told.stderr
    assert "Found the latest" not in told.stderr and "%|" not in told.stderr


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [(401, "RepoNotFound", "doesn't exist on the Hub or cannot be accessed"), (403, "GatedRepo", "is a gated dataset")],
)
def test_a_data_set_that_the_hub_refuses(
    code: int, error: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(code)
            self.send_header("X-Error-Code", error)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    script = "import sys\nfrom dpo_cli.data.sources import find_sources\nlist(find_sources([sys.argv[1]])[0].records())"
    environment = cli_environment(tmp_path) | {"HF_HUB_OFFLINE": "0"}
    with HTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
        command = [sys.executable, "-c", script, "org/name"]
        told = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
        server.shutdown()
    last = told.stderr.splitlines()[-1]
    assert ".UsageError: --data org/name: no such file, and the data set cannot be loaded (" in last and message in last


# ---- all of them ------------------------------------------------------------------------------------------------


def test_the_same_rows_come_from_everywhere(hub: Add, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub("org/name", train=ROWS)
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    write_rows(tmp_path / "rows.jsonl", ROWS)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "rows.jsonl.gz").write_bytes(gzip.compress(LINES.encode()))
    piped(monkeypatch, LINES.encode())
    data = [tmp_path / "rows.jsonl", tmp_path / "folder", tmp_path / "saved", "-", "org/name"]
    assert [record for _, record in read(*data)] == ROWS * 5
