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
import weakref
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


class HiddenStates:
    """Rows of (N, width) for pairs in a temporary file: a pair's chosen, then its rejected response tokens.

    Raises:
        NotWrittenError: the disk has no room, or the folder takes no file.
    """

    def __init__(self, pairs: Pairs, width: int, dtype: torch.dtype, folder: Path) -> None:
        self.ends = np.cumsum(pairs.loss_lengths.sum(1))
        self.width, self.dtype, self.row_bytes = width, dtype, width * dtype.itemsize
        folder = _writable(folder.expanduser())
        need, free = int(self.ends[-1]) * self.row_bytes, shutil.disk_usage(folder).free
        if need > free:
            raise NotWrittenError(
                f"the exact KL needs {need / 2**30:.1f} GiB of temporary space and {folder} has {free / 2**30:.1f}: "
                "choose a larger disk with --cache-dir, evaluate fewer pairs, or use --kl none"
            )
        self.name = folder / "a temporary file"
        with writing(self.name):  # unbuffered, so that the write itself fails on a full disk
            self.file = tempfile.TemporaryFile(buffering=0, dir=folder)  # noqa: SIM115  # it lives as long as this
        weakref.finalize(self, self.file.close)

    def write(self, places: Sequence[int], rows: Tensor) -> None:
        """Keep the rows (N, width) of some pairs, in their order.

        Raises:
            NotWrittenError: the disk is full.
        """
        content = rows.to("cpu", self.dtype).contiguous().view(torch.uint8).flatten().numpy().data
        with writing(self.name):
            for offset, size in self._spans(places):
                self.file.seek(offset)
                part, content = content[:size], content[size:]
                while part:
                    part = part[self.file.write(part) :]

    def read(self, places: Sequence[int]) -> Tensor:
        """The rows of some pairs, in their order: (N, width)."""
        content = bytearray()
        for offset, size in self._spans(places):
            self.file.seek(offset)
            content += self.file.read(size)
        return torch.frombuffer(content, dtype=self.dtype).view(-1, self.width)

    def _spans(self, places: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Offset and size in bytes of each pair's rows."""
        for place in places:
            start, end = int(self.ends[place - 1]) if place else 0, int(self.ends[place])
            yield start * self.row_bytes, (end - start) * self.row_bytes


@dataclass(frozen=True)
class RecordedStates:
    """One model's side of a comparison: what its head reads at every response token, and the head."""

    states: HiddenStates
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


def score(scorer: ModelRunner, pairs: Pairs, progress: Progress) -> Tensor | None:
    """Compute log-probs of all pairs: (P, 2) float32 nats on the host; None if stopped."""
    table = torch.full((len(pairs), 2), math.nan)
    for places, logps in _forwards(scorer, pairs, lambda _, batch: scorer.response_logps(batch), progress):
        table[list(places)] = logps.view(2, -1).T.cpu()
    return None if progress.stopped() else table


def record(scorer: ModelRunner, pairs: Pairs, folder: Path, progress: Progress) -> RecordedStates | None:
    """Run a model over all pairs and keep what its head reads, in a file below ``folder``; None if stopped.

    Raises:
        NotWrittenError: the disk has no room for it.
    """
    states: HiddenStates | None = None
    for places, rows in _forwards(scorer, pairs, lambda _, batch: scorer.body(batch).head_inputs(), progress):
        states = states or HiddenStates(pairs, rows.shape[1], rows.dtype, folder)
        states.write(places, rows)
    if progress.stopped():
        return None
    assert states is not None
    return RecordedStates(states, scorer.head.copied())


def compare(
    scorer: ModelRunner,
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
    other_head = recorded.head.to(scorer.device)
    lengths = pairs.loss_lengths
    ends = np.cumsum(lengths.sum(1))
    tokens = torch.full((int(ends[-1]), len(COLUMNS)), math.nan)

    def both(places: Sequence[int], batch: MicroBatch) -> Tensor:
        other = recorded.states.read(places).to(scorer.device)
        states = other if same else scorer.body(batch).head_inputs()
        return torch.cat([*_compare_heads(scorer, batch, states, other, other_head, policy_runs)]).cpu()

    for places, rows in _forwards(scorer, pairs, both, progress):
        for place, part in zip(places, rows.split(lengths[list(places)].sum(1).tolist()), strict=True):
            tokens[ends[place] - len(part) : ends[place]] = part
    if progress.stopped():
        return None
    shifted = ((tokens[:, 0] - tokens[:, 1]).abs() > math.log(FOLD))[:, None]
    responses = torch.from_numpy(lengths.reshape(-1))
    sums = torch.segment_reduce(torch.cat([tokens, shifted], 1).double(), "sum", lengths=responses)
    logps, ref_logps, *others = sums.view(-1, 2, len(COLUMNS) + 1).unbind(-1)
    distributions = Distributions(*(each.numpy() for each in others))
    return ModelComparison(tokens, lengths, logps.float(), ref_logps.float(), distributions)


def _forwards(
    scorer: ModelRunner, pairs: Pairs, compute: Callable[[Sequence[int], MicroBatch], Result], progress: Progress
) -> Iterator[tuple[tuple[int, ...], Result]]:
    """What is computed of each forward, until stopped."""
    with progress.reporter.progress(progress.name, len(pairs)) as bar:
        for places, result in scorer.forwards(pairs, compute):
            yield places, result
            bar.advance(len(places))
            if progress.stopped():
                return


def _compare_heads(
    scorer: ModelRunner, batch: MicroBatch, states: Tensor, other: Tensor, other_head: Head, policy_runs: bool
) -> Iterator[Tensor]:
    """Compare the model that runs with the ``other`` one: (n, 6) of ``COLUMNS``, piece by piece.

    Each head gets as many tokens at a time as when it scores, so that the log-probs are equal to the bit.
    """
    for _, tokens in split_pairs(batch.pair_tokens, max_logit_rows(scorer.model)):
        logits, other_logits = scorer.head.logits(states[tokens]), other_head.logits(other[tokens])  # (n, V)
        if logits.shape != other_logits.shape:
            sizes = f"{logits.shape[1]:,} and {other_logits.shape[1]:,}"
            raise UsageError(f"the two models have vocabularies of {sizes} tokens, so there is no KL: add --kl none")
        p, q = (logits, other_logits) if policy_runs else (other_logits, logits)
        rows = max(1, PIECE_BYTES[scorer.device.type] // (4 * p.shape[1]))
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


def _writable(folder: Path) -> Path:
    """The folder, created if need be; the system's temporary folder if it is not writable."""
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    return Path(tempfile.gettempdir())
