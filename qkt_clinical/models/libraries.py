"""MONAI and timm, loaded without what their networks do not need."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qkt_clinical.common.extras import require_extra

# MONAI imports every optional package that it finds. None of these serves its networks, and together
# they cost each stage process three seconds.
_NOT_NEEDED = (
    "mlflow",
    "pandas",
    "sklearn",
    "matplotlib",
    "nibabel",
    "pydicom",
    "tensorboard",
    "scipy.signal",
)


@contextmanager
def _hidden(names: tuple[str, ...]) -> Iterator[None]:
    """Let optional imports of ``names`` fail within the block; packages already loaded stay visible."""
    hidden = [n for n in names if n not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


def _monai(module: str) -> Any:
    with _hidden(_NOT_NEEDED):
        return importlib.import_module(module)


def monai_layers() -> Any:
    """``monai.networks.layers``, loaded without the optional packages that it does not need."""
    return _monai("monai.networks.layers")


def monai_networks() -> Any:
    """``monai.networks.nets``, loaded likewise."""
    return _monai("monai.networks.nets")


@lru_cache(1)
def timm_library() -> Any:
    """timm, whose networks need none of torchvision's compiled operators.

    A torchvision built for CUDA cannot load its own beside a CPU build of torch, and then fails at import for
    want of their declarations: they are declared here, and would fail if they were called.
    """
    require_extra("timm")
    if "torchvision" not in sys.modules and not _has_operators():
        for name in ("nms", "qnms"):
            _DECLARED.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import timm

    return timm


_DECLARED = torch.library.Library("torchvision", "FRAGMENT")
"""Kept, for a declaration ends with its library object."""


def _has_operators() -> bool:
    """Whether torchvision's compiled operators can be loaded."""
    found = find_spec("torchvision")
    if found is None or found.origin is None:
        return True
    for file in Path(found.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(str(file))
        except OSError:
            return False
    return True


class WithoutValues(TorchFunctionMode):
    """Leaves initial values undrawn: on the meta device PyTorch loads its compiler (2 s) to draw none."""

    DRAWN = (Tensor.normal_, Tensor.uniform_)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in self.DRAWN or getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)
