"""The accepted formats of a record: how a prompt and the answers to it are read from its columns."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

from dpo_cli.data.messages import Message, Text, answer_of, check_encodable, conversation, unwrap, user_turn
from dpo_cli.data.readers import json_value, shortened
from dpo_cli.utils.errors import RowError

Record = dict[str, Any]  # without nulls, under our names of its columns

HH_HUMAN, HH_ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
PROMPTS = ("prompt", "conversations", "messages", "instruction", "question", "input", "context")
QUESTIONS = ("question", "input")
ANSWERS = ("chosen", "rejected")
RANKED = ("responses", "completions", "generations")  # columns with several answers to a prompt
RANKS = ("scores", "ratings", "ranks")
PREFERRED = ("preferred_output", "non_preferred_output")
BETTER_FIRST = ("response_j", "response_k")
OWN_RANKS = ("rank", "score", "overall_score", "rating")  # of an answer, where no column ranks them
OTHERS = ("system", "tools", "chat_template_kwargs", "id", "weight", "margin")
COLUMNS = (*PROMPTS, "chosen", "rejected", "responses", "scores", "ranks", "history", *OTHERS)
LARGEST = 3e38  # in float32
GUESSES = {  # parts of others' names for our columns; "dispreferred" before "preferred"
    "rejected": ("reject", "bad", "worse", "worst", "disprefer", "not_prefer"),
    "prompt": ("prompt", "question", "instruction", "query"),
    "chosen": ("good", "better", "best", "preferred", "accepted"),
}
PAIRINGS = {  # of --pairs: which of several ranked answers are compared
    "best-worst": "the best against the worst",
    "adjacent": "each against the next lower",
    "all": "each against every lower one",
    "ranking": "whole rankings",
}
TIES_LEFT_OUT = "rows with answers left out of their ranking, since an earlier one has the same score or rank"


def suggested_columns(row: Record) -> str:
    """Return the option that maps a row's columns to ours, guessed by their names; empty where one is not found."""
    guessed: dict[str, str] = {}
    for ours, words in GUESSES.items():
        names = [name for name in row if name not in guessed.values() and not name.endswith("id")]
        alike = [name for name in names if any(word in name.lower() for word in words)]
        near = [ours] * (ours in row) or alike or difflib.get_close_matches(ours, names, 1)
        if len(near) != 1:
            return ""
        guessed[ours] = near[0]
    names_of = ((ours, guessed[ours]) for ours in ("prompt", "chosen", "rejected"))
    renamed = ",".join(f"{ours}={name}" for ours, name in names_of if ours != name)
    return f"--columns {renamed}" if renamed else ""


def _missing(row: Record, column: str) -> RowError:
    """The error of a row without a column, with the option that names one of its own instead."""
    if columns := suggested_columns(row):
        return RowError(f"{column} is missing; to read yours: {columns}")
    if not row or {"chosen", "rejected"} & row.keys():
        return RowError(f"{column} is missing")
    names = ", ".join(shortened(name) for name in list(row)[:8])
    return RowError(
        f"{column} is missing; the row has {names} (name yours as --columns prompt=NAME,chosen=NAME,rejected=NAME)"
    )


# ---- values of a column -----------------------------------------------------------------------------------------


def text(row: Record, column: str, kind: type[Any] | None = None) -> Any:
    """Return a string or normalized messages, or the one that ``kind`` asks for; neither of them empty."""
    value = row.get(column)
    if value is None:
        raise _missing(row, column)
    if isinstance(value, dict) and isinstance(value.get("messages"), list):
        if (tools := value.get("tools")) and row.setdefault("tools", tools) != tools:
            raise RowError(f"{column} has other tools than the row or the other answer")
        value = value["messages"]
    if isinstance(value, (dict, list)):
        value = conversation([value] if isinstance(value, dict) else value, column)
    elif isinstance(value, str):
        check_encodable(value, column)
    else:
        number_or = "a number" if isinstance(value, (int, float)) else "no text"
        raise RowError(f"{column} is {number_or}; it must be a string or a list of messages")
    if not (value.strip() if isinstance(value, str) else value):
        raise RowError(f"{column} is empty")
    if kind and not isinstance(value, kind):
        raise RowError(f"{column} must be {'a string' if kind is str else 'a list of messages'} in this format")
    return value


def number(row: Record, column: str, default: float) -> float:
    """Return a number that is finite in float32; a string may hold it, as in CSV."""
    value = row.get(column)
    if value is None or value == "":
        return default
    try:
        result = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        result = math.nan
    if not abs(result) < LARGEST:
        raise RowError(f"{column} must be a finite number, not {shortened(repr(value))}")
    return result


def parsed(row: Record, column: str, kind: type[Any]) -> Any:
    """Return a list or an object, which may be JSON text; empty if there is none."""
    value = row.get(column)
    if isinstance(value, str):
        value = json_value(value) if value.strip() else None
        if value is None and row[column].strip():
            raise RowError(f"{column} is not JSON")
    if value is None:
        return kind()
    if not isinstance(value, kind):
        raise RowError(f"{column} must be a {'list' if kind is list else 'JSON object'}")
    return value


# ---- readers ----------------------------------------------------------------------------------------------------


class Texts(NamedTuple):
    """A prompt and its answers, best first; equal ``levels`` give two of them no order. ``scored``: they are scores."""

    prompt: Text
    answers: tuple[Text, ...]
    levels: tuple[float, ...] = (1.0, 0.0)
    scored: bool = False
    notes: frozenset[str] = frozenset()


class Format(NamedTuple):
    """What a format is called, its reader, and its columns; of ``prompts`` a row's first is read, as a ``kind``.

    ``pairs`` is what a reader of more than two answers reads: a key of ``PAIRINGS``.
    """

    label: str
    read: Callable[[Record, Format], Texts]
    prompts: tuple[str, ...] = ()
    kind: type[Any] | None = None
    answers: tuple[str, ...] = ANSWERS
    more: tuple[str, ...] = ()
    pairs: str = "best-worst"

    @property
    def columns(self) -> set[str]:
        """All columns that it reads, but for ``OTHERS``."""
        return {*self.prompts, *self.answers, *self.more}


def common_prefix(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Return the length of the common prefix of two sequences."""
    shortest = min(len(a), len(b))
    return next((i for i in range(shortest) if a[i] != b[i]), shortest)


def answer_names(count: int) -> tuple[str, ...]:
    """Name the answers of a row, best first."""
    return ("chosen", *(f"answer {number}" for number in range(2, count)), "rejected")


def _strings(row: Record, format_: Format) -> Texts:
    return Texts(text(row, "prompt", str), tuple(text(row, name, str) for name in format_.answers))


def _turns(row: Record, format_: Format) -> Texts:
    """Read a prompt and its answers."""
    column = next((name for name in format_.prompts if name in row), format_.prompts[0])
    return _answered(text(row, column, format_.kind), row, format_.answers)


def _answered(prompt: Text, row: Record, answers: Sequence[str] = ANSWERS) -> Texts:
    """Read the answers to a prompt, which is the user's turn if it is a string; they may repeat it."""
    turns = user_turn(prompt) if isinstance(prompt, str) else prompt
    whole = [answer_of(text(row, name)) for name in answers]
    if turns in whole:  # the prompt is one of the whole conversations
        return _split(*whole)
    n = len(turns) if all(each[: len(turns)] == turns for each in whole) else 0
    return Texts(turns, tuple(each[n:] for each in whole))


def _conversations(row: Record, _: Format) -> Texts:
    return _split(text(row, "chosen", list), text(row, "rejected", list))


def _split(*whole: list[Message]) -> Texts:
    """Split conversations where they differ; answers before a user's turn that differs are no prompt."""
    cut = min(common_prefix(whole[0], other) for other in whole[1:])
    while cut and whole[0][cut - 1]["role"] == "assistant":
        cut -= 1
    return Texts(whole[0][:cut], tuple(each[cut:] for each in whole))


def _hh(row: Record, _: Format) -> Texts:
    """Cut two dialogues after the last ``Assistant:`` that both share."""
    chosen, rejected = text(row, "chosen", str), text(row, "rejected", str)
    before_chosen, before_rejected = (dialogue.split(HH_ASSISTANT)[:-1] for dialogue in (chosen, rejected))
    shared = before_chosen[: common_prefix(before_chosen, before_rejected)]
    if not any(HH_ASSISTANT in dialogue for dialogue in (chosen, rejected)):
        raise _missing(row, "prompt")
    if not shared:
        raise RowError("prompt is missing, and chosen and rejected share no dialogue that ends with 'Assistant:'")
    cut = sum(len(turn) + len(HH_ASSISTANT) for turn in shared)
    if any(mark in answer[cut:] for mark in (HH_HUMAN, HH_ASSISTANT) for answer in (chosen, rejected)):
        raise RowError("the dialogues differ before their last answer, so they have no common prompt")
    return Texts(chosen[:cut], (chosen[cut:], rejected[cut:]))


def _openai(row: Record, format_: Format) -> Texts:
    given = parsed(row, "input", dict)
    row.setdefault("tools", given.get("tools"))
    return _answered(text(given, "messages", list), row, format_.answers)


def _swift(row: Record, _: Format) -> Texts:
    """Split a conversation that ends with the chosen answer, beside the rejected answer or conversation."""
    whole = text(row, "messages", list)
    if "rejected_messages" in row:
        return _split(whole, text(row, "rejected_messages", list))
    if whole[-1]["role"] != "assistant":
        raise RowError("messages must end with the chosen answer, since rejected_response is the other")
    return Texts(whole[:-1], (whole[-1:], answer_of(text(row, "rejected_response"))))


def _alpaca(row: Record, _: Format) -> Texts:
    turns: list[Message] = []
    for exchange in parsed(row, "history", list):
        if not isinstance(exchange, list) or len(exchange) != 2 or not all(isinstance(each, str) for each in exchange):
            raise RowError("history must be a list of pairs of a question and an answer")
        turns += [*user_turn(exchange[0]), *answer_of(exchange[1])]
    parts = [text(row, name, str) for name in ("instruction", "input") if name == "instruction" or row.get(name)]
    return _answered([*turns, *user_turn("\n".join(parts))], row)


def _ultrafeedback(row: Record, format_: Format) -> Texts:
    """Split conversations with their prompt beside them; or answers alone, which the prompt precedes."""
    question, texts = text(row, "prompt", str), _conversations(row, format_)
    prompt, chosen = cast(list[Message], texts.prompt), cast(list[Message], texts.answers[0])
    questions = [" ".join(message["content"].split()) for message in prompt if message["role"] == "user"]
    if not questions and "user" not in {message["role"] for message in chosen}:
        return _turns(row, format_)
    if not any(" ".join(question.split()) in each for each in questions):
        raise RowError("prompt is not in the conversations beside it (--format conversations reads those alone)")
    return texts


def _ranked(row: Record, format_: Format) -> Texts:
    """Read the answers that ``format_.pairs`` compares; a ranking has the first of equally good ones."""
    column = next((name for name in PROMPTS if name in row), "prompt")
    answers = next((name for name in RANKED if name in row), "responses")
    prompt, responses = text(row, column), parsed(row, answers, list)
    levels, scored = _levels(row, answers, responses)
    if len(levels) != len(responses):
        raise RowError(f"{len(responses)} {answers} have {len(levels)} scores or ranks")
    rated = [place for place, level in enumerate(levels) if not math.isnan(level)]
    if len(rated) < 2:
        raise RowError(f"of {len(responses)} {answers} {len(rated)} have a score or rank; two are needed")
    best_first = sorted(rated, key=lambda place: -levels[place])
    distinct = [*{levels[place]: place for place in reversed(best_first)}.values()][::-1]  # the first of equals
    if len(distinct) < 2:
        raise RowError("all responses have the same score or rank, so none is better")
    read = {"best-worst": [distinct[0], distinct[-1]], "ranking": distinct}.get(format_.pairs, best_first)
    names = answer_names(len(read))
    row |= {name: unwrap(responses[place], name) for name, place in zip(names, read, strict=True)}
    as_strings = all(isinstance(row.get(name), str) for name in ("prompt", *names))
    texts = _strings(row, format_._replace(answers=names)) if as_strings else _answered(prompt, row, names)
    notes = [TIES_LEFT_OUT] * (format_.pairs == "ranking" and len(distinct) < len(rated))
    return texts._replace(levels=tuple(levels[place] for place in read), scored=scored, notes=frozenset(notes))


def _levels(row: Record, answers: str, responses: list[Any]) -> tuple[list[float], bool]:
    """Return how good each response is: its score, or minus its rank; NaN if it has none. And if they are scores."""
    column = next((name for name in row if name in RANKS), "")
    if column:
        values = [{column: value} for value in parsed(row, column, list)]
    else:
        own = (key for key in OWN_RANKS if all(isinstance(each, dict) and key in each for each in responses))
        column, values = next(own, ""), responses
    if not column:
        raise RowError(f"{answers} need scores or ratings (the higher the better) or ranks (the lower the better)")
    scored = column not in ("ranks", "rank")
    return [(1 if scored else -1) * number(each, column, math.nan) for each in values], scored


# ---- formats ----------------------------------------------------------------------------------------------------

FORMATS = {
    "strings": Format("prompt and responses as strings", _strings, ("prompt",)),
    "messages": Format("prompt and responses as messages", _turns, ("prompt",), list),
    "conversations": Format("conversations with a common prefix", _conversations),
    "hh": Format("dialogues as strings (HH)", _hh),
    "sharegpt": Format("a conversation and its two ends (ShareGPT)", _turns, ("conversations", "messages"), list),
    "alpaca": Format("instruction and input (Alpaca)", _alpaca, ("instruction",), more=("input", "history")),
    "orca": Format("question and answers (Orca)", _turns, QUESTIONS, str),
    "ultrafeedback": Format("conversations beside their prompt (UltraFeedback)", _ultrafeedback, ("prompt",)),
    "stackexchange": Format(
        "question, response_j and response_k (Stack Exchange)", _turns, QUESTIONS, str, BETTER_FIRST
    ),
    "ranked": Format("ranked responses", _ranked, PROMPTS, answers=(), more=(*RANKED, *RANKS)),
    "openai": Format("input, preferred and non-preferred output (OpenAI)", _openai, ("input",), list, PREFERRED),
    "swift": Format(
        "a conversation with the chosen answer, and the rejected one (ms-swift)", _swift, ("messages",), answers=()
    ),
}


def detect_format(row: Record) -> str:
    """Detect the format from the columns."""
    if "chosen" not in row:
        for name, columns in (
            ("ranked", RANKED),
            ("openai", ("preferred_output",)),
            ("stackexchange", ("response_j",)),
        ):
            if row.keys() & {*columns}:
                return name
        if "messages" in row and row.keys() & {"rejected_response", "rejected_messages"}:
            return "swift"
        if "label" in row and {"completion", "response"} & row.keys():
            raise RowError("chosen is missing: the row is one response with a label, and DPO compares two")
    has_messages = isinstance(row.get("chosen"), (list, dict))
    column = next((name for name in PROMPTS if name in row), None)
    if column is None:
        return "conversations" if has_messages else "hh"
    if column == "prompt" and not isinstance(row["prompt"], list):
        return "ultrafeedback" if has_messages else "strings"
    return {"prompt": "messages", "instruction": "alpaca", "question": "orca", "input": "orca"}.get(column, "sharegpt")
