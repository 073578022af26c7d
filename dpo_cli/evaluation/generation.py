"""Answers that a model generates: to read, and to estimate KL(policy || reference) of whole responses.

Legend: P pairs, K samples per prompt.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import deepcopy
from typing import Any, cast

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel

from dpo_cli.data.formats import common_prefix
from dpo_cli.data.messages import answer_of, user_turn
from dpo_cli.data.pairs import Ids, Pair, Pairs, model_input_ids
from dpo_cli.data.template import PROBE, USER, ChatTemplate
from dpo_cli.evaluation.metrics import Table
from dpo_cli.evaluation.statistics import not_negative, student
from dpo_cli.models.attention import attention
from dpo_cli.models.logprobs import ModelRunner, forward_errors, precision
from dpo_cli.utils.errors import DpoError, plural

ENDS_OF = 256  # pairs whose last token is looked at
CUT = "…"  # ends an answer that was cut, where it is shown


def generate(
    runner: ModelRunner,
    tokenizer: Any,
    prompts: Sequence[Ids],
    own_attention: str,
    max_new_tokens: int,
    copies: int = 0,
    seed: int = 0,
    temperature: float = 1.0,
    streamer: Any = None,
) -> list[list[Ids]]:
    """Answer each prompt greedily, or ``copies`` times at a temperature from the model's own distribution.

    Nothing else shapes the distribution: of the model's generation config only the EOS ids are used. A response ends
    with an EOS, after ``max_new_tokens``, or where the model's context ends. It is computed in the precision of the
    ``runner``, which may score it, with prompts, padding and responses of at most its ``max_tokens`` per batch. The
    same ``seed`` and ``max_tokens`` give the same samples, and the global random state is left as it was.
    ``streamer``: one of transformers', for a single prompt.

    Shapes: -> for each prompt the token ids of its responses.

    Raises:
        DpoError: the batch does not fit the device's memory.
    """
    model = cast(PreTrainedModel, runner.model)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    room = [int(min(max_new_tokens, context - len(prompt))) for prompt in prompts]
    places = sorted([*range(len(prompts))] * (copies or 1), key=lambda i: -len(prompts[i]))
    responses: list[list[Ids]] = [[] for _ in prompts]
    config = GenerationConfig(do_sample=copies > 0, eos_token_id=eos_ids(model, tokenizer) or None, pad_token_id=0)
    config.update(**({"temperature": temperature, "top_k": 0, "top_p": 1.0} if copies else {}))
    on_device = [] if model.device.type == "cpu" else [model.device]
    unchanged = torch.random.fork_rng(on_device, device_type=model.device.type)
    model.eval()
    with unchanged, _no_defaults(model), attention(model, own_attention), torch.no_grad():
        torch.manual_seed(seed)
        while places:
            config.max_new_tokens = room[places[0]]
            size = max(1, runner.max_tokens // (len(prompts[places[0]]) + room[places[0]]))
            batch = [place for place in places[:size] if room[place] == room[places[0]]]
            places = places[len(batch) :]
            with precision(model.device, runner.dtype):
                answers = _generate(model, [prompts[place] for place in batch], config, streamer)
            for place, response in zip(batch, answers, strict=True):
                responses[place].append(response)
    return responses


def _generate(
    model: PreTrainedModel, prompts: Sequence[Ids], config: GenerationConfig, streamer: Any = None
) -> list[Ids]:
    """Answer prompts in one batch, padded on the left."""
    width = max(map(len, prompts))
    ids, mask = (torch.zeros(len(prompts), width, dtype=torch.long, device=model.device) for _ in range(2))
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.from_numpy(prompt)
        mask[row, width - len(prompt) :] = 1
    try:
        with forward_errors("the model cannot generate answers", "; leave out --samples, set --show-answers 0"):
            out = cast(Any, model).generate(ids, attention_mask=mask, generation_config=config, streamer=streamer)
    except RuntimeError as error:  # out of memory
        size = f"{plural(len(prompts), 'answer')} ({width} + {config.max_new_tokens} tokens each)"
        remedy = "set a lower --max-tokens, --sample-tokens or --max-new-tokens"
        raise DpoError(f"{size} do not fit the device's memory: {remedy}") from error
    answers = out[:, width:].cpu().numpy().astype(np.int32)
    ends = [np.flatnonzero(np.isin(answer, config.eos_token_id or [])) for answer in answers]
    return [answer[: places[0] + 1] if len(places) else answer for answer, places in zip(answers, ends, strict=True)]


@contextmanager
def _no_defaults(model: PreTrainedModel) -> Iterator[None]:
    """Give the model an empty generation config: from its own transformers would fill in what is None."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def text(tokenizer: Any, ids: Ids) -> str:
    """Decode token ids for a reader: without special tokens and surrounding space."""
    decoded: str = tokenizer.decode(ids, skip_special_tokens=True)
    return decoded.strip()


def answer_text(model: PreTrainedModel, tokenizer: Any, ids: Ids) -> str:
    """Decode an answer for a reader; one that does not end with an EOS was cut, and ends with a mark of it."""
    return text(tokenizer, ids) + CUT * (not np.isin(ids[-1:], eos_ids(model, tokenizer)).any())


def user_text(tokenizer: Any, prompt: Ids) -> str:
    """Decode the user's last turn without the chat template around it; of a prompt of another kind, all of it."""
    template = ChatTemplate(tokenizer, adds_bos=False)
    probe, earlier = user_turn(PROBE)[0], (USER, *answer_of("a"))
    first, _, end = template.probe(probe, generation=True).rpartition(PROBE)
    second = template.probe(*earlier, probe).rpartition(PROBE)[0]
    opening = first[len(first) - common_prefix(first[::-1], second[::-1]) :]
    whole = tokenizer.decode(prompt)
    if opening.strip() and opening in whole and whole.endswith(end):
        return str(whole.removesuffix(end).rpartition(opening)[2].strip())
    return text(tokenizer, prompt)


def generation_config(model: PreTrainedModel, tokenizer: Any, pairs: Sequence[Pair]) -> GenerationConfig:
    """Return the model's own, with the token that ends the chosen responses among its EOS ids, and with a padding id.

    A model whose config names only the end of a text would generate past the end of its turn. That token is the most
    frequent last one of the first pairs' chosen responses, if it is a special token.
    """
    config = _valid(deepcopy(model.generation_config) if model.generation_config else GenerationConfig())
    lasts = Counter(int(model_input_ids(pair.chosen[-1:])[0]) for pair in pairs[:ENDS_OF])
    (last, _), eos = lasts.most_common(1)[0], eos_ids(model, tokenizer)
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} | {tokenizer.eos_token_id}
    wanted = eos if last in eos or last not in special else [*eos, last]
    if wanted != eos or config.eos_token_id is None:
        config.eos_token_id = wanted[0] if len(wanted) == 1 else wanted or None
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
    return config


def _valid(config: GenerationConfig) -> GenerationConfig:
    """Return the config in a form that transformers saves: some models of the hub predate its checks.

    Most have a temperature and do not say that they sample. Of others, such as those whose temperature is 0, only the
    token ids are kept.
    """
    for do_sample in (config.do_sample, True) if config.temperature != 0 else ():
        config.do_sample = do_sample
        with suppress(ValueError):
            config.validate(strict=True)
            return config
    return GenerationConfig(bos_token_id=config.bos_token_id, pad_token_id=config.pad_token_id)


def eos_ids(model: PreTrainedModel, tokenizer: Any) -> list[int]:
    """The ids that end a response, from the first of these that names any."""
    for source in (model.generation_config, model.config.get_text_config(), tokenizer):
        ids = getattr(source, "eos_token_id", None)
        if ids is not None:
            return list(ids) if isinstance(ids, Iterable) else [int(ids)]
    return []


def end_turns(model: PreTrainedModel, tokenizer: Any) -> None:
    """Let answers end where the chat template ends a turn, too: a start model may name only the end of a text."""
    ending = tokenizer.get_vocab().get(ChatTemplate(tokenizer, adds_bos=False).endings[0].strip())
    config = model.generation_config or GenerationConfig()
    config.eos_token_id = sorted({*eos_ids(model, tokenizer), *([] if ending is None else [ending])}) or None
    model.generation_config = config


def as_pairs(prompts: Sequence[Ids], responses: Sequence[Sequence[Ids]]) -> Pairs:
    """Put the sampled responses of each prompt into pairs, so that they are scored as any pairs are.

    Every prompt has equally many. The last of an odd number is paired with itself; ``by_prompt`` counts it once.
    """
    pairs = Pairs()
    for place, (prompt, answers) in enumerate(zip(prompts, responses, strict=True), 1):
        for first in range(0, len(answers), 2):
            two = answers[first : first + 2]
            pairs.append(Pair(f"sample {place}/{first + 1}", prompt, two[0], two[-1]))
    return pairs


def by_prompt(table: Table, copies: int) -> Table:
    """Rearrange one number per response of ``as_pairs`` by prompt: (P, 2) -> (prompts, K)."""
    return table.reshape(-1, copies + copies % 2)[:, :copies]


def sequence_kl(token_kl: Table) -> dict[str, Any]:
    """Estimate KL(policy || reference) of whole responses, as the policy samples them at temperature 1.

    The mean over samples of the exact KL of the next token, summed along the response: unbiased, never negative, and
    never of more variance than the mean log-ratio. The interval is over prompts, or over samples of a single prompt.

    Shapes: (prompts, K), summed over each response's tokens, EOS included.
    Units: nats per response.
    Source: the Rao-Blackwellised estimator of Amini, Vieira, Cotterell 2025, arXiv 2504.10637.
    """
    ends = not_negative(student(token_kl.mean(1) if len(token_kl) > 1 else token_kl[0]))
    about = {"prompts": token_kl.shape[0], "samples": token_kl.shape[1]}
    return about | {"token_kl": float(token_kl.mean()), "token_kl_interval": ends}
