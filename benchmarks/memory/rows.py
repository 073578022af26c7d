"""Show what many rows cost before the first step: seconds by phase, and memory.

    python benchmarks/memory/rows.py --rows 10000 100000 1000000

Writes files of short string pairs (random words, about 20 tokens a part with the tests' small tokenizer) and measures
each size in a process of its own: reading, tokenizing, planning, and looking up invented reference
log-probs in a cache on disk. Memory is the resident peak (Linux) beyond what the imports and the tokenizer take.
Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from dpo_cli.data.pairs import Pairs
from dpo_cli.data.rows import read_rows
from dpo_cli.data.schedule import build_schedule, row_costs
from dpo_cli.data.sources import find_sources
from dpo_cli.data.tokenize import tokenize_rows
from dpo_cli.models.loading import load_tokenizer
from dpo_cli.models.locate import find_model
from dpo_cli.reference.store import ReferenceCache, pair_keys

ROOT = Path(__file__).parents[2]
FINGERPRINT = "0" * 64
WORDS_A_PART = 5
SHARD_PAIRS = 20_000


@dataclass(frozen=True)
class Measured:
    """What the rows of one size took: seconds, MiB."""

    rows: int
    tokens: int
    reading: float
    tokenizing: float
    planning: float
    looking_up: float
    peak: float

    def line(self) -> str:
        phases = [self.reading, self.tokenizing, self.planning, self.looking_up]
        by_phase = " | ".join(f"{each:.2f}" for each in phases)
        per_row = f"{sum(phases) / self.rows * 1e6:.0f}"
        return f"| {self.rows:,} | {self.tokens / self.rows:.0f} | {by_phase} | {per_row} | {self.peak:,.0f} |"


HEAD = """\
| rows | tokens a row | reading, s | tokenizing, s | planning, s | looking up, s | µs a row | peak, MiB |
|---:|---:|---:|---:|---:|---:|---:|---:|"""


def write_file(path: Path, rows: int) -> None:
    rng = random.Random(0)
    words = sorted(set(re.findall(r"\b[a-z]{2,9}\b", (ROOT / "sample_data" / "train-strings.jsonl").read_text())))
    with path.open("w") as stream:
        for _ in range(rows):
            prompt, chosen, rejected = (" ".join(rng.choices(words, k=WORDS_A_PART)) for _ in range(3))
            stream.write(json.dumps({"prompt": prompt, "chosen": f" {chosen}", "rejected": f" {rejected}"}) + "\n")


def fill(folder: Path, pairs: Pairs) -> None:
    """Write invented log-probs as a run would, some shards of them."""
    cache = ReferenceCache(folder, FINGERPRINT, print)
    cache.open_for_writing()
    for start in range(0, len(pairs), SHARD_PAIRS):
        entries = {}
        for pair in pairs[start : start + SHARD_PAIRS]:
            for key, response in zip(pair_keys(pair), (pair.chosen, pair.rejected), strict=True):
                entries[key] = (-float(len(response)), torch.full((len(response),), -1.0))
        cache.add(entries)
        cache.values.clear()


def measure(rows: int, model: str | None) -> Measured:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_file(folder / "rows.jsonl", rows)
        tokenizer = local_tokenizer(model)
        forget_peak()
        start = peak_mib()
        times = [time.perf_counter()]

        read = sum(1 for _ in read_rows(find_sources([str(folder / "rows.jsonl")])))
        times.append(time.perf_counter())
        rows_again = read_rows(find_sources([str(folder / "rows.jsonl")]))
        pairs = tokenize_rows(rows_again, tokenizer).pairs
        times.append(time.perf_counter())
        costs = row_costs(pairs, "shared")
        plan = build_schedule(
            pairs, "shared", batch_size=16, epochs=1, max_steps=None, max_tokens=2048, world_size=1, seed=0
        )
        times.append(time.perf_counter())
        fill(folder, pairs)
        times.append(time.perf_counter())
        logps = ReferenceCache(folder, FINGERPRINT, print).lookup(pairs)
        times.append(time.perf_counter())

        peak = peak_mib() - start
        assert read == len(pairs) == sum(len(batch) for step in plan for batch in step) and logps.isfinite().all()
    reading, both, planning, _, looking_up = (b - a for a, b in pairwise(times))
    return Measured(rows, sum(costs), reading, both - reading, planning, looking_up, peak)


def check(rows: int, model: str | None) -> str:
    """`dpo check` on generated rows, in a process of its own: seconds and resident peak, imports included."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_file(folder / "rows.jsonl", rows)
        if model is None:
            sys.path.insert(0, str(ROOT))
            from tests.helpers import make_model

            make_model().save_pretrained(folder / "tiny")
            local_tokenizer(None).save_pretrained(folder / "tiny")
            model = str(folder / "tiny")
        words = [
            sys.executable,
            "-m",
            "dpo_cli",
            "check",
            "--model",
            model,
            "--data",
            str(folder / "rows.jsonl"),
            "--json",
        ]
        began = time.perf_counter()
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
    assert status == 0, "dpo check failed"
    return f"| {rows:,} | {seconds:.1f} | {usage.ru_utime + usage.ru_stime:.1f} | {usage.ru_maxrss / 2**10:,.0f} |"


def local_tokenizer(model: str | None) -> Any:
    """The model's, or the small one of the tests."""
    if model:
        return load_tokenizer(find_model(model))
    sys.path.insert(0, str(ROOT))
    from tests.helpers import make_tokenizer

    return make_tokenizer()


def peak_mib() -> float:
    """Resident peak since ``forget_peak``; the imports' own is higher than what they leave."""
    return int(re.findall(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[0]) / 2**10


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--model", help="a model whose tokenizer to use; without it the tests' small one")
    parser.add_argument("--check", action="store_true", help="measure `dpo check` instead")
    arguments = parser.parse_args()
    print("| rows | seconds | CPU seconds | peak, MiB |\n|---:|---:|---:|---:|" if arguments.check else HEAD)
    for rows in arguments.rows:
        if arguments.check:
            print(check(rows, arguments.model), flush=True)
            continue
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            print(process.submit(measure, rows, arguments.model).result().line(), flush=True)


if __name__ == "__main__":
    main()
