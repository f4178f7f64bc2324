"""The page in a real browser, from a file: search, open a card, follow a partner, a narrow screen, hostile words."""

import io
import itertools
import re
import shutil

import numpy as np
import pytest
from matplotlib.image import imread
from test_page import HOSTILE, explanation

from rotsparse.explain.data import SHARE, page_data
from rotsparse.explain.graph import layer_graph
from rotsparse.explain.page import Layer, write_index, write_page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
playwright = pytest.importorskip("playwright.sync_api", reason="needs the extra `browser`")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")]


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A page with hostile words, and what its library says."""
    folder, of = tmp_path_factory.mktemp("page"), explanation([*HOSTILE, " ordinary"])
    data = page_data(of, title="A layer", facts={"model": "m"}, verdict=["The verdict.", "A remark."], missing=["gone"])
    return write_page(folder, data), of


@pytest.fixture(params=[(1400, "light"), (1400, "dark"), (360, "light"), (360, "dark")], ids=str)
def shown(request, browser, written):
    """The page on a screen of some width and colours; errors and requests of the page fail the test."""
    width, colours = request.param
    page, wrong = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=colours), []
    page.on("console", lambda said: wrong.append(said.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("dialog", lambda dialog: (wrong.append("a dialog"), dialog.dismiss()))
    page.on("request", lambda request: None if request.url.startswith("file:") else wrong.append(request.url))
    page.goto(written[0].as_uri())
    yield page, width, written[1]
    assert wrong == []
    page.close()


def rows(page):
    return page.locator("#rows a")


def is_open(page, title):
    """The card of a direction is shown, at once or as soon as the browser has followed a link."""
    playwright.expect(page.locator("#card h2")).to_have_text(title)


def fits(page, width):
    return page.evaluate("document.documentElement.scrollWidth") <= width


def test_a_reader_finds_a_direction_and_follows_its_partner(shown):
    page, width, of = shown
    assert rows(page).count() == 6 and page.locator("h1").inner_text() == "A layer"
    assert page.get_by_text("The verdict.").is_visible() and page.get_by_text("gone").is_visible()
    assert fits(page, width)
    page.get_by_label("Search directions").fill("4")
    assert rows(page).count() == 1
    rows(page).first.click()
    is_open(page, "Input 4")
    direction = of.directions("in")[4]
    value = f"{direction.top(1)[0].value:+.2f}"
    assert page.locator("#card .contexts .value").first.inner_text() == value
    assert page.locator("#card .contexts .peak").first.inner_text() == direction.top(1)[0].words[direction.top(1)[0].at]
    assert fits(page, width)
    partner = direction.partners(1)[0]
    page.locator("#card table a").first.click()
    is_open(page, f"Output {partner.number}")
    playwright.expect(page).to_have_title(re.compile(f"Output {partner.number}"))
    page.go_back()
    is_open(page, "Input 4")


def test_words_are_searched_and_the_filter_filters(shown):
    page, _, of = shown
    page.get_by_label("Search directions").fill("alert(1)")
    assert rows(page).count() > 0
    page.get_by_label("Search directions").fill("no such word")
    assert rows(page).count() == 0
    page.get_by_label("Search directions").fill("")
    page.get_by_label("found again by every start").check()
    again = [d.number for d in of.directions("in") if d.found_again]
    assert [int(n) for n in page.locator("#rows .n").all_inner_texts()] == again
    page.get_by_role("button", name="Outputs").click()
    assert rows(page).count() == 0, "of the outputs nothing is known"


def test_keys(shown):
    page, _, _ = shown
    page.goto(page.url.partition("#")[0] + "#in-1")
    is_open(page, "Input 1")
    page.keyboard.press("j")
    is_open(page, "Input 2")
    page.keyboard.press("k")
    page.keyboard.press("k")
    is_open(page, "Input 0")
    page.keyboard.press("s")
    assert page.get_by_role("button", name="Outputs").get_attribute("aria-pressed") == "true"
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.type") == "search"
    page.keyboard.type("2")
    page.keyboard.press("Enter")
    is_open(page, "Output 2")


def test_every_card_opens_and_every_control_has_a_name(shown):
    page, width, of = shown
    for side, name in (("in", "Input"), ("out", "Output")):
        for number in range(len(of.directions(side))):
            page.evaluate(f"location.hash = '{side}-{number}'")
            page.wait_for_function(f"document.querySelector('#card h2').textContent === '{name} {number}'")
            assert fits(page, width)
            assert page.locator("#card svg[role=img]:not([aria-label])").count() == 0
    controls = "[...document.querySelectorAll('button, input, a')]"
    assert page.evaluate(f"{controls}.filter(e => !e.textContent && !e.ariaLabel && !e.labels?.length).length") == 0
    assert page.evaluate("[...document.querySelectorAll('script')].length") == 2


def test_the_graph_leads_to_the_cards(shown):
    page, width, of = shown
    page.get_by_role("button", name="Graph").click()
    is_open(page, "The graph")
    drawn = layer_graph(of, share=SHARE, title="")
    assert page.locator("svg.graph path").count() == len(drawn.edges)
    assert page.locator("svg.graph circle").count() == len(drawn.nodes)
    assert fits(page, width)
    page.get_by_label("Output 2", exact=True).click()
    is_open(page, "Output 2")
    page.keyboard.press("g")
    is_open(page, "The graph")
    page.locator(".modules a").first.click()
    page.wait_for_function("document.querySelector('#card h2').textContent !== 'The graph'")


@pytest.mark.parametrize("wider", [0, 200])
def test_what_a_screenshot_shows(shown, wider):
    """Head, list and card (on a narrow screen the card alone) are drawn, beside or below each other, on
    a ground of the colours that were asked for."""
    page, width, _ = shown
    page.set_viewport_size({"width": width + wider, "height": 800})
    page.evaluate("location.hash = 'in-2'")
    is_open(page, "Input 2")
    picture = imread(io.BytesIO(page.screenshot(full_page=True)))[..., :3].mean(axis=-1)
    dark = page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    assert (np.median(picture) < 0.3) if dark else (np.median(picture) > 0.7)
    seen = [part for part in ("#head", "#list", "#card") if page.locator(part).is_visible()]
    assert seen == (["#head", "#list", "#card"] if width > 1000 else ["#card"])
    boxes = [page.locator(part).bounding_box() for part in seen]
    for box in boxes:
        left, top = round(box["x"]), round(box["y"])
        part = picture[top : top + round(box["height"]), left : left + round(box["width"])]
        ink = np.mean(np.abs(part - np.median(part)) > 0.25)
        assert 0.002 < ink < 0.4, (box, ink)
    for one, other in itertools.combinations(boxes, 2):
        beside = one["x"] + one["width"] <= other["x"] + 1 or other["x"] + other["width"] <= one["x"] + 1
        below = one["y"] + one["height"] <= other["y"] + 1 or other["y"] + other["height"] <= one["y"] + 1
        assert beside or below, (one, other)


def test_an_address_of_nothing_shows_the_list(shown):
    page, _, _ = shown
    for hash in ("#in-99", "#x", "#in-<b>"):
        page.goto(page.url.partition("#")[0] + hash)
        assert rows(page).count() == 6


def test_the_index_leads_to_the_pages(browser, written, tmp_path):
    path = write_index(tmp_path, "A model", [Layer(3, written[0].as_uri(), "Nothing <b>found</b>", "one start")])
    page = browser.new_page(viewport={"width": 360, "height": 800})
    page.goto(path.as_uri())
    assert page.get_by_text("Nothing <b>found</b>").is_visible() and fits(page, 360)
    assert page.get_by_text("Not drawn yet").is_visible() and len(page.frames) == 1
    drawn = '<svg xmlns="http://www.w3.org/2000/svg" width="900" height="450" viewBox="0 0 900 450"></svg>'
    (tmp_path / "graph.svg").write_text(drawn)
    page.reload()
    # The drawing is a frame of its own, in place of the sentence.
    assert [frame.url for frame in page.frames[1:]] == [(tmp_path / "graph.svg").as_uri()] and fits(page, 360)
    page.get_by_role("link").click()
    assert page.locator("h1").inner_text() == "A layer"
    page.close()
