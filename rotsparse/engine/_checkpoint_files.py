"""One checkpoint on disk: a folder with the arrays, written by Orbax, and a manifest with a hash of everything.

    step-00000400/
      manifest.json    the step, the configuration of the run, a hash of every array as it was in memory, of every file,
                       and of the manifest itself
      state/           the arrays, in Orbax's format

It is written under another name, flushed to disk and then renamed, so a folder called `step-...` was complete at some
time. When it is loaded, the files are compared with their hashes before they are read (Orbax alone does not notice a
flipped bit), and the arrays with theirs afterwards. This is the only module that imports Orbax.
"""

import asyncio
import functools
import json
import logging
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rotsparse._core import files
from rotsparse._core.confined import confined
from rotsparse._core.digests import array_digest, digest
from rotsparse._core.reading import regular_file

MANIFEST = "manifest.json"
STATE = "state"
FORMAT = 1


class Damaged(Exception):
    """A checkpoint differs from what was written."""


def saved(folder: Path) -> list[Path]:
    """The checkpoints that rotsparse wrote in a folder, first to last. Raises `ValueError` if there are only folders of
    that name that it did not write."""
    found = sorted(folder.glob("step-*"))
    steps = {path: path.name.removeprefix("step-") for path in found if files.is_recorded(path)}
    if found and not steps:
        raise ValueError(
            f"{folder} holds {found[0].name}, which was not written by this version of rotsparse (there is no "
            f"{files.RECORD} that lists it) and is left alone: choose another folder, or remove it yourself"
        )
    return sorted((path for path, step in steps.items() if step.isdecimal()), key=lambda path: int(steps[path]))


def write_checkpoint(
    folder: Path, step: int, leaves: Mapping[str, np.ndarray], paths: Mapping[str, str], about: Mapping[str, Any]
) -> Path:
    """Write the checkpoint of a step into `folder`. `paths`: the path of each array in the state. `about`: further
    entries of the manifest. The checkpoint is complete or absent whenever the process stops. Errors of Orbax and of the
    operating system are passed on, and no files are left behind."""
    final = folder / f"step-{step:08d}"
    files.adopt(folder)
    with files.new_folder(final) as work:
        _orbax_save(work / STATE, {name: leaf for name, leaf in leaves.items() if leaf.size})
        described = {
            name: {
                "path": paths[name],
                "dtype": leaf.dtype.name,
                "shape": list(leaf.shape),
                "hash": array_digest(leaf),
            }
            for name, leaf in leaves.items()
        }
        manifest = {"format": FORMAT, "step": step, **about, "leaves": described, "files": _flushed_files(work)}
        payload = json.dumps(manifest | {"hash": digest(_canonical(manifest))}, indent=1).encode()
        files.write_atomically(work / MANIFEST, payload)
        _flush_folder(work)
    return final


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of a checkpoint. Raises `Damaged` if it does not match its own hash."""
    try:
        manifest = json.loads(regular_file(folder / MANIFEST).read_bytes())
        stored = manifest.pop("hash")
        intact = stored == digest(_canonical(manifest)) and manifest["format"] == FORMAT and _whole(manifest)
        for name in manifest["files"]:
            confined(folder, name, folder / MANIFEST)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise Damaged(f"{MANIFEST}: {first_line(error)}") from None
    if not intact:
        raise Damaged(f"{MANIFEST} is not the one that was written")
    return manifest


def _whole(manifest: Mapping[str, Any]) -> bool:
    """Whether everything that is read from a manifest is there and of its type."""
    described = ("path", str), ("dtype", str), ("shape", list), ("hash", str)
    return (
        type(manifest["step"]) is int
        and isinstance(manifest["devices"], str)
        and isinstance(manifest["value"], int | float | None)
        and isinstance(manifest["config"], dict)
        and isinstance(manifest["files"], dict)
        and all(isinstance(leaf[name], kind) for leaf in manifest["leaves"].values() for name, kind in described)
    )


def read_arrays(folder: Path, manifest: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Read the arrays of a checkpoint. Raises `Damaged` if a file or an array does not match its hash."""
    for name, stored in manifest["files"].items():
        try:
            payload = regular_file(folder / name).read_bytes()
        except (OSError, ValueError) as error:
            raise Damaged(f"{name}: {first_line(error)}") from None
        if digest(payload) != stored:
            raise Damaged(f"{name} is not what was written")
    # NumPy knows names such as bfloat16 once JAX is imported.
    abstract = {name: np.empty(leaf["shape"], np.dtype(leaf["dtype"])) for name, leaf in manifest["leaves"].items()}
    try:
        restored = _orbax_restore(folder / STATE, {name: leaf for name, leaf in abstract.items() if leaf.size})
    except Exception as error:  # readers of damaged files may raise anything
        raise Damaged(first_line(error)) from error
    leaves = {name: restored.get(name, abstract[name]) for name in abstract}  # Orbax does not take empty arrays
    for name, leaf in leaves.items():
        if array_digest(leaf) != manifest["leaves"][name]["hash"]:
            raise Damaged(f"array {manifest['leaves'][name]['path']} is not the one that was saved")
    return leaves


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 300 characters."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def _orbax_save(path: Path, leaves: dict[str, np.ndarray]) -> None:
    try:
        with _checkpointer() as checkpointer:
            checkpointer.save(path, leaves)
    except BaseException:
        _settle(path.parent)
        raise


def _settle(folder: Path) -> None:
    """Wait, for two seconds at most, until nothing changes in a folder any more. Orbax reports the first error of a
    save while other threads of it still write, and what they write after the folder was removed would stay behind."""
    before, same = None, 0
    for _ in range(40):
        try:
            now = sorted((str(found), found.stat().st_size) for found in folder.rglob("*"))
        except OSError:  # it went away meanwhile
            now = None
        same = same + 1 if now is not None and now == before else 0
        if same == 4:
            return
        before = now
        time.sleep(0.05)


def _orbax_restore(path: Path, abstract: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    with _checkpointer() as checkpointer:
        return checkpointer.restore(path, abstract)


def _checkpointer():
    import orbax.checkpoint as ocp  # takes a third of a second, which only fits with checkpoints need

    silence()
    # Each process reads and writes by itself and waits for no other.
    own = jax.process_index()
    multiprocessing = ocp.options.MultiprocessingOptions(primary_host=own, active_processes={own})
    handler = ocp.StandardCheckpointHandler(multiprocessing_options=multiprocessing)
    return ocp.Checkpointer(handler, multiprocessing_options=multiprocessing)


def _canonical(manifest: dict[str, Any]) -> bytes:
    return json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()


def _flushed_files(folder: Path) -> dict[str, str]:
    """The hash of every file under `folder`. Flushes the files and their folders to disk."""
    hashes = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir():
            _flush_folder(path)
            continue
        with path.open("rb") as file:
            hashes[str(path.relative_to(folder))] = digest(file.read())
            os.fsync(file.fileno())
    return hashes


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- what Orbax prints  When a save or a load fails, Orbax's threads log the exception with a traceback before they
# raise it. Orbax also closes the event loop of a thread while TensorStore still works on other arrays: their failures
# are logged when their tasks are garbage collected, and a TensorStore thread that finds the loop closed raises an
# exception that cannot be caught. The exception that Orbax raises to its caller says the same, and is reported.


@functools.cache
def silence() -> None:
    """Suppress these messages, and no others, in this process."""
    logging.getLogger("absl").addFilter(lambda record: "_SignalingThread.run() raised" not in str(record.msg))
    logging.getLogger("asyncio").addFilter(lambda record: not _is_orphan(record.getMessage()))
    earlier = sys.unraisablehook
    sys.unraisablehook = lambda unraisable: None if _met_closed_loop(unraisable) else earlier(unraisable)


def _is_orphan(message: str) -> bool:
    """Whether asyncio logs a failed task or future of Orbax or TensorStore whose result was never retrieved."""
    return "exception was never retrieved" in message and ("orbax" in message or "tensorstore" in message)


def _met_closed_loop(unraisable: "sys.UnraisableHookArgs") -> bool:
    """Whether `loop.call_soon_threadsafe` was called on a closed loop by code other than Python."""
    trace = unraisable.exc_traceback
    return (
        isinstance(unraisable.exc_value, RuntimeError)
        and trace is not None
        and trace.tb_frame.f_code is asyncio.BaseEventLoop.call_soon_threadsafe.__code__
        and trace.tb_frame.f_back is None
    )
