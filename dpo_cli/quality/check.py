"""`dpo check`: read and tokenize preference data, and report what is wrong with it before a training starts."""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dpo_cli.config.options import CheckOptions
from dpo_cli.data.pairs import count_loss_tokens
from dpo_cli.data.readers import shortened
from dpo_cli.data.rows import BadRow, Row, read_rows
from dpo_cli.data.sources import Source, find_sources
from dpo_cli.data.tokenize import Encoder
from dpo_cli.quality.checks import ISSUE_TYPES, NOTES, Texts, normalize, row_issues, texts_of
from dpo_cli.quality.lengths import biased_pairs, length_bias, statistics
from dpo_cli.training.prepare import choose_model, choose_tokenizer
from dpo_cli.training.run_dir import reading_as_trained
from dpo_cli.utils.console import Reporter
from dpo_cli.utils.errors import RowError, UsageError, printable
from dpo_cli.utils.files import atomic_write, finite

EVAL, TRAIN = "eval_data", "data"
MAX_REASONS = 50  # counted separately


def run_check(options: CheckOptions, reporter: Reporter) -> dict[str, Any]:
    """Run `dpo check`: report all issues with example rows, and the lengths of the pairs.

    Raises:
        UsageError: a file cannot be read, or ``--fix`` names an existing file.
    """
    sources = {TRAIN: find_sources(options.data)}
    if options.eval_data:  # read first, so that rows of the other are searched for in it
        sources = {EVAL: find_sources(options.eval_data, "--eval-data")} | sources
    if options.fix:
        _check_new(options.fix)
    model = choose_model(options.model, options, reporter, base=options.base_model)
    reading = reading_as_trained(options, model)
    check = DataCheck(Encoder(choose_tokenizer(model, options), reading), options.examples)
    for data, some in sources.items():
        check.read(data, read_rows(some, reading.columns, reading.format))
    result = check.result()
    if options.fix:
        result["fixed"] = _write_clean(options.fix, sources[TRAIN], check.problems[TRAIN])
        reporter.info("fixed", f"{result['fixed']['kept']:,} of {result['rows']:,} rows are clean")
    return result


class Key(NamedTuple):
    """What findings are grouped by: the data, the issue type, and the reason where a type has several."""

    data: str
    kind: str
    reason: str = ""


@dataclass
class Finding:
    """The number of rows with an issue, and the first of them as examples."""

    count: int = 0
    examples: list[dict[str, str]] = field(default_factory=list)


class DataCheck:
    """Checks rows in order. Of a row its location, its first problem, a hash and its lengths are kept.

    Rows are compared by their normalized texts; one that has another problem is not compared with later ones.
    """

    def __init__(self, encoder: Encoder, max_examples: int) -> None:
        self.encoder, self.max_examples = encoder, max_examples
        self.findings: dict[Key, Finding] = {}
        self.formats: Counter[str] = Counter()
        self.problems: dict[str, list[str]] = {}  # the first problem of each row, or an empty string
        self.where: list[str] = []  # the locations of the rows being read
        self.first: dict[bytes, int] = {}  # their places, by the hash of the row
        self.lengths = array("i")  # of --data: prompt, and loss-bearing tokens of chosen and rejected, row by row
        self.held_out: dict[bytes, str] = {}  # the location of each row of --eval-data, by its hash and its prompt's

    def read(self, data: str, rows: Iterable[Row | BadRow]) -> None:
        """Check the rows of one option."""
        self.problems[data], self.where, self.first = [], [], {}
        for place, (row, result) in enumerate(self.encoder.pairs(rows)):
            self.problems[data].append("")
            self.where.append(row.where)
            if isinstance(row, BadRow) or isinstance(result, RowError):
                self._refuse(data, row, printable(str(result)))
                continue
            pair, notes = result
            self.formats[row.format] += 1
            if data == TRAIN:
                self.lengths.extend([len(pair.prompt), *map(count_loss_tokens, (pair.chosen, pair.rejected))])
            texts = texts_of(row)
            normalized, excerpt = normalize(row, texts), shortened(texts.prompt, 70)
            for kind, text in row_issues(row, texts, normalized).items():
                self._add(Key(data, kind), place, text)
            for note in notes:
                self._add(Key(data, NOTES[note]) if note in NOTES else Key(data, "other", note), place, excerpt)
            self._compare(data, place, normalized, excerpt)

    def _compare(self, data: str, place: int, normalized: Texts, excerpt: str) -> None:
        """Compare a row with the held-out rows and with earlier ones."""
        prompt, whole, swapped = _hashes(normalized)
        if data == EVAL:
            self.held_out.setdefault(prompt, self.where[place])
            self.held_out.setdefault(whole, self.where[place])
        elif other := self.held_out.get(whole):
            self._add(Key(data, "leak_row"), place, excerpt, other=other)
        elif other := self.held_out.get(prompt):
            self._add(Key(data, "leak_prompt"), place, excerpt, other=other)
        if (earlier := self.first.get(whole)) is not None:
            self._add(Key(data, "duplicate"), place, excerpt, other=self.where[earlier])
        elif whole != swapped and (earlier := self.first.get(swapped)) is not None:
            if not self.problems[data][earlier]:
                self._add(Key(data, "contradiction"), earlier, excerpt, other=self.where[place])
            self._add(Key(data, "contradiction"), place, excerpt, other=self.where[earlier])
        elif not self.problems[data][place]:
            self.first[whole] = place

    def _refuse(self, data: str, row: Row | BadRow, reason: str) -> None:
        record = row.record if isinstance(row, BadRow) else {"prompt": texts_of(row).prompt}
        text = " ".join(map(str, record.values())) if isinstance(record, dict) else str(record or "")
        group = re.sub(r"'.*'|\b\d+\b", "…", reason)  # without what differs between rows
        more = {} if group == reason else {"reason": reason}
        self._add(Key(data, "refused", group), len(self.where) - 1, shortened(text, 70), **more)

    def _add(self, key: Key, place: int, text: str, **more: str) -> None:
        if key not in self.findings and len(self.findings) > MAX_REASONS:
            key = key._replace(reason="other reasons" if key.reason else "")
        finding = self.findings.setdefault(key, Finding())
        finding.count += 1
        if len(finding.examples) < self.max_examples:
            finding.examples.append({"where": self.where[place], "text": text} | more)
        if ISSUE_TYPES[key.kind].problem:
            self.problems[key.data][place] = self.problems[key.data][place] or key.kind

    def result(self) -> dict[str, Any]:
        """Return counts, findings and lengths, as `dpo check --json` prints them."""
        lengths = np.asarray(self.lengths).reshape(-1, 3)
        bias = length_bias(lengths) if len(lengths) else None
        if bias and (biased := biased_pairs(bias)):
            self.findings[Key(TRAIN, "length_bias", biased[1])] = Finding(biased[0])
        result: dict[str, Any] = {}
        for data, problems in self.problems.items():
            prefix = "eval_" * (data == EVAL)
            result |= {f"{prefix}rows": len(problems), f"{prefix}pairs": len(problems) - problems.count("refused")}
        findings = self._sorted_findings()
        result |= {
            "formats": dict(self.formats),
            "problems": sum(finding["severity"] == "problem" for finding in findings),
            "problem_rows": sum(map(bool, (each for problems in self.problems.values() for each in problems))),
            "findings": findings,
        }
        return result | ({"lengths": statistics(lengths), "length_bias": bias} if bias else {})

    def _sorted_findings(self) -> list[dict[str, Any]]:
        order = list(ISSUE_TYPES)
        items = sorted(self.findings.items(), key=lambda it: (order.index(it[0].kind), it[0].data, -it[1].count))
        return [
            {
                "kind": kind,
                "severity": "problem" if (issue := ISSUE_TYPES[kind]).problem else "note",
                "data": data,
                "title": f"{issue.title}: {reason}" if reason else issue.title,
                "count": finding.count,
                "share": finding.count / len(self.problems[data]),
                "what": issue.what,
                "examples": finding.examples,
            }
            for (data, kind, reason), finding in items
        ]


def _hashes(normalized: Texts) -> tuple[bytes, bytes, bytes]:
    """Hash the prompt, the row, and the row with its responses swapped."""
    prompt, chosen, rejected = (_digest(text.encode("utf-8", "surrogatepass")) for text in normalized)
    return prompt, _digest(prompt + chosen + rejected), _digest(prompt + rejected + chosen)


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=12).digest()


# ---- --fix ------------------------------------------------------------------------------------------------------


def _check_new(file: Path) -> None:
    if file.suffix != ".jsonl":
        raise UsageError(f"--fix {file}: the output is JSON lines; give it a name that ends with .jsonl")
    if file.exists() or file.is_symlink():
        raise UsageError(f"--fix {file}: already exists; name a new file")


def _write_clean(file: Path, sources: list[Source], problems: list[str]) -> dict[str, Any]:
    """Write the records of the rows without a problem, if any; count the others by their first problem."""
    dropped = Counter(problem for problem in problems if problem)
    kept = len(problems) - dropped.total()
    records = (record for source in sources for _, record in source.records())
    if kept:
        with atomic_write(file) as temporary, temporary.open("w", encoding="utf-8", errors="backslashreplace") as out:
            try:
                for record, problem in zip(records, problems, strict=True):
                    if not problem:
                        out.write(json.dumps(finite(record), ensure_ascii=False, default=str) + "\n")
            except ValueError as error:
                raise UsageError("--data: the rows changed while they were read; nothing is written") from error
    return {"file": str(file), "kept": kept, "dropped": {kind: dropped[kind] for kind in ISSUE_TYPES if dropped[kind]}}


# ---- text -------------------------------------------------------------------------------------------------------


def as_text(result: dict[str, Any]) -> str:
    """Format the result: formats, problems, notes, lengths, and a verdict at the end."""
    lines = [f"{_count(count, 'row')}: {name}" for name, count in result["formats"].items()]
    for severity in ("problem", "note"):
        some = [finding for finding in result["findings"] if finding["severity"] == severity]
        lines += [f"{severity}s"] * bool(some)
        for finding in some:
            lines += _finding(finding)
    if "lengths" in result:
        lines += _lengths(result["lengths"], result["length_bias"])
    if fixed := result.get("fixed"):
        kept = f"{fixed['kept']:,} rows written to" if fixed["kept"] else "no row is clean; not written:"
        lines.append(f"fixed: {kept} {fixed['file']}")
        lines += [f"  {count:>9,}  dropped: {ISSUE_TYPES[kind].title}" for kind, count in fixed["dropped"].items()]
        lines.append("")
    rows = result["rows"] + result.get("eval_rows", 0)
    if problems := result["problems"]:
        lines.append(f"{_count(problems, 'problem')} in {result['problem_rows']:,} of {rows:,} rows")
    else:
        lines.append(f"no problems found in {rows:,} rows")
    return "\n".join(lines)


def _count(count: int, word: str) -> str:
    return f"{count:,} {word}" + "s" * (count != 1)


def _finding(finding: dict[str, Any]) -> list[str]:
    where = "" if finding["data"] == TRAIN else " (in --eval-data)"
    lines = [
        f"  {finding['count']:>9,}  {finding['share']:>6.1%}  {finding['title']}{where}",
        f"{'':21}{finding['what']}",
    ]
    for example in finding["examples"]:
        other = f" (see {example['other']})" if "other" in example else ""
        why = f" ({example['reason']})" if "reason" in example else ""
        lines.append(f"{'':21}{example['where']}{other}: {example['text']}{why}")
    return [*lines, ""]


def _lengths(lengths: dict[str, dict[str, float]], bias: dict[str, Any]) -> list[str]:
    lines = [
        "tokens after truncation (responses: loss-bearing tokens)",
        " " * 14 + "".join(f"{name:>9}" for name in lengths["prompt"]),
    ]
    for part, values in lengths.items():
        lines.append(f"  {part:<12}" + "".join(f"{value:>9,.0f}" for value in values.values()))
    low, high = bias["interval"]
    lines += [
        f"  the longer response is chosen in {bias['share']:.1%} of the pairs that differ in length "
        f"(95 % interval {low:.1%} to {high:.1%}; {bias['ties']:,} ties)",
        f"  accuracy to beat: {bias['accuracy_prefer_longer']:.1%} by preferring the longer response, "
        f"{bias['accuracy_prefer_shorter']:.1%} by preferring the shorter",
        "",
    ]
    return lines
