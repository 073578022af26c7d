"""A number that is not finite, or a reference that does not fit, stops the run before it does harm."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

import dpo_cli.reference.store
from dpo_cli.cli.app import app
from dpo_cli.evaluation import kl
from dpo_cli.evaluation.metrics import append_metrics
from dpo_cli.losses.preference import Preferences
from dpo_cli.models.logprobs import HiddenStates
from dpo_cli.training.step import Trainer
from tests.helpers import SAMPLE, write_rows
from tests.helpers.caches import plant

ROWS = 12
BETA = 0.1


@pytest.fixture
def train(tmp_path: Path, tiny: Path) -> Callable[..., Any]:
    """``train(*more)``: three steps over twelve rows, in this process; a checkpoint after each."""
    rows = [json.loads(line) for line in (SAMPLE / "train-strings.jsonl").read_text().splitlines()[:ROWS]]
    write_rows(tmp_path / "rows.jsonl", rows)
    common = (
        "train", "--model", tiny, "--data", tmp_path / "rows.jsonl", "--cache-dir", tmp_path / "cache",
        "--output", tmp_path / "run", "--batch-size", 4, "--save-steps", 1, "--lr", 1e-3, "--beta", BETA,
    )  # fmt: skip
    return lambda *more: CliRunner().invoke(app, [*map(str, common), *map(str, more)])


def strict(line: str) -> dict[str, Any]:
    """A line of JSON, by the standard: no NaN, no Infinity."""

    def refuse(name: str) -> Any:
        raise AssertionError(f"{name} is no JSON")

    return json.loads(line, parse_constant=refuse)  # type: ignore[no-any-return]


def named(result: Any) -> set[str]:
    """The rows that an error names, as file:line."""
    message = result.stderr.partition("error: ")[2]
    return set(re.findall(r"[^\s,;:]+\.jsonl:\d+", message))


def assert_finite_on_disk(folder: Path) -> None:
    for file in folder.rglob("*.safetensors"):
        for name, tensor in load_file(file).items():
            assert tensor.isfinite().all(), f"{file.name}: {name}"


# ---- not finite -------------------------------------------------------------------------------------------------

# A fault is planted in a trainer before a step over these places of pairs; it returns the places that the error names.
Fault = Callable[[Trainer, list[int]], list[int]]


def parameter(value: float) -> Fault:
    def plant(trainer: Trainer, places: list[int]) -> list[int]:
        trainer.runner.model.lm_head.weight.data[5, 3] = value  # type: ignore[union-attr, operator, index]
        return places

    return plant


def reference(value: float) -> Fault:
    def plant(trainer: Trainer, places: list[int]) -> list[int]:
        trainer.ref_logps[places[1], 0] = trainer.weighted_ref_logps[places[1], 0] = value
        return [places[1]]

    return plant


def embedding(trainer: Trainer, places: list[int]) -> list[int]:
    """Of a token that one pair has and no other pair of the step."""
    ids = {place: {int(i) for i in (*trainer.pairs[place].chosen,)} for place in places}
    everything = {p: {int(i) for i in (*trainer.pairs[p].prompt, *trainer.pairs[p].rejected)} | ids[p] for p in places}
    for place in places:
        alone = ids[place] - set().union(*(everything[p] for p in places if p != place))
        if alone:
            trainer.runner.model.model.embed_tokens.weight.data[min(alone)] = math.nan  # type: ignore[union-attr, operator, index]
            return [place]
    raise AssertionError("no pair has a token of its own")


def gradient_of_one(trainer: Trainer, places: list[int]) -> list[int]:
    """The losses are finite; what one pair adds to the gradient is not."""
    culprit, head_pieces = places[1], HiddenStates.head_pieces

    def spoilt(hidden: HiddenStates, *rest: Any) -> Iterator[Preferences]:
        for piece, preferences in zip(hidden.batch.pieces, head_pieces(hidden, *rest), strict=True):
            guilty = torch.tensor([place == culprit for place in hidden.batch.places[piece.pairs]] * 2)
            if preferences.logps.requires_grad:
                preferences.logps.register_hook(lambda grad, guilty=guilty: torch.where(guilty, math.nan, grad))
            yield preferences

    patch = pytest.MonkeyPatch()
    patch.setattr(HiddenStates, "head_pieces", spoilt)
    PATCHES.append(patch)
    return [culprit]


PATCHES: list[pytest.MonkeyPatch] = []


def gradient(trainer: Trainer, places: list[int]) -> list[int]:
    """The losses are finite; no gradient is."""
    weight = trainer.runner.model.model.norm.weight  # type: ignore[union-attr]
    weight.register_hook(lambda grad: grad * math.inf)  # type: ignore[union-attr, operator]
    return places


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (parameter(math.nan), "the loss is not finite for"),
        (parameter(math.inf), "the loss is not finite for"),
        (embedding, "the loss is not finite for"),
        (reference(math.nan), "the loss is not finite for"),
        (reference(math.inf), "the loss is not finite for"),
        (gradient, "the gradient is not finite for"),
        (gradient_of_one, "the gradient is not finite for"),
    ],
    ids=[
        "parameter-nan",
        "parameter-inf",
        "embedding",
        "reference-nan",
        "reference-inf",
        "gradient",
        "gradient-of-one",
    ],
)
@pytest.mark.parametrize("max_tokens", [2048, 300], ids=["one-forward", "several"])
def test_stops_before_the_step_and_names_the_rows(
    train: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Fault, told: str, max_tokens: int
) -> None:
    original, steps, expected = Trainer.step, [], set()
    before: dict[str, Tensor] = {}
    trainers: list[Trainer] = []

    def step(self: Trainer, planned: Any, micro_batches: Any, *rest: Any) -> Any:
        places = [i for indices in planned for i in indices]
        steps.append(len(planned))
        if len(steps) == 3:
            expected.update(self.pairs[place].where for place in fault(self, places))
            before.update({name: p.detach().clone() for name, p in self.runner.model.named_parameters()})
            trainers.append(self)
            micro_batches = self.micro_batches(planned)  # of the reference that may be spoilt now
        return original(self, planned, micro_batches, *rest)

    monkeypatch.setattr(Trainer, "step", step)
    result = train("--max-tokens", max_tokens)
    while PATCHES:
        PATCHES.pop().undo()
    assert result.exit_code == 1
    assert f"error: step 3: {told}" in result.stderr and "Traceback" not in result.output
    assert named(result) == expected and 1 <= len(expected) <= 4
    assert (steps[2] > 1) == (max_tokens == 300)

    for name, p in trainers[0].runner.model.named_parameters():  # nothing was stepped
        torch.testing.assert_close(p.detach(), before[name], rtol=0, atol=0, equal_nan=True)
        assert p.grad is None or p.grad.isfinite().all()
    for moments in trainers[0].optimizer.state.values():
        assert all(moment.isfinite().all() for moment in moments.values())

    run = tmp_path / "run"
    assert not (run / "model").exists()
    assert list((run / "checkpoints").rglob("weights.safetensors"))
    assert_finite_on_disk(run)
    lines = [strict(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]


def test_goes_on_from_the_last_checkpoint_when_the_fault_is_gone(
    train: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train().exit_code == 0
    (tmp_path / "run").rename(tmp_path / "whole")
    original = Trainer.step

    def step(self: Trainer, planned: Any, micro_batches: Any, lr: float, stop: Any) -> Any:
        if lr < 5e-4:  # the last of three steps
            parameter(math.nan)(self, [])
        return original(self, planned, micro_batches, lr, stop)

    monkeypatch.setattr(Trainer, "step", step)
    assert train().exit_code == 1
    monkeypatch.setattr(Trainer, "step", original)
    result = CliRunner().invoke(app, ["train", "--resume", str(tmp_path / "run")])
    assert result.exit_code == 0, result.output
    got, expected = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("run", "whole"))
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("form", ["--json", "--debug"], ids=["json", "table"])
def test_held_out_numbers_that_are_not_finite_are_written_as_null(
    train: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """The training itself is sound, so it comes to its end."""
    original = kl.compare

    def spoilt(*arguments: Any, **more: Any) -> kl.TokenScores:
        found = original(*arguments, **more)
        rejected = slice(found.lengths[:3].sum() + found.lengths[3, 0], found.lengths[:4].sum())  # of the fourth pair
        found.tokens[rejected, 0], found.tokens[rejected, 4:] = math.nan, math.inf
        return found

    monkeypatch.setattr(kl, "compare", spoilt)
    held_out = tmp_path / "held-out.jsonl"
    held_out.write_text((tmp_path / "rows.jsonl").read_text().replace("Assistant:", "Assistant: Well,"))
    result = train("--eval-data", held_out, "--save-best", "loss", form)
    assert result.exit_code == 0 and "warning" not in result.stderr, result.output
    assert (tmp_path / "run" / "report.html").is_file() and (tmp_path / "run" / "curves.png").is_file()
    lines = [strict(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    evaluated = [line for line in lines if "eval_loss" in line]
    assert (
        [line["eval_loss"] for line in evaluated] == [line["eval_rewards/margins"] for line in evaluated] == [None] * 2
    )
    assert all(math.isfinite(line["eval_logps/chosen"]) for line in evaluated)
    assert [line["eval_kl/rejected"] for line in evaluated] == [None] * 2
    assert all(math.isfinite(line["eval_kl/chosen"]) for line in evaluated)
    if form == "--json":
        assert strict(result.stdout)["after"]["loss"] is None
    else:
        assert "held out, 12 pairs" in result.stdout


def test_a_line_of_metrics_is_json_whatever_the_values(tmp_path: Path) -> None:
    append_metrics(tmp_path / "metrics.jsonl", 7, {"loss": math.nan, "grad_norm": math.inf, "a": -math.inf, "b": 0.5})
    content = (tmp_path / "metrics.jsonl").read_text()
    assert strict(content) == {"step": 7, "loss": None, "grad_norm": None, "a": None, "b": 0.5}


def test_a_reference_that_is_not_finite_is_not_kept(
    train: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model cannot score one response: its row is named, and no number of it is served later."""
    original = dpo_cli.reference.store.response_logps

    def spoilt(token_logps: Tensor, lengths: Tensor) -> Tensor:
        logps = original(token_logps, lengths)
        return torch.where(torch.arange(len(logps)) == 0, math.nan, logps)  # the first response of each forward

    monkeypatch.setattr(dpo_cli.reference.store, "response_logps", spoilt)
    result = train("--batch-size", ROWS)
    assert result.exit_code == 1
    assert 1 <= len(named(result)) < ROWS
    assert not (tmp_path / "run").exists()
    assert_finite_on_disk(tmp_path / "cache")
    monkeypatch.setattr(dpo_cli.reference.store, "response_logps", original)
    assert train("--batch-size", ROWS).exit_code == 0


# ---- a reference that does not fit ------------------------------------------------------------------------------


def fill(train: Callable[..., Any], tmp_path: Path) -> None:
    """The cache, by a run whose folder is away again; all pairs are in one shard, chosen and rejected in turn."""
    assert train("--batch-size", ROWS).exit_code == 0
    shutil.rmtree(tmp_path / "run")


def shifted(shifts: dict[int, float]) -> Callable[[Tensor], Tensor]:
    def change(logps: Tensor) -> Tensor:
        for place, shift in shifts.items():
            logps[place] += shift
        return logps

    return change


@pytest.mark.parametrize(("place", "shift"), [(7, -5.0), (7, 5.0), (2, -0.3), (2, 0.3)])
def test_step_0_notices_one_wrong_number(train: Callable[..., Any], tmp_path: Path, place: int, shift: float) -> None:
    """Told: the loss there is, worked by hand, and by how much it is off; the remedy that it names helps."""
    fill(train, tmp_path)
    plant(tmp_path / "cache", shifted({place: shift}))
    result = train("--batch-size", ROWS)
    assert result.exit_code == 1
    margin = BETA * (shift if place % 2 else -shift)  # the reference's rejected response is at odd places
    loss = ((ROWS - 1) * math.log(2) + math.log1p(math.exp(-margin))) / ROWS
    found = re.search(r"error: step 0: loss (\S+)  margin (\S+),.*off by ([^\s,]+)", result.stderr)
    assert found, result.stderr
    assert float(found[1]) == pytest.approx(loss, abs=2e-6)
    assert float(found[2]) == pytest.approx(margin / ROWS, abs=2e-6)
    assert 0 < float(found[3]) < abs(shift)  # nats per root of the response's tokens
    assert not (tmp_path / "run").exists()
    folder = re.search(r"remove (.*)", result.stderr)
    assert folder and Path(folder[1]).is_relative_to(tmp_path / "cache")
    shutil.rmtree(folder[1])
    again = train("--batch-size", ROWS)
    assert again.exit_code == 0, again.output


@pytest.mark.parametrize(
    "shifts",
    [{4: 3.0, 5: 3.0}, {4: 0.5, 6: -0.5}],
    ids=["both of a pair", "two that cancel"],
)
def test_step_0_notices_what_the_mean_loss_hides(
    train: Callable[..., Any], tmp_path: Path, shifts: dict[int, float]
) -> None:
    fill(train, tmp_path)
    plant(tmp_path / "cache", shifted(shifts))
    result = train("--batch-size", ROWS)
    assert result.exit_code == 1, "trained against a wrong reference"
    assert "step 0" in result.stderr.partition("error: ")[2]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_shard_with_a_number_that_is_not_finite_is_not_believed(
    train: Callable[..., Any], tmp_path: Path, value: float
) -> None:
    fill(train, tmp_path)
    plant(tmp_path / "cache", shifted({4: value}))
    result = train("--batch-size", ROWS)
    assert result.exit_code == 0, result.output
    assert "is damaged" in result.stderr and f"0 of {ROWS} pairs cached" in result.stderr


def test_step_0_lets_noise_pass(train: Callable[..., Any], tmp_path: Path) -> None:
    fill(train, tmp_path)
    plant(tmp_path / "cache", shifted({7: 3e-4}))
    result = train("--batch-size", ROWS)
    assert result.exit_code == 0, result.output
    assert "step 0      loss 0.693" in result.stderr
