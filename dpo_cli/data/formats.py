"""The accepted formats of a record: how prompt, chosen and rejected are read from its columns."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from dpo_cli.data.messages import (
    Message,
    Text,
    answer_of,
    check_encodable,
    conversation,
    unwrap,
    user_turn,
)
from dpo_cli.data.readers import json_value, shortened
from dpo_cli.utils.errors import RowError

Record = dict[str, Any]  # without nulls, under our names of its columns
PreferenceTexts = tuple[Text, Text, Text]  # prompt, chosen, rejected

HH_HUMAN, HH_ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
PROMPTS = ("prompt", "conversations", "messages", "instruction", "question", "input", "context")
RANKED = ("responses", "completions", "generations")  # columns with several answers to a prompt
OWN_RANKS = ("rank", "score", "overall_score", "rating")  # of an answer, where no column ranks them
OTHERS = ("system", "tools", "chat_template_kwargs", "id", "weight", "margin")
COLUMNS = (*PROMPTS, "chosen", "rejected", "responses", "scores", "ranks", "history", *OTHERS)
ANSWERS = ("chosen", "rejected", "preferred_output", "non_preferred_output", "response_j", "response_k")
LARGEST = 3e38  # in float32

# ---- values of a column -----------------------------------------------------------------------------------------


def text(row: Record, column: str) -> Text:
    """Return a string or normalized messages, neither of them empty."""
    value = row.get(column)
    if value is None:
        names = "" if {"chosen", "rejected"} & row.keys() else ", ".join(shortened(name) for name in list(row)[:8])
        hint = f"; the row has {names} (name yours as --columns prompt=NAME,chosen=NAME,rejected=NAME)" if names else ""
        raise RowError(f"{column} is missing{hint}")
    if isinstance(value, dict) and isinstance(value.get("messages"), list):
        if (tools := value.get("tools")) and row.setdefault("tools", tools) != tools:
            raise RowError(f"{column} has other tools than the row or the other answer")
        value = value["messages"]
    if isinstance(value, (dict, list)):
        value = conversation([value] if isinstance(value, dict) else value, column)
    elif isinstance(value, str):
        check_encodable(value, column)
    else:
        kind = "a number" if isinstance(value, (int, float)) else "no text"
        raise RowError(f"{column} is {kind}; it must be a string or a list of messages")
    if not (value.strip() if isinstance(value, str) else value):
        raise RowError(f"{column} is empty")
    checked: Text = value
    return checked


def string(row: Record, column: str) -> str:
    """Return a string that is not empty."""
    value = text(row, column)
    if not isinstance(value, str):
        raise RowError(f"{column} must be a string in this format")
    return value


def messages(row: Record, column: str) -> list[Message]:
    """Return a list of messages that is not empty."""
    value = text(row, column)
    if isinstance(value, str):
        raise RowError(f"{column} must be a list of messages in this format")
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


# ---- formats ----------------------------------------------------------------------------------------------------


def common_prefix(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Return the length of the common prefix of two sequences."""
    shortest = min(len(a), len(b))
    return next((i for i in range(shortest) if a[i] != b[i]), shortest)


def _strings(row: Record) -> PreferenceTexts:
    return string(row, "prompt"), string(row, "chosen"), string(row, "rejected")


def _answers(row: Record, chosen: str = "chosen", rejected: str = "rejected") -> tuple[list[Message], list[Message]]:
    return answer_of(text(row, chosen)), answer_of(text(row, rejected))


def _messages(row: Record) -> PreferenceTexts:
    return messages(row, "prompt"), *_answers(row)


def _question(row: Record) -> PreferenceTexts:
    answers = ("response_j", "response_k") if "response_j" in row else ("chosen", "rejected")
    return user_turn(string(row, "question" if "question" in row else "input")), *_answers(row, *answers)


def _conversations(row: Record) -> tuple[list[Message], list[Message], list[Message]]:
    return _split_at_difference(messages(row, "chosen"), messages(row, "rejected"))


def _split_at_difference(
    chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    cut = common_prefix(chosen, rejected)
    while cut and chosen[cut - 1]["role"] == "assistant":  # they differ from a user's turn on: no prompt precedes it
        cut -= 1
    return chosen[:cut], chosen[cut:], rejected[cut:]


def _hh(row: Record) -> PreferenceTexts:
    """Cut two dialogues after the last ``Assistant:`` that both share."""
    chosen, rejected = string(row, "chosen"), string(row, "rejected")
    before_chosen, before_rejected = (dialogue.split(HH_ASSISTANT)[:-1] for dialogue in (chosen, rejected))
    shared = before_chosen[: common_prefix(before_chosen, before_rejected)]
    if not shared:
        raise RowError("prompt is missing, and chosen and rejected share no dialogue that ends with 'Assistant:'")
    cut = sum(len(turn) + len(HH_ASSISTANT) for turn in shared)
    if any(mark in answer[cut:] for mark in (HH_HUMAN, HH_ASSISTANT) for answer in (chosen, rejected)):
        raise RowError("the dialogues differ before their last answer, so they have no common prompt")
    return chosen[:cut], chosen[cut:], rejected[cut:]


def _sharegpt(row: Record) -> PreferenceTexts:
    prompt = messages(row, "conversations" if "conversations" in row else "messages")
    if prompt in (text(row, "chosen"), text(row, "rejected")):  # one of the whole conversations, repeated
        return _conversations(row)
    return prompt, *_answers(row)


def _openai(row: Record) -> PreferenceTexts:
    given = parsed(row, "input", dict)
    row.setdefault("tools", given.get("tools"))
    return messages(given, "messages"), *_answers(row, "preferred_output", "non_preferred_output")


def _swift(row: Record) -> PreferenceTexts:
    """Split a conversation that ends with the chosen answer, beside the rejected answer or conversation."""
    whole = messages(row, "messages")
    if "rejected_messages" in row:
        return _split_at_difference(whole, messages(row, "rejected_messages"))
    if whole[-1]["role"] != "assistant":
        raise RowError("messages must end with the chosen answer, since rejected_response is the other")
    return whole[:-1], whole[-1:], answer_of(text(row, "rejected_response"))


def _alpaca(row: Record) -> PreferenceTexts:
    turns: list[Message] = []
    for exchange in parsed(row, "history", list):
        if not isinstance(exchange, list) or len(exchange) != 2 or not all(isinstance(text, str) for text in exchange):
            raise RowError("history must be a list of pairs of a question and an answer")
        turns += [*user_turn(exchange[0]), *answer_of(exchange[1])]
    parts = [string(row, "instruction"), *([string(row, "input")] if row.get("input") else [])]
    return [*turns, *user_turn("\n".join(parts))], *_answers(row)


def _ultrafeedback(row: Record) -> PreferenceTexts:
    """Split conversations with their prompt beside them; or answers alone, which the prompt precedes."""
    question, (prompt, chosen, rejected) = string(row, "prompt"), _conversations(row)
    questions = [" ".join(message["content"].split()) for message in prompt if message["role"] == "user"]
    if not questions and "user" not in {message["role"] for message in chosen}:
        return user_turn(question), *_answers(row)
    if not any(" ".join(question.split()) in each for each in questions):
        raise RowError("prompt is not in the conversations beside it (--format conversations reads those alone)")
    return prompt, chosen, rejected


def _ranked(row: Record) -> PreferenceTexts:
    """Take the best and the worst of several answers."""
    column = next((name for name in PROMPTS if name in row), "prompt")
    prompt = text(row, column)
    answers = next((name for name in RANKED if name in row), "responses")
    responses = parsed(row, answers, list)
    scores = _scores(row, answers, responses)
    if len(scores) != len(responses):
        raise RowError(f"{len(responses)} {answers} have {len(scores)} scores or ranks")
    rated = [place for place, score in enumerate(scores) if not math.isnan(score)]
    if len(rated) < 2:
        raise RowError(f"of {len(responses)} {answers} {len(rated)} have a score or rank; two are needed")
    worst, best = (pick(rated, key=scores.__getitem__) for pick in (min, max))
    if scores[worst] == scores[best]:
        raise RowError("all responses have the same score or rank, so none is better")
    two = {name: unwrap(responses[place], name) for name, place in (("chosen", best), ("rejected", worst))}
    if column == "prompt" and all(isinstance(each, str) for each in (prompt, *two.values())):
        return prompt, string(two, "chosen"), string(two, "rejected")
    return user_turn(prompt) if isinstance(prompt, str) else prompt, *_answers(two)


def _scores(row: Record, answers: str, responses: list[Any]) -> list[float]:
    """Return how good each response is: its score, or minus its rank; NaN if it has none."""
    column = next((name for name in row if name in ("scores", "ratings", "ranks")), "")
    if column:
        values = [{column: value} for value in parsed(row, column, list)]
    else:
        own = (key for key in OWN_RANKS if all(isinstance(each, dict) and key in each for each in responses))
        column, values = next(own, ""), responses
    if not column:
        raise RowError(f"{answers} need scores or ratings (the higher the better) or ranks (the lower the better)")
    sign = -1 if column in ("ranks", "rank") else 1
    return [sign * number(each, column, math.nan) for each in values]


class Format(NamedTuple):
    """What a format is called, its reader, and the columns that it reads beside ``OTHERS``."""

    label: str
    read: Callable[[Record], PreferenceTexts]
    columns: tuple[str, ...]


_BOTH = ("chosen", "rejected")
FORMATS = {
    "strings": Format("prompt and responses as strings", _strings, ("prompt", *_BOTH)),
    "messages": Format("prompt and responses as messages", _messages, ("prompt", *_BOTH)),
    "conversations": Format("conversations with a common prefix", _conversations, _BOTH),
    "hh": Format("dialogues as strings (HH)", _hh, _BOTH),
    "sharegpt": Format("a conversation and its two ends (ShareGPT)", _sharegpt, ("conversations", "messages", *_BOTH)),
    "alpaca": Format("instruction and input (Alpaca)", _alpaca, ("instruction", "input", "history", *_BOTH)),
    "orca": Format("question and answers (Orca)", _question, ("question", "input", *_BOTH)),
    "ultrafeedback": Format("conversations beside their prompt (UltraFeedback)", _ultrafeedback, ("prompt", *_BOTH)),
    "stackexchange": Format("question, response_j and response_k (Stack Exchange)", _question, ("question",)),
    "ranked": Format("ranked responses: the best against the worst", _ranked, (*PROMPTS, *RANKED, "scores", "ranks")),
    "openai": Format("input, preferred and non-preferred output (OpenAI)", _openai, ("input",)),
    "swift": Format("a conversation with the chosen answer, and the rejected one (ms-swift)", _swift, ("messages",)),
}


def detect_format(row: Record) -> str:
    """Detect the format from the columns."""
    if "chosen" not in row:
        if {*RANKED} & row.keys():
            return "ranked"
        if "preferred_output" in row:
            return "openai"
        if "messages" in row and {"rejected_response", "rejected_messages"} & row.keys():
            return "swift"
        if "response_j" in row:
            return "stackexchange"
        if "label" in row and {"completion", "response"} & row.keys():
            raise RowError("chosen is missing: the row is one response with a label, and DPO compares two")
    chosen, rejected = row.get("chosen"), row.get("rejected")
    column = next((name for name in PROMPTS if name in row), None)
    if column is None:
        return "conversations" if isinstance(chosen, (list, dict)) else "hh"
    if column != "prompt":
        return {"instruction": "alpaca", "question": "orca", "input": "orca"}.get(column, "sharegpt")
    if isinstance(row["prompt"], list):
        return "messages"
    both_strings = isinstance(chosen, str) and isinstance(rejected, str)
    return "strings" if both_strings or not isinstance(chosen, (list, dict)) else "ultrafeedback"
