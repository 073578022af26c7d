"""What a model's forward allows: the most compact layout that equals single sequences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dpo_cli.data.batching import MicroBatch, padded
from dpo_cli.data.pairs import Ids, Pair, Pairs
from dpo_cli.data.schedule import Layout, probe_pairs, row_costs
from dpo_cli.models.attention import PREFIX_SHARED, attention
from dpo_cli.models.logprobs import ModelRunner, forward_errors, out_of_memory
from dpo_cli.models.noise import draw_probes, measure_noise
from dpo_cli.utils.errors import DpoError, UsageError

# Names in configurations of a length at which a forward changes: with its longest sequence (longrope) or with the
# places in its rows (Llama 4).
THRESHOLDS = ("original_max_position_embeddings", "attention_chunk_size", "floor_scale")
DESCRIPTIONS: dict[Layout, str] = {
    "shared": "packed rows, each prompt computed once for both responses",
    "packed": "packed rows, the prompt computed once for each response",
    "padded": "padded batches, the prompt computed once for each response",
    "alone": "one sequence per forward",
}


@torch.no_grad()
def choose_layout(
    model: PreTrainedModel, pairs: Sequence[Pair], max_tokens: int, device: torch.device, dtype: torch.dtype
) -> tuple[ModelRunner, str]:
    """Find the most compact layout whose log-probs equal those of each response alone, and describe it.

    Real pairs are scored in forwards of each layout, see ``_tried``, in float32 and in the compute precision, and
    compared with the plainest forward there is: one response, the model's own attention, no padding. Sparse attention
    is not tried with sequences beyond ``index_topk`` tokens, of which it chooses: it breaks ties by the row's length.

    Raises:
        DpoError: no layout gives the numbers of single sequences.
        UsageError: the model's own forward fails; a token's log-prob depends on the tokens behind it, is another in
            training, or changes when the model has read a longer sequence.
    """
    groups, limit = _tried(model, pairs, max_tokens)
    tried = [pair for group in groups for pair in group]
    sequences = [(pair.prompt, response) for pair in tried for response in (pair.chosen, pair.rejected)]
    order = sorted(range(len(sequences)), key=lambda i: sum(map(len, sequences[i])))  # a longer one may leave state
    shortest, longest = order[0], order[-1]
    exact = ModelRunner(model, "alone", torch.float32, max_tokens, device, chunked_lm_head=False)
    precisions = dict.fromkeys((torch.float32, dtype))
    with forward_errors("the model's own forward fails on a pair of the data"):
        alone = {p: _alone(replace(exact, dtype=p), sequences, order) for p in precisions}
    expected = {p: torch.cat(logps) for p, logps in alone.items()}
    if not all(logps.isfinite().all() for logps in expected.values()):
        raise DpoError("the start model's log-probs are not finite: its weights are broken, or --dtype is too coarse")
    own_error = (expected[dtype] - expected[torch.float32]).abs().mean()
    with forward_errors("the model's own forward fails in training mode"):
        _check_alone(exact, padded([sequences[longest]]).to(device), alone[torch.float32][longest])
    apart, reasons = False, list[str]()
    with suppress(UsageError), forward_errors("a body or a head of another kind"):
        (logps,) = _alone(replace(exact, chunked_lm_head=True), [sequences[shortest]])
        apart = _largest(logps - alone[torch.float32][shortest]) < 1e-3
    layouts: list[Layout] = [*DESCRIPTIONS]
    chosen = getattr(model.config.get_text_config(), "index_topk", None)
    if chosen and sum(map(len, sequences[longest])) > chosen:
        limit, layouts = min(limit, chosen), ["alone"]
        reasons.append("its attention chooses tokens, and breaks ties by the row's length")
    for layout in layouts:
        runners = {p: ModelRunner(model, layout, p, max_tokens, device, apart) for p in precisions}
        own = PREFIX_SHARED if layout == "shared" else None
        try:
            with forward_errors(f"{layout}: not supported by the code of this model"), attention(model, own):
                scored = {p: torch.cat([r.token_logps(r.batch(g)) for g in groups]) for p, r in runners.items()}
                _run_backward(runners[dtype], groups[0][-1])
        except UsageError as error:
            reasons.append(str(error))
            continue
        off = {p: logps - expected[torch.float32] for p, logps in scored.items()}
        largest = _largest(off[torch.float32])
        if largest >= 1e-3 or not off[dtype].abs().mean() < 3 * own_error + 1e-3:
            reasons.append(f"{layout}: off by {max(map(_largest, off.values())):.2g} nats")
            continue
        if not apart:
            reasons.append("the head cannot run apart from the body")
        if layout == "alone" and limit < math.inf:
            reasons.append(f"--max-length {limit} lets sequences share one")
        within = f" within {largest:.0e} nats per token" if largest else ""
        description = f"{DESCRIPTIONS[layout]}; equal to single sequences{within}"
        if dtype != torch.float32:
            with attention(model, own):
                runners[dtype].probes = draw_probes(runners[dtype], pairs)
                measure_noise(runners[dtype])
        return runners[dtype], description + (f" ({'; '.join(reasons)})" if reasons else "")
    if limit < math.inf:
        raise UsageError(
            f"sequences longer than {limit} tokens change the model's log-probs of shorter ones, beside and after them "
            f"({'; '.join(reasons)}); set --max-length {limit}"
        )
    raise DpoError(f"no layout gives this model's log-probs of single sequences: {'; '.join(reasons)}")


def _tried(model: PreTrainedModel, pairs: Sequence[Pair], max_tokens: int) -> tuple[list[list[Pair]], float]:
    """Return the pairs of each trial forward, and the length beyond which a sequence changes shorter ones.

    The first forward has the longest pair that fits ``max_tokens``, the shortest, and that one with one token of its
    prompt, unless that is on the other side of a threshold: behind a long prompt the state that a state-space model
    keeps of the sequence before fades. The longest pair of all runs alone, if it does not fit. For each threshold the
    longest pair runs with one up to it, or a longer row if no sequence is longer. Infinity: no threshold matters.
    """
    first = probe_pairs(pairs, "padded", max_tokens)
    cut = replace(first[-1], prompt=first[-1].prompt[-1:])
    lengths = (pairs if isinstance(pairs, Pairs) else Pairs(pairs)).lengths
    sequences = lengths[:, :1] + lengths[:, 1:]  # (P, 2)
    shorter, longest = sequences.min(1), int(sequences.max())
    long = pairs[int(sequences.max(1).argmax())]
    thresholds = sorted(_thresholds(model.config.get_text_config().to_dict()))
    other_side = any(1 + min(len(cut.chosen), len(cut.rejected)) <= length < shorter.min() for length in thresholds)
    groups = [first if other_side else [*first, cut]] + [[long]] * (2 * longest > max_tokens)
    between = [length for length in thresholds if shorter.min() <= length < longest]
    groups += [[long, pairs[int(np.where(shorter <= length, shorter, 0).argmax())]] for length in between]
    beyond = [length for length in thresholds if longest <= length < max_tokens]
    for length in beyond:  # copies that share nothing
        copies = range(length // row_costs(first, "shared")[0] + 1)
        groups.append([replace(first[0], prompt=np.append(np.int32(i), first[0].prompt[1:])) for i in copies])
        groups[-1].append(first[-1])
    return groups, min(between, default=math.inf)


def _alone(runner: ModelRunner, sequences: Sequence[tuple[Ids, Ids]], order: Sequence[int] = (0,)) -> list[Tensor]:
    """Token log-probs of each response, (N,) each, a forward per distinct sequence of prompt and response."""
    logps = dict[tuple[bytes, bytes], Tensor]()
    keys = [(prompt.tobytes(), response.tobytes()) for prompt, response in sequences]
    for place in order:
        if keys[place] not in logps:
            logps[keys[place]] = runner.token_logps(padded([sequences[place]]).to(runner.device))
    return [logps[key] for key in keys]


def _run_backward(runner: ModelRunner, pair: Pair) -> None:
    """Run forward and backward pass over a pair, down to the embeddings: a flash kernel may have the forward only."""
    if not runner.kind.flash:
        return
    embedded: list[Tensor] = []
    layer = cast(PreTrainedModel, runner.model).get_input_embeddings()
    handle = layer.register_forward_hook(lambda *found: embedded.append(found[-1].requires_grad_()))
    try:
        with torch.enable_grad():
            torch.autograd.grad(runner.token_logps(runner.batch([pair])).sum(), embedded)
    except RuntimeError as error:
        if not out_of_memory(error):  # of weights in float32, which training may split
            raise
    finally:
        handle.remove()


def _largest(off: Tensor) -> float:
    """Return the largest difference; infinity if one is not a number."""
    return float(off.abs().nan_to_num(math.inf).max())


def _thresholds(config: Mapping[str, Any]) -> set[int]:
    found = {int(value) for name, value in config.items() if name in THRESHOLDS and isinstance(value, int | float)}
    return found.union(*(_thresholds(part) for part in config.values() if isinstance(part, dict)))


def _check_alone(runner: ModelRunner, batch: MicroBatch, expected: Tensor) -> None:
    """Refuse a model whose log-probs of one sequence (N,) are others in training, or with another last token."""
    ids = batch.input_ids.clone()
    ids[0, -1] = int(ids[0, -1] == 0)
    changed = replace(batch, input_ids=ids)
    runner.model.train()
    in_training = _largest(runner.token_logps(changed) - expected)
    runner.model.eval()
    if in_training < 1e-3:
        return
    if (ahead := _largest(runner.token_logps(changed) - expected)) >= 1e-3:
        raise UsageError(
            f"the model is no causal language model: a token's log-prob changes by {ahead:.2g} nats with what stands "
            "behind it. Take one that predicts each token from those before it"
        )
    raise UsageError(
        f"in training the model's log-probs differ from those in evaluation by {in_training:.2g} nats per token: "
        "something in it is drawn at random, so that the policy would not be its reference. Take another model"
    )
