"""From options to pairs, a scorer and their reference log-probs: what train, eval and precompute-ref share."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import random
from collections import defaultdict
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpo_cli.config.options import CACHE_DIR, DataOptions, EvalOptions, Options, PrecomputeOptions, TrainOptions
from dpo_cli.data.batching import row_costs
from dpo_cli.data.chat import NO_TEMPLATE
from dpo_cli.data.pairs import Pair, Pairs, count_loss_tokens, model_input_ids
from dpo_cli.data.rows import Reading, read_rows
from dpo_cli.data.sources import find_sources
from dpo_cli.data.tokenize import Encoder, PairSet, reasons, refusal, tokenize_rows
from dpo_cli.losses.objective import Objective
from dpo_cli.losses.preference import LOSSES
from dpo_cli.models.adapter_files import CONFIG, unknown_keys
from dpo_cli.models.adapters import cast_frozen_to_bf16, is_adapted, is_quantized
from dpo_cli.models.attention import PREFIX_SHARED
from dpo_cli.models.converted import use_converted
from dpo_cli.models.fingerprint import WeightsHashCache, fingerprint
from dpo_cli.models.layout import choose_layout
from dpo_cli.models.loading import (
    compile_layers,
    compute_dtype,
    dtype_name,
    load_model,
    load_tokenizer,
    with_vocabulary,
)
from dpo_cli.models.locate import ModelSource, find_model
from dpo_cli.models.logprobs import ModelRunner, logp_tolerance
from dpo_cli.models.lora_targets import kind_of
from dpo_cli.models.quantized import admit
from dpo_cli.models.sharding import shard
from dpo_cli.models.split_weights import split_master_weights
from dpo_cli.reference.store import ReferenceCache, ReferenceLogps, compute_missing, missing_places, tokens_of
from dpo_cli.training.checkpoint import verified_step
from dpo_cli.training.memory import MOST_TOKENS, fit, process_bytes
from dpo_cli.training.optimizer import SPLIT
from dpo_cli.utils import distributed
from dpo_cli.utils.console import Reporter
from dpo_cli.utils.errors import DpoError, UsageError


def choose_model(
    name: str | None, options: DataOptions, reporter: Reporter, what: str = "model", base: str | None = None
) -> ModelSource:
    """Report where a model is loaded from; ``base`` is an adapter's, where that is not what the adapter names."""
    source = find_model(name, options.trust_remote_code, base)
    if source.checkpoint and verified_step(source.checkpoint) is None:
        raise UsageError(f"--model {name}: the checkpoint is damaged; take another, or the run's model/")
    if isinstance(options, Options):  # it is to compute
        source = admit(source, name, options, frozen=what == "reference")
    reporter.info(what, source.description)
    if source.gguf:
        cache_dir = getattr(options, "cache_dir", CACHE_DIR)
        source = distributed.rank_0_first(
            lambda: use_converted(source, cache_dir, isinstance(options, Options), reporter)
        )
    if source.adapter and isinstance(options, Options):
        source = fit_adapter(source, reporter)
    if source.trust:
        reporter.warning(f"--trust-remote-code: Python code that comes with {source.path} runs with all your rights")
    return source


def fit_adapter(source: ModelSource, reporter: Reporter) -> ModelSource:
    """Report the tokens that the base of an adapter gets, and what of the adapter peft ignores; returns its source.

    Raises:
        UsageError: it cannot be loaded.
    """
    source, folder = with_vocabulary(source), cast(Path, source.adapter)
    if source.tokens:
        reporter.info("", f"its base is resized to the {source.tokens:,} tokens that the adapter was trained with")
    if ignored := unknown_keys(folder):
        keys = ", ".join(f"{name}: {json.dumps(value)}" for name, value in sorted(ignored.items()))
        reporter.warning(f"{folder / CONFIG}: peft {version('peft')} does not know and ignores {keys[:300]}")
    return source


def load_weights(source: ModelSource, options: Options, remember: bool = True) -> tuple[PreTrainedModel, str]:
    """The model and the hash of its weights, which is remembered for the next start."""
    memo = WeightsHashCache(source, options.cache_dir)
    model = load_model(source)
    return model, memo.hash(model, remember)


def load_spread(
    source: ModelSource, options: TrainOptions | PrecomputeOptions, device: torch.device, remember: bool = True
) -> tuple[PreTrainedModel, str]:
    """``load_weights`` on every rank, in shards where that is asked for: then one rank of a host after the other.

    Raises:
        UsageError: the options do not go with shards, or there is nothing to shard over.
    """
    if not options.fsdp:
        return load_weights(source, options, remember)
    if not distributed.is_launched():
        raise UsageError("--fsdp: there is one process to shard over; start it with torchrun")
    if options.memory not in ("auto", "full"):
        raise UsageError(
            f"--memory {options.memory}: shards would cut its blocks of moments differently; with --fsdp use full"
        )
    if options.quantize:
        raise UsageError(f"--load-in-{options.quantize}: shards are of what is trained; leave out --fsdp")
    if options.compile:
        raise UsageError("--compile: not with --fsdp, whose layers gather their weights as they run")

    def load() -> tuple[PreTrainedModel, str]:
        model, weights = load_weights(source, options, remember)
        shard(model, device)
        return model, weights

    return distributed.one_rank_at_a_time(load)


def open_cache(
    options: Options, fingerprint: str, source: ModelSource, scorer: ModelRunner, reporter: Reporter
) -> ReferenceCache:
    """What is on disk of a reference."""
    about = {
        "model": source.base,
        "from": source.description,
        "layout": scorer.layout,
        "dtype": dtype_name(scorer.dtype),
        "device": scorer.device.type,
    }
    return ReferenceCache(options.cache_dir, fingerprint, reporter.warning, about)


def reading_of(options: DataOptions) -> Reading:
    """How rows are read, where options are not given by their defaults."""
    given = {f.name: getattr(options, f.name, None) for f in dataclasses.fields(Reading)}
    return Reading(**{name: value for name, value in given.items() if value is not None})


def choose_tokenizer(source: ModelSource, options: DataOptions) -> Any:
    """The model's tokenizer, with the chat template that was asked for."""
    tokenizer, file = load_tokenizer(source), options.chat_template
    if file:
        try:
            tokenizer.chat_template = file.expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError, RuntimeError) as error:
            raise UsageError(f"--chat-template {file}: cannot be read ({error})") from error
        if not tokenizer.chat_template.strip():
            raise UsageError(f"--chat-template {file}: the file is empty")
    return tokenizer


def read_pairs(
    data: list[str],
    options: Options,
    tokenizer: Any,
    reporter: Reporter,
    name: str = "data",
) -> PairSet:
    """Read and tokenize data, and tell what was found.

    Raises:
        UsageError: bad rows without ``--on-bad-row skip``, or no pair is left.
    """
    skip = options.on_bad_row == "skip"
    sources = find_sources(data, "--eval-data" if name == "held out" else "--data")
    reading = reading_of(options)
    found = tokenize_rows(read_rows(sources, reading.columns, reading.format), tokenizer, reading)
    if found.refused and (not skip or not found.pairs):
        raise refusal(found.refused, found.rows)
    counts = f"{found.rows:,} rows, {len(found.pairs):,} pairs, {len(found.refused):,} refused"
    reporter.info(name, f"{', '.join(data)}: {counts} ({', '.join(found.formats)})")
    reporter.info("", f"the first: {_understood(found.pairs[0], tokenizer)}")
    for reason, count in list(reasons(found.refused).items())[:10]:
        reporter.info("", f"{count:,} refused: {reason}")
    for note, count in sorted(found.notes.items()):
        reporter.info("", f"{count:,} {note}")
    if terms := _describe_weights(found.pairs):
        reporter.info("", terms)
    if found.notes[NO_TEMPLATE]:  # what the policy learns to answer to goes with it
        tokenizer.chat_template = Encoder(tokenizer, Reading()).chat.template
    return found


def _understood(pair: Pair, tokenizer: Any) -> str:
    """A pair in short: the prompt's end, the boundary, the beginning of the chosen response."""
    prompt, chosen = (tokenizer.decode(model_input_ids(ids)) for ids in (pair.prompt[-20:], pair.chosen[:12]))
    dots = ("…" * (len(pair.prompt) > 20), "…" * (len(pair.chosen) > 12))
    return f"{dots[0]}{prompt!r} | {chosen!r}{dots[1]}"


def _describe_weights(pairs: Pairs) -> str:
    """The weights and margins of pairs in words; empty where no pair has any."""
    columns = zip(("weights", "margins"), pairs.terms.T, (1, 0), strict=True)
    return "; ".join(
        f"{name} from {column.min():g} to {column.max():g}, other than {usual} in {count:,} pairs"
        for name, column, usual in columns
        if (count := np.count_nonzero(column != usual))
    )


def make_scorer(
    model: PreTrainedModel, pairs: Pairs, options: Options, device: torch.device, reporter: Reporter, memory: str
) -> ModelRunner:
    """Move the model, whose weights are still whole, to the device and settle how its forwards run.

    Raises:
        UsageError: a pair is too long for the model, or has a token that it does not know; or the precision is not that
            of the memory mode's weights.
    """
    dtype = compute_dtype(options.dtype, device, memory in SPLIT)
    if memory in SPLIT and dtype != torch.bfloat16:
        raise UsageError(f"--dtype {options.dtype}: weights that --memory {memory} splits compute in bfloat16")
    known = cast(nn.Embedding, model.get_input_embeddings()).weight.shape[0]
    if pairs.largest_id() >= known:
        raise UsageError(
            f"the tokenizer gives the token {pairs.largest_id()} and the model knows {known}: they do not fit. Take "
            "the model's own tokenizer; if tokens were added to it, give the model as many with transformers' "
            "resize_token_embeddings, train them, and start from that"
        )
    _tell_unread(model, reporter)
    if not is_quantized(model):  # which is there already
        model.to(device)  # type: ignore[arg-type]  # transformers' annotation hides torch's
    max_tokens = options.max_tokens or MOST_TOKENS[device.type]
    longest = max(row_costs(pairs, "padded")) // 2  # there both responses have their prompt
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and longest > limit:
        raise UsageError(
            f"a pair has {longest} tokens and the model is made for at most {limit} "
            f"(max_position_embeddings in its config.json{_dynamic(model)}); set --max-length {limit}"
        )
    layout, apart, description = choose_layout(
        model, pairs + _sampled(pairs, options, limit), max_tokens, device, dtype
    )
    reporter.info("layout", description)
    if layout == "shared":
        model.set_attn_implementation(PREFIX_SHARED)
    return ModelRunner(model, layout, dtype, max_tokens, device, apart, reporter.warning)


def _dynamic(model: PreTrainedModel) -> str:
    """Why a model whose rotary embeddings stretch with a sequence is not given a longer one."""
    ropes = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    stretched = ropes.get("rope_type") == "dynamic"
    return "; beyond that its dynamic rope changes with the longest sequence of a forward" if stretched else ""


def _sampled(pairs: Pairs, options: Options, limit: int | None) -> Pairs:
    """Pairs as long as the answers to the shortest and the longest prompt that ``dpo eval --samples`` may score."""
    made = Pairs()
    if isinstance(options, EvalOptions) and options.samples:
        for place in pairs.lengths[:, 0].argsort()[[0, -1]].tolist():
            prompt, response = pairs[place].prompt, model_input_ids(pairs[place].chosen)
            room = min(options.sample_tokens, limit - len(prompt)) if limit else options.sample_tokens
            made.append(Pair("a sample", prompt, np.resize(response, room), response[:1]))
    return made


def _tell_unread(model: PreTrainedModel, reporter: Reporter) -> None:
    """Report what of a checkpoint text does not read, and so is not trained."""
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    if frozen and not is_adapted(model) and not is_quantized(model):
        parts = sorted({".".join(name.split(".")[:2]) for name in frozen})
        reporter.info("", f"not read by text, not trained, exported as they are: {', '.join(parts)}")
    if left := getattr(model, "not_loaded", {}):
        parts = sorted({kind_of(name.rpartition(".")[0]) for name in left})[:5]
        kept = "a whole export keeps them" if all(left.values()) else "an export is without them"
        reporter.info(
            "", f"{len(left):,} tensors of the checkpoint are not part of the model ({', '.join(parts)}); {kept}"
        )


def halved_if_split(model: PreTrainedModel, weights: str, memory: str) -> tuple[str, dict[str, Tensor] | None]:
    """The hash of the weights that compute, and their low halves where ``memory`` is a mode that splits them.

    Of a model with an adapter only the base is halved, for good.
    """
    if memory not in SPLIT or is_quantized(model):
        return weights, None
    hashed = hashlib.sha256(f"{weights} halved".encode()).hexdigest()
    if is_adapted(model):
        cast_frozen_to_bf16(model)
        return hashed, None
    return hashed, split_master_weights(model)


def weights_mode(memory: str, frozen: bool, dtype: str | None, device: torch.device) -> str:
    """The ``--memory`` whose weights a model scores with; a ``frozen`` one is kept in bfloat16 where that computes.

    So the reference of an adapter is that of full trainings in the modes that split.
    """
    if not frozen or memory in SPLIT:
        return memory
    return "split" if device.type == "cuda" and dtype != "float32" else "full"


def check_quantize(options: TrainOptions | PrecomputeOptions, source: ModelSource, device: torch.device) -> None:
    """Refuse to quantize where that cannot be done.

    Raises:
        UsageError: always, but on CUDA with bitsandbytes, in bfloat16 and of a model that is not packed already.
    """
    asked = f"--load-in-{options.quantize}"
    if options.quantize is None:
        return
    if device.type != "cuda":
        raise UsageError(f"{asked}: bitsandbytes packs weights on CUDA devices, and there is none; leave it out")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError(f"{asked}: needs the package bitsandbytes; pip install bitsandbytes")
    if options.dtype == "float32":
        raise UsageError(f"{asked}: computes in bfloat16; leave out --dtype float32")
    if source.gguf:
        raise UsageError(
            f"{asked}: {source.description} is a GGUF file; name the model's folder or its name on the hub"
        )
    admit(source, options.model, options)


def tell_long(scorer: ModelRunner, pairs: Sequence[Pair], reporter: Reporter) -> None:
    """Warn of pairs that are longer than a forward is planned to be."""
    most = scorer.max_tokens
    if scorer.layout != "alone" and (alone := sum(cost > most for cost in scorer.costs(pairs))):
        reporter.warning(f"{alone:,} pairs are longer than --max-tokens {most}; each gets a forward of its own")


def tell_cached(cache: ReferenceCache, pairs: Sequence[Pair], reporter: Reporter) -> tuple[Tensor, list[int]]:
    """Tell what the cache has of P pairs; returns that (P, 2), and the places of those to score, equal ones once."""
    logps = distributed.all_reduce_known(cache.lookup(pairs))
    missing = missing_places(logps, pairs)
    cached = len(pairs) - int(logps.isnan().any(dim=1).sum())
    todo = f"{len(missing):,} to score" if missing else "no reference forward"
    reporter.info("reference", f"{cached:,} of {len(pairs):,} pairs cached: {todo}")
    return logps, missing


def fill_reference(
    cache: ReferenceCache, pairs: Sequence[Pair], scorer: ModelRunner, reporter: Reporter
) -> ReferenceLogps:
    """Score what the cache lacks, and tell it."""
    logps, missing = tell_cached(cache, pairs, reporter)
    if not missing:
        return ReferenceLogps(logps, hits=len(pairs), misses=0)
    with reporter.progress("reference", sum(tokens_of(pairs[place]) for place in missing), unit="tok") as progress:
        filled = compute_missing(
            cache, pairs, scorer, lambda tokens: progress.advance(tokens * distributed.world_size())
        )  # as the others do
    rate = f"{filled.seconds:.1f} s ({filled.tokens / filled.seconds:,.0f} tokens/s)"
    reporter.info("", f"{filled.tokens:,} tokens in {rate}; kept in {cache.folder}")
    return filled


def precompute(options: PrecomputeOptions, reporter: Reporter) -> dict[str, Any]:
    """`dpo precompute-ref`: fill the cache, and on request compare some of it with fresh forwards.

    Raises:
        DpoError: a compared log-prob is off by more than arithmetic explains.
    """
    with distributed.started(lambda: "what was scored is kept, and the same command goes on from there") as accelerator:
        return _precompute(options, accelerator.device, reporter)


def _precompute(options: PrecomputeOptions, device: torch.device, reporter: Reporter) -> dict[str, Any]:
    distributed.check_same_command(options)
    source = choose_model(options.model, options, reporter, base=options.base_model)
    check_quantize(options, source, device)
    source = dataclasses.replace(source, quantize=options.quantize)
    tokenizer = choose_tokenizer(source, options)
    found = read_pairs(options.data, options, tokenizer, reporter)
    pairs = found.pairs
    process = process_bytes(device)
    model, weights = load_spread(source, options, device)
    scorer = make_scorer(model, pairs, options, device, reporter, options.memory)
    tell_long(scorer, pairs, reporter)
    if options.quantize:
        memory, trained = "full", f"--load-in-{options.quantize}"
    else:
        memory = fit(scorer, pairs, process, options.memory, False, options.max_tokens).memory
        trained = f"--memory {memory}"
    reporter.info("memory", f"scored for dpo train {trained}")
    weights = halved_if_split(model, weights, memory)[0]
    if options.compile:
        compile_layers(model)
    name = fingerprint(model, weights, scorer.layout, scorer.dtype)
    if distributed.world_size() > 1:
        distributed.check_same(the_data=pairs.digest(), the_model=name)
    cache = open_cache(options, name, source, scorer, reporter)
    filled = fill_reference(cache, pairs, scorer, reporter)
    result: dict[str, Any] = {
        "rows": found.rows,
        "refused": reasons(found.refused),
        "pairs": len(pairs),
        "hits": filled.hits,
        "misses": filled.misses,
        "tokens": filled.tokens,
        "seconds": round(filled.seconds, 3),
        "cache_dir": str(cache.folder),
    }
    if options.verify:
        places = random.Random(0).sample(range(len(pairs)), min(options.verify, len(pairs)))
        result |= {"verified": len(places), "largest_difference": _verify(filled.logps, pairs, places, scorer, cache)}
    return result


def _verify(
    cached: Tensor, pairs: Sequence[Pair], places: list[int], scorer: ModelRunner, cache: ReferenceCache
) -> float:
    """The largest difference between cached (P, 2) and fresh log-probs of some pairs, in nats."""
    chosen = [pairs[place] for place in places]
    largest = 0.0
    bad = []
    for indices, logps, _ in scorer.score(chosen):
        for i, fresh in zip(indices, logps.view(2, -1).T.cpu(), strict=True):  # (2,)
            off = (fresh - cached[places[i]]).abs()
            largest = max(largest, float(off.max()))
            tokens = torch.tensor([count_loss_tokens(chosen[i].chosen), count_loss_tokens(chosen[i].rejected)])
            if not bool((off <= logp_tolerance(scorer.dtype) * tokens.sqrt()).all()):
                bad.append(chosen[i].where)
    if bad:
        raise DpoError(
            f"--verify: {len(bad)} of {len(places)} cached pairs are off by up to {largest:.3g} nats, among them "
            f"{', '.join(bad[:5])}. Something changed them: remove {cache.folder}, and they are recomputed"
        )
    return largest


def refuse_unread_terms(objective: Objective, pairs: Pairs) -> None:
    """Refuse rows with margins that the objective does not read.

    Raises:
        UsageError: there are such rows.
    """
    if (pairs.terms[:, 1] != 0).any() and (ignoring := objective.ignored_by("margins")):
        able = ", ".join(name for name, loss in LOSSES.items() if "margins" in loss.reads)
        raise UsageError(f"--loss {ignoring} has no place for the rows' margins; leave them out, or take {able}")


def hold_out(pairs: Pairs, fraction: float, seed: int) -> tuple[Pairs, Pairs]:
    """Split off a share of the pairs, at least one, by a seeded choice: (training, held out).

    Pairs of one prompt stay together, or what is learned of a prompt would be asked again.

    Raises:
        UsageError: nothing would be left to train on.
    """
    count, prompts = max(1, round(len(pairs) * fraction)), defaultdict(list)
    for place, pair in enumerate(pairs):
        prompts[pair.prompt.tobytes()].append(place)
    groups, out = list(prompts.values()), set[int]()
    drawn = random.Random(f"{seed}/held out").sample(groups, min(count, len(groups)))
    for group in drawn:
        if len(out) + len(group) <= count:
            out.update(group)
    out = out or {*min(drawn, key=len)}
    if len(out) == len(pairs):
        together = "; pairs of one prompt stay together" if len(pairs) > 1 else ""
        raise UsageError(f"--eval-fraction {fraction}: leaves no pair of {len(pairs)} to train on{together}")
    return pairs.select([i for i in range(len(pairs)) if i not in out]), pairs.select(sorted(out))
