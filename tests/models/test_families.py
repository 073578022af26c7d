"""Rows that share a forward give the numbers of single sequences, for each family of models: values and gradients.

Weights are scaled up, so that a token that sees too much or too little shows by far more than the tolerance.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import dpo_cli.models.attention
import dpo_cli.models.layout
import dpo_cli.models.logprobs
from dpo_cli.data.batching import MicroBatch, collate, padded
from dpo_cli.data.pairs import Pair
from dpo_cli.data.schedule import Layout
from dpo_cli.losses.objective import Objective
from dpo_cli.models.attention import PREFIX_SHARED, attention, prefix_shared_attention
from dpo_cli.models.layout import choose_layout
from dpo_cli.models.logprobs import ModelRunner, response_logps
from dpo_cli.utils.errors import DpoError, UsageError
from tests.helpers import sigmoid_loss, stand_in, token_logps
from tests.helpers.families import FAMILIES, SPECIAL, WINDOW, dense_attention, make, small

ONE_DOCUMENT = {"opt", "gpt_oss"}  # their own attention takes a packed row for one
TOLD = {"shared": "each prompt computed once", "packed": "packed rows, the prompt", "padded": "padded batches"}
LENGTHS = [(13, 9, 5), (1, 4, 11), (20, 1, 8)]  # prompt, chosen, rejected: also a prompt and a response of one token
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    rng = np.random.default_rng(0)
    return [
        Pair(f"row {i}", *(rng.integers(3, 64, n).astype(np.int32) for n in lengths))
        for i, lengths in enumerate(LENGTHS)
    ]


def alone(pairs: list[Pair]) -> list[MicroBatch]:
    """A forward a response: chosen, rejected, …"""
    return [padded([(pair.prompt, response)]) for pair in pairs for response in (pair.chosen, pair.rejected)]


Scored = tuple[Tensor, dict[str, Tensor]]


def score(model: PreTrainedModel, pairs: list[Pair], layout: Layout | None) -> Scored:
    """Summed log-probs (2P,) in one forward of a layout (None: a forward a response), and the gradient of the loss.

    The reference is fixed and differs from the policy, so that each pair has a weight of its own.
    """
    model.zero_grad()
    whole = collate(pairs, layout or "packed")
    ref_logps = torch.linspace(-40, -20, 2 * len(pairs)).view(2, -1)  # chosen, rejected
    ref_logps = ref_logps.reshape(-1)
    if layout:
        whole = dataclasses.replace(whole, weighted_ref_logps=ref_logps)
        with attention(model, PREFIX_SHARED if layout == "shared" else None):
            hidden = ModelRunner(model, layout, torch.float32, 256, CPU).body(whole)
            for piece in hidden.head_pieces():
                Objective(beta=0.02)(piece).sum().backward()
            hidden.backward()
        logps = torch.cat(hidden.full_logps, dim=1).flatten()
    else:
        logps = response_logps(torch.cat([token_logps(model, b, torch.float32) for b in alone(pairs)]), whole.lengths)
        sigmoid_loss(logps, ref_logps, beta=0.02).sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return logps.detach(), gradients


def check_equal(got: Scored, wanted: Scored) -> None:
    torch.testing.assert_close(got[0], wanted[0], atol=2e-5, rtol=0)
    assert got[1].keys() == wanted[1].keys()
    whole = torch.cat([g.flatten() for g in wanted[1].values()]).norm()
    for name, gradient in wanted[1].items():
        # A key's bias has no gradient but rounding, hence the share of the whole.
        allowed = 2e-5 * gradient.norm() + 1e-7 * whole
        assert (got[1][name] - gradient).norm() < allowed, name


def difference(model: PreTrainedModel, pairs: list[Pair], name: str | None, wanted: Tensor) -> float:
    """How far the log-probs of a shared row are off, in nats, with the attention of this name."""
    batch = collate(pairs, "shared")
    with attention(model, name), torch.no_grad():
        return float((response_logps(token_logps(model, batch, torch.float32), batch.lengths) - wanted).abs().max())


@pytest.mark.parametrize("family", FAMILIES)
def test_equal_to_single_sequences(family: str, pairs: list[Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients, the head run over one or two pairs at a time."""
    stand_in(monkeypatch, logits_bytes=4 * 64 * sum(LENGTHS[0][1:] + LENGTHS[1][1:]))
    model = make(family)
    wanted = score(model, pairs, None)
    assert difference(model, pairs, None, wanted[0]) > 0.1  # nats: stock attention is wrong here, and it shows
    layouts: list[Layout] = ["shared", "padded", "alone"]
    for layout in layouts if family in ONE_DOCUMENT else [*layouts, "packed"]:
        check_equal(score(model, pairs, layout), wanted)
    runner, told = choose_layout(model, pairs, 256, CPU, torch.float32)
    layout, apart = runner.layout, runner.chunked_lm_head
    assert apart
    assert layout == "shared" and told.startswith("packed rows, each prompt computed once for both responses; equal")
    assert model.config._attn_implementation != PREFIX_SHARED  # only tried


@pytest.mark.parametrize("family", SPECIAL)
def test_special_attention_gets_an_exact_layout(family: str, pairs: list[Pair]) -> None:
    model = make(family)
    _, expected, reasons = SPECIAL[family]
    runner, told = choose_layout(model, pairs, 256, CPU, torch.float32)
    layout, apart = runner.layout, runner.chunked_lm_head
    assert apart
    assert layout == expected
    assert TOLD[layout] in told
    for reason in reasons:
        assert reason in told
    check_equal(score(model, pairs, layout), score(model, pairs, None))


# ---- the attention itself -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 1, WINDOW])
@pytest.mark.parametrize("groups", [1, 2])
def test_attention_by_its_definition(groups: int, window: int | None, pairs: list[Pair]) -> None:
    segments = collate(pairs, "shared").segments
    assert segments is not None
    torch.manual_seed(0)
    tokens = sum(map(sum, LENGTHS))
    query = torch.randn(1, 4, tokens, 8)
    key, value = torch.randn(2, 1, 4 // groups, tokens, 8)
    got, _ = prefix_shared_attention(
        torch.nn.Module(), query, key, value, None, sliding_window=window, segments=segments
    )
    torch.testing.assert_close(got, dense_attention(query, key, value, LENGTHS, window), atol=1e-5, rtol=0)


@pytest.mark.parametrize("foreign", ["softcap", "position_bias"])
def test_attention_refuses_what_it_does_not_compute(foreign: str, pairs: list[Pair]) -> None:
    x = torch.ones(1, 1, sum(map(sum, LENGTHS)), 8)
    segments = collate(pairs, "shared").segments
    with pytest.raises(ValueError, match=foreign):
        prefix_shared_attention(torch.nn.Module(), x, x, x, None, segments=segments, **{foreign: torch.ones(1)})
    with pytest.raises(ValueError, match="segments"):
        prefix_shared_attention(torch.nn.Module(), x, x, x, None)


# ---- a wrong mask is seen -----------------------------------------------------------------------------------------

_causal = dpo_cli.models.attention._causal


def top_left(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    """Causality aligned at the first query and key: the rejected response would not see all of its prompt."""
    q = query.shape[2]
    return _causal(query, key[:, :, :q], value[:, :, :q], *rest)


def no_window(*arguments: Any) -> Tensor:
    return _causal(*arguments[:-1], None)


def prompt_unseen(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    q = query.shape[2]
    return _causal(query, key[:, :, -q:], value[:, :, -q:], *rest)


class ChosenSeen:
    """The rejected response, whose keys are more than its queries, sees all that came before it."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
        q = query.shape[2]
        if key.shape[2] == q:
            self.before = key, value
        else:
            own = key[:, :, -q:], value[:, :, -q:]
            key, value = (torch.cat(parts, dim=2) for parts in zip(self.before, own, strict=True))
        return _causal(query, key, value, *rest)


FAULTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    # Stock attention takes the restarting positions for a new document that cannot see the prompt.
    "stock attention": lambda patch: patch.setattr(dpo_cli.models.layout, "PREFIX_SHARED", None),
    "chosen seen": lambda patch: patch.setattr(dpo_cli.models.attention, "_causal", ChosenSeen()),
    "prompt unseen": lambda patch: patch.setattr(dpo_cli.models.attention, "_causal", prompt_unseen),
    "top left": lambda patch: patch.setattr(dpo_cli.models.attention, "_causal", top_left),
    "no window": lambda patch: patch.setattr(dpo_cli.models.attention, "_causal", no_window),
}
FAULTY = [
    (family, fault) for family in ("llama", "mistral") for fault in FAULTS if (family, fault) != ("llama", "no window")
]


@pytest.mark.parametrize(("family", "fault"), FAULTY)
def test_a_wrong_mask_is_seen(family: str, fault: str, pairs: list[Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(family)
    wanted, _ = score(model, pairs, None)
    FAULTS[fault](monkeypatch)
    assert difference(model, pairs, dpo_cli.models.layout.PREFIX_SHARED, wanted) > 0.1  # nats: far above the noise
    runner, told = choose_layout(model, pairs, 256, CPU, torch.float32)
    layout = runner.layout
    assert layout == "packed"
    assert "packed rows, the prompt computed once for each response; equal" in told and "shared: off by" in told


def test_falls_back_to_padded_batches(pairs: list[Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    """OPT takes a packed row for one document."""
    monkeypatch.setattr(dpo_cli.models.layout, "PREFIX_SHARED", None)
    runner, told = choose_layout(make("opt"), pairs, 256, CPU, torch.float32)
    layout = runner.layout
    assert layout == "padded"
    assert "shared: off by" in told and "packed: off by" in told


def test_refuses_a_model_whose_rows_mix(pairs: list[Pair]) -> None:
    """A head that reads all the tokens it is given, of whatever row, has no log-prob of one response."""
    model = make("llama")
    model.get_output_embeddings().register_forward_hook(lambda module, inputs, out: out - out.cumsum(-2) / 8)
    with pytest.raises(DpoError, match=r"shared: off by .*; packed: off by .*; padded: off by .*; alone: off by"):
        choose_layout(model, pairs, 256, CPU, torch.float32)


LONG_PROMPTS = [(40, 9, 5), (45, 7, 11)]
FADING = {
    "mamba": {"state_size": 8, "scale": 3.0},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"], "scale": 3.0},
}


@pytest.mark.parametrize("family", FADING)
def test_what_a_state_keeps_of_the_sequence_before_is_seen_behind_long_prompts(family: str) -> None:
    """It fades over a prompt, and would pass for noise behind one."""
    rng = np.random.default_rng(0)
    pairs = [
        Pair(f"row {i}", *(rng.integers(3, 64, n).astype(np.int32) for n in lengths))
        for i, lengths in enumerate(LONG_PROMPTS)
    ]
    model = small(family, **FADING[family])
    runner, told = choose_layout(model, pairs, 512, CPU, torch.float32)
    layout = runner.layout
    assert layout == "padded" and "packed: off by" in told
    check_equal(score(model, pairs, layout), score(model, pairs, None))


@pytest.mark.parametrize("training", [False, True])
def test_refuses_a_model_whose_own_forward_fails(pairs: list[Pair], training: bool) -> None:
    def broken(module: Any, inputs: Any) -> None:
        if module.training is training:
            raise AssertionError("split sizes do not sum\nto 4")

    model = make("llama")
    model.model.layers[0].register_forward_pre_hook(broken)
    with pytest.raises(UsageError, match=r"the model's own forward fails .*: AssertionError: split sizes do not sum$"):
        choose_layout(model, pairs, 256, CPU, torch.float32)


def test_what_a_layout_fails_by_is_told(pairs: list[Pair]) -> None:
    def broken(module: Any, inputs: Any, given: Any) -> None:
        if given.get("segments") is not None:
            raise TypeError("'NoneType' object is not subscriptable")

    model = make("llama")
    model.model.layers[0].register_forward_pre_hook(broken, with_kwargs=True)
    runner, told = choose_layout(model, pairs, 256, CPU, torch.float32)
    layout = runner.layout
    assert layout == "packed" and told.endswith(
        "(shared: not supported by the code of this model: TypeError: 'NoneType' object is not subscriptable)"
    )


def test_refuses_a_model_that_reads_ahead(pairs: list[Pair]) -> None:
    with pytest.raises(UsageError, match="no causal language model: a token's log-prob changes by"):
        choose_layout(small("bert"), pairs, 256, CPU, torch.float32)


def test_refuses_a_model_that_draws_its_experts_in_training(pairs: list[Pair]) -> None:
    with pytest.raises(UsageError, match="in training the model's log-probs differ"):
        choose_layout(small("phimoe", num_local_experts=8, scale=3.0), pairs, 256, CPU, torch.float32)


def test_probes_a_pair_that_fits(pairs: list[Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest pair within max_tokens and the shortest, so that a window is seen and memory lasts.

    The last is the shortest again, with one token of its prompt. A pair beyond max_tokens has a forward of its own.
    """
    tried: list[Any] = []

    def spy(runner: ModelRunner, probes: list[Pair]) -> MicroBatch:
        tried.append(probes)
        return collate(probes, runner.layout)

    monkeypatch.setattr(ModelRunner, "batch", spy)
    monkeypatch.setattr(dpo_cli.models.layout, "_run_backward", lambda *_: None)
    for max_tokens, groups in ((256, [[2, 1, 1]]), (47, [[0, 1, 1], [2]]), (16, [[1, 1], [2]])):
        tried.clear()
        choose_layout(make("llama"), pairs, max_tokens, CPU, torch.float32)
        assert [[pair.where for pair in probes] for probes in tried] == [[f"row {i}" for i in g] for g in groups]
        assert len(tried[0][-1].prompt) == 1
