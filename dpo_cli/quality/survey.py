"""The two readings of `dpo check`: the first leaves numbers behind, the second looks at the text they point to.

Rows of ``--eval-data`` are read before those of ``--data``, which are held against them.

Legend: N rows, M candidates.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

import numpy as np

from dpo_cli.data.chat import CONTROL_KEPT, CONTROL_SANITIZED
from dpo_cli.data.formats import BadRow, Reading, Row, read_rows
from dpo_cli.data.pairs import Pair
from dpo_cli.data.records import REST, Source, shortened
from dpo_cli.data.tokenize import BOUNDARY_MOVED, PROMPT_CUT, RESPONSE_CUT, Encoder
from dpo_cli.quality import duplicates as crossrow
from dpo_cli.quality import near_duplicates as near
from dpo_cli.quality.checks import RowFindings, Texts, plain_of, texts_of
from dpo_cli.quality.duplicates import Table
from dpo_cli.quality.issue_types import BITS, PROBLEMS, Found
from dpo_cli.quality.near_duplicates import Places
from dpo_cli.utils.console import Reporter
from dpo_cli.utils.errors import RowError, UsageError, printable

NOTES = {
    PROMPT_CUT: "prompt_cut",
    RESPONSE_CUT: "response_cut",
    BOUNDARY_MOVED: "boundary_moved",
    CONTROL_KEPT: "control_tokens",
    CONTROL_SANITIZED: "control_tokens",
}
EVAL, TRAIN = "eval_data", "data"
TELL_EVERY = 10.0  # seconds
NOTHING = Texts("", "", "")
T = TypeVar("T")


class _Wanted(NamedTuple):
    """An example to be shown: a row, and one that it is held against."""

    data: str
    kind: str
    place: int
    other: int


class Survey:
    """What is found in rows of one or two kinds of data, of which ``rows`` says where they stand in the table."""

    def __init__(self, sources: dict[str, list[Source]], reading: Reading, reporter: Reporter, examples: int) -> None:
        self.sources = {data: sources[data] for data in (EVAL, TRAIN) if data in sources}
        self.reading, self.reporter = reading, reporter
        self.found, self.table = Found(examples), Table()
        self.formats: Counter[str] = Counter()
        self.unread: dict[str, str] = {}  # where the rest of a file is not read, and why, of each data
        self.rows: dict[str, slice] = {}

    def usable(self, data: str) -> Places:
        """Places of the rows that were not refused, ascending."""
        if data not in self.rows:
            return np.empty(0, np.int64)
        refused = self.table.flags[self.rows[data]] & np.uint32(BITS["refused"])
        places: Places = np.flatnonzero(refused == 0) + self.rows[data].start
        return places

    def read(self, tokenizer: Any) -> None:
        """First reading: all that a row tells by itself."""
        findings, encoder = RowFindings(tokenizer), Encoder(tokenizer, self.reading)
        for data in self.sources:
            start = len(self.table)
            rows = _told(self._read_rows(data), f"--{data.replace('_', '-')}: read", self.reporter)
            for row, result in encoder.pairs(rows):
                if isinstance(row, BadRow) or isinstance(result, RowError):
                    self._refuse(data, row, str(result))
                    continue
                pair, notes = result
                self.formats[row.format] += 1
                self._look(data, row, pair, notes, findings)
            self.rows[data] = slice(start, len(self.table))

    def _read_rows(self, data: str) -> Iterator[Row | BadRow]:
        return read_rows(self.sources[data], self.reading.columns, self.reading.format)

    def _refuse(self, data: str, row: Row | BadRow, reason: str) -> None:
        record = row.record if isinstance(row, BadRow) else {"prompt": texts_of(row).prompt}
        text = " ".join(map(str, record.values())) if isinstance(record, dict) else str(record or "")
        alike = reason
        if ends := reason.endswith(REST):
            self.unread.setdefault(data, f"{row.where}: {reason}")
        else:
            alike = re.sub(r"'.*'|\b\d+\b", "…", reason)  # without what differs from row to row
        self.found.add(
            data, "refused", row.where, _excerpt(text), printable(alike), apart=ends, whole=printable(reason)
        )
        self.table.add(NOTHING, None, BITS["refused"])

    def _look(self, data: str, row: Row, pair: Pair, notes: Iterable[str], findings: RowFindings) -> None:
        texts = texts_of(row)
        plain = plain_of(row, texts)
        flags = 0
        for kind, excerpt in findings.of(row, texts, plain):
            self.found.add(data, kind, row.where, excerpt)
            flags |= BITS[kind]
        for note in notes:
            kind = NOTES.get(note, "other")
            self.found.add(data, kind, row.where, _excerpt(texts.prompt), "" if note in NOTES else note)
            flags |= BITS[kind]
        self.table.add(plain, pair, flags)

    def compare(self) -> None:
        """Flag what shows between rows only; second reading."""
        if not len(self.table):
            return
        hashes, keys = self.table.hashes, self.table.keys
        whole, held = crossrow.row_hashes(hashes), self.usable(EVAL)
        candidates, wanted = [], []
        for data in self.sources:
            places = self.usable(data)
            bad = self.table.flags & np.uint32(PROBLEMS) != 0  # by itself; else copies are alike
            copies = crossrow.copies(whole, places, bad)
            opposed = crossrow.contradictions(hashes, places)
            circle = crossrow.cycles(hashes, np.setdiff1d(places, opposed[0]))
            found = {"duplicate": copies, "contradiction": opposed, "cycle": (circle, circle)}
            single = np.setdiff1d(places, copies[0])
            candidates.append(near.candidates(keys, single))
            if data == TRAIN:
                found["leak_row"] = crossrow.shared_with(whole, places, held)
                rest = np.setdiff1d(places, found["leak_row"][0])
                found["leak_prompt"] = crossrow.shared_with(hashes[:, 0], rest, held)
                rest = np.setdiff1d(np.intersect1d(rest, single), found["leak_prompt"][0])
                candidates.append(near.across(keys, held, rest))
            for kind, (some, others) in found.items():
                wanted += self._flag(data, kind, some, others)
        self._read_again(np.concatenate(candidates), wanted)

    def _flag(self, data: str, kind: str, places: Places, others: Places) -> list[_Wanted]:
        if len(places):
            self.table.flags[places] |= np.uint32(BITS[kind])
            self.found.counts[data, kind, ""] = len(places)
        most = self.found.most
        shown = zip(places[:most].tolist(), others[:most].tolist(), strict=True)
        return [_Wanted(data, kind, place, other) for place, other in shown]

    def _read_again(self, candidates: Places, wanted: list[_Wanted]) -> None:
        """Second reading: hold candidates (M, 2) against each other, and gather the examples."""
        if not (len(candidates) or wanted):
            return
        candidates = candidates[np.argsort(candidates[:, 1], kind="stable")]
        bounds = np.searchsorted(candidates[:, 1], np.arange(len(self.table) + 1))
        left = np.bincount(candidates[:, 0], minlength=len(self.table))  # times that a row's texts are still needed
        kept: dict[int, tuple[str, Texts]] = {}
        shown = {place: ("", "") for each in wanted for place in (each.place, each.other)}
        for place, row in self._rows_again():
            if isinstance(row, BadRow):
                continue
            if place in shown:
                shown[place] = row.where, _excerpt(texts_of(row).prompt)
            earlier = candidates[bounds[place] : bounds[place + 1], 0].tolist()
            if not (earlier or left[place]):
                continue
            plain = plain_of(row, texts_of(row))
            self._hold_against(place, row, plain, {other: kept[other] for other in earlier if other in kept})
            for other in earlier:
                left[other] -= 1
                if not left[other]:
                    kept.pop(other, None)
            if left[place]:
                kept[place] = row.where, plain
        for data, kind, place, other in wanted:
            self.found.show(data, kind, *shown[place], shown[other][0] if other != place else "")

    def _rows_again(self) -> Iterator[tuple[int, Row | BadRow]]:
        """All rows, with their places in the table."""
        rows = (row for data in self.sources for row in self._read_rows(data))
        count = 0
        for count, row in enumerate(_told(rows, "read again:", self.reporter), 1):
            if count <= len(self.table):
                yield count - 1, row
        if count != len(self.table):
            raise UsageError("--data: the rows changed while they were read; nothing can be said of them")

    def _hold_against(self, place: int, row: Row, plain: Texts, earlier: dict[int, tuple[str, Texts]]) -> None:
        """Flag a row that is near an earlier one which is kept, or near a held-out one."""
        data = next(data for data, slice_ in self.rows.items() if slice_.start <= place < slice_.stop)
        flags = self.table.flags
        for other, (where, text) in earlier.items():
            kind = "near_duplicate" if other >= self.rows[data].start else "leak_near"
            gone = kind == "near_duplicate" and int(flags[other]) & PROBLEMS
            if not (gone or int(flags[place]) & BITS[kind]) and near.is_near(text, plain):
                flags[place] |= np.uint32(BITS[kind])
                self.found.add(data, kind, row.where, _excerpt(texts_of(row).prompt), other=where)


def _excerpt(text: str) -> str:
    return shortened(text, 70)


def _told(rows: Iterable[T], what: str, reporter: Reporter) -> Iterator[T]:
    """The rows; every ten seconds it is told how many there were."""
    last = time.monotonic()
    for count, row in enumerate(rows):
        if count % 1000 == 0 and time.monotonic() - last > TELL_EVERY:
            reporter.info("", f"{what} {count:,} rows")
            last = time.monotonic()
        yield row
