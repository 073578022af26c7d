"""The processes of one run: what they agree on, what rank 0 does for all, and the sum of their gradients.

A run in one process passes through here without communication. ``DistributedDataParallel`` is not used: it would reduce
gradients in the hooks of its own forward; here body and head run backward apart, and one sum follows the last
micro-batch. Decisions are taken on the host, over gloo: no device waits, and a rank that fails disconnects the others.
"""

from __future__ import annotations

import atexit
import datetime
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dpo_cli.utils.errors import DpoError, UsageError

TIMEOUT = datetime.timedelta(days=30)  # a rank may wait as long as another one scores; one that ends is noticed at once
HOST = torch.device("cpu")

T = TypeVar("T")


def world_size() -> int:
    """Return the number of processes of the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return this process's rank, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_launched() -> bool:
    """Whether a launcher started this process, even if it is the only one."""
    return dist.is_initialized()


def local_world_size() -> int:
    """Return the number of processes of the run on this host."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size())) if world_size() > 1 else 1


@contextmanager
def started(resume_hint: Callable[[], str] = lambda: "") -> Iterator[torch.device]:
    """Join the processes that a launcher started, or run alone, while the block runs; yields this process's device.

    Raises:
        UsageError: the launcher asks for another engine.
        DpoError: another rank ended.
    """
    for engine in ("USE_DEEPSPEED", "USE_MEGATRON_LM", "USE_FSDP", "USE_PARALLELISM_CONFIG"):
        if os.environ.get(f"ACCELERATE_{engine}", "").lower() == "true":
            raise UsageError(f"the launcher sets ACCELERATE_{engine}, which is not used here; start with torchrun")
    device = HOST
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
        # Partial sums stay float32, and are not split: else a row's numbers depend more on how many rows there are.
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = (False, False)
    launched = "TORCHELASTIC_RUN_ID" in os.environ or int(os.environ.get("WORLD_SIZE", "1")) > 1
    if launched and not dist.is_initialized():
        dist.init_process_group("gloo" if device == HOST else "cpu:gloo,cuda:nccl", timeout=TIMEOUT)
    try:
        yield device
        barrier()
    except (RuntimeError, KeyboardInterrupt) as error:
        if world_size() == 1 or not (lost := _lost_peer(error)):
            raise
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher's, which follows
        reason = str(lost).splitlines()[0][:200]
        raise DpoError(f"another rank exited unexpectedly; {resume_hint()}\n({reason})") from error
    if dist.is_initialized():  # at exit, not before: the launcher's store allows no second process group
        atexit.unregister(dist.destroy_process_group)
        atexit.register(dist.destroy_process_group)


def _lost_peer(error: BaseException | None) -> BaseException | None:
    """Return the error of a collective whose peer ended, if it caused this error; gloo's errors have no class."""
    while error is not None:
        lost = isinstance(error, RuntimeError) and ("gloo" in str(error) or "Connection closed by peer" in str(error))
        if lost or isinstance(error, dist.DistError):
            return error
        error = error.__context__
    return None


def hard_exit(code: int) -> None:
    """End a process that a launcher started without closing the interpreter.

    A thread of gloo may still release a tensor, for which it needs the interpreter; closing it meanwhile would abort
    the process ("terminate called without an active exception").
    """
    if is_launched():
        atexit.unregister(hard_exit)
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


# ---- agreement --------------------------------------------------------------------------------------------------


def on_rank_0(action: Callable[[], T]) -> T:
    """Run ``action`` on rank 0 and broadcast its result or error; the result is pickled.

    Raises:
        DpoError: as ``action``.
    """
    if world_size() == 1:
        return action()
    outcome: list[Any] = [None, None]  # the result, or the error
    if rank() == 0:
        try:
            outcome[0] = action()
        except DpoError as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome, device=HOST)
    if outcome[1]:
        raise outcome[1]
    value: T = outcome[0]
    return value


def rank_0_first(action: Callable[[], T]) -> T:
    """Run ``action`` on all ranks, on rank 0 before the others, which find on disk what it wrote."""
    results: list[T] = []
    on_rank_0(lambda: results.append(action()))
    return results[0] if results else action()


def one_rank_at_a_time(action: Callable[[], T]) -> T:
    """Run ``action`` on all ranks, one after the other on each host, so that they do not need its memory at once."""
    results: list[T] = []
    for turn in range(all_reduce_max([local_world_size()])[0]):
        if turn == int(os.environ.get("LOCAL_RANK", rank())) % local_world_size():
            results.append(action())
        barrier()
    return results[0]


def all_reduce_max(values: Sequence[int]) -> list[int]:
    """Return the maximum over all ranks of each number."""
    if world_size() == 1:
        return list(values)
    largest = torch.tensor(values, dtype=torch.int64)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return largest.tolist()


def all_reduce_sum(values: Tensor) -> Tensor:
    """Sum a tensor over all ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def all_gather(value: T) -> list[T]:
    """Return the value of each rank; values are pickled."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def all_reduce_known(table: Tensor) -> Tensor:
    """Merge tables on the host: a value that any rank has, NaN where none has one."""
    if world_size() == 1:
        return table
    merged = table.nan_to_num(-torch.inf, torch.inf, -torch.inf)
    dist.all_reduce(merged, dist.ReduceOp.MAX)
    return merged.masked_fill(merged == -torch.inf, torch.nan)


def barrier() -> None:
    """Wait until all ranks are here."""
    all_reduce_max([0])


def check_same(**values: str) -> None:
    """Refuse to continue if ranks have other values than rank 0.

    Raises:
        UsageError: naming the values and the ranks.
    """
    gathered = all_gather(values)
    if wrong := [name.replace("_", " ") for name in values if len({each[name] for each in gathered}) > 1]:
        others = [str(place) for place, each in enumerate(gathered) if each != gathered[0]]
        raise UsageError(
            f"{' and '.join(wrong)}: not the same on rank {', '.join(others)} as on rank 0; all hosts need the same "
            "files, versions and kind of device"
        )


def check_same_command(options: Any, *more: str) -> None:
    """Refuse to continue if ranks have other options, which decide what ranks do together."""
    given = {name: value for name, value in vars(options).items() if name not in ("cache_dir", "logging_steps")}
    check_same(the_options=str((given, *more)))


# ---- gradients --------------------------------------------------------------------------------------------------


def all_reduce_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Sum the gradients of all ranks in place; a parameter that has none on any rank stays without."""
    if world_size() == 1:
        return
    running = []
    for p, anywhere in zip(parameters, all_reduce_max([p.grad is not None for p in parameters]), strict=True):
        if anywhere:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad.contiguous()
            running.append(dist.all_reduce(p.grad, async_op=True))
    for each in running:
        each.wait()
