"""A DPO run with TRL as its users write it, from files and a model's folder; it ends with its first step.

    python -m benchmarks.trl.start '{"model": …, "train": …, "told": …, "batch_size": 8, …}'

Writes how often the reference was run to the file ``told`` when the first step is done.
"""

import json
import sys
from pathlib import Path

from datasets import load_dataset
from transformers import TrainerCallback

from benchmarks.trl.theirs import trl_config
from trl import DPOTrainer


class CountingTrainer(DPOTrainer):
    """Counts reference forwards; changes nothing."""

    forwards = 0

    def compute_ref_log_probs(self, *arguments, **named):
        CountingTrainer.forwards += 1
        return super().compute_ref_log_probs(*arguments, **named)


class Tell(TrainerCallback):
    def __init__(self, file: str) -> None:
        self.file = Path(file)

    def on_step_end(self, args, state, control, **objects):
        self.file.write_text(json.dumps({"reference_forwards": CountingTrainer.forwards}) + "\n")
        control.should_training_stop = True


def main() -> None:
    job = json.loads(sys.argv[1])
    config = trl_config(
        Path(job["output"]),
        job["steps"],
        job["trl_batch"],
        gradient_accumulation_steps=job["batch_size"] // job["trl_batch"],
        precompute_ref_log_probs=True,
        learning_rate=job["lr"],
        beta=job["beta"],
        max_length=job["max_length"],
        bf16=job["dtype"] == "bfloat16",
    )
    rows = load_dataset("json", data_files=job["train"], split="train")
    CountingTrainer(model=job["model"], args=config, train_dataset=rows, callbacks=[Tell(job["told"])]).train()


if __name__ == "__main__":
    main()
