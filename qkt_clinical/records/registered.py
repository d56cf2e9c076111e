"""Checks of the files of a registered model, by name, size and content, before any is used.

MLflow imports the loader that ``MLmodel`` names, with the folders of code that it names before all others on
the path, and installs what the requirements say. Whoever may write to a registry could run code of their own
that way, so everything beside the bundle is held against what this package writes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from qkt_clinical.common.files import digest_bytes
from qkt_clinical.config.base import NAME
from qkt_clinical.config.encoder_specs import ENCODERS
from qkt_clinical.errors import BundleError
from qkt_clinical.records.card import (
    CARD,
    MASK,
    MAX_JSON_BYTES,
    MAX_MEANS_BYTES,
    MEANS,
    REFERENCE,
    WEIGHTS,
    Card,
)
from qkt_clinical.records.decisions import RegistryError, site_of

LOADER = "qkt_clinical.serving"
MLMODEL, CONDA, PYTHON, NEEDED = "MLmodel", "conda.yaml", "python_env.yaml", "requirements.txt"
REQUIREMENTS = ("monai", "numpy", "pandas", "pydantic", "safetensors", "torch")
ENCODER_LIBRARY = "timm"
"""What a version needs besides, whose network has an encoder from there."""
"""What serving imports. This package itself is not listed: where it is not published, a package index may
hold another project of its name."""

MAX_MLMODEL_BYTES, MAX_SMALL_BYTES, MAX_EXAMPLE_BYTES = 1_000_000, 20_000, 16_000_000
MAX_WEIGHTS_BYTES = 4_000_000_000
MAX_DEPTH, MAX_EVENTS = 30, 100_000
YAML: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""Of both the safe one; the one in C where PyYAML was built with it."""
MAX_ENTRIES = 100
"""In one folder; a student has 64 experts at most."""

EXAMPLES = {"artifact_path": "input_example.json", "serving_input_path": "serving_input_example.json"}
BESIDE = {
    MLMODEL: MAX_MLMODEL_BYTES,
    CONDA: MAX_SMALL_BYTES,
    PYTHON: MAX_SMALL_BYTES,
    NEEDED: MAX_SMALL_BYTES,
    **dict.fromkeys(EXAMPLES.values(), MAX_EXAMPLE_BYTES),
}
"""Files beside the bundle, with the bytes that they may have."""
DOWNLOADED = "registered_model_meta"
"""MLflow writes this one beside what it has downloaded; nothing reads it."""
BUNDLE = {
    **dict.fromkeys((CARD, MASK, REFERENCE, "query.json", "plan.json"), MAX_JSON_BYTES),
    "phases.json": 16 * MAX_JSON_BYTES,
    MEANS: MAX_MEANS_BYTES,
    WEIGHTS: MAX_WEIGHTS_BYTES,
}
EXPERT = {name: BUNDLE[name] for name in (CARD, MASK, REFERENCE, WEIGHTS)}

TOP = {
    *("flavors", "metadata", "signature", "saved_input_example_info", "run_id", "model_id", "model_uuid"),
    *("mlflow_version", "model_size_bytes", "utc_time_created", "artifact_path", "prompts"),
    *("is_signature_from_type_hint", "type_hint_from_example"),
}
FLAVOR: Mapping[str, set[Any]] = {
    "loader_module": {LOADER},
    "code": {None},
    "streamable": {None, False},
}
"""What the only flavour says where it says it; beside these it names data, environment and Python."""
SHA256 = re.compile("[0-9a-f]{64}")
VERSION = r"[0-9A-Za-z.!+_-]{1,64}"
REQUIREMENT = re.compile(rf"(?:{'|'.join(('mlflow', *REQUIREMENTS, ENCODER_LIBRARY))})==(?:{VERSION})")
BUILDER = re.compile(rf"(?:pip|setuptools|wheel)(?:(?:==|<=|=){VERSION})?")
INTERPRETER = re.compile(rf"python={VERSION}")


class UnsoundVersion(RegistryError, BundleError):
    """A version's files are not those that this package registered; nothing of it is used."""

    code = "version-files"


def unsound(what: str, code: str | None = None) -> UnsoundVersion:
    """The error for an unsound version."""
    return UnsoundVersion(
        what,
        remedy="Nothing of it was used. Ask who may write to the registry, and register the model again with "
        "'qkt track'.",
        code=code,
    )


def data_folder(model: str) -> str:
    """Where the bundle of a registered model lies: ``data/<site>`` of a teacher, ``data/<query>`` else.

    Raises:
        RegistryError: another name.
    """
    site_of(model)
    return f"data/{model.rsplit('.', 1)[-1]}"


def size_limit(place: str, data: str) -> int | None:
    """Bytes that a file of a registered model may have; None where there may be no such file.

    Args:
        place: within the model's folder, with ``/``.
        data: the folder of the bundle, see :func:`data_folder`.
    """
    if place in BESIDE:
        return BESIDE[place]
    if not place.startswith(f"{data}/"):
        return None
    match place.removeprefix(f"{data}/").split("/"):
        case [name]:
            return BUNDLE.get(name)
        case ["experts", site, name] if NAME.fullmatch(site):
            return EXPERT.get(name)
    return None


def holds_files(folder: str, data: str) -> bool:
    """Whether a model of ours has such a folder, see :func:`size_limit`."""
    if folder in ("data", data, f"{data}/experts"):
        return True
    return NAME.fullmatch(folder.removeprefix(f"{data}/experts/")) is not None


Entries = list[tuple[str, int | None]]
"""What lies in a folder, by its whole name within the model's folder, with its bytes; None for a folder."""


def plain_entries(root: Path, folder: str) -> Entries:
    """What lies in a folder of this machine; links, and what is no plain file, are refused, not followed.

    Args:
        root: the model's folder.
        folder: within it, ``""`` for itself.

    Raises:
        UnsoundVersion: code ``version-files``.
    """
    found: Entries = []
    try:
        with os.scandir(root / folder) as entries:
            for entry in entries:
                place = f"{folder}/{entry.name}" if folder else entry.name
                if entry.is_dir(follow_symlinks=False):
                    found.append((place, None))
                elif entry.is_file(follow_symlinks=False):
                    found.append((place, entry.stat(follow_symlinks=False).st_size))
                else:
                    raise unsound(f"a link, or no plain file: {place[:200]!r}")
    except (FileNotFoundError, NotADirectoryError):
        return []
    return found


def list_files(entries: Callable[[str], Entries], data: str, folder: str = "") -> Iterator[tuple[str, int]]:
    """Every file of a model with its bytes; no folder is entered that no model of ours has.

    Args:
        entries: what lies in a folder.
        data: the folder of the bundle, see :func:`data_folder`.
        folder: where to begin.

    Raises:
        UnsoundVersion: code ``version-files``.
    """
    found = entries(folder)
    if len(found) > MAX_ENTRIES:
        raise unsound(f"more than {MAX_ENTRIES} files in a folder")
    for place, size in found:
        if size is not None:
            yield place, size
        elif holds_files(place, data):
            yield from list_files(entries, data, place)
        else:
            raise unsound(f"a folder that no model of ours has: {place[:200]!r}")


def check_places(listed: Mapping[str, int], data: str) -> None:
    """Check names and sizes before anything is read.

    Args:
        listed: every file below the model's folder, with its bytes.
        data: the folder of the bundle.

    Raises:
        UnsoundVersion: codes ``version-files``, ``bundle-size`` and ``bundle-missing``.
    """
    for place, size in sorted(listed.items()):
        most = size_limit(place, data)
        if most is None:
            raise unsound(f"a file that no model of ours has: {place[:200]!r}")
        if not 0 <= size <= most:
            raise unsound(f"{place} has {size} bytes, more than {most}", "bundle-size")
    for place in (MLMODEL, f"{data}/{CARD}", f"{data}/{WEIGHTS}"):
        if place not in listed:
            raise unsound(f"{place} is missing", "bundle-missing")


def check_beside(name: str, content: bytes, data: str) -> None:
    """Check one of the files that say how a model is loaded, and what is installed for it.

    Raises:
        UnsoundVersion: code ``version-loader``.
    """
    check = CHECKS.get(name)
    if check is not None and not check(content, data):
        raise unsound(f"{name} is not as 'qkt track' writes it", "version-loader")


def read_mlmodel(content: bytes) -> dict[str, Any]:
    """``MLmodel`` as it stands, unchecked; empty where it is none."""
    found = _yaml(content)
    return found if isinstance(found, dict) else {}


def digest_of(digests: Mapping[str, str]) -> str:
    """Digest of a folder by those of its files, as :func:`qkt_clinical.common.files.digest_folder` has it."""
    names = sorted(map(PurePosixPath, digests))
    return digest_bytes("".join(f"{n.as_posix()}\0{digests[n.as_posix()]}\n" for n in names).encode())


def _yaml(content: bytes) -> Any:
    """Content of a YAML file; None if it is not YAML, larger or deeper than any of ours, or merges maps."""
    try:
        depth = 0
        for count, event in enumerate(yaml.parse(content, Loader=YAML)):  # which builds nothing yet
            if count > MAX_EVENTS or getattr(event, "value", None) == "<<":
                return None  # maps merged into each other grow without end
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                return None
        return YAML(content).get_single_data()
    except (yaml.YAMLError, ValueError, RecursionError):
        return None


def _loads_as_ours(content: bytes, data: str) -> bool:
    found = read_mlmodel(content)
    flavors = found.get("flavors")
    if not isinstance(flavors, dict) or set(flavors) != {"python_function"} or not set(found) <= TOP:
        return False
    metadata = found.get("metadata")
    return (
        _flavor(flavors["python_function"], data)
        and (metadata is None or (isinstance(metadata, dict) and set(metadata) <= {"model_card", "digest"}))
        and _example(found.get("saved_input_example_info"))
        and not any(
            found.get(k) for k in ("prompts", "is_signature_from_type_hint", "type_hint_from_example")
        )
    )


def _flavor(flavor: Any, data: str) -> bool:
    if not isinstance(flavor, dict) or not set(flavor) <= {*FLAVOR, "data", "env", "python_version"}:
        return False
    plain = {k: v for k, v in flavor.items() if not isinstance(v, dict | list)}
    return (
        all(k in plain and plain[k] in allowed for k, allowed in FLAVOR.items() if k in flavor)
        and plain.get("loader_module") == LOADER
        and plain.get("data") == data
        and flavor.get("env") in (None, CONDA, {"conda": CONDA, "virtualenv": PYTHON})
    )


def _example(info: Any) -> bool:
    if info is None:
        return True
    return (
        isinstance(info, dict)
        and set(info) <= {*EXAMPLES, "type", "format"}
        and all(info.get(key, name) == name for key, name in EXAMPLES.items())
        and info.get("type") == "ndarray"
    )


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(value) if isinstance(value, list) and all(isinstance(v, str) for v in value) else ("",)


def _every(pattern: re.Pattern[str], lines: Iterable[str]) -> bool:
    return all(pattern.fullmatch(line) for line in lines)


def _requirements(content: bytes, _data: str) -> bool:
    try:
        return _every(REQUIREMENT, content.decode("ascii").removesuffix("\n").split("\n"))
    except ValueError:
        return False


def _python(content: bytes, _data: str) -> bool:
    found = _yaml(content)
    return (
        isinstance(found, dict)
        and set(found) <= {"python", "build_dependencies", "dependencies"}
        and re.fullmatch(VERSION, str(found.get("python"))) is not None
        and _every(BUILDER, _texts(found.get("build_dependencies")))
        and found.get("dependencies") == [f"-r {NEEDED}"]
    )


def _conda(content: bytes, _data: str) -> bool:
    found = _yaml(content)
    if not isinstance(found, dict) or not isinstance(found.get("dependencies"), list):
        return False
    lines = [one for one in found["dependencies"] if isinstance(one, str)]
    pip = [one for one in found["dependencies"] if not isinstance(one, str)]
    return (
        set(found) <= {"channels", "dependencies", "name"}
        and found.get("channels") == ["conda-forge"]
        and all(INTERPRETER.fullmatch(line) or BUILDER.fullmatch(line) for line in lines)
        and all(isinstance(one, dict) and set(one) == {"pip"} for one in pip)
        and all(_every(REQUIREMENT, _texts(one["pip"])) for one in pip)
    )


CHECKS: Mapping[str, Callable[[bytes, str], bool]] = {
    MLMODEL: _loads_as_ours,
    CONDA: _conda,
    PYTHON: _python,
    NEEDED: _requirements,
}


def requirements_of(card: Card) -> tuple[str, ...]:
    """Names of the packages that a version needs."""
    libraries = {ENCODERS[encoder.name].library for encoder in card.network.encoders}
    return (*REQUIREMENTS, *((ENCODER_LIBRARY,) if ENCODER_LIBRARY in libraries else ()))
