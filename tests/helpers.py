"""Shared by several test files: the place of large data, and random rotations.

Nothing of rotsparse is imported here, because conftest.py needs this module before annotations can be checked.
"""

from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
"""Data that is too large for the repository. Tests that need it are skipped if it is absent."""


def random_orthogonal(rng: np.random.Generator, d: int) -> np.ndarray:
    """An orthogonal matrix."""
    return np.linalg.qr(rng.standard_normal((d, d)))[0]
