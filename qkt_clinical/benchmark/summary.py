"""Summary of rows with intervals, and its Markdown tables. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qkt_clinical.benchmark.settings import BenchmarkSettings
from qkt_clinical.catalog import (
    BASELINES,
    BENCHMARK_METHODS,
    DEFAULT_ESTIMATOR,
    ESTIMATORS,
    METHODS,
    OWN_WITH_QUERY,
    WITH_ENCODER,
)
from qkt_clinical.common.seeding import derive
from qkt_clinical.evaluation.metrics import DIGITS, Floats

Row = Mapping[str, Any]
Interval = dict[str, float]

FIELDS = (
    "query_accuracy",
    "retained_accuracy",
    "balanced_accuracy",
    "forgetting",
    "auroc",
    "ece",
    "seconds",
    "bytes_moved",
    "rounds",
    "passes_per_prediction",
    "cost_per_prediction",
)
DRAWS = 2000
LAMBDAS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
"""Thresholds of the mask curve, each given to all teachers alike."""
NOTE = (
    "mean and 95 % interval: percentile bootstrap over (seed, student) clusters, 2000 draws, fixed seed; "
    "the queries of one student share its images and networks"
)


SITES_NOTE = (
    "mean and 95 % interval: percentile bootstrap over sites and within them over patients (images where no "
    "patient is known; AUROC, ECE and costs over sites alone), 2000 draws, fixed seed; a class counts where "
    "at least five images of it judge"
)

RowKey = tuple[int, str, str, str]
Resampled = Mapping[RowKey, Floats]
"""Of rows the first four of ``FIELDS`` under other draws of the images that judge, (draws, 4)."""


def row_key(row: Row) -> RowKey:
    """Seed, student, query and method."""
    return row["seed"], row["student"], row["query"], row["method"]


def _cluster(row: Row) -> tuple[Any, ...]:
    """What is drawn as a whole: a partition's hospital, or a real site with the rows of all seeds."""
    return (row["student"],) if "test_images" in row else (row["seed"], row["student"])


def drawn_means(rows: Sequence[Row], values: Floats) -> Floats:
    """Means (draws, columns) over the rows, whole clusters drawn with replacement.

    Args:
        rows: N rows, of which seed and student are read.
        values: (N, columns), or (draws, N, columns) where they differ from draw to draw.
    """
    names = [_cluster(r) for r in rows]
    position = {name: i for i, name in enumerate(dict.fromkeys(sorted(names)))}
    member: NDArray[np.float64] = np.zeros((len(position), len(rows)))
    for column, name in enumerate(names):
        member[position[name], column] = 1.0
    count = len(position)
    random = np.random.default_rng(derive(0, "benchmark", "bootstrap"))
    drawn = random.multinomial(count, np.full(count, 1 / count), size=DRAWS).astype(np.float64)
    alike = values.ndim == 2
    sums = drawn @ (member @ values) if alike else np.einsum("dn,dnc->dc", drawn @ member, values)
    means: Floats = sums / (drawn @ member.sum(axis=1))[:, None]
    return means


def cluster_intervals(rows: Sequence[Row], values: Floats, resampled: Floats | None = None) -> list[Interval]:
    """Mean and 95 % interval of every column, whole clusters drawn with replacement.

    Args:
        rows: N rows, of which seed and student are read.
        values: (N, columns).
        resampled: (draws, N, columns), the same in each draw of the images that judge.
    """
    means = drawn_means(rows, values if resampled is None else resampled)
    low, high = np.quantile(means, [0.025, 0.975], axis=0)
    columns = zip(values.mean(axis=0), low, high, strict=True)
    return [
        {k: round(float(v), DIGITS) for k, v in zip(("mean", "low", "high"), each, strict=True)}
        for each in columns
    ]


def _of(rows: Sequence[Row], field: str) -> Floats:
    return np.array([float(r[field]) for r in rows])


def by_method(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows of every method, in the order of the questions."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["method"], []).append(row)
    return found


def best_baseline(rows: Sequence[Row]) -> str | None:
    """The baseline with the highest mean balanced accuracy, or None without baselines."""
    means = {m: _of(r, "balanced_accuracy").mean() for m, r in by_method(rows).items() if m in BASELINES}
    return max(means, key=lambda m: means[m]) if means else None


def base_of(ablation: str) -> str:
    """The method that an ablation changes: the one that its name begins with, or ``qkt``."""
    name = ablation.removeprefix("ablation/")
    named = [m for m in (*BENCHMARK_METHODS, *WITH_ENCODER) if name.startswith(f"{m}-")]
    return max(named, key=len, default="qkt")


def _values(rows: Sequence[Row], fields: Sequence[str], resampled: Resampled | None) -> Floats:
    """Fields of rows (1 + draws, rows, fields): as measured, and under other draws where there are such."""
    points = np.stack([_of(rows, field) for field in fields], axis=1)
    if resampled is None:
        return points[None]
    values = np.broadcast_to(points, (1 + DRAWS, *points.shape)).copy()
    known = [(i, FIELDS.index(f)) for i, f in enumerate(fields) if f in FIELDS[:4]]
    for n, row in enumerate(rows):
        for column, place in known:
            values[1:, n, column] = resampled[row_key(row)][:, place]
    return values


def _intervals(rows: Sequence[Row], values: Floats) -> list[Interval]:
    """Of values as :func:`_values` gives them, or differences of such."""
    return cluster_intervals(rows, values[0], values[1:] if len(values) > 1 else None)


def share_of_the_way(rows: Sequence[Row], gained: Floats, possible: Floats) -> Interval | None:
    """Mean gain over the own network in units of the mean gain that the hidden images would bring.

    Args:
        rows: N rows, one a question.
        gained, possible: gains in balanced accuracy (1 + draws, N).

    Returns:
        None where the hidden images bring nothing, or do not in more than one draw in forty: a share of
        next to nothing says nothing.
    """
    both = np.stack([gained, possible], axis=2)
    above, below = drawn_means(rows, both[1:] if len(both) > 1 else both[0]).T
    some = below > 0
    if possible[0].mean() <= 0 or some.mean() < 0.975:
        return None
    low, high = np.quantile(above[some] / below[some], [0.025, 0.975])
    each = gained[0].mean() / possible[0].mean(), low, high
    return {k: round(float(v), DIGITS) for k, v in zip(("mean", "low", "high"), each, strict=True)}


def summarise(rows: Sequence[Row], resampled: Resampled | None = None) -> dict[str, Any]:
    """Mean of every field per method with its interval, and differences of QKT's methods to the baselines.

    ``query_gain_over_peers`` is query accuracy less the mean of all baselines' on the same query (the key
    names of ``benchmark.json`` stay),
    ``lead_over_best_peer`` balanced accuracy less that of :func:`best_baseline`; an ablation's ``change`` is
    against the method that it changes, ``base``. All are paired by query. ``share_of_the_way``: see there.

    Args:
        rows: every method's in one order of the questions.
        resampled: of real hospitals' rows.
    """
    methods = by_method(rows)
    baselines = [m for m in methods if m in BASELINES]
    best = best_baseline(rows)
    summary: dict[str, Any] = {}
    for method, own in methods.items():
        columns = _values(own, FIELDS, resampled)
        entry: dict[str, Any] = dict(zip(FIELDS, _intervals(own, columns), strict=True))
        if method in METHODS and best is not None:
            every = np.stack([_values(methods[b], FIELDS[:1], resampled) for b in baselines])
            gain = columns[..., :1] - every.mean(axis=0)
            lead = columns[..., 2:3] - _values(methods[best], FIELDS[2:3], resampled)
            paired = _intervals(own, np.concatenate([gain, lead], axis=2))
            entry |= {"query_gain_over_peers": paired[0], "lead_over_best_peer": paired[1], "best_peer": best}
        if method.startswith("ablation/") and base_of(method) in methods:
            before = methods[base_of(method)]
            moved = columns[..., :3] - _values(before, FIELDS[:3], resampled)
            change = dict(zip(FIELDS[:3], _intervals(own, moved), strict=True))
            entry |= {"base": base_of(method), "change": change}
        if method not in ("local", OWN_WITH_QUERY) and {"local", OWN_WITH_QUERY} <= set(methods):
            start, end = (_values(methods[m], FIELDS[2:3], resampled) for m in ("local", OWN_WITH_QUERY))
            share = share_of_the_way(own, (columns[..., 2:3] - start)[..., 0], (end - start)[..., 0])
            entry |= {"share_of_the_way": share}
        summary[method] = {**entry, "n": len(own)}
    return summary


def budget_curves(rows: Sequence[Row]) -> dict[str, list[dict[str, float]]]:
    """Mean accuracies at every budget of the methods of QKT, over the questions that teachers answered."""
    curves: dict[str, list[dict[str, float]]] = {}
    for method, own in by_method(rows).items():
        each = [r["curve"] for r in own if r["curve"] is not None]
        if method not in METHODS or not each:
            continue
        fields = ("budget", *FIELDS[:4])
        points = [[{f: curve[i][f] for f in fields} for curve in each] for i in range(len(each[0]))]
        curves[method] = [
            {f: round(float(np.mean([p[f] for p in point])), DIGITS) for f in fields} for point in points
        ]
    return curves


def mask_figures(judged: Sequence[Mapping[str, Any]], settings: BenchmarkSettings) -> dict[str, Any]:
    """Quality of every estimator's masks over all teachers of all seeds.

    Args:
        judged: per teacher ``masks`` (by estimator), ``held`` and ``recalled`` (per class).

    Returns:
        Per estimator precision, recall, F1, AUC and the curve over lambda, by the truth that ``truth``
        names; the same figures by both truths under their names.
    """
    import torch

    from qkt_clinical.benchmark.mask_quality import quality, threshold_curve
    from qkt_clinical.benchmark.methods import primary_truth

    truths = {kind: torch.tensor([j[kind] for j in judged]) for kind in ("held", "recalled")}
    primary = primary_truth(settings)
    found: dict[str, Any] = {}
    for estimator in ESTIMATORS:
        masks = [j["masks"][estimator] for j in judged]
        scores = torch.tensor([m["scores"] for m in masks], dtype=torch.float64)
        known = torch.tensor([m["known"] for m in masks])
        figures = {}
        for kind, truth in truths.items():
            q = quality(scores, known, truth)
            values = {"precision": q.precision, "recall": q.recall, "f1": q.f1, "auc": q.auc}
            figures[kind] = {k: round(v, DIGITS) for k, v in values.items()}
        curve = threshold_curve(scores, truths[primary], LAMBDAS)
        found[estimator] = {
            **figures[primary],
            **figures,
            "truth": primary,
            "default": estimator == DEFAULT_ESTIMATOR,
            "curve": [{k: round(v, DIGITS) for k, v in point.items()} for point in curve],
        }
    return found


# --- Markdown -------------------------------------------------------------------------------------


def _percent(entry: Interval) -> str:
    return f"{100 * entry['mean']:.1f} ({100 * entry['low']:.1f} to {100 * entry['high']:.1f})"


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def _megabytes(count: float) -> str:
    """Tenths, of less than a tenth hundredths: class means alone are some kilobytes."""
    return f"{count / 1e6:.1f}" if not 0 < count < 1e5 else f"{count / 1e6:.2f}"


def methods_table(summary: Mapping[str, Any]) -> str:
    """Methods by balanced accuracy, shares in percent with their intervals; ablations apart."""
    shown = [m for m in summary if "base" not in summary[m]]
    ranked = sorted(shown, key=lambda m: (-summary[m]["balanced_accuracy"]["mean"], m))
    way = ["share of the way"] if any("share_of_the_way" in summary[m] for m in shown) else []
    lines = [
        [
            f"`{method}`",
            *(_percent(summary[method][field]) for field in FIELDS[:3]),
            *(_percent(share) if (share := summary[method].get("share_of_the_way")) else "" for _ in way),
            *(_percent(summary[method][field]) for field in FIELDS[3:6]),
            f"{summary[method]['seconds']['mean']:.1f}",
            _megabytes(summary[method]["bytes_moved"]["mean"]),
            f"{summary[method]['rounds']['mean']:.1f}",
            f"{summary[method]['passes_per_prediction']['mean']:.1f}",
            f"{summary[method]['cost_per_prediction']['mean']:.1f}",
            str(summary[method]["n"]),
        ]
        for method in ranked
    ]
    header = [
        "method",
        *("query", "retained", "balanced", *way, "forgetting", "AUROC", "ECE"),
        *("seconds", "MB moved", "rounds", "passes", "cost", "queries"),
    ]
    return _table(header, lines)


def ablations_table(summary: Mapping[str, Any]) -> str:
    """Difference of every ablation from its method, in percentage points, method by method, best first."""
    shown = [m for m in summary if "base" in summary[m]]
    ranked = sorted(
        shown, key=lambda m: (summary[m]["base"], -summary[m]["change"]["balanced_accuracy"]["mean"], m)
    )
    lines = [
        [
            f"`{method.removeprefix('ablation/')}`",
            f"`{summary[method]['base']}`",
            *(_percent(summary[method]["change"][field]) for field in FIELDS[:3]),
            f"{100 * summary[method]['balanced_accuracy']['mean']:.1f}",
            f"{summary[method]['cost_per_prediction']['mean']:.1f}",
            str(summary[method]["n"]),
        ]
        for method in ranked
    ]
    header = ["ablation", "of", "query", "retained", "balanced", "balanced reached", "cost", "queries"]
    return _table(header, lines)


def queries_table(rows: Sequence[Row], by: str = "query") -> str:
    """Per query the mean query and balanced accuracy of QKT's methods and the best baseline, in percent.

    Args:
        by: the field of which every value has a line: ``query`` or ``student``.
    """
    shown = [m for m in (*METHODS, best_baseline(rows)) if m in by_method(rows)]
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row[by], []).append(row)
    lines = []
    for query, asked in sorted(found.items()):
        methods = by_method(asked)
        each = [
            f"{100 * _of(methods[m], 'query_accuracy').mean():.1f} / "
            f"{100 * _of(methods[m], 'balanced_accuracy').mean():.1f}"
            for m in shown
        ]
        lines.append([query, *each, str(len(methods[shown[0]]))])
    return _table([by, *(f"`{m}`" for m in shown), "asked"], lines)


def markdown(result: Mapping[str, Any]) -> str:
    """``benchmark.md``: methods by balanced accuracy, masks, environment and settings."""
    summary: Mapping[str, Any] = result["summary"]
    parts = [
        "# Benchmark",
        f"Percent, {result['intervals']}. Seconds to answer a query with teachers given (federations: their "
        "training). Cost: multiply-adds of a prediction in units of the hospital's own network.",
        methods_table(summary),
    ]
    compared = [m for m in METHODS if "best_peer" in summary.get(m, {})]
    if compared:
        parts += [
            "## Against the baselines",
            _table(
                [
                    "method",
                    "query accuracy above the mean of the baselines",
                    "balanced accuracy above the best",
                ],
                [
                    [
                        f"`{m}`",
                        _percent(summary[m]["query_gain_over_peers"]),
                        f"{_percent(summary[m]['lead_over_best_peer'])}, `{summary[m]['best_peer']}`",
                    ]
                    for m in compared
                ],
            ),
        ]
        parts += ["## Query by query", "Query accuracy / balanced accuracy.", queries_table(result["rows"])]
        if "test_images" in result["rows"][0]:
            parts += ["## Site by site", queries_table(result["rows"], "student")]
    if any("base" in entry for entry in summary.values()):
        said = "Change against the method itself, in points, paired by question."
        parts += ["## Ablations", said, ablations_table(summary)]
    masks: Mapping[str, Any] = result["masks"]
    truth = next(iter(masks.values()))["truth"]
    meaning = {"held": "the teacher was trained on the class", "recalled": "it recalls more than half of it"}
    parts += [
        "## Masks",
        f"All teachers and classes pooled, threshold automatic; known means that {meaning[truth]}.",
        _table(
            ["estimator", "precision", "recall", "F1", "AUC"],
            [
                [f"`{name}`" + (" (default)" if m["default"] else "")]
                + [f"{m[k]:.3f}" for k in ("precision", "recall", "f1", "auc")]
                for name, m in masks.items()
            ],
        ),
    ]
    for title in ("environment", "settings"):
        parts += [f"## {title.capitalize()}", _table(["", ""], _flat(result[title]))]
    return "\n\n".join(parts) + "\n"


def _flat(block: Mapping[str, Any], prefix: str = "") -> list[list[str]]:
    """Names and values of a nested block."""
    lines: list[list[str]] = []
    for name, value in block.items():
        if isinstance(value, Mapping):
            lines += _flat(value, f"{prefix}{name}.")
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            lines.append([f"`{prefix}{name}`", text])
    return lines
