"""The Plackett-Luce loss of whole rankings: its formula, rankings that stay whole, and runs that train with it."""

from __future__ import annotations

import json
import math
import random
import shutil
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import Result
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel
from typer.testing import CliRunner

from dpo_cli.cli.app import app
from dpo_cli.config.options import TrainOptions
from dpo_cli.config.resolve import inherit_auto_options
from dpo_cli.data.batching import collate
from dpo_cli.data.pairs import Pair, Pairs, count_loss_tokens, rankings
from dpo_cli.data.schedule import Layout, build_schedule, pack, row_costs
from dpo_cli.losses.objective import parse_objective
from dpo_cli.losses.preference import Preferences
from dpo_cli.models.attention import attention
from dpo_cli.models.locate import find_model
from dpo_cli.models.logprobs import HiddenStates, ModelRunner
from dpo_cli.training import prepare
from dpo_cli.training.memory import count_head_tokens
from dpo_cli.training.run_dir import trained_with
from dpo_cli.utils.console import Reporter
from dpo_cli.utils.errors import DpoError, UsageError
from tests.helpers import make_model, stand_in, token_logps, write_rows
from tests.helpers.layouts import CPU, own
from tests.helpers.steps import make_trainer, relative, take_step

LAYOUTS: list[Layout] = ["shared", "packed", "padded", "alone"]


def of_rewards(rewards: list[list[float]], beta: float = 1.0) -> tuple[Preferences, Tensor]:
    """The adjacent pairs of rankings with these rewards, and the rewards of all answers as their leaf."""
    leaf = (torch.tensor([*chain(*rewards)], dtype=torch.float64) / beta).requires_grad_()
    starts = np.cumsum([0, *map(len, rewards)])
    chosen = [i for start, end in pairwise(starts) for i in range(start, end - 1)]
    logps = leaf[chosen + [i + 1 for i in chosen]]
    sizes = [len(each) - 1 for each in rewards]
    return Preferences(logps, 0 * logps, torch.ones(len(logps)), logps, 1.0, ranking_sizes=sizes), leaf


# ---- the formula ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [1.0, 0.1])
@pytest.mark.parametrize("answers", range(2, 7))
def test_values_and_gradients_of_rankings(answers: int, beta: float) -> None:
    """-log of the product of each answer's share among itself and those below it, and the derivative of that."""
    rng = random.Random(answers)
    rewards = [[rng.uniform(-3, 3) for _ in range(count)] for count in (answers, 2, answers)]
    p, leaf = of_rewards(rewards, beta)
    losses = parse_objective("plackett_luce", beta=beta)(p)
    losses.sum().backward()
    places = iter(range(len(losses)))
    wanted = []
    for r in rewards:
        shares = [math.exp(r[i]) / sum(map(math.exp, r[i:])) for i in range(len(r))]
        of_ranking = sum(float(losses[next(places)].detach()) for _ in r[1:])
        assert of_ranking == pytest.approx(-math.log(math.prod(shares)), rel=1e-12)
        chosen_from = [
            [math.exp(r[k]) / sum(map(math.exp, r[i:])) for i in range(min(k + 1, len(r) - 1))] for k in range(len(r))
        ]
        wanted += [beta * (sum(each) - (k < len(r) - 1)) for k, each in enumerate(chosen_from)]
    assert leaf.grad is not None and leaf.grad.tolist() == pytest.approx(wanted, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("f_divergence", ["reverse_kl", "js_divergence"])
def test_of_two_answers_it_is_sigmoid(f_divergence: str) -> None:
    logps = 20 * torch.randn(200, generator=torch.Generator().manual_seed(0))
    found = []
    for loss in ("plackett_luce", "sigmoid"):
        leaf = logps.clone().requires_grad_()
        p = Preferences(
            leaf, torch.zeros(200), torch.ones(200), leaf, 1.0, 0.0, torch.linspace(0, 2, 100), ranking_sizes=[1] * 100
        )
        losses = parse_objective(loss, f_divergence=f_divergence)(p)
        losses.sum().backward()
        assert leaf.grad is not None
        found.append(torch.cat([losses.detach(), leaf.grad]))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)


def test_rewards_far_apart_are_finite() -> None:
    p, leaf = of_rewards([[-2000.0, 3000.0, 0.0, 2000.0], [900.0, -900.0, -901.0]])
    losses = parse_objective("plackett_luce", beta=1.0)(p)
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([5000.0, 0.0, 2000.0, 0.0, math.log1p(math.exp(-1))])
    assert leaf.grad is not None and leaf.grad.isfinite().all()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"pairs": "adjacent"}, "--pairs adjacent: --loss plackett_luce reads whole rankings; leave it out"),
        ({"wpo": True}, "--wpo, --ld-alpha: weigh pairs, not rankings"),
        ({"ld_alpha": 0.5}, "--wpo, --ld-alpha: weigh pairs, not rankings"),
        ({"label_smoothing": 0.1}, "--label-smoothing 0.1: --loss plackett_luce does not read it"),
    ],
)
def test_what_is_of_pairs_is_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError) as caught:
        TrainOptions(data=["-"], loss="plackett_luce", **options)
    assert told in str(caught.value)
    TrainOptions(data=["-"], loss="plackett_luce", pairs="ranking", f_divergence="js_divergence")


# ---- rankings stay whole ----------------------------------------------------------------------------------------


def ranked(answers: list[int], seed: int = 0, longest: int = 20) -> list[Pair]:
    """Rankings of so many answers as pairs, each with a prompt and a weight of its own."""
    rng, pairs = np.random.default_rng(seed), list[Pair]()

    def ids() -> Any:
        return rng.integers(3, 384, rng.integers(1, longest + 1)).astype(np.int32)

    for number, count in enumerate(answers):
        prompt, responses, weight = ids(), [ids() for _ in range(count)], float(rng.uniform(0.5, 2))
        for n, (better, worse) in enumerate(pairwise(responses)):
            pairs.append(Pair(f"row {number} ({n})", prompt, better, worse, weight, ranking=number + 1))
    return pairs


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(2, 6), min_size=1, max_size=12),
    st.sampled_from(LAYOUTS),
    st.integers(1, 12),
    st.integers(16, 500),
    st.integers(1, 4),
)
def test_a_ranking_is_in_one_step_one_forward_and_one_piece(
    answers: list[int], layout: Layout, batch_size: int, max_tokens: int, world_size: int
) -> None:
    pairs = ranked(answers)
    whole = {tuple(each) for each in rankings(range(len(pairs)), pairs)}
    how: dict[str, Any] = {"batch_size": batch_size, "epochs": 2, "max_steps": None, "seed": 1}
    plan = build_schedule(pairs, layout, **how, max_tokens=max_tokens, world_size=world_size)
    seen, costs = list[tuple[int, ...]](), row_costs(pairs, layout)
    for step in plan:
        assert len(step) % world_size == 0
        count = sum(map(len, step))
        assert count <= batch_size or sum(len(rankings(places, pairs)) for places in step) == 1
        for places in filter(None, step):
            of_forward = [tuple(each) for each in rankings(places, pairs)]
            assert set(of_forward) <= whole
            seen += of_forward
            batch = collate([pairs[i] for i in places], layout, 1.0, 25)
            if len(of_forward) > 1:
                assert layout == "alone" or batch.input_ids.numel() <= max_tokens
            sizes = [len(each) for each in of_forward]
            assert [size for piece in batch.pieces for size in piece.ranking_sizes] == sizes
            assert all(sum(piece.ranking_sizes) == piece.pairs.stop - piece.pairs.start for piece in batch.pieces)
            assert all(p.distinct.stop - p.distinct.start <= 25 or len(p.ranking_sizes) == 1 for p in batch.pieces)
    assert sorted(seen) == sorted(2 * [*whole]) and len(costs) == len(pairs)


def test_padded_rows_are_as_long_as_the_longest_pair_of_their_rankings_by_hand() -> None:
    """A ranking of three pairs of 20 tokens each, and a longer pair alone."""
    found = [([0, 1, 2], 60), ([3], 50)]
    assert pack(found, "padded", 199) == [(0, 1, 2), (3,)] and pack(found, "padded", 200) == [(0, 1, 2, 3)]


def test_a_forward_has_the_prompt_and_each_answer_once() -> None:
    """So that a ranking of K answers costs no more than they."""
    pairs = ranked([5], longest=60)
    answers = [pairs[0].chosen, *(pair.rejected for pair in pairs)]
    batch = collate(pairs, "shared")
    assert batch.input_ids.numel() == len(pairs[0].prompt) + sum(map(len, answers))
    assert len(batch.targets) == sum(map(count_loss_tokens, answers))
    assert collate(pairs, "packed").input_ids.numel() > 1.5 * batch.input_ids.numel()


# ---- a step -----------------------------------------------------------------------------------------------------

PAIRS = ranked([4, 2, 3, 6, 2, 5], seed=3)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return make_model(scale=2.0)


@pytest.fixture(scope="module")
def exact(model: PreTrainedModel) -> tuple[list[Tensor], float, Tensor]:
    """Gradients and loss of a step by the formula on single sequences, and reference log-probs (P, 2)."""
    reference = torch.empty(len(PAIRS), 2)
    logps: dict[bytes, Tensor] = {}
    rng = random.Random(0)
    refs: dict[bytes, float] = {}
    for place, pair in enumerate(PAIRS):
        for side, response in enumerate((pair.chosen, pair.rejected)):
            name = pair.prompt.tobytes() + response.tobytes()
            if name not in logps:
                alone = Pair("", pair.prompt, response, response)
                batch = collate([alone], "padded")
                logps[name] = token_logps(model, batch)[: len(response)].double().sum()
                refs[name] = float(logps[name].detach()) + rng.uniform(-9, 9)
            reference[place, side] = refs[name]
    total = torch.tensor(0.0).double()
    for places in rankings(range(len(PAIRS)), PAIRS):
        first = PAIRS[places[0]]
        answers = [first.chosen, *(PAIRS[i].rejected for i in places)]
        names = [first.prompt.tobytes() + answer.tobytes() for answer in answers]
        rewards = torch.stack([0.3 * (logps[name] - refs[name]) for name in names])
        for i in range(len(rewards) - 1):
            total = total - first.weight * (rewards[i].exp() / rewards[i:].exp().sum()).log()
    model.zero_grad()
    (total / len(PAIRS)).backward()
    gradients = [p.grad.double() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return gradients, float(total.detach()) / len(PAIRS), reference


def step_of(
    model: PreTrainedModel, reference: Tensor, layout: Layout, max_tokens: int, world_size: int = 1
) -> tuple[list[Tensor], dict[str, float], ModelRunner]:
    runner = ModelRunner(model, layout, torch.float32, max_tokens, CPU)
    about = {"loss": "plackett_luce", "beta": 0.3, "max_grad_norm": 0.0, "max_tokens": max_tokens}
    trainer, optimizer = make_trainer(runner, PAIRS, TrainOptions(data=["-"], **about), reference)  # type: ignore[arg-type]
    how: dict[str, Any] = {"batch_size": len(PAIRS), "epochs": 1, "max_steps": 1, "seed": 0}
    (step,) = build_schedule(PAIRS, layout, **how, max_tokens=max_tokens, world_size=world_size)
    with attention(model, own(layout)):
        values = take_step(trainer, step)
    return [gradient.double() for gradient in optimizer.gradients], values, runner


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("max_tokens", [100, 4096])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gradient_is_the_formulas_however_a_step_is_cut(
    model: PreTrainedModel,
    exact: Any,
    layout: Layout,
    max_tokens: int,
    world_size: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Into forwards, over ranks, and into pieces of the head."""
    stand_in(monkeypatch, logits_bytes=4 * 384 * 40)
    gradients, loss, reference = exact
    found, values, _ = step_of(model, reference, layout, max_tokens, world_size)
    assert values["loss"] == pytest.approx(loss, rel=1e-5)
    assert max(relative(found, gradients)) < 1e-5


def test_where_memory_runs_out_rankings_stay_whole(
    model: PreTrainedModel, exact: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, largest = HiddenStates.backward, 3

    def backward(self: HiddenStates, *losses: Tensor) -> None:
        if len(self.batch.weights) > largest:
            raise torch.OutOfMemoryError("as if")
        real(self, *losses)

    monkeypatch.setattr(HiddenStates, "backward", backward)
    gradients, loss, reference = exact
    with pytest.raises(DpoError, match=r"this ranking alone \(\d+ tokens\) does not fit"):
        step_of(model, reference, "shared", 4096)
    largest = 5
    found, values, runner = step_of(model, reference, "shared", 4096)
    assert runner.max_tokens < 4096 and values["loss"] == pytest.approx(loss, rel=1e-5)
    assert max(relative(found, gradients)) < 1e-5


def test_the_head_has_room_for_a_whole_ranking(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, logits_bytes=4 * 384 * 40)
    runner, pairs = ModelRunner(model, "packed", torch.float32, 4096, CPU), ranked([6, 2], longest=30)
    largest = max(piece.tokens.stop - piece.tokens.start for piece in runner.batch(pairs).pieces)
    assert 40 < largest == count_head_tokens(runner, pairs)


# ---- runs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rankings of two to five answers, of which one has two equal scores, and pairs beside them."""
    folder, words = tmp_path_factory.mktemp("rankings"), ["one", "two", "three", "four", "five"]
    rng = random.Random(0)
    for name, rows in (("rows", 8), ("held-out", 5)):
        made: list[dict[str, Any]] = [{"prompt": f"{name}?", "chosen": "yes", "rejected": "no"}]
        for row in range(rows):
            answers = [" ".join(rng.choices(words, k=rng.randrange(2, 9))) + f" {n}" for n in range(2 + row % 4)]
            scores = [*map(float, rng.sample(range(9), len(answers)))]
            if row == 3:
                answers, scores = [*answers, "tied"], [*scores, scores[0]]
            made.append({"prompt": f"{name} {row}?", "responses": answers, "scores": scores, "weight": 1 + row % 2})
        write_rows(folder / f"{name}.jsonl", made)
    return folder


def dpo(place: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, command: str, *words: Any) -> Result:
    monkeypatch.chdir(place)
    for drawn in ("write_report", "write_plots"):
        monkeypatch.setattr(f"dpo_cli.training.loop.{drawn}", lambda *_: None)
    more = ["--model", tiny, "--data", "rows.jsonl", "--eval-data", "held-out.jsonl", "--lr", "1e-3", "--batch-size", 6]
    more += ["--kl", "none"]
    more = more if command in ("train", "sweep") and "--resume" not in words else []
    return CliRunner().invoke(app, [command, *map(str, [*words, *more]), "--cache-dir", "cache", "--json"])


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def same_weights(one: Path, other: Path, tolerance: float) -> bool:
    a, b = (load_file(run / "model" / "model.safetensors") for run in (one, other))
    return all(float((a[name] - b[name]).abs().max()) <= tolerance for name in b)


@pytest.fixture(scope="module")
def run(place: Path, tiny: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        common = ("--loss", "plackett_luce", "--epochs", 2, "--save-steps", 2, "--save-total-limit", 9)
        out = dpo(place, tiny, patch, "train", "--output", "run", *common)
    assert out.exit_code == 0, out.output
    # 1 + 2 (1 + 2 + 3 + 4) pairs of 9 rows; no pair of the answer whose score another has.
    assert "9 rows, 21 pairs, 0 refused" in out.stderr and "1 row with answers left out" in out.stderr
    return place / "run"


def test_step_0_is_that_of_equal_rewards(run: Path) -> None:
    """A choice among k answers costs ln k; the first evaluation is of the choices of all held-out rankings."""
    first = next(line for line in lines(run) if "eval_loss" in line)
    choices = [(1, [2])] + [(1 + row % 2, range(2, 3 + row % 4)) for row in range(5)]
    terms = [weight * math.log(k) for weight, among in choices for k in among]
    assert first["eval_loss"] == pytest.approx(sum(terms) / len(terms), abs=1e-6)


def test_dpo_eval_is_the_trainings_own_evaluation(
    run: Path, place: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated = [line for line in lines(run) if "eval_loss" in line][-1]
    words = (
        "--model",
        run,
        "--data",
        "held-out.jsonl",
        "--kl",
        "none",
        "--report",
        "report.html",
        "--per-pair",
        "pairs",
    )
    out = dpo(place, tiny, monkeypatch, "eval", *words)
    assert out.exit_code == 0, out.output
    found = json.loads(out.stdout)
    assert (found["rows"], found["pairs"]) == (6, len((place / "pairs").read_text().splitlines())) == (6, 12)
    for name in ("loss", "rewards/margins", "rewards/accuracies"):
        assert found[name] == pytest.approx(evaluated[f"eval_{name}"], rel=1e-6, abs=1e-6), name
    out = dpo(place, tiny, monkeypatch, "eval", *words, "--pairs", "all")
    assert out.exit_code == 2 and "--pairs all: the run's loss is of whole rankings" in out.stderr


def test_resumed_is_uninterrupted(run: Path, place: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut, steps = place / "cut", len([line for line in lines(run) if "loss" in line])
    assert steps > 4
    shutil.copytree(run, cut)
    shutil.rmtree(cut / "model")
    for checkpoint in cut.glob("checkpoints/step-*"):
        if checkpoint.name != "step-000002":
            shutil.rmtree(checkpoint)
    out = dpo(place, tiny, monkeypatch, "train", "--resume", cut)
    assert out.exit_code == 0 and "after step 2 of" in out.stderr, out.output
    assert lines(cut) == lines(run) and same_weights(cut, run, 0.0)


def test_the_trajectory_does_not_depend_on_max_tokens(
    run: Path, place: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = ("--loss", "plackett_luce", "--epochs", 2, "--output", "few", "--max-tokens", 40, "--pairs", "ranking")
    out = dpo(place, tiny, monkeypatch, "train", *few)
    assert out.exit_code == 0, out.output
    for one, other in zip(lines(place / "few"), lines(run), strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)
    assert same_weights(place / "few", run, 1e-4)


def test_what_a_run_chose_is_inherited(run: Path) -> None:
    """So that a sweep can be resumed."""
    began = trained_with(run)
    assert (began.pairs, began.margin_per_score) == ("ranking", 0.0)
    assert inherit_auto_options(replace(began, pairs=None, margin_per_score=None), began) == began


def test_a_sweep_counts_rankings(place: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("--loss", "plackett_luce", "--beta", "0.1,1", "--output", "swept", "--max-steps", 1)
    out = dpo(place, tiny, monkeypatch, "sweep", *words)
    assert out.exit_code == 0, out.output
    found = json.loads(out.stdout)
    assert found["pairs"] == 12 and [point["beta"] for point in found["points"]] == [0.1, 1.0]


@pytest.mark.parametrize("pairs", ["adjacent", "all", "ranking"])
def test_other_losses_train_on_the_pairs_of_rankings(
    pairs: str, place: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--pairs", pairs, "--max-steps", 1, "--output", f"sigmoid-{pairs}", "--margin-per-score", 0.1)
    scored = write_rows(place / "scored.jsonl", [])
    scored.write_text("".join((place / "rows.jsonl").read_text().splitlines(keepends=True)[1:]))
    out = dpo(place, tiny, monkeypatch, "train", *words, "--data", scored, "--on-bad-row", "skip")
    assert out.exit_code == 0, out.output
    assert "10 rows" not in out.stderr and "1 refused: --margin-per-score: the row has no scores" in out.stderr
    assert "margins from 0.1 to" in out.stderr


def test_margins_are_refused_by_a_loss_without_a_place_for_them(
    place: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for loss in ("plackett_luce", "ipo"):
        words = ("--loss", loss, "--margin-per-score", 0.5, "--on-bad-row", "skip", "--output", "refused")
        out = dpo(place, tiny, monkeypatch, "train", *words)
        assert out.exit_code == 2 and f"--loss {loss} has no place for the rows' margins" in out.stderr


def test_precompute_ref_scores_what_a_training_reads(place: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    words = ["--model", str(tiny), "--data", "rows.jsonl", "--cache-dir", "other", "--pairs", "ranking", "--json"]
    out = CliRunner().invoke(app, ["precompute-ref", *words])
    assert out.exit_code == 0 and json.loads(out.stdout)["rows"] == 9, out.output
    words = ["--model", str(tiny), "--data", "rows.jsonl", "--cache-dir", "other", "--loss", "plackett_luce", "--json"]
    out = CliRunner().invoke(app, ["train", "--dry-run", "--output", "dry", *words])
    assert out.exit_code == 0 and json.loads(out.stdout)["reference_misses"] == 0, out.output


def test_ranks_that_would_wait_for_each_other_are_refused(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model that runs one sequence per forward, rankings take different numbers of forwards."""
    alone = ModelRunner(make_model(), "alone", torch.float32, 99, CPU)
    monkeypatch.setattr(prepare, "choose_layout", lambda *_: (alone, "one sequence per forward"))
    monkeypatch.setattr(prepare, "shard", lambda *_: None)
    monkeypatch.setattr(prepare.distributed, "one_rank_at_a_time", lambda load: load())

    def load(pairs: list[Pair]) -> ModelRunner:
        about = TrainOptions(data=["-"], fsdp=True), "full", CPU, Reporter(quiet=True)
        return prepare.load_scored_model(find_model(str(tiny)), Pairs(pairs), *about).runner

    assert load([replace(pair, ranking=0) for pair in ranked([3, 2])]) is alone
    with pytest.raises(UsageError, match="--fsdp: ranks run equally many forwards"):
        load(ranked([3, 2]))
