"""Models whose forward changes at a length: each pair is scored as by plain forwards of its own, or the run is refused.

Every sequence is judged by a model that has read nothing before it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

import dpo_cli.models.layout
from dpo_cli.cli.app import app
from dpo_cli.data.pairs import Pair
from dpo_cli.models.layout import choose_layout
from dpo_cli.utils.errors import UsageError
from tests.helpers import make_model, random_pairs, write_rows

LETTERS = "~^|#@"  # each is a token, and two of them never are one
T = 64
CPU = torch.device("cpu")
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
SPARSE = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1}
SPARSE |= LATENT | {"first_k_dense_replace": 1, "num_key_value_heads": 4, "scale": 3.0}
SPARSE |= {"index_topk": T, "index_n_heads": 2, "index_head_dim": 8}
SCALED = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "llama_4_scaling_beta": 2.0}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "longrope": (
        "phi3",
        {"original_max_position_embeddings": T}
        | {
            "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": T}
            | {"short_factor": [1.0] * 4, "long_factor": [1.5, 3.0, 9.0, 30.0]}
        },
    ),
    "dynamic": (
        "llama",
        {"max_position_embeddings": T}
        | {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}},
    ),
    "chunks": (
        "llama4_text",
        {"attention_chunk_size": T, "floor_scale": T, "attn_scale": 2.0, "attn_temperature_tuning": True}
        | {"no_rope_layers": [1, 0], "num_local_experts": 2, "intermediate_size_mlp": 64},
    ),
    "scaled": ("ministral3", {"rope_parameters": SCALED | {"original_max_position_embeddings": T}}),
    "windows": ("mistral", {"sliding_window": T}),
    "deepseek_v32": ("deepseek_v32", SPARSE),
    "glm_moe_dsa": ("glm_moe_dsa", SPARSE),
}
# Lengths of prompt, chosen and rejected in tokens, an end of the turn among those of each response.
SHORT = [(9, 12, 15), (30, 8, 20), (20, 30, 7), (40, 20, 24)]
CASES = {
    "in the prompt": [(80, 9, 12), *SHORT],
    "between the responses": [(50, 8, 30), (50, 31, 9), (44, 20, 21)],
    "on the threshold": [(40, 24, 10), (40, 25, 10), (41, 10, 23)],
    "one long pair behind short ones": [*SHORT, *SHORT[::-1], (60, 90, 70)],
    "long ones alone": [(60, 9, 12), (70, 30, 8)],
    "short ones alone": SHORT,
}
ROWS = ("prompt", "chosen", "rejected")
SHARED, PACKED, PADDED, ALONE = "each prompt computed once", "packed rows, the prompt", "padded batches", "one sequence"
# The layout of a model where sequences lie on both sides of the threshold, beyond it, and before it.
LAYOUTS = {
    "longrope": (ALONE, SHARED, SHARED),
    "chunks": (PADDED, PADDED, PADDED),
    "scaled": (SHARED, SHARED, SHARED),
    "windows": (SHARED, SHARED, SHARED),
    "deepseek_v32": (ALONE, ALONE, PACKED),
    "glm_moe_dsa": (ALONE, ALONE, PACKED),
}
Made = Callable[[str], tuple[Path, PreTrainedModel]]


@pytest.fixture(scope="module")
def made(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The folder of a model, and the model."""
    folder, models = tmp_path_factory.mktemp("thresholds"), dict[str, PreTrainedModel]()

    def make(name: str) -> tuple[Path, PreTrainedModel]:
        if name not in models:
            family, config = MODELS[name]
            models[name] = make_model(family, **config)
            models[name].save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)
        return folder / name, models[name]

    return make


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def write(lengths: Sequence[tuple[int, int, int]]) -> list[dict[str, str]]:
    """Rows of so many tokens, in ``rows.jsonl``."""
    rng = np.random.default_rng(0)
    texts = [["".join(rng.choice(list(LETTERS), n)) for n in (p, c - 1, r - 1)] for p, c, r in lengths]
    rows = [dict(zip(ROWS, each, strict=True)) for each in texts]
    write_rows(Path("rows.jsonl"), rows)
    return rows


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments), "--data", "rows.jsonl", "--format", "strings"])


def evaluated(folder: Path, *more: Any, column: str = "logps") -> Tensor:
    """(P, 2) nats, chosen and rejected, as ``dpo eval`` finds them."""
    out = run("eval", "--model", folder, "--kl", "none", "--per-pair", "pairs.jsonl", *more)
    assert out.exit_code == 0, out.stderr
    lines = [json.loads(line) for line in Path("pairs.jsonl").read_text().splitlines()]
    return torch.tensor([[line[f"{column}/{side}"] for side in ROWS[1:]] for line in lines])


@torch.no_grad()
def plain(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, str]], most: int) -> Tensor:
    """The same from plain forwards of models that have read nothing before; of prompt and response ``most`` tokens."""
    found = []
    for row in rows:
        prompt, *responses = (tokenizer(row[name], add_special_tokens=False)["input_ids"] for name in ROWS)
        for response in responses:
            targets = torch.tensor([*response, tokenizer.eos_token_id][: most - len(prompt)])
            ids = torch.cat([torch.tensor(prompt), targets])[None]
            logits = deepcopy(model)(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].double()
            found.append(float(logits.log_softmax(-1).gather(1, targets[:, None]).sum()))
    return torch.tensor(found).view(-1, 2)


def check(got: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(got, wanted, atol=2e-3, rtol=0)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_log_probs_are_those_of_plain_forwards(
    name: str, case: str, made: Made, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Whatever the order of the rows, and where the long ones get forwards of their own."""
    folder, model = made(name)
    for lengths, more in ((CASES[case], ()), (CASES[case][::-1], ("--max-tokens", 200))):
        rows = write(lengths)
        check(evaluated(folder, *more), plain(model, tokenizer, rows, 1024))


@pytest.mark.parametrize("name", LAYOUTS)
def test_sequences_share_a_forward_where_that_is_exact(name: str, made: Made) -> None:
    for case, layout in zip(
        ("between the responses", "long ones alone", "short ones alone"), LAYOUTS[name], strict=True
    ):
        write(CASES[case])
        out = run("train", "--model", made(name)[0], "--dry-run")
        assert out.exit_code == 0 and f"layout      {layout}" in out.stderr.replace("packed rows, each", "each")


def test_a_run_trains_on_both_sides_of_the_threshold(made: Made, tokenizer: PreTrainedTokenizerFast) -> None:
    """Its reference, and what it has learned."""
    folder, model = made("longrope")
    rows = write(CASES["one long pair behind short ones"])
    wanted = plain(model, tokenizer, rows, 1024)
    out = run("train", "--model", folder, "--output", "run", "--batch-size", len(rows), "--lr", "1e-3", "--epochs", 2)
    assert out.exit_code == 0, out.stderr
    assert "step 0      loss 0.693147" in out.stderr and ALONE in out.stderr
    check(evaluated(Path("run"), column="ref_logps"), wanted)
    trained = AutoModelForCausalLM.from_pretrained("run/model").eval()
    after = plain(trained, tokenizer, rows, 1024)
    assert (after - wanted).abs().max() > 0.1  # nats: it has learned
    check(evaluated(Path("run")), after)
    out = run("precompute-ref", "--model", folder)
    assert out.exit_code == 0 and "9 of 9 pairs cached" in out.stderr


def test_the_length_that_is_named_works(made: Made, tokenizer: PreTrainedTokenizerFast) -> None:
    """Frequencies of dynamic NTK stay grown, and grow where the model reads no further; so longer pairs are refused."""
    for name in ("dynamic", "longrope"):
        folder, model = made(name)
        rows = write([(T // 4, 8, 60), *SHORT])
        out = run("eval", "--model", folder, "--kl", "none")
        said = out.stderr
        assert f"--max-length {T}" in said and (out.exit_code == 2) == (name == "dynamic")
        if name == "dynamic":
            assert "(max_position_embeddings in its config.json; beyond that its dynamic rope changes" in said
        check(evaluated(folder, "--max-length", T), plain(model, tokenizer, rows, T))
        assert SHARED in run("eval", "--model", folder, "--kl", "none", "--max-length", T).stderr


def test_samples_beyond_the_threshold_are_scored_alone(made: Made) -> None:
    """What is drawn may be longer than any response of the data."""
    write(SHORT)
    for tokens, layout in ((4, SHARED), (40, ALONE)):
        out = run("eval", "--model", made("longrope")[0], "--samples", 1, "--sample-tokens", tokens)
        assert out.exit_code == 0 and layout in out.stderr, out.stderr


class Grown(torch.nn.Module):
    """Rotary embeddings that shrink all positions by the longest sequence ever read, as some of remote code do."""

    def __init__(self, embeddings: torch.nn.Module) -> None:
        super().__init__()
        self.embeddings, self.longest = embeddings, T

    def forward(self, x: Tensor, position_ids: Tensor) -> Any:
        self.longest = max(self.longest, int(position_ids.max()) + 1)
        return self.embeddings(x, position_ids * (T / self.longest))


def test_refuses_a_model_that_longer_sequences_change_for_good() -> None:
    model: Any = make_model("phi3", original_max_position_embeddings=T)
    model.model.rotary_emb = Grown(model.model.rotary_emb)
    pairs = random_pairs(6, longest=20)
    long = Pair("long", np.full(2 * T, 5, np.int32), pairs[0].chosen, pairs[0].rejected)
    with pytest.raises(UsageError, match=rf"alone: off by .*; set --max-length {T}$"):
        choose_layout(deepcopy(model), [*pairs, long], 1024, CPU, torch.float32)
    assert choose_layout(model, pairs, 1024, CPU, torch.float32)[0].layout == "shared"


def test_rows_beyond_a_threshold_are_tried_where_no_sequence_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama 4 reads places in the row: a few short pairs in a forward would not show it."""
    model = make_model("llama4_text", **MODELS["chunks"][1] | {"floor_scale": 512, "attention_chunk_size": 4096})
    pairs = random_pairs(8, longest=20)
    assert choose_layout(model, pairs, 1024, CPU, torch.float32)[0].layout == "padded"
    monkeypatch.setattr(dpo_cli.models.layout, "THRESHOLDS", ())
    assert choose_layout(model, pairs, 1024, CPU, torch.float32)[0].layout == "shared"  # what the rows are there for
