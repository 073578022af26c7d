"""What a run takes of the device's memory, and the memory mode and token budget that fit.

What a forward keeps for its backward pass is measured on real pairs. What is left with gradient checkpointing is
estimated from the model's shape.

Legend: T packed tokens, N response tokens that carry loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from dpo_cli.data.batching import MicroBatch
from dpo_cli.data.pairs import Pair, count_loss_tokens, model_input_ids, rankings
from dpo_cli.data.schedule import Step, count_tokens, probe_pairs, row_costs
from dpo_cli.data.trees import most_tokens
from dpo_cli.models.adapters import is_adapted
from dpo_cli.models.logprobs import ModelRunner, forward_errors
from dpo_cli.models.parallel import local_shard
from dpo_cli.training.optimizer import BYTES, SPLIT
from dpo_cli.utils import distributed

USABLE = 0.9  # of the available memory; the rest is a margin for other processes
FRAGMENTED = 1.15  # C library heap bytes per byte of activations; docs/performance.md
LOGIT_BYTES = 12  # per logit, in float32: log-softmax, gradients of its output and input
# Fastest first: memory mode, and whether the backward pass recomputes activations. docs/performance.md
LADDER = {
    "cpu": [("full", False), ("full", True)],
    "cuda": [("full", False), ("split", False), ("full", True), ("split", True)],
}
MOST_TOKENS = {"cpu": 2048, "cuda": 32768}  # in a forward: more bring no speed
FEWEST_TOKENS = 512
PROBED = 400  # tokens of each part of a pair in the measured forwards


@dataclass(frozen=True)
class StepBytes:
    """The memory that the parts of a training step take, in bytes unless they count parameters."""

    parameters: int  # that are trained
    largest: int  # parameters of the largest tensor that is trained
    fixed: float  # kept by any forward
    per_token: float  # kept by a forward, per packed token
    per_token_recomputed: float  # the same where the backward pass recomputes activations
    per_logits: int  # of the logits of one response token
    process: int  # of the program itself, on a CPU; else 0
    shards: int = 1  # over which parameters, gradients and moments are split
    gathered: int = 0  # of them and their gradients, held unsharded at a time
    frozen: int = 0  # of the weights that are not trained

    def peak(self, memory: str, recompute: bool, first: tuple[int, int], later: tuple[int, int] | None) -> int:
        """Estimate the peak in bytes. ``first``, ``later``: largest micro-batches, (T, N at the head).

        While the ``first`` forward's activations are held, only the head has a gradient: the sum and a new addend. From
        its backward pass on, all parameters have one, also during a ``later`` forward.
        """
        weights, gradient, moments = (each * self.parameters / self.shards for each in BYTES[memory])
        head = 2 * self.largest * (2 if memory in SPLIT else 4)
        held = [self._forward(recompute, *first) + head, gradient + head / 2]
        if later:
            held.append(self._forward(recompute, *later) + gradient + head / 2)
        return int(self.process + self.frozen + weights + moments + 4 * self.gathered + max(held))

    def _forward(self, recompute: bool, tokens: int, at_head: int) -> float:
        per_token = self.per_token_recomputed if recompute else self.per_token
        return self.fixed + per_token * tokens + self.per_logits * at_head

    def max_tokens(self, memory: str, recompute: bool, room: float, at_head: int) -> int:
        """Return the largest multiple of 64 tokens whose peak fits ``room`` bytes."""
        left = room - self.peak(memory, recompute, (0, at_head), (0, at_head))
        return max(int(left / (self.per_token_recomputed if recompute else self.per_token)) // 64 * 64, 0)


def count_bytes(runner: ModelRunner, pairs: Sequence[Pair], process: int) -> StepBytes:
    """Measure what a forward keeps of a long pair, and of that and a short one, both cut."""
    model: Any = runner.model
    config = model.config.get_text_config()
    cut = []  # what is kept grows with the tokens, so a few hundred of each part are enough
    for place, pair in enumerate(2 * probe_pairs(pairs, runner.layout, runner.max_tokens)):
        prompt, chosen, rejected = (model_input_ids(ids[:PROBED]) for ids in (pair.prompt, pair.chosen, pair.rejected))
        prompt[0] = place  # the two share nothing
        cut.append(Pair(pair.where, prompt, chosen, rejected))  # all tokens carry loss: a cut response may have none
    long, short = cut[0], cut[-1]
    tokens, more = row_costs([long, short], runner.layout)
    one, two = _kept(runner, [long]), _kept(runner, [long, short])
    slack = FRAGMENTED if runner.device.type == "cpu" else 1.0
    per_token = max(slack * (two - one) / more, 1.0)  # the body keeps nothing where only the head is trained
    sizes = [p.numel() for p in model.parameters() if p.requires_grad]
    layers: int = config.num_hidden_layers
    kept_of_layers = layers * config.hidden_size * next(model.parameters()).element_size()  # the input of each
    return StepBytes(
        parameters=sum(sizes),
        largest=max(sizes),
        fixed=0.0 if runner.parallel.sharded else max(slack * one - per_token * tokens, 0.0),  # see ``gathered``
        per_token=per_token,
        per_token_recomputed=2 * per_token / layers + kept_of_layers,  # one layer at a time, and its gradients
        per_logits=LOGIT_BYTES * config.vocab_size,
        process=process,
        shards=distributed.world_size() if runner.parallel.sharded else 1,
        gathered=runner.parallel.gathered_parameters(model),
        frozen=sum(local_shard(p).nbytes for p in model.parameters() if not p.requires_grad),
    )


def _kept(runner: ModelRunner, pairs: Sequence[Pair]) -> int:
    """Bytes that the body's forward keeps for its backward pass, parameters aside."""
    weights = {local_shard(p).untyped_storage().data_ptr() for p in runner.model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = tensor.detach()  # alive: no reuse of its address
        return tensor.detach()  # the tensor itself would leak

    forward: Callable[[MicroBatch], Any] = runner.body if runner.chunked_lm_head else runner.token_logps
    graph = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with forward_errors("the model's own forward fails with gradients enabled"), torch.enable_grad(), graph:
        forward(runner.batch(pairs))
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())  # gathered weights are freed: 0 B


def usable_bytes(device: torch.device) -> float:
    """Return the bytes that a run may use, including those this process already holds."""
    if device.type == "cuda":
        return USABLE * (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device))
    free = psutil.virtual_memory().available
    with suppress(OSError, ValueError, KeyError):  # the limit of a container
        limit, taken = (int(Path("/sys/fs/cgroup", name).read_text()) for name in ("memory.max", "memory.current"))
        counts = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
        free = min(free, limit - taken + int(counts["active_file"]) + int(counts["inactive_file"]))  # file cache
    return USABLE * float(free / distributed.local_world_size() + process_bytes(device))


def process_bytes(device: torch.device) -> int:
    """Return this process's resident bytes if the device is a CPU, else 0."""
    return int(psutil.Process().memory_info().rss) if device.type == "cpu" else 0


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
    sizes = [count_tokens(each, pairs, costs, runner.layout) for each in alone]
    enough = max(max(sizes), max_tokens or FEWEST_TOKENS)  # a longer ranking or pair gets its own forward
    head = count_head_tokens(runner, [pairs[i] for i in alone[sizes.index(max(sizes))]])
    head = max(head, min(runner.max_logit_rows, enough)) if runner.chunked_lm_head else 0
    ways = [(memory, recompute)]
    if memory == "auto":
        can_split = runner.dtype == torch.bfloat16 and not is_adapted(runner.model)
        ladder = LADDER[runner.device.type]
        ways = [way for way in ladder if (way[1] or not recompute) and (can_split or way[0] not in SPLIT)]
        ways = [way for way in ways if way[0] == "full" or not runner.parallel.sharded]
    for way in ways:
        if counted.peak(*way, (enough, head), (enough, head)) <= room:
            break
    most = most_tokens(pairs, MOST_TOKENS[runner.device.type])
    most = min(max(counted.max_tokens(*way, room, head), FEWEST_TOKENS), most)
    return MemoryChoice(*way, max_tokens or most, counted)


def count_head_tokens(runner: ModelRunner, pairs: Sequence[Pair]) -> int:
    """Count the response tokens at the head at once; 0 where the head runs within the measured forward."""
    each = [count_loss_tokens(pair.chosen) + count_loss_tokens(pair.rejected) for pair in pairs]
    tokens = [sum(each[i] for i in ranking) for ranking in rankings(range(len(pairs)), pairs)]
    return min(sum(tokens), max(runner.max_logit_rows, *tokens)) if runner.chunked_lm_head and tokens else 0
