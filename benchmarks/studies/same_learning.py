"""Does a run here end where one of TRL's ends? Small trainings on several data sets, compared on held-out pairs.

    python -m benchmarks.studies.same_learning --data sample=sample_data/train.jsonl --data polite=polite.json

Of each file the shortest pairs with prompts of their own are taken. Some are held out; the others are one epoch of
training, whole and with LoRA, here and with TRL's DPOTrainer, from several seeds. Each side shuffles as its own seed
makes it, so that the seeds tell what the order alone changes. All else is equal: start weights, token ids (which is
checked), float32, fused AdamW, schedule, clipping, beta, an adapter's start. One evaluator, that of `dpo eval`, judges
what either side saved; of the first seed, what each side tells of itself stands beside it. That seed is trained once
more with TRL in the very order of `dpo train`, where nothing but arithmetic should be left between them.

Every training is a line of runs.jsonl in the folder --output; the same command goes on after the last one, and writes
results.json, results.md and results.png. No verdict changes the exit code: a miss is told in all of them.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from accelerate.state import AcceleratorState
from peft import LoraConfig
from transformers.utils import logging

from benchmarks.trl.cases import Record, step_order, write_records
from benchmarks.trl.theirs import make_trainer, pairs_of, trl_config
from dpo_cli.config.options import EvalOptions, TrainOptions
from dpo_cli.data.pairs import Pairs
from dpo_cli.data.rows import BadRow, Row, read_rows
from dpo_cli.data.sources import find_sources
from dpo_cli.data.tokenize import Encoder
from dpo_cli.evaluation.evaluate import evaluate
from dpo_cli.evaluation.metrics import Table
from dpo_cli.evaluation.statistics import share_interval, student
from dpo_cli.models.loading import load_model, load_tokenizer
from dpo_cli.models.locate import find_model
from dpo_cli.training.loop import train
from dpo_cli.utils.console import Reporter

WAYS: dict[str, dict[str, Any]] = {"full": {"lr": 2e-5}, "LoRA": {"lr": 3e-4, "lora_rank": 16}}
OURS, TRL, IN_OUR_ORDER = "ours", "TRL", "TRL in our order"
COLOURS = {OURS: "#1c6bb0", TRL: "#b4560a"}
Told = dict[str, float]
Line = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Design:
    """What all trainings have in common; ``data`` has a file by the name of each data set."""

    data: dict[str, str]
    model: str | None = None
    steps: int = 8
    batch_size: int = 4
    held_out: int = 32
    seeds: int = 3
    beta: float = 0.1

    def runs(self) -> Iterator[tuple[str, str, int, str]]:
        """Data set, way, seed and side of every training; the sides take turns."""
        for seed, name, way, side in product(range(self.seeds), self.data, WAYS, (OURS, TRL)):
            yield name, way, seed, side
        for name, way in product(self.data, WAYS):
            yield name, way, 0, IN_OUR_ORDER


# ---- rows -------------------------------------------------------------------------------------------------------


def draw_rows(file: str, design: Design, tokenizer: Any) -> tuple[list[Record], list[Record]]:
    """Rows to train on and rows to hold out: the shortest of a file, no prompt twice, cut by chance.

    Each is given as the text that the model reads of it, which both sides take as it is: of messages TRL would train
    the line's end after an answer, too.
    """
    encoder, found = Encoder(tokenizer), dict[str, tuple[int, Record]]()
    for encoded in encoder.pairs(read_rows(find_sources([file]))):
        if isinstance(encoded, BadRow) or encoded.notes:
            continue  # refused, or not as it was written
        ids = {name: getattr(encoded.pairs[0], name) for name in ("prompt", "chosen", "rejected")}
        texts = {name: tokenizer.decode(part).removesuffix(tokenizer.eos_token) for name, part in ids.items()}
        found.setdefault(texts["prompt"], (sum(map(len, ids.values())), texts))
    training = design.steps * design.batch_size
    wanted = training + design.held_out
    if len(found) < wanted:
        raise SystemExit(f"{file}: {len(found)} rows with a prompt of their own can be used, and {wanted} are needed")
    shortest = [texts for _, texts in sorted(found.values(), key=lambda each: each[0])[:wanted]]
    random.Random(0).shuffle(shortest)
    return shortest[:training], shortest[training:]


def as_pairs(tokenizer: Any, records: Sequence[Record]) -> Pairs:
    """What this package makes of such rows."""
    encoder = Encoder(tokenizer)
    rows = (Row("", "strings", each["prompt"], (each["chosen"], each["rejected"]), raw=True) for each in records)
    return Pairs(pair for made in encoder.pairs(rows) if not isinstance(made, BadRow) for pair in made.pairs)


# ---- trainings --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lab:
    """One data set: its rows in files of ``folder``, and the start weights in ``base``."""

    design: Design
    base: Path
    folder: Path
    rows: list[Record]
    held_out: list[Record]

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_records(self.folder / "train.jsonl", self.rows)
        write_records(self.folder / "held-out.jsonl", self.held_out)

    def take(self, way: str, seed: int, side: str) -> Line:
        """Train, and judge the policy by its margins of the held-out pairs; the first seed tells of itself, too."""
        tells = seed == 0 and side != IN_OUR_ORDER
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            policy = Path(folder) / "policy"
            options = TrainOptions(
                **self._common(),
                **WAYS[way],
                model=str(self.base),
                data=[str(self.folder / "train.jsonl")],
                eval_data=[str(self.folder / "held-out.jsonl")] if tells else None,
                output=Path(folder) / "run",
                batch_size=self.design.batch_size,
                warmup_ratio=0.0,
                seed=seed,
                save_steps=0,
            )
            AcceleratorState._reset_state(reset_partial_state=True)  # as in a process of its own
            began = time.monotonic()
            told = train_here(options, policy) if side == OURS else self._train_with_trl(options, side, tells, policy)
            seconds = round(time.monotonic() - began, 1)
            return {"seconds": seconds, "told": told, "margins": self.judge(policy).tolist()}

    def _train_with_trl(self, options: TrainOptions, side: str, tells: bool, policy: Path) -> Told:
        rows = self.rows
        if side == IN_OUR_ORDER:
            rows = [rows[place] for step in step_order(len(rows), options) for place in step]
        return train_with_trl(options, rows, self.held_out if tells else (), side != IN_OUR_ORDER, policy)

    def judge(self, policy: Path) -> Table:
        """Margins of the held-out pairs (P,), as `dpo eval` has them of any model's folder."""
        data = [str(self.folder / "held-out.jsonl")]
        options = EvalOptions(**self._common(), ref_model=str(self.base), data=data)
        return evaluate(str(policy), options, Reporter(quiet=True))[0].scores.margins

    def _common(self) -> dict[str, Any]:
        cache = self.folder / "cache"
        exact = {"dtype": "float32", "max_length": 1024, "kl": "none", "format": "strings"}
        return exact | {"cache_dir": cache, "beta": self.design.beta}


def train_here(options: TrainOptions, policy: Path) -> Told:
    """`dpo train`; its policy leaves the run's folder, so that the evaluator knows no more of it than of TRL's."""
    assert options.output
    told = train(options, None, ["benchmark"], Reporter(quiet=True))["after"]
    (options.output / "model").rename(policy)
    return told and {"accuracy": told["rewards/accuracies"], "margin": told["rewards/margins"]}


def train_with_trl(
    options: TrainOptions, rows: Sequence[Record], held_out: Sequence[Record], shuffle: bool, policy: Path
) -> Told:
    """Train with TRL's DPOTrainer, save its policy, and let it evaluate if there is anything held out.

    ``shuffle``: it draws the order of the rows.
    """
    config = trl_config(
        policy.with_name("trl"),
        len(rows) // options.batch_size,
        options.batch_size,
        beta=options.beta,
        learning_rate=options.lr,
        max_grad_norm=options.max_grad_norm,
        max_length=options.max_length,
        seed=options.seed,
        train_sampling_strategy="random" if shuffle else "sequential",
    )
    adapter = None
    if rank := options.lora_rank:
        adapter = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    torch.manual_seed(options.seed)  # an adapter's start is drawn
    trainer = make_trainer(options.model, config, rows, with_reference=adapter is None, peft_config=adapter)
    if as_pairs(trainer.processing_class, rows).digest() != Pairs(pairs_of(trainer.train_dataset)).digest():
        raise SystemExit("the two sides make other token ids of the same rows")
    trainer.train()
    trainer.save_model(str(policy))
    if not held_out:
        return {}
    told = trainer.evaluate(datasets.Dataset.from_list(list(held_out)))
    return {"accuracy": told["eval_rewards/accuracies"], "margin": told["eval_rewards/margins"]}


# ---- verdicts ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    """A held-out figure: that of each seed, their mean, and its 95% interval by the held-out pairs."""

    seeds: list[float]
    mean: float
    low: float
    high: float

    def holds(self, other: Figure) -> bool:
        return self.low <= other.mean <= self.high


def figures(margins: Table) -> dict[str, Figure]:
    """Accuracy and margin by the margins of S seeds over P pairs: (S, P).

    A pair is one observation, however many seeds were trained. The intervals tell of other pairs and not of other
    seeds: they are rather too narrow than too wide.
    """
    seeds, pairs = margins.shape
    wins = (margins > 0) + 0.5 * (margins == 0)
    right = share_interval(wins.ravel(), np.tile(np.arange(pairs), seeds))
    apart = student(margins.mean(0))
    assert right and apart
    return {
        "accuracy": Figure(wins.mean(1).tolist(), float(wins.mean()), *right),
        "margin": Figure(margins.mean(1).tolist(), float(margins.mean()), *apart),
    }


def verdicts(ours: Table, trl: Table) -> list[Line]:
    """Of each figure of margins (S, P) on both sides, whether each mean lies in the other's interval.

    ``difference`` is ours minus TRL's, with Student's interval over the seeds, for the two orders of a seed are
    independent.
    """
    found = []
    for (name, mine), theirs in zip(figures(ours).items(), figures(trl).values(), strict=True):
        apart = np.array(mine.seeds) - np.array(theirs.seeds)
        verdict = {"figure": name, "within": mine.holds(theirs) and theirs.holds(mine)}
        verdict |= {OURS: asdict(mine), TRL: asdict(theirs)}
        found.append(verdict | {"difference": float(apart.mean()), "difference_interval": student(apart)})
    return found


def results(design: Design, lines: Sequence[Line]) -> Line:
    """All that the trainings tell: verdicts by cell, what the order leaves, what sides told of themselves."""

    def margins(name: str, way: str, side: str) -> Table:
        of_it = {"data": name, "way": way, "side": side}
        return np.array([line["margins"] for line in lines if of_it.items() <= line.items()])

    cells, same_order = [], []
    for name, way in product(design.data, WAYS):
        where = {"data": name, "way": way}
        ours, again = margins(name, way, OURS), margins(name, way, IN_OUR_ORDER)
        cells += [where | verdict for verdict in verdicts(ours, margins(name, way, TRL))]
        apart = np.abs(ours[0] - again[0])
        means = {"ours": float(ours[0].mean()), "TRL": float(again[0].mean())}
        same_order.append(where | means | {"largest": float(apart.max()), "mean": float(apart.mean())})
    return {
        "design": asdict(design) | {"ways": WAYS},
        "seconds": {side: sum(line["seconds"] for line in lines if line["side"] == side) for side in (OURS, TRL)},
        "misses": sum(not cell["within"] for cell in cells),
        "cells": cells,
        "same_order": same_order,
        "told": {side: told_apart([line for line in lines if line["side"] == side]) for side in (OURS, TRL)},
    }


def told_apart(lines: Sequence[Line]) -> Told:
    """How far what a side told of its runs lies from what the evaluator finds, at most."""
    found = {"accuracy": 0.0, "margin": 0.0}
    for line in lines:
        margins = np.array(line["margins"])
        judged = {"accuracy": float((margins > 0).mean()), "margin": float(margins.mean())}
        found |= {name: max(found[name], abs(told - judged[name])) for name, told in line["told"].items()}
    return found


# ---- what is shown ----------------------------------------------------------------------------------------------


def table(found: Line) -> str:
    """The verdicts and what the order leaves, in Markdown."""

    def told(figure: Line) -> str:
        seeds = ", ".join(f"{seed:.3f}" for seed in figure["seeds"])
        return f"{figure['mean']:.3f} ({figure['low']:.3f} to {figure['high']:.3f}); {seeds}"

    lines = [
        "| data | trained | held out | ours | TRL | each in the other's interval | ours - TRL, over the seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for cell in found["cells"]:
        low, high = cell["difference_interval"] or (np.nan, np.nan)
        apart = f"{cell['difference']:+.3f} ({low:+.3f} to {high:+.3f})"
        verdict = "yes" if cell["within"] else "**no**"
        words = (cell["data"], cell["way"], cell["figure"], told(cell[OURS]), told(cell[TRL]), verdict, apart)
        lines.append(f"| {' | '.join(words)} |")
    lines += [
        "",
        "| data | trained | margin, ours | margin, TRL | a pair's margins apart, at most | on average |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for cell in found["same_order"]:
        apart = f"{cell['largest']:.1e} | {cell['mean']:.1e}"
        lines.append(f"| {cell['data']} | {cell['way']} | {cell['ours']:.4f} | {cell['TRL']:.4f} | {apart} |")
    return "\n".join(lines)


def draw(file: Path, found: Line) -> None:
    """Accuracy and margin of each data set: a bar is an interval, its line the mean, a dot a seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Picture

    data, names, ways = list(found["design"]["data"]), ["accuracy", "margin"], list(found["design"]["ways"])
    picture = Picture(figsize=(3.1 * len(data), 5.6), layout="constrained")
    FigureCanvasAgg(picture)
    grid = picture.subplots(len(names), len(data), squeeze=False, sharex=True)
    for cell in found["cells"]:
        axes = grid[names.index(cell["figure"])][data.index(cell["data"])]
        for side, shift in ((OURS, -0.18), (TRL, 0.18)):
            figure, x, colour = cell[side], ways.index(cell["way"]) + shift, COLOURS[side]
            axes.bar(x, figure["high"] - figure["low"], 0.24, figure["low"], color=colour, alpha=0.2, lw=0)
            axes.plot([x - 0.12, x + 0.12], [figure["mean"]] * 2, color=colour, lw=2)
            places = x + np.linspace(-0.07, 0.07, len(figure["seeds"]))
            axes.plot(places, figure["seeds"], "o", color=colour, ms=5, mec="white", mew=0.8, label=side)
    for row, name in zip(grid, names, strict=True):
        row[0].set_ylabel(f"held-out {name}")
        for axes in row:
            axes.axhline(0.5 if name == "accuracy" else 0, color="#6a665e", lw=0.8, dashes=(3, 3))  # untrained
            axes.spines[:].set_visible(False)
            axes.grid(axis="y", color="#e3dfd6", lw=0.8)
            axes.set_axisbelow(True)
            axes.tick_params(length=0)
            axes.set_xticks(range(len(ways)), ways)
            axes.set_xlim(-0.6, len(ways) - 0.4)
            if name == "accuracy":
                axes.set_ylim(None, 1.02)
    for axes, name in zip(grid[0], data, strict=True):
        axes.set_title(name, weight="bold", fontsize=10.5)
    handles, labels = grid[0][0].get_legend_handles_labels()
    picture.legend(handles[:2], labels[:2], loc="outside lower center", ncols=2, frameon=False)
    picture.savefig(file, dpi=144, facecolor="white", metadata={"Software": None})


# ---- the command ------------------------------------------------------------------------------------------------


def run(design: Design, output: Path, jobs: int = 1) -> Line:
    """Take what trainings are not in the folder yet, ``jobs`` at a time, and write what all of them tell."""
    logging.disable_progress_bar()
    output.mkdir(parents=True, exist_ok=True)
    begin(design, output / "design.json")
    file = output / "runs.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {(line["data"], line["way"], line["seed"], line["side"]) for line in lines}
    base, source = output / "base", find_model(design.model)
    if not (base / "tokenizer_config.json").exists():  # a folder loads in a second, the default's file in many
        load_model(source).save_pretrained(base)
        load_tokenizer(source).save_pretrained(base)
    tokenizer = load_tokenizer(find_model(str(base)))
    labs = {}
    for name, data in design.data.items():
        rows, held_out = draw_rows(data, design, tokenizer)
        labs[name] = Lab(design, base, output / name, rows, held_out)
    left = [each for each in design.runs() if each not in done]
    for line in taken([(labs[each[0]], *each) for each in left], jobs):
        lines.append(line)
        with file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(line) + "\n")
        name = ", ".join(str(line[about]) for about in ("data", "way", "seed", "side"))
        print(f"{name}: margin {np.mean(line['margins']):.3f} after {line['seconds']} s", flush=True)
    found = results(design, lines)
    (output / "results.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (output / "results.md").write_text(table(found) + "\n", encoding="utf-8")
    draw(output / "results.png", found)
    return found


def taken(runs: Sequence[tuple[Lab, str, str, int, str]], jobs: int) -> Iterator[Line]:
    """The lines of trainings in their order; several processes share the cores."""
    if jobs == 1:
        yield from map(take, runs)
        return
    threads = max(1, torch.get_num_threads() // jobs)
    with ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (threads,)) as processes:
        yield from processes.map(take, runs)


def take(one: tuple[Lab, str, str, int, str]) -> Line:
    lab, name, way, seed, side = one
    return {"data": name, "way": way, "seed": seed, "side": side} | lab.take(way, seed, side)


def begin(design: Design, file: Path) -> None:
    """Keep the design beside its runs; another one finds no place there."""
    told = json.dumps(asdict(design) | {"ways": WAYS})
    if not file.exists():
        file.write_text(told, encoding="utf-8")
    elif file.read_text(encoding="utf-8") != told:
        raise SystemExit(f"{file.parent} has runs of another design; take another --output")


def named(text: str) -> tuple[str, str]:
    name, _, file = text.partition("=")
    if not (name and file):
        raise argparse.ArgumentTypeError(f"{text}: write it as NAME=FILE")
    return name, file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    told = "preference rows, and what they are called; repeatable"
    parser.add_argument("--data", action="append", required=True, type=named, metavar="NAME=FILE", help=told)
    parser.add_argument("--output", type=Path, default=Path("runs/same-learning"))
    parser.add_argument("--model", help="as of `dpo train`; default: its default")
    for name in ("steps", "batch_size", "held_out", "seeds"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(Design, name))
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    given = vars(parser.parse_args())
    jobs, output, data = given.pop("jobs"), given.pop("output"), dict(given.pop("data"))
    found = run(Design(data=data, **given), output, jobs)
    print(table(found))
    print(f"{found['misses']} of {len(found['cells'])} figures lie outside of the other side's interval")


if __name__ == "__main__":
    main()
