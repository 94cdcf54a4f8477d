"""Loading that knows what it has read: file against manifest, memory against file.

Damage on the disk is found by the hashes that an export leaves in its manifest. They are computed from the bytes as
these are read, so nothing is read for it but chunks that a partition's border cuts. A misplaced partition, say by a
DeepSpeed that lays them out in another way, is found by reading samples a second time.
"""

from __future__ import annotations

import random

import torch
import xxhash
from torch import nn

from dcr_scale.errors import UserError
from dcr_scale.models import disk
from dcr_scale.models.checkpoint import Checkpoint
from dcr_scale.models.manifest import MANIFEST_FILE, Digests, Manifest
from dcr_scale.models.tensor_map import TensorMap
from dcr_scale.models.weights import load_weights, own_part, read_elements
from dcr_scale.world import World

# Elements of a sample: few enough that samples of all ranks are nothing beside a file.
_SAMPLED = 4096


def load_verified(
    module: nn.Module, checkpoint: Checkpoint, tensor_map: TensorMap, world: World, *, prefix: str = ""
) -> None:
    """:func:`~.weights.load_weights`, then both checks. Every rank calls it.

    Raises the same UserError on all ranks where a file cannot be read, a loaded tensor has not the hash of the
    folder's manifest (if there is one), or a rank holds other elements than the file.
    """
    with world.agreed():
        manifest = Manifest.read(checkpoint.folder)
    # Nodes without a shared disk may have got the folder in different ways.
    has_manifest = all(world.gather(manifest is not None))
    digests = Digests.of(checkpoint)
    with world.agreed():
        load_weights(module, checkpoint, tensor_map, prefix=prefix, seen=digests.add if has_manifest else None)
    if has_manifest:
        assert manifest is not None
        differing = manifest.differing(digests.complete(world, checkpoint.read_bytes))
        if differing:
            files = sorted({checkpoint.tensors[name].file for name in differing})
            raise UserError(
                f"{checkpoint.folder}: {', '.join(files)}: {', '.join(sorted(differing)[:3])}"
                f"{f' and {len(differing) - 3} other tensors' if len(differing) > 3 else ''} not as {MANIFEST_FILE} "
                "says: damaged, or changed since; copy or export the checkpoint again (or, if it was changed on "
                f"purpose, delete {MANIFEST_FILE})"
            )
    verify_weights(module, checkpoint, tensor_map, world, prefix=prefix)


@torch.no_grad()
def verify_weights(
    module: nn.Module,
    checkpoint: Checkpoint,
    tensor_map: TensorMap,
    world: World,
    *,
    prefix: str = "",
    samples: int = 8,
    seed: int = 0,
) -> None:
    """Compare hashes of what this rank holds of ``samples`` parameters with hashes of the same elements in the file.

    A sample is a run of at most 4,096 elements, in the parameter's dtype; ranks draw different ones. Every rank calls
    it, before training. Raises the same UserError on all ranks where some differ, and names the parameter.
    """
    draw = random.Random(f"{seed} {world.rank}")
    parameters = [(name, p) for name, p in module.named_parameters() if prefix + name in tensor_map.pieces]
    with world.agreed():
        for name, parameter in draw.sample(parameters, min(samples, len(parameters))):
            part = own_part(parameter)
            count = min(_SAMPLED, part.values.numel())
            first = draw.randrange(part.values.numel() - count + 1)
            held = part.values[first : first + count].cpu()
            fresh = torch.empty_like(held)
            read_elements(checkpoint, tensor_map, prefix + name, part.start + first, fresh)
            if _hash(held) != _hash(fresh):
                raise UserError(
                    f"{checkpoint.folder}: rank {world.rank} holds other values of {prefix + name} (elements "
                    f"{part.start + first} to {part.start + first + count - 1}) than the file: it was replaced while "
                    "it was read, or this version of DeepSpeed cuts parameters in another way than 0.19; run again, "
                    "with the versions of constraints.txt"
                )


def _hash(values: torch.Tensor) -> bytes:
    return xxhash.xxh3_128_digest(disk.bytes_of(values))
