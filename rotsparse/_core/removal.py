"""Removing what rotsparse made, and nothing else. See `files` for the rule."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from rotsparse._core.record import (
    FOLDER_FLAGS,
    RECORD,
    Record,
    absolute,
    covering,
    folder_below,
    is_temporary,
    parent_folder,
    read_record,
)


def foreign(folder: str | os.PathLike) -> list[Path]:
    """What is in a folder that rotsparse did not put there, all of it where there is no record."""
    folder = absolute(folder)
    record = read_record(folder)
    if record is None:
        return sorted(folder.iterdir())
    with folder_below(folder) as handle:
        return sorted(folder / name for name in _foreign(handle, "", record))


def remove(path: str | os.PathLike) -> None:
    """Remove what rotsparse made at and below `path`. Everything else stays, and so do the folders that hold it."""
    path = absolute(path)
    if not path.is_dir() or path.is_symlink():
        return
    record = read_record(path)
    whole = record is not None and record.made
    if not whole:
        record = covering(path)
    if record is None:
        return
    below = "" if whole else f"{record.name(path)}/"
    with parent_folder(path) as parent:
        handle = os.open(path.name, FOLDER_FLAGS, dir_fd=parent)
        try:
            empty = _clear(handle, below, record)
            if whole and empty:
                os.unlink(RECORD, dir_fd=handle)
        finally:
            os.close(handle)
        if empty:
            os.rmdir(path.name, dir_fd=parent)
    if not whole:
        record.forget(path)


def empty(folder: str | os.PathLike, *, keep: tuple[str, ...] = ()) -> None:
    """Remove what rotsparse made in a folder that it made, but for some files directly in it."""
    folder = absolute(folder)
    record = read_record(folder)
    if record is None or not record.made:
        return
    with folder_below(folder) as handle:
        _clear(handle, "", record, keep=(RECORD, *keep))
    record.forget(folder)
    record.after_forgetting().add(*(folder / name for name in keep if record.lists(name)))


def remove_leftovers(folder: str | os.PathLike) -> None:
    """Remove from a folder that is locked what killed processes were writing into it."""
    with folder_below(absolute(folder)) as handle:
        for name, mode in _entries(handle):
            if is_temporary(name) and stat.S_ISDIR(mode):
                remove_tree(name, handle)
            elif is_temporary(name) and stat.S_ISREG(mode):
                os.unlink(name, dir_fd=handle)


def _foreign(folder: int, below: str, record: Record) -> Iterator[str]:
    for name, mode in _entries(folder):
        if stat.S_ISDIR(mode):
            if is_temporary(name):
                continue
            handle = os.open(name, FOLDER_FLAGS, dir_fd=folder)
            try:
                inside = [entry for entry, _ in _entries(handle)]
                if RECORD in inside or not (inside or record.lists(below + name)):
                    yield below + name
                else:
                    yield from _foreign(handle, f"{below}{name}/", record)
            finally:
                os.close(handle)
        elif not _ours(name, mode, below, record):
            yield below + name


def _clear(folder: int, below: str, record: Record, keep: tuple[str, ...] = (RECORD,)) -> bool:
    """Remove what the record lists: whether nothing is left but `keep`, directly in the folder of the record."""
    empty = True
    for name, mode in _entries(folder):
        if stat.S_ISDIR(mode):
            if is_temporary(name):
                remove_tree(name, folder)
                continue
            handle = os.open(name, FOLDER_FLAGS, dir_fd=folder)
            try:
                inside = [entry for entry, _ in _entries(handle)]
                foreign = RECORD in inside or not (inside or record.lists(below + name))
                removable = not foreign and _clear(handle, f"{below}{name}/", record, ())
            finally:
                os.close(handle)
            if removable:
                os.rmdir(name, dir_fd=folder)
            empty &= removable
        elif _ours(name, mode, below, record):
            if name not in keep:
                os.unlink(name, dir_fd=folder)
        else:
            empty = False
    return empty


def _ours(name: str, mode: int, below: str, record: Record) -> bool:
    made = is_temporary(name) or record.lists(below + name) or (name == RECORD and not below)
    return stat.S_ISREG(mode) and made


def remove_tree(name: str, parent: int) -> None:
    """Remove a temporary folder of rotsparse with everything in it; links in it are removed, not followed."""
    handle = os.open(name, FOLDER_FLAGS, dir_fd=parent)
    try:
        for entry, mode in _entries(handle):
            if stat.S_ISDIR(mode):
                remove_tree(entry, handle)
            else:
                os.unlink(entry, dir_fd=handle)
    finally:
        os.close(handle)
    os.rmdir(name, dir_fd=parent)


def _entries(folder: int) -> list[tuple[str, int]]:
    """Names and modes of what is in an open folder, links as links."""
    with os.scandir(folder) as entries:
        return sorted((entry.name, entry.stat(follow_symlinks=False).st_mode) for entry in entries)
