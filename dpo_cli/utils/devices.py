"""What each kind of device can do, in one table."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

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
    sums: torch.dtype = torch.float32  # of sums over tokens and pairs; float64 where the device has it
    pinned: bool = False  # copies from pinned memory do not block
    bitsandbytes: bool = False
    backend: str = ""  # of torch.distributed; none: a run has one process
    heap: float = 1.0  # bytes that the allocator takes per byte of activations; docs/performance.md
    tested: bool = False


WHOLE: Ways = (("full", False), ("full", True))
SPLIT: Ways = (("full", False), ("split", False), ("full", True), ("split", True))
BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
CPU = DeviceKind(*("cpu", (FP32, BF16), WHOLE, 2048, 2**28, 2**24), sums=FP64, backend="gloo", heap=1.15, tested=True)
CUDA = DeviceKind(
    *("cuda", (BF16, FP32), SPLIT), flash=True, sums=FP64, pinned=True, bitsandbytes=True, backend="cpu:gloo,cuda:nccl"
)
# T4, V100, RTX 20: no bfloat16, no flash over segments. float16 would need scaled losses, and skip steps.
OLD_CUDA = replace(CUDA, name="cuda before sm_80", dtypes=(FP32,), ladder=WHOLE, flash=False)
ROCM = replace(CUDA, name="rocm", flash=False, bitsandbytes=False)  # its flash may align causality at the first key
XPU = DeviceKind("xpu", (BF16, FP32), WHOLE, backend="cpu:gloo,xpu:xccl")  # Arc has no float64
MPS = DeviceKind("mps", (FP32, BF16), WHOLE, most_tokens=8192)
KINDS = {kind.name: kind for kind in (CPU, CUDA, OLD_CUDA, ROCM, XPU, MPS)}


def cuda_kind(capability: tuple[int, int]) -> DeviceKind:
    """Return the kind of an NVIDIA device by its compute capability."""
    return CUDA if capability >= (8, 0) else OLD_CUDA


def device_kind(device: torch.device) -> DeviceKind:
    """Return the kind of a device; the CPU's for one that is none of the table."""
    if device.type == "cuda":
        return ROCM if torch.version.hip else cuda_kind(torch.cuda.get_device_capability(device))
    return KINDS.get(device.type, KINDS["cpu"])


def empty_cache() -> None:
    """Give memory that torch keeps for later tensors back to the device, if there is one."""
    if device := torch.accelerator.current_accelerator(check_available=True):
        torch.get_device_module(device).empty_cache()
