"""Libraries that only some hospitals need, each an extra: ``pip install 'qkt-clinical[federation]'``."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Literal

from qkt_clinical.errors import QktError

_SAID = {
    "nvflare": (
        "NVIDIA FLARE is not installed, which federations and federated methods need",
        "Install it with pip install 'qkt-clinical[federation]', or leave such methods out.",
        "flare-missing",
    ),
    "opacus": (
        "Opacus is not installed, which differential privacy needs",
        "Install it with pip install 'qkt-clinical[privacy]', or leave train.privacy out.",
        "opacus-missing",
    ),
    "timm": (
        "timm is not installed, from which pretrained encoders come",
        "Install it with pip install 'qkt-clinical[encoders]', or use no encoder.",
        "timm-missing",
    ),
}


def require_extra(library: Literal["nvflare", "opacus", "timm"]) -> None:
    """Do nothing where the library is installed.

    Raises:
        QktError: it is not, code ``flare-missing``, ``opacus-missing`` or ``timm-missing``.
    """
    if find_spec(library) is None:
        message, remedy, code = _SAID[library]
        raise QktError(message, remedy=remedy, code=code)
