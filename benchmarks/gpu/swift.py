"""Train the pairs of a case with ms-swift 4.6, padding-free, and with `dpo train`, one after the other.

    python -m benchmarks.gpu.swift --model FOLDER --case hh --device cuda --pairs 32 --batch-size 16

Both as whole commands that log each step, the first step left out: pairs/s, the share of the matmul rate by the same
count of operations (each prompt once), and the peak. The rows are raw strings in both; ms-swift ends no turn, so that a
response has a token less. Both train in bfloat16 over float32 weights, with the reference's log-probs precomputed.
"""

import importlib.util
import json
import statistics
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.trl import bench
from benchmarks.trl.commands import run_ours, run_until
from benchmarks.trl.meter import Message, WorkerDiedError
from benchmarks.trl.shapes import measure_device


def write_rows(job: Message, folder: Path) -> Path:
    """The training rows in their order, as ms-swift reads them."""
    records = [json.loads(line) for line in Path(job["train"]).read_text(encoding="utf-8").splitlines()]
    file = folder / "swift.jsonl"
    with file.open("w", encoding="utf-8") as stream:
        for row in (records[place] for step in job["order"] for place in step):
            turns = [("user", row["prompt"]), ("assistant", row["chosen"])]
            messages = [{"role": role, "content": text} for role, text in turns]
            stream.write(json.dumps({"messages": messages, "rejected_response": row["rejected"]}) + "\n")
    return file


def run_swift(job: Message, environment: dict[str, str], batch: int) -> Message:
    """`swift rlhf` until its last step; its own log has the peak of the device's memory in GiB."""
    folder, options = Path(job["folder"]), job["options"]
    flags: dict[str, Any] = {"rlhf_type": "dpo", "model": job["model"], "dataset": write_rows(job, folder)}
    flags |= {"tuner_type": "full", "torch_dtype": "float32", "bf16": "true", "padding_free": "true"}
    flags |= {"attn_impl": "flash_attn", "template": "dummy", "use_hf": "true", "precompute_ref_log_probs": "true"}
    flags |= {"per_device_train_batch_size": batch, "gradient_accumulation_steps": options["batch_size"] // batch}
    flags |= {"max_steps": len(job["order"]), "max_length": options["max_length"], "learning_rate": options["lr"]}
    flags |= {"beta": options["beta"], "warmup_ratio": 0, "logging_steps": 1, "split_dataset_ratio": 0}
    flags |= {"save_strategy": "no", "report_to": "none", "gradient_checkpointing": "false", "add_version": "false"}
    flags |= {"train_dataloader_shuffle": "false", "dataset_shuffle": "false", "output_dir": folder / "swift"}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    command, log = [sys.executable, "-m", "swift.cli.rlhf", *words], folder / "swift" / "logging.jsonl"
    found = run_until(command, log, len(job["order"]), folder / "swift.log", environment, job["limit"])
    memory = [json.loads(line).get("memory(GiB)", 0) for line in log.read_text().splitlines()]
    return found | {"peak": 1024 * max(memory)}


def main() -> int:
    args = bench.parse(None)
    if importlib.util.find_spec("swift") is None:
        print("ms-swift is not installed: its padding-free DPO is left out")
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        case = bench.make_case(args.case[0], args, Path(args.model), root)
        environment = bench.make_environment(args, root)
        rate, batch = measure_device(args.dtype, args.device, environment)["matmul_rate"], min(args.batch_size or 8, 8)
        runs = {"dpo train": lambda: run_ours(case.job, environment, "cache", steps=len(case.job["order"]))}
        runs[f"ms-swift, padding-free, batches of {batch}"] = lambda: run_swift(case.job, environment, batch)
        for name, run in runs.items():
            try:
                found = run()
            except WorkerDiedError as error:
                print(f"{name}: {error}", flush=True)
                continue
            step = statistics.median(after - before for before, after in pairwise(found["moments"]))
            flops = case.arithmetic.flops(case.ordered, backward=True) / len(case.job["order"])
            print(
                f"{case.name}, {name}: {case.blocks[0] / step:.3g} pairs/s, {flops / step / rate:.1%} of the matmul "
                f"rate, peak {found['peak']:,.0f} MiB, first step after {found['moments'][0]:.0f} s",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
