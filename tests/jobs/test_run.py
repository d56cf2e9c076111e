"""Jobs that are run: a rare class measured on the hospital's own test images, and what ends a job."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from qkt_clinical.cli import main
from qkt_clinical.common import files
from qkt_clinical.common.console import errors_as_lines
from qkt_clinical.common.files import digest_folder
from qkt_clinical.config.loading import load_params
from qkt_clinical.config.params import Params
from qkt_clinical.config.query import QueryRef
from qkt_clinical.config.workspace import Workspace
from qkt_clinical.data.prepared import write_prepared
from qkt_clinical.errors import QktError, QueryError, typed
from qkt_clinical.jobs import resume, run, work
from qkt_clinical.jobs.run import _Worker
from qkt_clinical.jobs.state import Board, Job
from qkt_clinical.models.bundle import load_bundle, write_bundle
from qkt_clinical.records.outputs import read_outputs
from qkt_clinical.records.phases import Phases
from qkt_clinical.records.reading import read_record
from qkt_clinical.stages import gate
from qkt_clinical.tracking.client import registry_client
from qkt_clinical.tracking.mirror import track
from tests.four_hospitals import ask
from tests.places import ROOT
from tests.sample_run import SHAPE, sample_params, write_sample_run
from tests.tracked import copy_tracked

pytestmark = pytest.mark.slow

IMAGES = {
    "train": {0: 12, 1: 12, 2: 2},
    "calibration": {0: 8, 1: 8},
    "val": {0: 1, 1: 1},
    "test": {0: 6, 1: 6, 2: 6},
}
"""Of h0, per split and class: of class 2, which it asks for, there are two images to learn from."""


def prepare(root: Path, params: Params) -> None:
    """Images of h0; every class has a grey level of its own."""
    rows = [
        (split, c) for split, counts in IMAGES.items() for c, number in counts.items() for _ in range(number)
    ]
    labels = np.array([c for _, c in rows])
    draw = np.random.default_rng(0)
    noise = draw.integers(0, 40, (len(rows), *SHAPE), dtype=np.uint8)
    write_prepared(
        Workspace(root).prepared("h0"),
        site="h0",
        source_kind="images",
        classes=params.classes,
        images=noise + (60 * labels).astype(np.uint8)[:, None, None, None],
        labels=labels,
        groups=np.array([f"p{i}" for i in range(len(rows))]),
        splits={s: np.array([i for i, (split, _) in enumerate(rows) if split == s]) for s in IMAGES},
        spacing_mm=None,
        normalisation="unit",
        transforms=(),
        outcomes=[],
    )


def write_federation(root: Path) -> None:
    """Three hospitals with teachers of random weights; nobody has asked yet."""
    asked = sample_params(sites=3)
    write_sample_run(root, asked, weights=True)
    for folder in (Workspace(root).reports, root / "models" / "students"):
        shutil.rmtree(folder)
    params = sample_params(
        sites=3,
        device="cpu",
        evaluate={"bootstrap": 20},
        transfer={"images": 16},
        gate={"query_recall": 0.0, "forgetting": 1.0, "query_images": 0},
    ).model_copy(update={"queries": {}})
    (root / "params.yaml").write_text(yaml.safe_dump(params.model_dump(mode="json")), encoding="utf-8")
    prepare(root, params)
    for site in params.sites:
        (root / "hospitals" / site).mkdir(parents=True)
        (root / "hospitals" / site / "site.yaml").write_text("{}", encoding="utf-8")
    ask(root, "h0", "rare", classes=[params.classes[2]])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made")
    write_federation(root)
    return root


@pytest.fixture
def bare(made: Path, tmp_path: Path) -> Path:
    """The federation without a registry."""
    return Path(shutil.copytree(made, tmp_path / "copy"))


@pytest.fixture(scope="module")
def registered(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = Path(shutil.copytree(made, tmp_path_factory.mktemp("registered") / "copy"))
    track(root, load_params(root))
    return root


@pytest.fixture
def root(registered: Path, tmp_path: Path) -> Path:
    """The federation with its teachers in the registry."""
    return copy_tracked(registered, tmp_path / "copy")


@pytest.fixture
def other(registered: Path, tmp_path: Path) -> Path:
    """The same once more."""
    return copy_tracked(registered, tmp_path / "other")


def outputs_of(root: Path) -> dict[str, bytes]:
    """What a job writes, by place."""
    reports = Workspace(root).reports
    return {p.as_posix(): (reports / p).read_bytes() for p in (EVALUATION, VERDICT)} | {
        "student": digest_folder(Workspace(root).student("h0", "rare")).encode()
    }


EVALUATION, VERDICT = Path("evaluation/h0/rare.json"), Path("gate/h0/rare.json")


def gate_then_end(root: Path) -> None:
    """In a process of its own: a job that is killed when it comes to the gate."""

    def end(*_: Any) -> None:
        if (Workspace(root).reports / EVALUATION).is_file():
            os.kill(os.getpid(), signal.SIGKILL)
        raise gate.NotMeasured("not yet", remedy="")

    gate.gate_one = end  # type: ignore[assignment]
    run(root, "h0", "rare", load_params(root))


def test_a_rare_class_is_measured_at_home_and_however_it_ends_the_bytes_are_the_same(
    root: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = load_params(root)
    left = Workspace(root).scratch / "bundles" / ".fetch.0a1b.part" / ".fetch-x"
    left.mkdir(parents=True)  # by a process that was killed while it fetched
    job = run(root, "h0", "rare", params)
    assert not [p for p in left.parent.parent.iterdir() if not re.fullmatch("[0-9a-f]{64}", p.name)]
    assert (job.state, job.version, job.note) == ("answered", "1", None)
    wanted = outputs_of(root)
    evaluation, verdict = (json.loads(wanted[p.as_posix()]) for p in (EVALUATION, VERDICT))
    assert evaluation["test_sites"] == ["h0"]
    assert evaluation["test_images"] == dict.fromkeys(params.classes[:3], 6)
    assert evaluation["student"] == verdict["digest"] == wanted["student"].decode()
    assert load_params(root).queries == {"h0-rare": QueryRef(hospital="h0", query="rare")}
    with registry_client(root, params) as client:
        tags = client.get_model_version("student.h0.rare", "1").tags
    assert tags["qkt.gate"] == ("passed" if verdict["passed"] else "failed")

    # Killed between evaluation and gate.
    process = multiprocessing.get_context("spawn").Process(target=gate_then_end, args=(other,))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    ended = Board(other).read("h0", "rare")
    assert (ended.state, ended.step) == ("interrupted", "evaluate")
    assert not (Workspace(other).reports / VERDICT).exists()

    # Gone on with, it fails at the same place for another reason; gone on with again, it is answered.
    judge = gate.judge

    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(gate, "judge", fail)
    with pytest.raises(QktError, match="memory does not suffice"):
        resume(other, "h0", "rare", params)
    failed = Board(other).read("h0", "rare")
    assert (failed.state, failed.step, failed.interruptions) == ("failed", "evaluate", 1)
    monkeypatch.setattr(gate, "judge", judge)
    assert resume(other, "h0", "rare", params).state == "answered"
    assert outputs_of(other) == wanted


def test_an_evaluation_of_another_student_counts_for_nothing(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    params = load_params(root)
    run(root, "h0", "rare", params)
    first = outputs_of(root)
    ask(root, "h0", "rare", classes=[params.classes[2]], method="qkt-light")
    run(root, "h0", "rare", params)
    second = outputs_of(root)
    assert {name for name in first if first[name] != second[name]} == set(first), "measured anew"
    # The figures of the first beside the student of the second, as a copy from elsewhere would leave them.
    space = Workspace(root)
    for place in (EVALUATION, VERDICT):
        (space.reports / place).write_bytes(first[place.as_posix()])
    known = load_params(root)
    outputs = read_outputs(root, known)
    assert ([q.name for q in outputs.queries], [a.name for a in outputs.unmeasured]) == ([], ["h0-rare"])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["query", "show", "h0", "rare", "--root", str(root), "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert (shown["plan"]["method"], shown["evaluation"], shown["gate"]) == ("qkt-light", None, None)
    with pytest.raises(gate.NotMeasured, match="has not been measured"):
        gate.gate_one(root, QueryRef(hospital="h0", query="rare"), params)
    assert not (space.reports / VERDICT).exists(), "a verdict on another student"
    (space.reports / EVALUATION).write_bytes(second[EVALUATION.as_posix()])
    (space.reports / VERDICT).write_bytes(first[VERDICT.as_posix()])
    (query,) = read_outputs(root, known).queries
    assert query.verdict is None


@pytest.mark.parametrize("everybody", [False, True])
def test_a_teacher_of_finite_nonsense_is_set_aside_or_ends_the_query_by_name(
    bare: Path, capsys: pytest.CaptureFixture[str], everybody: bool
) -> None:
    params, space = load_params(bare), Workspace(bare)
    for site in ("h1", "h2") if everybody else ("h1",):
        bundle = load_bundle(space.teacher(site))
        with torch.no_grad():
            bundle.network.head.weight.fill_(3e38)
        card = bundle.card.model_dump(mode="json", exclude={"network", "weights"})
        write_bundle(space.teacher(site), bundle.network, card)
    track(bare, params)
    code, said = command(bare, capsys, "query", "run", "h0", "rare")
    assert code == int(everybody)
    if everybody:
        assert "error [untrusted]: " in said
        assert "h1" in said
        assert "h2" in said
        return
    phases = read_record(Phases, space.student("h0", "rare") / "phases.json")
    assert [t.site for t in phases.screening if not t.included] == ["h1"]


def test_where_there_is_no_registry_none_is_made(bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ("plan", "run"):
        code, said = command(bare, capsys, "query", verb, "h0", "rare")
        assert code == 1
        assert said.splitlines()[-1].startswith("error [no-teachers]: there is no registry yet")
    assert not list(bare.glob("ml*"))


# --- what ends a job ------------------------------------------------------------------------------


def command(root: Path, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """Exit code and standard error."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([*words, "--root", str(root)])
    return int(ended.value.code or 0), capsys.readouterr().err


@pytest.fixture
def queue(tmp_path: Path) -> Path:
    """A hospital with two queries, ``a`` and ``b``."""
    (tmp_path / "hospitals" / "h0").mkdir(parents=True)
    (tmp_path / "hospitals" / "h0" / "site.yaml").write_text("{}", encoding="utf-8")
    params = sample_params(sites=2).model_copy(update={"queries": {}})
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params.model_dump(mode="json")), encoding="utf-8")
    for name in ("a", "b"):
        ask(tmp_path, "h0", name, classes=[params.classes[0]])
    return tmp_path


def let_fail(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Query ``a`` ends with an error at ``transfer``; every other step and query is over at once."""

    def transfer(self: _Worker) -> None:
        self._begin("transfer")
        if self.job.query == "a":
            raise error

    for step in ("_fetch", "_evaluate", "_register"):
        monkeypatch.setattr(_Worker, step, lambda self: None)
    monkeypatch.setattr(_Worker, "_transfer", transfer)


def full() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/patient-4711.npy")


class LibraryError(Exception):
    """As a library's own that wraps one of the system."""


ENDS = [
    (full(), "disk-full"),
    (LibraryError("I/O error: No space left on device (os error 28)"), "disk-full"),
    (PermissionError(errno.EACCES, "Permission denied", "patient-4711"), "system"),
    (OSError("patient-4711"), "system"),
    (MemoryError("patient-4711"), "out-of-memory"),
    (RuntimeError("CUDA out of memory. Tried to allocate 4711 MiB"), "out-of-memory"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 4711 bytes"), "out-of-memory"),
    (RuntimeError("patient-4711"), "internal"),
    (KeyError("patient-4711"), "internal"),
]


@pytest.mark.parametrize(("error", "code"), ENDS, ids=lambda v: v if isinstance(v, str) else type(v).__name__)
def test_whatever_ends_a_job_it_has_failed_and_the_next_is_answered(
    queue: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    code: str,
) -> None:
    let_fail(monkeypatch, error)
    ended, said = command(queue, capsys, "query", "run", "h0", "a")
    assert ended == 1
    lines = [line for line in said.splitlines() if line.startswith("error")]
    assert lines == [said.splitlines()[-1]]
    assert lines[0].startswith(f"error [{code}]: ")
    assert "4711" not in said
    job = Board(queue).read("h0", "a")
    assert (job.state, job.step) == ("failed", "transfer")
    assert job.error is not None
    assert (job.error.code, job.error.stage, job.error.site) == (code, "transfer", "h0")
    assert "4711" not in job.model_dump_json()
    ask(queue, "h0", "a", classes=["basophil"], budget=0.01)  # another question: it waits again
    taken = {j.query: j.state for j in work(queue, load_params(queue))}
    assert taken == {"a": "failed", "b": "answered"}


def test_a_fault_names_its_place_in_the_package() -> None:
    with pytest.raises(ValueError, match="invalid literal") as caught:
        Job.model_validate_json(int("4711x"))  # type: ignore[arg-type]
    assert typed(caught.value).message == "an unforeseen ValueError"
    with pytest.raises(AttributeError) as inside:
        _Worker.answer(None)  # type: ignore[arg-type]
    assert "an unforeseen AttributeError in qkt_clinical/jobs/run.py, line " in typed(inside.value).message
    same = QueryError("said", remedy="do")
    assert typed(same) is same


@pytest.mark.parametrize("end", [KeyboardInterrupt, SystemExit])
def test_who_ends_the_process_interrupts_the_job(
    queue: Path, monkeypatch: pytest.MonkeyPatch, end: type[BaseException]
) -> None:
    let_fail(monkeypatch, end())
    with pytest.raises(end):
        run(queue, "h0", "a", load_params(queue))
    assert Board(queue).read("h0", "a").state == "interrupted"


def test_a_disk_that_takes_no_record_ends_neither_worker_nor_queue(
    queue: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    let_fail(monkeypatch, full())
    write = Board.write

    def refuse(self: Board, job: Job) -> None:
        if job.query == "a":
            raise full()
        write(self, job)

    monkeypatch.setattr(Board, "write", refuse)
    taken = {j.query: j for j in work(queue, load_params(queue))}
    assert {name: j.state for name, j in taken.items()} == {"a": "failed", "b": "answered"}
    assert taken["a"].error is not None
    assert taken["a"].error.code == "disk-full"
    assert command(queue, capsys, "query", "run", "h0", "a")[0] == 1
    assert Board(queue).read("h0", "a").state == "waiting", "nothing could be written of it"


def test_a_lock_that_cannot_be_made_is_a_failure_that_is_told(queue: Path) -> None:
    for name in ("a", "b"):
        (queue / ".qkt" / "jobs" / f"h0.{name}.lock").mkdir(parents=True)
    taken = work(queue, load_params(queue))
    assert [(j.query, j.state, j.error and j.error.code) for j in taken] == [
        ("a", "failed", "system"),
        ("b", "failed", "system"),
    ]


def test_a_hospital_that_is_not_there_is_named_with_those_that_are(
    queue: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verbs = [(v, "nosuch") for v in ("list", "work", "status")]
    for words in [*verbs, ("status", "nosuch", "a"), ("plan", "nosuch", "a"), ("run", "nosuch", "a")]:
        code, said = command(queue, capsys, "query", *words)
        assert (code, said) == (
            1,
            "error [config]: no hospital 'nosuch' (site nosuch). Known sites: h0.\n",
        ), words


# --- what a job is made of, and what it holds -----------------------------------------------------


def test_after_the_mask_has_changed_a_job_answers_anew(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import qkt_clinical.stages.transfer as stage

    params = load_params(root)
    made: list[Any] = []
    transfer = stage.transfer_query

    def noted(*given: Any, **named: Any) -> Any:
        made.append(given)
        return transfer(*given, **named)

    monkeypatch.setattr(stage, "transfer_query", noted)

    def transfers(changed: Params) -> int:
        made.clear()
        assert run(root, "h0", "rare", changed).state == "answered"
        return len(made)

    assert transfers(params) == 1
    first = outputs_of(root)
    assert transfers(params) == 0
    threshold = params.model_copy(update={"mask": params.mask.model_copy(update={"threshold": 0.011})})
    assert transfers(threshold) == 1, "it decides whom the transfer believes"
    assert transfers(threshold) == 0
    gate_alone = {"gate": threshold.gate.model_copy(update={"calibration": 0.9})}
    assert transfers(threshold.model_copy(update=gate_alone)) == 0
    assert transfers(params) == 1
    assert outputs_of(root) == first


def test_a_job_holds_what_it_needs_whatever_the_pipeline_removes(
    root: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``dvc repro`` clears a stage's outputs before the stage asks for the query's lock."""
    params = load_params(root)
    assert run(other, "h0", "rare", params).state == "answered"
    space = Workspace(root)

    def clear() -> None:
        for folder in (space.fetched("h0", "rare"), space.student("h0", "rare")):
            shutil.rmtree(folder, ignore_errors=True)

    begin = _Worker._begin

    def begin_beside_a_pipeline(self: _Worker, step: str) -> None:
        begin(self, step)
        if step == "transfer":
            clear()

    put_back = _Worker._put_back

    def put_back_after_a_pipeline(self: _Worker) -> None:
        clear()
        put_back(self)

    monkeypatch.setattr(_Worker, "_begin", begin_beside_a_pipeline)
    monkeypatch.setattr(_Worker, "_put_back", put_back_after_a_pipeline)
    assert run(root, "h0", "rare", params).state == "answered"
    assert outputs_of(root) == outputs_of(other)
    assert [p.name for p in (space.scratch / "jobs").iterdir() if p.is_dir()] == [], "nothing is left of it"


def test_what_a_job_may_work_with_is_not_cleared_before_its_lock_is_asked() -> None:
    body = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    for stage in ("plan", "transfer"):
        for out in body[stage]["do"]["outs"]:
            assert [settings["persist"] for settings in out.values()] == [True]


# --- a disk that takes nothing --------------------------------------------------------------------

COMMANDS = (
    ["train", "h0"],
    ["mask", "h0"],
    ["gate"],
    ["report"],
    ["track"],
    ["query", "new", "h0", "more", "--classes", "basophil"],
    ["query", "run", "h0", "rare"],
    ["query", "cancel", "h0", "rare"],
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace with everything that any command reads."""
    root = tmp_path_factory.mktemp("whole")
    write_federation(root)
    params = sample_params(sites=3, device="cpu", train={"epochs": 1, "batch_size": 8})
    write_sample_run(root, params, weights=True)
    prepare(root, params)
    (root / "params.yaml").write_text(yaml.safe_dump(params.model_dump(mode="json")), encoding="utf-8")
    return root


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (errno.ENOSPC, "disk-full"),
        (errno.EDQUOT, "disk-full"),
        (errno.EROFS, "system"),
        (errno.EACCES, "system"),
    ],
)
@pytest.mark.parametrize("words", COMMANDS, ids=lambda w: "-".join(w[:2]))
def test_a_disk_that_takes_nothing_is_one_typed_line(
    whole: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    number: int,
    code: str,
) -> None:
    def refuse(target: Path, ending: str) -> Path:
        raise OSError(number, os.strerror(number), str(target))

    monkeypatch.setattr(files, "_passing", refuse)
    before = digest_folder(whole / "models"), digest_folder(whole / "hospitals")
    ended, said = command(whole, capsys, *words)
    assert ended == 1
    lines = [line for line in said.splitlines() if line.startswith("error")]
    assert lines == [said.splitlines()[-1]]
    assert lines[0].startswith(f"error [{code}]: "), said
    assert "Traceback" not in said
    if words[0] != "mask":  # whose own file is cleared, so that none of another bundle stays
        assert (digest_folder(whole / "models"), digest_folder(whole / "hospitals")) == before


@pytest.mark.parametrize("stage", ["train", "report"])
def test_stages_of_the_pipeline_end_with_one_typed_line(
    capsys: pytest.CaptureFixture[str], stage: str
) -> None:
    with pytest.raises(SystemExit) as ended, errors_as_lines(stage):
        raise full()
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error [disk-full]: the disk is full (stage {stage}). Make room on it")
    assert said.count("\n") == 1


@pytest.mark.parametrize(("error", "code"), ENDS, ids=lambda v: v if isinstance(v, str) else type(v).__name__)
def test_whatever_ends_a_command_it_is_one_line(
    capsys: pytest.CaptureFixture[str], error: Exception, code: str
) -> None:
    with pytest.raises(SystemExit) as ended, errors_as_lines("report"):
        raise error
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith(f"error [{code}]: ")
    assert said.count("\n") == 1
    assert "4711" not in said


def test_an_error_that_wraps_a_full_disk_is_one() -> None:
    def wrapped() -> None:
        try:
            raise full()
        except OSError as error:
            raise LibraryError("cannot be done") from error

    with pytest.raises(LibraryError) as caught:
        wrapped()
    assert typed(caught.value).code == "disk-full"


def test_what_a_terminal_would_obey_is_shown_as_its_escape(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit), errors_as_lines():
        raise QktError("a\x1b[2J\r\nb\udcff", remedy="c\x07")
    assert capsys.readouterr().err == "error [error]: a\\x1b[2J\\r\\nb\\udcff. c\\x07\n"
