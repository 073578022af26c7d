"""What can be wrong with one row that can be trained on."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator
from typing import Any, NamedTuple

from dpo_cli.columns import Text
from dpo_cli.data import Row
from dpo_cli.records import shortened
from dpo_cli.scripts import script_mismatch
from dpo_cli.template import ControlTokens

ROUND = 30  # characters shown on either side of what was found


class Texts(NamedTuple):
    """The text of a row's parts."""

    prompt: str
    chosen: str
    rejected: str


def texts_of(row: Row) -> Texts:
    """All that is said in each part of a row; of messages their contents and calls."""
    return Texts(_text(row.prompt), _text(row.chosen), _text(row.rejected))


def _text(value: Text) -> str:
    if isinstance(value, str):
        return value
    parts = []
    for message in value:
        parts.append(message.get("content") or "")
        if message.get("tool_calls"):
            parts.append(json.dumps(message["tool_calls"], sort_keys=True, default=str))
    return "\n".join(parts)


def normalized(text: str) -> str:
    """The text in NFKC, without case, each run of spaces as one."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return " ".join(text.casefold().split())


class RowFindings:
    """Looks at one row after the other; ``tokenizer`` says which markers are its own."""

    def __init__(self, tokenizer: Any) -> None:
        own = {*ControlTokens(tokenizer).ids, *tokenizer.all_special_tokens}
        own = {token for token in own if len(token) > 2 and not token.isalnum()}
        self.markers = re.compile("|".join([_MARKERS, *map(re.escape, sorted(own, key=len, reverse=True))]))
        self.begin = tuple({token[0] for token in own} | set("<["))  # no marker without one of them
        self.eos: str = tokenizer.eos_token

    def of(self, row: Row, texts: Texts, plain: Texts) -> Iterator[tuple[str, str]]:
        """Yield (kind, excerpt) of what is wrong; ``plain`` is ``texts`` normalized."""
        for name, text in zip(Texts._fields, texts, strict=True):
            if damage := _damage(text):
                yield "encoding", f"{name}: {_around(text, damage)}"
                break
        kinds: set[str] = set()
        for name in ("chosen", "rejected"):
            for kind, excerpt in self._of_response(getattr(row, name), getattr(plain, name), name):
                if kind not in kinds:
                    kinds.add(kind)
                    yield kind, excerpt
        if told := near_identical(plain.chosen, plain.rejected):
            yield "near_identical", told
        if told := script_mismatch(*texts):
            yield "script", f"{told}: {shortened(texts.prompt)}"

    def _of_response(self, response: Text, plain: str, name: str) -> Iterator[tuple[str, str]]:
        contents = [response.rstrip().removesuffix(self.eos)] if isinstance(response, str) else _contents(response)
        for text in contents:
            if any(begin in text for begin in self.begin) and (found := self.markers.search(text)):
                yield "markers", f"{name}: {_around(text, found)}"
            if found := _next_turn(text):
                yield "next_turn", f"{name}: {_around(text, found)}"
        if not _WORD.search(plain):
            yield "empty_response", f"{name}: {shortened(plain)}"
        elif is_refusal(plain):
            yield f"refusal_{name}", shortened(plain, 80)


def _contents(messages: list[dict[str, Any]]) -> list[str]:
    return [message["content"] for message in messages if message.get("content") and message["role"] != "tool"]


def _around(text: str, found: re.Match[str]) -> str:
    """What was found, with some of the text around it."""
    start = max(found.start() - ROUND, 0)
    return "…" * (start > 0) + shortened(text[start:], found.end() - start + ROUND)


_WORD = re.compile(r"[^\W_]")

# ---- encoding ---------------------------------------------------------------------------------------------------

_CONTROLS = re.compile("[\x00-\x08\x0e-\x1f\x7f]")
# U+0085 is a line's end to some. A capital and a non-breaking space in a word are two bytes, and ftfy lets them pass.
_BROKEN = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ufffd]|[ÃÄÅ]\xa0(?=[a-z])")


def _damage(text: str) -> re.Match[str] | None:
    """Where characters stand that no one wrote."""
    if text.isascii():
        return None if text.isprintable() else _CONTROLS.search(text)
    if found := _BROKEN.search(text):
        return found
    from ftfy import fix_encoding
    from ftfy.badness import BADNESS_RE

    found = BADNESS_RE.search(text)
    return found if found and fix_encoding(text) != text else None


# ---- markers and turns ------------------------------------------------------------------------------------------

_MARKERS = (
    r"<\|[A-Za-z][\w.-]{0,40}\|>|<｜[^｜<>\s]{1,40}｜>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|<(?:bos|eos)>"
    r"|\[gMASK\]|</s>\s*(?:\Z|<s>|\[INST\])|<s>\s*\[INST\]"
)
_SPEAKERS = r"(?:User|USER|Human|HUMAN)"
_ANSWERERS = r"(?:Assistant|ASSISTANT|AI|Bot|Chatbot)"
_NEXT_TURN = re.compile(
    r"(?:^|\n)[ \t]*#{2,4} ?(?:Instruction|Input|Response|Human|Assistant|User)s?:"
    rf"|\n[ \t\r]*\n(?:Human|Assistant|User|USER|ASSISTANT):"
    # one line break: a user who says more than a word, or is answered, and no form with more fields
    rf"|\n{_SPEAKERS}:(?=[ \t]*\S+[ \t]+\S|\s*\Z|[^\n]*\n\s*{_ANSWERERS}:)"
    rf"(?![^\n]*\n(?!{_ANSWERERS})[A-Z][\w ]{{0,20}}:)"
)
_DIALOGUE = re.compile(rf"\s*(?:{_SPEAKERS}|{_ANSWERERS}):")


def _next_turn(text: str) -> re.Match[str] | None:
    """Where another turn begins; a response that is a dialogue from its first word on was meant to be one."""
    if "\n" not in text and "##" not in text:
        return None
    found = _NEXT_TURN.search(text)
    return found if found and not _DIALOGUE.match(text) else None


# ---- refusals ---------------------------------------------------------------------------------------------------

MOST_OF_REFUSAL = 150  # characters: a longer one says something beside
_CANNOT = (
    r"(?:can't|cannot|can not|won't|will not|(?:am|'m|are|'re) (?:\w+ )?(?:unable|not able)"
    r"|(?:am|'m) not (?:comfortable|going|allowed|permitted|programmed)|unable|not able|must decline|have to decline"
    r"|decline|refuse|don't feel comfortable|do not feel comfortable)"
)
_DO = (
    r"(?:(?:help|assist|answer|comply|support|respond|discuss|engag|fulfill?|continu|shar|creat|writ|giv|generat|offer"
    r"|advis|complet|participat|provid|talk)(?:e|ing)?|do(?:ing)? (?:that|this|it|so)|with (?:that|this|your))"
)
_REFUSAL = re.compile(
    r"(?:oh,? |no,? |well,? )?(?:(?:i'm|i am|we're|we are) (?:\w+ )?sorry|sorry|my apologies|i apologi[sz]e|apologies"
    r"|unfortunately|as an? (?:ai|artificial|language|large|assistant|chatbot)|i|we)\b"
    rf"[^.!?]{{0,60}}[.,!]?[^.!?]{{0,60}}?\b{_CANNOT}\b(?! wait)[^.!?]{{0,60}}?\b{_DO}\b"
)
_BESIDE = re.compile(
    r"\b(?:but|instead|however|try|you can|you could|you might|let me|here (?:is|are)|because)\b|[:\"]"
)


def is_refusal(plain: str) -> bool:
    """Whether a normalized response is a refusal and nothing else."""
    if len(plain) > MOST_OF_REFUSAL:
        return False
    plain = plain.replace("’", "'")
    found = _REFUSAL.match(plain)
    return found is not None and not _BESIDE.search(plain, found.end())


# ---- responses that hardly differ -------------------------------------------------------------------------------

LONG, SOME = 120, 50  # characters of a response in which an edit is small, or one of a letter or two is
LONGEST = 2**15  # characters: counting the edits of longer ones takes too long
_END, _START = ".,;:!?…。！？，、'\"”’»)]", "'\"“‘«(["
_NUMBERS = re.compile(r"\d+(?:[.,]\d+)*|\b[b-e]\b")  # and letters that stand for an answer
_NEGATIONS = re.compile(r"\b(?:not|no|yes|never|none|true|false|cannot|without|\w+n[’']t)\b")


def loose(plain: str) -> list[str]:
    """A normalized text's words, without the punctuation around them."""
    return [stripped for word in plain.split() if (stripped := word.rstrip(_END).lstrip(_START))]


def near_identical(chosen: str, rejected: str) -> str | None:
    """Where two normalized responses differ, if that is in nothing that means something; else None.

    That is in case, spaces and punctuation, or in 5 % of the characters of a long text (2 % of a shorter one) if no
    number, single letter or negation is among them.
    """
    from rapidfuzz.distance import Levenshtein

    longer, shorter = max(len(chosen), len(rejected)), min(len(chosen), len(rejected))
    if longer - shorter > max(longer // 20, 8):
        return None
    words = loose(chosen), loose(rejected)
    if words[0] != words[1] or not words[0]:
        most = 0 if longer > LONGEST else shorter // 20 if shorter >= LONG else shorter // SOME
        edits = Levenshtein.distance(chosen, rejected, score_cutoff=most) if most else 1
        if edits > most or _says_other(_NUMBERS, chosen, rejected):
            return None
        if edits > 1 and _says_other(_NEGATIONS, chosen, rejected):  # one letter is a slip
            return None
    return _difference(chosen, rejected)


def _says_other(what: re.Pattern[str], a: str, b: str) -> bool:
    return sorted(what.findall(a)) != sorted(what.findall(b))


def _difference(chosen: str, rejected: str) -> str:
    """Both responses from a little before where they first differ."""
    differs = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), -1)
    if chosen == rejected:
        return f"only case or spaces: {shortened(chosen)}"
    start = max((differs if differs >= 0 else min(len(chosen), len(rejected))) - ROUND // 2, 0)
    return " / ".join("…" * (start > 0) + shortened(text[start:], ROUND) for text in (chosen, rejected))
