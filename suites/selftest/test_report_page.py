"""The page of results in a real browser: sorting, filters, details, charts, narrow and dark; no error, no request."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from reports.cells import cells
from reports.page_html import page
from suites.selftest.report_rows import HOSTILE, realistic

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

#: Of text and of its background, as WCAG 2.1 defines relative luminance and contrast.
CONTRAST = """() => {
  const luminance = (c) => c.map((v) => v / 255).map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const behind = (node) => {
    for (; node; node = node.parentElement) {
      const c = parse(getComputedStyle(node).backgroundColor);
      if (c.length < 4 || c[3] > 0.99) return c.slice(0, 3);
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || !node.checkVisibility() || node.closest("svg, script, option")) continue;
    const [a, b] = [luminance(parse(getComputedStyle(node).color).slice(0, 3)), luminance(behind(node))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) found.push(`${node.className} ${node.textContent.slice(0, 20)} ${ratio.toFixed(2)}`);
  }
  return [...new Set(found)];
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    api = pytest.importorskip("playwright.sync_api", reason="not installed: pip install playwright")
    with api.sync_playwright() as running:
        started = running.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(page(cells(realistic()), f"results {HOSTILE}", (f"a.jsonl: {HOSTILE}",), "made"), encoding="utf-8")
    return path


@pytest.fixture
def opened(browser: Browser, report: Path, request: pytest.FixtureRequest) -> Iterator[Page]:
    """The page at the width and in the colours that the test asks for; no error may have come up by its end."""
    options: dict[str, Any] = {"viewport": {"width": 1280, "height": 900}, **getattr(request, "param", {})}
    context = browser.new_context(**options)
    shown = context.new_page()
    shown.set_default_timeout(15_000)
    wrong: list[str] = []
    shown.on("console", lambda message: wrong.append(message.text))
    shown.on("pageerror", lambda error: wrong.append(str(error)))
    shown.on("dialog", lambda dialog: dialog.dismiss())
    shown.on("request", lambda asked: None if asked.url.startswith(("file:", "data:")) else wrong.append(asked.url))
    shown.goto(report.as_uri())
    yield shown
    title = shown.title()
    context.close()
    assert wrong == []
    assert title.startswith("results <script>")  # which is its text, and was never run


def speeds(shown: Page, metric: str = "decode") -> list[float | None]:
    """What the first table shows in the column of a speed, from the top."""
    column = (
        shown.locator("table.cards")
        .first.locator("thead th")
        .evaluate_all("(heads, key) => heads.findIndex((h) => h.dataset.key === key)", metric)
    )
    found: list[float | None] = (
        shown.locator("table.cards")
        .first.locator("tr.cell:visible")
        .evaluate_all(
            "(rows, at) => rows.map((r) => r.cells[at].dataset.v ? Number(r.cells[at].dataset.v) : null)", column
        )
    )
    return found


def test_sorting_both_ways_with_what_is_missing_last(opened: Page) -> None:
    head = opened.locator('table.cards thead th[data-key="decode"]').first
    head.get_by_role("button").click()
    assert head.get_attribute("aria-sort") == "descending"
    down = speeds(opened)
    known = [value for value in down if value is not None]
    assert down == sorted(known, reverse=True) + [None] * 2
    assert len(known) == 44
    opened.keyboard.press("Enter")  # the focus is still on it
    assert head.get_attribute("aria-sort") == "ascending"
    assert speeds(opened) == sorted(known) + [None] * 2
    name = opened.locator('table.cards thead th[data-key="name"]').first
    name.get_by_role("button").press("Space")
    assert (name.get_attribute("aria-sort"), head.get_attribute("aria-sort")) == ("ascending", "none")
    names = opened.locator("table.cards").first.locator("tbody th").all_inner_texts()
    assert names == sorted(names, key=str.lower)


def test_filters_narrow_tables_and_charts_together(opened: Page) -> None:
    bars = opened.locator("#bars .hbar")
    everything = bars.count()
    opened.get_by_label("hardware", exact=True).select_option("cpu")
    opened.get_by_label("quantization", exact=True).select_option("int4")
    assert opened.locator("#count").inner_text() == "4 of 49 lines shown"
    assert bars.count() == 4 < everything
    assert opened.locator("#frontier .mark").count() == 4
    opened.get_by_label("search", exact=True).fill("ONNX q4f16")
    assert opened.locator("tr.cell:visible").count() == 1
    opened.get_by_label("search", exact=True).fill("nothing has this")
    assert opened.locator("#count").inner_text() == "0 of 49 lines shown"
    assert opened.get_by_text("No line passes the filter.").locator("visible=true").count() == 4
    assert "no cell shown here" in opened.locator("#roofline").inner_text()
    opened.get_by_role("button", name="show all").click()
    opened.wait_for_function("document.getElementById('count').textContent.startsWith('49 of')")
    assert bars.count() == everything


def test_a_bar_leads_to_its_raw_samples_and_the_command(opened: Page) -> None:
    opened.get_by_label("backend", exact=True).select_option("onnx")
    opened.get_by_label("hardware", exact=True).select_option("cpu")
    opened.locator("#bars .hbar", has_text="onnx q4f16_1").click()
    detail = opened.locator("tr.detail")
    assert detail.count() == 1
    assert opened.locator('tr.cell:has([aria-expanded="true"])').inner_text().startswith("onnx q4f16_1")
    strip = detail.locator("figure", has_text="decode")
    assert strip.locator("circle").count() == 12
    assert strip.locator("circle.out").count() == 2
    assert "2 of 12 blocks left out (2 others)" in strip.inner_text()
    assert "% of read bandwidth" in strip.inner_text()
    assert detail.locator("code").inner_text() == "rwkv-bench run --backend onnx --quant q4f16_1"
    opened.locator('.more[aria-expanded="true"]').press("Enter")
    assert detail.count() == 0


def test_details_stay_with_their_row(opened: Page) -> None:
    first = opened.locator("tr.cell .more").first
    first.click()
    opened.locator('table.cards thead th[data-key="decode"] button').first.click()
    opened.locator('table.cards thead th[data-key="decode"] button').first.click()
    assert opened.evaluate(
        "document.querySelector('tr.detail').previousElementSibling.querySelector('[aria-expanded=true]') !== null"
    )
    opened.get_by_label("search", exact=True).fill("nothing has this")
    assert not opened.locator("tr.detail").is_visible()


def test_a_failed_cell_shows_its_verdict_and_its_reason_as_text(opened: Page) -> None:
    row = opened.locator("tr.cell", has_text="numpy Q8_0")
    assert row.locator("td.speed").all_inner_texts() == ["FAIL", "FAIL"]
    row.locator(".more").click()
    assert HOSTILE.split("\u2028")[0].strip() in opened.locator("tr.detail").inner_text()
    assert opened.locator("tr.detail img, tr.detail script").count() == 0
    assert opened.locator("#bars .hbar", has_text="numpy").count() == 0


def test_charts_hold_every_cell_that_has_what_they_show(opened: Page) -> None:
    assert opened.locator("#roofline .mark").count() == 88
    assert opened.locator("#roofline .roof").count() == 3
    assert "cpu: 38.0 GB/s" in opened.locator("#roofline").inner_text()
    assert opened.locator("#frontier .mark").count() == 44
    assert opened.locator("#history svg").count() == 24
    assert "20 more: filter to see them" in opened.locator("#history").inner_text()
    opened.locator("#bars-group").select_option("backend")
    assert opened.locator("#bars h3").first.inner_text() == "onnx"


@pytest.mark.parametrize("opened", [{"viewport": {"width": 390, "height": 844}, "has_touch": True}], indirect=True)
def test_a_phone_needs_no_scrolling_sideways(opened: Page) -> None:
    assert opened.evaluate("document.documentElement.scrollWidth") == 390
    outside = "(nodes) => nodes.filter((n) => n.getBoundingClientRect().right > 390).length"
    assert opened.locator(".cards td:visible, .cards th:visible, .hbar:visible, .chart svg").evaluate_all(outside) == 0
    assert "decode tok/s" in opened.locator("td.speed").first.evaluate("(n) => getComputedStyle(n, '::before').content")
    opened.get_by_label("sort by", exact=True).select_option("decode -1")
    known = [value for value in speeds(opened) if value is not None]
    assert known == sorted(known, reverse=True)
    opened.locator("tr.cell .more").first.tap()
    assert opened.locator("tr.detail circle").count() > 12
    assert opened.evaluate("document.documentElement.scrollWidth") == 390


@pytest.mark.parametrize(
    "opened", [{"color_scheme": "light"}, {"color_scheme": "dark"}], indirect=True, ids=["light", "dark"]
)
def test_text_stands_out_in_light_and_dark(opened: Page, request: pytest.FixtureRequest) -> None:
    opened.locator("tr.cell .more").first.click()
    assert opened.evaluate(CONTRAST) == []
    paper = opened.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(22, 24, 27)") == (request.node.callspec.id == "dark")


@pytest.mark.parametrize("opened", [{"java_script_enabled": False}], indirect=True)
def test_without_scripts_every_figure_is_still_there(opened: Page) -> None:
    assert opened.locator("tr.cell:visible").count() == 49
    assert not opened.locator("#filters").is_visible()
    assert opened.locator("table.pivot").count() == 2


def test_keyboard_reaches_everything_that_a_mouse_does(opened: Page) -> None:
    reached = opened.evaluate(
        """() => [...document.querySelectorAll(".more, .hbar, thead button, #filters select, #filters input")]
        .filter((n) => n.checkVisibility()).every((n) => { n.focus(); return document.activeElement === n; })"""
    )
    assert reached
    named = "() => [...document.querySelectorAll('select, input')].every((n) => n.labels.length)"
    assert opened.evaluate(named)
    assert opened.evaluate("[...document.querySelectorAll('svg')].every((n) => n.getAttribute('aria-label'))")
