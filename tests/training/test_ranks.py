"""Several processes are one run: the same trajectory, one cache, one voice, one end.

The long trainings are of processes forked with what torchrun gives to its own; how they end, torchrun itself is asked.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from typer.testing import CliRunner

from benchmarks.memory import hosts, scale
from dpo_cli.cli.app import app
from dpo_cli.training.loop import StopSignal
from dpo_cli.utils import distributed
from dpo_cli.utils.errors import DpoError
from tests.helpers import LONG, ROOT, SAMPLE, cached_logps, cli_environment, make_model
from tests.helpers.ranks_worker import POISONED, run_ranks

pytestmark = pytest.mark.timeout(1500)  # `done` takes five minutes where two of it are made at once

PAIRS, STEPS = 13, 6  # with 5 pairs a step: an epoch's last step has fewer pairs than four ranks
TRAIN = ["--batch-size", "5", "--epochs", "2", "--lr", "1e-3", "--save-steps", "3", "--eval-steps", "3"]
TRAIN += ["--max-tokens", "600", "--max-length", "300", "--memory", "full"]
WEIGHTED = ["--loss", "sigmoid=1,sft=0.2", "--ld-alpha", "0.5"]  # reads log-probs of tokens from the cache


def launch(folder: Path, ranks: int, *command: str) -> list[str]:
    """What starts a command in several processes, on a port that is free."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [*launcher, "-m", *command]


def environment(folder: Path) -> dict[str, str]:
    return cli_environment(folder / "home") | {"PYTHONPATH": str(ROOT)}


def on_ranks(folder: Path, ranks: int, cases: dict[str, Sequence[str]]) -> dict[str, list[dict[str, Any]]]:
    """Run commands on some ranks; of each case how it ended on each rank."""
    for case, words in cases.items():
        (folder / f"{case}.json").write_text(json.dumps(words))
    run_ranks(folder, ranks, [*cases], environment(folder))
    ends = {case: [folder / f"{case}.{rank}.json" for rank in range(ranks)] for case in cases}
    found = {case: [json.loads(file.read_text()) for file in files] for case, files in ends.items()}
    failed = {case for case, ends in found.items() if any(end["exit_code"] for end in ends)}
    assert failed <= {"nan", "usage", "alone"}, [found[case] for case in failed]
    return found


def alone(*words: str) -> str:
    out = CliRunner().invoke(app, list(words))
    assert out.exit_code == 0, out.output
    return out.stderr


def first_half(run: Path, to: Path) -> Path:
    """A copy of a run as it was at its checkpoint of half of its steps."""
    shutil.copytree(run, to)
    shutil.rmtree(to / "checkpoints" / f"step-{STEPS:06d}")
    shutil.rmtree(to / "model")
    return to


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    """One training by 1, 2 and 4 ranks, whole and in shards, and what else they can be made to do meanwhile."""
    folder = tmp_path_factory.mktemp("ranks")
    for name, count in (("train", PAIRS), ("heldout", 6)):
        rows = (SAMPLE / f"{name}.jsonl").read_text().splitlines(keepends=True)[:count]
        (folder / f"{name}.jsonl").write_text("".join(rows))
    data = ["--data", str(folder / "train.jsonl"), "--model", str(tiny)]

    def words(name: str, *more: str) -> list[str]:
        evaluated = ["--eval-data", str(folder / "heldout.jsonl"), "--output", str(folder / name)]
        return ["train", *data, *evaluated, "--cache-dir", str(folder / "cache" / name), *TRAIN, *more]

    def scored(name: str) -> list[str]:
        return ["precompute-ref", *data, "--cache-dir", str(folder / "cache" / name), "--max-tokens", "300", "--json"]

    alone(*words("one"))
    alone(*words("weighted-one", *WEIGHTED))
    shutil.copytree(tiny, folder / "other")
    make_model(seed=1).save_pretrained(folder / "other")
    adapter, ref = ["--lora-rank", "4", "--export", "merged"], ["--ref-model", str(folder / "other")]
    alone(*words("adapter-one", *adapter))
    alone(*words("ref-one", *ref))
    alone(*scored("scored-1"))
    two = {"two": words("two"), "two-shards": words("two-shards", "--fsdp"), "oom": words("oom")}
    two |= {"nan": words("nan"), "usage": words("usage", "--memory", "in-backward", "--max-grad-norm", "0")}
    two |= {"adapter": words("adapter", *adapter), "ref": words("ref", *ref)}
    two |= {"weighted": words("weighted", *WEIGHTED), "weighted-shards": words("weighted-shards", *WEIGHTED, "--fsdp")}
    two["alone"] = words("alone")
    ends = on_ranks(folder, 2, {case: two[case] for case in sorted(two, key=("nan", "usage", "alone").count)})
    alone("train", "--resume", str(first_half(folder / "two-shards", folder / "from-2-to-1")))
    four = {"four": words("four", "--save-best", "loss"), "four-shards": words("four-shards", "--fsdp")}
    four |= {"scored-4": scored("scored-4"), "scored-shards": [*scored("scored-shards"), "--fsdp"]}
    four["from-2-to-4"] = ["train", "--resume", str(first_half(folder / "two", folder / "from-2-to-4"))]
    return folder, ends | on_ranks(folder, 4, four)


def metrics(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


RUNS = ["two", "four", "two-shards", "four-shards", "from-2-to-1", "from-2-to-4", "oom"]
RUNS += ["adapter", "ref", "weighted", "weighted-shards"]


@pytest.mark.parametrize("name", RUNS)
def test_trajectory_is_that_of_one_process(done: tuple[Path, Any], name: str) -> None:
    folder, _ = done
    one = next((f"{kind}-one" for kind in ("adapter", "weighted", "ref") if name.startswith(kind)), "one")
    off = 3e-6 if name == "ref" else 1e-6  # log-ratios to a model far away are hundreds of nats
    expected, found = metrics(folder / one), metrics(folder / name)
    assert [sorted(line) for line in found] == [sorted(line) for line in expected]
    for line, other in zip(expected, found, strict=True):
        assert line["step"] == other["step"]
        for key in {"loss", "eval_loss"} & line.keys():
            assert abs(line[key] - other[key]) < off
        for key, value in line.items():
            assert other[key] == pytest.approx(value, rel=1e-4, abs=1e-4)
    weights, others = (load_file(folder / run / "model" / "model.safetensors") for run in (one, name))
    assert weights.keys() == others.keys()
    near = 3e-5 if one == "weighted-one" else 1e-5  # with two losses AdamW divides more rounding by gradients near 0
    assert max(float((weights[key] - others[key]).abs().max()) for key in weights) < near


@pytest.mark.parametrize("name", ["two", "two-shards", "four", "four-shards"])
def test_one_rank_speaks_and_the_files_are_those_of_one_process(done: tuple[Path, Any], name: str) -> None:
    folder, ends = done
    first, *others = ends[name]
    assert first["exit_code"] == 0 and "step 0      loss 0.693147" in first["stderr"]
    assert all(other == {"exit_code": 0, "stdout": "", "stderr": "", "recorded": ""} for other in others)
    kept = "a share of the model" if "shards" in name else "the whole model"
    assert (
        f"ranks       {len(ends[name])} processes, {len(ends[name])} of them here; each keeps {kept}" in first["stderr"]
    )
    assert json.loads((folder / name / "manifest.json").read_text())["processes"] == len(ends[name])
    files = [sorted(str(p.relative_to(folder / run)) for p in (folder / run).rglob("*")) for run in ("one", name)]
    assert [file for file in files[1] if not file.startswith("best")] == files[0]


def test_best_model_is_kept_by_the_first_rank(done: tuple[Path, Any]) -> None:
    folder, _ = done
    assert (folder / "four" / "best" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["scored-4", "scored-shards"])
def test_ranks_fill_one_cache_with_equal_values(done: tuple[Path, Any], name: str) -> None:
    """The forwards are those of one process, dealt out: on a CPU the values are equal to the bit."""
    folder, ends = done
    result = json.loads(ends[name][0]["stdout"])
    assert (result["pairs"], result["misses"]) == (PAIRS, PAIRS)
    caches = [next((folder / "cache" / each / "reference").iterdir()) for each in ("scored-1", name)]
    assert len(list(caches[1].glob("*.safetensors"))) == 4  # each rank its own
    expected, found = (cached_logps(cache) for cache in caches)
    assert caches[0].name == caches[1].name and len(expected) == 2 * PAIRS
    if name == "scored-4":
        assert found == expected
    else:
        assert found == pytest.approx(expected, abs=1e-4)


def test_memory_that_runs_out_on_one_rank_is_agreed_on(done: tuple[Path, Any]) -> None:
    _, ends = done
    assert ends["oom"][0]["stderr"].count("warning: out of memory on another rank; continuing with --max-tokens") == 1
    assert "warning: out of memory" not in ends["two"][0]["stderr"]


def test_a_loss_that_is_nan_on_one_rank_ends_all_with_one_message(done: tuple[Path, Any]) -> None:
    folder, ends = done
    first, second = ends["nan"]
    assert (first["exit_code"], second["exit_code"], second["stderr"]) == (1, 1, "")
    (told,) = re.findall("error: .*", first["stderr"])
    assert f"the loss is not finite for {folder / 'train.jsonl'}:{POISONED + 1}. " in told


def test_a_signal_on_top_of_a_lost_peer_hides_it_not() -> None:
    """The launcher ends the others when it sees that one has ended, maybe while they are about to say so."""
    lost = RuntimeError("[pair.cc] Connection closed by peer [127.0.0.1]:9")
    interrupted, alone = KeyboardInterrupt(), KeyboardInterrupt()
    interrupted.__context__ = lost
    assert distributed._lost_peer(interrupted) is lost
    assert distributed._lost_peer(alone) is None


def test_what_ends_one_rank_ends_all_and_reaches_the_launcher(done: tuple[Path, Any]) -> None:
    """Rank 0 says that another rank ended; why, torchrun reports of the one that failed first."""
    first, second = done[1]["alone"]
    assert (first["exit_code"], second["exit_code"], second["stderr"]) == (1, 1, "")
    assert re.findall("error: [^;]*", first["stderr"]) == ["error: another rank exited unexpectedly"]
    assert "DpoError: the disk of this host is gone" in second["recorded"] and not first["recorded"]


def test_what_cannot_be_used_is_said_once(done: tuple[Path, Any]) -> None:
    folder, ends = done
    first, second = ends["usage"]
    assert (first["exit_code"], second["exit_code"], second["stderr"]) == (2, 2, "")
    assert first["stderr"].count("error: --memory in-backward: updates each weight before ranks") == 1
    assert not (folder / "usage").exists()


# ---- what ends a run --------------------------------------------------------------------------------------------


def started(folder: Path, tiny: Path, *more: str) -> tuple[subprocess.Popen[str], Path]:
    """A long training on two ranks that has a checkpoint."""
    folder.mkdir(exist_ok=True)
    run = folder / "run"
    words = ["train", "--data", str(SAMPLE / "train.jsonl"), "--model", str(tiny), "--output", str(run), *TRAIN, *more]
    command = launch(folder, 2, "dpo_cli", *words, "--eval-steps", "0", "--epochs", "100", "--save-steps", "5")
    launcher = subprocess.Popen(command, env=environment(folder), stderr=subprocess.PIPE, text=True)
    until = time.monotonic() + 300
    while not (run / "checkpoints" / "step-000010").exists():
        assert launcher.poll() is None and time.monotonic() < until, launcher.communicate()[1]
        time.sleep(0.1)
    return launcher, run


def ranks_of(launcher: subprocess.Popen[str]) -> dict[int, int]:
    """The process id of each rank."""
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    found = {}
    for child in children:
        for variable in Path(f"/proc/{child}/environ").read_bytes().split(b"\0"):
            if variable.startswith(b"RANK="):
                found[int(variable[5:])] = int(child)
    return found


def test_a_rank_that_is_killed_ends_all(tiny: Path, tmp_path: Path) -> None:
    for attempt in ("first", "second"):  # where the system ended the first rank as well, it could not speak: not twice
        launcher, run = started(tmp_path / attempt, tiny)
        ranks = ranks_of(launcher)
        os.kill(ranks[1], signal.SIGKILL)
        _, told = launcher.communicate(timeout=60)
        ended = dict(re.findall(r"rank +: (\d) .*\n +exitcode +: (-?\d+)", told))
        if not ended.get("0", "").startswith("-"):
            break
    assert (launcher.returncode, ended) == (1, {"0": "1", "1": "-9"}), told
    assert re.findall("error: .*", told) == [
        f"error: another rank exited unexpectedly; what was saved is whole. Continue with: dpo train --resume {run}"
    ], told
    assert not any(Path(f"/proc/{process}").exists() for process in ranks.values())
    told = alone("train", "--resume", str(run), "--logging-steps", "1000000", "--dry-run")
    assert "plan " in told


@pytest.mark.parametrize(("processes", "error"), [(2, DpoError("lost")), (2, None), (1, DpoError("bad"))])
def test_the_launchers_signal_is_not_heard_when_an_error_has_ended_one_of_several(
    processes: int, error: DpoError | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    monkeypatch.setattr(distributed, "world_size", lambda: processes)
    try:
        with suppress(DpoError), StopSignal():
            assert all(signal.getsignal(number) != handler for number, handler in before.items())
            if error:
                raise error
        deaf = {signal.SIGTERM: signal.SIG_IGN} if error and processes > 1 else {}
        assert {number: signal.getsignal(number) for number in before} == before | deaf
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.torture
@pytest.mark.skipif(not LONG, reason="make torture: half a minute each")
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("more", [[], ["--fsdp"]])
def test_a_signal_to_the_launcher_stops_all_at_a_checkpoint(
    sent: signal.Signals, more: list[str], tiny: Path, tmp_path: Path
) -> None:
    launcher, run = started(tmp_path, tiny, *more)
    launcher.send_signal(sent)
    _, told = launcher.communicate(timeout=60)
    (line,) = re.findall("error: .*", told)
    step = int(re.findall("interrupted after step (\\d+) of", line)[0])
    assert (run / "checkpoints" / f"step-{step:06d}" / "manifest.json").is_file()
    assert line.endswith(f"a checkpoint was written. Continue with: dpo train --resume {run}")


# ---- several hosts ----------------------------------------------------------------------------------------------


def test_three_hosts_are_one_run(done: tuple[Path, Any], tmp_path: Path) -> None:
    """Each in a network of its own, with a cache of its own; only the first one writes the run."""
    if not hosts.possible():
        pytest.skip("no network namespaces here: they need root, iproute2 and a kernel that allows them")
    folder, _ = done
    words = json.loads((folder / "two.json").read_text())
    for option in ("--output", "--cache-dir"):
        words[words.index(option) + 1] = option.strip("-")
    results = hosts.run(3, ["-m", "dpo_cli", *words], tmp_path, environment(tmp_path))
    assert [code for code, _ in results] == [0, 0, 0], "\n".join(told for _, told in results)
    assert "3 processes, 1 of them here" in results[0][1]
    assert not (tmp_path / "host-1" / "output").exists()
    expected, found = metrics(folder / "one"), metrics(tmp_path / "host-0" / "output")
    assert max(abs(a["loss"] - b["loss"]) for a, b in zip(expected, found, strict=True) if "loss" in a) < 1e-6


def test_the_table_of_what_fits_is_that_of_the_estimator() -> None:
    lines = (ROOT / "docs/scale.md").read_text(encoding="utf-8").splitlines()
    assert all(line in lines for line in scale.table(["1B", "8B"]))


# ---- what is refused --------------------------------------------------------------------------------------------


def refusal(*words: str) -> str:
    out = CliRunner().invoke(app, list(words))
    assert out.exit_code == 2 and out.stderr.count("error: ") == 1, out.output
    return out.stderr


def test_refused(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = ["train", "--data", str(SAMPLE / "train.jsonl"), "--model", str(tiny), "--output", str(tmp_path / "run")]
    run += ["--cache-dir", str(tmp_path / "cache")]
    assert "--fsdp: there is one process to shard over; start it with torchrun" in refusal(*run, "--fsdp")
    held = ["--eval-fraction", "0.1", "--show-answers", "1"]
    assert "--fsdp: shards a model that is trained in full" in refusal(*run, "--fsdp", "--lora-rank", "4")
    assert "--fsdp: shards a model that is trained in full" in refusal(*run, "--fsdp", "--ref-model", str(tiny))
    assert "--show-answers: a model in shards does not answer" in refusal(*run, *held, "--fsdp")
    for variable in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"):
        with monkeypatch.context() as patched:
            patched.setenv(variable, "true")
            assert "which is not used here; start with torchrun" in refusal(*run)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    told = refusal("eval", "--data", str(SAMPLE / "heldout.jsonl"), "--model", str(tiny))
    assert "dpo train and dpo precompute-ref run in several" in told
    assert not (tmp_path / "run").exists()


def test_several_gpus_and_one_process_get_the_command_that_uses_all(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 4)
    words = ["train", "--data", str(SAMPLE / "train.jsonl"), "--model", str(tiny), "--dry-run"]
    monkeypatch.setattr(sys, "argv", ["dpo", *words])
    told = alone(*words, "--cache-dir", str(tmp_path))
    command = f"torchrun --nproc-per-node 4 -m dpo_cli train --data {SAMPLE / 'train.jsonl'} --model {tiny} --dry-run"
    assert told.count(f"hint        4 GPUs are visible and one is used; to use all: {command}\n") == 1
