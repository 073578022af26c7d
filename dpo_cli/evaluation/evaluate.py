"""`dpo eval`: what a policy learned and how far it is from its reference, one model in memory at a time.

Legend: P pairs.
"""

from __future__ import annotations

import dataclasses
import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dpo_cli.config.options import EvalOptions, TrainOptions
from dpo_cli.data.pairs import Ids, Pairs, trained_on
from dpo_cli.data.tokenize import reasons
from dpo_cli.evaluation import drift
from dpo_cli.evaluation.drift import Compared, Recorded, Watch
from dpo_cli.evaluation.examples import write_per_pair
from dpo_cli.evaluation.generation import Response, as_pairs, by_prompt, generate, sequence_kl, side_by_side
from dpo_cli.evaluation.margins import compared as compare_scores
from dpo_cli.evaluation.metrics import best_step, evaluations, read_metrics
from dpo_cli.evaluation.outcome import evaluation, loss_input, policy_read, scores_of
from dpo_cli.evaluation.scores import Evaluation, LossInput
from dpo_cli.losses.objective import Objective
from dpo_cli.models.fingerprint import WeightsHashCache, fingerprint, same_weights
from dpo_cli.models.loading import compile_layers, default_device, dtype_name, load_model, release
from dpo_cli.models.locate import ModelSource, start_model
from dpo_cli.models.logprobs import ModelRunner
from dpo_cli.reference.store import ReferenceCache
from dpo_cli.reporting.html import ReportInput, write_report
from dpo_cli.training.prepare import (
    choose_model,
    choose_tokenizer,
    fill_reference,
    halved_if_split,
    make_scorer,
    open_cache,
    read_pairs,
    refuse_unread_terms,
    tell_long,
    weights_mode,
)
from dpo_cli.training.setup import read_manifest, reading_as_trained, trained_hashes, trained_with
from dpo_cli.utils.console import Reporter
from dpo_cli.utils.errors import UsageError

Show = Callable[[dict[str, Any]], None]


def run_eval(options: EvalOptions, reporter: Reporter, show: Show) -> None:
    """`dpo eval`: evaluate a model on pairs, or two on the same ones, and show the result.

    A run brings its own beta, truncation, control tokens, precision and reference, so that the numbers are those of
    its training. They are shown before any file is written: a full disk costs no evaluation.
    """
    names: list[str | None] = [*(options.model or ())] or [None]
    if len(names) > 2:
        raise UsageError("--model: one model is evaluated, or two are compared")
    if len(names) == 1:
        evaluated(names[0], options, reporter, show)
        return
    if options.per_pair or options.report or options.samples or options.base_model:
        raise UsageError(
            "--per-pair, --report, --samples and --base-model are of one model: evaluate each on its own for them"
        )
    (first, pairs), (second, others) = (evaluated(name, options, reporter) for name in names)
    if first.scores.where != second.scores.where:
        raise UsageError("the two models use other rows: what one truncates away the other reads; set --max-length")
    told: dict[str, Any] = {"pairs": len(pairs), "same_tokens": pairs.digest() == others.digest()}
    for name, each in (("a", first.result), ("b", second.result)):
        told[name] = {about: each[about] for about in ("trained_on", "model", "reference", "beta") if about in each}
    if told["a"]["reference"] != told["b"]["reference"]:
        reporter.warning("the two models have other references: their rewards and KLs are measured from other points")
    show(told | compare_scores(first.scores, second.scores, options.seed))


def evaluated(
    name: str | None, options: EvalOptions, reporter: Reporter, show: Show = lambda result: None
) -> tuple[Evaluation, Pairs]:
    """Evaluate one model, show its result, and write the files that were asked for."""
    source = choose_model(name, options, reporter, base=options.base_model)
    began = trained_with(source.run) if source.run else None
    source = _as_in_run(source, began)
    options = _as_trained(options, source, began)
    tokenizer = choose_tokenizer(source, options)
    found = read_pairs(options.data, options, tokenizer, reporter)
    pairs = found.pairs
    judge = _Judge(options, source, began, tokenizer, pairs, reporter)
    refuse_unread_terms(judge.objective, pairs)
    more: dict[str, Any] = {}
    compared: Compared | None = None
    if options.kl == "none":
        policy, reference = judge.logps()
    else:
        policy, reference, compared, more = judge.distributions()
    assert options.beta is not None
    history = read_metrics(source.run / "metrics.jsonl") if source.run else []
    step = _step(source, began, history)
    so_far = [line for line in history if step is None or line["step"] <= step]
    at = began.beta if began else None
    scores = scores_of(pairs, policy, reference, judge.objective, compared, judge.loss_input, so_far, at)
    manifest = read_manifest(source.run) if source.run else None
    same = manifest is not None and began is not None and options.beta == began.beta and options.ref_model is None
    its_own = same and manifest is not None and manifest["held_out"]["sha256"] == pairs.digest()
    trained = trained_hashes(source.run, manifest, reporter.warning) if source.run and manifest else None
    known = trained_on(pairs, trained) if trained is not None else None
    done = evaluation(scores, compared, pairs, tokenizer, so_far, options.seed, held_out=its_own, trained_on=known)
    about: dict[str, Any] = {"trained_on": known} if known else {}
    about |= {"model": source.description, "reference": judge.told, "beta": options.beta}
    about |= {"rows": found.rows, "refused": reasons(found.refused), "pairs": len(pairs)}
    done = dataclasses.replace(done, result=about | done.result | more)
    show(dict(done.result))
    if options.per_pair:
        write_per_pair(options.per_pair, pairs, scores)
    if options.report:
        write_report(
            options.report, ReportInput(source.description, done, history, manifest, vars(options), judge.objective)
        )
        reporter.info("report", str(options.report))
    return done, pairs


def _step(source: ModelSource, began: TrainOptions | None, history: Sequence[dict[str, Any]]) -> int | None:
    """The step after which a run had this model; None of its last one."""
    if source.checkpoint:
        return int(source.checkpoint.name.removeprefix("step-"))
    exported = source.adapter or Path(source.path)
    if began and began.save_best and source.run and exported == source.run / "best":
        return best_step(evaluations(history), began.save_best)
    return None


def _as_in_run(source: ModelSource, began: TrainOptions | None) -> ModelSource:
    """A policy or start model as a run had it: with the adapter attached, its base quantized."""
    if began is None or began.lora_rank is None:
        return source
    return dataclasses.replace(source, attached=source.adapter is not None, quantize=began.quantize)


def _as_trained(options: EvalOptions, source: ModelSource, began: TrainOptions | None) -> EvalOptions:
    """The options with what a run was trained with, where they leave it open."""
    if options.samples and options.kl == "none":
        raise UsageError("--samples needs both models, as the exact KL does: leave out --kl none")
    reading = reading_as_trained(options, source)
    if options.compile and began and not began.compile:
        raise UsageError("--compile: the run was not trained so, and its numbers would be others")
    return dataclasses.replace(
        options,
        max_length=reading.max_length,
        control_tokens=reading.control_tokens,
        train_turns=reading.train_turns,
        dtype=options.dtype or (began.dtype if began else None),
        compile=began.compile if began else options.compile,
        beta=options.beta or (began.beta if began else 0.1),
    )


@dataclass(frozen=True)
class _Loaded:
    """A model that is ready to score, the attention that it came with, and its log-probs' name in the cache."""

    scorer: ModelRunner
    own_attention: str
    fingerprint: str


@dataclass(frozen=True)
class _Drawn:
    """What the policy answers to some prompts, greedily and drawn; the drawn ones as pairs, and recorded."""

    prompts: list[Ids]
    greedy: list[list[Response]]
    sampled: list[list[Response]]
    pairs: Pairs
    recorded: Recorded


@dataclass
class _Judge:
    """A policy and its reference over the same pairs; a loaded reference takes the policy's place in memory."""

    options: EvalOptions
    source: ModelSource
    began: TrainOptions | None  # what the policy was trained with, if it is of a run
    tokenizer: Any
    pairs: Pairs
    reporter: Reporter
    told: str = ""  # where the reference is from
    loss_input: LossInput | None = None  # known when the policy was scored

    @property
    def objective(self) -> Objective:
        """What the policy was trained with, at the beta that is asked for."""
        objective = self.began.objective if self.began else Objective()
        return dataclasses.replace(objective, beta=cast(float, self.options.beta))

    @property
    def itself(self) -> bool:
        """Whether the model is its own reference."""
        return self.options.ref_model is None and self.source.run is None

    def logps(self) -> tuple[Tensor, Tensor]:
        """Log-probs (P, 2) of policy and reference, whose model is loaded only if the cache lacks pairs."""
        policy = self._load(self.source, named=self.itself)
        logps = drift.score(policy.scorer, self.pairs, self._watch("evaluate"))
        assert logps is not None
        read = policy_read(policy.scorer, self.pairs, self.objective)
        if not self.objective.reference and self.options.ref_model is None:
            self.told = f"none: --loss {self.objective.name} reads none"
            self.loss_input = loss_input(read, logps)
            return logps, torch.full_like(logps, math.nan)
        cache, reference = self._kept(policy.scorer), policy
        if cache is None:
            reference, cache = self._reference(policy)
        known = fill_reference(cache, self.pairs, reference.scorer, self.reporter).logps
        self.loss_input = loss_input(read, self._discounted(cache, known, reference.scorer))
        return logps, known

    def distributions(self) -> tuple[Tensor, Tensor, Compared, dict[str, Any]]:
        """The same with their whole distributions, for which both models run; and what samples tell, if there are any.

        The reference's log-probs are those of the cache, as in training, unless it lacks some.
        """
        policy, folder = self._load(self.source, named=self.itself), self.options.cache_dir
        recorded = drift.record(policy.scorer, self.pairs, folder, self._watch("policy"))
        drawn = self._draw(policy) if self.options.samples else None
        assert recorded is not None
        read = policy_read(policy.scorer, self.pairs, self.objective)
        kept = self._kept(policy.scorer)
        reference, cache = self._reference(policy, kept is not None)
        about: dict[str, Any] = {"policy_runs": False, "same": self.itself}
        compared = drift.compare(reference.scorer, recorded, self.pairs, folder, self._watch("reference"), **about)
        assert compared is not None
        known = compared.ref_logps if self.itself else (kept or cache).lookup(self.pairs)
        self.loss_input = loss_input(read, self._discounted(kept or cache, known, reference.scorer))
        told = self._of_samples(drawn, reference, about) if drawn else {}
        return compared.logps, compared.ref_logps if known.isnan().any() else known, compared, told

    def _discounted(self, cache: ReferenceCache, logps: Tensor, scorer: ModelRunner) -> Tensor:
        """Log-probs under the reference (P, 2) as LD-DPO reads them: of the cache, where it has all of them."""
        alpha = self.objective.ld_alpha
        if alpha == 1:
            return logps
        if not logps.isnan().any():
            return cache.weighted(self.pairs, alpha)
        read = policy_read(scorer, self.pairs, dataclasses.replace(self.objective, wpo=False))
        assert read is not None
        return torch.from_numpy(read.logps)

    def _watch(self, what: str) -> Watch:
        return Watch(self.reporter, what)

    def _load(self, source: ModelSource, named: bool) -> _Loaded:
        """A model on the device; it is hashed only where it is to be ``named``."""
        began, device = self.began, default_device()
        frozen = began is not None and bool(began.lora_rank or (began.ref_model and source is not self.source))
        memory = weights_mode(began.memory if began else "full", frozen, self.options.dtype, device)
        memo = WeightsHashCache(source, self.options.cache_dir)
        model = load_model(source)
        own_attention = model.config._attn_implementation
        weights = memo.hash(model) if named else ""
        scorer = make_scorer(model, self.pairs, self.options, device, self.reporter, memory)
        weights = halved_if_split(model, weights, memory)[0]
        tell_long(scorer, self.pairs, self.reporter)
        if self.options.compile:
            compile_layers(model)
        return _Loaded(scorer, own_attention, fingerprint(model, weights, scorer.layout, scorer.dtype) if named else "")

    def _kept(self, scorer: ModelRunner) -> ReferenceCache | None:
        """What the run was trained with of the reference, if it was computed as here and has all of these pairs."""
        if self.options.ref_model is not None or self.source.run is None:
            return None
        manifest = read_manifest(self.source.run)
        began = manifest["reference"]
        here = (scorer.layout, dtype_name(scorer.dtype), scorer.device.type)
        if here != (began["layout"], began["dtype"], manifest["device"]):
            return None
        cache = ReferenceCache(self.options.cache_dir, began["fingerprint"], self.reporter.warning)
        self.told = str(began["model"] or manifest["start_model"])
        return None if cache.lookup(self.pairs).isnan().any() else cache

    def _reference(self, policy: _Loaded, known: bool = False) -> tuple[_Loaded, ReferenceCache]:
        """The reference's model, and the cache of its log-probs; the policy's weights are gone unless it is that.

        ``known``: its log-probs are in the cache, so that an evaluation could do without the model.

        Raises:
            UsageError: it cannot be loaded, or is another one than the run began with.
        """
        if self.itself:
            self.told = "the model itself"
            self.reporter.info("reference", "the model itself: it is no run, and there is no --ref-model")
            return policy, open_cache(self.options, policy.fingerprint, self.source, policy.scorer, self.reporter)
        release(policy.scorer.model)
        gc.collect()
        began = (
            read_manifest(self.source.run)["reference"] if self.source.run and self.options.ref_model is None else None
        )
        try:
            name, base = start_model(began, self.options.base_model) if began else (self.options.ref_model, None)
            source = choose_model(name, self.options, self.reporter, "reference", base)
            if began and self.began and self.began.ref_model is None:
                source = _as_in_run(source, self.began)
            loaded = self._load(source, named=True)
        except UsageError as error:
            other = ", or add --kl none: its log-probs are cached" if known else ""
            raise UsageError(f"the reference cannot be loaded; name it with --ref-model{other}\n{error}") from error
        self.told = source.description
        if began and not same_weights(loaded.fingerprint, began["fingerprint"]):
            raise UsageError(f"{source.path} is no longer the model the run began with; name that one with --ref-model")
        return loaded, open_cache(self.options, loaded.fingerprint, source, loaded.scorer, self.reporter)

    # ---- samples ----

    def _draw(self, policy: _Loaded) -> _Drawn:
        """Let the policy answer the first prompts of the data, none twice, and record the drawn answers."""
        prompts = list({pair.prompt.tobytes(): pair.prompt for pair in self.pairs}.values())
        prompts = prompts[: self.options.sample_prompts]
        self.reporter.info("samples", f"{self.options.samples} answers drawn to each of {len(prompts)} prompts")
        greedy, sampled = (self._answers(policy, prompts, sampled) for sampled in (False, True))
        pairs = as_pairs(prompts, sampled)
        recorded = drift.record(policy.scorer, pairs, self.options.cache_dir, self._watch("samples"))
        assert recorded is not None
        return _Drawn(prompts, greedy, sampled, pairs, recorded)

    def _answers(self, model: _Loaded, prompts: list[Ids], sampled: bool) -> list[list[Response]]:
        options, scorer = self.options, model.scorer
        return generate(
            cast(PreTrainedModel, scorer.model),
            self.tokenizer,
            prompts,
            model.own_attention,
            options.sample_tokens,
            sampled=sampled,
            copies=options.samples if sampled else 1,
            seed=options.seed,
            room=scorer.max_tokens,
            dtype=scorer.dtype,
        )

    def _of_samples(self, drawn: _Drawn, reference: _Loaded, about: dict[str, Any]) -> dict[str, Any]:
        """KL of whole responses, and what both models answer."""
        folder, watch = self.options.cache_dir, self._watch("samples")
        compared = drift.compare(reference.scorer, drawn.recorded, drawn.pairs, folder, watch, **about)
        assert compared is not None
        tables = compared.logps.numpy(), compared.ref_logps.numpy(), compared.distributions.kl
        found = sequence_kl(*(by_prompt(table.astype(float), self.options.samples) for table in tables))
        ended = [response.ended for each in drawn.sampled for response in each]
        found |= {"max_new_tokens": self.options.sample_tokens, "ended": sum(ended) / len(ended)}
        theirs = (self._answers(reference, drawn.prompts, sampled) for sampled in (False, True))
        greedy, sampled = (drawn.greedy, drawn.sampled) if self.itself else theirs
        shown = side_by_side(self.tokenizer, drawn.prompts, greedy, drawn.greedy, sampled, drawn.sampled)
        return {"sequence_kl": found, "samples": shown}
