"""The report in a real Chromium: ``make test-browser``."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dpo_cli.reporting.html import ReportInput, shown, write_report
from tests.helpers.payloads import PAYLOADS, report_of
from tests.helpers.pictures import pictures
from tests.helpers.synthetic import make_evaluation, make_history

pytestmark = [pytest.mark.browser, pytest.mark.pictures]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
THEMES = ("light", "dark")
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
CONTRASTS = """() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgb = (colour) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const light = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const colour = rgb(getComputedStyle(e).backgroundColor);
      if (colour[3] === 255) return colour;
    }
    return [255, 255, 255, 255];
  };
  const found = {};
  for (const element of document.querySelectorAll("body *")) {
    if (![...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim())) continue;
    const style = getComputedStyle(element);
    const pair = [style.color].map(rgb).concat([ground(element)]).map(light);
    const contrast = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
    const name = element.tagName + "." + element.getAttribute("class");
    found[name] = Math.min(found[name] ?? 99, contrast);
  }
  return found;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright; `make test-browser` does")
    if not CHROMIUM:
        pytest.skip("no Chromium here; on Debian: apt install chromium")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("report") / "report.html"
    with pictures(drawn=True):  # the marker comes into force after this is made
        write_report(file, ReportInput("run", make_evaluation(), make_history(), {"device": "cpu"}, {"lr": 5e-7}))
    return file


@pytest.fixture
def look(browser: Any) -> Iterator[Any]:
    """Open a file; in the end there was no complaint, dialog or download, and no request but for the file."""
    seen: list[str] = []
    opened: dict[str, Any] = {}
    files: set[str] = set()

    def look(file: Path, viewport: dict[str, int] = DESKTOP, theme: str = "light") -> Any:
        files.add(file.as_uri())
        page = opened.get(name := f"{viewport} {theme}")
        if page is None:
            page = opened[name] = browser.new_page(viewport=viewport, color_scheme=theme)
            page.on("console", lambda message: seen.append(f"{message.type}: {message.text}"))
            page.on("pageerror", lambda error: seen.append(f"error: {error}"))
            page.on("dialog", lambda dialog: (seen.append("dialog"), dialog.dismiss()))
            page.on("download", lambda _: seen.append("download"))
            page.on("request", lambda request: request.url.startswith("data:image/png;") or seen.append(request.url))
        page.goto(file.as_uri())
        return page

    yield look
    for page in opened.values():
        page.close()
    assert set(seen) == files


def tip(page: Any, chosen: str) -> dict[str, str]:
    """The computed style of what a token shows about itself."""
    names = "({content: style.content, position: style.position, ground: style.backgroundColor})"
    return dict(
        page.locator(chosen).first.evaluate(f"e => {{ const style = getComputedStyle(e, '::after'); return {names} }}")
    )


def background(page: Any) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))]


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_the_page_opens_without_a_word_and_fits(look: Any, report: Path, viewport: dict[str, int], theme: str) -> None:
    page = look(report, viewport, theme)
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    heights = page.locator(".plots img").evaluate_all("all => all.map(img => img.getBoundingClientRect().height)")
    assert len(heights) == 8 and min(heights) > 150


def test_the_policy_holds_the_style_that_is_ours_and_no_other(look: Any, report: Path) -> None:
    page = look(report)
    assert page.evaluate("document.styleSheets.length") == 1
    assert page.evaluate("document.styleSheets[0].cssRules.length") > 50
    assert page.evaluate("document.querySelector('.plots img').naturalWidth") > 0  # the policy lets pictures in


@pytest.mark.parametrize("chosen", [".t.s0[data-k]", ".t.s4", ".t.s-4"])
def test_pointing_at_a_token_tells_its_numbers_and_so_does_the_keyboard(look: Any, report: Path, chosen: str) -> None:
    page = look(report)
    token = page.locator(f"details[open] {chosen}").first
    place = f"details[open] {chosen}"
    assert tip(page, place)["content"] == "none"
    text, change = token.inner_text(), token.get_attribute("data-r")
    for act in (token.hover, token.focus):
        act()
        said = tip(page, place)
        assert said["position"] == "fixed" and said["ground"] != "rgba(0, 0, 0, 0)"
        for part in (text.rstrip("↵\n"), change, "log-prob", " → ", "entropy", "KL"):
            assert part in said["content"]
        page.mouse.move(0, 0)
    token.blur()
    assert tip(page, place)["content"] == "none"


def test_a_token_at_the_edge_of_a_phone_does_not_widen_the_page(look: Any, report: Path) -> None:
    page = look(report, PHONE)
    for token in page.locator("details[open] .t").all()[:12]:
        token.hover()
        assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


def test_dark_is_dark_and_light_is_light(look: Any, report: Path) -> None:
    grounds = {theme: sum(background(look(report, theme=theme))) for theme in THEMES}
    assert grounds["light"] > 700 and grounds["dark"] < 120


def test_paper_is_white_whatever_the_screen_is(look: Any, report: Path) -> None:
    """And what is folded on the screen is printed."""
    page = look(report, theme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert background(page) == [255, 255, 255]
    assert min(page.evaluate(CONTRASTS).values()) >= 4.5
    heights = page.locator("details.pair .tokens").evaluate_all("all => all.map(e => e.getBoundingClientRect().height)")
    assert len(heights) == 18 and min(heights) > 10
    page.emulate_media(media="screen")


@pytest.mark.parametrize("theme", THEMES)
def test_all_text_stands_out_from_its_ground(look: Any, report: Path, theme: str) -> None:
    """At least 4.5 to 1, as the accessibility guidelines ask; every shade of the heat map too."""
    found = look(report, theme=theme).evaluate(CONTRASTS)
    shades = {f"SPAN.t s{shade}" for shade in range(-4, 5)}
    assert len(found) > 20 and shades <= set(found)
    assert not {name: round(contrast, 2) for name, contrast in found.items() if contrast < 4.5}


@pytest.mark.parametrize("payloads", [PAYLOADS[i::6] for i in range(6)], ids=range(6))
def test_payloads_stay_text(look: Any, tmp_path: Path, payloads: tuple[str, ...]) -> None:
    """S3 in a real DOM: the tree is that of harmless texts, nothing ran, and the texts are to be read."""
    tree = """() => [...document.querySelectorAll("*")].map((e) => e.tagName + [...e.attributes]
        .filter((a) => a.name !== "data-t").map((a) => ` ${a.name}=${a.value}`).join(""))"""
    write_report(tmp_path / "harmless.html", report_of("harmless"))
    harmless = look(tmp_path / "harmless.html").evaluate(tree)
    for number, payload in enumerate(payloads):
        write_report(tmp_path / f"{number}.html", report_of(payload))
        page = look(tmp_path / f"{number}.html")
        assert page.evaluate(tree) == harmless
        page.locator("details").first.hover()
        page.locator(".t").first.hover()
        assert page.evaluate("typeof window.canary") == "undefined"
        assert shown(payload).split() == page.locator(".finding h3").first.inner_text().split()


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_no_part_of_a_table_is_out_of_sight(look: Any, report: Path, viewport: dict[str, int]) -> None:
    page = look(report, viewport)
    inner = page.locator(".table").evaluate_all("all => all.map(e => e.scrollWidth - e.clientWidth)")
    assert inner and max(inner) <= 1


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_long_words_and_many_scripts_wrap(look: Any, tmp_path: Path, viewport: dict[str, int], theme: str) -> None:
    text = "Donaudampfschifffahrt" * 12 + " 👩‍👩‍👧 日本語のテキスト" * 9 + " שלום עולם السلام عليكم " + "x" * 400
    write_report(tmp_path / "report.html", report_of(text))
    page = look(tmp_path / "report.html", viewport, theme)
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
