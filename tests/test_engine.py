"""The engine: schedule, DeepSpeed's derived configuration, partitioned modules, steps that are not finite."""

from __future__ import annotations

import gc
import logging
import math
import weakref
from collections.abc import Callable
from pathlib import Path

import deepspeed
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, MixtralConfig, PretrainedConfig, PreTrainedModel, Qwen3Config

from dcr_scale import engine as engines
from dcr_scale.build_lock import remove_stale_lock
from dcr_scale.config import EngineConfig, OptimizerConfig
from dcr_scale.errors import UserError
from dcr_scale.models.trunk import build_model

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def rates(steps: int, **settings) -> list[float]:
    optimizer = OptimizerConfig(lr=1.0, **settings)
    return [engines.learning_rate(optimizer, step, steps) for step in range(steps)]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_rate_rises_evenly_to_its_peak_and_never_starts_at_zero(schedule: str) -> None:
    found = rates(40, schedule=schedule, warmup=0.25)
    assert found[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert found[10] == pytest.approx(1.0)
    assert max(found) == pytest.approx(1.0)


def test_each_schedule_has_its_shape_and_ends_at_its_final_rate() -> None:
    assert set(rates(20, schedule="constant", warmup=0.0)) == {1.0}
    linear = rates(20, schedule="linear", warmup=0.0, final=0.1)
    falls = [earlier - later for earlier, later in zip(linear, linear[1:], strict=False)]
    assert falls == pytest.approx([0.9 / 20] * 19)
    cosine = rates(20, schedule="cosine", warmup=0.0, final=0.2)
    assert cosine[10] == pytest.approx((1.0 + 0.2) / 2)
    assert all(earlier > later for earlier, later in zip(cosine, cosine[1:], strict=False))
    for schedule in ("linear", "cosine"):
        settings = OptimizerConfig(lr=2.0, schedule=schedule, warmup=0.1, final=0.3)
        # Past its end too, where a resumed or lengthened run may look.
        assert engines.learning_rate(settings, 50, 50) == pytest.approx(0.6)
        assert engines.learning_rate(settings, 80, 50) == pytest.approx(0.6)


def test_a_run_of_one_step_trains_at_the_peak() -> None:
    for warmup in (0.0, 0.1, 1.0):
        assert rates(1, warmup=warmup) == [1.0]


def test_deepspeeds_configuration_says_all_that_deepspeed_would_else_choose() -> None:
    settings = EngineConfig(
        reduce_bucket=11, prefetch_bucket=12, persistence_threshold=13, persistence_total=14, max_live=15
    )
    derived = engines.deepspeed_config(settings, OptimizerConfig(clip=0.7), torch.float32, CPU)
    zero = derived["zero_optimization"]
    assert (derived["gradient_clipping"], derived["bf16"]["enabled"], zero["stage"]) == (0.7, False, 3)
    assert (zero["reduce_bucket_size"], zero["stage3_prefetch_bucket_size"]) == (11, 12)
    assert (zero["stage3_param_persistence_threshold"], zero["stage3_model_persistence_threshold"]) == (13, 14)
    assert (zero["stage3_max_live_parameters"], zero["stage3_max_reuse_distance"]) == (15, 15)
    # Zero means "never clip" to DeepSpeed as well; it must be said, since its own default is another.
    assert engines.deepspeed_config(settings, OptimizerConfig(clip=0.0), torch.float32, CPU)["gradient_clipping"] == 0.0
    half = engines.deepspeed_config(settings, OptimizerConfig(), torch.bfloat16, GPU)
    assert (half["bf16"]["enabled"], half["data_types"]["grad_accum_dtype"]) == (True, "fp32")


def test_precision_follows_the_configuration_and_else_the_device() -> None:
    assert engines.compute_dtype(EngineConfig(precision="bf16"), CPU) is torch.bfloat16
    assert engines.compute_dtype(EngineConfig(precision="fp32"), CPU) is torch.float32
    assert engines.compute_dtype(EngineConfig(precision="auto"), CPU) is torch.float32


class Scalar(nn.Module):
    """A loss that inputs steer: x · Σ (weight + bias) + y, so that its value and gradient can fail apart."""

    def __init__(self):
        super().__init__()
        self.weights = nn.Parameter(torch.arange(1.0, 7.0).view(2, 3))
        self.bias = nn.Parameter(torch.ones(3))

    def forward(self, x: float, y: float) -> Tensor:
        return ((self.weights + self.bias) * x).sum() + y


class Recomputed(nn.Module):
    """The same interface over layers whose activations are recomputed; that breaks off in the midst of the last one."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))

    def forward(self, x: float, y: float) -> Tensor:
        return checkpoint(self.layers, torch.full((2, 3), x), use_reentrant=False).sum() + y


def values(module: nn.Module) -> Tensor:
    with engines.whole(module.parameters()):
        return torch.cat([parameter.detach().float().flatten() for parameter in module.parameters()]).clone()


@pytest.fixture
def start(alone: None) -> Callable[..., engines.Engine]:
    """Builds an engine around a :class:`Scalar` or another module; keywords are settings of the engine."""

    def build(module: nn.Module | None = None, **settings) -> engines.Engine:
        config = EngineConfig(**settings)
        world = engines.start(config)
        optimizer = OptimizerConfig(lr=0.1, warmup=0.0, schedule="constant", clip=0.0)
        return engines.Engine(module or Scalar(), config, optimizer, steps=10, world=world)

    return build


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_partitioned_modules_are_built_in_the_dtype_asked_for(
    alone: None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = EngineConfig()
    engines.start(settings)
    # What is loaded afterwards need not be sent before.
    monkeypatch.setattr(deepspeed.comm, "broadcast", None)
    with engines.partitioned(settings, dtype, CPU):
        module = nn.Linear(8, 4, dtype=dtype)
    assert {parameter.ds_tensor.dtype for parameter in module.parameters()} == {dtype}
    assert module.weight.numel() == 0, "the parameter is whole, not partitioned"
    with engines.whole(module.parameters()):
        assert (tuple(module.weight.shape), module.weight.dtype) == ((4, 8), dtype)


@pytest.mark.parametrize("family", [LlamaConfig, Qwen3Config, MixtralConfig])
def test_buffers_of_a_partitioned_model_are_those_of_one_built_plainly(
    alone: None, family: type[PretrainedConfig]
) -> None:
    """Rotary frequencies above all: nothing computes them again, and bf16 would turn late tokens by wrong angles."""
    settings = EngineConfig(precision="bf16")
    engines.start(settings)
    shape = {"vocab_size": 11, "hidden_size": 64, "intermediate_size": 8, "num_hidden_layers": 1}
    config = family(**shape, num_attention_heads=2, num_key_value_heads=1, head_dim=32)

    def build() -> PreTrainedModel:
        return build_model(config, attention="eager", dtype=torch.bfloat16)

    with engines.partitioned(settings, torch.bfloat16, CPU):
        partitioned = build()
    expected = dict(build().named_buffers())
    found = dict(partitioned.named_buffers())
    assert found.keys() == expected.keys()
    assert "model.rotary_emb.inv_freq" in found
    for name, buffer in found.items():
        assert buffer.dtype == torch.float32, name
        assert torch.equal(buffer, expected[name]), name
    assert {parameter.ds_tensor.dtype for parameter in partitioned.parameters()} == {torch.bfloat16}


def test_a_parameter_that_asks_for_another_dtype_follows_the_training(alone: None) -> None:
    """ZeRO-3 takes all parameters of an engine to be of one dtype."""
    settings = EngineConfig(precision="bf16")
    engines.start(settings)
    with engines.partitioned(settings, torch.bfloat16, CPU):
        module = nn.Linear(8, 4, dtype=torch.float32)
    assert {parameter.ds_tensor.dtype for parameter in module.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("x", "y", "what"),
    [
        (math.nan, 0.0, "the loss is nan"),
        (1.0, math.inf, "the loss is inf"),  # its gradient is finite
    ],
)
def test_a_loss_that_is_not_finite_stops_the_run_before_it_moves_a_weight(
    start: Callable[..., engines.Engine], precision: str, x: float, y: float, what: str
) -> None:
    engine = start(precision=precision)
    before = values(engine.module)
    loss = engine(x, y)
    engine.backward(loss)
    with pytest.raises(UserError, match=rf"^stopped after 0 updates: {what}; .*engine\.non_finite=skip"):
        engine.step(loss.item())
    assert torch.equal(values(engine.module), before)


def test_a_gradient_that_is_not_finite_is_skipped_and_training_goes_on_as_if_it_had_not_been(
    start: Callable[..., engines.Engine], caplog: pytest.LogCaptureFixture
) -> None:
    """A skipped step leaves weights, both moments and the schedule alone: the next is as without it."""
    engine = start(precision="fp32", non_finite="skip")

    def step(x: float) -> engines.Update:
        engine.backward(engine(x, y=0.0))
        return engine.step(1.0)

    first = step(1.0)
    assert first.applied
    # Every weight has the derivative 1, every bias (added to two rows) 2.
    assert first.grad_norm == pytest.approx(math.sqrt(6 * 1 + 3 * 4))
    before = values(engine.module)
    with caplog.at_level(logging.WARNING, "dcr_scale.engine"):
        skipped = step(math.inf)
    assert not skipped.applied
    assert math.isnan(skipped.grad_norm)
    assert torch.equal(values(engine.module), before)
    assert engine.applied == 1
    assert "step skipped: the gradient's norm is not finite (1 in a row)" in caplog.text
    second = step(3.0)
    with_skip = values(engine.module)
    assert second.applied
    assert engine.skipped_in_a_row == 0

    engine.close()
    engine = start(precision="fp32")
    step(1.0)
    step(3.0)
    assert torch.equal(values(engine.module), with_skip)


def test_too_many_skipped_steps_in_a_row_stop_the_run(start: Callable[..., engines.Engine]) -> None:
    engine = start(non_finite="skip", max_skipped=2)
    for _ in range(2):  # one good step in between: not in a row
        engine.backward(engine(math.nan, 0.0))
        engine.step(math.nan)
        engine.backward(engine(1.0, 0.0))
        assert engine.step(1.0).applied
    engine.backward(engine(math.nan, 0.0))
    engine.step(math.nan)
    engine.backward(engine(math.nan, 0.0))
    with pytest.raises(UserError, match=r"^stopped after 2 updates: 2 steps in a row were not finite \(engine\.max_s"):
        engine.step(math.nan)


@pytest.mark.parametrize(("clip", "applied"), [(0.0, 100.0), (1.0, 1.0)])
def test_the_gradient_is_clipped_to_its_norm_and_zero_means_never(alone: None, clip: float, applied: float) -> None:
    """Seen in the first moment, which is (1 − β₁) times the gradient that reached AdamW."""
    config = EngineConfig(precision="fp32")
    world = engines.start(config)
    module = nn.Linear(1, 1, bias=False)
    optimizer = OptimizerConfig(lr=0.1, betas=(0.5, 0.9), clip=clip)
    engine = engines.Engine(module, config, optimizer, steps=1, world=world)
    engine.backward(engine(torch.tensor([[100.0]])).sum())
    update = engine.step(1.0)
    assert update.grad_norm == pytest.approx(100.0), "the norm is reported before clipping"
    (state,) = engine._optimizer.state.values()
    assert float(state["exp_avg"].flatten()[0]) == pytest.approx(0.5 * applied, rel=1e-4)


def test_passes_without_gradients_may_come_first(start: Callable[..., engines.Engine]) -> None:
    """Neither they nor passes aside disturb the order in which ZeRO-3 gathers parameters for a step."""
    engine = start(precision="fp32")
    expected = float(sum(range(1, 7)) + 6)
    for _ in range(3):
        with engine.forward_only(training=True):
            assert not engine(1.0, 0.0).requires_grad
        with engine.aside():
            engine(1.0, 0.0)
        loss = engine(1.0, 0.0)
        assert loss.item() == pytest.approx(expected)
        engine.backward(loss)
        assert engine.step(loss.item()).applied
        # A step of 0.1 on six weights and on three biases that count twice.
        expected -= 0.1 * (6 + 2 * 3)


@pytest.mark.parametrize("module", [Scalar, Recomputed])
def test_a_closed_engine_leaves_nothing_for_the_next_stage_to_find(
    start: Callable[..., engines.Engine], module: type[nn.Module]
) -> None:
    """Nor in DeepSpeed's own lists and caches, of which the last fills when it knows the order of modules."""
    engine = start(module(), precision="fp32", persistence_threshold=0)
    for _ in range(3):
        loss = engine(1.0, 0.0)
        engine.backward(loss)
        engine.step(loss.item())
    optimizer = engine._optimizer
    left = [weakref.ref(x) for x in (engine.module, engine._engine, optimizer, *optimizer.fp32_partitioned_groups_flat)]
    engine.close()
    del engine, optimizer, loss
    gc.collect()
    assert [reference() for reference in left] == [None] * len(left)


def test_a_module_without_trainable_parameters_is_refused(alone: None) -> None:
    config = EngineConfig()
    world = engines.start(config)
    with pytest.raises(UserError, match="nothing to train"):
        engines.Engine(Scalar().requires_grad_(False), config, OptimizerConfig(), steps=1, world=world)


def test_only_a_lock_that_nobody_holds_is_removed(tmp_path: Path) -> None:
    lock = tmp_path / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir()
    with lock.open("w"):
        remove_stale_lock(lock, age_seconds=-1.0)
        assert lock.exists(), "a build that runs holds its lock open"
    remove_stale_lock(lock, age_seconds=3600.0)
    assert lock.exists(), "a young lock may be another node's"
    remove_stale_lock(lock, age_seconds=-1.0)
    assert not lock.exists()
