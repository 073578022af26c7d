"""``dpo eval``: what a policy learned and how far it is from its reference, with one model in memory at a time.

Legend: P pairs.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np

from dpo_cli.config.options import EvalOptions, TrainOptions
from dpo_cli.data.pairs import Ids, Pairs, trained_on
from dpo_cli.data.tokenize import reasons
from dpo_cli.evaluation import kl, statistics
from dpo_cli.evaluation.evaluator import EvalResult, Evaluator
from dpo_cli.evaluation.examples import write_per_pair
from dpo_cli.evaluation.generation import as_pairs, by_prompt, eos_ids, generate, sequence_kl, text
from dpo_cli.evaluation.metrics import Table
from dpo_cli.evaluation.metrics_log import History, best_step, evaluations, read_metrics
from dpo_cli.losses.objective import Objective
from dpo_cli.models.fingerprint import same_weights
from dpo_cli.models.loading import default_device, dtype_name, release
from dpo_cli.models.locate import ModelSource, find_model, start_model
from dpo_cli.reference.store import ReferenceCache, fill_reference
from dpo_cli.reporting.html import ReportInput, write_report
from dpo_cli.training.prepare import (
    ScoredModel,
    check_reference,
    choose_model,
    choose_tokenizer,
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
    began, manifest = (trained_with(source.run), read_manifest(source.run)) if source.run else (None, None)
    source, options = _as_in_run(source, began), _as_trained(options, source, began)
    check_reference(options)
    tokenizer = choose_tokenizer(source, options)
    rows = read_pairs(options.data, options, tokenizer, reporter)
    pairs = rows.pairs
    objective = dataclasses.replace(began.objective if began else Objective(), beta=cast(float, options.beta))
    refuse_unread_terms(objective, pairs)
    evaluator = Evaluator(pairs, tokenizer, objective)
    models = _Models(options, source, began, evaluator, reporter)
    tokens, samples = models.score()
    history = _history(source, began)
    scores = evaluator.scores(tokens, models.ref_logps, history, began.beta if began else None)
    held_out, overlap = False, None
    if source.run and began and manifest:
        as_in_run = options.beta == began.beta and options.ref_model is None
        held_out = as_in_run and manifest["held_out"]["sha256"] == pairs.digest()
        trained = trained_hashes(source.run, manifest, reporter.warning)
        overlap = trained_on(pairs, trained) if trained is not None else None
    about: dict[str, Any] = {"model": source.description, "reference": models.reference_name, "beta": options.beta}
    about |= {"rows": rows.rows, "refused": reasons(rows.refused), "pairs": len(pairs)}
    result = evaluator.result(scores, tokens, history, held_out, overlap, about=about, **samples)
    show(result.to_dict())
    if options.per_pair:
        write_per_pair(options.per_pair, pairs, scores)
    if options.report:
        report = ReportInput(source.description, result, history, manifest, vars(options), objective)
        write_report(options.report, report)
        reporter.info("report", str(options.report))
    return result, pairs


def _history(source: ModelSource, began: TrainOptions | None) -> History:
    """The lines of a run's metrics up to the step after which it had this model."""
    history = read_metrics(source.run / "metrics.jsonl") if source.run else []
    exported, step = source.adapter or Path(source.path), None
    if source.checkpoint:
        step = int(source.checkpoint.name.removeprefix("step-"))
    elif began and began.save_best and source.run and exported == source.run / "best":
        step = best_step(evaluations(history), began.save_best)
    return [line for line in history if step is None or line["step"] <= step]


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
    return dataclasses.replace(
        options,
        max_length=reading.max_length,
        control_tokens=reading.control_tokens,
        train_turns=reading.train_turns,
        dtype=options.dtype or (began.dtype if began else None),
        beta=options.beta or (began.beta if began else 0.1),
    )


@dataclass
class _Models:
    """A policy and its reference over the same pairs; a loaded reference takes the policy's place in memory."""

    options: EvalOptions
    source: ModelSource
    began: TrainOptions | None  # the policy's training options, if it is of a run
    evaluator: Evaluator
    reporter: Reporter
    reference_name: str = ""
    ref_logps: tuple[Table, Table] | None = None  # where ``tokens`` are of the policy alone, see ``Evaluator.scores``

    @property
    def itself(self) -> bool:
        """Whether the model is its own reference."""
        return self.options.ref_model is None and self.source.run is None

    def score(self) -> tuple[kl.TokenScores, dict[str, Any]]:
        """Score the policy and its reference, compare them for ``--kl exact``, and sample.

        Without the exact KL the reference's log-probs are those of the cache, as in training; its model runs only where
        the cache lacks pairs.
        """
        pairs, objective = self.evaluator.pairs, self.evaluator.objective
        policy = self._load(self.source)
        if self.itself:
            self.reference_name = "the model itself"
            self.reporter.info("reference", "the model itself: it is not a run, and there is no --ref-model")
        if self.options.kl == "exact":
            return self._compare(policy)
        tokens = kl.score(policy.runner, pairs, self._progress("evaluate"))
        if self.itself:
            tokens = dataclasses.replace(tokens, tokens=tokens.tokens.expand(-1, 2))
        elif not objective.reference and self.options.ref_model is None:
            self.reference_name = f"none: --loss {objective.name} reads none"
            none = np.full((len(pairs), 2), np.nan)
            self.ref_logps = none, none
        else:
            self.ref_logps = self._cached_logps(policy)
        return tokens, {}

    def _cached_logps(self, policy: ScoredModel) -> tuple[Table, Table]:
        """Return the reference's log-probs, and those with the token weights of LD-DPO: (P, 2) each."""
        pairs, alpha, reference = self.evaluator.pairs, self.evaluator.objective.ld_alpha, policy
        cache = self._complete_cache(policy)
        if cache is None:
            reference = self._reference(policy)
            cache = reference.open_cache(self.options, self.reporter)
        found = fill_reference(cache, pairs, reference.runner, self.reporter, alpha)
        return found.logps.double().numpy(), found.weighted.double().numpy()

    def _complete_cache(self, policy: ScoredModel) -> ReferenceCache | None:
        """Open the cache of the run's reference, if that computed as the policy does and has all of these pairs."""
        if self.options.ref_model is not None or self.source.run is None:
            return None
        manifest, runner = read_manifest(self.source.run), policy.runner
        recorded = manifest["reference"]
        cache = ReferenceCache(self.options.cache_dir, recorded["fingerprint"], self.reporter.warning)
        same = (runner.layout, dtype_name(runner.dtype), runner.device.type)
        if same != (recorded["layout"], recorded["dtype"], manifest["device"]):
            return None
        if cache.lookup(self.evaluator.pairs).isnan().any():
            return None
        self.reference_name = str(recorded["model"] or manifest["start_model"])
        with suppress(UsageError):  # it may be gone, and is not loaded
            name, base = start_model(recorded, self.options.base_model)
            self.reference_name = find_model(name, base=base).description
        return cache

    def _compare(self, policy: ScoredModel) -> tuple[kl.TokenScores, dict[str, Any]]:
        """Run both models over the pairs, and over responses that the policy samples."""
        options, pairs, decode = self.options, self.evaluator.pairs, partial(text, self.evaluator.tokenizer)
        recorded = kl.record(policy.runner, pairs, options.cache_dir, self._progress("policy"))
        if options.samples:
            prompts = [*{pair.prompt.tobytes(): pair.prompt for pair in pairs}.values()][: options.sample_prompts]
            self.reporter.info("samples", f"{options.samples} answers to each of {len(prompts)} prompts")
            greedy, sampled = self._answers(policy, prompts, 0), self._answers(policy, prompts, options.samples)
            drawn = as_pairs(prompts, sampled)
            recorded_samples = kl.record(policy.runner, drawn, options.cache_dir, self._progress("samples"))
        reference = policy if self.itself else self._reference(policy)
        compare = partial(kl.compare, reference.runner, policy_runs=False, same=self.itself)
        tokens = compare(recorded, pairs, self._progress("reference"))
        if not options.samples:
            return tokens, {}
        token_kl = compare(recorded_samples, drawn, self._progress("samples")).distributions["kl"]
        ends = eos_ids(policy.model, self.evaluator.tokenizer)
        ended = [np.isin(response[-1:], ends).any() for responses in sampled for response in responses]
        estimate = sequence_kl(by_prompt(token_kl, options.samples))
        estimate |= {"max_new_tokens": options.sample_tokens, "ended": float(np.mean(ended))}
        answers = {"policy": greedy, "policy_sampled": sampled, "reference": greedy, "reference_sampled": sampled}
        if not self.itself:
            answers["reference"] = self._answers(reference, prompts, 0)
            answers["reference_sampled"] = self._answers(reference, prompts, options.samples)
        samples: list[dict[str, Any]] = [{"prompt": decode(prompt)} for prompt in prompts]
        for name, responses in answers.items():
            for sample, of_prompt in zip(samples, responses, strict=True):
                texts = [decode(response) for response in of_prompt]
                sample[name] = texts if name.endswith("_sampled") else texts[0]
        return tokens, {"sequence_kl": estimate, "samples": samples}

    def _answers(self, model: ScoredModel, prompts: list[Ids], copies: int) -> list[list[Ids]]:
        """Sample so many answers to each prompt; the greedy one for 0."""
        return generate(
            model.model,
            self.evaluator.tokenizer,
            prompts,
            model.own_attention,
            self.options.sample_tokens,
            sampled=copies > 0,
            copies=copies or 1,
            seed=self.options.seed,
            max_tokens=model.runner.max_tokens,
            dtype=model.runner.dtype,
        )

    def _progress(self, name: str) -> kl.Progress:
        return kl.Progress(self.reporter, name)

    def _load(self, source: ModelSource, hashed: bool = False) -> ScoredModel:
        """Load a model onto the device; it is hashed only where its fingerprint is asked for."""
        began, device, pairs = self.began, default_device(), self.evaluator.pairs
        frozen = began is not None and bool(began.lora_rank or (began.ref_model and source is not self.source))
        memory = weights_mode(began.memory if began else "full", frozen, self.options.dtype, device)
        model = load_scored_model(source, pairs, self.options, memory, device, self.reporter, hashed=hashed)
        model.split_weights(memory)
        return model

    def _reference(self, policy: ScoredModel) -> ScoredModel:
        """Load the reference in the place of the policy.

        Raises:
            UsageError: it cannot be loaded, or is not the model that the run began with.
        """
        release(policy.model)
        gc.collect()
        of_run = self.source.run is not None and self.options.ref_model is None
        recorded = read_manifest(cast(Path, self.source.run))["reference"] if of_run else None
        try:
            name, base = start_model(recorded, self.options.base_model) if recorded else (self.options.ref_model, None)
            source = choose_model(name, self.options, self.reporter, "reference", base)
            if recorded and self.began and self.began.ref_model is None:
                source = _as_in_run(source, self.began)
            loaded = self._load(source, hashed=True)
        except UsageError as error:
            raise UsageError(f"the reference cannot be loaded; name it with --ref-model\n{error}") from error
        self.reference_name = source.description
        if recorded and not same_weights(loaded.fingerprint, recorded["fingerprint"]):
            raise UsageError(f"{source.path} is no longer the model the run began with; name that one with --ref-model")
        return loaded
