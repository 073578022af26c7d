"""One optimizer step: the gradient over all its pairs, and what can go wrong with it.

Legend: P pairs of a micro-batch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from dpo_cli.config.options import TrainOptions
from dpo_cli.data.batching import MicroBatch, to_device
from dpo_cli.data.pairs import Pair, count_loss_tokens
from dpo_cli.data.schedule import Step, split_into_micro_batches
from dpo_cli.evaluation.metrics import SUMS, mean_reward, pair_sums, summarize
from dpo_cli.losses.objective import Objective
from dpo_cli.models.logprobs import HiddenStates, ModelRunner, out_of_memory
from dpo_cli.models.moe import auxiliary_loss, routed
from dpo_cli.models.parallel import local_shard
from dpo_cli.training.optimizer import SmallAdamW
from dpo_cli.utils import distributed
from dpo_cli.utils.errors import DpoError

if TYPE_CHECKING:
    from dpo_cli.training.loop import StopSignal


@dataclasses.dataclass
class Totals:
    """Sums over the micro-batches of a step, on the device."""

    sums: Tensor  # those of ``pair_sums``
    aux_loss: Tensor  # (1,)
    expert_counts: Tensor | None = None  # of the whole step; None: those of its one micro-batch
    losses: dict[tuple[int, ...], Tensor] = dataclasses.field(default_factory=dict)  # (P,) by the indices of the pairs
    out_of_memory: MicroBatch | None = None


@dataclasses.dataclass
class Trainer:
    """What all steps of a run share."""

    runner: ModelRunner
    optimizer: Optimizer
    pairs: Sequence[Pair]
    costs: Sequence[int]  # tokens of each pair in a forward
    ref_logps: Tensor  # (pairs, 2) nats, on the host
    weighted_ref_logps: Tensor  # the same with the token weights of LD-DPO
    options: TrainOptions
    num_experts_per_tok: int = 0  # where the load-balancing loss of a mixture of experts is trained too
    mean_rewards: list[float] = dataclasses.field(default_factory=list)  # of the steps so far

    def __post_init__(self) -> None:
        self.objective: Objective = self.options.objective
        # The optimizer, if it updates the weights in the backward pass of a step, which is a single one.
        self.fused = cast(SmallAdamW, self.optimizer) if self.options.memory == "in-backward" else None

    def step(
        self, planned: Step, micro_batches: Sequence[MicroBatch], lr: float, stop: StopSignal
    ) -> dict[str, float] | None:
        """Take one optimizer step; returns its metrics, or None if a signal came first and nothing was changed.

        ``micro_batches`` are this rank's of the ``planned`` ones. If memory runs out the step starts again with smaller
        ones: a backward pass that broke off has left half of its gradient behind.

        Raises:
            DpoError: a loss or the gradient is not finite, or one pair alone does not fit the device's memory.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        pairs_in_step = sum(len(places) for places in planned)
        totals = accumulate_gradients(self, micro_batches, pairs_in_step, stop)
        while self._shrink(totals.out_of_memory):
            totals = accumulate_gradients(self, self.micro_batches(planned), pairs_in_step, stop)
        if distributed.all_reduce_max([stop.requested])[0] and not self.fused:  # which has taken the step
            self.optimizer.zero_grad()
            return None
        sums = distributed.all_reduce_sum(torch.cat([totals.sums, totals.aux_loss]))
        model, max_norm = self.runner.model, self.options.max_grad_norm
        norm = self.fused.grad_norm if self.fused else self.runner.parallel.clip_grad_norm(model, max_norm)
        *metric_sums, aux_loss, grad_norm = torch.cat([sums, norm[None]]).tolist()  # the one device sync of a step
        if not math.isfinite(metric_sums[0] + aux_loss + grad_norm):
            self.optimizer.zero_grad()
            raise _not_finite(self, totals)
        if not self.fused:
            self.optimizer.step()
            self.optimizer.zero_grad()
        metrics = summarize(metric_sums) | ({"aux_loss": aux_loss} if self.num_experts_per_tok else {})
        self.mean_rewards.append(mean_reward(metrics))
        return metrics | {"grad_norm": grad_norm, "learning_rate": lr}

    def _shrink(self, too_large: MicroBatch | None) -> bool:
        """Lower ``max_tokens`` where memory ran out on any rank; whether the step is to be repeated."""
        runner, before = self.runner, self.runner.max_tokens
        if too_large and runner.parallel.sharded:  # raises: the other ranks wait inside a forward, not below
            runner.shrink([])
        if not distributed.all_reduce_max([too_large is not None])[0]:
            return False
        if self.fused:
            raise DpoError("memory ran out in a step that updates weights in its backward pass: it is half done")
        self.optimizer.zero_grad()
        if too_large:
            runner.shrink([self.pairs[i] for i in too_large.places])
        runner.max_tokens = -distributed.all_reduce_max([-runner.max_tokens])[0]
        if not too_large and runner.max_tokens < before:
            runner.warn(f"out of memory on another rank; continuing with --max-tokens {runner.max_tokens}")
        return True

    def micro_batches(self, planned: Step) -> list[MicroBatch]:
        """Build this rank's micro-batches of a step, smaller than planned once memory has run out.

        A rank without pairs gets a dummy where the ranks run in lockstep.
        """
        indices, world_size = [i for places in planned for i in places], distributed.world_size()
        if self.runner.max_tokens != self.options.max_tokens:
            room = self.runner.max_tokens, world_size
            planned = split_into_micro_batches(indices, self.pairs, self.costs, self.runner.layout, *room)
        lockstep = self.runner.parallel.sharded or self.num_experts_per_tok > 0
        batches = []
        for places in planned[distributed.rank() :: world_size]:
            if places:
                batches.append(self.batch(places, indices))
            elif lockstep:
                batch = self.batch((min(indices, key=self.costs.__getitem__),), indices)
                batches.append(dataclasses.replace(batch, weights=0 * batch.weights, dummy=True))
        return batches

    def batch(self, places: Sequence[int], step: Sequence[int]) -> MicroBatch:
        """Build a micro-batch on the device, with what its loss reads of the reference and of the pairs of its step."""
        batch = self.runner.batch([self.pairs[i] for i in places], self.objective.ld_alpha)
        logps, weighted = (
            to_device(table[list(places)].T.reshape(-1), self.runner.device)
            for table in (self.ref_logps, self.weighted_ref_logps)
        )
        rewards = self.mean_rewards if self.objective.uses("reward_baseline") else []
        return dataclasses.replace(
            batch,
            places=tuple(places),
            ref_logps=logps,
            weighted_ref_logps=weighted,
            mean_chosen_length=sum(count_loss_tokens(self.pairs[i].chosen) for i in step) / len(step),
            reward_baseline=sum(rewards) / len(rewards) if rewards else 0.0,
        )

    def sum_metrics(self, hidden: HiddenStates, losses: Tensor) -> Tensor:
        """Sum the metrics of a micro-batch whose head has run, see ``pair_sums``; ``losses`` (P,)."""
        logps, lengths = hidden.responses()
        normalized = lengths if self.objective.length_normalized else None
        return pair_sums(losses, logps, hidden.batch.ref_logps, self.options.beta, normalized)


def accumulate_gradients(
    trainer: Trainer, micro_batches: Sequence[MicroBatch], pairs_in_step: int, stop: StopSignal
) -> Totals:
    """Add up the gradient of ``losses.sum() / pairs_in_step``, until memory runs out or a signal comes.

    It does not depend on how the pairs were cut into micro-batches; pairs are not divided by the sum of their weights.
    """
    runner, objective = trainer.runner, trainer.objective
    zeros = torch.zeros(len(SUMS) + 1, dtype=runner.kind.sums, device=runner.device)
    totals = Totals(sums=zeros[:-1], aux_loss=zeros[-1:])
    runner.model.train()
    if trainer.num_experts_per_tok and not _count_experts(trainer, micro_batches, totals):
        return totals
    for batch in micro_batches:
        try:
            hidden = runner.body(batch, output_router_logits=trainer.num_experts_per_tok > 0)
            losses = []
            for pairs in hidden.head_pieces(objective.wpo):
                losses.append(objective(pairs))
                (losses[-1].sum() / pairs_in_step).backward()
            balance = _balance_loss(trainer, hidden, totals)
            with trainer.fused.fused_backward() if trainer.fused else nullcontext():
                hidden.backward(*balance)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            totals.out_of_memory = batch
            break  # the tensors of the passes are freed only when this frame ends
        if not batch.dummy:
            totals.losses[batch.places] = torch.cat(losses).detach()
            totals.sums += trainer.sum_metrics(hidden, totals.losses[batch.places])
        if stop.requested and not runner.parallel.sharded:
            break
        del hidden, pairs, balance  # before the next forward
    return totals


# ---- mixtures of experts ----------------------------------------------------------------------------------------


@torch.no_grad()
def _count_experts(trainer: Trainer, micro_batches: Sequence[MicroBatch], totals: Totals) -> bool:
    """Count how often each expert is chosen in a step of several forwards; False if memory ran out on any rank."""
    if len(micro_batches) == distributed.world_size() == 1:
        return True
    counts: list[Tensor] = []
    for batch in micro_batches:
        try:
            router_logits = trainer.runner.body(batch, output_router_logits=True).router_logits
            counts.append(routed(router_logits, batch, trainer.num_experts_per_tok)[1])
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            totals.out_of_memory = batch
            break
    if distributed.all_reduce_max([totals.out_of_memory is not None])[0]:
        return False
    totals.expert_counts = distributed.all_reduce_sum(torch.stack(counts).sum(0))
    return True


def _balance_loss(trainer: Trainer, hidden: HiddenStates, totals: Totals) -> list[Tensor]:
    """Compute the weighted load-balancing loss of a micro-batch; empty where it is not trained."""
    if not trainer.num_experts_per_tok:
        return []
    probabilities, counts = routed(hidden.router_logits, hidden.batch, trainer.num_experts_per_tok)
    loss = auxiliary_loss(probabilities, counts if totals.expert_counts is None else totals.expert_counts)
    totals.aux_loss += loss.detach()
    return [loss * trainer.options.router_aux_loss_coef]


# ---- checks -----------------------------------------------------------------------------------------------------


def compare_with_reference(trainer: Trainer, places: Sequence[int]) -> tuple[dict[str, float], Tensor, Tensor]:
    """Compute the metrics of P pairs as of one step, and how far policy and reference differ on each response.

    Shapes: -> metrics, differences in nats and tokens that carry loss: (2P,) each, in an order of their own.
    """
    runner = dataclasses.replace(trainer.runner)  # training keeps its ``max_tokens``

    def compute(indices: Sequence[int], _: MicroBatch) -> tuple[Tensor, Tensor, Tensor]:
        hidden = runner.body(trainer.batch([places[i] for i in indices], places))
        losses = torch.cat([trainer.objective(pairs) for pairs in hidden.head_pieces(trainer.objective.wpo)])
        logps, lengths = hidden.responses()
        return trainer.sum_metrics(hidden, losses), logps - hidden.batch.ref_logps, lengths

    forwards = runner.forwards([trainer.pairs[i] for i in places], compute)
    sums, differences, tokens = zip(*(found for _, found in forwards), strict=True)
    return summarize(torch.stack(sums).sum(0).tolist()), torch.cat(differences), torch.cat(tokens)


def _not_finite(trainer: Trainer, totals: Totals) -> DpoError:
    """Name the pairs to blame: those whose loss is not finite, else those whose gradient is not when alone."""
    own = [item for places, part in totals.losses.items() for item in zip(places, part.tolist(), strict=True)]
    losses = {place: loss for each in distributed.all_gather(own) for place, loss in each}
    what, bad = "loss", [place for place, loss in losses.items() if not math.isfinite(loss)]
    if not bad:
        what, bad = "gradient", [place for place in losses if not _gradient_is_finite(trainer, place)]
    names = ", ".join(trainer.pairs[i].where for i in bad[:10]) or "the sum of the step's pairs, not for one alone"
    more = f" and {len(bad) - 10} more" if len(bad) > 10 else ""
    everywhere, options = len(bad) == len(losses) > 1, trainer.options
    cause = f"--lr {options.lr} may be too high" if everywhere else "look at the named rows first"
    touched = "Some weights were" if trainer.fused else "The weights were not"
    return DpoError(
        f"step {len(trainer.mean_rewards) + 1}: the {what} is not finite for {names}{more}. Likely causes: {cause}; "
        f"--dtype {options.dtype} may be too coarse. {touched} changed by this step, and earlier checkpoints are whole"
    )


def _gradient_is_finite(trainer: Trainer, place: int) -> bool:
    hidden = trainer.runner.body(trainer.batch([place], [place]))
    for pairs in hidden.head_pieces(trainer.objective.wpo):
        trainer.objective(pairs).sum().backward()
    hidden.backward()
    gradients = [p.grad for p in trainer.runner.model.parameters() if p.grad is not None]
    finite = all(bool(local_shard(gradient).isfinite().all()) for gradient in gradients)
    trainer.optimizer.zero_grad()
    return not distributed.all_reduce_max([not finite])[0]
