"""The device of a process, and what each kind of device can do, in one table."""

from __future__ import annotations

import os
import platform
import re
import shutil
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dpo_cli.utils.cards import traced_card
from dpo_cli.utils.errors import UsageError, plural

Ways = tuple[tuple[str, bool], ...]  # memory modes, and whether the backward pass recomputes activations


@dataclass(frozen=True)
class DeviceKind:
    """What a kind of device computes with, and how much at a time.

    ``tested``: the program ran on such hardware; else only on a CPU with this entry in place of its own.
    """

    name: str
    dtypes: tuple[torch.dtype, ...]  # of matrix products, the default first
    ladder: Ways  # that ``--memory auto`` chooses from, fastest first; docs/performance.md
    most_tokens: int = 32768  # of a forward: more bring no speed
    logits_bytes: int = 2**30  # of float32 logits computed at a time, unless a single pair needs more
    compared_bytes: int = 2**28  # of logits compared at a time; on a CPU they stay in its cache
    flash: bool = False  # attention is one flash call for all segments; else scaled-dot-product, a call for each
    float32_logits: bool = False  # torch multiplies 16-bit matrices to float32 there
    sums: torch.dtype = torch.float32  # of sums over tokens and pairs; float64 where the device has it
    pinned: bool = False  # copies from pinned memory do not block
    bitsandbytes: bool = False
    backend: str = ""  # of torch.distributed; none: a run has one process
    heap: float = 1.0  # bytes that the allocator takes per byte of activations; docs/performance.md
    tested: bool = False


WHOLE: Ways = (("full", False), ("full", True))
SPLIT_OR_WHOLE: Ways = (("full", False), ("split", False), ("full", True), ("split", True))
BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
CPU = DeviceKind(*("cpu", (FP32, BF16), WHOLE, 2048, 2**28, 2**24), sums=FP64, backend="gloo", heap=1.15, tested=True)
CUDA = DeviceKind(
    *("cuda", (BF16, FP32), SPLIT_OR_WHOLE),
    flash=True,
    float32_logits=True,
    sums=FP64,
    pinned=True,
    bitsandbytes=True,
    backend="cpu:gloo,cuda:nccl",
)
# T4, V100, RTX 20: no bfloat16, no flash over segments. float16 would need scaled losses, and skip steps.
OLD_CUDA = replace(CUDA, name="cuda before sm_80", dtypes=(FP32,), ladder=WHOLE, flash=False)
# Its flash may align causality at the first key, and its products of 16-bit matrices are 16-bit (torch 2.13).
ROCM = replace(CUDA, name="rocm", flash=False, float32_logits=False, bitsandbytes=False)
XPU = DeviceKind("xpu", (BF16, FP32), WHOLE, backend="cpu:gloo,xpu:xccl")  # Arc has no float64
MPS = DeviceKind("mps", (FP32, BF16), WHOLE, most_tokens=8192)
KINDS = {kind.name: kind for kind in (CPU, CUDA, OLD_CUDA, ROCM, XPU, MPS)}
GPUS = ("cuda", "xpu", "mps")  # types of torch, in the order in which they are taken; ROCm's is cuda


def cuda_kind(capability: tuple[int, int]) -> DeviceKind:
    """Return the kind of an NVIDIA device by its compute capability."""
    return CUDA if capability >= (8, 0) else OLD_CUDA


def device_kind(device: torch.device) -> DeviceKind:
    """Return the kind of a device, or of the card that stands in for it; the CPU's for one that is not in the table."""
    if card := traced_card():
        return cuda_kind(card.capability)
    if device.type == "cuda":
        return ROCM if torch.version.hip else cuda_kind(torch.cuda.get_device_capability(device))
    return KINDS.get(device.type, KINDS["cpu"])


def empty_cache() -> None:
    """Give memory that torch keeps for later tensors back to the device, if there is one."""
    if device := torch.accelerator.current_accelerator(check_available=True):
        torch.get_device_module(device).empty_cache()


# ---- the device of a process ------------------------------------------------------------------------------------


def start(name: str = "auto") -> torch.device:
    """Choose the device of this process by the option ``--device``, and make it the current one.

    Raises:
        UsageError: it is not there.
    """
    wanted, _, number = name.partition(":")
    if number and "LOCAL_RANK" in os.environ:
        raise UsageError(f"--device {name}: a launcher gives each process its own device; take --device {wanted}")
    usable = [gpu for gpu in GPUS if not why_unusable(gpu)]
    device_type = next(iter(usable), "cpu") if wanted == "auto" else wanted
    if device_type == "cpu":
        return torch.device("cpu")
    index, choices = int(number or os.environ.get("LOCAL_RANK", "0")), ", ".join([*usable, "cpu"])
    why = why_unusable(device_type)
    if not why and index >= (count := torch.get_device_module(device_type).device_count()):
        why = f"{device_type}:{index} is not there, the first of {count} is {device_type}:0"
    if why:
        raise UsageError(f"--device {name}: {why}; what can be used: {choices}")
    if device_type != "mps":
        torch.get_device_module(device_type).set_device(index)
    if device_type == "cuda":  # partial sums stay float32 and are not split: a row depends less on how many there are
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = (False, False)
    return torch.device(device_type, index)


def why_unusable(device_type: str) -> str:
    """Return why torch cannot use a type of GPU, empty if it can."""
    built = {"cuda": torch.version.cuda or torch.version.hip, "xpu": torch.version.xpu}
    if not built.get(device_type, torch.backends.mps.is_built()):
        return f"torch {torch.__version__} is built without {device_type}"
    module = torch.get_device_module(device_type)
    with warnings.catch_warnings(action="ignore"):  # the reason is raised, too
        if not module.is_available():
            try:
                module.init()
            except (RuntimeError, AssertionError, AttributeError) as error:  # mps has none
                reason = re.split(r"[.\n]", str(error))[0]
                return reason if device_type != "mps" else "this macOS is too old for it"
    if device_type == "cuda" and not torch.version.hip:
        major, minor = torch.cuda.get_device_capability()
        built_for = torch.cuda.get_arch_list()
        if built_for and not any(_runs_on(arch, major, minor) for arch in built_for):
            return f"torch {torch.__version__} is built for {', '.join(built_for)}, and the GPU is sm_{major}{minor}"
    return ""


def _runs_on(arch: str, major: int, minor: int) -> bool:
    """Whether code for this architecture runs on a device: binaries within a major version, PTX on all later ones."""
    kind, version = arch.rstrip("af").split("_")
    own = (int(version[:-1]), int(version[-1]))
    return own <= (major, minor) and (kind == "compute" or own[0] == major)


def describe(device: torch.device, option: str) -> str:
    """Describe a device for the plan; where ``--device`` leaves it open, why a GPU is not used."""
    kind = device_kind(device)
    if card := traced_card():
        return card.name
    if device.type != "cpu":
        module, attention = torch.get_device_module(device), "flash" if kind.flash else "scaled-dot-product"
        name = module.get_device_name(device) if hasattr(module, "get_device_name") else platform.machine()
        text = f"{device} ({name}: {kind.name}, {attention} attention)"
    else:
        text = f"cpu, {plural(torch.get_num_threads(), 'thread')}"
        nvidia = Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi")
        apple = (platform.system(), platform.machine()) == ("Darwin", "arm64")
        present = {"cuda": nvidia or Path("/dev/kfd").exists(), "mps": apple}
        if option == "auto" and (whys := [why for gpu, here in present.items() if here and (why := why_unusable(gpu))]):
            text += f", the GPU is not used: {'; '.join(whys)}"
    return text if kind.tested else f"{text}, untested on hardware"
