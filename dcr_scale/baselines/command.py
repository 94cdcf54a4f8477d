"""A baseline fitted from the command line: read, load, fit, write."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from dcr_scale import engine as engines
from dcr_scale.baselines import scans, surgical
from dcr_scale.baselines.prompts import Name, read_prompts
from dcr_scale.baselines.scores import Fitted
from dcr_scale.config import EngineConfig, ModelConfig
from dcr_scale.data.chat import ChatEncoder
from dcr_scale.errors import UserError
from dcr_scale.models.loading import Placement, find_source, open_source, read_tokenizer
from dcr_scale.models.trunk import read_config
from dcr_scale.runlog import configure_console, duration, finite
from dcr_scale.world import World, cannot_write, device_name, from_environment, versions

log = logging.getLogger(__name__)

_FITS = {"surgical": surgical.fit, "scans": scans.fit}


def run(
    method: str,
    model: ModelConfig,
    out: Path,
    *,
    files: Mapping[Name, str | None],
    seed: int,
    system_prompt: str | None,
    options: Mapping[str, Any],
) -> Fitted:
    """Fit ``method`` on ``model`` and write ``out``.safetensors and ``out``.json, the table that it was chosen from.

    ``options`` are keywords of the method's ``fit``. Raises UserError for whatever the user can put right.
    """
    began = time.perf_counter()
    world = from_environment()
    configure_console(world.rank)
    transformers_logging.set_verbosity_error()
    if world.size > 1:
        raise UserError(f"a baseline is fitted by one process, and {world.size} were started; start it by python")
    prompts = read_prompts(files, seed=seed)
    loaded, encoder = load_whole(model, system_prompt, world)
    log.info(
        "%s on %s: %s", method, device_name(world.device),
        ", ".join(f"{len(side.train)} + {len(side.validation)} {name}" for name, side in prompts.items()),
    )  # fmt: skip
    fitted = _FITS[method](loaded, encoder, prompts, **options)
    report = {
        "method": method,
        "model": model.path,
        "chosen": fitted.facts,
        "tried": fitted.tried,
        "prompts": {name: path or "builtin" for name, path in files.items()},
        "seed": seed,
        "device": device_name(world.device),
        **versions(),
        "seconds": round(time.perf_counter() - began, 1),
    }
    table, vectors = out.with_name(f"{out.name}.json"), out.with_name(f"{out.name}.safetensors")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        table.write_text(json.dumps(finite(report), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(cannot_write(table, error)) from None
    fitted.steering.save(vectors)
    log.info("chosen: %s", json.dumps(finite(fitted.facts)))
    log.info("%s in %s; wrote %s and %s", method, duration(report["seconds"]), vectors, table)
    return fitted


def load_whole(model: ModelConfig, system_prompt: str | None, world: World) -> tuple[PreTrainedModel, ChatEncoder]:
    """The model whole on this process's device, taking padded rows, and an encoder that drops what is too long."""
    source = find_source(model, world)
    config = read_config(source, model)
    encoder = ChatEncoder(read_tokenizer(source, model), system_prompt=system_prompt, overlong="drop")
    settings = EngineConfig()
    stored = open_source(source, config, model)
    placement = Placement.choose(
        "no",
        stored.checkpoint,
        attention="sdpa",
        dtype=engines.compute_dtype(settings, world.device),
        settings=settings,
        world=world,
    )
    return placement.load(stored, model), encoder
