"""A folder that one process at a time may write to."""

import contextlib
import fcntl
import os
import re
import socket
import stat
import time
from pathlib import Path

from rotsparse._core.files import check_folder, make_folder
from rotsparse._core.record import FOLDER_FLAGS, absolute, checked_descriptor, covering

LOCK = "lock"

# Whoever asks whether a folder is locked (`held`) locks it for a moment.
ATTEMPTS = 5

_TEXT = re.compile(rb"process \d+ on [^\n]*\n")


class FolderLock:
    """An exclusive lock on a folder, held from `__init__` to `release`.

    The operating system holds it (`flock` on the file `lock`), so it ends with the process, however that ends: a lock
    file that a killed process left behind locks nothing. A missing folder is made. Raises `ValueError` if another
    process holds the lock, the folder cannot be written to, or a file or link called `lock` is in the way.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = absolute(folder)
        self._folder = self._file = -1
        try:
            while not self._taken():
                self._close()
            try:
                os.truncate(self._file, 0)
                os.write(self._file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            except OSError:  # the disk is full: an empty lock would not say who made it
                self.release()
                raise
        except BaseException:
            self._close()
            raise

    def release(self) -> None:
        """Unlock the folder and remove the lock file. Does nothing the second time."""
        if self._file >= 0:
            with contextlib.suppress(OSError):  # the folder may have got another name meanwhile
                if self._same_file():
                    os.unlink(LOCK, dir_fd=self._folder)
            self._close()

    def _taken(self) -> bool:
        """Lock the folder: `False` where it was moved away, or its lock file removed, by the holder before us."""
        make_folder(self.folder)
        check_folder(self.folder)
        try:
            self._folder = os.open(self.folder, FOLDER_FLAGS)
            self._file = self._lock_file()
        except FileNotFoundError:
            return False
        except OSError as error:
            raise ValueError(f"cannot write to {self.folder}: {error.strerror}") from None
        for attempt in range(ATTEMPTS):
            with contextlib.suppress(OSError):
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return self._in_place()
            if attempt < ATTEMPTS - 1:
                time.sleep(0.1)
        holder = os.pread(self._file, 200, 0).decode(errors="replace").strip() or "another process"
        raise ValueError(f"{self.folder} is in use by {holder}: wait until it has finished, or choose another folder")

    def _lock_file(self) -> int:
        """A new lock file, or the one that a process of rotsparse left or holds."""
        path = self.folder / LOCK
        with contextlib.suppress(FileExistsError):
            record = covering(path)
            if record is not None:
                record.add(path)
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            return os.open(LOCK, flags, 0o666, dir_fd=self._folder)
        file = checked_descriptor(path, os.O_RDWR, self._folder)
        about = os.pread(file, 1000, 0)
        for _ in range(ATTEMPTS):  # it may just have been made
            if about:
                break
            time.sleep(0.02)
            about = os.pread(file, 1000, 0)
        if _TEXT.fullmatch(about) or (not about and covering(path) is not None):
            return file
        os.close(file)
        raise ValueError(
            f"{path} is in the way: rotsparse keeps its lock under this name, and did not write that file. Rename it, "
            "or choose another folder"
        )

    def _in_place(self) -> bool:
        try:
            here = os.stat(self.folder, follow_symlinks=False)
            return os.path.samestat(os.fstat(self._folder), here) and self._same_file()
        except FileNotFoundError:
            return False

    def _same_file(self) -> bool:
        return os.path.samestat(os.fstat(self._file), os.stat(LOCK, dir_fd=self._folder, follow_symlinks=False))

    def _close(self) -> None:
        for handle in (self._file, self._folder):
            if handle >= 0:
                os.close(handle)
        self._folder = self._file = -1


def held(folder: str | os.PathLike) -> bool:
    """Whether a process holds the folder's lock now."""
    try:
        file = os.open(Path(folder) / LOCK, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        if stat.S_ISREG(os.fstat(file).st_mode):
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(file)
    return False
