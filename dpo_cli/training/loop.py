"""The loop: a run from its first step, or its last checkpoint, to a trained model."""

from __future__ import annotations

import dataclasses
import hashlib
import shlex
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from torch import Tensor

from dpo_cli.config.options import TrainOptions
from dpo_cli.evaluation.metrics import append_metrics, evaluations, read_metrics, step_rewards, truncate_metrics
from dpo_cli.hub.export import NotReadBackError
from dpo_cli.models.logprobs import logp_tolerance
from dpo_cli.models.parallel import reshard
from dpo_cli.reference.store import fill_reference, report_cached
from dpo_cli.training.checkpoint import newest_checkpoint, restore_checkpoint, save_checkpoint
from dpo_cli.training.finish import answer, export, summary
from dpo_cli.training.heldout import HeldOut
from dpo_cli.training.interrupt import StopSignal
from dpo_cli.training.optimizer import learning_rate, make_optimizer
from dpo_cli.training.run_dir import LOCK, begin, check_same_run, make_manifest, trained_with
from dpo_cli.training.setup import Run, prepare_run
from dpo_cli.training.step import Trainer, compare_with_reference
from dpo_cli.training.trackers import Trackers, check_installed
from dpo_cli.utils import distributed
from dpo_cli.utils.console import Reporter, brief
from dpo_cli.utils.errors import DpoError, Interrupted, NotWrittenError
from dpo_cli.utils.files import file_lock, remove_leftovers, sync


def train(
    options: TrainOptions, resume: Path | None, command: Sequence[str], reporter: Reporter, dry_run: bool = False
) -> dict[str, Any]:
    """`dpo train`: from options to a trained model in a run folder.

    Raises:
        UsageError: the input cannot be used; nothing was written but reference log-probs.
        DpoError: the run failed; its last checkpoint is untouched.
        Interrupted: a signal came; a checkpoint was written.
    """
    folders: list[Path] = [resume] if resume else []  # the run's, once it is there
    with distributed.started(lambda: _what_is_saved(folders)) as device, ExitStack() as holding:
        _check_start(options, resume, command, reporter, dry_run, holding)
        set_seed(options.seed)
        run = prepare_run(options, resume, device, reporter, dry_run)
        if dry_run:
            missing = report_cached(run.cache, run.scored(), reporter)[1] if run.cache else []
            return {"pairs": len(run.pairs), "steps": len(run.plan), "reference_misses": len(missing)}
        manifest = make_manifest(run, command, distributed.world_size())
        began = manifest
        if resume:
            began = distributed.on_rank_0(lambda: check_same_run(run.folder, manifest, reporter.warning))
        ref_logps = reference_logps(run, reporter)
        manifest["reference"]["values"] = hashlib.sha256(ref_logps.numpy().tobytes()).hexdigest()
        if began["reference"]["values"] != manifest["reference"]["values"]:
            reporter.warning("the reference was recomputed since the run began: the last bits may differ")
        trainer = make_trainer(run, ref_logps)
        _check_step_0(trainer, run, reporter)
        parallel = trainer.runner.parallel
        first_answers = parallel.run(partial(answer, run))
        held_out = HeldOut(run, ref_logps[len(run.used) :], reporter)
        parallel.run(held_out.record)
        stop = holding.enter_context(StopSignal())
        if not resume:
            distributed.on_rank_0(lambda: holding.enter_context(begin(run, manifest)))
            folders.append(run.folder)
        done = _restore(run, trainer, reporter) if resume else 0
        trackers = holding.enter_context(Trackers(run.folder, run.options, reporter))
        try:
            _Loop(run, trainer, held_out, trackers, stop, reporter).run_from(done)
            parallel.run(partial(export, run, trainer.optimizer, "model", len(run.plan)))
        except NotWrittenError as error:
            raise NotWrittenError(f"{error}. What was saved before is whole. {_how_to_resume(run.folder)}") from error
        if stop.requested:
            reporter.warning("the signal came when all was trained: the run is complete")
        result = distributed.on_rank_0(lambda: summary(run, first_answers))
        return result | distributed.on_rank_0(lambda: held_out.write_report(result["answers"]))


def _check_start(
    options: TrainOptions,
    resume: Path | None,
    command: Sequence[str],
    reporter: Reporter,
    dry_run: bool,
    holding: ExitStack,
) -> None:
    """Refuse what can be refused before anything is loaded; hold the folder of a run that is resumed."""
    distributed.check_same_command(options, str(resume), str(dry_run))
    if resume and not dry_run:
        distributed.on_rank_0(lambda: holding.enter_context(file_lock(resume / LOCK)))
    if resume:
        trained_with(resume)
    distributed.on_rank_0(lambda: check_installed(options))
    if distributed.world_size() == 1 and (count := torch.cuda.device_count()) > 1:
        launch = shlex.join(["torchrun", "--nproc-per-node", str(count), "-m", "dpo_cli", *command[1:]])
        reporter.info("hint", f"{count} GPUs are visible and one is used; to use all: {launch}")


def reference_logps(run: Run, reporter: Reporter) -> Tensor:
    """Return log-probs of ``run.scored()`` under the reference: (P, 2) nats; 0 where the loss reads none."""
    if run.cache is None:
        return torch.zeros(len(run.scored()), 2)
    if run.ref_logps is not None:
        return run.ref_logps
    return fill_reference(run.cache, run.scored(), run.runner, reporter).logps


def make_trainer(run: Run, scored: Tensor) -> Trainer:
    """Make what a step needs; ``scored`` are the ``reference_logps`` of the run."""
    used = run.used
    ref_logps = torch.full((len(run.pairs), 2), torch.nan)  # pairs that no step reads stay NaN
    weighted_ref_logps = ref_logps.clone()
    ref_logps[used] = scored[: len(used)]
    weighted_ref_logps[used] = run.weighted_ref_logps(run.pairs.select(used), scored[: len(used)])
    if run.options.gradient_checkpointing:
        # transformers 5.23 renamed it, and 5.17 has only the old name
        new = getattr(run.model, "activation_checkpointing_enable", None)
        (new or run.model.gradient_checkpointing_enable)({"use_reentrant": False})
    low, run.policy.low = run.policy.low, None  # the optimizer's from now on
    reshard(run.model)
    return Trainer(
        runner=dataclasses.replace(run.runner, max_tokens=run.fitted.max_tokens),  # whatever scoring came down to
        optimizer=make_optimizer(run.model, run.options.weight_decay, run.fitted.memory, low),
        pairs=run.pairs,
        costs=run.costs,
        ref_logps=ref_logps,
        weighted_ref_logps=weighted_ref_logps,
        options=run.options,
        num_experts_per_tok=run.experts,
    )


def _restore(run: Run, trainer: Trainer, reporter: Reporter) -> int:
    """Bring the run back to its newest whole checkpoint, or its start where there is none; returns the steps done."""
    checkpoints, metrics = run.folder / "checkpoints", run.folder / "metrics.jsonl"
    newest = distributed.on_rank_0(lambda: newest_checkpoint(checkpoints, reporter.warning))
    done = 0
    if newest is None:
        reporter.info("resume", f"from the start: no whole checkpoint in {checkpoints}")
    else:
        checkpoint, done = newest
        trainer.runner.max_tokens = restore_checkpoint(checkpoint, run.model, trainer.optimizer)
        reporter.info("resume", f"after step {done} of {len(run.plan)}, from {checkpoint}")
    distributed.on_rank_0(lambda: remove_leftovers(run.folder))
    distributed.on_rank_0(lambda: truncate_metrics(metrics, done))
    trainer.mean_rewards = distributed.on_rank_0(lambda: step_rewards(read_metrics(metrics)))
    return done


def _check_step_0(trainer: Trainer, run: Run, reporter: Reporter) -> None:
    """Before the first step policy and reference are equal, and every margin is 0: a check of the cache, too.

    With another model as the reference the starting point is only reported.
    """
    indices = [i for micro_batch in run.plan[0] for i in micro_batch]
    values, largest = compare_with_reference(trainer, indices)
    metrics = f"loss {values['loss']:.6f}  margin {values['rewards/margins']:.6f}"
    if run.cache is None:
        about = f"{trainer.objective.name} reads no reference"
    elif run.reference.fingerprint != run.policy.fingerprint:
        about = f"policy and reference are two models, up to {largest:.3g} nats apart per root of a response's tokens"
    elif largest > logp_tolerance(run.runner.dtype):
        cause = f"The cached reference does not fit this model: remove {run.cache.folder}"
        if run.options.lora_rank and not run.policy.source.adapter:
            cause = (
                "The adapter that was attached changes what the model computes: name other --lora-targets or "
                f"--modules-to-save; if that does not help, remove the cached reference, {run.cache.folder}"
            )
        raise DpoError(
            f"step 0: {metrics}, but policy and reference are the same model: the margin must be 0, and a response is "
            f"off by {largest:.2g} nats per root of its tokens. {cause}"
        )
    else:
        about = f"policy and cached reference are equal on its {len(indices)} pairs, as they must"
    reporter.info("step 0", f"{metrics}  ({about})")


@dataclasses.dataclass
class _Loop:
    """A run's steps, with its evaluations and checkpoints in between."""

    run: Run
    trainer: Trainer
    held_out: HeldOut
    trackers: Trackers
    stop: StopSignal
    reporter: Reporter

    def run_from(self, done: int) -> None:
        """Take all steps after ``done``, and every evaluation that is due and not in the metrics yet.

        A checkpoint that is due is written before the evaluation of its step, so that a failed one costs no training.

        Raises:
            Interrupted: a signal came; a checkpoint was written.
            DpoError: the run failed, and can be resumed from its last checkpoint once the cause is gone.
        """
        run, options, total = self.run, self.run.options, len(self.run.plan)
        evaluated = distributed.on_rank_0(lambda: set(evaluations(read_metrics(run.folder / "metrics.jsonl"))))
        with self.reporter.progress(
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
                    progress.advance(1, self._record(step, metrics, time.monotonic() - started))
                    if step == total or _due(options.save_steps, step):
                        self._save(step)
                due = run.held_out and (step in (0, total) or _due(options.eval_steps, step))
                again = step == total or step not in evaluated  # the last one is in the report
                if due and again and not self._evaluate(step):
                    raise self._interrupted(step)
                self.trackers.follow()

    def _record(self, step: int, metrics: dict[str, float], seconds: float) -> dict[str, float]:
        """Write the line of a step; returns its metrics with its speed."""
        if distributed.rank() == 0:
            append_metrics(self.run.folder / "metrics.jsonl", step, metrics)
        tokens = sum(self.run.costs[i] for places in self.run.plan[step - 1] for i in places)
        return metrics | {"tokens_per_second": tokens / seconds}

    def _evaluate(self, step: int) -> bool:
        """Evaluate the held-out pairs, and keep the model if it is the best; False if a signal came first."""
        run, runner = self.run, self.trainer.runner
        keep = partial(export, run, self.trainer.optimizer, "best", step)
        evaluate = partial(self.held_out.evaluate, step, runner, lambda: runner.parallel.any(self.stop.requested), keep)
        try:
            metrics = runner.parallel.run(evaluate)
        except NotReadBackError:
            self._save(step)
            raise
        if metrics is None:
            return False
        self.reporter.info("held out", f"step {step}: {brief(metrics)}", {"step": step} | metrics)
        if step < len(run.plan) and distributed.rank() == 0:  # the last one's is written when the run is complete
            self.held_out.write_report()
        return True

    def _save(self, step: int) -> None:
        run, metrics = self.run, self.run.folder / "metrics.jsonl"
        if metrics.exists() and distributed.rank() == 0:
            sync(metrics)  # its lines last as long as the checkpoint
        max_tokens, keep = self.trainer.runner.max_tokens, run.options.save_total_limit
        save_checkpoint(run.folder / "checkpoints", step, run.model, self.trainer.optimizer, max_tokens, keep)

    def _interrupted(self, step: int) -> Interrupted:
        self._save(step)
        message = f"interrupted after step {step} of {len(self.run.plan)}; a checkpoint was written"
        return Interrupted(f"{message}. {_how_to_resume(self.run.folder)}")


def _due(every: int, step: int) -> bool:
    return every > 0 and step > 0 and step % every == 0


def _what_is_saved(folders: Sequence[Path]) -> str:
    return f"what was saved is whole. {_how_to_resume(folders[0])}" if folders else "nothing was trained yet"


def _how_to_resume(folder: Path) -> str:
    return f"Go on with: dpo train --resume {shlex.quote(str(folder))}"
