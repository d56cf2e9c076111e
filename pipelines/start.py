"""How every stage's module starts: whose turn it is, what others may read, how errors end."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from qkt_clinical.common.console import errors_as_lines, owners_alone
from qkt_clinical.config.loading import load_params
from qkt_clinical.config.params import Params
from qkt_clinical.config.workspace import keep_private
from qkt_clinical.errors import ConfigError

HERE = Path()
"""The workspace: DVC runs a stage in the folder of dvc.yaml."""


def item() -> str:
    """What DVC runs a stage for: the part after ``@`` of the address that it puts into the environment.

    A name in params.yaml is text from elsewhere and never stands in a command line, which a shell reads.

    Raises:
        ConfigError: nobody said what the stage is to run for.
    """
    stage, _, found = os.environ.get("DVC_STAGE", "").rpartition(":")[2].partition("@")
    if not stage or not found:
        raise ConfigError(
            "no hospital or query is named", remedy="Name it, or run the stage with 'dvc repro'."
        )
    return found


def of_site(params: Params, names: list[str]) -> list[str]:
    """The hospital: the one argument, else DVC's item.

    Raises:
        ConfigError: more than one argument, or DVC's item is not among the sites.
    """
    if names:
        return _as_many(names, "SITE")
    site = item()
    if site not in params.sites:
        raise ConfigError(f"no site {site!r} in params.yaml", remedy="Run 'dvc repro' in the workspace.")
    return [site]


def of_query(params: Params, names: list[str]) -> list[str]:
    """Hospital and query: the two arguments, else those of DVC's item.

    Raises:
        ConfigError: not two arguments, or DVC's item is no key of the queries.
    """
    if names:
        return _as_many(names, "HOSPITAL", "QUERY")
    key = item()
    if key not in params.queries:
        raise ConfigError(f"no query {key!r} in params.yaml", remedy="Run 'dvc repro' in the workspace.")
    ref = params.queries[key]
    return [ref.hospital, ref.query]


def of_all(params: Params, names: list[str]) -> list[str]:
    """Nothing: the stage is one for the whole workspace.

    Raises:
        ConfigError: there are arguments.
    """
    return _as_many(names)


def _as_many(names: list[str], *wanted: str) -> list[str]:
    if len(names) != len(wanted):
        raise ConfigError(
            f"{len(names)} arguments, expected {' '.join(wanted) or 'none'}",
            remedy="Leave them out: 'dvc repro' says what a stage runs for.",
        )
    return names


def start(stage: str, whom: Callable[[Params, list[str]], list[str]], main: Callable[..., None]) -> None:
    """Run ``main(params, *names)``: errors end as one line, and what is written is its owner's alone."""
    with errors_as_lines(stage), owners_alone():
        keep_private(HERE)
        params = load_params(HERE)
        main(params, *whom(params, sys.argv[1:]))
