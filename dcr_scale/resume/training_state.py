"""What an engine has learned, on disk: trained parameters in float32 and AdamW's moments, each tensor whole.

One safetensors file holds every trained parameter's master, first and second moment in its full shape, whatever the
number of ranks: each writes, and reads back, the byte ranges of the elements it holds. So a run goes on with any world
size, and nothing is gathered. Frozen parameters are not in it: they are the source's.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from dcr_scale.engine import STATES, Engine
from dcr_scale.errors import UserError
from dcr_scale.models import disk
from dcr_scale.models.checkpoint import Checkpoint, header
from dcr_scale.resume.checksum import partial_checksum, wrapped
from dcr_scale.world import World

FILE = "training_state.safetensors"
# Elements at once.
_CHUNK = disk.CHUNK_BYTES // 4

Checksums = dict[str, int]


def lay_out(engine: Engine, path: Path) -> None:
    """Make the file at its full size, with its header and room for the content. Raises OSError on a full disk."""
    begin, nbytes = header({f"{name}.{key}": (torch.float32, shape) for name, shape, key in _tensors(engine)}, {})
    with path.open("wb") as file:
        file.write(begin)
        if shutil.disk_usage(path.parent).free < nbytes:
            # Found now, before anything is written.
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        file.truncate(len(begin) + nbytes)


@torch.no_grad()
def write_own(engine: Engine, folder: Path, world: World) -> Checksums:
    """Write this rank's elements into the file that :func:`lay_out` made, durably; every tensor's checksum.

    Every rank calls it. Raises the same UserError on all where one cannot write.
    """
    path, parts = folder / FILE, Checksums()
    with world.agreed(path):
        stored = Checkpoint.of_file(path)
        with disk.descriptor(path, os.O_WRONLY) as opened:
            for name, key, (start, values) in engine.own_states():
                begins = stored.tensors[f"{name}.{key}"].start
                checksum = 0
                for at in range(0, values.numel(), _CHUNK):
                    chunk = values[at : at + _CHUNK].contiguous()
                    checksum += partial_checksum(chunk, start + at)
                    disk.write(opened, disk.bytes_of(chunk.cpu()), begins + 4 * (start + at))
                parts[f"{name}.{key}"] = checksum
            os.fsync(opened)
    return _added_up(engine, parts, world)


@torch.no_grad()
def read_own(engine: Engine, folder: Path, world: World) -> Checksums:
    """Take over this rank's elements of every tensor in the file; every tensor's checksum, as it was read.

    Every rank calls it, and :meth:`Engine.adopt` afterwards. Raises the same UserError on all where the file cannot be
    read or is another model's.
    """
    parts: Checksums = {}
    with world.agreed():
        stored = Checkpoint.of_file(folder / FILE)
        expected = {f"{name}.{key}": tuple(shape) for name, shape, key in _tensors(engine)}
        if expected != {name: info.shape for name, info in stored.tensors.items()}:
            raise UserError(f"{folder}: holds other tensors than the ones that train here; it is of another model")
        for name, key, (start, values) in engine.own_states(filled=True):
            checksum = 0
            for at in range(0, values.numel(), _CHUNK):
                chunk = stored.read(f"{name}.{key}", start + at, min(_CHUNK, values.numel() - at)).to(values.device)
                checksum += partial_checksum(chunk, start + at)
                values[at : at + _CHUNK].copy_(chunk)
            parts[f"{name}.{key}"] = checksum
    return _added_up(engine, parts, world)


def _tensors(engine: Engine) -> Iterator[tuple[str, tuple[int, ...], str]]:
    """Parameter, shape and kind of state of every tensor, in the file's order."""
    return ((name, shape, key) for name, shape in engine.trained.items() for key in STATES)


def _added_up(engine: Engine, parts: Checksums, world: World) -> Checksums:
    """All ranks' parts of each tensor's checksum together."""
    names = [f"{name}.{key}" for name, _, key in _tensors(engine)]
    totals = torch.tensor([wrapped(parts[name]) for name in names], dtype=torch.int64, device=world.device)
    if world.size > 1:
        dist.all_reduce(totals)  # which wraps around, as it should
    return dict(zip(names, totals.tolist(), strict=True))
