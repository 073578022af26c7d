"""One optimizer step: its gradient over all its pairs, and what can go wrong with it.

Legend: P pairs of a micro-batch.
"""

from __future__ import annotations

import dataclasses
import math
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from types import FrameType, TracebackType
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor

from dpo_cli.config.options import TrainOptions
from dpo_cli.data.batching import Step, split_into_micro_batches
from dpo_cli.data.collate import MicroBatch, to_device
from dpo_cli.data.pairs import Pair, count_loss_tokens
from dpo_cli.evaluation.metrics import SUMS, mean_reward, pair_sums, summarize
from dpo_cli.losses.preference import Objective, Preferences
from dpo_cli.models.logprobs import ModelRunner, Said, out_of_memory
from dpo_cli.models.moe import auxiliary_loss, routed
from dpo_cli.models.sharding import full_tensor, local_shard
from dpo_cli.training.optimizer import SPLIT, SmallAdamW
from dpo_cli.utils import distributed
from dpo_cli.utils.errors import DpoError


def learning_rate(step: int, steps: int, options: TrainOptions) -> float:
    """Learning rate of step 1, 2, …, ``steps``: a linear rise over the warm-up, then the schedule down to 0."""
    warmup_steps = round(options.warmup_ratio * steps)
    if step <= warmup_steps:
        return options.lr * step / warmup_steps
    done = (step - 1 - warmup_steps) / (steps - warmup_steps)  # 0 at the first step after the warm-up
    if options.lr_scheduler == "linear":
        return options.lr * (1 - done)
    return options.lr * (0.5 + 0.5 * math.cos(math.pi * done) if options.lr_scheduler == "cosine" else 1)


def unwrapped(optimizer: Any) -> Any:
    """The optimizer inside of what the engine made of it."""
    return getattr(optimizer, "optimizer", optimizer)


class StopSignal:
    """SIGINT and SIGTERM as a flag that the loop reads between micro-batches; a second signal ends at once.

    It ends the process, or in an interactive session, whose variables outlive a run, what runs there. In a thread
    beside the main one signals are not this one's. Once an error ends one of several processes, SIGTERM is not heard:
    the launcher sends it when another one has ended, and it would hide what is to be said of that.
    """

    requested = False

    def __enter__(self) -> StopSignal:
        mine = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
        self.before = {number: signal.signal(number, self._receive) for number in mine}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self.before.items():
            deaf = error is not None and number == signal.SIGTERM and distributed.world_size() > 1
            signal.signal(number, signal.SIG_IGN if deaf else handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        for each in self.before:
            signal.signal(each, signal.default_int_handler if hasattr(sys, "ps1") else signal.SIG_DFL)


class NotFiniteError(DpoError):
    """A loss or gradient is not finite. ``losses`` has every pair of the step by its place; ``bad`` are to blame."""

    def __init__(self, message: str, losses: dict[int, float], bad: list[int]) -> None:
        super().__init__(message)
        self.losses, self.bad = losses, bad


@dataclasses.dataclass(frozen=True)
class Surrogate:
    """The loss of a step that couples its pairs, as the linear one of the same value and slopes: see ``_couple``.

    Shapes: ``losses`` (pairs,); ``slopes`` (4, pairs), those by log-probs and by ones not discounted, both sides each.
    """

    columns: dict[int, int]  # by pair
    losses: Tensor
    slopes: Tensor

    def __call__(self, indices: Sequence[int], logps: Tensor, whole: Tensor) -> Tensor:
        """Losses of some pairs by their log-probs and those not discounted: (2P,), (2P,) -> (P,)."""
        columns = to_device(torch.tensor([self.columns[i] for i in indices]), logps.device)
        both = torch.cat([logps, whole]).view(4, -1)
        return self.losses[columns] + ((both - both.detach()) * self.slopes[:, columns]).sum(0)


@dataclasses.dataclass
class Trainer:
    """What one optimizer step needs."""

    accelerator: Accelerator
    scorer: ModelRunner
    optimizer: Any
    pairs: Sequence[Pair]
    costs: Sequence[int]  # tokens of each pair in a forward
    reference: Tensor  # (pairs, 2) nats, on the host
    options: TrainOptions
    experts: int = 0  # that a token goes to, where the balance of a mixture is part of the loss
    counts: Tensor | None = None  # ``Routed.counts`` of the step that is taken; None: its one forward has them
    discounted: Tensor | None = None  # the same as LD-DPO reads it; None: as it is
    mean_rewards: list[float] = dataclasses.field(default_factory=list)  # of the steps that were taken
    tokens: float = math.nan  # of the step that is taken: mean length of its chosen responses
    shift: float = 0.0  # and mean reward of those before it, where the loss reads it
    surrogate: Surrogate | None = None  # of the step that is taken, where its loss couples the pairs

    @cached_property
    def objective(self) -> Objective:
        """What is minimised."""
        return self.options.objective

    def step(self, micro_batches: Step, lr: float, stop: StopSignal) -> dict[str, float] | None:
        """One optimizer step over all its pairs; None if a signal came first and nothing was changed.

        The gradient is that of the sum of the pairs' weighted losses by their number (not by the sum of weights),
        however they are cut into micro-batches. So where the device's memory runs out the step begins again, cut into
        smaller ones: a backward pass that was broken off has left half of its gradient behind.

        Raises:
            NotFiniteError: a loss or the gradient is not finite; the weights are as before the step, unless they are
                updated in the backward pass.
            DpoError: one pair alone does not fit the device's memory.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.scorer.model.train()
        pairs_in_step = sum(len(indices) for indices in micro_batches)
        self._begin([i for indices in micro_batches for i in indices])
        updating = self.in_backward.updating(lr) if self.in_backward else None
        while True:
            mine = self._cut(micro_batches)
            assert not updating or len(mine) == 1, "weights would be updated with part of a gradient"
            idle = min((i for indices in micro_batches for i in indices), key=self.costs.__getitem__)
            too_large, fits = self._couple(mine, idle, micro_batches) if self.objective.couples else ((), True)
            if fits and self.experts:
                too_large, fits = self._routed(mine, idle)
            if fits:
                sums, losses, too_large = self._gradient(mine, idle, pairs_in_step, stop, updating)
            if updating and too_large:
                told = "updates weights in its backward pass: it is half done"
                raise DpoError(f"memory ran out in a step that {told if fits else 'must be one forward'}")
            stopped, shrunk = self._agree(stop, too_large)
            if stopped or not shrunk:
                break
        if stopped and not updating:  # else the step is done
            self.optimizer.zero_grad()
            return None
        *totals, aux_loss, grad_norm = torch.cat([self.accelerator.reduce(sums), self._norm()]).tolist()  # read once
        if not math.isfinite(totals[0] + aux_loss + grad_norm):
            self.optimizer.zero_grad()
            places = [i for indices in mine for i in indices]
            found = zip(places, [loss for part in losses for loss in part.tolist()], strict=True)
            raise self._not_finite(
                {place: loss for each in distributed.all_gather(list(found)) for place, loss in each}
            )
        if not updating:
            self.optimizer.step()
            self.optimizer.zero_grad()
        values = summarize(totals) | ({"aux_loss": aux_loss} if self.experts else {})
        self.mean_rewards.append(mean_reward(values))
        return values | {"grad_norm": grad_norm, "learning_rate": lr}

    def _agree(self, stop: StopSignal, too_large: tuple[int, ...]) -> tuple[bool, bool]:
        """Whether a signal came, and whether memory ran out and less goes into a forward now: on any rank."""
        before = self.scorer.max_tokens
        if too_large and not stop.requested:
            self.optimizer.zero_grad()
            self.scorer.shrink([self.pairs[i] for i in too_large])
        stopped, shrunk, most = distributed.all_reduce_max([stop.requested, bool(too_large), -self.scorer.max_tokens])
        if shrunk and not stopped and not too_large:
            self.optimizer.zero_grad()
            self.scorer.warn(f"out of memory on another rank; going on with --max-tokens {-most}")
        self.scorer.max_tokens = min(-most, before)
        return bool(stopped), bool(shrunk)

    @property
    def in_backward(self) -> SmallAdamW | None:
        """The optimizer, where it updates the weights in the backward pass of a step, which is a single one."""
        if self.options.memory != "in-backward":
            return None
        return cast(SmallAdamW, unwrapped(self.optimizer))

    def _norm(self) -> Tensor:
        """Norm of the step's gradient over all ranks, which is added up and clipped now or was used up: (1,)."""
        if self.in_backward:
            return self.in_backward.grad_norm[None]
        most = self.options.max_grad_norm or math.inf
        if not self.scorer.sharded:  # whose gradients are added up where they arise
            distributed.all_reduce_gradients([p for p in self.scorer.model.parameters() if p.requires_grad])
        parameters = [p for p in self.scorer.model.parameters() if p.grad is not None]
        if self.options.memory in SPLIT:  # of bfloat16 gradients torch gives it in bfloat16
            norms = [torch.linalg.vector_norm(cast(Tensor, p.grad), dtype=torch.float32) for p in parameters]
            norm = torch.stack(norms).norm()
            torch.nn.utils.clip_grads_with_norm_(parameters, most, norm)
        else:
            norm = full_tensor(cast(Tensor, self.accelerator.clip_grad_norm_(parameters, most)).detach())
        return cast(Tensor, norm.double()[None])

    def _cut(self, micro_batches: Step) -> Step:
        """This rank's micro-batches of a step, cut smaller than planned where memory has run out."""
        world, rank = distributed.world_size(), distributed.rank()
        if self.scorer.max_tokens != self.options.max_tokens:
            indices = [i for planned in micro_batches for i in planned]
            micro_batches = split_into_micro_batches(
                indices, self.costs, self.scorer.layout, self.scorer.max_tokens, world
            )
        return micro_batches[rank::world]

    @torch.no_grad()
    def _routed(self, mine: Step, idle: int) -> tuple[tuple[int, ...], bool]:
        """Count how often each expert is chosen in the whole step, where its one forward does not tell that itself.

        Returns: the micro-batch that did not fit the device's memory, else (), and whether all did on every rank.
        """
        self.counts = None
        if len(mine) == distributed.world_size() == 1:
            return (), True

        def count(_: Sequence[int], batch: MicroBatch) -> Tensor:
            return routed(self.scorer.router_logits(batch), batch, self.experts).counts

        found, too_large, fits = self._ahead(mine, idle, count)
        if fits:
            counts = [each if indices else 0 * each for indices, each in zip(mine, found, strict=True)]
            self.counts = cast(Tensor, self.accelerator.reduce(torch.stack(counts).sum(0)))
        return too_large, fits

    @torch.no_grad()
    def _ahead(
        self, mine: Step, idle: int, compute: Callable[[Sequence[int], MicroBatch], Tensor]
    ) -> tuple[list[Tensor], tuple[int, ...], bool]:
        """Run over the micro-batches of a step before the passes that take its gradient; ``idle`` for an empty one.

        Returns: what is computed of each, the one that did not fit the device's memory, else (), and whether all did on
        every rank.
        """
        found: list[Tensor] = []
        too_large: tuple[int, ...] = ()
        for indices in mine:
            done = self.scorer.attempt(self.pairs, indices or (idle,), compute)
            if done is None:
                too_large = indices or (idle,)
                break
            found.append(done[0])
        return found, too_large, not distributed.all_reduce_max([bool(too_large)])[0]

    def _gradient(
        self,
        mine: Step,
        idle: int,
        pairs_in_step: int,
        stop: StopSignal,
        updating: AbstractContextManager[None] | None,
    ) -> tuple[Tensor, list[Tensor], tuple[int, ...]]:
        """Add up the gradient over micro-batches, until one does not fit the device's memory or a signal comes.

        Where the step has fewer pairs than ranks and the model is sharded, the pair ``idle`` is run for nothing.
        The weights are updated as it comes where it is taken inside ``updating``.

        Returns: the metrics' sums and the auxiliary loss behind them, the losses (P,) of each micro-batch, and the one
        that did not fit, else ().
        """
        sums = torch.zeros(len(SUMS) + 1, dtype=torch.float64, device=self.accelerator.device)
        losses: list[Tensor] = []
        for indices in mine:
            if not indices:
                if self.scorer.sharded:
                    self.scorer.backward(self.scorer.batch([self.pairs[idle]]), lambda _, said: 0 * said.logps.sum())
                continue
            done = self._backward(indices, pairs_in_step, updating)
            if done is None:
                return sums, losses, indices
            losses.append(done[0])
            sums += done[1]
            if stop.requested and not self.scorer.sharded:
                break
        return sums, losses, ()

    def _backward(
        self, indices: tuple[int, ...], pairs_in_step: int, updating: AbstractContextManager[None] | None = None
    ) -> tuple[Tensor, Tensor] | None:
        """Add the gradient of a micro-batch; its losses (P,) and sums as in ``_gradient``, None when memory ran out."""
        done: list[tuple[Tensor, Tensor]] = []
        aux_loss = torch.zeros(1, dtype=torch.float64, device=self.accelerator.device)

        def loss(places: slice, said: Said) -> Tensor:
            losses, sums = self._measure(indices[places], said)
            done.append((losses.detach(), sums))
            part: Tensor = losses.sum() / pairs_in_step
            return part

        def routing(router_logits: Sequence[Tensor]) -> Tensor:
            part = routed(router_logits, batch, self.experts)
            balance = auxiliary_loss(part, part.counts if self.counts is None else self.counts)
            aux_loss.add_(balance.detach())
            weighted: Tensor = balance * self.options.router_aux_loss_coef
            return weighted

        try:
            batch = self.scorer.batch([self.pairs[i] for i in indices])
            self.scorer.backward(batch, loss, updating, routing if self.experts else None)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            return None  # what the passes hold is free only when this frame is gone
        losses, sums = zip(*done, strict=True)
        return torch.cat(losses), torch.cat([torch.stack(sums).sum(0), aux_loss])

    def _begin(self, indices: Sequence[int]) -> None:
        """Settle what a pair's loss reads of its step and of those before it."""
        means = self.mean_rewards if self.objective.reads("shift") else []
        self.shift = sum(means) / len(means) if means else 0.0
        self.tokens = sum(count_loss_tokens(self.pairs[i].chosen) for i in indices) / len(indices)
        self.surrogate = None

    def _couple(self, mine: Step, idle: int, micro_batches: Step) -> tuple[tuple[int, ...], bool]:
        """Take the derivative of a loss that couples the pairs of a step, by the log-probs of all of them.

        The backward passes over micro-batches then go by the linear loss that has these slopes. Returns the micro-batch
        that did not fit the device's memory, else (), and whether all did on every rank.
        """
        rows = {place: row for row, place in enumerate(sorted(i for indices in micro_batches for i in indices))}

        def both(_: Sequence[int], batch: MicroBatch) -> Tensor:
            said = self.scorer.said(batch)
            return torch.cat([said.discounted(self.options.ld_alpha), said.logps]).view(4, -1)

        found, too_large, fits = self._ahead(mine, idle, both)
        if not fits:
            return too_large, False
        table = torch.zeros(4, len(rows), device=self.scorer.device)  # logps and those not discounted, both sides each
        for indices, columns in zip(mine, found, strict=True):
            if indices:
                table[:, [rows[i] for i in indices]] = columns
        table = cast(Tensor, self.accelerator.reduce(table))  # the other ranks' pairs
        discounted, logps = leaves = [half.reshape(-1).requires_grad_() for half in table.view(2, 2, -1)]
        losses = self.objective(self._preferences(list(rows), discounted, logps, self._lengths(list(rows))))
        slopes = torch.autograd.grad(losses.sum(), leaves, materialize_grads=True)
        self.surrogate = Surrogate(rows, losses.detach(), torch.cat([each.view(2, -1) for each in slopes]))
        return (), True

    @torch.no_grad()
    def compare(self, indices: Sequence[int]) -> tuple[dict[str, float], float, float]:
        """Metrics of pairs without training on them; how far policy and reference lie apart at most; the loss if not.

        Units: the difference is the largest of any response, in nats per square root of its tokens that carry loss;
        without a reference it is 0.
        """
        self._begin(indices)
        read = dataclasses.replace(self.scorer).read([self.pairs[i] for i in indices], self.options.ld_alpha)
        lengths = self._lengths(indices)
        logps, discounted = (to_device(t.T.reshape(-1), self.scorer.device) for t in (read.logps, read.discounted))
        likelihoods = to_device(read.likelihoods, self.scorer.device) if self.scorer.wpo else 1.0
        losses = self.objective(self._preferences(indices, discounted, logps, lengths, likelihoods))
        values = summarize(self._sums(losses, logps, indices, lengths).tolist())
        if not self.objective.reference:
            return values, 0.0, values["loss"]
        ref_logps, ref_discounted = self._reference(indices), self._reference(indices, self.discounted)
        equal = self.objective(self._preferences(indices, ref_discounted, ref_logps, lengths, likelihoods))
        off = (logps - ref_logps).abs() / lengths.sqrt()
        return values, float(off.nan_to_num(math.inf, math.inf).max()), float(equal.double().mean())

    def _reference(self, indices: Sequence[int], table: Tensor | None = None) -> Tensor:
        """Log-probs under the reference, or others in a ``table`` like it: (2P,) nats, chosen first, on the device."""
        table = self.reference if table is None else table
        return to_device(table[list(indices)].T.reshape(-1), self.scorer.device)

    def _lengths(self, indices: Sequence[int]) -> Tensor:
        """Tokens of each response that carry loss: (2P,), chosen first, on the device."""
        pairs = [self.pairs[i] for i in indices]
        lengths = [count_loss_tokens(p.chosen) for p in pairs] + [count_loss_tokens(p.rejected) for p in pairs]
        return to_device(torch.tensor(lengths), self.scorer.device)

    def _terms(self, indices: Sequence[int]) -> Tensor:
        """Margins and weights in the loss: (2, P), on the device."""
        pairs = [self.pairs[i] for i in indices]
        return to_device(torch.tensor([[p.margin for p in pairs], [p.weight for p in pairs]]), self.scorer.device)

    def _preferences(
        self,
        indices: Sequence[int],
        logps: Tensor,
        whole: Tensor,
        lengths: Tensor,
        likelihoods: Tensor | float = 1.0,
    ) -> Preferences:
        """What the loss reads of some pairs: (2P,) each, chosen first, and WPO's weights (P,)."""
        margins, weights = self._terms(indices)
        return Preferences(
            logps=logps,
            ref_logps=self._reference(indices, self.discounted),
            lengths=lengths,
            whole=whole,
            tokens=self.tokens,
            margins=margins,
            weights=weights * likelihoods,
            shift=self.shift,
        )

    def _measure(self, indices: Sequence[int], said: Said) -> tuple[Tensor, Tensor]:
        """Losses (P,) of some pairs with their graph, and the sums of their metrics."""
        logps, discounted = said.logps, said.discounted(self.options.ld_alpha)
        if self.surrogate is None:
            losses = self.objective(self._preferences(indices, discounted, logps, said.tokens, said.likelihoods()))
        else:
            losses = self.surrogate(indices, discounted, logps)
        return losses, self._sums(losses, logps, indices, said.tokens)

    def _sums(self, losses: Tensor, logps: Tensor, indices: Sequence[int], lengths: Tensor) -> Tensor:
        averaged = lengths if self.objective.averaged else None
        return pair_sums(losses, logps, self._reference(indices), self.options.beta, averaged)

    def _not_finite(self, losses: dict[int, float]) -> NotFiniteError:
        """Find the pairs to blame: those whose loss is not finite, else those whose gradient is not when alone."""
        what, bad = "loss", [place for place, loss in losses.items() if not math.isfinite(loss)]
        if not bad:
            what, bad = "gradient", [place for place in losses if not self._gradient_is_finite(place)]
        names = ", ".join(self.pairs[i].where for i in bad[:10]) or "the sum of the step's pairs, not for one alone"
        more = f" and {len(bad) - 10} more" if len(bad) > 10 else ""
        return NotFiniteError(f"the {what} is not finite for {names}{more}", losses, bad)

    def _gradient_is_finite(self, place: int) -> bool:
        self._backward((place,), 1)
        parameters = self.scorer.model.parameters()
        finite = all(bool(local_shard(p.grad).isfinite().all()) for p in parameters if p.grad is not None)
        self.optimizer.zero_grad()
        return not distributed.all_reduce_max([not finite])[0]
