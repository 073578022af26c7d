"""A run's held-out pairs: their evaluation while it trains, its report, and its best model.

Legend: P pairs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from dpo_cli.evaluation import drift
from dpo_cli.evaluation.diagnostics import judged
from dpo_cli.evaluation.drift import Compared, Recorded, Watch
from dpo_cli.evaluation.metrics import append_metrics, best_step, evaluations, read_metrics
from dpo_cli.evaluation.outcome import evaluation, loss_input, policy_read, scores_of
from dpo_cli.evaluation.scores import Evaluation, Scores, values
from dpo_cli.models.logprobs import ModelRunner
from dpo_cli.reporting.curves import write_curves
from dpo_cli.reporting.html import ReportInput, write_report
from dpo_cli.training.setup import Run, read_manifest
from dpo_cli.utils import distributed
from dpo_cli.utils.console import Reporter

T = TypeVar("T")


def _alone(action: Callable[[], T]) -> T:
    return action()


class HeldOut:
    """The held-out pairs of a run, with what the reference says of them.

    ``reference`` is its logps (P, 2) in nats, NaN where the loss reads none; an exact KL has them beside the policy's.
    Of several ranks the first one evaluates while the others wait; those of a sharded model all run the same forwards,
    and the first one writes.
    """

    def __init__(self, run: Run, reference: Tensor, reporter: Reporter) -> None:
        self.run, self.reference, self.reporter = run, reference, reporter
        self.last: tuple[int, Scores, Compared | None] | None = None  # of the last evaluation: its step and numbers
        self.recorded: Recorded | None = None
        if run.reference:
            self.recorded = run.reference.recorded
        self.weighted = run.weighted_ref_logps(run.held_out, reference)

    @property
    def metrics(self) -> Path:
        """The run's, which may get its folder's name when it begins."""
        return self.run.folder / "metrics.jsonl"

    def record(self) -> None:
        """Keep the reference's states for the exact KL of every evaluation; to be called while the model is that.

        Of a reference that is another model they were recorded when it scored.

        Raises:
            NotWrittenError: the disk has no room for them.
        """
        run = self.run
        if run.held_out and run.options.kl == "exact" and not run.reference:
            instead = "" if self.metrics.exists() else ", in place of step 0's evaluation"
            self.reporter.info("", f"one pass over the {len(run.held_out):,} held-out pairs for the exact KL{instead}")
            watch = Watch(self.reporter, "reference")
            self.recorded = drift.record(run.scorer, run.held_out, run.options.cache_dir, watch)
        if not run.options.objective.reference:
            self.reference = self.weighted = torch.full((len(run.held_out), 2), math.nan)

    def evaluate(
        self, step: int, scorer: ModelRunner, stopped: Callable[[], bool], keep: Callable[[Mapping[str, float]], None]
    ) -> dict[str, float] | None:
        """Score the pairs under the policy after ``step`` and write their line; None if it was stopped first.

        If the policy is the best so far it is made to ``keep``, which is given its metrics, before the line is there:
        what ends the process in between is made up for with the evaluation.
        """
        run, watch = self.run, Watch(self.reporter, "held out", stopped)
        scorer = dataclasses.replace(scorer)  # whatever it comes down to, training keeps its budget
        reference, compared = self.reference, None
        if self.recorded:
            same = step == 0 and run.reference is None  # the policy is the reference, whose states are there
            folder = run.options.cache_dir
            compared = drift.compare(scorer, self.recorded, run.held_out, folder, watch, policy_runs=True, same=same)
            policy = compared.logps if compared else None
        else:
            policy = drift.score(scorer, run.held_out, watch)
        if policy is None:
            return None
        objective = run.options.objective
        if compared and not objective.reference:
            reference = compared.ref_logps
        agreed = distributed.on_rank_0 if scorer.sharded else _alone
        history = agreed(self._history)
        read = loss_input(policy_read(scorer, run.held_out, objective), self.weighted)
        scores = scores_of(run.held_out, policy, reference, objective, compared, read, history)
        found, known = agreed(lambda: values(scores)), evaluations(history)
        if (metric := run.options.save_best) and best_step(known | {step: found}, metric) == step:
            keep(found)
        if step not in known and distributed.rank() == 0:
            append_metrics(self.metrics, step, found, "eval_")
        self.last = step, scores, compared
        return found

    def _history(self) -> list[dict[str, Any]]:
        return read_metrics(self.metrics)

    def write_report(self, samples: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
        """Write the run's report and curves, as far as it has come; return ``findings`` and what was ``judged``.

        What goes wrong there is reported, and ends no training.
        """
        found: dict[str, Any] = {}
        run, objective = self.run, self.run.options.objective
        try:
            history, manifest = read_metrics(self.metrics), read_manifest(run.folder)
            done = self._evaluation(history, samples)
            result = done.result if done else {"findings": [], "judged": judged(0)}
            found = {name: result[name] for name in ("findings", "judged")}
            options = dataclasses.asdict(run.options)
            about = ReportInput(run.folder.name, done, history, manifest, options, objective)
            write_report(run.folder / "report.html", about)
            write_curves(run.folder / "curves.png", history, objective)
        except Exception as error:  # of the libraries that draw, too
            self.reporter.warning(f"the report of {run.folder} is not up to date: {error}")
        return found

    def _evaluation(self, history: Sequence[dict[str, Any]], samples: Sequence[Mapping[str, Any]]) -> Evaluation | None:
        """All that the last evaluation tells, with the answers that are to be shown beside it."""
        if self.last is None:
            return None
        (step, scores, compared), run = self.last, self.run
        done = evaluation(scores, compared, run.held_out, run.tokenizer, history, trained_on=run.trained_on)
        about: dict[str, Any] = {"step": step, "pairs": len(run.held_out), "beta": run.options.beta}
        about["reference"] = (run.reference.source if run.reference else run.source).description
        shown = {"samples": list(samples)} if samples else {}
        return dataclasses.replace(done, result=about | done.result | shown)
