"""What every command shares: flags from options, output on stdout and stderr, errors as exit codes."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NoReturn, TextIO, get_type_hints

import typer

from dpo_cli.config.options import DataOptions
from dpo_cli.utils.errors import DpoError, UsageError, printable

ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML file with any of these options; a flag wins.")]
Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print only warnings, errors and the result.")]
LogJson = Annotated[bool, typer.Option("--log-json", help="Write JSON lines to stderr; event is their kind.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def command(kind: type[DataOptions] | None = None) -> Callable[[Callable[..., Any]], Callable[..., None]]:
    """Make a command of a function, which gets its ``Output`` as ``out``.

    With ``kind`` the command has a flag for each of its fields, and ``--config``. Values given reach the function as
    ``flags``, those not given as None, so that they leave the file's value or the default.
    """
    types = get_type_hints(kind) if kind else {}
    fields = dataclasses.fields(kind) if kind else ()
    flags = {f.name: Annotated[types[f.name] | None, _typer_option(f)] for f in fields}
    common: dict[str, Any] = (
        {"json_": Json} | ({"quiet": Quiet, "log_json": LogJson} if kind else {}) | {"debug": Debug}
    )

    def decorate(function: Callable[..., Any]) -> Callable[..., None]:
        parameters = inspect.signature(function, eval_str=True).parameters.values()

        def wrapped(**given: Any) -> None:
            values = {name: given.pop(name) for name in flags}
            shared = {name: given.pop(name) for name in common}
            with errors_as_exit_codes(shared.pop("debug"), shared.get("log_json", False)):
                function(out=Output(*shared.values()), **given, **({"flags": values} if kind else {}))

        own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters if p.name not in ("out", "flags")]
        wrapped.__name__, wrapped.__doc__ = function.__name__, function.__doc__
        wrapped.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [*_keywords(flags, None), *own, *_keywords(common, False)]
        )
        return wrapped

    return decorate


def _keywords(annotations: dict[str, Any], default: Any) -> list[inspect.Parameter]:
    keyword = inspect.Parameter.KEYWORD_ONLY
    return [inspect.Parameter(name, keyword, default=default, annotation=a) for name, a in annotations.items()]


def _typer_option(field: dataclasses.Field[Any]) -> Any:
    text, shown, choices = (field.metadata[name] for name in ("help", "shown", "choices"))
    default = shown or (None if field.default in (dataclasses.MISSING, False) else field.default)
    text += "" if default is None else f" [default: {default}]"

    def offered(incomplete: str) -> list[str]:
        return [choice for choice in choices if choice.startswith(incomplete)]

    # without completions of its own a shell offers files
    name = f"--{field.name.replace('_', '-')}"
    return typer.Option(name, help=text, show_default=False, autocompletion=offered if choices else None)


class Output(NamedTuple):
    """Where a command's result and reports go."""

    as_json: bool = False
    quiet: bool = False
    log_json: bool = False

    def show(self, result: dict[str, Any], table: Callable[[dict[str, Any]], str] | None = None) -> None:
        """Print the result on stdout: as JSON, as a table for a person, or as a line per value."""
        from dpo_cli.utils.files import to_json

        if is_main_process():
            print(to_json(result) if self.as_json else printable((table or _lines)(result)), flush=True)

    def reporter(self, options: DataOptions | None = None, several: bool = False) -> Any:
        """Make a reporter, after silencing the libraries; ``several`` processes may run the command together.

        The names in the options are checked first, before libraries that take seconds to import.

        Raises:
            UsageError: a launcher started several processes; or as ``check_names`` and ``check_hub``.
        """
        if not several and num_processes() > 1:
            raise UsageError(
                "only dpo train and dpo precompute-ref run in several processes: start it without a launcher"
            )
        from dpo_cli.models.locate import check_hub, check_names

        on_hub = check_names(options) if options else ({}, {})
        if is_main_process() and not self.quiet:
            event = {"event": "loading", "text": "loading…"}
            try:
                print(json.dumps(event) if self.log_json else event["text"], file=sys.stderr, flush=True)
            except BrokenPipeError:  # the result has another reader
                _silence(sys.stderr)
        check_hub(*on_hub)
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # set, so that no fork warns that it is turned off
        import logging

        from transformers.utils.logging import disable_progress_bar

        from dpo_cli.utils.console import Reporter

        disable_progress_bar()
        logging.getLogger("matplotlib").setLevel(logging.ERROR)
        return Reporter(self.quiet, self.log_json, mute=not is_main_process())


def _lines(result: dict[str, Any]) -> str:
    width = max(map(len, result))
    return "\n".join(f"{name:<{width}}  {_value(value)}" for name, value in result.items())


def _value(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, dict):
        return "  ".join(f"{name}: {_value(each)}" for name, each in value.items()) or "none"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


@contextmanager
def errors_as_exit_codes(debug: bool, log_json: bool = False) -> Iterator[None]:
    """Turn an error that a user can cause into one message and an exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except DpoError as error:
        fail(str(error), error.exit_code, debug, log_json)
    except BrokenPipeError:  # the reader of the output is gone, as head is
        _silence(sys.stdout, sys.stderr)
        raise typer.Exit(1) from None
    except OSError as error:
        if debug:
            raise
        fail(str(error), 1, log_json=log_json)
    except RuntimeError as error:
        if debug or type(error).__name__ != "OutOfMemoryError":
            raise
        remedy = "lower --max-tokens, or set --gradient-checkpointing"
        fail(f"out of device memory; {remedy}\n{error}", 1, log_json=log_json)
    except KeyboardInterrupt:
        if debug:
            raise
        fail("interrupted; cached reference log-probs are kept: rerun the command to continue", 130, log_json=log_json)


def fail(message: str, code: int, debug: bool = False, log_json: bool = False) -> NoReturn:
    """Print an error on stderr and exit. Of several ranks rank 0 prints; torchrun reports the first that failed."""
    if debug:
        print(printable(traceback.format_exc()), file=sys.stderr, end="")
    if not is_main_process() and "TORCHELASTIC_ERROR_FILE" in os.environ:
        from dpo_cli.utils.distributed import record_error

        record_error()
    elif log_json:
        print(json.dumps({"event": "error", "text": message, "exit_code": code}), file=sys.stderr, flush=True)
    else:
        overwrite = "\r" if sys.stderr.isatty() else ""  # the ^C that a terminal shows of an interrupt
        print(f"{overwrite}error: {printable(message)}", file=sys.stderr, flush=True)
    raise typer.Exit(code)


def num_processes() -> int:
    """How many processes a launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this process writes to stdout and stderr."""
    return num_processes() == 1 or os.environ.get("RANK", "0") == "0"


def _silence(*streams: TextIO) -> None:
    for stream in streams:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
