"""Two ends of a pipe: a worker process that computes blocks when it is told to, and the parent that tells it.

Messages are JSON lines. The parent opens a phase, the worker prepares and says ``waiting``; for each block the parent
says ``go`` and gets what the block took; after the last one the worker says ``finished``. So at any time at most one of
all workers computes.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.memory.rows import forget_peak, peak_mib

Message = dict[str, Any]


class Meter:
    """The worker's end: waits for the word, and measures seconds, processor seconds and peak memory of each block."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what libraries print goes to the log
        self.cuda = torch.cuda.is_available()
        self.holders: list[Any] = []  # modules and optimizers, off the device while another worker is at work
        self._away: list[tuple[Callable[[torch.Tensor], None], torch.Tensor]] = []
        self._hosts: dict[tuple[int, str], torch.Tensor] = {}

    def send(self, **message: Any) -> None:
        self._out.write(json.dumps(message) + "\n")
        self._out.flush()

    def receive(self) -> Message:
        line = sys.stdin.readline()
        if not line:
            raise SystemExit  # the parent is gone
        return json.loads(line)

    def begin(self) -> None:
        """Wait for ``go``, then start the clock."""
        self.park()
        self.send(waiting=True)
        self.receive()
        self.unpark()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        else:
            forget_peak()
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def end(self) -> None:
        """Stop the clock and tell: seconds, processor seconds of all threads, MiB (the device's where there is one)."""
        if self.cuda:
            torch.cuda.synchronize()
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        peak = torch.cuda.max_memory_allocated() / 2**20 if self.cuda else peak_mib()
        self.send(seconds=wall, cpu_seconds=cpu, peak=peak)

    def park(self) -> None:
        """Move weights and moments to the host, so that each worker has the whole device while it works."""
        if not self.cuda:
            return
        for holder in self.holders:
            if isinstance(holder, torch.nn.Module):
                for tensor in (*holder.parameters(), *holder.buffers()):
                    self._put_away(tensor, (id(tensor), ""), partial(setattr, tensor, "data"))
                continue
            for state in holder.state.values():
                for name, value in state.items():
                    if isinstance(value, torch.Tensor):
                        self._put_away(value, (id(state), name), partial(state.__setitem__, name))
        torch.cuda.empty_cache()

    def _put_away(self, tensor: torch.Tensor, key: tuple[int, str], put: Callable[[torch.Tensor], None]) -> None:
        if tensor.is_cuda:
            if key not in self._hosts:  # pinned once, for copies at the bus's own speed
                self._hosts[key] = torch.empty_like(tensor, device="cpu", pin_memory=True)
            put(self._hosts[key].copy_(tensor.detach()))
            self._away.append((put, self._hosts[key]))

    def unpark(self) -> None:
        """Move them back."""
        for put, host in self._away:
            put(host.to("cuda"))
        self._away.clear()


def serve(make_side: Callable[[Message, Meter], Any]) -> None:
    """Run a worker until its parent closes the pipe. An error becomes its last message."""
    meter = Meter()
    try:
        job = meter.receive()
        side = make_side(job, meter)
        meter.park()
        meter.send(ready=True, **side.about)
        while True:
            command = meter.receive()
            meter.unpark()
            done = getattr(side, command["phase"])(command["blocks"])
            meter.park()
            meter.send(finished=done)
    except Exception as error:  # whatever it is, it is this worker's result
        memory = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
        text = " ".join(str(error).split())[:200]
        meter.send(error=f"out of memory: {text}" if memory else f"{type(error).__name__}: {text}")
        raise SystemExit(1) from error


class WorkerDiedError(Exception):
    """A worker's end, in words."""


KILLED = "killed by signal 9, as the kernel does where memory runs out"
MEMORY = ("out of memory", "device's memory", KILLED)  # ends that are a result, not a fault


def how_it_ended(code: int, log: Path) -> str:
    """The end of a process that should have gone on: its exit code, and the last words of its log."""
    if code == -9:
        return KILLED
    last = (re.findall(r".*\w.*", log.read_text(errors="replace")) or [""])[-1].strip("│ ")
    return f"ended by {f'signal {-code}' if code < 0 else f'exit code {code}'}: {last[:200]}"


class Worker:
    """The parent's end of one worker process.

    Units: ``limit`` in seconds that one answer may take.
    """

    def __init__(
        self, command: Sequence[str], job: Message, log: Path, environment: Mapping[str, str], limit: float
    ) -> None:
        self.log, self.limit = log, limit
        with log.open("w") as stream:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stream, text=True, env=dict(environment)
            )
        try:
            self.about = self.ask(job)
        except BaseException:
            self.close()
            raise

    def ask(self, message: Message) -> Message:
        with suppress(BrokenPipeError):  # its end is told below
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
        return self._answer()

    def block(self) -> tuple[Message, Message]:
        """What the next block took, and what the worker says then: ``waiting`` or ``finished``."""
        return self.ask({"go": True}), self._answer()

    def _answer(self) -> Message:
        late = threading.Event()

        def kill() -> None:
            late.set()
            self.process.kill()

        timer = threading.Timer(self.limit, kill)
        timer.start()
        try:
            line = self.process.stdout.readline()
        finally:
            timer.cancel()
        if not line:
            raise WorkerDiedError(
                f"no answer in {self.limit:.0f} s" if late.is_set() else how_it_ended(self.process.wait(), self.log)
            )
        message = json.loads(line)
        if "error" in message:
            raise WorkerDiedError(message["error"])
        return message

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
