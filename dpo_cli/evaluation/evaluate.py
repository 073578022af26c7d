"""``dpo eval``: what a policy learned and how far it is from its reference, with one model in memory at a time.

Legend: P pairs.
"""

from __future__ import annotations

import dataclasses
import gc
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dpo_cli.config.options import EvalOptions, TrainOptions
from dpo_cli.data.pairs import Ids, Pairs, trained_on
from dpo_cli.data.tokenize import reasons
from dpo_cli.evaluation import kl, statistics
from dpo_cli.evaluation.evaluator import EvalResult, Evaluator, loss_input
from dpo_cli.evaluation.examples import write_per_pair
from dpo_cli.evaluation.generation import Response, as_pairs, by_prompt, generate, sequence_kl, text
from dpo_cli.evaluation.metrics import LossInput
from dpo_cli.evaluation.metrics_log import History, best_step, evaluations, read_metrics
from dpo_cli.losses.objective import Objective
from dpo_cli.models.fingerprint import same_weights
from dpo_cli.models.loading import compile_layers, default_device, dtype_name, release
from dpo_cli.models.locate import ModelSource, start_model
from dpo_cli.models.logprobs import ModelRunner
from dpo_cli.reference.store import ReferenceCache
from dpo_cli.reporting.html import ReportInput, write_report
from dpo_cli.training.prepare import (
    ScoredModel,
    choose_model,
    choose_tokenizer,
    fill_reference,
    load_scored_model,
    read_pairs,
    refuse_unread_terms,
    weights_mode,
)
from dpo_cli.training.run_dir import read_manifest, reading_as_trained, trained_hashes, trained_with
from dpo_cli.utils.console import Reporter
from dpo_cli.utils.errors import UsageError

Show = Callable[[dict[str, Any]], None]


def run_eval(options: EvalOptions, reporter: Reporter, show: Show) -> None:
    """Evaluate a model on pairs, or compare two on the same pairs, and show the result.

    A run brings its own beta, truncation, control tokens, precision and reference, so that the numbers are those of
    its training. They are shown before any file is written, so that a full disk costs no evaluation.
    """
    names: list[str | None] = [*(options.model or ())] or [None]
    if len(names) > 2:
        raise UsageError("--model: name one model to evaluate, or two to compare")
    if len(names) == 1:
        evaluate(names[0], options, reporter, show)
        return
    if options.per_pair or options.report or options.samples or options.base_model:
        raise UsageError("--per-pair, --report, --samples and --base-model take one --model: evaluate each on its own")
    (first, pairs), (second, others) = (evaluate(name, options, reporter) for name in names)
    if first.scores.where != second.scores.where:
        raise UsageError("the two models read different rows, because of truncation: set --max-length")
    result: dict[str, Any] = {"pairs": len(pairs), "same_tokens": pairs.digest() == others.digest()}
    for name, each in (("a", first.to_dict()), ("b", second.to_dict())):
        result[name] = {key: each[key] for key in ("trained_on", "model", "reference", "beta") if key in each}
    if result["a"]["reference"] != result["b"]["reference"]:
        reporter.warning("the two models have different references: their rewards and KLs are not comparable")
    show(result | statistics.compare(first.scores, second.scores))


def evaluate(
    name: str | None, options: EvalOptions, reporter: Reporter, show: Show = lambda result: None
) -> tuple[EvalResult, Pairs]:
    """Evaluate one model, show its result, and write the files that were asked for."""
    source = choose_model(name, options, reporter, base=options.base_model)
    began = trained_with(source.run) if source.run else None
    source = _as_in_run(source, began)
    options = _as_trained(options, source, began)
    tokenizer = choose_tokenizer(source, options)
    rows = read_pairs(options.data, options, tokenizer, reporter)
    pairs = rows.pairs
    objective = dataclasses.replace(began.objective if began else Objective(), beta=cast(float, options.beta))
    evaluator = Evaluator(pairs, tokenizer, objective)
    refuse_unread_terms(objective, pairs)
    both = _TwoModels(options, source, began, evaluator, reporter)
    policy, reference, compared, samples = both.score()
    history = read_metrics(source.run / "metrics.jsonl") if source.run else []
    step = _step(source, began, history)
    history = [line for line in history if step is None or line["step"] <= step]
    scores = evaluator.scores(policy, reference, compared, both.loss_input, history, began.beta if began else None)
    manifest = read_manifest(source.run) if source.run else None
    as_in_run = began is not None and options.beta == began.beta and options.ref_model is None
    held_out = as_in_run and manifest is not None and manifest["held_out"]["sha256"] == pairs.digest()
    trained = trained_hashes(source.run, manifest, reporter.warning) if source.run and manifest else None
    overlap = trained_on(pairs, trained) if trained is not None else None
    about: dict[str, Any] = {"model": source.description, "reference": both.reference_name, "beta": options.beta}
    about |= {"rows": rows.rows, "refused": reasons(rows.refused), "pairs": len(pairs)}
    result = evaluator.result(scores, compared, history, held_out, overlap, about)
    result = dataclasses.replace(result, **samples)
    show(result.to_dict())
    if options.per_pair:
        write_per_pair(options.per_pair, pairs, scores)
    if options.report:
        write_report(
            options.report, ReportInput(source.description, result, history, manifest, vars(options), objective)
        )
        reporter.info("report", str(options.report))
    return result, pairs


def _step(source: ModelSource, began: TrainOptions | None, history: History) -> int | None:
    """The step after which a run had this model; None for its last one."""
    if source.checkpoint:
        return int(source.checkpoint.name.removeprefix("step-"))
    exported = source.adapter or Path(source.path)
    if began and began.save_best and source.run and exported == source.run / "best":
        return best_step(evaluations(history), began.save_best)
    return None


def _as_in_run(source: ModelSource, began: TrainOptions | None) -> ModelSource:
    """A policy or start model as a run had it: with its adapter attached and its base quantized."""
    if began is None or began.lora_rank is None:
        return source
    return dataclasses.replace(source, attached=source.adapter is not None, quantize=began.quantize)


def _as_trained(options: EvalOptions, source: ModelSource, began: TrainOptions | None) -> EvalOptions:
    """The options, filled in with what the run was trained with."""
    if options.samples and options.kl == "none":
        raise UsageError("--samples needs both models, as the exact KL does: leave out --kl none")
    reading = reading_as_trained(options, source)
    if options.compile and began and not began.compile:
        raise UsageError("--compile: the run was trained without it, and its numbers would differ")
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
class _PolicySamples:
    """What the policy answers to some prompts, greedily and sampled; the samples as pairs, with their hidden states."""

    prompts: list[Ids]
    greedy: list[list[Response]]
    sampled: list[list[Response]]
    pairs: Pairs
    recorded: kl.RecordedStates


@dataclass
class _TwoModels:
    """A policy and its reference over the same pairs; a loaded reference takes the policy's place in memory."""

    options: EvalOptions
    source: ModelSource
    began: TrainOptions | None  # the policy's training options, if it is of a run
    evaluator: Evaluator
    reporter: Reporter
    reference_name: str = ""
    loss_input: LossInput | None = None  # set when the policy was scored

    @property
    def pairs(self) -> Pairs:
        return self.evaluator.pairs

    @property
    def itself(self) -> bool:
        """Whether the model is its own reference."""
        return self.options.ref_model is None and self.source.run is None

    def score(self) -> tuple[Tensor, Tensor, kl.ModelComparison | None, dict[str, Any]]:
        """Log-probs (P, 2) of policy and reference, their comparison for ``--kl exact``, and what was sampled.

        The reference's log-probs are those of the cache, as in training, where it has them; without the exact KL its
        model is loaded only where the cache lacks pairs.
        """
        options, objective, exact = self.options, self.evaluator.objective, self.options.kl == "exact"
        policy = self._load(self.source, named=self.itself)
        recorded = kl.record(policy.runner, self.pairs, options.cache_dir, self._progress("policy")) if exact else None
        logps = None if exact else kl.score(policy.runner, self.pairs, self._progress("evaluate"))
        drawn = self._draw(policy) if options.samples else None
        read = self.evaluator.policy_read(policy.runner)
        if logps is not None and not objective.reference and options.ref_model is None:
            self.reference_name = f"none: --loss {objective.name} reads none"
            self.loss_input = loss_input(read, logps)
            return logps, torch.full_like(logps, math.nan), None, {}
        complete, reference = self._complete_cache(policy.runner), policy
        cache = complete
        if exact or cache is None:
            reference, opened = self._reference(policy, complete is not None)
            cache = complete or opened
        compared = self._compare(reference, recorded, self.pairs, "reference") if recorded else None
        if compared:
            logps, ref_logps = compared.logps, cache.lookup(self.pairs)
            if self.itself or ref_logps.isnan().any():
                ref_logps = compared.ref_logps
        else:
            ref_logps = fill_reference(cache, self.pairs, reference.runner, self.reporter).logps
        assert logps is not None
        self.loss_input = loss_input(read, self._discounted(cache, ref_logps, reference.runner))
        return logps, ref_logps, compared, self._samples(drawn, reference) if drawn else {}

    def _compare(
        self, reference: ScoredModel, policy: kl.RecordedStates, pairs: Pairs, name: str
    ) -> kl.ModelComparison:
        progress = self._progress(name)
        compared = kl.compare(reference.runner, policy, pairs, progress, policy_runs=False, same=self.itself)
        assert compared is not None
        return compared

    def _discounted(self, cache: ReferenceCache, logps: Tensor, runner: ModelRunner) -> Tensor:
        """Log-probs under the reference (P, 2) as LD-DPO reads them: from the cache, if it has all of them."""
        alpha = self.evaluator.objective.ld_alpha
        if alpha == 1:
            return logps
        if not cache.lookup(self.pairs).isnan().any():
            return cache.weighted(self.pairs, alpha)
        read = self.evaluator.policy_read(runner)  # the same pass over the reference
        assert read is not None
        return torch.from_numpy(read.logps)

    def _progress(self, name: str) -> kl.Progress:
        return kl.Progress(self.reporter, name)

    def _load(self, source: ModelSource, named: bool) -> ScoredModel:
        """Load a model onto the device; it is hashed only if ``named``."""
        began, device = self.began, default_device()
        frozen = began is not None and bool(began.lora_rank or (began.ref_model and source is not self.source))
        memory = weights_mode(began.memory if began else "full", frozen, self.options.dtype, device)
        model = load_scored_model(source, self.pairs, self.options, memory, device, self.reporter, hashed=named)
        model.split_weights(memory)
        if self.options.compile:
            compile_layers(model.model)
        return model

    def _complete_cache(self, runner: ModelRunner) -> ReferenceCache | None:
        """The run's cached reference, if it was computed as here and has all of these pairs."""
        if self.options.ref_model is not None or self.source.run is None:
            return None
        manifest = read_manifest(self.source.run)
        reference = manifest["reference"]
        computed = (runner.layout, dtype_name(runner.dtype), runner.device.type)
        if computed != (reference["layout"], reference["dtype"], manifest["device"]):
            return None
        cache = ReferenceCache(self.options.cache_dir, reference["fingerprint"], self.reporter.warning)
        self.reference_name = str(reference["model"] or manifest["start_model"])
        return None if cache.lookup(self.pairs).isnan().any() else cache

    def _reference(self, policy: ScoredModel, cached: bool = False) -> tuple[ScoredModel, ReferenceCache]:
        """Load the reference and open its cache; the policy's weights are released, unless it is its own reference.

        ``cached``: the cache has its log-probs, so that the evaluation could do without the model.

        Raises:
            UsageError: it cannot be loaded, or is not the model that the run began with.
        """
        if self.itself:
            self.reference_name = "the model itself"
            self.reporter.info("reference", "the model itself: it is not a run, and there is no --ref-model")
            return policy, policy.open_cache(self.options, self.reporter)
        release(policy.runner.model)
        gc.collect()
        of_run = self.source.run is not None and self.options.ref_model is None
        recorded = read_manifest(cast(Path, self.source.run))["reference"] if of_run else None
        try:
            name, base = start_model(recorded, self.options.base_model) if recorded else (self.options.ref_model, None)
            source = choose_model(name, self.options, self.reporter, "reference", base)
            if recorded and self.began and self.began.ref_model is None:
                source = _as_in_run(source, self.began)
            loaded = self._load(source, named=True)
        except UsageError as error:
            other = ", or add --kl none: its log-probs are cached" if cached else ""
            raise UsageError(f"the reference cannot be loaded; name it with --ref-model{other}\n{error}") from error
        self.reference_name = source.description
        if recorded and not same_weights(loaded.fingerprint, recorded["fingerprint"]):
            raise UsageError(f"{source.path} is no longer the model the run began with; name that one with --ref-model")
        return loaded, loaded.open_cache(self.options, self.reporter)

    # ---- samples ----

    def _draw(self, policy: ScoredModel) -> _PolicySamples:
        """Let the policy answer the first distinct prompts of the data, and record the sampled answers."""
        prompts = list({pair.prompt.tobytes(): pair.prompt for pair in self.pairs}.values())
        prompts = prompts[: self.options.sample_prompts]
        self.reporter.info("samples", f"{self.options.samples} answers to each of {len(prompts)} prompts")
        greedy, sampled = (self._answers(policy, prompts, sampled) for sampled in (False, True))
        pairs = as_pairs(prompts, sampled)
        recorded = kl.record(policy.runner, pairs, self.options.cache_dir, self._progress("samples"))
        assert recorded is not None
        return _PolicySamples(prompts, greedy, sampled, pairs, recorded)

    def _answers(self, model: ScoredModel, prompts: list[Ids], sampled: bool) -> list[list[Response]]:
        options, runner = self.options, model.runner
        return generate(
            cast(PreTrainedModel, runner.model),
            self.evaluator.tokenizer,
            prompts,
            model.own_attention,
            options.sample_tokens,
            sampled=sampled,
            copies=options.samples if sampled else 1,
            seed=options.seed,
            max_tokens=runner.max_tokens,
            dtype=runner.dtype,
        )

    def _samples(self, policy: _PolicySamples, reference: ScoredModel) -> dict[str, Any]:
        """Estimate the KL of whole responses, and let the reference answer too."""
        compared = self._compare(reference, policy.recorded, policy.pairs, "samples")
        estimate = sequence_kl(by_prompt(compared.distributions.kl, self.options.samples))
        ended = [response.ended for each in policy.sampled for response in each]
        estimate |= {"max_new_tokens": self.options.sample_tokens, "ended": sum(ended) / len(ended)}
        greedy, sampled = policy.greedy, policy.sampled
        if not self.itself:
            greedy, sampled = (self._answers(reference, policy.prompts, sampled) for sampled in (False, True))

        def texts(responses: list[Response]) -> list[str]:
            return [text(self.evaluator.tokenizer, response.ids) for response in responses]

        answers = [
            {
                "prompt": text(self.evaluator.tokenizer, prompt),
                "reference": texts(greedy[place])[0],
                "policy": texts(policy.greedy[place])[0],
                "reference_sampled": texts(sampled[place]),
                "policy_sampled": texts(policy.sampled[place]),
            }
            for place, prompt in enumerate(policy.prompts)
        ]
        return {"sequence_kl": estimate, "samples": answers}
