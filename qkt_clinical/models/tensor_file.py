"""A safetensors file from elsewhere: sizes, names, shapes and types are checked before allocation."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from qkt_clinical.common.files import digest_bytes, plain_file
from qkt_clinical.errors import QktError

HEADER_BYTES, HEADER_BYTES_PER_TENSOR = 10_000, 300
"""What a header may take: for all, and for a tensor beside its name."""
DTYPES = {"F16": torch.float16, "F32": torch.float32, "I64": torch.int64, "I8": torch.int8}

Specs = Mapping[str, tuple[tuple[int, ...], torch.dtype]]
"""Tensor to shape and type."""
Refuse = Callable[[str, str], QktError]
"""Of what is wrong and the end of its code: ``size``, ``format``, ``tensors``, ``digest``."""


def read_tensors(
    path: Path,
    wanted: Specs,
    refuse: Refuse,
    *,
    what: str,
    size: int | None = None,
    digest: str | None = None,
) -> tuple[dict[str, Tensor], str]:
    """All tensors of a file, hashed and parsed from the same bytes, and the SHA-256 of these.

    Args:
        wanted: what must be there, and nothing else.
        refuse: makes the error that is raised.
        what: the network it belongs to, for messages.
        size: bytes that the file must have; None: as many as follow from ``wanted``.
        digest: SHA-256 that it must have; None: any.

    Raises:
        OSError: it cannot be read as a plain file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    with plain_file(path) as stream:
        content = _bounded(stream, wanted, refuse, what, size)
    length = int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8 : 8 + length])
    except (ValueError, RecursionError):
        raise refuse("not a safetensors file", "format") from None
    _check_header(header, wanted, refuse, what)
    found = digest_bytes(content)
    if digest is not None and found != digest:
        raise refuse("digest differs from the one expected", "digest")
    try:
        # Copied into torch's own memory, which is aligned as that of a network that was trained here.
        return {name: tensor.clone() for name, tensor in load(content).items()}, found
    except (SafetensorError, ValueError):
        raise refuse("not a safetensors file", "format") from None


def _bounded(stream: BinaryIO, wanted: Specs, refuse: Refuse, what: str, size: int | None) -> bytes:
    """The file's content, read only if it has the size that follows from what is wanted."""
    longest = HEADER_BYTES + sum(len(name) + HEADER_BYTES_PER_TENSOR for name in wanted)
    room = sum(dtype.itemsize * torch.Size(shape).numel() for shape, dtype in wanted.values())
    found = os.fstat(stream.fileno()).st_size
    first = stream.read(8)
    length = int.from_bytes(first, "little")
    if size is not None and found != size:
        raise refuse(f"the file has {found} bytes, {size} by the card", "size")
    if not 2 <= length <= longest:
        raise refuse(f"a header of {length} bytes, not of 2 to {longest}", "size")
    if found != 8 + length + room:
        raise refuse(f"the file has {found} bytes; {what} needs {8 + length + room}", "size")
    content = first + stream.read(found - 8)
    if len(content) != found:
        raise refuse("the file was cut while it was read", "size")
    return content


def _check_header(header: Any, wanted: Specs, refuse: Refuse, what: str) -> None:
    if not isinstance(header, dict):
        raise refuse("not a safetensors file", "format")
    header.pop("__metadata__", None)
    if set(header) != set(wanted):
        raise refuse(f"tensors are not those of {what}", "tensors")
    for name, (shape, dtype) in wanted.items():
        entry = header[name]
        if (
            not isinstance(entry, dict)
            or entry.get("shape") != list(shape)
            or DTYPES.get(str(entry.get("dtype"))) != dtype
        ):
            raise refuse(f"tensor {name}: {entry} against {list(shape)} {dtype}"[:200], "tensors")
