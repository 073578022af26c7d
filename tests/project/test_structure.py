"""What the architecture promises about imports, and what the source must not contain."""

from __future__ import annotations

import ast
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from dpo_cli.config.options import CheckOptions, EvalOptions, PrecomputeOptions, SweepOptions, TrainOptions
from tests.helpers import ROOT, Cli, cli_environment
from tests.helpers.structure import MODULES, PACKAGE, imported, packages, tree

# ---- imports ----------------------------------------------------------------------------------------------------


def test_the_package_itself_offers_its_functions_and_their_errors() -> None:
    offered = {name for name in imported(tree("dpo_cli.__init__")) if name.startswith("dpo_cli") and name in MODULES}
    assert offered == {"dpo_cli.cli.api", "dpo_cli.utils.errors"}
    assert packages(tree("dpo_cli.__init__")) == {"os", "dpo_cli"}


def test_every_package_says_what_it_is_for() -> None:
    """One sentence in its ``__init__``, and nothing else; the table of CONTRIBUTING.md has these sentences."""
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for path in PACKAGE.glob("*/__init__.py"):
        sentence = ast.get_docstring(ast.parse(path.read_text()))
        assert f"| `{path.parent.name}/` | {sentence} |" in page, path
        assert len(ast.parse(path.read_text()).body) == 1 and path.read_text().count("\n") == 1, path


def test_imports_are_seen_wherever_they_stand() -> None:
    """The tests here would hold nothing if this went blind."""
    assert packages(ast.parse("def f():\n    import accelerate.utils as u")) == {"accelerate"}
    assert set(imported(ast.parse("from torch import nn"))) == {"torch", "torch.nn"}


def test_accelerate_is_named_by_the_loop_alone() -> None:
    users = {module for module in MODULES if "accelerate" in packages(tree(module))}
    assert users <= {f"dpo_cli.training.{name}" for name in ("loop", "step", "trackers")}


def test_pure_layers_know_torch_only() -> None:
    for module in ("losses.preference", "models.logprobs", "data.batching"):
        assert not packages(tree(f"dpo_cli.{module}")) & {"transformers", "accelerate", "typer", "rich"}
    light = (
        "utils.errors",
        "config.options",
        "data.readers",
        "data.sources",
        "data.formats",
        "data.rows",
        "models.locate",
    )
    for module in light:
        assert not packages(tree(f"dpo_cli.{module}")) & {"torch", "transformers", "accelerate", "numpy"}


# ---- what must not be there -------------------------------------------------------------------------------------

NEVER = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "torch.load",
    "yaml.load",
    "yaml.unsafe_load",
    "os.system",
    "os.popen",
}
TRUE_ARGUMENTS = {"shell", "trust_remote_code", "allow_pickle"}
# Off unless --trust-remote-code; tests/project/test_security.py.
ASKED_FOR = {f"dpo_cli.{module}": {"trust_remote_code"} for module in ("models.loading", "models.locate", "cli.app")}


def forbidden(source: ast.Module) -> set[str]:
    """What of the above a module does."""
    found = set()
    for node in ast.walk(source):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found |= NEVER & packages(ast.Module([node], []))
            found |= CALLS & set(imported(ast.Module([node], [])))
        elif isinstance(node, ast.Call):
            found |= CALLS & {ast.unparse(node.func)}
        elif isinstance(node, ast.keyword):
            found |= TRUE_ARGUMENTS & {node.arg} if ast.unparse(node.value) != "False" else set()
        elif isinstance(node, ast.Dict):  # arguments by way of a dict
            given = zip(node.keys, node.values, strict=True)
            on = {key.value for key, v in given if isinstance(key, ast.Constant) and ast.unparse(v) != "False"}
            found |= TRUE_ARGUMENTS & on
    return found


@pytest.mark.parametrize("module", MODULES)
def test_nothing_that_runs_what_it_reads(module: str) -> None:
    assert forbidden(tree(module)) == ASKED_FOR.get(module, set())


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("import pickle", "pickle"),
        ("def f():\n    from pickle import loads", "pickle"),
        ("torch.load(path, weights_only=True)", "torch.load"),
        ("from torch import load", "torch.load"),
        ("eval('1')", "eval"),
        ("exec(text)", "exec"),
        ("subprocess.run(command, shell=True)", "shell"),
        ("load(path, trust_remote_code=True)", "trust_remote_code"),
        ("load(path, trust_remote_code=trust)", "trust_remote_code"),
        ("load(**{'trust_remote_code': True})", "trust_remote_code"),
        ("yaml.load(text, Loader=yaml.SafeLoader)", "yaml.load"),
        ("numpy.load(path, allow_pickle=True)", "allow_pickle"),
    ],
)
def test_what_must_not_be_there_would_be_found(code: str, found: str) -> None:
    assert forbidden(ast.parse(code)) == {found}


def test_what_only_looks_like_it_is_let_pass() -> None:
    for code in ("model.eval()", "re.compile(text)", "load(trust_remote_code=False)", "yaml.safe_load(text)"):
        assert not forbidden(ast.parse(code))
    assert not forbidden(ast.parse("load(**{'trust_remote_code': False})"))


@pytest.mark.parametrize("module", MODULES)
def test_a_module_and_what_it_offers_say_what_they_are(module: str) -> None:
    source = tree(module)
    assert ast.get_docstring(source), "a module begins with a sentence"
    for node in source.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{module}.{node.name} has no docstring"


# ---- help is instant --------------------------------------------------------------------------------------------

HEAVY = {"torch", "transformers", "accelerate", "datasets", "numpy", "safetensors", "tokenizers", "pyarrow"}
HEAVY |= {"scipy", "matplotlib", "jinja2"}


def loaded(folder: Path, *arguments: str) -> tuple[subprocess.CompletedProcess[str], set[str]]:
    """Run the command and tell which packages Python loaded for it."""
    command = [sys.executable, "-X", "importtime", "-m", "dpo_cli", *arguments]
    environment = cli_environment(folder / "home")
    out = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    names = [line.rpartition("|")[2].strip() for line in out.stderr.splitlines() if line.startswith("import time:")]
    return out, {name.partition(".")[0] for name in names}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["train", "--help"],
        ["eval", "-h"],
        ["precompute-ref", "--help"],
        ["sweep", "--help"],
        ["check", "--help"],
        ["losses", "--help"],
        ["cache", "list", "--help"],
    ],
)
def test_help_loads_nothing_heavy(arguments: list[str], tmp_path: Path) -> None:
    out, names = loaded(tmp_path, *arguments)
    assert out.returncode == 0 and "Usage" in out.stdout
    assert {"dpo_cli", "typer"} <= names
    assert not names & HEAVY


WRONG = [
    "train --data rows.jsonl --beta 0",
    "train",
    "train --resume .",
    "train --config none.yaml",
    "train --data rows.jsonl --lerning-rate 1",
    "train --data rows.jsonl --columns promt=x",
    *(f"{command} --data rowz.jsonl" for command in ("train", "check", "eval", "precompute-ref", "explain")),
    "sweep --data rowz.jsonl --eval-data rows.jsonl",
    "train --data rows.jsonl --eval-data rowz.jsonl",
    *(f"{command} --data rows.jsonl --model runs/mien" for command in ("train", "check", "eval", "explain")),
    "eval --data rows.jsonl --model runs/mine --model runs/mien",
    "train --data rows.jsonl --ref-model runs/mien",
    "merge --model runs/mien --output merged",
    "export runs/mien --gguf my.gguf",
    "init --from rows.jsonl --devices 2",
    "check --data rows.jsonl=0.5",
    "push runs/mien me/model",
]


@pytest.mark.parametrize("arguments", WRONG)
def test_what_is_wrong_is_told_in_one_line_before_anything_heavy_is_loaded(arguments: str, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").touch()
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "runs" / "mine" / name).touch()
    out, names = loaded(tmp_path, *arguments.split())
    said = [line for line in out.stderr.splitlines() if not line.startswith("import time:")]
    assert out.returncode == 2 and [line.partition(": ")[0] for line in said] == ["error"]
    assert "dpo_cli" in names and not names & HEAVY
    for wrong, right in (("rowz.", "rows.jsonl"), ("mien", "runs/mine"), ("lerning", "--lr"), ("promt", "prompt")):
        assert wrong not in arguments or f"did you mean '{right}'?" in said[0]


def test_every_option_is_in_the_help(dpo: Cli) -> None:
    """Unabridged, on a terminal of the usual 80 columns."""
    commands = {"train": TrainOptions, "eval": EvalOptions, "precompute-ref": PrecomputeOptions, "check": CheckOptions}
    commands["sweep"] = SweepOptions
    for command, kind in commands.items():
        text = dpo(command, "--help").stdout
        for field in dataclasses.fields(kind):
            assert "--" + field.name.replace("_", "-") in text
