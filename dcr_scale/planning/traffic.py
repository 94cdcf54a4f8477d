"""Bytes that a rank sends in an optimiser step."""

from __future__ import annotations

from dataclasses import dataclass

from dcr_scale.config import EngineConfig
from dcr_scale.planning.gathering import Coordinator, Gathers, backward, forward, persistent
from dcr_scale.planning.modules import ModuleList

# A pooled row goes with its label and, for the loss, three numbers about it.
_FLOAT, _LABEL, _STATISTICS = 4, 8, 3


@dataclass(frozen=True)
class Traffic:
    """Bytes one rank sends (and as many it receives), and in how many collectives.

    ``parameters``: partitions sent to all others when they gather them; ``gradients``: all parts but its own, sent to
    those that keep them; ``rows``: pooled activations, where there is a contrastive loss.
    """

    parameters: int
    gradients: int
    rows: int
    collectives: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.rows


def step_gathers(
    modules: ModuleList, settings: EngineConfig, *, world_size: int, micro_steps: int, twice: bool, checkpointing: bool
) -> Gathers:
    """Gathers of one optimiser step: ``twice`` puts a forward pass before every micro-step, which has no backward."""
    whole = persistent(modules, settings)
    there, back = forward(modules), backward(modules, checkpointing=checkpointing)
    training = Coordinator(there + back, whole, settings, world_size)
    for _ in range(micro_steps):
        training.run()
    found = training.gathers()
    if twice:
        first = Coordinator(there, whole, settings, world_size)
        for _ in range(micro_steps):
            first.run()
        found = found.beside(first.gathers())
    return found


def plan_traffic(
    modules: ModuleList,
    settings: EngineConfig,
    gathers: Gathers,
    *,
    world_size: int,
    micro_steps: int,
    element_bytes: int,
    rows: int,
    width: int,
) -> Traffic:
    """Of one step. ``rows``: contrast prompts of a rank, whose pooled activations have ``width`` elements."""
    others = world_size - 1
    kept = persistent(modules, settings)
    trained = [p for p in modules.parameters if p.trained]
    # Small parameters that every rank keeps whole are gathered anew after each update.
    renewed = sum(p.part(world_size) for p in modules.parameters if p.number in kept)
    parameters = (gathers.elements + renewed) * element_bytes * others
    gradients = micro_steps * sum(p.part(world_size) for p in trained) * element_bytes * others
    pooled = rows * ((width + _STATISTICS) * _FLOAT + _LABEL) * others
    reductions = micro_steps * (1 + sum(p.numel for p in trained) // settings.reduce_bucket)
    collectives = (gathers.collectives + reductions + 3) if others else 0
    return Traffic(parameters, gradients, pooled, collectives)
