"""Launch configurations of the kernels: a static table by architecture and shape class, and tuned overrides.

Nothing is tuned behind the caller's back. Ranks that tuned apart could pick kernels that round differently, or wait
for each other in a collective while one still measures; see `dcr_kernels.tuning` for tuning on request.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch

Config = dict[str, int]

ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")

# Shared memory a program may use, in bytes: CUDA C++ Programming Guide, table of technical specifications (opt-in
# maximum per block); CDNA 3 ISA guide (LDS per workgroup).
SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}


def _tokens(chunk: int, block_t: int, block_d: int) -> Config:
    return {"CHUNK": chunk, "BLOCK_T": block_t, "BLOCK_D": block_d, "num_warps": 4, "num_stages": 1}


def _tiles(block_m: int, block_n: int, block_k: int, warps: int, stages: int) -> Config:
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": warps, "num_stages": stages}


def _outer(block_t: int) -> Config:
    return {"BLOCK_T": block_t, "BLOCK_P": 32, "BLOCK_Q": 32, "num_warps": 4, "num_stages": 3}


# What statistics and strip share. "ieee" is float32 without tensor cores, whose operands pass through registers.
_SMALL_TILES = {
    "2 bytes, few rows": _tiles(64, 64, 64, 4, 4),
    "4 bytes, few rows": _tiles(64, 64, 32, 4, 4),
    "4 bytes, ieee": _tiles(64, 64, 32, 8, 2),
}

_DEFAULT: dict[str, dict[str, Config]] = {
    # Tokens are read in tiles of 16-byte loads, eight or so in flight a thread; a chunk is what one program pools.
    "pool_forward": {"2 bytes": _tokens(128, 16, 512), "4 bytes": _tokens(128, 8, 512)},
    "pool_backward": {"2 bytes": _tokens(128, 8, 1024), "4 bytes": _tokens(128, 8, 512)},
    # 64 accumulator registers a thread and 96 KB of tiles: two programs share a multiprocessor, so that one's
    # epilogue of exponentials runs under the other's tensor-core loop.
    "statistics": {"2 bytes": _tiles(128, 128, 64, 8, 3), "4 bytes": _tiles(128, 128, 32, 8, 3), **_SMALL_TILES},
    # Two terms of every row and column on top: 128 columns of float32 operands would spill on sm_90.
    "strip": {"2 bytes": _tiles(128, 128, 64, 8, 3), "4 bytes": _tiles(128, 64, 32, 8, 3), **_SMALL_TILES},
    # The tiles of the statistics for few rows: see on_chip_kernel on rounding alike.
    "on_chip": {
        "2 bytes": _tiles(64, 64, 64, 8, 2),
        "4 bytes": _tiles(64, 64, 32, 8, 2),
        "4 bytes, ieee": _tiles(32, 32, 32, 8, 2),
    },
    "segment_outer": {"2 bytes": _outer(64), "4 bytes": _outer(32)},
}

# Where an architecture wants something else than the default, and why.
_BY_ARCHITECTURE: dict[str, dict[str, dict[str, Config]]] = {
    # 128 columns of Circle's terms spill a few registers on these two.
    "sm_80": {"strip": {"2 bytes": _tiles(128, 64, 64, 8, 3)}},
    "sm_90": {},
    "sm_100": {"strip": {"2 bytes": _tiles(128, 64, 64, 8, 3)}},
    # 64 KB of local data share: fewer stages. A wave holds its whole operand in registers: narrow rows on chip.
    "gfx942": {
        "on_chip": {"2 bytes": _tiles(16, 32, 64, 4, 1), "4 bytes": _tiles(16, 32, 32, 4, 1)},
        "statistics": {
            "2 bytes": _tiles(128, 128, 64, 8, 2),
            "2 bytes, few rows": _tiles(64, 64, 64, 4, 2),
            "4 bytes": _tiles(128, 128, 32, 8, 2),
            "4 bytes, few rows": _tiles(64, 64, 32, 4, 2),
        },
    },
}

_tuned: dict[tuple[str, str, str], Config] = {}


def shape_class(kernel: str, dtype: torch.dtype, n_rows: int | None = None) -> str:
    """The key of the table's innermost level for operands of `dtype` and, where it matters, a batch of `n_rows`."""
    width = "2 bytes" if dtype.itemsize == 2 else "4 bytes"
    if f"{width}, ieee" in _DEFAULT[kernel] and torch.get_float32_matmul_precision() == "highest":
        return f"{width}, ieee"
    # Up to about a thousand rows, large tiles leave most multiprocessors without a program.
    if f"{width}, few rows" in _DEFAULT[kernel] and n_rows is not None and n_rows <= 1024:
        return f"{width}, few rows"
    return width


def config(kernel: str, shape: str, architecture: str) -> Config:
    """The configuration of `kernel` for a shape class: tuned if set, else the architecture's, else the default."""
    tuned = _tuned.get((architecture, kernel, shape))
    if tuned is not None:
        return tuned
    return _BY_ARCHITECTURE.get(architecture, {}).get(kernel, {}).get(shape) or _DEFAULT[kernel][shape]


def launch_config(kernel: str, dtype: torch.dtype, device: torch.device, n_rows: int | None = None) -> Config:
    """The configuration with which `kernel` is launched on tensors of `dtype` on `device`."""
    return config(kernel, shape_class(kernel, dtype, n_rows), architecture_of(device))


def shapes(kernel: str) -> tuple[str, ...]:
    """The shape classes of `kernel`."""
    return tuple(_DEFAULT[kernel])


def install(architecture: str, kernel: str, shape: str, tuned: Config) -> None:
    """Uses `tuned` instead of the table's entry in this process. Raises ValueError when it names other settings."""
    expected = _DEFAULT[kernel][shape].keys()
    if tuned.keys() != expected:
        raise ValueError(f"configuration of {kernel} ({shape}) has {sorted(tuned)}; it needs {sorted(expected)}")
    _tuned[architecture, kernel, shape] = dict(tuned)


def load_tuned(path: str | Path) -> None:
    """Installs every configuration of a cache that `tuning.tune` wrote. Every rank must load the same file."""
    for architecture, kernels in json.loads(Path(path).read_text(encoding="utf-8")).items():
        for kernel, by_shape in kernels.items():
            for shape, tuned in by_shape.items():
                install(architecture, kernel, shape, tuned)


@functools.cache
def architecture_of(device: torch.device) -> str:
    """The table's name for a device; a chip that is not in it gets its nearest older relative."""
    if device.type == "cpu":
        # The interpreter: any entry is correct there.
        return "sm_90"
    if torch.version.hip:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    return "sm_100" if major >= 10 else "sm_90" if major == 9 else "sm_80"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run at once, about. 8 under the interpreter, so that tests split as a GPU would."""
    return 8 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count
