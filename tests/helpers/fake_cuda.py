"""``traced_step`` on CUDA in a process of its own, where a CPU build of torch is made to believe in the device.

    python tests/helpers/fake_cuda.py fake_cuda.so MEMORY kept|recomputed

Prints its result as JSON. Nothing is computed: fake tensors of the device go through autograd.
"""

import ctypes
import importlib.util
import json
import os
import sys
from pathlib import Path

spec = importlib.util.find_spec("torch")
assert spec and spec.origin
LIBRARIES = Path(spec.origin).parent / "lib"
for name in ("libtorch_global_deps.so", "libc10.so", "libtorch_cpu.so", sys.argv[1]):  # the last before torch itself
    ctypes.CDLL(str(LIBRARIES / name), mode=ctypes.RTLD_GLOBAL)

import torch  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402

from tests.helpers.traced import traced_step  # noqa: E402

if __name__ == "__main__":
    FakeTensorMode.avoid_device_init = True  # type: ignore[attr-defined]
    torch.cuda.is_available = lambda: True
    torch.cuda.is_initialized = lambda: False
    torch.cuda.current_device = lambda: 0
    torch.cuda.is_bf16_supported = lambda *_: True
    torch.Tensor.pin_memory = lambda self, *_: self  # type: ignore[method-assign]
    print(json.dumps(traced_step("cuda", sys.argv[2], sys.argv[3] == "recomputed")), flush=True)
    os._exit(0)  # autograd's thread of the device that is not there is not waited for
