"""The same result on any number of ranks, whole or under ZeRO-3, however batched; and nothing is left behind."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rank_pool import RankPool
from torch import Tensor
from toy_models import toy_model, zero3
from transformers import PreTrainedModel

from dcr_scale.probe import KernelProbe, KernelSimilarity, reduction, sketch

PROMPTS_A = [[3, 4, 5, 6, 7], [8, 0, 3, 9, 2, 30, 4], [9, 9], [31, 5, 17]]
PROMPTS_B = [[3, 4, 5, 17, 7], [8, 0, 3, 9, 2, 30, 4], [12]]
SETTINGS = {"rank": 4, "groups": 4, "output_probes": 3}


def assert_same(result: KernelSimilarity, expected: KernelSimilarity, selves_b: Tensor) -> None:
    """Equal to 1e-5 of √(K_ii K_jj), the size of the terms that cancel in an estimate."""
    scale = (expected.self_squared.abs()[:, None] * selves_b.abs()[None, :]).sqrt()
    for name in ("squared", "known", "stderr", "by_layer"):
        error = (getattr(result, name) - getattr(expected, name)).abs() / scale
        assert error.max() < 1e-5, (name, error.max().item())
    torch.testing.assert_close(result.self_squared, expected.self_squared, rtol=1e-5, atol=0)


def measured(family: str, tied: bool, **settings) -> tuple[KernelSimilarity, Tensor]:
    model = toy_model(family, tied=tied)
    result = KernelProbe(model, **{**SETTINGS, **settings}).measure(PROMPTS_A, PROMPTS_B)
    selves = KernelProbe(model, **SETTINGS).measure(PROMPTS_B).self_squared
    return result, selves


@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("gemma3", False), ("qwen3-moe", True)])
def test_micro_batches_packing_and_checkpointing_change_nothing(family, tied):
    expected, selves = measured(family, tied)
    for settings in ({"micro_batch_tokens": 1}, {"micro_batch_tokens": 17}, {"packed": False}):
        assert_same(measured(family, tied, **settings)[0], expected, selves)
    model = toy_model(family, tied=tied)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for packed in (True, False):
        assert_same(KernelProbe(model, **SETTINGS, packed=packed).measure(PROMPTS_A, PROMPTS_B), expected, selves)


@pytest.mark.parametrize(("limit", "nbytes"), [("_WAITING_BYTES", 0), ("_WAITING_BYTES", 1000), ("_SMALL_BYTES", 0)])
def test_what_waits_and_until_when_changes_nothing(monkeypatch: pytest.MonkeyPatch, limit: str, nbytes: int):
    """One unit after another, some at a time, or, as here by default, all of a backward pass at once."""
    expected, selves = measured("qwen3-moe", True)
    monkeypatch.setattr(sketch, limit, nbytes)
    assert_same(measured("qwen3-moe", True)[0], expected, selves)


@pytest.mark.parametrize("family", ["llama", "qwen3-moe"])
def test_outer_products_by_segments_are_those_row_by_row(monkeypatch: pytest.MonkeyPatch, family: str):
    """How a GPU sums them up where prompts are packed: many units and all groups in one launch."""
    expected, selves = measured(family, True)
    calls = []

    def by_segments(sink, unit, delta, inputs, strips):
        calls.append(unit.name)
        sink._wait(sink._segments, unit, delta, inputs, strips=strips)

    monkeypatch.setattr(sketch.SketchSink, "_outer", by_segments)
    assert_same(measured(family, True)[0], expected, selves)
    assert calls


def test_a_prompt_s_numbers_do_not_depend_on_the_others():
    model = toy_model("llama")
    together = KernelProbe(model, **SETTINGS).measure(PROMPTS_A, PROMPTS_B)
    pair = KernelProbe(model, **SETTINGS).measure(PROMPTS_A[1:2], PROMPTS_B[2:3])
    torch.testing.assert_close(pair.squared, together.squared[1:2, 2:3], rtol=1e-4, atol=0)


def on_a_rank(family: str, tied: bool) -> KernelSimilarity:
    return KernelProbe(toy_model(family, tied=tied), **SETTINGS).measure(PROMPTS_A, PROMPTS_B)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_agree_with_one_process(ranks: RankPool, world_size: int):
    for family, tied in (("llama", True), ("qwen3-moe", False)):
        expected, selves = measured(family, tied)
        results = ranks.run(on_a_rank, family, tied, world_size=world_size)
        for result in results:
            assert_same(result, expected, selves)
            assert torch.equal(result.squared, results[0].squared)


# A pair of these has 8 · slices · groups · probes² = 1440 bytes: a block for each prompt, one at a time or two at once.
PAIR_BYTES = 8 * 5 * 4 * 3**2


def on_a_rank_in_blocks(block_bytes: int) -> list[KernelSimilarity]:
    """Of two sets of prompts, and of one with itself."""
    kept, reduction._BLOCK_BYTES = reduction._BLOCK_BYTES, block_bytes
    try:
        probe = KernelProbe(toy_model("llama"), **SETTINGS)
        return [probe.measure(PROMPTS_A, PROMPTS_B), probe.measure(PROMPTS_A)]
    finally:
        reduction._BLOCK_BYTES = kept


@pytest.mark.parametrize("pairs", [1, 4, 8])
def test_how_many_pairs_are_worked_on_at_once_changes_nothing(ranks: RankPool, pairs: int):
    expected = on_a_rank_in_blocks(reduction._BLOCK_BYTES)
    here = on_a_rank_in_blocks(pairs * PAIR_BYTES)
    for result, whole in zip(here, expected, strict=True):
        torch.testing.assert_close(result.squared, whole.squared, rtol=1e-9, atol=0)
        torch.testing.assert_close(result.self_squared, whole.self_squared, rtol=1e-9, atol=0)
    selves = KernelProbe(toy_model("llama"), **SETTINGS).measure(PROMPTS_B).self_squared, expected[1].self_squared
    for results in ranks.run(on_a_rank_in_blocks, pairs * PAIR_BYTES, world_size=2):
        for result, whole, own in zip(results, expected, selves, strict=True):
            assert_same(result, whole, own)


def with_adapters(model: PreTrainedModel) -> PeftModel:
    """Adapters whose gradients do not vanish, the same on every rank."""
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return adapted.eval()


FORMS = {
    "experts, padded": ("qwen3-moe", False, {"packed": False}),
    "experts, small steps": ("mixtral", False, {"micro_batch_tokens": 9}),
    "adapters": ("qwen3", True, {"parameters": "trainable"}),
}


def measure_form(form: str, partitioned: bool) -> tuple[KernelSimilarity, Tensor]:
    family, tied, settings = FORMS[form]
    model = toy_model(family, tied=tied)
    if form == "adapters":
        model = with_adapters(model)
    measured_model = zero3(model) if partitioned else model
    probe = KernelProbe(measured_model, **SETTINGS, **settings)
    # All prompts on both sides: there must be as many as there are ranks.
    result, selves = probe.measure(PROMPTS_A, PROMPTS_B), probe.measure(PROMPTS_B + PROMPTS_A).self_squared
    if partitioned:
        measured_model.destroy()
    return result, selves[: len(PROMPTS_B)]


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_four_ranks_under_zero3_agree_with_one_process(ranks: RankPool, form: str):
    # One process sends all probes through one forward pass; ZeRO-3 has a row for each.
    expected, selves = measure_form(form, False)
    for result, _ in ranks.run(measure_form, form, True, world_size=4, timeout=300.0):
        assert_same(result, expected, selves)


def train_under_zero3(
    family: str, probed: bool, checkpointing: bool
) -> tuple[dict[str, Tensor], list[KernelSimilarity]]:
    """Two updates under ZeRO-3, with a measurement before each too, or after alone; gathered weights in the end."""
    model = toy_model(family, tied=True)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    engine = zero3(model)
    import deepspeed  # not before DS_ACCELERATOR is set

    engine.train()
    results = []
    rank = torch.distributed.get_rank()
    for step in range(2):
        if probed:
            engine.eval()
            results.append(KernelProbe(engine, **SETTINGS).measure(PROMPTS_A, PROMPTS_B))
            engine.train()
        ids = torch.tensor([PROMPTS_A[(step + rank) % 2]])
        engine.backward(engine(input_ids=ids, labels=ids).loss)
        engine.step()
    # Where it is the first one, DeepSpeed has by now a trace of training's passes to gather by.
    results.append(KernelProbe(engine, **SETTINGS).measure(PROMPTS_A, PROMPTS_B))
    weights = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter]):
            weights[name] = parameter.detach().clone()
    engine.destroy()
    return weights, results


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "checkpointing"),
    [("llama", False), ("llama", True), ("qwen3-moe", False)],
    ids=["kept", "recomputed", "experts"],
)
def test_under_zero3_it_measures_the_same_and_training_never_notices(ranks: RankPool, family: str, checkpointing: bool):
    expected, selves = measured(family, True)
    probed = ranks.run(train_under_zero3, family, True, checkpointing, world_size=2, timeout=300.0)
    plain = ranks.run(train_under_zero3, family, False, checkpointing, world_size=2, timeout=300.0)
    for (weights, results), (twin, late) in zip(probed, plain, strict=True):
        assert_same(results[0], expected, selves)
        assert (len(results), len(late)) == (3, 1)
        for name in twin:
            assert torch.equal(weights[name], twin[name]), name
    # After training it measures the trained model.
    model = toy_model(family, tied=True)
    model.load_state_dict({**model.state_dict(), **plain[0][0]})
    trained = KernelProbe(model, **SETTINGS).measure(PROMPTS_A, PROMPTS_B)
    assert not torch.allclose(trained.squared, expected.squared, rtol=1e-3)
    selves = KernelProbe(model, **SETTINGS).measure(PROMPTS_B).self_squared
    assert_same(probed[0][1][2], trained, selves)
    assert_same(plain[0][1][0], trained, selves)


def measure_a_module_that_ran(passes: int) -> KernelSimilarity:
    """The module itself, which knows nothing of the engine that has taken it over, after forward passes of its own."""
    engine = zero3(toy_model("llama", tied=True))
    engine.eval()
    with torch.no_grad():
        for _ in range(passes):
            engine.module(input_ids=torch.tensor([PROMPTS_A[0]]), use_cache=False)
    found = KernelProbe(engine.module, **SETTINGS).measure(PROMPTS_A, PROMPTS_B)
    engine.destroy()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("passes", [0, 2])
def test_a_module_is_measured_as_its_engine_is_whatever_it_ran_before(ranks: RankPool, passes: int):
    """DeepSpeed gathers ahead by the order of earlier passes, and would keep the embedding for one that never comes."""
    expected, selves = measured("llama", True)
    for found in ranks.run(measure_a_module_that_ran, passes, world_size=2, timeout=300.0):
        assert_same(found, expected, selves)
