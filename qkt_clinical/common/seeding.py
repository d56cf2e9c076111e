"""Seeds that depend on what is computed, never on the order in which it is computed."""

from __future__ import annotations

import hashlib


def derive(seed: int, *names: str) -> int:
    """A 63-bit seed from the run's seed and names such as stage, hospital and query."""
    text = "\0".join((str(seed), *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
