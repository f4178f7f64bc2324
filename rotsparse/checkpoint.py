"""Checkpoints of a fit: a folder in which a run that was stopped anywhere finds everything to go on.

A checkpoint is a folder `step-00000400` with the arrays (`state/`, written by Orbax) and `manifest.json`: the step, the
configuration of the run, a hash of every array as it was in memory, a hash of every file, and a hash of itself. It is
written under another name, flushed to the disk and then renamed: what is called `step-...` was once whole. On loading,
the files are compared with their hashes before anything reads them (Orbax alone returns arrays with a flipped bit
without a word), the arrays with theirs afterwards, and the fit has a look at the values (rotations are orthogonal).
What fails is passed over for the checkpoint before, and the user is told.

Saving happens in a thread: copying the arrays to the host is all that the fit waits for. The thread is not Orbax's own
because hashes, the rename and the removal of older checkpoints have to follow in order. The only file of the library
that imports Orbax.
"""

import dataclasses
import json
import math
import os
import shutil
import time
import warnings
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rotsparse.fingerprint import array_digest, devices, difference, digest
from rotsparse.lock import FolderLock

MANIFEST = "manifest.json"
STATE = "state"
FORMAT = 1

# The latest so many are kept, and beside them the one with the best value.
KEEP = 2


class Damaged(Exception):
    """A checkpoint is not what was written."""


@dataclasses.dataclass(frozen=True)
class Checkpoints:
    """Where, and how often, a fit saves its state: `find_rotations(..., checkpoint=Checkpoints("run/checkpoints"))`.

    A fit whose folder holds checkpoints goes on from the latest that is intact, and ends with the same bits as if it
    had never been stopped; where they belong to other settings or data it refuses and shows the difference. It saves
    after every `every_steps` steps (if given), every `every_minutes` minutes (`None`: never by the clock), when it is
    interrupted by SIGINT or SIGTERM, and at its end. The latest two and the best are kept.

    Raises `ValueError` for intervals that are not positive.
    """

    folder: str | os.PathLike
    every_steps: int | None = None
    every_minutes: float | None = 5.0

    def __post_init__(self):
        for name in ("every_steps", "every_minutes"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} should be greater than zero (or None), got {value}")

    @classmethod
    def of(cls, checkpoint: "Checkpoints | str | os.PathLike") -> "Checkpoints":
        """A folder stands for checkpoints there, as often as usual."""
        return checkpoint if isinstance(checkpoint, Checkpoints) else cls(checkpoint)

    def part(self, name: str) -> "Checkpoints":
        """The same for one part of a larger problem, in a folder of its own."""
        return dataclasses.replace(self, folder=Path(self.folder) / name)


class Session:
    """The checkpoints of one running fit; the folder is locked from `__init__` to `close`.

    - `config`: what the fit depends on (see `fingerprint`). Continuing another one raises `ValueError`.
    - `state`: the state at the start of the fit, a pytree of arrays: what is loaded has its structure, types and
      placement on devices.
    - `sound`: what is wrong with a state, in words, or an empty text.

    `warnings` lists what the user was told.
    """

    def __init__(self, checkpoints: Checkpoints, config: dict[str, str], state: Any, sound: Callable[[Any], str]):
        self._options, self._config, self._sound = checkpoints, config, sound
        self._folder = Path(checkpoints.folder).absolute()
        self._template = state
        self._writes = jax.process_index() == 0  # every process has the same state: one of them writes it
        self._lock = FolderLock(self._folder) if self._writes else None
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future | None = None
        self._saved_step, self._saved_at = 0, time.monotonic()
        self._values: dict[str, float] = {}
        self.warnings: list[str] = []

    def restore(self) -> Any | None:
        """The state of the latest checkpoint that is intact; `None` where there is none at all.

        Raises `ValueError` where the checkpoints belong to another run, or all of them are damaged.
        """
        folders = sorted(self._folder.glob("step-*"), reverse=True)
        damaged = []
        for folder in folders:
            try:
                manifest = _read_manifest(folder)
                self._check_config(folder, manifest)
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
            raise ValueError(
                f"none of the checkpoints in {self._folder} is intact ({'; '.join(self.warnings)}): remove the folder "
                "to begin again"
            )
        self._clean([])
        return None

    def due(self, step: int) -> bool:
        """Whether it is time to save."""
        passed, steps, minutes = step - self._saved_step, self._options.every_steps, self._options.every_minutes
        by_steps = steps is not None and passed >= steps
        by_clock = minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes
        return passed > 0 and (by_steps or by_clock)

    def steps_left(self, step: int) -> int | None:
        """How many steps may follow `step` (which is saved now, if it is due) until a save by number of steps; `None`
        without such saves."""
        every = self._options.every_steps
        if every is None:
            return None
        left = self._saved_step + every - step
        return left if left > 0 else every

    def save(self, step: int, state: Any, value: float) -> None:
        """Begin to save; `value` is what the best checkpoint is chosen by. A save that fails is a warning."""
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
        """Wait for the save that is under way."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        error = pending.exception()
        if error is not None:
            self._warn(
                f"a checkpoint could not be written to {self._folder}: {_first_line(error)}. The fit goes on; earlier "
                "checkpoints are intact"
            )

    def close(self) -> None:
        """Wait for the last save and give the folder free."""
        try:
            self.wait()
        finally:
            self._worker.shutdown()
            if self._lock is not None:
                self._lock.release()

    def _warn(self, message: str) -> None:
        self.warnings.append(message)
        warnings.warn(message, stacklevel=4)

    def _check_config(self, folder: Path, manifest: dict[str, Any]) -> None:
        lines = difference(manifest["config"], self._config)
        if lines:
            shown = "".join(f"\n  {line}" for line in lines[:20]) + ("\n  ..." if len(lines) > 20 else "")
            raise ValueError(
                f"{self._folder} holds checkpoints of another run (up to step {manifest['step']}):{shown}\nGive the "
                "same settings and data to go on with it, or choose another folder"
            )

    def _load(self, folder: Path, manifest: dict[str, Any]) -> Any:
        _check_files(folder, manifest)
        expected = {name: (str(leaf.dtype), list(leaf.shape)) for name, leaf in _to_host(self._template).items()}
        stored = {name: (leaf["dtype"], leaf["shape"]) for name, leaf in manifest["leaves"].items()}
        if expected != stored:
            raise ValueError(
                f"{folder} holds a state of another form than this version of the library and of the solver has: "
                "choose another folder"
            )
        abstract = {name: np.empty(leaf["shape"], _dtype(leaf["dtype"])) for name, leaf in manifest["leaves"].items()}
        try:
            leaves = _orbax_restore(folder / STATE, {name: a for name, a in abstract.items() if a.size})
        except Exception as error:  # whatever a reader may raise over files that are not what they should be
            raise Damaged(_first_line(error)) from error
        leaves = {name: leaves.get(name, abstract[name]) for name in abstract}
        for name, leaf in leaves.items():
            if array_digest(leaf) != manifest["leaves"][name]["hash"]:
                raise Damaged(f"array {manifest['leaves'][name]['path']} is not the one that was saved")
        state = _from_host(leaves, self._template)
        wrong = self._sound(state)
        if wrong:
            raise Damaged(wrong)
        return state

    def _write(self, step: int, leaves: dict[str, np.ndarray], value: float) -> None:
        """Write a checkpoint, commit it, and remove those that are not kept any more. Runs in the thread."""
        work = self._folder / f"saving-{step:08d}"
        final = self._folder / f"step-{step:08d}"
        try:
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            _orbax_save(work / STATE, {name: leaf for name, leaf in leaves.items() if leaf.size})
            paths = _leaf_paths(self._template)
            manifest = {
                "format": FORMAT,
                "step": step,
                "value": value if math.isfinite(value) else None,
                "devices": devices(),
                "config": self._config,
                "leaves": {
                    name: {
                        "path": paths[name],
                        "dtype": leaf.dtype.name,
                        "shape": list(leaf.shape),
                        "hash": array_digest(leaf),
                    }
                    for name, leaf in leaves.items()
                },
                "files": _flushed_files(work),
            }
            payload = json.dumps(manifest | {"hash": digest(_canonical(manifest))}, indent=1).encode()
            _write_flushed(work / MANIFEST, payload)
            _flush_folder(work)
            if final.exists():  # only one that was passed over as damaged
                shutil.rmtree(final)
            work.rename(final)
            _flush_folder(self._folder)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
        self._values[final.name] = value
        self._prune()

    def _prune(self) -> None:
        folders = sorted(self._folder.glob("step-*"))
        values = {folder: self._value(folder) for folder in folders}
        keep = {*folders[-KEEP:], min(folders, key=values.__getitem__)}
        for folder in set(folders) - keep:
            shutil.rmtree(folder, ignore_errors=True)

    def _value(self, folder: Path) -> float:
        if folder.name not in self._values:
            try:
                value = _read_manifest(folder)["value"]
            except Damaged:
                value = None
            self._values[folder.name] = math.inf if value is None else value
        return self._values[folder.name]

    def _clean(self, damaged: list[Path]) -> None:
        """Move damaged checkpoints out of the way, for a look at them, and remove what an earlier process was writing
        when it was killed."""
        if not self._writes:
            return
        for folder in damaged:
            aside = folder.with_name(f"damaged-{folder.name}")
            shutil.rmtree(aside, ignore_errors=True)
            folder.rename(aside)
        for folder in self._folder.glob("saving-*"):
            shutil.rmtree(folder, ignore_errors=True)


def _orbax_save(path: Path, leaves: dict[str, np.ndarray]) -> None:
    with _checkpointer() as checkpointer:
        checkpointer.save(path, leaves)


def _orbax_restore(path: Path, abstract: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    with _checkpointer() as checkpointer:
        return checkpointer.restore(path, abstract)


def _checkpointer():
    import orbax.checkpoint as ocp  # a third of a second, which only a fit with checkpoints has to spend

    # Each process reads and writes on its own: nothing waits for the others.
    own = jax.process_index()
    multiprocessing = ocp.options.MultiprocessingOptions(primary_host=own, active_processes={own})
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=multiprocessing)
    return ocp.Checkpointer(handler, multiprocessing_options=multiprocessing)


def _read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, compared with its own hash. Raises `Damaged`."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        stored = manifest.pop("hash")
        intact = stored == digest(_canonical(manifest)) and manifest["format"] == FORMAT
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise Damaged(f"{MANIFEST}: {_first_line(error)}") from None
    if not intact:
        raise Damaged(f"{MANIFEST} is not the one that was written")
    return manifest


def _check_files(folder: Path, manifest: dict[str, Any]) -> None:
    """Compare every file with its hash. Raises `Damaged`."""
    for name, stored in manifest["files"].items():
        try:
            payload = (folder / name).read_bytes()
        except OSError as error:
            raise Damaged(f"{name}: {error.strerror}") from None
        if digest(payload) != stored:
            raise Damaged(f"{name} is not what was written")


def _canonical(manifest: dict[str, Any]) -> bytes:
    return json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()


def _flushed_files(folder: Path) -> dict[str, str]:
    """The hash of every file under `folder`; all of them, and their folders, are on the disk afterwards."""
    hashes = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            _flush_folder(path)
            continue
        with path.open("rb") as file:
            hashes[str(path.relative_to(folder))] = digest(file.read())
            os.fsync(file.fileno())
    return hashes


def _write_flushed(path: Path, payload: bytes) -> None:
    with path.open("wb") as file:
        file.write(payload)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _leaf_paths(state: Any) -> dict[str, str]:
    """The name under which each leaf is stored, and its path in the pytree."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {f"{i:04d}": jax.tree_util.keystr(path) for i, (path, _) in enumerate(leaves)}


def _to_host(state: Any) -> dict[str, np.ndarray]:
    """The leaves as NumPy arrays of their own. Called by all processes: it gathers what is sharded over them."""
    return {f"{i:04d}": _leaf_to_host(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}


def _leaf_to_host(leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array):
        if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        if leaf.is_fully_replicated:
            leaf = leaf.addressable_data(0)
        elif not leaf.is_fully_addressable:
            from jax.experimental import multihost_utils

            leaf = multihost_utils.process_allgather(leaf, tiled=True)
    return np.array(leaf)


def _from_host(leaves: dict[str, np.ndarray], template: Any) -> Any:
    """The inverse of `_to_host`: a pytree like `template`, placed on the devices where that is."""
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


def _dtype(name: str) -> np.dtype:
    return np.dtype(name)  # bfloat16 and the like are known to NumPy once JAX is imported


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
