"""A trained model as a folder that any Hugging Face tool loads, read back before it counts as written."""

from __future__ import annotations

import json
import shlex
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from dpo_cli.data.batching import MicroBatch, padded
from dpo_cli.data.pairs import Pair, count_loss_tokens
from dpo_cli.hub.model_card import merged_card
from dpo_cli.models.adapter_files import WEIGHTS, adapter_weights, read_config, save_adapter
from dpo_cli.models.adapters import is_adapted, is_quantized, is_tied
from dpo_cli.models.loading import dtype_name, export_dtype, load_exported, load_model, load_tokenizer, release
from dpo_cli.models.locate import ModelSource, find_model
from dpo_cli.models.logprobs import ModelRunner, response_logps
from dpo_cli.models.noise import excess, rms
from dpo_cli.models.parallel import parallel_of, reshard
from dpo_cli.models.quantized import admit
from dpo_cli.models.split_weights import split_master_weights
from dpo_cli.training.checkpoint import verified_step
from dpo_cli.training.memory import process_bytes, usable_bytes
from dpo_cli.training.run_dir import trained_with
from dpo_cli.utils.console import Reporter
from dpo_cli.utils.errors import DpoError, UsageError
from dpo_cli.utils.files import atomic_dir

CPU = torch.device("cpu")


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
    expected: tuple[Tensor, torch.dtype] | None = None,
    dtype: torch.dtype = torch.float32,
    warn: Callable[[str], None] = lambda _: None,
) -> bool:
    """Write weights in ``dtype``, config, tokenizer with template and model card, or the adapter where there is one.

    ``source`` is what the model was loaded from. The folder appears only after it was loaded again in the class that
    its config declares, with every weight and with the log-probs of ``pair`` that the model in memory gives:
    ``expected`` (2,) nats and the precision they were computed in. Of a sharded model all ranks take part, and the
    first one's host has room for its weights. Returns False, after a warning, where it could not be loaded again.

    Raises:
        NotReadBackError: the model loaded again differs; no folder is left.
    """
    if pair is None:
        ids = np.arange(min(64, model.config.get_text_config().vocab_size), dtype=np.int32)
        pair = Pair("the ids from 0 to 63", ids[:1], ids[1:], ids[:0:-1])
    if expected is None:
        runner = ModelRunner(model, "padded", torch.float32, 0, model.device, chunked_lm_head=False)
        expected = pair_logps(runner, pair), torch.float32
    parallel = parallel_of(model)
    reshard(model)
    read_back = True
    weights = parallel.gather(model.state_dict(keep_vars=True)) if parallel.sharded else None

    def write() -> None:
        nonlocal read_back
        with atomic_dir(folder) as temporary:
            if is_adapted(model):
                save_adapter(model, temporary)
                model.generation_config.save_pretrained(temporary)  # its answers end as they do here
            else:
                _save_weights(model, weights, dtype, temporary, warn)
            tokenizer.save_pretrained(temporary)
            _rewrite(temporary / "tokenizer_config.json", _older_tokenizer)
            (temporary / "README.md").write_text(card, encoding="utf-8")
            try:
                logps, precision = expected
                exact = dtype == precision == torch.float32 and logps.device == CPU
                exported = _read_back(temporary, model, source, pair, exact)
            except NotReadBackError as error:
                raise NotReadBackError(f"{folder}: {error}".replace(str(temporary), str(folder))) from error
            except Exception as error:  # of any type, such as of code that runs on CUDA only
                reason = str(error).replace(str(temporary), str(folder)).splitlines()[0]
                warn(f"{folder} was not read back: {reason}")
                read_back = False
                return
            tokens = torch.tensor([count_loss_tokens(pair.chosen), count_loss_tokens(pair.rejected)])
            if exported is None:
                return
            offs = [again - logps.to(CPU) for again in exported[0]]
            if min(excess(off, tokens, exported[1]) for off in offs) > 1:
                raise NotReadBackError(
                    f"{folder}: loaded again, the model gives other log-probs than in memory, by "
                    f"{float(offs[0].abs().max()):.3g} nats on {pair.where}"
                )

    parallel.on_rank_0(write)
    return read_back


@torch.no_grad()
def pair_logps(runner: ModelRunner, pair: Pair) -> Tensor:
    """Log-probs of the two responses of a pair in a padded batch: (2,) nats."""
    batch = _padded_pair(pair).to(runner.device)
    return response_logps(runner.token_logps(batch), batch.lengths)


def _padded_pair(pair: Pair) -> MicroBatch:
    return padded([(pair.prompt, pair.chosen), (pair.prompt, pair.rejected)])


def _save_weights(
    model: PreTrainedModel,
    weights: dict[str, Tensor] | None,
    dtype: torch.dtype,
    folder: Path,
    warn: Callable[[str], None],
) -> None:
    if dtype != torch.float32:
        state = weights or model.state_dict(keep_vars=True)
        cast = {id(t): t.detach().to(CPU, dtype if t.is_floating_point() else t.dtype) for t in state.values()}
        weights = {name: cast[id(tensor)] for name, tensor in state.items()}  # tied ones stay one
    if kept := {name: file for name, file in getattr(model, "not_loaded", {}).items() if file}:
        weights = {**(weights or model.state_dict())}
        for name, file in kept.items():  # parts of the checkpoint that the model does not have, as they were
            with safe_open(file, framework="pt") as tensors:
                weights[name] = tensors.get_tensor(name)
    model.save_pretrained(folder, state_dict=weights)
    for processor in getattr(model, "processors", ()):
        shutil.copyfile(processor, folder / processor.name)
    file = folder / "config.json"
    _rewrite(file, lambda written: written | {"dtype": dtype_name(dtype)})
    plain = file.read_text(encoding="utf-8")
    _rewrite(file, lambda written: _with_older_names(written, model.config))
    try:
        with warnings.catch_warnings(action="error", category=FutureWarning):  # of a class that reads them no more
            same = _ropes(type(model.config).from_pretrained(folder)) == _ropes(model.config)
    except (ValueError, KeyError, TypeError, AttributeError, OSError, FutureWarning):
        same = False
    if not same:
        file.write_text(plain, encoding="utf-8")
        warn("transformers 4 has no names for the rotary embeddings of this model: load the export with version 5")


@torch.no_grad()
def _read_back(
    written: Path, model: PreTrainedModel, source: ModelSource, pair: Pair, exact: bool
) -> tuple[list[Tensor], float] | None:
    """``response_logps`` (2,) of what was written, loaded again on the CPU, and their noise; None over a packed base.

    Unless what is compared is ``exact``, they are computed in bfloat16 too, weights included, whose error is the noise.

    Over a packed base, which is not loaded twice, the adapter's tensors are compared with those in memory.

    Raises:
        NotReadBackError: it cannot be loaded, or an adapter's tensors differ.
        MemoryError: the host has no room for it.
    """
    if is_quantized(model):
        own, saved = adapter_weights(model), load_file(written / WEIGHTS)
        if saved.keys() != own.keys() or not all(torch.equal(saved[name], own[name].cpu()) for name in saved):
            raise NotReadBackError("the adapter that was written is not the one in memory")
        return None
    need = 4 * sum(p.numel() for p in model.parameters())
    if need > usable_bytes(CPU) - process_bytes(CPU):
        raise MemoryError(f"a second copy takes {need / 2**30:.0f} GiB of the host's memory")
    try:
        if is_adapted(model):
            again = load_model(replace(source, adapter=written, attached=True, checkpoint=None))
        else:
            again = load_exported(written, source.trust, getattr(model, "not_loaded", ()))
            if is_tied(again) != is_tied(model):
                raise ValueError("embedding and head are tied in one of the two only")
    except (UsageError, ValueError) as error:
        raise NotReadBackError(f"what was written cannot be loaded again: {error}") from error
    try:
        runner, batch = ModelRunner(again, "padded", torch.float32, 0, CPU, chunked_lm_head=False), _padded_pair(pair)
        token_logps = [runner.token_logps(batch)]
        if not exact:
            split_master_weights(again)
            token_logps.append(replace(runner, dtype=torch.bfloat16).token_logps(batch))
        noise = rms(token_logps[-1] - token_logps[0])
        return [response_logps(each, batch.lengths) for each in token_logps], noise
    finally:
        release(again)


def merge(name: str, base: str | None, output: Path, dtype: str, trust: bool, reporter: Reporter) -> dict[str, Any]:
    """Write a model folder with an adapter's weights added to its base's, which is ``base`` or what the adapter names.

    Raises:
        UsageError: there is no adapter, it cannot be merged, or the folder exists.
    """
    source = find_model(name, trust, base)
    if source.adapter is None or source.checkpoint not in (None, source.adapter):
        raise UsageError(f"--model {name}: there is no adapter to merge; a model of all weights is whole already")
    if source.checkpoint and verified_step(source.checkpoint) is None:
        raise UsageError(f"--model {name}: the checkpoint is damaged; take another, or the run's model/")
    if output.exists():
        raise UsageError(f"--output {output}: exists already; name another folder")
    read_config(source.adapter, reporter.warning)
    source = admit(source, name)
    reporter.info("model", source.description)
    trained = trained_with(source.run) if source.run else None
    if trained and trained.quantize:
        reporter.warning(
            f"the adapter was trained on its base in {trained.quantize} and is merged into the float32 base: the "
            "merged model is not quite the trained one"
        )
    model = load_model(source)
    card = merged_card(source, output.name, trained.objective if trained else None)
    precision = export_dtype(dtype, source)
    about: dict[str, Any] = {"source": source, "dtype": precision, "warn": reporter.warning}
    read_back = export_model(output, model, load_tokenizer(source), card, **about)
    return {"model": str(output), "parameters": model.num_parameters(), "read_back": read_back}


def as_text(result: Mapping[str, Any]) -> str:
    """Format the result of ``merge``."""
    checked = ", loaded again and compared with the model in memory" * result["read_back"]
    written = f"{result['model']}: {result['parameters']:,} parameters{checked}"
    return f"{written}\nNext: dpo chat {shlex.quote(result['model'])}"


# ---- what transformers 4, and with it vLLM, reads of an export --------------------------------------------------


def _rewrite(file: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    written = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(change(written), indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _ropes(config: PretrainedConfig) -> dict[str, Any]:
    """The rotary embeddings of a text model, without the name that version 4 had for their type."""
    ropes = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return {name: value for name, value in ropes.items() if name != "type"}


def _with_older_names(written: dict[str, Any], config: PretrainedConfig) -> dict[str, Any]:
    """Return a configuration with the names of transformers 4 in addition to those of 5.

    Version 4 knows no ``rope_parameters``: it would use its default base without a warning. Checked against 4.57.6 on
    the families of tests/hub/test_exports.py, whose log-probs are the same there.
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
