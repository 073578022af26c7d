"""`dpo check`: read and tokenize preference data, and report what is wrong with it before a training starts.

The first pass checks each row and keeps a few numbers of it; the second pass reads the examples to show.
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from dpo_cli.config.options import CheckOptions
from dpo_cli.data.chat import CONTROL_KEPT, CONTROL_SANITIZED
from dpo_cli.data.readers import shortened
from dpo_cli.data.rows import BadRow, Reading, Row, read_rows
from dpo_cli.data.sources import Source, find_sources
from dpo_cli.data.tokenize import PROMPT_CUT, RESPONSE_CUT, Encoder
from dpo_cli.models.loading import default_device
from dpo_cli.quality.checks import FLAGS, ISSUE_TYPES, PROBLEMS, RowChecks, Texts, normalize, texts_of
from dpo_cli.quality.duplicates import Places, RowTable, find_copies, find_matches
from dpo_cli.quality.lengths import biased_pairs, budget, length_bias, statistics
from dpo_cli.training.memory import MOST_TOKENS
from dpo_cli.training.prepare import choose_model, choose_tokenizer
from dpo_cli.training.run_dir import reading_as_trained
from dpo_cli.utils.console import Reporter
from dpo_cli.utils.errors import RowError, UsageError, printable
from dpo_cli.utils.files import atomic_write

NOTES = {
    PROMPT_CUT: "prompt_cut",
    RESPONSE_CUT: "response_cut",
    CONTROL_KEPT: "control_tokens",
    CONTROL_SANITIZED: "control_tokens",
}
EVAL, TRAIN = "eval_data", "data"
MAX_REASONS = 50  # counted separately
PROGRESS_SECONDS = 10.0
T = TypeVar("T")


def run_check(options: CheckOptions, reporter: Reporter) -> dict[str, Any]:
    """Run `dpo check`: report all issues with example rows, lengths, and the cost of training on the pairs.

    Raises:
        UsageError: a file cannot be read, or ``--fix`` names an existing file.
    """
    sources = {TRAIN: find_sources(options.data)}
    if options.eval_data:
        sources = {EVAL: find_sources(options.eval_data, "--eval-data")} | sources
    if options.fix:
        _check_new(options.fix)
    model = choose_model(options.model, options, reporter, base=options.base_model)
    check = DataCheck(sources, reading_as_trained(options, model), reporter, options.examples)
    check.read(choose_tokenizer(model, options))
    check.compare()
    result = _result(check, options)
    if options.fix:
        result["fixed"] = _fix(check, options.fix)
        reporter.info("fixed", f"{result['fixed']['kept']:,} of {result['rows']:,} rows are clean")
    return result


def _result(check: DataCheck, options: CheckOptions) -> dict[str, Any]:
    rows = {data: span.stop - span.start for data, span in check.spans.items()}
    pairs = {data: check.usable(data) for data in rows}
    result: dict[str, Any] = {"rows": rows[TRAIN], "pairs": len(pairs[TRAIN])}
    if EVAL in rows:
        result |= {"eval_rows": rows[EVAL], "eval_pairs": len(pairs[EVAL])}
    tokens = check.table.tokens[pairs[TRAIN]]
    loss_lengths = tokens[:, [0, 3, 4]]
    bias = length_bias(loss_lengths) if len(tokens) else None
    if bias and (biased := biased_pairs(bias)):
        check.findings.counts[Key(TRAIN, "length_bias", biased[1])] = biased[0]
    findings = check.findings.as_list(rows)
    result |= {
        "formats": dict(check.formats),
        "problems": sum(finding["severity"] == "problem" for finding in findings),
        "problem_rows": int((check.table.flags & np.uint32(PROBLEMS) != 0).sum()),
        "findings": findings,
    }
    if bias:
        max_tokens = options.max_tokens or MOST_TOKENS[default_device().type]
        result |= {"lengths": statistics(loss_lengths), "length_bias": bias}
        result["budget"] = budget(tokens[:, :3], options.batch_size, options.epochs, max_tokens)
    return result


# ---- findings ---------------------------------------------------------------------------------------------------


class Key(NamedTuple):
    """What findings are grouped by: the data, the issue type, and the reason where a type has several."""

    data: str
    kind: str
    reason: str = ""


class Findings:
    """The number of rows with each issue, and the first of them as examples."""

    def __init__(self, max_examples: int) -> None:
        self.max_examples = max_examples
        self.counts: Counter[Key] = Counter()
        self.examples: defaultdict[Key, list[dict[str, str]]] = defaultdict(list)

    def add(self, key: Key, where: str, text: str, **more: str) -> None:
        """Count a row, and keep it as an example."""
        if key.reason and key not in self.counts and len(self.counts) > MAX_REASONS:
            key = key._replace(reason="other reasons")
        self.counts[key] += 1
        self.show(key, where, text, **more)

    def show(self, key: Key, where: str, text: str, **more: str) -> None:
        """Keep an example, unless there are enough already."""
        if len(self.examples[key]) < self.max_examples:
            self.examples[key].append({"where": where, "text": text} | more)

    def as_list(self, rows: dict[str, int]) -> list[dict[str, Any]]:
        """Return all findings, problems first, then in the order of ``ISSUE_TYPES``; ``rows`` per data."""
        order = list(ISSUE_TYPES)
        keys = sorted(self.counts, key=lambda key: (order.index(key.kind), key.data, -self.counts[key]))
        return [
            {
                "kind": key.kind,
                "severity": "problem" if (issue := ISSUE_TYPES[key.kind]).problem else "note",
                "data": key.data,
                "title": f"{issue.title}: {key.reason}" if key.reason else issue.title,
                "count": self.counts[key],
                "share": self.counts[key] / rows[key.data],
                "what": issue.what,
                "todo": issue.todo,
                "examples": self.examples[key],
            }
            for key in keys
        ]


# ---- the two passes ---------------------------------------------------------------------------------------------


class DataCheck:
    """The rows of ``--eval-data`` and ``--data``, whose ``spans`` say where they are in the table; and the findings."""

    def __init__(self, sources: dict[str, list[Source]], reading: Reading, reporter: Reporter, examples: int) -> None:
        self.sources, self.reading, self.reporter = sources, reading, reporter
        self.findings, self.table = Findings(examples), RowTable()
        self.formats: Counter[str] = Counter()
        self.spans: dict[str, slice] = {}

    def usable(self, data: str) -> Places:
        """Return the places of the rows that were not refused, ascending."""
        flags = self.table.flags[self.spans[data]]
        usable: Places = np.flatnonzero(flags & np.uint32(FLAGS["refused"]) == 0) + self.spans[data].start
        return usable

    def read(self, tokenizer: Any) -> None:
        """Check each row: the first pass."""
        checks, encoder = RowChecks(tokenizer), Encoder(tokenizer, self.reading)
        for data in self.sources:
            start = len(self.table)
            rows = self._with_progress(self._rows(data), f"--{data.replace('_', '-')}: read")
            for row, result in encoder.pairs(rows):
                if isinstance(row, BadRow) or isinstance(result, RowError):
                    self._refuse(data, row, printable(str(result)))
                    continue
                pair, notes = result
                self.formats[row.format] += 1
                texts = texts_of(row)
                normalized = normalize(row, texts)
                issues = {Key(data, kind): text for kind, text in checks.issues(row, texts, normalized).items()}
                excerpt = shortened(texts.prompt, 70)
                issues |= {Key(data, NOTES.get(n, "other"), "" if n in NOTES else n): excerpt for n in notes}
                for key, text in issues.items():
                    self.findings.add(key, row.where, text)
                self.table.add(normalized, pair, sum({FLAGS[key.kind] for key in issues}))
            self.spans[data] = slice(start, len(self.table))

    def _rows(self, data: str) -> Iterator[Row | BadRow]:
        return read_rows(self.sources[data], self.reading.columns, self.reading.format)

    def _refuse(self, data: str, row: Row | BadRow, reason: str) -> None:
        record = row.record if isinstance(row, BadRow) else {"prompt": texts_of(row).prompt}
        text = " ".join(map(str, record.values())) if isinstance(record, dict) else str(record or "")
        group = re.sub(r"'.*'|\b\d+\b", "…", reason)  # without what differs between rows
        more = {} if group == reason else {"reason": reason}
        self.findings.add(Key(data, "refused", group), row.where, shortened(text, 70), **more)
        self.table.add(Texts("", "", ""), None, FLAGS["refused"])

    def compare(self) -> None:
        """Compare the rows with each other, and read the examples of what is found: the second pass."""
        prompts, rows, swapped = self.table.hashes
        issues: list[tuple[Key, Places, Places]] = []
        for data in self.sources:
            places = self.usable(data)
            bad = self.table.flags & np.uint32(PROBLEMS) != 0
            distinct = places[rows[places] != swapped[places]]
            issues.append((Key(data, "duplicate"), *find_copies(rows, places, bad)))
            issues.append((Key(data, "contradiction"), *find_matches(swapped, distinct, rows, distinct)))
            if data == TRAIN and EVAL in self.sources:
                held_out = self.usable(EVAL)
                leaked = find_matches(rows, places, rows, held_out)
                rest = np.setdiff1d(places, leaked[0])
                issues.append((Key(data, "leak_row"), *leaked))
                issues.append((Key(data, "leak_prompt"), *find_matches(prompts, rest, prompts, held_out)))
        for key, places, _ in issues:
            if len(places):
                self.table.flags[places] |= np.uint32(FLAGS[key.kind])
                self.findings.counts[key] = len(places)
        self._show_examples(issues)

    def _show_examples(self, issues: list[tuple[Key, Places, Places]]) -> None:
        count = self.findings.max_examples
        shown = [
            (key, place, other)
            for key, places, others in issues
            for place, other in zip(places[:count].tolist(), others[:count].tolist(), strict=True)
        ]
        missing = {place for _, *both in shown for place in both}
        examples: dict[int, tuple[str, str]] = {}
        rows = (row for data in self.sources for row in self._rows(data)) if missing else iter(())
        for place, row in enumerate(self._with_progress(rows, "read again:")):
            if place in missing and isinstance(row, Row):
                examples[place] = row.where, shortened(texts_of(row).prompt, 70)
        if missing - examples.keys():
            raise UsageError("--data: the rows changed while they were read; run the check again")
        for key, place, other in shown:
            self.findings.show(key, *examples[place], other=examples[other][0])

    def _with_progress(self, rows: Iterable[T], what: str) -> Iterator[T]:
        last = time.monotonic()
        for count, row in enumerate(rows):
            if count % 1000 == 0 and time.monotonic() - last > PROGRESS_SECONDS:
                self.reporter.info("", f"{what} {count:,} rows")
                last = time.monotonic()
            yield row


# ---- --fix ------------------------------------------------------------------------------------------------------


def _check_new(file: Path) -> None:
    if file.suffix != ".jsonl":
        raise UsageError(f"--fix {file}: the output is JSON lines; give it a name that ends with .jsonl")
    if file.exists() or file.is_symlink():
        raise UsageError(f"--fix {file}: already exists; name a new file")


def _fix(check: DataCheck, file: Path) -> dict[str, Any]:
    """Write the records of the clean rows; count the dropped rows by their first problem."""
    problems = check.table.flags[check.spans[TRAIN]] & np.uint32(PROBLEMS)
    first = problems & -problems.astype(np.int64)  # the lowest bit: FLAGS has the order of ISSUE_TYPES
    dropped = {kind: int((first == flag).sum()) for kind, flag in FLAGS.items()}
    clean = problems == 0
    if clean.any():
        _write_clean(check, file, clean)
    return {"file": str(file), "kept": int(clean.sum()), "dropped": {k: count for k, count in dropped.items() if count}}


def _write_clean(check: DataCheck, file: Path, clean: npt.NDArray[np.bool_]) -> None:
    records = (each for source in check.sources[TRAIN] for each in source.records())
    count = 0
    with atomic_write(file) as temporary, temporary.open("wb") as stream:
        for count, (where, record) in enumerate(records, 1):
            if count <= len(clean) and clean[count - 1]:
                stream.write(_json_line(record, where))
        if count != len(clean):
            raise UsageError("--data: the rows changed while they were read; nothing is written")


def _json_line(record: Any, where: str) -> bytes:
    """Encode a record, with null for numbers that JSON does not have."""

    def convert(value: Any) -> str:
        if isinstance(value, bytes):
            raise UsageError(f"{where}: has bytes, which JSON cannot hold; nothing is written")
        return str(value)

    value = json.loads(json.dumps(record, default=convert), parse_constant=lambda name: None)
    # A lone surrogate cannot be encoded; its escape is the same in JSON.
    return (json.dumps(value, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


# ---- text -------------------------------------------------------------------------------------------------------


def as_text(result: dict[str, Any]) -> str:
    """Format the result: formats, problems, notes, lengths, budget, and a verdict at the end."""
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
        kept = f"{fixed['kept']:,} rows written to" if fixed["kept"] else "no row is clean; not written:"
        lines.append(f"fixed: {kept} {fixed['file']}")
        lines += [f"  {count:>9,}  dropped: {ISSUE_TYPES[kind].title}" for kind, count in fixed["dropped"].items()]
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
        "tokens after truncation (responses: loss-bearing tokens)",
        " " * 14 + "".join(f"{name:>9}" for name in statistics["prompt"]),
    ]
    for part, values in statistics.items():
        numbers = (f"{v:>9,.1f}" if name == "mean" else f"{v:>9,.0f}" for name, v in values.items())
        lines.append(f"  {part:<12}" + "".join(numbers))
    bias = result["length_bias"]
    low, high = bias["interval"]
    lines += [
        f"  the longer response is chosen in {bias['share']:.1%} of the pairs that differ in length "
        f"(95 % interval {low:.1%} to {high:.1%}; {bias['ties']:,} ties); Cohen's d {bias['cohens_d']:+.2f}",
        f"  accuracy to beat: {bias['accuracy_prefer_longer']:.1%} by preferring the longer response, "
        f"{bias['accuracy_prefer_shorter']:.1%} by preferring the shorter",
        "",
    ]
    return lines


def _budget(budget: dict[str, Any]) -> list[str]:
    unshared, padded = budget["tokens_unshared_an_epoch"], budget["tokens_padded_an_epoch"]
    return [
        "budget",
        f"  {budget['pairs']:,} pairs, {budget['steps']:,} steps of {budget['batch_size']} in "
        f"{budget['epochs']} {_s('epoch', budget['epochs'])}",
        f"  an epoch: {budget['tokens_an_epoch']:,} tokens with shared prompts, in {budget['forwards_an_epoch']:,} "
        f"forwards of at most {budget['max_tokens']:,}",
        f"  without sharing {unshared:,}, in padded batches {padded:,} ({budget['padded_over_shared']:.1f} times)",
        "",
    ]
