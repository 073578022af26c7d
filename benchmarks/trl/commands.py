"""What a user waits for: whole commands in processes of their own, timed from outside until their steps are done."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from benchmarks.trl.meter import Message, WorkerDiedError, how_it_ended

# Importing this package turns torch's huge pages on, for TRL's process too; its users do not have them.
SEEN: dict[str, dict[str, str]] = {"ours": {}, "trl": {"THP_MEM_ALLOC_ENABLE": "0"}}
_number = count(1)


def run_until(
    command: Sequence[str], file: Path, lines: int, log: Path, environment: Mapping[str, str], limit: float
) -> Message:
    """Start a command, wait until ``file`` has so many lines, and kill it.

    Returns: seconds from the start to each line, processor seconds, and resident peak in MiB.

    Raises:
        WorkerDiedError: it ended before, or took longer than ``limit`` seconds.
    """
    with log.open("w") as stream:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=dict(environment))
    moments: list[float] = []
    ended = 0
    try:
        while len(moments) < lines and not ended and time.perf_counter() - began < limit:
            time.sleep(0.005)
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
            written = file.read_bytes().count(b"\n") if file.exists() else 0
            moments += [time.perf_counter() - began] * (written - len(moments))
    finally:
        if not ended:
            process.kill()
            _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if len(moments) < lines:
        if not ended:
            raise WorkerDiedError(f"no step in {limit:.0f} s")
        raise WorkerDiedError(how_it_ended(process.returncode, log))
    return {"moments": moments[:lines], "cpu_seconds": usage.ru_utime + usage.ru_stime, "peak": usage.ru_maxrss / 2**10}


def run_ours(job: Message, environment: Mapping[str, str], cache: str, steps: int = 1, **changes: Any) -> Message:
    """`dpo train` until some steps are done; its plan holds all of them, so that the reference scores every pair."""
    folder = Path(job["folder"]) / f"command-{next(_number)}"
    folder.mkdir()
    options = job["options"] | {"warmup_ratio": 0.0, "model": job["model"], "data": job["train"]} | changes
    options |= {"cache_dir": Path(job["folder"]) / cache, "output": folder / "run"}
    flags = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    command = [sys.executable, "-m", "dpo_cli"]
    if steps > 1:
        command = [sys.executable, "-m", "benchmarks.trl.dpo_peak", str(folder / "peak")]
    command += ["train", *flags, *shlex.split(job["ours_options"])]
    metrics, log = folder / "run" / "metrics.jsonl", folder / "log"
    found = run_until(command, metrics, steps, log, environment, job["limit"])
    if (folder / "peak").exists():
        found["peak"] = float((folder / "peak").read_text())
    told = re.search(r"pairs cached: (?:([\d,]+) to score|no reference)", log.read_text())
    assert told, "the command does not tell what it scores"
    found["pairs_scored"] = int((told[1] or "0").replace(",", ""))
    return found


def run_trl(job: Message, environment: Mapping[str, str], cache: str, **changes: Any) -> Message:
    """A script of TRL's until its first step is done; ``cache`` is the folder in which `datasets` keeps its files."""
    folder = Path(job["folder"]) / f"command-{next(_number)}"
    folder.mkdir()
    script = job["options"] | {name: job[name] for name in ("model", "train", "trl_batch")} | changes
    script |= {"steps": len(job["order"]), "told": str(folder / "told")}
    script["output"] = str(Path(job["folder"]) / "trl-run")  # always the same: it is in the name of TRL's cache
    command = [sys.executable, "-m", "benchmarks.trl.start", json.dumps(script)]
    environment = dict(environment) | SEEN["trl"] | {"HF_DATASETS_CACHE": str(Path(job["folder"]) / cache)}
    found = run_until(command, folder / "told", 1, folder / "log", environment, job["limit"])
    return found | json.loads((folder / "told").read_text())


RUNNERS = {"ours": run_ours, "trl": run_trl}


def measure_start(job: Message, environment: Mapping[str, str], dead: list[str]) -> list[Message]:
    """Seconds to the first step with nothing cached, then again with what the first run left; sides take turns."""
    lines: list[Message] = []
    for state in ("cold", "warm"):
        line: Message = {"phase": f"start, {state}"}
        for side in job["sides"]:
            try:
                line[side] = RUNNERS[side](job, environment, f"{side}-start")
                line[side]["seconds"] = line[side]["moments"][0]
            except WorkerDiedError as error:
                dead.append(f"{side}, start {state}: {error}")
        if "ours" in line and "trl" in line:
            line["ratio"] = line["trl"]["seconds"] / line["ours"]["seconds"]
        lines.append(line)
    return lines


def measure_sweep(job: Message, environment: Mapping[str, str], dead: list[str], smoke: bool) -> list[Message]:
    """Runs that differ in learning rate and beta, from one cache: how often the reference is computed in each.

    TRL's differ in the learning rate alone. ``smoke`` takes the run of ``measure_start`` as the first of two.
    """
    lines: list[Message] = []
    for side, runs in (("ours", 5), ("trl", 2)):
        for number in ([2] if smoke else range(1, runs + 1)) if side in job["sides"] else ():
            changes = {"lr": job["options"]["lr"] * number, "beta": 0.1 * number if side == "ours" else 0.1}
            try:
                found = RUNNERS[side](job, environment, f"{side}-{'start' if smoke else 'sweep'}", **changes)
                lines.append({"phase": "sweep", "side": side, "run": number} | changes | found)
            except WorkerDiedError as error:
                dead.append(f"{side}, sweep: {error}")
                break
    return lines


def measure_command(job: Message, environment: Mapping[str, str], dead: list[str]) -> Message | None:
    """`dpo train` with the flags that are passed through, until its last step."""
    try:
        return run_ours(job, environment, "command", steps=len(job["order"]))
    except WorkerDiedError as error:
        dead.append(f"ours, command: {error}")
        return None
