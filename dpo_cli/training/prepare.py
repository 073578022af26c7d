"""From options to pairs, a model that is ready to score them, and its cache: for train, eval and precompute-ref."""

from __future__ import annotations

import hashlib
import importlib.util
import random
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpo_cli.config.options import CACHE_DIR, DataOptions, EvalOptions, Options, PrecomputeOptions, TrainOptions
from dpo_cli.data.chat import NO_TEMPLATE
from dpo_cli.data.pairs import Pair, Pairs, model_input_ids, rankings
from dpo_cli.data.rows import read_rows
from dpo_cli.data.schedule import row_costs
from dpo_cli.data.sources import find_sources
from dpo_cli.data.tokenize import Encoder, PairSet, reasons, refusal, tokenize_rows
from dpo_cli.data.trees import most_tokens
from dpo_cli.losses.objective import Objective
from dpo_cli.losses.preference import LOSSES
from dpo_cli.models.adapter_files import read_config
from dpo_cli.models.adapters import cast_frozen_to_bf16, is_adapted, is_quantized, kind_of
from dpo_cli.models.attention import PREFIX_SHARED
from dpo_cli.models.converted import use_converted
from dpo_cli.models.fingerprint import fingerprint, hash_weights
from dpo_cli.models.layout import choose_layout
from dpo_cli.models.loading import compute_dtype, load_model, load_tokenizer
from dpo_cli.models.locate import ModelSource, find_model
from dpo_cli.models.logprobs import ModelRunner
from dpo_cli.models.noise import measure_noise
from dpo_cli.models.parallel import shard
from dpo_cli.models.quantized import admit
from dpo_cli.models.shapes import assume_layout
from dpo_cli.models.split_weights import split_master_weights
from dpo_cli.reference.store import ReferenceCache
from dpo_cli.training.checkpoint import verified_step
from dpo_cli.training.optimizer import SPLIT_MODES
from dpo_cli.training.run_dir import encoder_options, row_options
from dpo_cli.utils import distributed
from dpo_cli.utils.console import Reporter
from dpo_cli.utils.devices import DeviceKind, device_kind
from dpo_cli.utils.errors import UsageError, plural, reason_of


def choose_model(
    name: str | None,
    options: DataOptions,
    reporter: Reporter,
    what: str = "model",
    base: str | None = None,
    weights: bool = True,
) -> ModelSource:
    """Report where a model is loaded from; ``base`` is an adapter's, where that is not what the adapter names.

    ``weights``: whether they will be read.
    """
    source = find_model(name, options.trust_remote_code, base, weights)
    if source.checkpoint and verified_step(source.checkpoint) is None:
        raise UsageError(f"--model {name}: the checkpoint is damaged; take another, or the run's model/")
    computes = isinstance(options, Options) and weights
    if computes:
        source = admit(source, name, frozen=what == "reference")
    reporter.info(what, source.description)
    if source.gguf and weights:
        cache_dir = getattr(options, "cache_dir", CACHE_DIR)
        source = distributed.rank_0_first(lambda: use_converted(source, cache_dir, computes, reporter))
    if source.adapter:
        read_config(source.adapter, reporter.warning)
    if source.trust:
        reporter.warning(f"--trust-remote-code: Python code that comes with {source.path} runs with all your rights")
    return source


def check_reference(options: TrainOptions | EvalOptions) -> None:
    """Refuse a ``--ref-model`` that is packed in a way that is not read here, before any data is read."""
    if options.ref_model is not None:
        try:
            admit(find_model(options.ref_model, options.trust_remote_code), options.ref_model, frozen=True)
        except UsageError as error:
            raise UsageError(str(error).replace("--model", "--ref-model", 1)) from error


def choose_tokenizer(source: ModelSource, options: DataOptions) -> Any:
    """Load the model's tokenizer, with the chat template that was asked for."""
    tokenizer, file = load_tokenizer(source), options.chat_template
    if file:
        try:
            tokenizer.chat_template = file.expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError, RuntimeError) as error:
            raise UsageError(f"--chat-template {file}: cannot be read ({reason_of(error)})") from error
        if not tokenizer.chat_template.strip():
            raise UsageError(f"--chat-template {file}: the file is empty")
    return tokenizer


# ---- pairs ------------------------------------------------------------------------------------------------------


def read_pairs(data: list[str], options: Options, tokenizer: Any, reporter: Reporter, name: str = "data") -> PairSet:
    """Read and tokenize data, and report what it holds.

    Raises:
        UsageError: bad rows without ``--on-bad-row skip``, or no pair is left.
    """
    seed = getattr(options, "seed", None)
    sources = find_sources(data, "--eval-data" if name == "held out" else "--data", seed)
    read = read_rows(sources, options.columns, options.format, **row_options(options))
    rows = tokenize_rows(read, tokenizer, **encoder_options(options))
    rows.drawn = {each.name.partition(" ")[2]: len(each.drawn) for each in sources if each.drawn is not None}
    if rows.refused and (options.on_bad_row != "skip" or not rows.pairs):
        raise refusal(rows.refused, rows.rows)
    counts = f"{plural(rows.rows, 'row')}, {plural(len(rows.pairs), 'pair')}, {len(rows.refused):,} refused"
    reporter.info(name, f"{', '.join(data)}: {counts} ({', '.join(rows.formats)})")
    for each in sources:
        if each.drawn is not None:
            reporter.info("", f"{each.place}: {len(each.drawn):,} of its {each.rows:,} rows drawn")
    reporter.info("", f"the first: {_excerpt(rows.pairs[0], tokenizer)}")
    for reason, count in list(reasons(rows.refused).items())[:10]:
        reporter.info("", f"{count:,} refused: {reason}")
    for note, count in sorted(rows.notes.items()):
        what, _, about = note.partition(" ")
        reporter.info("", f"{plural(count, what.removesuffix('s'))} {about}")
    for name, column, usual in zip(("weights", "margins"), rows.pairs.terms.T, (1, 0), strict=True):
        if count := int(np.count_nonzero(column != usual)):
            values = f"{name} from {column.min():g} to {column.max():g}"
            reporter.info("", f"{values}, other than {usual} in {plural(count, 'pair')}")
    if rows.notes[NO_TEMPLATE]:  # what the policy learns to answer to goes with it
        tokenizer.chat_template = Encoder(tokenizer).chat.template.plain
    return rows


def _excerpt(pair: Pair, tokenizer: Any) -> str:
    """Format the prompt's end, the boundary and the beginning of the chosen response."""
    prompt, chosen = (tokenizer.decode(model_input_ids(ids)) for ids in (pair.prompt[-20:], pair.chosen[:12]))
    dots = ("…" * (len(pair.prompt) > 20), "…" * (len(pair.chosen) > 12))
    return f"{dots[0]}{prompt!r} | {chosen!r}{dots[1]}"


def hold_out(pairs: Pairs, fraction: float, seed: int) -> tuple[Pairs, Pairs]:
    """Split off a share of the pairs, at least one, by a seeded choice: (training, held out).

    Pairs of one prompt stay together, so that no held-out prompt is trained on.

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


def refuse_unread_terms(objective: Objective, pairs: Pairs) -> None:
    """Refuse rows with margins that the objective does not read."""
    if (pairs.terms[:, 1] != 0).any() and (ignoring := objective.ignored_by("margins")):
        able = ", ".join(name for name, loss in LOSSES.items() if "margins" in loss.reads)
        raise UsageError(f"--loss {ignoring} has no place for the rows' margins; leave them out, or take {able}")


# ---- a model that scores ----------------------------------------------------------------------------------------


@dataclass
class ScoredModel:
    """A model on its device, the way its forwards run, and the hash of the weights that it computes with.

    ``low``: the lower halves of its weights, where the memory mode splits them.
    """

    source: ModelSource
    runner: ModelRunner
    own_attention: str  # that it was loaded with
    weights: str
    low: dict[str, Tensor] | None = None

    @property
    def model(self) -> PreTrainedModel:
        """The model of the runner."""
        return cast(PreTrainedModel, self.runner.model)

    @cached_property
    def fingerprint(self) -> str:
        """The name of its log-probs in the cache; read it only when nothing changes the forward any more."""
        return fingerprint(self.model, self.weights, self.runner.layout, self.runner.dtype)

    def split_weights(self, memory: str, trains: bool = False) -> bool:
        """Split the weights if ``memory`` does and they are whole; a model that ``trains`` keeps the low halves.

        Of a model with an adapter the base is rounded for good.
        """
        if memory not in SPLIT_MODES or self.low is not None or is_quantized(self.model):
            return False
        self.weights = hashlib.sha256(f"{self.weights} halved".encode()).hexdigest()
        if is_adapted(self.model):
            cast_frozen_to_bf16(self.model)
        else:
            low = split_master_weights(self.model)
            self.low = low if trains else None
        measure_noise(self.runner)
        return True

    def open_cache(self, options: Options, reporter: Reporter) -> ReferenceCache:
        """Open what is on disk of its log-probs."""
        return ReferenceCache(options.cache_dir, self.fingerprint, reporter.warning, self.source.base)


def load_scored_model(
    source: ModelSource,
    pairs: Pairs,
    options: Options,
    memory: str,
    device: torch.device,
    reporter: Reporter,
    *,
    hashed: bool = True,
) -> ScoredModel:
    """Load a model whose weights are to be kept as ``memory`` does, and settle how its forwards over ``pairs`` run.

    ``hashed``: whether its fingerprint will be asked for. With ``--fsdp`` one rank of a host loads after the other, and
    the model is sharded.

    Raises:
        UsageError: a pair is too long for the model, or has a token that it does not know; the precision is not that of
            the memory mode's weights; or there is nothing to shard over.
    """
    fsdp = getattr(options, "fsdp", False)

    def load() -> tuple[PreTrainedModel, str]:
        model = load_model(source)
        weights = hash_weights(model) if hashed and source.weights else ""
        if fsdp:
            shard(model, device)
        return model, weights

    model, weights = distributed.one_rank_at_a_time(load) if fsdp else load()
    own_attention = model.config._attn_implementation
    kind = device_kind(device)
    dtype = compute_dtype(options.dtype, kind, memory in SPLIT_MODES)
    if memory in SPLIT_MODES and dtype != torch.bfloat16:
        raise UsageError(f"--dtype {options.dtype}: weights that --memory {memory} splits compute in bfloat16")
    limit = _check_pairs(model, pairs)
    _report_unread(model, reporter)
    if not is_quantized(model):  # else it is on the device already
        model.to(device)  # type: ignore[arg-type]  # transformers' annotation hides torch's
    max_tokens = options.max_tokens or kind.most_tokens
    tried = pairs + _sampled(pairs, options, limit)
    choose = choose_layout if source.weights else assume_layout
    runner, description = choose(model, tried, max_tokens, device, dtype)
    reporter.info("layout", description)
    if fsdp and runner.layout == "alone" and len(rankings(range(len(pairs)), pairs)) < len(pairs):
        raise UsageError("--fsdp: ranks run equally many forwards, and this model's rankings differ in theirs")
    runner.warn = reporter.warning
    if runner.layout == "shared" and not options.max_tokens:
        runner.max_tokens = most_tokens(pairs, kind.most_tokens)
    if runner.layout == "shared":
        model.set_attn_implementation(PREFIX_SHARED)
    return ScoredModel(source, runner, own_attention, weights)


def _check_pairs(model: PreTrainedModel, pairs: Pairs) -> int | None:
    """Refuse pairs that the model cannot read; returns the tokens of its longest sequence, if it names one."""
    vocabulary = cast(nn.Embedding, model.get_input_embeddings()).weight.shape[0]
    if (largest := int(model_input_ids(pairs.ids).max())) >= vocabulary:
        raise UsageError(
            f"the tokenizer gives the token {largest} and the model knows {vocabulary}: they do not fit. "
            "Take the model's own tokenizer; if tokens were added to it, give the model as many with transformers' "
            "resize_token_embeddings, train them, and start from that"
        )
    config = model.config.get_text_config()
    longest = max(row_costs(pairs, "padded")) // 2  # there both responses have their prompt
    limit: int | None = getattr(config, "max_position_embeddings", None)
    if limit is not None and longest > limit:
        dynamic = (getattr(config, "rope_parameters", None) or {}).get("rope_type") == "dynamic"
        why = "; beyond that its dynamic rope changes with the longest sequence of a forward" if dynamic else ""
        raise UsageError(
            f"a pair has {longest} tokens and the model is made for at most {limit} "
            f"(max_position_embeddings in its config.json{why}); set --max-length {limit}"
        )
    return limit


def _sampled(pairs: Pairs, options: Options, limit: int | None) -> Pairs:
    """Return pairs as long as answers to the shortest and the longest prompt that ``dpo eval --samples`` may score."""
    made = Pairs()
    if isinstance(options, EvalOptions) and options.samples:
        for place in pairs.lengths[:, 0].argsort()[[0, -1]].tolist():
            prompt, response = pairs[place].prompt, model_input_ids(pairs[place].chosen)
            room = min(options.sample_tokens, limit - len(prompt)) if limit else options.sample_tokens
            made.append(Pair("a sample", prompt, np.resize(response, room), response[:1]))
    return made


def _report_unread(model: PreTrainedModel, reporter: Reporter) -> None:
    """Report the parts of a checkpoint that text does not run through, which are not trained."""
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    if frozen and not is_adapted(model) and not is_quantized(model):
        parts = sorted({".".join(name.split(".")[:2]) for name in frozen})
        reporter.info("", f"not read by text, not trained, exported as they are: {', '.join(parts)}")
    if rows := getattr(model, "resized", None):
        reporter.info("", f"its base is resized to the {rows:,} tokens that the adapter was trained with")
    if not_loaded := getattr(model, "not_loaded", {}):
        parts = sorted({kind_of(name.rpartition(".")[0]) for name in not_loaded})[:5]
        kept = "a whole export keeps them" if all(not_loaded.values()) else "an export is without them"
        what = f"{len(not_loaded):,} tensors of the checkpoint are not part of the model ({', '.join(parts)})"
        reporter.info("", f"{what}; {kept}")


def weights_mode(memory: str, frozen: bool, dtype: str | None, kind: DeviceKind) -> str:
    """Return the ``--memory`` whose weights a model scores with; a ``frozen`` one is bfloat16 where it computes so.

    So the reference of an adapter is that of full trainings in the modes that split.
    """
    if not frozen or memory in SPLIT_MODES:
        return memory
    return "split" if kind.dtypes[0] == torch.bfloat16 and dtype != "float32" else "full"


def check_quantize(options: TrainOptions | PrecomputeOptions, source: ModelSource, kind: DeviceKind) -> None:
    """Refuse to quantize but on CUDA with bitsandbytes, and a model that is packed already."""
    problem = None
    if not kind.bitsandbytes:
        problem = "bitsandbytes packs weights on CUDA devices, and there is none; leave it out"
    elif importlib.util.find_spec("bitsandbytes") is None:
        problem = "needs the package bitsandbytes; pip install bitsandbytes"
    elif source.stored:
        problem = f"{source.description}: it is packed already; name a model with plain weights"
    if options.quantize and problem:
        raise UsageError(f"--load-in-{options.quantize}: {problem}")
