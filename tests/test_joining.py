"""How a command leaves the other ranks when its work fails."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from dcr_scale.config import EngineConfig
from dcr_scale.errors import OutOfMemory, UserError
from dcr_scale.joining import joined


def test_a_full_device_is_told_what_helps(alone: None) -> None:
    said = pytest.raises(OutOfMemory, match=r"rank 0 ran out of memory: --batch-size 4, or more GPUs\nno room")
    with said, joined(EngineConfig(), group_of_one=False, helps=["--batch-size 4"]):
        raise torch.OutOfMemoryError("no room")


@pytest.mark.parametrize("error", [UserError, RuntimeError])
def test_a_process_that_is_alone_leaves_its_group_whatever_happens(alone: None, error: type[Exception]) -> None:
    with pytest.raises(error), joined(EngineConfig()):
        assert dist.is_initialized()
        raise error("stop")
    assert not dist.is_initialized()
