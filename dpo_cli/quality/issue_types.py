"""Every kind of finding once: how bad it is, what it is, what to do about it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

REASONS = 50  # told apart


@dataclass(frozen=True, slots=True)
class Kind:
    """What is said of a finding; ``problem``: ``--strict`` fails on it, and ``--fix`` leaves its rows out."""

    name: str
    problem: bool
    title: str
    what: str
    todo: str


def _problem(name: str, title: str, what: str, todo: str) -> Kind:
    return Kind(name, True, title, what, todo)


def _note(name: str, title: str, what: str, todo: str) -> Kind:
    return Kind(name, False, title, what, todo)


# In the order in which they are told, and in which --fix gives a row's reason.
KINDS = {
    kind.name: kind
    for kind in (
        _problem(
            "refused", "refused rows", "`dpo train` cannot use them.", "Mend them, or train with --on-bad-row skip."
        ),
        _problem(
            "encoding",
            "damaged encoding",
            "Text that was decoded as another encoding, replacement characters or control characters.",
            "Export the data again as UTF-8; ftfy can repair some of it.",
        ),
        _problem(
            "markers",
            "template markers in a response",
            "A response holds tokens with which a chat template parts turns, outside code.",
            "Remove them: the template writes its own.",
        ),
        _problem(
            "next_turn",
            "responses that go on into the next turn",
            "Behind the answer a turn of the user or another answer begins.",
            "Cut the response at its end: else the model learns to speak for the user.",
        ),
        _problem(
            "near_identical",
            "pairs of the same words",
            "The two responses differ in punctuation and spaces only, so the pair teaches noise.",
            "Drop them, or make clear what is better.",
        ),
        _problem(
            "contradiction",
            "contradictions",
            "On one prompt a response is chosen over another, and rejected for it elsewhere.",
            "Decide for one side, or drop both.",
        ),
        _problem(
            "cycle",
            "preference cycles",
            "On one prompt A is chosen over B, B over C, and C over A.",
            "Decide for an order, or drop the rows.",
        ),
        _problem(
            "leak_row",
            "rows that are in --eval-data too",
            "What is trained on is evaluated on, so the evaluation says nothing.",
            "Remove them from one of the two.",
        ),
        _problem(
            "leak_prompt",
            "prompts that are in --eval-data too",
            "The prompt is evaluated on, with other responses.",
            "Split by prompt, not by row.",
        ),
        _problem(
            "leak_near",
            "rows nearly as in --eval-data",
            "All but a few words are evaluated on.",
            "Remove them from one of the two.",
        ),
        _problem(
            "duplicate",
            "copies of other rows",
            "Prompt and responses equal another row's but for case and spaces.",
            "Drop them: a copy counts like an epoch more of its row.",
        ),
        _note(
            "near_duplicate",
            "near-copies of earlier rows",
            "Prompt and responses are an earlier row's but for a few words.",
            "Drop them if they are not meant to weigh more.",
        ),
        _note(
            "few_edits",
            "pairs that differ in few characters",
            "The two responses differ in case, or in few characters of a long text.",
            "Fine where that is what is taught; else drop them.",
        ),
        _note(
            "prompt_cut", "shortened prompts", "Longer than --max-length; the oldest turns go.", "Raise --max-length."
        ),
        _note("response_cut", "shortened responses", "Longer than --max-length; the end goes.", "Raise --max-length."),
        _note(
            "boundary_moved",
            "boundaries that moved",
            "A token spans the end of the prompt and the response's beginning, and counts to the response.",
            "Harmless; to avoid it let the space between the two begin the response, or use messages.",
        ),
        _note(
            "control_tokens",
            "control tokens in messages",
            "A message holds a token that the model's template or tokenizer treats as its own.",
            "Use --control-tokens sanitize, unless they are meant.",
        ),
        _note(
            "thinking",
            "thinking on one side only",
            "One response thinks before it answers, and the other does not.",
            "Such pairs teach to think, or not to: give both responses their thinking, or neither.",
        ),
        _note(
            "empty_response",
            "responses without a word",
            "A response has neither a letter nor a digit.",
            "Look at them.",
        ),
        _note(
            "refusal_chosen",
            "refusals that are chosen",
            "The chosen response is a refusal and nothing else.",
            "Fine where harmlessness is taught; else the model learns to refuse.",
        ),
        _note(
            "refusal_rejected",
            "refusals that are rejected",
            "The rejected response is a refusal and nothing else.",
            "Fine where helpfulness is taught; else the model unlearns to refuse.",
        ),
        _note(
            "script",
            "responses in another script",
            "Prompt and response are written in different scripts, such as Latin and Cyrillic.",
            "Look at them: answers in the wrong language look like this.",
        ),
        _note(
            "length_bias",
            "length tells which is chosen",
            "Who always prefers the longer (or the shorter) response is right this often.",
            "A trained model must beat that; balance lengths, or use a loss that divides by them.",
        ),
        _note("other", "tokenizing", "Said when the row was tokenized.", "Look at them."),
    )
}
BITS = {name: 1 << place for place, name in enumerate(KINDS)}
PROBLEMS = sum(BITS[name] for name, kind in KINDS.items() if kind.problem)


class Found:
    """How often each kind was met in each data, and the first rows of each."""

    def __init__(self, examples: int) -> None:
        self.most = examples
        self.counts: Counter[tuple[str, str, str]] = Counter()  # of each data, kind and reason
        self.examples: dict[tuple[str, str, str], list[dict[str, str]]] = {}
        self.whole: dict[tuple[str, str, str], str] = {}  # the reason of all rows of a key, where they have one

    def add(
        self,
        data: str,
        kind: str,
        where: str,
        text: str,
        reason: str = "",
        other: str = "",
        apart: bool = False,
        whole: str = "",
    ) -> None:
        """Count a row, and keep it as an example if there are not enough yet; ``apart``: its reason is always named.

        ``whole`` is the reason with what differs from row to row; it is shown if all rows of the reason share it.
        """
        if (data, kind, reason) not in self.counts and len(self.counts) > REASONS and not apart:
            reason = "other reasons" if reason else ""
        key = data, kind, reason
        self.counts[key] += 1
        if self.whole.setdefault(key, whole) != whole:
            self.whole[key] = ""
        self.show(data, kind, where, text, other, reason, whole)

    def show(
        self, data: str, kind: str, where: str, text: str, other: str = "", reason: str = "", whole: str = ""
    ) -> None:
        """Keep an example only; ``other`` is where the row stands that it is compared with."""
        some = self.examples.setdefault((data, kind, reason), [])
        if len(some) < self.most:
            more = {"other": other, "reason": whole if whole != reason else ""}
            some.append({"where": where, "text": text} | {name: value for name, value in more.items() if value})

    def listed(self, rows: dict[str, int]) -> list[dict[str, Any]]:
        """Every finding as it is shown: problems first, then as in ``KINDS``; ``rows`` of each data."""
        order = list(KINDS)

        def rank(key: tuple[str, str, str]) -> tuple[bool, int, str, int]:
            return not KINDS[key[1]].problem, order.index(key[1]), key[0], -self.counts[key]

        findings = []
        for key in sorted(self.counts, key=rank):
            data, kind, reason = key
            about, examples = KINDS[kind], self.examples.get(key, [])
            if whole := self.whole.get(key):
                reason, examples = whole, [{k: v for k, v in each.items() if k != "reason"} for each in examples]
            findings.append(
                {
                    "kind": kind,
                    "severity": "problem" if about.problem else "note",
                    "data": data,
                    "title": f"{about.title}: {reason}" if reason else about.title,
                    "count": self.counts[key],
                    "share": self.counts[key] / rows[data],
                    "what": about.what,
                    "todo": about.todo,
                    "examples": examples,
                }
            )
        return findings
