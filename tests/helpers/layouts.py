"""Forward layouts."""

from __future__ import annotations

import torch

from dpo_cli.data.schedule import Layout
from dpo_cli.models.attention import PREFIX_SHARED

LAYOUTS: list[Layout] = ["shared", "packed", "padded", "alone"]
CPU = torch.device("cpu")


def own(layout: Layout) -> str | None:
    return PREFIX_SHARED if layout == "shared" else None
