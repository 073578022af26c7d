"""A lightweight DPO trainer for the command line."""

import os

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by torch at its first tensor: large ones lie in huge pages
