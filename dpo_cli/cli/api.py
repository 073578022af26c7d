"""The commands as functions of Python: options by keyword, results as plain data, errors raised.

Heavy imports stand inside the functions, so that importing the package is instant.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_cli.config.options import DataOptions, EvalOptions, PrecomputeOptions
from dpo_cli.config.resolve import Name, as_words, resolve, resolve_training
from dpo_cli.utils.cards import check_trace
from dpo_cli.utils.errors import UsageError

if TYPE_CHECKING:
    from dpo_cli.utils.console import Reporter

Data = Name | Iterable[Name] | Iterable[Mapping[str, Any]]

ROWS = Path("runs")  # folder for rows that are in memory


def train(
    data: Data | None = None,
    *,
    resume: Name | None = None,
    config: Name | None = None,
    dry_run: bool = False,
    trace: bool = False,
    card: str | None = None,
    progress: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Train a model on chosen/rejected pairs, as ``dpo train`` does; returns what that prints with ``--json``.

    ``options`` are those of the command, as in ``lr=1e-5``. ``data``, and the option ``eval_data``, are what ``--data``
    takes, or rows as dicts, which are first written to a file below ``runs``: a run is resumed from its folder, which
    names its data. ``resume`` continues the run in that folder, ``config`` is a YAML file of options, ``dry_run`` stops
    before the first step; with ``trace`` too it returns what a step takes of the GPU that ``card`` names. With
    ``progress`` all is reported on stderr; without, warnings only, as Python's.

    In the result, ``model`` is the folder of the trained model; ``before`` and ``after`` are means over the held-out
    pairs, by the names of ``metrics.jsonl``. The random generators of Python, NumPy and torch are seeded.

    Raises:
        UsageError: an option or the data cannot be used; nothing was trained.
        Interrupted: a signal came, as from a notebook's stop button; a checkpoint was written.
        DpoError: the run failed, and its last checkpoint is whole.
    """
    given, folder = _given(data, options), Path(resume) if resume else None
    resolved = resolve_training(given, folder, config)
    values = {name: getattr(resolved, name) for name in given} | {"resume": folder, "config": config}
    traced = check_trace(dry_run, trace, card)
    with _reporter(progress, resolved, weights=not traced) as reporter:
        if traced:
            from dpo_cli.training.trace import trace as run_trace

            return run_trace(resolved, folder, card, reporter)
        from dpo_cli.training.loop import train as run

        return run(resolved, folder, ["dpo", "train", *as_words(values)], reporter, dry_run)


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
    resolved = resolve(EvalOptions, _given(data, options), config)
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
        DpoError: a log-prob of the reference is not finite, or the disk is full; with ``verify``, a cached log-prob is
            off by more than arithmetic explains.
    """
    resolved = resolve(PrecomputeOptions, _given(data, options), config)
    with _reporter(progress, resolved) as reporter:
        from dpo_cli.reference.precompute import precompute as run

        return run(resolved, reporter)


def _given(data: Data | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options as a command has them: a hyphen as an underscore, with names of data only.

    Raises:
        UsageError: one is given twice.
    """
    given = {"data": data} | {name.replace("-", "_"): value for name, value in options.items()}
    if len(given) <= len(options):
        raise UsageError("an option is given twice, with hyphens and with underscores")
    return given | {name: _sources(given[name]) for name in ("data", "eval_data") if name in given}


def _sources(data: Data | None) -> Any:
    """Return names of data; rows in memory are written to a file named by their content.

    Raises:
        UsageError: there are none, or they cannot be written.
    """
    if data is None or isinstance(data, (str, os.PathLike)):
        return data
    if isinstance(data, Mapping) or not isinstance(data, Iterable):
        raise UsageError("data: must be what --data names, or a list of rows as dicts")
    items: list[Any] = list(data)
    if not items:
        raise UsageError("data: there are no rows")
    if not isinstance(items[0], Mapping):
        return items
    import hashlib
    import json

    from dpo_cli.utils.files import atomic_write, finite

    try:
        text = "".join(json.dumps(finite(dict(row))) + "\n" for row in items)
    except (TypeError, ValueError) as error:
        raise UsageError(f"the rows cannot be written as JSON: {error}") from error
    file = ROWS / f"rows-{hashlib.sha256(text.encode()).hexdigest()[:12]}.jsonl"
    with atomic_write(file) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return file


@contextmanager
def _reporter(progress: bool, options: DataOptions, weights: bool = True) -> Iterator[Reporter]:
    """Yield a reporter, as the command has one; models' memory is released afterwards."""
    from dpo_cli.cli.command import Output

    out = Output()
    out.quiet = not progress
    reporter = out.reporter(options, weights=weights)
    if not progress:  # without a registry, which would show a text once per session only
        reporter.warning = lambda text: warnings.warn_explicit(text, UserWarning, "dpo_cli", 1)
    from dpo_cli.models.loading import free_memory

    try:
        yield reporter
    finally:
        free_memory()
