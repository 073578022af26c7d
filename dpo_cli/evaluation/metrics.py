"""Metrics of preference pairs, defined once for training steps, evaluations and sweeps; ``metrics.jsonl``.

Legend: P pairs; columns of (P, 2) are chosen and rejected.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dpo_cli.config.options import BEST
from dpo_cli.losses.objective import Objective
from dpo_cli.losses.preference import Preferences
from dpo_cli.utils.devices import device_kind
from dpo_cli.utils.files import atomic_write, to_json, writing

Table = npt.NDArray[np.float64]
Groups = npt.NDArray[np.int64]
SIDES = ("chosen", "rejected")
TIE = 1e-3  # nats: a smaller difference of a pair's log-ratios is arithmetic noise and has no order
METRICS = (
    *("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "rewards/ties"),
    *("logps/chosen", "logps/rejected"),
)
SUMS = (*METRICS, "pairs")
History = Sequence[Mapping[str, Any]]  # lines of metrics.jsonl


def pair_metrics(
    losses: Tensor, logps: Tensor, ref_logps: Tensor, beta: float, lengths: Tensor | None = None
) -> Tensor:
    """Compute ``METRICS`` for each pair. A tie counts half a win in the accuracy.

    ``lengths`` makes rewards per-token; ``ref_logps`` are 0 where the loss reads no reference.

    Shapes: ``losses`` (P,); ``logps``, ``ref_logps``, ``lengths`` (2P,), chosen first -> (8, P).
    Units: nats.
    """
    wide = device_kind(losses.device).sums
    logratios = (logps - ref_logps).to(wide)
    tie: Tensor | float = TIE
    if lengths is not None:
        logratios, tie = logratios / lengths, TIE / lengths.view(2, -1).min(0).values
    chosen, rejected = logratios.chunk(2)
    gap = chosen - rejected  # (P,)
    ties = (gap.abs() <= tie) + 0 * gap  # NaN where the gap is
    wins = (gap > tie) + ties / 2
    rewards = beta * logratios
    return torch.stack([losses.to(wide), *rewards.chunk(2), beta * gap, wins, ties, *logps.to(wide).chunk(2)])


def pair_sums(losses: Tensor, logps: Tensor, ref_logps: Tensor, beta: float, lengths: Tensor | None = None) -> Tensor:
    """Sum ``pair_metrics`` over the pairs, so that a step needs one reduce and one read-back.

    Shapes: as in ``pair_metrics`` -> (9,), in the order of ``SUMS``.
    """
    sums = pair_metrics(losses, logps, ref_logps, beta, lengths).sum(1)
    return torch.cat([sums, sums.new_full((1,), len(losses))]).detach()


def summarize(sums: Sequence[float]) -> dict[str, float]:
    """Turn sums in the order of ``SUMS`` into means over pairs."""
    *totals, pairs = sums
    return {name: total / pairs for name, total in zip(METRICS, totals, strict=True)}


@dataclass(frozen=True)
class PairScores:
    """Log-probs of P pairs under policy and reference, and what else their loss reads.

    ``ref_logps`` are NaN where the objective reads no reference and none was scored. ``groups``: the number of each
    pair's prompt, if some share one. ``distributions``: sums over each response of entropy, ref_entropy, kl, reverse_kl
    and shifted_tokens, if computed. ``weighted``: ``logps`` and ``ref_logps`` with the token weights of LD-DPO.
    ``shift``: the mean reward of earlier steps. ``ranking_sizes``: as in ``Preferences``.

    Shapes: ``tokens`` (those that carry loss), ``logps``, ``ref_logps``, ``terms`` (weight and margin), each of
    ``distributions`` and ``weighted``: (P, 2); ``groups`` (P,).
    Units: nats.
    """

    where: list[str]
    tokens: Table
    logps: Table
    ref_logps: Table
    terms: Table
    groups: Groups | None = None
    objective: Objective = field(default_factory=Objective)
    distributions: Mapping[str, Table] = field(default_factory=dict)
    weighted: tuple[Table, Table] | None = None
    shift: float = 0.0
    ranking_sizes: Sequence[int] | int = 1

    @property
    def logratios(self) -> Table:
        """(P, 2) nats."""
        return self.logps - self.ref_logps

    @property
    def margins(self) -> Table:
        """Chosen reward minus rejected reward: (P,)."""
        return self.metrics["rewards/margins"]

    @property
    def wins(self) -> Table:
        """1 where the chosen response has the higher reward, 1/2 for a tie, else 0: (P,)."""
        return self.metrics["rewards/accuracies"]

    @cached_property
    def metrics(self) -> dict[str, Table]:
        """``METRICS`` by name: (P,) each."""
        reference = self.ref_logps if self.objective.reference else np.zeros_like(self.logps)
        losses, logps, ref_logps, lengths = map(_chosen_first, (self.losses, self.logps, reference, self.tokens))
        averaged = lengths if self.objective.length_normalized else None
        rows = pair_metrics(losses, logps, ref_logps, self.objective.beta, averaged)
        return dict(zip(METRICS, rows.numpy(), strict=True))

    @cached_property
    def losses(self) -> Table:
        """The loss of each pair, as if all pairs were one step, without the weights of WPO: (P,)."""
        logps, ref_logps = self.weighted or (self.logps, self.ref_logps)
        pairs = Preferences(
            logps=_chosen_first(logps),
            ref_logps=_chosen_first(ref_logps),
            lengths=_chosen_first(self.tokens),
            full_logps=_chosen_first(self.logps),
            mean_chosen_length=float(self.tokens[:, 0].mean()),
            margins=torch.from_numpy(self.terms[:, 1]),
            weights=torch.from_numpy(self.terms[:, 0]),
            reward_baseline=self.shift,
            ranking_sizes=self.ranking_sizes,
        )
        losses: Table = self.objective(pairs).numpy()
        return losses

    @cached_property
    def ratios(self) -> dict[str, tuple[Table, Table]]:
        """Every reported mean as numerators and denominators (P,) of a ratio of sums over pairs.

        Means over pairs have the denominator 1; per-token means have the number of tokens.
        """
        ones = np.ones(len(self.where))
        ratios = {name: (values, ones) for name, values in self.metrics.items()}
        ratios |= {f"ref_logps/{side}": (self.ref_logps[:, c], ones) for c, side in enumerate(SIDES)}
        for name, table in (("policy", self.logps), ("reference", self.ref_logps)):
            ratios[f"logp_accuracy/{name}"] = wins(table[:, 0] - table[:, 1]), ones
        per_token = {
            "cross_entropy": -self.logps,
            "ref_cross_entropy": -self.ref_logps,
            "delta_kl_data": -self.logratios,  # H(data, policy) - H(data, reference): the data's entropy cancels
            **self.distributions,
        }
        for name, table in per_token.items():
            ratios |= {f"{name}/{side}": (table[:, c], self.tokens[:, c]) for c, side in enumerate(SIDES)}
        return ratios

    @np.errstate(over="ignore")
    def means(self) -> dict[str, float]:
        """Every reported mean by its public name, and the perplexities of the cross-entropies."""
        means = {name: float(above.sum() / below.sum()) for name, (above, below) in self.ratios.items()}
        crosses = [name for name in means if "cross_entropy/" in name]
        return means | {name.replace("cross_entropy", "perplexity"): float(np.exp(means[name])) for name in crosses}


def _chosen_first(table: Table) -> Tensor:
    """(P, 2) -> (2P,)."""
    return torch.from_numpy(table.T.reshape(-1))


def reward_unit(objective: Objective) -> str:
    """What beta multiplies in a reward."""
    return f"{'log-ratios' if objective.reference else 'log-probs'}{' per token' * objective.length_normalized}"


def wins(gap: Table) -> Table:
    """1 where a difference of log-probs is above 0, 1/2 where it is arithmetic noise, else 0; NaN stays: (P,)."""
    return np.where(np.isnan(gap), np.nan, (gap > TIE) + 0.5 * (np.abs(gap) <= TIE))


# ---- metrics.jsonl: one line per training step, one per evaluation, whose names begin with eval_ ----------------


def append_metrics(file: Path, step: int, values: Mapping[str, float], prefix: str = "") -> None:
    """Append one line; a value that is not finite becomes null."""
    with writing(file), file.open("a", encoding="utf-8") as stream:
        stream.write(to_json({"step": step} | {prefix + name: value for name, value in values.items()}) + "\n")


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Read all complete lines; a value that was not finite is None."""
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        with suppress(ValueError):
            lines.append(json.loads(line))
    return lines


def truncate_metrics(file: Path, step: int) -> None:
    """Drop the lines after ``step``, and a last line that a crash cut short."""
    lines = [line for line in read_metrics(file) if isinstance(line, dict) and line.get("step", math.inf) <= step]
    with atomic_write(file) as temporary:
        temporary.write_text("".join(to_json(line) + "\n" for line in lines), encoding="utf-8")


def evaluations(history: History) -> dict[int, dict[str, float]]:
    """Held-out metrics by step, without their prefix; null becomes NaN."""
    return {
        line["step"]: {
            name.removeprefix("eval_"): math.nan if value is None else value
            for name, value in line.items()
            if name.startswith("eval_")
        }
        for line in history
        if "eval_loss" in line
    }


def best_step(evaluated: Mapping[int, Mapping[str, float]], metric: str) -> int:
    """The step with the best value of a metric among ``evaluations``; the first of equals, never NaN."""
    goodness = {step: BEST[metric] * evaluated[step][metric] for step in sorted(evaluated)}
    return max(goodness, key=lambda step: -math.inf if math.isnan(goodness[step]) else goodness[step])


def mean_reward(values: Mapping[str, float]) -> float:
    """Mean reward of one step over chosen and rejected."""
    return (values["rewards/chosen"] + values["rewards/rejected"]) / 2


def step_rewards(history: History) -> list[float]:
    """``mean_reward`` of every training step."""
    return [mean_reward(line) for line in history if "rewards/chosen" in line]
