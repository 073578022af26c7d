"""What a known reward costs in KL: the first figure of the DPO paper (arXiv 2305.18290) in small.

    python -m benchmarks.studies.frontier --output FOLDER        # the default model, three seeds

A policy completes openings of answers, as the paper's completes film reviews. The reward is a program that anyone can
run: how plainly a completion speaks, by naive Bayes over the sample data's chosen and rejected answers. For each seed
the model completes the training openings, Bradley-Terry draws a preference by the rewards of each two completions, and
every method trains an adapter on those pairs, from the same start and in the same order. Along the way the policy
completes held-out openings: the mean reward of that, and its KL from the reference by the exact KLs of each next token.
Best-of-N and the best that any policy could do are computed from completions of the reference.

Every measurement is in FOLDER/points.jsonl as soon as it is made, and the same command goes on from there. At the end
FOLDER has frontier.json, frontier.md and frontier.png.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.studies.frontier_report import draw, markdown, summary
from dpo_cli.config.options import TrainOptions
from dpo_cli.data.pairs import Ids, Pair, Pairs
from dpo_cli.data.schedule import build_schedule
from dpo_cli.evaluation import kl
from dpo_cli.evaluation.generation import as_pairs, by_prompt, generate, sequence_kl, text
from dpo_cli.evaluation.metrics import Table
from dpo_cli.evaluation.statistics import student
from dpo_cli.losses.preference import Preferences, preference_loss
from dpo_cli.models.adapters import new_adapter
from dpo_cli.models.attention import PREFIX_SHARED
from dpo_cli.models.loading import load_model, load_tokenizer
from dpo_cli.models.locate import find_model
from dpo_cli.models.logprobs import ModelRunner
from dpo_cli.training.loop import StopSignal
from dpo_cli.training.optimizer import learning_rate, make_optimizer
from dpo_cli.training.step import Trainer
from dpo_cli.utils.console import Reporter
from dpo_cli.utils.devices import start
from dpo_cli.utils.errors import UsageError
from dpo_cli.utils.files import write_json

ROOT = Path(__file__).parents[2]
PROGRESS = Reporter(quiet=True).progress("frontier", 1)
SHARPNESS = 12.0  # of the reward: nats of preference a nat of evidence a word
MAX_TOKENS = 2048
BEST_OF = (2, 4, 8, 16)
BETAS = (16.0, 12.0, 9.0, 6.0, 4.5, 3.6, 3.0, 2.4, 2.0)  # of the optimum that is drawn
SIDES = ("chosen", "rejected")
POOL_SEED = 10_000  # none of those that train


@dataclass(frozen=True)
class Sizes:
    """How much is trained and measured; the defaults take about 45 minutes on two cores, which ``--jobs`` uses."""

    seeds: int = 3
    opening: int = 6  # tokens
    tokens: int = 16  # of a completion, at most
    prompts: int = 160  # openings to train on
    pairs: int = 2  # an opening
    batch_size: int = 8
    checkpoints: tuple[int, ...] = (8, 20, 40)  # steps after which a policy is measured, a method's ``times`` as many
    rank: int = 16  # of the adapter that is trained
    lr: float = 5e-4
    held_out: int = 32  # openings to measure on
    copies: int = 4  # completions of each by a policy
    pool: int = 24  # completions of each by the reference
    dtype: str = "bfloat16"


@dataclass(frozen=True)
class Method:
    """A way to train on pairs: ``setting`` tells the trainings of one method apart, ``times`` is how long they take."""

    name: str
    loss: str
    setting: str
    options: Mapping[str, Any] = field(default_factory=dict)
    times: int = 1


def methods() -> list[Method]:
    """DPO over three of the paper's betas, and what it is compared with.

    What SFT imitates, the chosen of two completions, is at most 0.19 nats from the reference, as best-of-2. Trained for
    longer it fits the very completions, and comes to KLs that DPO reaches as well.
    """
    low, middle, high = (Method("DPO", "sigmoid", f"beta {beta:g}", {"beta": beta}) for beta in (0.1, 1.0, 5.0))
    sft, longer = Method("SFT on chosen", "sft", ""), Method("SFT on chosen", "sft", "four times as long", times=4)
    return [low, sft, longer, middle, Method("unlikelihood", "unlikelihood", ""), high]


def unlikelihood(p: Preferences) -> Tensor:
    """To be compared with: nothing holds it back.

        -(log pi(y_w|x) - log pi(y_l|x)) / mean of |y_w| over the step

    Source: the baseline of section 6 of arXiv 2305.18290, with its coefficient of 1
    """
    chosen, rejected = p.full_logps.chunk(2)
    return (rejected - chosen) / p.mean_chosen_length


# ---- the reward and what is preferred by it ---------------------------------------------------------------------


class Plainness:
    """The reward: the mean log-odds of a text's words between chosen and rejected answers, times ``SHARPNESS``.

    Naive Bayes with one count more for every word of either; a word of neither says nothing.
    """

    def __init__(self, chosen: Sequence[str], rejected: Sequence[str]) -> None:
        counts = [Counter(word for each in texts for word in words(each)) for texts in (chosen, rejected)]
        known = counts[0].keys() | counts[1].keys()
        totals = [count.total() + len(known) for count in counts]
        self.odds = {
            word: math.log((counts[0][word] + 1) / totals[0] / ((counts[1][word] + 1) / totals[1])) for word in known
        }

    def __call__(self, answer: str) -> float:
        found = words(answer)
        return SHARPNESS * sum(self.odds.get(word, 0.0) for word in found) / max(len(found), 1)


def words(answer: str) -> list[str]:
    """Words in lower case, numbers, and the marks that end or divide a sentence."""
    return re.findall(r"[a-z]+(?:'[a-z]+)*|\d+|[?!.:,]", answer.lower())


def first_is_preferred(first: float, second: float, rng: np.random.Generator) -> bool:
    """Draw a preference by the rewards of two answers: sigma(r_1 - r_2) is the first one's probability.

    Source: Bradley and Terry 1952; equation 1 of arXiv 2305.18290.
    """
    return bool(rng.random() * (1 + math.exp(second - first)) < 1)


# ---- what needs no training -------------------------------------------------------------------------------------


def best_of(rewards: Table, n: int) -> Table:
    """Expected reward of the best of n answers that are drawn from the K of each prompt without putting back.

    Shapes: (prompts, K) -> (prompts,).
    """
    k = rewards.shape[1]
    largest = np.array([math.comb(i, n - 1) for i in range(k)], float) / math.comb(k, n)  # that the i-th is the best
    return np.sort(rewards, 1) @ largest


def best_of_kl(n: int) -> float:
    """No less than the KL of best-of-n from the reference, in nats.

    Source: Beirami and others 2024, arXiv 2401.01879: it is this where no two answers are alike.
    """
    return math.log(n) - (n - 1) / n


def optimum(rewards: Table, betas: Sequence[float]) -> list[tuple[float, float]]:
    """KL and reward of ref * exp(r / beta) / Z, estimated from K answers of the reference to each prompt.

    No policy has more reward at that KL. Sound where the KL is far below log K.

    Source: equation 4 of arXiv 2305.18290.
    """
    found = []
    for beta in betas:
        weights = np.exp((rewards - rewards.max(1, keepdims=True)) / beta)
        weights /= weights.sum(1, keepdims=True)
        kl = (weights * np.log(np.maximum(weights * rewards.shape[1], 1e-300))).sum(1)
        found.append((float(kl.mean()), float((weights * rewards).sum(1).mean())))
    return found


# ---- a policy ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prepared:
    """Preferences of a seed, their log-probs under the reference, and rewards of its completions of held-out openings.

    Shapes: ``logps`` (P, 2) nats; ``rewards`` (prompts, K).
    """

    seed: int
    pairs: Pairs
    logps: Tensor
    rewards: Table


class Lab:
    """The model, the openings and the reward; what trains and measures."""

    def __init__(self, model: str | None, sizes: Sizes, folder: Path) -> None:
        source, self.sizes, self.folder = find_model(model), sizes, folder
        self.tokenizer, loaded = load_tokenizer(source), load_model(source).to(start())
        self.own_attention = loaded.config._attn_implementation
        loaded.set_attn_implementation(PREFIX_SHARED)
        self.reference = ModelRunner(loaded, "shared", getattr(torch, sizes.dtype), MAX_TOKENS, start())
        rows = {name: read_rows(ROOT / "sample_data" / f"{name}.jsonl") for name in ("train", "heldout")}
        self.reward = Plainness(*([row[side][-1]["content"] for row in rows["train"]] for side in SIDES))
        self.openings = self._openings(rows["train"], sizes.prompts)
        self.held_out = self._openings(rows["heldout"], sizes.held_out)

    def _openings(self, rows: Sequence[Mapping[str, Any]], count: int) -> list[Ids]:
        """The first tokens of answers of both kinds, the first so many that differ."""
        found: dict[bytes, Ids] = {}
        for row in rows:
            for side in SIDES:
                ids = self.tokenizer(row[side][-1]["content"], add_special_tokens=False)["input_ids"]
                opening = np.array(ids[: self.sizes.opening], np.int32)
                found.setdefault(opening.tobytes(), opening)
        if len(found) < count:
            raise UsageError(f"{count} different openings are wanted, and the sample data has {len(found)}")
        return list(found.values())[:count]

    def completions(self, scorer: ModelRunner, prompts: Sequence[Ids], copies: int, seed: int) -> list[list[Ids]]:
        """Drawn at temperature 1: -> for each prompt its ``copies``."""
        runner = replace(scorer, max_tokens=2 * MAX_TOKENS)
        return generate(runner, self.tokenizer, prompts, self.own_attention, self.sizes.tokens, copies, seed)

    def rewards(self, responses: Sequence[Sequence[Ids]]) -> Table:
        """The reward of each: (prompts, K)."""
        return np.array([[self.reward(text(self.tokenizer, each)) for each in mine] for mine in responses])

    def preferences(self, seed: int) -> Pairs:
        """The reference's completions, two by two, with a drawn preference; two that are equal are left out."""
        rng, pairs = np.random.default_rng(seed), Pairs()
        responses = self.completions(self.reference, self.openings, 2 * self.sizes.pairs, seed)
        rewards = self.rewards(responses).reshape(-1, 2)
        for pair, (first, second) in zip(as_pairs(self.openings, responses), rewards, strict=True):
            sides = pair.chosen, pair.rejected
            chosen, rejected = sides if first_is_preferred(first, second, rng) else sides[::-1]
            if not np.array_equal(chosen, rejected):
                pairs.append(Pair(pair.where, pair.prompt, chosen, rejected))
        return pairs

    def prepared(self, seed: int) -> Prepared:
        """What all trainings of a seed share."""
        pairs = self.preferences(seed)
        logps = torch.from_numpy(kl.score(self.reference, pairs, PROGRESS).logps()).float()
        rewards = self.rewards(self.completions(self.reference, self.held_out, self.sizes.copies, seed))
        return Prepared(seed, pairs, logps, rewards)

    def train(self, method: Method, given: Prepared) -> Iterator[tuple[int, ModelRunner]]:
        """The policy after each of the steps at which it is measured."""
        sizes, seed, pairs = self.sizes, given.seed, given.pairs
        checkpoints = [method.times * step for step in sizes.checkpoints]
        steps = checkpoints[-1]
        common = {"lr": sizes.lr, "lr_scheduler": "constant", "batch_size": sizes.batch_size, "seed": seed}
        options = TrainOptions(data=["completions"], loss=method.loss, **common, **method.options)
        policy: Any = deepcopy(self.reference.model)
        adapter = {"lora_rank": sizes.rank, "lora_type": "lora", "lora_alpha": 2 * sizes.rank}
        new_adapter(policy, replace(options, **adapter), "")
        scorer = replace(self.reference, model=policy)
        costs = scorer.costs(pairs)
        how = {"batch_size": sizes.batch_size, "epochs": -(-steps * sizes.batch_size // len(pairs)), "seed": seed}
        plan = build_schedule(pairs, "shared", max_steps=steps, max_tokens=MAX_TOKENS, world_size=1, **how)
        optimizer = make_optimizer(policy, 0.0)
        trainer = Trainer(scorer, optimizer, pairs, costs, given.logps, given.logps, options)
        for step, planned in enumerate(plan, 1):
            lr = learning_rate(step, steps, options)
            trainer.step(planned, trainer.micro_batches(planned), lr, StopSignal())
            if step in checkpoints:
                yield step, scorer

    def measure(self, policy: ModelRunner, given: Prepared) -> dict[str, Any]:
        """KL of a policy from the reference by its completions of the held-out openings, and what reward they gain.

        They are compared with the reference's own, sampled with the same seed.
        """
        copies = self.sizes.copies
        responses = self.completions(policy, self.held_out, copies, given.seed)
        gains = self.rewards(responses) - given.rewards
        pairs = as_pairs(self.held_out, responses)
        recorded = kl.record(policy, pairs, self.folder, PROGRESS)
        compared = kl.compare(self.reference, recorded, pairs, PROGRESS, policy_runs=False)
        estimate = sequence_kl(by_prompt(compared.distributions["kl"], copies))
        logratios = by_prompt(compared.logps() - compared.logps(1), copies)
        found = {"gain": float(gains.mean()), "gain_interval": student(gains.mean(1))}
        found |= {"kl": estimate["token_kl"], "kl_interval": estimate["token_kl_interval"]}
        found["logratio"] = float(logratios.mean())
        return found | {"texts": [text(self.tokenizer, mine[0]) for mine in responses[:4]]}


def read_rows(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


# ---- all of it --------------------------------------------------------------------------------------------------

LAB: list[Lab] = []  # of this process


def begin(model: str | None, sizes: Sizes, folder: Path, jobs: int) -> None:
    """Make a process one that the functions below can run in."""
    if jobs > 1:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // jobs))
    preference_loss(reference=False)(unlikelihood)
    LAB[:] = [Lab(model, sizes, folder)]


def reference_rewards(_: int) -> list[list[float]]:
    """Rewards of many completions of each held-out opening by the reference: (prompts, K)."""
    (lab,) = LAB
    rewards: list[list[float]] = lab.rewards(
        lab.completions(lab.reference, lab.held_out, lab.sizes.pool, POOL_SEED)
    ).tolist()
    return rewards


def prepared(seed: int) -> Prepared:
    """``Lab.prepared`` in this process."""
    return LAB[0].prepared(seed)


def measured(method: Method, given: Prepared) -> list[dict[str, Any]]:
    """Train, and measure at every checkpoint."""
    (lab,), began = LAB, time.monotonic()
    about = {"seed": given.seed, "method": method.name, "setting": method.setting}
    found = [about | {"step": step} | lab.measure(policy, given) for step, policy in lab.train(method, given)]
    return [each | {"seconds": round(time.monotonic() - began)} for each in found]


@contextmanager
def workers(jobs: int, *arguments: Any) -> Iterator[Callable[..., Iterator[Any]]]:
    """A ``map`` over so many processes that are ready to measure; this one, if it is one."""
    if jobs == 1:
        begin(*arguments, jobs)
        yield map
        return
    with ProcessPoolExecutor(jobs, get_context("spawn"), begin, (*arguments, jobs)) as pool:
        yield pool.map


def run(model: str | None, sizes: Sizes, folder: Path, jobs: int) -> list[dict[str, Any]]:
    """Every line of points.jsonl: those that are there, and then those that are made."""
    file = folder / "points.jsonl"
    lines = read_rows(file) if file.exists() else []
    about = {"model": find_model(model).base, "sizes": asdict(sizes) | {"checkpoints": [*sizes.checkpoints]}}

    def keep(line: dict[str, Any]) -> None:
        with file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
        print(json.dumps({key: value for key, value in line.items() if key not in ("rewards", "texts")}), flush=True)
        lines.append(line)

    if not lines:
        keep({"about": about})
    elif lines[0]["about"] != about:
        raise UsageError(f"--output {folder}: holds measurements of {lines[0]['about']}; name another folder")
    known = {(line["method"], line["setting"], line["seed"]) for line in lines if "method" in line}
    todo = [(m, seed) for m in methods() for seed in range(sizes.seeds) if (m.name, m.setting, seed) not in known]
    pooled = any("rewards" in line for line in lines)
    if pooled and not todo:
        return lines
    with workers(jobs, model, sizes, folder) as over:
        if not pooled:
            keep({"rewards": next(over(reference_rewards, [0]))})
        ready = {given.seed: given for given in over(prepared, sorted({seed for _, seed in todo}))}
        for found in over(measured, [method for method, _ in todo], [ready[seed] for _, seed in todo]):
            for line in found:
                keep(line)
    return lines


def result_of(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """All that is told; gains are over the reference's mean."""
    (about,) = (line["about"] for line in lines if "about" in line)
    (rewards,) = (np.array(line["rewards"]) for line in lines if "rewards" in line)
    own = float(rewards.mean())
    points = [line for line in lines if "method" in line]
    n_of = [n for n in BEST_OF if n <= rewards.shape[1]]
    best = [{"n": n, "kl": best_of_kl(n), "gain": float(best_of(rewards, n).mean()) - own} for n in n_of]
    ideal = [{"kl": kl, "gain": reward - own} for kl, reward in optimum(rewards, BETAS)]
    told = {"about": about, "reference_reward": own, "reference_interval": student(rewards.mean(1))}
    told |= {"spread": float(rewards.std(1, ddof=1).mean()), "points": points, "best_of": best, "optimum": ideal}
    return told | {"summary": summary(points, best, ideal)}


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", help="as of `dpo train`; default: its default")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes; default: as many as processors")
    for name, value in asdict(Sizes()).items():
        several = isinstance(value, tuple)
        kind = type(value[0]) if several else type(value)
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=value, nargs="+" if several else None)
    given = vars(parser.parse_args(words))
    folder, model, jobs = (given.pop(name) for name in ("output", "model", "jobs"))
    sizes = Sizes(**given | {"checkpoints": tuple(given["checkpoints"])})
    folder.mkdir(parents=True, exist_ok=True)
    try:
        result = result_of(run(model, sizes, folder, jobs))
    except UsageError as error:
        parser.error(str(error))
    write_json(folder / "frontier.json", result)
    (folder / "frontier.md").write_text(markdown(result), encoding="utf-8")
    draw(folder / "frontier.png", result)
    print(markdown(result))


if __name__ == "__main__":
    main()
