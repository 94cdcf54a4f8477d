"""Micro-batches for the probe: which prompt under which probe runs where and when, packed or padded."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor

from dcr_scale.data.packing import micro_batches, pack
from dcr_scale.probe.layout import TokenLayout


def plan_micro_batches(lengths: Sequence[int], probes: int, *, world_size: int, limit: int) -> list[list[list[int]]]:
    """``plan[rank][micro_step]`` lists items: item = prompt · probes + probe.

    Two backward passes cannot go through one forward pass under ZeRO-3, so every probe has a copy of its prompt. All
    ranks take the same number of micro-steps, as ZeRO-3's collectives demand, and none is empty.
    """
    costs = [length for length in lengths for _ in range(probes)]
    return micro_batches(costs, world_size=world_size, limit=limit)


@dataclass(frozen=True)
class Step:
    """A micro-batch and its backward passes.

    ``rows``: the prompt of each row of the forward pass. ``passes``: the item of each row, one list a backward pass.
    """

    rows: list[int]
    passes: list[list[int]]


def plan_steps(
    lengths: Sequence[int], probes: int, *, world_size: int, limit: int, one_backward: bool
) -> list[list[Step]]:
    """``plan[rank]`` of all items (see :func:`plan_micro_batches`).

    ``one_backward``: every probe has a row of its own for each prompt, else a backward pass of its own through the
    prompt's one row.
    """
    rows = plan_micro_batches(lengths, probes if one_backward else 1, world_size=world_size, limit=limit)
    if one_backward:
        return [[Step([item // probes for item in step], [step]) for step in steps] for steps in rows]
    passes = range(probes)
    return [[Step(step, [[row * probes + p for row in step] for p in passes]) for step in steps] for steps in rows]


def packed_batch(
    sequences: Sequence[Sequence[int]], device: torch.device, avoid: Container[int] = ()
) -> tuple[dict[str, Any], TokenLayout]:
    """Keywords of the model and the layout of one row of tokens that holds all sequences.

    ``avoid``: lengths that the row must not have; inert prompts of one token are then added to it.
    """
    inert = next(extra for extra in count() if sum(map(len, sequences)) + extra not in avoid)
    batch = pack([*sequences, *[sequences[0][:1]] * inert], device=device)
    index, inside = _index(sequences, batch.layout.starts, device)
    inputs = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "packing": batch.layout}
    layout = TokenLayout(index, inside, (1, batch.layout.tokens), batch.layout.cu_seqlens)
    return {**inputs, "attention_mask": None, "use_cache": False}, layout


def padded_batch(
    sequences: Sequence[Sequence[int]], device: torch.device, avoid: Container[int] = ()
) -> tuple[dict[str, Any], TokenLayout]:
    """Keywords of the model and the layout of one padded row for each sequence; no row is of a length in ``avoid``."""
    width = next(width for width in count(max(map(len, sequences))) if width not in avoid)
    # Any token will do for padding: nothing looks ahead at it.
    rows = [list(sequence) + [sequence[0]] * (width - len(sequence)) for sequence in sequences]
    index, inside = _index(sequences, [row * width for row in range(len(rows))], device)
    mask = torch.nn.functional.pad(inside.long(), (0, width - inside.shape[1]))
    positions = torch.arange(width, device=device).expand(len(rows), -1)
    inputs = {"input_ids": torch.tensor(rows, device=device), "position_ids": positions, "attention_mask": mask}
    return {**inputs, "use_cache": False}, TokenLayout(index, inside, (len(rows), width))


def _index(sequences: Sequence[Sequence[int]], starts: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([len(sequence) for sequence in sequences])[:, None]
    columns = torch.arange(int(lengths.max()))
    inside = columns < lengths
    index = torch.where(inside, torch.tensor(starts[: len(sequences)])[:, None] + columns, 0)
    return index.to(device), inside.to(device)
