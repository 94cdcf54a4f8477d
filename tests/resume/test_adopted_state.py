"""An engine that goes on from a checkpoint computes with the checkpoint's weights from its first pass on."""

from __future__ import annotations

import os
from unittest import mock

import pytest
import torch
from rank_pool import RankPool
from torch import nn

pytestmark = pytest.mark.slow


def outputs_after_passes(persistence_threshold: int) -> tuple[list[float], list[float], list[float]]:
    """On each rank: what two passes give, the same passes once every weight has become 2, and after one update more."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    from dcr_scale import engine as engines
    from dcr_scale.config import EngineConfig, OptimizerConfig

    settings = EngineConfig(persistence_threshold=persistence_threshold, precision="fp32")
    with mock.patch.object(torch.cuda, "is_available", lambda: False):
        world = engines.start(settings)
        with engines.partitioned(settings, torch.float32, world.device):
            module = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 1, bias=False))
        schedule = OptimizerConfig(lr=1e-3, warmup=0.0, clip=0.0)
        engine = engines.Engine(module, settings, schedule, steps=10, world=world)

    def passes() -> list[float]:
        with torch.no_grad():
            return [engine(torch.ones(1, 4)).item() for _ in range(2)]

    before = passes()
    for _, key, part in engine.own_states(filled=True):
        part.values.fill_(2.0 if key == "weight" else 0.0)
    engine.adopt(applied=3)
    adopted = passes()
    loss = engine(torch.ones(1, 4)).sum()
    engine.backward(loss)
    engine.step(loss.item())
    trained = passes()
    engine.close()
    return before, adopted, trained


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("persistence_threshold", [0, 10**6])
def test_no_pass_sees_a_weight_from_before(ranks: RankPool, persistence_threshold: int, world_size: int) -> None:
    """Parameters that ZeRO-3 keeps whole, and those that the passes of the packing check may have left gathered."""
    for before, adopted, trained in ranks.run(
        outputs_after_passes, persistence_threshold, world_size=world_size, timeout=120.0
    ):
        # Σ_j 2 · (Σ_i 2 · 1) over 4 and 4.
        assert adopted == [64.0, 64.0]
        assert before[0] != 64.0
        assert trained[0] == trained[1] and 63.0 < trained[0] < 64.0
