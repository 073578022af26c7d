"""The evaluation of a policy on pairs: the same in training, in ``dpo eval`` and in a sweep.

Legend: P pairs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpo_cli.data.collate import MicroBatch
from dpo_cli.data.pairs import Pairs
from dpo_cli.evaluation import statistics
from dpo_cli.evaluation.diagnostics import Evidence, Finding, diagnose
from dpo_cli.evaluation.examples import ShownPair, shifted_tokens, shown_pairs
from dpo_cli.evaluation.kl import ModelComparison
from dpo_cli.evaluation.metrics import Groups, LossInput, PairScores
from dpo_cli.evaluation.metrics_log import History, step_rewards
from dpo_cli.evaluation.statistics import Interval
from dpo_cli.losses.objective import Objective
from dpo_cli.losses.preference import Preferences
from dpo_cli.models.logprobs import ModelRunner


@dataclass(frozen=True)
class EvalResult:
    """Everything an evaluation found. ``about``: policy, reference, beta, and counts of rows."""

    scores: PairScores
    means: dict[str, float]
    intervals: dict[str, Interval]
    margin_quantiles: dict[str, float]
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
        result: dict[str, Any] = {"trained_on": self.trained_on} if self.trained_on else {}
        result |= self.about | self.means
        result |= {"intervals": self.intervals, "rewards/margins_quantiles": self.margin_quantiles}
        result |= {"length": self.length, "findings": self.findings, "judged": self.judged}
        more = {"drift": self.drift, "sequence_kl": self.sequence_kl, "samples": self.samples}
        return result | {name: value for name, value in more.items() if value}


@dataclass(frozen=True)
class Evaluator:
    """Evaluates policies on the same P pairs, from the log-probs and comparisons that ``kl`` computes."""

    pairs: Pairs
    tokenizer: Any
    objective: Objective

    @cached_property
    def groups(self) -> Groups:
        """The number of each pair's prompt: (P,)."""
        prompts: dict[bytes, int] = {}
        return np.array([prompts.setdefault(pair.prompt.tobytes(), len(prompts)) for pair in self.pairs])

    def policy_read(self, runner: ModelRunner) -> LossInput | None:
        """What the objective reads of the policy's tokens, by one more pass; None where it reads nothing.

        Its reference side is set by ``loss_input``.
        """
        if self.objective.ld_alpha == 1 and not self.objective.wpo:
            return None
        logps, likelihoods = torch.empty(len(self.pairs), 2), torch.empty(len(self.pairs))

        def compute(_: Sequence[int], batch: MicroBatch) -> Preferences:
            batch = dataclasses.replace(batch, weights=torch.ones_like(batch.weights))
            return Preferences.concatenate([*runner.body(batch).head_pieces(self.objective.wpo)])

        for places, preferences in runner.forwards(self.pairs, compute, ld_alpha=self.objective.ld_alpha):
            logps[list(places)] = preferences.logps.view(2, -1).T.cpu()
            likelihoods[list(places)] = torch.as_tensor(preferences.weights).cpu()
        table = logps.double().numpy()
        return LossInput(table, table, likelihoods.double().numpy())

    def scores(
        self,
        policy: Tensor,
        reference: Tensor,
        compared: ModelComparison | None = None,
        loss_input: LossInput | None = None,
        history: History = (),
        beta: float | None = None,
    ) -> PairScores:
        """Collect the numbers of an evaluation; ``policy`` and ``reference`` are log-probs (P, 2) in nats.

        ``history`` has the lines of the run's metrics up to this policy, if it is of a run, and ``beta`` is that of the
        rewards in it; None: the objective's.
        """
        rewards = step_rewards(history)
        shift = sum(rewards) / len(rewards) * self.objective.beta / (beta or self.objective.beta) if rewards else 0.0
        return PairScores(
            where=[pair.where for pair in self.pairs],
            tokens=self.pairs.loss_lengths.astype(float),
            logps=policy.double().numpy(),
            ref_logps=reference.double().numpy(),
            terms=self.pairs.terms.astype(float),
            groups=self.groups,
            objective=self.objective,
            distributions=compared.distributions if compared else None,
            loss_input=loss_input,
            shift=shift,
        )

    @np.errstate(invalid="ignore", over="ignore", divide="ignore")  # numbers that are not finite become None
    def result(
        self,
        scores: PairScores,
        compared: ModelComparison | None,
        history: History,
        held_out: bool = True,
        trained_on: Mapping[str, Any] | None = None,
        about: dict[str, Any] | None = None,
    ) -> EvalResult:
        """Compute means, intervals, findings and examples. ``history`` and ``held_out`` are as in ``Evidence``."""
        intervals, length = statistics.intervals(scores), statistics.length_bias(scores)
        evidence = Evidence(scores, intervals, length, history, held_out, trained_on["pairs"] if trained_on else 0)
        findings, judged = diagnose(evidence)
        result = EvalResult(
            scores,
            scores.means(),
            intervals,
            statistics.quantiles(scores),
            length,
            findings,
            judged,
            about or {},
            trained_on,
        )
        if compared is None:
            return result
        return dataclasses.replace(
            result,
            drift=shifted_tokens(compared, self.pairs, self.tokenizer),
            shown=shown_pairs(scores, self.pairs, compared, self.tokenizer),
        )


def loss_input(read: LossInput | None, reference: Tensor) -> LossInput | None:
    """Set the reference side: log-probs with the token weights of LD-DPO, (P, 2)."""
    return read and dataclasses.replace(read, ref_logps=reference.double().numpy())
