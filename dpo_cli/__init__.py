"""A lightweight DPO trainer for the command line, and for Python: see ``train``, ``evaluate`` and ``precompute``."""

import os

from dpo_cli.cli.api import evaluate, precompute, train
from dpo_cli.utils.errors import DpoError, Interrupted, UsageError

__version__ = "0.1.0"

__all__ = ["DpoError", "Interrupted", "UsageError", "__version__", "evaluate", "precompute", "train"]

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by torch at its first tensor: large ones lie in huge pages
