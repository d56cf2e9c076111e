"""Stage ``plan``: choose the teachers of a query by their masks, and fetch only those."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from qkt_clinical.common.files import TooLarge, copy_plain, new_folder, write_json
from qkt_clinical.config.loading import load_query
from qkt_clinical.config.params import Params
from qkt_clinical.config.workspace import Workspace
from qkt_clinical.data.prepared import read_manifest
from qkt_clinical.errors import BundleError, by_disk
from qkt_clinical.models.offers import read_image_statistics, read_offer
from qkt_clinical.qkt.planning import make_plan
from qkt_clinical.records.card import REMEDY, cannot_be_read, most_bytes, read_card
from qkt_clinical.records.plan import SHARED, Asking, Plan, moved_files


def copy_bundle(source: Path, target: Path, site: str, names: Sequence[str] = SHARED) -> None:
    """Copy a teacher's files into a folder: plain files, no larger than its card says.

    Raises:
        BundleError: a file is none of these, or is not there.
    """
    card = read_card(source)
    try:
        for name in names:
            copy_plain(source / name, target / name, most_bytes(card, name))
    except TooLarge:
        raise BundleError(
            f"{name} is larger than its card says", remedy=REMEDY, file=source, site=site, code="bundle-size"
        ) from None
    except OSError as error:
        if (full := by_disk(error)) is not None:
            raise full from None
        raise cannot_be_read(error, source / name, site) from None


def plan_query(root: Path, hospital: str, name: str, params: Params) -> Plan:
    """Stage ``plan``: make the plan and fetch the relevant teachers' bundles, in one step.

    Writes ``models/fetched/<hospital>/<query>/``: ``plan.json`` and ``teachers/<site>/``.
    """
    space = Workspace(root)
    query = load_query(root, hospital, name)
    manifest = read_manifest(space.prepared(hospital))
    offers = [read_offer(space.teacher(s), s) for s in params.sites if s != hospital]
    images = read_image_statistics(space.teacher(hospital))
    asking = Asking.of(manifest, params.shared_encoder, params.train.encoder)
    plan = make_plan(hospital, name, query, asking, offers, images)

    def provide(site: str, folder: Path) -> None:
        files = moved_files(read_card(space.teacher(site)), plan.method)
        copy_bundle(space.teacher(site), folder, site, files)

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
