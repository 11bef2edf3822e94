"""Files and folders written whole: under a temporary name, which takes the former one's place once it is on disk."""

import contextlib
import errno
import glob
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from c3a_triton.errors import CheckpointError

__all__ = ["abandoned", "flush_to_disk", "replace_file", "temporary_path", "write_temporary"]

_ABANDONED_AFTER_S = 3600.0


def flush_to_disk(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on disk.

    Some file systems, such as mounted object stores, know no such request for folders, or let nobody open one, and
    Windows has none at all: there the names are not waited for.

    Raises:
        OSError: the system reports a failure.
    """
    is_folder = path.is_dir()
    if is_folder and os.name != "posix":
        return
    try:
        descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    except PermissionError:
        if is_folder:
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not is_folder or error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
    finally:
        os.close(descriptor)


def temporary_path(path: Path) -> Path:
    """An unused name in the same folder, for what is to take the place of `path` when it is complete."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")


def abandoned(path: Path) -> Iterator[Path]:
    """What was to take the place of `path`, and in which nothing was written for an hour: its writer was killed."""
    for temporary in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        # A writer that is alive may remove or rename it meanwhile.
        with contextlib.suppress(OSError):
            times = [part.stat().st_mtime for part in (temporary, *temporary.rglob("*"))]
            if time.time() - max(times) > _ABANDONED_AFTER_S:
                yield temporary


def write_temporary(path: Path, content: bytes) -> Path:
    """Writes `content` to disk under a temporary name beside `path`, creating the folder; returns that name.

    Raises:
        CheckpointError: it cannot be written. Nothing is left behind.
    """
    temporary = temporary_path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        if path.parent.is_dir():
            temporary.unlink(missing_ok=True)
        raise CheckpointError(f"cannot write {path}: {error}") from error
    return temporary


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file whole, creating the folder where it is missing: a former one is there until it is replaced.

    Raises:
        CheckpointError: it cannot be written.
    """
    temporary = write_temporary(path, content)
    try:
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"cannot write {path}: {error}") from error
