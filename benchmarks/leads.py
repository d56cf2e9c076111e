"""How far one method of a benchmark lies above another, paired by question, and how often below.

``python -m benchmarks.leads --run FOLDER --pairs qkt:statistics qkt:ensemble-prob [...]``

``FOLDER`` holds a run of ``qkt benchmark``. Balanced accuracy in points: mean and 95 % interval, whole
hospitals drawn with replacement (of real sites all seeds together, and no images).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.tables import Row, markdown
from qkt_clinical.benchmark.runner import RESULT
from qkt_clinical.benchmark.summary import by_method, cluster_intervals


def leads(rows: Sequence[Mapping[str, Any]], pairs: Sequence[tuple[str, str]]) -> Iterator[Row]:
    """A row for each pair of methods, over the questions that both answered.

    Raises:
        KeyError: the run holds no such method.
    """
    methods = by_method([dict(row) for row in rows])
    for one, other in pairs:
        there = {(r["seed"], r["student"], r["query"]): r["balanced_accuracy"] for r in methods[other]}
        both = [r for r in methods[one] if (r["seed"], r["student"], r["query"]) in there]
        differences = np.array(
            [r["balanced_accuracy"] - there[r["seed"], r["student"], r["query"]] for r in both]
        )
        (found,) = cluster_intervals(both, 100 * differences[:, None])
        yield {
            "method": one,
            "above": other,
            "points": f"{found['mean']:.1f} ({found['low']:.1f} to {found['high']:.1f})",
            "questions": len(both),
            "below": int((differences < 0).sum()),
            "worst": f"{100 * differences.min():.1f}",
        }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="folder of a benchmark")
    parser.add_argument("--pairs", nargs="+", required=True, metavar="METHOD:METHOD")
    options = parser.parse_args()
    rows = json.loads((options.run / RESULT).read_text(encoding="utf-8"))["rows"]
    pairs = [(one, other) for one, _, other in (pair.partition(":") for pair in options.pairs)]
    print(markdown(list(leads(rows, pairs))))


if __name__ == "__main__":
    main()
