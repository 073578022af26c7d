"""``dpo eval``: what a policy learned and how far it is from its reference, with one model in memory at a time.

Legend: P pairs.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Mapping, Sequence
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
from dpo_cli.evaluation.diagnostics import count_new
from dpo_cli.evaluation.evaluator import Evaluation, Evaluator, write_per_pair
from dpo_cli.evaluation.gate import check_gates
from dpo_cli.evaluation.generation import (
    answer_text,
    as_pairs,
    by_prompt,
    end_turns,
    eos_ids,
    generate,
    sequence_kl,
    text,
    user_text,
)
from dpo_cli.evaluation.judge import Compare, Contest, Judge, by_reward, win_rate
from dpo_cli.evaluation.metrics import Table, best_step, evaluations, read_metrics
from dpo_cli.losses.objective import Objective
from dpo_cli.models.fingerprint import same_weights
from dpo_cli.models.loading import dtype_name, release
from dpo_cli.models.locate import ModelSource, find_model, start_model
from dpo_cli.models.logprobs import ModelRunner
from dpo_cli.reference.store import ReferenceCache, fill_reference
from dpo_cli.reporting.html import ReportInput, write_report
from dpo_cli.training.prepare import (
    ScoredModel,
    check_reference,
    choose_model,
    choose_tokenizer,
    hold_out,
    load_scored_model,
    read_pairs,
    refuse_unread_terms,
    weights_mode,
)
from dpo_cli.training.run_dir import encoder_options, read_manifest, row_options, trained_hashes, trained_with
from dpo_cli.utils.console import Reporter
from dpo_cli.utils.devices import device_kind, start
from dpo_cli.utils.errors import UsageError, plural

ITSELF = "the model itself"
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
    if options.per_pair or options.report or options.samples or options.base_model or options.gate:
        single = "--per-pair, --report, --samples, --gate and --base-model"
        raise UsageError(f"{single} take one --model: evaluate each on its own")
    (first, pairs), (second, others) = (evaluate(name, options, reporter) for name in names)
    result: dict[str, Any] = {"pairs": len(pairs), "same_tokens": pairs.digest() == others.digest()}
    for name, each in (("a", first.result), ("b", second.result)):
        result[name] = {key: each[key] for key in ("trained_on", "run", "model", "reference", "beta") if key in each}
    trained = max(each.result.get("trained_on", {}).get("pairs", 0) for each in (first, second))
    result["judged"] = count_new(len(pairs), trained)
    if result["a"]["reference"] != result["b"]["reference"]:
        reporter.warning("the two models have different references: their rewards and KLs are not comparable")
    show(result | statistics.compare(first.scores, second.scores))


def evaluate(
    name: str | None, options: EvalOptions, reporter: Reporter, show: Show = lambda result: None, fraction: float = 0.0
) -> tuple[Evaluation, Pairs]:
    """Evaluate one model, show its result, and write the files that were asked for.

    ``fraction``: that of the pairs which ``--eval-fraction`` held out in a training; 0: all of them.
    """
    source = choose_model(name, options, reporter, base=options.base_model)
    began, manifest = (trained_with(source.run), read_manifest(source.run)) if source.run else (None, None)
    source, options = as_in_run(source, began), _as_trained(options, source, began)
    if began and began.objective.uses("ranking_sizes") and options.pairs != "ranking":
        raise UsageError(f"--pairs {options.pairs}: the run's loss is of whole rankings; leave it out")
    check_reference(options)
    contest: Compare | None = by_reward(options.reward) if options.reward else None
    contest = Judge(options.judge, options.judge_model) if options.judge else contest
    tokenizer = choose_tokenizer(source, options)
    rows = read_pairs(options.data, options, tokenizer, reporter)
    pairs = hold_out(rows.pairs, fraction, options.seed)[1] if fraction else rows.pairs
    objective = dataclasses.replace(began.objective if began else Objective(), beta=cast(float, options.beta))
    refuse_unread_terms(objective, pairs)
    evaluator = Evaluator(pairs, tokenizer, objective)
    scored = _Models(options, source, began, manifest, evaluator, reporter).score()
    history = _history(source, began)
    scores = evaluator.scores(scored.tokens, scored.ref_logps, history, began.beta if began else None)
    held_out, overlap = False, None
    if source.run and began and manifest:
        same_rewards = options.beta == began.beta and options.ref_model is None
        held_out = same_rewards and manifest["held_out"]["sha256"] == pairs.digest()
        trained = trained_hashes(source.run, manifest, reporter.warning)
        overlap = trained_on(pairs, trained) if trained is not None else None
    about: dict[str, Any] = {"run": name} if source.run else {}
    about |= {"model": source.description, "reference": scored.reference, "beta": options.beta}
    about |= {"rows": rows.rows, "refused": reasons(rows.refused), "pairs": len(pairs)}
    samples = dict(scored.samples)
    if contest:
        try:
            samples["win_rate"] = win_rate(scored.contests, contest)
        except UsageError as error:  # of the user's function or the judge: the rest is not lost
            reporter.warning(f"{error}; so there is no win rate")
    evaluation = evaluator.evaluation(scores, scored.tokens, history, about, overlap, held_out, **samples)
    if options.gate:
        evaluation.result["gates"] = check_gates(options.gate, evaluation.result)
    show(evaluation.result)
    if options.per_pair:
        write_per_pair(options.per_pair, pairs, scores)
    if options.report:
        title = source.run.name if source.run else source.description
        of_run = vars(began) if began else None
        report = ReportInput(title, evaluation, history, manifest, of_run, objective, evaluated_with=vars(options))
        write_report(options.report, report)
        reporter.info("report", str(options.report))
    return evaluation, pairs


def _history(source: ModelSource, began: TrainOptions | None) -> list[dict[str, Any]]:
    """The lines of a run's metrics up to the step after which it had this model."""
    history = read_metrics(source.run / "metrics.jsonl") if source.run else []
    exported, step = source.adapter or Path(source.path), None
    if source.checkpoint:
        step = int(source.checkpoint.name.removeprefix("step-"))
    elif began and began.save_best and source.run and exported == source.run / "best":
        step = best_step(evaluations(history), began.save_best)
    return [line for line in history if step is None or line["step"] <= step]


def as_in_run(source: ModelSource, began: TrainOptions | None) -> ModelSource:
    """A policy or start model as a run had it: with its adapter attached and its base quantized."""
    if began is None or began.lora_rank is None:
        return source
    return dataclasses.replace(source, attached=source.adapter is not None, quantize=began.quantize)


def _as_trained(options: EvalOptions, source: ModelSource, began: TrainOptions | None) -> EvalOptions:
    """The options, filled in with what the run was trained with."""
    if options.samples and options.kl == "none":
        raise UsageError("--samples needs both models, as the exact KL does: leave out --kl none")
    return dataclasses.replace(
        options,
        **encoder_options(options, source.run),
        **row_options(options, source.run),
        dtype=options.dtype or (began.dtype if began else None),
        beta=options.beta or (began.beta if began else 0.1),
    )


@dataclass(frozen=True)
class _Scored:
    """Log-probs of both models, as for ``Evaluator.scores``; the reference's name; ``sequence_kl`` and ``samples``."""

    tokens: kl.TokenScores
    reference: str
    ref_logps: tuple[Table, Table] | None = None
    samples: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    contests: Sequence[Contest] = ()  # of the sampled answers of both


@dataclass(frozen=True)
class _Models:
    """A policy and its reference over the same pairs; a loaded reference takes the policy's place in memory.

    ``began`` and ``manifest`` are those of the run that the policy is of, if any.
    """

    options: EvalOptions
    source: ModelSource
    began: TrainOptions | None
    manifest: Mapping[str, Any] | None
    evaluator: Evaluator
    reporter: Reporter

    def score(self) -> _Scored:
        """Score the policy and its reference, compare them for ``--kl exact``, and sample.

        Without the exact KL the reference's log-probs are those of the cache, as in training; its model runs only where
        the cache lacks pairs.
        """
        pairs, objective, options = self.evaluator.pairs, self.evaluator.objective, self.options
        policy = self._load(self.source)
        itself = options.ref_model is None and self.source.run is None
        if itself:
            self.reporter.info("reference", "the model itself: it is not a run, and there is no --ref-model")
        if options.kl == "exact":
            return self._compare(policy, itself)
        tokens = kl.score(policy.runner, pairs, self.reporter.progress("evaluate", len(pairs)))
        if itself:
            return _Scored(tokens, ITSELF, (tokens.logps(), tokens.logps(0, objective.ld_alpha)))
        if not objective.reference and options.ref_model is None:
            none = np.full((len(pairs), 2), np.nan)
            return _Scored(tokens, f"none: --loss {objective.name} reads none", (none, none))
        cache, runner, name = self._reference_cache(policy)
        filled = fill_reference(cache, pairs, runner, self.reporter, objective.ld_alpha)
        return _Scored(tokens, name, (filled.logps.double().numpy(), filled.weighted.double().numpy()))

    def _compare(self, policy: ScoredModel, itself: bool) -> _Scored:
        """Run both models over the pairs, and over responses that the policy samples."""
        options, pairs, answers = self.options, self.evaluator.pairs, {}
        recorded = kl.record(policy.runner, pairs, options.cache_dir, self.reporter.progress("policy", len(pairs)))
        if options.samples:
            prompts = [*{pair.prompt.tobytes(): pair.prompt for pair in pairs}.values()][: options.sample_prompts]
            count = f"{plural(options.samples, 'answer')} to each of {plural(len(prompts), 'prompt')}"
            self.reporter.info("samples", count)
            answers["policy"] = self._answers(policy, prompts)
            drawn = as_pairs(prompts, answers["policy"][1])
            recorded_samples = kl.record(
                policy.runner, drawn, options.cache_dir, self.reporter.progress("samples", len(drawn))
            )
        reference = policy if itself else self._reference(policy)
        name = ITSELF if itself else reference.source.description
        compare = partial(kl.compare, reference.runner, policy_runs=False, same=itself)
        tokens = compare(recorded, pairs, self.reporter.progress("reference", len(pairs)))
        if not options.samples:
            return _Scored(tokens, name)
        token_kl = compare(recorded_samples, drawn, self.reporter.progress("samples", len(drawn))).distributions["kl"]
        ends = eos_ids(policy.model, self.evaluator.tokenizer)
        ended = [np.isin(response[-1:], ends).any() for responses in answers["policy"][1] for response in responses]
        estimate = sequence_kl(by_prompt(token_kl, options.samples))
        estimate |= {"max_new_tokens": options.sample_tokens, "ended": float(np.mean(ended))}
        answers["reference"] = answers["policy"] if itself else self._answers(reference, prompts)
        tokenizer, samples = self.evaluator.tokenizer, list[dict[str, Any]]()
        for place, prompt in enumerate(prompts):
            samples.append({"prompt": user_text(tokenizer, prompt)})
            for model, (greedy, sampled) in answers.items():
                scored = policy if model == "policy" else reference
                decode = partial(answer_text, scored.model, tokenizer)
                samples[-1] |= {model: decode(greedy[place][0]), f"{model}_sampled": [*map(decode, sampled[place])]}
        contests = [
            Contest(*(text(tokenizer, ids) for ids in (prompt, *two)))
            for place, prompt in enumerate(prompts)
            for two in zip(*(answers[model][1][place] for model in answers), strict=True)
        ]
        return _Scored(tokens, name, samples={"sequence_kl": estimate, "samples": samples}, contests=contests)

    def _answers(self, model: ScoredModel, prompts: list[Ids]) -> tuple[list[list[Ids]], list[list[Ids]]]:
        """Answer each prompt greedily, and with as many samples as ``--samples`` asks for."""
        options, tokenizer = self.options, self.evaluator.tokenizer
        end_turns(cast(Any, model.model), tokenizer)
        answer = partial(generate, model.runner, tokenizer, prompts, model.own_attention, options.sample_tokens)
        return answer(seed=options.seed), answer(options.samples, options.seed)

    @property
    def reference_of_run(self) -> Mapping[str, Any] | None:
        """The manifest's entry of the reference, unless ``--ref-model`` names another."""
        return self.manifest["reference"] if self.manifest and self.options.ref_model is None else None

    def _reference_cache(self, policy: ScoredModel) -> tuple[ReferenceCache, ModelRunner, str]:
        """The cache of the reference's log-probs, the model that fills it, and the reference's name.

        The run's cache needs no other model if its reference computed as the policy does and it has all of these pairs.
        """
        recorded, runner = self.reference_of_run, policy.runner
        same = (runner.layout, dtype_name(runner.dtype), runner.kind.name)
        if recorded and self.manifest and same == (recorded["layout"], recorded["dtype"], self.manifest["device"]):
            cache = ReferenceCache(self.options.cache_dir, recorded["fingerprint"], self.reporter.warning)
            if not cache.lookup(self.evaluator.pairs).isnan().any():
                name = str(recorded["model"] or self.manifest["start_model"])
                with suppress(UsageError):  # it may be gone, and is not loaded
                    start, base = start_model(recorded, self.options.base_model)
                    name = find_model(start, base=base).description
                return cache, runner, name
        reference = self._reference(policy)
        return reference.open_cache(self.options, self.reporter), reference.runner, reference.source.description

    def _load(self, source: ModelSource, hashed: bool = False) -> ScoredModel:
        """Load a model onto the device; it is hashed only where its fingerprint is asked for."""
        began, device = self.began, start(self.options.device)
        frozen = began is not None and bool(began.lora_rank or (began.ref_model and source is not self.source))
        memory = weights_mode(began.memory if began else "full", frozen, self.options.dtype, device_kind(device))
        pairs = self.evaluator.pairs
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
        recorded, options = self.reference_of_run, self.options
        try:
            name, base = start_model(recorded, options.base_model) if recorded else (options.ref_model, None)
            source = choose_model(name, options, self.reporter, "reference", base)
            if recorded and self.began and self.began.ref_model is None:
                source = as_in_run(source, self.began)
            loaded = self._load(source, hashed=True)
        except UsageError as error:
            raise UsageError(f"the reference cannot be loaded; name it with --ref-model\n{error}") from error
        if recorded and not same_weights(loaded.fingerprint, recorded["fingerprint"]):
            raise UsageError(f"{source.path} is no longer the model the run began with; name that one with --ref-model")
        return loaded
