"""Every option once: name, type, default, help, check."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import reprlib
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args, get_type_hints

from dpo_cli.losses.objective import Objective, parse_objective
from dpo_cli.losses.preference import DIVERGENCES, LOSSES, divergence
from dpo_cli.utils.errors import UsageError, did_you_mean, name_beside

CACHE_DIR = Path("~/.cache/dpo")
FORMATS = (
    *("strings", "messages", "conversations", "hh", "sharegpt"),
    *("alpaca", "orca", "ultrafeedback", "stackexchange", "ranked", "openai", "swift"),
)

TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")
BEST = {"loss": -1, "rewards/margins": 1, "rewards/accuracies": 1}  # what a best model is kept by: lower or higher

# What other trainers call options.
ELSEWHERE = {"learning_rate": "lr", "num_train_epochs": "epochs", "per_device_train_batch_size": "batch_size"}
ELSEWHERE |= {"model_name_or_path": "model", "dataset_name": "data", "output_dir": "output", "lora_r": "lora_rank"}
ELSEWHERE |= {"lr_scheduler_type": "lr_scheduler", "max_seq_length": "max_length"}

_BRIEF = reprlib.Repr()
_BRIEF.maxlevel = 2


class Check(NamedTuple):
    """What a value must be, and that in words; of some options one of these ``choices``."""

    holds: Callable[[Any], bool]
    must: str
    choices: tuple[str, ...] = ()


positive = Check(lambda v: math.isfinite(v) and v > 0, "must be greater than 0")
not_negative = Check(lambda v: math.isfinite(v) and v >= 0, "must be 0 or greater")
share = Check(lambda v: 0 <= v < 1, "must be at least 0 and less than 1")
below_half = Check(lambda v: 0 <= v < 0.5, "must be at least 0 and less than 0.5")
seedlike = Check(lambda v: 0 <= v < 2**32, "must be at least 0 and less than 2^32")
share_or_all = Check(lambda v: 0 <= v <= 1, "must be at least 0 and at most 1")
at_least_16 = Check(lambda v: v >= 16, "must be at least 16 tokens")


def one_of(*values: str) -> Check:
    """Check that a value is one of these words."""
    return Check(lambda v: v in values, "must be one of: " + ", ".join(values), values)


def numbers(text: str) -> list[float]:
    """The numbers of a text that has commas between them, lowest first."""
    return sorted(float(part) for part in text.split(","))


def _are_betas(text: str) -> bool:
    try:
        found = numbers(text)
    except ValueError:
        return False
    return all(map(positive.holds, found)) and len({f"{beta:g}" for beta in found}) == len(found)


precision = Check(
    one_of("auto", "float32", "bfloat16").holds,
    "must be one of: auto, float32, bfloat16 (float16 overflows in training; models that are stored in it can be used)",
    ("auto", "float32", "bfloat16"),
)
repository = Check(
    lambda v: bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", v, re.ASCII)),
    "must be ORG/NAME, for example my-name/my-model",
)


def _is_divergence(text: str) -> bool:
    try:
        return bool(divergence(text))
    except ValueError:
        return False


divergences = Check(
    _is_divergence,
    f"must be one of: {', '.join(DIVERGENCES)}, the last also with =ALPHA",
    tuple(DIVERGENCES),
)
betas = Check(_are_betas, "must be different numbers greater than 0, with commas between")
module_names = Check(
    lambda v: all(re.fullmatch(r"[\w-]+(\.[\w-]+)*", name) for name in v.split(",")),
    "must be names of modules, with commas between, for example q_proj,v_proj",
)
import_path = Check(
    lambda v: bool(re.fullmatch(r"\w+(\.\w+)*:\w+", v)),
    "must be MODULE:FUNCTION, for example my_rewards:helpful",
)


def option(
    default: Any, text: str, check: Check | None = None, shown: str | None = None, choices: Sequence[str] = ()
) -> Any:
    """A field of an options class. ``shown`` words a default that is decided at run time.

    ``choices`` are words that a shell offers to complete a value; those of the check are by themselves.
    """
    metadata = {"help": text, "check": check, "shown": shown, "choices": choices or (check.choices if check else ())}
    return field(default=default, metadata=metadata)


def kl_option(more: str = "") -> Any:
    """Whether the whole next-token distributions of both models are compared, wherever pairs are evaluated."""
    text = (
        "exact: compare the whole next-token distributions of both models (KL, entropies, tokens that moved), which "
        "runs both; none: their log-probs of the responses alone."
    )
    return option("exact", f"{text} {more}".strip(), one_of("exact", "none"))


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """What every command needs: pairs, and the model whose tokenizer reads them."""

    model: str | None = option(
        None, "Hub id, local folder, .gguf file or run folder; or an adapter's folder.", shown="SmolLM2-135M-Instruct"
    )
    base_model: str | None = option(
        None,
        "Base of the adapter given by --model: hub id, folder or .gguf file.",
        shown="what the adapter names",
    )
    data: list[str] = option(
        MISSING,
        "Preference rows: .jsonl, .json, .parquet or .csv, also .gz or .zst; a folder of them; a folder or a hub id "
        "(ORG/NAME) of a data set, :SPLIT behind it; - for JSON lines from stdin. Repeatable.",
    )
    columns: str | None = option(
        None, "Names of your columns, as prompt=…,chosen=…,rejected=…", shown="prompt, chosen, rejected"
    )
    format: str | None = option(None, "Format of every row.", one_of(*FORMATS), shown="told by a row's columns")
    max_length: int | None = option(
        None, "Longest prompt + response in tokens.", at_least_16, shown="1024, or what the run was trained with"
    )
    control_tokens: str | None = option(
        None,
        "Control tokens of the template inside messages: keep them, sanitize (read as text) or refuse the row.",
        one_of("keep", "sanitize", "refuse"),
        shown="keep, or what the run was trained with",
    )
    train_turns: str | None = option(
        None,
        "Of answers with several turns train the last, or all that differ.",
        one_of("last", "all"),
        shown="last, or what the run was trained with",
    )
    chat_template: Path | None = option(None, "Jinja file to use as the chat template.", shown="the model's")
    trust_remote_code: bool = option(False, "Run Python code that the model's repository brings.")

    def __post_init__(self) -> None:
        if problems := _out_of_range(type(self), vars(self)):
            raise UsageError("\n".join(problems))


@dataclass(frozen=True, kw_only=True)
class Options(DataOptions):
    """What every command needs that computes: how log-probabilities are computed, and where they are kept."""

    on_bad_row: str = option(
        "refuse", "refuse: stop and list the bad rows; skip: go on without them.", one_of("refuse", "skip")
    )
    max_tokens: int | None = option(
        None, "Tokens in one packed forward: the memory knob.", at_least_16, shown="from free memory"
    )
    dtype: str | None = option(None, "Compute precision.", precision, shown="auto")
    cache_dir: Path = option(CACHE_DIR, "Where reference log-probs and tokenized pairs are kept.")
    compile: bool = option(False, "Compile the model's layers (torch.compile): slow to start, needs a C++ compiler.")


@dataclass(frozen=True, kw_only=True)
class WeightsOptions(Options):
    """How what trains, and what scores for a training to come, keeps its weights."""

    memory: str = option(
        "auto",
        "How weights, gradients and moments are kept: full (float32, 16 bytes a parameter), 8bit (moments, 10), split "
        "(bfloat16 and lower halves of float32 weights, 8), in-backward (split, updated in the backward pass, 6), "
        "offload (split, but what no forward reads is in the host's memory, 4), or auto: the first of full, split and "
        "8bit that fits.",
        one_of("auto", "full", "8bit", "split", "in-backward", "offload"),
    )
    fsdp: bool = option(False, "Shard weights, gradients and moments over the processes (FSDP2).")
    load_in_4bit: bool = option(False, "Quantize the adapter's base to 4 bits (QLoRA, by bitsandbytes): CUDA only.")
    load_in_8bit: bool = option(False, "Quantize the adapter's base to 8 bits (by bitsandbytes): CUDA only.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.load_in_4bit and self.load_in_8bit:
            raise UsageError("--load-in-4bit, --load-in-8bit: a base is quantized once; leave one out")

    @property
    def quantize(self) -> str | None:
        """``4bit`` or ``8bit``; None: the base is not quantized."""
        return "4bit" if self.load_in_4bit else "8bit" if self.load_in_8bit else None


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """What every command needs that lets a model answer by itself."""

    samples: int = option(
        0,
        "Responses drawn from the policy to each of some prompts: KL of whole responses; both models' answers.",
        not_negative,
    )
    sample_prompts: int = option(16, "Prompts that --samples answers, the first of the data.", positive)
    sample_tokens: int = option(128, "Longest sampled answer in tokens.", positive)


@dataclass(frozen=True, kw_only=True)
class ExplainOptions(DataOptions):
    """`dpo explain`."""

    row: str | None = option(
        None, "Number of the row as it is told behind its file's name; FILE:NUMBER of several files.", shown="the first"
    )


def _out_of_range(kind: type[DataOptions], values: Mapping[str, Any]) -> list[str]:
    problems = []
    for f in dataclasses.fields(kind):
        value, check = values.get(f.name), f.metadata["check"]
        if check and value is not None and not check.holds(value):
            near = did_you_mean(str(value), check.choices)
            problems.append(f"--{f.name.replace('_', '-')} {value}: {check.must}{near}")
    return problems


@dataclass(frozen=True, kw_only=True)
class TrainOptions(WeightsOptions):
    """`dpo train`."""

    eval_data: list[str] | None = option(None, "Held-out rows, scored before, during and after training.")
    eval_fraction: float = option(0.0, "Share of --data held out when there is no --eval-data.", share)
    output: Path | None = option(None, "Run folder; must not exist yet.", shown="runs/<date>-<time>")
    beta: float = option(0.1, "Strength of the pull towards the reference.", positive)
    loss: str = option(
        "sigmoid",
        f"What is minimised; dpo losses says which when: {', '.join(LOSSES)}. Several are added up by weight, as in "
        "sigmoid=1,sft=0.2.",
        choices=tuple(LOSSES),
    )
    loss_options: str | None = option(
        None, "Options that a loss has of its own, as in simpo_gamma=1; dpo losses names them.", shown="the papers'"
    )
    label_smoothing: float = option(0.0, "Share of labels taken to be flipped (conservative DPO).", below_half)
    router_aux_loss_coef: float = option(
        0.0,
        "Weight of the load-balancing loss of a mixture of experts, which is reported as aux_loss beside the loss.",
        not_negative,
    )
    f_divergence: str = option(
        "reverse_kl",
        f"What holds the policy to the reference: {', '.join(DIVERGENCES)} (=0.5, its alpha).",
        divergences,
    )
    ld_alpha: float | None = option(
        None, "LD-DPO: weight of the tokens beyond the length of the shorter response.", share_or_all, shown="all count"
    )
    wpo: bool = option(False, "WPO: weight pairs by how likely the policy itself finds their responses.")
    epochs: int = option(1, "Passes over the pairs.", positive)
    max_steps: int | None = option(None, "Stop after this many optimizer steps.", positive, shown="all of the epochs")
    batch_size: int = option(16, "Pairs per optimizer step, over all devices.", positive)
    lr: float = option(None, "Peak learning rate.", positive, shown="1e-6, of an adapter 1e-5")
    lr_scheduler: str = option("linear", "Course of the learning rate.", one_of("linear", "cosine", "constant"))
    warmup_ratio: float = option(0.1, "Share of the steps in which the learning rate rises.", share)
    weight_decay: float = option(0.0, "AdamW's, on matrices only.", not_negative)
    max_grad_norm: float = option(1.0, "Gradient norm is clipped to this; 0 turns clipping off.", not_negative)
    ref_model: str | None = option(
        None, "Reference model: scored first, and never in memory beside the policy.", shown="--model"
    )
    lora_rank: int | None = option(
        None,
        "Train a LoRA adapter of this rank instead of all weights; of an adapter's folder in --model that adapter, if "
        "it has this rank.",
        positive,
    )
    lora_type: str | None = option(
        None,
        "lora (arXiv 2106.09685), rslora (scaled by the root of the rank, 2312.03732) or dora (with a magnitude a row, "
        "2402.09353).",
        one_of("lora", "rslora", "dora"),
        shown="lora",
    )
    lora_alpha: int | None = option(None, "The adapter's scale times its rank.", positive, shown="2 * rank, rslora 16")
    lora_targets: str | None = option(
        None,
        "Modules that get an adapter, by the end of their names and with commas between; all-linear: all but the head.",
        module_names,
        shown="all-linear",
    )
    modules_to_save: str | None = option(
        None,
        "Modules trained whole beside the adapter, by the end of their names and with commas between.",
        module_names,
    )
    export: str | None = option(
        None,
        "What of a trained adapter goes to model/: the adapter, or the base with it merged.",
        one_of("adapter", "merged"),
        shown="adapter",
    )
    export_dtype: str = option(
        "float32",
        "Precision of the weights in model/ and best/; auto: that in which the start model is stored.",
        one_of("float32", "bfloat16", "auto"),
    )
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass to save memory.")
    seed: int = option(0, "Seed of the order of the pairs.", seedlike)
    logging_steps: int = option(
        10, "Steps between lines on what is no terminal; 30 s without one bring one, too.", positive
    )
    eval_steps: int = option(0, "Steps between evaluations; 0: only before and after.", not_negative)
    kl: str = kl_option()
    save_best: str | None = option(
        None,
        "Keep the model of the best evaluation in best/, by the lowest loss, or the highest of the others.",
        one_of(*BEST),
    )
    save_steps: int = option(100, "Steps between checkpoints; 0: only at the end.", not_negative)
    save_total_limit: int = option(2, "Checkpoints kept.", positive)
    report_to: str = option(
        "none", f"Tell what metrics.jsonl gets to experiment trackers too: {', '.join(TRACKERS)}, with commas between."
    )
    show_answers: int = option(0, "Held-out prompts answered before and after training.", not_negative)
    push_to_hub: str | None = option(
        None,
        "ORG/NAME: upload the trained model to the Hugging Face hub, into a private repository.",
        repository,
        shown="nothing is uploaded",
    )

    def __post_init__(self) -> None:
        if self.lr is None:
            object.__setattr__(self, "lr", 1e-5 if self.lora_rank else 1e-6)
        super().__post_init__()
        _check_trackers(self.trackers)
        objective = self.objective  # refused where its options do not fit together
        if self.ref_model is not None and not objective.reference:
            raise UsageError(f"--ref-model {self.ref_model}: --loss {self.loss} reads no reference; leave it out")
        if self.fsdp and (self.lora_rank or self.ref_model):
            raise UsageError(
                "--fsdp: shards a model that is trained whole; with --lora-rank or --ref-model each process has "
                "its own copy of the model: leave it out"
            )
        if self.lora_rank is None:
            _refuse_without_adapter(self)
        elif self.memory not in ("auto", "full", "8bit"):
            raise UsageError(
                f"--memory {self.memory}: an adapter's weights are few and stay float32, its base is not trained and "
                "takes 2 bytes a parameter on CUDA anyway; use full or 8bit"
            )
        elif self.export_dtype != "float32" and self.export != "merged":
            raise UsageError(
                f"--export-dtype {self.export_dtype}: an adapter is written in float32, in which it is trained; with "
                "--export merged the whole model can be in another"
            )
        elif self.quantize and self.export == "merged":
            raise UsageError(
                f"--export merged: a base in {self.quantize} cannot take up an adapter exactly; export the adapter, "
                "and merge it into the unquantized base with dpo merge"
            )
        elif self.quantize and self.lora_type == "dora":
            raise UsageError(
                "--lora-type dora: its norms would be computed in bfloat16 over a quantized base; use lora or rslora"
            )

    @property
    def trackers(self) -> list[str]:
        """Names of the trackers, each once."""
        names = dict.fromkeys(name.strip() for name in self.report_to.split(","))
        return [] if list(names) == ["none"] else list(names)

    @property
    def objective(self) -> Objective:
        """What is minimised."""
        names = ("beta", "label_smoothing", "f_divergence", "ld_alpha", "wpo")
        return parse_objective(self.loss, self.loss_options, **{name: getattr(self, name) for name in names})


@dataclass(frozen=True, kw_only=True)
class PrecomputeOptions(WeightsOptions):
    """`dpo precompute-ref`."""

    verify: int = option(0, "Recompute this many random cached pairs and show the largest difference.", not_negative)


@dataclass(frozen=True, kw_only=True)
class EvalOptions(SampleOptions, Options):
    """`dpo eval`."""

    model: list[str] | None = option(  # type: ignore[assignment]  # two are compared
        None,
        "Hub id, local folder, .gguf file, run folder or a run's checkpoint; twice: the second against the first.",
        shown="SmolLM2-135M-Instruct",
    )
    ref_model: str | None = option(
        None, "Reference model.", shown="what the run was trained from, else the model itself"
    )
    beta: float | None = option(None, "Scale of the implicit reward.", positive, shown="the run's, else 0.1")
    kl: str = kl_option()
    seed: int = option(0, "Seed of the samples and of the intervals.", seedlike)
    per_pair: Path | None = option(None, "Write one JSON line a pair to this file.")
    report: Path | None = option(None, "Write the report, one HTML file, to this file.")


@dataclass(frozen=True, kw_only=True)
class SweepOptions(SampleOptions, TrainOptions):
    """`dpo sweep`: those of each of its trainings, which differ in beta alone, and those of the evaluation after it."""

    beta: str = option(  # type: ignore[assignment]  # several
        "0.03,0.1,0.3,1", "Strengths of the pull towards the reference, with commas between: a training each.", betas
    )
    output: Path | None = option(
        None,
        "Folder of the runs and of what is drawn from them; of one that is there, the sweep goes on.",
        shown="runs/sweep-<hash of the options>",
    )
    kl: str = kl_option("While training; the frontier's is always exact.")
    reward: str | None = option(
        None,
        "MODULE:FUNCTION, in the current folder or installed: of lists of prompts and of answers (texts), it returns a "
        "number for each. Judges what --samples draws.",
        import_path,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.eval_data:
            raise UsageError("--eval-data is missing: a sweep compares its runs on held-out rows")
        if self.eval_fraction:
            raise UsageError("--eval-fraction: a sweep compares its runs on --eval-data; leave it out")
        if self.push_to_hub:
            raise UsageError(f"--push-to-hub {self.push_to_hub}: a sweep trains several models; dpo push uploads one")
        if not self.objective.uses("beta"):
            raise UsageError(f"--loss {self.loss}: reads no beta, so there is nothing to compare")
        if self.reward and not self.samples:
            raise UsageError(f"--reward {self.reward}: it judges sampled answers; add --samples, for example 4")

    def runs(self) -> list[TrainOptions]:
        """The options of each training, lowest beta first, but for where it goes."""
        common = {f.name: getattr(self, f.name) for f in dataclasses.fields(TrainOptions)}
        return [TrainOptions(**common | {"beta": beta, "output": None}) for beta in numbers(self.beta)]


@dataclass(frozen=True, kw_only=True)
class CheckOptions(DataOptions):
    """`dpo check`."""

    eval_data: list[str] | None = option(None, "Held-out rows: checked too, and for what --data has of them.")
    max_tokens: int | None = option(
        None, "Tokens in one packed forward, for the budget.", at_least_16, shown="2048, with CUDA 32768"
    )
    batch_size: int = option(16, "Pairs per optimizer step, for the budget.", positive)
    epochs: int = option(1, "Passes over the pairs, for the budget.", positive)
    examples: int = option(3, "Rows shown of each finding.", not_negative)
    fix: Path | None = option(None, "Write the rows of --data that are clean to this new .jsonl file.")
    strict: bool = option(False, "Exit with code 3 if there is a problem.")


def _check_trackers(names: list[str]) -> None:
    if unknown := [name for name in names if name not in TRACKERS]:
        known, meant = ", ".join(TRACKERS), did_you_mean(unknown[0].lower(), TRACKERS)
        raise UsageError(
            f"--report-to {unknown[0]}: must be one or more of {known}, with commas between, or none{meant}"
        )


def _refuse_without_adapter(options: TrainOptions) -> None:
    names = ("lora_type", "lora_alpha", "lora_targets", "modules_to_save", "load_in_4bit", "load_in_8bit", "export")
    if given := [name for name in names if getattr(options, name) not in (None, False)]:
        flags = ", ".join(" ".join(_as_flag(name, getattr(options, name))) for name in given)
        raise UsageError(f"{flags}: no adapter is trained; add --lora-rank, for example 16, or leave it out")


# Options that do not change what is trained: a resumed run may have others than it began with.
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
# Options that a run settles by itself where they are left open: by its model, its data, the memory that is free.
AUTO_OPTIONS = frozenset(
    {"max_length", "control_tokens", "train_turns", "max_tokens", "dtype", "memory", "gradient_checkpointing"}
    | {"lora_type", "lora_alpha", "lora_targets", "modules_to_save"}
)

# Options that a file may also have as a mapping.
BY_NAME = frozenset({"loss", "loss_options"})

T = TypeVar("T", bound=DataOptions)


def meant_option(name: str, known: Iterable[str]) -> str:
    """The end of a message about an option that there is not; what other trainers call it is known, too."""
    names = set(known)
    return did_you_mean(name, names, {theirs: ours for theirs, ours in ELSEWHERE.items() if ours in names})


def resolve(kind: type[T], flags: Mapping[str, Any], file: Path | None = None) -> T:
    """Merge flags over the YAML file over the defaults, and check the result.

    Raises:
        UsageError: naming every unknown key, value of a wrong type, failed check or missing option.
    """
    values, problems = _from_yaml(kind, file) if file else ({}, [])
    values |= {name: value for name, value in flags.items() if value is not None}
    problems += _out_of_range(kind, values)
    if not values.get("data"):
        problems.append("--data is missing: name a file of preference pairs, for example --data pairs.jsonl")
    if problems:
        raise UsageError("\n".join(problems))
    return kind(**values)


def from_keywords(kind: type[DataOptions], given: Mapping[str, Any], others: Iterable[str] = ()) -> dict[str, Any]:
    """Values that Python code gives, as flags for ``resolve``; what is None stays open.

    A path may be a ``Path``. ``others`` are the words beside the options that may have been meant.

    Raises:
        UsageError: naming every word that is no option, and every value that an option cannot have.
    """
    types = get_type_hints(kind)
    flags, problems = {}, []
    for name, value in given.items():
        if name not in types:
            problems.append(f"unknown option '{name}'{meant_option(name, [*types, *others])}")
        elif value is not None:
            try:
                several = isinstance(value, (list, tuple))
                plain = [_path_name(each) for each in value] if several else _path_name(value)
                flags[name] = _convert(_by_name(name, plain), types[name])
            except (TypeError, ValueError, OverflowError):
                problems.append(f"option '{name}' cannot be {_BRIEF.repr(value)}")
    if problems:
        raise UsageError("\n".join(problems))
    return flags


def _path_name(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def resolve_training(flags: Mapping[str, Any], resume: Path | None, file: Path | None = None) -> TrainOptions:
    """The options of a new run, or of one to go on with, whose own folder ``--output`` may name again.

    Raises:
        UsageError: they cannot be used.
    """
    if not resume:
        return resolve(TrainOptions, flags, file)
    if file:
        raise UsageError(f"--resume {resume}: a resumed run keeps its own options; leave out --config")
    return resolve_resumed({**flags, "output": None} if flags.get("output") == resume else flags, resume)


def resolve_resumed(flags: Mapping[str, Any], folder: Path) -> TrainOptions:
    """The options that a run began with; flags may change only what does not change the training.

    Raises:
        UsageError: the folder is no run, or a flag asks for another training.
    """
    file = folder / "config.yaml"
    for name in ("config.yaml", "manifest.json"):
        if not (folder / name).is_file():
            raise UsageError(f"--resume {folder}: no run there ({name} is missing){name_beside(folder)}")
    began = resolve(TrainOptions, {}, file)
    if began.memory == "auto":  # the run is older than the option
        began, flags = dataclasses.replace(began, memory="full"), {**flags, "memory": flags.get("memory") or "full"}
    options = resolve(TrainOptions, flags, file)
    if changed := differences(began, options):
        raise UsageError(f"--resume {folder}: cannot change {', '.join(changed)}. {_instead(folder, began, options)}")
    return options


def _instead(folder: Path, began: TrainOptions, options: TrainOptions) -> str:
    """The command that trains with other options than a run began with, and the reference that it has."""
    changed = {name: getattr(options, name) for name in _changed(began, options)}
    further = (folder / "model").is_dir() and "model" not in changed
    for name in ("epochs", "max_steps") if further else ():
        if (changed.get(name) or 0) > (before := getattr(began, name) or 0):
            changed[name] -= before
    flags = {"config": folder / "config.yaml", **({"model": folder} if further else {})}
    flags |= {"output": folder.with_name(f"{folder.name}-2"), **changed}
    command = shlex.join(["dpo", "train", *(word for name, value in flags.items() for word in _as_flag(name, value))])
    if not further:
        return f"A new run can: {command}"
    if began.ref_model or "ref_model" in changed or not began.objective.reference:
        return f"To train its model further: {command}"
    old = f"--ref-model {shlex.quote(began.model)}" if began.model else "--ref-model with the model that it began with"
    return f"To train its model further: {command}; the reference is then that model, or the run's own with {old}"


def _as_flag(name: str, value: Any) -> list[str]:
    """An option with its value, or its values, as words of a command."""
    flag, values = f"--{name.replace('_', '-')}", value if isinstance(value, list) else [value]
    return (
        [f"--{'' if value else 'no-'}{flag[2:]}"]
        if isinstance(value, bool)
        else [w for v in values for w in (flag, str(v))]
    )


def differences(began: TrainOptions, options: TrainOptions) -> list[str]:
    """What another training is asked for by, option by option, than the one that a run began with."""
    return [
        f"--{name.replace('_', '-')} {getattr(options, name)} (it began with {getattr(began, name)})"
        for name in _changed(began, options)
    ]


def _changed(began: TrainOptions, options: TrainOptions) -> list[str]:
    """Names of the options by which another training is asked for."""
    names = [f.name for f in dataclasses.fields(TrainOptions) if f.name not in RESUME_MUTABLE]
    return [name for name in names if getattr(options, name) != getattr(began, name)]


def inherit_auto_options(options: TrainOptions, began: TrainOptions) -> TrainOptions:
    """The options with what another run settled, where they leave that open."""
    left_open = {name for name in AUTO_OPTIONS if getattr(options, name) in (None, "auto", False)}
    return dataclasses.replace(options, **{name: getattr(began, name) for name in left_open})


def to_yaml(options: DataOptions) -> str:
    """All options as a YAML file that ``resolve`` reads back, but for what each run is to be told anew."""
    import yaml

    anew = ("output", "trust_remote_code", "push_to_hub")
    told = {k: v for k, v in dataclasses.asdict(options).items() if k not in anew}
    plain = {k: str(v) if isinstance(v, Path) else v for k, v in told.items()}
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def _from_yaml(kind: type[DataOptions], file: Path) -> tuple[dict[str, Any], list[str]]:
    """The file's values under the options' names, and what is wrong with the others."""
    import yaml

    try:
        loader = yaml.SafeLoader(file.read_text(encoding="utf-8"))
        node = loader.get_single_node()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {file}: cannot be read ({error}){name_beside(file)}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise UsageError(f"--config {file}: not valid YAML\n{error}") from error
    if node is None:
        return {}, []
    if not isinstance(node, yaml.MappingNode):
        raise UsageError(f"--config {file}: must be a mapping of option names to values")
    types = get_type_hints(kind)
    left_open = {f.name for f in dataclasses.fields(kind) if f.default in (None, MISSING)}
    values: dict[str, Any] = {}
    problems = []
    for key_node, value_node in node.value:
        key, where = str(key_node.value), f"{file}:{key_node.start_mark.line + 1}"
        name = key.replace("-", "_")
        if name not in types:
            problems.append(f"{where}: unknown option '{key}'{meant_option(name, types)}")
            continue
        if name in values:
            problems.append(f"{where}: option '{key}' is given twice")
            continue
        value = value_node.value
        values[name] = None
        try:
            value = loader.construct_object(value_node, deep=True)
            values[name] = None if value is None and name in left_open else _convert(_by_name(name, value), types[name])
        except (TypeError, ValueError, OverflowError, yaml.YAMLError):
            problems.append(f"{where}: option '{key}' cannot be {_BRIEF.repr(value)}")
    return {name: value for name, value in values.items() if value is not None}, problems


def _by_name(name: str, value: Any) -> Any:
    """What a flag has of an option that may also be given as a mapping."""
    if name in BY_NAME and isinstance(value, dict):
        return ",".join(f"{key}={number}" for key, number in value.items())
    return value


def _convert(value: Any, type_: Any) -> Any:
    """A YAML value as the option's type. YAML reads ``1e-6`` as a string; here it is a number.

    Raises:
        TypeError, ValueError, OverflowError: it is none.
    """
    kinds = get_args(type_) or (type_,)
    kind = list if type_ == list[str] else next(kind for kind in kinds if kind is not type(None))
    if kind is str and isinstance(value, list):
        value = _joined(value)
    if kind is list or kind == list[str]:
        items = value if isinstance(value, list) else [value]
        if all(isinstance(item, str) for item in items):
            return items
    elif isinstance(value, bool) or kind is bool:
        if isinstance(value, bool) and kind is bool:
            return value
    elif kind is int:
        if float(value) == int(float(value)):
            return int(float(value))
    elif kind is float or isinstance(value, (str, int, float)):
        return kind(value) if kind is float else kind(str(value))
    raise TypeError


def _joined(items: list[Any]) -> str:
    """Numbers as a flag has them: with commas between."""
    if not items or any(isinstance(item, bool) or not math.isfinite(float(item)) for item in items):
        raise TypeError
    return ",".join(map(str, items))
