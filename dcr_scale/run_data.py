"""What a run reads but the model, and what it would do with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from dcr_scale.config import Config, Label
from dcr_scale.data.contrast import GENERAL, ContrastSet, load_contrast
from dcr_scale.data.instructions import (
    OWN,
    Instruction,
    InstructionSet,
    MixturePools,
    build_mixture,
    load_answered,
    load_general,
    load_refusals,
)
from dcr_scale.data.leakage import check_leakage
from dcr_scale.data.splitting import normalised
from dcr_scale.errors import UserError


@dataclass(frozen=True)
class RunData:
    """What a run reads but the model.

    Attributes:
        mixture: stage 2's training examples, none where there is no stage 2. As long as the model has not been asked,
            prompts of ``asked`` stand among them without a response.
        asked: what the model is to answer before it is trained, without responses.
        pools: what the mixture is drawn from; None where there is no stage 2.
    """

    contrast: ContrastSet
    general: InstructionSet
    mixture: list[Instruction]
    asked: list[Instruction]
    pools: MixturePools | None = None


def load_data(config: Config, own: Sequence[Instruction] | None = None) -> RunData:
    """Read, split and mix.

    Args:
        own: the model's own answers, where the configuration asks for some; None: it has not been asked yet.

    Raises UserError for sources that cannot be used, stages that share toxic prompts, and too few examples.
    """
    seed = config.run.seed
    contrast, general = load_contrast(config.data, seed), load_general(config.data, seed)
    if config.align is None:
        return RunData(contrast, general, [], [])
    refusals = load_refusals(config.data, seed)
    asked = _asked(config, contrast)
    answered = [*load_answered(config.data, seed), *(asked if own is None else own)]
    check_leakage(contrast, refusals, answered)
    pools = MixturePools(
        general.train,
        refusals.train,
        answered,
        refusal_share=config.align.refusal_share,
        answered_share=config.align.answered_share,
    )
    mixture = build_mixture(pools, examples=config.align.examples, seed=seed)
    return RunData(contrast, general, mixture, asked, pools)


def _asked(config: Config, contrast: ContrastSet) -> list[Instruction]:
    """The prompts of the source ``own``: a random sample, as the training side is in seeded order."""
    sources = [source for source in config.data.answered if source.path == OWN]
    if not sources:
        return []
    if len(sources) > 1:
        raise UserError("data.answered: the source own is there twice; give it once, with the limit of both")
    mine = [p for p in contrast.train if p.label == "seemingly_toxic" and p.source != GENERAL]
    return [Instruction(p.text, "", False, normalised(p.text), OWN, p.where) for p in mine[: sources[0].limit]]


def describe(config: Config) -> str:
    """What a run of this configuration would do, from its data alone: no model is read, nothing is built."""
    data, lines = load_data(config), [f"model: {config.model.path}"]
    if config.refine is not None:
        train = data.contrast.train
        sides = {label: sum(prompt.label == label for prompt in train) for label in get_args(Label)}
        chosen = config.refine.layer == "auto"
        trunk = "as many layers as the probe chooses" if chosen else f"the first {config.refine.chosen_layer} layers"
        lines.append(
            f"stage 1: {trunk}, {config.refine.loss.name} loss, at most "
            f"{config.refine.steps} steps of {config.refine.batch_size} prompts, from {sides['seemingly_toxic']} "
            f"seemingly toxic and {sides['toxic']} toxic ones ({len(data.contrast.heldout)} held out) -> "
            f"{config.run.folder / 'refined'}"
        )
    if data.asked:
        lines.append(f"answers: the model's own to at most {len(data.asked)} seemingly toxic prompts, for stage 2")
    if config.align is not None and data.pools is not None:
        rehearsed = config.align.rehearsal.batch_size if config.align.rehearsal.weight else 0
        general, refused, answered = data.pools.counts(len(data.mixture))
        scarce = f"; of {data.pools.scarce()} there are no more" if config.align.examples is None else ""
        lines.append(
            f"stage 2: {config.align.method}, {config.align.epochs:g} epochs of {len(data.mixture)} examples "
            f"({general} general instructions, {refused} refusals, {answered} answered prompts{scarce}), "
            f"{config.align.batch_size} a step"
            f"{f' beside {rehearsed} rehearsed contrast prompts' if rehearsed else ''} -> "
            f"{config.run.folder / 'aligned'}"
        )
    if config.probe.every:
        lines.append(
            f"probe: every {config.probe.every} steps and at each stage's start and end, {config.probe.pairs} pairs of "
            f"each kind and {config.probe.prompts} prompts of each class"
        )
    if config.look.enabled:
        lines.append(f"looks: {config.look.prompts} held-out prompts a class, before and after each stage")
    return "\n".join(lines)
