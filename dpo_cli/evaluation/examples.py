"""Evaluated pairs to read: token by token, shifted tokens in their context, and one line per pair for scripts."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from dpo_cli.data.pairs import Ids, Pairs, carries_loss, model_input_ids
from dpo_cli.evaluation.kl import FOLD, ModelComparison
from dpo_cli.evaluation.metrics import SIDES, PairScores
from dpo_cli.utils.files import atomic_write, to_json

PAIRS_OF_EACH_KIND = 2
CONTEXT = 8  # tokens before and after a shifted one
TOP = 12  # shifted tokens shown of those that became likelier, and of those that became less likely


@dataclass(frozen=True)
class Token:
    """A token as it is shown; without numbers in a prompt and where it carries no loss.

    Units: nats; ``kl`` is KL(policy||reference) at its position.
    """

    text: str
    logp: float | None = None
    ref_logp: float | None = None
    entropy: float | None = None
    ref_entropy: float | None = None
    kl: float | None = None


@dataclass(frozen=True)
class ShownPair:
    """A pair to read token by token; ``kind``: best, median or worst, by its margin."""

    kind: str
    where: str
    margin: float
    prompt: list[Token]
    chosen: list[Token]
    rejected: list[Token]


def shown_pairs(scores: PairScores, pairs: Pairs, compared: ModelComparison, tokenizer: Any) -> list[ShownPair]:
    """Choose the pairs with the largest, the median and the smallest margin; none twice."""
    order = np.argsort(-scores.margins, kind="stable").tolist()
    n, middle = PAIRS_OF_EACH_KIND, max(0, (len(order) - PAIRS_OF_EACH_KIND) // 2)
    shown: dict[int, ShownPair] = {}
    for kind, places in (("best", order[:n]), ("median", order[middle : middle + n]), ("worst", order[::-1][:n])):
        for place in places:
            if place not in shown:
                sides = _token_sides(place, pairs, compared, tokenizer)
                shown[place] = ShownPair(kind, pairs[place].where, float(scores.margins[place]), *sides)
    return list(shown.values())


def _token_sides(place: int, pairs: Pairs, compared: ModelComparison, tokenizer: Any) -> list[list[Token]]:
    """Prompt, chosen and rejected tokens of a pair."""
    pair, row = pairs[place], int(compared.starts[place])
    sides = [[Token(text) for text in token_texts(pair.prompt, tokenizer)]]
    for ids in (pair.chosen, pair.rejected):
        tokens = []
        for text, loss in zip(token_texts(ids, tokenizer), carries_loss(ids), strict=True):
            tokens.append(Token(text, *compared.tokens[row, :5].tolist()) if loss else Token(text))
            row += int(loss)
        sides.append(tokens)
    return sides


def token_texts(ids: Ids, tokenizer: Any) -> list[str]:
    """Each token's own text: what it adds to the one before it, since some decoders drop a text's first space."""
    whole = model_input_ids(ids).tolist()
    alone = [tokenizer.decode([each], clean_up_tokenization_spaces=False) for each in whole]
    both = [tokenizer.decode([*two], clean_up_tokenization_spaces=False) for two in pairwise(whole)]
    return alone[:1] + [two[len(first) :] for first, two in zip(alone, both, strict=False)]


def shifted_tokens(compared: ModelComparison, pairs: Pairs, tokenizer: Any) -> dict[str, Any]:
    """Count the response tokens whose probability changed more than 20-fold; ``top``: the largest, in context."""
    logratios = compared.logratios.nan_to_num().numpy()
    shifted = np.abs(logratios) > math.log(FOLD)
    order = np.argsort(-logratios, kind="stable")
    rose, fell = (
        rows[shifted[rows]] for rows in (order[logratios[order] > 0], order[::-1][logratios[order[::-1]] < 0])
    )
    top = [_in_context(int(row), compared, pairs, tokenizer) for row in [*rose[:TOP], *fell[:TOP]]]
    counts = {"tokens": len(logratios), "shifted": int(shifted.sum()), "share": float(shifted.mean())}
    return {"fold": FOLD} | counts | {"top": top}


def _in_context(row: int, compared: ModelComparison, pairs: Pairs, tokenizer: Any) -> dict[str, Any]:
    """A token with the text around it. ``fold``: how many times likelier it became, negative if less likely."""
    pair_index = int(np.searchsorted(compared.starts, row, "right")) - 1
    pair, offset = pairs[pair_index], row - int(compared.starts[pair_index])
    chosen = int(compared.lengths[pair_index, 0])
    side, offset = ("chosen", offset) if offset < chosen else ("rejected", offset - chosen)
    ids: Ids = getattr(pair, side)
    place = int(np.flatnonzero(carries_loss(ids))[offset])
    logp, ref_logp = compared.tokens[row, :2].tolist()
    fold = math.copysign(math.exp(min(abs(logp - ref_logp), 700)), logp - ref_logp)
    text, at = np.concatenate([model_input_ids(pair.prompt), model_input_ids(ids)]), len(pair.prompt) + place
    spans = (slice(max(0, at - CONTEXT), at), slice(at, at + 1), slice(at + 1, at + 1 + CONTEXT))
    before, token, after = (tokenizer.decode(text[span], clean_up_tokenization_spaces=False) for span in spans)
    about = {"row": pair.where, "response": side, "place": place, "before": before, "token": token, "after": after}
    return about | {"logp": logp, "ref_logp": ref_logp, "fold": fold}


def write_per_pair(file: Path, pairs: Pairs, scores: PairScores) -> None:
    """Write one line per pair; ``tokens`` of a response are those that carry loss."""
    tables = {"logps": scores.logps, "ref_logps": scores.ref_logps, "rewards": scores.rewards}
    if (exact := scores.distributions) is not None:
        tables |= {"kl": exact.kl / scores.tokens, "reverse_kl": exact.reverse_kl / scores.tokens}
    with atomic_write(file) as temporary, temporary.open("w", encoding="utf-8") as stream:
        for place, pair in enumerate(pairs):
            line: dict[str, Any] = {"row": pair.where}
            line |= {f"{name}/{side}": each[place, c] for name, each in tables.items() for c, side in enumerate(SIDES)}
            line |= {"margin": scores.margins[place], "tokens/prompt": len(pair.prompt)}
            line |= {f"tokens/{side}": int(scores.tokens[place, c]) for c, side in enumerate(SIDES)}
            stream.write(to_json(line) + "\n")
