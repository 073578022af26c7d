"""`dpo merge`: an adapter and its base as one model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dpo_cli.hub.export import export_model
from dpo_cli.hub.model_card import merged_card
from dpo_cli.models.adapter_files import read_config
from dpo_cli.models.loading import export_dtype, load_model, load_tokenizer
from dpo_cli.models.locate import find_model
from dpo_cli.models.quantized import admit
from dpo_cli.training.checkpoint import verified_step
from dpo_cli.training.run_dir import trained_with
from dpo_cli.utils.console import Reporter
from dpo_cli.utils.errors import UsageError


def merge(name: str, base: str | None, output: Path, dtype: str, trust: bool, reporter: Reporter) -> dict[str, Any]:
    """Write a model folder with an adapter's weights added to its base's, which is ``base`` or what the adapter names.

    Raises:
        UsageError: there is no adapter, it cannot be merged, or the folder exists.
    """
    source = find_model(name, trust, base)
    if source.adapter is None or source.checkpoint not in (None, source.adapter):
        raise UsageError(f"--model {name}: there is no adapter to merge")
    if source.checkpoint and verified_step(source.checkpoint) is None:
        raise UsageError(f"--model {name}: the checkpoint is damaged; take another, or the run's model/")
    if output.exists():
        raise UsageError(f"--output {output}: exists already; name another folder")
    read_config(source.adapter, reporter.warning)
    source = admit(source, name)
    reporter.info("model", source.description)
    trained = trained_with(source.run) if source.run else None
    if trained and trained.quantize:
        reporter.warning(
            f"the adapter was trained on its base in {trained.quantize} and is merged into the float32 base: the "
            "merged model is not quite the trained one"
        )
    model = load_model(source)
    card = merged_card(source, output.name, trained.objective if trained else None)
    precision = export_dtype(dtype, source)
    export_model(output, model, load_tokenizer(source), card, source=source, dtype=precision, warn=reporter.warning)
    return {"model": str(output), "parameters": model.num_parameters()}
