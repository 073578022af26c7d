"""``dpo sweep``: the same training with several betas from one reference, and what each margin costs in KL."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_cli.config.options import EvalOptions, SweepOptions, TrainOptions
from dpo_cli.config.resolve import differences, inherit_auto_options
from dpo_cli.evaluation.evaluate import evaluate
from dpo_cli.models.loading import free_memory
from dpo_cli.reporting.plots import frontier, write_plots
from dpo_cli.reporting.text import between, number, overlap, percent, verdict
from dpo_cli.training.loop import train
from dpo_cli.training.run_dir import read_manifest, trained_with
from dpo_cli.utils.console import Reporter
from dpo_cli.utils.errors import Interrupted, UsageError
from dpo_cli.utils.files import write_json

METRICS = ("loss", "rewards/margins", "rewards/accuracies")
RESULT = "sweep.json"


def sweep(options: SweepOptions, command: Sequence[str], reporter: Reporter) -> dict[str, Any]:
    """Train what is not trained yet, evaluate each run, and draw the frontier.

    Raises:
        UsageError: the options cannot be used, or are not those of the existing runs.
        DpoError: a run failed; what was trained is kept.
        Interrupted: a signal came; a checkpoint was written.
    """
    folder = _folder(options)
    runs = {folder / f"beta-{training.beta:g}": training for training in options.runs()}
    started = {run: trained_with(run) for run in runs if run.exists()}
    for run, asked in runs.items():
        if run in started and (changed := differences(started[run], inherit_auto_options(asked, started[run]))):
            changes = f"{run.name} exists with other options: {', '.join(changed.values())}"
            raise UsageError(f"--output {folder}: {changes}; choose another folder")
    result: dict[str, Any] = {"output": str(folder)}
    points: list[dict[str, Any]] = []
    for run, training in runs.items():
        reporter.info("sweep", f"beta {training.beta:g}, {len(points) + 1} of {len(runs)}: {run}")
        like = started.get(run) or next(iter(started.values()), None)
        _train(run, inherit_auto_options(training, like) if like else training, command, reporter)
        started[run] = trained_with(run)
        first, expected = next(iter(runs)), _starting_point(next(iter(runs)))
        if moved := [name for name, value in _starting_point(run).items() if value != expected[name]]:
            raise UsageError(f"{run}: {' and '.join(moved)} changed since {first.name} began; choose another --output")
        evaluation = _evaluate(run, options, reporter)
        if not points:
            result |= _about(evaluation)
        points.append(_point(run, evaluation))
    result["points"] = points
    for name in ("frontier.svg", "frontier.png"):
        write_plots(folder / name, frontier(points, result["kl"]["unit"]))
    write_json(folder / RESULT, result)
    reporter.info("frontier", str(folder / "frontier.svg"))
    return result


def as_text(result: Mapping[str, Any]) -> str:
    """A line per run, for a terminal."""
    head = f"{'beta':>7}{'KL':>10}  {'95 % interval':<22}" + "".join(f"{name:>20}" for name in METRICS)
    lines = [*overlap(result), f"{head}  run"]
    for point in result["points"]:
        cells = [percent(point[m]) if m == "rewards/accuracies" else number(point[m]) for m in METRICS]
        line = f"{point['beta']:>7g}{number(point['kl']):>10}  {between(point['intervals']['kl']):<22}"
        lines.append(line + "".join(f"{cell:>20}" for cell in cells) + f"  {point['run']}")
    lines += ["", f"{'KL':<12}from the reference, {result['kl']['of']}, in {result['kl']['unit']}"]
    lines.append(f"{'frontier':<12}{Path(result['output'], 'frontier.svg')}")
    for point in result["points"]:
        lines += ["", f"beta {point['beta']:g}", *verdict(point)]
    return "\n".join(lines)


def _folder(options: SweepOptions) -> Path:
    """The folder of the runs.

    Raises:
        UsageError: it holds something else.
    """
    folder = options.output or Path("runs", "sweep")
    names = [path.name for path in folder.glob("*")]
    if folder.is_file() or (names and RESULT not in names and not any(name.startswith("beta-") for name in names)):
        raise UsageError(f"--output {folder}: it holds something other than a sweep; choose another folder")
    return folder


def _starting_point(run: Path) -> dict[str, str]:
    """What the runs of a sweep must share, by name."""
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


def _evaluate(run: Path, options: SweepOptions, reporter: Reporter) -> dict[str, Any]:
    """Evaluate a run on the held-out rows, as ``dpo eval`` does.

    Raises:
        UsageError: they changed since the run began.
    """
    common = {f.name: getattr(options, f.name) for f in dataclasses.fields(EvalOptions) if hasattr(options, f.name)}
    own = {"model": [str(run)], "data": options.eval_data, "beta": None, "ref_model": None, "kl": "exact"}
    evaluation, pairs = evaluate(str(run), EvalOptions(**common | own), reporter)
    if pairs.digest() != read_manifest(run)["held_out"]["sha256"]:
        raise UsageError(f"{run}: the held-out data changed since it began; choose another --output")
    free_memory()
    return evaluation.result


def _about(result: Mapping[str, Any]) -> dict[str, Any]:
    """What holds for all points: the reference and the prompts."""
    about: dict[str, Any] = {name: result[name] for name in ("trained_on", "reference", "pairs") if name in result}
    about["kl"] = {"of": "at each token of the chosen responses", "unit": "nats per token"}
    if kl := result.get("sequence_kl"):
        about["kl"] = {"of": "over responses sampled from the policy", "unit": "nats per response"}
        about["kl"] |= {name: kl[name] for name in ("prompts", "samples", "max_new_tokens")}
    return about


def _point(run: Path, result: Mapping[str, Any]) -> dict[str, Any]:
    """A run's KL and what it buys, named as in ``dpo eval --json``."""
    kl, ends = result.get("sequence_kl"), result["intervals"]
    point: dict[str, Any] = {"beta": result["beta"], "run": str(run)}
    point |= {"kl": kl["token_kl"] if kl else result["kl/chosen"]} | {name: result[name] for name in METRICS}
    intervals = {"kl": kl["token_kl_interval"] if kl else ends["kl/chosen"]} | {name: ends[name] for name in METRICS}
    return point | {"intervals": intervals, "findings": result["findings"], "judged": result["judged"]}
