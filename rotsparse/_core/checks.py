"""Checks of user input. Every message says what was expected, what was given, and what to do."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array

from rotsparse._core.orthogonal import exact_error
from rotsparse._core.types import AnyArray


def weight(name: str, value, shape: tuple[int | None, ...]) -> AnyArray:
    """Return `value` as an array, checked to be floating point, finite and of this shape (`None`: any size).

    NumPy arrays stay NumPy, so that float64 weights keep their precision without `jax_enable_x64`. Raises `ValueError`
    for anything else.
    """
    value = value if isinstance(value, (np.ndarray, jax.Array)) else np.asarray(value)
    if len(value.shape) != len(shape) or any(s is not None and s != v for s, v in zip(shape, value.shape, strict=True)):
        wanted = "[" + ", ".join("any" if s is None else str(s) for s in shape) + "]"
        raise ValueError(f"{name} should have shape {wanted} (matrices are [out, in]), got {list(value.shape)}")
    if value.size == 0:
        raise ValueError(f"{name} is empty: its shape is {list(value.shape)}")
    if value.dtype not in (np.float32, np.float64):
        raise ValueError(
            f"{name} should be float32 or float64, got {value.dtype}: convert it first, e.g. with .astype('float32')"
        )
    if not isinstance(value, Tracer) and not (finite := np.isfinite(value)).all():
        first = np.unravel_index(int(np.argmin(finite)), finite.shape)
        raise ValueError(
            f"{name} contains NaN or infinity ({finite.size - np.count_nonzero(finite):,} of {finite.size:,} entries, "
            f"the first at {[int(i) for i in first]}): check where it comes from"
        )
    return value


def orthogonal(name: str, value, width: int | None = None) -> AnyArray:
    """Return `value` as an orthogonal matrix, of this width if one is given. Raises `ValueError` if the largest entry
    of `|R Rᵀ - I|` is above 1e-3, more than rounding explains."""
    r = weight(name, value, (width, width))
    if r.shape[0] != r.shape[1]:
        raise ValueError(f"{name} should be square, got {list(r.shape)}")
    if not isinstance(r, Tracer):
        error = exact_error(r)
        if error > 1e-3:
            raise ValueError(
                f"{name} is not orthogonal: the largest entry of |R Rᵀ - I| is {error:.2g}, expected < 1e-3"
            )
    return r


def activations(name: str, value, width: int, *, at_least: int = 2) -> Array:
    """Return `value` as activations `[examples, width]`: floating point, finite, their squares too, at least `at_least`
    examples, and not all equal if `at_least` is more than one. Raises `ValueError` otherwise."""
    value = value if isinstance(value, (np.ndarray, jax.Array)) else np.asarray(value)
    if value.ndim != 2 or value.shape[1] != width:
        hint = " (they look transposed)" if value.ndim == 2 and value.shape[0] == width else ""
        raise ValueError(
            f"{name} should have shape [examples, {width}], the inputs of the layer, got {list(value.shape)}{hint}"
        )
    if value.shape[0] < at_least:
        raise ValueError(f"{name} holds {value.shape[0]} examples: at least {at_least} are needed")
    value = weight(name, value, (None, width))
    with np.errstate(over="ignore"):  # from float64; checked below
        x = jnp.asarray(value)
    if isinstance(x, Tracer):
        return x
    # Use the copy on the host, if there is one, to avoid a transfer from the device.
    host = np.asarray(value if x.dtype == value.dtype else x)
    if x.dtype != value.dtype and not np.isfinite(host).all():
        largest = np.abs(value).max()
        raise ValueError(f"{name} has entries of up to {largest:.2g}, beyond the range of {x.dtype}: scale them down")
    squares(name, max(abs(float(host.max())), abs(float(host.min()))) ** 2, x.dtype)
    if at_least > 1 and _constant(host):
        raise ValueError(
            f"{name}: all {len(host)} examples are equal (zero variance) in {x.dtype}, so no direction stands out"
        )
    return x


def _constant(x: np.ndarray) -> bool:
    """Whether all examples are equal. In NumPy, because JAX would compile three programs."""
    return bool((x[1] == x[0]).all()) and bool((x == x[0]).all())


def seed(value: int) -> None:
    """Raise `ValueError` for a seed that the random generators do not accept."""
    if not 0 <= value < 2**32:
        raise ValueError(f"--seed should be a whole number from 0 to {2**32 - 1}, got {value}")


def squares(name: str, value, dtype) -> None:
    """Raise `ValueError` if squares of this size overflow or vanish in the numbers that they are computed in. Zero is
    exact."""
    if isinstance(value, Tracer):
        return
    limits, size = jnp.finfo(dtype), math.sqrt(value)
    if value and not 256 * float(limits.tiny) < value < float(limits.max) / 256:
        what = "overflow" if size > 1 else "vanish"
        raise ValueError(
            f"{name} has entries of up to {size:.2g}, whose squares {what} in {jnp.dtype(dtype).name}: give it in "
            "another unit (a layer's input weights change by the inverse factor)"
        )
