from __future__ import annotations

import json
import os
import re
import shutil
import struct
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest

from qkt_clinical.config import Params, Workspace
from qkt_clinical.data import shown_count
from qkt_clinical.errors import OutputsError
from qkt_clinical.files import to_json, write_json, write_text
from qkt_clinical.report import charts, write_figure, write_report
from qkt_clinical.report.outputs import read_outputs
from qkt_clinical.report.page import gain_bars, render_chart, render_reliability
from tests.sample_run import LAYERS, sample_params, write_sample_run

VOID = {"meta", "link", "br", "img", "hr", "input"}
HOSTILE = '<script>alert("x")</script>'


class Page(HTMLParser):
    """Text per element id, ids, links, tags and style attributes; complains about tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[tuple[str, str | None]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.ids: list[str] = []
        self.pieces: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append((tag, found))
        if found.get("id"):
            self.ids.append(str(found["id"]))
        if tag not in VOID:
            self.open.append((tag, found.get("id")))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag in {"td", "th", "dt", "dd", "li", "text"}:
            self.handle_data(" ")
        assert self.open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        for name in {i for _, i in self.open if i}:
            self.pieces.setdefault(name, []).append(data)

    def text(self, name: str) -> str:
        return re.sub(r"\s+", " ", "".join(self.pieces[name])).strip()


def build(root: Path, params: Params, **options: object) -> str:
    write_sample_run(root, params, **options)  # type: ignore[arg-type]
    return write_report(root, params).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("report")
    params = sample_params()
    build(root, params, loss_at=1)
    write_text(root / "params.yaml", to_json(params.model_dump(mode="json")))
    return root


@pytest.fixture(scope="module")
def page(root: Path) -> Page:
    return Page((root / "reports" / "index.html").read_text(encoding="utf-8"))


def test_the_summary_counts_losses_as_plainly_as_gains(page: Page) -> None:
    text = page.text("summary")
    # Gains: (3 x 0.93 + 0.80) / 4 - 0.72, (3 x 0.90 + 0.05) / 4 - 0.72, (3 x 0.93 + 0.84) / 4 - 0.72.
    assert "+11.1 points" in text  # mean of 17.75, -3.25 and 18.75
    assert "1 ended below the hospital’s own model" in text
    assert "Queries answered 3 of 3" in text
    assert "+4.0 points" in text  # mean forgetting of 3, 6 and 3
    assert "Images that left a site 0" in text
    assert "6.2 MB" in text  # 2 + 1 + 2 teachers of 1,234,567 bytes


def test_the_table_shows_before_after_and_intervals(page: Page) -> None:
    text = page.text("queries")
    assert "h0: ig" in text
    assert "0.0% → 80.0% 0–4 → 76–84" in text
    assert "96.0% → 93.0% 94–98 → 91–95" in text
    assert "▼ −3.2 −6.2 to −0.2" in text
    assert "95% bootstrap intervals" in text


def test_a_query_is_told_in_words(page: Page) -> None:
    text = page.text("h1-q1")
    assert "h1 asks for lymphocyte" in text
    assert "has images of eosinophil, erythroblast and ig and none of lymphocyte" in text
    assert "fell by 3.2 points" in text
    assert "4.3% of 69 calibration images" in text
    assert "lymphocyte −1.25" in text
    assert "h0 not fetched" in text
    assert "✓ fetched" in text
    assert "rose by 17.8 points" in page.text("h0-q0")


def test_the_matrix_marks_what_is_known_in_words(page: Page) -> None:
    row = page.text("knowledge")
    assert "✓ 1.00known● has images" in row
    assert "0.100" in row
    assert "missed" not in row


def test_a_mask_that_is_wrong_is_named(tmp_path: Path) -> None:
    params = sample_params()
    write_sample_run(tmp_path, params)
    path = Workspace(tmp_path).teacher("h0") / "mask.json"
    mask = json.loads(path.read_text())
    mask["known"][0], mask["known"][7] = False, True
    write_json(path, mask)
    text = Page(write_report(tmp_path, params).read_text()).text("knowledge")
    assert text.count("missed") == 1
    assert text.count("wrongly known") == 1


def test_small_counts_are_not_shown(page: Page) -> None:
    text = page.text("site-h0")
    assert "basophil 135 35 25 45" in text
    assert "eosinophil 132 32 22 42" in text
    assert "erythroblast <5 <5 <5 <5" in text
    assert "patients 40 11 <5 14" in text
    assert "ig <5" in page.text("h0-q0")


@pytest.mark.parametrize(("number", "text"), [(0, "0"), (1, "<5"), (4, "<5"), (5, "5"), (12345, "12,345")])
def test_count(number: int, text: str) -> None:
    assert shown_count(number) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_960, "1.0 MB"),
        (1_234_567, "1.2 MB"),
        (5e13, "50.0 TB"),
    ],
)
def test_size(number: int, text: str) -> None:
    assert charts.size(number) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.1234, "+12.3"), (-0.004, "−0.4"), (0.0, "0.0"), (-0.0004, "0.0"), (0.0004, "0.0")]
)
def test_points(value: float, text: str) -> None:
    assert charts.points(value) == text


def test_a_line_chart_spans_its_axes() -> None:
    rows = [{"epoch": 1.0, "loss": 4.0}, {"epoch": 2.0, "loss": 2.0}, {"epoch": 3.0, "loss": 0.0, "own": 1.0}]
    chart = charts.line_chart("Losses", rows)
    assert chart is not None
    assert [line.name for line in chart.lines] == ["loss", "own"]
    assert chart.lines[0].path == "0.00,0.00 50.00,50.00 100.00,100.00"
    assert chart.lines[1].path == "100.00,75.00"
    assert (chart.top, chart.bottom, chart.left, chart.right) == ("4", "0", "epoch 1", "epoch 3")
    assert charts.line_chart("Nothing", []) is None
    assert charts.line_chart("Nothing", rows, axis="layer number") is None


def test_a_line_chart_over_layers() -> None:
    chart = charts.line_chart(
        "Lost", [{"layer number": 1.0, "h1": 0.2}, {"layer number": 4.0, "h1": 0.1}], axis="layer number"
    )
    assert chart is not None
    assert [line.name for line in chart.lines] == ["h1"]
    assert (chart.left, chart.right) == ("layer number 1", "layer number 4")


def test_phase_1_is_drawn_as_what_it_was(root: Path, page: Page, tmp_path: Path) -> None:
    text = page.text("h0-q0")
    assert "Phase 1: share of a layer’s output lost, per teacher" in text
    assert "layer number 1" in text
    assert f"layer number {LAYERS}" in text
    assert "Phase 1:" not in page.text("h2-q2"), "experts are taken as they are"
    write_sample_run(tmp_path, sample_params())
    path = Workspace(tmp_path).student("h0", "q0") / "phases.json"
    phases = json.loads(path.read_text())
    phases["phase1"] |= {"kind": "distill", "curves": [{"epoch": e, "loss": 1 / e} for e in (1.0, 2.0)]}
    write_json(path, phases)
    text = Page(write_report(tmp_path, sample_params()).read_text()).text("h0-q0")
    assert "Phase 1: losses" in text
    assert "epoch 2" in text


def test_rejected_files_are_counted_by_reason(page: Page) -> None:
    assert "polarity1unreadable2" in page.text("site-h0").replace(" ", "")
    assert "Rejected files None." in page.text("site-h1")


def test_digests_stand_in_provenance(root: Path, page: Page) -> None:
    outputs = read_outputs(root, sample_params())
    text = page.text("h0-q0")
    assert outputs.queries[0].card_digest in text
    assert outputs.params_digest in text
    assert str(outputs.sites[0].data_digest) in text


def test_the_page_is_one_file_without_a_network(root: Path, page: Page) -> None:
    text = (root / "reports" / "index.html").read_text()
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "url(" not in text
    assert "@import" not in text
    assert not [t for t, _ in page.tags if t in {"script", "img", "iframe", "object", "form"}]
    links = [str(a["href"]) for _, a in page.tags if "href" in a]
    assert {h for h in links if not h.startswith("#")} == {"data:,"}
    assert {h[1:] for h in links if h.startswith("#")} <= set(page.ids)


def test_the_page_is_sensible_for_screen_readers(page: Page) -> None:
    assert len(page.ids) == len(set(page.ids))
    names = [t for t, _ in page.tags]
    assert {"header", "nav", "main", "footer", "h1", "caption"} <= set(names)
    assert names.count("h1") == 1
    assert names.count("caption") == names.count("table")
    assert all("scope" in a for t, a in page.tags if t == "th")
    assert next(a["href"] for t, a in page.tags if t == "a") == "#main"
    drawn = [a for t, a in page.tags if t == "svg" and a.get("role") == "img"]
    assert drawn
    for attributes in drawn:
        assert set(str(attributes["aria-labelledby"]).split()) <= set(page.ids)


def test_the_same_outputs_give_the_same_bytes(root: Path, tmp_path: Path) -> None:
    params = sample_params()
    assert build(tmp_path, params, loss_at=1) == (root / "reports" / "index.html").read_text()
    reordered = params.model_copy(update={"queries": dict(reversed(params.queries.items()))})
    assert write_report(tmp_path, reordered).read_text() == (root / "reports" / "index.html").read_text()


def test_hostile_names_are_text(tmp_path: Path) -> None:
    names = [HOSTILE, '"><svg onload=alert(1)>', "' onclick='x", "a & b", "{{ 7 * 7 }}"]
    text = build(tmp_path, sample_params(names, sites=2), reason=f"because {HOSTILE}")
    page = Page(text)
    assert not [t for t, _ in page.tags if t == "script"]
    assert not [a for _, a in page.tags if any(n.startswith("on") for n in a)]
    assert f"because {HOSTILE}" in page.text("answers")
    assert "{{ 7 * 7 }}" in page.text("knowledge")
    assert HOSTILE not in render_chart(
        "dumbbells", HOSTILE, gain_bars(read_outputs(tmp_path, sample_params(names, sites=2)))
    )


def test_another_hospital_without_data_or_teacher_is_no_obstacle(tmp_path: Path) -> None:
    params = sample_params()
    write_sample_run(tmp_path, params)
    space = Workspace(tmp_path)
    shutil.rmtree(space.prepared("h1"))
    shutil.rmtree(space.prepared("h2"))
    shutil.rmtree(space.teacher("h2"))
    (space.reports / "evaluation" / "h2" / "q2.json").unlink()
    page = Page(write_report(tmp_path, params).read_text())
    assert "Its images are not in this workspace." in page.text("site-h1")
    assert "Its teacher is not in this workspace." in page.text("site-h2")
    assert "Not answered: h2-q2." in page.text("queries")
    assert "Queries answered 2 of 3" in page.text("summary")


def test_an_empty_workspace_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OutputsError, match="neither a teacher nor an answered query"):
        write_report(tmp_path, sample_params())
    assert not (tmp_path / "reports" / "index.html").exists()


@pytest.mark.parametrize("broken", ["{", '{"format": "qkt-evaluation/1"}'])
def test_a_malformed_output_is_named(tmp_path: Path, broken: str) -> None:
    write_sample_run(tmp_path, sample_params())
    write_text(tmp_path / "reports" / "evaluation" / "h0" / "q0.json", broken)
    with pytest.raises(OutputsError) as caught:
        write_report(tmp_path, sample_params())
    assert str(caught.value.where.file).endswith("q0.json")
    assert caught.value.where.site == "h0"


def test_a_ragged_confusion_matrix_is_refused(tmp_path: Path) -> None:
    write_sample_run(tmp_path, sample_params())
    path = tmp_path / "reports" / "evaluation" / "h0" / "q0.json"
    data = json.loads(path.read_text())
    data["after"]["confusion"][1].pop()
    write_json(path, data)
    with pytest.raises(OutputsError, match="4 x 4"):
        write_report(tmp_path, sample_params())


def test_the_figure_is_drawn_twice_alike(root: Path) -> None:
    first = write_figure(root).read_bytes()
    assert write_figure(root).read_bytes() == first
    assert first.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", first[16:24])
    assert width == 1280
    assert abs(height - 160 * (1.4 + 0.42 * 3)) < 1
    assert b"Software" not in first
    assert not list((root / "reports").glob(".*"))


CHROMIUM = next(
    (p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None
)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_it_without_a_complaint(root: Path, tmp_path: Path, width: int) -> None:
    """The page is laid out in a frame of the wanted width; the frame's page measures it and reports."""
    assert CHROMIUM is not None
    report = (root / "reports" / "index.html").as_uri()
    measure = (
        "const d = document.querySelector('iframe').contentDocument;"
        "document.title = [d.documentElement.scrollWidth, d.querySelectorAll('svg').length,"
        "d.documentElement.scrollHeight > 3000].join()"
    )
    outer = tmp_path / "outer.html"
    frame = (
        f'<iframe src="{report}" style="width:{width}px;height:900px;border:0" onload="{measure}"></iframe>'
    )
    outer.write_text(f"<!DOCTYPE html><title>waiting</title>{frame}")
    done = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            "--allow-file-access-from-files",
            "--enable-logging=stderr",
            "--virtual-time-budget=3000",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--dump-dom",
            outer.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "HOME": str(tmp_path)},
    )
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title is not None, done.stderr[-2000:]
    found, drawn, tall = title[1].split(",")
    assert int(found) <= width, "the page is wider than the window"
    assert int(drawn) > 10
    assert tall == "true"
    assert "CONSOLE" not in done.stderr


def test_reliability_is_a_picture_of_its_own(root: Path) -> None:
    query = read_outputs(root, sample_params()).queries[0]
    text = render_reliability(query)
    Page(text.replace("<?xml", ""))
    assert text.count('points="90.00,15.00"') == 2, "sure of 90 percent, right in 85, before and after"
    assert "own model: sure of 90%, right in 85%; after the query: sure of 90%, right in 85%" in text
