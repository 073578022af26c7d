"""What can be wrong with a trained model, in words with numbers: each finding, what it rests on, and what to try.

A finding is large enough to matter, by a named threshold, and sure: by an interval, of which few pairs have none that
is of use, or because it is a fact about these very pairs. All that is measured in rewards is reported in nats, which no
beta changes.

Legend: P pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.stats import binom

from dpo_cli.evaluation.margins import beyond_arithmetic
from dpo_cli.evaluation.scores import SIDES, Distributions, Scores, Table, gap_of

Finding = dict[str, Any]

ENOUGH = 20  # pairs: an interval of fewer is as wide as what one would look for
STILL = 0.1  # nats a pair: the odds of its responses changed by less than a tenth, and the loss by 0.005 at beta 0.1
MEMORISED = 0.5  # of the first step's loss: half the training loss is gone, of which the held-out loss shows nothing
ONE_SIDED = 0.2  # share of pairs: one in five teaches as much about thinking as about what the answers say
FALL = math.log(2)  # nats a response: half as likely as before; less is true of many good models, and harmless
CORRELATED = 0.3  # Spearman's: length explains about a tenth of the margins' order, Cohen's (1988) medium effect
MOVED = {"chosen": 0.02, "rejected": 0.1}  # share of tokens: one in 50 where none need move; rejected ones are to fall
KL = 0.5  # nats a token: by Pinsker's inequality as much as half of a next token's probability may be elsewhere
OUTLIER = 3.0  # robust standard deviations below the median: 1 of 740 normal values, of long tails some per cent
CHANCE = 0.01  # that the reference finds so many of these wrong too, were they like all others: long tails alone are
FLIPPED, FLIPS = 0.01, 3  # share and number of such pairs: fewer change no training, and every data set has some
RISE = 0.02  # nats of held-out loss: 3 % of ln 2; many pairs make less than that sure, but no less small
HOLD_OUT = "--eval-fraction 0.1 holds out a tenth of the pairs"
LINES = 10  # of the training whose mean margin is taken: single batches scatter
ROWS = 20  # named in a finding
NORMAL_MAD = 1.4826  # a normal distribution's standard deviation in median absolute deviations


def verdict(
    scores: Scores,
    sections: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]] = (),
    *,
    held_out: bool = True,
    thinking: npt.NDArray[np.bool_] | None = None,
    trained_on: int = 0,
) -> dict[str, Any]:
    """``findings``: all that is wrong with the policy as far as these pairs and its training show it; and ``judged``.

    ``sections`` are those of ``margins.sections``; ``history`` the lines of its ``metrics.jsonl`` up to this policy,
    where it has any; ``held_out``: whether the pairs are those of that run's held-out losses, at its beta and
    reference; ``thinking`` (P, 2): which responses have thinking; ``trained_on``: how many pairs it was trained on.
    """
    looked = {"not_finite": _not_finite(scores)}  # by kind; None where nothing was found
    trained = [line for line in history if line.get("loss") is not None]
    if thinking is not None:
        looked["thinking"] = _thinking(scores, thinking)
    if trained and not looked["not_finite"]:
        looked["memorised"] = _memorised(scores, trained, history, held_out)
        if scores.objective.reference:
            looked["nothing_learned"] = _nothing_learned(scores, trained)
    if len(scores.where) >= ENOUGH and sections["intervals"]["loss"] is not None:
        looked |= _by_intervals(scores, sections)
        if held_out and trained:
            looked["over_optimised"] = over = _over_optimised(sections, history)
            if over and looked.get(
                "memorised"
            ):  # one cause: the former, if the model was ever better than at its start
                del looked["memorised" if over["numbers"]["best_step"] else "over_optimised"]
        moved = float(np.abs(gap_of(scores.logratios)).mean()) >= STILL
        if moved or not scores.objective.reference:  # else the policy is its reference, or as good as that
            looked = {"worse_than_chance": _worse_than_chance(sections, len(scores.where))} | looked
        explained = ("worse_than_chance", "memorised", "nothing_learned", "length_bias", "over_optimised")
        if "worse_than_chance" in looked and not any(looked.get(kind) for kind in explained):
            looked["at_chance"] = _at_chance(sections, len(scores.where))
    found = [finding for finding in looked.values() if finding]
    passed = [kind for kind, finding in looked.items() if finding is None]
    return {"findings": found, "judged": judged(len(scores.where), len(found), passed, trained_on)}


def _by_intervals(scores: Scores, sections: Mapping[str, Any]) -> dict[str, Finding | None]:
    """What enough pairs show of a policy, however it was trained."""
    looked = {"length_bias": _length_bias(sections)}
    if scores.objective.reference:
        looked["displaced_chosen"] = _displaced_chosen(scores, sections)
    if (exact := scores.distributions) is not None:
        looked["token_drift"] = _token_drift(scores, exact, sections)
        looked["kl_drift"] = _kl_drift(scores, exact, sections)
    if looked["length_bias"] is None:  # a policy that goes by length is no witness of labels
        looked["label_noise"] = _label_noise(scores)
    return looked


def judged(pairs: int, problems: int = 0, passed: Sequence[str] = (), trained_on: int = 0) -> dict[str, Any]:
    """What can be said of a model after its checks on so many pairs, ``trained_on`` of which it was trained on.

    ``enough``: whether the pairs that it was not trained on are ``needed`` many; ``passed``: the checks that found
    nothing, by kind; ``text``: all of it in words.
    """
    new = pairs - trained_on
    about = {"pairs": new, "needed": ENOUGH, "enough": new >= ENOUGH, "passed": list(passed)}
    if not pairs:
        text = "No pairs were held out: nothing shows whether the model learned the preference; " + HOLD_OUT
    elif new < ENOUGH:
        which = " that were not trained on" * bool(trained_on)
        text = f"Only {new:,} pair{'s' * (new != 1)}{which}: too few to judge ({new:,}; {ENOUGH} needed)"
    else:
        found = f"{problems} problem{'s' * (problems > 1)} found" if problems else "No problems found"
        of = f"{pairs:,} pairs{f', {trained_on:,} of which were trained on' * bool(trained_on)}"
        names = ", ".join(kind.replace("_", " ") for kind in passed)
        text = f"{found}: {len(passed)} check{'s' * (len(passed) != 1)} passed on {of} (not found: {names})"
    return about | {"text": text}


def _finding(
    kind: str, title: str, text: str, advice: str, numbers: Mapping[str, float], rows: Sequence[str] = ()
) -> Finding:
    plain = {name: float(value) for name, value in numbers.items()}
    return {"kind": kind, "title": title, "text": text, "advice": advice, "numbers": plain, "rows": list(rows)}


def _not_finite(scores: Scores) -> Finding | None:
    """Log-probs that are no numbers, of which nothing can be said, however few they are."""
    policy, reference = (~np.isfinite(table).all(1) for table in (scores.logps, scores.ref_logps))
    reference &= scores.objective.reference  # else it may be that none was scored
    places = np.flatnonzero(policy | reference)
    if not len(places):
        return None
    text = (
        f"In {len(places):,} of {len(scores.where):,} pairs a log-prob is not a finite number: in {policy.sum():,} the "
        f"policy's, in {reference.sum():,} the reference's. No mean over them is known, and no interval."
    )
    advice = "The policy diverged: train again with a lower --lr, or take an earlier checkpoint."
    if not policy.any():
        advice = "The reference itself fails on these rows: try --dtype float32, or another reference."
    numbers = {"pairs": len(places), "policy": policy.sum(), "reference": reference.sum()}
    title = f"{len(places):,} pairs have log-probs that are not finite"
    return _finding("not_finite", title, text, advice, numbers, [scores.where[place] for place in places[:ROWS]])


def _thinking(scores: Scores, thinking: npt.NDArray[np.bool_]) -> Finding | None:
    """Many pairs in which one response thinks before it answers and the other does not, mostly the same one."""
    alone, pairs = thinking & ~thinking[:, ::-1], len(scores.where)  # (P, 2)
    column = int(alone.sum(0).argmax())
    (side, other), count = SIDES[:: -1 if column else 1], int(alone[:, column].sum())
    if count < ONE_SIDED * pairs:
        return None
    text = (
        f"In {count:,} of {pairs:,} pairs the {side} response has thinking, in <think> tags, and the {other} one has "
        f"none. What such pairs teach first is {'' if column == 0 else 'not '}to think, whatever the answers say."
    )
    advice = "Give both responses their thinking, or neither of them; dpo check names the rows."
    rows = [scores.where[place] for place in np.flatnonzero(alone[:, column])[:ROWS]]
    title = f"Only the {side} response thinks in {count / pairs:.0%} of the pairs"
    return _finding("thinking", title, text, advice, {"pairs": count, "share": count / pairs}, rows)


def _memorised(
    scores: Scores, trained: Sequence[Mapping[str, Any]], history: Sequence[Mapping[str, Any]], held_out: bool
) -> Finding | None:
    """The training loss is far below its start, and the loss of these pairs above theirs.

    The start is what the run measured at step 0, of other pairs ln 2, where the loss begins there.
    """
    known = {line["step"]: line["eval_loss"] for line in history if held_out and line.get("eval_loss") is not None}
    plain = scores.objective.is_vanilla_dpo and bool((scores.terms == (1, 0)).all())
    start = known.get(0, math.log(2) if plain else math.inf)
    losses = [line["loss"] for line in trained]
    last, now = float(np.mean(losses[-LINES:])), float(scores.losses.mean())
    if not (last < MEMORISED * losses[0] and now > start + RISE):
        return None
    text = (
        f"The loss of the last training steps is {last:.4f}; on these {len(scores.where):,} pairs it is {now:.4f}, "
        f"above the {start:.4f} of a model that was not trained. They are ranked right in {scores.wins.mean():.1%}. "
        "The model learned its training pairs, and by its loss is worse on these than before."
    )
    advice = (
        "Train for fewer steps, on more pairs or with a lower --lr; --eval-steps with --save-best loss keeps the best "
        "model. If no pair was trained on twice, these pairs are of another kind than those trained on."
    )
    if (best := min(known, key=lambda step: known[step], default=0)) > 0:
        advice = f"The loss of these pairs was lowest at step {best} ({known[best]:.4f}). " + advice
    numbers = {"training_loss": last, "loss": now, "start_loss": start}
    title = f"The training pairs were memorised: loss {last:.2g} on them and {now:.2f} on these"
    return _finding("memorised", title, text, advice, numbers)


def _nothing_learned(scores: Scores, trained: Sequence[Mapping[str, Any]]) -> Finding | None:
    """No pair's margin is more than arithmetic, or next to nothing."""
    margins = gap_of(scores.logratios)
    moved, steps = float(np.abs(margins).mean()), trained[-1]["step"]
    if not moved < STILL:
        return None
    rates = [rate for line in trained if (rate := line.get("learning_rate"))]
    higher = ", such as --lr 2e-05," if rates and max(rates) <= 2e-6 else ""
    text = (
        f"After step {steps:,} the log-ratios of two responses differ by {moved:.2g} nats on average, where a "
        f"model that learned shows 1 or more. The margin of {margins.mean():.2g} nats and the accuracy of "
        f"{scores.wins.mean():.1%} are those of a model that has hardly moved."
    )
    advice = f"Train with a higher learning rate{higher} or for more steps."
    title = f"Next to nothing was learned: the margins are {moved:.2g} nats on average"
    return _finding("nothing_learned", title, text, advice, {"moved": moved, "margin": margins.mean(), "steps": steps})


def _worse_than_chance(sections: Mapping[str, Any], pairs: int) -> Finding | None:
    """The accuracy is surely below that of a coin."""
    if (ends := sections["intervals"]["rewards/accuracies"]) is None or ends[1] >= 0.5:
        return None
    text = (
        f"On these {pairs:,} pairs the accuracy is {ends[0]:.1%} to {ends[1]:.1%} (95 % interval), and a coin has 50 %."
    )
    advice = "Are chosen and rejected exchanged, in these pairs or in those of the training? dpo explain shows a row."
    title = "The model prefers the rejected responses"
    return _finding("worse_than_chance", title, text, advice, {"accuracy_low": ends[0], "accuracy_high": ends[1]})


def _at_chance(sections: Mapping[str, Any], pairs: int) -> Finding | None:
    """Neither accuracy nor margin is surely above that of a coin."""
    accuracy, margin = (sections["intervals"][f"rewards/{name}"] for name in ("accuracies", "margins"))
    if accuracy is None or margin is None or accuracy[0] > 0.5 or margin[0] > 0:
        return None
    low, high = accuracy
    text = (
        f"The accuracy on these {pairs:,} pairs may be anything from {low:.1%} to {high:.1%} (95 % interval), and a "
        "coin has 50 %; nor is the mean margin surely above 0."
    )
    advice = (
        "Evaluate more pairs, which makes the interval narrower. Look at the training accuracy: where it rises, the "
        "pairs are too few or too noisy to teach what carries over; where it does not, raise --lr or the steps."
    )
    title = f"The accuracy cannot be distinguished from chance: {low:.0%} to {high:.0%}"
    return _finding("at_chance", title, text, advice, {"accuracy_low": low, "accuracy_high": high})


def _displaced_chosen(scores: Scores, sections: Mapping[str, Any]) -> Finding | None:
    """The chosen responses lost probability along with the rejected ones, as far as rewards are of log-ratios.

    Source: Razin et al., arXiv 2410.08847; Pal et al., arXiv 2402.13228.
    """
    ends = [sections["intervals"][f"rewards/{side}"] for side in SIDES]
    chosen, rejected = scores.logratios.mean(0)
    if any(end is None or end[1] >= 0 for end in ends) or chosen > -FALL:
        return None
    share, margin = float((scores.logratios[:, 0] < 0).mean()), chosen - rejected
    low, high = (end / scores.objective.beta for end in ends[0])
    numbers = {"chosen": chosen, "chosen_low": low, "chosen_high": high, "rejected": rejected, "fell": share}
    text = (
        f"The log-prob of the chosen responses fell by {-chosen:.1f} nats a response on average (95 % interval "
        f"{-high:.1f} to {-low:.1f}), and in {share:.0%} of the pairs; that of the rejected ones by {-rejected:.1f}. "
    )
    if margin > 0:
        numbers |= {"margin_from_chosen": chosen / margin, "margin_from_rejected": -rejected / margin}
        text += f"The margin of {margin:.1f} nats is a fall of {-rejected:.1f} less a fall of {-chosen:.1f}. "
    text += (
        "The loss sees the difference of the two only: where the responses share most of their words, what pushes one "
        "down pulls the other along, and the probability goes to other answers, of which no pair says anything."
    )
    advice = (
        "Try a higher --beta, a lower --lr or fewer steps; pairs whose responses differ more; or a loss that holds "
        "the chosen response up, --loss dpop or sigmoid=1,sft=0.2. Read what the model answers now: the accuracy does "
        "not show this."
    )
    title = f"The chosen responses became less likely, by {-chosen:.1f} nats each"
    return _finding("displaced_chosen", title, text, advice, numbers)


def _length_bias(sections: Mapping[str, Any]) -> Finding | None:
    """The margin goes with the length gap, and the policy is right where length happens to speak for the chosen one."""
    length = sections["length"]
    rho, ends = length["margin_length_correlation"], length["margin_length_correlation_interval"]
    if ends is None or abs(rho) < CORRELATED or ends[0] <= 0 <= ends[1]:
        return None
    kept, against = ("longer", "shorter") if rho > 0 else ("shorter", "longer")
    high, low = (length[f"accuracy_chosen_{name}_interval"] for name in (kept, against))
    if high is None or low is None or high[0] <= low[1]:
        return None
    prefer, numbers = length["accuracy_prefer_longer"], {"correlation": rho, "correlation_low": ends[0]}
    numbers |= {"correlation_high": ends[1], "accuracy_prefer_longer": prefer}
    told = {name: f"accuracy_chosen_{name}" for name in (kept, against)}
    for key in told.values():
        numbers |= {key: length[key], f"{key}_pairs": length[f"{key}_pairs"]}
    text = (
        f"The policy is right in {length[told[kept]]:.0%} of the {length[f'{told[kept]}_pairs']:,} pairs whose chosen "
        f"response is the {kept} one, and in {length[told[against]]:.0%} of the {length[f'{told[against]}_pairs']:,} "
        f"where it is the {against} one. Its margin goes with the difference of lengths (Spearman {rho:.2f}, 95 % "
        f"interval {ends[0]:.2f} to {ends[1]:.2f}). Always preferring the {kept} response would be right in "
        f"{prefer if rho > 0 else 1 - prefer:.0%} of these pairs."
    )
    advice = (
        "Look at the lengths of the training pairs with dpo check; balance them, or drop pairs until length says "
        "nothing of which response is chosen; and judge the model by the pairs in which it speaks against it."
    )
    return _finding("length_bias", f"The model prefers the {kept} response, right or wrong", text, advice, numbers)


def _token_drift(scores: Scores, exact: Distributions, sections: Mapping[str, Any]) -> Finding | None:
    """Many single tokens changed their probability more than 20-fold."""
    ends = {side: sections["intervals"][f"moved_tokens/{side}"] for side in SIDES}
    if not any(end and end[0] > MOVED[side] for side, end in ends.items()):
        return None
    moved, tokens = exact.moved.sum(0), scores.tokens.sum(0)
    shares = dict(zip(SIDES, moved / tokens, strict=True))
    text = (
        f"{moved.sum():,.0f} of {tokens.sum():,.0f} response tokens ({moved.sum() / tokens.sum():.1%}) became more "
        f"than 20 times as likely or as unlikely as under the reference: {shares['chosen']:.1%} of the chosen "
        f"responses' and {shares['rejected']:.1%} of the rejected ones'."
    )
    numbers = {"moved": moved.sum(), "share": moved.sum() / tokens.sum()}
    numbers |= {f"share_{side}": share for side, share in shares.items()}
    advice = (
        "Look at the tokens that moved most, in their context: one phrase or the end of the answer is often all there "
        "is to it. A higher --beta, a lower --lr or fewer steps keep the policy nearer."
    )
    title = f"{moved.sum() / tokens.sum():.1%} of the tokens changed their probability more than 20-fold"
    return _finding("token_drift", title, text, advice, numbers)


def _kl_drift(scores: Scores, exact: Distributions, sections: Mapping[str, Any]) -> Finding | None:
    """The policy is far from the reference: KL(policy||reference) a token, at the positions of the data."""
    ends = {side: sections["intervals"][f"kl/{side}"] for side in SIDES}
    if not any(end and end[0] > KL for end in ends.values()):
        return None
    means = dict(zip(SIDES, exact.kl.sum(0) / scores.tokens.sum(0), strict=True))
    text = (
        f"KL(policy||reference) is {means['chosen']:.2f} nats a token on the chosen responses and "
        f"{means['rejected']:.2f} on the rejected ones, at the positions of these responses. "
        "So far away the policy does much that no pair says anything of."
    )
    advice = "Try a higher --beta first, which is what it is there for; then a lower --lr or fewer steps."
    title = f"The policy is {max(means.values()):.2f} nats a token away from its reference"
    numbers = {f"kl_{side}": mean for side, mean in means.items()}
    return _finding("kl_drift", title, text, advice, numbers)


def suspects(scores: Scores) -> tuple[list[int], Table]:
    """Places of pairs whose label is probably flipped, strongest first, and how far out every margin is.

    Two witnesses have to agree. The policy, trained as it is, still ranks the pair the other way, as an outlier of its
    margins; and the reference gives the rejected response the higher log-prob a token. None are told where the
    reference does so with the outliers hardly more often than with other pairs: then it is no witness.

    Shapes: the second is (P,).
    Units: robust standard deviations from the median.
    """
    margins = beyond_arithmetic(gap_of(scores.gains), scores.tie)
    away = margins - np.median(margins)
    spread = NORMAL_MAD * float(np.median(np.abs(away)))
    if not spread:
        return [], np.zeros_like(away)
    far = away / spread
    out = (far < -OUTLIER) & (margins < 0)
    other_way = gap_of(scores.ref_logps / scores.tokens) < 0
    usual = (other_way[~out].sum() + 1) / ((~out).sum() + 2)  # Laplace's estimate: never 0
    places = np.flatnonzero(out & other_way)
    if binom.sf(len(places) - 1, out.sum(), usual) > CHANCE:
        return [], far
    return places[np.argsort(far[places], kind="stable")].tolist(), far


def _label_noise(scores: Scores) -> Finding | None:
    """Pairs that both models rank the other way by a wide margin."""
    places, far = suspects(scores)
    share = len(places) / len(scores.where)
    if len(places) < FLIPS or share < FLIPPED:
        return None
    margins, unit, digits = gap_of(scores.gains), "nats", 1
    if scores.objective.length_normalized:
        unit, digits = "nats a token", 2
    text = (
        f"In {len(places):,} of {len(scores.where):,} pairs ({share:.1%}) the reference finds the rejected response "
        f"likelier per token, and the policy's margin is more than {OUTLIER:g} robust standard deviations below its "
        f"median: {margins[places].mean():.{digits}f} {unit} on average, where half of all pairs have "
        f"{np.median(margins):.{digits}f} or more."
    )
    advice = "Read these rows: were the two responses exchanged? Mend or drop them, or train with --label-smoothing."
    title = f"{len(places):,} pairs look as if their labels were flipped"
    numbers = {"pairs": len(places), "share": share, "farthest": far[places[0]], "median_margin": np.median(margins)}
    return _finding("label_noise", title, text, advice, numbers, [scores.where[place] for place in places[:ROWS]])


def _over_optimised(sections: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> Finding | None:
    """The held-out loss rose from its best while the training margin went on growing."""
    held_out = [(line["step"], line["eval_loss"]) for line in history if line.get("eval_loss") is not None]
    trained = [(line["step"], line["rewards/margins"]) for line in history if line.get("rewards/margins") is not None]
    ends = sections["intervals"]["loss"]
    if not held_out or not trained or ends is None:
        return None
    best_step, best = min(held_out, key=lambda point: point[1])
    last_step, last = max(held_out)
    # The last loss scatters most, so half its interval is about that of the difference of the two, or wider.
    noise = (ends[1] - ends[0]) / 2
    before = [margin for step, margin in trained if step <= best_step][-LINES:]
    after = [margin for step, margin in trained if step > best_step][-LINES:]
    grew_from, grew_to = (float(np.mean(part)) if part else 0.0 for part in (before, after))  # at step 0 it is 0
    if last - best <= max(noise, RISE) or grew_to <= grew_from:
        return None
    text = (
        f"The held-out loss was lowest at step {best_step} ({best:.4f}) and rose to {last:.4f} at step {last_step}, "
        f"more than its uncertainty of {noise:.4f}, while the margin on the training pairs went on growing from "
        f"{grew_from:.2f} to {grew_to:.2f}: since then the model learns its training pairs, not the preference."
    )
    advice = f"Train for about {best_step} steps, keep the best checkpoint with --save-best loss, or lower --lr."
    if not best_step:
        advice = "It was never better than at the start: lower --lr, and look whether the two sets are of one kind."
    numbers = {"best_step": best_step, "best_loss": best, "last_step": last_step, "last_loss": last}
    numbers |= {"noise": noise, "margin_at_best": grew_from, "margin_at_last": grew_to}
    return _finding("over_optimised", f"The held-out loss rises since step {best_step}", text, advice, numbers)
