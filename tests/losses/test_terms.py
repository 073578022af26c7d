"""Weights and margins of pairs, and response tokens without loss: in a step, a cache, an evaluation, a resumed run."""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel
from typer.testing import CliRunner

import dpo_cli.training.memory
from dpo_cli.cli.app import app
from dpo_cli.config.options import TrainOptions
from dpo_cli.data.batching import collate
from dpo_cli.data.pairs import Ids, Pair, Pairs, model_input_ids
from dpo_cli.data.schedule import Layout, build_schedule
from dpo_cli.data.tokenize import PairSet, tokenize_rows
from dpo_cli.evaluation.evaluator import Evaluator
from dpo_cli.evaluation.kl import COLUMNS, TokenScores
from dpo_cli.losses.objective import Objective
from dpo_cli.models.attention import attention
from dpo_cli.models.logprobs import ModelRunner
from dpo_cli.reference.precompute import verify
from dpo_cli.reference.store import pair_keys
from dpo_cli.training.memory import count_bytes, count_head_tokens
from dpo_cli.training.step import Trainer, compare_with_reference
from dpo_cli.utils.errors import DpoError
from tests.helpers import SAMPLE, make_model, random_pairs, stand_in, token_logps, write_rows
from tests.helpers.caches import dpo, fill, open_cache, plant, shards
from tests.helpers.layouts import LAYOUTS, own
from tests.helpers.steps import KeepGradients, make_trainer, relative, take_step

CPU = torch.device("cpu")
NOISE = 1e-3  # nats


def terms_of(count: int, seed: int = 0) -> npt.NDArray[np.float32]:
    """Weights and margins (P, 2) of so many pairs; nowhere do the weights add up to the number of pairs."""
    return np.random.default_rng(seed).uniform((0, -1), (3, 2), (count, 2)).astype(np.float32)


def with_terms(pairs: Iterable[Pair], seed: int = 0) -> list[Pair]:
    """The pairs with ``terms_of`` as many, a third of their response tokens without loss."""
    rng, pairs = np.random.default_rng(seed + 1), list(pairs)

    def hidden(ids: Ids) -> Ids:
        kept = rng.random(len(ids)) > 1 / 3
        kept[rng.integers(len(ids))] = True
        return np.where(kept, ids, ~ids).astype(np.int32)

    return [
        replace(pair, chosen=hidden(pair.chosen), rejected=hidden(pair.rejected), weight=weight, margin=margin)
        for pair, (weight, margin) in zip(pairs, terms_of(len(pairs), seed).tolist(), strict=True)
    ]


MIDDLE = Pair("middle", *(np.array(ids, np.int32) for ids in ([5, 6], [7, ~8, ~9, 10], [~11, 12, 13, ~14])), 0.5, 1.5)
PAIRS = [*with_terms(random_pairs(23)), MIDDLE]


def responses(pairs: Iterable[Pair]) -> Iterator[tuple[Ids, Ids]]:
    """Prompt and response: chosen, rejected, …"""
    return ((pair.prompt, response) for pair in pairs for response in (pair.chosen, pair.rejected))


def counted(pairs: Iterable[Pair]) -> list[int]:
    """Tokens with loss of each response."""
    return [sum(token >= 0 for token in response.tolist()) for _, response in responses(pairs)]


def plain(model: PreTrainedModel, prompt: Ids, response: Ids) -> Tensor:
    """Log-probs of a response's tokens that carry loss, from transformers' logits of the one sequence."""
    tokens = response.tolist()
    ids = torch.tensor([*prompt.tolist(), *(token if token >= 0 else -token - 1 for token in tokens)])
    log_probs: Tensor = model(ids[None]).logits[0].log_softmax(-1)  # (T, V)
    places = [len(prompt) + place for place, token in enumerate(tokens) if token >= 0]
    return torch.stack([log_probs[place - 1, ids[place]] for place in places])


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return make_model()


# ---- tokens without loss ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("apart", [True, False], ids=["apart", "whole"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_log_probs_of_tokens_with_loss_by_plain_forwards(model: PreTrainedModel, layout: Layout, apart: bool) -> None:
    """They see the tokens without loss before them, which are not scored."""
    with torch.no_grad():
        wanted = torch.cat([plain(model, *each) for each in responses(PAIRS)])
        with attention(model, own(layout)):
            got = token_logps(model, collate(PAIRS, layout), torch.float32, apart)
            unseen = [replace(p, chosen=p.chosen[p.chosen >= 0], rejected=p.rejected[p.rejected >= 0]) for p in PAIRS]
            others = token_logps(model, collate(unseen, layout), torch.float32, apart)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)
    assert got.std() > 0.1 and (got - others).abs().max() > 0.1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_meets_the_head_is_what_carries_loss(model: PreTrainedModel, layout: Layout) -> None:
    met = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, given: met.append(len(given[0])))  # type: ignore[union-attr]
    with attention(model, own(layout)), torch.no_grad():
        token_logps(model, collate(PAIRS, layout), torch.float32, chunked_lm_head=True)
    hook.remove()
    assert sum(met) == sum(counted(PAIRS)) < sum(len(response) for _, response in responses(PAIRS))
    assert count_head_tokens(ModelRunner(model, layout, torch.float32, 4096, CPU), PAIRS) == sum(counted(PAIRS))


def test_the_memory_count_needs_no_loss_in_a_beginning(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies behind the tokens that it is taken from may be all that carries loss."""
    monkeypatch.setattr(dpo_cli.training.memory, "PROBED", 3)
    hidden = Pair("late", *(np.array(ids, np.int32) for ids in ([5, 6], [~7, ~8, ~9, 10], [~7, ~8, ~9, 11])))
    whole = replace(hidden, chosen=model_input_ids(hidden.chosen), rejected=model_input_ids(hidden.rejected))
    scorer = ModelRunner(model, "packed", torch.float32, 4096, CPU, chunked_lm_head=False)
    assert count_bytes(scorer, [hidden, MIDDLE], 0) == count_bytes(scorer, [whole, MIDDLE], 0)


def test_cached_and_read_back(tmp_path: Path, model: PreTrainedModel) -> None:
    """The same tokens with loss elsewhere are another response."""
    scorer = ModelRunner(model, "packed", torch.float32, 120, CPU)
    whole = [
        replace(pair, chosen=model_input_ids(pair.chosen), rejected=model_input_ids(pair.rejected)) for pair in PAIRS
    ]
    filled = fill(open_cache(tmp_path), [*PAIRS, *whole], scorer)
    cache = open_cache(tmp_path)
    assert fill(cache, [*PAIRS, *whole], scorer).misses == 0
    with torch.no_grad():
        wanted = torch.stack([plain(model, *each).sum() for each in responses([*PAIRS, *whole])]).view(-1, 2)
    torch.testing.assert_close(filled.logps, wanted, rtol=0, atol=NOISE)
    assert torch.equal(cache.lookup([*PAIRS, *whole]), filled.logps)
    lengths = dict(zip((key for pair in PAIRS for key in pair_keys(pair)), counted(PAIRS), strict=True))
    for shard in shards(tmp_path):
        tensors = load_file(shard)
        parts = tensors["token_logps"].split(tensors["lengths"].tolist())
        torch.testing.assert_close(torch.stack([p.sum() for p in parts]), tensors["logps"], rtol=0, atol=NOISE)
        for key, part in zip(tensors["keys"], parts, strict=True):
            assert len(part) == lengths.pop(key.numpy().tobytes(), len(part))
    assert not lengths


def test_verify_allows_noise_by_tokens_with_loss(model: PreTrainedModel) -> None:
    """What is allowed of 100 tokens is too much where one of them carries loss."""
    ids = np.arange(3, 103, dtype=np.int32)
    whole = Pair("whole", ids[:5], ids, ids[::-1].copy())
    pairs = Pairs([whole, replace(whole, chosen=np.append(~ids[:-1], ids[-1]))])
    with torch.no_grad():
        logps = torch.stack([plain(model, *each).sum() for each in responses([*pairs])]).view(-1, 2)
    logps[:, 0] += 5 * NOISE
    runner = ModelRunner(model, "packed", torch.float32, 120, CPU)
    assert verify(logps[:1], pairs.select([0]), runner, "folder") == pytest.approx(5 * NOISE, rel=0.1)
    with pytest.raises(DpoError, match="1 of 2 cached pairs are off"):
        verify(logps, pairs, runner, "folder")


# ---- a step -----------------------------------------------------------------------------------------------------

BETA, SMOOTHING = 0.1, 0.05


def formula(logps: Tensor, ref_logps: Tensor, terms: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and reward margins (P,) of log-probs and terms (P, 2), as it is written down."""
    logratios = logps - ref_logps
    h, (weights, margins) = logratios[:, 0] - logratios[:, 1], terms.T
    right, flipped = (torch.log1p(torch.exp(sign * BETA * h + margins)) for sign in (-1, 1))
    return weights * ((1 - SMOOTHING) * right + SMOOTHING * flipped), BETA * h


class Exact:
    """The step's loss and gradient in float64, each response alone through transformers' own forward.

    The reference is apart from the policy, so that every pair has a pull of its own.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        exact = copy.deepcopy(model).double()
        logps = torch.stack([plain(exact, *each).sum() for each in responses(PAIRS)]).view(-1, 2)
        self.reference = (logps.detach() + torch.linspace(-20, 20, 2 * len(PAIRS)).view(-1, 2)).float()
        terms = torch.tensor([[pair.weight, pair.margin] for pair in PAIRS], dtype=torch.float64)
        losses, self.margins = formula(logps, self.reference.double(), terms)
        loss = losses.sum() / len(PAIRS)
        loss.backward()
        self.loss = loss.item()
        self.gradients = [p.grad for p in exact.parameters() if p.grad is not None]
        assert abs(terms[:, 0].mean() - 1) > 0.1  # to divide by the sum of weights would be far off


@pytest.fixture(scope="module")
def exact(model: PreTrainedModel) -> Exact:
    return Exact(model)


def trainer_of(runner: ModelRunner, reference: Tensor) -> tuple[Trainer, KeepGradients]:
    about = {"beta": BETA, "label_smoothing": SMOOTHING, "max_grad_norm": 0.0, "max_tokens": runner.max_tokens}
    return make_trainer(runner, PAIRS, TrainOptions(data=["-"], **about), reference)  # type: ignore[arg-type]


@pytest.mark.parametrize("apart", [True, False], ids=["apart", "whole"])
@pytest.mark.parametrize("max_tokens", [100, 4096])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gradient_is_the_formulas_however_a_step_is_cut(
    model: PreTrainedModel, exact: Exact, layout: Layout, max_tokens: int, apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, logits_bytes=4 * 384 * 40)  # a few pairs at a time
    scorer = ModelRunner(model, layout, torch.float32, max_tokens, CPU, apart)
    trainer, optimizer = trainer_of(scorer, exact.reference)
    cut: dict[str, Any] = {"batch_size": len(PAIRS), "epochs": 1, "max_steps": 1, "world_size": 1, "seed": 0}
    (step,) = build_schedule(PAIRS, layout, max_tokens=max_tokens, **cut)
    assert len(step) == 1 if max_tokens == 4096 and layout != "alone" else len(step) > 5
    with attention(model, own(layout)):
        values = take_step(trainer, step)
    assert max(relative([g.double() for g in optimizer.gradients], exact.gradients)) < 1e-5
    assert values["loss"] == pytest.approx(exact.loss, rel=1e-5)
    assert values["rewards/margins"] == pytest.approx(exact.margins.mean().item(), rel=1e-5)  # of all pairs alike
    assert values["rewards/accuracies"] == pytest.approx((exact.margins > 0).double().mean().item())


def test_the_comparison_of_step_0_is_by_tokens_with_loss(model: PreTrainedModel, exact: Exact) -> None:
    """One response that is off by a nat is off by that over the root of its tokens with loss."""
    scorer = ModelRunner(model, "packed", torch.float32, 120, CPU)
    trainer, _ = trainer_of(scorer, exact.reference)
    assert compare_with_reference(trainer, range(len(PAIRS)))[0]["loss"] == pytest.approx(exact.loss, rel=1e-5)
    with torch.no_grad():
        trainer.ref_logps = torch.stack([plain(model, *each).sum() for each in responses(PAIRS)]).view(-1, 2)
    trainer.ref_logps[-1, 1] += 1  # MIDDLE's rejected, where 2 of 4 carry loss
    trainer.weighted_ref_logps = trainer.ref_logps
    values, differences, tokens = compare_with_reference(trainer, range(len(PAIRS)))
    assert (differences.abs() / tokens.sqrt()).max() == pytest.approx(1 / math.sqrt(2), rel=1e-4)
    weights, margins = torch.tensor([[pair.weight, pair.margin] for pair in PAIRS[:-1]]).double().T
    off = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 1.0]]), torch.tensor([[MIDDLE.weight, MIDDLE.margin]])
    loss = (weights * torch.log1p(torch.exp(margins))).sum() + formula(*off)[0].sum()
    assert values["loss"] == pytest.approx(loss.item() / len(PAIRS), rel=1e-5)


def test_evaluate_by_the_formula() -> None:
    """Weights and margins change the loss and nothing else."""
    policy, reference = torch.randn(2, 50, 2, generator=torch.Generator().manual_seed(0)) * 20 - 60
    columns = torch.zeros(100, len(COLUMNS))
    columns[:, 0], columns[:, 1] = policy.flatten(), reference.flatten()
    tokens = TokenScores(columns, np.ones((50, 2), np.int64))
    plain = Pairs(random_pairs(50))
    weighted = Pairs(replace(pair, weight=w, margin=m) for pair, (w, m) in zip(plain, terms_of(50), strict=True))
    objective = Objective(beta=BETA, label_smoothing=SMOOTHING)
    found, without = (Evaluator(pairs, None, objective).scores(tokens).means() for pairs in (weighted, plain))
    losses, _ = formula(policy.double(), reference.double(), torch.tensor(terms_of(50)).double())
    assert found["loss"] == pytest.approx(losses.mean().item(), rel=1e-6)
    assert without["loss"] != found["loss"] and without | {"loss": 0} == found | {"loss": 0}


# ---- a run ------------------------------------------------------------------------------------------------------

ROWS, HELD_OUT = 14, 6


def given_terms(seed: int) -> Callable[..., PairSet]:
    """``tokenize_rows`` whose pairs have terms."""

    def tokenize(*arguments: Any, **more: Any) -> PairSet:
        found = tokenize_rows(*arguments, **more)
        return replace(found, pairs=Pairs(with_terms(found.pairs, seed)))

    return tokenize


@pytest.fixture(autouse=True)
def given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpo_cli.training.prepare.tokenize_rows", given_terms(0))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> tuple[Path, dict[str, Any], str]:
    """A folder with rows, a cache and a run; what its training returned and told."""
    folder = tmp_path_factory.mktemp("terms")
    for name, kind, count in (("rows", "train", ROWS), ("held-out", "heldout", HELD_OUT)):
        lines = (SAMPLE / f"{kind}-strings.jsonl").read_text().splitlines()[:count]
        write_rows(folder / f"{name}.jsonl", [json.loads(line) for line in lines])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dpo_cli.training.prepare.tokenize_rows", given_terms(0))
        return folder, *dpo(
            "train", "--model", tiny, "--data", folder / "rows.jsonl", "--eval-data", folder / "held-out.jsonl",
            "--output", folder / "run", "--cache-dir", folder / "cache", "--beta", BETA, "--label-smoothing", SMOOTHING,
            "--batch-size", 5, "--max-tokens", 600, "--epochs", 2, "--lr", 1e-3, "--eval-steps", 2, "--save-steps", 2,
            "--save-total-limit", 9,
        )  # fmt: skip


def per_pair(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_eval_shows_the_figures_of_training(trained: tuple[Path, dict[str, Any], str], tmp_path: Path) -> None:
    folder, training, _ = trained
    common = ("--data", folder / "held-out.jsonl", "--cache-dir", folder / "cache")
    result, _ = dpo("eval", "--model", folder / "run", *common, "--per-pair", tmp_path / "pairs.jsonl")
    assert {name: result[name] for name in training["after"]} == pytest.approx(training["after"], rel=1e-6, abs=1e-6)
    lines = per_pair(tmp_path / "pairs.jsonl")
    logps, ref_logps = (
        torch.tensor([[line[f"{prefix}logps/{side}"] for side in ("chosen", "rejected")] for line in lines]).double()
        for prefix in ("", "ref_")
    )
    losses, margins = formula(logps, ref_logps, torch.tensor(terms_of(HELD_OUT)).double())
    assert result["loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    assert result["rewards/margins"] == pytest.approx(margins.mean().item(), rel=1e-5)
    assert margins.abs().mean() > 0.05
    for column, side in enumerate(("chosen", "rejected")):
        tokens = sum(line[f"tokens/{side}"] for line in lines)
        assert result[f"cross_entropy/{side}"] == pytest.approx(-logps[:, column].sum().item() / tokens, rel=1e-5)


def test_per_pair_counts_tokens_with_loss(
    trained: tuple[Path, dict[str, Any], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of_eval() -> list[dict[str, Any]]:
        common = ("--data", trained[0] / "held-out.jsonl", "--cache-dir", trained[0] / "cache")
        dpo("eval", "--model", trained[0] / "run", *common, "--per-pair", tmp_path / "pairs.jsonl")
        return per_pair(tmp_path / "pairs.jsonl")

    kept: list[Pairs] = []

    def keeping(*arguments: Any, **more: Any) -> PairSet:
        found = tokenize_rows(*arguments, **more)
        kept.append(found.pairs)
        return found

    lines = of_eval()
    monkeypatch.setattr("dpo_cli.training.prepare.tokenize_rows", keeping)
    whole = of_eval()
    assert [line["tokens/prompt"] for line in lines] == [line["tokens/prompt"] for line in whole]
    for shown, pairs in ((lines, with_terms(kept[0])), (whole, kept[0])):
        assert [line[f"tokens/{side}"] for line in shown for side in ("chosen", "rejected")] == counted(pairs)


def test_a_resumed_run_is_equal_to_the_bit(trained: tuple[Path, dict[str, Any], str], tmp_path: Path) -> None:
    run = shutil.copytree(trained[0] / "run", tmp_path / "run")
    shutil.rmtree(run / "model")
    shutil.rmtree(run / "checkpoints" / "step-000006")
    _, told = dpo("train", "--resume", run)
    assert "after step 4 of 6" in told
    assert (run / "metrics.jsonl").read_text() == (trained[0] / "run" / "metrics.jsonl").read_text()
    got, expected = (load_file(each / "model" / "model.safetensors") for each in (run, trained[0] / "run"))
    assert got.keys() == expected.keys() and all(torch.equal(got[name], expected[name]) for name in expected)


def test_a_run_is_not_resumed_with_other_terms(
    trained: tuple[Path, dict[str, Any], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reweighted(*arguments: Any, **more: Any) -> PairSet:
        found = given_terms(0)(*arguments, **more)
        return replace(found, pairs=Pairs(replace(pair, weight=2 * pair.weight) for pair in found.pairs))

    monkeypatch.setattr("dpo_cli.training.prepare.tokenize_rows", reweighted)
    run = shutil.copytree(trained[0] / "run", tmp_path / "run")
    result = CliRunner().invoke(app, ["train", "--resume", str(run)])
    assert result.exit_code == 2
    assert "the data and the held-out data changed since the run began" in result.stderr


def test_weights_and_margins_are_told(trained: tuple[Path, dict[str, Any], str]) -> None:
    weights = r"weights from (\S+) to (\S+), other than 1 in (\d+) pairs"
    margins = r"margins from (\S+) to (\S+), other than 0 in (\d+) pairs"
    found = re.findall(f"{weights}\n *{margins}\n", trained[2])
    assert len(found) == 2  # to train on, and held out
    for told, count in zip(found, (ROWS, HELD_OUT), strict=True):
        low, high = terms_of(count).min(0), terms_of(count).max(0)
        assert [*map(float, told)] == pytest.approx([low[0], high[0], count, low[1], high[1], count], rel=1e-5)


# ---- what a run tells -------------------------------------------------------------------------------------------


@pytest.fixture
def one_step(trained: tuple[Path, dict[str, Any], str], tiny: Path, tmp_path: Path) -> Callable[[], Any]:
    """A step over all rows."""
    rows = ("--data", trained[0] / "rows.jsonl", "--batch-size", ROWS, "--max-steps", 1)
    common = ("train", "--model", tiny, *rows, "--cache-dir", tmp_path / "cache", "--output", tmp_path / "run")
    smooth: Sequence[Any] = ("--label-smoothing", SMOOTHING)
    return lambda: CliRunner().invoke(app, [*map(str, (*common, *smooth))])


def test_step_0_tells_the_loss_that_the_terms_make(one_step: Callable[[], Any]) -> None:
    result = one_step()
    assert result.exit_code == 0, result.output
    weights, margins = terms_of(ROWS).astype(float).T
    found = re.search(r"step 0 +loss (\S+)  margin -?0\.0{6}  ", result.stderr)
    assert found, result.stderr
    assert float(found[1]) == pytest.approx(np.mean(weights * np.log1p(np.exp(margins))), abs=2e-6)


def test_step_0_tells_how_far_a_response_is_off(one_step: Callable[[], Any], tmp_path: Path) -> None:
    assert one_step().exit_code == 0
    shutil.rmtree(tmp_path / "run")
    plant(tmp_path / "cache", lambda logps: logps + 3 * (torch.arange(len(logps)) == 4))
    result = one_step()
    assert result.exit_code == 1
    found = re.search(r"error: step 0: loss .*a response is off by (\S+) nats per root of its tokens", result.stderr)
    assert found and 0 < float(found[1]) < 3, result.stderr


def test_rows_without_terms_are_told_as_ever(one_step: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpo_cli.training.prepare.tokenize_rows", tokenize_rows)
    told = one_step().stderr
    assert re.search(r"loss 0\.693147  margin -?0\.0{6}  \(.* equal on its 14 pairs\)", told), told
    assert "weight" not in told.replace("weights and moments", "").replace("weights, gradients", "")
