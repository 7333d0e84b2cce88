"""Reports and documentation in a real browser: `make test-report`; screenshots go to runs/report.

The pages of the documentation are those that `make docs` has built.
"""

import base64
import io
import shutil
from pathlib import Path

import pytest
from matplotlib.image import imread
from report_pages import hard_page, long_report, short_report

pytestmark = pytest.mark.browser

SCREENSHOTS = Path("runs/report")
DOCS = Path(__file__).parent.parent / "docs" / "build"
PHONE, DESKTOP, PAPER = 390, 1280, 680
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
]
PAGES = {"short": short_report, "long": long_report, "hard": hard_page}

# what sticks out of the page or of an element that hides it, and drawings that stick out of their frame
CUT = """
const found = [], width = document.documentElement.clientWidth;
const name = e => e.tagName + ': ' + (e.textContent || '').trim().slice(0, 40);
if (document.documentElement.scrollWidth > width) found.push('the page is wider than the screen');
for (const e of document.body.querySelectorAll('*')) {
  if (e.ownerSVGElement || getComputedStyle(e).display === 'none') continue;
  const box = e.getBoundingClientRect();
  if (box.right > width + 1 || box.left < -1) found.push('beside the screen: ' + name(e));
  if (e.tagName !== 'svg' && getComputedStyle(e).display !== 'inline' && e.clientWidth
      && e.scrollWidth > e.clientWidth + 1) found.push('wider than its frame: ' + name(e));
}
for (const svg of document.querySelectorAll('svg')) {
  const frame = svg.viewBox.baseVal;
  for (const e of svg.querySelectorAll('g[id*=text], g[id*=legend]')) {
    const box = e.getBBox();
    const to = e.getCTM().multiply(svg.getCTM().inverse());
    if (box.width && (box.x < -1 || box.y < -1 || box.x + box.width > frame.width + 1
        || box.y + box.height > frame.height + 1)) found.push('outside its drawing: ' + e.id);
  }
}
return found;
"""
# text of less than 12 pixels; letters of a drawing are outlines, 100 units high before they are scaled
SMALL = """
const found = [];
const words = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (words.nextNode()) {
  const size = parseFloat(getComputedStyle(words.currentNode.parentElement).fontSize);
  if (words.currentNode.data.trim() && size < 12) found.push(size + ' px: ' + words.currentNode.data.trim());
}
for (const e of document.querySelectorAll('svg g[id*=text] > g[transform*=scale]')) {
  const to = e.getScreenCTM(), size = 100 * Math.hypot(to.a, to.b);
  if (size < 12) found.push(size + ' px in a drawing');
}
return found;
"""
EMPTY = """
const found = [];
for (const e of document.querySelectorAll('h1, h2, p, li, td, th, figcaption, pre, section, figure, svg')) {
  const style = getComputedStyle(e);
  if (style.display === 'none' || e.closest('thead, nav') && !e.getClientRects().length) continue;
  const box = e.getBoundingClientRect();
  const silent = !['svg', 'TD'].includes(e.tagName) && !e.textContent.trim() && !e.querySelector('svg');
  if (box.width < 5 || box.height < 5 || silent) found.push('empty: ' + e.tagName + ' ' + e.id);
}
return found;
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    # no name is found: what a page fetched would be missing
    rules = "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE localhost"
    for flag in (*FLAGS, rules, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
    driver.set_page_load_timeout(60)
    yield driver
    driver.quit()


@pytest.fixture(scope="module", params=PAGES)
def page(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / f"{request.param}.html"
    path.write_text(PAGES[request.param](), encoding="utf-8")
    return path


def show(browser, path, width, media="screen", scheme="light"):
    """Open a page and keep a screenshot of all of it, or of the first metres."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 2, "mobile": width == PHONE}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})
    browser.get(path.as_uri())
    wanted = {"captureBeyondViewport": True, "format": "png"}
    shot = browser.execute_cdp_cmd("Page.captureScreenshot", wanted)["data"]
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    (SCREENSHOTS / f"{path.stem}-{media}-{scheme}-{width}.png").write_bytes(base64.b64decode(shot))


def ink(element):
    """Return the share of an element's pixels that are not white."""
    pixels = imread(io.BytesIO(element.screenshot_as_png))[..., :3]
    return float((pixels < 0.95).any(-1).mean())


on_every_medium = pytest.mark.parametrize(
    ("width", "media"), [(PHONE, "screen"), (DESKTOP, "screen"), (PAPER, "print")]
)


@on_every_medium
def test_nothing_is_cut(browser, page, width, media):
    show(browser, page, width, media)
    assert browser.execute_script(CUT) == []


@on_every_medium
def test_nothing_is_empty(browser, page, width, media):
    show(browser, page, width, media)
    assert browser.execute_script(EMPTY) == []


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_every_figure_has_ink(browser, page, width):
    show(browser, page, width)
    figures = browser.find_elements("tag name", "svg")
    assert figures
    assert all(0.01 < ink(figure) < 0.6 for figure in figures)


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_no_text_is_small(browser, page, width):
    show(browser, page, width)
    assert browser.execute_script(SMALL) == []


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_a_page_is_dark_where_the_screen_is(browser, page, width):
    show(browser, page, width, scheme="dark")
    body = browser.find_element("tag name", "body")
    elements = [body.find_element("tag name", "h1"), *body.find_elements("tag name", "svg")]
    for element in elements:
        pixels = imread(io.BytesIO(element.screenshot_as_png))[..., :3].mean(-1)
        # light letters and lines on a dark ground
        assert pixels.mean() < 0.4
        assert pixels.max() > 0.6


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, DESKTOP])
@pytest.mark.parametrize("name", [page.stem for page in sorted(DOCS.glob("*.html"))])
def test_a_page_of_the_documentation_fits_the_screen(browser, name, width, scheme):
    show(browser, DOCS / f"{name}.html", width, scheme=scheme)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    missing = "return [...document.images].filter(image => !image.naturalWidth).map(image => image.src)"
    assert browser.execute_script(missing) == []
    # what is left of a formula that was not drawn
    raw = "return [...document.querySelectorAll('math :not(:has(*))')].map(e => e.textContent)"
    assert [text for text in browser.execute_script(raw) if "\\" in text or "&" in text] == []


def test_a_page_fetches_nothing_and_says_nothing(browser, page):
    show(browser, page, DESKTOP)
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert [entry["message"] for entry in browser.get_log("browser")] == []


def test_a_page_can_be_printed(browser, page):
    show(browser, page, DESKTOP)
    pdf = base64.b64decode(browser.print_page())
    assert pdf.startswith(b"%PDF")
    (SCREENSHOTS / f"{page.stem}.pdf").write_bytes(pdf)


def test_names_that_look_like_html_are_shown_as_they_are(browser, tmp_path):
    path = tmp_path / "hard.html"
    path.write_text(hard_page(), encoding="utf-8")
    show(browser, path, DESKTOP)
    assert browser.execute_script("return document.querySelectorAll('script, img, iframe, b').length") == 0
    assert "<script>alert(1)</script>" in browser.find_element("tag name", "body").text


@pytest.mark.parametrize(
    ("body", "script", "complaint"),
    [
        ("<p style='width: 900px'>wide</p>", CUT, "the page is wider"),
        (
            "<p style='width: 40px; overflow: hidden; white-space: nowrap'>cut off here</p>",
            CUT,
            "wider than its",
        ),
        (
            "<svg viewBox='0 0 50 50' width=50><g id='text_1'><rect x=40 width=30 height=9></rect></g></svg>",
            CUT,
            "outside its drawing",
        ),
        ("<p style='font-size: 11px'>tiny</p>", SMALL, "11 px: tiny"),
        ("<h2></h2>", EMPTY, "empty: H2"),
        ("<figure><svg width=0 height=0></svg></figure>", EMPTY, "empty: svg"),
    ],
)
def test_what_is_cut_or_empty_is_found(browser, tmp_path, body, script, complaint):
    path = tmp_path / "spoilt.html"
    path.write_text(f"<!doctype html><meta name=viewport content='width=device-width'>{body}")
    show(browser, path, PHONE)
    assert any(line.startswith(complaint) for line in browser.execute_script(script))


def test_a_figure_without_ink_is_found(browser, tmp_path):
    path = tmp_path / "white.html"
    path.write_text("<!doctype html><svg width=90 height=90><rect width=90 height=90 fill='white'/></svg>")
    show(browser, path, DESKTOP)
    assert ink(browser.find_element("tag name", "svg")) < 0.01
