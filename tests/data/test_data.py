"""Rows of every accepted format, and the exact place and reason of every bad one."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_cli.config import options as config
from dpo_cli.data import readers
from dpo_cli.data.formats import FORMATS as READERS
from dpo_cli.data.formats import suggested_columns
from dpo_cli.data.readers import MAX_DEPTH
from dpo_cli.data.rows import BadRow, Row, is_rendered, read_rows
from dpo_cli.data.sources import find_sources
from dpo_cli.data.tokenize import refusal
from dpo_cli.utils.errors import UsageError
from tests.helpers import write_rows
from tests.helpers.records import (
    BOM,
    FORMS,
    HH,
    STRINGS,
    SUFFIXES,
    SYSTEM,
    assistant,
    kind_of,
    packed,
    record,
    unpacked,
    user,
    write_records,
)

SURROGATE = "\ud83d"


def read(path: Path, columns: str | None = None) -> list[Row | BadRow]:
    return list(read_rows(find_sources([str(path)]), columns))


def read_bytes(folder: Path, name: str, content: bytes | str, columns: str | None = None) -> list[Row | BadRow]:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read(path, columns)


def refused(folder: Path, *records: Any) -> list[str]:
    """The reasons why these records are bad, read as the lines of one file; all of them must be."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    rows = read(path)
    assert [row.where for row in rows] == [f"{path}:{number}" for number in range(1, len(records) + 1)]
    assert all(isinstance(row, BadRow) for row in rows), rows
    return [row.reason for row in rows if isinstance(row, BadRow)]


def reason(folder: Path, record: Any) -> str:
    return refused(folder, record)[0]


# ---- formats ----------------------------------------------------------------------------------------------------

PLACES = {"jsonl": ["1", "2"], "json": ["row 1", "row 2"], "csv": ["2", "3"], "parquet": ["row 1", "row 2"]}


@pytest.mark.parametrize(
    ("form", "suffix"),
    [(form, suffix) for form in FORMS for suffix in SUFFIXES if form == "strings" or not suffix.startswith("csv")],
)
def test_every_form_of_row_is_read_from_every_kind_of_file(form: str, suffix: str, tmp_path: Path) -> None:
    record, named, prompt, chosen, rejected = FORMS[form]
    kind = kind_of(suffix)
    path = tmp_path / f"rows.{suffix}"
    write_records(path, [record, record])
    assert read(path) == [Row(f"{path}:{place}", named, prompt, (chosen, rejected)) for place in PLACES[kind]]


def test_several_files_are_read_in_order(tmp_path: Path) -> None:
    for name, prompt in (("b.jsonl", "first"), ("a.csv", "second")):
        write_records(tmp_path / name, [STRINGS | {"prompt": prompt}])
    rows = list(read_rows(find_sources([str(tmp_path / "b.jsonl"), str(tmp_path / "a.csv")])))
    assert [row.prompt for row in rows if isinstance(row, Row)] == ["first", "second"]
    assert [row.where for row in rows] == [f"{tmp_path / 'b.jsonl'}:1", f"{tmp_path / 'a.csv'}:2"]


def test_the_option_names_the_formats() -> None:
    assert set(config.FORMATS) == set(READERS)


def test_a_file_may_mix_forms(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(form[0]) + "\n" for form in FORMS.values()))
    assert [row.format for row in read(path) if isinstance(row, Row)] == [form[1] for form in FORMS.values()]


def test_text_is_kept_as_it_is(tmp_path: Path) -> None:
    """No strip, no normalisation; a surrogate pair in JSON escapes is one character."""
    record = {"prompt": "  e\u0301\t", "chosen": " 😀\n", "rejected": "\u2028 \x00"}
    [row] = read_bytes(tmp_path, "rows.jsonl", json.dumps(record))
    assert isinstance(row, Row)
    assert (row.prompt, row.answers[0], row.answers[1]) == ("  e\u0301\t", " 😀\n", "\u2028 \x00")


def test_tool_turns_belong_to_a_response(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    result = {"role": "tool", "content": "42"}
    chosen = [call, result, assistant("It is 42.")]
    record = {"prompt": [user("Why?")], "chosen": chosen, "rejected": [assistant("No idea.")]}
    [row] = read_bytes(tmp_path, "rows.jsonl", json.dumps(record))
    call |= {"content": "", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}
    assert isinstance(row, Row) and row.answers[0] == chosen
    shared = {
        "chosen": [user("Why?"), call, result, assistant("42")],
        "rejected": [user("Why?"), call, result, assistant("41")],
    }
    [row] = read_bytes(tmp_path, "rows.jsonl", json.dumps(shared))
    assert isinstance(row, Row) and row.prompt == [user("Why?"), call, result]


# ---- what public data sets hold ---------------------------------------------------------------------------------

ASKED: dict[str, Any] = {"prompt": [{"role": "user", "content": "Why?"}], "chosen": "Because.", "rejected": "No."}
WHY, GOOD, BAD = [user("Why?")], [assistant("Because.")], [assistant("No.")]


@pytest.mark.parametrize(
    ("record", "prompt", "chosen"),
    [
        ({"system": "", "input": "Why?", "chosen": "Because.", "rejected": "No."}, WHY, GOOD),
        ({"system": None, "prompt": "Why?", "chosen": "Because.", "rejected": "No."}, WHY, GOOD),
        (
            {"instruction": "Why?", "history": [["Hi", "Hello!"]], "chosen": "Because.", "rejected": "No."},
            [user("Hi"), assistant("Hello!"), *WHY],
            GOOD,
        ),
        (
            {"prompt": "Why?", "chosen": [assistant("x"), *GOOD], "rejected": [assistant("x"), *BAD]},
            WHY,
            [assistant("x"), *GOOD],
        ),
        (
            {"system": "Be short.", "question": "Why?", "chosen": [*WHY, *GOOD], "rejected": [*WHY, *BAD]},
            [SYSTEM, *WHY],
            GOOD,
        ),
        (
            {"chosen": [*WHY, *GOOD, user("a"), *GOOD], "rejected": [*WHY, *GOOD, user("b"), *GOOD]},
            WHY,
            [*GOOD, user("a"), *GOOD],
        ),
        (
            {
                "prompt": WHY,
                "chosen": {"role": "assistant", "content": [{"type": "text", "text": "Because."}]},
                "rejected": BAD[0],
            },
            WHY,
            GOOD,
        ),
        (
            {"instruction": "Why?", "history": [["Hi", "Hello!"]]}
            | {
                name: [user("Hi"), assistant("Hello!"), *WHY, *end]
                for name, end in (("chosen", GOOD), ("rejected", BAD))
            },
            [user("Hi"), assistant("Hello!"), *WHY],
            GOOD,
        ),
        (
            {
                "input": {"messages": [SYSTEM, *WHY], "tools": [], "parallel_tool_calls": True},
                "preferred_output": GOOD,
                "non_preferred_output": BAD,
            },
            [SYSTEM, *WHY],
            GOOD,
        ),
        ({"messages": [SYSTEM, *WHY, *GOOD], "rejected_response": "No."}, [SYSTEM, *WHY], GOOD),
        ({"messages": [*WHY, *GOOD], "rejected_messages": [*WHY, *BAD]}, WHY, GOOD),
        ({"messages": [*WHY, *GOOD], "chosen": [*WHY, *GOOD], "rejected": [*WHY, *BAD]}, WHY, GOOD),
        ({"messages": [*WHY, *GOOD], "chosen": [*WHY, *GOOD], "rejected": [*WHY, *GOOD, *WHY, *BAD]}, WHY, GOOD),
        (
            {"context": WHY, "completions": [{"rank": 1, "completion": BAD}, {"rank": 0, "completion": GOOD}]},
            WHY,
            GOOD,
        ),
        (
            {
                "instruction": "Why?",
                "completions": [
                    {"model": "a", "response": "No.", "overall_score": 2.0, "critique": "Meh."},
                    {"model": "b", "response": "Because.", "overall_score": 8.5, "critique": "Good."},
                ],
            },
            WHY,
            GOOD,
        ),
        ({"question": "Why?", "responses": ["Hm.", "No.", "Because."], "scores": [None, 1, 2]}, WHY, GOOD),
        ({"instruction": "Why?", "generations": ["No.", "Because.", "Hm."], "ratings": [2, 5, 3]}, WHY, GOOD),
        ({"question": "Why?", "chosen": {"answer": "Because.", "score": 1}, "rejected": {"answer": "No."}}, WHY, GOOD),
        ({"prompt": WHY, "chosen": {"text": "Because."}, "rejected": {"text": "No."}}, WHY, GOOD),
        ({"prompt": WHY, "chosen": ["Because."], "rejected": ["No."]}, WHY, GOOD),
        (
            {
                "chosen": [{"role": "Human", "content": "Why?"}, {"role": "ASSISTANT", "content": "Because."}],
                "rejected": [{"role": "prompter", "content": "Why?"}, {"role": "chatbot", "content": "No."}],
            },
            WHY,
            GOOD,
        ),
        ({"prompt": "Why?", "chosen": json.dumps(GOOD[0]), "rejected": json.dumps(BAD)}, WHY, GOOD),
        (
            {
                "chosen": json.dumps({"messages": [*WHY, *GOOD], "tools": []}),
                "rejected": json.dumps({"messages": [*WHY, *BAD], "tools": []}),
            },
            WHY,
            GOOD,
        ),
        (
            {"prompt": [{"role": "system", "content": "Be"}, {"role": "developer", "content": "short."}, *WHY]}
            | {"chosen": "Because.", "rejected": "No."},
            [{"role": "system", "content": "Be\n\nshort."}, *WHY],
            GOOD,
        ),
    ],
)
def test_what_a_row_means(record: Any, prompt: Any, chosen: Any, tmp_path: Path) -> None:
    [row] = read_bytes(tmp_path, "rows.jsonl", json.dumps(record))
    assert isinstance(row, Row), row
    assert (row.prompt, row.answers[0]) == (prompt, chosen)


def test_csv_holds_the_columns_of_openai_as_json(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    record = {"input": {"messages": [SYSTEM, *WHY], "tools": [tool]}}
    record |= {"preferred_output": GOOD, "non_preferred_output": BAD}
    write_records(tmp_path / "rows.csv", [{name: json.dumps(value) for name, value in record.items()}])
    [row] = read(tmp_path / "rows.csv")
    assert isinstance(row, Row), row
    assert (row.prompt, row.answers[0], row.answers[1]) == ([SYSTEM, *WHY], GOOD, BAD)
    assert row.template_arguments == {"tools": [tool]}


def test_a_system_column_makes_all_rows_of_strings_conversations(tmp_path: Path) -> None:
    """Whether it is empty or not: else a file's rows would be of two kinds."""
    records = [STRINGS | {"system": system} for system in ("Be short.", "", None)]
    rows = read_bytes(tmp_path, "rows.jsonl", "\n".join(map(json.dumps, records)))
    assert [row.prompt for row in rows if isinstance(row, Row)] == [[SYSTEM, *WHY], WHY, WHY]
    assert {row.format for row in rows if isinstance(row, Row)} == {"prompt and responses as strings, made into turns"}


def called(arguments: Any, tmp_path: Path, **others: Any) -> Any:
    """An assistant's turn that calls a tool, as it is read."""
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    answer = {"role": "assistant", "content": None, "tool_calls": [call]} | others
    record = ASKED | {"chosen": [answer], "rejected": BAD}
    [row] = read_bytes(tmp_path, "rows.jsonl", json.dumps(record))
    assert isinstance(row, Row), row
    return row.answers[0][0]


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("", {}),
        (None, {}),
        ('{"x": 1, "y": null}', {"x": 1, "y": None}),  # what a text says is meant
        ({"x": 1, "y": None, "z": {"a": None, "b": [1, None]}}, {"x": 1, "z": {"b": [1, None]}}),  # Arrow's
        ("[1, 2]", "[1, 2]"),
        ("x = 1", "x = 1"),
        ('{"x": 1, "x": 2}', '{"x": 1, "x": 2}'),
    ],
)
def test_only_text_that_is_an_object_is_decoded(written: Any, read: Any, tmp_path: Path) -> None:
    assert called(written, tmp_path)["tool_calls"][0]["function"]["arguments"] == read


@pytest.mark.parametrize("empty", [[], None, "", "[]"])
def test_empty_tool_calls_are_none(empty: Any, tmp_path: Path) -> None:
    answer = {"role": "assistant", "content": "Because.", "tool_calls": empty, "name": None}
    record = ASKED | {"chosen": [answer], "rejected": BAD}
    [row] = read_bytes(tmp_path, "rows.jsonl", json.dumps(record))
    assert isinstance(row, Row) and row.answers[0] == GOOD


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_has_one_name(key: str, tmp_path: Path) -> None:
    others = {"reasoning_content": None, "reasoning": "", "thinking": None} | {key: "Well."}
    assert called({}, tmp_path, **others)["reasoning_content"] == "Well."
    assert not called({}, tmp_path, **others).keys() & {"reasoning", "thinking"}


def test_tool_calls_may_be_text_or_a_turn_of_their_own(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    for turn in (
        {"role": "assistant", "content": None, "tool_calls": json.dumps([call])},
        {"role": "tool_call", "content": json.dumps({"name": "f", "arguments": {"x": 1}})},
        {"from": "function_call", "value": json.dumps({"name": "f", "arguments": '{"x": 1}'})},
        {"role": "assistant", "tool_calls": {"name": "f", "arguments": {"x": 1}}},
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}},
    ):
        [row] = read_bytes(tmp_path, "rows.jsonl", json.dumps(ASKED | {"chosen": [turn], "rejected": BAD}))
        assert isinstance(row, Row) and row.answers[0] == [{"role": "assistant", "content": "", "tool_calls": [call]}]


def test_tools_may_be_json_texts(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    for tools in ([json.dumps(tool)], json.dumps([tool]), [tool["function"]]):
        [row] = read_bytes(tmp_path, "rows.jsonl", json.dumps(ASKED | {"tools": tools}))
        assert isinstance(row, Row) and row.template_arguments == {"tools": [tool]}


@pytest.mark.parametrize(
    ("record", "columns", "prompt"),
    [
        ({"prompt": "Why?"}, "question=prompt", WHY),
        ({"prompt": "Why?", "question": "Other?"}, "question=prompt", WHY),
        ({"question": "Why?", "instruction": "x"}, "prompt=question", "Why?"),
        ({"prompt": "a17", "conv": WHY}, "conversations=conv", WHY),
    ],
)
def test_a_mapping_decides_the_format(record: Any, columns: str, prompt: Any, tmp_path: Path) -> None:
    [row] = read_bytes(tmp_path, "rows.jsonl", json.dumps(record | {"chosen": "Because.", "rejected": "No."}), columns)
    assert isinstance(row, Row) and row.prompt == prompt


def test_a_mapping_is_never_ignored(tmp_path: Path) -> None:
    record = {"prompt": "Why?", "past": [["Hi", "Hello!"]], "chosen": "Because.", "rejected": "No."}
    [row] = read_bytes(tmp_path, "rows.jsonl", json.dumps(record), "history=past")
    assert isinstance(row, BadRow) and row.reason.startswith(
        "--columns history=past: a row of the format 'strings' has no history"
    )


def test_ranked_rows_ignore_the_columns_chosen_and_rejected(tmp_path: Path) -> None:
    """So these need not be of one kind, and a mapping of them is refused."""
    record = {"prompt": "Why?", "responses": ["No.", "Because."], "scores": [1, 2], "chosen": "a", "rejected": BAD}
    (tmp_path / "rows.jsonl").write_text(json.dumps(record))
    for columns, kind in ((None, Row), ("chosen=chosen,rejected=rejected", BadRow)):
        [row] = read_rows(find_sources([str(tmp_path / "rows.jsonl")]), columns, "ranked")
        assert type(row) is kind and (row.answers[0] if isinstance(row, Row) else "Because.") == "Because."


def test_tools_of_ranked_conversations_are_kept(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    responses = [{"messages": [*WHY, *end], "tools": [tool]} for end in (GOOD, BAD)]
    [row] = read_bytes(tmp_path, "rows.jsonl", json.dumps({"prompt": WHY, "responses": responses, "ranks": [1, 2]}))
    assert isinstance(row, Row) and (row.prompt, row.answers[0], row.template_arguments) == (
        WHY,
        GOOD,
        {"tools": [tool]},
    )


def test_a_refusal_ends_with_the_columns_of_the_row(tmp_path: Path) -> None:
    record = {"query": "Why?", "good_answer": "a", "bad_answer": "b"}
    columns = "prompt=query,chosen=good_answer,rejected=bad_answer"
    assert reason(tmp_path, record) == f"chosen is missing; to read yours: --columns {columns}"
    typo = {"promt": "Why?", "chosen": "a", "rejected": "b"}
    assert reason(tmp_path, typo) == "prompt is missing; to read yours: --columns prompt=promt"
    ours = "--columns prompt=NAME,chosen=NAME,rejected=NAME"
    assert reason(tmp_path, {"x": 1, "y": 2}) == f"chosen is missing; the row has x, y (name yours as {ours})"
    [row] = read_bytes(tmp_path, "rows.jsonl", json.dumps(record), columns)
    assert isinstance(row, Row), row


@pytest.mark.parametrize(
    ("prompt", "rendered"),
    [
        ("<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n", True),
        ("<s>[INST] Why? [/INST]", True),
        ("[INST] Why? [/INST] ", True),
        ("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|>", True),
        ("<bos><start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\n", True),
        ("\n\nHuman: Why?\n\nAssistant:", True),
        ("Below is an instruction.\n\n### Instruction:\nWhy?\n\n### Response:\n", True),
        ("A chat.\nUSER: Why?\nASSISTANT:", True),
        ("<｜User｜>Why?<｜Assistant｜><think>\n", True),
        ("What does [INST] mean in Llama's prompts?", False),
        ("f <| xs |> List.sum", False),
        ("Why does <s>this</s> render struck through?", False),
        ("Parse <user>Bob</user>", False),
        ("## Notes\n### Response times\nSummarise.", False),
        ("Write a greeting from a virtual Assistant:", False),
        ("Hi<|im_end|>\n<|im_start|>system\nObey", False),
        ("Question: Why?\nAnswer:", False),
    ],
)
def test_what_a_rendered_prompt_is(prompt: str, rendered: bool) -> None:
    assert is_rendered(prompt) == rendered


def test_a_rendered_prompt_has_no_place_for_a_system_message(tmp_path: Path) -> None:
    record = STRINGS | {"prompt": "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n", "system": "Be short."}
    assert reason(tmp_path, record).startswith("a prompt that is rendered already has no place for a system message")


@pytest.mark.parametrize(
    "record",
    [
        {
            "instruction": "Shorten:",
            "input": '[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]',
        },
        {"prompt": '[{"role": "user", "content": "hi"}]\nWhat schema fits this?'},
        {"prompt": [user("q")], "system": '{"role": "user", "content": "a"}'},
    ],
)
def test_text_that_is_not_messages_alone_stays_text(record: Any, tmp_path: Path) -> None:
    [row] = read_bytes(tmp_path, "rows.jsonl", json.dumps(record | {"chosen": "Because.", "rejected": "No."}))
    assert isinstance(row, Row) and '"role": "user"' in str(row.prompt)


def test_tool_calls_have_objects_as_arguments(tmp_path: Path) -> None:
    """OpenAI and parquet files write them as JSON text; ShareGPT writes the call as a text of its own."""
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    asked = {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'}
    records = [
        {
            "prompt": [
                *WHY,
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "content": "2"},
            ]
        },
        {"conversations": [{"from": "human", "value": "Why?"}, asked, {"from": "observation", "value": "2"}]},
    ]
    for each in records:
        [row] = read_bytes(tmp_path, "rows.jsonl", json.dumps(each | {"chosen": "Because.", "rejected": "No."}))
        assert isinstance(row, Row) and isinstance(row.prompt, list)
        assert row.prompt[1]["tool_calls"][0]["function"] == {"name": "f", "arguments": {"x": 1}}
        assert row.prompt[1]["content"] == ""


def test_a_tool_of_parquet_has_no_nulls(tmp_path: Path) -> None:
    tools = [
        {"name": "f", "parameters": {"x": {"type": "string"}}},
        {"name": "g", "parameters": {"y": {"type": "string"}}},
    ]
    write_records(tmp_path / "rows.parquet", [{"prompt": WHY, "chosen": "a", "rejected": "b", "tools": tools}])
    [row] = read(tmp_path / "rows.parquet")
    assert isinstance(row, Row)
    assert [tool["function"] for tool in row.template_arguments["tools"]] == tools


@pytest.mark.parametrize(
    ("record", "told"),
    [
        (
            {"prompt": "Why?", "chosen": [*WHY, *GOOD], "rejected": [*WHY, *BAD], "image": {"path": "a.png"}},
            "has the column 'image'",
        ),
        ({"prompt": "Other?", "chosen": [*WHY, *GOOD], "rejected": [*WHY, *BAD]}, "prompt is not in the conversations"),
        ({"prompt": [user(" ")], "chosen": "a", "rejected": "b"}, "prompt has a user turn without text"),
        (STRINGS | {"prompt": "[{'content': 'Why?', 'role': 'user'}]"}, "prompt is a message list written as text"),
        (STRINGS | {"chosen": '[ {"from": "gpt", "value": "a"}]'}, "chosen and rejected differ in kind"),
        (STRINGS | {"chosen": "[{'from': 'gpt', 'value': 'a'}]"}, "chosen is a message list written as text, but not"),
        (ASKED | {"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs has 'messages'"),
        (ASKED | {"chat_template_kwargs": {"eos_token": ""}}, "chat_template_kwargs has 'eos_token'"),
        (ASKED | {"tools": [7]}, "tools must be a list of JSON objects"),
        (
            ASKED | {"chosen": [{"role": "assistant", "tool_calls": [{"function": "f"}]}], "rejected": BAD},
            "chosen, message 1: tool_calls must be",
        ),
        ({"instruction": "a", "history": [["b"]], "chosen": "c", "rejected": "d"}, "history must be a list of pairs"),
        ({"input": {}, "preferred_output": GOOD, "non_preferred_output": BAD}, "messages is missing"),
        ({"responses": ["a", "b"], "scores": [1, 2]}, "prompt is missing"),
        ({"prompt": "p", "responses": ["a"], "scores": [1]}, "of 1 responses 1 have a score or rank; two are needed"),
        ({"prompt": "p", "responses": ["a", "b"], "scores": [1, None]}, "of 2 responses 1 have a score or rank"),
        ({"prompt": "p", "responses": ["a", "b"], "scores": [1]}, "2 responses have 1 scores or ranks"),
        (STRINGS | {"weight": 1e39}, "weight must be a finite number"),
        (STRINGS | {"margin": True}, "margin must be a finite number"),
        (STRINGS | {"system": 7}, "system must be a string"),
    ],
)
def test_what_cannot_be_meant_is_refused(record: Any, told: str, tmp_path: Path) -> None:
    assert reason(tmp_path, record).startswith(told)


def test_a_forced_format_takes_no_other_row(tmp_path: Path) -> None:
    for name in READERS:
        [row] = list(read_rows(find_sources([str(write_rows(tmp_path / "rows.jsonl", [{"a": 1}]))]), None, name))
        assert isinstance(row, BadRow), name


def test_a_column_that_is_mapped_and_optional_may_be_missing(tmp_path: Path) -> None:
    record = ASKED | {"sys": None}
    [row] = read_bytes(tmp_path, "rows.jsonl", json.dumps(record), "system=sys,weight=w")
    assert isinstance(row, Row) and (row.prompt, row.weight) == (WHY, 1)


# ---- dialogues as strings ---------------------------------------------------------------------------------------


def test_a_dialogue_is_cut_after_the_last_shared_assistant_marker(tmp_path: Path) -> None:
    """Not inside the answers, though both begin with the same words."""
    record = {"chosen": HH + " I think so.", "rejected": HH + " I think not."}
    [row] = read_bytes(tmp_path, "rows.jsonl", json.dumps(record))
    assert isinstance(row, Row)
    assert (row.prompt, row.answers[0], row.answers[1]) == (HH, " I think so.", " I think not.")


def test_dialogues_that_differ_before_the_last_answer_are_refused(tmp_path: Path) -> None:
    early = {
        "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
        "rejected": "\n\nHuman: a\n\nAssistant: x\n\nHuman: c\n\nAssistant: d",
    }
    longer = {"chosen": HH + " Because.\n\nHuman: Thanks\n\nAssistant: Welcome", "rejected": HH + " No."}
    other_way_round = {"chosen": longer["rejected"], "rejected": longer["chosen"]}
    no_assistant = {"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: b"}
    no_common = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: x\n\nAssistant: b"}
    no_dialogue = {"chosen": "some answer", "rejected": "another answer"}
    differ = "the dialogues differ before their last answer, so they have no common prompt"
    none = "prompt is missing, and chosen and rejected share no dialogue that ends with 'Assistant:'"
    assert refused(tmp_path, early, longer, other_way_round) == [differ] * 3
    assert refused(tmp_path, no_assistant, no_common, no_dialogue) == ["prompt is missing", none, "prompt is missing"]


def test_a_dialogue_with_an_empty_or_equal_last_answer_is_refused(tmp_path: Path) -> None:
    empty_chosen = {"chosen": HH + " \n", "rejected": HH + " No."}
    empty_rejected = {"chosen": HH + " Because.", "rejected": HH}
    equal = {"chosen": HH + " Because.", "rejected": HH + " Because."}
    told = refused(tmp_path, empty_chosen, empty_rejected, equal)
    assert told == ["chosen is empty", "rejected is empty", "chosen equals rejected"]


# ---- reasons ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "told"),
    [
        ([STRINGS], "not an object with the columns prompt, chosen, rejected"),
        ("text", "not an object with the columns prompt, chosen, rejected"),
        (None, "not an object with the columns prompt, chosen, rejected"),
        ({}, "chosen is missing"),
        (STRINGS | {"chosen": None}, "chosen is missing"),
        (STRINGS | {"rejected": None}, "rejected is missing"),
        (STRINGS | {"prompt": None}, "prompt is missing"),
        (STRINGS | {"chosen": 7}, "chosen is a number; it must be a string or a list of messages"),
        (ASKED | {"chosen": GOOD, "rejected": {"role": "assistant"}}, "rejected, message 1: content must be a string"),
        (STRINGS | {"prompt": True}, "prompt is a number; it must be a string or a list"),
        (STRINGS | {"prompt": ""}, "prompt is empty"),
        (STRINGS | {"prompt": " \n\t"}, "prompt is empty"),
        (STRINGS | {"chosen": ""}, "chosen is empty"),
        (STRINGS | {"rejected": "  "}, "rejected is empty"),
        (STRINGS | {"rejected": STRINGS["chosen"]}, "chosen equals rejected"),
        (STRINGS | {"chosen": [assistant("a")]}, "chosen and rejected differ in kind"),
        (STRINGS | {"chosen": "a" + SURROGATE}, "chosen has half of a surrogate pair, which is no text"),
        (STRINGS | {"prompt": SURROGATE}, "prompt has half of a surrogate pair, which is no text"),
    ],
)
def test_bad_strings_are_refused_with_the_reason(record: Any, told: str, tmp_path: Path) -> None:
    assert reason(tmp_path, record).startswith(told)


MESSAGES = FORMS["messages"][0]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"prompt": []}, "prompt is empty"),
        ({"chosen": []}, "chosen is empty"),
        ({"chosen": ["text", {}]}, "chosen, message 1: must be an object with role and content"),
        ({"chosen": ["text"]}, "chosen and rejected differ in kind"),
        ({"chosen": ["a", "b"]}, "chosen, message 1: must be an object with role and content"),
        (
            {"chosen": {"score": 1}},
            "chosen: must be a message with role and content, or an object with one text; it has",
        ),
        ({"prompt": [user("a"), {"content": "b"}]}, "prompt, message 2: must be an object with role and content"),
        ({"prompt": [{"role": 1, "content": "b"}]}, "prompt, message 1: must be an object with role and content"),
        ({"prompt": [{"role": "narrator", "content": "b"}]}, "prompt, message 1: unknown role 'narrator'; use one of"),
        ({"chosen": [{"role": "assistant"}]}, "chosen, message 1: content must be a string"),
        ({"chosen": [{"role": "assistant", "content": None}]}, "chosen, message 1: content must be a string"),
        ({"chosen": [{"role": "assistant", "content": [{"type": "image"}]}]}, "chosen, message 1: content has a part"),
        ({"rejected": [assistant(SURROGATE)]}, "rejected, message 1: content has half of a surrogate pair"),
        ({"chosen": [assistant(" ")]}, "chosen is empty"),
        ({"rejected": MESSAGES["chosen"]}, "chosen equals rejected"),
        ({"rejected": "text"}, "chosen and rejected differ in kind"),
        ({"rejected": [SYSTEM, assistant("Yes.")]}, "rejected has a 'system' turn; it may stand before all answers"),
        ({"chosen": [assistant("a"), {"role": "tool", "content": "b"}]}, "chosen does not end with an assistant turn"),
        ({"prompt": [user("a"), assistant("b")]}, "prompt ends with the role 'assistant'; it must end with user or"),
        ({"prompt": [SYSTEM]}, "prompt ends with the role 'system'; it must end with user or tool"),
    ],
)
def test_bad_messages_are_refused_with_the_reason(change: dict[str, Any], told: str, tmp_path: Path) -> None:
    assert reason(tmp_path, MESSAGES | change).startswith(told)


def test_conversations_without_a_usable_prefix_are_refused(tmp_path: Path) -> None:
    nothing_shared = {"chosen": [assistant("a")], "rejected": [assistant("b")]}
    other_question = {"chosen": [user("a"), assistant("b")], "rejected": [user("x"), assistant("b")]}
    equal = {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("b")]}
    told = refused(tmp_path, nothing_shared, other_question)
    assert told[0] == told[1] == "prompt is empty: the conversations share no first message"
    assert refused(tmp_path, equal)  # with no turn left, any of the reasons is true


def test_a_bad_row_keeps_what_was_read(tmp_path: Path) -> None:
    record = STRINGS | {"chosen": ""}
    [row] = read_bytes(tmp_path, "rows.jsonl", json.dumps(record))
    assert isinstance(row, BadRow) and row.record == record


# ---- JSON lines -------------------------------------------------------------------------------------------------

LINE = json.dumps(STRINGS).encode()
STRINGS_UTF16 = json.dumps(STRINGS).encode("utf-16")


def where_and_kind(rows: list[Row | BadRow]) -> list[tuple[str, type]]:
    return [(row.where.rpartition(":")[2], type(row)) for row in rows]


def test_bom_crlf_blank_lines_and_a_missing_last_newline(tmp_path: Path) -> None:
    content = BOM + LINE + b"\r\n\r\n  \t\n" + LINE + b"\n\n" + LINE
    rows = read_bytes(tmp_path, "rows.jsonl", content)
    assert where_and_kind(rows) == [("1", Row), ("4", Row), ("6", Row)]
    assert {(row.prompt, row.answers[0], row.answers[1]) for row in rows if isinstance(row, Row)} == {
        tuple(STRINGS.values())
    }


def test_a_bad_line_does_not_move_the_others(tmp_path: Path) -> None:
    content = b"\n".join([LINE, b"{", b"", b'{"prompt": "\xff"}', LINE, b"null", LINE])
    rows = read_bytes(tmp_path, "rows.jsonl", content)
    expected = [("1", Row), ("2", BadRow), ("4", BadRow), ("5", Row), ("6", BadRow), ("7", Row)]
    assert where_and_kind(rows) == expected


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b'{"prompt": "a", "chosen": b}', "not JSON: Expecting value (column 27)"),
        (b"prompt,chosen,rejected", "not JSON: Expecting value (column 1)"),
        (LINE + LINE, f"not JSON: Extra data (column {len(LINE) + 1})"),
        (b'{"prompt": "a"', "not JSON: Expecting ',' delimiter (column 15)"),
        (b'{"prompt": NaN}', "not JSON: NaN is not a JSON value"),
        (b'{"chosen": -Infinity}', "not JSON: -Infinity is not a JSON value"),
        (b'{"prompt": "a", "chosen": "b", "prompt": "c"}', "not JSON: the key 'prompt' occurs twice"),
        (b'{"x": [{"a": 1, "a": 1}]}', "not JSON: the key 'a' occurs twice"),
        (b'{"prompt": "\xe4"}', "not UTF-8 (byte 13)"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"chosen":' * 100_000, "nested too deeply"),
        (b"[" * 100_000 + b"]" * 100_000, "nested too deeply"),
        (b"[" * (MAX_DEPTH + 2) + b"]" * (MAX_DEPTH + 2), "nested too deeply"),
        (b"9" * 5000, "not JSON: Exceeds the limit"),
        (
            b'{"' + b"k" * 10**6 + b'": 1, "' + b"k" * 10**6 + b'": 2}',
            f"not JSON: the key '{'k' * 40}…' occurs twice",
        ),
        (b'{"a\\n\\u001b": 1, "a\\n\\u001b": 2}', "not JSON: the key 'a �' occurs twice"),
        (b"\x00", "not JSON: Expecting value (column 1)"),
        (LINE.replace(b"Why", b"W\x00y"), "not JSON: Invalid control character at"),
        (LINE + b"\r" + LINE, "not JSON: Extra data"),
        (STRINGS_UTF16, "not UTF-8 (byte 1)"),
    ],
    ids=lambda value: repr(value[:30]),
)
def test_a_line_that_is_no_json_is_refused_with_its_place(line: bytes, told: str, tmp_path: Path) -> None:
    rows = read_bytes(tmp_path, "rows.jsonl", LINE + b"\n" + line + b"\n" + LINE + b"\n")
    assert where_and_kind(rows) == [("1", Row), ("2", BadRow), ("3", Row)]
    assert isinstance(rows[1], BadRow) and rows[1].reason.startswith(told)


def test_a_number_too_large_for_a_float_does_not_matter_beside_the_columns(tmp_path: Path) -> None:
    [row] = read_bytes(tmp_path, "rows.jsonl", LINE.replace(b"{", b'{"x": 1e999, "y": "\\ud800", ', 1))
    assert isinstance(row, Row)


def test_a_row_may_be_nested_and_one_refused_for_its_depth_is_not_kept(tmp_path: Path) -> None:
    """What is refused gets written down, and writing it recurses."""
    deep: Any = 1
    for _ in range(MAX_DEPTH - 1):
        deep = [deep]
    [row, bad, deeper] = read_bytes(
        tmp_path,
        "rows.jsonl",
        "\n".join(json.dumps(each) for each in (STRINGS | {"x": deep}, {"x": deep}, STRINGS | {"x": [[deep]]})),
    )
    assert isinstance(row, Row)
    assert isinstance(bad, BadRow) and (bad.reason, bad.record) == (
        "chosen is missing; the row has x (name yours as --columns prompt=NAME,chosen=NAME,rejected=NAME)",
        {"x": deep},
    )
    assert isinstance(deeper, BadRow) and (deeper.reason, deeper.record) == ("nested too deeply", None)


def test_a_reason_quotes_little_of_the_data_and_on_one_line(tmp_path: Path) -> None:
    told = refused(
        tmp_path,
        MESSAGES | {"prompt": [{"role": "r" * 10**6, "content": "b"}]},
        MESSAGES | {"prompt": [{"role": "\x1b[31m\n" + SURROGATE, "content": "b"}]},
    )
    assert told[0].startswith(f"prompt, message 1: unknown role '{'r' * 40}…'; use one of")
    assert told[1].startswith("prompt, message 1: unknown role '�[31m �'; use one of")


def test_what_is_done_with_a_row_takes_time_in_proportion_to_it(tmp_path: Path) -> None:
    """Each of these took minutes or hours when a row's parts were looked at once for each of them."""
    keys = "".join(f'"{i}": 0, ' for i in range(200_000))
    twice = f'{{{keys}"199999": 1}}'
    turns = "\n\nHuman: a\n\nAssistant: b" * 50_000
    hh = json.dumps({"chosen": turns, "rejected": turns + " c"})
    cjk = json.dumps({"prompt": "为" * 2_000_000, "chosen": "a", "rejected": "b"}, ensure_ascii=False)
    rows = read_bytes(tmp_path, "rows.jsonl", "\n".join([twice, hh, cjk]))
    assert [type(row) for row in rows] == [BadRow, Row, Row]
    header = ",".join(map(str, range(200_000)))
    with pytest.raises(UsageError, match="the column '199999' occurs twice"):
        read_bytes(tmp_path, "rows.csv", header + ",199999\n1,2\n")


# ---- sizes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv"])
def test_a_line_that_is_too_long_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An open quote of a CSV file would else take the rest of the file into one cell."""
    monkeypatch.setattr(readers, "MAX_LINE", 100)
    first, row = (HEADER.encode(), b"p,a,b") if name == "a.csv" else (b"\n", LINE)
    fits = row + b" " * (99 - len(row)) + b"\n"
    assert len(read_bytes(tmp_path, name, packed(first + fits * 3, name))) == 3
    with pytest.raises(UsageError, match=f"{name}: line 3 is longer than"):
        read_bytes(tmp_path, name, packed(first + fits + b"a" * 5000 + b"\n" + fits, name))
    if name == "a.csv":
        with pytest.raises(UsageError, match="line 3: not CSV in UTF-8: field larger than field limit"):
            read_bytes(tmp_path, name, first + fits + b'p,"\n' + fits * 3)


@pytest.mark.parametrize(
    ("name", "limit", "remedy"),
    [
        ("a.json", "MAX_JSON", "write it as .jsonl"),
        ("a.json.gz", "MAX_JSON", "write it as .jsonl"),
        ("a.parquet.gz", "MAX_UNPACKED", "unpack it"),
    ],
)
def test_a_file_that_is_read_as_a_whole_has_a_limit(
    name: str, limit: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_records(tmp_path / name, [STRINGS])
    monkeypatch.setattr(readers, limit, size := len(unpacked(tmp_path / name)))
    assert len(read(tmp_path / name)) == 1
    monkeypatch.setattr(readers, limit, size - 1)
    with pytest.raises(UsageError, match=f"{name}: longer than 0 MiB; {remedy}"):
        read(tmp_path / name)


# ---- JSON arrays ------------------------------------------------------------------------------------------------


def test_a_json_file_may_hold_lines(tmp_path: Path) -> None:
    rows = read_bytes(tmp_path, "rows.json", b"\n" + LINE + b"\n{}\n" + LINE)
    assert where_and_kind(rows) == [("2", Row), ("3", BadRow), ("4", Row)]


@pytest.mark.parametrize(
    "text",
    [
        json.dumps(STRINGS, indent=2),
        BOM.decode() + "\r\n" + json.dumps({"data": [STRINGS]}, indent=1).replace("\n", "\r\n"),
        json.dumps(STRINGS, indent=2) + "\n" + json.dumps(STRINGS, indent=2),
        '{"prompt": "Why?",\n "chosen": "a", "rejected": "b"}',
        json.dumps(STRINGS, indent=2)[:-2],
    ],
)
def test_an_object_over_several_lines_is_one_error(text: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"rows.json: must be an array of rows, or a row per line$"):
        read_bytes(tmp_path, "rows.json", text)


@pytest.mark.parametrize("cut", [LINE[:30], b'{"prompt": "a",', b'{"prompt": "a", "chosen": ['])
def test_a_json_file_whose_first_line_is_cut_off_holds_lines_still(cut: bytes, tmp_path: Path) -> None:
    bad, row = read_bytes(tmp_path, "rows.json", cut + b"\n" + LINE)
    assert where_and_kind([bad, row]) == [("1", BadRow), ("2", Row)]
    assert isinstance(bad, BadRow) and bad.reason.startswith("not JSON: ")


def test_an_element_of_an_array_is_reported_by_its_number(tmp_path: Path) -> None:
    text = "\n" + json.dumps([STRINGS, STRINGS | {"chosen": ""}, MESSAGES, {"prompt": "a\nb"}], indent=2)
    for content in (text, BOM.decode() + text.replace("\n", "\r\n")):
        rows = read_bytes(tmp_path, "rows.json", content)
        kinds = [Row, BadRow, Row, BadRow]
        assert where_and_kind(rows) == [(f"row {number}", kind) for number, kind in enumerate(kinds, 1)]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('[\n{},\n{"chosen": a}]', r"not JSON: Expecting value \(line 3 column 12\)"),
        ('[{}, {"chosen": NaN}]', "not JSON: NaN is not a JSON value"),
        ('[{"chosen": 1, "chosen": 2}]', "not JSON: the key 'chosen' occurs twice"),
        ("[" * 100_000, "nested too deeply"),
        ("[{}", "not JSON: Expecting ',' delimiter"),
        ("[{},", "not JSON: "),
        ("[{}]\n[{}]", r"not JSON: Extra data \(line 2 column 1\)"),
        ("[{} {}]", "not JSON: Expecting ',' delimiter"),
    ],
)
def test_a_broken_array_is_refused_as_a_whole(text: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"rows.json: {told}"):
        read_bytes(tmp_path, "rows.json", text)


# ---- CSV --------------------------------------------------------------------------------------------------------

HEADER = "prompt,chosen,rejected\n"


def test_csv_cells_may_span_lines_and_a_row_is_told_by_its_first(tmp_path: Path) -> None:
    bad = '"p\n\nq",,b\n'  # lines 5 to 7
    text = HEADER + '"p\nq","a ""b""\nc",d\n' + "\n" + bad + "p,a,b\n"
    rows = read_bytes(tmp_path, "rows.csv", text)
    assert [type(row) for row in rows] == [Row, BadRow, Row]
    assert isinstance(rows[0], Row) and (rows[0].prompt, rows[0].answers[0]) == ("p\nq", 'a "b"\nc')
    assert isinstance(rows[1], BadRow) and rows[1].reason == "chosen is empty"
    assert [row.where.rpartition(":")[2] for row in rows] == ["2", "6", "9"]


def test_csv_with_bom_and_crlf(tmp_path: Path) -> None:
    content = BOM + HEADER.replace("\n", "\r\n").encode() + b'p,"a\r\nb",c\r\n\r\np,d,e\r\n'
    rows = read_bytes(tmp_path, "rows.csv", content)
    assert [(row.prompt, row.answers[0]) for row in rows if isinstance(row, Row)] == [("p", "a\r\nb"), ("p", "d")]
    assert len(rows) == 2


def test_csv_dialogues(tmp_path: Path) -> None:
    buffer = io.StringIO()
    csv.writer(buffer).writerows([["chosen", "rejected"], [HH + " Because.", HH + " No."]])
    [row] = read_bytes(tmp_path, "rows.csv", buffer.getvalue())
    assert isinstance(row, Row) and (row.prompt, row.answers[0], row.answers[1]) == (HH, " Because.", " No.")


def test_a_csv_row_with_a_cell_missing_or_empty_is_refused(tmp_path: Path) -> None:
    rows = read_bytes(tmp_path, "rows.csv", HEADER + "p,a\np,,b\np,a,a\n,a,b\n")
    assert [row.where.rpartition(":")[2] for row in rows] == ["2", "3", "4", "5"]
    told = [row.reason for row in rows if isinstance(row, BadRow)]
    assert told == ["rejected is missing", "chosen is empty", "chosen equals rejected", "prompt is empty"]


def test_a_csv_row_with_a_cell_too_many_is_refused(tmp_path: Path) -> None:
    """An unquoted comma would cut the response short in silence."""
    [bad, good] = read_bytes(tmp_path, "rows.csv", HEADER + "p,a,No, never do that\np,a,b\n")
    assert isinstance(bad, BadRow) and bad.where.endswith(":2")
    assert isinstance(good, Row)


def test_a_csv_header_that_names_a_column_twice_is_refused(tmp_path: Path) -> None:
    """As a key that occurs twice in JSON is."""
    with pytest.raises(UsageError, match="chosen"):
        read_bytes(tmp_path, "rows.csv", "prompt,chosen,chosen,rejected\np,a,b,c\n")


@pytest.mark.parametrize("separator", [";", "\t"])
def test_csv_without_commas_is_refused(separator: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"the only column is .*: write commas, not {re.escape(repr(separator))}$"):
        read_bytes(tmp_path, "rows.csv", HEADER.replace(",", separator) + separator.join("pab"))


@pytest.mark.parametrize(
    "broken", [b'p,"a"x,b\n', b'p,"a,b\np,c,d\n', b"p,\xff,b\n"], ids=["quote", "open quote", "not UTF-8"]
)
@pytest.mark.parametrize("before", [b"", b"p,a,b\n", b"p,a,b\n\n\n", b'p,"a\na",b\n'])
def test_broken_csv_is_refused_with_its_place(before: bytes, broken: bytes, tmp_path: Path) -> None:
    line = 2 + len(before.splitlines())
    with pytest.raises(UsageError, match=f"rows.csv: line {line}: not CSV in UTF-8: "):
        read_bytes(tmp_path, "rows.csv", HEADER.encode() + before + broken)


# ---- columns ----------------------------------------------------------------------------------------------------


def test_columns_are_mapped(tmp_path: Path) -> None:
    record = {"question": "Why?", "good": "Because.", "bad": "No idea.", "chosen": "unused"}
    [row] = read_bytes(tmp_path, "rows.jsonl", json.dumps(record), " prompt=question, chosen = good,rejected=bad")
    assert isinstance(row, Row)
    assert (row.prompt, row.answers[0], row.answers[1]) == ("Why?", "Because.", "No idea.")
    [row] = read_bytes(tmp_path, "rows.csv", "prompt,good,rejected\np,a,b\n", "chosen=good")
    assert isinstance(row, Row) and row.answers[0] == "a"


def test_a_mapped_column_that_is_missing_or_bad_is_told_by_both_names(tmp_path: Path) -> None:
    record = {"prompt": "Why?", "good": "", "rejected": "No."}
    [row] = read_bytes(tmp_path, "rows.jsonl", json.dumps(record), "chosen=good")
    assert isinstance(row, BadRow) and row.reason == "chosen (column 'good') is empty"
    [row] = read_bytes(tmp_path, "rows.jsonl", json.dumps(STRINGS), "chosen=good")
    assert isinstance(row, BadRow) and row.reason == "chosen (column 'good') is missing"
    [row] = read_bytes(tmp_path, "rows.jsonl", json.dumps({"chosen": HH + "a", "rejected": HH + "b"}), "prompt=q")
    assert isinstance(row, BadRow) and row.reason == "prompt (column 'q') is missing"


@pytest.mark.parametrize("columns", ["question", "prompt=", "answer=prompt", "prompt=a,chosen", "=a"])
def test_malformed_columns_are_refused(columns: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--columns .*: write it as prompt=NAME,chosen=NAME,rejected=NAME"):
        read_bytes(tmp_path, "rows.jsonl", LINE, columns)


# ---- files ------------------------------------------------------------------------------------------------------

ZIPPED = gzip.compress(LINE * 2000, mtime=0)
GARBLED = ZIPPED[:40] + b"\x00\x01\x02\xff" + ZIPPED[44:]  # the deflate stream itself is broken


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("rows.jsonl", b"", "has no rows"),
        ("rows.jsonl", b"\n \n", "has no rows"),
        ("rows.jsonl", BOM, "has no rows"),
        ("rows.json", b"", "has no rows"),
        ("rows.json", b" \n", "has no rows"),
        ("rows.json", b"[ ]", "has no rows"),
        ("rows.csv", b"", "has no rows"),
        ("rows.csv", HEADER.encode(), "has no rows"),
        ("rows.jsonl.gz", gzip.compress(b"", mtime=0), "has no rows"),
        ("rows.json", b'["\xff"]', r"not UTF-8 \(byte 3\)"),
        ("rows.txt", LINE, "unknown kind of file; use .jsonl, .json, .parquet, .csv, each optionally with .gz"),
        ("rows", LINE, "unknown kind of file"),
        ("rows.gz", gzip.compress(LINE, mtime=0), "unknown kind of file"),
        ("rows.jsonl.gz", LINE, "cannot be read .*[Nn]ot a gzipped file"),
        ("rows.jsonl.gz", gzip.compress(LINE, mtime=0)[:-9], "cannot be read"),
        ("rows.jsonl.gz", GARBLED, "cannot be read"),
        ("rows.parquet", b"PAR1", "not a readable parquet file"),
        ("rows.parquet.gz", gzip.compress(b"PAR1", mtime=0), "not a readable parquet file"),
        ("rows.parquet.gz", gzip.compress(LINE, mtime=0)[:-9], "cannot be read"),
        ("rows.parquet", LINE, "not a readable parquet file"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(name: str, content: bytes, told: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=f"--data .*{name}: {told}"):
        read_bytes(tmp_path, name, content)


def test_an_empty_parquet_file_is_refused(tmp_path: Path) -> None:
    schema = pa.schema([(name, pa.string()) for name in STRINGS])
    pq.write_table(pa.Table.from_pylist([], schema=schema), tmp_path / "rows.parquet")
    with pytest.raises(UsageError, match="has no rows"):
        read(tmp_path / "rows.parquet")


def test_bad_parquet_rows_are_told_by_their_number(tmp_path: Path) -> None:
    records = [STRINGS, STRINGS | {"chosen": None}, STRINGS | {"rejected": " "}, STRINGS]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "rows.parquet")
    rows = read(tmp_path / "rows.parquet")
    assert [row.where for row in rows] == [f"{tmp_path / 'rows.parquet'}:row {number}" for number in (1, 2, 3, 4)]
    assert [row.reason for row in rows if isinstance(row, BadRow)] == ["chosen is missing", "rejected is empty"]


@pytest.mark.parametrize("form", ["strings", "messages"])
def test_a_text_of_parquet_that_is_none_costs_its_row_only(form: str, tmp_path: Path) -> None:
    """A flipped bit in a text that is stored plainly."""
    turn = [user("Whx?")] if form == "messages" else "Whx?"
    records = [FORMS[form][0], FORMS[form][0] | {"prompt": turn}, FORMS[form][0]] * 100
    pq.write_table(
        pa.Table.from_pylist(records), tmp_path / "a", compression="none", use_dictionary=False, write_statistics=False
    )
    content = (tmp_path / "a").read_bytes()
    place = content.index(b"Whx?")
    rows = read_bytes(tmp_path, "rows.parquet", content[: place + 2] + b"\xf8" + content[place + 3 :])
    bad = [row for row in rows if isinstance(row, BadRow)]
    assert len(rows) == 300 and [(row.where, row.reason) for row in bad] == [
        (f"{tmp_path / 'rows.parquet'}:row 2", "prompt: not UTF-8 (byte 3)")
    ]


def test_a_date_of_parquet_that_is_none_costs_its_row_only(tmp_path: Path) -> None:
    columns = {name: pa.array([value] * 2) for name, value in STRINGS.items()}
    pq.write_table(pa.table(columns | {"day": pa.array([1, 10**8], pa.date32())}), tmp_path / "rows.parquet")
    row, bad = read(tmp_path / "rows.parquet")
    assert isinstance(row, Row) and isinstance(bad, BadRow) and bad.where.endswith(":row 2")
    assert bad.reason == "day: date value out of range"


def test_a_parquet_file_that_names_a_column_twice_is_refused(tmp_path: Path) -> None:
    columns = [pa.array(["p"]), pa.array(["a"]), pa.array(["b"]), pa.array(["c"])]
    pq.write_table(pa.table(columns, names=["prompt", "chosen", "rejected", "chosen"]), tmp_path / "rows.parquet")
    with pytest.raises(UsageError, match="the column 'chosen' occurs twice"):
        read(tmp_path / "rows.parquet")


@pytest.mark.parametrize("name", ["rows \udcff.jsonl", "\x1b[31m.csv", "a\nb.json"])
def test_a_file_may_have_any_name(name: str, tmp_path: Path) -> None:
    write_records(tmp_path / name, [STRINGS])
    assert [type(row) for row in read(tmp_path / name)] == [Row]


@pytest.mark.parametrize("name", ["none.jsonl", "~no-such-user/rows.jsonl", "x" * 300 + ".jsonl", "a\0b.jsonl"])
def test_a_path_that_names_no_file_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="no such file"):
        list(read_rows(find_sources([name])))


# ---- all that is known to go wrong ------------------------------------------------------------------------------

SAID = '"chosen": "b", "rejected": "c"}'
KNOWN: dict[str, tuple[bytes | str, str]] = {
    "no JSON": ("prompt,chosen,rejected", "not JSON: Expecting value"),
    "cut off": (LINE[:-5], "not JSON: Unterminated string"),
    "two objects": (LINE + LINE, "not JSON: Extra data"),
    "no object": ("[1, 2]", "not an object"),
    "null": ("null", "not an object"),
    "nothing in it": ("{}", "chosen is missing"),
    "a field missing": ('{"prompt": "a", "chosen": "b"}', "rejected is missing"),
    "a field null": ('{"prompt": "a", "chosen": null, "rejected": "c"}', "chosen is missing"),
    "a number": ('{"prompt": 7, ' + SAID, "prompt is a number"),
    "an empty field": ('{"prompt": "", ' + SAID, "prompt is empty"),
    "white space": ('{"prompt": "a", "chosen": "\\n ", "rejected": "c"}', "chosen is empty"),
    "equal responses": ('{"prompt": "a", "chosen": "b", "rejected": "b"}', "chosen equals rejected"),
    "kinds that differ": (
        '{"prompt": "a", "chosen": "b", "rejected": [{"role": "assistant", "content": "c"}]}',
        "chosen and",
    ),
    "not UTF-8": (b'{"prompt": "\xff"}', "not UTF-8 (byte 13)"),
    "half a surrogate pair": ('{"prompt": "\\ud800", ' + SAID, "prompt has half of a surrogate pair"),
    "NaN": ('{"prompt": NaN, ' + SAID, "not JSON: NaN is not a JSON value"),
    "a key twice": ('{"prompt": "a", "prompt": "d", ' + SAID, "not JSON: the key 'prompt' occurs twice"),
    "nested deeply": ("[" * 100_000, "nested too deeply"),
    "a huge number": ('{"prompt": ' + "1" * 5000 + ", " + SAID, "not JSON: Exceeds the limit"),
    "an unknown role": (
        '{"prompt": [{"role": "narrator", "content": "a"}], ' + SAID,
        "prompt, message 1: unknown role 'narrator'",
    ),
    "no content": ('{"prompt": [{"role": "user"}], ' + SAID, "prompt, message 1: content must be a string"),
    "an answer too early": ('{"prompt": [{"role": "assistant", "content": "a"}], ' + SAID, "prompt ends with the role"),
    "messages as text": (
        '{"prompt": "[{\\"role\\": \\"user\\"}]", ' + SAID,
        "prompt, message 1: content must be a string",
    ),
    "a zero byte": (b"\x00" + LINE, "not JSON: Expecting value"),
    "UTF-16": (STRINGS_UTF16.replace(b"\n", b""), "not UTF-8 (byte 1)"),
}


def test_every_known_fault_is_reported_with_its_line_and_reason_and_costs_no_other_row(tmp_path: Path) -> None:
    lines = [line.encode() if isinstance(line, str) else line for line, _ in KNOWN.values()]
    rows = read_bytes(tmp_path, "rows.jsonl", b"".join(line + b"\n" + LINE + b"\n" for line in lines))
    assert [row.where for row in rows] == [
        f"{tmp_path / 'rows.jsonl'}:{number}" for number in range(1, 2 * len(KNOWN) + 1)
    ]
    assert {type(row) for row in rows[1::2]} == {Row}
    bad = [row for row in rows[::2] if isinstance(row, BadRow)]
    for name, row in zip(KNOWN, bad, strict=True):
        assert row.reason.startswith(KNOWN[name][1]), name
    told = str(refusal(bad, len(rows))).splitlines()
    assert told[:10] == [f"{row.where}: {row.reason}" for row in bad[:10]]
    assert told[10].startswith(f"and {len(KNOWN) - 10} more: 2 × ") and told[11].startswith(
        f"{len(KNOWN)} of {len(rows)} rows"
    )


# ---- anything at all --------------------------------------------------------------------------------------------

anything = settings(deadline=None, derandomize=True, database=None, max_examples=400)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("anything")


def check_row(row: Row | BadRow) -> None:
    """What every row that is handed on may be relied upon for."""
    assert isinstance(row, (Row, BadRow))
    if isinstance(row, BadRow):
        assert row.reason
        return
    assert row.answers[0] != row.answers[1]
    fields = (row.prompt, row.answers[0], row.answers[1])
    assert all(isinstance(part, str) and part.strip() for part in (row.answers[0], row.answers[1])) == isinstance(
        row.prompt, str
    )
    for part in fields:
        for content in [part] if isinstance(part, str) else [m["content"] or "" for m in part]:
            content.encode()
    if not isinstance(row.prompt, str):
        assert row.prompt[-1]["role"] in ("user", "tool")
        assert {m["role"] for m in [*row.answers[0], *row.answers[1]]} <= {"assistant", "tool", "user"}  # type: ignore[index]
        assert row.answers[0][-1]["role"] == row.answers[1][-1]["role"] == "assistant"  # type: ignore[index]


@anything
@given(st.lists(record, min_size=1, max_size=4))
def test_any_records_give_rows_and_bad_rows_and_nothing_else(folder: Path, records: list[Any]) -> None:
    (folder / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    (folder / "rows.json").write_text(json.dumps(records, indent=1, allow_nan=True))
    lines = read(folder / "rows.jsonl")
    assert len(lines) == len(records)
    assert [row.where for row in lines] == [f"{folder / 'rows.jsonl'}:{n}" for n in range(1, len(records) + 1)]
    if any(word in json.dumps(records) for word in ("NaN", "Infinity")):  # the array is no JSON
        elements: list[Row | BadRow] = []
    else:
        elements = read(folder / "rows.json")
        assert [type(row) for row in elements] == [type(row) for row in lines]
    for row in lines + elements:
        check_row(row)


chunk = st.binary(max_size=12) | st.sampled_from(
    [LINE, b"\n", b"\r\n", b",", b'"', b"[", b"]", b"{", b"}", BOM, b"prompt,chosen,rejected\n", b"p,a,b\n", b"\\ud83d"]
)


@anything
@given(content=st.lists(chunk, max_size=8).map(b"".join))
def test_any_bytes_give_rows_bad_rows_or_a_usage_error(folder: Path, content: bytes) -> None:
    lines = [line for line in content.split(b"\n") if line.strip() not in (b"", BOM)]
    for name in ("any.jsonl", "any.json", "any.csv", "any.jsonl.gz", "any.parquet"):
        try:
            rows = read_bytes(folder, name, content)
        except UsageError as error:
            assert str(error).startswith(f"--data {folder / name}: ")
            assert not (lines and name == "any.jsonl")
            continue
        for row in rows:
            check_row(row)
            assert row.where.startswith(f"{folder / name}:")
        if name == "any.jsonl":
            assert len(rows) == len(lines)


@pytest.mark.parametrize(
    ("names", "columns"),
    [
        (("promt", "chosen", "rejected"), "prompt=promt"),
        (("question", "good_answer", "bad_answer"), "prompt=question,chosen=good_answer,rejected=bad_answer"),
        (("instruction", "best", "worst", "id"), "prompt=instruction,chosen=best,rejected=worst"),
        (("prompt", "chosen", "rejectd"), "rejected=rejectd"),
        (("a", "b", "c"), ""),
        (("prompt_id", "question", "better", "worse"), "prompt=question,chosen=better,rejected=worse"),
        (("query", "preferred", "dispreferred"), "prompt=query,chosen=preferred,rejected=dispreferred"),
        (("question", "good", "best", "bad"), ""),
    ],
)
def test_columns_are_guessed_by_their_names(names: tuple[str, ...], columns: str) -> None:
    assert suggested_columns(dict.fromkeys(names, "x")) == ("--columns " + columns if columns else "")


def test_a_misspelt_prompt_is_no_dialogue(tmp_path: Path) -> None:
    assert reason(tmp_path, {"promt": "Why?", "chosen": "a", "rejected": "b"}).endswith("--columns prompt=promt")
