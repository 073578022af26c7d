"""What every command shares: flags from options, output on stdout and stderr, errors as exit codes."""

from __future__ import annotations

import atexit
import inspect
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, get_type_hints

import typer.main
from typer.core import TyperGroup

from dpo_cli.config.options import DataOptions
from dpo_cli.config.resolve import suggest_option
from dpo_cli.utils.errors import DpoError, UsageError, did_you_mean, printable

ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML file with any of these options; a flag wins.")]


class Output:
    """Where the result, the log and the error of the running command go, by its flags."""

    json = quiet = log_json = debug = False

    def show(self, result: dict[str, Any], table: Callable[[dict[str, Any]], str] | None = None) -> None:
        """Print the result on stdout: as JSON, as a table for a person, or as a line per value."""
        from dpo_cli.utils.files import to_json

        if is_main_process():
            print(to_json(result) if self.json else printable((table or _lines)(result)), flush=True)

    def reporter(self, options: DataOptions | None = None, several: bool = False) -> Any:
        """Make a reporter, after silencing the libraries; ``several`` processes may run the command together.

        The names in the options are checked first, before libraries that take seconds to import.

        Raises:
            UsageError: a launcher started several processes; or as ``check_names`` and ``check_hub``.
        """
        if not several and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UsageError(
                "this runs in one process, without a launcher; dpo train and dpo precompute-ref run in several"
            )
        from dpo_cli.models.locate import check_hub, check_names

        on_hub = check_names(options) if options else ({}, {})
        if is_main_process() and not self.quiet:
            self._log("loading…", {"event": "loading"})
        check_hub(*on_hub)
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # set, so that no fork warns that it is turned off
        import logging

        from transformers.utils.logging import disable_progress_bar, set_verbosity_error

        from dpo_cli.utils.console import Reporter

        set_verbosity_error()
        disable_progress_bar()
        logging.getLogger("matplotlib").setLevel(logging.ERROR)
        return Reporter(self.quiet, self.log_json, mute=not is_main_process())

    def fail(self, error: BaseException) -> int:
        """Print an error that a user can cause on stderr and return its exit code; raise any other."""
        message, code = _explain(error)
        if self.debug:
            print(printable("".join(traceback.format_exception(error))), file=sys.stderr, end="")
        if not is_main_process() and "TORCHELASTIC_ERROR_FILE" in os.environ:  # torchrun reports the first that failed
            from torch.distributed.elastic.multiprocessing.errors import get_error_handler

            get_error_handler().record_exception(error)
        else:
            overwrite = "\r" if sys.stderr.isatty() else ""  # the ^C that a terminal shows of an interrupt
            event = {"event": "error", "exit_code": code, "text": message}
            self._log(message, event, f"{overwrite}error: ")
        return code

    def _log(self, text: str, event: dict[str, Any], head: str = "") -> None:
        with suppress(BrokenPipeError):  # the result has another reader
            print(json.dumps(event | {"text": text}) if self.log_json else head + printable(text), file=sys.stderr)


out = Output()
_KEYWORD = inspect.Parameter.KEYWORD_ONLY


def _explain(error: BaseException) -> tuple[str, int]:
    """Return the message and the exit code of an error that a user can cause; raise any other."""
    if isinstance(error, DpoError):
        return str(error), error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; cached reference log-probs are kept: rerun the command to continue", 130
    if isinstance(error, OSError):
        return str(error), 1
    if type(error).__name__ == "OutOfMemoryError":  # torch's
        return f"out of device memory; lower --max-tokens, or set --gradient-checkpointing\n{error}", 1
    if type(error).__name__ == "NoSuchOption":  # click's, which typer may vendor
        about: Any = error
        known = [flag.lstrip("-").replace("-", "_") for each in about.ctx.command.params for flag in each.opts]
        near = suggest_option(about.option_name.lstrip("-").replace("-", "_"), known)
        near = near.replace("_", "-").replace("'", "'--", 1)
        return f"unknown option {about.option_name}{near}", 2
    raise error


class Commands(TyperGroup):
    """The commands, each made when it is asked for; an error that a user can cause is one message and an exit code."""

    made: ClassVar[dict[str, tuple[Callable[..., None], type[DataOptions] | None]]] = {}

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of all commands."""
        return [*self.made, *self.commands]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Make the command of this name."""
        if cmd_name not in self.made:
            if cmd_name not in self.commands and not ctx.resilient_parsing:
                ctx.fail(printable(f"No such command '{cmd_name}'{did_you_mean(cmd_name, self.list_commands(ctx))}"))
            return super().get_command(ctx, cmd_name)
        single = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
        function, kind = self.made[cmd_name]
        single.command(cmd_name)(with_flags(function, kind))
        return typer.main.get_command(single)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the names and sentences of all commands; to make them all would take as long as to import typer."""
        rows = [(name, str(function.__doc__).splitlines()[0]) for name, (function, _) in self.made.items()]
        with formatter.section("Commands"):
            formatter.write_dl([*rows, *((name, str(group.help)) for name, group in self.commands.items())])

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was typed."""
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        vars(out).clear()  # of what an earlier command in this process set
        try:
            super().invoke(ctx)
            code = 0
        except typer.Exit as end:
            code = end.exit_code
        except BrokenPipeError:  # the reader of the output is gone, as head is
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError, ValueError):
                    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            code = 1
        except (Exception, KeyboardInterrupt) as error:
            code = out.fail(error)
        if (distributed := sys.modules.get("dpo_cli.utils.distributed")) and distributed.is_launched():
            atexit.register(distributed.hard_exit, code)
        raise typer.Exit(code)


def command(
    name: str | None = None, kind: type[DataOptions] | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a command of a function, with the flags of ``out`` and a flag for each option of ``kind``.

    The function gets the options as keywords; None if not given, which leaves the file's value or the default.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        Commands.made[name or function.__name__] = function, kind
        return function

    return decorate


def with_flags(function: Callable[..., None], kind: type[DataOptions] | None = None) -> Callable[..., None]:
    """Let typer see the flags of ``out`` and those of the options of ``kind`` in the signature of a function."""
    if hasattr(function, "__signature__"):  # an earlier command of this process made it
        return function
    own = [
        p.replace(kind=_KEYWORD)
        for p in inspect.signature(function, eval_str=True).parameters.values()
        if p.kind is not inspect.Parameter.VAR_KEYWORD
    ]
    types = get_type_hints(kind) if kind else {}
    flags = {f.name: Annotated[types[f.name] | None, _flag(f)] for f in (fields(kind) if kind else ())}
    added = [inspect.Parameter(name, _KEYWORD, default=None, annotation=each) for name, each in flags.items()]
    parameters = [*added, *own, *(_of_output(*each) for each in _OF_OUTPUT)]
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return function


def _of_output(name: str, text: str) -> inspect.Parameter:
    def keep(value: bool) -> None:
        setattr(out, name, value)

    flag = typer.Option(f"--{name.replace('_', '-')}", help=text, callback=keep, expose_value=False)
    return inspect.Parameter(f"{name}_", _KEYWORD, default=None, annotation=Annotated[bool, flag])


_OF_OUTPUT = (
    ("json", "Print exactly one JSON object on stdout."),
    ("quiet", "Print only warnings, errors and the result."),
    ("log_json", "Write JSON lines to stderr; event is their kind."),
    ("debug", "Show the traceback of an error."),
)


def _flag(option: Field[Any]) -> Any:
    text, shown, choices = (option.metadata[name] for name in ("help", "shown", "choices"))
    default = shown or (None if option.default in (MISSING, False) else option.default)
    text += "" if default is None else f" [default: {default}]"

    def offered(incomplete: str) -> list[str]:
        return [choice for choice in choices if choice.startswith(incomplete)]

    # without completions of its own a shell offers files
    name = f"--{option.name.replace('_', '-')}"
    return typer.Option(name, help=text, show_default=False, autocompletion=offered if choices else None)


def is_main_process() -> bool:
    """Whether this process writes to stdout and stderr."""
    return int(os.environ.get("WORLD_SIZE", "1")) == 1 or os.environ.get("RANK", "0") == "0"


def _lines(result: dict[str, Any]) -> str:
    width = max(map(len, result))
    return "\n".join(f"{name:<{width}}  {_value(value)}" for name, value in result.items())


def _value(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, dict):
        return "  ".join(f"{name}: {_value(each)}" for name, each in value.items()) or "none"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
