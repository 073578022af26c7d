"""The win rate of sampled answers, by a reward function and by a judge behind an address; conditions of ``--gate``."""

from __future__ import annotations

import importlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from dpo_cli.cli.app import app
from dpo_cli.config.checks import NUMBERS
from dpo_cli.config.options import EvalOptions
from dpo_cli.evaluation.gate import check_gates
from dpo_cli.evaluation.judge import Contest, Judge, by_reward, win_rate
from dpo_cli.evaluation.metrics import SIDES
from dpo_cli.evaluation.statistics import wilson
from dpo_cli.reporting.text import flat_numbers
from dpo_cli.utils.errors import UsageError
from tests.helpers import SAMPLE, make_model, write_rows

KEY = "sk-very-secret"
CONTESTS = [
    Contest("one", "long answer", "short"),
    Contest("one", "b", "c"),
    Contest("two", "x", "longer"),
    Contest("two", "same", "same"),
]


# ---- the rate ---------------------------------------------------------------------------------------------------


def test_win_rate_by_hand() -> None:
    """A win, a loss, one left open, a win; prompts are the observations, not answers."""
    result = win_rate(CONTESTS, lambda contests: [1.0, 0.0, float("nan"), 1.0])
    assert (result["share"], result["ties"], result["prompts"], result["contests"]) == (0.625, 0.25, 2, 4)
    assert result["unclear"] == 1
    assert result["share_interval"] == list(wilson(0.625 * 2, 2))
    assert (result["policy_longer"], result["policy_longer_contests"]) == (1.0, 1)
    assert (result["policy_shorter"], result["policy_shorter_contests"]) == (0.5, 1)


def test_a_reward_function_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my_rewards.py").write_text(
        "def longer(prompts, completions):\n    seen.append(prompts)\n    return map(len, completions)\n"
        "seen = []\n"
        "def few(prompts, completions):\n    return [1.0]\n"
        "def broken(prompts, completions):\n    raise KeyError('oops')\n"
        "def endless(prompts, completions):\n    return [float('inf')] * len(completions)\n"
    )
    contests = [Contest("p", "longest", "short"), Contest("q", "same", "size")]
    assert by_reward("my_rewards:longer")(contests) == [1.0, 0.5]
    assert importlib.import_module("my_rewards").seen == [["What is 2 + 2?"] * 2, ["p", "q"] * 2]
    for name, reason in (("few", "a finite number for each"), ("endless", "a finite"), ("broken", "KeyError: 'oops'")):
        with pytest.raises(UsageError, match=f"--reward my_rewards:{name}: .*{reason}"):
            by_reward(f"my_rewards:{name}")
    for name in ("my_rewards:none", "nowhere:longer", "my_rewards", ""):
        with pytest.raises(UsageError, match="write MODULE:FUNCTION"):
            by_reward(name)


# ---- a judge ----------------------------------------------------------------------------------------------------

Answer = Callable[[str], str]


class Server:
    """An OpenAI-compatible server whose model answers a question by ``answer``; ``fails``: with this status."""

    def __init__(self) -> None:
        self.answer: Answer = truth
        self.models, self.fails, self.questions, self.asked = ["judge-1"], 0, list[str](), dict[str, Any]()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def reply(self, content: Any, status: int = 200) -> None:
                body = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def do_GET(self) -> None:
                self.reply({"object": "list", "data": [{"id": name, "object": "model"} for name in outer.models]})

            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                question = asked["messages"][0]["content"]
                outer.questions.append(question)
                outer.asked = asked
                if "temperature" in asked and asked["model"] == "thinker":
                    self.reply({"error": {"message": "no temperature"}}, 400)
                    return
                if outer.fails:
                    self.reply({"error": {"message": f"bad key {self.headers['Authorization']}"}}, outer.fails)
                    return
                message = {"role": "assistant", "content": outer.answer(question)}
                choice = {"index": 0, "finish_reason": "stop", "message": message}
                about = {"id": "1", "object": "chat.completion", "created": 0, "model": asked["model"]}
                self.reply(about | {"choices": [choice]})

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


def answers(question: str) -> tuple[str, str]:
    first, _, rest = question.partition("<A>\n")[2].partition("\n</A>")
    return first, rest.partition("<B>\n")[2].partition("\n</B>")[0]


def truth(question: str) -> str:
    """Prefer the answer with more letters e; say so at length."""
    first, second = (each.count("e") for each in answers(question))
    if "2 + 2" in question:
        return "A" if "is 4" in answers(question)[0] else "B"
    return "B is my first thought.\n" + ("**A**" if first > second else "B." if second > first else "Tie")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = Server()
    yield server
    server.server.shutdown()
    server.server.server_close()


def test_a_judge_decides_in_both_orders(server: Server) -> None:
    contests = [Contest("p", "eee", "e"), Contest("p", "x", "ee"), Contest("p", "e", "e")]
    assert Judge(server.url, None)(contests) == [1.0, 0.0, 0.5]
    assert len(server.questions) == 1 + 2 * len(contests)


def test_a_judge_that_prefers_the_first_answer_ends_in_ties(server: Server) -> None:
    server.answer = lambda question: "A"
    assert Judge(server.url, "judge-1")([Contest("p", "eee", "e"), Contest("p", "", "eeee")]) == [0.5, 0.5]


def test_unclear_replies_are_counted_and_a_judge_may_refuse_a_temperature(server: Server) -> None:
    server.answer = lambda question: truth(question) if "2 + 2" in question else "Both."
    result = win_rate(CONTESTS, Judge(server.url, "thinker"))
    assert (result["unclear"], result["share"]) == (4, 0.5) and "temperature" not in server.asked


def test_a_judge_that_cannot_be_used(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for reply in ("I would rather not say.", "A is better than B", "B", ""):
        server.answer = lambda question, reply=reply: reply
        with pytest.raises(UsageError, match=r"does not reply A where A is '2 [+] 2 is 4'"):
            Judge(server.url, None)
    server.answer = lambda question: {"not": "text"}
    with pytest.raises(UsageError, match=r"its reply is not OpenAI's format"):
        Judge(server.url, None)
    with pytest.raises(UsageError, match=r"an address without user and query"):
        Judge("https://me:secret@host/v1", None)
    server.models = ["one", "two"]
    with pytest.raises(UsageError, match=r"--judge-model is missing; .* offers: one, two"):
        Judge(server.url, None)
    server.fails = 401
    with pytest.raises(UsageError, match=r"--judge http.*bad key Bearer \*\*\*") as error:
        Judge(server.url, "one")
    assert KEY not in str(error.value)
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(UsageError, match="set OPENAI_API_KEY"):
        Judge(server.url, "one")


# ---- the command ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path_factory.mktemp("judged")
    make_model().save_pretrained(folder / "model")
    make_model(seed=1).save_pretrained(folder / "other")
    for name in ("model", "other"):
        tokenizer.save_pretrained(folder / name)
    rows = [json.loads(line) for line in (SAMPLE / "heldout-strings.jsonl").read_text().splitlines()]
    write_rows(folder / "rows.jsonl", rows[:20])
    return folder


def evaluated(place: Path, *more: Any) -> Any:
    common = ("eval", "--model", place / "model", "--ref-model", place / "other", "--data", place / "rows.jsonl")
    common += ("--cache-dir", place / "cache", "--samples", 2, "--sample-prompts", 3, "--sample-tokens", 6)
    return CliRunner().invoke(app, [*map(str, (*common, *more))])


def test_the_command_reports_the_win_rate_and_ends_by_the_gate(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    Path("letters.py").write_text(
        "def count(prompts, completions):\n    return [len(set(text)) for text in completions]\n"
    )
    found = evaluated(place, "--reward", "letters:count", "--gate", "win_rate.share>=0, pairs > 3", "--json")
    assert found.exit_code == 0, found.output
    result = json.loads(found.stdout)
    ours, theirs = (
        [len(set(text.removesuffix("…"))) for each in result["samples"] for text in each[f"{model}_sampled"]]
        for model in ("policy", "reference")
    )
    expected = [(a > b) + (a == b) / 2 for a, b in zip(ours, theirs, strict=True)]
    assert result["win_rate"]["share"] == pytest.approx(sum(expected) / 6) and len(set(expected)) > 1
    assert [gate["passed"] for gate in result["gates"]] == [True, True]
    names = [name.replace("*", side) for text in NUMBERS.values() for name in text.split() for side in SIDES]
    assert flat_numbers(result).keys() <= {*names}, "what --gate may name"
    absent = {name for name in names if not name.startswith("trained_on.")} - flat_numbers(result).keys()
    assert absent <= {"length.accuracy_chosen_longer", "length.accuracy_chosen_shorter"}


def test_a_gate_that_does_not_pass_is_exit_code_3(place: Path, server: Server) -> None:
    """With all of the evaluation shown; a judge that fails in the end loses only the win rate."""

    def once(question: str) -> str:
        server.fails = 400
        return "A"

    server.answer = once
    found = evaluated(place, "--judge", server.url, "--gate", "loss<1e-9,win_rate.share>0.5")
    assert found.exit_code == 3, found.output
    assert "gate FAILED: loss<1e-9 (it is " in found.stdout and "On 20 pairs the model favors" in found.stdout
    assert "gate FAILED: win_rate.share>0.5 (no such number" in found.stdout
    assert "so there is no win rate" in found.stderr and KEY not in found.output


def test_gates_by_hand() -> None:
    result: dict[str, Any] = {"loss": 0.5, "pairs": 30, "length": {"share": 0.25}, "none": float("nan")}
    result |= {"intervals": {"loss": [0.4, 0.6]}, "judged": {"enough": True}}
    texts = "loss<0.6,loss>=.5,loss > 5e-1,length.share<=0.25,none>0,los<1,loss.high<0.6,loss.low>=0.4"
    gates = check_gates(texts, result)
    assert [gate["passed"] for gate in gates] == [True, True, False, True, False, False, False, True]
    assert gates[5]["text"] == "no such number; did you mean 'loss'?"
    (few,) = check_gates("loss<0.6", result | {"judged": {"enough": False}})
    assert not few["passed"] and few["text"] == "it is 0.5000, of too few pairs to judge"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"gate": "loss=3"}, "--gate loss=3: must be conditions"),
        ({"gate": "loss<"}, "must be conditions"),
        ({"gate": "accuracy>0.7"}, "--gate accuracy: no such number; did you mean 'rewards/accuracies'?"),
        ({"gate": "loss<1,kl.high<2"}, "--gate kl.high: no such number; did you mean 'kl/chosen'?"),
        ({"gate": "kl/chosen<1", "kl": "none"}, "--gate kl/chosen: needs --kl exact"),
        ({"gate": "sequence_kl.token_kl<1"}, "--gate sequence_kl.token_kl: needs --samples"),
        ({"gate": "win_rate.share.low>0.5", "samples": 1}, "--gate win_rate.share.low: needs --reward or --judge"),
        ({"reward": "a:b"}, "--reward, --judge: need --samples"),
        ({"reward": "a:b", "judge": "http://x", "samples": 1}, "--reward and --judge: give one of them"),
        ({"judge_model": "x", "samples": 1}, "--judge-model: needs --judge"),
    ],
)
def test_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError) as error:
        EvalOptions(data=["x"], **options)
    assert reason in str(error.value)
