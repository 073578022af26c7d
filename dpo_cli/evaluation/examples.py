"""Evaluated pairs to read: token by token, shifted tokens in their context, and one line per pair for scripts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from dpo_cli.data.pairs import Ids, Pairs, model_input_ids
from dpo_cli.evaluation.kl import FOLD, TokenScores, spans_of
from dpo_cli.evaluation.metrics import SIDES, PairScores
from dpo_cli.utils.files import atomic_write, to_json

PAIRS_OF_EACH_KIND = 2
CONTEXT = 8  # tokens before and after a shifted one
TOP = 12  # shifted tokens shown of those that became likelier, and of those that became less likely


@dataclass(frozen=True)
class Token:
    """A response token as it is shown; without numbers where it carries no loss.

    Units: nats; ``kl`` is KL(policy||reference) at its position.
    """

    text: str
    logp: float | None = None
    ref_logp: float | None = None
    entropy: float | None = None
    ref_entropy: float | None = None
    kl: float | None = None

    @property
    def logratio(self) -> float:
        """NaN where the token carries no loss."""
        return math.nan if self.logp is None or self.ref_logp is None else self.logp - self.ref_logp


@dataclass(frozen=True)
class ShownPair:
    """A pair to read token by token; ``kind``: best, median or worst, by its margin."""

    kind: str
    where: str
    margin: float
    prompt: str
    chosen: list[Token]
    rejected: list[Token]


def shown_pairs(scores: PairScores, pairs: Pairs, tokens: TokenScores, tokenizer: Any) -> list[ShownPair]:
    """Choose the pairs with the largest, the median and the smallest margin; none twice."""
    order, spans = np.argsort(-scores.margins, kind="stable").tolist(), spans_of(pairs)
    n, middle = PAIRS_OF_EACH_KIND, max(0, (len(order) - PAIRS_OF_EACH_KIND) // 2)
    kinds = {"best": order[:n], "median": order[middle : middle + n], "worst": order[::-1][:n]}
    kind_of = {place: kind for kind in reversed(kinds) for place in kinds[kind]}  # best, where it is several
    shown = []
    for place in dict.fromkeys(place for places in kinds.values() for place in places):
        pair, rows = pairs[place], iter(tokens.tokens[spans[place], :5].tolist())
        sides = [
            [Token(text, *(next(rows) if loss else ())) for text, loss in zip(texts, ids >= 0, strict=True)]
            for ids, texts in ((ids, token_texts(ids, tokenizer)) for ids in (pair.chosen, pair.rejected))
        ]
        prompt = "".join(token_texts(pair.prompt, tokenizer))
        shown.append(ShownPair(kind_of[place], pair.where, float(scores.margins[place]), prompt, *sides))
    return shown


def token_texts(ids: Ids, tokenizer: Any) -> list[str]:
    """Each token's own text: what it adds to the one before it, since some decoders drop a text's first space."""
    whole = model_input_ids(ids).tolist()
    alone = [tokenizer.decode([each], clean_up_tokenization_spaces=False) for each in whole]
    both = [tokenizer.decode([*two], clean_up_tokenization_spaces=False) for two in pairwise(whole)]
    return alone[:1] + [two[len(first) :] for first, two in zip(alone, both, strict=False)]


def shifted_tokens(tokens: TokenScores, pairs: Pairs, tokenizer: Any) -> dict[str, Any]:
    """Count the response tokens whose probability changed more than 20-fold; ``top``: the largest, in context."""
    logratios = tokens.logratios.nan_to_num().numpy()
    shifted, order = np.abs(logratios) > math.log(FOLD), np.argsort(-logratios, kind="stable")
    rose = [row for row in order[:TOP] if shifted[row] and logratios[row] > 0]
    fell = [row for row in order[::-1][:TOP] if shifted[row] and logratios[row] < 0]
    top = [_in_context(int(row), tokens, pairs, tokenizer) for row in [*rose, *fell]]
    counts = {"tokens": len(logratios), "shifted": int(shifted.sum()), "share": float(shifted.mean())}
    return {"fold": FOLD} | counts | {"top": top}


def _in_context(row: int, tokens: TokenScores, pairs: Pairs, tokenizer: Any) -> dict[str, Any]:
    """A token with the text around it. ``fold``: how many times likelier it became, negative if less likely."""
    ends = tokens.lengths.reshape(-1).cumsum()  # of the responses: (2P,)
    response = int(np.searchsorted(ends, row, "right"))
    pair, side = pairs[response // 2], SIDES[response % 2]
    ids: Ids = getattr(pair, side)
    offset = row - (int(ends[response - 1]) if response else 0)
    place = int(np.flatnonzero(ids >= 0)[offset])
    logp, ref_logp = tokens.tokens[row, :2].tolist()
    fold = math.copysign(math.exp(min(abs(logp - ref_logp), 700)), logp - ref_logp)
    text, at = np.concatenate([model_input_ids(pair.prompt), model_input_ids(ids)]), len(pair.prompt) + place
    spans = (slice(max(0, at - CONTEXT), at), slice(at, at + 1), slice(at + 1, at + 1 + CONTEXT))
    before, token, after = (tokenizer.decode(text[span], clean_up_tokenization_spaces=False) for span in spans)
    about = {"row": pair.where, "response": side, "place": place, "before": before, "token": token, "after": after}
    return about | {"logp": logp, "ref_logp": ref_logp, "fold": fold}


def write_per_pair(file: Path, pairs: Pairs, scores: PairScores) -> None:
    """Write one line per pair; ``tokens`` of a response are those that carry loss."""
    rewards = np.stack([scores.metrics[f"rewards/{side}"] for side in SIDES], 1)
    tables = {"logps": scores.logps, "ref_logps": scores.ref_logps, "rewards": rewards}
    if exact := scores.distributions:
        tables |= {name: exact[name] / scores.tokens for name in ("kl", "reverse_kl")}
    with atomic_write(file) as temporary, temporary.open("w", encoding="utf-8") as stream:
        for place, pair in enumerate(pairs):
            line: dict[str, Any] = {"row": pair.where}
            line |= {f"{name}/{side}": each[place, c] for name, each in tables.items() for c, side in enumerate(SIDES)}
            line |= {"margin": scores.margins[place], "tokens/prompt": len(pair.prompt)}
            line |= {f"tokens/{side}": int(scores.tokens[place, c]) for c, side in enumerate(SIDES)}
            stream.write(to_json(line) + "\n")
