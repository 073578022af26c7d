"""The processes of one run: what they agree on, what the first of them does for all, and how their gradients add up.

A run in one process passes through here without any communication. With several, each holds the whole model and runs
its share of a step's micro-batches. ``DistributedDataParallel`` is not used: a step's backward passes are taken by body
and head apart, around that wrapper's forward and the hooks that it sets there. What it would do
is one sum, over every gradient, in the last micro-batch of a step; here that follows the last micro-batch.

What is decided is decided on the host, over gloo: no device waits for it, and a rank that fails lets the others know.
"""

from __future__ import annotations

import atexit
import datetime
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from dpo_cli.utils.errors import DpoError, UsageError

TIMEOUT = datetime.timedelta(days=30)  # a rank may wait as long as another one scores; one that ends is noticed at once
HOST = torch.device("cpu")
# What launchers set where they would have accelerate wrap the model.
ENGINES = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}

T = TypeVar("T")


def world_size() -> int:
    """Processes of the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process among them, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_launched() -> bool:
    """Whether a launcher started this process, be it the only one."""
    return dist.is_initialized()


def local_world_size() -> int:
    """Processes of the run that share this host's memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", world_size())) if world_size() > 1 else 1


@contextmanager
def started(how_to_go_on: Callable[[], str] = lambda: "") -> Iterator[Accelerator]:
    """Be one of the processes that a launcher started, or the only one, while the block runs.

    The engine takes nothing from the environment that would change a gradient.

    Raises:
        UsageError: the launcher wants another engine.
        DpoError: another process of the run ended before its time.
    """
    if wanted := [name for key, name in ENGINES.items() if os.environ.get(key, "").lower() == "true"]:
        raise UsageError(
            f"the launcher is set to {wanted[0]}, whose wrapped model takes no backward pass by parts, and whose own "
            "optimizer, clipping or checkpoints would take the place of these; start with torchrun, or with accelerate "
            "launch and no such plugin"
        )
    cpu = not torch.cuda.is_available()
    if "TORCHELASTIC_RUN_ID" in os.environ or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if not cpu:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))  # or accelerate decides, with a warning
        if not dist.is_initialized():
            dist.init_process_group("gloo" if cpu else "cpu:gloo,cuda:nccl", timeout=TIMEOUT)
    accelerator = Accelerator(cpu=cpu, mixed_precision="no", dynamo_backend="no")
    accelerator.gradient_accumulation_steps = 1
    try:
        yield accelerator
        barrier()
    except (RuntimeError, KeyboardInterrupt) as error:
        lost = _of_a_peer(error)  # the launcher's signal, which follows, may have come on top of it
        if world_size() == 1 or lost is None:
            raise
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        seen = str(lost).splitlines()[0][:200]
        told = f"another process of this run ended before its time, and so must all; {how_to_go_on()}\n({seen})"
        raise PeerLostError(told) from error
    if dist.is_initialized():  # not before the process ends: its launcher's store would not let it begin anew
        atexit.unregister(dist.destroy_process_group)
        atexit.register(dist.destroy_process_group)


def hard_exit(code: int) -> None:
    """End a process that a launcher started, here and now.

    A thread of gloo may still hold a tensor that this process has let go of, and needs the interpreter to free it; were
    that being closed meanwhile, the thread's end would be the process's ("terminate called without an active
    exception").
    """
    if is_launched():
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


# ---- agreement --------------------------------------------------------------------------------------------------


def on_rank_0(action: Callable[[], T]) -> T:
    """Let the first rank do something while the others wait; its value, or its error, is everybody's.

    The value has to be plain: it travels.

    Raises:
        DpoError: as ``action``.
    """
    if world_size() == 1:
        return action()
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = action()
        except DpoError as error:
            dist.broadcast_object_list([None, (type(error), str(error))], device=HOST)
            raise
    dist.broadcast_object_list(outcome, device=HOST)
    if outcome[1]:
        kind, message = outcome[1]
        raise kind(message)
    value: T = outcome[0]
    return value


def rank_0_first(action: Callable[[], T]) -> T:
    """Do the same on all ranks, on the first one before the others: what it keeps on disk, they find there."""
    found: list[T] = []
    on_rank_0(lambda: found.extend([action()]))
    return found[0] if found else action()


def one_rank_at_a_time(action: Callable[[], T]) -> T:
    """Do the same on all ranks, of those on one host one after the other: what it takes for a while, it takes once."""
    found: list[T] = []
    for turn in range(all_reduce_max([local_world_size()])[0]):
        if turn == int(os.environ.get("LOCAL_RANK", rank())) % local_world_size():
            found.append(action())
        barrier()
    return found[0]


def all_reduce_max(values: Sequence[int]) -> list[int]:
    """The largest that any rank has, of each number."""
    if world_size() == 1:
        return list(values)
    found = torch.tensor(values, dtype=torch.int64)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return found.tolist()


def all_gather(value: T) -> list[T]:
    """What each rank has, a plain value."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value, group=None)
    return found


def all_reduce_known(table: Tensor) -> Tensor:
    """A table on the host with what any rank knows of it, NaN where none does."""
    if world_size() == 1:
        return table
    known = table.nan_to_num(-torch.inf, torch.inf, -torch.inf)
    dist.all_reduce(known, dist.ReduceOp.MAX)
    return known.masked_fill(known == -torch.inf, torch.nan)


def barrier() -> None:
    """Go on when all ranks are here."""
    all_reduce_max([0])


def check_same(**values: str) -> None:
    """Refuse to go on where ranks have other values than the first one.

    Raises:
        UsageError: naming them, and the ranks.
    """
    found = all_gather(values)
    if wrong := [name.replace("_", " ") for name in values if any(each[name] != found[0][name] for each in found)]:
        others = [str(place) for place, each in enumerate(found) if each != found[0]]
        raise UsageError(
            f"{' and '.join(wrong)}: not the same on rank {', '.join(others)} as on rank 0; all hosts need the same "
            "files, versions and kind of device"
        )


def check_same_command(options: Any, *more: str) -> None:
    """Refuse to begin where ranks were started with other options, which decide what they do together.

    Raises:
        UsageError: naming the ranks.
    """
    given = {name: value for name, value in vars(options).items() if name not in ("cache_dir", "logging_steps")}
    check_same(the_options=str((given, *more)))


# ---- gradients --------------------------------------------------------------------------------------------------


def all_reduce_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Give every rank the sum of all ranks' gradients; what has one on no rank stays without."""
    if world_size() == 1:
        return
    running = []
    for p, anywhere in zip(parameters, all_reduce_max([p.grad is not None for p in parameters]), strict=True):
        if anywhere:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad.contiguous()
            running.append(dist.all_reduce(p.grad, async_op=True))
    for each in running:
        each.wait()


# ---- errors -----------------------------------------------------------------------------------------------------


class PeerLostError(DpoError):
    """Another process of the run ended; why, it may have told the first one."""

    cut_off = True


def _of_a_peer(error: BaseException | None) -> BaseException | None:
    """The error of a collective that another rank is gone from, where it led to this one: gloo's have no class."""
    if error is None or isinstance(error, dist.DistError):
        return error
    if isinstance(error, RuntimeError) and ("gloo" in str(error) or "Connection closed by peer" in str(error)):
        return error
    return _of_a_peer(error.__context__)


def report_once(message: str, code: int, cut_off: bool) -> tuple[str, int]:
    """What this rank is to say of its end, and its exit code: of one error only one rank speaks, the first if it can.

    ``cut_off``: the end came from outside, so that another rank's error is its cause if there is one. Ranks meet at the
    launcher's store, which outlives them.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher ends all ranks when it sees that one has ended
    mine = int(os.environ.get("RANK", "0"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    error, told, alone = (f"dpo/{attempt}/{name}" for name in ("error", "told", "alone"))
    store = None
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, is_master=False, timeout=datetime.timedelta(seconds=10))  # type: ignore[attr-defined]
        if mine == 0:
            if cut_off:
                with suppress(dist.DistError):
                    store.wait([error], datetime.timedelta(seconds=2))
                    message, code = json.loads(store.get(error))
            store.set(told, "")
            return "" if store.check([alone]) else message, code
        if not cut_off:
            store.set(error, json.dumps([f"rank {mine}: {message}", code]))
        with suppress(dist.DistError):
            store.wait([told], datetime.timedelta(seconds=2))
            return "", code
        if dist.is_initialized():  # the first rank waits for this one, and would for ever
            atexit.unregister(dist.destroy_process_group)
            dist.destroy_process_group()
        store.wait([told], datetime.timedelta(seconds=10))
        return "", code
    except (KeyError, RuntimeError):  # no store, or nobody there who has spoken
        if store:
            with suppress(RuntimeError):
                store.set(alone, "")
        return message if mine == 0 else f"rank {mine}: {message}", code
