"""`dpo sweep`: the same training with several betas from one reference, and what each reward costs in KL.

Each training is an ordinary run in a folder of its own, by ``train`` itself, and is evaluated as by ``dpo eval``.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_cli.config.options import (
    RESUME_MUTABLE,
    EvalOptions,
    SweepOptions,
    TrainOptions,
    differences,
    inherit_auto_options,
)
from dpo_cli.evaluation.evaluate import evaluated
from dpo_cli.evaluation.reward import Reward, load_reward
from dpo_cli.models.loading import free_memory
from dpo_cli.reporting.frontier import frontier
from dpo_cli.reporting.plots import write_png, write_svg
from dpo_cli.reporting.text import known, percent, verdict
from dpo_cli.training.loop import train
from dpo_cli.training.setup import read_manifest, start_of, trained_with
from dpo_cli.utils.console import Reporter
from dpo_cli.utils.errors import Interrupted, UsageError
from dpo_cli.utils.files import to_json, write_json
from dpo_cli.utils.formatting import NONE, between, is_number, number, tick

SHOWN = ("loss", "rewards/margins", "rewards/accuracies")
RESULT = "sweep.json"


def sweep(options: SweepOptions, command: Sequence[str], reporter: Reporter) -> dict[str, Any]:
    """`dpo sweep`: train what is not trained yet, evaluate each run, and draw the frontier.

    Raises:
        UsageError: the options cannot be used, or are not those of the runs that are there.
        DpoError: a run or the reward failed; what was trained is kept.
        Interrupted: a signal came; a checkpoint was written.
    """
    folder = _folder(options)
    runs = {folder / f"beta-{training.beta:g}": training for training in options.runs()}
    began = _began(runs)
    reward = load_reward(options.reward) if options.reward else None
    result: dict[str, Any] = {"output": str(folder)}
    points: list[dict[str, Any]] = []
    for run, training in runs.items():
        reporter.info("sweep", f"beta {training.beta:g}, {len(points) + 1} of {len(runs)}: {run}")
        known = began.get(run) or next(iter(began.values()), None)
        _train(run, inherit_auto_options(training, known) if known else training, command, reporter)
        began[run] = trained_with(run)
        _check_same_start(run, next(iter(runs)))
        found = _evaluate(run, options, reporter)
        if not points:
            result |= _about(found, reward)
        points.append(_point(run, found, reward))
    result["points"] = points
    _write(folder, result)
    reporter.info("frontier", str(folder / "frontier.svg"))
    return result


def as_text(result: Mapping[str, Any]) -> str:
    """What a person reads: a line a run."""
    rewarded = "reward" in result
    lines = [*known(result), f"{'beta':>7}{'KL':>10}  {'95 % interval':<22}{'margin':>9}{'accuracy':>10}{'loss':>13}"]
    lines[-1] += f"{'reward':>9}  run" if rewarded else "  run"
    for point in result["points"]:
        line = f"{point['beta']:>7g}{_figures(point['kl']):>10}  {between(point['intervals']['kl'], _figures):<22}"
        accuracy = percent(point["rewards/accuracies"])
        line += f"{number(point['rewards/margins']):>9}{accuracy:>10}{number(point['loss']):>13}"
        line += f"{number(point['reward']):>9}" if rewarded else ""
        lines.append(f"{line}  {point['run']}")
    lines += ["", f"{'KL':<12}from the reference, {result['kl']['of']}, in {result['kl']['unit']}"]
    if rewarded:
        own = f"{number(result['reference_reward'])} ({between(result['reference_reward_interval'])})"
        lines.append(f"{'reward':<12}{result['reward']}; the reference's own answers have {own}")
    lines.append(f"{'frontier':<12}{Path(result['output'], 'frontier.svg')}")
    for point in result["points"]:
        lines += ["", f"beta {point['beta']:g}", *verdict(point)]
    return "\n".join(lines)


def _figures(kl: float) -> str:
    return tick(float(f"{kl:.3g}")) if is_number(kl) else NONE


# ---- the folder -------------------------------------------------------------------------------------------------


def _folder(options: SweepOptions) -> Path:
    """Where the runs are: without ``--output`` a name that the same trainings have again.

    Raises:
        UsageError: something else is there.
    """
    folder = options.output
    if folder is None:
        training = dataclasses.asdict(options.runs()[0])
        told = {name: value for name, value in training.items() if name not in RESUME_MUTABLE | {"beta"}}
        folder = Path("runs", f"sweep-{hashlib.sha256(to_json(told).encode()).hexdigest()[:8]}")
    if not folder.exists():
        return folder
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
    if names and RESULT not in names and not any(name.startswith("beta-") for name in names):
        raise UsageError(f"--output {folder}: holds something else than a sweep ({min(names)}); name another folder")
    return folder


def _began(runs: Mapping[Path, TrainOptions]) -> dict[Path, TrainOptions]:
    """What those of the runs that are there were trained with.

    Raises:
        UsageError: one was trained with other options than are asked for, or is damaged or no run.
    """
    found = {}
    for run, asked in runs.items():
        if run.exists():
            found[run] = trained_with(run)
            if changed := differences(found[run], inherit_auto_options(asked, found[run])):
                told = f"{run.name} is there and was trained otherwise"
                raise UsageError(f"--output {run.parent}: {told}: {', '.join(changed)}; name another folder")
    return found


def _check_same_start(run: Path, first: Path) -> None:
    """Refuse to compare runs of other data or another start model than the first one's.

    Raises:
        UsageError: it is one.
    """
    mine, others = read_manifest(run), read_manifest(first)
    checks = {"the data": lambda m: m["data"]["sha256"], "the start model": lambda m: start_of(m)["fingerprint"]}
    checks["the reference"] = lambda m: m["reference"]["fingerprint"]
    if changed := [what for what, of in checks.items() if of(mine) != of(others)]:
        raise UsageError(f"{run}: {' and '.join(changed)} changed since {first.name} began; name another --output")


# ---- one run ----------------------------------------------------------------------------------------------------


def _train(run: Path, options: TrainOptions, command: Sequence[str], reporter: Reporter) -> None:
    """Train a run, or go on with it; one that is trained stays as it is."""
    if (run / "model").exists():
        reporter.info("", "trained already")
        return
    try:
        train(dataclasses.replace(options, output=run), run if run.exists() else None, command, reporter)
    except Interrupted as error:
        raise Interrupted(f"{run.name}: {error}, or with the whole sweep by the same command again") from error
    finally:
        free_memory()


def _evaluate(run: Path, options: SweepOptions, reporter: Reporter) -> dict[str, Any]:
    """What ``dpo eval`` finds of a run on the held-out rows.

    Raises:
        UsageError: they are others than when the run began.
    """
    common = {f.name: getattr(options, f.name) for f in dataclasses.fields(EvalOptions) if hasattr(options, f.name)}
    asked = {"model": [str(run)], "data": options.eval_data, "beta": None, "ref_model": None, "kl": "exact"}
    done, pairs = evaluated(str(run), EvalOptions(**common | asked), reporter)
    if pairs.digest() != read_manifest(run)["held_out"]["sha256"]:
        raise UsageError(f"{run}: the held-out data changed since it began; name another --output")
    free_memory()
    return dict(done.result)


# ---- the frontier -----------------------------------------------------------------------------------------------


def _about(found: Mapping[str, Any], reward: Reward | None) -> dict[str, Any]:
    """What is true of all points: the reference is the same, and so are the prompts."""
    about = {name: found[name] for name in ("trained_on", "reference", "pairs") if name in found}
    if drawn := found.get("sequence_kl"):
        told = {name: drawn[name] for name in ("prompts", "samples", "max_new_tokens")}
        about["kl"] = {"of": "over responses that the policy draws", "unit": "nats a response"} | told
    else:
        about["kl"] = {"of": "at each token of the chosen responses", "unit": "nats a token"}
    if reward:
        mean, ends = reward.of(found["samples"], "reference_sampled")
        about |= {"reward": reward.name, "reference_reward": mean, "reference_reward_interval": ends}
    return about


def _point(run: Path, found: Mapping[str, Any], reward: Reward | None) -> dict[str, Any]:
    """One run's KL and what it buys, under the names of ``dpo eval --json``.

    Of the estimates of KL from samples it is the one of least variance, which is sound however far a low beta goes.
    """
    drawn, ends = found.get("sequence_kl"), found["intervals"]
    point = {"beta": found["beta"], "run": str(run)}
    point |= {"kl": drawn["token_kl"] if drawn else found["kl/chosen"]} | {name: found[name] for name in SHOWN}
    intervals = {"kl": drawn["token_kl_interval"] if drawn else ends["kl/chosen"]}
    intervals |= {name: ends[name] for name in SHOWN}
    if reward:
        point["reward"], intervals["reward"] = reward.of(found["samples"], "policy_sampled")
    return point | {"intervals": intervals, "findings": found["findings"], "judged": found["judged"]}


def _write(folder: Path, result: dict[str, Any]) -> None:
    plots = frontier(result["points"], result["kl"]["unit"], result.get("reference_reward"))
    write_svg(folder / "frontier.svg", plots)
    write_png(folder / "frontier.png", plots)
    write_json(folder / RESULT, result)
