"""What stands between FLARE and a site: the filter on everything that leaves, and a kit's local settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("nvflare", reason="the extra 'federation' is not installed")

from nvflare.apis.fl_constant import FLContextKey, ReservedKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.workspace import Workspace as FlareWorkspace

from qkt_clinical.config.policy import OPEN_POLICY, POLICY
from qkt_clinical.errors import ConfigError, PolicyError, QktError
from qkt_clinical.federation.flare import (
    SAID,
    OutboundPolicy,
    QueryController,
    SiteExecutor,
    settings_of,
)
from qkt_clinical.federation.messages import ASK
from qkt_clinical.federation.run import (
    _parsed,
    make_job,
    provision,
    serve,
    server_start,
    write_local,
)

ASKED = {
    "kind": "asked",
    "query": {"classes": ["c"]},
    "asking": {"classes": ["a", "c"], "held": ["a"], "shape": [3, 8, 8], "normalisation": "unit"},
}


@pytest.fixture
def context(tmp_path: Path) -> FLContext:
    """A job's task at site birch, whose workspace and kit are in ``tmp_path``."""
    (tmp_path / "qkt" / "hospitals" / "birch").mkdir(parents=True)
    (tmp_path / "qkt" / "hospitals" / "birch" / POLICY).write_text(OPEN_POLICY)
    (tmp_path / "kit" / "startup").mkdir(parents=True)
    write_local(tmp_path / "kit" / "local", str(tmp_path / "qkt"))
    found = FLContext()
    found.set_prop(ReservedKey.IDENTITY_NAME, "birch", private=True, sticky=False)
    found.set_prop(
        FLContextKey.WORKSPACE_OBJECT,
        FlareWorkspace(root_dir=str(tmp_path / "kit"), site_name="birch"),
        private=True,
        sticky=False,
    )
    found.set_prop(FLContextKey.TASK_NAME, ASK, private=True, sticky=False)
    return found


def reply(**parts: Any) -> Shareable:
    """A message that is about to leave."""
    made = make_reply(ReturnCode.OK)
    made.update(parts)
    return made


def test_what_may_leave_passes_and_nothing_beside_it(context: FLContext) -> None:
    passed = OutboundPolicy().process(reply(**{SAID: ASKED, "images": b"pixels"}), context)
    assert passed[SAID] == ASKED
    assert "images" not in passed
    assert passed.get_return_code() == ReturnCode.OK


def test_a_message_that_is_not_ours_leaves_its_return_code_alone(context: FLContext) -> None:
    made = reply(DXO={"weights": [1.0]})
    made.set_return_code(ReturnCode.EXECUTION_EXCEPTION)
    passed = OutboundPolicy().process(made, context)
    assert passed.get_return_code() == ReturnCode.EXECUTION_EXCEPTION
    assert not {"DXO", SAID} & set(passed)


@pytest.mark.parametrize(
    "said", [{**ASKED, "counts": {"a": 7}}, {"kind": "contributed", "files": {}}, "patients", [1]]
)
def test_what_may_not_leave_raises_and_flare_sends_nothing(context: FLContext, said: Any) -> None:
    with pytest.raises(PolicyError, match="nothing was sent"):
        OutboundPolicy().process(reply(**{SAID: said}), context)


@pytest.mark.parametrize("text", ["", "share: [", "share: {teacher: maybe}"])
def test_without_a_valid_policy_the_filter_lets_nothing_pass(
    context: FLContext, tmp_path: Path, text: str
) -> None:
    (tmp_path / "qkt" / "hospitals" / "birch" / POLICY).write_text(text)
    with pytest.raises(PolicyError):
        OutboundPolicy().process(reply(**{SAID: ASKED}), context)


@pytest.mark.parametrize("text", [None, "{", '{"workspace": 3}', '{"workspace": "x", "root": "/"}'])
def test_a_site_that_does_not_know_its_workspace_says_so(
    context: FLContext, tmp_path: Path, text: str | None
) -> None:
    path = tmp_path / "kit" / "local" / "qkt.json"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(ConfigError):
        OutboundPolicy().process(reply(**{SAID: ASKED}), context)
    said = SiteExecutor().execute(ASK, Shareable(), context, None)[SAID]
    assert (said["kind"], said["code"]) == ("refused", "config")
    assert str(tmp_path) not in json.dumps(said), "a site's paths are its own"


def test_kits_give_nobody_code_or_shells_and_send_no_logs(tmp_path: Path) -> None:
    made = provision(
        tmp_path, ["aster", "birch"], server="qkt.example.org", port=8002, admin="coordinator@example.org"
    )
    assert {p.name for p in made.iterdir()} == {
        "qkt.example.org",
        "aster",
        "birch",
        "coordinator@example.org",
    }
    keys = [(made / name / "startup" / "client.key").read_bytes() for name in ("aster", "birch")]
    assert keys[0] != keys[1]
    for name in ("qkt.example.org", "aster"):
        write_local(made / name / "local", "/srv/qkt")
    serve(made / "qkt.example.org", tmp_path / "storage")
    for name in ("qkt.example.org", "aster"):
        local = made / name / "local"
        rights = json.loads((local / "authorization.json").read_bytes())["permissions"]
        for role, given in rights.items():
            assert {given[r] for r in ("byoc", "shell_commands", "clone_job")} == {"none"}, role
        resources = json.loads((local / "resources.json").read_bytes())
        assert resources["class_allow_list"] == ["qkt_clinical.federation.flare."]
        assert resources["class_list_enforcement_mode"] == "enforce"
        assert resources["allow_log_streaming"] is False
        assert json.loads((local / "qkt.json").read_bytes()) == {"workspace": "/srv/qkt"}
        scope = json.loads((local / "privacy.json").read_bytes())
        assert scope["default_scope"] == scope["scopes"][0]["name"]
        assert scope["scopes"][0]["task_result_filters"][0]["path"].endswith(".OutboundPolicy")
    text = (made / "qkt.example.org" / "local" / "resources.json").read_text()
    assert "/tmp/nvflare" not in text
    assert text.count(str(tmp_path / "storage")) == 2


def test_a_server_that_ends_in_the_middle_of_a_word_is_one_that_cannot_be_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    from nvflare.apis.fl_exception import FLCommunicationError
    from nvflare.fuel.flare_api import flare_api

    started: list[float | None] = []

    def connect(*_words: object, **_more: object) -> SimpleNamespace:
        if not started:
            raise FLCommunicationError("failed to challenge server: timeout")
        info = SimpleNamespace(server_info=SimpleNamespace(start_time=started[0]))
        return SimpleNamespace(get_system_info=lambda: info, close=lambda: None)

    monkeypatch.setattr(flare_api, "new_secure_session", connect)
    for said, words in (([], "cannot be reached: failed to challenge"), ([None], "does not say when")):
        started[:] = said
        with pytest.raises(QktError, match=words) as error:
            server_start(tmp_path)
        assert error.value.code == "no-server"
    started[:] = [7.5]
    assert server_start(tmp_path) == 7.5


def test_a_slow_job_is_waited_for_and_a_lost_one_submitted_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qkt_clinical.federation import run
    from qkt_clinical.federation.server import FederationOutcome

    # By look: when the server was started, the job's state, and whether the job answers.
    looks = iter(
        [
            *[(1.0, "RUNNING", False)] * 5,  # slow to begin
            (1.0, "RUNNING", True),
            (2.0, "RUNNING", False),  # the server was started again
            (2.0, "RUNNING", False),  # the second job, not begun
            (2.0, "FINISHED:COMPLETED", False),
        ]
    )
    now, submitted, told = [(1.0, "", False)], list[str](), list[str]()

    def submit(*_words: object, **_more: object) -> str:
        submitted.append(f"job-{len(submitted)}")
        return submitted[-1]

    def list_jobs(kit: Path) -> list[dict[str, str]]:
        now[0] = next(looks)
        return [{"job": submitted[-1], "state": now[0][1]}]

    def ask_outcomes(kit: Path, job: str) -> dict[str, FederationOutcome]:
        if not now[0][2]:
            raise QktError("the job does not answer", remedy="Wait.", code="no-job")
        return {"aster/basophil": FederationOutcome(state="running")}

    done = {"aster/basophil": FederationOutcome(state="answered")}
    monkeypatch.setattr(run, "POLL_S", 0.0)
    monkeypatch.setattr(run, "server_start", lambda kit: now[0][0])
    for stand_in in (submit, list_jobs, ask_outcomes):
        monkeypatch.setattr(run, stand_in.__name__, stand_in)
    monkeypatch.setattr(run, "fetch", lambda kit, job, out: done)
    found = run.attend(
        tmp_path, ["aster"], list(done), contribute=True, patience_s=60, silence_s=0, say=told.append
    )
    assert found == done
    assert submitted == ["job-0", "job-1"]
    assert told == [
        "job job-0: 1 queries",
        "aster/basophil: running",
        "the job is lost: its server was started again",
        "job job-1: 1 queries",
    ]


@pytest.mark.parametrize(
    ("sites", "queries"),
    [
        (["birch"], ["../../victim"]),
        (["birch"], ["../victim"]),
        (["birch"], ["aster/../../victim"]),
        (["birch"], ["aster"]),
        (["birch"], ["aster/c\n"]),
        (["birch"], ["/c"]),
        (["birch"], [7]),
        (["birch"], ["aster/" + "x" * 1_000_000]),
        (["birch"], ["aster/c"] * 1001),
        (["../birch"], ["aster/c"]),
        (["birch", "birch"], ["aster/c"]),
        (["birch", None], ["aster/c"]),
        ("birch", "aster/c"),
        (None, None),
    ],
)
def test_a_job_that_names_what_is_no_name_is_no_job(sites: Any, queries: Any) -> None:
    """At the server, where its names become paths, and before at the administrator's."""
    for make in (QueryController, make_job):
        with pytest.raises((ConfigError, TypeError)) as caught:
            make(sites, queries)
        assert len(str(caught.value)) < 2_000_000
    QueryController(["birch"], ["aster/c"])


@pytest.mark.parametrize(
    "told",
    [
        None,
        [],
        {"../../victim": {"state": "answered"}},
        {"aster/c\x1b[2J": {"state": "answered"}},
        {"aster/c": {"state": "lost"}},
        {"aster/c": {"state": "answered", "teachers": ["../x"]}},
        {"aster/c": {"state": "answered", "declined": {"../x": "no"}}},
        {"aster/c": {"state": "answered", "digest": "x"}},
        {7: {"state": "answered"}},
    ],
    ids=str,
)
def test_what_a_server_tells_of_a_job_is_checked(told: Any) -> None:
    with pytest.raises(QktError) as caught:
        _parsed(told)
    assert caught.value.code == "reply"
    assert _parsed({"teacher birch": {"state": "waiting"}, "aster/c": {"state": "refused"}})


def test_a_site_by_no_name_has_no_workspace(context: FLContext, tmp_path: Path) -> None:
    write_local(tmp_path / "kit" / "local", str(tmp_path / "sites" / "{site}"))
    context.set_prop(ReservedKey.IDENTITY_NAME, "../../victim", private=True, sticky=False)
    with pytest.raises(ConfigError, match="is no site name"):
        settings_of(context)
