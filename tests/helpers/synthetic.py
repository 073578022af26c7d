"""An evaluation and a history that look like real ones, made of numbers drawn here and the sample data's texts."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import numpy as np

from dpo_cli.evaluation import statistics
from dpo_cli.evaluation.diagnostics import judge
from dpo_cli.evaluation.evaluator import QUANTILES, Evaluation
from dpo_cli.evaluation.kl import COLUMNS
from dpo_cli.evaluation.metrics import PairScores
from dpo_cli.losses.objective import Objective
from tests.helpers import SAMPLE

ABOUT = {"model": "runs/first/model", "reference": "HuggingFaceTB/SmolLM2-135M-Instruct", "beta": 0.1}
ABOUT |= {"refused": {"empty response": 2}}
SEQUENCE_KL = {"prompts": 50, "samples": 8, "max_new_tokens": 128, "ended": 0.91, "token_kl": 2.9}
SEQUENCE_KL |= {"token_kl_interval": [2.3, 3.6]}
WORDS = re.compile(r" ?[\w'’]{1,6}|\s|[^\w\s]")


def make_history(steps: int = 500, every: int = 50, seed: int = 0) -> list[dict[str, Any]]:
    """Lines of ``metrics.jsonl``: a run that learns, with evaluations."""
    rng, lines = np.random.default_rng(seed), []
    for step in range(steps + 1):
        margin = 1.6 * (1 - math.exp(-3 * step / steps))
        chosen = -0.25 * margin + 0.05 * math.sin(step / 9)
        if step:
            noise = rng.normal(0, 0.35 * margin + 0.02)
            lines.append(
                {"step": step, "loss": math.log1p(math.exp(-(margin + noise))) + 0.02 * rng.random()}
                | {"rewards/chosen": chosen + noise / 3, "rewards/rejected": chosen - margin - 2 * noise / 3}
                | {"rewards/margins": margin + noise, "rewards/ties": 0.0}
                | {"rewards/accuracies": float(np.clip(0.5 + 0.25 * margin + 0.1 * rng.normal(), 0, 1))}
                | {"logps/chosen": -170.0 + chosen, "logps/rejected": -140.0 + chosen - margin}
                | {"grad_norm": 8 + 6 * rng.random() + 60 * (step == steps // 3)}
                | {"learning_rate": 5e-6 * min(step / (0.1 * steps), 1 - (step - 0.1 * steps) / steps)}
            )
        if step % every == 0:
            held = 0.7 * margin - 0.15 * (step / steps) ** 2
            lines.append(
                {"step": step, "eval_loss": math.log1p(math.exp(-held)) + 0.06 * (step / steps) ** 3}
                | {"eval_rewards/chosen": chosen - 0.05, "eval_rewards/rejected": chosen - 0.05 - held}
                | {"eval_rewards/margins": held, "eval_rewards/accuracies": 0.5 + 0.2 * held}
                | {"eval_kl/chosen": 0.06 * step / steps, "eval_kl/rejected": 0.09 * (step / steps) ** 1.3}
            )
    return lines


def make_scores(pairs: int = 300, seed: int = 0) -> PairScores:
    """Log-probs whose margins grow with the length of the chosen response, and a fifth of which are wrong."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(12, 180, (pairs, 2)).astype(float)
    ref_logps = -tokens * rng.uniform(0.9, 2.4, (pairs, 2))
    gap = 0.03 * (tokens[:, 0] - tokens[:, 1]) + rng.normal(6, 8, pairs)
    fall = rng.normal(-4, 5, pairs)
    logps = ref_logps + np.stack([fall, fall - gap], 1)
    kl = tokens * rng.gamma(2.0, 0.03, (pairs, 2))
    entropy, ref_entropy = tokens * rng.uniform(1, 2, (pairs, 2)), tokens * rng.uniform(1.2, 2.2, (pairs, 2))
    exact = {"entropy": entropy, "ref_entropy": ref_entropy, "kl": kl, "reverse_kl": 1.1 * kl}
    exact["shifted_tokens"] = rng.poisson(0.3, (pairs, 2)) * 1.0
    where = [f"heldout.jsonl:{i + 1}" for i in range(pairs)]
    terms = np.stack([np.ones(pairs), np.zeros(pairs)], 1)
    return PairScores(where, tokens, logps, ref_logps, terms, distributions=exact)


def make_findings() -> list[dict[str, Any]]:
    return [
        {
            "kind": "length_bias",
            "title": "The policy prefers longer answers",
            "advice": "Balance lengths in the data, or compare by a judge that is blind to length.",
            "numbers": {"margin_length_correlation": 0.31},
        },
        {
            "kind": "displaced_chosen",
            "title": "The chosen responses lost probability too",
            "advice": "A higher beta, fewer steps, or a share of the supervised loss on the chosen responses.",
            "numbers": {"share": 0.78},
        },
    ]


def make_drift() -> dict[str, Any]:
    top = [
        (
            "heldout.jsonl:17",
            "rejected",
            8,
            "Blisters are one of the most",
            " common",
            " complaints among hikers.",
            -5.9,
            -1.8,
        ),
        (
            "heldout.jsonl:3",
            "chosen",
            31,
            "with your full name beneath it.\n",
            "Next",
            " step: save both lines",
            -0.2,
            -3.9,
        ),
        ("heldout.jsonl:88", "rejected", 2, "Ah, ", " compost", "! It is a fantastic way to help", -9.4, -6.1),
    ]
    names = ("row", "response", "place", "before", "token", "after", "logp", "ref_logp")
    found = [dict(zip(names, row, strict=True)) for row in top]
    for row in found:
        change = row["logp"] - row["ref_logp"]
        row["fold"] = math.copysign(math.exp(abs(change)), change)
    return {"tokens": 41_233, "shifted": 312, "share": 312 / 41_233, "fold": 20.0, "top": found}


def make_samples() -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (SAMPLE / "heldout.jsonl").read_text(encoding="utf-8").splitlines()[:3]]
    return [
        {
            "prompt": row["prompt"][0]["content"],
            "reference": row["rejected"][0]["content"],
            "policy": row["chosen"][0]["content"],
            "reference_sampled": [row["rejected"][0]["content"][:120]],
            "policy_sampled": [row["chosen"][0]["content"][:90]],
        }
        for row in rows
    ]


def make_token(text: str, *numbers: float) -> dict[str, Any]:
    """A token as ``shown_pairs`` has it."""
    return (
        {"text": text}
        | dict(zip(COLUMNS, numbers, strict=False))
        | ({"logratio": numbers[0] - numbers[1]} if numbers else {})
    )


def make_pair(*values: Any) -> dict[str, Any]:
    return dict(zip(("kind", "where", "margin", "prompt", "chosen", "rejected"), values, strict=True))


def make_tokens(text: str, drift: float, seed: int) -> list[dict[str, Any]]:
    """The text's words as tokens; a few of them much likelier, or much rarer, than before."""
    rng, found = np.random.default_rng(seed), []
    for word in [*WORDS.findall(text), "<|im_end|>"]:
        ref = -float(rng.exponential(1.6))
        change = drift * float(rng.gamma(0.35, 2.0)) + float(rng.normal(0, 0.15))
        entropy = float(rng.gamma(2, 0.7))
        found.append(make_token(word, min(ref + change, -1e-4), ref, entropy, entropy * 1.1, abs(change) * 0.1))
    return found


def make_shown(count: int = 3) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (SAMPLE / "heldout.jsonl").read_text(encoding="utf-8").splitlines()]
    found = []
    for at, why in enumerate(("best", "median", "worst")):
        for i in range(count):
            place = at * count + i
            row, drift = rows[place], (0.6, 0.3, -0.4)[at]
            prompt = f"<|im_start|>user\n{row['prompt'][0]['content']}<|im_end|>\n<|im_start|>assistant\n"
            chosen = make_tokens(row["chosen"][0]["content"], drift, place)
            rejected = make_tokens(row["rejected"][0]["content"], -drift, place + 100)
            found.append(make_pair(why, f"heldout.jsonl:{place + 1}", 4.1 - 3.1 * at, prompt, chosen, rejected))
    return found


def scores_of(logratios: Any, tokens: Any = None, ref_logps: Any = None, beta: float = 1.0, **more: Any) -> PairScores:
    """Scores of pairs with these log-ratios (P, 2); responses of 10 tokens and -20 nats where not given."""
    logratios = np.asarray(logratios, float)
    tokens = np.full(logratios.shape, 10.0) if tokens is None else np.asarray(tokens, float)
    ref_logps = np.full(logratios.shape, -20.0) if ref_logps is None else np.asarray(ref_logps, float)
    terms = np.tile([1.0, 0.0], (len(logratios), 1))
    where = [f"rows.jsonl:{line + 1}" for line in range(len(logratios))]
    more = {"objective": Objective(beta=beta)} | more
    return PairScores(where, tokens, ref_logps + logratios, ref_logps, terms, **more)


def make_evaluation(
    pairs: int = 300,
    seed: int = 0,
    shown: list[dict[str, Any]] | int = 3,
    scores: PairScores | None = None,
    **changed: Any,
) -> Evaluation:
    """What ``dpo eval`` would say of the scores, with findings, shifted tokens and samples from here."""
    scores = scores or make_scores(pairs, seed)
    with np.errstate(all="ignore"):
        result = ABOUT | {"rows": pairs + 2, "pairs": pairs} | scores.means()
        result |= {
            "intervals": statistics.intervals(scores),
            "rewards/margins_quantiles": {str(q): float(np.quantile(scores.margins, q)) for q in QUANTILES},
            "length": statistics.length_bias(scores),
            "findings": make_findings(),
            "judged": judge(len(scores.where), 2, ["not_finite"]),
            "drift": make_drift(),
            "sequence_kl": SEQUENCE_KL,
            "samples": make_samples(),
        }
    return Evaluation(result | changed, scores, make_shown(shown) if isinstance(shown, int) else shown)
