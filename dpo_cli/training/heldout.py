"""A run's held-out pairs: their evaluation while it trains, its report, and its best model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpo_cli.evaluation import kl
from dpo_cli.evaluation.diagnostics import judge
from dpo_cli.evaluation.evaluator import Evaluator
from dpo_cli.evaluation.metrics import PairScores, append_metrics, best_step, evaluations, read_metrics
from dpo_cli.models.logprobs import ModelRunner
from dpo_cli.reporting.html import ReportInput, write_report
from dpo_cli.reporting.plots import curves, write_plots
from dpo_cli.training.run_dir import read_manifest
from dpo_cli.training.setup import Run
from dpo_cli.utils import distributed
from dpo_cli.utils.console import Reporter


class HeldOut:
    """The held-out pairs of a run, with the reference's log-probs from the cache, see ``Evaluator.scores``.

    Rank 0 evaluates while the others wait; the ranks of a sharded model all run the same forwards, and rank 0 writes.
    """

    def __init__(self, run: Run, reference: Tensor, reporter: Reporter) -> None:
        self.run, self.reporter = run, reporter
        self.evaluator = Evaluator(run.held_out, run.tokenizer, run.options.objective)
        self.last: tuple[int, PairScores, kl.TokenScores] | None = None  # the last evaluation, by its step
        self.recorded = run.recorded
        if run.cache is None:  # the loss reads none
            reference = torch.full_like(reference, torch.nan)
        weighted = run.weighted_ref_logps(run.held_out, reference)
        self.ref_logps = reference.double().numpy(), weighted.double().numpy()

    @property
    def metrics(self) -> Path:
        """The run's, whose folder may get its name only when it begins."""
        return self.run.folder / "metrics.jsonl"

    def record(self) -> None:
        """Keep the reference's states for the exact KL of every evaluation; to be called while the model is that.

        The states of a reference that is another model were recorded when it was scored.

        Raises:
            NotWrittenError: the disk has no room for them.
        """
        run = self.run
        if run.held_out and run.options.kl == "exact" and run.reference is run.policy:
            instead = "" if self.metrics.exists() else ", in place of step 0's evaluation"
            self.reporter.info("", f"one pass over the {len(run.held_out):,} held-out pairs for the exact KL{instead}")
            progress = self.reporter.progress("reference", len(run.held_out))
            self.recorded = kl.record(run.runner, run.held_out, run.options.cache_dir, progress)

    def evaluate(
        self, step: int, runner: ModelRunner, stopped: Callable[[], bool], keep: Callable[[Mapping[str, float]], None]
    ) -> dict[str, float] | None:
        """Evaluate the policy after ``step`` and append its metrics; None if stopped.

        If the policy is the best so far, ``keep`` is called with its metrics before they are written, so that an
        interruption in between repeats both.
        """
        run = self.run
        progress = self.reporter.progress("held out", len(run.held_out), stopping=stopped)
        runner = dataclasses.replace(runner)  # a smaller token budget here must not change that of training
        try:
            if self.recorded:
                same = step == 0 and run.reference is run.policy  # the policy is the reference, whose states are there
                tokens = kl.compare(runner, self.recorded, run.held_out, progress, policy_runs=True, same=same)
            else:
                tokens = kl.score(runner, run.held_out, progress)
        except kl.Stopped:
            return None
        on_rank_0 = runner.parallel.on_rank_0
        history = on_rank_0(lambda: read_metrics(self.metrics))
        scores = self.evaluator.scores(tokens, self.ref_logps, history)
        metrics, earlier = on_rank_0(scores.means), evaluations(history)
        if (metric := run.options.save_best) and best_step(earlier | {step: metrics}, metric) == step:
            keep(metrics)
        if step not in earlier and distributed.rank() == 0:
            append_metrics(self.metrics, step, metrics, "eval_")
        self.last = step, scores, tokens
        return metrics

    def write_report(self, samples: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
        """Write the run's report and curves as of now; return ``findings`` and ``judged``.

        An error is reported and does not end the training.
        """
        run, result = self.run, None
        try:
            history = read_metrics(self.metrics)
            if self.last:
                step, scores, tokens = self.last
                reference = run.reference.source.description
                about = {"step": step, "pairs": len(run.held_out), "beta": run.options.beta, "reference": reference}
                result = self.evaluator.evaluation(scores, tokens, history, about, run.trained_on, samples=samples)
            options, objective = dataclasses.asdict(run.options), run.options.objective
            about_run = ReportInput(run.folder.name, result, history, read_manifest(run.folder), options, objective)
            write_report(run.folder / "report.html", about_run)
            write_plots(run.folder / "curves.png", curves(history))
        except Exception as error:  # also of the libraries that draw
            self.reporter.warning(f"the report of {run.folder} is not up to date: {error}")
        verdict = result.result if result else {"findings": [], "judged": judge(0)}
        return {name: verdict[name] for name in ("findings", "judged")}
