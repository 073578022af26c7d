"""The model card: what was trained, on what and how, the results, and how to serve it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData, hf_hub_download

from dpo_cli.data.sources import hub_id
from dpo_cli.losses.objective import Objective
from dpo_cli.models.locate import DEFAULT_MODEL, ModelSource, find_model
from dpo_cli.utils.errors import printable

if TYPE_CHECKING:
    from dpo_cli.training.setup import Run

MODEL_PLACEHOLDER = "path/to/this/folder"  # of the model in its card; a push replaces it by the repository
# Options shown in the card; none of them is a path.
_OPTIONS = (
    *("beta", "label_smoothing", "f_divergence", "ld_alpha", "wpo", "router_aux_loss_coef"),
    *("lr", "lr_scheduler", "min_lr", "warmup_ratio", "adam_beta1", "adam_beta2", "weight_decay"),
    *("max_grad_norm", "epochs", "batch_size"),
    *("max_length", "train_turns", "pairs", "margin_per_score", "dtype", "memory", "seed"),
)
# Metrics of an evaluation shown in the card.
_RESULTS = {
    "loss": "loss",
    "rewards/accuracies": "implicit reward accuracy",
    "rewards/margins": "implicit reward margin",
    "kl/chosen": "KL to the reference on chosen responses, nats per token",
    "kl/rejected": "KL to the reference on rejected responses, nats per token",
}


def model_card(run: Run, before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """Make the README.md with the metadata that the hub reads; it names no local path and no person.

    ``before`` and ``after`` are metrics of the held-out pairs, empty if there are none.
    """
    options, base_metadata = run.options, _metadata(run.policy.source)
    shown: dict[str, Any] = {"loss": options.objective.name} | {key: getattr(options, key) for key in _OPTIONS}
    shown |= {"steps": len(run.plan), "pairs": len(run.pairs)}
    trained = "Its own weights were trained."
    if options.lora_rank:
        whole = f", and {_line(options.modules_to_save)} whole" if options.modules_to_save else ""
        bits = f", over a base in {options.quantize}" if options.quantize else ""
        trained = f"A {options.lora_type} adapter of rank {options.lora_rank} was trained{whole}{bits}."
    return _render(
        run.folder.name,
        f"{_line(run.policy.source.title)}, fine-tuned on {len(run.pairs):,} preference pairs with "
        f"{_method(options.objective)} by dpo-cli {version('dpo-cli')}. {trained}",
        options.objective,
        base_metadata | {"base_model": hub_name(run.policy.source) or base_metadata.get("base_model")},
        datasets=sorted({i for d in options.data if (i := hub_id(d))}) or None,
        adapter=bool(options.lora_rank) and options.export != "merged",
        options=[(key.replace("_", " "), value) for key, value in shown.items() if value not in (None, "")],
        held_out=len(run.held_out),
        results=[
            (text, before.get(metric, math.nan), after[metric])
            for metric, text in _RESULTS.items()
            if math.isfinite(after.get(metric, math.nan))
        ],
        raw=options.format == "strings",
    )


def merged_card(source: ModelSource, name: str, objective: Objective | None) -> str:
    """Make the card of an adapter merged into its base, with license and base of the adapter's own card.

    ``objective``: the adapter's, if it is known.
    """
    base_metadata = _metadata(source, source.adapter)
    base = Path(source.name).name if Path(source.name).is_absolute() else source.name
    trained = f", trained with {_method(objective)}" if objective else ""
    stored = f", {source.stored}" if source.stored else ""
    by = f"merged by dpo-cli {version('dpo-cli')} into its base {_line(base)}{stored}"
    base_metadata["base_model"] = base_metadata.get("base_model") or hub_name(find_model(source.name))
    return _render(name, f"The adapter {_line(source.base)}{trained}, {by}.", objective, base_metadata)


def _render(
    name: str,
    summary: str,
    objective: Objective | None,
    base: Mapping[str, Any],
    *,
    datasets: list[str] | None = None,
    adapter: bool = False,
    **values: Any,
) -> str:
    """Fill in model_card.md; ``base`` is the base model with its license, as far as they are known."""
    about: dict[str, Any] = {key: base.get(key) for key in ("base_model", "license", "license_name", "license_link")}
    data = ModelCardData(
        datasets=datasets,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=[*(["dpo"] if objective is None or objective.reference else []), "preference-optimization", "dpo-cli"],
        **about,
    )
    template = str(Path(__file__).with_name("model_card.md"))
    values |= {"adapter": adapter, "place": MODEL_PLACEHOLDER}
    return f"{ModelCard.from_template(data, template, name=_line(name), summary=summary, **values)}\n"


def _method(objective: Objective) -> str:
    """Name the method: a loss without a reference is not DPO."""
    if not objective.reference:
        return f"preference optimization without a reference (loss {objective.name})"
    loss = "" if objective.name == "sigmoid" else f", loss {objective.name}"
    return f"Direct Preference Optimization ([arXiv 2305.18290](https://arxiv.org/abs/2305.18290)){loss}"


def hub_name(source: ModelSource) -> str | None:
    """Return the base model's name on the hub; None if it has none there."""
    return source.base if source.base == DEFAULT_MODEL or source.path == source.base else None


def _metadata(source: ModelSource, folder: Path | None = None) -> dict[str, Any]:
    """Return the metadata of a model's card, or a folder's, with plain-name values; empty if unreadable."""
    with suppress(Exception):  # a hub error, or a malformed file
        card: str | Path = Path(folder or source.path, "README.md")
        if folder is None and source.path == source.base:  # else the hub is not asked for a card
            card = hf_hub_download(source.base, "README.md", etag_timeout=5)
        metadata = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
        plain = re.compile(r"[\w][\w.:/+-]*", re.ASCII)
        return {key: value for key, value in metadata.items() if isinstance(value, str) and plain.fullmatch(value)}
    return {}


def _line(text: str) -> str:
    return " ".join(printable(text).split())
