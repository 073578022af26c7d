"""`dpo check`: read and tokenize only, and say what is wrong with the rows before a GPU is kept waiting."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dpo_cli.config.options import CheckOptions
from dpo_cli.data.records import find_sources
from dpo_cli.models.loading import count_parameters, default_device
from dpo_cli.quality.issue_types import BITS, KINDS, PROBLEMS
from dpo_cli.quality.lengths import biased_pairs, budget, estimated_seconds, length_bias, statistics
from dpo_cli.quality.survey import EVAL, TRAIN, Survey
from dpo_cli.training.memory import MOST_TOKENS
from dpo_cli.training.prepare import choose_model, choose_tokenizer
from dpo_cli.training.setup import reading_as_trained
from dpo_cli.utils.console import Reporter
from dpo_cli.utils.errors import UsageError
from dpo_cli.utils.files import atomic_write


def run_check(options: CheckOptions, reporter: Reporter) -> dict[str, Any]:
    """`dpo check`: every finding with its rows, lengths, and what a training on the pairs takes.

    Raises:
        UsageError: a file cannot be read, or ``--fix`` names one that is there or would write a part of the rows.
    """
    sources = {TRAIN: find_sources(options.data)}
    if options.eval_data:
        sources[EVAL] = find_sources(options.eval_data, "--eval-data")
    if options.fix:
        _check_new(options.fix)
    model = choose_model(options.model, options, reporter, base=options.base_model)
    survey = Survey(sources, reading_as_trained(options, model), reporter, options.examples)
    survey.read(choose_tokenizer(model, options))
    if options.fix and TRAIN in survey.unread:
        raise UsageError(f"{survey.unread[TRAIN]}; mend that first, nothing is written to {options.fix}")
    survey.compare()
    result = _result(survey, options, count_parameters(model))
    if options.fix:
        result["fixed"] = _fix(survey, options.fix)
        reporter.info("fixed", f"{result['fixed']['kept']:,} of {result['rows']:,} rows are clean")
    return result


def _check_new(file: Path) -> None:
    if file.suffix != ".jsonl":
        raise UsageError(f"--fix {file}: what is written is .jsonl; name it so")
    if file.exists() or file.is_symlink():
        raise UsageError(f"--fix {file}: is there already; name a new file")


def _result(survey: Survey, options: CheckOptions, parameters: int | None) -> dict[str, Any]:
    rows = {data: place.stop - place.start for data, place in survey.rows.items()}
    result: dict[str, Any] = {"rows": rows[TRAIN], "pairs": len(survey.usable(TRAIN))}
    if EVAL in rows:
        result |= {"eval_rows": rows[EVAL], "eval_pairs": len(survey.usable(EVAL))}
    lengths, trained = (numbers[survey.usable(TRAIN)] for numbers in (survey.table.lengths, survey.table.trained))
    bias = length_bias(trained) if len(trained) else None
    if bias and (biased := biased_pairs(bias)):
        survey.found.counts[TRAIN, "length_bias", biased[1]] = biased[0]
    findings = survey.found.listed(rows)
    result |= {
        "formats": dict(survey.formats),
        "problems": sum(finding["severity"] == "problem" for finding in findings),
        "problem_rows": int((survey.table.flags & np.uint32(PROBLEMS) != 0).sum()),
        "findings": findings,
    }
    if bias:
        most = options.max_tokens or MOST_TOKENS[default_device().type]
        result |= {"lengths": statistics(trained), "length_bias": bias}
        result["budget"] = way = budget(lengths, options.batch_size, options.epochs, most)
        if parameters:
            way["seconds"] = estimated_seconds(parameters, way["tokens_an_epoch"], options.epochs)
    return result


# ---- --fix ------------------------------------------------------------------------------------------------------


def _fix(survey: Survey, file: Path) -> dict[str, Any]:
    """Write the records of the rows that are clean; say how many were left out for which first reason."""
    flags = survey.table.flags[survey.rows[TRAIN]]
    dropped = {}
    left = flags & np.uint32(PROBLEMS)
    for kind in (name for name, kind in KINDS.items() if kind.problem):
        hit = left & np.uint32(BITS[kind]) != 0
        if count := int(hit.sum()):
            dropped[kind] = count
        left = np.where(hit, 0, left)
    kept = flags & np.uint32(PROBLEMS) == 0
    if kept.any():
        _write(survey, file, kept)
    return {"file": str(file), "kept": int(kept.sum()), "dropped": dropped}


def _write(survey: Survey, file: Path, kept: npt.NDArray[np.bool_]) -> None:
    records = (each for source in survey.sources[TRAIN] for each in source.records())
    count = 0
    with atomic_write(file) as temporary, temporary.open("wb") as stream:
        for count, (where, record) in enumerate(records, 1):
            if count <= len(kept) and kept[count - 1]:
                stream.write(_line(_as_json(record, where)))
        if count != len(kept):
            raise UsageError("--data: the rows changed while they were read; nothing is written")


def _line(record: Any) -> bytes:
    try:
        return (json.dumps(record, ensure_ascii=False, default=str) + "\n").encode()
    except UnicodeEncodeError:  # half of a surrogate pair, in a column that is not read
        return (json.dumps(record, default=str) + "\n").encode()


def _as_json(value: Any, where: str) -> Any:
    """The value with null for what is no number in JSON."""
    if isinstance(value, dict):
        return {key: _as_json(each, where) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(each, where) for each in value]
    if isinstance(value, bytes):
        raise UsageError(f"{where}: has bytes, and JSON has none; write it as JSON lines yourself, nothing is written")
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---- what a person reads ----------------------------------------------------------------------------------------


def as_text(result: dict[str, Any]) -> str:
    """The result in lines: what the rows are, problems, notes, lengths, budget, and a verdict at the end."""
    lines = [f"{count:,} {_s('row', count)}: {name}" for name, count in result["formats"].items()]
    for severity in ("problem", "note"):
        some = [finding for finding in result["findings"] if finding["severity"] == severity]
        if some:
            lines.append(f"{severity}s")
        for finding in some:
            lines += _finding(finding)
    if "lengths" in result:
        lines += [*_lengths(result), *_budget(result["budget"])]
    if fixed := result.get("fixed"):
        kept = f"{fixed['kept']:,} rows written to" if fixed["kept"] else "no row is clean, so there is no"
        lines.append(f"fixed: {kept} {fixed['file']}")
        lines += [f"  {count:>9,}  left out: {KINDS[kind].title}" for kind, count in fixed["dropped"].items()]
        lines.append("")
    rows = result["rows"] + result.get("eval_rows", 0)
    if problems := result["problems"]:
        lines.append(f"{problems} {_s('problem', problems)} in {result['problem_rows']:,} of {rows:,} rows")
    else:
        lines.append(f"no problems found in {rows:,} rows")
    return "\n".join(lines)


def _s(word: str, count: int) -> str:
    return word if count == 1 else word + "s"


def _finding(finding: dict[str, Any]) -> list[str]:
    where = "" if finding["data"] == TRAIN else " (in --eval-data)"
    lines = [
        f"  {finding['count']:>9,}  {finding['share']:>6.1%}  {finding['title']}{where}",
        f"{'':21}{finding['what']} {finding['todo']}",
    ]
    for example in finding["examples"]:
        other = f" (see {example['other']})" if "other" in example else ""
        why = f" ({example['reason']})" if "reason" in example else ""
        lines.append(f"{'':21}{example['where']}{other}: {example['text']}{why}")
    return [*lines, ""]


def _lengths(result: dict[str, Any]) -> list[str]:
    statistics = result["lengths"]
    lines = [
        "tokens after truncation, of responses those that carry loss",
        " " * 14 + "".join(f"{name:>9}" for name in statistics["prompt"]),
    ]
    for part, values in statistics.items():
        numbers = (f"{v:>9,.1f}" if name == "mean" else f"{v:>9,.0f}" for name, v in values.items())
        lines.append(f"  {part:<12}" + "".join(numbers))
    bias = result["length_bias"]
    low, high = bias["interval"]
    lines += [
        f"  the longer response is chosen in {bias['share']:.1%} of the pairs that differ in length "
        f"(95 % interval {low:.1%} to {high:.1%}; {bias['ties']:,} do not); Cohen's d {bias['cohens_d']:+.2f}",
        f"  accuracy to beat: {bias['accuracy_prefer_longer']:.1%} by preferring the longer response, "
        f"{bias['accuracy_prefer_shorter']:.1%} by preferring the shorter",
        "",
    ]
    return lines


def _time(seconds: float) -> str:
    hours, minutes = divmod(max(round(seconds / 60), 1), 60)
    return f"{hours:,} h {minutes:02d} min" if hours else f"{minutes} min"


def _budget(budget: dict[str, Any]) -> list[str]:
    unshared, padded = budget["tokens_unshared_an_epoch"], budget["tokens_padded_an_epoch"]
    return [
        "budget",
        f"  {budget['pairs']:,} pairs, {budget['steps']:,} steps of {budget['batch_size']} in "
        f"{budget['epochs']} {_s('epoch', budget['epochs'])}",
        f"  an epoch: {budget['tokens_an_epoch']:,} tokens with shared prompts, in {budget['forwards_an_epoch']:,} "
        f"forwards of at most {budget['max_tokens']:,}",
        f"  without sharing {unshared:,}, in padded batches {padded:,} ({budget['padded_over_shared']:.1f} times)",
        *([f"  about {_time(budget['seconds'])} on this machine (estimate)"] if "seconds" in budget else []),
        "",
    ]
