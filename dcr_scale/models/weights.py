"""Fills a module from a checkpoint: under ZeRO-3, each rank reads the byte ranges of its own partition.

A ZeRO-3 partition is a contiguous run of the flattened parameter: rank r of W holds the ceil(n / W)
elements from r * ceil(n / W) on, padded past n. So the ranks together read the file once. DeepSpeed is
seen only through what it leaves on parameters (``ds_tensor`` and its neighbours), as of DeepSpeed 0.19.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from dcr_scale.errors import UserError
from dcr_scale.models.checkpoint import Checkpoint, Seen
from dcr_scale.models.tensor_map import TensorMap


class OwnPart(NamedTuple):
    """This rank's elements [start, start + values.numel()) of a flattened parameter; a view, to read or
    to fill.
    """

    start: int
    values: torch.Tensor


def is_partitioned(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_id")


def own_part(parameter: Any) -> OwnPart:
    """The elements of ``parameter`` that this rank holds, without padding; all of them when it is not
    partitioned.

    Raises UserError for partitions that are no plain runs of elements in memory: hpZ's secondary copies,
    quantised weights, and partitions that lie on an NVMe disk.
    """
    if not is_partitioned(parameter):
        return OwnPart(0, parameter.detach().view(-1))
    partition = parameter.ds_tensor
    if getattr(parameter, "ds_secondary_tensor", None) is not None or hasattr(partition, "ds_quant_scale"):
        raise UserError(
            "weights are quantised or have secondary partitions (zero_quantized_weights, "
            "zero_hpz_partition_size); turn these ZeRO++ features off"
        )
    if partition.numel() != partition.ds_numel:
        raise UserError("parameters are offloaded to NVMe and not in memory; offload them to the CPU, or not at all")
    start = min(_partition_rank(parameter) * partition.ds_numel, parameter.ds_numel)
    count = min(partition.ds_numel, parameter.ds_numel - start)
    return OwnPart(start, partition.detach().view(-1)[:count])


def _partition_rank(parameter: Any) -> int:
    rank = getattr(parameter, "ds_zero_partition_rank", None)
    return dist.get_rank(parameter.ds_process_group) if rank is None else rank


@torch.no_grad()
def load_weights(
    module: nn.Module,
    checkpoint: Checkpoint,
    tensor_map: TensorMap,
    *,
    prefix: str = "",
    seen: Seen | None = None,
) -> None:
    """Fill every parameter and persistent buffer of ``module``, which is ``prefix + name`` in the map's
    model.

    A trunk is filled with ``prefix="model."``. Values take the parameter's dtype and device. Partitioned
    parameters must not have been given to ``deepspeed.initialize`` yet: it copies its masters from them.
    ``seen`` is shown the bytes of each tensor as they come from the file.
    """
    parameter: Any  # with DeepSpeed's attributes
    for name, parameter in module.named_parameters():
        part = own_part(parameter)
        read_elements(checkpoint, tensor_map, prefix + name, part.start, part.values, seen)
        if is_partitioned(parameter):
            # Otherwise padding is whatever the memory held before, and may be NaN.
            parameter.ds_tensor.view(-1)[part.values.numel() :].zero_()
            if parameter.data.numel() == parameter.ds_numel:
                read_elements(checkpoint, tensor_map, prefix + name, 0, parameter.data.view(-1))
    persistent = module.state_dict(keep_vars=True).keys()
    for name, buffer in module.named_buffers():
        if name in persistent and prefix + name in tensor_map:
            read_elements(checkpoint, tensor_map, prefix + name, 0, buffer.view(-1), seen)


def read_elements(
    checkpoint: Checkpoint,
    tensor_map: TensorMap,
    name: str,
    start: int,
    out: torch.Tensor,
    seen: Seen | None = None,
) -> None:
    """Fill ``out`` [n] with elements [start, start + n) of the flattened parameter ``name`` of the map's
    model.

    A scattered parameter costs the reading of its sources whole, and a work space of a few times its size.
    """
    if name not in tensor_map:
        raise ValueError(f"{name} is not in the tensor map; was it built from the whole model, and the prefix right?")
    if name in tensor_map.pieces:
        for piece in tensor_map.overlap(name, start, out.numel()):
            begin = piece.start - start
            part = out[begin : begin + piece.count]
            checkpoint.read_into(piece.source, piece.source_start, part, seen)
    elif out.numel():
        scattered = tensor_map.scattered[name]
        sources = torch.cat([checkpoint.read(source) for source in scattered.sources])
        out.copy_(sources[scattered.order()[start : start + out.numel()]])
