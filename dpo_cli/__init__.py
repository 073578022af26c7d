"""A lightweight DPO trainer for the command line, and for Python: see ``train``, ``evaluate`` and ``precompute``."""

import os

# Read when torch is imported, or at its first tensor. What the user set is kept.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # large tensors lie in huge pages
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # forwards of many lengths leave no holes on a GPU
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"}:
    os.environ["GOMP_SPINCOUNT"] = "10000"  # then a waiting thread leaves its core to others; docs/performance.md

from dpo_cli.cli.api import evaluate, precompute, train
from dpo_cli.utils.errors import DpoError, Interrupted, UsageError

__version__ = "0.1.0"

__all__ = ["DpoError", "Interrupted", "UsageError", "__version__", "evaluate", "precompute", "train"]
