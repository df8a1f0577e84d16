"""The results page in a browser: Chromium, driven by playwright. Skipped where one of them is missing."""

import re
import shutil
import time
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from xml.etree import ElementTree

import psutil
import pytest

from experiments.records import Store
from experiments.reporting import report
from experiments.reporting.web.index import index_html
from experiments.selection import EXPERIMENTS, SIMULATIONS
from tests.experiments.helpers import MINI, committed_page
from tests.helpers import ROOT

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
INDEX = ROOT / "results" / "index.html"
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium is found")
WIDE, NARROW = (1280, 900), (400, 800)
MANY_SEEDS = re.compile(r"n=\d\d")


@pytest.fixture(scope="module")
def chromium():
    with (
        playwright.sync_playwright() as driver,
        driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"]) as browser,
    ):
        yield browser


@contextmanager
def opened(chromium, path: Path, size: tuple[int, int] = WIDE, **options):
    """A page that has been opened; afterwards nothing has been asked of any host, and nothing was an error."""
    context = chromium.new_context(viewport={"width": size[0], "height": size[1]}, **options)
    page = context.new_page()
    page.set_default_timeout(20_000)
    requests: list[str] = []
    problems: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda said: problems.append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(path.as_uri())
    try:
        yield page
        assert [url for url in requests if not url.startswith(("file:", "blob:", "data:"))] == []
        assert problems == []
    finally:
        context.close()


def draw_all(page) -> None:
    page.evaluate("Promise.all(figures.map(drawFigure))")


def test_a_page_opens_and_a_cell_of_it(chromium, results):
    page_of = report.page_of(MINI, Store(results))
    path = results / "index.html"
    path.write_text(index_html([page_of], {}))
    with opened(chromium, path) as page:
        page.locator("#mini svg[role=img]").first.wait_for()
        assert page.locator("#mini tbody tr").count() == 3
        page.locator("#mini button.cell").first.click()
        page.locator("dialog svg[role=img]").first.wait_for()
        assert page.locator("dialog h2").inner_text() == "Adam"
        assert page.locator("dialog table").first.locator("tbody tr").count() == 2
        page.keyboard.press("Escape")
        assert page.locator("dialog").is_hidden()


def test_a_title_may_have_any_character(chromium, results):
    page_of = replace(report.page_of(MINI, Store(results)), title='a < b & "c"')
    path = results / "index.html"
    path.write_text(index_html([page_of], {}))
    with opened(chromium, path) as page:
        page.locator("#mini svg[role=img]").first.wait_for()
        svg = page.evaluate("svgOf(figures[0])")
    assert ElementTree.fromstring(svg)[0].text == 'a < b & "c"'


def test_a_grid_of_any_values(chromium, results):
    """A subplot for each value of the third axis and the fourth, in their order."""
    path = results / "index.html"
    path.write_text(index_html([report.page_of(MINI, Store(results))], {}))
    values = product([1, 2], [1, 2], ["x y", "w-1"], [10, 2])
    runs = [{"values": list(at), "score": 50, "seed": 0, "chosen": False} for at in values]
    rung = {"title": "whole grid", "axes": ["lr", "wd", "model", "epochs"], "runs": runs, "seeds": False}
    draw = """async (rung) => {
        const figure = element("figure", { "data-name": "grid" });
        await drawHeatMap(figure, rung);
        return [...figure.querySelectorAll("h4")].map((head) => head.textContent);
    }"""
    with opened(chromium, path) as page:
        assert page.evaluate(draw, rung) == [
            f"model {model}, epochs {epochs}" for model in ("w-1", "x y") for epochs in (2, 10)
        ]


def test_the_last_of_two_cells_is_opened(chromium, results):
    path = results / "index.html"
    path.write_text(index_html([report.page_of(MINI, Store(results))], {}))
    with opened(chromium, path) as page:
        page.evaluate(
            """async () => {
              const keys = [...new Set([...document.querySelectorAll("button.cell")].map((b) => b.dataset.cell))];
              const now = unpack;
              const late = () => new Promise((resolve) => setTimeout(resolve, 300));
              unpack = async (id) => (id === keys[0] ? late().then(() => now(id)) : now(id));
              await Promise.all([openCell(keys[0]), openCell(keys[1])]);
            }"""
        )
        assert page.locator("dialog h2").inner_text() == "Fails"


def test_a_browser_without_scripts_or_too_old_is_told(chromium, results):
    path = results / "index.html"
    path.write_text(index_html([report.page_of(MINI, Store(results))], {}))
    with opened(chromium, path, java_script_enabled=False) as page:
        assert page.locator("noscript").first.is_visible()
        assert page.locator("#mini td").first.is_visible()
        assert page.locator(".tools").first.is_hidden()
    context = chromium.new_context()
    page = context.new_page()
    page.add_init_script("delete window.DecompressionStream")
    page.goto(path.as_uri())
    assert page.locator("#too-old").is_visible()
    context.close()


@pytest.fixture
def page(chromium):
    with opened(chromium, INDEX) as found:
        yield found


@pytest.mark.slow
def test_every_table_and_figure_is_rendered(page):
    draw_all(page)
    for name in [*EXPERIMENTS, *SIMULATIONS]:
        section = page.locator(f"section#{name}")
        section.scroll_into_view_if_needed()
        for figure in section.locator("figure").all():
            assert figure.locator("svg[role=img], img").count() >= 1, name
        section.evaluate("section => section.querySelectorAll('details').forEach((fold) => (fold.open = true))")
    playwright.expect(page.locator("[data-fold]")).to_have_count(0)
    for table in page.locator("table.numbers").all():
        rows, heads = table.locator("tbody tr"), table.locator("thead th").count()
        assert rows.count() > 0
        assert {len(row.locator("th, td").all()) for row in rows.all()} == {heads}
    assert page.locator("figure.waiting").count() == 0


def shown_rows(table) -> list[str]:
    return [row.locator("th").inner_text() for row in table.locator("tbody tr[data-row]").all() if row.is_visible()]


@pytest.mark.slow
@pytest.mark.parametrize("by", ["mouse", "keyboard"])
def test_rows_are_hidden_sorted_and_grouped(page, by):
    def act(locator) -> None:
        if by == "mouse":
            locator.click()
        else:
            locator.focus()
            page.keyboard.press("Space" if locator.get_attribute("type") == "checkbox" else "Enter")

    panel = page.locator("#automatic [data-panel]").nth(1)
    at_first = shown_rows(panel)
    head = panel.locator("button.sort").first
    values = {
        row.locator("th").inner_text(): float(row.locator("td").first.get_attribute("data-value"))
        for row in panel.locator("tbody tr").all()
    }
    act(head)
    assert shown_rows(panel) == sorted(values, key=lambda row: -values[row])
    assert panel.locator("thead th").nth(1).get_attribute("aria-sort") == "descending"
    act(head)
    assert shown_rows(panel) == sorted(values, key=values.get)
    act(head)
    assert shown_rows(panel) == at_first
    assert panel.locator("[aria-sort]").count() == 0
    act(panel.locator(".menu summary"))
    act(panel.locator(".menu input").nth(2))
    assert shown_rows(panel) == [*at_first[:2], *at_first[3:]]
    page.keyboard.press("Escape")
    assert panel.locator(".menu input").first.is_hidden()
    table4 = page.locator("#table4 [data-panel]").first
    act(table4.locator("[data-group]"))
    assert table4.locator("tr.group").all_inner_texts() == ["SGD", "Adam", "LAMB"]
    act(table4.locator("[data-group]"))
    assert table4.locator("tr.group").count() == 0


@pytest.mark.slow
@pytest.mark.parametrize("by", ["mouse", "keyboard"])
def test_numbers_switch(page, by):
    cell = page.locator("#table4 tbody tr", has_text="Adam-LAWN").first.locator("td").nth(1)
    value = cell.inner_text().split()[0]
    assert float(cell.get_attribute("data-value")) == pytest.approx(float(value), abs=0.005)
    first = page.locator("#modes input").first
    if by == "mouse":
        page.locator("#modes input[value=difference]").click()
    else:
        first.focus()
        page.keyboard.press("ArrowDown")
    difference = f"{float(cell.get_attribute('data-difference')):+.2f}"
    assert cell.inner_text().startswith(difference)
    assert cell.inner_text().count(difference) == 1
    without = page.locator("#table4 tbody tr", has_text="Adam, eps tuned").first.locator("td").nth(1)
    assert re.fullmatch(r"ours \d+\.\d+", without.inner_text())  # the paper has no number there
    if by == "mouse":
        page.locator("#modes input[value=gain]").click()
    else:
        page.keyboard.press("ArrowDown")
    assert cell.inner_text().startswith(f"{float(cell.get_attribute('data-gain')):+.3g}")
    assert "over Adam, eps 1e-8" in cell.inner_text()


@pytest.mark.slow
@pytest.mark.parametrize("by", ["mouse", "keyboard"])
def test_a_cell_of_the_paper_opens(page, by):
    button = page.locator("#table4 tbody tr", has_text="Adam-LAWN").first.locator("td").nth(1).locator("button")
    seeds = int(re.search(r"n=(\d+)", button.inner_text())[1])
    if by == "mouse":
        button.click()
    else:
        button.focus()
        page.keyboard.press("Enter")
    dialog = page.locator("dialog")
    playwright.expect(dialog.locator("h2:focus")).to_have_count(1)
    assert dialog.locator("h3").all_inner_texts() == [
        *("Seeds", "Curves", "Tuning", "Run it again", "Versions and hardware")
    ]
    assert dialog.locator("table").first.locator("tbody tr").count() == seeds
    for link in dialog.locator("table a").all():
        assert (INDEX.parent / link.get_attribute("href")).exists()
    playwright.expect(dialog.locator("figure.waiting")).to_have_count(0)
    assert dialog.locator("svg[role=img]").count() >= 4 + 2 + 3
    assert "seed=0" in dialog.locator("pre").first.inner_text()
    address = page.url
    assert "#cell-" in address
    page.keyboard.press("Escape")
    playwright.expect(page.locator("button.cell:focus")).to_have_count(1)
    playwright.expect(page).to_have_url(INDEX.as_uri())
    page.goto("about:blank")
    page.goto(address)
    page.locator("dialog h2").wait_for()
    assert page.locator("dialog h2").inner_text() == "MovieLens-100k, batch 10k, Adam-LAWN"
    page.keyboard.press("Escape")
    focused = page.locator("button.cell:focus")
    playwright.expect(focused).to_have_attribute("data-cell", address.partition("#")[2])
    playwright.expect(focused).to_be_in_viewport()


@pytest.mark.slow
def test_a_heat_map_of_a_cell_that_is_only_tuned(page):
    page.locator("#table4 tbody tr", has_text="SGD").first.locator("button.tuned").first.click()
    dialog = page.locator("dialog")
    playwright.expect(dialog.locator("svg[role=img]")).to_have_count(2)
    for svg in dialog.locator("svg[role=img]").all():
        lrs, decays = ("0.03", "0.1", "0.3", "0.6", "1", "2"), ("0", "1e-6", "1e-5", "1e-4")
        assert {*lrs, *decays} <= set(svg.locator("text").all_text_contents())


@pytest.mark.slow
def test_an_open_cell_is_printed_alone(page):
    page.locator("#table4 button.cell", has_text=MANY_SEEDS).first.click()
    playwright.expect(page.locator("dialog svg[role=img]").first).to_be_visible()
    playwright.expect(page.locator("dialog figure.waiting")).to_have_count(0)
    page.emulate_media(media="print")
    assert page.locator("main").is_hidden()
    assert page.locator("dialog").evaluate("dialog => dialog.scrollHeight <= dialog.clientHeight")
    pdf = page.pdf(format="A4")
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", pdf)) <= 5


@pytest.mark.slow
def test_a_point_of_a_curve_is_described_in_the_colors_of_the_scheme(chromium):
    with opened(chromium, INDEX, color_scheme="dark") as page:
        svg = page.locator("#figure1 figure svg[role=img]").nth(2)
        page.locator("#figure1").scroll_into_view_if_needed()
        svg.wait_for()
        svg.scroll_into_view_if_needed()
        box = svg.bounding_box()
        page.mouse.move(box["x"] + 0.8 * box["width"], box["y"] + 0.67 * box["height"])
        tip = svg.locator("[aria-label=tip] path")
        playwright.expect(tip).to_have_count(1)
        shown = tip.evaluate("path => getComputedStyle(path).fill")
        assert shown == page.evaluate("getComputedStyle(document.body).backgroundColor")


@pytest.mark.slow
def test_numbers_are_copied_and_saved(chromium):
    with opened(chromium, INDEX, permissions=["clipboard-read", "clipboard-write"]) as page:
        panel = page.locator("#table4 [data-panel]").first
        panel.locator(".menu summary").click()
        panel.locator(".menu input").first.click()
        panel.locator("[data-copy]").click()
        page.locator("#said", has_text="Copied").wait_for(state="attached")
        copied = page.evaluate("navigator.clipboard.readText()").splitlines()
        assert copied[0].startswith("method,column,mean,standard_error,low_95,high_95,n,epochs,paper,difference,gain")
        (ours,) = [line for line in copied if line.startswith("Adam-LAWN,batch 10k")]
        tidy = (ROOT / "results" / "table4.csv").read_text()
        mean = re.search(r"MovieLens-100k,batch 10k,Adam-LAWN,.*?,\d\d,([\d.]+),", tidy)[1]
        assert float(ours.split(",")[2]) == pytest.approx(float(mean), rel=1e-5)
        assert not any(line.startswith("SGD,") for line in copied)
        with page.expect_download() as saved:
            panel.locator("[data-download]").click()
        assert Path(saved.value.path()).read_text().splitlines() == copied
        page.locator("#figure2").scroll_into_view_if_needed()
        page.locator("#figure2 figcaption button").first.wait_for()
        with page.expect_download() as saved:
            page.locator("#figure2 figcaption button").first.click()
        assert saved.value.suggested_filename == "figure2.svg"
        svg = Path(saved.value.path()).read_text()
    image = chromium.new_page()
    image.set_content(f"<body>{svg}")
    assert image.locator("body > svg > svg").count() == 10
    assert image.locator("text=MovieLens-100k").count() == 2
    image.close()


@pytest.mark.slow
def test_a_figure_is_printed_alone(page, tmp_path):
    page.locator("#figure1").scroll_into_view_if_needed()
    page.locator("#figure1 figcaption button").first.wait_for()
    page.evaluate("window.print = () => {}")
    page.locator("#figure1 figcaption button").nth(1).click()
    page.emulate_media(media="print")
    assert page.locator("main").is_hidden()
    assert page.locator(".alone figure svg[role=img]").first.is_visible()
    pdf = page.pdf(prefer_css_page_size=True)
    assert len(re.findall(rb"/Type\s*/Page\b", pdf)) == 1
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("main").is_visible()
    assert page.locator(".alone").count() == 0


@pytest.mark.slow
def test_figures_that_were_not_looked_at_are_printed(page):
    page.evaluate("Promise.all(figures.map(prepare))")  # as the page does when it has time
    assert page.locator("main figure.waiting").count() > 3
    assert page.evaluate("dispatchEvent(new Event('beforeprint')); document.querySelectorAll('.waiting').length") == 0


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [WIDE, NARROW])
def test_it_fits_and_is_accessible(chromium, size, scheme):
    """No overflow to the side; axe-core finds nothing serious, and it looks at the contrast of dark and light too."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    with opened(chromium, INDEX, size, color_scheme=scheme) as page:
        draw_all(page)
        for details in page.locator("main details:not(.menu)").all():
            details.evaluate("details => (details.open = true)")
        for mode in ("value", "difference", "gain"):
            page.locator(f"#modes input[value={mode}]").click()
            assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
        assert serious(axe, page) == []
        page.locator("#table4 button.cell", has_text=MANY_SEEDS).first.evaluate(
            "button => openCell(button.dataset.cell)"
        )
        playwright.expect(page.locator("dialog figure.waiting")).to_have_count(0)
        assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
        assert page.evaluate("document.querySelector('dialog').scrollWidth") <= size[0]
        assert serious(axe, page) == []
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (background == "rgb(255, 255, 255)") == (scheme == "light")


def serious(axe, page) -> list[tuple[str, str, str]]:
    found = axe.run(page).response["violations"]
    return [
        (violation["id"], violation["help"], violation["nodes"][0]["html"][:200])
        for violation in found
        if violation["impact"] in ("serious", "critical")
    ]


@pytest.mark.slow
def test_ten_times_as_much_opens_fast(chromium, tmp_path):
    """In 1.5 s and with 200 MB of the page's process, on a quiet machine; here with room for a busy one."""
    pages = [committed_page(name) for name in (*EXPERIMENTS, *SIMULATIONS)]
    path = tmp_path / "index.html"
    drawn = [page.name for page in pages if page.chart is None and page.figure is not None]
    images = {f"{name}-{k}": (ROOT / "results" / f"{name}.svg").read_text() for name in drawn for k in range(10)}
    path.write_text(index_html([copy for k in range(10) for copy in copies(pages, k)], images))
    assert path.stat().st_size > 9 * (INDEX.stat().st_size - 230_000)  # the libraries are there once
    begin = time.monotonic()
    with opened(chromium, path) as page:
        page.locator("#table4-0 button.cell").first.wait_for()
        opening = time.monotonic() - begin
        page.wait_for_timeout(1000)
        memory = page_memory()
        page.locator("#table4-9 button.cell", has_text=MANY_SEEDS).first.click()
        page.locator("dialog svg[role=img]").first.wait_for()
    print(f"{path.stat().st_size / 1e6:.1f} MB open in {opening:.2f} s, with {memory / 1e6:.0f} MB")
    assert opening < 6
    assert memory < 200e6


def copies(pages, k: int):
    """The pages once more, under other names and with cells of their own."""
    for page in pages:
        cells = [replace(o.cell, overrides=(*o.cell.overrides, f"copy={k}")) for o in page.cell_results]
        again = {id(o): replace(o, cell=cell) for o, cell in zip(page.cell_results, cells, strict=True)}
        panels = [
            replace(
                panel,
                rows=[
                    (row, [replace(e, result=again.get(id(e.result), e.result)) for e in entries])
                    for row, entries in panel.rows
                ],
            )
            for panel in page.panels
        ]
        yield replace(page, name=f"{page.name}-{k}", panels=panels, cell_results=list(again.values()))


def page_memory() -> int:
    """Bytes that the largest process of a page of this test's browser has to itself."""
    children = psutil.Process().children(recursive=True)
    renderers = [child for child in children if "--type=renderer" in child.cmdline()]
    return max(renderer.memory_full_info().uss for renderer in renderers)
