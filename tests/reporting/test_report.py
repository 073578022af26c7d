"""The report: what is absent, what is odd, and S3: nothing in the data becomes a part of the page."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import math
import re
import time
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from dpo_cli.evaluation.diagnostics import judge
from dpo_cli.evaluation.evaluator import Evaluation
from dpo_cli.losses.objective import parse_objective
from dpo_cli.reporting import plots
from dpo_cli.reporting.html import MAX_TOKENS, ReportInput, fold, page, shade, shown, write_report
from dpo_cli.reporting.plots import png, write_plots
from dpo_cli.reporting.text import format_interval, number, percent
from dpo_cli.utils.errors import NotWrittenError
from tests.helpers import ROOT
from tests.helpers.payloads import PAYLOADS, report_of
from tests.helpers.synthetic import make_evaluation, make_history, make_pair, make_scores, make_token, make_tokens

pytestmark = pytest.mark.pictures
TOKEN = "data-t"  # the one attribute that holds text of the data
VOID = {"meta", "br", "img", "input", "link", "base", "use", "path", "rect"}


class Parsed(HTMLParser):
    """Elements with their attributes in order, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.comments: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.open += [tag] if tag not in VOID else []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def handle_comment(self, data: str) -> None:
        self.comments.append(data)

    def skeleton(self) -> list[tuple[str, dict[str, str | None]]]:
        return [(tag, {n: v for n, v in attributes.items() if n != TOKEN}) for tag, attributes in self.elements]

    def sections(self) -> list[str | None]:
        return [attributes["id"] for tag, attributes in self.elements if tag == "section"]


# ---- S3: data stay text -----------------------------------------------------------------------------------------


def test_there_are_sixty_payloads() -> None:
    assert len(set(PAYLOADS)) == len(PAYLOADS) == 60


@pytest.fixture(scope="module")
def harmless() -> Parsed:
    return Parsed(page(report_of("harmless")))


@pytest.mark.parametrize("payload", PAYLOADS, ids=range(len(PAYLOADS)))
def test_a_payload_changes_nothing_but_text(payload: str, harmless: Parsed) -> None:
    """The page has the elements and attributes of one whose every text is harmless, to the last."""
    found = Parsed(page(report_of(payload)))
    assert found.skeleton() == harmless.skeleton()
    assert not found.comments
    text, plain = "".join(found.texts).replace("↵\n", "\n"), shown(payload)
    text = text.replace(json.dumps(payload)[1:-1], plain)  # in the manifest and the options
    assert text.count(plain) >= "".join(harmless.texts).count("harmless") >= 30
    in_attributes = [attributes[TOKEN] for _, attributes in found.elements if TOKEN in attributes]
    assert in_attributes == [plain.replace("\n", "↵")] * 2


def test_all_payloads_at_once_with_plots() -> None:
    """A picture holds no text of the data: its bytes are those of a page of harmless ones."""
    everything = " ".join(PAYLOADS)
    texts = [page(report_of(text, plots=True)) for text in (everything, "harmless")]
    assert Parsed(texts[0]).skeleton() == Parsed(texts[1]).skeleton()
    drawn = [re.findall(r'src="data:image/png;base64,[^"]+"', text) for text in texts]
    assert drawn[0] == drawn[1] and len(drawn[0]) == 3


def test_nothing_outside_is_named_and_nothing_runs() -> None:
    found = Parsed(page(ReportInput("run", make_evaluation(), make_history(60), {"a": 1}, {"b": 2})))
    tags = {tag for tag, _ in found.elements}
    assert not tags & {"script", "svg", "link", "base", "iframe", "object", "embed", "form", "image", "foreignobject"}
    for _, attributes in found.elements:
        assert not any(name.startswith("on") or name in ("srcset", "style", "action") for name in attributes)
        assert (attributes.get("src") or "data:image/png;base64,").startswith("data:image/png;base64,")
        assert (attributes.get("href") or "#").startswith("#")
        assert all(
            link.startswith("#") for value in attributes.values() for link in re.findall(r"url\((.*?)\)", value or "")
        )
    style = found.texts[found.texts.index(next(text for text in found.texts if "color-scheme" in text))]
    assert "url(" not in style and "@import" not in style and "http" not in style


def test_the_only_style_is_the_one_whose_hash_is_in_the_policy() -> None:
    text = page(report_of("</style><style>*{color:red}"))
    policies = [a["content"] for t, a in Parsed(text).elements if a.get("http-equiv") == "Content-Security-Policy"]
    styles = re.findall("<style>(.*?)</style>", text, re.DOTALL)
    assert len(policies) == len(styles) == 1
    digest = base64.b64encode(hashlib.sha256(styles[0].encode()).digest()).decode()
    sources = f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'"
    assert policies[0] == f"{sources}; base-uri 'none'; form-action 'none'"
    assert text.startswith("<!doctype html>")
    assert '<meta name="referrer" content="no-referrer">' in text


def test_ids_are_unique_and_every_reference_has_its_target() -> None:
    found = Parsed(page(ReportInput("run", make_evaluation(), make_history(60))))
    ids = [attributes["id"] for _, attributes in found.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    hrefs = {(attributes.get("href") or "#")[1:] for _, attributes in found.elements} - {""}
    assert hrefs and hrefs <= set(ids)


# ---- what is absent, and what is odd ----------------------------------------------------------------------------


def test_a_report_of_nothing(tmp_path: Path) -> None:
    write_report(tmp_path / "report.html", ReportInput("empty"))
    found = Parsed((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert found.sections() == [] and "There is nothing to report yet." in "".join(found.texts)
    assert not found.open


def test_a_run_without_held_out_pairs_has_curves_and_its_origin() -> None:
    history = [line for line in make_history(60) if "loss" in line]
    found = Parsed(
        page(ReportInput("run", None, history, {"device": "cpu"}, {"lr": 5e-7, "wpo": False, "columns": None}))
    )
    assert found.sections() == ["facts", "training", "manifest", "options"]
    text = "".join(found.texts)
    assert "60 training steps. No pairs were held out" in text and "--eval-fraction 0.1 holds out a tenth" in text
    assert '"lr": 5e-07' in text and '"wpo": false' in text


def test_held_out_pairs_are_not_denied() -> None:
    assert "No pairs were held out" not in page(ReportInput("run", None, make_history(60)))


def test_everything_has_its_section() -> None:
    options, manifest = {"lr": 2e-5, "batch_size": 8}, {"start_model": "a model", "device": "cpu"}
    about = ReportInput("run", make_evaluation(), make_history(60), manifest, options, evaluated_with={"b": 2})
    found = Parsed(page(about))
    names = ["verdict", "headline", "facts", "samples", "training", "preference", "pairs", "drift", "numbers"]
    assert found.sections() == [*names, "manifest", "options", "evaluation"]
    text = " ".join("".join(found.texts).split())
    assert "start modela model" in text and "60 of 8 pairs each" in text and "2e-05" in text
    assert len([tag for tag, _ in found.elements if tag == "img"]) == len(plots.CURVES) + 2


@pytest.mark.parametrize("pairs", [6, 20])
def test_the_page_says_what_was_judged_on_how_many_pairs(pairs: int) -> None:
    few = f"Only {pairs} pairs: too few to judge (20 needed)."
    clean = "No problems found: 2 checks passed on 20 pairs."
    verdict = judge(pairs, 0, ["not_finite", "length_bias"])
    parsed = Parsed(page(ReportInput("run", make_evaluation(pairs, findings=[], judged=verdict))))
    assert "verdict" in parsed.sections() and (few if pairs < 20 else clean) in parsed.texts
    assert "Not found: not finite, length bias." in parsed.texts


def test_the_page_begins_with_what_was_trained_on() -> None:
    told = {"pairs": 24, "prompts": 0, "text": "24 of these 30 pairs were trained on: <b>"}
    texts = Parsed(page(ReportInput("run", make_evaluation(30, trained_on=told)))).texts
    assert texts.index(told["text"] + ".") < texts.index("Verdict")


def test_headline_numbers_are_those_of_the_result() -> None:
    evaluation = make_evaluation()
    text = "".join(Parsed(page(ReportInput("run", evaluation))).texts)
    result = evaluation.result
    low, high = result["intervals"]["rewards/accuracies"]
    said = f"{percent(result['rewards/accuracies'])}{percent(low)} to {percent(high)}"
    assert said in text
    for name in evaluation.scores.means():
        assert name in text


@pytest.mark.parametrize("worth", [math.nan, math.inf, None, 1e300, 0.0, "text"])
def test_numbers_that_are_none(worth: Any) -> None:
    """NaN, null and what is far out of range are shown as what they are; nothing warns, nothing fails."""
    scores = make_scores(5)
    broken = dataclasses.replace(scores, logps=scores.logps * (worth if isinstance(worth, float) else math.nan))
    token = make_token("x", math.nan, -1.0, math.nan, math.nan, math.nan)
    like = make_evaluation(5)
    result: dict[str, Any] = dict.fromkeys(like.scores.means(), worth)
    result["intervals"] = {key: [worth, worth] for key in like.result["intervals"]}
    evaluation = Evaluation(like.result | result, broken, [make_pair("best", "a:1", math.nan, "", [token], [])])
    history = [{"step": step, "loss": worth, "grad_norm": worth, "eval_loss": worth} for step in range(5)]
    assert not Parsed(page(ReportInput("run", evaluation, history))).open
    assert bool(plots.pair_plots(broken)) == (worth == 0.0)


@pytest.mark.parametrize("pairs", [1, 2])
def test_few_pairs(pairs: int) -> None:
    assert not Parsed(page(ReportInput("run", make_evaluation(pairs)))).open


def test_a_model_that_is_its_reference() -> None:
    """All margins are 0: a bar of ties, no other."""
    scores = make_scores(30)
    same = dataclasses.replace(scores, logps=scores.ref_logps)
    axes = Figure().add_subplot()
    plots.pair_plots(same)[0].draw(axes)
    assert axes.get_legend_handles_labels()[1] == ["0% wrong", "100% tie", "0% right"]
    assert not Parsed(page(ReportInput("run", make_evaluation(30, scores=same)))).open


@pytest.mark.parametrize("steps", [0, 1, 2, 40, 1001, 5000])
def test_histories_of_every_length(steps: int, tmp_path: Path) -> None:
    history = make_history(steps, every=max(steps // 4, 1)) if steps else []
    drawn = [png(plot) for plot in plots.curves(history)]
    assert len(drawn) == (6 if steps else 0)
    assert sum(map(len, drawn)) < 400_000
    if steps in (0, 1, 5000):
        write_plots(tmp_path / "curves.png", plots.curves(history))
        with Image.open(tmp_path / "curves.png") as picture:
            assert picture.width > 500


def test_a_spike_is_seen_in_a_long_history() -> None:
    history = [{"step": step, "loss": 0.5 + 20 * (step == 2503)} for step in range(5000)]
    tops = []
    for lines in (history, history[:2000]):
        axes = Figure().add_subplot()
        plots.curves(lines)[0].draw(axes)
        tops.append(axes.get_ylim()[1])
    assert tops[0] > 20 > 2 > tops[1]


@pytest.mark.parametrize(("evaluations", "line"), [(2, False), (3, True)])
def test_two_points_are_no_course(evaluations: int, line: bool) -> None:
    axes = Figure().add_subplot()
    plots.curves([{"step": step, "eval_loss": 0.5} for step in range(evaluations)])[0].draw(axes)
    assert axes.get_lines()[0].get_linestyle() == ("--" if line else "None")


def test_constant_and_single_values_are_drawn() -> None:
    for values_ in ([0.0], [1e-12] * 3, [5.0] * 100, [-3.0, math.nan, -3.0], [math.nan] * 50):
        history = [{"step": i, "loss": v, "grad_norm": v, "learning_rate": v} for i, v in enumerate(values_)]
        assert all(png(plot).startswith(b"\x89PNG") for plot in plots.curves(history))


def test_points_are_in_the_order_of_steps_and_the_last_of_a_step_counts() -> None:
    history = [
        {"step": 3, "loss": 3.0},
        {"step": 1, "loss": None},
        {"step": 3, "loss": 4.0},
        {"step": None, "loss": 1.0},
    ]
    steps, found = plots.points(history, "loss")
    assert (steps.tolist(), found.tolist()) == ([3], [4.0])


def test_a_long_response_is_cut_and_says_so() -> None:
    tokens = make_tokens("word " * 3000, 0.3, 0)
    pair = make_pair("best", "a:1", 1.0, "", tokens, [])
    text = page(ReportInput("run", make_evaluation(5, shown=[pair])))
    assert text.count('class="t ') == MAX_TOKENS
    assert f"… {len(tokens) - MAX_TOKENS:,} more tokens" in text


def test_shades_are_symmetric_and_named_by_folds() -> None:
    folds = (1.0, 1.2, 1.3, 1.9, 2.1, 4.9, 5.1, 19.9, 20.1, 1e6)
    assert [shade(math.log(times)) for times in folds] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert [shade(-math.log(times)) for times in folds] == [0, 0, -1, -1, -2, -2, -3, -3, -4, -4]


def test_text_as_it_is_shown() -> None:
    assert shown("a\x00b\ud800c\u202ed\r\ne\rf") == "a�b�c�d\ne\nf"
    assert shown("👩\u200d👧 日本\u3000語 שלום\t\xa0") == "👩\u200d👧 日本\u3000語 שלום\t\xa0"
    assert shown(None) == ""


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (0.0, "0.000"), (12345, "12,345"), (0.73666, "0.7367"), (-1.5, "-1.500"), (12.345, "12.35"),
        (1234.5, "1,234"), (0.00001, "1.000e-05"), (2.5e9, "2.500e+09"),
        (math.nan, "–"), (math.inf, "–"), (None, "–"), (True, "–"), ("7", "–"),
        (np.float32(0.5), "0.5000"), (np.int64(7), "7"),
    ],
)  # fmt: skip
def test_numbers_have_four_figures(value: Any, text: str) -> None:
    assert number(value) == text


def test_shares_intervals_and_folds() -> None:
    assert [percent(x) for x in (0.7366, 1, None)] == ["73.7%", "100.0%", "–"]
    assert format_interval([0.5, 1.25], percent) == "50.0% to 125.0%"
    assert format_interval(None) == "–" and format_interval([1.0, math.nan]) == "1.000 to –"
    assert [fold(x) for x in (math.log(2), -math.log(41))] == ["2.000× likelier", "41.00× rarer"]


def test_what_is_no_code_goes_into_the_package() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-data"]
    there = {path.name for path in (ROOT / "dpo_cli").iterdir() if path.is_file() and path.suffix != ".py"}
    assert set(listed["dpo_cli"]) == there


# ---- the file ---------------------------------------------------------------------------------------------------


def test_equal_input_gives_equal_bytes_small_and_soon(tmp_path: Path) -> None:
    about = ReportInput("run", make_evaluation(300), make_history(500), {"a": 1}, {"b": 2})
    write_report(tmp_path / "first.html", about)
    began = time.process_time()
    write_report(tmp_path / "second.html", about)
    assert time.process_time() - began < 5  # seconds of work; it takes 0.4
    first, second = ((tmp_path / name).read_bytes() for name in ("first.html", "second.html"))
    assert first == second and len(first) < 600_000
    write_plots(tmp_path / "a.png", plots.curves(about.history))
    write_plots(tmp_path / "b.png", plots.curves(about.history))
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_a_report_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotWrittenError, match=re.escape(str(tmp_path / "file" / "report.html"))):
        write_report(tmp_path / "file" / "report.html", ReportInput("run"))


def test_the_margin_is_explained_by_the_loss() -> None:
    about = ReportInput("run", make_evaluation(), make_history(60), {}, {"lr": 1e-6})
    assert "loss sigmoid" in page(about) and "0 where the model equals its reference" in page(about)
    told = page(dataclasses.replace(about, objective=parse_objective("simpo")))
    assert "loss simpo" in told and "beta times log-probs per token" in told and "equals its reference" not in told
