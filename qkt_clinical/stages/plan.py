"""Stage ``plan``: choose a query's teachers by their masks, and fetch those alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from qkt_clinical.common.files import new_folder, write_json
from qkt_clinical.config.loading import load_query
from qkt_clinical.config.params import Params
from qkt_clinical.config.workspace import Workspace
from qkt_clinical.data.prepared import read_manifest
from qkt_clinical.models.offers import read_offer
from qkt_clinical.qkt.planning import make_plan
from qkt_clinical.records.plan import SHARED, Asking, Plan


def plan_query(root: Path, hospital: str, name: str, params: Params) -> Plan:
    """Stage ``plan``: make the plan and fetch the relevant teachers' bundles, in one step.

    Writes ``models/fetched/<hospital>/<query>/``: ``plan.json`` and ``teachers/<site>/``.
    """
    space = Workspace(root)
    query = load_query(root, hospital, name)
    manifest = read_manifest(space.prepared(hospital))
    sites = [s for s in params.sites if s != hospital]
    plan = make_plan(
        hospital, name, query, Asking.of(manifest), [read_offer(space.teacher(s), s) for s in sites]
    )

    def provide(site: str, folder: Path) -> None:
        for file in SHARED:
            shutil.copyfile(space.teacher(site) / file, folder / file)

    write_fetched(space.fetched(hospital, name), plan, provide)
    return plan


def write_fetched(target: Path, plan: Plan, provide: Callable[[str, Path], None]) -> None:
    """Write a plan and the relevant bundles, in one step.

    Args:
        target: ``models/fetched/<hospital>/<query>``.
        provide: puts a site's bundle into an empty folder.
    """
    with new_folder(target) as folder:
        for site in plan.relevant:
            place = folder / "teachers" / site
            place.mkdir(parents=True)
            provide(site, place)
        write_json(folder / "plan.json", plan.model_dump(mode="json"))
