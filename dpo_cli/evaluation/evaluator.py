"""The evaluation of a policy on pairs: the same in training, in ``dpo eval`` and in a sweep; pairs to read.

Legend: P pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from dpo_cli.data.pairs import Ids, Pairs, model_input_ids, rankings
from dpo_cli.evaluation import statistics
from dpo_cli.evaluation.diagnostics import Evidence, diagnose, verdict
from dpo_cli.evaluation.kl import COLUMNS, FOLD, TokenScores, spans_of
from dpo_cli.evaluation.metrics import SIDES, History, PairScores, Table, step_rewards
from dpo_cli.losses.objective import Objective
from dpo_cli.utils.files import atomic_write, to_json

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
PAIRS_OF_EACH_KIND = 2
CONTEXT = 8  # tokens before and after a shifted one
TOP = 12  # shifted tokens shown of those that became likelier, and of those that became less likely


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found: ``result``, which ``dpo eval --json`` prints; pair by pair; and ``shown_pairs``."""

    result: dict[str, Any]
    scores: PairScores
    shown: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Evaluator:
    """Evaluates policies on the same P pairs."""

    pairs: Pairs
    tokenizer: Any
    objective: Objective

    def scores(
        self,
        tokens: TokenScores,
        ref_logps: tuple[Table, Table] | None = None,
        history: History = (),
        beta: float | None = None,
    ) -> PairScores:
        """Collect the log-probs of an evaluation.

        Where ``tokens`` are of the policy alone, ``ref_logps`` has those of the reference, as they are and with the
        token weights of LD-DPO: (P, 2) each. ``history`` has the lines of the run's metrics up to this policy, if it is
        of a run, and ``beta`` is that of the rewards in it; None: the objective's.
        """
        alpha, rewards, prompts = self.objective.ld_alpha, step_rewards(history), dict[bytes, int]()
        if ref_logps is None or tokens.tokens.shape[1] > 1:
            ref_logps = tokens.logps(1), tokens.logps(1, alpha)
        return PairScores(
            where=[pair.where for pair in self.pairs],
            tokens=self.pairs.loss_lengths.astype(float),
            logps=tokens.logps(),
            ref_logps=ref_logps[0],
            terms=self.pairs.terms.astype(float),
            groups=np.array([prompts.setdefault(pair.prompt.tobytes(), len(prompts)) for pair in self.pairs]),
            objective=self.objective,
            distributions=tokens.distributions,
            weighted=(tokens.logps(0, alpha), ref_logps[1]),
            ranking_sizes=[len(each) for each in rankings(range(len(self.pairs)), self.pairs)],
            shift=float(np.mean(rewards)) * self.objective.beta / (beta or self.objective.beta) if rewards else 0.0,
        )

    @np.errstate(invalid="ignore", over="ignore", divide="ignore")  # numbers that are not finite become None
    def evaluation(
        self,
        scores: PairScores,
        tokens: TokenScores,
        history: History,
        about: Mapping[str, Any],
        trained_on: Mapping[str, Any] | None = None,
        held_out: bool = True,
        **more: Any,
    ) -> Evaluation:
        """Compute means, intervals, findings and examples.

        ``history`` and ``held_out`` are as in ``Evidence``; ``about`` and all non-empty ``more`` go into the result.
        """
        intervals, length = statistics.intervals(scores), statistics.length_bias(scores)
        evidence = Evidence(scores, intervals, length, history, held_out, trained_on["pairs"] if trained_on else 0)
        findings, judged = diagnose(evidence)
        result: dict[str, Any] = {"trained_on": trained_on} if trained_on else {}
        result |= {**about, **scores.means(), "intervals": intervals}
        result["rewards/margins_quantiles"] = {str(q): float(np.quantile(scores.margins, q)) for q in QUANTILES}
        result |= {"length": length, "findings": findings, "judged": judged, "verdict": verdict(evidence, judged)}
        shown = []
        if tokens.distributions:
            result["drift"] = shifted_tokens(tokens, self.pairs, self.tokenizer)
            shown = shown_pairs(scores, self.pairs, tokens, self.tokenizer)
        return Evaluation(result | {name: value for name, value in more.items() if value}, scores, shown)


def shown_pairs(scores: PairScores, pairs: Pairs, tokens: TokenScores, tokenizer: Any) -> list[dict[str, Any]]:
    """Choose the pairs with the largest, the median and the smallest margin, none twice, to read token by token.

    A token has its text, and where it carries loss ``COLUMNS`` and ``logratio``, in nats.
    """
    order, spans = np.argsort(-scores.margins, kind="stable").tolist(), spans_of(pairs)
    n, middle = PAIRS_OF_EACH_KIND, max(0, (len(order) - PAIRS_OF_EACH_KIND) // 2)
    kinds = {"best": order[:n], "median": order[middle : middle + n], "worst": order[::-1][:n]}
    kind_of: dict[int, str] = {}
    for kind, places in kinds.items():
        kind_of |= {place: kind for place in places if place not in kind_of}
    shown = []
    for place, kind in kind_of.items():
        pair, rows = pairs[place], iter(tokens.tokens[spans[place]].tolist())
        about = {"kind": kind, "where": pair.where, "margin": float(scores.margins[place])}
        sides: dict[str, list[dict[str, Any]]] = {}
        for side, ids in zip(SIDES, (pair.chosen, pair.rejected), strict=True):
            sides[side] = [{"text": text} for text in token_texts(ids, tokenizer)]
            for at in np.flatnonzero(ids >= 0):
                numbers = dict(zip(COLUMNS, next(rows), strict=True))
                sides[side][at] |= {**numbers, "logratio": numbers["logp"] - numbers["ref_logp"]}
        shown.append({**about, "prompt": "".join(token_texts(pair.prompt, tokenizer)), **sides})
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
    place = int(np.flatnonzero(ids >= 0)[row - ends[response]])  # counted from the response's end
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
