"""A trained model as a folder that any Hugging Face tool loads, read back before it counts as written."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.utils.hub import cached_file

from dpo_cli import ranks
from dpo_cli.adapter_files import save_adapter
from dpo_cli.adapters import is_adapted, is_quantized, is_tied
from dpo_cli.batch import padded
from dpo_cli.disk import whole_folder
from dpo_cli.errors import DpoError, UsageError
from dpo_cli.locate import ModelSource
from dpo_cli.logps import noise, token_logps
from dpo_cli.memory import process_bytes, usable_bytes
from dpo_cli.model import load_exported, load_model, release
from dpo_cli.pairs import Pair, loss_tokens
from dpo_cli.sharding import is_sharded, whole_weights

CPU = torch.device("cpu")
PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")  # of images, sound


class NotReadBackError(DpoError):
    """What was written is not what was trained."""


def export_model(
    folder: Path,
    model: PreTrainedModel,
    tokenizer: Any,
    card: str,
    *,
    source: ModelSource,
    pair: Pair | None = None,
    dtype: torch.dtype = torch.float32,
    apart: bool = False,
    warn: Callable[[str], None] = lambda _: None,
) -> None:
    """Write weights in ``dtype``, config, tokenizer with template and model card, or the adapter where there is one.

    ``source`` is what the model was loaded from. The folder appears once it was read back: loaded in the class that it
    declares it has every weight and gives ``pair``, or some ids, the log-probs that the model in memory does.
    ``apart`` as of ``Scorer``. The first rank writes; of a sharded model all must take part, and the first one's host
    has room for its weights.

    Raises:
        NotReadBackError: it does not; nothing is left in the folder's place.
    """
    compute = torch.float32 if all(p.dtype == torch.float32 for p in model.parameters()) else torch.bfloat16
    if pair is None:
        ids = np.arange(min(64, model.config.get_text_config().vocab_size), dtype=np.int32)
        pair = Pair("the ids from 0 to 63", ids[:1], ids[1:], ids[:0:-1])
    expected = _response_logps(model, pair, compute, apart)
    weights = whole_weights(model) if is_sharded(model) else None
    if ranks.rank() > 0:
        return
    with whole_folder(folder) as temporary:
        if is_adapted(model):
            save_adapter(model, temporary)
            model.generation_config.save_pretrained(temporary)  # its answers end as they do here
        else:
            _save_weights(model, weights, dtype, temporary, warn)
            for name in PROCESSORS:
                if file := cached_file(source.path, name, _raise_exceptions_for_missing_entries=False):
                    shutil.copyfile(file, temporary / name)
        tokenizer.save_pretrained(temporary)
        _rewrite(temporary / "tokenizer_config.json", _older_tokenizer)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        coarse = dtype == torch.bfloat16 or compute == torch.bfloat16 or expected.device != CPU
        _read_back(temporary, folder, model, source, pair, expected, torch.bfloat16 if coarse else compute, warn)


def _response_logps(model: PreTrainedModel, pair: Pair, dtype: torch.dtype, apart: bool = False) -> Tensor:
    """Log-probs of the two responses of a pair: (2,) nats."""
    batch = padded([(pair.prompt, pair.chosen), (pair.prompt, pair.rejected)])
    with torch.no_grad():
        logps = token_logps(model, batch.to(next(model.parameters()).device), dtype, apart)
    return torch.stack(
        [part.double().sum() for part in logps.split([loss_tokens(pair.chosen), loss_tokens(pair.rejected)])]
    )


def _save_weights(
    model: PreTrainedModel,
    weights: dict[str, Tensor] | None,
    dtype: torch.dtype,
    folder: Path,
    warn: Callable[[str], None],
) -> None:
    if dtype != torch.float32:
        rounded = {id(t): t.to(dtype) for t in (weights or model.state_dict(keep_vars=True)).values()}
        weights = {name: rounded[id(t)] for name, t in (weights or model.state_dict(keep_vars=True)).items()}
    if kept := {name: file for name, file in getattr(model, "not_loaded", {}).items() if file}:
        weights = {**(weights or model.state_dict())}
        for name, file in kept.items():  # parts of the checkpoint that the model does not have, as they were
            with safe_open(file, framework="pt") as tensors:
                weights[name] = tensors.get_tensor(name)
    model.save_pretrained(folder, state_dict=weights)
    file = folder / "config.json"
    _rewrite(file, lambda written: written | {"dtype": str(dtype).removeprefix("torch.")})
    plain = file.read_text(encoding="utf-8")
    _rewrite(file, lambda written: _with_older_names(written, model.config))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)  # of a class that reads these names no more
            same = _ropes(AutoConfig.from_pretrained(folder)) == _ropes(model.config)
    except (ValueError, KeyError, TypeError, AttributeError, OSError, FutureWarning):
        same = False
    if not same:
        file.write_text(plain, encoding="utf-8")
        warn("transformers 4 has no names for the rotary embeddings of this model: load the export with version 5")


def _read_back(
    written: Path,
    folder: Path,
    model: PreTrainedModel,
    source: ModelSource,
    pair: Pair,
    expected: Tensor,
    precision: torch.dtype,
    warn: Callable[[str], None],
) -> None:
    """Load what was written and compare it with the model in memory, of which ``expected`` (2,) are the log-probs."""
    need = 4 * sum(p.numel() for p in model.parameters())
    if need > usable_bytes(CPU) - process_bytes(CPU):
        warn(f"{folder} was not read back: that takes {need / 2**30:.0f} GiB of the host's memory")
        return
    try:
        if not is_adapted(model):
            again = load_exported(written, source.trust, getattr(model, "not_loaded", ()))
            if is_tied(again) != is_tied(model):
                raise ValueError("embedding and head are tied in one of the two only")
        else:  # by plain peft, but over a packed base, into which it cannot be merged
            again = load_model(replace(source, adapter=written, attached=is_quantized(model), checkpoint=None))
        found = _response_logps(again, pair, torch.bfloat16 if is_quantized(again) else torch.float32)
    except (UsageError, ValueError) as error:
        raise NotReadBackError(f"{folder}: what was written cannot be loaded again: {error}") from error
    off = float((found.to(CPU) - expected.to(CPU)).abs().max())
    tokens = max(loss_tokens(pair.chosen), loss_tokens(pair.rejected))
    if not off <= noise(precision) * tokens**0.5:
        raise NotReadBackError(
            f"{folder}: loaded again the model gives other log-probs than in memory, by {off:.3g} nats on {pair.where}"
        )
    release(again)


# ---- what transformers 4, and with it vLLM, reads of an export --------------------------------------------------


def _rewrite(file: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    written = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(change(written), indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _ropes(config: PretrainedConfig) -> dict[str, Any]:
    """The rotary embeddings of a text model, without the name that version 4 had for their type."""
    return {
        name: value
        for name, value in (getattr(config.get_text_config(), "rope_parameters", None) or {}).items()
        if name != "type"
    }


def _with_older_names(written: dict[str, Any], config: PretrainedConfig) -> dict[str, Any]:
    """A configuration with the names of transformers 4 beside those of 5, which reads its own.

    Version 4 knows no ``rope_parameters``: it would take its default base without a word. Checked against 4.57.6 on
    the families of tests/test_exports.py, whose log-probs are the same there.
    """
    for key, inner in [*written.items()]:
        if isinstance(inner, dict) and isinstance(getattr(config, key, None), PretrainedConfig):
            written[key] = _with_older_names(inner, getattr(config, key))
    aliases = {alias: written[name] for alias, name in config.attribute_map.items() if name in written}
    ropes = written.get("rope_parameters") or {}
    main = ropes.get("full_attention", ropes)  # of all layers, or of those with full attention
    if "rope_theta" not in main:
        return aliases | written
    kind, theta, part = main.get("rope_type", "default"), main["rope_theta"], main.get("partial_rotary_factor")
    scaling = {key: value for key, value in main.items() if key not in ("rope_theta", "partial_rotary_factor")}
    if kind == "longrope" and config.model_type.startswith("phi"):  # which takes these three and no other
        scaling = {"type": kind, "short_factor": main["short_factor"], "long_factor": main["long_factor"]}
    older = {"rope_theta": theta, "rope_scaling": None if kind == "default" else scaling}
    if part is not None:
        older["partial_rotary_factor"] = part
    if config.model_type == "gpt_neox":
        older |= {"rotary_emb_base": theta, "rotary_pct": part}
    if "sliding_attention" in ropes:
        older["rope_local_base_freq"] = ropes["sliding_attention"]["rope_theta"]
    return aliases | written | older


def _older_tokenizer(written: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer's configuration with a class and keys that both versions know."""
    if written.get("tokenizer_class") == "TokenizersBackend":
        written["tokenizer_class"] = "PreTrainedTokenizerFast"
        written.pop("backend", None)
    if isinstance(written.get("extra_special_tokens"), list):  # in version 4 it is an object
        written["additional_special_tokens"] = written.pop("extra_special_tokens")
    return written
