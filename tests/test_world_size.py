"""How many ranks share a run does not change what it computes: neither a gradient nor the weights it ends with."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from rank_pool import RankPool
from toy import toy_checkpoint, toy_settings, write_config

from dcr_kernels import pool
from dcr_scale import pipeline
from dcr_scale.config import Label, LossConfig, load_config
from dcr_scale.contrastive import contrastive_loss
from dcr_scale.data.contrast import ContrastPrompt
from dcr_scale.data.sampler import shard
from dcr_scale.models.checkpoint import Checkpoint

# Every rank imports the whole project, which takes longer than the tests.
pytestmark = pytest.mark.slow

PROMPTS, VOCABULARY, WIDTH = 8, 17, 12


def averaged_gradient(loss: LossConfig, pooling: str) -> tuple[float, torch.Tensor]:
    """On each rank: embed its shard of the prompts, pool, take the loss; gradients are averaged as an engine does."""
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator).requires_grad_()
    lengths = torch.randint(1, 6, (PROMPTS,), generator=generator).tolist()
    prompts = [torch.randint(VOCABULARY, (length,), generator=generator) for length in lengths]
    labels: list[Label] = ["toxic" if toxic else "seemingly_toxic" for toxic in (0, 1, 1, 0, 1, 0, 0, 1)]
    own = shard(range(PROMPTS), rank, world_size)
    cu_seqlens = torch.tensor([0, *(lengths[i] for i in own)]).cumsum(0).int()
    hidden_TD = torch.nn.functional.embedding(torch.cat([prompts[i] for i in own]), weight)
    pooled_ND = pool(hidden_TD, cu_seqlens, mode=pooling)
    kinds = [ContrastPrompt(str(i), labels[i], family=str(i), pair=None, source="toy") for i in own]
    value = contrastive_loss(pooled_ND, kinds, loss, world_size)
    value.backward()
    dist.all_reduce(weight.grad)
    return value.item(), weight.grad / world_size


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("name", ["circle", "supcon"])
def test_the_gradient_of_the_global_batch_is_the_same_on_1_2_and_4_ranks(
    ranks: RankPool, name: str, pooling: str
) -> None:
    loss = LossConfig(name=name)
    ((value, alone_VD),) = ranks.run(averaged_gradient, loss, pooling, world_size=1)
    assert alone_VD.abs().max() > 1e-3
    for world_size in (2, 4):
        for shared, gradient_VD in ranks.run(averaged_gradient, loss, pooling, world_size=world_size):
            assert shared == pytest.approx(value, rel=1e-6)
            torch.testing.assert_close(gradient_VD, alone_VD, rtol=1e-5, atol=1e-6 * float(alone_VD.abs().max()))


def run_on_ranks(config: str, run: str, *overrides: str) -> None:
    """A rank of the pool goes through the run that it has been given a place in."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    from dcr_scale import engine

    settings = load_config(config, [f"run.dir={run}", *overrides])
    pipeline.Run(settings, engine.start(settings.engine)).run()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint.open(folder)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def test_two_ranks_train_the_weights_that_one_trains(tmp_path: Path, ranks: RankPool, alone: None) -> None:
    """Both stages under ZeRO-3, each started from the source.

    Without clipping and with a large ε, AdamW's update grows with the gradient: a factor of the number of ranks, or
    a mean over ranks whose micro-batches are uneven, would show.
    """
    source = toy_checkpoint(tmp_path / "model", "llama")
    settings = toy_settings(tmp_path, source)
    settings["look"]["enabled"] = False
    steady = {"lr": 1e-2, "eps": 1.0, "clip": 0.0}
    settings["refine"].update(batch_size=8, optimizer=steady, retention={"prompts": 8, "batch_size": 3, "weight": 30.0})
    settings["align"].update(batch_size=5, micro_batch_tokens=90, optimizer=steady)
    config = str(write_config(tmp_path, settings))
    for stage, skipped in (("refined", "align=null"), ("aligned", "refine=null")):
        one, two = tmp_path / f"{stage}_1", tmp_path / f"{stage}_2"
        pipeline.run(load_config(config, [f"run.dir={one}", skipped]))
        ranks.run(run_on_ranks, config, str(two), skipped, world_size=2, timeout=300.0)
        before, alone_, shared = weights(source), weights(one / stage), weights(two / stage)
        moved = max(float((alone_[name] - before[name]).abs().max()) for name in before)
        apart = max(float((alone_[name] - shared[name]).abs().max()) for name in before)
        assert moved > 1e-3
        assert apart < 1e-5
