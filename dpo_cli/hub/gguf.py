"""`dpo export`: a trained model as a GGUF file by llama.cpp's converter, read back, with a Modelfile for Ollama."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from sysconfig import get_path
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from dpo_cli.data.pairs import Pair, Pairs
from dpo_cli.data.rows import read_rows
from dpo_cli.data.sources import find_sources
from dpo_cli.data.tokenize import Encoded, Encoder
from dpo_cli.evaluation import kl
from dpo_cli.hub.export import CPU, NotReadBackError, merge
from dpo_cli.models.loading import load_model, load_tokenizer, release
from dpo_cli.models.locate import ModelSource, find_model
from dpo_cli.models.logprobs import ModelRunner
from dpo_cli.training.run_dir import encoder_options, trained_with
from dpo_cli.utils.console import Reporter
from dpo_cli.utils.errors import DpoError, UsageError

CONVERTER = "convert_hf_to_gguf.py"
PAIRS = 4  # on which the GGUF file is compared with what it was made from
OTHER = 0.5  # nats per token: more than any of these precisions loses
GO_RANGE = "{{ range .Messages }}"
GO_TURNS = (  # what stands before and after the text of each role
    GO_RANGE + '{{ if eq .Role "system" }}%s{{ .Content }}%s{{ else if eq .Role "user" }}%s{{ .Content }}%s'
    "{{ else }}{{ .Content }}%s{{ end }}{{ end }}"
)


def export(
    name: str, file: Path, precision: str, llama_cpp: Path | None, base: str | None, reporter: Reporter
) -> dict[str, Any]:
    """Write a model, an adapter with its base, as a GGUF file in ``precision``, and a Modelfile beside it.

    Both appear only after the file was loaded again and its next tokens compared with the model's.

    Raises:
        UsageError: there is no such model, no converter, or the file exists.
        DpoError: the converter failed.
        NotReadBackError: the GGUF file computes something else.
    """
    if file.suffix != ".gguf" or file.exists():
        raise UsageError(f"--gguf {file}: {'exists already; name another' if file.exists() else 'must end with .gguf'}")
    script, source = _converter(llama_cpp), find_model(name, base=base)
    if not source.adapter and (source.gguf or source.checkpoint or not Path(source.path).is_dir()):
        raise UsageError(f"{name}: name a run, or the folder of a model or an adapter")
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as temporary:
        model, made = Path(source.path), Path(temporary, file.name)
        if source.adapter:
            model = Path(temporary, source.base)
            merge(name, base, model, "float32", False, reporter)
        reporter.info("convert", f"{model} by {script}")
        command = [sys.executable, str(script), str(model), "--outfile", str(made), "--outtype", precision]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 (as asked)
        if done.returncode and (missing := re.search(r"No module named '(\w+)", done.stderr)):
            raise UsageError(f"{script}: needs the package {missing[1]}; pip install {missing[1]}")
        if done.returncode or not made.is_file():
            raise DpoError(f"{shlex.join(command)} failed:\n{(done.stderr or done.stdout).strip()[-1500:]}")
        merged = find_model(str(model))
        tokenizer, beside = load_tokenizer(merged), file.with_name(f"{file.stem}.Modelfile")
        result: dict[str, Any] = {"gguf": str(file), "bytes": made.stat().st_size, "precision": precision}
        result |= _read_back(merged, find_model(str(made)), _pairs(tokenizer, source.run, reporter), reporter)
        beside.write_text(_modelfile(tokenizer, model, file.name), encoding="utf-8")
        made.replace(file)
    if source.run and result["kl"] is not None:  # what the file loses, in the card, in the place of an earlier line
        card, line = Path(source.adapter or source.path, "README.md"), f"GGUF, {precision}: KL "
        try:
            kept = re.sub(rf"\n{line}.*\n", "", card.read_text(encoding="utf-8"))
            card.write_text(f"{kept}\n{line}{result['kl']:.2g} nats per token from this model.\n", encoding="utf-8")
        except OSError as error:
            reporter.warning(f"the model card does not have the KL: {error}")
    return result | {"modelfile": str(beside)}


def as_text(result: Mapping[str, Any]) -> str:
    """Format the result of ``export``."""
    kl = "" if result["kl"] is None else f"; KL {result['kl']:.2g} nats per token from the model"
    file, modelfile = (shlex.quote(result[name]) for name in ("gguf", "modelfile"))
    name = shlex.quote(Path(result["gguf"]).stem)
    lines = [f"{result['gguf']}: {result['bytes'] / 2**20:,.0f} MiB, {result['precision']}{kl}"]
    return "\n".join([*lines, f"Next: llama-cli -m {file}, or ollama create {name} -f {modelfile}"])


def _converter(llama_cpp: Path | None) -> Path:
    """Find llama.cpp's converter: in a checkout, on the PATH, or where llama-cpp-python puts it."""
    folders = [str(llama_cpp.expanduser())] if llama_cpp else [*os.get_exec_path(), f"{get_path('platlib')}/bin"]
    for folder in folders:
        if (script := Path(folder, CONVERTER)).is_file():
            return script
    what = f"--llama-cpp {llama_cpp}: has no {CONVERTER}" if llama_cpp else f"{CONVERTER} of llama.cpp is not installed"
    clone = "git clone --depth 1 https://github.com/ggml-org/llama.cpp, and add --llama-cpp llama.cpp"
    raise UsageError(f"{what}; {clone}")


def _read_back(model: ModelSource, made: ModelSource, pairs: Pairs, reporter: Reporter) -> dict[str, Any]:
    """Return the mean KL of the GGUF file's next tokens from the model's, in nats per token."""
    with tempfile.TemporaryDirectory(dir=made.path) as folder:
        runner = _runner(model)
        recorded = kl.record(runner, pairs, Path(folder), reporter.progress("model", len(pairs)))
        release(runner.model)
        try:
            runner = _runner(made)
        except UsageError as error:
            reporter.warning(f"not read back: transformers cannot load this GGUF file: {error}")
            return {"kl": None}
        tokens = kl.compare(runner, recorded, pairs, reporter.progress("GGUF", len(pairs)), policy_runs=False)
        release(runner.model)
    mean = float(tokens.tokens[:, kl.COLUMNS.index("kl")].mean())
    if not mean < OTHER:
        raise NotReadBackError(f"loaded again, the GGUF file is another model: KL {mean:.3g} nats per token")
    return {"kl": mean, "largest_logp_difference": float(tokens.logratios.abs().max()), "pairs": len(pairs)}


def _runner(source: ModelSource) -> ModelRunner:
    return ModelRunner(load_model(source), "padded", torch.float32, 2048, CPU, chunked_lm_head=False)


def _pairs(tokenizer: Any, run: Path | None, reporter: Reporter) -> Pairs:
    """Return the first held-out pairs of a run, else of those it trained on; made up ones without a run or its data."""
    if run:
        options = trained_with(run)
        try:
            rows = read_rows(find_sources(options.eval_data or options.data), options.columns, options.format)
            encoded = Encoder(tokenizer, **encoder_options(options)).pairs(rows)
            return Pairs(islice((each.pairs[0] for each in encoded if isinstance(each, Encoded)), PAIRS))
        except UsageError as error:
            reporter.warning(f"compared on made-up tokens: the run's data cannot be read: {error}")
    ids = np.arange(64, dtype=np.int32)
    return Pairs([Pair("the ids from 0 to 63", ids[:1], ids[1:], ids[:0:-1])])


# ---- Ollama -----------------------------------------------------------------------------------------------------


def _modelfile(tokenizer: Any, model: Path, file: str) -> str:
    """Write what `ollama create` reads: the file, the template in Go's language, and the tokens that end an answer."""
    ends = None
    with suppress(OSError):  # there is none
        ends = GenerationConfig.from_pretrained(model).eos_token_id
    ends, template = tokenizer.eos_token_id if ends is None else ends, go_template(tokenizer)
    ends = ends if isinstance(ends, list) else [ends] if ends is not None else []
    lines = [f"FROM ./{file}", "# TEMPLATE: left to Ollama, which knows many by the file's"]
    if template:
        lines[1] = f'TEMPLATE """{template}"""'
    lines += [f'PARAMETER stop "{tokenizer.decode([end])}"' for end in ends]
    return "\n".join(lines) + "\n"


def go_template(tokenizer: Any) -> str | None:
    """Translate a chat template whose turns are each a text between two fixed ones; None for any other.

    One that writes the date of each day is another.
    """
    if "strftime_now" in str(tokenizer.chat_template):
        return None

    def render(*roles: str) -> list[str]:
        messages = [{"role": role, "content": "@@"} for role in roles]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return str(text).removeprefix(bos).split("@@")

    try:
        bos = tokenizer.bos_token if Encoder(tokenizer).adds_bos else ""  # which llama.cpp adds too
        begin, to_user, to_answer, to_next, end = whole = render("system", "user", "assistant", "user")
        opening, closing = render("user")
    except Exception:  # of a template of any kind: it refuses a system message, changes texts, …
        return None
    ends = (to_user[place:] for place in range(len(to_user) + 1))
    user = next(text for text in ends if to_next.endswith(text) and opening.endswith(text))  # what opens a turn
    if not user or not end == to_answer == closing or any(mark in text for text in whole for mark in ('"""', "{{")):
        return None
    without = opening.removesuffix(user)
    first = "{{ if not .System }}" + without + "{{ end }}" if without else ""
    return first + GO_TURNS % (begin, to_user.removesuffix(user), user, to_answer, to_next.removesuffix(user))
