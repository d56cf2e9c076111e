"""Sites and server of a federation, as they are without FLARE: what is said, kept, refused and recorded."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.numpy import load, save

from qkt_clinical.common.files import digest_bytes, digest_folder, to_json
from qkt_clinical.config.loading import load_params, load_policy, parse
from qkt_clinical.config.policy import OPEN_POLICY, POLICY, Policy
from qkt_clinical.config.workspace import Workspace
from qkt_clinical.data.prepared import write_prepared
from qkt_clinical.errors import BundleError, ConfigError, OutputsError, PolicyError, QktError, QueryError
from qkt_clinical.federation import audit
from qkt_clinical.federation.audit import FIRST, RECORD, count_since, read_record, record
from qkt_clinical.federation.messages import (
    ANSWER,
    ASK,
    CONTRIBUTE,
    OFFER,
    Answered,
    Asked,
    Contributed,
    Declined,
    Offered,
    Refused,
    TeacherRequest,
    read_reply,
)
from qkt_clinical.federation.parcel import pack, unpack_teacher
from qkt_clinical.federation.policy import check_outbound, refusal, shown_mask
from qkt_clinical.federation.server import FederationOutcome, Server
from qkt_clinical.federation.site import Site, reported
from qkt_clinical.models.bundle import load_bundle
from qkt_clinical.records.card import CARD, MASK, WEIGHTS, Mask
from qkt_clinical.records.published import published
from qkt_clinical.stages.mask import mask_site
from qkt_clinical.stages.plan import plan_query
from qkt_clinical.stages.train import train_site
from qkt_clinical.stages.transfer import transfer_query
from tests.records.test_published import measured

pytestmark = pytest.mark.slow

CLASSES = ("a", "b", "c")
HELD = {"aster": (0, 1), "birch": (1, 2), "cedar": (0, 2)}
SHAPE = (3, 16, 16)
OPEN = parse(Policy, yaml.safe_load(OPEN_POLICY), file="policy.yaml")
PARAMS = {
    "classes": list(CLASSES),
    "sites": list(HELD),
    "queries": {"aster-c": {"hospital": "aster", "query": "c"}},
    "train": {"epochs": 3, "batch_size": 8},
    "transfer": {"images": 16},
    "mask": {"probes": 16},
    "evaluate": {"bootstrap": 5},
}


def write_hospital(root: Path, site: str, *, params: dict[str, Any] = PARAMS) -> None:
    """A workspace with one hospital's prepared images, its policy and, of aster, its query."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    folder = root / "hospitals" / site
    (folder / "queries").mkdir(parents=True)
    (folder / POLICY).write_text(OPEN_POLICY)
    if site == "aster":
        (folder / "queries" / "c.yaml").write_text("classes: [c]\nmethod: qkt\nbudget: 0.2\n")
    random = np.random.default_rng(list(HELD).index(site))
    labels = np.array(HELD[site], dtype=np.int64)[np.arange(48) % 2]
    images = random.integers(0, 90, (48, *SHAPE), dtype=np.uint8)
    for c in range(3):
        images[labels == c, c] += 120  # a class is a colour
    order = np.arange(48)
    write_prepared(
        Workspace(root).prepared(site),
        site=site,
        source_kind="images",
        classes=CLASSES,
        images=images,
        labels=labels,
        groups=np.array([f"{site}{i}" for i in order]),
        splits={
            "train": order[:24],
            "calibration": order[24:34],
            "val": order[34:40],
            "test": order[40:],
        },
        spacing_mm=None,
        normalisation="unit",
        transforms=(),
        outcomes=[],
    )


ROWS = [[29, 6, 0, 5], [5, 40, 0, 6], [0, 0, 37, 0], [7, 5, 0, 29]]


def policy(root: Path, site: str, **changes: Any) -> None:
    """Change a site's policy."""
    path = root / "hospitals" / site / POLICY
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes))


class Federation:
    """Three sites and a server, each in a workspace of its own; messages are handed over by hand."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for site in HELD:
            write_hospital(folder / site, site)
        self.sites = {site: Site(folder / site, site) for site in HELD}
        self.server = Server(folder / "server")
        (folder / "server").mkdir()
        (folder / "server" / "params.yaml").write_text(yaml.safe_dump(PARAMS))

    def contribute(self) -> None:
        """Every site's teacher to the server."""
        for name, site in self.sites.items():
            said = read_reply(site.reply(CONTRIBUTE, {}), CONTRIBUTE, name)
            assert isinstance(said, Contributed | Refused)
            self.server.accept_teacher(name, said)

    def ask(self) -> tuple[dict[str, Offered | Declined | Refused], Asked]:
        """Aster's query to the server, and what the others say to it."""
        asked = read_reply(self.sites["aster"].reply(ASK, {"query": "c"}), ASK, "aster")
        assert isinstance(asked, Asked), asked
        question = TeacherRequest(hospital="aster", query="c", classes=("c",), held=asked.asking.held)
        data = {"question": question.model_dump(mode="json"), "hospital": "aster", "query": "c"}
        replies = {}
        for name in ("birch", "cedar"):
            said = read_reply(self.sites[name].reply(OFFER, data), OFFER, name)
            assert isinstance(said, Offered | Declined | Refused)
            replies[name] = said
        return replies, asked

    def answer(self) -> Answered | Refused:
        """The whole way of aster's query."""
        replies, asked = self.ask()
        shown = {n: r for n, r in replies.items() if isinstance(r, Offered)}
        offers = {n: self.server.offer(n, r) for n, r in shown.items()}
        plan = self.server.plan("aster", "c", asked, offers)
        data = {"plan": plan.model_dump(mode="json"), "teachers": self.server.bundles(plan, shown)}
        said = read_reply(self.sites["aster"].reply(ANSWER, data), ANSWER, "aster")
        assert isinstance(said, Answered | Refused)
        if isinstance(said, Answered):
            self.server.accept_answer(plan, said, {})
        return said


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    """Teachers contributed and aster's query answered once."""
    made = Federation(tmp_path_factory.mktemp("federation"))
    made.contribute()
    said = made.answer()
    assert isinstance(said, Answered), said
    return made


def test_figures_that_a_site_reports_are_those_that_it_publishes() -> None:
    """Six digits would tell the number of images that they rest on."""
    evaluation = measured([[34, 6, 0, 0], [5, 46, 0, 0], [0, 0, 37, 0], [20, 13, 8, 0]], ROWS)
    told, figures = published(evaluation), reported(evaluation)
    assert figures is not None
    assert figures.gain == told.gain
    assert figures.balanced_accuracy_after == told.after.balanced_accuracy
    for figure in (figures.balanced_accuracy_before, figures.forgetting, figures.query_gain):
        assert all(round(n, 2) == n for n in (figure.value, figure.low, figure.high))


def test_of_few_images_a_site_reports_no_figures() -> None:
    few = measured([[3, 1, 0, 0], *ROWS[1:]], [[2, 1, 0, 1], *ROWS[1:]])
    assert reported(few) is None


# --- the whole way --------------------------------------------------------------------------------------


def test_the_answer_is_that_of_the_stages_to_the_byte(federation: Federation, tmp_path: Path) -> None:
    """The pipeline's stages in one workspace, against sites that only send messages."""
    for site in HELD:
        write_hospital(tmp_path, site)
    params = load_params(tmp_path)
    for site in HELD:
        train_site(tmp_path, site, params)
        mask_site(tmp_path, site, params)
        assert digest_folder(Workspace(tmp_path).teacher(site)) == digest_folder(
            federation.sites[site].space.teacher(site)
        )
    plan_query(tmp_path, "aster", "c", params)
    transfer_query(tmp_path, "aster", "c", params)
    assert digest_folder(Workspace(tmp_path).student("aster", "c")) == digest_folder(
        federation.sites["aster"].space.student("aster", "c")
    )


def test_no_site_holds_more_than_is_its_own(federation: Federation) -> None:
    held = {
        p.name for p in federation.sites["aster"].space.fetched("aster", "c").joinpath("teachers").iterdir()
    }
    assert held == {"birch", "cedar"}
    assert not federation.server.space.prepared("aster").exists()
    assert not federation.server.space.student("aster", "c").exists(), "the policy keeps students at home"
    outcome = federation.server.outcome("queries", "aster", "c")
    assert (outcome.state, outcome.teachers, outcome.student_kept) == ("answered", ("birch", "cedar"), False)
    assert outcome.bytes_moved == sum(
        len(content) for s in held for content in pack(federation.server.space.teacher(s)).values()
    )


def test_asked_again_a_site_says_the_same_and_trains_nothing(
    federation: Federation, monkeypatch: pytest.MonkeyPatch
) -> None:
    import qkt_clinical.stages.train
    import qkt_clinical.stages.transfer

    first = federation.sites["birch"].reply(CONTRIBUTE, {})
    for module in (qkt_clinical.stages.train, qkt_clinical.stages.transfer):
        monkeypatch.setattr(module, "train_site", None, raising=False)
        monkeypatch.setattr(module, "transfer_query", None, raising=False)
    assert federation.sites["birch"].reply(CONTRIBUTE, {}) == first
    before = federation.server.outcome("queries", "aster", "c")
    federation.answer()
    assert federation.server.outcome("queries", "aster", "c") == before


def test_a_teacher_sent_twice_is_kept_once(federation: Federation) -> None:
    files = pack(federation.sites["birch"].space.teacher("birch"))
    place = federation.server.space.teacher("birch")
    before = digest_folder(place)
    for _ in range(2):
        assert federation.server.accept_teacher("birch", Contributed(files=files)).state == "answered"
    assert digest_folder(place) == before
    assert sorted(p.name for p in place.parent.iterdir()) == sorted(HELD)


def test_a_server_that_was_restarted_knows_what_became_of_what(federation: Federation) -> None:
    again = Server(federation.server.root)
    assert again.outcome("queries", "aster", "c") == federation.server.outcome("queries", "aster", "c")
    assert set(again.outcomes()) == {"aster/c", "teacher aster", "teacher birch", "teacher cedar"}


# --- what leaves ----------------------------------------------------------------------------------------


def test_no_count_leaves_a_site(federation: Federation) -> None:
    """Of what aster sends, no JSON holds a number of images or patients, and no path or id of one."""
    site = federation.sites["aster"]
    said = [site.reply(CONTRIBUTE, {}), site.reply(ASK, {"query": "c"})]
    text = "".join(
        content.decode() for one in said for n, content in one.get("files", {}).items() if n != WEIGHTS
    ) + to_json(said[1]["asking"])
    for word in ("count", "images", "patients", "aster0", str(federation.folder), "groups", "digests"):
        assert word not in text.replace('"shape"', "")


@pytest.fixture
def copy(federation: Federation, tmp_path: Path) -> Site:
    """Birch in a workspace that a test may change."""
    target = tmp_path / "birch"
    shutil.copytree(federation.folder / "birch", target)
    return Site(target, "birch")


QUESTION = {"question": {"hospital": "aster", "query": "c", "classes": ["c"], "held": ["a", "b"]}}


@pytest.mark.parametrize("text", [None, "share: [", "share: {teacher: yes please}", "sahre: {}", "42"])
@pytest.mark.parametrize("task", [CONTRIBUTE, OFFER, ASK])
def test_without_a_valid_policy_nothing_is_sent(copy: Site, text: str | None, task: str) -> None:
    path = copy.root / "hospitals" / "birch" / POLICY
    path.unlink() if text is None else path.write_text(text)
    said = copy.reply(task, QUESTION | {"query": "c"})
    assert (said["kind"], said["code"]) == ("refused", "policy")
    assert not {"files", "asking"} & set(said)
    assert [e.event for e in read_record(copy.audit)][-1] == "withheld"


def test_an_empty_policy_refuses_everything(copy: Site) -> None:
    (copy.root / "hospitals" / "birch" / POLICY).write_text("{}\n")
    assert copy.reply(CONTRIBUTE, {})["kind"] == "refused"
    assert copy.reply(OFFER, QUESTION)["kind"] == "declined"


@pytest.mark.parametrize(
    ("changes", "helped", "reason"),
    [
        ({}, 0, None),
        ({"share": {"teacher": False}}, 0, "shares no teacher"),
        ({"share": {"teacher": False, "statistics": True}}, 0, None),
        ({"refuse_requesters": ["aster"]}, 0, "does not answer aster"),
        ({"refuse_requesters": ["elm"]}, 0, None),
        ({"refuse_classes": ["c"]}, 0, "answers nobody about c"),
        ({"refuse_classes": ["a"]}, 0, None),
        ({"queries_per_day": 3}, 2, None),
        ({"queries_per_day": 3}, 3, "helps with 3 queries a day at most"),
    ],
)
def test_whose_queries_are_answered(changes: dict[str, Any], helped: int, reason: str | None) -> None:
    question = TeacherRequest(hospital="aster", query="c", classes=("c",), held=("a",))
    chosen = Policy.model_validate(OPEN.model_dump() | changes)
    assert refusal(chosen, question, helped) == reason


def test_the_rate_counts_what_the_record_says(copy: Site) -> None:
    policy(copy.root, "birch", queries_per_day=2)
    copy.audit.unlink()
    kinds = [copy.reply(OFFER, QUESTION)["kind"] for _ in range(4)]
    assert kinds == ["offered", "offered", "declined", "declined"]
    entries = list(read_record(copy.audit))
    copy.audit.unlink()
    for entry in entries:  # the same, a day and a second ago
        record(copy.audit, entry.event, entry.about, clock=lambda t=entry.time: t - 86401)  # type: ignore[misc]
    assert copy.reply(OFFER, QUESTION)["kind"] == "offered"


def test_a_mask_may_be_hidden_for_what_is_not_asked(copy: Site) -> None:
    whole = Mask.model_validate_json((copy.space.teacher("birch") / MASK).read_bytes())
    question = TeacherRequest(hospital="aster", query="c", classes=("c",), held=("a",))
    assert shown_mask(whole, OPEN, question) == whole
    shown = shown_mask(whole, OPEN.model_copy(update={"mask": "query"}), question)
    assert shown.scores == (whole.scores[0], 0.0, whole.scores[2])
    assert shown.known == (whole.known[0], False, whole.known[2])
    policy(copy.root, "birch", mask="query")
    sent = Mask.model_validate_json(copy.reply(OFFER, QUESTION | {"hospital": "aster"})["files"][MASK])
    assert sent.known[1] == whole.known[1], "aster has b"


Spoil = Callable[[dict[str, Any]], dict[str, Any]]


@pytest.mark.parametrize(
    ("task", "spoil"),
    [
        (CONTRIBUTE, lambda said: said | {"counts": {"a": 12}}),
        (CONTRIBUTE, lambda said: said | {"files": said["files"] | {"metrics.json": b"{}"}}),
        (CONTRIBUTE, lambda said: said | {"files": {CARD: said["files"][CARD]}}),
        (
            CONTRIBUTE,
            lambda said: (
                said
                | {
                    "files": said["files"]
                    | {CARD: said["files"][CARD].replace(b'"training": {', b'"counts": {')}
                }
            ),
        ),
        (CONTRIBUTE, lambda said: said | {"files": said["files"] | {WEIGHTS: said["files"][WEIGHTS] + b"x"}}),
        (OFFER, lambda said: said | {"kind": "contributed"}),
        (ASK, lambda said: said | {"asking": said["asking"] | {"counts": {"train": 3}}}),
        (ASK, lambda said: "rows of patients"),
        (CONTRIBUTE, lambda said: None),
    ],
)
def test_what_is_not_on_the_list_may_not_leave(copy: Site, task: str, spoil: Spoil) -> None:
    (copy.root / "hospitals" / "birch" / "queries" / "c.yaml").write_text("classes: [a]\n")
    said = copy.reply(task, QUESTION | {"query": "c"})
    check_outbound(OPEN, task, said, "birch")
    with pytest.raises(PolicyError, match="nothing was sent"):
        check_outbound(OPEN, task, spoil(said), "birch")


def test_class_means_leave_only_where_the_policy_says_so(copy: Site, tmp_path: Path) -> None:
    allowed = copy.reply(CONTRIBUTE, {})
    policy(copy.root, "birch", share={"teacher": True})
    kept = copy.reply(CONTRIBUTE, {})
    bundles = {}
    for name, said in (("allowed", allowed), ("kept", kept)):
        (folder := tmp_path / name / "birch").mkdir(parents=True)
        unpack_teacher(said["files"], "birch", folder)
        bundles[name] = load_bundle(folder)
    assert sorted(bundles["allowed"].class_means), "there are some"
    card = bundles["kept"].card
    assert not card.class_means
    assert not bundles["kept"].class_means
    assert "means_epsilon" in bundles["allowed"].card.training
    assert "means_epsilon" not in card.training, "there is no noise on what is not there"
    state, same = (bundles[name].network.state_dict() for name in ("allowed", "kept"))
    assert all(torch.equal(state[k], same[k]) for k in state)
    assert copy.reply(CONTRIBUTE, {}) == kept, "asked twice it says the same"
    assert copy.reply(OFFER, QUESTION)["files"][CARD] == kept["files"][CARD]
    # Whatever made it: what the policy keeps does not leave.
    with pytest.raises(PolicyError, match="class means may not leave"):
        check_outbound(load_policy(copy.root, "birch"), CONTRIBUTE, allowed, "birch")
    offered = {"kind": "offered", "files": {n: allowed["files"][n] for n in (CARD, MASK)}}
    with pytest.raises(PolicyError, match="class means may not leave"):
        check_outbound(load_policy(copy.root, "birch"), OFFER, offered, "birch")


def test_a_student_leaves_only_where_the_policy_says_so(federation: Federation) -> None:
    from qkt_clinical.federation.parcel import pack_student

    folder = federation.sites["aster"].space.student("aster", "c")
    said = Answered(digest="0" * 64, figures=None, student=pack_student(folder)).model_dump()
    assert not {"phases.json", "reference.json"} & set(said["student"])
    with pytest.raises(PolicyError, match="the student may not leave"):
        check_outbound(OPEN, ANSWER, said, "aster")
    generous = OPEN.model_copy(update={"share": OPEN.share.model_copy(update={"student": True})})
    check_outbound(generous, ANSWER, said, "aster")
    said["student"] |= {"phases.json": b"{}"}
    with pytest.raises(PolicyError, match="nothing was sent"):
        check_outbound(generous, ANSWER, said, "aster")


# --- the record -----------------------------------------------------------------------------------------


def test_every_decision_is_in_the_record(federation: Federation) -> None:
    events = [(e.event, e.about.get("task")) for e in read_record(federation.folder / "birch" / RECORD)]
    assert events[0] == ("contributed", CONTRIBUTE)
    assert ("offered", OFFER) in events
    assert ("answered", ANSWER) in [
        (e.event, e.about.get("task")) for e in read_record(federation.folder / "aster" / RECORD)
    ]


def test_the_record_is_a_chain(tmp_path: Path) -> None:
    path = tmp_path / "record" / "audit.jsonl"
    for i in range(4):
        record(path, "declined", {"query": str(i)}, clock=lambda i=i: 100.0 + i)  # type: ignore[misc]
    entries = list(read_record(path))
    assert [e.number for e in entries] == [1, 2, 3, 4]
    assert entries[0].previous == FIRST
    lines = path.read_text().splitlines()
    assert all(b.previous == digest_bytes(a.encode()) for a, b in zip(lines, entries[1:], strict=False))
    assert count_since(path, "declined", 102.0) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: [lines[0].replace("contributed", "offered"), *lines[1:]],
        lambda lines: [lines[0], *lines[2:]],
        lambda lines: [lines[1], lines[0], *lines[2:]],
        lambda lines: [*lines, lines[-1]],
        lambda lines: [*lines[:-1], lines[-1][:20]],
        lambda lines: [*lines, "{}"],
    ],
)
def test_a_changed_record_is_seen_and_stops_everything(
    copy: Site, change: Callable[[list[str]], list[str]]
) -> None:
    for i in range(3):
        record(copy.audit, "declined", {"query": str(i + 1)})
    copy.audit.write_text("".join(f"{line}\n" for line in change(copy.audit.read_text().splitlines())))
    with pytest.raises(OutputsError) as caught:
        list(read_record(copy.audit))
    assert caught.value.code == "audit-broken"
    assert copy.reply(OFFER, QUESTION)["kind"] == "refused", "what cannot be recorded is not done"


# --- foreign replies and bundles ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "said",
    [
        None,
        [],
        {},
        {"kind": "contributed"},
        {"kind": "answered", "files": {}},
        {"kind": "contributed", "files": {CARD: "text"}},
        {"kind": "contributed", "files": {}, "more": 1},
        {"kind": "refused", "code": "x", "message": "y" * 3000, "remedy": ""},
    ],
)
def test_a_reply_that_is_none_is_a_typed_error(said: Any) -> None:
    with pytest.raises(QueryError) as caught:
        read_reply(said, CONTRIBUTE, "birch")
    assert (caught.value.code, caught.value.where.site) == ("reply", "birch")


def header(content: bytes) -> dict[str, Any]:
    """The header of a safetensors file."""
    (length,) = struct.unpack("<Q", content[:8])
    return dict(json.loads(content[8 : 8 + length]))


def with_header(content: bytes, change: Callable[[dict[str, Any]], Any]) -> bytes:
    """The same data under a changed header."""
    (length,) = struct.unpack("<Q", content[:8])
    said = header(content)
    text = json.dumps(change(said) or said).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def with_tensor(content: bytes, value: float, part: str = "weight") -> bytes:
    """The same weights with one number changed."""
    tensors = {k: v.copy() for k, v in load(content).items()}
    name = next(k for k in tensors if k.endswith(part))
    tensors[name].reshape(-1)[0] = value
    return save(tensors)


def sealed(files: dict[str, bytes], weights: bytes) -> dict[str, bytes]:
    """Files whose card has digest and size of other weights: whoever lies can seal, too."""
    card = json.loads(files[CARD])
    card["weights"] = {"bytes": len(weights), "sha256": digest_bytes(weights)}
    return files | {CARD: to_json(card).encode(), WEIGHTS: weights}


def card_with(files: dict[str, bytes], **changes: Any) -> dict[str, bytes]:
    """Files with a changed card."""
    return files | {CARD: to_json(json.loads(files[CARD]) | changes).encode()}


def mask_with(files: dict[str, bytes], **changes: Any) -> dict[str, bytes]:
    """Files with a changed mask."""
    return files | {MASK: to_json(json.loads(files[MASK]) | changes).encode()}


def first(said: dict[str, Any]) -> str:
    """Name of a tensor in a header."""
    return next(k for k in said if k != "__metadata__")


PICKLE = b"\x80\x04cos\nsystem\n(S'touch owned'\ntR."
FORGED: dict[str, Callable[[dict[str, bytes]], Any]] = {
    "no files": lambda f: None,
    "files as a list": lambda f: list(f.values()),
    "text in place of bytes": lambda f: f | {CARD: "text"},
    "a file too few": lambda f: {CARD: f[CARD], WEIGHTS: f[WEIGHTS]},
    "a file too many": lambda f: f | {"run.py": b"print()"},
    "a name with a way out": lambda f: {"../bundle.json": f[CARD], WEIGHTS: f[WEIGHTS], MASK: f[MASK]},
    "a card of five megabytes": lambda f: f | {CARD: b" " * 5_000_000},
    "a mask of five megabytes": lambda f: f | {MASK: b" " * 5_000_000},
    "a card that is a pickle": lambda f: f | {CARD: PICKLE},
    "weights that are a pickle": lambda f: sealed(f, PICKLE),
    "weights that are a pickle of the right size": lambda f: sealed(f, PICKLE.ljust(len(f[WEIGHTS]), b".")),
    "a card deeper than the stack": lambda f: f | {CARD: b"[" * 100_000},
    "a card with NaN": lambda f: f | {CARD: f[CARD].replace(b'"seed": 0', b'"seed": NaN')},
    "a card of another site": lambda f: card_with(f, site="elm"),
    "a student's card": lambda f: card_with(f, kind="student"),
    "an unknown key on the card": lambda f: card_with(f, loader="os.system"),
    "an unknown network": lambda f: card_with(f, network=json.loads(f[CARD])["network"] | {"name": "eval"}),
    "a network of a million classes": lambda f: card_with(
        f, network=json.loads(f[CARD])["network"] | {"classes": 1_000_000}
    ),
    "another number of classes": lambda f: card_with(
        f, classes=["a", "b"], network=json.loads(f[CARD])["network"] | {"classes": 2}
    ),
    "another input": lambda f: card_with(f, input=json.loads(f[CARD])["input"] | {"shape": [1, 16, 16]}),
    "weights of a size that the card denies": lambda f: f | {WEIGHTS: f[WEIGHTS] + b"\0"},
    "a flipped byte": lambda f: f | {WEIGHTS: f[WEIGHTS][:-1] + bytes([f[WEIGHTS][-1] ^ 1])},
    "weights cut off": lambda f: sealed(f, f[WEIGHTS][:-1000]),
    "a header of 2^60 bytes": lambda f: sealed(f, struct.pack("<Q", 2**60) + f[WEIGHTS][8:]),
    "a header that is no JSON": lambda f: sealed(f, f[WEIGHTS][:8] + b"\xff" * 100 + f[WEIGHTS][108:]),
    "a header that is a list": lambda f: sealed(f, with_header(f[WEIGHTS], lambda h: [1])),
    "a tensor of terabytes": lambda f: sealed(
        f, with_header(f[WEIGHTS], lambda h: h[first(h)].update(shape=[2**40]))
    ),
    "a tensor of another type": lambda f: sealed(
        f, with_header(f[WEIGHTS], lambda h: h[first(h)].update(dtype="F64"))
    ),
    "a tensor without a name": lambda f: sealed(
        f, with_header(f[WEIGHTS], lambda h: h.update({"": h.pop(first(h))}))
    ),
    "a tensor too many": lambda f: sealed(f, save(load(f[WEIGHTS]) | {"more": np.zeros(1, np.float32)})),
    "a tensor too few": lambda f: sealed(f, save(dict(list(load(f[WEIGHTS]).items())[1:]))),
    "offsets beyond the file": lambda f: sealed(
        f, with_header(f[WEIGHTS], lambda h: h[first(h)].update(data_offsets=[0, 2**40]))
    ),
    "a weight that is NaN": lambda f: sealed(f, with_tensor(f[WEIGHTS], np.nan)),
    "a weight that is infinite": lambda f: sealed(f, with_tensor(f[WEIGHTS], np.inf)),
    "a negative variance": lambda f: sealed(f, with_tensor(f[WEIGHTS], -1.0, "running_var")),
    "a mask of other classes": lambda f: mask_with(f, classes=["x", "y", "z"]),
    "a mask with a score of 2": lambda f: mask_with(f, scores=[2.0, 0.1, 0.1]),
    "a mask that knows too much": lambda f: mask_with(f, known=[True] * 4),
}


@pytest.mark.parametrize("kind", sorted(FORGED))
def test_a_forged_teacher_is_refused_by_the_server(
    federation: Federation, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of it is kept, nothing in it is run, and what the server kept before stays."""
    import tracemalloc

    monkeypatch.chdir(tmp_path)
    files = pack(federation.sites["birch"].space.teacher("birch"))
    forged = FORGED[kind](dict(files))
    kept = digest_folder(federation.server.space.teacher("birch"))
    folder = tmp_path / "unpacked"
    folder.mkdir()
    tracemalloc.start()
    try:
        with pytest.raises(BundleError) as caught:
            unpack_teacher(forged, "birch", folder)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < 4 * sum(len(c) for c in files.values()) + 20_000_000, "no more than was declared and sent"
    assert caught.value.code.startswith("bundle-")
    assert not (tmp_path / "owned").exists()
    try:
        said = read_reply({"kind": "contributed", "files": forged}, CONTRIBUTE, "birch")
    except QktError:
        pass  # not even a message
    else:
        assert isinstance(said, Contributed)
        outcome = federation.server.accept_teacher("birch", said)
        assert outcome.state == "refused"
    assert digest_folder(federation.server.space.teacher("birch")) == kept
    assert sorted(p.name for p in federation.server.space.teacher("birch").parent.iterdir()) == sorted(HELD)
    federation.server.accept_teacher("birch", Contributed(files=files))


def test_there_are_as_many_kinds_as_promised() -> None:
    assert len(FORGED) >= 25


def test_an_offer_of_another_teacher_than_the_kept_one_is_refused(federation: Federation) -> None:
    files = pack(federation.sites["birch"].space.teacher("birch"))
    other = card_with(files, training={"seed": 7})
    with pytest.raises(BundleError, match="another teacher"):
        federation.server.offer("birch", Offered(files={CARD: other[CARD], MASK: other[MASK]}))


def test_bundles_that_the_plan_does_not_name_are_refused_at_the_site(federation: Federation) -> None:
    replies, asked = federation.ask()
    shown = {n: r for n, r in replies.items() if isinstance(r, Offered)}
    offers = {n: federation.server.offer(n, r) for n, r in shown.items()}
    plan = federation.server.plan("aster", "c", asked, offers)
    teachers = federation.server.bundles(plan, shown)
    teachers["birch"] = card_with(teachers["birch"], training={"seed": 7})
    said = federation.sites["aster"].reply(
        ANSWER, {"plan": plan.model_dump(mode="json"), "teachers": teachers}
    )
    assert (said["kind"], said["code"]) == ("refused", "plan-outdated")
    del teachers["birch"]
    said = federation.sites["aster"].reply(
        ANSWER, {"plan": plan.model_dump(mode="json"), "teachers": teachers}
    )
    assert (said["kind"], said["code"]) == ("refused", "plan-outdated")


@pytest.mark.parametrize(
    "data", [{}, {"plan": {}}, {"plan": None, "teachers": {}}, {"plan": 3, "teachers": []}]
)
def test_a_task_that_cannot_be_understood_is_refused(federation: Federation, data: dict[str, Any]) -> None:
    assert federation.sites["aster"].reply(ANSWER, data)["code"] == "task"
    assert federation.sites["aster"].reply("rm", data)["code"] == "task"


def test_policy_of_the_phantom_is_the_open_one() -> None:
    shared = {"teacher": True, "statistics": True, "metrics": True, "student": False}
    assert OPEN.share.model_dump() == shared


def test_load_policy_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "hospitals" / "birch").mkdir(parents=True)
    with pytest.raises(PolicyError) as caught:
        load_policy(tmp_path, "birch")
    assert str(caught.value.where.file).endswith("hospitals/birch/policy.yaml")


# --- signatures ------------------------------------------------------------------------------------------


def keys(folder: Path, name: str) -> tuple[Path, str]:
    """A new key: the private one's file, the public one in hexadecimal."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    private = Ed25519PrivateKey.generate()
    path = folder / f"{name}.pem"
    path.write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return path, private.public_key().public_bytes_raw().hex()


def test_who_is_known_by_a_key_is_kept_only_if_it_has_signed(
    federation: Federation, copy: Site, tmp_path: Path
) -> None:
    mine, public = keys(tmp_path, "birch")
    other, _ = keys(tmp_path, "other")
    (tmp_path / "server").mkdir()
    (tmp_path / "server" / "params.yaml").write_text(yaml.safe_dump(PARAMS))
    server = Server(tmp_path / "server", {"birch": public})
    for key, state, reason in (
        (None, "refused", "is not signed"),
        (other, "refused", "is signed by somebody else"),
        (mine, "answered", None),
    ):
        site = Site(copy.root, "birch", key)
        said = read_reply(site.reply(CONTRIBUTE, {}), CONTRIBUTE, "birch")
        assert isinstance(said, Contributed)
        outcome = server.accept_teacher("birch", said)
        assert (outcome.state, outcome.reason) == (state, reason)
        assert (server.space.teacher("birch") / CARD).is_file() == (state == "answered")
    assert said.signature is not None
    forged = Contributed(files=said.files, signature=bytes([said.signature[0] ^ 1]) + said.signature[1:])
    assert server.accept_teacher("birch", forged).code == "bundle-signature"
    cedar = pack(federation.sites["cedar"].space.teacher("cedar"))
    assert server.accept_teacher("cedar", Contributed(files=cedar)).state == "answered", "no key is known"


def test_who_asks_checks_by_its_own_keys_whatever_the_server_says(
    federation: Federation, tmp_path: Path
) -> None:
    from qkt_clinical.federation.signing import sign

    root = tmp_path / "aster"
    shutil.copytree(federation.folder / "aster", root)
    mine, public = keys(tmp_path, "birch")
    policy(root, "aster", keys={"birch": public})
    replies, asked = federation.ask()
    shown = {n: r for n, r in replies.items() if isinstance(r, Offered)}
    offers = {n: federation.server.offer(n, r) for n, r in shown.items()}
    plan = federation.server.plan("aster", "c", asked, offers)
    teachers = federation.server.bundles(plan, shown)
    data: dict[str, Any] = {"plan": plan.model_dump(mode="json"), "teachers": teachers}
    signature = sign(mine, teachers["birch"][CARD])
    for signatures in ({}, {"birch": b"0" * 64}, {"birch": "text"}, None, {"cedar": signature}):
        said = Site(root, "aster").reply(ANSWER, data | {"signatures": signatures})
        assert (said["kind"], said["code"]) == ("refused", "bundle-signature"), signatures
    said = Site(root, "aster").reply(ANSWER, data | {"signatures": {"birch": signature}})
    assert said["kind"] == "answered"


def test_what_is_no_key_is_a_typed_error(copy: Site, tmp_path: Path) -> None:
    (tmp_path / "key.pem").write_text("no key")
    said = Site(copy.root, "birch", tmp_path / "key.pem").reply(CONTRIBUTE, {})
    assert (said["kind"], said["code"]) == ("refused", "signing-key")
    assert str(tmp_path) not in said["message"]


def test_the_server_registers_the_teachers_that_it_keeps(federation: Federation, tmp_path: Path) -> None:
    """In MLflow, from its workspace alone: it has nobody's prepared data."""
    from qkt_clinical.tracking.mirror import track

    root = tmp_path / "server"
    shutil.copytree(federation.server.root, root)
    params = load_params(root).model_copy(update={"queries": {}})
    assert set(track(root, params)["models"]) == {f"teacher.{site}" for site in HELD}


# --- commands --------------------------------------------------------------------------------------------


def test_the_record_is_printed_and_a_broken_one_is_one_line(
    copy: Site, capsys: pytest.CaptureFixture[str]
) -> None:
    from qkt_clinical.cli import main

    with pytest.raises(SystemExit) as end:
        main(["federation", "audit", "--root", str(copy.root)])
    assert end.value.code in (0, None)
    entries = list(read_record(copy.audit))
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"{len(entries)} entries, unbroken; the last digest is {entries[-1].digest}"
    copy.audit.write_text(copy.audit.read_text().replace("contributed", "offered", 1))
    with pytest.raises(SystemExit) as end:
        main(["federation", "audit", "--root", str(copy.root), "--json"])
    assert end.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("error [audit-broken]: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ("submit basophil --kit KIT", "error [config]: 'basophil' is no query"),
        ("submit --kit KIT", "error [no-server]: "),
        ("status --kit KIT", "error [no-server]: "),
        ("fetch 1234 --kit KIT --out OUT", "error [no-server]: "),
    ],
)
def test_wrong_words_and_a_server_that_is_not_there_are_one_line(
    federation: Federation, tmp_path: Path, capsys: pytest.CaptureFixture[str], words: str, error: str
) -> None:
    from qkt_clinical.cli import main

    named = words.replace("KIT", str(tmp_path)).replace("OUT", str(tmp_path / "out")).split()
    root = [] if named[0] in ("status", "fetch") else ["--root", str(federation.server.root)]
    with pytest.raises(SystemExit) as end:
        main(["federation", *named, *root])
    assert end.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith(error), said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()


# --- a record that a fault has hit -----------------------------------------------------------------------


def fill(path: Path, number: int = 3) -> list[str]:
    """A record of so many lines; the lines."""
    for i in range(number):
        record(path, "declined", {"query": str(i)})
    return path.read_text().splitlines(keepends=True)


@pytest.mark.parametrize("half", [1, 20, -1])
def test_half_a_line_is_set_aside_and_the_record_goes_on(tmp_path: Path, half: int) -> None:
    path = tmp_path / "audit.jsonl"
    lines = fill(path)
    torn = lines[-1].replace('"number": 3', '"number": 4')[:half]
    path.write_text("".join(lines) + torn)
    assert len(list(read_record(path))) == 3, "it was never confirmed"
    record(path, "declined", {"query": "after"})
    entries = list(read_record(path))
    assert [e.event for e in entries] == ["declined"] * 3 + ["repaired", "declined"]
    assert entries[3].about == {"bytes": str(len(torn)), "digest": digest_bytes(torn.encode())}
    assert path.with_suffix(".torn").read_text() == f"{torn}\n"


@pytest.mark.parametrize("left", [0, 1, 2])
def test_a_cut_end_is_seen(copy: Site, left: int) -> None:
    lines = fill(copy.audit)
    before = len(lines) - 3
    copy.audit.write_text("".join(lines[: before + left]))
    with pytest.raises(OutputsError, match="end was cut") as caught:
        list(read_record(copy.audit))
    assert caught.value.code == "audit-broken"
    assert copy.reply(OFFER, QUESTION)["code"] == "audit-broken"


def test_an_end_cut_within_the_last_line_is_no_half_line(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    lines = fill(path)
    path.write_text("".join(lines)[:-1])
    with pytest.raises(OutputsError, match="end was cut"):
        list(read_record(path))


@pytest.mark.parametrize(
    "head", [None, "", "{", '{"count": -1}', '{"format": "qkt-audit-head/1", "count": 2}']
)
def test_a_head_that_is_gone_or_another_is_seen(tmp_path: Path, head: str | None) -> None:
    path = tmp_path / "audit.jsonl"
    fill(path)
    place = path.with_suffix(".head.json")
    place.unlink() if head is None else place.write_text(head)
    with pytest.raises(OutputsError) as caught:
        record(path, "declined", {})
    assert caught.value.code == "audit-broken"
    assert len(path.read_text().splitlines()) == 3, "nothing was added"


def test_a_process_that_ended_between_line_and_head_breaks_nothing(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    fill(path, 2)
    head = path.with_suffix(".head.json").read_bytes()
    fill(path, 1)
    path.with_suffix(".head.json").write_bytes(head)
    assert len(list(read_record(path))) == 3
    fill(path, 1)
    assert [e.number for e in read_record(path)] == [1, 2, 3, 4]


def test_a_record_that_was_taken_away_is_named_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    fill(path)
    last = list(read_record(path))[-1].digest
    path.unlink()
    with pytest.raises(OutputsError, match="is gone"):
        list(read_record(path))
    record(path, "declined", {})
    begun, _ = read_record(path)
    assert (begun.event, begun.about) == ("begun", {"entries": "3", "digest": last})


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EIO])
@pytest.mark.parametrize("where", ["write", "fsync", "head"])
def test_a_full_disk_leaves_the_record_whole_and_the_site_polite(
    copy: Site, monkeypatch: pytest.MonkeyPatch, where: str, number: int
) -> None:
    fill(copy.audit)
    before = copy.audit.read_bytes()
    write = os.write

    def refuse(descriptor: int, content: bytes) -> int:
        if len(content) < 40:
            raise OSError(number, os.strerror(number))
        return write(descriptor, content[: len(content) // 2])

    def fail(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        if where == "head":
            patched.setattr(audit, "_write_head", fail)
        else:
            patched.setattr(os, where, refuse if where == "write" else fail)
        said = copy.reply(OFFER, QUESTION)
    wanted = "disk-full" if number in (errno.ENOSPC, errno.EDQUOT) else "system"
    assert (said["kind"], said["code"]) == ("refused", wanted)
    assert copy.audit.read_bytes() == before
    assert copy.reply(OFFER, QUESTION)["kind"] == "offered", "when there is room again"
    assert [e.event for e in read_record(copy.audit)][-1] == "offered"


# --- names, sizes and numbers of what comes --------------------------------------------------------------

NO_NAMES = [
    "../../victim",
    "/etc/passwd",
    "a/b",
    "..",
    ".",
    "",
    "A",
    "a.b",
    "a\n",
    "a\x1b[2J",
    "a" * 64,
    "x" * 50_000_000,
    "\ud800",
    7,
    None,
    ["a"],
    {"a": 1},
]


def short(value: Any) -> str:
    return f"{type(value).__name__}-{str(value)[:12]!a}-{len(str(value))}"


@pytest.mark.parametrize("name", NO_NAMES, ids=short)
def test_a_name_that_is_none_is_refused_wherever_it_stands(copy: Site, name: Any) -> None:
    """In a task, a question, a plan and a candidate: nothing is written elsewhere, and little recorded."""
    plan = {
        "hospital": "birch",
        "query": "c",
        "classes": ["c"],
        "method": "qkt",
        "budget": 0.05,
        "local": ["a"],
        "teachers": [],
        "uncovered": [],
        "bytes_moved": 0,
    }
    question = QUESTION["question"]
    teacher = {
        "site": name,
        "relevant": True,
        "reason": "",
        "teaches": [],
        "rivals": [],
        "known": [],
        "scores": {},
        "threshold": 0.5,
        "bytes": 1,
        "digest": "0" * 64,
    }
    asked: list[tuple[str, Any]] = [
        (ASK, {"query": name}),
        (OFFER, {"question": question | {"hospital": name}}),
        (OFFER, {"question": question | {"query": name}}),
        (ANSWER, {"plan": plan | {"query": name}, "teachers": {}}),
        (ANSWER, {"plan": plan | {"hospital": name}, "teachers": {}}),
        (
            ANSWER,
            {"plan": plan | {"teachers": [teacher]}, "teachers": {name: {}} if isinstance(name, str) else {}},
        ),
    ]
    outside = sorted(p.name for p in copy.root.parent.iterdir())
    size = copy.audit.stat().st_size
    for task, data in asked:
        said = copy.reply(task, data | {"hospital": name})
        assert (said["kind"], said["code"]) == ("refused", "task"), (task, said)
        assert len(str(said)) < 10_000
    assert copy.audit.stat().st_size - size < 600 * len(asked)
    assert sorted(p.name for p in copy.root.parent.iterdir()) == outside
    list(read_record(copy.audit))


CLASSES_OF_NOBODY = [
    ["c", "c"],
    [""],
    [" "],
    ["a\x00b"],
    ["\x1b[31mred"],
    ["a\nb"],
    ["x" * 101],
    ["\ud800"],
    [7],
    [None],
    "c",
    None,
    [f"c{i}" for i in range(1001)],
]


@pytest.mark.parametrize("classes", CLASSES_OF_NOBODY, ids=short)
def test_classes_that_are_no_text_or_stand_there_twice_are_refused(
    federation: Federation, classes: Any
) -> None:
    site = federation.sites["birch"]
    said = site.reply(OFFER, {"question": QUESTION["question"] | {"classes": classes}})
    assert (said["kind"], said["code"]) == ("refused", "task")
    said = site.reply(OFFER, {"question": QUESTION["question"] | {"held": classes}})
    assert (said["kind"], said["code"]) == ("refused", "task")
    asked = site.reply(ASK, {"query": "c"}) | {"kind": "asked", "query": {"classes": classes}}
    with pytest.raises(QueryError):
        read_reply(asked, ASK, "birch")
    files = pack(site.space.teacher("birch"))
    try:
        forged = mask_with(card_with(files, classes=classes), classes=classes)
    except (TypeError, UnicodeEncodeError):
        return  # no JSON either
    with pytest.raises(BundleError):
        unpack_teacher(forged, "birch", federation.folder)


@pytest.mark.parametrize(
    "data",
    [
        None,
        [],
        "text",
        7,
        b"bytes",
        {1: 2},
        {"query": object()},
        {"question": []},
        {"plan": "text"},
        {"teachers": 1},
    ],
    ids=short,
)
@pytest.mark.parametrize(
    "task", [CONTRIBUTE, ASK, OFFER, ANSWER, "", "rm", None, 7, "x" * 1_000_000, "\ud800"], ids=short
)
def test_whatever_comes_a_site_replies(copy: Site, task: Any, data: Any) -> None:
    said = copy.reply(task, data)
    assert said["kind"] == ("contributed" if task == CONTRIBUTE else "refused")
    assert said["kind"] == "contributed" or said["code"] == "task"


FAULTS: list[Exception] = [
    OSError(errno.ENOSPC, "No space left on device", "/data/patient-4711"),
    PermissionError(errno.EACCES, "Permission denied", "/data/patient-4711"),
    IsADirectoryError(errno.EISDIR, "Is a directory"),
    KeyError("patient-4711"),
    ValueError("patient-4711"),
    TypeError("patient-4711"),
    AttributeError("patient-4711"),
    RecursionError("patient-4711"),
    MemoryError("patient-4711"),
    RuntimeError("CUDA out of memory: patient-4711"),
    UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates"),
    StopIteration(),
    AssertionError("patient-4711"),
    ZeroDivisionError("patient-4711"),
    QktError("m" * 5000 + "\x1b[2J\ud800", remedy="r" * 5000, code="c" * 5000),
]


@pytest.mark.parametrize("fault", FAULTS, ids=short)
def test_whatever_goes_wrong_a_site_replies_with_one_typed_refusal(
    copy: Site, monkeypatch: pytest.MonkeyPatch, fault: Exception
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise fault

    monkeypatch.setattr(Site, "_contribute", fail)
    said = read_reply(copy.reply(CONTRIBUTE, {}), CONTRIBUTE, "birch")
    assert isinstance(said, Refused)
    assert "4711" not in str(said)
    assert said.message.isprintable()
    assert [e.event for e in read_record(copy.audit)][-1] == "refused"
    with monkeypatch.context() as patched:
        patched.setattr(audit, "_writing", fail)
        assert copy.reply(CONTRIBUTE, {}) == said.model_dump(), "nothing can be recorded, either"


def test_no_more_than_allowed_pass_at_the_same_moment(copy: Site) -> None:
    policy(copy.root, "birch", queries_per_day=3)
    copy.audit.unlink()
    with ThreadPoolExecutor(16) as pool:
        kinds = list(pool.map(lambda _: copy.reply(OFFER, QUESTION)["kind"], range(16)))
    assert sorted(kinds) == ["declined"] * 13 + ["offered"] * 3
    assert [e.event for e in read_record(copy.audit)].count("offered") == 3


def offer_once(path: Path) -> bool:
    """In a process of its own."""
    return audit.record_within(path, "offered", {}, 3, 0.0) is not None


def test_no_more_than_allowed_pass_in_many_processes(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        assert sum(pool.map(offer_once, [path] * 16, chunksize=1)) == 3
    assert len(list(read_record(path))) == 3


@pytest.mark.parametrize("names", [("..", "c"), ("aster", "../../victim"), ("aster", "c.d"), ("", "c")])
def test_the_server_writes_nothing_outside_its_workspace(
    federation: Federation, names: tuple[str, str]
) -> None:
    before = sorted(federation.folder.rglob("*"))
    bad = names[0] if names[1] == "c" else names[1]
    for act in (
        lambda: federation.server.note(FederationOutcome(state="waiting"), "queries", *names),
        lambda: federation.server.outcome("queries", *names),
        lambda: federation.server.accept_teacher(bad, Refused(code="", message="", remedy="")),
        lambda: federation.server.space.student(*names),
        lambda: federation.server.space.fetched(*names),
    ):
        with pytest.raises(ConfigError, match="is no"):
            act()
    assert sorted(federation.folder.rglob("*")) == before


def test_what_is_no_outcome_on_the_server_is_not_shown(tmp_path: Path) -> None:
    server = Server(tmp_path)
    server.note(FederationOutcome(state="refused", reason="x\x1b[2J" + "y" * 5000), "queries", "aster", "c")
    for name in (
        "queries/Bad Name/c.json",
        "queries/aster/\x1b[2J.json",
        "audit.head.json",
        "teachers/x.y.json",
    ):
        (tmp_path / "federation" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "federation" / name).write_text("{}")
    (told,) = server.outcomes().values()
    assert told.line("aster/c").isprintable()
    assert len(str(told.reason)) <= 2000


# --- a mask that is read otherwise makes another student ---------------------------------------------------


def noting(made: list[str], name: str, real: Callable[..., Any]) -> Callable[..., Any]:
    """A function that does the same and notes that it was called."""

    def noted(*given: Any, **named: Any) -> Any:
        made.append(name)
        return real(*given, **named)

    return noted


def test_after_the_mask_has_changed_the_federation_answers_anew(
    federation: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import qkt_clinical.stages.mask
    import qkt_clinical.stages.train
    import qkt_clinical.stages.transfer

    root = tmp_path / "aster"
    shutil.copytree(federation.folder / "aster", root)
    replies, asked = federation.ask()
    shown = {n: r for n, r in replies.items() if isinstance(r, Offered)}
    offers = {n: federation.server.offer(n, r) for n, r in shown.items()}
    plan = federation.server.plan("aster", "c", asked, offers)
    data = {"plan": plan.model_dump(mode="json"), "teachers": federation.server.bundles(plan, shown)}
    made: list[str] = []
    for module, name in (
        (qkt_clinical.stages.train, "train_site"),
        (qkt_clinical.stages.mask, "mask_site"),
        (qkt_clinical.stages.transfer, "transfer_query"),
    ):
        monkeypatch.setattr(module, name, noting(made, name, getattr(module, name)))
    site = Site(root, "aster")
    first = site.reply(ANSWER, data)
    assert (first["kind"], made) == ("answered", [])
    params = PARAMS | {"mask": {"probes": 16, "threshold": 0.01}}
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    second = site.reply(ANSWER, data)
    assert (second["kind"], made) == ("answered", ["mask_site", "transfer_query"])
    made.clear()
    assert site.reply(ANSWER, data) == second
    (root / "params.yaml").write_text(yaml.safe_dump(params | {"gate": {"query_images": 3}}))
    assert site.reply(ANSWER, data) == second
    assert made == [], "nothing else makes it anew"
    (root / "params.yaml").write_text(yaml.safe_dump(PARAMS))
    assert site.reply(ANSWER, data)["digest"] == first["digest"]
