"""The commands as functions of Python: options by keyword, results as plain data, errors raised.

Heavy imports stand inside the functions, so that importing the package is instant.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_cli.config.options import DataOptions, EvalOptions, PrecomputeOptions, TrainOptions, as_flag
from dpo_cli.config.resolve import from_keywords, resolve, resolve_training
from dpo_cli.utils.errors import DpoError, UsageError

if TYPE_CHECKING:
    from dpo_cli.utils.console import Reporter

Name = str | os.PathLike[str]
Data = Name | Iterable[Name] | Iterable[Mapping[str, Any]]

ROWS = Path("runs")  # folder for rows that are in memory


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

    ``options`` are those of the command, as in ``lr=1e-5``. ``data``, and the option ``eval_data``, are what ``--data``
    takes, or rows as dicts: those are first written to a file below ``runs``, since a run is resumed and repeated from
    its folder, which names its data. ``resume`` continues the run in that folder, ``config`` is a YAML file of options,
    ``dry_run`` stops before the first step. With ``progress`` everything is reported on stderr, as by the command;
    without, warnings only, as Python's.

    In the result, ``model`` is the folder of the trained model; ``before`` and ``after`` are means over the held-out
    pairs, by the names of ``metrics.jsonl``. The random generators of Python, NumPy and torch are seeded.

    Raises:
        UsageError: an option or the data cannot be used; nothing was trained.
        Interrupted: a signal came, as from a notebook's stop button; a checkpoint was written.
        DpoError: the run failed, and its last checkpoint is whole; or it is complete and could not be uploaded.
    """
    flags, folder, file = _flags(TrainOptions, data, options), _path(resume), _path(config)
    resolved = resolve_training(flags, folder, file)
    with _reporter(progress, resolved) as reporter:
        from dpo_cli.training.loop import train as run

        given = {
            name: value for name, value in (flags | {"resume": folder, "config": file}).items() if value is not None
        }
        command = ["dpo", "train", *(word for name, value in given.items() for word in as_flag(name, value))]
        result = run(resolved, folder, command, reporter, dry_run)
    if error := result.pop("push_error", None):
        raise DpoError(error)
    return result


def evaluate(
    data: Data | None = None, *, config: Name | None = None, progress: bool = False, **options: Any
) -> dict[str, Any]:
    """Report what a model learned, as ``dpo eval`` does; returns what that prints with ``--json``.

    ``model`` is a run's folder, or whatever ``--model`` takes; of a list of two, the second is compared with the first.
    ``data``, ``config`` and ``progress`` are as in ``train``.

    Raises:
        UsageError: an option or the data cannot be used.
        DpoError: the evaluation failed.
    """
    resolved = resolve(EvalOptions, _flags(EvalOptions, data, options), _path(config))
    results: list[dict[str, Any]] = []
    with _reporter(progress, resolved) as reporter:
        from dpo_cli.evaluation.evaluate import run_eval

        run_eval(resolved, reporter, results.append)
    return results[0]


def precompute(
    data: Data | None = None, *, config: Name | None = None, progress: bool = False, **options: Any
) -> dict[str, Any]:
    """Fill the cache of reference log-probs, as ``dpo precompute-ref`` does; returns what that prints with ``--json``.

    ``data``, ``config`` and ``progress`` are as in ``train``. Log-probs from before an interruption are kept.

    Raises:
        UsageError: an option or the data cannot be used.
        DpoError: with ``verify``, a cached log-prob is off by more than arithmetic explains.
    """
    resolved = resolve(PrecomputeOptions, _flags(PrecomputeOptions, data, options), _path(config))
    with _reporter(progress, resolved) as reporter:
        from dpo_cli.reference.precompute import precompute as run

        return run(resolved, reporter)


def _flags(kind: type[DataOptions], data: Data | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options as a command has them; rows are written to a file after the other options were checked."""
    given = {**options, "data": data}
    words = ("config", "progress", *(("resume", "dry_run") if kind is TrainOptions else ()))
    flags = from_keywords(kind, {k: v for k, v in given.items() if k not in ("data", "eval_data")}, words)
    sources = {k: _sources(given[k]) for k in ("data", "eval_data") if given.get(k) is not None}
    return flags | from_keywords(kind, sources)


def _sources(data: Data) -> list[Any]:
    """Return names of data; rows in memory are written to a file named by their content.

    Raises:
        UsageError: there are none, or they cannot be written.
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


@contextmanager
def _reporter(progress: bool, options: DataOptions) -> Iterator[Reporter]:
    """Yield a reporter while transformers shows no progress of its own; models' memory is released afterwards.

    Raises:
        UsageError: a launcher started several processes; or a name in the options does not exist.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("the functions run in one process; several run the command: torchrun … -m dpo_cli train …")
    from dpo_cli.models.locate import check_hub, check_names

    check_hub(*check_names(options))
    from transformers.utils import logging

    from dpo_cli.models.loading import free_memory
    from dpo_cli.utils.console import Reporter

    reporter = Reporter(quiet=not progress)
    if not progress:  # without a registry, which would show a text once per session only
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
