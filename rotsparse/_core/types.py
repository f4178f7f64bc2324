"""Types of user input."""

from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array, Float

AnyArray = Array | np.ndarray
"""A JAX array or a NumPy one. Weights may be either: float64 NumPy weights keep their precision without
`jax_enable_x64`."""

Data = AnyArray
"""What users hand in."""


@runtime_checkable
class Vectors(Protocol):
    """Anything with a length whose elements are vectors, such as a `grain.MapDataset`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: Any, /) -> Any: ...


Rows = Float[AnyArray, "n d"]
"""Examples, one a row."""
