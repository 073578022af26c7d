"""Rows of Arrow tables as records: those of parquet files and of data sets."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from dpo_cli.utils.errors import RowError

Reader = Callable[[Any], Any]


def table_records(batches: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """Yield ``row N`` and the record or a RowError for each row of Arrow tables; JSON in a column is read."""
    number = 0
    for batch in batches:
        readers = _field_readers(batch.schema)
        for record in _batch_records(batch):
            number += 1
            yield f"row {number}", _with_json(record, readers) if readers else record


def _batch_records(batch: Any) -> list[Any]:
    """The batch's rows; a RowError for one that holds text that is not UTF-8 or a date that is none."""
    try:
        records: list[Any] = batch.to_pylist()
    except (ValueError, OverflowError) as error:
        if batch.num_rows == 1:
            return [RowError(f"cannot be read ({error})")]
        return [record for place in range(batch.num_rows) for record in _batch_records(batch.slice(place, 1))]
    return records


# ---- JSON in a column, which is how the library ``datasets`` stores what differs in kind from row to row --------


def _field_readers(fields: Iterable[Any]) -> dict[str, Reader]:
    """For each of these Arrow fields that has JSON in it, what reads it."""
    return {field.name: reader for field in fields if (reader := _json_reader(field.type))}


def _json_reader(kind: Any) -> Reader | None:
    from pyarrow import types

    if getattr(kind, "extension_name", "") == "arrow.json":
        return lambda text: None if text is None else json.loads(text)
    if types.is_list(kind) or types.is_large_list(kind):
        item = _json_reader(kind.value_type)
        return item and (lambda values: values and [item(value) for value in values])
    if types.is_struct(kind) and (readers := _field_readers(kind)):
        return lambda record: record and _read_fields(record, readers)
    return None


def _read_fields(record: dict[str, Any], readers: dict[str, Reader]) -> dict[str, Any]:
    return record | {name: reader(record[name]) for name, reader in readers.items()}


def _with_json(record: Any, readers: dict[str, Reader]) -> Any:
    try:
        return record if isinstance(record, RowError) else _read_fields(record, readers)
    except (ValueError, RecursionError) as error:
        return RowError(f"a column is not the JSON that it is said to be ({error})")
