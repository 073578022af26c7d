"""Which device a run uses, and that a run with another device's entry of the table takes a path which that one has.

No GPU is needed: torch's queries are replaced, or the entry stands in for the CPU's while a CPU computes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from typer.testing import CliRunner

import dpo_cli.models.attention
from dpo_cli.cli.app import app
from dpo_cli.config.options import PrecomputeOptions
from dpo_cli.models import loading
from dpo_cli.models.loading import compute_dtype
from dpo_cli.models.locate import find_model
from dpo_cli.training.memory import usable_bytes
from dpo_cli.training.prepare import check_quantize, weights_mode
from dpo_cli.training.step import Trainer
from dpo_cli.utils import devices
from dpo_cli.utils.devices import CUDA, MPS, OLD_CUDA, ROCM, XPU, DeviceKind, device_kind
from dpo_cli.utils.errors import UsageError
from tests.helpers import ROOT, SAMPLE, Cli, cli_environment, make_model, stand_in

MIXTURE = {"num_local_experts": 4, "num_experts_per_tok": 2}
DATA = ("--data", SAMPLE / "train-strings.jsonl")


def pretend(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int] = (9, 0),
    built: tuple[str, ...] = ("sm_75", "sm_80", "sm_90", "compute_90"),
    count: int = 1,
    hip: str | None = None,
) -> None:
    """Let torch report CUDA devices, or AMD's."""
    monkeypatch.setattr(torch.version, "cuda", None if hip else "12.8")
    monkeypatch.setattr(torch.version, "hip", hip)
    answers = {"is_available": True, "device_count": count, "get_device_capability": capability}
    answers |= {"get_arch_list": [*built], "get_device_name": "the card", "set_device": None}
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)


@pytest.fixture(autouse=True)
def products(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Settings of torch.backends, which set the process's own."""
    settings = type("Settings", (), {"allow_bf16_reduced_precision_reduction": True})()
    monkeypatch.setattr(torch.backends.cuda, "matmul", settings)
    return settings


# ---- which device -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "kind"), [((9, 0), CUDA), ((8, 6), CUDA), ((8, 0), CUDA), ((7, 5), OLD_CUDA), ((7, 0), OLD_CUDA)]
)
def test_cuda(capability: tuple[int, int], kind: DeviceKind, products: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, capability, ("sm_70", "sm_75", "sm_80", "sm_90"))
    device = devices.start()
    assert device == torch.device("cuda", 0) and device_kind(device) is kind
    assert products.allow_bf16_reduced_precision_reduction == (False, False)
    attention = "flash" if kind is CUDA else "scaled-dot-product"
    expected = f"cuda:0 (the card: {kind.name}, {attention} attention), untested on hardware"
    assert devices.describe(device, "auto") == expected


def test_amd(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, built=("gfx90a",), hip="6.4")
    assert device_kind(devices.start()) is ROCM


@pytest.mark.parametrize(("gpu", "kind"), [("mps", MPS), ("xpu", XPU)])
def test_apple_and_intel(gpu: str, kind: DeviceKind, monkeypatch: pytest.MonkeyPatch) -> None:
    module = torch.get_device_module(gpu)
    monkeypatch.setattr(torch.version, "xpu", "2025")
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: True)
    for name, answer in {"is_available": True, "device_count": 1, "set_device": None, "get_device_name": "it"}.items():
        monkeypatch.setattr(module, name, lambda *_, answer=answer: answer, raising=False)
    device = devices.start()
    assert device == torch.device(gpu, 0) and device_kind(device) is kind
    assert "untested on hardware" in devices.describe(device, "auto")


def test_one_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, count=2)
    assert devices.start("cuda:1") == torch.device("cuda", 1)
    assert devices.start("cpu") == torch.device("cpu")
    with pytest.raises(UsageError, match=r"^--device cuda:2: cuda:2 is not there, the first of 2 is cuda:0; what can"):
        devices.start("cuda:2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert devices.start() == torch.device("cuda", 1)
    with pytest.raises(UsageError, match="a launcher gives each process its own device"):
        devices.start("cuda:0")


# ---- a GPU that is not used -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("built", "capability", "runs"),
    [
        (("sm_75", "sm_80"), (7, 0), False),  # a V100, and torch for CUDA 13
        (("sm_80",), (8, 9), True),  # binaries within a major version
        (("sm_80",), (9, 0), False),
        (("sm_80", "compute_80"), (12, 0), True),  # PTX is compiled for what comes later
        (("sm_90a", "sm_100f"), (9, 0), True),
    ],
)
def test_torch_for_other_devices(
    built: tuple[str, ...], capability: tuple[int, int], runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, capability, built)
    monkeypatch.setattr(devices.shutil, "which", lambda name: f"/usr/bin/{name}")
    device = devices.start()
    assert device.type == ("cuda" if runs else "cpu")
    if not runs:
        why = f"torch {torch.__version__} is built for {', '.join(built)}, and the GPU is sm_{capability[0]}"
        assert f", the GPU is not used: {why}" in devices.describe(device, "auto")
        assert "not used" not in devices.describe(device, "cpu")  # as it was asked for
        with pytest.raises(UsageError, match=r"^--device cuda: torch .* is built for .*; what can be used: cpu$"):
            devices.start("cuda")


def test_an_old_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the words of torch, which also warns of it."""
    pretend(monkeypatch)

    def fail() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040). Please update …")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", fail)
    monkeypatch.setattr(devices.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert "not used: The NVIDIA driver on your system is too old" in devices.describe(devices.start(), "auto")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_cpu_build_beside_a_gpu(
    dpo: Cli, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The plan names the reason; a device that is asked for and not there is refused in one line."""
    monkeypatch.setattr(devices.shutil, "which", lambda name: f"/usr/bin/{name}")
    words = [*map(str, ("train", "--model", tiny, *DATA, "--cache-dir", tmp_path, "--dry-run"))]
    plan = CliRunner().invoke(app, words).output
    assert f", the GPU is not used: torch {torch.__version__} is built without cuda; compute float32" in plan
    refused = dpo("train", "--model", tiny, *DATA, "--device", "cuda")
    assert refused.returncode == 2 and refused.stdout == ""
    expected = f"error: --device cuda: torch {torch.__version__} is built without cuda; what can be used: cpu"
    assert refused.stderr.splitlines() == ["loading…", expected]
    for command in ("precompute-ref", "eval"):
        assert "--device xpu: torch" in dpo(command, "--model", tiny, *DATA, "--device", "xpu").stderr
    assert "must be one of: auto, cuda, cuda:NUMBER" in dpo("train", *DATA, "--device", "tpu").stderr


# ---- a run by another entry -------------------------------------------------------------------------------------


class NoFloat64(TorchDispatchMode):
    """Fails as a device without float64 does."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        tensors = [x for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor)]
        assert all(x.dtype != torch.float64 for x in tensors), f"{func}: float64"
        assert "segment_reduce" not in str(func)
        return out


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Watches the steps of a run: ``flash``, or what a device without float64 would refuse."""
    seen: list[str] = []
    step, flash = Trainer.step, dpo_cli.models.attention._varlen

    def watched(self: Trainer, *arguments: Any) -> Any:
        if self.runner.kind.sums == torch.float64:
            return step(self, *arguments)
        seen.append("no float64")
        with NoFloat64():
            return step(self, *arguments)

    def called(*arguments: Any) -> Any:
        seen.append("flash")
        return flash(*arguments)

    monkeypatch.setattr(Trainer, "step", watched)
    monkeypatch.setattr(dpo_cli.models.attention, "_varlen", called)
    return seen


def run(folder: Path, model: Path, *more: Any) -> tuple[list[dict[str, Any]], str]:
    """Train two steps; returns their metrics and what was printed."""
    words = ("train", "--model", model, *DATA, "--max-steps", 2, "--batch-size", 8, "--lr", 1e-3, *more)
    words = (*words, "--cache-dir", folder / "cache", "--output", folder / "run")
    result = CliRunner().invoke(app, [*map(str, words)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], result.output


@pytest.mark.parametrize("kind", [OLD_CUDA, MPS, XPU, ROCM], ids=lambda kind: kind.name)
def test_what_a_run_computes_with(
    kind: DeviceKind, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: list[str]
) -> None:
    """Its own precision, no flash, sums of its own; the same numbers as a CPU's up to that precision."""
    for folder in ("cpu", "kind"):
        (tmp_path / folder).mkdir()
    expected, _ = run(tmp_path / "cpu", tiny)
    stand_in(monkeypatch, kind, pinned=False)  # a CPU has no such memory
    metrics, plan = run(tmp_path / "kind", tiny)
    name = str(kind.dtypes[0]).removeprefix("torch.")
    assert f"compute {name}; weights and moments float32" in plan
    assert "each prompt computed once for both responses" in plan
    assert "untested on hardware" in plan and f"max_tokens {kind.most_tokens:,}" in plan
    assert calls == ([] if kind.sums == torch.float64 else ["no float64"] * 2)
    close = {"rel": 1e-5, "abs": 1e-5} if name == "float32" else {"rel": 0.1, "abs": 0.1}
    for line, other in zip(metrics, expected, strict=True):
        assert line == pytest.approx(other, **close)


@pytest.mark.parametrize(
    "more",
    [
        ("--memory", "split", "--dtype", "bfloat16"),
        ("--memory", "in-backward", "--dtype", "bfloat16", "--max-grad-norm", 0, "--max-tokens", 4096),
        ("--lora-rank", 4),
        ("--router-aux-loss-coef", 0.1, "--max-tokens", 700),
        ("--wpo", "--loss", "sigmoid=1,sft=0.1"),
    ],
    ids=lambda more: more[0],
)
def test_a_step_on_mps_has_no_float64(
    more: tuple[Any, ...], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: list[str]
) -> None:
    model = tiny
    if "--router-aux-loss-coef" in more:
        model = tmp_path / "mixture"
        make_model("mixtral", **MIXTURE).save_pretrained(model)
        for file in tiny.glob("*token*"):
            (model / file.name).write_bytes(file.read_bytes())
    stand_in(monkeypatch, MPS)
    run(tmp_path, model, *more)
    assert calls == ["no float64"] * 2


def test_flash_where_the_entry_has_it(tiny: Path, monkeypatch: pytest.MonkeyPatch, calls: list[str]) -> None:
    """The runner's entry decides, not where its tensors are: a CPU can be asked as another device."""
    from dpo_cli.models.attention import PREFIX_SHARED, attention
    from dpo_cli.models.logprobs import ModelRunner
    from tests.helpers import random_pairs

    model = make_model()

    def no_kernel(query: torch.Tensor, *_: Any) -> torch.Tensor:
        calls.append("flash")
        return query.transpose(1, 2)

    monkeypatch.setattr(dpo_cli.models.attention, "_varlen", no_kernel)
    with attention(model, PREFIX_SHARED), torch.no_grad():
        for each, dtype in ((CUDA, torch.bfloat16), (CUDA, torch.float32), (OLD_CUDA, torch.bfloat16)):
            kind = dataclasses.replace(each, float32_logits=False)  # a CPU has no such product
            runner = ModelRunner(model, "shared", dtype, 512, torch.device("cpu"), kind=kind)
            runner.token_logps(runner.batch(random_pairs(2)))
    assert calls == ["flash"] * model.config.num_hidden_layers


def test_what_the_table_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"^--dtype bfloat16: cuda before sm_80 does not compute in bfloat16"):
        compute_dtype("bfloat16", OLD_CUDA)
    with pytest.raises(UsageError, match=r"^--memory split: cuda before sm_80 does not compute in bfloat16"):
        compute_dtype(None, OLD_CUDA, halved=True)
    assert [weights_mode("auto", True, None, kind) for kind in (CUDA, OLD_CUDA, MPS)] == ["split", "full", "full"]
    source: Any = None
    with pytest.raises(UsageError, match="--load-in-4bit: bitsandbytes packs weights on CUDA devices"):
        check_quantize(PrecomputeOptions(data=["x"], load_in_4bit=True), source, ROCM)
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: True)
    monkeypatch.setattr(torch.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "device_count", lambda: 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    from dpo_cli.utils import distributed

    with (
        pytest.raises(UsageError, match=r"^--device mps: a run on mps has one process"),
        distributed.started(device_name="mps"),
    ):
        pass


@pytest.mark.parametrize(("capability", "dtype"), [((8, 0), torch.bfloat16), ((7, 5), torch.float32)])
def test_what_a_quantized_base_computes_in(
    capability: tuple[int, int], dtype: torch.dtype, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, capability)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    asked: dict[str, Any] = {}

    class Auto:
        @staticmethod
        def from_pretrained(**arguments: Any) -> Any:
            asked.update(arguments)
            raise ValueError("no bitsandbytes here")

    monkeypatch.setattr(loading, "declared_class", lambda config: Auto)
    with pytest.raises(UsageError, match="no bitsandbytes here"):
        loading.load_model(dataclasses.replace(find_model(str(tiny)), quantize="4bit"))
    assert asked["dtype"] == asked["quantization_config"].bnb_4bit_compute_dtype == dtype
    assert asked["device_map"] == {"": torch.device("cuda", 0)}


def test_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a card what its driver reports, with what torch keeps; of Apple's no more than the host has."""
    for gpu in (torch.cuda, torch.xpu):
        monkeypatch.setattr(gpu, "mem_get_info", lambda device: (900, 2000))
        monkeypatch.setattr(gpu, "memory_reserved", lambda device: 100)
    assert [usable_bytes(torch.device(gpu, 0)) for gpu in ("cuda", "xpu")] == [900, 900]
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 100)
    for most, expected in ((2000, 2000), (2**60, psutil.virtual_memory().available)):
        monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda most=most: most)
        assert usable_bytes(torch.device("mps", 0)) == pytest.approx(0.9 * expected, rel=0.1)


# ---- before torch is imported -----------------------------------------------------------------------------------

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def environment_of(**given: str) -> dict[str, str]:
    """What the package sets, with these variables set by the user."""
    clean = {name: value for name, value in os.environ.items() if name not in (*WAITING, *ALLOCATOR)}
    code = "import os, sys, dpo_cli; assert 'torch' not in sys.modules; import json; print(json.dumps({**os.environ}))"
    out = subprocess.run(
        [sys.executable, "-c", code], env=clean | given, cwd=ROOT, capture_output=True, text=True, check=True
    )
    found = json.loads(out.stdout)
    return {name: found[name] for name in (*WAITING, *ALLOCATOR) if name in found}


def test_what_is_set_before_torch_is_imported() -> None:
    """Torch reads these once. What the user set stays, and nothing is set beside it that would count instead."""
    segments = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    assert environment_of() == segments | {"GOMP_SPINCOUNT": "10000"}
    for name in WAITING:
        assert environment_of(**{name: "1"}) == segments | {name: "1"}
    for name in ALLOCATOR:
        assert environment_of(**{name: "max_split_size_mb:512", "GOMP_SPINCOUNT": "1"}) == {
            name: "max_split_size_mb:512",
            "GOMP_SPINCOUNT": "1",
        }


# ---- Windows ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["losses", f"train --data {DATA[1]}", "cache list"])
def test_a_system_without_these_locks_is_one_line(command: str, tmp_path: Path) -> None:
    code = (
        "import sys, warnings; sys.modules['fcntl'] = None; warnings.simplefilter('ignore')\n"
        f"sys.argv = ['dpo', *{command.split()}]\nfrom dpo_cli.cli.app import main; main()"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], env=cli_environment(tmp_path), cwd=tmp_path, capture_output=True, text=True
    )
    lines = [line for line in out.stderr.splitlines() if line != "loading…"]
    assert lines == ["error: Windows cannot lock files as runs need it; use WSL, the Windows Subsystem for Linux"]
    assert out.returncode == 2
