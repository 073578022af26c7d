"""What happens to a process and its files out in the world: a kill at any point of writing, damage, a full disk.

A process is watched from within: every call through which a byte or a name reaches the disk is a pair of *boundaries*,
one before it and one after it, numbered as they come. One undisturbed process tells how many there are; the next
is killed at the n-th, or is sent a signal there, or finds the disk full.
"""

from __future__ import annotations

import _pyio
import builtins
import errno
import fcntl
import functools
import io
import itertools
import os
import random
import resource
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import safetensors.torch

import dpo_cli.models.logprobs
import dpo_cli.reference.store
import dpo_cli.training.loop
from tests.helpers.runs import Command, Place

# ---- watched, and killed ----------------------------------------------------------------------------------------

# Files that Python opens are written through these as well while a process is watched; safetensors has its own.
WRITING = ("write", "pwrite", "writev", "pwritev")
NAMING = ("replace", "rename", "link", "symlink", "unlink", "remove", "mkdir", "rmdir")
SETTLING = ("fsync", "fdatasync", "chmod", "fchmod", "truncate", "ftruncate", "utime")
NEEDS_ROOM = (*WRITING, "open", "mkdir", "link", "symlink", "serialize_file")
POLL_SECONDS = 0.005
STILL_SECONDS = 120.0  # after which nobody will wake a process any more
WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


@dataclass(frozen=True)
class Boundary:
    """A point of a watched process between two of its writes, or (number 0) rows that it scored."""

    number: int
    after: bool
    call: str
    path: str  # relative to the watched folder; where a name is given away, that name
    source: str  # of a new name: the one before
    seconds: float  # since the process was armed
    count: int = 0

    def __str__(self) -> str:
        return f"boundary {self.number}, {'after' if self.after else 'before'} {self.call} {self.path}"


Fault = int | Literal["torn", "full", "still"]


@dataclass(frozen=True)
class Watch:
    """Number the boundaries of a process that lie below ``folder``, tell them in ``trace``, and let a fault be at one.

    ``fault``: the process is sent a signal there; or "torn", a write does half of its bytes before the kill; or "full",
    from there on nothing can be written; or "still", the process waits to be woken. ``shard_seconds``: what
    ``SHARD_SECONDS`` is of the reference. ``largest_file``: what the system refuses
    to write beyond, in bytes. ``steps``: tell also what the process holds after each step.
    """

    folder: Path
    trace: Path
    at: int = 0
    fault: Fault = signal.SIGKILL
    shard_seconds: float = 30.0
    largest_file: int | None = None
    steps: bool = False

    def arm(self) -> None:
        """In the process that is to be watched."""
        _Watched(self).arm()


class _Watched:
    """The hooks of one process."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.numbers = itertools.count(1)
        self.full = False
        self.began = time.monotonic()
        self.trace = os.open(watch.trace, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.write, self.readlink, self.truncate, self.kill = os.write, os.readlink, os.truncate, os.kill
        self.folder = os.path.realpath(watch.folder)

    def arm(self) -> None:
        os.setsid()  # so that whatever it starts can be found by its session
        dpo_cli.reference.store.SHARD_SECONDS = self.watch.shard_seconds
        if self.watch.largest_file is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.watch.largest_file, self.watch.largest_file))
        for name in (*WRITING, *NAMING, *SETTLING):
            if original := getattr(os, name, None):
                setattr(os, name, self._watched(name, original))
        os.open = self._watched("open", os.open, lambda _, flags, *__, **___: flags & WRITE_FLAGS)  # type: ignore[assignment]
        fcntl.flock = self._watched("flock", fcntl.flock)  # type: ignore[assignment]
        module: Any = safetensors.torch
        module.serialize_file = self._watched("serialize_file", module.serialize_file)
        builtins.open = io.open = self._open(io.open)  # type: ignore[assignment]
        forwards = dpo_cli.models.logprobs.ModelRunner.forwards

        def told(runner: Any, pairs: Any, compute: Any, *share: Any) -> Iterator[Any]:
            for scored in forwards(runner, pairs, compute, *share):
                if compute.__qualname__.startswith("_score"):
                    self._tell(0, "scored", count=len(scored[0]))
                yield scored

        dpo_cli.models.logprobs.ModelRunner.forwards = told  # type: ignore[method-assign, assignment]
        if self.watch.steps:
            step = dpo_cli.training.loop.Trainer.step

            def measured(*args: Any, **kwargs: Any) -> Any:
                values = step(*args, **kwargs)
                resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
                self._tell(0, "resident", count=resident)
                self._tell(0, "descriptors", count=len(list(Path("/proc/self/fd").iterdir())))
                return values

            dpo_cli.training.loop.Trainer.step = measured  # type: ignore[method-assign]

    def _tell(
        self, number: int, call: str, path: str = "", source: str = "", count: int = 0, after: bool = False
    ) -> None:
        seconds = f"{time.monotonic() - self.began:.4f}"
        line = "\t".join(map(str, (number, int(after), call, path, source, seconds, count)))
        self.write(self.trace, f"{line}\n".encode())

    def _open(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Let Python's own files, whose writes are not seen, be written through ``os``."""

        def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            inside = set(mode) & set("wax+") and self._below(file) is not None
            return (_pyio.open if inside else original)(file, mode, *args, **kwargs)

        return opened

    def _below(self, file: Any, dir_fd: int | None = None) -> str | None:
        """A file or descriptor by its path within the watched folder, None if it is not in there."""
        if isinstance(file, int):
            path = self.readlink(f"/proc/self/fd/{file}")
        elif hasattr(file, "fileno"):
            return self._below(file.fileno())
        else:
            start = self.readlink(f"/proc/self/fd/{dir_fd}") if dir_fd is not None else Path.cwd()
            path = os.path.normpath(os.path.join(start, os.fsdecode(file)))  # noqa: PTH118
        return os.path.relpath(path, self.folder) if (path + os.sep).startswith(self.folder + os.sep) else None

    def _watched(
        self, name: str, original: Callable[..., Any], counts: Callable[..., Any] = lambda *_, **__: True
    ) -> Callable[..., Any]:
        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            named = args[1] if name in ("replace", "rename", "link", "symlink", "serialize_file") else args[0]
            path = self._below(named, kwargs.get("dir_fd")) if counts(*args, **kwargs) else None
            if path is None:
                return original(*args, **kwargs)
            source = (self._below(args[0]) or "") if name in ("replace", "rename", "link") else ""
            if self._reaches(name, path, source, after=False):
                if self.watch.fault == "torn" and name == "write":
                    original(args[0], bytes(args[1])[: len(args[1]) // 2])
                if self.watch.fault == "torn" and name == "serialize_file":
                    original(*args, **kwargs)
                    self.truncate(args[1], os.stat(args[1]).st_size // 2)  # noqa: PTH116
                self._strike()
            if self.full and name in NEEDS_ROOM:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), args[0] if isinstance(args[0], str) else None)
            result = original(*args, **kwargs)
            if self._reaches(name, path, source, after=True):
                self._strike()
            return result

        return call

    def _reaches(self, name: str, path: str, source: str, after: bool) -> bool:
        number = next(self.numbers)
        self._tell(number, name, path, source, after=after)
        return number == self.watch.at

    def _strike(self) -> None:
        if self.watch.fault == "full":
            self.full = True
        elif self.watch.fault == "still":
            self._tell(0, "still")
            woken = awake(self.watch)
            while not woken.exists() and time.monotonic() - self.began < STILL_SECONDS:
                time.sleep(POLL_SECONDS)
        else:
            self.kill(os.getpid(), signal.SIGKILL if self.watch.fault == "torn" else self.watch.fault)


def awake(watch: Watch) -> Path:
    """The file that wakes a process that stands still."""
    return watch.trace.with_suffix(".awake")


def read_trace(trace: Path) -> list[Boundary]:
    """What a watched process has told so far, in order."""
    text = trace.read_text() if trace.exists() else ""
    rows = [line.split("\t") for line in text[: text.rfind("\n") + 1].splitlines()]
    return [
        Boundary(int(number), after == "1", call, path, source, float(seconds), int(count))
        for number, after, call, path, source, seconds, count in rows
    ]


def processes_of(session: int) -> list[str]:
    """The command lines of the processes that are alive in a session."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] not in "ZX":
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except (OSError, IndexError):  # it has just ended
            continue
    return found


# ---- damaged ----------------------------------------------------------------------------------------------------


def flip_bit(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def truncate(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def zero_page(content: bytes, rng: random.Random, page: int = 512) -> bytes:
    """One sector reads as zeros."""
    start = rng.randrange(0, len(content), page)
    return content[:start] + bytes(len(content[start : start + page])) + content[start + page :]


def damage_file(file: Path, damage: Callable[[bytes, random.Random], bytes], rng: random.Random) -> str:
    """Damage a file; returns what was done to it. What was damaged differs from what was there."""
    content = file.read_bytes()
    changed = next(changed for _ in range(100) if (changed := damage(content, rng)) != content)
    file.write_bytes(changed)
    places = [i for i, (old, new) in enumerate(zip(content, changed, strict=False)) if old != new]
    where = f"from byte {places[0]}" if places else "at its end"
    return f"{damage.__name__} of {file.name}, {len(content)} bytes, {where}; {len(changed)} bytes left"


# ---- full -------------------------------------------------------------------------------------------------------


class SmallDisk:
    """A file system of its own, of few bytes."""

    def __init__(self, folder: Path, size: int) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder)

    def resize(self, size: int) -> None:
        _mount("-o", f"remount,size={size}", self.folder)

    def used(self) -> int:
        """Bytes that are taken."""
        usage = shutil.disk_usage(self.folder)
        return usage.total - usage.free


def _mount(*arguments: Any) -> None:
    subprocess.run(["mount", *map(str, arguments)], check=True, capture_output=True)


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[SmallDisk]:
    """A disk of ``size`` bytes at a folder that is not there yet.

    Raises:
        OSError, subprocess.CalledProcessError: no disk can be mounted here.
    """
    disk = SmallDisk(folder, size)
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True, capture_output=True)


@functools.cache
def can_mount() -> bool:
    """Whether a small disk can be had on this machine."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            with small_disk(Path(folder) / "disk", 65536) as disk:
                return disk.used() < 65536
        except (OSError, subprocess.CalledProcessError):
            return False


# ---- many at once -----------------------------------------------------------------------------------------------

_ONE = threading.Lock()  # multiprocessing asks after all children when one is started: two threads must not at once


@dataclass
class Running(Command):
    """A command that one of several threads has started."""

    watch: Watch

    def alive(self) -> bool:
        with _ONE:
            return bool(self.process.is_alive())

    def end(self) -> int:
        deadline = time.monotonic() + 300
        while self.alive() and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        return super().end()

    def stands_still(self) -> bool:
        """Wait until it does; False if it has ended instead."""
        while self.alive():
            if any(point.call == "still" for point in read_trace(self.watch.trace)):
                return True
            time.sleep(POLL_SECONDS)
        return False

    def wake(self) -> None:
        awake(self.watch).touch()

    @property
    def told(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def signal(self, number: int) -> None:
        if self.alive():
            os.kill(self.process.pid, number)


def start(place: Place, watch: Watch, *arguments: Any, pause: float = 0.0) -> Running:
    """Start a watched command in a place."""
    with _ONE:
        command = place.start(*arguments, pause=pause, strike=watch)  # type: ignore[arg-type]
    return Running(command.process, command.output, watch)


def each_of(cases: Sequence[Any], test: Callable[[Any], Any]) -> list[Any]:
    """Run a test for each case, two at a time; the first failure is raised and names its case."""

    def named(case: Any) -> Any:
        try:
            return test(case)
        except BaseException as error:
            error.add_note(f"case: {case}")
            raise

    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(named, case) for case in cases]
        try:
            return [future.result() for future in futures]
        finally:
            pool.shutdown(cancel_futures=True)
