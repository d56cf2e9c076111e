"""Model cards as Markdown, and as one line for the registry."""

from __future__ import annotations

import html
from collections.abc import Sequence

from qkt_clinical.records.base import Estimate
from qkt_clinical.records.model_card import Calibration, CardFigure, ModelCard, PointEstimate

# --- for people -------------------------------------------------------------------------------------


def _plain(text: str) -> str:
    """Escape names from elsewhere for Markdown and for the HTML made from it."""
    escaped = html.escape(" ".join(text.split()), quote=False)
    return "".join(f"\\{c}" if c in r"\`*_[]|#" else c for c in escaped)


def _shown(estimate: Estimate | PointEstimate | None, *, change: bool = False) -> str:
    """A figure in percent; a dash if there is none, or it is suppressed."""
    from qkt_clinical.common.wording import percent, percents, points

    if estimate is None:
        return "–"
    if change:
        text = points(estimate.value)
        if isinstance(estimate, PointEstimate):
            return text
        return f"{text} ({points(estimate.low)} to {points(estimate.high)})"
    text = percent(estimate.value)
    if isinstance(estimate, PointEstimate):
        return text
    return f"{text} ({percents(estimate.low, estimate.high)})"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    if not rows:
        return []
    lines = [head, ["---"] * len(head), *rows]
    return [*(f"| {' | '.join(line)} |" for line in lines), ""]


def _figure_table(figures: Sequence[CardFigure]) -> list[str]:
    rows = [
        [
            _plain(f.name if f.class_name is None else f"{f.name}, {f.class_name}"),
            _shown(f.before),
            _shown(f.after),
            _shown(f.change, change=True),
        ]
        for f in figures
    ]
    return _table(("figure", "before", "after", "change in points"), rows)


def _items(texts: Sequence[str], none: str) -> list[str]:
    return [*(f"- {_plain(text)}" for text in texts or (none,)), ""]


def _error(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} ({estimate.low:.3f} to {estimate.high:.3f})"


def _errors(calibration: Calibration) -> str:
    if calibration.ece is None or calibration.ece_before is None:
        return ""
    return f"Expected calibration error {_error(calibration.ece)}, before {_error(calibration.ece_before)}. "


def _false_queries(calibration: Calibration) -> str:
    rate = "suppressed" if calibration.given_away is None else f"{100 * calibration.given_away:.1f}%"
    return f"False-query rate {rate}, budget {100 * calibration.budget:.1f}%"


def to_summary(card: ModelCard) -> str:
    """The card in a few lines of Markdown, for the description of a registered version."""
    head = [figure for figure in card.figures if figure.class_name is None]
    recall = [
        f for f in card.figures if f.name == "recall" and (f.class_name in card.asked or not card.asked)
    ]
    teachers = ", ".join(t.site for t in card.method.teachers)
    lines = [
        f"**{_plain(card.name)}**: {_plain(card.method.name)} of {_plain(card.site)}."
        + (f" Asked for: {_plain(', '.join(card.asked))}." if card.asked else "")
        + f" Answers for {_plain(', '.join(card.answers_for)) or 'no class'}."
        + (f" Teachers: {_plain(teachers)}." if teachers else ""),
        "",
        "Not for diagnosis. Gate: " + card.gate + ".",
        "",
        *_figure_table([*head, *recall][:20]),
        "Known failures:",
        "",
        *_items([f.text for f in card.known_failures[:12]], "none found by rule"),
    ]
    if card.calibration is not None:
        lines += [f"{_errors(card.calibration)}{_false_queries(card.calibration)}.", ""]
    lines.append(f"Bundle `{card.provenance.bundle}`, data `{card.provenance.data or 'not here'}`.")
    return "\n".join(lines) + "\n"


def _data_lines(card: ModelCard) -> list[str]:
    lines = []
    if card.data is None:
        lines += [f"The data of {_plain(card.site)} is not here.", ""]
    else:
        d = card.data
        lines += [
            f"{_plain(d.site)}, source {d.source_kind}. Images, in brackets patients:",
            "",
        ]
        names = sorted({c for found in d.images.values() for c in found})
        rows = [
            [f"{s} ({d.patients.get(s, '0')})", *(d.images[s].get(c, "0") for c in names)] for s in d.images
        ]
        lines += _table(["split", *map(_plain, names)], rows)
    if card.tested is not None:
        t = card.tested
        lines += [f"Tested on {t.on}. Hospitals: {_plain(', '.join(t.sites)) or 'not known'}.", ""]
        lines += _table(("class", "images"), [[_plain(c), n] for c, n in t.images.items()])
    return lines


def to_markdown(card: ModelCard) -> str:
    """The whole card, readable."""
    from qkt_clinical.common.wording import size

    m, p = card.method, card.provenance
    kind = "Teacher" if card.kind == "teacher" else "Student"
    lines = [
        f"# {kind} {_plain(card.name)}",
        "",
        "## Use",
        "",
        _plain(card.intended_use),
        "",
        f"**{_plain(card.not_intended)}**",
        "",
        f"Answers for: {_plain(', '.join(card.answers_for)) or 'no class'}.",
        "",
        "## Known failures",
        "",
        *_items([f.text for f in card.known_failures], "none found by rule"),
        "## Figures",
        "",
    ]
    if card.tested is not None and card.tested.confidence is not None:
        lines += [f"In brackets {100 * card.tested.confidence:g}% intervals over patients.", ""]
    lines += _figure_table(card.figures)
    if card.gain_p is not None:
        lines += [f"Paired test of the gain in balanced accuracy: p = {card.gain_p:.3g}.", ""]
    lines += [f"Gate: {card.gate}.", ""]
    if card.calibration is not None:
        c = card.calibration
        lines += [
            "## Calibration and operating point",
            "",
            f"{_errors(c)}{_false_queries(c)}, on the {c.own_images} of the hospital's own images on which "
            "it was set.",
            "",
            *_table(("class asked for", "offset"), [[_plain(n), f"{v:+.4f}"] for n, v in c.offsets.items()]),
        ]
    lines += ["## Data", "", *_data_lines(card)]
    shape = "x".join(map(str, m.input.shape))
    lines += [
        "## Method",
        "",
        f"{_plain(m.words)} Network {m.network.name}, {size(m.bytes)}, input {shape} "
        f"({m.input.normalisation}), {m.passes_per_prediction} passes per prediction. "
        f"Request: {m.request}. Answer: {m.response}.",
        "",
        *_table(("teacher", "why"), [[_plain(t.site), _plain(t.reason)] for t in m.teachers]),
        *_table(("setting", "value"), [[_plain(k), _plain(str(v))] for k, v in sorted(m.settings.items())]),
        "## Privacy",
        "",
        *_items(card.privacy, "nothing is known"),
        "## Provenance",
        "",
    ]
    digests = {
        "bundle": p.bundle,
        "weights": p.weights,
        "data": p.data or "not here",
        **{f"teacher {name}": digest for name, digest in p.teachers.items()},
        "parameters": p.parameters,
        "evaluation": p.evaluation or "none",
        "trained with qkt-clinical": p.trained_with or "not known",
        "described with qkt-clinical": p.described_with,
    }
    lines += _table(("what", "SHA-256 or version"), [[_plain(k), _plain(v)] for k, v in digests.items()])
    return "\n".join(lines).rstrip("\n") + "\n"
