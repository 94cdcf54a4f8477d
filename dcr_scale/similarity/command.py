"""Two sets of prompts compared by their kernel similarity: read, load, measure, average, write."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch

from dcr_scale import engine as engines
from dcr_scale import typed_yaml
from dcr_scale.command_line import written
from dcr_scale.data.chat import ChatEncoder
from dcr_scale.errors import UserError
from dcr_scale.joining import joined
from dcr_scale.models import attention
from dcr_scale.models.checkpoint import resolve
from dcr_scale.models.loading import Placement, find_source, open_source, read_tokenizer
from dcr_scale.models.trunk import depth, read_config
from dcr_scale.probe import KernelProbe, KernelSimilarity
from dcr_scale.probe.plan import plan_measurement
from dcr_scale.runlog import duration, finite
from dcr_scale.similarity import pictures
from dcr_scale.similarity.averages import Averages, averages, group_masks
from dcr_scale.similarity.prompts import Classes, read_classes
from dcr_scale.similarity.settings import SimilarityConfig
from dcr_scale.world import World, device_name, peak_memory_gib, versions

log = logging.getLogger(__name__)


def run(config: SimilarityConfig) -> dict[str, Any]:
    """Measure, write everything to ``config.out``, and return what ``summary.json`` holds.

    Every rank calls it. Raises UserError, the same on all ranks, for whatever the user can put right.
    """
    fewer = f"--micro-batch-tokens {max(16, config.micro_batch_tokens // 2)}"
    helps = ["--partitioned yes", fewer, "model.gradient_checkpointing=true"]
    with joined(config.engine, helps=helps) as world:
        return measure(config, world)


def measure(config: SimilarityConfig, world: World) -> dict[str, Any]:
    """What :func:`run` does between joining the other ranks and leaving them."""
    began = time.perf_counter()
    with world.agreed():
        classes = read_classes(config)
        if world.first:
            with written(config.folder):
                config.folder.mkdir(parents=True, exist_ok=True)
    source = find_source(config.model, world)
    # The probe's refusals hold on all ranks alike, and their text is for whoever gave the settings.
    try:
        probe, facts = _load(config, source, world)
        loaded = time.perf_counter()
        log.info("%s: %d + %d prompts on %d × %s", source, *classes.sizes, world.size, device_name(world.device))
        similarity = probe.measure([prompt.text for prompt in classes.prompts], exact=config.exact)
    except ValueError as error:
        raise UserError(str(error)) from error
    measured = time.perf_counter()
    found = averages(similarity, classes, seed=config.seed)
    (memory,) = world.max(peak_memory_gib(world.device))
    summary = {
        "model": str(source),
        **facts,
        "classes": dict(zip("ab", classes.names, strict=True)),
        "prompts": dict(zip("ab", classes.sizes, strict=True)),
        "matched_pairs": int(classes.matched.sum()) // 2,
        **_results(found),
        "settings": typed_yaml.to_tree(config),
        "world_size": world.size,
        "device": device_name(world.device),
        **versions(),
        "seconds": {"load": round(loaded - began, 1), "measure": round(measured - loaded, 1)},
        "peak_memory_gib": round(memory, 2),
    }
    with world.agreed():
        if world.first:
            _write(config.folder, similarity, found, classes, summary)
    log.info("\n%s", table(found, classes))
    if found.left_out:
        log.info(
            "%d prompts took no part as x': the estimates of their own kernels are not positive; raise --output-probes",
            found.left_out,
        )
    log.info(
        "\nmeasured in %s, at most %.1f GiB a rank; everything is in %s",
        duration(measured - loaded), memory, config.folder,
    )  # fmt: skip
    return summary


def describe(config: SimilarityConfig) -> str:
    """What a run with these settings would do, from its prompts alone: no model is read."""
    classes = read_classes(config)
    a, b = (f"{size} {name}" for name, size in zip(classes.names, classes.sizes, strict=True))
    pairs = int(classes.matched.sum()) // 2
    how = "exactly" if config.exact else f"under {config.output_probes} output probes"
    return f"{config.model.path}: {a} and {b} prompts ({pairs} matched pairs), each with each, {how} -> {config.folder}"


def plan(config: SimilarityConfig, ranks: int) -> str:
    """What the measurement would take on ``ranks`` ranks, as text: from the model's configuration and tokenizer alone.

    Raises UserError for a model without them, prompts that cannot be read, and parameters that no rule sketches.
    """
    classes = read_classes(config)
    folder = resolve(config.model, weights=False)
    encoder = ChatEncoder(read_tokenizer(folder, config.model))
    lengths = [len(encoder.encode(prompt.text)) for prompt in classes.prompts]
    # A cluster of GPUs is planned for, where auto is bf16.
    precision = "fp32" if config.engine.precision == "fp32" else "bf16"
    try:
        planned = plan_measurement(
            read_config(folder, config.model),
            lengths,
            world_size=ranks,
            rank=config.rank,
            groups=config.groups,
            output_probes=config.output_probes,
            parameters=config.parameters,
            micro_batch_tokens=config.micro_batch_tokens,
            element_bytes=4 if precision == "fp32" else 2,
            checkpointing=config.model.gradient_checkpointing,
            persistence_threshold=config.engine.persistence_threshold,
            trust_remote_code=config.model.trust_remote_code,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    return f"{planned.table()}\nin {precision}"


def table(found: Averages, classes: Classes) -> str:
    """The averages as text, with their errors."""
    names = pictures.titles(classes)
    rows = [(names[name], average) for name, average in found.groups.items()]
    rows.append(("across / within", found.across_over_within))
    head = "kernel similarity ‖K(x', x)‖ / ‖K(x', x')‖"
    width = max(len(head), *(len(name) for name, _ in rows))
    lines = [
        f"{head:<{width}} {'average':>8} {'95 % interval':>16}   {'error: prompts':>14} {'estimator':>9} {'pairs':>7}"
    ]
    for name, average in rows:
        interval = f"{average.interval[0]:.3f} … {average.interval[1]:.3f}"
        lines.append(
            f"{name:<{width}} {average.value:>8.3f} {interval:>16}   {average.stderr_prompts:>14.3f} "
            f"{average.stderr_estimator:>9.3f} {average.pairs:>7}"
        )
    return "\n".join(lines)


def _load(config: SimilarityConfig, source: Path, world: World) -> tuple[KernelProbe, dict[str, Any]]:
    """The probe on the loaded model, and what the summary says of the model."""
    model_config = read_config(source, config.model)
    tokenizer = read_tokenizer(source, config.model)
    stored = open_source(source, model_config, config.model)
    dtype = engines.compute_dtype(config.engine, world.device)
    placement = Placement.choose(
        config.partitioned,
        stored.checkpoint,
        attention=attention.choose(config.model.attention, world.device, dtype),
        dtype=dtype,
        settings=config.engine,
        world=world,
    )
    model = placement.load(stored, config.model)
    # The engine's hooks gather for the module's own passes, which are all that the probe makes.
    placement.runnable(model)
    if config.model.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    probe = KernelProbe.configured(model, config, tokenizer, parameters=config.parameters)
    facts = {
        "parameters": sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters()),
        "layers": depth(model_config),
        "precision": str(dtype).removeprefix("torch."),
        "partitioned": placement.partitioned,
    }
    return probe, facts


def _results(found: Averages) -> dict[str, Any]:
    layers = {
        name: {key: values.tolist() for key, values in asdict(parts).items()} for name, parts in found.layers.items()
    }
    return {
        "similarity": {
            **{name: asdict(average) for name, average in found.groups.items()},
            "across_over_within": asdict(found.across_over_within),
        },
        "by_layer": layers,
        "prompts_left_out": found.left_out,
    }


def _write(
    folder: Path, similarity: KernelSimilarity, found: Averages, classes: Classes, summary: dict[str, Any]
) -> None:
    model = f"{Path(summary['model']).name}, {summary['precision']}"
    masks = group_masks(classes)
    values = {name: similarity.normalized[masks[name]] for name in found.groups}
    with written(folder):
        (folder / "similarity.safetensors").write_bytes(_tensors(similarity, classes))
        text = json.dumps(finite(summary), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        (folder / "summary.json").write_text(text, encoding="utf-8")
        pictures.heat_map(folder / "heat_map.png", similarity.normalized, classes, model)
        pictures.distributions(folder / "distributions.png", values, found, classes, model)
        pictures.layer_curves(folder / "layers.png", found, classes, model)


def _tensors(similarity: KernelSimilarity, classes: Classes) -> bytes:
    """All pairs' numbers; ``prompts`` in the metadata says in JSON which prompt each row and column is."""
    names = ("squared", "known", "stderr", "normalized", "by_layer", "self_squared", "deviations", "self_deviations")
    labels = ["a"] * classes.sizes[0] + ["b"] * classes.sizes[1]
    prompts = [
        {"class": label, "pair": prompt.pair, "prompt": prompt.text, "where": prompt.where}
        for label, prompt in zip(labels, classes.prompts, strict=True)
    ]
    metadata = {
        "classes": json.dumps(dict(zip("ab", classes.names, strict=True)), ensure_ascii=False),
        "prompts": json.dumps(prompts, ensure_ascii=False),
    }
    return safetensors.torch.save({name: getattr(similarity, name).contiguous() for name in names}, metadata)
