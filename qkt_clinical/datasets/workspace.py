"""A workspace of its own, outside the checkout's root: for simulated hospitals and for tests."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

import qkt_clinical
from qkt_clinical.common.files import write_text
from qkt_clinical.config.loading import parse
from qkt_clinical.config.params import Params
from qkt_clinical.config.workspace import keep_private
from qkt_clinical.errors import ConfigError
from qkt_clinical.records.decisions import FOLDER

CODE = ("pipelines", "qkt_clinical")


def write_workspace(out: Path, params: Mapping[str, Any]) -> None:
    """Make ``out`` a workspace in which ``dvc repro`` runs: params.yaml, dvc.yaml, DVC's folder, the code.

    The code is linked, not copied, so that DVC sees its changes.

    Raises:
        ConfigError: ``params`` are not those of params.yaml, ``out`` is the checkout itself, or the
            package was installed without the checkout.
    """
    checkout = Path(qkt_clinical.__file__).resolve().parent.parent
    if not (checkout / "dvc.yaml").is_file():
        raise ConfigError(
            "the pipeline (dvc.yaml, pipelines/) is not beside the package",
            remedy="Install from a clone of the repository with 'make setup'.",
        )
    if out.resolve() == checkout:
        raise ConfigError(
            "a workspace cannot be written over the checkout", remedy="Name another folder with --out."
        )
    path = out / "params.yaml"
    # With every default written out: DVC refuses a stage whose params are not in the file.
    full = parse(Params, dict(params), file=path).model_dump(mode="json")
    write_text(path, yaml.safe_dump(full, sort_keys=False, allow_unicode=True, width=110))
    shutil.copyfile(checkout / "dvc.yaml", out / "dvc.yaml")
    shutil.copyfile(checkout / ".dvcignore", out / ".dvcignore")
    for name in CODE:
        link = out / name
        if not link.is_symlink():
            link.symlink_to(os.path.relpath(checkout / name, out.resolve()), target_is_directory=True)
    (out / FOLDER).mkdir(exist_ok=True)
    write_text(out / ".dvc" / "config", (checkout / ".dvc" / "config").read_text(encoding="utf-8"))
    keep_private(out)
