"""A run that was killed or interrupted goes on to the very weights and lines of an uninterrupted one.

Commands run in processes of their own, forked from one that has the libraries loaded; they get real signals, from
outside or at an exact point within.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from dpo_cli.config.resolve import resolve_training
from dpo_cli.evaluation.metrics import truncate_metrics
from dpo_cli.training.checkpoint import newest_checkpoint, save_checkpoint
from dpo_cli.utils.errors import UsageError
from dpo_cli.utils.files import with_checksum
from tests.helpers import make_model
from tests.helpers.runs import (
    Place,
    Strike,
    assert_equal,
    lines,
    make_place,
    newest_step,
    told_command,
    weights,
)

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Place]]:
    """Every place that was made; what still runs in one when the tests are over is killed."""
    made: list[Place] = []
    yield made
    for place in made:
        for process in place.started:
            if process.is_alive():
                process.kill()


@pytest.fixture(scope="module")
def place(places: list[Place], tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Place:
    """Where ``whole`` is an uninterrupted run and the reference is cached."""
    place = make_place(tmp_path_factory.mktemp("place"), tokenizer)
    places.append(place)
    code, told = place.train("whole")
    assert code == 0, told
    return place


@pytest.fixture(scope="module")
def stopped(place: Place) -> Path:
    """A run that was killed in step 7 of 10; its checkpoints are those of steps 4 and 6."""
    code, told = place.train("stopped", strike=Strike("dpo_cli.training.loop:Trainer.step", 7))
    assert code == -signal.SIGKILL, told
    assert [p.name for p in sorted((place.folder / "stopped" / "checkpoints").iterdir())] == [
        "step-000004",
        "step-000006",
    ]
    return place.folder / "stopped"


@pytest.fixture
def copy(stopped: Path, request: pytest.FixtureRequest) -> Path:
    """A copy of that run for one test alone."""
    name = "copy-" + re.sub(r"\W+", "-", request.node.name)
    return shutil.copytree(stopped, stopped.parent / name)


def test_the_uninterrupted_run_is_what_the_others_are_measured_by(place: Place) -> None:
    """It crosses an epoch's edge, cuts steps into several forwards, evaluates on the way, and moves the weights."""
    code, told = place.dpo("train", *place.options("dry"), "--dry-run")
    assert code == 0
    steps, forwards = map(int, re.search(r"(\d+) steps of 3 pairs in (\d+) micro-batches", told).groups())  # type: ignore[union-attr]
    assert steps == 10 and forwards > 1.5 * steps
    records = [json.loads(line) for line in lines(place.folder / "whole")]
    assert [r["step"] for r in records if "loss" in r] == list(range(1, 11))
    assert [r["step"] for r in records if "eval_loss" in r] == [0, 4, 8, 10]
    start, trained = load_file(place.folder / "model" / "model.safetensors"), weights(place.folder / "whole")
    assert all(not torch.equal(start[name], trained[name]) for name in start)


# ---- killed -----------------------------------------------------------------------------------------------------


def test_killed_three_times_from_outside(
    places: list[Place], tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    """40 steps; SIGKILL as soon as the metrics show one of three random steps, each time resumed."""
    place = make_place(tmp_path, tokenizer, rows=58)
    places.append(place)
    code, told = place.train("whole")
    assert code == 0 and len([line for line in lines(tmp_path / "whole") if '"loss"' in line]) == 40, told
    run = tmp_path / "run"
    kills = sorted(random.Random(7).sample(range(3, 30), 3))
    arguments: list[Any] = ["train", *place.options("run")]
    for kill in kills:
        command = place.start(*arguments, pause=0.03)
        while command.process.is_alive() and newest_step(run) < kill:
            time.sleep(0.001)
        command.process.kill()
        assert command.end() == -signal.SIGKILL, command.told
        arguments = ["train", "--resume", "run"]
    code, told = place.dpo(*arguments)
    assert code == 0, told
    assert kills[-1] - 2 <= int(re.search(r"after step (\d+) of 40", told)[1]) < 40, told  # type: ignore[index]
    assert_equal(run, tmp_path / "whole")


@pytest.mark.parametrize(
    "strike",
    [
        Strike("dpo_cli.models.logprobs:HiddenStates.backward", 13),  # between the micro-batches of a step
        Strike("dpo_cli.training.trackers:append_metrics", 9),  # after a step, before its line
        Strike("dpo_cli.evaluation.kl:divergences", 5),  # in an evaluation
        Strike("dpo_cli.training.trackers:append_metrics", 11),  # evaluated, before its line
        Strike("dpo_cli.training.loop:write_report", 2),  # its line is written, its report is not
        Strike("dpo_cli.training.loop:write_report", 4),  # trained and exported, the last report is not written
        Strike("dpo_cli.training.checkpoint:save_file", 2 * 3 + 2),  # weights written, moments not
        Strike("dpo_cli.training.checkpoint:sha256", 2 * 3 + 2),  # all written, no manifest
        Strike("dpo_cli.training.checkpoint:shutil.rmtree", 1),  # an old checkpoint about to be dropped
        Strike("transformers:PreTrainedModel.save_pretrained"),  # trained, not exported
    ],
    ids=lambda strike: f"{strike.function.partition(':')[2]}-{strike.call}",
)
def test_killed_at_a_point_within(place: Place, strike: Strike) -> None:
    name = "killed-" + re.sub(r"\W", "-", f"{strike.function}-{strike.call}")
    code, told = place.train(name, strike=strike)
    assert code == -signal.SIGKILL, told
    assert (place.folder / name / "model").exists() == (strike.function.endswith("write_report") and strike.call == 4)
    code, told = place.dpo("train", "--resume", name, "--save-steps", 3, "--save-total-limit", 3, "--logging-steps", 1)
    assert code == 0, told
    assert_equal(place.folder / name, place.folder / "whole")
    left = {p.name for p in (place.folder / name).rglob(".*")}
    assert left == set(), "what the killed process was writing is still there"


def test_a_line_that_the_kill_cut_short_is_dropped(place: Place, copy: Path) -> None:
    with (copy / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 7, "loss": 0.3')
    code, told = place.dpo("train", "--resume", copy)
    assert code == 0, told
    assert_equal(copy, place.folder / "whole")


def test_a_kill_while_the_metrics_are_cut_back_loses_no_line(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = lines(copy)

    def killed(self: Path, *_: Any, **__: Any) -> int:
        """The file is open and still empty."""
        self.open("w").close()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "write_text", killed)
        truncate_metrics(copy / "metrics.jsonl", 6)
    assert lines(copy) == before
    truncate_metrics(copy / "metrics.jsonl", 4)
    assert lines(copy) == [line for line in before if json.loads(line)["step"] <= 4]


def test_a_finished_run_stays_as_it_is(place: Place) -> None:
    run = shutil.copytree(place.folder / "whole", place.folder / "finished")
    code, told = place.dpo("train", "--resume", "finished", "--json")
    assert code == 0, told
    assert_equal(run, place.folder / "whole")
    evaluated = json.loads(lines(run)[-1])
    assert json.loads(told.splitlines()[-1])["after"]["loss"] == evaluated["eval_loss"]


@pytest.mark.parametrize(
    ("model", "number"),
    [
        ({"attention_dropout": 0.2}, signal.SIGKILL),
        ({"family": "gpt2", "resid_pdrop": 0.2, "attn_pdrop": 0.1, "embd_pdrop": 0.1}, signal.SIGTERM),
    ],
    ids=["llama", "gpt2"],
)
def test_a_model_that_asks_for_dropout_goes_on_the_same(
    places: list[Place], tmp_path: Path, tokenizer: PreTrainedTokenizerFast, model: dict[str, Any], number: int
) -> None:
    """Dropout is off. Killed in a step, it goes on from the last checkpoint; interrupted, from before the step."""
    place = make_place(tmp_path, tokenizer, **model)
    places.append(place)
    code, told = place.train("whole")
    assert code == 0, told
    code, told = place.train("run", strike=Strike("dpo_cli.models.logprobs:HiddenStates.backward", 10, (number,)))
    assert code == (130 if number == signal.SIGTERM else -number), told
    found = newest_checkpoint(tmp_path / "run" / "checkpoints", pytest.fail)
    assert found and (found[1] % 2 == 1) == (number == signal.SIGTERM)  # else it was not written at the interruption
    code, told = place.dpo("train", "--resume", "run")
    assert code == 0, told
    assert_equal(tmp_path / "run", tmp_path / "whole")


# ---- interrupted ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("phase", "call", "number"),
    [
        ("evaluation.kl:divergences", 1, signal.SIGTERM),  # in the evaluation before the first step
        ("training.loop:Trainer.step", 1, signal.SIGINT),
        ("models.logprobs:HiddenStates.backward", 13, signal.SIGTERM),  # between the micro-batches of a step
        ("models.logprobs:HiddenStates.backward", 13, signal.SIGINT),
        ("training.trackers:append_metrics", 8, signal.SIGTERM),
        ("evaluation.kl:divergences", 5, signal.SIGINT),  # in an evaluation on the way
        ("training.trackers:append_metrics", 11, signal.SIGTERM),
        ("training.loop:write_report", 2, signal.SIGINT),
        ("training.loop:save_checkpoint", 3, signal.SIGTERM),
        ("training.results:export_model", 1, signal.SIGINT),
    ],
)
def test_interrupted_run_says_how_to_go_on(place: Place, phase: str, call: int, number: signal.Signals) -> None:
    """Exit code 130, a checkpoint at most a step old, and the very command to go on, also with a space in the name."""
    name = f"my {phase.partition(':')[2]} {call} {number.name}"
    run = place.folder / name
    code, told = place.train(name, strike=Strike(f"dpo_cli.{phase}", call, (number,)))
    if phase != "training.results:export_model" or code:  # the work is done there: it may as well come to its end
        assert code == 130, told
        found = newest_checkpoint(run / "checkpoints", pytest.fail)
        assert found and found[1] == max(newest_step(run), 0)
        assert "Traceback" not in told
        assert not (run / "model").exists()
        code, told = place.dpo(*told_command(told))
    assert code == 0, told
    assert_equal(run, place.folder / "whole")


def test_two_interruptions_in_a_row(place: Place) -> None:
    code, told = place.train(
        "twice", strike=Strike("dpo_cli.models.logprobs:HiddenStates.backward", 8, (signal.SIGINT,))
    )
    assert code == 130, told
    strike = Strike("dpo_cli.models.logprobs:HiddenStates.backward", 1, (signal.SIGTERM,))
    code, told = place.dpo(*told_command(told), strike=strike)  # in the first step after resuming
    assert code == 130, told
    code, told = place.dpo(*told_command(told))
    assert code == 0, told
    assert_equal(place.folder / "twice", place.folder / "whole")


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_second_signal_ends_at_once(place: Place, number: signal.Signals) -> None:
    strike = Strike("dpo_cli.models.logprobs:HiddenStates.backward", 13, (number, number))
    code, told = place.train(f"impatient-{number.name}", strike=strike)
    assert code == -number, told
    assert "a checkpoint was written" not in told


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_interrupted_while_the_reference_is_scored(place: Place, number: signal.Signals) -> None:
    """What was scored is kept, and the same command goes on from there."""
    arguments = ("--cache-dir", f"cache-{number.name}")
    strike = Strike("dpo_cli.reference.store:response_logps", 6, (number,))
    code, told = place.train(f"scored-{number.name}", *arguments, strike=strike)
    assert code == 130 and "rerun the command to continue" in told, told
    assert "Traceback" not in told
    assert not (place.folder / f"scored-{number.name}").exists()
    code, told = place.train(f"scored-{number.name}", *arguments)
    assert code == 0, told
    cached = int(re.search(r"(\d+) of 18 pairs cached", told)[1])  # type: ignore[index]
    assert 5 <= cached < 18
    assert_equal(place.folder / f"scored-{number.name}", place.folder / "whole")


# ---- which checkpoint -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["weights.safetensors", "optimizer.safetensors", "manifest.json"])
@pytest.mark.parametrize("damage", ["bit", "cut", "missing"])
def test_a_damaged_checkpoint_is_told_and_the_one_before_taken(
    place: Place, copy: Path, file: str, damage: str
) -> None:
    harm(copy / "checkpoints" / "step-000006" / file, damage)
    told: list[str] = []
    found = newest_checkpoint(copy / "checkpoints", told.append)
    assert found == (copy / "checkpoints" / "step-000004", 4)
    assert len(told) == 1 and "step-000006" in told[0]


def harm(file: Path, damage: str) -> None:
    content = bytearray(file.read_bytes())
    if damage == "bit":
        content[random.Random(file.name).randrange(len(content))] ^= 0x40
    file.write_bytes(content[: len(content) // 2] if damage == "cut" else content)
    if damage == "missing":
        file.unlink()


def test_no_flipped_bit_of_a_manifest_is_believed(tmp_path: Path) -> None:
    """One in each byte, all around the step: the one before is taken, or this one as it is; never another step."""
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    older, newest = (
        save_checkpoint(tmp_path, step, model, optimizer, 64, keep=2)  # type: ignore[arg-type]
        for step in (8, 10)
    )
    content = (newest / "manifest.json").read_bytes()
    rng, step, wrong = random.Random(0), content.index(b'"step"'), []
    flips = {(place, rng.randrange(8)) for place in range(len(content))}
    for place, bit in flips | set(itertools.product(range(step, step + 12), range(8))):
        damaged = bytearray(content)
        damaged[place] ^= 1 << bit
        (newest / "manifest.json").write_bytes(damaged)
        if (found := newest_checkpoint(tmp_path, lambda text: None)) not in ((newest, 10), (older, 8)):
            wrong.append((place, bit, found))
        if not newest.exists():
            (tmp_path / f"damaged-{newest.name}").rename(newest)
    assert wrong == []


def test_the_newest_is_that_of_most_steps_however_many_digits(tmp_path: Path) -> None:
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    for step in (999_999, 1_000_000, 1_000_001):
        save_checkpoint(tmp_path, step, model, optimizer, 64, keep=2)  # type: ignore[arg-type]
    found = newest_checkpoint(tmp_path, pytest.fail)
    assert found and found[1] == 1_000_001
    assert len(list(tmp_path.iterdir())) == 2


def test_resume_from_the_older_checkpoint(place: Place, copy: Path) -> None:
    """The damaged one is told, the result is the same, and what is left at the end is whole."""
    checkpoints = copy / "checkpoints"
    harm(checkpoints / "step-000006" / "weights.safetensors", "bit")
    code, told = place.dpo("train", "--resume", copy, "--save-total-limit", 9)
    assert code == 0, told
    assert re.search(r"warning: .*step-000006.* damaged", told)
    assert "after step 4 of 10" in told
    assert_equal(copy, place.folder / "whole")
    steps = []
    while found := newest_checkpoint(checkpoints, pytest.fail):
        steps.append(found[1])
        shutil.rmtree(found[0])
    assert steps[0] == 10 and steps[-1] == 4


def test_a_damaged_checkpoint_does_not_push_out_a_whole_one(place: Place, copy: Path) -> None:
    harm(copy / "checkpoints" / "step-000006" / "weights.safetensors", "bit")
    strike = Strike("dpo_cli.training.loop:Trainer.step", 1, (signal.SIGTERM,))
    code, told = place.dpo("train", "--resume", copy, "--save-total-limit", 1, strike=strike)
    assert code == 130, told
    code, told = place.dpo(*told_command(told))
    assert code == 0, told
    assert_equal(copy, place.folder / "whole")


@pytest.mark.parametrize("state", ["all damaged", "no checkpoint"])
def test_without_a_whole_checkpoint_a_run_goes_on_from_its_start(place: Place, copy: Path, state: str) -> None:
    if state == "all damaged":
        for folder in (copy / "checkpoints").iterdir():
            harm(folder / "optimizer.safetensors", "cut")
    if state == "no checkpoint":
        shutil.rmtree(copy / "checkpoints")
    code, told = place.dpo("train", "--resume", copy)
    assert code == 0, told
    assert told.count("is damaged") == (2 if state == "all damaged" else 0)
    assert "from the start: no whole checkpoint" in told and "loss 0.693147" in told
    assert_equal(copy, place.folder / "whole")


@pytest.mark.parametrize("state", ["no manifest", "no run", "nothing"])
def test_nothing_to_go_on_from(place: Place, copy: Path, state: str) -> None:
    if state == "no manifest":
        (copy / "manifest.json").unlink()
    if state == "no run":
        (copy / "config.yaml").unlink()
    if state == "nothing":
        shutil.rmtree(copy)
    code, told = place.dpo("train", "--resume", copy)
    assert code == 2, told
    assert f"error: --resume {copy}: " in told and "Traceback" not in told
    assert not (copy / "model").exists()


# ---- the same run -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("lr", 2e-3), ("seed", 1), ("beta", 0.2), ("batch_size", 4), ("epochs", 3), ("max_steps", 20),
        ("max_length", 64), ("max_tokens", 700), ("warmup_ratio", 0.0), ("lr_scheduler", "cosine"),
        ("weight_decay", 0.1),
        ("max_grad_norm", 0.5), ("label_smoothing", 0.1), ("dtype", "bfloat16"), ("gradient_checkpointing", True),
        ("model", "other"), ("data", ["other.jsonl"]), ("eval_data", ["other.jsonl"]),
        ("columns", "prompt=p"), ("control_tokens", "refuse"), ("pairs", "all"), ("margin_per_score", 0.5),
    ],
)  # fmt: skip
def test_what_is_trained_cannot_be_changed(stopped: Path, flag: str, value: Any) -> None:
    with pytest.raises(UsageError, match=f"cannot change --{flag.replace('_', '-')} ") as caught:
        resolve_training({flag: value, "save_steps": 7}, stopped)
    assert "save" not in str(caught.value)


def test_every_change_is_named_at_once(place: Place, stopped: Path) -> None:
    flags = ("--lr", 2e-3, "--seed", 3, "--beta", 0.5, "--batch-size", 5, "--save-steps", 9)
    before = {p: p.stat().st_mtime_ns for p in stopped.rglob("*")}
    code, told = place.dpo("train", "--resume", stopped, *flags)
    assert code == 2, told
    before_it = ("began with --lr 0.001", "began with --batch-size 3")
    for text in ("--lr 0.002", "--seed 3", "--beta 0.5", "--batch-size 5", *before_it):
        assert text in told
    assert "--save-steps" not in told
    assert before == {p: p.stat().st_mtime_ns for p in stopped.rglob("*")}


def test_a_finished_run_names_the_command_that_trains_its_model_further(place: Place) -> None:
    start = ("--model", "model", "--data", "rows.jsonl", "--batch-size", 4, "--lr", 1e-2, "--max-length", 100)
    code, told = place.dpo("train", *start, "--output", "done", "--max-steps", 1)
    assert code == 0, told
    code, told = place.dpo("train", "--resume", "done", "--epochs", 3)
    words = " ".join(told.split())
    assert code == 2 and "--epochs 3 (it began with --epochs 1). A new run can: dpo train --config" in words
    assert words.endswith("--output done-2 --epochs 3; add --model done to train its model further")


def test_what_the_run_began_with_may_be_said_again(stopped: Path) -> None:
    flags = {
        "lr": 1e-3,
        "data": ["rows.jsonl"],
        "batch_size": 3,
        "save_steps": 5,
        "save_total_limit": 1,
        "logging_steps": 3,
    }
    options = resolve_training(flags, stopped)
    assert (options.lr, options.save_steps, options.save_total_limit, options.logging_steps) == (1e-3, 5, 1, 3)


@pytest.mark.parametrize("edited", ["rows.jsonl", "held-out.jsonl", "model"])
def test_refused_when_the_input_was_edited_since(place: Place, copy: Path, edited: str) -> None:
    """Data of the same size, and the start model by one unit in the last place."""
    elsewhere = shutil.copytree(
        place.folder, place.folder.parent / f"edited-{edited}", ignore=lambda *_: {"whole", "stopped"}
    )
    if edited == "model":
        model = make_model()
        first = model.get_input_embeddings().weight.data.view(-1)[:1]
        first.copy_(torch.nextafter(first, torch.tensor(9.0)))
        model.save_pretrained(elsewhere / "model")
    else:
        text = (elsewhere / edited).read_text()
        (elsewhere / edited).write_text(text.replace(" the ", " The ", 1))
    code, told = Place(elsewhere).dpo("train", "--resume", copy.name)
    assert code == 2, told
    what = {"rows.jsonl": "the data", "held-out.jsonl": "the held-out data", "model": "the start model"}[edited]
    assert f"--resume {copy.name}: {what} changed since the run began" in told


@pytest.mark.parametrize("other", ["device", "weights"])
def test_resumed_on_another_device_with_the_same_weights(place: Place, copy: Path, other: str) -> None:
    """A fingerprint holds both; of weights that changed, another device is no excuse."""
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["sha256"]
    manifest["device"] = "cuda"
    for name in ("start", "reference"):
        how, weights = manifest[name]["fingerprint"][:16], manifest[name]["fingerprint"][16:]
        manifest[name]["fingerprint"] = "0" * 16 + weights if other == "device" else how + "0" * 48
    (copy / "manifest.json").write_text(json.dumps(with_checksum(manifest)))
    code, told = place.dpo("train", "--resume", copy.name)
    if other == "device":
        assert code == 0 and "the libraries or the device have changed since the run began" in told, told
        assert_equal(copy, place.folder / "whole")
    else:
        assert code == 2 and "the start model changed since the run began" in told, told


@pytest.mark.parametrize("name", ["config.yaml", "manifest.json"])
def test_refused_when_the_runs_own_files_were_edited(place: Place, copy: Path, name: str) -> None:
    """A learning rate changed by hand would be another training; a flipped bit may be anything."""
    text = (copy / name).read_text()
    old, new = ("lr: 0.001", "lr: 0.002") if name == "config.yaml" else ('"pairs": 14', '"pairs": 15')
    assert old in text
    (copy / name).write_text(text.replace(old, new))
    code, told = place.dpo("train", "--resume", copy)
    assert code == 2, told
    assert name in told and ("changed since" in told or "its content was changed" in told) and "Traceback" not in told
    assert not (copy / "model").exists()


def test_its_config_repeats_a_run(place: Place) -> None:
    code, told = place.dpo("train", "--config", "whole/config.yaml", "--output", "again")
    assert code == 0, told
    assert_equal(place.folder / "again", place.folder / "whole")
    configs = [(place.folder / run / "config.yaml").read_text() for run in ("whole", "again")]
    assert configs[0] == configs[1]
    assert yaml.safe_load(configs[0])["max_tokens"] == 600


def test_another_seed_is_another_run(place: Place) -> None:
    """So that the equalities above say something."""
    code, told = place.dpo("train", "--config", "whole/config.yaml", "--seed", 1, "--output", "seed-1")
    assert code == 0, told
    with pytest.raises(AssertionError):
        assert_equal(place.folder / "seed-1", place.folder / "whole")
