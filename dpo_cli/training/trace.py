"""A run's step without weights and without its GPU: the program's own, on tensors that have shapes and no values.

Torch's fake tensors go through the same forward, backward and optimizer as real ones. What is seen is which operators
run, how many bytes are held at a time and what for, and where the host would wait for the device. What a GPU's
libraries take for themselves (its context, workspaces of matrix products and attention) is not seen.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from dpo_cli.config.options import TrainOptions
from dpo_cli.data.batching import Segments
from dpo_cli.data.schedule import Step
from dpo_cli.models.shapes import shapes_only
from dpo_cli.training.loop import StopSignal, make_trainer
from dpo_cli.training.memory import USABLE
from dpo_cli.training.optimizer import BYTES
from dpo_cli.training.setup import Run, prepare_run, score_reference
from dpo_cli.training.step import Trainer
from dpo_cli.utils.cards import Card, find_card, standing_in
from dpo_cli.utils.console import Reporter
from dpo_cli.utils.errors import UsageError, plural

# Of the bytes that are held: "casts" are of weights to the compute precision, "body" and "head" what these computed.
PART_NAMES = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "casts": "casts of weights",
    "body": "body",
    "head": "head and logits",
    "other": "other",
}
PARTS = tuple(PART_NAMES)
ATTENTION = "attention"  # whose FLOPs are counted apart
BLOCK = 512  # bytes: the CUDA allocator rounds up to it
BACKWARD = 2.5  # products of flash attention's backward pass per product of its forward


class Watch(TorchDispatchMode):
    """Watch the operators on fake tensors of one device: bytes held by part, FLOPs, and reads by the host.

    ``part`` is what a new tensor is held for; ``segments`` are those of the row that the body runs over.
    """

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.device, self.part = device, "other"
        self.segments: Segments | None = None
        self.held: dict[int, tuple[str, int, Any]] = {}  # by storage: its part, its bytes, and what notes its end
        self.live, self.total = dict.fromkeys(PARTS, 0), 0
        self.restart()

    def restart(self) -> None:
        """Count from here on."""
        self.peak, self.highest = dict(self.live), self.total
        self.operators, self.flops = Counter[str](), dict.fromkeys((*PARTS, ATTENTION), 0.0)
        self.waits, self._read = list[str](), 0

    def holds(self, tensors: Iterable[Tensor], part: str) -> None:
        """Note that these tensors are held for this part."""
        for tensor in tensors:
            self._hold(tensor, part, moves=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        if name == "_local_scalar_dense":
            return self._wait(args[0])
        out = func(*args, **kwargs)
        part = "casts" if name == "_to_copy" and self._part(args[0]) == "weights" else self.part
        self.operators[name] += func.namespace != "prim"
        if not func.is_view:
            self._read = 0
        if name.startswith("_varlen_attn"):
            self.flops[ATTENTION] += self._attention(name, func, args, kwargs)
        elif count := flop_registry.get(func._overloadpacket):
            self.flops[self.part] += count(*args, **kwargs, out_val=out)
        for tensor in tree_iter(out):
            if isinstance(tensor, FakeTensor) and tensor.fake_device.type == self.device:
                self._hold(tensor, part)
        return out

    def _part(self, tensor: Tensor) -> str | None:
        return self.held.get(tensor.untyped_storage()._cdata, (None,))[0]

    def _wait(self, tensor: Tensor) -> float:
        """Return a value that the host reads; one of the device is noted, and made up."""
        if not isinstance(tensor, FakeTensor):
            with unset_fake_temporarily():
                return float(tensor)
        if tensor.constant is not None:
            return float(tensor.constant)
        if (storage := tensor.untyped_storage()._cdata) != self._read:  # else another value of the tensor just read
            self._read = storage
            self.waits.append(f"{tuple(tensor.shape)} {tensor.dtype}")
        return 0.5 if tensor.is_floating_point() else 1

    def _hold(self, tensor: Tensor, part: str, moves: bool = False) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.held:
            before, size, end = self.held[key]
            if moves and before != part:
                self.held[key] = part, size, end
                self.live[before] -= size
                self.live[part] += size
            return
        size = -(-storage.nbytes() // BLOCK) * BLOCK
        self.held[key] = part, size, weakref.ref(storage, lambda _: self._free(key))
        self.live[part] += size
        self.total += size
        if self.total > self.highest:
            self.peak, self.highest = dict(self.live), self.total

    def _free(self, key: int) -> None:
        part, size, _ = self.held.pop(key)
        self.live[part] -= size
        self.total -= size

    def _attention(self, name: str, func: Any, args: Any, kwargs: Any) -> float:
        """Count the FLOPs of a flash call by the segments of the row; 0 where their bounds have no values."""
        if self.segments is None or isinstance(self.segments.query_bounds, FakeTensor):
            return 0.0
        given = dict(zip((each.name for each in func._schema.arguments), args, strict=False)) | kwargs
        with unset_fake_temporarily():
            queries, keys = (np.diff(x.numpy()) for x in (self.segments.query_bounds, self.segments.key_bounds))
        window = given["window_size"][0] + 1 or keys.max()
        # A segment's last query sees all of its keys, each one before it one less, none more than the window.
        first, last = np.minimum(keys - queries + 1, window), np.minimum(keys, window)
        scores = (first + last) / 2 * (last - first + 1) + (queries - (last - first) - 1) * last
        width = 4 * given["query"].shape[1] * given["query"].shape[2]
        return float(scores.sum() * width * (BACKWARD if name.endswith("backward") else 1))


# ---- a step -----------------------------------------------------------------------------------------------------


def watch_step(trainer: Trainer, watch: Watch, planned: Step) -> None:
    """Take a step of a trainer on fake tensors under the watch, once the optimizer has its state."""
    model: Any = trainer.runner.model
    body = model.base_model
    watch.holds([*model.parameters(), *model.buffers()], "weights")

    def enter(part: str, segments: Segments | None = None) -> None:
        watch.part, watch.segments = part, segments or watch.segments

    def leave(_: nn.Module, __: Any, output: Any) -> None:
        enter("head")
        if output.last_hidden_state.requires_grad:  # called when the body's backward pass begins
            output.last_hidden_state.register_hook(lambda _: enter("body"))

    trained = [p for p in model.parameters() if p.requires_grad]
    hooks = [
        *(p.register_post_accumulate_grad_hook(lambda p: watch.holds([p.grad], "gradients")) for p in trained),
        body.register_forward_pre_hook(lambda _, __, given: enter("body", given["segments"]), with_kwargs=True),
        body.register_forward_hook(leave),
        trainer.optimizer.register_step_pre_hook(lambda *_: enter("other")),
    ]
    try:
        for p in trained:
            p.grad = torch.zeros_like(p)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        for state in trainer.optimizer.state.values():
            for name, tensor in state.items():
                watch.holds([tensor], "weights" if name == "low" else "optimizer")
        batches = trainer.micro_batches(planned)
        watch.restart()
        trainer.step(planned, batches, trainer.options.lr, StopSignal())
    finally:
        for hook in hooks:
            hook.remove()


def trace(options: TrainOptions, resume: Path | None, card_name: str | None, reporter: Reporter) -> dict[str, Any]:
    """`dpo train --dry-run --trace`: what the run's largest step takes on a card.

    Raises:
        UsageError: an option, the data or the model cannot be used, or not without values.
    """
    card = find_card(card_name)
    if options.device != "auto" or options.fsdp:
        raise UsageError("--trace: one card, which --card names; leave out --device and --fsdp")
    if options.quantize:
        raise UsageError(f"--trace: not with --load-in-{options.quantize}, which packs values, and a trace has none")
    watch, cpu = Watch(), torch.device("cpu")
    with standing_in(card), shapes_only(), watch:
        options = dataclasses.replace(options, ref_model=None)  # released before the steps
        run = prepare_run(options, resume, cpu, reporter, dry_run=True, weights=False)
        score_reference(run)
        trainer, estimates = make_trainer(run), [_estimate(run, step) for step in run.plan]
        planned = run.plan[estimates.index(max(estimates))]
        watch_step(trainer, watch, planned)
    return _result(run, card, watch, planned, max(estimates))


def _estimate(run: Run, step: Step) -> int:
    return run.memory_choice.estimate([step], run.costs, run.pairs, run.policy.runner)


def _result(run: Run, card: Card, watch: Watch, planned: Step, estimate: int) -> dict[str, Any]:
    """What the watch saw, and what follows for the run."""
    options, state = run.options, run.memory_choice.step_bytes
    tokens, all_tokens = (run.count_tokens(steps) for steps in ([planned], run.plan))
    responses, all_responses = (_response_tokens(run, steps) for steps in ([planned], run.plan))
    head, body = watch.flops["head"], sum(watch.flops.values()) - watch.flops["head"]
    weights, gradients, moments = BYTES[options.memory]
    moved = state.parameters * (2 * weights + gradients + 2 * moments)  # by the optimizer
    rate = card.float32 if options.dtype == "float32" else card.bfloat16
    peak, usable = watch.highest, USABLE * card.memory
    return {
        "card": card.name,
        "memory": options.memory,
        "gradient_checkpointing": options.gradient_checkpointing,
        "max_tokens": options.max_tokens,
        "step": {"pairs": sum(map(len, planned)), "tokens": tokens, "micro_batches": len(planned)},
        "peak_bytes": {"total": peak, **watch.peak},
        "estimate_bytes": estimate,
        "usable_bytes": int(usable),
        "fits": peak <= usable,
        "flops": head + body,
        "run_flops": head * all_responses / responses + body * all_tokens / tokens,
        "floor_seconds": (head + body) / rate + moved / card.bandwidth,
        "host_syncs": len(watch.waits),
        "operators": watch.operators.total(),
    }


def _response_tokens(run: Run, steps: Sequence[Step]) -> int:
    return sum(int(run.pairs.loss_lengths[[*places]].sum()) for step in steps for places in step)


def as_text(result: Mapping[str, Any]) -> str:
    """Format the result of a trace as a table."""
    step, peak, unit = result["step"], result["peak_bytes"], 2**30
    recomputed = ", activations recomputed" if result["gradient_checkpointing"] else ""
    fits = "it fits" if result["fits"] else "it does not fit"
    micro_batches, pairs = plural(step["micro_batches"], "micro-batch"), plural(step["pairs"], "pair")
    lines = [
        f"{result['card']}, the largest step: {pairs}, {step['tokens']:,} tokens in {micro_batches}; "
        f"--memory {result['memory']}{recomputed}, --max-tokens {result['max_tokens']}",
        "",
        f"{'bytes at the peak':<20}{'GiB':>9}",
        *(f"  {PART_NAMES[name]:<18}{peak[name] / unit:>9.2f}" for name in PARTS),
        f"  {'total':<18}{peak['total'] / unit:>9.2f}  {fits}: a run may use {result['usable_bytes'] / unit:.1f}",
        f"  {'estimate of it':<18}{result['estimate_bytes'] / unit:>9.2f}  by which a run chooses",
        "",
        f"{'FLOPs of the step':<20}{result['flops']:>9.3g}",
        f"{'FLOPs of the run':<20}{result['run_flops']:>9.3g}",
        f"{'seconds of the step':<20}{result['floor_seconds']:>9.3g}  a floor: at the card's published rates",
        f"{'host syncs':<20}{result['host_syncs']:>9,}  in the step",
        f"{'operators':<20}{result['operators']:>9,}  in the step",
    ]
    return "\n".join(lines)
