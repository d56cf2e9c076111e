from __future__ import annotations

import base64
import io
import json
import math
import re
import shutil
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qkt_clinical.common import wording
from qkt_clinical.common.disclosure import shown_count
from qkt_clinical.common.files import digest_folder, to_json, write_json, write_text
from qkt_clinical.config.params import Params
from qkt_clinical.config.workspace import Workspace
from qkt_clinical.errors import OutputsError
from qkt_clinical.qkt.planning import UNLIKE, at_risk, image_shift
from qkt_clinical.records.card import CARD, ImageStatistics
from qkt_clinical.records.decisions import Decision, keep_decision
from qkt_clinical.records.evaluation import Evaluation, Flip
from qkt_clinical.records.outputs import read_outputs, told
from qkt_clinical.records.verdict import GateRule
from qkt_clinical.report import charts, write_figure, write_report
from qkt_clinical.report.index_page import gain_map
from qkt_clinical.report.page import gain_bars, render_chart, render_reliability
from qkt_clinical.report.pictures import MAX_PICTURES, choose, png
from qkt_clinical.report.query_page import relevant, rule_figure, rule_threshold, voices
from tests.sample_run import LAYERS, sample_params, write_pictures, write_sample_run

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


def query_page(root: Path, name: str) -> Page:
    """The page of a query by its name, ``h0-q0``."""
    hospital, query = name.split("-")
    return Page((root / "reports" / "queries" / hospital / f"{query}.html").read_text(encoding="utf-8"))


def change(root: Path, name: str, **values: object) -> None:
    """Change a query's evaluation."""
    hospital, query = name.split("-")
    path = root / "reports" / "evaluation" / hospital / f"{query}.json"
    write_json(path, json.loads(path.read_text()) | values)


def test_the_summary_counts_losses_as_plainly_as_gains(page: Page) -> None:
    text = page.text("summary")
    # Gains: (3 x 0.94 + 0.80) / 4 - 0.72, (3 x 0.90 + 0.04) / 4 - 0.72, (3 x 0.94 + 2 / 3) / 4 - 0.72.
    assert "+10.1 points" in text  # mean of 18.5, -3.5 and 15.17
    assert "1 ended below the hospital’s own model" in text
    assert "Queries answered 3 of 3" in text
    assert "+3.3 points" in text  # mean forgetting of 2, 6 and 2
    assert "Calibration error, mean 0.050 0.050 before" in text
    assert "Images that left a site 0 to teach, by construction" in text
    assert "6.2 MB" in text  # 2 + 1 + 2 teachers of 1,234,567 bytes


def test_the_table_shows_before_after_and_intervals(page: Page) -> None:
    text = page.text("queries")
    assert "h0: ig" in text
    assert "0.0% → 80.0% 0–4 → 76–84" in text
    assert "96.0% → 94.0% 94–98 → 92–96" in text
    assert "▼ −3.5 −6.5 to −0.5" in text
    assert "95% bootstrap intervals" in text


def test_a_query_is_told_in_words(root: Path) -> None:
    page = query_page(root, "h1-q1")
    text = page.text("page")
    assert "h1 asks for lymphocyte" in text
    assert "has images of eosinophil, erythroblast and ig and none of lymphocyte" in text
    assert "fell by 3.5 points" in text
    assert "4.3% of 469 own images (calibration and training)" in page.text("learned")
    assert "lymphocyte −1.25" in page.text("learned")
    assert "h0 not fetched" in page.text("asked")
    assert "✓ fetched" in page.text("asked")
    assert "rose by 18.5 points" in query_page(root, "h0-q0").text("page")


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


def test_small_counts_are_not_shown(root: Path, page: Page) -> None:
    text = page.text("site-h0")
    assert "basophil 135 35 25 50" in text
    assert "eosinophil 132 32 22 50" in text
    assert "erythroblast <5 <5 <5 50" in text
    assert "patients 40 11 <5 14" in text
    assert "unreadable <5" in text, "rejected files, of which there are two"
    assert "basophil 88.0%, eosinophil 90.9%, erythroblast of too few images" in text


def test_of_a_class_with_few_test_images_no_figure_is_shown(root: Path, page: Page) -> None:
    """Of the eosinophils that h2 asks for there are three: two of them are recognised."""
    one = query_page(root, "h2-q2")
    text = one.text("classes")
    assert "eosinophil <5" in text
    assert "eosinophil (asked) too few test images" in text
    assert "eosinophil (asked): too few images before, too few images after." in one.text("recall-d")
    assert text.count("eosinophil – – – –") == 2, "confusion"
    assert "<5 test images of eosinophil: too few to give figures." in one.text("card")
    assert "lower end of its interval too few test images at least 50.0% ▼ not met" in one.text("gate")
    assert "h2 too few+15.2 balanced accuracy" in page.text("gains")
    everything = one.text("page")
    # As percent of recall, precision, AUROC = 0.5 + 1/3, missed; and their bounds 4 points to either side.
    for figure in ("33.3", "83.3", "62.7", "70.7", "79.3", "87.3"):
        assert figure not in everything
    assert "Query accuracy 66.7%" in one.text("result"), "the mean over all classes asked for stays"


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
    assert wording.size(number) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.1234, "+12.3"), (-0.004, "−0.4"), (0.0, "0.0"), (-0.0004, "0.0"), (0.0004, "0.0")]
)
def test_points(value: float, text: str) -> None:
    assert wording.points(value) == text


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


def test_phase_1_is_drawn_as_what_it_was(root: Path, tmp_path: Path) -> None:
    text = query_page(root, "h0-q0").text("learned")
    assert "Phase 1: share of a layer’s output lost, per teacher" in text
    assert "layer number 1" in text
    assert f"layer number {LAYERS}" in text
    assert "Phase 1:" not in query_page(root, "h2-q2").text("learned"), "experts are taken as they are"
    write_sample_run(tmp_path, sample_params())
    path = Workspace(tmp_path).student("h0", "q0") / "phases.json"
    phases = json.loads(path.read_text())
    phases["phase1"] |= {"kind": "distill", "curves": [{"epoch": e, "loss": 1 / e} for e in (1.0, 2.0)]}
    write_json(path, phases)
    change(tmp_path, "h0-q0", student=digest_folder(path.parent))
    write_report(tmp_path, sample_params())
    text = query_page(tmp_path, "h0-q0").text("learned")
    assert "Phase 1: losses" in text
    assert "epoch 2" in text


def test_teachers_that_are_excluded_are_named_and_count_for_nothing(tmp_path: Path) -> None:
    write_sample_run(tmp_path, sample_params())
    path = Workspace(tmp_path).student("h0", "q0") / "phases.json"
    before = {v.network for v in voices(read_outputs(tmp_path, sample_params()).queries[0])}
    phases = json.loads(path.read_text())
    bad, liar, *_ = sorted(before - {"h0"})
    asked = read_outputs(tmp_path, sample_params()).queries[0].plan.classes[0]
    phases["screening"] = [
        {"site": bad, "included": False, "reason": "it errs", "unverified": []},
        {"site": liar, "included": True, "reason": "it agrees", "unverified": [asked], "misnamed": ["ig"]},
    ]
    write_json(path, phases)
    change(tmp_path, "h0-q0", student=digest_folder(path.parent))
    (query, *_) = read_outputs(tmp_path, sample_params()).queries
    assert {v.network for v in voices(query)} == before - {bad}
    (shares,) = [v.shares for v in voices(query) if v.network == liar]
    assert shares[relevant(query).index(asked)] is None
    write_report(tmp_path, sample_params())
    text = query_page(tmp_path, "h0-q0").text("asked")
    assert f"{bad}: excluded, it errs." in text
    told = f"its claim to know {asked} is not verified: its network does not show it."
    assert f"{liar}: it agrees; {told[:-1]}; what it says of ig does not count: its images" in text
    assert "Held against" not in query_page(tmp_path, "h2-q2").text("asked")


def test_how_alike_images_are_is_a_matrix_of_hospitals(tmp_path: Path) -> None:
    write_sample_run(tmp_path, sample_params())
    place = write_report(tmp_path, sample_params())
    assert "How alike their images are" not in place.read_text(encoding="utf-8"), "older cards do not say"
    space = Workspace(tmp_path)
    for site, mean in (("h0", 0.0), ("h1", 0.1), ("h2", 0.9)):
        path = space.teacher(site) / CARD
        channels = json.loads(path.read_text())["network"]["in_channels"]
        images = {"mean": [mean] * channels, "spread": [0.3] * channels, "gradient": [0.1] * channels}
        write_json(path, json.loads(path.read_text()) | {"image_statistics": images})
    student = space.student("h0", "q0") / "plan.json"
    made = json.loads(student.read_text())
    for teacher, shift in zip(made["teachers"], (0.05, 0.4), strict=False):
        teacher["image_shift"] = shift
    write_json(student, made)
    change(tmp_path, "h0-q0", student=digest_folder(student.parent))
    write_report(tmp_path, sample_params())
    index = Page((tmp_path / "reports" / "index.html").read_text(encoding="utf-8"))
    text = index.text("shifts")
    near, far = (image_shift(_looks(0.0), _looks(m)) for m in (0.1, 0.9))
    assert near is not None
    assert far is not None
    assert near < UNLIKE < far
    assert f"h0 · {near:.2f} {far:.2f}unlike" in text
    asked = query_page(tmp_path, "h0-q0").text("asked")
    assert "0.05" in asked
    assert "0.40 looks unlike the hospital’s" in asked
    assert "not told" in query_page(tmp_path, "h1-q1").text("asked")


def _looks(mean: float) -> ImageStatistics:
    return ImageStatistics(mean=(mean,), spread=(0.3,), gradient=(0.1,))


def test_how_far_teachers_were_brought_to_the_images_is_told(tmp_path: Path) -> None:
    write_sample_run(tmp_path, sample_params())
    path = Workspace(tmp_path).student("h0", "q0") / "phases.json"
    phases = json.loads(path.read_text())
    phases["adaptation"] = [
        {"site": "far", "shift": 0.31, "share": 0.5},
        {"site": "near", "shift": 0.012, "share": 0.0},
        {"site": "odd", "shift": None, "share": 0.0},
    ]
    phases["phase2"]["within_budget"] = False
    write_json(path, phases)
    change(tmp_path, "h0-q0", student=digest_folder(path.parent))
    write_report(tmp_path, sample_params())
    text = query_page(tmp_path, "h0-q0").text("asked")
    assert "far: shift 0.31, 50 % taken up; its images look unlike the hospital’s." in text
    assert "near: shift 0.01, left as it was sent." in text
    assert "odd: shift not finite, left as it was sent." in text
    assert "The budget is not kept:" in text
    other = query_page(tmp_path, "h2-q2").text("asked")
    assert "Brought to" not in other
    assert "The budget is not kept" not in other


def test_a_query_that_class_means_alone_do_not_answer_is_told(tmp_path: Path) -> None:
    write_sample_run(tmp_path, sample_params())
    path = Workspace(tmp_path).student("h0", "q0") / "phases.json"
    phases = json.loads(path.read_text())
    phases["method"] = "qkt-means"
    phases["phase2"] |= {"within_budget": False, "encoder_placed_by": []}
    write_json(path, phases)
    change(tmp_path, "h0-q0", student=digest_folder(path.parent))
    write_report(tmp_path, sample_params())
    text = query_page(tmp_path, "h0-q0").text("asked")
    assert "The query is not answered:" in text
    assert "The budget is not kept" not in text


def test_rejected_files_are_counted_by_reason(page: Page) -> None:
    assert "polarity<5unreadable<5" in page.text("site-h0").replace(" ", "")
    assert "Rejected files None." in page.text("site-h1")


def test_digests_versions_and_parameters_stand_in_provenance(root: Path) -> None:
    outputs = read_outputs(root, sample_params())
    text = query_page(root, "h0-q0").text("provenance")
    assert digest_folder(outputs.queries[0].student) in text
    assert f"torch {metadata.version('torch')}" in text
    assert "transfer.images 400" in text
    assert "ingest.splits.train 0.55" in text
    assert outputs.queries[0].card_digest in text
    assert outputs.params_digest in text
    assert str(outputs.sites[0].data_digest) in text


@pytest.mark.parametrize("name", ["index.html", "queries/h0/q0.html", "queries/h1/q1.html"])
def test_a_page_is_one_file_without_a_network(root: Path, name: str) -> None:
    path = root / "reports" / name
    text = path.read_text()
    page = Page(text)
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "").replace("http-equiv", "")
    assert "url(" not in text
    assert "@import" not in text
    assert not [t for t, _ in page.tags if t in {"script", "img", "iframe", "object", "form"}]
    links = [str(a["href"]) for _, a in page.tags if "href" in a]
    others = {h for h in links if not h.startswith("#")} - {"data:,"}
    assert others
    for other in others:
        file, _, anchor = other.partition("#")
        assert (path.parent / file).is_file()
        assert not anchor or anchor in Page((path.parent / file).read_text()).ids
    assert {h[1:] for h in links if h.startswith("#")} <= set(page.ids)
    assert "default-src 'none'" in text


@pytest.mark.parametrize("name", ["index.html", "queries/h0/q0.html"])
def test_a_page_is_sensible_for_screen_readers(root: Path, name: str) -> None:
    page = Page((root / "reports" / name).read_text())
    assert len(page.ids) == len(set(page.ids))
    names = [t for t, _ in page.tags]
    assert {"header", "nav", "main", "footer", "h1", "caption"} <= set(names)
    assert names.count("h1") == 1
    assert names.count("caption") == names.count("table")
    assert all("scope" in a for t, a in page.tags if t == "th")
    assert next(a["href"] for t, a in page.tags if t == "a") == "#main"
    levels = [int(n[1]) for n in names if re.fullmatch("h[1-6]", n)]
    assert all(after <= before + 1 for before, after in pairwise(levels)), "no level is skipped"
    assert all(a.get("alt") for t, a in page.tags if t == "img")
    drawn = [a for t, a in page.tags if t == "svg" and a.get("role") == "img"]
    assert drawn
    for attributes in drawn:
        assert set(str(attributes["aria-labelledby"]).split()) <= set(page.ids)


def test_the_same_outputs_give_the_same_bytes(root: Path, tmp_path: Path) -> None:
    params = sample_params()
    assert build(tmp_path, params, loss_at=1) == (root / "reports" / "index.html").read_text()
    reordered = params.model_copy(update={"queries": dict(reversed(params.queries.items()))})
    assert write_report(tmp_path, reordered).read_text() == (root / "reports" / "index.html").read_text()


def test_names_with_markup_are_text(tmp_path: Path) -> None:
    names = [HOSTILE, '"><svg onload=alert(1)>', "' onclick='x", "a & b", "{{ 7 * 7 }}"]
    text = build(tmp_path, sample_params(names, sites=2), reason=f"because {HOSTILE}")
    page = Page(text)
    assert not [t for t, _ in page.tags if t == "script"]
    assert not [a for _, a in page.tags if any(n.startswith("on") for n in a)]
    assert "{{ 7 * 7 }}" in page.text("knowledge")
    for name in ("h0-q0", "h1-q1"):
        one = query_page(tmp_path, name)
        assert not [t for t, _ in one.tags if t == "script"]
        assert not [a for _, a in one.tags if any(n.startswith("on") for n in a)]
        assert f"because {HOSTILE}" in one.text("asked")
    assert HOSTILE not in render_chart(
        "dumbbells",
        HOSTILE,
        gain_bars(q.evaluation for q in read_outputs(tmp_path, sample_params(names, sites=2)).queries),
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
    assert "Not answered" not in page.text("queries")
    assert "Answered, not measured here" in page.text("queries")
    assert "h2: eosinophil routed h0, h1 student.h2.q2" in page.text("queries")
    assert "Queries answered 3 of 3" in page.text("summary")
    assert "1 not measured here" in page.text("summary")
    assert "Passed the gate 2 of 2" in page.text("summary")


def test_an_answer_that_nobody_has_measured_has_a_page_with_its_card(tmp_path: Path) -> None:
    params = sample_params()
    write_sample_run(tmp_path, params)
    (Workspace(tmp_path).reports / "evaluation" / "h0" / "q0.json").unlink()
    shutil.rmtree(Workspace(tmp_path).student("h1", "q1"))
    (Workspace(tmp_path).reports / "evaluation" / "h1" / "q1.json").unlink()
    index = Page(write_report(tmp_path, params).read_text())
    assert "Not answered: h1-q1." in index.text("queries")
    links = [a.get("href") for t, a in index.tags if t == "a"]
    assert "queries/h0/q0.html" in links
    page = query_page(tmp_path, "h0-q0")
    assert "Answered, not measured here." in page.text("page")
    assert "The hospital has no test images of ig" in page.text("card")
    assert "counts 2 where a teacher counts 1" in page.text("asked")
    assert "4.3% of 469 own images (calibration and training)" in page.text("learned")
    assert digest_folder(Workspace(tmp_path).student("h0", "q0")) in page.text("provenance")
    assert {str(a["href"])[1:] for t, a in page.tags if t == "a" and str(a["href"]).startswith("#")} <= set(
        page.ids
    )
    assert not (tmp_path / "reports" / "queries" / "h1").exists()


@pytest.mark.parametrize(
    ("hospital", "what"), [("h1", "a plan of another query"), ("../../../escaped", "hospital: ")]
)
def test_a_plan_of_another_query_is_refused(tmp_path: Path, hospital: str, what: str) -> None:
    params = sample_params()
    write_sample_run(tmp_path, params)
    (Workspace(tmp_path).reports / "evaluation" / "h0" / "q0.json").unlink()
    path = Workspace(tmp_path).student("h0", "q0") / "plan.json"
    write_json(path, json.loads(path.read_text()) | {"hospital": hospital})
    with pytest.raises(OutputsError, match=what):
        write_report(tmp_path, params)


def test_an_empty_workspace_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OutputsError, match="neither a teacher nor an answered query"):
        write_report(tmp_path, sample_params())
    assert not (tmp_path / "reports" / "index.html").exists()


def put(*path: object) -> Callable[[Any], None]:
    """Sets the last of a path of keys, all but the last two leading to where it stands."""
    *keys, last, value = path

    def damage(held: Any) -> None:
        for key in keys:
            held = held[key]
        held[last] = value

    return damage


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, -1, 1e300, "x"])
@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("evaluation", ("after", "recall", "ig", "value")),
        ("evaluation", ("after", "balanced_accuracy", "low")),
        ("evaluation", ("before", "ece", "high")),
        ("evaluation", ("before", "confusion", 0, 0)),
        ("evaluation", ("after", "reliability", 0, "confidence")),
        ("evaluation", ("after", "reliability", 0, "images")),
        ("evaluation", ("after", "class_ece", "ig")),
        ("evaluation", ("test_images", "ig")),
        ("evaluation", ("bytes_moved",)),
        ("evaluation", ("gain_p",)),
        ("evaluation", ("operating_point", "given_away_test", "value")),
        ("evaluation", ("flips", 0, "index")),
        ("phases", ("phase2", "false_query_rate")),
        ("phases", ("phase1", "teacher_passes")),
    ],
)
def test_a_number_that_cannot_be_is_one_typed_error(
    tmp_path: Path, name: str, keys: tuple[object, ...], number: float
) -> None:
    params = sample_params()
    write_sample_run(tmp_path, params)
    space = Workspace(tmp_path)
    path = space.reports / "evaluation/h0/q0.json"
    if name == "phases":
        path = space.student("h0", "q0") / "phases.json"
    data = json.loads(path.read_text())
    put(*keys, number)(data)
    path.write_text(json.dumps(data))
    with pytest.raises(OutputsError) as caught:
        write_report(tmp_path, params)
    assert caught.value.where.file == str(path)
    assert "dvc repro" in caught.value.remedy
    assert not (tmp_path / "reports" / "index.html").exists()


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("models/teachers/h0/metrics.json", put("recall", "basophil", math.nan)),
        ("models/teachers/h0/curves.json", put(0, "loss", math.inf)),
        ("models/students/h0/q0/phases.json", put("phase2", "local_model_weight", 0.0)),
        ("models/students/h0/q0/phases.json", put("phase1", "curves", 0, "h1", math.nan)),
        ("reports/gate/h0/q0.json", put("rules", 3, "figure", math.nan)),
    ],
)
def test_so_it_is_in_every_other_file(tmp_path: Path, file: str, damage: Callable[[Any], None]) -> None:
    write_sample_run(tmp_path, sample_params())
    data = json.loads((tmp_path / file).read_text())
    damage(data)
    (tmp_path / file).write_text(json.dumps(data))
    with pytest.raises(OutputsError) as caught:
        write_report(tmp_path, sample_params())
    assert caught.value.where.file == str(tmp_path / file)


def test_a_file_of_any_size_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_sample_run(tmp_path, sample_params())
    monkeypatch.setattr("qkt_clinical.records.reading.MAX_RECORD_BYTES", 1000)
    with pytest.raises(OutputsError, match="larger than 1,000 bytes"):
        write_report(tmp_path, sample_params())


def test_a_confusion_matrix_of_other_images_is_refused(tmp_path: Path) -> None:
    write_sample_run(tmp_path, sample_params())
    change(tmp_path, "h0-q0", test_images=dict.fromkeys(("basophil", "eosinophil", "erythroblast", "ig"), 60))
    with pytest.raises(OutputsError, match="of other images than were tested"):
        write_report(tmp_path, sample_params())


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


def test_figures_written_at_once_do_not_disturb_each_other(root: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        written = list(pool.map(write_figure, [root] * 6))
    assert {path.read_bytes()[:4] for path in written} == {b"\x89PNG"}
    assert not list((root / "reports").glob(".*"))


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"relevant": ["basophil", "basophil", "eosinophil", "ig"]}, "a class is named twice"),
        ({"classes": ["ig", "ig"]}, "a class is named twice"),
        ({"classes": "ig"}, "classes"),
        ({"test_images": {"ig": 10**400}}, "test_images"),
        ({"gain": {"value": 0.1, "low": 0.2, "high": 0.1}}, "gain"),
        ({"gain": {"value": 7, "low": 0, "high": 1}}, "gain"),
        ({"subgroups": {"sex": {"\x1b[31m": {"images": -1}}}}, "subgroups.sex.?[31m.images"),
    ],
)
def test_figures_that_cannot_be_are_named_by_their_place(
    tmp_path: Path, values: dict[str, object], fault: str
) -> None:
    write_sample_run(tmp_path, sample_params())
    path = tmp_path / "reports" / "evaluation" / "h0" / "q0.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    with pytest.raises(OutputsError) as caught:
        write_report(tmp_path, sample_params())
    assert fault in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert caught.value.where.file == str(path)


@pytest.mark.parametrize(
    "file", ["decisions/h0.json", "reports/gate/h0/q0.json", "models/teachers/h0/metrics.json"]
)
@pytest.mark.parametrize("content", [b"", b"{}", b"[7]", b"\xff", b"[" * 100_000, b"NaN", b'"text"'])
def test_a_foreign_file_is_one_typed_error(tmp_path: Path, file: str, content: bytes) -> None:
    write_sample_run(tmp_path, sample_params())
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(OutputsError) as caught:
        write_report(tmp_path, sample_params())
    assert caught.value.where.file == str(tmp_path / file)
    assert str(caught.value).count("\n") == 0


def test_an_evaluation_of_another_query_is_refused(tmp_path: Path) -> None:
    params = sample_params()
    write_sample_run(tmp_path, params)
    change(tmp_path, "h0-q0", hospital="../../../escaped")
    with pytest.raises(OutputsError, match="an evaluation of another query"):
        write_report(tmp_path, params)
    assert not (tmp_path / "reports" / "index.html").exists()


def test_a_precision_of_few_answers_is_not_told(root: Path) -> None:
    """Three images of the first class are right; nothing else is taken for it."""
    path = root / "reports" / "evaluation" / "h0" / "q0.json"
    held = json.loads(path.read_text())
    held["after"]["confusion"][0] = [3, 47, 0, 0]
    held["after"]["confusion"][3] = [0, 0, 40, 10]
    scores = told(Evaluation.model_validate(held)).after
    first, *others = scores.precision.values()
    assert first is None, "answered three times"
    assert all(others)
    assert all(scores.recall.values()), "of every class there are fifty images"
    assert scores.confusion[0] == (3, 47, 0, 0)
    for side in ("before", "after"):
        held[side]["confusion"][3] = [3, 0, 0, 0]
    held["test_images"]["ig"] = 3
    once = told(Evaluation.model_validate(held))
    assert once.after.precision["basophil"] is not None, "answered six times"
    assert told(once) == once


# --- the map of gains -------------------------------------------------------------------------------


def test_the_map_of_gains_has_a_cell_for_every_class_asked_for(root: Path, page: Page) -> None:
    columns, rows = gain_map(read_outputs(root, sample_params()))
    assert columns == ["eosinophil", "ig", "lymphocyte"]  # in the order of params.yaml
    found = {
        (hospital, columns[i]): (round(a.recall or 0, 4), round(a.balanced.value, 4), a.lost, a.shade)
        for hospital, row in rows
        for i, answers in enumerate(row)
        for a in answers
    }
    assert found == {
        ("h0", "ig"): (0.8, 0.185, False, 80),
        ("h1", "lymphocyte"): (0.04, -0.035, True, 4),
        ("h2", "eosinophil"): (0, 0.1517, False, 15),
    }
    text = page.text("gains")
    assert "h1 ·not asked ·not asked +4.0▼ −3.5 balanced accuracy" in text
    assert "h0 ·not asked +80.0+18.5 balanced accuracy" in text


def test_a_loss_in_query_accuracy_is_marked_in_index_and_page(tmp_path: Path) -> None:
    params = sample_params()
    write_sample_run(tmp_path, params)
    path = tmp_path / "reports" / "evaluation" / "h0" / "q0.json"
    data = json.loads(path.read_text())
    data["before"]["query_accuracy"] = {"value": 0.9, "low": 0.8, "high": 1.0}
    data["query_gain"] = {"value": -0.1, "low": -0.2, "high": 0.0}
    write_json(path, data)
    index = Page(write_report(tmp_path, params).read_text())
    assert "▼ 90.0% → 80.0% 80–100 → 76–84" in index.text("queries")
    result = query_page(tmp_path, "h0-q0").text("result")
    assert "Query accuracy ▼ 80.0% 90.0% before −10.0 points (−20.0 to 0.0)" in result


# --- the page of a query ----------------------------------------------------------------------------


def test_what_each_network_counts_for(root: Path) -> None:
    query = read_outputs(root, sample_params()).queries[0]
    assert query.evaluation.relevant == ("basophil", "eosinophil", "erythroblast", "ig")
    # h0 has the first three and counts 2; h1 knows eosinophil, erythroblast, ig; h2 erythroblast, ig.
    assert [(v.network, v.shares) for v in voices(query)] == [
        ("h0", (1.0, 2 / 3, 0.5, None)),
        ("h1", (None, 1 / 3, 0.25, 0.5)),
        ("h2", (None, None, 0.25, 0.5)),
    ]
    text = query_page(root, "h0-q0").text("asked")
    assert "counts 2 where a teacher counts 1" in text
    assert "h0 (own) 100 67 50 –does not know it" in text


def test_where_the_own_weight_is_from_is_told_by_method(root: Path) -> None:
    said = [query_page(root, f"h{i}-q{i}").text("asked") for i in range(3)]
    assert ["its own held-out images spoke for that" in text for text in said] == [True, False, True]
    assert ["qkt-light asks no image about that" in text for text in said] == [False, True, False]


def test_absent_and_rare_classes_are_both_named(tmp_path: Path) -> None:
    params = sample_params()
    write_sample_run(tmp_path, params)
    change(tmp_path, "h0-q0", classes=["ig", "platelet"])
    path = Workspace(tmp_path).student("h0", "q0") / "phases.json"
    phases = json.loads(path.read_text())
    phases["phase2"]["rare"] = {"platelet": "<5"}
    write_json(path, phases)
    change(tmp_path, "h0-q0", student=digest_folder(path.parent))
    write_report(tmp_path, params)
    text = query_page(tmp_path, "h0-q0").text("page")
    assert "and erythroblast and only a handful of platelet (<5) and none of ig." in text


def test_figures_over_all_classes_and_calibration_of_each_are_shown(root: Path) -> None:
    """Means 0.72 and 0.905; class by class 0.1 less 0.08 of recall."""
    text = query_page(root, "h0-q0").text("classes")
    assert "Precision, mean over classes 0.720 0.680 to 0.760 0.905 0.865 to 0.945" in text
    assert "AUROC, mean over classes 0.860 0.820 to 0.900 0.953" in text
    assert "AUPRC, mean over classes 0.720 0.680 to 0.760 0.905" in text
    assert "Calibration error 0.050 0.030 to 0.070 0.050 0.030 to 0.070" in text
    assert (
        "False-query rate on own test images budget 5.0%; 150 images of own classes – ▼ 0.060 0.040 to 0.080"
        in text
    )
    assert "0.100 → 0.036" in text, "of the class asked for"
    assert "▼ 0.023 → 0.025" in text, "of its own ones"


def test_a_gain_of_exactly_nothing_is_said_to_be_none(tmp_path: Path) -> None:
    params = sample_params()
    write_sample_run(tmp_path, params)
    change(tmp_path, "h0-q0", gain={"value": 0.0, "low": 0.0, "high": 0.0})
    write_report(tmp_path, params)
    text = query_page(tmp_path, "h0-q0").text("page")
    assert "Balanced accuracy stayed as it was (p = 0.004" in text
    assert "nothing was gained" in text
    assert "rose by" not in text


def test_classes_that_no_teacher_tells_apart_are_at_risk(root: Path) -> None:
    queries = read_outputs(root, sample_params()).queries
    assert at_risk(queries[0].plan) == [("ig", ("basophil",))]
    text = query_page(root, "h0-q0").text("asked")
    assert "ig with basophil: no fetched teacher knows both" in text


def test_rules_are_shown_in_their_unit_and_in_words(root: Path) -> None:
    text = query_page(root, "h1-q1").text("gate")
    assert "Gate: ▼ not passed" in text
    # Recall 4 % less 4; forgotten 6 % and 3 more.
    assert "recall of every class asked for, lower end of its interval 0.0% at least 50.0% ▼ not met" in text
    assert "retained accuracy lost, upper end of its interval 9.0% at most 10.0% ✓ met" in text
    assert "expected calibration error, upper end of its interval 7.0% at most 10.0% ✓ met" in text
    assert "test images of every class asked for 50 at least 20 ✓ met" in text
    few = query_page(root, "h2-q2").text("gate")
    assert "test images of every class asked for <5 at least 20 ▼ not met" in few
    values = {"meaning": "m", "bound": "at least", "passed": True}
    rule = GateRule(rule="query_images", figure=1234, threshold=20, **values)  # type: ignore[arg-type]
    assert (rule_figure(rule), rule_threshold(rule)) == ("1,234", "20")
    rule = GateRule(rule="another", figure=None, threshold=0.5, **values)  # type: ignore[arg-type]
    assert (rule_figure(rule), rule_threshold(rule)) == ("unknown", "50.0%")


def test_decisions_are_told_with_what_was_overridden(tmp_path: Path) -> None:
    params = sample_params()
    write_sample_run(tmp_path, params)
    write_report(tmp_path, params)
    text = query_page(tmp_path, "h0-q0").text("gate")
    assert "No version of this model is in use." in text
    here = digest_folder(Workspace(tmp_path).student("h0", "q0"))
    for model, digest, decision, by, reason, overridden in (
        ("student.h0.q0", "a" * 64, "promoted", "gate", None, ()),
        ("student.h0.q0", here, "promoted", "A. Reviewer", "for a trial", ("query_images: <5",)),
        ("student.h0.q9", "c" * 64, "promoted", "Somebody Else", None, ()),
    ):
        keep_decision(
            tmp_path,
            Decision.model_validate(
                {
                    "model": model,
                    "digest": digest,
                    "decision": decision,
                    "by": by,
                    "reason": reason,
                    "overridden": overridden,
                }
            ),
        )
    write_report(tmp_path, params)
    text = query_page(tmp_path, "h0-q0").text("gate")
    assert "This answer is in use." in text
    assert "promoted gate none given nothing another version aaaaaaaaaaaa" in text
    assert f"promoted A. Reviewer for a trial ▼ query_images: <5 this answer {here[:12]}" in text
    assert "Somebody Else" not in text
    back = {"model": "student.h0.q0", "digest": "a" * 64, "decision": "rolled back", "by": "B", "reason": "x"}
    keep_decision(tmp_path, Decision.model_validate(back))
    write_report(tmp_path, params)
    text = query_page(tmp_path, "h0-q0").text("gate")
    assert "Another version is in use, not this answer." in text
    assert "↩ rolled back B x nothing another version aaaaaaaaaaaa" in text


def test_the_reliability_curve_leaves_small_bins_out(root: Path) -> None:
    page = query_page(root, "h0-q0")
    words = page.text("reliability-d")
    # The bin of 4 images, sure of 55 %, is not there.
    assert words.startswith("own model: sure of 75%, right in 80%, sure of 95%, right in 90%. after the")
    text = render_reliability(read_outputs(root, sample_params()).queries[0].evaluation)
    Page(text)
    assert "sure of 75%, right in 80%, sure of 95%, right in 90%. after the query: sure of 75%" in text
    # 40 + 2.8 x 75, 36 + 2.4 x 20; 40 + 2.8 x 95, 36 + 2.4 x 10: before and after.
    assert text.count('points="250.0,84.0 306.0,60.0 "') == 2
    curve = charts.reliability_curve("x", [(0.75, 0.8), (1.0, 1.0)])
    assert curve.points == ((75.0, pytest.approx(20.0)), (100.0, 0.0))


def test_subgroups_are_tables(tmp_path: Path) -> None:
    params = sample_params()
    write_sample_run(tmp_path, params)
    figures = {k: {"value": 0.5, "low": 0.4, "high": 0.6} for k in ("query_accuracy", "balanced_accuracy")}
    figures["retained_accuracy"] = {"value": 0.8, "low": 0.7, "high": 0.9}
    lower = {k: {"value": 0.3, "low": 0.2, "high": 0.4} for k in figures} | {"retained_accuracy": None}
    nothing = dict.fromkeys(lower)
    groups = {
        "F": {"images": 30, "patients": 9, "before": figures, "after": lower},
        "M": {"images": "<5", "patients": "<5", "before": nothing, "after": nothing},
    }
    change(tmp_path, "h0-q0", subgroups={"sex": groups})
    write_report(tmp_path, params)
    text = query_page(tmp_path, "h0-q0").text("subgroups")
    assert "F 30 9 ▼ 50.0% → 30.0% 40–60 → 20–40 80.0% none after ▼ 50.0% → 30.0%" in text
    assert "M <5 <5 none none none" in text
    assert "subgroups" not in query_page(tmp_path, "h1-q1").ids


def test_model_cards_are_rendered(root: Path, page: Page) -> None:
    text = query_page(root, "h1-q1").text("card")
    assert "Not a medical device" in text
    assert "More than 20% of the images of lymphocyte are missed." in text, "two of fifty are not"
    assert "student.h1.q1" in text
    text = page.text("site-h0")
    assert "Model card of the teacher" in text
    assert "teacher.h0" in text


# --- pictures of cases that flipped -----------------------------------------------------------------


def pictures(page: Page) -> list[dict[str, str | None]]:
    return [a for t, a in page.tags if t == "img"]


def test_pictures_are_shown_of_hospitals_that_consent_alone(tmp_path: Path) -> None:
    params = sample_params()
    write_sample_run(tmp_path, params)
    write_pictures(tmp_path, params, ["h2"])
    write_report(tmp_path, params)
    page = query_page(tmp_path, "h0-q0")  # tested at h0, h1 and h2: five gained and two lost at each
    text = page.text("cases")
    assert "Wrong before, right after: 15 images" in text
    assert "▼ Right before, wrong after: 6 images" in text
    assert "No pictures of h0 and h1: without consent" in text
    shown = pictures(page)
    assert [a["alt"] for a in shown] == ["ig, seen as basophil before and as ig after"] * 5 + [
        "eosinophil, seen as eosinophil before and as ig after"
    ] * 2
    held = np.load(Workspace(tmp_path).prepared("h2") / "images.npy", allow_pickle=False)
    for attributes, index in zip(shown, (0, 10, 20, 30, 40, 50, 60), strict=True):
        data = base64.b64decode(str(attributes["src"]).removeprefix("data:image/png;base64,"))
        assert (np.moveaxis(np.asarray(Image.open(io.BytesIO(data))), -1, 0) == held[index]).all()


def test_without_consent_the_page_says_so(tmp_path: Path) -> None:
    params = sample_params()
    write_sample_run(tmp_path, params)
    write_pictures(tmp_path, params, [])
    write_report(tmp_path, params)
    page = query_page(tmp_path, "h0-q0")
    assert pictures(page) == []
    assert "No pictures of h0, h1 and h2: without consent (pictures in site.yaml)" in page.text("cases")


@pytest.mark.parametrize("flip", [{"index": 480}, {"index": 300}, {"actual": "eosinophil"}, {"actual": "?"}])
def test_no_picture_of_what_is_no_test_image_or_of_another_class(
    tmp_path: Path, flip: dict[str, object]
) -> None:
    """An evaluation of other data may name an image by its index that a model was trained on."""
    params = sample_params()
    write_sample_run(tmp_path, params)
    write_pictures(tmp_path, params, ["h0"])
    good = {"site": "h0", "index": 0, "actual": "ig", "before": "basophil", "after": "ig"}
    foreign = good | {"index": 10} | flip
    change(tmp_path, "h0-q0", flips=[good, foreign | {"after": foreign["actual"]}])
    write_report(tmp_path, params)
    page = query_page(tmp_path, "h0-q0")
    assert [a["alt"] for a in pictures(page)] == ["ig, seen as basophil before and as ig after"]
    assert "<5 case is without a picture: the evaluation was made of other data" in page.text("cases")
    change(tmp_path, "h0-q0", flips=[good])
    write_report(tmp_path, params)
    assert "without a picture" not in query_page(tmp_path, "h0-q0").text("cases")


def test_cases_are_chosen_from_every_class_and_site_in_turn() -> None:
    flips = [Flip(site="a", index=i, actual="x", before="y", after="x") for i in range(20)]
    flips += [Flip(site="b", index=i, actual="x", before="y", after="x") for i in range(2)]
    flips += [Flip(site="a", index=i, actual="w", before="y", after="w") for i in range(1)]
    chosen = choose(flips)
    assert len(chosen) == MAX_PICTURES
    places = [(f.actual, f.site, f.index) for f in chosen[:6]]
    assert places == [
        ("w", "a", 0),
        ("x", "a", 0),
        ("x", "b", 0),
        ("x", "a", 1),
        ("x", "b", 1),
        ("x", "a", 2),
    ]
    assert choose([]) == []


def test_a_picture_of_a_volume_is_its_middle_slice() -> None:
    volume = np.zeros((1, 5, 200, 100), np.float32)
    volume[0, 2, :, 50:] = -3.0
    image = Image.open(io.BytesIO(base64.b64decode(png(volume))))
    assert image.size == (48, 96)
    assert image.getextrema() == (0, 255)
    assert image.getpixel((10, 40)) == 255
    assert image.getpixel((40, 40)) == 0
    assert png(volume) == png(volume.copy())
