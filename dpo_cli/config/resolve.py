"""From flags, a YAML file and Python keywords to options; every problem is reported at once."""

from __future__ import annotations

import dataclasses
import math
import os
import reprlib
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import MISSING
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args, get_type_hints

from dpo_cli.config.options import DataOptions, TrainOptions, as_flag, out_of_range
from dpo_cli.utils.errors import UsageError, did_you_mean, name_beside

# Options that do not change what is trained: a resumed run may change them.
RESUME_MUTABLE = frozenset(
    {
        "logging_steps",
        "save_steps",
        "save_total_limit",
        "cache_dir",
        "show_answers",
        "trust_remote_code",
        "kl",
        "export",
    }
    | {"export_dtype", "base_model", "push_to_hub", "fsdp", "report_to"}
)
# Options that a run chooses itself when they are left open: from its model, its data, the free memory.
AUTO_OPTIONS = frozenset(
    {"max_length", "control_tokens", "train_turns", "max_tokens", "dtype", "memory", "gradient_checkpointing"}
    | {"lora_type", "lora_alpha", "lora_targets", "modules_to_save"}
)
# Other trainers' names of options.
OTHER_NAMES = {
    "learning_rate": "lr",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "model_name_or_path": "model",
    "dataset_name": "data",
    "output_dir": "output",
    "lora_r": "lora_rank",
    "lr_scheduler_type": "lr_scheduler",
    "max_seq_length": "max_length",
}
_SHORT = reprlib.Repr()
_SHORT.maxlevel = 2

T = TypeVar("T", bound=DataOptions)


def suggest_option(name: str, known: Iterable[str]) -> str:
    """End a message about an unknown option with the nearest one; other trainers' names are known too."""
    names = set(known)
    return did_you_mean(name, names, {theirs: ours for theirs, ours in OTHER_NAMES.items() if ours in names})


def resolve(kind: type[T], flags: Mapping[str, Any], file: Path | None = None) -> T:
    """Merge flags over the YAML file over the defaults, and check the result.

    Raises:
        UsageError: naming every unknown key, wrong type, failed check, missing option or refused combination.
    """
    values, problems = _parse(kind, _yaml_items(file)) if file else ({}, [])
    values |= {name: value for name, value in flags.items() if value is not None}
    problems += out_of_range(kind, values)
    if not values.get("data"):
        problems.append("--data is missing: name a file of preference pairs, for example --data pairs.jsonl")
    if problems:
        raise UsageError("\n".join(problems))
    return kind(**values)


def from_keywords(kind: type[DataOptions], given: Mapping[str, Any], others: Iterable[str] = ()) -> dict[str, Any]:
    """Convert Python values to flags for ``resolve``; None leaves an option open, a path may be a ``Path``.

    ``others`` are further keywords that an unknown option may have meant.

    Raises:
        UsageError: naming every unknown option, and every value that an option cannot have.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [plain(each) for each in value]
        return os.fspath(value) if isinstance(value, os.PathLike) else value

    items = ((name, plain(value), "") for name, value in given.items() if value is not None)
    values, problems = _parse(kind, items, others)
    if problems:
        raise UsageError("\n".join(problems))
    return values


def _parse(
    kind: type[DataOptions], items: Iterable[tuple[str, Any, str]], others: Iterable[str] = ()
) -> tuple[dict[str, Any], list[str]]:
    """Convert (name, value, place) items to the options' types; returns values and problems."""
    types, values, problems = get_type_hints(kind), dict[str, Any](), list[str]()
    optional = {f.name for f in dataclasses.fields(kind) if f.default in (None, MISSING)}
    for key, value, place in items:
        name = key.replace("-", "_")
        if name not in types:
            problems.append(f"{place}unknown option '{key}'{suggest_option(name, [*types, *others])}")
        elif name in values:
            problems.append(f"{place}option '{key}' is given twice")
        else:
            values[name] = None
            if value is None and name in optional:
                continue
            if name in ("loss", "loss_options") and isinstance(value, dict):
                value = ",".join(f"{term}={number}" for term, number in value.items())
            try:
                values[name] = _convert(value, types[name])
            except (TypeError, ValueError, OverflowError):
                problems.append(f"{place}option '{key}' cannot be {_SHORT.repr(value)}")
    return {name: value for name, value in values.items() if value is not None}, problems


def _yaml_items(file: Path) -> Iterable[tuple[str, Any, str]]:
    import yaml

    try:
        loader = yaml.SafeLoader(file.read_text(encoding="utf-8"))
        node = loader.get_single_node()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {file}: cannot be read ({error}){name_beside(file)}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise UsageError(f"--config {file}: not valid YAML\n{error}") from error
    if node is not None and not isinstance(node, yaml.MappingNode):
        raise UsageError(f"--config {file}: must be a mapping of option names to values")
    for key, value in node.value if node else ():
        try:
            constructed = loader.construct_object(value, deep=True)
        except (ValueError, yaml.YAMLError):
            constructed = {value.value} if isinstance(value, yaml.ScalarNode) else value  # no option takes a set
        yield str(key.value), constructed, f"{file}:{key.start_mark.line + 1}: "


def _convert(value: Any, type_: Any) -> Any:
    """Convert a value to an option's type. YAML reads ``1e-6`` as a string; here it is a number.

    Raises:
        TypeError, ValueError, OverflowError: it has no such value.
    """
    if NoneType in get_args(type_):
        type_ = next(kind for kind in get_args(type_) if kind is not NoneType)
    if type_ == list[str]:
        items = value if isinstance(value, list) else [value]
        if all(isinstance(item, str) for item in items):
            return items
    elif type_ is bool or isinstance(value, bool):
        if type_ is bool and isinstance(value, bool):
            return value
    elif type_ is str and isinstance(value, list):
        return _joined(value)
    elif type_ in (int, float):
        if type_ is float or float(value) == int(float(value)):
            return type_(float(value))
    elif isinstance(value, (str, int, float)):
        return type_(str(value))
    raise TypeError


def _joined(numbers: list[Any]) -> str:
    """Numbers as a flag has them, separated by commas."""
    if not numbers or not all(math.isfinite(_convert(number, float)) for number in numbers):
        raise TypeError
    return ",".join(map(str, numbers))


def to_yaml(options: DataOptions) -> str:
    """Write options as a YAML file that ``resolve`` reads back, without those that every run must be given again."""
    import yaml

    values = {name: str(v) if isinstance(v, Path) else v for name, v in dataclasses.asdict(options).items()}
    kept = {name: v for name, v in values.items() if name not in ("output", "trust_remote_code", "push_to_hub")}
    return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)


# ---- resumed runs -----------------------------------------------------------------------------------------------


def resolve_training(flags: Mapping[str, Any], resume: Path | None, file: Path | None = None) -> TrainOptions:
    """Return the options of a new run, or of one to resume, whose own folder ``--output`` may repeat.

    Raises:
        UsageError: they cannot be used.
    """
    if not resume:
        return resolve(TrainOptions, flags, file)
    if file:
        raise UsageError(f"--resume {resume}: a resumed run keeps its own options; leave out --config")
    return resolve_resumed({**flags, "output": None} if flags.get("output") == resume else flags, resume)


def resolve_resumed(flags: Mapping[str, Any], folder: Path) -> TrainOptions:
    """Return the options of the run in ``folder``; flags may only change what does not change the training.

    Raises:
        UsageError: the folder is no run, or a flag asks for another training.
    """
    for name in ("config.yaml", "manifest.json"):
        if not (folder / name).is_file():
            raise UsageError(f"--resume {folder}: no run there ({name} is missing){name_beside(folder)}")
    file = folder / "config.yaml"
    began, options = resolve(TrainOptions, {}, file), resolve(TrainOptions, flags, file)
    if changed := differences(began, options):
        new = {"output": folder.with_name(f"{folder.name}-2")} | {name: getattr(options, name) for name in changed}
        words = [word for name, value in new.items() for word in as_flag(name, value)]
        command = shlex.join(["dpo", "train", "--config", str(file), *words])
        further = f"; add --model {shlex.quote(str(folder))} to train its model further"
        raise UsageError(
            f"--resume {folder}: cannot change {', '.join(changed.values())}. A new run can: {command}"
            + (further if (folder / "model").is_dir() and "model" not in changed else "")
        )
    return options


def differences(began: TrainOptions, options: TrainOptions) -> dict[str, str]:
    """Describe, by name, the options that ask for another training than the one that a run began with."""
    names = [f.name for f in dataclasses.fields(TrainOptions) if f.name not in RESUME_MUTABLE]
    return {
        name: f"--{name.replace('_', '-')} {getattr(options, name)} (it began with {getattr(began, name)})"
        for name in names
        if getattr(options, name) != getattr(began, name)
    }


def inherit_auto_options(options: TrainOptions, began: TrainOptions) -> TrainOptions:
    """Return the options with another run's automatic choices where they leave them open."""
    left_open = {name for name in AUTO_OPTIONS if getattr(options, name) in (None, "auto", False)}
    return dataclasses.replace(options, **{name: getattr(began, name) for name in left_open})
