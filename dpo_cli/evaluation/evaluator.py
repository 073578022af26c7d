"""The evaluation of a policy on pairs: the same in training, in ``dpo eval`` and in a sweep.

Legend: P pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dpo_cli.data.pairs import Pairs
from dpo_cli.evaluation import statistics
from dpo_cli.evaluation.diagnostics import Evidence, Finding, diagnose
from dpo_cli.evaluation.examples import ShownPair, shifted_tokens, shown_pairs
from dpo_cli.evaluation.kl import TokenScores
from dpo_cli.evaluation.metrics import PairScores, Table
from dpo_cli.evaluation.metrics_log import History, step_rewards
from dpo_cli.evaluation.statistics import Interval
from dpo_cli.losses.objective import Objective

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class EvalResult:
    """Everything an evaluation found. ``about``: policy, reference, beta, and counts of rows."""

    scores: PairScores
    means: dict[str, float]
    intervals: dict[str, Interval]
    length: dict[str, Any]
    findings: list[Finding]
    judged: dict[str, Any]
    about: dict[str, Any] = field(default_factory=dict)
    trained_on: Mapping[str, Any] | None = None
    drift: dict[str, Any] | None = None
    sequence_kl: dict[str, Any] | None = None
    samples: list[dict[str, Any]] = field(default_factory=list)
    shown: list[ShownPair] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """What ``dpo eval --json`` prints."""
        quantiles = {str(q): float(np.quantile(self.scores.margins, q)) for q in QUANTILES}
        result: dict[str, Any] = {"trained_on": self.trained_on} if self.trained_on else {}
        result |= self.about | self.means
        result |= {"intervals": self.intervals, "rewards/margins_quantiles": quantiles}
        result |= {"length": self.length, "findings": self.findings, "judged": self.judged}
        more = {"drift": self.drift, "sequence_kl": self.sequence_kl, "samples": self.samples}
        return result | {name: value for name, value in more.items() if value}


@dataclass(frozen=True)
class Evaluator:
    """Evaluates policies on the same P pairs."""

    pairs: Pairs
    tokenizer: Any
    objective: Objective

    def scores(
        self,
        tokens: TokenScores,
        ref_logps: tuple[Table, Table] | None = None,
        history: History = (),
        beta: float | None = None,
    ) -> PairScores:
        """Collect the log-probs of an evaluation.

        Where ``tokens`` are of the policy alone, ``ref_logps`` has those of the reference, as they are and with the
        token weights of LD-DPO: (P, 2) each. ``history`` has the lines of the run's metrics up to this policy, if it is
        of a run, and ``beta`` is that of the rewards in it; None: the objective's.
        """
        alpha, rewards, prompts = self.objective.ld_alpha, step_rewards(history), dict[bytes, int]()
        if ref_logps is None or tokens.tokens.shape[1] > 1:
            ref_logps = tokens.logps(1), tokens.logps(1, alpha)
        return PairScores(
            where=[pair.where for pair in self.pairs],
            tokens=self.pairs.loss_lengths.astype(float),
            logps=tokens.logps(),
            ref_logps=ref_logps[0],
            weighted_logps=tokens.logps(0, alpha),
            weighted_ref_logps=ref_logps[1],
            terms=self.pairs.terms.astype(float),
            groups=np.array([prompts.setdefault(pair.prompt.tobytes(), len(prompts)) for pair in self.pairs]),
            objective=self.objective,
            distributions=tokens.distributions,
            shift=float(np.mean(rewards)) * self.objective.beta / (beta or self.objective.beta) if rewards else 0.0,
        )

    @np.errstate(invalid="ignore", over="ignore", divide="ignore")  # numbers that are not finite become None
    def result(
        self,
        scores: PairScores,
        tokens: TokenScores,
        history: History,
        held_out: bool = True,
        trained_on: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> EvalResult:
        """Compute means, intervals, findings and examples. ``history`` and ``held_out`` are as in ``Evidence``."""
        intervals, length = statistics.intervals(scores), statistics.length_bias(scores)
        evidence = Evidence(scores, intervals, length, history, held_out, trained_on["pairs"] if trained_on else 0)
        findings, judged = diagnose(evidence)
        if tokens.distributions:
            more["drift"] = shifted_tokens(tokens, self.pairs, self.tokenizer)
            more["shown"] = shown_pairs(scores, self.pairs, tokens, self.tokenizer)
        return EvalResult(scores, scores.means(), intervals, length, findings, judged, trained_on=trained_on, **more)
