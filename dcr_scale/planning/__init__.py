"""What a configuration takes on a cluster: memory, traffic, disk and time, from the model's shapes alone."""

from __future__ import annotations

from dcr_scale.config import Config
from dcr_scale.planning.hardware import DEVICES, GIB
from dcr_scale.planning.stages import Cluster, make_planner
from dcr_scale.planning.table import table


def describe_plan(config: Config, gpus: int, *, gpu_memory: float = 80.0, device: str = "h100") -> str:
    """The plan's table for ``gpus`` GPUs of ``gpu_memory`` GiB; ``device`` is a100, h100 or h200.

    Nothing is downloaded, and no weights are read. Raises NoShapes where the model's configuration cannot be found,
    and UserError for what the run itself would refuse.
    """
    planner = make_planner(config)
    return table(planner.plan(Cluster(gpus, gpu_memory * GIB, DEVICES[device])), planner.notes)
