"""From flags, a YAML file and Python keywords to options; every problem is reported at once."""

from __future__ import annotations

import os
import reprlib
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, fields, replace
from functools import partial
from pathlib import Path
from textwrap import fill
from types import NoneType
from typing import Any, TypeVar, get_args, get_type_hints

from dpo_cli.config.options import DataOptions, TrainOptions, out_of_range
from dpo_cli.utils.errors import UsageError, did_you_mean, reason_of, suggest_path

# Options that do not change what is trained: a resumed run may change them.
RESUME_MUTABLE = {
    *("logging_steps", "save_steps", "save_total_limit", "cache_dir", "show_answers", "trust_remote_code", "kl"),
    *("export", "export_dtype", "base_model", "fsdp", "device", "report_to"),
}
# Options that a run chooses itself when they are left open: from its model, its data, the free memory.
AUTO_OPTIONS = (
    *("max_length", "control_tokens", "train_turns", "pairs", "margin_per_score"),
    *("max_tokens", "dtype", "memory", "gradient_checkpointing"),
    *("lora_type", "lora_alpha", "lora_targets", "modules_to_save"),
)
# Other trainers' names of options.
OTHER_NAMES = {
    theirs: ours
    for ours, names in {
        "model": "model_name_or_path base_model",
        "data": "dataset_name dataset datasets",
        "eval_fraction": "val_size val_set_size",
        "output": "output_dir",
        "max_length": "max_seq_length sequence_len cutoff_len",
        "loss": "loss_type pref_loss dpo_loss_type",
        "beta": "pref_beta rl_beta orpo_alpha",
        "label_smoothing": "dpo_label_smoothing",
        "f_divergence": "f_divergence_type",
        "wpo": "use_weighting dpo_use_weighting",
        "lr": "learning_rate",
        "lr_scheduler": "lr_scheduler_type",
        "epochs": "num_train_epochs num_epochs",
        "batch_size": "per_device_train_batch_size micro_batch_size",
        "lora_rank": "lora_r",
        "lora_targets": "lora_target lora_target_modules",
        "modules_to_save": "lora_modules_to_save additional_target",
    }.items()
    for theirs in names.split()
}

HEAD = (
    "All options of dpo train with their defaults, for dpo train --config. null: chosen when the run begins, or off. A "
    "flag on the command line overrides this file."
)
WIDTH = 100  # of the comments

Name = str | os.PathLike[str]
T = TypeVar("T", bound=DataOptions)


def suggest_option(name: str, known: Iterable[str]) -> str:
    """Return the end of a message on an unknown option: the nearest one, also for other trainers' names."""
    names = set(known)
    return did_you_mean(name, names, {theirs: ours for theirs, ours in OTHER_NAMES.items() if ours in names})


def resolve(kind: type[T], given: Mapping[str, Any], file: Name | None = None) -> T:
    """Merge flags or keywords over the YAML file over the defaults, and check the result.

    None leaves an option open.

    Raises:
        UsageError: naming every unknown key, wrong type, failed check, missing option or refused combination.
    """
    types, values, problems = get_type_hints(kind), dict[str, Any](), list[str]()
    optional = {f.name for f in fields(kind) if f.default in (None, MISSING)}
    flags = [(name, value, "") for name, value in given.items() if value is not None]
    for items in (yaml_items(Path(file)) if file else (), flags):
        read: dict[str, Any] = {}
        for key, value, place in items:
            name = key.replace("-", "_")
            if name not in types:
                problems.append(f"{place}unknown option '{key}'{suggest_option(name, types)}")
            elif name in read:
                problems.append(f"{place}option '{key}' is given twice")
            else:
                try:
                    read[name] = None if value is None and name in optional else _convert(value, types[name])
                except (TypeError, ValueError, OverflowError):
                    read[name] = None
                    problems.append(f"{place}option '{key}' cannot be {reprlib.repr(value)[:200]}")
        values |= {name: value for name, value in read.items() if value is not None}
    problems += out_of_range(kind, values)
    if not values.get("data"):
        problems.append("--data is missing: name a file of preference pairs, for example --data pairs.jsonl")
    if problems:
        raise UsageError("\n".join(problems))
    return kind(**values)


def yaml_items(file: Path, option: str = "--config") -> Iterator[tuple[str, Any, str]]:
    """Yield each key of a YAML mapping with its value, and its place for messages.

    Raises:
        UsageError: the file cannot be read, or holds no such mapping.
    """
    import yaml

    try:
        loader = yaml.SafeLoader(file.read_text(encoding="utf-8"))
        node = loader.get_single_node()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{option} {file}: cannot be read ({reason_of(error)}){suggest_path(file)}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise UsageError(f"{option} {file}: not valid YAML\n{error}") from error
    if node is not None and not isinstance(node, yaml.MappingNode):
        raise UsageError(f"{option} {file}: must be a mapping of option names to values")
    for key, value in node.value if node else ():
        place = f"{file}:{key.start_mark.line + 1}: "
        try:
            yield str(key.value), loader.construct_object(value, deep=True), place
        except Exception as error:  # of any type: an empty !!int is an IndexError
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            raise UsageError(f"{place}option '{key.value}' is not a YAML value: {reason}") from error


def _convert(value: Any, type_: Any) -> Any:
    """Convert a value to an option's type: YAML reads ``1e-6`` as a string; a list may stand for words with commas.

    Raises:
        TypeError, ValueError, OverflowError: it has no such value.
    """
    if NoneType in get_args(type_):
        type_ = next(kind for kind in get_args(type_) if kind is not NoneType)
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, Mapping):
        if type_ == list[str]:  # data with shares
            value = {name: float(each) for name, each in value.items()}
        value = [f"{name}={each}" for name, each in value.items()] if type_ in (str, list[str]) else value
    if type_ == list[str]:
        return [os.fspath(each) for each in (value if isinstance(value, (list, tuple)) else [value])]
    if type_ is str and isinstance(value, (list, tuple)) and value:
        value = ",".join(map(str, value))
    if type_ is bool and isinstance(value, bool):
        return value
    if type_ is bool or isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise TypeError
    if type_ is int and float(value) != int(float(value)):
        raise ValueError
    return type_(float(value)) if type_ in (int, float) else type_(str(value))


# ---- files of options -------------------------------------------------------------------------------------------


def to_yaml(options: DataOptions) -> str:
    """Write options as a YAML file that ``resolve`` reads back, without those that every run must be given again."""
    import yaml

    values = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(options).items()}
    kept = {name: v for name, v in values.items() if name not in ("output", "trust_remote_code")}
    return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)


def write_config(file: Path, data: Sequence[str], force: bool, headings: Mapping[str, str]) -> None:
    """Write a file of all options of `dpo train` with their help and defaults, and ``data`` as its pairs.

    ``headings``: the heading of each option, in their order; options without one stand at the end.

    Raises:
        UsageError: the file exists, and ``force`` is not set.
        NotWrittenError: it cannot be written.
    """
    import yaml

    comment = partial(fill, width=WIDTH, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)
    entries, places, last = [f"{comment(HEAD)}\n"], {name: i for i, name in enumerate(headings)}, ""
    for option in sorted(fields(TrainOptions), key=lambda f: places.get(f.name, len(places))):
        if (heading := headings.get(option.name, "Advanced")) != last:
            entries.append(f"# ---- {heading} ".ljust(WIDTH, "-") + "\n")
            last = heading
        value, text, shown = option.default, option.metadata["help"], option.metadata["shown"]
        if value is MISSING:
            value, text = list(data) or None, f"{text} Required."
        text += f" null: {shown}." if shown else ""
        value = str(value) if isinstance(value, Path) else value
        entries.append(f"{comment(text)}\n{yaml.safe_dump({option.name: value}, allow_unicode=True)}")
    write_new(file, "\n".join(entries), force)


def write_new(file: Path, text: str, force: bool) -> None:
    """Write a file that does not exist yet, or replace it by ``force``.

    Raises:
        UsageError: it exists.
        NotWrittenError: it cannot be written.
    """
    from dpo_cli.utils.files import atomic_write

    if file.exists() and not force:
        raise UsageError(f"{file}: exists already; name another file, or replace it with --force")
    with atomic_write(file) as temporary:
        temporary.write_text(text, encoding="utf-8")


# ---- resumed runs -----------------------------------------------------------------------------------------------


def resolve_training(given: Mapping[str, Any], resume: Path | None, file: Name | None = None) -> TrainOptions:
    """Return the options of a new run, or those of the run in the folder ``resume``.

    There the options given may only change what does not change the training; ``output`` may repeat the folder.

    Raises:
        UsageError: they cannot be used, the folder is no run, or an option asks for another training.
    """
    if not resume:
        return resolve(TrainOptions, given, file)
    if file:
        raise UsageError(f"--resume {resume}: a resumed run keeps its own options; leave out --config")
    for name in ("config.yaml", "manifest.json"):
        if not (resume / name).is_file():
            raise UsageError(f"--resume {resume}: no run there ({name} is missing){suggest_path(resume)}")
    if given.get("output") and Path(given["output"]) == resume:
        given = {**given, "output": None}
    file = resume / "config.yaml"
    began, options = resolve(TrainOptions, {}, file), resolve(TrainOptions, given, file)
    if changed := differences(began, options):
        new = {"output": resume.with_name(f"{resume.name}-2")} | {name: getattr(options, name) for name in changed}
        command = shlex.join(["dpo", "train", "--config", str(file), *as_words(new)])
        further = f"; add --model {shlex.quote(str(resume))} to train its model further"
        raise UsageError(
            f"--resume {resume}: cannot change {', '.join(changed.values())}. A new run can: {command}"
            + (further if (resume / "model").is_dir() and "model" not in changed else "")
        )
    return options


def as_words(options: Mapping[str, Any]) -> list[str]:
    """Format options as words of a command, without those that are None or False."""
    words = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words += [flag] * value
        elif value is not None:
            words += [word for each in (value if isinstance(value, list) else [value]) for word in (flag, str(each))]
    return words


def differences(began: TrainOptions, options: TrainOptions) -> dict[str, str]:
    """Describe, by name, the options that ask for another training than the one that a run began with."""
    found = {}
    for name, value in vars(options).items():
        if name in RESUME_MUTABLE or value == getattr(began, name):
            continue
        given, before = (" ".join(as_words({name: getattr(each, name)})) for each in (options, began))
        given = given or f"no --{name.replace('_', '-')}"
        found[name] = f"{given} (it began {f'with {before}' if before else 'without'})"
    return found


def inherit_auto_options(options: TrainOptions, began: TrainOptions) -> TrainOptions:
    """Return the options with another run's automatic choices where they leave them open."""
    left_open = {name for name in AUTO_OPTIONS if getattr(options, name) in (None, "auto", False)}
    return replace(options, **{name: getattr(began, name) for name in left_open})
