"""Bytes that a stage holds on each GPU, in the host's memory and on its local disk."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from dcr_scale.config import EngineConfig
from dcr_scale.planning.activations import Activations
from dcr_scale.planning.gathering import Gathers, persistent
from dcr_scale.planning.modules import ModuleList

_FLOAT = 4

# DeepSpeed updates so many elements of a rank's partition at once: its default sub_group_size.
_SUB_GROUP = 1_000_000_000


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU by what they are for; the host's, a rank; and a rank's on the local disk.

    Attributes:
        parameters: the rank's partitions, and the small parameters that every rank keeps whole.
        gradients: the rank's partition of them, float32.
        optimizer: float32 masters and both moments.
        buckets: where gradients wait to be reduced, and what a reduction copies them into.
        gathered: parameters gathered at once, and the buffer that several of them arrive in.
        activations: what one micro-batch's forward pass keeps.
        workspace: what passes hold beside that, or the update beside gradients and optimiser, whichever is more.
            These three are of one moment, in the layers or above them, whichever takes more.
        probe: the whole model that ``probe.every`` keeps beside stage 1's trunk, the rank's part.
        host: parameters or optimiser that are offloaded.
        nvme: the same on the local disk.
    """

    parameters: int
    gradients: int
    optimizer: int
    buckets: int
    gathered: int
    activations: int
    workspace: int
    probe: int
    host: int
    nvme: int

    @property
    def parts(self) -> dict[str, int]:
        """The GPU's, by name."""
        return {name: size for name, size in asdict(self).items() if name not in ("host", "nvme")}

    @property
    def total(self) -> int:
        """The GPU's."""
        return sum(self.parts.values())


def plan_memory(
    modules: ModuleList,
    settings: EngineConfig,
    gathers: Gathers,
    activations: Activations,
    *,
    world_size: int,
    element_bytes: int,
    probed: Sequence[int] = (),
) -> Memory:
    """Of one rank. ``element_bytes``: of a parameter, 2 in bf16 and 4 in float32. ``probed``: elements of each of the
    parameters of a model that a probe keeps beside the stage's own."""
    partitions = sum(p.part(world_size) for p in modules.parameters)
    trained = sum(p.part(world_size) for p in modules.parameters if p.trained)
    kept = persistent(modules, settings)
    whole = sum(p.numel for p in modules.parameters if p.number in kept)
    # Masters are apart from the parameters in float32 too: DeepSpeed compares a device with its name, and copies.
    states, gradients = 3 * _FLOAT * trained, _FLOAT * trained
    on_device = {"none": (gradients, states, 0, 0), "cpu": (0, 0, states, 0), "nvme": (0, 0, 0, states)}
    device_gradients, device_states, host, nvme = on_device[settings.offload_optimizer]
    if settings.offload_optimizer != "none":
        # Gradients accumulate in one host buffer and are handed to the update in another, which goes to disk as well.
        host += gradients
        host, nvme = (host + gradients, nvme) if settings.offload_optimizer == "cpu" else (host, nvme + gradients)
    device_parameters = (partitions + whole) * element_bytes
    probe = sum(math.ceil(numel / world_size) for numel in probed) * element_bytes
    if settings.offload_parameters == "cpu":
        device_parameters, host = whole * element_bytes, host + partitions * element_bytes
        if world_size > 1:  # a single rank's is no partition
            probe, host = 0, host + probe
    largest = max((p.numel for p in modules.parameters if p.trained), default=0)
    # A gradient that no bucket holds waits for the next one to be there, beside which it is counted as working memory.
    outsized = largest if largest > settings.reduce_bucket else 0
    copied = min(settings.reduce_bucket, modules.trained)
    # A single rank's modules see its partition itself.
    gathered_bytes = element_bytes if world_size > 1 else 0
    gathered, passes = max(
        (gathers.layers * gathered_bytes, activations.layers),
        (gathers.above * gathered_bytes, activations.above),
        key=sum,
    )
    kept_bytes = min(activations.kept, passes)
    update = 0
    if settings.offload_optimizer == "none":
        update = _FLOAT * min(trained, _SUB_GROUP + largest // world_size)
    return Memory(
        parameters=device_parameters,
        gradients=device_gradients,
        optimizer=device_states,
        buckets=(settings.reduce_bucket + copied) * element_bytes,
        gathered=gathered,
        activations=kept_bytes,
        workspace=max(passes - kept_bytes + outsized * element_bytes, update - gathered - kept_bytes),
        probe=probe,
        host=host,
        nvme=nvme,
    )
