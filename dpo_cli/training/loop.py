"""The loop: a run from its first step, or its last checkpoint, to a trained model."""

from __future__ import annotations

import dataclasses
import hashlib
import shlex
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from transformers import PreTrainedModel

from dpo_cli.config.options import TrainOptions
from dpo_cli.data.pairs import model_input_ids
from dpo_cli.data.tokenize import reasons
from dpo_cli.evaluation.generation import generate, text
from dpo_cli.evaluation.metrics_log import append_metrics, evaluations, read_metrics, step_rewards, truncate_metrics
from dpo_cli.hub.export import NotReadBackError, export_model, response_logps
from dpo_cli.hub.model_card import model_card
from dpo_cli.hub.push import check_base, check_login, push
from dpo_cli.models.adapter_files import save_adapter
from dpo_cli.models.attention import attention
from dpo_cli.models.loading import export_dtype, load_model, release
from dpo_cli.models.logprobs import logp_tolerance
from dpo_cli.models.sharding import reshard
from dpo_cli.models.split_weights import fp32_weights
from dpo_cli.training.checkpoint import newest_checkpoint, restore_checkpoint, rng_state, save_checkpoint
from dpo_cli.training.heldout import HeldOut
from dpo_cli.training.interrupt import StopSignal
from dpo_cli.training.optimizer import learning_rate, make_optimizer
from dpo_cli.training.prepare import fill_reference, tell_cached
from dpo_cli.training.setup import LOCK, Run, begin, check_same_run, lay_out_run, make_manifest, trained_with
from dpo_cli.training.step import NotFiniteError, Trainer, compare_with_reference, unwrapped
from dpo_cli.training.trackers import Trackers, check_installed
from dpo_cli.utils import distributed
from dpo_cli.utils.console import Reporter, brief
from dpo_cli.utils.errors import DpoError, Interrupted, NotWrittenError
from dpo_cli.utils.files import atomic_write, file_lock, remove_leftovers, sync, to_json

T = TypeVar("T")

ANSWER_TOKENS = 80  # most of an answer that is shown


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
    with distributed.started(lambda: _what_is_saved(folders, options)) as accelerator, ExitStack() as holding:
        distributed.check_same_command(options, str(resume), str(dry_run))
        if resume and not dry_run:
            _on_first(lambda: holding.enter_context(file_lock(resume / LOCK)))
        if resume:
            trained_with(resume)  # first of all: what follows goes by its options
        if options.push_to_hub and not dry_run:
            hub = options.push_to_hub
            _on_first(lambda: check_login(hub))
        _on_first(lambda: check_installed(options))
        set_seed(options.seed)
        _tell_devices(command, reporter)
        run = lay_out_run(options, resume, accelerator.device, reporter, dry_run)
        if options.push_to_hub and options.lora_rank and options.export != "merged":
            check_base(run.source.name)
        if dry_run:
            missing = tell_cached(run.cache, run.scored(), reporter)[1] if run.cache else []
            return {"pairs": len(run.pairs), "steps": len(run.plan), "reference_misses": len(missing)}
        manifest = make_manifest(run, command)
        began = distributed.on_rank_0(lambda: check_same_run(run.folder, manifest, reporter)) if resume else manifest
        scored = _reference_logps(run, reporter)
        manifest["reference"]["values"] = hashlib.sha256(scored.numpy().tobytes()).hexdigest()
        if began["reference"]["values"] != manifest["reference"]["values"]:
            reporter.warning("the reference was recomputed since the run began: the last bits may differ")
        trainer, held_out_reference = _make_trainer(run, scored, accelerator)
        _check_step_0(trainer, run, reporter)
        first_answers = _where_it_runs(run, partial(_answers, run))
        held_out = HeldOut(run, held_out_reference, reporter)
        _where_it_runs(run, held_out.record)
        stop = holding.enter_context(StopSignal())
        if not resume:
            run.folder = distributed.on_rank_0(lambda: holding.enter_context(begin(run, manifest)))
            folders.append(run.folder)
        done = _restore(run, trainer, reporter) if resume else 0
        trackers = holding.enter_context(Trackers(run.folder, run.options, reporter))
        try:
            _Loop(run, trainer, held_out, trackers, stop, reporter).run_from(done)
            _export(run, trainer, "model", len(run.plan))
            distributed.barrier()
        except NotWrittenError as error:
            raise NotWrittenError(
                f"{error}. What was saved before is whole. {_how_to_go_on(run.folder, run.options)}"
            ) from error
        if stop.requested:
            reporter.warning("the signal came when all was trained: the run is complete")
        result = distributed.on_rank_0(lambda: _summary(run, first_answers))
        result |= distributed.on_rank_0(lambda: held_out.write_report(result["answers"]))
        return result | distributed.on_rank_0(lambda: _pushed(run, reporter))


def _where_it_runs(run: Run, action: Callable[[], T]) -> T:
    """Run the model beside the training: a whole one on the first rank for all, one in shards on all in step."""
    return action() if run.scorer.sharded else distributed.on_rank_0(action)


def _on_first(action: Callable[[], object]) -> None:
    """Let the first rank do something whose value the others have no use for."""

    def done() -> None:
        action()

    distributed.on_rank_0(done)


def _tell_devices(command: Sequence[str], reporter: Reporter) -> None:
    """Say once how to use all of several GPUs."""
    if distributed.world_size() == 1 and (count := torch.cuda.device_count()) > 1:
        launch = shlex.join(["torchrun", "--nproc-per-node", str(count), "-m", "dpo_cli", *command[1:]])
        reporter.info("hint", f"{count} GPUs are visible and one is used; to use all: {launch}")


def _reference_logps(run: Run, reporter: Reporter) -> Tensor:
    """Log-probs of ``run.scored()`` under the reference: (P, 2) nats; 0 where the loss reads none."""
    if run.cache is None:
        return torch.zeros(len(run.scored()), 2)
    if run.reference:
        assert run.reference.logps is not None  # else this is a dry run
        return run.reference.logps
    return fill_reference(run.cache, run.scored(), run.scorer, reporter).logps


def _make_trainer(run: Run, scored: Tensor, accelerator: Accelerator) -> tuple[Trainer, Tensor]:
    """What a step needs, and the reference of the held-out pairs (P, 2); ``scored`` is that of ``run.scored()``."""
    used = run.used()
    ref_logps = torch.full((len(run.pairs), 2), torch.nan)  # pairs that no step reads stay NaN
    weighted_ref_logps = ref_logps.clone()
    ref_logps[used] = scored[: len(used)]
    weighted_ref_logps[used] = run.weighted_ref_logps(run.pairs.select(used), scored[: len(used)])
    if run.options.gradient_checkpointing:
        # transformers 5.23 renamed it, and 5.17 has only the old name
        new = getattr(run.model, "activation_checkpointing_enable", None)
        (new or run.model.gradient_checkpointing_enable)({"use_reentrant": False})
    low, run.low = run.low, None  # the optimizer's from now on
    reshard(run.model)
    optimizer = make_optimizer(run.model, run.options.weight_decay, run.fitted.memory, low)
    prepared = accelerator.prepare_model(run.model, evaluation_mode=True)  # no wrapper: see ranks.py
    optimizer = accelerator.prepare_optimizer(optimizer)
    max_tokens = run.options.max_tokens or run.scorer.max_tokens  # as planned, whatever scoring came down to
    trainer = Trainer(
        accelerator=accelerator,
        runner=dataclasses.replace(run.scorer, model=prepared, max_tokens=max_tokens),
        optimizer=optimizer,
        pairs=run.pairs,
        costs=run.costs,
        ref_logps=ref_logps,
        weighted_ref_logps=weighted_ref_logps,
        options=run.options,
        num_experts_per_tok=run.experts,
    )
    return trainer, scored[len(used) :]


def _restore(run: Run, trainer: Trainer, reporter: Reporter) -> int:
    """Bring the run back to its newest whole checkpoint, or its start where there is none; returns the steps done."""
    checkpoints = run.folder / "checkpoints"
    newest = distributed.on_rank_0(lambda: newest_checkpoint(checkpoints, reporter.warning))
    done = 0
    if newest is None:
        reporter.info("resume", f"from the start: no whole checkpoint in {checkpoints}")
    else:
        checkpoint, done = newest
        trainer.runner.max_tokens = restore_checkpoint(checkpoint, run.model, trainer.optimizer)
        reporter.info("resume", f"after step {done} of {len(run.plan)}, from {checkpoint}")
    distributed.on_rank_0(lambda: remove_leftovers(run.folder))
    distributed.on_rank_0(lambda: truncate_metrics(run.folder / "metrics.jsonl", done))
    trainer.mean_rewards = distributed.on_rank_0(lambda: step_rewards(read_metrics(run.folder / "metrics.jsonl")))
    return done


def _check_step_0(trainer: Trainer, run: Run, reporter: Reporter) -> None:
    """Before the first step the policy is the reference: the margin is 0, for every pair of the step.

    The loss is ln 2 then, or what the pairs' weights and margins make of it. So this also checks what the cache has of
    these pairs. With another model as the reference the starting point is only reported.

    Raises:
        DpoError: a response's log-probs differ by more than arithmetic explains.
    """
    indices = [i for micro_batch in run.plan[0] for i in micro_batch]
    values, largest, expected = compare_with_reference(trainer, indices)
    objective = trainer.objective
    like_others = bool((run.pairs.terms[indices] == (1, 0)).all())
    usual = objective.is_vanilla_dpo and like_others
    by = f"for --loss {objective.name}" if like_others else "by the weights and margins of its pairs"
    must = "ln 2 = 0.693147" if usual else f"{expected:.6f} {by}"
    metrics = f"loss {values['loss']:.6f}  margin {values['rewards/margins']:.6f}"
    if not objective.reference:
        reporter.info("step 0", f"{metrics}  ({objective.name} reads no reference)")
        return
    assert run.cache is not None
    if run.reference and run.reference.fingerprint != run.start:
        apart = f"policy and reference are two models, up to {largest:.3g} nats a root of a response's tokens apart"
        reporter.info("step 0", f"{metrics}  ({apart})")
        return
    if largest > logp_tolerance(run.scorer.dtype):
        cause = f"The cached reference does not fit this model: remove {run.cache.folder}"
        if run.options.lora_rank and not run.source.adapter:
            cause = (
                "The adapter that was attached changes what the model computes: name other --lora-targets or "
                f"--modules-to-save; if that does not help, remove the cached reference, {run.cache.folder}"
            )
        raise DpoError(
            f"step 0: {metrics}, but policy and reference are the same model, so the loss must be {must} "
            f"(off by {abs(values['loss'] - expected):.2g}, a response by {largest:.2g} nats a root of its tokens). "
            f"{cause}"
        )
    why = "as they must" if usual else f"so the loss must be {must}"
    reporter.info("step 0", f"{metrics}  (policy and cached reference are equal on its {len(indices)} pairs, {why})")


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
                    planned, started, rng = run.plan[step - 1], time.monotonic(), rng_state(run.scorer.device)
                    if distributed.all_reduce_max([self.stop.requested])[0]:
                        raise self._interrupted(step - 1, rng)
                    micro_batches, lr = self.trainer.micro_batches(planned), learning_rate(step, total, options)
                    try:
                        metrics = self.trainer.step(planned, micro_batches, lr, self.stop)
                    except NotFiniteError as error:
                        raise distributed.on_rank_0(partial(self._not_finite, step, error)) from error
                    if metrics is None:
                        raise self._interrupted(step - 1, rng)
                    progress.advance(1, self._record(step, metrics, time.monotonic() - started))
                    if step == total or _due(options.save_steps, step):
                        self._save(step, rng_state(run.scorer.device))
                due = run.held_out and (step in (0, total) or _due(options.eval_steps, step))
                known = step in evaluated and step < total  # the last one is in the report
                if due and not known and not _where_it_runs(run, partial(self._evaluate, step)):
                    raise self._interrupted(step, rng_state(run.scorer.device))
                self.trackers.follow()

    def _record(self, step: int, metrics: dict[str, float], seconds: float) -> dict[str, float]:
        """Write the line of a step; returns its metrics with its speed."""
        run = self.run
        if distributed.rank() == 0:
            append_metrics(run.folder / "metrics.jsonl", step, metrics)
        tokens = sum(run.costs[i] for places in run.plan[step - 1] for i in places)
        return metrics | {"tokens_per_second": tokens / seconds}

    def _evaluate(self, step: int) -> bool:
        """Evaluate the held-out pairs, tell it, and keep the model if it is the best; False if a signal came first."""
        run, trainer, stop = self.run, self.trainer, self.stop
        keep = partial(_export, run, trainer, "best", step)
        agree = distributed.all_reduce_max if trainer.runner.sharded else list
        try:
            found = self.held_out.evaluate(step, trainer.runner, lambda: any(agree([stop.requested])), keep)
        except NotReadBackError:
            self._save(step, rng_state(run.scorer.device))
            raise
        if found is None:
            return False
        self.reporter.info("held out", f"step {step}: {brief(found)}", {"step": step} | found)
        if step < len(run.plan) and distributed.rank() == 0:  # the last one's is written when the run is complete
            self.held_out.write_report()
        return True

    def _save(self, step: int, rng: dict[str, Tensor]) -> None:
        run, max_tokens = self.run, self.trainer.runner.max_tokens
        folder, metrics = run.folder / "checkpoints", run.folder / "metrics.jsonl"
        if metrics.exists() and distributed.rank() == 0:
            sync(metrics)  # its lines last as long as the checkpoint
        save_checkpoint(folder, step, run.model, self.trainer.optimizer, rng, max_tokens, run.options.save_total_limit)

    def _interrupted(self, step: int, rng: dict[str, Tensor]) -> Interrupted:
        self._save(step, rng)
        message = f"interrupted after step {step} of {len(self.run.plan)}; a checkpoint was written"
        return Interrupted(f"{message}. {_how_to_go_on(self.run.folder, self.run.options)}")

    def _not_finite(self, step: int, error: NotFiniteError) -> DpoError:
        """Write the step's pairs to a file, and say what happened and why it may have.

        Its ids are as in ``Pair``, where ``~id`` carries no loss; its texts are all that the model reads.
        """
        run, decode = self.run, self.run.tokenizer.decode
        file = run.folder / f"not-finite-step-{step:06d}.jsonl"
        with (
            suppress(NotWrittenError),  # the message matters more
            atomic_write(file) as temporary,
            temporary.open("w", encoding="utf-8") as stream,
        ):
            for place, loss in error.losses.items():
                pair = run.pairs[place]
                texts = {
                    name: decode(model_input_ids(getattr(pair, name))) for name in ("prompt", "chosen", "rejected")
                }
                ids = {f"{name}_ids": getattr(pair, name).tolist() for name in texts}
                about = {"row": pair.where, "to_blame": place in error.bad, "loss": loss}
                about["ref_logps"] = self.trainer.ref_logps[place].tolist() if run.cache else None
                stream.write(to_json(about | texts | ids) + "\n")
        kept = f"Its pairs are in {file}" if file.exists() else f"Its pairs could not be written to {file}"
        everywhere = len(error.bad) == len(error.losses) > 1
        cause = f"--lr {run.options.lr} may be too high" if everywhere else "look at the named rows first"
        touched = "Some weights were" if self.trainer.fused else "The weights were not"
        return DpoError(
            f"step {step}: {error}. Likely causes: {cause}; --dtype {run.options.dtype} may be too coarse. "
            f"{touched} changed by this step, and earlier checkpoints are whole. {kept}"
        )


def _export(run: Run, trainer: Trainer, name: str, step: int, after: Mapping[str, float] | None = None) -> None:
    """Write the policy as it is after ``step`` to a folder of the run; ``after`` are its metrics if not yet written.

    Of an adapter that is the adapter alone, unless it is to be merged: into a base that is loaded again, for to take it
    out of its own again would change that by rounding.

    Raises:
        NotReadBackError: what was written is not what was trained.
    """
    if distributed.rank() > 0 and not run.scorer.sharded:
        return
    known = evaluations(read_metrics(run.folder / "metrics.jsonl"))
    card = model_card(run, known.get(0, {}), after or known.get(step, {}))
    by_length = sorted(run.used(), key=run.costs.__getitem__)
    pair = run.pairs[by_length[len(by_length) // 2]]

    def export(model: PreTrainedModel, expected: tuple[Tensor, torch.dtype] | None = None) -> None:
        dtype, warn = export_dtype(run.options.export_dtype, run.source), run.scorer.warn
        try:
            export_model(
                run.folder / name,
                model,
                run.tokenizer,
                card,
                source=run.source,
                pair=pair,
                expected=expected,
                dtype=dtype,
                warn=warn,
            )
        except NotReadBackError as error:
            raise NotReadBackError(f"{error}. The trained weights are in {run.folder / 'checkpoints'}") from error

    if run.options.export == "merged":
        with tempfile.TemporaryDirectory() as folder:
            save_adapter(run.model, Path(folder))
            source = dataclasses.replace(run.source, adapter=Path(folder), attached=False, checkpoint=None)
            try:
                merged = load_model(source)
            except DpoError as error:
                reason = str(error).removeprefix("--model ").replace(folder, "the trained adapter")
                kept = run.folder / "checkpoints"
                raise DpoError(f"--export merged: {reason}. The trained weights are in {kept}") from error
        merged.generation_config = run.model.generation_config
        try:
            export(merged)
        finally:
            release(merged)
        return
    with attention(run.model, run.own_attention):
        apart = run.scorer.sharded and run.scorer.chunked_lm_head
        expected = response_logps(run.model, pair, run.scorer.dtype, apart), run.scorer.dtype
        with fp32_weights(run.model, unwrapped(trainer.optimizer)):
            export(run.model, expected)


def _pushed(run: Run, reporter: Reporter) -> dict[str, Any]:
    """Push the model if that was asked for; what goes wrong is among what is returned, for the run is complete."""
    if not (name := run.options.push_to_hub):
        return {}
    try:
        done = push(run.folder, name)
    except DpoError as error:
        return {"push_error": f"the run is complete in {run.folder}, but {error}"}
    reporter.info("pushed", f"{done['url']} ({'private' if done['private'] else 'public'})")
    return {"pushed": done["url"]}


def _what_is_saved(folders: Sequence[Path], options: TrainOptions) -> str:
    return f"what was saved is whole. {_how_to_go_on(folders[0], options)}" if folders else "nothing was trained yet"


def _how_to_go_on(folder: Path, options: TrainOptions) -> str:
    again = f" --push-to-hub {options.push_to_hub}" if options.push_to_hub else ""
    return f"Go on with: dpo train --resume {shlex.quote(str(folder))}{again}"


def _due(every: int, step: int) -> bool:
    return every > 0 and step > 0 and step % every == 0


def _summary(run: Run, first_answers: list[str]) -> dict[str, Any]:
    """What a finished run tells."""
    shown = zip(run.held_out, first_answers, _answers(run), strict=False)
    scores = evaluations(read_metrics(run.folder / "metrics.jsonl"))
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


def _answers(run: Run) -> list[str]:
    """Greedy answers to the first held-out prompts, as many as are shown."""
    shown = range(min(run.options.show_answers, len(run.held_out)))
    prompts = [run.held_out[place].prompt for place in shown]
    responses = generate(
        run.model,
        run.tokenizer,
        prompts,
        run.own_attention,
        ANSWER_TOKENS,
        sampled=False,
        max_tokens=run.scorer.max_tokens,
        dtype=run.scorer.dtype,
    )
    return [text(run.tokenizer, response) for (response,) in responses]
