"""Train the same pairs here and with TRL's DPOTrainer, and show how far the numbers lie apart.

    python -m benchmarks.trl.parity --data pairs.jsonl --columns prompt=instruction --rows 16 --steps 4

Both sides get the same start weights, the same rows as strings in the same order, float32 and the same optimizer and
schedule; each runs its own loop. Rows that cannot be used or would be truncated are passed over: the two truncate
differently. Prints a table, then one JSON object.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.trl.cases import Record, as_record, step_order, usable_rows, write_records
from benchmarks.trl.theirs import make_trainer, pairs_of, trl_config
from dpo_cli.config.options import TrainOptions
from dpo_cli.data.pairs import Pair, Pairs
from dpo_cli.reference.store import ReferenceCache
from dpo_cli.training.loop import train
from dpo_cli.utils.console import Reporter
from trl import DPOTrainer


@dataclass(frozen=True)
class Parity:
    """What both sides computed. Log-probs in nats, (pairs, 2), chosen and rejected, under the start weights."""

    other_ids: int  # pairs whose token ids differ
    our_logps: list[list[float]]
    trl_logps: list[list[float]]
    our_losses: list[float]
    trl_losses: list[float]
    our_grad_norms: list[float]
    trl_grad_norms: list[float]
    change: float  # norm of what training changed in TRL's weights, by the norm of the start weights
    weights_by_change: float  # norm of the difference of the final weights, by the norm of what training changed
    weights_by_norm: float  # the same by the norm of the weights

    def logps_differences(self) -> Tensor:
        return (torch.tensor(self.our_logps) - torch.tensor(self.trl_logps)).abs()

    def loss_differences(self) -> list[float]:
        return [abs(a - b) for a, b in zip(self.our_losses, self.trl_losses, strict=True)]

    def summary(self) -> dict[str, Any]:
        """All but the single log-probs, of which there are many."""
        apart = self.logps_differences()
        found = {
            "pairs": len(apart),
            "logps_max_difference": float(apart.max()),
            "logps_mean_difference": float(apart.mean()),
        }
        return found | {name: value for name, value in asdict(self).items() if not name.endswith("_logps")}


def compare(options: TrainOptions, rows: int, folder: Path) -> Parity:
    """Train on the first ``rows`` usable rows, here and with TRL; files go to the empty ``folder``."""
    if rows % options.batch_size:
        raise SystemExit(f"--rows {rows} must be a multiple of --batch-size {options.batch_size}")
    found = usable_rows(options, rows)
    steps = step_order(rows, options)
    order = [index for step in steps for index in step]
    records = [as_record(row) for row, _ in found]
    our_logps, metrics, our_weights = run_ours(options, records, [found[i][1] for i in order], folder)
    trainer = make_trl_trainer(options, [records[i] for i in order], len(steps), folder)
    expected, theirs = ([found[i][1] for i in order], pairs_of(trainer.train_dataset))
    other_ids = sum(Pairs([a]).digest() != Pairs([b]).digest() for a, b in zip(expected, theirs, strict=True))
    start = weights_of(trainer.model)
    trl_logps = score_with_trl(trainer)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    final = weights_of(trainer.model)
    changed, apart = norm(final, start), norm(our_weights, final)
    return Parity(
        other_ids=other_ids,
        our_logps=our_logps.tolist(),
        trl_logps=trl_logps.tolist(),
        our_losses=[line["loss"] for line in metrics],
        trl_losses=[entry["loss"] for entry in log],
        our_grad_norms=[line["grad_norm"] for line in metrics],
        trl_grad_norms=[entry["grad_norm"] for entry in log],
        change=changed / norm(start),
        weights_by_change=apart / changed,
        weights_by_norm=apart / norm(final),
    )


def run_ours(
    options: TrainOptions, records: list[Record], pairs: Sequence[Pair], folder: Path
) -> tuple[Tensor, list[dict[str, float]], dict[str, Tensor]]:
    """Start log-probs of the pairs, a line a step and the final weights of `dpo train`."""
    file, cache = write_records(folder / "pairs.jsonl", records), folder / "cache"
    changed = {"data": [str(file)], "columns": None, "output": folder / "run", "cache_dir": cache, "format": "strings"}
    train(TrainOptions(**(asdict(options) | changed)), None, ["benchmark"], Reporter(quiet=True))
    reference = json.loads((folder / "run" / "manifest.json").read_text())["reference"]
    logps = ReferenceCache(cache, reference["fingerprint"], print).lookup(pairs)
    metrics = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    model = AutoModelForCausalLM.from_pretrained(folder / "run" / "model", dtype=torch.float32)
    return logps, metrics, weights_of(model)


def make_trl_trainer(options: TrainOptions, records: list[Record], steps: int, folder: Path) -> DPOTrainer:
    """TRL's trainer with the same settings, on the records in their order."""
    config = trl_config(
        folder / "trl",
        steps,
        options.batch_size,
        beta=options.beta,
        learning_rate=options.lr,
        max_grad_norm=options.max_grad_norm,
        max_length=options.max_length or 1024,
        seed=options.seed,
    )
    return make_trainer(options.model, config, records, with_reference=True)


def score_with_trl(trainer: DPOTrainer) -> Tensor:
    """Log-probs of all pairs under the start weights, as TRL's reference forward computes them: (P, 2) nats."""
    parts = []
    for batch in trainer.get_train_dataloader():
        chosen, rejected = trainer.compute_ref_log_probs(trainer.ref_model, batch)
        parts.append(torch.stack([chosen, rejected], dim=1).cpu())
    return torch.cat(parts)


def weights_of(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().double().cpu() for name, parameter in model.named_parameters()}


def norm(weights: dict[str, Tensor], minus: dict[str, Tensor] | None = None) -> float:
    """Euclidean norm over all weights, or of their difference."""
    return sum(float((w - minus[name] if minus else w).square().sum()) for name, w in weights.items()) ** 0.5


def table(parity: Parity) -> str:
    """The differences, a line each."""
    apart = parity.logps_differences()
    lines = [
        f"{'pairs':<44}{len(apart)}, {parity.other_ids} with other token ids",
        f"{'log-prob of a response, largest difference':<44}{apart.max():.1e} nats (mean {apart.mean():.1e})",
        f"{'final weights, difference by change':<44}{parity.weights_by_change:.1e}",
        f"{'final weights, difference by norm':<44}{parity.weights_by_norm:.1e} (training changed {parity.change:.1e})",
        f"{'step':>4}{'our loss':>12}{'TRL loss':>12}{'apart':>10}{'our norm':>12}{'TRL norm':>12}",
    ]
    columns = (parity.our_losses, parity.trl_losses, parity.loss_differences())
    norms = (parity.our_grad_norms, parity.trl_grad_norms)
    for step, (ours, theirs, difference, a, b) in enumerate(zip(*columns, *norms, strict=True), 1):
        lines.append(f"{step:>4}{ours:>12.6f}{theirs:>12.6f}{difference:>10.1e}{a:>12.5f}{b:>12.5f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", help="as of `dpo train`; default: its default")
    parser.add_argument("--data", action="append", required=True, help="preference rows of strings; repeatable")
    parser.add_argument("--columns", help="as of `dpo train`")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--max-length", type=int, default=512)
    given = vars(parser.parse_args())
    rows, steps = given.pop("rows"), given.pop("steps")
    epochs = -(-steps * given["batch_size"] // rows)
    options = TrainOptions(**given, max_steps=steps, epochs=epochs, warmup_ratio=0.0, dtype="float32", save_steps=0)
    with tempfile.TemporaryDirectory() as folder:
        parity = compare(options, rows, Path(folder))
    print(table(parity))
    print(json.dumps(parity.summary()))


if __name__ == "__main__":
    main()
