"""The product of a sparse vector with a matrix on GPUs: only rows of Wᵀ whose coordinate is not zero are read (Pallas).

    rows, a, count = active(z)             # z: coordinates [in], most of them zero
    y = gather(w_t, rows, a, count)        # Wᵀ [in, out] in float32, bfloat16 or int8: Σ_k a_k Wᵀ[rows_k], [out]

What the decode step for CPUs does, for one sequence as well. Its results are tested, and that it is lowered for CUDA;
how fast it is was not measured.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pallas_triton
from jaxtyping import Array, Float, Int, Num

_COLUMNS, _ROWS = 256, 16  # of a block in registers
_PARTS = 4  # blocks that share the rows of one block of columns


def active(z: Float[Array, "n"]) -> tuple[Int[Array, "n"], Float[Array, "n"], Int[Array, ""]]:
    """The numbers of the coordinates that are not zero, their values, and how many there are. The arrays are as long as
    z, so that nothing is compiled anew for another number."""
    (rows,) = jnp.nonzero(z, size=len(z), fill_value=0)
    return rows.astype(jnp.int32), z[rows].astype(jnp.float32), jnp.count_nonzero(z).astype(jnp.int32)


def gather(
    w: Num[Array, "n out"],
    rows: Int[Array, "n"],
    a: Float[Array, "n"],
    count: Int[Array, ""],
    *,
    scales: Float[Array, "n"] | None = None,
    interpret: bool = False,
) -> Float[Array, "out"]:
    """`Σ_k a[k] w[rows[k]]` for k below `count`, summed in float32. `scales`: what each row of an int8 matrix is to be
    multiplied by. `interpret`: run it as JAX operations, on any device."""
    n_out = w.shape[1]
    if scales is not None:
        a = a * scales[rows]
    everything = [pl.BlockSpec(memory_space=pl.ANY) for _ in range(4)]
    parts = pl.pallas_call(
        functools.partial(_kernel, n_out=n_out),
        grid=(pl.cdiv(n_out, _COLUMNS), _PARTS),
        in_specs=everything,
        out_specs=pl.BlockSpec(memory_space=pl.ANY),
        out_shape=jax.ShapeDtypeStruct((_PARTS, n_out), jnp.float32),
        compiler_params=None if interpret else pallas_triton.CompilerParams(num_warps=4),
        interpret=interpret,
        name="gather",
    )(count[None], rows, a, w)
    return parts.sum(axis=0)


def _kernel(count_ref, rows_ref, a_ref, w_ref, y_ref, *, n_out):
    load, store = pallas_triton.load, pallas_triton.store
    columns = pl.program_id(0) * _COLUMNS + jnp.arange(_COLUMNS)
    part, count = pl.program_id(1), count_ref[0]
    inside = columns < n_out

    def add(step, total):
        k = (step * _PARTS + part) * _ROWS + jnp.arange(_ROWS)
        live = k < count
        rows = load(rows_ref.at[k], mask=live, other=0)
        a = load(a_ref.at[k], mask=live, other=0.0)
        block = load(w_ref.at[rows[:, None], columns[None, :]], mask=live[:, None] & inside[None, :], other=0)
        return total + jnp.sum(a[:, None] * block.astype(jnp.float32), axis=0)

    steps = pl.cdiv(count, _ROWS * _PARTS)
    total = jax.lax.fori_loop(0, steps, add, jnp.zeros(_COLUMNS, jnp.float32))
    store(y_ref.at[part, columns], total, mask=inside)
