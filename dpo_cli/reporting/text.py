"""Formatted numbers; an evaluation, and a comparison of two, as text for a terminal."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from dpo_cli.evaluation.metrics import SIDES

Result = Mapping[str, Any]
NONE = "–"
WIDTH = 110
PER_PAIR = ("loss", "rewards/margins", "rewards/accuracies", *(f"rewards/{side}" for side in SIDES))
PER_TOKEN = {
    "cross_entropy": "H(data, policy), nats",
    "ref_cross_entropy": "H(data, reference)",
    "delta_kl_data": "their difference: the change of KL(data || model)",
    "perplexity": "exp H(data, policy)",
    "ref_perplexity": "exp H(data, reference)",
    "entropy": "H(policy)",
    "ref_entropy": "H(reference)",
    "kl": "KL(policy || reference)",
    "reverse_kl": "KL(reference || policy)",
    "shifted_tokens": "share of tokens that changed more than 20-fold",
}


def is_number(value: Any) -> bool:
    """Whether it is a finite number and not a bool."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def number(value: Any) -> str:
    """Format four digits, more of an integer or below a million, with commas; a dash if it is not finite."""
    if not is_number(value):
        return NONE
    if isinstance(value, Integral):
        return f"{value:,}"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value + 0.0:#.4g}"  # -0.0 + 0.0 is 0.0


def percent(value: Any, decimals: int = 1) -> str:
    """Format a share in per cent; a dash if it is not finite."""
    return f"{value:.{decimals}%}" if is_number(value) else NONE


def format_interval(interval: Sequence[float] | None, show: Callable[[Any], str] = number) -> str:
    """Format both ends of an interval; a dash if there is none."""
    return " to ".join(map(show, interval)) if interval else NONE


def flat_numbers(result: Result) -> dict[str, tuple[float, Sequence[float] | None]]:
    """Return every number of an evaluation, those of a section as SECTION.NAME, with its interval if it has one."""
    flat = {name: (value, (result.get("intervals") or {}).get(name)) for name, value in result.items()}
    for section, content in result.items():
        if isinstance(content, Mapping) and section != "intervals":
            flat |= {f"{section}.{name}": (value, content.get(f"{name}_interval")) for name, value in content.items()}
    return {name: each for name, each in flat.items() if is_number(each[0]) or isinstance(each[0], float)}


def as_text(result: Result) -> str:
    """Format the result of `dpo eval`: numbers with 95 % intervals, findings, shifted tokens."""
    lines = _comparison(result) if "differences" in result else _evaluation(result)
    return "\n".join(lines)


def overlap_lines(result: Result) -> Iterator[str]:
    """Yield a warning with the count of the pairs that were trained on, if any; it comes before the numbers."""
    if text := result.get("trained_on", {}).get("text"):
        yield f"warning: {text}"


def verdict_lines(result: Result) -> Iterator[str]:
    """Yield the findings, and which checks passed on how many pairs."""
    for finding in result.get("findings", ()):
        yield f"finding: {finding['title']}"
        numbers = ", ".join(f"{name} {number(value)}" for name, value in finding["numbers"].items())
        for text in (numbers, f"To try: {finding['advice']}"):
            yield textwrap.indent(textwrap.fill(text, WIDTH), "  ")
    if "judged" in result:
        yield textwrap.fill(result["judged"]["text"], WIDTH)


def _evaluation(result: Result) -> Iterator[str]:
    yield from overlap_lines(result)
    refused = "; ".join(f"{count:,} refused: {reason}" for reason, count in result["refused"].items())
    yield f"{'policy':<24}{result['model']}"
    yield f"{'reference':<24}{result['reference']}"
    yield f"{'pairs':<24}{result['pairs']:,} of {result['rows']:,} rows{'; ' + refused if refused else ''}"
    yield f"{'beta':<24}{result['beta']:g}"
    yield from _means(result)
    length = result["length"]
    accuracies = ", ".join(
        f"{percent(length[f'accuracy_chosen_{which}'])} of {count:,} where chosen is {which}"
        for which in ("longer", "shorter")
        if (count := length[f"accuracy_chosen_{which}_pairs"])
    )
    rule = percent(length["accuracy_prefer_longer"])
    yield f"\n{'accuracy by length':<24}{accuracies or NONE}; always the longer: {rule}"
    rho, ends = length["margin_length_correlation"], length["margin_length_correlation_interval"]
    yield f"{'':<24}rank correlation of margin and length gap: {number(rho)} ({format_interval(ends)})"
    if kl := result.get("sequence_kl"):
        yield (
            f"{'KL per response':<24}{number(kl['token_kl'])} ({format_interval(kl['token_kl_interval'])}) nats, from "
            f"{kl['samples']} samples per prompt over {kl['prompts']} prompts, cut at {kl['max_new_tokens']} tokens; "
            f"{percent(kl['ended'], 0)} ended with EOS"
        )
    if won := result.get("win_rate"):
        by_length = ", ".join(
            f"{percent(won[f'policy_{which}'])} of {count:,} where the policy's is {which}"
            for which in ("longer", "shorter")
            if (count := won[f"policy_{which}_contests"])
        )
        yield (
            f"{'win rate':<24}{percent(won['share'])} ({format_interval(won['share_interval'], percent)}) of "
            f"{won['contests']:,} answers to {won['prompts']:,} prompts beat the reference's, ties as half; {by_length}"
        )
    if drift := result.get("drift"):
        yield (
            f"{'shifted tokens':<24}{drift['shifted']:,} of {drift['tokens']:,} ({percent(drift['share'], 2)}) changed "
            f"over {drift['fold']:g}-fold{'; the largest changes:' if drift['top'] else ''}"
        )
        for token in drift["top"]:
            text = f"{token['before']}[{token['token']}]{token['after']}".replace("\n", "\\n")
            yield f"{number(token['fold']):>20}  {text[:WIDTH]}  {token['row']} {token['response']}"
    yield ""
    yield from verdict_lines(result)
    for gate in result.get("gates", ()):
        yield f"gate {'passed' if gate['passed'] else 'FAILED'}: {gate['gate']} ({gate['text']})"


def _means(result: Result) -> Iterator[str]:
    intervals = result["intervals"]
    yield f"\n{'mean over pairs':<24}{'':>10}  95 % interval"
    for name in PER_PAIR:
        ties = f"   {percent(result['rewards/ties'])} ties" if name == "rewards/accuracies" else ""
        yield f"{name:<24}{number(result[name]):>10}  {format_interval(intervals[name])}{ties}"
    quantiles = result["rewards/margins_quantiles"].items()
    yield f"{'margin quantiles':<24}" + "   ".join(f"{percent(float(q), 0)}: {number(at)}" for q, at in quantiles)
    policy, reference = (percent(result[f"logp_accuracy/{name}"]) for name in ("policy", "reference"))
    yield f"{'logp accuracy':<24}chosen has the higher log-prob under the policy in {policy}, reference {reference}"

    yield f"\n{'mean over tokens':<24}" + "".join(f"{side:>10}  {'95 % interval':<20}" for side in SIDES)
    for name, meaning in PER_TOKEN.items():
        if f"{name}/chosen" in result:
            keys = [f"{name}/{side}" for side in SIDES]
            cells = "".join(f"{number(result[key]):>10}  {format_interval(intervals[key]):<20}" for key in keys)
            yield f"{name:<24}{cells}{meaning}"


def _comparison(result: Result) -> Iterator[str]:
    for name in "ab":
        about = result[name]
        yield from overlap_lines(about)
        yield f"{name:<34}{about['model']}, beta {about['beta']:g}, reference {about['reference']}"
    other = "tokenized differently: per-token means not comparable"
    yield f"{'pairs':<34}{result['pairs']:,}, {'the same tokens in both' if result['same_tokens'] else other}"
    better = result["pairs_b_better"]
    share = f"{percent(better['share'])} of the pairs ({format_interval(better['interval'], percent)})"
    yield f"{'larger log-ratio margin':<34}in b for {share}"
    for name, why in result["not_compared"].items():
        yield f"{f'{name} not compared':<34}{why}"
    yield f"\n{'':<34}{'a':>10} {'b':>10} {'b - a':>11}  95 % interval of the paired difference"
    for name, values in result["differences"].items():
        cells = f"{number(values['a']):>10} {number(values['b']):>10} {number(values['difference']):>11}"
        yield f"{name:<34}{cells}  {format_interval(values['interval'])}"
