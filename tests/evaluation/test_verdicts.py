"""What `dpo train`, `eval` and `sweep` say about their numbers: on how many pairs, and which were trained on."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

import dpo_cli.training.loop
from dpo_cli.cli.app import app
from dpo_cli.data.pairs import Pair, Pairs, trained_on
from tests.helpers import SAMPLE, make_model, random_pairs, write_rows

FEW = "Only 6 pairs: too few to judge (20 needed)"
NO_PAIRS = "No pairs were held out: nothing shows whether the model learned the preference; --eval-fraction 0.1"
Run = Callable[..., Any]


def dpo(command: str, *arguments: Any) -> Any:
    result = CliRunner().invoke(app, [command, *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    """A model, 24 rows whose labels say nothing, and six more of the kind."""
    folder = tmp_path_factory.mktemp("verdicts")
    make_model().save_pretrained(folder / "start")
    tokenizer.save_pretrained(folder / "start")
    rows, rng = [json.loads(line) for line in (SAMPLE / "train.jsonl").read_text().splitlines()[:30]], random.Random(5)
    for row in rows:
        if rng.random() < 0.5:
            row["chosen"], row["rejected"] = row["rejected"], row["chosen"]
    write_rows(folder / "rows.jsonl", rows[:24])
    write_rows(folder / "new.jsonl", rows[24:])
    write_rows(folder / "both.jsonl", rows)
    other = [row | {"chosen": [{"role": "assistant", "content": "Something else."}]} for row in rows[:3]]
    write_rows(folder / "other-answers.jsonl", other + rows[22:])
    return folder


def train(place: Path, *more: Any, data: str = "rows.jsonl") -> Any:
    common = ("--model", place / "start", "--data", place / data, "--cache-dir", place / "cache")
    return dpo("train", *common, *more)


def evaluate(place: Path, model: Path, *more: Any, data: str = "both.jsonl") -> Any:
    return dpo("eval", "--model", model, "--data", place / data, "--cache-dir", place / "cache", *more)


@pytest.fixture(scope="module")
def memorised(place: Path) -> tuple[Path, Any]:
    """Trained until the training loss is gone."""
    run = place / "memorised"
    more = (
        "--epochs",
        60,
        "--lr",
        1e-3,
        "--save-steps",
        100,
        "--save-total-limit",
        9,
        "--eval-steps",
        40,
        "--save-best",
        "loss",
    )
    return run, train(place, "--eval-data", place / "new.jsonl", *more, "--output", run)


def page(file: Path) -> str:
    return file.read_text(encoding="utf-8")


# ---- the end of a training --------------------------------------------------------------------------------------


def test_the_most_overfitted_run_is_no_clean_result(memorised: tuple[Path, Any]) -> None:
    run, result = memorised
    head, _, told = result.stdout.partition("finding: ")
    assert told.startswith("The training pairs were memorised: loss ") and "To try: " in told
    assert "Next: dpo chat " in told and FEW in told and "warning" not in head
    assert "\nTrained on 24 pairs. This command took 0:00:" in head
    text = page(run / "report.html")
    assert "The training pairs were memorised" in text and f"{FEW}." in text
    assert "Nothing stood out" not in text and "no finding" not in result.stdout


def test_the_result_has_the_verdict(place: Path, tmp_path: Path) -> None:
    out = train(place, "--eval-data", place / "new.jsonl", "--max-steps", 2, "--output", tmp_path / "run", "--json")
    result = json.loads(out.stdout)
    assert [finding["kind"] for finding in result["findings"]] == ["nothing_learned"]
    assert result["judged"] == {"pairs": 6, "needed": 20, "enough": False} | {
        "passed": ["not_finite", "memorised"], "text": FEW
    }  # fmt: skip
    assert result["trained_on"] == {"pairs": 0, "prompts": 0, "text": ""}


@pytest.mark.parametrize("form", [[], ["--json"]])
def test_a_run_with_nothing_held_out_says_so_and_how_to(place: Path, tmp_path: Path, form: list[str]) -> None:
    out = train(place, "--max-steps", 1, "--output", tmp_path / "run", *form)
    assert "held out    no pairs: nothing will show whether the model learns the preference; --eval-fr" in out.stderr
    if form:
        judged = json.loads(out.stdout)["judged"]
        assert judged["text"].startswith(NO_PAIRS) and (judged["pairs"], judged["enough"]) == (0, False)
    assert NO_PAIRS in " ".join(out.stdout.split())
    assert "--eval-fraction 0.1 holds out a tenth of the pairs" in page(tmp_path / "run" / "report.html")


def test_a_report_that_cannot_be_drawn_leaves_the_verdict(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any) -> None:
        raise ValueError("the template is broken")

    monkeypatch.setattr(dpo_cli.training.loop, "write_report", failing)
    out = train(place, "--eval-data", place / "new.jsonl", "--max-steps", 1, "--output", tmp_path / "run")
    assert "the template is broken" in out.stderr and FEW in out.stdout


# ---- pairs that were trained on ---------------------------------------------------------------------------------


def test_hashes_are_those_of_what_the_model_reads() -> None:
    pairs = Pairs(random_pairs(50))
    hashes = pairs.hashes()
    assert hashes.shape == (50, 2) and len(np.unique(hashes[:, 1])) == 50
    first = pairs[0]
    masked = Pair("elsewhere", first.prompt, np.concatenate([~first.chosen[:-1], first.chosen[-1:]]), first.rejected)
    swapped = Pair("x", first.prompt, first.rejected, first.chosen)
    joined = np.concatenate([first.prompt, first.chosen])
    moved = Pair("x", joined[: len(first.prompt) + 1], joined[len(first.prompt) + 1 :], first.rejected)
    same, turned, other = Pairs([masked, swapped, moved]).hashes()
    assert (same == hashes[0]).all() and (turned == hashes[0]).all()  # whichever side is chosen
    assert other[1] != hashes[0, 1]
    assert Pairs().hashes().shape == (0, 2)


def test_what_was_trained_on_in_words() -> None:
    pairs = random_pairs(6)
    other = [
        Pair("x", pair.prompt, pair.rejected, last.chosen) for pair, last in zip(pairs[:3], pairs[3:], strict=True)
    ]
    trained, said = Pairs(pairs[:5]).hashes(), "accuracy on them says nothing about new pairs"
    both = trained_on(Pairs([*other, *pairs[3:]]), trained)
    text = f"2 of these 6 pairs were trained on: {said}; the prompts of 3 more were trained on with other responses"
    assert both == {"pairs": 2, "prompts": 3, "text": text}
    prompts = trained_on(Pairs(other), trained)["text"]
    assert prompts == "the prompts of 3 were trained on with other responses"
    assert trained_on(Pairs(pairs[5:]), trained) == {"pairs": 0, "prompts": 0, "text": ""}


def test_evaluated_rows_that_were_trained_on_are_said_first(memorised: tuple[Path, Any], place: Path) -> None:
    run, said = memorised[0], "24 of these 30 pairs were trained on: accuracy on them says nothing about new pairs"
    report = place / "both.html"
    out = evaluate(place, run, "--report", report)
    assert out.stdout.startswith(f"warning: {said}\n")
    assert "Only 6 pairs that were not trained on: too few to judge (20 needed)\nNext: dpo chat" in out.stdout
    assert said in page(report) and page(report).index(said) < page(report).index("<nav")
    for model in (run / "model", run / "best", run / "checkpoints" / "step-000120"):
        result = json.loads(evaluate(place, model, "--json", "--kl", "none").stdout)
        assert next(iter(result)) == "trained_on" and result["trained_on"]["text"] == said
        assert (result["trained_on"]["pairs"], result["judged"]["pairs"]) == (24, 6)
    new = evaluate(place, run, data="new.jsonl")
    assert "were trained on" not in new.stdout and FEW in new.stdout
    two = evaluate(place, run, "--model", place / "start", "--kl", "none")
    assert two.stdout.startswith(f"warning: {said}\na ") and two.stdout.count("warning") == 1


def test_prompts_that_were_trained_on_are_counted_apart(memorised: tuple[Path, Any], place: Path) -> None:
    result = json.loads(evaluate(place, memorised[0], "--json", "--kl", "none", data="other-answers.jsonl").stdout)
    assert (result["trained_on"]["pairs"], result["trained_on"]["prompts"]) == (2, 3)


def test_pairs_that_no_step_reads_were_not_trained_on(place: Path, tmp_path: Path) -> None:
    train(place, "--max-steps", 1, "--batch-size", 8, "--output", tmp_path / "run")
    result = json.loads(evaluate(place, tmp_path / "run", "--json", "--kl", "none").stdout)
    assert result["trained_on"]["pairs"] == 8
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["data"]["pairs"] == 24 and len(manifest["data"]["trained"]) == 64


def test_a_model_that_is_no_run_was_not_trained_here(place: Path) -> None:
    result = json.loads(evaluate(place, place / "start", "--json", "--kl", "none").stdout)
    assert "trained_on" not in result and result["judged"]["enough"] and result["judged"]["pairs"] == 30


@pytest.mark.parametrize("state", ["absent", "cut", "other", "changed"])
def test_without_its_hashes_nothing_is_said_of_a_run(
    memorised: tuple[Path, Any], place: Path, tmp_path: Path, state: str
) -> None:
    run = shutil.copytree(memorised[0], tmp_path / "run")
    file = run / "trained-pairs.safetensors"
    if state == "absent":
        file.unlink()
    elif state == "cut":
        file.write_bytes(file.read_bytes()[:-20])
    elif state == "other":
        save_file({"rows": np.zeros(3)}, file)
    else:
        save_file({"pairs": load_file(file)["pairs"][:5]}, file)
    out = evaluate(place, run, "--kl", "none")
    assert "trained on" not in out.stdout and "is unknown" in out.stderr
    resumed = dpo("train", "--resume", run)
    assert "memorised" in resumed.stdout


@pytest.mark.parametrize("fraction", [False, True])
def test_held_out_pairs_that_are_trained_on(place: Path, tmp_path: Path, fraction: bool) -> None:
    """``--eval-fraction`` draws none of them."""
    held_out = ("--eval-fraction", 0.2) if fraction else ("--eval-data", place / "both.jsonl")
    out = train(place, *held_out, "--max-steps", 3, "--batch-size", 8, "--output", tmp_path / "run")
    begins = "24 of these 30 pairs will be trained on: accuracy on them says nothing about new pairs"
    ends = "24 of these 30 pairs were trained on: accuracy on them says nothing about new pairs"
    assert (f"warning: {begins}" in out.stderr, out.stdout.startswith(f"warning: {ends}\n")) == (not fraction,) * 2
    assert (ends in page(tmp_path / "run" / "report.html")) == (not fraction)
    if not fraction:
        assert "Only 6 pairs that were not trained on: too few to judge (20 needed)" in out.stdout
        resumed = dpo("train", "--resume", tmp_path / "run", "--json")
        assert json.loads(resumed.stdout)["trained_on"]["pairs"] == 24


def test_a_sweep_says_what_was_trained_on_and_judged(place: Path, tmp_path: Path) -> None:
    common = (
        "--model", place / "start", "--cache-dir", place / "cache", "--beta", "0.1,1", "--max-steps", 1, "--lr", 1e-3,
        "--data", place / "rows.jsonl", "--batch-size", 24, "--output", tmp_path / "sweep",
    )  # fmt: skip
    out = dpo("sweep", *common, "--eval-data", place / "both.jsonl")
    assert out.stdout.startswith("warning: 24 of these 30 pairs were trained on")
    assert "Only 6 pairs that were not trained on: too few to judge (20 needed)" in out.stdout
    found = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert found["trained_on"]["pairs"] == 24
    assert [point["judged"]["pairs"] for point in found["points"]] == [6, 6]
    assert all(isinstance(point["findings"], list) for point in found["points"])


# ---- steps that move nothing ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--max-steps", 2], "2 steps at lr 1e-06 will hardly move the model: for a few hundred pairs try --lr 2e-05"),
        (["--max-steps", 1, "--lr", 4e-6], "1 step at lr 4e-06 will hardly move the model"),
        (["--max-steps", 1, "--lr", 6e-6], None),
        (["--max-steps", 3, "--lr", 2e-6, "--lr-scheduler", "constant", "--warmup-ratio", 0], None),
        (["--max-steps", 3, "--lr", 2e-6, "--lr-scheduler", "linear", "--warmup-ratio", 0], "3 steps at lr 2e-06"),
        (["--max-steps", 3, "--lr", 3e-5], None),
        (["--max-steps", 3, "--lr", 3e-5, "--lora-rank", 4], "3 steps at lr 3e-05 will hardly move the model"),
        (["--max-steps", 3, "--lr", 3e-4, "--lora-rank", 4], None),
    ],
)
def test_the_plan_says_when_the_steps_move_nothing(place: Path, options: list[Any], told: str | None) -> None:
    """By the sum of the learning rates, schedule and all; an adapter needs more."""
    out = train(place, *options, "--batch-size", 4, "--dry-run")
    hints = [line for line in out.stderr.splitlines() if "will hardly move" in line]
    assert hints == [] if told is None else hints[0].startswith(f"hint        {told}")


# ---- the verdict in words -----------------------------------------------------------------------------------------


def test_the_end_of_an_evaluation_is_a_few_plain_lines(place: Path, tmp_path: Path) -> None:
    """On enough new pairs: how often, against what, how far, whether anything is wrong, what next."""
    rows = [json.loads(line) for line in (SAMPLE / "train.jsonl").read_text().splitlines()]
    write_rows(tmp_path / "held-out.jsonl", rows[100:124])
    run, held_out = tmp_path / "run", ("--eval-data", tmp_path / "held-out.jsonl")
    trained = train(place, *held_out, "--max-steps", 6, "--lr", 3e-4, "--batch-size", 4, "--output", run)
    data = ("--model", run, "--data", tmp_path / "held-out.jsonl", "--cache-dir", place / "cache")
    result, short, full = (
        json.loads(dpo("eval", *data, "--json").stdout),
        dpo("eval", *data),
        dpo("eval", *data, "--full"),
    )
    accuracy, ends = result["rewards/accuracies"], result["intervals"]["rewards/accuracies"]
    rule, share = "longer", result["length"]["accuracy_prefer_longer"]
    rule, share = (rule, share) if share >= 0.5 else ("shorter", 1 - share)
    said = "On 24 held-out pairs the model favors the better answer more than its reference does in"
    often = f"{accuracy:.0%} ({ends[0]:.0%} to {ends[1]:.0%})"
    kl = max(result["kl/chosen"], result["kl/rejected"])
    assert result["verdict"] == [
        f"{said} {often}; chance: 50%, always the {rule} answer: {share:.0%}, which does better.",
        f"The better answer is the likelier one in {result['logp_accuracy/policy']:.0%}; "
        f"under the reference in {result['logp_accuracy/reference']:.0%}.",
        f"KL from its reference on these answers: {kl:.2g} nats per token.",
    ]
    for text in (short.stdout, full.stdout, trained.stdout):
        assert said in " ".join(text.split()) and f"\nNext: dpo chat {run}" in text
    assert "cross_entropy" in full.stdout and "cross_entropy" not in short.stdout and "\nnumbers" not in short.stdout
    assert len(short.stdout.splitlines()) < 15 and short.stdout.endswith("All numbers: --full\n")
    assert all(line in page(run / "report.html") for line in result["verdict"])


def test_answers_are_shown_before_and_after_by_default(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpo_cli.training.results.ANSWERS_SHOWN", 3)
    monkeypatch.setattr("dpo_cli.training.results.ANSWER_TOKENS", 4)
    held_out = ("--eval-data", place / "new.jsonl", "--max-steps", 1, "--lr", 1e-2, "--kl", "none")
    out = train(place, *held_out, "--output", tmp_path / "run")
    asked = [json.loads(line)["prompt"][-1]["content"] for line in (place / "new.jsonl").read_text().splitlines()]
    shown = " ".join(out.stdout.partition("held out, ")[0].split())
    assert [question in shown for question in asked] == [True] * 3 + [False] * 3 and "<|im_" not in shown
    assert [shown.count(word) for word in (" before ", " after ")] == [3, 3] and shown.count("…") == 6
    none = train(place, *held_out, "--show-answers", 0, "--output", tmp_path / "none", "--json")
    assert json.loads(none.stdout)["answers"] == []
    samples = ("--samples", 1, "--sample-prompts", 2, "--sample-tokens", 4)
    drawn = evaluate(place, tmp_path / "run", *samples, data="new.jsonl").stdout
    assert (
        drawn.startswith(f"prompt    {asked[0][:40]}") and drawn.count("\n  before  ") == drawn.count("\n  after ") == 2
    )


def test_a_model_that_cannot_answer_is_trained(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache of transformers raises where no layer attends."""
    monkeypatch.setattr("dpo_cli.training.results.ANSWERS_SHOWN", 3)
    make_model("lfm2", scale=3.0, layer_types=["conv", "conv"]).save_pretrained(tmp_path / "start")
    for file in (place / "start").glob("*token*"):
        shutil.copy(file, tmp_path / "start")
    shutil.copy(place / "start" / "chat_template.jinja", tmp_path / "start")
    out = train(
        place, "--eval-data", place / "new.jsonl", "--max-steps", 1, "--kl", "none", "--output", tmp_path / "run",
        "--model", tmp_path / "start",
    )  # fmt: skip
    assert "warning: the model cannot generate answers: " in out.stderr and "Next: dpo chat" in out.stdout


def test_two_models_are_compared_in_columns(memorised: tuple[Path, Any], place: Path) -> None:
    run = memorised[0]
    short = evaluate(place, run, "--model", run / "best").stdout
    full = evaluate(place, run, "--model", run / "best", "--full").stdout
    for text, names in ((short, {"loss", "rewards/margins", "kl/chosen"}), (full, {"cross_entropy/chosen"})):
        lines = text.split("\n\n")[1].splitlines()
        end = lines[0].index("95% interval")
        assert names <= {line.split()[0] for line in lines[1:]} and "ref_logps/chosen" not in text
        assert all(line[end - 2 : end] == "  " and line[end] != " " for line in lines), text
    assert len(short.splitlines()) < 20 and "too few to judge (20 needed)\nAll numbers: --full\n" in short
