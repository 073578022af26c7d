"""Answers that a model gives itself: drawn or greedy, to be looked at, and to estimate KL(policy || reference) from.

Legend: P pairs, K samples a prompt.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from dpo_cli.data.pairs import Ids, Pair, Pairs, model_input_ids
from dpo_cli.evaluation.scores import Table
from dpo_cli.evaluation.statistics import student
from dpo_cli.models.attention import attention
from dpo_cli.models.logprobs import out_of_memory, precision
from dpo_cli.utils.errors import DpoError

ENDS_OF = 256  # pairs whose last token is looked at


@dataclass(frozen=True, slots=True)
class Response:
    """What a model answered: token ids up to its EOS, which is the last of them if it ``ended`` by itself."""

    ids: Ids
    ended: bool


@dataclass(frozen=True, slots=True)
class _Row:
    """One response to be generated: the ``copy``-th to the prompt at this ``place``, of ``tokens`` at most."""

    place: int
    copy: int
    prompt: Ids
    tokens: int


# ---- generation -------------------------------------------------------------------------------------------------


def generate(
    model: PreTrainedModel,
    tokenizer: Any,
    prompts: Sequence[Ids],
    own_attention: str,
    tokens: int,
    *,
    sampled: bool,
    copies: int = 1,
    seed: int = 0,
    room: int,
    dtype: torch.dtype = torch.float32,
) -> list[list[Response]]:
    """Answer each prompt ``copies`` times: greedily, or ``sampled`` at temperature 1 from the model's own distribution.

    Nothing shapes the distribution: of the model's generation config its EOS ids are all that is used. A response is
    cut at so many ``tokens``, and where the model's context ends. Each has noise of its own, by ``seed``, place and
    copy: the samples are the same whatever they share a batch with, no other random number is used up, and two models
    asked with one seed differ only as far as their distributions do.

    ``dtype`` is the compute precision, which must be that of the scoring if the samples are to estimate a KL. Even so,
    below float32 the tokens are drawn from forwards of another shape than those that score them, so that estimates
    hold up to the arithmetic's noise (``logprobs.logp_tolerance``).

    Shapes: -> for each prompt its ``copies`` responses.
    Units: ``room`` in tokens of a batch, prompts, padding and responses.
    Source: sampling as argmax(logits + Gumbel noise): Maddison, Tarlow, Minka 2014, arXiv 1411.0030.

    Raises:
        DpoError: one response alone does not fit the device's memory.
    """
    ends = _eos_ids(model, tokenizer)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    rows = [
        _Row(place, copy, prompt, int(min(tokens, limit - len(prompt))))
        for place, prompt in enumerate(prompts)
        for copy in range(copies)
    ]
    found: list[list[Response]] = [[] for _ in prompts]
    with _as_it_is(model), attention(model, own_attention), precision(model.device, dtype), torch.no_grad():
        waiting = list(_batches(rows, room))
        while waiting:
            batch = waiting.pop(0)
            if (answered := _answer(model, batch, ends, seed if sampled else None)) is None:
                waiting[:0] = _halves(batch, model.device)
                continue
            for row, response in zip(batch, answered, strict=True):
                found[row.place].append(response)  # a prompt's copies stay in order
    return found


def generation_config(model: PreTrainedModel, tokenizer: Any, pairs: Sequence[Pair]) -> GenerationConfig:
    """The model's own, with the token that ends the chosen responses among those that end an answer, and with padding.

    A model whose config names the end of a text alone would go on behind the end of its turn. That token is the
    commonest last one of the first pairs' chosen responses, of which some may be cut, if it is a special token.
    """
    config = _valid(deepcopy(model.generation_config) if model.generation_config else GenerationConfig())
    lasts = Counter(int(model_input_ids(pair.chosen[-1:])[0]) for pair in pairs[:ENDS_OF])
    (last, _), ends = lasts.most_common(1)[0], _eos_ids(model, tokenizer)
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | {tokenizer.eos_token_id}
    wanted = ends if last in ends or last not in special else [*ends, last]
    if wanted != ends or config.eos_token_id is None:
        config.eos_token_id = wanted[0] if len(wanted) == 1 else wanted or None
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    return config


def _valid(config: GenerationConfig) -> GenerationConfig:
    """The config as transformers agrees to save it, which some models of the hub were not when it was less strict.

    Most have a temperature and do not say that it is to be sampled. Of others, such as those whose temperature is 0,
    nothing is kept but the token ids.
    """
    for change in ({}, {"do_sample": True}) if config.temperature != 0 else ():
        config.update(**change)
        try:
            config.validate(strict=True)
        except ValueError:
            continue
        return config
    return GenerationConfig(bos_token_id=config.bos_token_id, pad_token_id=config.pad_token_id)


def _eos_ids(model: PreTrainedModel, tokenizer: Any) -> list[int]:
    """The ids that end a response, by the first of these that names any."""
    for source in (model.generation_config, model.config.get_text_config(), tokenizer):
        ids = getattr(source, "eos_token_id", None)
        if ids is not None:
            return list(ids) if isinstance(ids, Iterable) else [int(ids)]
    return []


def _batches(rows: Sequence[_Row], room: int) -> Iterator[list[_Row]]:
    """Rows of similar length together, longest first, so that what does not fit fails at once."""
    batch: list[_Row] = []
    for row in sorted(rows, key=lambda row: -len(row.prompt)):
        if batch:
            width = len(batch[0].prompt) + batch[0].tokens
            if row.tokens != batch[0].tokens or (len(batch) + 1) * width > room:
                yield batch
                batch = []
        batch.append(row)
    if batch:
        yield batch


def _halves(batch: list[_Row], device: torch.device) -> list[list[_Row]]:
    """A batch that ran out of memory, as two."""
    if len(batch) == 1:
        told = f"prompt {batch[0].place + 1}: its answer alone ({len(batch[0].prompt)} + {batch[0].tokens} tokens)"
        raise DpoError(f"{told} does not fit the device's memory; fewer new tokens help")
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return [batch[: len(batch) // 2], batch[len(batch) // 2 :]]


@contextmanager
def _as_it_is(model: PreTrainedModel) -> Iterator[None]:
    """In evaluation mode and with a plain generation config for a while.

    transformers fills in from the model's generation config whatever is None in the one it is given, and it has options
    that nobody lists; so the model has none of its own meanwhile. Compiled layers run uncompiled, since each length of
    the cache would be another graph.
    """
    modes, own = [(module, module.training) for module in model.modules()], model.generation_config
    model.eval()
    model.generation_config = GenerationConfig()
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        model.generation_config = own
        for module, training in modes:
            module.training = training


class _Gumbel(LogitsProcessor):
    """Noise on the logits under which the largest is at a place that is drawn from their softmax.

    One generator a row; minus the logarithm of an exponential variable is a Gumbel variable.
    """

    def __init__(self, generators: Sequence[torch.Generator]) -> None:
        self.generators = generators

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        noise = torch.empty_like(scores)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores - noise.log()


def _noise(batch: Sequence[_Row], seed: int, device: torch.device) -> _Gumbel:
    seeds = (np.random.SeedSequence((seed, row.place, row.copy)).generate_state(1, np.uint64) for row in batch)
    return _Gumbel([torch.Generator(device).manual_seed(int(each[0])) for each in seeds])


def _answer(model: PreTrainedModel, batch: Sequence[_Row], ends: list[int], seed: int | None) -> list[Response] | None:
    """The responses of one batch, padded on the left; None when memory ran out. Greedy without a seed."""
    width = max(len(row.prompt) for row in batch)
    ids, mask = (torch.zeros(len(batch), width, dtype=torch.long) for _ in range(2))
    for place, row in enumerate(batch):
        ids[place, width - len(row.prompt) :] = torch.from_numpy(row.prompt)
        mask[place, width - len(row.prompt) :] = 1
    config = GenerationConfig(
        max_new_tokens=batch[0].tokens,
        do_sample=False,  # which leaves temperature, top_k and the like out; the noise draws
        use_cache=True,
        eos_token_id=ends or None,
        pad_token_id=0,
    )
    processors = [] if seed is None else [_noise(batch, seed, model.device)]
    try:
        out = model.generate(  # type: ignore[operator]  # a mixin that hides the method from the checker
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=config,
            logits_processor=LogitsProcessorList(processors),
        )
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return None  # what the forward holds is free only when this frame is gone
    return [_cut(row.astype(np.int32), ends) for row in out[:, width:].cpu().numpy()]


def _cut(ids: Ids, ends: list[int]) -> Response:
    """A row without what follows its first EOS."""
    at = np.flatnonzero(np.isin(ids, ends))
    return Response(ids[: at[0] + 1] if len(at) else ids, bool(len(at)))


# ---- scoring ----------------------------------------------------------------------------------------------------


def as_pairs(prompts: Sequence[Ids], responses: Sequence[Sequence[Response]]) -> Pairs:
    """Sampled responses of each prompt two by two, so that they are scored as any pairs are, the prompt once for both.

    Every prompt has equally many. The last of an odd number stands beside itself; ``by_prompt`` counts it once.
    """
    pairs = Pairs()
    for place, (prompt, mine) in enumerate(zip(prompts, responses, strict=True)):
        for first in range(0, len(mine), 2):
            second = min(first + 1, len(mine) - 1)
            where = f"sample {place + 1}/{first + 1}"
            pairs.append(Pair(where, prompt, mine[first].ids, mine[second].ids))
    return pairs


def by_prompt(table: Table, copies: int) -> Table:
    """What was found of ``as_pairs``, a number a response, as prompts by samples.

    Shapes: (P, 2) -> (prompts, K), where K is ``copies``.
    """
    return table.reshape(-1, copies + copies % 2)[:, :copies]


def sequence_kl(logps: Table, ref_logps: Table, token_kl: Table | None = None) -> dict[str, Any]:
    """Estimate KL(policy || reference) of whole responses from samples of the policy.

    Of what distribution: a response's first T tokens, or fewer where its EOS comes before, at temperature 1; T is what
    the samples were cut at. Of which prompts: the mean over all those like the given ones, which the interval takes as
    drawn at random; of that prompt where there is but one. Three estimates of the one number:

    - ``logratio``: mean of log p - log q. Unbiased; below 0 by chance where the KL is small.
    - ``k3``: mean of (r - 1) - log r, r = q / p. Unbiased as well, since the mean of r under p is 1 (wherever q puts
      weight, p must too); each term is positive. Of low variance where the models are close. Far apart r has a heavy
      tail: a few samples, which mostly are not drawn, carry the mean, and both the estimate and its interval come out
      too low. Then it says little, and ``logratio`` or ``token_kl`` is to be believed: where tests can enumerate, its
      intervals held the truth 93 times in 100 at a KL of half a nat and 81 times at two; the others' 93 to 96 times.
      Noise of the arithmetic averages out of ``logratio``, and raises ``k3`` by half its variance.
    - ``token_kl``, if given: mean over samples of the exact KL of the next token, summed along the response. Unbiased,
      never negative, and never of more variance than ``logratio``.

    Each has a 95 % interval under ``…_interval``. A prompt's samples belong together: the interval is over the means of
    prompts, or over the samples where there is one prompt. It is unknown, None, from a single number.

    Shapes: all (prompts, K); ``token_kl`` as a sum over each response's tokens, its EOS included.
    Units: nats a response.
    Source: k3: Schulman, "Approximating KL divergence" (2020). ``token_kl``: the Rao-Blackwellised estimator of Amini,
    Vieira, Cotterell 2025, arXiv 2504.10637.
    """
    gap = np.asarray(ref_logps, np.float64) - np.asarray(logps, np.float64)  # log r
    estimates = {"logratio": -gap, "k3": np.expm1(gap) - gap}
    if token_kl is not None:
        estimates["token_kl"] = np.asarray(token_kl, np.float64)
    found: dict[str, Any] = {"prompts": gap.shape[0], "samples": gap.shape[1]}
    for name, values in estimates.items():
        found |= {
            name: float(values.mean()),
            f"{name}_interval": student(values.mean(1) if len(values) > 1 else values[0]),
        }
    return found


# ---- showing ----------------------------------------------------------------------------------------------------


def text(tokenizer: Any, ids: Ids) -> str:
    """Token ids as a person reads them: without special tokens and the space around."""
    found: str = tokenizer.decode(ids, skip_special_tokens=True)
    return found.strip()


def side_by_side(
    tokenizer: Any,
    prompts: Sequence[Ids],
    reference: Sequence[Sequence[Response]],
    policy: Sequence[Sequence[Response]],
    reference_sampled: Sequence[Sequence[Response]],
    policy_sampled: Sequence[Sequence[Response]],
) -> list[dict[str, Any]]:
    """Texts of prompts and of what both models answer, for the report: greedy, and some samples each."""

    def texts(responses: Sequence[Response]) -> list[str]:
        return [text(tokenizer, response.ids) for response in responses]

    return [
        {
            "prompt": text(tokenizer, prompt),
            "reference": texts(reference[place])[0],
            "policy": texts(policy[place])[0],
            "reference_sampled": texts(reference_sampled[place]),
            "policy_sampled": texts(policy_sampled[place]),
        }
        for place, prompt in enumerate(prompts)
    ]
