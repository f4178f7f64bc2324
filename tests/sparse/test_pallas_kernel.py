"""The kernel for GPUs: right where it is interpreted, and lowered for CUDA without one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("jax.experimental.pallas.triton")

from rotsparse.sparse.decode_weights import stored
from rotsparse.sparse.pallas_kernel import active, gather


def numbers(n: int, out: int, share: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    z = rng.normal(size=n).astype(np.float32) * (rng.uniform(size=n) < share)
    return z, rng.normal(size=(n, out)).astype(np.float32)


@pytest.mark.parametrize(("n", "out"), [(1, 1), (40, 300), (130, 256)])
@pytest.mark.parametrize("share", [0, 0.3, 1])
def test_the_product(n, out, share):
    z, w = numbers(n, out, share)
    rows, a, count = active(jnp.asarray(z))
    assert count == np.count_nonzero(z)
    np.testing.assert_allclose(gather(jnp.asarray(w), rows, a, count, interpret=True), z @ w, atol=1e-4)


def test_rows_that_are_not_active_are_not_read():
    """They may hold anything."""
    z, w = numbers(64, 100, 0.5)
    spoiled = np.where((z == 0)[:, None], np.nan, w)
    spoiled[0] = np.where(z[0] == 0, 0, w[0])  # what stands in for the numbers behind `count`
    np.testing.assert_allclose(gather(jnp.asarray(spoiled), *active(jnp.asarray(z)), interpret=True), z @ w, atol=1e-4)


def test_coarser_weights():
    z, w = numbers(64, 100, 0.5)
    half = jnp.asarray(w, jnp.bfloat16)
    found = gather(half, *active(jnp.asarray(z)), interpret=True)
    np.testing.assert_allclose(found, z @ np.asarray(half, np.float32), atol=1e-4)
    flat, scales = stored(w, np.dtype(np.int8))
    whole = jnp.asarray(flat.reshape(64, -1))
    found = gather(whole, *active(jnp.asarray(z)), scales=jnp.asarray(scales), interpret=True)
    np.testing.assert_allclose(found, z @ (np.asarray(whole, np.float32) * scales[:, None]), atol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8])
def test_it_is_lowered_for_cuda(dtype):
    """To one call of a Triton kernel; there is no device here that could compile it further."""
    target = "__gpu$xla.gpu.triton"
    shapes = jax.ShapeDtypeStruct((576, 960), dtype), jax.ShapeDtypeStruct((576,), jnp.float32)
    exported = jax.export.export(
        jax.jit(lambda w, z: gather(w, *active(z))),
        platforms=["cuda"],
        disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(target)],
    )(*shapes)
    assert exported.platforms == ("cuda",)
    assert exported.mlir_module().count(f"@{target}(") == 1
    assert exported.out_avals[0].shape == (960,)
