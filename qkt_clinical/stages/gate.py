"""Stage ``gate``: the rules of ``params.yaml`` on every answer, alone and beside the version in use."""

from __future__ import annotations

import json
from pathlib import Path

from qkt_clinical.config import Params, QueryRef, Workspace
from qkt_clinical.decisions import champion_of
from qkt_clinical.errors import OutputsError
from qkt_clinical.files import digest_folder, write_json
from qkt_clinical.gate import Verdict, judge


def gate_one(root: Path, ref: QueryRef, params: Params) -> Verdict:
    """Judge one query and write ``reports/gate/<hospital>/<query>.json``.

    Raises:
        OutputsError: its evaluation is absent or malformed, or decisions are.
    """
    space = Workspace(root)
    path = space.reports / "evaluation" / ref.hospital / f"{ref.query}.json"
    champion = champion_of(root, f"student.{ref.hospital}.{ref.query}")
    digest = digest_folder(space.student(ref.hospital, ref.query))
    try:
        evaluation = json.loads(path.read_text(encoding="utf-8"))
        verdict = judge(evaluation, params.gate, digest=digest, champion=champion)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise OutputsError(
            "no evaluation that can be judged",
            remedy="Run 'qkt evaluate' first.",
            file=path,
            site=ref.hospital,
            stage="gate",
        ) from None
    write_json(space.reports / "gate" / ref.hospital / f"{ref.query}.json", verdict.model_dump(mode="json"))
    return verdict


def gate_queries(root: Path, params: Params) -> list[Verdict]:
    """Judge every query of ``params.yaml``, see :func:`gate_one`."""
    return [gate_one(root, ref, params) for _, ref in sorted(params.queries.items())]
