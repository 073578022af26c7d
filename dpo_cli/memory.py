"""What a run takes of the device's memory, and the memory mode and token budget that fit.

What a forward keeps for its backward pass is counted, on real pairs; only what gradient checkpointing saves of it is
reckoned from the model's shape.

Legend: P pairs, T packed tokens, N response tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from dpo_cli.batch import Step, probes, row_costs
from dpo_cli.logps import Scorer, head_room, hidden_states, token_logps
from dpo_cli.optimizer import BYTES, SPLIT
from dpo_cli.tokens import Pair

USABLE = 0.9  # of the memory that is there: the rest is for what others take meanwhile
FRAGMENTED = 1.15  # what the C library's heap takes for activations, by their bytes; docs/performance.md
LOGIT_BYTES = 12  # of one logit: log-softmax, and the gradients before and behind it, all float32
# From the fastest on; a mode and whether activations are computed again in the backward pass. docs/performance.md
LADDER = {
    "cpu": [("full", False), ("full", True), ("8bit", True)],
    "cuda": [("full", False), ("split", False), ("full", True), ("split", True)],
}
MOST_TOKENS = {"cpu": 2048, "cuda": 32768}  # in a forward: more bring no speed
FEWEST_TOKENS = 512


@dataclass(frozen=True)
class Costs:
    """Bytes that the parts of a training step take."""

    parameters: int
    largest: int  # parameters of the largest tensor
    fixed: float  # kept by any forward, such as weights cast to the compute precision
    token: float  # kept by a forward, a packed token
    recomputed: float  # the same where activations are computed again
    logits: int  # of one response token
    process: int  # beside the run: on a CPU the program itself

    def peak(self, memory: str, recompute: bool, first: tuple[int, int], later: tuple[int, int] | None) -> int:
        """The most that is held at a time; of the largest micro-batches: (T, N that meet the head at once).

        Gradients are there from a step's first backward pass on: beside what the forward of a ``later`` one keeps.
        """
        weights, gradient, moments = (each * self.parameters for each in BYTES[memory])
        added = BYTES[memory][0] * self.largest  # one more gradient, which is added to those that are there
        forwards = [self._forward(recompute, *first), gradient + added]
        if later:
            forwards.append(self._forward(recompute, *later) + gradient + added)
        return int(self.process + weights + moments + max(forwards))

    def _forward(self, recompute: bool, tokens: int, at_head: int) -> float:
        return self.fixed + (self.recomputed if recompute else self.token) * tokens + self.logits * at_head

    def max_tokens(self, memory: str, recompute: bool, room: float, at_head: int) -> int:
        """The most tokens that a forward may have to stay in ``room`` bytes, by 64."""
        left = room - self.peak(memory, recompute, (0, at_head), (0, at_head))
        return max(int(left / (self.recomputed if recompute else self.token)) // 64 * 64, 0)


def measure_costs(scorer: Scorer, pairs: Sequence[Pair], process: int) -> Costs:
    """Count what a forward keeps: over the longest pair that fits ``max_tokens``, and over it and the shortest."""
    model: Any = scorer.model
    config = model.config.get_text_config()
    tried = probes(pairs, scorer.layout, scorer.max_tokens)
    long, short = tried[0], tried[-1]
    tokens, more = row_costs([long, short], scorer.layout)
    one, two = _kept(scorer, [long]), _kept(scorer, [long, short])
    slack = FRAGMENTED if scorer.device.type == "cpu" else 1.0
    token = slack * (two - one) / more
    sizes = [p.numel() for p in model.parameters()]
    layers: int = config.num_hidden_layers
    return Costs(
        parameters=sum(sizes),
        largest=max(sizes),
        fixed=max(slack * one - token * tokens, 0.0),
        token=token,
        recomputed=token / layers + layers * config.hidden_size * next(model.parameters()).element_size(),
        logits=LOGIT_BYTES * config.vocab_size,
        process=process,
    )


def _kept(scorer: Scorer, pairs: Sequence[Pair]) -> int:
    """Bytes that the body's forward keeps for its backward pass, parameters aside."""
    own = {p.untyped_storage().data_ptr() for p in scorer.model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # kept alive, so that no other gets its place; the tensor itself would never be freed

    forward = hidden_states if scorer.apart else token_logps
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward(scorer.model, scorer.batch(pairs), scorer.dtype)
    return sum(kept.values())


def usable_bytes(device: torch.device) -> float:
    """What a run may take of the device's memory, what this process has taken already included."""
    if device.type == "cuda":
        return USABLE * (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device))
    free = psutil.virtual_memory().available
    with suppress(OSError, ValueError):  # of a container
        limit, taken = (int(Path("/sys/fs/cgroup", name).read_text()) for name in ("memory.max", "memory.current"))
        free = min(free, limit - taken)
    return USABLE * float(free + process_bytes(device))


def process_bytes(device: torch.device) -> int:
    """What this program takes of the device's memory beside tensors: on a CPU all that it takes now."""
    return int(psutil.Process().memory_info().rss) if device.type == "cpu" else 0


@dataclass(frozen=True)
class Fit:
    """How a run keeps its state, whether it computes activations again, its token budget, and what that costs."""

    memory: str
    recompute: bool
    max_tokens: int
    costs: Costs

    def estimate(self, steps: Sequence[Step], costs: Sequence[int], pairs: Sequence[Pair], scorer: Scorer) -> int:
        """The most that these steps hold at a time: bytes; ``costs`` are the pairs' tokens in a forward."""

        def size(indices: tuple[int, ...]) -> int:
            cost = [costs[i] for i in indices]
            return sum(cost) if scorer.layout != "padded" else len(cost) * max(cost, default=0)

        first = max((step[0] for step in steps), key=size)
        later = max((indices for step in steps for indices in step[1:]), key=size, default=None)
        found = [(size(each), at_head(scorer, [pairs[i] for i in each])) for each in (first, later) if each]
        return self.costs.peak(self.memory, self.recompute, found[0], found[1] if later else None)


def fit(
    scorer: Scorer, pairs: Sequence[Pair], process: int, memory: str, recompute: bool, max_tokens: int | None
) -> Fit:
    """The fastest way to train that fits the device's memory, by the estimate; the most frugal one where none does.

    What is wanted is kept to: a ``memory`` mode that is not ``auto``, recomputation, ``max_tokens``.

    Units: ``process`` in bytes, see ``Costs``.
    """
    most, room = MOST_TOKENS[scorer.device.type], usable_bytes(scorer.device)
    costs = measure_costs(scorer, pairs, process)
    longest = probes(pairs, scorer.layout, most)[0]
    enough = max_tokens or max(*scorer.costs([longest]), FEWEST_TOKENS)
    head = max(at_head(scorer, [longest]), min(head_room(scorer.model), enough)) if scorer.apart else 0
    ways = [(memory, recompute)]
    if memory == "auto":
        coarse = scorer.dtype == torch.bfloat16
        ladder = LADDER[scorer.device.type]
        ways = [way for way in ladder if (way[1] or not recompute) and (coarse or way[0] not in SPLIT)]
    for way in ways:
        if costs.peak(*way, (enough, head), (enough, head)) <= room:
            break
    most = min(max(costs.max_tokens(*way, room, head), FEWEST_TOKENS), most)
    return Fit(*way, max_tokens or most, costs)


def at_head(scorer: Scorer, pairs: Sequence[Pair]) -> int:
    """Response tokens of a micro-batch that meet the head at once; 0 where they count among what the forward keeps."""
    tokens = [len(pair.chosen) + len(pair.rejected) for pair in pairs]
    return min(sum(tokens), max(head_room(scorer.model), *tokens)) if scorer.apart and tokens else 0
