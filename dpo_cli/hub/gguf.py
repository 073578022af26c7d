"""`dpo export`: a trained model as a GGUF file by llama.cpp's converter, read back, with a Modelfile for Ollama."""

from __future__ import annotations

import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from itertools import islice
from pathlib import Path
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
        result: dict[str, Any] = {"gguf": str(file), "bytes": made.stat().st_size, "precision": precision}
        result |= _read_back(find_model(str(model)), find_model(str(made)), source.run, reporter)
        modelfile = _modelfile(find_model(str(model)), file.name)
        made.replace(file)
    if source.run and result["kl"] is not None:
        _note(source.adapter or Path(source.path), precision, result["kl"])
    beside = file.with_name(f"{file.stem}.Modelfile")
    beside.write_text(modelfile, encoding="utf-8")
    return result | {"modelfile": str(beside)}


def _converter(llama_cpp: Path | None) -> Path:
    """Find llama.cpp's converter: in a checkout, on the PATH, or where llama-cpp-python puts it."""
    if llama_cpp:
        found = [llama_cpp.expanduser() / CONVERTER]
    else:
        spec = importlib.util.find_spec("llama_cpp")
        found = [Path(spec.origin).parents[1] / "bin" / CONVERTER] if spec and spec.origin else []
        found += [Path(on_path)] if (on_path := shutil.which(CONVERTER)) else []
    if script := next((path for path in found if path.is_file()), None):
        return script
    where = (
        f"--llama-cpp {llama_cpp}: has no {CONVERTER}" if llama_cpp else f"{CONVERTER} of llama.cpp is not installed"
    )
    raise UsageError(
        f"{where}; git clone --depth 1 https://github.com/ggml-org/llama.cpp, and add --llama-cpp llama.cpp"
    )


def _read_back(model: ModelSource, made: ModelSource, run: Path | None, reporter: Reporter) -> dict[str, Any]:
    """Return the mean KL of the GGUF file's next tokens from the model's, in nats per token, on pairs of the run."""
    pairs = _pairs(model, run, reporter)
    with tempfile.TemporaryDirectory(dir=made.path) as folder:
        runner, progress = _runner(model), reporter.progress("model", len(pairs))
        recorded = kl.record(runner, pairs, Path(folder), progress)
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


def _pairs(model: ModelSource, run: Path | None, reporter: Reporter) -> Pairs:
    """Return the first held-out pairs of a run, else of those it trained on; made up ones without a run or its data."""
    if run:
        options = trained_with(run)
        try:
            rows = read_rows(find_sources(options.eval_data or options.data), options.columns, options.format)
            encoder = Encoder(load_tokenizer(model), **encoder_options(options))
            made = (each.pairs[0] for each in encoder.pairs(rows) if isinstance(each, Encoded))
            return Pairs(islice(made, PAIRS))
        except UsageError as error:
            reporter.warning(f"compared on made-up tokens: the run's data cannot be read: {error}")
    ids = np.arange(64, dtype=np.int32)
    return Pairs([Pair("the ids from 0 to 63", ids[:1], ids[1:], ids[:0:-1])])


def _note(folder: Path, precision: str, kl_of_tokens: float) -> None:
    """Write what the file loses into the card of the model, in the place of an earlier line."""
    card = folder / "README.md"
    text, line = (
        card.read_text(encoding="utf-8"),
        f"GGUF, {precision}: KL {kl_of_tokens:.2g} nats per token from this model.",
    )
    kept = re.sub(rf"\nGGUF, {precision}: .*\n", "", text)
    card.write_text(f"{kept}\n{line}\n", encoding="utf-8")


# ---- Ollama -----------------------------------------------------------------------------------------------------


def _modelfile(source: ModelSource, file: str) -> str:
    """Write what `ollama create` reads: the file, the template in Go's language, and the tokens that end an answer."""
    tokenizer, ends = load_tokenizer(source), None
    with suppress(OSError):  # there is none
        ends = GenerationConfig.from_pretrained(source.path).eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    lines, template = [f"FROM ./{file}"], go_template(tokenizer)
    lines.append(
        f'TEMPLATE """{template}"""' if template else "# TEMPLATE: left to Ollama, which knows many by the file's"
    )
    lines += [f'PARAMETER stop "{tokenizer.decode([end])}"' for end in (ends if isinstance(ends, list) else [ends])]
    return "\n".join(lines) + "\n"


def go_template(tokenizer: Any) -> str | None:
    """Translate a chat template whose turns are each a text between two fixed ones; None for any other."""

    def render(*roles: str) -> str:
        messages = [{"role": role, "content": f"@{number}@"} for number, role in enumerate(roles)]
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    try:
        bos = tokenizer.bos_token if Encoder(tokenizer).adds_bos else ""  # which llama.cpp adds too
        whole = render("system", "user", "assistant", "user").removeprefix(bos)
        begin, to_user, to_answer, to_next, end = re.split("@[0-3]@", whole)
        alone = render("user").removeprefix(bos).split("@0@")
    except Exception:  # of a template of any kind: it refuses a system message, changes texts, …
        return None
    ends = (to_user[i:] for i in range(len(to_user) + 1))
    user = next(text for text in ends if to_next.endswith(text) and alone[0].endswith(text))  # what opens a turn
    if end != to_answer or alone[1:] != [end] or not user or '"""' in whole or "{{" in whole:
        return None
    after_system, after_answer = to_user.removesuffix(user), to_next.removesuffix(user)
    first = f"{{{{ if not .System }}}}{without}{{{{ end }}}}" if (without := alone[0].removesuffix(user)) else ""
    return (
        f"{first}{GO_RANGE}"
        f'{{{{ if eq .Role "system" }}}}{begin}{{{{ .Content }}}}{after_system}'
        f'{{{{ else if eq .Role "user" }}}}{user}{{{{ .Content }}}}{to_answer}'
        f"{{{{ else }}}}{{{{ .Content }}}}{after_answer}{{{{ end }}}}{{{{ end }}}}"
    )
