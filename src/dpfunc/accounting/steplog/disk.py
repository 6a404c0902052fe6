"""What reaches the disk, and when: whole files through a rename, lines through fsync, one writer."""

from __future__ import annotations

import errno
import os
import tempfile
from io import FileIO
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: nobody is kept out
    fcntl = None

_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)


def replace_file(path: str | os.PathLike[str], content: bytes) -> None:
    """Put content at path through a rename, so that no reader ever sees half of it."""
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"Expected a folder at {path.parent}, found none.")
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a new name in a folder last; where folders cannot be opened, the system sees to it."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_alone(path: Path) -> FileIO:
    """Open a file to read and write, made if there is none, and keep other writers out until it is closed.

    Raises:
        BlockingIOError: another writer has it, in this process or in another.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"Expected a folder at {path.parent}, found none.")
    new = not path.exists()
    file = FileIO(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o644), "r+")
    try:
        if fcntl is not None:
            _lock(file, path)
        if new and os.name != "nt":
            os.fchmod(file.fileno(), 0o644)
    except BaseException:
        file.close()
        raise
    return file


def check_size(file: FileIO, size: int) -> None:
    """Refuse a file that is no longer the one that was left with `size` bytes."""
    now = os.fstat(file.fileno())
    if now.st_size != size or not now.st_nlink:
        raise OSError(
            f"Expected the log to be as it was left, {size} bytes long, found "
            f"{f'{now.st_size} bytes' if now.st_nlink else 'it deleted'}. Someone else has changed it."
        )


def write_at(file: FileIO, size: int, content: bytes) -> None:
    """Put content after the first `size` bytes of a file; it is on disk when this returns."""
    file.seek(size)
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) :]
    os.fsync(file.fileno())


def cut(file: FileIO, size: int) -> None:
    """Cut a file to `size` bytes, on disk."""
    file.truncate(size)
    os.fsync(file.fileno())


def _lock(file: FileIO, path: Path) -> None:
    assert fcntl is not None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BlockingIOError(
            error.errno, f"Expected one writer of {path}, found another at work. Let it end first."
        ) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
