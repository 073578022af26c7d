"""The results of a run: its exported models, its answers, and the printed summary."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.optim import Optimizer
from transformers import PreTrainedModel

from dpo_cli.data.pairs import Ids
from dpo_cli.data.tokenize import reasons
from dpo_cli.evaluation.generation import answer_text, generate, user_text
from dpo_cli.evaluation.metrics import evaluations, read_metrics
from dpo_cli.hub.export import NotReadBackError, export_model, pair_logps
from dpo_cli.hub.model_card import model_card
from dpo_cli.models.adapter_files import save_adapter
from dpo_cli.models.attention import attention
from dpo_cli.models.loading import export_dtype, load_model, release
from dpo_cli.models.split_weights import fp32_weights
from dpo_cli.training.setup import Run
from dpo_cli.utils.errors import DpoError, UsageError

ANSWER_TOKENS = 80  # shown of an answer, at most
ANSWERS_SHOWN = 3  # where --show-answers is left open


def export(run: Run, optimizer: Optimizer, name: str, step: int, after: Mapping[str, float] | None = None) -> None:
    """Write the policy as it is after ``step`` to a folder of the run; ``after`` are its metrics if not yet written.

    An adapter is written alone, or merged into a base that is loaded again: unmerging its own base would round it.

    Raises:
        NotReadBackError: the files differ from what was trained.
    """
    runner, source = run.policy.runner, run.policy.source
    metrics = evaluations(read_metrics(run.folder / "metrics.jsonl"))
    card = model_card(run, metrics.get(0, {}), after or metrics.get(step, {}))
    by_length = sorted(run.used, key=run.costs.__getitem__)
    pair, dtype = run.pairs[by_length[len(by_length) // 2]], export_dtype(run.options.export_dtype, source)
    about: dict[str, Any] = {"source": source, "pair": pair, "dtype": dtype, "warn": runner.warn}
    try:
        if run.options.export == "merged":
            model = _merged(run)
            export_model(run.folder / name, model, run.tokenizer, card, **about)
            release(model)
            return
        model = run.policy.model
        with attention(model, run.policy.own_attention):
            expected = pair_logps(runner, pair), runner.dtype
            with fp32_weights(model, optimizer):
                export_model(run.folder / name, model, run.tokenizer, card, expected=expected, **about)
    except NotReadBackError as error:
        raise NotReadBackError(f"{error}. The trained weights are in {run.folder / 'checkpoints'}") from error


def _merged(run: Run) -> PreTrainedModel:
    """Return the base, loaded again, with the trained adapter merged into it."""
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(run.policy.model, Path(folder))
        source = dataclasses.replace(run.policy.source, adapter=Path(folder), attached=False, checkpoint=None)
        try:
            model = load_model(source)
        except UsageError as error:
            reason = str(error).removeprefix("--model ").replace(folder, "the trained adapter")
            raise NotReadBackError(f"--export merged: {reason}") from error
    model.generation_config = run.policy.model.generation_config
    return model


def _shown_prompts(run: Run) -> list[Ids]:
    """Return the first held-out prompts, each once; none of a model in shards, which does not answer."""
    shown = run.options.show_answers
    if shown is None:
        shown = 0 if run.options.fsdp else ANSWERS_SHOWN
    return [*{pair.prompt.tobytes(): pair.prompt for pair in run.held_out}.values()][:shown]


def answer(run: Run) -> list[str]:
    """Answer the first held-out prompts greedily, as many as are shown; none with a warning if the model cannot."""
    policy = run.policy
    try:
        responses = generate(policy.runner, run.tokenizer, _shown_prompts(run), policy.own_attention, ANSWER_TOKENS)
    except DpoError as error:
        run.reporter.warning(str(error))
        return []
    return [answer_text(policy.model, run.tokenizer, response) for (response,) in responses]


def summary(run: Run, first_answers: list[str]) -> dict[str, Any]:
    """Return what ``dpo train --json`` prints of a finished run."""
    scores = evaluations(read_metrics(run.folder / "metrics.jsonl"))
    shown = zip(_shown_prompts(run), first_answers, answer(run), strict=False)
    return {
        "trained_on": run.trained_on,
        "run": str(run.folder),
        "model": str(run.folder / "model"),
        "report": str(run.folder / "report.html"),
        "rows": len(run.pairs) + len(run.held_out) + len(run.refused),
        "refused": reasons(run.refused),
        "pairs": len(run.pairs),
        "trained": len(run.used),
        "held_out": len(run.held_out),
        "steps": len(run.plan),
        "before": scores.get(0, {}),
        "after": scores.get(len(run.plan), {}),
        "answers": [
            {"prompt": user_text(run.tokenizer, prompt), "reference": first, "policy": last}
            for prompt, first, last in shown
        ],
    }
