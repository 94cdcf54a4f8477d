"""Plans of the shipped configurations, without weights and without a network."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache
from pathlib import Path

import psutil
import pytest
import torch
from toy import REPOSITORY, toy_checkpoint, toy_settings, write_config
from transformers import LlamaConfig

from dcr_scale.config import AlignConfig, EngineConfig, ModelConfig, load_config
from dcr_scale.errors import UserError
from dcr_scale.models.response_loss import _AT_ONCE
from dcr_scale.models.trunk import build_skeleton, depth
from dcr_scale.planning import describe_plan
from dcr_scale.planning.activations import model_activations
from dcr_scale.planning.gathering import Coordinator, Visit
from dcr_scale.planning.hardware import DEVICES, GIB
from dcr_scale.planning.modules import Parameter
from dcr_scale.planning.published import published_config
from dcr_scale.planning.stages import Cluster, Planner, StagePlan, make_planner
from dcr_scale.planning.workload import Lengths, refine_work

# Parameters, as the models' cards state them, in billions.
SIZES = {"llama3_8b": 8.03, "llama3_70b": 70.55, "qwen3_32b": 32.76, "mixtral_8x7b": 46.70, "smollm2": 0.1345}


def dense(width: int, inner: int, queries: int, keys: int) -> dict[str, tuple[int, ...]]:
    """What a layer consists of, as the safetensors headers on the Hub state it."""
    attention = {"q": (queries, width), "k": (keys, width), "v": (keys, width), "o": (width, queries)}
    mlp = {"gate": (inner, width), "up": (inner, width), "down": (width, inner)}
    return {
        **{f"self_attn.{name}_proj.weight": shape for name, shape in attention.items()},
        **{f"mlp.{name}_proj.weight": shape for name, shape in mlp.items()},
        **{f"{name}_layernorm.weight": (width,) for name in ("input", "post_attention")},
    }


def mixture(width: int, inner: int, keys: int, experts: int) -> dict[str, tuple[int, ...]]:
    """As transformers holds it: the Hub's w1 and w3 of all experts are gate_up_proj, their w2 down_proj."""
    kept = {name: shape for name, shape in dense(width, inner, width, keys).items() if not name.startswith("mlp.")}
    routed = {"gate.weight": (experts, width)}
    routed |= {"experts.gate_up_proj": (experts, 2 * inner, width), "experts.down_proj": (experts, width, inner)}
    return {**kept, **{f"mlp.{name}": shape for name, shape in routed.items()}}


HEAD_NORMS = {"self_attn.q_norm.weight": (128,), "self_attn.k_norm.weight": (128,)}
# Layers, vocabulary and width, whether the head is the embedding, and a layer's parameters.
PUBLISHED = {
    "llama3_8b": (32, (128256, 4096), False, dense(4096, 14336, 4096, 1024)),
    "llama3_70b": (80, (128256, 8192), False, dense(8192, 28672, 8192, 1024)),
    "qwen3_32b": (64, (151936, 5120), False, {**dense(5120, 25600, 8192, 1024), **HEAD_NORMS}),
    "mixtral_8x7b": (32, (32000, 4096), False, mixture(4096, 14336, 1024, 8)),
    "smollm2": (30, (49152, 576), True, dense(576, 1536, 576, 192)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_shipped_configurations_are_of_the_published_shapes(name: str) -> None:
    layers, table, tied, layer = PUBLISHED[name]
    model = published_config(load_config(REPOSITORY / "configs" / f"{name}.yaml", []).model.path)
    assert model is not None
    expected = {f"model.layers.{i}.{key}": shape for i in range(layers) for key, shape in layer.items()}
    expected |= {"model.embed_tokens.weight": table, "model.norm.weight": table[1:]}
    expected |= {} if tied else {"lm_head.weight": table}
    found = {key: tuple(parameter.shape) for key, parameter in build_skeleton(model).named_parameters()}
    assert found == expected


@cache
def planner(name: str) -> Planner:
    # The published shapes, whatever lies in this machine's caches.
    config = load_config(REPOSITORY / "configs" / f"{name}.yaml", [])
    from dcr_scale.planning.finding import FoundModel
    from dcr_scale.planning.workload import Assumed, measure_lengths

    published = published_config(config.model.path)
    assert published is not None
    found = FoundModel(published, None, "published shapes")
    return Planner(config, found, measure_lengths(config, None, Assumed()))


@cache
def plan(name: str, gpus: int) -> dict[str, StagePlan]:
    return {stage.name: stage for stage in planner(name).plan(Cluster(gpus, 80 * GIB, DEVICES["h100"]))}


@pytest.mark.parametrize("name", SIZES)
def test_shipped_configurations_fit_their_models_and_one_node(name: str) -> None:
    made = planner(name)
    assert made.whole == pytest.approx(SIZES[name] * 1e9, rel=0.002)
    assert made.config.refine is not None and made.config.align is not None
    assert 1 <= made.config.refine.chosen_layer < depth(made.model.config)
    assert made.config.align.method == "lora"
    stages = plan(name, 8)
    assert [stage.fits for stage in stages.values()] == [True, True]


def test_logits_are_planned_as_they_are_made() -> None:
    """A few rows at a time; where the head trains, beside its gradient."""
    vocabulary, responses, width = 128256, 2000, 512
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4
    )
    needed = {}
    for method in ("lora", "full"):
        settings = AlignConfig(method=method)
        found = model_activations(
            config, settings, ModelConfig(path="none"),
            prefix=8, examples=(2000,), responses=responses, attention="sdpa", dtype=torch.bfloat16,
        )  # fmt: skip
        needed[method] = max(found.layers, found.above)
    at_once, gradient = 4 * 4 * _AT_ONCE, vocabulary * width * 2
    assert needed["lora"] < at_once
    assert needed["lora"] < needed["full"] < at_once + gradient < vocabulary * responses * (2 + 4)


@pytest.mark.parametrize("gpus", [32, 64])
def test_both_stages_of_the_largest_fit_several_nodes_with_room(gpus: int) -> None:
    for stage in plan("llama3_70b", gpus).values():
        assert stage.memory.total < 0.5 * 80 * GIB


def test_the_70_billion_take_what_was_worked_out_by_hand() -> None:
    refine = plan("llama3_70b", 8)["refine"]
    # 32 layers of 855.6 million; the embedding of 1050.7 million is there but frozen.
    layer, embedding = 855_654_400, 128256 * 8192
    assert (refine.modules.trained, refine.modules.held) == (32 * layer, 32 * layer + embedding)
    assert refine.memory.optimizer == pytest.approx(12 * 32 * layer / 8, rel=1e-6)
    assert refine.memory.gradients == pytest.approx(4 * 32 * layer / 8, rel=1e-6)
    assert refine.memory.parameters == pytest.approx(2 * (32 * layer + embedding) / 8, rel=1e-3)
    assert refine.disk.loaded == 2 * (32 * layer + embedding)
    assert refine.disk.loaded + refine.disk.copied == 2 * (planner("llama3_70b").whole + embedding)
    assert refine.disk.state == 12 * 32 * layer
    align = plan("llama3_70b", 8)["align"]
    # Adapters of rank 16 on seven matrices: 16 · (inputs + outputs) each.
    widths = 2 * (8192 + 8192) + 2 * (8192 + 1024) + 3 * (8192 + 28672)
    assert align.modules.trained == 80 * 16 * widths
    assert align.disk.copied == 2 * (planner("llama3_70b").whole - 80 * (layer - 2 * 8192))


def test_a_plan_holds_no_weights() -> None:
    config = load_config(REPOSITORY / "configs" / "llama3_70b.yaml", ["align=null"])
    model = published_config(config.model.path)
    assert model is not None
    assert all(parameter.is_meta for parameter in build_skeleton(model).parameters())
    before = psutil.Process().memory_info().rss
    describe_plan(config, 8)
    # One matrix of a layer alone would be 0.47 GB.
    assert psutil.Process().memory_info().rss - before < 400e6


def test_experts_are_held_whole_and_computed_by_those_routed_to() -> None:
    refine = plan("mixtral_8x7b", 8)["refine"]
    experts = 8 * 3 * 4096 * 14336
    # A layer's experts come in two matrices, gathered in one piece.
    assert refine.gathers.peak >= experts
    attention = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 8 * 4096
    active = 13 * (attention + experts * 2 / 8)
    products = 6 * active * refine.work.tokens
    assert refine.arithmetic.model == pytest.approx(products, rel=0.02)


@pytest.mark.slow
def test_what_is_offloaded_leaves_the_gpu() -> None:
    base = plan("smollm2", 2)["refine"].memory
    for overrides, left in (
        (["engine.offload_optimizer=cpu"], base.optimizer + base.gradients),
        (["engine.offload_optimizer=nvme", "engine.offload_folder=/nvme"], base.optimizer + base.gradients),
        (["engine.offload_parameters=cpu"], base.parameters + base.probe),
    ):
        config = load_config(REPOSITORY / "configs" / "smollm2.yaml", [*overrides, "align=null"])
        (stage,) = Planner(config, planner("smollm2").model, planner("smollm2").lengths).plan(
            Cluster(2, 80 * GIB, DEVICES["h100"])
        )
        assert stage.memory.total < base.total - 0.9 * left + base.workspace
        assert stage.memory.host + stage.memory.nvme >= 0.9 * left
        # The model that the probe keeps lies where parameters do.
        assert (stage.memory.probe == 0) == (overrides == ["engine.offload_parameters=cpu"])


def test_a_batch_in_two_passes_keeps_one_pack_and_gathers_more() -> None:
    cluster = plan("smollm2", 2)["refine"].cluster
    stages = []
    for own in ([], ["refine.micro_batch_tokens=400"]):
        config = load_config(REPOSITORY / "configs" / "smollm2.yaml", ["align=null", "refine.batch_size=128", *own])
        stages += Planner(config, planner("smollm2").model, planner("smollm2").lengths).plan(cluster)
    base, stage = stages
    assert stage.work.twice and len(stage.work.packs) > 2
    assert stage.memory.activations < base.memory.activations / 2
    assert stage.traffic.parameters > 2 * base.traffic.parameters
    assert stage.arithmetic.device > 1.25 * base.arithmetic.device
    assert stage.disk == base.disk


def test_a_step_has_as_many_packs_as_every_rank_can_fill() -> None:
    config = load_config(None, ["refine.micro_batch_tokens=16", "refine.batch_size=8"])
    assert config.refine is not None
    lengths = Lengths(4, (20,) * 50, (20,) * 50, (), (), "made up")
    # Two contrast prompts and two retained ones on each of four ranks.
    assert len(refine_work(lengths, config.refine, 4).packs) == 4
    config.refine.retention.batch_size = 3
    assert len(refine_work(lengths, config.refine, 4).packs) == 2


def test_parameters_stay_as_long_as_they_are_needed_soon() -> None:
    a, b, c = (Parameter(number, 10, True, True, False) for number in range(3))

    def gathered(*order: Visit, **settings: int) -> int:
        coordinator = Coordinator(list(order), set(), EngineConfig(prefetch_bucket=0, **settings), 1)
        coordinator.run()
        return coordinator.elements

    there_and_back = [Visit((p,), (p,)) for p in (a, b, c, c, b, a)]
    assert gathered(*there_and_back, max_live=1000) == 30
    assert gathered(*there_and_back, max_live=1) == 50, "only the two uses of c stand next to each other"
    # Around b: a stays until b has run, and goes then unless it is needed again soon; dropped, it goes anyhow.
    held = Visit((a,)), Visit((b,), (b, a))
    assert gathered(*held, *held, max_live=1) == 30
    assert gathered(*held, *held, max_live=1000) == 20
    assert gathered(held[0], Visit((b,), (b,), dropped=(a,)), *held, max_live=1000) == 30
    # Between c's two uses lie 10 elements, to a leaf those within them too.
    between = Visit((a,), (a,), within=(a, b))
    for leaf, expected in ((False, 20), (True, 30)):
        visit = Visit((c,), (c,), within=(c,), leaf=leaf)
        assert gathered(visit, between, replace(between, parameters=(), released=()), visit, max_live=15) == expected


def test_what_arrived_together_stays_in_its_buffer_until_the_last_of_it_was_waited_for() -> None:
    a, b, c = (Parameter(number, size, True, True, False) for number, size in enumerate((1, 10, 100)))
    settings = EngineConfig(prefetch_bucket=1000, max_live=1000)
    # b and c come together while a runs: in their buffer alone, then beside it, from b's visit to c's.
    order = [Visit((a,), (a,)), Visit((b,), (b,)), Visit((), above=True), Visit((c,), (c,))]
    coordinator = Coordinator(order, set(), settings, 1)
    coordinator.run()
    found = coordinator.gathers()
    assert (found.collectives, found.peak) == (2, 111)
    assert found.above == 100 + 110, "b has gone, its buffer has not"
    assert found.layers == 110 + 110
    alone = Coordinator([Visit((p,), (p,)) for p in (a, b)], set(), settings, 1)
    alone.run()
    assert alone.gathers().layers == 11, "what arrives by itself is not copied"


@pytest.mark.slow
def test_a_batch_that_the_run_refuses_is_planned_larger_and_said() -> None:
    """128 prompts do not divide over 24 ranks."""
    refine, align = plan("llama3_70b", 24).values()
    assert refine.work.batch == 144
    assert "batch_size is 128, which the run refuses on so many GPUs: planned for 144" in refine.work.note
    assert (align.work.batch, align.work.note) == (128, "")


def test_the_sweep_covers_8_to_512_gpus(tmp_path: Path) -> None:
    from dcr_scale.planning.sweep import GPUS, draw_sweep, sweep_table

    plans = [list(plan("smollm2", gpus).values()) for gpus in GPUS]
    assert [stages[0].cluster.gpus for stages in plans] == [8, 16, 32, 64, 128, 256, 512]
    draw_sweep(plans, tmp_path / "sweep.png", "smollm2")
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert len(sweep_table(plans).splitlines()) == 1 + 2 * len(GPUS)
    # A batch cannot leave a rank without a prompt.
    assert plans[-1][0].work.batch == 512


def test_lengths_come_from_the_tokenizer_where_there_is_one(tmp_path: Path) -> None:
    source = toy_checkpoint(tmp_path / "model")
    config = load_config(write_config(tmp_path, toy_settings(tmp_path, source)), [])
    made = make_planner(config)
    assert made.lengths.note == "the run's own data and tokenizer"
    assert len(set(made.lengths.contrast)) > 3
    assert made.lengths.prefix > 5
    assert all(stage.times.step[0] > 0 for stage in made.plan(Cluster(2, 80 * GIB, DEVICES["a100"])))


def test_an_unknown_model_is_told_how_to_be_known(tmp_path: Path) -> None:
    config = load_config(None, ["model.path=nobody/nothing"])
    with pytest.raises(UserError, match=r"^model.path: nobody/nothing: .*--model-config"):
        make_planner(config)
    shapes = {**published_config("smollm2-135m-instruct").to_dict(), "num_hidden_layers": 13}
    (tmp_path / "config.json").write_text(json.dumps(shapes, default=str))
    assert depth(make_planner(config, model_config=tmp_path / "config.json").model.config) == 13
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"no usable config\.json"):
        make_planner(config, model_config=tmp_path / "config.json")


def test_a_layer_beyond_the_model_is_refused() -> None:
    config = load_config(REPOSITORY / "configs" / "smollm2.yaml", ["refine.layer=30"])
    with pytest.raises(UserError, match=r"refine\.layer=30 is beyond the model"):
        describe_plan(config, 8)


def test_more_gpus_hold_less_each_and_send_the_rest() -> None:
    few, many = plan("llama3_70b", 8)["refine"], plan("llama3_70b", 64)["refine"]
    assert many.memory.optimizer == pytest.approx(few.memory.optimizer / 8, rel=1e-3)
    assert many.traffic.parameters > few.traffic.parameters
    assert few.times.step[0] < few.times.step[1] < few.times.step[2]
    assert all(math.isfinite(value) and 0 < value < 1 for value in few.times.mfu)
