"""The server: stores teachers, plans queries from masks, and records the outcomes of both.

It holds no image and opens no hospital's folder. All that it knows lies in its workspace, so that a server
that was restarted goes on where it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from pydantic import Field, ValidationError

from qkt_clinical.common.files import digest_bytes, new_folder, read_plain, write_json
from qkt_clinical.config.base import NAME, Name, Names, Sha256, Strict
from qkt_clinical.config.loading import load_params
from qkt_clinical.config.workspace import Workspace, check_name
from qkt_clinical.errors import BundleError, OutputsError
from qkt_clinical.federation.messages import Answered, Asked, Contributed, Offered, Refused, Said
from qkt_clinical.federation.parcel import pack, read_offer_files, unpack_student, unpack_teacher
from qkt_clinical.federation.signing import check_signature
from qkt_clinical.models.offers import read_image_statistics
from qkt_clinical.qkt.planning import make_plan
from qkt_clinical.records.card import CARD, MAX_JSON_BYTES, read_card
from qkt_clinical.records.plan import Offer, Plan, moved_files

SIGNATURE, SIGNATURE_BYTES = "signature", 64
"""File beside a teacher that was signed."""
OutcomeState = Literal["waiting", "running", "answered", "refused", "missing"]


class FederationOutcome(Strict):
    """Outcome of a query, or of a site's teacher: ``federation/<kind>/...json`` on the server."""

    format: Literal["qkt-outcome/1"] = "qkt-outcome/1"
    state: OutcomeState
    reason: Said | None = None
    """Why it was refused or is missing, in the words of the site or of the server."""
    code: Said | None = None
    teachers: Names = ()
    declined: dict[Name, Said] = Field(default_factory=dict)
    """Sites whose teachers were not used, and why."""
    bytes_moved: int = 0
    """Of the bundles that were sent to the asking hospital."""
    digest: Sha256 | None = None
    """Of the card of teacher or student."""
    figures: dict[str, Any] | None = None
    student_kept: bool = False
    """Whether the hospital sent its student, and the server keeps it."""

    def line(self, name: str) -> str:
        """One line for a terminal."""
        return f"{name}: {self.state}" + (f", {self.reason}" if self.reason else "")


class Server:
    """The server of a federation.

    Args:
        root: its workspace, with a params.yaml that names the label space and the sites.
        keys: whose teachers are kept only if they are signed: site to public key.
    """

    def __init__(self, root: Path, keys: Mapping[str, str] = MappingProxyType({})) -> None:
        self.root, self.space, self.keys = root, Workspace(root), keys

    # --- what became of what ----------------------------------------------------------------------

    def _place(self, *names: str) -> Path:
        """Of the first name, a kind, and those of sites and queries after it."""
        kind, *named = names
        place = Path(kind, *(check_name(name, "site or query") for name in named))
        return self.root / "federation" / place.with_suffix(".json")

    def note(self, outcome: FederationOutcome, *names: str) -> FederationOutcome:
        """Keep an outcome: of ``("teachers", site)`` or ``("queries", hospital, query)``."""
        write_json(self._place(*names), outcome.model_dump(mode="json"))
        return outcome

    def outcome(self, *names: str) -> FederationOutcome:
        """Read an outcome; ``waiting`` if there is none yet."""
        path = self._place(*names)
        try:
            return FederationOutcome.model_validate_json(read_plain(path, MAX_JSON_BYTES))
        except FileNotFoundError:
            return FederationOutcome(state="waiting")
        except (OSError, ValidationError):
            raise OutputsError(
                "no readable outcome", remedy="Remove the file; the query is answered anew.", file=path
            ) from None

    def outcomes(self) -> dict[str, FederationOutcome]:
        """All outcomes: ``teacher <site>`` and ``<hospital>/<query>``."""
        found, place = {}, self.root / "federation"
        for path in sorted((*place.glob("queries/*/*.json"), *place.glob("teachers/*.json"))):
            kind, *names = path.relative_to(place).with_suffix("").parts
            if all(NAME.fullmatch(name) for name in names):
                name = f"teacher {names[0]}" if kind == "teachers" else "/".join(names)
                found[name] = self.outcome(kind, *names)
        return found

    # --- teachers ---------------------------------------------------------------------------------

    def accept_teacher(self, site: str, said: Contributed | Refused) -> FederationOutcome:
        """Keep a teacher that passes every check; sent twice, it is kept once.

        Raises:
            ConfigError: no site can bear the name.
        """
        check_name(site, "site")
        if isinstance(said, Refused):
            return self.note(
                FederationOutcome(state="refused", reason=said.message, code=said.code), "teachers", site
            )
        try:
            with new_folder(self.space.teacher(site)) as folder:
                if unpack_teacher(said.files, site, folder).classes != load_params(self.root).classes:
                    raise BundleError(
                        "has another label space",
                        remedy="Give server and site the same classes in params.yaml.",
                        site=site,
                        code="bundle-card",
                    )
                if (key := self.keys.get(site)) is not None:
                    check_signature(key, said.files[CARD], said.signature, site)
                if said.signature is not None:
                    (folder / SIGNATURE).write_bytes(said.signature)
        except BundleError as error:
            outcome = FederationOutcome(state="refused", reason=error.message, code=error.code)
            return self.note(outcome, "teachers", site)
        return self.note(FederationOutcome(state="answered", digest=self._kept(site)), "teachers", site)

    def _kept(self, site: str) -> str | None:
        card = self.space.teacher(site) / CARD
        return digest_bytes(read_plain(card, MAX_JSON_BYTES)) if card.is_file() else None

    # --- queries ----------------------------------------------------------------------------------

    def offer(self, site: str, said: Offered) -> Offer:
        """A teacher that its site lets be used, as far as the mask that it shows goes.

        Raises:
            BundleError: not a card and mask, or of another teacher than the one that the server keeps.
        """
        card, mask = read_offer_files(said.files, site)
        digest = digest_bytes(said.files[CARD])
        if digest != self._kept(site):
            raise BundleError(
                "another teacher than the one that was contributed",
                remedy="Let the site contribute again.",
                site=site,
                code="bundle-digest",
            )
        return Offer(card, mask, sum(len(content) for content in said.files.values()), digest)

    def plan(self, hospital: str, query: str, asked: Asked, offers: Mapping[str, Offer]) -> Plan:
        """The plan of a query. See :func:`qkt_clinical.qkt.planning.make_plan`."""
        images = read_image_statistics(self.space.teacher(hospital))
        return make_plan(hospital, query, asked.query, asked.asking, offers.values(), images)

    def bundles(self, plan: Plan, shown: Mapping[str, Offered]) -> dict[str, dict[str, bytes]]:
        """The relevant teachers' files that the method takes, each with the mask that its site shows."""
        found = {}
        for site in plan.relevant:
            folder = self.space.teacher(site)
            found[site] = pack(folder, moved_files(read_card(folder), plan.method)) | shown[site].files
        return found

    def signatures(self, plan: Plan) -> dict[str, bytes]:
        """Those of the relevant teachers that were signed, for whoever asks to check."""
        places = {site: self.space.teacher(site) / SIGNATURE for site in plan.relevant}
        return {s: read_plain(place, SIGNATURE_BYTES) for s, place in places.items() if place.is_file()}

    def accept_answer(self, plan: Plan, said: Answered, declined: Mapping[str, str]) -> FederationOutcome:
        """Record the reported figures of a student, and store the student if it was sent."""
        if said.student is not None:
            with new_folder(self.space.student(plan.hospital, plan.query)) as folder:
                unpack_student(said.student, plan.hospital, folder)
        return self.note(
            FederationOutcome(
                state="answered",
                teachers=plan.relevant,
                declined=dict(declined),
                bytes_moved=plan.bytes_moved,
                digest=said.digest,
                student_kept=said.student is not None,
                figures=None if said.figures is None else said.figures.model_dump(mode="json"),
            ),
            "queries",
            plan.hospital,
            plan.query,
        )
