"""Every option once: name, type, default, help and range."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from dpo_cli.config import checks
from dpo_cli.config.checks import Check, not_negative, one_of, positive, refused
from dpo_cli.losses.objective import Objective, parse_objective
from dpo_cli.losses.preference import LOSSES
from dpo_cli.utils.errors import UsageError, did_you_mean

CACHE_DIR = Path("~/.cache/dpo")
OF_A_RUN = "when a run is evaluated or checked, its own"
FORMATS = (
    *("strings", "messages", "conversations", "hh", "sharegpt"),
    *("alpaca", "orca", "ultrafeedback", "stackexchange", "ranked", "openai", "swift"),
)
KL = (
    "exact: compare the next-token distributions of both models (KL, entropies, shifted tokens), which runs both; "
    "none: compare only the log-probs of the responses."
)
BEST = {"loss": -1, "rewards/margins": 1, "rewards/accuracies": 1}  # metrics of --save-best: lower or higher is better


def option(default: Any, text: str, check: Check | None = None, shown: str | None = None) -> Any:
    """Make a field of an options class, whose help says what the check accepts; ``shown``: a default of run time."""
    if check and not (check.choices and all(choice in text for choice in check.choices)):
        text += f" {check.must[0].upper()}{check.must[1:]}."
    return field(default=default, metadata={"help": text, "check": check, "shown": shown})


@dataclass(frozen=True, init=False, repr=False, eq=False)
class DataOptions:
    """What every command needs: pairs, and the model whose tokenizer reads them."""

    model: str | None = option(None, "Hub id, folder, .gguf file, run or adapter.", shown="SmolLM2-135M-Instruct")
    base_model: str | None = option(None, "Base of the adapter in --model.", shown="what the adapter names")
    data: list[str] = option(
        MISSING,
        "Preference rows: .jsonl, .json, .parquet or .csv, also .gz; a folder of them; a saved data set or a "
        "hub id (ORG/NAME), with :SPLIT; - for JSON lines from stdin. Repeatable; with =SHARE each, as in a.jsonl=0.7 "
        "and b.jsonl=0.3, a mixture.",
    )
    columns: str | None = option(None, "Your columns, as prompt=…,chosen=…,rejected=…", shown="by the format")
    format: str | None = option(None, "Format of every row.", one_of(*FORMATS), shown="from each row's columns")
    max_length: int | None = option(
        None, "Longest prompt + response in tokens.", checks.at_least_16, shown=f"1024; {OF_A_RUN}"
    )
    control_tokens: str | None = option(
        None, "Rows with control tokens: keep or refuse.", one_of("keep", "refuse"), shown=f"keep; {OF_A_RUN}"
    )
    train_turns: str | None = option(
        None, "Answers to train: the last, or all that differ.", one_of("last", "all"), shown=f"last; {OF_A_RUN}"
    )
    pairs: str | None = option(
        None,
        "Pairs of a row with ranked answers: best-worst; adjacent: each answer against the next lower; all: against "
        "every lower one; ranking: adjacent without ties, which stay together, for --loss plackett_luce.",
        one_of("best-worst", "adjacent", "all", "ranking"),
        shown=f"best-worst, ranking for that loss; {OF_A_RUN}",
    )
    margin_per_score: float | None = option(
        None, "Margin of a pair per unit of the difference of its scores.", not_negative, shown=f"0: none; {OF_A_RUN}"
    )
    chat_template: Path | None = option(None, "Jinja file to use as the chat template.", shown="the model's")
    trust_remote_code: bool = option(False, "Run Python code from the model's repository.")

    def __init__(self, **values: Any) -> None:
        """Take options by name, with the default of those that are missing.

        Written by hand, like equality: generated methods of all classes would take a quarter of the time of --help.

        Raises:
            UsageError: naming every value out of its range, else every combination that is refused.
        """
        vars(self).update({f.name: values.pop(f.name, f.default) for f in fields(self)})
        if values:
            raise TypeError(f"{type(self).__name__} has no option {', '.join(values)}")
        if problems := out_of_range(type(self), vars(self)) or refused(self):
            raise UsageError("\n".join(problems))

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)


@dataclass(frozen=True, init=False, repr=False, eq=False)
class Options(DataOptions):
    """What every command needs that computes log-probs."""

    on_bad_row: str = option(
        "refuse", "refuse: stop and list the bad rows; skip: continue without them.", one_of("refuse", "skip")
    )
    max_tokens: int | None = option(
        None, "Tokens per packed forward: the memory knob.", checks.at_least_16, shown="from free memory"
    )
    dtype: str | None = option(None, "Compute precision.", checks.precision, shown="auto")
    device: str = option(
        "auto", "cuda, cuda:NUMBER, xpu, mps or cpu; auto: the first of them that torch can use.", checks.device
    )
    cache_dir: Path = option(CACHE_DIR, "Cached reference log-probs, converted GGUF models, temporary files.")


@dataclass(frozen=True, init=False, repr=False, eq=False)
class WeightsOptions(Options):
    """How the weights are kept, in training and in scoring for a training."""

    memory: str = option(
        "auto",
        "Weights, gradients and moments: full (float32, 16 bytes per parameter), split (bfloat16 and the low halves, "
        "moments in 8 bits: 8), in-backward (split, updated in the backward pass: 6), or auto (full, else split).",
        one_of("auto", "full", "split", "in-backward"),
    )
    fsdp: bool = option(False, "Shard parameters, gradients and optimizer state across processes (FSDP2).")
    load_in_4bit: bool = option(False, "Quantize the adapter's base to 4 bits (QLoRA, by bitsandbytes): CUDA only.")
    load_in_8bit: bool = option(False, "Quantize the adapter's base to 8 bits (by bitsandbytes): CUDA only.")

    @property
    def quantize(self) -> str | None:
        """``4bit`` or ``8bit``; None: the base is not quantized."""
        return "4bit" if self.load_in_4bit else "8bit" if self.load_in_8bit else None


@dataclass(frozen=True, init=False, repr=False, eq=False)
class SampleOptions(Options):
    """What every command needs that samples answers."""

    samples: int = option(0, "Answers sampled per prompt: KL of whole responses; both models' answers.", not_negative)
    sample_prompts: int = option(16, "Prompts answered for --samples, the first of the data.", positive)
    sample_tokens: int = option(128, "Longest sampled answer in tokens.", positive)


@dataclass(frozen=True, init=False, repr=False, eq=False)
class ExplainOptions(DataOptions):
    """`dpo explain`."""

    row: str | None = option(None, "Row number, or FILE:NUMBER if there are several files.", shown="the first")


@dataclass(frozen=True, init=False, repr=False, eq=False)
class TrainOptions(WeightsOptions):
    """`dpo train`."""

    eval_data: list[str] | None = option(None, "Held-out rows, scored before, during and after training.")
    eval_fraction: float = option(0.0, "Fraction of --data held out if there is no --eval-data.", checks.fraction)
    output: Path | None = option(None, "Run folder; must not exist yet.", shown="runs/<date>-<time>-<4 digits>")
    beta: float = option(0.1, "Strength of the pull towards the reference.", positive)
    loss: str = option(
        "sigmoid",
        f"Loss, explained by dpo losses: {', '.join(LOSSES)}. Several are added up by weight: sigmoid=1,sft=0.2.",
        checks.losses,
    )
    loss_options: str | None = option(None, "Options of a loss, as simpo_gamma=1.", shown="as in dpo losses")
    label_smoothing: float = option(0.0, "Share of labels assumed to be flipped (conservative DPO).", checks.below_half)
    router_aux_loss_coef: float = option(0.0, "Weight of the load-balancing loss of experts (aux_loss).", not_negative)
    f_divergence: str = option("reverse_kl", "Divergence that holds the policy to the reference.", checks.divergences)
    ld_alpha: float | None = option(
        None, "LD-DPO: weight of tokens beyond the shorter response's length.", checks.probability, shown="all count"
    )
    wpo: bool = option(False, "WPO: weight pairs by how likely their responses are under the policy.")
    epochs: int = option(1, "Passes over the pairs.", positive)
    max_steps: int | None = option(None, "Stop after this many optimizer steps.", positive, shown="all of the epochs")
    batch_size: int = option(
        16, "Pairs per optimizer step, over all devices; a ranking of K answers counts as its K - 1 pairs.", positive
    )
    lr: float = option(None, "Peak learning rate.", positive, shown="1e-6; 1e-5 for an adapter")
    lr_scheduler: str = option("linear", "Learning rate schedule.", one_of("linear", "cosine", "constant"))
    warmup_ratio: float = option(0.1, "Fraction of the steps in which the learning rate rises.", checks.fraction)
    min_lr: float = option(0.0, "Learning rate at which linear and cosine schedules end.", not_negative)
    adam_beta1: float = option(0.9, "AdamW: decay of the mean gradient per step.", checks.fraction)
    adam_beta2: float = option(0.999, "AdamW: decay of the mean squared gradient per step.", checks.fraction)
    weight_decay: float = option(0.0, "AdamW's weight decay, applied to matrices only.", not_negative)
    max_grad_norm: float = option(1.0, "Clip the gradient norm to this; 0 turns clipping off.", not_negative)
    ref_model: str | None = option(None, "Reference model; never in memory with the policy.", shown="--model")
    lora_rank: int | None = option(
        None, "Train a LoRA adapter of this rank instead of all weights, or continue that in --model.", positive
    )
    lora_type: str | None = option(None, "Kind of adapter.", one_of("lora", "rslora", "dora"), shown="lora")
    lora_alpha: int | None = option(None, "The adapter's scale times its rank.", positive, shown="2 * rank, rslora 16")
    lora_targets: str | None = option(
        None, "Modules to adapt, by the ends of their names.", checks.module_names, shown="all-linear"
    )
    modules_to_save: str | None = option(
        None, "Modules to train in full beside the adapter, by the ends of their names.", checks.module_names
    )
    export: str | None = option(
        None, "Write to model/ the adapter, or its base with it merged.", one_of("adapter", "merged"), shown="adapter"
    )
    export_dtype: str = option(
        "float32", "Precision of exported weights; auto: the start model's.", one_of("float32", "bfloat16", "auto")
    )
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass to save memory.")
    seed: int = option(
        0, "Seed of the order of the pairs, of --eval-fraction and of a mixture's draw.", checks.valid_seed
    )
    logging_steps: int = option(10, "Steps per log line if stderr is not a terminal; at least one per 30 s.", positive)
    eval_steps: int = option(0, "Steps between evaluations; 0: only before and after.", not_negative)
    kl: str = option("exact", KL, one_of("exact", "none"))
    save_best: str | None = option(
        None, "Keep the best evaluation's model in best/: by lowest loss, or highest of the others.", one_of(*BEST)
    )
    save_steps: int = option(100, "Steps between checkpoints; 0: only at the end.", not_negative)
    save_total_limit: int = option(2, "Checkpoints kept.", positive)
    report_to: str = option("none", "Experiment trackers that get the metrics too.", checks.trackers)
    show_answers: int | None = option(
        None, "Held-out prompts answered before and after training; 0: none.", not_negative, shown="3"
    )

    def __init__(self, **values: Any) -> None:
        if values.get("lr") is None:
            values["lr"] = 1e-5 if values.get("lora_rank") else 1e-6
        super().__init__(**values)

    @property
    def trackers(self) -> list[str]:
        """Names of the trackers, each once."""
        names = dict.fromkeys(name.strip() for name in self.report_to.split(","))
        return [] if list(names) == ["none"] else list(names)

    @property
    def objective(self) -> Objective:
        """The loss to minimise.

        Raises:
            UsageError: its options do not fit together.
        """
        names = ("beta", "label_smoothing", "f_divergence", "ld_alpha", "wpo")
        return parse_objective(self.loss, self.loss_options, **{name: getattr(self, name) for name in names})


@dataclass(frozen=True, init=False, repr=False, eq=False)
class PrecomputeOptions(WeightsOptions):
    """`dpo precompute-ref`."""

    seed: int = option(0, "Seed of a mixture's draw, as of the training.", checks.valid_seed)
    verify: int = option(0, "Recompute this many random cached pairs and show the largest difference.", not_negative)


@dataclass(frozen=True, init=False, repr=False, eq=False)
class EvalOptions(SampleOptions):
    """`dpo eval`."""

    model: list[str] | None = option(  # type: ignore[assignment]  # two are compared
        None,
        "Hub id, folder, .gguf file, run or checkpoint; twice: the second is compared with the first.",
        shown="SmolLM2-135M-Instruct",
    )
    ref_model: str | None = option(None, "Reference model.", shown="the run's, else the model itself")
    beta: float | None = option(None, "Scale of the implicit reward.", positive, shown="the run's, else 0.1")
    kl: str = option("exact", KL, one_of("exact", "none"))
    seed: int = option(0, "Seed of the samples, and of a mixture's draw.", checks.valid_seed)
    reward: str | None = option(
        None, "MODULE:FUNCTION that scores --samples: the share of the policy's answers that beat the reference's."
    )
    judge: str | None = option(
        None, "The same by a language model: an OpenAI-compatible address; the key is read from OPENAI_API_KEY."
    )
    judge_model: str | None = option(None, "Model of --judge.", shown="the only one there")
    gate: str | None = option(
        None, "Exit with code 3 unless these hold, as rewards/accuracies>=0.7,win_rate.share>0.5", checks.gates
    )
    per_pair: Path | None = option(None, "Write one JSON line per pair to this file.")
    report: Path | None = option(None, "Write the report, one HTML file, to this file.")


@dataclass(frozen=True, init=False, repr=False, eq=False)
class SweepOptions(SampleOptions, TrainOptions):
    """`dpo sweep`: options of its trainings, which differ in beta and lr alone, and of the evaluation after them."""

    beta: str | None = option(  # type: ignore[assignment]  # several
        None,
        "Strengths of the pull towards the reference: a training each.",
        checks.several,
        shown="0.03,0.1,0.3,1; 0.1 for several --lr",
    )
    lr: str = option(  # type: ignore[assignment]  # several
        None, "Peak learning rates: a training each, with each beta.", checks.several, shown="1e-6; 1e-5 for an adapter"
    )
    output: Path | None = option(None, "Folder of the runs; an existing sweep is resumed.", shown="runs/sweep")
    kl: str = option("exact", f"{KL} While training; the frontier's is always exact.", one_of("exact", "none"))

    def runs(self) -> list[TrainOptions]:
        """Return the options of each training, lowest beta and lr first, without its output folder."""
        common = {f.name: getattr(self, f.name) for f in fields(TrainOptions)} | {"output": None}
        rates = checks.numbers(self.lr)
        betas = checks.numbers(self.beta or ("0.1" if len(rates) > 1 else "0.03,0.1,0.3,1"))
        return [TrainOptions(**common | {"beta": beta, "lr": lr}) for beta in betas for lr in rates]


@dataclass(frozen=True, init=False, repr=False, eq=False)
class CheckOptions(DataOptions):
    """`dpo check`."""

    eval_data: list[str] | None = option(None, "Held-out rows, which are searched for rows of --data.")
    examples: int = option(3, "Rows shown per finding.", not_negative)
    seed: int = option(0, "Seed of a mixture's draw, as of the training.", checks.valid_seed)
    fix: Path | None = option(None, "Write the clean rows of --data to this new .jsonl file.")
    strict: bool = option(False, "Exit with code 3 for every problem, not for refused rows alone.")


def out_of_range(kind: type[DataOptions], values: Mapping[str, Any]) -> list[str]:
    """Name every value that its option's check refuses."""
    problems = []
    for f in fields(kind):
        value, check = values.get(f.name), f.metadata["check"]
        accepted = value is None or not check
        with suppress(ValueError):
            accepted = accepted or check.holds(value)
        if not accepted:
            wrong = [word for word in re.split("[,=]", str(value)) if word.strip() not in check.choices]
            near = did_you_mean(wrong[0].strip(), check.choices) if wrong else ""
            problems.append(f"--{f.name.replace('_', '-')} {value}: {check.must}{near}")
    return problems
