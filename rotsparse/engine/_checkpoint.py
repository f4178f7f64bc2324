"""Checkpoints of a fit: a folder with everything that is needed to resume it.

Saving runs in a thread; the fit only waits for the arrays to be copied to the host. The thread is not Orbax's own,
because hashes, the rename and the removal of older checkpoints have to follow in order. A damaged checkpoint is skipped
with a warning, and the one before it is loaded.
"""

import math
import os
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from rotsparse._core import files
from rotsparse._core.differences import differences
from rotsparse._core.errors import CheckError
from rotsparse._core.lock import FolderLock
from rotsparse.data.devices import is_first_process
from rotsparse.engine._checkpoint_files import Damaged, first_line, read_arrays, read_manifest, saved, write_checkpoint
from rotsparse.engine._fingerprint import devices

# Number of latest checkpoints that are kept, besides the one with the best value.
KEEP = 2


class Session:
    """The checkpoints of one running fit; the folder is locked from `__init__` to `close`.

    - `folder`, `every_steps`, `every_minutes`: where, and how often, the state is saved (see `Run`).
    - `config`: what the fit depends on (see `fingerprint`); resuming a fit with another config raises `ValueError`.
    - `state`: the state at the start of the fit, a pytree of arrays. Loaded states have its structure, types and
      placement on devices.
    - `sound`: a function that says what is wrong with a state; an empty text for a sound one.

    `warnings` lists all warnings that were given.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        config: dict[str, str],
        state: Any,
        sound: Callable[[Any], str],
        *,
        every_steps: int | None = None,
        every_minutes: float | None = 5.0,
    ):
        self._every_steps, self._every_minutes, self._config, self._sound = every_steps, every_minutes, config, sound
        self._folder = Path(folder).absolute()
        self._template = state
        self._writes = is_first_process()  # every process has the same state: one of them writes it
        self._lock = FolderLock(self._folder) if self._writes else None
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future | None = None
        self._saved_step, self._saved_at = 0, time.monotonic()
        self._values: dict[str, float] = {}
        self.warnings: list[str] = []

    def restore(self) -> Any | None:
        """The state of the latest intact checkpoint; `None` if there are no checkpoints.

        Raises `ValueError` if the checkpoints belong to another run, and `CheckError` if all of them are damaged.
        """
        damaged = []
        for folder in reversed(saved(self._folder)):
            try:
                manifest = read_manifest(folder)
                self._check_config(manifest)
                state = self._load(folder, manifest)
            except Damaged as damage:
                damaged.append(folder)
                self._warn(f"checkpoint {folder.name} is damaged ({damage}) and was passed over")
                continue
            self._saved_step = int(manifest["step"])
            if manifest["devices"] != devices():
                self._warn(f"resumed on {devices()}, begun on {manifest['devices']}: equal to rounding, not to the bit")
            self._clean(damaged)
            return state
        if damaged:
            raise CheckError(
                f"none of the checkpoints in {self._folder} is intact ({'; '.join(self.warnings)}): remove the folder "
                "to begin again"
            )
        self._clean([])
        return None

    def due(self, step: int) -> bool:
        """Whether the state should be saved now."""
        passed, steps, minutes = step - self._saved_step, self._every_steps, self._every_minutes
        by_steps = steps is not None and passed >= steps
        by_clock = minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes
        return passed > 0 and (by_steps or by_clock)

    def steps_left(self, step: int) -> int | None:
        """The number of steps from `step` (which is saved first, if due) to the next save by number of steps; `None` if
        there are no such saves."""
        every = self._every_steps
        if every is None:
            return None
        left = self._saved_step + every - step
        return left if left > 0 else every

    def save(self, step: int, state: Any, value: float) -> None:
        """Start saving. The best checkpoint is the one with the lowest `value`. A save that fails gives a warning."""
        self.wait()
        if step == self._saved_step:
            return
        wrong = self._sound(state)
        if wrong:
            self._warn(f"step {step} was not saved: {wrong}")
            return
        leaves = _to_host(state)
        self._saved_step, self._saved_at = step, time.monotonic()
        if self._writes:
            self._pending = self._worker.submit(self._write, step, leaves, value)

    def wait(self) -> None:
        """Wait until the current save is complete."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        error = pending.exception()
        if error is not None:
            self._warn(
                f"a checkpoint could not be written to {self._folder}: {first_line(error)}. The fit goes on; earlier "
                "checkpoints are intact"
            )

    def close(self) -> None:
        """Wait for the last save and release the folder."""
        try:
            self.wait()
        finally:
            self._worker.shutdown()
            if self._lock is not None:
                self._lock.release()

    def _warn(self, message: str) -> None:
        self.warnings.append(message)
        warnings.warn(message, stacklevel=4)

    def _check_config(self, manifest: dict[str, Any]) -> None:
        lines = differences(manifest["config"], self._config)
        if lines:
            shown = "".join(f"\n  {line}" for line in lines[:20]) + ("\n  ..." if len(lines) > 20 else "")
            raise ValueError(
                f"{self._folder} holds checkpoints of another run (up to step {manifest['step']}):{shown}\nGive the "
                "same settings and data to go on with it, or choose another folder"
            )

    def _load(self, folder: Path, manifest: dict[str, Any]) -> Any:
        expected = {name: (str(leaf.dtype), list(leaf.shape)) for name, leaf in _to_host(self._template).items()}
        if expected != {name: (leaf["dtype"], leaf["shape"]) for name, leaf in manifest["leaves"].items()}:
            raise ValueError(
                f"{folder} holds a state of another form than this version of the library and of the solver has: "
                "choose another folder"
            )
        state = _from_host(read_arrays(folder, manifest), self._template)
        wrong = self._sound(state)
        if wrong:
            raise Damaged(wrong)
        return state

    def _write(self, step: int, leaves: dict[str, np.ndarray], value: float) -> None:
        """Write a checkpoint and remove those that are no longer kept. Runs in the thread."""
        about = {"value": value if math.isfinite(value) else None, "devices": devices(), "config": self._config}
        folder = write_checkpoint(self._folder, step, leaves, _leaf_paths(self._template), about)
        self._values[folder.name] = value
        self._prune()

    def _prune(self) -> None:
        folders = saved(self._folder)
        values = {folder: self._value(folder) for folder in folders}
        keep = {*folders[-KEEP:], min(folders, key=values.__getitem__)}
        for folder in set(folders) - keep:
            files.remove(folder)

    def _value(self, folder: Path) -> float:
        if folder.name not in self._values:
            try:
                value = read_manifest(folder)["value"]
            except Damaged:
                value = None
            self._values[folder.name] = math.inf if value is None else value
        return self._values[folder.name]

    def _clean(self, damaged: list[Path]) -> None:
        """Rename damaged checkpoints, so that they can be inspected, and remove the unfinished files of a process that
        was killed."""
        if not self._writes:
            return
        for folder in damaged:
            aside = folder.with_name(f"damaged-{folder.name}")
            files.remove(aside)
            files.move(folder, aside)
        files.remove_leftovers(self._folder)


def _leaf_paths(state: Any) -> dict[str, str]:
    """The name under which each leaf is stored, and its path in the pytree."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {f"{i:04d}": jax.tree_util.keystr(path) for i, (path, _) in enumerate(leaves)}


def _to_host(state: Any) -> dict[str, np.ndarray]:
    """Copy the leaves to NumPy arrays. All processes must call this, because it gathers arrays sharded over them."""
    return {f"{i:04d}": _leaf_to_host(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}


def _leaf_to_host(leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array):
        if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        if leaf.is_fully_replicated:
            leaf = leaf.addressable_data(0)
        elif not leaf.is_fully_addressable:
            leaf = multihost_utils.process_allgather(leaf, tiled=True)
    return np.array(leaf)


def _from_host(leaves: dict[str, np.ndarray], template: Any) -> Any:
    """The inverse of `_to_host`: a pytree like `template`, placed on the same devices."""
    like, structure = jax.tree.flatten(template)
    return jax.tree.unflatten(structure, [_leaf_like(leaves[f"{i:04d}"], leaf) for i, leaf in enumerate(like)])


def _leaf_like(host: np.ndarray, leaf: Any) -> Any:
    if not isinstance(leaf, jax.Array):
        return host
    if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.device_put(
            jax.random.wrap_key_data(jax.numpy.asarray(host), impl=jax.random.key_impl(leaf)), leaf.sharding
        )
    return jax.make_array_from_callback(host.shape, leaf.sharding, lambda index: host[index])
