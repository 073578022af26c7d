"""Options: a flag over the file over the default, every problem, a file that repeats the run, the file of dpo init."""

from __future__ import annotations

import dataclasses
import json
import math
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_cli.cli.help import PANEL_OF
from dpo_cli.config.options import Check, EvalOptions, Options, PrecomputeOptions, TrainOptions, option
from dpo_cli.config.resolve import RESUME_MUTABLE, WIDTH, as_words, resolve, resolve_training, to_yaml, write_config
from dpo_cli.utils.errors import UsageError
from tests.helpers import Cli

DATA = {"data": ["pairs.jsonl"]}
KINDS = [TrainOptions, PrecomputeOptions, EvalOptions]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "run.yaml"


def from_file(file: Path, text: str, **flags: Any) -> TrainOptions:
    file.write_text(text, encoding="utf-8")
    return resolve(TrainOptions, DATA | flags, file)


def problems(file: Path, text: str, **flags: Any) -> list[str]:
    with pytest.raises(UsageError) as caught:
        from_file(file, text, **flags)
    return str(caught.value).replace(str(file), "FILE").splitlines()


# ---- flag over file over default --------------------------------------------------------------------------------


def test_defaults() -> None:
    options = resolve(TrainOptions, DATA)
    assert options == TrainOptions(data=["pairs.jsonl"])
    assert (options.beta, options.lr, options.epochs, options.model) == (0.1, 1e-6, 1, None)


def test_a_flag_wins_over_the_file_and_the_file_over_the_default(file: Path) -> None:
    options = from_file(file, "beta: 0.5\nepochs: 3\ngradient_checkpointing: true\n", beta=0.2, lr=None)
    assert (options.beta, options.epochs, options.lr, options.gradient_checkpointing) == (0.2, 3, 1e-6, True)
    assert not from_file(file, "gradient_checkpointing: true", gradient_checkpointing=False).gradient_checkpointing
    assert from_file(file, "data: [a.jsonl, b.jsonl]").data == ["pairs.jsonl"]
    assert from_file(file, "data: [a.jsonl, b.jsonl]", data=None).data == ["a.jsonl", "b.jsonl"]


def test_an_empty_file_gives_the_defaults(file: Path) -> None:
    for text in ("", "# nothing\n", "{}"):
        assert from_file(file, text) == TrainOptions(**DATA)


def test_null_in_the_file_is_the_default_of_an_option_that_may_be_absent(file: Path) -> None:
    assert from_file(file, "model: null\nmax_steps:\neval_data: ~\n") == TrainOptions(**DATA)


def test_dashes_and_underscores_are_the_same(file: Path) -> None:
    assert from_file(file, "max-length: 64\nbatch_size: 2\n") == TrainOptions(**DATA, max_length=64, batch_size=2)


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        ("lr: 1e-6", "lr", 1e-6),
        ("lr: 5e-7", "lr", 5e-7),
        ("lr: 5E-7", "lr", 5e-7),
        ("lr: '2e-5'", "lr", 2e-5),
        ("lr: 1", "lr", 1.0),
        ("beta: .5", "beta", 0.5),
        ("max_steps: 1e3", "max_steps", 1000),
        ("epochs: 2.0", "epochs", 2),
        ("epochs: '2'", "epochs", 2),
        ("seed: 4294967295", "seed", 2**32 - 1),
        ("gradient_checkpointing: yes", "gradient_checkpointing", True),
        ("model: 1234", "model", "1234"),
        ("model: 1e5", "model", "1e5"),
        ("model: org/name", "model", "org/name"),
        ("data: one.jsonl", "data", ["one.jsonl"]),
        ("data: [one.jsonl, two.csv]", "data", ["one.jsonl", "two.csv"]),
        ("data:\n- one.jsonl\n- two.csv", "data", ["one.jsonl", "two.csv"]),
        ("eval_data: held.jsonl", "eval_data", ["held.jsonl"]),
        ("output: runs/a", "output", Path("runs/a")),
        ("cache_dir: /tmp/x", "cache_dir", Path("/tmp/x")),
        ("columns: prompt=q", "columns", "prompt=q"),
        ("columns: {prompt: q, chosen: a}", "columns", "prompt=q,chosen=a"),
        ("report_to: [wandb, mlflow]", "report_to", "wandb,mlflow"),
    ],
)
def test_a_value_in_the_file_gets_the_option_s_type(text: str, name: str, expected: Any, file: Path) -> None:
    value = getattr(from_file(file, text, data=None if name == "data" else ["pairs.jsonl"]), name)
    assert value == expected and type(value) is type(expected)


# ---- problems ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("bta: 1", "unknown option 'bta'; did you mean 'beta'?"),
        ("learning-rat: 1", "unknown option 'learning-rat'; did you mean 'lr'?"),
        ("max_len: 64", "unknown option 'max_len'; did you mean 'max_length'?"),
        ("batch-sise: 1", "unknown option 'batch-sise'; did you mean 'batch_size'?"),
        ("xyz: 1", "unknown option 'xyz'"),
        ("config: other.yaml", "unknown option 'config'"),
        ("1: 2", "unknown option '1'"),
        ("beta: high", "option 'beta' cannot be 'high'"),
        ("beta: true", "option 'beta' cannot be True"),
        ("beta: [0.1]", "option 'beta' cannot be [0.1]"),
        ("beta: {a: 1}", "option 'beta' cannot be {'a': 1}"),
        ("beta: null", "option 'beta' cannot be None"),
        ("epochs: 1.5", "option 'epochs' cannot be 1.5"),
        ("epochs: .nan", "option 'epochs' cannot be nan"),
        ("epochs: .inf", "option 'epochs' cannot be inf"),
        ("seed: 1e400", "option 'seed' cannot be '1e400'"),
        ("epochs: yes", "option 'epochs' cannot be True"),
        ("gradient_checkpointing: 1", "option 'gradient_checkpointing' cannot be 1"),
        ("gradient_checkpointing: 'yes'", "option 'gradient_checkpointing' cannot be 'yes'"),
        ("model: []", "option 'model' cannot be []"),
        ("model: true", "option 'model' cannot be True"),
        ("data: [1]", "option 'data' cannot be [1]"),
        ("data: {a: b}", "option 'data' cannot be {'a': 'b'}"),
        ("output: {}", "option 'output' cannot be {}"),
        ("cache_dir: null", "option 'cache_dir' cannot be None"),
        ("lr_scheduler: null", "option 'lr_scheduler' cannot be None"),
    ],
)
def test_a_wrong_key_or_value_in_the_file_is_told_with_its_line(text: str, told: str, file: Path) -> None:
    [line] = problems(file, f"# a comment\n\n{text}\n")
    assert line.startswith(f"FILE:3: {told}")
    assert ("did you mean" in line) == ("did you mean" in told)


@pytest.mark.parametrize(
    "text",
    [
        "lr: !rate 3",
        "beta: !!python/object/apply:os.getcwd []",
        "seed: !!int abc",
        "model: 2024-13-45",
        "lr: !!float x",
        'seed: !!int ""',
        "seed: !!bool x",
    ],
)
def test_a_value_that_yaml_cannot_make_is_refused(text: str, file: Path) -> None:
    [line] = problems(file, f"epochs: 2\n{text}\n")
    assert line.startswith(f"FILE:2: option '{text.partition(':')[0]}'")


def test_a_key_that_is_given_twice_is_refused(file: Path) -> None:
    told = problems(file, "beta: 0.1\nmax-length: 64\nmax_length: 128\nbeta: 0.2\n")
    assert told == ["FILE:3: option 'max_length' is given twice", "FILE:4: option 'beta' is given twice"]


@pytest.mark.parametrize("text", ["- beta", "beta", "[1, 2]", "3"])
def test_a_file_that_is_no_mapping_is_refused(text: str, file: Path) -> None:
    assert problems(file, text) == ["--config FILE: must be a mapping of option names to values"]


@pytest.mark.parametrize("text", ["beta: 1: 2", "beta: [", "\tbeta: 1", "a: 1\n---\nb: 1", "beta: *x", "beta: \x01"])
def test_a_file_that_is_no_yaml_is_refused(text: str, file: Path) -> None:
    assert problems(file, text)[0] == "--config FILE: not valid YAML"


def test_a_file_that_is_nested_too_deeply_is_refused(file: Path) -> None:
    assert "FILE" in problems(file, "data: " + "[" * 5000 + "]" * 5000)[0]


def test_a_file_that_cannot_be_read_is_refused(file: Path, tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(UsageError, match="cannot be read"):
            resolve(TrainOptions, DATA, path)
    file.write_bytes(b"beta: \xff")
    with pytest.raises(UsageError, match="cannot be read"):
        resolve(TrainOptions, DATA, file)


def test_data_must_be_named(file: Path) -> None:
    for flags in ({}, {"data": None}, {"data": []}):
        with pytest.raises(UsageError, match="--data is missing"):
            resolve(TrainOptions, flags)
    assert problems(file, "data: []", data=None) == problems(file, "", data=None)


def test_all_problems_are_told_in_one_error(file: Path) -> None:
    text = "bta: 1\nepochs: many\nlr: -1\nseed: 1\nseed: 2\nlr_scheduler: steep\n"
    told = "\n".join(problems(file, text, data=None, batch_size=0))
    for each in (
        "FILE:1: unknown option 'bta'",
        "FILE:2: option 'epochs'",
        "--lr -1.0: ",
        "FILE:5: option 'seed' is given twice",
        "--lr-scheduler steep: ",
        "--batch-size 0: ",
        "--data is missing",
    ):
        assert each in told


def test_all_values_out_of_range_are_told(file: Path) -> None:
    assert problems(file, "lr: 0\nsave_total_limit: 0\n", beta=-1.0) == [
        "--beta -1.0: must be greater than 0",
        "--lr 0.0: must be greater than 0",
        "--save-total-limit 0: must be greater than 0",
    ]


def test_an_option_of_another_command_is_unknown(file: Path) -> None:
    file.write_text("lr: 1e-6\n")
    with pytest.raises(UsageError, match="unknown option 'lr'"):
        resolve(EvalOptions, DATA, file)


# ---- ranges -----------------------------------------------------------------------------------------------------

POSITIVE = ([1, 5], [0, -1])
REAL_POSITIVE = ([1e-12, 3.5, 1e30], [0.0, -0.1, math.inf, math.nan])
NOT_NEGATIVE = ([0, 7], [-1])
SHARE = ([0.0, 0.5, 0.999], [-0.01, 1.0, 1.5, math.inf, math.nan])
TOKENS = ([16, 17, 100_000], [15, 3, 0, -16])
# option: (values it takes, values it refuses); every option that has a check is here
RANGES: dict[str, tuple[list[Any], list[Any]]] = {
    "on_bad_row": (["refuse", "skip"], ["Skip", "", "ignore"]),
    "control_tokens": (["keep", "refuse"], ["Keep", "", "drop"]),
    "train_turns": (["last", "all"], ["first", ""]),
    "pairs": (["best-worst", "adjacent", "all", "ranking"], ["best", "", "All"]),
    "margin_per_score": ([0.0, 0.5], [-0.1, math.inf, math.nan]),
    "format": (["strings", "hh", "ranked"], ["HH", "", "parquet"]),
    "max_length": TOKENS,
    "max_tokens": TOKENS,
    "dtype": (["auto", "float32", "bfloat16"], ["float16", "fp32", ""]),
    "eval_fraction": SHARE,
    "beta": REAL_POSITIVE,
    "loss": (["sigmoid", "ipo=2,sft=0.2"], ["apo-zero", "sigmoid,xyz", "", "sigmoid,"]),
    "label_smoothing": ([0.0, 0.1, 0.499], [-0.1, 0.5, 0.6, math.nan]),
    "router_aux_loss_coef": ([0.0, 0.001], [-0.1, math.inf, math.nan]),
    "f_divergence": (
        ["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence", "alpha_divergence=0.3"],
        ["KL", "", "js_divergence=1", "alpha_divergence=", "alpha_divergence=x", "alpha_divergence=nan"],
    ),
    "ld_alpha": ([0.0, 0.5, 1.0], [-0.1, 1.1, math.nan]),
    "epochs": POSITIVE,
    "max_steps": POSITIVE,
    "batch_size": POSITIVE,
    "lr": REAL_POSITIVE,
    "lr_scheduler": (["linear", "cosine", "constant"], ["Linear", "", "step"]),
    "memory": (["auto", "full", "split", "in-backward"], ["Full", "", "4bit"]),
    "warmup_ratio": SHARE,
    "min_lr": ([0.0, 1e-7], [-0.1, math.inf, math.nan]),
    "adam_beta1": SHARE,
    "adam_beta2": SHARE,
    "weight_decay": ([0.0, 0.1], [-0.1, math.inf, math.nan]),
    "max_grad_norm": ([0.0, 1.0], [-1.0, math.inf, math.nan]),
    "seed": ([0, 2**32 - 1], [-1, 2**32]),
    "logging_steps": POSITIVE,
    "eval_steps": NOT_NEGATIVE,
    "save_steps": NOT_NEGATIVE,
    "save_total_limit": POSITIVE,
    "show_answers": NOT_NEGATIVE,
    "lora_rank": POSITIVE,
    "lora_alpha": POSITIVE,
    "lora_type": (["lora", "rslora", "dora"], ["LoRA", "", "qlora"]),
    "lora_targets": (["all-linear", "q_proj", "q_proj,mlp.down_proj"], ["", "q_proj,", "q_proj v_proj", "q.*"]),
    "modules_to_save": (["norm", "model.norm,lm_head"], ["", ",norm"]),
    "export": (["adapter", "merged"], ["both", ""]),
    "export_dtype": (["float32", "bfloat16", "auto"], ["float16", "bf16", ""]),
    "device": (["auto", "cuda", "cuda:1", "xpu:0", "mps", "cpu"], ["gpu", "cuda:", "cuda:-1", "mps:0", "CPU", ""]),
    "report_to": (["none", "wandb", "tensorboard,mlflow"], ["tensorbord", "mlflow,W&B", "none,mlflow", ""]),
    "kl": (["exact", "none"], ["Exact", "", "sampled"]),
    "save_best": (["loss", "rewards/margins", "rewards/accuracies"], ["accuracy", "", "rewards/chosen"]),
    "samples": NOT_NEGATIVE,
    "gate": (["loss<1", "rewards/accuracies>=0.7, kl/chosen <= 1e-1"], ["loss=1", "loss<", "<1", "a<1,", ""]),
    "sample_prompts": POSITIVE,
    "sample_tokens": POSITIVE,
    "verify": NOT_NEGATIVE,
}


HELD_OUT = {"eval_data": [str(Path("held.jsonl").absolute())]}
BESIDE: dict[str, dict[str, Any]] = {  # what an option cannot be without
    **dict.fromkeys(("eval_steps", "show_answers", "save_best"), HELD_OUT),
    "memory": {"max_grad_norm": 0.0},
}
OF_AN_ADAPTER = {"lora_alpha", "lora_type", "lora_targets", "modules_to_save", "load_in_4bit", "load_in_8bit", "export"}


def fields(kind: type[Options]) -> list[dataclasses.Field[Any]]:
    return list(dataclasses.fields(kind))


def test_every_option_with_a_range_is_tried_below() -> None:
    checked = {f.name for kind in KINDS for f in fields(kind) if f.metadata["check"]}
    assert checked == set(RANGES)
    numbers = {f.name for kind in KINDS for f in fields(kind) if "int" in str(f.type) or "float" in str(f.type)}
    assert numbers <= checked  # no number goes unchecked


@pytest.mark.parametrize("name", RANGES)
def test_an_option_keeps_to_its_range(name: str, file: Path) -> None:
    taken, refused = RANGES[name]
    flag = "--" + name.replace("_", "-")
    for kind in KINDS:
        if name not in {f.name for f in fields(kind)}:
            continue
        beside = {"lora_rank": 4} if name in OF_AN_ADAPTER else BESIDE.get(name, {})
        beside = beside if kind is TrainOptions else {}
        for value in taken:
            assert getattr(resolve(kind, DATA | beside | {name: value}), name) == value
        for value in refused:
            with pytest.raises(UsageError) as caught:
                resolve(kind, DATA | {name: value})
            assert str(caught.value).startswith(f"{flag} {value}: must be ") and "\n" not in str(caught.value)


def test_defaults_are_in_their_ranges_and_have_a_help_text() -> None:
    for kind in KINDS:
        resolve(kind, DATA)
        for f in fields(kind):
            assert f.metadata["help"].endswith((".", "…")) or "=…" in f.metadata["help"], f.name
            off = {
                "eval_data",
                "per_pair",
                "report",
                "save_best",
                "lora_rank",
                "modules_to_save",
                "reward",
                "judge",
                "gate",
            }
            assert f.default is not None or f.metadata["shown"] or f.name in off, f.name  # unless asked for


# ---- the file that repeats the run ------------------------------------------------------------------------------

name = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=10)
some_path = name.map(Path)
positive = st.floats(min_value=1e-300, max_value=1e300)
count = st.integers(1, 10**6)
train_options = st.builds(
    TrainOptions,
    model=st.none() | name,
    base_model=st.none() | name,
    data=st.lists(name, min_size=1, max_size=3),
    columns=st.none() | name,
    on_bad_row=st.sampled_from(["refuse", "skip"]),
    control_tokens=st.none() | st.sampled_from(["keep", "refuse"]),
    trust_remote_code=st.booleans(),
    max_length=st.none() | st.integers(16, 10**6),
    dtype=st.none() | st.sampled_from(["auto", "bfloat16"]),
    cache_dir=some_path,
    eval_data=st.none() | st.lists(name, min_size=1, max_size=2),
    beta=positive,
    epochs=count,
    max_steps=st.none() | count,
    lr=positive,
    lr_scheduler=st.sampled_from(["linear", "cosine", "constant"]),
    gradient_checkpointing=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
    output=st.none() | some_path,
)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("config") / "config.yaml"


@settings(deadline=None, derandomize=True, database=None, max_examples=150)
@given(train_options)
def test_what_to_yaml_writes_resolve_reads_back(written: Path, options: TrainOptions) -> None:
    """But for the output folder, so that it can run again, and for trust, which a file is not to ask for."""
    written.write_text(to_yaml(options), encoding="utf-8")
    assert resolve(TrainOptions, {}, written) == dataclasses.replace(options, output=None, trust_remote_code=False)


def test_to_yaml_names_every_other_option() -> None:
    lines = to_yaml(TrainOptions(**DATA, output=Path("runs/a"))).splitlines()
    named = {line.partition(":")[0] for line in lines if not line.startswith("-")}
    assert named == {f.name for f in fields(TrainOptions)} - {"output", "trust_remote_code"}


# ---- going on with a run ----------------------------------------------------------------------------------------

BEGAN = TrainOptions(
    data=[str(Path("pairs.jsonl").absolute())],
    cache_dir=Path("cache").absolute(),
    beta=0.2,
    memory="full",
    loss="sigmoid=1,discopop=1",
)
# option: another value than it began with
OTHER: dict[str, Any] = {
    "model": "other",
    "base_model": "other",
    "data": [str(Path("other.jsonl").absolute())],
    "columns": "prompt=q",
    "on_bad_row": "skip",
    "control_tokens": "refuse",
    "format": "hh",
    "train_turns": "all",
    "pairs": "adjacent",
    "margin_per_score": 0.5,
    "chat_template": Path("other.jinja").absolute(),
    "trust_remote_code": True,
    "max_length": 64,
    "max_tokens": 64,
    "dtype": "bfloat16",
    "cache_dir": Path("elsewhere").absolute(),
    "eval_data": [str(Path("held.jsonl").absolute())],
    "eval_fraction": 0.5,
    "output": Path("other").absolute(),
    "beta": 0.3,
    "loss": "discopop",
    "loss_options": "discopop_tau=0.1",
    "label_smoothing": 0.1,
    "router_aux_loss_coef": 0.01,
    "f_divergence": "js_divergence",
    "ld_alpha": 0.5,
    "wpo": True,
    "epochs": 9,
    "max_steps": 9,
    "batch_size": 9,
    "lr": 1e-3,
    "lr_scheduler": "cosine",
    "memory": "split",
    "warmup_ratio": 0.5,
    "min_lr": 1e-9,
    "adam_beta1": 0.5,
    "adam_beta2": 0.5,
    "weight_decay": 0.1,
    "max_grad_norm": 9.0,
    "gradient_checkpointing": True,
    "fsdp": True,
    "seed": 9,
    "logging_steps": 9,
    "eval_steps": 9,
    "kl": "none",
    "save_best": "loss",
    "save_steps": 9,
    "save_total_limit": 9,
    "show_answers": 9,
    "ref_model": "other",
    "lora_rank": 9,
    "lora_type": "rslora",
    "lora_alpha": 9,
    "lora_targets": "q_proj",
    "modules_to_save": "norm",
    "load_in_4bit": True,
    "load_in_8bit": True,
    "export": "merged",
    "export_dtype": "bfloat16",
    "device": "cpu",
    "report_to": "tensorboard",
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").write_text(to_yaml(BEGAN), encoding="utf-8")
    (tmp_path / "manifest.json").write_text("{}", encoding="utf-8")
    return tmp_path


def test_a_run_goes_on_with_the_options_it_began_with(run: Path) -> None:
    assert resolve_training({}, run) == BEGAN
    assert resolve_training({"beta": 0.2, "data": BEGAN.data, "lr": None}, run) == BEGAN


def test_every_option_is_tried_below() -> None:
    assert set(OTHER) == {f.name for f in fields(TrainOptions)}
    assert set(OTHER) >= RESUME_MUTABLE


@pytest.mark.parametrize("option", OTHER)
def test_what_changes_the_training_cannot_be_changed(option: str, run: Path) -> None:
    read: dict[str, Any] = {"loss": "sigmoid"} if option == "label_smoothing" else BESIDE.get(option, {})
    read = {"lora_rank": 4} if option in OF_AN_ADAPTER else read
    (run / "config.yaml").write_text(to_yaml(dataclasses.replace(BEGAN, **read)), encoding="utf-8")
    if option in RESUME_MUTABLE:
        assert getattr(resolve_training({option: OTHER[option]}, run), option) == OTHER[option]
        return
    with pytest.raises(UsageError) as caught:
        resolve_training({option: OTHER[option]}, run)
    began = vars(resolve_training({}, run))[option]
    given, began = (" ".join(as_words({option: each})) for each in (OTHER[option], began))
    began, flag = f"with {began}" if began else "without", "--" + option.replace("_", "-")
    said = f"--resume {run}: cannot change {given} (it began {began}). A new run can: dpo train "
    assert str(caught.value).startswith(said)
    words = shlex.split(str(caught.value).removeprefix(said))
    value = [] if isinstance(OTHER[option], bool) else [str(OTHER[option])]
    if isinstance(OTHER[option], list):
        value = OTHER[option][:1]
    output = [] if option == "output" else ["--output", f"{run}-2"]
    assert sorted(words) == sorted(["--config", str(run / "config.yaml"), *output, flag, *value])


def test_the_options_that_may_change_are_those_that_train_nothing_else() -> None:
    """The gradient, the order of the pairs and what is kept of the run must not depend on any of them.

    Were the metric of the best model among them, best/ would hold the best by another one, or lack what is over.
    """
    names = {
        "logging_steps",
        "save_steps",
        "save_total_limit",
        "cache_dir",
        "show_answers",
        "trust_remote_code",
        "kl",
        "export",
    }
    names |= {"export_dtype", "base_model", "fsdp", "device", "report_to"}
    assert names == RESUME_MUTABLE


def test_several_changes_are_told_at_once(run: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot change --beta 0.3 .*, --seed 9 "):
        resolve_training({"beta": 0.3, "seed": 9, "save_total_limit": 5}, run)


def test_a_folder_that_is_no_run_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no run there"):
        resolve_training({}, tmp_path / "none")
    for name in ("manifest.json", "config.yaml"):
        (run / name).unlink()
        with pytest.raises(UsageError, match=rf"no run there \({name} is missing\)"):
            resolve_training({}, run)
        (run / name).touch()


# ---- dpo init ---------------------------------------------------------------------------------------------------


def entries(text: str) -> dict[str, str]:
    """What stands above each option, in one line."""
    found = {}
    for block in text.split("\n\n")[1:]:
        comments = [line.removeprefix("# ") for line in block.splitlines() if line.startswith("# ")]
        if block.startswith("# ---- "):
            continue
        [option_line] = [line for line in block.splitlines() if not line.startswith("#")]
        found[option_line.partition(":")[0]] = " ".join(comments)
    return found


def test_every_option_stands_there_with_its_default(tmp_path: Path) -> None:
    write_config(tmp_path / "run.yaml", [], False, PANEL_OF)
    values = yaml.safe_load((tmp_path / "run.yaml").read_text())
    assert list(values)[:2] == ["data", "eval_data"] and set(values) == {f.name for f in fields(TrainOptions)}
    assert resolve(TrainOptions, {"data": ["pairs.jsonl"]}, tmp_path / "run.yaml") == TrainOptions(data=["pairs.jsonl"])


def test_a_comment_says_what_it_is_for_and_what_it_can_be(tmp_path: Path) -> None:
    write_config(tmp_path / "run.yaml", [], False, PANEL_OF)
    text = (tmp_path / "run.yaml").read_text()
    assert all(len(line) <= WIDTH for line in text.splitlines())
    about = entries(text)
    for field in fields(TrainOptions):
        assert about[field.name].startswith(field.metadata["help"])
        check = field.metadata["check"]
        assert not check or all(choice in about[field.name] for choice in check.choices)
        assert field.metadata["shown"] is None or f"null: {field.metadata['shown']}" in about[field.name]
    assert "Must be at least 0 and less than 1." in about["warmup_ratio"]
    assert text.index("# ---- Everyday options ") < text.index("\ndata:") < text.index("# ---- Data ")


def test_a_new_option_is_in_it_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclasses.dataclass(frozen=True, init=False)
    class More(TrainOptions):
        mood: str = option("good", "How it is.", Check(str.isalpha, "must be a word"))

    monkeypatch.setattr("dpo_cli.config.resolve.TrainOptions", More)
    write_config(tmp_path / "run.yaml", [], False, PANEL_OF)
    assert (tmp_path / "run.yaml").read_text().endswith("\n# How it is. Must be a word.\nmood: good\n")


def test_the_command_fills_in_data_and_replaces_nothing(dpo: Cli, tmp_path: Path) -> None:
    told = dpo("init", "--data", "a.jsonl", "--data", "b: c.jsonl")
    assert told.returncode == 0 and told.stdout == "run.yaml is written. Now: dpo train --config run.yaml\n"
    assert resolve(TrainOptions, {}, Path("run.yaml")).data == ["a.jsonl", "b: c.jsonl"]
    told = dpo("init")
    assert told.returncode == 2 and told.stderr.startswith("error: run.yaml: exists already; ")
    assert resolve(TrainOptions, {}, Path("run.yaml")).data == ["a.jsonl", "b: c.jsonl"]
    told = dpo("init", "--force", "--json")
    assert told.returncode == 0 and json.loads(told.stdout) == {"config": "run.yaml"}
    told = dpo("train", "--config", "run.yaml")
    assert told.returncode == 2 and told.stderr.startswith("error: --data is missing: ")


def test_it_is_written_somewhere_else_or_not_at_all(dpo: Cli, tmp_path: Path) -> None:
    assert dpo("init", "configs/mine.yaml").returncode == 0 and (tmp_path / "configs" / "mine.yaml").is_file()
    told = dpo("init", "configs/mine.yaml/below.yaml")
    assert told.returncode == 1 and "cannot be written" in told.stderr
