"""Every loss from the command line: trained, evaluated, resumed; and what a step's gradient is, however it is cut."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import load_file
from transformers import PreTrainedModel
from typer.testing import CliRunner

from dpo_cli.cli.app import app
from dpo_cli.config.options import TrainOptions
from dpo_cli.config.resolve import resolve
from dpo_cli.data.schedule import build_schedule
from dpo_cli.losses.preference import LOSSES, Preferences
from dpo_cli.models.logprobs import ModelRunner, likelihoods, response_logps, target_logps
from tests.helpers import SAMPLE, make_model, random_pairs, stand_in, write_rows
from tests.helpers.layouts import CPU
from tests.helpers.steps import make_trainer, relative, take_step

# What a loss is at equal log-probs at beta 0.1, where the pairs do not decide it.
STEP_0 = {
    **dict.fromkeys(("sigmoid", "robust", "sigmoid_norm", "dpop", "plackett_luce"), 0.693147),
    **dict.fromkeys(("hinge", "apo_zero", "apo_down"), 1.0),
    **dict.fromkeys(("nca_pair", "bco_pair", "bco"), 1.386294),
    "ipo": 25.0,
    "sppo_hard": 50.0,
    "exo_pair": 1.614463,
    "discopop": 0.846574,
}
MORE = (  # beside each loss on its own
    ("sigmoid=1,sft=0.2",),
    ("bco=1,sft=0.3",),
    ("sigmoid", "--ld-alpha", "0.3"),
    ("sigmoid", "--wpo"),
    ("hinge", "--f-divergence", "alpha_divergence=0.3"),
    ("simpo=1,sft=0.1", "--loss-options", "simpo_gamma=1", "--wpo"),
)


@pytest.fixture(scope="module")
def place(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with short rows: eight to train on, six held out."""
    folder = tmp_path_factory.mktemp("losses")
    rows = [json.loads(line) for line in (SAMPLE / "train-strings.jsonl").read_text().splitlines()[:14]]
    for number, row in enumerate(rows):
        row["chosen"], row["rejected"] = row["chosen"][: 10 + number], row["rejected"][: 40 - 2 * number]
    write_rows(folder / "rows.jsonl", rows[:8])
    write_rows(folder / "held-out.jsonl", rows[8:])
    return folder


def dpo(place: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> Result:
    monkeypatch.chdir(place)
    for drawn in ("write_report", "write_plots"):  # other tests look at these, and they take most of the time
        monkeypatch.setattr(f"dpo_cli.training.loop.{drawn}", lambda *_: None)
    words = [str(word) for word in arguments]
    if words[0] in ("train", "sweep") and "--resume" not in words:
        words += ["--model", str(tiny), "--data", "rows.jsonl", "--lr", "1e-3"]
        words += [] if "--batch-size" in words else ["--batch-size", "4"]
    return CliRunner().invoke(app, [*words, "--cache-dir", "cache", "--json"])


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("loss", [*((name,) for name in LOSSES), *MORE], ids=" ".join)
def test_a_run_with_every_loss(loss: tuple[str, ...], place: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step 0 is what it must be, and dpo eval gives the loss that training's own evaluation gave."""
    exact, free = loss in MORE, loss[0].partition("=")[0] in ("sft", "simpo", "orpo", "cpo")
    more = ["--label-smoothing", "0.01"] if loss == ("exo_pair",) else []
    kl = ["--kl", "exact" if exact else "none"]
    run = place / re.sub(r"\W+", "-", " ".join(loss))
    held_out = ("--eval-data", "held-out.jsonl")
    out = dpo(place, tiny, monkeypatch, "train", "--output", run, "--loss", *loss, *more, *kl, *held_out)
    assert out.exit_code == 0, out.output
    step_0 = float(re.search(r"step 0 +loss ([\d.]+)", out.stderr)[1])  # type: ignore[index]
    if not exact and loss[0] in STEP_0:
        assert step_0 == pytest.approx(STEP_0[loss[0]], abs=2e-6)
    assert ("reads no reference)" in out.stderr) == free
    assert ("are equal on its" in out.stderr) == (not free)
    history = lines(run)
    trained, evaluated = ([line for line in history if key in line] for key in ("loss", "eval_loss"))
    assert trained[0]["loss"] == pytest.approx(step_0, rel=1e-5)  # the first step is of the pairs that step 0 looks at
    assert [line["step"] for line in evaluated] == [0, 2]
    assert evaluated[0]["eval_loss"] != evaluated[1]["eval_loss"]
    out = dpo(place, tiny, monkeypatch, "eval", "--model", run, "--data", "held-out.jsonl", *kl)
    assert out.exit_code == 0, out.output
    found = json.loads(out.stdout)
    for name in ("loss", "rewards/margins", "rewards/chosen", "rewards/accuracies"):
        assert found[name] == pytest.approx(evaluated[-1][f"eval_{name}"], rel=1e-6, abs=1e-6), name
    if not exact:
        assert (found["ref_logps/chosen"] is None) == free


def test_a_run_without_reference_scores_none(place: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("train", "--loss", "simpo", "--beta", 2, "--output", "alone", "--cache-dir", "no-cache")
    monkeypatch.chdir(place)
    words = ["--model", tiny, "--data", "rows.jsonl", "--batch-size", 4, "--json"]
    out = CliRunner().invoke(app, [str(word) for word in (*arguments, *words)])
    assert out.exit_code == 0, out.output
    assert "reference   none: --loss simpo reads none, so nothing is scored or cached" in out.stderr
    assert not (place / "no-cache" / "reference").exists()
    first = lines(place / "alone")[0]
    assert first["rewards/chosen"] > first["logps/chosen"] / 4  # a token's, not a response's


def test_rewards_of_averaged_losses_are_a_tokens(place: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dpo(place, tiny, monkeypatch, "train", "--loss", "simpo", "--beta", 2, "--output", "a-token")
    arguments = ("--model", "a-token", "--data", "held-out.jsonl", "--per-pair", "pairs.jsonl")
    out = dpo(place, tiny, monkeypatch, "eval", *arguments)
    assert out.exit_code == 0, out.output
    for line in map(json.loads, (place / "pairs.jsonl").read_text().splitlines()):
        assert line["rewards/chosen"] == pytest.approx(2 * line["logps/chosen"] / line["tokens/chosen"])


@pytest.mark.parametrize(
    "options",
    [("--loss", "bco=1,sft=0.3"), ("--loss", "hinge=1,sft=0.2", "--ld-alpha", "0.5"), ("--loss", "cpo", "--wpo")],
    ids=" ".join,
)
def test_resumed_is_uninterrupted(
    options: tuple[str, ...], place: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = place / f"whole-{options[1]}", place / f"cut-{options[1]}"
    common = ("--epochs", 3, "--save-steps", 2, "--save-total-limit", 9, *options)
    out = dpo(place, tiny, monkeypatch, "train", "--output", whole, *common)
    assert out.exit_code == 0, out.output
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "model")
    for step in (4, 6):
        shutil.rmtree(cut / "checkpoints" / f"step-{step:06d}")
    out = dpo(place, tiny, monkeypatch, "train", "--resume", cut)
    assert out.exit_code == 0 and "after step 2 of 6" in out.stderr, out.output
    assert lines(cut) == lines(whole) and len(lines(whole)) == 6
    ours, theirs = (load_file(run / "model" / "model.safetensors") for run in (cut, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_baseline_is_the_mean_reward_of_earlier_steps(
    place: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one pair a step the loss follows from the step's rewards and those before it."""
    out = dpo(place, tiny, monkeypatch, "train", "--output", "bco-ones", "--loss", "bco", "--batch-size", 1)
    assert out.exit_code == 0, out.output
    before: list[float] = []
    for line in lines(place / "bco-ones"):
        chosen, rejected = line["rewards/chosen"], line["rewards/rejected"]
        shift = sum(before) / max(len(before), 1)
        p = Preferences(*(torch.tensor([chosen, rejected]) * 10, torch.zeros(2), torch.ones(2), torch.zeros(2)), 1.0)
        assert line["loss"] == pytest.approx(float(LOSSES["bco"].compute(p, 0.1, shift)), abs=1e-5)
        before.append((chosen + rejected) / 2)
    assert abs(shift) > 0.01


def test_at_another_beta_the_baseline_is_another(place: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the mean of rewards, which are as many times larger."""
    dpo(place, tiny, monkeypatch, "train", "--output", "bco-beta", "--loss", "bco", "--batch-size", 2, "--beta", 0.1)
    steps = [(line["rewards/chosen"] + line["rewards/rejected"]) / 2 for line in lines(place / "bco-beta")]
    shift = 0.5 / 0.1 * sum(steps) / len(steps)
    arguments = ("--model", "bco-beta", "--data", "held-out.jsonl", "--beta", 0.5, "--per-pair", "bco.jsonl")
    out = dpo(place, tiny, monkeypatch, "eval", *arguments)
    assert out.exit_code == 0, out.output
    pairs = [json.loads(line) for line in (place / "bco.jsonl").read_text().splitlines()]
    logits = [s * (p[f"rewards/{side}"] - shift) for p in pairs for s, side in ((1, "chosen"), (-1, "rejected"))]
    wanted = sum(math.log1p(math.exp(-each)) for each in logits) / len(pairs)
    assert json.loads(out.stdout)["loss"] == pytest.approx(wanted, rel=1e-6) and abs(shift) > 0.05


def test_a_sweep_is_over_the_beta_of_any_loss(place: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("sweep", "--eval-data", "held-out.jsonl", "--beta", "0.1,1", "--output", "swept", "--max-steps", 1)
    out = dpo(place, tiny, monkeypatch, *arguments, "--loss", "apo_zero=1,sft=0.1")
    assert out.exit_code == 0, out.output
    points = json.loads(out.stdout)["points"]
    assert [point["beta"] for point in points] == [0.1, 1.0]
    for point in points:
        last = [line for line in lines(place / point["run"]) if "eval_loss" in line][-1]
        assert point["loss"] == pytest.approx(last["eval_loss"], rel=1e-6)
    out = dpo(place, tiny, monkeypatch, *arguments, "--loss", "sft")
    assert out.exit_code == 2 and "reads no beta, so there is nothing to compare" in out.stderr


@pytest.mark.parametrize(
    ("loss", "column", "told"),
    [
        ("ipo", "margin", "--loss ipo has no place for the rows' margins; leave them out, or take sigmoid, robust"),
        ("sigmoid=1,ipo=1,sft=1", "margin", "--loss ipo has no place for the rows' margins"),
    ],
)
def test_terms_of_rows_that_a_loss_does_not_take_up_are_refused(
    loss: str, column: str, told: str, place: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [json.loads(line) for line in (place / "rows.jsonl").read_text().splitlines()]
    file = write_rows(place / f"{column}.jsonl", [row | {column: 2.0} for row in rows])
    arguments = ["train", "--model", str(tiny), "--data", str(file), "--cache-dir", "cache", "--output", "refused"]
    monkeypatch.chdir(place)
    out = CliRunner().invoke(app, [*arguments, "--loss", loss])
    assert out.exit_code == 2 and told in out.stderr, out.output
    assert not (place / "refused").exists()


def test_a_file_may_have_losses_by_name(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("data: rows.jsonl\nloss: {sigmoid: 1, sft: 0.2}\nloss_options:\n", encoding="utf-8")
    assert dict(resolve(TrainOptions, {}, file).objective.terms) == {"sigmoid": 1, "sft": 0.2}


# ---- a step -----------------------------------------------------------------------------------------------------

PAIRS = random_pairs(40, longest=30)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return make_model(scale=2.0)


Gradients = list[torch.Tensor]


def step(model: PreTrainedModel, max_tokens: int, apart: bool, **options: Any) -> tuple[Gradients, dict[str, float]]:
    """Gradients and metrics of one step over all pairs."""
    made = TrainOptions(data=["-"], max_grad_norm=0.0, max_tokens=max_tokens, **options)
    runner = ModelRunner(model, "packed", torch.float32, max_tokens, CPU, apart)
    (plan,) = build_schedule(
        PAIRS, "packed", batch_size=40, epochs=1, max_steps=1, max_tokens=max_tokens, world_size=1, seed=0
    )
    reference = torch.linspace(-90, -50, 80).view(-1, 2)
    trainer, optimizer = make_trainer(runner, PAIRS, made, reference, reference + 1)
    values = take_step(trainer, plan)
    assert (len(plan) == 1) == (max_tokens == 4096)
    return optimizer.gradients, values


@pytest.mark.parametrize(
    ("options", "apart"),
    [
        ({"loss": "sigmoid=1,sft=0.5", "ld_alpha": 0.4}, True),
        ({"loss": "sigmoid=1,sft=0.5", "ld_alpha": 0.4}, False),
        ({"loss": "hinge", "wpo": True}, True),
        ({"loss": "hinge", "wpo": True}, False),
        ({"loss": "orpo"}, True),
    ],
    ids=str,
)
def test_a_steps_gradient_is_that_of_the_whole_however_it_is_cut(
    model: PreTrainedModel, options: dict[str, Any], apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, logits_bytes=4 * 384 * 60)  # a few pairs at a time
    cut, cut_values = step(model, 200, apart, **options)
    whole, values = step(model, 4096, apart, **options)
    assert cut_values == pytest.approx(values, rel=1e-5)
    wanted, loss = by_formula(model, **options)
    assert values["loss"] == pytest.approx(loss, rel=1e-5)
    for found in (cut, whole):
        assert max(relative(found, wanted)) < 1e-4


def by_formula(model: PreTrainedModel, **options: Any) -> tuple[Gradients, float]:
    """The same by one graph through all pairs, of which nothing is cut."""
    made = TrainOptions(data=["-"], **options)
    runner = ModelRunner(model, "packed", torch.float32, 4096, CPU)
    batch = runner.batch(PAIRS, made.objective.ld_alpha)
    hidden = runner.body(batch)
    logits = hidden.head.logits(hidden.values)
    token_logps = target_logps(logits, batch.targets)
    lengths = batch.lengths.view(-1, 2).T.reshape(-1)
    pairs = Preferences(
        logps=response_logps(token_logps * batch.token_weights, batch.lengths),
        ref_logps=torch.linspace(-90, -50, 80).view(-1, 2).T.reshape(-1) + 1,
        lengths=lengths,
        full_logps=response_logps(token_logps, batch.lengths),
        mean_chosen_length=float(lengths[:40].double().mean()),
        weights=likelihoods(token_logps.detach(), logits.detach(), batch.edges, batch.lengths) if made.wpo else 1.0,
    )
    model.zero_grad()
    loss = made.objective(pairs).mean()
    loss.backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return gradients, float(loss.detach())
