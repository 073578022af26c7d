"""Run this package and TRL's DPOTrainer in turns on the same pairs, and say how much faster which is.

    python -m benchmarks.trl.bench --case hh ultrafeedback
    python -m benchmarks.trl.bench --case weak --grid 1 2 4 8 16 --json weak.json
    python -m benchmarks.trl.bench --data pairs.jsonl --phases precompute train eval start sweep

Each side is a process with its own model; they work alternately, block by block, never at the same time. Both have the
same start weights, pairs, order, precision, optimizer and schedule; their losses are compared, and a result whose
losses differ is VOID. Prints Markdown for docs/performance.md. Exit code 1: a result is void, or a worker failed for
another reason than memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import math
import os
import shlex
import signal
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from transformers import AutoConfig

from benchmarks.trl.cases import CASES, ROOT, as_record, step_order, synthetic_rows, usable_rows, write_records
from benchmarks.trl.commands import SEEN, measure_command, measure_start, measure_sweep
from benchmarks.trl.meter import MEMORY, Message, Worker, WorkerDiedError
from benchmarks.trl.report import report
from benchmarks.trl.shapes import SHAPES, Arithmetic, measure_device, ready_model
from dpo_cli.config.options import TrainOptions
from dpo_cli.data.pairs import Pair
from dpo_cli.models.loading import load_tokenizer
from dpo_cli.models.locate import find_model
from dpo_cli.reference.store import pair_length

COMMANDS = {
    side: [sys.executable, "-m", f"benchmarks.trl.{name}"] for side, name in (("ours", "ours"), ("trl", "theirs"))
}
BLOCK_PHASES = ("precompute", "train", "eval")
COMMAND_PHASES = ("start", "sweep")  # whole commands, which differ little from case to case
PHASES = (*BLOCK_PHASES, *COMMAND_PHASES, "command")
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}  # of a step's loss, nats


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--case", nargs="+", choices=[*CASES, "all"], default=["hh", "ultrafeedback"], help="lengths of random words")
    add("--data", action="append", help="a file of strings instead of --case; repeatable")
    add("--columns", help="as of `dpo train`")
    add(
        "--longest",
        type=int,
        help="longest prompt + response, tokens; default: 1024 of --data, else 600 (4096 on CUDA)",
    )
    add("--rows", type=int, help="train on so many rows instead of counting by --rounds")
    add("--model", help="as of `dpo train`; default: its default")
    add("--shape", choices=SHAPES, help="random weights of this shape instead of a model")
    add("--phases", nargs="+", choices=PHASES, default=["precompute", "train", "eval", "start"])
    add("--rounds", type=int, default=2, help="measured blocks a phase")
    add("--pairs", type=int, default=8, help="pairs of a block, at least a batch")
    add("--batch-size", type=int, help="pairs of an optimizer step; default: 8, the largest of --grid, of weak 1")
    add("--grid", type=int, nargs="+", help="TRL's per-device batch sizes, accumulated to the same optimizer batch")
    add("--dtype", choices=TOLERANCE, help="default: float32 on the CPU, bfloat16 on CUDA")
    add("--device", choices=["cpu", "cuda"], default="cuda" if Path("/dev/nvidia0").exists() else "cpu")
    add("--lr", type=float, default=1e-5)
    add("--beta", type=float, default=0.1)
    add("--seed", type=int, default=0)
    add("--sides", nargs="+", choices=COMMANDS, default=list(COMMANDS))
    add("--ours-options", default="", help="flags of `dpo train` for our side: --ours-options='--lr 1e-6'")
    add("--tolerance", type=float, help="of a loss; default: 1e-4 in float32, 2e-2 in bfloat16")
    add("--limit", type=float, default=1800.0, help="seconds that one answer of a worker may take")
    add("--json", type=Path, help="write every number to this file")
    add("--smoke", action="store_true", help="a tiny model, all phases, one round: does it run and agree?")
    args = parser.parse_args(arguments)
    if args.smoke:
        args.shape, args.phases, args.rounds, args.pairs = args.shape or "tiny", list(PHASES[:5]), 1, 4
        args.batch_size, args.case = args.batch_size or 2, args.case[:1]
    args.dtype = args.dtype or ("bfloat16" if args.device == "cuda" else "float32")
    args.tolerance = TOLERANCE[args.dtype] if args.tolerance is None else args.tolerance
    if importlib.util.find_spec("trl") is None and "trl" in args.sides:
        print("TRL is not installed: measuring our side alone", file=sys.stderr)
        args.sides = ["ours"]
    return args


@dataclasses.dataclass
class Case:
    """Pairs of one case, as the workers get them, and what it takes to put their seconds in proportion."""

    name: str
    job: Message
    ordered: list[Pair]  # training pairs in their order
    held_out: list[Pair]
    blocks: list[int]  # pairs of each block, a warm-up first
    arithmetic: Arithmetic

    def block_pairs(self, phase: str, block: int) -> list[Pair]:
        if phase == "eval":
            return self.held_out
        start = sum(self.blocks[:block])
        return self.ordered[start : start + self.blocks[block]]


def make_case(name: str, args: argparse.Namespace, model: Path, folder: Path) -> Case:
    """Write the rows of a case and lay out its blocks; files go to the empty ``folder``."""
    lengths = CASES.get(name)
    batch_size = args.batch_size or (lengths and lengths.batch_size) or max(args.grid or [8])
    block = max(args.pairs // batch_size, 1) * batch_size
    rounds = args.rounds
    if args.rows:
        rounds = max((args.rows - batch_size) // block, 1)
    blocks = [batch_size] + [block] * rounds
    # TRL's padded forward of 8 pairs of 1,024 tokens in float32 does not fit 24 GiB.
    longest = args.longest or (1024 if args.data else 600 if args.device == "cpu" else 4096)
    limit = getattr(AutoConfig.from_pretrained(model).get_text_config(), "max_position_embeddings", longest)
    longest = min(longest, limit)
    options = {"batch_size": batch_size, "lr": args.lr, "beta": args.beta, "seed": args.seed, "dtype": args.dtype}
    options |= {"max_length": longest, "save_steps": 0}
    files, rows = args.data, sum(blocks)
    if lengths:
        count = 2 * (rows + block)  # some come out too long
        made = synthetic_rows(lengths, count, load_tokenizer(find_model(str(model))), longest, args.seed)
        files = [str(write_records(folder / "made.jsonl", made))]
    settings = TrainOptions(model=str(model), data=files, columns=args.columns if not lengths else None, **options)
    found = usable_rows(settings, rows + block)
    order = step_order(rows, settings)
    records = [as_record(row) for row, _ in found]
    job = {
        "model": str(model),
        "folder": str(folder),
        "train": str(write_records(folder / "train.jsonl", records[:rows])),
        "held_out": str(write_records(folder / "heldout.jsonl", records[rows:])),
        "options": options | {"format": "strings"},
        "order": order,
        "trl_batch": batch_size,
        "sides": args.sides,
        "ours_options": args.ours_options,
        "limit": args.limit,
    }
    pairs = [pair for _, pair in found]
    ordered = [pairs[place] for step in order for place in step]
    return Case(name, job, ordered, pairs[rows:], blocks, Arithmetic.of(model))


def make_environment(args: argparse.Namespace, folder: Path) -> dict[str, str]:
    """What the processes of both sides see: no network, no progress bars, no cache but the benchmark's."""
    own = {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    own |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    own |= {
        "TOKENIZERS_PARALLELISM": "false",
        "HF_DATASETS_CACHE": str(folder / "datasets"),
        "PYTHONWARNINGS": "ignore",
    }
    if args.device == "cpu":
        own["CUDA_VISIBLE_DEVICES"] = ""
    if args.shape == "tiny":
        own["OMP_NUM_THREADS"] = "1"
    return os.environ | own


def take_turns(
    workers: dict[str, Worker], phase: str, blocks: Mapping[str, Sequence[int]], dead: list[str]
) -> tuple[dict[str, list[Message]], dict[str, Message]]:
    """Run a phase block by block, one side after the other. A worker that dies leaves ``workers``; ``dead`` tells why.

    ``blocks`` are the pairs of each block, by side, equally many.

    Returns: what each block took, and what each side said at the end, by side.
    """
    took: dict[str, list[Message]] = {side: [] for side in workers}
    said: dict[str, Message] = {}
    for number in range(-1, min(map(len, blocks.values()))):
        for side in list(workers):
            try:
                if number < 0:
                    workers[side].ask({"phase": phase, "blocks": list(blocks[side])})
                else:
                    block, last = workers[side].block()
                    took[side].append(block)
                    said[side] = last.get("finished", {})
            except WorkerDiedError as error:
                dead.append(f"{side}, {phase}: {error}")
                workers.pop(side).close()
    return {side: took[side] for side in workers}, said


def measure_blocks(
    case: Case, phases: Sequence[str], environment: dict[str, str], rate: float, dead: list[str]
) -> Message:
    """The phases that two long-lived workers run; the losses of both, and whether they read the same tokens."""
    found: Message = {"lines": [], "loss_difference": 0.0, "same_ids": True, "about": {}}
    workers: dict[str, Worker] = {}
    try:
        for side in case.job["sides"] if phases else ():
            folder = Path(case.job["folder"]) / f"{side}-{case.job['trl_batch']}"
            folder.mkdir()
            try:
                job, sees = case.job | {"folder": str(folder)}, environment | SEEN[side]
                workers[side] = Worker(COMMANDS[side], job, folder / "log", sees, case.job["limit"])
            except WorkerDiedError as error:
                dead.append(f"{side}, start: {error}")
        found["about"] = {side: worker.about for side, worker in workers.items()}
        found["same_ids"] = len({tuple(worker.about["ids"]) for worker in workers.values()}) <= 1
        for phase in phases:
            took, said = take_turns(workers, phase, dict.fromkeys(workers, case.blocks), dead)
            found["lines"].append(summarize(case, phase, took, rate))
            losses = [said[side]["losses"] for side in took if "losses" in said.get(side, {})]
            if len(losses) == 2:
                apart = [abs(a - b) if math.isfinite(a - b) else math.inf for a, b in zip(*losses, strict=True)]
                found["loss_difference"] = max(found["loss_difference"], *apart)
                found["lines"][-1]["losses"] = dict(zip(took, losses, strict=True))
    finally:
        for worker in workers.values():
            worker.close()
    return found


def summarize(case: Case, phase: str, took: Mapping[str, Sequence[Message]], rate: float) -> Message:
    """Medians over the blocks after the warm-up. Units: pairs/s, tokens/s (a prompt once), seconds, MiB."""
    line: Message = {"phase": phase}
    rates: dict[str, list[float]] = {}
    for side, blocks in took.items():
        pairs = [case.block_pairs(phase, number) for number in range(1, len(blocks))]
        seconds = [block["seconds"] for block in blocks[1:]]
        rates[side] = [len(block) / s for block, s in zip(pairs, seconds, strict=True)]
        cpu = [block["cpu_seconds"] for block in blocks[1:]]
        every = [pair for block in pairs for pair in block]
        flops = case.arithmetic.flops(every, backward=phase in ("train", "command"))
        line[side] = {
            "pairs_per_s": statistics.median(rates[side]),
            "tokens_per_s": sum(map(pair_length, every)) / sum(seconds),
            "cpu_s_per_pair": sum(cpu) / len(every) if None not in cpu else None,
            "peak": max(block["peak"] for block in blocks),
            "matmul_share": flops / sum(seconds) / rate,
            "blocks": list(blocks),
        }
    if len(rates) == 2:
        line["ratio"] = line["ours"]["pairs_per_s"] / line["trl"]["pairs_per_s"]
        apart = [a / b for a, b in zip(rates["ours"], rates["trl"], strict=True)]
        line["ratio_range"] = [min(apart), max(apart)]
    return line


def run_case(case: Case, args: argparse.Namespace, environment: dict[str, str], rate: float) -> Message:
    """All phases of one case with one batch size of TRL's."""
    dead: list[str] = []
    result: Message = {"case": case.name, "trl_batch": case.job["trl_batch"], "batch_size": case.blocks[0]}
    result |= {"pairs": len(case.ordered), "tokens": sum(map(pair_length, case.ordered)), "dead": dead}
    result |= measure_blocks(case, [p for p in BLOCK_PHASES if p in args.phases], environment, rate, dead)
    result["void"] = not result["same_ids"] or not result["loss_difference"] <= args.tolerance
    if "start" in args.phases:
        result["lines"] += measure_start(case.job, environment, dead)
    if "sweep" in args.phases:
        result["lines"] += measure_sweep(case.job, environment, dead, args.smoke)
    if "command" in args.phases and (found := measure_command(case.job, environment, dead)):
        # the command's steps as blocks; what processor time it took has its start in it, and is left out
        seconds = [found["moments"][0], *(b - a for a, b in pairwise(found["moments"]))]
        blocks = [{"seconds": each, "cpu_seconds": None, "peak": found["peak"]} for each in seconds]
        steps = dataclasses.replace(case, blocks=[case.blocks[0]] * len(seconds))
        result["lines"].append(summarize(steps, "command", {"ours": blocks}, rate))
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    results: list[Message] = []
    names = ["data"] if args.data else list(CASES) if "all" in args.case else args.case
    typed = shlex.join(["python", "-m", "benchmarks.trl.bench", *(sys.argv[1:] if arguments is None else arguments)])
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        model = ready_model(args.model, args.shape, root / "model")
        found = measure_device(args.dtype, args.device, make_environment(args, root))
        for name in names:
            for trl_batch in args.grid or [None]:
                folder = root / f"{name}-{trl_batch}"
                folder.mkdir()
                case = make_case(name, args, model, folder)
                case.job["trl_batch"] = trl_batch or case.job["trl_batch"]
                if case.blocks[0] % case.job["trl_batch"]:
                    print(f"--grid {trl_batch}: no part of {name}'s batches of {case.blocks[0]}", file=sys.stderr)
                    continue
                print(f"{name}, TRL's batch {case.job['trl_batch']} …", file=sys.stderr, flush=True)
                results.append(run_case(case, args, make_environment(args, folder), found["matmul_rate"]))
                args.phases = [phase for phase in args.phases if phase not in COMMAND_PHASES]  # of one case only
                if args.json:
                    args.json.write_text(json.dumps({"command": typed, "results": results} | found, indent=1) + "\n")
    print(report(results, args, typed, found))
    ends = [text for result in results for text in result["dead"]]
    failed = not all(any(told in text for told in MEMORY) for text in ends)
    return int(failed or any(result["void"] for result in results))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))  # so that workers and files are cleared away
    sys.exit(main())
