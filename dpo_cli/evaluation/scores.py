"""What a policy and its reference say of pairs, as numbers a response, and their means under public names.

Legend: P pairs, N response tokens that carry loss; columns of (P, 2) are chosen and rejected.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from dpo_cli.losses.objective import Objective
from dpo_cli.losses.preference import Preferences

Table = npt.NDArray[np.float64]
Groups = npt.NDArray[np.int64]
SIDES = ("chosen", "rejected")
TIE = 1e-3  # nats between the two log-ratios of a pair, below which their order is arithmetic


@dataclass(frozen=True)
class Distributions:
    """Sums over each response's positions of what the two models' whole next-token distributions say.

    H is entropy, H(p, q) cross-entropy and KL(p||q) relative entropy of the policy p and the reference q, each summed
    over the vocabulary at every position and computed on its own, so that KL(p||q) = H(p, q) - H(p) can be checked.

    Shapes: (P, 2) each; ``moved``: tokens whose probability changed more than 20-fold, up or down.
    Units: nats; ``identity_error`` is the largest of any token, over both directions.
    """

    entropy: Table  # H(p)
    ref_entropy: Table  # H(q)
    cross_entropy: Table  # H(p, q)
    reverse_cross_entropy: Table  # H(q, p)
    kl: Table  # KL(p||q)
    reverse_kl: Table  # KL(q||p)
    moved: Table
    identity_error: float


@dataclass(frozen=True)
class LossInput:
    """What some losses read beyond the log-probs: those that LD-DPO discounts, (P, 2), and WPO's weights, (P,)."""

    logps: Table
    ref_logps: Table
    likelihoods: Table


@dataclass(frozen=True)
class Scores:
    """Log-probs of P pairs under policy and reference, and what goes into their loss.

    Shapes: ``tokens`` (those that carry loss), ``logps``, ``ref_logps``, ``terms`` (weight and margin): (P, 2).
    ``groups`` is the number of each pair's prompt, (P,); where it is None, each pair stands on its own. ``ref_logps``
    are NaN where the objective reads no reference and none was scored. ``shift``: the mean reward of earlier steps.
    Units: nats. ``distributions`` is None where they were not asked for.
    """

    where: list[str]
    tokens: Table
    logps: Table
    ref_logps: Table
    terms: Table
    objective: Objective = field(default_factory=Objective)
    distributions: Distributions | None = None
    groups: Groups | None = None
    loss_input: LossInput | None = None
    shift: float = 0.0

    @property
    def logratios(self) -> Table:
        """(P, 2) nats."""
        return self.logps - self.ref_logps

    @property
    def gains(self) -> Table:
        """What beta makes rewards of: log-ratios; without a reference log-probs, for some losses a token's. (P, 2)."""
        gains = self.logratios if self.objective.reference else self.logps
        return gains / self.tokens if self.objective.length_normalized else gains

    @property
    def rewards(self) -> Table:
        """Implicit rewards, beta times the gains: (P, 2)."""
        return self.objective.beta * self.gains

    @property
    def margins(self) -> Table:
        """Chosen reward minus rejected reward: (P,)."""
        return self.rewards[:, 0] - self.rewards[:, 1]

    @property
    def tie(self) -> Table | float:
        """What two gains of a pair may differ by from arithmetic alone."""
        return TIE / self.tokens.min(1) if self.objective.length_normalized else TIE

    @property
    def wins(self) -> Table:
        """1 where the chosen response has the higher reward, 1/2 in a tie, else 0: (P,)."""
        return wins_of(gap_of(self.gains), self.tie)

    @property
    def ties(self) -> Table:
        """1 where the two gains are equal but for arithmetic: (P,)."""
        gap = gap_of(self.gains)
        return np.where(np.isnan(gap), np.nan, np.abs(gap) <= self.tie)

    @property
    def losses(self) -> Table:
        """The loss of each pair, as of a step with all of them: (P,)."""
        read = self.loss_input or LossInput(self.logps, self.ref_logps, np.ones(len(self.where)))
        tables = (read.logps, read.ref_logps, self.tokens, self.logps)
        logps, ref_logps, lengths, whole = (torch.from_numpy(table.T.reshape(-1)) for table in tables)
        weights, margins = torch.from_numpy(self.terms.T)
        weights = weights * torch.from_numpy(read.likelihoods)
        tokens = float(self.tokens[:, 0].mean())
        pairs = Preferences(logps, ref_logps, lengths, whole, tokens, margins, weights, self.shift)
        losses: Table = self.objective(pairs).numpy()
        return losses


def gap_of(table: Table) -> Table:
    """Chosen minus rejected, (P, 2) -> (P,)."""
    return table[:, 0] - table[:, 1]


def wins_of(gap: Table, tie: Table | float = TIE) -> Table:
    """1 where a gap in nats is above 0, 1/2 where it is only arithmetic, else 0; NaN where it is no number."""
    return np.where(np.isnan(gap), np.nan, (gap > tie) + 0.5 * (np.abs(gap) <= tie))


def means(scores: Scores) -> dict[str, tuple[Table, Table]]:
    """Every mean that is reported, as what it is a ratio of: numerators and denominators (P,) of its sums over pairs.

    Means over pairs have the denominator 1; what is counted a token has the tokens.
    """
    one, found = np.ones(len(scores.where)), {}
    found["loss"] = scores.losses, one
    for column, side in enumerate(SIDES):
        found[f"rewards/{side}"] = scores.rewards[:, column], one
    found["rewards/margins"] = scores.margins, one
    found["rewards/accuracies"] = scores.wins, one
    found["rewards/ties"] = scores.ties, one
    for name, table in (("logps", scores.logps), ("ref_logps", scores.ref_logps)):
        found |= {f"{name}/{side}": (table[:, column], one) for column, side in enumerate(SIDES)}
    a_token = {
        "cross_entropy": -scores.logps,
        "ref_cross_entropy": -scores.ref_logps,
        "data_kl_change": -scores.logratios,  # H(data, policy) - H(data, reference): the data's entropy cancels
        "logratio": scores.logratios,
    }
    if (exact := scores.distributions) is not None:
        a_token |= {
            "entropy": exact.entropy,
            "ref_entropy": exact.ref_entropy,
            "kl": exact.kl,
            "reverse_kl": exact.reverse_kl,
            "kl_cross_entropy": exact.cross_entropy,
            "reverse_kl_cross_entropy": exact.reverse_cross_entropy,
            "moved_tokens": exact.moved,
        }
    for name, table in a_token.items():
        found |= {f"{name}/{side}": (table[:, c], scores.tokens[:, c]) for c, side in enumerate(SIDES)}
    return found


def values(scores: Scores) -> dict[str, float]:
    """The means themselves, by name, and the perplexities that the data's cross-entropies make."""
    found = {name: float(above.sum() / below.sum()) for name, (above, below) in means(scores).items()}
    for name in [f"{of}cross_entropy/{side}" for of in ("", "ref_") for side in SIDES]:
        found[name.replace("cross_entropy", "perplexity")] = perplexity(found[name])
    return found


def perplexity(cross_entropy: float) -> float:
    """The exponential of nats a token; infinite where no float holds it."""
    try:
        return math.exp(cross_entropy)
    except OverflowError:
        return math.inf


@dataclass(frozen=True)
class Token:
    """One token of a pair as it is shown; its numbers are None in a prompt and where it carries no loss.

    Units: nats; ``kl`` is KL(policy||reference) at its position.
    """

    text: str
    logp: float | None = None
    ref_logp: float | None = None
    entropy: float | None = None
    ref_entropy: float | None = None
    kl: float | None = None


@dataclass(frozen=True)
class ShownPair:
    """A pair to look at token by token; ``why``: best, median or worst, by its margin."""

    why: str
    where: str
    margin: float
    prompt: list[Token]
    chosen: list[Token]
    rejected: list[Token]


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found: the numbers a pair, the result that ``dpo eval --json`` prints, pairs to look at."""

    scores: Scores
    result: dict[str, Any]
    shown: list[ShownPair] = field(default_factory=list)
