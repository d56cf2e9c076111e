"""The report's pages in a real browser: no complaint, no network, legible at every width."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag, urlsplit

import numpy as np
import pytest
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

from qkt_clinical.report import write_report
from tests.chromium import chromium, needs_chromium
from tests.sample_run import sample_params, write_pictures, write_sample_run

pytestmark = [needs_chromium, pytest.mark.slow]

PAGES = ("index.html", "queries/h0/q0.html", "queries/h1/q1.html", "queries/h2/q2.html")
WIDTHS = (360, 800, 1280)

CONTRAST = """
const part = v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
const luminance = c => 0.2126 * part(c[0]) + 0.7152 * part(c[1]) + 0.0722 * part(c[2]);
const canvas = document.createElement('canvas');
canvas.width = canvas.height = 1;
const pen = canvas.getContext('2d', {willReadFrequently: true});
const painted = colours => {
  pen.clearRect(0, 0, 1, 1);
  for (const colour of colours) { pen.fillStyle = colour; pen.fillRect(0, 0, 1, 1); }
  return [...pen.getImageData(0, 0, 1, 1).data].slice(0, 3);
};
const poor = [];
const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walk.nextNode()) {
  const text = walk.currentNode.textContent.trim(), element = walk.currentNode.parentElement;
  if (!text || !element.checkVisibility() || element.closest('.sr, .skip')) continue;
  const behind = [];
  for (let e = element; e; e = e.parentElement)
    if (!(e instanceof SVGElement)) behind.unshift(getComputedStyle(e).backgroundColor);
  const style = getComputedStyle(element);
  const ink = painted([...behind, element instanceof SVGElement ? style.fill : style.color]);
  const ground = painted(behind);
  const [dark, light] = [luminance(ink), luminance(ground)].sort((x, y) => x - y);
  if ((light + 0.05) / (dark + 0.05) < 4.5) poor.push([text.slice(0, 40), ink, ground]);
}
return poor;
"""
"""Every visible text whose contrast with what lies behind it is below 4.5 to 1."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("browser")
    params = sample_params()
    write_sample_run(root, params, loss_at=1)
    write_pictures(root, params, ["h0", "h2"])
    write_report(root, params)
    return root


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    """A headless Chromium with a profile of its own; nothing is downloaded."""
    with chromium(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


def resize(browser: webdriver.Chrome, width: int) -> None:
    metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def show(
    browser: webdriver.Chrome, path: Path, *, width: int = 1280, scheme: str = "light", media: str = ""
) -> None:
    """Open a page anew at a width, in a colour scheme, for a medium."""
    browser.get_log("browser")
    browser.get_log("performance")
    resize(browser, width)
    features = [
        {"name": "prefers-color-scheme", "value": scheme},
        {"name": "prefers-reduced-motion", "value": "reduce"},
    ]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})
    browser.get(path.as_uri())


def requests(browser: webdriver.Chrome) -> list[str]:
    """Addresses that pages asked for, by the browser's own log of its network; its own start page is none."""
    found = []
    for entry in browser.get_log("performance"):
        event = json.loads(entry["message"])["message"]
        if event["method"] == "Network.requestWillBeSent":
            sent = event["params"]
            # Not those of the browser's own first page, which it may load beside ours.
            if not sent["documentURL"].startswith(("chrome:", "chrome-untrusted:")):
                found.append(str(sent["request"]["url"]))
    return found


def picture(browser: webdriver.Chrome) -> np.ndarray[Any, Any]:
    """What the window shows, (H, W, 3)."""
    image = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
    return np.asarray(image, dtype=np.float64)


@pytest.mark.parametrize("name", PAGES)
def test_a_page_loads_without_complaint_and_without_a_network(
    browser: webdriver.Chrome, root: Path, name: str
) -> None:
    show(browser, root / "reports" / name)
    assert browser.get_log("browser") == []
    asked = requests(browser)
    assert asked, "the log holds the page itself"
    assert {urlsplit(url).scheme for url in asked} <= {"file", "data"}
    assert {url for url in asked if url.startswith("file")} == {(root / "reports" / name).as_uri()}
    assert browser.execute_script("return document.compatMode") == "CSS1Compat"


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("width", WIDTHS)
def test_charts_and_pictures_are_there_and_nothing_is_wider_than_the_window(
    browser: webdriver.Chrome, root: Path, name: str, width: int
) -> None:
    show(browser, root / "reports" / name, width=width)
    inner, wide = browser.execute_script(
        "return [document.documentElement.clientWidth, document.documentElement.scrollWidth]"
    )
    assert wide <= inner <= width
    sizes = browser.execute_script(
        "return [...document.querySelectorAll('svg[role=img], .pictures img')]"
        ".map(e => [e.getBoundingClientRect().width, e.getBoundingClientRect().height, e.naturalWidth])"
    )
    assert len(sizes) >= 2
    for drawn_width, height, natural in sizes:
        assert 90 <= drawn_width <= width
        assert height >= 90
        assert natural is None or natural == 16, "a picture was decoded"
    if name == "queries/h0/q0.html":
        assert sum(natural is not None for *_, natural in sizes) == 10 + 4  # of h0 and h2, which consent


@pytest.mark.parametrize("name", PAGES[:2])
def test_no_tile_stands_alone(browser: webdriver.Chrome, root: Path, name: str) -> None:
    """Every row of tiles reaches from the left edge of the grid to its right one."""
    show(browser, root / "reports" / name)
    for width in (360, 640, 800, 1024, 1200, 1280, 1600):
        resize(browser, width)
        left, right, tiles = browser.execute_script(
            "const box = e => { const r = e.getBoundingClientRect(); return [r.left, r.right, r.top]; };"
            "const grid = document.querySelector('.tiles');"
            "return [...box(grid).slice(0, 2), [...grid.children].map(box)]"
        )
        assert right < width
        rows: dict[float, list[tuple[float, float]]] = {}
        for start, end, top in tiles:
            rows.setdefault(top, []).append((start, end))
        for row in rows.values():
            assert min(row)[0] == pytest.approx(left, abs=1)
            assert max(row)[1] == pytest.approx(right, abs=1)
        assert len({len(row) for row in rows.values()}) == 1


def test_every_link_leads_to_what_is_there(browser: webdriver.Chrome, root: Path) -> None:
    seen: set[str] = set()
    waiting = [(root / "reports" / "index.html").as_uri()]
    anchors: dict[str, set[str]] = {}
    wanted: list[tuple[str, str]] = []
    while waiting:
        url = waiting.pop()
        if url in seen:
            continue
        seen.add(url)
        assert Path(unquote(urlsplit(url).path)).is_file(), url
        browser.get(url)
        anchors[url] = set(
            browser.execute_script("return [...document.querySelectorAll('[id]')].map(e => e.id)")
        )
        for link in browser.execute_script("return [...document.links].map(a => a.href)"):
            page, anchor = urldefrag(link)
            assert page.startswith("file:"), link
            waiting.append(page)
            wanted.append((page, anchor))
    assert {Path(urlsplit(u).path).relative_to(root / "reports").as_posix() for u in seen} == set(PAGES)
    assert [(p, a) for p, a in wanted if a and a not in anchors[p]] == []


def test_a_cell_of_the_map_leads_to_its_query_and_back(browser: webdriver.Chrome, root: Path) -> None:
    show(browser, root / "reports" / "index.html")
    browser.find_element(By.CSS_SELECTOR, ".map a.fell").click()
    assert browser.find_element(By.TAG_NAME, "h1").text == "h1 asks for lymphocyte"
    browser.find_element(By.LINK_TEXT, "All queries").click()
    assert browser.current_url == (root / "reports" / "index.html").as_uri()


@pytest.mark.parametrize("name", PAGES[:3])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_dark(
    browser: webdriver.Chrome, root: Path, name: str, scheme: str
) -> None:
    show(browser, root / "reports" / name, scheme=scheme)
    ground = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert ground == {"light": "rgb(245, 247, 248)", "dark": "rgb(17, 23, 29)"}[scheme]
    browser.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.execute_script(CONTRAST) == []
    shown = picture(browser)
    assert shown.shape[:2] == (900, 1280)
    assert len(np.unique(shown.reshape(-1, 3), axis=0)) > 50, "text and rules have soft edges"
    assert shown.std() > 5
    assert (shown.mean() > 128) == (scheme == "light")


def test_the_keyboard_reaches_everything_and_shows_where_it_is(browser: webdriver.Chrome, root: Path) -> None:
    show(browser, root / "reports" / "queries" / "h0" / "q0.html")
    browser.find_element(By.TAG_NAME, "body").send_keys(Keys.TAB)
    first = browser.switch_to.active_element
    assert first.text == "Skip to the report"
    assert first.rect["x"] >= 0, "it comes into sight"
    first.send_keys(Keys.ENTER)
    assert browser.switch_to.active_element.get_attribute("id") == "main"
    reached = set()
    for _ in range(40):
        browser.switch_to.active_element.send_keys(Keys.TAB)
        element = browser.switch_to.active_element
        if element.tag_name == "body":
            break
        outline = browser.execute_script("return getComputedStyle(arguments[0]).outlineStyle", element)
        assert outline == "solid", element.get_attribute("outerHTML")[:80]
        reached.add(element.get_attribute("aria-label") or element.text)
    assert {"What each network counts for, per class", "Before: confusion matrix", "Parameters"} <= reached


@pytest.mark.parametrize("name", PAGES[:2])
def test_a_page_prints(browser: webdriver.Chrome, root: Path, name: str) -> None:
    show(browser, root / "reports" / name, scheme="dark", media="print")
    assert browser.execute_script("return getComputedStyle(document.querySelector('nav')).display") == "none"
    ground = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert ground == "rgb(255, 255, 255)", "a dark page is printed on white"
    show(browser, root / "reports" / name)
    printed = browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})
    pdf = base64.b64decode(printed["data"])
    assert pdf.startswith(b"%PDF-")
    assert pdf.count(b"/Type /Page\n") >= 2
    assert len(pdf) > 20_000
