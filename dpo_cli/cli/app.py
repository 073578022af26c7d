"""The commands. Heavy imports stand inside them, so that help is instant."""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from typer import Argument, Exit, Option, Typer
from typer.core import TyperGroup

from dpo_cli.cli.command import COMMANDS, Command, Commands, out
from dpo_cli.cli.help import PANEL_OF
from dpo_cli.config.options import (
    CACHE_DIR,
    CheckOptions,
    EvalOptions,
    ExplainOptions,
    PrecomputeOptions,
    SweepOptions,
    TrainOptions,
)
from dpo_cli.config.resolve import write_config
from dpo_cli.utils.cards import check_trace
from dpo_cli.utils.errors import UsageError, plural, printable

if "_DPO_COMPLETE" in os.environ:  # else typer breaks help at the terminal's width, and a shell offers each line
    os.environ["TERMINAL_WIDTH"] = "10000"

Precision = Literal["float32", "bfloat16", "auto"]
GgufPrecision = Literal["f32", "f16", "bf16", "q8_0"]
CacheDir = Annotated[Path, Option("--cache-dir", help="Folder of cached reference log-probs.")]
Run = Annotated[
    str, Argument(metavar="RUN", help="A run, its model/, best/ or a checkpoint; a folder of a model; a hub id.")
]
MaxNewTokens = Annotated[int, Option("--max-new-tokens", min=1, help="Longest answer in tokens.")]
Temperature = Annotated[float, Option("--temperature", min=0, help="0: greedy; 1: the model's own distribution.")]
Seed = Annotated[int, Option("--seed", min=0, help="Random seed for sampling, with --temperature above 0.")]
NoBefore = Annotated[bool, Option("--no-before", help="Do not show the answers of the model before its training.")]
BaseModel = Annotated[str | None, Option("--base-model", help="The adapter's base. [default: what it names]")]
Device = Annotated[str, Option("--device", help="cuda, cuda:NUMBER, xpu, mps, cpu or auto.")]
Trust = Annotated[bool, Option("--trust-remote-code", help="Run Python code of the model's repository.")]

app = main = Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from dpo_cli import __version__

        print(f"dpo-cli {__version__}")
        raise Exit


@app.callback()
def top(
    version: Annotated[bool, Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    """Train language models on preference pairs with DPO: no reward model, no critic.

    First steps: dpo check --data my-pairs.jsonl, then dpo train, then dpo chat RUN. Each command has --help.
    """


def init(
    file: Annotated[Path, Argument(help="Where to write it.")] = Path("run.yaml"),
    data: Annotated[list[str] | None, Option(help="Value of --data of dpo train. Repeatable.")] = None,
    source: Annotated[
        Path | None,
        Option("--from", help="DPO configuration of TRL, axolotl or LLaMA-Factory, to be translated instead."),
    ] = None,
    devices: Annotated[
        int | None, Option(min=1, help="With --from: devices there, each with a batch of its own. [default: 1]")
    ] = None,
    force: Annotated[bool, Option("--force", help="Replace an existing file.")] = False,
) -> None:
    """Write a file of the options of dpo train, with comments."""
    if devices and not source:
        raise UsageError("--devices: counts those of the configuration that --from names; leave it out")
    if source:
        from dpo_cli.config.importers import as_text, import_config

        out.show(import_config(source, file, devices or 1, data or (), force), as_text)
        return
    write_config(file, data or (), force, PANEL_OF)
    then = f"{file} is written. {'Now' if data else 'Fill in data: there, then'}: dpo train --config {file}"
    out.show({"config": str(file)}, lambda _: then)


def train(
    options: TrainOptions,
    resume: Annotated[Path | None, Option(help="Continue the run in this folder.")] = None,
    dry_run: Annotated[bool, Option("--dry-run", help="Show the plan and stop before the first step.")] = False,
    trace: Annotated[
        bool, Option("--trace", help="With --dry-run: what a step takes of a GPU, without one or weights.")
    ] = False,
    card: Annotated[str | None, Option(help="GPU of --trace, as h100. [default: the one that is here]")] = None,
) -> None:
    """Train a model on chosen/rejected pairs."""
    if options.output and not resume:  # before libraries that take seconds to import
        from dpo_cli.utils.files import refuse_existing

        refuse_existing(options.output)
    if check_trace(dry_run, trace, card):
        reporter = out.reporter(options, weights=False)
        from dpo_cli.training.trace import as_text
        from dpo_cli.training.trace import trace as run_trace

        out.show(run_trace(options, resume, card, reporter), as_text)
    else:
        reporter = out.reporter(options, several=True)
        from dpo_cli.training.loop import train as run

        began = time.monotonic()
        result = run(options, resume, sys.argv, reporter, dry_run)
        out.show(result, partial(_train_summary, seconds=time.monotonic() - began))


def chat(
    run: Run,
    save: Annotated[Path | None, Option(help="Ask which answer is better; append the pairs to this file.")] = None,
    no_before: NoBefore = False,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    base_model: BaseModel = None,
    device: Device = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Chat with a model before and after its training."""
    if out.json:
        raise UsageError("--json: a chat is for a person; dpo generate RUN PROMPT --json answers one prompt")
    if save and no_before:
        raise UsageError(f"--save {save}: compares both answers; leave out --no-before")
    if save and (save.suffix != ".jsonl" or not save.absolute().parent.is_dir()):
        raise UsageError(f"--save {save}: takes a name that ends with .jsonl, in a folder that exists")
    models = _open(run, not no_before, seed, base_model, device, trust_remote_code)
    if save and len(models) < 2:
        raise UsageError(f"--save {save}: {run} has no model before its training to compare with")
    from dpo_cli.evaluation.chat import Sampling, console
    from dpo_cli.evaluation.chat import chat as talk

    talk(models, Sampling(max_new_tokens, temperature, seed), save, console())


def generate(
    run: Run,
    prompts: Annotated[list[str], Argument(metavar="PROMPT...", help="What to answer.")],
    no_before: NoBefore = False,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    seed: Seed = 0,
    base_model: BaseModel = None,
    device: Device = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Answer prompts with a model before and after its training."""
    if not all(prompt.strip() for prompt in prompts):
        raise UsageError("PROMPT: a prompt is empty")
    models = _open(run, not no_before, seed, base_model, device, trust_remote_code)
    from dpo_cli.evaluation.chat import Sampling, console, generate_answers

    result = generate_answers(models, prompts, Sampling(max_new_tokens, temperature, seed), console(quiet=out.json))
    if out.json:
        out.show(result)


def _open(run: str, before: bool, seed: int, base: str | None, device: str, trust: bool) -> Any:
    about = {"base_model": base, "device": device, "trust_remote_code": trust, "seed": seed}
    options = EvalOptions(data=[], model=[run], **about)
    with _model_is_argument():
        reporter = out.reporter(options)
        from dpo_cli.evaluation.chat import open_models

        return open_models(run, options, before, reporter)


@contextmanager
def _model_is_argument() -> Iterator[None]:
    """Let errors not name ``--model``, where the model is an argument."""
    try:
        yield
    except UsageError as error:
        raise UsageError(str(error).replace("--model ", "", 1)) from error


def push(
    run: Annotated[Path, Argument(help="A run's folder, or its model/ or best/.")],
    name: Annotated[str, Argument(metavar="ORG/NAME", help="The repository on the hub.")],
    public: Annotated[bool, Option("--public", help="Make a new repository public.")] = False,
) -> None:
    """Upload a trained model to the Hugging Face hub."""
    from dpo_cli.hub.push import push as upload

    out.show(upload(run, name, public))


def precompute_ref(options: PrecomputeOptions) -> None:
    """Fill the cache with the reference's log-probabilities."""
    reporter = out.reporter(options, several=True)
    from dpo_cli.reference.precompute import as_text, precompute

    out.show(precompute(options, reporter), as_text)


def eval_(
    options: EvalOptions, full: Annotated[bool, Option("--full", help="Print all numbers before the verdict.")] = False
) -> None:
    """Show what a model learned and how far it drifted."""
    reporter = out.reporter(options)
    from dpo_cli.evaluation.evaluate import run_eval
    from dpo_cli.reporting.text import as_text

    gates: list[dict[str, Any]] = []

    def show(result: dict[str, Any]) -> None:
        out.show(result, partial(as_text, full=full))
        gates.extend(result.get("gates", ()))

    run_eval(options, reporter, show)
    if not all(gate["passed"] for gate in gates):
        raise Exit(3)


def sweep(options: SweepOptions) -> None:
    """Train with several betas or learning rates and compare them."""
    reporter = out.reporter(options)
    from dpo_cli.training.sweep import as_text
    from dpo_cli.training.sweep import sweep as run

    out.show(run(options, sys.argv, reporter), as_text)


def merge(
    model: Annotated[str, Option(help="Run, checkpoint or folder of an adapter.")],
    output: Annotated[Path, Option(help="Folder of the merged model; must not exist yet.")],
    base_model: BaseModel = None,
    export_dtype: Annotated[Precision, Option(help="Of the weights; auto: as the base is stored.")] = "float32",
    trust_remote_code: Annotated[bool, Option("--trust-remote-code", help="Run Python code of the base.")] = False,
) -> None:
    """Write an adapter and its base as one model."""
    from dpo_cli.models.locate import find_model

    find_model(model, base=base_model)
    reporter = out.reporter()
    from dpo_cli.hub.export import as_text
    from dpo_cli.hub.export import merge as run

    out.show(run(model, base_model, output, export_dtype, trust_remote_code, reporter), as_text)


def export(
    run: Annotated[str, Argument(help="A run, its best/, or the folder of a model or an adapter.")],
    gguf: Annotated[Path, Option(help="The GGUF file to write; must not exist yet.")],
    quantization: Annotated[GgufPrecision, Option(help="Precision of the weight matrices.")] = "q8_0",
    llama_cpp: Annotated[
        Path | None, Option(help="Checkout of llama.cpp, with its converter. [default: an installed one]")
    ] = None,
    base_model: BaseModel = None,
) -> None:
    """Write a model as a GGUF file for llama.cpp and Ollama."""
    from dpo_cli.models.locate import find_model

    with _model_is_argument():
        find_model(run, base=base_model)
        reporter = out.reporter()
        from dpo_cli.hub.gguf import as_text
        from dpo_cli.hub.gguf import export as write

        out.show(write(run, gguf, quantization, llama_cpp, base_model, reporter), as_text)


def explain(options: ExplainOptions) -> None:
    """Show the tokens of one row, and which carry loss."""
    reporter = out.reporter(options)
    from dpo_cli.quality.explain import explain as run
    from dpo_cli.quality.explain import show

    result = run(options, reporter)
    if out.json:
        out.show(result)
    else:
        show(result)


def check(options: CheckOptions) -> None:
    """Report what is wrong with preference rows."""
    reporter = out.reporter(options)
    from dpo_cli.quality.check import as_text, run_check

    result = run_check(options, reporter)
    out.show(result, as_text)
    if not result["pairs"]:  # nothing that could be trained on
        raise Exit(2)
    refused = not options.fix and any(each["kind"] == "refused" for each in result["findings"])
    if refused or (options.strict and result["problems"]):
        raise Exit(3)


def losses(
    name: Annotated[str | None, Argument(metavar="NAME", help="One loss, with formula, paper and options.")] = None,
) -> None:
    """List the losses, or explain one."""
    from dpo_cli.losses.objective import as_lines, as_text, list_losses

    out.show(list_losses(name), as_text if name else as_lines)


def cache_list(cache_dir: CacheDir = CACHE_DIR) -> None:
    """Show what is cached: model, size and last use."""
    from dpo_cli.reference.manage import as_text, listed

    out.show(listed(cache_dir), as_text)


def cache_prune(
    cache_dir: CacheDir = CACHE_DIR,
    older_than: Annotated[float | None, Option(min=0, help="Not used for so many days.")] = None,
    model: Annotated[str | None, Option(help="Part of the model's name.")] = None,
    yes: Annotated[bool, Option("--yes", help="Remove them; without it they are only listed.")] = False,
) -> None:
    """Remove what is cached, by age or model."""
    if older_than is None and not model:
        raise UsageError("say what to remove: --older-than DAYS, --model NAME or both")
    reporter = out.reporter()
    from dpo_cli.reference.manage import as_text, as_text_of_pruned, prune, select

    entries = select(cache_dir, older_than, model)
    if entries and not yes:
        print(printable(as_text({"entries": [entry.shown() for entry in entries]})), file=sys.stderr)
        raise UsageError("nothing was removed: add --yes to remove these")
    out.show(prune(entries, reporter), as_text_of_pruned)


COMMANDS.update(  # in the order of use
    {
        "check": Command(check, CheckOptions),
        "explain": Command(explain, ExplainOptions),
        "train": Command(train, TrainOptions),
        "chat": Command(chat),
        "generate": Command(generate),
        "eval": Command(eval_, EvalOptions),
        "sweep": Command(sweep, SweepOptions),
        "init": Command(init),
        "losses": Command(losses),
        "precompute-ref": Command(precompute_ref, PrecomputeOptions),
        "cache": TyperGroup(
            commands={"list": Command(cache_list), "prune": Command(cache_prune)},
            no_args_is_help=True,
            rich_markup_mode=None,
            help="Manage cached reference log-probs.",
        ),
        "merge": Command(merge),
        "export": Command(export),
        "push": Command(push),
    }
)


def _train_summary(result: dict[str, Any], seconds: float) -> str:
    from dpo_cli.reporting.text import PER_PAIR, answer_lines, overlap_lines, verdict_lines

    lines = [*overlap_lines(result), *answer_lines(result.get("answers", ()))]
    if after := result.get("after", {}):
        lines.append(f"{'held out, ' + str(result['held_out']) + ' pairs':<24}{'before':>12}{'after':>12}")
        before = result["before"]
        lines += [f"  {name:<22}{before.get(name, float('nan')):>12.4f}{after[name]:>12.4f}" for name in PER_PAIR]
    shown = ("pairs", "steps", "run", "model", "report")
    lines += [f"{name:<11} {result[name]}" for name in shown if name in result]
    if "run" in result:
        took = timedelta(seconds=round(seconds))
        lines += ["", f"Trained on {plural(result['trained'], 'pair')}. This command took {took}."]
        lines += [*verdict_lines(result), f"Next: dpo chat {shlex.quote(result['run'])}"]
    return "\n".join(lines)
