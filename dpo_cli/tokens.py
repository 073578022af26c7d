"""Rows to pairs of token ids: chat template, prompt boundary, truncation.

A pair is ``prompt``, ``chosen`` and ``rejected``, each a vector of token ids. The boundary between prompt and response
is found among tokens, not characters, and both responses end with the token that ends a turn.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from dpo_cli.data import BadRow, Message, Row, RowError
from dpo_cli.errors import UsageError

Ids = npt.NDArray[np.int32]
_PROBE = "PROBE"


@dataclass(frozen=True, slots=True)
class Pair:
    """Token ids of one preference; ``prompt + chosen`` and ``prompt + rejected`` are what the model reads."""

    where: str
    prompt: Ids
    chosen: Ids
    rejected: Ids


@dataclass
class PairSet:
    """The pairs of some rows, what was refused, and what was changed on the way."""

    pairs: list[Pair] = field(default_factory=list)
    refused: list[BadRow] = field(default_factory=list)
    formats: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)


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


def tokenize_rows(rows: Iterable[Row | BadRow], tokenizer: Any, max_length: int) -> PairSet:
    """Tokenize every row; rows that cannot be trained on land in ``refused`` with the reason."""
    encoder = Encoder(tokenizer, max_length)
    out = PairSet()
    for row in rows:
        if isinstance(row, BadRow):
            out.refused.append(row)
            continue
        try:
            pair, notes = encoder.pair(row)
        except RowError as error:
            record = {"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected}
            out.refused.append(BadRow(row.where, str(error), record))
            continue
        out.pairs.append(pair)
        out.formats[row.format] += 1
        out.notes.update(notes)
    return out


def refusal(refused: list[BadRow], rows: int) -> UsageError:
    """One error for all bad rows: the first ten in full, the rest counted by reason."""
    lines = [f"{bad.where}: {bad.reason}" for bad in refused[:10]]
    if len(refused) > 10:
        counts = Counter(bad.reason for bad in refused[10:])
        most = [f"{n} × {why}" for why, n in counts.most_common(10)] + ["…"] * (len(counts) > 10)
        lines.append(f"and {len(refused) - 10} more: " + "; ".join(most))
    lines.append(f"{len(refused)} of {rows} rows cannot be used. Mend them, or go on without them: --on-bad-row skip")
    return UsageError("\n".join(lines))


class Encoder:
    """Turns rows into pairs with one tokenizer, no longer than ``max_length`` tokens."""

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        if tokenizer.eos_token_id is None:
            raise UsageError("the model's tokenizer has no EOS token, so responses cannot end")
        self.eos: int = tokenizer.eos_token_id
        probe = tokenizer("a")["input_ids"]
        self.adds_bos, self.adds_eos = probe[0] == tokenizer.bos_token_id, probe[-1] == self.eos
        self.turn_end = self._turn_end() if tokenizer.chat_template else ""

    def pair(self, row: Row) -> tuple[Pair, set[str]]:
        """The row's token ids, truncated, and which of the notes apply to it.

        Raises:
            RowError: the template refuses the row, or truncation leaves no difference between the responses.
        """
        notes: set[str] = set()
        prompt, chosen, rejected, moved = self._split(row)
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

    def _encode(self, text: str, templated: bool = False) -> Ids:
        """Token ids with exactly one BOS where the tokenizer wants one; a template brings its own."""
        ids = self.tokenizer(text, add_special_tokens=not templated, verbose=False)["input_ids"]
        if not templated and self.adds_eos:
            ids = ids[:-1]  # a prompt must not end with it, and a response gets its own
        if not templated and self.adds_bos and text.startswith(self.tokenizer.bos_token):
            ids = ids[1:]  # the text brings its own
        return np.asarray(ids, dtype=np.int32)

    def _render(self, messages: list[Message], add_generation_prompt: bool = False) -> str:
        import jinja2

        if not self.tokenizer.chat_template:
            raise RowError("a row of messages needs a chat template, and this model has none; give strings instead")
        try:
            text: str = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
            text.encode()  # half of a surrogate pair is no text
        except (jinja2.TemplateError, ValueError, TypeError, KeyError, RecursionError) as error:
            raise RowError(f"the chat template refuses the messages: {error}") from error
        return text

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
