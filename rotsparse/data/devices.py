"""Many devices: examples are spread over one axis of a mesh, restarts over the other. All devices along the first axis
hold the same rotations.

Every device runs the same program (`jax.shard_map`) on its own examples and its own restarts. The sums over all
examples need one all-reduce of `d_in² + d_out²` numbers a step. Which examples a step sees does not depend on the
number of devices; the result depends on it only through the rounding of sums in another order.

With several processes (`jax.distributed`) the mesh holds the devices of all of them, every process runs the same Python
program, and each reads only the examples of its own devices.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from rotsparse.data.sources import Source

EXAMPLES, RESTARTS = "examples", "restarts"

_EVERYWHERE = PartitionSpec()


def device_mesh(*, restarts: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of all devices of all processes (or of `devices`), in `restarts` groups: each group fits its share of the
    restarts, and within a group each device has its share of the examples.

    A single device is also a mesh, so the same program runs on any number. Raises `ValueError` if the devices cannot
    be divided into that many groups of equal size.
    """
    devices = jax.devices() if devices is None else list(devices)
    if restarts < 1 or len(devices) % restarts:
        raise ValueError(f"{len(devices)} devices cannot be divided into {restarts} groups of one size")
    grid = np.asarray(devices, object).reshape(restarts, -1)
    return Mesh(grid, (RESTARTS, EXAMPLES), axis_types=(AxisType.Auto, AxisType.Auto))


def is_first_process() -> bool:
    """Whether this process reports progress and writes files."""
    return jax.process_index() == 0


def of_all_processes(x: np.ndarray) -> np.ndarray:
    """Stack `x` from all processes along a new first axis, bit-exactly."""
    if jax.process_count() == 1:
        return x[None]
    # As bytes, because JAX would convert float64 to float32.
    raw = np.ascontiguousarray(x).reshape(-1).view(np.uint8)
    return np.asarray(multihost_utils.process_allgather(raw)).view(x.dtype).reshape(-1, *x.shape)


@dataclasses.dataclass(frozen=True)
class Devices:
    """The devices of a fit: a mesh, or the default device (`mesh=None`), for which most methods do nothing.

    Raises `ValueError` for a mesh with other axes than `device_mesh` makes.
    """

    mesh: Mesh | None

    def __post_init__(self):
        if self.mesh is not None and set(self.mesh.axis_names) != {EXAMPLES, RESTARTS}:
            raise ValueError(
                f"expected a mesh with the axes {EXAMPLES!r} and {RESTARTS!r}, got {self.mesh.axis_names}: make it "
                "with rotsparse.device_mesh()"
            )

    def check(self, restarts: int) -> None:
        """Raise `ValueError` if this number of restarts cannot be spread evenly."""
        if self.mesh is not None and restarts % self.mesh.shape[RESTARTS]:
            raise ValueError(
                f"{restarts} restarts cannot be spread evenly over {self.mesh.shape[RESTARTS]} groups of devices: take "
                "a multiple, or another device_mesh(restarts=...)"
            )

    # --- onto the devices and back

    def spread(self, objective: Any) -> Any:
        """An objective with its examples spread over the devices."""
        return objective if self.mesh is None else objective.spread(self)

    def replicate(self, tree: Any) -> Any:
        """Put all arrays of a tree on every device, except those that `rows` has already spread."""
        return self._place(tree, _EVERYWHERE)

    def over_restarts(self, tree: Any) -> Any:
        """Spread all arrays of a tree over the groups of devices along their first axis, the restarts."""
        return self._place(tree, PartitionSpec(RESTARTS))

    def rows(self, x: Float[Array, "n d"]) -> Float[Array, "m d"]:
        """Examples spread over the devices of a group, padded with copies of the last one to a multiple of their
        number."""
        if self.mesh is None:
            return x
        filled = np.asarray(x)[self._filled(len(x))]
        return _global(filled, NamedSharding(self.mesh, PartitionSpec(EXAMPLES)))

    def gather(self, tree: Any) -> Any:
        """The whole arrays of a tree on this process's default device."""
        if self.mesh is None:
            return tree
        whole = _identity(NamedSharding(self.mesh, _EVERYWHERE))(tree)
        return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf.addressable_data(0))), whole)

    # --- minibatches

    def reader(self, source: Source, rows: Int[np.ndarray, "restarts steps batch"], dtype) -> Callable[[], Any]:
        """A function that reads the rows that this process's devices need, for `batches`. It may run in any thread."""
        shape = (*rows.shape, source.shape[1])
        if self.mesh is None:
            return lambda: source.read(rows.reshape(-1)).reshape(shape).astype(dtype, copy=False)
        rows = rows[:, :, self._filled(rows.shape[2])]
        shape = (*rows.shape, source.shape[1])
        sharding = NamedSharding(self.mesh, PartitionSpec(RESTARTS, None, EXAMPLES))
        here = [index for index in sharding.addressable_devices_indices_map(shape).values() if index is not None]
        indices = {_bounds(index, shape): index[:3] for index in here}

        def read():
            blocks = {}
            for bounds, index in indices.items():
                wanted = rows[index]
                block = source.read(wanted.reshape(-1)).reshape(*wanted.shape, -1)
                blocks[bounds] = block.astype(dtype, copy=False)
            return _Blocks(shape, sharding, blocks)

        return read

    def batches(self, read: Any) -> Any:
        """Put what readers have read on the devices: `[restarts, steps, batch, width]`, to each device its part of the
        batch."""
        return jax.tree.map(lambda leaf: leaf.spread() if isinstance(leaf, _Blocks) else jnp.asarray(leaf), read)

    # --- programs

    def layout(self, tree: Any) -> tuple[PartitionSpec, ...] | None:
        """How the arrays of a tree are sharded on the mesh: a static argument for `map`."""
        if self.mesh is None:
            return None
        return tuple(leaf.sharding.spec for leaf in jax.tree.leaves(eqx.filter(tree, eqx.is_array)))

    def map(self, function: Callable, layout, shared: Any, restarts: Any, batches: Any = None) -> Any:
        """Run `function(shared, restarts, batches)` on every device, with its own restarts and its own part of the
        batches; `shared` is sharded as `layout` says. Arrays of the result have the restarts first."""
        if self.mesh is None:
            return function(shared, restarts, batches)
        arrays, static = eqx.partition(shared, eqx.is_array)
        leaves, structure = jax.tree.flatten(arrays)
        return jax.shard_map(
            lambda leaves, *rest: function(eqx.combine(jax.tree.unflatten(structure, leaves), static), *rest),
            mesh=self.mesh,
            in_specs=(list(layout), PartitionSpec(RESTARTS), PartitionSpec(RESTARTS, None, EXAMPLES)),
            out_specs=PartitionSpec(RESTARTS),
            check_vma=False,  # rotations are equal along the axis of examples, because the sums are
        )(leaves, restarts, batches)

    def _place(self, tree, spec):
        if self.mesh is None:
            return tree
        sharding = NamedSharding(self.mesh, spec)

        def place(leaf):
            there = isinstance(leaf, jax.Array) and getattr(leaf.sharding, "mesh", None) == self.mesh
            return leaf if there else _global(leaf, sharding)

        arrays, rest = eqx.partition(tree, eqx.is_array)
        return eqx.combine(jax.tree.map(place, arrays), rest)

    def _filled(self, n: int) -> np.ndarray:
        """The indices 0 to n - 1, the last one repeated up to a multiple of the number of devices in a group."""
        assert self.mesh is not None
        devices = self.mesh.shape[EXAMPLES]
        return np.minimum(np.arange(-(-n // devices) * devices), n - 1)


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """The blocks of an array that this process's devices hold, by their bounds."""

    shape: tuple[int, ...]
    sharding: NamedSharding
    blocks: dict[tuple, np.ndarray]

    def spread(self) -> Array:
        return jax.make_array_from_callback(self.shape, self.sharding, lambda i: self.blocks[_bounds(i, self.shape)])


@functools.cache
def _identity(sharding: NamedSharding) -> Callable[[Any], Any]:
    """A program that only reshards its argument. Cached, so that it is compiled once."""
    return jax.jit(lambda tree: tree, out_shardings=sharding)


def _bounds(index: Any, shape: tuple[int, ...]) -> tuple:
    return tuple(part.indices(n)[:2] for part, n in zip(index, shape, strict=True))


def _global(leaf, sharding: NamedSharding) -> Array:
    """One global array from an array that every process holds. No data are sent."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_global(jax.random.key_data(leaf), sharding), impl=jax.random.key_impl(leaf))
    whole = np.asarray(leaf)
    return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])
