"""Numerical functions with the same results on every processor.

Sums, products, quotients and square roots are rounded correctly everywhere (IEEE 754); ``exp``, ``sin`` and
the like are not: numpy and the C library have one way for each generation of processors, and these differ in
the last digit. One such digit turns a pixel in a million over. Here they are computed in double precision and
rounded to single: the ways differ by 2^-52 of a value at most, a single has 2^-24, so that they part once in
some 10^8 values, and then by a digit that turns one pixel in 10^5.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]


def rounded(function: Callable[..., Any], *values: Any) -> F32:
    """``function``, one of numpy's, of ``values`` in double precision, rounded to single."""
    return np.asarray(function(*(np.asarray(v, dtype=np.float64) for v in values)), dtype=np.float32)


def length(x: F32, y: F32) -> F32:
    """Length of a vector in the plane."""
    return np.asarray(np.sqrt(x**2 + y**2), dtype=np.float32)
