"""What a run takes of the device's memory, and the memory mode and token budget that fit.

What a forward keeps for its backward pass is counted, on real pairs; only what gradient checkpointing saves of it is
reckoned from the model's shape.

Legend: P pairs, T packed tokens, N response tokens that carry loss, V vocabulary.
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

from dpo_cli.data.batching import MicroBatch, Step, probe_pairs, row_costs
from dpo_cli.data.pairs import Pair, count_loss_tokens, model_input_ids
from dpo_cli.models.adapters import is_adapted
from dpo_cli.models.logprobs import ModelRunner, forward_errors
from dpo_cli.models.parallel import local_shard
from dpo_cli.training.optimizer import BYTES, SPLIT
from dpo_cli.utils import distributed

USABLE = 0.9  # of the memory that is there: the rest is for what others take meanwhile
FRAGMENTED = 1.15  # what the C library's heap takes for activations, by their bytes; docs/performance.md
LOGIT_BYTES = 12  # of one logit: log-softmax, and the gradients before and behind it, all float32
# From the fastest on; a mode and whether activations are computed again in the backward pass. docs/performance.md
LADDER = {
    "cpu": [("full", False), ("full", True)],
    "cuda": [("full", False), ("split", False), ("full", True), ("split", True)],
}
MOST_TOKENS = {"cpu": 2048, "cuda": 32768}  # in a forward: more bring no speed
FEWEST_TOKENS = 512
COUNTED = 400  # tokens of each part of a pair on which is counted what a forward keeps


@dataclass(frozen=True)
class StepBytes:
    """What the parts of a training step take."""

    parameters: int  # that are trained
    largest: int  # parameters of the largest tensor that is trained
    fixed: float  # kept by any forward
    per_token: float  # kept by a forward, a packed token
    per_token_recomputed: float  # the same where activations are computed again
    per_logits: int  # of the logits of one response token
    process: int  # beside the run: on a CPU the program itself
    shards: int = 1  # that the parameters, their gradients and moments lie in
    gathered: int = 0  # parameters and gradients that are whole at a time nevertheless
    frozen: int = 0  # of the weights that are not trained

    def peak(self, memory: str, recompute: bool, first: tuple[int, int], later: tuple[int, int] | None) -> int:
        """The most that is held at a time; of the largest micro-batches: (T, N that meet the head at once).

        The body's gradients are there when a step's first backward pass is over: beside what the forward of a ``later``
        micro-batch keeps. The head's are there before, and one more of its size, which is added to them.
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
        """The most tokens that a forward may have to stay in ``room`` bytes, by 64."""
        left = room - self.peak(memory, recompute, (0, at_head), (0, at_head))
        return max(int(left / (self.per_token_recomputed if recompute else self.per_token)) // 64 * 64, 0)


def count_bytes(runner: ModelRunner, pairs: Sequence[Pair], process: int) -> StepBytes:
    """Count what a forward keeps: over the start of a long pair, and over that and a short one."""
    model: Any = runner.model
    config = model.config.get_text_config()
    cut = []  # what is counted grows with the tokens, so that a few hundred of each part are enough
    for pair in probe_pairs(pairs, runner.layout, runner.max_tokens):
        prompt, chosen, rejected = (model_input_ids(ids[:COUNTED]) for ids in (pair.prompt, pair.chosen, pair.rejected))
        cut.append(Pair(pair.where, prompt, chosen, rejected))  # all of a response carries loss: its beginning may not
    long, short = cut[0], cut[-1]
    tokens, more = row_costs([long, short], runner.layout)
    one, two = _kept(runner, [long]), _kept(runner, [long, short])
    slack = FRAGMENTED if runner.device.type == "cpu" else 1.0
    per_token = max(slack * (two - one) / more, 1.0)  # nothing is kept of the body where the head alone is trained
    sizes = [p.numel() for p in model.parameters() if p.requires_grad]
    layers: int = config.num_hidden_layers
    kept_of_layers = layers * config.hidden_size * next(model.parameters()).element_size()  # what each begins with
    return StepBytes(
        parameters=sum(sizes),
        largest=max(sizes),
        fixed=0.0 if runner.parallel.sharded else max(slack * one - per_token * tokens, 0.0),  # with gathered weights
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
            kept[storage.data_ptr()] = tensor.detach()  # alive, so that no other gets its place
        return tensor.detach()  # the tensor itself would never be freed

    forward: Callable[[MicroBatch], Any] = runner.body if runner.chunked_lm_head else runner.token_logps
    graph = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with forward_errors("the model's own forward fails where gradients are wanted"), torch.enable_grad(), graph:
        forward(runner.batch(pairs))
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())  # of a gathered weight nothing is left


def usable_bytes(device: torch.device) -> float:
    """What a run may take of the device's memory, what this process has taken already included."""
    if device.type == "cuda":
        return USABLE * (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device))
    free = psutil.virtual_memory().available
    with suppress(OSError, ValueError, KeyError):  # of a container
        limit, taken = (int(Path("/sys/fs/cgroup", name).read_text()) for name in ("memory.max", "memory.current"))
        counts = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
        free = min(free, limit - taken + int(counts["active_file"]) + int(counts["inactive_file"]))  # files are let go
    return USABLE * float(free / distributed.local_world_size() + process_bytes(device))


def process_bytes(device: torch.device) -> int:
    """What this program takes of the device's memory beside tensors: on a CPU all that it takes now."""
    return int(psutil.Process().memory_info().rss) if device.type == "cpu" else 0


@dataclass(frozen=True)
class Fit:
    """How a run keeps its state, whether it computes activations again, its token budget, and what that costs."""

    memory: str
    recompute: bool
    max_tokens: int
    step_bytes: StepBytes

    def estimate(self, steps: Sequence[Step], costs: Sequence[int], pairs: Sequence[Pair], runner: ModelRunner) -> int:
        """The most that these steps hold at a time: bytes; ``costs`` are the pairs' tokens in a forward."""

        def size(indices: tuple[int, ...]) -> int:
            cost = [costs[i] for i in indices]
            return sum(cost) if runner.layout != "padded" else len(cost) * max(cost, default=0)

        world = distributed.world_size()  # each takes one of so many micro-batches, and then another one
        first = max((indices for step in steps for indices in step[:world]), key=size)
        later = max((indices for step in steps for indices in step[world:]), key=size, default=None)
        found = [(size(each), at_head(runner, [pairs[i] for i in each])) for each in (first, later) if each]
        return self.step_bytes.peak(self.memory, self.recompute, found[0], found[1] if later else None)


def fit(
    runner: ModelRunner, pairs: Sequence[Pair], process: int, memory: str, recompute: bool, max_tokens: int | None
) -> Fit:
    """The fastest way to train that fits the device's memory, by the estimate; the last of its ladder where none does.

    What is wanted is kept to: a ``memory`` mode that is not ``auto``, recomputation, ``max_tokens``.

    Units: ``process`` in bytes, see ``StepBytes``.
    """
    room = -distributed.all_reduce_max([-int(usable_bytes(runner.device))])[0]  # of several ranks the least counts
    counted = count_bytes(runner, pairs, distributed.all_reduce_max([process])[0])
    costs = runner.costs(pairs)
    enough = max(max(costs), max_tokens or FEWEST_TOKENS)  # a longer pair has a forward of its own
    longest = pairs[costs.index(max(costs))]
    head = max(at_head(runner, [longest]), min(runner.max_logit_rows, enough)) if runner.chunked_lm_head else 0
    ways = [(memory, recompute)]
    if memory == "auto":
        coarse = runner.dtype == torch.bfloat16 and not is_adapted(runner.model)
        ladder = LADDER[runner.device.type]
        ways = [way for way in ladder if (way[1] or not recompute) and (coarse or way[0] not in SPLIT)]
        ways = [way for way in ways if way[0] == "full" or not runner.parallel.sharded]
    for way in ways:
        if counted.peak(*way, (enough, head), (enough, head)) <= room:
            break
    most = min(max(counted.max_tokens(*way, room, head), FEWEST_TOKENS), MOST_TOKENS[runner.device.type])
    return Fit(*way, max_tokens or most, counted)


def at_head(runner: ModelRunner, pairs: Sequence[Pair]) -> int:
    """Response tokens of a micro-batch that meet the head at once; 0 where they count among what the forward keeps."""
    tokens = [count_loss_tokens(pair.chosen) + count_loss_tokens(pair.rejected) for pair in pairs]
    return min(sum(tokens), max(runner.max_logit_rows, *tokens)) if runner.chunked_lm_head and tokens else 0
