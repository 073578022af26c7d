"""Formatted numbers; an evaluation, and a comparison of two, as text for a terminal."""

from __future__ import annotations

import math
import shlex
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

from dpo_cli.evaluation.metrics import SIDES
from dpo_cli.utils.errors import plural

Result = Mapping[str, Any]
NONE, EMPTY = "–", "(empty answer)"
WIDTH = 110
PER_PAIR = ("loss", "rewards/margins", "rewards/accuracies", *(f"rewards/{side}" for side in SIDES))
COMPARED = ("loss", "rewards/margins", "rewards/accuracies", "logratios/margins", *(f"kl/{side}" for side in SIDES))
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


def as_text(result: Result, full: bool = False) -> str:
    """Format the result of `dpo eval`: the answers and the verdict, before them all numbers if they are asked for."""
    if "differences" in result:
        return "\n".join(_comparison(result, full))
    lines = [*overlap_lines(result), *(_evaluation(result) if full else ()), *answer_lines(result.get("samples", ()))]
    lines += [*_win_rate(result), *verdict_lines(result, full)]
    for gate in result.get("gates", ()):
        lines.append(f"gate {'passed' if gate['passed'] else 'FAILED'}: {gate['gate']} ({gate['text']})")
    if "run" in result:
        lines.append(f"Next: dpo chat {shlex.quote(result['run'])}")
    return "\n".join(lines if full else [*lines, "All numbers: --full"])


def answer_lines(samples: Sequence[Result]) -> Iterator[str]:
    """Yield each prompt with the answers before and after the training."""
    for sample in samples:
        for name, key in (("prompt", "prompt"), ("  before", "reference"), ("  after", "policy")):
            text = sample[key] or EMPTY * (key != "prompt")
            lines = [line for each in text.splitlines() for line in textwrap.wrap(each, WIDTH - 10) or [""]]
            yield f"{name:<10}{(chr(10) + 10 * ' ').join(lines)}"
        yield ""


def overlap_lines(result: Result) -> Iterator[str]:
    """Yield a warning with the count of the pairs that were trained on, if any; it comes before the numbers."""
    if text := result.get("trained_on", {}).get("text"):
        yield f"warning: {text}"


def verdict_lines(result: Result, full: bool = False) -> Iterator[str]:
    """Yield the verdict in words, findings with what to try, and how many checks passed; their names if ``full``."""
    yield from (textwrap.fill(line, WIDTH) for line in result.get("verdict", ()))
    for finding in result.get("findings", ()):
        yield f"finding: {finding['title']}"
        numbers = ", ".join(f"{name} {number(value)}" for name, value in finding["numbers"].items())
        for text in (*[numbers] * full, f"To try: {finding['advice']}"):
            yield textwrap.indent(textwrap.fill(text, WIDTH), "  ")
    if "judged" in result:
        yield textwrap.fill(result["judged"]["text"], WIDTH)
        if full and (names := passed_names(result["judged"])):
            yield textwrap.fill(f"Not found: {names}", WIDTH)


def passed_names(judged: Result) -> str:
    """Name the problems that were looked for and not found."""
    return ", ".join(kind.replace("_", " ") for kind in judged["passed"])


def _evaluation(result: Result) -> Iterator[str]:
    refused = "; ".join(f"{count:,} refused: {reason}" for reason, count in result["refused"].items())
    yield f"{'policy':<24}{result['model']}"
    yield f"{'reference':<24}{result['reference']}"
    yield f"{'pairs':<24}{result['pairs']:,} of {plural(result['rows'], 'row')}{'; ' + refused if refused else ''}"
    yield f"{'beta':<24}{result['beta']:g}"
    yield from _means(result)
    length = result["length"]
    accuracies = _by_length(length, "accuracy_chosen", "pairs", "chosen")
    rule = percent(length["accuracy_prefer_longer"])
    yield f"\n{'accuracy by length':<24}{accuracies or NONE}; always the longer: {rule}"
    rho, ends = length["margin_length_correlation"], length["margin_length_correlation_interval"]
    yield f"{'':<24}rank correlation of margin and length gap: {number(rho)} ({format_interval(ends)})"
    if kl := result.get("sequence_kl"):
        yield (
            f"{'KL per response':<24}{number(kl['token_kl'])} ({format_interval(kl['token_kl_interval'])}) nats, from "
            f"{plural(kl['samples'], 'sample')} per prompt over {plural(kl['prompts'], 'prompt')}, cut at "
            f"{kl['max_new_tokens']} tokens; {percent(kl['ended'], 0)} ended with EOS"
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


def _win_rate(result: Result) -> Iterator[str]:
    if won := result.get("win_rate"):
        by_length = _by_length(won, "policy", "contests", "the policy's")
        yield (
            f"{'win rate':<24}{percent(won['share'])} ({format_interval(won['share_interval'], percent)}) of "
            f"{plural(won['contests'], 'answer')} to {plural(won['prompts'], 'prompt')} beat the reference's, "
            f"ties as half; {by_length}"
        )


def _by_length(numbers: Result, share: str, count: str, what: str) -> str:
    """Format the shares where one answer is the longer or the shorter one, and of how many they are."""
    return ", ".join(
        f"{percent(numbers[f'{share}_{side}'])} of {of:,} where {what} is {side}"
        for side in ("longer", "shorter")
        if (of := numbers[f"{share}_{side}_{count}"])
    )


def _means(result: Result) -> Iterator[str]:
    intervals = result["intervals"]
    yield f"\n{'mean over pairs':<24}{'':>10}  95% interval"
    for name in PER_PAIR:
        ties = f"   {percent(result['rewards/ties'])} ties" if name == "rewards/accuracies" else ""
        yield f"{name:<24}{number(result[name]):>10}  {format_interval(intervals[name])}{ties}"
    quantiles = result["rewards/margins_quantiles"].items()
    yield f"{'margin quantiles':<24}" + "   ".join(f"{percent(float(q), 0)}: {number(at)}" for q, at in quantiles)
    policy, reference = (percent(result[f"logp_accuracy/{name}"]) for name in ("policy", "reference"))
    yield f"{'logp accuracy':<24}chosen has the higher log-prob under the policy in {policy}, reference {reference}"

    yield f"\n{'mean over tokens':<24}" + "".join(f"{side:>10}  {'95% interval':<20}" for side in SIDES)
    for name, meaning in PER_TOKEN.items():
        if f"{name}/chosen" in result:
            keys = [f"{name}/{side}" for side in SIDES]
            cells = "".join(f"{number(result[key]):>10}  {format_interval(intervals[key]):<20}" for key in keys)
            yield f"{name:<24}{cells}{meaning}"


def _comparison(result: Result, full: bool) -> Iterator[str]:
    """Yield what differs between two models; ``full``: all that was measured, but for what is 0 or equal in both."""
    for name in "ab":
        about = result[name]
        yield from overlap_lines(about)
        yield f"{name:<24}{about.get('run', about['model'])}, beta {about['beta']:g}"
    references = [result[name]["reference"] for name in "ab"]
    yield f"{'reference':<24}{' and '.join(dict.fromkeys(references))}"
    other = "tokenized differently: per-token means not comparable"
    yield f"{'pairs':<24}{result['pairs']:,}, {'the same tokens in both' if result['same_tokens'] else other}"
    for name, why in result["not_compared"].items():
        yield f"{f'{name} not compared':<24}{why}"
    rows = [("", "a", "b", "b - a", "95% interval of the paired difference")]
    for name, values in result["differences"].items():
        if (full or name in COMPARED) and not (values["a"] == values["b"] and values["interval"] in (None, [0, 0])):
            numbers = (number(values[key]) for key in ("a", "b", "difference"))
            rows.append((name, *numbers, format_interval(values["interval"])))
    yield ""
    yield from table(rows)
    share, ends = result["pairs_b_better"]["share"], result["pairs_b_better"]["interval"]
    winner = "b"
    if share < 0.5:
        winner, share, ends = "a", 1 - share, ends and [1 - end for end in reversed(ends)]
    often = f"{percent(share)} of the pairs ({format_interval(ends, percent)})"
    yield f"\n{winner} has the larger log-ratio margin in {often}."
    accuracy = result["differences"].get("rewards/accuracies")
    if not result["judged"]["enough"]:
        yield result["judged"]["text"]
    elif accuracy and accuracy["interval"]:
        low, high = accuracy["interval"]
        winner = "b" if low > 0 else "a" if high < 0 else ""
        sure = f"{winner} prefers the better answer more often" if winner else "No difference in accuracy is certain"
        gap, *ends = (f"{100 * value:.1f}" for value in (accuracy["difference"], low, high))
        yield f"{sure}: b - a is {gap} percentage points ({' to '.join(ends)})."
    if not full:
        yield "All numbers: --full"


def table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield lines of columns as wide as their widest cell; all but the first and the last are set flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *cells, last in rows:
        inner = "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths[1:-1], strict=True))
        yield f"{first:<{widths[0]}}{inner}  {last}".rstrip()
