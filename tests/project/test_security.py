"""What models, data, names and files bring is neither run nor believed nor shown raw, and nothing leaves the machine.

A child process runs a whole working day once, stdin closed and the network barred, and tells what it opened, unpickled
and called; the other tests look at what it left, or call the command's entry point here.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import traceback
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import pytest
import torch
import transformers.dynamic_module_utils
import yaml
from safetensors.torch import load_file, safe_open, save
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_cli.cli.app import main
from dpo_cli.reference.store import ReferenceCache
from dpo_cli.training.checkpoint import newest_checkpoint
from dpo_cli.utils.files import with_checksum
from tests.helpers import CHATML, Cli, bar_network, write_rows

# Escape sequences that colour, set the title and make a link, their one-byte form, a turn of the reading direction,
# and what rich would take for markup. No slash: it is part of names, too.
COLOUR, TITLE, LINK, C1, TURN = "\x1b[35;41m", "\x1b]0;PWN\x07", "\x1b]8;;x:evil\x1b\\", "\x9b35;41m", "\u202e"
STEERING = f"{COLOUR}{TITLE}{LINK}{C1}{TURN}"
HOSTILE = f"{STEERING}[red][bold]x"
MARKUP = HOSTILE + "[/foo]"
SECRETS = {
    name: f"canary-{number}-of-the-environment"
    for number, name in enumerate(
        ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "X_SECRET")
    )
}
ROWS = [
    {
        "prompt": [{"role": "user", "content": f"Why {number}? {MARKUP}"}],
        "chosen": [{"role": "assistant", "content": f"Because of {number}. {MARKUP}"}],
        "rejected": [{"role": "assistant", "content": f"No idea. {MARKUP}"}],
    }
    for number in range(6)
]


def controls(text: str) -> set[str]:
    """What of a text a terminal would not just show."""
    return {character for character in text if not character.isprintable() and character != "\n"}


class Canary:
    """A pickle of one makes the file when it is read as a pickle may be."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


# ---- a working day in a process of its own ----------------------------------------------------------------------

DRIVER = """
import json, os, sys, threading, time, traceback

told = {"attempts": [], "unpickled": [], "opened": []}
NETWORK = {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.sendmsg"}

def hook(event, arguments):
    if event in NETWORK:
        told["attempts"].append(f"{event} {arguments[1:] if event == 'socket.connect' else arguments}")
        raise OSError("no network here")
    if event == "pickle.find_class":
        told["unpickled"].append(f"{arguments[0]}.{arguments[1]}")
    if event == "open":
        told["opened"].append(str(arguments[0]))

sys.addaudithook(hook)
time.sleep = lambda seconds: None  # what the libraries do between their attempts
assert sys.stdin is None, "stdin is to be closed"
from dpo_cli.cli.app import main

def drain(master, file):
    with file, os.fdopen(master, "rb", 0) as stream:
        try:
            while chunk := stream.read(4096):
                file.write(chunk)
        except OSError:  # the other end was closed
            pass

def to_file(name):
    return os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

for number, command in enumerate(json.loads(sys.argv[1])):
    thread = None
    if command["terminal"]:
        master, slave = os.openpty()
        thread = threading.Thread(target=drain, args=(master, open(f"{number}.err", "wb")))
        thread.start()
        ends = (slave, os.dup(slave))
    else:
        ends = (to_file(f"{number}.out"), to_file(f"{number}.err"))
    for end, descriptor in zip(ends, (1, 2)):
        os.dup2(end, descriptor)
        os.close(end)
    for events in told.values():
        events.clear()
    os.umask(command["umask"])
    sys.argv = ["dpo", *command["arguments"]]
    try:
        main()
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    for descriptor in (1, 2):
        end = to_file(os.devnull)
        os.dup2(end, descriptor)
        os.close(end)
    if thread:
        thread.join()
    with open(f"{number}.told", "w") as file:
        json.dump({"code": code or 0, **told}, file)
"""


@dataclass(frozen=True)
class Done:
    """A command of that day, and what it did; of one on a terminal ``err`` is all that the terminal got."""

    code: int
    out: str
    err: str
    attempts: list[str]
    unpickled: list[str]
    opened: list[str]


@dataclass(frozen=True)
class Day:
    folder: Path  # where the commands ran
    run: Path
    private_run: Path  # the same, with a umask that leaves others nothing
    cache: Path
    done: dict[str, Done]


@pytest.fixture(scope="module")
def day(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Day:
    above = tmp_path_factory.mktemp("day")
    folder, home = above / "here", above / "home"
    for each in (folder, home):
        each.mkdir()
    copy_of(tiny, folder / "model")
    torch.save({"weight": Canary(folder / "CANARY")}, folder / "model" / "pytorch_model.bin")
    copy_of(tiny, folder / f"model{HOSTILE}")
    write_rows(folder / "rows.jsonl", ROWS)
    write_rows(folder / f"rows{HOSTILE}.jsonl", ROWS)
    write_rows(folder / "mixed.jsonl", [*ROWS, {"prompt": MARKUP}])
    common = ["--cache-dir", "cache"]
    trained = ["--batch-size", "2", "--save-steps", "1", "--lr", "1e-2", "--show-answers", "1"]
    commands: dict[str, dict[str, Any]] = {
        "train": {"arguments": [
            "train", "--model", "model", "--data", "mixed.jsonl", "--eval-data", "rows.jsonl",
            "--on-bad-row", "skip", "--output", "../outside/run", *trained, *common,
        ]},
        "resume": {"arguments": ["train", "--resume", "../outside/run"]},
        "precompute-ref": {"arguments": [
            "precompute-ref", "--model", "model", "--data", "rows.jsonl", "--verify", "2", "--json", *common,
        ]},
        "eval": {"arguments": [
            "eval", "--model", "../outside/run", "--data", "rows.jsonl", "--per-pair", "pairs.jsonl", "--json", *common,
        ]},
        "refused": {"arguments": ["train", "--model", "model", "--data", "mixed.jsonl", "--debug"]},
        "terminal": {"terminal": True, "umask": 0o077, "arguments": [
            "train", "--model", f"model{HOSTILE}", "--data", f"rows{HOSTILE}.jsonl", "--eval-data", "rows.jsonl",
            "--output", "private", *trained, *common,
        ]},
        "terminal, refused": {"terminal": True, "arguments": ["eval", "--model", "model", "--data", "mixed.jsonl"]},
        "hub": {"arguments": ["precompute-ref", "--model", "someone/something", "--data", "rows.jsonl"]},
    }  # fmt: skip
    given = [{"terminal": False, "umask": 0o022} | command for command in commands.values()]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    environment = kept | SECRETS | {"HOME": str(home), "OMP_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "400"}
    closed = ["sh", "-c", 'exec "$@" <&-', "sh", sys.executable, "-c", DRIVER, json.dumps(given)]
    ended = subprocess.run(closed, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr

    def text(file: Path) -> str:
        return file.read_bytes().decode(errors="surrogateescape") if file.exists() else ""

    done = {
        name: Done(out=text(folder / f"{number}.out"), err=text(folder / f"{number}.err"), **json.loads(told))
        for number, name in enumerate(commands)
        for told in [(folder / f"{number}.told").read_text()]
    }
    return Day(folder, above / "outside" / "run", folder / "private", folder / "cache", done)


WORK = ("train", "resume", "precompute-ref", "eval", "terminal")


def copy_of(source: Path, folder: Path) -> Path:
    shutil.copytree(source, folder)
    return folder


def outputs(day: Day) -> list[Path]:
    """Every file that the commands wrote."""
    trees = [path for folder in (day.run, day.private_run, day.cache) for path in folder.rglob("*") if path.is_file()]
    return [*trees, day.folder / "pairs.jsonl"]


# ---- with stdin closed ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WORK)
def test_commands_work_with_stdin_closed(day: Day, name: str) -> None:
    done = day.done[name]
    assert done.code == 0 and "Traceback" not in done.err, done.err


def test_with_stdin_closed_the_exit_codes_are_as_ever(day: Day) -> None:
    for name in ("terminal, refused", "hub"):
        assert day.done[name].code == 2 and "Traceback" not in day.done[name].err, day.done[name].err


def test_debug_shows_the_traceback_and_keeps_the_exit_code(day: Day) -> None:
    done = day.done["refused"]
    assert "Traceback" in done.err and "1 of 7 rows cannot be used" in done.err
    assert done.code == 2


# ---- nothing is pickled -----------------------------------------------------------------------------------------

KINDS = {".safetensors", ".json", ".jsonl", ".yaml", ".md", ".jinja", ".html", ".png"}


def looks_pickled(content: bytes) -> bool:
    """Whether it begins as a pickle of protocol 2 to 5 or as a zip file, which ``torch.save`` writes."""
    return content[:4] == b"PK\x03\x04" or (content[:1] == b"\x80" and content[1:2] in (b"\2", b"\3", b"\4", b"\5"))


def test_a_pickle_would_be_seen(tmp_path: Path) -> None:
    torch.save([1], tmp_path / "zip")
    torch.save([1], tmp_path / "plain", _use_new_zipfile_serialization=False)
    assert all(looks_pickled((tmp_path / name).read_bytes()) for name in ("zip", "plain"))


def test_no_output_is_or_holds_a_pickle(day: Day) -> None:
    """A tensor of bytes, such as a random state, could hide one."""
    written = outputs(day)
    names = {path.name for path in written}
    assert {"optimizer.safetensors", "tokenizer.json", "refused.jsonl", "README.md"} <= names
    assert {path.suffix for path in written} <= KINDS
    assert [path for path in written if looks_pickled(path.read_bytes())] == []
    for path in written:
        if path.suffix == ".png":
            continue
        if path.suffix != ".safetensors":
            path.read_text(encoding="utf-8")
            continue
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dict)
            assert set(file.metadata() or {}) <= {"format"}, path
        for name, tensor in tensors.items():
            assert not looks_pickled(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()), (path, name)


def test_text_that_is_written_cannot_steer_a_terminal(day: Day) -> None:
    """It may be shown as it is: by cat, by less, by an editor. A tab of an answer on the report's page does no harm."""
    texts = {path: path.read_text() for path in outputs(day) if path.suffix not in (".safetensors", ".jinja", ".png")}
    harmless = {path: {"\t"} if path.suffix == ".html" else set() for path in texts}
    found = {path: {c for c in controls(text) if unicodedata.category(c) == "Cc"} for path, text in texts.items()}
    assert [path.name for path in found if found[path] - harmless[path]] == []


@pytest.mark.parametrize("name", WORK)
def test_nothing_is_unpickled(day: Day, name: str) -> None:
    assert day.done[name].unpickled == []


# ---- nothing leaves the machine ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", WORK)
def test_local_model_and_data_need_no_network(day: Day, name: str) -> None:
    assert day.done[name].attempts == []


def test_an_attempt_would_be_seen(day: Day) -> None:
    assert any("huggingface.co" in attempt for attempt in day.done["hub"].attempts)


def test_secrets_of_the_environment_stay_there(day: Day) -> None:
    """Neither are they told, nor written to any file, the libraries' own included; ``--debug`` or not."""
    shown = [text for done in day.done.values() for text in (done.out, done.err)]
    texts = shown + [str(path) for path in day.folder.parent.rglob("*")]
    contents = [path.read_bytes() for path in day.folder.parent.rglob("*") if path.is_file()]
    for name, secret in SECRETS.items():
        assert not [text for text in texts if secret in text], name
        assert not [content for content in contents if secret.encode() in content], name
    assert any(b"Because of" in content for content in contents)  # they were read


# ---- what is written, and where ---------------------------------------------------------------------------------


def test_only_the_run_and_the_cache_are_written(day: Day) -> None:
    """The run lies where ``--output`` says, above the working folder; nothing is left anywhere else.

    But for the list of fonts that matplotlib makes for all who draw with it.
    """
    above = day.folder.parent
    assert {path.name for path in above.iterdir()} == {"here", "home", "outside"}
    assert {path.name for path in (above / "outside").iterdir()} == {"run"}
    home = [path.relative_to(above / "home") for path in (above / "home").rglob("*") if path.is_file()]
    assert [path for path in home if not path.match(".cache/matplotlib/fontlist-*.json")] == []
    own = {f"{number}.{kind}" for number in range(len(day.done)) for kind in ("out", "err", "told")}
    given = {"model", f"model{HOSTILE}", "rows.jsonl", f"rows{HOSTILE}.jsonl", "mixed.jsonl"}
    assert {path.name for path in day.folder.iterdir()} - own - given == {"cache", "private", "pairs.jsonl"}


def test_no_temporary_file_is_left(day: Day) -> None:
    names = {path.name for folder in (day.run, day.private_run, day.cache) for path in folder.rglob("*")}
    assert "model.safetensors" in names
    assert not [name for name in names if name.startswith(".") or name.endswith((".tmp", ".lock", "~"))]


def modes(folder: Path) -> set[tuple[bool, int]]:
    """Of everything in a folder: whether it is a folder, and its mode."""
    return {(path.is_dir(), stat.S_IMODE(path.stat().st_mode)) for path in [folder, *folder.rglob("*")]}


def test_file_modes_are_those_of_the_umask(day: Day) -> None:
    """Temporary files and those of safetensors are private first."""
    assert modes(day.run) == {(True, 0o755), (False, 0o644)}
    assert modes(day.private_run) == {(True, 0o700), (False, 0o600)}


def test_the_export_loads_and_holds_the_trained_weights(day: Day, tiny: Path) -> None:
    trained = load_file(day.run / "checkpoints" / "step-000003" / "weights.safetensors")
    model = AutoModelForCausalLM.from_pretrained(day.run / "model")
    loaded = dict(model.named_parameters())
    assert loaded.keys() == trained.keys()
    assert all(torch.equal(loaded[name], trained[name]) for name in trained)
    start = load_file(tiny / "model.safetensors")
    assert not any(torch.equal(trained[name], start[name]) for name in trained)
    one, other = (AutoTokenizer.from_pretrained(folder) for folder in (day.run / "model", tiny))
    messages = ROWS[0]["prompt"]
    assert one.apply_chat_template(messages, tokenize=False) == other.apply_chat_template(messages, tokenize=False)
    assert one(MARKUP)["input_ids"] == other(MARKUP)["input_ids"]


def front_matter(card: str) -> dict[str, Any]:
    begin, meta, _ = card.split("---\n", 2)
    values = yaml.safe_load(meta)
    assert begin == "" and isinstance(values, dict)
    return values


def test_the_export_tells_no_local_path_and_has_no_placeholder(day: Day) -> None:
    texts = {path.name: path.read_text() for path in (day.run / "model").iterdir() if path.suffix != ".safetensors"}
    assert {"README.md", "config.json", "tokenizer_config.json"} <= set(texts)
    for name, text in texts.items():
        assert str(day.folder.parent) not in text and "../" not in text, name
    card = texts["README.md"]
    assert not [word for word in ("None", "TODO", "null", "{", "[More", "unknown") if word in card]
    assert "6 preference pairs" in card and "| 0.01 |" in card
    assert all(value and value not in ("None", [None], ["None"]) for value in front_matter(card).values())


# ---- commands in this process -----------------------------------------------------------------------------------


@dataclass
class Here:
    """The command's entry point in an empty folder with an empty cache."""

    folder: Path
    call: Cli

    @property
    def canary(self) -> Path:
        return self.folder / "CANARY"

    def __call__(self, *arguments: Any) -> subprocess.CompletedProcess[str]:
        return self.call(*arguments)

    def dry(self, model: Any, *arguments: Any) -> subprocess.CompletedProcess[str]:
        """Everything up to the first step, on two plain rows."""
        write_rows(self.folder / "plain.jsonl", PLAIN)
        return self.call("train", "--dry-run", "--model", model, "--data", "plain.jsonl", *arguments)


PLAIN = [
    {
        "prompt": [{"role": "user", "content": f"Why {number}?"}],
        "chosen": [{"role": "assistant", "content": "Because."}],
        "rejected": [{"role": "assistant", "content": "No idea."}],
    }
    for number in range(2)
]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Here]:
    """Fails in the end if something called the network."""
    at_first = signal.getsignal(signal.SIGTERM)
    attempts = bar_network(monkeypatch)
    for name in ("TRANSFORMERS_VERBOSITY", "TQDM_DISABLE"):
        monkeypatch.setenv(name, "")  # the command sets them, and they go back at the test's end
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "home" / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "home" / "modules"))
    monkeypatch.chdir(tmp_path)

    def run(*arguments: Any) -> subprocess.CompletedProcess[str]:
        capfd.readouterr()
        monkeypatch.setattr(sys, "argv", ["dpo", *map(str, arguments)])
        code: Any = 0
        try:
            main()
        except SystemExit as ended:
            code = ended.code
        except Exception:  # as Python ends a process
            traceback.print_exc()
            code = 1
        out, err = capfd.readouterr()
        return subprocess.CompletedProcess(arguments, int(code or 0), out, err)

    yield Here(tmp_path, run)
    signal.signal(signal.SIGTERM, at_first)
    assert attempts == []


@pytest.fixture
def model(here: Here, tiny: Path) -> Path:
    return copy_of(tiny, here.folder / "m")


def change(file: Path, **values: Any) -> None:
    """Other values for some keys of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def refused(out: subprocess.CompletedProcess[str]) -> str:
    """The message of a refusal; all that every refusal has in common is checked."""
    assert "Traceback" not in out.stderr, out.stderr
    assert out.returncode == 2, out.stderr
    assert out.stdout == "" and out.stderr.count("error: ") >= 1
    return out.stderr.partition("error: ")[2]


# ---- weights that are pickles -----------------------------------------------------------------------------------


def only_pickled(model: Path) -> None:
    (model / "model.safetensors").unlink()


def beside_another_name(model: Path) -> None:
    (model / "model.safetensors").rename(model / "decoy.safetensors")


def named_by_an_index(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    beside_another_name(model)
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "pytorch_model.bin")}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))


def named_safetensors(model: Path) -> None:
    (model / "pytorch_model.bin").rename(model / "model.safetensors")


def of_an_adapter(model: Path) -> None:
    (model / "pytorch_model.bin").rename(model / "adapter_model.bin")
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "../m", "r": 2, "target_modules": ["q_proj"]}
    (model / "adapter_config.json").write_text(json.dumps(adapter | {"task_type": "CAUSAL_LM"}))


@pytest.mark.parametrize(
    "weights", [only_pickled, beside_another_name, named_by_an_index, named_safetensors, of_an_adapter]
)
@pytest.mark.parametrize("kind", ["hostile", "honest"])
def test_pickled_weights_are_refused(kind: str, weights: Callable[[Path], None], here: Here, model: Path) -> None:
    """Nor is it tried whether they are what they should be."""
    pickle = {"weight": Canary(here.canary)} if kind == "hostile" else load_file(model / "model.safetensors")
    torch.save(pickle, model / "pytorch_model.bin")
    weights(model)
    assert "--model" in refused(here.dry("m"))
    assert not here.canary.exists()


@pytest.mark.parametrize("place", ["../n", "{here}/n", "sub/../../n"])
def test_weights_that_lie_elsewhere_are_refused(place: str, here: Here, model: Path) -> None:
    """An index may name any path; what lies outside of the folder is not the model's."""
    copy_of(model, here.folder / "n")
    (model / "sub").mkdir()
    weights = load_file(model / "model.safetensors")
    beside_another_name(model)
    file = f"{place.format(here=here.folder)}/model.safetensors"
    index = {"metadata": {}, "weight_map": dict.fromkeys(weights, file)}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "--model" in refused(here.dry("m"))


def test_a_pickle_with_the_name_of_a_gguf_is_refused(here: Here, model: Path) -> None:
    torch.save({"weight": Canary(here.canary)}, model / "m.gguf")
    assert "--model m" in refused(here.dry("m/m.gguf"))
    assert not here.canary.exists()


def test_a_pickle_beside_safetensors_is_not_even_opened(day: Day) -> None:
    assert any(name.endswith("model/config.json") for name in day.done["train"].opened)
    assert not [name for done in day.done.values() for name in done.opened if name.endswith(".bin")]
    assert not (day.folder / "CANARY").exists()
    assert not list(day.run.rglob("*.bin"))


def test_such_a_pickle_would_make_the_file(tmp_path: Path) -> None:
    torch.save({"weight": Canary(tmp_path / "CANARY")}, tmp_path / "pytorch_model.bin")
    torch.load(tmp_path / "pytorch_model.bin", weights_only=False)
    assert (tmp_path / "CANARY").exists()


# ---- code that a model brings -----------------------------------------------------------------------------------


def bring_code(model: Path, canary: Path, kind: str) -> None:
    """Python files that make the canary's file at import, named by the model's configuration."""
    code = (
        f"from pathlib import Path\nPath({str(canary)!r}).touch()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        "class X(LlamaConfig):\n    model_type = 'x'\n"
        "class XModel(LlamaForCausalLM):\n    config_class = X\n"
        "class XTokenizer(PreTrainedTokenizerFast):\n    pass\n"
    )
    for name in ("modeling_x", "tokenization_x", "__init__", "modeling_llama", "sitecustomize"):
        (model / f"{name}.py").write_text(code)
    (model / "custom_generate").mkdir()
    (model / "custom_generate" / "generate.py").write_text(code)
    if kind != "tokenizer":
        change(
            model / "config.json", auto_map={"AutoConfig": "modeling_x.X", "AutoModelForCausalLM": "modeling_x.XModel"}
        )
    if kind == "model of an unknown type":
        change(model / "config.json", model_type="x")
    if kind == "tokenizer":
        names = {"AutoTokenizer": [None, "tokenization_x.XTokenizer"]}
        change(model / "tokenizer_config.json", auto_map=names, tokenizer_class="XTokenizer")


@pytest.mark.parametrize("kind", ["model of an unknown type", "tokenizer"])
def test_a_model_that_needs_its_own_code_is_refused(
    kind: str, here: Here, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where someone types y to whatever is asked. The message names the option that would run it."""
    bring_code(model, here.canary, kind)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    assert "--trust-remote-code" in refused(here.dry("m"))
    assert not here.canary.exists()


def test_a_model_that_brings_code_and_does_not_need_it_is_loaded_without(
    here: Here, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bring_code(model, here.canary, "model of a known type")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    out = here.dry("m")
    assert out.returncode == 0, out.stderr
    assert not here.canary.exists()


@pytest.mark.parametrize("kind", ["model of an unknown type", "tokenizer"])
def test_such_code_is_run_on_demand(kind: str, here: Here, model: Path) -> None:
    """So that the tests above say something."""
    bring_code(model, here.canary, kind)
    here.dry("m", "--trust-remote-code")
    assert here.canary.exists()


def test_a_run_cannot_ask_for_its_own_code(day: Day, here: Here) -> None:
    """That option is the user's alone: who evaluates a folder from elsewhere has not agreed to it."""
    run = copy_of(day.run, here.folder / "run")
    options = yaml.safe_load((run / "config.yaml").read_text()) | {"trust_remote_code": True}
    (run / "config.yaml").write_text(yaml.safe_dump(options))
    rewrite(run / "manifest.json", config=entry(run / "config.yaml")["sha256"])
    bring_code(run / "model", here.canary, "model of a known type")
    out = here("eval", "--model", "run", "--data", day.folder / "rows.jsonl", "--cache-dir", day.cache)
    assert f"reference   {day.folder / 'model'}" in out.stderr  # its reference is found from another folder
    assert not here.canary.exists()


OLD_NAME = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's


@pytest.fixture(scope="module")
def lora(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the tiny model, with a tokenizer of its own."""
    from peft import LoraConfig, get_peft_model

    folder = tmp_path_factory.mktemp("adapters") / "lora"
    base = AutoModelForCausalLM.from_pretrained(tiny)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft reads what transformers renamed
        adapter = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapter.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return folder


@pytest.fixture
def adapter(here: Here, model: Path, lora: Path) -> Path:
    folder = copy_of(lora, here.folder / "a")
    change(folder / "adapter_config.json", base_model_name_or_path=str(model))
    return folder


@OLD_NAME
def test_an_adapter_is_loaded(here: Here, adapter: Path) -> None:
    """So that the tests below say something."""
    out = here.dry("a")
    assert out.returncode == 0, out.stderr


@OLD_NAME
def test_an_adapter_whose_tokenizer_needs_its_own_code_is_refused(
    here: Here, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bring_code(adapter, here.canary, "tokenizer")
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    assert "--trust-remote-code" in refused(here.dry("a"))
    assert not here.canary.exists()


@pytest.mark.parametrize("name", ["a", "./a/../a", "../none", "~nobody-of-that-name/m", None, 5, ["m"], "m\0"])
def test_an_adapter_of_no_model_is_refused(name: Any, here: Here, adapter: Path) -> None:
    """Or of itself."""
    change(adapter / "adapter_config.json", base_model_name_or_path=name)
    assert "--model" in refused(here.dry("a"))


@OLD_NAME
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "values",
    [
        {"megatron_config": {"x": 1}, "megatron_core": "canary_module"},
        {"auto_mapping": {"parent_library": "canary_module", "base_model_class": "x"}},
        {"peft_type": "XLORA", "adapters": {"x": "someone/something"}, "hidden_size": 32},
        {"peft_type": "NONE"},
        {"r": "many"},
        {"target_modules": "(" * 9},
    ],
    ids=lambda values: ", ".join(values),
)  # fmt: skip
def test_an_adapter_that_asks_for_other_things_gets_none(
    values: dict[str, Any], here: Here, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here.folder / "modules").mkdir()
    (here.folder / "modules" / "canary_module.py").write_text(f"open({str(here.canary)!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(str(here.folder / "modules"))
    change(adapter / "adapter_config.json", **values)
    out = here.dry("a")
    assert out.returncode in ((0,) if "auto_mapping" in values else (2,)), out.stderr
    assert not here.canary.exists()


@pytest.mark.parametrize(
    "values",
    [
        {"_attn_implementation": "someone/kernel"},
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"architectures": 5, "model_type": ["llama"]},
        {"hidden_size": "os.system"},
        {"dtype": "none_such"},
    ],
    ids=lambda values: ", ".join(values),
)
def test_a_configuration_that_asks_for_other_things_is_refused(values: dict[str, Any], here: Here, model: Path) -> None:
    """Nor is a kernel fetched for it."""
    change(model / "config.json", **values)
    assert "--model" in refused(here.dry("m"))


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("content", ["[]", "[" * 100_000], ids=["a list", "deep"])
def test_a_model_whose_json_is_of_another_kind_is_refused(content: str, file: str, here: Here, model: Path) -> None:
    (model / file).write_text(content)
    assert "--model" in refused(here.dry("m"))


# ---- code in a chat template ------------------------------------------------------------------------------------

MAKE = "os.mkdir('CANARY')"
RAISING = {  # what reaches for something that is barred
    "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "a global's module": "{{ cycler.__init__.__globals__." + MAKE + " }}",
    "another global's": "{{ joiner.__init__.__globals__." + MAKE + " }}",
    "a function's": "{{ lipsum.__globals__['os'].mkdir('CANARY') }}",
    "the template itself": "{{ self._TemplateReference__context.cycler.__init__.__globals__." + MAKE + " }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}{{ os.mkdir('CANARY') }}",
    "a list is changed": "{{ messages.append(1) }}",
    "a message is changed": "{% set _ = messages[0].update({'content': 'x'}) %}",
    "a namespace's class": "{% set ns = namespace() %}{% set ns.__class__ = 1 %}{{ ns.__init__.__globals__ }}",
    "a generator's frame": "{% set g = messages|map('string') %}{{ g.gi_frame.f_back.f_globals }}",
    "a format string": "{{ '{0.__class__.__init__.__globals__}'.format(cycler) }}",
    "endless recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "raise_exception": "{{ raise_exception('" + STEERING.replace("\\", "\\\\") + "') }}",
}
SILENT = {  # what is nothing there
    "a function's globals": "{{ lipsum.__globals__ }}",
    "attr": "{{ ''|attr('__class__')|attr('__mro__') }}",
    "an item": "{{ ''['__class__'] }}",
    "the last part of a format string": "{{ '{0.__class__}'.format('') }}",
    "format_map": "{{ '{x.__class__}'.format_map({'x': 1}) }}",
    "a helper's closure": "{{ strftime_now.__closure__ }}{{ raise_exception.__code__ }}",
}
OTHER = {  # what fails in a way of its own
    "a division by zero": "{{ 1 / 0 }}",
    "a long loop": "{% for i in range(10 ** 9) %}{% endfor %}",
    "a format string without values": "{{ '{0}'.format() }}",
    "an unknown encoding": "{{ 'x'.encode('nope') }}",
}


@pytest.mark.parametrize("name", RAISING)
def test_an_injection_by_the_template_is_refused(name: str, here: Here, model: Path) -> None:
    (model / "chat_template.jinja").write_text(RAISING[name] + CHATML)
    told = refused(here.dry("m"))
    assert told.startswith("plain.jsonl:1: the chat template refuses the messages: ")
    assert "2 of 2 rows cannot be used" in told and "root:" not in told and not controls(told)
    assert not here.canary.exists()


@pytest.mark.parametrize("name", SILENT)
def test_an_injection_by_the_template_yields_nothing(name: str, here: Here, model: Path) -> None:
    """The very tokens are made that the template gives without it."""
    plain = here("precompute-ref", "--model", "m", "--data", write_rows(here.folder / "plain.jsonl", PLAIN), "--json")
    (model / "chat_template.jinja").write_text(SILENT[name] + CHATML)
    out = here("precompute-ref", "--model", "m", "--data", "plain.jsonl", "--json")
    assert (plain.returncode, out.returncode) == (0, 0), out.stderr
    assert json.loads(plain.stdout)["misses"] == 2 and json.loads(out.stdout)["misses"] == 0


@pytest.mark.parametrize("name", OTHER)
def test_a_template_that_fails_is_refused(name: str, here: Here, model: Path) -> None:
    (model / "chat_template.jinja").write_text(OTHER[name] + CHATML)
    assert refused(here.dry("m")).startswith("plain.jsonl:1: the chat template refuses the messages: ")


def test_a_template_that_gives_no_text_is_refused(here: Here, model: Path) -> None:
    (model / "chat_template.jinja").write_text("{{ nothing }}")
    assert refused(here.dry("m")).startswith("plain.jsonl:1: ")


@pytest.mark.parametrize("name", ["a global's module", "another global's", "a function's", "the template itself"])
def test_such_injections_work_elsewhere(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the tests above say something."""
    monkeypatch.chdir(tmp_path)
    jinja2.Environment().from_string(RAISING[name]).render(messages=[])
    assert (tmp_path / "CANARY").exists()


# ---- objects in YAML --------------------------------------------------------------------------------------------

CALL = "!!python/object/apply:os.mkdir ['CANARY']"
YAML = {
    "a value": f"beta: {CALL}\n",
    "within a list": f"data: [plain.jsonl, {CALL}]\n",
    "a key": f"? {CALL}\n: 1\n",
    "all": f"{CALL}\n",
    "another kind": "beta: !!python/object/new:os.mkdir ['CANARY']\n",
    "a name": "model: !!python/name:os.mkdir\n",
    "a module": "model: !!python/module:antigravity\n",
}


@pytest.mark.parametrize("name", YAML)
def test_objects_in_the_config_are_refused(name: str, here: Here, model: Path) -> None:
    (here.folder / "run.yaml").write_text(YAML[name])
    assert "run.yaml" in refused(here.dry("m", "--config", "run.yaml"))
    assert not here.canary.exists()


def test_such_an_object_would_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the test above says something."""
    monkeypatch.chdir(tmp_path)
    yaml.unsafe_load(YAML["a value"])
    assert (tmp_path / "CANARY").exists()


def test_a_config_that_grows_as_it_is_read_is_told_in_few_words(here: Here) -> None:
    """Each line names the one before ten times: a few hundred bytes would be a message of megabytes."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]", *(f"a{n}: &a{n} [{f'*a{n - 1}, ' * 10}]" for n in range(1, 5))]
    (here.folder / "run.yaml").write_text("\n".join([*lines, "data: [*a4]", ""]))
    assert len(refused(here("train", "--config", "run.yaml"))) < 5000


# ---- a terminal -------------------------------------------------------------------------------------------------


@pytest.fixture
def hostile(here: Here, tiny: Path) -> list[Any]:
    """A model folder and a file of rows, each with such a name."""
    copy_of(tiny, here.folder / f"m{HOSTILE}")
    write_rows(here.folder / f"rows{HOSTILE}.jsonl", ROWS)
    return ["--model", f"m{HOSTILE}", "--data", f"rows{HOSTILE}.jsonl"]


def test_names_and_answers_cannot_steer_a_terminal(here: Here, hostile: list[Any]) -> None:
    """They are shown, but for their control characters; markup is shown as it stands."""
    held_out = ("--eval-data", f"rows{HOSTILE}.jsonl", "--show-answers", 2)
    run = f"run{HOSTILE}"
    commands = {
        "train": ("train", *hostile, *held_out, "--output", run, "--max-steps", 1),
        "resume": ("train", "--resume", run),
        "precompute": ("precompute-ref", *hostile, "--cache-dir", f"cache{HOSTILE}"),
        "eval": ("eval", "--model", run, *hostile[2:]),
        "json": ("eval", "--model", run, *hostile[2:], "--json"),
    }
    for name, arguments in commands.items():
        out = here(*arguments)
        assert out.returncode == 0, out.stderr
        assert "[red][bold]x" in out.stderr
        assert not controls(out.stdout + out.stderr), name
        if name == "train":
            assert "[red][bold]x[/foo]" in out.stdout
        if name == "json":
            assert json.loads(out.stdout)["pairs"] == len(ROWS)


BAD = [
    {
        "prompt": "Why?",
        "chosen": [{"role": MARKUP, "content": "x"}],
        "rejected": [{"role": "assistant", "content": "No."}],
    },
    {
        "prompt": "Why?",
        "chosen": [{"role": "[/foo]", "content": "x"}],
        "rejected": [{"role": "assistant", "content": "No."}],
    },
    {"prompt": "Why?", "chosen": "Because.", MARKUP: "No."},
    {"prompt": MARKUP, "chosen": MARKUP, "rejected": MARKUP},
]


@pytest.mark.parametrize("flag", [(), ("--debug",)], ids=["plain", "debug"])
def test_reasons_of_bad_rows_cannot_steer_a_terminal(flag: tuple[str, ...], here: Here, hostile: list[Any]) -> None:
    file = write_rows(here.folder / f"bad{HOSTILE}.jsonl", BAD)
    file.write_text(file.read_text() + '{"' + STEERING.replace("\\", "") + '": 1, "x": 1, "x": 2}\n')
    out = here("train", *hostile[:2], "--data", file.name, *flag)
    assert "unknown role" in out.stderr and "5 of 5 rows cannot be used" in out.stderr
    assert "unknown role '[/foo]'" in out.stderr
    assert not controls(out.stdout + out.stderr)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--data", f"none{MARKUP}.jsonl"),
        ("--data", f"none{MARKUP}"),
        ("--model", f"./none{MARKUP}"),
        ("--model", f"none{HOSTILE}"),
        ("--columns", f"x={MARKUP}"),
        ("--columns", f"chosen={MARKUP}"),
        ("--lr-scheduler", MARKUP),
        ("--config", f"none{MARKUP}"),
        ("--config", f"run{HOSTILE}.yaml"),
        ("--resume", f"none{MARKUP}"),
        ("--output", f"rows{HOSTILE}.jsonl"),
    ],
    ids=lambda arguments: " ".join(arguments).translate(dict.fromkeys(range(32))).encode("ascii", "ignore").decode(),
)
def test_names_in_errors_cannot_steer_a_terminal(
    arguments: tuple[str, str], here: Here, hostile: list[Any], tiny: Path
) -> None:
    (here.folder / f"run{HOSTILE}.yaml").write_text('"x\\e[31m[/foo]": 1\nbeta: "\\e[31m[/foo]"\n')
    given = {"--model": tiny, "--data": hostile[3]} | dict([arguments])
    told = refused(here("train", *(each for option in given.items() for each in option)))
    assert "[bold]x" in told or "x[/foo]" in told
    assert not controls(told)


@pytest.mark.parametrize(
    "arguments", [("train", MARKUP), ("train", f"--{MARKUP}"), (MARKUP,), ("train", "--beta", MARKUP)]
)
def test_names_that_are_no_argument_cannot_steer_a_terminal(arguments: tuple[str, ...], here: Here) -> None:
    """As when a shell's ``*`` gives one file too many; these messages are typer's."""
    out = here(*arguments)
    assert out.returncode == 2 and "Traceback" not in out.stderr
    assert out.stderr
    assert not {c for c in out.stdout + out.stderr if unicodedata.category(c) == "Cc"} - {"\n"}


def test_on_a_terminal_only_our_own_sequences_come_through(day: Day) -> None:
    """There the program moves the cursor and colours, and data still does not."""
    told = day.done["terminal"].err
    assert "\x1b[" in told  # a bar was drawn
    assert "model" in told and "held out" in told and "[red][bold]x[/foo]" in told
    refusal = day.done["terminal, refused"].err
    assert "mixed.jsonl:7: chosen is missing" in refusal
    for text in (told, refusal):
        assert not [each for each in (COLOUR, TITLE, LINK, C1, TURN, "\x1b]") if each in text]
        assert not {c for c in text if unicodedata.category(c) == "Cc"} - set("\x1b\r\n")


@pytest.mark.parametrize("name", ["a: [b", "null", "[None]", "a # b", "a\nlicense: evil", "- x", "'a"])
def test_a_model_folder_of_any_name_leaves_the_card_in_order(name: str, here: Here, tiny: Path) -> None:
    copy_of(tiny, here.folder / name)
    write_rows(here.folder / "plain.jsonl", PLAIN)
    out = here("train", "--model", f"./{name}", "--data", "plain.jsonl", "--output", "run")
    assert out.returncode == 0, out.stderr
    values = front_matter((here.folder / "run" / "model" / "README.md").read_text())
    assert set(values) == {"library_name", "pipeline_tag", "tags"}  # a local folder is no base model on the hub
    assert values["tags"][0] == "dpo" and all(isinstance(tag, str) for tag in values["tags"])


NO_UTF8 = os.fsdecode(b"\xff")


def test_a_run_folder_whose_name_is_no_utf8_is_refused_or_filled(here: Here, tiny: Path) -> None:
    """It must not turn out after training."""
    write_rows(here.folder / "plain.jsonl", PLAIN)
    out = here("train", "--model", tiny, "--data", "plain.jsonl", "--output", f"run{NO_UTF8}")
    assert "Traceback" not in out.stderr, out.stderr
    if out.returncode != 2:
        assert out.returncode == 0 and (here.folder / f"run{NO_UTF8}" / "model").is_dir()


def test_rows_of_a_file_whose_name_is_no_utf8_can_be_written_down(here: Here, tiny: Path) -> None:
    write_rows(here.folder / f"{NO_UTF8}.jsonl", PLAIN)
    out = here("eval", "--model", tiny, "--data", f"{NO_UTF8}.jsonl", "--per-pair", "pairs.jsonl")
    assert out.returncode == 0, out.stderr
    assert len([json.loads(line) for line in (here.folder / "pairs.jsonl").read_text().splitlines()]) == len(PLAIN)


# ---- checkpoints that point elsewhere ---------------------------------------------------------------------------

Change = Callable[[Path, dict[str, Any]], None]


def entry(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}


def no_files(folder: Path, manifest: dict[str, Any]) -> None:
    manifest["files"] = {}


def some_files(folder: Path, manifest: dict[str, Any]) -> None:
    """Those that it does not name may be anything."""
    del manifest["files"]["weights.safetensors"]
    (folder / "weights.safetensors").write_bytes(b"")


def a_file_too_many(folder: Path, manifest: dict[str, Any]) -> None:
    (folder / "x").write_bytes(b"x")
    manifest["files"]["x"] = entry(folder / "x")


def a_file_above(folder: Path, manifest: dict[str, Any]) -> None:
    (folder.parent.parent / "outside").write_bytes(b"mine")
    manifest["files"]["../../outside"] = entry(folder.parent.parent / "outside")


def the_files_above(folder: Path, manifest: dict[str, Any]) -> None:
    shutil.copytree(folder, folder.parent.parent / "elsewhere")
    manifest["files"] = {f"../../elsewhere/{name}": told for name, told in manifest["files"].items()}


def an_absolute_path(folder: Path, manifest: dict[str, Any]) -> None:
    (folder.parent.parent / "outside").write_bytes(b"mine")
    manifest["files"][str(folder.parent.parent / "outside")] = entry(folder.parent.parent / "outside")


def the_manifest_itself(folder: Path, manifest: dict[str, Any]) -> None:
    manifest["files"]["manifest.json"] = entry(folder / "manifest.json")


def another_step(folder: Path, manifest: dict[str, Any]) -> None:
    manifest["step"] = 4


def a_step_as_text(folder: Path, manifest: dict[str, Any]) -> None:
    manifest["step"] = "3"


def a_step_below_zero(folder: Path, manifest: dict[str, Any]) -> None:
    manifest["step"] = -3


def files_as_a_list(folder: Path, manifest: dict[str, Any]) -> None:
    manifest["files"] = list(manifest["files"])


def files_that_are_none(folder: Path, manifest: dict[str, Any]) -> None:
    manifest["files"] = None


def a_hash_that_is_none(folder: Path, manifest: dict[str, Any]) -> None:
    manifest["files"]["weights.safetensors"] = {"bytes": None, "sha256": None}


def a_folder_for_a_file(folder: Path, manifest: dict[str, Any]) -> None:
    (folder / "weights.safetensors").unlink()
    (folder / "weights.safetensors").mkdir()


def rewrite(file: Path, **values: Any) -> None:
    """Other values for some keys of a sealed file, sealed anew: as whoever made it would have."""
    content = {name: value for name, value in json.loads(file.read_text()).items() if name != "sha256"}
    file.write_text(json.dumps(with_checksum(content | values)))


@pytest.fixture
def checkpoints(day: Day, tmp_path: Path) -> Path:
    """Those of steps 2 and 3."""
    return copy_of(day.run / "checkpoints", tmp_path / "run" / "checkpoints")


def test_a_checkpoint_is_believed(checkpoints: Path) -> None:
    """So that the tests below say something."""
    rewrite(checkpoints / "step-000003" / "manifest.json")
    assert newest_checkpoint(checkpoints, pytest.fail) == (checkpoints / "step-000003", 3)


@pytest.mark.parametrize(
    "hostile",
    [
        no_files, some_files, a_file_too_many, a_file_above, the_files_above, an_absolute_path, the_manifest_itself,
        another_step, a_step_as_text, a_step_below_zero, files_as_a_list, files_that_are_none, a_hash_that_is_none,
        a_folder_for_a_file,
    ],
)  # fmt: skip
def test_a_checkpoint_that_says_something_else_is_not_believed(hostile: Change, checkpoints: Path) -> None:
    newest = checkpoints / "step-000003"
    manifest = json.loads((newest / "manifest.json").read_text())
    hostile(newest, manifest)
    rewrite(newest / "manifest.json", step=manifest["step"], files=manifest["files"])
    above = checkpoints.parent.parent
    outside = {name: content for name, content in contents(above).items() if "checkpoints" not in name}
    told: list[str] = []
    assert newest_checkpoint(checkpoints, told.append) == (checkpoints / "step-000002", 2)
    assert len(told) == 1 and "step-000003" in told[0]
    assert {name: content for name, content in contents(above).items() if "checkpoints" not in name} == outside


@pytest.mark.parametrize("content", ["", "[]", "null", "5", "[" * 100_000, "{" * 100], ids=lambda content: content[:9])
def test_a_checkpoint_whose_manifest_is_none_is_not_believed(content: str, checkpoints: Path) -> None:
    (checkpoints / "step-000003" / "manifest.json").write_text(content)
    assert newest_checkpoint(checkpoints, lambda told: None) == (checkpoints / "step-000002", 2)


# ---- a cache that points elsewhere ------------------------------------------------------------------------------

FINGERPRINT = "0123456789abcdef" * 4


def shard(content: bytes) -> str:
    return f"{hashlib.sha256(content).hexdigest()}.safetensors"


SHARD = {
    "keys": torch.arange(16, dtype=torch.uint8).view(1, 16),
    "logps": torch.ones(1),
    "token_logps": torch.ones(1),
    "lengths": torch.ones(1).long(),
    "reference": torch.tensor(list(FINGERPRINT[:32].encode()), dtype=torch.uint8),
}


def a_shard() -> bytes:
    return save(SHARD)


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder of someone's, with a whole shard and with one that is named as one."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / shard(a_shard())).write_bytes(a_shard())
    (folder / ("0" * 64 + ".safetensors")).write_bytes(b"mine")
    (folder / "model.safetensors").write_bytes(b"mine")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_shard_in_its_place_is_read(tmp_path: Path) -> None:
    """So that the tests below say something."""
    folder = ReferenceCache(tmp_path, FINGERPRINT, pytest.fail).folder
    folder.mkdir(parents=True)
    (folder / shard(a_shard())).write_bytes(a_shard())
    assert len(ReferenceCache(tmp_path, FINGERPRINT, pytest.fail).values) == 1


@pytest.mark.parametrize("name", [shard(a_shard()), "0" * 64 + ".safetensors", "model.safetensors"])
def test_a_link_is_no_shard(name: str, tmp_path: Path, outside: Path) -> None:
    cache = tmp_path / "cache"
    folder = ReferenceCache(cache, FINGERPRINT, pytest.fail).folder
    folder.mkdir(parents=True)
    (folder / name).symlink_to(outside / name)
    before, told = contents(outside), list[str]()
    assert ReferenceCache(cache, FINGERPRINT, told.append).values == {}
    assert contents(outside) == before and len(told) == (len(name) == 64 + len(".safetensors"))


@pytest.mark.parametrize("name", [shard(a_shard())])
def test_a_folder_is_no_shard(name: str, tmp_path: Path) -> None:
    folder = ReferenceCache(tmp_path, FINGERPRINT, pytest.fail).folder
    (folder / name).mkdir(parents=True)
    told: list[str] = []
    assert ReferenceCache(tmp_path, FINGERPRINT, told.append).values == {}
    assert len(told) == 1 and name[:12] in told[0]


def pickled() -> bytes:
    stream = io.BytesIO()
    torch.save([1], stream)
    return stream.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        pickled(),
        b"\xff" * 64,
        save({"x": torch.ones(1)}),
        save({"keys": torch.ones(1)}),
        save(SHARD | {"keys": torch.ones(1, 16)}),
        save(SHARD | {"keys": torch.ones(1, 16, dtype=torch.bfloat16)}),
        save(SHARD | {"logps": torch.tensor(1.0)}),
        save(SHARD | {"logps": torch.tensor([torch.nan])}),
        save(SHARD | {"lengths": torch.tensor(1)}),
    ],
    ids=[
        "empty",
        "JSON",
        "a pickle",
        "no header",
        "other tensors",
        "keys alone",
        "wide keys",
        "keys of another type",
        "one number",
        "no number",
        "one length",
    ],
)
def test_a_file_that_is_named_by_its_hash_and_is_no_shard_is_told(content: bytes, tmp_path: Path) -> None:
    folder = ReferenceCache(tmp_path, FINGERPRINT, pytest.fail).folder
    folder.mkdir(parents=True)
    (folder / shard(content)).write_bytes(content)
    told: list[str] = []
    assert ReferenceCache(tmp_path, FINGERPRINT, told.append).values == {}
    assert len(told) == 1


def test_the_cache_command_neither_steers_a_terminal_nor_follows_a_link(here: Here, outside: Path) -> None:
    folder = ReferenceCache(here.folder / "cache", FINGERPRINT, pytest.fail).folder
    folder.mkdir(parents=True)
    (folder / shard(a_shard())).write_bytes(a_shard())
    (folder / "about.json").write_text(json.dumps({"model": MARKUP, "layout": MARKUP}))
    (folder.parent / "linked").symlink_to(outside)
    (folder / ("0" * 64 + ".safetensors")).write_bytes(b"damaged")
    before = contents(outside)
    listed = here("cache", "list", "--cache-dir", "cache")
    assert listed.returncode == 0 and "[red][bold]x[/foo]" in listed.stdout, listed.stderr
    pruned = here("cache", "prune", "--cache-dir", "cache", "--older-than", "0", "--yes")
    assert "Traceback" not in pruned.stderr, pruned.stderr
    assert contents(outside) == before
    assert not controls(listed.stdout + listed.stderr + pruned.stdout + pruned.stderr)


# ---- a run that points elsewhere --------------------------------------------------------------------------------


@pytest.fixture
def run(day: Day, here: Here) -> Path:
    """A copy of a run, of its cache and of its data."""
    copy_of(day.cache, here.folder / "cache")
    for name in ("rows.jsonl", "mixed.jsonl"):
        shutil.copy(day.folder / name, here.folder)
    copy_of(day.folder / "model", here.folder / "model")
    return copy_of(day.run, here.folder / "run")


def evaluate(here: Here) -> subprocess.CompletedProcess[str]:
    return here("eval", "--model", "run", "--data", "rows.jsonl", "--cache-dir", "cache", "--kl", "none", "--json")


def test_the_run_evaluates_from_the_cache(here: Here, run: Path) -> None:
    """So that the tests below say something."""
    out = evaluate(here)
    assert out.returncode == 0 and "nothing to score" in out.stderr, out.stderr


@pytest.mark.parametrize("fingerprint", ["../../outside", "../../outside/", ".././..//outside/."])
def test_the_manifests_fingerprint_is_no_path(fingerprint: str, here: Here, run: Path) -> None:
    """A folder outside of the cache holds shards that are whole, with other numbers, and a file named as one."""
    elsewhere = here.folder / "outside"
    elsewhere.mkdir()
    for file in (here.folder / "cache").rglob("*.safetensors"):
        tensors = load_file(file)
        forged = save(tensors | {"logps": tensors["logps"] - 100})
        (elsewhere / shard(forged)).write_bytes(forged)
    (elsewhere / ("0" * 64 + ".safetensors")).write_bytes(b"mine")
    before = contents(elsewhere)
    reference = json.loads((run / "manifest.json").read_text())["reference"]
    rewrite(run / "manifest.json", reference=reference | {"fingerprint": fingerprint})
    out = evaluate(here)
    assert contents(elsewhere) == before
    assert "outside" not in out.stderr.partition("error: ")[0]  # nothing there was looked at
    refused(out)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model", "../../none"),
        ("model", "a/../../none"),
        ("model", "/none"),
        ("model", 5),
        ("fingerprint", None),
        ("fingerprint", 5),
        ("fingerprint", ""),
        ("fingerprint", "0" * 64),
    ],
)
def test_a_manifest_with_another_reference_is_refused(name: str, value: Any, here: Here, run: Path) -> None:
    """The cached numbers are put out of its reach, so that the model is asked for."""
    shutil.rmtree(here.folder / "cache")
    reference = json.loads((run / "manifest.json").read_text())["reference"]
    rewrite(run / "manifest.json", reference=reference | {name: value})
    before = contents(here.folder)
    refused(evaluate(here))
    written = contents(here.folder).keys() - before.keys()
    assert not [name for name in written if not name.startswith(("cache/weights/", "home/"))]


HOSTILE_FILES = {
    "manifest.json": (
        "[]",
        "null",
        "not JSON",
        "[" * 100_000,
        "{}",
        json.dumps(with_checksum({})),
        json.dumps(with_checksum({"reference": None, "config": None, "data": None})),
        json.dumps(with_checksum({"reference": {"model": "x"}, "config": 5, "data": []})),
    ),
    "config.yaml": ("", "[]", "beta: many", CALL, f"beta: {CALL}", "{", "[" * 5000),
}


@pytest.mark.parametrize("command", ["eval", "resume"])
@pytest.mark.parametrize(
    ("file", "content"),
    [(file, content) for file, all_ in HOSTILE_FILES.items() for content in all_],
    ids=lambda text: text[:40],
)
def test_a_run_whose_files_are_none_is_refused(command: str, file: str, content: str, here: Here, run: Path) -> None:
    (run / file).write_text(content)
    if file == "config.yaml":
        rewrite(run / "manifest.json", config=entry(run / "config.yaml")["sha256"])
    before = contents(run)
    refused(evaluate(here) if command == "eval" else here("train", "--resume", "run"))
    assert contents(run) == before and not here.canary.exists()


@pytest.mark.parametrize(
    "link",
    ["run.lock", "metrics.jsonl", "model", "checkpoints/step-000001", "checkpoints/.x.tmp", ".y.tmp", ".z.tmp"],
)
def test_going_on_with_a_run_never_writes_through_a_link(link: str, here: Here, run: Path) -> None:
    """Nor does it remove what a link leads to, neither as an old checkpoint nor as something left behind."""
    shutil.rmtree(run / "checkpoints" / "step-000003")  # so that there is something to do
    place, target = run / link, here.folder / "elsewhere" / "mine"
    target.parent.mkdir()
    if link == "metrics.jsonl":
        target.write_text(place.read_text() + "a line that is dropped\n")
        place.unlink()
    elif link in ("run.lock", ".z.tmp"):
        target.write_text("mine")
    else:
        target.mkdir()
        (target / "config.json").write_text("mine")
        shutil.rmtree(place, ignore_errors=True)
    place.symlink_to(target)
    before = contents(target.parent)
    out = here("train", "--resume", "run")
    assert contents(target.parent) == before
    assert "Traceback" not in out.stderr, out.stderr


@pytest.mark.parametrize(
    "name",
    ["../../etc", "a/../../b", "a/..", "..", "/etc", "file:///etc/passwd", "~nobody-of-that-name/m", "a/b:c", ""],
)
def test_a_model_that_is_a_way_elsewhere_is_refused(name: str, here: Here) -> None:
    """Before the network is asked for it."""
    assert "--model" in refused(here.dry(name))
