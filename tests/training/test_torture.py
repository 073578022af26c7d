"""Whatever happens to a process or to its files, nothing wrong is served and nothing acknowledged is lost.

``pytest -m torture`` runs few of each; ``make torture`` many. A failure prints its case: the boundary or the seed.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dpo_cli.config.options import PrecomputeOptions
from dpo_cli.reference.store import ReferenceCache
from dpo_cli.training.checkpoint import newest_checkpoint
from dpo_cli.training.prepare import read_pairs
from dpo_cli.utils.console import Reporter
from tests.helpers import LONG, SAMPLE, size, write_rows
from tests.helpers.faults import (
    NEEDS_ROOM,
    Boundary,
    Fault,
    Running,
    SmallDisk,
    Watch,
    can_mount,
    damage_file,
    each_of,
    flip_bit,
    processes_of,
    read_trace,
    small_disk,
    start,
    truncate,
    zero_page,
)
from tests.helpers.runs import Place, assert_equal, make_place, newest_step, told_command

pytestmark = [
    pytest.mark.torture,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks at processes and files through /proc"),
]

ROWS = 12
KILLED = -signal.SIGKILL
PLENTY = 64 * 2**20  # bytes: more than any of these tests writes


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Iterator[Place]:
    """A tiny model and rows; what still runs there when the tests are over is killed."""
    place = make_place(tmp_path_factory.mktemp("torture"), tokenizer)
    write_rows(place.folder / "scored.jsonl", sample(0, ROWS))
    write_rows(place.folder / "one-more.jsonl", sample(ROWS, ROWS + 1))
    yield place
    for process in place.started:
        if process.is_alive():
            process.kill()


def sample(first: int, last: int) -> list[Any]:
    return [json.loads(line) for line in (SAMPLE / "train-strings.jsonl").read_text().splitlines()[first:last]]


def watching(place: Place, name: str, at: int = 0, fault: Fault = signal.SIGKILL, **more: Any) -> Watch:
    return Watch(place.folder, place.folder / f"trace-{name}.txt", at, fault, **more)


Content = dict[bytes, tuple[float, bytes]]  # by response key: its log-prob, and those of its tokens


def cached(folder: Path) -> Content:
    """What is in the shards below a folder; each of them is whole."""
    content: Content = {}
    for shard in sorted(folder.rglob("*.safetensors")):
        if shard.parent.suffix == ".tmp":  # of a process that was killed, or ran out of disk
            continue
        written = shard.read_bytes()
        assert hashlib.sha256(written).hexdigest() == shard.stem, f"{shard} is not what it is named by"
        tensors = load(written)
        keys = [bytes(key) for key in tensors["keys"].numpy()]
        parts = tensors["token_logps"].split(tensors["lengths"].tolist())
        here = {
            key: (value, part.numpy().tobytes())
            for key, value, part in zip(keys, tensors["logps"].tolist(), parts, strict=True)
        }
        assert all(content[key] == here[key] for key in content.keys() & here.keys()), f"{shard} has other values"
        content |= here
    return content


def leftovers(folder: Path, name: str = "") -> list[str]:
    """What no process will ever finish, below a folder, or for a name in it."""
    found = folder.glob(f".{name}.*") if name else folder.rglob(".*")
    return sorted(str(path.relative_to(folder)) for path in found)


def age_leftovers(folder: Path) -> None:
    """Make them older than a day: until then another process may still be writing them."""
    for path in folder.rglob(".*.tmp"):
        os.utime(path, (0, 0))


@dataclass(frozen=True)
class Kill:
    """At a boundary, or so many seconds after the first one."""

    boundary: int = 0
    fault: Fault = signal.SIGKILL
    seconds: float = 0.0


@dataclass(frozen=True)
class Undisturbed:
    """What a command leaves that nobody disturbs, and what it told on the way."""

    content: Content
    trace: list[Boundary]
    seconds: float

    @property
    def boundaries(self) -> list[Boundary]:
        return [point for point in self.trace if point.number]

    def span(self) -> float:
        """Seconds from its first boundary to its last."""
        return self.boundaries[-1].seconds - self.boundaries[0].seconds


def strike(command: Running, watch: Watch, seconds: float, number: int = signal.SIGKILL) -> None:
    """Send a signal to a command so many seconds after its first boundary."""
    while command.alive() and not any(point.number for point in read_trace(watch.trace)):
        time.sleep(0.002)
    time.sleep(seconds)
    command.signal(number)


def round_robin(rng: random.Random, *groups: list[Any]) -> list[Any]:
    """Everything, in random order, one of each group in turn."""
    for group in groups:
        rng.shuffle(group)
    return [each for several in itertools.zip_longest(*groups) for each in several if each is not None]


def summed_up(trace: list[Boundary], call: str) -> int:
    return sum(point.count for point in trace if point.call == call)


# ---- precompute-ref, killed -------------------------------------------------------------------------------------


def precompute(place: Place, cache: str | Path, watch: Watch, rows: str = "scored.jsonl") -> Running:
    """A forward a pair, so that a log-prob does not depend on what else is scored; a shard per forward."""
    arguments = ("--model", "model", "--data", rows, "--cache-dir", cache, "--max-tokens", 16, "--json")
    return start(place, replace(watch, shard_seconds=-1.0), "precompute-ref", *arguments)


@pytest.fixture(scope="module")
def scored(place: Place) -> Undisturbed:
    """The cache of an undisturbed ``precompute-ref``."""
    watch = watching(place, "scored")
    began = time.monotonic()
    command = precompute(place, "cache-scored", watch)
    assert command.end() == 0, command.told
    trace = read_trace(watch.trace)
    whole = Undisturbed(cached(place.folder / "cache-scored"), trace, time.monotonic() - began)
    assert len(whole.content) == 2 * ROWS and len(whole.boundaries) > 10 * ROWS
    return whole


def kills_of(whole: Undisturbed, chains: int, rng: random.Random) -> list[tuple[Kill, ...]]:
    """For each of so many caches one to three kills; the first ones stand at boundaries all over, some tear a write."""
    after_scoring = max(place for place, point in enumerate(whole.trace) if point.call == "scored")
    last_shard = next(p for p in whole.trace[after_scoring:] if p.call == "replace" and p.after)
    adding = [Kill(point.number) for point in whole.boundaries[: last_shard.number]]
    torn = [Kill(point.number, "torn") for point in whole.boundaries if point.call == "write" and not point.after]
    assert min(map(len, (adding, torn))) > 10
    firsts = round_robin(rng, adding, torn)
    made = []
    for first in firsts[:chains]:
        left = len(whole.boundaries) - first.boundary
        then = [Kill(rng.randrange(1, left))] if left > 20 and rng.random() < 0.7 else []
        last = [Kill(seconds=rng.uniform(0, whole.span()))] if rng.random() < 0.5 else []
        made.append((first, *then, *last))
    return made


def test_killed_precompute_loses_at_most_the_shard_in_flight(place: Place, scored: Undisturbed) -> None:
    chains = kills_of(scored, size(9, 10_000), random.Random(1))

    def chain(case: tuple[int, tuple[Kill, ...]]) -> int:
        number, kills = case
        cache = f"cache-killed-{number}"
        before: Content = {}
        hit = 0
        for turn, kill in enumerate(kills):
            watch = watching(place, f"{cache}-{turn}", kill.boundary, kill.fault)
            command = precompute(place, cache, watch)
            if not kill.boundary:
                strike(command, watch, kill.seconds)
            code = command.end()
            trace = read_trace(watch.trace)
            about = f"{kill}, {trace[-1] if trace else 'at once'}: exit {code}\n{command.told}"
            assert code in ((KILLED, 0) if turn else (KILLED,)), about
            hit += code == KILLED
            assert "damaged" not in command.told and "no shard" not in command.told, about
            now = cached(place.folder / cache)
            assert now.items() <= scored.content.items(), f"a wrong value is on disk: {about}"
            assert before.items() <= now.items(), f"what was on disk is lost: {about}"
            done = summed_up(trace, "scored")
            assert len(now) - len(before) >= 2 * (done - 1), f"{done} pairs scored, {len(now) // 2} there: {about}"
            before = now
        watch = watching(place, f"{cache}-end")
        age_leftovers(place.folder / cache)
        command = precompute(place, cache, watch)
        assert command.end() == 0, command.told
        assert "damaged" not in command.told and "no shard" not in command.told, command.told
        told = json.loads(command.told.splitlines()[-1])
        assert (told["hits"], told["misses"]) == (len(before) // 2, ROWS - len(before) // 2)
        assert cached(place.folder / cache) == scored.content
        if leftovers(place.folder / cache):  # a command that has nothing to score does not write, nor clean up
            assert told["misses"] == 0, about
            assert precompute(place, cache, watch, "one-more.jsonl").end() == 0
            assert cached(place.folder / cache).items() > scored.content.items()
        assert leftovers(place.folder / cache) == [], about
        shutil.rmtree(place.folder / cache)
        return hit

    hits = sum(each_of(list(enumerate(chains)), chain))
    assert hits >= size(8, 300)
    print(f"{hits} kills of {len(chains)} caches; {len(scored.boundaries)} boundaries")


# ---- train, killed ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(place: Place) -> Undisturbed:
    """The run ``whole``, and the reference in ``cache``."""
    command = start(place, watching(place, "scoring", shard_seconds=-1.0), "train", *place.options("scoring"))
    assert command.end() == 0, command.told
    watch = watching(place, "whole")
    began = time.monotonic()
    command = start(place, watch, "train", *place.options("whole"))
    assert command.end() == 0, command.told
    assert_equal(place.folder / "whole", place.folder / "scoring")
    return Undisturbed({}, read_trace(watch.trace), time.monotonic() - began)


@pytest.fixture(scope="module")
def scoring(place: Place, trained: Undisturbed) -> list[Boundary]:
    """The boundaries of a run that scores its reference first, a shard a forward."""
    return [point for point in read_trace(place.folder / "trace-scoring.txt") if point.number]


def by_place(points: list[Boundary]) -> list[list[Boundary]]:
    """Boundaries of ``scoring`` by what is written there."""
    places = ("reference/", r"\.scoring\.", "metrics", "checkpoints", "model")
    groups = [[point for point in points if re.search(place, point.path)] for place in places]
    assert all(groups)
    return groups


def saved_steps(trace: list[Boundary]) -> list[int]:
    """The steps whose checkpoints have got their names."""
    names = [point.path for point in trace if point.call in ("rename", "replace") and point.after]
    return [int(found[1]) for name in names if (found := re.search(r"checkpoints/step-(\d+)$", name))]


def go_on(place: Place, name: str) -> list[Any]:
    """What one does after a crash: resume the run where there is one, else start it."""
    return ["--resume", name] if (place.folder / name).exists() else place.options(name)


def train_kills(whole: Undisturbed, count: int, rng: random.Random) -> list[tuple[Kill, ...]]:
    """In turn before the first checkpoint, in a save, in the export, in a line, at any time; some are killed again."""
    points = whole.boundaries
    first = next(p.number for p in points if re.search(r"checkpoints/step-\d+$", p.path) and p.after)
    early = [p for p in points if p.number < first]
    saving = [p for p in points if "/checkpoints/" in p.path]
    exporting = [p for p in points if re.search(r"whole/\.?model", p.path)]
    assert min(map(len, (early, saving, exporting))) > 10
    lines = [p for p in points if p.path.endswith("metrics.jsonl") and p.call == "write" and not p.after]
    groups = [early, saving, exporting, lines, saving, points]
    for group in groups:
        rng.shuffle(group)
    chains = []
    for number, group in zip(range(count), itertools.cycle(groups), strict=False):
        point = group[number // len(groups) % len(group)]
        writes = point.call in ("write", "serialize_file") and not point.after
        kills = [Kill(point.number, "torn" if writes else signal.SIGKILL)]
        if number % len(groups) == 5:
            kills = [Kill(seconds=rng.uniform(0, whole.span()))]
        if number % 3 == 2:
            kills.append(Kill(rng.randrange(1, len(points) // 3)))
        chains.append(tuple(kills))
    return chains


def test_killed_training_goes_on_to_the_same_weights_and_lines(place: Place, trained: Undisturbed) -> None:
    chains = train_kills(trained, size(8, 84), random.Random(2))

    def chain(case: tuple[int, tuple[Kill, ...]]) -> int:
        number, kills = case
        name, hit, saved = f"killed-{number}", 0, 0
        run = place.folder / name
        for turn, kill in enumerate(kills):
            watch = watching(place, f"{name}-{turn}", kill.boundary, kill.fault)
            command = start(place, watch, "train", *go_on(place, name))
            if not kill.boundary:
                strike(command, watch, kill.seconds)
            code = command.end()
            trace = read_trace(watch.trace)
            about = f"{kill}, {trace[-1] if trace else 'at once'}: exit {code}\n{command.told}"
            assert code in ((KILLED, 0) if turn or kill.seconds else (KILLED,)), about
            hit += code == KILLED
            saved = max([saved, *saved_steps(trace)])
            found = newest_checkpoint(run / "checkpoints", lambda told, about=about: pytest.fail(f"{told}: {about}"))
            assert (found[1] if found else 0) >= saved, about
        command = start(place, watching(place, f"{name}-end"), "train", *go_on(place, name))
        assert command.end() == 0, f"{about}\nthen:\n{command.told}"
        assert "damaged" not in command.told
        if saved:
            assert int(re.search(r"after step (\d+) of 10", command.told)[1]) >= saved, command.told  # type: ignore[index]
        assert_equal(run, place.folder / "whole")
        assert leftovers(run) == [], about
        shutil.rmtree(run)
        return hit

    hits = sum(each_of(list(enumerate(chains)), chain))
    assert hits >= size(8, 100)
    print(f"{hits} kills of {len(chains)} runs; {len(trained.boundaries)} boundaries")


def test_a_run_killed_before_it_has_its_folder_leaves_nothing_beside_it(place: Place, trained: Undisturbed) -> None:
    begins = [point for point in trained.boundaries if point.path.startswith(".whole.")]
    point = begins[len(begins) // 2]
    command = start(place, watching(place, "unborn", point.number), "train", *place.options("unborn"))
    assert command.end() == KILLED, command.told
    assert not (place.folder / "unborn").exists() and leftovers(place.folder, "unborn")
    age_leftovers(place.folder)
    code, told = place.train("unborn")
    assert code == 0, told
    assert leftovers(place.folder, "unborn") == []


@pytest.mark.parametrize("command", ["precompute-ref", "train"])
def test_nothing_takes_its_name_before_it_is_on_disk(scored: Undisturbed, trained: Undisturbed, command: str) -> None:
    """Else a power cut after the rename leaves an empty file under a good name. The new name is synced as well."""
    trace = [point for point in (scored if command == "precompute-ref" else trained).boundaries if point.after]
    unsynced: set[str] = set()
    named = set()
    for place, point in enumerate(trace):
        if point.call in ("write", "pwrite", "serialize_file", "ftruncate"):
            unsynced.add(point.path)
        if point.call == "fsync":
            unsynced.discard(point.path)
        if point.call in ("replace", "rename", "link") and not point.path.endswith(".tmp/.old"):
            early = {path for path in unsynced if path == point.source or path.startswith(point.source + "/")}
            assert not early, f"{point}: {early} were written and not synced"
            above = str(Path(point.path).parent)
            assert any(p.call == "fsync" and p.path == above for p in trace[place:]), f"{point}: {above} is not synced"
            named.add(re.sub(r"[0-9a-f]{64}|\d{6}", "*", Path(point.path).name))
    assert named >= ({"*.safetensors"} if command == "precompute-ref" else {"step-*", "model"})


# ---- signals ----------------------------------------------------------------------------------------------------


def assert_obeyed(place: Place, name: str, options: list[Any], command: Running, which: int, about: str) -> int:
    """Exit code 130, or 0 if all was done; nothing of it runs on; who does what it says comes to the same weights."""
    struck = time.monotonic()
    code = command.end()
    about = f"{signal.Signals(which).name} {about}: exit {code} {time.monotonic() - struck:.2f} s later\n{command.told}"
    assert code in (0, 130), about
    assert "Traceback" not in command.told, about
    assert processes_of(command.process.pid) == [], about
    run = place.folder / name
    if code:
        if "--resume" in command.told:
            found = newest_checkpoint(run / "checkpoints", pytest.fail)
            assert found and found[1] == max(newest_step(run), 0), about
            again = told_command(command.told)
        else:
            assert "rerun the command to continue" in command.told, about
            again = ["train", *options]
        then = start(place, watching(place, f"{name}-end"), *again)
        assert then.end() == 0, f"{about}\nthen:\n{then.told}"
    assert_equal(run, place.folder / "whole")
    assert leftovers(run) == [], about
    return code


def test_signal_at_any_time_is_obeyed_and_the_run_goes_on(place: Place, trained: Undisturbed) -> None:
    """Half of the runs have their reference still to score."""
    rng = random.Random(4)
    count = size(4, 20)

    def one(number: int) -> int:
        which = (signal.SIGTERM, signal.SIGINT)[number % 2]
        name, cache = f"signal-{number}", "cache" if number % 4 < 2 else f"cache-signal-{number}"
        options = [*place.options(name), "--cache-dir", cache]
        after = rng.uniform(0.1, 1.0) * trained.seconds
        command = start(place, watching(place, name, shard_seconds=-1.0), "train", *options, pause=0.02)
        while command.alive() and "model  " not in command.told:
            time.sleep(0.002)
        time.sleep(after)
        command.signal(which)
        return assert_obeyed(place, name, options, command, which, f"after {after:.3f} s")

    codes = each_of(range(count), one)
    assert codes.count(130) >= count // 2
    print(f"{codes.count(130)} interrupted of {count}")


def test_signal_between_any_two_writes_is_obeyed(place: Place, scoring: list[Boundary]) -> None:
    """From the first shard of the reference to the last file of the export."""
    rng = random.Random(5)
    cases = round_robin(rng, *by_place(scoring))[: size(6, 150)]

    def one(case: tuple[int, Boundary]) -> int:
        number, point = case
        which = (signal.SIGTERM, signal.SIGINT)[number % 2]
        name = f"signal-at-{point.number}"
        options = [*place.options(name), "--cache-dir", f"cache-{name}"]
        command = start(place, watching(place, name, point.number, which, shard_seconds=-1.0), "train", *options)
        return assert_obeyed(place, name, options, command, which, f"at {point}")

    codes = each_of(list(enumerate(cases)), one)
    assert codes.count(130) >= len(cases) // 2
    print(f"{codes.count(130)} interrupted of {len(cases)}; {len(scoring)} boundaries")


# ---- a full disk ------------------------------------------------------------------------------------------------

MOUNTED = pytest.param("full disk", marks=pytest.mark.skipif(not can_mount(), reason="no disk can be mounted here"))


@dataclass(frozen=True)
class Room:
    """Where a command writes: a disk of its own, or a folder where no file may grow beyond a size."""

    folder: Path
    disk: SmallDisk | None
    largest_file: int | None

    def free(self) -> None:
        """Make room."""
        if self.disk:
            self.disk.resize(PLENTY)


def in_little_room(kind: str, folder: Path, size: int, test: Callable[[Room], Any]) -> Any:
    if kind == "full disk":
        with small_disk(folder, size) as disk:
            return test(Room(folder, disk, None))
    folder.mkdir()
    return test(Room(folder, None, size))


@pytest.mark.parametrize("kind", [MOUNTED, "largest file"])
def test_full_disk_in_training_leaves_the_last_checkpoint(place: Place, trained: Undisturbed, kind: str) -> None:
    """Of a size between the first file and the last. It is told, with the path, and goes on when there is room."""
    rng = random.Random(f"train {kind}")
    checkpoint = sum(file.stat().st_size for file in (place.folder / "whole/checkpoints/step-000010").iterdir())
    model = (place.folder / "whole/model/model.safetensors").stat().st_size
    largest = 3 * checkpoint if kind == "full disk" else 2 * model
    lowest = 4096 if kind == "full disk" else 16_384  # what is told is a file as well
    count = size(3, 12)
    sizes = [lowest + int((largest - lowest) * (number + rng.random()) / count) for number in range(count)]

    def one(bytes_: int) -> bool:
        name = f"{kind.split()[0]}-{bytes_}"

        def inside(room: Room) -> bool:
            output = room.folder / "run"
            watch = watching(place, name, largest_file=room.largest_file)
            command = start(place, watch, "train", *place.options(str(output)))
            code = command.end()
            about = f"{bytes_} bytes: exit {code}\n{command.told}"
            assert code in (0, 1), about
            if code:
                assert re.search(rf"^error: .*{re.escape(str(output))}", command.told, re.M), about
                assert "Traceback" not in command.told, about
                found = newest_checkpoint(output / "checkpoints", pytest.fail)
                assert (found[1] if found else 0) == max([0, *saved_steps(read_trace(watch.trace))]), about
                room.free()
                again = told_command(command.told) if "Continue with" in command.told else None
                told = start(
                    place, replace(watch, largest_file=None), *(again or ["train", *go_on(place, str(output))])
                )
                assert told.end() == 0, f"{about}\nthen:\n{told.told}"
            assert_equal(output, place.folder / "whole")
            assert leftovers(room.folder) == [], about
            return code == 1

        return bool(in_little_room(kind, place.folder / name, bytes_, inside))

    full = each_of(sizes, one)
    assert sum(full) >= 2 / 3 * count
    print(f"{kind}: {sum(full)} of {count} sizes were too small")


@pytest.mark.parametrize("kind", [MOUNTED, "largest file"])
def test_full_disk_while_the_reference_is_scored_keeps_what_was_kept(
    place: Place, scored: Undisturbed, kind: str
) -> None:
    rng = random.Random(f"precompute {kind}")
    count = size(3, 12)
    largest = {"full disk": 4096 * (ROWS + 3), "largest file": 24_000}[kind]
    lowest = {"full disk": 4096, "largest file": 2_500}[kind]
    sizes = [lowest + int((largest - lowest) * (number + rng.random()) / count) for number in range(count)]

    def one(bytes_: int) -> bool:
        name = f"cache-{kind.split()[0]}-{bytes_}"

        def inside(room: Room) -> bool:
            cache = room.folder / "cache"
            watch = watching(place, name, largest_file=room.largest_file)
            command = precompute(place, cache, watch)
            code = command.end()
            about = f"{bytes_} bytes: exit {code}\n{command.told}"
            kept = cached(cache)
            assert code in (0, 1) or (code == 2 and not kept and "--cache-dir" in command.told), about
            assert kept.items() <= scored.content.items(), about
            named = [p for p in read_trace(watch.trace) if p.call == "replace" and p.path.endswith(".safetensors")]
            assert len(kept) >= 2 * min(ROWS, sum(point.after for point in named)), about
            if code:
                assert re.search(rf"^error: .*{re.escape(str(cache))}", command.told, re.M), about
                assert "Traceback" not in command.told, about
                room.free()
                age_leftovers(cache)
                again = precompute(place, cache, replace(watch, largest_file=None))
                assert again.end() == 0, f"{about}\nthen:\n{again.told}"
                assert json.loads(again.told.splitlines()[-1])["hits"] == len(kept) // 2
            assert cached(cache) == scored.content
            assert leftovers(cache) == []
            return code != 0

        return bool(in_little_room(kind, place.folder / name, bytes_, inside))

    full = each_of(sizes, one)
    assert sum(full) >= 1
    print(f"{kind}: {sum(full)} of {count} sizes were too small")


def test_a_disk_that_is_full_from_some_write_on(place: Place, scoring: list[Boundary]) -> None:
    """Whatever is written first. What is told names a file of the run or of the cache, and all goes on from there.

    When all is trained, and but the last report is to be written, a warning tells it.
    """
    rng = random.Random(6)
    writes = [point for point in scoring if point.call in NEEDS_ROOM and not point.after]
    cases = round_robin(rng, *by_place(writes))[: size(6, 10_000)]

    def one(point: Boundary) -> int:
        name = f"full-at-{point.number}"
        run, cache = place.folder / name, place.folder / f"cache-{name}"
        options = [*place.options(name), "--cache-dir", cache.name]
        watch = watching(place, name, point.number, "full", shard_seconds=-1.0)
        command = start(place, watch, "train", *options)
        code = command.end()
        about = f"{point}: exit {code}\n{command.told}"
        unbegun = code == 2 and "--cache-dir" in command.told and not list(cache.rglob("*.safetensors"))
        report = re.search(r"\.(report\.html|curves\.png)\.\w+\.tmp/", point.path)
        assert code == 1 or unbegun or (code == 0 and report), about
        word = "error" if code else f"warning: the report of {name} is not up to date"
        assert re.search(rf"^{word}: .*{name}\b.*{os.strerror(errno.ENOSPC)}", command.told, re.M), about
        assert "Traceback" not in command.told, about
        trace = read_trace(watch.trace)
        named = [n for n, p in enumerate(trace) if p.call == "replace" and p.after and p.path.endswith(".safetensors")]
        kept = summed_up(trace[: named[-1]], "scored") if named else 0
        assert len(cached(cache)) == 2 * kept, about
        found = newest_checkpoint(run / "checkpoints", pytest.fail)
        assert (found[1] if found else 0) == max([0, *saved_steps(trace)]), about
        again = told_command(command.told) if "Continue with" in command.told else None
        resumed = ["train", "--resume", name] if run.exists() else ["train", *options]
        then = start(place, watching(place, f"{name}-end"), *(again or resumed))
        assert then.end() == 0, f"{about}\nthen:\n{then.told}"
        assert_equal(run, place.folder / "whole")
        assert leftovers(run) + leftovers(place.folder, name) + leftovers(cache) == [], about
        return code

    print(f"{len(each_of(cases, one))} of {len(writes)} writes")


# ---- damage -----------------------------------------------------------------------------------------------------

DAMAGES = {flip_bit: (50, 500), truncate: (20, 100), zero_page: (20, 100)}


@pytest.fixture(scope="module")
def several(place: Place, scored: Undisturbed) -> Path:
    """A cache of several shards of several pairs each."""
    lines = sample(0, ROWS)
    for first in range(0, ROWS, 3):
        write_rows(place.folder / "some.jsonl", lines[first : first + 3])
        options = ("--model", "model", "--data", "some.jsonl", "--cache-dir", "cache-several", "--max-tokens", 16)
        code, told = place.dpo("precompute-ref", *options)
        assert code == 0, told
    assert len(list((place.folder / "cache-several").rglob("*.safetensors"))) == 4
    assert cached(place.folder / "cache-several") == scored.content
    return place.folder / "cache-several"


def test_no_damaged_shard_is_ever_served(place: Place, several: Path, scored: Undisturbed) -> None:
    """What is looked up is right or missing; the damage is told; what is missing is what the shard had."""
    rng = random.Random(9)
    cases = [damage for damage, counts in DAMAGES.items() for _ in range(size(*counts))]
    options = PrecomputeOptions(data=[str(place.folder / "scored.jsonl")])
    tokenizer = AutoTokenizer.from_pretrained(place.folder / "model")
    pairs = read_pairs(options.data, options, tokenizer, Reporter(quiet=True)).pairs
    folder = next(several.glob("reference/*"))
    right = ReferenceCache(several, f"{folder.name:0<64}", pytest.fail).lookup(pairs)
    whole = {shard: shard.read_bytes() for shard in folder.glob("*.safetensors")}
    recomputed = rng.sample(range(len(cases)), size(2, 10))
    for number, damage in enumerate(cases):
        harmed = rng.sample(sorted(whole), rng.choice((1, 1, 1, 2)))
        about = [damage_file(shard, damage, rng) for shard in harmed]
        lost = {bytes(key) for shard in harmed for key in load(whole[shard])["keys"].numpy()}
        told: list[str] = []
        cache = ReferenceCache(several, f"{folder.name:0<64}", told.append)
        got = cache.lookup(pairs)
        assert bool(((got == right) | got.isnan()).all()), about
        assert cache.values.keys() == scored.content.keys() - lost, about
        assert len(told) == len(harmed) and all(any(s.name[:12] in line for line in told) for s in harmed), about
        assert not any(shard.exists() for shard in harmed), about
        if number in recomputed:
            again = precompute(place, several, watching(place, f"damaged-{number}"))
            assert again.end() == 0, again.told
            assert json.loads(again.told.splitlines()[-1])["misses"] == len(lost) // 2, about
            assert cached(several) == scored.content, about
        for file in folder.glob("*.safetensors"):
            file.unlink()
        for shard, content in whole.items():
            shard.write_bytes(content)


def test_damage_beside_the_shards_changes_no_number(place: Place, several: Path, scored: Undisturbed) -> None:
    """In the text about a reference: the same values are found."""
    rng = random.Random(10)
    for _ in range(2):
        assert precompute(place, several, watching(place, "beside")).end() == 0
    others = [p for p in several.rglob("*") if p.is_file() and p.suffix != ".safetensors"]
    assert others
    for number in range(size(4, 30)):
        file = others[number % len(others)]
        content = file.read_bytes()
        about = damage_file(file, (flip_bit, truncate)[number // len(others) % 2], rng)
        command = precompute(place, several, watching(place, "beside"))
        assert command.end() == 0, f"{about}\n{command.told}"
        assert json.loads(command.told.splitlines()[-1])["hits"] == ROWS, f"{about}\n{command.told}"
        assert cached(several) == scored.content, about
        file.write_bytes(content)


def test_no_damaged_checkpoint_is_ever_taken(place: Place, trained: Undisturbed, tmp_path: Path) -> None:
    """One bit, a cut or a page of zeros in any file: the one before is taken, and the run ends the same."""
    rng = random.Random(11)
    count = size(20, 100)
    source = place.folder / "whole" / "checkpoints"
    steps = sorted(int(folder.name[5:]) for folder in source.iterdir())
    assert len(steps) == 2
    checkpoints = shutil.copytree(source, tmp_path / "checkpoints")
    resumed = rng.sample(range(count), size(2, 10))
    for number in range(count):
        harmed = [checkpoints / f"step-{steps[-1]:06d}"] if number % 4 else [*checkpoints.iterdir()]
        damage = rng.choice((flip_bit, flip_bit, truncate, zero_page))
        about = [damage_file(rng.choice(sorted(folder.iterdir())), damage, rng) for folder in harmed]
        told: list[str] = []
        found = newest_checkpoint(checkpoints, told.append)
        if number % 4:
            assert found == (checkpoints / f"step-{steps[0]:06d}", steps[0]), about
        else:
            assert found is None, about
        assert len(told) == len(harmed) and all(any(f.name in line for line in told) for f in harmed), about
        shutil.rmtree(checkpoints)
        shutil.copytree(source, checkpoints)
        if number in resumed:
            run = shutil.copytree(place.folder / "whole", place.folder / f"damaged-{number}")
            again = [
                damage_file(rng.choice(sorted((run / "checkpoints" / f.name).iterdir())), damage, rng) for f in harmed
            ]
            shutil.rmtree(run / "model")
            code, text = place.dpo("train", "--resume", run.name)
            assert code == 0 and "damaged" in text, f"{again}\n{text}"
            assert_equal(run, place.folder / "whole")


def test_a_run_whose_options_or_manifest_are_damaged_is_refused(place: Place, trained: Undisturbed) -> None:
    """One bit could be another learning rate, or other data: nothing goes on that may be another run."""
    rng = random.Random(12)
    point = next(point for point in trained.boundaries if point.path.endswith("step-000006") and point.after)
    killed = start(place, watching(place, "read-wrong", point.number), "train", *place.options("read-wrong"))
    assert killed.end() == KILLED, killed.told
    run = place.folder / "read-wrong"
    damages = [lambda content, _: content.replace(b"lr: 0.001", b"lr: 0.003"), *[flip_bit] * size(4, 60)]
    for number, damage in enumerate(damages):
        file = run / ("config.yaml", "manifest.json")[number % 2]
        content = file.read_bytes()
        about = damage_file(file, damage, rng)
        code, told = place.dpo("train", "--resume", run.name)
        assert code == 2 and re.search("^error: ", told, re.M) and "Traceback" not in told, f"{about}\n{told}"
        file.write_bytes(content)
    code, told = place.dpo("train", "--resume", run.name)
    assert code == 0, told
    assert_equal(run, place.folder / "whole")


# ---- company ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("round_", range(size(1, 5)))
def test_processes_that_fill_one_cache_side_by_side(place: Place, scored: Undisturbed, round_: int) -> None:
    """They have rows in common and merge what they find; one is killed and started again."""
    rng = random.Random(round_)
    lines = sample(0, ROWS)
    cache, count = f"cache-company-{round_}", size(4, 8)
    running = []
    parts = [sorted(rng.sample(range(ROWS), 8)) for _ in range(count)]
    parts[0] = sorted({*parts[0], *range(ROWS)} - set().union(*parts[1:]) | {*parts[0]})  # each row is in one of them
    for number, part in enumerate(parts):
        name = f"part-{round_}-{number}"
        write_rows(place.folder / f"{name}.jsonl", [lines[place_] for place_ in part])
        watch = watching(place, name)
        running.append((precompute(place, cache, watch, f"{name}.jsonl"), watch, f"{name}.jsonl"))
    killed, watch, rows = running[-1]
    strike(killed, watch, rng.uniform(0, scored.span()))
    again = precompute(place, cache, watching(place, f"again-{round_}"), rows)
    assert killed.end() in (KILLED, 0), killed.told
    for command in [again, *(command for command, _, _ in running[:-1])]:
        assert command.end() == 0, command.told
        assert not re.search("damaged|no shard|warning: reference", command.told), command.told
    assert cached(place.folder / cache) == scored.content
    last = precompute(place, cache, watching(place, f"last-{round_}"))
    assert last.end() == 0, last.told
    assert json.loads(last.told.splitlines()[-1])["misses"] == 0
    assert cached(place.folder / cache) == scored.content


def test_one_process_stands_still_while_another_fills_the_same_cache(place: Place, scored: Undisturbed) -> None:
    """Stopped at any boundary, and woken when the other has scored: both find all."""
    rng = random.Random(14)
    points = rng.sample(scored.boundaries, size(4, 120))

    def one(point: Boundary) -> None:
        cache = f"cache-still-{point.number}"
        first = precompute(place, cache, watching(place, f"{cache}-1", point.number, "still"))
        assert first.stands_still(), first.told
        second = precompute(place, cache, watching(place, f"{cache}-2"))
        code = second.end()
        first.wake()
        for command, ended in ((second, code), (first, first.end())):
            assert ended == 0, command.told
            assert not re.search("damaged|no shard|cannot|warning: reference", command.told), command.told
        assert cached(place.folder / cache) == scored.content
        if leftovers(place.folder / cache):
            assert precompute(place, cache, watching(place, f"{cache}-3"), "one-more.jsonl").end() == 0
        assert leftovers(place.folder / cache) == []
        shutil.rmtree(place.folder / cache)

    each_of(points, one)


@pytest.mark.parametrize("second", ["started", "resumed"])
def test_two_runs_in_one_folder_are_one_run_and_one_refusal(place: Place, trained: Undisturbed, second: str) -> None:
    """The refusal names the folder; the first run continues as if nothing had been."""
    name = f"company-{second}"
    watch = watching(place, name)
    first = start(place, watch, "train", *place.options(name), pause=0.2)
    while first.alive() and newest_step(place.folder / name) < 1:
        time.sleep(0.005)
    arguments = place.options(name) if second == "started" else ["--resume", name]
    code, told = place.dpo("train", *arguments)
    assert first.alive(), "the first was to be still at work"
    assert code == 2 and f"{name} is in use by another process" in told and "Traceback" not in told, told
    assert first.end() == 0, first.told
    assert_equal(place.folder / name, place.folder / "whole")


def test_two_runs_that_begin_at_once_in_one_folder(place: Place, trained: Undisturbed) -> None:
    for number in range(size(2, 10)):
        name = f"at-once-{number}"
        both = [
            start(place, watching(place, f"{name}-{i}"), "train", *place.options(name), pause=0.05) for i in range(2)
        ]
        codes = [command.end() for command in both]
        told = "\n".join(command.told for command in both)
        assert sorted(codes) == [0, 2], told
        refused = both[codes.index(2)].told
        assert re.search(rf"error: {name}(?: is in use by |: another process began a run)", refused), told
        assert "Traceback" not in refused, told
        assert_equal(place.folder / name, place.folder / "whole")
        assert leftovers(place.folder / name) + leftovers(place.folder, name) == []


def test_two_resume_one_run_at_once(place: Place, trained: Undisturbed) -> None:
    point = next(point for point in trained.boundaries if point.path.endswith("step-000006") and point.after)
    for number in range(size(2, 10)):
        name = f"resumed-at-once-{number}"
        killed = start(place, watching(place, name, point.number), "train", *place.options(name))
        assert killed.end() == KILLED, killed.told
        both = [start(place, watching(place, f"{name}-{i}"), "train", "--resume", name, pause=0.05) for i in range(2)]
        codes = [command.end() for command in both]
        told = "\n".join(command.told for command in both)
        assert sorted(codes) == [0, 2], told
        refused = both[codes.index(2)].told
        assert f"error: {name} is in use by " in refused and "Traceback" not in refused, told
        assert_equal(place.folder / name, place.folder / "whole")
        assert leftovers(place.folder / name) == []


@pytest.mark.xfail(strict=True, reason="who reads the lock before its new holder has written names the one before")
def test_who_has_only_just_taken_a_folder_is_named(place: Place, trained: Undisturbed) -> None:
    """Not the killed process that had it before, whose name is in the lock file still."""
    point = next(point for point in trained.boundaries if point.path.endswith("step-000006") and point.after)
    for name in ("named", "named-before"):
        killed = start(place, watching(place, name, point.number), "train", *place.options(name))
        assert killed.end() == KILLED, killed.told
    watch = watching(place, "named-before-1")
    assert start(place, watch, "train", "--resume", "named-before").end() == 0
    taken = next(p for p in read_trace(watch.trace) if p.call == "flock" and p.after)
    assert taken.path == "named-before/run.lock"
    first = start(place, watching(place, "named-1", taken.number, "still"), "train", "--resume", "named")
    assert first.stands_still(), first.told
    watch = watching(place, "named-2")
    second = start(place, watch, "train", "--resume", "named")
    while second.alive() and not any(p.call == "flock" for p in read_trace(watch.trace)):
        time.sleep(0.002)
    until = time.monotonic() + 10  # it may come to wait for the first
    while second.alive() and time.monotonic() < until:
        time.sleep(0.01)
    first.wake()
    code = second.end()
    assert first.end() == 0, first.told
    assert code == 2 and f"in use by process {first.process.pid} " in second.told, second.told


@pytest.mark.parametrize("how", ["started", "resumed"])
def test_one_run_stands_still_while_another_comes(place: Place, trained: Undisturbed, how: str) -> None:
    """Stopped at any boundary. Who has the folder keeps it; the other one is refused, and harms nothing."""
    rng = random.Random(15)
    points = trained.boundaries
    begins = [
        point for point in points if re.search(r"\.whole\.|^whole$|^whole/(run.lock|config|manifest)", point.path)
    ]
    groups = (begins, [p for p in points if p not in begins]) if how == "started" else (points[: len(points) // 4],)
    cases = round_robin(rng, *map(list, groups))[: size(4, 60)]

    def one(point: Boundary) -> tuple[int, int]:
        name = f"still-{how}-{point.number}"
        arguments = place.options(name)
        if how == "resumed":
            shutil.copytree(half, place.folder / name)
            arguments = ["--resume", name]
        watch = watching(place, f"{name}-1", point.number, "still")
        first = start(place, watch, "train", *arguments)
        assert first.stands_still(), first.told
        so_far = [p for p in read_trace(watch.trace) if p.path.endswith("run.lock") and p.after]
        second = start(place, watching(place, f"{name}-2"), "train", *arguments)
        late = second.end()
        first.wake()
        codes = first.end(), late
        told = f"{codes} when the first had stopped at {so_far[-1:]}\n{first.told}\n{second.told}"
        assert 0 in codes and codes[0] in (0, 1, 2) and codes[1] in (0, 2) and "Traceback" not in told, told
        assert codes != (0, 0) or how == "resumed", told
        if codes == (0, 2) and so_far[-1].call == "pwrite":  # not when it has not said so yet, or is done
            assert f"in use by process {first.process.pid} " in second.told, told
        elif codes[0]:
            assert re.search(rf"^error: .*{name}", first.told, re.M), told
        assert_equal(place.folder / name, place.folder / "whole")
        assert leftovers(place.folder / name) + leftovers(place.folder, name) == [], told
        return codes

    half = place.folder / f"half-{how}"
    point = next(point for point in points if point.path.endswith("step-000006") and point.after)
    assert (
        start(place, watching(place, f"half-{how}", point.number), "train", *place.options(half.name)).end() == KILLED
    )
    codes = each_of(cases, one)
    assert (0, 2) in codes
    print(sorted((code, codes.count(code)) for code in set(codes)))


def test_the_folder_of_a_killed_run_can_be_resumed_at_once(place: Place, trained: Undisturbed) -> None:
    watch = watching(place, "holder")
    first = start(place, watch, "train", *place.options("holder"), pause=0.2)
    while first.alive() and newest_step(place.folder / "holder") < 1:
        time.sleep(0.005)
    first.signal(signal.SIGKILL)
    code, told = place.dpo("train", "--resume", "holder")
    assert first.end() == KILLED
    assert code == 0, told
    assert_equal(place.folder / "holder", place.folder / "whole")


# ---- a long run -------------------------------------------------------------------------------------------------


def test_a_long_run_holds_no_more_than_a_short_one(place: Place, trained: Undisturbed) -> None:
    """Descriptors from the first steps on; memory, in a run that is long enough, by 1% at most."""
    steps = size(60, 2000)
    options = [*place.options("many-steps"), "--epochs", steps // 5, "--eval-steps", 50, "--save-steps", 50]
    watch = watching(place, "many-steps", steps=True)
    command = start(place, watch, "train", *options)
    assert command.end() == 0, command.told
    trace = read_trace(watch.trace)
    descriptors = [point.count for point in trace if point.call == "descriptors"]
    resident = [point.count for point in trace if point.call == "resident"]
    assert len(descriptors) == len(resident) == steps
    assert len(set(descriptors[5:])) == 1, descriptors
    early, late = statistics.median(resident[steps // 10 :][:20]), statistics.median(resident[-20:])
    print(f"{steps} steps: {early / 2**20:.1f} MiB at a tenth, {late / 2**20:.1f} MiB at the end")
    if LONG:
        assert late <= 1.01 * early
