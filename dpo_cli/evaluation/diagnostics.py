"""What can be wrong with a trained model: findings with numbers and advice.

A finding is large enough to matter, by a named threshold, and certain, by its interval or because it is a fact about
these pairs. Differences are reported in nats, which do not depend on beta.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from dpo_cli.evaluation.metrics import SIDES, PairScores
from dpo_cli.evaluation.metrics_log import History
from dpo_cli.evaluation.statistics import Interval

Finding = dict[str, Any]

ENOUGH = 20  # pairs: an interval of fewer is as wide as what one would look for
UNMOVED = 0.1  # nats per pair: the odds of its responses changed by less than a tenth
MEMORISED = 0.5  # of the first step's loss: half the training loss is gone, and the held-out loss shows nothing of it
FALL = math.log(2)  # nats per response: half as likely as before; less is true of many good models, and harmless
CORRELATED = 0.3  # Spearman's: Cohen's (1988) medium effect
KL = 0.5  # nats per token: by Pinsker's inequality up to half of a next token's probability may have moved
RISE = 0.02  # nats of held-out loss: 3 % of ln 2
LAST_STEPS = 10  # whose mean is taken, since single batches scatter
ROWS = 20  # listed in a finding
HOLD_OUT = "--eval-fraction 0.1 holds out a tenth of the pairs"


@dataclass(frozen=True)
class Evidence:
    """What findings are drawn from.

    ``history`` has the lines of the run's ``metrics.jsonl`` up to this policy, if it is of a run; ``held_out``: whether
    the pairs are those of that run's held-out losses, at its beta and reference; ``trained_on``: how many of the pairs
    the run was trained on.
    """

    scores: PairScores
    intervals: Mapping[str, Interval]
    length: Mapping[str, Any]
    history: History = ()
    held_out: bool = True
    trained_on: int = 0

    @cached_property
    def training(self) -> History:
        """The lines of training steps."""
        return [line for line in self.history if line.get("loss") is not None]

    @property
    def pairs(self) -> int:
        """How many there are."""
        return len(self.scores.where)

    def held_out_losses(self) -> dict[int, float]:
        """The run's held-out losses by step; empty where they are of other pairs."""
        lines = self.history if self.held_out else ()
        return {line["step"]: line["eval_loss"] for line in lines if line.get("eval_loss") is not None}


def diagnose(about: Evidence) -> tuple[list[Finding], dict[str, Any]]:
    """Look for every problem that these pairs and the training can show: the findings, and the verdict ``judged``."""
    scores, reference = about.scores, about.scores.objective.reference
    results: dict[str, Finding | None] = {"not_finite": _not_finite(about)}
    if about.training and not results["not_finite"]:
        results["memorised"] = _memorised(about)
        if reference:
            results["nothing_learned"] = _nothing_learned(about)
    if about.pairs >= ENOUGH and about.intervals.get("loss") is not None:
        results["length_bias"] = _length_bias(about)
        if reference:
            results["displaced_chosen"] = _displaced_chosen(about)
        if scores.distributions is not None:
            results["kl_drift"] = _kl_drift(about)
        if about.held_out and about.training:
            results["over_optimised"] = over = _over_optimised(about)
            if over and results.get(
                "memorised"
            ):  # one cause; the former if the model was ever better than at its start
                del results["memorised" if over["numbers"]["best_step"] else "over_optimised"]
        if not reference or _mean_change(scores) >= UNMOVED:  # else the policy is as good as its reference
            causes = ("memorised", "nothing_learned", "length_bias", "over_optimised")
            results |= _chance(about, explained=any(results.get(kind) for kind in causes))
    findings = [finding for finding in results.values() if finding]
    passed = [kind for kind, finding in results.items() if finding is None]
    return findings, judge(about.pairs, len(findings), passed, about.trained_on)


def judge(pairs: int, problems: int = 0, passed: Sequence[str] = (), trained_on: int = 0) -> dict[str, Any]:
    """The verdict on a model after its checks: on how many pairs, whether they are enough, and all of it in words."""
    new = pairs - trained_on
    verdict = {"pairs": new, "needed": ENOUGH, "enough": new >= ENOUGH, "passed": list(passed)}
    if not pairs:
        text = "No pairs were held out: nothing shows whether the model learned the preference; " + HOLD_OUT
    elif new < ENOUGH:
        which = " that were not trained on" * bool(trained_on)
        text = f"Only {new:,} pair{'s' * (new != 1)}{which}: too few to judge ({new:,}; {ENOUGH} needed)"
    else:
        count = f"{problems} problem{'s' * (problems > 1)} found" if problems else "No problems found"
        of = f"{pairs:,} pairs{f', {trained_on:,} of which were trained on' * bool(trained_on)}"
        names = ", ".join(kind.replace("_", " ") for kind in passed)
        text = f"{count}: {len(passed)} check{'s' * (len(passed) != 1)} passed on {of} (not found: {names})"
    return verdict | {"text": text}


def _finding(
    kind: str, title: str, text: str, advice: str, numbers: Mapping[str, float], rows: Sequence[str] = ()
) -> Finding:
    plain = {name: float(value) for name, value in numbers.items()}
    return {"kind": kind, "title": title, "text": text, "advice": advice, "numbers": plain, "rows": list(rows)}


def _mean_change(scores: PairScores) -> float:
    """Mean absolute log-ratio margin, nats."""
    return float(np.abs(scores.logratios[:, 0] - scores.logratios[:, 1]).mean())


def _not_finite(about: Evidence) -> Finding | None:
    scores = about.scores
    policy, reference = (~np.isfinite(table).all(1) for table in (scores.logps, scores.ref_logps))
    reference &= scores.objective.reference  # else it may be that none was scored
    places = np.flatnonzero(policy | reference)
    if not len(places):
        return None
    text = (
        f"In {len(places):,} of {about.pairs:,} pairs a log-prob is not a finite number: in {policy.sum():,} the "
        f"policy's, in {reference.sum():,} the reference's. Means over them are unknown, and so are their intervals."
    )
    advice = "The policy diverged: train again with a lower --lr, or use an earlier checkpoint."
    if not policy.any():
        advice = "The reference itself fails on these rows: try --dtype float32, or another reference."
    numbers = {"pairs": len(places), "policy": policy.sum(), "reference": reference.sum()}
    title = f"{len(places):,} pairs have log-probs that are not finite"
    return _finding("not_finite", title, text, advice, numbers, [scores.where[place] for place in places[:ROWS]])


def _memorised(about: Evidence) -> Finding | None:
    """The training loss is far below its start, and the loss of these pairs above theirs.

    Their start is what the run measured at step 0; for other pairs it is ln 2, if the loss begins there.
    """
    scores, held_out = about.scores, about.held_out_losses()
    from_ln_2 = scores.objective.is_vanilla_dpo and bool((scores.terms == (1, 0)).all())
    start = held_out.get(0, math.log(2) if from_ln_2 else math.inf)
    losses = [line["loss"] for line in about.training]
    last, now = float(np.mean(losses[-LAST_STEPS:])), float(scores.losses.mean())
    if not (last < MEMORISED * losses[0] and now > start + RISE):
        return None
    text = (
        f"The loss of the last training steps is {last:.4f}; on these {about.pairs:,} pairs it is {now:.4f}, above the "
        f"{start:.4f} of the start model. {scores.wins.mean():.1%} of them are ranked right. The model learned its "
        "training pairs, and not what they have in common with these."
    )
    advice = (
        "Train for fewer steps, on more pairs or with a lower --lr; --eval-steps with --save-best loss keeps the best "
        "model. If no pair was trained on twice, these pairs are of another kind than the training pairs."
    )
    if (best := min(held_out, key=lambda step: held_out[step], default=0)) > 0:
        advice = f"The loss of these pairs was lowest at step {best} ({held_out[best]:.4f}). " + advice
    numbers = {"training_loss": last, "loss": now, "start_loss": start}
    title = f"The training pairs were memorised: loss {last:.2g} on them and {now:.2f} on these"
    return _finding("memorised", title, text, advice, numbers)


def _nothing_learned(about: Evidence) -> Finding | None:
    moved, steps = _mean_change(about.scores), about.training[-1]["step"]
    if not moved < UNMOVED:
        return None
    rates = [rate for line in about.training if (rate := line.get("learning_rate"))]
    higher = ", such as --lr 2e-05," if rates and max(rates) <= 2e-6 else ""
    text = (
        f"After step {steps:,} the log-ratios of the two responses differ by {moved:.2g} nats on average; 1 or more is "
        "usual for a model that learned."
    )
    advice = f"Train with a higher learning rate{higher} or for more steps."
    title = f"Next to nothing was learned: the margins are {moved:.2g} nats on average"
    return _finding("nothing_learned", title, text, advice, {"moved": moved, "steps": steps})


def _chance(about: Evidence, explained: bool) -> dict[str, Finding | None]:
    """The accuracy is below a coin's; or neither it nor the margin is certainly above, which nothing else explains."""
    accuracy, margin = (about.intervals[f"rewards/{name}"] for name in ("accuracies", "margins"))
    if accuracy is None or margin is None:
        return {}
    low, high = accuracy
    text = f"The accuracy on these {about.pairs:,} pairs is {low:.1%} to {high:.1%} (95 % interval)."
    numbers = {"accuracy_low": low, "accuracy_high": high}
    if high < 0.5:
        advice = "Are chosen and rejected exchanged, here or in the training data? dpo explain shows a row."
        title = "The model prefers the rejected responses"
        return {"worse_than_chance": _finding("worse_than_chance", title, text, advice, numbers)}
    results: dict[str, Finding | None] = {"worse_than_chance": None}
    if not explained:
        advice = (
            "Evaluate more pairs, which narrows the interval. If the training accuracy rises, there are too few pairs, "
            "or their labels are too noisy, to learn what generalises; if not, raise --lr or the number of steps."
        )
        title = f"The accuracy cannot be distinguished from chance: {low:.0%} to {high:.0%}"
        text += " The interval of the mean margin reaches 0 too."
        unsure = low <= 0.5 and margin[0] <= 0
        results["at_chance"] = _finding("at_chance", title, text, advice, numbers) if unsure else None
    return results


def _displaced_chosen(about: Evidence) -> Finding | None:
    """The chosen responses lost probability along with the rejected ones.

    Source: Razin et al., arXiv 2410.08847; Pal et al., arXiv 2402.13228.
    """
    scores, ends = about.scores, [about.intervals[f"rewards/{side}"] for side in SIDES]
    chosen, rejected = scores.logratios.mean(0)
    if any(end is None or end[1] >= 0 for end in ends) or chosen > -FALL:
        return None
    share = float((scores.logratios[:, 0] < 0).mean())
    text = (
        f"The log-prob of the chosen responses fell by {-chosen:.1f} nats on average, in {share:.0%} of the pairs; "
        f"that of the rejected ones by {-rejected:.1f}. The loss only sees the difference: where the responses share "
        "most words, lowering one lowers the other, and the probability goes to answers that no pair covers."
    )
    advice = (
        "Try a higher --beta, a lower --lr or fewer steps; pairs whose responses differ more; or a loss that holds "
        "the chosen response up, --loss dpop or sigmoid=1,sft=0.2. Read what the model answers: the accuracy does not "
        "show this."
    )
    numbers = {"chosen": chosen, "rejected": rejected, "fell": share}
    title = f"The chosen responses became less likely, by {-chosen:.1f} nats each"
    return _finding("displaced_chosen", title, text, advice, numbers)


def _length_bias(about: Evidence) -> Finding | None:
    """Margins go with the length gap, and accuracy is lower where length speaks against the chosen response."""
    length = about.length
    rho, ends = length["margin_length_correlation"], length["margin_length_correlation_interval"]
    if ends is None or abs(rho) < CORRELATED or ends[0] <= 0 <= ends[1]:
        return None
    kept, against = ("longer", "shorter") if rho > 0 else ("shorter", "longer")
    high, low = (length[f"accuracy_chosen_{name}_interval"] for name in (kept, against))
    if high is None or low is None or high[0] <= low[1]:
        return None
    accuracies = {name: length[f"accuracy_chosen_{name}"] for name in (kept, against)}
    text = (
        f"The policy is right in {accuracies[kept]:.0%} of the {length[f'accuracy_chosen_{kept}_pairs']:,} pairs whose "
        f"chosen response is the {kept} one, and in {accuracies[against]:.0%} of the "
        f"{length[f'accuracy_chosen_{against}_pairs']:,} where it is the {against} one. Its margin goes with the "
        f"difference of lengths (Spearman {rho:.2f}, 95 % interval {ends[0]:.2f} to {ends[1]:.2f})."
    )
    advice = (
        "Compare lengths in the training pairs with dpo check, and balance them; judge the model by the second group."
    )
    numbers = {"correlation": rho} | {f"accuracy_chosen_{name}": value for name, value in accuracies.items()}
    return _finding("length_bias", f"The model prefers the {kept} response, right or wrong", text, advice, numbers)


def _kl_drift(about: Evidence) -> Finding | None:
    exact, tokens = about.scores.distributions, about.scores.tokens.sum(0)
    assert exact is not None
    ends = [about.intervals[f"kl/{side}"] for side in SIDES]
    if not any(end and end[0] > KL for end in ends):
        return None
    (chosen, rejected), shifted = exact.kl.sum(0) / tokens, exact.shifted.sum() / tokens.sum()
    text = (
        f"KL(policy||reference) is {chosen:.2f} nats per token on the chosen responses and {rejected:.2f} on the "
        f"rejected ones; {shifted:.1%} of the tokens changed their probability more than 20-fold. So far away the "
        "policy does much that no pair covers."
    )
    advice = (
        "Read the tokens that changed most, in their context: often it is one phrase or the end of the answer. Try a "
        "higher --beta first, which is meant for this; then a lower --lr or fewer steps."
    )
    title = f"The policy is {max(chosen, rejected):.2f} nats per token away from its reference"
    numbers = {"kl_chosen": chosen, "kl_rejected": rejected, "shifted_tokens": shifted}
    return _finding("kl_drift", title, text, advice, numbers)


def _over_optimised(about: Evidence) -> Finding | None:
    """The held-out loss rose from its best while the training margin kept growing."""
    losses, ends = about.held_out_losses(), about.intervals["loss"]
    margins = [
        (line["step"], line["rewards/margins"]) for line in about.training if line.get("rewards/margins") is not None
    ]
    if not losses or not margins or ends is None:
        return None
    best_step, last_step = min(losses, key=lambda step: (losses[step], step)), max(losses)
    best, last = losses[best_step], losses[last_step]
    noise = (ends[1] - ends[0]) / 2  # of the last loss: about that of the difference of the two, or wider
    before = [margin for step, margin in margins if step <= best_step][-LAST_STEPS:] or [0.0]
    after = [margin for step, margin in margins if step > best_step][-LAST_STEPS:] or [0.0]
    grew_from, grew_to = float(np.mean(before)), float(np.mean(after))
    if last - best <= max(noise, RISE) or grew_to <= grew_from:
        return None
    text = (
        f"The held-out loss was lowest at step {best_step} ({best:.4f}) and rose to {last:.4f} at step {last_step}, "
        f"more than its uncertainty of {noise:.4f}, while the margin on the training pairs grew from {grew_from:.2f} "
        f"to {grew_to:.2f}."
    )
    advice = f"Train for about {best_step} steps, keep the best model with --save-best loss, or lower --lr."
    if not best_step:
        advice = "It was never better than at the start: lower --lr, and check that the two sets are of one kind."
    numbers = {"best_step": best_step, "best_loss": best, "last_step": last_step, "last_loss": last, "noise": noise}
    return _finding("over_optimised", f"The held-out loss rises since step {best_step}", text, advice, numbers)
