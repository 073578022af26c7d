"""``dpo sweep``: the same training with several betas or learning rates, and what each margin costs in KL."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_cli.config.options import EvalOptions, SweepOptions, TrainOptions
from dpo_cli.config.resolve import differences, inherit_auto_options
from dpo_cli.evaluation.evaluate import evaluate
from dpo_cli.evaluation.evaluator import Evaluation
from dpo_cli.evaluation.metrics import PairScores
from dpo_cli.evaluation.statistics import compare
from dpo_cli.models.loading import free_memory
from dpo_cli.reporting.plots import frontier, write_plots
from dpo_cli.reporting.text import format_interval, number, overlap_lines, percent, table, verdict_lines
from dpo_cli.training.loop import train
from dpo_cli.training.run_dir import read_manifest, trained_with
from dpo_cli.utils.console import Reporter
from dpo_cli.utils.errors import Interrupted, UsageError
from dpo_cli.utils.files import write_json

METRICS = ("loss", "rewards/margins", "rewards/accuracies")
RESULT = "sweep.json"
NOT_LEARNED = {"not_finite", "nothing_learned", "at_chance", "worse_than_chance", "memorised"}  # findings


def sweep(options: SweepOptions, command: Sequence[str], reporter: Reporter) -> dict[str, Any]:
    """Train what is not trained yet, evaluate each run, and draw the frontier.

    Raises:
        UsageError: the options cannot be used, or are not those of the existing runs.
        DpoError: a run failed; what was trained is kept.
        Interrupted: a signal came; a checkpoint was written.
    """
    folder = options.output or Path("runs", "sweep")
    names = [path.name for path in folder.glob("*")]
    if folder.is_file() or (names and RESULT not in names and not any(name.startswith("beta-") for name in names)):
        raise UsageError(f"--output {folder}: it holds something other than a sweep; choose another folder")
    trainings = options.runs()
    several = len({training.lr for training in trainings}) > 1
    runs = {folder / f"beta-{t.beta:g}{f'-lr-{t.lr:g}' * several}": t for t in trainings}
    started = {run: trained_with(run) for run in runs if run.exists()}
    for run, began in started.items():
        if changed := differences(began, inherit_auto_options(runs[run], began)):
            changes = f"{run.name} exists with other options: {', '.join(changed.values())}"
            raise UsageError(f"--output {folder}: {changes}; choose another folder")
    evaluations: dict[Path, Evaluation] = {}
    first = next(iter(runs))
    for run, training in runs.items():
        place = f"{len(evaluations) + 1} of {len(runs)}"
        reporter.info("sweep", f"beta {training.beta:g}, lr {training.lr:g}, {place}: {run}")
        like = started.get(run) or next(iter(started.values()), None)
        _train(run, inherit_auto_options(training, like) if like else training, command, reporter)
        started[run] = trained_with(run)
        expected = _starting_point(first)
        if moved := [name for name, value in _starting_point(run).items() if value != expected[name]]:
            raise UsageError(f"{run}: {' and '.join(moved)} changed since {first.name} began; choose another --output")
        evaluations[run] = _evaluate(run, options, reporter)
    about = evaluations[first].result
    points = [_point(run, started[run].lr, evaluation.result) for run, evaluation in evaluations.items()]
    result: dict[str, Any] = {"output": str(folder)}
    result |= {name: about[name] for name in ("trained_on", "reference", "pairs") if name in about}
    result |= {"kl": {"of": "at each token of the chosen responses", "unit": "nats per token"}, "points": points}
    if sampled := about.get("sequence_kl"):
        result["kl"] = {"of": "over responses sampled from the policy", "unit": "nats per response"}
        result["kl"] |= {name: sampled[name] for name in ("prompts", "samples", "max_new_tokens")}
    learned = [  # and some pairs to show it
        (point, evaluation.scores)
        for point, evaluation in zip(points, evaluations.values(), strict=True)
        if point["judged"]["enough"] and not {each["kind"] for each in point["findings"]} & NOT_LEARNED
    ]
    if learned:
        result["best"] = _best(*zip(*learned, strict=True))
    for name in ("frontier.svg", "frontier.png"):
        write_plots(folder / name, frontier(points, result["kl"]["unit"]))
    write_json(folder / RESULT, result)
    reporter.info("frontier", str(folder / "frontier.svg"))
    return result


def as_text(result: Mapping[str, Any]) -> str:
    """A line per run, what can be compared, and which run is best, for a terminal."""
    rows = [("beta", "lr", "KL", "95% interval", "accuracy", "margin, nats", "run")]
    for point in result["points"]:
        ends, nats = format_interval(point["intervals"]["kl"]), number(point["rewards/margins"] / point["beta"])
        cells = [number(point["kl"]), ends, percent(point["rewards/accuracies"]), nats]
        rows.append((f"{point['beta']:g}", f"{point['lr']:g}", *cells, point["run"]))
    lines = [*overlap_lines(result), *table(rows)]
    lines += ["", f"{'KL':<12}from the reference, {result['kl']['of']}, in {result['kl']['unit']}"]
    if len({point["beta"] for point in result["points"]}) > 1:
        lines.append(f"{'compare':<12}by KL, accuracy and margin; loss and rewards scale with beta ({RESULT} has them)")
    lines.append(f"{'frontier':<12}{Path(result['output'], 'frontier.svg')}")
    for point in result["points"]:
        lines += ["", Path(point["run"]).name, *verdict_lines(point)]
    if best := result.get("best"):
        equal = ", ".join(Path(run).name for run in best["not_worse"] if run != best["run"])
        lines += ["", f"The highest accuracy is {percent(best['accuracy'])}, of {Path(best['highest']).name}."]
        more = f", of the least KL among runs whose accuracy does not certainly differ: {equal}" if equal else ""
        lines += [f"Best: {Path(best['run']).name}{more}.", f"Next: dpo chat {shlex.quote(best['run'])}"]
    return "\n".join(lines)


def _best(points: Sequence[Mapping[str, Any]], scores: Sequence[PairScores]) -> dict[str, Any]:
    """Choose the run of least KL whose accuracy is not certainly below the highest, by paired differences."""
    accuracies = [point["rewards/accuracies"] for point in points]
    top = accuracies.index(max(accuracies))
    differences = {}
    for point, each in zip(points, scores, strict=True):
        difference = compare(scores[top], each)["differences"]["rewards/accuracies"]
        differences[point["run"]] = {name: difference[name] for name in ("difference", "interval")}
    not_worse = [run for run, each in differences.items() if each["interval"] is None or each["interval"][1] >= 0]
    best = min((point for point in points if point["run"] in not_worse), key=lambda point: point["kl"])
    about = {"run": best["run"], "highest": points[top]["run"], "accuracy": accuracies[top], "not_worse": not_worse}
    return about | {"differences": differences}


def _starting_point(run: Path) -> dict[str, str]:
    """Return the hashes that all runs of a sweep must share, by name."""
    manifest = read_manifest(run)
    start, reference = manifest["start"]["fingerprint"], manifest["reference"]["fingerprint"]
    return {"the data": manifest["data"]["sha256"], "the start model": start, "the reference": reference}


def _train(run: Path, options: TrainOptions, command: Sequence[str], reporter: Reporter) -> None:
    """Train a run or resume it; a finished one stays as it is."""
    if (run / "model").exists():
        reporter.info("", "already trained")
        return
    try:
        train(dataclasses.replace(options, output=run), run if run.exists() else None, command, reporter)
    except Interrupted as error:
        raise Interrupted(f"{run.name}: {error}, or run the same sweep command again") from error
    finally:
        free_memory()


def _evaluate(run: Path, options: SweepOptions, reporter: Reporter) -> Evaluation:
    """Evaluate a run on the held-out rows, as ``dpo eval`` does; refuse rows other than it began with."""
    common = {f.name: getattr(options, f.name) for f in dataclasses.fields(EvalOptions) if hasattr(options, f.name)}
    own = {"model": [str(run)], "data": options.eval_data or options.data, "beta": None, "ref_model": None}
    evaluation_options = EvalOptions(**common | own | {"kl": "exact"})
    evaluation, pairs = evaluate(str(run), evaluation_options, reporter, fraction=options.eval_fraction)
    if pairs.digest() != read_manifest(run)["held_out"]["sha256"]:
        raise UsageError(f"{run}: the held-out data changed since it began; choose another --output")
    free_memory()
    return evaluation


def _point(run: Path, lr: float, found: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's KL, margin, accuracy and findings, named as in ``dpo eval --json``."""
    intervals, kl = {"kl": found["intervals"]["kl/chosen"]}, found["kl/chosen"]
    if sampled := found.get("sequence_kl"):
        intervals["kl"], kl = sampled["token_kl_interval"], sampled["token_kl"]
    intervals |= {name: found["intervals"][name] for name in METRICS}
    point = {"beta": found["beta"], "lr": lr, "run": str(run), "kl": kl} | {name: found[name] for name in METRICS}
    return point | {"intervals": intervals, "findings": found["findings"], "judged": found["judged"]}
