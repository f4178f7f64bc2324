"""The record of what rotsparse made in a folder: the file `.rotsparse`.

Its first line holds an id and whether rotsparse made the folder itself (`"made": true`) or was given it; every line
after that names a file or folder in it that rotsparse made, relative to it, and is written before the thing itself
(`{"prefix": ...}` names all that begin so). A record speaks for its folder and what is below; only where the
folder is the user's own does it speak for nothing but what lies directly in it, and deeper down for what it names.
"""

import contextlib
import dataclasses
import errno
import json
import os
import re
import secrets
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

RECORD = ".rotsparse"

FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW

_TEMPORARY = re.compile(r"\.rotsparse-[0-9a-f]{16}")

# A record of more bytes is none of ours.
_LARGEST = 2**26

# Threads of this process write to one record in turn; other processes are kept out by the folder's lock.
_WRITING = threading.Lock()


@dataclasses.dataclass(frozen=True)
class Record:
    """The record of `folder`; `names` and `prefixes` are what it lists."""

    folder: Path
    id: str
    made: bool
    names: frozenset[str]
    prefixes: tuple[str, ...]
    place: Path | None = None

    @classmethod
    def of_folder(cls, folder: Path) -> "Record":
        record = read_record(folder)
        if record is None:
            raise ValueError(f"{folder} has lost its {RECORD}")
        return record

    def at(self, place: Path) -> "Record":
        """The record of a folder that is about to be called `place`."""
        return dataclasses.replace(self, place=place)

    def name(self, path: Path) -> str:
        """A path as the record has it."""
        return path.relative_to(self.place or self.folder).as_posix()

    def lists(self, name: str) -> bool:
        """Whether a name is listed."""
        return name in self.names or name.startswith(self.prefixes)

    def holds(self, path: Path) -> bool:
        """Whether a path is listed."""
        return self.lists(self.name(path))

    def add(self, *paths: Path, prefix: bool = False) -> None:
        """List paths; with `prefix` everything whose path begins so."""
        new = [self.name(path) for path in paths]
        lines = [json.dumps({"prefix": n} if prefix else n) + "\n" for n in new if n != "." and not self.lists(n)]
        if lines:
            with _WRITING, folder_below(self.folder) as folder:
                handle = checked_descriptor(self.folder / RECORD, os.O_RDWR | os.O_APPEND, folder)
                try:
                    _append(handle, "".join(lines).encode())
                finally:
                    os.close(handle)

    def after_forgetting(self) -> "Record":
        """The same record with nothing in it."""
        return dataclasses.replace(self, names=frozenset(), prefixes=())

    def forget(self, path: Path) -> None:
        """List what is at and below a path no longer (of the folder itself: nothing any more)."""
        gone = self.name(path)
        with _WRITING, folder_below(self.folder) as folder:
            now = read_record(self.folder)
            if now is None:
                return
            stays = lambda name: gone != "." and name != gone and not name.startswith(f"{gone}/")  # noqa: E731
            lines = [*filter(stays, sorted(now.names)), *({"prefix": p} for p in filter(stays, now.prefixes))]
            temporary = temporary_name()
            _write(temporary, folder, [_header(now.id, now.made), *map(json.dumps, lines)])
            os.rename(temporary, RECORD, src_dir_fd=folder, dst_dir_fd=folder)


def read_record(folder: Path) -> Record | None:
    """The record in a folder; `None` where there is none, or something else of that name."""
    try:
        handle = os.open(folder / RECORD, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    about = os.fstat(handle)
    if not stat.S_ISREG(about.st_mode) or about.st_size > _LARGEST:
        os.close(handle)
        return None
    with os.fdopen(handle, "rb") as file:
        head, *lines = file.read().split(b"\n")
    try:
        header = json.loads(head)
        made, number = bool(header["made"]), str(header["id"])
        if header["format"] != _FORMAT:
            return None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    names, prefixes = set(), set()
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):  # the last line of a process that was killed
            match json.loads(line):
                case str(name):
                    names.add(name)
                case {"prefix": str(prefix)} if prefix:
                    prefixes.add(prefix)
    return Record(folder, number, made, frozenset(names), tuple(sorted(prefixes)))


def new_record(folder: int, *, made: bool) -> None:
    """Begin a record in an open folder. Raises `FileExistsError` if something has its name."""
    temporary = temporary_name()
    _write(temporary, folder, [_header(secrets.token_hex(16), made)])
    try:
        appear(temporary, RECORD, folder)
    except BaseException:
        os.unlink(temporary, dir_fd=folder)
        raise


def covering(path: Path) -> Record | None:
    """The record that speaks for a path: the nearest one in the folders above it."""
    for folder in path.parents:
        record = read_record(folder)
        if record is not None:
            return record if record.made or folder == path.parent or record.holds(path.parent) else None
    return None


def outermost(path: Path) -> Path | None:
    """The outermost of the folders above a path that rotsparse made or was given."""
    found = None
    for folder in path.parents:
        record = read_record(folder)
        if record is not None and (record.made or folder == path.parent or record.holds(path.parent)):
            found = folder
    return found


@contextlib.contextmanager
def folder_below(top: Path, folder: Path | None = None) -> Iterator[int]:
    """`folder`, opened from `top` on without following a symbolic link. Raises `ValueError` if there is one."""
    handle = os.open(top, os.O_RDONLY | os.O_DIRECTORY)
    try:
        here = top
        for part in (folder or top).relative_to(top).parts:
            here = here / part
            try:
                inner = os.open(part, FOLDER_FLAGS, dir_fd=handle)
            except OSError as error:
                if error.errno not in (errno.ENOTDIR, errno.ELOOP):
                    raise
                what = "a symbolic link" if here.is_symlink() else "no folder"
                raise ValueError(f"{here} is {what}, and rotsparse made it as a folder: remove it") from None
            os.close(handle)
            handle = inner
        yield handle
    finally:
        os.close(handle)


def checked_descriptor(path: Path, flags: int, folder: int) -> int:
    """Open an existing file for reading, or for appending. Raises `ValueError` unless it is a regular file that (for
    writing) has no other names, and `OSError`."""
    try:
        handle = os.open(path.name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
    except OSError as error:
        if path.is_symlink():
            raise ValueError(f"{path} is a symbolic link: remove it") from None
        if path.is_fifo():
            raise ValueError(f"{path} is a FIFO and should be a file: remove it") from None
        raise error
    about = os.fstat(handle)
    writes = flags & (os.O_WRONLY | os.O_RDWR)
    if not stat.S_ISREG(about.st_mode) or (writes and about.st_nlink > 1):
        os.close(handle)
        what = "no regular file" if not stat.S_ISREG(about.st_mode) else "a file that has other names (hard links)"
        raise ValueError(f"{path} is {what}: remove it")
    return handle


def absolute(path: str | os.PathLike) -> Path:
    """The path from the root, with its links as they are."""
    return Path(os.path.abspath(path))


@contextlib.contextmanager
def parent_folder(path: Path) -> Iterator[int]:
    """The open folder of a file: within what rotsparse made, no part of the way to it may be a symbolic link."""
    with folder_below(outermost(path) or path.parent, path.parent) as folder:
        yield folder


def appear(temporary: str, name: str, folder: int) -> None:
    """Give a file in an open folder its name. Raises `FileExistsError` if something has it."""
    try:
        os.link(temporary, name, src_dir_fd=folder, dst_dir_fd=folder, follow_symlinks=False)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        os.rename(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
    else:
        os.unlink(temporary, dir_fd=folder)


def temporary_name() -> str:
    """A name under which something is written until it is complete."""
    return f"{RECORD}-{secrets.token_hex(8)}"


def is_temporary(name: str) -> bool:
    """Whether `temporary_name` made this name: what a killed process left in a folder of rotsparse's."""
    return _TEMPORARY.fullmatch(name) is not None


_FORMAT = "rotsparse record 1"


def _header(number: str, made: bool) -> str:
    return json.dumps({"format": _FORMAT, "id": number, "made": made})


def _write(name: str, folder: int, lines: list[str]) -> None:
    """Write a new file in an open folder, all of it or nothing."""
    handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666, dir_fd=folder)
    try:
        with os.fdopen(handle, "w") as file:
            file.write("".join(f"{line}\n" for line in lines))
    except BaseException:
        os.unlink(name, dir_fd=folder)
        raise


def _append(file: int, lines: bytes) -> None:
    """Add lines to an open file, all of them or none. Raises `OSError`."""
    size = os.fstat(file).st_size
    if size and os.pread(file, 1, size - 1) != b"\n":  # whoever wrote the line before was killed
        lines = b"\n" + lines
    if os.write(file, lines) < len(lines):
        os.ftruncate(file, size)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), RECORD)
