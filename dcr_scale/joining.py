"""How a command joins the other ranks, and leaves them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from transformers.utils import logging as transformers_logging

from dcr_scale import engine as engines
from dcr_scale import world as world_module
from dcr_scale.config import EngineConfig
from dcr_scale.errors import OutOfMemory, Preempted, UserError
from dcr_scale.runlog import configure_console
from dcr_scale.world import World


@contextmanager
def joined(settings: EngineConfig, *, group_of_one: bool = True, helps: Sequence[str] = ()) -> Iterator[World]:
    """This process among the others, for the work inside. The first one speaks.

    Args:
        group_of_one: a process that is alone makes a process group too, as ZeRO-3 needs one.
        helps: settings that save memory, for the message of the rank that runs out of it.

    Raises OutOfMemory there; what the work raises besides passes through.
    """
    world = world_module.from_environment()
    if world.size > 1 or group_of_one:
        world = engines.start(settings)
    configure_console(world.rank)
    transformers_logging.set_verbosity_error()
    try:
        yield world
    except (UserError, Preempted):
        engines.finish()
        raise
    except torch.OutOfMemoryError as error:
        advice = ", ".join([*helps, "or more GPUs"]) if helps else "it takes more GPUs"
        raise OutOfMemory(f"rank {world.rank} ran out of memory: {advice}\n{error}") from None
    except Exception:
        # Leaving the group would wait for ranks that know nothing of this one's failure.
        if world.size == 1:
            engines.finish()
        raise
    engines.finish()
