"""The plan's bytes against bytes counted in a real measurement, and the plan of a 70-billion-parameter model."""

from __future__ import annotations

import os
import pickle
from contextlib import contextmanager

import pytest
import torch
from rank_pool import RankPool
from toy_models import toy_model
from transformers import LlamaConfig

from dcr_scale.models.trunk import decoder_layers
from dcr_scale.probe import KernelProbe, head, measure
from dcr_scale.probe.head import gathered
from dcr_scale.probe.plan import plan_measurement
from dcr_scale.probe.reduction import own_slices
from dcr_scale.probe.sketch import SketchSink

PROMPTS = [[3, 4, 5, 6, 7], [8, 0, 3, 9, 2, 30, 4], [9, 9], [31, 5, 17], [12], [1, 2, 3, 4], [7, 6, 5]]
SETTINGS = {"rank": 4, "groups": 3, "output_probes": 2, "micro_batch_tokens": 9}


def counted_bytes(family: str, tied: bool, checkpointing: bool) -> dict[str, int]:
    """What this rank sent by all_to_all, received of parameters and held, how many steps it took, and its largest
    pickle, in one measurement."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    from deepspeed.comm.torch import TorchBackend

    deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    model = toy_model(family, tied=tied)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    config = {
        "train_micro_batch_size_per_gpu": 1,
        # Nothing stays gathered from one use to the next.
        "zero_optimization": {
            "stage": 3, "stage3_param_persistence_threshold": 20, "stage3_max_reuse_distance": 0,
            "stage3_max_live_parameters": 1, "stage3_prefetch_bucket_size": 0,
        },
    }  # fmt: skip
    engine, *_ = deepspeed.initialize(model=model, config=config)
    engine.eval()
    names = "exchanged gathered pickled kept sketches slices micro_steps partition layer head checkpoints"
    count = dict.fromkeys(names.split(), 0)
    entered = inputs_of_layers = 0
    layers = decoder_layers(engine.module)
    count["partition"] = sum(p.ds_tensor.numel() * p.element_size() for p in engine.module.parameters())
    count["layer"] = max(sum(p.ds_numel * p.element_size() for p in layer.parameters()) for layer in layers)
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    all_to_all = torch.distributed.all_to_all_single
    gather_object = torch.distributed.all_gather_object
    gathers = {name: getattr(TorchBackend, name) for name in ("all_gather_into_tensor", "all_gather")}

    def counting_exchange(output, input, output_splits, input_splits):
        others = sum(size for peer, size in enumerate(input_splits) if peer != rank)
        count["exchanged"] += others * input.element_size()
        return all_to_all(output, input, output_splits, input_splits)

    def measuring_pickles(everyone, own):
        count["pickled"] = max(count["pickled"], len(pickle.dumps(own)))
        return gather_object(everyone, own)

    @contextmanager
    def measuring_head(parameter):
        with gathered(parameter):
            count["head"] = max(count["head"], parameter.nbytes)
            yield

    def stepping(probe, *arguments):
        nonlocal inputs_of_layers
        inputs_of_layers = 0
        count["micro_steps"] += 1
        return run(probe, *arguments)

    def entering(layer, args, kwargs):
        # Layers that run once more, in the backward pass, run under the engine of autograd.
        nonlocal inputs_of_layers
        if checkpointing and count["micro_steps"] and torch._C._current_graph_task_id() == -1:
            inputs_of_layers += args[0].nbytes
            count["checkpoints"] = max(count["checkpoints"], inputs_of_layers)

    class CountingSink(SketchSink):
        def begin(self, layout):
            nonlocal entered
            entered = 0
            super().begin(layout)

        def enter(self, units, inputs, routing):
            nonlocal entered
            found = super().enter(units, inputs, routing)
            entered += sum(x.nbytes for x in found)
            count["kept"] = max(count["kept"], entered)
            return found

    def counting_slices(slices, items, total):
        own = own_slices(slices, items, total)
        count["sketches"] = sum(x.nbytes for x in slices)
        count["slices"] = sum(x.nbytes for x in own.values())
        return own

    def counting(gather):
        def counted(self, output=None, tensor=None, *args, input_tensor=None, output_tensor=None, **more):
            part = tensor if input_tensor is None else input_tensor
            count["gathered"] += part.numel() * part.element_size() * (world_size - 1)
            return gather(self, output if output_tensor is None else output_tensor, part, *args, **more)

        return counted

    run = KernelProbe._run
    hooks = [layer.register_forward_pre_hook(entering, with_kwargs=True) for layer in layers]
    measure.SketchSink, measure.own_slices = CountingSink, counting_slices
    head.gathered, KernelProbe._run = measuring_head, stepping
    torch.distributed.all_to_all_single = counting_exchange
    torch.distributed.all_gather_object = measuring_pickles
    for name, gather in gathers.items():
        setattr(TorchBackend, name, counting(gather))
    try:
        KernelProbe(engine, **SETTINGS).measure(PROMPTS)
    finally:
        measure.SketchSink, measure.own_slices = SketchSink, own_slices
        head.gathered, KernelProbe._run = gathered, run
        for hook in hooks:
            hook.remove()
        torch.distributed.all_to_all_single = all_to_all
        torch.distributed.all_gather_object = gather_object
        for name, gather in gathers.items():
            setattr(TorchBackend, name, gather)
        engine.destroy()
    return count


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world_size", "family", "tied", "checkpointing"),
    [(2, "llama", True, False), (4, "llama", False, True), (2, "mixtral", False, False)],
)
def test_planned_bytes_are_those_counted(
    ranks: RankPool, world_size: int, family: str, tied: bool, checkpointing: bool
):
    plan = plan_measurement(
        toy_model(family, tied=tied).config,
        [len(prompt) for prompt in PROMPTS],
        world_size=world_size,
        element_bytes=4,
        checkpointing=checkpointing,
        persistence_threshold=20,
        **SETTINGS,
    )
    counts = ranks.run(counted_bytes, family, tied, checkpointing, world_size=world_size, timeout=300.0)
    largest = {what: max(count[what] for count in counts) for what in counts[0]}
    for what in ("exchanged", "kept", "sketches", "slices", "micro_steps", "partition", "layer", "head", "checkpoints"):
        assert largest[what] == getattr(plan, what), what
    in_passes = largest["layer"] + largest["checkpoints"] + largest["kept"] + largest["sketches"]
    afterwards = largest["sketches"] + largest["slices"]
    assert plan.held == largest["partition"] + max(largest["head"], in_passes, afterwards)
    for count in counts:
        # Shapes: no numbers travel beside those that are counted.
        assert count["pickled"] < 100 * world_size
        # DeepSpeed gathers the small parameters once, to keep them.
        assert count["gathered"] == pytest.approx(plan.gathered, rel=0.03)


def test_the_plan_of_a_large_model():
    llama_70b = LlamaConfig(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8,
    )  # fmt: skip
    settings = {"world_size": 64, "rank": 32, "groups": 1, "output_probes": 4, "micro_batch_tokens": 4096}
    plan = plan_measurement(llama_70b, [24] * 1000, **settings)
    # 7 matrices and 2 norms a layer; embedding and final norm.
    assert plan.units == 80 * 9 + 2
    assert plan.micro_steps == 1
    # 1000 prompts × 4 probes × 722 weights × 32² coordinates × 4 bytes, spread over 64 ranks.
    assert plan.sketches == pytest.approx(1000 * 4 * 722 * 1024 * 4 / 64, rel=0.02)
    assert plan.partition == pytest.approx(70.55e9 * 2 / 64, rel=0.01)
    # Every rank's items of 24 tokens through 80 layers' inputs.
    assert plan.checkpoints == pytest.approx(1000 * 4 * 24 / 64 * 80 * 8192 * 2, rel=0.02)
    assert plan.layer == pytest.approx(68.45e9 / 80 * 2, rel=0.01)
    assert plan.head == 128256 * 8192 * (2 + 4)
    assert plan.held == plan.partition + plan.head
    # Layers are gathered three times a micro-step where they are recomputed, their last matrix (18.8 billion in all)
    # twice, the embedding and the head once, and all of them once more; and all but 1/64 comes from others.
    assert plan.gathered == pytest.approx((4 * 68.45e9 - 18.8e9 + 4 * 1.05e9) * 2 * 63 / 64, rel=0.01)
    assert "GB" in plan.table()
    few = plan_measurement(llama_70b, [24] * 1000, **{**settings, "world_size": 8})
    assert few.micro_steps == 3
    assert few.held == few.partition + few.layer + few.checkpoints + few.kept + few.sketches
    assert few.gathered > 2 * plan.gathered


def test_a_tied_head_that_does_not_count_has_nothing_more_to_send():
    lengths = [len(prompt) for prompt in PROMPTS]
    tied, untied, counted = (
        plan_measurement(toy_model("llama", tied=tied).config, lengths, world_size=2, parameters=pattern, **SETTINGS)
        for tied, pattern in ((True, "layers"), (False, "layers"), (True, "layers|embed"))
    )
    assert tied.exchanged == untied.exchanged < counted.exchanged
