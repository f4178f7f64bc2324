"""The one rule for what is written, replaced and removed: only what rotsparse made and can prove that it made.

A folder that rotsparse makes holds a record (see `record`) of everything it made in there; a file of a format that has
room for it carries a signature. What has neither is the user's: it is never replaced, moved or removed. Nothing is
written through a symbolic link, except that the folder a user names may lie behind links of theirs. A file or folder
appears under its name when it is complete, and not before.
"""

import contextlib
import errno
import io
import json
import os
import re
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rotsparse._core.record import (
    FOLDER_FLAGS,
    RECORD,
    Record,
    absolute,
    appear,
    checked_descriptor,
    covering,
    folder_below,
    new_record,
    parent_folder,
    read_record,
    temporary_name,
)
from rotsparse._core.removal import empty, foreign, remove, remove_leftovers, remove_tree

__all__ = [
    "MARKDOWN",
    "PNG",
    "RECORD",
    "SIGNATURE",
    "adopt",
    "appending",
    "check_folder",
    "check_new_file",
    "check_replaceable",
    "empty",
    "expect",
    "foreign",
    "identity",
    "is_made",
    "is_recorded",
    "make_folder",
    "move",
    "new_folder",
    "npz",
    "put",
    "remove",
    "remove_leftovers",
    "write_atomically",
    "writing",
]

# In the metadata of a safetensors file and the comment of a .npz file; JSON files begin with a "format" that names it.
SIGNATURE = "rotsparse"
MARKDOWN = f"<!-- {SIGNATURE} -->\n"
PNG = {"Source": SIGNATURE}  # for Matplotlib's `savefig(metadata=...)`
_JSON_BEGINNING = re.compile(rb'\s*\{\s*"format": "rotsparse ')


def write_atomically(path: str | os.PathLike, payload: bytes) -> None:
    """Write `payload` to `path`: the file is either complete or what it was before, whenever the process stops. See
    `writing`."""
    with writing(path) as file:
        file.write(payload)


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[io.BufferedRandom]:
    """A file, open for writing and reading, that becomes `path` when the block ends well and vanishes when it does not.

    The bytes reach the disk before the rename. Raises `ValueError` if `path` is something that rotsparse did not
    write, `OSError` where the folder is missing, read-only or full.
    """
    path = absolute(path)
    with parent_folder(path) as folder:
        _check_file(path, folder)
        temporary = temporary_name()
        handle = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666, dir_fd=folder)
        try:
            with os.fdopen(handle, "w+b") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            record = covering(path)
            if record is not None:
                record.add(path)
            if _check_file(path, folder):
                os.rename(temporary, path.name, src_dir_fd=folder, dst_dir_fd=folder)
            else:
                try:
                    appear(temporary, path.name, folder)
                except FileExistsError:
                    raise ValueError(f"{path} appeared while it was written: choose another name") from None
        except BaseException as error:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary, dir_fd=folder)
            if isinstance(error, OSError) and error.filename in (None, temporary):
                error.filename = str(path)
            raise


def appending(path: str | os.PathLike) -> int:
    """A descriptor to append to a file that rotsparse wrote. Raises `ValueError` for other files."""
    path = absolute(path)
    with parent_folder(path) as folder:
        if not _check_file(path, folder):
            raise ValueError(f"{path} has vanished")
        return checked_descriptor(path, os.O_WRONLY | os.O_APPEND, folder)


def check_new_file(path: str | os.PathLike, overwrite: bool) -> None:
    """Raise `ValueError` if `path` cannot be written: there is no such folder, something is there, or (with
    `overwrite`) something that rotsparse did not write."""
    path = absolute(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: name a file in it")
    path.parent.mkdir(parents=True, exist_ok=True)
    with parent_folder(path) as folder:
        if not overwrite and os.path.lexists(path):
            raise ValueError(f"{path} exists: choose another file, or pass --overwrite to replace it")
        _check_file(path, folder)


def make_folder(path: str | os.PathLike, *, own: bool = False) -> None:
    """Make a folder, and the folders above it, where there is none. Raises `ValueError` if something else is there,
    a symbolic link too.

    Within what rotsparse made, the folder belongs to that; elsewhere (and always with `own`) it has a record of its
    own and appears together with it.
    """
    path = absolute(path)
    if os.path.lexists(path):
        return check_folder(path)
    try:
        record = covering(path)
        if record is None or own:
            path.parent.mkdir(parents=True, exist_ok=True)
            with parent_folder(path) as folder:
                temporary = _temporary_folder(folder, record=True)
                try:
                    os.rename(temporary, path.name, src_dir_fd=folder, dst_dir_fd=folder)
                except OSError:
                    remove_tree(temporary, folder)
                    check_folder(path)  # another process made it at the same time
            return None
        make_folder(path.parent)
        record.add(path)
        with parent_folder(path) as folder, contextlib.suppress(FileExistsError):
            os.mkdir(path.name, dir_fd=folder)
    except FileExistsError:  # what Python says of a file among the folders above
        raise ValueError(f"cannot write to {path}: {os.strerror(errno.ENOTDIR)}") from None
    except OSError as error:
        raise ValueError(f"cannot write to {path}: {error.strerror}") from None


def adopt(path: str | os.PathLike) -> None:
    """Make a folder, or take one that is there, to write into: what rotsparse makes in it is recorded, the folder
    itself and everything else in it stays the user's."""
    path = absolute(path)
    make_folder(path)
    if covering(path / RECORD) is None:
        with folder_below(path) as folder, contextlib.suppress(FileExistsError):
            new_record(folder, made=False)


def expect(beginning: Path) -> None:
    """Record that files whose paths begin so are made by a library that names them itself."""
    record = covering(absolute(beginning))
    if record is not None:
        record.add(absolute(beginning), prefix=True)


def check_folder(path: Path) -> None:
    """Raise `ValueError` unless `path` is a folder, and no symbolic link to one."""
    if path.is_symlink():
        raise ValueError(f"{path} is a symbolic link to {os.path.realpath(path)}: name that folder itself")
    if not path.is_dir():
        raise ValueError(f"cannot write to {path}: it is a file, not a folder")


def is_made(path: str | os.PathLike) -> bool:
    """Whether rotsparse made a folder as a whole, such as that of a run."""
    record = None if os.path.islink(path) else read_record(absolute(path))
    return record is not None and record.made


def identity(folder: str | os.PathLike) -> str | None:
    """The number of a folder that rotsparse made: no other folder has it, unless this one was copied."""
    record = None if os.path.islink(folder) else read_record(absolute(folder))
    return record.id if record is not None else None


def is_recorded(path: str | os.PathLike) -> bool:
    """Whether rotsparse made a file or folder within a folder that it keeps a record of."""
    record = covering(absolute(path))
    return record is not None and record.holds(absolute(path))


@contextlib.contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends well, and vanishes when it does not. Everything that
    the block puts into it counts as made by rotsparse.

    Raises `ValueError` if `path` already exists.
    """
    path = absolute(path)
    _check_absent(path)
    record = covering(path)
    if record is None:
        path.parent.mkdir(parents=True, exist_ok=True)
    else:
        make_folder(path.parent)
    with parent_folder(path) as parent:
        temporary = _temporary_folder(parent, record=record is None)
        work = path.with_name(temporary)
        try:
            yield work
            made = [path, *(path / found.relative_to(work) for found in work.rglob("*"))]
            if record is None:
                record = Record.of_folder(work).at(path)
            record.add(*made)
            _check_absent(path)
            os.rename(temporary, path.name, src_dir_fd=parent, dst_dir_fd=parent)
            os.fsync(parent)
        except BaseException:
            remove_tree(temporary, parent)
            raise


def move(path: str | os.PathLike, target: str | os.PathLike) -> None:
    """Give a folder within a recorded one another name there. Raises `ValueError` if that name is taken."""
    path, target = absolute(path), absolute(target)
    record = covering(path)
    _check_absent(target)
    if record is None or not record.holds(path):
        raise ValueError(f"{path} was not made by rotsparse: it is left where it is")
    record.add(target, *(target / found.relative_to(path) for found in path.rglob("*") if record.holds(found)))
    with parent_folder(path) as parent:
        os.rename(path.name, target.name, src_dir_fd=parent, dst_dir_fd=parent)
    record.forget(path)


def put(work: str | os.PathLike, path: str | os.PathLike, *, replace: bool = False) -> None:
    """Move a folder that rotsparse made to `path` beside it. With `replace`, an earlier one that is there is moved
    aside first and removed last: two renames, and both folders are whole at every moment.

    Raises `ValueError` if something is there that is not to be replaced.
    """
    work, path = absolute(work), absolute(path)
    with parent_folder(path) as parent:
        if not os.path.lexists(path):
            os.rename(work.name, path.name, src_dir_fd=parent, dst_dir_fd=parent)
            return
        if not replace:
            _check_absent(path)
        check_replaceable(path)
        before, earlier = identity(path), temporary_name()
        os.rename(path.name, earlier, src_dir_fd=parent, dst_dir_fd=parent)
        try:
            check_replaceable(path.with_name(earlier))
            if identity(path.with_name(earlier)) != before:
                raise ValueError(f"{path} was exchanged for another folder while it was replaced: it is left alone")
            os.rename(work.name, path.name, src_dir_fd=parent, dst_dir_fd=parent)
        except BaseException:
            os.rename(earlier, path.name, src_dir_fd=parent, dst_dir_fd=parent)
            raise
    with contextlib.suppress(OSError):
        remove(path.with_name(earlier))


def check_replaceable(folder: Path) -> None:
    """Raise `ValueError`, which says what to do, unless everything in a folder was made by rotsparse."""
    check_folder(folder)
    if not is_made(folder):
        raise ValueError(
            f"{folder} has no {RECORD}, the record of what rotsparse made (it is from an earlier version, or not from "
            "rotsparse): it will not be replaced. Move it away or remove it yourself, or choose another name"
        )
    others = foreign(folder)
    if others:
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        raise ValueError(
            f"{folder} holds {others[0].relative_to(folder)}{more}, which rotsparse did not write: move it elsewhere, "
            "or choose another name"
        )


def npz(**arrays: Any) -> bytes:
    """The bytes of a `.npz` file that carries the signature."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    signature = SIGNATURE.encode()
    return buffer.getvalue()[:-2] + struct.pack("<H", len(signature)) + signature


def _check_file(path: Path, folder: int) -> bool:
    """Whether there is a file to replace. Raises `ValueError` if something is there that rotsparse did not write."""
    try:
        mode = os.stat(path.name, dir_fd=folder, follow_symlinks=False).st_mode
    except FileNotFoundError:
        return False
    if stat.S_ISLNK(mode):
        raise ValueError(f"{path} is a symbolic link: name the file itself, or remove the link")
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path} is {'a folder' if stat.S_ISDIR(mode) else 'no regular file'}: choose another name")
    if not (is_recorded(path) or _signed(path, folder)):
        raise ValueError(f"{path} exists and was not written by rotsparse: move it away, or choose another name")
    return True


def _signed(path: Path, folder: int) -> bool:
    """Whether a file carries the signature of rotsparse."""
    with os.fdopen(checked_descriptor(path, os.O_RDONLY, folder), "rb") as file:
        beginning = file.read(256)
        size = file.seek(0, os.SEEK_END)
        if beginning[:2] == b"PK":
            file.seek(-min(size, len(SIGNATURE)), os.SEEK_END)
            return file.read() == SIGNATURE.encode()
        if _JSON_BEGINNING.match(beginning) or beginning.startswith(MARKDOWN.encode()):
            return True
        if beginning.startswith(b"\x89PNG"):
            return f"Source\0{SIGNATURE}".encode() in beginning
        length = int.from_bytes(beginning[:8], "little")
        if beginning[8:9] != b"{" or length > min(size - 8, 2**27):
            return False
        file.seek(8)
        try:
            return SIGNATURE in json.loads(file.read(length)).get("__metadata__", {})
        except (ValueError, AttributeError, TypeError, RecursionError):
            return False


def _temporary_folder(parent: int, *, record: bool) -> str:
    name = temporary_name()
    os.mkdir(name, dir_fd=parent)
    try:
        if record:
            handle = os.open(name, FOLDER_FLAGS, dir_fd=parent)
            try:
                new_record(handle, made=True)
            finally:
                os.close(handle)
    except BaseException:
        remove_tree(name, parent)
        raise
    return name


def _check_absent(path: Path) -> None:
    if os.path.lexists(path):
        raise ValueError(f"{path} exists already: choose another name or remove it first")
