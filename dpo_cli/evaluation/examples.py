"""Evaluated pairs to look at: token by token, tokens that moved in their context, and a line a pair for scripts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from dpo_cli.data.pairs import Ids, Pairs, carries_loss, model_input_ids
from dpo_cli.evaluation.drift import FOLD, Compared, TokenFile
from dpo_cli.evaluation.scores import SIDES, Scores, ShownPair, Token
from dpo_cli.utils.files import atomic_write, to_json

SHOWN = 2  # pairs of each kind
AROUND = 8  # tokens before and after one that moved


def shown_pairs(scores: Scores, pairs: Pairs, tokens: TokenFile, tokenizer: Any) -> list[ShownPair]:
    """The pairs with the largest, the middle and the smallest margin; none twice."""
    order = np.argsort(-scores.margins, kind="stable")
    middle = max(0, (len(order) - SHOWN) // 2)
    kinds = {"best": order[:SHOWN], "median": order[middle : middle + SHOWN], "worst": order[::-1][:SHOWN]}
    seen: set[int] = set()
    shown = []
    for why, places in kinds.items():
        for place in map(int, places):
            if place not in seen:
                seen.add(place)
                shown.append(_shown(why, place, float(scores.margins[place]), pairs, tokens, tokenizer))
    return shown


def _shown(why: str, place: int, margin: float, pairs: Pairs, tokens: TokenFile, tokenizer: Any) -> ShownPair:
    pair, rows = pairs[place], iter(tokens.read([place]).tolist())
    sides = []
    for ids in (pair.chosen, pair.rejected):
        texts = zip(token_texts(ids, tokenizer), carries_loss(ids), strict=True)
        sides.append([_token(text, next(rows)) if loss else Token(text) for text, loss in texts])
    prompt = [Token(text) for text in token_texts(pair.prompt, tokenizer)]
    return ShownPair(why, pair.where, margin, prompt, *sides)


def _token(text: str, row: Sequence[float]) -> Token:
    logp, ref_logp, entropy, ref_entropy, _, _, kl, _ = row
    return Token(text, logp, ref_logp, entropy, ref_entropy, kl)


def token_texts(ids: Ids, tokenizer: Any) -> list[str]:
    """Each token's own text: what it adds to the one before it, since some decoders drop a text's first space."""
    whole = model_input_ids(ids).tolist()
    alone = [tokenizer.decode([each], clean_up_tokenization_spaces=False) for each in whole]
    both = [tokenizer.decode([*two], clean_up_tokenization_spaces=False) for two in pairwise(whole)]
    return alone[:1] + [two[len(first) :] for first, two in zip(alone, both, strict=False)]


def drift_tokens(compared: Compared, pairs: Pairs, tokenizer: Any) -> dict[str, Any]:
    """How many response tokens moved, and those that moved farthest in their context."""
    moved, tokens = float(compared.distributions.moved.sum()), int(compared.tokens.ends[-1])
    return {
        "fold": FOLD,
        "tokens": tokens,
        "moved": int(moved),
        "share": moved / tokens,
        "identity_error": compared.distributions.identity_error,
        "top": [
            _in_context(token.pair, token.row, compared, pairs, tokenizer)
            for token in compared.moved
            if abs(token.logratio) > math.log(FOLD)
        ],
    }


def _in_context(place: int, row: int, compared: Compared, pairs: Pairs, tokenizer: Any) -> dict[str, Any]:
    """A token with the text around it. ``fold``: how many times likelier it became, negative where less likely."""
    pair, chosen = pairs[place], int(compared.tokens.lengths[place, 0])
    side = SIDES[row >= chosen]
    ids: Ids = getattr(pair, side)
    at = int(np.flatnonzero(carries_loss(ids))[row - chosen * (row >= chosen)])
    logp, ref_logp = compared.tokens.read([place])[row, :2].tolist()
    fold = math.exp(min(abs(logp - ref_logp), 700))  # the next ones overflow
    whole = np.concatenate([model_input_ids(pair.prompt), model_input_ids(ids)])
    here = len(pair.prompt) + at
    before, token, after = (
        tokenizer.decode(whole[start:end], clean_up_tokenization_spaces=False)
        for start, end in ((max(0, here - AROUND), here), (here, here + 1), (here + 1, here + 1 + AROUND))
    )
    about = {"row": pair.where, "response": side, "place": at, "before": before, "token": token, "after": after}
    return about | {"logp": logp, "ref_logp": ref_logp, "fold": fold if logp > ref_logp else -fold}


def write_per_pair(file: Path, pairs: Pairs, scores: Scores) -> None:
    """One line a pair; ``tokens`` of a response are those that carry loss, which its log-probs are sums over."""
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
