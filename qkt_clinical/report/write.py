"""Writes the report's pages into a workspace: the only place that knows both pages and model cards."""

from __future__ import annotations

from pathlib import Path

from qkt_clinical.common.files import new_folder, write_text
from qkt_clinical.config.params import Params
from qkt_clinical.config.workspace import Workspace
from qkt_clinical.records.outputs import read_outputs
from qkt_clinical.report.index_page import render_index
from qkt_clinical.report.model_card import (
    student_model_card,
    teacher_model_card,
    unmeasured_model_card,
)
from qkt_clinical.report.pictures import flipped_cases
from qkt_clinical.report.query_page import render_query, render_unmeasured


def write_report(root: Path, params: Params) -> Path:
    """Write ``reports/index.html`` and ``reports/queries/<hospital>/<query>.html``; return the first's path.

    Pages of queries that are no longer answered are gone afterwards.

    Raises:
        OutputsError, BundleError, PreparedError: see :func:`qkt_clinical.records.outputs.read_outputs` and
            :func:`qkt_clinical.report.pictures.flipped_cases`.
    """
    reports = Workspace(root).reports
    outputs = read_outputs(root, params)
    teachers = {s.name: teacher_model_card(s, params) for s in outputs.sites if s.card is not None}
    index = render_index(outputs, teachers)
    with new_folder(reports / "queries") as folder:
        for query in outputs.queries:
            page = folder / query.evaluation.hospital / f"{query.evaluation.query}.html"
            card = student_model_card(query, outputs)
            write_text(page, render_query(outputs, query, card, flipped_cases(root, outputs, query)))
        for answer in outputs.unmeasured:
            page = folder / answer.plan.hospital / f"{answer.plan.query}.html"
            write_text(page, render_unmeasured(outputs, answer, unmeasured_model_card(answer, outputs)))
    path = reports / "index.html"
    write_text(path, index)
    return path
