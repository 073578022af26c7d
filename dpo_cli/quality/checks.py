"""What can be wrong with one row that can be trained on."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator
from typing import Any, NamedTuple

from dpo_cli.data.columns import REASONING, Text
from dpo_cli.data.formats import HH_HUMAN, Row
from dpo_cli.data.records import shortened
from dpo_cli.data.template import ControlTokens
from dpo_cli.quality.scripts import script_mismatch

ROUND = 30  # characters shown on either side of what was found


class Texts(NamedTuple):
    """The text of a row's parts."""

    prompt: str
    chosen: str
    rejected: str


def texts_of(row: Row) -> Texts:
    """All that is said in each part of a row; of messages their reasoning, contents and calls."""
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


def normalized(text: str) -> str:
    """The text in NFC, without case, each run of spaces as one."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    return " ".join(text.casefold().split())


def plain_of(row: Row, texts: Texts) -> Texts:
    """A row's texts normalized; tools and what else the template is given belong to the prompt."""
    plain = Texts(*map(normalized, texts))
    if not row.template_arguments:
        return plain
    return plain._replace(prompt=f"{plain.prompt}\n{json.dumps(row.template_arguments, sort_keys=True, default=str)}")


class RowFindings:
    """Looks at one row after the other; ``tokenizer`` says which markers are its own."""

    def __init__(self, tokenizer: Any) -> None:
        own = ControlTokens(tokenizer).of_turns() | {tokenizer.eos_token}
        own = {token for token in own if len(token) > 2 and not token.isalnum()} | set(_MARKERS)
        self.markers = re.compile("|".join(map(re.escape, sorted(own, key=len, reverse=True))))
        self.begin = {token[0] for token in own}  # no marker without one of them
        self.eos: str = tokenizer.eos_token

    def of(self, row: Row, texts: Texts, plain: Texts) -> Iterator[tuple[str, str]]:
        """Yield (kind, excerpt) of what is wrong; ``plain`` is ``texts`` normalized."""
        for name, text in zip(Texts._fields, texts, strict=True):
            if damage := _damage(text):
                yield "encoding", f"{name}: {_around(text, damage)}"
                break
        asked = _last_turn(row.prompt)
        kinds: set[str] = set()
        for name in ("chosen", "rejected"):
            for kind, excerpt in self._of_response(asked, getattr(row, name), getattr(plain, name), name):
                if kind not in kinds:
                    kinds.add(kind)
                    yield kind, excerpt
        if told := same_words(texts.chosen, texts.rejected):
            yield "near_identical", told
        elif told := few_edits(texts.chosen, texts.rejected):
            yield "few_edits", told
        if len(thinking := [name for name in ("chosen", "rejected") if _has_thinking(getattr(row, name))]) == 1:
            yield "thinking", f"only the {thinking[0]}: {shortened(texts.prompt)}"
        if told := script_mismatch(*texts):
            yield "script", f"{told}: {shortened(texts.prompt)}"

    def _of_response(self, asked: str, response: Text, plain: str, name: str) -> Iterator[tuple[str, str]]:
        contents = [response.rstrip().removesuffix(self.eos)] if isinstance(response, str) else _contents(response)
        for text in contents:
            prose = _without_code(text)
            if any(begin in prose for begin in self.begin) and (found := self.markers.search(prose)):
                yield "markers", f"{name}: {_around(text, found)}"
            if found := next_turn(asked, prose):
                yield "next_turn", f"{name}: {_around(text, found)}"
        if not _WORD.search(plain):
            yield "empty_response", f"{name}: {shortened(plain)}"
        elif is_refusal(plain):
            yield f"refusal_{name}", shortened(plain, 80)


def _last_turn(prompt: Text) -> str:
    """What the user says last."""
    if isinstance(prompt, str):
        return prompt.rpartition(HH_HUMAN)[2]
    return next((turn.get("content") or "" for turn in reversed(prompt) if turn["role"] == "user"), "")


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


def thinks(text: str) -> bool:
    """Whether a response has thinking in it, which is more than a pair of tags; the prompt may have opened it."""
    before, closed, _ = text.partition("</think>")
    return ("<think>" in before or bool(closed)) and bool(before.rpartition("<think>")[2].strip())


def _has_thinking(response: Text) -> bool:
    if isinstance(response, str):
        return thinks(response)
    return any(turn.get("reasoning_content") or thinks(str(turn.get("content"))) for turn in response)


_MARKERS = (
    *("<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "[INST]", "[/INST]"),
    *("<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>"),
)
_CODE = re.compile(r"```.*?(?:```|\Z)|~~~.*?(?:~~~|\Z)|`[^`\n]*`", re.DOTALL)


def _without_code(text: str) -> str:
    """The text with backticks for all that stands in fences and backticks."""
    return _CODE.sub(lambda found: "`" * len(found[0]), text) if "`" in text or "~~~" in text else text


_SPEAKERS = r"(?:User|USER|Human|HUMAN)"
_ANSWERERS = r"(?:Assistant|ASSISTANT|AI|Bot|Chatbot)"
_NEXT_TURN = re.compile(
    r"\n[ \t\r]*\n(?:Human|HUMAN|Assistant|ASSISTANT):|\n#{2,4} ?(?:Instruction|Human|User):"
    rf"|\n{_SPEAKERS}:(?=[^\n]*\n\s*{_ANSWERERS}:)"
)
_DIALOGUE = re.compile(rf"\s*[#*]*\s*(?:{_SPEAKERS}|{_ANSWERERS})\b[*]*:")
_LABEL = re.compile(r"[ \t*-]*[A-Z][\w ]{0,20}[*]*:")
_ENTRY = re.compile(_LABEL.pattern + r".{0,50}\Z")  # of a list or a form
_HEADING = re.compile(r"^#{1,6} ", re.MULTILINE)
_DIALOGUE_ASKED = re.compile(
    r"dialog|\bscript|conversation|template|transcript|interview (?:with|between)|role.?play"
    r"|di[áà]log|gespräch|conversaci|对话|對話|会話"
)


def next_turn(asked: str, prose: str) -> re.Match[str] | None:
    """Where another turn begins behind an answer, in a response without its code; not where dialogues are asked for.

    Nor is that an entry of a list or a form, in which the lines around it begin with other names.
    """
    found = _NEXT_TURN.search(prose) if "\n" in prose else None
    if found is None or _DIALOGUE.match(prose) or _DIALOGUE_ASKED.search(asked.casefold()):
        return None
    answer = prose[: found.start()].rstrip()
    last = [line for line in answer[-1000:].split("\n") if line.strip()][-2:]
    if answer.endswith(":") or all(map(_ENTRY.match, last)):
        return None
    if "#" in found[0]:
        return None if _HEADING.search(answer) else found
    behind = next(filter(_LABEL.match, prose[found.end() :].split("\n")[1:]), None)
    return found if behind is None or _DIALOGUE.match(behind) else None


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
NEGATIONS = re.compile(r"\b(?:not|no|yes|never|none|true|false|cannot|without|\w+n[’']t)\b")


def loose(plain: str) -> list[str]:
    """A normalized text's words, without the punctuation around them."""
    return [stripped for word in plain.split() if (stripped := word.rstrip(_END).lstrip(_START))]


# What means something in code and in maths: indentation, operators, brackets, signs that are no prose's.
_SIGNS = re.compile(
    r"`|\n[ \t]+\S|\A\s*[\[{]|;[ \t]*$|\w[(\[]\w|[=<>^{}\\|&_+$~@#%²³¹⁰-₟×÷−∀-⋿]|[\w)] [*/-] [\w(]|\d!|\]\("
    r"|[(\[] ?-?[\w.]+,",
    re.MULTILINE,
)


def same_words(chosen: str, rejected: str) -> str | None:
    """Where two responses differ, if only in spaces and punctuation around words, and neither is code or maths."""
    texts = [unicodedata.normalize("NFC", text).strip() for text in (chosen, rejected)]
    lines = [text.split("\n") for text in texts]
    if len(lines[0]) != len(lines[1]) or any(loose(a) != loose(b) for a, b in zip(*lines, strict=True)):
        return None
    if not any(map(loose, lines[0])) or _SIGNS.search(chosen) or _SIGNS.search(rejected):
        return None
    return _difference(*texts)


def few_edits(chosen: str, rejected: str) -> str | None:
    """Where two responses differ, if that is in case or in few characters of a long text; else None.

    Few are 5 % (2 % of a shorter text) if no number, single letter or negation is among them.
    """
    from rapidfuzz.distance import Levenshtein

    texts = [" ".join(unicodedata.normalize("NFC", text).casefold().split()) for text in (chosen, rejected)]
    shorter, longer = sorted(map(len, texts))
    if longer - shorter > max(longer // 20, 8):
        return None
    words = [loose(text) for text in texts]
    if words[0] != words[1] or not words[0]:
        most = 0 if longer > LONGEST else shorter // 20 if shorter >= LONG else shorter // SOME
        edits = Levenshtein.distance(*texts, score_cutoff=most) if most else 1
        if edits > most or _says_other(_NUMBERS, *texts):
            return None
        if edits > 1 and _says_other(NEGATIONS, *texts):  # one letter is a slip
            return None
    return _difference(chosen, rejected)


def _says_other(what: re.Pattern[str], a: str, b: str) -> bool:
    return sorted(what.findall(a)) != sorted(what.findall(b))


def _difference(chosen: str, rejected: str) -> str:
    """Both responses from a little before where they first differ."""
    differs = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), -1)
    start = max((differs if differs >= 0 else min(len(chosen), len(rejected))) - ROUND // 2, 0)
    return " / ".join("…" * (start > 0) + shortened(text[start:], ROUND) for text in (chosen, rejected))
