"""What every command shares: flags from options, output on stdout and stderr, errors as exit codes."""

from __future__ import annotations

import atexit
import inspect
import json
import os
import re
import signal
import sys
import traceback
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer.main
from typer.core import TyperCommand, TyperGroup

from dpo_cli.cli.help import EXAMPLES, FEW, LONGEST, OTHERS, PANEL_OF, PANELS
from dpo_cli.config.checks import several
from dpo_cli.config.options import DataOptions, option
from dpo_cli.config.resolve import resolve, resolve_training, suggest_option
from dpo_cli.utils.errors import DpoError, Interrupted, UsageError, printable


@dataclass
class Output:
    """Where the result, the log and the error of the running command go, by its flags."""

    json: bool = option(False, "Print exactly one JSON object on stdout.")
    quiet: bool = option(False, "Print only warnings, errors and the result.")
    log_json: bool = option(False, "Write JSON lines to stderr; event is their kind.")
    debug: bool = option(False, "Show the traceback of an error.")

    def show(self, result: dict[str, Any], table: Callable[[dict[str, Any]], str] | None = None) -> None:
        """Print the result on stdout: as JSON, as a table for a person, or as a line per value."""
        from dpo_cli.utils.files import to_json

        if is_main_process():
            print(to_json(result) if self.json else printable((table or _lines)(result)), flush=True)

    def reporter(self, options: DataOptions | None = None, several: bool = False, weights: bool = True) -> Any:
        """Make a reporter, after silencing the libraries; ``several`` processes may run the command together.

        ``weights``: whether those of a model must be there.

        The names in the options are checked first, before libraries that take seconds to import.

        Raises:
            UsageError: a launcher started several processes; or as ``check_names`` and ``check_hub``.
        """
        if not several and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise UsageError(
                "this runs in one process, without a launcher; dpo train and dpo precompute-ref run in several"
            )
        from dpo_cli.models.locate import check_hub, check_names

        on_hub = check_names(options, weights) if options else ({}, {})
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
            head = "" if code == Interrupted.exit_code else "error: "
            overwrite = "\r" if sys.stderr.isatty() else ""  # the ^C that a terminal shows of an interrupt
            self._log(message, {"event": "error", "exit_code": code}, overwrite + head)
        return code

    def _log(self, text: str, event: dict[str, Any], head: str = "") -> None:
        with suppress(BrokenPipeError):  # the result has another reader
            print(json.dumps(event | {"text": text}) if self.log_json else head + printable(text), file=sys.stderr)


out = Output()
ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML file with any of these options; a flag wins.")]
COMMANDS: dict[str, TyperCommand | TyperGroup] = {}
_KEYWORD = inspect.Parameter.KEYWORD_ONLY


def _explain(error: BaseException) -> tuple[str, int]:
    """Return the message and the exit code of an error that a user can cause; raise any other."""
    if isinstance(error, DpoError):
        return str(error), error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; cached reference log-probs are kept: rerun the command to continue", Interrupted.exit_code
    if isinstance(error, OSError):
        return str(error), 1
    if type(error).__name__ == "OutOfMemoryError":  # torch's
        return f"out of device memory; lower --max-tokens, or set --gradient-checkpointing\n{error}", 1
    about: Any = error
    if type(error).__name__ == "NoSuchOption":  # click's, which typer may vendor
        names = [parameter.name for parameter in about.ctx.command.params]
        near = suggest_option(about.option_name.lstrip("-").replace("-", "_"), names)
        near = near.replace("_", "-").replace("'", "'--", 1)
        return f"unknown option {about.option_name}{near}", 2
    if type(error).__name__ != "NoArgsIsHelpError" and hasattr(error, "format_message"):  # another of click's
        message = about.format_message().rstrip(".").partition(", unable to parse")[0]
        if not (context := getattr(about, "ctx", None)):
            return message, 2
        extra = re.search(r"unexpected extra argument.* \((.*)\)", message)
        if extra and any(parameter.name == "data" for parameter in context.command.params):
            option = "--model" if Path(extra[1], "model").is_dir() else "--data"  # a run's folder
            return f"{message}; did you mean {' '.join(f'{option} {name}' for name in extra[1].split())}?", 2
        return message if message.endswith("?") else f"{message}; see {context.command_path} --help", 2
    raise error


class Command(TyperCommand):
    """A command of a function; its flags are those of ``out``, the function's own, and the options of ``kind``.

    A function with a ``kind`` gets its options as ``options``, resolved from flags and ``--config``.
    """

    def __init__(self, function: Callable[..., None], kind: type[DataOptions] | None = None) -> None:
        super().__init__(function.__name__, callback=function, help=function.__doc__, rich_markup_mode=None)
        self.function, self.kind = function, kind

    def get_params(self, ctx: Any) -> Any:
        """Make the flags when they are asked for: to make those of all commands takes as long as to import typer."""
        if not self.params:
            own = inspect.signature(self.function, eval_str=True).parameters.values()
            flags = [each.replace(kind=each.KEYWORD_ONLY) for each in own if each.name != "options"]
            if self.kind:
                config = inspect.Parameter("config", _KEYWORD, default=None, annotation=ConfigFile)
                flags = [*_flags(self.kind), *flags, config]

            def typed() -> None: ...

            typed.__signature__ = inspect.Signature([*flags, *_flags(Output)])  # type: ignore[attr-defined]
            single = typer.Typer(add_completion=False)
            single.command()(typed)
            self.params = typer.main.get_command(single).params
        return super().get_params(ctx)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments, options in groups, and two examples."""
        groups, parameters = defaultdict[str, list[tuple[str, str]]](list), self.get_params(ctx)
        for each in parameters:
            if record := each.get_help_record(ctx):
                panel = "Options" if len(parameters) < FEW else PANEL_OF.get(each.name, OTHERS)
                groups["Arguments" if each.param_type_name == "argument" else panel].append(record)
        for panel in ("Arguments", "Options", *PANELS, OTHERS):
            if panel in groups:
                with formatter.section(panel):
                    formatter.write_dl(groups[panel])
        with formatter.section("Examples"):
            for example in EXAMPLES[ctx.info_name]:
                formatter.write(f"  {example}\n")

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the words of the command to the flags of ``out`` and the arguments of the function."""
        rest = super().parse_args(ctx, args)
        if not ctx.resilient_parsing:  # as for a shell that completes
            given = {name: None if value == () else value for name, value in ctx.params.items()}
            vars(out).update({f.name: given.pop(f.name) for f in fields(Output)})
            if self.kind:
                flags, file = {f.name: given.pop(f.name) for f in fields(self.kind)}, given.pop("config")
                resume = given.get("resume")
                options = resolve_training(flags, resume, file) if resume else resolve(self.kind, flags, file)
                given["options"] = options
            ctx.params = given
        return rest


class Commands(TyperGroup):
    """All commands; an error that a user can cause is one message and an exit code."""

    def __init__(self, **about: Any) -> None:
        super().__init__(**about | {"commands": COMMANDS})

    def make_context(self, *args: Any, **about: Any) -> Any:
        """Parse the words before the command."""
        try:
            return super().make_context(*args, **about)
        except Exception as error:
            raise typer.Exit(out.fail(error)) from error

    def list_commands(self, ctx: Any) -> list[str]:
        """List the commands in the order of use."""
        return [*self.commands]

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write every command with all of its first sentence."""
        with formatter.section("Commands, in the order of use"):
            formatter.write_dl([(name, (each.help or "").partition("\n")[0]) for name, each in self.commands.items()])

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was typed."""
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        vars(out).update(vars(Output()))  # not what an earlier command in this process set
        try:
            super().invoke(ctx)
            code = 0
        except typer.Exit as end:
            code = end.exit_code
        except BrokenPipeError:  # the reader of the output is gone, as head is; click ends with 1
            raise
        except (Exception, KeyboardInterrupt) as error:
            code = out.fail(error)
        if (distributed := sys.modules.get("dpo_cli.utils.distributed")) and distributed.is_launched():
            atexit.register(distributed.hard_exit, code)
        raise typer.Exit(code)


def _flags(kind: type[Any]) -> list[inspect.Parameter]:
    """Make a flag of each option of a class, as typer reads them from a signature."""
    types = get_type_hints(kind)
    types |= {each.name: list[str] for each in fields(kind) if each.metadata["check"] is several}  # or separated by ,
    annotations = {each.name: Annotated[types[each.name] | None, _flag(each)] for each in fields(kind)}
    return [inspect.Parameter(name, _KEYWORD, default=None, annotation=each) for name, each in annotations.items()]


def _flag(option: Field[Any]) -> Any:
    text, shown, check = (option.metadata[name] for name in ("help", "shown", "check"))
    default = shown or (None if option.default in (MISSING, False) else option.default)
    text += "" if default is None else f" [default: {default}]"

    def offered(incomplete: str) -> list[str]:
        return [choice for choice in check.choices if choice.startswith(incomplete)]

    # without completions of its own a shell offers files
    name, completion = f"--{option.name.replace('_', '-')}", offered if check and check.choices else None
    choices = "|".join(check.choices) if check else ""
    metavar = (
        "NUMBERS"
        if check is several
        else choices
        if 0 < len(choices) <= LONGEST
        else "NAME"
        if str(option.type).startswith("list")
        else None
    )
    return typer.Option(name, help=text, show_default=False, autocompletion=completion, metavar=metavar)


def is_main_process() -> bool:
    """Whether this process writes to stdout and stderr."""
    return int(os.environ.get("WORLD_SIZE", "1")) == 1 or os.environ.get("RANK", "0") == "0"


def _lines(result: dict[str, Any]) -> str:
    width = max(map(len, result))
    return "\n".join(f"{name:<{width}}  {_value(value)}" for name, value in result.items())


def _value(value: Any) -> str:
    if isinstance(value, dict):
        value = [f"{name}: {_value(each)}" for name, each in value.items()]
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
