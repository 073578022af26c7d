"""What OpenMP threads that wait without spinning cost on a quiet CPU, and gain on one that other programs use.

``python -m benchmarks.busy_cpu``: a worker process for each setting of OpenMP, with a thread per core, takes the same
training steps in turns with the others, first alone, then beside a program that spins on each core. Prints medians as a
table for docs/performance.md. Of a machine that is not quiet to begin with, that is reported first.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
SETTINGS = {  # KMP_BLOCKTIME is not read by the libgomp that torch brings: as if nothing was set
    "nothing set": {"KMP_BLOCKTIME": "200"},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
    **{f"GOMP_SPINCOUNT={count}": {"GOMP_SPINCOUNT": str(count)} for count in (1_000, 10_000, 100_000)},
}
LAYERS = 3  # of SmolLM2-135M's 30, at its widths
TOKENS = 500  # of a step


def work() -> None:
    """Take as many steps as each line of stdin asks for; print their seconds and processor seconds."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from dpo_cli.losses.objective import Objective
    from dpo_cli.models.attention import PREFIX_SHARED
    from dpo_cli.models.logprobs import ModelRunner
    from dpo_cli.training.optimizer import make_optimizer
    from tests.helpers import random_pairs

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    config = AutoConfig.for_model("llama", vocab_size=8192, num_hidden_layers=LAYERS, **sizes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=PREFIX_SHARED)
    runner = ModelRunner(model, "shared", torch.float32, 2**20, torch.device("cpu"))
    batch = runner.batch(random_pairs(TOKENS // 150, longest=100))
    objective, optimizer = Objective(), make_optimizer(model, 0.0)
    print("ready", flush=True)
    for line in sys.stdin:
        began, used = time.perf_counter(), time.process_time()
        for _ in range(int(line)):
            hidden = runner.body(batch)
            for pairs in hidden.head_pieces():
                objective(pairs).sum().backward()
            hidden.backward()
            optimizer.step()
            optimizer.zero_grad()
        print(time.perf_counter() - began, time.process_time() - used, flush=True)


class Worker:
    """A process with one setting of OpenMP; it waits for its turn."""

    def __init__(self, setting: dict[str, str], holding: ExitStack) -> None:
        environment = {name: value for name, value in os.environ.items() if name not in (*WAITING, "OMP_NUM_THREADS")}
        command = [sys.executable, "-m", "benchmarks.busy_cpu", "--worker"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
        self.process = holding.enter_context(subprocess.Popen(command, env=environment | setting, **pipes))
        holding.callback(self.process.kill)
        self._read()

    def _read(self) -> list[str]:
        assert self.process.stdout
        if not (line := self.process.stdout.readline()):
            raise SystemExit("a worker failed")
        return line.split()

    def take(self, steps: int) -> tuple[float, float]:
        """Seconds and processor seconds of so many steps."""
        assert self.process.stdin
        print(steps, file=self.process.stdin, flush=True)
        seconds, used = map(float, self._read())
        return seconds, used


@contextmanager
def busy(programs: int) -> Iterator[None]:
    """Let so many programs spin meanwhile."""
    spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(programs)]
    try:
        yield
    finally:
        for each in spinning:
            each.kill()
            each.wait()


def idle_share(seconds: float = 3.0) -> float:
    """The share of the processor time that is free, by this machine's own count."""
    rows = []
    for _ in range(2):
        with open("/proc/stat") as file:  # noqa: PTH123
            rows.append([int(each) for each in file.readline().split()[1:]])
        time.sleep(seconds * (len(rows) == 1))
    used = [after - before for before, after in zip(*rows, strict=True)]
    return used[3] / sum(used)


def measure(workers: dict[str, Worker], steps: int, budget: float) -> dict[str, tuple[float, float, float]]:
    """Let the workers take turns until the budget is used.

    Medians: of the seconds per step, of their ratio to the first worker's in the same turn, of the processor seconds.
    """
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in workers}
    began, order = time.monotonic(), [*workers]
    while time.monotonic() - began < budget or len(taken[order[0]]) < 3:
        order = order[1:] + order[:1]  # no setting always follows the same one
        for name in order:
            taken[name].append(workers[name].take(steps))
    medians, first = {}, [seconds for seconds, _ in taken[next(iter(workers))]]
    for name, turns in taken.items():
        seconds, used = zip(*turns, strict=True)
        ratios = [own / other for own, other in zip(seconds, first, strict=True)]
        medians[name] = statistics.median(seconds) / steps, statistics.median(ratios), statistics.median(used) / steps
    print(f"{len(taken[order[0]])} turns of {steps} steps each", file=sys.stderr)
    return medians


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=130.0, help="of each of the two parts")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=[*SETTINGS], help="compared with the first")
    options = parser.parse_args()
    if options.worker:
        return work()
    cores = len(os.sched_getaffinity(0))
    if (idle := idle_share()) < 0.9:
        print(f'NOT QUIET: {1 - idle:.0%} of the processors is in use; the column "quiet" holds nothing')
    with ExitStack() as holding:
        workers = {name: Worker(SETTINGS[name], holding) for name in options.settings}
        alone = {name: [worker.take(1) for _ in range(3)][-1][0] for name, worker in workers.items()}  # warm
        steps = max(1, round(1.0 / min(alone.values())))  # a turn takes about a second
        quiet = measure(workers, steps, options.seconds)
        with busy(cores):
            loaded = measure(workers, 1, options.seconds)
    print(
        f"{cores} threads on {cores} cores; medians per step of about {TOKENS} tokens; loaded: a program on each core"
    )
    print("| | quiet, s | of nothing set | processor s | loaded, s | of nothing set | processor s |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name in options.settings:
        cells = [name if name == "nothing set" else f"`{name}`"]
        for found in (quiet, loaded):
            cells += [f"{number:.3f}" for number in found[name]]
        print("| " + " | ".join(cells) + " |")
    return None


if __name__ == "__main__":
    main()
