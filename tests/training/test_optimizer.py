"""The optimizer in every memory mode: what it must equal, to the bit where it can, and what it really takes."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import dpo_cli.training.optimizer
from benchmarks.memory.optimizer import operators
from dpo_cli.data.batching import collate
from dpo_cli.hub.export import export_model
from dpo_cli.models.locate import ModelSource
from dpo_cli.models.logprobs import response_logps
from dpo_cli.models.split_weights import fp32_weights, join, split, split_master_weights
from dpo_cli.training.checkpoint import restore_checkpoint, save_checkpoint
from dpo_cli.training.optimizer import (
    BETAS,
    BYTES,
    SPLIT_MODES,
    SmallAdamW,
    compile_updates,
    decode,
    encode,
    make_optimizer,
)
from tests.helpers import make_model, random_pairs, sigmoid_loss, token_logps

SMALL = ["split", "in-backward"]
BATCH = collate(random_pairs(6, seed=3), "padded")


def small_llama(**config: Any) -> PreTrainedModel:
    """A llama with coded tensors and tensors too small for that."""
    return make_model(**{"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "scale": 2.0, **config})


def start(model: nn.Module, memory: str, decay: float = 0.1, betas: tuple[float, float] = BETAS) -> Any:
    low = split_master_weights(model) if memory in SPLIT_MODES else None
    return make_optimizer(model, decay, memory, low, betas)


def set_lr(optimizer: Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def dpo_loss(model: nn.Module, reference: Tensor) -> Tensor:
    logps = response_logps(token_logps(model, BATCH, torch.bfloat16), BATCH.lengths)
    return sigmoid_loss(logps, reference, 0.1, 0.0).mean()


def reference_of(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return response_logps(token_logps(model, BATCH, torch.bfloat16), BATCH.lengths)


def take_step(model: nn.Module, optimizer: Any, loss: Callable[[], Tensor], memory: str, lr: float = 1e-3) -> float:
    """One step of one micro-batch; returns its loss."""
    value = loss()
    if memory == "in-backward":
        set_lr(optimizer, lr)
        with optimizer.fused_backward():
            value.backward()
    else:
        value.backward()
        set_lr(optimizer, lr)
        optimizer.step()
        optimizer.zero_grad()
    return value.item()


def everything(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Copies of weights and state by name."""
    names = {p: name for name, p in model.named_parameters()}
    state = {
        f"{names[p]}.{key}": value.clone() for p, values in optimizer.state.items() for key, value in values.items()
    }
    return state | {name: p.detach().clone() for p, name in names.items()}


def masters(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    state = optimizer.state
    return {name: join(p.detach(), state[p]["low"].view_as(p)) for name, p in model.named_parameters()}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """``torch.equal`` alone would bring them to one type first."""
    assert {name: t.dtype for name, t in got.items()} == {name: t.dtype for name, t in expected.items()}
    assert [name for name in got if not torch.equal(got[name], expected[name])] == []


# ---- two halves -------------------------------------------------------------------------------------------------


def from_bits(bits: Tensor) -> Tensor:
    return bits.to(torch.int32).view(torch.float32)


def assert_split_is_exact(bits: Tensor) -> None:
    high, low = split(from_bits(bits))
    assert high.dtype == torch.bfloat16 and low.dtype == torch.int16
    assert torch.equal(join(high, low).view(torch.int32), bits.to(torch.int32))


@pytest.mark.parametrize("sign", [0, 1])
def test_splitting_is_exact_for_every_exponent_and_every_low_half(sign: int) -> None:
    """Zeros, denormals, ties, infinities and all between: 65,536 low halves of 8 high halves an exponent."""
    lows = torch.arange(2**16)
    for exponent in range(256):
        for mantissa in (0, 1, 2, 63, 64, 85, 126, 127):
            high = sign << 15 | exponent << 7 | mantissa
            assert_split_is_exact((high << 16 | lows) - (2**32 if sign else 0))


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=50))
def test_splitting_any_bits_is_exact(bits: list[int]) -> None:
    assert_split_is_exact(torch.tensor(bits))


@given(st.lists(st.floats(width=32, min_value=-(2.0**126), max_value=2.0**126), min_size=1, max_size=50))
def test_the_high_half_is_a_nearest_bfloat16(values: list[float]) -> None:
    master = torch.tensor(values)
    high = split(master)[0]
    assert torch.equal((high.double() - master.double()).abs(), (master.bfloat16().double() - master.double()).abs())


def test_ties_round_away_from_zero() -> None:
    one_and_a_half_steps = torch.tensor([1 + 2**-8, -1 - 2**-8])  # to even they would become 1
    assert split(one_and_a_half_steps)[0].tolist() == [1 + 2**-7, -1 - 2**-7]


def test_halving_a_model_and_back() -> None:
    model = small_llama(tie_word_embeddings=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    low = split_master_weights(model)
    assert low.keys() == before.keys() and "lm_head.weight" not in low
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in model.buffers()} == {torch.float32}
    optimizer = make_optimizer(model, 0.0, "split", low)
    assert_same(masters(model, optimizer), before)
    with fp32_weights(model, optimizer):
        assert_same(dict(model.named_parameters()), before)  # type: ignore[arg-type]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert_same(masters(model, optimizer), before)


def test_rejoining_leaves_a_whole_model_alone() -> None:
    model = small_llama()
    before = copy.deepcopy(model.state_dict())
    with fp32_weights(model, start(model, "full")):
        assert_same(model.state_dict(), before)
    assert_same(model.state_dict(), before)


# ---- moments ----------------------------------------------------------------------------------------------------


def coded(exp_avg: Tensor, exp_avg_sq: Tensor, dither: float = 0.5) -> tuple[Tensor, Tensor]:
    return decode(encode(exp_avg, exp_avg_sq, torch.tensor(dither).double()))


def test_codes_are_as_near_as_their_steps() -> None:
    """Roots of a block lie up to 8 decades apart."""
    torch.manual_seed(0)
    root = 10 ** (torch.rand(64, 256) * -8)
    exp_avg = torch.randn(64, 256) * root
    codes = encode(exp_avg, root.square(), torch.tensor(0.5).double())
    assert [codes[name].dtype for name in ("exp_avg", "exp_avg_sq")] == [torch.int8, torch.uint8]
    got, got_sq = decode(codes)
    octaves = (got_sq.sqrt() / root).log2().abs()
    assert octaves.max() <= 0.51 * codes["gap"].max() and codes["gap"].max() < 8 * 3.33 / 255
    assert bool(((got - exp_avg).abs() / got_sq.sqrt() <= 0.501 * codes["scale"]).all())


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e-8, 1.0, 1e30])
def test_a_block_of_equal_moments(value: float) -> None:
    got, got_sq = coded(torch.full((2, 256), value**0.5), torch.full((2, 256), value))
    assert torch.allclose(got, torch.full((2, 256), value**0.5), rtol=1e-2)
    assert torch.allclose(got_sq, torch.full((2, 256), max(value, 2.0**-76)), rtol=1e-4)


@given(st.lists(st.floats(width=32, min_value=-(2.0**126), max_value=2.0**126), min_size=4, max_size=4))
def test_any_finite_moments_stay_finite(values: list[float]) -> None:
    exp_avg = torch.tensor([values] * 64).view(1, 256)
    for got in coded(exp_avg, exp_avg.square()):
        assert bool(got.isfinite().all())


def test_a_second_moment_that_changes_slower_than_its_code_is_followed() -> None:
    """0.1% a step, while the codes are 10% apart; rounded to the nearest it would stay where it is."""
    golden, exp_avg_sq = (5**0.5 - 1) / 2, torch.ones(1, 256)
    exp_avg_sq[0, 0] = 1e-22  # these two make the steps wide
    rounded = exp_avg_sq = exp_avg_sq.clone()
    for step in range(1, 1001):
        exp_avg_sq, rounded = exp_avg_sq * 0.999, rounded * 0.999
        exp_avg_sq[0, 1] = rounded[0, 1] = 1.0
        exp_avg_sq = coded(torch.zeros(1, 256), exp_avg_sq, step * golden % 1)[1]
        rounded = coded(torch.zeros(1, 256), rounded)[1]
    assert exp_avg_sq[0, 2:].log().mean() == pytest.approx(-1, abs=0.2)
    assert rounded[0, 2:].log().mean() == pytest.approx(0, abs=0.2)


def test_no_update_is_out_of_bounds_where_gradients_of_a_block_differ_by_decades() -> None:
    """As in a tied embedding: tokens of the text beside tokens of the softmax's tail, 5 decades apart."""
    torch.manual_seed(0)
    size = 10 ** (torch.rand(16, 256) * -5)
    exact, ours = nn.Parameter(torch.zeros(16, 256)), nn.Parameter(torch.zeros(16, 256))
    expected, optimizer = AdamW([exact], lr=1.0, weight_decay=0.0), SmallAdamW([{"params": [ours]}], {})
    set_lr(optimizer, 1.0)
    optimizer.param_groups[0]["weight_decay"] = 0.0
    for _ in range(60):
        before, wanted = ours.detach().clone(), exact.detach().clone()
        exact.grad = ours.grad = torch.randn(16, 256) * size
        expected.step()
        optimizer.step()
        update, wanted = ours.detach() - before, exact.detach() - wanted
        assert (update - wanted).norm() < 0.08 * wanted.norm()
        assert (update - wanted).abs().max() < 0.2


# ---- AdamW ------------------------------------------------------------------------------------------------------


def quadratic(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> nn.ParameterList:
    torch.manual_seed(0)
    return nn.ParameterList([nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes])


@pytest.mark.parametrize("betas", [BETAS, (0.8, 0.95)])
@pytest.mark.parametrize("memory", SMALL)
def test_without_coding_it_is_torchs_adamw_to_the_bit(memory: str, betas: tuple[float, float]) -> None:
    """Tensors too small to be coded, or not of whole blocks; gradients that bfloat16 holds."""
    shapes = [(15, 17), (64,), (4095,), (4097,), ()]
    exact, ours = quadratic(shapes), quadratic(shapes)
    expected, optimizer = start(exact, "full", betas=betas), start(ours, memory, betas=betas)
    assert isinstance(expected, AdamW) and expected.defaults["betas"] == betas
    for step in range(1, 12):
        for p, q in zip(exact, ours, strict=True):
            gradient = torch.randn(p.shape).bfloat16()
            p.grad, q.grad = gradient.float(), gradient.to(q.dtype)
        set_lr(expected, 1e-2 / step)
        expected.step()
        if memory == "in-backward":
            set_lr(optimizer, 1e-2 / step)
            with optimizer.fused_backward():
                pass
            assert all(p.grad is None for p in ours)
        else:
            set_lr(optimizer, 1e-2 / step)
            optimizer.step()
    with fp32_weights(ours, optimizer):
        assert_same(ours.state_dict(), exact.state_dict())


def test_slices_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for size in (2**22, 1024):
        monkeypatch.setattr("dpo_cli.training.optimizer.SLICE", size)
        model = quadratic([(100, 256)])
        optimizer = start(model, "split")
        for step in range(3):
            model[0].grad = torch.randn(100, 256, generator=torch.Generator().manual_seed(step)).bfloat16()
            set_lr(optimizer, 1e-2)
            optimizer.step()
        results.append(everything(model, optimizer))
    assert_same(*results)


def test_weights_that_do_not_lie_row_by_row() -> None:
    model = nn.ParameterList([nn.Parameter(torch.randn(128, 64).T)])
    before = model[0].detach().clone()
    optimizer = start(model, "split")
    model[0].grad = torch.ones(128, 64).bfloat16().T
    set_lr(optimizer, 0.1)
    optimizer.step()
    with fp32_weights(model, optimizer):
        assert torch.allclose(model[0], before * (1 - 0.1 * 0.1) - 0.1, atol=1e-6)


@pytest.mark.parametrize("memory", SMALL)
def test_the_loss_goes_down_as_in_full(memory: str) -> None:
    curves = {}
    for each in ("full", memory):
        model = small_llama()
        optimizer = start(model, each)
        reference = reference_of(model)
        curves[each] = [take_step(model, optimizer, lambda: dpo_loss(model, reference), each) for _ in range(30)]  # noqa: B023
    full, got = torch.tensor(curves["full"]), torch.tensor(curves[memory])
    assert full[0] == pytest.approx(0.6931, abs=1e-3) and full[-1] < 0.35
    assert ((got - full) / full).abs().max() < 0.02
    assert abs(((got - full) / full).mean()) < 0.005


def test_at_a_small_rate_plain_bfloat16_stands_still_and_split_moves() -> None:
    """20 steps at 5e-7 on weights of 0.02 to 0.1: a step is far below half a bfloat16 step of nearly all."""
    torch.manual_seed(0)
    first = (torch.rand(128, 256) * 0.08 + 0.02) * (torch.randint(0, 2, (128, 256)) * 2 - 1)
    first = first.bfloat16().float()
    direction = torch.randn(128, 256)
    runs = {"float32": first.clone(), "bfloat16": first.bfloat16(), "split": first.clone()}
    models = {name: nn.ParameterList([nn.Parameter(weight)]) for name, weight in runs.items()}
    optimizers: dict[str, Any] = {name: AdamW(models[name].parameters(), weight_decay=0.0) for name in runs}
    optimizers["split"] = start(models["split"], "split", 0.0)
    for _ in range(20):
        gradient = (direction + torch.randn(128, 256)).bfloat16()
        for name, model in models.items():
            model[0].grad = gradient.to(model[0].dtype)
            set_lr(optimizers[name], 5e-7)
            optimizers[name].step()
    with fp32_weights(models["split"], optimizers["split"]):
        change = {name: model[0].detach().float() - first for name, model in models.items()}
    moved = {name: float((each != 0).float().mean()) for name, each in change.items()}
    assert moved["bfloat16"] < 0.05
    assert moved["float32"] > 0.99 and moved["split"] == pytest.approx(moved["float32"], abs=1e-3)
    off = change["split"] - change["float32"]
    assert off.norm() < 0.01 * change["float32"].norm()
    assert off.abs().max() < 5e-7


# ---- one compiled kernel ----------------------------------------------------------------------------------------


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Let a CPU take the path of CUDA, with a compiler that runs the graphs that it gets, which are in the list."""
    seen: list[Any] = []

    def compiler(graph: Any, inputs: Any) -> Any:
        seen.append(graph)
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr("dpo_cli.training.optimizer.KERNELS", {})
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=compiler))
    return seen


def take_gradients(optimizer: Any, gradients: list[Tensor], memory: str, lr: float) -> None:
    set_lr(optimizer, lr)
    for p, gradient in zip((p for group in optimizer.param_groups for p in group["params"]), gradients, strict=True):
        p.grad = gradient.to(p.dtype)
    with optimizer.fused_backward() if memory == "in-backward" else nullcontext():
        pass
    optimizer.step()


def check_state(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Codes may be those of a neighbour where rounding decides."""
    for name, tensor in got.items():
        if name.endswith((".exp_avg", ".exp_avg_sq")):
            codes = (tensor.int() - wanted[name].int()).abs()
            assert codes.max() <= 1 and codes.float().mean() < 1e-3, name
        elif name.endswith((".scale", ".least", ".gap", ".step")):
            torch.testing.assert_close(tensor, wanted[name], rtol=1e-4, atol=1e-5)


def check_kernel(memory: str, steps: int = 7, betas: tuple[float, float] = BETAS) -> None:
    """Each step begins at the same state as that of torch's AdamW; gradients of a block lie decades apart.

    In the last step of "in-backward" the second tensor's gradient is not finite.
    """
    kernels = dpo_cli.training.optimizer.KERNELS
    compiled = dict(kernels)
    exact, ours = (quadratic([(16, 256), (17, 256), (300, 256)]) for _ in range(2))
    for p in (*exact, *ours):
        p.data.mul_(1e-3)  # below an update
    expected, optimizer = start(exact, memory, betas=betas), start(ours, memory, betas=betas)
    for step in range(1, steps + 1):
        gradients = [torch.randn(p.shape) * 10 ** (torch.rand(p.shape) * -4) for p in exact]
        if broken := memory == "in-backward" and step == steps:
            gradients[1][3, 5] = torch.inf
        before = everything(ours, optimizer)
        kernels.clear()
        take_gradients(expected, gradients, memory, 1e-2 / step)
        kernels.update(compiled)
        take_gradients(optimizer, gradients, memory, 1e-2 / step)
        after = everything(ours, optimizer)
        check_state(after, everything(exact, expected))
        for weight, wanted in zip(masters(ours, optimizer).values(), masters(exact, expected).values(), strict=True):
            assert bool(((weight - wanted).abs() <= 2**-22 * wanted.abs() + 1e-8 / step).all()), step
        changed = {name[0] for name in before if not torch.equal(after[name], before[name])}
        assert changed == ({"0"} if broken else {"0", "1", "2"})
        for p, q in zip(ours, exact, strict=True):
            p.data.copy_(q)
        optimizer.load_state_dict(copy.deepcopy(expected.state_dict()))


@pytest.mark.parametrize("memory", SMALL)
def test_the_compiled_update_is_torchs_adamw_and_one_graph_for_all_sizes(memory: str, graphs: list[Any]) -> None:
    warnings: list[str] = []
    compile_updates(torch.device("cpu"), memory, warnings.append)
    assert len(graphs) == 1 and warnings == []
    check_kernel(memory)
    check_kernel(memory, betas=(0.8, 0.95))
    assert len(graphs) == 1


@pytest.mark.bench
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of inductor's own imports
@pytest.mark.parametrize("memory", SMALL)
@pytest.mark.skipif(not shutil.which("g++"), reason="inductor needs a C++ compiler")
def test_compiled_for_a_cpu_it_is_torchs_adamw(memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a C++ kernel of what is a Triton kernel on CUDA."""
    monkeypatch.setattr("dpo_cli.training.optimizer.KERNELS", {})
    torch._dynamo.reset()
    compile_updates(torch.device("cpu"), memory, pytest.fail)
    check_kernel(memory)


def test_without_a_compiler_it_runs_by_operators_and_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiler(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("Failed to find C compiler.\nPlease specify one")

    warnings: list[str] = []
    monkeypatch.setattr("dpo_cli.training.optimizer.KERNELS", {})
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=compiler))
    torch._dynamo.reset()
    compile_updates(torch.device("cpu"), "split", warnings.append)
    assert len(warnings) == 1 and "Failed to find C compiler." in warnings[0] and "specify" not in warnings[0]
    model = quadratic([(16, 256)])
    optimizer = start(model, "split")
    before = model[0].detach().clone()
    take_gradients(optimizer, [torch.ones(16, 256)], "split", 1e-2)
    assert not torch.equal(model[0], before)


@pytest.mark.parametrize("memory", SMALL)
def test_a_step_of_an_8b_model_is_few_operators(memory: str) -> None:
    """On fake tensors, as one operator a tensor; 143,798 and 176,713 before that."""
    count, tensors = operators(memory)
    assert tensors == 291 and count < 5000


# ---- memory -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", BYTES)
def test_bytes_a_parameter(memory: str) -> None:
    """Gradients are counted when most are there; the scales are 16 bytes a block of 256, the norms' moments float32."""
    model = small_llama(hidden_size=128, head_dim=32, vocab_size=2048, tie_word_embeddings=True)
    optimizer = start(model, memory)
    most = [0]

    def count(_: Tensor) -> None:
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        most[0] = max(most[0], sum(g.nbytes for g in grads) if memory != "in-backward" else len(grads))

    handles = [p.register_post_accumulate_grad_hook(count) for p in model.parameters()]
    reference = reference_of(model)
    take_step(model, optimizer, lambda: dpo_loss(model, reference), memory)
    for handle in handles:
        handle.remove()
    tensors = [value for state in optimizer.state.values() for value in state.values()] + list(model.parameters())
    assert not any(p.grad is not None for p in model.parameters())
    held = sum(t.nbytes for t in tensors) + (most[0] if memory != "in-backward" else 0)
    assert held / model.num_parameters() == pytest.approx(sum(BYTES[memory]), abs=0.1)
    assert memory != "in-backward" or most[0] == 1


# ---- resume -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", BYTES)
def test_resumed_is_uninterrupted_to_the_bit(memory: str, tmp_path: Path) -> None:
    model = small_llama()
    optimizer = start(model, memory)
    reference = reference_of(model)
    for step in range(6):
        if step in (0, 3):
            save_checkpoint(tmp_path, step, model, optimizer, 64, keep=9)
        take_step(model, optimizer, lambda: dpo_loss(model, reference), memory)
    for done in (0, 3):
        again = small_llama()
        resumed = start(again, memory)
        take_step(again, resumed, lambda: dpo_loss(again, reference), memory)  # noqa: B023  (must leave no trace)
        restore_checkpoint(tmp_path / f"step-{done:06d}", again, resumed)
        for _ in range(done, 6):
            take_step(again, resumed, lambda: dpo_loss(again, reference), memory)  # noqa: B023
        assert_same(everything(again, resumed), everything(model, optimizer))


def test_export_writes_the_exact_master(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = small_llama(tie_word_embeddings=True)
    optimizer = start(model, "split")
    reference = reference_of(model)
    for _ in range(3):
        take_step(model, optimizer, lambda: dpo_loss(model, reference), "split", lr=1e-5)
    expected = masters(model, optimizer)
    with fp32_weights(model, optimizer):
        export_model(tmp_path / "model", model, tokenizer, "card", source=ModelSource("start", "start", "start"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    assert loaded.config.dtype == torch.float32
    assert_same(dict(loaded.named_parameters()), expected)


# ---- in the backward pass ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_in_the_backward_pass_it_is_split_to_the_bit(tied: bool, checkpointing: bool) -> None:
    results = []
    for memory in ("split", "in-backward"):
        model = small_llama(tie_word_embeddings=tied).train()
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        optimizer = start(model, memory)
        reference = reference_of(model)
        for _ in range(4):
            take_step(model, optimizer, lambda: dpo_loss(model, reference), memory)  # noqa: B023
        results.append(everything(model, optimizer))
    assert_same(*results)


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_goes_backward_first_and_in_chunks(tied: bool) -> None:
    """Its gradient waits for the body's pass, or for the end of the block if the body has none for it."""
    ids = torch.arange(40)[None] % 384
    results = []
    for memory in ("split", "in-backward"):
        model: Any = small_llama(tie_word_embeddings=tied)
        optimizer = start(model, memory)
        for _ in range(3):
            hidden = model.model(input_ids=ids).last_hidden_state
            cut = hidden.detach().requires_grad_()
            for chunk in cut.split(16, dim=1):
                model.lm_head(chunk).float().square().mean().backward()
            head = model.lm_head.weight
            before = head.detach().clone()
            assert head.grad is not None and cut.grad is not None
            if memory == "split":
                hidden.backward(cut.grad)
                set_lr(optimizer, 1e-3)
                optimizer.step()
                optimizer.zero_grad()
            else:
                set_lr(optimizer, 1e-3)
                with optimizer.fused_backward():
                    hidden.backward(cut.grad)
                    assert tied == (head.grad is None)
            assert head.grad is None and not torch.equal(head, before)
        results.append(everything(model, optimizer))
    assert_same(*results)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_after_a_bad_gradient_nothing_is_changed(bad: float) -> None:
    """Layer 1's gradients come before layer 0's; one in the middle of it is bad."""
    model: Any = small_llama()
    optimizer = start(model, "in-backward")
    reference = reference_of(model)
    take_step(model, optimizer, lambda: dpo_loss(model, reference), "in-backward")
    assert optimizer.grad_norm.isfinite()
    before = everything(model, optimizer)
    broken = model.model.layers[1].self_attn.k_proj.weight
    handle = broken.register_hook(lambda grad: torch.where(torch.arange(grad.shape[1]) == 5, bad, grad))
    take_step(model, optimizer, lambda: dpo_loss(model, reference), "in-backward")
    handle.remove()
    assert not optimizer.grad_norm.isfinite()
    after = everything(model, optimizer)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert not {name for name in changed if "layers.0" in name or "embed" in name or "k_proj" in name}
    assert {"model.norm.weight.low", "model.layers.1.mlp.down_proj.weight.exp_avg"} <= changed
    assert all(p.grad is None for p in model.parameters())
    for tensor in after.values():
        assert bool(tensor.isfinite().all())


def test_the_gradients_norm_is_told() -> None:
    model = quadratic([(100, 256), (7,)])
    optimizer = start(model, "in-backward")
    for p in model:
        p.grad = torch.full(p.shape, 0.5, dtype=torch.bfloat16)
    set_lr(optimizer, 1e-3)
    with optimizer.fused_backward():
        pass
    assert float(optimizer.grad_norm) == pytest.approx(0.5 * (25600 + 7) ** 0.5)


def test_outside_of_the_block_a_backward_pass_updates_nothing() -> None:
    model = small_llama()
    optimizer = start(model, "in-backward")
    reference = reference_of(model)
    take_step(model, optimizer, lambda: dpo_loss(model, reference), "in-backward")
    before = everything(model, optimizer)
    dpo_loss(model, reference).backward()
    assert_same(everything(model, optimizer), before)
    set_lr(optimizer, 1e-3)
    with pytest.raises(ZeroDivisionError), optimizer.fused_backward():
        raise ZeroDivisionError
    dpo_loss(model, reference).backward()
    assert_same(everything(model, optimizer), before)


# ---- CUDA -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("memory", SMALL)
@pytest.mark.parametrize("compiled", [True, False])
def test_on_cuda_it_is_the_same_and_needs_no_room(memory: str, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tensor of 64 slices; what a step takes beside its state are a few slices in float32, and it never waits."""
    monkeypatch.setattr("dpo_cli.training.optimizer.KERNELS", {})
    if compiled:
        compile_updates(torch.device("cuda"), memory, pytest.fail)
    weights = {}
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = nn.ParameterList([nn.Parameter(torch.randn(2**20, 256) * 0.05)])
        low = split_master_weights(model) if memory in SPLIT_MODES else None
        optimizer: Any = make_optimizer(model.to(device), 0.1, memory, low)
        for step in range(2):
            gradient = torch.randn(256, generator=torch.Generator().manual_seed(step)).to(device, model[0].dtype)
            model[0].grad = gradient.expand(2**20, 256).clone()
            held = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            torch.cuda.set_sync_debug_mode("error" if device == "cuda" and step else "default")
            if memory == "in-backward":
                set_lr(optimizer, 1e-4)
                with optimizer.fused_backward():
                    pass
            else:
                set_lr(optimizer, 1e-4)
                optimizer.step()
            torch.cuda.set_sync_debug_mode("default")
            assert not step or torch.cuda.max_memory_allocated() - held < 2**28
        with fp32_weights(model, optimizer):
            weights[device] = model[0].detach().cpu()
    assert torch.allclose(weights["cpu"], weights["cuda"], rtol=0, atol=1e-5)
