"""`dpo eval`: the numbers of the training run, and numbers that can be worked out without it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

from dpo_cli.cli.app import app
from dpo_cli.models.loading import load_model
from tests.helpers import SAMPLE, Cli, make_model, write_rows

EITHER = ("chosen", "rejected")
BY_RESPONSE = ("rewards", "logps", "ref_logps", "delta_kl_data", "cross_entropy", "ref_cross_entropy")
BY_RESPONSE = (*BY_RESPONSE, "perplexity", "ref_perplexity")
FROM_BOTH = ("entropy", "ref_entropy", "kl", "reverse_kl", "shifted_tokens")
MEANS = {"loss", "rewards/margins", "rewards/accuracies", "rewards/ties"}
MEANS |= {"logp_accuracy/policy", "logp_accuracy/reference"}
MEANS |= {f"{name}/{side}" for name in BY_RESPONSE for side in EITHER}
EXACT = {f"{name}/{side}" for name in FROM_BOTH for side in EITHER}  # what needs both models
EVALUATED = MEANS | EXACT
ABOUT = {"trained_on", "run", "model", "reference", "rows", "refused", "pairs", "beta"}
SECTIONS = {"intervals", "rewards/margins_quantiles", "length", "findings", "judged", "verdict"}
SHOWN = EVALUATED | ABOUT | SECTIONS | {"drift"}
PER_PAIR = [
    "row", "logps/chosen", "logps/rejected", "ref_logps/chosen", "ref_logps/rejected", "rewards/chosen",
    "rewards/rejected", "kl/chosen", "kl/rejected", "reverse_kl/chosen", "reverse_kl/rejected", "margin",
    "tokens/prompt", "tokens/chosen", "tokens/rejected",
]  # fmt: skip
BETA = 0.3
NOISE = 1e-3  # nats


def invoke(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [*map(str, arguments)])


def dpo(*arguments: Any) -> dict[str, Any]:
    """Run a command in this process and return its JSON."""
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast
) -> tuple[Path, dict[str, Any]]:
    """A folder with a start model, held-out rows, a cache and a run; and what its training returned."""
    folder = tmp_path_factory.mktemp("trained")
    make_model().save_pretrained(folder / "start")
    tokenizer.save_pretrained(folder / "start")
    held_out = [json.loads(line) for line in (SAMPLE / "heldout-strings.jsonl").read_text().splitlines()]
    write_rows(folder / "held-out.jsonl", held_out[:9])
    write_rows(folder / "unseen.jsonl", held_out[9:12])
    result = dpo(
        "train", "--model", folder / "start", "--data", SAMPLE / "train-strings.jsonl", "--max-steps", 4,
        "--batch-size", 4, "--lr", 2e-3, "--beta", BETA, "--eval-data", folder / "held-out.jsonl",
        "--output", folder / "run", "--cache-dir", folder / "cache", "--label-smoothing", 0.1,
    )  # fmt: skip
    return folder, result


@pytest.fixture
def place(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    """A copy of that folder for one test alone, at another place; the run still knows the old one."""
    return shutil.copytree(trained[0], tmp_path / "place")


def evaluate(folder: Path, *more: Any, model: str = "run", data: str = "held-out.jsonl") -> dict[str, Any]:
    return dpo("eval", "--model", folder / model, "--data", folder / data, "--cache-dir", folder / "cache", *more)


def per_pair(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


# ---- as the training run ----------------------------------------------------------------------------------------


def test_numbers_are_those_of_the_training_run(trained: tuple[Path, dict[str, Any]]) -> None:
    folder, training = trained
    result = evaluate(folder)
    assert training["after"].keys() == EVALUATED
    assert {name: result[name] for name in EVALUATED} == pytest.approx(training["after"], rel=1e-6, abs=1e-6)
    last = json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert {f"eval_{name}": result[name] for name in EVALUATED} == pytest.approx(
        {name: value for name, value in last.items() if name != "step"}, rel=1e-6, abs=1e-6
    )
    assert abs(result["rewards/margins"]) > 0.1  # so that there is something to be equal


def test_keys(trained: tuple[Path, dict[str, Any]]) -> None:
    result = evaluate(trained[0])
    assert result.keys() == SHOWN
    assert result["pairs"] == 9 and result["beta"] == BETA
    assert all(math.isfinite(result[name]) for name in EVALUATED)
    assert result["intervals"].keys() == EVALUATED
    assert all(low <= result[name] <= high for name, (low, high) in result["intervals"].items())


def test_without_the_whole_distributions_all_else_is_the_same(trained: tuple[Path, Any], tmp_path: Path) -> None:
    whole, less = evaluate(trained[0]), evaluate(trained[0], "--kl", "none", "--per-pair", tmp_path / "pairs.jsonl")
    assert less.keys() == SHOWN - EXACT - {"drift"}
    assert {name: less[name] for name in MEANS} == pytest.approx({name: whole[name] for name in MEANS}, abs=1e-6)
    assert less["intervals"].keys() == MEANS
    assert list(per_pair(tmp_path / "pairs.jsonl")[0]) == [name for name in PER_PAIR if "kl" not in name]
    for name in SECTIONS - {"intervals", "findings", "judged"}:
        assert flat(less[name]) == pytest.approx(flat(whole[name]), abs=1e-6)


def flat(value: Any) -> list[Any]:
    """The numbers of a section."""
    if isinstance(value, dict):
        value = list(value.values())
    return [number for each in value for number in flat(each)] if isinstance(value, list) else [value]


def test_the_runs_model_folder_is_the_run(trained: tuple[Path, dict[str, Any]]) -> None:
    whole = evaluate(trained[0]) | {"run": str(trained[0] / "run" / "model")}
    assert evaluate(trained[0], model="run/model") == whole


def test_beta_scales_rewards_and_nothing_else(trained: tuple[Path, dict[str, Any]]) -> None:
    once, thrice = evaluate(trained[0]), evaluate(trained[0], "--beta", 3 * BETA)
    assert thrice["beta"] == 3 * BETA
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert thrice[name] == pytest.approx(3 * once[name], rel=1e-6)
    for name in ("rewards/accuracies", "logps/chosen", "ref_logps/rejected", "cross_entropy/chosen"):
        assert thrice[name] == once[name]
    assert thrice["loss"] != once["loss"]


# ---- pair by pair -----------------------------------------------------------------------------------------------


def smoothed_loss(margin: float) -> float:
    """The run's own loss, with its label smoothing of 0.1."""
    return 0.9 * math.log1p(math.exp(-margin)) + 0.1 * math.log1p(math.exp(margin))


def test_per_pair_lines_add_up_to_the_result(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    result = evaluate(trained[0], "--per-pair", tmp_path / "sub" / "pairs.jsonl")
    lines = per_pair(tmp_path / "sub" / "pairs.jsonl")
    assert [list(line) for line in lines] == [PER_PAIR] * 9
    assert [line["row"] for line in lines] == [f"{trained[0] / 'held-out.jsonl'}:{n}" for n in range(1, 10)]
    for line in lines:
        for side in ("chosen", "rejected"):
            logratio = line[f"logps/{side}"] - line[f"ref_logps/{side}"]
            assert line[f"rewards/{side}"] == pytest.approx(BETA * logratio, abs=1e-4)
        assert line["margin"] == pytest.approx(line["rewards/chosen"] - line["rewards/rejected"], abs=1e-9)

    def mean(values: list[float]) -> Any:
        return pytest.approx(sum(values) / len(values), rel=1e-5, abs=1e-5)

    for side in ("chosen", "rejected"):
        for name in (f"logps/{side}", f"ref_logps/{side}", f"rewards/{side}"):
            assert result[name] == mean([line[name] for line in lines])
        tokens = sum(line[f"tokens/{side}"] for line in lines)
        for name in ("kl", "reverse_kl"):  # of a line a token, as its mean over all tokens is
            total = sum(line[f"{name}/{side}"] * line[f"tokens/{side}"] for line in lines)
            assert result[f"{name}/{side}"] == pytest.approx(total / tokens, rel=1e-5)
        for prefix in ("", "ref_"):
            total = sum(line[f"{prefix}logps/{side}"] for line in lines)
            assert result[f"{prefix}cross_entropy/{side}"] == pytest.approx(-total / tokens, rel=1e-5)
    margins = [line["margin"] for line in lines]
    assert result["rewards/margins"] == mean(margins)
    assert result["loss"] == mean([smoothed_loss(margin) for margin in margins])
    assert result["rewards/ties"] == mean([float(abs(margin) <= BETA * NOISE) for margin in margins])
    assert result["rewards/accuracies"] == mean([float(margin > 0) for margin in margins])
    quantiles = result["rewards/margins_quantiles"]
    assert list(quantiles) == ["0.05", "0.25", "0.5", "0.75", "0.95"]
    assert quantiles["0.5"] == pytest.approx(sorted(margins)[4], abs=1e-5)  # of nine
    assert quantiles["0.25"] == pytest.approx(sorted(margins)[2], abs=1e-5)


def test_tokens_are_those_of_the_rows(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """Prompt as it stands; a response with the token that ends it."""
    folder = trained[0]
    evaluate(folder, "--per-pair", tmp_path / "pairs.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(folder / "start")
    for row, line in zip(per_pair(folder / "held-out.jsonl"), per_pair(tmp_path / "pairs.jsonl"), strict=True):
        for side in ("chosen", "rejected"):
            ids = tokenizer(row["prompt"] + row[side])["input_ids"]
            assert line["tokens/prompt"] + line[f"tokens/{side}"] == len(ids) + 1


# ---- the reference ----------------------------------------------------------------------------------------------


def test_a_model_that_is_no_run_is_its_own_reference(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    result = evaluate(trained[0], "--per-pair", tmp_path / "pairs.jsonl", model="start")
    assert result["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert result["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert result["rewards/ties"] == 1 and result["rewards/accuracies"] == 0.5
    assert result["beta"] == 0.1
    assert result["logps/chosen"] == pytest.approx(result["ref_logps/chosen"], abs=NOISE)
    assert all(abs(line["margin"]) < 0.1 * NOISE for line in per_pair(tmp_path / "pairs.jsonl"))


def test_another_reference_by_plain_forwards(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Two pairs, each response alone through transformers."""
    folder = trained[0]
    make_model(seed=5).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    rows = per_pair(folder / "held-out.jsonl")[:2]
    data = write_rows(tmp_path / "two.jsonl", rows)
    result = dpo(
        "eval", "--model", folder / "run", "--ref-model", tmp_path / "other", "--data", data, "--beta", 0.02,
        "--cache-dir", tmp_path / "cache", "--per-pair", tmp_path / "pairs.jsonl",
    )  # fmt: skip
    margins = []
    for row, line in zip(rows, per_pair(tmp_path / "pairs.jsonl"), strict=True):
        logps = {}
        for prefix, model in (("", folder / "run" / "model"), ("ref_", tmp_path / "other")):
            for side in ("chosen", "rejected"):
                logps[f"{prefix}logps/{side}"] = plain_logps(model, row["prompt"], row[side])
        assert {name: line[name] for name in logps} == pytest.approx(logps, abs=NOISE)
        chosen, rejected = (logps[f"logps/{side}"] - logps[f"ref_logps/{side}"] for side in ("chosen", "rejected"))
        assert line["rewards/chosen"] == pytest.approx(0.02 * chosen, abs=NOISE)
        margins.append(0.02 * (chosen - rejected))
        assert line["margin"] == pytest.approx(margins[-1], abs=NOISE)
        assert abs(margins[-1]) > 0.05
    assert result["rewards/margins"] == pytest.approx(sum(margins) / 2, abs=NOISE)
    loss = sum(smoothed_loss(margin) for margin in margins) / 2
    assert result["loss"] == pytest.approx(loss, abs=NOISE)


def plain_logps(model: Path, prompt: str, response: str) -> float:
    """Sum of a response's log-probs, its end token included."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = torch.tensor(tokenizer(prompt + response)["input_ids"] + [tokenizer.eos_token_id])
    begin = len(tokenizer(prompt)["input_ids"])
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(model, attn_implementation="eager")(ids[None]).logits[0]
    return float(logits[begin - 1 : -1].double().log_softmax(-1).gather(1, ids[begin:, None]).sum())


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Folders that models are loaded from."""
    paths: list[str] = []

    def load(source: Any) -> Any:
        paths.append(source.path)
        return load_model(source)

    monkeypatch.setattr("dpo_cli.training.prepare.load_model", load)
    return paths


@pytest.fixture
def moved(trained: tuple[Path, dict[str, Any]]) -> Iterator[Path]:
    """The start model's folder is away."""
    start = trained[0] / "start"
    start.rename(trained[0] / "away")
    yield trained[0]
    (trained[0] / "away").rename(start)


def test_full_cache_needs_no_reference_model(moved: Path, trained: tuple[Path, Any], loaded: list[str]) -> None:
    result = evaluate(moved, "--kl", "none")
    assert {name: result[name] for name in MEANS} == pytest.approx(
        {name: trained[1]["after"][name] for name in MEANS}, rel=1e-6, abs=1e-6
    )
    assert loaded == [str(moved / "run" / "model")] and result["reference"] == str(moved / "start")


def test_the_whole_distributions_need_both_models(moved: Path, trained: tuple[Path, Any], loaded: list[str]) -> None:
    """One after the other. Where the reference's is gone, the message names the way out."""
    common = ("--model", moved / "run", "--data", moved / "held-out.jsonl", "--cache-dir", moved / "cache")
    result = invoke("eval", *common, "--json")
    assert result.exit_code == 2 and result.stdout == ""
    assert str(moved / "start") in result.stderr and "--ref-model" in result.stderr
    loaded.clear()
    evaluate(moved, "--ref-model", moved / "away")
    assert loaded == [str(moved / "run" / "model"), str(moved / "away")]


def test_pairs_that_are_not_cached_are_scored_by_the_start_model(
    trained: tuple[Path, Any], tmp_path: Path, loaded: list[str]
) -> None:
    folder = trained[0]
    cache = shutil.copytree(folder / "cache", tmp_path / "cache")
    common = ("eval", "--model", folder / "run", "--data", folder / "unseen.jsonl", "--cache-dir", cache)
    common = (*common, "--kl", "none")
    first = dpo(*common, "--per-pair", tmp_path / "pairs.jsonl")
    assert loaded == [str(folder / "run" / "model"), str(folder / "start")]
    row, line = per_pair(folder / "unseen.jsonl")[0], per_pair(tmp_path / "pairs.jsonl")[0]
    assert line["ref_logps/chosen"] == pytest.approx(
        plain_logps(folder / "start", row["prompt"], row["chosen"]), abs=NOISE
    )
    loaded.clear()
    assert dpo(*common) == first
    assert loaded == [str(folder / "run" / "model")]  # now they are cached


def test_start_model_that_is_gone_is_named(moved: Path, tmp_path: Path) -> None:
    data = moved / "unseen.jsonl"
    result = invoke("eval", "--model", moved / "run", "--data", data, "--cache-dir", tmp_path / "cache", "--json")
    assert result.exit_code == 2
    assert str(moved / "start") in result.stderr and "--ref-model" in result.stderr
    assert result.stdout == ""


def test_start_model_that_changed_is_named(trained: tuple[Path, Any], tmp_path: Path, moved: Path) -> None:
    """By one unit in the last place: numbers against it would be wrong without a word."""
    start = shutil.copytree(moved / "away", moved / "start")
    try:
        model = AutoModelForCausalLM.from_pretrained(start)
        first = model.get_output_embeddings().weight.data.view(-1)[:1]
        first.copy_(torch.nextafter(first, torch.tensor(9.0)))
        model.save_pretrained(start)
        common = ("eval", "--model", moved / "run", "--data", moved / "unseen.jsonl", "--cache-dir", tmp_path / "cache")
        refused = invoke(*common, "--json")
        assert refused.exit_code == 2 and refused.stdout == ""
        assert str(start) in refused.stderr and "--ref-model" in refused.stderr
        assert dpo(*common, "--ref-model", moved / "away")["pairs"] == 3  # the remedy it names
    finally:
        shutil.rmtree(start)


def test_another_precision_is_that_of_both_sides(trained: tuple[Path, Any], tmp_path: Path) -> None:
    """A run that moved nothing, in bfloat16: against the cached float32 reference its margins would be noise."""
    folder = trained[0]
    dpo(
        "train", "--model", folder / "start", "--data", folder / "held-out.jsonl", "--max-steps", 1, "--lr", 1e-30,
        "--output", tmp_path / "run", "--cache-dir", tmp_path / "cache",
    )  # fmt: skip
    common = (
        "eval",
        "--model",
        tmp_path / "run",
        "--data",
        folder / "held-out.jsonl",
        "--cache-dir",
        tmp_path / "cache",
    )
    assert dpo(*common)["loss"] == pytest.approx(math.log(2), abs=1e-6)
    dpo(*common, "--dtype", "bfloat16", "--per-pair", tmp_path / "pairs.jsonl")
    assert [line["margin"] for line in per_pair(tmp_path / "pairs.jsonl")] == pytest.approx([0] * 9, abs=0.1 * NOISE)


# ---- output -----------------------------------------------------------------------------------------------------


def test_stdout_is_one_json_object_and_nothing_else(dpo: Cli, trained: tuple[Path, Any], tmp_path: Path) -> None:
    """Through the command, for libraries may write past Python; also where the reference has to be scored."""
    folder = trained[0]
    out = dpo(
        "eval", "--model", folder / "run", "--data", folder / "held-out.jsonl", "--cache-dir", tmp_path / "cache",
        "--per-pair", "pairs.jsonl", "--json",
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    assert out.stdout.count("\n") == 1 and json.loads(out.stdout).keys() == SHOWN
    assert "reference 9/9" in out.stderr
    assert len(per_pair(tmp_path / "pairs.jsonl")) == 9
    assert {path.name for path in tmp_path.iterdir()} == {"pairs.jsonl", "cache"}


def test_full_is_all_numbers(trained: tuple[Path, Any]) -> None:
    folder = trained[0]
    common = ("--data", folder / "held-out.jsonl", "--cache-dir", folder / "cache")
    for kl in ("exact", "none"):
        result = invoke("eval", "--model", folder / "run", *common, "--kl", kl, "--full")
        assert result.exit_code == 0, result.output
        shown = {line.split()[0]: line.split() for line in result.stdout.splitlines() if line}
        for name in ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
            value, low, to, high = shown[name][1:5]
            assert read_number(value) == pytest.approx(trained[1]["after"][name], abs=1e-3)
            assert to == "to" and read_number(low) <= read_number(value) <= read_number(high)
        for name in ("cross_entropy", "delta_kl_data", "perplexity", *(FROM_BOTH[:4] if kl == "exact" else ())):
            assert read_number(shown[name][1]) == pytest.approx(trained[1]["after"][f"{name}/chosen"], rel=1e-3)
        assert ("kl" in shown) == (kl == "exact")
        assert {"policy", "reference", "logp", "accuracy", "margin"} <= shown.keys()
        assert [line for line in result.stdout.splitlines() if len(line) > 160 and str(folder) not in line] == []


def read_number(text: str) -> float:
    return float(text.replace(",", ""))
