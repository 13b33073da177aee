"""Files that are whole or not there: written, flushed to the disk and checksummed; folders that are renamed into place.

The checksum is SHA-256: processors with instructions for it compute it about as fast as a CRC-32, it misses nothing at any
length, and `sha256sum` on the command line computes it too. Both release Python's lock.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from automodel_accel.checkpoint.errors import CheckpointError, DamagedError

PARTIAL = ".partial"  # what is being written, or being removed
BLOCK = 8 << 20
Digest = tuple[int, str]  # bytes, SHA-256 in hexadecimal digits


def write_file(path: Path, parts: Iterable[Any]) -> Digest:
    """Write buffers of bytes one after the other, and wait until the disk has them.

    Raises:
        CheckpointError: the disk is full, or does not take it; names the file.
    """
    checksum, size = hashlib.sha256(), 0
    try:
        with open(path, "xb", buffering=0) as file:
            for part in parts:
                checksum.update(part)
                size += write_all(file, memoryview(part).cast("B"))
            os.fsync(file.fileno())
    except OSError as error:
        raise CheckpointError(_why(path, size, error)) from error
    return size, checksum.hexdigest()


def write_all(file: Any, data: memoryview) -> int:
    """Write all of it: one call of the system may take less, as on Linux anything above 2 GiB."""
    done = 0
    while done < len(data):
        done += file.write(data[done : done + BLOCK])
    return done


def _why(path: Path, size: int, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(path.parent).free if path.parent.is_dir() else 0
        return f"{path}: no space left on the disk after {size} bytes of it ({free} free); older checkpoints are as they were."
    return f"{path}: could not be written: {error.strerror or error}; older checkpoints are as they were."


def sync_folder(path: Path) -> None:
    """Wait until the disk knows the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def move(source: Path, target: Path) -> None:
    """Rename, and wait until the disk knows; on one file system that happens entirely or not at all."""
    try:
        os.replace(source, target)
        sync_folder(target.parent)
    except OSError as error:
        raise CheckpointError(f"{source} could not be renamed to {target.name}: {error}.") from error


def replace_text(path: Path, text: str) -> None:
    """Replace a small file: a reader sees the old text or the new one."""
    aside = path.with_name(path.name + PARTIAL)
    aside.unlink(missing_ok=True)
    write_file(aside, [text.encode()])
    move(aside, path)


def remove_folder(path: Path) -> None:
    """Remove a folder that may be complete: under its name it is complete, or not there, at every moment."""
    if path.suffix != PARTIAL:
        aside = path.with_name(path.name + PARTIAL)
        shutil.rmtree(aside, ignore_errors=True)
        move(path, aside)
        path = aside
    shutil.rmtree(path, ignore_errors=True)


def check_file(path: Path, expected: Digest) -> None:
    """Read a file and compare.

    Raises:
        DamagedError: it is missing, has another length, or other bytes.
    """
    size, digest = expected
    if not path.is_file():
        raise DamagedError(f"{path} is missing; expected {size} bytes.")
    if (found := path.stat().st_size) != size:
        raise DamagedError(f"{path} has {found} bytes; expected {size}. It was cut off or written over.")
    checksum = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(BLOCK):
                checksum.update(block)
    except OSError as error:
        raise DamagedError(f"{path} cannot be read: {error}.") from error
    if checksum.hexdigest() != digest:
        raise DamagedError(f"{path} has other bytes than were written: its SHA-256 is not the recorded one.")


def to_json(value: Any) -> bytes:
    """JSON; the order of a dict is kept, and what is read from it gives the same bytes again."""
    return json.dumps(value, separators=(",", ":")).encode()
