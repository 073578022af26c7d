"""Training here and with TRL's DPOTrainer gives the same numbers: log-probs, losses, gradients, weights.

Both run their own loops from the same weights, over the same rows in the same order; see ``benchmarks/trl/parity.py``.
"""

import json
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from benchmarks.trl.parity import Parity, compare
from dpo_cli.config.options import TrainOptions
from tests.helpers import SAMPLE, write_rows

pytestmark = [
    # transformers renames the method that TRL 1.16 still calls by its old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
STEPS, BATCH_SIZE = 10, 4


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of strings of different lengths, two epochs of them in all steps; short, so that float32 sums stay exact."""
    found = [json.loads(line) for line in (SAMPLE / "train-strings.jsonl").read_text().splitlines()[:20]]
    for number, row in enumerate(found):
        row["chosen"], row["rejected"] = row["chosen"][: 10 + number], row["rejected"][: 60 - 2 * number]
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", found)


@pytest.fixture(scope="module")
def parity(tiny: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Parity:
    options = TrainOptions(
        model=str(tiny),
        data=[str(rows)],
        batch_size=BATCH_SIZE,
        max_steps=STEPS,
        epochs=2,
        max_tokens=192,  # several unequal micro-batches a step here, one padded batch there
        beta=0.5,
        lr=1e-3,
        warmup_ratio=0.0,
        max_grad_norm=1.0,
        dtype="float32",
        seed=7,
    )
    AcceleratorState._reset_state(reset_partial_state=True)  # it would keep the device of another test
    return compare(options, 20, tmp_path_factory.mktemp("parity"))


def test_token_ids(parity: Parity) -> None:
    assert len(parity.our_logps) == STEPS * BATCH_SIZE
    assert parity.other_ids == 0


def test_logps(parity: Parity) -> None:
    assert parity.logps_differences().max() < 1e-4


def test_losses(parity: Parity) -> None:
    assert len(parity.our_losses) == len(parity.trl_losses) == STEPS
    assert max(parity.loss_differences()) < 1e-5
    assert max(parity.our_losses) - min(parity.our_losses) > 0.2  # it does learn, and not the same at each step


def test_gradients_before_clipping(parity: Parity) -> None:
    assert parity.our_grad_norms == pytest.approx(parity.trl_grad_norms, rel=1e-4)
    assert min(parity.our_grad_norms) < 1 < max(parity.our_grad_norms)  # some steps are clipped


def test_final_weights(parity: Parity) -> None:
    """The difference is below 1e-5 of what training changed in the weights, which is far below 1e-5 of the weights."""
    assert parity.change > 0.01
    assert parity.weights_by_change < 1e-5
    assert parity.weights_by_norm < 1e-6
