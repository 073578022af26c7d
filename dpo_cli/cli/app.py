"""Commands and exit codes. Heavy imports stand inside the commands, so that help is instant."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TextIO, get_type_hints

import typer
from typer.core import TyperGroup

from dpo_cli.config.options import (
    CACHE_DIR,
    CheckOptions,
    DataOptions,
    EvalOptions,
    ExplainOptions,
    PrecomputeOptions,
    SweepOptions,
    TrainOptions,
    meant_option,
    repository,
    resolve,
    resolve_training,
)
from dpo_cli.utils.errors import DpoError, UsageError, name_beside, printable


class Commands(TyperGroup):
    """The commands; an unknown option is refused in one line, with the one that was meant."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was typed, as typer does."""
        try:
            return super().invoke(ctx)
        except Exception as error:
            if type(error).__name__ != "NoSuchOption":  # click's, which typer may bring along
                raise
            about: Any = error
            known = [word for each in about.ctx.command.params for word in each.opts]
            word, *words = (each.lstrip("-").replace("-", "_") for each in (about.option_name, *known))
            near = meant_option(word, words).replace("_", "-").replace("'", "'--", 1)
            _fail(f"unknown option {about.option_name}{near}", 2, debug=False, log_json=False)


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ConfigFile = Annotated[Path | None, typer.Option("--config", help="YAML file with any of these options; a flag wins.")]
Json = Annotated[bool, typer.Option("--json", help="Print exactly one JSON object on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Tell nothing but warnings, errors and the result.")]
LogJson = Annotated[bool, typer.Option("--log-json", help="On stderr, write a JSON object a line; event is its kind.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


class Voice(NamedTuple):
    """How a command tells what happens."""

    quiet: bool = False
    log_json: bool = False


PLAIN = Voice()


def with_options(kind: type[DataOptions]) -> Callable[[Callable[..., Any]], Callable[..., None]]:
    """Give a command a flag for every field of ``kind``; the values given reach it as a dict named ``flags``.

    A flag's own default is None, so that flags that were not given leave the file's value or the default. How it is to
    speak reaches the command as ``voice``.
    """
    types = get_type_hints(kind)
    fields = dataclasses.fields(kind)
    flags = [
        inspect.Parameter(
            f.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[types[f.name] | None, _typer_option(f)],
        )
        for f in fields
    ]

    def decorate(command: Callable[..., Any]) -> Callable[..., None]:
        parameters = inspect.signature(command, eval_str=True).parameters.values()
        own = [p for p in parameters if p.name not in ("flags", "voice")]

        def wrapped(**given: Any) -> None:
            values = {f.name: given.pop(f.name) for f in fields}
            voice, debug = Voice(given.pop("quiet"), given.pop("log_json")), given.pop("debug")
            _guarded(lambda: command(flags=values, voice=voice, **given), debug, voice.log_json)

        common = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation)
            for name, annotation in {"quiet": Quiet, "log_json": LogJson, "debug": Debug}.items()
        ]
        wrapped.__name__, wrapped.__doc__ = command.__name__, command.__doc__
        wrapped.__signature__ = inspect.Signature([*flags, *own, *common])  # type: ignore[attr-defined]
        return wrapped

    return decorate


def _typer_option(field: dataclasses.Field[Any]) -> Any:
    default = field.metadata["shown"] or ("required" if field.default is dataclasses.MISSING else field.default)
    name = field.name.replace("_", "-")
    shown = (
        f"{field.metadata['help']} [default: {default}]"
        if default not in (None, "required") and default is not False
        else field.metadata["help"]
    )
    choices = field.metadata["choices"]

    def offered(incomplete: str) -> list[str]:
        return [choice for choice in choices if choice.startswith(incomplete)]

    # a shell offers files where nothing else is offered
    return typer.Option(f"--{name}", help=shown, show_default=False, autocompletion=offered if choices else None)


def _guarded(action: Callable[[], None], debug: bool, log_json: bool = False) -> None:
    """Run a command; turn what a user can cause into one message and an exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    fail = partial(_fail, debug=debug, log_json=log_json)
    try:
        action()
    except DpoError as error:
        fail(str(error), error.exit_code, cut_off=error.cut_off)
    except BrokenPipeError:  # who read what is told has gone, as head does
        _silence(sys.stdout, sys.stderr)
        raise typer.Exit(1) from None
    except OSError as error:
        if debug:
            raise
        fail(str(error), 1)
    except RuntimeError as error:
        if debug or type(error).__name__ != "OutOfMemoryError":
            raise
        fail(f"out of device memory; lower --max-tokens, or set --gradient-checkpointing\n{error}", 1)
    except KeyboardInterrupt:
        if debug:
            raise
        told = "interrupted; what the cache has of reference log-probs is kept: the same command goes on with it"
        fail(told, 130, cut_off=True)


def _silence(*streams: TextIO) -> None:
    for stream in streams:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _fail(message: str, code: int, debug: bool, log_json: bool, cut_off: bool = False) -> None:
    if debug:
        print(printable(traceback.format_exc()), file=sys.stderr, end="")
    if _processes() > 1:
        from dpo_cli.utils.distributed import report_once

        message, code = report_once(message, code, cut_off)
    if message and log_json:
        print(json.dumps({"event": "error", "text": message, "exit_code": code}), file=sys.stderr, flush=True)
    elif message:
        over = "\r" if sys.stderr.isatty() else ""  # over the ^C that a terminal shows of an interrupt
        print(f"{over}error: {printable(message)}", file=sys.stderr, flush=True)
    raise typer.Exit(code)


def _processes() -> int:
    """Of how many processes that a launcher started this is one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _speaks() -> bool:
    """Whether this is the one of them that speaks."""
    return _processes() == 1 or os.environ.get("RANK", "0") == "0"


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"dpo-cli {version('dpo-cli')}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Train language models on preference pairs with DPO: no reward model, no critic, no resident reference."""


@app.command()
def init(
    file: Annotated[Path, typer.Argument(help="Where to write it.")] = Path("run.yaml"),
    data: Annotated[list[str] | None, typer.Option(help="What --data of dpo train names. Repeatable.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Write a file of all options for dpo train --config, with comments."""

    def action() -> None:
        from dpo_cli.config.template import write_config

        write_config(file, data or (), force)
        then = f"{file} is written. {'Now' if data else 'Fill in data: there, then'}: dpo train --config {file}"
        _show({"config": str(file)}, json_, lambda _: then)

    _guarded(action, debug)


@app.command()
@with_options(TrainOptions)
def train(
    *,
    flags: dict[str, Any],
    voice: Voice,
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this folder.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and stop before the first step.")] = False,
    config: ConfigFile = None,
    json_: Json = False,
) -> None:
    """Train a model on chosen/rejected pairs."""
    options = resolve_training(flags, resume, config)
    reporter = _reporter(voice, options, several=True)
    from dpo_cli.training.loop import train as run

    result = run(options, resume, sys.argv, reporter, dry_run)
    error = result.pop("push_error", None)
    _show(result, json_, _train_summary)
    if error:
        raise DpoError(error)


@app.command()
def push(
    run: Annotated[Path, typer.Argument(help="A run's folder, or its model/ or best/.")],
    name: Annotated[str, typer.Argument(metavar="ORG/NAME", help="The repository on the hub.")],
    public: Annotated[bool, typer.Option("--public", help="If it is made now, let everybody read it.")] = False,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Upload a trained model to the Hugging Face hub."""

    def action() -> None:
        if not repository.holds(name):
            raise UsageError(f"{name}: {repository.must}")
        if not run.is_dir():
            raise UsageError(f"{run}: no such folder{name_beside(run)}")
        _reporter()
        from dpo_cli.hub.push import check_login, model_folder
        from dpo_cli.hub.push import push as upload

        model_folder(run)
        check_login(name)
        _show(upload(run, name, public), json_, _plain)

    _guarded(action, debug)


@app.command("precompute-ref")
@with_options(PrecomputeOptions)
def precompute_ref(*, flags: dict[str, Any], voice: Voice, config: ConfigFile = None, json_: Json = False) -> None:
    """Fill the cache with the reference's log-probabilities."""
    options = resolve(PrecomputeOptions, flags, config)
    reporter = _reporter(voice, options, several=True)
    from dpo_cli.training.prepare import precompute

    _show(precompute(options, reporter), json_, _plain)


@app.command("eval")
@with_options(EvalOptions)
def eval_(*, flags: dict[str, Any], voice: Voice, config: ConfigFile = None, json_: Json = False) -> None:
    """Show what a model learned, and how far it is from its reference."""
    options = resolve(EvalOptions, flags, config)
    reporter = _reporter(voice, options)
    from dpo_cli.evaluation.evaluate import run_eval
    from dpo_cli.reporting.text import as_text

    run_eval(options, reporter, lambda result: _show(result, json_, as_text))


@app.command()
@with_options(SweepOptions)
def sweep(*, flags: dict[str, Any], voice: Voice, config: ConfigFile = None, json_: Json = False) -> None:
    """Train with several betas and show what each reward costs in KL."""
    options = resolve(SweepOptions, flags, config)
    reporter = _reporter(voice, options)
    from dpo_cli.training.sweep import as_text
    from dpo_cli.training.sweep import sweep as run

    _show(run(options, sys.argv, reporter), json_, as_text)


@app.command()
def merge(
    model: Annotated[str, typer.Option(help="Run, checkpoint or folder of an adapter.")],
    output: Annotated[Path, typer.Option(help="Folder of the merged model; must not exist yet.")],
    base_model: Annotated[
        str | None,
        typer.Option(help="The adapter's base: hub id, folder or .gguf file. [default: what the adapter names]"),
    ] = None,
    export_dtype: Annotated[
        Literal["float32", "bfloat16", "auto"],
        typer.Option(help="Precision of the weights; auto: that in which the base is stored."),
    ] = "float32",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that the base model's repository brings.")
    ] = False,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Write an adapter and its base as one model."""

    def action() -> None:
        from dpo_cli.models.locate import find_model

        find_model(model, base=base_model)
        reporter = _reporter()
        from dpo_cli.hub.merge import merge as run

        _show(run(model, base_model, output, export_dtype, trust_remote_code, reporter), json_, _plain)

    _guarded(action, debug)


@app.command()
@with_options(ExplainOptions)
def explain(*, flags: dict[str, Any], voice: Voice, config: ConfigFile = None, json_: Json = False) -> None:
    """Show one row as it would be trained: every token, and which carry loss."""
    options = resolve(ExplainOptions, flags, config)
    reporter = _reporter(voice, options)
    from dpo_cli.quality.explain import explain as run
    from dpo_cli.quality.explain import show

    result = run(options, reporter)
    if json_:
        _show(result, True, _plain)
    else:
        show(result)


@app.command()
@with_options(CheckOptions)
def check(*, flags: dict[str, Any], voice: Voice, config: ConfigFile = None, json_: Json = False) -> None:
    """Say what is wrong with preference rows; computes nothing but tokens."""
    options = resolve(CheckOptions, flags, config)
    reporter = _reporter(voice, options)
    from dpo_cli.quality.check import as_text, run_check

    result = run_check(options, reporter)
    _show(result, json_, as_text)
    if not result["pairs"]:  # nothing that could be trained on
        raise typer.Exit(2)
    if options.strict and result["problems"]:
        raise typer.Exit(3)


@app.command()
def losses(json_: Json = False, debug: Debug = False) -> None:
    """List what --loss knows: formulas, when to use which, papers."""
    from dpo_cli.losses.objective import as_text, list_losses

    _guarded(lambda: _show(list_losses(), json_, as_text), debug)


cache_app = typer.Typer(no_args_is_help=True, help="Look after cached reference log-probs and pairs.")
app.add_typer(cache_app, name="cache")

CacheDir = Annotated[Path, typer.Option("--cache-dir", help="Where reference log-probs and tokenized pairs are kept.")]


@cache_app.command("list")
def cache_list(cache_dir: CacheDir = CACHE_DIR, json_: Json = False, debug: Debug = False) -> None:
    """Show every reference's model, size and last use; tokenized data."""

    def action() -> None:
        _reporter()
        from dpo_cli.reference.manage import list_references

        _show(list_references(cache_dir), json_, _references)

    _guarded(action, debug)


@cache_app.command("verify")
def cache_verify(cache_dir: CacheDir = CACHE_DIR, json_: Json = False, debug: Debug = False) -> None:
    """Hash every cached file anew; exit code 3 if any cannot be used."""

    def action() -> None:
        reporter = _reporter()
        from dpo_cli.reference.manage import verify

        result = verify(cache_dir, reporter)
        _show(result, json_, _plain)
        if result["damaged"] or result["unreadable"]:
            raise typer.Exit(3)

    _guarded(action, debug)


@cache_app.command("prune")
def cache_prune(
    cache_dir: CacheDir = CACHE_DIR,
    older_than: Annotated[float | None, typer.Option(min=0, help="Not used for so many days.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Part of the model's name, or beginning of the reference's.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Remove references and copies by age or model, pairs by age; asks first."""

    def action() -> None:
        if model == "":
            raise UsageError("--model: the name is empty")
        if older_than is None and model is None:
            raise UsageError("say what to remove: --older-than DAYS, --model NAME or both")
        reporter = _reporter()
        from dpo_cli.reference.manage import old_or_of, prune, unused

        chosen = old_or_of(cache_dir, older_than, model)
        files = unused(cache_dir, older_than, model)
        copies = sum(file.is_dir() for file in files)
        what = f"{len(chosen)} references" + (f", {copies} copies of models" if copies else "")
        what += f" and the pairs of {len(files) - copies} data files" if len(files) > copies else ""
        if (chosen or files) and not yes:
            if not sys.stdin.isatty():
                raise UsageError(f"{what} would be removed; nobody can be asked here: add --yes")
            print(printable(_references({"references": [kept.words() for kept in chosen]})), file=sys.stderr)
            typer.confirm(f"Remove these {what}?", abort=True, err=True)
        _show(prune(chosen, files, reporter), json_, _plain)

    _guarded(action, debug)


def _references(result: dict[str, Any]) -> str:
    """A line a reference."""
    lines = [f"{'reference':<34}{'size':>10}{'responses':>11}{'unused':>10}  model"]
    for kept in result["references"]:
        size, unused = f"{kept['bytes'] / 2**20:,.1f} MiB", f"{kept['days_unused']:.1f} d"
        damaged = f"; {kept['damaged']} damaged files" if kept["damaged"] else ""
        about = f"{kept['model']} ({kept['how']}{damaged})"
        lines.append(f"{kept['reference']:<34}{size:>10}{kept['responses']:>11,}{unused:>10}  {about}")
    if (pairs := result.get("tokenized", {})).get("files"):
        size = f"{pairs['bytes'] / 2**20:,.1f} MiB"
        lines.append(f"{'tokenized pairs':<34}{size:>10}  of {pairs['files']:,} data files")
    for copy in result.get("models", []):
        size, part = f"{copy['bytes'] / 2**20:,.1f} MiB", "copy of " + copy["copy"].partition("-")[2]
        lines.append(f"{part:<34}{size:>10}{'':>21}  {copy['model']}")
    return "\n".join(lines)


def _reporter(voice: Voice = PLAIN, options: DataOptions | None = None, several: bool = False) -> Any:
    """A reporter, after the libraries below were made quiet; ``several`` processes may run the command together.

    What the options name is checked first, without any library. To load those takes seconds, which is said at once.

    Raises:
        UsageError: a launcher started several, and each would do the same; or as ``check_names`` and ``check_hub``.
    """
    if not several and _processes() > 1:
        raise UsageError("only dpo train and dpo precompute-ref run in several processes: start it without a launcher")
    from dpo_cli.models.locate import check_hub, check_names

    on_hub = check_names(options) if options else None
    if _speaks() and not voice.quiet:
        event = {"event": "loading", "text": "loading…"}
        try:
            print(json.dumps(event) if voice.log_json else event["text"], file=sys.stderr, flush=True)
        except BrokenPipeError:  # the result has another reader
            _silence(sys.stderr)
    if on_hub:
        check_hub(*on_hub)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # said aloud, so that no fork warns that it is turned off
    import logging

    from transformers.utils.logging import disable_progress_bar

    from dpo_cli.utils.console import Reporter

    disable_progress_bar()
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it tells where it keeps its list of fonts

    return Reporter(*voice, mute=not _speaks())


def _show(result: dict[str, Any], as_json: bool, table: Callable[[dict[str, Any]], str]) -> None:
    from dpo_cli.utils.files import to_json

    if _speaks():
        print(to_json(result) if as_json else printable(table(result)), flush=True)


def _plain(result: dict[str, Any]) -> str:
    width = max(map(len, result))
    return "\n".join(f"{name:<{width}}  {_number(value)}" for name, value in result.items())


def _number(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, dict):
        return "  ".join(f"{name}: {_number(each)}" for name, each in value.items()) or "none"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _train_summary(result: dict[str, Any]) -> str:
    from dpo_cli.reporting.text import known, verdict

    lines = [*known(result)]
    for answer in result.get("answers", []):
        lines += [
            answer["prompt"].strip(),
            f"  reference: {answer['reference']}",
            f"  policy:    {answer['policy']}",
            "",
        ]
    before, after = result.get("before", {}), result.get("after", {})
    if after:
        lines.append(f"{'held out, ' + str(result['held_out']) + ' pairs':<24}{'before':>12}{'after':>12}")
        for name in ("loss", "rewards/margins", "rewards/accuracies", "rewards/chosen", "rewards/rejected"):
            lines.append(f"  {name:<22}{before.get(name, float('nan')):>12.4f}{after[name]:>12.4f}")
    shown = ("pairs", "steps", "run", "model", "report", "pushed", "reference_misses")
    lines += [f"{name:<11} {result[name]}" for name in shown if name in result]
    return "\n".join([*lines, *verdict(result)])


def main() -> None:
    """Entry point of the ``dpo`` command."""
    if "_DPO_COMPLETE" in os.environ:  # typer would break help at the terminal's width, and a shell offer each line
        os.environ["TERMINAL_WIDTH"] = "10000"
    try:
        app()
    except SystemExit as end:
        if distributed := sys.modules.get("dpo_cli.utils.distributed"):
            distributed.hard_exit(int(end.code or 0))
        raise
