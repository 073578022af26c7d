"""What prompt trees save: tokens of any data, and the seconds of this package, of pair sharing and of TRL in turns.

    python -m benchmarks.trl.trees --data pairs.jsonl --batch-size 8          tokens
    python -m benchmarks.trl.trees --case agent ranked turns --rounds 2       seconds

The cases are random words in the shapes of agents' rows (a long system prompt with tools that all rows have), of
ranked answers (all six pairs of four answers), and of conversations with a preference at each of six turns. A step
takes all rows of a case, which therefore run for several epochs. Prints Markdown for docs/performance.md.
"""

from __future__ import annotations

import argparse
import random
import re
import statistics
import sys
import tempfile
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from benchmarks.trl.bench import COMMANDS, make_environment, take_turns
from benchmarks.trl.cases import ROOT, Record, write_records
from benchmarks.trl.commands import SEEN
from benchmarks.trl.meter import Worker
from benchmarks.trl.shapes import ready_model
from dpo_cli.data.pairs import Pairs
from dpo_cli.data.rows import read_rows
from dpo_cli.data.schedule import row_costs, step_pairs
from dpo_cli.data.sources import find_sources
from dpo_cli.data.tokenize import tokenize_rows
from dpo_cli.data.trees import tree_tokens
from dpo_cli.models.loading import load_tokenizer
from dpo_cli.models.locate import find_model

SIDES = {**COMMANDS, "pairs": [sys.executable, "-m", "benchmarks.trl.pair_sharing"]}


class Words:
    """Random words of so many tokens."""

    def __init__(self, tokenizer: Any, seed: int = 0) -> None:
        sample = (ROOT / "sample_data" / "train-strings.jsonl").read_text(encoding="utf-8")
        words = sorted(set(re.findall(r"\b[a-z]{2,9}\b", sample)))
        self.words = [f" {word}" for word in words if len(tokenizer(f" {word}").input_ids) == 1]
        self.rng = random.Random(seed)

    def __call__(self, tokens: int) -> str:
        return "".join(self.rng.choice(self.words) for _ in range(tokens))


def agent(text: Words) -> list[Record]:
    """32 pairs of 200 + 2 x 100 tokens behind one system prompt of 1,000."""
    system = text(1000)
    return [{"prompt": system + text(200), "chosen": text(99), "rejected": text(99)} for _ in range(32)]


def ranked(text: Words) -> list[Record]:
    """All pairs of four answers of 100 tokens to each of four prompts of 200."""
    rows = []
    for _ in range(4):
        prompt, answers = text(200), [text(99) for _ in range(4)]
        rows += [{"prompt": prompt, "chosen": a, "rejected": b} for a, b in combinations(answers, 2)]
    return rows


def turns(text: Words) -> list[Record]:
    """Four conversations with a preference at each of six turns: questions of 50 tokens, answers of 100."""
    rows = []
    for _ in range(4):
        prompt = text(100)
        for _ in range(6):
            prompt, chosen = prompt + text(50), text(99)
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": text(99)})
            prompt += chosen
    return rows


CASES = {case.__name__: case for case in (agent, ranked, turns)}


def count(pairs: Pairs, batch_size: int) -> str:
    """A table of the tokens of one epoch."""
    steps = step_pairs(pairs, batch_size, 1, None, 0)
    padded, alone = row_costs(pairs, "padded"), row_costs(pairs, "packed")
    by_step = sum(tree_tokens([pairs[i] for i in step]) for step in steps)
    tokens = {
        f"padded batches of {batch_size}": sum(len(step) * max(padded[i] for i in step) for step in steps),
        "sequences without padding": sum(alone),
        "pairs that share their prompt": sum(len(p.prompt) + len(p.chosen) + len(p.rejected) for p in pairs),
        f"trees within steps of {batch_size}": by_step,
        "trees over the whole file": tree_tokens(pairs),
    }
    lines = [f"| {name} | {number:,} | {number / by_step:.2f} |" for name, number in tokens.items()]
    return "\n".join(
        [f"{len(pairs):,} pairs\n", "| layout | tokens | times trees within steps |", "|---|---:|---:|", *lines]
    )


def measure(name: str, args: argparse.Namespace, model: Path, folder: Path, environment: dict[str, str]) -> str:
    """Rows of a table: pairs per second of each side, phase by phase, and how many times the others'."""
    rows = CASES[name](Words(load_tokenizer(find_model(str(model)))))
    steps = 1 + args.rounds
    records = write_records(folder / "rows.jsonl", rows)
    options = {"batch_size": len(rows), "epochs": steps, "lr": 1e-5, "beta": 0.1, "seed": 0, "dtype": args.dtype}
    job = {
        "model": str(model),
        "train": str(records),
        "held_out": str(write_records(folder / "held_out.jsonl", rows[:1])),
        "options": options | {"max_length": 4096, "save_steps": 0, "format": "strings"},
        "order": [list(range(len(rows)))] * steps,
        "trl_batch": args.trl_batch,
        "ours_options": "",
        "limit": 3600.0,
    }
    some = args.other_pairs or len(rows)
    fewer = {"options": job["options"] | {"batch_size": some}, "order": [list(range(some))] * steps}
    blocks = {side: [len(rows) if side == "ours" else some] * steps for side in args.sides}
    dead: list[str] = []
    workers: dict[str, Worker] = {}
    lines, losses = [], {}
    try:
        for side in args.sides:
            (own := folder / side).mkdir()
            mine = job | {"folder": str(own)} | ({} if side == "ours" else fewer)
            if side != "ours":
                mine["train"] = str(write_records(own / "rows.jsonl", rows[:some]))
            workers[side] = Worker(SIDES[side], mine, own / "log", environment | SEEN.get(side, {}), 3600.0)
        for phase in args.phases:
            took, said = take_turns(workers, phase, blocks, dead)
            losses |= {side: each["losses"] for side, each in said.items() if "losses" in each}
            after = {side: blocks[1:] for side, blocks in took.items()}  # the first is a warm-up
            seconds, cpu = (
                {side: statistics.median(block[unit] for block in blocks) for side, blocks in after.items()}
                for unit in ("seconds", "cpu_seconds")
            )
            peak = {side: max(block["peak"] for block in blocks) for side, blocks in took.items()}
            cells = [f"{blocks[side][0] / seconds[side]:.2f}" if side in seconds else "–" for side in SIDES]
            for side in ("trl", "pairs"):
                more = len(rows) / blocks[side][0] if side in blocks else 1
                ratios = [more * each[side] / each["ours"] for each in (seconds, cpu) if {side, "ours"} <= each.keys()]
                cells.append("{:.2f} ({:.2f})".format(*ratios) if ratios else "–")
            cells.append(", ".join(f"{peak[side]:,.0f}" for side in peak))
            lines.append(f"| {name} | {phase} | {' | '.join(cells)} |")
    finally:
        for worker in workers.values():
            worker.close()
    same = [each for side, each in losses.items() if blocks[side] == blocks["ours"]]
    off = max((abs(a - b) for each in same for a, b in zip(each, losses["ours"], strict=True)), default=0.0)
    lines.append(f"<!-- {name}: losses differ by at most {off:.1e}{''.join('; ' + text for text in dead)} -->")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", action="append", help="count the tokens of this file; repeatable")
    add("--batch-size", type=int, default=8)
    add("--case", nargs="+", choices=CASES, default=[])
    add("--model", help="as of `dpo train`; default: its default")
    add("--shape", help="random weights of this shape instead of a model")
    add("--rounds", type=int, default=2)
    add("--phases", nargs="+", choices=("precompute", "train"), default=["precompute", "train"])
    add("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    add("--trl-batch", type=int, default=2, help="pairs per forward of TRL, accumulated to a step")
    add("--other-pairs", type=int, help="pairs of a step of the other sides, which share none; default: all")
    add("--dtype", default="float32")
    add("--device", choices=("cpu", "cuda"), default="cuda" if Path("/dev/nvidia0").exists() else "cpu")
    args = parser.parse_args(arguments)
    if args.data:
        tokenizer = load_tokenizer(find_model(args.model))
        print(count(tokenize_rows(read_rows(find_sources(args.data)), tokenizer).pairs, args.batch_size))
    if args.case:
        print(
            "| case | phase | ours, pairs/s | TRL, pairs/s | pair sharing, pairs/s | TRL / ours, seconds (CPU) | "
            "pair sharing / ours, seconds (CPU) | peak MiB |\n|---|---|---:|---:|---:|---:|---:|---|",
            flush=True,
        )
    for name in args.case:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            model = ready_model(args.model, args.shape, folder / "model")
            print(measure(name, args, model, folder, make_environment(args, folder)), flush=True)


if __name__ == "__main__":
    main()
