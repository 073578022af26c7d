"""Does DPO find what its theory says? A language whose every response is known, and preferences by Bradley and Terry.

    python -m benchmarks.studies.recovery                        # prints the tables; writes docs/images/recovery.png
    python -m benchmarks.studies.recovery --seeds 1 --quick      # the population's loss alone, no picture

The policy is a small transformer over 4 letters; a response is 3 of them, so that a prompt has 64, whose probabilities
sum to 1. Each has a true reward of its own, standard normal, that no other tells anything of. People prefer by

    P(y over y') = sigma(r(y) - r(y')),

and by theory the loss is lowest for one policy, whatever pairs are compared (equations 4 to 7 of arXiv 2305.18290):

    pi*(y|x) = ref(y|x) exp(r(y)/beta) / Z(x),   so that   beta log pi*(y|x)/ref(y|x) = r(y) - beta log Z(x).

Training is the package's own: its scorer gives the log-probs, its objective the loss of each pair in each order, by
weight, its optimizer and schedule the steps. The weights are those of the population, or counts of what was drawn.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from dpo_cli.config.options import TrainOptions
from dpo_cli.data.batching import collate
from dpo_cli.data.pairs import Pair
from dpo_cli.evaluation.statistics import student
from dpo_cli.losses.objective import Objective
from dpo_cli.losses.preference import Preferences
from dpo_cli.models.logprobs import ModelRunner, response_logps
from dpo_cli.reporting.plots import COLORS, Plot, write_plots
from dpo_cli.training.optimizer import learning_rate, make_optimizer

Table = npt.NDArray[np.float64]

LETTERS, LENGTH = 4, 3
RESPONSES = np.array(list(itertools.product(range(LETTERS), repeat=LENGTH)), np.int32)  # (R, LENGTH)
# Two letters that differ: attention without a first token of its own cannot count equal ones.
PROMPTS = [np.array(letters, np.int32) for letters in ((0, 1), (2, 3))]
FIRST, SECOND = np.triu_indices(len(RESPONSES), 1)  # of every pair
ORDERS = torch.from_numpy(np.stack([np.concatenate([FIRST, SECOND]), np.concatenate([SECOND, FIRST])]))
BATCH = collate([Pair("", prompt, *two) for prompt in PROMPTS for two in RESPONSES.reshape(-1, 2, LENGTH)], "padded")
STEPS, LR = 400, 5e-3
BETAS, USUAL = (0.2, 0.5, 1.0), 0.5
DRAWN = (1_000, 10_000, 100_000, 1_000_000)  # preferences a prompt
PICTURE = Path(__file__).parents[2] / "docs" / "images" / "recovery.png"


@dataclass(frozen=True)
class Toy:
    """A reference policy, and what its responses are worth: (prompts, R)."""

    reference: ModelRunner
    rewards: Table

    @property
    def logps(self) -> Table:
        """Of the reference: (prompts, R) nats."""
        return log_probs(self.reference).detach().double().numpy()

    def shares(self, said: bool = False) -> Table:
        """How often each pair is compared: (prompts, pairs); all alike, or as often as the reference ``said`` both."""
        says = np.exp(self.logps) if said else np.ones_like(self.rewards)
        both = says[:, FIRST] * says[:, SECOND]
        return both / both.sum(1, keepdims=True)

    def preferred(self) -> Table:
        """How likely the first of each pair is the preferred one: (prompts, pairs)."""
        return 1 / (1 + np.exp(self.rewards[:, SECOND] - self.rewards[:, FIRST]))

    def population(self, said: bool = False) -> Table:
        """Weight of each pair in both orders, first over second and second over first: (2, prompts, pairs)."""
        won = self.preferred()
        return np.stack([won, 1 - won]) * self.shares(said)

    def drawn(self, count: int, seed: int) -> Table:
        """The same by what ``count`` draws of a pair and its preference gave, to each prompt."""
        rng = np.random.default_rng(seed)
        compared = np.stack([rng.multinomial(count, shares) for shares in self.shares()])
        won = rng.binomial(compared, self.preferred())
        return np.stack([won, compared - won]) / count

    def optimum(self, beta: float) -> Table:
        """The policy that theory names: (prompts, R)."""
        logs = self.logps + self.rewards / beta
        return np.exp(logs - np.logaddexp.reduce(logs, 1, keepdims=True))


def make_toy(seed: int) -> Toy:
    """Random rewards and weights; these are larger than at a model's birth, so that the reference prefers some."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=LETTERS, **shape)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    rewards = np.random.default_rng(seed).standard_normal((len(PROMPTS), len(RESPONSES)))
    return Toy(scorer_of(model), rewards)


def scorer_of(model: torch.nn.Module) -> ModelRunner:
    return ModelRunner(model, "padded", torch.float32, 2**20, torch.device("cpu"))


def log_probs(scorer: ModelRunner) -> Tensor:
    """Log-prob of every response to every prompt, with its graph: (prompts, R) nats."""
    chosen, rejected = response_logps(scorer.token_logps(BATCH), BATCH.lengths).chunk(2)
    return torch.stack([chosen, rejected], 1).view(len(PROMPTS), -1)


def expected_loss(logps: Tensor, ref_logps: Tensor, objective: Objective, weights: Table) -> Tensor:
    """Loss over all pairs in both orders, by weights (2, prompts, pairs), of log-probs (prompts, R): ()."""

    def ordered(of: Tensor) -> Tensor:
        return torch.stack([of[:, places] for places in ORDERS]).flatten()  # (2P,), chosen first

    policy, weight = ordered(logps), torch.from_numpy(np.concatenate(weights, 1).ravel())
    lengths = torch.tensor(float(LENGTH))
    loss: Tensor = objective(Preferences(policy, ordered(ref_logps), lengths, policy, LENGTH, weights=weight)).sum()
    return loss


def train(toy: Toy, beta: float, weights: Table, steps: int = STEPS) -> Table:
    """Train the reference on all pairs, with weights (2, prompts, pairs): log-probs (prompts, R)."""
    options = TrainOptions(data=["-"], beta=beta, lr=LR, lr_scheduler="cosine", warmup_ratio=0.05)
    policy = scorer_of(copy.deepcopy(toy.reference.model))
    optimizer = make_optimizer(policy.model, options.weight_decay)
    ref_logps = log_probs(toy.reference).detach()
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, options)
        expected_loss(log_probs(policy), ref_logps, options.objective, weights).backward()
        optimizer.step()
        optimizer.zero_grad()
    return log_probs(policy).detach().double().numpy()


# ---- what was found ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """A trained policy beside the optimum; differences are of two responses to one prompt, of all pairs: (pairs,)."""

    policy: Table  # (prompts, R)
    optimum: Table
    implicit: Table  # reward differences that the policy implies: beta times those of its log-ratios
    true: Table

    @property
    def total_variation(self) -> float:
        """Of the prompt for which it is larger."""
        return float(np.abs(self.policy - self.optimum).sum(1).max() / 2)

    @property
    def correlation(self) -> float:
        return float(np.corrcoef(self.implicit, self.true)[0, 1])

    @property
    def error(self) -> float:
        """Root of the mean square of implicit less true differences, which are of standard deviation 1.4."""
        return float(np.sqrt(np.square(self.implicit - self.true).mean()))


def compare(toy: Toy, beta: float, logps: Table) -> Found:
    """A policy's log-probs (prompts, R) beside what theory says."""
    implied = beta * (logps - toy.logps)
    implicit, true = ((each[:, FIRST] - each[:, SECOND]).ravel() for each in (implied, toy.rewards))
    return Found(np.exp(logps), toy.optimum(beta), implicit, true)


def row(name: str, found: Sequence[Found], before: Sequence[Found]) -> str:
    """A line of the table: means over seeds with Student's intervals, and the worst seed."""
    variations = np.array([each.total_variation for each in found])
    correlations = [each.correlation for each in found]
    errors = np.array([each.error for each in found])
    start = np.mean([each.total_variation for each in before])
    cells = [
        name,
        f"{start:.3f}",
        told(variations),
        f"{variations.max():.4f}",
        f"{min(correlations):.5f}",
        told(errors),
    ]
    return f"| {' | '.join(cells)} |"


def told(values: Table) -> str:
    ends = student(values)
    return f"{values.mean():.4f}" + (f" ({max(ends[0], 0):.4f} to {ends[1]:.4f})" if ends else "")


HEAD = (
    "| {} | TV at the start | TV, mean over seeds | worst seed | correlation, worst seed | error of differences |\n"
    "|---|---:|---:|---:|---:|---:|"
)


def draw_policy(axes: Axes, found: Found) -> None:
    """Every response's probability: found against the optimum's."""
    low, high = 1e-6, 1.0
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    axes.plot([low, high], [low, high], color=COLORS["muted"], lw=0.8, dashes=(3, 3))
    axes.plot(found.optimum.ravel(), found.policy.ravel(), "o", color=COLORS["chosen"], ms=3, alpha=0.6)
    axes.set_xlabel("optimum")
    logarithmic(axes, (1e-6, 1e-4, 1e-2, 1), (1e-6, 1e-4, 1e-2, 1))


def draw_differences(axes: Axes, population: Found, few: Found) -> None:
    """Implicit against true reward differences, of the population and of few draws."""
    axes.plot(few.true, few.implicit, ".", color=COLORS["rejected"], ms=1.5, alpha=0.35)
    axes.plot(population.true, population.implicit, ".", color=COLORS["chosen"], ms=1.5)
    axes.set(xlim=(-5, 5), ylim=(-8, 8))
    axes.set_xlabel("true difference")


def draw_variations(axes: Axes, variations: Table) -> None:
    """Total variation over the number of draws: seeds as dots, their means as a line."""
    axes.set(xscale="log", yscale="log", ylim=(3e-4, 1))
    axes.axhline(0.02, color=COLORS["muted"], lw=0.8, dashes=(3, 3))
    axes.text(1.02, 0.02, "0.02", color=COLORS["muted"], size=9, va="center", transform=axes.get_yaxis_transform())
    for each in variations.T:
        axes.plot(DRAWN, each, "o", color=COLORS["chosen"], ms=3, alpha=0.5)
    axes.plot(DRAWN, variations.mean(1), color=COLORS["chosen"], lw=1.2)
    axes.set_xlabel("preferences drawn, a prompt")
    logarithmic(axes, DRAWN, (1e-3, 1e-2, 1e-1, 1))


def logarithmic(axes: Axes, x: Sequence[float], y: Sequence[float]) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    for axis, ticks in ((axes.xaxis, x), (axes.yaxis, y)):
        axis.set_major_locator(FixedLocator(ticks))
        axis.set_minor_locator(NullLocator())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--quick", action="store_true", help="the population's loss alone")
    arguments = parser.parse_args()
    began, toys = time.perf_counter(), [make_toy(seed) for seed in range(arguments.seeds)]

    def run(beta: float, *weights: Table) -> list[Found]:
        return [compare(toy, beta, train(toy, beta, w, arguments.steps)) for toy, w in zip(toys, weights, strict=True)]

    def start(beta: float) -> list[Found]:
        return [compare(toy, beta, toy.logps) for toy in toys]

    print(HEAD.format("beta"), flush=True)
    by_beta = {beta: run(beta, *(toy.population() for toy in toys)) for beta in BETAS}
    for beta, found in by_beta.items():
        print(row(f"{beta:g}", found, start(beta)), flush=True)
    of_reference = run(USUAL, *(toy.population(said=True) for toy in toys))
    print(row(f"{USUAL:g}, pairs as the reference says them", of_reference, start(USUAL)), flush=True)
    if not arguments.quick:
        print("\n" + HEAD.format("preferences a prompt"))
        sampled = {}
        for count in DRAWN:
            sampled[count] = run(USUAL, *(toy.drawn(count, seed) for seed, toy in enumerate(toys)))
            print(row(f"{count:,}", sampled[count], start(USUAL)), flush=True)
        variations = np.array([[each.total_variation for each in found] for found in sampled.values()])
        drawings = {
            f"Policy over optimum, beta {min(BETAS):g}": partial(draw_policy, found=by_beta[min(BETAS)][0]),
            "Implicit over true differences": partial(
                draw_differences, population=by_beta[USUAL][0], few=sampled[DRAWN[1]][0]
            ),
            "Total variation": partial(draw_variations, variations=variations),
        }
        PICTURE.parent.mkdir(exist_ok=True)
        write_plots(PICTURE, [Plot(title, "", drawing) for title, drawing in drawings.items()])
    print(f"\n{time.perf_counter() - began:.0f} seconds, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
