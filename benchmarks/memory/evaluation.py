"""What an evaluation costs beside one scoring pass of a model: seconds in turns, and memory by number of pairs.

    python -m benchmarks.memory.evaluation                      # the default model, 24 sample pairs
    python -m benchmarks.memory.evaluation --pairs 60 --repeats 5 --model MODEL
    python -m benchmarks.memory.evaluation --memory 500 2000 8000

Time: policy and reference are the same model, weights slightly moved. A pass is what ``dpo precompute-ref`` does to
each pair; the evaluation without distributions is a pass of the policy; the exact one records one model and compares
the other, loading left out. Each round runs all three; ratios are of medians, beside them those of CPU time.

Memory: resident peak of a process (Linux) that evaluates so many generated pairs with a tiny model, beyond what it held
before its first forward, the pairs' own ids included.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.memory.rows import forget_peak, peak_mib
from dpo_cli.data.pairs import Pairs
from dpo_cli.data.rows import read_rows
from dpo_cli.data.sources import find_sources
from dpo_cli.data.tokenize import tokenize_rows
from dpo_cli.evaluation import kl
from dpo_cli.evaluation.evaluator import Evaluator
from dpo_cli.losses.objective import Objective
from dpo_cli.models.attention import PREFIX_SHARED
from dpo_cli.models.loading import compute_dtype, load_model, load_tokenizer
from dpo_cli.models.locate import find_model
from dpo_cli.models.logprobs import ModelRunner
from dpo_cli.utils.console import Reporter
from dpo_cli.utils.devices import device_kind, start

ROOT = Path(__file__).parents[2]
PROGRESS = Reporter(quiet=True).progress("benchmark", 1)
MAX_TOKENS = 2048


def scorer_of(model: Any) -> ModelRunner:
    device = start()
    model.to(device).set_attn_implementation(PREFIX_SHARED)
    return ModelRunner(model, "shared", compute_dtype(None, device_kind(device)), MAX_TOKENS, device)


@torch.no_grad()
def moved(model: Any, by: float = 0.01) -> Any:
    for parameter in model.parameters():
        parameter.mul_(1 + by * torch.randn_like(parameter))
    return model


def exact(policy: ModelRunner, reference: ModelRunner, pairs: Pairs, folder: Path) -> kl.TokenScores:
    recorded = kl.record(policy, pairs, folder, PROGRESS)
    return kl.compare(reference, recorded, pairs, PROGRESS, policy_runs=False)


def times(name: str | None, count: int, repeats: int) -> None:
    source = find_model(name)
    tokenizer = load_tokenizer(source)
    rows = read_rows(find_sources([str(ROOT / "sample_data" / "heldout.jsonl")]))
    pairs = tokenize_rows(rows, tokenizer).pairs.select(range(count))
    policy, reference = scorer_of(moved(load_model(source))), scorer_of(load_model(source))
    with tempfile.TemporaryDirectory() as folder:
        ways: dict[str, Callable[[], Any]] = {
            "a pass (precompute)": lambda: list(
                reference.forwards(pairs, lambda _, batch: reference.token_logps(batch))
            ),
            "evaluation, --kl none": lambda: kl.score(policy, pairs, PROGRESS),
            "evaluation, exact": lambda: exact(policy, reference, pairs, Path(folder)),
        }
        taken: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
        ways["a pass (precompute)"]()  # warm
        for _ in range(repeats):
            for way, run in ways.items():
                began = time.perf_counter(), time.process_time()
                run()
                taken[way].append((time.perf_counter() - began[0], time.process_time() - began[1]))
    tokens = int(pairs.lengths.sum())
    print(
        f"{len(pairs)} pairs, {tokens:,} tokens, {int(pairs.loss_lengths.sum()):,} of them with loss; {repeats} rounds"
    )
    print("| | seconds, median | passes | passes, CPU time | tokens/s |\n|---|---:|---:|---:|---:|")
    medians = {way: [statistics.median(each) for each in zip(*seen, strict=True)] for way, seen in taken.items()}
    unit = medians["a pass (precompute)"]
    for way, (wall, cpu) in medians.items():
        print(f"| {way} | {wall:.1f} | {wall / unit[0]:.2f} | {cpu / unit[1]:.2f} | {tokens / wall:,.0f} |")


def memory(count: int) -> str:
    """One line of the table of memory, in a process of its own."""
    sys.path.insert(0, str(ROOT))
    from tests.helpers import make_model, make_tokenizer, random_pairs

    torch.set_num_threads(1)
    pairs = Pairs(random_pairs(count, longest=60))
    policy, reference = (scorer_of(make_model(seed=seed, vocab_size=8192)) for seed in (0, 1))
    tokenizer = make_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        exact(policy, reference, pairs.select(range(200)), Path(folder))  # what the libraries take once
        forget_peak()
        before = peak_mib()
        compared = exact(policy, reference, pairs, Path(folder))
        forwards = peak_mib() - before
        evaluator = Evaluator(pairs, tokenizer, Objective())
        evaluator.evaluation(evaluator.scores(compared), compared, [], {})
        tokens = compared.tokens.nbytes / 2**20
    return (
        f"| {count:,} | {int(pairs.loss_lengths.sum()):,} | {forwards:.0f} | {peak_mib() - before:.0f} | {tokens:.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", type=int, nargs="*")
    arguments = parser.parse_args()
    if not arguments.memory:
        times(arguments.model, arguments.pairs, arguments.repeats)
        return
    print("| pairs | tokens with loss | passes, MiB more | whole evaluation, MiB more | of these the token table |")
    print("|---:|---:|---:|---:|---:|")
    for count in arguments.memory:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            print(process.submit(memory, count).result(), flush=True)


if __name__ == "__main__":
    main()
