"""Rows as pairs of token ids: chat template, prompt boundary, truncation.

The boundary between prompt and response is determined among tokens, not characters, and both responses end with the
token that ends a turn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice, pairwise
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from dpo_cli.data.chat import Chat, Conversation, Side
from dpo_cli.data.pairs import Ids, Pair, Pairs
from dpo_cli.data.rows import BadRow, Reading, Row
from dpo_cli.data.visible import REASONING_UNSEEN
from dpo_cli.utils.errors import RowError, UsageError

BATCH_ROWS = 512  # per call of the tokenizer; more is no faster


@dataclass
class PairSet:
    """The pairs of some rows, the refused rows, and counts of formats and notes."""

    pairs: Pairs = field(default_factory=Pairs)
    refused: list[BadRow] = field(default_factory=list)
    formats: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)

    @property
    def rows(self) -> int:
        """The number of rows that were read."""
        return len(self.pairs) + len(self.refused)


# What PairSet.notes counts.
PROMPT_CUT = "prompts truncated from the left"
RESPONSE_CUT = "pairs with a response truncated at its end"
BOUNDARY_MOVED = "pairs whose boundary moved back (tokens merge across it)"


def tokenize_rows(
    rows: Iterable[Row | BadRow],
    tokenizer: Any,
    reading: Reading,
) -> PairSet:
    """Tokenize every row; those that cannot be used are ``refused`` with the reason."""
    out = PairSet()
    for row, result in Encoder(tokenizer, reading).pairs(rows):
        if isinstance(row, BadRow):
            out.refused.append(row)
        elif isinstance(result, RowError):
            record = {"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected}
            out.refused.append(BadRow(row.where, str(result), record))
        else:
            pair, notes = result
            out.pairs.append(pair)
            out.formats[row.format] += 1
            out.notes.update(notes)
    return out


def reasons(refused: list[BadRow]) -> dict[str, int]:
    """Count the refused rows per reason, the most frequent first."""
    return dict(Counter(bad.reason for bad in refused).most_common())


def refusal(refused: list[BadRow], rows: int) -> UsageError:
    """Build one error for all bad rows: the first ten in full, the rest counted by reason."""
    lines = [f"{bad.where}: {bad.reason}" for bad in refused[:10]]
    if len(refused) > 10:
        counts = reasons(refused[10:])
        most_frequent = [f"{n} × {why}" for why, n in list(counts.items())[:10]] + ["…"] * (len(counts) > 10)
        lines.append(f"and {len(refused) - 10} more: " + "; ".join(most_frequent))
    lines.append(f"{len(refused)} of {rows} rows cannot be used. Fix them, or skip them with --on-bad-row skip")
    return UsageError("\n".join(lines))


Encoded = tuple[Pair, set[str]]
Text = tuple[str, bool]  # and whether the chat template rendered it, special tokens included


class Encoder:
    """Converts rows to pairs with one tokenizer, no longer than ``reading.max_length`` tokens.

    ``reading.control_tokens``: ``keep`` those inside messages, or ``refuse`` the row. Those in strings are kept, since
    a template may have rendered them.
    """

    def __init__(self, tokenizer: Any, reading: Reading) -> None:
        self.tokenizer = tokenizer
        self.max_length = reading.max_length
        if tokenizer.eos_token_id is None:
            raise UsageError("the model's tokenizer has no EOS token, so responses cannot end")
        self.eos: int = tokenizer.eos_token_id
        probe = tokenizer("a")["input_ids"]  # also resets truncation and padding of the backend
        self.adds_bos, self.adds_eos = probe[0] == tokenizer.bos_token_id, probe[-1] == self.eos
        self.backend = tokenizer.backend_tokenizer if _only_asks_its_backend(tokenizer) else None
        self.chat = Chat(tokenizer, reading.control_tokens, self.adds_bos, reading.train_turns)

    def pairs(self, rows: Iterable[Row | BadRow]) -> Iterator[tuple[Row | BadRow, Encoded | RowError]]:
        """Yield each row in order, rendered if it is messages, with its pair and notes, or why it is bad."""
        rows = iter(rows)
        while batch := list(islice(rows, BATCH_ROWS)):
            rendered = [self._render(row) for row in batch]
            ids = self._encode([texts for _, texts in rendered if isinstance(texts, Conversation)])
            for row, texts in rendered:
                result: Encoded | RowError
                try:
                    result = self._pair(row, texts, ids)
                except RowError as error:
                    result = error
                yield row, result

    def pair(self, row: Row) -> Encoded:
        """Return the row's token ids, truncated, and its notes.

        Raises:
            RowError: as ``Chat.conversation``; or truncation leaves no difference between the responses.
        """
        _, result = next(self.pairs([row]))
        if isinstance(result, RowError):
            raise result
        return result

    def _render(self, row: Row | BadRow) -> tuple[Row | BadRow, Conversation | RowError]:
        if isinstance(row, BadRow):
            return row, RowError(row.reason)
        row = self.chat.as_turns(row)
        try:
            return row, self.chat.conversation(row)
        except RowError as error:
            return row, error

    def _pair(self, row: Row | BadRow, texts: Conversation | RowError, encoded: dict[Text, Ids]) -> Encoded:
        if isinstance(row, BadRow) or isinstance(texts, RowError):
            raise cast(RowError, texts)
        prompt, chosen, rejected, moved = self._split(texts, encoded)
        notes = {*texts.notes, BOUNDARY_MOVED} if moved else {*texts.notes}
        longest = max(len(chosen), len(rejected))
        room = max(self.max_length - longest, self.max_length // 4)  # a prompt gives way, down to a quarter
        if len(prompt) > room:
            shorter = self._shorten_prompt(row, prompt, room)
            if len(shorter) < len(prompt):
                prompt = shorter
                notes.add(PROMPT_CUT)
        room = self.max_length - len(prompt)
        if room < 1:
            raise RowError(f"the prompt's last turn alone fills max_length {self.max_length} (--max-length)")
        if longest > room:
            chosen, rejected = chosen[:room], rejected[:room]
            notes.add(RESPONSE_CUT)
        if not all((response >= 0).any() for response in (chosen, rejected)):
            raise RowError(f"truncation to max_length {self.max_length} leaves no token that carries loss")
        if np.array_equal(chosen, rejected):
            raise RowError(self._no_difference(notes))
        return Pair(row.where, prompt, chosen, rejected, row.weight, row.margin), notes

    def _no_difference(self, notes: set[str]) -> str:
        if RESPONSE_CUT in notes:
            return f"truncation to max_length {self.max_length} removes the difference between chosen and rejected"
        why = ": the chat template leaves out the reasoning in which they differ" if REASONING_UNSEEN in notes else ""
        return f"chosen and rejected give the same tokens{why}"

    def _split(self, texts: Conversation, encoded: dict[Text, Ids]) -> tuple[Ids, Ids, Ids, bool]:
        """Return the untruncated ids of prompt, chosen and rejected, ``~id`` if without loss; and if the cut moved.

        The boundary is where the responses leave the prompt's own tokens: its end, unless a token spans it.
        """
        prompt = encoded[texts.prompt, texts.templated]
        if not len(prompt):
            raise RowError("the prompt gives no tokens")
        sides = [self._side(side, encoded[_first(side), texts.templated]) for side in (texts.chosen, texts.rejected)]
        cut = min(_common_prefix(prompt, ids) for ids in sides)
        if cut == 0:
            raise RowError("prompt and response share no first token, so the response would be read without a prompt")
        responses = []
        for side, ids in zip((texts.chosen, texts.rejected), sides, strict=True):
            whole = side.spans == ((len(texts.prompt), len(side.text)),)
            responses.append((ids if whole else np.where(self._loss(side, ids), ids, ~ids))[cut:])
        return prompt[:cut], responses[0], responses[1], cut < len(prompt)

    def _side(self, side: Side, ids: Ids) -> Ids:
        """Return the ids of a prompt and its response, which end with the template's ending or EOS."""
        if side.cuts:
            ids = np.append(ids, self._pieces(side, len(side.text))[len(ids) :])
        return ids if side.complete or self.eos in ids[-1:] else np.append(ids, np.int32(self.eos))

    def _pieces(self, side: Side, end: int) -> Ids:
        """Encode a side's text up to a place, such that no token spans a cut."""
        places = [0, *(cut for cut in side.cuts if cut < end), end]
        return np.concatenate(
            [self._inside(side.text[a:b]) if a else self._ids(side.text[a:b]) for a, b in pairwise(places)]
        )

    def _inside(self, text: str) -> Ids:
        """Encode text that follows another: SentencePiece would put a space before its first word."""
        for before in ("\n", ":"):  # the first that does not merge with the text
            ids, own = self._ids(before + text), self._ids(before)
            if np.array_equal(ids[: len(own)], own):
                return ids[len(own) :]
        return self._ids(text)

    def _ids(self, text: str) -> Ids:
        return np.asarray(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int32)

    def _loss(self, side: Side, ids: Ids) -> npt.NDArray[np.bool_]:
        """Return the loss mask of a side's tokens."""
        carries = np.zeros(len(ids), dtype=bool)
        for begin, end in side.spans:
            stop = len(ids) if end == len(side.text) else _common_prefix(self._pieces(side, end), ids)
            carries[_common_prefix(self._pieces(side, begin), ids) : stop] = True
        return carries

    def _encode(self, conversations: Sequence[Conversation]) -> dict[Text, Ids]:
        """Encode every text, those of each kind in one call of the tokenizer."""
        texts = {
            (text, each.templated): None
            for each in conversations
            for text in (each.prompt, _first(each.chosen), _first(each.rejected))
        }
        ids: dict[Text, Ids] = {}
        for templated in (False, True):
            some = [text for text in texts if text[1] == templated]
            ids |= zip(some, self._batch([text for text, _ in some], templated), strict=True)
        return ids

    def _batch(self, texts: list[str], templated: bool) -> Iterator[Ids]:
        """Encode texts, with exactly one BOS if the tokenizer adds one; a template brings its own."""
        if self.backend is not None:
            encoded = [each.ids for each in self.backend.encode_batch_fast(texts, add_special_tokens=not templated)]
        else:
            call = partial(self.tokenizer, add_special_tokens=not templated, verbose=False)
            encoded = [call(text)["input_ids"] for text in texts]
        for text, ids in zip(texts, encoded, strict=True):
            start = not templated and self.adds_bos and text.startswith(self.tokenizer.bos_token)  # brings its own
            end = not templated and self.adds_eos  # a prompt must not end with it, and a response gets its own
            yield np.asarray(ids[start : len(ids) - end], dtype=np.int32)

    def _shorten_prompt(self, row: Row, prompt: Ids, room: int) -> Ids:
        """Shorten a prompt to ``room`` tokens if possible: its end is kept; a conversation loses its oldest turns."""
        if isinstance(row.prompt, str):
            keep_bos = int(prompt[0]) == self.tokenizer.bos_token_id
            start = len(prompt) - room + keep_bos
            return np.concatenate([prompt[:keep_bos], prompt[start:]])
        system = [m for m in row.prompt[:1] if m["role"] == "system"]
        turns = row.prompt[len(system) :]
        starts = [i for i, message in enumerate(turns) if message["role"] == "user" and i > 0]
        for start in starts:
            texts = self.chat.conversation(replace(row, prompt=system + turns[start:]))
            prompt = self._split(texts, self._encode([texts]))[0]
            if len(prompt) <= room:
                break
        return prompt


def _first(side: Side) -> str:
    """Return a side's text up to its first cut."""
    return side.text[: side.cuts[0]] if side.cuts else side.text


def _common_prefix(a: Ids, b: Ids) -> int:
    n = min(len(a), len(b))
    differs = np.flatnonzero(a[:n] != b[:n])
    return int(differs[0]) if len(differs) else n


def _only_asks_its_backend(tokenizer: Any) -> bool:
    """Return whether a tokenizer only calls its backend, which called directly does not work out offsets of tokens."""
    from transformers import PreTrainedTokenizerFast

    kind = type(tokenizer)
    steps = ("__call__", "_encode_plus", "apply_chat_template")
    return tokenizer.is_fast and all(getattr(kind, step) is getattr(PreTrainedTokenizerFast, step) for step in steps)
