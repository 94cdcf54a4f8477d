"""Tuning on request: measures candidate configurations once, on one rank, and lets every rank use the winner.

A rank that chose for itself could round differently from its peers, and would measure while they wait in a
collective. So rank 0 measures, the choice is broadcast, and a JSON file keeps it for the next run.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist

from dcr_kernels.configs import (
    SHARED_MEMORY,
    Config,
    architecture_of,
    config,
    install,
    shape_class,
)

Measure = Callable[[], float]


def candidates(kernel: str, start: Config) -> Iterator[Config]:
    """The table's entry first, then its neighbours: blocks halved and doubled, warps and stages one step away."""
    yield dict(start)
    choices = {
        key: (value,) if key in ("CHUNK", "BLOCK_K") else (value // 2, value, value * 2) for key, value in start.items()
    }
    choices["num_warps"] = tuple({max(2, start["num_warps"] // 2), start["num_warps"]})
    choices["num_stages"] = tuple({max(1, start["num_stages"] - 1), start["num_stages"], start["num_stages"] + 1})
    for values in itertools.product(*choices.values()):
        candidate = dict(zip(choices, values, strict=True))
        blocks = [value for key, value in candidate.items() if key.startswith("BLOCK")]
        if candidate != start and min(blocks) >= (8 if kernel.startswith("pool") else 16):
            yield candidate


def tune(
    kernel: str,
    measure: Measure,
    *,
    dtype: torch.dtype,
    device: torch.device,
    n_rows: int | None = None,
    group: dist.ProcessGroup | None = None,
    cache: str | Path | None = None,
) -> Config:
    """Finds the fastest configuration of `kernel` for one shape class and installs it on every rank.

    Args:
        kernel: a name of the table in `dcr_kernels.configs`.
        measure: runs the caller's own step, say a loss forward and backward, and returns milliseconds. Called on rank
            0 of `group` only, so it must not communicate. A configuration it cannot run raises RuntimeError there.
        dtype, device: of the tensors, which name the shape class and the architecture.
        n_rows: the global batch, for "statistics" and "strip".
        group: the ranks that must agree; None is this process alone.
        cache: a JSON file. Where it exists on rank 0, its entry is used and nothing is measured; else it is written.

    Returns:
        The configuration now in use.
    """
    architecture, shape = architecture_of(device), shape_class(kernel, dtype, n_rows)
    chosen: list[Config | None] = [None]
    if group is None or group.rank() == 0:
        chosen[0] = _cached_or_fastest(architecture, kernel, shape, measure, cache)
    if group is not None and group.size() > 1:
        dist.broadcast_object_list(chosen, src=dist.get_global_rank(group, 0), group=group)
    install(architecture, kernel, shape, chosen[0])
    return chosen[0]


def _cached_or_fastest(
    architecture: str, kernel: str, shape: str, measure: Measure, cache: str | Path | None
) -> Config:
    table = config(kernel, shape, architecture)
    kept: dict[str, dict[str, dict[str, Config]]] = {}
    if cache is not None and Path(cache).exists():
        kept = json.loads(Path(cache).read_text(encoding="utf-8"))
        # This entry alone: the other ranks are sent no more, and all must compute with the same.
        cached = kept.get(architecture, {}).get(kernel, {}).get(shape)
        if cached is not None:
            return cached
    best, best_ms = table, float("inf")
    for candidate in candidates(kernel, table):
        if _tile_bytes(candidate) > SHARED_MEMORY[architecture]:
            continue
        install(architecture, kernel, shape, candidate)
        try:
            taken = measure()
        except RuntimeError:
            # Out of registers or shared memory: not a candidate for this chip.
            continue
        if taken < best_ms:
            best, best_ms = candidate, taken
    install(architecture, kernel, shape, best)
    if cache is not None:
        kept.setdefault(architecture, {}).setdefault(kernel, {})[shape] = best
        Path(cache).write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
    return best


def _tile_bytes(candidate: Config) -> int:
    """A lower bound on shared memory: the stages' operand tiles, two bytes an element. 0 for kernels without GEMM."""
    if "BLOCK_K" not in candidate:
        return 0
    tile = (candidate["BLOCK_M"] + candidate["BLOCK_N"]) * candidate["BLOCK_K"] * 2
    return tile * max(1, candidate["num_stages"] - 1)
