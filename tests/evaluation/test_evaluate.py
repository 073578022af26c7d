"""One evaluation in training and in `dpo eval`: equal numbers, the best model, the report, comparisons, failures."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

import dpo_cli.evaluation.evaluate
import dpo_cli.training.loop
import dpo_cli.training.results
import dpo_cli.training.trackers
from dpo_cli.cli.app import app
from dpo_cli.evaluation import kl as divergence
from dpo_cli.evaluation.diagnostics import Evidence, count_new, judge
from dpo_cli.evaluation.generation import eos_ids
from dpo_cli.evaluation.metrics import best_step
from dpo_cli.models.logprobs import HiddenStates
from dpo_cli.utils.errors import NotWrittenError
from tests.helpers import SAMPLE, make_model, write_rows
from tests.helpers.pictures import pictures

STEPS = 6
BEST = {"loss": -1, "rewards/margins": 1, "rewards/accuracies": 1}
Dpo = Callable[..., Any]


class Place:
    """A folder with a model, rows and a cache; commands run in this process."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.cache = folder, folder / "cache"
        self.model, self.rows, self.held_out = folder / "start", folder / "rows.jsonl", folder / "held-out.jsonl"

    def __call__(self, command: str, *arguments: Any) -> Any:
        return CliRunner().invoke(app, [command, *map(str, arguments)])

    def train(self, run: Path, *more: Any) -> Any:
        """Six steps, each evaluated and kept; the held-out loss is lowest long before the last one."""
        return self(
            "train", "--model", self.model, "--data", self.rows, "--eval-data", self.held_out, "--cache-dir",
            self.cache, "--batch-size", 4, "--epochs", 2, "--eval-steps", 1, "--save-steps", 1, "--save-total-limit", 9,
            "--lr", 1e-2, "--output", run, *more,
        )  # fmt: skip

    def eval(self, model: Path, *more: Any) -> dict[str, Any]:
        result = self.told(model, *more)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)  # type: ignore[no-any-return]

    def told(self, model: Path, *more: Any) -> Any:
        return self("eval", "--model", model, "--data", self.held_out, "--cache-dir", self.cache, "--json", *more)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Place:
    place = Place(tmp_path_factory.mktemp("place"))
    place.cache.mkdir()  # whichever test comes first
    make_model().save_pretrained(place.model)
    tokenizer.save_pretrained(place.model)
    rows = [json.loads(line) for line in (SAMPLE / "train-strings.jsonl").read_text().splitlines()]
    write_rows(place.rows, rows[:12])
    write_rows(place.held_out, rows[-5:])
    return place


@pytest.fixture(scope="module")
def runs(place: Place) -> dict[str, Path]:
    """A run for each metric that a best model can be kept by; that of the loss has its pictures."""
    found = {}
    for metric in BEST:
        found[metric] = place.folder / metric.replace("/", "-")
        with pictures(drawn=metric == "loss"):
            result = place.train(found[metric], "--save-best", metric)
        assert result.exit_code == 0 and "warning" not in result.stderr, result.output
    return found


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def evaluated(run: Path) -> dict[int, dict[str, float]]:
    """The evaluations by step, as the file has them."""
    return {
        line["step"]: {name.removeprefix("eval_"): value for name, value in line.items() if name != "step"}
        for line in lines(run)
        if "eval_loss" in line
    }


def checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:06d}"


def best_of(run: Path, metric: str) -> int:
    """The first of the steps with the best number."""
    found = evaluated(run)
    goodness = {step: BEST[metric] * found[step][metric] for step in sorted(found)}
    return next(step for step, value in goodness.items() if value == max(goodness.values()))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(
        next(folder.glob("*.safetensors")) if folder.parent.name != "checkpoints" else folder / "weights.safetensors"
    )


def same(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# ---- the numbers of the run -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kl", ["exact", "none"])
def test_an_evaluation_in_training_is_that_of_its_checkpoint(place: Place, runs: dict[str, Path], kl: str) -> None:
    """Of the run, of its best model, and of checkpoints on the way: every name that the run's line has."""
    run = runs["loss"]
    best = best_of(run, "loss")
    assert 0 < best < STEPS
    models = {run: STEPS, run / "model": STEPS, run / "best": best, checkpoint(run, 1): 1, checkpoint(run, 4): 4}
    for model, step in models.items():
        line, result = evaluated(run)[step], place.eval(model, "--kl", kl)
        assert kl == "none" or line.keys() <= result.keys()
        names = line.keys() & result.keys()
        assert len(names) == (32 if kl == "exact" else 22)
        assert {name: result[name] for name in names} == pytest.approx({name: line[name] for name in names}, abs=1e-6)
    assert abs(evaluated(run)[1]["rewards/margins"] - evaluated(run)[4]["rewards/margins"]) > 0.1


def test_findings_of_a_checkpoint_know_nothing_of_later_steps(
    place: Place, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known: list[list[int]] = []
    own: list[bool] = []

    def diagnose(about: Evidence) -> tuple[list[Any], dict[str, Any]]:
        known.append([line["step"] for line in about.history])
        own.append(about.held_out)
        return [], judge(0)

    monkeypatch.setattr("dpo_cli.evaluation.evaluator.diagnose", diagnose)
    run = runs["loss"]
    for model in (checkpoint(run, 4), run / "best", run):
        place.eval(model, "--kl", "none")
    assert [max(steps) for steps in known] == [4, best_of(run, "loss"), STEPS] and own == [True] * 3
    place.eval(run, "--kl", "none", "--beta", 0.7)  # its losses are of another beta than the history's
    assert own[3:] == [False]


def test_training_without_the_whole_distributions(place: Place, runs: dict[str, Path], tmp_path: Path) -> None:
    """The same training and evaluations; what needs both models' distributions is absent."""
    result = place.train(tmp_path / "run", "--kl", "none")
    assert result.exit_code == 0 and "one pass over" not in result.stderr, result.output
    got, whole = evaluated(tmp_path / "run"), evaluated(runs["loss"])
    for step, line in got.items():
        assert not {"kl/chosen", "reverse_kl/chosen", "shifted_tokens/chosen", "entropy/chosen"} & line.keys()
        assert line == pytest.approx({name: whole[step][name] for name in line}, abs=1e-6)
    assert same(tmp_path / "run" / "model", runs["loss"] / "model")
    assert (tmp_path / "run" / "report.html").is_file()


# ---- a model that is its own reference --------------------------------------------------------------------------


@pytest.mark.parametrize("samples", [0, 3])
def test_a_model_that_is_its_own_reference(place: Place, samples: int) -> None:
    sampled = ("--samples", samples, "--sample-prompts", 2, "--sample-tokens", 12) if samples else ()
    result = place.eval(place.model, *sampled)
    assert result["reference"] == "the model itself"
    assert result["loss"] == pytest.approx(math.log(2), abs=1e-9)
    zero = ("rewards", "delta_kl_data", "kl", "reverse_kl", "shifted_tokens")
    assert {result[f"{name}/{side}"] for name in zero for side in ("chosen", "rejected")} == {0}
    assert result["rewards/margins"] == 0 and result["rewards/ties"] == 1 and result["rewards/accuracies"] == 0.5
    assert result["intervals"]["rewards/margins"] == result["intervals"]["kl/chosen"] == [0, 0]
    assert result["entropy/chosen"] == result["ref_entropy/chosen"] > 0
    assert result["findings"] == [] and result["drift"]["top"] == []
    assert ("sequence_kl" in result) == ("samples" in result) == bool(samples)
    if samples:
        found = result["sequence_kl"]
        assert found["token_kl"] == 0
        assert (found["prompts"], found["samples"], found["max_new_tokens"]) == (2, 3, 12)
        assert [len(each["policy_sampled"]) for each in result["samples"]] == [3, 3]
        assert all(each["policy"] == each["reference"] for each in result["samples"])
        assert all(each["policy_sampled"] == each["reference_sampled"] for each in result["samples"])


def test_samples_of_a_run_and_the_seed(place: Place, runs: dict[str, Path]) -> None:
    """The seed draws others; the same one gives the same."""
    sampled = ("--samples", 2, "--sample-prompts", 3, "--sample-tokens", 12)
    first, again, other = (place.eval(runs["loss"], *sampled, *more) for more in ((), (), ("--seed", 1)))
    assert first == again
    assert first["sequence_kl"] != other["sequence_kl"] and first["samples"] != other["samples"]
    assert first["loss"] == other["loss"]
    assert first["sequence_kl"]["token_kl"] > 0
    assert first["kl/chosen"] == pytest.approx(place.eval(runs["loss"])["kl/chosen"])


def test_responses_that_ended_are_those_with_eos(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit may cut behind an EOS, and the model's context before the limit."""

    def answers(
        runner: Any, tokenizer: Any, prompts: list[Any], attention: str, tokens: int, copies: int = 0, seed: int = 0
    ) -> list[list[Any]]:
        ids = [[5, 6], [5, 6, 7, eos_ids(runner.model, tokenizer)[0]], [5, 6, 7, 8]]
        return [[np.array(each, np.int32) for each in ids[: copies or 1]] for _ in prompts]

    monkeypatch.setattr(dpo_cli.evaluation.evaluate, "generate", answers)
    result = place.eval(place.model, "--samples", 3, "--sample-prompts", 2, "--sample-tokens", 4)
    assert result["sequence_kl"]["ended"] == pytest.approx(1 / 3)


# ---- two models -------------------------------------------------------------------------------------------------


def test_two_models_are_compared_on_the_same_pairs(place: Place, runs: dict[str, Path]) -> None:
    run = runs["loss"]
    models = [checkpoint(run, 1), run]
    one, other = (place.eval(model) for model in models)
    result = place.eval(models[0], "--model", models[1])
    assert (result["pairs"], result["same_tokens"]) == (5, True)
    for name, alone in (("a", one), ("b", other)):
        assert result[name] == {about: alone[about] for about in ("trained_on", "run", "model", "reference", "beta")}
    for each in (one, other):
        each["logratios/margins"] = each["rewards/margins"] / each["beta"]
    for name, found in result["differences"].items():
        assert found["a"] == pytest.approx(one[name], abs=1e-9) and found["b"] == pytest.approx(other[name], abs=1e-9)
        assert found["difference"] == pytest.approx(other[name] - one[name], abs=1e-9)
        low, high = found["interval"]
        assert low <= found["difference"] <= high
    assert {"loss", "rewards/margins", "kl/chosen", "cross_entropy/rejected"} <= result["differences"].keys()
    assert result["differences"]["rewards/margins"]["difference"] > 0.1
    trained_on = max(alone["trained_on"]["pairs"] for alone in (one, other))
    assert result["judged"] == count_new(5, trained_on) and not result["judged"]["enough"]
    itself = place.eval(run, "--model", run)
    assert {found["difference"] for found in itself["differences"].values()} == {0}
    assert itself["pairs_b_better"]["share"] == 0.5
    told = place.told(run, "--model", place.model, "--kl", "none")
    assert told.exit_code == 0 and "warning: the two models have different references" in told.stderr, told.output
    table = place(
        "eval", "--model", models[0], "--model", models[1], "--data", place.held_out, "--cache-dir", place.cache
    )
    assert table.exit_code == 0 and "paired difference" in table.stdout and str(run) in table.stdout


def test_comparisons_that_cannot_be_made(place: Place, runs: dict[str, Path], tmp_path: Path) -> None:
    run = runs["loss"]
    two = ("--model", run)
    for more, told in (
        ((*two, *two), "name one model to evaluate, or two to compare"),
        ((*two, "--per-pair", tmp_path / "pairs.jsonl"), "take one --model"),
        ((*two, "--report", tmp_path / "report.html"), "take one --model"),
        ((*two, "--samples", 2), "take one --model"),
    ):
        result = place.told(run, *more)
        assert result.exit_code == 2 and told in result.stderr and result.stdout == "", result.output
    assert not list(tmp_path.iterdir())


def test_models_that_read_other_rows_are_not_compared(place: Place, runs: dict[str, Path], tmp_path: Path) -> None:
    """A run that truncates drops the pair whose responses are alike up to there."""
    rows = [json.loads(line) for line in place.held_out.read_text().splitlines()]
    rows.append({"prompt": "Say", "chosen": " word" * 60 + " a", "rejected": " word" * 60 + " b"})
    data = write_rows(tmp_path / "rows.jsonl", rows)
    assert place.train(tmp_path / "run", "--max-length", 64, "--max-steps", 1, "--on-bad-row", "skip").exit_code == 0
    models = ("--model", runs["loss"], "--model", tmp_path / "run")
    common = ("eval", *models, "--data", data, "--cache-dir", place.cache, "--on-bad-row", "skip", "--kl", "none")
    refused = place(*common, "--json")
    assert refused.exit_code == 2 and "read different rows" in refused.stderr and "--max-length" in refused.stderr
    assert place(*common, "--max-length", 512, "--json").exit_code == 0


# ---- the best model ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", BEST)
def test_the_best_model_is_that_of_the_best_evaluation(runs: dict[str, Path], metric: str) -> None:
    run, step = runs[metric], best_of(runs[metric], metric)
    assert same(run / "best", checkpoint(run, step))
    assert [other for other in range(1, STEPS + 1) if same(run / "best", checkpoint(run, other))] == [step]
    assert (run / "best" / "config.json").is_file() and (run / "best" / "tokenizer.json").is_file()


def test_the_metrics_find_other_steps(runs: dict[str, Path]) -> None:
    """Else the tests above would not tell one from the last."""
    found = {metric: best_of(runs[metric], metric) for metric in BEST}
    assert found["loss"] < STEPS and found["rewards/margins"] == STEPS and found["rewards/accuracies"] < STEPS


def test_an_evaluation_that_is_not_finite_is_not_the_best() -> None:
    nan = math.nan
    found = {0: {"loss": nan}, 2: {"loss": 0.5}, 4: {"loss": nan}, 6: {"loss": 0.5}}
    assert best_step(found, "loss") == 2
    assert best_step({0: {"loss": nan}, 2: {"loss": nan}}, "loss") == 0
    assert best_step({0: {"rewards/margins": 0.0}, 2: {"rewards/margins": 1.0}}, "rewards/margins") == 2


def test_the_best_model_of_a_run_in_halves(place: Place, tmp_path: Path) -> None:
    """It is exported in float32, and computes as it did in training."""
    run = tmp_path / "run"
    result = place.train(run, "--memory", "split", "--save-best", "loss")
    assert result.exit_code == 0, result.output
    step = best_of(run, "loss")
    assert 0 < step < STEPS
    exported = weights(run / "best")
    off = {
        other: sum(float((exported[name] - tensor.float()).norm() ** 2) for name, tensor in found.items())
        for other in range(1, STEPS + 1)
        if (found := weights(checkpoint(run, other)))
    }
    assert min(off, key=lambda other: off[other]) == step and {t.dtype for t in exported.values()} == {torch.float32}
    for model in (run / "best", checkpoint(run, step)):
        got, line = place.eval(model), evaluated(run)[step]
        assert {name: got[name] for name in line} == pytest.approx(line, abs=1e-6)


@pytest.mark.parametrize("what", ["step", "line", "model"])
def test_a_resumed_run_has_the_same_best_model(
    place: Place, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """It ended in a step; or with its best model kept and no line of it; or in the middle of keeping it."""
    run, best = tmp_path / "run", best_of(runs["loss"], "loss")
    if what == "step":
        fail_at(monkeypatch, dpo_cli.training.loop.Trainer, "step", 4, KeyboardInterrupt())
    elif what == "line":
        fail_at(monkeypatch, dpo_cli.training.trackers, "append_metrics", 2 * best + 1, KeyboardInterrupt())
    else:
        error = NotWrittenError("best/ cannot be written: No space")
        fail_at(monkeypatch, dpo_cli.training.results, "export_model", 2, error)
    stopped = place.train(run, "--save-best", "loss")
    assert stopped.exit_code == (1 if what == "model" else 130), stopped.output
    if what == "model":
        assert "cannot be written" in stopped.stderr and "Continue with: dpo train --resume" in stopped.stderr
    monkeypatch.undo()
    result = place("train", "--resume", run)
    assert result.exit_code == 0, result.output
    assert "one pass over the held-out pairs for the exact KL" in result.stderr
    assert same(run / "best", runs["loss"] / "best") and same(run / "model", runs["loss"] / "model")
    assert lines(run) == lines(runs["loss"])


def fail_at(patch: pytest.MonkeyPatch, owner: Any, name: str, call: int, error: Any) -> None:
    """Raise an error when a function is called for the n-th time, or return it if it is none."""
    original, calls = getattr(owner, name), []

    def failing(*arguments: Any, **more: Any) -> Any:
        calls.append(name)
        if len(calls) == call:
            if not isinstance(error, BaseException):
                return error
            raise error
        return original(*arguments, **more)

    patch.setattr(owner, name, failing)


# ---- checkpoints as models --------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["bit", "cut", "manifest", "missing"])
def test_a_damaged_checkpoint_is_refused(place: Place, runs: dict[str, Path], tmp_path: Path, damage: str) -> None:
    run = shutil.copytree(runs["loss"], tmp_path / "run")
    folder = checkpoint(run, 4)
    file = folder / ("manifest.json" if damage == "manifest" else "weights.safetensors")
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content if damage != "cut" else content[:-64])
    if damage == "missing":
        file.unlink()
    result = place.told(folder)
    assert result.exit_code == 2 and result.stdout == ""
    assert f"--model {folder}: " in result.stderr and "checkpoint" in result.stderr
    assert place.eval(checkpoint(run, 3), "--kl", "none")["pairs"] == 5


def test_a_checkpoint_with_another_reference(place: Place, runs: dict[str, Path], tokenizer: Any) -> None:
    """It needs its run's start model for all but the weights, and any other as its reference."""
    other = place.folder / "other"
    make_model(seed=3).save_pretrained(other)
    tokenizer.save_pretrained(other)
    folder = checkpoint(runs["loss"], 2)
    own, against = place.eval(folder), place.eval(folder, "--ref-model", other)
    assert against["logps/chosen"] == own["logps/chosen"] and against["ref_logps/chosen"] != own["ref_logps/chosen"]
    assert against["kl/chosen"] > own["kl/chosen"]


# ---- options that make no sense ---------------------------------------------------------------------------------


def test_options_that_make_no_sense(place: Place, runs: dict[str, Path], tmp_path: Path) -> None:
    common = ("train", "--model", place.model, "--data", place.rows, "--cache-dir", place.cache)
    result = place(*common, "--save-best", "loss", "--output", tmp_path / "run")
    assert result.exit_code == 2 and "--save-best need held-out pairs" in result.stderr
    assert not (tmp_path / "run").exists()
    result = place.told(runs["loss"], "--samples", 2, "--kl", "none")
    assert result.exit_code == 2 and "--samples needs both models" in result.stderr
    result = place("train", "--resume", runs["loss"], "--save-best", "rewards/margins")
    assert result.exit_code == 2 and "cannot change --save-best rewards/margins" in result.stderr


# ---- reports ----------------------------------------------------------------------------------------------------


@pytest.mark.pictures
def test_a_run_has_its_report_at_each_evaluation_and_at_its_end(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[tuple[int, bool, bool]] = []
    original = dpo_cli.training.loop.write_report

    def seen(file: Path, about: Any) -> None:
        original(file, about)
        steps = max(line["step"] for line in about.history)
        found.append((steps, about.evaluation is not None, bool(about.evaluation.result.get("samples"))))

    monkeypatch.setattr(dpo_cli.training.loop, "write_report", seen)
    result = place.train(tmp_path / "run", "--max-steps", 2, "--show-answers", 1)
    assert result.exit_code == 0, result.output
    assert found == [(0, True, False), (1, True, False), (2, True, True)]
    text = (tmp_path / "run" / "report.html").read_text()
    assert "<script" not in text and "held-out" in text.lower()
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_without_held_out_pairs_has_its_curves(place: Place, tmp_path: Path) -> None:
    common = ("train", "--model", place.model, "--data", place.rows, "--cache-dir", place.cache, "--max-steps", 2)
    result = place(*common, "--output", tmp_path / "run")
    assert result.exit_code == 0 and "one pass over" not in result.stderr, result.output
    assert "data:image/png" in (tmp_path / "run" / "report.html").read_text()
    assert (tmp_path / "run" / "curves.png").is_file()


@pytest.mark.pictures
def test_a_resumed_run_refreshes_its_report(place: Place, runs: dict[str, Path], tmp_path: Path) -> None:
    """Also one that was complete: its last evaluation, which is in no memory now, stays in the report."""
    run = shutil.copytree(runs["loss"], tmp_path / "run")
    expected = (run / "report.html").read_text().replace(runs["loss"].name, "run")
    (run / "report.html").write_text("old")
    (run / "curves.png").unlink()
    before = (run / "metrics.jsonl").read_bytes()
    result = place("train", "--resume", run)
    assert result.exit_code == 0, result.output
    got = (run / "report.html").read_text()
    assert (run / "curves.png").read_bytes() == (runs["loss"] / "curves.png").read_bytes()
    assert (run / "metrics.jsonl").read_bytes() == before
    assert got.count("data:image/png") == expected.count("data:image/png") > 5
    assert abs(len(got) - len(expected)) < 200


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("write_report", NotWrittenError("report.html cannot be written: No space left on device")),
        ("write_report", ValueError("the template is broken")),
        ("write_plots", RuntimeError("no font")),
    ],
    ids=["full disk", "template", "curves"],
)
def test_a_report_that_cannot_be_drawn_ends_no_training(
    place: Place, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    name: str, error: Exception,
) -> None:  # fmt: skip
    def failing(*_: Any) -> None:
        raise error

    monkeypatch.setattr(dpo_cli.training.loop, name, failing)
    result = place.train(tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert result.stderr.count(f"warning: the report of {tmp_path / 'run'} is not up to date: {error}") == STEPS + 1
    assert same(tmp_path / "run" / "model", runs["loss"] / "model")
    assert lines(tmp_path / "run") == lines(runs["loss"])


@pytest.mark.parametrize("option", ["--report", "--per-pair"])
@pytest.mark.parametrize("trouble", ["full", "a file is in the way"])
def test_a_file_that_cannot_be_written_costs_no_numbers(
    place: Place, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str, trouble: str
) -> None:
    """They are shown first; the error names the file, and nothing of it is left."""
    file = tmp_path / "sub" / "file"
    expected = place.eval(runs["loss"])
    if trouble == "full":
        original = Path.open

        def full(self: Path, mode: str = "r", *more: Any, **kwargs: Any) -> Any:
            if "w" in mode and tmp_path in self.parents:
                raise OSError(28, "No space left on device", str(self))
            return original(self, mode, *more, **kwargs)

        monkeypatch.setattr(Path, "open", full)
        told = f"{file} cannot be written: No space left on device"
    else:
        (tmp_path / "sub").write_text("")
        told = f"{file} cannot be written: "
    result = place.told(runs["loss"], option, file)
    assert result.exit_code == 1 and told in result.stderr, result.output
    assert json.loads(result.stdout) == expected
    assert [path.name for path in tmp_path.rglob("*")] == ["sub"]


def test_a_report_of_any_model(place: Place, runs: dict[str, Path], tmp_path: Path) -> None:
    for name, model in (("run", runs["loss"]), ("start", place.model)):
        result = place.told(model, "--report", tmp_path / f"{name}.html")
        assert result.exit_code == 0 and str(tmp_path / f"{name}.html") in result.stderr, result.output
        assert str(model) in (tmp_path / f"{name}.html").read_text()


# ---- temporary files --------------------------------------------------------------------------------------------


@pytest.fixture
def folders(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every folder that a file of hidden states was made in."""
    found: list[Path] = []
    original = tempfile.TemporaryFile
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **how: (found.append(how["dir"]), original(**how))[1])
    return found


@pytest.mark.parametrize("end", ["success", "error", "interrupt"])
@pytest.mark.parametrize("command", ["train", "eval"])
def test_no_temporary_file_is_left(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, end: str,
    folders: list[Path],
) -> None:  # fmt: skip
    """They have no name from the start, so that not even a kill leaves one."""
    cache = shutil.copytree(place.cache, tmp_path / "cache")
    before = {path for path in cache.rglob("*") if "reference" not in path.parts and "weights" not in path.parts}
    if end != "success":
        error = RuntimeError("broken") if end == "error" else KeyboardInterrupt()
        fail_at(monkeypatch, divergence, "divergences", 3, error)
    more = ("--eval-data", place.held_out, "--output", tmp_path / "run", "--max-steps", 1) if command == "train" else ()
    data = place.rows if command == "train" else place.held_out
    result = place(command, "--model", place.model, "--data", data, "--cache-dir", cache, "--max-tokens", 256, *more)
    assert (result.exit_code == 0) == (end == "success"), result.output
    assert folders and set(folders) == {cache}
    after = {path for path in cache.rglob("*") if "reference" not in path.parts and "weights" not in path.parts}
    assert {path for path in after - before if "tokenized" not in path.parts} == set()
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_cache_that_cannot_be_written_is_no_obstacle(
    place: Place,
    runs: dict[str, Path],
    tmp_path: Path,
    folders: list[Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The files are where the system's temporary ones are."""
    expected = place.eval(runs["loss"])
    (tmp_path / "cache").write_text("a file, so that no folder can be made")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folders.clear()
    common = ("eval", "--model", runs["loss"], "--data", place.held_out, "--json")
    result = place(*common, "--cache-dir", tmp_path / "cache")
    assert result.exit_code == 0, result.output
    assert set(folders) == {tmp_path}
    assert json.loads(result.stdout) == {
        name: pytest.approx(value) if isinstance(value, float) else value for name, value in expected.items()
    }


@pytest.mark.parametrize("command", ["train", "eval"])
def test_a_disk_without_room_is_told_before_the_work(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    forwards: list[int] = []
    original = HiddenStates.head_inputs
    monkeypatch.setattr(HiddenStates, "head_inputs", lambda *a: (forwards.append(1), original(*a))[1])
    usage = type("Usage", (), {"free": 1000})()
    monkeypatch.setattr("dpo_cli.evaluation.kl.shutil.disk_usage", lambda folder: usage)
    if command == "train":
        result = place.train(tmp_path / "run", "--max-tokens", 512)
    else:
        result = place.told(place.model, "--max-tokens", 512)
    assert result.exit_code == 1 and result.stdout == ""
    assert "--cache-dir" in result.stderr and "--kl none" in result.stderr and str(place.cache) in result.stderr
    assert len(forwards) == 1 and not (tmp_path / "run").exists()
