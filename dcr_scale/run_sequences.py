"""What a run trains on, in token ids: what a stage would refuse is refused now, not hours into the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dcr_scale.align import encode_mixture
from dcr_scale.config import Config
from dcr_scale.data.chat import ChatEncoder, EncodedExample
from dcr_scale.data.contrast import EncodedContrast, encode_contrast
from dcr_scale.data.instructions import Instruction
from dcr_scale.refine import contrast_sampler
from dcr_scale.rehearsal import check_rehearsal
from dcr_scale.resume.run_folder import Share
from dcr_scale.run_data import RunData
from dcr_scale.world import World


@dataclass(frozen=True)
class RefineSequences:
    """Stage 1's. Looks and stage 2 need ``contrast`` too, so it is there without a stage 1 as well.

    ``retained``: general prompts that retention holds. ``share``: a rank's part of a step; None without a stage 1.
    """

    contrast: EncodedContrast
    retained: list[list[int]]
    share: Share | None


@dataclass(frozen=True)
class AlignSequences:
    """Stage 2's, but for those that the model is yet to answer; empty without a stage 2.

    ``examples``: ``mixture`` in token ids. ``questions``: what the model is to answer. ``share``: as stage 1's.
    """

    mixture: list[Instruction]
    examples: list[EncodedExample]
    questions: list[Instruction]
    share: Share | None


def encode_refine(config: Config, data: RunData, encoder: ChatEncoder, world: World) -> RefineSequences:
    """Raises UserError where stage 1 cannot make its batches, or a prompt is too long and must not be dropped."""
    contrast, settings = encode_contrast(data.contrast, encoder), config.refine
    if settings is None:
        return RefineSequences(contrast, [], None)
    contrast_sampler(settings, contrast.train.prompts, config.run.seed, world)
    drawn: list[tuple[Sequence[Sequence[int]], int]] = [(contrast.train.ids, settings.batch_size)]
    retained: list[list[int]] = []
    if settings.retention.weight:
        general = [instruction.prompt for instruction in data.general.train[: settings.retention.prompts]]
        encoded = encoder.encode_prompts(general, "general prompts for retention")
        retained = [ids for ids in encoded if ids is not None]
        drawn.append((retained, settings.retention.batch_size))
    return RefineSequences(contrast, retained, _share(drawn, encoder.prefix, world))


def encode_align(
    config: Config, data: RunData, contrast: EncodedContrast, encoder: ChatEncoder, world: World
) -> AlignSequences:
    """Raises UserError where stage 2 cannot make its batches, or an example is too long and must not be dropped."""
    settings = config.align
    if settings is None:
        return AlignSequences([], [], [], None)
    # As with every prompt: what is too long is refused, or left out, before anything is built.
    questions = [
        one
        for one in data.asked
        if encoder.encode_example(one.prompt, one.prompt, max_tokens=settings.max_tokens) is not None
    ]
    mixture, examples = encode_mixture(data.mixture, encoder, settings, world.size)
    beside = 0
    if settings.rehearsal.weight:
        beside = check_rehearsal(settings, contrast.train, prefix=encoder.prefix, seed=config.run.seed, world=world)
    ids = [example.ids for example in examples]
    share = _share([(ids, min(settings.batch_size, len(ids)))], encoder.prefix, world)
    return AlignSequences(mixture, examples, questions, Share(share.tokens + beside, share.longest + beside))


def _share(drawn: Sequence[tuple[Sequence[Sequence[int]], int]], prefix: int, world: World) -> Share:
    """A rank's part of a step that draws so many out of each list of sequences."""
    tokens, longest = 0.0, 0
    for sequences, count in drawn:
        lengths = [len(ids) - prefix for ids in sequences]
        tokens += count * sum(lengths) / max(1, len(lengths))
        longest = max([longest, *lengths])
    return Share(round(tokens / world.size), longest)
