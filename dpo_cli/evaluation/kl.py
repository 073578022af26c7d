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
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dpo_cli.data.collate import MicroBatch
from dpo_cli.data.pairs import Pairs
from dpo_cli.evaluation.metrics import Distributions
from dpo_cli.models.logprobs import Head, ModelRunner, max_logit_rows, split_pairs
from dpo_cli.utils.console import Reporter
from dpo_cli.utils.errors import NotWrittenError, UsageError
from dpo_cli.utils.files import writing

FOLD = 20.0  # a token whose probability changed by more than this factor is shifted
FLOOR = -1e4  # nats: log-probs of tokens that a model rules out, so that 0 times their log is 0
# Logits that are compared at a time; on a CPU they stay in its cache.
PIECE_BYTES = {"cpu": 2**24, "cuda": 2**28}
COLUMNS = ("logp", "ref_logp", "entropy", "ref_entropy", "kl", "reverse_kl")  # of each token; p policy, q reference

Result = TypeVar("Result")


@dataclass(frozen=True)
class Progress:
    """How a pass over pairs is shown, and whether it should end early, which is asked after each forward."""

    reporter: Reporter
    name: str
    stopped: Callable[[], bool] = lambda: False


@dataclass(frozen=True)
class RecordedStates:
    """One model's side of a comparison: what its head reads at every response token, (N, H), and the head."""

    states: Tensor
    head: Head


@dataclass(frozen=True)
class ModelComparison:
    """Policy and reference at every response token of P pairs, and summed over each response.

    Shapes: ``tokens`` (N, 6), float32, named by ``COLUMNS``: pair by pair, chosen first; ``lengths`` (P, 2); ``logps``
    and ``ref_logps`` (P, 2), float32.
    Units: nats.
    """

    tokens: Tensor
    lengths: npt.NDArray[np.int64]
    logps: Tensor
    ref_logps: Tensor
    distributions: Distributions

    @property
    def starts(self) -> npt.NDArray[np.int64]:
        """The first row of each pair in ``tokens``: (P,)."""
        counts = self.lengths.sum(1)
        return np.asarray(np.cumsum(counts) - counts)

    @property
    def logratios(self) -> Tensor:
        """(N,) nats."""
        return self.tokens[:, 0] - self.tokens[:, 1]


def score(runner: ModelRunner, pairs: Pairs, progress: Progress) -> Tensor | None:
    """Compute log-probs of all pairs: (P, 2) float32 nats on the host; None if stopped."""
    table = torch.full((len(pairs), 2), math.nan)
    for places, logps in _forwards(runner, pairs, lambda _, batch: runner.response_logps(batch), progress):
        table[list(places)] = logps.view(2, -1).T.cpu()
    return None if progress.stopped() else table


def record(runner: ModelRunner, pairs: Pairs, folder: Path, progress: Progress) -> RecordedStates | None:
    """Run a model over all pairs and keep what its head reads, in a temporary file below ``folder``; None if stopped.

    Raises:
        NotWrittenError: the disk has no room for it.
    """
    spans, states = _spans(pairs), torch.empty(0)
    for places, rows in _forwards(runner, pairs, lambda _, batch: runner.body(batch).head_inputs(), progress):
        if not len(states):
            states = _on_disk(spans[-1].stop, rows.shape[1], rows.dtype, folder)
        _write(states, [spans[place] for place in places], rows.to("cpu"))
    return None if progress.stopped() else RecordedStates(states, runner.head.copied())


def compare(
    runner: ModelRunner,
    recorded: RecordedStates,
    pairs: Pairs,
    progress: Progress,
    *,
    policy_runs: bool,
    same: bool = False,
) -> ModelComparison | None:
    """Run the other model over the same pairs; None if stopped.

    The model that runs is the policy if ``policy_runs``, else the reference; the other one was recorded. If it is the
    ``same`` model, the recorded states are its own and only its head runs.

    Raises:
        UsageError: the two have different vocabularies.
    """
    other_head, spans, lengths = recorded.head.to(runner.device), _spans(pairs), pairs.loss_lengths
    tokens = torch.full((spans[-1].stop, len(COLUMNS)), math.nan)

    def both(places: Sequence[int], batch: MicroBatch) -> Tensor:
        other = torch.cat([recorded.states[spans[place]] for place in places]).to(runner.device)
        states = other if same else runner.body(batch).head_inputs()
        return torch.cat([*_compare_heads(runner, batch, states, other, other_head, policy_runs)]).cpu()

    for places, rows in _forwards(runner, pairs, both, progress):
        _write(tokens, [spans[place] for place in places], rows)
    if progress.stopped():
        return None
    shifted = ((tokens[:, 0] - tokens[:, 1]).abs() > math.log(FOLD))[:, None]
    responses = torch.from_numpy(lengths.reshape(-1))
    sums = torch.segment_reduce(torch.cat([tokens, shifted], 1).double(), "sum", lengths=responses)
    logps, ref_logps, *others = sums.view(-1, 2, len(COLUMNS) + 1).unbind(-1)
    distributions = Distributions(*(each.numpy() for each in others))
    return ModelComparison(tokens, lengths, logps.float(), ref_logps.float(), distributions)


def _forwards(
    runner: ModelRunner, pairs: Pairs, compute: Callable[[Sequence[int], MicroBatch], Result], progress: Progress
) -> Iterator[tuple[tuple[int, ...], Result]]:
    """What is computed of each forward, until stopped."""
    with progress.reporter.progress(progress.name, len(pairs)) as bar:
        for places, result in runner.forwards(pairs, compute):
            yield places, result
            bar.advance(len(places))
            if progress.stopped():
                return


def _compare_heads(
    runner: ModelRunner, batch: MicroBatch, states: Tensor, other: Tensor, other_head: Head, policy_runs: bool
) -> Iterator[Tensor]:
    """Compare the model that runs with the ``other`` one: (n, 6) of ``COLUMNS``, piece by piece.

    Each head gets as many tokens at a time as when it scores, so that the log-probs are equal to the bit.
    """
    for _, tokens in split_pairs(batch.pair_tokens, max_logit_rows(runner.model)):
        logits, other_logits = runner.head.logits(states[tokens]), other_head.logits(other[tokens])  # (n, V)
        if logits.shape != other_logits.shape:
            sizes = f"{logits.shape[1]:,} and {other_logits.shape[1]:,}"
            raise UsageError(f"the two models have vocabularies of {sizes} tokens, so there is no KL: add --kl none")
        p, q = (logits, other_logits) if policy_runs else (other_logits, logits)
        rows = max(1, PIECE_BYTES[runner.device.type] // (4 * p.shape[1]))
        yield from map(divergences, p.split(rows), q.split(rows), batch.targets[tokens].split(rows))


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


# ---- tables of response tokens ----------------------------------------------------------------------------------


def _spans(pairs: Pairs) -> list[slice]:
    """The rows of each pair in a table of all response tokens: chosen, then rejected."""
    ends = np.cumsum(pairs.loss_lengths.sum(1)).tolist()
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def _write(table: Tensor, spans: Sequence[slice], rows: Tensor) -> None:
    for span, part in zip(spans, rows.split([span.stop - span.start for span in spans]), strict=True):
        table[span] = part


def _on_disk(rows: int, width: int, dtype: torch.dtype, folder: Path) -> Tensor:
    """A tensor (rows, width) in a temporary file without a name, whose room is reserved.

    Raises:
        NotWrittenError: the disk has no room.
    """
    folder, size = _writable(folder.expanduser()), rows * width * dtype.itemsize
    if size > (free := shutil.disk_usage(folder).free):
        raise NotWrittenError(
            f"the exact KL needs {size / 2**30:.1f} GiB of temporary space and {folder} has {free / 2**30:.1f}: "
            "choose a larger disk with --cache-dir, evaluate fewer pairs, or use --kl none"
        )
    with writing(folder / "a temporary file"), tempfile.TemporaryFile(dir=folder) as file:
        if hasattr(os, "posix_fallocate"):  # a full disk is an error here, and not a signal when a page is written
            os.posix_fallocate(file.fileno(), 0, size)
        content = np.memmap(file, np.uint8, "r+", shape=(size,))
    return torch.from_numpy(content).view(dtype).view(rows, width)


def _writable(folder: Path) -> Path:
    """The folder, created if need be; the system's temporary folder if it is not writable."""
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    return Path(tempfile.gettempdir())
