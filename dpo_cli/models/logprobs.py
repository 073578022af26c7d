"""Log-probability of each response under a model.

The body of the model runs over a whole packed row, its head over the response tokens of a few pairs at a time. A pair's
loss needs nothing but its own log-probs, so the head's backward follows at once: its three matrix products a token, and
logits for a few pairs, are all that the head ever takes.

Legend: P pairs, B rows, T tokens of a row, N response tokens that carry loss, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpo_cli.data.batching import Layout, pack, row_costs
from dpo_cli.data.collate import MicroBatch, collate
from dpo_cli.data.pairs import Pair
from dpo_cli.utils.errors import DpoError

WINDOW = 512  # pairs of similar length that are packed together when order does not matter
# Of float32 logits that are there at a time; more where a single pair needs it. A GPU wants large matrix products.
LOGITS_BUDGET_BYTES = {"cpu": 2**28, "cuda": 2**30}

BODY = "run_body"  # method of a sharded model that runs its body and gathers what lies outside the layers

Result = TypeVar("Result")


@dataclass(frozen=True)
class Head:
    """What makes logits of hidden states. ``module`` None: what it is given are logits already."""

    module: nn.Module | None
    config: Any
    dtype: torch.dtype

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits over the vocabulary: (N, H) -> (N, V), float32.

        A scale or soft-cap is known under the names below; ``choose_layout`` finds out whether that is all there is.
        """
        if self.module is None:
            return hidden.float()
        with precision(hidden.device, self.dtype):
            logits: Tensor = self.module(hidden)
        if scale := getattr(self.config, "logit_scale", None):  # cohere
            logits = logits * scale
        if scale := getattr(self.config, "logits_scaling", None):  # granite
            logits = logits / scale
        if cap := getattr(self.config, "final_logit_softcapping", None):  # gemma
            logits = (logits / cap).tanh() * cap
        return logits.float()

    def copied(self) -> Head:
        """A copy on the CPU, which outlives the model, in the precision that it computes in."""
        copy = deepcopy(self.module).to("cpu", self.dtype) if self.module else None
        return Head(copy, self.config, self.dtype)

    def to(self, device: torch.device) -> Head:
        """The same on a device."""
        if self.module is None or next(self.module.parameters()).device == device:
            return self
        return Head(deepcopy(self.module).to(device), self.config, self.dtype)


@dataclass(frozen=True)
class Said:
    """What a model says of the response tokens of p pairs that carry loss.

    Shapes: ``token_logps`` (n,), ``lengths`` (2p,) in the batch's order; ``collisions`` (n,) is log sum over the
    vocabulary of p^2, where it is asked for.
    Units: nats.
    """

    token_logps: Tensor
    lengths: Tensor
    collisions: Tensor | None = None

    @cached_property
    def logps(self) -> Tensor:
        """Log-prob of each response: (2p,), chosen first."""
        return response_logps(self.token_logps, self.lengths)

    @property
    def tokens(self) -> Tensor:
        """Tokens of each response that carry loss: (2p,), chosen first."""
        return self.lengths.view(-1, 2).T.reshape(-1)

    def discounted(self, alpha: float | None) -> Tensor:
        """The same where tokens beyond the length of the pair's shorter response count ``alpha`` times: (2p,).

        Source: LD-DPO, arXiv 2409.06411.
        """
        if alpha is None:
            return self.logps
        shared = self.lengths.view(-1, 2).min(1).values.repeat_interleave(2)  # (2p,)
        ends = (self.lengths.cumsum(0) - self.lengths + shared).repeat_interleave(  # (n,), where they end in a response
            self.lengths, output_size=len(self.token_logps)
        )
        beyond = torch.arange(len(ends), device=ends.device) >= ends
        return response_logps(self.token_logps * torch.where(beyond, alpha, 1.0), self.lengths)

    def likelihoods(self) -> Tensor | float:
        """Weight of each pair by how likely the policy itself finds both of its responses: (p,), detached; else 1.

        Source: WPO, equation 2 of arXiv 2406.11827, with its alignment by the sampled distribution.
        """
        if self.collisions is None:
            return 1.0
        aligned = response_logps(self.token_logps.detach() - self.collisions, self.lengths) / self.tokens
        chosen, rejected = aligned.exp().chunk(2)
        return chosen * rejected


@dataclass
class ModelRunner:
    """A model and the one way its forwards run, so that policy and reference go the same path.

    ``max_tokens`` shrinks when the device runs out of memory. ``chunked_lm_head``: the head runs after the body, a few
    pairs at a time; else in the model's own forward. ``wpo``: WPO's weights of pairs are wanted too.

    Units: ``max_tokens`` in tokens a forward.
    """

    model: nn.Module
    layout: Layout
    dtype: torch.dtype
    max_tokens: int
    device: torch.device
    chunked_lm_head: bool = True
    warn: Callable[[str], None] = lambda text: None
    wpo: bool = False

    @property
    def sharded(self) -> bool:
        """Whether the model lies in shards over the ranks, which then have to run their forwards in step."""
        return hasattr(self.model, BODY)

    def batch(self, pairs: Sequence[Pair]) -> MicroBatch:
        """The tensors of one forward, on the device."""
        return collate(pairs, self.layout).to(self.device)

    def token_logps(self, batch: MicroBatch) -> Tensor:
        """``token_logps`` of the model in the compute precision: (N,) nats."""
        return token_logps(self.model, batch, self.dtype, self.chunked_lm_head)

    def states(self, batch: MicroBatch) -> Tensor:
        """What ``head`` reads to predict the response tokens that carry loss: (N, H), in the precision it computes in.

        Where it cannot run apart these are logits already: (N, V).
        """
        if self.chunked_lm_head:
            return hidden_states(self.model, batch, self.dtype).to(self.dtype)
        return own_logits(self.model, batch, self.dtype)

    @property
    def head(self) -> Head:
        """The model's own, for ``states``."""
        return head_of(self.model, self.dtype) if self.chunked_lm_head else Head(None, None, self.dtype)

    def backward(
        self,
        batch: MicroBatch,
        loss: Callable[[slice, Said], Tensor],
        last: AbstractContextManager[Any] | None = None,
        routing: Callable[[Sequence[Tensor]], Tensor] | None = None,
    ) -> None:
        """Add the gradient of a loss that is a sum over pairs.

        ``loss`` is called with the places of some pairs in the batch and what is said of them, and gives their part of
        it.
        The last backward pass, through which all of the body's gradients come, runs inside ``last``.
        ``routing`` is called with the routers' logits of every layer and gives a further part; only where the head runs
        apart.
        """
        last = last or nullcontext()
        if not self.chunked_lm_head:
            said = self._said(own_logits(self.model, batch, self.dtype), batch.targets, batch.lengths)
            with last:
                loss(slice(None), said).backward()
            return
        states = body_states(self.model, batch, self.dtype, **({"output_router_logits": True} if routing else {}))
        hidden = predicting(states, batch)
        gradients: list[Tensor] = []
        for pairs, tokens in head_pieces(self.model, batch):
            leaf = hidden.detach()[tokens].requires_grad_()
            lengths = batch.lengths[2 * pairs.start : 2 * pairs.stop]
            said = self._said(head_of(self.model, self.dtype).logits(leaf), batch.targets[tokens], lengths)
            loss(pairs, said).backward()
            assert leaf.grad is not None
            gradients.append(leaf.grad)
            del said  # and with it the logits, before the next ones come
        more = [routing(states.router_logits)] if routing else []
        del states
        with last:
            if hidden.requires_grad:  # else nothing of the body is trained
                torch.autograd.backward([hidden, *more], [torch.cat(gradients), *(None for _ in more)])

    def router_logits(self, batch: MicroBatch) -> Sequence[Tensor]:
        """What the routers of each layer of a mixture of experts say in one forward: (B * T, experts) a layer."""
        states = body_states(self.model, batch, self.dtype, output_router_logits=True)
        logits: Sequence[Tensor] = states.router_logits
        return logits

    def said(self, batch: MicroBatch) -> Said:
        """What the model says of one forward's pairs, with no more logits at a time than ``backward`` has."""
        if not self.chunked_lm_head:
            return self._said(own_logits(self.model, batch, self.dtype), batch.targets, batch.lengths)
        hidden, head = hidden_states(self.model, batch, self.dtype), head_of(self.model, self.dtype)
        pieces = [tokens for _, tokens in head_pieces(self.model, batch)]
        parts = [self._said(head.logits(hidden[t]), batch.targets[t], batch.lengths) for t in pieces]
        collisions = [part.collisions for part in parts if part.collisions is not None]
        return Said(
            torch.cat([part.token_logps for part in parts]),
            batch.lengths,
            torch.cat(collisions) if collisions else None,
        )

    def _said(self, logits: Tensor, targets: Tensor, lengths: Tensor) -> Said:
        return Said(target_logps(logits, targets), lengths, collision_logps(logits.detach()) if self.wpo else None)

    def read(self, pairs: Sequence[Pair], ld_alpha: float | None) -> Read:
        """What a loss reads of all pairs.

        Raises:
            DpoError: one pair alone does not fit the device's memory.
        """
        found = Read(torch.empty(len(pairs), 2), torch.empty(len(pairs), 2), torch.ones(len(pairs)))
        for places, said in self.forwards(pairs, lambda _, batch: self.said(batch)):
            there = list(places)
            found.logps[there] = said.logps.view(2, -1).T.cpu()
            found.discounted[there] = said.discounted(ld_alpha).view(2, -1).T.cpu()
            if isinstance(weights := said.likelihoods(), Tensor):
                found.likelihoods[there] = weights.cpu()
        return found

    def costs(self, pairs: Sequence[Pair]) -> list[int]:
        """Tokens that each pair takes up in a forward."""
        return row_costs(pairs, self.layout)

    def score(
        self, pairs: Sequence[Pair], share: tuple[int, int] = (0, 1)
    ) -> Iterator[tuple[tuple[int, ...], Tensor, Tensor]]:
        """Score all pairs, or a rank's ``share`` of them, see ``forwards``.

        Yields: places of P pairs in ``pairs``; their logps (2P,), chosen first; their token log-probs (N,).

        Raises:
            DpoError: one pair alone does not fit the device's memory.
        """

        for places, (logps, tokens) in self.forwards(pairs, lambda _, batch: self.scored(batch), share):
            yield places, logps, tokens

    def scored(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """The logps (2P,), chosen first, and token log-probs (N,) of one forward."""
        logps = self.token_logps(batch)
        return response_logps(logps, batch.lengths), logps

    @torch.no_grad()
    def forwards(
        self,
        pairs: Sequence[Pair],
        compute: Callable[[Sequence[int], MicroBatch], Result],
        share: tuple[int, int] = (0, 1),
    ) -> Iterator[tuple[tuple[int, ...], Result]]:
        """Run over all pairs in packed forwards, longest first; with less a forward where memory runs out.

        ``compute`` is given places in ``pairs`` and their batch; again with others if it runs out of memory. With a
        ``share`` of (rank, world) the forwards are dealt out in turn: they are the same ones, whatever the world.

        Raises:
            DpoError: one pair alone does not fit the device's memory.
        """
        self.model.eval()
        costs = self.costs(pairs)
        by_length = sorted(range(len(pairs)), key=lambda i: (-costs[i], i))
        planned, (rank, world), dealt = self.max_tokens, share, 0
        for start in range(0, len(by_length), WINDOW):
            packed = pack(by_length[start : start + WINDOW], costs, self.layout, planned)
            waiting = packed[(rank - dealt) % world :: world]
            dealt += len(packed)
            if self.max_tokens < planned:  # memory ran out
                waiting = pack([i for indices in waiting for i in indices], costs, self.layout, self.max_tokens)
            while waiting:
                done = self.attempt(pairs, waiting[0], compute)
                if done is not None:
                    yield waiting.pop(0), done[0]
                else:
                    self.shrink([pairs[i] for i in waiting[0]])
                    left = [i for indices in waiting for i in indices]
                    waiting = pack(left, costs, self.layout, self.max_tokens)
        if self.sharded and rank >= (dealt % world or world):  # others have one more
            compute(by_length[-1:], self.batch([pairs[by_length[-1]]]))

    def attempt(
        self, pairs: Sequence[Pair], places: Sequence[int], compute: Callable[[Sequence[int], MicroBatch], Result]
    ) -> tuple[Result] | None:
        """What is computed of one forward; None when memory ran out."""
        try:
            return (compute(places, self.batch([pairs[i] for i in places])),)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            return None  # what the forward holds is free only when this frame is gone

    def shrink(self, pairs: Sequence[Pair]) -> None:
        """Halve ``max_tokens`` after a forward over these pairs ran out of memory, below what they took; tell it.

        Raises:
            DpoError: it was a single pair, so that nothing is left to halve.
        """
        if self.sharded:
            raise DpoError("memory ran out on a rank; those of a sharded model go in step: set a lower --max-tokens")
        taken = sum(self.costs(pairs)) if self.layout != "padded" else len(pairs) * max(self.costs(pairs))
        if len(pairs) == 1:
            raise DpoError(
                f"{pairs[0].where}: this pair alone ({taken:,} tokens) does not fit the device's memory; "
                "a lower --max-length helps, in training --gradient-checkpointing too"
            )
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.max_tokens = min(self.max_tokens, taken) // 2
        self.warn(f"out of memory at {taken:,} tokens a forward; going on with --max-tokens {self.max_tokens}")


@dataclass(frozen=True)
class Read:
    """What a loss reads of P pairs under one model, on the host; see ``Said``.

    Shapes: ``logps`` and ``discounted`` (P, 2), chosen and rejected; ``likelihoods`` (P,).
    """

    logps: Tensor
    discounted: Tensor
    likelihoods: Tensor


def out_of_memory(error: RuntimeError) -> bool:
    """Whether the device's memory ran out: torch's own error, or that of a library below it."""
    return isinstance(error, torch.OutOfMemoryError) or "ALLOC_FAILED" in str(error)


def token_logps(model: nn.Module, batch: MicroBatch, dtype: torch.dtype, chunked_lm_head: bool = False) -> Tensor:
    """Log-probability of every response token that carries loss, given all tokens before it.

    Only hidden states that predict such a token meet the head: a few pairs at a time with ``chunked_lm_head``, else
    in the model's own forward, which knows them by ``logits_to_keep``.

    Shapes: -> (N,), float32, responses in the batch's order.
    Units: nats.
    """
    if not chunked_lm_head:
        return target_logps(own_logits(model, batch, dtype), batch.targets)
    hidden, head = hidden_states(model, batch, dtype), head_of(model, dtype)
    pieces = [tokens for _, tokens in head_pieces(model, batch)]
    return torch.cat([target_logps(head.logits(hidden[tokens]), batch.targets[tokens]) for tokens in pieces])


def target_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of each target: (N, V), (N,) -> (N,) nats."""
    return -F.cross_entropy(logits, targets, reduction="none")


def collision_logps(logits: Tensor) -> Tensor:
    """Log of the probability that two draws from each distribution are the same: (N, V) -> (N,) nats, few at a time."""
    return torch.cat([(2 * some).logsumexp(-1) - 2 * some.logsumexp(-1) for some in logits.split(64)])


def own_logits(model: nn.Module, batch: MicroBatch, dtype: torch.dtype) -> Tensor:
    """What the model's own forward predicts the response tokens by: (N, V), float32."""
    if batch.alone:
        return torch.cat([own_logits(model, sequence, dtype) for sequence in batch.alone])
    width = batch.input_ids.shape[1]
    keep, column = torch.unique(batch.logit_positions % width, return_inverse=True)
    with precision(batch.input_ids.device, dtype):
        logits: Tensor = model(logits_to_keep=keep, use_cache=False, **_inputs(batch)).logits  # (B, kept, V)
    return logits[batch.logit_positions // width, column].float()


def max_logit_rows(model: nn.Module) -> int:
    """Response tokens that may meet the head together."""
    vocabulary: int = model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]
    return LOGITS_BUDGET_BYTES[next(model.parameters()).device.type] // (4 * vocabulary)


def head_pieces(model: nn.Module, batch: MicroBatch) -> Iterator[tuple[slice, slice]]:
    """Places of whole pairs, and of their response tokens, that meet the head together."""
    room = max_logit_rows(model)
    pair = token = end = 0
    for place, more in enumerate(batch.pair_tokens):
        if place > pair and end + more - token > room:
            yield slice(pair, place), slice(token, end)
            pair, token = place, end
        end += more
    yield slice(pair, len(batch.pair_tokens)), slice(token, end)


def hidden_states(model: nn.Module, batch: MicroBatch, dtype: torch.dtype) -> Tensor:
    """What the head reads to predict the response tokens: (N, H)."""
    return predicting(body_states(model, batch, dtype), batch)


def body_states(model: nn.Module, batch: MicroBatch, dtype: torch.dtype, **more: Any) -> Any:
    """What the body gives of a forward, as transformers names it; ``more`` asks it for more than hidden states."""
    if batch.alone:
        states = [body_states(model, sequence, dtype, **more) for sequence in batch.alone]
        routers = zip(*(each.router_logits for each in states), strict=True) if more else ()
        return SimpleNamespace(
            last_hidden_state=torch.cat([each.last_hidden_state for each in states], dim=1),
            router_logits=[torch.cat([logits.flatten(0, -2) for logits in layer]) for layer in routers],
        )
    body: Any = getattr(model, BODY, None) or model.base_model
    with precision(batch.input_ids.device, dtype):
        return body(use_cache=False, **_inputs(batch), **more)


def predicting(states: Any, batch: MicroBatch) -> Tensor:
    """The hidden states that predict a response token that carries loss: (N, H)."""
    hidden: Tensor = states.last_hidden_state  # (B, T, H)
    return hidden.flatten(0, 1)[batch.logit_positions]


def head_of(model: nn.Module, dtype: torch.dtype) -> Head:
    """The model's head, to run apart from its body."""
    return Head(model.get_output_embeddings(), model.config.get_text_config(), dtype)  # type: ignore[operator, union-attr]


def _inputs(batch: MicroBatch) -> dict[str, Any]:
    names = ("input_ids", "position_ids", "attention_mask", "segments")
    return {name: value for name in names if (value := getattr(batch, name)) is not None}


def precision(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Within it matrix products are computed in ``dtype``."""
    # No cache: each weight is used once a forward, and a cast copy of all of them need not stay.
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32, cache_enabled=False)


def response_logps(token_logps: Tensor, lengths: Tensor) -> Tensor:
    """Sum token log-probs to one number a response.

    Shapes: (N,), ``lengths`` (2P,) in the batch's order -> (2P,), float32, all chosen first and then all rejected.
    Units: nats.
    """
    sums = torch.segment_reduce(token_logps.double(), "sum", lengths=lengths, unsafe=True)  # (2P,) pair by pair
    return sums.float().view(-1, 2).T.reshape(-1)


def logp_tolerance(dtype: torch.dtype) -> float:
    """How far two computations of one response's log-prob may lie apart by arithmetic alone.

    Units: nats per square root of the response's tokens that carry loss.
    Source: docs/performance.md, "Arithmetic noise".
    """
    return 1e-3 if dtype == torch.float32 else 0.1
