"""A folder that one process at a time may write to."""

import fcntl
import os
import socket
import time
from pathlib import Path

LOCK = "lock"

# Whoever asks whether a folder is locked (`held`) locks it for a moment.
ATTEMPTS = 5


class FolderLock:
    """An exclusive lock on a folder, held from `__init__` to `release`.

    The operating system holds it (`flock` on the file `lock`), so it ends with the process, however that ends: a lock
    file that a killed process left behind locks nothing. Raises `ValueError` where another process holds it, or the
    folder cannot be written to.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self._file = self._locked()
        while not self._in_place():  # its holder moved the folder away between our opening the file and locking it
            os.close(self._file)
            self._file = self._locked()
        os.truncate(self._file, 0)
        os.write(self._file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())

    def _locked(self) -> int:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise ValueError(f"cannot write to {self.folder}: {error.strerror}") from None
        for attempt in range(ATTEMPTS):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return file
            except OSError:
                if attempt < ATTEMPTS - 1:
                    time.sleep(0.1)
        holder = os.read(file, 200).decode(errors="replace").strip() or "another process"
        os.close(file)
        raise ValueError(f"{self.folder} is in use by {holder}: wait until it has finished, or choose another folder")

    def _in_place(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._file), os.stat(self.folder / LOCK))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Give the folder free. Does nothing the second time."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def held(folder: str | os.PathLike) -> bool:
    """Whether a process holds the folder's lock now."""
    try:
        file = os.open(Path(folder) / LOCK, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(file)
    return False
