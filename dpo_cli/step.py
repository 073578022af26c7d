"""One optimizer step: its gradient over all its pairs, and what can go wrong with it.

Legend: P pairs of a micro-batch.
"""

from __future__ import annotations

import dataclasses
import math
import signal
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from types import FrameType, TracebackType
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor

from dpo_cli.batch import Step, cut_step, moved
from dpo_cli.config import TrainOptions
from dpo_cli.errors import DpoError
from dpo_cli.logps import Scorer, out_of_memory
from dpo_cli.losses import sigmoid_loss
from dpo_cli.metrics import SUMS, pair_sums, summarize
from dpo_cli.optimizer import SPLIT, SmallAdamW
from dpo_cli.pairs import Pair, loss_tokens
from dpo_cli.routing import auxiliary_loss, routed


def learning_rate(step: int, steps: int, options: TrainOptions) -> float:
    """Learning rate of step 1, 2, …, ``steps``: a linear rise over the warm-up, then the schedule down to 0."""
    warmup = round(options.warmup * steps)
    if step <= warmup:
        return options.lr * step / warmup
    done = (step - 1 - warmup) / (steps - warmup)  # 0 at the first step after the warm-up
    if options.schedule == "linear":
        return options.lr * (1 - done)
    return options.lr * (0.5 + 0.5 * math.cos(math.pi * done) if options.schedule == "cosine" else 1)


def unwrapped(optimizer: Any) -> Any:
    """The optimizer inside of what the engine made of it."""
    return getattr(optimizer, "optimizer", optimizer)


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


class NotFiniteError(DpoError):
    """A loss or gradient is not finite. ``losses`` has every pair of the step by its place; ``bad`` are to blame."""

    def __init__(self, message: str, losses: dict[int, float], bad: list[int]) -> None:
        super().__init__(message)
        self.losses, self.bad = losses, bad


@dataclasses.dataclass
class Trainer:
    """What one optimizer step needs."""

    accelerator: Accelerator
    scorer: Scorer
    optimizer: Any
    pairs: Sequence[Pair]
    costs: Sequence[int]  # tokens of each pair in a forward
    reference: Tensor  # (pairs, 2) nats, on the host
    options: TrainOptions
    experts: int = 0  # that a token goes to, where the balance of a mixture is part of the loss

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
        updating = self.in_backward.updating(lr) if self.in_backward else None
        while True:
            mine = self._cut(micro_batches)
            assert not updating or len(mine) == 1, "weights would be updated with part of a gradient"
            counts = self._routed(mine) if self.experts else None
            sums, losses, too_large = self._gradient(mine, pairs_in_step, stop, updating, counts)
            if updating and too_large:
                raise DpoError("memory ran out in a step that updates weights in its backward pass: it is half done")
            if stop.requested or not too_large:
                break
            self.optimizer.zero_grad()
            self.scorer.shrink([self.pairs[i] for i in too_large])
        if stop.requested and not updating:  # else the step is done
            self.optimizer.zero_grad()
            return None
        *totals, aux_loss, grad_norm = torch.cat([self.accelerator.reduce(sums), self._norm()]).tolist()  # read once
        if not math.isfinite(totals[0] + aux_loss + grad_norm):
            self.optimizer.zero_grad()
            places = [i for indices in mine for i in indices]
            raise self._not_finite(dict(zip(places, torch.cat(losses).tolist(), strict=True)))
        if not updating:
            self.optimizer.step()
            self.optimizer.zero_grad()
        balance = {"aux_loss": aux_loss} if self.experts else {}
        return summarize(totals) | balance | {"grad_norm": grad_norm, "learning_rate": lr}

    @property
    def in_backward(self) -> SmallAdamW | None:
        """The optimizer, where it updates the weights in the backward pass of a step, which is a single one."""
        if self.options.memory != "in-backward":
            return None
        return cast(SmallAdamW, unwrapped(self.optimizer))

    def _norm(self) -> Tensor:
        """Norm of the step's gradient, which is clipped now or was used up: (1,)."""
        if self.in_backward:
            return self.in_backward.grad_norm[None]
        most = self.options.max_grad_norm or math.inf
        parameters = [p for p in self.scorer.model.parameters() if p.grad is not None]
        if self.options.memory in SPLIT:  # of bfloat16 gradients torch gives it in bfloat16
            norms = [torch.linalg.vector_norm(cast(Tensor, p.grad), dtype=torch.float32) for p in parameters]
            norm = torch.stack(norms).norm()
            torch.nn.utils.clip_grads_with_norm_(parameters, most, norm)
        else:
            norm = cast(Tensor, self.accelerator.clip_grad_norm_(parameters, most)).detach()
        return cast(Tensor, norm.double()[None])

    def _cut(self, micro_batches: Step) -> Step:
        """This rank's micro-batches of a step, cut smaller than planned where memory has run out."""
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        if self.scorer.max_tokens != self.options.max_tokens:
            indices = [i for planned in micro_batches for i in planned]
            micro_batches = cut_step(indices, self.costs, self.scorer.layout, self.scorer.max_tokens, world)
        return micro_batches[rank::world]

    @torch.no_grad()
    def _routed(self, mine: Step) -> Tensor | None:
        """How often each expert is chosen in the whole step, ``Routed.counts``; None where its one forward tells."""
        if len(mine) == self.accelerator.num_processes == 1:
            return None
        counts = []
        for indices in mine:
            batch = self.scorer.batch([self.pairs[i] for i in indices])
            counts.append(routed(self.scorer.router_logits(batch), batch, self.experts).counts)
        return cast(Tensor, self.accelerator.reduce(torch.stack(counts).sum(0)))

    def _gradient(
        self,
        mine: Step,
        pairs_in_step: int,
        stop: StopSignal,
        updating: AbstractContextManager[None] | None,
        counts: Tensor | None,
    ) -> tuple[Tensor, list[Tensor], tuple[int, ...]]:
        """Add up the gradient over micro-batches, until one does not fit the device's memory or a signal comes.

        The weights are updated as it comes where it is taken inside ``updating``.

        Returns: the metrics' sums and the auxiliary loss behind them, the losses (P,) of each micro-batch, and the one
        that did not fit, else ().
        """
        sums = torch.zeros(len(SUMS) + 1, dtype=torch.float64, device=self.accelerator.device)
        losses: list[Tensor] = []
        for number, indices in enumerate(mine, 1):
            with nullcontext() if number == len(mine) else self.accelerator.no_sync(self.scorer.model):
                done = self._backward(indices, pairs_in_step, updating, counts)
            if done is None:
                return sums, losses, indices
            losses.append(done[0])
            sums += done[1]
            if stop.requested:
                break
        return sums, losses, ()

    def _backward(
        self,
        indices: tuple[int, ...],
        pairs_in_step: int,
        updating: AbstractContextManager[None] | None = None,
        counts: Tensor | None = None,
    ) -> tuple[Tensor, Tensor] | None:
        """Add the gradient of a micro-batch; its losses (P,) and sums as in ``_gradient``, None when memory ran out."""
        done: list[tuple[Tensor, Tensor]] = []
        batch = self.scorer.batch([self.pairs[i] for i in indices])
        aux_loss = torch.zeros(1, dtype=torch.float64, device=self.accelerator.device)

        def loss(places: slice, logps: Tensor) -> Tensor:
            losses, sums = self._measure(indices[places], logps)
            done.append((losses.detach(), sums))
            part: Tensor = losses.sum() * self.accelerator.num_processes / pairs_in_step
            return part

        def routing(router_logits: Sequence[Tensor]) -> Tensor:
            part = routed(router_logits, batch, self.experts)
            balance = auxiliary_loss(part, part.counts if counts is None else counts)
            aux_loss.add_(balance.detach())
            weighted: Tensor = balance * self.options.router_aux_loss_coef * self.accelerator.num_processes
            return weighted

        try:
            self.scorer.backward(batch, loss, updating, routing if self.experts else None)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            return None  # what the passes hold is free only when this frame is gone
        losses, sums = zip(*done, strict=True)
        return torch.cat(losses), torch.cat([torch.stack(sums).sum(0), aux_loss])

    @torch.no_grad()
    def compare(self, indices: Sequence[int]) -> tuple[dict[str, float], float]:
        """Metrics of pairs without training on them, and how far policy and reference lie apart at most.

        Units: the difference is the largest of any response, in nats per square root of its tokens that carry loss.
        """
        pairs = [self.pairs[i] for i in indices]
        sums = torch.zeros(len(SUMS), dtype=torch.float64, device=self.accelerator.device)
        largest = 0.0
        for places, logps, _ in dataclasses.replace(self.scorer).score(pairs):
            there = [indices[place] for place in places]
            sums += self._measure(there, logps)[1]
            sides = ("chosen", "rejected")
            lengths = torch.tensor([loss_tokens(getattr(pairs[place], side)) for side in sides for place in places])
            off = (logps - self._reference(there)).abs().cpu() / lengths.sqrt()
            largest = max(largest, float(off.nan_to_num(math.inf, math.inf).max()))
        return summarize(sums.tolist()), largest

    def _reference(self, indices: Sequence[int]) -> Tensor:
        """Log-probs under the reference: (2P,) nats, chosen first, on the device."""
        return moved(self.reference[list(indices)].T.reshape(-1), self.scorer.device)

    def _terms(self, indices: Sequence[int]) -> Tensor:
        """Margins and weights in the loss: (2, P), on the device."""
        pairs = [self.pairs[i] for i in indices]
        return moved(torch.tensor([[p.margin for p in pairs], [p.weight for p in pairs]]), self.scorer.device)

    def _measure(self, indices: Sequence[int], logps: Tensor) -> tuple[Tensor, Tensor]:
        """Losses (P,) of some pairs with their graph, and the sums of their metrics; ``logps`` (2P,)."""
        ref_logps, beta = self._reference(indices), self.options.beta
        losses = sigmoid_loss(logps, ref_logps, beta, self.options.label_smoothing, *self._terms(indices))
        return losses, pair_sums(losses, logps, ref_logps, beta)

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
        finite = all(bool(p.grad.isfinite().all()) for p in parameters if p.grad is not None)
        self.optimizer.zero_grad()
        return finite
