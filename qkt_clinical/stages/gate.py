"""Stage ``gate``: the rules of ``params.yaml`` on every answer, alone and beside the version in use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from qkt_clinical.common.files import digest_folder
from qkt_clinical.common.locks import hold_query
from qkt_clinical.config.params import Params
from qkt_clinical.config.query import QueryRef
from qkt_clinical.config.workspace import Workspace
from qkt_clinical.errors import OutputsError, QktError
from qkt_clinical.evaluation.gate import judge
from qkt_clinical.records.decisions import champion_of
from qkt_clinical.records.evaluation import Evaluation
from qkt_clinical.records.reading import read_record, write_record
from qkt_clinical.records.verdict import Verdict


class NotMeasured(OutputsError):
    """The student has not been evaluated: there is no evaluation, or it is of another student."""

    code = "not-measured"


def gate_one(root: Path, ref: QueryRef, params: Params) -> Verdict:
    """Judge one query and write ``reports/gate/<hospital>/<query>.json``; the caller holds its lock.

    Raises:
        NotMeasured: there is no evaluation of this student; a verdict on another is removed.
        OutputsError: its evaluation is malformed, or decisions are.
    """
    space = Workspace(root)
    path = space.reports / "evaluation" / ref.hospital / f"{ref.query}.json"
    target = space.reports / "gate" / ref.hospital / f"{ref.query}.json"
    champion = champion_of(root, f"student.{ref.hospital}.{ref.query}")
    digest = digest_folder(space.student(ref.hospital, ref.query))
    evaluation = _evaluation(path, ref) if path.exists() else None
    if evaluation is None or evaluation.student != digest:
        target.unlink(missing_ok=True)
        raise NotMeasured(
            f"the student of {ref.query!r} that is here has not been measured",
            remedy=f"Run 'qkt evaluate {ref.hospital} {ref.query}' where the test images are.",
            file=path,
            site=ref.hospital,
            stage="gate",
        )
    verdict = judge(evaluation, params.gate, digest=digest, champion=champion)
    write_record(target, verdict)
    return verdict


def _evaluation(path: Path, ref: QueryRef) -> Evaluation:
    """The evaluation of a query.

    Raises:
        OutputsError: it cannot be read, or is that of another query.
    """
    what, remedy = "no evaluation that can be judged", "Run 'qkt evaluate' first."
    evaluation = read_record(Evaluation, path, site=ref.hospital, stage="gate", what=what, remedy=remedy)
    if (evaluation.hospital, evaluation.query) != (ref.hospital, ref.query):
        raise OutputsError(
            f"{what}: it is that of another query",
            remedy=remedy,
            file=path,
            site=ref.hospital,
            stage="gate",
        )
    return evaluation


def gate_queries(
    root: Path,
    params: Params,
    refs: Sequence[QueryRef] | None = None,
    *,
    skipped: Callable[[QueryRef, QktError], None] | None = None,
) -> list[Verdict]:
    """Judge every query of ``params.yaml``, or those named, see :func:`gate_one`.

    Args:
        skipped: told of each that is not judged since nobody has measured its student.

    Raises:
        Busy: another process works on one of them.
    """
    (Workspace(root).reports / "gate").mkdir(parents=True, exist_ok=True)
    verdicts = []
    for ref in [r for _, r in sorted(params.queries.items())] if refs is None else refs:
        with hold_query(root, ref.hospital, ref.query):
            try:
                verdicts.append(gate_one(root, ref, params))
            except NotMeasured as error:
                if skipped:
                    skipped(ref, error)
    return verdicts
