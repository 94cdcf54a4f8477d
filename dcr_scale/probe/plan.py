"""What a measurement would take on a cluster, computed from the model's configuration: nothing is built or loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig

from dcr_scale.models.trunk import build_skeleton, decoder_layers
from dcr_scale.probe.estimator import jackknives
from dcr_scale.probe.passes import plan_micro_batches
from dcr_scale.probe.reduction import owners, pair_blocks
from dcr_scale.probe.units import Inventory, select, shape_of, take_inventory
from dcr_scale.runlog import size

_FLOAT, _DOUBLE, _INTEGER = 4, 8, 8


@dataclass(frozen=True)
class ProbePlan:
    """One measurement of ``prompts`` prompts with one another, under ZeRO-3. Bytes are those of the busiest rank.

    Attributes:
        micro_steps: forward and backward passes on every rank.
        partition: the rank's part of the weights.
        layer: one decoder layer's weights, gathered for its passes.
        head: the head's weights, gathered, and in float32 beside that, before the passes begin.
        checkpoints: a micro-batch's inputs of all layers, where layers are recomputed; what a layer keeps inside comes
            on top. 0 where they are not: what they all keep is not planned.
        gathered: parameters received from other ranks over the whole measurement, at most: what is still there from
            the step before is not fetched again.
        kept: projected inputs held between a micro-batch's forward and backward pass.
        sketches: the rank's own sketches, float32.
        slices: the slices that the rank owns, of all prompts, float32.
        exchanged: sketches, hidden states, inner products and estimates sent to other ranks.
    """

    prompts: int
    world_size: int
    units: int
    micro_steps: int
    partition: int
    layer: int
    head: int
    checkpoints: int
    gathered: int
    kept: int
    sketches: int
    slices: int
    exchanged: int

    @property
    def held(self) -> int:
        """The most of what is planned that a rank holds at once: before, in or after the passes."""
        passes = self.layer + self.checkpoints + self.kept + self.sketches
        return self.partition + max(self.head, passes, self.sketches + self.slices)

    def table(self) -> str:
        """The plan as text."""
        rows = [
            ("prompts", f"{self.prompts:,}"),
            ("ranks", f"{self.world_size:,}"),
            ("sketched weights", f"{self.units:,}"),
            ("micro-steps a rank", f"{self.micro_steps:,}"),
            ("held a rank: weights", size(self.partition)),
            ("  a gathered layer", size(self.layer)),
            ("  the head, gathered and in float32", size(self.head)),
            ("  inputs of recomputed layers", size(self.checkpoints)),
            ("  projected inputs", size(self.kept)),
            ("  own sketches", size(self.sketches)),
            ("  all prompts' sketches in the owned slices", size(self.slices)),
            ("  at once, without activations inside layers", size(self.held)),
            ("received a rank: parameters, at most", size(self.gathered)),
            ("sent a rank: sketches, products, estimates", size(self.exchanged)),
        ]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value:>12}" for name, value in rows)


def plan_measurement(
    config: PretrainedConfig,
    lengths: Sequence[int],
    *,
    world_size: int,
    rank: int = 16,
    groups: int = 4,
    output_probes: int = 4,
    parameters: str = "all",
    micro_batch_tokens: int = 4096,
    element_bytes: int = 2,
    checkpointing: bool = True,
    persistence_threshold: int = 100_000,
    trust_remote_code: bool = False,
) -> ProbePlan:
    """Plan the measurement of prompts of ``lengths`` tokens with one another.

    Raises ValueError for fewer prompts than ranks, and for a parameter whose gradient no rule sketches.

    Args:
        config: the model's transformers configuration.
        rank, groups, output_probes, parameters, micro_batch_tokens: of :class:`~dcr_scale.probe.KernelProbe`.
        element_bytes: of a weight and an activation.
        checkpointing: activations are recomputed in the backward pass, which gathers every layer once more.
        persistence_threshold: parameters of fewer elements are whole on every rank anyway.
        trust_remote_code: the model's code may come with its configuration.
    """
    if len(lengths) < world_size:
        raise ValueError(f"{len(lengths)} prompts are fewer than the {world_size} ranks")
    model = build_skeleton(config, trust_remote_code=trust_remote_code)
    inventory = take_inventory(model, select(model, parameters))
    plan = plan_micro_batches(lengths, output_probes, world_size=world_size, limit=micro_batch_tokens)
    items = [sum(len(step) for step in steps) for steps in plan]
    tokens = max(sum(lengths[item // output_probes] for item in step) for steps in plan for step in steps)
    widths = [0] * inventory.slices
    for unit in inventory.units:
        widths[unit.slice] += rank**2
    routed = getattr(config.get_text_config(), "num_experts_per_tok", None) or 1
    products = sum({"linear": 1, "experts": routed}.get(unit.kind, 0) for unit in inventory.units)
    shares = owners(inventory.slices, world_size)
    owned = [sum(widths[s] for s in share) for share in shares]
    total = len(lengths) * output_probes
    vocabulary, hidden = shape_of(inventory.head.weight)
    crosses = inventory.tied and inventory.head_counts
    beside = hidden + (output_probes * hidden if crosses else 0)
    # A single rank's modules see its part of the weights itself, which is all of them.
    whole_bytes = element_bytes if world_size > 1 else 0
    layers = decoder_layers(model)
    exchanged = [
        items[r] * groups * (sum(widths) - owned[r]) * _FLOAT
        + (world_size - 1) * items[r] * (beside * _FLOAT + (2 + crosses) * _INTEGER)
        + _products_sent(len(lengths), r, shares, inventory.slices, groups, output_probes)
        for r in range(world_size)
    ]
    return ProbePlan(
        prompts=len(lengths),
        world_size=world_size,
        units=len(inventory.units),
        micro_steps=len(plan[0]),
        partition=sum(math.ceil(p.numel() / world_size) for p in model.parameters()) * element_bytes,
        layer=max(sum(p.numel() for p in layer.parameters()) for layer in layers) * whole_bytes,
        head=vocabulary * hidden * (whole_bytes + (_FLOAT if element_bytes < _FLOAT else 0)),
        checkpoints=len(layers) * tokens * hidden * element_bytes if checkpointing else 0,
        gathered=_gathered(model, inventory, len(plan[0]), world_size, checkpointing, persistence_threshold)
        * element_bytes,
        kept=tokens * products * groups * rank * element_bytes,
        sketches=max(items) * groups * sum(widths) * _FLOAT,
        slices=total * groups * max(owned) * _FLOAT,
        exchanged=max(exchanged),
    )  # fmt: skip


def _gathered(
    model: nn.Module, inventory: Inventory, micro_steps: int, world_size: int, checkpointing: bool, threshold: int
) -> int:
    """Elements received for parameters: a part of ceil(n / W) from each of the others, each time.

    A layer runs forward, again where it is recomputed, and backward. Recomputation ends in the layer's last product,
    whose matrix is still there when the backward pass begins with it. What stands outside the layers runs forward
    only: the backward pass is cut off at the embedding's output and begins at the final hidden state. The head is
    gathered once more, to take the output probes back through it, and all else to see whether prompts can be packed.
    """
    layers = decoder_layers(model)
    passes = dict.fromkeys((id(p) for p in layers.parameters()), 2 + checkpointing)
    if checkpointing:
        last = {unit.slice: unit.parameter for unit in inventory.units if unit.kind in ("linear", "experts")}
        passes.update({id(parameter): 2 for parameter in last.values()})
    received = 0
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if parameter.numel() >= threshold:
                times = passes.get(id(parameter), 1) * micro_steps + 1
                received += times * math.ceil(parameter.numel() / world_size) * (world_size - 1)
    return received


def _products_sent(prompts: int, sender: int, shares: list[range], slices: int, groups: int, probes: int) -> int:
    """Bytes of inner products that one rank hands to the ranks which add up a block of pairs, and of the estimates of
    its own blocks, which every rank gets."""
    world_size, blocks = len(shares), groups if groups > 1 else 4
    estimate = 2 + sum(jackknives(groups, probes)) + slices - 1
    sent = 0
    for number, (rows, met) in enumerate(pair_blocks(prompts, prompts, slices, blocks, probes, symmetric=True)):
        pairs = len(rows) * len(met)
        if number % world_size == sender:
            sent += (world_size - 1) * pairs * estimate * _DOUBLE
        else:
            sent += len(shares[sender]) * blocks * pairs * probes**2 * _DOUBLE
    return sent
