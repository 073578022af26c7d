"""The loop.

Legend: P pairs of a micro-batch.
"""

from __future__ import annotations

import dataclasses
import math
import shlex
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from torch.optim import AdamW
from transformers import PreTrainedModel

from dpo_cli.attention import attention
from dpo_cli.batch import MicroBatch, Step, row_cost
from dpo_cli.checkpoint import export_model, newest_checkpoint, restore_checkpoint, rng_state, save_checkpoint
from dpo_cli.config import TrainOptions
from dpo_cli.disk import remove_leftovers
from dpo_cli.errors import DpoError, Interrupted, UsageError
from dpo_cli.evaluate import answers, evaluate, policy_logps
from dpo_cli.logps import Scorer, noise, response_logps
from dpo_cli.losses import sigmoid_loss
from dpo_cli.metrics import SUMS, Reporter, append_metrics, first_evaluation, pair_sums, summarize, truncate_metrics
from dpo_cli.model import default_device
from dpo_cli.prepare import fill_reference, tell_missing
from dpo_cli.run import Run, check_same_run, create_folder, lay_out_run, make_manifest, model_card
from dpo_cli.tokens import Pair


def learning_rate(step: int, steps: int, options: TrainOptions) -> float:
    """Learning rate of step 1, 2, …, ``steps``: a linear rise over the warm-up, then the schedule down to 0."""
    warmup = round(options.warmup * steps)
    if step <= warmup:
        return options.lr * step / warmup
    done = (step - 1 - warmup) / (steps - warmup)  # 0 at the first step after the warm-up
    if options.schedule == "linear":
        return options.lr * (1 - done)
    return options.lr * (0.5 + 0.5 * math.cos(math.pi * done) if options.schedule == "cosine" else 1)


def make_optimizer(model: PreTrainedModel, weight_decay: float) -> AdamW:
    """AdamW with decay on matrices only; the learning rate is set before each step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return AdamW([g for g in groups if g["params"]], lr=0.0, fused=True)


class StopSignal:
    """SIGINT and SIGTERM as a flag that the loop reads between micro-batches; a second signal ends at once."""

    requested = False

    def __enter__(self) -> StopSignal:
        self.before = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        for each in self.before:
            signal.signal(each, signal.SIG_DFL)


@dataclasses.dataclass
class Trainer:
    """What one optimizer step needs."""

    accelerator: Accelerator
    scorer: Scorer
    optimizer: Any
    pairs: Sequence[Pair]
    reference: Tensor  # (pairs, 2) nats, on the device
    options: TrainOptions

    def step(self, micro_batches: Step, lr: float, stop: StopSignal) -> dict[str, float] | None:
        """One optimizer step over all its pairs; None if a signal came first and nothing was changed.

        The gradient is that of the mean loss over the step's pairs, however they are cut into micro-batches.

        Raises:
            DpoError: a loss or the gradient is not finite; the weights are as before the step.
        """
        accelerator, model = self.accelerator, self.scorer.model
        world, rank = accelerator.num_processes, accelerator.process_index
        pairs_in_step = sum(len(indices) for indices in micro_batches)
        mine = micro_batches[rank::world]
        sums = torch.zeros(len(SUMS), dtype=torch.float64, device=accelerator.device)
        losses_seen = []
        model.train()
        for number, indices in enumerate(mine, 1):
            with nullcontext() if number == len(mine) else accelerator.no_sync(model):
                _, logps, ref_logps = self._forward(indices)
                losses, micro_sums = self._measure(logps, ref_logps)
                accelerator.backward(losses.sum() * world / pairs_in_step)
            losses_seen.append(losses.detach())
            sums += micro_sums
            if stop.requested:
                self.optimizer.zero_grad()
                return None
        norm = accelerator.clip_grad_norm_(model.parameters(), self.options.max_grad_norm or math.inf)
        assert isinstance(norm, Tensor)
        sums = accelerator.reduce(sums)
        *totals, grad_norm = torch.cat([sums, norm.detach().double()[None]]).tolist()  # the step's one read-back
        if not math.isfinite(totals[0] + grad_norm):
            self.optimizer.zero_grad()
            raise self._not_finite(mine, losses_seen)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        return summarize(totals) | {"grad_norm": grad_norm, "learning_rate": lr}

    @torch.no_grad()
    def compare(self, micro_batches: Step) -> tuple[dict[str, float], float]:
        """Metrics of a step's pairs without training on them, and how far policy and reference lie apart at most.

        Units: the difference is the largest of any response, in nats per square root of its tokens.
        """
        self.scorer.model.eval()
        sums = torch.zeros(len(SUMS), dtype=torch.float64, device=self.accelerator.device)
        largest = 0.0
        for indices in micro_batches:
            batch, logps, ref_logps = self._forward(indices)
            sums += self._measure(logps, ref_logps)[1]
            scale = batch.lengths.view(-1, 2).T.reshape(-1).sqrt()  # (2P,), chosen first
            largest = max(largest, float(((logps - ref_logps).abs() / scale).nan_to_num(math.inf, math.inf).max()))
        return summarize(sums.tolist()), largest

    def _forward(self, indices: tuple[int, ...]) -> tuple[MicroBatch, Tensor, Tensor]:
        """A micro-batch and its log-probs under policy and reference, each (2P,) nats, chosen first."""
        batch = self.scorer.batch([self.pairs[i] for i in indices])
        logps = response_logps(self.scorer.token_logps(batch), batch)
        return batch, logps, self.reference[list(indices)].T.reshape(-1)

    def _measure(self, logps: Tensor, ref_logps: Tensor) -> tuple[Tensor, Tensor]:
        """Losses (P,) with their graph, and the sums of the micro-batch's metrics."""
        beta = self.options.beta
        losses = sigmoid_loss(logps, ref_logps, beta, self.options.label_smoothing)
        return losses, pair_sums(losses, logps, ref_logps, beta)

    def _not_finite(self, mine: Step, losses: list[Tensor]) -> DpoError:
        places = [i for indices in mine for i in indices]
        values = [value for seen in losses for value in seen.tolist()]
        bad = [i for i, value in zip(places, values, strict=True) if not math.isfinite(value)]
        what = "the loss is not finite for" if bad else "the gradient is not finite; the step's pairs are"
        named = bad or places
        names = ", ".join(self.pairs[i].where for i in named[:10])
        more = f" and {len(named) - 10} more" if len(named) > 10 else ""
        return DpoError(f"{what} {names}{more}; a lower --lr or --dtype float32 may help")


# ---- a run ---------------------------------------------------------------------------------------------------------


def train(
    options: TrainOptions, resume: Path | None, command: Sequence[str], reporter: Reporter, dry_run: bool = False
) -> dict[str, Any]:
    """`dpo train`: from options to a trained model in a run folder.

    Raises:
        UsageError: the input cannot be used; nothing was written but reference log-probs.
        DpoError: the run failed; its last checkpoint is untouched.
        Interrupted: a signal came; a checkpoint was written.
    """
    set_seed(options.seed)
    accelerator = _accelerator()
    run = lay_out_run(options, resume, accelerator.device, accelerator.num_processes, reporter)
    if dry_run:
        wanted = [run.pairs[i] for i in run.used()] + run.held_out
        missing = tell_missing(run.cache, wanted, reporter)
        return {"pairs": len(run.pairs), "steps": len(run.plan), "reference_misses": missing}
    manifest = make_manifest(run, command, accelerator.num_processes)
    if resume:
        check_same_run(run.folder, manifest, reporter)
    trainer, held_out_reference = _make_trainer(run, accelerator, reporter)
    first_answers = _answers(run)
    done = 0
    if resume:
        done = _restore(run, trainer, reporter)
    else:
        _check_step_0(trainer, run, reporter)
        create_folder(run, manifest)

    def score_held_out(step: int) -> dict[str, float]:
        policy = policy_logps(trainer.scorer, run.held_out, reporter, "held out")
        values = evaluate(policy, held_out_reference, run.options.beta, run.options.label_smoothing)
        reporter.fact("held out", f"step {step}: {_brief(values)}")
        return values

    metrics, model_folder = run.folder / "metrics.jsonl", run.folder / "model"
    with StopSignal() as stop:
        if run.held_out and not resume:
            append_metrics(metrics, 0, score_held_out(0), "eval_")
        after = _loop(run, trainer, done, stop, score_held_out, reporter)
        with attention(run.model, run.own_attention):
            export_model(model_folder, run.model, run.tokenizer, model_card(run))
        shown = zip(run.held_out, first_answers, _answers(run), strict=False)
    return {
        "run": str(run.folder),
        "model": str(model_folder),
        "pairs": len(run.pairs),
        "steps": len(run.plan),
        "held_out": len(run.held_out),
        "before": first_evaluation(metrics),
        "after": after,
        "answers": [
            {"prompt": run.tokenizer.decode(pair.prompt), "reference": first, "policy": last}
            for pair, first, last in shown
        ],
    }


def _accelerator() -> Accelerator:
    """The engine, with nothing taken from the environment that would change a gradient."""
    accelerator = Accelerator(cpu=default_device().type == "cpu", mixed_precision="no")
    accelerator.gradient_accumulation_steps = 1
    if accelerator.num_processes > 1:
        raise UsageError("one device for now: start dpo train without a launcher")
    return accelerator


def _make_trainer(run: Run, accelerator: Accelerator, reporter: Reporter) -> tuple[Trainer, Tensor]:
    """Score the reference where it is not cached, then make what a step needs; also the held-out reference (P, 2)."""
    used = run.used()
    fill_reference(run.cache, [run.pairs[i] for i in used] + run.held_out, run.scorer, reporter)
    reference = torch.full((len(run.pairs), 2), torch.nan)  # pairs that no step reads stay NaN
    reference[used] = run.cache.lookup([run.pairs[i] for i in used])
    held_out_reference = run.cache.lookup(run.held_out)
    if run.options.gradient_checkpointing:
        # transformers 5.23 renamed it, and 5.17 has only the old name
        new = getattr(run.model, "activation_checkpointing_enable", None)
        (new or run.model.gradient_checkpointing_enable)({"use_reentrant": False})
    optimizer = make_optimizer(run.model, run.options.weight_decay)
    prepared, optimizer = accelerator.prepare(run.model, optimizer)
    scorer = dataclasses.replace(run.scorer, model=prepared)
    device = accelerator.device
    return Trainer(accelerator, scorer, optimizer, run.pairs, reference.to(device), run.options), held_out_reference


def _loop(
    run: Run,
    trainer: Trainer,
    done: int,
    stop: StopSignal,
    score_held_out: Callable[[int], dict[str, float]],
    reporter: Reporter,
) -> dict[str, float]:
    """All steps after ``done``; returns the last held-out evaluation, which is that of the trained policy."""
    options, total, metrics = run.options, len(run.plan), run.folder / "metrics.jsonl"
    after: dict[str, float] = score_held_out(done) if run.held_out and done == total else {}
    with reporter.progress("train", total, done, options.log_every) as progress:
        for step in range(done + 1, total + 1):
            rng = rng_state(run.scorer.device)
            began = time.monotonic()
            values = None
            if not stop.requested:
                values = trainer.step(run.plan[step - 1], learning_rate(step, total, options), stop)
            if values is None:
                save_checkpoint(run.folder / "checkpoints", step - 1, run.model, trainer.optimizer, rng, options.keep)
                raise Interrupted(
                    f"interrupted after step {step - 1} of {total}; a checkpoint was written. "
                    f"Go on with: dpo train --resume {shlex.quote(str(run.folder))}"
                )
            append_metrics(metrics, step, values)
            tokens = sum(row_cost(run.pairs[i], run.scorer.layout) for indices in run.plan[step - 1] for i in indices)
            progress.advance(1, f"{_brief(values)}  {tokens / (time.monotonic() - began):,.0f} tok/s")
            if run.held_out and (step == total or (options.eval_every and step % options.eval_every == 0)):
                after = score_held_out(step)
                append_metrics(metrics, step, after, "eval_")
            if step == total or (options.save_every and step % options.save_every == 0):
                rng = rng_state(run.scorer.device)
                save_checkpoint(run.folder / "checkpoints", step, run.model, trainer.optimizer, rng, options.keep)
    return after


def _restore(run: Run, trainer: Trainer, reporter: Reporter) -> int:
    """Bring the run back to its newest whole checkpoint; returns the steps done."""
    newest = newest_checkpoint(run.folder / "checkpoints", reporter.warn)
    if newest is None:
        raise UsageError(f"--resume {run.folder}: no whole checkpoint there; start again with another --output")
    checkpoint, done = newest
    remove_leftovers(run.folder)
    restore_checkpoint(checkpoint, run.model, trainer.optimizer)
    truncate_metrics(run.folder / "metrics.jsonl", done)
    reporter.fact("resume", f"after step {done} of {len(run.plan)}, from {checkpoint}")
    return done


def _check_step_0(trainer: Trainer, run: Run, reporter: Reporter) -> None:
    """Before the first step the policy is the reference: the loss is ln 2 and the margin 0, for every pair of the step.

    Raises:
        DpoError: a response's log-probs differ by more than arithmetic explains.
    """
    values, largest = trainer.compare(run.plan[0])
    told = f"loss {values['loss']:.6f}  margin {values['rewards/margins']:.6f}"
    if largest > noise(run.scorer.dtype):
        raise DpoError(
            f"step 0: {told}, but policy and reference are the same model, so the loss must be ln 2 = 0.693147 "
            f"(off by {abs(values['loss'] - math.log(2)):.2g}, a response by {largest:.2g} nats a root of its tokens). "
            f"The cached reference does not fit this model: remove {run.cache.folder}"
        )
    reporter.fact("step 0", f"{told}  (policy equals reference, as it must)")


def _answers(run: Run) -> list[str]:
    prompts = [pair.prompt for pair in run.held_out[: run.options.show_answers]]
    return answers(run.model, run.tokenizer, prompts, run.own_attention)


def _brief(values: dict[str, float]) -> str:
    return "loss {loss:.4f}  margin {rewards/margins:.4f}  accuracy {rewards/accuracies:.3f}".format(**values)
