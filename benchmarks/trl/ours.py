"""The worker that trains with this package, through the functions that `dpo train` itself goes through."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import yaml

from benchmarks.trl.meter import Message, Meter, serve
from dpo_cli.config.options import TrainOptions
from dpo_cli.config.resolve import resolve
from dpo_cli.data.pairs import Pairs
from dpo_cli.evaluation import kl
from dpo_cli.evaluation.evaluator import Evaluator
from dpo_cli.reference.store import fill_reference
from dpo_cli.training.loop import StopSignal, make_trainer
from dpo_cli.training.optimizer import learning_rate
from dpo_cli.training.setup import prepare_run, score_reference
from dpo_cli.utils.console import Reporter
from dpo_cli.utils.distributed import started


def make_options(flags: str, folder: Path, **given: Any) -> TrainOptions:
    """Options of `dpo train`: those given, overridden by flags as they would be typed."""
    words, values = shlex.split(flags), {name: str(v) if isinstance(v, Path) else v for name, v in given.items()}
    for place, word in enumerate(words):
        if word.startswith("--"):
            is_switch = place + 1 == len(words) or words[place + 1].startswith("--")
            values[word[2:].replace("-", "_")] = True if is_switch else words[place + 1]
    file = folder / "options.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    return resolve(TrainOptions, {}, file)


class Ours:
    """Phases of a laid-out run; blocks count pairs."""

    def __init__(self, job: Message, meter: Meter) -> None:
        self.meter, self.reporter, self.trainer = meter, Reporter(quiet=True), None
        folder = Path(job["folder"])
        options = make_options(
            job["ours_options"],
            folder,
            model=job["model"],
            data=[job["train"]],
            eval_data=[job["held_out"]],
            output=folder / "run",
            cache_dir=folder / "cache",
            warmup_ratio=0.0,
            **job["options"],
        )
        with started() as device:
            self.run = prepare_run(options, None, device, self.reporter)
        self.order = [place for step in job["order"] for place in step]
        for planned, expected in zip(self.run.plan, job["order"], strict=True):
            assert sorted(i for indices in planned for i in indices) == sorted(expected), "the plan has another order"
        meter.holders.append(self.run.policy.model)
        ordered = self.run.pairs.select(self.order)
        ids = [ordered.digest(), self.run.held_out.digest()]
        self.about = {"ids": ids, "max_tokens": self.run.policy.runner.max_tokens}

    def precompute(self, blocks: list[int]) -> Message:
        """Score block by block into the cache."""
        start = 0
        for count in blocks:
            pairs = Pairs(self.run.pairs[i] for i in self.order[start : start + count])
            if start >= len(self.run.pairs):  # the run repeats its rows
                self.run.cache.values.clear()
            self.meter.begin()
            fill_reference(self.run.cache, pairs, self.run.policy.runner, self.reporter)
            self.meter.end()
            start += count
        return {}

    def _ready(self) -> Any:
        """The trainer, its references scored where no phase did."""
        if self.trainer is None:
            score_reference(self.run)
            self.trainer, self.held_out_reference = make_trainer(self.run), self.run.scores.logps[len(self.run.used) :]
            self.meter.holders.append(self.trainer.optimizer)
        return self.trainer

    def train(self, blocks: list[int]) -> Message:
        trainer, plan, options = self._ready(), self.run.plan, self.run.options
        losses: list[float] = []
        for count in blocks:
            self.meter.begin()
            for _ in range(count // options.batch_size):
                step = len(losses) + 1
                lr, planned = learning_rate(step, len(plan), options), plan[step - 1]
                values = trainer.step(planned, trainer.micro_batches(planned), lr, StopSignal())
                losses.append(values["loss"])
            self.meter.end()
        return {"losses": losses}

    def eval(self, blocks: list[int]) -> Message:
        """Score the held-out pairs once a block."""
        trainer, losses, options = self._ready(), [], self.run.options
        held_out = self.run.held_out
        for _ in blocks:
            self.meter.begin()
            tokens = kl.score(trainer.runner, held_out, self.reporter.progress("held out", len(held_out)))
            evaluator = Evaluator(held_out, self.run.tokenizer, options.objective)
            reference = self.held_out_reference.double().numpy()
            scores = evaluator.scores(tokens, (reference, reference))
            losses.append(float(scores.losses.mean()))
            self.meter.end()
        return {"losses": losses}


if __name__ == "__main__":
    serve(Ours)
