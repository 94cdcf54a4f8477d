"""Writes a changed model as a checkpoint like its source, without gathering it.

The source's layout is the output's: the same shards, names, dtypes and offsets. What did not change is
copied byte for byte; of what changed, each rank writes the byte ranges of the elements it holds, or, where
ranks share no disk, sends them block by block to one writer on each disk. No rank holds more than a block
beyond its own partition. The folder is built under another name, with a manifest of hashes, and renamed
when every rank is done, so it is whole or absent.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from dcr_scale.errors import UserError
from dcr_scale.models import disk
from dcr_scale.models.checkpoint import Checkpoint
from dcr_scale.models.lora import LowRankDelta
from dcr_scale.models.manifest import ALONE, MANIFEST_FILE, Digests, Manifest
from dcr_scale.models.phases import FREE_SPACE, Phases
from dcr_scale.models.tensor_map import Piece, TensorMap
from dcr_scale.models.weights import is_partitioned, own_part
from dcr_scale.world import World

log = logging.getLogger(__name__)

# Weights in other formats than the one that is written: they would be the unchanged ones.
_OTHER_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack", ".npz"}
_OTHER_INDICES = (".bin.index.json", ".h5.index.json", ".msgpack.index.json")
_COMPANION_FOLDERS = {"additional_chat_templates"}


def export_checkpoint(
    destination: Path,
    source: Checkpoint,
    tensor_map: TensorMap,
    changed: Mapping[str, nn.Parameter],
    *,
    world: World,
    deltas: Mapping[nn.Parameter, LowRankDelta] | None = None,
    extra_files: Mapping[str, str] | None = None,
    gather: Callable[[list[nn.Parameter]], AbstractContextManager] = nullcontext,
) -> None:
    """Write ``source`` to the folder ``destination`` with the parameters in ``changed`` replaced.

    ``changed`` maps names of ``tensor_map`` to parameters, whole or partitioned by ZeRO-3; they are cast
    to the file's dtype. ``deltas`` are added to their parameters in float32 before the cast.
    ``extra_files`` are texts by file name (a model card), and replace the source's files of that name.
    ``gather`` makes partitioned parameters whole inside its context; it is needed for scattered
    parameters alone. An existing ``destination`` is replaced once the new one is complete.

    Every rank calls this, with the same names in the same order. Where ranks see different disks under
    the same path, each disk gets the whole checkpoint; each needs the source. The files do not depend on
    the number of ranks or disks. Raises the same UserError on every rank when any fails: a full disk,
    missing permission; the old ``destination`` is as it was then, and nothing else is left behind.
    """
    unknown = [name for name in changed if name not in tensor_map]
    if unknown:
        raise ValueError(f"changed parameters that the tensor map does not know: {', '.join(unknown[:3])}")
    export = _Export(Path(destination), source, tensor_map, changed, deltas or {}, world)
    try:
        export.run(extra_files or {}, gather)
    except BaseException:
        if export.writes:
            shutil.rmtree(export.partial, ignore_errors=True)
        raise


class _Span(NamedTuple):
    """Bytes [begin, end) of a file, of ``tensor`` or, where that is None, of none."""

    file: str
    tensor: str | None
    begin: int
    end: int


class _Export(Phases):
    def __init__(
        self,
        destination: Path,
        source: Checkpoint,
        tensor_map: TensorMap,
        changed: Mapping[str, nn.Parameter],
        deltas: Mapping[nn.Parameter, LowRankDelta],
        world: World,
    ) -> None:
        super().__init__(destination, world)
        self.source, self.tensor_map, self.deltas = source, tensor_map, deltas
        # A tied parameter is written under each name that the file has for it, once.
        self.changed: dict[str, nn.Parameter] = {}
        for name, parameter in changed.items():
            self.changed.update(dict.fromkeys(tensor_map.written_as(name), parameter))
        self.scattered = {name: tensor_map.scattered[name] for name in self.changed if name in tensor_map.scattered}
        self.output = Checkpoint(self.partial, source.tensors, source.files)
        self.digests = Digests.of(source)
        # Written a second time, whole, when all else is in place; what passes before is not what stays.
        self.written_last = {name for scattered in self.scattered.values() for name in scattered.sources}

    def run(
        self,
        extra_files: Mapping[str, str],
        gather: Callable[[list[nn.Parameter]], AbstractContextManager],
    ) -> None:
        self.find_writers()
        shared = len(self.disks) == 1
        if not shared:
            log.info(
                "%s: ranks share no disk there; blocks of weights go to ranks %s, and each writes a whole checkpoint",
                self.destination.parent, ", ".join(map(str, self.disks)),
            )  # fmt: skip
        with self.together():
            known = self._known_hashes()
            if self.writes:
                self.lay_out()
        with self.together():
            self.await_partial(self.partial / self.token)
        with self.together():
            self.copy_unchanged(known, shared)
            if shared:
                self.write_changed()
        if not shared:
            self.stream_changed()
        with self.together():
            self.write_scattered(gather)
        # Where disks are several, a writer has seen all that lies on its own.
        hashes = self.digests.complete(self.world, self.output.read_bytes) if shared else {}
        with self.together():
            if self.writes:
                if not shared:
                    hashes = self.digests.complete(ALONE, self.output.read_bytes)
                self.finish({**known, **hashes}, extra_files)

    # --- phases ----------------------------------------------------------------------------------------

    def lay_out(self) -> None:
        """Make the folder and files of the final size, with holes for content."""
        if self.destination.resolve() == self.source.folder.resolve():
            raise UserError(f"{self.destination}: the export would replace the checkpoint it is made from")
        self.make_partial()
        sizes = {file: (self.source.folder / file).stat().st_size for file in self.source.files}
        needed = sum(sizes.values()) + sum(path.stat().st_size for path in self._companions())
        free = shutil.disk_usage(self.partial).free
        if free < needed:
            raise UserError(
                f"{self.destination}: the export needs {needed / 2**30:.2f} GiB, but {free / 2**30:.2f} GiB "
                f"are free there; {FREE_SPACE}"
            )
        for file, size in sizes.items():
            with open(self.partial / file, "wb") as out:
                out.truncate(size)
        (self.partial / self.token).touch()

    def copy_unchanged(self, known: Mapping[str, str], shared: bool) -> None:
        """Copy what lies between the changed ranges, and hash it unless its hash is known. On a shared disk ranks
        deal the bytes out among themselves, else each writer copies all."""
        spans = list(self._unchanged())
        if shared:
            total, before, own = sum(span.end - span.begin for span in spans), 0, []
            for span in spans:
                if before * self.world.size // max(total, 1) == self.world.rank:
                    own.append(span)
                before += span.end - span.begin
            spans = own
        elif not self.writes:
            return
        for file in {span.file: None for span in spans}:
            with (
                disk.descriptor(self.source.folder / file, os.O_RDONLY) as reading,
                disk.descriptor(self.partial / file, os.O_WRONLY) as writing,
            ):
                for span in spans:
                    if span.file != file:
                        continue
                    if span.tensor is None or span.tensor in known:
                        disk.copy_range(reading, writing, span.begin, span.end - span.begin)
                    else:
                        self._copy_hashed(reading, writing, span, span.tensor)
                os.fsync(writing)

    def write_changed(self) -> None:
        """Write this rank's elements of each changed parameter that lies in runs."""
        with _Files(self.partial) as files:
            for name, parameter in self.changed.items():
                if name in self.scattered or (self.world.rank > 0 and not is_partitioned(parameter)):
                    continue
                part = own_part(parameter)
                for tensor, begin, end, first in self._blocks(name, part.start, part.values.numel()):
                    self._write(files, tensor, begin, self._updated(parameter, tensor, first, end - begin))
            # On this rank's node: the one that finishes may be another.
            files.sync()

    def stream_changed(self) -> None:
        """The same where writers do not see what other ranks write: whoever holds a block sends it to them."""
        parts = [own_part(parameter) for parameter in self.changed.values()]
        held = self.world.gather([(part.start, part.values.numel()) for part in parts])
        for number, (name, parameter) in enumerate(self.changed.items()):
            if name in self.scattered:
                continue
            # After a failure a writer still takes what is sent, or the others would wait for it: one parameter more.
            with self.together(), _Files(self.partial) as files:
                failure: OSError | None = None
                owners = range(self.world.size) if is_partitioned(parameter) else [self.world.rank]
                for owner in owners:
                    for tensor, begin, end, first in self._blocks(name, *held[owner][number]):
                        data = None
                        if owner == self.world.rank:
                            data = self._updated(parameter, tensor, first, end - begin)
                        if is_partitioned(parameter):
                            data = self._delivered(data, owner, end - begin)
                        if self.writes and failure is None and data is not None:
                            try:
                                self._write(files, tensor, begin, data)
                            except OSError as error:
                                failure = error
                if failure is not None:
                    raise failure

    def write_scattered(self, gather: Callable[[list[nn.Parameter]], AbstractContextManager]) -> None:
        """Write the remaining changed parameters whole, one at a time."""
        failure: OSError | UserError | None = None
        for name in self.scattered:
            with gather([self.changed[name]]):
                # After a failure a writer still takes part in gathering, or the others would wait for it.
                if not self.writes or failure is not None:
                    continue
                try:
                    self._write_whole(name, self.changed[name])
                except (OSError, UserError) as error:
                    failure = error
        if failure is not None:
            raise failure

    def finish(self, hashes: Mapping[str, str], extra_files: Mapping[str, str]) -> None:
        """Add the files beside the weights and the manifest, make all durable, and give the folder its name."""
        (self.partial / self.token).unlink()
        for path in self._companions():
            copy = self.partial / path.relative_to(self.source.folder)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)
        for name, text in extra_files.items():
            (self.partial / name).write_text(text, encoding="utf-8")
        manifest = Manifest.of_folder(self.output, hashes)
        (self.partial / MANIFEST_FILE).write_text(manifest.text(), encoding="utf-8")
        disk.replace_folder(self.destination)

    # --- parts of phases -------------------------------------------------------------------------------

    def _companions(self) -> list[Path]:
        """The source's tokenizer, configuration, templates, licence: all but weights, hidden files and manifest."""
        found = []
        for path in sorted(self.source.folder.iterdir()):
            if path.name.startswith(".") or path.name == MANIFEST_FILE:
                continue
            if path.is_dir():
                if path.name in _COMPANION_FOLDERS:
                    found += [inner for inner in sorted(path.iterdir()) if inner.is_file()]
            elif path.suffix not in _OTHER_WEIGHTS and not path.name.endswith(_OTHER_INDICES):
                found.append(path)
        return found

    def _known_hashes(self) -> dict[str, str]:
        """Hashes that the source's manifest has for tensors that stay as they are. The others are all computed."""
        manifest = Manifest.read(self.source.folder)
        changed = self.written_last | {piece.source for name in self.changed for piece in self._pieces(name)}
        known = {} if manifest is None else manifest.tensors
        known = {name: known[name] for name in self.source.tensors if name in known and name not in changed}
        for name in self.source.tensors:
            if name not in known:
                self.digests.add(name, 0, memoryview(b""))
        return known

    def _pieces(self, name: str) -> tuple[Piece, ...]:
        return self.tensor_map.pieces.get(name, ())

    def _unchanged(self) -> Iterator[_Span]:
        """All bytes of the weight files that lie in no changed piece, in order."""
        changed: dict[str, list[tuple[int, int]]] = {}
        for name in self.changed:
            for piece in self._pieces(name):
                info = self.source.tensors[piece.source]
                begin = info.start + piece.source_start * info.dtype.itemsize
                changed.setdefault(piece.source, []).append((begin, begin + piece.count * info.dtype.itemsize))
        for file in self.source.files:
            at, size = 0, (self.source.folder / file).stat().st_size
            for tensor, info in self.source.tensors.items():
                if info.file != file:
                    continue
                yield _Span(file, None, at, info.start)
                at = info.start
                for begin, end in sorted(changed.get(tensor, [])):
                    yield _Span(file, tensor, at, begin)
                    at = end
                yield _Span(file, tensor, at, info.start + info.nbytes)
                at = info.start + info.nbytes
            yield _Span(file, None, at, size)

    def _copy_hashed(self, reading: int, writing: int, span: _Span, tensor: str) -> None:
        start = self.source.tensors[tensor].start
        buffer = memoryview(bytearray(min(disk.CHUNK_BYTES, span.end - span.begin)))
        for begin, end in disk.blocks(span.begin - start, span.end - start):
            data = buffer[: end - begin]
            if os.preadv(reading, [data], start + begin) != len(data):
                raise OSError(errno.EIO, "the source file became shorter while it was copied")
            disk.write(writing, data, start + begin)
            self._saw(tensor, begin, data)

    def _blocks(self, name: str, start: int, count: int) -> Iterator[tuple[str, int, int, int]]:
        """Elements [start, start + count) of a parameter as (tensor, bytes [begin, end) of it, first element)."""
        for piece in self.tensor_map.overlap(name, start, count):
            itemsize = self.source.tensors[piece.source].dtype.itemsize
            shift = piece.start - piece.source_start
            for begin, end in disk.blocks(piece.source_start * itemsize, (piece.source_start + piece.count) * itemsize):
                yield piece.source, begin, end, begin // itemsize + shift

    def _updated(self, parameter: nn.Parameter, tensor: str, first: int, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes]: new content of ``tensor``, of elements that this rank holds, from ``first`` on."""
        dtype = self.source.tensors[tensor].dtype
        part = own_part(parameter)
        values = part.values[first - part.start :][: nbytes // dtype.itemsize]
        return self._with_delta(parameter, first, values).to(dtype).contiguous().view(torch.uint8)

    def _with_delta(self, parameter: nn.Parameter, start: int, values: torch.Tensor) -> torch.Tensor:
        values = values.detach().cpu()
        delta = self.deltas.get(parameter)
        return values if delta is None else values.float() + delta.elements(start, values.numel())

    def _delivered(self, data: torch.Tensor | None, owner: int, nbytes: int) -> torch.Tensor | None:
        """The owner's block, on the owner and on the writers; None on other ranks."""
        device = self.world.device
        if data is not None:
            for writer in self.disks:
                if writer != owner:
                    dist.send(data.to(device), writer)
            return data
        if not self.writes:
            return None
        received = torch.empty(nbytes, dtype=torch.uint8, device=device)
        dist.recv(received, owner)
        return received.cpu()

    def _write(self, files: _Files, tensor: str, begin: int, content: torch.Tensor) -> None:
        info, data = self.source.tensors[tensor], disk.bytes_of(content)
        disk.write(files[info.file], data, info.start + begin)
        self._saw(tensor, begin, data)

    def _saw(self, tensor: str, begin: int, data: memoryview) -> None:
        if tensor not in self.written_last:
            self.digests.add(tensor, begin, data)

    def _write_whole(self, name: str, parameter: nn.Parameter) -> None:
        scattered = self.scattered[name]
        values = self._with_delta(parameter, 0, parameter.data.reshape(-1))
        # Other parameters may have elements of these tensors too, written before or still the source's.
        whole = torch.cat([self.output.read(source) for source in scattered.sources])
        whole[scattered.order()] = values.to(whole.dtype)
        sizes = [self.source.tensors[source].numel for source in scattered.sources]
        with _Files(self.partial) as files:
            for source, part in zip(scattered.sources, whole.split(sizes), strict=True):
                info = self.source.tensors[source]
                data = disk.bytes_of(part.to(info.dtype))
                disk.write(files[info.file], data, info.start)
                self.digests.add(source, 0, data)


class _Files(ExitStack):
    """Files of a folder by name, opened on first use and closed on leaving."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder
        self._opened: dict[str, int] = {}

    def __getitem__(self, file: str) -> int:
        if file not in self._opened:
            self._opened[file] = self.enter_context(disk.descriptor(self._folder / file, os.O_WRONLY))
        return self._opened[file]

    def sync(self) -> None:
        """Make durable what was written through them."""
        for opened in self._opened.values():
            os.fsync(opened)
