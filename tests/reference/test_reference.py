"""Reference log-probs are computed once, kept on disk, and never wrong."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, load_file
from torch import Tensor
from typer.testing import CliRunner

import dpo_cli.reference.store
from dpo_cli.cli.app import app
from dpo_cli.data.batching import MicroBatch
from dpo_cli.data.pairs import Pair, Pairs
from dpo_cli.models.fingerprint import fingerprint, hash_weights
from dpo_cli.models.loading import load_model
from dpo_cli.models.locate import find_model
from dpo_cli.models.logprobs import ModelRunner
from dpo_cli.reference.store import KEY_BYTES, ReferenceCache, lookup_cached, pair_keys, response_key
from dpo_cli.utils.console import Reporter
from tests.helpers import SAMPLE, random_pairs, write_rows
from tests.helpers.caches import (
    NOISE,
    PROCESSES,
    changed_config,
    changed_weight,
    dpo,
    fill,
    make_scorer,
    open_cache,
    plant,
    shards,
    write_shard,
)
from tests.helpers.forwards import others


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Twelve rows; a longer file is made of more."""
    return write_rows(tmp_path / "rows.jsonl", sample(12))


def sample(count: int) -> list[Any]:
    return [json.loads(line) for line in (SAMPLE / "train-strings.jsonl").read_text().splitlines()[:count]]


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pairs of every forward of a run's own, of reference and policy."""
    pairs: list[int] = []
    within = others(monkeypatch)

    def counting(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(self: ModelRunner, batch: MicroBatch, *rest: Any, **more: Any) -> Any:
            if not within:
                pairs.append(len(batch.lengths) // 2)
            within.append(name)  # one goes through the other
            try:
                return forward(self, batch, *rest, **more)
            finally:
                within.pop()

        return run

    for name in ("token_logps", "body"):
        monkeypatch.setattr(ModelRunner, name, counting(name, getattr(ModelRunner, name)))
    return pairs


@pytest.fixture
def scorer() -> ModelRunner:
    """A tiny model's; a forward holds a few of ``random_pairs``."""
    return make_scorer()


def missing(cache: ReferenceCache, pairs: Sequence[Pair]) -> list[int]:
    """Places of the pairs that are not cached."""
    return lookup_cached(cache, pairs, Reporter(quiet=True))[1]


@pytest.fixture
def precompute(tmp_path: Path, tiny: Path) -> Callable[..., dict[str, Any]]:
    """``precompute(rows)``: what ``dpo precompute-ref --json`` returns."""

    def run(rows: Path, *more: Any, model: Path = tiny) -> dict[str, Any]:
        result, _ = dpo("precompute-ref", "--data", rows, "--model", model, "--cache-dir", tmp_path / "cache", *more)
        return result

    return run


Precompute = Callable[..., dict[str, Any]]


# ---- what is scored ---------------------------------------------------------------------------------------------


def test_a_second_training_scores_nothing(tmp_path: Path, tiny: Path, rows: Path, forwards: list[int]) -> None:
    """Another learning rate, beta, seed, batch size, loss and output: the same reference."""
    common = ("train", "--model", tiny, "--data", rows, "--cache-dir", tmp_path / "cache")
    _, told = dpo(*common, "--output", tmp_path / "first", "--batch-size", 6)
    assert "0 of 12 pairs cached: 12 to score" in told
    forwards.clear()
    other = ("--lr", 1e-4, "--beta", 0.5, "--seed", 3, "--batch-size", 4, "--label-smoothing", 0.1, "--epochs", 2)
    result, told = dpo(*common, "--output", tmp_path / "second", *other)
    assert "12 of 12 pairs cached: nothing to score" in told
    assert result["steps"] == 6
    assert forwards == [4] * (1 + 6)  # the check at step 0 and one a step


def test_a_second_training_scores_no_held_out_pair_but_at_its_evaluations(
    tmp_path: Path, tiny: Path, rows: Path, forwards: list[int]
) -> None:
    """The reference runs over them for the exact KL in the place of the evaluation at step 0: none is added."""
    held_out = write_rows(tmp_path / "held-out.jsonl", sample(15)[12:])
    common = ("train", "--model", tiny, "--data", rows, "--eval-data", held_out, "--cache-dir", tmp_path / "cache")
    found: dict[str, list[int]] = {}
    dpo(*common, "--max-steps", 1, "--output", tmp_path / "first")
    for kl in ("exact", "none"):
        forwards.clear()
        _, told = dpo(*common, "--kl", kl, "--batch-size", 4, "--eval-steps", 1, "--output", tmp_path / kl)
        assert "7 of 7 pairs cached" not in told and "15 of 15 pairs cached: nothing to score" in told
        assert ("one pass over the held-out pairs for the exact KL" in told) == (kl == "exact")
        found[kl] = [*forwards]
    assert found["none"] == [4, 3, 4, 3, 4, 3, 4, 3]  # the check of step 0; step 0; three steps
    assert sorted(found["exact"]) == sorted(found["none"])


def test_precompute_fills_what_train_and_eval_need(
    tmp_path: Path, tiny: Path, rows: Path, precompute: Precompute, forwards: list[int]
) -> None:
    first = precompute(rows)
    assert (first["pairs"], first["hits"], first["misses"], sum(forwards)) == (12, 0, 12, 12)
    assert first["tokens"] > 0 and first["seconds"] > 0
    assert Path(first["cache_dir"]).is_relative_to(tmp_path / "cache") and shards(Path(first["cache_dir"]))
    forwards.clear()
    again = precompute(rows)
    assert (again["pairs"], again["hits"], again["misses"], again["tokens"], forwards) == (12, 12, 0, 0, [])
    common = ("--data", rows, "--model", tiny, "--cache-dir", tmp_path / "cache")
    assert "12 of 12 pairs cached: nothing to score" in dpo("train", *common, "--output", tmp_path / "run")[1]
    for kl in ("none", "exact"):
        forwards.clear()
        dpo("eval", *common, "--kl", kl)
        assert sum(forwards) == 12  # a model that is its own reference runs once
    forwards.clear()
    common = ("--data", rows, "--model", tmp_path / "run", "--cache-dir", tmp_path / "cache", "--kl", "none")
    for more in ((), ("--ref-model", tiny)):
        assert "12 of 12 pairs cached: nothing to score" in dpo("eval", *common, *more)[1]
    assert sum(forwards) == 2 * 12  # the policy's


def test_appended_row_is_all_that_is_scored(rows: Path, precompute: Precompute, forwards: list[int]) -> None:
    precompute(rows)
    forwards.clear()
    write_rows(rows, sample(13))
    result = precompute(rows)
    assert (result["hits"], result["misses"], forwards) == (12, 1, [1])


def test_order_names_and_files_do_not_matter(tmp_path: Path, rows: Path, precompute: Precompute) -> None:
    precompute(rows)
    lines = sample(12)
    random.Random(0).shuffle(lines)
    renamed = write_rows(tmp_path / "renamed.jsonl", lines)
    assert precompute(renamed)["misses"] == 0
    halves = [write_rows(tmp_path / f"{name}.jsonl", part) for name, part in (("a", lines[:5]), ("b", lines[5:]))]
    assert precompute(halves[0], "--data", halves[1]) | {"seconds": 0} == precompute(renamed) | {"seconds": 0}


def test_an_edited_row_is_scored_again(rows: Path, precompute: Precompute) -> None:
    """Of the same size and with the same time of change."""
    precompute(rows)
    before = rows.stat()
    text = rows.read_text()
    place = text.index('"chosen": "') + len('"chosen": " ')
    rows.write_text(text[:place] + ("X" if text[place] != "X" else "Y") + text[place + 1 :])
    os.utime(rows, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert rows.stat().st_size == before.st_size
    result = precompute(rows)
    assert (result["hits"], result["misses"]) == (11, 1)


def test_a_length_that_cuts_nothing_is_no_change(rows: Path, precompute: Precompute) -> None:
    precompute(rows)
    assert precompute(rows, "--max-length", 900)["misses"] == 0
    assert 0 < precompute(rows, "--max-length", 150)["misses"] < 12


def test_equal_pairs_are_scored_once(tmp_path: Path, scorer: ModelRunner, forwards: list[int]) -> None:
    pairs = random_pairs(5)
    cache = open_cache(tmp_path)
    fill(cache, [*pairs, *pairs, pairs[0]], scorer)
    assert sum(forwards) == 5
    assert torch.equal(cache.lookup([*pairs, pairs[2]]), cache.lookup([*pairs, *pairs])[[0, 1, 2, 3, 4, 7]])


@given(
    st.lists(st.integers(0, 3), max_size=6), st.lists(st.integers(0, 3), max_size=6),
    st.lists(st.integers(0, 3), max_size=6), st.lists(st.integers(0, 3), max_size=6),
)  # fmt: skip
def test_a_key_is_of_all_ids_and_the_boundary(a: list[int], b: list[int], c: list[int], d: list[int]) -> None:
    """Two responses share a key only if prompt and response are both the same."""
    a_, b_, c_, d_ = (np.asarray(ids, dtype=np.int32) for ids in (a, b, c, d))
    assert (response_key(a_, b_) == response_key(c_, d_)) == (a == c and b == d)
    assert (response_key(a_, b_) == response_key(np.append(a_, b_), b_[:0])) == (not b)


def test_stored_numbers_are_the_models(tmp_path: Path, scorer: ModelRunner) -> None:
    """Each response alone through the plain model; a shard's token log-probs add up to its sums."""
    pairs = random_pairs(6)
    fill(open_cache(tmp_path), pairs, scorer)
    cache = open_cache(tmp_path)
    expected = []
    with torch.no_grad():
        for pair in pairs:
            for response in (pair.chosen, pair.rejected):
                ids = torch.from_numpy(np.concatenate([pair.prompt, response])).long()
                logps = scorer.model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])
                expected.append(float(logps[len(pair.prompt) - 1 :].sum()))
    torch.testing.assert_close(cache.lookup(pairs), torch.tensor(expected).view(-1, 2), rtol=0, atol=NOISE)
    for shard in shards(tmp_path):
        tensors = load_file(shard)
        parts = tensors["token_logps"].split(tensors["lengths"].tolist())
        torch.testing.assert_close(torch.stack([p.sum() for p in parts]), tensors["logps"], rtol=0, atol=NOISE)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_log_probs_as_ld_dpo_reads_them(tmp_path: Path, scorer: ModelRunner, alpha: float) -> None:
    """Of the cache as of the model; a response that is in two pairs is cut by the other one of each."""
    pairs = random_pairs(12)
    pairs.append(Pair("row 12", pairs[0].prompt, pairs[0].chosen, pairs[0].chosen[:1]))
    cache = open_cache(tmp_path)
    whole = fill(cache, pairs, scorer).logps
    found, fresh = cache.weighted(Pairs(pairs), alpha), torch.empty(len(pairs), 2)

    def weighted(places: Sequence[int], _: MicroBatch) -> Tensor:
        pieces = scorer.body(scorer.batch([pairs[i] for i in places], alpha)).head_pieces()
        return torch.cat([piece.logps.view(2, -1) for piece in pieces], 1).T  # (P, 2)

    for places, logps in scorer.forwards(pairs, weighted):
        fresh[list(places)] = logps
    torch.testing.assert_close(found, fresh, rtol=1e-6, atol=1e-5)
    one = torch.tensor([len(pair.chosen) == len(pair.rejected) for pair in pairs])
    torch.testing.assert_close(found[one | (alpha == 1)], whole[one | (alpha == 1)])
    if alpha < 1:
        longer = torch.tensor([len(pair.chosen) > len(pair.rejected) for pair in pairs])
        assert (found[longer, 0] > whole[longer, 0]).all() and longer[12]
        assert found[0, 0] != found[12, 0]


# ---- whose numbers they are -------------------------------------------------------------------------------------


def print_of(folder: Path, layout: Any = "shared", dtype: torch.dtype = torch.float32) -> str:
    model = load_model(find_model(str(folder)))
    return fingerprint(model, hash_weights(model), layout, dtype)


@pytest.mark.parametrize(
    "change",
    [
        changed_weight("model.embed_tokens.weight", 0),
        changed_weight("model.layers.1.mlp.down_proj.weight", 77),
        changed_weight("model.norm.weight", -1),
        changed_weight("lm_head.weight", -1),
        changed_config("rope_theta", 10001.0),
        changed_config("rms_norm_eps", 1.1e-6),
        changed_config("hidden_act", "gelu"),
    ],
    ids=["embedding", "layer", "norm", "head", "rope_theta", "rms_norm_eps", "hidden_act"],
)
def test_another_model_has_another_fingerprint(tmp_path: Path, tiny: Path, change: Callable[[Path], None]) -> None:
    other = shutil.copytree(tiny, tmp_path / "other")
    assert print_of(other) == print_of(tiny)
    change(other)
    assert print_of(other) != print_of(tiny)


def test_another_computation_has_another_fingerprint(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(find_model(str(tiny)))
    weights = hash_weights(model)
    prints = {
        fingerprint(model, weights, layout, dtype)
        for layout in ("shared", "packed", "padded")
        for dtype in (torch.float32, torch.bfloat16)
    }
    monkeypatch.setattr("dpo_cli.models.fingerprint.SCORING_VERSION", 999)
    prints.add(fingerprint(model, weights, "shared", torch.float32))
    assert len(prints) == 7


def test_the_same_model_elsewhere_has_the_same_fingerprint(tmp_path: Path, tiny: Path) -> None:
    """Copied, saved in several files, with another generation config, loaded twice, run before."""
    copied = shutil.copytree(tiny, tmp_path / "copied")
    (copied / "generation_config.json").write_text(json.dumps({"temperature": 0.3, "do_sample": True}))
    model = load_model(find_model(str(tiny)))
    expected = fingerprint(model, hash_weights(model), "shared", torch.float32)
    model.save_pretrained(tmp_path / "cut", max_shard_size="60KB")
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) > 1
    model(torch.arange(9)[None])
    assert fingerprint(model, hash_weights(model), "shared", torch.float32) == expected
    assert [print_of(folder) for folder in (tiny, copied, tmp_path / "cut")] == [expected] * 3


def test_another_model_at_the_same_path_is_scored_anew(
    tmp_path: Path, tiny: Path, rows: Path, precompute: Precompute
) -> None:
    model = shutil.copytree(tiny, tmp_path / "model")
    precompute(rows)
    assert precompute(rows, model=model)["misses"] == 0  # a copy
    changed_weight("lm_head.weight", 5)(model)
    assert precompute(rows, model=model)["misses"] == 12
    assert precompute(rows, "--dtype", "bfloat16")["misses"] == 12
    assert precompute(rows)["misses"] == 0  # and nothing of the first was lost


# ---- damage -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Pair], Tensor]:
    """A cache of several shards, its pairs and their values."""
    folder = tmp_path_factory.mktemp("filled")
    pairs = random_pairs(12, seed=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dpo_cli.reference.store, "SHARD_SECONDS", -1.0)
        cache = open_cache(folder)
        fill(cache, pairs, make_scorer())
    assert len(shards(folder)) >= 4
    return folder, pairs, cache.lookup(pairs)


def flipped(content: bytearray, rng: random.Random) -> bytearray:
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return content


def truncated(content: bytearray, rng: random.Random) -> bytearray:
    return content[: rng.randrange(len(content))]


def zeroed(content: bytearray, rng: random.Random) -> bytearray:
    start = rng.randrange(len(content) - 64)
    content[start : start + 64] = bytes(64)
    return content


def prolonged(content: bytearray, rng: random.Random) -> bytearray:
    return content + bytes(rng.randrange(1, 9))


@pytest.mark.parametrize("damage", [flipped, truncated, zeroed, prolonged])
def test_a_damaged_shard_is_removed_and_computed_again(
    tmp_path: Path, filled: tuple[Path, list[Pair], Tensor], scorer: ModelRunner, damage: Any, forwards: list[int]
) -> None:
    """Its pairs and no others; the values are what they were."""
    source, pairs, values = filled
    rng = random.Random(damage.__name__)
    for seed in range(8):
        folder = shutil.copytree(source, tmp_path / str(seed))
        shard = rng.choice(shards(folder))
        content = shard.read_bytes()
        lost = len(load(content)["lengths"]) // 2
        shard.write_bytes(damage(bytearray(content), rng))
        assert shard.read_bytes() != content
        told: list[str] = []
        cache = open_cache(folder, told)
        assert len(told) == 1 and shard.stem[:12] in told[0] and "its content was changed" in told[0]
        assert len(missing(cache, pairs)) == lost
        assert not shard.exists()
        forwards.clear()
        fill(cache, pairs, scorer)
        assert sum(forwards) == lost
        torch.testing.assert_close(open_cache(folder).lookup(pairs), values, rtol=0, atol=NOISE)


def test_damage_is_told_by_the_command(rows: Path, tmp_path: Path, tiny: Path, precompute: Precompute) -> None:
    shard = shards(Path(precompute(rows)["cache_dir"]))[0]
    shard.write_bytes(flipped(bytearray(shard.read_bytes()), random.Random(3)))
    result, told = dpo("precompute-ref", "--data", rows, "--model", tiny, "--cache-dir", tmp_path / "cache")
    assert (result["hits"], result["misses"]) == (0, 12)
    assert f"warning: reference cache: {shard} is damaged" in told
    assert precompute(rows)["misses"] == 0


@pytest.mark.parametrize("foreign", ["text", "bytes", "no keys", "too few", "folder"])
def test_a_foreign_file_is_no_harm(tmp_path: Path, filled: tuple[Path, list[Pair], Tensor], foreign: str) -> None:
    """Files that someone put there, of another program or another version, also under a name like ours."""
    source, pairs, values = filled
    copied = shutil.copytree(source, tmp_path / "cache")
    folder = shards(copied)[0].parent
    if foreign == "text":
        (folder / "notes.txt").write_text("mine")
    if foreign == "bytes":
        (folder / "notes.safetensors").write_bytes(b"mine")
    if foreign == "folder":
        (folder / "backup.safetensors").mkdir()
    if foreign == "no keys":
        write_shard(folder, {"weight": torch.ones(3)})
    if foreign == "too few":
        write_shard(folder, {"keys": torch.zeros(2, KEY_BYTES, dtype=torch.uint8), "logps": torch.ones(1)})
    cache = open_cache(copied, [])
    assert missing(cache, pairs) == []
    assert torch.equal(cache.lookup(pairs), values)


# ---- interruption and company -----------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError("out of memory")])
def test_interrupted_fill_keeps_what_was_scored(
    tmp_path: Path, scorer: ModelRunner, monkeypatch: pytest.MonkeyPatch, forwards: list[int], error: Any
) -> None:
    pairs = random_pairs(12)
    original = ModelRunner.token_logps

    def failing(self: ModelRunner, batch: MicroBatch) -> Tensor:
        if len(forwards) == 3:
            raise error
        return original(self, batch)

    monkeypatch.setattr(ModelRunner, "token_logps", failing)
    with pytest.raises(error if isinstance(error, type) else type(error)):
        fill(open_cache(tmp_path), pairs, scorer)
    kept, scored = open_cache(tmp_path), sum(forwards)
    assert 0 < scored < 12
    assert len(missing(kept, pairs)) == 12 - scored
    monkeypatch.setattr(ModelRunner, "token_logps", original)
    filled = fill(kept, pairs, scorer)
    assert (filled.hits, filled.misses) == (scored, 12 - scored)
    whole = open_cache(tmp_path / "other")
    fill(whole, pairs, scorer)
    torch.testing.assert_close(open_cache(tmp_path).lookup(pairs), whole.lookup(pairs), rtol=0, atol=NOISE)


def _fill(folder: Path, pairs: list[Pair], together: Barrier | None, die_at: int | None) -> None:
    """In a process of its own: fill a cache, a shard a forward; kill oneself before a shard takes its name."""
    scorer = make_scorer()
    dpo_cli.reference.store.SHARD_SECONDS = -1.0
    cache = ReferenceCache(folder, "f" * 64, print)
    if die_at:
        settle, calls = Path.replace, iter(range(1000))  # the first is of about.json
        Path.replace = lambda *a: os.kill(os.getpid(), signal.SIGKILL) if next(calls) == die_at else settle(*a)  # type: ignore[method-assign, assignment, return-value]
    if together:
        together.wait(60)
    fill(cache, pairs, scorer)


@pytest.fixture
def start() -> Iterator[Callable[..., Any]]:
    started: list[Any] = []

    def run(*arguments: Any) -> Any:
        process = PROCESSES.Process(target=_fill, args=arguments)
        process.start()
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.join()


def test_several_processes_fill_one_cache(tmp_path: Path, scorer: ModelRunner, start: Callable[..., Any]) -> None:
    """All begin with an empty cache and have pairs in common; two have all in common."""
    pairs = random_pairs(24, seed=2)
    together = PROCESSES.Barrier(4)
    parts = (pairs[:14], pairs[8:22], pairs[:14], pairs[16:])
    processes = [start(tmp_path, part, together, None) for part in parts]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    cache = open_cache(tmp_path)
    assert cache.values.keys() == {key for pair in pairs for key in pair_keys(pair)}
    alone = open_cache(tmp_path / "alone")
    fill(alone, pairs, scorer)
    torch.testing.assert_close(cache.lookup(pairs), alone.lookup(pairs), rtol=0, atol=NOISE)
    assert [
        p for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".safetensors" and p.name != "about.json"
    ] == []


def test_killed_fills_lose_nothing_that_was_written(
    tmp_path: Path, scorer: ModelRunner, start: Callable[..., Any]
) -> None:
    """SIGKILL while the n-th shard is written, until it is done."""
    pairs = random_pairs(16, seed=3)
    rng = random.Random(5)
    unscored = len(pairs)
    for _ in range(3):
        shard = rng.randrange(2, 4)
        process = start(tmp_path, pairs, None, shard)
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        left = len(missing(open_cache(tmp_path), pairs))
        assert 0 < left <= unscored - (shard - 1)  # each shard before that one had a pair at least
        unscored = left
    cache = open_cache(tmp_path)
    assert fill(cache, pairs, scorer).misses == unscored
    alone = open_cache(tmp_path / "alone")
    fill(alone, pairs, scorer)
    torch.testing.assert_close(open_cache(tmp_path).lookup(pairs), alone.lookup(pairs), rtol=0, atol=NOISE)


@pytest.mark.parametrize("umask", [0o022, 0o027], ids=oct)
def test_shards_have_the_mode_of_any_new_file(tmp_path: Path, scorer: ModelRunner, umask: int) -> None:
    before = os.umask(umask)
    try:
        fill(open_cache(tmp_path), random_pairs(4), scorer)
    finally:
        os.umask(before)
    files = [p for p in tmp_path.rglob("*") if p.is_file() and p.name != "about.json"]
    assert files == shards(tmp_path) and files  # so no temporary file is left
    assert {f.stat().st_mode & 0o777 for f in files} == {0o666 & ~umask}


# ---- verify -----------------------------------------------------------------------------------------------------


def test_verify_finds_no_difference(rows: Path, precompute: Precompute, forwards: list[int]) -> None:
    result = precompute(rows, "--verify", 5)
    assert result["verified"] == 5 and sum(forwards) == 12 + 5
    assert 0 <= result["largest_difference"] < NOISE
    forwards.clear()
    assert precompute(rows, "--verify", 100)["verified"] == sum(forwards) == 12  # there are no more


def test_verify_finds_a_planted_difference(rows: Path, precompute: Precompute, tmp_path: Path, tiny: Path) -> None:
    """Exit code 1; the message has the difference, the rows, and the remedy, which helps."""
    folder = Path(precompute(rows)["cache_dir"])

    def change(logps: Tensor) -> Tensor:
        logps[7] -= 5
        return logps

    plant(folder, change)
    common = ("precompute-ref", "--data", rows, "--model", tiny, "--cache-dir", tmp_path / "cache", "--verify", 12)
    result = CliRunner().invoke(app, [*map(str, common)])
    assert result.exit_code == 1
    found = re.search(r"1 of 12 cached pairs are off by up to (\S+) nats, among them (\S+):(\d+)\.", result.stderr)
    assert found and float(found[1]) == pytest.approx(5, abs=0.01) and Path(found[2]) == rows
    remedy = re.search(r"remove (\S+),", result.stderr)
    assert remedy and Path(remedy[1]) == folder
    shutil.rmtree(folder)
    assert precompute(rows, "--verify", 12)["largest_difference"] < NOISE


def test_verify_is_told_to_a_person(tmp_path: Path, tiny: Path, rows: Path) -> None:
    arguments = ("precompute-ref", "--data", rows, "--model", tiny, "--cache-dir", tmp_path / "cache", "--verify", 3)
    result = CliRunner().invoke(app, [*map(str, arguments)])
    assert result.exit_code == 0
    kept, verified = result.stdout.splitlines()
    assert kept.startswith(f"12 pairs in the cache: {tmp_path}")
    assert verified.startswith("3 cached pairs computed again: log-probs differ by at most ")
    assert float(verified.split()[-2]) < NOISE
