"""Types of user input."""

import numpy as np
from jaxtyping import Array, Float

AnyArray = Array | np.ndarray
"""A JAX array or a NumPy one. Weights may be either: float64 NumPy weights keep their precision without
`jax_enable_x64`."""

Data = AnyArray
"""What users hand in."""

Rows = Float[AnyArray, "n d"]
"""Examples, one a row."""
