"""A checkpoint in Hub layout: found from what the configuration names, then seen as byte ranges.

Only the headers of the safetensors files are parsed on opening; what a rank never asks for is never read.
``pread`` rather than ``mmap``, because its cost shows in ``/proc/self/io`` and a truncated file gives an
error instead of a SIGBUS.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dcr_scale.config import ModelConfig
from dcr_scale.errors import UserError
from dcr_scale.models import disk, pickled, smollm2
from dcr_scale.models.disk import CHUNK_BYTES

log = logging.getLogger(__name__)

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# The safetensors format's own limit for the JSON header.
MAX_HEADER_BYTES = 100_000_000

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")

# Everything a loader needs beside the weights, and the licence that travels with them.
_COMPANIONS = [
    "*.json",
    "*.txt",
    "*.model",
    "*.tiktoken",
    "*.jinja",
    "*.py",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
]
# Duplicates of the weights in their authors' own formats.
_DUPLICATES = ["original/*", "consolidated*", "onnx/*", "*.bin.index.json"]

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


# Is shown a tensor's name, the position of some of its bytes, and these.
Seen = Callable[[str, int, memoryview], None]


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: ``nbytes`` bytes at absolute offset ``start`` of ``file``, row-major,
    little-endian.
    """

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class Checkpoint:
    """Read-only view of a local folder in Hub layout: one safetensors file, or shards with an index.

    ``tensors`` maps names to :class:`TensorInfo`, in the order of the files and of their data; ``files``
    holds the weight files' names.
    """

    def __init__(self, folder: Path, tensors: Mapping[str, TensorInfo], files: tuple[str, ...]) -> None:
        self.folder = folder
        self.tensors = tensors
        self.files = files

    @classmethod
    def open(cls, folder: str | Path, *, allow_pickle: bool = False) -> Checkpoint:
        """Parse the headers of ``folder``'s safetensors files.

        With ``allow_pickle``, a folder of ``pytorch_model*.bin`` files is converted once and the
        converted folder opened. Raises UserError for a folder without weights, a damaged or truncated
        file, an index that names a missing shard or tensor, and a tensor that lies in two files.
        """
        folder = Path(folder)
        disk.restore_replaced(folder)
        if not holds_safetensors(folder):
            folder = pickled.converted_folder(folder, allow_pickle=allow_pickle)
        indexed = _read_index(folder) if (folder / INDEX_FILE).is_file() else None
        files = tuple(sorted(set(indexed.values()))) if indexed is not None else (SINGLE_FILE,)
        tensors: dict[str, TensorInfo] = {}
        for file in files:
            for name, info in _read_header(folder, file).items():
                if name in tensors:
                    raise UserError(
                        f"{folder}: tensor {name} lies in both {tensors[name].file} and {file}; download it again"
                    )
                tensors[name] = info
        for name, file in (indexed or {}).items():
            if name not in tensors or tensors[name].file != file:
                raise UserError(
                    f"{folder / INDEX_FILE}: places tensor {name} in {file}, which does not hold it; "
                    "index and shards are of different downloads, download both again"
                )
        return cls(folder, tensors, files)

    @classmethod
    def of_file(cls, path: Path) -> Checkpoint:
        """A single safetensors file by whatever name. Raises UserError where it is damaged or truncated."""
        return cls(path.parent, _read_header(path.parent, path.name), (path.name,))

    def read(self, name: str, start: int = 0, count: int | None = None) -> torch.Tensor:
        """Elements [start, start + count) of the flattened tensor, as [count] in the file's dtype, on the
        CPU.
        """
        info = self.tensors[name]
        out = torch.empty(info.numel - start if count is None else count, dtype=info.dtype)
        self.read_into(name, start, out)
        return out

    @torch.no_grad()
    def read_into(self, name: str, start: int, out: torch.Tensor, seen: Seen | None = None) -> None:
        """Fill ``out`` [n] (contiguous, any dtype and device) from element ``start`` of the flattened
        tensor.

        Bytes go straight into a CPU tensor of the file's dtype; otherwise they pass through one chunk of
        32 MiB. ``seen`` is shown the file's bytes as they pass. Raises UserError when the file has become
        shorter than its header says.
        """
        info = self.tensors[name]
        if start < 0 or start + out.numel() > info.numel:
            raise ValueError(f"{name}: elements [{start}, {start + out.numel()}) of {info.numel} asked for")
        itemsize = info.dtype.itemsize
        direct = out.dtype == info.dtype and out.device.type == "cpu"
        buffer = torch.empty(0 if direct else min(out.numel(), CHUNK_BYTES // itemsize), dtype=info.dtype)
        with _opened(self.folder / info.file) as descriptor:
            for begin, end in disk.blocks(start * itemsize, (start + out.numel()) * itemsize):
                part = out[begin // itemsize - start : end // itemsize - start]
                target = part if direct else buffer[: part.numel()]
                data = disk.bytes_of(target)
                self._pread(descriptor, data, info.start + begin, info.file)
                if seen is not None:
                    seen(name, begin, data)
                if not direct:
                    part.copy_(target)

    def read_bytes(self, name: str, start: int, stop: int) -> memoryview:
        """Bytes [start, stop) of a tensor's data. Raises UserError when the file ends before them."""
        info = self.tensors[name]
        data = memoryview(bytearray(stop - start))
        with _opened(self.folder / info.file) as descriptor:
            self._pread(descriptor, data, info.start + start, info.file)
        return data

    def data_start(self, file: str) -> int:
        """How many bytes of a weight file come before its tensors."""
        starts = [info.start for info in self.tensors.values() if info.file == file]
        return min(starts, default=(self.folder / file).stat().st_size)

    def _pread(self, descriptor: int, data: memoryview, offset: int, file: str) -> None:
        # One call reads at most 2 GiB, and may read less than it was asked for.
        done = 0
        while done < len(data):
            got = os.preadv(descriptor, [data[done:]], offset + done)
            if got == 0:
                raise UserError(f"{self.folder / file}: the file ends at byte {offset + done}; download it again")
            done += got


def dtype_name(dtype: torch.dtype) -> str:
    """What safetensors calls it."""
    return next(name for name, known in _DTYPES.items() if known == dtype)


def header(tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]], metadata: Mapping[str, str]) -> tuple[bytes, int]:
    """What a safetensors file of these tensors (dtype, shape) begins with, one behind the other, and their bytes."""
    tree: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + math.prod(shape) * dtype.itemsize
        tree[name] = {"dtype": dtype_name(dtype), "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(tree, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data is aligned
    return struct.pack("<Q", len(text)) + text, offset


def holds_safetensors(folder: Path) -> bool:
    return (folder / SINGLE_FILE).is_file() or (folder / INDEX_FILE).is_file()


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"{path}: cannot be opened ({error.strerror})") from None
    try:
        yield descriptor
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    finally:
        os.close(descriptor)


def _read_index(folder: Path) -> dict[str, str]:
    path = folder / INDEX_FILE
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        entries = {str(name): str(file) for name, file in weight_map.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not an index of safetensors shards ({error!r}); download it again") from None
    for file in sorted(set(entries.values())):
        # A name with a path in it would reach, and on export write, outside the folder.
        if file != Path(file).name:
            raise UserError(f"{path}: names the shard {file!r}, which lies outside the folder; download it again")
        if not (folder / file).is_file():
            raise UserError(f"{path}: names the shard {file}, which is not in the folder; download it again")
    if not entries:
        raise UserError(f"{path}: lists no tensors; download it again")
    return entries


def _read_header(folder: Path, file: str) -> dict[str, TensorInfo]:
    """The safetensors header: 8 bytes of length, then JSON with offsets relative to its end."""
    path = folder / file
    with _opened(path) as descriptor:
        size = os.fstat(descriptor).st_size
        prefix = os.read(descriptor, 8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
            raise UserError(f"{path}: not a safetensors file, or cut short ({size} bytes); download it again")
        header = os.pread(descriptor, length, 8)
    data_start = 8 + length
    tensors = {}
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        for name, entry in sorted(entries.items(), key=lambda item: tuple(item[1]["data_offsets"])):
            if entry["dtype"] not in _DTYPES:
                raise UserError(f"{path}: tensor {name} has dtype {entry['dtype']}, which is not supported")
            begin, end = entry["data_offsets"]
            info = TensorInfo(file, _DTYPES[entry["dtype"]], tuple(entry["shape"]), data_start + begin, end - begin)
            if begin < 0 or info.nbytes != info.numel * info.dtype.itemsize:
                raise ValueError(f"tensor {name} has impossible offsets")
            if data_start + end > size:
                raise UserError(
                    f"{path}: cut short: {size} bytes, but tensor {name} ends at byte {data_start + end}; "
                    "download it again"
                )
            tensors[name] = info
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged safetensors header ({error}); download it again") from None
    return tensors


def resolve(model: ModelConfig, *, weights: bool = True) -> Path:
    """The folder with ``model``'s config.json, tokenizer and safetensors files; fetched or converted when
    needed. Without ``weights``, the files may be missing and are not fetched.

    Raises UserError for a folder that does not exist or is no checkpoint, a Hub id that cannot be
    fetched, and pickled weights unless ``model.allow_pickle``.
    """
    folder = Path(model.path).expanduser()
    disk.restore_replaced(folder)
    if folder.is_dir():
        folder = folder.absolute()
    elif model.path == smollm2.NAME:
        return smollm2.embedded_folder()
    elif _HUB_ID.fullmatch(model.path) and not model.path.startswith("."):
        folder = _fetch(model, weights)
    else:
        raise UserError(
            f"model.path: {model.path}: no such folder; give a local folder, a Hub id (owner/name) or {smollm2.NAME}"
        )
    if not (folder / "config.json").is_file():
        raise UserError(f"model.path: {folder}: holds no config.json; a checkpoint in Hub layout is needed")
    if weights and not holds_safetensors(folder):
        return pickled.converted_folder(folder, allow_pickle=model.allow_pickle)
    return folder


def _fetch(model: ModelConfig, weights: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RevisionNotFoundError

    patterns = ["*.safetensors", *(pickled.PATTERNS if model.allow_pickle else [])] if weights else []
    revision = f" (revision {model.revision})" if model.revision else ""
    log.info(
        "%s: from the Hub, unless it is in the cache; ranks wait engine.timeout_minutes for it, and a large one "
        "is better fetched beforehand: hf download %s", model.path, model.path,
    )  # fmt: skip
    try:
        return Path(
            snapshot_download(
                model.path,
                revision=model.revision,
                allow_patterns=patterns + _COMPANIONS,
                ignore_patterns=_DUPLICATES if not model.allow_pickle else _DUPLICATES[:-1],
            )
        )
    except GatedRepoError:
        raise UserError(
            f"model.path: {model.path}: access is restricted; accept its terms on the Hub, then run `hf auth login`"
        ) from None
    except RevisionNotFoundError:
        raise UserError(f"model.revision: {model.path} has no revision {model.revision}") from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        # The hub's own messages run over several lines.
        cause = " ".join(str(error).split()) or type(error).__name__
        raise UserError(
            f"model.path: {model.path}{revision}: no such folder, and the Hub does not give it: {cause}"
        ) from None
