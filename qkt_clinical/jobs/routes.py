"""The ways in which a query can be answered: what each would move, reveal and cost. Cards and masks alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from qkt_clinical.catalog import BY_MEANS, ENCODED_METHODS, METHODS, Method
from qkt_clinical.common.wording import size, words
from qkt_clinical.config.params import Params
from qkt_clinical.config.query import QueryConfig
from qkt_clinical.data.prepared import Manifest
from qkt_clinical.errors import QueryError
from qkt_clinical.jobs.cost import expected_seconds, prediction_cost, speed
from qkt_clinical.qkt.planning import make_plan
from qkt_clinical.records.card import Card, told_epsilon
from qkt_clinical.records.plan import Asking, Offer


class Route(NamedTuple):
    """One way to answer a query."""

    method: Method
    impossible: str | None
    """Why it cannot be taken; then nothing else is told."""
    teachers: tuple[str, ...] = ()
    """Sites of which something would be fetched: their networks, but for ``qkt-means``."""
    means: Mapping[str, float | None] = {}
    """Those whose class means could say where the query lies, each with the epsilon of the noise on them."""
    bytes: int = 0
    seconds: float = 0.0
    """Of the transfer on this machine, about."""
    prediction: float = 0.0
    """Multiply-adds of a prediction in units of the own network's."""


def _means(cards: Mapping[str, Card], taught_by: set[str], method: Method) -> dict[str, float | None]:
    """Who can say where the query lies, by class means over the features that the method reads."""
    teaching = {site: card for site, card in cards.items() if site in taught_by}
    if method in ENCODED_METHODS:
        return {s: told_epsilon(c, "shared_epsilon") for s, c in teaching.items() if c.shared_encoder}
    return {s: told_epsilon(c, "means_epsilon") for s, c in teaching.items() if c.class_means}


def routes(
    name: str,
    query: QueryConfig,
    offers: Mapping[str, Offer],
    own: Card,
    manifest: Manifest,
    params: Params,
    device: torch.device,
) -> list[Route]:
    """Every method, in the order of the catalog.

    Args:
        offers: of all teachers, by site.
        own: of the hospital's own network.
    """
    asking, found = Asking.of(manifest, params.shared_encoder, params.train.encoder), []
    fast = speed(own, device)
    for method in METHODS:
        asked = query.model_copy(update={"method": method})
        try:
            plan = make_plan(manifest.site, name, asked, asking, offers.values(), own.image_statistics)
        except QueryError as error:
            found.append(Route(method, f"{error.message}. {error.remedy}"))
            continue
        cards = {site: offers[site].card for site in plan.relevant}
        networks = [] if plan.method == BY_MEANS else list(cards.values())
        taught_by = {t.site for t in plan.teachers if t.relevant and t.teaches}
        found.append(
            Route(
                plan.method,
                None,
                plan.relevant,
                _means(cards, taught_by, plan.method),
                plan.bytes_moved,
                expected_seconds(plan.method, own, networks, manifest, params.transfer, fast),
                prediction_cost(plan.method, own, networks, params.transfer, asking.shared_encoder),
            )
        )
    return found


def route_line(route: Route, chosen: Method) -> str:
    """One line for a person."""
    mark = "*" if route.method == chosen else " "
    if route.impossible is not None:
        return f"  {mark} {route.method}: not possible: {route.impossible}"
    told = [f"{site} ({f'epsilon {e:g}' if e else 'exact'})" for site, e in route.means.items()]
    means = "class means of " + words(told)
    if route.method == BY_MEANS:
        revealed = f"{means}, and no network"
    else:
        revealed = f"the networks of {words(route.teachers)}{', and ' + means if told else ''}"
    return (
        f"  {mark} {route.method}: reveals {revealed}; "
        f"{size(route.bytes)}, about {route.seconds:.0f} s; "
        f"a prediction costs {route.prediction:.1f} of the own network's"
    )


def route_json(route: Route) -> dict[str, Any]:
    """For ``--json``."""
    if route.impossible is not None:
        return {"method": route.method, "impossible": route.impossible}
    return {
        "method": route.method,
        "teachers": list(route.teachers),
        "class_means": dict(route.means),
        "bytes_moved": route.bytes,
        "expected_seconds": round(route.seconds, 1),
        "prediction_cost": round(route.prediction, 2),
    }
