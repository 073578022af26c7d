"""`dpo sweep`: ordinary runs from one reference, and the frontier of what was measured of them."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import weakref
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

from dpo_cli.cli.app import app
from dpo_cli.config.options import SweepOptions, TrainOptions
from dpo_cli.config.resolve import resolve
from dpo_cli.reference import store
from dpo_cli.reporting.plots import frontier, png, write_plots
from dpo_cli.training import prepare
from dpo_cli.training.loop import train
from dpo_cli.training.run_dir import read_manifest
from dpo_cli.training.step import Trainer
from dpo_cli.training.sweep import NOT_LEARNED, _best
from dpo_cli.utils.errors import UsageError
from tests.helpers import SAMPLE, make_model, write_rows
from tests.helpers.pictures import pictures
from tests.helpers.synthetic import scores_of

BETAS = (0.03, 0.1, 0.3, 1.0)
RUNS = [f"beta-{beta:g}" for beta in BETAS]
SHOWN = ("loss", "rewards/margins", "rewards/accuracies")
SAMPLES = ("--samples", 3, "--sample-prompts", 4, "--sample-tokens", 6)


def invoke(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [*map(str, arguments)])


def dpo(*arguments: Any) -> Any:
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def training(folder: Path, lr: Any = 3e-4) -> list[Any]:
    """Options of every training here: smoothed labels, whose best margin is finite and the nearer the larger beta."""
    return [
        "--model", folder / "start", "--data", folder / "train.jsonl", "--eval-data", folder / "held-out.jsonl",
        "--epochs", 10, "--batch-size", 4, "--lr", lr, "--label-smoothing", 0.2, "--kl", "none",
        "--cache-dir", folder / "cache",
    ]  # fmt: skip


def command(folder: Path, *more: Any, beta: str = "0.03,0.1,0.3,1", lr: Any = 3e-4) -> list[Any]:
    return ["sweep", "--beta", beta, *training(folder, lr), "--output", folder / "sweep", *more]


def short(folder: Path, *more: Any, beta: str = "0.1,1") -> list[Any]:
    return command(folder, "--max-steps", 2, *more, beta=beta)


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A folder with a start model and rows."""
    folder = tmp_path_factory.mktemp("sweep")
    make_model().save_pretrained(folder / "start")
    tokenizer.save_pretrained(folder / "start")
    for name, source in (("train", "train-strings"), ("held-out", "heldout-strings")):
        rows = (SAMPLE / f"{source}.jsonl").read_text().splitlines()[:12]
        write_rows(folder / f"{name}.jsonl", [json.loads(row) for row in rows])
    return folder


@pytest.fixture(scope="module")
def swept(start: Path) -> tuple[Path, dict[str, Any], Seen]:
    """The same after a sweep; what it returned and what happened meanwhile."""
    with pytest.MonkeyPatch.context() as patch, pictures(drawn=True):
        seen = Seen(patch)
        return start, dpo(*command(start)), seen


@pytest.fixture
def place(start: Path, tmp_path: Path) -> Path:
    """A copy of that folder for one test alone."""
    ignored = shutil.ignore_patterns("sweep", "cache")
    return Path(shutil.copytree(start, tmp_path / "place", ignore=ignored))


class Seen:
    """What the commands do: pairs that the reference scores, models that trainings load and which are still there."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.misses: list[int] = []
        self.models: list[weakref.ref[PreTrainedModel]] = []
        self.alive: list[int] = []
        fill, load = store.fill_reference, prepare.load_scored_model

        def filled(*arguments: Any) -> Any:
            found = fill(*arguments)
            self.misses.append(found.misses)
            return found

        def loaded(*arguments: Any, **more: Any) -> Any:
            self.alive.append(sum(model() is not None for model in self.models))
            found = load(*arguments, **more)
            self.models.append(weakref.ref(found.model))
            return found

        patch.setattr("dpo_cli.training.setup.fill_reference", filled)
        patch.setattr("dpo_cli.training.setup.load_scored_model", loaded)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Seen:
    return Seen(monkeypatch)


# ---- the runs ---------------------------------------------------------------------------------------------------


@pytest.mark.pictures
def test_files_of_the_frontier(swept: tuple[Path, Any, Any]) -> None:
    """First of all: later tests overwrite them with empty pictures."""
    folder, result, _ = swept
    texts = svg_texts(folder / "sweep" / "frontier.svg")
    for beta in BETAS:
        assert texts.count(f"β {beta:g}") == 2
    assert {"Margin and KL", "Accuracy and KL", "KL from the reference, nats per token"} <= set(texts)
    with Image.open(folder / "sweep" / "frontier.png") as image:
        image.load()
        assert image.format == "PNG" and image.width > 1000 and len(image.convert("RGB").getcolors(2**20) or []) > 20
    assert json.loads((folder / "sweep" / "sweep.json").read_text()) == result


def test_one_reference_pass_and_one_model_at_a_time(swept: tuple[Path, Any, Seen]) -> None:
    _, _, seen = swept
    assert seen.misses == [24, 0, 0, 0]
    assert seen.alive == [0] * 4


def test_a_run_is_what_dpo_train_makes(swept: tuple[Path, Any, Any], tmp_path: Path) -> None:
    """To the last bit, in the middle of the sweep as by itself."""
    folder = swept[0]
    dpo("train", *training(folder), "--beta", 0.3, "--output", tmp_path / "run")
    alone, among = tmp_path / "run", folder / "sweep" / "beta-0.3"
    for name in ("config.yaml", "metrics.jsonl"):
        assert (alone / name).read_text() == (among / name).read_text()
    weights, others = (load_file(run / "model" / "model.safetensors") for run in (alone, among))
    assert weights.keys() == others.keys() and all(weights[name].equal(others[name]) for name in weights)
    assert {path.name for path in alone.iterdir()} == {path.name for path in among.iterdir()}


@pytest.mark.parametrize("number", range(4))
def test_dpo_eval_finds_the_numbers_of_the_frontier(swept: tuple[Path, Any, Any], number: int) -> None:
    folder, result, _ = swept
    point = result["points"][number]
    assert (point["beta"], point["run"]) == (BETAS[number], str(folder / "sweep" / RUNS[number]))
    common = ("--data", folder / "held-out.jsonl", "--cache-dir", folder / "cache")
    found = dpo("eval", "--model", point["run"], *common)
    assert {name: point[name] for name in SHOWN} == {name: found[name] for name in SHOWN}
    assert point["kl"] == found["kl/chosen"] and found["beta"] == point["beta"]
    ends = found["intervals"]
    assert point["intervals"] == {"kl": ends["kl/chosen"]} | {name: ends[name] for name in SHOWN}


def test_resume_accepts_a_run(swept: tuple[Path, Any, Any], tmp_path: Path) -> None:
    run = Path(shutil.copytree(swept[0] / "sweep" / "beta-1", tmp_path / "run"))
    assert dpo("train", "--resume", run)["steps"] == 30


def test_larger_beta_smaller_kl(swept: tuple[Path, Any, Any]) -> None:
    """By far: each of the four at most two thirds of the one before."""
    points = swept[1]["points"]
    assert [point["beta"] for point in points] == [*BETAS]
    kl = np.array([point["kl"] for point in points])
    assert (kl[1:] < kl[:-1] / 1.5).all() and (kl > 0).all()
    assert all(low < point["kl"] < high for point in points for low, high in [point["intervals"]["kl"]])


def test_the_same_command_trains_nothing_and_tells_the_same(swept: tuple[Path, Any, Any], seen: Seen) -> None:
    folder, result, _ = swept
    before = {file: file.stat().st_mtime_ns for file in (folder / "sweep").glob("beta-*/**/*")}
    assert dpo(*command(folder, beta="1,0.3,0.1,0.03")) == result  # in whatever order
    assert seen.models == [] and seen.misses == []
    assert before == {file: file.stat().st_mtime_ns for file in (folder / "sweep").glob("beta-*/**/*")}


def test_another_beta_is_added(place: Path, seen: Seen) -> None:
    first = dpo(*short(place, beta="1"))
    more = dpo(*short(place, beta="0.5,1"))
    assert [point["beta"] for point in more["points"]] == [0.5, 1]
    assert more["points"][1:] == first["points"]
    assert len(seen.models) == 2 and sum(seen.misses[1:]) == 0


def test_later_runs_settle_as_the_first(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What depends on the memory that happens to be free must not differ between points."""
    asked = []

    def spy(options: TrainOptions, *more: Any) -> Any:
        asked.append((options.beta, options.memory, options.dtype, options.max_tokens, options.max_length))
        return train(options, *more)

    monkeypatch.setattr("dpo_cli.training.sweep.train", spy)
    dpo(*short(place))
    assert asked == [(0.1, "auto", None, None, None), (1.0, "full", "float32", 2048, 1024)]


# ---- interrupted, and refused -----------------------------------------------------------------------------------


def test_an_interrupted_sweep_goes_on(place: Path, monkeypatch: pytest.MonkeyPatch, seen: Seen) -> None:
    taken = []

    def step(trainer: Trainer, *rest: Any) -> Any:
        taken.append(trainer.options.beta)
        if len(taken) == 5 and trainer.options.beta == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return own(trainer, *rest)

    own = Trainer.step
    monkeypatch.setattr(Trainer, "step", step)
    common = command(place, "--max-steps", 3, beta="0.1,1")
    out = invoke(*common)
    assert out.exit_code == 130
    assert "beta-1: interrupted after step 1 of 3; a checkpoint was written" in out.stderr
    assert "run the same sweep command again" in out.stderr and "--resume" in out.stderr and out.stdout == ""
    assert len(taken) == 5  # three of the first, one of the second, and the one that the signal came in
    result = dpo(*common)
    assert taken[5:] == [1, 1]
    assert seen.misses[0] > 0 and not any(seen.misses[1:])
    shutil.rmtree(place / "sweep")
    alone = dpo(*command(place, "--max-steps", 3, beta="1"))
    assert alone["points"] == result["points"][1:]  # as if it had not been interrupted


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--epochs", "3"], "beta-0.1 exists with other options: --epochs 3 (it began with --epochs 10)"),
        (["--max-steps", "9"], "--max-steps 9 (it began without)"),
        (["--max-length", "64"], "--max-length 64 (it began with --max-length 1024)"),
        (["--eval-data", str(SAMPLE / "heldout.jsonl")], "heldout.jsonl (it began with --eval-data "),
    ],
)
def test_runs_of_other_options_are_refused(swept: tuple[Path, Any, Any], more: list[str], told: str) -> None:
    out = invoke(*command(swept[0], *more, beta="0.1,1"))
    assert out.exit_code == 2 and told in out.stderr and "choose another folder" in out.stderr


def test_an_option_left_out_is_another(swept: tuple[Path, Any, Any]) -> None:
    words = command(swept[0])
    at = words.index("--model")
    out = invoke(*words[:at], *words[at + 2 :])
    assert out.exit_code == 2 and "no --model (it began with --model " in out.stderr


def test_a_folder_that_holds_something_else_is_refused(place: Path) -> None:
    (place / "sweep").mkdir()
    write_rows(place / "sweep" / "thesis.tex", [])
    out = invoke(*short(place))
    assert out.exit_code == 2 and "something other than a sweep" in out.stderr
    (place / "sweep" / "thesis.tex").unlink()
    (place / "sweep" / "beta-0.1").mkdir()
    out = invoke(*short(place))
    assert out.exit_code == 2 and "beta-0.1" in out.stderr and "manifest.json" in out.stderr


def test_data_that_changed_between_runs_are_refused(place: Path) -> None:
    """Before the second point would be compared with the first."""
    dpo(*short(place, beta="0.1"))
    rows = (place / "train.jsonl").read_text().splitlines()
    (place / "train.jsonl").write_text("\n".join(reversed(rows)) + "\n")
    out = invoke(*short(place))
    assert out.exit_code == 2 and "the data changed since beta-0.1 began" in out.stderr
    (place / "train.jsonl").write_text("\n".join(rows) + "\n")
    held_out = (place / "held-out.jsonl").read_text().splitlines()
    (place / "held-out.jsonl").write_text("\n".join(held_out[:5]) + "\n")
    out = invoke(*short(place, beta="0.1"))
    assert out.exit_code == 2 and "the held-out data changed" in out.stderr


def test_without_an_output_it_is_a_folder_below_runs(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    common = ["sweep", *training(Path()), "--max-steps", 1]
    first = dpo(*common, "--beta", "0.1")
    assert first["output"] == "runs/sweep" and (place / "runs/sweep/frontier.svg").is_file()
    assert dpo(*common, "--beta", "0.1", "--logging-steps", 2) == first
    out = invoke("sweep", *training(Path(), 1e-5), "--max-steps", 1, "--beta", "0.1")
    assert out.exit_code == 2 and "choose another folder" in out.stderr


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--beta", "0.1,x"], "--beta 0.1,x: must be different numbers greater than 0, separated by commas"),
        (["--beta", "0.1,0.10"], "--beta 0.1,0.10: must be different"),
        (["--beta", "0,1"], "--beta 0,1: must be"),
        (["--beta", "nan"], "--beta nan: must be"),
        (["--beta", ""], "--beta : must be"),
        (["--eval-fraction", "0.5"], "--eval-data and --eval-fraction: give one of them"),
    ],
)
def test_options_that_are_refused(start: Path, more: list[str], told: str) -> None:
    out = invoke("sweep", *training(start), "--output", start / "sweep", *more)
    assert out.exit_code == 2 and told in out.stderr and out.stdout == ""


def test_held_out_rows_are_needed(start: Path) -> None:
    out = invoke("sweep", "--data", start / "train.jsonl")
    assert out.exit_code == 2 and "--eval-data is missing" in out.stderr


@pytest.mark.pictures
def test_a_fraction_of_the_data_is_held_out(start: Path, tmp_path: Path) -> None:
    """The same pairs of every run, none of which is trained on; what is the same is reported once."""
    trained = ("--model", start / "start", "--data", start / "train.jsonl", "--cache-dir", tmp_path / "cache")
    rates = ("--eval-fraction", "0.5", "--lr", "1e-3", "--lr", "1e-2", "--batch-size", 4, "--max-steps", 2)
    out = invoke("sweep", *trained, *rates, "--output", tmp_path / "swept", "--json")
    assert out.exit_code == 0, out.stderr
    result = json.loads(out.stdout)
    manifests = [read_manifest(Path(point["run"])) for point in result["points"]]
    assert len({manifest["held_out"]["sha256"] for manifest in manifests}) == 1 < len(manifests)
    assert result["pairs"] == manifests[0]["held_out"]["pairs"] > 0 == result["trained_on"]["pairs"]
    lines = [line for line in out.stderr.splitlines() if re.match("model|data|layout|plan", line)]
    assert len({*lines}) == len(lines) and sum(line.startswith("plan") for line in lines) == 1


@pytest.mark.parametrize("given", ["[0.1, 1, 1e-2]", "0.1,1,0.01", "'1, 0.1, 0.01'", "[0.1, '1', 0.01]"])
def test_betas_of_a_yaml_file(tmp_path: Path, given: str) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(f"beta: {given}\ndata: a.jsonl\neval_data: b.jsonl\nlr: 1e-5\n")
    options = resolve(SweepOptions, {}, file)
    assert [run.beta for run in options.runs()] == [0.01, 0.1, 1]
    assert all(type(run) is TrainOptions and run.lr == 1e-5 for run in options.runs())


@pytest.mark.parametrize("given", ["[a]", "[]", "[true]", "[[1]]", "{a: 1}", "[.nan]"])
def test_betas_that_are_none(tmp_path: Path, given: str) -> None:
    (tmp_path / "sweep.yaml").write_text(f"beta: {given}\ndata: a.jsonl\neval_data: b.jsonl\n")
    with pytest.raises(UsageError, match="beta"):
        resolve(SweepOptions, {}, tmp_path / "sweep.yaml")


@pytest.mark.pictures
def test_kl_by_sampling(swept: tuple[Path, Any, Any], tmp_path: Path, seen: Seen) -> None:
    folder, copy = swept[0], Path(shutil.copytree(swept[0] / "sweep", tmp_path / "sweep"))
    result = dpo(*command(folder, *SAMPLES, "--output", copy, beta="0.03,1"))
    assert seen.models == []  # what is measured may differ, what was trained stays
    assert result["kl"]["unit"] == "nats per response"
    assert (result["kl"]["prompts"], result["kl"]["samples"]) == (4, 3)
    data = ("--data", folder / "held-out.jsonl", "--cache-dir", folder / "cache")
    for point in result["points"]:
        found = dpo("eval", "--model", point["run"], *data, *SAMPLES)
        assert point["kl"] == found["sequence_kl"]["token_kl"]
        assert point["intervals"]["kl"] == found["sequence_kl"]["token_kl_interval"]
    assert result["points"][0]["kl"] > 3 * result["points"][1]["kl"]
    texts = svg_texts(copy / "frontier.svg")
    assert texts.count("β 0.03") == 2 and "KL from the reference, nats per response" in texts


# ---- what is shown ----------------------------------------------------------------------------------------------


def svg_texts(file: Path) -> list[str]:
    root = ElementTree.fromstring(file.read_text(encoding="utf-8"))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    return ["".join(each.itertext()) for each in root.iter("{http://www.w3.org/2000/svg}text")]


def test_the_table_says_what_the_json_says(swept: tuple[Path, Any, Any], seen: Seen) -> None:
    """Also where options differ that change no training."""
    folder, result, _ = swept
    out = invoke(*command(folder, "--save-steps", 7, "--logging-steps", 3))
    assert out.exit_code == 0 and seen.models == []
    head, *lines = out.stdout.splitlines()
    assert head.split() == ["beta", "lr", "KL", "95%", "interval", "accuracy", "margin,", "nats", "run"]
    for line, point in zip(lines, result["points"], strict=False):
        beta, lr, kl, low, to, high, accuracy, nats, run = line.split()
        assert (float(beta), float(lr), to, run) == (point["beta"], point["lr"], "to", point["run"])
        found = [float(text) for text in (kl, low, high, nats)]
        wanted = [point["kl"], *point["intervals"]["kl"], point["rewards/margins"] / point["beta"]]
        assert found == pytest.approx(wanted, rel=5e-3)
        assert accuracy == f"{point['rewards/accuracies']:.1%}"
    assert "nats per token" in out.stdout and str(folder / "sweep" / "frontier.svg") in out.stdout


def point(beta: float, kl: float, value: float, spread: float | None = 0.1) -> dict[str, Any]:
    found = {"kl": kl, "rewards/margins": value, "rewards/accuracies": value}
    ends = {name: None if spread is None else [each - spread, each + spread] for name, each in found.items()}
    return found | {"beta": beta, "lr": 1e-6, "intervals": ends}


@pytest.mark.parametrize(
    "points",
    [
        [point(0.1, 0.5, 0.7)],
        [point(0.1, 0.0, 0.5, None)],
        [point(0.03, 30.0, 0.9), point(1, 0.05, 0.6), point(0.1, 2.0, 0.8)],  # far apart, an interval reaching 0
        [point(0.03, 0.2, 0.9), point(1, 0.2, 0.9)],  # one upon the other
        [point(0.03, float("nan"), 0.9), point(1, 0.2, float("nan"))],
    ],
)
@pytest.mark.pictures
def test_odd_frontiers_are_drawn(points: list[dict[str, Any]], tmp_path: Path) -> None:
    plots = frontier(points, "nats per token")
    assert [plot.title for plot in plots] == ["Margin and KL", "Accuracy and KL"]
    write_plots(tmp_path / "a.svg", plots)
    write_plots(tmp_path / "b.svg", plots)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()
    drawn = [each for each in points if np.isfinite([each["kl"], each["rewards/margins"]]).all()]
    assert all(svg_texts(tmp_path / "a.svg").count(f"β {each['beta']:g}") == 2 for each in drawn)
    assert all(png(plot).startswith(b"\x89PNG") for plot in plots)


# ---- learning rates ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "runs"),
    [
        ({"lr": "1e-5,1e-6"}, [(0.1, 1e-6), (0.1, 1e-5)]),
        ({"lr": [1e-5, 1e-6], "beta": "0.3,0.1"}, [(0.1, 1e-6), (0.1, 1e-5), (0.3, 1e-6), (0.3, 1e-5)]),
        ({"lr": 2e-5}, [(beta, 2e-5) for beta in BETAS]),
        ({}, [(beta, 1e-6) for beta in BETAS]),
        ({"lora_rank": 4, "beta": 1}, [(1.0, 1e-5)]),
        ({"lr": "1e-5,1e-6", "loss": "orpo", "beta": None}, None),
    ],
)
def test_a_grid_of_betas_and_learning_rates(given: dict[str, Any], runs: list[tuple[float, float]] | None) -> None:
    options = resolve(SweepOptions, {"data": ["rows.jsonl"], "eval_data": ["new.jsonl"]} | given)
    assert runs is None or [(run.beta, run.lr) for run in options.runs()] == runs


@pytest.mark.parametrize("given", ["0", "1e-5,1e-5", "fast", "1e-5,"])
def test_learning_rates_that_are_none(given: str) -> None:
    with pytest.raises(UsageError, match=r"^--lr .*: must be different numbers greater than 0"):
        resolve(SweepOptions, {"data": ["rows.jsonl"], "eval_data": ["new.jsonl"], "lr": given})


def test_the_best_is_of_least_kl_among_those_not_certainly_worse() -> None:
    """20, 19 and 6 of 24 pairs are ranked right; the second has the least KL of those that cannot be told apart."""
    right = {"a": 20, "b": 19, "c": 6}
    logratios = {run: np.array([[1.0, 0.0]] * n + [[0.0, 1.0]] * (24 - n)) for run, n in right.items()}
    points = [
        {"run": run, "rewards/accuracies": n / 24, "kl": kl}
        for (run, n), kl in zip(right.items(), (0.2, 0.1, 0.01), strict=True)
    ]
    best = _best(points, [scores_of(each) for each in logratios.values()])
    assert (best["run"], best["highest"], best["not_worse"]) == ("b", "a", ["a", "b"])
    assert best["differences"]["c"]["difference"] == pytest.approx(-14 / 24)


def test_a_sweep_of_learning_rates_names_the_best(place: Path) -> None:
    rows = [json.loads(line) for line in (SAMPLE / "heldout-strings.jsonl").read_text().splitlines()[:24]]
    write_rows(place / "held-out.jsonl", rows)
    out = invoke(*command(place, "--max-steps", 4, beta="0.1", lr="1e-6,3e-3"))
    assert out.exit_code == 0, out.output
    found = json.loads((place / "sweep" / "sweep.json").read_text())
    slow, fast = found["points"]
    assert [Path(point["run"]).name for point in found["points"]] == ["beta-0.1-lr-1e-06", "beta-0.1-lr-0.003"]
    assert "nothing_learned" in {each["kind"] for each in slow["findings"]}, "else it would be the one of least KL"
    if {each["kind"] for each in fast["findings"]} & NOT_LEARNED:
        assert "best" not in found and "Best:" not in out.stdout
    else:
        assert found["best"]["run"] == fast["run"] and out.stdout.endswith(f"Next: dpo chat {fast['run']}\n")
    assert "compare  " not in out.stdout
    texts = svg_texts(place / "sweep" / "frontier.svg") if (place / "sweep" / "frontier.svg").stat().st_size else []
    assert not texts or "β 0.1, lr 0.003" in texts
