"""Log-probability of each response under a model.

The body of the model runs over a whole packed row, its head over the response tokens of a few pairs at a time. The loss
of a pair needs no other pair, so the backward pass of each piece of the head follows at once: three matrix products per
token, and logits of a few pairs at a time, are all that the head costs.

Legend: P pairs, B rows, T tokens of a row, N response tokens that carry loss, E distinct ones among them, H hidden, V
vocabulary; p, n, e those of a piece of the head.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpo_cli.data.batching import MicroBatch, Piece, collate
from dpo_cli.data.pairs import Pair, rankings
from dpo_cli.data.schedule import Layout, count_tokens, pack, parts, row_costs
from dpo_cli.losses.preference import Preferences
from dpo_cli.models.parallel import BODY, Parallel, parallel_of
from dpo_cli.utils.devices import CPU, KINDS, DeviceKind, device_kind, empty_cache
from dpo_cli.utils.errors import DpoError, UsageError

WINDOW = 512  # pairs or trees of similar length that are packed together where order does not matter

Result = TypeVar("Result")
Compute = Callable[[Sequence[int], MicroBatch], Result]  # of indices of pairs and their batch


class Float32Product(torch.autograd.Function):
    """``hidden @ weight.T`` in float32: rounded to bfloat16, logits would make half of a log-prob's noise.

    Source: torch.mm's ``out_dtype``, for which torch 2.13 has no derivative.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        """Multiply 16-bit matrices: (N, H), (V, H) -> (N, V), float32."""
        ctx.save_for_backward(hidden, weight)
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Multiply the gradient of the logits, rounded as autocast rounds it, with what was saved."""
        hidden, weight = ctx.saved_tensors
        gradient = gradients[0].to(weight.dtype)  # (N, V)
        wanted = ctx.needs_input_grad
        return gradient @ weight if wanted[0] else None, gradient.T @ hidden if wanted[1] else None


@dataclass(frozen=True)
class Head:
    """Maps hidden states to logits, on a device of this ``kind``. ``module`` None: its inputs are logits already."""

    module: nn.Module | None
    config: Any
    dtype: torch.dtype
    kind: DeviceKind = CPU

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute logits over the vocabulary: (N, H) -> (N, V), float32.

        Scales and soft-caps have the names below; ``choose_layout`` checks whether that is all that a model has.
        """
        if self.module is None:
            return hidden.float()
        logits = self._product(self.module, hidden)
        if scale := getattr(self.config, "logit_scale", None):  # cohere
            logits = logits * scale
        if scale := getattr(self.config, "logits_scaling", None):  # granite
            logits = logits / scale
        if cap := getattr(self.config, "final_logit_softcapping", None):  # gemma
            logits = (logits / cap).tanh() * cap
        return logits.float()

    def _product(self, module: nn.Module, hidden: Tensor) -> Tensor:
        logits: Tensor
        # A head that an adapter wraps, or that is sharded, is of another class.
        if type(module) is nn.Linear and self.dtype != torch.float32 and self.kind.float32_logits:
            logits = Float32Product.apply(hidden.to(self.dtype), module.weight.to(self.dtype))
            return logits if module.bias is None else logits + module.bias
        with precision(hidden.device, self.dtype):
            logits = module(hidden)
            return logits

    def copied(self) -> Head:
        """Copy to the CPU in the precision of the computation; the copy outlives the model."""
        copy = deepcopy(self.module).to("cpu", self.dtype) if self.module else None
        return Head(copy, self.config, self.dtype)

    def to(self, device: torch.device) -> Head:
        """Copy to a device."""
        if self.module is None or next(self.module.parameters()).device == device:
            return self
        return Head(deepcopy(self.module).to(device), self.config, self.dtype, device_kind(device))


@dataclass
class HiddenStates:
    """What the head reads to predict the tokens that carry loss, and the gradients of the head's pieces.

    Shapes: ``values`` (E, H), with their graph; logits (E, V) where the head cannot run apart. ``router_logits``
    (B * T, experts) per layer, where they were asked for.
    """

    values: Tensor
    batch: MicroBatch
    head: Head
    router_logits: Sequence[Tensor] = ()
    full_logps: list[Tensor] = field(default_factory=list)  # (2, p) of each piece, detached
    gradients: list[Tensor] = field(default_factory=list)  # (e, H) of each piece

    def head_inputs(self) -> Tensor:
        """Return what the head reads for each response token, in the precision that it computes in: (N, H)."""
        values = self.values[self.batch.edges]
        return values if self.head.module is None else values.to(self.head.dtype)

    def head_pieces(self, wpo: bool = False) -> Iterator[Preferences]:
        """Run the head over a few whole pairs at a time; call ``backward`` on the loss of each before the next one.

        ``wpo``: multiply the weights of the pairs by WPO's.
        """
        for piece in self.batch.pieces:
            leaf = self.values.detach()[piece.distinct].requires_grad_()
            preferences = self._preferences(leaf, piece, wpo)
            self.full_logps.append(preferences.full_logps.detach().view(2, -1))
            yield preferences
            if leaf.grad is not None:
                self.gradients.append(leaf.grad)
            del preferences  # and its logits, before the next ones come

    def responses(self) -> tuple[Tensor, Tensor]:
        """Return the log-prob of each response, detached, and its tokens that carry loss: (2P,) each, chosen first."""
        return torch.cat(self.full_logps, dim=1).flatten(), self.batch.lengths.view(-1, 2).T.reshape(-1)

    def backward(self, *losses: Tensor) -> None:
        """Run the backward pass of the body, from the gradients of all pieces and from ``losses`` of its outputs."""
        if self.values.requires_grad:  # else the body has no trained weight
            gradients = [torch.cat(self.gradients), *(None for _ in losses)]
            torch.autograd.backward([self.values, *losses], gradients)

    def _preferences(self, leaf: Tensor, piece: Piece, wpo: bool) -> Preferences:
        batch, logits, pairs = self.batch, self.head.logits(leaf), piece.pairs
        places = batch.edges[piece.tokens] - piece.distinct.start  # (n,) among the logits
        token_logps = target_logps(logits, batch.targets[piece.distinct])[places]  # (n,)
        lengths = batch.lengths[2 * pairs.start : 2 * pairs.stop]
        weights = batch.weights[pairs]
        if wpo:
            weights = weights * likelihoods(token_logps.detach(), logits.detach(), places, lengths)
        return Preferences(
            logps=response_logps(token_logps * batch.token_weights[piece.tokens], lengths),
            ref_logps=batch.weighted_ref_logps.view(2, -1)[:, pairs].reshape(-1),
            lengths=lengths.view(-1, 2).T.reshape(-1),
            full_logps=response_logps(token_logps, lengths),
            mean_chosen_length=batch.mean_chosen_length,
            margins=batch.margins[pairs],
            weights=weights,
            reward_baseline=batch.reward_baseline,
            ranking_sizes=piece.ranking_sizes,
        )


@dataclass
class ModelRunner:
    """A model and the one way its forwards run, so that policy and reference take the same path.

    ``max_tokens`` shrinks when the device runs out of memory. ``chunked_lm_head``: the head runs after the body, a few
    pairs at a time, on the hidden states that predict tokens that carry loss; else within the model's own forward.
    ``kind``: what the forwards run as; that of the ``device``, unless another is given to be traced or tested.
    ``noise``: the root mean square error of a token's log-prob against float32, 0 there, by ``probes``: a batch and its
    token log-probs in float32.

    Units: ``max_tokens`` in tokens per forward; ``noise`` in nats.
    """

    model: nn.Module
    layout: Layout
    dtype: torch.dtype
    max_tokens: int
    device: torch.device
    chunked_lm_head: bool = True
    noise: float = 0.0
    probes: tuple[MicroBatch, Tensor] | None = None
    warn: Callable[[str], None] = lambda text: None
    kind: DeviceKind = None  # type: ignore[assignment]  # see __post_init__

    def __post_init__(self) -> None:
        self.kind = self.kind or device_kind(self.device)

    @property
    def parallel(self) -> Parallel:
        """How the model lies over the processes of the run."""
        return parallel_of(self.model)

    @property
    def head(self) -> Head:
        """The head for ``body(...).values``."""
        model: Any = self.model
        module = model.get_output_embeddings() if self.chunked_lm_head else None
        return Head(module, model.config.get_text_config(), self.dtype, self.kind)

    @property
    def max_logit_rows(self) -> int:
        """The most response tokens at the head at once, unless a single pair has more."""
        model: Any = self.model
        return self.kind.logits_bytes // (4 * int(model.config.get_text_config().vocab_size))

    def batch(self, pairs: Sequence[Pair], ld_alpha: float = 1.0) -> MicroBatch:
        """Build the tensors of one forward, on the device."""
        rows = self.max_logit_rows if self.chunked_lm_head else sys.maxsize
        return collate(pairs, self.layout, ld_alpha, rows).to(self.device)

    def body(self, batch: MicroBatch, output_router_logits: bool = False) -> HiddenStates:
        """Run the body over a batch, or the whole model where the head cannot run apart."""
        if batch.alone:
            parts = [self.body(sequence, output_router_logits) for sequence in batch.alone]
            routers = [torch.cat(layer) for layer in zip(*(part.router_logits for part in parts), strict=True)]
            return HiddenStates(torch.cat([part.values for part in parts]), batch, self.head, routers)
        model: Any = self.model
        names = ("input_ids", "position_ids", "attention_mask", "segments")
        inputs: dict[str, Any] = {name: value for name in names if (value := getattr(batch, name)) is not None}
        if batch.segments:
            inputs["flash"] = self.kind.flash
        with precision(self.device, self.dtype):
            if not self.chunked_lm_head:
                width = batch.input_ids.shape[1]
                keep, column = torch.unique(batch.logit_positions % width, return_inverse=True)
                logits = model(logits_to_keep=keep, use_cache=False, **inputs).logits  # (B, kept, V)
                return HiddenStates(logits[batch.logit_positions // width, column].float(), batch, self.head)
            if output_router_logits:
                inputs["output_router_logits"] = True
            states = (getattr(model, BODY, None) or model.base_model)(use_cache=False, **inputs)
        routers = [logits.flatten(0, -2) for logits in states.router_logits] if output_router_logits else []
        return HiddenStates(states.last_hidden_state.flatten(0, 1)[batch.logit_positions], batch, self.head, routers)

    def token_logps(self, batch: MicroBatch) -> Tensor:
        """Compute the log-probability of every response token that carries loss, given all tokens before it.

        Shapes: -> (N,), float32, responses in the order of the batch.
        Units: nats.
        """
        hidden = self.body(batch)
        pieces = [piece.distinct for piece in batch.pieces]
        logps = torch.cat([target_logps(hidden.head.logits(hidden.values[i]), batch.targets[i]) for i in pieces])
        return logps[batch.edges]

    def costs(self, pairs: Sequence[Pair]) -> list[int]:
        """Return the number of tokens that each pair takes up in a forward."""
        return row_costs(pairs, self.layout)

    @torch.no_grad()
    def forwards(
        self, pairs: Sequence[Pair], compute: Compute[Result], share: tuple[int, int] = (0, 1)
    ) -> Iterator[tuple[tuple[int, ...], Result]]:
        """Run over all pairs in packed forwards, longest first, and again with fewer tokens if memory runs out.

        ``compute`` gets indices into ``pairs`` and their batch, smaller ones after memory ran out. With a ``share`` of
        (rank, world size) the forwards are dealt out in turn: the same forwards for any world size.

        Raises:
            DpoError: one pair alone does not fit the device's memory.
        """
        self.model.eval()
        costs, (rank, world_size) = self.costs(pairs), share
        packed = self._pack(range(len(pairs)), pairs, costs)
        waiting = deque(packed[rank::world_size])
        while waiting:
            result = self._attempt(pairs, waiting[0], compute)
            if result is not None:
                yield waiting.popleft(), result[0]
            else:
                self.shrink([pairs[i] for i in waiting[0]])
                waiting = deque(self._pack([i for indices in waiting for i in indices], pairs, costs))
        if self.parallel.sharded and rank >= (len(packed) % world_size or world_size):  # other ranks have one more
            compute(packed[-1][-1:], self.batch([pairs[packed[-1][-1]]]))

    def _pack(self, indices: Sequence[int], pairs: Sequence[Pair], costs: Sequence[int]) -> list[tuple[int, ...]]:
        """Pack what shares a beginning together, and pairs of similar length, a window after the other."""
        packable = parts(indices, pairs, costs, self.layout, self.max_tokens)
        windows = (packable[start : start + WINDOW] for start in range(0, len(packable), WINDOW))
        return [packed for window in windows for packed in pack(window, self.layout, self.max_tokens)]

    def _attempt(self, pairs: Sequence[Pair], places: Sequence[int], compute: Compute[Result]) -> tuple[Result] | None:
        """Compute one forward; None if memory ran out. Its tensors are freed only when this frame ends."""
        try:
            return (compute(places, self.batch([pairs[i] for i in places])),)
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            return None

    def shrink(self, pairs: Sequence[Pair]) -> None:
        """Halve ``max_tokens`` after a forward over these pairs ran out of memory, below the tokens it had.

        Raises:
            DpoError: it was a single pair or ranking, which cannot be split.
        """
        if self.parallel.sharded:
            raise DpoError("out of memory; with --fsdp all ranks run in lockstep: set a lower --max-tokens")
        tokens = count_tokens(range(len(pairs)), pairs, self.costs(pairs), self.layout)
        if len(rankings(range(len(pairs)), pairs)) == 1:
            what = "pair" if len(pairs) == 1 else "ranking"
            raise DpoError(
                f"{pairs[0].where}: this {what} alone ({tokens:,} tokens) does not fit the device's memory; "
                "a lower --max-length helps, in training --gradient-checkpointing too"
            )
        empty_cache()
        self.max_tokens = min(self.max_tokens, tokens) // 2
        self.warn(f"out of memory at {tokens:,} tokens per forward; continuing with --max-tokens {self.max_tokens}")


def out_of_memory(error: RuntimeError) -> bool:
    """Whether the device ran out of memory: torch's own error, or that of a library below it."""
    return isinstance(error, torch.OutOfMemoryError) or "ALLOC_FAILED" in str(error)


@contextmanager
def forward_errors(message: str, remedy: str = "") -> Iterator[None]:
    """Report any error of a model's own code in a forward in one line after ``message``; not out-of-memory errors.

    Raises:
        UsageError: with the library's reason.
    """
    try:
        yield
    except DpoError:
        raise
    except Exception as error:  # of any type
        if isinstance(error, RuntimeError) and out_of_memory(error):
            raise
        reason = next(iter(str(error).splitlines()), "")
        raise UsageError(f"{message}: {type(error).__name__}: {reason}{remedy}") from error


def target_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """Compute the log-probability of each target: (N, V), (N,) -> (N,) nats."""
    return -F.cross_entropy(logits, targets, reduction="none")


def likelihoods(token_logps: Tensor, logits: Tensor, places: Tensor, lengths: Tensor) -> Tensor:
    """Weigh each pair by how likely the policy itself finds its responses.

    Shapes: (n,), (e, V), ``places`` (n,) of the tokens among the logits, (2p,) -> (p,).

    Source: WPO, equation 2 of arXiv 2406.11827, with its alignment by the sampled distribution.
    """
    # log sum p^2 over the vocabulary, a few tokens at a time: (e,)
    squares = torch.cat([(2 * rows).logsumexp(-1) - 2 * rows.logsumexp(-1) for rows in logits.split(64)])
    aligned = response_logps(token_logps - squares[places], lengths) / lengths.view(-1, 2).T.reshape(-1)
    chosen, rejected = aligned.exp().chunk(2)
    return chosen * rejected


def precision(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Compute matrix products in ``dtype`` within the block."""
    # No cache: each weight is used once per forward, and a cast copy of all of them need not stay.
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32, cache_enabled=False)


def _grouped_mm(rows: Tensor, weights: Tensor, *options: Any) -> Tensor:
    """Multiply rows by the weights of their experts in the precision of autocast, which torch 2.13 leaves out.

    A GPU has a fast kernel for bfloat16 alone, and waits for the host with float32. Source: pytorch issue 174763.
    """
    dtype = torch.get_autocast_dtype(rows.device.type)
    with torch.autocast(rows.device.type, enabled=False):
        return torch._grouped_mm(rows.to(dtype), weights.to(dtype), *options)


ATEN = torch.library.Library("aten", "IMPL")  # for the life of the process
for key in ("AutocastCUDA", "AutocastCPU"):
    if not torch._C._dispatch_has_kernel_for_dispatch_key("aten::_grouped_mm", key):
        ATEN.impl("_grouped_mm", _grouped_mm, key)


def response_logps(token_logps: Tensor, lengths: Tensor) -> Tensor:
    """Sum token log-probs per response.

    Shapes: (N,), ``lengths`` (2P,) in the order of the batch -> (2P,), float32, all chosen first and then all rejected.
    Units: nats.
    """
    index = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths, output_size=len(token_logps))
    values = token_logps.to(KINDS.get(token_logps.device.type, CPU).sums)  # segment_reduce is for CPU and CUDA alone
    sums = values.new_zeros(len(lengths)).index_add(0, index, values)  # (2P,) pair by pair
    return sums.float().view(-1, 2).T.reshape(-1)
