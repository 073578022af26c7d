"""From log-probs of policy and reference to all that is told of an evaluation, in training as in `dpo eval`.

Legend: P pairs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpo_cli.data.collate import MicroBatch
from dpo_cli.data.pairs import Pairs, model_input_ids
from dpo_cli.evaluation.diagnostics import verdict
from dpo_cli.evaluation.drift import Compared
from dpo_cli.evaluation.examples import drift_tokens, shown_pairs
from dpo_cli.evaluation.margins import sections
from dpo_cli.evaluation.metrics import step_rewards
from dpo_cli.evaluation.scores import Evaluation, LossInput, Scores, values
from dpo_cli.losses.objective import Objective
from dpo_cli.losses.preference import Preferences
from dpo_cli.models.logprobs import ModelRunner
from dpo_cli.quality.checks import thinks


def policy_read(runner: ModelRunner, pairs: Pairs, objective: Objective) -> LossInput | None:
    """What the objective reads of the policy's tokens, by one more pass; None where log-probs are all that it reads.

    The reference's side is still that of the policy.
    """
    if objective.ld_alpha == 1 and not objective.wpo:
        return None
    logps, likelihoods = torch.empty(len(pairs), 2), torch.empty(len(pairs))

    def compute(_: Sequence[int], batch: MicroBatch) -> Preferences:
        batch = dataclasses.replace(batch, weights=torch.ones_like(batch.weights))
        return Preferences.concatenate([*runner.body(batch).head_pieces(objective.wpo)])

    for places, found in runner.forwards(pairs, compute, ld_alpha=objective.ld_alpha):
        logps[list(places)] = found.logps.view(2, -1).T.cpu()
        likelihoods[list(places)] = torch.as_tensor(found.weights).cpu()
    table = logps.double().numpy()
    return LossInput(table, table, likelihoods.double().numpy())


def loss_input(read: LossInput | None, reference: Tensor) -> LossInput | None:
    """That, with the reference as the loss reads it, (P, 2)."""
    return read and dataclasses.replace(read, ref_logps=reference.double().numpy())


def scores_of(
    pairs: Pairs,
    policy: Tensor,
    reference: Tensor,
    objective: Objective,
    compared: Compared | None,
    loss_input: LossInput | None = None,
    history: Sequence[Mapping[str, Any]] = (),
    beta: float | None = None,
) -> Scores:
    """The numbers of an evaluation; ``policy`` and ``reference`` are logps (P, 2) in nats.

    ``history`` has the lines of the run's metrics up to this policy, if it is of one, and ``beta`` is what its rewards
    were measured by; None: the objective's.
    """
    means = step_rewards(history)
    prompts: dict[bytes, int] = {}
    return Scores(
        where=[pair.where for pair in pairs],
        tokens=pairs.loss_lengths.astype(float),
        logps=policy.double().numpy(),
        ref_logps=reference.double().numpy(),
        terms=pairs.terms.astype(float),
        objective=objective,
        distributions=compared.distributions if compared else None,
        groups=np.array([prompts.setdefault(pair.prompt.tobytes(), len(prompts)) for pair in pairs]),
        loss_input=loss_input,
        shift=sum(means) / len(means) * objective.beta / (beta or objective.beta) if means else 0.0,
    )


@np.errstate(invalid="ignore", over="ignore")  # a number that is not finite is told as none, without a warning
def evaluation(
    scores: Scores,
    compared: Compared | None,
    pairs: Pairs,
    tokenizer: Any,
    history: Sequence[dict[str, Any]],
    seed: int = 0,
    held_out: bool = True,
    trained_on: Mapping[str, Any] | None = None,
) -> Evaluation:
    """All that the numbers tell: means with intervals, findings, tokens that moved, pairs to look at.

    ``history`` has the lines of the run's metrics up to this policy, if it is of one, and
    ``held_out`` whether the pairs are that run's; ``seed`` is the intervals'. ``trained_on``: what of the pairs was.
    """
    told = sections(scores, seed)
    result: dict[str, Any] = values(scores) | told
    decode = tokenizer.decode
    thinking = np.array(
        [[thinks(decode(model_input_ids(ids))) for ids in (pair.chosen, pair.rejected)] for pair in pairs]
    )
    known = trained_on["pairs"] if trained_on else 0
    result |= verdict(scores, told, history, held_out=held_out, thinking=thinking, trained_on=known)
    if trained_on:
        result["trained_on"] = trained_on
    if compared is None:
        return Evaluation(scores, result)
    result["drift"] = drift_tokens(compared, pairs, tokenizer)
    return Evaluation(scores, result, shown_pairs(scores, pairs, compared.tokens, tokenizer))
