"""AdamW for each ``--memory``: torch's own, or one with moments in 8 bits and weights in two halves of 16 bits.

The latter keeps no float32 tensor of the size of a parameter: on CUDA the update of a tensor is one compiled kernel,
elsewhere torch's fused AdamW works on float32 copies of a slice, which are coded again at once.

Legend: B blocks of a tensor, W values of a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.adamw import adamw
from torch.optim.optimizer import StateDict

from dpo_cli.config.options import TrainOptions
from dpo_cli.models.split_weights import join, split
from dpo_cli.utils.devices import device_kind

# Per parameter: its weight, its gradient, its moments. "in-backward": no gradient outlives its update.
BYTES = {"full": (4, 4, 8), "split": (4, 2, 2), "in-backward": (4, 0, 2)}
SPLIT_MODES = {"split", "in-backward"}  # their model is split first, see models/split_weights.py
BLOCK = 256  # values that share scales
SLICE = 2**22  # values that are float32 at a time; a multiple of BLOCK
SMALLEST = 4096  # values of a tensor whose moments are worth coding
FLOOR = -38.0  # octaves: a root below 2^-38 counts as that, 1% of eps at the first step
BETAS, EPS = (0.9, 0.999), 1e-8
GOLDEN = (math.sqrt(5) - 1) / 2
KERNELS: dict[str, Callable[..., None]] = {}  # the compiled ``_update_blocks`` of a type of device


def make_optimizer(
    model: nn.Module,
    weight_decay: float,
    memory: str = "full",
    low: dict[str, Tensor] | None = None,
    betas: tuple[float, float] = BETAS,
) -> Optimizer:
    """Make AdamW with decay on matrices only; the learning rate is set before each step. The model is on its device.

    ``low`` is what ``split_master_weights(model)`` returned, in ``SPLIT_MODES``; it is used up.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
    kinds = [(matrices, weight_decay), (vectors, 0.0)]
    groups = [{"params": parameters, "weight_decay": decay} for parameters, decay in kinds if parameters]
    if memory == "full":
        return AdamW(groups, lr=0.0, betas=betas, fused=True)
    assert (memory in SPLIT_MODES) == (low is not None)
    names = {p: name for name, p in model.named_parameters()}
    halves: dict[Tensor, Tensor] = {p: low.pop(name) for p, name in names.items() if name in low} if low else {}
    return SmallAdamW(groups, halves, betas)


def learning_rate(step: int, steps: int, options: TrainOptions) -> float:
    """Compute the learning rate of step 1, 2, …, ``steps``: a linear warm-up, then the schedule down to ``min_lr``."""
    warmup_steps = round(options.warmup_ratio * steps)
    if step <= warmup_steps:
        return options.lr * step / warmup_steps
    done = (step - 1 - warmup_steps) / (steps - warmup_steps)  # 0 at the first step after the warm-up
    share = {"linear": 1 - done, "cosine": 0.5 + 0.5 * math.cos(math.pi * done), "constant": 1}[options.lr_scheduler]
    return options.min_lr + (options.lr - options.min_lr) * share


# ---- moments in 8 bits ------------------------------------------------------------------------------------------


def encode(exp_avg: Tensor, exp_avg_sq: Tensor, dither: Tensor) -> dict[str, Tensor]:
    """Code both moments in a byte each.

    The second moment's code is its root's logarithm, in 255 steps from the block's least to its largest: no value is
    coded as 0, as with linear codes or the dynamic map of torchao and bitsandbytes, so no first moment is ever divided
    by nearly 0. The first moment's code is its ratio to that root, which is the update but for the bias corrections, so
    an error is at most 1/254 of the block's largest update.

    A second moment changes by less than half a step of its code and would stay where it is if that were rounded to
    the nearest. So ``dither`` in [0, 1), a new value each step, is added and the code rounded down: over the steps it
    errs on neither side.

    Shapes: (B, W), float32. Source: docs/performance.md, "Moments in 8 bits".
    """
    octaves = exp_avg_sq.clamp(2.0 ** (2 * FLOOR), 2.0**126).log2_().div_(2)
    least, largest = octaves.amin(1, keepdim=True), octaves.amax(1, keepdim=True)  # (B, 1)
    gap = ((largest - least) / 255).clamp_(min=1e-6)
    codes = octaves.sub_(least).div_(gap).add_(dither).clamp_(0, 255).to(torch.uint8)
    ratio = exp_avg / _root(codes, least, gap)
    scale = (ratio.abs().amax(1, keepdim=True) / 127).clamp_(min=2.0**-100)
    ratio_codes = ratio.div_(scale).round_().to(torch.int8)
    return {"exp_avg": ratio_codes, "scale": scale, "exp_avg_sq": codes, "least": least, "gap": gap}


def decode(coded: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return both moments, (B, W) in float32, from the codes of ``encode``."""
    root = _root(coded["exp_avg_sq"], coded["least"], coded["gap"])
    return root * coded["exp_avg"] * coded["scale"], root.square()


def _root(codes: Tensor, least: Tensor, gap: Tensor) -> Tensor:
    return codes.float().mul_(gap).add_(least).exp2_()


def _zero_moments(p: Tensor) -> dict[str, Tensor]:
    """Return the moments of a parameter before its first step: coded, or float32 if it is small."""
    zeros = torch.zeros(p.numel(), dtype=torch.uint8, device=p.device).view(_blocks(p))
    step = torch.zeros((), device=p.device)
    if len(zeros) == 1:
        return {"step": step, "exp_avg": zeros.float(), "exp_avg_sq": zeros.float()}
    column = torch.zeros(len(zeros), 1, device=p.device)
    codes = {"exp_avg": zeros.to(torch.int8), "exp_avg_sq": zeros}
    return {"step": step, **codes, "scale": column, "least": column + FLOOR, "gap": column.clone()}


def _blocks(p: Tensor) -> tuple[int, int]:
    """The shape of a parameter in blocks; one block of all its values where its moments are not coded."""
    return (-1, BLOCK) if p.numel() >= SMALLEST and p.numel() % BLOCK == 0 else (1, -1)


# ---- the optimizer ----------------------------------------------------------------------------------------------


class SmallAdamW(Optimizer):
    """AdamW whose moments take a byte each and whose weights are float32, or bfloat16 with their low halves.

    Its state is plain tensors: ``step``, the moments and their scales, ``low``.
    """

    def __init__(
        self, groups: list[dict[str, Any]], low: dict[Tensor, Tensor], betas: tuple[float, float] = BETAS
    ) -> None:
        super().__init__(groups, {"lr": 0.0, "betas": betas})
        for _, p in self._parameters():
            p.data = p.detach().contiguous()  # it is viewed in blocks
            if p in low:
                self.state[p]["low"] = low.pop(p).view(_blocks(p))
        self._squares = torch.zeros((), dtype=device_kind(p.device).sums, device=p.device)

    def _parameters(self) -> Iterator[tuple[dict[str, Any], nn.Parameter]]:
        return ((group, p) for group in self.param_groups for p in group["params"])

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Take the state as it is saved; torch's own would cast codes and halves to the parameter's type."""
        parameters = [p for _, p in self._parameters()]
        self.state.clear()
        for index, values in state_dict["state"].items():
            p = parameters[index]
            self.state[p] = {name: value.to(p.device) for name, value in values.items()}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient; the gradients must be finite."""
        assert closure is None
        for group, p in self._parameters():
            if p.grad is not None:
                self._update(group, p, None)

    @contextmanager
    def fused_backward(self) -> Iterator[None]:
        """Update each parameter when its gradient is whole, and free that; wraps the last backward pass of a step.

        Parameters with a gradient of earlier passes alone (an untied head) are updated at the end. From the first
        gradient that is not finite, no parameter is changed, and ``grad_norm``, read after the block, is not finite.
        Earlier updates cannot be undone, nor those of a pass that ran out of memory.
        """
        self._squares.zero_()
        handles = [
            p.register_post_accumulate_grad_hook(partial(self._step_param, group)) for group, p in self._parameters()
        ]
        try:
            yield
            for group, p in self._parameters():
                if p.grad is not None:
                    self._step_param(group, p)
        finally:
            for handle in handles:
                handle.remove()

    @property
    def grad_norm(self) -> Tensor:
        """Norm of the gradient that ``fused_backward`` consumed, (), on the device."""
        return self._squares.sqrt()

    @torch.no_grad()
    def _step_param(self, group: dict[str, Any], p: Tensor) -> None:
        """Update a parameter, unless its gradient or an earlier one was not finite; their sum keeps that."""
        assert p.grad is not None
        self._squares += torch.linalg.vector_norm(p.grad, dtype=torch.float32).to(self._squares).square()
        self._update(group, p, found_inf=self._squares.isfinite().logical_not().float())
        p.grad = None

    def _update(self, group: dict[str, Any], p: Tensor, found_inf: Tensor | None) -> None:
        """Take one step of a parameter; none at all where ``found_inf`` is 1, read on the device."""
        assert p.grad is not None
        state = self.state[p]
        if "step" not in state:
            state.update(_zero_moments(p))
        shape = state["exp_avg"].shape  # (B, W)
        settings = {"lr": group["lr"], "weight_decay": group["weight_decay"], "found_inf": found_inf}
        settings |= {"beta1": group["betas"][0], "beta2": group["betas"][1]}
        torch.ops.dpo_cli.adamw_(p.detach().view(shape), p.grad.reshape(shape), **state, **settings)


# ---- the update of a tensor -------------------------------------------------------------------------------------

torch.library.define(
    "dpo_cli::adamw_",
    "(Tensor(a!) weight, Tensor grad, *, Tensor(b!) step, Tensor(c!) exp_avg, Tensor(d!) exp_avg_sq, "
    "Tensor(e!)? low=None, Tensor(f!)? scale=None, Tensor(g!)? least=None, Tensor(h!)? gap=None, "
    "float lr, float weight_decay, float beta1, float beta2, Tensor? found_inf) -> ()",
)
torch.library.register_fake("dpo_cli::adamw_", lambda *_, **__: None)


@torch.library.impl("dpo_cli::adamw_", "default")
def _update(
    weight: Tensor,
    grad: Tensor,
    *,
    step: Tensor,
    lr: float,
    weight_decay: float,
    beta1: float,
    beta2: float,
    found_inf: Any,
    **state: Tensor,
) -> None:
    rows = {"weight": weight, "grad": grad} | {name: each for name, each in state.items() if each is not None}
    rows = {
        name: each.data for name, each in rows.items()
    }  # no views: a compiler would ask for the shape of their base
    if "scale" in rows and (kernel := KERNELS.get(weight.device.type)):
        kernel(rows, step, *_on_device(weight.device, lr, weight_decay, 1 - beta1, 1 - beta2), found_inf)
    else:
        for start in range(0, len(weight), SLICE // BLOCK):
            part = {name: tensor[start : start + SLICE // BLOCK] for name, tensor in rows.items()}
            _update_blocks(part, step, lr, weight_decay, 1 - beta1, 1 - beta2, found_inf)
    step += 1 if found_inf is None else 1 - found_inf


@lru_cache(maxsize=8)
def _on_device(device: torch.device, *values: float) -> list[Tensor]:
    return [torch.full((), value, device=device) for value in values]  # numbers could become part of the kernel


def _update_blocks(
    part: dict[str, Tensor],
    step: Tensor,
    lr: Any,
    weight_decay: Any,
    gain: Any,
    gain_sq: Any,
    found_inf: Tensor | None,
) -> None:
    """Take one step of AdamW on some blocks (B, W) and their moments, in place; none if ``found_inf`` is 1.

    ``gain``, ``gain_sq``: the weights of the new gradient in the moments, 1 - beta, which float32 has more exactly.
    """
    weight = join(part["weight"], part["low"]) if "low" in part else part["weight"]
    exp_avg, exp_avg_sq = decode(part) if "scale" in part else (part["exp_avg"], part["exp_avg_sq"])
    grad = part["grad"].float()
    if torch.compiler.is_compiling():
        assert weight.shape[1] == BLOCK  # a constant of the kernel: a block is one reduction
        exp_avg = exp_avg + gain * (grad - exp_avg)
        exp_avg_sq = (1 - gain_sq) * exp_avg_sq + gain_sq * grad.square()
        # 1 - beta^step, without the cancellation
        correction, correction_sq = (-torch.expm1((step + 1) * torch.log1p(-each)) for each in (gain, gain_sq))
        weight = weight - lr * weight_decay * weight
        weight = weight - lr / correction * exp_avg / ((exp_avg_sq / correction_sq).sqrt() + EPS)
    else:
        settings: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay, "eps": EPS}
        settings |= {"beta1": 1 - gain, "beta2": 1 - gain_sq}
        settings |= {"amsgrad": False, "maximize": False, "found_inf": found_inf}
        adamw([weight], [grad], [exp_avg], [exp_avg_sq], [], [step.clone()], fused=True, **settings)  # it counts
    new = {"weight": weight, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    if "scale" in part:
        multiple = (step + 1).to(device_kind(step.device).sums) * GOLDEN
        new |= encode(exp_avg, exp_avg_sq, dither=multiple - multiple.floor())
    if "low" in part:
        new["weight"], new["low"] = split(weight)
    for name, tensor in new.items():
        if tensor is not part[name]:
            part[name].copy_(tensor if found_inf is None else torch.where(found_inf > 0, part[name], tensor))


def compile_updates(device: torch.device, memory: str, warn: Callable[[str], None]) -> None:
    """Compile ``_update_blocks`` to one kernel for coded tensors of any size; where that fails, warn of it.

    It takes seconds, on a small tensor, before the first step and not within it.
    """
    p: Tensor = nn.Parameter(torch.zeros(SMALLEST, dtype=torch.bfloat16, device=device))
    p.grad = torch.zeros_like(p)
    trial = SmallAdamW([{"params": [p], "weight_decay": 0.0}], {p: torch.zeros_like(p, dtype=torch.int16)})
    KERNELS[device.type] = torch.compile(_update_blocks, fullgraph=True, dynamic=True)
    try:
        with trial.fused_backward() if memory == "in-backward" else nullcontext():
            pass
        trial.step()
    except Exception as error:  # of any type: there is no Triton, no C compiler, …
        del KERNELS[device.type]
        cause = getattr(error, "inner_exception", error)
        reason = next(iter(str(cause).splitlines()), "")
        warn(
            "the optimizer runs as many small kernels, slower with few pairs per step: torch.compile, which needs "
            f"Triton and a C compiler, fails: {type(cause).__name__}: {reason}"
        )
