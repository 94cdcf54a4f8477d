"""Prompts that must not be where they are: trained on in both stages, or trained on and held out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dcr_scale.data.contrast import ContrastPrompt, ContrastSet
from dcr_scale.data.instructions import Instruction, InstructionSet
from dcr_scale.data.sources import listed
from dcr_scale.data.splitting import shared_prompts
from dcr_scale.errors import UserError


def check_leakage(contrast: ContrastSet, refusals: InstructionSet, answered: Sequence[Instruction] = ()) -> None:
    """Raise UserError where a prompt, in normal form, is where it must not be.

    The stages must not share toxic prompts, neither training nor held-out ones, and what stage 1 calls seemingly
    toxic must not be refused in stage 2. What STL-aug answers must not be refused, toxic or held out; stage 1 may train
    on it too. Within a stage the split by family keeps the two sides apart.
    """
    toxic = [prompt for prompt in contrast.train if prompt.label == "toxic"]
    if shared := _shared([*toxic, *contrast.heldout, *refusals.train, *refusals.heldout], answered):
        raise UserError(
            f"data.answered: prompts that are held out, toxic or refused elsewhere: {listed(shared)}; remove them there"
        )
    stage_2 = [*refusals.train, *refusals.heldout]
    for label in ("toxic", "seemingly_toxic"):
        stage_1 = [prompt for prompt in (*contrast.train, *contrast.heldout) if prompt.label == label]
        if shared := _shared(stage_1, stage_2):
            raise UserError(
                f"stage 1's {label} prompts are refused in stage 2 too: {listed(shared)}; remove them from "
                f"data.contrast or data.refusals"
            )


def _shared(some: Iterable[ContrastPrompt | Instruction], others: Iterable[ContrastPrompt | Instruction]) -> list[str]:
    return shared_prompts(map(_placed, some), map(_placed, others))


def _placed(item: ContrastPrompt | Instruction) -> tuple[str, str]:
    """A prompt's text, and where it is."""
    return item.text if isinstance(item, ContrastPrompt) else item.prompt, item.where or item.source
