"""An evaluation, and a comparison of two, as a person reads them on a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from dpo_cli.evaluation.scores import SIDES
from dpo_cli.utils import formatting as numerals
from dpo_cli.utils.formatting import NONE, between, number

Result = Mapping[str, Any]
WIDTH = 110
A_PAIR = (*("loss", "rewards/margins", "rewards/accuracies"), *(f"rewards/{side}" for side in SIDES))
A_TOKEN = {
    "cross_entropy": "H(data, policy), nats",
    "ref_cross_entropy": "H(data, reference)",
    "data_kl_change": "their difference: the change of KL(data || model)",
    "perplexity": "exp H(data, policy)",
    "ref_perplexity": "exp H(data, reference)",
    "entropy": "H(policy)",
    "ref_entropy": "H(reference)",
    "kl": "KL(policy || reference) = H(policy, reference) - H(policy)",
    "reverse_kl": "KL(reference || policy)",
    "moved_tokens": "share of tokens whose probability changed 20-fold",
    "logratio": "mean log-ratio on the data, which is no KL",
}


def as_text(result: Result) -> str:
    """The result of `dpo eval` in full: numbers with their 95 % intervals, findings, tokens that moved."""
    if "differences" in result:
        return "\n".join(_comparison(result))
    lines = [*known(result), *_about(result), "", *_a_pair(result), "", *_a_token(result), "", *_sections(result)]
    for part in (_sequence_kl(result), _moved(result), [""], verdict(result)):
        lines += part
    return "\n".join(lines)


def known(result: Result) -> Iterator[str]:
    """What of the pairs was trained on, if any: it comes before every number."""
    if told := result.get("trained_on", {}).get("text"):
        yield f"warning: {told}"


def verdict(result: Result) -> Iterator[str]:
    """The findings, and on how many pairs was looked for which."""
    for finding in result.get("findings", ()):
        yield f"finding: {finding['title']}"
        for text in (finding["text"], f"To try: {finding['advice']}"):
            yield textwrap.indent(textwrap.fill(text, WIDTH), "  ")
        if finding["rows"]:
            yield textwrap.indent(textwrap.fill(f"Rows: {', '.join(finding['rows'])}", WIDTH), "  ")
    if "judged" in result:
        yield textwrap.fill(result["judged"]["text"], WIDTH)


def _about(result: Result) -> Iterator[str]:
    refused = "; ".join(f"{count:,} refused: {reason}" for reason, count in result["refused"].items())
    yield f"{'policy':<24}{result['model']}"
    yield f"{'reference':<24}{result['reference']}"
    yield f"{'pairs':<24}{result['pairs']:,} of {result['rows']:,} rows{'; ' + refused if refused else ''}"
    yield f"{'beta':<24}{result['beta']:g}"


def _a_pair(result: Result) -> Iterator[str]:
    yield f"{'mean over pairs':<24}{'':>10}  95 % interval"
    for name in A_PAIR:
        ties = f"   {percent(result['rewards/ties'])} ties" if name == "rewards/accuracies" else ""
        yield f"{name:<24}{number(result[name]):>10}  {between(result['intervals'][name])}{ties}"
    quantiles = result["rewards/margins_quantiles"].items()
    yield f"{'margin quantiles':<24}" + "   ".join(f"{percent(float(q), 0)}: {number(at)}" for q, at in quantiles)


def _a_token(result: Result) -> Iterator[str]:
    yield f"{'a response token':<24}" + "".join(f"{side:>10}  {'95 % interval':<20}" for side in SIDES)
    for name, meaning in A_TOKEN.items():
        if f"{name}/chosen" not in result:
            continue
        cells = ""
        for side in SIDES:
            ends = between(result["intervals"][f"{name}/{side}"])
            cells += f"{number(result[f'{name}/{side}']):>10}  {ends:<20}"
        yield f"{name:<24}{cells}{meaning}"


def _sections(result: Result) -> Iterator[str]:
    effect, calibration, length = (result[name] for name in ("effect", "calibration", "length"))
    d, ends = number(effect["margin_d"]), between(effect["margin_d_interval"])
    yield f"{'effect':<24}the margin lies {d} of its standard deviations above 0 ({ends})"
    ranked = f"policy {percent(effect['rank/policy'])}, reference {percent(effect['rank/reference'])}"
    change = f"{number(effect['rank/change'], signed=True)} ({between(effect['rank/change_interval'])})"
    yield f"{'':<24}chosen has the higher log-prob: {ranked}; change {change}"
    for name, what in (("margin", "|margin|"), ("length", "length gap")):
        buckets = "   ".join(
            f"{b['from']:.3g} to {b['to']:.3g}: {percent(b['accuracy'], 0)} of {b['pairs']:,}"
            for b in result["buckets"][name]
        )
        yield f"{'accuracy by ' + what:<24}{buckets}"
    perfect = f" ({number(calibration['ece_expected'])} if perfect)" if "ece_expected" in calibration else ""
    brier = f"Brier {number(calibration['brier'])} ({between(calibration['brier_interval'])})"
    yield f"{'calibration':<24}{brier}, expected calibration error {number(calibration['ece'])}{perfect}"
    counts = {which: length.get(f"accuracy_chosen_{which}_pairs") for which in ("longer", "shorter")}
    shares = {which: percent(length[f"accuracy_chosen_{which}"]) for which, count in counts.items() if count}
    sides = ", ".join(f"{share} of {counts[which]:,} where it is {which}" for which, share in shares.items())
    rule = f"the rule 'the longer one' is right in {percent(length['accuracy_prefer_longer'])}"
    yield f"{'length':<24}chosen preferred in {sides or NONE}; {rule}"
    ends = between(length["margin_length_correlation_interval"])
    yield f"{'':<24}margin and length gap correlate by {number(length['margin_length_correlation'])} ({ends})"


def _sequence_kl(result: Result) -> Iterator[str]:
    if (found := result.get("sequence_kl")) is None:
        return
    told = "   ".join(
        f"{what} {number(found[name])} ({between(found[f'{name}_interval'])})"
        for name, what in (("token_kl", "exact by token"), ("logratio", "log-ratio"), ("k3", "k3"))
    )
    yield f"{'KL of responses':<24}{told}"
    yield (
        f"{'':<24}nats a response, from {found['samples']} samples to each of {found['prompts']} prompts, their first "
        f"{found['max_new_tokens']} tokens; {percent(found['ended'], 0)} ended before"
    )


def _moved(result: Result) -> Iterator[str]:
    if (drift := result.get("drift")) is None:
        return
    yield (
        f"{'tokens that moved':<24}{drift['moved']:,} of {drift['tokens']:,} ({percent(drift['share'], 2)}) became "
        f"{drift['fold']:g} times likelier or rarer{'; the farthest:' if drift['top'] else ''}"
    )
    for token in drift["top"]:
        text = f"{token['before']}[{token['token']}]{token['after']}".replace("\n", "\\n")
        yield f"{number(round(token['fold'])):>20}  {text[:WIDTH]}  {token['row']} {token['response']}"


def _comparison(result: Result) -> Iterator[str]:
    for name in "ab":
        about = result[name]
        yield from known(about)
        yield f"{name:<34}{about['model']}, beta {about['beta']:g}, reference {about['reference']}"
    tokens = (
        "the same for both" if result["same_tokens"] else "read as other tokens: what is told a token is not comparable"
    )
    yield f"{'pairs':<34}{result['pairs']:,}, {tokens}"
    better = result["pairs_b_better"]
    share = f"{percent(better['share'])} of the pairs ({between(better['interval'], percent)})"
    yield f"{'larger log-ratio margin':<34}in b in {share}"
    for name, why in result["not_compared"].items():
        yield f"{f'{name} not compared':<34}{why}"
    yield ""
    yield f"{'':<34}{'a':>10}{'b':>10}{'b - a':>10}  95 % interval of the paired difference"
    for name, found in result["differences"].items():
        cells = f"{number(found['a']):>10}{number(found['b']):>10}{number(found['difference'], signed=True):>10}"
        yield f"{name:<34}{cells}  {between(found['interval'])}"


def percent(value: Any, decimals: int = 1) -> str:
    """A share in per cent, without the hard space that a terminal need not know."""
    return numerals.percent(value, decimals).replace("\N{NO-BREAK SPACE}", "")
