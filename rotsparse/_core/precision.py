"""The precision of matrix products.

Accelerators multiply float32 matrices in a coarser format unless they are told otherwise. Everything here is in full
float32, except the products of an objective with the data, which have the precision that the user chose.
"""

import jax

# The products of an objective with the data: full float32, or operands with a mantissa of 10 or 7 bits and sums in
# float32. JAX's own "bfloat16" and "tensorfloat32" both mean TF32 on NVIDIA, so algorithms are named.
PRECISIONS = {"highest": "highest", "tensorfloat32": "TF32_TF32_F32", "bfloat16": "BF16_BF16_F32"}

# What takes the place of an algorithm that a backend lacks: the next more precise one that it has.
_INSTEAD = {
    ("cpu", "tensorfloat32"): "highest",
    ("cpu", "bfloat16"): "highest",
    ("tpu", "tensorfloat32"): "BF16_BF16_F32_X3",
}


def check_precision(precision: str) -> str:
    """Return it. Raises `ValueError` for an unknown name."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision should be one of {', '.join(PRECISIONS)}, got {precision!r}")
    return precision


def algorithm(precision: str, backend: str | None = None) -> str:
    """JAX's name of the algorithm for this precision on a backend (default: the one in use)."""
    return _INSTEAD.get((backend or jax.default_backend(), precision), PRECISIONS[precision])


def lacking(precision: str) -> str:
    """What to say where the backend in use has no such algorithm; otherwise an empty text."""
    found, backend = algorithm(precision), jax.default_backend()
    return "" if found == PRECISIONS[precision] else f"{precision} does not exist on {backend}: {found} was used"


def products(precision: str):
    """A context in which matrix products have this precision."""
    return jax.default_matmul_precision(algorithm(precision))


def full_precision():
    """A context in which matrix products have full float32 precision on every device."""
    return jax.default_matmul_precision("highest")
