"""On a CUDA device: the flash path computes what the path by segments does, and training runs on it.

Tolerances are bfloat16's: 8 bits of mantissa, so an attention output of size 1 is off by up to about 0.01.
"""

import json
import math
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import dpo_cli.models.attention
from dpo_cli.config.options import EvalOptions, TrainOptions
from dpo_cli.data.batching import Segments, collate
from dpo_cli.data.pairs import Pair, Pairs
from dpo_cli.evaluation.evaluate import evaluate
from dpo_cli.evaluation.generation import generate
from dpo_cli.evaluation.kl import compare, record
from dpo_cli.hub.export import merge
from dpo_cli.models.attention import PREFIX_SHARED, attention, prefix_shared_attention
from dpo_cli.models.layout import choose_layout
from dpo_cli.models.loading import compute_dtype
from dpo_cli.models.logprobs import ModelRunner, response_logps
from dpo_cli.training.loop import train
from dpo_cli.training.step import Trainer
from dpo_cli.utils import devices
from dpo_cli.utils.console import Reporter
from dpo_cli.utils.devices import device_kind
from tests.helpers import SAMPLE, cli_environment, make_model, make_tokenizer, token_logps
from tests.helpers.families import dense_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
DEVICE = torch.device("cuda")
# Prompt, chosen, rejected. A rejected response has fewer queries than keys by its prompt's length: an alignment of
# causality at the first query and key would hide most of that prompt. Longer than a kernel's tile of 128, too.
LENGTHS = [(200, 90, 150), (1, 30, 1), (40, 1, 300), (7, 5, 6)]
WINDOW = 16  # shorter than most prompts


def make_pairs() -> list[Pair]:
    rng = np.random.default_rng(0)
    return [
        Pair(f"row {i}", *(rng.integers(3, 384, n).astype(np.int32) for n in lengths))
        for i, lengths in enumerate(LENGTHS)
    ]


def make_inputs(heads: int, groups: int, size: int) -> tuple[Tensor, Tensor, Tensor, Segments]:
    """Query, key and value whose numbers bfloat16 holds exactly, as leaves in float32, and their segments."""
    tokens = sum(map(sum, LENGTHS))
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, heads, tokens, size)] + [(1, heads // groups, tokens, size)] * 2
    made = [torch.randn(shape, generator=generator).bfloat16().float().to(DEVICE).requires_grad_() for shape in shapes]
    segments = collate(make_pairs(), "shared").to(DEVICE).segments
    assert segments is not None
    query, key, value = made
    return query, key, value, segments


def run(inputs: tuple[Tensor, Tensor, Tensor, Segments], window: int | None, dtype: torch.dtype) -> list[Tensor]:
    """Output (1, T, A, D) and the gradients of a fixed weighting of it, all as float32."""
    *made, segments = inputs
    query, key, value = (x.detach().to(dtype).requires_grad_() for x in made)
    module = torch.nn.Module()
    out, _ = prefix_shared_attention(
        module, query, key, value, None, sliding_window=window, segments=segments, flash=True
    )
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    (out.float() * weights).sum().backward()
    return [x.float() for x in (out.detach(), query.grad, key.grad, value.grad) if x is not None]


@pytest.fixture
def flash_calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.dtype]:
    """The query's dtype of each call of the flash path."""
    calls: list[torch.dtype] = []
    flash = dpo_cli.models.attention._varlen

    def spy(query: Tensor, *rest: Any) -> Tensor:
        calls.append(query.dtype)
        return flash(query, *rest)

    monkeypatch.setattr(dpo_cli.models.attention, "_varlen", spy)
    return calls


@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize(("heads", "groups", "size"), [(4, 1, 64), (4, 2, 64), (2, 2, 128), (4, 2, 8)])
def test_flash_equals_segments(
    heads: int, groups: int, size: int, window: int | None, flash_calls: list[torch.dtype]
) -> None:
    """Values and gradients, where rejected responses have fewer queries than keys."""
    inputs = make_inputs(heads, groups, size)
    wanted = run(inputs, window, torch.float32)
    assert flash_calls == []
    got = run(inputs, window, torch.bfloat16)
    assert flash_calls == [torch.bfloat16]
    torch.testing.assert_close(got[0], wanted[0], atol=0.03, rtol=0.03)
    for a, b in zip(got, wanted, strict=True):
        assert (a - b).norm() < 0.02 * b.norm()
    truth = dense_attention(*(x.detach() for x in inputs[:3]), LENGTHS, window)
    torch.testing.assert_close(wanted[0], truth, atol=1e-4, rtol=0)


@pytest.mark.parametrize("window", [None, WINDOW])
def test_causality_is_aligned_at_the_last_query_and_key(window: int | None) -> None:
    """One segment of 2 queries and 40 keys: the first query sees 39 keys, not 1."""
    from torch.nn.attention.varlen import varlen_attn

    q, k = 2, 40
    value = torch.arange(k, dtype=torch.float32)[:, None, None].expand(k, 1, 64)
    query, key = torch.zeros(q, 1, 64), torch.zeros(k, 1, 64)  # so that all visible keys weigh the same
    query, key, value = (x.to(DEVICE, torch.bfloat16).contiguous() for x in (query, key, value))
    bounds = [torch.tensor([0, n], dtype=torch.int32, device=DEVICE) for n in (q, k)]
    out = varlen_attn(query, key, value, *bounds, q, k, window_size=(-1 if window is None else window - 1, 0))
    assert isinstance(out, Tensor)
    means = [float(np.mean(range(0 if window is None else last + 1 - window, last + 1))) for last in (38, 39)]
    assert out[:, 0, 0].float().tolist() == pytest.approx(means, abs=0.1)  # aligned at the first: 0 and 0.5


@pytest.mark.parametrize("window", [None, WINDOW])
def test_a_wrong_alignment_would_show(window: int | None) -> None:
    """The tolerances above are far below what an alignment at the first query and key would change."""
    *made, segments = make_inputs(4, 2, 64)
    query, key, value = (x.detach() for x in made)
    out = dense_attention(query, key, value, LENGTHS, window)
    prompt, chosen, rejected = LENGTHS[0]
    start = prompt + chosen
    own = torch.cat([key[:, :, :prompt], key[:, :, start : start + rejected]], 2)[:, :, :rejected]
    values = torch.cat([value[:, :, :prompt], value[:, :, start : start + rejected]], 2)[:, :, :rejected]
    wrong = dense_attention(query[:, :, start : start + rejected], own, values, [(rejected, 0, 0)], window)
    right = out[:, start : start + rejected]
    assert segments.query_bounds.tolist()[1:3] == [start, start + rejected]
    assert (wrong - right).norm() > 0.5 * right.norm()


@pytest.mark.parametrize(("family", "config"), [("llama", {}), ("gpt2", {}), ("mistral", {"sliding_window": WINDOW})])
def test_log_probs_under_bfloat16(family: str, config: dict[str, Any], flash_calls: list[torch.dtype]) -> None:
    """Every layer takes the flash path, and the numbers are float32's up to bfloat16's noise."""
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512} if family == "gpt2" else {}
    model, pairs = make_model(family, **config, **sizes).to(DEVICE), make_pairs()
    batch = collate(pairs, "shared").to(DEVICE)
    with attention(model, PREFIX_SHARED), torch.no_grad():
        exact = token_logps(model, batch, torch.float32)
        assert flash_calls == []
        coarse = token_logps(model, batch, torch.bfloat16)
    assert flash_calls == [torch.bfloat16] * model.config.num_hidden_layers
    assert coarse.dtype == response_logps(coarse, batch.lengths).dtype == torch.float32
    with attention(model, None), torch.no_grad():
        wrong = token_logps(model, batch, torch.float32)  # stock attention: the rejected response without its prompt
    noise, error = (coarse - exact).norm(), (wrong - exact).norm()
    assert noise < 0.02 * (exact - exact.mean()).norm()
    assert error > 5 * noise


@pytest.mark.parametrize(
    ("family", "config", "expected"),
    [
        ("llama", {}, "shared"),
        ("mistral", {"sliding_window": WINDOW}, "shared"),
        ("gemma2", {"attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 8}, "packed"),
    ],
)
def test_choose_layout(family: str, config: dict[str, Any], expected: str) -> None:
    model = make_model(family, **config).to(DEVICE)
    runner, told = choose_layout(model, make_pairs(), 4096, DEVICE, torch.bfloat16)
    layout = runner.layout
    assert layout == expected, told
    assert "equal to single sequences" in told


def test_defaults_on_cuda() -> None:
    assert devices.start().type == "cuda"
    assert compute_dtype("auto", device_kind(DEVICE)) == torch.bfloat16


def test_one_train_step(tiny: Path, tmp_path: Path, flash_calls: list[torch.dtype]) -> None:
    """bfloat16 by default; the first loss is ln 2, the weights change, stay float32 and stay finite."""
    AcceleratorState._reset_state(reset_partial_state=True)  # it would keep the device of another test
    options = TrainOptions(
        model=str(tiny),
        data=[str(SAMPLE / "train.jsonl")],
        max_steps=1,
        batch_size=8,
        lr=1e-3,
        warmup_ratio=0.0,
        save_steps=1,
        output=tmp_path / "run",
        cache_dir=tmp_path / "cache",
    )
    train(options, None, ["test"], Reporter(quiet=True))
    assert set(flash_calls) == {torch.bfloat16}
    (line,) = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert math.isclose(line["loss"], math.log(2), abs_tol=0.01)  # the same forward: off by noise at most
    assert math.isfinite(line["grad_norm"]) and line["grad_norm"] > 0
    before, after = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tiny, tmp_path / "run" / "model"))
    for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True):
        assert new.dtype == torch.float32 and new.isfinite().all()
        assert (new - old).abs().max().item() == pytest.approx(1e-3, rel=0.1), (
            name
        )  # Adam's first step is lr for each weight


def test_memory_that_really_runs_out(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With half of the memory that a run took it goes on with less a forward, on the same trajectory."""

    def run(name: str) -> list[dict[str, float]]:
        AcceleratorState._reset_state(reset_partial_state=True)
        options = TrainOptions(
            model=str(tiny),
            data=[str(SAMPLE / "train.jsonl")],
            max_steps=3,
            batch_size=200,
            max_tokens=65536,
            dtype="float32",
            lr=1e-4,
            output=tmp_path / name,
            cache_dir=tmp_path / "cache",
        )
        train(options, None, ["test"], Reporter())
        return [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]

    torch.cuda.reset_peak_memory_stats()
    expected = run("ample")
    assert "out of memory" not in capsys.readouterr().err
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.empty_cache()
    try:
        torch.cuda.set_per_process_memory_fraction(0.5 * peak / torch.cuda.get_device_properties(DEVICE).total_memory)
        got = run("short")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "out of memory" in capsys.readouterr().err
    for line, other in zip(got, expected, strict=True):
        assert line == pytest.approx(other, rel=1e-4, abs=1e-5)


def test_a_step_waits_for_the_device_once(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For its one read-back, however many forwards it has: not in any of them, and not to move their tensors."""
    syncs: list[int] = []
    original = Trainer.step

    def watched(self: Trainer, *arguments: Any) -> Any:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                return original(self, *arguments)
            finally:
                torch.cuda.set_sync_debug_mode("default")
                syncs.append(sum("synchronizing CUDA operation" in str(each.message) for each in caught))

    monkeypatch.setattr(Trainer, "step", watched)
    AcceleratorState._reset_state(reset_partial_state=True)
    options = TrainOptions(
        model=str(tiny),
        data=[str(SAMPLE / "train.jsonl")],
        max_steps=3,
        batch_size=16,
        max_tokens=1024,
        output=tmp_path / "run",
        cache_dir=tmp_path / "cache",
    )
    train(options, None, ["test"], Reporter(quiet=True))
    assert syncs[1:] == [1, 1]  # what the first step sets up once does not count


@pytest.mark.parametrize("memory", ["full", "split"])
def test_the_estimate_is_near_the_peak(memory: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a model whose state and activations are much more than a CUDA context's own needs."""
    model = make_model(hidden_size=512, intermediate_size=1536, num_hidden_layers=8, head_dim=128, vocab_size=32000)
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    AcceleratorState._reset_state(reset_partial_state=True)
    options = TrainOptions(
        model=str(tmp_path / "model"),
        data=[str(SAMPLE / "train.jsonl")],
        max_steps=2,
        batch_size=64,
        max_tokens=4096,
        memory=memory,
        output=tmp_path / "run",
        cache_dir=tmp_path / "cache",
    )
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    train(options, None, ["test"], Reporter())
    estimate = float(re.findall(r"about ([\d.]+) GiB at most", capsys.readouterr().err)[0])
    assert estimate * 2**30 == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.15)


@pytest.mark.parametrize("quantize", [None, "4bit", "8bit"])
def test_an_adapter_trains_on_a_coarse_base(
    quantize: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It starts at ln 2, learns, resumes as it was, and is evaluated and merged as what it is."""
    if quantize:
        pytest.importorskip("bitsandbytes")
    make_model(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    common: dict[str, Any] = {"cache_dir": tmp_path / "cache", "max_tokens": 4096}
    held_out = [str(SAMPLE / "heldout.jsonl")]
    AcceleratorState._reset_state(reset_partial_state=True)
    options = TrainOptions(
        model=str(tmp_path / "model"),
        data=[str(SAMPLE / "train.jsonl")],
        eval_data=held_out,
        max_steps=6,
        batch_size=16,
        lr=1e-2,
        lora_rank=4,
        load_in_4bit=quantize == "4bit",
        load_in_8bit=quantize == "8bit",
        output=tmp_path / "run",
        **common,
    )
    result = train(options, None, ["test"], Reporter())
    told = capsys.readouterr().err
    assert f"frozen base {quantize or 'bfloat16'}, adapter and its moments float32" in told
    assert result["before"]["loss"] == pytest.approx(math.log(2), abs=1e-2) and result["after"]["loss"] < 0.6
    assert (tmp_path / "run" / "checkpoints" / "step-000006" / "adapter_model.safetensors").exists()
    asked = EvalOptions(model=[str(tmp_path / "run")], data=held_out, **common)
    found = evaluate(str(tmp_path / "run"), asked, Reporter(quiet=True))[0].result
    assert found["rewards/margins"] == pytest.approx(result["after"]["rewards/margins"], rel=1e-3)
    assert merge(str(tmp_path / "run"), tmp_path / "merged", False, Reporter(quiet=True))["parameters"] > 0


# ---- evaluation -------------------------------------------------------------------------------------------------


def test_exact_divergences_are_those_of_the_cpu(tmp_path: Path) -> None:
    pairs, progress = Pairs(make_pairs()), Reporter(quiet=True).progress("test", 1)
    found = []
    for device in (torch.device("cpu"), DEVICE):
        scorers = []
        for seed in (0, 1):
            model = make_model(seed=seed).to(device)
            model.set_attn_implementation(PREFIX_SHARED)
            scorers.append(ModelRunner(model, "shared", torch.float32, 512, device))
        recorded = record(scorers[0], pairs, tmp_path, progress)
        found.append(compare(scorers[1], recorded, pairs, progress, policy_runs=False).tokens)
    assert torch.allclose(*found, rtol=0, atol=1e-3)


def test_samples_are_drawn_from_the_models_own_distribution(tokenizer: PreTrainedTokenizerFast) -> None:
    """First tokens of many samples against the softmax that scoring computes, in the precision that it computes in."""
    model, prompt = make_model(vocab_size=50).to(DEVICE), np.array([7, 3, 11], np.int32)
    runner = ModelRunner(model, "padded", torch.bfloat16, 2**16, DEVICE)
    drawn, again = (generate(runner, tokenizer, [prompt], "sdpa", 1, copies)[0] for copies in (2000, 20))
    assert [r.tolist() for r in again] == [r.tolist() for r in drawn[:20]]
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(prompt).long()[None].to(DEVICE)).logits[0, -1].float()
    expected = 2000 * logits.softmax(-1).cpu().numpy()
    counts = np.bincount([int(r[0]) for r in drawn], minlength=50)
    often = expected > 5
    assert ((counts - expected)[often] ** 2 / expected[often]).sum() < 2 * often.sum()


def test_a_model_in_shards_takes_the_trajectory_of_a_whole_one(tiny: Path, tmp_path: Path) -> None:
    """As many shards as there are GPUs: one will do for FSDP2's path, its checkpoints and its export."""
    words = ["train", "--data", str(SAMPLE / "train.jsonl"), "--model", str(tiny), "--dtype", "float32"]
    words += ["--max-steps", "3", "--batch-size", "8", "--lr", "1e-3", "--max-tokens", "2048", "--memory", "full"]
    words += ["--cache-dir", str(tmp_path / "cache")]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(torch.cuda.device_count())]
    for start, more in (([], "whole"), (launcher, "shards")):
        shard = ["--fsdp"] if start else []
        command = [sys.executable, *start, "-m", "dpo_cli", *words, "--output", str(tmp_path / more), *shard]
        out = subprocess.run(command, capture_output=True, text=True, timeout=300, env=cli_environment(tmp_path))
        assert out.returncode == 0, out.stderr
    lines = [(tmp_path / run / "metrics.jsonl").read_text().splitlines() for run in ("whole", "shards")]
    for expected, found in zip(*([json.loads(line) for line in each] for each in lines), strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], abs=1e-4)
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / run / "model") for run in ("whole", "shards")]
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert (one - other).abs().max() < 1e-4
