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

from dpo_cli.evaluation.metrics import SIDES, History, PairScores
from dpo_cli.evaluation.statistics import Interval
from dpo_cli.utils.errors import plural

Finding = dict[str, Any]

ENOUGH = 20  # pairs: an interval of fewer is as wide as what one would look for
UNMOVED = 0.1  # nats per pair: the odds of its responses changed by less than a tenth
MEMORISED = 0.5  # of the first step's loss: half the training loss is gone, and the held-out loss shows nothing of it
FALL = math.log(2)  # nats per response: half as likely as before; less is true of many good models, and harmless
CORRELATED = 0.3  # Spearman's: Cohen's (1988) medium effect
KL = 0.5  # nats per token: by Pinsker's inequality up to half of a next token's probability may have moved
RISE = 0.02  # nats of held-out loss: 3% of ln 2
LAST_STEPS = 10  # whose mean is taken, since single batches scatter
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

    @cached_property
    def held_out_losses(self) -> dict[int, float]:
        """The run's held-out losses by step; empty where they are of other pairs."""
        lines = self.history if self.held_out else ()
        return {line["step"]: line["eval_loss"] for line in lines if line.get("eval_loss") is not None}

    @property
    def change(self) -> float:
        """Mean absolute log-ratio margin, nats."""
        return float(np.abs(self.scores.logratios[:, 0] - self.scores.logratios[:, 1]).mean())


def diagnose(about: Evidence) -> tuple[list[Finding], dict[str, Any]]:
    """Look for every problem that these pairs and the training can show: the findings, and the verdict ``judged``."""
    pairs, reference = len(about.scores.where), about.scores.objective.reference
    results: dict[str, Finding | None] = {"not_finite": _not_finite(about)}
    if about.training and not results["not_finite"]:
        results["memorised"] = _memorised(about)
        if reference:
            results["nothing_learned"] = _nothing_learned(about)
    if pairs >= ENOUGH and about.intervals.get("loss") is not None:
        results["length_bias"] = _length_bias(about)
        if reference:
            results["displaced_chosen"] = _displaced_chosen(about)
        if about.scores.distributions:
            results["kl_drift"] = _kl_drift(about)
        if about.held_out and about.training:
            results["over_optimised"] = over = _over_optimised(about)
            if over and results.get("memorised"):  # one cause; the former if it was ever better than at its start
                del results["memorised" if over["numbers"]["best_step"] else "over_optimised"]
        if not reference or about.change >= UNMOVED:  # else the policy is as good as its reference
            causes = ("memorised", "nothing_learned", "length_bias", "over_optimised")
            results |= _chance(about, explained=any(results.get(kind) for kind in causes))
    findings = [{"kind": kind, **finding} for kind, finding in results.items() if finding]
    passed = [kind for kind, finding in results.items() if finding is None]
    return findings, judge(pairs, len(findings), passed, about.trained_on)


def judge(pairs: int, problems: int = 0, passed: Sequence[str] = (), trained_on: int = 0) -> dict[str, Any]:
    """The verdict on a model after its checks: on how many pairs, whether they are enough, and all of it in words."""
    judged = count_new(pairs, trained_on) | {"passed": list(passed)}
    if not pairs:
        judged["text"] = "No pairs were held out: nothing shows whether the model learned the preference; " + HOLD_OUT
    elif judged["enough"]:
        count = f"{plural(problems, 'problem')} found" if problems else "No problems found"
        of = f"{pairs:,} pairs{f', {trained_on:,} of which were trained on' * bool(trained_on)}"
        judged["text"] = f"{count}: {plural(len(passed), 'check')} passed on {of}"
    return judged


def count_new(pairs: int, trained_on: int = 0) -> dict[str, Any]:
    """Count the pairs that were not trained on, and whether they are ``enough``; ``text`` says so if they are not."""
    new, which = pairs - trained_on, " that were not trained on" * bool(trained_on)
    judged = {"pairs": new, "needed": ENOUGH, "enough": new >= ENOUGH}
    text = f"Only {plural(new, 'pair')}{which}: too few to judge ({ENOUGH} needed)"
    return judged if judged["enough"] else judged | {"text": text}


def verdict(about: Evidence, judged: Mapping[str, Any]) -> list[str]:
    """Say in plain words how often the better answer is favored, against what, and how far the policy moved.

    Of too few pairs to judge, the count alone; nothing where some of them were trained on, or a log-prob is not finite.
    """
    ends, scores = about.intervals.get("rewards/accuracies"), about.scores
    if ends is None or (about.trained_on and not judged["enough"]):
        return []
    more = "favors the better answer" + " more than its reference does" * scores.objective.reference
    if not judged["enough"]:
        hits = scores.wins.sum()
        tie = " (a tie counts half)" if hits % 1 else ""
        return [f"The model {more} in {hits:g} of {plural(len(scores.where), 'pair')}{tie}."]
    longer = about.length["accuracy_prefer_longer"]
    rule, share = max(("longer", longer), ("shorter", 1 - longer), key=lambda each: each[1])
    which = "held-out " * (about.held_out and bool(about.history) and not about.trained_on)
    overlap = f", {about.trained_on:,} of which were trained on," * bool(about.trained_on)
    often = f"in {scores.wins.mean():.0%} ({ends[0]:.0%} to {ends[1]:.0%})"
    compared = ", which does better" if ends[1] < share else ", which may do as well" if ends[0] <= share else ""
    against = f"chance: 50%, always the {rule} answer: {share:.0%}{compared}"
    lines = [f"On {len(scores.where):,} {which}pairs{overlap} the model {more} {often}; {against}."]
    if scores.objective.reference:
        policy, reference = ((table[:, 0] > table[:, 1]).mean() for table in (scores.logps, scores.ref_logps))
        lines.append(f"The better answer is the likelier one in {policy:.0%}; under the reference in {reference:.0%}.")
    if scores.distributions:
        kl = max(scores.distributions["kl"].sum(0) / scores.tokens.sum(0))
        lines.append(f"KL from its reference on these answers: {kl:.2g} nats per token.")
    return lines


def _finding(title: str, advice: str, numbers: Mapping[str, float]) -> Finding:
    return {"title": title, "advice": advice, "numbers": {name: float(value) for name, value in numbers.items()}}


def _not_finite(about: Evidence) -> Finding | None:
    scores = about.scores
    policy, reference = (~np.isfinite(table).all(1) for table in (scores.logps, scores.ref_logps))
    reference &= scores.objective.reference  # else it may be that none was scored
    places = np.flatnonzero(policy | reference)
    if not len(places):
        return None
    advice = "The policy diverged: train again with a lower --lr, or use an earlier checkpoint."
    if not policy.any():
        advice = "The reference itself fails on these rows: try --dtype float32, or another reference."
    numbers = {"pairs": len(places), "policy": policy.sum(), "reference": reference.sum()}
    first = ", ".join(scores.where[place] for place in places[:5])
    return _finding(f"Log-probs that are not finite, of {plural(len(places), 'pair')}: {first}", advice, numbers)


def _memorised(about: Evidence) -> Finding | None:
    """The training loss is far below its start, and the loss of these pairs above theirs.

    Their start is what the run measured at step 0; for other pairs it is ln 2, if the loss begins there.
    """
    scores = about.scores
    from_ln_2 = scores.objective.is_vanilla_dpo and bool((scores.terms == (1, 0)).all())
    start = about.held_out_losses.get(0, math.log(2) if from_ln_2 else math.inf)
    losses = [line["loss"] for line in about.training]
    last, now = float(np.mean(losses[-LAST_STEPS:])), float(scores.losses.mean())
    if not (last < MEMORISED * losses[0] and now > start + RISE):
        return None
    advice = (
        "Train for fewer steps, on more pairs or with a lower --lr; --eval-steps with --save-best loss keeps the best "
        "model. If no pair was trained on twice, these pairs are of another kind than the training pairs."
    )
    title = f"The training pairs were memorised: loss {last:.2g} on them and {now:.2f} on these, from {start:.2f}"
    return _finding(title, advice, {"training_loss": last, "loss": now, "start_loss": start})


def _nothing_learned(about: Evidence) -> Finding | None:
    moved, steps = about.change, about.training[-1]["step"]
    if not moved < UNMOVED:
        return None
    title = f"Next to nothing was learned: the margins are {moved:.2g} nats on average; 1 or more is usual"
    rates = [rate for line in about.training if (rate := line.get("learning_rate"))]
    higher = ", such as --lr 2e-05," if rates and max(rates) <= 2e-6 else ""
    return _finding(title, f"Train with a higher --lr{higher} or for more steps.", {"moved": moved, "steps": steps})


def _chance(about: Evidence, explained: bool) -> dict[str, Finding | None]:
    """The accuracy is below a coin's; or neither it nor the margin is certainly above, which nothing else explains."""
    accuracy, margin = (about.intervals[f"rewards/{name}"] for name in ("accuracies", "margins"))
    if accuracy is None or margin is None:
        return {}
    low, high = accuracy
    numbers = {"accuracy_low": low, "accuracy_high": high}
    if high < 0.5:
        title = f"The model prefers the rejected responses: the accuracy is {low:.1%} to {high:.1%}"
        advice = "Are chosen and rejected exchanged, here or in the training data? dpo explain shows a row."
        return {"worse_than_chance": _finding(title, advice, numbers)}
    results: dict[str, Finding | None] = {"worse_than_chance": None}
    if not explained:
        title = f"The accuracy cannot be distinguished from chance: {low:.1%} to {high:.1%}"
        advice = (
            "Evaluate more pairs, which narrows the interval. If the training accuracy rises, there are too few pairs, "
            "or their labels are too noisy, to learn what generalises; if not, raise --lr or the number of steps."
        )
        unsure = low <= 0.5 and margin[0] <= 0
        results["at_chance"] = _finding(title, advice, numbers) if unsure else None
    return results


def _displaced_chosen(about: Evidence) -> Finding | None:
    """The chosen responses lost probability along with the rejected ones.

    Source: Razin et al., arXiv 2410.08847; Pal et al., arXiv 2402.13228.
    """
    scores, ends = about.scores, [about.intervals[f"rewards/{side}"] for side in SIDES]
    chosen, rejected = scores.logratios.mean(0)
    if any(end is None or end[1] >= 0 for end in ends) or chosen > -FALL:
        return None
    advice = (
        "The loss only sees the difference, and the probability went to answers that no pair covers. Try a higher "
        "--beta, a lower --lr or fewer steps; pairs whose responses differ more; or a loss that holds the chosen "
        "response up, --loss dpop or sigmoid=1,sft=0.2."
    )
    numbers = {"chosen": chosen, "rejected": rejected, "fell": (scores.logratios[:, 0] < 0).mean()}
    return _finding(f"The chosen responses became less likely, by {-chosen:.1f} nats each", advice, numbers)


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
    numbers = {name: length[name] for name in (f"accuracy_chosen_{kept}", f"accuracy_chosen_{against}")}
    advice = f"Balance lengths in the training pairs (dpo check); judge by pairs whose chosen one is {against}."
    title = f"The model prefers the {kept} response, right or wrong: Spearman {rho:.2f} of margin and length"
    return _finding(title, advice, {"correlation": rho} | numbers)


def _kl_drift(about: Evidence) -> Finding | None:
    if not any(end and end[0] > KL for end in (about.intervals[f"kl/{side}"] for side in SIDES)):
        return None
    exact, tokens = about.scores.distributions, about.scores.tokens.sum(0)
    chosen, rejected = exact["kl"].sum(0) / tokens
    advice = (
        "Read the tokens that changed most, in their context: often it is one phrase or the end of the answer. Try a "
        "higher --beta first, which is meant for this; then a lower --lr or fewer steps."
    )
    title = f"The policy is {max(chosen, rejected):.2f} nats per token away from its reference"
    shifted = exact["shifted_tokens"].sum() / tokens.sum()
    return _finding(title, advice, {"kl_chosen": chosen, "kl_rejected": rejected, "shifted_tokens": shifted})


def _over_optimised(about: Evidence) -> Finding | None:
    """The held-out loss rose from its best while the training margin kept growing."""
    losses, ends = about.held_out_losses, about.intervals["loss"]
    lines = [line for line in about.training if line.get("rewards/margins") is not None]
    if not losses or not lines or ends is None:
        return None
    best, last = min(losses, key=lambda step: (losses[step], step)), max(losses)
    noise = (ends[1] - ends[0]) / 2  # of the last loss: about that of the difference of the two, or wider
    before = [line["rewards/margins"] for line in lines if line["step"] <= best][-LAST_STEPS:] or [0.0]
    after = [line["rewards/margins"] for line in lines if line["step"] > best][-LAST_STEPS:] or [0.0]
    if losses[last] - losses[best] <= max(noise, RISE) or np.mean(after) <= np.mean(before):
        return None
    advice = f"Train for about {plural(best, 'step')}, keep the best model with --save-best loss, or lower --lr."
    if not best:
        advice = "It was never better than at the start: lower --lr, and check that the two sets are of one kind."
    numbers = {"best_step": best, "best_loss": losses[best], "last_step": last, "last_loss": losses[last]}
    title = f"The held-out loss rises since step {best}, from {losses[best]:.4f} to {losses[last]:.4f}"
    return _finding(title, advice, numbers | {"noise": noise})
