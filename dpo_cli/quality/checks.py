"""The table of issue types, and the checks that need a single row."""

from __future__ import annotations

import json
import re
import unicodedata
from typing import Any, NamedTuple

from dpo_cli.data.messages import REASONING, Text
from dpo_cli.data.readers import shortened
from dpo_cli.data.rows import Row
from dpo_cli.data.template import ControlTokens

CONTEXT = 30  # characters shown on either side of a match


class IssueType(NamedTuple):
    """What is reported about an issue; on a ``problem`` --strict fails and --fix drops the row."""

    problem: bool
    title: str
    what: str
    todo: str


# In the order in which they are reported, and in which --fix names the reason for dropping a row.
ISSUE_TYPES = {
    "refused": IssueType(
        True, "refused rows", "`dpo train` cannot use them.", "Fix them, or train with --on-bad-row skip."
    ),
    "encoding": IssueType(
        True,
        "damaged encoding",
        "Text that was decoded with the wrong encoding, replacement characters or control characters.",
        "Export the data again as UTF-8.",
    ),
    "markers": IssueType(
        True,
        "template markers in a response",
        "A response contains tokens with which a chat template separates turns, outside code.",
        "Remove them: the template writes its own.",
    ),
    "contradiction": IssueType(
        True,
        "contradictions",
        "For one prompt a response is preferred to another, and elsewhere the other way round.",
        "Decide for one order, or drop both.",
    ),
    "leak_row": IssueType(
        True,
        "rows that are in --eval-data too",
        "Rows that are trained on are evaluated on, so the evaluation says nothing.",
        "Remove them from one of the two.",
    ),
    "leak_prompt": IssueType(
        True,
        "prompts that are in --eval-data too",
        "The prompt is evaluated on, with other responses.",
        "Split by prompt, not by row.",
    ),
    "duplicate": IssueType(
        True,
        "copies of other rows",
        "Prompt and responses equal another row's, ignoring case and white space.",
        "Drop them: a copy counts like another epoch of its row.",
    ),
    "same_words": IssueType(
        False,
        "responses with the same words",
        "The two responses differ only in case and white space.",
        "Fine if that is what you teach; otherwise drop them.",
    ),
    "prompt_cut": IssueType(
        False, "truncated prompts", "Longer than --max-length; the oldest turns are removed.", "Raise --max-length."
    ),
    "response_cut": IssueType(
        False, "truncated responses", "Longer than --max-length; the end is removed.", "Raise --max-length."
    ),
    "control_tokens": IssueType(
        False,
        "control tokens in messages",
        "A message contains a token that the model's template or tokenizer treats as its own.",
        "Use --control-tokens sanitize, unless they are intended.",
    ),
    "thinking": IssueType(
        False,
        "thinking on one side only",
        "One response thinks before it answers, and the other does not.",
        "Such pairs teach to think, or not to: give both responses their thinking, or neither.",
    ),
    "empty_response": IssueType(
        False, "responses without a word", "A response has neither a letter nor a digit.", "Inspect them."
    ),
    "length_bias": IssueType(
        False,
        "length predicts the preference",
        "Always choosing the longer (or the shorter) response would be right this often.",
        "A trained model must beat that; balance lengths, or use a length-normalized loss.",
    ),
    "other": IssueType(False, "tokenization", "Noted when the row was tokenized.", "Inspect them."),
}
FLAGS = {name: 1 << place for place, name in enumerate(ISSUE_TYPES)}
PROBLEMS = sum(FLAGS[name] for name, issue in ISSUE_TYPES.items() if issue.problem)


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


def normalize(row: Row, texts: Texts) -> Texts:
    """Normalize texts to NFC, lower case and single spaces; tools and other template arguments join the prompt."""
    texts = Texts(*(" ".join(unicodedata.normalize("NFC", text).casefold().split()) for text in texts))
    arguments = json.dumps(row.template_arguments, sort_keys=True, default=str) if row.template_arguments else ""
    return texts._replace(prompt=f"{texts.prompt}\n{arguments}") if arguments else texts


# ---- checks of a row --------------------------------------------------------------------------------------------

_WORD = re.compile(r"[^\W_]")
_CODE = re.compile(r"```.*?(?:```|\Z)|~~~.*?(?:~~~|\Z)|`[^`\n]*`", re.DOTALL)
_MARKERS = (
    *("<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "[INST]", "[/INST]"),
    *("<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>"),
)
# UTF-8 bytes read as cp1252 or latin-1: a lead byte and a continuation byte, each as the character it would be.
_TRAIL = "[\x80-\xbfŒœŠšŸŽžƒˆ˜–-›€™]"
_DAMAGE = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ufffd]"  # U+0085 ends a line in some files
    f"|[ÂÃ]{_TRAIL}|[ÄÅ](?:\xa0(?=[a-z])|[\xa1-\xaa\xac-\xba\xbc-\xbf])|â€.|[ÐÑ]{_TRAIL}[ÐÑ]"
)


class RowChecks:
    """The checks of a row; the chat template of ``tokenizer`` defines which markers separate turns."""

    def __init__(self, tokenizer: Any) -> None:
        own = ControlTokens(tokenizer).of_turns() | {tokenizer.eos_token}
        markers = {token for token in own if len(token) > 2 and not token.isalnum()} | set(_MARKERS)
        self.markers = re.compile("|".join(map(re.escape, sorted(markers, key=len, reverse=True))))
        self.eos: str = tokenizer.eos_token

    def issues(self, row: Row, texts: Texts, normalized: Texts) -> dict[str, str]:
        """Return the issues of a row by type, each with an excerpt."""
        issues = {}
        for name, text in zip(Texts._fields, texts, strict=True):
            if damage := find_damage(text):
                issues["encoding"] = f"{name}: {_around(text, damage)}"
        for name in ("chosen", "rejected"):
            for text in self._contents(getattr(row, name)):
                prose = without_code(text)
                if marker := self.markers.search(prose):
                    issues["markers"] = f"{name}: {_around(text, marker)}"
            if not _WORD.search(getattr(normalized, name)):
                issues["empty_response"] = f"{name}: {shortened(getattr(texts, name))}"
        if normalized.chosen == normalized.rejected:
            issues["same_words"] = f"{shortened(texts.chosen)} / {shortened(texts.rejected)}"
        if len(thinking := [name for name in ("chosen", "rejected") if _has_thinking(getattr(row, name))]) == 1:
            issues["thinking"] = f"only the {thinking[0]}: {shortened(texts.prompt)}"
        return issues

    def _contents(self, response: Text) -> list[str]:
        if isinstance(response, str):
            return [response.rstrip().removesuffix(self.eos)]
        return [message["content"] for message in response if message.get("content") and message["role"] != "tool"]


def find_damage(text: str) -> re.Match[str] | None:
    """Find control characters, replacement characters and UTF-8 that was decoded as another encoding."""
    return None if text.isascii() and text.isprintable() else _DAMAGE.search(text)


def without_code(text: str) -> str:
    """Replace code, in fences or backticks, by backticks."""
    return _CODE.sub(lambda code: "`" * len(code[0]), text) if "`" in text or "~~~" in text else text


def thinks(text: str) -> bool:
    """Return whether a response contains thinking, not just a pair of tags; the prompt may have opened it."""
    before, closed, _ = text.partition("</think>")
    return ("<think>" in before or bool(closed)) and bool(before.rpartition("<think>")[2].strip())


def _has_thinking(response: Text) -> bool:
    if isinstance(response, str):
        return thinks(response)
    return any(turn.get(REASONING) or thinks(str(turn.get("content"))) for turn in response)


def _around(text: str, match: re.Match[str]) -> str:
    start = max(match.start() - CONTEXT, 0)
    return "…" * (start > 0) + shortened(text[start:], match.end() - start + CONTEXT)
