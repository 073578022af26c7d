"""Rows to pairs of token ids: chat template, prompt boundary, truncation.

A pair is ``prompt``, ``chosen`` and ``rejected``, each a vector of token ids. The boundary between prompt and response
is found among tokens, not characters, and both responses end with the token that ends a turn.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from dpo_cli.data import BadRow, Message, Row, RowError, has_surrogate
from dpo_cli.errors import UsageError
from dpo_cli.template import ControlTokens, render

Ids = npt.NDArray[np.int32]
_PROBE = "PROBE"


@dataclass(frozen=True, slots=True)
class Pair:
    """Token ids of one preference; ``prompt + chosen`` and ``prompt + rejected`` are what the model reads."""

    where: str
    prompt: Ids
    chosen: Ids
    rejected: Ids


class Pairs(Sequence[Pair]):
    """Pairs in flat columns, so that a million take the room of their ids; a pair's arrays are made when asked for."""

    def __init__(self, pairs: Iterable[Pair] = ()) -> None:
        self._ids = array("i")
        self._ends = array("q", [0])  # in ids: of each prompt, chosen and rejected, behind the start of the first
        self._where: list[str] = []
        for pair in pairs:
            self.append(pair)

    def append(self, pair: Pair) -> None:
        """Add a pair at the end."""
        for ids in (pair.prompt, pair.chosen, pair.rejected):
            self._ids.frombytes(ids.tobytes())
            self._ends.append(len(self._ids))
        self._where.append(pair.where)

    def select(self, places: Sequence[int]) -> Pairs:
        """The pairs at these places; the object itself if that is all of them in order."""
        if len(places) == len(self) and all(place == i for i, place in enumerate(places)):
            return self
        return Pairs(self[place] for place in places)

    def largest_id(self) -> int:
        """The largest token id of all pairs."""
        return max(self._ids, default=0)

    def __add__(self, other: Pairs) -> Pairs:
        return Pairs(chain(self, other)) if other else self

    def __len__(self) -> int:
        return len(self._where)

    @overload
    def __getitem__(self, place: int) -> Pair: ...
    @overload
    def __getitem__(self, place: slice) -> Pairs: ...
    def __getitem__(self, place: int | slice) -> Pair | Pairs:
        if isinstance(place, slice):
            return self.select(range(len(self))[place])
        place = range(len(self))[place]  # from the end where negative, and IndexError, as a list has them
        start, prompt, chosen, rejected = self._ends[3 * place : 3 * place + 4]
        return Pair(
            self._where[place],
            np.asarray(self._ids[start:prompt]),
            np.asarray(self._ids[prompt:chosen]),
            np.asarray(self._ids[chosen:rejected]),
        )


@dataclass
class PairSet:
    """The pairs of some rows, what was refused, and what was changed on the way."""

    pairs: Pairs = field(default_factory=Pairs)
    refused: list[BadRow] = field(default_factory=list)
    formats: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)

    @property
    def rows(self) -> int:
        """Rows that were read: those that became pairs and those that were refused."""
        return len(self.pairs) + len(self.refused)


def digest(pairs: Iterable[Pair]) -> str:
    """Content hash over all token ids in order (hex)."""
    h = hashlib.sha256()
    for pair in pairs:
        for ids in (pair.prompt, pair.chosen, pair.rejected):
            h.update(len(ids).to_bytes(4, "little") + ids.tobytes())
    return h.hexdigest()


# What PairSet.notes counts.
PROMPT_CUT = "prompts shortened from the left"
RESPONSE_CUT = "pairs with a response cut at its end"
BOUNDARY_MOVED = "pairs whose boundary moved back (tokens merge across it)"
CONTROL_KEPT = "pairs with control tokens inside their messages, which act as such (--control-tokens keep)"
CONTROL_SANITIZED = "pairs with control tokens inside their messages, read as text (--control-tokens sanitize)"


def tokenize_rows(
    rows: Iterable[Row | BadRow],
    tokenizer: Any,
    max_length: int,
    control_tokens: str = "keep",
    keep_refused: bool = True,
) -> PairSet:
    """Tokenize every row; those that cannot be trained on land in ``refused`` with the reason, and whole if kept."""
    encoder = Encoder(tokenizer, max_length, control_tokens)
    out = PairSet()
    for row in rows:
        if isinstance(row, BadRow):
            out.refused.append(row if keep_refused else BadRow(row.where, row.reason))
            continue
        try:
            pair, notes = encoder.pair(row)
        except RowError as error:
            record = {"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected}
            out.refused.append(BadRow(row.where, str(error), record if keep_refused else None))
            continue
        out.pairs.append(pair)
        out.formats[row.format] += 1
        out.notes.update(notes)
    return out


def reasons(refused: list[BadRow]) -> dict[str, int]:
    """How many rows were refused for which reason, the most frequent first."""
    return dict(Counter(bad.reason for bad in refused).most_common())


def refusal(refused: list[BadRow], rows: int) -> UsageError:
    """One error for all bad rows: the first ten in full, the rest counted by reason."""
    lines = [f"{bad.where}: {bad.reason}" for bad in refused[:10]]
    if len(refused) > 10:
        counts = reasons(refused[10:])
        most = [f"{n} × {why}" for why, n in list(counts.items())[:10]] + ["…"] * (len(counts) > 10)
        lines.append(f"and {len(refused) - 10} more: " + "; ".join(most))
    lines.append(f"{len(refused)} of {rows} rows cannot be used. Mend them, or go on without them: --on-bad-row skip")
    return UsageError("\n".join(lines))


class Encoder:
    """Turns rows into pairs with one tokenizer, no longer than ``max_length`` tokens.

    ``control_tokens`` says what becomes of those inside messages: ``keep`` them, ``sanitize`` (read them as text), or
    ``refuse`` the row. Strings are taken as they are: they may have been rendered already.
    """

    def __init__(self, tokenizer: Any, max_length: int, control_tokens: str = "keep") -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.control_tokens = control_tokens
        if tokenizer.eos_token_id is None:
            raise UsageError("the model's tokenizer has no EOS token, so responses cannot end")
        if control_tokens == "sanitize" and not tokenizer.is_fast:
            raise UsageError("--control-tokens sanitize: the model's tokenizer cannot do it; use refuse")
        self.eos: int = tokenizer.eos_token_id
        probe = tokenizer("a")["input_ids"]
        self.adds_bos, self.adds_eos = probe[0] == tokenizer.bos_token_id, probe[-1] == self.eos
        self.control = ControlTokens(tokenizer)
        self.turn_end = self._turn_end() if tokenizer.chat_template else ""

    def pair(self, row: Row) -> tuple[Pair, set[str]]:
        """The row's token ids, truncated, and which of the notes apply to it.

        Raises:
            RowError: the template refuses the row, it has control tokens that are to be refused, or truncation leaves
                no difference between the responses.
        """
        prompt, chosen, rejected, moved = self._split(row)
        notes = self._control_notes(row)
        if moved:
            notes.add(BOUNDARY_MOVED)
        longest = max(len(chosen), len(rejected))
        room = max(self.max_length - longest, self.max_length // 4)  # a prompt gives way, down to a quarter
        if len(prompt) > room:
            shorter = self._shorten_prompt(row, prompt, room)
            if len(shorter) < len(prompt):
                prompt = shorter
                notes.add(PROMPT_CUT)
        room = self.max_length - len(prompt)
        if room < 1:
            raise RowError(f"the prompt's last turn alone fills max_length ({len(prompt)} of {self.max_length} tokens)")
        if longest > room:
            chosen, rejected = chosen[:room], rejected[:room]
            notes.add(RESPONSE_CUT)
        if np.array_equal(chosen, rejected):
            cut = f"truncation to max_length {self.max_length} removes the difference between chosen and rejected"
            raise RowError(cut if RESPONSE_CUT in notes else "chosen and rejected give the same tokens")
        return Pair(row.where, prompt, chosen, rejected), notes

    def _split(self, row: Row) -> tuple[Ids, Ids, Ids, bool]:
        """Untruncated ids: both responses rendered with their prompt, cut where they leave the prompt's own tokens."""
        prompt = self._prompt_ids(row.prompt)
        if not len(prompt):
            raise RowError("the prompt gives no tokens")
        chosen, rejected = self._full_ids(row.prompt, row.chosen), self._full_ids(row.prompt, row.rejected)
        cut = min(_common_prefix(prompt, chosen), _common_prefix(prompt, rejected))
        if cut == 0:
            raise RowError("prompt and response share no first token, so the response would be read without a prompt")
        return chosen[:cut], chosen[cut:], rejected[cut:], cut < len(prompt)

    def _prompt_ids(self, prompt: str | list[Message]) -> Ids:
        if isinstance(prompt, str):
            return self._encode(prompt)
        return self._encode(self._render(prompt, add_generation_prompt=True), templated=True)

    def _full_ids(self, prompt: Any, response: Any) -> Ids:
        if isinstance(prompt, str):
            ids = self._encode(prompt + response)
        else:
            text = self._render(prompt + response)
            if self.turn_end.strip() and text.rstrip().endswith(self.turn_end.strip()):
                return self._encode(text.rstrip(), templated=True)  # what follows the turn's end is not trained
            ids = self._encode(text.removesuffix(self.turn_end), templated=True)
        return ids if ids[-1] == self.eos else np.append(ids, np.int32(self.eos))

    def _control_notes(self, row: Row) -> set[str]:
        if isinstance(row.prompt, str):
            return set()
        fields = {"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected}
        found = {name: token for name, value in fields.items() if (token := self.control.first(value))}
        if found and self.control_tokens == "refuse":
            raise RowError(", ".join(f"{name} contains the control token '{token}'" for name, token in found.items()))
        return {CONTROL_SANITIZED if self.control_tokens == "sanitize" else CONTROL_KEPT} if found else set()

    def _encode(self, text: str, templated: bool = False) -> Ids:
        """Token ids with exactly one BOS where the tokenizer wants one; a template brings its own."""
        if templated:
            return np.asarray(self.control.encode(text), dtype=np.int32)
        ids = self.tokenizer(text, verbose=False)["input_ids"]
        if self.adds_eos:
            ids = ids[:-1]  # a prompt must not end with it, and a response gets its own
        if self.adds_bos and text.startswith(self.tokenizer.bos_token):
            ids = ids[1:]  # the text brings its own
        return np.asarray(ids, dtype=np.int32)

    def _render(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        """The template's text; what in it is to be read as text is marked."""
        text = render(self.tokenizer, messages, add_generation_prompt)
        if has_surrogate(text):
            raise RowError("the messages have half of a surrogate pair, which is no text")
        if self.control_tokens != "sanitize" or not self.control.first(messages):
            return text
        return render(self.tokenizer, self.control.mark(messages), add_generation_prompt)

    def _turn_end(self) -> str:
        """What the template writes after an answer, such as ``<|im_end|>\\n``; empty if nothing."""
        try:
            text = self._render([{"role": "user", "content": "u"}, {"role": "assistant", "content": _PROBE}])
        except RowError:
            return ""
        return text.rpartition(_PROBE)[2]

    def _shorten_prompt(self, row: Row, prompt: Ids, room: int) -> Ids:
        """A prompt of ``room`` tokens or the next best: its end stays; a conversation loses its oldest turns."""
        if isinstance(row.prompt, str):
            keep_bos = int(prompt[0]) == self.tokenizer.bos_token_id
            start = len(prompt) - room + keep_bos
            return np.concatenate([prompt[:keep_bos], prompt[start:]])
        system = [m for m in row.prompt[:1] if m["role"] in ("system", "developer")]
        turns = row.prompt[len(system) :]
        starts = [i for i, message in enumerate(turns) if message["role"] == "user" and i > 0]
        for start in starts:
            prompt = self._split(replace(row, prompt=system + turns[start:]))[0]
            if len(prompt) <= room:
                break
        return prompt


def _common_prefix(a: Ids, b: Ids) -> int:
    n = min(len(a), len(b))
    differs = np.flatnonzero(a[:n] != b[:n])
    return int(differs[0]) if len(differs) else n
