"""Low-rank updates saved beside the model instead of merged into it, as peft loads them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dcr_scale.config import LoraConfig
from dcr_scale.errors import UserError
from dcr_scale.models import disk
from dcr_scale.models.checkpoint import Checkpoint, header
from dcr_scale.models.lora import plain_layers
from dcr_scale.models.manifest import ALONE, MANIFEST_FILE, Digests, Manifest
from dcr_scale.models.phases import Phases
from dcr_scale.world import World

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"


def export_adapter(
    destination: Path,
    model: nn.Module,
    settings: LoraConfig,
    base: str,
    *,
    world: World,
    extra_files: Mapping[str, str] | None = None,
    gather: Callable[[list[nn.Parameter]], AbstractContextManager] = nullcontext,
) -> None:
    """Write the adapter in ``model`` to the folder ``destination``, for ``peft.PeftModel.from_pretrained``.

    ``model`` is the causal language model that peft's layers have been injected into, ``settings`` what they were
    made of, ``base`` the path or Hub id of the model they belong to. Factors keep their dtype. ``gather`` makes
    partitioned parameters whole inside its context, for one factor at a time. ``extra_files`` are texts by file name.
    An existing ``destination`` is replaced once the new one is complete.

    Every rank calls this; each disk gets the whole folder. Raises the same UserError on every rank when any fails,
    and for adapters that are no plain LoRA on linear layers; the old ``destination`` is as it was then.
    """
    phases = Phases(Path(destination), world)
    phases.find_writers()
    path = phases.partial / WEIGHTS_FILE
    try:
        with phases.together():
            factors = _factors(model)
            if phases.writes:
                phases.make_partial()
                shapes = {name: (f.dtype, getattr(f, "ds_shape", f.shape)) for name, f in factors.items()}
                path.write_bytes(header(shapes, {"format": "pt"})[0])
                config = _config(model, settings, base)
                (phases.partial / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
                for name, text in (extra_files or {}).items():
                    (phases.partial / name).write_text(text, encoding="utf-8")
        with phases.together():
            _append(path, factors, phases.writes, gather)
        with phases.together():
            if phases.writes:
                weights = Checkpoint.of_file(path)
                digests = Digests.of(weights)
                for name, info in weights.tensors.items():
                    digests.add(name, 0, weights.read_bytes(name, 0, info.nbytes))
                hashes = digests.complete(ALONE, weights.read_bytes)
                manifest = Manifest.of_folder(weights, hashes)
                (phases.partial / MANIFEST_FILE).write_text(manifest.text(), encoding="utf-8")
                disk.replace_folder(phases.destination)
    except BaseException:
        if phases.writes:
            shutil.rmtree(phases.partial, ignore_errors=True)
        raise


def _factors(model: nn.Module) -> dict[str, nn.Parameter]:
    """Each A [r, in] and B [out, r] under the name that peft saves it by."""
    found = {}
    for name, layer, adapter in plain_layers(model):
        if hasattr(layer, "parameter_name"):
            raise UserError(
                f"{name}.{layer.parameter_name}: an adapter of fused experts is laid out for one version of peft only; "
                "merge it (align.lora.export=merged)"
            )
        for which, factors in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
            found[f"base_model.model.{name}.{which}.weight"] = factors[adapter].weight
    if not found:
        raise UserError("the model holds no adapter to export")
    return dict(sorted(found.items()))


@torch.no_grad()
def _append(
    path: Path,
    factors: Mapping[str, nn.Parameter],
    writes: bool,
    gather: Callable[[list[nn.Parameter]], AbstractContextManager],
) -> None:
    failure: OSError | None = None
    for factor in factors.values():
        with gather([factor]):
            # After a failure a writer still takes part in gathering, or the others would wait for it.
            if not writes or failure is not None:
                continue
            try:
                with disk.descriptor(path, os.O_WRONLY) as opened:
                    data = disk.bytes_of(factor.detach().cpu().contiguous().view(-1))
                    disk.write(opened, data, os.fstat(opened).st_size)
            except OSError as error:
                failure = error
    if failure is not None:
        raise failure


def _config(model: nn.Module, settings: LoraConfig, base: str) -> dict[str, Any]:
    import peft

    config = peft.LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=_targets(model),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
    )
    # Sets have no order, and the files should not depend on a process's hash seed.
    tree = {name: sorted(value) if isinstance(value, set) else value for name, value in config.to_dict().items()}
    return dict(sorted(tree.items()))


def _targets(model: nn.Module) -> list[str]:
    """Last parts of the adapted modules' names where these say enough (``q_proj``), else whole names."""
    adapted = {name for name, _, _ in plain_layers(model)}
    last_parts = {name.rpartition(".")[2] for name in adapted}
    others = (name for name, module in model.named_modules() if name.rpartition(".")[2] in last_parts)
    return sorted(last_parts if set(others) == adapted else adapted)
