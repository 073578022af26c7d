"""What `--dry-run --trace` says of a step, on real sizes without weights, and that the estimate is near its bytes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.memory.scale import SHAPES, make
from benchmarks.trl.cases import CASES, draw_lengths
from dpo_cli.config.options import TrainOptions
from dpo_cli.data.pairs import Pair
from dpo_cli.data.schedule import build_schedule
from dpo_cli.models.shapes import ShapesRunner, shapes_only
from dpo_cli.models.split_weights import split_master_weights
from dpo_cli.training import optimizer, trace
from dpo_cli.training.memory import choose_memory, usable_bytes
from dpo_cli.utils.cards import CARDS, find_card, standing_in
from dpo_cli.utils.console import Reporter
from dpo_cli.utils.errors import UsageError
from tests.helpers import ROOT, Cli, make_tokenizer, write_rows
from tests.helpers.traced import traced_step

CPU = torch.device("cpu")
LENGTHS = draw_lengths(CASES["hh"], 64, 1000)


def config_only(folder: Path, family: str = "llama", **sizes: Any) -> Path:
    """A folder with the configuration of a model and a tokenizer, and without weights."""
    config = AutoConfig.for_model(family, **sizes)
    config.architectures = [type(AutoModelForCausalLM.from_config(config)).__name__] if family != "llama" else None
    config.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models of published sizes, and pairs in the lengths of HH."""
    here = tmp_path_factory.mktemp("models")
    for name in ("1B", "8B", "8B, 4 layers"):
        hidden, layers, mlp, heads, groups, vocabulary, tied = SHAPES[name.partition(",")[0]]
        config_only(
            here / name,
            hidden_size=hidden,
            num_hidden_layers=4 if "," in name else layers,
            intermediate_size=mlp,
            num_attention_heads=heads,
            num_key_value_heads=groups,
            vocab_size=vocabulary,
            tie_word_embeddings=tied,
            max_position_embeddings=131072,
        )
    # Prompts of other rows, and the two responses, begin with another word: nothing else is shared.
    firsts = [(chr(97 + row), "one", "two") for row in range(len(LENGTHS))]
    texts = [
        [first + " the" * (n - 1) for first, n in zip(firsts[row], lengths, strict=True)]
        for row, lengths in enumerate(LENGTHS)
    ]
    write_rows(here / "rows.jsonl", [dict(zip(("prompt", "chosen", "rejected"), text, strict=True)) for text in texts])
    return here


def traced(folder: Path, model: str, card: str, **options: Any) -> tuple[dict[str, Any], trace.Watch]:
    """The result of a trace, and its watch."""
    watches = []

    class Kept(trace.Watch):
        def __init__(self) -> None:
            super().__init__()
            watches.append(self)

    norm = 0.0 if options.get("memory") == "in-backward" else 1.0
    given = {"model": str(folder / model), "data": [str(folder / "rows.jsonl")], "max_steps": 1}
    given["batch_size"] = 64 if model.startswith("1B") else 16
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trace, "Watch", Kept)
        # Fewer operators, which take most of the time.
        patch.setattr(optimizer, "SLICE", 2**26 if model.startswith("8B") else 2**25, raising=False)
        result = trace.trace(TrainOptions(**given, max_grad_norm=norm, **options), None, card, Reporter(quiet=True))
    return result, watches[0]


@pytest.mark.parametrize(
    ("model", "memory", "recompute"),
    [
        *(("1B", memory, recompute) for memory in ("full", "split", "in-backward") for recompute in (False, True)),
        ("8B", "auto", False),
        *(("8B, 4 layers", memory, True) for memory in ("full", "in-backward")),
        pytest.param("8B", "full", True, marks=pytest.mark.bench),  # half a minute each
        pytest.param("8B", "in-backward", True, marks=pytest.mark.bench),
    ],
)
def test_the_estimate_is_near_the_bytes_of_a_step(folder: Path, model: str, memory: str, recompute: bool) -> None:
    """Of the whole step in each memory mode, which reads back once, and whose attention is flash."""
    card = "b200" if model.startswith("8B") and memory == "full" else "h100"
    result, watch = traced(folder, model, card, memory=memory, gradient_checkpointing=recompute)
    layers, forwards = 4 if "," in model else SHAPES[model][1], result["step"]["micro_batches"]
    assert watch.operators["_varlen_attn"] == layers * forwards * (1 + result["gradient_checkpointing"])
    assert result["host_syncs"] == 1, watch.waits
    peak = result["peak_bytes"]
    assert 0.98 * peak["total"] <= result["estimate_bytes"] <= 1.15 * peak["total"]
    assert peak["total"] == sum(peak[part] for part in trace.PARTS) and result["fits"]
    parameters = {"1B": 1.2358e9, "8B": 8.0303e9, "8B, 4 layers": 1.9231e9}[model]
    assert peak["weights"] == pytest.approx(4 * parameters, rel=0.001)
    if memory == "auto":  # a full fine-tuning of 8B on 80 GB
        assert (result["memory"], result["gradient_checkpointing"]) == ("split", True) and peak["total"] < 80e9


def test_flops_and_floor(folder: Path) -> None:
    """By the sizes: two FLOPs for each weight and token, thrice; attention over what each token sees."""
    result, _ = traced(folder, "1B", "a100", memory="full")
    hidden, layers, mlp, heads, groups, vocabulary, _ = SHAPES["1B"]
    width = hidden // heads
    weights = layers * (2 * hidden * hidden + 2 * hidden * groups * width + 3 * hidden * mlp)
    lengths = [tuple(map(len, (p.prompt, p.chosen, p.rejected))) for p in pairs_of(folder)]
    tokens, responses = sum(map(sum, lengths)), sum(c + r for _, c, r in lengths)
    scores = sum((p + c) * (p + c + 1) / 2 + r * p + r * (r + 1) / 2 for p, c, r in lengths)
    expected = 6 * weights * tokens + 6 * hidden * vocabulary * responses + 3.5 * layers * 4 * hidden * scores
    assert result["step"] == {"pairs": 64, "tokens": tokens, "micro_batches": 1}
    assert result["flops"] == result["run_flops"] == pytest.approx(expected, rel=1e-4)
    moved = (2 * 4 + 4 + 2 * 8) * 1_235_814_400
    assert result["floor_seconds"] == pytest.approx(expected / 312e12 + moved / 2.039e12, rel=1e-3)


def pairs_of(folder: Path) -> Any:
    from dpo_cli.data.rows import read_rows
    from dpo_cli.data.sources import find_sources
    from dpo_cli.data.tokenize import tokenize_rows

    rows = read_rows(find_sources([str(folder / "rows.jsonl")]))
    return tokenize_rows(rows, make_tokenizer()).pairs


# ---- the command ------------------------------------------------------------------------------------------------

SMALL = {"vocab_size": 384, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize("more", [(), ("--lora-rank", 4), ("--lora-rank", 4, "--lora-type", "dora")], ids=str)
def test_the_command_needs_no_weights(dpo: Cli, folder: Path, tmp_path: Path, more: tuple[Any, ...]) -> None:
    """It reports as a run does, says what is assumed, and writes nothing."""
    config_only(tmp_path / "model", **SMALL)
    common = ("train", "--dry-run", "--trace", "--model", "model", "--data", folder / "rows.jsonl", "--card", "4090")
    before = sorted(tmp_path.rglob("*"))
    result = dpo(*common, *more, "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["card"] == "4090" and found["fits"] and found["host_syncs"] == 1 and found["floor_seconds"] > 0
    assert "assumed, as without values nothing can be compared" in result.stderr
    assert "device      4090; compute bfloat16" in result.stderr
    assert sorted(tmp_path.rglob("*")) == before
    if not more:
        text = dpo(*common).stdout
        assert "4090, the largest step: 16 pairs" in text and "a floor" in text and "it fits" in text


def test_a_mixture_of_experts(dpo: Cli, folder: Path, tmp_path: Path) -> None:
    """Its grouped products are bfloat16, for which alone a trace knows shapes."""
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "output_router_logits": True}
    config_only(tmp_path / "model", "qwen3_moe", **SMALL, **experts)
    common = ("train", "--dry-run", "--trace", "--model", "model", "--data", folder / "rows.jsonl")
    result = dpo(*common, "--card", "h100", "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["host_syncs"] == 1


def test_a_card_without_bfloat16_computes_in_float32(dpo: Cli, folder: Path, tmp_path: Path) -> None:
    config_only(tmp_path / "model", **SMALL)
    result = dpo("train", "--dry-run", "--trace", "--model", "model", "--data", folder / "rows.jsonl", "--card", "t4")
    assert result.returncode == 0 and "device      t4; compute float32" in result.stderr, result.stderr


def test_refused(dpo: Cli, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    common = ("train", "--model", "model", "--data", folder / "rows.jsonl")
    config_only(tmp_path / "model", **SMALL)
    config_only(tmp_path / "capped", "gemma2", **SMALL)

    def refusal(*arguments: Any) -> str:
        result = dpo(*common, *arguments)
        assert result.returncode == 2 and result.stderr.count("error: ") == 1, result.stderr
        return result.stderr

    assert "the folder has no weights" in refusal("--dry-run")
    for alone in (("--trace",), ("--card", "h100"), ("--dry-run", "--card", "h100")):
        assert "need --dry-run and --trace, as in dpo train --dry-run --trace --card h100" in refusal(*alone)
    assert "--card h10: must be one of" in refusal("--dry-run", "--trace", "--card", "h10")
    assert "there is no CUDA device here; name one by --card: b200, h200" in refusal("--dry-run", "--trace")
    on = ("--dry-run", "--trace", "--card", "h100")
    assert "--trace: not with --load-in-4bit" in refusal(*on, "--lora-rank", 4, "--load-in-4bit")
    assert "does not run in shared rows: ValueError: its attention takes softcap" in refusal(*on, "--model", "capped")


@pytest.mark.parametrize(
    ("name", "memory", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 85e9, "h100"),
        ("NVIDIA A100-SXM4-40GB", 42e9, "a100-40"),
        ("NVIDIA A100 80GB PCIe", 85e9, "a100"),
        ("NVIDIA L40S", 48e9, "l40s"),
        ("NVIDIA GeForce RTX 4090", 25e9, "4090"),
        ("NVIDIA L40", 48e9, None),
        ("NVIDIA T400 4GB", 4e9, None),
        ("Quadro P400", 2e9, None),
    ],
)
def test_the_card_that_is_here(monkeypatch: pytest.MonkeyPatch, name: str, memory: float, expected: str | None) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=memory))
    if expected:
        assert (find_card(None).name, find_card(None).memory) == (expected, memory)
    else:
        with pytest.raises(UsageError, match=f"nothing is known of the {name}"):
            find_card(None)


# ---- the budget -------------------------------------------------------------------------------------------------


def test_a_run_keeps_within_the_budget_that_it_chose() -> None:
    """The head sees as many tokens as a forward has room for, and not only those of the longest pair."""
    rng = np.random.default_rng(0)
    lengths = draw_lengths(CASES["ultrafeedback"], 128, 2000)
    pairs = [
        Pair(f"row {i}", *(rng.integers(3, 4003, n).astype(np.int32) for n in each)) for i, each in enumerate(lengths)
    ]
    with standing_in(CARDS["h200"]), shapes_only():
        model = make(*SHAPES["8B"])
        split_master_weights(model)
        runner = ShapesRunner(model, "shared", torch.bfloat16, 32768, CPU)
        choice, costs = choose_memory(runner, pairs, 0, "split", False, None), runner.costs(pairs)
        order = {"batch_size": 64, "epochs": 1, "max_steps": None, "world_size": 1, "seed": 0}
        plan = build_schedule(pairs, "shared", max_tokens=choice.max_tokens, **order)
        assert max(costs) < runner.max_logit_rows < choice.max_tokens < 32768
        assert choice.estimate(plan, costs, pairs, runner) <= usable_bytes(CPU)


# ---- CUDA -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fake_cuda(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if torch.version.cuda or torch.version.hip or not (compiler := shutil.which("g++")):
        pytest.skip("needs a CPU build of torch and g++")
    library, root = tmp_path_factory.mktemp("fake") / "fake_cuda.so", Path(torch.__file__).parent
    flags = ["-std=c++20", "-O0", "-fPIC", "-shared", f"-I{root}/include", f"-L{root}/lib", "-lc10", "-ltorch_cpu"]
    source = ROOT / "tests" / "helpers" / "fake_cuda.cpp"
    subprocess.run([compiler, source, "-o", library, *flags], check=True)
    return library


@pytest.mark.parametrize(("memory", "recompute"), [("full", False), ("split", True)])
def test_a_step_on_fake_cuda_is_that_of_a_trace(fake_cuda: Path, memory: str, recompute: bool) -> None:
    """The same bytes; and where host and device are two, no copy between them makes the host wait."""
    script = ROOT / "tests" / "helpers" / "fake_cuda.py"
    command = [sys.executable, script, fake_cuda, memory, "recomputed" if recompute else "kept"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.stdout, done.stderr[-2000:]
    found, here = json.loads(done.stdout.splitlines()[-1]), traced_step("cpu", memory, recompute)
    assert found["blocking"] == [] and found["copies"] > 20 and found["forwards"] > 1
    assert found["waits"] == here["waits"] == 1
    assert found["flash"] == here["flash"] == 4 * found["forwards"] * (1 + recompute)
    assert found["peak"] == pytest.approx(here["peak"], rel=0.002)
    assert 0.98 * found["peak"] <= found["estimate"] <= 1.15 * found["peak"]
