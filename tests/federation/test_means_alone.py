"""A site that keeps its network and shares class means by a shared encoder: the whole way of a query."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from qkt_clinical.config.loading import load_params, load_policy
from qkt_clinical.config.policy import OPEN_POLICY, POLICY
from qkt_clinical.config.workspace import Workspace
from qkt_clinical.errors import BundleError, PolicyError, QueryError
from qkt_clinical.federation.messages import (
    ANSWER,
    ASK,
    CONTRIBUTE,
    OFFER,
    Answered,
    Asked,
    Contributed,
    Offered,
    TeacherRequest,
    read_reply,
)
from qkt_clinical.federation.parcel import pack
from qkt_clinical.federation.policy import check_outbound
from qkt_clinical.federation.server import Server
from qkt_clinical.federation.site import Site
from qkt_clinical.models.bundle import load_bundle, load_shared_means, write_without_network
from qkt_clinical.qkt.planning import NO_NETWORK
from qkt_clinical.records.card import CARD, MASK, MEANS, WEIGHTS, Card, read_card
from qkt_clinical.records.plan import Plan
from qkt_clinical.tracking.mirror import track
from tests.shapes import CLASSES
from tests.stages.test_encoding import ASKED, QUERY, ask, params, prepare

pytestmark = pytest.mark.slow

HELD = {"aster": (0, 1, 2), "birch": (0, 1, 3)}


def set_policy(root: Path, site: str, **share: bool) -> None:
    (root / "hospitals" / site).mkdir(parents=True, exist_ok=True)
    said = yaml.safe_load(OPEN_POLICY)
    (root / "hospitals" / site / POLICY).write_text(yaml.safe_dump(said | {"share": said["share"] | share}))


def set_params(root: Path, weights: Path | None) -> None:
    root.mkdir(parents=True, exist_ok=True)
    (root / "params.yaml").write_text(yaml.safe_dump(params(weights).model_dump(mode="json")))


@pytest.fixture(scope="module")
def root(lite_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Aster's, birch's and the server's workspaces; both sites have contributed."""
    root = tmp_path_factory.mktemp("federation")
    for name, held in HELD.items():
        set_params(root / name, lite_weights)
        prepare(root / name, name, held)
        set_policy(root / name, name, teacher=name == "aster", statistics=True)
    set_params(root / "server", lite_weights)
    server = Server(root / "server")
    for name in HELD:
        said = read_reply(Site(root / name, name).reply(CONTRIBUTE, {}), CONTRIBUTE, name)
        assert isinstance(said, Contributed), said
        assert server.accept_teacher(name, said).state == "answered"
    return root


def planned(root: Path, method: str) -> tuple[Plan, dict[str, Offered]]:
    """The plan of aster's query, and what birch shows."""
    ask(root / "aster", method)  # type: ignore[arg-type]
    asked = read_reply(Site(root / "aster", "aster").reply(ASK, {"query": QUERY}), ASK, "aster")
    assert isinstance(asked, Asked), asked
    question = TeacherRequest(
        hospital="aster", query=QUERY, classes=(CLASSES[ASKED],), held=asked.asking.held
    )
    said = read_reply(
        Site(root / "birch", "birch").reply(OFFER, {"question": question.model_dump(mode="json")}),
        OFFER,
        "birch",
    )
    assert isinstance(said, Offered), said
    server = Server(root / "server")
    plan = server.plan("aster", QUERY, asked, {"birch": server.offer("birch", said)})
    return plan, {"birch": said}


def test_the_network_stays_and_the_query_is_answered(root: Path) -> None:
    kept = root / "server" / "models" / "teachers"
    assert sorted(f.name for f in (kept / "birch").iterdir()) == sorted([CARD, MASK, MEANS])
    assert sorted(f.name for f in (kept / "aster").iterdir()) == sorted([CARD, MASK, MEANS, WEIGHTS])
    card = read_card(kept / "birch")
    assert card.network_kept
    assert not card.class_means
    assert "means_epsilon" not in card.training
    assert "network_kept" not in (kept / "aster" / CARD).read_text(), "older cards keep their bytes"

    plan, shown = planned(root, "qkt-means")
    assert plan.relevant == ("birch",)
    sent = Server(root / "server").bundles(plan, shown)["birch"]
    assert sorted(sent) == sorted([CARD, MASK, MEANS])
    assert plan.bytes_moved == sum(map(len, sent.values()))
    data = {"plan": plan.model_dump(mode="json"), "teachers": {"birch": sent}}
    said = read_reply(Site(root / "aster", "aster").reply(ANSWER, data), ANSWER, "aster")
    assert isinstance(said, Answered), said
    student = load_bundle(Workspace(root / "aster").student("aster", QUERY))
    assert [b.name for b in student.card.network.branches] == ["resnet-small", "encoder"]


@pytest.mark.parametrize("method", ["qkt", "qkt-statistics"])
def test_a_method_that_takes_networks_says_what_to_do(root: Path, method: str) -> None:
    with pytest.raises(QueryError) as caught:
        planned(root, method)
    assert caught.value.code == "uncovered"
    assert "method: qkt-means" in caught.value.remedy


def test_a_teacher_without_network_is_named_in_the_plan_of_the_others(root: Path) -> None:
    from qkt_clinical.qkt.planning import assess_offer

    server, site = Server(root / "server"), Site(root / "aster", "aster")
    _, shown = planned(root, "qkt-means")
    asked = read_reply(site.reply(ASK, {"query": QUERY}), ASK, "aster")
    assert isinstance(asked, Asked)
    query = asked.query.model_copy(update={"method": "qkt"})
    found = assess_offer(server.offer("birch", shown["birch"]), asked.asking, query)
    assert (found.relevant, found.reason, found.teaches) == (False, NO_NETWORK, (CLASSES[ASKED],))


def test_whoever_wants_the_network_gets_one_line(root: Path) -> None:
    with pytest.raises(BundleError) as caught:
        load_bundle(root / "server" / "models" / "teachers" / "birch")
    assert caught.value.code == "bundle-missing"
    assert "qkt-means" in caught.value.remedy


def test_the_network_may_not_leave_by_another_way(root: Path) -> None:
    policy = load_policy(root / "birch", "birch")
    whole = pack(Workspace(root / "birch").teacher("birch"))
    for task, files in ((CONTRIBUTE, whole), (OFFER, {n: whole[n] for n in (CARD, MASK)})):
        said = {"kind": "contributed" if task == CONTRIBUTE else "offered", "files": files}
        with pytest.raises(PolicyError, match="the teacher may not leave"):
            check_outbound(policy, task, said, "birch")
    # A card that says that the network stays, and the network with it.
    means = Site(root / "birch", "birch").reply(CONTRIBUTE, {})["files"]
    both = {"kind": "contributed", "files": means | {WEIGHTS: whole[WEIGHTS]}}
    with pytest.raises(PolicyError, match="nothing was sent"):
        check_outbound(policy, CONTRIBUTE, both, "birch")


def test_without_an_encoder_there_is_nothing_to_share(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "birch", tmp_path / "birch")
    set_params(tmp_path / "birch", None)
    said = Site(tmp_path / "birch", "birch").reply(CONTRIBUTE, {})
    assert (said["kind"], said["code"]) == ("refused", "policy")
    assert "shared_encoder" in said["remedy"]
    with pytest.raises(BundleError, match="no class means apart"):
        write_without_network(Workspace(tmp_path / "birch").teacher("birch"), tmp_path)


def test_the_server_registers_what_it_keeps(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "server", tmp_path / "server")
    found = track(tmp_path / "server", load_params(tmp_path / "server"))
    assert set(found["models"]) == {f"teacher.{site}" for site in HELD}


@pytest.mark.parametrize(
    "wrong",
    [{"class_means": True}, {"encoder_means": None}, {"encoder_means": None, "shared_encoder": None}],
)
def test_a_card_without_network_has_means_of_an_encoder_and_no_others(
    root: Path, wrong: dict[str, Any]
) -> None:
    folder = root / "server" / "models" / "teachers" / "birch"
    said = load_shared_means(folder).card.model_dump(mode="json")
    Card.model_validate(said)
    with pytest.raises(ValueError, match=r"without the network|not named"):
        Card.model_validate(said | wrong)
