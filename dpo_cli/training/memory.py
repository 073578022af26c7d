"""What a run takes of the device's memory, and the memory mode and token budget that fit.

What a forward keeps for its backward pass is measured on real pairs. What is left with gradient checkpointing is
estimated from the model's shape.

Legend: T packed tokens, N response tokens that carry loss.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.utils._pytree import tree_iter

from dpo_cli.data.batching import MicroBatch
from dpo_cli.data.pairs import Pair, count_loss_tokens, model_input_ids, rankings
from dpo_cli.data.schedule import Step, count_tokens, probe_pairs, row_costs
from dpo_cli.data.trees import most_tokens
from dpo_cli.models.adapters import is_adapted
from dpo_cli.models.logprobs import ModelRunner, forward_errors
from dpo_cli.models.parallel import layers, local_shard
from dpo_cli.training.optimizer import BYTES, SPLIT_MODES
from dpo_cli.utils import distributed
from dpo_cli.utils.cards import traced_card

USABLE = 0.9  # of the available memory; the rest is a margin for other processes
WITH_GRADIENTS = 1.7  # bytes of a recomputed layer and its gradients per byte that it keeps
LOGIT_BYTES = 12  # per logit, in float32: log-softmax, gradients of its output and input
FEWEST_TOKENS = 512
PROBED = 400  # tokens of each part of a pair in the measured forwards


@dataclass(frozen=True)
class Growth:
    """Bytes by the tokens of a forward; the square is a mask over a whole row."""

    fixed: float
    per_token: float
    per_square: float = 0.0

    @classmethod
    def through(cls, tokens: Sequence[int], sizes: Sequence[float]) -> Growth:
        """Draw a line through the first two measurements, and bend it up to the third, if there is one."""
        slopes = [(b - a) / (u - t) for (a, b), (t, u) in zip(pairwise(sizes), pairwise(tokens), strict=True)]
        square = max((slopes[-1] - slopes[0]) / (tokens[-1] - tokens[0]), 0.0)
        per_token = max(slopes[0] - square * (tokens[0] + tokens[1]), 0.0)
        return cls(max(sizes[0] - per_token * tokens[0] - square * tokens[0] ** 2, 0.0), per_token, square)

    def at(self, tokens: int) -> float:
        """Return the bytes at so many tokens."""
        return self.fixed + self.per_token * tokens + self.per_square * tokens**2


@dataclass(frozen=True)
class StepBytes:
    """The memory that the parts of a training step take, in bytes unless they count parameters."""

    parameters: int  # that are trained
    largest: int  # parameters of the largest tensor that is trained
    kept: Growth  # by a forward for its backward pass
    outside: Growth  # the part of it that is no layer's own, and the layers' inputs: all where layers are recomputed
    layer: Growth  # the largest layer's own
    per_logits: int  # of the logits of one response token
    process: int  # of the program itself, on a CPU; else 0
    shards: int = 1  # over which parameters, gradients and moments are split
    gathered: int = 0  # of them and their gradients, held unsharded at a time
    frozen: int = 0  # of the weights that are not trained

    def peak(self, memory: str, recompute: bool, first: tuple[int, int], later: tuple[int, int] | None) -> int:
        """Estimate the peak in bytes. ``first``, ``later``: largest micro-batches, (T, N at the head).

        While the ``first`` forward's activations are held, only the head has a gradient: the sum and a new addend. From
        the end of its backward pass on, all parameters have one, also during a ``later`` forward. A layer is recomputed
        when the logits are gone.
        """
        weights, gradient, moments = (each * self.parameters / self.shards for each in BYTES[memory])
        addend = self.largest * (2 if memory in SPLIT_MODES else 4)
        held = [self._forward(recompute, *first) + 2 * addend, gradient + addend + self._layer(recompute, first[0])]
        if later:
            held.append(self._forward(recompute, *later) + gradient + addend)
        return int(self.process + self.frozen + weights + moments + 4 * self.gathered + max(held))

    def _forward(self, recompute: bool, tokens: int, at_head: int) -> float:
        kept = self.outside if recompute else self.kept
        return kept.at(tokens) + max(self.per_logits * at_head, self._layer(recompute, tokens))

    def _layer(self, recompute: bool, tokens: int) -> float:
        return WITH_GRADIENTS * self.layer.at(tokens) if recompute else 0.0

    def max_tokens(self, memory: str, recompute: bool, room: float, at_head: int, most: int) -> int:
        """Return the largest multiple of 64 tokens, up to ``most``, whose peak fits ``room`` bytes; 0 if none does."""

        def peak(tokens: int) -> int:
            forward = tokens, min(tokens, at_head)
            return self.peak(memory, recompute, forward, forward)

        fitting: int = bisect_right(range(64, most + 1, 64), room, key=peak)
        return 64 * fitting


def count_bytes(runner: ModelRunner, pairs: Sequence[Pair], process: int) -> StepBytes:
    """Measure what a forward keeps of a long pair, and of that and a short one, both cut.

    A model's own attention may keep a mask over a whole packed row: there a third forward shows how it grows.
    """
    model: Any = runner.model
    config = model.config.get_text_config()
    cut = []  # what is kept grows with the tokens, so a few hundred of each part are enough
    for place, pair in enumerate(2 * probe_pairs(pairs, runner.layout, runner.max_tokens)):
        prompt, chosen, rejected = (model_input_ids(ids[:PROBED]) for ids in (pair.prompt, pair.chosen, pair.rejected))
        prompt[0] = place  # the two share nothing
        cut.append(Pair(pair.where, prompt, chosen, rejected))  # all tokens carry loss: a cut response may have none
    long, short = cut[0], cut[-1]
    probes = [[long], [long, short]] + [[long, short, long]] * (runner.layout == "packed")
    tokens = [sum(row_costs(probe, runner.layout)) for probe in probes]
    slack = runner.kind.heap
    measured = zip(*(_kept(runner, probe) for probe in probes), strict=True)
    kept, outside, layer = (Growth.through(tokens, [slack * size for size in sizes]) for sizes in measured)
    if runner.parallel.sharded:  # see ``gathered``
        kept, outside, layer = (replace(each, fixed=0.0) for each in (kept, outside, layer))
    sizes = [p.numel() for p in model.parameters() if p.requires_grad]
    return StepBytes(
        parameters=sum(sizes),
        largest=max(sizes),
        kept=kept,
        outside=outside,
        layer=layer,
        per_logits=LOGIT_BYTES * config.vocab_size,
        process=process,
        shards=distributed.world_size() if runner.parallel.sharded else 1,
        gathered=runner.parallel.gathered_parameters(model),
        frozen=sum(local_shard(p).nbytes for p in model.parameters() if not p.requires_grad),
    )


def _kept(runner: ModelRunner, pairs: Sequence[Pair]) -> tuple[int, int, int]:
    """Bytes that the body's forward keeps for its backward pass, parameters aside: the fields of ``StepBytes``."""
    weights = {local_shard(p).untyped_storage()._cdata for p in runner.model.parameters()}
    tensors: dict[int, Tensor] = {}  # one of each storage, alive so that no address is used again
    inside, owners, inputs = 0, defaultdict[int, set[int]](set), set[int]()  # the layers, from 1, that keep a storage

    def note(tensor: Tensor) -> int:
        key: int = tensor.untyped_storage()._cdata
        tensors.setdefault(key, tensor.detach())
        return key

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in weights:
            owners[note(tensor)].add(inside)
        return tensor.detach()  # the tensor itself would leak

    def enter(number: int, given: Any) -> None:
        nonlocal inside
        inside = number
        inputs.update(note(tensor) for tensor in tree_iter(given) if isinstance(tensor, Tensor))

    hooks = []
    for number, layer in enumerate(layers(runner.model), 1):
        before = partial(lambda number, _, *given: enter(number, given), number)
        hooks.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        hooks.append(layer.register_forward_hook(lambda *_: enter(0, ())))
    forward: Callable[[MicroBatch], Any] = runner.body if runner.chunked_lm_head else runner.token_logps
    graph = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    try:
        with forward_errors("the model's own forward fails with gradients enabled"), torch.enable_grad(), graph:
            forward(runner.batch(pairs))
    finally:
        for hook in hooks:
            hook.remove()
    sizes = {key: tensor.untyped_storage().nbytes() for key, tensor in tensors.items()}  # gathered weights: freed, 0
    own, outside = Counter[int](), set(inputs)
    for key, numbers in owners.items():
        if len(numbers) == 1 and 0 not in numbers:
            own[min(numbers)] += sizes[key]
        else:  # what two layers keep is none's own
            outside.add(key)
    return sum(map(sizes.__getitem__, owners)), sum(map(sizes.__getitem__, outside)), max(own.values(), default=0)


def usable_bytes(device: torch.device) -> float:
    """Return the bytes that a run may use, including those this process already holds."""
    if card := traced_card():
        return USABLE * card.memory
    if device.type in ("cuda", "xpu"):
        allocator = torch.get_device_module(device)
        return USABLE * float(allocator.mem_get_info(device)[0] + allocator.memory_reserved(device))
    free = psutil.virtual_memory().available
    if device.type == "mps":  # the host's memory too
        return USABLE * float(min(torch.mps.recommended_max_memory(), free + torch.mps.driver_allocated_memory()))
    with suppress(OSError, ValueError, KeyError):  # the limit of a container
        limit, taken = (int(Path("/sys/fs/cgroup", name).read_text()) for name in ("memory.max", "memory.current"))
        counts = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
        free = min(free, limit - taken + int(counts["active_file"]) + int(counts["inactive_file"]))  # file cache
    return USABLE * float(free / distributed.local_world_size() + process_bytes(device))


def process_bytes(device: torch.device) -> int:
    """Return this process's resident bytes if the device is a CPU, else 0."""
    return int(psutil.Process().memory_info().rss) if device.type == "cpu" and not traced_card() else 0


@dataclass(frozen=True)
class MemoryChoice:
    """The memory mode, whether the backward pass recomputes activations, the token budget, and their cost."""

    memory: str
    recompute: bool
    max_tokens: int
    step_bytes: StepBytes

    def estimate(self, steps: Sequence[Step], costs: Sequence[int], pairs: Sequence[Pair], runner: ModelRunner) -> int:
        """Estimate the peak of these steps in bytes; ``costs`` are the pairs' tokens in a forward."""

        def size(indices: tuple[int, ...]) -> int:
            return count_tokens(indices, pairs, costs, runner.layout)

        world = distributed.world_size()  # each rank's first micro-batch is one of the first ``world``
        first = max((indices for step in steps for indices in step[:world]), key=size)
        later = max((indices for step in steps for indices in step[world:]), key=size, default=None)
        sizes = [(size(each), count_head_tokens(runner, [pairs[i] for i in each])) for each in (first, later) if each]
        return self.step_bytes.peak(self.memory, self.recompute, sizes[0], sizes[1] if later else None)


def choose_memory(
    runner: ModelRunner, pairs: Sequence[Pair], process: int, memory: str, recompute: bool, max_tokens: int | None
) -> MemoryChoice:
    """Choose the fastest way to train whose estimated peak fits the device, or the ladder's last if none does.

    A ``memory`` other than ``auto``, ``recompute`` and ``max_tokens`` are kept if set.

    Units: ``process`` in bytes, see ``StepBytes``.
    """
    room = -distributed.all_reduce_max([-int(usable_bytes(runner.device))])[0]  # the least of all ranks
    counted = count_bytes(runner, pairs, distributed.all_reduce_max([process])[0])
    costs, alone = runner.costs(pairs), rankings(range(len(pairs)), pairs)
    longest = max(count_tokens(each, pairs, costs, runner.layout) for each in alone)
    enough = max(longest, max_tokens or FEWEST_TOKENS)  # a longer ranking or pair gets its own forward
    head = count_head_tokens(runner, pairs)
    ways = [(memory, recompute)]
    if memory == "auto":
        can_split = runner.dtype == torch.bfloat16 and not is_adapted(runner.model)
        ways = [
            way for way in runner.kind.ladder if (way[1] or not recompute) and (can_split or way[0] not in SPLIT_MODES)
        ]
        ways = [way for way in ways if way[0] == "full" or not runner.parallel.sharded]
    for way in ways:
        if counted.peak(*way, *[(enough, min(enough, head))] * 2) <= room:
            break
    most = runner.kind.most_tokens
    most = most_tokens(pairs, most) if runner.layout == "shared" else most
    fitting = max(counted.max_tokens(*way, room, head, most), FEWEST_TOKENS)
    return MemoryChoice(*way, max_tokens or fitting, counted)


def count_head_tokens(runner: ModelRunner, pairs: Sequence[Pair]) -> int:
    """Count the most response tokens at the head at once; 0 where the head runs within the measured forward."""
    each = [count_loss_tokens(pair.chosen) + count_loss_tokens(pair.rejected) for pair in pairs]
    tokens = [sum(each[i] for i in ranking) for ranking in rankings(range(len(pairs)), pairs)]
    return min(sum(tokens), max(runner.max_logit_rows, *tokens)) if runner.chunked_lm_head and tokens else 0
