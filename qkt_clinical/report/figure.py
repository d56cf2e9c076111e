"""The static figure that the README shows."""

from __future__ import annotations

import io
from pathlib import Path

from qkt_clinical.common.files import write_bytes
from qkt_clinical.common.wording import words
from qkt_clinical.config.loading import load_params
from qkt_clinical.config.workspace import Workspace
from qkt_clinical.records.outputs import read_outputs

OWN, ANSWERED, LINE = "#8a94a0", "#0b5c8a", "#c9d0d6"


def write_figure(root: Path) -> Path:
    """Write ``reports/gain.png``, balanced accuracy before and after per query, and return its path.

    Same outputs and same matplotlib: same bytes.

    Raises:
        OutputsError, BundleError, PreparedError: see :func:`qkt_clinical.records.outputs.read_outputs`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    evaluations = [q.evaluation for q in read_outputs(root, load_params(root)).queries]
    figure = Figure(figsize=(8, 1.4 + 0.42 * len(evaluations)), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for row, evaluation in enumerate(evaluations):
        before, after = evaluation.before.balanced_accuracy, evaluation.after.balanced_accuracy
        axes.plot([100 * before.value, 100 * after.value], [row, row], color=LINE, linewidth=3, zorder=1)
        for one, colour in ((before, OWN), (after, ANSWERED)):
            axes.plot([100 * one.low, 100 * one.high], [row, row], color=colour, linewidth=1.2, zorder=2)
        axes.scatter(100 * before.value, row, s=52, facecolor="white", edgecolor=OWN, linewidth=2, zorder=3)
        axes.scatter(100 * after.value, row, s=60, color=ANSWERED, zorder=4)
    axes.set_yticks(
        range(len(evaluations)), [f"{e.hospital} asks for {words(e.classes)}" for e in evaluations]
    )
    axes.scatter([], [], s=52, facecolor="white", edgecolor=OWN, linewidth=2, label="own model")
    axes.scatter([], [], s=60, color=ANSWERED, label="after the query")
    figure.legend(loc="outside upper right", ncols=2, frameon=False, fontsize=9)
    axes.set_xlabel("balanced accuracy on held-out patients, %")
    axes.set_xlim(0, 100)
    axes.invert_yaxis()
    axes.grid(axis="x", color="#e6eaed", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    path = Workspace(root).reports / "gain.png"
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", metadata={"Software": None}, facecolor="white")
    write_bytes(path, drawn.getvalue())
    return path
