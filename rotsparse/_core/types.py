"""Types of user input."""

import numpy as np
from jaxtyping import Array, Float

Rows = Float[Array, "n d"] | Float[np.ndarray, "n d"]
"""Examples, one a row."""


# What users hand in: JAX or NumPy arrays.
Data = Array | np.ndarray
