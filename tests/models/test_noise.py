"""Differences of log-probs in bfloat16: what arithmetic explains passes, another model does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, PreTrainedTokenizerFast
from typer.testing import CliRunner

import dpo_cli.models.fingerprint
import dpo_cli.models.logprobs
from dpo_cli.cli.app import app
from dpo_cli.data.pairs import Pairs
from dpo_cli.models.attention import PREFIX_SHARED, prefix_shared_attention
from dpo_cli.models.fingerprint import fingerprint
from dpo_cli.models.layout import choose_layout
from dpo_cli.models.locate import ModelSource
from dpo_cli.models.logprobs import Float32Product, Head, ModelRunner, response_logps
from dpo_cli.models.noise import draw_probes, excess, measure_noise
from dpo_cli.training.prepare import ScoredModel
from dpo_cli.utils import devices, distributed
from dpo_cli.utils.devices import CPU, CUDA, OLD_CUDA, ROCM
from tests.helpers import SAMPLE, make_model, random_pairs, stand_in
from tests.helpers.caches import plant

CPU_DEVICE = torch.device("cpu")
WIDE = {"hidden_size": 64, "num_hidden_layers": 4, "head_dim": 16, "scale": 12.0}  # of much noise in bfloat16


@contextmanager
def kernel(parts: Callable[[int], int]) -> Iterator[None]:
    """Let linear layers in bfloat16 add up so many partial sums, by the number of rows, each rounded to bfloat16.

    That makes as many differences in a tiny model as another order of float32 sums makes in a large one.
    """
    plain = nn.Linear.forward

    def forward(self: nn.Linear, inputs: Tensor) -> Tensor:
        if not torch.is_autocast_enabled("cpu"):
            return plain(self, inputs)
        with torch.autocast("cpu", enabled=False):
            x, weight = (each.bfloat16().float() for each in (inputs, self.weight))
            cut = [each.tensor_split(parts(x[..., 0].numel()), dim=-1) for each in (x, weight)]
            return torch.stack([(a @ b.T).bfloat16() for a, b in zip(*cut, strict=True)]).float().sum(0).bfloat16()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Linear, "forward", forward)
        yield


def score(runner: ModelRunner, pairs: Pairs, parts: int) -> Tensor:
    """Log-probs of responses (2P,) under a kernel."""
    batch = runner.batch(pairs)
    with kernel(lambda _: parts), torch.no_grad():
        return response_logps(runner.token_logps(batch), batch.lengths)


@pytest.mark.parametrize("mode", ["full", "split"])
def test_other_kernels_pass_and_another_head_does_not(mode: str) -> None:
    """The kernels differ by more than the 0.1 nats per root of tokens that are right for no model."""
    model, pairs = make_model(**WIDE), Pairs(random_pairs(32, longest=40))
    model.set_attn_implementation(PREFIX_SHARED)
    runner = ModelRunner(model, "shared", torch.bfloat16, 4096, CPU_DEVICE)
    runner.probes = draw_probes(runner, pairs)
    measure_noise(runner)
    if mode == "split":
        before = runner.noise
        ScoredModel(ModelSource("", "", ""), runner, "sdpa", "").split_weights("split", trains=True)
        assert runner.noise > before  # whose residual stream was float32
    tokens = torch.from_numpy(pairs.loss_lengths).T.reshape(-1)
    scores = [score(runner, pairs, parts) for parts in (1, 2, 3, 4)]
    differences = [one - other for one in scores for other in scores if one is not other]
    assert min(float((each.abs() / tokens.sqrt()).max()) for each in differences) > 0.1
    for places in (range(64), *(range(start, start + 4) for start in range(0, 64, 4))):
        assert max(excess(each[places], tokens[places], runner.noise) for each in differences) < 0.9
    head = model.get_output_embeddings().weight
    head.data = (1.03 * head.data.float()).to(head.dtype)
    assert min(excess(score(runner, pairs, 2) - each, tokens, runner.noise) for each in scores) > 1


def test_in_float32_nothing_is_measured_and_the_largest_difference_counts() -> None:
    tokens = torch.tensor([4, 100, 9])
    for differences, wanted in (([1e-3, 8e-3, 2e-3], 0.8), ([0, 0.02, 0], 2.0), ([9e-4 * 2, 9e-3, 9e-4 * 3], 0.9)):
        assert excess(torch.tensor(differences), tokens, 0.0) == pytest.approx(wanted)
    assert excess(torch.tensor([0, float("nan"), 0]), tokens, 1.0) == float("inf")
    assert choose_layout(make_model(), random_pairs(3), 1024, CPU_DEVICE, torch.float32)[0].noise == 0


def test_the_limits_by_hand() -> None:
    """Of 16 responses of 25 tokens with a noise of 0.1: 5 nats for one, 1.3125 in the mean square, 12 for the sum."""
    tokens, one, signs = torch.full((16,), 25), torch.zeros(16), torch.tensor([1.0, -1.0]).repeat(8)
    one[3] = 4.0
    assert excess(one, tokens, 0.1) == pytest.approx(4 / 5)
    assert excess(2 * signs, tokens, 0.1) == pytest.approx(2 / 1.3125)
    assert excess(torch.full((16,), 1.2), tokens, 0.1) == pytest.approx(16 * 1.2 / 12)


# ---- a run ------------------------------------------------------------------------------------------------------


def test_a_run_passes_over_another_kernel_and_is_refused_over_another_model(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """The planted shift of all responses is too small to show in one of them."""
    make_model(**WIDE).save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    rows = (SAMPLE / "train-strings.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(rows[:16]))

    def dpo(command: str, parts: int, *more: object) -> Any:
        common = ["--model", tmp_path / "start", "--data", tmp_path / "rows.jsonl", "--cache-dir", tmp_path / "cache"]
        words = [command, *common, "--dtype", "bfloat16", "--memory", "split", *more]
        with kernel(lambda _: parts):
            return CliRunner().invoke(app, [*map(str, words)])

    filled = dpo("precompute-ref", 1, "--json")
    assert filled.exit_code == 0, filled.output
    train = ("--output", tmp_path / "run", "--batch-size", 16, "--max-steps", 1, "--export-dtype", "bfloat16")
    assert (verified := dpo("precompute-ref", 4, "--verify", 16)).exit_code == 0, verified.output
    trained = dpo("train", 4, *train)
    assert trained.exit_code == 0 and "are equal on its 16 pairs" in trained.stderr, trained.output
    plant(tmp_path / "cache", lambda logps: logps + 1.2)
    for result in (dpo("precompute-ref", 4, "--verify", 16), dpo("train", 4, *train[2:], "--output", tmp_path / "2")):
        message = " ".join(result.stderr.rpartition("error: ")[2].split())
        assert result.exit_code == 1 and message.endswith("If that does not help, compute with --dtype float32")


# ---- the layout -------------------------------------------------------------------------------------------------


def test_a_mixture_whose_routes_flip_keeps_its_layout() -> None:
    """Its routers are close to ties: in bfloat16 each layout takes other routes, 0.2 nats per token apart and more."""
    model = make_model("mixtral", scale=12.0, num_hidden_layers=4, num_local_experts=4, num_experts_per_tok=2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate.weight"):
                parameter.copy_(parameter.mean(0) + 1e-3 * (parameter - parameter.mean(0)))
    with kernel(lambda rows: 1 + rows % 3):
        runner, description = choose_layout(model, random_pairs(12), 1024, CPU_DEVICE, torch.bfloat16)
    assert runner.layout == "shared" and runner.noise > 0.3, description


def shared_attention(monkeypatch: pytest.MonkeyPatch, changed: Callable[[Tensor], Tensor]) -> str:
    """The layout that a model gets, and why, where the output of our attention is changed."""

    def attention(*inputs: Any, **more: Any) -> tuple[Tensor, None]:
        return changed(prefix_shared_attention(*inputs, **more)[0]), None

    monkeypatch.setitem(AttentionInterface._global_mapping, PREFIX_SHARED, attention)
    runner, description = choose_layout(make_model(), random_pairs(6), 1024, CPU_DEVICE, torch.bfloat16)
    return f"{runner.layout}: {description}"


def test_a_layout_that_is_wrong_in_bfloat16_alone_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    found = shared_attention(monkeypatch, lambda out: out * (1.1 if out.dtype == torch.bfloat16 else 1))
    assert found.startswith("packed: ") and "(shared: off by " in found


def test_a_layout_without_a_backward_pass_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class ForwardOnly(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, values: Tensor) -> Tensor:
            return values.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            raise RuntimeError("FlashAttention backward for head dim > 192 requires A100")

    stand_in(monkeypatch, flash=True)
    monkeypatch.setattr(dpo_cli.models.attention, "takes_flash", lambda *_: False)  # which a CPU_DEVICE does not have
    found = shared_attention(monkeypatch, ForwardOnly.apply)
    assert found.startswith("packed: ") and "RuntimeError: FlashAttention backward for head dim > 192" in found


# ---- on CUDA ----------------------------------------------------------------------------------------------------


def product(one: Tensor, other: Tensor, out_dtype: torch.dtype) -> Tensor:
    """``torch.mm`` of bfloat16 matrices with a float32 result, which CPUs do not have."""
    assert one.dtype == other.dtype == torch.bfloat16 and out_dtype == torch.float32
    return one.float() @ other.float()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(
    "config", [{}, {"logit_scale": 0.5, "final_logit_softcapping": 3.0}, {"logits_scaling": 4.0}], ids=str
)
def test_logits_are_not_rounded(
    bias: bool, trained: bool, config: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and gradients are those of float32 products of what was rounded before."""
    monkeypatch.setattr(torch, "mm", product)
    torch.manual_seed(0)
    module = nn.Linear(16, 40, bias=bias).requires_grad_(trained)
    hidden, weights = torch.randn(7, 16).bfloat16().requires_grad_(), torch.randn(7, 40)
    logits = Head(module, SimpleNamespace(**config), torch.bfloat16, CUDA).logits(hidden)
    (logits * weights).sum().backward()
    found = [hidden.grad, module.weight.grad, module.bias.grad if bias else None]
    exact = hidden.detach().float().requires_grad_()
    own = [exact, module.weight.detach().bfloat16().float().requires_grad_(), module.bias]
    wanted = nn.functional.linear(*own) * config.get("logit_scale", 1) / config.get("logits_scaling", 1)
    if cap := config.get("final_logit_softcapping"):
        wanted = (wanted / cap).tanh() * cap
    torch.testing.assert_close(logits, wanted, rtol=1e-5, atol=1e-6)
    assert not torch.equal(logits, logits.bfloat16().float())
    (wanted * weights).sum().backward()
    for got, leaf in zip(found, own, strict=True):
        if leaf is not None and (trained or leaf is exact):
            assert (got.float() - leaf.grad).norm() < 1e-2 * leaf.grad.norm()  # gradients in bfloat16
        else:
            assert got is None


def test_a_head_within_an_adapter_is_run_as_it_is() -> None:

    class Adapted(nn.Linear):
        def forward(self, hidden: Tensor) -> Tensor:
            return 2 * super().forward(hidden)

    module, hidden = Adapted(16, 40), torch.randn(7, 16)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = module(hidden).float()
    assert torch.equal(Head(module, SimpleNamespace(), torch.bfloat16, CUDA).logits(hidden), wanted)


def test_on_a_cuda_device_no_logits_in_bfloat16_are_made() -> None:
    """Shapes and dtypes of a CUDA device that is not there, forward; of the backward pass without a device."""
    made: list[torch.dtype] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            made.extend([result.dtype] if isinstance(result, Tensor) and result.shape == (7, 40) else [])
            return result

    with FakeTensorMode(), Recorder(), torch.no_grad():
        module = nn.Linear(16, 40, bias=False, device="meta")
        module.weight = nn.Parameter(torch.empty(40, 16, device="cuda"), requires_grad=False)
        hidden = torch.empty(7, 16, dtype=torch.bfloat16, device="cuda")
        logits = Head(module, SimpleNamespace(), torch.bfloat16, CUDA).logits(hidden)
    assert logits.dtype == torch.float32 and logits.device.type == "cuda" and set(made) == {torch.float32}
    leaves = [torch.empty(n, 16, dtype=torch.bfloat16, device="meta", requires_grad=True) for n in (7, 40)]
    Float32Product.apply(*leaves).sum().backward()
    assert [leaf.grad.shape for leaf in leaves if leaf.grad is not None] == [(7, 16), (40, 16)]


def test_each_kind_of_device_has_log_probs_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kinds differ in attention and in the precision of logits."""
    model, found = make_model(), set[str]()
    for kind in (CPU, CUDA, OLD_CUDA, ROCM):
        stand_in(monkeypatch, kind)
        found.add(fingerprint(model, "", "shared", torch.bfloat16))
    assert len(found) == 4


def test_sums_of_bfloat16_products_are_float32_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    matmul = torch.backends.cuda.matmul
    names = ("allow_bf16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction_split_k")
    before = [getattr(matmul, name) for name in names]
    monkeypatch.setattr(devices, "why_unusable", lambda kind: "")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    try:
        with distributed.started(device_name="cuda"):
            assert [getattr(matmul, name) for name in names] == [False, False]
    finally:
        matmul.allow_bf16_reduced_precision_reduction = tuple(before)
