"""What a run leaves: its exported model, answers, the result that is printed, and an upload."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.optim import Optimizer

from dpo_cli.data.tokenize import reasons
from dpo_cli.evaluation.generation import generate, text
from dpo_cli.evaluation.metrics_log import evaluations, read_metrics
from dpo_cli.hub.export import NotReadBackError, export_model, response_logps
from dpo_cli.hub.model_card import model_card
from dpo_cli.models.attention import attention
from dpo_cli.models.loading import export_dtype
from dpo_cli.models.split_weights import fp32_weights
from dpo_cli.training.setup import Run

ANSWER_TOKENS = 80  # most of an answer that is shown


def export(run: Run, optimizer: Optimizer, name: str, step: int, after: Mapping[str, float] | None = None) -> None:
    """Write the policy as it is after ``step`` to a folder of the run; ``after`` are its metrics if not yet written.

    Of an adapter that is the adapter alone.

    Raises:
        NotReadBackError: what was written is not what was trained.
    """
    metrics = evaluations(read_metrics(run.folder / "metrics.jsonl"))
    card = model_card(run, metrics.get(0, {}), after or metrics.get(step, {}))
    by_length = sorted(run.used, key=run.costs.__getitem__)
    pair = run.pairs[by_length[len(by_length) // 2]]
    with attention(run.model, run.policy.own_attention):
        apart = run.runner.parallel.sharded and run.runner.chunked_lm_head
        logps = response_logps(run.model, pair, run.runner.dtype, apart)
        try:
            with fp32_weights(run.model, optimizer):
                export_model(
                    run.folder / name,
                    run.model,
                    run.tokenizer,
                    card,
                    source=run.policy.source,
                    pair=pair,
                    expected=(logps, run.runner.dtype),
                    dtype=export_dtype(run.options.export_dtype, run.policy.source),
                    warn=run.runner.warn,
                )
        except NotReadBackError as error:
            kept = run.folder / "checkpoints"
            raise NotReadBackError(f"{error}. The trained weights are in {kept}") from error


def answer(run: Run) -> list[str]:
    """Answer the first held-out prompts greedily, as many as are shown."""
    prompts = [pair.prompt for pair in run.held_out[: run.options.show_answers]]
    responses = generate(
        run.model,
        run.tokenizer,
        prompts,
        run.policy.own_attention,
        ANSWER_TOKENS,
        sampled=False,
        max_tokens=run.runner.max_tokens,
        dtype=run.runner.dtype,
    )
    return [text(run.tokenizer, response) for (response,) in responses]


def summary(run: Run, first_answers: list[str]) -> dict[str, Any]:
    """Return what ``dpo train --json`` prints of a finished run."""
    scores = evaluations(read_metrics(run.folder / "metrics.jsonl"))
    shown = zip(run.held_out, first_answers, answer(run), strict=False)
    return {
        "trained_on": run.trained_on,
        "run": str(run.folder),
        "model": str(run.folder / "model"),
        "report": str(run.folder / "report.html"),
        "rows": len(run.pairs) + len(run.held_out) + len(run.refused),
        "refused": reasons(run.refused),
        "pairs": len(run.pairs),
        "held_out": len(run.held_out),
        "steps": len(run.plan),
        "before": scores.get(0, {}),
        "after": scores.get(len(run.plan), {}),
        "answers": [
            {"prompt": run.tokenizer.decode(pair.prompt), "reference": first, "policy": last}
            for pair, first, last in shown
        ],
    }
