"""`dpo check`: read and tokenize preference data, and report what is wrong with it before a training starts."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dpo_cli.config.options import CheckOptions
from dpo_cli.data.pairs import count_loss_tokens
from dpo_cli.data.readers import shortened
from dpo_cli.data.rows import BadRow, Row, read_rows
from dpo_cli.data.sources import Source, find_sources
from dpo_cli.data.tokenize import Encoder
from dpo_cli.quality.checks import ISSUE_TYPES, NOTES, biased_pairs, length_bias, normalize, row_issues, texts_of
from dpo_cli.training.prepare import choose_model, choose_tokenizer
from dpo_cli.training.run_dir import reading_of
from dpo_cli.utils.console import Reporter
from dpo_cli.utils.errors import UsageError, printable
from dpo_cli.utils.files import atomic_write, finite


def run_check(options: CheckOptions, reporter: Reporter) -> dict[str, Any]:
    """Run `dpo check`: report all issues with example rows, and what length alone predicts.

    Raises:
        UsageError: a file cannot be read, or ``--fix`` names an existing file.
    """
    sources = find_sources(options.data)
    held_out = find_sources(options.eval_data or [], "--eval-data")
    if options.fix:
        _check_new(options.fix)
    model = choose_model(options.model, options, reporter, base=options.base_model)
    encoder = Encoder(choose_tokenizer(model, options), **reading_of(options, model.run))
    check = DataCheck(encoder, options.examples)
    check.read_held_out(read_rows(held_out, options.columns, options.format))
    check.read(read_rows(sources, options.columns, options.format))
    result = check.result()
    if options.fix:
        result["fixed"] = _write_clean(options.fix, sources, check.problems)
        reporter.info("fixed", f"{result['fixed']['kept']:,} of {result['rows']:,} rows are clean")
    return result


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
        self.findings: dict[tuple[str, str], Finding] = {}  # by issue type, and the reason where a type has several
        self.formats: Counter[str] = Counter()
        self.where: list[str] = []
        self.problems: list[str] = []  # the first problem of each row, or an empty string
        self.lengths: list[tuple[int, int]] = []  # tokens of chosen and rejected that carry loss
        self.first: dict[bytes, int] = {}  # the place of a row, by its hash
        self.held_out: dict[bytes, str] = {}  # the location of a held-out row, by its hash and its prompt's

    def read_held_out(self, rows: Iterable[Row | BadRow]) -> None:
        """Remember held-out rows, which no row of ``read`` should equal."""
        for row in rows:
            if isinstance(row, Row):
                prompt, whole, _ = _hashes(self.encoder.chat.as_turns(row))
                self.held_out.setdefault(prompt, row.where)
                self.held_out.setdefault(whole, row.where)

    def read(self, rows: Iterable[Row | BadRow]) -> None:
        """Check rows."""
        for result in self.encoder.pairs(rows):
            self.problems.append("")
            if isinstance(result, BadRow):
                self.where.append(result.where)
                reason = printable(result.reason)
                self._add("refused", reason, reason=re.sub(r"'.*'|\b\d+\b", "…", reason))  # the same of several rows
                continue
            row, pair, notes = result
            self.where.append(row.where)
            self.formats[row.format] += 1
            self.lengths.append((count_loss_tokens(pair.chosen), count_loss_tokens(pair.rejected)))
            texts = texts_of(row)
            excerpt = shortened(texts.prompt, 70)
            for kind, text in row_issues(row, texts).items():
                self._add(kind, text)
            for note in notes:
                self._add(NOTES.get(note, "other"), excerpt, reason="" if note in NOTES else note)
            self._compare(row, excerpt)

    def _compare(self, row: Row, excerpt: str) -> None:
        """Compare the last row with the held-out rows and with earlier ones."""
        prompt, whole, swapped = _hashes(row)
        place = len(self.where) - 1
        if other := self.held_out.get(whole):
            self._add("leak_row", excerpt, other=other)
        elif other := self.held_out.get(prompt):
            self._add("leak_prompt", excerpt, other=other)
        if (earlier := self.first.get(whole)) is not None:
            self._add("duplicate", excerpt, other=self.where[earlier])
        elif whole != swapped and (earlier := self.first.get(swapped)) is not None:
            if not self.problems[earlier]:
                self._add("contradiction", excerpt, place=earlier, other=self.where[place])
            self._add("contradiction", excerpt, other=self.where[earlier])
        elif not self.problems[place]:
            self.first[whole] = place

    def _add(self, kind: str, text: str, *, reason: str = "", place: int = -1, **more: str) -> None:
        finding = self.findings.setdefault((kind, reason), Finding())
        finding.count += 1
        if len(finding.examples) < self.max_examples:
            finding.examples.append({"where": self.where[place], "text": text} | more)
        if ISSUE_TYPES[kind].problem:
            self.problems[place] = self.problems[place] or kind

    def result(self) -> dict[str, Any]:
        """Return counts, findings and the bias by length, as `dpo check --json` prints them."""
        bias = length_bias(np.array(self.lengths, np.int32)) if self.lengths else None
        if bias and (biased := biased_pairs(bias)):
            self.findings["length_bias", biased[1]] = Finding(biased[0])
        order = list(ISSUE_TYPES)
        items = sorted(self.findings.items(), key=lambda item: (order.index(item[0][0]), -item[1].count))
        findings = [
            {
                "kind": kind,
                "severity": "problem" if (issue := ISSUE_TYPES[kind]).problem else "note",
                "title": f"{issue.title}: {reason}" if reason else issue.title,
                "count": finding.count,
                "share": finding.count / len(self.problems),
                "examples": finding.examples,
            }
            for (kind, reason), finding in items
        ]
        result = {
            "rows": len(self.problems),
            "pairs": len(self.lengths),
            "formats": dict(self.formats),
            "problems": sum(finding["severity"] == "problem" for finding in findings),
            "problem_rows": sum(map(bool, self.problems)),
            "findings": findings,
        }
        return result | ({"length_bias": bias} if bias else {})


def _hashes(row: Row) -> tuple[bytes, bytes, bytes]:
    """Hash the normalized prompt, the row, and the row with its responses swapped."""
    prompt, chosen, rejected = (_digest(text.encode("utf-8", "surrogatepass")) for text in normalize(row))
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
    """Format the result: formats, problems, notes, the bias by length, and a verdict at the end."""
    lines = [f"{count:,} rows: {name}" for name, count in result["formats"].items()]
    for finding in result["findings"]:
        share = f"{finding['count']:>9,}  {finding['share']:>6.1%}"
        lines.append(f"{finding['severity']:<9}{share}  {finding['title']}")
        for example in finding["examples"]:
            other = f" (see {example['other']})" if "other" in example else ""
            lines.append(f"{'':28}{example['where']}{other}: {example['text']}")
        lines.append("")
    if bias := result.get("length_bias"):
        low, high = bias["interval"]
        lines += [
            f"the longer response is chosen in {bias['share']:.1%} of the pairs that differ in length "
            f"(95 % interval {low:.1%} to {high:.1%}; {bias['ties']:,} ties)",
            f"accuracy to beat: {bias['accuracy_prefer_longer']:.1%} by preferring the longer response, "
            f"{bias['accuracy_prefer_shorter']:.1%} by preferring the shorter",
            "",
        ]
    if fixed := result.get("fixed"):
        kept = f"{fixed['kept']:,} rows written to" if fixed["kept"] else "no row is clean; not written:"
        lines.append(f"fixed: {kept} {fixed['file']}")
        lines += [f"  {count:>9,}  dropped: {ISSUE_TYPES[kind].title}" for kind, count in fixed["dropped"].items()]
        lines.append("")
    problems = f"problems: {result['problems']}, in {result['problem_rows']:,} of" if result["problems"] else ""
    return "\n".join([*lines, f"{problems or 'no problems found in'} {result['rows']:,} rows"])
