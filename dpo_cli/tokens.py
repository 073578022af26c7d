"""Rows to pairs of token ids: chat template, prompt boundary, truncation.

A pair is ``prompt``, ``chosen`` and ``rejected``, each a vector of token ids. The boundary between prompt and response
is found among tokens, not characters, and both responses end with the token that ends a turn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from dpo_cli.chat import Chat
from dpo_cli.columns import Message
from dpo_cli.data import BadRow, Reading, Row
from dpo_cli.errors import RowError, UsageError
from dpo_cli.pairs import Ids, Pair, Pairs

_SIDES = ("chosen", "rejected")
BATCH_CHARACTERS, BATCH_ROWS = 2**20, 512  # what meets the tokenizer in one call: more brings no speed


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


# What PairSet.notes counts.
PROMPT_CUT = "prompts shortened from the left"
RESPONSE_CUT = "pairs with a response cut at its end"
BOUNDARY_MOVED = "pairs whose boundary moved back (tokens merge across it)"
TURNS_WITHOUT_LOSS = "pairs with turns behind the prompt that carry no loss (--train-turns)"


def tokenize_rows(
    rows: Iterable[Row | BadRow],
    tokenizer: Any,
    reading: Reading,
    keep_refused: bool = True,
) -> PairSet:
    """Tokenize every row; those that cannot be trained on land in ``refused`` with the reason, and whole if kept."""
    encoder = Encoder(tokenizer, reading)
    out = PairSet()
    if not keep_refused:  # what is held for a while is the reason only
        rows = (BadRow(row.where, row.reason) if isinstance(row, BadRow) else row for row in rows)
    for row, result in encoder.pairs(rows):
        if isinstance(row, BadRow):
            out.refused.append(row)
        elif isinstance(result, RowError):
            record = {"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected}
            out.refused.append(BadRow(row.where, str(result), record if keep_refused else None))
        else:
            pair, notes = result
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


class Reads(NamedTuple):
    """What the model is to read: a prompt, or a prompt and a response."""

    text: str
    templated: bool  # written by the chat template, which brings all special tokens
    wants_eos: bool  # if it does not end with it


Texts = tuple[Reads | RowError, ...]  # prompt, prompt + chosen, prompt + rejected; nothing for a bad row
Part = Ids | RowError
Encoded = tuple[Pair, set[str]]


class Encoder:
    """Turns rows into pairs with one tokenizer, no longer than ``reading.max_length`` tokens.

    ``reading.control_tokens`` says what becomes of those inside messages: ``keep`` them, ``sanitize`` (read them as
    text), or ``refuse`` the row. Strings are taken as they are: they may have been rendered already.
    """

    def __init__(self, tokenizer: Any, reading: Reading) -> None:
        self.tokenizer = tokenizer
        self.max_length, self.train_turns = reading.max_length, reading.train_turns
        if tokenizer.eos_token_id is None:
            raise UsageError("the model's tokenizer has no EOS token, so responses cannot end")
        if reading.control_tokens == "sanitize" and not tokenizer.is_fast:
            raise UsageError("--control-tokens sanitize: the model's tokenizer cannot do it; use refuse")
        self.eos: int = tokenizer.eos_token_id
        probe = tokenizer("a")["input_ids"]  # also leaves the backend as a call needs it: nothing truncated or padded
        self.adds_bos, self.adds_eos = probe[0] == tokenizer.bos_token_id, probe[-1] == self.eos
        self.backend = tokenizer.backend_tokenizer if only_asks_its_backend(tokenizer) else None
        self.chat = Chat(tokenizer, reading.control_tokens, self.adds_bos)

    def pairs(self, rows: Iterable[Row | BadRow]) -> Iterator[tuple[Row | BadRow, Encoded | RowError]]:
        """Each row in order with what ``pair`` makes of it, or why it is bad. Encodes many at once."""
        waiting: list[tuple[Row | BadRow, Texts]] = []
        held = 0
        for row in rows:
            texts = self._texts(row) if isinstance(row, Row) else ()
            waiting.append((row, texts))
            held += sum(len(text.text) if isinstance(text, Reads) else BATCH_CHARACTERS for text in texts)
            if held >= BATCH_CHARACTERS or len(waiting) >= BATCH_ROWS:
                yield from self._finish(waiting)
                waiting, held = [], 0
        yield from self._finish(waiting)

    def pair(self, row: Row) -> Encoded:
        """The row's token ids, truncated, and which of the notes apply to it.

        Raises:
            RowError: the template refuses the row, it has control tokens that are to be refused, or truncation leaves
                no difference between the responses.
        """
        return self._pair(row, *self._encode([self._texts(row)])[0])

    def _finish(self, rows: list[tuple[Row | BadRow, Texts]]) -> Iterator[tuple[Row | BadRow, Encoded | RowError]]:
        for (row, _), parts in zip(rows, self._encode([texts for _, texts in rows]), strict=True):
            if isinstance(row, BadRow):
                yield row, RowError(row.reason)
                continue
            try:
                yield row, self._pair(row, *parts)
            except RowError as error:
                yield row, error

    def _pair(self, row: Row, prompt: Part, chosen: Part, rejected: Part) -> Encoded:
        prompt, chosen, rejected, moved = self._split(prompt, chosen, rejected)
        notes = self.chat.notes(row)
        if isinstance(row.chosen, list) and max(len(row.chosen), len(row.rejected)) > 1:
            chosen, rejected = self._masked(self.chat.adapted(row), prompt, chosen, rejected)
            notes.add(TURNS_WITHOUT_LOSS)
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
            raise RowError(f"the prompt's last turn alone fills max_length {self.max_length}")
        if longest > room:
            chosen, rejected = chosen[:room], rejected[:room]
            notes.add(RESPONSE_CUT)
        if not all((response >= 0).any() for response in (chosen, rejected)):
            raise RowError(f"truncation to max_length {self.max_length} leaves no token that carries loss")
        if np.array_equal(chosen, rejected):
            cut = f"truncation to max_length {self.max_length} removes the difference between chosen and rejected"
            raise RowError(cut if RESPONSE_CUT in notes else "chosen and rejected give the same tokens")
        return Pair(row.where, prompt, chosen, rejected, row.weight, row.margin), notes

    def _split(self, prompt: Part, chosen: Part, rejected: Part) -> tuple[Ids, Ids, Ids, bool]:
        """Untruncated ids: both responses with their prompt, cut where they leave the prompt's own tokens."""
        prompt = _good(prompt)
        if not len(prompt):
            raise RowError("the prompt gives no tokens")
        chosen, rejected = _good(chosen), _good(rejected)
        cut = min(_common_prefix(prompt, chosen), _common_prefix(prompt, rejected))
        if cut == 0:
            raise RowError("prompt and response share no first token, so the response would be read without a prompt")
        return chosen[:cut], chosen[cut:], rejected[cut:], cut < len(prompt)

    def _texts(self, row: Row) -> Texts:
        """What the model is to read: the prompt, and each response behind it."""
        row = self.chat.adapted(row)
        return tuple(self._text(row, response) for response in (None, row.chosen, row.rejected))

    def _text(self, row: Row, response: Any) -> Reads | RowError:
        prompt, arguments = row.prompt, row.template_arguments
        if isinstance(prompt, str):
            return Reads(prompt + (response or ""), templated=False, wants_eos=response is not None)
        try:
            if response is None:
                return Reads(
                    self.chat.render(prompt, arguments, add_generation_prompt=True), templated=True, wants_eos=False
                )
            text = self.chat.render(prompt + response, arguments)
        except RowError as error:
            return error
        if self.chat.turn_end.strip() and text.rstrip().endswith(self.chat.turn_end.strip()):
            return Reads(text.rstrip(), templated=True, wants_eos=False)  # what follows the turn's end is not trained
        return Reads(text.removesuffix(self.chat.turn_end), templated=True, wants_eos=True)

    def _masked(self, row: Row, prompt: Ids, *responses: Ids) -> list[Ids]:
        """The responses, with ``~id`` for tokens of turns that carry no loss."""
        sides: list[Any] = [row.chosen, row.rejected]
        if self.train_turns == "last":
            if later := [name for name, turns in zip(_SIDES, sides, strict=True) if any(map(_is_user, turns))]:
                raise RowError(
                    f"{later[0]} has a 'user' turn; the two may differ in their last answer only "
                    "(--train-turns all trains all answers that differ)"
                )
            if sides[0][-1] == sides[1][-1]:
                raise RowError("chosen and rejected have the same last answer; they differ before (--train-turns all)")
        masked = []
        for name, turns, others, ids in zip(_SIDES, sides, sides[::-1], responses, strict=True):
            answers = [place for place, turn in enumerate(turns) if turn["role"] == "assistant"]
            differ = [place for place in answers if [turns[place]] != others[place : place + 1]]
            if not differ:
                raise RowError(f"{name} has no answer that differs from the other's")
            trained = answers[-1:] if self.train_turns == "last" else differ
            masked.append(self._without_loss(row, turns, trained, prompt, ids))
        return masked

    def _without_loss(self, row: Row, turns: list[Message], trained: list[int], prompt: Ids, response: Ids) -> Ids:
        """A response of several turns, of which only some carry loss."""
        whole = np.concatenate([prompt, response])
        asked: Any = row.prompt
        full = self.chat.render(asked + turns, row.template_arguments)
        carries = np.zeros(len(whole), dtype=bool)
        for place in trained:
            before = asked + turns[:place]
            if not all(self._stands_in(full, turns_so_far, row) for turns_so_far in (before, [*before, turns[place]])):
                raise RowError(
                    "the chat template writes a turn otherwise when others follow: they cannot be told apart"
                )
            texts = self._text(replace(row, prompt=before), None), self._text(row, turns[: place + 1])
            start, end = (_common_prefix(_good(part), whole) for part in self._encode([texts])[0])
            carries[start:end] = True
        return np.where(carries[len(prompt) :], response, ~response)

    def _stands_in(self, full: str, messages: list[Message], row: Row) -> bool:
        """Whether a whole conversation begins with the text of some of its messages."""
        text = self.chat.render(messages, row.template_arguments).rstrip()
        return full.startswith(text.removesuffix(self.tokenizer.eos_token).rstrip())

    def _encode(self, rows: Sequence[Texts]) -> list[tuple[Part, ...]]:
        """Token ids of every text, an error as it is; each kind of text meets the tokenizer in one call."""
        texts = dict.fromkeys(text for row in rows for text in row if isinstance(text, Reads))
        ids: dict[Reads, Part] = {text: self._marked(text.text) for text in texts if self._is_marked(text)}
        for templated in (False, True):
            some = [text for text in texts if text.templated == templated and text not in ids]
            ids.update(zip(some, self._batch([text.text for text in some], templated), strict=True))
        for text, part in ids.items():
            if text.wants_eos and not isinstance(part, RowError) and self.eos not in part[-1:]:
                ids[text] = np.append(part, np.int32(self.eos))
        return [tuple(ids[text] if isinstance(text, Reads) else text for text in row) for row in rows]

    def _is_marked(self, text: Reads) -> bool:
        return text.templated and self.chat.control.marked.search(text.text) is not None

    def _marked(self, text: str) -> Part:
        try:
            return np.asarray(self.chat.control.encode(text), dtype=np.int32)
        except RowError as error:
            return error

    def _batch(self, texts: list[str], templated: bool) -> Iterator[Ids]:
        """Token ids with exactly one BOS where the tokenizer wants one; a template brings its own."""
        if self.backend is not None:
            found = [each.ids for each in self.backend.encode_batch_fast(texts, add_special_tokens=not templated)]
        else:
            call = partial(self.tokenizer, add_special_tokens=not templated, verbose=False)
            found = [call(text)["input_ids"] for text in texts]
        for text, ids in zip(texts, found, strict=True):
            start = not templated and self.adds_bos and text.startswith(self.tokenizer.bos_token)  # brings its own
            end = not templated and self.adds_eos  # a prompt must not end with it, and a response gets its own
            yield np.asarray(ids[start : len(ids) - end], dtype=np.int32)

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
            shorter = replace(row, prompt=system + turns[start:])
            prompt = self._split(*self._encode([self._texts(shorter)])[0])[0]
            if len(prompt) <= room:
                break
        return prompt


def _is_user(turn: Message) -> bool:
    return bool(turn["role"] == "user")


def _common_prefix(a: Ids, b: Ids) -> int:
    n = min(len(a), len(b))
    differs = np.flatnonzero(a[:n] != b[:n])
    return int(differs[0]) if len(differs) else n


def _good(part: Part) -> Ids:
    if isinstance(part, RowError):
        raise part
    return part


def only_asks_its_backend(tokenizer: Any) -> bool:
    """Whether a call does no more than pass a text on, so that the backend can be asked without it.

    That is faster: asked by transformers it also says where in the text each token lies.
    """
    from transformers import PreTrainedTokenizerFast

    kind = type(tokenizer)
    steps = ("__call__", "_encode_plus", "apply_chat_template")
    return tokenizer.is_fast and all(getattr(kind, step) is getattr(PreTrainedTokenizerFast, step) for step in steps)
