"""What the probe says of a run's model as a whole: where stage 1 should end, and whether Proposition 1 holds there."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from dcr_scale import engine as engines
from dcr_scale.config import Config, RefineConfig
from dcr_scale.data.chat import ChatEncoder
from dcr_scale.data.contrast import EncodedContrast, EncodedPrompts, encode_contrast, load_contrast
from dcr_scale.errors import UserError
from dcr_scale.joining import joined
from dcr_scale.models import attention
from dcr_scale.models.loading import Placement, find_source, open_source, read_tokenizer
from dcr_scale.models.stored import StoredModel
from dcr_scale.models.trunk import read_config
from dcr_scale.probe.layer_choice import LayerChoice, choose_layer, matched_pairs
from dcr_scale.probe.proposition import Correlation, Proposition, measure_proposition
from dcr_scale.refine import check_layer
from dcr_scale.runlog import finite
from dcr_scale.world import World, device_name, seed_everything, versions

log = logging.getLogger(__name__)

# Prompts from which Q of Proposition 1 is estimated.
_REFERENCE = 16


def measure_layer(
    config: Config, stored: StoredModel, heldout: EncodedPrompts, prefix: int, world: World
) -> LayerChoice:
    """Load the model, choose ℓ on held-out matched pairs, and print the table and the reason. Every rank calls it.

    Raises UserError where no choice can be made.
    """
    assert config.refine is not None
    log.info("choosing refine.layer on held-out matched pairs")
    with _loaded(config, stored, world) as model:
        try:
            choice = choose_layer(
                model, heldout, config.probe, prefix=prefix, pooling=config.refine.pooling, world=world
            )
        except ValueError as error:
            raise UserError(f"refine.layer=auto: {error}; or set refine.layer to a number") from error
    log.info("%s\n%s", choice.table(), choice.reason)
    return choice


def show_layer(config: Config) -> LayerChoice:
    """What ``refine.layer: auto`` would choose, whatever the configuration says; nothing is trained or written.

    Every rank calls it. Raises UserError, the same on all ranks, for whatever the user can put right.
    """
    with _inputs(config) as given:
        stored = open_source(given.source, read_config(given.source, config.model), config.model)
        return measure_layer(config, stored, given.contrast.heldout, given.prefix, given.world)


def show_proposition(config: Config) -> dict[str, Proposition]:
    """Measure Proposition 1 at ℓ on ``probe.pairs`` held-out matched pairs: before stage 1, and after it where the
    run's folder holds a refined model. The result goes to ``proposition.json`` in that folder.

    Every rank calls it. Raises UserError, the same on all ranks, for whatever the user can put right.
    """
    with _inputs(config) as given:
        prompts, reference = _held_out_pairs(given.contrast, config.probe.pairs)
        models = {"before": given.source}
        if (config.run.folder / "refined" / "config.json").is_file():
            models["refined"] = config.run.folder / "refined"
        layer: int | None = None if given.refine.layer == "auto" else given.refine.layer
        found: dict[str, Proposition] = {}
        for name, folder in models.items():
            model_config = read_config(folder, config.model)
            stored = open_source(folder, model_config, config.model)
            if layer is None:
                layer = measure_layer(config, stored, given.contrast.heldout, given.prefix, given.world).layer
            check_layer(layer, model_config, folder)
            with _loaded(config, stored, given.world) as model:
                try:
                    found[name] = measure_proposition(
                        model, prompts, reference, layer, config.probe,
                        prefix=given.prefix, pooling=given.refine.pooling, world=given.world,
                    )  # fmt: skip
                except ValueError as error:
                    raise UserError(f"Proposition 1 cannot be measured on {folder}: {error}") from error
            # At once: the next model takes as long again.
            _write(config, found, given.world)
        log.info("%s", proposition_table(found))
        return found


def proposition_table(found: dict[str, Proposition]) -> str:
    """Rank correlations with ‖K‖_F and what became of the kernel, one line for each model and kind of pair."""

    def shown(correlation: Correlation) -> str:
        return f"{correlation.value:+.2f} [{correlation.low:+.2f}, {correlation.high:+.2f}]"

    titles = f"{'ρ with ‖K‖_F':<28}  pairs  {'of the cosine':<20}  {'of h′ᵀQh':<20}"
    lines = [f"{titles}  mean cosine  kernel similarity  from ℓ on"]
    for name, result in found.items():
        for kind, pairs in (("all pairs", result.all), ("across the classes", result.cross)):
            title = f"{name}, {kind}"
            lines.append(
                f"{title:<28}  {pairs.pairs:>5}  {shown(pairs.cosine)}  {shown(pairs.tail_form)}  "
                f"{pairs.mean_cosine:>11.3f}  {pairs.similarity:>17.3f}  {pairs.above:>9.0%}"
            )
    return "\n".join(lines)


# --- what both need ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Inputs:
    refine: RefineConfig
    source: Path
    contrast: EncodedContrast
    prefix: int
    world: World


@contextmanager
def _inputs(config: Config) -> Iterator[_Inputs]:
    """A configuration's model and prompts, without what only a run needs."""
    if config.refine is None:
        raise UserError("refine is null: without stage 1 there is no layer ℓ to ask about")
    fewer = f"probe.micro_batch_tokens={max(16, config.probe.micro_batch_tokens // 2)}"
    helps = ["look.partitioned=yes", fewer, "model.gradient_checkpointing=true"]
    with joined(config.engine, helps=helps) as world:
        seed_everything(config.run.seed)
        source = find_source(config.model, world)
        with world.agreed():
            encoder = ChatEncoder.configured(read_tokenizer(source, config.model), config.data)
            contrast = encode_contrast(load_contrast(config.data, config.run.seed), encoder)
        yield _Inputs(config.refine, source, contrast, encoder.prefix, world)


@contextmanager
def _loaded(config: Config, stored: StoredModel, world: World) -> Iterator[PreTrainedModel]:
    """The whole model, spread over the ranks where a device cannot hold it."""
    dtype = engines.compute_dtype(config.engine, world.device)
    placement = Placement.choose(
        config.look.partitioned,
        stored.checkpoint,
        attention=attention.choose(config.model.attention, world.device, dtype),
        dtype=dtype,
        settings=config.engine,
        world=world,
    )
    model = placement.load(stored, config.model)
    if config.model.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with placement.running(model):
        yield model


def _held_out_pairs(contrast: EncodedContrast, count: int) -> tuple[EncodedPrompts, list[list[int]]]:
    """Both sides of the first ``count`` held-out matched pairs, and training prompts to estimate Q from."""
    heldout = contrast.heldout
    rows = [i for pair in matched_pairs(heldout)[:count] for i in pair]
    if len(rows) < 4:
        raise UserError(
            "Proposition 1 is measured on matched pairs; data.contrast holds out fewer than two (see data.heldout)"
        )
    prompts = EncodedPrompts(tuple(heldout.prompts[i] for i in rows), tuple(heldout.ids[i] for i in rows))
    return prompts, list(contrast.train.ids[:_REFERENCE])


def _write(config: Config, found: dict[str, Proposition], world: World) -> None:
    path = config.run.folder / "proposition.json"
    with world.agreed(path):
        if world.first:
            path.parent.mkdir(parents=True, exist_ok=True)
            results = {name: result.as_dict() for name, result in found.items()}
            facts = {"world_size": world.size, "device": device_name(world.device), **versions(), **results}
            path.write_text(json.dumps(finite(facts), indent=2, allow_nan=False) + "\n", encoding="utf-8")
