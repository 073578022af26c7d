"""What a run yields: evaluations of its held-out pairs, its report, its exported models, and the printed result."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch.optim import Optimizer
from transformers import PreTrainedModel

from dpo_cli.data.tokenize import reasons
from dpo_cli.evaluation import kl
from dpo_cli.evaluation.diagnostics import judge
from dpo_cli.evaluation.evaluator import Evaluator
from dpo_cli.evaluation.generation import generate, text
from dpo_cli.evaluation.metrics import PairScores
from dpo_cli.evaluation.metrics_log import best_step, evaluations, read_metrics
from dpo_cli.hub.export import NotReadBackError, export_model, response_logps
from dpo_cli.hub.model_card import model_card
from dpo_cli.models.adapter_files import save_adapter
from dpo_cli.models.attention import attention
from dpo_cli.models.loading import export_dtype, load_model, release
from dpo_cli.models.logprobs import ModelRunner
from dpo_cli.models.split_weights import fp32_weights
from dpo_cli.reporting.html import ReportInput, write_report
from dpo_cli.reporting.plots import curves, write_plots
from dpo_cli.training.run_dir import read_manifest
from dpo_cli.training.setup import Run
from dpo_cli.training.trackers import MetricsLog
from dpo_cli.utils.errors import UsageError

ANSWER_TOKENS = 80  # most of an answer that is shown


class HeldOut:
    """The held-out pairs of a run: their evaluation while it trains, and its report.

    Rank 0 evaluates while the others wait; the ranks of a sharded model all run the same forwards, and rank 0 writes.
    """

    def __init__(self, run: Run, log: MetricsLog) -> None:
        self.run, self.log = run, log
        self.evaluator = Evaluator(run.held_out, run.tokenizer, run.options.objective)
        self.last: tuple[int, PairScores, kl.TokenScores] | None = None  # the last evaluation, by its step
        logps, weighted = (table[len(run.used) :].double().numpy() for table in (run.scores.logps, run.scores.weighted))
        self.ref_logps = logps, weighted

    def evaluate(
        self, step: int, runner: ModelRunner, stopped: Callable[[], bool], keep: Callable[[Mapping[str, float]], None]
    ) -> dict[str, float] | None:
        """Evaluate the policy after ``step`` and write its metrics; None if stopped.

        If the policy is the best so far, ``keep`` is called with its metrics before they are written, so that an
        interruption in between repeats both.
        """
        run, progress = self.run, kl.Progress(self.run.reporter, "held out", stopped)
        runner = dataclasses.replace(runner)  # a smaller token budget here must not change that of training
        try:
            if run.recorded:
                same = step == 0 and run.reference is run.policy  # the policy is the reference, whose states are there
                tokens = kl.compare(runner, run.recorded, run.held_out, progress, policy_runs=True, same=same)
            else:
                tokens = kl.score(runner, run.held_out, progress)
        except kl.Stopped:
            return None
        on_rank_0 = runner.parallel.on_rank_0
        history = on_rank_0(lambda: read_metrics(self.log.file))
        scores = self.evaluator.scores(tokens, self.ref_logps, history)
        metrics, earlier = on_rank_0(scores.means), evaluations(history)
        if (metric := run.options.save_best) and best_step(earlier | {step: metrics}, metric) == step:
            keep(metrics)
        if step not in earlier:
            self.log.write(step, metrics, "eval_")
        self.last = step, scores, tokens
        return metrics

    def write_report(self, samples: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
        """Write the run's report and curves as of now; return ``findings`` and ``judged``.

        An error is reported and does not end the training.
        """
        run, result = self.run, None
        try:
            history = read_metrics(self.log.file)
            if self.last:
                step, scores, tokens = self.last
                reference = run.reference.source.description
                about = {"step": step, "pairs": len(run.held_out), "beta": run.options.beta, "reference": reference}
                answers = [dict(sample) for sample in samples]
                result = self.evaluator.result(
                    scores, tokens, history, trained_on=run.trained_on, about=about, samples=answers
                )
            options, objective = dataclasses.asdict(run.options), run.options.objective
            about_run = ReportInput(run.folder.name, result, history, read_manifest(run.folder), options, objective)
            write_report(run.folder / "report.html", about_run)
            write_plots(run.folder / "curves.png", curves(history, objective))
        except Exception as error:  # also of the libraries that draw
            run.reporter.warning(f"the report of {run.folder} is not up to date: {error}")
        return {"findings": result.findings if result else [], "judged": result.judged if result else judge(0)}


def export(run: Run, optimizer: Optimizer, name: str, step: int, after: Mapping[str, float] | None = None) -> None:
    """Write the policy as it is after ``step`` to a folder of the run; ``after`` are its metrics if not yet written.

    Of an adapter that is the adapter alone, unless it is to be merged: into a base that is loaded again, because taking
    it out of its own again would round that.

    Raises:
        NotReadBackError: what was written is not what was trained.
    """
    runner, source = run.policy.runner, run.policy.source
    metrics = evaluations(read_metrics(run.folder / "metrics.jsonl"))
    card = model_card(run, metrics.get(0, {}), after or metrics.get(step, {}))
    by_length = sorted(run.used, key=run.costs.__getitem__)
    pair, dtype = run.pairs[by_length[len(by_length) // 2]], export_dtype(run.options.export_dtype, source)
    about: dict[str, Any] = {"source": source, "pair": pair, "dtype": dtype, "warn": runner.warn}
    try:
        if run.options.export == "merged":
            model = _merged(run)
            export_model(run.folder / name, model, run.tokenizer, card, **about)
            release(model)
            return
        model = run.policy.model
        with attention(model, run.policy.own_attention):
            apart = runner.parallel.sharded and runner.chunked_lm_head
            expected = response_logps(model, pair, runner.dtype, apart), runner.dtype
            with fp32_weights(model, optimizer):
                export_model(run.folder / name, model, run.tokenizer, card, expected=expected, **about)
    except NotReadBackError as error:
        raise NotReadBackError(f"{error}. The trained weights are in {run.folder / 'checkpoints'}") from error


def _merged(run: Run) -> PreTrainedModel:
    """The base, loaded again, with the trained adapter merged into it."""
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(run.policy.model, Path(folder))
        source = dataclasses.replace(run.policy.source, adapter=Path(folder), attached=False, checkpoint=None)
        try:
            model = load_model(source)
        except UsageError as error:
            reason = str(error).removeprefix("--model ").replace(folder, "the trained adapter")
            raise NotReadBackError(f"--export merged: {reason}") from error
    model.generation_config = run.policy.model.generation_config
    return model


def answer(run: Run) -> list[str]:
    """Answer the first held-out prompts greedily, as many as are shown."""
    responses = generate(
        run.policy.model,
        run.tokenizer,
        [pair.prompt for pair in run.held_out[: run.options.show_answers]],
        run.policy.own_attention,
        ANSWER_TOKENS,
        sampled=False,
        max_tokens=run.policy.runner.max_tokens,
        dtype=run.policy.runner.dtype,
    )
    return [text(run.tokenizer, response) for (response,) in responses]


def summary(run: Run, first_answers: list[str]) -> dict[str, Any]:
    """Return what ``dpo train --json`` prints of a finished run."""
    scores = evaluations(read_metrics(run.folder / "metrics.jsonl"))
    shown = zip(run.held_out, first_answers, answer(run), strict=False)
    return {
        "trained_on": run.trained_on,
        "run": str(run.folder),
        "model": str(run.folder / "model"),
        "report": str(run.folder / "report.html"),
        "rows": len(run.pairs) + len(run.held_out) + len(run.refused),
        "refused": reasons(run.refused),
        "pairs": len(run.pairs),
        "held_out": len(run.held_out),
        "steps": len(run.plan),
        "before": scores.get(0, {}),
        "after": scores.get(len(run.plan), {}),
        "answers": [
            {"prompt": run.tokenizer.decode(pair.prompt), "reference": first, "policy": last}
            for pair, first, last in shown
        ],
    }
