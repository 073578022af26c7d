"""The commands as functions of Python: options by keyword, results as plain data, errors raised.

Heavy imports stand inside the functions, so that importing the package is instant.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dpo_cli.config.options import (
    DataOptions,
    EvalOptions,
    PrecomputeOptions,
    TrainOptions,
    from_keywords,
    resolve,
    resolve_training,
)
from dpo_cli.utils.errors import DpoError, UsageError

if TYPE_CHECKING:
    from dpo_cli.utils.console import Reporter

Name = str | os.PathLike[str]
Data = Name | Iterable[Name] | Iterable[Mapping[str, Any]]
Function = TypeVar("Function", bound=Callable[..., Any])

ROWS = Path("runs")  # where rows that are in memory are written down


def _with_options(kind: type[DataOptions]) -> Callable[[Function], Function]:
    """Show a command's options in the signature of the function that takes them, and their help in its docstring."""

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)
        *own, _ = signature.parameters.values()
        fields = [f for f in dataclasses.fields(kind) if f.name not in signature.parameters]
        keyword = inspect.Parameter.KEYWORD_ONLY
        shown = [inspect.Parameter(f.name, keyword, default=f.default, annotation=f.type) for f in fields]
        told = [f"    {f.name}: {f.metadata['help']} [{f.metadata['shown'] or f.default}]" for f in fields]
        function.__signature__ = signature.replace(parameters=[*own, *shown])  # type: ignore[attr-defined]
        function.__doc__ = "\n".join([inspect.getdoc(function) or "", "", "Options, with their defaults:", *told])
        return function

    return decorate


@_with_options(TrainOptions)
def train(
    data: Data | None = None,
    *,
    resume: Name | None = None,
    config: Name | None = None,
    dry_run: bool = False,
    progress: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Train a model on chosen/rejected pairs, as ``dpo train`` does; returns what that prints with ``--json``.

    ``data``, and the option ``eval_data``, are what ``--data`` names; or rows, as dicts, which are written to a file
    below ``runs`` first, for a run is resumed and repeated from its folder, which names its data. ``resume`` goes on
    with the run in that folder, ``config`` is a YAML file with any of the options, ``dry_run`` stops before the first
    step. With ``progress`` all that the command tells is told, on stderr; without, only its warnings, as Python's.

    Of the result, ``model`` is the folder of the trained model; ``before`` and ``after`` are means over the held-out
    pairs, by the names of ``metrics.jsonl``. The random generators of Python, NumPy and torch are seeded.

    Raises:
        UsageError: an option or the data cannot be used; nothing was trained.
        Interrupted: a signal came, such as a notebook's stop button sends; a checkpoint was written.
        DpoError: the run failed, and its last checkpoint is untouched; or it is complete and could not be uploaded.
    """
    flags, folder = _flags(TrainOptions, data, options), Path(resume) if resume is not None else None
    found = resolve_training(flags, folder, _path(config))
    with _reporter(progress, found) as reporter:
        from dpo_cli.training.loop import train as run

        result = run(
            found, folder, _as_command("train", flags | {"resume": folder, "config": _path(config)}), reporter, dry_run
        )
    if error := result.pop("push_error", None):
        raise DpoError(error)
    return result


@_with_options(EvalOptions)
def evaluate(
    data: Data | None = None, *, config: Name | None = None, progress: bool = False, **options: Any
) -> dict[str, Any]:
    """Say what a model learned, as ``dpo eval`` does; returns what that prints with ``--json``.

    ``model`` is a run's folder, or what else ``--model`` names; of a list of two, the second is held against the first.
    ``data``, ``config`` and ``progress`` are as in ``train``.

    Raises:
        UsageError: an option or the data cannot be used.
        DpoError: the evaluation failed.
    """
    found = resolve(EvalOptions, _flags(EvalOptions, data, options), _path(config))
    shown: list[dict[str, Any]] = []
    with _reporter(progress, found) as reporter:
        from dpo_cli.evaluation.evaluate import run_eval

        run_eval(found, reporter, shown.append)
    return shown[0]


@_with_options(PrecomputeOptions)
def precompute(
    data: Data | None = None, *, config: Name | None = None, progress: bool = False, **options: Any
) -> dict[str, Any]:
    """Fill the cache of reference log-probs, as ``dpo precompute-ref`` does; returns what that prints with ``--json``.

    ``data``, ``config`` and ``progress`` are as in ``train``. What was scored before an interruption is kept.

    Raises:
        UsageError: an option or the data cannot be used.
        DpoError: with ``verify``, a cached log-prob is off by more than arithmetic explains.
    """
    found = resolve(PrecomputeOptions, _flags(PrecomputeOptions, data, options), _path(config))
    with _reporter(progress, found) as reporter:
        from dpo_cli.training.prepare import precompute as run

        return run(found, reporter)


# ---- options ----------------------------------------------------------------------------------------------------


def _flags(kind: type[DataOptions], data: Data | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that are given, as a command has them; rows are written down once the other ones are right."""
    given = {**options, "data": data}
    words = ("config", "progress", *(("resume", "dry_run") if kind is TrainOptions else ()))
    plain = {name: value for name, value in given.items() if name not in ("data", "eval_data")}
    flags = from_keywords(kind, plain, words)
    named = {name: _names(given[name]) for name in ("data", "eval_data") if given.get(name) is not None}
    return flags | from_keywords(kind, named)


def _names(data: Data) -> list[Any]:
    """What to read, by name; rows in memory get one by their content.

    Raises:
        UsageError: there are none, or they cannot be written down.
    """
    if isinstance(data, (str, os.PathLike)):
        return [data]
    if isinstance(data, Mapping) or not isinstance(data, Iterable):
        raise UsageError("data: must be what --data names, or a list of rows as dicts")
    items: list[Any] = list(data)
    if not items:
        raise UsageError("there are no rows")
    if not isinstance(items[0], Mapping):
        return items
    from dpo_cli.utils.files import atomic_write, finite

    try:
        text = "".join(json.dumps(finite(dict(row))) + "\n" for row in items)
    except (TypeError, ValueError) as error:
        raise UsageError(f"the rows cannot be written as JSON: {error}") from error
    file = ROWS / f"rows-{hashlib.sha256(text.encode()).hexdigest()[:12]}.jsonl"
    if not file.exists():
        with atomic_write(file) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return [file]


def _path(name: Name | None) -> Path | None:
    return None if name is None else Path(name)


def _as_command(command: str, flags: Mapping[str, Any]) -> list[str]:
    """The command line that does the same: what a run's manifest tells of how it was started."""
    words = ["dpo", command]
    for name, value in flags.items():
        for each in value if isinstance(value, list) else [value]:
            if each is not None and each is not False:
                words += [f"--{name.replace('_', '-')}", *([] if each is True else [str(each)])]
    return words


# ---- what is told -----------------------------------------------------------------------------------------------


@contextmanager
def _reporter(progress: bool, options: DataOptions) -> Iterator[Reporter]:
    """A reporter, while transformers shows no progress of its own; the memory of models is given back behind it.

    Raises:
        UsageError: a launcher started this process as one of several; or the options name what is not there.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("the functions run in one process; several run the command: torchrun … -m dpo_cli train …")
    from dpo_cli.models.locate import check_hub, check_names

    check_hub(*check_names(options))
    from transformers.utils import logging

    from dpo_cli.models.loading import free_memory
    from dpo_cli.utils.console import Reporter

    reporter = Reporter(quiet=not progress)
    if not progress:  # without a registry, which would let the same text through once a session
        reporter.warning = lambda text: warnings.warn_explicit(text, UserWarning, "dpo_cli", 1)  # type: ignore[method-assign]
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield reporter
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
        free_memory()
