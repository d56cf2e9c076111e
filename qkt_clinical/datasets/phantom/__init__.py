"""The embedded federation: phantom hospitals, drawn and delivered by code, the same to the byte each time."""

from __future__ import annotations

from qkt_clinical.datasets.phantom.federation import (
    phantom_params,
    render_images,
    render_sheet,
    write_federation,
)

__all__ = ["phantom_params", "render_images", "render_sheet", "write_federation"]
