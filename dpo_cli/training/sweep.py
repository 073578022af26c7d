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
from dpo_cli.reporting.text import format_interval, number, overlap_lines, percent, verdict_lines
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
    folder = options.output or Path("runs", "sweep")
    names = [path.name for path in folder.glob("*")]
    if folder.is_file() or (names and RESULT not in names and not any(name.startswith("beta-") for name in names)):
        raise UsageError(f"--output {folder}: it holds something other than a sweep; choose another folder")
    runs = {folder / f"beta-{training.beta:g}": training for training in options.runs()}
    started = {run: trained_with(run) for run in runs if run.exists()}
    for run, began in started.items():
        if changed := differences(began, inherit_auto_options(runs[run], began)):
            changes = f"{run.name} exists with other options: {', '.join(changed.values())}"
            raise UsageError(f"--output {folder}: {changes}; choose another folder")
    evaluations: dict[Path, dict[str, Any]] = {}
    first = next(iter(runs))
    for run, training in runs.items():
        reporter.info("sweep", f"beta {training.beta:g}, {len(evaluations) + 1} of {len(runs)}: {run}")
        like = started.get(run) or next(iter(started.values()), None)
        _train(run, inherit_auto_options(training, like) if like else training, command, reporter)
        started[run] = trained_with(run)
        expected = _starting_point(first)
        if moved := [name for name, value in _starting_point(run).items() if value != expected[name]]:
            raise UsageError(f"{run}: {' and '.join(moved)} changed since {first.name} began; choose another --output")
        evaluations[run] = _evaluate(run, options, reporter)
    about = evaluations[first]
    result: dict[str, Any] = {"output": str(folder)}
    result |= {name: about[name] for name in ("trained_on", "reference", "pairs") if name in about}
    if "sequence_kl" in about:
        result["kl"] = {"of": "over responses sampled from the policy", "unit": "nats per response"}
        result["kl"] |= {name: about["sequence_kl"][name] for name in ("prompts", "samples", "max_new_tokens")}
    else:
        result["kl"] = {"of": "at each token of the chosen responses", "unit": "nats per token"}
    points = result["points"] = [_point(run, evaluation) for run, evaluation in evaluations.items()]
    for name in ("frontier.svg", "frontier.png"):
        write_plots(folder / name, frontier(points, result["kl"]["unit"]))
    write_json(folder / RESULT, result)
    reporter.info("frontier", str(folder / "frontier.svg"))
    return result


def as_text(result: Mapping[str, Any]) -> str:
    """A line per run, for a terminal."""
    head = f"{'beta':>7}{'KL':>10}  {'95 % interval':<22}" + "".join(f"{name:>20}" for name in METRICS)
    lines = [*overlap_lines(result), f"{head}  run"]
    for point in result["points"]:
        cells = [percent(point[m]) if m == "rewards/accuracies" else number(point[m]) for m in METRICS]
        line = f"{point['beta']:>7g}{number(point['kl']):>10}  {format_interval(point['intervals']['kl']):<22}"
        lines.append(line + "".join(f"{cell:>20}" for cell in cells) + f"  {point['run']}")
    lines += ["", f"{'KL':<12}from the reference, {result['kl']['of']}, in {result['kl']['unit']}"]
    lines.append(f"{'frontier':<12}{Path(result['output'], 'frontier.svg')}")
    for point in result["points"]:
        lines += ["", f"beta {point['beta']:g}", *verdict_lines(point)]
    return "\n".join(lines)


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


def _evaluate(run: Path, options: SweepOptions, reporter: Reporter) -> dict[str, Any]:
    """Evaluate a run on the held-out rows, as ``dpo eval`` does; refuse rows other than it began with."""
    common = {f.name: getattr(options, f.name) for f in dataclasses.fields(EvalOptions) if hasattr(options, f.name)}
    own = {"model": [str(run)], "data": options.eval_data, "beta": None, "ref_model": None, "kl": "exact"}
    evaluation, pairs = evaluate(str(run), EvalOptions(**common | own), reporter)
    if pairs.digest() != read_manifest(run)["held_out"]["sha256"]:
        raise UsageError(f"{run}: the held-out data changed since it began; choose another --output")
    free_memory()
    return evaluation.result


def _point(run: Path, found: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's KL, margin, accuracy and findings, named as in ``dpo eval --json``."""
    kl, kl_interval = found["kl/chosen"], found["intervals"]["kl/chosen"]
    if "sequence_kl" in found:
        kl, kl_interval = (found["sequence_kl"][name] for name in ("token_kl", "token_kl_interval"))
    return {
        "beta": found["beta"],
        "run": str(run),
        "kl": kl,
        **{name: found[name] for name in METRICS},
        "intervals": {"kl": kl_interval} | {name: found["intervals"][name] for name in METRICS},
        "findings": found["findings"],
        "judged": found["judged"],
    }
