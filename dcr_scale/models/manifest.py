"""``manifest.json``: what every file of an exported checkpoint must hold, as hashes.

A tensor is hashed in chunks, and its hash is that of its chunks' hashes. So ranks compute it together from the bytes
that pass through their hands anyway, in an export as in a load, and it comes out the same however many they are. Only
chunks that a partition's border cuts are read once more. XXH3 finds damage by disks and networks, at the speed of
memory; it is no protection against people.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from dcr_scale.errors import UserError
from dcr_scale.models import disk
from dcr_scale.models.checkpoint import Checkpoint
from dcr_scale.world import World

MANIFEST_FILE = "manifest.json"
# A rank that completes hashes of its own, without the others.
ALONE = World(rank=0, size=1, local_rank=0, local_size=1, device=torch.device("cpu"))

_FORMAT = 1
_METHOD = "xxh3_128 of the xxh3_64 of chunks"

_SMALLEST_CHUNK, _LARGEST_CHUNK = 4 * 2**10, 256 * 2**10
_CHUNKS_OF_A_TENSOR = 2048
_DIGEST_BYTES = 8

# Hashes of consecutive chunks: (tensor, number of the first chunk, their digests end to end).
Run = tuple[str, int, bytes]


def chunk_bytes(nbytes: int) -> int:
    """Length of the chunks in which ``nbytes`` bytes are hashed: a power of two from 4 to 256 KiB.

    Small against what a rank holds of a tensor, since a chunk that ranks share is read again.
    """
    chunk = _SMALLEST_CHUNK
    while chunk < _LARGEST_CHUNK and chunk * _CHUNKS_OF_A_TENSOR < nbytes:
        chunk *= 2
    return chunk


class Digests:
    """Hashes of the chunks of tensors, as far as they are known here. ``sizes``: bytes of each tensor."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self.sizes = sizes
        self._known: dict[str, _Chunks] = {}

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Digests:
        return cls({name: info.nbytes for name, info in checkpoint.tensors.items()})

    def add(self, tensor: str, start: int, data: memoryview) -> None:
        """Hash those chunks of ``tensor`` that lie whole in ``data``, its bytes from ``start`` on."""
        chunks, stop = self._chunks(tensor), start + len(data)
        for number in range(-(-start // chunks.length), -(-stop // chunks.length)):
            begin, end = chunks.span(number)
            if end <= stop:
                chunks.put(number, xxhash.xxh3_64_digest(data[begin - start : end - start]))

    def complete(self, world: World, read: Callable[[str, int, int], memoryview]) -> dict[str, str]:
        """Hexadecimal hashes of all tensors that some rank has added a part of.

        ``read`` gives bytes [start, stop) of a tensor; chunks that no rank has seen whole are read by it, dealt out
        among the ranks. Every rank calls this. What ``read`` raises as UserError or OSError is raised as UserError
        on all ranks.
        """
        self._merge(world.gather([(tensor, *run) for tensor, chunks in self._known.items() for run in chunks.runs()]))
        read_here: list[Run] = []
        with world.agreed():
            missing = [(tensor, number) for tensor, chunks in self._known.items() for number in chunks.missing()]
            for tensor, number in missing[world.rank :: world.size]:
                data = read(tensor, *self._known[tensor].span(number))
                read_here.append((tensor, number, xxhash.xxh3_64_digest(data)))
        self._merge(world.gather(read_here))
        return {tensor: chunks.combined() for tensor, chunks in self._known.items()}

    def _chunks(self, tensor: str) -> _Chunks:
        if tensor not in self._known:
            self._known[tensor] = _Chunks(self.sizes[tensor])
        return self._known[tensor]

    def _merge(self, ranks: list[list[Run]]) -> None:
        for run in ranks:
            for tensor, first, digests in run:
                self._chunks(tensor).put(first, digests)
        # The same order on all ranks: missing chunks are dealt out by it.
        self._known = {tensor: self._known[tensor] for tensor in sorted(self._known)}


class _Chunks:
    """The chunks of one tensor: their digests end to end, and which of them are known."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes, self.length = nbytes, chunk_bytes(nbytes)
        count = -(-nbytes // self.length)
        self._digests, self._is_known = bytearray(_DIGEST_BYTES * count), bytearray(count)

    def span(self, number: int) -> tuple[int, int]:
        return number * self.length, min((number + 1) * self.length, self.nbytes)

    def put(self, first: int, digests: bytes) -> None:
        count = len(digests) // _DIGEST_BYTES
        self._digests[_DIGEST_BYTES * first : _DIGEST_BYTES * (first + count)] = digests
        self._is_known[first : first + count] = b"\1" * count

    def missing(self) -> Iterator[int]:
        return (number for number, known in enumerate(self._is_known) if not known)

    def runs(self) -> Iterator[tuple[int, bytes]]:
        """First number and digests of each run of known chunks; an empty one where none is known, so that a tensor
        which came by in parts smaller than a chunk counts as seen."""
        first = self._is_known.find(1)
        if first < 0:
            yield 0, b""
        while first >= 0:
            end = self._is_known.find(0, first)
            end = len(self._is_known) if end < 0 else end
            yield first, bytes(self._digests[_DIGEST_BYTES * first : _DIGEST_BYTES * end])
            first = self._is_known.find(1, end)

    def combined(self) -> str:
        return xxhash.xxh3_128_hexdigest(self._digests)


def hash_file(path: Path, start: int = 0, nbytes: int | None = None) -> str:
    """The hash of ``nbytes`` bytes of a file, by default all from ``start`` on. Raises OSError."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size - start if nbytes is None else nbytes
        chunks = _Chunks(size)
        for begin, end in disk.blocks(0, size):
            block = memoryview(os.pread(file.fileno(), end - begin, start + begin))
            for number in range(begin // chunks.length, -(-end // chunks.length)):
                first, last = chunks.span(number)
                chunks.put(number, xxhash.xxh3_64_digest(block[first - begin : last - begin]))
    return chunks.combined()


@dataclass(frozen=True)
class Manifest:
    """Of a folder in Hub layout.

    ``tensors`` holds each tensor's hash, ``headers`` that of each weight file's bytes before its first tensor,
    ``others`` that of every other file; ``sizes`` the bytes of all files.
    """

    sizes: Mapping[str, int]
    headers: Mapping[str, str]
    tensors: Mapping[str, str]
    others: Mapping[str, str]

    @classmethod
    def of_folder(cls, checkpoint: Checkpoint, tensors: Mapping[str, str]) -> Manifest:
        """Of all files in ``checkpoint``'s folder; the tensors' hashes are known. Raises OSError."""
        headers = {
            file: hash_file(checkpoint.folder / file, nbytes=checkpoint.data_start(file)) for file in checkpoint.files
        }
        sizes, others = {}, {}
        for path in sorted(checkpoint.folder.rglob("*")):
            name = path.relative_to(checkpoint.folder).as_posix()
            if path.is_file() and name != MANIFEST_FILE:
                sizes[name] = path.stat().st_size
                if name not in headers:
                    others[name] = hash_file(path)
        return cls(sizes, headers, tensors, others)

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """``folder``'s manifest; None where it has none. Raises UserError for one that cannot be used."""
        path = folder / MANIFEST_FILE
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read ({error}); {_REPAIR}") from None
        if not isinstance(tree, dict) or "hash" not in tree:
            # Another program's file of that name.
            return None
        if (tree.get("format"), tree["hash"]) != (_FORMAT, _METHOD):
            raise UserError(
                f"{path}: is of format {tree.get('format')} ({tree['hash']}), but this version of dcr-scale reads "
                f"{_FORMAT} ({_METHOD}); update it, or delete the file to do without the check"
            )
        try:
            return cls(*(dict(tree[part]) for part in ("sizes", "headers", "tensors", "others")))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: is damaged ({error!r}); {_REPAIR}") from None

    def text(self) -> str:
        tree: dict[str, Any] = {"format": _FORMAT, "hash": _METHOD}
        for part in ("sizes", "headers", "tensors", "others"):
            tree[part] = dict(sorted(getattr(self, part).items()))
        return json.dumps(tree, indent=1, ensure_ascii=False) + "\n"

    def differing(self, hashes: Mapping[str, str]) -> list[str]:
        """Those of the tensors in ``hashes`` that have another hash here, or none."""
        return [tensor for tensor, found in hashes.items() if self.tensors.get(tensor) != found]


_REPAIR = "copy or export the checkpoint again, or delete the file to do without the check"
