from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from qkt_clinical.common.files import digest_file, digest_folder, write_json
from qkt_clinical.config.query import QueryConfig
from qkt_clinical.config.workspace import Workspace
from qkt_clinical.data.prepared import Manifest, read_manifest
from qkt_clinical.errors import BundleError, ConfigError, PreparedError, QktError, QueryError
from qkt_clinical.models.offers import read_offer
from qkt_clinical.qkt.planning import at_risk, image_shift, images_apart, make_plan
from qkt_clinical.records.card import CARD, MASK, WEIGHTS, ImageStatistics
from qkt_clinical.records.plan import SHARED, Asking, Offer, Plan, read_plan
from qkt_clinical.stages.plan import plan_query
from tests.four_hospitals import PARAMS, SHAPE, SITES, ask, write_hospitals, write_teacher


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_hospitals(tmp_path)
    return tmp_path


@pytest.fixture
def manifest(root: Path) -> Manifest:
    return read_manifest(Workspace(root).prepared("aster"))


def offers(root: Path, sites: Sequence[str]) -> list[Offer]:
    return [read_offer(Workspace(root).teacher(s), s) for s in sites]


def plan(root: Path, **query: Any) -> Plan:
    manifest = read_manifest(Workspace(root).prepared("aster"))
    config = QueryConfig(**query)
    return make_plan("aster", "q", config, Asking.of(manifest), offers(root, SITES))


def reasons(made: Plan) -> dict[str, str]:
    return {t.site: t.reason for t in made.teachers}


# --- how far images lie apart ---------------------------------------------------------------------

HOME = ImageStatistics(mean=(0.1, 0.1, 0.1), spread=(0.39, 0.39, 0.39), gradient=(0.19, 0.19, 0.19))


def test_image_shift_by_hand() -> None:
    assert image_shift(HOME, HOME) == 0.0
    # With 0.01 added the spread is 0.4 here and 0.8 there in one of three channels: ratios 4 and 1/4.
    wide = HOME.model_copy(update={"spread": (0.79, 0.39, 0.39)})
    assert image_shift(HOME, wide) == pytest.approx((4 + 0.25 - 2) / 4 / 6)
    # The mean moves by 0.2 in one channel: 0.04 * 2 / 0.16 / 4.
    moved = HOME.model_copy(update={"mean": (0.3, 0.1, 0.1)})
    assert image_shift(HOME, moved) == pytest.approx(0.04 * 2 / 0.16 / 4 / 6)
    # Twice as sharp in every channel.
    sharp = HOME.model_copy(update={"gradient": (0.39, 0.39, 0.39)})
    assert image_shift(HOME, sharp) == pytest.approx((4 + 0.25 - 2) / 4 / 2)
    for other in (wide, moved, sharp):
        assert image_shift(HOME, other) == image_shift(other, HOME)
    grey = ImageStatistics(mean=(0.1,), spread=(0.39,), gradient=(0.19,))
    assert image_shift(HOME, grey) is None
    flat = ImageStatistics(mean=(0.0,), spread=(0.0,), gradient=(0.0,))
    assert image_shift(grey, flat) is not None


def test_a_plan_tells_how_far_a_teachers_images_lie_from_the_hospitals(root: Path) -> None:
    ask(root, "aster", "q", classes=["c"])
    dark = HOME.model_copy(update={"mean": (-0.9, -0.9, -0.9)})

    def shifts() -> dict[str, float | None]:
        return {t.site: t.image_shift for t in plan_query(root, "aster", "q", PARAMS).teachers}

    write_teacher(root, "birch", (1, 2), format="qkt-bundle/2", image_statistics=dark.model_dump(mode="json"))
    assert shifts() == {"birch": None, "cedar": None, "dahlia": None}, "the hospital's own are not known"
    write_teacher(root, "aster", (0, 1), format="qkt-bundle/2", image_statistics=HOME.model_dump(mode="json"))
    found = shifts()
    assert found["birch"] == pytest.approx(image_shift(HOME, dark), abs=0.001)
    assert (found["cedar"], found["dahlia"]) == (None, None), "cards of the first format do not say"
    assert "unlike the hospital's" in images_apart(found["birch"])
    assert images_apart(0.01) == "; image shift 0.01"
    assert images_apart(None) == ""


@pytest.mark.parametrize(
    "images",
    [
        {"mean": [0.0], "spread": [1.0], "gradient": [1.0]},
        {"mean": [0.0] * 3, "spread": [1.0] * 3, "gradient": [1.0] * 2},
        {"mean": [0.0] * 3, "spread": [-1.0] * 3, "gradient": [1.0] * 3},
        {"mean": [1e30] * 3, "spread": [1.0] * 3, "gradient": [1.0] * 3},
    ],
)
def test_statistics_that_cannot_be_are_refused(root: Path, images: dict[str, list[float]]) -> None:
    write_teacher(root, "birch", (1, 2), format="qkt-bundle/2", image_statistics=images)
    with pytest.raises(BundleError):
        read_offer(Workspace(root).teacher("birch"), "birch")


# --- which teachers -------------------------------------------------------------------------------


def test_relevant_is_who_knows_a_query_class(root: Path) -> None:
    made = plan(root, classes=("c",))
    assert made.relevant == ("birch", "cedar")
    assert reasons(made) == {
        "birch": "knows c",
        "cedar": "knows c",
        "dahlia": "does not know c or a class of the hospital's own",
    }
    assert made.local == ("b",), "classes of the training images"
    birch = made.teachers[0]
    assert (birch.teaches, birch.rivals, birch.known) == (("c",), ("b",), ("b", "c"))
    assert [t.rivals for t in made.teachers[1:]] == [(), ()]
    assert (birch.scores, birch.threshold) == ({"c": 0.7}, 0.3)
    folder = Workspace(root).teacher("birch")
    assert birch.digest == digest_file(folder / CARD)
    assert birch.bytes == sum((folder / f).stat().st_size for f in SHARED)
    assert made.bytes_moved == sum(t.bytes for t in made.teachers if t.relevant)
    assert made.bytes_moved < sum(t.bytes for t in made.teachers)


def test_who_knows_only_a_class_of_the_hospitals_own_is_relevant_too(root: Path) -> None:
    write_teacher(root, "dahlia", (1, 3))
    made = plan(root, classes=("c",))
    assert made.relevant == ("birch", "cedar", "dahlia")
    dahlia = made.teachers[2]
    assert (dahlia.teaches, dahlia.rivals) == ((), ("b",))
    assert dahlia.reason == "knows b, no query class"
    # It says nothing about the query, so that it covers none and comes last.
    assert plan(root, classes=("c",), max_teachers=2).relevant == ("birch", "cedar")
    with pytest.raises(QueryError, match="no usable teacher knows c"):
        plan(root, classes=("c",), exclude_teachers=("birch", "cedar"))


def test_light_goes_without_who_knows_no_query_class(root: Path) -> None:
    write_teacher(root, "dahlia", (1, 3))
    made = plan(root, classes=("c",), method="qkt-light")
    assert made.relevant == ("birch", "cedar")
    assert reasons(made)["dahlia"] == "does not know c"
    assert plan(root, classes=("c",), method="routed").relevant == ("birch", "cedar", "dahlia")


def test_several_classes_may_come_from_several_teachers(root: Path) -> None:
    made = plan(root, classes=("c", "d"))
    assert made.relevant == ("birch", "cedar", "dahlia")
    assert {t.site: t.teaches for t in made.teachers} == {
        "birch": ("c",),
        "cedar": ("c", "d"),
        "dahlia": ("d",),
    }
    assert reasons(made)["cedar"] == "knows c and d"


def test_own_classes_that_no_fetched_teacher_knows_beside_the_query_are_at_risk(root: Path) -> None:
    # birch knows b and c together; of d and b nobody was taught the difference.
    assert at_risk(plan(root, classes=("c", "d"))) == [("d", ("b",))]
    assert at_risk(plan(root, classes=("c",), exclude_teachers=("birch",))) == [("c", ("b",))]


def test_the_asking_hospital_teaches_itself_nothing(root: Path) -> None:
    write_teacher(root, "aster", (0, 1, 2))
    assert "aster" not in [t.site for t in plan(root, classes=("c",)).teachers]


def test_excluded_teachers(root: Path) -> None:
    made = plan(root, classes=("c",), exclude_teachers=("birch",))
    assert made.relevant == ("cedar",)
    assert reasons(made)["birch"] == "excluded by the query"


def test_at_most_so_many_teachers_the_surest_first(root: Path) -> None:
    made = plan(root, classes=("c",), max_teachers=1)
    assert made.relevant == ("cedar",)
    assert reasons(made)["birch"] == "beyond max_teachers 1"
    assert plan(root, classes=("c",), max_teachers=2).relevant == ("birch", "cedar")
    # One for every class comes before the limit is filled up; cedar knows both.
    assert plan(root, classes=("c", "d"), max_teachers=1).relevant == ("cedar",)
    assert plan(root, classes=("c", "d"), max_teachers=2).relevant == ("birch", "cedar")
    write_teacher(root, "cedar", ())
    assert plan(root, classes=("c", "d"), max_teachers=1).relevant == ("birch", "dahlia"), "none is left out"


def test_the_order_in_which_teachers_are_given_does_not_matter(root: Path, manifest: Manifest) -> None:
    backwards = offers(root, SITES[::-1])
    config = QueryConfig(classes=("c", "d"), max_teachers=2)
    assert make_plan("aster", "q", config, Asking.of(manifest), backwards) == plan(
        root, classes=("c", "d"), max_teachers=2
    )


def test_teachers_of_other_images_or_classes_are_left_out(root: Path) -> None:
    write_teacher(
        root, "birch", (1, 2), input={"shape": (3, 32, 32), "normalisation": "unit", "spacing_mm": None}
    )
    made = plan(root, classes=("c",))
    assert made.relevant == ("cedar",)
    assert reasons(made)["birch"] == "takes 3x32x32 unit images, not 3x16x16 unit"
    write_teacher(
        root, "birch", (1, 2), input={"shape": SHAPE, "normalisation": "zscore", "spacing_mm": None}
    )
    assert reasons(plan(root, classes=("c",)))["birch"] == "takes 3x16x16 zscore images, not 3x16x16 unit"
    write_teacher(root, "birch", (1, 2), classes=("b", "a", "c", "d"))
    assert reasons(plan(root, classes=("c",)))["birch"] == "has another label space"


# --- queries that cannot be answered --------------------------------------------------------------


def test_a_class_that_nobody_knows(root: Path) -> None:
    with pytest.raises(QueryError, match="no usable teacher knows c") as caught:
        plan(root, classes=("c", "d"), exclude_teachers=("birch", "cedar"))
    assert caught.value.code == "uncovered"
    assert (caught.value.where.site, caught.value.where.stage) == ("aster", "plan")


def test_a_class_of_no_federation(root: Path) -> None:
    with pytest.raises(QueryError, match="'q' asks for z, which is no class") as caught:
        plan(root, classes=("c", "z"))
    assert "a, b, c, d" in caught.value.remedy


def test_nothing_of_its_own_beside_the_query(root: Path) -> None:
    with pytest.raises(QueryError, match="no class of its own"):
        plan(root, classes=("b", "c"))


# --- bundles that cannot be trusted ---------------------------------------------------------------


def damaged(root: Path, site: str, what: str) -> None:
    folder = Workspace(root).teacher(site)
    card = json.loads((folder / CARD).read_text())
    match what:
        case "no-mask":
            (folder / MASK).unlink()
        case "no-weights":
            (folder / WEIGHTS).unlink()
        case "no-card":
            (folder / CARD).unlink()
        case "other-site":
            write_json(folder / CARD, card | {"site": "cedar"})
        case "the-asking-site":
            write_json(folder / CARD, card | {"site": "aster"})
        case "student":
            decision = {"method": "qkt", "local": [0], "query": [2], "budget": 0.1, "own_weight": 2.0}
            write_json(folder / CARD, card | {"kind": "student", "decision": decision | {"offsets": [0.0]}})
        case _:
            text = (folder / MASK).read_text().replace('"threshold": 0.3', '"threshold": NaN')
            (folder / MASK).write_text(text)


@pytest.mark.parametrize(
    ("what", "code"),
    [
        ("no-mask", "bundle-mask"),
        ("no-weights", "bundle-missing"),
        ("no-card", "bundle-missing"),
        ("other-site", "bundle-card"),
        ("the-asking-site", "bundle-card"),
        ("student", "bundle-card"),
        ("nan", "bundle-card"),
    ],
)
def test_a_bundle_that_is_not_what_it_should_be(root: Path, what: str, code: str) -> None:
    damaged(root, "birch", what)
    with pytest.raises(BundleError) as caught:
        plan_query(root, "aster", "q", PARAMS)
    assert caught.value.code == code
    assert caught.value.where.site == "birch"
    assert not Workspace(root).fetched("aster", "q").exists()


# --- what moves -----------------------------------------------------------------------------------


def test_only_what_is_shared_leaves_a_hospital(root: Path) -> None:
    made = plan_query(root, "aster", "q", PARAMS)
    folder = Workspace(root).fetched("aster", "q")
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert files == {"plan.json"} | {f"teachers/{s}/{f}" for s in ("birch", "cedar") for f in SHARED}
    assert not {"metrics.json", "curves.json"} & set(SHARED)
    for site in made.relevant:
        for file in SHARED:
            original = Workspace(root).teacher(site) / file
            assert (folder / "teachers" / site / file).read_bytes() == original.read_bytes()
    moved = sum(p.stat().st_size for p in (folder / "teachers").rglob("*") if p.is_file())
    assert made.bytes_moved == moved
    assert read_plan(folder) == made


def test_a_plan_replaces_the_one_before_as_a_whole(root: Path) -> None:
    plan_query(root, "aster", "q", PARAMS)
    folder = Workspace(root).fetched("aster", "q")
    before = digest_folder(folder)
    plan_query(root, "aster", "q", PARAMS)
    assert digest_folder(folder) == before
    ask(root, classes=["d"], exclude_teachers=["birch"])
    plan_query(root, "aster", "q", PARAMS)
    assert sorted(p.name for p in (folder / "teachers").iterdir()) == ["cedar", "dahlia"]
    ask(root, classes=["z"])
    before = digest_folder(folder)
    with pytest.raises(QueryError):
        plan_query(root, "aster", "q", PARAMS)
    assert digest_folder(folder) == before
    assert [p.name for p in folder.parent.iterdir()] == ["q"]


def test_no_other_hospitals_data_are_needed(root: Path) -> None:
    """Only aster is prepared here; the plan reads its manifest and the others' bundles."""
    assert [p.name for p in (root / "data" / "prepared").iterdir()] == ["aster"]
    assert plan_query(root, "aster", "q", PARAMS).relevant == ("birch", "cedar")


@pytest.mark.parametrize(
    ("hospital", "name", "error"),
    [("zinnia", "q", ConfigError), ("aster", "other", ConfigError), ("birch", "q", PreparedError)],
)
def test_places_that_are_not_there(root: Path, hospital: str, name: str, error: type[QktError]) -> None:
    ask(root, "birch", classes=["a"])
    with pytest.raises(error):
        plan_query(root, hospital, name, PARAMS)


def test_a_plan_that_cannot_be_read(root: Path) -> None:
    folder = Workspace(root).fetched("aster", "q")
    for content in (None, "{", '{"format": "qkt-plan/2"}'):
        if content is not None:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "plan.json").write_text(content)
        with pytest.raises(QueryError) as caught:
            read_plan(folder)
        assert caught.value.code == "no-plan"
    with pytest.raises(ValidationError):
        Plan.model_validate({})
