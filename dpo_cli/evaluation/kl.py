"""How far a policy is from its reference: KL and entropies of whole next-token distributions.

They need the logits of two models at the same positions, and memory holds neither two models nor the logits of all
tokens. So one model runs first, and what its head reads is kept in a temporary file, with a copy of the head; then the
other model runs, and both heads compute their logits for a few tokens at a time.

Legend: P pairs, N response tokens that carry loss, H hidden, V vocabulary.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dpo_cli.data.batching import MicroBatch, length_weights
from dpo_cli.data.pairs import Pairs
from dpo_cli.evaluation.metrics import Table
from dpo_cli.models.logprobs import Head, ModelRunner
from dpo_cli.utils.console import Progress
from dpo_cli.utils.errors import NotWrittenError, UsageError
from dpo_cli.utils.files import writing

FOLD = 20.0  # a token whose probability changed by more than this factor is shifted
FLOOR = -1e4  # nats: log-probs of tokens that a model rules out, so that 0 times their log is 0
COLUMNS = ("logp", "ref_logp", "entropy", "ref_entropy", "kl", "reverse_kl")  # of each token; p policy, q reference


class Stopped(Exception):  # noqa: N818 (no error)
    """A pass over pairs was asked to end early."""


@dataclass(frozen=True)
class HeadInputs:
    """One model's side of a comparison: what its head reads at every response token, (N, H), and the head."""

    states: Tensor
    head: Head


@dataclass(frozen=True)
class TokenScores:
    """Policy and reference at every response token of P pairs: pair by pair, chosen first.

    Shapes: ``tokens`` (N, 6), float32, named by ``COLUMNS``; (N, 2) where the two were not compared, and (N, 1) of the
    policy alone. ``lengths`` (P, 2).
    Units: nats.
    """

    tokens: Tensor
    lengths: npt.NDArray[np.int64]

    @property
    def logratios(self) -> Tensor:
        """(N,) nats."""
        return self.tokens[:, 0] - self.tokens[:, 1]

    @cached_property
    def distributions(self) -> dict[str, Table]:
        """Entropies and KLs summed over each response, and its number of shifted tokens: (P, 2) each, if compared."""
        if self.tokens.shape[1] < len(COLUMNS):
            return {}
        sums = {name: self._sum(self.tokens[:, column]) for column, name in enumerate(COLUMNS[2:], 2)}
        return sums | {"shifted_tokens": self._sum(self.logratios.abs() > math.log(FOLD))}

    def logps(self, column: int = 0, ld_alpha: float = 1.0) -> Table:
        """Log-probs under the policy, or under the reference (1), with the token weights of LD-DPO: (P, 2)."""
        weights = length_weights(torch.from_numpy(self.lengths.reshape(-1)), ld_alpha)
        sums = self._sum(self.tokens[:, column] * weights)
        return sums.astype(np.float32).astype(np.float64)  # as they are cached

    def _sum(self, values: Tensor) -> Table:
        """Sum over each response: (N,) -> (P, 2)."""
        lengths = torch.from_numpy(self.lengths.reshape(-1))
        return np.asarray(torch.segment_reduce(values.double().contiguous(), "sum", lengths=lengths)).reshape(-1, 2)


def score(
    runner: ModelRunner, pairs: Pairs, progress: Progress, stopped: Callable[[], bool] = lambda: False
) -> TokenScores:
    """Compute the log-prob of each response token.

    Raises:
        Stopped: ``stopped``, asked after each forward, was true.
    """
    tokens = _run(runner, pairs, lambda _, batch: runner.token_logps(batch)[:, None], progress, stopped=stopped)
    return TokenScores(tokens, pairs.loss_lengths)


def record(runner: ModelRunner, pairs: Pairs, folder: Path, progress: Progress) -> HeadInputs:
    """Run a model over all pairs and keep what its head reads, in a temporary file below ``folder``.

    Raises:
        NotWrittenError: the disk has no room for it.
    """
    states = _run(runner, pairs, lambda _, batch: runner.body(batch).head_inputs(), progress, folder)
    return HeadInputs(states, runner.head.copied())


def compare(
    runner: ModelRunner,
    recorded: HeadInputs,
    pairs: Pairs,
    progress: Progress,
    *,
    policy_runs: bool,
    same: bool = False,
    stopped: Callable[[], bool] = lambda: False,
) -> TokenScores:
    """Run the other model over the same pairs.

    The model that runs is the policy if ``policy_runs``, else the reference; the other one was recorded. If it is the
    ``same`` model, the recorded states are its own and only its head runs. Each head gets as many tokens at a time as
    when it scores, so that the log-probs are equal to the bit.

    Raises:
        UsageError: the two have different vocabularies.
        Stopped: ``stopped``, asked after each forward, was true.
    """
    other_head, spans = recorded.head.to(runner.device), spans_of(pairs)

    def both(places: Sequence[int], batch: MicroBatch) -> Tensor:
        other = torch.cat([recorded.states[spans[place]] for place in places]).to(runner.device)
        states = other if same else runner.body(batch).head_inputs()
        first = torch.empty_like(batch.targets)  # (E,): a place of each distinct token
        first[batch.edges] = torch.arange(len(batch.edges), device=first.device)
        parts: list[Tensor] = []
        for piece in batch.pieces:
            at, targets = first[piece.distinct], batch.targets[piece.distinct]
            logits, other_logits = runner.head.logits(states[at]), other_head.logits(other[at])  # (e, V)
            if logits.shape != other_logits.shape:
                sizes = f"{logits.shape[1]:,} and {other_logits.shape[1]:,}"
                raise UsageError(f"the models have vocabularies of {sizes} tokens, so there is no KL: add --kl none")
            p, q = (logits, other_logits) if policy_runs else (other_logits, logits)
            rows = max(1, runner.kind.compared_bytes // (4 * p.shape[1]))
            parts += map(divergences, p.split(rows), q.split(rows), targets.split(rows))
        return torch.cat(parts)[batch.edges]

    return TokenScores(_run(runner, pairs, both, progress, stopped=stopped), pairs.loss_lengths)


def _run(
    runner: ModelRunner,
    pairs: Pairs,
    compute: Callable[[Sequence[int], MicroBatch], Tensor],
    progress: Progress,
    folder: Path | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> Tensor:
    """Collect the rows that ``compute`` has for the response tokens of each forward; on disk if a folder is given."""
    spans, table = spans_of(pairs), torch.empty(0)
    with progress:
        for places, rows in runner.forwards(pairs, compute):
            if not len(table):
                shape = spans[-1].stop, rows.shape[1]
                table = _on_disk(shape, rows.dtype, folder) if folder else torch.empty(shape, dtype=rows.dtype)
            parts = rows.cpu().split([spans[place].stop - spans[place].start for place in places])
            for place, part in zip(places, parts, strict=True):
                table[spans[place]] = part
            progress.advance(len(places))
            if stopped():
                raise Stopped
    return table


def divergences(p_logits: Tensor, q_logits: Tensor, targets: Tensor) -> Tensor:
    """Compare two next-token distributions with each other and with the token that came.

    Shapes: (n, V), (n, V), (n,) -> (n, 6), float32, of ``COLUMNS``.
    Units: nats.
    Source: H(p) = -sum p log p, KL(p||q) = sum p (log p - log q) (Cover and Thomas, chapter 2).
    """
    log_p, log_q = (logits.log_softmax(-1).clamp_(min=FLOOR) for logits in (p_logits, q_logits))
    p, q, log_ratio = log_p.exp(), log_q.exp(), log_p - log_q
    dot, at = torch.linalg.vecdot, targets[:, None]
    columns = [log_p.gather(1, at)[:, 0], log_q.gather(1, at)[:, 0], -dot(p, log_p), -dot(q, log_q)]
    return torch.stack([*columns, dot(p, log_ratio), -dot(q, log_ratio)], 1)


def spans_of(pairs: Pairs) -> list[slice]:
    """The rows of each pair in a table of all response tokens: chosen, then rejected."""
    ends = np.cumsum(pairs.loss_lengths.sum(1)).tolist()
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def _on_disk(shape: tuple[int, int], dtype: torch.dtype, folder: Path) -> Tensor:
    """A tensor in a temporary file without a name, whose room is reserved; the system's folder if this is closed.

    Raises:
        NotWrittenError: the disk has no room.
    """
    folder, size = folder.expanduser(), math.prod(shape) * dtype.itemsize
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        folder = Path(tempfile.gettempdir())
    if size > (free := shutil.disk_usage(folder).free):
        raise NotWrittenError(
            f"the exact KL needs {size / 2**30:.1f} GiB of temporary space and {folder} has {free / 2**30:.1f}: "
            "choose a larger disk with --cache-dir, evaluate fewer pairs, or use --kl none"
        )
    with writing(folder / "a temporary file"), tempfile.TemporaryFile(dir=folder) as file:
        if hasattr(os, "posix_fallocate"):  # a full disk is an error here, and not a signal when a page is written
            os.posix_fallocate(file.fileno(), 0, size)
        content = np.memmap(file, np.uint8, "r+", shape=(size,))
    return torch.from_numpy(content).view(dtype).view(shape)
