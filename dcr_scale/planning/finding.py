"""The model's configuration, wherever it can be had without its weights and without a network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from dcr_scale.config import ModelConfig
from dcr_scale.errors import UserError
from dcr_scale.models import smollm2
from dcr_scale.models.cache import cache_folder
from dcr_scale.models.trunk import read_config
from dcr_scale.planning.published import published_config


@dataclass(frozen=True)
class FoundModel:
    """``folder`` holds the tokenizer as well, where there is one; ``origin`` says where the configuration is from."""

    config: PretrainedConfig
    folder: Path | None
    origin: str


class NoShapes(UserError):
    """The model's configuration is not at hand; what else a plan raises, the run would refuse."""


def find_model(model: ModelConfig, override: Path | None = None) -> FoundModel:
    """The configuration out of ``override`` (a config.json, or a folder with one), a local folder, the Hub's cache, or
    the published shapes that this package knows; in that order.

    Raises NoShapes where none of them has it, and UserError for a configuration that cannot be refined.
    """
    if override is not None:
        return FoundModel(_read_file(override, model), None, str(override))
    folder = _local_folder(model)
    if folder is not None:
        tokenizer = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
        return FoundModel(read_config(folder, model), folder if tokenizer else None, str(folder))
    published = published_config(model.path)
    if published is not None:
        return FoundModel(published, None, "published shapes")
    raise NoShapes(
        f"model.path: {model.path}: neither a folder with config.json, nor in the Hub's cache, nor one of the models "
        "whose shapes are known; set it to a folder that holds config.json, or give that file to launchers/plan.py by "
        "--model-config"
    )


def _local_folder(model: ModelConfig) -> Path | None:
    folder = Path(model.path).expanduser()
    if folder.is_dir():
        return folder
    if model.path == smollm2.NAME:
        built = cache_folder() / smollm2.NAME
        return built if built.is_dir() else None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model.path, "config.json", revision=model.revision)
    except HFValidationError:
        raise NoShapes(f"model.path: {model.path}: no such folder, and no Hub id (owner/name) either") from None
    return Path(found).parent if isinstance(found, str) else None


def _read_file(path: Path, model: ModelConfig) -> PretrainedConfig:
    if path.is_dir():
        return read_config(path, model)
    try:
        values = PretrainedConfig._dict_from_json_file(path)
        return AutoConfig.for_model(values.pop("model_type"), **values)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] or type(error).__name__
        raise UserError(f"--model-config {path}: no usable config.json ({reason})") from None
