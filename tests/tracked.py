"""Copies of a workspace that has been tracked: to track it anew takes seconds."""

from __future__ import annotations

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

from qkt_clinical.tracking.client import DATABASE

PLACES = {
    "experiments": ("artifact_location",),
    "logged_models": ("artifact_location",),
    "model_versions": ("source", "storage_location"),
    "runs": ("artifact_uri",),
}
"""Where MLflow notes folders, by table."""


def copy_tracked(source: Path, target: Path) -> Path:
    """Copy a workspace; the copy's registry is its own and names nothing in the original."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    with closing(sqlite3.connect(target / DATABASE)) as database, database:
        for table, columns in PLACES.items():
            for column in columns:
                database.execute(
                    f"UPDATE {table} SET {column} = replace({column}, ?, ?)",
                    (source.resolve().as_posix(), target.resolve().as_posix()),
                )
        left = "\n".join(database.iterdump())
    assert source.resolve().as_posix() not in left
    return target
