"""The loop: a run from its first step, or its last checkpoint, to a trained model."""

from __future__ import annotations

import dataclasses
import hashlib
import shlex
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate.utils import set_seed

from dpo_cli.config.options import TrainOptions
from dpo_cli.evaluation import kl
from dpo_cli.evaluation.diagnostics import judge
from dpo_cli.evaluation.evaluator import Evaluator
from dpo_cli.evaluation.metrics import PairScores, best_step, evaluations, read_metrics, step_rewards, truncate_metrics
from dpo_cli.hub.export import NotReadBackError
from dpo_cli.models.noise import excess, float32_hint
from dpo_cli.models.parallel import reshard
from dpo_cli.reference.store import lookup_cached
from dpo_cli.reporting.html import ReportInput, write_report
from dpo_cli.reporting.plots import curves, write_plots
from dpo_cli.training.checkpoint import newest_checkpoint, restore_checkpoint, save_checkpoint
from dpo_cli.training.optimizer import SPLIT_MODES, compile_updates, learning_rate, make_optimizer
from dpo_cli.training.results import answer, export, summary
from dpo_cli.training.run_dir import begin, check_same_run, make_manifest, read_manifest, trained_with
from dpo_cli.training.setup import Run, prepare_run, record_reference, report_time, score_reference
from dpo_cli.training.step import Trainer, compare_with_reference
from dpo_cli.training.trackers import MetricsLog, check_installed
from dpo_cli.utils import distributed
from dpo_cli.utils.console import Reporter, format_metrics
from dpo_cli.utils.errors import DpoError, Interrupted, NotWrittenError, plural
from dpo_cli.utils.files import LOCK, file_lock, remove_leftovers, sync


def train(
    options: TrainOptions, resume: Path | None, command: Sequence[str], reporter: Reporter, dry_run: bool = False
) -> dict[str, Any]:
    """`dpo train`: from options to a trained model in a run folder.

    Raises:
        UsageError: the input cannot be used; nothing was written but reference log-probs.
        DpoError: the run failed; its last checkpoint is untouched.
        Interrupted: a signal came; a checkpoint was written.
    """
    folders: list[Path] = [resume] if resume else []  # the run's, once it exists

    def saved() -> str:
        return f"what was saved is whole. {_how_to_resume(folders[0])}" if folders else "nothing was trained yet"

    with distributed.started(saved, options.device) as device, ExitStack() as holding:
        distributed.check_same_command(options, str(resume), str(dry_run))
        if resume and not dry_run:
            distributed.on_rank_0(lambda: holding.enter_context(file_lock(resume / LOCK)))
        if resume:
            trained_with(resume)  # which refuses options that were changed
        distributed.on_rank_0(lambda: check_installed(options))
        alone = options.device == "auto" and distributed.world_size() == 1
        if alone and (count := torch.accelerator.device_count()) > 1:
            launch = shlex.join(["torchrun", "--nproc-per-node", str(count), "-m", "dpo_cli", *command[1:]])
            reporter.info("hint", f"{count} GPUs are visible and one is used; to use all: {launch}")
        set_seed(options.seed)
        run = prepare_run(options, resume, device, reporter, dry_run)
        if dry_run:
            missing = lookup_cached(run.cache, run.scored(), reporter)[1] if run.cache else []
            report_time(run, run.scored().select(missing))
            return {"pairs": len(run.pairs), "steps": len(run.plan), "reference_misses": len(missing)}
        manifest = make_manifest(run, command)
        _complete_manifest(run, manifest, bool(resume))
        trainer = make_trainer(run)
        _check_step_0(trainer, run)
        parallel = trainer.runner.parallel
        first_answers = parallel.run(partial(answer, run))
        if run.reference is run.policy:  # else it was recorded when it scored
            record_reference(run)
        stop = holding.enter_context(StopSignal())
        if not resume:
            distributed.on_rank_0(lambda: holding.enter_context(begin(run, manifest)))
            folders.append(run.folder)
        done = _restore(run, trainer) if resume else 0
        log = holding.enter_context(closing(MetricsLog(run.folder, run.options, reporter, done)))
        loop = _Loop(run, trainer, log, stop)
        try:
            loop.run_from(done)
            parallel.run(partial(export, run, trainer.optimizer, "model", len(run.plan)))
        except NotWrittenError as error:
            raise NotWrittenError(f"{error}. What was saved before is whole. {_how_to_resume(run.folder)}") from error
        if stop.requested:
            reporter.warning("the signal came when all was trained: the run is complete")
        result = distributed.on_rank_0(lambda: summary(run, first_answers))
        return result | distributed.on_rank_0(lambda: loop.write_report(result["answers"]))


def _how_to_resume(folder: Path) -> str:
    return f"Continue with: dpo train --resume {shlex.quote(str(folder))}"


def _complete_manifest(run: Run, manifest: dict[str, Any], resumed: bool) -> None:
    """Let the reference score, unless the run began with other data or weights; add the hash of its values."""
    began = manifest
    if resumed:
        began = distributed.on_rank_0(lambda: check_same_run(run.folder, manifest, run.reporter.warning))
    if run.reference is run.policy:  # else it has scored
        score_reference(run)
    manifest["reference"]["values"] = hashlib.sha256(run.scores.logps.numpy().tobytes()).hexdigest()
    if began["reference"]["values"] != manifest["reference"]["values"]:
        run.reporter.warning("the reference was recomputed since the run began: the last bits may differ")


def make_trainer(run: Run) -> Trainer:
    """Make what a step needs of a run whose reference has scored."""
    model, tables = run.policy.model, torch.full((2, len(run.pairs), 2), torch.nan)  # NaN for pairs that no step reads
    tables[0, run.used], tables[1, run.used] = run.scores.logps[: len(run.used)], run.scores.weighted[: len(run.used)]
    if run.options.gradient_checkpointing:
        # transformers 5.23 renamed it, and 5.17 has only the old name
        new = getattr(model, "activation_checkpointing_enable", None)
        (new or model.gradient_checkpointing_enable)({"use_reentrant": False})
    low, run.policy.low = run.policy.low, None  # the optimizer's from now on
    reshard(model)
    memory = run.memory_choice.memory
    betas = run.options.adam_beta1, run.options.adam_beta2
    if memory in SPLIT_MODES and run.device.type == "cuda":
        compile_updates(run.device, memory, run.reporter.warning)
    return Trainer(
        runner=dataclasses.replace(run.policy.runner, max_tokens=run.memory_choice.max_tokens),  # scoring may lower it
        optimizer=make_optimizer(model, run.options.weight_decay, memory, low, betas),
        pairs=run.pairs,
        costs=run.costs,
        ref_logps=tables[0],
        weighted_ref_logps=tables[1],
        options=run.options,
        num_experts_per_tok=run.experts,
    )


def _restore(run: Run, trainer: Trainer) -> int:
    """Bring the run back to its newest whole checkpoint, or its start where there is none; returns the steps done."""
    checkpoints, metrics, reporter = run.folder / "checkpoints", run.folder / "metrics.jsonl", run.reporter
    newest = distributed.on_rank_0(lambda: newest_checkpoint(checkpoints, reporter.warning))
    done = 0
    if newest is None:
        reporter.info("resume", f"from the start: no whole checkpoint in {checkpoints}")
    else:
        checkpoint, done = newest
        trainer.runner.max_tokens = restore_checkpoint(checkpoint, run.policy.model, trainer.optimizer)
        reporter.info("resume", f"after step {done} of {len(run.plan)}, from {checkpoint}")
    distributed.on_rank_0(lambda: remove_leftovers(run.folder))
    distributed.on_rank_0(lambda: truncate_metrics(metrics, done))
    trainer.mean_rewards = distributed.on_rank_0(lambda: step_rewards(read_metrics(metrics)))
    return done


def _check_step_0(trainer: Trainer, run: Run) -> None:
    """Before the first step policy and reference are equal, and every margin is 0: a check of the cache, too.

    With another model as the reference the starting point is only reported.
    """
    indices = [i for micro_batch in run.plan[0] for i in micro_batch]
    values, differences, tokens = compare_with_reference(trainer, indices)
    largest, runner = float((differences.abs() / tokens.sqrt()).max()), trainer.runner
    metrics = f"loss {values['loss']:.6f}  margin {values['rewards/margins']:.6f}"
    if run.cache is None:
        about = f"{trainer.objective.name} reads no reference"
    elif run.reference.fingerprint != run.policy.fingerprint:
        about = f"policy and reference are two models, up to {largest:.3g} nats apart per root of a response's tokens"
    elif excess(differences, tokens, runner.noise) > 1:
        cause = f"The cached reference does not fit this model: remove {run.cache.folder}"
        if run.options.lora_rank and not run.policy.source.adapter:
            cause = (
                "The adapter that was attached changes what the model computes: name other --lora-targets or "
                f"--modules-to-save; if that does not help, remove the cached reference, {run.cache.folder}"
            )
        raise DpoError(
            f"step 0: {metrics}, but policy and reference are the same model: the margin must be 0, and a response is "
            f"off by {largest:.2g} nats per root of its tokens. {cause}{float32_hint(runner.dtype)}"
        )
    else:
        about = f"check passed: policy and cached reference are equal on its {plural(len(indices), 'pair')}"
    run.reporter.info("step 0", f"{metrics}  ({about})")


class StopSignal:
    """SIGINT and SIGTERM as a flag that the loop reads between micro-batches; a second signal ends the process at once.

    In an interactive session, whose variables outlive a run, the second signal raises KeyboardInterrupt. Outside the
    main thread signals are left alone. After an error on one of several ranks SIGTERM is ignored: the launcher sends it
    when another rank has ended, and it would hide the message of the error.
    """

    requested = False

    def __enter__(self) -> StopSignal:
        handled = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
        self.before = {number: signal.signal(number, self._receive) for number in handled}
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        for number, handler in self.before.items():
            ignored = error is not None and number == signal.SIGTERM and distributed.world_size() > 1
            signal.signal(number, signal.SIG_IGN if ignored else handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        for each in self.before:
            signal.signal(each, signal.default_int_handler if hasattr(sys, "ps1") else signal.SIG_DFL)


def _due(every: int, last: int) -> set[int]:
    """Return the steps at which something is due: multiples of ``every``, if it is not 0, and the last."""
    return {*range(every, last, every), last} if every else {last}


@dataclasses.dataclass
class _Loop:
    """A run's steps, with the evaluations of its held-out pairs, its report and checkpoints in between."""

    run: Run
    trainer: Trainer
    log: MetricsLog
    stop: StopSignal

    def __post_init__(self) -> None:
        run = self.run
        self.evaluator = Evaluator(run.held_out, run.tokenizer, run.options.objective)
        held_out = [table[len(run.used) :].double().numpy() for table in (run.scores.logps, run.scores.weighted)]
        self.ref_logps = held_out[0], held_out[1]
        self.last: tuple[int, PairScores, kl.TokenScores] | None = None  # the last evaluation, by its step

    def run_from(self, done: int) -> None:
        """Take all steps after ``done``, and every evaluation that is due and not in the metrics yet.

        A checkpoint that is due is written before the evaluation of its step, so that a failed one costs no training.
        """
        run, options, total = self.run, self.run.options, len(self.run.plan)
        evaluated = distributed.on_rank_0(lambda: set(evaluations(read_metrics(self.log.file))))
        saves, evaluates = _due(options.save_steps, total), _due(options.eval_steps, total) | {0}
        evaluates -= evaluated - {total}  # the last one is in the report
        with run.reporter.progress(
            "train", total, done, options.logging_steps, stopping=lambda: self.stop.requested
        ) as progress:
            for step in range(done, total + 1):
                if step > done:
                    planned, started = run.plan[step - 1], time.monotonic()
                    if distributed.all_reduce_max([self.stop.requested])[0]:
                        raise self._interrupted(step - 1)
                    micro_batches, lr = self.trainer.micro_batches(planned), learning_rate(step, total, options)
                    metrics = self.trainer.step(planned, micro_batches, lr, self.stop)
                    if metrics is None:
                        raise self._interrupted(step - 1)
                    seconds = time.monotonic() - started
                    self.log.write(step, metrics)
                    tokens = run.count_tokens([planned])
                    progress.advance(1, metrics | {"tokens_per_second": tokens / seconds})
                    if step in saves:
                        self._save(step)
                if run.held_out and step in evaluates and not self._evaluate(step):
                    raise self._interrupted(step)

    def _evaluate(self, step: int) -> bool:
        """Evaluate the policy and report it; False if a signal came first.

        Rank 0 evaluates while the others wait; the ranks of a sharded model all run the same forwards.
        """
        run, parallel = self.run, self.trainer.runner.parallel
        try:
            metrics = parallel.run(partial(self._score, step))
        except NotReadBackError:
            self._save(step)
            raise
        if metrics is None:
            return False
        run.reporter.info("held out", f"step {step}: {format_metrics(metrics)}", {"step": step} | metrics)
        if step < len(run.plan) and distributed.rank() == 0:  # the last one's is written when the run is complete
            self.write_report()
        return True

    def _score(self, step: int) -> dict[str, float] | None:
        """Score the held-out pairs and write their metrics; None if a signal came first.

        A policy that is the best so far is exported before its metrics are written, so that an interruption in between
        repeats both.
        """
        run, parallel = self.run, self.trainer.runner.parallel
        progress = run.reporter.progress("held out", len(run.held_out), stopping=lambda: self.stop.requested)
        runner = dataclasses.replace(self.trainer.runner)  # a smaller budget here must not change that of training

        def stopped() -> bool:
            return parallel.any(self.stop.requested)

        try:
            if run.recorded:
                same = step == 0 and run.reference is run.policy  # the policy is the recorded reference
                compare = partial(kl.compare, policy_runs=True, same=same, stopped=stopped)
                tokens = compare(runner, run.recorded, run.held_out, progress)
            else:
                tokens = kl.score(runner, run.held_out, progress, stopped)
        except kl.Stopped:
            return None
        history = parallel.on_rank_0(lambda: read_metrics(self.log.file))
        scores = self.evaluator.scores(tokens, self.ref_logps, history)
        metrics, earlier = parallel.on_rank_0(scores.means), evaluations(history)
        if (metric := run.options.save_best) and best_step(earlier | {step: metrics}, metric) == step:
            export(run, self.trainer.optimizer, "best", step, metrics)
        if step not in earlier:
            self.log.write(step, metrics, "eval_")
        self.last = step, scores, tokens
        return metrics

    def write_report(self, samples: Sequence[Mapping[str, Any]] = ()) -> dict[str, Any]:
        """Write the run's report and curves as of now; return ``findings``, ``judged`` and ``verdict``.

        An error is reported and does not end the training.
        """
        run, result = self.run, None
        try:
            history = read_metrics(self.log.file)
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
            run.reporter.warning(f"the report of {run.folder} is not up to date: {error}")
        shown = result.result if result else {"findings": [], "judged": judge(0), "verdict": []}
        return {name: shown[name] for name in ("findings", "judged", "verdict")}

    def _save(self, step: int) -> None:
        if self.log.file.exists() and distributed.rank() == 0:
            sync(self.log.file)  # its lines last as long as the checkpoint
        max_tokens, keep = self.trainer.runner.max_tokens, self.run.options.save_total_limit
        checkpoints, model = self.run.folder / "checkpoints", self.run.policy.model
        save_checkpoint(checkpoints, step, model, self.trainer.optimizer, max_tokens, keep)

    def _interrupted(self, step: int) -> Interrupted:
        self._save(step)
        message = f"interrupted after step {step} of {len(self.run.plan)}; a checkpoint was written"
        return Interrupted(f"{message}. {_how_to_resume(self.run.folder)}")
