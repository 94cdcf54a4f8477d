"""Bytes on a disk: written at offsets, copied inside the kernel, made durable; folders replaced whole or not at all."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

# Bytes converted, copied or sent at once: large enough for a disk's full rate, small beside any tensor worth
# partitioning.
CHUNK_BYTES = 32 * 2**20

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextmanager
def descriptor(path: Path, flags: int) -> Iterator[int]:
    """A file's descriptor; an OSError that calls on it raise knows the file's name."""
    opened = os.open(path, flags)
    try:
        yield opened
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise
    finally:
        os.close(opened)


def bytes_of(values: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return values.view(torch.uint8).numpy().data.cast("B") if values.numel() else memoryview(b"")


def write(opened: int, data: memoryview, offset: int) -> None:
    """Write all of ``data`` at byte ``offset`` of a file that is open for writing only.

    Other nodes may write what lies before and behind. Where the file can be read as well, Linux's NFS client fetches
    the page around and may send the whole of it back, over what they have written.
    """
    done = 0
    while done < len(data):
        done += os.pwrite(opened, data[done : done + CHUNK_BYTES], offset + done)


def blocks(start: int, stop: int) -> Iterator[tuple[int, int]]:
    """[start, stop) cut at multiples of 32 MiB, as (start, stop) in order."""
    while start < stop:
        end = min((start // CHUNK_BYTES + 1) * CHUNK_BYTES, stop)
        yield start, end
        start = end


def copy_range(reading: int, writing: int, offset: int, count: int) -> None:
    """Copy bytes between the same offsets of two files: inside the kernel, as shared blocks where it can."""
    end = offset + count
    while offset < end:
        try:
            copied = os.copy_file_range(reading, writing, end - offset, offset, offset)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
                raise
            copied = 0
        if copied == 0:
            block = os.pread(reading, min(CHUNK_BYTES, end - offset), offset)
            if not block:
                raise OSError(errno.EIO, "the source file became shorter while it was copied")
            copied = os.pwrite(writing, block, offset)
        offset += copied


def sync(path: Path) -> None:
    """Make a file's content, or a folder's entries, durable."""
    with descriptor(path, os.O_RDONLY) as opened:
        os.fsync(opened)


# --- folders -------------------------------------------------------------------------------------------


def partial_name(folder: Path) -> Path:
    """Where the successor of ``folder`` is built, on the same file system."""
    return folder.with_name(folder.name + ".partial")


def replaced_name(folder: Path) -> Path:
    """Where the predecessor of ``folder`` lies for a moment, where the file system cannot swap two names."""
    return folder.with_name(folder.name + ".replaced")


def replace_folder(folder: Path) -> None:
    """Make ``folder`` durable out of its partial, which every file of has been written to, and give it its name.

    At every moment, a crash included, either the old or the new folder is whole; see :func:`restore_replaced`.
    """
    partial, replaced = partial_name(folder), replaced_name(folder)
    for path in [*partial.rglob("*"), partial]:
        sync(path)
    if not folder.exists():
        os.rename(partial, folder)
    elif _swapped(partial, folder):
        replaced = partial
    else:
        _rename_twice(folder)
    sync(folder.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def restore_replaced(folder: Path) -> None:
    """Move the old ``folder`` back where a process died between taking it away and putting the new one in its place.

    Everyone who opens a checkpoint calls it first; of several at once, one does it.
    """
    if not folder.exists() and replaced_name(folder).is_dir():
        with suppress(OSError):
            os.rename(replaced_name(folder), folder)


def _rename_twice(folder: Path) -> None:
    while folder.exists():
        shutil.rmtree(replaced_name(folder), ignore_errors=True)
        os.rename(folder, replaced_name(folder))
        try:
            os.rename(partial_name(folder), folder)
            return
        except OSError as error:
            # Between the two a reader may have moved the old one back.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                restore_replaced(folder)
                raise


def _swapped(one: Path, other: Path) -> bool:
    """Swap two names at once. False where the kernel or the file system cannot."""
    rename = _renameat2()
    if rename is None:
        return False
    result = rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)
    if result == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM):
        return False
    raise OSError(code, os.strerror(code), str(one))


@functools.cache
def _renameat2() -> Callable[..., int] | None:
    """renameat2(2), which Python does not offer; None where the C library lacks it."""
    try:
        function = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint]
    return function
