"""`Rotations`: one orthogonal matrix for a layer's inputs and one for its outputs."""

import json
import os

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PRNGKeyArray

from rotsparse._core import checks, orthogonal
from rotsparse._core.files import SIGNATURE, write_atomically
from rotsparse._core.reading import load_safetensors, reading, safetensors
from rotsparse._core.types import AnyArray


class Rotations(eqx.Module):
    """`z_in = R_in x` and `z_out = R_out y`. The rows of each matrix are the new directions.

    Raises `ValueError` if a matrix is not square, not finite, or not orthogonal (`|R Rᵀ - I|` above 1e-3).
    """

    r_in: Float[AnyArray, "d_in d_in"]
    r_out: Float[AnyArray, "d_out d_out"]

    def __init__(self, r_in, r_out):
        self.r_in = checks.orthogonal("r_in", r_in)
        self.r_out = checks.orthogonal("r_out", r_out)

    @classmethod
    def identity(cls, d_in: int, d_out: int, dtype=np.float32) -> "Rotations":
        """The neuron basis."""
        return cls(np.eye(d_in, dtype=dtype), np.eye(d_out, dtype=dtype))

    @classmethod
    def haar(cls, key: PRNGKeyArray, d_in: int, d_out: int, dtype=jnp.float32) -> "Rotations":
        """Two independent uniformly random rotations."""
        key_in, key_out = jax.random.split(key)
        return cls(orthogonal.haar(key_in, d_in, dtype), orthogonal.haar(key_out, d_out, dtype))

    def apply_in(self, x: Float[AnyArray, "*n d_in"]) -> Float[AnyArray, "*n d_in"]:
        """`R_in x` of every example."""
        return orthogonal.matmul(x, self.r_in.T)

    def apply_out(self, y: Float[AnyArray, "*n d_out"]) -> Float[AnyArray, "*n d_out"]:
        """`R_out y` of every example."""
        return orthogonal.matmul(y, self.r_out.T)

    def inverse(self) -> "Rotations":
        """The rotations that undo these: `R⁻¹ = Rᵀ`."""
        return Rotations(self.r_in.T, self.r_out.T)

    def compose(self, first: "Rotations") -> "Rotations":
        """First apply `first`, then these: `R = R_self R_first` on both sides."""
        return Rotations(
            orthogonal.matmul(self.r_in, first.r_in),
            orthogonal.matmul(self.r_out, first.r_out),
        )

    def orthogonality_error(self) -> float:
        """Largest absolute entry of `R Rᵀ - I` over both sides, computed in float64."""
        return max(orthogonal.exact_error(self.r_in), orthogonal.exact_error(self.r_out))

    def save(self, path: str | os.PathLike, metadata: dict | None = None) -> None:
        """Write `r_in` and `r_out` to a safetensors file, with `metadata` (JSON) beside them. Atomic: an interrupted
        save leaves the earlier file. Raises `OSError` if the folder is missing or cannot be written."""
        tensors = {"r_in": np.ascontiguousarray(self.r_in), "r_out": np.ascontiguousarray(self.r_out)}
        write_atomically(path, safetensors(tensors, **{SIGNATURE: json.dumps(metadata or {})}))

    @classmethod
    def load(cls, path: str | os.PathLike) -> tuple["Rotations", dict]:
        """The rotations in a file that `save` wrote, and their metadata.

        Raises `ValueError`, with the file's name, if it is missing, unreadable, or holds something else.
        """
        try:
            tensors, about = load_safetensors(path)
        except ValueError as error:
            raise ValueError(f"cannot read rotations from {path}: {error}") from None
        metadata = about.get(SIGNATURE, "{}")
        if not {"r_in", "r_out"} <= tensors.keys():
            raise ValueError(f"{path} holds {sorted(tensors)}, expected r_in and r_out: is it a rotations file?")
        try:
            with reading(path):
                return cls(tensors["r_in"], tensors["r_out"]), json.loads(metadata)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: its metadata is not JSON ({error})") from None
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None


def checked(name: str, value) -> Rotations:
    """Return `value`. Raises `ValueError` if it is not a pair of rotations."""
    if isinstance(value, Rotations):
        return value
    advice = f": take its .rotations, {name}.rotations" if hasattr(type(value), "rotations") else ""
    raise ValueError(f"{name} should be Rotations, got {type(value).__name__}{advice}")
