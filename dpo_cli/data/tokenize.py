"""Rows as pairs of token ids: chat template, prompt boundary, truncation.

The boundary between prompt and response is determined among tokens, not characters, and both responses end with the
token that ends a turn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count, islice, pairwise
from typing import Any, NamedTuple, TypeVar

import numpy as np

from dpo_cli.data.chat import REASONING_UNSEEN, Chat, Conversation, Side
from dpo_cli.data.pairs import Ids, Pair, Pairs, common_prefix
from dpo_cli.data.rows import BadRow, Row
from dpo_cli.utils.errors import RowError, UsageError, plural

BATCH_ROWS = 512  # per call of the tokenizer; more is no faster


@dataclass
class PairSet:
    """The pairs of some rows, the refused rows, and counts of formats, notes and rows drawn."""

    pairs: Pairs = field(default_factory=Pairs)
    refused: list[BadRow] = field(default_factory=list)
    formats: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    drawn: dict[str, int] = field(default_factory=dict)  # rows of each source of a mixture

    @property
    def rows(self) -> int:
        """The number of rows that were read."""
        return self.formats.total() + len(self.refused)


# What PairSet.notes counts.
PROMPT_CUT = "prompts truncated from the left"
RESPONSE_CUT = "rows with a response truncated at its end"
BOUNDARY_MOVED = "rows whose boundary moved back (tokens merge across it)"


def tokenize_rows(rows: Iterable[Row | BadRow], tokenizer: Any, **reading: Any) -> PairSet:
    """Tokenize every row as ``Encoder`` does; those that cannot be used are ``refused`` with the reason."""
    out = PairSet()
    for each in Encoder(tokenizer, **reading).pairs(rows):
        if isinstance(each, BadRow):
            out.refused.append(each)
        else:
            out.pairs += each.pairs
            out.formats[each.row.format] += 1
            out.notes.update(each.notes)
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
    count = f"{len(refused):,} of {plural(rows, 'row')}"
    lines.append(f"{count} cannot be used. Fix them, or skip them with --on-bad-row skip")
    return UsageError("\n".join(lines))


class Encoded(NamedTuple):
    """A row, rendered if it is messages, with its pairs and notes."""

    row: Row
    pairs: list[Pair]
    notes: set[str]


_RANKINGS = count(1)  # numbers of rankings, of training and held-out rows alike
Texts = dict[tuple[str, bool], Ids]  # by the text, and whether a chat template rendered it, special tokens included
Made = TypeVar("Made")


class Encoder:
    """Converts rows to pairs with one tokenizer, no longer than ``max_length`` tokens.

    ``control_tokens``: ``keep`` those inside messages, or ``refuse`` the row; those in strings are kept, since a
    template may have rendered them. ``train_turns``: the turns of a response that carry loss, ``last`` or ``all``.
    """

    def __init__(
        self, tokenizer: Any, max_length: int = 1024, control_tokens: str = "keep", train_turns: str = "last"
    ) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        if tokenizer.eos_token_id is None:
            raise UsageError("the model's tokenizer has no EOS token, so responses cannot end")
        self.eos: int = tokenizer.eos_token_id
        probe = tokenizer("a")["input_ids"]  # also resets truncation and padding of the backend
        self.adds_bos, self.adds_eos = probe[0] == tokenizer.bos_token_id, probe[-1] == self.eos
        self.backend = tokenizer.backend_tokenizer if _only_asks_its_backend(tokenizer) else None
        self.chat = Chat(tokenizer, control_tokens, self.adds_bos, train_turns)

    def pairs(self, rows: Iterable[Row | BadRow]) -> Iterator[Encoded | BadRow]:
        """Yield what each row gives, in order; one that cannot be used becomes a bad one."""
        rows = iter(rows)
        while batch := list(islice(rows, BATCH_ROWS)):
            texts = [row if isinstance(row, BadRow) else _attempt(row, self.chat.conversation, row) for row in batch]
            ids = self._encode(each for each in texts if isinstance(each, Conversation))
            for each in texts:
                yield each if isinstance(each, BadRow) else _attempt(each.row, self._pairs, each, ids)

    def _pairs(self, texts: Conversation, encoded: Texts) -> Encoded:
        """Make the pairs of a row, in which each answer has the same tokens, and so has the prompt."""
        row, (prompt, responses, moved) = texts.row, self._split(texts, encoded)
        notes = {*texts.notes, *row.notes} | ({BOUNDARY_MOVED} if moved else set())
        longest = max(map(len, responses))
        room = max(self.max_length - longest, self.max_length // 4)  # the prompt is shortened first, down to a quarter
        if len(prompt) > room:
            shorter = self._shorten_prompt(row, prompt, room)
            if len(shorter) < len(prompt):
                prompt = shorter
                notes.add(PROMPT_CUT)
        room = self.max_length - len(prompt)
        if room < 1:
            raise RowError(f"the prompt's last turn alone fills max_length {self.max_length} (--max-length)")
        if longest > room:
            responses = [response[:room] for response in responses]
            notes.add(RESPONSE_CUT)
        if not all((response >= 0).any() for response in responses):
            raise RowError(f"truncation to max_length {self.max_length} leaves no token that carries loss")
        names = [*row.sides]
        for better, worse in row.preferences("all"):
            if np.array_equal(responses[better], responses[worse]):
                both = f"{names[better]} and {names[worse]}"
                if RESPONSE_CUT in notes:
                    raise RowError(f"truncation to max_length {self.max_length} removes the difference between {both}")
                why = ": the chat template leaves out the reasoning in which they differ" * (REASONING_UNSEEN in notes)
                raise RowError(f"{both} give the same tokens{why}")
        pairs, preferences = list[Pair](), row.preferences()
        ranking = next(_RANKINGS) if row.pairs == "ranking" else 0
        for number, (better, worse) in enumerate(preferences, 1):
            where = row.where + f" ({number} of {len(preferences)})" * (len(preferences) > 1)
            margin = row.margin + row.margin_per_score * (row.levels[better] - row.levels[worse])
            pairs.append(Pair(where, prompt, responses[better], responses[worse], row.weight, margin, ranking))
        return Encoded(row, pairs, notes)

    def _split(self, texts: Conversation, encoded: Texts) -> tuple[Ids, list[Ids], bool]:
        """Return the untruncated ids of the prompt and of each answer, ``~id`` if without loss; and if the cut moved.

        The boundary is where the responses leave the prompt's own tokens: its end, unless a token spans it.
        """
        prompt = encoded[texts.prompt, texts.templated]
        if not len(prompt):
            raise RowError("the prompt gives no tokens")
        sides = []
        for side in texts.sides:
            ids = encoded[side.first, texts.templated]
            if side.cuts:
                ids = np.append(ids, self._pieces(side, len(side.text))[len(ids) :])
            sides.append(ids if side.complete or self.eos in ids[-1:] else np.append(ids, np.int32(self.eos)))
        cut = min(common_prefix(prompt, ids) for ids in sides)
        if cut == 0:
            raise RowError("prompt and response share no first token, so the response would be read without a prompt")
        responses = []
        for side, ids in zip(texts.sides, sides, strict=True):
            if side.spans != ((len(texts.prompt), len(side.text)),):  # not all of the response
                carries = np.zeros(len(ids), dtype=bool)
                for begin, end in side.spans:
                    stop = None if end == len(side.text) else common_prefix(self._pieces(side, end), ids)
                    carries[common_prefix(self._pieces(side, begin), ids) : stop] = True
                ids = np.where(carries, ids, ~ids)
            responses.append(ids[cut:])
        return prompt[:cut], responses, cut < len(prompt)

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

    # ---- text to ids ------------------------------------------------------------------------------------------------

    def _encode(self, conversations: Iterable[Conversation]) -> Texts:
        """Encode every text up to its first cut, those of each kind in one call of the tokenizer."""
        texts: dict[bool, dict[str, None]] = {False: {}, True: {}}
        for each in conversations:
            texts[each.templated] |= dict.fromkeys((each.prompt, *(side.first for side in each.sides)))
        ids: Texts = {}
        for templated, some in texts.items():
            encoded = self._batch(list(some), templated)
            ids |= {(text, templated): each for text, each in zip(some, encoded, strict=True)}
        return ids

    def _batch(self, texts: list[str], templated: bool) -> list[Ids]:
        """Encode texts, with exactly one BOS if the tokenizer adds one; a template brings its own."""
        if self.backend is not None:
            encoded = [each.ids for each in self.backend.encode_batch_fast(texts, add_special_tokens=not templated)]
        else:
            call = partial(self.tokenizer, add_special_tokens=not templated, verbose=False)
            encoded = [call(text)["input_ids"] for text in texts]
        if not templated:
            twice = [self.adds_bos and text.startswith(self.tokenizer.bos_token) for text in texts]  # brings its own
            # A prompt must not end with EOS, and a response gets its own.
            encoded = [ids[bos : len(ids) - self.adds_eos] for ids, bos in zip(encoded, twice, strict=True)]
        return [np.asarray(ids, dtype=np.int32) for ids in encoded]

    def _pieces(self, side: Side, end: int) -> Ids:
        """Encode a side's text up to a place, such that no token spans a cut."""
        pieces = []
        for start, stop in pairwise([0, *(cut for cut in side.cuts if cut < end), end]):
            text = side.text[start:stop]
            (ids,) = self._batch([text], templated=True)
            # Of text that follows another SentencePiece would put a space before the first word.
            for before in ("\n", ":") if start else ():  # the first that does not merge with the text
                both, own = self._batch([before + text, before], templated=True)
                if np.array_equal(both[: len(own)], own):
                    ids = both[len(own) :]
                    break
            pieces.append(ids)
        return np.concatenate(pieces)


def _attempt(row: Row, make: Callable[..., Made], *arguments: Any) -> Made | BadRow:
    """Return what is made of a row; one that is refused becomes a bad one."""
    try:
        return make(*arguments)
    except RowError as error:
        return BadRow(row.where, str(error), {"prompt": row.prompt} | row.sides, row.format)


def _only_asks_its_backend(tokenizer: Any) -> bool:
    """Return whether a tokenizer only calls its backend, which called directly does not work out offsets of tokens."""
    from transformers import PreTrainedTokenizerFast

    kind = type(tokenizer)
    steps = ("__call__", "_encode_plus", "apply_chat_template")
    return tokenizer.is_fast and all(getattr(kind, step) is getattr(PreTrainedTokenizerFast, step) for step in steps)
