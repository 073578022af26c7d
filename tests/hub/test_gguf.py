"""`dpo export`: a run as a GGUF file that is the model, by a stand-in for llama.cpp's converter, and its Modelfile."""

from __future__ import annotations

import json
import subprocess
import textwrap
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from tests.helpers import CHATML, ROOT, SAMPLE, Cli, write_gguf

# A checkout of llama.cpp as far as it is used here: a real GGUF file, with its permuted rows of queries and keys.
CONVERTER = f"""
    import argparse, sys
    sys.path.insert(0, {str(ROOT)!r})
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from tests.helpers import write_gguf

    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--outfile")
    parser.add_argument("--outtype", choices=["f32", "f16", "bf16", "q8_0", "auto"])
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model)
    write_gguf(args.outfile, AutoTokenizer.from_pretrained(args.model), model=model, kind=args.outtype)
"""


def checkout(folder: Path, script: str = textwrap.dedent(CONVERTER)) -> Path:
    folder.mkdir()
    (folder / "convert_hf_to_gguf.py").write_text(script)
    return folder


@pytest.fixture
def run(dpo: Cli, tiny: Path) -> Path:
    data = ("--data", SAMPLE / "heldout-strings.jsonl", "--model", tiny, "--eval-fraction", 0.1)
    done = dpo("train", *data, "--max-steps", 1, "--batch-size", 2, "--lora-rank", 2, "--lr", 1e-2, "--output", "run")
    assert done.returncode == 0, done.stderr
    return Path("run")


def test_a_run_as_a_gguf_file(dpo: Cli, run: Path, tmp_path: Path) -> None:
    """An adapter is merged; the KL is that of 8 bits, and stands in the card; the file is a model of ours again."""
    llama_cpp = checkout(tmp_path / "llama.cpp")
    done = dpo("export", run, "--gguf", "out/my.gguf", "--llama-cpp", llama_cpp, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert 0 < result["kl"] < 0.05 and result["pairs"] == 4 and result["bytes"] == Path("out/my.gguf").stat().st_size
    assert sorted(file.name for file in Path("out").iterdir()) == ["my.Modelfile", "my.gguf"]
    assert f"GGUF, q8_0: KL {result['kl']:.2g} nats per token" in Path("run", "model", "README.md").read_text()
    modelfile = Path("out/my.Modelfile").read_text()
    assert modelfile.startswith('FROM ./my.gguf\nTEMPLATE """') and modelfile.endswith('PARAMETER stop "<|im_end|>"\n')
    again = dpo("eval", "--model", "out/my.gguf", "--data", SAMPLE / "heldout-strings.jsonl", "--kl", "none", "--json")
    assert again.returncode == 0, again.stderr
    more = dpo("export", run, "--gguf", "out/my.gguf", "--llama-cpp", llama_cpp)
    assert more.returncode == 2 and "exists already" in more.stderr


def test_a_file_that_is_another_model_is_not_kept(
    dpo: Cli, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The converter runs in this process: it imports what takes seconds."""
    export = (
        "export",
        tiny,
        "--gguf",
        "my.gguf",
        "--llama-cpp",
        checkout(tmp_path / "llama.cpp", "raise SystemExit('odd')"),
    )

    def convert(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        model = AutoModelForCausalLM.from_pretrained(command[2])
        model.lm_head.weight.data.neg_()
        write_gguf(Path(command[4]), AutoTokenizer.from_pretrained(command[2]), model=model, kind=command[6])
        return subprocess.CompletedProcess(command, 0, "", "")

    with monkeypatch.context() as patched:
        patched.setattr("dpo_cli.hub.gguf.subprocess.run", convert)
        done = dpo(*export, "--quantization", "f32")
    assert done.returncode == 1 and "is another model: KL" in done.stderr
    failed = subprocess.CompletedProcess(["x"], 1, "", "Model architecture is not supported")
    monkeypatch.setattr("dpo_cli.hub.gguf.subprocess.run", lambda *_, **__: failed)
    done = dpo(*export)
    assert done.returncode == 1 and "Model architecture is not supported" in done.stderr
    assert not list(tmp_path.glob("my*"))


@pytest.mark.parametrize("more", [(), ("--llama-cpp", "nowhere")])
def test_without_the_converter_one_line_says_how_to_get_it(
    more: tuple[str, ...], dpo: Cli, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    done = dpo("export", tiny, "--gguf", "my.gguf", *more)
    assert done.returncode == 2 and "git clone --depth 1 https://github.com/ggml-org/llama.cpp" in done.stderr


# ---- the template of Ollama -------------------------------------------------------------------------------------


def spoken(template: str, *messages: tuple[str, str]) -> str:
    """What Ollama's engine makes of the templates that are written here."""
    from dpo_cli.hub.gguf import GO_RANGE

    head, body = template.split(GO_RANGE)
    first, _, without = head.partition("{{ if not .System }}")
    assert not first
    pieces = dict(zip(("system", "user", "assistant"), _cases(body), strict=True))
    text = "" if messages[0][0] == "system" else without.removesuffix("{{ end }}")
    return text + "".join(pieces[role].replace("{{ .Content }}", content) for role, content in messages)


def _cases(body: str) -> list[str]:
    body = body.removesuffix("{{ end }}{{ end }}").removeprefix('{{ if eq .Role "system" }}')
    system, rest = body.split('{{ else if eq .Role "user" }}')
    return [system, *rest.split("{{ else }}")]


LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
DEFAULTED = (  # a template that adds its own system message, as SmolLM2's does
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}" + CHATML
)


@pytest.mark.parametrize("jinja", [CHATML, LLAMA3, DEFAULTED], ids=["chatml", "llama3", "defaulted"])
def test_the_translated_template_says_the_same(jinja: str, tokenizer: PreTrainedTokenizerFast) -> None:
    from dpo_cli.hub.gguf import go_template

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, bos_token="", eos_token="<|im_end|>"
    )
    tokenizer.chat_template = jinja
    template = go_template(tokenizer)
    assert template is not None
    for talk in (
        [("user", "Why?")],
        [("system", "Be short."), ("user", "Why?")],
        [("user", "Why?"), ("assistant", "Because."), ("user", "So?")],
        [("system", "Be short."), ("user", "Why?"), ("assistant", "Because."), ("user", "So?")],
    ):
        messages = [{"role": role, "content": content} for role, content in talk]
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert spoken(template, *talk) == expected


def test_a_template_of_another_kind_is_left_to_ollama(tokenizer: PreTrainedTokenizerFast) -> None:
    from dpo_cli.hub.gguf import go_template

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>")
    tokenizer.chat_template = "{{ messages[-1]['content'] }}"
    assert go_template(tokenizer) is None
