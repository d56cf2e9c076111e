"""Plots of a benchmark as PNG. The same result and matplotlib give the same bytes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qkt_clinical.benchmark.summary import best_baseline, by_method
from qkt_clinical.catalog import BENCHMARK_METHODS, METHODS, REFERENCES, WITH_ENCODER
from qkt_clinical.common.files import passing_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = {
    "qkt": "#0b5c8a",
    "qkt-light": "#3aa0c9",
    "routed": "#5b3a8c",
    "qkt-statistics": "#b8560f",
    "qkt-means": "#d98b2b",
}
BASELINE_COLOUR, GRID = "#8a94a0", "#e6eaed"
MARKERS = dict(zip((*BENCHMARK_METHODS, *REFERENCES, *WITH_ENCODER), "osD^p1v<>PXooo*hHd843oo", strict=True))
"""Baselines are told apart by shape, QKT's methods by colour."""


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure, axes


def query_against_retained(result: Mapping[str, Any]) -> Figure:
    """Every method's mean query and retained accuracy, with intervals both ways."""
    figure, axes = _figure(8, 6)
    for method in (m for m in MARKERS if m in result["summary"]):
        x, y = (result["summary"][method][k] for k in ("query_accuracy", "retained_accuracy"))
        colour = COLOURS.get(method, BASELINE_COLOUR)
        axes.plot([100 * x["low"], 100 * x["high"]], [100 * y["mean"]] * 2, color=colour, linewidth=1.2)
        axes.plot([100 * x["mean"]] * 2, [100 * y["low"], 100 * y["high"]], color=colour, linewidth=1.2)
        marker = MARKERS[method]
        axes.scatter(
            100 * x["mean"], 100 * y["mean"], s=50, color=colour, marker=marker, label=method, zorder=3
        )
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    axes.set_xlabel("query accuracy, %")
    axes.set_ylabel("retained accuracy, %")
    return figure


def gain_per_query(result: Mapping[str, Any]) -> Figure | None:
    """Gain in balanced accuracy (percentage points) on every query, for ``qkt`` and the best baseline."""
    rows = result["rows"]
    methods, best = by_method(rows), best_baseline(rows)
    if best is None or "qkt" not in methods or "local" not in methods:
        return None
    before = {_question(r): r["balanced_accuracy"] for r in methods["local"]}
    queries = sorted({r["query"] for r in rows})
    figure, axes = _figure(8, 1.6 + 0.4 * len(queries))
    for name, colour, shift in ((best, BASELINE_COLOUR, 0.14), ("qkt", COLOURS["qkt"], -0.14)):
        gains = [100 * (r["balanced_accuracy"] - before[_question(r)]) for r in methods[name]]
        heights = [queries.index(r["query"]) + shift for r in methods[name]]
        axes.scatter(gains, heights, s=28, color=colour, alpha=0.8, label=name)
    axes.axvline(0, color=BASELINE_COLOUR, linewidth=1)
    axes.set_yticks(range(len(queries)), queries)
    axes.set_ylim(len(queries) - 0.5, -0.5)
    axes.set_xlabel("gain in balanced accuracy over the own model, points; one dot per question")
    figure.legend(loc="outside upper right", ncols=2, frameon=False, fontsize=9)
    return figure


def _question(row: Mapping[str, Any]) -> tuple[int, str, str]:
    return row["seed"], row["student"], row["query"]


def lambda_curve(result: Mapping[str, Any]) -> Figure:
    """F1 of every estimator's masks against a common threshold; dashed: the automatic threshold."""
    figure, axes = _figure(8, 5)
    for number, (name, mask) in enumerate(result["masks"].items()):
        colour = f"C{number}"
        width = 2.4 if mask["default"] else 1.2
        axes.plot(
            [p["lambda"] for p in mask["curve"]],
            [p["f1"] for p in mask["curve"]],
            color=colour,
            linewidth=width,
            label=f"{name}, automatic {mask['f1']:.2f}",
        )
        if mask["default"]:
            axes.axhline(mask["f1"], color=colour, linewidth=1, linestyle="--")
    axes.set_xscale("log")
    axes.set_xlabel("threshold λ, given to all teachers")
    axes.set_ylabel("F1 of the masks")
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    return figure


def budget_curve(result: Mapping[str, Any]) -> Figure | None:
    """Query accuracy (full lines) and retained accuracy (dashed) over the budget."""
    curves = result["budget_curves"]
    if not curves:
        return None
    figure, axes = _figure(8, 5)
    for method in (m for m in METHODS if m in curves):
        budgets = [100 * p["budget"] for p in curves[method]]
        for field, style in (("query_accuracy", "-"), ("retained_accuracy", "--")):
            values = [100 * p[field] for p in curves[method]]
            label = f"{method}, {field.split('_')[0]}"
            axes.plot(budgets, values, style, color=COLOURS[method], label=label)
    axes.set_xscale("log")
    axes.set_xticks(budgets, [f"{b:g}" for b in budgets])
    axes.minorticks_off()
    axes.set_xlabel("budget, % of the own calibration images")
    axes.set_ylabel("accuracy, %")
    figure.legend(loc="outside upper center", ncols=3, frameon=False, fontsize=8)
    return figure


PLOTS = {
    "query-retained": query_against_retained,
    "gain": gain_per_query,
    "lambda": lambda_curve,
    "budget": budget_curve,
}


def write_plots(folder: Path, result: Mapping[str, Any]) -> list[Path]:
    """Draw every figure that the rows allow into the folder and return the files."""
    written = []
    for name, draw in PLOTS.items():
        figure = draw(result)
        if figure is None:
            continue
        path = folder / f"{name}.png"
        with passing_file(path) as temporary:
            figure.savefig(temporary, format="png", metadata={"Software": None}, facecolor="white")
        written.append(path)
    return written
