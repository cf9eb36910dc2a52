"""The report in a real browser: Debian's Chromium, driven by Playwright. Nothing is downloaded."""

from __future__ import annotations

import itertools
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from recipes import report
from tests.helpers import report_runs

DESKTOP, PHONE = (1280, 900), (390, 844)
# WCAG 2.1, level AA, of text.
LEAST_CONTRAST = 4.5
# The smallest luminance contrast of visible text with its background, and its element.
CONTRAST = """() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = (color) => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data]; };
  const linear = (v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => [r, g, b].map((v) => linear(v / 255))
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (element) => { for (let at = element; at; at = at.parentElement) {
    const color = rgba(getComputedStyle(at).backgroundColor);
    if (color[3] === 255) return color; } return [255, 255, 255]; };
  let least = [99, ""];
  for (const element of document.querySelectorAll("body *")) {
    const text = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!text || !element.checkVisibility() || ["SCRIPT", "STYLE", "title"].includes(element.tagName)) continue;
    const style = getComputedStyle(element);
    const [a, b] = [light(rgba(element.closest("svg") ? style.fill : style.color)), light(behind(element))];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (contrast < least[0]) least = [contrast, `${element.tagName}: ${element.textContent.slice(0, 40)}`];
  }
  return least;
}"""


@dataclass
class Opened:
    """A page in the browser, the messages of its console, and the addresses that it asked for."""

    page: Any
    messages: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


class Browser:
    def __init__(self, chromium: Any) -> None:
        self.chromium = chromium

    def open(self, path: Path, size: tuple[int, int] = DESKTOP, scheme: str = "light") -> Opened:
        opened = Opened(self.chromium.new_page(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme))
        opened.page.set_default_timeout(10_000)
        opened.page.on("console", lambda message: opened.messages.append(message.text))
        opened.page.on("pageerror", lambda error: opened.messages.append(str(error)))
        opened.page.on("request", lambda request: opened.requests.append(request.url))
        opened.page.goto(path.as_uri())
        opened.page.evaluate("for (const folded of document.querySelectorAll('details')) folded.open = true")
        return opened


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no browser, so the report's page goes unseen: chromium not found (apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # As root Chromium has no sandbox to start.
        yield Browser(playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"]))


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The pages of a finished run, a failed run, and their comparison."""
    folder = tmp_path_factory.mktemp("reports")
    runs = {"finished": report_runs.finished(folder / "finished"), "failed": report_runs.failed(folder / "failed")}
    for run_dir in runs.values():
        assert report.main([str(run_dir)]) == 0
    other = report_runs.finished(folder / "other", "distill.lr=0.0005", losses={**report_runs.MODELS, "student": 3.61})
    compared = [*runs.values(), other]
    assert report.main([*map(str, compared), "--out", str(folder / "comparison")]) == 0
    made = {name: run_dir / "report" / "index.html" for name, run_dir in runs.items()}
    return {**made, "comparison": folder / "comparison" / "index.html"}


@pytest.mark.parametrize("name", ["finished", "failed", "comparison"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_page_has_no_console_messages_no_requests_and_enough_contrast(
    browser: Browser, pages: dict[str, Path], name: str, scheme: str
) -> None:
    opened = browser.open(pages[name], scheme=scheme)
    assert opened.messages == []
    assert opened.requests == [pages[name].as_uri()]
    contrast, whose = opened.page.evaluate(CONTRAST)
    assert contrast >= LEAST_CONTRAST, whose


@pytest.mark.parametrize("name", ["finished", "failed", "comparison"])
def test_every_plot_is_visible(browser: Browser, pages: dict[str, Path], name: str) -> None:
    """It has a size, a description, and more than one color where it is drawn."""
    plots = browser.open(pages[name]).page.locator("figure svg")
    assert plots.count() == {"finished": 15, "failed": 3, "comparison": 3}[name]
    for plot in plots.all():
        box = plot.bounding_box()
        assert box["width"] > 200
        assert box["height"] > 80
        assert plot.get_attribute("aria-label")
        # A blank image compresses to almost nothing.
        assert len(plot.screenshot()) > 3000


def test_marks_have_tooltips(browser: Browser, pages: dict[str, Path]) -> None:
    titles = browser.open(pages["finished"]).page.locator("svg use > title").all_text_contents()
    assert "Student, 160 step: 3.5720" in titles
    assert any(re.fullmatch(r"layer 1: 0\.8333", title) for title in titles)


def test_tables_sort_both_ways_by_mouse_and_keyboard(browser: Browser, pages: dict[str, Path]) -> None:
    page = browser.open(pages["finished"]).page
    table = page.get_by_role("table", name="Models: size, quality, speed")
    names = table.locator("tbody th")
    before = names.all_text_contents()
    head = table.get_by_role("columnheader", name="Held-out loss")
    head.get_by_role("button").click()
    assert names.all_text_contents() == ["Student", "Teacher", "Control: no teacher", "Just pruned"]
    assert head.get_attribute("aria-sort") == "ascending"
    head.get_by_role("button").press("Enter")
    assert names.all_text_contents() == ["Just pruned", "Control: no teacher", "Teacher", "Student"]
    assert head.get_attribute("aria-sort") == "descending"
    # Missing values stay last in both directions.
    speed = table.get_by_role("columnheader", name="Generation").get_by_role("button")
    for order in (["Teacher", "Student"], ["Student", "Teacher"]):
        speed.press("Space")
        assert names.all_text_contents()[:2] == order
    table.get_by_role("columnheader", name="Model").get_by_role("button").click()
    assert names.all_text_contents() == sorted(before)
    for found in page.locator("table").all():
        for button in found.locator("thead button").all():
            button.click()
            button.click()
        assert found.locator("[aria-sort]").count() == 1


@pytest.mark.parametrize("name", ["finished", "failed", "comparison"])
def test_a_phone_does_not_scroll_sideways(browser: Browser, pages: dict[str, Path], name: str) -> None:
    page = browser.open(pages[name], PHONE).page
    page.mouse.wheel(500, 0)
    assert page.evaluate("[document.documentElement.scrollWidth, scrollX]") == [PHONE[0], 0]


def test_the_models_table_fits_a_small_window(browser: Browser, pages: dict[str, Path]) -> None:
    page = browser.open(pages["finished"], (1200, 900)).page
    table = page.get_by_role("region", name="Models: size, quality, speed")
    assert table.evaluate("region => region.scrollWidth") <= table.evaluate("region => region.clientWidth")


@pytest.mark.parametrize("name", ["finished", "comparison"])
def test_the_page_has_a_structure(browser: Browser, pages: dict[str, Path], name: str) -> None:
    page = browser.open(pages[name]).page
    assert page.evaluate("document.documentElement.lang") == "en"
    for landmark in ("banner", "navigation", "main", "contentinfo"):
        assert page.get_by_role(landmark).count() == 1
    levels = page.evaluate("[...document.querySelectorAll('h1, h2, h3')].map((head) => Number(head.tagName[1]))")
    assert levels[0] == 1
    assert all(following - level <= 1 for level, following in itertools.pairwise(levels))
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the results"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
