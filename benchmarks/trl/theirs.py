"""The worker that trains with TRL's DPOTrainer, and that trainer's settings, which `trl_parity` uses too."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from transformers import PrinterCallback, TrainerCallback
from transformers.utils import logging

from benchmarks.trl.cases import Record
from benchmarks.trl.meter import Message, Meter, serve
from dpo_cli.data.pairs import Pair, Pairs
from dpo_cli.models.loading import load_model, load_tokenizer
from dpo_cli.models.locate import find_model
from trl import DPOConfig, DPOTrainer


def trl_config(folder: Path, steps: int, batch_size: int, **changes: Any) -> DPOConfig:
    """Settings that make TRL train as `dpo train` does: its fused AdamW, a linear schedule, the rows in their order.

    Activation checkpointing is off, by either of the names that transformers has had for it.
    """
    names = {field.name for field in dataclasses.fields(DPOConfig)}
    checkpointing = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    settings = {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": batch_size,
        "per_device_eval_batch_size": batch_size,
        "train_sampling_strategy": "sequential",
        "lr_scheduler_type": "linear",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "optim": "adamw_torch_fused",
        "bf16": False,
        "use_cpu": not torch.cuda.is_available(),
        checkpointing: False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    return DPOConfig(**(settings | changes))


def make_trainer(
    model: str | None, config: DPOConfig, records: Sequence[Record], with_reference: bool = False, **more: Any
) -> DPOTrainer:
    """TRL's trainer on the records in their order; ``with_reference`` keeps a second model as the reference.

    ``more`` are its own arguments.
    """
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    source = find_model(model)
    trainer = DPOTrainer(
        model=load_model(source),
        ref_model=load_model(source) if with_reference else None,
        args=config,
        train_dataset=datasets.Dataset.from_list(list(records)),
        processing_class=load_tokenizer(source),
        **more,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def pairs_of(dataset: Any) -> list[Pair]:
    """The token ids that TRL made."""
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [Pair("", *(np.array(row[name], dtype=np.int32) for name in names)) for row in dataset]


class Blocks(TrainerCallback):
    """Stop the one training run between blocks of steps and measure each."""

    def __init__(self, meter: Meter, steps: Sequence[int]) -> None:
        self.meter, self.ends = meter, np.cumsum(steps).tolist()

    def on_train_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        self.meter.holders.append(objects["optimizer"])
        self.meter.begin()

    def on_step_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        if state.global_step in self.ends:
            self.meter.end()
            if state.global_step != self.ends[-1]:
                self.meter.begin()


class Theirs:
    """Phases of one DPOTrainer whose reference is precomputed; blocks count pairs."""

    def __init__(self, job: Message, meter: Meter) -> None:
        self.meter, self.batch_size, options = meter, job["options"]["batch_size"], job["options"]
        records = [json.loads(line) for line in Path(job["train"]).read_text(encoding="utf-8").splitlines()]
        held_out = [json.loads(line) for line in Path(job["held_out"]).read_text(encoding="utf-8").splitlines()]
        config = trl_config(
            Path(job["folder"]) / "trl",
            len(job["order"]),
            job["trl_batch"],
            gradient_accumulation_steps=self.batch_size // job["trl_batch"],
            precompute_ref_log_probs=True,
            beta=options["beta"],
            learning_rate=options["lr"],
            max_length=options["max_length"],
            max_grad_norm=1.0,
            seed=options["seed"],
            bf16=options["dtype"] == "bfloat16",
        )
        # It precomputes when it is made; all that matters is done block by block below.
        self.trainer = make_trainer(job["model"], config, records[:1])
        ordered = [records[place] for step in job["order"] for place in step]
        self.rows, self.held_out = (self._prepare(each) for each in (ordered, held_out))
        self.referenced: list[Any] = []
        meter.holders.append(self.trainer.model)
        self.about = {"ids": [Pairs(pairs_of(self.rows)).digest(), Pairs(pairs_of(self.held_out)).digest()]}

    def _prepare(self, records: list[Record]) -> Any:
        trainer = self.trainer
        return trainer._prepare_dataset(
            datasets.Dataset.from_list(records), trainer.processing_class, trainer.args, "train"
        )

    def _score(self, dataset: Any) -> Any:
        """The dataset with reference log-probs, as the trainer's constructor adds them."""
        args = self.trainer.args
        batch_size = args.precompute_ref_batch_size or args.per_device_train_batch_size
        return self.trainer._precompute_ref_logps(dataset, "train", batch_size)

    def precompute(self, blocks: list[int]) -> Message:
        start = 0
        for count in blocks:
            dataset = self.rows.select(range(start, start + count))
            self.meter.begin()
            self.referenced.append(self._score(dataset))
            self.meter.end()
            start += count
        return {}

    def _ready(self) -> None:
        """Give the trainer its rows, scored here where no phase did; before the first step, or the policy scores."""
        if self.trainer.eval_dataset is None:
            parts = self.referenced or [self._score(self.rows)]
            self.trainer.train_dataset = datasets.concatenate_datasets(parts)
            self.trainer.eval_dataset = self._score(self.held_out)

    def train(self, blocks: list[int]) -> Message:
        self._ready()
        callback = Blocks(self.meter, [count // self.batch_size for count in blocks])
        self.trainer.add_callback(callback)
        self.trainer.train()
        self.trainer.remove_callback(callback)
        return {"losses": [entry["loss"] for entry in self.trainer.state.log_history if "loss" in entry]}

    def eval(self, blocks: list[int]) -> Message:
        """Score the held-out pairs once a block."""
        self._ready()
        losses = []
        for _ in blocks:
            self.meter.begin()
            losses.append(self.trainer.evaluate()["eval_loss"])
            self.meter.end()
        return {"losses": losses}


if __name__ == "__main__":
    serve(Theirs)
