"""How far a policy is from its reference, exactly: divergences between whole next-token distributions.

They need the logits of two models at the same positions, and no memory holds two models or the logits of all tokens. So
one model runs first, and what its head reads is kept in a file, with a copy of the head; then the other runs, and at
each position both heads tell their distribution, a few tokens at a time. With the number of pairs grow only those files
and a few sums a response.

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
import torch
from torch import Tensor

from dpo_cli.data.collate import MicroBatch
from dpo_cli.data.pairs import Pairs
from dpo_cli.evaluation.scores import Distributions
from dpo_cli.models.logprobs import Head, ModelRunner, max_logit_rows, split_pairs
from dpo_cli.utils.console import Reporter
from dpo_cli.utils.errors import NotWrittenError, UsageError
from dpo_cli.utils.files import writing

FOLD = 20.0  # a token whose probability changed by more than this factor has moved
IDENTITY = 1e-4  # nats by which the two sides of an identity may differ at a token
LEAST = -1e4  # nats: what a token has that a model rules out, so that 0 times its log is 0
TOP = 12  # tokens kept of those that rose most, and as many of those that fell most
# Of the logits that are compared at a time: on a CPU they stay in its cache.
PIECE_BYTES = {"cpu": 2**24, "cuda": 2**28}
# What is kept of a token, p being the policy and q the reference: log p, log q, H(p), H(q), then H(p, q), H(q, p),
# KL(p||q), KL(q||p).
COLUMNS = (
    *("logp", "ref_logp", "entropy", "ref_entropy"),
    *("cross_entropy", "reverse_cross_entropy", "kl", "reverse_kl"),
)

Result = TypeVar("Result")


@dataclass(frozen=True)
class Watch:
    """How a pass over pairs is shown, and asked whether it should end early, which is asked after each forward."""

    reporter: Reporter
    what: str
    stopped: Callable[[], bool] = lambda: False


class TokenFile:
    """Rows of numbers, one for every response token of pairs that carries loss, in a file that goes when this does.

    A pair's rows are those of its chosen, then of its rejected response. ``more``: bytes a row that are to lie beside
    them later.

    Raises:
        NotWrittenError: the disk has no room for them, or takes no file.
    """

    def __init__(self, pairs: Pairs, width: int, dtype: torch.dtype, folder: Path, more: int = 0) -> None:
        self.lengths = pairs.loss_lengths  # (P, 2)
        self.ends = np.cumsum(self.lengths.sum(1))
        self.width, self.dtype, self.row_bytes = width, dtype, width * dtype.itemsize
        self.folder = _writable(folder.expanduser())
        need, free = int(self.ends[-1]) * (self.row_bytes + more), shutil.disk_usage(self.folder).free
        if need > free:
            raise NotWrittenError(
                f"the exact KL needs {need / 2**30:.1f} GiB for a while and {self.folder} has {free / 2**30:.1f}: name "
                "a larger disk with --cache-dir, evaluate fewer pairs, or go without by --kl none"
            )
        self.told = self.folder / "a temporary file"
        with writing(self.told):  # unbuffered: what cannot be written is told by the write, not by a read or at the end
            self.file = tempfile.TemporaryFile(buffering=0, dir=self.folder)  # noqa: SIM115  # it lives as this does
        weakref.finalize(self, self.file.close)

    def write(self, places: Sequence[int], rows: Tensor) -> None:
        """Keep the rows (N, width) of some pairs, in their order.

        Raises:
            NotWrittenError: the disk is full.
        """
        content = rows.to("cpu", self.dtype).contiguous().view(torch.uint8).flatten().numpy().data
        with writing(self.told):
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
        """Where the rows of each pair begin in the file, and how many bytes they take."""
        for place in places:
            start, end = int(self.ends[place - 1]) if place else 0, int(self.ends[place])
            yield start * self.row_bytes, (end - start) * self.row_bytes


@dataclass(frozen=True)
class Recorded:
    """One model's side of a comparison: what its head reads at every response token, and the head."""

    states: TokenFile
    head: Head


@dataclass(frozen=True)
class Moved:
    """A response token whose probability changed: nats, its pair, and its place among the pair's rows."""

    logratio: float
    pair: int
    row: int


@dataclass(frozen=True)
class Compared:
    """Policy and reference at every response token of P pairs.

    Shapes: ``logps`` and ``ref_logps`` (P, 2), float32; a row of ``tokens`` has ``COLUMNS``.
    Units: nats.
    """

    logps: Tensor
    ref_logps: Tensor
    distributions: Distributions
    tokens: TokenFile
    moved: list[Moved]


def score(scorer: ModelRunner, pairs: Pairs, watch: Watch) -> Tensor | None:
    """Log-probs of all pairs: (P, 2) float32 nats on the host, chosen and rejected; None when it was stopped."""
    table = torch.full((len(pairs), 2), math.nan)
    for places, logps in _watched(scorer, pairs, lambda _, batch: scorer.response_logps(batch), watch):
        table[list(places)] = logps.view(2, -1).T.cpu()
    return None if watch.stopped() else table


def record(scorer: ModelRunner, pairs: Pairs, folder: Path, watch: Watch) -> Recorded | None:
    """Run a model over all pairs and keep what its head reads, in a file below ``folder``; None when it was stopped.

    Raises:
        NotWrittenError: the disk has no room for it and for what ``compare`` will write.
    """
    kept: list[TokenFile] = []
    for places, states in _watched(scorer, pairs, lambda _, batch: scorer.body(batch).head_inputs(), watch):
        if not kept:
            kept.append(TokenFile(pairs, states.shape[1], states.dtype, folder, 4 * len(COLUMNS)))
        kept[0].write(places, states)
    return None if watch.stopped() else Recorded(kept[0], scorer.head.copied())


def compare(
    scorer: ModelRunner,
    recorded: Recorded,
    pairs: Pairs,
    folder: Path,
    watch: Watch,
    *,
    policy_runs: bool,
    same: bool = False,
) -> Compared | None:
    """Run the other model over the same pairs; None when it was stopped.

    The model that runs is the policy where ``policy_runs``, else the reference; the other one was recorded. Where it is
    the ``same`` model, its states are those recorded and nothing but its head runs.

    Raises:
        UsageError: the two have other vocabularies.
        NotWrittenError: the disk has no room.
    """
    there, tokens = recorded.head.to(scorer.device), TokenFile(pairs, len(COLUMNS), torch.float32, folder)
    sums = torch.full((len(pairs), 2, len(COLUMNS) + 1), math.nan, dtype=torch.float64)
    moved: list[Moved] = []
    off = 0.0

    def both(places: Sequence[int], batch: MicroBatch) -> Tensor:
        other = recorded.states.read(places).to(scorer.device)
        states = other if same else scorer.body(batch).head_inputs()
        return torch.cat([*_columns(scorer, batch, states, other, there, policy_runs)]).cpu()

    for places, rows in _watched(scorer, pairs, both, watch):
        tokens.write(places, rows)
        logratios = rows[:, 0] - rows[:, 1]
        moved = _most(moved + _moved(logratios, places, tokens))
        lengths = torch.from_numpy(tokens.lengths[list(places)].reshape(-1))
        far = logratios.abs() > math.log(FOLD)
        added = torch.segment_reduce(torch.cat([rows, far[:, None]], 1).double(), "sum", lengths=lengths)
        sums[list(places)] = added.view(len(places), 2, -1)
        (entropies, crosses, kls) = rows[:, 2:].view(-1, 3, 2).unbind(1)
        off = max(off, float((kls - (crosses - entropies)).abs().nan_to_num(math.inf).max()))
    if watch.stopped():
        return None
    if not off <= IDENTITY:
        watch.reporter.warning(f"KL(p||q) = H(p, q) - H(p) is off by {off:.2g} nats at some token: distrust the KL")
    table = {name: sums[..., c] for c, name in enumerate((*COLUMNS, "moved"))}
    logps, ref_logps = table.pop("logp").float(), table.pop("ref_logp").float()
    distributions = Distributions(**{name: each.numpy() for name, each in table.items()}, identity_error=off)
    return Compared(logps, ref_logps, distributions, tokens, moved)


def _watched(
    scorer: ModelRunner, pairs: Pairs, compute: Callable[[Sequence[int], MicroBatch], Result], watch: Watch
) -> Iterator[tuple[tuple[int, ...], Result]]:
    """What is computed of each forward, until it is stopped."""
    with watch.reporter.progress(watch.what, len(pairs)) as progress:
        for places, result in scorer.forwards(pairs, compute):
            yield places, result
            progress.advance(len(places))
            if watch.stopped():
                return


def _columns(
    scorer: ModelRunner, batch: MicroBatch, states: Tensor, other: Tensor, there: Head, policy_runs: bool
) -> Iterator[Tensor]:
    """Hold the states of the model that runs against the ``other`` one's: (n, 8) of ``COLUMNS``, piece by piece.

    Each head meets the same tokens at a time as when it scores, so that the log-probs are equal to the bit.
    """
    for _, tokens in split_pairs(batch.pair_tokens, max_logit_rows(scorer.model)):
        here, elsewhere = scorer.head.logits(states[tokens]), there.logits(other[tokens])  # (n, V)
        if here.shape != elsewhere.shape:
            sizes = f"{here.shape[1]:,} and {elsewhere.shape[1]:,}"
            raise UsageError(f"the two models have vocabularies of {sizes} tokens, so there is no KL: add --kl none")
        p, q = (here, elsewhere) if policy_runs else (elsewhere, here)
        rows = max(1, PIECE_BYTES[scorer.device.type] // (4 * p.shape[1]))
        yield from map(divergences, p.split(rows), q.split(rows), batch.targets[tokens].split(rows))


def divergences(p_logits: Tensor, q_logits: Tensor, targets: Tensor) -> Tensor:
    """What two distributions say of each other and of the token that came, each number computed on its own.

    Shapes: (n, V), (n, V), (n,) -> (n, 8), float32, of ``COLUMNS``.
    Units: nats.
    Source: H(p, q) = -sum p log q, H(p) = H(p, p), KL(p||q) = sum p (log p - log q) (Cover and Thomas, chapter 2).
    """
    log_p, log_q = (logits.log_softmax(-1).clamp_(min=LEAST) for logits in (p_logits, q_logits))
    p, q, ratio = log_p.exp(), log_q.exp(), log_p - log_q
    dot = torch.linalg.vecdot
    at = targets[:, None]
    columns = [log_p.gather(1, at)[:, 0], log_q.gather(1, at)[:, 0], -dot(p, log_p), -dot(q, log_q)]
    columns += [-dot(p, log_q), -dot(q, log_p), dot(p, ratio), -dot(q, ratio)]
    return torch.stack(columns, 1)


def _moved(logratios: Tensor, places: Sequence[int], tokens: TokenFile) -> list[Moved]:
    """Of some pairs' tokens those that rose most and those that fell most."""
    counts = tokens.lengths[list(places)].sum(1)
    starts = np.cumsum(counts) - counts
    found = []
    for sign in (1, -1):
        for row in (sign * logratios.nan_to_num()).topk(min(TOP, len(logratios))).indices.tolist():
            place = int(np.searchsorted(starts, row, "right")) - 1
            found.append(Moved(float(logratios[row]), places[place], row - int(starts[place])))
    return found


def _most(moved: list[Moved]) -> list[Moved]:
    """Those that rose most, then those that fell most, the farthest first; none twice."""
    ordered = sorted(set(moved), key=lambda token: (-token.logratio, token.pair, token.row))
    rose = [token for token in ordered if token.logratio > 0][:TOP]
    return rose + [token for token in reversed(ordered) if token.logratio < 0][:TOP]


def _writable(folder: Path) -> Path:
    """The folder, made if need be; where nothing can be written, the system's for temporary files."""
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    return Path(tempfile.gettempdir())
