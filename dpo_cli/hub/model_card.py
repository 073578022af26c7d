"""The model card: what was trained, on what, how, what came of it, and how to serve it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData, hf_hub_download

from dpo_cli.data.sources import hub_id
from dpo_cli.losses.objective import Objective
from dpo_cli.models.locate import DEFAULT_MODEL, ModelSource, find_model
from dpo_cli.training.setup import Run
from dpo_cli.utils.errors import printable

SELF = "path/to/this/folder"  # the model in its card; replaced by the repository when it is pushed
# Options shown in the card; none of them is a path.
_OPTIONS = (
    *("beta", "label_smoothing", "f_divergence", "ld_alpha", "wpo", "router_aux_loss_coef"),
    *("lr", "lr_scheduler", "warmup_ratio", "weight_decay", "max_grad_norm", "epochs", "batch_size"),
    *("max_length", "train_turns", "dtype", "memory", "seed"),
)
# Metrics of an evaluation shown in the card: name, and kind for the hub.
_RESULTS = {
    "loss": ("loss", "loss"),
    "rewards/accuracies": ("implicit reward accuracy", "accuracy"),
    "rewards/margins": ("implicit reward margin", "reward_margin"),
    "kl/chosen": ("KL to the base model on chosen responses, nats per token", "kl"),
    "kl/rejected": ("KL to the base model on rejected responses, nats per token", "kl"),
}


_USE = f"""```python
from transformers import pipeline

chat = pipeline("text-generation", "{SELF}")
print(chat([dict(role="user", content="Hello.")], max_new_tokens=200)[0]["generated_text"][-1]["content"])
```

A server with vLLM (it has the interface of OpenAI's), and a GGUF file for llama.cpp:

```sh
vllm serve {SELF} --dtype bfloat16
python convert_hf_to_gguf.py {SELF} --outfile model.gguf --outtype bf16
```"""
_USE_ADAPTER = """An adapter, to be loaded on its base with peft. `dpo merge --model FOLDER --output MERGED` makes one
model of both, for servers and for llama.cpp."""

_RAW = """Its pairs were raw strings, without the chat template (`--format strings`): give it strings, not messages.

"""


def model_card(run: Run, before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """Make the README.md with the metadata that the hub reads; it names no local path and no person.

    ``before`` and ``after`` are metrics of the held-out pairs, empty if there are none.
    """
    name, adapter = _line(run.folder.name), bool(run.options.lora_rank) and run.options.export != "merged"
    base, known = hub_name(run.policy.source), _card_of(run.policy.source)
    results = {metric: after[metric] for metric in _RESULTS if math.isfinite(after.get(metric, math.nan))}
    about: dict[str, Any] = _license(known)
    if results:
        about |= {"model_name": name, "eval_results": _results(run, results)}
    data = ModelCardData(
        base_model=base or known.get("base_model"),
        datasets=sorted({i for d in run.options.data if (i := hub_id(d))}) or None,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=_tags(run.options.objective),
        **about,
    )
    shown = (
        {"loss": run.options.objective.name}
        | {key: getattr(run.options, key) for key in _OPTIONS}
        | {"steps": len(run.plan), "pairs": len(run.pairs)}
    )
    rows = "\n".join(
        f"| {key.replace('_', ' ')} | {value} |" for key, value in shown.items() if value not in (None, "")
    )
    return f"""---
{data.to_yaml()}
---

# {name}

{_line(run.policy.source.title)}, fine-tuned on {len(run.pairs):,} preference pairs with
{_method(run.options.objective)} by dpo-cli {version("dpo-cli")}. {_trained(run)}

| option | value |
|---|---|
{rows}
{_outcome(run, results, before)}
## Use

{_RAW * (run.options.format == "strings")}{_USE_ADAPTER if adapter else _USE}

## Limits

Preference training makes some answers likelier than others; it adds no knowledge, and what the pairs do not show was
not trained. Nothing but what stands above was measured: neither safety nor general ability. The terms of the base
model and of the data hold for this model too.
"""


def merged_card(source: ModelSource, name: str, objective: Objective | None) -> str:
    """Make the card of an adapter merged into its base, with license and base of the adapter's own card.

    ``objective``: the adapter's, if it is known.
    """
    known: dict[str, str] = {}
    with suppress(Exception):  # there is none, or whatever stands in it
        known = _metadata(Path(source.adapter or source.path, "README.md"))
    base = Path(source.name).name if Path(source.name).is_absolute() else source.name
    data = ModelCardData(
        base_model=known.get("base_model") or hub_name(find_model(source.name)),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=_tags(objective),
        **_license(known),
    )
    trained = f", trained with {_method(objective)}" if objective else ""
    return f"""---
{data.to_yaml()}
---

# {_line(name)}

The adapter {_line(source.base)}{trained},
merged into its base {_line(base)}{f", {source.stored}" if source.stored else ""} by dpo-cli {version("dpo-cli")}.

## Use

{_USE}
"""


def _tags(objective: Objective | None) -> list[str]:
    return [*(["dpo"] if objective is None or objective.reference else []), "preference-optimization", "dpo-cli"]


def _method(objective: Objective) -> str:
    """Name the method: a loss without a reference is not DPO."""
    if not objective.reference:
        return f"preference optimization without a reference (loss {objective.name})"
    loss = "" if objective.name == "sigmoid" else f", loss {objective.name}"
    return f"Direct Preference Optimization ([arXiv 2305.18290](https://arxiv.org/abs/2305.18290)){loss}"


def _trained(run: Run) -> str:
    """Say which of its weights were trained."""
    options = run.options
    if options.lora_rank is None:
        return "All its weights were trained."
    whole = f", and {_line(options.modules_to_save)} whole" if options.modules_to_save else ""
    bits = f", over a base in {options.quantize}" if options.quantize else ""
    return f"A {options.lora_type} adapter of rank {options.lora_rank} was trained{whole}{bits}."


def hub_name(source: ModelSource) -> str | None:
    """Return the base model's name on the hub; None if it came from elsewhere."""
    return source.base if source.base == DEFAULT_MODEL or source.path == source.base else None


def _card_of(source: ModelSource) -> dict[str, Any]:
    """Return the metadata of the base model's own card; empty if it cannot be read."""
    with suppress(Exception):  # of the hub, or of whatever stands in the file
        if source.path == source.base:  # from the hub; no other is asked for there
            return _metadata(hf_hub_download(source.base, "README.md", etag_timeout=5))
        return _metadata(Path(source.path, "README.md"))
    return {}


def _metadata(card: str | Path) -> dict[str, str]:
    """Return the plain names in the metadata of a card."""
    metadata = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    return {key: value for key, value in metadata.items() if isinstance(value, str) and _NAME.fullmatch(value)}


def _license(known: Mapping[str, Any]) -> dict[str, Any]:
    return {key: known[key] for key in ("license", "license_name", "license_link") if key in known}


_NAME = re.compile(r"[\w][\w.:/+-]*", re.ASCII)


def _results(run: Run, results: Mapping[str, float]) -> list[EvalResult]:
    ids = sorted({i for d in run.options.eval_data or run.options.data if (i := hub_id(d))})
    return [
        EvalResult(
            task_type="text-generation",
            task_name="Preference, held-out pairs",
            dataset_type=ids[0] if ids else "preference-pairs",
            dataset_name=f"{len(run.held_out):,} held-out pairs",
            metric_type=_RESULTS[metric][1],
            metric_name=_RESULTS[metric][0],
            metric_value=round(value, 6),
        )
        for metric, value in results.items()
    ]


def _outcome(run: Run, results: Mapping[str, float], before: Mapping[str, float]) -> str:
    """Make a table of the held-out pairs before and after; empty if there are none."""
    if not results:
        return ""
    lines = [f"| on {len(run.held_out):,} held-out pairs | before | after |", "|---|---|---|"]
    for metric, value in results.items():
        was = f"{before[metric]:.4f}" if metric in before else "not measured"
        lines.append(f"| {_RESULTS[metric][0]} | {was} | {value:.4f} |")
    reward = "The implicit reward of a response is beta times the log-ratio of this model and the base model."
    return "\n".join(["", *lines, "", reward, ""])


def _line(text: str) -> str:
    return " ".join(printable(text).split())
