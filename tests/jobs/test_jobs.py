from __future__ import annotations

import multiprocessing
import os
import runpy
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qkt_clinical.catalog import METHODS, Method
from qkt_clinical.cli import main
from qkt_clinical.common.files import to_json, write_json
from qkt_clinical.common.locks import Busy, hold_query
from qkt_clinical.config.loading import load_params, load_query
from qkt_clinical.config.params import Params
from qkt_clinical.config.query import QueryRef
from qkt_clinical.config.workspace import Workspace
from qkt_clinical.errors import ConfigError, QktError, QueryError
from qkt_clinical.jobs.new import new_query, tell_pipeline
from qkt_clinical.jobs.routes import Route, route_json, route_line, routes
from qkt_clinical.jobs.state import Board, Job, asked
from tests.four_hospitals import PARAMS, SITES, ask, write_hospitals, write_teacher

pytestmark = pytest.mark.slow

PIPELINE = """# The federation.
seed: 0
classes: [a, b, c, d] # in this order
sites: [aster, birch, cedar, dahlia]

# hospitals/<hospital>/queries/<query>.yaml
queries:
  aster-q: {hospital: aster, query: q}

mask: # which classes
  probes: 8
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for site in SITES:
        folder = tmp_path / "hospitals" / site
        folder.mkdir(parents=True)
        (folder / "site.yaml").write_text("{}", encoding="utf-8")
    ask(tmp_path, classes=["c"])
    (tmp_path / "params.yaml").write_text(PIPELINE, encoding="utf-8")
    return tmp_path


# --- asking ---------------------------------------------------------------------------------------


def test_a_new_query_is_a_file_that_reads_back(root: Path) -> None:
    path = new_query(root, "birch", "cd", ["c", "d"], PARAMS, budget=0.02, exclude_teachers=["cedar"])
    assert path == root / "hospitals" / "birch" / "queries" / "cd.yaml"
    query = load_query(root, "birch", "cd")
    assert (query.classes, query.method, query.budget) == (("c", "d"), "qkt", 0.02)
    assert (query.max_teachers, query.exclude_teachers) == (None, ("cedar",))
    assert "false-query rate: at most 2 % of today's images" in path.read_text(encoding="utf-8")


def test_class_names_that_yaml_would_read_otherwise_stay_words(root: Path) -> None:
    odd = ("no", "a: b", "1", "[x]", "näher, y", "#")
    params = PARAMS.model_copy(update={"classes": odd})
    new_query(root, "birch", "odd", odd, params)
    assert load_query(root, "birch", "odd").classes == odd


@pytest.mark.parametrize(
    ("hospital", "name", "classes", "options", "what"),
    [
        ("aster", "q", ["c"], {}, "has a query 'q' already"),
        ("astor", "x", ["c"], {}, "no hospital 'astor'"),
        ("aster", "../x", ["c"], {}, "no query name"),
        ("aster", "x", ["e"], {}, "e is no class of the federation"),
        ("aster", "x", [], {}, "classes"),
        ("aster", "x", ["c"], {"budget": 0.9}, "budget"),
        ("aster", "x", ["c"], {"method": "magic"}, "method"),
    ],
)
def test_what_cannot_be_asked(
    root: Path, hospital: str, name: str, classes: list[str], options: dict[str, object], what: str
) -> None:
    with pytest.raises(QktError, match=what):
        new_query(root, hospital, name, classes, PARAMS, **options)  # type: ignore[arg-type]
    assert [p.name for p in (root / "hospitals").rglob("*.yaml") if p.parent.name == "queries"] == ["q.yaml"]


def test_the_pipeline_is_told_once_and_by_one_line(root: Path) -> None:
    assert not tell_pipeline(root, "aster", "q"), "it knows"
    assert tell_pipeline(root, "birch", "new")
    wanted = PIPELINE.replace("query: q}\n", "query: q}\n  birch-new: {hospital: birch, query: new}\n")
    assert (root / "params.yaml").read_text(encoding="utf-8") == wanted
    assert not tell_pipeline(root, "birch", "new")
    assert sorted(p.name for p in root.iterdir()) == [".qkt", "hospitals", "params.yaml"]


@pytest.mark.parametrize(
    "queries",
    [
        "queries: {}\n",
        "queries: # none\n  aster-q: {hospital: aster, query: q}\n",
        "queries:\n\n  aster-q:\n    hospital: aster\n    query: q\n",
    ],
)
def test_the_pipeline_is_told_whatever_the_layout(root: Path, queries: str) -> None:
    block = "queries:\n  aster-q: {hospital: aster, query: q}\n"
    (root / "params.yaml").write_text(PIPELINE.replace(block, queries), encoding="utf-8")
    before = load_params(root)
    assert tell_pipeline(root, "birch", "new")
    after = load_params(root)
    assert after.queries == {**before.queries, "birch-new": QueryRef(hospital="birch", query="new")}
    assert after.model_copy(update={"queries": before.queries}) == before
    text = (root / "params.yaml").read_text(encoding="utf-8")
    assert all(comment in text for comment in ("# The federation.", "# in this order", "# which classes"))


def test_names_that_yaml_reads_as_numbers_or_truth_stay_names(root: Path) -> None:
    text = PIPELINE.replace("sites: [aster,", 'sites: [aster, "no",')
    (root / "params.yaml").write_text(text, encoding="utf-8")
    assert tell_pipeline(root, "no", "2024")
    assert load_params(root).queries["no-2024"] == QueryRef(hospital="no", query="2024")
    new_query(root, "birch", "x", ["c"], PARAMS, exclude_teachers=["no", "12"], budget=0.123456789)
    query = load_query(root, "birch", "x")
    assert (query.exclude_teachers, query.budget) == (("no", "12"), 0.123456789)


def test_names_that_lead_elsewhere_leave_nothing_behind(root: Path) -> None:
    for name in ("../../../x", "nobody"):
        with pytest.raises(ConfigError), Board(root).hold(name, "q"):
            pytest.fail("held")
    assert not (root / ".qkt").exists()


@pytest.mark.parametrize(
    ("sites", "there", "told"),
    [
        ("aster, birch, cedar, dahlia", (), False),
        ("aster, birch, cedar, dahlia", ("birch",), False),
        ("aster", ("birch", "cedar"), False),
        ("aster, birch, cedar, dahlia", ("birch", "cedar"), True),
    ],
    ids=["alone", "one-teacher", "not-sites", "both-teachers"],
)
def test_the_pipeline_is_told_where_it_can_hear_the_teachers(
    root: Path, sites: str, there: tuple[str, ...], told: bool
) -> None:
    text = PIPELINE.replace("aster, birch, cedar, dahlia", sites)
    (root / "params.yaml").write_text(text, encoding="utf-8")
    for site in SITES[1:]:
        shutil.rmtree(root / "hospitals" / site)
    for site in there:
        write_teacher(root, site, (1, 2))
    if told:
        assert tell_pipeline(root, "aster", "new", ["birch", "cedar"])
        assert "aster-new" in load_params(root).queries
        return
    with pytest.raises(ConfigError, match=r"no teacher of .*cedar is in this workspace"):
        tell_pipeline(root, "aster", "new", ["birch", "cedar"])
    assert (root / "params.yaml").read_text(encoding="utf-8") == text
    assert not tell_pipeline(root, "aster", "q", ["birch", "cedar"]), "it knows already"


def test_the_pipeline_is_told_of_hospitals_whose_teachers_it_makes_itself(root: Path) -> None:
    assert tell_pipeline(root, "aster", "new", ["birch", "cedar"]), "their folders are here"


def test_names_that_meet_get_keys_of_their_own(root: Path) -> None:
    (root / "params.yaml").write_text(
        PIPELINE.replace("sites: [aster,", "sites: [aster, a-b, a,"), encoding="utf-8"
    )
    assert tell_pipeline(root, "a-b", "c")
    assert tell_pipeline(root, "a", "b-c")
    assert set(load_params(root).queries) == {"aster-q", "a-b-c", "a-b-c-2"}


def test_a_layout_that_cannot_take_a_line_is_left_alone(root: Path) -> None:
    odd = PIPELINE.replace(
        "queries:\n  aster-q: {hospital: aster, query: q}\n",
        "queries: {aster-q: {hospital: aster, query: q}}\n",
    )
    (root / "params.yaml").write_text(odd, encoding="utf-8")
    with pytest.raises(ConfigError, match="cannot be added by itself"):
        tell_pipeline(root, "birch", "new")
    assert (root / "params.yaml").read_text(encoding="utf-8") == odd


# --- what is known of jobs ------------------------------------------------------------------------


def job(root: Path) -> Job:
    return Board(root).read("aster", "q")


def keep(root: Path, **changes: object) -> None:
    board = Board(root)
    known = Job(hospital="aster", query="q", asked=asked(load_query(root, "aster", "q")))
    board.write(known.model_copy(update=changes))


def test_a_query_waits_until_somebody_works_on_it(root: Path) -> None:
    ask(root, "birch", "z", classes=["d"])
    (root / "hospitals" / "birch" / "queries" / "Not A Name.yaml").write_text("{}", encoding="utf-8")
    assert [(j.name, j.state) for j in Board(root).jobs()] == [("aster/q", "waiting"), ("birch/z", "waiting")]
    assert [j.name for j in Board(root).jobs("birch")] == ["birch/z"]


def test_one_bad_file_does_not_hold_up_the_others(root: Path) -> None:
    ask(root, "birch", "z", clases=["d"])
    found = {j.name: j for j in Board(root).jobs()}
    assert found["aster/q"].state == "waiting"
    assert found["birch/z"].state == "failed"
    error = found["birch/z"].error
    assert error is not None
    assert "did you mean 'classes'?" in error.message


def test_what_the_pipeline_has_answered_is_answered(root: Path) -> None:
    student = Workspace(root).student("aster", "q")
    student.mkdir(parents=True)
    said = load_query(root, "aster", "q").model_dump(mode="json")
    write_json(student / "query.json", {"hospital": "aster", "query": "q", **said})
    assert job(root).state == "answered"
    ask(root, classes=["d"])
    assert job(root).state == "waiting", "another question"
    (student / "query.json").write_text("{", encoding="utf-8")
    assert job(root).state == "waiting"


def test_a_changed_file_is_another_question(root: Path) -> None:
    keep(root, state="answered", version="3")
    assert job(root).version == "3"
    ask(root, classes=["c"], budget=0.1)
    assert (job(root).state, job(root).version) == ("waiting", None)


def test_one_process_at_a_time(root: Path) -> None:
    board = Board(root)
    busy = pytest.raises(Busy, match="another process works on this query")
    with board.hold("aster", "q"), busy, Board(root).hold("aster", "q"):
        pytest.fail("two of them")
    with board.hold("aster", "q") as held:
        assert held.state == "waiting"


def _hold(root: Path, held: multiprocessing.synchronize.Event) -> None:
    with Board(root).hold("aster", "q") as held_job:
        Board(root).write(held_job.model_copy(update={"state": "running", "step": "transfer"}))
        held.set()
        time.sleep(60)


@pytest.fixture
def holder(root: Path) -> Iterator[int]:
    """Another process that works on the job; its number."""
    context = multiprocessing.get_context("spawn")
    held = context.Event()
    process = context.Process(target=_hold, args=(root, held))
    process.start()
    assert held.wait(60)
    yield int(process.pid or 0)
    process.kill()
    process.join()


def test_running_is_whose_process_lives_and_interrupted_whose_does_not(root: Path, holder: int) -> None:
    assert (job(root).state, job(root).step) == ("running", "transfer")
    os.kill(holder, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while job(root).state == "running" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert job(root).state == "interrupted"
    with Board(root).hold("aster", "q") as taken:
        assert taken.state == "interrupted"


def test_cancelling_a_running_job_asks_its_process(root: Path, holder: int) -> None:
    board = Board(root)
    assert board.cancel("aster", "q").state == "running"
    assert board.is_cancelled("aster", "q")
    board.clear_cancel("aster", "q")
    assert not board.is_cancelled("aster", "q")


def test_cancelling_what_waits_and_what_is_answered(root: Path) -> None:
    assert Board(root).cancel("aster", "q").state == "cancelled"
    assert job(root).state == "cancelled"
    keep(root, state="answered")
    with pytest.raises(QueryError, match="answered already"):
        Board(root).cancel("aster", "q")


def test_a_damaged_record_is_one_error(root: Path) -> None:
    keep(root)
    path = root / ".qkt" / "jobs" / "aster.q.json"
    path.write_bytes(b"\xff{")
    with pytest.raises(QueryError, match="the job's record cannot be read") as caught:
        job(root)
    assert caught.value.code == "job-damaged"


def test_only_a_job_is_cancelled(root: Path) -> None:
    """Whoever else works on the query, such as a stage of the pipeline, is not asked to stop."""
    with hold_query(root, "aster", "q"), pytest.raises(Busy):
        Board(root).cancel("aster", "q")
    assert not Board(root).is_cancelled("aster", "q")


@pytest.mark.parametrize("stage", ["plan", "transfer", "evaluate", "gate"])
def test_commands_and_stages_keep_off_a_query_that_is_worked_on(
    root: Path, stage: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    named = ["aster", "q"] if stage in ("plan", "transfer") else []  # the others are of all queries
    monkeypatch.chdir(root)
    monkeypatch.setattr(sys, "argv", ["stage", *named])
    with Board(root).hold("aster", "q"):
        for run in (
            lambda: runpy.run_module(f"pipelines.{stage}", run_name="__main__"),
            lambda: main([stage, "aster", "q"]),
        ):
            with pytest.raises(SystemExit) as ended:
                run()
            assert ended.value.code == 1
            said = capsys.readouterr().err
            assert said.startswith("error [job-running]: another process works on this query")
            assert said.count("\n") == 1
    assert not (root / "models").exists()
    assert not list(root.rglob("reports/**/*.json"))


# --- what it will take ----------------------------------------------------------------------------


def test_expected_seconds_are_counted_work_over_speed(root: Path) -> None:
    import torch

    from qkt_clinical.config.params import TransferParams
    from qkt_clinical.data.prepared import read_manifest
    from qkt_clinical.jobs import cost
    from qkt_clinical.records.card import read_card

    write_hospitals(root)
    space, cpu = Workspace(root), torch.device("cpu")
    card, manifest = read_card(space.teacher("birch")), read_manifest(space.prepared("aster"))
    assert cost.speed(card, cpu) > 1e6
    params, fast = TransferParams(flips=True, discriminant=False), 1e6

    def seconds(method: Method, teachers: int, params: TransferParams = params) -> float:
        return cost.expected_seconds(method, card, [card] * teachers, manifest, params, fast)

    # One calibration image; 3.5 times (layers + 1) / 2 passes of at least 16 views for every teacher.
    # Its operating point is set on the training images too.
    work, layers = cost._work(card.network, manifest.shape, params.rank)
    assert work > 1e5
    seen = sum(manifest.counts["train"].values())
    assert seconds("routed", 2) == pytest.approx(4 * 3 * (1 + seen) * work / 1e6)
    merging = 2 * 3.5 * 16 * (layers + 1) / 2
    assert seconds("qkt", 2) == pytest.approx((3 * (1 + seen) + merging) * work / 1e6)
    # Phase 2 sees the calibration image once more, and the training images.
    added = seconds("qkt", 2, TransferParams()) - seconds("qkt", 2)
    assert added == pytest.approx(3 * (1 + seen) * work / 1e6)
    # Nobody's network but the own one.
    assert seconds("qkt-means", 0) == pytest.approx(work / 1e6)
    fast = 2e6
    assert seconds("routed", 2) == pytest.approx(2 * 3 * (1 + seen) * work / 1e6)


def test_a_frozen_encoder_that_both_have_is_counted_once(root: Path) -> None:
    from qkt_clinical.config.params import TransferParams
    from qkt_clinical.jobs.cost import prediction_cost
    from qkt_clinical.records.card import Card, read_card

    write_hospitals(root)
    card = read_card(Workspace(root).teacher("birch"))
    encoder = {"name": "efficientnet-lite0", "side": 32, "mode": "frozen"}
    network = {**dict(card.network), "name": "encoder", "encoder": encoder}

    def over(digest: str | None) -> Card:
        said = card.model_dump(mode="json") | {"network": network}
        return Card.model_validate(said | {"training": {"encoder": digest}})

    params = TransferParams()
    one, other = over("a" * 64), over("b" * 64)
    assert prediction_cost("qkt", one, [one, one], params) == pytest.approx(1.0, abs=0.01)
    assert prediction_cost("qkt", one, [one, other], params) > 1.2
    assert prediction_cost("qkt", over(None), [over(None)], params) > 1.2, "nobody says that it is the same"


def test_an_encoder_beside_the_network_is_counted(root: Path) -> None:
    from qkt_clinical.config.params import TransferParams
    from qkt_clinical.jobs.cost import prediction_cost
    from qkt_clinical.models.networks import build, multiply_adds
    from qkt_clinical.records.card import SharedEncoder, read_card

    write_hospitals(root)
    card, params = read_card(Workspace(root).teacher("birch")), TransferParams()
    encoder = SharedEncoder(name="efficientnet-lite0", digest="a" * 64, side=32)
    part = {"name": encoder.name, "side": encoder.side, "mode": "frozen"}
    spec = type(card.network).model_validate({**dict(card.network), "name": "encoder", "encoder": part})
    work, own = (multiply_adds(build(network).eval(), card.input.shape) for network in (spec, card.network))
    beside = work / own
    by_means = prediction_cost("qkt-means", card, [], params, encoder)
    assert by_means == pytest.approx(1 + beside, rel=1e-3)
    assert prediction_cost("qkt-statistics", card, [card], params, encoder) - prediction_cost(
        "qkt", card, [card], params, encoder
    ) == pytest.approx(beside, rel=1e-3)


def test_what_a_prediction_costs_is_counted_on_the_merged_network(root: Path) -> None:
    from qkt_clinical.config.params import TransferParams
    from qkt_clinical.jobs.cost import prediction_cost
    from qkt_clinical.models.networks import build, multiply_adds
    from qkt_clinical.qkt.low_rank_merge import full_rank, merge_networks, reduce_extractor
    from qkt_clinical.records.card import read_card

    write_hospitals(root)
    card, params = read_card(Workspace(root).teacher("birch")), TransferParams()
    network, cpu = build(card.network, seed=0).eval(), torch.device("cpu")
    views = torch.rand(4, *card.input.shape)
    taken = reduce_extractor(network, params.rank, views, seed=0, device=cpu)[:2]
    rows = [(torch.zeros_like(network.head.weight), torch.zeros_like(network.head.bias))] * 2
    merged = merge_networks(network, [full_rank(network), taken], rows)
    counted = multiply_adds(merged, card.input.shape) / multiply_adds(network, card.input.shape)
    assert prediction_cost("qkt", card, [card], params) == pytest.approx(counted)
    assert 1 < prediction_cost("qkt-light", card, [card], params) < counted < 2
    assert prediction_cost("routed", card, [card, card], params) == pytest.approx(4 * 3)
    assert prediction_cost("routed", card, [card], TransferParams(flips=False)) == pytest.approx(2)


def test_every_way_to_answer_a_query_is_told_with_what_it_reveals(root: Path) -> None:
    from qkt_clinical.data.prepared import read_manifest
    from qkt_clinical.models.offers import read_offer
    from qkt_clinical.records.card import SharedEncoder, Weights, read_card

    write_hospitals(root)
    params, space = load_params(root), Workspace(root)
    own, manifest = read_card(space.teacher("aster")), read_manifest(space.prepared("aster"))
    sent = read_offer(space.teacher("birch"), "birch")
    shared = SharedEncoder(name="efficientnet-lite0", digest="0" * 64, side=32)
    file = {**shared.model_dump(), "weights": "lite0.safetensors"}
    query = load_query(root, "aster", "q")
    card = sent.card.model_copy(
        update={
            "class_means": True,
            "shared_encoder": shared,
            "training": {**sent.card.training, "means_epsilon": 8.0, "shared_epsilon": None},
        }
    )

    def told(params: Params) -> dict[str, Route]:
        offers = {"birch": replace(sent, card=card)}
        found = routes("q", query, offers, own, manifest, params, torch.device("cpu"))
        assert [r.method for r in found] == list(METHODS)
        return {r.method: r for r in found}

    without = told(params)
    for method in ("qkt", "qkt-light", "routed"):
        route = without[method]
        assert (route.impossible, route.teachers, route.bytes) == (None, ("birch",), sent.bytes_moved("qkt"))
        assert route.means == {"birch": 8.0}
        assert route.seconds > 0
    assert without["routed"].prediction > without["qkt"].prediction > without["qkt-light"].prediction > 1
    line = route_line(without["qkt"], "qkt")
    assert line.startswith("  * qkt: reveals the networks of birch, and class means of birch (epsilon 8);")
    assert route_line(without["qkt-light"], "qkt").startswith("    qkt-light")
    why = without["qkt-statistics"].impossible
    assert why is not None
    assert "shared_encoder" in why
    assert route_json(without["qkt-statistics"]) == {"method": "qkt-statistics", "impossible": why}
    assert "not possible" in route_line(without["qkt-statistics"], "qkt")
    common = Params.model_validate({**params.model_dump(), "shared_encoder": file})
    both = told(common)["qkt-statistics"]
    assert both.impossible is None
    assert both.means == {"birch": None}
    assert "class means of birch (exact)" in route_line(both, "qkt")
    assert route_json(both)["class_means"] == {"birch": None}
    alone = told(common)["qkt-means"].impossible
    assert alone is not None
    assert "shares class means by efficientnet-lite0" in alone, "those of this bundle lie among its weights"
    card = card.model_copy(update={"encoder_means": Weights(bytes=20_000, sha256="0" * 64)})
    means = told(common)["qkt-means"]
    assert (means.impossible, means.teachers, means.means) == (None, ("birch",), {"birch": None})
    assert means.bytes == sent.described + 20_000
    assert means.prediction > 1.5, "the encoder's pass beside the own network's"
    assert told(common)["qkt-statistics"].bytes == sent.bytes_moved("qkt") + 20_000
    assert told(common)["qkt"].bytes == sent.bytes_moved("qkt"), "which does not take them"
    line = route_line(means, "qkt-means")
    assert "reveals class means of birch (exact), and no network;" in line


@pytest.mark.parametrize(
    ("said", "epsilon"),
    [
        (8.0, 8.0),
        (40, 40.0),
        (None, None),
        (True, None),
        ("many", None),
        (10**400, None),
        (-1, None),
        (0, None),
    ],
)
def test_what_a_foreign_card_says_of_its_noise_is_a_number_or_nothing(
    root: Path, said: float | str | None, epsilon: float | None
) -> None:
    from qkt_clinical.records.card import read_card, told_epsilon
    from qkt_clinical.report.model_card import _class_means_privacy

    write_hospitals(root)
    card = read_card(Workspace(root).teacher("birch"))
    told = card.model_copy(update={"class_means": True, "training": {**card.training, "means_epsilon": said}})
    assert told_epsilon(told, "means_epsilon") == epsilon
    assert ("exactly" in _class_means_privacy(told)[0]) == (epsilon is None)


# --- damaged records --------------------------------------------------------------------------------

RECORD: dict[str, object] = {"format": "qkt-job/1", "hospital": "aster", "query": "q", "state": "waiting"}
DAMAGED: dict[str, object] = {
    "nothing": b"",
    "half": b'{"format": "qkt-jo',
    "not text": b"\xff\xfe{",
    "deep": b"[" * 100_000,
    "a list": b"[]",
    "a number": b"7",
    "too large": b" " * 5_000_000,
    "a way out": RECORD | {"hospital": "../../victim"},
    "a query that leads out": RECORD | {"query": "../../victim"},
    "another job's": RECORD | {"query": "other"},
    "an unknown state": RECORD | {"state": "lost"},
    "an unknown step": RECORD | {"step": "\x1b[2J"},
    "a negative number": RECORD | {"interruptions": -1},
    "a digest that is none": RECORD | {"asked": "x"},
    "an unknown key": RECORD | {"more": 1},
    "an error that is none": RECORD | {"error": "text"},
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_record_fails_its_query_and_no_command(
    root: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from qkt_clinical.cli import main

    new_query(root, "birch", "fine", ["c"], PARAMS)
    said = DAMAGED[kind]
    path = root / ".qkt" / "jobs" / "aster.q.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(said if isinstance(said, bytes) else to_json(said).encode())
    states = {j.name: (j.state, j.error and j.error.code) for j in Board(root).jobs()}
    assert states == {"aster/q": ("failed", "job-damaged"), "birch/fine": ("waiting", None)}
    for words in (["list"], ["list", "--json"], ["status"], ["status", "--json"], ["show", "birch", "fine"]):
        with pytest.raises(SystemExit) as ended:
            main(["query", *words, "--root", str(root)])
        assert not ended.value.code, words
    for words in (["status", "aster", "q"], ["show", "aster", "q"], ["cancel", "aster", "q"]):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["query", *words, "--root", str(root)])
        assert ended.value.code == 1
        error = capsys.readouterr().err
        assert error.startswith("error [job-damaged]: "), error
        assert error.count("\n") == 1
    assert not list(root.parent.glob("victim*"))


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir, lambda p: p.symlink_to("/dev/zero")])
def test_a_record_that_is_no_file_holds_nobody_up(root: Path, make: Callable[[Path], None]) -> None:
    path = root / ".qkt" / "jobs" / "aster.q.json"
    path.parent.mkdir(parents=True)
    make(path)
    (found,) = Board(root).jobs()
    assert (found.state, found.error and found.error.code) == ("failed", "job-damaged")


def test_what_a_record_says_is_shown_without_control_characters(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from qkt_clinical.cli import main

    keep(root, state="answered", note="a\x1b[2J\nb", version="\x1b]0;x\x07")
    with pytest.raises(SystemExit):
        main(["query", "status", "--root", str(root)])
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "a\\x1b[2J\\nb" in shown


def test_folders_whose_names_are_none_are_no_hospitals(root: Path) -> None:
    ask(root, "Not A Name", "q", classes=["c"])
    ask(root, "..x", "q", classes=["c"])
    assert [j.name for j in Board(root).jobs()] == ["aster/q"]


@pytest.mark.parametrize("verb", ["run", "resume", "status", "show", "plan", "cancel"])
@pytest.mark.parametrize("names", [("../..", "q"), ("aster", "../../x"), ("aster\x1b[2J", "q")])
def test_names_that_are_none_are_one_line(
    root: Path, capsys: pytest.CaptureFixture[str], verb: str, names: tuple[str, str]
) -> None:
    from qkt_clinical.cli import main

    with pytest.raises(SystemExit) as ended:
        main(["query", verb, *names, "--root", str(root)])
    assert ended.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("error [config]: ")
    assert (error.count("\n"), error.count("\x1b")) == (1, 0)


@pytest.mark.parametrize("damage", [b"", b"[]", b"{}", b'{"teachers": 1}', b"[" * 100_000, b"\xff"])
@pytest.mark.parametrize("name", ["plan.json", "phases.json"])
def test_showing_a_damaged_answer_is_one_line(
    root: Path, capsys: pytest.CaptureFixture[str], name: str, damage: bytes
) -> None:
    from qkt_clinical.cli import main

    student = Workspace(root).student("aster", "q")
    student.mkdir(parents=True)
    (student / name).write_bytes(damage)
    with pytest.raises(SystemExit) as ended:
        main(["query", "show", "aster", "q", "--root", str(root)])
    assert ended.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("error [outputs]: ")
    assert error.count("\n") == 1
