"""A benchmark's results as Markdown."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from benchmarks.trl.meter import Message

# TFLOP/s of dense bfloat16 that the makers publish, by a part of the card's name; the first that fits.
PUBLISHED = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "A100": 312, "L40S": 362, "4090": 165}


def machine(card: str) -> str:
    """Card, cores and processor, versions."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else []
    told = [card] if card else []
    told.append(f"{len(os.sched_getaffinity(0))} cores ({names[0] if names else 'unknown'})")
    for package in ("torch", "transformers", "trl"):
        with suppress(importlib.metadata.PackageNotFoundError):
            told.append(f"{package} {importlib.metadata.version(package)}")
    return ", ".join(told)


def report(results: Sequence[Message], args: argparse.Namespace, command: str, found: Message) -> str:
    """The command and the machine, then a table of rates, one of starts, one of sweeps, and what went wrong."""
    model = args.shape or (Path(args.model).name if args.model else "the default model")
    rate = f"a matrix product runs at {found['matmul_rate'] / 1e12:.3g} TFLOP/s"
    if published := next((value for name, value in PUBLISHED.items() if name in found["card"]), 0):
        rate += f", so that MFU is {found['matmul_rate'] / 1e12 / published:.2f} of the share of it"
    parts = [f"`{command}`\n\n{machine(found['card'])}; {model}, {args.dtype}; {rate}."]
    if rates := [line for result in results for line in _rates(result)]:
        parts.append(RATES + "\n" + "\n".join(rates))
    parts += _fastest(results) if args.grid else []
    if starts := [line for result in results for line in _starts(result)]:
        parts.append(STARTS + "\n" + "\n".join(starts))
    if sweeps := [line for result in results for line in _sweeps(result)]:
        parts.append(SWEEPS + "\n" + "\n".join(sweeps))
    return "\n\n".join(parts + [_verdict(result, args.tolerance) for result in results])


RATES = """\
| case | TRL's batch | phase | ours, pairs/s | TRL, pairs/s | ours / TRL (range of rounds) | tokens/s, ours, TRL | \
CPU s a pair, ours, TRL | peak MiB, ours, TRL | share of matmul rate, ours, TRL |
|---|---:|---|---:|---:|---:|---:|---:|---:|---:|"""
STARTS = """\
| case | seconds to the first step | ours | TRL | TRL / ours | CPU s, ours, TRL | peak MiB, ours, TRL | \
pairs scored, ours | reference batches, TRL |
|---|---|---:|---:|---:|---:|---:|---:|---:|"""
SWEEPS = """\
| case | run | lr | beta | reference computed | seconds to the first step |
|---|---|---:|---:|---|---:|"""


def _both(line: Message, name: str, form: str) -> str:
    return ", ".join(_one(line, side, name, form) for side in ("ours", "trl"))


def _one(line: Message, side: str, name: str, form: str) -> str:
    value = line.get(side, {}).get(name)
    return "–" if value is None else format(value, form)


def _rates(result: Message) -> list[str]:
    lines = []
    for line in result["lines"]:
        if any("pairs_per_s" in line.get(side, {}) for side in ("ours", "trl")):
            low, high = line.get("ratio_range", (0, 0))
            ratio = f"{line['ratio']:.2f} ({low:.2f} to {high:.2f})" if "ratio" in line else "–"
            ratio = "VOID" if result["void"] and "ratio" in line else ratio
            rate = (_one(line, side, "pairs_per_s", ".3g") for side in ("ours", "trl"))
            beside = [_both(line, "tokens_per_s", ",.0f"), _both(line, "cpu_s_per_pair", ".3g")]
            beside += [_both(line, "peak", ",.0f"), _both(line, "matmul_share", ".1%")]
            lines.append(_row(result["case"], result["trl_batch"], line["phase"], *rate, ratio, *beside))
    return lines


def _fastest(results: Sequence[Message]) -> list[str]:
    """TRL at its best: its fastest batch size of each case and phase."""
    found: dict[tuple[str, str], list[tuple[float, int, float]]] = {}
    for result in results:
        for line in result["lines"]:
            if "ratio" in line and "pairs_per_s" in line["trl"] and not result["void"]:
                key = (result["case"], line["phase"])
                found.setdefault(key, []).append((line["trl"]["pairs_per_s"], result["trl_batch"], line["ratio"]))
    told = []
    for (case, phase), each in found.items():
        rate, batch, ratio = max(each)
        told.append(
            f"{case}, {phase}: TRL is fastest with batches of {batch} ({rate:.3g} pairs/s); ours / TRL {ratio:.2f}."
        )
    return told


def _starts(result: Message) -> list[str]:
    lines = []
    for line in result["lines"]:
        if line["phase"].startswith("start"):
            seconds = (_one(line, side, "seconds", ".1f") for side in ("ours", "trl"))
            ratio = f"{line['ratio']:.2f}" if "ratio" in line else "–"
            beside = [_both(line, "cpu_seconds", ".1f"), _both(line, "peak", ",.0f")]
            counts = (_one(line, "ours", "pairs_scored", "d"), _one(line, "trl", "reference_forwards", "d"))
            lines.append(_row(result["case"], line["phase"], *seconds, ratio, *beside, *counts))
    return lines


def _sweeps(result: Message) -> list[str]:
    lines = []
    for line in result["lines"]:
        if line["phase"] == "sweep":
            ours = line["side"] == "ours"
            counted = f"{line['pairs_scored']} pairs" if ours else f"{line['reference_forwards']} batches"
            run, beta = f"{'ours' if ours else 'TRL'} {line['run']}", f"{line['beta']:.1f}"
            lines.append(_row(result["case"], run, f"{line['lr']:.1e}", beta, counted, f"{line['moments'][0]:.1f}"))
    return lines


def _verdict(result: Message, tolerance: float) -> str:
    """What holds of a case's numbers."""
    where = f"{result['case']}, TRL's batch {result['trl_batch']}"
    compared = sum("losses" in line for line in result["lines"])
    told = list(result["dead"])
    if not result["same_ids"]:
        told.append("VOID: the two sides read different tokens")
    elif result["void"]:
        told.append(f"VOID: losses differ by {result['loss_difference']:.1e}, more than {tolerance:.0e}")
    elif compared:
        told.append(
            f"same tokens; losses differ by at most {result['loss_difference']:.1e} (tolerance {tolerance:.0e})"
        )
    else:
        told.append("no losses to compare")
    pairs = f"{result['pairs']} pairs of {result['tokens'] / result['pairs']:.0f} tokens (a prompt once)"
    return f"{where} ({pairs}, steps of {result['batch_size']}): {'; '.join(told)}."


def _row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"
