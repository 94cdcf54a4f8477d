"""The report in a real browser, opened as a file: Chromium, where it is installed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from finished_run import answers, evaluation, finished_run

from dcr_scale.report import write_report

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'")

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium to open the report in: apt install chromium"),
]
# Inside a container there is no sandbox to be had, and a browser left to itself looks for its maker's servers.
OPTIONS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("report")
    refused = {"stl": {"seemingly_toxic": 8, "toxic": 12}, "dcr": {"seemingly_toxic": 1, "toxic": 12}}
    models = [evaluation(folder / name, name, {"suite": answers(own)}) for name, own in refused.items()]
    return write_report(finished_run(folder / "run"), models).as_uri()


@dataclass
class Opened:
    """The report in a browser's page, and what it wrote to the console or asked of the network."""

    page: Any
    said: list[str]


@pytest.fixture(scope="module")
def opened(report: str) -> Iterator[Opened]:
    """Opened once, as a file: most of the time goes to starting the browser and reading plotly."""
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=OPTIONS)
        page = browser.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light")
        page.set_default_timeout(120_000)
        said: list[str] = []
        page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: request.url.startswith(("file:", "data:")) or said.append(request.url))
        page.goto(report)
        page.wait_for_selector("html[data-ready]", state="attached")
        yield Opened(page, said)
        browser.close()


@pytest.fixture
def page(opened: Opened) -> Iterator[Any]:
    """The page at a desk's width and in light mode; whatever a test does with it goes without a complaint."""
    opened.page.set_viewport_size({"width": 1280, "height": 900})
    opened.page.emulate_media(color_scheme="light")
    yield opened.page
    assert opened.said == []


def awaited(page: Any, expression: str) -> bool:
    """Whether an expression comes true within a minute; the page's policy forbids playwright's own way to wait."""
    for _ in range(600):
        if page.evaluate(expression):
            return True
        page.wait_for_timeout(100)
    return False


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_everything_is_drawn_legible_and_within_the_window(page: Any, width: int, scheme: str) -> None:
    page.set_viewport_size({"width": width, "height": 900})
    page.emulate_media(color_scheme=scheme)
    drawn = "[...document.querySelectorAll('.plot')].map(node => [node, node.querySelector('svg')])"
    fits = "svg.getBoundingClientRect().right <= node.getBoundingClientRect().right + 1"
    assert awaited(page, f"{drawn}.every(([node, svg]) => {fits})"), "a figure is wider than its place"
    assert page.evaluate("document.documentElement.scrollWidth") == width
    marks = "node.querySelectorAll('.scatterlayer .trace, .heatmaplayer image').length"
    parts = dict(page.evaluate(f"{drawn}.map(([node]) => [node.id, {marks}])"))
    assert len(parts) >= 20 and all(parts.values()), parts
    # Dark on light or light on dark, and no letter of a figure under 11 pixels.
    ink, paper = page.evaluate("['color', 'backgroundColor'].map(name => getComputedStyle(document.body)[name])")
    brightness = [sum(map(int, colour[4:-1].split(","))) / 3 for colour in (ink, paper)]
    dark, light = sorted(brightness)
    assert dark < 60 and light > 200 and (brightness[0] == dark) is (scheme == "light")
    letters = "[...document.querySelectorAll('.plot text')]"
    assert min(page.evaluate(f"{letters}.map(text => parseFloat(getComputedStyle(text).fontSize))")) >= 11


def test_text_of_prompts_does_not_run(page: Any) -> None:
    assert page.evaluate("typeof window.pwned") == "undefined"
    assert "<script>window.pwned = 1</script>" in page.locator("[data-answers=look-answers]").inner_text()


def test_the_filters_narrow_the_answers(page: Any) -> None:
    box = page.locator("[data-answers=look-answers]")
    count, text = box.locator("output"), box.get_by_label("search prompts and answers")
    assert count.inner_text() == "36 of 36 prompts"
    box.get_by_label("class of prompt").select_option("toxic")
    assert count.inner_text() == "12 of 36 prompts"
    box.get_by_label("verdict").select_option("refuses")
    assert count.inner_text() == "10 of 36 prompts"
    text.fill("PROMPT 10")
    article = box.locator("article")
    assert (count.inner_text(), article.count()) == ("1 of 36 prompts", 1)
    assert article.locator(".verdict").all_inner_texts() == ["complied", "complied", "refused"]
    text.fill("no such text")
    assert (count.inner_text(), article.count()) == ("0 of 36 prompts", 0)
    others = page.locator("[data-answers=evaluation-answers]")
    others.get_by_label("verdict").select_option("answers")
    assert others.locator("output").inner_text() == "7 of 36 prompts"
    for form in page.locator("form").all():
        form.evaluate("form => { form.reset(); form.dispatchEvent(new Event('input')) }")


def test_a_long_list_is_shown_page_by_page(page: Any) -> None:
    box = page.locator("[data-answers=evaluation-answers]")
    shown = [box.locator("article").count()]
    while box.locator("button.more").is_visible():
        box.locator("button.more").click()
        shown.append(box.locator("article").count())
    assert shown[-1] == 36 and len(shown) > 1 and shown == sorted(set(shown))


def test_maps_change_axes_legends_hide_classes_and_colours_follow_the_mode(page: Any) -> None:
    first = "document.querySelector('#map-before').data"
    points = f"{first}.map(trace => trace.x[0])"
    own = page.evaluate(points)
    page.get_by_label("the same for all").check()
    assert page.evaluate(points) != own
    for visible in (False, True):
        page.locator("#map button[data-group=toxic]").click()
        assert page.evaluate(f"{first}.map(trace => trace.visible)") == [True, visible, True]
    light = page.evaluate(f"{first}[0].marker.color")
    page.emulate_media(color_scheme="dark")
    assert awaited(page, f"{first}[0].marker.color !== '{light}'")
