"""What the baselines' launchers do: read, load, fit or ask, write."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from dcr_scale import engine as engines
from dcr_scale.baselines import scans, surgical
from dcr_scale.baselines.prompts import Name, read_prompts, read_set
from dcr_scale.baselines.scores import Fitted
from dcr_scale.config import DataConfig, EngineConfig, ModelConfig
from dcr_scale.data.chat import ChatEncoder
from dcr_scale.data.splitting import seeded_order
from dcr_scale.errors import UserError
from dcr_scale.evaluation.generation import padded_attention
from dcr_scale.models.loading import Placement, find_source, open_source, read_tokenizer
from dcr_scale.models.trunk import read_config
from dcr_scale.own_answers import own_answers
from dcr_scale.runlog import configure_console, duration, finite
from dcr_scale.world import World, cannot_write, device_name, from_environment, versions

log = logging.getLogger(__name__)

_FITS: Mapping[str, Callable[..., Fitted]] = {"surgical": surgical.fit, "scans": scans.fit}


def run(
    method: str,
    model: ModelConfig,
    out: Path,
    *,
    files: Mapping[Name, str | None],
    data: DataConfig,
    seed: int,
    options: Mapping[str, Any],
) -> Fitted:
    """Fit ``method`` on ``model`` and write ``out``.safetensors and ``out``.json, the table that it was chosen from.

    Args:
        files: a file for each set of prompts; None: what a run of ``data`` and ``seed`` trains on.
        data: also for its system prompt.
        options: keywords of the method's ``fit``.

    Raises UserError for whatever the user can put right.
    """
    began = time.perf_counter()
    world = _alone()
    prompts = read_prompts(files, data, seed=seed)
    loaded, encoder = load_whole(model, data.system_prompt, world)
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
        "prompts": {name: path or _sources(data, name) for name, path in files.items()},
        "seed": seed,
        "device": device_name(world.device),
        **versions(),
        "seconds": round(time.perf_counter() - began, 1),
    }
    table, vectors = out.with_name(f"{out.name}.json"), out.with_name(f"{out.name}.safetensors")
    _write(table, json.dumps(finite(report), indent=2, allow_nan=False) + "\n")
    fitted.steering.save(vectors)
    log.info("chosen: %s", json.dumps(finite(fitted.facts)))
    log.info("%s in %s; wrote %s and %s", method, duration(report["seconds"]), vectors, table)
    return fitted


def write_answers(
    model: ModelConfig,
    out: Path,
    *,
    file: str | None,
    data: DataConfig,
    seed: int,
    limit: int,
    max_new_tokens: int,
) -> None:
    """Ask ``model`` the seemingly toxic prompts of ``file``, or those that a run of ``data`` and ``seed`` trains on.

    What it answers goes to ``out`` as JSONL. Raises UserError for whatever the user can put right."""
    world = _alone()
    prompts = read_set("seemingly_toxic", file, data, seed=seed)
    asked = [p.text for p in seeded_order(prompts, lambda p: p.text, seed=seed, purpose="answers")[:limit]]
    loaded, encoder = load_whole(model, data.system_prompt, world)
    rows = own_answers(loaded, encoder, asked, max_new_tokens=max_new_tokens)
    _write(out, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    log.info("%d of %d prompts answered; wrote %s", len(rows), len(asked), out)


def _sources(data: DataConfig, name: Name) -> list[str]:
    return [source.path for source in (data.general if name == "harmless" else data.contrast)]


def _alone() -> World:
    """This process, its console ready. Raises UserError where others were started beside it."""
    world = from_environment()
    configure_console(world.rank)
    transformers_logging.set_verbosity_error()
    if world.size > 1:
        raise UserError(f"this runs in one process, and {world.size} were started; start it by python")
    return world


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(cannot_write(path, error)) from None


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
        attention=padded_attention(config),
        dtype=engines.compute_dtype(settings, world.device),
        settings=settings,
        world=world,
    )
    return placement.load(stored, model), encoder
