"""From log-probs of policy and reference to all that is told of an evaluation, in training as in `dpo eval`.

Legend: P pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from dpo_cli.diagnose import findings
from dpo_cli.drift import Compared
from dpo_cli.margins import sections
from dpo_cli.pairs import Pairs
from dpo_cli.scores import Evaluation, Scores, values
from dpo_cli.show import drift_tokens, shown_pairs


def scores_of(
    pairs: Pairs, policy: Tensor, reference: Tensor, beta: float, label_smoothing: float, compared: Compared | None
) -> Scores:
    """The numbers of an evaluation; ``policy`` and ``reference`` are logps (P, 2) in nats."""
    prompts: dict[bytes, int] = {}
    return Scores(
        where=[pair.where for pair in pairs],
        tokens=pairs.loss_lengths.astype(float),
        logps=policy.double().numpy(),
        ref_logps=reference.double().numpy(),
        terms=pairs.terms.astype(float),
        beta=beta,
        label_smoothing=label_smoothing,
        distributions=compared.distributions if compared else None,
        groups=np.array([prompts.setdefault(pair.prompt.tobytes(), len(prompts)) for pair in pairs]),
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
) -> Evaluation:
    """All that the numbers tell: means with intervals, findings, tokens that moved, pairs to look at.

    ``history`` has the lines of the run's metrics up to this policy, if it is of one, and
    ``held_out`` whether the pairs are that run's; ``seed`` is the intervals'.
    """
    told = sections(scores, seed)
    result: dict[str, Any] = values(scores) | told
    result["findings"] = findings(scores, told, history, held_out=held_out)
    if compared is None:
        return Evaluation(scores, result)
    result["drift"] = drift_tokens(compared, pairs, tokenizer)
    return Evaluation(scores, result, shown_pairs(scores, pairs, compared.tokens, tokenizer))
