"""How far the start policy is from its own cached reference: ``python -m benchmarks.gpu.step_0 MODEL [ROWS]``.

The two are one model, so that all of it is arithmetic: other matrix-product kernels for forwards of other shapes.
Random weights have logits near 0 and show nothing of it; real ones do. A line for each way of keeping the weights.
"""

import sys
import tempfile
from pathlib import Path

from benchmarks.trl.cases import ROOT
from benchmarks.trl.ours import make_options
from dpo_cli.models.noise import excess
from dpo_cli.training.loop import make_trainer
from dpo_cli.training.setup import prepare_run, score_reference
from dpo_cli.training.step import compare_with_reference
from dpo_cli.utils.console import Reporter
from dpo_cli.utils.distributed import started


def main(model: str, rows: str) -> None:
    for flags in ("--memory full", "--memory split --dtype bfloat16"):
        with tempfile.TemporaryDirectory() as temporary, started() as device:
            folder = Path(temporary)
            given = {"model": model, "data": [rows], "output": folder / "run", "cache_dir": folder / "cache"}
            run = prepare_run(make_options(flags, folder, batch_size=64, **given), None, device, Reporter(quiet=True))
            score_reference(run)
            pairs = [place for indices in run.plan[0] for place in indices]
            trainer = make_trainer(run)
            values, differences, tokens = compare_with_reference(trainer, pairs)
            largest, noise = float((differences.abs() / tokens.sqrt()).max()), trainer.runner.noise
        off = f"off by at most {largest:.3g} nats per root of its tokens (noise {noise:.3g})"
        share = f"{excess(differences, tokens, noise):.2f} of the limit"
        about = f"{flags}, {run.options.dtype} on {device}: {len(pairs)} pairs, loss {values['loss']:.6f}"
        print(f"{about}, a response is {off}, {share}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else str(ROOT / "sample_data" / "train.jsonl"))
