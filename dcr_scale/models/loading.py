"""From a checkpoint's name to a model that runs: found, read, and built whole on each rank or spread over them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import psutil
import torch
from torch import nn
from transformers import AutoTokenizer, GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from dcr_scale import engine as engines
from dcr_scale.config import EngineConfig, ModelConfig
from dcr_scale.errors import UserError
from dcr_scale.models.checkpoint import Checkpoint, resolve
from dcr_scale.models.stored import StoredModel
from dcr_scale.models.tensor_map import build_tensor_map
from dcr_scale.models.trunk import build_model, build_skeleton
from dcr_scale.models.verified_loading import load_verified
from dcr_scale.world import World
from dcr_scale.zero3 import release

Partitioned = Literal["auto", "yes", "no"]

Built = TypeVar("Built", bound=nn.Module)


def find_source(model: ModelConfig, world: World) -> Path:
    """The checkpoint's folder. The first rank of each node fetches or converts; the others find it done.

    Every rank calls it. Raises UserError, the same on all, for whatever :func:`~.checkpoint.resolve` refuses.
    """
    folder: Path | None = None
    with world.agreed():
        if world.local_rank == 0:
            folder = resolve(model)
    with world.agreed():
        folder = folder or resolve(model)
    assert folder is not None
    return folder


# What a chat is, which nobody may tell otherwise.
_GIVEN = ("messages", "tools", "documents", "add_generation_prompt", "true", "false", "none")


def read_tokenizer(folder: Path, model: ModelConfig) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer, its chat template told what ``model.template`` says.

    Raises UserError where it cannot be read, or is code that is not trusted, or where there is no template to tell.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=model.trust_remote_code)
    except Exception as error:  # a broken tokenizer folder fails in as many ways as there are formats
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{folder}: its tokenizer is Python code that comes with the checkpoint; set "
                "model.trust_remote_code=true if you trust the source"
            ) from None
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{folder}: the tokenizer cannot be read ({reason})") from None
    if model.template:
        template = tokenizer.chat_template
        if not isinstance(template, str):
            raise UserError(f"{folder}: model.template is given, and its tokenizer has no chat template, or several")
        unknown = [
            name for name in model.template
            if name in _GIVEN or not name.isidentifier() or not re.search(rf"\b{name}\b", template)
        ]  # fmt: skip
        if unknown:
            raise UserError(f"model.template: the chat template of {folder} reads no variable {', '.join(unknown)}")
        # In the template itself, so that whoever renders a chat with this tokenizer renders the same.
        told = (f"{{%- set {k} = {json.dumps(v, ensure_ascii=False)} %}}" for k, v in model.template.items())
        tokenizer.chat_template = "".join(told) + template
    return tokenizer


def open_source(folder: Path, config: PretrainedConfig, model: ModelConfig) -> StoredModel:
    """What to build and which bytes to fill it with; nothing is built, and only headers are read.

    Raises UserError for a damaged checkpoint, one that does not fit ``config``, and a model that cannot be packed.
    """
    checkpoint = Checkpoint.open(folder, allow_pickle=model.allow_pickle)
    skeleton = build_skeleton(config, trust_remote_code=model.trust_remote_code)
    return StoredModel(config, checkpoint, build_tensor_map(skeleton, checkpoint))


@dataclass(frozen=True)
class Placement:
    """Where a model that only runs, and does not train, has its parameters, in which precision and by which attention.

    ``partitioned``: spread over the ranks by ZeRO-3; else whole on each.
    """

    partitioned: bool
    attention: str
    dtype: torch.dtype
    settings: EngineConfig
    world: World

    @classmethod
    def choose(
        cls,
        wanted: Partitioned,
        checkpoint: Checkpoint,
        *,
        attention: str,
        dtype: torch.dtype,
        settings: EngineConfig,
        world: World,
    ) -> Placement:
        """As ``wanted``; under ``auto``, spread where some rank's device cannot hold the model. Every rank calls it."""
        partitioned = world.size > 1 and wanted != "no"
        if partitioned and wanted == "auto":
            size = dtype.itemsize * sum(math.prod(info.shape) for info in checkpoint.tensors.values())
            # Room for the cache and logits beside the weights.
            (shortest,) = world.max(-float(_free_memory(world)))
            partitioned = 1.5 * size > -shortest
        return cls(partitioned, attention, dtype, settings, world)

    def build(self, build: Callable[[], Built]) -> Built:
        """The module that ``build`` makes, placed, in evaluation mode and with undefined weights."""
        if self.partitioned:
            with engines.partitioned(self.settings, self.dtype, self.world.device):
                return build().eval()
        return build().to(self.world.device).eval()

    def load(self, stored: StoredModel, model: ModelConfig) -> PreTrainedModel:
        """The whole causal language model with the checkpoint's weights and its generation settings."""
        built = self.build(
            lambda: build_model(
                stored.config, attention=self.attention, dtype=self.dtype, trust_remote_code=model.trust_remote_code
            )
        )
        load_verified(built, stored.checkpoint, stored.tensor_map, self.world)
        folder = stored.checkpoint.folder
        if (folder / "generation_config.json").exists():
            # Says which tokens end an answer.
            built.generation_config = GenerationConfig.from_pretrained(folder)
        return built

    @contextmanager
    def running(self, module: nn.Module) -> Iterator[nn.Module]:
        """:meth:`runnable` for a while; what ZeRO-3 holds of the module is let go then."""
        run: Any = self.runnable(module)
        yield run
        if self.partitioned:
            release(run)

    def runnable(self, module: nn.Module) -> nn.Module:
        """A callable that runs the filled module's passes: itself, or an engine that gathers what they need."""
        if self.partitioned:
            return engines.inference_engine(module, self.settings, self.world)
        return module


def _free_memory(world: World) -> int:
    """Bytes this rank may still take: free on its GPU, or its share of the machine's available memory."""
    if world.device.type == "cuda":
        return torch.cuda.mem_get_info(world.device)[0]
    return psutil.virtual_memory().available // world.local_size
