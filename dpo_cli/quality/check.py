"""`dpo check`: read and tokenize preference data, and report what is wrong with it before a training starts."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from dpo_cli.config.options import CheckOptions
from dpo_cli.config.resolve import as_words
from dpo_cli.data.chat import CONTROL_KEPT
from dpo_cli.data.messages import REASONING, Text
from dpo_cli.data.pairs import Ids, count_loss_tokens
from dpo_cli.data.readers import shortened
from dpo_cli.data.rows import BadRow, Row, read_rows
from dpo_cli.data.sources import Source, find_sources
from dpo_cli.data.tokenize import PROMPT_CUT, RESPONSE_CUT, Encoder
from dpo_cli.evaluation.statistics import wilson
from dpo_cli.training.prepare import choose_model, choose_tokenizer
from dpo_cli.training.run_dir import encoder_options, row_options
from dpo_cli.utils.console import Reporter
from dpo_cli.utils.errors import UsageError, plural, printable
from dpo_cli.utils.files import atomic_write, finite

# In the order in which they are reported, what changes a training most first. On a problem --strict fails, and --fix
# drops the row.
PROBLEMS = {
    "refused": "rows that dpo train refuses",
    "encoding": "damaged encoding: text decoded wrongly, replacement or control characters",
    "markers": "markers of chat templates in a response, outside code; the template writes its own",
    "contradiction": "contradictions: for one prompt two responses are preferred to each other",
    "leak_row": "rows that are in --eval-data too",
    "leak_prompt": "prompts that are in --eval-data too, with other responses",
    "duplicate": "copies of other rows, but for case and white space",
}
NOTES = {
    "length_bias": "length predicts the preference",
    "response_cut": "truncated responses: the end is removed beyond --max-length",
    "thinking": "thinking on one side only, which teaches to think, or not to",
    "empty_response": "responses without a letter or a digit",
    "control_tokens": "control tokens in messages, which act as such; --control-tokens refuse",
    "prompt_cut": "truncated prompts: the oldest turns are removed beyond --max-length",
    "other": "noted when the row was tokenized",
}
TITLES = PROBLEMS | NOTES
NOTED = {PROMPT_CUT: "prompt_cut", RESPONSE_CUT: "response_cut", CONTROL_KEPT: "control_tokens"}
FEW = 1000  # pairs: the default learning rate would hardly move the model
CONTEXT = 30  # characters shown on either side of a match
BIASED, LEAST = 0.65, 0.6  # share of pairs that length must predict to be noted, and what its interval must exceed


def run_check(options: CheckOptions, reporter: Reporter) -> dict[str, Any]:
    """Run `dpo check`: report all issues with example rows, and what length alone predicts.

    Raises:
        UsageError: a file cannot be read, or ``--fix`` names an existing file.
    """
    sources = find_sources(options.data, seed=options.seed)
    held_out = find_sources(options.eval_data or [], "--eval-data", options.seed)
    if options.fix and options.fix.suffix != ".jsonl":
        raise UsageError(f"--fix {options.fix}: the output is JSON lines; give it a name that ends with .jsonl")
    if options.fix and (options.fix.exists() or options.fix.is_symlink()):
        raise UsageError(f"--fix {options.fix}: already exists; name a new file")
    model = choose_model(options.model, options, reporter, base=options.base_model)
    encoder = Encoder(choose_tokenizer(model, options), **encoder_options(options, model.run))
    check = DataCheck(encoder, options.examples)
    reading = row_options(options, model.run)
    check.read_held_out(read_rows(held_out, options.columns, options.format, **reading))
    check.read(read_rows(sources, options.columns, options.format, **reading))
    result = check.result()
    if options.fix:
        result["fixed"] = _write_clean(options.fix, sources, check.problems)
        reporter.info("fixed", f"{result['fixed']['kept']:,} of {result['rows']:,} rows are clean")
    return result | ({"next": _next_command(options, result)} if result["pairs"] else {})


def _next_command(options: CheckOptions, result: dict[str, Any]) -> str:
    """Return the command that follows: a training, or where rows have problems, one that writes the others."""
    shared = [f for f in fields(CheckOptions) if f.name not in ("examples", "fix", "strict")]
    given = {f.name: value for f in shared if (value := getattr(options, f.name)) != f.default}
    cleaned = result.get("fixed", {}).get("kept")
    if result["problems"] and not cleaned:
        return shlex.join(["dpo", "check", *as_words(given | {"fix": "clean.jsonl"})])
    given |= {"data": str(options.fix)} if cleaned else {}
    given |= {} if options.eval_data else {"eval_fraction": 0.1}
    given |= {"batch_size": 8, "lr": 2e-5} if result["pairs"] < FEW else {}
    return shlex.join(["dpo", "train", *as_words(given)])


class DataCheck:
    """Checks rows in order; one with another problem is not compared with later ones."""

    def __init__(self, encoder: Encoder, max_examples: int) -> None:
        self.encoder, self.max_examples = encoder, max_examples
        # By issue type, and the reason where a type has several.
        self.counts: Counter[tuple[str, str]] = Counter()
        self.examples: dict[tuple[str, str], list[dict[str, str]]] = defaultdict(list)
        self.formats: Counter[str] = Counter()
        self.where: list[str] = []
        self.problems: list[str] = []  # the first problem of each row, or an empty string
        self.lengths: list[tuple[int, int]] = []  # tokens of chosen and rejected that carry loss
        self.first: dict[bytes, int] = {}  # the place of a row, by the hash of each of its pairs
        self.held_out: dict[bytes, str] = {}  # the location of a held-out row, by these hashes and its prompt's

    def read_held_out(self, rows: Iterable[Row | BadRow]) -> None:
        """Remember held-out rows, which no row of ``read`` should equal."""
        for row in rows:
            if isinstance(row, Row):
                prompt, pairs, _ = hashes(self.encoder.chat.as_turns(row))
                self.held_out |= {name: row.where for name in (prompt, *pairs) if name not in self.held_out}

    def read(self, rows: Iterable[Row | BadRow]) -> None:
        """Check rows."""
        for made in self.encoder.pairs(rows):
            self.problems.append("")
            if isinstance(made, BadRow):
                self.where.append(made.where)
                reason = printable(made.reason)
                self._add("refused", reason, reason=re.sub(r"'.*'|\b\d+\b", "…", reason))  # the same of several rows
                continue
            row, pairs, notes = made
            self.where.append(row.where)
            self.formats[row.format] += 1
            self.lengths += [(count_loss_tokens(pair.chosen), count_loss_tokens(pair.rejected)) for pair in pairs]
            excerpt = shortened(texts_of(row)["prompt"], 70)
            for kind, text in row_issues(row).items():
                self._add(kind, text)
            for note in notes:
                self._add(NOTED.get(note, "other"), excerpt, reason="" if note in NOTED else note)
            self._compare(row, excerpt)

    def _compare(self, row: Row, excerpt: str) -> None:
        """Compare the last row with the held-out rows and with earlier ones."""
        prompt, pairs, swapped = hashes(row)
        place = len(self.where) - 1
        if leaked := [self.held_out[pair] for pair in pairs if pair in self.held_out]:
            self._add("leak_row", excerpt, other=leaked[0])
        elif other := self.held_out.get(prompt):
            self._add("leak_prompt", excerpt, other=other)
        copied = [self.first[pair] for pair in pairs if pair in self.first]
        if len(copied) == len(pairs):
            self._add("duplicate", excerpt, other=self.where[copied[0]])
        elif against := [self.first[pair] for pair in swapped if pair in self.first]:
            for earlier in dict.fromkeys(against):
                if not self.problems[earlier]:
                    self._add("contradiction", excerpt, place=earlier, other=self.where[place])
            self._add("contradiction", excerpt, other=self.where[against[0]])
        elif not self.problems[place]:
            for pair in pairs:
                self.first.setdefault(pair, place)

    def _add(self, kind: str, text: str, *, reason: str = "", place: int = -1, **more: str) -> None:
        self.counts[kind, reason] += 1
        if len(examples := self.examples[kind, reason]) < self.max_examples:
            examples.append({"where": self.where[place], "text": text} | more)
        if kind in PROBLEMS:
            self.problems[place] = self.problems[place] or kind

    def result(self) -> dict[str, Any]:
        """Return counts, findings and the bias by length, as `dpo check --json` prints them."""
        bias = length_bias(np.array(self.lengths, np.int32).reshape(-1, 2))
        for name, low in (("longer", bias["interval"][0]), ("shorter", 1 - bias["interval"][1])):
            if low > LEAST and bias[f"accuracy_prefer_{name}"] >= BIASED:
                self.counts["length_bias", f"the {name} response is chosen"] = bias[f"{name}_chosen"]
        order = list(TITLES)
        findings = [
            {
                "kind": kind,
                "severity": "problem" if kind in PROBLEMS else "note",
                "title": f"{TITLES[kind]}: {self._reason(kind, reason)}" if reason else TITLES[kind],
                "count": count,
                "share": count / len(self.problems),
                "examples": self.examples[kind, reason],
            }
            for (kind, reason), count in sorted(
                self.counts.items(), key=lambda item: (order.index(item[0][0]), -item[1])
            )
        ]
        result = {
            "rows": len(self.problems),
            "pairs": len(self.lengths),
            "formats": dict(self.formats),
            "problems": sum(finding["severity"] == "problem" for finding in findings),
            "problem_rows": sum(map(bool, self.problems)),
            "findings": findings,
        }
        return result | ({"length_bias": bias} if self.lengths else {})

    def _reason(self, kind: str, reason: str) -> str:
        """Return the reason of a kind, of refused rows in full where their examples have the same."""
        texts = {example["text"] for example in self.examples[kind, reason]}
        return texts.pop() if kind == "refused" and len(texts) == 1 else reason


def length_bias(lengths: Ids) -> dict[str, Any]:
    """Compute how often the longer response is chosen, from (P, 2) tokens of chosen and rejected.

    The accuracies are those of always preferring the longer or the shorter response, a tie counting half; a trained
    model must beat both.
    """
    chosen, rejected = lengths.T  # (P,) each
    longer, shorter = int((chosen > rejected).sum()), int((chosen < rejected).sum())
    ties = len(lengths) - longer - shorter
    prefer_longer = (longer + ties / 2) / max(len(lengths), 1)
    return {
        "longer_chosen": longer,
        "shorter_chosen": shorter,
        "ties": ties,
        "share": longer / (longer + shorter) if longer + shorter else 0.5,
        "interval": list(wilson(longer, longer + shorter)),
        "accuracy_prefer_longer": prefer_longer,
        "accuracy_prefer_shorter": 1 - prefer_longer,
    }


# ---- the text of a row ------------------------------------------------------------------------------------------


def texts_of(row: Row) -> dict[str, str]:
    """Return the text of each part of a row; for messages their reasoning, contents and tool calls."""
    return {"prompt": _text(row.prompt)} | {name: _text(answer) for name, answer in row.sides.items()}


def _text(value: Text) -> str:
    if isinstance(value, str):
        return value
    parts = []
    for message in value:
        parts += [message[key] for key in (REASONING, "content") if message.get(key)]
        if message.get("tool_calls"):
            parts.append(json.dumps(message["tool_calls"], sort_keys=True, default=str))
    return "\n".join(parts)


def hashes(row: Row) -> tuple[bytes, list[bytes], list[bytes]]:
    """Hash the prompt, each pair, and each with its responses swapped; tools are part of the prompt.

    Texts are compared by NFC, without case and with single spaces.
    """
    texts = [" ".join(unicodedata.normalize("NFC", text).casefold().split()) for text in texts_of(row).values()]
    if row.template_arguments:
        texts[0] += "\n" + json.dumps(row.template_arguments, sort_keys=True, default=str)
    prompt, *sides = (_digest(text.encode("utf-8", "surrogatepass")) for text in texts)
    pairs = [(sides[better], sides[worse]) for better, worse in row.preferences()]
    return prompt, [_digest(prompt + a + b) for a, b in pairs], [_digest(prompt + b + a) for a, b in pairs if a != b]


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=12).digest()


# ---- checks of a row --------------------------------------------------------------------------------------------

_WORD = re.compile(r"[^\W_]")
_CODE = re.compile(r"```.*?(?:```|\Z)|~~~.*?(?:~~~|\Z)|`[^`\n]*`", re.DOTALL)
_MARKERS = re.compile(  # a rendered response may end with one
    r"(?:<\|im_(?:start|end)\|>|<\|eot_id\|>|<\|start_header_id\|>|\[/?INST\]|<(?:start|end)_of_turn>"
    r"|<\|(?:user|assistant)\|>)(?!\s*\Z)"
)
# UTF-8 bytes read as cp1252 or latin-1: a lead byte and a continuation byte, each as the character it would be.
_TRAIL = "[\x80-\xbfŒœŠšŸŽžƒˆ˜–-›€™]"
_DAMAGE = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ufffd]"  # U+0085 ends a line in some files
    f"|[ÂÃ]{_TRAIL}|[ÄÅ](?:\xa0(?=[a-z])|[\xa1-\xaa\xac-\xba\xbc-\xbf])|â€.|[ÐÑ]{_TRAIL}[ÐÑ]"
)


def row_issues(row: Row) -> dict[str, str]:
    """Return the issues of a row by type, each with an excerpt."""
    issues, texts = {}, texts_of(row)
    for name, text in texts.items():
        plain = text.isascii() and text.isprintable()
        if not plain and (damage := _DAMAGE.search(text)):
            issues["encoding"] = f"{name}: {_around(text, damage)}"
        if name == "prompt":
            continue
        if marker := _MARKERS.search(_CODE.sub(lambda code: "`" * len(code[0]), text)):
            issues["markers"] = f"{name}: {_around(text, marker)}"
        if not _WORD.search(text):
            issues["empty_response"] = f"{name}: {shortened(text)}"
    if 0 < len(thinking := [name for name, answer in row.sides.items() if _has_thinking(answer)]) < len(row.answers):
        issues["thinking"] = f"only the {', '.join(thinking)}: {shortened(texts['prompt'])}"
    return issues


def _has_thinking(response: Text) -> bool:
    """Return whether a response contains thinking, not just a pair of tags; the prompt may have opened it."""
    if not isinstance(response, str):
        return any(turn.get(REASONING) or _has_thinking(str(turn.get("content"))) for turn in response)
    before, closed, _ = response.partition("</think>")
    return ("<think>" in before or bool(closed)) and bool(before.rpartition("<think>")[2].strip())


def _around(text: str, match: re.Match[str]) -> str:
    start = max(match.start() - CONTEXT, 0)
    return "…" * (start > 0) + shortened(text[start:], match.end() - start + CONTEXT)


# ---- output -----------------------------------------------------------------------------------------------------


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
    return {"file": str(file), "kept": kept, "dropped": {kind: dropped[kind] for kind in PROBLEMS if dropped[kind]}}


def as_text(result: dict[str, Any]) -> str:
    """Format the result: formats, problems, notes, the bias by length, and a verdict at the end."""
    lines = [f"{plural(count, 'row')}: {name}" for name, count in result["formats"].items()]
    for finding in result["findings"]:
        share = f"{finding['count']:>9,}  {finding['share']:>6.1%}"
        lines.append(f"{finding['severity']:<9}{share}  {finding['title']}")
        for example in finding["examples"]:
            other = f" (see {example['other']})" if "other" in example else ""
            text = "" if finding["title"].endswith(f": {example['text']}") else f": {example['text']}"
            lines.append(f"{'':28}{example['where']}{other}{text}")
        lines.append("")
    if bias := result.get("length_bias"):
        low, high = bias["interval"]
        lines += [
            f"the longer response is chosen in {bias['share']:.1%} of the pairs that differ in length "
            f"(95% interval {low:.1%} to {high:.1%}; {bias['ties']:,} ties)",
            f"accuracy to beat: {bias['accuracy_prefer_longer']:.1%} by preferring the longer response, "
            f"{bias['accuracy_prefer_shorter']:.1%} by preferring the shorter",
            "",
        ]
    if fixed := result.get("fixed"):
        kept = f"{plural(fixed['kept'], 'row')} written to" if fixed["kept"] else "no row is clean; not written:"
        lines.append(f"fixed: {kept} {fixed['file']}")
        lines += [f"  {count:>9,}  dropped: {PROBLEMS[kind]}" for kind, count in fixed["dropped"].items()]
        lines.append("")
    problems = f"problems: {result['problems']}, in {result['problem_rows']:,} of" if result["problems"] else ""
    lines.append(f"{problems or 'no problems found in'} {plural(result['rows'], 'row')}")
    return "\n".join([*lines, *[f"Next: {result.get('next')}"] * ("next" in result)])
