"""The tables of docs/performance.md, "Arithmetic noise": which starts of bfloat16 runs are refused.

    python -m benchmarks.studies.noise

A start compares log-probs of the default model on 8 to 16 of the sample pairs, under two kernels. Kernels are emulated:
each linear layer has bfloat16 inputs, sums in float32 over one, two or three parts of them, and a bfloat16 output, as
on CUDA but that of the head. Starts are drawn from responses that are scored once per kernel.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from dpo_cli.config.options import TrainOptions
from dpo_cli.data.pairs import Pair, Pairs
from dpo_cli.models.attention import PREFIX_SHARED
from dpo_cli.models.loading import load_model
from dpo_cli.models.logprobs import ModelRunner, response_logps
from dpo_cli.models.noise import draw_probes, excess, measure_noise
from dpo_cli.models.split_weights import split_master_weights
from dpo_cli.training.prepare import choose_model, choose_tokenizer, read_pairs
from dpo_cli.utils.console import Reporter

SAMPLE = Path(__file__).parents[2] / "sample_data" / "train.jsonl"
CPU = torch.device("cpu")
KERNELS, STARTS = (1, 2, 3), 200
MATRICES = (
    "embed_tokens",  # which is the head, too
    "layers.0.self_attn.q_proj",
    "layers.0.mlp.down_proj",
    "layers.15.mlp.down_proj",
    "layers.29.self_attn.q_proj",
    "layers.29.mlp.down_proj",
)


@contextmanager
def kernel(parts: int, head: nn.Module | None = None) -> Iterator[None]:
    """Let each linear layer add up its inputs in so many parts while the block runs; ``head``'s output is float32."""
    plain = nn.Linear.forward

    def forward(self: nn.Linear, inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            x, weight = (each.bfloat16().float() for each in (inputs, self.weight))
            cut = [each.tensor_split(parts, dim=-1) for each in (x, weight)]
            total = sum((a @ b.T for a, b in zip(*cut, strict=True)), start=torch.zeros(()))
            total = total if self.bias is None else total + self.bias
            return total if self is head else total.bfloat16()

    nn.Linear.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Linear.forward = plain  # type: ignore[method-assign]


def score(runner: ModelRunner, pairs: Sequence[Pair], parts: int) -> Tensor:
    """Log-probs of pairs under a kernel: (P, 2) nats."""
    logps = torch.empty(len(pairs), 2)
    with kernel(parts, runner.head.module):
        for places, found in runner.forwards(pairs, lambda _, batch: (runner.token_logps(batch), batch.lengths)):
            logps[list(places)] = response_logps(*found).view(2, -1).T
    return logps


def refused(policies: Sequence[Tensor], references: Sequence[Tensor], tokens: Tensor, noise: float) -> str:
    """How many of the starts are refused that are drawn from pairs under a policy's and another one's kernel."""
    rng, found = random.Random(0), list[float]()
    for _ in range(STARTS):
        places = rng.sample(range(len(tokens)), rng.randint(8, 16))
        policy, reference = rng.choice([(p[places], r[places]) for p in policies for r in references if p is not r])
        found.append(excess((policy - reference).flatten(), tokens[places].flatten(), noise))
    return f"{sum(each > 1 for each in found)} of {STARTS}; up to {max(found):.2f}"


def study(mode: str, pairs: Pairs, changed: Pairs, runner: ModelRunner) -> Iterator[str]:
    """Lines of the tables for one memory mode: healthy starts, then references with one matrix scaled."""
    runner.probes = draw_probes(runner, pairs)
    if mode == "split":
        split_master_weights(runner.model)
    with kernel(1, runner.head.module):
        measure_noise(runner)
    tokens, other_tokens = (torch.from_numpy(each.loss_lengths) for each in (pairs, changed))
    healthy = [score(runner, pairs, parts) for parts in KERNELS]
    yield f"| {mode} | {runner.noise:.4f} | the same weights | {refused(healthy, healthy, tokens, runner.noise)} |"
    for name in MATRICES:
        weight = runner.model.get_parameter(f"model.{name}.weight")
        kept = weight.data
        for factor in (1.01, 1.05):
            weight.data = (kept.float() * factor).to(kept.dtype)
            scaled = score(runner, changed, KERNELS[1])
            others = [each[: len(changed)] for each in (healthy[0], healthy[2])]
            starts = refused([scaled], others, other_tokens, runner.noise)
            whole = max(excess((scaled - each).flatten(), other_tokens.flatten(), runner.noise) for each in others)
            yield f"| {mode} | {runner.noise:.4f} | {name} x {factor} | {starts}; all {len(changed)}: {whole:.2f} |"
        weight.data = kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=32, help="scored under each kernel; half of them per matrix")
    count, reporter = parser.parse_args().pairs, Reporter()
    options = TrainOptions(data=[str(SAMPLE)])
    source = choose_model(None, options, reporter)
    pairs = read_pairs(options.data, options, choose_tokenizer(source, options), reporter).pairs
    print("| weights | noise | reference | refused |\n|---|---:|---|---|")
    for mode in ("full", "split"):
        model = load_model(source)
        model.set_attn_implementation(PREFIX_SHARED)
        runner = ModelRunner(model, "shared", torch.bfloat16, 2048, CPU)
        for line in study(mode, pairs.select(range(count)), pairs.select(range(count // 2)), runner):
            print(line, flush=True)


if __name__ == "__main__":
    main()
