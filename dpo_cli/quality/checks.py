"""The table of issue types, the checks that need a single row, and the bias by length."""

from __future__ import annotations

import json
import re
import unicodedata
from typing import Any, NamedTuple

from dpo_cli.data.chat import CONTROL_KEPT
from dpo_cli.data.messages import REASONING, Text
from dpo_cli.data.pairs import Ids
from dpo_cli.data.readers import shortened
from dpo_cli.data.rows import Row
from dpo_cli.data.tokenize import PROMPT_CUT, RESPONSE_CUT
from dpo_cli.evaluation.statistics import wilson

CONTEXT = 30  # characters shown on either side of a match


class IssueType(NamedTuple):
    """What an issue is called; on a ``problem`` --strict fails and --fix drops the row."""

    problem: bool
    title: str


# In the order in which they are reported.
ISSUE_TYPES = {
    "refused": IssueType(True, "refused rows; dpo train needs --on-bad-row skip, or these rows mended"),
    "encoding": IssueType(True, "damaged encoding: text decoded wrongly, replacement or control characters"),
    "markers": IssueType(True, "markers of chat templates in a response, outside code; the template writes its own"),
    "contradiction": IssueType(True, "contradictions: for one prompt two responses are preferred to each other"),
    "leak_row": IssueType(True, "rows that are in --eval-data too"),
    "leak_prompt": IssueType(True, "prompts that are in --eval-data too, with other responses"),
    "duplicate": IssueType(True, "copies of other rows, but for case and white space"),
    "prompt_cut": IssueType(False, "truncated prompts: the oldest turns are removed beyond --max-length"),
    "response_cut": IssueType(False, "truncated responses: the end is removed beyond --max-length"),
    "control_tokens": IssueType(False, "control tokens in messages, which act as such; --control-tokens refuse"),
    "thinking": IssueType(False, "thinking on one side only, which teaches to think, or not to"),
    "empty_response": IssueType(False, "responses without a letter or a digit"),
    "length_bias": IssueType(False, "length predicts the preference"),
    "other": IssueType(False, "noted when the row was tokenized"),
}
NOTES = {PROMPT_CUT: "prompt_cut", RESPONSE_CUT: "response_cut", CONTROL_KEPT: "control_tokens"}


# ---- the text of a row ------------------------------------------------------------------------------------------


class Texts(NamedTuple):
    """The text of a row's parts."""

    prompt: str
    chosen: str
    rejected: str


def texts_of(row: Row) -> Texts:
    """Return the text of each part of a row; for messages their reasoning, contents and tool calls."""
    return Texts(_text(row.prompt), _text(row.chosen), _text(row.rejected))


def _text(value: Text) -> str:
    if isinstance(value, str):
        return value
    parts = []
    for message in value:
        parts += [message[key] for key in (REASONING, "content") if message.get(key)]
        if message.get("tool_calls"):
            parts.append(json.dumps(message["tool_calls"], sort_keys=True, default=str))
    return "\n".join(parts)


def normalize(row: Row) -> Texts:
    """Normalize texts to NFC, lower case and single spaces; tools and other template arguments join the prompt."""
    texts = Texts(*(" ".join(unicodedata.normalize("NFC", text).casefold().split()) for text in texts_of(row)))
    arguments = json.dumps(row.template_arguments, sort_keys=True, default=str) if row.template_arguments else ""
    return texts._replace(prompt=f"{texts.prompt}\n{arguments}") if arguments else texts


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


def row_issues(row: Row, texts: Texts) -> dict[str, str]:
    """Return the issues of a row by type, each with an excerpt."""
    issues = {}
    for name, text in zip(Texts._fields, texts, strict=True):
        if damage := find_damage(text):
            issues["encoding"] = f"{name}: {_around(text, damage)}"
    for name in ("chosen", "rejected"):
        text = getattr(texts, name)
        if marker := _MARKERS.search(_CODE.sub(lambda code: "`" * len(code[0]), text)):
            issues["markers"] = f"{name}: {_around(text, marker)}"
        if not _WORD.search(text):
            issues["empty_response"] = f"{name}: {shortened(text)}"
    if len(thinking := [name for name in ("chosen", "rejected") if _has_thinking(getattr(row, name))]) == 1:
        issues["thinking"] = f"only the {thinking[0]}: {shortened(texts.prompt)}"
    return issues


def find_damage(text: str) -> re.Match[str] | None:
    """Find control characters, replacement characters and UTF-8 that was decoded as another encoding."""
    return None if text.isascii() and text.isprintable() else _DAMAGE.search(text)


def _has_thinking(response: Text) -> bool:
    if isinstance(response, str):
        return _thinks(response)
    return any(turn.get(REASONING) or _thinks(str(turn.get("content"))) for turn in response)


def _thinks(text: str) -> bool:
    """Return whether a response contains thinking, not just a pair of tags; the prompt may have opened it."""
    before, closed, _ = text.partition("</think>")
    return ("<think>" in before or bool(closed)) and bool(before.rpartition("<think>")[2].strip())


def _around(text: str, match: re.Match[str]) -> str:
    start = max(match.start() - CONTEXT, 0)
    return "…" * (start > 0) + shortened(text[start:], match.end() - start + CONTEXT)


# ---- what length alone predicts -------------------------------------------------------------------------------------

BIASED, LEAST = 0.65, 0.6  # share of pairs, and what its interval must exceed


def length_bias(lengths: Ids) -> dict[str, Any]:
    """Compute how often the longer response is chosen, from (P, 2) tokens of chosen and rejected.

    The accuracies are those of always preferring the longer or the shorter response, a tie counting half; a trained
    model must beat both.
    """
    chosen, rejected = lengths.T  # (P,) each
    longer, shorter = int((chosen > rejected).sum()), int((chosen < rejected).sum())
    ties = len(lengths) - longer - shorter
    prefer_longer = (longer + ties / 2) / len(lengths)
    return {
        "longer_chosen": longer,
        "shorter_chosen": shorter,
        "ties": ties,
        "share": longer / (longer + shorter) if longer + shorter else 0.5,
        "interval": list(wilson(longer, longer + shorter)),
        "accuracy_prefer_longer": prefer_longer,
        "accuracy_prefer_shorter": 1 - prefer_longer,
    }


def biased_pairs(bias: dict[str, Any]) -> tuple[int, str] | None:
    """Return in how many pairs length predicts the preference, and how; None if it hardly does."""
    low, high = bias["interval"]
    for name, sure in (("longer", low), ("shorter", 1 - high)):
        if bias[f"accuracy_prefer_{name}"] >= BIASED and sure > LEAST:
            return bias[f"{name}_chosen"], f"the {name} response is chosen"
    return None
